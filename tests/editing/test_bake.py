"""Baked models: the edit written by hand into the weights, for every host family, gives the same outputs.

The oracles know TransformerLens's and Hugging Face's layouts by themselves (`tests/oracle.py`,
`tests/bridge_models.py`) and add scaled outer products to the weights one by one.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from spd_lens import Decomposition, decompose
from spd_lens.core import Unit
from spd_lens.editing import Above, Edit, Habit, Rewrite, edit, load_edit, report, save_baked, save_edit
from spd_lens.hosts import open_host
from tests import bridge_models as bridges
from tests import oracle
from tests.conftest import needs_hooked
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

TOLERANCE = 1e-5
N = 5


def sites_of(model: Any) -> list[str]:
    """The sites that can be decomposed."""
    host, found = open_host(model), []
    for name in host.site_names():
        try:
            host.site(name)
        except ValueError:
            continue
        found.append(name)
    return found


def an_edit(decomposition: Decomposition) -> Edit:
    """Of every site: one subcomponent away, one scaled, one that writes and one that reads another direction."""
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for site, weight in decomposition.items():
        writes = weight.U[2].norm() * torch.randn(weight.U.shape[1], generator=generator) / weight.U.shape[1] ** 0.5
        reads = weight.V[:, 3].norm() * torch.randn(weight.V.shape[0], generator=generator) / weight.V.shape[0] ** 0.5
        changes[site] = {
            0: 0.0,
            1: 2.5,
            2: Rewrite(writes=writes.detach()),
            3: Rewrite(reads=reads.detach(), scale=0.5),
        }
    return edit(decomposition, changes)


def by_hand(made: Edit, site: str, W: Tensor) -> Tensor:
    """The edited matrix of `an_edit`, outer product by outer product."""
    V, U = (x.detach().double() for x in (made.decomposition[site].V, made.decomposition[site].U))
    lines = {change.unit.id: change for change in made.changes if change.unit.site == site}
    writes, reads = lines[2].writes, lines[3].reads
    assert writes is not None
    assert reads is not None
    W = W.detach().double() - torch.outer(V[:, 0], U[0]) + 1.5 * torch.outer(V[:, 1], U[1])
    W = W + torch.outer(V[:, 2], writes.double() - U[2])
    return W + torch.outer(0.5 * reads.double() - V[:, 3], U[3])


# -- HookedTransformer -------------------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize("case", oracle.CASES.values(), ids=oracle.CASES)
def test_a_baked_hooked_transformer_is_the_edit_written_by_hand(case: oracle.Case) -> None:
    model = case.build()
    by_hand_model, batch = copy.deepcopy(model), oracle.tokens_for(model)
    with torch.no_grad():
        clean = model(batch)
    made = an_edit(decompose(model, dict.fromkeys(sites_of(model), N), seed=2))
    with torch.no_grad():
        parameters = dict(by_hand_model.named_parameters())
        for site in made.sites:
            stored = parameters[oracle.parameter_name(by_hand_model, site)]
            new = by_hand(made, site, oracle.weight_of(by_hand_model, site))
            stored.copy_(oracle.as_stored(site, new, stored.shape))
        expected = by_hand_model(batch)
        plain: Any = made.bake()
        baked = plain(batch)
    assert type(plain) is type(by_hand_model)
    oracle.assert_close(baked, expected, TOLERANCE, "baked")
    oracle.assert_close(made.logits(batch), expected, TOLERANCE, "hooked")
    oracle.assert_differs(expected, clean, 0.05)
    assert plain.state_dict().keys() == by_hand_model.state_dict().keys()
    assert set(plain.hook_dict) == set(by_hand_model.hook_dict)
    with torch.no_grad():
        oracle.assert_close(model(batch), clean, 1e-6, "the model that was edited")


@needs_hooked
def test_a_users_hooks_stay_with_the_model_that_is_decomposed() -> None:
    model = tiny_transformer()
    made = edit(decompose(model, {"blocks.0.mlp.W_in": N}), {"blocks.0.mlp.W_in": [1]})
    with torch.no_grad():
        expected = made.bake()(tokens(1))
        model.add_hook("blocks.1.hook_resid_pre", lambda x, hook: 0 * x, is_permanent=True)
        assert torch.equal(made.bake(check=False)(tokens(1)), expected)


# -- bridges -----------------------------------------------------------------------------------------------------------


@bridges.every_case
def test_a_baked_bridge_is_the_edit_written_by_hand(family: str, mode: str, tmp_path: Path) -> None:
    batch = bridges.random_tokens()
    made = an_edit(bridges.swapped(family, mode, seed=2))
    if (family, mode) == ("qwen2", "compatibility"):
        with pytest.raises(ValueError, match=r"blocks.0.attn.W_O has a bias here.* or with fold_value_biases=False"):
            made.bake()
        return
    written = bridges.Written(family, mode)
    with torch.no_grad():
        clean = written.bridge(batch)
        for site in made.sites:
            view, scale = written.views[site], bridges.scale_of(family, site)
            W = view.detach().clone().reshape(view.shape[0], -1).double() * scale
            view.copy_((by_hand(made, site, W) / scale).reshape(view.shape))
        expected = written.bridge(batch)
        plain: Any = made.bake()
        baked = plain(batch).logits
    oracle.assert_close(baked, expected, TOLERANCE, "baked")
    oracle.assert_close(made.logits(batch), expected, TOLERANCE, "hooked")
    oracle.assert_differs(expected, clean, 0.05)
    assert type(plain) is type(bridges.pristine(family))
    plain.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, baked)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("site", ["embed.W_E", "unembed.W_U", "blocks.0.mlp.W_in"])
def test_tied_embeddings_become_two_parameters_only_where_they_differ(family: str, site: str, tmp_path: Path) -> None:
    hf_model = copy.deepcopy(bridges.pristine(family))
    hf_model.config.tie_word_embeddings = True
    hf_model.tie_weights()
    assert hf_model.get_output_embeddings().weight is hf_model.get_input_embeddings().weight
    model, batch = bridges.boot(family, hf_model=hf_model), bridges.random_tokens()
    made = edit(decompose(model, {site: N}, seed=2), {site: {1: 3.0}})
    plain: Any = made.bake()
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == (site == "blocks.0.mlp.W_in") == plain.config.tie_word_embeddings
    save_baked(plain, tmp_path / "saved", tokenizer=bridges.tokenizer())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    with torch.no_grad():
        oracle.assert_close(loaded(batch).logits, made.logits(batch), TOLERANCE)
        oracle.assert_differs(made.logits(batch), model(batch), 1e-3)


# -- models of one's own, and shared parameters ------------------------------------------------------------------------


def test_one_stored_matrix_gets_one_value() -> None:
    decomposition = decompose(TiedAutoencoder(), {"encoder.W": 4, "decoder.W": 4}, seed=0)
    with pytest.raises(ValueError, match=r"encoder.W and decoder.W are one stored matrix, and only encoder.W is to be"):
        edit(decomposition, {"encoder.W": [1]}).bake()
    with pytest.raises(ValueError, match="they are to be changed in different ways"):
        edit(decomposition, {"encoder.W": [1], "decoder.W": [2]}).bake()
    made, x = edit(decomposition, {"encoder.W": {1: 0.5}, "decoder.W": {1: 0.5}}), torch.rand(3, 5)
    plain: Any = made.bake()
    V, U = decomposition["encoder.W"].V.detach(), decomposition["encoder.W"].U.detach()
    torch.testing.assert_close(plain.W.detach(), decomposition.model.W.detach() - 0.5 * torch.outer(V[:, 1], U[1]))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), made.logits(x))


class Shared(TiedAutoencoder):
    """Its matrix is registered under a second name, which no site declares."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Module()
        self.other.W = self.W

    def spd_sites(self) -> list[Any]:
        return super().spd_sites()[:1]


def test_a_parameter_that_is_used_elsewhere_is_refused_by_name() -> None:
    decomposition = decompose(Shared(), {"encoder.W": 4}, seed=0)
    with pytest.raises(ValueError, match=r"encoder.W is used in several places of the model \(W, other.W\)"):
        edit(decomposition, {"encoder.W": [1]}).bake()


def test_a_conditional_edit_cannot_be_baked() -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N})
    with pytest.raises(ValueError, match="a plain model has no gates that could tell"):
        edit(decomposition, {"blocks.0.mlp.W_in": [1]}, when=Above(0.5)).bake()


def test_an_edit_that_rounding_swallows_is_an_error() -> None:
    model = tiny_transformer(dtype=torch.bfloat16)
    decomposition = decompose(model, {"blocks.0.mlp.W_in": N})
    with pytest.raises(ValueError, match=r"this edit changes nothing in torch.bfloat16"):
        edit(decomposition, {"blocks.0.mlp.W_in": {1: 1 + 1e-6}}).bake()
    made = edit(decomposition, {"blocks.0.mlp.W_in": [0, 1, 2, 3]})
    assert all(p.dtype == torch.bfloat16 for p in made.bake().parameters())


def test_how_many_entries_change_is_counted() -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N})
    with torch.no_grad():
        decomposition["blocks.0.mlp.W_in"].V[:14, 1] = 0
    assert edit(decomposition, {"blocks.0.mlp.W_in": [1]}).parameters_changed() == {"blocks.0.mlp.W_in": 2 * 32}


# -- without this library ----------------------------------------------------------------------------------------------

_ALONE = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.modules["spd_lens"] = None
import torch
folder, kind = sys.argv[1:]
if kind == "hooked":
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    config = json.load(open(folder + "/config.json"))
    config["dtype"] = getattr(torch, config["dtype"])
    model = HookedTransformer(HookedTransformerConfig.from_dict(config))
    model.load_state_dict(load_file(folder + "/model.safetensors"))
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
with torch.no_grad():
    out = model(torch.arange(6)[None])
print(json.dumps((out if kind == "hooked" else out.logits).double().tolist()))
"""


def test_a_saved_model_runs_without_this_library(tmp_path: Path) -> None:
    made = edit(decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N}), {"blocks.0.mlp.W_in": [1]})
    plain = made.bake()
    kind = "transformers" if isinstance(plain, transformers.PreTrainedModel) else "hooked"
    folder = save_baked(plain, tmp_path / "saved")
    done = subprocess.run([sys.executable, "-c", _ALONE, str(folder), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.tensor(json.loads(done.stdout), dtype=torch.float64)
    oracle.assert_close(got, made.logits(torch.arange(6)[None]).double(), TOLERANCE)
    assert (folder / "model.safetensors").stat().st_mode & 0o044
    assert load_file(folder / "model.safetensors").keys() <= plain.state_dict().keys()


# -- places that cannot be written -------------------------------------------------------------------------------------


@pytest.fixture
def baked() -> nn.Module:
    return edit(decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N}), {"blocks.0.mlp.W_in": [1]}).bake()


def test_a_full_disk_leaves_nothing_behind_and_says_so(baked: nn.Module, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"no room to write .*saved.*Free some space") as caught:
            save_baked(baked, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.ENOSPC
    assert ".tmp" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_edit_that_was_there(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N})
    path = save_edit(edit(decomposition, {"blocks.0.mlp.W_in": [1]}), tmp_path / "edit.json")
    before = path.read_bytes()
    changed = edit(decomposition, {"blocks.0.mlp.W_in": [2]})
    told = report(
        changed, Habit("four", tokens(2), torch.full((2, 1), 4)), tokens(1, seed=8), n_random=0, n_generated=0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"no room to write .*edit.json.*Free some space") as caught:
            save_edit(changed, path)
        with pytest.raises(OSError, match=r"no room to write .*page.html.*Free some space"):
            told.to_html(tmp_path / "page.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_is_read_only_is_named(
    baked: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(error, os.strerror(error))

    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N})
    made = edit(decomposition, {"blocks.0.mlp.W_in": [1]})
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError, match=r"saved cannot be written \(.*\); choose a folder of your own") as caught:
        save_baked(baked, tmp_path / "saved")
    assert caught.value.errno == error
    with pytest.raises(OSError, match=r"edit.json cannot be written \(.*\); choose a folder of your own"):
        save_edit(made, tmp_path / "deeper" / "edit.json")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_stays(baked: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        save_baked(baked, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="exists already; choose another name or remove it"):
        save_baked(baked, tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "mine"


# -- edits on disk -----------------------------------------------------------------------------------------------------


def test_an_edit_comes_back_as_it_was(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": N, "blocks.0.attn.W_Q": N}, seed=1)
    unit = Unit((("blocks.0.mlp.W_in", 4), ("blocks.0.attn.W_Q", 0)), name="commas")
    made = edit(
        decomposition,
        {
            unit: 0.25,
            "blocks.0.attn.W_Q": {1: Rewrite(writes=torch.ones(16)), 2: Rewrite(reads=torch.ones(16), scale=3)},
        },
        when=Above(0.1, of=Unit((("blocks.0.mlp.W_in", 2),))),
    )
    loaded = load_edit(decomposition, save_edit(made, tmp_path / "edit.json"))
    assert str(loaded) == str(made)
    assert torch.equal(loaded.logits(tokens(2)), made.logits(tokens(2)))


def test_an_edit_of_another_decomposition_is_refused(tmp_path: Path) -> None:
    model = tiny_transformer()
    first = decompose(model, {"blocks.0.mlp.W_in": N}, seed=1)
    path = save_edit(edit(first, {"blocks.0.mlp.W_in": [1]}), tmp_path / "edit.json")
    first.remove()
    for other in (
        decompose(model, {"blocks.0.mlp.W_in": N}, seed=2),
        decompose(tiny_transformer(), {"blocks.0.mlp.W_out": N}),
    ):
        with pytest.raises(ValueError, match=r"edit.json is an edit of another decomposition: .*blocks.0.mlp.W_in"):
            load_edit(other, path)
    path.write_text(path.read_text().replace("0.0", "0.5"))
    with pytest.raises(ValueError, match="changed by hand"):
        load_edit(other, path)

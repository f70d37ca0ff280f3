"""Specialists against masks and against weights written by hand; what they cost against formulas; what is refused."""

from __future__ import annotations

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
from torch import Tensor

from spd_lens import decompose
from spd_lens.components import Components, merge_subcomponents
from spd_lens.core import Decomposition, Unit
from spd_lens.specialists import (
    SmallMatrix,
    Specialist,
    costs_of,
    distil,
    domain_of,
    effect_allocation,
    plain_copy,
    refitted,
    specialise,
    uniform_allocation,
)
from spd_lens.statistics import coactivation
from tests import bridge_models, oracle
from tests.small_models import D_VOCAB, randn, tiny_transformer, tokens

SITES: dict[str, int | None] = {"blocks.*.attn.W_*": 10, "blocks.*.mlp.W_*": 12}
needs_hooked = pytest.mark.skipif(bridge_models.TL_MAJOR >= 4, reason="no HookedTransformer")


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    return decompose(tiny_transformer(), SITES, seed=0)


@pytest.fixture(scope="module")
def small(decomposition: Decomposition) -> Specialist:
    return specialise(decomposition, tokens(8), 0.6)


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() < 1e-5 * (1 + expected.abs().max()))


# -- right answers -----------------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_masked_model(decomposition: Decomposition, small: Specialist) -> None:
    new = tokens(4, seed=9)
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=small.masks()):
        masked = decomposition.host.forward(new)
    assert small.exact
    assert any(kept is not None for kept in small.kept.values())
    assert close(small.model(new), masked)
    assert not close(small.model(new), decomposition.host.forward(new))


@needs_hooked
@pytest.mark.parametrize(
    "case", ["ln", "ln_folded", "rms", "rms_pre", "no_norm", "gated", "gqa", "attn_only", "llama_gqa", "mqa"]
)
def test_logits_are_those_of_weights_written_by_hand(case: str) -> None:
    target = oracle.CASES[case].build()
    sites = [site for site in oracle.all_sites(target) if site.startswith("blocks.")]
    written = oracle.CASES[case].build()
    made = specialise(decompose(target, dict.fromkeys(sites, 7), seed=0), oracle.tokens_for(target, 4, 8), 0.7)
    d = made.decomposition
    masks = {}
    for site, kept in made.kept.items():
        if kept is not None:
            mask = torch.zeros(7)
            mask[list(kept)] = 1
            masks[site] = oracle.Masks(d[site].V.detach(), d[site].U.detach(), mask, torch.tensor(0.0))
    assert masks
    new = oracle.tokens_for(target, 3, 7, seed=4)
    assert close(made.model(new), oracle.run_written(written, masks, new))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bridges_become_the_same_plain_model(family: str) -> None:
    d = bridge_models.swapped(family, sites=[s for s in bridge_models.all_sites(family) if s.startswith("blocks.")])
    made = specialise(d, bridge_models.random_tokens(4), 0.8)
    written = bridge_models.Written(family, "raw")
    masks = {}
    for site, kept in made.kept.items():
        if kept is not None:
            mask = torch.zeros(d[site].n_subcomponents)
            mask[list(kept)] = 1
            masks[site] = bridge_models.Masks(d[site].V.detach(), d[site].U.detach(), mask, torch.tensor(0.0))
    assert masks
    new = bridge_models.random_tokens(seed=8)
    with torch.no_grad(), written.masked(masks) as model:
        expected = bridge_models.run(model, new)
    assert close(made.model(new), expected)


def test_matrices_are_smaller_and_counted(decomposition: Decomposition, small: Specialist) -> None:
    rows = tokens(3)
    before, after = small.costs(rows).values()
    shapes = {name: p.numel() for name, p in small.model.named_parameters()}
    assert after.parameters == sum(shapes.values()) == small.parameters
    assert after.parameters <= 0.6 * before.parameters
    assert after.bytes == 4 * after.parameters
    saved = 0
    for site, kept in small.kept.items():
        d_in, d_out = decomposition[site].target_weight.shape
        saved += 0 if kept is None else d_in * d_out - min(d_in * d_out, len(kept) * (d_in + d_out))
    # A constant that takes a matrix's place may need a bias that was not there.
    assert before.parameters - after.parameters >= saved > 0


def test_flops_are_two_a_multiplication(decomposition: Decomposition) -> None:
    rows, d, d_mlp, n = tokens(2), 16, 32, 2 * 12
    matrices = {"blocks.0.mlp.W_in": SmallMatrix(torch.randn(16, 3), torch.randn(3, 32))}
    matrix_flops = 2 * n * (2 * (4 * d * d + 2 * d * d_mlp) + d * D_VOCAB)
    scores = 2 * 2 * (2 * 12 * 12 * d) * 2
    assert costs_of(plain_copy(decomposition), rows).flops == matrix_flops + scores
    none = {"blocks.1.attn.W_Q": SmallMatrix(torch.zeros(16, 0), torch.zeros(0, 16))}
    assert costs_of(plain_copy(decomposition, none), rows).flops == matrix_flops + scores - 2 * n * d * d
    saved = 2 * n * (d * d_mlp - 3 * (d + d_mlp))
    assert costs_of(plain_copy(decomposition, matrices), rows).flops == matrix_flops + scores - saved


def test_what_nothing_reads_or_writes_is_cut_and_the_logits_stay(decomposition: Decomposition) -> None:
    """Heads without values, without output; neurons without input, without output; a block without any."""
    whole = {site: decomposition[site].target_weight.detach().clone() for site in decomposition}
    whole["blocks.0.attn.W_V"][:, 4:8] = 0  # head 1
    whole["blocks.0.attn.W_O"][8:12] = 0  # head 2
    whole["blocks.0.mlp.W_in"][:, :5] = 0
    whole["blocks.0.mlp.W_out"][3:9] = 0
    whole["blocks.1.attn.W_O"][:] = 0
    whole["blocks.1.mlp.W_in"][:] = 0
    made = plain_copy(decomposition, {site: SmallMatrix(W) for site, W in whole.items()})
    specs = [block["matrices"] for block in made.config["blocks"]]
    assert [len(block["kv_of_head"]) for block in made.config["blocks"]] == [2, 0]
    assert specs[0]["in"][1] == specs[0]["out"][0] == 32 - 9
    assert set(specs[1]) == {"o", "out"}
    other = decompose(tiny_transformer(), SITES, seed=0)
    for site, W in whole.items():
        other[site].site.matrix.write(W)
    new = tokens(4, seed=2)
    uncut = plain_copy(other, cut_below=None)
    assert [len(block["kv_of_head"]) for block in uncut.config["blocks"]] == [4, 4]
    assert all(block["matrices"]["in"][:2] == [16, 32] for block in uncut.config["blocks"])
    with torch.no_grad():
        assert close(made(new), other.host.forward(new))
        assert close(uncut(new), other.host.forward(new))


def test_the_best_directions_for_a_gradient_are_kept() -> None:
    values = {"a": torch.tensor([9.0, 1.0, 0.1]), "b": torch.tensor([5.0, 4.0, 0.1])}
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert effect_allocation(values, shapes, 60) == {"a": 1, "b": 2}
    assert effect_allocation(values, shapes, 200) == {"a": 3, "b": 3}
    # Directions of equal worth fill the room, too.
    tied = torch.tensor([3.0, *[1.0] * 9])
    assert effect_allocation({"a": tied}, {"a": (20, 20)}, 300) == {"a": 7}
    assert uniform_allocation(shapes, 100) == {"a": 2, "b": 2}
    assert uniform_allocation(shapes, 200) == {"a": None, "b": None}


def test_effects_are_half_the_kl_of_a_small_change(decomposition: Decomposition) -> None:
    """Taking a hundredth of a subcomponent away costs 1e-4 of its effect; the KL is measured, not estimated."""
    site, rows = "blocks.1.mlp.W_out", tokens(600)
    weight, domain = decomposition[site], domain_of(decomposition, rows)
    effects = domain.effects(site, weight.V.detach(), weight.U.detach())
    c, step = int(effects.argmax()), 0.02
    with torch.no_grad():
        clean = decomposition.host.forward(rows).double().log_softmax(-1)
        mask = torch.ones(weight.n_subcomponents)
        mask[c] = 1 - step
        with decomposition.model.hooks(fwd_hooks=decomposition.mask({site: mask})):
            moved = decomposition.host.forward(rows).double().log_softmax(-1)
    kl = float((clean.exp() * (clean - moved)).sum() / len(rows))
    assert kl / step**2 == pytest.approx(float(effects[c]), rel=0.12)


def test_a_refit_is_a_least_squares_fit() -> None:
    W, x, A = randn(6, 5), randn(40, 6, seed=1), randn(6, 2, seed=2)
    got = refitted(SmallMatrix(A, randn(2, 5, seed=3)), W, x.T @ x / 40)
    assert got.B is not None
    assert torch.allclose(got.B, torch.linalg.lstsq(x @ A, x @ W).solution)


def test_refit_cut_and_tokens_make_a_model_that_runs(decomposition: Decomposition) -> None:
    rows = tokens(6)[:, :6] % 20
    made = specialise(decomposition, rows, 0.5, write="refitted", tokens="domain", cut_below=0.2, distil_steps=3)
    used = rows.unique()
    logits = made.model(rows)
    assert not made.exact
    assert made.model.config["kept_tokens"] == len(used)
    assert made.model.embed.weight.shape == (len(used) + 1, 16)
    assert bool(logits[..., used].isfinite().all())
    gone = torch.ones(D_VOCAB, dtype=torch.bool).index_fill(0, used, False)
    assert bool((logits[..., gone] == -torch.inf).all())
    assert bool(made.model(torch.full((1, 4), D_VOCAB - 1))[..., used].isfinite().all())


def test_tokens_alone_change_no_logit_of_theirs(decomposition: Decomposition) -> None:
    rows = tokens(3) % 25
    few = plain_copy(decomposition, tokens=rows)
    assert torch.allclose(few(rows)[..., rows.unique()], plain_copy(decomposition)(rows)[..., rows.unique()], atol=1e-6)


def test_distillation_brings_a_model_nearer_and_keeps_zeros(decomposition: Decomposition) -> None:
    rows = tokens(8)
    matrices = {"blocks.0.mlp.W_in": SmallMatrix(decomposition["blocks.0.mlp.W_in"].target_weight.detach().clone())}
    matrices["blocks.0.mlp.W_in"].A[:, ::2] = 0
    model = plain_copy(decomposition, matrices, cut_below=0.0)
    pruned = plain_copy(decomposition, {s: SmallMatrix(W.A.tril()) for s, W in matrices.items()})
    losses = distil(model, decomposition.host.forward, rows, steps=30, lr=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    zero = [p == 0 for p in pruned.parameters()]
    distil(pruned, decomposition.host.forward, rows, steps=2, keep_zeros=True)
    assert all(bool((p[z] == 0).all()) for p, z in zip(pruned.parameters(), zero, strict=True))
    assert any(bool(z.any()) for z in zero)


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_a_saved_specialist_runs_without_this_library(small: Specialist, tmp_path: Path) -> None:
    folder = small.save(tmp_path / "small")
    program = (
        "import sys, json, torch; sys.path.insert(0, sys.argv[1]); from model import load; "
        "m = load(sys.argv[1]); t = torch.arange(8)[None]; "
        "foreign = [n for n in sys.modules if n.split('.')[0] in ('spd_lens', 'transformer_lens', 'transformers')]; "
        "print(json.dumps([m(t).tolist(), m.generate(t[:, :3], 4).tolist(), foreign]))"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    logits, written, foreign = json.loads(ran.stdout)
    assert foreign == []
    assert close(torch.tensor(logits), small.model(torch.arange(8)[None]))
    assert len(written[0]) == 7
    kept = json.loads((folder / "specialist.json").read_text())["kept"]
    assert kept == {s: None if k is None else list(k) for s, k in small.kept.items()}


def test_a_full_disk_leaves_nothing(small: Specialist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spd_lens.specialists.specialist.write_tensors", full)
    with pytest.raises(OSError, match=r"no room to write .*small.*Free some space"):
        small.save(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_half_way_leaves_nothing(small: Specialist, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"no room to write .*small.*Free some space"):
            small.save(tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_component_of_another_decomposition_is_refused(decomposition: Decomposition) -> None:
    other = decompose(tiny_transformer(seed=3), SITES, seed=3)
    one = Components.of(other, [{"blocks.0.mlp.W_in": [0, 1]}])[0]
    with pytest.raises(ValueError, match=r"component 0 is a component of another decomposition"):
        specialise(decomposition, tokens(4), 0.6, ids=[one])


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_place_that_is_read_only_is_named(
    small: Specialist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(OSError, match=r"small cannot be written.*Choose another place"):
        small.save(tmp_path / "small")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(decomposition: Decomposition, without_type_checks: None) -> None:
    rows = tokens(4)
    with pytest.raises(ValueError, match=r"budget=0\.01.*even without a single.*expected a budget between"):
        specialise(decomposition, rows, 0.01)
    with pytest.raises(ValueError, match=r"budget=1000000: as it is the model has"):
        specialise(decomposition, rows, 1_000_000)
    with pytest.raises(ValueError, match=r"no decomposed site|near"):
        specialise(decomposition, rows, 0.6, ids={"blocks.0.mlp.W_on": [1]})
    with pytest.raises(ValueError, match="12"):
        specialise(decomposition, rows, 0.6, ids={"blocks.0.mlp.W_in": [12]})
    with pytest.raises(ValueError, match="domain_batches: token ids"):
        specialise(decomposition, rows + 30, 0.6)
    with pytest.raises(ValueError, match="domain_batches is empty"):
        specialise(decomposition, [], 0.6)
    with pytest.raises(TypeError, match="domain_batches"):
        specialise(decomposition, "speeches", 0.6)
    with pytest.raises(ValueError, match="'measured'"):
        specialise(decomposition, rows, 0.6, allocation="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="specialise was given a"):
        specialise(decomposition.model, rows, 0.6)


def test_only_the_given_ids_are_kept(decomposition: Decomposition) -> None:
    unit = Unit((("blocks.0.mlp.W_in", 2), ("blocks.1.mlp.W_out", 3)))
    made = specialise(decomposition, tokens(4), 0.6, ids=unit, allocation="effect")
    kept = {(s, c) for s, k in made.kept.items() if k is not None for c in k}
    assert kept <= set(unit.members)


def test_components_of_another_decomposition_are_refused(decomposition: Decomposition) -> None:
    other = decompose(tiny_transformer(seed=3), SITES, seed=3)
    components = Components.of(other, merge_subcomponents(coactivation(other, tokens(8))))
    with pytest.raises(ValueError, match="another"):
        specialise(decomposition, tokens(4), 0.6, ids=components)


def test_a_removed_decomposition_is_refused(without_type_checks: None) -> None:
    d = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 4})
    d.remove()
    with pytest.raises(ValueError, match="removed"):
        specialise(d, tokens(4), 0.9)


@needs_hooked
@pytest.mark.parametrize("case", ["parallel", "soft_caps", "local_attention", "alibi", "final_rms", "bidirectional"])
def test_models_that_are_no_plain_transformer_are_refused(case: str) -> None:
    target = oracle.CASES[case].build()
    d = decompose(target, {"blocks.0.mlp.W_in": 4})
    with pytest.raises(ValueError, match=r"plain transformer|expected"):
        specialise(d, oracle.tokens_for(target, 3, 8), 0.9)

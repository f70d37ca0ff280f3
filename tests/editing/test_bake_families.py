"""Every family of docs/hosts.md, from a checkpoint in its own format: baked and hooked models agree on random prompts,
and with the edit written by hand into an untouched copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from experiments.families import FAMILIES, N, write_checkpoint, write_weight
from spd_lens import Decomposition, decompose
from spd_lens.core import Unit
from spd_lens.editing import Edit, Rewrite, edit, save_baked
from spd_lens.hosts import open_host
from spd_lens.models import open_model
from tests import oracle
from tests.bridge_models import TL_MAJOR

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
# From its folder TransformerLens 3.9 opens these as a HookedTransformer, too.
HOOKED = ("GPT-2", "Pythia (GPT-NeoX)", "Llama 3", "Mistral", "Qwen 2", "Qwen 3", "Phi-3", "OPT")
CASES = [(family, "bridge") for family in FAMILIES] + [(family, "hooked") for family in HOOKED if TL_MAJOR < 4]


def prompts(seed: int) -> Tensor:
    return torch.randint(1, 2000, (3, 9), generator=torch.Generator().manual_seed(seed))


def block_sites(model: Any) -> dict[str, int | None]:
    return {name: N for name in open_host(model).site_names() if name.startswith("blocks.")}


def an_edit(decomposition: Decomposition) -> Edit:
    """Of every site: one subcomponent away, one at 2.5 times its size, one that writes another direction."""
    generator, changes = torch.Generator().manual_seed(3), {}
    for site, weight in decomposition.items():
        writes = weight.U[2].norm() * torch.randn(weight.U.shape[1], generator=generator) / weight.U.shape[1] ** 0.5
        changes[site] = {0: 0.0, 1: 2.5, 2: Rewrite(writes=writes.detach())}
    return edit(decomposition, changes)


def by_hand(made: Edit, site: str, W: Tensor) -> Tensor:
    """The edited matrix, outer product by outer product."""
    weight = made.decomposition[site]
    V, U = weight.V.detach().double(), weight.U.detach().double()
    writes = next(c.writes for c in made.changes if c.unit.members == ((site, 2),))
    assert writes is not None
    new = W.double() - torch.outer(V[:, 0], U[0]) + 1.5 * torch.outer(V[:, 1], U[1])
    return (new + torch.outer(V[:, 2], writes.double() - U[2])).to(W)


def logits(model: Any, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def test_every_family_of_the_docs_is_here() -> None:
    table = (ROOT / "docs" / "hosts.md").read_text().split("## Families, tried")[1].split("##")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(FAMILIES)
    assert tuple(row[0].removeprefix("| ") for row in rows if "refused" not in row[1]) == HOOKED


@pytest.mark.parametrize("family", ["OPT", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "OPT")])
def test_every_site_has_positions(family: str, tmp_path: Path) -> None:
    """OPT computes its MLPs on `[batch * pos, d]`; hooks, importances and edits at positions see `[batch pos ...]`."""
    model: Any = open_model(write_checkpoint(family, tmp_path / "checkpoint"), host="bridge")
    decomposition = decompose(model, block_sites(model), seed=2)
    assert {g.shape for g in decomposition.importance(prompts(1)).values()} == {(3, 9, N)}
    with torch.no_grad():
        clean = logits(model, prompts(1))
        for site in decomposition:
            with model.hooks(fwd_hooks=decomposition.ablate(Unit(((site, 0), (site, 1)), (4,)))):
                ablated = logits(model, prompts(1))
            assert torch.equal(ablated[:, :4], clean[:, :4])
            oracle.assert_differs(ablated[:, 4:], clean[:, 4:], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "host"), CASES)
def test_baked_hooked_and_written_by_hand_agree(family: str, host: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path / "checkpoint")
    model: Any = open_model(folder, host=host)
    decomposition = decompose(model, block_sites(model), seed=2)
    made = an_edit(decomposition)
    plain: Any = made.bake()
    written: Any = open_model(folder, host=host)
    with torch.no_grad():
        clean = [logits(written, prompts(seed)) for seed in (1, 2)]
        for site in made.sites:
            write_weight(written, host, site, by_hand(made, site, decomposition[site].target_weight))
        for seed, before in zip((1, 2), clean, strict=True):
            expected, baked = logits(written, prompts(seed)), logits(plain, prompts(seed))
            oracle.assert_close(baked, expected, TOLERANCE, "baked")
            oracle.assert_close(made.logits(prompts(seed)), expected, TOLERANCE, "hooked")
            oracle.assert_differs(expected, before, 0.05)
    if host == "bridge":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            save_baked(plain, tmp_path / "saved"), attn_implementation="eager"
        )
        with torch.no_grad():
            assert torch.equal(logits(loaded, prompts(2)), baked)

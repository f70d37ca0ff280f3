"""Gates, starts, mask sources and loss terms of one's own: passed as objects, trained, saved, resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spd_lens import Decomposition, Reconstruction, TrainConfig, decompose, train
from spd_lens.core import Gate, SiteMask, new_modules, sample_masks
from spd_lens.objective import MaskSource
from spd_lens.training import StepView
from tests.small_models import tiny_transformer, tokens

SITES = {"blocks.1.mlp.W_*": 8}


class AffineGate(Gate):
    """`p = scale * |a| + bias`: a gate in a dozen lines."""

    reads_activations = True

    def __init__(self, *, d_in: int, n_subcomponents: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(n_subcomponents, generator=generator))
        self.bias = nn.Parameter(torch.zeros(n_subcomponents))

    def forward(self, x: Tensor, a: Tensor | None = None) -> Tensor:
        assert a is not None
        return self.scale * a.abs() + self.bias


class Halves(MaskSource):
    """Masks halfway between importance and 1."""

    name = "halves"

    def masks(self, importances: Any, *, delta: bool, generator: torch.Generator) -> dict[str, SiteMask]:
        return {name: SiteMask((1 + g) / 2, torch.ones_like(g[..., 0])) for name, g in importances.items()}


class Nameless(MaskSource):
    """Has no name for the log."""

    def masks(self, importances: Any, *, delta: bool, generator: torch.Generator) -> dict[str, SiteMask]:
        raise NotImplementedError


@dataclass(frozen=True)
class PullTogether:
    """Every importance is drawn to 0.5."""

    name: str = "middle"
    coefficient: float = 10.0

    def __call__(self, view: StepView, decomposition: Decomposition) -> Tensor:
        return torch.stack([(g - 0.5).square().mean() for g in view.upper.values()]).mean()


def half_identity(W: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.eye(W.shape[0], count), torch.eye(count, W.shape[1])


def test_a_gate_of_ones_own_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), SITES, gate=AffineGate, seed=1)
    before = decomposition["blocks.1.mlp.W_in"].gate.scale.detach().clone()  # pyright: ignore
    train(decomposition, [tokens(4)], steps=5, log_every=1, out_dir=tmp_path / "run")
    assert not torch.equal(before, decomposition["blocks.1.mlp.W_in"].gate.scale)  # pyright: ignore
    found = decomposition.importance(tokens(4))
    saved = decomposition.save_pretrained(tmp_path / "saved")
    again = Decomposition.from_pretrained(saved, tiny_transformer(), gate=AffineGate)
    for name, g in again.importance(tokens(4)).items():
        assert torch.equal(g, found[name])
    with pytest.raises(ValueError, match="a gate of one's own; give it as gate="):
        Decomposition.from_pretrained(saved, tiny_transformer())
    plain = decompose(tiny_transformer(), SITES).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="leave gate= away"):
        Decomposition.from_pretrained(plain, tiny_transformer(), gate=AffineGate)


def test_what_is_no_gate_is_refused_and_the_model_unchanged() -> None:
    model = tiny_transformer()
    names = set(model.hook_dict)
    with pytest.raises(
        TypeError, match=r"the gate made for blocks.1.mlp.W_in is a Linear; expected a spd_lens.core.Gate"
    ):
        decompose(model, SITES, gate=lambda *, d_in, n_subcomponents, generator: nn.Linear(d_in, n_subcomponents))  # pyright: ignore
    assert set(model.hook_dict) == names


def test_a_start_of_ones_own_is_where_training_starts() -> None:
    decomposition = decompose(tiny_transformer(), SITES, init=half_identity)
    for weight in decomposition.values():
        assert torch.equal(weight.V.detach(), torch.eye(*weight.V.shape))
        assert torch.equal(weight.U.detach(), torch.eye(*weight.U.shape))
    with pytest.raises(ValueError, match=r"init gave V \(3, 3\) .* expected finite values of shape"):
        decompose(tiny_transformer(), SITES, init=lambda W, C, generator: (torch.eye(3), torch.eye(3)))


def test_a_loaded_decomposition_says_how_it_started_and_computes_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pseudo-inverse or singular values of every matrix, to be overwritten at once."""
    saved = {
        kind: decompose(tiny_transformer(), SITES, init=init).save_pretrained(tmp_path / kind)
        for kind, init in (("own", half_identity), ("exact", "exact"), ("singular", "singular"))
    }
    monkeypatch.setattr(new_modules, "initial_factors", None)
    for kind, directory in saved.items():
        loaded = Decomposition.from_pretrained(directory, tiny_transformer())
        again = Decomposition.from_pretrained(loaded.save_pretrained(tmp_path / f"{kind} again"), tiny_transformer())
        assert loaded.settings.init == again.settings.init == kind
        assert all(bool(weight.V.any()) for weight in again.values())


def test_masks_of_ones_own_are_what_the_loss_is_computed_with(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), SITES, gate="shared", gate_width=4)
    rows = tokens(4)
    importances = decomposition.importance(rows)
    with torch.no_grad():
        masks = {n: SiteMask((1 + g) / 2, torch.ones_like(g[..., 0])) for n, g in importances.items()}
        clean, masked = (
            x.log_softmax(-1).double() for x in (decomposition.model(rows), decomposition.masked_forward(rows, masks))
        )
        expected = float((clean.exp() * (clean - masked)).sum(-1).mean())
    config = TrainConfig(steps=1, log_every=1, reconstructions=(Reconstruction(masks=Halves()),))
    line = train(decomposition, [rows], config, out_dir=tmp_path / "run").log[0]
    assert line["halves_all"] == pytest.approx(expected, rel=1e-4)


def test_a_term_of_ones_own_is_logged_and_minimised(tmp_path: Path) -> None:
    decomposition = decompose(tiny_transformer(), SITES, gate="shared", gate_width=4)
    config = TrainConfig(steps=120, lr=1e-2, log_every=1, minimality=0.0, extra_terms=(PullTogether(),))
    log = train(decomposition, [tokens(4)], config, out_dir=tmp_path / "run").log
    assert log[-1]["middle"] < 0.5 * log[0]["middle"]
    total = sum(log[0][name] * weight for name, weight in (("middle", 10), ("faithfulness", 1), ("stochastic_all", 1)))
    assert log[0]["loss"] == pytest.approx(total, rel=1e-5)


def test_a_run_with_objects_of_ones_own_goes_on_when_they_are_given_again(tmp_path: Path) -> None:
    def run(steps: int, **where: Any) -> Decomposition:
        decomposition = decompose(tiny_transformer(), SITES, gate=AffineGate, seed=1)
        config = TrainConfig(
            steps=8,
            checkpoint_every=4,
            extra_terms=(PullTogether(),),
            reconstructions=(Reconstruction(masks=Halves()),),
        )
        train(decomposition, [tokens(4)], config, **where)
        return decomposition

    whole = run(8, out_dir=tmp_path / "whole")
    resumed = run(8, resume_from=tmp_path / "whole" / "checkpoints" / "step-00000004")
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name])
    with pytest.raises(ValueError, match="expected them in config="):
        train(
            decompose(tiny_transformer(), SITES, gate=AffineGate, seed=1), [tokens(4)], resume_from=tmp_path / "whole"
        )


def test_sample_masks_is_a_source_by_name() -> None:
    g = {"site": torch.rand(2, 3, 4)}
    masks = sample_masks(g, kind="importance", generator=torch.Generator())
    assert torch.equal(masks["site"].mask, g["site"])  # pyright: ignore


def test_a_source_without_a_name_for_the_log_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="masks is a Nameless without a name; expected name = "):
        TrainConfig(reconstructions=(Reconstruction(masks=Nameless()),))

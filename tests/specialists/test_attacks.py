"""What an adversarial reading of specialists tried: budgets to the last number, dead parts, 16 bits, wrong places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spd_lens import decompose
from spd_lens.core import Decomposition
from spd_lens.specialists import (
    SmallMatrix,
    checked_plain,
    distil,
    domain_of,
    matrix_budget,
    mean_loss,
    plain_copy,
    specialise,
    specialising,
    whitened_factors,
)
from tests import bridge_models
from tests.small_models import randn, tiny_transformer, tokens

SITES: dict[str, int | None] = {"blocks.*.attn.W_*": 10, "blocks.*.mlp.W_*": 12}


def without_biases() -> Decomposition:
    """Llama has no biases at all."""
    sites = [s for s in bridge_models.all_sites("llama") if s.startswith("blocks.")]
    return bridge_models.swapped("llama", sites=sites)


def with_dead_neurons() -> Decomposition:
    model = tiny_transformer()
    decomposition = decompose(model, SITES, seed=0)
    for block in (0, 1):
        matrix = decomposition[f"blocks.{block}.mlp.W_in"].site.matrix
        W = matrix.read().detach().clone()
        W[:, 4:] = 0
        matrix.write(W)
    return decomposition


@pytest.mark.parametrize("build", [without_biases, with_dead_neurons])
def test_no_specialist_has_more_numbers_than_its_budget(build: Any) -> None:
    decomposition = build()
    rows = tokens(4) if build is with_dead_neurons else bridge_models.random_tokens(4)
    domain = domain_of(decomposition, rows)
    whole = checked_plain(decomposition, domain)
    largest = sum(p.numel() for p in whole.parameters())
    fixed = largest - 1 - matrix_budget(decomposition, domain, whole, largest - 1, None)
    for budget in (fixed + 1, (fixed + largest) // 2, largest - 200):
        made = specialise(decomposition, rows, budget)
        assert made.parameters <= budget
        assert mean_loss(made.model, rows) < 20


def test_the_smallest_specialist_without_biases_computes_what_the_masked_model_does() -> None:
    decomposition = without_biases()
    rows = bridge_models.random_tokens(4)
    domain = domain_of(decomposition, rows)
    whole = checked_plain(decomposition, domain)
    room = matrix_budget(decomposition, domain, whole, 0.999, None)
    made = specialise(decomposition, rows, int(0.999 * sum(p.numel() for p in whole.parameters())) - room + 1)
    assert made.exact
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=made.masks()):
        masked = decomposition.host.forward(rows)
    assert torch.allclose(made.model(rows), masked, atol=1e-5)


@pytest.mark.parametrize("part", ["inputs", "outputs"])
def test_directions_of_a_matrix_that_nothing_enters_or_leaves(part: str) -> None:
    W = randn(6, 5)
    moments = {"inputs": torch.eye(6).double(), "outputs": torch.eye(5).double()}
    moments[part] = torch.zeros_like(moments[part])
    A, B = whitened_factors(W, moments["inputs"], moments["outputs"])
    assert torch.allclose(A @ B, W, atol=1e-5)


def test_a_model_with_a_block_that_does_nothing_gets_a_whitened_specialist() -> None:
    """Nothing depends on what W_in of a block gives whose W_out is zero."""
    decomposition = decompose(tiny_transformer(), SITES, seed=0)
    last = decomposition["blocks.1.mlp.W_out"].site.matrix
    last.write(torch.zeros_like(last.read()))
    made = specialise(decomposition, tokens(4), 0.7, write="whitened")
    assert all(bool(p.isfinite().all()) for p in made.model.parameters())


def test_subcomponents_of_no_block_are_no_choice() -> None:
    decomposition = decompose(tiny_transformer(), {**SITES, "unembed.W_U": 4}, seed=0)
    with pytest.raises(ValueError, match=r"ids names subcomponents of unembed\.W_U alone; only the matrices of blocks"):
        specialise(decomposition, tokens(4), 0.7, ids={"unembed.W_U": [1, 2]})


def test_a_matrix_outside_of_blocks_is_not_left_out_silently() -> None:
    decomposition = decompose(tiny_transformer(), {**SITES, "unembed.W_U": 4}, seed=0)
    W = decomposition["unembed.W_U"].target_weight.detach()
    with pytest.raises(ValueError, match=r"matrices has unembed\.W_U; only the matrices of blocks"):
        plain_copy(decomposition, {"unembed.W_U": SmallMatrix(torch.zeros_like(W))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_plain_model_with_other_logits_is_refused_in_every_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposition = decompose(tiny_transformer(dtype=dtype), SITES, seed=0)
    domain = domain_of(decomposition, tokens(4))
    assert all(p.dtype == dtype for p in checked_plain(decomposition, domain).parameters())
    for value in (torch.nan, 0.3):
        broken = plain_copy(decomposition)
        with torch.no_grad():
            broken.embed.weight[:, 0] = value
            broken.embed.weight[:, 1:3] *= -1
        monkeypatch.setattr(specialising, "plain_copy", lambda *_, own=broken, **__: own)
        with pytest.raises(ValueError, match="gives other logits"):
            checked_plain(decomposition, domain)


class Fixed(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(rows)]


def test_losses_are_not_rounded_to_16_bits() -> None:
    rows = tokens(2)
    logits = (8 * randn(2, rows.shape[1], 40)).to(torch.bfloat16)
    exact = nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), rows[:, 1:].flatten())
    assert mean_loss(Fixed(logits), rows) == pytest.approx(float(exact), rel=1e-5)


def test_a_specialist_of_16_bits_is_made_whole(tmp_path: Any) -> None:
    made = specialise(decompose(tiny_transformer(dtype=torch.bfloat16), SITES, seed=0), tokens(4), 0.7)
    assert all(p.dtype == torch.bfloat16 for p in made.model.parameters())
    assert made.save(tmp_path / "small").is_dir()


def test_numbers_that_are_none_make_no_specialist() -> None:
    """The loss of a model that gives NaN is NaN, and no candidate was lower."""
    for which in ("V", "U"):
        decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0)
        with torch.no_grad():
            getattr(decomposition["blocks.0.mlp.W_in"], which).view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=r"what directions of blocks\.0\.mlp\.W_in are worth is NaN"):
            specialise(decomposition, tokens(4), 0.97)
    with torch.no_grad():
        next(iter(decomposition.host.model.ln_final.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="the model gives NaN on domain_batches"):
        specialise(decomposition, tokens(4), 0.97)


def test_a_distillation_that_diverges_says_so() -> None:
    """A model that gives NaN has lost everything, not nothing."""
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1 of 3; give a smaller lr than 1e\+30"):
        distil(plain_copy(decomposition), decomposition.host.forward, tokens(4), steps=3, lr=1e30)


def test_budgets_are_numbers_of_any_kind_and_said_in_words(without_type_checks: None) -> None:
    decomposition, rows = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0), tokens(4)
    half = specialise(decomposition, rows, 0.97)
    for budget in (np.float32(0.97), torch.tensor(0.97)):
        assert specialise(decomposition, rows, budget).parameters == half.parameters  # pyright: ignore
    for budget in ("0.5", True, None):
        with pytest.raises(
            TypeError, match=r"expected a whole number \(of parameters; a share of the model's is a float"
        ):
            specialise(decomposition, rows, budget)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"budget=5500.0; expected a whole number of parameters \(5500\), or a share"):
        specialise(decomposition, rows, 5500.0)
    with pytest.raises(ValueError, match=r"domain_batches has shape \(12,\); expected \[batch pos\]"):
        specialise(decomposition, rows[0], 0.97)
    for wrong in ({"n_new": -1}, {"n_new": 1, "temperature": -1.0}):
        with pytest.raises(ValueError, match="expected numbers that are not below 0"):
            half.model.generate(rows[:, :3], **wrong)

"""The modular addition model: one block that has learned `a + b mod 53` by Fourier frequencies.

Tokens are `[a, b, 53]`, the last one standing for "=", and the answer is read at the last position. Trained to
grokking with weight decay 1 (`scripts/train_modular_addition.py`), the model computes with a few frequencies
`w = 2 pi k / 53`: the embedding holds `cos(w a)` and `sin(w a)`, the attention brings both numbers to the last
position, the neurons form products, and the unembedding reads `cos(w (a + b - c))` for every answer c (Nanda et al.
2023, "Progress measures for grokking"). The functions here read off which frequencies these are.

The model has d_model 64, 4 heads of 16, 256 ReLU neurons, learned positions, no normalisation, and a vocabulary of
54 tokens in and 53 out. Its outputs at the first two positions were never trained and mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.models.loading import HostName
from spd_lens.models.saved_transformer import load_transformer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

MODULAR_ADDITION_DIRECTORY = Path(__file__).resolve().parent / "shipped" / "modular_addition"
P = 53


# A frequency is a key frequency if it has at least this share of the embedding's squared norm.
KEY_SHARE = 0.1


def load_modular_addition(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, host: HostName | None = None
) -> HookedTransformer | TransformerBridge:
    """The trained modular addition model in eval mode, in the model class of the installed TransformerLens.

    `host` and errors are those of `load_tiny_lm`.
    """
    return load_transformer(MODULAR_ADDITION_DIRECTORY, device, dtype, host)


# -- data ------------------------------------------------------------------------------------------------------------


def all_sums(p: int = P) -> Int[Tensor, "p_squared 3"]:
    """Every question `[a, b, p]`; row `a p + b`."""
    a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
    return torch.stack([a.flatten(), b.flatten(), torch.full((p * p,), p)], dim=1)


class ModularSums:
    """Endless batches of questions `tokens [batch 3]` on the CPU, the same for the same arguments; batch i is drawn
    from `(seed, i)` alone, so that a resumed run finds its place.

    A batch has no question twice; with `batch_size = p^2` it is all of them.
    """

    def __init__(self, batch_size: int, *, seed: int = 0, p: int = P) -> None:
        if p < 2 or not 1 <= batch_size <= p * p:
            raise ValueError(f"batch_size={batch_size} with p={p}; expected between 1 and p^2, the number of sums")
        if seed < 0:
            raise ValueError(f"seed={seed}; expected zero or more")
        self.batch_size, self.seed, self.p = batch_size, seed, p
        self.sums = all_sums(p)

    def __repr__(self) -> str:
        return f"ModularSums(p={self.p}, batches of {self.batch_size}, seed {self.seed})"

    def __iter__(self) -> Iterator[Int[Tensor, "batch 3"]]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Int[Tensor, "batch 3"]]:
        """The batches from number `start` on, without end."""
        index = start
        while True:
            yield self.batch(index)
            index += 1

    def batch(self, index: int) -> Int[Tensor, "batch 3"]:
        """Batch number `index`."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        rows = generator.choice(len(self.sums), self.batch_size, replace=False)
        return self.sums[torch.from_numpy(rows)]


def sum_labels(tokens: Int[Tensor, "batch 3"], p: int = P) -> Int[Tensor, " batch"]:
    """`a + b mod p`."""
    return (tokens[:, 0] + tokens[:, 1]) % p


def sum_accuracy(logits: Float[Tensor, "batch 3 p"], tokens: Int[Tensor, "batch 3"]) -> float:
    """Share of questions whose largest logit at the last position is the right answer."""
    return float((logits[:, -1].argmax(-1) == sum_labels(tokens, logits.shape[-1])).float().mean())


def only_the_answer(logits: Float[Tensor, "batch 3 p"], hook: Any) -> Float[Tensor, "batch 3 p"]:
    """Hook for `unembed.hook_out`: logits 0 at the first two positions, which mean nothing.

    As `model.add_perma_hook("unembed.hook_out", only_the_answer)` it keeps a decomposition from explaining them.
    """
    return torch.cat([torch.zeros_like(logits[:, :-1]), logits[:, -1:]], dim=1)


# -- frequencies -----------------------------------------------------------------------------------------------------


def frequency_shares(values: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows frequencies"]:
    """Shares of the squared norm of `values - mean(values)` over the last axis, by frequency; entry `k - 1` is of

        cos(2 pi k n / p), sin(2 pi k n / p),    k = 1..(p - 1) / 2,    n = 0..p - 1.

    They add up to 1. p is odd. Rows that are constant up to rounding get shares of 0.
    """  # fmt: skip
    if values.shape[-1] % 2 == 0:
        raise ValueError(f"values run over p = {values.shape[-1]} numbers; expected an odd number")
    if values.numel() == 0:  # a Fourier transform of no rows is an error
        return values.new_zeros((*values.shape[:-1], values.shape[-1] // 2))
    centred = values.double() - values.double().mean(-1, keepdim=True)
    power = torch.fft.rfft(centred, dim=-1)[..., 1:].abs().square()
    return _shares(power, centred.square().sum(-1, keepdim=True) * values.shape[-1] / 2).to(values.dtype)


def grid_frequency_shares(values: Float[Tensor, "p p *rows"]) -> Float[Tensor, "*rows frequencies"]:
    """As `frequency_shares`, of functions of both numbers, `values[a, b]`: entry `k - 1` is the share of all products

        f(a) g(b),    f, g in {1, cos(2 pi k n / p), sin(2 pi k n / p)},    without 1 * 1.

    What is left to 1 mixes two frequencies.
    """  # fmt: skip
    p = values.shape[0]
    if p % 2 == 0 or values.shape[1] != p:
        raise ValueError(f"values have shape {tuple(values.shape)}; expected [p, p, ...] with an odd p")
    if values.numel() == 0:
        return values.new_zeros((*values.shape[2:], p // 2))
    centred = values.double() - values.double().mean((0, 1))
    power = torch.fft.fft2(centred, dim=(0, 1)).abs().square() / p**2
    shares = []
    for k in range(1, (p - 1) // 2 + 1):
        own = torch.tensor([0, k, p - k], device=values.device)
        shares.append(power[own][:, own].sum((0, 1)))
    return _shares(torch.stack(shares, dim=-1), centred.square().sum((0, 1))[..., None]).to(values.dtype)


def _shares(power: Tensor, total: Tensor) -> Tensor:
    """`power / total`, 0 where there is nothing but rounding."""
    tiny = torch.finfo(torch.float64).eps
    return torch.where(total > tiny, power / total.clamp_min(tiny), 0)


@dataclass(frozen=True)
class FourierReading:
    """Which frequencies a modular addition model uses.

    - `key_frequencies`: those with at least a tenth of the embedding's squared norm, largest first.
    - `embedding[k - 1]`, `unembedding[k - 1]`: share of the squared norm of `W_E` (numbers only, centred) and of the
      neurons' effect on the logits, `W_out W_U`, along the answers.
    - `embedding_explained`, `unembedding_explained`: what the key frequencies explain of the two.
    - `neuron_frequency`, `neuron_share`: per neuron the frequency that explains most of its activation over all
      questions, and how much (0 and 0 for neurons that are never on).
    - `neurons_explained`: what the key frequencies (each neuron's best) explain of the variance of all neurons.
    """

    key_frequencies: tuple[int, ...]
    embedding: Float[Tensor, " frequencies"]
    unembedding: Float[Tensor, " frequencies"]
    neuron_frequency: Int[Tensor, " neurons"]
    neuron_share: Float[Tensor, " neurons"]
    embedding_explained: float
    unembedding_explained: float
    neurons_explained: float


@torch.no_grad()
def fourier_reading(model: Any) -> FourierReading:
    """Read the frequencies off the weights and off the neurons over all questions. Takes well under a second."""
    p = model.cfg.d_vocab_out
    embedding = _pooled_shares(model.W_E[:p].T)
    unembedding = _pooled_shares(model.W_out[0] @ model.W_U)
    order = embedding.argsort(descending=True).tolist()
    keys = tuple(k + 1 for k in order if embedding[k] >= KEY_SHARE)
    _, cache = model.run_with_cache(
        all_sums(p).to(model.W_E.device), names_filter=lambda name: name == "blocks.0.mlp.hook_post"
    )
    neurons = cache["blocks.0.mlp.hook_post"][:, -1].reshape(p, p, -1)
    shares = grid_frequency_shares(neurons)
    best, where = shares.max(-1)
    on = best > 0
    chosen = torch.tensor([k - 1 for k in keys], dtype=torch.long, device=embedding.device)
    variance = neurons.var((0, 1))
    by_key = shares[:, chosen].amax(-1) if keys else torch.zeros_like(variance)
    return FourierReading(
        key_frequencies=keys,
        embedding=embedding,
        unembedding=unembedding,
        neuron_frequency=(where + 1) * on,
        neuron_share=best * on,
        embedding_explained=float(embedding[chosen].sum()),
        unembedding_explained=float(unembedding[chosen].sum()),
        neurons_explained=float(_shares((by_key * variance).sum(), variance.sum())),
    )


def _pooled_shares(rows: Float[Tensor, "rows p"]) -> Float[Tensor, " frequencies"]:
    """`frequency_shares` of many rows together, each counted by its squared norm around its mean."""
    weight = (rows - rows.mean(-1, keepdim=True)).square().sum(-1)
    return (frequency_shares(rows) * weight[:, None]).sum(0) / weight.sum()

"""The induction model: two attention-only layers that repeat what they have seen, by two heads that work together.

A sequence is a BOS, distinct random tokens, and then the last L of them over and over, with random L: where a token
comes again, the next one is determined, and the model is trained to give it; everywhere else it is trained to give
the uniform distribution. A **previous-token head** in layer 0 writes at each position what token came before; an
**induction head** in layer 1 looks for the position whose previous token is the present one and copies the token
there, and rests on the BOS if there is none.

The model (`scripts/train_induction.py`; `recipe.json` in the data directory records training and readings) has
d_model 64, 4 heads of 16 in each layer, 32 positions, 48 tokens, learned positions, no normalisation, no MLP. The
other six heads have been cut: their output matrices are 0, their queries, keys and values are there and do nothing.
Strong weight decay at the end has left the two heads few directions: the position of the token before takes two in
query and key, everything that carries tokens about ten, out of 16 (and of 64 in the whole matrix).

Limits: it needs a BOS (token 0) at position 0 and accepts at most 32 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.models.loading import HostName
from spd_lens.models.saved_transformer import load_transformer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

INDUCTION_DIRECTORY = Path(__file__).resolve().parent / "shipped" / "induction"


D_VOCAB, N_CTX, BOS = 48, 32, 0


MIN_PERIOD, MAX_PERIOD = 4, 12


# Share of its attention that a head with a clear role gives to where that role looks.
CLEAR_ROLE = 0.5


def load_induction(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, host: HostName | None = None
) -> HookedTransformer | TransformerBridge:
    """The trained induction model in eval mode, in the model class of the installed TransformerLens.

    `host` and errors are those of `load_tiny_lm`.
    """
    return load_transformer(INDUCTION_DIRECTORY, device, dtype, host)


def load_induction_decomposition(device: str | torch.device = "cpu", host: HostName | None = None) -> Decomposition:
    """A fresh induction model with its trained decomposition: all eight attention matrices, C 64 each.

    Made by `python experiments/toy_transformers.py induction --save DIR`, whose output is
    `experiments/results/induction/summary.json`; `docs/reproduction.md` says what it shows and what it does not (it was
    started from singular vectors). Errors as in `load_induction`.
    """
    return Decomposition.from_pretrained(INDUCTION_DIRECTORY / "decomposition", load_induction(device, host=host))


class RepeatedSequences:
    """Endless batches `tokens [batch pos]` on the CPU, the same for the same arguments; batch i is drawn from
    `(seed, i)` alone, so that a resumed run finds its place.

    Each row is a BOS, then r + L distinct random tokens, then the last L of these repeated up to the end:
    `L ~ U{min_period..max_period}`, `r ~ U{0..n_ctx - 1 - 2 L}`, so that the repetition starts anywhere.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        n_ctx: int = N_CTX,
        d_vocab: int = D_VOCAB,
        min_period: int = MIN_PERIOD,
        max_period: int = MAX_PERIOD,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; expected at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed}; expected zero or more")
        if not 1 <= min_period <= max_period:
            raise ValueError(f"periods from {min_period} to {max_period}; expected 1 <= min_period <= max_period")
        if 2 * max_period >= n_ctx or n_ctx - min_period > d_vocab:
            raise ValueError(
                f"periods from {min_period} to {max_period} with n_ctx={n_ctx} and d_vocab={d_vocab}; expected room "
                "for a BOS and two periods, and tokens for n_ctx - 1 - min_period distinct ones beside the BOS"
            )
        self.batch_size, self.seed, self.n_ctx, self.d_vocab = batch_size, seed, n_ctx, d_vocab
        self.min_period, self.max_period = min_period, max_period

    def __repr__(self) -> str:
        periods = f"periods {self.min_period} to {self.max_period}"
        return f"RepeatedSequences({self.n_ctx} tokens, {periods}, batches of {self.batch_size}, seed {self.seed})"

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Int[Tensor, "batch pos"]]:
        """The batches from number `start` on, without end."""
        index = start
        while True:
            yield self.batch(index)
            index += 1

    def batch(self, index: int) -> Int[Tensor, "batch pos"]:
        """Batch number `index`."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        length = self.n_ctx - 1
        periods = generator.integers(self.min_period, self.max_period + 1, (self.batch_size, 1))
        starts = generator.integers(0, length - 2 * periods + 1)
        distinct = generator.random((self.batch_size, self.d_vocab - 1), dtype=np.float32).argsort(axis=1) + 1
        pos = np.arange(length)[None]
        body = np.take_along_axis(distinct, np.where(pos < starts, pos, starts + (pos - starts) % periods), axis=1)
        return torch.from_numpy(np.concatenate([np.full((self.batch_size, 1), BOS), body], axis=1))


# -- what can be predicted -------------------------------------------------------------------------------------------


def earlier_copies(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
    """Whether position k < q holds the same token as q: `[batch q k]`."""
    pos = tokens.shape[1]
    earlier = torch.ones(pos, pos, dtype=torch.bool, device=tokens.device).tril(-1)
    return (tokens[:, :, None] == tokens[:, None, :]) & earlier


def predictable(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Positions whose next token is determined by the repetition: their own token was there before.

    The last position has no next token and is False.
    """
    seen = earlier_copies(tokens).any(-1)
    seen[:, -1] = False
    return seen


def induction_accuracy(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> float:
    """Share of `predictable` positions at which the largest logit is that of the next token.

    Raises ValueError if no position is.
    """
    where = _some_predictable(tokens)[:, :-1]
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return float(right[where].float().mean())


def _some_predictable(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    where = predictable(tokens)
    if not bool(where.any()):
        raise ValueError(
            f"no token of these {len(tokens)} rows comes a second time before the last position, so nothing can be "
            "predicted by induction; RepeatedSequences makes rows in which they do"
        )
    return where


def induction_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """What the model was trained on: mean cross-entropy (nats) over all positions but the last, with the next token
    as the target where it is `predictable` and the uniform distribution elsewhere."""
    log_probs = logits[:, :-1].log_softmax(-1)
    of_next = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -torch.where(predictable(tokens)[:, :-1], of_next, log_probs.mean(-1)).mean()


# -- which head does what --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadRoles:
    """Scores `[layer][head]`, shares of attention averaged over positions; 0 for a head whose `W_O` is 0.

    - `previous`: to the position before, at positions after a token that comes again: where an induction head looks.
    - `induction`: at `predictable` positions, to those after the earlier copies of the present token.
    - `previous_token_head`, `induction_head`: `(layer, head)` of the largest score.
    """

    previous: tuple[tuple[float, ...], ...]
    induction: tuple[tuple[float, ...], ...]

    @property
    def previous_token_head(self) -> tuple[int, int]:
        """Where `previous` is largest."""
        return _largest(self.previous)

    @property
    def induction_head(self) -> tuple[int, int]:
        """Where `induction` is largest."""
        return _largest(self.induction)

    def clear(self, above: float = CLEAR_ROLE) -> dict[str, list[tuple[int, int]]]:
        """All heads whose score is above `above`, by role."""
        return {
            role: [(i, j) for i, layer in enumerate(scores) for j, value in enumerate(layer) if value > above]
            for role, scores in (("previous", self.previous), ("induction", self.induction))
        }


def _largest(scores: tuple[tuple[float, ...], ...]) -> tuple[int, int]:
    _, layer, head = max((value, i, j) for i, row in enumerate(scores) for j, value in enumerate(row))
    return layer, head


@torch.no_grad()
def head_roles(model: Any, tokens: Int[Tensor, "batch pos"]) -> HeadRoles:
    """Read the roles of all heads off the attention patterns of a pass of `model` over `tokens`.

    Raises ValueError if no position of them is `predictable`.
    """
    where = _some_predictable(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    after_copy = torch.nn.functional.pad(earlier_copies(tokens), (1, 0))[..., :-1]
    looked_at = (after_copy & where[:, :, None]).any(1)[:, 1:]
    previous, induction = [], []
    for layer in range(model.cfg.n_layers):
        pattern: Float[Tensor, "batch head q k"] = cache[f"blocks.{layer}.attn.hook_pattern"]
        back = pattern.diagonal(-1, dim1=-2, dim2=-1).transpose(1, 2)[looked_at]
        writes = model.W_O[layer].flatten(1).any(-1)
        previous.append(tuple((back.mean(0) * writes).tolist()))
        to_copy = (pattern * after_copy[:, None]).sum(-1).transpose(1, 2)[where]
        induction.append(tuple((to_copy.mean(0) * writes).tolist()))
    return HeadRoles(tuple(previous), tuple(induction))

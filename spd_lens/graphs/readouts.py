"""What an attribution graph ends at: numbers that are read off the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.patching.arguments import Metric

# None: the likeliest tokens; token ids; or functions of the logits by name.
ReadoutsGiven: TypeAlias = Sequence[int] | Mapping[str, Metric] | None


@dataclass(frozen=True)
class Readout:
    """A number that is read off the logits `[1 pos d_vocab]`; `number` is a token id, or negative."""

    label: str
    number: int
    weight: float
    probability: float | None
    value: Callable[[Tensor], Tensor]


def chosen_readouts(decomposition: Decomposition, tokens: Tensor, given: ReadoutsGiven, position: int) -> list[Readout]:
    """What `given` says of the prompt `[1 pos]` (see `attribution_graph`).

    Raises ValueError for ids outside the vocabulary, and for functions that return no number or give no gradient.
    """
    if isinstance(given, Mapping):
        if not given:
            raise ValueError("readouts is empty; give at least one {name: function of the logits}")
        return [
            Readout(str(name), -1 - i, 1 / len(given), None, _checked_metric(str(name), metric))
            for i, (name, metric) in enumerate(given.items())
        ]
    with torch.no_grad():
        probabilities = decomposition.host.forward(tokens)[0, position].float().softmax(-1)
    if given is None:
        ordered, ranked = probabilities.sort(descending=True)
        enough = int((ordered.cumsum(0) < 0.95).sum()) + 1
        ids = ranked[: min(10, enough)].tolist()
    else:
        ids = [int(i) for i in given]
        wrong = [i for i in ids if not 0 <= i < len(probabilities)]
        if wrong or not ids or len(set(ids)) != len(ids):
            raise ValueError(
                f"readouts={ids}; expected different token ids in 0..{len(probabilities) - 1}, at least one (or None "
                "for the likeliest, or {name: function of the logits})"
            )
    texts = token_strings(decomposition, torch.tensor(ids))
    return [
        Readout(f"logit of {text!r}", i, float(probabilities[i]), float(probabilities[i]), _centred_logit(i, position))
        for i, text in zip(ids, texts, strict=True)
    ]


def _centred_logit(token: int, position: int) -> Callable[[Tensor], Tensor]:
    # Only differences of logits matter; the mean takes out what all of them share.
    return lambda logits: logits[0, position, token] - logits[0, position].mean()


def _checked_metric(name: str, metric: Metric) -> Callable[[Tensor], Tensor]:
    def value(logits: Tensor) -> Tensor:
        found = metric(logits)
        if not isinstance(found, Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the readout {name!r} returned {shape}; expected one number, as a tensor")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(f"the readout {name!r} gives no gradient (it detaches or rounds); attributions need one")
        return found.reshape(())

    return value


def token_strings(decomposition: Decomposition, ids: Int[Tensor, " pos"]) -> list[str]:
    """Every token as text, or its number where the model has no tokenizer."""
    tokenizer = getattr(decomposition.model, "tokenizer", None)
    return [str(i) if tokenizer is None else str(tokenizer.decode([i])) for i in ids.tolist()]

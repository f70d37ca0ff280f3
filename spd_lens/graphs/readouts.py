"""What an attribution graph ends at: numbers that are read off the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.patching.arguments import Metric
from spd_lens.support.given import given_function, given_list
from spd_lens.tasks.task import encode, spelled

# None: the likeliest tokens; tokens, as ids or as text; or functions of the logits by name.
ReadoutsGiven: TypeAlias = int | str | Sequence[int | str] | Tensor | np.ndarray | Mapping[str, Metric] | None


@dataclass(frozen=True)
class Readout:
    """A number that is read off the logits `[1 pos d_vocab]`; `number` is a token id, or negative.

    `predicts`: the text of the token that it is the logit of, None for a function of the logits.
    """

    label: str
    number: int
    weight: float
    probability: float | None
    value: Callable[[Tensor], Tensor]
    predicts: str | None = None


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
        single = isinstance(given, (int, str))
        items = [given] if single else given_list("readouts", given, "token ids or texts, or {name: function}")
        ids = [_token_id(decomposition, item) for item in items]
        wrong = [i for i in ids if not 0 <= i < len(probabilities)]
        if wrong or not ids or len(set(ids)) != len(ids):
            raise ValueError(
                f"readouts={ids}; expected different token ids in 0..{len(probabilities) - 1}, at least one (or None "
                "for the likeliest, or {name: function of the logits})"
            )
    texts = decomposition.host.token_strings(ids)
    return [
        Readout(
            f"logit of {text!r}", i, float(probabilities[i]), float(probabilities[i]), _centred_logit(i, position), text
        )
        for i, text in zip(ids, texts, strict=True)
    ]


def _token_id(decomposition: Decomposition, given: Any) -> int:
    """The id of a token that is given as an id or as text, written as it follows the prompt (`" whale"`)."""
    given = given.item() if isinstance(given, (Tensor, np.generic)) else given
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        raise TypeError(f"the readout {given!r} is a {type(given).__name__}; expected a token id, or a token as text")
    if isinstance(given, int):
        return given
    tokenizer = decomposition.host.tokenizer()
    if tokenizer is None:
        raise ValueError(f"the readout {given!r} is text, but this model has no tokenizer; give the token's id")
    ids = encode(tokenizer, given)
    if len(ids) != 1:
        raise ValueError(
            f"the readout {given!r} is {len(ids)} tokens for this model, {spelled(tokenizer, ids)}; expected a single "
            "token" + ("" if given[:1] == " " else ", usually with a space before it")
        )
    return ids[0]


def _centred_logit(token: int, position: int) -> Callable[[Tensor], Tensor]:
    # Only differences of logits matter; the mean takes out what all of them share.
    return lambda logits: logits[0, position, token] - logits[0, position].mean()


def _checked_metric(name: str, metric: Metric) -> Callable[[Tensor], Tensor]:
    given_function(f"the readout {name!r}", metric, "of the logits that returns one number")

    def value(logits: Tensor) -> Tensor:
        found = metric(logits)
        if not isinstance(found, Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the readout {name!r} returned {shape}; expected one number, as a tensor")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(f"the readout {name!r} gives no gradient (it detaches or rounds); attributions need one")
        return found.reshape(())

    return value

"""`Cases`: what an audit compares with, and the words it speaks in.

A reason says "compared with such cases, this place pushes the decision so far". The cases are real ones from the data:
for a table past applicants, for a language model other texts of the same length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.core.inputs import as_tensor

# Longer words are no words; nobody reads them, and a page that holds them prints on many sheets.
MAX_WORD = 200


@dataclass(frozen=True)
class Cases:
    """Cases to compare one with.

    - `tokens [n pos]`: their inputs, as long as the audited one.
    - `vocabulary`: what every token means, by its number (a table: `"duration: over 36 months"`).
    - `places`: what every position is called (a table's attributes); None for running text.
    - `outputs`: what the model's outputs are called; None where they are tokens of the vocabulary.
    - `outcomes`: what became of each case, in words, if that is known. `numbers`: how the data call each case.
    - `dictionary`: plain words for reasons, by the text of a token or the name of a place. The more special one, the
      token's, wins.

    Raises ValueError or TypeError where these do not fit together.
    """

    tokens: Int[Tensor, "n pos"]
    vocabulary: Sequence[str]
    places: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    outcomes: Sequence[str] | None = None
    numbers: Sequence[int] | None = None
    dictionary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = as_tensor(self.tokens, "cases.tokens")
        if tokens.ndim != 2 or tokens.is_floating_point() or len(tokens) < 2:
            raise ValueError(f"cases.tokens has shape {tuple(tokens.shape)}; expected integers [n pos], at least two")
        object.__setattr__(self, "tokens", tokens.detach().cpu())
        if self.places is not None and len(self.places) > tokens.shape[1]:
            raise ValueError(
                f"{len(self.places)} places for {tokens.shape[1]} positions; expected at most one for each"
            )
        for name in ("outcomes", "numbers"):
            value = getattr(self, name)
            if value is not None and len(value) != len(tokens):
                raise ValueError(f"{len(value)} {name} for {len(tokens)} cases; expected one for each")
        odd = [] if self.numbers is None else [n for n in self.numbers if not _is_number(n)]
        if odd:
            raise ValueError(
                f"numbers holds {odd[0]!r}; expected whole numbers from 0, by which the data call each case"
            )
        if not isinstance(self.dictionary, Mapping):
            raise TypeError(
                f"dictionary is a {type(self.dictionary).__name__}; expected {{text of a token or place: words}}"
            )
        for key, words in self.dictionary.items():
            if not isinstance(key, str) or not isinstance(words, str):
                raise TypeError(f"dictionary holds {key!r}: {words!r}; expected text for text")
            if not words.strip() or len(words) > MAX_WORD:
                raise ValueError(f"dictionary[{key[:80]!r}] has {len(words)} characters; expected 1 to {MAX_WORD}")

    def token_text(self, token: int) -> str:
        """What a token means."""
        return str(self.vocabulary[token])

    def place(self, position: int) -> str:
        """What a position is called; its number where it has no name."""
        if self.places is not None and position < len(self.places):
            return str(self.places[position])
        return f"position {position}"

    def words(self, position: int, token: int) -> str | None:
        """The dictionary's words for this token at this place; None where it has none."""
        text = self.token_text(token)
        for key in (text, text.strip(), self.place(position)):
            if key in self.dictionary:
                return self.dictionary[key]
        return None

    def coverage(self, tokens: Sequence[int], positions: Sequence[int]) -> float:
        """The share of these positions for which the dictionary has words."""
        found = [self.words(p, tokens[p]) is not None for p in positions]
        return sum(found) / len(found) if found else 0.0

    def digest(self) -> str:
        """SHA-256 of the cases and all words about them."""
        digest = hashlib.sha256(self.tokens.to(torch.int64).contiguous().numpy().tobytes())
        told: list[Any] = [tuple(self.tokens.shape), *(_listed(getattr(self, name)) for name in _TOLD)]
        told.append(sorted(self.dictionary.items()))
        digest.update(repr(told).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def _is_number(value: Any) -> bool:
    number = value.item() if hasattr(value, "item") else value
    return isinstance(number, Integral) and not isinstance(number, bool) and 0 <= int(number) < 1 << 63


_TOLD = ("vocabulary", "places", "outputs", "outcomes", "numbers")


def _listed(value: Sequence[Any] | None) -> list[Any] | None:
    return None if value is None else list(value)

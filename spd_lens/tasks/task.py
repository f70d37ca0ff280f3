"""Pairs of clean and corrupted prompts with their answers, and the metric that tells them apart.

`Task` is plain tensors and knows no tokenizer; `pair_task` makes one from texts and checks what a tokenizer can spoil:
prompts of different lengths, answers of more than one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.support.given import given_list, shown
from spd_lens.support.shown import short_repr


@dataclass(frozen=True)
class Task:
    """Clean and corrupted prompts with their answers.

    - `clean`, `corrupted` `[row pos]`: tokens, row by row of equal meaning but for what decides the answer.
    - `answers`, `wrong` `[row k]`: token ids that are right, and wrong, after the clean prompt, each once; -1 fills
      short rows.
    - `at` `[row]`: the position whose logits predict the answer.
    """

    name: str
    clean: Int[Tensor, "row pos"]
    corrupted: Int[Tensor, "row pos"]
    answers: Int[Tensor, "row _"]
    wrong: Int[Tensor, "row _"]
    at: Int[Tensor, " row"]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        n, shapes = len(self.clean), {k: tuple(v.shape) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.clean.ndim != 2 or self.clean.shape != self.corrupted.shape or n == 0:
            raise ValueError(f"clean and corrupted must both be [row pos], and of one shape; given {shapes}")
        if any(len(ids) != n or ids.ndim != 2 or bool((ids < 0).all(1).any()) for ids in (self.answers, self.wrong)):
            raise ValueError(f"answers and wrong must be [row k] with at least one token in every row; given {shapes}")
        row = row_with_repeats(torch.cat([self.answers, self.wrong], dim=1))
        if row is not None:
            raise ValueError(
                f"row {row} has answers {self.answers[row].tolist()} and wrong ones {self.wrong[row].tolist()}; "
                "expected every token once, as right or as wrong (one that stands twice would count double)"
            )
        if self.at.shape != (n,) or not bool(((self.at >= 0) & (self.at < self.clean.shape[1])).all()):
            raise ValueError(f"at must hold one position in 0..{self.clean.shape[1] - 1} for every row; given {shapes}")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Task:
        """The task of some rows only."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return replace(self, **{k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)})

    def batches(self, size: int) -> Iterator[Task]:
        """The rows in order, `size` at a time; the last part may be smaller."""
        if size < 1:
            raise ValueError(f"size={size}; expected at least 1")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: torch.device | str) -> Task:
        """The task with its tensors on `device`."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def logit_difference(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, " row"]:
        """`logsumexp(logits[answers]) - logsumexp(logits[wrong])` where the answer is predicted: the log odds.

        With one answer and one wrong token this is the plain difference of their logits. In float32 or wider, whatever
        the logits are: half precision would round log odds to an eighth.
        """
        row = self._logits_at(logits)
        return _pooled(row, self.answers).logsumexp(-1) - _pooled(row, self.wrong).logsumexp(-1)

    def correct(self, logits: Float[Tensor, "row pos d_vocab"]) -> Bool[Tensor, " row"]:
        """Whether the best of the answers beats the best of the wrong tokens."""
        row = self._logits_at(logits)
        return _pooled(row, self.answers).amax(-1) > _pooled(row, self.wrong).amax(-1)

    def _logits_at(self, logits: Tensor) -> Tensor:
        if logits.shape[:2] != self.clean.shape:
            raise ValueError(
                f"logits are {tuple(logits.shape)}, but the prompts of {self.name!r} are {tuple(self.clean.shape)}; a "
                "metric belongs to all rows of its task (task[:4] is a task of four)"
            )
        row = logits[torch.arange(len(self), device=logits.device), self.at.to(logits.device)]
        return row.to(torch.promote_types(row.dtype, torch.float32))

    def metric(self, model: Any) -> NormalizedMetric:
        """The logit difference, scaled so that its mean is 1 on the clean and 0 on the corrupted prompts.

        Runs `model` (or a `Decomposition`'s model) on both, hooks that are on it included. Raises ValueError where the
        clean prompts do not give the larger difference: this model does not do the task, and the scale has no meaning.
        """
        model = model.model if isinstance(model, Decomposition) else model
        with torch.no_grad():
            clean = float(self.logit_difference(model(self.clean)).mean())
            corrupted = float(self.logit_difference(model(self.corrupted)).mean())
        if not clean > corrupted:
            raise ValueError(
                f"the mean logit difference on {self.name!r} is {clean:.4g} on clean prompts and {corrupted:.4g} on "
                "corrupted ones: this model does not tell them apart in the right direction, so there is nothing to "
                "normalise by; use task.logit_difference, or another task"
            )
        return NormalizedMetric(self, clean, corrupted)


@dataclass(frozen=True)
class NormalizedMetric:
    """`(logit difference - corrupted) / (clean - corrupted)`; calling it gives the mean over rows, a scalar.

    `metric.per_row` gives one number per row, so that results have standard errors. `clean` and `corrupted` are the
    mean logit differences that it was scaled with: single rows may lie outside [0, 1].
    """

    task: Task
    clean: float
    corrupted: float

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, ""]:
        """Mean over rows: 1 for the clean run, 0 for the corrupted one."""
        return self.per_row(logits).mean()

    def per_row(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, " row"]:
        """One number for every row of the task."""
        return (self.task.logit_difference(logits) - self.corrupted) / (self.clean - self.corrupted)


def row_with_repeats(ids: Int[Tensor, "row _"]) -> int | None:
    """The first row in which a token id stands twice (-1 is none); None if there is no such row."""
    repeats = ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]).sum(2).gt(1).any(1)
    return int(repeats.nonzero()[0]) if bool(repeats.any()) else None


def _pooled(logits: Tensor, ids: Tensor) -> Tensor:
    """The logits of `ids [row k]`, -inf where there is no id."""
    ids = ids.to(logits.device)
    return logits.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)


# -- texts to tokens ---------------------------------------------------------------------------------------------


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` without special tokens."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt or an answer is {shown(text)}; expected a text")
    if not callable(tokenizer):
        raise TypeError(f"the tokenizer is a {type(tokenizer).__name__}; expected a Hugging Face tokenizer")
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def spelled(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every single token."""
    return [tokenizer.decode([token]) for token in ids]


def continuation(tokenizer: Any, prompt: str, answer: str) -> int | None:
    """The one token by which `prompt + answer` is longer than `prompt`, or None."""
    before, after = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    return after[-1] if after[:-1] == before else None


def pair_task(
    tokenizer: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    wrong: Sequence[str | Sequence[str]],
    *,
    prepend_bos: bool = False,
    name: str = "pairs",
) -> Task:
    """A task from texts: `answers[i]` (one text, or several) continue `clean[i]` rightly, `wrong[i]` wrongly.

    Answers are written as they follow the prompt, usually with a leading space: `"The cat sat on the"`, `" mat"`.
    `prepend_bos` as the model was trained (`model.cfg.default_prepend_bos`).

    Raises ValueError, naming the text and its tokens, if prompts differ in length or an answer is not a single token.

    >>> from spd_lens.models import load_tiny_lm_tokenizer
    >>> tokenizer = load_tiny_lm_tokenizer()
    >>> task = pair_task(tokenizer, ["The ship"], ["The ships"], [[" is", " was"]], [[" are", " were"]])
    >>> [tokenizer.decode([i]) for i in task.answers[0]]
    [' is', ' was']
    """
    for what, texts in (("clean", clean), ("corrupted", corrupted), ("answers", answers), ("wrong", wrong)):
        given_list(what, texts, "texts, one for every prompt")
    if not len(clean) == len(corrupted) == len(answers) == len(wrong) or not clean:
        raise ValueError(
            f"given {len(clean)} clean and {len(corrupted)} corrupted prompts, {len(answers)} answers and {len(wrong)} "
            "wrong ones; expected equally many of each, and at least one"
        )
    lead = []
    if prepend_bos:
        if tokenizer.bos_token_id is None:
            raise ValueError("prepend_bos=True, but this tokenizer has no BOS token")
        lead = [tokenizer.bos_token_id]
    rows = [[lead + encode(tokenizer, text) for text in texts] for texts in (clean, corrupted)]
    length = len(rows[0][0])
    for texts, encoded in zip((clean, corrupted), rows, strict=True):
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) != length:
                raise ValueError(
                    f"all prompts need the same number of tokens: {clean[0]!r} has {length}, {text!r} has {len(ids)}: "
                    f"{spelled(tokenizer, ids)}; choose other words"
                )
    ids = [
        _padded([_answer_ids(tokenizer, prompt, given) for prompt, given in zip(clean, side, strict=True)])
        for side in (answers, wrong)
    ]
    at = torch.full((len(clean),), length - 1)
    return Task(name, torch.tensor(rows[0]), torch.tensor(rows[1]), ids[0], ids[1], at)


def _answer_ids(tokenizer: Any, prompt: str, given: str | Sequence[str]) -> list[int]:
    found = []
    for answer in [given] if isinstance(given, str) else given:
        token = continuation(tokenizer, prompt, answer)
        if token is None:
            pieces = spelled(tokenizer, encode(tokenizer, answer))
            raise ValueError(
                f"the answer {answer!r} is not a single token after {prompt!r} (this tokenizer writes it {pieces}); "
                "choose another word" + ("" if answer[:1] == " " else ", or begin it with a space")
            )
        found.append(token)
    return found


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row _"]:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def usable_words(tokenizer: Any, what: str, own: Sequence[str] | None, words: Sequence[str], needed: int) -> list[str]:
    """The words that are single tokens after a space: all of the user's own, or those of the library's list."""
    words = words if own is None else given_list(what, own, "words, such as ['one', 'two']")
    good = [word for word in dict.fromkeys(words) if continuation(tokenizer, "the", f" {word}") is not None]
    bad = [word for word in words if word not in good]
    if own is not None and bad:
        pieces = spelled(tokenizer, encode(tokenizer, f" {bad[0]}"))
        raise ValueError(
            f"{what}: {bad[0]!r} is not a single token for this tokenizer but {pieces}; choose another word"
        )
    if len(good) < needed:
        origin = "you gave" if own is not None else "of the library's own that are single tokens for this tokenizer"
        raise ValueError(
            f"{what}: {len(good)} {origin} ({good[:5]}), and the task needs {needed}; give {what}=[...] that are "
            "single tokens"
        )
    return good

"""A habit: what an edit is to change, as the probability of some tokens after some prompts, and as counted generations.

Everything is measured by a function `tokens -> logits`, so that hooked, baked and other models are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_tokens
from spd_lens.objective.divergences import divergence_per_position, log_probs
from spd_lens.support.given import given_function, given_instance, given_seed, given_whole, given_wholes, shown
from spd_lens.support.shown import short_repr
from spd_lens.tasks.task import Task, row_with_repeats

# Tokens [row pos] -> logits [row pos d_vocab].
Forward: TypeAlias = Callable[[Tensor], Tensor]
# How many positions after a prompt count as near (C5).
NEAR = 5


@dataclass(frozen=True, eq=False)
class Habit:
    """Tokens that a model gives after some prompts.

    - `prompts` `[row pos]`, all of one length: the answer is predicted at the last position.
    - `answers` `[row k]`: the token ids that are the habit; -1 fills short rows.
    - `continuations` `[row n]`: what follows in the text, the answer first; used only for what an edit costs nearby.
      None: nothing is known of that.
    """

    name: str
    prompts: Int[Tensor, "row pos"]
    answers: Int[Tensor, "row _k"]
    continuations: Int[Tensor, "row _n"] | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for field in ("prompts", "answers", "continuations"):
            value = getattr(self, field)
            if value is None and field == "continuations":
                continue
            if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
                raise TypeError(
                    f"the {field} of {self.name!r} are {shown(value)}; expected token ids, an integer tensor"
                )
        n = len(self.prompts) if self.prompts.ndim else 0
        if self.prompts.ndim != 2 or self.prompts.numel() == 0:
            raise ValueError(
                f"the prompts of {self.name!r} are {tuple(self.prompts.shape)}; expected [row pos], not empty"
            )
        if self.answers.ndim != 2 or len(self.answers) != n or bool((self.answers < 0).all(1).any()):
            raise ValueError(
                f"the answers of {self.name!r} are {tuple(self.answers.shape)} for {n} prompts; expected [row k] with "
                "at least one token id in every row"
            )
        if bool((self.answers < -1).any()):
            raise ValueError(
                f"an answer of {self.name!r} is {int(self.answers.min())}; expected token ids, and -1 where a row has "
                "fewer answers than others"
            )
        if (row := row_with_repeats(self.answers)) is not None:
            raise ValueError(
                f"row {row} of {self.name!r} has the answers {self.answers[row].tolist()}; expected every token once "
                "(one that stands twice would count double)"
            )
        if self.continuations is not None and (self.continuations.ndim != 2 or len(self.continuations) != n):
            raise ValueError(
                f"the continuations of {self.name!r} are {tuple(self.continuations.shape)} for {n} prompts; expected "
                "[row n], a row for each prompt"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Habit:
        """The habit on some rows only."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        if isinstance(index, Tensor) and index.numel() == 0:
            index = index.long()
        if isinstance(index, Tensor) and index.is_floating_point():
            raise TypeError(f"rows {shown(rows)} of {self.name!r}; expected whole numbers, a slice, or a boolean mask")
        numbers = index if isinstance(index, Tensor) and index.dtype != torch.bool else torch.zeros(0)
        if bool(((numbers >= len(self)) | (numbers < -len(self))).any()):
            raise ValueError(f"rows {shown(rows)} of {self.name!r}; expected some of 0..{len(self) - 1}")
        return replace(self, **{k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str) -> Habit:
        """The habit with its tensors on `device`."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    @property
    def tokens(self) -> Int[Tensor, "row _pos"]:
        """Prompts and what follows them."""
        return self.prompts if self.continuations is None else torch.cat([self.prompts, self.continuations], 1)

    @staticmethod
    def in_text(
        name: str,
        rows: Int[Tensor, "row pos"],
        answers: Sequence[int],
        *,
        context: int = 32,
        first: int | None = None,
        most: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Habit:
        """The places of a text where one of `answers` comes next, each with the `context` tokens before it.

        `rows [row pos]` is the text; `first` is put before every prompt (BOS). In random order, at most `most` of them.
        Raises ValueError if there are none.
        """
        wanted = torch.tensor(sorted(set(given_wholes("answers", answers, least=0, of="token ids"))), dtype=torch.long)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.is_floating_point():
            raise TypeError(f"rows={shown(rows)}; expected token ids, an integer tensor [row pos]")
        context = given_whole("context", context, least=1)
        if most is not None:
            given_whole("most", most, least=1, or_none=True)
        if first is not None:
            given_whole("first", first, least=0, of=", a token id", or_none=True)
        if generator is not None:
            given_instance("generator", generator, torch.Generator, "torch.Generator()")
        where = torch.isin(rows.cpu(), wanted)
        where[:, :context] = False
        where[:, rows.shape[1] - NEAR :] = False
        found = where.nonzero()
        if not len(found):
            raise ValueError(
                f"no row of the text has one of the tokens {wanted.tolist()} with {context} tokens before it and "
                f"{NEAR} behind it; give other answers, a shorter context or more text"
            )
        order = torch.randperm(len(found), generator=generator or torch.Generator().manual_seed(0))
        found = found[order[:most]]
        text = rows.cpu()
        windows = torch.stack([text[r, p - context : p + 1 + NEAR] for r, p in found.tolist()])
        prompts = windows[:, :context]
        if first is not None:
            prompts = torch.cat([torch.full((len(prompts), 1), first), prompts], 1)
        return Habit(name, prompts, wanted.repeat(len(prompts), 1), windows[:, context:]).to(rows.device)

    @staticmethod
    def of_task(task: Task) -> Habit:
        """The answers of a task after its clean prompts. Raises ValueError if they are not asked for at the end."""
        if not bool((task.at == task.clean.shape[1] - 1).all()):
            raise ValueError(f"the task {task.name!r} asks before the end of its prompts; a habit is at their end")
        return Habit(task.name, task.clean, task.answers)

    # -- what a model does -------------------------------------------------------------------------------------

    def log_probability(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, " row"]:
        """`log sum over answers of p(answer)` where each answer is predicted; with gradients."""
        log_p = log_probs(logits[:, self.prompts.shape[1] - 1])
        ids = self.answers.to(logits.device)
        return log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf).logsumexp(-1)

    def log_odds(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, " row"]:
        """`log p(answers) / (1 - p(answers))`; unlike `log p` it still moves where the model is sure."""
        last = logits[:, self.prompts.shape[1] - 1].float()
        ids = self.answers.to(logits.device)
        # A column more takes the -1 that fills short rows.
        own = torch.zeros(*last.shape[:-1], last.shape[-1] + 1, dtype=torch.bool, device=last.device)
        own = own.scatter(-1, ids % own.shape[-1], True)[..., :-1]
        return last.masked_fill(~own, -torch.inf).logsumexp(-1) - last.masked_fill(own, -torch.inf).logsumexp(-1)

    def probability(self, forward: Forward) -> Float[Tensor, " row"]:
        """The probability of the answers, prompt by prompt."""
        with torch.no_grad():
            return self.log_probability(forward(self.prompts)).exp()

    def is_answer(self, generated: Int[Tensor, "row n"]) -> Bool[Tensor, "row n"]:
        """Which generated tokens are the habit."""
        return (generated.unsqueeze(-1) == self.answers.to(generated.device).unsqueeze(1)).any(-1)


@torch.no_grad()
def generate(forward: Forward, prompts: Int[Tensor, "row pos"], n: int, *, seed: int = 0) -> Int[Tensor, "row _n"]:
    """`n` sampled tokens after each prompt, at temperature 1; equal models give equal texts for one seed.

    Every token takes a whole pass, without a key-value cache, so that conditional edits can look at all positions.
    """
    given_function("forward", forward, "forward(tokens [row pos]) -> logits")
    n, seed = given_whole("n", n, least=0), given_seed(seed)
    if not isinstance(prompts, Tensor) or prompts.ndim != 2:
        raise ValueError(f"prompts={shown(prompts)}; expected token ids [row pos]")
    tokens, generator = prompts, torch.Generator().manual_seed(seed)
    for _ in range(n):
        p = forward(tokens)[:, -1].float().softmax(-1).cpu().double()
        # By the inverse of the cumulative distribution: a small change of the model changes few tokens.
        draws = torch.rand(len(p), 1, generator=generator, dtype=torch.float64)
        chosen = (p.cumsum(-1) < draws * p.sum(-1, keepdim=True)).sum(-1).clamp_max(p.shape[-1] - 1)
        tokens = torch.cat([tokens, chosen[:, None].to(tokens)], 1)
    return tokens[:, prompts.shape[1] :]


@torch.no_grad()
def kl_from(
    clean: Float[Tensor, "row pos d_vocab"], edited: Float[Tensor, "row pos d_vocab"]
) -> Float[Tensor, "row pos"]:
    """`KL(clean || edited)` at every position, in nats."""
    return divergence_per_position(clean, edited)


def checked_habit(habit: Any, caller: str, decomposition: Decomposition | None = None) -> Habit:
    """`habit`, a `Habit`, or a `Task` as one, on the decomposition's device; TypeError for anything else.

    Raises ValueError for tokens that the decomposition's model does not have.
    """
    if isinstance(habit, Task):
        habit = Habit.of_task(habit)
    if not isinstance(habit, Habit):
        raise TypeError(f"{caller} was given a {type(habit).__name__}; expected a Habit, or a Task (spd_lens.tasks)")
    if decomposition is None:
        return habit
    checked_tokens(habit.tokens, decomposition.host, name=f"the prompts of {habit.name!r}")
    most, size = int(habit.answers.max()), decomposition.host.vocabulary_size()
    if size is not None and most >= size:
        raise ValueError(f"an answer of {habit.name!r} is token {most}; expected ids in 0..{size - 1}")
    return habit.to(decomposition.device)


def check_other_text(habit: Habit, tokens: Int[Tensor, "row pos"], name: str) -> None:
    """Raise ValueError if half of the rows are the habit's own prompts: what it costs there is its effect."""
    own = {tuple(row) for text in (habit.prompts, habit.tokens) for row in text.tolist()}
    same = sum(tuple(row) in own for row in tokens.tolist())
    if 2 * same >= len(tokens):
        raise ValueError(
            f"{same} of the {len(tokens)} rows of {name} are prompts of {habit.name!r}; expected other text, which is "
            "to stay as it is"
        )

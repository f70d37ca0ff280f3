"""`evaluate`: how good a decomposition is, on the things that count at once (E1, E2, E5, E8 to E10).

Faithfulness per site; reconstruction (KL, cross-entropy, changed top tokens) in six mask regimes; minimality (L0 at
several thresholds); the worst case, a fresh adversary whose budget and span stand beside its number; and the deletion
test. Masks set to the importance itself, or rounded, are for monitoring only: that they work does not make the active
subcomponents a circuit (E3).

Cost: one clean pass and the gates per batch, 6 masked passes, 3 for the deletion test, and for the adversary
`starts * max(adversary_steps)` forward and backward passes. `quick=True` leaves the last two out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.data.batch_hashes import check_same_batches
from spd_lens.data.batches import Batch
from spd_lens.data.processes import Processes, join_processes
from spd_lens.data.streams import first_batches
from spd_lens.evaluation.attack import LADDER, Attack
from spd_lens.evaluation.evaluation_run import EvaluationRun
from spd_lens.evaluation.report import EvaluationReport
from spd_lens.objective.divergences import Divergence
from spd_lens.support.given import given_flag, given_list, given_seed, given_whole, shown

QUICK_BATCHES = 2


def evaluate(
    decomposition: Decomposition,
    batches: Any,
    *,
    max_batches: int | None = 8,
    adversary_steps: Sequence[int] = (20,),
    adversary_step_size: float = 0.1,
    starts: int = 2,
    span: int | None = None,
    deletion: bool = True,
    deletion_sample: Iterable[Any] | None = None,
    token_counts: Any = None,
    kind: Divergence = "kl",
    quick: bool = False,
    seed: int = 0,
    together: bool = False,
) -> EvaluationReport:
    """Measure a decomposition on the first `max_batches` of `batches` (None: all), which are what `train` accepts.

    - `adversary_steps`: budgets of the adversary, read off one climb of the longest; `()` leaves it out, `LADDER` is
      20, 40, 80, 160. `starts`: independent climbs, of which the worst counts.
    - `span`: how many rows share one adversarial source; None: all rows evaluated, which is the number to compare. A
      source for fewer rows does more damage.
    - `deletion`: whether to run the deletion test. `deletion_sample`: batches, all of them, in which a need also
      spares a subcomponent; the larger this sample, the more the test says.
    - `token_counts`: how often each token occurs, for the cross-entropy of frequencies alone. None: counted in the
      evaluated tokens themselves (with one more count spread over the vocabulary), which flatters the frequencies.
    - `quick`: at most two batches, no adversary, no deletion test: seconds, for a look during training.
    - `together`: the processes of a launcher (`torchrun`), all of which have to call this, share out the rows of every
      batch. The report is the same in all of them, and that of one process to the rounding of sums (of which signs,
      and so the adversary's way, may depend). With `span` the adversary is computed whole in every process.

    Positions outside a batch's `position_mask` count nowhere (M5). The model's training mode and gradient mode are set
    as evaluation needs them, and put back. Raises ValueError if there is no batch or no position that counts.
    """
    checked_decomposition(decomposition, "evaluate")
    steps = given_list("adversary_steps", adversary_steps, f"numbers of steps, such as {LADDER} (() for no adversary)")
    attack = Attack(tuple(steps), adversary_step_size, starts, span)
    quick, deletion, seed = given_flag("quick", quick), given_flag("deletion", deletion), given_seed(seed)
    token_counts = None if token_counts is None else _checked_counts(token_counts)
    if quick:
        most = QUICK_BATCHES if max_batches is None else given_whole("max_batches", max_batches, least=1)
        attack, deletion, max_batches = Attack(()), False, min(most, QUICK_BATCHES)
    processes = join_processes(decomposition.device) if given_flag("together", together) else Processes()
    with torch.inference_mode(False), torch.no_grad(), _in_eval_mode(decomposition):
        chosen = list(first_batches(batches, decomposition, max_batches, purpose="evaluate on"))
        check_same_batches(chosen, processes)
        sample: Iterable[Batch] = ()
        if deletion_sample is not None and deletion:
            sample = first_batches(deletion_sample, decomposition, None, purpose="look for needs in")
        return EvaluationRun(decomposition, chosen, kind, attack, seed, processes).run(deletion, sample, token_counts)


def _checked_counts(token_counts: Any) -> Tensor:
    """Counts of tokens, as any numbers; how many there have to be is known once something has been run."""
    try:
        counts = torch.as_tensor(token_counts)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"token_counts={shown(token_counts)}; expected one count per token, [d_vocab]") from None
    if counts.is_complex() or not bool((counts >= 0).all()) or not bool(counts.isfinite().all()) or not counts.any():
        raise ValueError("token_counts holds negative or not finite numbers, or zeros alone; expected counts of tokens")
    return counts


@contextmanager
def _in_eval_mode(decomposition: Decomposition) -> Iterator[None]:
    """Dropout would make the target another one in every pass."""
    training = [module for module in decomposition.model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True

"""Tasks: pairs of clean and corrupted prompts that differ in the answer, and the metric that tells them apart."""

from spd_lens.tasks.generated import (
    agreement_task,
    docstring_task,
    greater_than_task,
    indirect_object_task,
    induction_task,
)
from spd_lens.tasks.task import NormalizedMetric, Task, pair_task
from spd_lens.tasks.words import NOUNS

__all__ = [
    "NOUNS",
    "NormalizedMetric",
    "Task",
    "agreement_task",
    "docstring_task",
    "greater_than_task",
    "indirect_object_task",
    "induction_task",
    "pair_task",
]

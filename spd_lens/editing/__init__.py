"""Change a model through its subcomponents: try an edit as hooks, measure it, and bake it into a plain model.

`edit` says what changes, `find` what to change, `report` what that does, `Edit.bake` makes the plain model."""

from spd_lens.editing.baking import outputs_of
from spd_lens.editing.change import Above, Change, Rewrite
from spd_lens.editing.edits import Edit, edit
from spd_lens.editing.finding import find
from spd_lens.editing.findings import Findings, MeasuredUnit
from spd_lens.editing.habit import Forward, Habit, generate, kl_from
from spd_lens.editing.keeping import load_edit, save_baked, save_edit
from spd_lens.editing.relearning_steps import Relearning, relearning
from spd_lens.editing.reporting import EditEffect, EditReport, measure, random_edits, report

__all__ = [
    "Above",
    "Change",
    "Edit",
    "EditEffect",
    "EditReport",
    "Findings",
    "Forward",
    "Habit",
    "MeasuredUnit",
    "Relearning",
    "Rewrite",
    "edit",
    "find",
    "generate",
    "kl_from",
    "load_edit",
    "measure",
    "outputs_of",
    "random_edits",
    "relearning",
    "report",
    "save_baked",
    "save_edit",
]

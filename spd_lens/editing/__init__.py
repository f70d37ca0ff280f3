"""Change a model through its subcomponents: try an edit as hooks, measure it, and bake it into a plain model.

`edit` says what changes, `find` what to change, `report` what that does, `Edit.bake` makes the plain model."""

from spd_lens.editing.change import Above, Change, Rewrite
from spd_lens.editing.edits import Edit, edit
from spd_lens.editing.keeping import load_edit, save_baked, save_edit

__all__ = ["Above", "Change", "Edit", "Rewrite", "edit", "load_edit", "save_baked", "save_edit"]

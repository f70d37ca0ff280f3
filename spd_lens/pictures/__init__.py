"""Pictures of importances and effects, for notebooks and as self-contained pages."""

from spd_lens.pictures.attention import qk_figure
from spd_lens.pictures.effects import effects_heatmap
from spd_lens.pictures.importance import importance_figure, importance_page, save_importance, strongest

__all__ = [
    "effects_heatmap",
    "importance_figure",
    "importance_page",
    "qk_figure",
    "save_importance",
    "strongest",
]

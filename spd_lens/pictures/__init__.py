"""Pictures of importances, effects and texts, for notebooks and as self-contained pages."""

from spd_lens.pictures.effects import effects_heatmap
from spd_lens.pictures.importance import importance_figure, importance_page, save_importance, strongest
from spd_lens.pictures.tokens import HtmlText, token_strips

__all__ = [
    "HtmlText",
    "effects_heatmap",
    "importance_figure",
    "importance_page",
    "save_importance",
    "strongest",
    "token_strips",
]

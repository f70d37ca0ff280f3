"""Group subcomponents into components: by description length or Leiden, from firing or from what ablation moves."""

from spd_lens.components.bits import description_length, merge_change
from spd_lens.components.causal import coeffects, top_log_probabilities
from spd_lens.components.communities import Communities, leiden
from spd_lens.components.components import ComponentFigures, Components
from spd_lens.components.ensembles import Ensemble, adjusted_rand, ensemble
from spd_lens.components.merging import Merging, Pairs, merge_subcomponents

__all__ = [
    "Communities",
    "ComponentFigures",
    "Components",
    "Ensemble",
    "Merging",
    "Pairs",
    "adjusted_rand",
    "coeffects",
    "description_length",
    "ensemble",
    "leiden",
    "merge_change",
    "merge_subcomponents",
    "top_log_probabilities",
]

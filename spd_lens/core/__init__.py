"""Subcomponents, gates, masks, and the swap that puts them into a model.

Call `decompose` or `decompose_layer` and use the `Decomposition` they return; `Unit` names subcomponents; the rest are
the pure functions that it is made of."""

from spd_lens.core.card import model_card
from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.decomposing import decompose, decompose_layer
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.draws import RowsGenerator, integers, uniform
from spd_lens.core.factored_weight import FactoredWeight
from spd_lens.core.fingerprint import subcomponent_hashes, target_fingerprint
from spd_lens.core.gate_sets import GateOfAll, Gates, GatesBySite
from spd_lens.core.gates import (
    DEFAULT_WIDTH,
    MAX_OFFSET,
    AttentionGate,
    Gate,
    GateKind,
    GlobalGate,
    ScalarGate,
    SharedGate,
    VectorGate,
    make_gate,
    matmul_or_lookup,
)
from spd_lens.core.inputs import as_mask, as_tensor, checked_decomposition, checked_tokens
from spd_lens.core.masks import MaskKind, SiteMask, mask_from_source, sample_masks
from spd_lens.core.passes import BlockStarts, CleanPass, given_masks, record_inputs
from spd_lens.core.points import ReadPoint
from spd_lens.core.routing import Routing, route, sample_routing
from spd_lens.core.saving import CONFIG, TENSORS
from spd_lens.core.settings import GateMaker, InitMaker, Settings
from spd_lens.core.squashings import importance_of, lower_squash, upper_squash
from spd_lens.core.subcomponents import InitKind, Subcomponents, relative_faithfulness
from spd_lens.core.summary import SiteSummary, Summary
from spd_lens.core.units import ALIVE_ABOVE, DELTA, WHOLE, Ids, Unit, unit_hooks, units_of

__all__ = [
    "ALIVE_ABOVE",
    "CONFIG",
    "DEFAULT_WIDTH",
    "DELTA",
    "MAX_OFFSET",
    "TENSORS",
    "WHOLE",
    "AttentionGate",
    "BlockStarts",
    "CleanPass",
    "DecomposedWeight",
    "Decomposition",
    "FactoredWeight",
    "Gate",
    "GateKind",
    "GateMaker",
    "GateOfAll",
    "Gates",
    "GatesBySite",
    "GlobalGate",
    "Ids",
    "InitKind",
    "InitMaker",
    "MaskKind",
    "ReadPoint",
    "Routing",
    "RowsGenerator",
    "ScalarGate",
    "Settings",
    "SharedGate",
    "SiteMask",
    "SiteSummary",
    "Subcomponents",
    "Summary",
    "Unit",
    "VectorGate",
    "as_mask",
    "as_tensor",
    "checked_decomposition",
    "checked_tokens",
    "decompose",
    "decompose_layer",
    "given_masks",
    "importance_of",
    "integers",
    "lower_squash",
    "make_gate",
    "mask_from_source",
    "matmul_or_lookup",
    "model_card",
    "record_inputs",
    "relative_faithfulness",
    "route",
    "sample_masks",
    "sample_routing",
    "subcomponent_hashes",
    "target_fingerprint",
    "uniform",
    "unit_hooks",
    "units_of",
    "upper_squash",
]

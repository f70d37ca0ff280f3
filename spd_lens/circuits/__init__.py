"""Find the subcomponents that one behaviour needs, and check them against an adversary."""

from spd_lens.circuits.check import BUDGETS, CircuitReport, check_circuit
from spd_lens.circuits.circuit import Circuit, circuit_of
from spd_lens.circuits.config import CircuitConfig
from spd_lens.circuits.curves import (
    FaithfulnessCurve,
    UnitComparison,
    compare_units,
    faithfulness_curve,
    faithfulness_of_first,
    ranked,
    smallest_size,
)
from spd_lens.circuits.live_units import HeadAndMLPUnits, SubcomponentUnits, Units
from spd_lens.circuits.search import find_circuit

__all__ = [
    "BUDGETS",
    "Circuit",
    "CircuitConfig",
    "CircuitReport",
    "FaithfulnessCurve",
    "HeadAndMLPUnits",
    "SubcomponentUnits",
    "UnitComparison",
    "Units",
    "check_circuit",
    "circuit_of",
    "compare_units",
    "faithfulness_curve",
    "faithfulness_of_first",
    "find_circuit",
    "ranked",
    "smallest_size",
]

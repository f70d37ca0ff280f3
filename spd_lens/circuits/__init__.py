"""Find the subcomponents that one behaviour needs, and check them against an adversary."""

from spd_lens.circuits.check import BUDGETS, check_circuit
from spd_lens.circuits.circuit import Circuit, circuit_of
from spd_lens.circuits.circuit_report import CircuitReport
from spd_lens.circuits.config import CircuitConfig
from spd_lens.circuits.curves import (
    FaithfulnessCurve,
    faithfulness_curve,
    faithfulness_of_first,
    ranked,
    smallest_size,
)
from spd_lens.circuits.neuron_parts import HeadAndNeuronParts
from spd_lens.circuits.part_comparison import PartComparison, compare_parts
from spd_lens.circuits.parts import HeadAndMLPParts, Parts, SubcomponentParts
from spd_lens.circuits.search import find_circuit

__all__ = [
    "BUDGETS",
    "Circuit",
    "CircuitConfig",
    "CircuitReport",
    "FaithfulnessCurve",
    "HeadAndMLPParts",
    "HeadAndNeuronParts",
    "PartComparison",
    "Parts",
    "SubcomponentParts",
    "check_circuit",
    "circuit_of",
    "compare_parts",
    "faithfulness_curve",
    "faithfulness_of_first",
    "find_circuit",
    "ranked",
    "smallest_size",
]

"""Smaller models of a domain: keep the subcomponents that its text needs, write smaller matrices, run without us.

`specialise` makes one, `Specialist` says what it keeps, costs and has lost, `Specialist.save` writes it."""

from spd_lens.specialists.allocation import effect_allocation, uniform_allocation
from spd_lens.specialists.candidate import SHARES, Candidate, Write, candidates, refitted
from spd_lens.specialists.costs import Costs, costs_of, mean_loss
from spd_lens.specialists.directions import Directions, ordered
from spd_lens.specialists.distilling import distil
from spd_lens.specialists.domain import Domain, domain_of
from spd_lens.specialists.matrices import SmallMatrix
from spd_lens.specialists.plain_transformer import PlainTransformer
from spd_lens.specialists.specialising import (
    MEASURED_ON,
    best_model,
    checked_plain,
    matrix_budget,
    specialise,
    whole_matrices,
)
from spd_lens.specialists.specialist import Specialist
from spd_lens.specialists.whitening import whitened_factors
from spd_lens.specialists.writing import plain_copy

__all__ = [
    "MEASURED_ON",
    "SHARES",
    "Candidate",
    "Costs",
    "Directions",
    "Domain",
    "PlainTransformer",
    "SmallMatrix",
    "Specialist",
    "Write",
    "best_model",
    "candidates",
    "checked_plain",
    "costs_of",
    "distil",
    "domain_of",
    "effect_allocation",
    "matrix_budget",
    "mean_loss",
    "ordered",
    "plain_copy",
    "refitted",
    "specialise",
    "uniform_allocation",
    "whitened_factors",
    "whole_matrices",
]

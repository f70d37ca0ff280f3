"""Kinds of parts compared at equal faithfulness: how many subcomponents a behaviour needs, and how many heads and MLPs.

Cost: a faithfulness curve for every kind, and a pass for every step of the bisection to the wanted level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_lens.circuits.curves import FaithfulnessCurve, between, faithfulness_curve
from spd_lens.circuits.parts import HeadAndMLPParts, Outside, Parts, SubcomponentParts
from spd_lens.core.decomposition import Decomposition
from spd_lens.support.given import given_number, shown
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table
from spd_lens.tasks.task import Task


@dataclass(frozen=True, repr=False)
class PartComparison:
    """Two (or more) kinds of parts on the same task at the same level of faithfulness. `str(...)` is one table.

    By name: the `curves`, and where each first reaches `level`: `sizes`, `parameters`, the measured `faithfulness`,
    and the `labels` of the parts there, most important first. None where no measured size reaches the level.
    """

    level: float
    curves: Mapping[str, FaithfulnessCurve]
    sizes: Mapping[str, int | None]
    parameters: Mapping[str, int | None]
    faithfulness: Mapping[str, float | None]
    labels: Mapping[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "level": self.level,
            "parts": {
                name: {
                    "parts": self.sizes[name],
                    "of": curve.n_parts,
                    "parameters": self.parameters[name],
                    "of_parameters": curve.parameters[-1],
                    "faithfulness": self.faithfulness[name],
                    "cpr": curve.cpr,
                    "cmd": curve.cmd,
                }
                for name, curve in self.curves.items()
            },
        }

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
        """Header, rows and notes, one for every kind of parts."""
        rows: list[tuple[str, ...]] = []
        for name, curve in self.curves.items():
            size, parameters, reached = self.sizes[name], self.parameters[name], self.faithfulness[name]
            if size is None or parameters is None or reached is None:
                row = (f"not by {curve.n_parts:,}", "-", f"{max(curve.faithfulness):.3f}")
            else:
                row = (f"{size:,} of {curve.n_parts:,}", f"{parameters:,}", f"{reached:.3f}")
            rows.append((name, *row, f"{curve.cpr:.3f}", f"{curve.cmd:.3f}"))
        header = ("parts", f"to reach {self.level:g}", "parameters", "faithfulness", "CPR", "CMD")
        return header, rows, [f"{name}: {curve.what}" for name, curve in self.curves.items()]

    def __str__(self) -> str:
        header, rows, notes = self._table()
        return "\n".join([format_table(header, rows), *notes])

    def __repr__(self) -> str:
        found = ", ".join(f"{name}: {size if size is not None else 'not reached'}" for name, size in self.sizes.items())
        return f"PartComparison(parts to reach {self.level:g}: {found})"

    def _repr_html_(self) -> str:
        header, rows, notes = self._table()
        return table_html(f"parts to reach {self.level:g}", header, rows, notes)


@torch.inference_mode(False)
def compare_parts(
    decomposition: Decomposition,
    task: Task,
    *,
    level: float = 0.9,
    outside: Outside = "corrupted",
    scores: Mapping[str, Tensor | Mapping[str, float]] | None = None,
) -> PartComparison:
    """The same task's circuit over subcomponents, and over heads and MLPs, each grown until it reaches `level`.

    Both cover the same part of the model (heads and MLPs with decomposed matrices), are ranked by attribution patching
    and measured under the same ablation, `outside`. Subcomponents come twice: with the deltas as parts, and with all
    deltas left out (then `None` stands where the level cannot be reached). `scores` adds rankings of the subcomponents
    alone by other scores, by name: `{"importance": {"blocks.0.mlp.W_in[3]": 0.9, ...}}`.
    A subcomponent has `d_in + d_out` parameters, a delta and a matrix `d_in * d_out`.

    Raises ValueError where the model does not do the task, or whole heads and MLPs cannot reach the level.
    """
    level = given_number("level", level, above=0, most=1)
    if scores is not None and not isinstance(scores, Mapping):
        raise TypeError(f"scores={shown(scores)}; expected {{name: scores of the subcomponents}}")
    alone = SubcomponentParts(decomposition, task, outside=outside, deltas=False)
    kinds: dict[str, tuple[Parts, Any]] = {
        "heads and MLPs": (HeadAndMLPParts(decomposition, task, outside=outside), None),
        "subcomponents": (alone, None),
        "subcomponents and deltas": (SubcomponentParts(decomposition, task, outside=outside), None),
    }
    kinds |= {f"subcomponents by {name}": (alone, given) for name, given in (scores or {}).items()}
    curves, sizes, parameters, faithfulness, labels = {}, {}, {}, {}, {}
    for name, (parts, given) in kinds.items():
        curve = faithfulness_curve(parts, given)
        curves[name] = curve
        found = _size_on(curve, parts, level)
        if found is None:
            if parts is not alone:
                raise ValueError(
                    f"no size of {name} reaches faithfulness {level}: the most is {max(curve.faithfulness):.4g}"
                )
            sizes[name] = parameters[name] = faithfulness[name] = None
            labels[name] = ()
            continue
        size, faithfulness[name] = found
        first = curve.ranking[:size]
        sizes[name], parameters[name] = size, sum(parts.parameters[i] for i in first)
        labels[name] = tuple(parts.labels[i] for i in first)
    return PartComparison(level, curves, sizes, parameters, faithfulness, labels)


def _size_on(curve: FaithfulnessCurve, parts: Parts, level: float) -> tuple[int, float] | None:
    """The size between the smallest measured one that reaches the level and the one before it; None if none does."""
    measured = list(zip(curve.sizes, curve.faithfulness, strict=True))
    first = next((i for i, (_, value) in enumerate(measured) if value >= level), None)
    if first is None:
        return None
    low = measured[first - 1][0] if first else measured[first][0]
    return between(parts, curve.ranking, level, low, *measured[first])

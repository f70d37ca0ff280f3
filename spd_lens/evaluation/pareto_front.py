"""One picture of many runs: how little is on, against how much that costs (E4).

A single decomposition is a point; the sweep over the minimality coefficient is the result. Beside it stand baselines
that a sceptic asks for, such as singular vectors or random subcomponents with trained gates: their reports are passed
with a name of their own. Lower and further left is better.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lens.evaluation.report import EvaluationReport
from spd_lens.support.files import given_path, write_figure
from spd_lens.support.given import given_list
from spd_lens.support.tables import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#3a7d44", "#7d5ba6", "#5c6b73")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class ParetoPoint:
    """One run: its L0, KL (or MSE) under random and adversarial masks and with everything off, and the rise in
    cross-entropy under random masks. None: not measured."""

    label: str
    l0: float
    c_total: int
    stochastic: float
    all_off: float
    adversarial: float | None
    adversary_steps: int | None
    extra_ce: float | None
    holds: bool | None


@dataclass(frozen=True)
class Pareto:
    """Points by the name of their method. `figure()` is a Matplotlib figure, `plotly()` an interactive one; in a
    notebook the object shows itself."""

    points: dict[str, tuple[ParetoPoint, ...]]
    kind: str

    def figure(self) -> Figure:
        """Panels side by side: random masks, the adversary, cross-entropy; L0 across, all with the same axis."""
        from matplotlib.figure import Figure

        panels = self._panels()
        figure = Figure(figsize=(4.6 * len(panels) + 0.4, 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
        for axis, (title, y_label, value_of) in zip(axes, panels, strict=True):
            self._draw(axis, value_of)
            axis.set_title(title, fontsize=11, loc="left")
            axis.set_ylabel(y_label)
            axis.set_xlabel("subcomponents on at a position (L0)")
            axis.grid(True, which="both", alpha=0.2)
            axis.set_axisbelow(True)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        figure.suptitle("Better is further left and lower: fewer subcomponents on, less of the model lost", fontsize=11)
        return figure

    def _draw(self, axis: Any, value_of: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        positive = True
        for index, (name, points) in enumerate(self.points.items()):
            shown = sorted((p.l0, v, p) for p in points if (v := value_of(p)) is not None)
            if not shown:
                continue
            positive = positive and all(x > 0 and y > 0 for x, y, _ in shown)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            x, y = [s[0] for s in shown], [s[1] for s in shown]
            axis.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=1.5, label=_plain(name))
            held = [(a, b) for a, b, p in shown if p.holds]
            if held:
                axis.plot(
                    *zip(*held, strict=True), linestyle="", marker="o", markersize=13, fillstyle="none", color=colour
                )
        if positive:
            axis.set_xscale("log")
            axis.set_yscale("log")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                side.set_minor_formatter(NullFormatter())
        if value_of is not _extra_ce:
            off = [p.all_off for points in self.points.values() for p in points]
            axis.axhline(max(off), color="0.35", linestyle="--", linewidth=1, label="all decomposed sites off")

    def _panels(self) -> list[tuple[str, str, Any]]:
        points = [p for own in self.points.values() for p in own]
        axis = f"{self.kind.upper()} from the target"
        panels: list[tuple[str, str, Any]] = [("Random masks", axis, _stochastic)]
        steps = {p.adversary_steps for p in points} - {None}
        if steps:
            budget = " or ".join(str(n) for n in sorted(n for n in steps if n is not None))
            panels.append((f"Adversary, {budget} steps (ringed: verdict holds)", axis, _adversarial))
        if any(p.extra_ce is not None for p in points):
            panels.append(("Next-token loss, random masks", "extra cross-entropy in nats", _extra_ce))
        return panels

    def plotly(self) -> Any:
        """The same panels as an interactive Plotly figure; points show their labels."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        panels = self._panels()
        figure = make_subplots(rows=1, cols=len(panels), subplot_titles=[title for title, _, _ in panels])
        for column, (_, y_label, value_of) in enumerate(panels, 1):
            for index, (name, points) in enumerate(self.points.items()):
                shown = sorted((p.l0, v, p.label) for p in points if (v := value_of(p)) is not None)
                figure.add_trace(
                    go.Scatter(
                        x=[s[0] for s in shown],
                        y=[s[1] for s in shown],
                        text=[_escaped(s[2]) for s in shown],
                        name=_escaped(name),
                        legendgroup=str(index),
                        showlegend=column == 1,
                        mode="lines+markers",
                        line={"color": COLOURS[index % len(COLOURS)]},
                    ),
                    row=1,
                    col=column,
                )
            figure.update_xaxes(type="log", title="subcomponents on at a position (L0)", row=1, col=column)
            figure.update_yaxes(type="log", title=y_label, row=1, col=column)
        return figure.update_layout(template="plotly_white", width=460 * len(panels), height=440)

    def save(self, path: str | Path) -> Path:
        """Write the Matplotlib figure (PNG, PDF, SVG by the suffix)."""
        path = given_path(path)
        write_figure(path, self.figure(), dpi=150)
        return path

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": self.kind, "points": {name: [vars(p) for p in own] for name, own in self.points.items()}}

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.figure().savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"Pareto({', '.join(f'{name}: {len(own)} runs' for name, own in self.points.items())})"

    def __str__(self) -> str:
        header = ("method", "run", "L0", "of", "random masks", "adversary", "all off", "extra CE", "verdict")
        rows = []
        for name, own in self.points.items():
            for p in sorted(own, key=lambda p: p.l0):
                adversary = "-" if p.adversarial is None else f"{p.adversarial:.3g} ({p.adversary_steps} steps)"
                words = {None: "not judged", True: "holds", False: "does not hold"}
                extra = "-" if p.extra_ce is None else f"{p.extra_ce:.3g}"
                numbers = (f"{p.l0:.1f}", str(p.c_total), f"{p.stochastic:.3g}", adversary, f"{p.all_off:.3g}", extra)
                rows.append((name, p.label, *numbers, words[p.holds]))
        return format_table(header, rows)


def pareto(runs: Mapping[str, Iterable[Any]] | Iterable[Any]) -> Pareto:
    """Points from reports, for a picture of L0 against what the masks cost.

    `runs` is a list of reports or of paths (files or directories that `report.save` wrote), or `{name: list}` for
    several methods side by side: `pareto({"SPD": reports, "singular vectors": others})`. Raises ValueError for no
    runs, and for runs measured in KL beside others in MSE.
    """
    if isinstance(runs, (EvaluationReport, str, os.PathLike)):
        raise TypeError(f"runs is a {type(runs).__name__}; expected a list of reports, or {{name: list of reports}}")
    groups: Mapping[str, Iterable[Any]] = runs if isinstance(runs, Mapping) else {"SPD": runs}
    points: dict[str, tuple[ParetoPoint, ...]] = {}
    kinds: set[str] = set()
    for name, own in groups.items():
        own = given_list("runs" if groups is not runs else f"runs[{name!r}]", own, "reports or of paths of saved ones")
        loaded = [_loaded(item, f"run {i}") for i, item in enumerate(own)]
        kinds |= {report.kind for _, report in loaded}
        points[name] = tuple(_point(label, report) for label, report in loaded)
    if not any(points.values()):
        raise ValueError("there are no runs to draw; give a list of evaluation reports or of saved ones")
    if len(kinds) > 1:
        raise ValueError(f"these runs were measured in different units, {sorted(kinds)}; draw them apart")
    return Pareto(points, kinds.pop())


def _loaded(item: Any, label: str) -> tuple[str, EvaluationReport]:
    if isinstance(item, EvaluationReport):
        return label, item
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        return (path.stem if path.suffix else path.name), EvaluationReport.load(path)
    raise TypeError(f"a run is a {type(item).__name__}; expected an EvaluationReport or the path of a saved one")


def _point(label: str, report: EvaluationReport) -> ParetoPoint:
    steps = min(report.adversarial, default=None)
    ce = report.cross_entropy
    return ParetoPoint(
        label=label,
        l0=report.l0,
        c_total=report.n_subcomponents,
        stochastic=report.divergence["stochastic"],
        all_off=report.divergence["all off"],
        adversarial=None if steps is None else report.adversarial[steps],
        adversary_steps=steps,
        extra_ce=ce["stochastic"] - ce["target"] if "stochastic" in ce else None,
        holds=report.verdict.holds if report.verdict.judged else None,
    )


def _stochastic(point: ParetoPoint) -> float:
    return point.stochastic


def _adversarial(point: ParetoPoint) -> float | None:
    return point.adversarial


def _extra_ce(point: ParetoPoint) -> float | None:
    return point.extra_ce


def _plain(text: str) -> str:
    # matplotlib would read $ as the start of a formula.
    return text.replace("$", r"\$")


def _escaped(text: str) -> str:
    # plotly reads a subset of HTML.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

"""What `evaluate` measured, as plain data, tables and words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.evaluation.deletion import NEVER_NEEDED, Deletion
from spd_lens.evaluation.intervals import Interval, PerText
from spd_lens.evaluation.site_report import THRESHOLDS, SiteReport
from spd_lens.evaluation.verdict import Verdict, judge
from spd_lens.objective.divergences import Divergence
from spd_lens.support.checked_json import read_checked_values, write_checked
from spd_lens.support.files import given_path
from spd_lens.support.shown import short_repr, text_html
from spd_lens.support.tables import format_table

FORMAT, FORMAT_VERSION = "spd_lens evaluation", 1
FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class AttackReport:
    """What stands beside every number of the adversary (E1b): first step size, starts, and how many rows (of how many
    positions at most) shared one source; `spans` is how many such groups there were."""

    step_size: float
    starts: int
    span_rows: int
    span_positions: int
    spans: int

    __repr__ = short_repr
    _repr_html_ = text_html

    def __str__(self) -> str:
        starts = "one start" if self.starts == 1 else f"worst of {self.starts} starts"
        spans = "" if self.spans == 1 else f", mean of {self.spans} such spans"
        return (
            f"adversary: largest divergence at any step, {starts}, first step {self.step_size:g}, halved when progress "
            f"stalls; one source over {self.span_rows:,} rows x {self.span_positions:,} positions{spans}"
        )


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` measured; `str(report)` is the table, `report.verdict` says what it means.

    - `divergence[regime]`: KL (or MSE) from the clean output, mean per position; `cross_entropy[regime]` in nats per
      token, with `"target"` for the clean model (empty for models without tokens); `top_changes[regime]`: share of
      positions at which the most likely token is another one.
    - `adversarial[steps]`: the divergence under the worst masks that an adversary of that many steps saw; `attack`
      states the rest of its budget.
    - `unigram_cross_entropy`: that of the tokens' own frequencies, the zero of `ce_recovered`.
    - `deletion`: what removing for good costs (E8); None where it was left out.
    - `intervals[quantity][regime]`: bootstrap intervals (95 %) over texts; `per_text` holds what they are drawn from:
      sums and counts of every text. The sources of the adversary are not chosen anew for them.
    - `warnings`: failure modes that the numbers show (E6), in words.
    """

    sites: dict[str, SiteReport]
    divergence: dict[str, float]
    cross_entropy: dict[str, float]
    adversarial: dict[int, float]
    kind: Divergence
    positions: int
    texts: int = 0
    attack: AttackReport | None = None
    top_changes: dict[str, float] = field(default_factory=dict)
    unigram_cross_entropy: float | None = None
    deletion: Deletion | None = None
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    per_text: dict[str, dict[str, PerText]] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    # -- what follows from the numbers ------------------------------------------------------------------------

    @property
    def n_subcomponents(self) -> int:
        """All subcomponents of all sites."""
        return sum(site.n_subcomponents for site in self.sites.values())

    @property
    def l0(self) -> float:
        """Mean number of subcomponents per position, over all sites, with importance above 0.01."""
        return sum(site.l0[ALIVE_ABOVE] for site in self.sites.values())

    @property
    def alive(self) -> int:
        """How many subcomponents have importance above 0.01 anywhere in the data."""
        return sum(site.alive for site in self.sites.values())

    @property
    def ce_recovered(self) -> dict[str, float]:
        """E9, by regime: `1 - (CE_masked - CE_target) / (CE_unigram - CE_target)`.

        Empty where the target predicts no tokens, or is no better than their frequencies.
        """
        target, unigram = self.cross_entropy.get("target"), self.unigram_cross_entropy
        if target is None or unigram is None or unigram <= target:
            return {}
        return {
            name: 1 - (value - target) / (unigram - target)
            for name, value in self.cross_entropy.items()
            if name != "target"
        }

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the decomposition holds on this data, in words; the rule is in `spd_lens.evaluation.verdict`."""
        return judge(
            kind=self.kind,
            divergence=self.divergence,
            adversarial=self.adversarial,
            l0=self.l0,
            n_subcomponents=self.n_subcomponents,
            rank=sum(site.rank_bound for site in self.sites.values()),
            deletion=None if self.deletion is None else self.deletion.divergence[NEVER_NEEDED],
        )

    def log_values(self, prefix: str = "") -> dict[str, float]:
        """The numbers worth a line in a training log, flat: `l0`, `alive`, `c_total`, `kl_stochastic`, `kl_all_off`,
        `kl_no_delta`, `kl_pgd20`, `ce_recovered`, `kl_deletion`, `holds` ..., each with the prefix."""
        kind = self.kind
        values: dict[str, float] = {"l0": self.l0, "alive": self.alive, "c_total": self.n_subcomponents}
        values["faithfulness"] = max((s.relative_faithfulness for s in self.sites.values()), default=0.0)
        short = {"all on, no delta": "no_delta"}
        values |= {f"{kind}_{short.get(k, k).replace(' ', '_')}": v for k, v in self.divergence.items()}
        values |= {f"{kind}_pgd{steps}": value for steps, value in self.adversarial.items()}
        if "stochastic" in self.ce_recovered:
            values["ce_recovered"] = self.ce_recovered["stochastic"]
        if "stochastic" in self.top_changes:
            values["top_changes"] = self.top_changes["stochastic"]
        if self.deletion is not None:
            values[f"{kind}_deletion"] = self.deletion.divergence[NEVER_NEEDED]
        if self.verdict.judged:
            values["holds"] = float(self.verdict.holds)
        return {f"{prefix}{name}": value for name, value in values.items()}

    # -- files --------------------------------------------------------------------------------------------------

    def to_json(self, *, per_text: bool = True) -> dict[str, Any]:
        """Plain values that JSON can hold: keys are strings, what is not finite is None."""
        values = _plain(asdict(self))
        if not per_text:
            values["per_text"] = {}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values, "verdict": _plain(asdict(self.verdict))}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> EvaluationReport:
        """Undo `to_json`. Raises ValueError for anything else."""
        given = dict(content)
        own = {f.name for f in fields(EvaluationReport)}
        if given.pop("format", FORMAT) != FORMAT or given.pop("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ValueError(f"this is no {FORMAT} of version {FORMAT_VERSION}")
        given.pop("verdict", None)
        if given.keys() != own:
            raise ValueError(f"this is no evaluation report: odd or missing fields {sorted(given.keys() ^ own)[:4]}")
        try:
            return _restored(given)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no evaluation report: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write JSON with a checksum over its values to a file, or to `evaluation.json` in a directory."""
        path = _file(path)
        write_checked(path, self.to_json(), format_name=FORMAT, version=FORMAT_VERSION)
        return path

    @staticmethod
    def load(path: str | Path) -> EvaluationReport:
        """Read what `save` wrote. Raises ValueError for a missing, damaged, altered or foreign file."""
        content = read_checked_values(_file(path), format_name=FORMAT, version=FORMAT_VERSION)
        return EvaluationReport.from_json(content)

    # -- to look at -----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        numbers = [f"L0 {self.l0:.1f} of {self.n_subcomponents:,}"]
        numbers += [
            f"{self.kind.upper()} {self.divergence[k]:.3g} {k}"
            for k in ("stochastic", "all off")
            if k in self.divergence
        ]
        numbers += [f"PGD {steps}: {value:.3g}" for steps, value in self.adversarial.items()]
        judged = {True: "holds", False: "does not hold"}[self.verdict.holds] if self.verdict.judged else "not judged"
        return f"EvaluationReport({len(self.sites)} sites, {', '.join(numbers)}; {judged})"

    def __str__(self) -> str:
        tables = [format_table(header, rows) for header, rows in self._tables()]
        return "\n\n".join([*tables, "\n".join(self._notes())])

    def _repr_html_(self) -> str:
        parts = [_html_table(header, rows) for header, rows in self._tables()]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        return f'<div class="spd-evaluation">{"".join(parts)}{notes}</div>'

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        return [self._site_table(), self._regime_table()]

    def _site_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["site", "C", "rank", "alive", *(f"L0>{t:g}" for t in THRESHOLDS), "|W-VU|²/|W|²", "possible"]
        rows = [
            [
                name,
                str(s.n_subcomponents),
                str(s.rank_bound),
                str(s.alive),
                *(f"{s.l0[t]:.1f}" for t in THRESHOLDS),
                f"{s.relative_faithfulness:.2e}",
                f"{s.smallest_possible:.2e}",
            ]
            for name, s in self.sites.items()
        ]
        return header, rows

    def _regime_table(self) -> tuple[list[str], list[list[str]]]:
        with_tokens, with_tops, recovered = bool(self.cross_entropy), bool(self.top_changes), self.ce_recovered
        header = ["masks", f"{self.kind.upper()} from the target", "95 % over texts"]
        header += ["top token changes"] * with_tops + ["CE"] * with_tokens + ["CE recovered"] * bool(recovered)
        shown = [("target", "target", 0.0)] if with_tokens else []
        shown += [(name, name, value) for name, value in self.divergence.items()]
        shown += [(f"PGD {steps}", f"PGD, {steps} steps", value) for steps, value in self.adversarial.items()]
        if self.deletion is not None:
            labels = {NEVER_NEEDED: "never needed: off", "own union": "each text: its own union"}
            labels["others' union"] = "each text: others' union (control)"
            shown += [(name, labels.get(name, name), value) for name, value in self.deletion.divergence.items()]
        rows = []
        for name, label, value in shown:
            interval = self.intervals.get("divergence", {}).get(name)
            row = [label, f"{value:.4g}", f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else "-"]
            row += [_percent(self.top_changes.get(name, 0.0 if name == "target" else None))] * with_tops
            row += [_number(self.cross_entropy.get(name), ".4f")] * with_tokens
            row += [_percent(1.0 if name == "target" else recovered.get(name))] * bool(recovered)
            rows.append(row)
        if with_tokens and self.unigram_cross_entropy is not None:
            row = ["token frequencies alone", "-", "-", *["-"] * with_tops, f"{self.unigram_cross_entropy:.4f}"]
            rows.append(row + ["0.0 %"] * bool(recovered))
        return header, rows

    def _notes(self) -> list[str]:
        lines = [
            f"means over {self.positions:,} positions of {self.texts:,} texts; "
            f"alive: importance above {ALIVE_ABOVE:g} somewhere in them"
        ]
        if self.attack is not None:
            lines.append(str(self.attack))
        if self.deletion is not None:
            lines.append(_deletion_line(self.deletion, self.n_subcomponents))
        lines += [f"Note: {warning}" for warning in self.warnings]
        return [*lines, f"Verdict: {self.verdict}"]


def _deletion_line(deletion: Deletion, total: int) -> str:
    never = sum(deletion.never_needed.values())
    line = (
        f"deletion: {never:,} of {total:,} subcomponents have importance under {ALIVE_ABOVE:g} at all "
        f"{deletion.sample_positions:,} positions of the sample; delta is off, too"
    )
    if "own union" in deletion.kept:
        own, others = deletion.kept["own union"], deletion.kept["others' union"]
        line += f"; a text's own positions need {own:.1f} together, its control keeps {others:.1f}"
    return line


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _file(path: str | Path) -> Path:
    path = given_path(path)
    return path / FILE_NAME if path.is_dir() else path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _restored(given: dict[str, Any]) -> EvaluationReport:
    def number(value: Any) -> float:
        return math.nan if value is None else float(value)

    sites = {}
    for name, site in given["sites"].items():
        errors = {k: number(site[k]) for k in ("relative_faithfulness", "smallest_possible")}
        sites[name] = SiteReport(**{**site, **errors, "l0": {float(t): number(v) for t, v in site["l0"].items()}})
    restored: dict[str, Any] = {
        k: {name: number(v) for name, v in given[k].items()} for k in ("divergence", "cross_entropy", "top_changes")
    }
    restored["adversarial"] = {int(steps): number(v) for steps, v in given["adversarial"].items()}
    for key, cls in (("attack", AttackReport), ("deletion", Deletion)):
        restored[key] = None if given[key] is None else cls(**given[key])
    restored["intervals"] = {
        quantity: {regime: (number(low), number(high)) for regime, (low, high) in own.items()}
        for quantity, own in given["intervals"].items()
    }
    restored["per_text"] = {
        quantity: {regime: (list(map(number, s)), list(map(number, c))) for regime, (s, c) in own.items()}
        for quantity, own in given["per_text"].items()
    }
    return EvaluationReport(**{**given, **restored, "sites": sites, "warnings": tuple(given["warnings"])})

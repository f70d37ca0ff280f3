"""`AuditReport`: what an audit says, as numbers and words; its JSON file and the schema of that file.

All numbers about the margin are rounded to six decimals, and then

    margin = start + sum of the reasons' effects (for and against) + rest        exactly, in decimal arithmetic.

The schema is JSON Schema (2020-12): `report_schema()`, and in the package as `audit_report.schema.json`.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from spd_lens.audit.adversary import MOST_STARTS, MOST_STEPS
from spd_lens.audit.bench import MOST_CONTROLS, MOST_DRAWS, N_REASONS
from spd_lens.audit.candidates import Key, key_of
from spd_lens.audit.judged import Why
from spd_lens.support.checked_json import CheckedContent, checked_text, read_checked
from spd_lens.support.files import given_path, write_text
from spd_lens.support.pages import visible
from spd_lens.support.shown import text_html

FORMAT, VERSION = "spd_lens audit report", 3
# A report has a few hundred numbers; what is larger is none.
LARGEST_FILE = 2_000_000
SCHEMA_PATH = Path(__file__).resolve().parent / "audit_report.schema.json"

MAX_TEXT = 1_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
# Of larger ones a 64-bit float has no six decimals, so nothing would add up exactly; no margin is as large.
LARGEST_NUMBER = 1e9
Number = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# What fits a 64-bit integer: larger numbers end a tensor's arithmetic, not a report.
Index = Annotated[int, Field(ge=0, lt=1 << 63)]
# What a report says of the machine that made it is shown on its page and checked by nothing: no room for sentences.
Library: TypeAlias = Literal["python", "spd-lens", "torch", "transformer-lens", "transformers"]
Version = Annotated[str, Field(pattern=r"^(not installed|[0-9][0-9A-Za-z.+!_-]{0,39})$")]


class Place(CheckedContent):
    """A position of the input: what it is called, the token there, what that says, and plain words if there are any."""

    position: Index
    name: Text
    token: Index
    says: Text
    words: Text | None


class Interval(CheckedContent):
    """The middle 95 % of the effects of random cells of equal use, and of how many such draws."""

    low: Number
    high: Number
    draws: Annotated[int, Field(ge=1)]


class Counterfactual(CheckedContent):
    """The input with the place's token changed: what the reason predicts that this does, and what it does.

    `agrees`: equal signs, and a difference of at most a quarter of the larger (or 0.05).
    """

    instead: Text
    token: Index
    predicted: Number
    measured: Number
    agrees: bool


class Members(CheckedContent):
    """Subcomponents of one site in a reason, and the positions at which just these take part."""

    site: Text
    positions: Annotated[list[Index], Field(min_length=1, max_length=100_000)]
    ids: Annotated[list[Index], Field(max_length=10_000)]


class PastCases(CheckedContent):
    """Cases of the data that say the same at this place: how many, how many of them the model decides alike."""

    same: Index
    decided_alike: Index
    outcomes: dict[str, Index]


class Reason(CheckedContent):
    """One reason: a place of the input, or a component.

    - `component`: its name, given by people; None: the reason is the place. `place`: the place; of a component the one
      at which another token moves its subcomponents' effect most.
    - `effect`: the margin minus the margin with the members as in the control cases, mean over these;
      `effect_low`, `effect_high`: the smallest and largest over single control cases.
    - `remove`: margin minus the margin with them removed (necessity); `flips`: whether the decision then changes.
      `keep_only`: the margin with only this kept of all places (components), minus that with none (sufficiency).
    - `controls`: what random subcomponents of equal use do.
    - `worst`: the smallest effect, in the reason's own direction, that the adversary of the report's budget reaches.
    """

    component: Text | None
    place: Place
    members: Annotated[list[Members], Field(min_length=1, max_length=10_000)]
    effect: Number
    effect_low: Number
    effect_high: Number
    remove: Number
    flips: bool
    keep_only: Number
    controls: Interval
    worst: Number
    counterfactual: Counterfactual | None
    past: PastCases

    @property
    def key(self) -> Key:
        """What it is told by: the component's name, or the place's position."""
        return key_of(self.component, self.place.position)

    @property
    def called(self) -> str:
        """What people call it: the component's name, else the place's words or name."""
        return self.component or self.place.words or self.place.name


class Withheld(CheckedContent):
    """A place or component whose effect is as large as a reason's, but whose evidence supports none, and why."""

    component: Text | None
    place: Place
    effect: Number
    why: Why


class Rest(CheckedContent):
    """What the reasons leave: `value = together + elsewhere`.

    - `together`: the effect of all reasons at once, minus the sum of their single effects.
    - `elsewhere`: what is left of the distance between this case and the control cases with all reasons replaced.
    """

    value: Number
    together: Number
    elsewhere: Number


class DecisionMade(CheckedContent):
    """The decision: output numbers and names, position, margin, and the margin that the adversary can push it to."""

    chosen: Index
    other: Index
    position: Index
    chosen_name: Text
    other_name: Text
    margin: Number
    worst_margin: Number


class Coverage(CheckedContent):
    """`explained`: `sum |effect| / (sum |effect| + |rest|)`, the reasons' share of all that moves the margin.

    `words`: the share of places that the dictionary has words for; `reason_words`: of the reasons.
    """

    explained: Share
    words: Share
    reason_words: Share


class SimilarCase(CheckedContent):
    """A past case: its number in the data, at how many places it is equal, what the model decides, what it became."""

    number: Index
    equal_places: Index
    margin: Number
    outcome: Text | None


class Adversary(CheckedContent):
    """The budget under which every claim holds: steps, size of the first, starts, and how far one source reaches."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    step_size: Annotated[float, Field(gt=0, le=1)]
    starts: Annotated[int, Field(ge=1, le=MOST_STARTS)]
    span_rows: Literal[1]
    span_positions: Index


class Settings(CheckedContent):
    """What the numbers depend on besides the digests. A file cannot ask for more work than these bounds."""

    seed: Annotated[int, Field(ge=0, lt=1 << 32)]
    n_reasons: Annotated[int, Field(ge=1, le=N_REASONS)]
    n_controls: Annotated[int, Field(ge=2, le=MOST_CONTROLS)]
    n_draws: Annotated[int, Field(ge=8, le=MOST_DRAWS)]
    reasons_at: Annotated[list[Index], Field(max_length=100_000)]
    control_cases: Annotated[list[Index], Field(max_length=MOST_CONTROLS)]
    smallest_effect: Share


class Digests(CheckedContent):
    """SHA-256 of what the report is about; `sites`: of every decomposed matrix of the model; `components`: of the
    components that could be reasons, with their names, None where places could."""

    model: Sha256
    host: Text
    sites: dict[str, Sha256]
    decomposition: Sha256
    cases: Sha256
    components: Sha256 | None
    input: Sha256


class AuditReport(CheckedContent):
    """An audit of one decision; `explain` makes it, `verify` runs it again. `inputs`: the audited tokens."""

    title: Text
    model_name: Text
    inputs: Annotated[list[Index], Field(max_length=100_000)]
    decision: DecisionMade
    start: Number
    reasons_for: Annotated[list[Reason], Field(max_length=N_REASONS)]
    reasons_against: Annotated[list[Reason], Field(max_length=N_REASONS)]
    withheld: list[Withheld]
    rest: Rest
    places: list[Place]
    coverage: Coverage
    similar: list[SimilarCase]
    adversary: Adversary
    settings: Settings
    digests: Digests
    versions: dict[Library, Version]
    spd_lens_audit: Sha256

    @property
    def reasons(self) -> list[Reason]:
        """All reasons, those for the decision first."""
        return [*self.reasons_for, *self.reasons_against]

    def __str__(self) -> str:
        """The sum, line by line: where control cases stand, the reasons, what they leave, and the margin."""
        lines = [f"{self.start:+9.3f}  control cases, on average"]
        lines += [f"{reason.effect:+9.3f}  {reason.called}: {reason.place.says}" for reason in self.reasons]
        lines += [f"{self.rest.value:+9.3f}  not explained", f"{self.decision.margin:+9.3f}  margin"]
        lines += [f"withheld: {held.component or held.place.name} ({held.effect:+.3f})" for held in self.withheld]
        return "\n".join(map(visible, [self.title, *lines]))

    def __repr__(self) -> str:
        return f"AuditReport({self.title!r}, {len(self.reasons)} reasons, margin {self.decision.margin:+.3f})"

    _repr_html_ = text_html

    def adds_up(self) -> bool:
        """Whether start, reasons and rest give the margin, and the two parts of the rest the rest, exactly."""
        parts = [self.start, *(reason.effect for reason in self.reasons), self.rest.value]
        rest = _exact(self.rest.together) + _exact(self.rest.elsewhere)
        return sum(map(_exact, parts), Decimal(0)) == _exact(self.decision.margin) and rest == _exact(self.rest.value)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON with a checksum; returns the path."""
        path = given_path(path)
        write_text(path, checked_text(self.model_dump(), format_name=FORMAT, version=VERSION))
        return path

    @staticmethod
    def load(path: str | Path) -> AuditReport:
        """Read a report.

        Raises ValueError, naming the file, if it is absent, far too large, foreign, damaged, changed by hand, of a
        newer version, or if its numbers do not add up.
        """
        path = given_path(path)
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes; a report has at most {LARGEST_FILE:,}, so this is none"
            )
        report = read_checked(path, AuditReport, format_name=FORMAT, version=VERSION)
        if not report.adds_up():
            raise ValueError(f"{path}: start, reasons and rest do not add up to the margin {report.decision.margin}")
        return report


def rounded(value: float) -> float:
    """Six decimals, as all numbers of a report."""
    return round(float(value), 6) + 0.0


def rest_value(margin: float, start: float, effects: list[float]) -> float:
    """What makes start, effects and rest add up to the margin, exactly."""
    return float(_exact(margin) - sum(map(_exact, [start, *effects]), Decimal(0)))


def _exact(value: float) -> Decimal:
    return Decimal(repr(value))


def report_schema() -> dict[str, Any]:
    """The JSON Schema of a report's file."""
    schema = AuditReport.model_json_schema()
    schema["properties"] = {
        "format": {"const": FORMAT},
        "format_version": {"const": VERSION},
        "checksum": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        **schema["properties"],
    }
    schema["required"] = ["format", "format_version", "checksum", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Audit report of spd_lens"}


def write_schema(path: Path = SCHEMA_PATH) -> None:
    """Write the schema as it ships."""
    write_text(path, json.dumps(report_schema(), indent=1, sort_keys=True) + "\n")

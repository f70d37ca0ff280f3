"""`RunFile`: one run as a file. Model, decomposition, data, training and evaluation, checked whole when it is read.

    model: {name: tiny_lm}
    decompose:
      sites: {"blocks.0.mlp.W_*": 192}
      gate: shared
    data: {text: moby_dick, context: 64, batch_size: 8}
    train: {steps: 2000, minimality: 1.0e-4}
    out_dir: runs/tiny

Every field is an argument of the Python function of the section's name, so what a file can say, Python can say too:
`RunFile.read("config.yaml").train_config` is a `TrainConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, TypeAdapter, ValidationError

from spd_lens.cli.sections import (
    OF_ORIGINS,
    ORIGINS,
    DataSection,
    DecomposeSection,
    EvaluateSection,
    EvaluationsSection,
    LogSection,
    ModelSection,
    ReadoutSection,
    Section,
)
from spd_lens.cli.yaml_file import ConfigError, Place, YamlFile, read_yaml, with_changes, write_yaml
from spd_lens.core import MaskKind
from spd_lens.objective import PGD, Merged, Persistent
from spd_lens.support.files import write_text
from spd_lens.support.names import near_names
from spd_lens.training import Reconstruction, TrainConfig

MASK_NAMES = (*get_args(MaskKind), "pgd", "persistent", "merged")
BUDGETS = {kind.__name__: kind for kind in (PGD, Persistent, Merged)}


class RunFile(Section):
    """A run's file; `RunFile.read(path)` checks it, `spd_lens.cli.runs` does what it says."""

    model: ModelSection
    decompose: DecomposeSection
    data: DataSection
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    evaluations: EvaluationsSection | None = None
    readout: ReadoutSection | None = None
    log: LogSection = Field(default_factory=LogSection)
    out_dir: str | None = None

    @property
    def train_config(self) -> TrainConfig:
        """The section `train`."""
        return TrainConfig.from_json(_train_values(self.train))

    @property
    def evaluation_data(self) -> DataSection:
        """The data to evaluate on."""
        given = self.evaluate.data
        kept = self.data.model_dump()
        if any(name in given for name in ORIGINS):
            kept |= dict.fromkeys(ORIGINS)
            lost = {"stream", "streams", "shuffle", "documents"}
            lost |= {name for name, origins in OF_ORIGINS.items() if not any(origin in given for origin in origins)}
            kept = {name: value for name, value in kept.items() if name not in lost}
        return DataSection.model_validate(kept | given)

    @staticmethod
    def read(path: str | Path, changes: Sequence[str] = ()) -> RunFile:
        """Read and check a YAML file; `changes` are assignments such as `"train.steps=100"`.

        Raises ConfigError that names file, line, field, what was given and expected, and near names.
        """
        file = with_changes(read_yaml(Path(path)), changes)
        return RunFile.of(file)

    @staticmethod
    def of(file: YamlFile) -> RunFile:
        """The run that a file's values describe; errors as in `read`."""
        try:
            run = RunFile.model_validate(file.values)
        except ValidationError as error:
            raise first_problem(file, RunFile, error) from None
        _check_train(file, run.train)
        _check_readout(file, run)
        try:
            _ = run.evaluation_data
        except ValidationError as error:
            raise first_problem(file, DataSection, error, ("evaluate", "data")) from None
        return run

    def to_yaml(self) -> str:
        """The file's text, every default written out."""
        return write_yaml(self.model_dump())

    def write(self, path: Path) -> None:
        """Write `to_yaml()` to a file."""
        write_text(path, self.to_yaml())


def _train_values(train: Mapping[str, Any]) -> dict[str, Any]:
    """As `TrainConfig.to_json` would have it: reconstructions with their defaults."""
    values = dict(train)
    if "reconstructions" in values:
        values["reconstructions"] = [{"masks": "stochastic", **term} for term in values["reconstructions"]]
    else:
        values["reconstructions"] = TrainConfig().to_json()["reconstructions"]
    return values


def _check_train(file: YamlFile, train: Mapping[str, Any]) -> None:
    """ConfigError for a section that makes no TrainConfig."""
    known = TrainConfig.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    for name in train:
        if name not in known:
            raise file.error(("train", name), f"TrainConfig has no such field; near: {near_names(name, known)}")
    terms = train.get("reconstructions", [])
    if not isinstance(terms, list):
        raise file.error(("train", "reconstructions"), f"{terms!r}; expected a list of terms")
    for i, term in enumerate(terms):
        place: Place = ("train", "reconstructions", i)
        if not isinstance(term, Mapping):
            raise file.error(place, f"{term!r}; expected fields, for example {{masks: stochastic, routing: all}}")
        fields = Reconstruction.__dataclass_fields__
        for name in term:
            if name not in fields:
                raise file.error((*place, name), f"a term has no such field; near: {near_names(str(name), fields)}")
        _check_masks(file, (*place, "masks"), term.get("masks", "stochastic"))
    plain_fields = {name: value for name, value in train.items() if name != "reconstructions"}
    try:
        TypeAdapter(TrainConfig).validate_python(plain_fields)
    except ValidationError as error:
        raise first_problem(file, TrainConfig, error, ("train",)) from None
    try:
        TrainConfig.from_json(_train_values(train))
    except (ValueError, TypeError, KeyError) as error:
        raise file.error(("train",), str(error)) from None


def _check_readout(file: YamlFile, run: RunFile) -> None:
    """ConfigError for a read-out that local training would not use."""
    if run.readout is None:
        return
    config = run.train_config
    if config.stop_at is None or config.divergence != "mse":
        raise file.error(
            ("readout",),
            f"a read-out is for local training, in train: {{stop_at: BLOCK, divergence: mse}}; given stop_at="
            f"{config.stop_at}, divergence={config.divergence}",
        )


def _check_masks(file: YamlFile, place: Place, masks: Any) -> None:
    """ConfigError unless `masks` is the name of a source, or the fields of a budget."""
    if isinstance(masks, Mapping):
        if masks.get("type") not in BUDGETS:
            near = near_names(str(masks.get("type")), BUDGETS)
            raise file.error((*place, "type"), f"{masks.get('type')!r}; expected a budget; near: {near}")
    elif masks not in MASK_NAMES:
        raise file.error(place, f"{masks!r}; expected a mask source; near: {near_names(str(masks), MASK_NAMES)}")


def first_problem(file: YamlFile, kind: Any, error: ValidationError, before: Place = ()) -> ConfigError:
    """The first problem that pydantic found, with its line and near names; how many more there are."""
    problems = error.errors()
    first = problems[0]
    place = (*before, *(part for part in first["loc"] if not _is_branch(part)))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return file.error(place, _in_words(kind, first) + more)


def _in_words(kind: Any, problem: Any) -> str:
    given = problem.get("input")
    match problem["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            names = _fields_at(kind, problem["loc"][:-1])
            return f"there is no such field; near: {near_names(str(problem['loc'][-1]), names)}"
        case "missing" | "missing_argument":
            return "is missing; expected a value"
        case "literal_error":
            expected = problem["ctx"]["expected"]
            near = near_names(str(given), expected.replace("'", "").replace(" or ", ", ").split(", "))
            return f"{given!r}; expected {expected}; near: {near}"
        case "value_error":
            return str(problem["ctx"].get("error", problem["msg"]))
    return f"{given!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields_at(kind: Any, place: Iterable[Any]) -> list[str]:
    for part in place:
        fields = getattr(kind, "model_fields", {})
        kind = fields[part].annotation if part in fields else kind
    return list(getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {}))


def _is_branch(part: Any) -> bool:
    """A step of the path that is pydantic's and not a name of the file."""
    return isinstance(part, str) and (part in ("int", "float", "str", "none") or "[" in part)

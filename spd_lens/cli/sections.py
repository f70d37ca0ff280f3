"""The sections of a run's file; every field is an argument of a Python function."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spd_lens.data import Documents

ORIGINS = ("text", "files", "dataset", "tokens", "residuals")
# What only some of them have.
OF_ORIGINS = {"split": ("text", "dataset"), "name": ("dataset",), "revision": ("dataset",), "column": ("dataset",)}


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ModelSection(Section):
    """Which model: a shipped one, a name that TransformerLens or the Hub knows, or a local folder."""

    name: str
    revision: str | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    host: Literal["hooked", "bridge"] | None = None


class DecomposeSection(Section):
    """The arguments of `decompose`; `C: null` is 1.5 times the rank bound.

    `start_from`: a saved decomposition that training begins with; its sites and gates are then used.
    """

    sites: dict[str, int | None] = Field(min_length=1)
    gate: Literal["scalar", "vector", "shared", "attention", "global"] = "scalar"
    gate_width: int | None = Field(default=None, ge=1)
    gate_options: dict[str, Any] = Field(default_factory=dict)
    init: Literal["normal", "paper", "exact", "singular"] = "normal"
    seed: int = 0
    start_from: str | None = None

    @field_validator("sites")
    @classmethod
    def _counts(cls, sites: dict[str, int | None]) -> dict[str, int | None]:
        wrong = {site: c for site, c in sites.items() if c is not None and c < 1}
        if wrong:
            raise ValueError(f"{wrong}; expected C of at least 1, or null")
        return sites


class DataSection(Section):
    """Where tokens come from (one of `text`, `files`, `dataset`, `tokens`), and how they are cut and batched.

    - `text`: a text that ships with the package, `moby_dick` (splits `train` and `held_out`).
    - `files`: text files; `dataset`: a name or folder for `datasets.load_dataset`; `tokens`: a `.npy` file `[n pos]`.
    - `cache_residuals`: compute once what enters the first decomposed block.
    - `residuals`: a directory of `write_residuals`, the streams that enter the first decomposed block, on disk.
    - `stream`: `files` or `dataset` are read as training goes (`TokenStream`) and never held whole; then `streams`,
      `shuffle` and `documents` are its arguments. `max_rows` is for data that is read whole.
    - `column` may hold texts or token ids where the data is streamed.
    """

    text: Literal["moby_dick"] | None = None
    files: list[str] | None = Field(default=None, min_length=1)
    dataset: str | None = None
    tokens: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    context: int = Field(default=128, ge=2)
    batch_size: int = Field(default=8, ge=1)
    max_rows: int | None = Field(default=None, ge=1)
    prepend_bos: bool = False
    exclude: list[int] = Field(default_factory=list)
    seed: int = 0
    cache_residuals: bool = False
    residuals: str | None = None
    stream: bool = False
    streams: int = Field(default=1, ge=1)
    shuffle: int = Field(default=0, ge=0)
    documents: Documents = "joined"

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        given = [n for n in ORIGINS if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"given {', '.join(given) or 'none'}; expected one of {', '.join(ORIGINS)}")
        for field, origins in OF_ORIGINS.items():
            value = getattr(self, field)
            if given[0] not in origins and value != DataSection.model_fields[field].default:
                known = " and ".join(origins)
                raise ValueError(
                    f"{field}: {value} with {given[0]}, for which it has no meaning (only for {known}); leave it away, "
                    f"or give other {given[0]}"
                )
        if self.stream and given[0] not in ("files", "dataset"):
            raise ValueError(f"stream: true with {given[0]}, which is read as it is; expected files or dataset")
        if self.stream and (self.cache_residuals or self.max_rows is not None):
            raise ValueError("stream: true with cache_residuals or max_rows, which are for data that is read whole")
        if not self.stream and (self.streams > 1 or self.shuffle or self.documents != "joined"):
            raise ValueError("streams, shuffle and documents are for data that is streamed; add stream: true")
        return self


class EvaluateSection(Section):
    """The arguments of `evaluate`; `data` changes fields of the data section, for example the split."""

    data: dict[str, Any] = Field(default_factory=dict)
    max_batches: int = Field(default=8, ge=1)
    adversary_steps: list[int] = Field(default_factory=lambda: [20])
    adversary_step_size: float = Field(default=0.1, gt=0)
    starts: int = Field(default=2, ge=1)
    deletion: bool = True
    quick: bool = False
    seed: int = 0


class EvaluationsSection(Section):
    """When `train` evaluates on the way, on the data of the `evaluate` section and with its choices.

    `fast_every`: steps between quick ones, `slow_every`: between full ones (and one at the end).
    """

    fast_every: int | None = Field(default=None, ge=1)
    slow_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ever(self) -> EvaluationsSection:
        if self.fast_every is None and self.slow_every is None:
            raise ValueError("neither fast_every nor slow_every is given; expected one of them")
        return self


class ReadoutSection(Section):
    """The arguments of `tune_readout`, for local training: it is tuned on the run's data when the run begins."""

    max_batches: int = Field(default=8, ge=1)
    samples: int = Field(default=1, ge=1)
    ridge: float = Field(default=0.1, ge=0)
    seed: int = 0


class LogSection(Section):
    """Where the log goes besides `log.jsonl`.

    - `tensorboard`: to `OUT/tensorboard`; `wandb`: arguments of `wandb.init`, such as `{project: spd, mode: offline}`.
    - `figures_every`: steps between figures of the importances in them (histograms, densities, L0 by site).
    """

    tensorboard: bool = False
    wandb: dict[str, Any] | None = None
    figures_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _somewhere(self) -> LogSection:
        if self.figures_every is not None and not self.tensorboard and self.wandb is None:
            raise ValueError("figures_every without tensorboard or wandb, which show figures; add one of them")
        return self

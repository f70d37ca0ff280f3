"""What a run's file stands for: its model, its decomposition, its data; shared by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from spd_lens.cli.run_file import RunFile, first_problem
from spd_lens.cli.sections import DataSection, DecomposeSection, ModelSection
from spd_lens.cli.yaml_file import ConfigError, read_yaml
from spd_lens.core import Decomposition, decompose
from spd_lens.data import TokenBatches, TokenStream, cache_residuals, load_tokens, open_residuals, pack_tokens
from spd_lens.data.residual_files import TOKENS
from spd_lens.models import (
    load_induction,
    load_moby_dick,
    load_modular_addition,
    load_smollm2,
    load_tiny_lm,
    open_model,
)
from spd_lens.support.names import near_names

RUN_FILE, DECOMPOSITION = "run.yaml", "decomposition"
SHIPPED = {
    "tiny_lm": load_tiny_lm,
    "induction": load_induction,
    "modular_addition": load_modular_addition,
    "smollm2": load_smollm2,
}


def open_run_model(section: ModelSection) -> Any:
    """The model of a run, on its device. Raises ConfigError for a device that is not there."""
    _check_device(section.device)
    dtype = getattr(torch, section.dtype)
    if section.name in SHIPPED:
        if section.revision is not None:
            raise ConfigError(
                f"{section.revision!r}, but {section.name} ships with the package; leave it away", ("model", "revision")
            )
        return SHIPPED[section.name](torch.device(section.device), dtype, section.host)
    return open_model(section.name, device=section.device, dtype=dtype, host=section.host, revision=section.revision)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # what torch raises for one that it was built without
        reason = str(error).strip().splitlines()[0]
        text = f"{name!r} is not to be had here ({reason}); expected cpu, cuda, or another that is"
        raise ConfigError(text, ("model", "device")) from None


def decompose_run(model: Any, section: DecomposeSection) -> Decomposition:
    """The decomposition that a run begins with. Raises ConfigError for sites and gates that this model cannot have."""
    if section.start_from is not None:
        return Decomposition.from_pretrained(section.start_from, model)
    try:
        return decompose(
            model,
            section.sites,
            gate=section.gate,
            gate_width=section.gate_width,
            gate_options=section.gate_options,
            init=section.init,
            seed=section.seed,
        )
    except ValueError as error:
        pattern = next((name for name in section.sites if name in str(error)), None)
        place = ("decompose",) if pattern is None else ("decompose", "sites", pattern)
        raise ConfigError(str(error), place) from None


def load_run_data(section: DataSection, decomposition: Decomposition) -> TokenBatches | TokenStream:
    """The batches of a run."""
    if section.stream:
        return _stream(section, getattr(decomposition.model, "tokenizer", None))
    if section.residuals is not None:
        layers = [w.site.layer for w in decomposition.values() if w.site.layer is not None]
        return open_residuals(
            section.residuals,
            min(layers, default=0),
            batch_size=section.batch_size,
            seed=section.seed,
            exclude=section.exclude,
        )
    tokenizer = getattr(decomposition.model, "tokenizer", None)
    if section.tokens is not None:
        rows: Any = _read_tokens(section)
    elif section.dataset is not None:
        rows = load_tokens(
            section.dataset,
            tokenizer,
            section.context,
            column=section.column,
            split=section.split,
            max_rows=section.max_rows,
            prepend_bos=section.prepend_bos,
            skip_empty=True,
            **_hub_arguments(section),
        )
    else:
        texts = _texts(section)
        rows = pack_tokens(
            texts, tokenizer, section.context, prepend_bos=section.prepend_bos, max_rows=section.max_rows
        )
    batches = TokenBatches(rows, min(section.batch_size, len(rows)), seed=section.seed, exclude=section.exclude)
    return cache_residuals(decomposition, batches) if section.cache_residuals else batches


def _hub_arguments(section: DataSection) -> dict[str, Any]:
    """What `load_dataset` gets besides the name."""
    return {key: value for key in ("name", "revision") if (value := getattr(section, key)) is not None}


def _stream(section: DataSection, tokenizer: Any) -> TokenStream:
    return TokenStream(
        section.files if section.files is not None else section.dataset,
        tokenizer,
        context=section.context,
        batch_size=section.batch_size,
        column=section.column,
        split=section.split,
        documents=section.documents,
        prepend_bos=section.prepend_bos,
        streams=section.streams,
        shuffle=section.shuffle,
        seed=section.seed,
        exclude=section.exclude,
        skip_empty=True,
        **_hub_arguments(section),
    )


def _texts(section: DataSection) -> list[str]:
    if section.text is not None:
        splits = ("train", "held_out")
        if section.split not in splits:
            raise ConfigError(f"{section.split!r}; near: {near_names(section.split, splits)}", ("data", "split"))
        return [load_moby_dick(section.split)]  # pyright: ignore[reportArgumentType]
    assert section.files is not None
    missing = [name for name in section.files if not Path(name).is_file()]
    if missing:
        raise ConfigError(f"there is no file {missing[0]}", ("data", "files"))
    return [Path(name).read_text(encoding="utf-8") for name in section.files]


def _read_tokens(section: DataSection) -> np.ndarray:
    assert section.tokens is not None
    rows = _mapped(Path(section.tokens), "tokens")
    return rows if section.max_rows is None else rows[: section.max_rows]


def _mapped(path: Path, field: str) -> np.ndarray:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", ("data", field))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def tokens_of_a_row(section: DataSection) -> int:
    """What `context` says, or the length of rows that are cut already."""
    if section.tokens is not None:
        return _mapped(Path(section.tokens), "tokens").shape[1]
    if section.residuals is not None:
        return _mapped(Path(section.residuals) / TOKENS, "residuals").shape[1]
    return section.context


def open_saved(
    where: Path, model_name: str | None, revision: str | None = None
) -> tuple[Decomposition, RunFile | None]:
    """A trained decomposition: a directory of `spd-lens train`, or any saved decomposition with the name of its model.

    Raises ConfigError if neither the directory nor the command says which model it is of.
    """
    run_path = where / RUN_FILE
    run = RunFile.read(run_path) if run_path.is_file() else None
    saved = where / DECOMPOSITION if run is not None else where
    if run is not None and not saved.is_dir():
        raise ConfigError(f"the run in {where} has not ended; go on with: spd-lens train {run_path} --resume auto")
    if run is None and model_name is None:
        require_directory(where)
        raise ConfigError(f"{where} does not say which model it is of; give --model, for example --model tiny_lm")
    section = ModelSection(name=model_name) if model_name is not None else run.model if run is not None else None
    assert section is not None
    return Decomposition.from_pretrained(str(saved), open_run_model(section), revision=revision), run


def require_directory(where: Path) -> None:
    """ConfigError, with the names of what is beside it, for a directory that does not exist."""
    if where.is_dir():
        return
    beside = [str(path) for path in where.parent.iterdir() if path.is_dir()] if where.parent.is_dir() else []
    near = f"; near: {near_names(str(where), sorted(beside))}" if beside else ""
    raise ConfigError(f"there is no directory {where}{near}")


def data_for(decomposition: Decomposition, run: RunFile | None, path: Path | None) -> TokenBatches | TokenStream:
    """Batches to evaluate or harvest on: of a YAML file with a data section's fields, or the run's own.

    Raises ConfigError if there is neither.
    """
    if path is not None:
        file = read_yaml(path)
        try:
            return load_run_data(DataSection.model_validate(file.values), decomposition)
        except ValidationError as error:
            raise first_problem(file, DataSection, error) from None
    if run is None:
        raise ConfigError("no run's file here says which data; give --data, a YAML file of a data section")
    return load_run_data(run.evaluation_data, decomposition)

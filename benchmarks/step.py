"""What one training step costs, against what it has to do and against the plain reference.

    python benchmarks/step.py --config c --compare --json

Prints the step's median time, its necessary work by term (`benchmarks/work.py` states the model), the machine's rates
measured before and after it in the same run, the share of the floor that these give, peak memory above the model, and
with `--compare` the time and memory of `benchmarks/reference.py`, its steps alternating with the library's.
Configuration f compares cached residual streams with whole passes instead. `--help` lists the options.

Times are medians of CPU time with one thread and of wall time with more; `speedup` is the median of paired ratios.
`matmul_share` is the time of the necessary matrix products, each at the rate of its shape, over the step's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.configurations import CONFIGURATIONS, Configuration, ProductStep, build
from benchmarks.machine import Clock, Rates, mean_rates, measure_rates, provenance, rounded
from benchmarks.measure import alternate, drop_workspace, kept_workspace, paired_ratio, peak_memory, time_by_term
from benchmarks.work import Work, count_work, positions
from spd_lens import TrainConfig
from spd_lens.data import Batch
from spd_lens.objective import PGD, Persistent
from spd_lens.training import GraphedStep, Reconstruction

LETTERS = dict(zip("abcdefg", CONFIGURATIONS, strict=True))
# Blocks before the decomposed one at which configuration f is measured besides its own.
DEPTHS = (1, 3, 7, 11)
# Masks of `--loss`; persistent ones have sources by position.
MASKS: dict[str, Any] = {"stochastic": "stochastic", "pgd": None, "persistent": Persistent(scope="position")}
# Steps of a `GraphedStep` until it has recorded one.
ORDINARY = 6
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class How:
    """How to measure."""

    rounds: int
    device: torch.device
    dtype: torch.dtype


# -- one configuration ----------------------------------------------------------------------------------------------


def measure(
    built: Configuration, batch: Batch, how: How, others: dict[str, Callable[[], object]]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Results of the library's step, and the times of all steps in the same rounds."""
    clock = Clock(how.device)
    work = count_work(built.decomposition, built.config, batch)
    drop_workspace()
    product = ProductStep(built.decomposition, built.config)
    before = measure_rates(work, clock, how.dtype)
    times = alternate({"product": lambda: product.step(batch), **others}, how.rounds, clock)
    rates = mean_rates(before, measure_rates(work, clock, how.dtype))
    seconds = statistics.median(times["product"])
    memory = peak_memory(lambda: product.step(batch), how.device)
    by_term = time_by_term(product, batch, max(5, how.rounds // 2), clock)
    performed = count_work(built.decomposition, built.config, batch, performed=True)
    result = {
        "step_ms": 1e3 * seconds,
        "positions_per_second": positions(batch) / seconds,
        "floor_ms": 1e3 * rates.floor_seconds(work),
        "floor_share": rates.floor_seconds(work) / seconds,
        "matmul_share": rates.matmul_seconds(p for term in work.matmuls.values() for p in term) / seconds,
        "memory_mb": (memory + kept_workspace()) / 1e6,
        "matmul_gflop": work.flops() / 1e9,
        "performed_gflop": performed.flops() / 1e9,
        "rates": _rates(rates, work, how.dtype.itemsize),
        "terms": _terms(work, rates, by_term, how.dtype.itemsize),
    }
    return result, times


def _rates(rates: Rates, work: Work, itemsize: int) -> dict[str, float]:
    products = [p for term in work.matmuls.values() for p in term]
    return {
        "matmul_gflops": sum(p.flops for p in products) / rates.matmul_seconds(products) / 1e9,
        "square_gflops": rates.square_flops_per_second / 1e9,
        "copy_gb_per_s": 1e-9 * itemsize / rates.moved,
        "draw_ns": 1e9 * rates.drawn,
        "gelu_ns": 1e9 * rates.gelu,
        "gelu_derivative_ns": 1e9 * rates.gelu_derivative,
    }


def _terms(work: Work, rates: Rates, by_term: dict[str, float], itemsize: int) -> dict[str, dict[str, float]]:
    whole = sum(by_term.values())
    return {
        term: {
            "time_share": seconds / whole,
            "ms": 1e3 * seconds,
            "matmul_ms": 1e3 * rates.matmul_seconds(work.matmuls.get(term, [])),
            "gflop": work.flops(term) / 1e9,
            "moved_mb": 1e-6 * itemsize * work.moved.get(term, 0),
        }
        for term, seconds in by_term.items()
    }


def built_on(name: str, how: How, changes: dict[str, Any]) -> Configuration:
    """A configuration with everything that the library needs on the device."""
    built = build(name, dtype=how.dtype, threads=torch.get_num_threads(), **changes)
    built.decomposition.to(how.device)
    cached = None if built.cached is None else built.cached.to(how.device)
    return dataclasses.replace(built, batch=built.batch.to(how.device), cached=cached)


def compare_with_reference(
    name: str, how: How, compare: bool, bf16: bool, graphs: bool, changes: dict[str, Any]
) -> dict[str, Any]:
    """The library's step of a configuration and the reference's, and where asked the library's under bf16 and as a
    CUDA graph."""
    built, others = built_on(name, how, changes), {}
    if compare:
        others["reference"] = reference_step(built, how.device)
    if bf16:
        half = built_on(name, how, changes)
        in_half = ProductStep(half.decomposition, half.config.changed(precision="bf16"))
        others["bf16"] = lambda: in_half.step(half.batch)
    if graphs:
        others |= {f"graph_{p}": graphed(name, how, p, changes) for p in (("fp32", "bf16") if bf16 else ("fp32",))}
    result, times = measure(built, built.batch, how, others)
    for other, run in others.items():
        result[f"{other}_ms"] = 1e3 * statistics.median(times[other])
        if not other.startswith("graph"):  # a graph keeps its memory between steps
            result[f"{other}_memory_mb"] = peak_memory(run, how.device) / 1e6
    if compare:
        result["speedup"] = paired_ratio(times["reference"], times["product"])
        result["memory_ratio"] = result["memory_mb"] / result["reference_memory_mb"]
    if bf16:
        result["bf16_memory_mb"] += kept_workspace() / 1e6
        result["bf16_over_fp32"] = paired_ratio(times["product"], times["bf16"])
    if bf16 and compare:
        result["bf16_speedup"] = paired_ratio(times["reference"], times["bf16"])
    return result


def graphed(name: str, how: How, precision: str, changes: dict[str, Any]) -> Callable[[], object]:
    """The library's step as a CUDA graph, recorded already."""
    built = built_on(name, how, changes)
    product = ProductStep(built.decomposition, built.config.changed(precision=precision))
    step = GraphedStep(product.learner, steps_per_capture=1_000_000)
    for _ in range(ORDINARY):
        step(built.batch, 0)
    return lambda: step(built.batch, 0)


def reference_step(built: Configuration, device: torch.device) -> Callable[[], object]:
    """One step of the reference; elsewhere than on the CPU it draws on the device, because it moves nothing."""
    reference = built.reference
    if reference is None:
        raise typer.BadParameter("the reference does not compute these losses; leave --compare away")
    if device.type == "cpu":
        return lambda: reference.step(built.batch)
    reference.model.to(device)
    if reference.gate is not None:
        reference.gate.to(device)
    for name in ("masks", "adversary", "routing"):
        setattr(reference, name, torch.Generator(device).manual_seed(built.config.seed))

    def on_device() -> object:
        with torch.device(device):
            return reference.step(built.batch)

    return on_device


def compare_cached(name: str, how: How, compare: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """Cached residual streams (`step_ms`) against whole passes (`reference_ms`), and both over depths."""
    built = built_on(name, how, changes)
    assert built.cached is not None
    whole = _steps(built)["whole_ms"]
    result, times = measure(built, built.cached, how, {"whole": whole} if compare else {})
    if compare:
        result["reference_ms"] = 1e3 * statistics.median(times["whole"])
        result["speedup"] = paired_ratio(times["whole"], times["product"])
        result["reference_memory_mb"] = (peak_memory(whole, how.device) + kept_workspace()) / 1e6
        result["memory_ratio"] = result["memory_mb"] / result["reference_memory_mb"]
        result["by_blocks_before"] = _over_depths(name, how, changes)
    return result


def _over_depths(name: str, how: How, changes: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Milliseconds of both with more and more blocks before the decomposed one; all depths alternate."""
    steps: dict[str, Callable[[], object]] = {}
    for before in DEPTHS:
        at_depth = {**changes, "n_layers": before + 1, "sites": (f"blocks.{before}.mlp.*",)}
        steps |= {f"{key} {before}": step for key, step in _steps(built_on(name, how, at_depth)).items()}
    times = alternate(steps, how.rounds, Clock(how.device))
    return {
        before: {key: 1e3 * statistics.median(times[f"{key} {before}"]) for key in ("cached_ms", "whole_ms")}
        for before in DEPTHS
    }


def _steps(built: Configuration) -> dict[str, Callable[[], object]]:
    product, cached = ProductStep(built.decomposition, built.config), built.cached
    assert cached is not None
    return {"cached_ms": lambda: product.step(cached), "whole_ms": lambda: product.step(built.batch)}


# -- command --------------------------------------------------------------------------------------------------------


def loss_changes(losses: list[str], pgd_steps: int, config: TrainConfig) -> dict[str, Any]:
    """Fields of `TrainConfig` for `NAME[=COEFFICIENT]`s, which replace all losses of the configuration.

    NAME is faithfulness, minimality, or MASKS_ROUTING (`stochastic_subset`, `pgd_all`, ...).
    """
    if not losses:
        return {}
    plain: dict[str, Any] = {"faithfulness": 0.0, "minimality": 0.0}
    terms = []
    for text in losses:
        name, _, value = text.partition("=")
        coefficient = float(value) if value else getattr(config, name, 1.0) or 1.0
        masks, _, routing = name.partition("_")
        if name in plain:
            plain[name] = coefficient
        elif masks in MASKS and routing in ("all", "layerwise", "subset"):
            given = PGD(steps=pgd_steps, step_size=0.1, scope="batch") if masks == "pgd" else MASKS[masks]
            terms.append(Reconstruction(coefficient, masks=given, routing=routing))  # pyright: ignore
        else:
            raise typer.BadParameter(
                f"{text!r}; expected faithfulness, minimality or {'|'.join(MASKS)}_all|layerwise|subset, with =NUMBER"
            )
    return {**plain, "reconstructions": tuple(terms)}


Size = Annotated[int | None, typer.Option()]


def main(
    config: Annotated[str, typer.Option(help=", ".join(f"{k}: {v}" for k, v in LETTERS.items()))] = "c",
    compare: Annotated[bool, typer.Option("--compare", help="measure the reference in the same run")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    rounds: Annotated[int, typer.Option(help="timed steps")] = 25,
    threads: int = 1,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 to measure autocast as well")] = "fp32",
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="measure the step as a CUDA graph as well")
    ] = False,
    loss: Annotated[
        list[str] | None, typer.Option(help="NAME[=COEFFICIENT], repeated; replaces the configuration's losses")
    ] = None,
    pgd_steps: int = 1,
    no_delta: Annotated[bool, typer.Option("--no-delta")] = False,
    n_subcomponents: Annotated[int | None, typer.Option("-C", "--n-subcomponents")] = None,
    gate: Annotated[str | None, typer.Option(help="shared, scalar or vector")] = None,
    gate_width: Size = None,
    batch: Size = None,
    pos: Size = None,
    n_layers: Size = None,
    d_model: Size = None,
    n_heads: Size = None,
    d_mlp: Size = None,
    d_vocab: Size = None,
    n_features: Size = None,
    n_hidden: Size = None,
) -> None:
    """Measure one training step."""
    given = dict(locals())
    if config not in LETTERS:
        raise typer.BadParameter(f"config {config!r}; expected one of {', '.join(LETTERS)}")
    if dtype not in DTYPES or precision not in ("fp32", "bf16"):
        raise typer.BadParameter(f"dtype {dtype!r}, precision {precision!r}; see --help")
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    name = LETTERS[config]
    _, sizes, defaults = CONFIGURATIONS[name]
    of_sizes = [f.name for f in dataclasses.fields(sizes)]
    changes = {k: v for k, v in given.items() if k in of_sizes and v is not None}
    not_its_own = [k for k in SIZE_OPTIONS if given[k] is not None and k not in of_sizes]
    if not_its_own:
        raise typer.BadParameter(f"{', '.join(not_its_own)}: not a size of configuration {config} ({name})")
    chosen = loss_changes(loss or [], pgd_steps, defaults) | ({"delta": False} if no_delta else {})
    how = How(rounds, torch.device(device), DTYPES[dtype])
    # Loading a model prints.
    with contextlib.redirect_stdout(sys.stderr):
        if name == "last_block":
            result = compare_cached(name, how, compare, changes | chosen)
        else:
            result = compare_with_reference(name, how, compare, precision == "bf16", cuda_graphs, changes | chosen)
    used = defaults.changed(**chosen)
    described = {
        "config": config,
        "name": name,
        **{key: result.pop(key) for key in HEADLINE if key in result},
        **result,
        "sizes": dataclasses.asdict(dataclasses.replace(sizes, **changes)),
        "losses": {
            n: getattr(used, n)
            for n in ("faithfulness", "minimality", "frequency")
            if n != "frequency" or used.frequency > 0
        }
        | {term.name: term.coefficient for term in used.reconstructions},
        "delta": used.delta,
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
        **provenance(how.device),
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
    }
    print(json.dumps(rounded(described)) if as_json else table(rounded(described)))


SIZE_OPTIONS = (
    "n_subcomponents", "gate", "gate_width", "batch", "pos", "n_layers", "d_model", "n_heads", "d_mlp", "d_vocab",
    "n_features", "n_hidden",
)  # fmt: skip
HEADLINE = ("speedup", "memory_ratio", "matmul_share", "step_ms", "reference_ms", "floor_share")


def table(result: dict[str, Any]) -> str:
    """For readers: one line per number, then one per term."""
    lines = [f"{key:22} {value}" for key, value in result.items() if key != "terms" and not isinstance(value, dict)]
    lines += [
        f"{key:22} {json.dumps(value)}" for key, value in result.items() if isinstance(value, dict) and key != "terms"
    ]
    columns = ("time_share", "ms", "matmul_ms", "gflop", "moved_mb")
    lines += ["", f"{'term':28}" + "".join(f"{c:>12}" for c in columns)]
    lines += [f"{term:28}" + "".join(f"{v[c]:12}" for c in columns) for term, v in result["terms"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)

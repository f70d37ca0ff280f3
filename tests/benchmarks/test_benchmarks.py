"""The benchmark programs: counted work is what really runs, their output has its keys, fits are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, many, measure, scaling, step
from benchmarks.configurations import ProductStep, build
from benchmarks.machine import Clock, rounded
from benchmarks.step import loss_changes, main
from benchmarks.work import FAITHFULNESS, Matmul, ascents, count_work, drawn_rows, expected_rows, positions
from spd_lens import TrainConfig
from spd_lens.objective import PGD
from spd_lens.training import Reconstruction
from tests.conftest import needs_hooked

ROOT = Path(__file__).parents[2]
# No two sizes are equal, so that no two terms of the formula can be mistaken for each other.
SMALL = {
    "n_layers": 2, "d_model": 12, "n_heads": 3, "d_mlp": 20, "d_vocab": 30, "batch": 3, "pos": 7, "n_subcomponents": 5,
    "gate_width": 11,
}  # fmt: skip
TERMS = {
    routing: tuple(Reconstruction(masks=m, routing=routing) for m in ("stochastic", PGD(steps=2)))
    for routing in ("all", "subset", "layerwise")
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{gate}_{routing}": ("transformer", {**SMALL, "gate": gate, "reconstructions": terms})
        for gate in ("shared", "scalar", "vector")
        for routing, terms in TERMS.items()
    },
    "no_delta": ("transformer", {**SMALL, "delta": False, "faithfulness": 0.0}),
    "later_blocks": ("transformer", {**SMALL, "n_layers": 3, "sites": ("blocks.2.mlp.*", "blocks.1.attn.W_O")}),
    # Configuration f has no reference, which knows neither the unembedding nor static routing.
    "unembedding": ("last_block", {**SMALL, "sites": ("unembed.W_U",)}),
    "static": ("last_block", {**SMALL, "sites": ("blocks.1.*",), "reconstructions": (Reconstruction(routing=0.4),)}),
    "whole_and_cached": ("last_block", {**SMALL, "n_layers": 3, "sites": ("blocks.2.mlp.*",)}),
    "recipe": (
        "recipe",
        {**{k: v for k, v in SMALL.items() if k != "n_subcomponents"}, "gate_width": 8, "gate_heads": 2, "batch": 4},
    ),
    "tms": ("tms_5_2", {"batch": 64}),
    "tms_identity": ("tms_5_2", {"batch": 64, "n_hidden": 3, "identity": True, "faithfulness": 1.0}),
}


@pytest.mark.parametrize(
    "case", [c if name.startswith("tms") else pytest.param(c, marks=needs_hooked) for c, (name, _) in CASES.items()]
)
def test_the_formula_for_performed_products_is_what_torch_counts(case: str) -> None:
    name, changes = CASES[case]
    built = build(name, **changes)
    for batch in (built.batch, built.cached):
        if batch is None:
            continue
        # The first step also tries where passes may start.
        ProductStep(built.decomposition, built.config).step(batch)
        product = ProductStep(built.decomposition, built.config)
        rows = drawn_rows(product, batch)
        with FlopCounterMode(display=False) as counter:
            product.step(batch)
        performed = count_work(built.decomposition, built.config, batch, rows=rows, performed=True)
        assert performed.flops() == counter.get_total_flops()
        necessary = count_work(built.decomposition, built.config, batch, rows=rows)
        assert 0.3 * performed.flops() < necessary.flops() <= performed.flops()


def test_necessary_products_of_a_step_by_hand() -> None:
    built = build("tms_5_2", batch=10, n_subcomponents=3, gate_width=4, faithfulness=1.0)
    work = count_work(built.decomposition, built.config, built.batch)
    n, f, h, C = 10, 5, 2, 3
    clean = n * f * h + n * h * f
    gates = 2 * (n * f * C + n * h * C)
    # Encoder masked: C to hidden, and back to U and coefficients; its `x @ V` is the gate's.
    encoder = 3 * n * C * h
    # Frozen decoder after a masked encoder, forward and back.
    after = 2 * n * h * f
    everywhere = encoder + after + (3 * n * h * C + 3 * n * C * f)
    layerwise = (encoder + after) + 3 * n * C * f
    assert {term: flops // 2 for term in work.matmuls if (flops := work.flops(term))} == {
        "clean pass": clean,
        "gates": gates,
        "stochastic_all": everywhere,
        "stochastic_layerwise": layerwise,
        FAITHFULNESS: 3 * f * C * h,
    }
    assert work.drawn == 2 * 2 * n * (C + 1)
    assert work.gelus == work.gelu_derivatives == 2 * n * C * 4


def test_masked_rows_do_not_need_the_frozen_matrix_without_the_delta() -> None:
    flops = {
        delta: count_work(b.decomposition, b.config, b.batch).flops("stochastic_all")
        for delta in (True, False)
        for b in [build("tms_5_2", batch=10, n_subcomponents=3, delta=delta)]
    }
    # The decoder's `x @ W` and its backward product.
    assert flops[True] - flops[False] == 2 * (2 * 10 * 2 * 5)


def test_expected_rows_are_the_mean_of_drawn_ones() -> None:
    sites = [f"site_{i}" for i in range(6)]
    assert expected_rows(sites, "subset", 60) == [dict.fromkeys(sites, 60 * 7 / 12)]
    assert expected_rows(sites, "all", 60) == [dict.fromkeys(sites, 60.0)]
    assert len(expected_rows(sites, "layerwise", 60)) == 6


def test_work_without_a_formula_is_refused() -> None:
    built = build("tms_5_2", batch=4)
    gate: Any = built.decomposition["W_dec"].gate
    gate.kind = "attention"
    with pytest.raises(ValueError, match="no formula for the gate of W_dec; there is one for shared, scalar"):
        count_work(built.decomposition, built.config, built.batch)


def test_times_of_terms_cover_the_step() -> None:
    built = build("tms_5_2", batch=32, reconstructions=TERMS["subset"], faithfulness=1.0)
    product = ProductStep(built.decomposition, built.config)
    clock = Clock(torch.device("cpu"))
    terms = measure.time_by_term(product, built.batch, 3, clock)
    pgd, stochastic = "pgd_subset", "stochastic_subset"
    assert set(terms) == {"clean pass", "gates", stochastic, pgd, ascents(pgd), FAITHFULNESS, "optimizer"}
    assert all(seconds > 0 for seconds in terms.values())
    # The marks are gone, and a step takes what its terms take.
    times = [clock.time(lambda: product.step(built.batch)) for _ in range(9)]
    assert min(times) < 2 * sum(terms.values())
    assert sum(terms.values()) < 3 * max(times)


def test_peak_memory_is_what_a_step_allocates() -> None:
    def run() -> None:
        kept = [torch.empty(2**18) for _ in range(3)]
        del kept[0]
        torch.empty(2**17)

    assert measure.peak_memory(run, torch.device("cpu")) == 3 * 2**20


def run_step(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    main(compare=True, as_json=True, rounds=2, **options)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BUDGET", 0.0), ("LEAST", 1), ("COPIED", 2**10)):
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(step, "DEPTHS", (1, 2))


PROMISED = {
    "config", "name", "speedup", "memory_ratio", "matmul_share", "step_ms", "reference_ms", "floor_share", "floor_ms",
    "positions_per_second", "memory_mb", "reference_memory_mb", "matmul_gflop", "performed_gflop", "rates", "terms",
    "sizes", "losses", "delta", "rounds", "device", "dtype", "machine", "threads", "versions", "date", "command",
}  # fmt: skip


@pytest.mark.usefixtures("_quick")
def test_step_prints_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_step(capsys, config="a", batch=32, loss=["minimality=0.5", "stochastic_all", "faithfulness"])
    assert set(found) == PROMISED
    assert found["losses"] == {"faithfulness": 1.0, "minimality": 0.5, "stochastic_all": 1.0}
    assert found["sizes"]["batch"] == 32
    assert found["step_ms"] > 0
    assert found["speedup"] > 0


@needs_hooked
@pytest.mark.usefixtures("_quick")
def test_step_prints_what_it_promises_of_cached_streams_and_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_step(capsys, config="c", precision="bf16", **SMALL)
    assert set(found) == PROMISED | {"bf16_ms", "bf16_memory_mb", "bf16_over_fp32", "bf16_speedup"}
    small = {key: value for key, value in SMALL.items() if key != "n_layers"}
    found = run_step(capsys, config="f", dtype="float64", **small)
    assert set(found) == PROMISED | {"by_blocks_before"}
    assert set(found["by_blocks_before"]["2"]) == {"cached_ms", "whole_ms"}


@pytest.mark.slow  # a process that imports torch
def test_step_runs_as_a_script_from_the_root() -> None:
    command = [sys.executable, "benchmarks/step.py", "--config", "a", "--json", "--batch", "16", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["command"].startswith("python benchmarks/step.py --config a")


def test_step_refuses_what_it_does_not_know() -> None:
    with pytest.raises(typer.BadParameter, match="'x'; expected one of a, b, c, d, e, f"):
        main(config="x")
    with pytest.raises(typer.BadParameter, match="d_model: not a size of configuration a"):
        main(config="a", d_model=8)
    with pytest.raises(typer.BadParameter, match="'noise'; expected faithfulness, minimality or"):
        loss_changes(["noise"], 1, TrainConfig())


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_fitted_exponents_are_those_of_power_laws(exponent: float) -> None:
    sizes = [1, 2, 4, 8]
    assert scaling.fit_exponent(sizes, [3 * s**exponent for s in sizes]) == pytest.approx(exponent)


def test_sizes_whose_steps_are_mostly_calls_do_not_count() -> None:
    # 10 ms of calls and 2 ms per unit of size.
    points = [scaling.Point(n, 10 + 2.0 * n, 10, 5.0 * n, n**1.0) for n in (1, 4, 16, 64, 256, 1024)]
    assert [p.size for p in points if p.counts] == [64, 256, 1024]
    fitted = scaling.exponents(points)
    assert 0.9 < fitted["time"] <= 1
    assert fitted["memory"] == pytest.approx(1)


def test_the_table_and_picture_of_sweeps_are_made(tmp_path: Path) -> None:
    results = {s.name: [scaling.Point(n, 50.0 * n, 1, n, n) for n in s.sizes] for s in scaling.SWEEPS}
    assert scaling.table(results).count("time 1.00, memory 1.00, work 1.00") == len(scaling.SWEEPS)
    scaling.draw(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_many_measures_each_number_of_members() -> None:
    found = many.measure("tms_5_2", rounds=1, steps=2, batch=8, member_counts=(1, 2))
    assert set(found["ms_per_member"]) == {1, 2}
    assert found["single_ms"] > 0


def test_numbers_are_printed_with_four_digits() -> None:
    assert rounded({"a": [1.23456, 7], "b": "x"}) == {"a": [1.235, 7], "b": "x"}
    assert Matmul(2, 3, 4, batch=5).flops == 240
    assert positions(build("tms_5_2", batch=6).batch) == 6

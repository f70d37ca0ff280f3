r"""Specialists: small models of one source of text, by ten methods at equal parameters.

    python experiments/specialists.py --json                    # the tiny language model, both sources; prints JSON
    python experiments/specialists.py --cases speeches --shares 0.5 --methods "whitened SVD" --distil 0 --out PART
    python experiments/specialists.py --model smollm2 --decomposition RUN/decomposition --device cuda --out PART
    python experiments/specialists.py --model smollm2 --decomposition RUN/decomposition --cases speeches --distil 0 \
        --shares 0.5 0.25 --rows 32 --held-out 12 --measured-on 8 --timed-rows 1 --repeats 3 --out PART   # on a CPU
    python experiments/specialists.py --collect PARTS           # one file a case of what processes have written there
    python experiments/specialists.py --figure                  # the picture of the results that are committed

The decomposed matrices of the model's blocks are left the shares SHARES of their numbers; all else stays. Of the tiny
language model these are 12, 42 % of its parameters, of SmolLM2 the matrices of one block. Every method sees the same
rows (64) of 127 tokens of the domain (`speeches`: State of the Union addresses; `book`: Moby Dick). Low-rank methods
share out the room equally and by effect and take what has the lower loss on the first of them (16); "subcomponents,
whitened" chooses so, too, how many subcomponents choose (`chosen_from`). `loss_in` and `loss_out` are cross-entropies
on held-out rows (32) of the domain and of the other source; `distilled`: after so many steps of distillation from the
whole model on the domain's rows, the same for all methods.

`parameters` of magnitude and Wanda are without the entries that they set to 0; their matrices stay as they are, so
`bytes`, `flops` and times do, too. `milliseconds` is the shortest of 20 passes over 8 rows (`timed_on`) on one thread,
`cpu_milliseconds` its processor time, which other programs disturb less, `cpu_milliseconds_whole` that of the whole
model at the same time. A file that is there is gone on with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lens import Decomposition, pack_tokens
from spd_lens.baselines import SMALL_METHODS, SmallModel, small_model
from spd_lens.models import load_moby_dick, load_smollm2, load_speeches, load_tiny_lm
from spd_lens.specialists import (
    MEASURED_ON,
    Domain,
    checked_plain,
    costs_of,
    distil,
    domain_of,
    matrix_budget,
    mean_loss,
)
from spd_lens.support import format_table, write_json

RESULTS = Path(__file__).parent / "results" / "specialists"
CASES = ("speeches", "book")
SHARES = (0.75, 0.5, 0.25)


def texts(decomposition: Decomposition, n_rows: int, n_held_out: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each source rows to specialise on, and held-out rows, both spread over all of it."""
    tokenizer, device = decomposition.host.tokenizer(), decomposition.device
    found = {}
    for name, load in (("speeches", lambda split: list(load_speeches(split).values())),
                       ("book", lambda split: [load_moby_dick(split)])):  # fmt: skip
        rows = [pack_tokens(load(split), tokenizer, context=128) for split in ("train", "held_out")]
        found[name] = tuple(r[:: len(r) // n][:n].to(device) for r, n in zip(rows, (n_rows, n_held_out), strict=True))
    return found


def run_case(case: str, decomposition: Decomposition, args: argparse.Namespace, path: Path | None) -> dict[str, Any]:
    """One domain: every method at every share, written after each row."""
    sources = texts(decomposition, args.rows, args.held_out)
    inside, outside = sources[case][1], sources[next(other for other in CASES if other != case)][1]
    name = case if args.model == "tiny_lm" else f"{args.model}, {blocks_of(decomposition)}, {case}"
    result: dict[str, Any] = {"case": name, "rows": []}
    if path is not None and path.exists():
        result = json.loads(path.read_text())
    domain = domain_of(decomposition, sources[case][0], seed=args.seed)
    whole = checked_plain(decomposition, domain)
    total = sum(decomposition[s].target_weight.numel() for s in domain.sites)
    fixed = sum(p.numel() for p in whole.parameters()) - total

    def row(made: SmallModel, **more: Any) -> dict[str, Any]:
        timed = inside[: args.timed_rows]
        costs = asdict(costs_of(made.model, timed, repeats=args.repeats)) | {"parameters": made.parameters}
        now = costs_of(whole, timed, repeats=args.repeats).cpu_milliseconds
        losses = {"loss_in": mean_loss(made.model, inside), "loss_out": mean_loss(made.model, outside)}
        chosen = {"chosen_from": made.chosen_from}
        return {"case": name, "method": made.method, **more, **chosen, **costs, "cpu_milliseconds_whole": now, **losses}

    def note(made: dict[str, Any]) -> None:
        result["rows"].append(made)
        versions = {n: importlib.metadata.version(n) for n in ("torch", "transformer_lens")}
        command = " ".join(["python", "experiments/specialists.py", *sys.argv[1:]])
        machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
        result.update(seed=args.seed, versions=versions, command=command, domain_rows=args.rows,
                      held_out_rows=args.held_out, measured_on=args.measured_on, machine=machine)  # fmt: skip
        if path is not None:
            write_json(path, result)

    done = {(r["method"], r["share"], r["distilled"]) for r in result["rows"]}
    if ("whole", 1.0, 0) not in done:
        note(row(SmallModel("whole", whole), share=1.0, distilled=0))
    for share in args.shares:
        room = matrix_budget(decomposition, domain, whole, fixed + int(share * total), None)
        for method in args.methods:
            steps = args.distil
            if {(method, share, 0), (method, share, steps)} <= done:
                continue
            started = time.process_time()
            made = small_model(decomposition, domain, room, method, seed=args.seed, measured_on=args.measured_on)
            if (method, share, 0) not in done:
                note(row(made, share=share, distilled=0))
            if steps:
                note(row(distilled(made, decomposition, domain, steps, args.seed), share=share, distilled=steps))
            print(f"{case} {share} {method} {time.process_time() - started:.0f} CPU-s", file=sys.stderr, flush=True)
    return result


def blocks_of(decomposition: Decomposition) -> str:
    """The blocks that are decomposed, as part of a name."""
    return "block " + "-".join(map(str, sorted({int(site.split(".")[1]) for site in decomposition})))


def distilled(made: SmallModel, decomposition: Decomposition, domain: Domain, steps: int, seed: int) -> SmallModel:
    """The model after a short distillation."""
    distil(made.model, decomposition.host.forward, domain.rows, steps=steps, seed=seed, keep_zeros=made.zeroed > 0)
    return made


# -- output ------------------------------------------------------------------------------------------------------------


def collected(folder: Path) -> list[dict[str, Any]]:
    """One result a case of all files in a folder, rows by share, method and distillation."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    found = []
    for case in dict.fromkeys(part["case"] for part in parts):
        own = [part for part in parts if part["case"] == case]
        rows = {(-r["share"], order_of(r["method"]), r["distilled"]): r for part in own for r in part["rows"]}
        rest = {k: v for k, v in own[0].items() if k not in ("case", "rows", "command")}
        commands = sorted({part["command"] for part in own})
        found.append({"case": case, "rows": [rows[key] for key in sorted(rows)], **rest, "commands": commands})
    return found


def order_of(method: str) -> int:
    """The place of a method's line."""
    return ("whole", *SMALL_METHODS).index(method)


_HEADER = (
    "case",
    "share",
    "method",
    "distilled",
    "of",
    "parameters",
    "MB",
    "MFLOP",
    "CPU ms (whole)",
    "loss in",
    "out",
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """All rows."""
    rows = []
    for r in (row for result in results for row in result["rows"]):
        costs = (f"{r['parameters']:,}", f"{r['bytes'] / 1e6:.2f}", f"{r['flops'] / 1e6:,.0f}")
        time_taken = f"{r['cpu_milliseconds']:.1f} ({r['cpu_milliseconds_whole']:.1f})"
        chosen = "" if r.get("chosen_from") is None else f"{r['chosen_from']:.0%}"
        first = (r["case"], f"{r['share']:.2f}", r["method"], str(r["distilled"] or ""), chosen)
        rows.append((*first, *costs, time_taken, f"{r['loss_in']:.3f}", f"{r['loss_out']:.3f}"))
    return format_table(_HEADER, rows)


# Told apart by the colour-blind (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#56B4E9", "#000000", "#BBBBBB", "#777777", "#E69F00", "#D55E00", "#F0E442", "#009E73", "#CC79A7")


def figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss in and out of the domain against parameters, one colour and mark a method; dashed after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(results), 2, figsize=(10.5, 3.6 * len(results)), squeeze=False, layout="constrained")
    for line, result in zip(axes, results, strict=True):
        whole = next(r for r in result["rows"] if r["method"] == "whole")
        for axis, which, where in zip(line, ("in", "out"), ("inside", "outside"), strict=True):
            for k, method in enumerate(SMALL_METHODS):
                for after, style in ((False, "-"), (True, "--")):
                    rows = [r for r in result["rows"] if r["method"] == method and bool(r["distilled"]) == after]
                    rows = sorted(rows, key=lambda r: r["parameters"])
                    x, y = [r["parameters"] / 1e3 for r in rows], [r[f"loss_{which}"] for r in rows]
                    label = method + (", distilled" if after else "")
                    if rows:
                        axis.plot(x, y, style, color=COLOURS[k], marker="os*.xDvP<>"[k], label=label, markersize=4.5)
            axis.axhline(whole[f"loss_{which}"], color="0.5", lw=0.8)
            axis.set(title=f"specialist of {result['case']}: loss {where}", ylim=(3.2, 6.6),
                     xlabel="parameters (thousands)", ylabel="nats per token")  # fmt: skip
            axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center", fontsize=8)
    fig.savefig(path, dpi=130)


def committed() -> list[dict[str, Any]]:
    """The results in the repository."""
    paths = [RESULTS / f"{file_name(case)}.json" for case in CASES]
    others = sorted(RESULTS.glob("smollm2*.json"))
    return [json.loads(path.read_text()) for path in [*paths, *others] if path.exists()]


def file_name(case: str) -> str:
    """What the file of a case is called."""
    return f"tiny_lm_{case}" if case in CASES else case.replace(", ", "_").replace(" ", "_")


def main() -> None:
    """Run cases, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--methods", nargs="*", default=list(SMALL_METHODS), choices=SMALL_METHODS)
    parser.add_argument("--model", default="tiny_lm", choices=("tiny_lm", "smollm2"))
    parser.add_argument("--decomposition", type=Path, help="of SmolLM2: a saved one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where SmolLM2 runs")
    parser.add_argument("--host", default="hooked", choices=("hooked", "bridge"), help="what SmolLM2 was decomposed in")
    parser.add_argument("--distil", type=int, default=100, help="steps of distillation; 0: none")
    parser.add_argument("--rows", type=int, default=64, help="of the domain, of 127 tokens")
    parser.add_argument("--held-out", type=int, default=32, help="rows of each source that losses are measured on")
    parser.add_argument("--measured-on", type=int, default=MEASURED_ON, help="rows that choices are measured on")
    parser.add_argument("--timed-rows", type=int, default=8, help="rows of a pass that is timed")
    parser.add_argument("--repeats", type=int, default=20, help="passes, of which the shortest counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    parser.add_argument("--out", type=Path, help="a folder for one JSON file a case; rows that are there are kept")
    parser.add_argument("--collect", type=Path, help="put what processes wrote below a folder into the results")
    parser.add_argument("--figure", action="store_true", help="only draw the committed results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.collect is not None:
        for result in (results := collected(args.collect)):
            write_json(RESULTS / f"{file_name(result['case'])}.json", result)
        print(table(results))
        return
    if args.figure:
        figure([r for r in committed() if r["case"] in CASES], RESULTS / "specialists.png")
        print(table(committed()))
        return
    if args.model == "tiny_lm":
        decomposition = load_tiny_lm(decomposed=True)
    else:
        if args.decomposition is None:
            parser.error("--model smollm2 needs --decomposition, a saved decomposition of some of its blocks")
        model: Any = load_smollm2(args.device, host=args.host)
        decomposition = Decomposition.from_pretrained(args.decomposition, model)
    results = []
    for case in args.cases:
        path = None if args.out is None else args.out / f"{case}.json"
        results.append(run_case(case, decomposition, args, path))
    print(json.dumps([r for result in results for r in result["rows"]], indent=1) if args.json else table(results))


if __name__ == "__main__":
    main()

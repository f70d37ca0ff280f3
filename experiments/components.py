"""Components: right answers on toys, separation and joining over alpha, cost, and the tiny language model.

    python experiments/components.py --json                 all but the language model, and 10,000 subcomponents
    python experiments/components.py toys                   trained toys of `reproduce.py`, run 0
    python experiments/components.py sweep                  mechanisms over two sites, alpha from .01 to 100
    python experiments/components.py scale --alive 50000    seconds and peak memory of one grouping
    python experiments/components.py tiny_lm                the shipped decomposition of the tiny language model

**toys**: per toy how many mechanisms are one group each with nothing foreign in it, for co-activation (threshold .1),
its Leiden communities, and causal evidence. A member is what fires on one-hot inputs (0.75); what fires rarely and on
no feature alone is counted as `other`.

**sweep**: `experiments/relay.py`, whose readers and writers fire at different rates, and TMS 40-10, whose encoder and
decoder fire together. `joined`: the share of mechanisms whose members are in one group; `separate`: the share in whose
groups nothing foreign is; `apart`: the same over pairs of subcomponents of different mechanisms, which a few large
groups hardly lower; `exact`: both at once. Evidence is co-activation with all pairs (as published), co-activation with
pairs that are ever active together (the default here), and ablation effects; each also with Leiden, whose resolution
then stands in `alpha`.

**scale**: planted mechanisms of 1 to 8 subcomponents, each firing .5 to 1 of the times its mechanism does, rates
falling as `rank^-.8`. Every size runs in a process of its own; `peak_mb` is its peak resident memory, `imports_mb` what
it has before, `with_data_mb` the peak of making the data.

**tiny_lm**: co-activation on the held-out chapters of Moby Dick, of what fires in at least 20 of the events; the groups
of description length over alpha, of Leiden, with a window of two positions, and of an ensemble with its shuffled null.

Results are written to `experiments/results/components`, a JSON for each part and the pictures.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.paper import EXPERIMENTS
from experiments.relay import READ, WRITE, Relay, RelayFeatures, known_decomposition
from experiments.reproduce import read_run
from spd_lens import Decomposition, pack_tokens
from spd_lens.components import Components, Merging, coeffects, ensemble, leiden, merge_subcomponents
from spd_lens.models import load_tiny_lm
from spd_lens.statistics import CoActivation, coactivation
from spd_lens.support import library_versions, write_json
from spd_lens.toys import ONE_HOT_ALIVE, load_moby_dick, one_hot_inputs

RESULTS = Path("experiments/results/components")
ALPHAS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
TOYS = ("tms_5-2", "tms_5-2_id", "tms_40-10", "tms_40-10_id", "resid_mlp_1")
MIN_EVENTS = 20
PICTURED = ("tms_40-10_id", "resid_mlp_1")
EFFECT = 0.05  # of outputs of about 1
Member = tuple[str, int]
Groups = Sequence[Sequence[Member]]


# -- what a grouping achieves ----------------------------------------------------------------------------------------


def achieved(groups: Groups, mechanism: Mapping[Member, int]) -> dict[str, float]:
    """Joined, separate, apart and exact, as in the module's words; groups' other members are left out."""
    label = {member: i for i, group in enumerate(groups) for member in group}
    n = len(groups)
    for member in mechanism:  # what never had an event is alone
        n += member not in label
        label.setdefault(member, n)
    own: dict[int, set[int]] = {}
    inside: dict[int, set[int]] = {}
    for member, m in mechanism.items():
        own.setdefault(m, set()).add(label[member])
        inside.setdefault(label[member], set()).add(m)
    joined = {m: len(labels) == 1 for m, labels in own.items()}
    separate = {m: all(inside[i] == {m} for i in labels) for m, labels in own.items()}
    members = list(mechanism)
    labels, mechanisms = np.array([label[m] for m in members]), np.array([mechanism[m] for m in members])
    foreign = mechanisms[:, None] != mechanisms[None, :]
    apart = (labels[:, None] != labels[None, :])[foreign].mean()
    return {
        "joined": float(np.mean(list(joined.values()))),
        "separate": float(np.mean(list(separate.values()))),
        "apart": float(apart),
        "exact": float(np.mean([joined[m] and separate[m] for m in own])),
        "groups": len(groups),
    }


def toy_mechanisms(name: str, decomposition: Decomposition, n_features: int) -> dict[Member, int]:
    """The mechanism of every subcomponent that is on for a one-hot input: its feature, or -1 for the dense one."""
    found: dict[Member, int] = {}
    for site, g in decomposition.importance(one_hot_inputs(n_features)).items():
        dense = site == "W_id" or site.endswith("W_out")
        on = (g > ONE_HOT_ALIVE).numpy()
        if dense:
            rank = min(decomposition[site].target_weight.shape)
            chosen = np.argsort(-g.mean(0).numpy(), kind="stable")[:rank]
            found |= {(site, int(c)): -1 for c in chosen if on[:, c].any()}
        else:
            strongest = g.argmax(0).tolist()
            found |= {(site, int(c)): strongest[c] for c in np.flatnonzero(on.any(0))}
    return found


def run_toys() -> dict[str, Any]:
    rows = []
    for name in TOYS:
        experiment = EXPERIMENTS[name]
        decomposition = read_run(experiment, Path("experiments/results") / name, 0)
        data = experiment.features(123)
        batches = [data.batch(i) for i in range(32)]
        mechanism = toy_mechanisms(name, decomposition, data.n_features)
        together = coactivation(decomposition, batches, threshold=ONE_HOT_ALIVE)
        effects = coeffects(decomposition, batches[:4], threshold=EFFECT)
        merging = merge_subcomponents(together)
        found = {
            "description length": merging.groups,
            "leiden": leiden(together).groups,
            "description length of effects": merge_subcomponents(effects).groups,
        }
        for method, groups in found.items():
            sizes = sorted((len(g) for g in groups), reverse=True)
            other = sum(1 for group in groups for member in group if member not in mechanism)
            figures = achieved(groups, mechanism)
            rows.append({"toy": name, "method": method, "mechanisms": len(set(mechanism.values())), **figures,
                         "largest": sizes[:3], "other": other})  # fmt: skip
        if name in PICTURED:
            save_pictures(name, together, merging)
    return {"rows": rows, "alpha": 3.0, "threshold": ONE_HOT_ALIVE, "effect_threshold": EFFECT}


def run_sweep() -> dict[str, Any]:
    rows = []
    for name, evidence, mechanism in _sweep_cases():
        for kind, (together, pairs) in evidence.items():
            for alpha in ALPHAS:
                merging = merge_subcomponents(together, alpha=alpha, pairs=pairs)
                rows.append({"toy": name, "evidence": kind, "alpha": alpha, **achieved(merging.groups, mechanism)})
            if pairs == "together":
                for resolution in (0.03, 0.1, 0.3, 0.5):
                    groups = leiden(together, resolution=resolution).groups
                    rows.append({"toy": name, "evidence": f"{kind}, leiden", "alpha": resolution,
                                 **achieved(groups, mechanism)})  # fmt: skip
    return {"rows": rows, "effect_threshold": EFFECT}


def _sweep_cases() -> Any:
    n = 40
    mechanism = {(site, f): f for site in (READ, WRITE) for f in range(n)}
    for name, outputs, threshold in (
        ("relay, writers fire 20 %", n, 0.8),
        ("relay, writers fire 5 %", n, 0.95),
        ("relay, writers fire 5 %, outputs shared", n // 2, 0.95),
    ):
        decomposition = known_decomposition(Relay(n, outputs, threshold))
        batches = list(RelayFeatures(n).batches(32))
        yield name, _evidence(decomposition, batches, 0.01), mechanism
    experiment = EXPERIMENTS["tms_40-10"]
    decomposition = read_run(experiment, Path("experiments/results/tms_40-10"), 0)
    data = experiment.features(123)
    batches = [data.batch(i) for i in range(32)]
    yield "tms_40-10", _evidence(decomposition, batches, ONE_HOT_ALIVE), toy_mechanisms("tms_40-10", decomposition, 40)


def _evidence(decomposition: Decomposition, batches: list[torch.Tensor], threshold: float) -> dict[str, Any]:
    together = coactivation(decomposition, batches, threshold=threshold)
    effects = coeffects(decomposition, batches[:16], threshold=EFFECT, max_batches=None, max_events=1 << 21)
    return {
        "co-activation, all pairs": (together, "all"),
        "co-activation": (together, "together"),
        "effects": (effects, "together"),
    }


# -- cost ------------------------------------------------------------------------------------------------------------


def planted(n_alive: int, n_events: int, per_event: float, seed: int) -> CoActivation:
    """Mechanisms as in the module's words, about `per_event` subcomponents firing in each event."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, n_alive)
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), n_alive)) + 1]
    rates = np.arange(1, len(sizes) + 1) ** -0.8
    rates = np.minimum(rates * per_event / (rates.sum() * 4.5 * 0.75), 0.5)
    rng.shuffle(rates)
    mechanism = np.repeat(np.arange(len(sizes)), sizes)[:n_alive]
    share = rng.uniform(0.5, 1.0, n_alive)
    parts = None
    at_once = min(1024, max(256, 1024 * 10_000 // n_alive))  # what is drawn at once must not be the peak of the memory
    for first in range(0, n_events, at_once):
        active = rng.random((min(at_once, n_events - first), len(sizes))) < rates
        fires = active[:, mechanism] & (rng.random((len(active), n_alive)) < share)
        part = CoActivation.of({"planted": fires}, max_events=n_events, generator=rng)
        parts = part if parts is None else parts + part
    assert parts is not None
    return parts


def measure(n_alive: int, n_events: int, per_event: float, beyond: int | None) -> dict[str, Any]:
    """One grouping: seconds, memory, and what it found. Runs in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    together = planted(n_alive, n_events, per_event, seed=0)
    data = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start, cpu = time.perf_counter(), time.process_time()
    merging = merge_subcomponents(together, beyond=beyond)
    return {
        "alive": int((together.counts > 0).sum()),
        "events": together.n_events,
        "firings_per_event": round(len(together.ids) / together.n_events, 1),
        "merges": len(merging.merges),
        "groups": len(merging.groups),
        "beyond": beyond,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "imports_mb": round(before),
        "with_data_mb": round(data),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "sample_mb": round(together.bytes / 1e6, 1),
        "bits": [round(float(merging.description_lengths[0]), 2), round(float(merging.description_lengths.min()), 2)],
    }


def run_scale(alive: Sequence[int]) -> dict[str, Any]:
    rows = []
    for n in alive:
        for beyond in ("0", "none") if n <= 10_000 else ("0",):
            command = [sys.executable, __file__, "measure", "--alive", str(n), "--beyond", beyond]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
    return {"rows": rows}


# -- a language model -------------------------------------------------------------------------------------------------


def run_tiny_lm(n_rows: int, runs: int, max_share: float) -> dict[str, Any]:
    decomposition = load_tiny_lm(decomposed=True)
    rows = pack_tokens([load_moby_dick("held_out")], decomposition.model.tokenizer, context=128)[:n_rows]
    batches = [rows[i : i + 16] for i in range(0, len(rows), 16)]
    cases = ((1.0, 1), (3.0, 1), (10.0, 1), (3.0, 2)) if max_share == 1 else ((3.0, 1),)
    windows = {window for _, window in cases}
    sets = {window: coactivation(decomposition, batches, max_batches=None, window=window) for window in windows}
    frequent = {window: together.between(MIN_EVENTS, max_share) for window, together in sets.items()}
    together = frequent[1]
    found = []
    for alpha, window in cases:
        merging = merge_subcomponents(frequent[window], alpha=alpha, beyond=None if (alpha, window) == (3.0, 1) else 0)
        if (alpha, window) == (3.0, 1):
            save_pictures("tiny_lm" if max_share == 1 else f"tiny_lm_below_{max_share:g}", together, merging)
        figures = {"bits": [float(merging.description_lengths[0]), float(merging.description_lengths.min())]}
        found.append({"method": "description length", "alpha": alpha, "window": window, **figures,
                      **shape(merging.groups)})  # fmt: skip
    for resolution in (0.1, 0.3):
        groups = leiden(together, resolution=resolution).groups
        found.append({"method": "leiden", "alpha": resolution, "window": 1, **shape(groups)})
    consensus = ensemble(together, runs=runs)
    components = Components.of(decomposition, consensus)
    several = [i for i, unit in enumerate(components) if len(unit.members) > 1]
    stability = [components.found[i].stability for i in several]
    data = {
        **asdict(together.counted_in()),
        "min_events": MIN_EVENTS,
        "max_share": max_share,
        "firings_per_event": len(together.ids) / together.n_events,
        "ever_fire": int((sets[1].counts > 0).sum()),
        "frequent": int((together.counts > 0).sum()),
        "of": together.n_subcomponents,
    }
    return {
        "data": data,
        "rows": found,
        "ensemble": {"runs": runs, "agreement": consensus.agreement, "null_agreement": consensus.null_agreement,
                     "saved": consensus.saved, "null_saved": consensus.null_saved, **shape(consensus.groups),
                     "stability_of_several": float(np.mean([s for s in stability if s is not None])) if stability
                     else None},
        "examples": examples(decomposition, rows[:64], components, several),
    }  # fmt: skip


def shape(groups: Groups) -> dict[str, Any]:
    """How large groups are, and over how many sites and blocks."""
    several = [group for group in groups if len(group) > 1]
    sites = [len({site for site, _ in group}) for group in several]
    blocks = [len({site.split(".")[1] for site, _ in group}) for group in several]
    return {
        "groups": len(groups),
        "of_several": len(several),
        "largest": [len(group) for group in groups[:5]],
        "over_sites": sum(n > 1 for n in sites),
        "over_blocks": sum(n > 1 for n in blocks),
    }


def examples(decomposition: Decomposition, rows: torch.Tensor, components: Components, several: list[int]) -> Any:
    """The tokens at which the most stable groups of three or more fire, most frequent first."""
    tokens = [decomposition.model.tokenizer.decode([t]) for t in range(2048)]
    g = decomposition.importance(rows)
    stable = sorted(several, key=lambda i: (-(components.found[i].stability or 0), -len(components[i].members)))
    shown = []
    for i in [i for i in stable if len(components[i].members) > 2][:12]:
        unit = components[i]
        fires = torch.stack([g[site][..., c] > 0.01 for site, c in unit.members]).any(0)
        at, counts = rows[fires].unique(return_counts=True)
        top = [
            f"{tokens[t]!r} {n}" for n, t in sorted(zip(counts.tolist(), at.tolist(), strict=True), reverse=True)[:6]
        ]
        found = components.found[i]
        row = {"name": unit.name, "members": len(unit.members), "sites": len(unit.sites)}
        shown.append({**row, "rate": found.rate, "stability": found.stability, "tokens": top})
    return shown


# -- pictures, program -----------------------------------------------------------------------------------------------


def save_pictures(name: str, together: CoActivation, merging: Merging) -> None:
    """The three pictures of a grouping."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from spd_lens.pictures import coactivation_figure, dendrogram_figure, description_length_figure

    RESULTS.mkdir(parents=True, exist_ok=True)
    for kind, figure in (
        ("bits", description_length_figure(merging)),
        ("matrix", coactivation_figure(together, merging.groups)),
        ("tree", dendrogram_figure(merging)),
    ):
        figure.savefig(RESULTS / f"{name}_{kind}.png", dpi=100)
        plt.close(figure)


def main() -> None:
    """Run the parts that were asked for and print their JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "part", nargs="?", default="all", choices=("all", "toys", "sweep", "scale", "tiny_lm", "measure")
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object (also the default)")
    parser.add_argument("--alive", type=int, nargs="+", default=[10_000], help="scale: numbers of subcomponents")
    parser.add_argument("--events", type=int, default=65_536, help="scale: events")
    parser.add_argument("--per-event", type=float, default=100.0, help="scale: subcomponents that fire in an event")
    parser.add_argument("--beyond", default="0", help="scale: merges after the minimum, or none for all of them")
    parser.add_argument("--rows", type=int, default=329, help="tiny_lm: rows of 128 tokens")
    parser.add_argument(
        "--max-share", type=float, default=1.0, help="tiny_lm: without what fires in more of the events"
    )
    parser.add_argument("--runs", type=int, default=4, help="tiny_lm: runs of the ensemble")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "measure":
        beyond = None if args.beyond == "none" else int(args.beyond)
        print(json.dumps(measure(args.alive[0], args.events, args.per_event, beyond)))
        return
    parts = {
        "toys": run_toys,
        "sweep": run_sweep,
        "scale": lambda: run_scale(args.alive),
        "tiny_lm": lambda: run_tiny_lm(args.rows, args.runs, args.max_share),
    }
    chosen = ["toys", "sweep", "scale"] if args.part == "all" else [args.part]
    whole = {}
    for part in chosen:
        result = parts[part]()
        result["versions"] = library_versions()
        result["command"] = " ".join(["python", "experiments/components.py", *sys.argv[1:]])
        name = part if part != "tiny_lm" or args.max_share == 1 else f"{part}_below_{args.max_share:g}"
        write_json(RESULTS / f"{name}.json", result)
        whole[part] = result
    print(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()

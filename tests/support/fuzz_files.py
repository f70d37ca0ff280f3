"""A fuzzer of saved files: bit flips, cuts, deleted, renamed and swapped files, changed fields, other versions.

    python tests/support/fuzz_files.py --n 1091

makes that many mutations of a save, a run, a graph file and an evaluation, and counts what became of them. Every
mutation has to be refused with a ValueError that names the file, or to be harmless: what is loaded then equals what was
saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

# -- what is saved, and how it is loaded -------------------------------------------------------------------------------


# Fields of a run's configuration that may be changed by hand: no number depends on them.
FREE = ("checkpoint_every", "keep_checkpoints", "accumulate", "recompute", "offload")


@dataclass(frozen=True)
class Saved:
    """A directory that was written, and a function that loads it into something comparable."""

    directory: Path
    load: Callable[[Path], Any]
    files: tuple[str, ...]

    def expected(self) -> Any:
        return self.load(self.directory)


def saved_things(scratch: Path) -> dict[str, Saved]:
    """A saved decomposition, a run with two checkpoints, a graph, and an evaluation."""
    from spd_lens import Decomposition, EvaluationReport, TokenBatches, TrainConfig, decompose, evaluate, train
    from spd_lens.graphs import AttributionGraph, attribution_graph
    from spd_lens.training import RunFiles
    from tests.small_models import tiny_transformer, tokens

    sites: dict[str, int | None] = {"blocks.1.mlp.W_in": 4}
    decomposition = decompose(tiny_transformer(), sites, gate_width=4)
    decomposition.save_pretrained(scratch / "save")
    graph = attribution_graph(decomposition, tokens(1, length=5), importance_above=None)
    graph.to_json(scratch / "graph" / "graph.json")
    config = TrainConfig(steps=4, checkpoint_every=2, log_every=1)
    train(decomposition, TokenBatches(tokens(8), 4), config, out_dir=scratch / "run")
    (scratch / "evaluation").mkdir()
    evaluate(decomposition, [tokens(2)], adversary_steps=(1,)).save(scratch / "evaluation")
    model = tiny_transformer()

    def load_save(path: Path) -> Any:
        loaded = Decomposition.from_pretrained(path, model)
        try:
            found = {name: t.detach().clone() for name, t in loaded.tensors().items()}
            return found, loaded.settings, loaded.training_record
        finally:
            loaded.remove()

    def load_run(path: Path) -> Any:
        files = RunFiles(path)
        newest = files.newest()
        assert newest is not None
        numbers = {k: v for k, v in files.read_config().to_json().items() if k not in FREE}
        return newest.tensors, newest.step, newest.belongs, newest.data, numbers, files.belongs()

    def load_graph(path: Path) -> Any:
        found = AttributionGraph.from_json(path / "graph.json")
        nodes, edges = dict(found.graph.nodes(data=True)), list(found.graph.edges(data=True))
        return nodes, edges, found.tokens, found.settings, str(found)

    newest = "checkpoints/step-00000004"
    return {
        "save": Saved(scratch / "save", load_save, ("subcomponents.safetensors", "spd_config.json")),
        "run": Saved(scratch / "run", load_run, (f"{newest}/state.safetensors", f"{newest}/state.json", "config.json")),
        "graph": Saved(scratch / "graph", load_graph, ("graph.json",)),
        "evaluation": Saved(
            scratch / "evaluation", lambda at: EvaluationReport.load(at).to_json(), ("evaluation.json",)
        ),
    }


def same(a: Any, b: Any) -> bool:
    """Equality that looks into tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# -- mutations ---------------------------------------------------------------------------------------------------------

WRONG = (None, True, -1, 0, 2.5, 10**30, 1e308, "x", "", [], {}, [1], "../../etc/passwd", "\u202e", float("inf"))


def mutate(place: Path, names: tuple[str, ...], random_: random.Random) -> str:
    """Change one thing in a copy; says what."""
    name = random_.choice(names)
    path = place / name
    kinds = [_flip, _cut, _append, _delete, _swap, _zeros, _empty, _directory]
    kinds += [_field, _field, _field, _remove_field, _add_field, _version] if path.suffix == ".json" else []
    kind = random_.choice(kinds)
    return f"{kind.__name__.strip('_')} {name}: {kind(path, place, names, random_)}"


def _flip(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, bit = random_.randrange(len(data)), random_.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))
    return f"bit {bit} of byte {at}"


def _cut(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    data = path.read_bytes()
    at = random_.randrange(len(data))
    path.write_bytes(data[:at])
    return f"after {at} bytes"


def _append(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    path.write_bytes(path.read_bytes() + random_.randbytes(random_.randrange(1, 9)))
    return "some bytes"


def _zeros(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = random_.randrange(len(data))
    data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(bytes(data))
    return f"from byte {at}"


def _empty(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    path.write_bytes(b"")
    return "all of it"


def _delete(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    path.unlink()
    return "the file"


def _directory(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "in its place"


def _swap(path: Path, place: Path, names: tuple[str, ...], random_: random.Random) -> str:
    other = place / random_.choice(names)
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return f"with {other.name}"


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as container and key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in items]
    return found + [spot for _, child in list(items) for spot in _spots(child)]


def _edit(path: Path, change: Callable[[Any, Any], str], random_: random.Random) -> str:
    whole = json.loads(path.read_text())
    container, key = random_.choice(_spots(whole))
    said = change(container, key)
    path.write_text(json.dumps(whole))
    return said


def _field(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    def change(container: Any, key: Any) -> str:
        old = container[key]
        near = [old + 1, -old] if isinstance(old, int) and not isinstance(old, bool) else []
        container[key] = random_.choice([*WRONG, *near, *near, *near])
        return f"{key} {str(old)[:30]!r} -> {str(container[key])[:30]!r}"

    return _edit(path, change, random_)


def _remove_field(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    def change(container: Any, key: Any) -> str:
        del container[key]
        return str(key)

    return _edit(path, change, random_)


def _add_field(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    def change(container: Any, key: Any) -> str:
        if isinstance(container, dict):
            container["new"] = 1
        else:
            container.append(container[key])
        return "new"

    return _edit(path, change, random_)


def _version(path: Path, place: Path, names: Any, random_: random.Random) -> str:
    text = path.read_text()
    version = random_.choice(["0", "1", "3", "-1", "99", "2.0", '"2"', "null", "true", "1e400"])
    path.write_text(text.replace('"format_version": 2', f'"format_version": {version}'))
    return version


# -- counting ----------------------------------------------------------------------------------------------------------


def outcome(saved: Saved, expected: Any, seed: int, scratch: Path) -> tuple[str, str]:
    """`(refused | harmless | accepted wrongly | unclear, what was done and said)` of one mutation."""
    place = scratch / "mutated"
    shutil.copytree(saved.directory, place)
    try:
        what = mutate(place, saved.files, random.Random(seed))
        try:
            found = saved.load(place)
        except ValueError as error:
            said = str(error)
            clear = any(part in said for part in (*(os.path.basename(f) for f in saved.files), "damaged"))
            return ("refused" if clear else "unclear"), f"{what}: {said[:200]}"
        except Exception as error:
            return "unclear", f"{what}: {type(error).__name__} {error}"
        return ("harmless" if same(found, expected) else "accepted wrongly"), what
    finally:
        shutil.rmtree(place)


def fuzz(n: int, scratch: Path, first_seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Counts of outcomes over `n` mutations, shared out among the kinds of files, and what went wrong."""
    things = list(saved_things(scratch).values())
    expected = [saved.expected() for saved in things]
    counts: Counter[str] = Counter()
    wrong = []
    for i in range(n):
        saved, wanted = things[i % len(things)], expected[i % len(things)]
        result, what = outcome(saved, wanted, first_seed + i, scratch)
        counts[result] += 1
        if result in ("unclear", "accepted wrongly"):
            wrong.append(f"{result}: seed {first_seed + i}, {what}")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1091)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        counts, wrong = fuzz(arguments.n, Path(scratch), arguments.seed)
    print("\n".join(wrong))
    print(f"{arguments.n} mutated files: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

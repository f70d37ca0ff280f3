"""Does a decomposition name what nobody put in? A table of patients with one hidden marker, ten seeds.

    python experiments/discovery.py --json                # ten seeds; writes results/discovery/summary.json
    python experiments/discovery.py slice --seeds 3:4     # one, in runs/discovery: run several at once
    python experiments/discovery.py merge --json          # the table of all that are there

A killed run goes on where it was.

The data are made here. A patient has ten attributes of three or four values each, drawn independently: age, sex,
smoking, blood pressure, cholesterol, glucose, and four laboratory markers A to D. The log odds of illness are
`-2 + 1.2 [age: old] + 1.0 [smoking: yes] + 2.5 [marker X: value v]`; which marker X and which of its values v is drawn
by the seed and told to nobody. A one-block transformer over attribute tokens learns 2,000 such patients (the labels are
draws, so it cannot learn them exactly), its embedding `W_E` and `W_V` are decomposed, and then

- `find` ranks the embedding's subcomponents by how much less likely "ill" is without them among the patients that the
  model calls ill, against what that costs among the others; `harvest` says on which tokens each fires at its strongest
  among those ill. A subcomponent often fires on several values of one attribute, with opposite signs, so each of these
  tokens is tried: the one names it at which removing the subcomponent takes most from "ill". (`fires_most`: the token
  on which it fires most often, without that trial.) The tokens in that order are what the decomposition names;
- a decision tree of depth 4 names the tokens in the order of its importances;
- SHAP on the transformer (permutations) names them by mean |value| over the same patients.

Success: of the four markers the planted one is named first. `value`: so is its planted value, of all 16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens import Batch, Reconstruction, TokenBatches, TrainConfig, decompose, harvest, train
from spd_lens.core import Decomposition
from spd_lens.editing import Habit, find
from spd_lens.models import build_transformer
from spd_lens.objective import Merged, Persistent
from spd_lens.support import library_versions, tqdm, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "discovery"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "age": ("young", "middle", "old"),
    "sex": ("female", "male", "other"),
    "smoking": ("no", "former", "yes"),
    "blood pressure": ("low", "normal", "high"),
    "cholesterol": ("low", "normal", "high"),
    "glucose": ("low", "normal", "high"),
    **{f"marker {letter}": ("absent", "weak", "clear", "strong") for letter in "ABCD"},
}
VOCABULARY = [f"{name}: {value}" for name, values in ATTRIBUTES.items() for value in values] + ["ill?"]
KNOWN = {"age: old": 1.2, "smoking: yes": 1.0}
BASE, PLANTED = -2.0, 2.5
# How many of the tokens on which a subcomponent fires most are tried.
N_TRIED = 4
N_PATIENTS, N_POS = 2_000, len(ATTRIBUTES) + 1
MARKERS = [text for text in VOCABULARY if text.startswith("marker ")]


def planted(seed: int) -> str:
    """The hidden marker's value of a seed."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return MARKERS[int(torch.randint(len(MARKERS), (1,), generator=generator))]


def patients(seed: int) -> tuple[Int[Tensor, "n pos"], Int[Tensor, " n"]]:
    """Tokens and whether they are ill."""
    generator = torch.Generator().manual_seed(seed)
    columns, first = [], 0
    for values in ATTRIBUTES.values():
        columns.append(first + torch.randint(len(values), (N_PATIENTS,), generator=generator))
        first += len(values)
    tokens = torch.stack([*columns, torch.full((N_PATIENTS,), first)], dim=1)
    odds = torch.full((N_PATIENTS,), BASE)
    for text, weight in {**KNOWN, planted(seed): PLANTED}.items():
        odds += weight * (tokens == VOCABULARY.index(text)).any(1)
    return tokens, (torch.rand(N_PATIENTS, generator=generator) < odds.sigmoid()).long()


def trained(tokens: Tensor, labels: Tensor, seed: int) -> Any:
    """A one-block transformer that says ill (1) or not (0) at the last position."""
    config = {
        "model_name": "patients", "n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 16, "n_ctx": N_POS,
        "d_vocab": len(VOCABULARY), "d_vocab_out": 2, "act_fn": "relu", "normalization_type": None, "seed": seed,
        "initializer_range": 0.1,
    }  # fmt: skip
    model: Any = build_transformer(config, host="hooked")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.5)
    for batch in islice(TokenBatches(torch.arange(N_PATIENTS)[:, None], 256, seed=seed), 250):
        index = batch.inputs[:, 0]
        loss = F.cross_entropy(model(tokens[index])[:, -1], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.add_perma_hook("unembed.hook_out", only_last)
    return model.eval()


def only_last(logits: Tensor, hook: Any) -> Tensor:
    """Hook: 0 at all positions but the last, where the answer is."""
    return torch.cat([torch.zeros_like(logits[:, :-1]), logits[:, -1:]], dim=1)


def decomposed(model: Any, tokens: Tensor, seed: int, steps: int) -> Decomposition:
    """The embedding and `W_V` decomposed, half of every batch under an adversary."""
    decomposition = decompose(
        model, {"embed.W_E": 24, "blocks.0.attn.W_V": 16}, gate="shared", gate_width=32, init="exact", seed=seed
    )
    term = Reconstruction(coefficient=float(N_POS), masks=Merged(0.5, Persistent(scope="batch")), routing="subset")
    config = TrainConfig(
        steps=steps, lr=3e-3, lr_warmup=30, clip_subcomponents=1.0, clip_gates=1.0, faithfulness=1e2,
        relative_faithfulness=True, minimality=2e-3, penalty="smooth_l0", reconstructions=(term,), seed=seed,
        log_every=100, checkpoint_every=None,
    )  # fmt: skip
    train(decomposition, TokenBatches(tokens, 64, seed=seed), config)
    return decomposition


def named_by_decomposition(decomposition: Decomposition, tokens: Tensor) -> tuple[list[str], list[str]]:
    """Tokens in the order of `find`: those at which each subcomponent pushes most, and those on which it fires most."""
    with torch.no_grad():
        logits = decomposition.model(tokens)[:, -1]
    ill = logits[:, 1] > logits[:, 0]
    habit = Habit("ill", tokens[ill][:128], torch.ones(min(128, int(ill.sum())), 1, dtype=torch.long))
    found = find(decomposition, habit, tokens[~ill][:128], {"embed.W_E": None}, n_measured=24, n_checked=4)
    asked = tokens[ill][:256]
    fired = harvest(decomposition, [Batch(asked, tokens=asked)], top_k=32, before=0, after=0)["embed.W_E"]
    pushing: list[str] = []
    firing: list[str] = []
    for unit in found.clear:
        strongest = Counter(int(example.tokens[example.at]) for example in fired.examples(unit.id))
        common = [token for token, _ in strongest.most_common(N_TRIED)]
        if common:
            firing.append(VOCABULARY[common[0]])
            losses = [loss_without(decomposition, asked, unit.id, token) for token in common]
            pushing.append(VOCABULARY[common[losses.index(max(losses))]])
    return list(dict.fromkeys(pushing)), list(dict.fromkeys(firing))


@torch.no_grad()
def loss_without(decomposition: Decomposition, tokens: Tensor, subcomponent: int, token: int) -> float:
    """What the patients' log odds of "ill" lose in all if the embedding's subcomponent is ablated at one token."""
    point = decomposition["embed.W_E"].site.point_names()[0]

    def without(value: Tensor, hook: Any) -> Tensor:
        value[..., subcomponent] = torch.where(tokens == token, 0.0, value[..., subcomponent])
        return value

    def log_odds() -> Tensor:
        logits = decomposition.model(tokens)[:, -1]
        return logits[:, 1] - logits[:, 0]

    before = log_odds()
    with decomposition.model.hooks(fwd_hooks=[(point, without)]):
        return float((before - log_odds()).sum())


def named_by_tree(tokens: Tensor, labels: Tensor, seed: int) -> list[str]:
    """Tokens in the order of a decision tree's importances."""
    from sklearn.tree import DecisionTreeClassifier

    columns = F.one_hot(tokens, len(VOCABULARY)).sum(1).numpy()
    tree = DecisionTreeClassifier(max_depth=4, random_state=seed).fit(columns, labels.numpy())
    order = tree.feature_importances_.argsort()[::-1]
    return [VOCABULARY[i] for i in order if tree.feature_importances_[i] > 0]


def named_by_shap(model: Any, tokens: Tensor, seed: int) -> list[str]:
    """Tokens by mean SHAP value for "ill" over 32 patients that the model calls ill."""
    import shap

    def margin(rows: Any) -> Any:
        asked = torch.as_tensor(rows).long()
        with torch.no_grad():
            logits = model(torch.cat([asked, torch.full((len(asked), 1), len(VOCABULARY) - 1)], 1))[:, -1]
        return (logits[:, 1] - logits[:, 0]).numpy()

    ill = torch.from_numpy(margin(tokens[:, :-1])) > 0
    maskers: Any = shap.maskers  # pyright: ignore[reportAttributeAccessIssue]
    masker = maskers.Independent(tokens[:32, :-1].numpy(), max_samples=32)
    chosen = tokens[ill][:32, :-1]
    found: Any = shap.explainers.Permutation(margin, masker, seed=seed)(
        chosen.numpy(), max_evals=2 * (2 * N_POS), silent=True
    )
    total, count = torch.zeros(len(VOCABULARY)), torch.zeros(len(VOCABULARY))
    total.index_add_(0, chosen.flatten(), torch.tensor(found.values, dtype=torch.float32).flatten())
    count.index_add_(0, chosen.flatten(), torch.ones(chosen.numel()))
    mean = torch.where(count > 0, total / count.clamp_min(1), torch.full_like(total, -torch.inf))
    return [VOCABULARY[i] for i in mean.argsort(descending=True).tolist() if mean[i] > 0]


def rank_of(text: str, named: list[str], *, values: bool) -> int | None:
    """The place of a marker (`values`: of its value) among those that were named, from 1; None: it was not named."""
    markers = [name for name in named if name in MARKERS]
    if not values:
        text, markers = text.split(":")[0], list(dict.fromkeys(name.split(":")[0] for name in markers))
    return markers.index(text) + 1 if text in markers else None


def run(seed: int, steps: int) -> dict[str, Any]:
    """One seed."""
    started = time.process_time()
    tokens, labels = patients(seed)
    model = trained(tokens, labels, seed)
    with torch.no_grad():
        accuracy = float((model(tokens)[:, -1].argmax(-1) == labels).float().mean())
    pushing, firing = named_by_decomposition(decomposed(model, tokens, seed, steps), tokens)
    named = {
        "decision tree": named_by_tree(tokens, labels, seed),
        "SHAP": named_by_shap(model, tokens, seed),
        "decomposition": pushing,
        "decomposition, fires_most": firing,
    }
    return {
        "seed": seed,
        "planted": planted(seed),
        "accuracy": accuracy,
        "ill_share": float(labels.float().mean()),
        "marker": {name: rank_of(planted(seed), own, values=False) for name, own in named.items()},
        "value": {name: rank_of(planted(seed), own, values=True) for name, own in named.items()},
        "named": {name: own[:6] for name, own in named.items()},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def about(steps: int) -> dict[str, Any]:
    """What a run's numbers depend on, besides its seed."""
    return {"steps": steps, "versions": {**library_versions(), "shap": importlib.metadata.version("shap")}}


def run_seeds(seeds: range, steps: int, folder: Path) -> None:
    """A file for every seed; those that are there are left as they are."""
    for seed in tqdm(seeds, desc="seeds"):
        path = folder / f"seed-{seed}.json"
        if not path.is_file():
            write_json(path, {**about(steps), "run": run(seed, steps)})


def table(files: Sequence[Path]) -> dict[str, Any]:
    """Success over seeds. Raises ValueError for no run at all, and for runs of other settings or versions."""
    if not files:
        raise ValueError("there is no run; `discovery.py slice --seeds A:B` makes them")
    found = [json.loads(path.read_text()) for path in files]
    for path, own in zip(files, found, strict=True):
        odd = [name for name in ("steps", "versions") if own[name] != found[0][name]]
        if odd:
            raise ValueError(f"{path} has other {odd[0]} than {files[0]}; move it away")
    runs = sorted((own["run"] for own in found), key=lambda own: own["seed"])
    methods = list(runs[0]["marker"])
    return {
        "command": (
            f"python experiments/discovery.py --json --steps {found[0]['steps']} "
            f"--seeds {runs[0]['seed']}:{runs[-1]['seed'] + 1}"
        ),
        "versions": found[0]["versions"],
        "seeds": [own["seed"] for own in runs],
        "success": {name: sum(r["marker"][name] == 1 for r in runs) for name in methods},
        "value_first": {name: sum(r["value"][name] == 1 for r in runs) for name in methods},
        "named_at_all": {name: sum(r["marker"][name] is not None for r in runs) for name in methods},
        "runs": runs,
    }


def seeds_of(text: str) -> range:
    """`"0:10"` as a range. Raises ValueError for anything else."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
        raise ValueError(f"--seeds {text!r}; expected FIRST:STOP, for example 0:10")
    return range(int(parts[0]), int(parts[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["all", "slice", "merge"], nargs="?", default="all")
    parser.add_argument("--seeds", default="0:10", help="FIRST:STOP")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/discovery"), help="directory of a file for every seed")
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    if args.command != "merge":
        args.runs.mkdir(parents=True, exist_ok=True)
        run_seeds(seeds_of(args.seeds), args.steps, args.runs)
    if args.command == "slice":
        return
    found = table(sorted(args.runs.glob("seed-*.json")))
    write_json(args.out / "summary.json", found)
    print(json.dumps(found, indent=1) if args.json else found["success"])


if __name__ == "__main__":
    main()

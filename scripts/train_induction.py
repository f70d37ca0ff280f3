"""Train the induction model that ships in `spd_lens/toys/induction/`.

What it does: trains a 2-layer attention-only HookedTransformer on repeated random sequences
(`spd_lens.toys.induction.RepeatedSequences`) to give the next token where it is predictable and the uniform
distribution elsewhere, with a penalty that makes heads vanish; reads off which head is the previous-token head and
which the induction head; writes weights, config and `recipe.json`.

Cost: a few minutes on one CPU core. Needs transformer_lens 3.

Limits: a repeated run with other library versions gives a model of the same quality, not the same bits.

    python scripts/train_induction.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spd_lens.toys.induction import (
    D_VOCAB,
    DATA_DIR,
    N_CTX,
    RepeatedSequences,
    head_roles,
    induction_accuracy,
    induction_loss,
    predictable,
)
from spd_lens.toys.saved_transformer import build_transformer, save_transformer

TEST_SEED, TEST_ROWS = 1_000_003, 512
# Heads whose output matrix is below this share of the largest have been given up and are set to 0.
MIN_NORM_SHARE = 0.1
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 100


def parse_args() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA_DIR)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--head-penalty", type=float, default=1e-3, help="coefficient of the sum of |W_O| over heads")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def config(heads: int, seed: int) -> dict[str, Any]:
    """Return the fields of HookedTransformerConfig."""
    return {
        "model_name": "induction",
        "n_layers": 2,
        "d_model": 64,
        "n_heads": heads,
        "d_head": 64 // heads,
        "n_ctx": N_CTX,
        "d_vocab": D_VOCAB,
        "attn_only": True,
        "normalization_type": None,
        "seed": seed,
    }


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate at `step`: linear warm-up, then a cosine down to 0."""
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return peak * min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * max(0.0, progress))))


def train(model: Any, args: argparse.Namespace) -> None:
    """Train in place."""
    data = RepeatedSequences(args.batch, seed=args.seed).batches_from(0)
    decayed = [p for name, p in model.named_parameters() if "W_" in name]
    others = [p for name, p in model.named_parameters() if "W_" not in name]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS)
    test = RepeatedSequences(256, seed=TEST_SEED).batch(1)
    for step in tqdm(range(args.steps), mininterval=10.0):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        tokens = next(data)
        loss = induction_loss(model(tokens), tokens) + args.head_penalty * head_norms(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 1000 == 0:
            with torch.no_grad():
                accuracy = induction_accuracy(model(test), test)
            tqdm.write(f"step {step + 1}  loss {loss.item():.5f}  accuracy {accuracy:.4f}")


def head_norms(model: Any) -> torch.Tensor:
    """Return the sum over all heads of the Frobenius norm of their output matrix.

    As a penalty (group lasso) it makes a head that is not needed vanish; without it the skill is spread over several.
    """
    return model.W_O.flatten(2).norm(dim=-1).sum()


@torch.no_grad()
def cut_small_heads(model: Any) -> list[str]:
    """Set the output matrices of heads that the penalty has all but removed to 0; return these heads."""
    norms = model.W_O.flatten(2).norm(dim=-1)
    cut = (norms < MIN_NORM_SHARE * norms.max()).nonzero().tolist()
    for layer, head in cut:
        model.blocks[layer].attn.W_O[head] = 0
    return [f"{layer}.{head}" for layer, head in cut]


@torch.no_grad()
def measure(model: Any) -> dict[str, Any]:
    """Return accuracy, loss and head scores on sequences that training did not see."""
    tokens = RepeatedSequences(TEST_ROWS, seed=TEST_SEED).batch(0)
    logits = model(tokens)
    roles = head_roles(model, tokens)
    return {
        "best_possible_loss_nats": float((~predictable(tokens)[:, :-1]).float().mean()) * math.log(D_VOCAB),
        "rows": TEST_ROWS,
        "seed": TEST_SEED,
        "accuracy": induction_accuracy(logits, tokens),
        "loss_nats": float(induction_loss(logits, tokens)),
        "previous_token_scores": roles.previous,
        "induction_scores": roles.induction,
        "previous_token_head": roles.previous_token_head,
        "induction_head": roles.induction_head,
        "heads_above_half": roles.clear(),
        "head_output_norms": model.W_O.flatten(2).norm(dim=-1).tolist(),
        "accuracy_without_head": {
            f"{layer}.{head}": accuracy_without(model, tokens, layer, head)
            for layer in range(model.cfg.n_layers)
            for head in range(model.cfg.n_heads)
        },
    }


def accuracy_without(model: Any, tokens: torch.Tensor, layer: int, head: int) -> float:
    """Return the accuracy with one head's output set to its mean over the rows and positions."""

    def to_mean(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, head] = z[:, :, head].mean((0, 1))
        return z

    logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", to_mean)])
    return induction_accuracy(logits, tokens)


def main() -> None:
    """Train, measure and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    fields = config(args.heads, args.seed)
    model = build_transformer(fields)
    started = time.process_time()
    train(model, args)
    seconds = time.process_time() - started
    model.eval()
    cut = cut_small_heads(model)
    readings = measure(model)
    recipe = {
        "command": f"python scripts/train_induction.py --heads {args.heads} --seed {args.seed}",
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in ("torch", "transformer_lens", "numpy", "safetensors")},
        },
        "steps": args.steps,
        "batch_rows": args.batch,
        "optimizer": {
            "name": "AdamW",
            "lr_peak": args.lr,
            "lr_schedule": f"linear warm-up over {WARM_UP_STEPS} steps, cosine to 0",
            "betas": BETAS,
            "weight_decay_of_matrices": args.weight_decay,
            "gradient_clip_norm": 1.0,
        },
        "head_penalty": args.head_penalty,
        "heads_cut": cut,
        "loss": "cross-entropy; the target is the next token at predictable positions and uniform elsewhere",
        "cpu_seconds": round(seconds, 1),
        "threads": args.threads,
        "n_params": sum(p.numel() for p in model.parameters()),
        "test": readings,
    }
    save_transformer(model, fields, recipe, args.out)
    print(json.dumps(readings, indent=1))


if __name__ == "__main__":
    main()

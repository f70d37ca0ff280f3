"""Train the induction model that ships in `spd_lens/models/shipped/induction/`.

What it does: trains a 2-layer attention-only HookedTransformer on repeated random sequences
(`spd_lens.models.RepeatedSequences`) to give the next token where it is predictable and the uniform
distribution elsewhere, with a penalty that makes heads vanish; reads off which head is the previous-token head and
which the induction head; keeps these two alone and trains on under strong weight decay, which takes away directions
that nothing needs; writes weights, config and `recipe.json`.

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

from spd_lens.models import (
    D_VOCAB,
    INDUCTION_DIRECTORY,
    N_CTX,
    RepeatedSequences,
    build_transformer,
    head_roles,
    induction_accuracy,
    induction_loss,
    predictable,
    save_transformer,
)
from spd_lens.support import tqdm

TEST_SEED, TEST_ROWS = 1_000_003, 512
BETAS = (0.9, 0.98)
WARM_UP_STEPS, SETTLE_WARM_UP_STEPS = 100, 50


def parse_args() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=INDUCTION_DIRECTORY)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--head-penalty", type=float, default=1e-3, help="coefficient of the sum of |W_O| over heads")
    parser.add_argument("--settle-steps", type=int, default=1_200, help="with the two heads alone")
    parser.add_argument("--settle-lr", type=float, default=2e-3)
    parser.add_argument("--settle-weight-decay", type=float, default=0.5)
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


def settle_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of the second stage: constant after a short warm-up, then linear to 0 over the last 40 %."""
    return peak * min(1.0, (step + 1) / SETTLE_WARM_UP_STEPS, (steps - step) / (0.4 * steps))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate at `step`: linear warm-up, then a cosine down to 0."""
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return peak * min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * max(0.0, progress))))


def optimizer_of(model: Any, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with decay of matrices alone."""
    decayed = [p for name, p in model.named_parameters() if "W_" in name]
    others = [p for name, p in model.named_parameters() if "W_" not in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS)


def take_step(model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """Do one clipped step at rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def report(model: Any, step: int, loss: torch.Tensor) -> None:
    """Print loss and accuracy."""
    test = RepeatedSequences(256, seed=TEST_SEED).batch(1)
    tqdm.write(f"step {step}  loss {loss.item():.5f}  accuracy {induction_accuracy(model(test), test):.4f}")


def train(model: Any, args: argparse.Namespace) -> None:
    """Train all heads in place, with the penalty that makes them vanish."""
    data = RepeatedSequences(args.batch, seed=args.seed).batches_from(0)
    optimizer = optimizer_of(model, args.lr, args.weight_decay)
    for step in tqdm(range(args.steps), mininterval=10.0):
        tokens = next(data)
        loss = induction_loss(model(tokens), tokens) + args.head_penalty * head_norms(model)
        take_step(model, optimizer, loss, learning_rate(step, args.steps, args.lr))
        if (step + 1) % 1000 == 0:
            report(model, step + 1, loss)


def settle(model: Any, args: argparse.Namespace) -> list[str]:
    """Keep the previous-token head and the induction head alone, and train on in place; return the heads cut.

    The penalty leaves heads that the accuracy hardly needs, and small directions of all matrices; without the one and
    under strong weight decay, the two heads do the whole task with fewer directions.
    """
    roles = head_roles(model, RepeatedSequences(TEST_ROWS, seed=args.seed + 1).batch(0))
    kept = {roles.previous_token_head, roles.induction_head}
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    cut = [pair for pair in every if pair not in kept]
    data = RepeatedSequences(args.batch, seed=args.seed).batches_from(args.steps)
    optimizer = optimizer_of(model, args.settle_lr, args.settle_weight_decay)
    cut_heads(model, cut)
    for step in tqdm(range(args.settle_steps), mininterval=10.0):
        tokens = next(data)
        loss = induction_loss(model(tokens), tokens)
        take_step(model, optimizer, loss, settle_rate(step, args.settle_steps, args.settle_lr))
        cut_heads(model, cut)
        if (step + 1) % 400 == 0:
            report(model, step + 1, loss)
    return [f"{layer}.{head}" for layer, head in cut]


@torch.no_grad()
def cut_heads(model: Any, heads: list[tuple[int, int]]) -> None:
    """Set the output matrices of these heads to 0."""
    for layer, head in heads:
        model.blocks[layer].attn.W_O[head] = 0


def head_norms(model: Any) -> torch.Tensor:
    """Return the sum over all heads of the Frobenius norm of their output matrix.

    As a penalty (group lasso) it makes a head that is not needed vanish; without it the skill is spread over several.
    """
    return model.W_O.flatten(2).norm(dim=-1).sum()


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
    model: Any = build_transformer(fields, host="hooked")
    started = time.process_time()
    train(model, args)
    cut = settle(model, args)
    seconds = time.process_time() - started
    model.eval()
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
        "settle": {
            "what": "a second stage with the two heads alone, a new optimiser, no penalty",
            "steps": args.settle_steps,
            "lr_peak": args.settle_lr,
            "lr_schedule": f"linear warm-up over {SETTLE_WARM_UP_STEPS} steps, linear to 0 over the last 40 %",
            "weight_decay_of_matrices": args.settle_weight_decay,
        },
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

"""Train the modular addition model that ships in `spd_lens/models/shipped/modular_addition/`.

What it does: trains a 1-block HookedTransformer on 40 % of all sums `a + b mod 53`, full batch, AdamW with weight
decay 1, far past the point where the training set is learned, until the test set is right too (grokking); reads off
its Fourier frequencies; writes weights, config and `recipe.json`.

The answer is read at the last position only, so training computes that position alone, with keys and values as one
table per position over all numbers: `last_logits`, which is checked against the model itself.

Cost: two to three minutes on one CPU core. Needs transformer_lens 3.

Limits: a repeated run with other library versions gives a model of the same quality, not the same bits.

    python scripts/train_modular_addition.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from spd_lens.models import (
    MODULAR_ADDITION_DIRECTORY,
    P,
    all_sums,
    build_transformer,
    fourier_reading,
    save_transformer,
    sum_accuracy,
    sum_labels,
)
from spd_lens.support import tqdm

CONFIG = {
    "model_name": "modular_addition",
    "n_layers": 1,
    "d_model": 64,
    "n_heads": 4,
    "d_head": 16,
    "d_mlp": 256,
    "n_ctx": 3,
    "d_vocab": P + 1,
    "d_vocab_out": P,
    "act_fn": "relu",
    "normalization_type": None,
}
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 10
# As in the usual recipe for grokking, the only bias is that of the neurons.
TRAINED = ("W_E", "W_pos", "W_Q", "W_K", "W_V", "W_O", "W_in", "b_in", "W_out", "W_U")


def parse_args() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODULAR_ADDITION_DIRECTORY)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--train-share", type=float, default=0.4, help="share of all sums that is trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def initialise(model: Any, seed: int) -> dict[str, torch.nn.Parameter]:
    """Draw every matrix from `N(0, 1 / d_in)`, set biases to 0; return what is trained by its last name."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name.rsplit(".", 1)[-1]: p for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in parameters.values():
            p.zero_()
        for name in TRAINED:
            if name != "b_in":
                p = parameters[name]
                p.copy_(torch.randn(p.shape, generator=generator) / fan_in(name, p) ** 0.5)
    return {name: parameters[name] for name in TRAINED}


def fan_in(name: str, p: Tensor) -> int:
    """Return `d_in`; rows of embeddings count as the output of a matrix of d_model."""
    if name in ("W_E", "W_pos"):
        return p.shape[-1]
    return p.shape[0] * p.shape[1] if name == "W_O" else p.shape[-2]


def last_logits(
    w: Mapping[str, Tensor], a: Int[Tensor, " batch"], b: Int[Tensor, " batch"]
) -> Float[Tensor, "batch p"]:
    """Return the logits at the last position of `[a, b, p]`."""
    equals = w["W_E"][P] + w["W_pos"][2]
    numbers = [w["W_E"][:P] + w["W_pos"][0], w["W_E"][:P] + w["W_pos"][1], equals[None]]
    q = torch.einsum("d,hde->he", equals, w["W_Q"])
    rows = [a, b, torch.zeros_like(a)]
    scores, values = [], []
    for x, row in zip(numbers, rows, strict=True):
        scores.append((torch.einsum("nd,hde,he->nh", x, w["W_K"], q) / q.shape[-1] ** 0.5)[row])
        values.append(torch.einsum("nd,hde->nhe", x, w["W_V"])[row])
    pattern = torch.stack(scores).softmax(0)
    z = (pattern[..., None] * torch.stack(values)).sum(0)
    residual = equals + z.flatten(1) @ w["W_O"].flatten(0, 1)
    residual = residual + torch.relu(residual @ w["W_in"] + w["b_in"]) @ w["W_out"]
    return residual @ w["W_U"]


def cross_entropy(logits: Float[Tensor, "batch p"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the mean loss, in float64: it falls below the resolution of float32."""
    return F.cross_entropy(logits.double(), labels)


def train(w: dict[str, torch.nn.Parameter], is_train: Tensor, args: argparse.Namespace) -> int:
    """Train in place; return the first of the measured steps at which every test answer was right, -1 if none."""
    sums = all_sums()
    a, b, labels = sums[:, 0], sums[:, 1], sum_labels(sums)
    rows, test = is_train.nonzero().squeeze(1), (~is_train).nonzero().squeeze(1)
    optimizer = torch.optim.AdamW(w.values(), lr=args.lr, weight_decay=args.weight_decay, betas=BETAS)
    grokked = -1
    for step in tqdm(range(args.steps), mininterval=10.0):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARM_UP_STEPS)
        loss = cross_entropy(last_logits(w, a[rows], b[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0:
            with torch.no_grad():
                logits = last_logits(w, a[test], b[test])
            accuracy = float((logits.argmax(-1) == labels[test]).float().mean())
            grokked = step + 1 if accuracy == 1 and grokked < 0 else grokked
            shown = f"train {loss.item():.2e}  test {cross_entropy(logits, labels[test]).item():.2e}"
            tqdm.write(f"step {step + 1}  {shown}  test accuracy {accuracy:.4f}")
    return grokked


@torch.no_grad()
def measure(model: Any, is_train: Tensor) -> dict[str, Any]:
    """Return accuracies, losses and the Fourier reading."""
    sums = all_sums()
    logits, labels = model(sums), sum_labels(sums)
    reading = fourier_reading(model)
    frequency, count = reading.neuron_frequency.unique(return_counts=True)
    return {
        "accuracy_all": sum_accuracy(logits, sums),
        "accuracy_test": sum_accuracy(logits[~is_train], sums[~is_train]),
        "loss_test_nats": float(cross_entropy(logits[~is_train, -1], labels[~is_train])),
        "key_frequencies": reading.key_frequencies,
        "embedding_shares": {k: round(float(reading.embedding[k - 1]), 4) for k in reading.key_frequencies},
        "embedding_explained": reading.embedding_explained,
        "unembedding_explained": reading.unembedding_explained,
        "neurons_explained": reading.neurons_explained,
        "neurons_by_frequency": dict(zip(map(str, frequency.tolist()), count.tolist(), strict=True)),
    }


def main() -> None:
    """Train, measure and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    model: Any = build_transformer(CONFIG, host="hooked")
    w = initialise(model, args.seed)
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(args.seed + 1))
    is_train = torch.zeros(P * P, dtype=torch.bool)
    is_train[order[: int(args.train_share * P * P)]] = True
    started = time.process_time()
    grokked = train(w, is_train, args)
    seconds = time.process_time() - started
    model.eval()
    with torch.no_grad():
        sums = all_sums()
        torch.testing.assert_close(last_logits(w, sums[:, 0], sums[:, 1]), model(sums)[:, -1], atol=1e-3, rtol=1e-4)
    readings = measure(model, is_train)
    recipe = {
        "command": f"python scripts/train_modular_addition.py --seed {args.seed}",
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in ("torch", "transformer_lens", "numpy", "safetensors")},
        },
        "steps": args.steps,
        "batch": f"all {int(is_train.sum())} training sums of {P * P}",
        "train_share": args.train_share,
        "optimizer": {
            "name": "AdamW",
            "lr": args.lr,
            "lr_schedule": f"linear warm-up over {WARM_UP_STEPS} steps, then constant",
            "betas": BETAS,
            "weight_decay": args.weight_decay,
        },
        "first_measured_step_with_test_accuracy_1": grokked,
        "cpu_seconds": round(seconds, 1),
        "threads": args.threads,
        "n_params": sum(p.numel() for p in model.parameters()),
        "test": readings,
    }
    save_transformer(model, CONFIG, recipe, args.out)
    print(json.dumps(readings, indent=1))


if __name__ == "__main__":
    main()

"""SPD on the two transformers with known mechanisms; prints one JSON object.

    python benchmarks/toy_transformers.py induction
    python benchmarks/toy_transformers.py modular_addition

**induction**: all eight attention matrices, attention gates. *Used* are the subcomponents whose importance is above
0.1 at more than 5 % of the positions of fresh sequences. The check, on accuracy at predictable positions: masks of the
used ones 0, all else on (the skill should go); masks of all others 0, delta on (it should stay); only the used ones,
also without delta. The same by head: a subcomponent belongs to the head that holds most of the squared norm of its
`U` (of its `V` for `W_O`).

**modular_addition**: `W_E`, `W_in` and `W_out`, with the two outputs that were never trained silenced
(`only_the_answer`). For every used subcomponent the share that its best Fourier frequency explains: of `V` over the
numbers (`W_E`), of its activation over all questions (`W_in`), of its effect on the logits over the answers
(`W_out`); the same for random directions of the same space as the baseline.

Cost: one to two CPU-minutes each with the default 1,500 steps. Needs transformer_lens 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spd_lens import Decomposition, decompose, evaluate
from spd_lens.config import Reconstruction, TrainConfig
from spd_lens.data import Batch
from spd_lens.toys.induction import RepeatedSequences, head_roles, induction_accuracy, load_induction
from spd_lens.toys.modular_addition import (
    ModularSums,
    P,
    all_sums,
    fourier_reading,
    frequency_shares,
    grid_frequency_shares,
    load_modular_addition,
    only_the_answer,
    sum_accuracy,
)
from spd_lens.training import train

ON_ABOVE, USED_ABOVE = 0.1, 0.05
TEST_SEED = 1_000_003
Ids = dict[str, list[int]]


def settings(name: str, args: argparse.Namespace) -> TrainConfig:
    """Return the training choices; what is given on the command line replaces the default."""
    lr = 2e-3 if args.lr is None else args.lr
    gate_lr = 5e-3 if args.gate_lr is None else args.gate_lr
    minimality = 5e-3 if args.minimality is None else args.minimality
    second = Reconstruction(routing="subset" if name == "induction" else "layerwise")
    return TrainConfig(
        steps=args.steps, lr=lr, gate_lr=gate_lr, minimality=minimality, faithfulness=0.0, faithfulness_warmup=200,
        reconstructions=(Reconstruction(), second), checkpoint_every=None, log_every=100, seed=args.seed,
    )  # fmt: skip


def fit(decomposition: Decomposition, batches: Iterable[Tensor], config: TrainConfig) -> float:
    """Train; return the CPU seconds it took."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        train(decomposition, batches, config, out_dir=directory)
    return time.process_time() - started


def firing_rates(importances: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Share of positions at which each subcomponent's importance is above 0.1."""
    return {name: (g.flatten(0, -2) > ON_ABOVE).float().mean(0) for name, g in importances.items()}


def used_ids(rates: Mapping[str, Tensor]) -> Ids:
    """Subcomponents that are on at more than 5 % of the positions."""
    return {name: (rate > USED_ABOVE).nonzero().flatten().tolist() for name, rate in rates.items()}


def others(decomposition: Decomposition, ids: Ids) -> Ids:
    """All subcomponents that are not in `ids`."""
    return {n: [c for c in range(decomposition[n].n_subcomponents) if c not in ids[n]] for n in ids}


def summary(decomposition: Decomposition, batches: Sequence[Any]) -> dict[str, Any]:
    """Return what `evaluate` measures, in plain values."""
    report = asdict(evaluate(decomposition, batches, max_batches=len(batches)))
    return {k: report[k] for k in ("divergence", "adversarial", "positions")} | {
        "L0": {name: site["l0"][ON_ABOVE] for name, site in report["sites"].items()},
        "relative_faithfulness": {name: site["relative_faithfulness"] for name, site in report["sites"].items()},
    }


# -- induction -------------------------------------------------------------------------------------------------------


def head_shares(decomposition: Decomposition, name: str, c: int, n_heads: int) -> Tensor:
    """Shares of the squared norm of `U_c` (`V_c` for `W_O`) that lie in each head."""
    weight = decomposition[name]
    vector = weight.V[:, c] if name.endswith("W_O") else weight.U[c]
    norms = vector.detach().reshape(n_heads, -1).square().sum(1)
    return norms / norms.sum()


@torch.no_grad()
def check_induction(decomposition: Decomposition) -> dict[str, Any]:
    """Return the ablation check and where the used subcomponents are."""
    model, tokens = decomposition.model, RepeatedSequences(256, seed=TEST_SEED).batch(0)

    def accuracy(hooks: list[Any]) -> float:
        return induction_accuracy(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens)

    rates = firing_rates(decomposition.importance(tokens))
    used = used_ids(rates)
    roles, n_heads = head_roles(model, tokens), model.cfg.n_heads
    heads: dict[str, Any] = {}
    for layer in range(model.cfg.n_layers):
        for head in range(n_heads):
            own = {
                name: [c for c in ids if int(head_shares(decomposition, name, c, n_heads).argmax()) == head]
                for name, ids in used.items()
                if name.startswith(f"blocks.{layer}.")
            }
            heads[f"{layer}.{head}"] = {
                "used": {name.rsplit(".", 1)[-1]: len(ids) for name, ids in own.items()},
                "accuracy_without": accuracy(decomposition.ablate(own)),
            }
    return {
        "previous_token_head": roles.previous_token_head,
        "induction_head": roles.induction_head,
        "used": {name: len(ids) for name, ids in used.items()},
        "on_at_half_of_positions": {name: int((rate > 0.5).sum()) for name, rate in rates.items()},
        "accuracy": accuracy([]),
        "accuracy_without_used": accuracy(decomposition.ablate(used)),
        "accuracy_without_others": accuracy(decomposition.ablate(others(decomposition, used))),
        "accuracy_with_only_used": accuracy(decomposition.keep(used)),
        "heads": heads,
    }


def run_induction(args: argparse.Namespace) -> dict[str, Any]:
    """Decompose the induction model and check it."""
    decomposition = decompose(
        load_induction(), {"blocks.*.attn.W_[QKVO]": args.C or 32}, gate="attention", gate_width=64, seed=args.seed
    )
    config = settings("induction", args)
    seconds = fit(decomposition, RepeatedSequences(32, seed=args.seed), config)
    held_out = [RepeatedSequences(64, seed=TEST_SEED).batch(i) for i in range(2)]
    return {
        "check": check_induction(decomposition),
        "evaluation": summary(decomposition, held_out),
        "cpu_seconds": round(seconds, 1),
        "settings": config.to_json(),
    }


# -- modular addition ------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_modular_addition(decomposition: Decomposition) -> dict[str, Any]:
    """Return accuracy under ablations, and how much of each used subcomponent its best frequency explains."""
    model, sums = decomposition.model, all_sums()

    def accuracy(hooks: list[Any]) -> float:
        return sum_accuracy(model.run_with_hooks(sums, fwd_hooks=hooks), sums)

    importances = decomposition.importance(sums)
    # The numbers are read at the first two positions, the neurons count at the last.
    rates = firing_rates({n: g[:, :2] if n == "embed.W_E" else g[:, 2:] for n, g in importances.items()})
    used = used_ids(rates)
    _, cache = model.run_with_cache(sums, names_filter="blocks.0.hook_resid_mid")
    residual = cache["blocks.0.hook_resid_mid"][:, -1]

    def shares(name: str, V: Tensor, U: Tensor) -> Tensor:
        """By frequency, of columns of V or rows of U."""
        if name == "embed.W_E":
            return frequency_shares(V[:P].T)
        if name.endswith("W_in"):
            return grid_frequency_shares((residual @ V).reshape(P, P, -1))
        return frequency_shares(U @ model.W_U)

    pieces, baseline = {}, {}
    for name, ids in used.items():
        weight, generator = decomposition[name], torch.Generator().manual_seed(0)
        best, where = shares(name, weight.V[:, ids], weight.U[ids]).max(-1)
        pieces[name] = [
            {"id": c, "rate": float(rates[name][c]), "frequency": int(k) + 1, "share": float(share)}
            for c, k, share in zip(ids, where, best, strict=True)
        ]
        # Random mixtures in the space that the matrix itself reads from or writes to.
        W = weight.target_weight
        mixed_V = W @ torch.randn(W.shape[1], 256, generator=generator)
        mixed_U = torch.randn(256, W.shape[0], generator=generator) @ W
        baseline[name] = float(shares(name, mixed_V, mixed_U).amax(-1).mean())
    return {
        "key_frequencies": fourier_reading(model).key_frequencies,
        "used": {name: len(ids) for name, ids in used.items()},
        "mean_best_share": {n: sum(p["share"] for p in ps) / max(1, len(ps)) for n, ps in pieces.items()},
        "mean_best_share_of_random_mixtures": baseline,
        "accuracy": accuracy([]),
        "accuracy_without_used": accuracy(decomposition.ablate(used)),
        "accuracy_without_others": accuracy(decomposition.ablate(others(decomposition, used))),
        "accuracy_with_only_used": accuracy(decomposition.keep(used)),
        "subcomponents": pieces,
    }


def run_modular_addition(args: argparse.Namespace) -> dict[str, Any]:
    """Decompose the modular addition model and check it."""
    model = load_modular_addition()
    model.add_perma_hook("unembed.hook_out", only_the_answer)
    counts = {"embed.W_E": (args.C or 32) // 2, "blocks.0.mlp.W_*": args.C or 32}
    decomposition = decompose(model, counts, gate="scalar", gate_width=16, seed=args.seed)
    config = settings("modular_addition", args)
    seconds = fit(decomposition, ModularSums(512, seed=args.seed), config)
    return {
        "check": check_modular_addition(decomposition),
        # Without tokens, whose next ones are no labels here: the model has outputs for the answers only.
        "evaluation": summary(decomposition, [Batch(all_sums())]),
        "cpu_seconds": round(seconds, 1),
        "settings": config.to_json(),
    }


def main() -> None:
    """Run one of the two and print its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("induction", "modular_addition"))
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--C", type=int, help="subcomponents of every matrix (half as many for W_E); default 32")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--gate-lr", type=float)
    parser.add_argument("--minimality", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = run_induction(args) if args.name == "induction" else run_modular_addition(args)
    result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformer_lens")}
    result["command"] = " ".join(["python", "benchmarks/toy_transformers.py", *sys.argv[1:]])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

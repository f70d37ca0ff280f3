"""SPD on the two transformers with known mechanisms; prints one JSON object, and writes it with `--out`.

    python experiments/toy_transformers.py induction
    python experiments/toy_transformers.py modular_addition
    python experiments/toy_transformers.py gates_alone

**induction**: all eight attention matrices, attention gates. The check, by accuracy at predictable positions and by
KL: masks of the used subcomponents 0, all else on (the skill should go); masks of all others 0, delta on (it should
stay); only the used ones, also without delta; the used ones always on and all else an adversary's choice. The
baseline is the number of singular vectors that each matrix needs, with the same adversary. By head: a subcomponent
belongs to the head that holds most of the squared norm of its `U` (of its `V` for `W_O`).

**modular_addition**: `W_E`, `W_in` and `W_out`, with the two outputs that were never trained silenced
(`only_the_answer`). For every used subcomponent the share that its best Fourier frequency explains: of `V` over the
numbers (`W_E`), of its activation over all questions (`W_in`), of its effect on the logits over the answers
(`W_out`); the same for as many singular vectors and for random directions of the same space as baselines.

**gates_alone**: the same three matrices with hand-made subcomponents that stay as they are
(`experiments/known_subcomponents.py`): aligned with the frequencies, rotated across their planes, one subcomponent per
number in `W_E`, singular vectors. Gates are trained for each; the losses say which subcomponents the objective
prefers, whatever training would find.

What is used and always on: `experiments/toy_checks.py`. Cost: one to three CPU-minutes each. Needs transformer_lens 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.known_subcomponents import (
    FourierKind,
    fourier_subcomponents,
    put_subcomponents,
    rotated_subcomponents,
    singular_subcomponents,
)
from experiments.toy_checks import (
    always_on,
    counts,
    divergence_with,
    firing_rates,
    nothing,
    objective,
    others,
    singular_ranks,
    summary,
    used_ids,
)
from spd_lens import Decomposition, decompose
from spd_lens.baselines import NO_LR, train_gates
from spd_lens.data import Batch
from spd_lens.models import (
    ModularSums,
    P,
    RepeatedSequences,
    all_sums,
    fourier_reading,
    frequency_shares,
    grid_frequency_shares,
    head_roles,
    induction_accuracy,
    load_induction,
    load_modular_addition,
    only_the_answer,
    sum_accuracy,
)
from spd_lens.objective import Persistent
from spd_lens.support import write_json
from spd_lens.training import Reconstruction, TrainConfig, train

TEST_SEED = 1_000_003
# A matrix cut to its first singular vectors is good enough if this little KL is lost.
RANK_KL = 0.01
MODULAR_SITES = {"embed.W_E": P + 1, "blocks.0.mlp.W_*": 64}


def settings(name: str, args: argparse.Namespace) -> TrainConfig:
    """Return the training choices; what is given on the command line replaces the default."""
    terms = [Reconstruction(), Reconstruction(routing="subset" if name == "induction" else "layerwise")]
    if args.adversary > 0 and name != "gates_alone":  # `train_many` has no adversaries
        terms.append(Reconstruction(masks=Persistent(warm_steps=1), coefficient=args.adversary))
    return TrainConfig(
        steps=args.steps, lr=NO_LR if args.frozen else args.lr, gate_lr=args.gate_lr, minimality=args.minimality,
        faithfulness=args.faithfulness, reconstructions=tuple(terms), checkpoint_every=None, log_every=100,
        seed=args.seed,
    )  # fmt: skip


def start(decomposition: Decomposition, kind: str, seed: int) -> None:
    """Put the subcomponents that training starts from: exact sums, or what `decompose` has drawn."""
    weights = {name: weight.target_weight for name, weight in decomposition.items()}
    if kind == "singular":
        put_subcomponents(decomposition, singular_subcomponents(weights))
    elif kind == "rotated":
        put_subcomponents(decomposition, rotated_subcomponents(weights, seed))


def fit(decomposition: Decomposition, batches: Iterable[Tensor], config: TrainConfig) -> float:
    """Train; return the CPU seconds it took."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        train(decomposition, batches, config, out_dir=directory)
    return time.process_time() - started


# -- induction -------------------------------------------------------------------------------------------------------


def head_shares(decomposition: Decomposition, name: str, c: int, n_heads: int) -> Tensor:
    """Shares of the squared norm of `U_c` (`V_c` for `W_O`) that lie in each head."""
    weight = decomposition[name]
    vector = weight.V[:, c] if name.endswith("W_O") else weight.U[c]
    norms = vector.detach().reshape(n_heads, -1).square().sum(1)
    return norms / norms.sum()


@torch.no_grad()
def check_induction(decomposition: Decomposition) -> dict[str, Any]:
    """Return the ablation check, and where the used subcomponents are."""
    model, tokens = decomposition.model, RepeatedSequences(256, seed=TEST_SEED).batch(0)

    def effect(hooks: list[Any]) -> dict[str, float]:
        accuracy = induction_accuracy(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens)
        return {"accuracy": accuracy, "kl": divergence_with(decomposition, tokens, hooks)}

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
                "without_used": effect(decomposition.ablate(own)),
            }
    return {
        "previous_token_head": roles.previous_token_head,
        "induction_head": roles.induction_head,
        "used": counts(used),
        "on_at_half_of_positions": {name: int((rate > 0.5).sum()) for name, rate in rates.items()},
        "target": effect([]),
        "without_used": effect(decomposition.ablate(used)),
        "without_others": effect(decomposition.ablate(others(decomposition, used))),
        "only_used": effect(decomposition.keep(used)),
        "used_always_on": always_on(decomposition, used, tokens[:128]),
        "nothing_on": always_on(decomposition, nothing(used), tokens[:128]),
        "heads": heads,
    }


def induction_baseline() -> dict[str, Any]:
    """Return how many singular vectors each matrix needs, and what they reach when they are always on."""
    singular = decompose(load_induction(), {"blocks.*.attn.W_[QKVO]": 64})
    start(singular, "singular", 0)
    tokens = RepeatedSequences(128, seed=TEST_SEED).batch(0)
    ids = singular_ranks(singular, tokens, RANK_KL)
    with torch.no_grad():
        logits = singular.model.run_with_hooks(tokens, fwd_hooks=singular.keep(ids))
    return {
        "rule": f"the smallest number that leaves a KL under {RANK_KL} when one matrix is cut to it",
        "needed": counts(ids),
        "all_cut": {
            "accuracy": induction_accuracy(logits, tokens),
            "kl": divergence_with(singular, tokens, singular.keep(ids)),
        },
        "always_on": always_on(singular, ids, tokens),
    }


def run_induction(args: argparse.Namespace) -> dict[str, Any]:
    """Decompose the induction model and check it."""
    decomposition = decompose(
        load_induction(), {"blocks.*.attn.W_[QKVO]": 64}, gate="attention", gate_width=32, seed=args.seed
    )
    start(decomposition, args.start, args.seed)
    config = settings("induction", args)
    seconds = fit(decomposition, RepeatedSequences(args.batch or 16, seed=args.seed), config)
    if args.save is not None:
        decomposition.save_pretrained(args.save)
    held_out = [RepeatedSequences(64, seed=TEST_SEED).batch(i) for i in range(2)]
    return {
        "check": check_induction(decomposition),
        "singular_vectors": induction_baseline(),
        "loss": objective(decomposition, held_out, config),
        "evaluation": summary(decomposition, held_out),
        "cpu_seconds": round(seconds, 1),
        "settings": config.to_json(),
    }


# -- modular addition ------------------------------------------------------------------------------------------------


def modular_model() -> Any:
    """The target, with logits at "=" alone."""
    model = load_modular_addition()
    model.add_perma_hook("unembed.hook_out", only_the_answer)  # pyright: ignore[reportArgumentType]
    return model


@torch.no_grad()
def best_shares(model: Any, residual: Tensor, name: str, V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """For columns of V and rows of U: the share of the best frequency, and this frequency less 1."""
    if name == "embed.W_E":
        return frequency_shares(V[:P].T).max(-1)
    if name.endswith("W_in"):
        return grid_frequency_shares((residual @ V).reshape(P, P, -1)).max(-1)
    return frequency_shares(U @ model.W_U).max(-1)


@torch.no_grad()
def where_it_counts(decomposition: Decomposition, sums: Tensor) -> dict[str, Tensor]:
    """Importances at the positions that matter: numbers are read at the first two, neurons at the last."""
    g = decomposition.importance(sums)
    return {name: v[:, :2] if name == "embed.W_E" else v[:, 2:] for name, v in g.items()}


@torch.no_grad()
def check_modular_addition(decomposition: Decomposition) -> dict[str, Any]:
    """Return accuracy under ablations, and how much of each used subcomponent its best frequency explains."""
    model, sums = decomposition.model, all_sums()

    def effect(hooks: list[Any]) -> dict[str, float]:
        accuracy = sum_accuracy(model.run_with_hooks(sums, fwd_hooks=hooks), sums)
        return {"accuracy": accuracy, "kl": divergence_with(decomposition, sums, hooks)}

    importances = where_it_counts(decomposition, sums)
    rates = firing_rates(importances)
    used = used_ids(rates)
    _, cache = model.run_with_cache(sums, names_filter="blocks.0.hook_resid_mid")
    residual = cache["blocks.0.hook_resid_mid"][:, -1]
    weights = {name: weight.target_weight for name, weight in decomposition.items()}
    singular = {name: (V.float(), U.float()) for name, (V, U) in singular_subcomponents(weights).items()}
    subcomponents, shares = {}, {}
    for name, ids in used.items():
        weight, generator = decomposition[name], torch.Generator().manual_seed(0)
        best, where = best_shares(model, residual, name, weight.V[:, ids], weight.U[ids])
        subcomponents[name] = [
            {"id": c, "rate": float(rates[name][c]), "frequency": int(k) + 1, "share": float(share)}
            for c, k, share in zip(ids, where, best, strict=True)
        ]
        V, U = singular[name]
        # Random mixtures in the space that the matrix itself reads from or writes to.
        W = weights[name]
        mixed_V = W @ torch.randn(W.shape[1], 256, generator=generator)
        mixed_U = torch.randn(256, W.shape[0], generator=generator) @ W
        n = max(1, len(ids))
        importance = importances[name].mean((0, 1))[ids]
        shares[name] = {
            "used": float(best.mean()) if ids else 0.0,
            "used, by mean importance": float((best * importance).sum() / importance.sum()) if ids else 0.0,
            "singular vectors": float(best_shares(model, residual, name, V[:, :n], U[:n])[0].mean()),
            "random mixtures": float(best_shares(model, residual, name, mixed_V, mixed_U)[0].mean()),
        }
    return {
        "key_frequencies": fourier_reading(model).key_frequencies,
        "used": counts(used),
        "mean_sum_of_importance": {name: float(g.sum(-1).mean()) for name, g in importances.items()},
        "mean_best_share": shares,
        "target": effect([]),
        "without_used": effect(decomposition.ablate(used)),
        "without_others": effect(decomposition.ablate(others(decomposition, used))),
        "only_used": effect(decomposition.keep(used)),
        "used_always_on": always_on(decomposition, used, sums[::4]),
        "nothing_on": always_on(decomposition, nothing(used), sums[::4]),
        "subcomponents": subcomponents,
    }


def run_modular_addition(args: argparse.Namespace) -> dict[str, Any]:
    """Decompose the modular addition model and check it."""
    decomposition = decompose(modular_model(), MODULAR_SITES, gate="scalar", gate_width=16, seed=args.seed)
    start(decomposition, args.start, args.seed)
    config = settings("modular_addition", args)
    seconds = fit(decomposition, ModularSums(args.batch or 256, seed=args.seed), config)
    if args.save is not None:
        decomposition.save_pretrained(args.save)
    return {
        "check": check_modular_addition(decomposition),
        "loss": objective(decomposition, [all_sums()], config),
        # Without tokens, whose next ones are no labels here: the model has outputs for the answers only.
        "evaluation": summary(decomposition, [Batch(all_sums()[::4])]),
        "cpu_seconds": round(seconds, 1),
        "settings": config.to_json(),
    }


def run_gates_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Train gates on hand-made subcomponents of the modular addition model and compare the losses."""
    kinds: list[tuple[FourierKind | None, int]] = [
        ("aligned", 0), ("across planes", 0), ("across planes", 100), ("rows", 0), (None, 0),
    ]  # fmt: skip
    members = []
    for kind, seed in kinds:
        decomposition = decompose(modular_model(), MODULAR_SITES, gate="scalar", gate_width=16, seed=args.seed)
        if kind is None:
            start(decomposition, "singular", 0)
        else:
            put_subcomponents(decomposition, fourier_subcomponents(decomposition.model, kind, seed))
        members.append(decomposition)
    config = settings("gates_alone", args)
    started = time.process_time()
    batches = [ModularSums(args.batch or 256, seed=args.seed)] * len(members)
    train_gates(members, batches, config)
    seconds = time.process_time() - started
    rows = []
    for (kind, seed), decomposition in zip(kinds, members, strict=True):
        check = check_modular_addition(decomposition)
        rows.append(
            {"subcomponents": kind or "singular", "seed": seed, "loss": objective(decomposition, [all_sums()], config)}
            | {key: check[key] for key in ("used", "mean_sum_of_importance", "mean_best_share")}
            | {"adversarial": summary(decomposition, [Batch(all_sums()[::4])], adversary_steps=(20,))["adversarial"]}
        )
    return {"rows": rows, "cpu_seconds": round(seconds, 1), "settings": config.to_json()}


RUNS = {"induction": run_induction, "modular_addition": run_modular_addition, "gates_alone": run_gates_alone}


def main(arguments: list[str] | None = None) -> None:
    """Run one of the three, print its JSON, write it where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=tuple(RUNS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--start", choices=("singular", "rotated", "drawn"), default="singular")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--gate-lr", type=float, default=1e-2)
    parser.add_argument("--minimality", type=float, default=5e-3)
    parser.add_argument("--faithfulness", type=float, default=0.0)
    parser.add_argument("--adversary", type=float, default=0.5, help="coefficient of the persistent adversary")
    parser.add_argument("--frozen", action="store_true", help="train the gates alone, on the subcomponents of --start")
    parser.add_argument("--batch", type=int, help="rows; default 16 sequences, 256 sums")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--save", type=Path, help="directory for the decomposition")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": " ".join(["python", "experiments/toy_transformers.py", *(arguments or sys.argv[1:])])
    }
    result |= RUNS[args.name](args)
    result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformer_lens")}
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()

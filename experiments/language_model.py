"""The tiny language model, all 12 matrices of its two blocks, decomposed so that it holds against an adversary.

    python experiments/language_model.py train --coefficient 6e-4 --seed 0    # hours; a killed run goes on where it was
    python experiments/language_model.py evaluate RUN                         # minutes

Recipe: one gate over all sites (a transformer of the target's own size that looks both ways), smooth L0 with its
frequency term, relative faithfulness, and one masked pass a step in which half of the rows is under a persistent
adversary with sources by position and the other half under stochastic masks with subset routing. Trained on the
whaling book's training chapters, evaluated on its held-out ones, windows of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from spd_lens import Decomposition, Reconstruction, TokenBatches, TrainConfig, decompose, evaluate, pack_tokens, train
from spd_lens.models import load_moby_dick, load_tiny_lm
from spd_lens.objective import Merged, Persistent
from spd_lens.support import library_versions

# Published ratios for language models: multiples of d_model 128 and d_mlp 512.
SUBCOMPONENTS = {
    "blocks.*.attn.W_[QK]": 192,
    "blocks.*.attn.W_V": 256,
    "blocks.*.attn.W_O": 320,
    "blocks.*.mlp.W_in": 768,
    "blocks.*.mlp.W_out": 640,
}
CONTEXT = 128


def decomposed(seed: int, scale: float) -> Decomposition:
    """The tiny language model with all matrices of its blocks decomposed, C at `scale` times the published ratios."""
    counts: dict[str, int | None] = {pattern: round(scale * count) for pattern, count in SUBCOMPONENTS.items()}
    return decompose(
        load_tiny_lm(),
        counts,
        gate="global",
        gate_width=128,
        gate_options={"n_blocks": 2, "n_heads": 4, "causal": False},
        init="exact" if scale >= 1 else "normal",
        seed=seed,
    )


def configuration(coefficient: float, steps: int, seed: int, rows: int) -> TrainConfig:
    """The recipe for one coefficient of minimality; `rows` of a batch are even, half of them adversarial."""
    adversary = Merged(0.5, Persistent(warm_steps=1, scope="position", lr_warmup=0.025))
    return TrainConfig(
        steps=steps,
        lr=1e-3,
        lr_end=0.1,
        lr_warmup=100,
        clip_subcomponents=1.0,
        clip_gates=1.0,
        faithfulness=1e3,
        relative_faithfulness=True,
        minimality=coefficient,
        penalty="smooth_l0",
        frequency=coefficient / 2,
        frequency_reference=32_768,
        reconstructions=(Reconstruction(masks=adversary, routing="subset"),),
        seed=seed,
        log_every=20,
        checkpoint_every=100,
    )


def text_windows(split: str) -> torch.Tensor:
    """Windows `[n 128]` of the whaling book: a BOS and 127 tokens of text, as the model was trained on."""
    tokenizer = load_tiny_lm().tokenizer
    return pack_tokens([load_moby_dick(split)], tokenizer, CONTEXT, prepend_bos=True)  # pyright: ignore


def train_run(args: argparse.Namespace) -> dict[str, Any]:
    """Train one run, or go on with it where it was; returns the last line of its log."""
    out = args.out or Path("runs/language_model") / f"c{args.coefficient:g}-s{args.seed}-x{args.scale:g}-n{args.steps}"
    decomposition = decomposed(args.seed, args.scale)
    batches = TokenBatches(text_windows("train"), batch_size=args.rows, seed=args.seed)
    config = configuration(args.coefficient, args.steps, args.seed, args.rows)
    place: dict[str, Any] = {"resume_from" if (out / "checkpoints").exists() else "out_dir": out}
    result = train(decomposition, batches, config, **place)
    if not result.interrupted:
        decomposition.save_pretrained(out / "decomposition")
    return {"out": str(out), "steps": result.steps, "final": result.final}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one run")
    training.add_argument("--coefficient", type=float, default=6e-4)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--scale", type=float, default=1.0, help="C as a multiple of the published ratios")
    training.add_argument("--steps", type=int, default=20_000)
    training.add_argument("--rows", type=int, default=4, help="rows of 128 tokens in a batch")
    training.add_argument("--out", type=Path)
    measuring = commands.add_parser("evaluate", help="measure a saved decomposition; prints one JSON object")
    measuring.add_argument("saved", type=Path)
    measuring.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    if args.command == "train":
        print(json.dumps(train_run(args), indent=2))
        return
    decomposition = Decomposition.from_pretrained(args.saved, load_tiny_lm())
    batches = list(text_windows("held_out")[: args.rows].split(16))
    report = evaluate(decomposition, batches, max_batches=len(batches))
    print(json.dumps({"versions": library_versions(), "report": report.to_json()}, indent=2))


if __name__ == "__main__":
    main()

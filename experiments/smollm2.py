"""Attention and MLP of one block of SmolLM2-135M, decomposed by local training, checked against the logits.

    python experiments/smollm2.py train --block 3 --steps 1500 --out RUN    # a killed run goes on where it was
    python experiments/smollm2.py train --device cuda --cuda-graphs --host hooked --rows 32 --steps 6000 --out RUN
    python experiments/smollm2.py evaluate RUN --json                       # KL on the logits, adversary, deletion

Local training: what is reconstructed is the residual stream behind the block, read by a tuned read-out (the root of the
Fisher information that the logits have about it), so that a step costs one block wherever it stands and its loss is in
nats. Recipe as in `language_model.py`: a global gate, smooth L0 with its frequency term, relative faithfulness, and a
merged pass with a persistent adversary. Weights: Q4_1 dequantised. Text: Moby Dick, windows of 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.graphed import train_graphed
from spd_lens import (
    Decomposition,
    Reconstruction,
    TokenBatches,
    TrainConfig,
    cache_residuals,
    decompose,
    evaluate,
    pack_tokens,
    train,
)
from spd_lens.evaluation import EvaluationReport
from spd_lens.models import HostName, load_moby_dick, load_smollm2
from spd_lens.objective import Merged, Persistent
from spd_lens.support import library_versions, read_tensors, write_tensors
from spd_lens.training import TunedReadout, tune_readout

CONTEXT = 64


def decomposed(block: int, gate_width: int, seed: int, device: str = "cpu", host: HostName = "bridge") -> Decomposition:
    """All seven matrices of a block, as many subcomponents as each one's rank bound, started at its own singular
    vectors."""
    model: Any = load_smollm2(device, host=host)
    counts: dict[str, int | None] = {
        f"blocks.{block}.attn.W_[QO]": 576,
        f"blocks.{block}.attn.W_[KV]": 192,
        f"blocks.{block}.mlp.W_*": 576,
    }
    gate = {"n_blocks": 1, "n_heads": 4, "causal": False}
    found = decompose(
        model, counts, gate="global", gate_width=gate_width, gate_options=gate, init="singular", seed=seed
    )
    start_on(found)
    return found


@torch.no_grad()
def start_on(decomposition: Decomposition) -> None:
    """Let the global gate begin with nearly everything on: masks then cost next to nothing, and what is not needed is
    switched off from there, under the adversary all the time. For runs too short to recover from a random start."""
    own = dict(decomposition.gates.named_parameters())
    for name, parameter in own.items():
        if name.endswith("w_out"):
            parameter.mul_(0.1)
        if name.endswith("b_out"):
            parameter.fill_(0.9)


def windows_of(model: Any, text: str, count: int) -> torch.Tensor:
    """`count` windows of `CONTEXT` tokens, taken evenly over the text."""
    rows = pack_tokens([text], model.tokenizer, CONTEXT)
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def configuration(block: int, readout: TunedReadout, steps: int, minimality: float, seed: int) -> TrainConfig:
    """The language model's recipe, on the stream behind the block."""
    adversary = Merged(0.5, Persistent(warm_steps=1, scope="position", lr_warmup=0.025))
    return TrainConfig(
        steps=steps,
        lr=2e-3,
        gate_lr=5e-3,
        lr_end=0.1,
        lr_warmup=min(100, steps // 20),
        clip_subcomponents=1.0,
        clip_gates=1.0,
        faithfulness=1e3,
        relative_faithfulness=True,
        minimality=minimality,
        penalty="smooth_l0",
        gamma_end=0.05,
        frequency=minimality / 2,
        frequency_reference=32_768,
        reconstructions=(Reconstruction(masks=adversary, routing="subset"),),
        stop_at=block + 1,
        divergence="mse",
        readout=readout,
        seed=seed,
        log_every=20,
        checkpoint_every=50,
    )


def train_run(args: argparse.Namespace) -> dict[str, Any]:
    """Train one run, or go on with it where it was."""
    decomposition = decomposed(args.block, args.gate_width, args.seed, args.device, args.host)
    text = windows_of(decomposition.model, load_moby_dick("train"), args.windows)
    batches = cache_residuals(decomposition, TokenBatches(text, args.rows, seed=args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    if (kept := args.out / "readout.safetensors").exists():
        readout = TunedReadout(read_tensors(kept)["matrix"].to(decomposition.device))
    else:
        tuning = TokenBatches(text[:: max(1, len(text) // 16)][:16], 4)
        readout = tune_readout(decomposition, tuning, args.block + 1, max_batches=4)
        write_tensors(kept, {"matrix": readout.matrix.cpu()})
    config = configuration(args.block, readout, args.steps, args.minimality, args.seed)
    if args.cuda_graphs:
        began = time.perf_counter()
        final = train_graphed(decomposition, batches, config, args.out, max(100, args.steps // 20))
        seconds = time.perf_counter() - began
        save(decomposition, args)
        return {"out": str(args.out), "steps": config.steps, "seconds": seconds, "final": final}
    run = args.out / "run"
    place: dict[str, Any] = {"resume_from" if (run / "checkpoints").exists() else "out_dir": run}
    began = time.perf_counter()
    result = train(decomposition, batches, config, **place)
    save(decomposition, args)
    return {"out": str(args.out), "steps": result.steps, "seconds": time.perf_counter() - began, "final": result.final}


@torch.no_grad()
def save(decomposition: Decomposition, args: argparse.Namespace) -> None:
    """As it is, or with every number as bfloat16 has it, which halves its size when packed."""
    if args.rounded:
        for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
            p.copy_(p.to(torch.bfloat16).to(p.dtype))
    decomposition.save_pretrained(args.out / "decomposition")


def measured(
    decomposition: Decomposition, rows: int, ladder: tuple[int, ...], starts: int, at_once: int = 4
) -> EvaluationReport:
    """On held-out chapters, against the logits; needs for the deletion test also from training chapters."""
    model = decomposition.model
    held_out = windows_of(model, load_moby_dick("held_out"), rows)
    sample = list(windows_of(model, load_moby_dick("train"), 2 * rows).split(at_once))
    return evaluate(
        decomposition,
        cache_residuals(decomposition, TokenBatches(held_out, min(at_once, rows))),
        max_batches=-(-rows // at_once),
        adversary_steps=ladder,
        starts=starts,
        deletion_sample=sample,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train one run")
    training.add_argument("--block", type=int, default=3)
    training.add_argument("--minimality", type=float, default=4e-4)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--rows", type=int, default=2, help="rows of 64 tokens in a batch")
    training.add_argument("--windows", type=int, default=400, help="of 64 tokens to train on")
    training.add_argument("--gate-width", type=int, default=128)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--device", default="cpu")
    training.add_argument("--host", choices=("bridge", "hooked"), default="bridge", help="CUDA graphs need hooked")
    training.add_argument("--rounded", action="store_true", help="save numbers that bfloat16 has")
    training.add_argument("--cuda-graphs", action="store_true", help="every step a CUDA graph; no checkpoints")
    measuring = commands.add_parser("evaluate", help="measure a run's decomposition")
    measuring.add_argument("run", type=Path)
    measuring.add_argument("--rows", type=int, default=8)
    measuring.add_argument("--ladder", type=int, nargs="*", default=(20,))
    measuring.add_argument("--starts", type=int, default=1)
    measuring.add_argument("--device", default="cpu")
    measuring.add_argument("--host", choices=("bridge", "hooked"), default="bridge", help="CUDA graphs need hooked")
    measuring.add_argument("--at-once", type=int, default=4, help="rows in a batch")
    measuring.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.command == "train":
        print(json.dumps(train_run(args), indent=2))
        return
    decomposition = Decomposition.from_pretrained(args.run / "decomposition", load_smollm2(args.device, host=args.host))
    report = measured(decomposition, args.rows, tuple(args.ladder), args.starts, args.at_once)
    if not args.json:
        print(report)
        return
    record = {"versions": library_versions(), "training": decomposition.training_record}
    print(json.dumps(record | {"report": report.to_json()}, indent=2))


if __name__ == "__main__":
    main()

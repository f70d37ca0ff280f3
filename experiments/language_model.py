"""The tiny language model, all 12 matrices of its two blocks, decomposed so that it holds against an adversary.

    python experiments/language_model.py train --coefficient 6e-4 --seed 0    # hours; a killed run goes on where it was
    python experiments/language_model.py evaluate RUN                         # minutes
    python experiments/language_model.py --json                               # the shipped one, measured afresh
    python experiments/language_model.py train --cuda-graphs --rows 32 --steps 7000    # minutes on a large GPU

Recipe: one gate over all sites (a transformer of the target's own size that looks both ways), smooth L0 with its
frequency term, relative faithfulness, and one masked pass a step in which half of the rows is under a persistent
adversary with sources by position and the other half under stochastic masks with subset routing. Trained half on the
whaling book's training chapters and half on texts that the model itself writes (it has two sources, of which one is not
shipped), evaluated on the book's held-out chapters, windows of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.graphed import train_graphed
from spd_lens import Decomposition, Reconstruction, TokenBatches, TrainConfig, decompose, evaluate, pack_tokens, train
from spd_lens.baselines import NO_LR, fixed_factors
from spd_lens.evaluation import EvaluationReport
from spd_lens.models import load_moby_dick, load_tiny_lm
from spd_lens.objective import Merged, Persistent, Scope
from spd_lens.support import library_versions

# Published ratios for language models: multiples of d_model 128 and d_mlp 512.
SUBCOMPONENTS = {
    "blocks.*.attn.W_[QK]": 192,
    "blocks.*.attn.W_V": 256,
    "blocks.*.attn.W_O": 320,
    "blocks.*.mlp.W_in": 768,
    "blocks.*.mlp.W_out": 640,
}
# An option: the matrices that read and write tokens.
EMBEDDING = {"embed.W_E": 256, "unembed.W_U": 256}
CONTEXT, VOCABULARY = 128, 2048
LADDER = (20, 40, 80, 160)


def decomposed(
    seed: int, scale: float, gate_width: int = 128, device: str = "cpu", embedding: bool = False
) -> Decomposition:
    """The tiny language model with all matrices of its blocks decomposed, C at `scale` times the published ratios.

    With `embedding` its embedding and unembedding, too.
    """
    sites = SUBCOMPONENTS | (EMBEDDING if embedding else {})
    counts: dict[str, int | None] = {pattern: round(scale * count) for pattern, count in sites.items()}
    return decompose(
        load_tiny_lm(device),
        counts,
        gate="global",
        gate_width=gate_width,
        gate_options={"n_blocks": 2, "n_heads": 4, "causal": False},
        init="exact" if scale >= 1 else "normal",
        seed=seed,
    )


def fix(decomposition: Decomposition, kind: Literal["svd", "random"], seed: int) -> None:
    """Put subcomponents in that nobody learnt: singular vectors or random ones, which add up to the matrices too."""
    with torch.no_grad():
        for index, weight in enumerate(decomposition.values()):
            V, U = fixed_factors(weight.target_weight, kind, weight.n_subcomponents, seed * 1_000_003 + index)
            weight.V.copy_(V)
            weight.U.copy_(U)


def configuration(
    coefficient: float, steps: int, seed: int, *, scope: Scope = "position", source_lr: float = 0.01
) -> TrainConfig:
    """The recipe for one coefficient of minimality; half of a batch's rows are adversarial."""
    adversary = Merged(0.5, Persistent(warm_steps=1, lr=source_lr, scope=scope, lr_warmup=0.025))
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


def text_windows(split: Literal["train", "held_out"]) -> torch.Tensor:
    """Windows `[n 128]` of the whaling book: a BOS and 127 tokens of text, as the model was trained on."""
    tokenizer = load_tiny_lm().tokenizer
    return pack_tokens([load_moby_dick(split)], tokenizer, CONTEXT, prepend_bos=True)  # pyright: ignore


def training_windows(device: str, seed: int, most: int | None = None) -> torch.Tensor:
    """The book's training chapters cut at four offsets, and as many windows that the model writes, `[n 128]`.

    `most`: only so many of each kind, drawn by `seed`; for short runs, which would not get to the others.
    """
    windows = text_windows("train")
    bos, text = windows[0, :1], windows[:, 1:].flatten()
    cut = [text[offset:] for offset in range(0, CONTEXT - 1, CONTEXT // 4)]
    rows = torch.cat([t[: len(t) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1) for t in cut])
    real = torch.cat([bos.expand(len(rows), 1), rows], dim=1)
    if most is not None:
        real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:most]]
    return torch.cat([real, written_windows(len(real), device, seed)])


def written_windows(n: int, device: str, seed: int, at_once: int = 4096) -> torch.Tensor:
    """Texts that the model writes at temperature 1 after a BOS, `[n 128]`."""
    model = load_tiny_lm(device)
    bos = text_windows("held_out")[:1, :1].to(device)
    cuda = [torch.device(device)] if device != "cpu" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed(seed)
        parts: list[Any] = [
            model.generate(
                bos.expand(min(at_once, n - start), 1),
                max_new_tokens=CONTEXT - 1,
                do_sample=True,
                temperature=1.0,
                stop_at_eos=False,
                prepend_bos=False,
                verbose=False,
            )
            for start in range(0, n, at_once)
        ]
    return torch.cat([part.cpu() for part in parts])


def train_run(args: argparse.Namespace) -> dict[str, Any]:
    """Train one run, or go on with it where it was; returns the last line of its log."""
    name = f"c{args.coefficient:g}-s{args.seed}-x{args.scale:g}-n{args.steps}-{args.fixed or 'spd'}"
    out = args.out or Path("runs/language_model") / name
    if args.start is None:
        decomposition = decomposed(args.seed, args.scale, args.gate_width, args.device, args.embedding)
    else:
        decomposition = Decomposition.from_pretrained(args.start, load_tiny_lm(args.device))
    config = configuration(args.coefficient, args.steps, args.seed, scope=args.scope, source_lr=args.source_lr)
    if args.start is not None:
        # What is trained already goes on where the anneal ended.
        config = config.changed(lr=args.lr, gamma_start=config.gamma_end)
    if args.fixed is not None:
        config = config.changed(lr=NO_LR, gate_lr=config.lr, faithfulness=0.0, clip_subcomponents=None)
        fix(decomposition, args.fixed, args.seed)
    batches = TokenBatches(training_windows(args.device, args.seed, args.windows), batch_size=args.rows, seed=args.seed)
    if args.cuda_graphs:
        final = train_graphed(decomposition, batches, config, out)
        return {"out": str(out), "steps": config.steps, "final": final}
    place: dict[str, Any] = {"resume_from" if (out / "checkpoints").exists() else "out_dir": out}
    result = train(decomposition, batches, config, **place)
    if not result.interrupted:
        decomposition.save_pretrained(out / "decomposition")
    return {"out": str(out), "steps": result.steps, "final": result.final}


def measured(
    decomposition: Decomposition, rows: int, ladder: Sequence[int], starts: int, sample_rows: int = 512
) -> EvaluationReport:
    """The evaluation on held-out chapters: `rows` of 128 tokens; frequencies and needs from the training chapters."""
    training = text_windows("train")
    counts = torch.bincount(training[:, 1:].flatten(), minlength=VOCABULARY)
    return evaluate(
        decomposition,
        list(text_windows("held_out")[:rows].split(16)),
        max_batches=-(-rows // 16),
        adversary_steps=tuple(ladder),
        starts=starts,
        deletion_sample=list(training[:sample_rows].split(16)),
        token_counts=counts,
    )


def shipped_object(report: EvaluationReport) -> dict[str, Any]:
    """The shipped decomposition in one flat object; KLs in nats per position, means over all positions."""
    values = report.log_values()
    attack = report.attack
    assert attack is not None
    names = ("l0", "c_total", "alive", "kl_stochastic", "kl_all_off", "kl_no_delta", "ce_recovered", "kl_deletion")
    return {
        **{name: values[name] for name in names},
        **{f"kl_pgd{steps}": value for steps, value in report.adversarial.items()},
        "pgd_span": {"rows": attack.span_rows, "positions": attack.span_positions, "starts": attack.starts},
        "cross_entropy": {name: report.cross_entropy[name] for name in ("target", "stochastic")},
        "unigram_cross_entropy": report.unigram_cross_entropy,
        "top_changes": report.top_changes["stochastic"],
        "kl_own_union": report.deletion and report.deletion.divergence["own union"],
        "kl_others_union": report.deletion and report.deletion.divergence["others' union"],
        "holds": report.verdict.holds,
        "verdict": str(report.verdict),
        "intervals": {name: report.intervals["divergence"][name] for name in ("stochastic", "all off")},
        "seed": 0,
        "versions": library_versions(),
        "command": "python experiments/language_model.py --json",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="measure the shipped decomposition, print one object")
    commands = parser.add_subparsers(dest="command")
    training = commands.add_parser("train", help="train one run")
    training.add_argument("--coefficient", type=float, default=4e-4)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--scale", type=float, default=1.0, help="C as a multiple of the published ratios")
    training.add_argument("--steps", type=int, default=20_000)
    training.add_argument("--rows", type=int, default=4, help="rows of 128 tokens in a batch")
    training.add_argument("--windows", type=int, help="at most so many of the book, and as many of the model's own")
    training.add_argument("--gate-width", type=int, default=128)
    training.add_argument("--scope", choices=["position", "example", "batch"], default="position", help="of sources")
    training.add_argument("--source-lr", type=float, default=0.01, help="of the persistent adversary")
    training.add_argument("--start", type=Path, help="a saved decomposition to go on with, at --lr")
    training.add_argument("--lr", type=float, default=3e-4, help="with --start")
    training.add_argument("--fixed", choices=["svd", "random"], help="train gates alone on these subcomponents")
    training.add_argument("--embedding", action="store_true", help="decompose embedding and unembedding, too")
    training.add_argument("--device", default="cpu")
    training.add_argument("--cuda-graphs", action="store_true", help="every step a CUDA graph; no checkpoints")
    training.add_argument("--out", type=Path)
    measuring = commands.add_parser("evaluate", help="measure a saved decomposition")
    measuring.add_argument("saved", type=Path)
    for measures in (parser, measuring):
        measures.add_argument("--rows", type=int, default=64, help="rows of 128 tokens: the span of the adversary")
        measures.add_argument("--ladder", type=int, nargs="*", default=LADDER, help="budgets of the adversary")
        measures.add_argument("--starts", type=int, default=2)
        measures.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command == "train":
        print(json.dumps(train_run(args), indent=2))
        return
    if args.command == "evaluate":
        decomposition = Decomposition.from_pretrained(args.saved, load_tiny_lm(args.device))
    else:
        decomposition = load_tiny_lm(args.device, decomposed=True)
    report = measured(decomposition, args.rows, args.ladder, args.starts)
    if args.command == "evaluate":
        print(json.dumps({"versions": library_versions(), "report": report.to_json(per_text=False)}, indent=2))
    else:
        print(json.dumps(shipped_object(report), indent=2) if args.json else report)


if __name__ == "__main__":
    main()

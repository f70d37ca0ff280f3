"""Which families of models can be decomposed: each from a small random checkpoint in its own format.

    python experiments/families.py --json experiments/results/families/families.json

For every family a checkpoint is written with `save_pretrained`, opened by `open_model` from its folder on both hosts,
its blocks are decomposed, masked weights are written into an untouched copy and compared with the same masks as hooks
(the weight oracle: largest difference of logits over their scale), and one training step is taken. Nothing is
downloaded. What is refused is named with its reason. Seed 0.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor

from spd_lens import Decomposition, decompose, train
from spd_lens.hosts import open_host
from spd_lens.models import load_tiny_lm_tokenizer, open_model
from spd_lens.support import library_versions, write_json

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 6}
LLAMA_3: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: transformers.GPT2Config(**{**SIZES, "intermediate_size": None}, n_inner=24),
    "Pythia (GPT-NeoX)": lambda: transformers.GPTNeoXConfig(**{**SIZES, "rotary_pct": 0.5}),
    # Its heads have d_model / n_heads numbers, which HookedTransformer takes for granted.
    "Llama 3": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA_3),
    "Mistral": lambda: transformers.MistralConfig(**SIZES, **GROUPED, sliding_window=4),
    "Qwen 2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "Qwen 3": lambda: transformers.Qwen3Config(**SIZES, **GROUPED),
    "Gemma 2": lambda: transformers.Gemma2Config(**SIZES, **GROUPED, sliding_window=4, query_pre_attn_scalar=4),
    "Gemma 3": lambda: transformers.Gemma3TextConfig(**SIZES, **GROUPED, sliding_window=4, query_pre_attn_scalar=4),
    "Phi-3": lambda: transformers.Phi3Config(**SIZES, num_key_value_heads=2),
    "OPT": lambda: transformers.OPTConfig(**{**SIZES, "intermediate_size": None}, ffn_dim=24, word_embed_proj_dim=16),
    "OLMo 2": lambda: transformers.Olmo2Config(**SIZES, num_key_value_heads=2),
    "Starcoder 2": lambda: transformers.Starcoder2Config(**SIZES, num_key_value_heads=2, sliding_window=4),
}
N = 5
TOLERANCE = 1e-4


def write_checkpoint(family: str, folder: Path) -> Path:
    """A small random model of a family with a tokenizer, in its own format."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            matrix = parameter.ndim == 2
            parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5 if matrix else parameter + 0.2 * noise)
    model.save_pretrained(folder)
    load_tiny_lm_tokenizer().save_pretrained(folder)
    return folder


def tried(folder: Path, host: str) -> dict[str, Any]:
    """What one host makes of a checkpoint: its sites, the oracle's error and a step's loss, or why it is refused."""
    tokens = torch.randint(1, 2000, (2, 7), generator=torch.Generator().manual_seed(1))
    try:
        model: Any = open_model(folder, host=host)  # pyright: ignore[reportArgumentType]
    except (ValueError, NotImplementedError, KeyError, AttributeError, RuntimeError) as error:
        return {"refused": _first_line(error)}
    names = [name for name in open_host(model).site_names() if name.startswith("blocks.")]
    refused: dict[str, str] = {}
    sites = []
    for name in names:
        try:
            decompose(model, {name: N}).remove()
            sites.append(name)
        except ValueError as error:
            refused[name] = _first_line(error)
    found: dict[str, Any] = {"sites": sites, "refused sites": refused}
    if not sites:
        return found | {"refused": next(iter(refused.values()), "it has no sites in blocks")}
    decomposition = decompose(model, dict.fromkeys(sites, N), gate="shared", gate_width=8)
    found["oracle"] = max(_oracle_error(decomposition, folder, host, site, tokens) for site in sites)
    with tempfile.TemporaryDirectory() as run:
        found["loss"] = train(decomposition, [tokens], steps=1, out_dir=Path(run) / "run").final["loss"]
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]


@torch.no_grad()
def _oracle_error(decomposition: Decomposition, folder: Path, host: str, site: str, tokens: Tensor) -> float:
    """Largest difference of logits over their scale: masks as hooks, and the masked weight written into a copy."""
    generator = torch.Generator().manual_seed(5)
    mask, delta = torch.rand(N, generator=generator) * 2 - 0.5, 0.3
    weight = decomposition[site]
    V, U, W = weight.V, weight.U, weight.target_weight
    masked = (V * mask) @ U + delta * (W - V @ U)
    with decomposition.model.hooks(fwd_hooks=decomposition.mask({site: mask}, delta)):
        got = decomposition.model(tokens)
    copy: Any = open_model(folder, host=host)  # pyright: ignore[reportArgumentType]
    before = copy(tokens)
    write_weight(copy, host, site, masked)
    expected = copy(tokens)
    scale = float(expected.abs().max())
    if float((expected - before).abs().max()) < 1e-3 * scale:
        raise RuntimeError(f"{site}: writing the weight changed nothing; the oracle does not see it")
    return float((got - expected).abs().max()) / scale


def write_weight(model: Any, host: str, site: str, W: Tensor) -> None:
    """Put `W [d_in, d_out]` where this host multiplies with it."""
    _, layer, part, short = site.split(".")
    block = model.blocks[int(layer)]
    if host == "hooked":
        module = getattr(block, part)
        # Keys and values of grouped heads are stored once, and repeated on reading.
        target: Any = getattr(module, f"_{short}") if hasattr(module, f"_{short}") else getattr(module, short)
        if short == "W_O":
            target.copy_(W.reshape(target.shape))
        elif part == "attn":
            target.copy_(W.reshape(W.shape[0], target.shape[0], -1).transpose(0, 1))
        else:
            target.copy_(W)
        return
    names = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_gate": "gate", "W_in": "in", "W_out": "out"}
    module = getattr(getattr(block, part), names[short.lstrip("_")]).original_component
    module.weight.copy_(W if type(module).__name__ == "Conv1D" else W.T)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the docs, one line for every family."""
    lines = ["| family | HookedTransformer (3.9) | TransformerBridge |", "|---|---|---|"]
    for family, hosts in results.items():
        lines.append("| " + " | ".join([family, *(_cell(hosts[host]) for host in ("hooked", "bridge"))]) + " |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any]) -> str:
    if "refused" in found:
        return "refused: use the bridge"
    kinds = sorted({site.split(".", 2)[2] for site in found["sites"]})
    left = sorted({site.split(".", 2)[2] for site in found["refused sites"]})
    out = f"; refused: {', '.join(left)}" if left else ""
    return f"{len(kinds)} matrices a block, {found['oracle']:.0e}{out}"


def main(
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Some families only; repeatable.")] = None,
) -> None:
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, Any]] = {}
    for family in only or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(family, Path(folder) / "checkpoint")
            results[family] = {host: tried(checkpoint, host) for host in ("hooked", "bridge")}
        print(family, {host: _cell(found) for host, found in results[family].items()}, flush=True)
    print(table(results))
    for family, hosts in results.items():
        for host, found in hosts.items():
            reasons = {**found.get("refused sites", {}), **({"model": found["refused"]} if "refused" in found else {})}
            for what, why in reasons.items():
                print(f"{family}, {host}, {what}: {why}")
    if json is not None:
        write_json(json, {"families": results, "versions": library_versions(), "seed": 0})


if __name__ == "__main__":
    typer.run(main)

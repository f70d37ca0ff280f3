"""A plan's FLOPs and bytes are those that torch counts in a real step, to 15 %; and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens import PGD, Batch, Decomposition, Reconstruction, TrainConfig, decompose
from spd_lens.models import build_transformer
from spd_lens.training import DEVICES, SHAPES, ModelShape, make_learner, offloading, plan, take_step
from tests.conftest import needs_hooked
from tests.training.counting import counted_flops, peak_bytes

PLAIN = ModelShape(2, 64, 4, 16, 256, 300)
GATED = ModelShape(3, 48, 4, 12, 128, 200, 2, gated=True)
WIDE = ModelShape(2, 32, 2, 16, 64, 4000)
SUBSET = Reconstruction(1.0, "stochastic", "subset")
# Shape, sites, gate and its width, terms.
CASES: dict[str, tuple[ModelShape, dict[str, int | None], str, int, tuple[Reconstruction, ...]]] = {
    "an MLP": (PLAIN, {"blocks.1.mlp.W_*": 200}, "shared", 32, (Reconstruction(),)),
    "all sites, two terms": (PLAIN, {"blocks.*": 96}, "shared", 64, (Reconstruction(), SUBSET)),
    "gated": (GATED, {"blocks.*.mlp.W_*": 64, "blocks.*.attn.W_V": 32}, "shared", 24, (Reconstruction(),)),
    "attention, an adversary": (PLAIN, {"blocks.0.attn.W_[QKVO]": 48}, "vector", 4,
                                (Reconstruction(1.0, PGD(steps=4)),)),
    "a large vocabulary": (WIDE, {"blocks.0.mlp.W_*": 64}, "scalar", 8, (Reconstruction(),)),
}  # fmt: skip
ROWS, CONTEXT = 8, 32


def _model(shape: ModelShape) -> Any:
    config: dict[str, Any] = {
        "n_layers": shape.n_layers, "d_model": shape.d_model, "n_heads": shape.n_heads, "d_head": shape.d_head,
        "d_mlp": shape.d_mlp, "d_vocab": shape.d_vocab, "n_ctx": CONTEXT, "seed": 0,
        "act_fn": "silu" if shape.gated else "gelu", "normalization_type": "RMS" if shape.gated else "LN",
    }  # fmt: skip
    if shape.gated:
        config |= {"gated_mlp": True, "n_key_value_heads": shape.n_key_value_heads, "final_rms": True,
                   "positional_embedding_type": "rotary", "rotary_dim": shape.d_head}  # fmt: skip
    return build_transformer(config)


def _measured(decomposition: Decomposition, config: TrainConfig) -> tuple[int, int]:
    """FLOPs of a step, and the most bytes alive in one, with everything that stays between steps."""
    learner = make_learner(decomposition, config)
    for parameter in decomposition.model.parameters():
        parameter.requires_grad_(False)
    for parameter in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
        parameter.requires_grad_(True)
    batch = Batch(torch.randint(0, decomposition.model.cfg.d_vocab, (ROWS, CONTEXT)))
    take_step(learner, batch, 0)
    flops = counted_flops(lambda: take_step(learner, batch, 1))
    moments = [t for state in learner.optimizer.state.values() for t in state.values()]
    staying = [*{id(p): p for p in decomposition.model.parameters()}.values(), *moments]
    peak = peak_bytes(lambda: take_step(learner, batch, 2), [*staying, *decomposition.model.buffers(), batch.inputs])
    return flops, peak + sum(t.nbytes for t in staying)


@needs_hooked
@pytest.mark.parametrize("name", CASES)
def test_flops_and_bytes_are_within_15_percent_of_what_is_counted(name: str) -> None:
    shape, sites, gate, width, terms = CASES[name]
    config = TrainConfig(reconstructions=terms)
    decomposition = decompose(_model(shape), sites, gate=gate, gate_width=width)  # pyright: ignore[reportArgumentType]
    found = plan(shape, sites, config, batch_size=ROWS, context=CONTEXT, gate=gate, gate_width=width)  # pyright: ignore
    flops, peak = _measured(decomposition, config)
    assert found.flops == pytest.approx(flops, rel=0.15)
    assert found.bytes == pytest.approx(peak, rel=0.15)
    trained = decomposition.subcomponent_parameters() + decomposition.gate_parameters()
    assert found.n_trained == sum(p.numel() for p in trained)


DEEP = ModelShape(4, 64, 4, 16, 256, 300)
OPTIONS: dict[str, dict[str, Any]] = {
    "parts": {"accumulate": 4},
    "gates again": {"recompute": "gates"},
    "passes again": {"recompute": "passes"},
    "parts, all again": {"accumulate": 4, "recompute": "all"},
    "layer-wise": {"reconstructions": (Reconstruction(routing="layerwise"),)},
}


@needs_hooked
@pytest.mark.parametrize("name", OPTIONS)
def test_what_saves_memory_is_planned_to_15_percent(name: str) -> None:
    config = TrainConfig(frequency=1e-3).changed(**OPTIONS[name])
    decomposition = decompose(_model(DEEP), {"blocks.*.mlp.W_*": 128}, gate="shared", gate_width=64)
    found = plan(DEEP, {"blocks.*.mlp.W_*": 128}, config, batch_size=ROWS, context=CONTEXT, gate_width=64)
    flops, peak = _measured(decomposition, config)
    assert found.flops == pytest.approx(flops, rel=0.05)
    assert found.bytes == pytest.approx(peak, rel=0.15)


@needs_hooked
def test_local_training_without_the_blocks_that_no_pass_enters_is_planned() -> None:
    sites = {"blocks.1.mlp.W_*": 128}
    config = TrainConfig(stop_at=2, divergence="relative_mse", offload=True)
    decomposition = decompose(_model(DEEP), sites, gate="shared", gate_width=64)
    found = plan(DEEP, sites, config, batch_size=ROWS, context=CONTEXT, gate_width=64)
    flops, peak = _measured(decomposition, config)
    with offloading.only_entered_blocks(decomposition, None, 2) as unused:
        away = [p for i in unused for p in decomposition.model.blocks[i].parameters()]
    assert unused == [2, 3]
    assert found.flops == pytest.approx(flops, rel=0.05)
    assert found.bytes == pytest.approx(peak - sum(p.nbytes for p in away), rel=0.15)


def test_what_is_shared_out_is_a_ranks_part() -> None:
    """Calculated, as a rank of many cannot be measured here; that it keeps its part is in test_sharding."""
    shape, sites, config = SHAPES["llama-3-8b"], {"blocks.*": None}, TrainConfig(shard=True, precision="bf16")
    one, eight = (plan(shape, sites, config, batch_size=8, gpus=n, target_bytes=2, device="h100") for n in (1, 8))
    for kind in ("V, U and gates", "Adam"):
        assert eight.bytes_by_kind[kind] == one.bytes_by_kind[kind] / 8
    assert "gathered" not in one.bytes_by_kind
    d_in, d_out = 4096, 14336
    assert eight.bytes_by_kind["gathered"] == 3 * 4 * 1.5 * 4096 * (d_in + d_out)
    assert eight.bytes_by_kind["target"] == one.bytes_by_kind["target"]
    assert eight.bytes < one.bytes / 2


def test_ranks_share_rows_and_the_largest_batch_fits_exactly() -> None:
    shape, sites = SHAPES["gpt2"], {"blocks.5.mlp.W_*": 1152}
    one = plan(shape, sites, batch_size=64, device="a100")
    four = plan(shape, sites, batch_size=64, gpus=4, device="a100")
    assert one.tokens_per_second is not None
    assert four.tokens_per_second is not None
    assert four.rows == 16
    assert four.bytes < one.bytes
    assert four.tokens_per_second > 3 * one.tokens_per_second
    assert one.largest_batch == four.largest_batch
    assert one.largest_batch is not None
    assert plan(shape, sites, batch_size=one.largest_batch).bytes <= DEVICES["a100"].memory
    assert plan(shape, sites, batch_size=one.largest_batch + 1).bytes > DEVICES["a100"].memory
    with pytest.raises(ValueError, match="batch_size=64 for 3 ranks; expected a multiple"):
        plan(shape, sites, batch_size=64, gpus=3)


@needs_hooked
def test_a_plan_has_the_sites_that_a_decomposition_has() -> None:
    """Also with grouped keys and values, which TransformerLens stores under other names."""
    decomposition = decompose(_model(GATED), {"blocks.*": None})
    assert GATED.sites({"blocks.*": None}) == {name: w.n_subcomponents for name, w in decomposition.items()}


def test_what_is_not_known_is_refused_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"near: 'gpt2'"):
        ModelShape.of("gpt")
    with pytest.raises(ValueError, match=r"names no matrix of a block; near: 'blocks.0.mlp.W_in'"):
        plan(SHAPES["gpt2"], {"blocks.0.mlp.W_inn": 8})
    with pytest.raises(ValueError, match=r"device='h10'; near: 'h100'"):
        plan(SHAPES["gpt2"], {"blocks.0.mlp.W_in": 8}, device="h10")


@pytest.mark.parametrize(
    ("config", "n_parameters"),
    [
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
          "tie_word_embeddings": True}, 123_532_032),
        ({"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}, 8_029_995_008),
    ],
)  # fmt: skip
def test_shapes_are_read_from_configurations(config: dict[str, Any], n_parameters: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelShape.of(tmp_path).n_parameters() == n_parameters
    with pytest.raises(ValueError, match="none of vocab_size"):
        ModelShape.of_config({k: v for k, v in config.items() if k != "vocab_size"})

"""The training steps that are measured, by name: target, decomposition, configuration, batch and reference.

    build("transformer", gate="scalar", gate_width=16, threads=2)

Targets are random, of realistic scale and the same for the same seed; nothing is downloaded or trained. Arguments
override sizes (`TMSSizes`, `TransformerSizes`) and fields of `TrainConfig`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference import ReferenceStep, replace_linears, weighted_sum
from benchmarks.reference_gate import ReferenceGlobalGate
from benchmarks.reference_models import HuggingFaceLogits, ReferenceTMS, ReferenceTransformer
from spd_lens import Decomposition, TrainConfig, decompose
from spd_lens.data import Batch, TokenBatches, cache_residuals
from spd_lens.objective import PGD, Merged, Persistent
from spd_lens.training import Reconstruction, accumulate_gradients, make_learner


@dataclass(frozen=True)
class TMSSizes:
    """`identity` is the +ID variant; `C` and the gates are those of every site."""

    n_features: int = 5
    n_hidden: int = 2
    identity: bool = False
    batch: int = 4096
    n_subcomponents: int = 20
    gate: str = "scalar"
    gate_width: int = 16


@dataclass(frozen=True)
class TransformerSizes:
    """`sites` are patterns of what is decomposed; `n_batches` only matters where residual streams are cached."""

    n_layers: int = 2
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 512
    d_vocab: int = 1000
    normalization: str | None = "LN"
    batch: int = 8
    pos: int = 64
    n_batches: int = 1
    sites: tuple[str, ...] = ("blocks.*",)
    n_subcomponents: int = 256
    gate: str = "shared"
    gate_width: int = 550


@dataclass(frozen=True)
class RecipeSizes(TransformerSizes):
    """The tiny language model and the gate of all its sites; C comes from `RECIPE_C`, not from `n_subcomponents`."""

    n_subcomponents: int = 0
    d_vocab: int = 2048
    pos: int = 128
    gate: str = "global"
    gate_width: int = 128
    gate_blocks: int = 2
    gate_heads: int = 4


# C as a multiple of `d_model` or `d_mlp`, as `experiments/language_model.py` has it.
RECIPE_C = {"attn.W_[QK]": 1.5, "attn.W_V": 2.0, "attn.W_O": 2.5, "mlp.W_in": 1.5, "mlp.W_out": 1.25}


@dataclass(frozen=True)
class Configuration:
    """One training step to measure; `cached` is `batch` entering at the first decomposed block."""

    name: str
    decomposition: Decomposition
    config: TrainConfig
    batch: Batch
    reference: ReferenceStep | None = None
    cached: Batch | None = None

    @property
    def model(self) -> Any:
        """The target."""
        return self.decomposition.model


class ProductStep:
    """The library's training step as `train` takes it, without logs and checkpoints; the target stays frozen."""

    def __init__(self, decomposition: Decomposition, config: TrainConfig) -> None:
        for p in decomposition.model.parameters():
            p.requires_grad_(False)
        for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters():
            p.requires_grad_(True)
        self.learner = make_learner(decomposition, config)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """All terms of the loss, unweighted; their gradients are then in the parameters."""
        return accumulate_gradients(self.learner, batch, 0)[0]

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return weighted_sum(losses, self.learner.config)

    def step(self, batch: Batch) -> Tensor:
        """One training step; returns the total loss."""
        total = self.total(self.losses(batch))
        self.update()
        return total

    def update(self) -> None:
        """What follows the backward pass."""
        self.learner.optimizer.step()
        self.learner.optimizer.zero_grad(set_to_none=True)
        for source in self.learner.sources.values():
            source.after_backward()

    def gradients(self) -> dict[str, Tensor | None]:
        """What a backward pass left."""
        return {name: p.grad for name, p in self.learner.decomposition.tensors().items()}


# The authors' practice for TMS, and every kind of term at once for language models.
TMS_CONFIG = TrainConfig(
    schedule="constant",
    divergence="mse",
    faithfulness=0.0,
    minimality=3e-3,
    reconstructions=(Reconstruction(), Reconstruction(routing="layerwise")),
)
TRANSFORMER_CONFIG = TrainConfig(
    schedule="constant",
    minimality=1e-3,
    reconstructions=(
        Reconstruction(routing="subset"),
        Reconstruction(masks=PGD(steps=1, step_size=0.1, scope="batch"), routing="subset"),
    ),
)

# `experiments/language_model.py` at the end of its anneal and of its adversary's warm-up, without clipping.
RECIPE_CONFIG = TrainConfig(
    schedule="constant",
    lr=1e-3,
    faithfulness=1e3,
    relative_faithfulness=True,
    minimality=6e-4,
    penalty="smooth_l0",
    gamma_start=0.01,
    frequency=3e-4,
    frequency_reference=32_768,
    reconstructions=(Reconstruction(masks=Merged(0.5, Persistent(scope="position")), routing="subset"),),
)


def tms(name: str, sizes: TMSSizes, config: TrainConfig, dtype: torch.dtype) -> Configuration:
    """TMS with all its sites; features are active with probability 0.05, of value U(0, 1)."""
    from spd_lens.toys import TMS

    model = TMS(sizes.n_features, sizes.n_hidden, identity=sizes.identity, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Trained models have such biases.
        model.b.copy_(-0.1 * torch.rand(sizes.n_features, generator=generator))
    model = model.to(dtype)
    values, chance = (torch.rand(sizes.batch, sizes.n_features, generator=generator) for _ in range(2))
    reference_model = ReferenceTMS(model)
    decomposition = _decompose(model, ("W_*",), sizes)
    batch = Batch((values * (chance < 0.05)).to(dtype))
    paths = {site: site for site in decomposition}
    return _with_reference(Configuration(name, decomposition, config, batch), reference_model, paths)


def transformer(name: str, sizes: TransformerSizes, config: TrainConfig, dtype: torch.dtype) -> Configuration:
    """A HookedTransformer (GELU, learned positions) on random tokens."""
    model = _hooked_transformer(sizes, dtype)
    reference_model = ReferenceTransformer(model)
    configuration = Configuration(name, _decompose(model, sizes.sites, sizes), config, _token_batches(sizes)[0])
    return _with_reference(configuration, reference_model, {site: site for site in configuration.decomposition})


def recipe(name: str, sizes: RecipeSizes, config: TrainConfig, dtype: torch.dtype) -> Configuration:
    """All matrices of a model as large as the tiny language model, with one gate over all sites."""
    model = _hooked_transformer(sizes, dtype)
    reference_model = ReferenceTransformer(model)
    width = {"attn": sizes.d_model, "mlp": sizes.d_mlp}
    counts = {f"blocks.*.{site}": round(c * width[site.split(".")[0]]) for site, c in RECIPE_C.items()}
    options = {"n_blocks": sizes.gate_blocks, "n_heads": sizes.gate_heads, "causal": False}
    decomposition = decompose(model, counts, gate="global", gate_width=sizes.gate_width, gate_options=options)
    configuration = Configuration(name, decomposition, config, _token_batches(sizes)[0])
    if any(isinstance(term.masks, Persistent) for term in config.reconstructions):
        # A term of its own for the adversary, which the reference does not compute.
        return configuration
    return _with_reference(configuration, reference_model, {site: site for site in decomposition})


# Of Starcoder2: no fused matrices, no gated MLP, and unlike OPT it keeps `[batch pos]` in its MLP.
_STARCODER = {
    "attn.W_Q": "self_attn.q_proj", "attn.W_K": "self_attn.k_proj", "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj", "mlp.W_in": "mlp.c_fc", "mlp.W_out": "mlp.c_proj",
}  # fmt: skip


def bridge(name: str, sizes: TransformerSizes, config: TrainConfig, dtype: torch.dtype) -> Configuration:
    """A TransformerBridge around a random Starcoder2 (LayerNorm, GELU, rotary positions, biases everywhere)."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, Starcoder2Config

    hf_config = Starcoder2Config(
        vocab_size=sizes.d_vocab, hidden_size=sizes.d_model, intermediate_size=sizes.d_mlp,
        num_hidden_layers=sizes.n_layers, num_attention_heads=sizes.n_heads, num_key_value_heads=sizes.n_heads,
        max_position_embeddings=sizes.pos, sliding_window=None, use_bias=True, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf_model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval().to(dtype)
    _fill(hf_model, lambda name, shape: shape[1])
    reference_model = HuggingFaceLogits(copy.deepcopy(hf_model))
    # The name only tells TransformerLens the family.
    model = TransformerBridge.boot_transformers(
        "bigcode/starcoder2-3b", hf_model=hf_model, tokenizer=_tokenizer(), device="cpu", dtype=dtype
    )
    configuration = Configuration(name, _decompose(model, sizes.sites, sizes), config, _token_batches(sizes)[0])
    paths = {}
    for site in configuration.decomposition:
        _, layer, within = site.split(".", 2)
        paths[site] = f"model.model.layers.{layer}.{_STARCODER[within]}"
    return _with_reference(configuration, reference_model, paths)


def last_block(name: str, sizes: TransformerSizes, config: TrainConfig, dtype: torch.dtype) -> Configuration:
    """A deep HookedTransformer with only its last MLP decomposed: whole passes against cached residual streams."""
    model = _hooked_transformer(sizes, dtype)
    decomposition = _decompose(model, sizes.sites, sizes)
    whole, cached = _token_batches(sizes, decomposition)
    return Configuration(name, decomposition, config, whole, cached=cached)


Builder = Callable[[str, Any, TrainConfig, torch.dtype], Configuration]
CONFIGURATIONS: dict[str, tuple[Builder, TMSSizes | TransformerSizes, TrainConfig]] = {
    "tms_5_2": (tms, TMSSizes(), TMS_CONFIG),
    "tms_40_10": (
        tms,
        TMSSizes(n_features=40, n_hidden=10, n_subcomponents=200),
        TMS_CONFIG.changed(minimality=1e-4, p_start=2.0),
    ),
    "transformer": (transformer, TransformerSizes(), TRANSFORMER_CONFIG),
    "transformer_scalar": (transformer, TransformerSizes(gate="scalar", gate_width=16), TRANSFORMER_CONFIG),
    "bridge": (bridge, TransformerSizes(), TRANSFORMER_CONFIG),
    "last_block": (
        last_block,
        TransformerSizes(
            n_layers=12, d_model=256, d_mlp=1024, batch=4, n_batches=4, sites=("blocks.11.mlp.*",), gate_width=256
        ),
        TRANSFORMER_CONFIG,
    ),
    "recipe": (recipe, RecipeSizes(), RECIPE_CONFIG),
}


def build(name: str, *, threads: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Configuration:
    """A fresh configuration; `changes` are sizes or fields of `TrainConfig`, `threads` is set for the process."""
    if name not in CONFIGURATIONS:
        raise ValueError(f"no configuration {name!r}; there are {', '.join(CONFIGURATIONS)}")
    builder, sizes, config = CONFIGURATIONS[name]
    of_sizes = {f.name for f in dataclasses.fields(sizes)}
    sizes = dataclasses.replace(sizes, **{k: v for k, v in changes.items() if k in of_sizes})
    config = config.changed(**{k: v for k, v in changes.items() if k not in of_sizes})
    torch.set_num_threads(threads)
    return builder(name, sizes, config, dtype)


# -- parts ----------------------------------------------------------------------------------------------------------


def _decompose(model: nn.Module, sites: tuple[str, ...], sizes: TMSSizes | TransformerSizes) -> Decomposition:
    counts = dict.fromkeys(sites, sizes.n_subcomponents)
    return decompose(model, counts, gate=sizes.gate, gate_width=sizes.gate_width)  # pyright: ignore


def _with_reference(configuration: Configuration, reference_model: nn.Module, paths: dict[str, str]) -> Configuration:
    """Masks are drawn in the order in which a clean pass meets the sites."""
    decomposition = configuration.decomposition
    order = decomposition.clean_pass(configuration.batch.inputs).inputs
    sites = replace_linears(reference_model, {site: paths[site] for site in order}, decomposition)
    gate = None if decomposition.global_gate is None else ReferenceGlobalGate(decomposition.global_gate)
    reference = ReferenceStep(reference_model, sites, configuration.config, gate)
    return dataclasses.replace(configuration, reference=reference)


def _hooked_transformer(sizes: TransformerSizes, dtype: torch.dtype) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=sizes.n_layers, d_model=sizes.d_model, n_heads=sizes.n_heads, d_head=sizes.d_model // sizes.n_heads,
        d_mlp=sizes.d_mlp, d_vocab=sizes.d_vocab, n_ctx=sizes.pos, act_fn="gelu",
        normalization_type=sizes.normalization, device="cpu", init_weights=False, dtype=dtype,
    )  # fmt: skip
    model = HookedTransformer(cfg)

    def fan_in(name: str, shape: torch.Size) -> int:
        if name in ("embed.W_E", "pos_embed.W_pos"):
            return sizes.d_model
        return shape[0] * shape[1] if name.endswith("W_O") else shape[-2]

    _fill(model, fan_in)
    return model


@torch.no_grad()
def _fill(model: nn.Module, fan_in: Callable[[str, torch.Size], int]) -> None:
    """Matrices of N(0, 1 / fan_in), norms near one, small biases, always the same."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1 and not name.rsplit(".", 1)[-1].startswith("b"):
            p.copy_(noise / fan_in(name, p.shape) ** 0.5)
        else:
            p.copy_(0.1 * noise + (1.0 if name.endswith((".w", ".weight")) else 0.0))


def _token_batches(sizes: TransformerSizes, decomposition: Decomposition | None = None) -> list[Batch]:
    """The first batch, and with a decomposition the same one as residual streams."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, sizes.d_vocab, (sizes.n_batches * sizes.batch, sizes.pos), generator=generator)
    whole = TokenBatches(tokens, sizes.batch)
    if decomposition is None:
        return [next(iter(whole))]
    return [next(iter(whole)), next(iter(cache_residuals(decomposition, whole)))]


def _tokenizer() -> Any:
    """TransformerLens wants one, and would download it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="<e>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<e>", eos_token="<e>", pad_token="<e>", unk_token="<e>", add_bos_token=True,
        name_or_path="tiny",
    )  # fmt: skip

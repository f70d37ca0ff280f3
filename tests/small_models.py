"""Small models that many tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from spd_lens import DeclaredSite
from tests.conftest import TL_MAJOR

N_CTX, D_VOCAB = 12, 40


def tiny_transformer(seed: int = 0, n_layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random transformer of 2 blocks: a HookedTransformer on TransformerLens 3, a bridge on 4."""
    if TL_MAJOR >= 4:
        return _tiny_bridge(seed, n_layers).to(dtype)
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=16,
        n_ctx=N_CTX,
        d_head=4,
        n_heads=4,
        d_mlp=32,
        d_vocab=D_VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=seed,
        dtype=dtype,
        device="cpu",  # by default it takes a card where there is one
    )
    model = HookedTransformer(cfg)
    _shake(model, seed)
    return model


def _tiny_bridge(seed: int, n_layers: int) -> nn.Module:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=D_VOCAB, n_positions=N_CTX, n_embd=16, n_layer=n_layers, n_head=4, n_inner=32, bos_token_id=0,
        eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    _shake(model, seed)
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=model, tokenizer=tiny_tokenizer(PreTrainedTokenizerFast)
    )


def tiny_tokenizer(cls: type) -> object:
    """A tokenizer of whole words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, D_VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = "<|endoftext|>"
    # TransformerLens 4 reads `name_or_path` and whether a BOS is added instead of reloading such a tokenizer.
    return cls(
        tokenizer_object=tokenizer, eos_token=special, bos_token=special, pad_token=special, unk_token=special,
        add_bos_token=True, name_or_path="tiny",
    )  # fmt: skip


def _shake(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers in float64."""
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def tokens(n: int, seed: int = 0, length: int = N_CTX) -> Tensor:
    """Random tokens `[n length]`."""
    return torch.randint(0, D_VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


class TiedAutoencoder(HookedRootModule):
    """`relu((x @ W) @ W.T + b)`: a model without positions, with a matrix that two sites share."""

    def __init__(self, n_features: int = 5, d_hidden: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(torch.randn(n_features, d_hidden, generator=generator))
        self.b = nn.Parameter(0.1 * torch.randn(n_features, generator=generator))
        self.hook_hidden = HookPoint()
        self.hook_pre = HookPoint()
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hook_hidden(x @ self.W)
        return torch.relu(self.hook_pre(hidden @ self.W.T + self.b))

    def spd_sites(self) -> list[DeclaredSite]:
        return [
            DeclaredSite("encoder.W", weight="W", input="", output="hook_hidden"),
            DeclaredSite(
                "decoder.W", weight="W", input="hook_hidden", output="hook_pre", bias="b", transposed=True,
                tied_to="encoder.W",
            ),
        ]  # fmt: skip

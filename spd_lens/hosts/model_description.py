"""What a model is: its weights, sizes, HookPoints and tokens. Nothing here runs the model or changes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from spd_lens.hosts.attention import AttentionGeometry
from spd_lens.hosts.provenance import Provenance
from spd_lens.hosts.site import Site
from spd_lens.support.names import near_names


class ModelDescription(ABC):
    """What others ask about a model. It holds nothing but the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.provenance().model_name}, {self.n_layers()} blocks)"

    @abstractmethod
    def site_names(self) -> list[str]:
        """Names of every weight matrix that this model has, whether it can be decomposed or not."""

    @abstractmethod
    def site(self, name: str) -> Site:
        """The site called `name`, which is one of `site_names()`.

        Raises ValueError, naming the weight and the way out, where the swap cannot be exact.
        """

    @abstractmethod
    def provenance(self) -> Provenance:
        """Name, host kind and weight-processing state of the model."""

    def n_layers(self) -> int:
        """Number of blocks; 0 for models without blocks."""
        cfg = getattr(self.model, "cfg", None)
        return int(getattr(cfg, "n_layers", 0) or 0)

    def vocabulary_size(self) -> int | None:
        """Number of token ids; None for models whose inputs are not tokens."""
        return getattr(getattr(self.model, "cfg", None), "d_vocab", None)

    def context_length(self) -> int | None:
        """The longest row of tokens that the model takes; None if it does not say."""
        return getattr(getattr(self.model, "cfg", None), "n_ctx", None)

    def is_causal(self) -> bool:
        """Whether a position sees only itself and what is before it (then padding behind a text changes nothing)."""
        return getattr(getattr(self.model, "cfg", None), "attention_dir", None) == "causal"

    def records(self) -> bool:
        """Whether passes only launch kernels, so that a CUDA graph can record them."""
        return True

    def d_model(self) -> int:
        """Width of the residual stream; 0 for models without one."""
        return int(getattr(getattr(self.model, "cfg", None), "d_model", 0) or 0)

    def n_heads(self) -> int:
        """Number of attention heads of a block; 0 for models without any."""
        return int(getattr(getattr(self.model, "cfg", None), "n_heads", 0) or 0)

    def parameters_per_head(self) -> int:
        """Numbers in `W_Q`, `W_K`, `W_V` and `W_O` of one head; shared keys and values count for each head."""
        return 4 * self.d_model() * int(self.model.cfg.d_head)

    def mlp_parameters(self, layer: int) -> int:
        """Numbers in the matrices of a block's MLP."""
        names = [name for name in self.site_names() if name.startswith(f"blocks.{layer}.mlp.")]
        return sum(self.site(name).matrix.stored().numel() for name in names)

    def heads_point(self, layer: int) -> str:
        """The HookPoint of what a block's heads give, `[batch pos head d_head]`. Raises ValueError if it has none."""
        return self._known_point(f"blocks.{layer}.attn.hook_z")

    def mlp_point(self, layer: int) -> str:
        """The HookPoint of what a block's MLP adds to the residual stream. Raises ValueError if it has none."""
        return self._known_point(f"blocks.{layer}.hook_mlp_out")

    def neurons_point(self, layer: int) -> str | None:
        """The HookPoint of what a block's neurons give, `[batch pos d_mlp]`; None for a block without an MLP."""
        name = f"blocks.{layer}.mlp.hook_post"
        return name if name in self.model.hook_dict else None

    def residual_point(self, layer: int) -> str:
        """The HookPoint of the residual stream after a block. Raises ValueError if it has none."""
        return self._known_point(f"blocks.{layer}.hook_resid_post")

    def _known_point(self, name: str) -> str:
        if name not in self.model.hook_dict:
            raise ValueError(f"this model has no hook point {name!r}; near: {near_names(name, self.model.hook_dict)}")
        return name

    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Every token as text, or its number where the model has no tokenizer."""
        tokenizer = self.tokenizer()
        return [str(i) if tokenizer is None else str(tokenizer.decode([i])) for i in map(int, ids)]

    def default_sites(self, layer: int) -> tuple[str, ...]:
        """Sites of block `layer` that `decompose_layer` takes unless told otherwise: the MLP's matrices."""
        wanted = ("mlp.W_gate", "mlp.W_in", "mlp.W_out")
        names = set(self.site_names())
        return tuple(site for site in wanted if f"blocks.{layer}.{site}" in names)

    def block(self, layer: int) -> nn.Module | None:
        """The module of block `layer`, or None for models without blocks."""
        blocks = getattr(self.model, "blocks", None)
        return None if blocks is None else blocks[layer]

    def first_block(self, sites: Iterable[Site]) -> int | None:
        """The first block that a change at these sites can reach; None if that is before the blocks, or there are none.

        After the blocks stands W_U: nothing before the last block needs to run for it.
        """
        sites, count = list(sites), self.n_layers()
        if count == 0 or any(site.layer is None and site.is_lookup for site in sites):
            return None
        return min((count - 1 if site.layer is None else site.layer for site in sites), default=None)

    def can_be_mapped(self) -> bool:
        """Whether `torch.vmap` may run the model."""
        return True

    def attention_geometry(self, layer: int) -> AttentionGeometry:
        """How a block makes attention scores of queries and keys. Raises ValueError where that is no bilinear form."""
        raise ValueError(f"a {type(self.model).__name__} has no attention whose scores could be taken apart")

    def text_tokens(self, text: str) -> Tensor:
        """A text as tokens `[1 pos]`, as the model's own `to_tokens` makes them. ValueError without a tokenizer."""
        if self.tokenizer() is None:
            raise ValueError(f"this {type(self.model).__name__} has no tokenizer to make tokens of a text")
        return self.model.to_tokens(text)

    def frozen_points(self, *, attention: bool, norms: bool) -> list[str]:
        """Names of the HookPoints of what attention (patterns) and normalisation (scales) multiply by."""
        ends = ("hook_pattern",) * attention + ("hook_scale",) * norms
        return [name for name in self.model.hook_dict if name.endswith(ends)]

    def embedding_points(self) -> dict[str, str]:
        """Names of the HookPoints through which embeddings enter: `{"embed": ..., "pos_embed": ...}`, where present."""
        points = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}
        return {what: name for what, name in points.items() if name in self.model.hook_dict}

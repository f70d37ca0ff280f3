"""Cached residual streams: training on the blocks from the first decomposed one on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.fingerprint import difference, target_fingerprint
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.core.swap import is_own_hook
from spd_lens.data.batches import Batch, TokenBatches
from spd_lens.data.row_files import RowFiles
from spd_lens.hosts.site import Site, is_from_transformer_lens
from spd_lens.support.progress import tqdm


class ResidualBatches(TokenBatches):
    """`TokenBatches` whose inputs are cached residual streams that enter block `start_at` (see `cache_residuals`)."""

    def __init__(
        self,
        batches: TokenBatches,
        residuals: Float[Tensor, "n pos d_model"] | RowFiles,
        start_at: int,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batches.tokens, batches.batch_size, seed=batches.seed, exclude=batches.exclude)
        self._share = batches._share
        self.residuals = residuals
        self.start_at = start_at
        self.made_from = None if made_from is None else dict(made_from)

    def fingerprint(self) -> dict[str, Any]:
        """As that of the tokens, and the block that the streams enter."""
        return {**super().fingerprint(), "start_at": self.start_at}

    def check_fits(self, decomposition: Decomposition) -> None:
        """ValueError unless these are residual streams of this target, and no decomposed site comes before them."""
        early = [w.site.name for w in decomposition.values() if _is_before(w.site, self.start_at)]
        if early:
            raise ValueError(
                f"these residual streams enter block {self.start_at}, but {early[0]} comes before it and would never "
                "be reached; call cache_residuals with this decomposition, or train on the tokens"
            )
        if self.made_from is None:
            return
        if (found := difference(self.made_from, target_of(decomposition))) is not None:
            raise ValueError(
                f"these residual streams are of another model: {found}; call cache_residuals with this decomposition"
            )

    def _batch(self, rows: Tensor) -> Batch:
        tokens = self.tokens[rows]
        return Batch(self.residuals[rows], self.start_at, tokens=tokens, position_mask=self._mask(tokens))


@torch.no_grad()
def cache_residuals(decomposition: Decomposition, batches: TokenBatches) -> ResidualBatches:
    """Compute the residual stream that enters the first decomposed block, once, for all rows of `batches`.

    Training on the result gives the same losses as training on the tokens and costs only the blocks from there on.
    Memory: `n pos d_model` numbers in the model's dtype, kept on the tokens' device.

    The result fits this target only, and decompositions without a site before that block; others are refused.

    Raises ValueError if an embedding is decomposed (nothing before it could be cached), there are no blocks, passes may
    not start at that block (`Decomposition.starts`), or hooks were left on the model, which would enter the streams.
    """
    checked_decomposition(decomposition, "cache_residuals")
    if not isinstance(batches, TokenBatches):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected TokenBatches(tokens, batch_size), whose rows keep their "
            "place"
        )
    checked_tokens(batches.tokens, decomposition.host, name="the tokens of batches")
    require_no_hooks(decomposition)
    layers = [weight.site.layer for weight in decomposition.values()]
    before = [w.site.name for w in decomposition.values() if w.site.layer is None and w.site.is_lookup]
    if before or decomposition.host.n_layers() == 0:
        raise ValueError(
            f"{', '.join(before) or 'this model'}: there is no block before the first decomposed weight, so nothing "
            "can be cached; train on the tokens"
        )
    # With only the unembedding decomposed, everything up to the last block is still the target.
    start = min((layer for layer in layers if layer is not None), default=decomposition.host.n_layers() - 1)
    parts = []
    rows = batches.tokens.split(batches.batch_size)
    for tokens in tqdm(rows, desc=f"residual stream before block {start}", leave=False, disable=len(rows) < 8):
        residual = decomposition.starts.residual_before(start, tokens.to(decomposition.device).long())
        if residual is None:
            raise ValueError(
                f"passes of this model cannot start at block {start}: its blocks read more than the residual stream "
                "(the mask of padding, position embeddings, or another block's values), so a cache would train on "
                "another model; train on the tokens"
            )
        parts.append(residual.to(batches.tokens.device))
    return ResidualBatches(batches, torch.cat(parts), start, target_of(decomposition))


def _is_before(site: Site, block: int) -> bool:
    return site.is_lookup if site.layer is None else site.layer < block


def target_of(decomposition: Decomposition) -> dict[str, Any]:
    """What the target is, whatever of it is decomposed."""
    return {key: value for key, value in target_fingerprint(decomposition).items() if key != "sites"}


def require_no_hooks(decomposition: Decomposition) -> None:
    """ValueError if TransformerLens hooks or plain PyTorch hooks of the user's are on the model."""
    for name, module in decomposition.model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # A bridge puts hooks of its own on its norms; what users add to HookPoints also comes from TransformerLens.
        bridges_own = is_from_transformer_lens if not isinstance(module, HookPoint) else is_own_hook
        if not all(is_own_hook(hook) or bridges_own(hook) for hook in hooks):
            raise ValueError(
                f"{name or 'the model'} has a hook on it, which would change what is cached; remove it first "
                "(model.reset_hooks() for TransformerLens's)"
            )

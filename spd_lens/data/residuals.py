"""Cached residual streams: training on the blocks from the first decomposed one on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.data.batches import Batch, TokenBatches
from spd_lens.support.progress import tqdm


class ResidualBatches(TokenBatches):
    """`TokenBatches` whose inputs are cached residual streams that enter block `start_at` (see `cache_residuals`)."""

    def __init__(self, source: TokenBatches, residuals: Float[Tensor, "n pos d_model"], start_at: int) -> None:
        super().__init__(source.tokens, source.batch_size, seed=source.seed, exclude=source.exclude)
        self.residuals = residuals
        self.start_at = start_at

    def _batch(self, rows: Tensor) -> Batch:
        tokens = self.tokens[rows]
        return Batch(self.residuals[rows], self.start_at, tokens=tokens, position_mask=self._mask(tokens))


@torch.no_grad()
def cache_residuals(decomposition: Decomposition, batches: TokenBatches) -> ResidualBatches:
    """Compute the residual stream that enters the first decomposed block, once, for all rows of `batches`.

    Training on the result gives the same losses as training on the tokens and costs only the blocks from there on.
    Memory: `n pos d_model` numbers in the model's dtype, kept on the tokens' device.

    Raises ValueError if an embedding is decomposed (nothing before it could be cached) or there are no blocks.
    """
    checked_decomposition(decomposition, "cache_residuals")
    if not isinstance(batches, TokenBatches):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected TokenBatches(tokens, batch_size), whose rows keep their "
            "place"
        )
    checked_tokens(batches.tokens, decomposition.host, name="the tokens of batches")
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
        residual = decomposition.host.residual_before(start, tokens.to(decomposition.device).long())
        parts.append(residual.to(batches.tokens.device))
    return ResidualBatches(batches, torch.cat(parts), start)

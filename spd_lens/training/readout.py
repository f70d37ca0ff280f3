"""A tuned read-out of a residual stream: a metric for local training in which a nat is worth a nat.

Local training (`TrainConfig.stop_at`) compares residual streams. Not every direction of a stream matters alike to what
the blocks behind it make of it. To second order, an error `e` there costs `e F e / 2` nats of KL at the output, with F
the Fisher information of the output about the stream. `tune_readout` measures the mean of F over positions once, in
units of each position's own size (blocks normalise what they read); `TunedReadout` is its root.

Left out: how F differs between positions, and what errors at several positions do together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.passes import record_inputs
from spd_lens.core.subcomponents import at_least_float32
from spd_lens.data.batches import Batch
from spd_lens.data.streams import first_batches
from spd_lens.support.given import given_number, given_seed, given_whole
from spd_lens.support.progress import tqdm
from spd_lens.support.shown import short_repr


@dataclass(frozen=True, eq=False)
class TunedReadout:
    """Reads `x / size @ matrix` from a residual stream `x`, `size` the root mean square of the clean stream there.

    The mean squared error of what is read is the divergence. `tune_readout` makes one that is in nats.
    """

    matrix: Float[Tensor, "d_model k"]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if not bool(self.matrix.isfinite().all()):
            raise ValueError("the matrix of a TunedReadout has entries that are NaN or infinite")

    def sizes(self, clean: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What both streams are divided by."""
        return at_least_float32(clean.detach()).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)

    def read(
        self, stream: Float[Tensor, "*batch d_model"], sizes: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch k"]:
        """What is compared."""
        scaled = at_least_float32(stream) / sizes
        return scaled @ self.matrix.to(scaled)

    def to_json(self) -> dict[str, Any]:
        """What identifies it in files."""
        values = self.matrix.detach().cpu().double().contiguous().numpy().tobytes()
        return {"shape": list(self.matrix.shape), "sha256": hashlib.sha256(values).hexdigest()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TunedReadout) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json()["sha256"])


def tune_readout(
    decomposition: Decomposition,
    batches: Any,
    stop_at: int,
    *,
    max_batches: int = 8,
    samples: int = 1,
    ridge: float = 0.1,
    seed: int = 0,
) -> TunedReadout:
    """The root of the Fisher information that the logits have about the stream before block `stop_at`.

    `samples` next tokens are drawn from the model's own prediction at every position of the first `max_batches` of
    `batches`; each costs a backward pass of the blocks from `stop_at` on. `ridge`: the share of the mean over all
    directions that is added to each, for directions that these positions have not shown.

    Raises ValueError where passes cannot start at that block, for padding on the left, of which such passes know
    nothing, and for choices that make no sense.
    """
    checked_decomposition(decomposition, "tune_readout")
    _check_stop(decomposition, stop_at)
    samples = given_whole("samples", samples, least=1, of=" token drawn at a position")
    ridge = given_number("ridge", ridge, least=0)
    generator = torch.Generator(decomposition.device).manual_seed(given_seed(seed))
    fisher, positions = None, 0
    chosen = list(first_batches(batches, decomposition, max_batches, purpose="tune a read-out on"))
    for batch in tqdm(chosen, desc="tuning the read-out", leave=False):
        batch = batch.to(decomposition.device)
        with torch.no_grad():
            clean = decomposition.clean_pass(batch.inputs, start_at=batch.start_at, stop_at=stop_at).output
        _check_start(decomposition, batch, clean, stop_at)
        counted = torch.ones(clean.shape[:-1], dtype=torch.bool) if batch.position_mask is None else batch.position_mask
        gradients = _gradients(decomposition, clean, counted.to(clean.device), stop_at, samples, generator)
        rows = gradients[:, counted.to(clean.device)].flatten(0, 1).double()
        fisher = rows.T @ rows + (0 if fisher is None else fisher)
        positions += len(rows)
    assert fisher is not None
    fisher = fisher / positions
    fisher += ridge * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    values, vectors = torch.linalg.eigh(fisher)
    # The mean of k squares, so that it is half of the quadratic form.
    root = vectors * (values.clamp_min(0) * len(fisher) / 2).sqrt()
    return TunedReadout(root.float())


def _gradients(
    decomposition: Decomposition, clean: Tensor, counted: Tensor, stop_at: int, samples: int, generator: torch.Generator
) -> Float[Tensor, "samples batch pos d_model"]:
    """By the stream in units of its size: the gradient of the log-probability of tokens drawn at all positions."""
    sizes = clean.float().square().mean(-1, keepdim=True).sqrt()
    found = []
    with torch.inference_mode(False), torch.enable_grad(), record_inputs(decomposition):
        stream = clean.clone().requires_grad_()
        log_p = decomposition.host.forward_from(stop_at, stream).float().log_softmax(-1)
        for i in range(samples):
            p = log_p.detach().exp().flatten(0, -2)
            drawn = torch.multinomial(p, 1, generator=generator).view(*log_p.shape[:-1], 1)
            total = (log_p.gather(-1, drawn).squeeze(-1) * counted).sum()
            (gradient,) = torch.autograd.grad(total, stream, retain_graph=i < samples - 1)
            found.append(gradient.float() * sizes)
    return torch.stack(found)


def _check_stop(decomposition: Decomposition, stop_at: int) -> None:
    """ValueError for a block at which passes over decomposed sites cannot end, or from which none can start."""
    decomposition.starts.require_stop(given_whole("stop_at", stop_at))
    if stop_at >= decomposition.host.n_layers():
        raise ValueError(
            f"stop_at={stop_at} is behind the last block, where passes cannot start; train on the logits there: a pass "
            "costs hardly more"
        )


def _check_start(decomposition: Decomposition, batch: Batch, clean: Tensor, stop_at: int) -> None:
    """ValueError unless the logits are a function of what enters block `stop_at`, and of nothing else."""
    if batch.attention_mask is not None:
        raise ValueError(
            f"a batch has an attention_mask, which passes from block {stop_at} on have lost; pad on the right, or "
            "leave such rows out"
        )
    if not decomposition.starts.is_exact(stop_at, clean, batch.inputs, start_at=batch.start_at):
        raise ValueError(
            f"passes of this model cannot start at block {stop_at} (its blocks read more than the residual stream), so "
            "no read-out can be tuned there"
        )

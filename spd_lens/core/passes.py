"""Passes of the decomposed model without hooks: what training, evaluation and analysis run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.masks import SiteMask
from spd_lens.core.site_inputs import SiteInputs
from spd_lens.hosts.host import Host
from spd_lens.support.given import given_list, given_whole
from spd_lens.support.names import near_names
from spd_lens.support.shown import short_repr


@contextmanager
def record_inputs(weights: Mapping[str, DecomposedWeight]) -> Iterator[dict[str, Tensor]]:
    """While open, a forward pass of this thread stores every site's input `x` in the dict, and the model is the clean
    target.

    Masks and patches that hooks put on the sites' own points are ignored meanwhile (S4); hooks elsewhere act.
    `weights` are those of one decomposition.
    """
    inputs: dict[str, Tensor] = {}
    state = next(iter(weights.values())).swapped.state
    before, state.recording = state.recording, inputs
    try:
        yield inputs
    finally:
        state.recording = before


@contextmanager
def given_masks(weights: Mapping[str, DecomposedWeight], masks: Mapping[str, SiteMask]) -> Iterator[None]:
    """While open, passes of this thread use these masks at the sites named in `masks`, whatever hooks say on their own
    points.

    The other sites act as they do without this.
    """
    state = next(iter(weights.values())).swapped.state
    before, state.given = state.given, {**state.given, **masks}
    try:
        yield
    finally:
        state.given = before


@contextmanager
def captured(host: Host, points: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, passes of this thread store the activations of the named hook points in the dict."""
    found: dict[str, Tensor] = {}
    if not points:
        yield found
        return
    known = host.model.hook_dict
    for point in given_list("hidden points", points, "names of hook points"):
        if point not in known:
            raise ValueError(f"no hook point {point!r}; near: {near_names(point, known)}")
    # Of this thread only: others may run the same model meanwhile.
    store = partial(_store, found=found, thread=threading.get_ident())
    with host.model.hooks(fwd_hooks=[(point, partial(store, name=point)) for point in points]):
        yield found


def _store(value: Tensor, hook: Any, *, found: dict[str, Tensor], name: str, thread: int) -> None:
    if threading.get_ident() == thread:
        found[name] = value


class BlockStarts:
    """Where passes of one decomposition may start and stop: the one place that knows.

    A pass starts at a block only if that gives, bit for bit, what the whole pass gives. Blocks may read more than the
    residual stream (the embeddings, per-layer inputs, the mask of padding, another block's keys), so this is tried the
    first time that it matters, for every block by itself, with one whole and one partial pass; else passes run whole.
    """

    def __init__(self, host: Host, weights: Mapping[str, DecomposedWeight]) -> None:
        self._host, self._weights = host, weights
        self._exact: dict[tuple[Any, ...], bool] = {}
        self._cuts: dict[tuple[Any, ...], bool] = {}

    def first_block(self, sites: Iterable[str]) -> int | None:
        """The first block that a change at these sites can reach; None if that is before the blocks, or if there are
        none."""
        return self._host.first_block(self._weights[name].site for name in sites)

    def require_end(self, stop_at: int | None) -> None:
        """ValueError unless passes can end before block `stop_at`; None: at the output."""
        if stop_at is None:
            return
        given_whole("stop_at", stop_at, or_none=True)
        count = self._host.n_layers()
        if count == 0:
            raise ValueError(
                f"a pass of a {type(self._host.model).__name__} cannot stop behind a block: it has none; leave stop_at "
                "away"
            )
        if not 1 <= stop_at <= count:
            raise ValueError(f"stop_at={stop_at}; this model has blocks 0..{count - 1}, expected 1 to {count}")

    def require_stop(self, stop_at: int | None) -> None:
        """ValueError unless passes can end before block `stop_at`, with every decomposed site behind them."""
        self.require_end(stop_at)
        if stop_at is None:
            return
        late = [
            n
            for n, w in self._weights.items()
            if not w.site.is_lookup and (w.site.layer is None or w.site.layer >= stop_at)
        ]
        if late:
            raise ValueError(
                f"a pass that stops at block {stop_at} never reaches {late[0]}; stop behind the last decomposed block, "
                "or leave stop_at away"
            )

    def require_reached(self, start_at: int | None) -> None:
        """ValueError if a pass from block `start_at` on would leave out a site."""
        first = None if start_at is None else self.first_block(self._weights)
        if start_at is not None and (first is None or first < start_at):
            raise ValueError(
                f"a pass from block {start_at} on does not reach every decomposed site ({', '.join(self._weights)}); "
                "start before the first of them, or run the tokens"
            )

    def is_exact(
        self,
        layer: int,
        residual: Tensor,
        batch: Tensor,
        *,
        start_at: int | None = None,
        stop_at: int | None = None,
    ) -> bool:
        """Whether `residual` entering block `layer` gives what the whole pass over `batch` gives.

        `batch` are tokens, or what enters block `start_at`; passes that end before block `stop_at` are compared there.
        Tried once for a layer, dtype, device and mode, under autocast and without: whichever of the two a residual
        stream was recorded in, it is not that of the other. Not for every shape: the blocks get the tensor that they
        would get, and make masks and positions of its shape themselves (a test tries other shapes on both hosts).
        """
        if not self._host.can_start_at_blocks():
            return False
        key = (layer, start_at, stop_at, residual.dtype, *self._kind_of_pass(residual.device))
        if key not in self._exact:
            self._exact[key] = self._try(layer, residual, batch, start_at, stop_at)
        return self._exact[key]

    @torch.no_grad()
    def between(self, batch: Tensor, start_at: int | None, stop_at: int | None) -> list[int]:
        """The blocks inside a pass over `batch` (from block `start_at` on, to before `stop_at`) at which it may be cut.

        Tried once for a kind of pass: for each of these blocks with two more passes.
        """
        count = self._host.n_layers()
        if count == 0 or not self._host.can_start_at_blocks():
            return []
        found = []
        for layer in range((start_at or 0) + 1, count if stop_at is None else stop_at):
            key = (layer, start_at, stop_at, batch.dtype, *self._kind_of_pass(batch.device))
            if key not in self._cuts:
                with record_inputs(self._weights):
                    residual = self._host.forward_until(layer, batch, start_at=start_at)
                self._cuts[key] = self.is_exact(layer, residual, batch, start_at=start_at, stop_at=stop_at)
            if self._cuts[key]:
                found.append(layer)
        return found

    @torch.no_grad()
    def residual_before(self, layer: int, tokens: Tensor) -> Tensor | None:
        """What enters block `layer`; None where passes may not start there."""
        if not self._host.can_start_at_blocks():
            return None
        with record_inputs(self._weights):
            residual = self._host.residual_before(layer, tokens)
        return residual if self.is_exact(layer, residual, tokens) else None

    def _kind_of_pass(self, device: torch.device) -> tuple[Any, ...]:
        """What else decides how a pass computes: device, mode, and the dtype of autocast where it is on."""
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        return device, self._host.model.training, autocast

    @torch.no_grad()
    def _try(self, layer: int, residual: Tensor, batch: Tensor, start_at: int | None, stop_at: int | None) -> bool:
        if batch.device.type == "meta":  # nothing to compare: shapes are the same either way
            return True
        whole = self._clean(batch, start_at, stop_at)
        try:
            started = self._clean(residual.detach(), layer, stop_at)
            # On the meta device there are shapes and no values that could differ.
            return whole.shape == started.shape if whole.is_meta else torch.equal(whole, started)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Whatever a block misses when it is entered in the middle, it says in its own words.
            return False

    def _clean(self, batch: Tensor, start_at: int | None, stop_at: int | None) -> Tensor:
        # Only CUDA has generators by device; that of the CPU is always put back.
        devices = [batch.device] if batch.is_cuda else []
        # Dropout, if it is on, draws again what it would have drawn without this.
        with torch.random.fork_rng(devices), record_inputs(self._weights):
            return run(self._host, batch, start_at=start_at, stop_at=stop_at)


def run(
    host: Host,
    batch: Tensor,
    *,
    start_at: int | None = None,
    stop_at: int | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """A pass over tokens or inputs, or from block `start_at` on; to the output, or to what enters block `stop_at`."""
    if stop_at is not None:
        return host.forward_until(stop_at, batch, start_at=start_at, attention_mask=attention_mask)
    if start_at is not None:
        return host.forward_from(start_at, batch)
    return host.forward(batch, attention_mask)


def run_in_pieces(
    host: Host,
    weights: Mapping[str, DecomposedWeight],
    masks: Mapping[str, SiteMask],
    batch: Tensor,
    cuts: Sequence[int],
    *,
    start_at: int | None,
    stop_at: int | None,
) -> Tensor:
    """`run` under masks, cut before these blocks; the backward pass computes every piece again.

    Only what goes from piece to piece is kept. The backward pass may run in another thread, so pieces bring their masks
    with them.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return given_masks(weights, masks), given_masks(weights, masks)

    def piece(x: Tensor, start: int | None, stop: int | None) -> Tensor:
        return checkpoint(
            partial(run, host, start_at=start, stop_at=stop),
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )  # pyright: ignore[reportReturnType]

    starts = [start_at, *cuts]
    for start, stop in zip(starts, [*cuts, stop_at], strict=True):
        batch = piece(batch, start, stop)
    return batch


@dataclass(frozen=True)
class CleanPass:
    """A forward pass of the target.

    - `output`: for a pass that stops before a block, what would enter it.
    - `inputs`: the `x` that every decomposed site read; `hidden`: the hook points that were asked for.
    - `residuals`: what entered the blocks that masked passes may start at.
    """

    output: Tensor
    inputs: SiteInputs
    hidden: dict[str, Tensor]
    residuals: dict[int, Tensor]

    __repr__ = short_repr

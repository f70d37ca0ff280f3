"""`DecomposedModel`: the decomposed weights inside a model, and the passes that can be run through them.

What a user does with them (interventions, reports, files) stands in `spd_lens.core.decomposition`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.gate_sets import GateOfAll, Gates, gates_of
from spd_lens.core.gates import GlobalGate
from spd_lens.core.inputs import checked_entry, checked_tokens
from spd_lens.core.interventions import check_site, checked_site_masks
from spd_lens.core.masks import SiteMask
from spd_lens.core.passes import BlockStarts, CleanPass, captured, given_masks, record_inputs, run, run_in_pieces
from spd_lens.core.site_inputs import SiteInputs
from spd_lens.core.squashings import importance_of
from spd_lens.core.swap import swap_out
from spd_lens.hosts.host import Host
from spd_lens.support.given import shown
from spd_lens.support.names import near_names


class DecomposedModel(Mapping[str, DecomposedWeight]):
    """The decomposed weights of one model, by site name, and its passes under masks."""

    def __init__(self, host: Host, weights: dict[str, DecomposedWeight]) -> None:
        self.host = host
        self._weights = weights
        self._sites = [weight.site for weight in weights.values()]
        self.starts = BlockStarts(host, weights)
        self._removed = False

    def __getitem__(self, name: str) -> DecomposedWeight:
        self.require_present()
        if name not in self._weights:
            raise KeyError(f"no decomposed site {name!r}; near: {near_names(str(name), self._weights)}")
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def model(self) -> Any:
        """The TransformerLens model whose hook points were swapped."""
        return self.host.model

    @property
    def gates(self) -> Gates:
        """All gates behind one interface, whether every site has its own or one serves all."""
        self.require_present()
        return gates_of(self._weights)

    @property
    def global_gate(self) -> GlobalGate | None:
        """The one gate of all sites (`gate="global"`), or None where every site has its own."""
        gates = self.gates
        return gates.gate if isinstance(gates, GateOfAll) else None

    @property
    def device(self) -> torch.device:
        """Where the subcomponents are."""
        self.require_present()
        return next(iter(self._weights.values())).V.device

    # -- running -----------------------------------------------------------------------------------------------

    def clean_pass(
        self,
        batch: Tensor,
        *,
        start_at: int | None = None,
        stop_at: int | None = None,
        hidden_points: Sequence[str] = (),
        attention_mask: Tensor | None = None,
    ) -> CleanPass:
        """The target's output and every site's input, without gradients; hooks on the sites' points do not act.

        With `start_at=L`, `batch` is the residual stream that enters block L and only blocks from L on are run. With
        `stop_at=M` the pass ends before block M, and what would enter that block (`n_layers`: what leaves the last) is
        the output. `attention_mask [batch pos]` is 0 where tokens are padding.
        """
        self.require_present()
        batch = checked_entry(batch, self.host, start_at)
        self.starts.require_reached(start_at)
        self.starts.require_stop(stop_at)
        starts = {self.starts.first_block([name]) for name in self} if self.host.can_start_at_blocks() else set()
        layers = [layer for layer in starts if layer is not None and layer > (start_at or 0)]
        layers = layers if attention_mask is None else []
        with (
            torch.no_grad(),
            record_inputs(self._weights) as inputs,
            captured(self.host, hidden_points) as hidden,
            self.host.record_residuals({*layers, *self.gates.blocks_read}) as residuals,
        ):
            output = self._run(batch, start_at, attention_mask, stop_at)
        if missed := [point for point in hidden_points if point not in hidden]:
            raise ValueError(f"the hook point {missed[0]!r} is not reached by a pass that stops at block {stop_at}")
        read = SiteInputs(inputs, {layer: residuals[layer] for layer in self.gates.blocks_read})
        return CleanPass(output, read, hidden, {layer: residuals[layer] for layer in layers if layer in residuals})

    def masked_forward(
        self,
        batch: Tensor,
        masks: Mapping[str, SiteMask],
        *,
        start_at: int | None = None,
        stop_at: int | None = None,
        residuals: Mapping[int, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """The model's output with the given masks at the named sites and the target everywhere else.

        With the `residuals` of a clean pass over the same batch, blocks before the first masked site are not run
        again where the output is the same, bit for bit (`starts`). `stop_at` as for `clean_pass`. With `recompute` a
        backward pass computes block by block again instead of keeping what is inside them (not with an
        `attention_mask`, which blocks entered in the middle would miss).
        """
        self.require_present()
        batch, masks = checked_entry(batch, self.host, start_at), checked_site_masks(self._weights, masks)
        self.starts.require_end(stop_at)
        first = self.starts.first_block(masks)
        entered = residuals.get(first) if residuals and first is not None and attention_mask is None else None
        if (
            first is not None
            and entered is not None
            and self.starts.is_exact(first, entered, batch, start_at=start_at, stop_at=stop_at)
        ):
            batch, start_at = entered, first
        if recompute and attention_mask is None and torch.is_grad_enabled():
            cuts = self.starts.between(batch, start_at, stop_at)
            return run_in_pieces(self.host, self._weights, masks, batch, cuts, start_at=start_at, stop_at=stop_at)
        with given_masks(self._weights, masks):
            return self._run(batch, start_at, attention_mask, stop_at)

    def masked_hidden(
        self,
        batch: Tensor,
        masks: Mapping[str, SiteMask],
        points: Sequence[str],
        *,
        start_at: int | None = None,
        stop_at: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `masked_forward`, but the activations of the named hook points, with gradients (L7)."""
        self.require_present()
        batch, masks = checked_entry(batch, self.host, start_at), checked_site_masks(self._weights, masks)
        self.starts.require_end(stop_at)
        with given_masks(self._weights, masks), captured(self.host, points) as hidden:
            self._run(batch, start_at, attention_mask, stop_at)
        return hidden

    def _run(
        self, batch: Tensor, start_at: int | None, attention_mask: Tensor | None = None, stop_at: int | None = None
    ) -> Tensor:
        self.require_present()
        if start_at is not None and attention_mask is not None:
            raise ValueError(
                f"an attention_mask was given with start_at={start_at}: a pass that starts at a block has lost what "
                "the mask does before it; give the tokens"
            )
        try:
            return run(self.host, batch, start_at=start_at, stop_at=stop_at, attention_mask=attention_mask)
        except IndexError:
            if start_at is None:
                # An id outside the vocabulary? Looking before every pass would make a device wait.
                checked_tokens(batch, self.host, name="the batch")
            raise

    def pre_importances(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch _"]]:
        """Pre-activations `p [batch pos C]` of every site's gate, from the clean inputs `x` (S4)."""
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs={shown(inputs)}; expected {{site: x}}, as clean_pass(tokens).inputs gives")
        for name in inputs:
            check_site(self._weights, name)
        return self.gates.pre_activations(inputs)

    @torch.no_grad()
    def importance(self, tokens: Any) -> dict[str, Float[Tensor, "*batch _"]]:
        """Importance `g = clamp(p, 0, 1)`, `[batch pos C]` per site, from a clean pass over `tokens` (S3, S4)."""
        self.require_present()
        inputs = self.clean_pass(checked_tokens(tokens, self.host).to(self.device)).inputs
        return {name: importance_of(pre) for name, pre in self.pre_importances(inputs).items()}

    # -- state -------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Give the model back as it was: same modules, hook names and outputs. Calling it twice is an error.

        After an interrupt inside it, it can be called again.
        """
        self.require_present()
        swap_out(self.host, self._sites)
        self._removed = True

    def require_present(self) -> None:
        """ValueError if `remove` was called."""
        if self._removed:
            raise ValueError("this decomposition was removed from its model; decompose it again, or load a saved one")

"""All gates of a decomposition behind one interface: one gate per site, or one for all sites together.

`Gates.pre_activations` maps every site's clean input to its `p [batch pos C]` (S4); everything else that a
decomposition asks about its gates is asked here, so that a third kind is one more class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.gates import GlobalGate
from spd_lens.core.site_inputs import SiteInputs


class Gates(ABC):
    """The gates of the sites in `weights`.

    - `looks_across_positions`: whether an importance depends on other positions than its own.
    - `is_by_site`: whether each site's importance needs that site's input alone (`train_many` maps only such gates).
    """

    looks_across_positions: bool
    is_by_site: bool
    # Blocks whose residual stream is read besides, or in place of, the sites' inputs.
    blocks_read: tuple[int, ...] = ()

    def __init__(self, weights: Mapping[str, DecomposedWeight]) -> None:
        self.weights = weights

    @abstractmethod
    def pre_activations(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch _"]]:
        """`p [batch pos C]` of every site in `inputs`."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that saved decompositions use."""


class GatesBySite(Gates):
    """One gate for every site; each reads its own site's input."""

    is_by_site = True

    def __init__(self, weights: Mapping[str, DecomposedWeight]) -> None:
        super().__init__(weights)
        self.looks_across_positions = any(
            w.gate is not None and w.gate.looks_across_positions for w in weights.values()
        )

    def pre_activations(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch _"]]:
        pre = {}
        for name, x in inputs.items():
            weight = self.weights[name]
            assert weight.gate is not None
            pre[name] = weight.gate(x, weight.activations(x) if weight.gate.reads_activations else None)
        return pre

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, weight in self.weights.items():
            if weight.gate is not None:
                for key, p in weight.gate.named_parameters():
                    yield f"{name}.gate.{key}", p


class GateOfAll(Gates):
    """The global gate: one network over the inputs of all sites, or over the residual streams before their blocks."""

    looks_across_positions = True
    is_by_site = False

    def __init__(self, weights: Mapping[str, DecomposedWeight], gate: GlobalGate) -> None:
        super().__init__(weights)
        self.gate = gate
        blocks = {residual_name(w.site.layer): w.site.layer for w in weights.values() if w.site.layer is not None}
        self.blocks_read = tuple(blocks[name] for name in gate.reads if name in blocks)

    def pre_activations(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch _"]]:
        if self.blocks_read:
            if not isinstance(inputs, SiteInputs) or not set(self.blocks_read) <= set(inputs.residuals):
                raise ValueError(
                    "this decomposition's gate reads residual streams, which these inputs do not hold; expected "
                    "clean_pass(tokens).inputs itself"
                )
            return self.gate({residual_name(layer): inputs.residuals[layer] for layer in self.blocks_read})
        missing = [name for name in self.weights if name not in inputs]
        if missing:
            raise ValueError(
                f"the global gate reads the inputs of all sites, and {missing[0]} is not among those given "
                f"({', '.join(inputs)}); give all of them, as clean_pass(tokens).inputs has them"
            )
        split = [name for name, x in inputs.items() if x.ndim == 4]
        if split:
            raise ValueError(
                f"the global gate reads one input per position, but under use_split_qkv_input (or use_attn_in) "
                f"{split[0]} has one per head; switch that off while asking for importances"
            )
        dense = {
            name: x if x.is_floating_point() else self.weights[name].target_weight[x.clamp_min(0)]
            for name, x in inputs.items()
        }
        return self.gate(dense)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key, p in self.gate.named_parameters():
            yield f"global_gate.{key}", p


def residual_name(layer: int) -> str:
    """What a gate calls the residual stream that enters a block."""
    return f"residual {layer}"


def gates_of(weights: Mapping[str, DecomposedWeight]) -> Gates:
    """The gates that stand in these weights; the first site's module holds the one of all sites, if there is one."""
    shared = next(iter(weights.values()))._modules.get("global_gate")
    return GateOfAll(weights, shared) if isinstance(shared, GlobalGate) else GatesBySite(weights)

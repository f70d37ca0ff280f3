"""`MemberStack`: many decompositions as one, their parameters stacked along a leading axis `[S ...]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import SiteMask
from spd_lens.training.config import TrainConfig
from spd_lens.training.terms import faithfulness as faithfulness_term


class MemberStack:
    """The parameters of all members, each stacked to `[S ...]`, and calls that are mapped over them."""

    def __init__(self, decompositions: Sequence[Decomposition]) -> None:
        self.members = decompositions
        self.template = decompositions[0]
        self.device = self.template.device
        self._caller = _Caller(self.template.model)
        groups = {
            "subcomponents": {id(p) for p in self.template.subcomponent_parameters()},
            "gates": {id(p) for p in self.template.gate_parameters()},
        }
        self.trained: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
        self._frozen: dict[str, Tensor] = {}
        states = [_tensors(_Caller(d.model)) for d in decompositions]
        for name, own in states[0].items():
            shapes = {tuple(state[name].shape) if name in state else None for state in states}
            if len(shapes) > 1:
                raise ValueError(
                    f"the members do not have the same shape: {name} is {sorted(map(str, shapes))}; train them in runs "
                    "of their own"
                )
            stacked = torch.stack([state[name].detach() for state in states])
            group = next((g for g, ids in groups.items() if id(own) in ids), None)
            if group is None:
                self._frozen[name] = stacked
            else:
                self.trained[group][name] = stacked.requires_grad_()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All trained tensors by name."""
        return {name: p for group in self.trained.values() for name, p in group.items()}

    def call(self, function: Callable[..., Any], *stacked: Any) -> Any:
        """`function(*arguments)` of every member, with its parameters in the template's place."""

        def of_one(trained: dict[str, Tensor], frozen: dict[str, Tensor], *arguments: Any) -> Any:
            return functional_call(self._caller, {**trained, **frozen}, (function, *arguments))

        return torch.vmap(of_one)(self.parameters, self._frozen, *stacked)

    def clean_pass(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean output and inputs of all sites."""

        def of_one(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            clean = self.template.clean_pass(x)
            return clean.output, dict(clean.inputs)

        with torch.no_grad():
            return self.call(of_one, x)

    def masked_forward(self, x: Tensor, masks: Mapping[str, SiteMask]) -> Tensor:
        """The outputs under masks."""
        given = {
            name: {key: value for key, value in (("mask", m.mask), ("delta", m.delta)) if value is not None}
            for name, m in masks.items()
        }

        def of_one(x: Tensor, given: dict[str, dict[str, Tensor]]) -> Tensor:
            return self.template.masked_forward(x, {name: SiteMask(**values) for name, values in given.items()})

        return self.call(of_one, x, given)

    def faithfulness(self, config: TrainConfig) -> Tensor:
        """L1 of every member, `[S]`."""
        weights = list(self.template.values())
        return self.call(lambda: faithfulness_term(config, ((w, w.target_weight.detach()) for w in weights)))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy every member's slice into its decomposition."""
        for i, decomposition in enumerate(self.members):
            own = _tensors(_Caller(decomposition.model))
            for name, stacked in self.parameters.items():
                own[name].copy_(stacked[i])


class _Caller(nn.Module):
    """Calls any function while `functional_call` has replaced the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}

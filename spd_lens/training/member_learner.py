"""`MemberLearner`: what changes while many train at once, and one step of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import sample_masks
from spd_lens.core.routing import route, sample_routing
from spd_lens.core.squashings import lower_squash, upper_squash
from spd_lens.hosts.site import match_sites
from spd_lens.objective.divergences import divergence
from spd_lens.training.config import TrainConfig
from spd_lens.training.member_adam import MemberAdam
from spd_lens.training.member_stack import MemberStack
from spd_lens.training.terms import IMPORTANCE_TERMS, StepView, coefficient

# Routing of all sites and of one site at a time draws nothing.
_NO_DRAWS = torch.Generator()


class MemberLearner:
    """Everything that changes while `members` train at once; `step(inputs [S ...], step)` then takes a step of all."""

    def __init__(self, decompositions: Sequence[Decomposition], members: Sequence[TrainConfig]) -> None:
        self.stack = stack = MemberStack(decompositions)
        self.members, self.config = members, members[0]
        device = stack.device
        gate_lrs = [m.lr if m.gate_lr is None else m.gate_lr for m in members]
        self.optimizers = {
            "subcomponents": MemberAdam(stack.trained["subcomponents"], _float64([m.lr for m in members])),
            "gates": MemberAdam(stack.trained["gates"], _float64(gate_lrs)),
        }
        # Seeded as `train` does.
        self.minimality_factors = match_sites(self.config.minimality_factors, stack.template)
        self.generators = [torch.Generator(device).manual_seed(m.seed * 1_000_003 + 1) for m in members]

    def warm_up_faithfulness(self) -> None:
        """L8, with an optimiser that is thrown away."""
        rates = _float64([m.faithfulness_warmup_lr for m in self.members])
        adam = MemberAdam(self.stack.trained["subcomponents"], rates)
        for _ in range(self.config.faithfulness_warmup):
            self.stack.faithfulness(self.config).sum().backward()
            adam.step(1.0)

    def step(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One training step; the losses `[S]` (with the weighted sum as `"loss"`) and the importances."""
        losses, lower = self._losses(x, step)
        weighted = [
            loss.new_tensor([coefficient(m, name) for m in self.members]) * loss for name, loss in losses.items()
        ]
        total = torch.stack(weighted).sum(0)
        total.sum().backward()
        factor = self.config.lr_factor(step)
        self.optimizers["subcomponents"].step(factor, self.config.clip_subcomponents)
        self.optimizers["gates"].step(factor, self.config.clip_gates)
        return {"loss": total, **losses}, lower

    def _losses(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stack, config = self.stack, self.config
        clean_output, inputs = stack.clean_pass(x)
        pre = stack.call(stack.template.pre_importances, inputs)
        lower = {name: lower_squash(p, variant=config.squash) for name, p in pre.items()}
        upper = {name: upper_squash(p) for name, p in pre.items()}
        losses: dict[str, Tensor] = {}
        if any(m.faithfulness > 0 for m in self.members):
            losses["faithfulness"] = stack.faithfulness(config)
        view = StepView(config, step, {}, minimality_factors=self.minimality_factors)
        for name, term in IMPORTANCE_TERMS.items():
            if any(coefficient(m, name) > 0 for m in self.members):
                losses[name] = torch.vmap(lambda g, term=term: term(dataclasses.replace(view, upper=g)))(upper)
        distance = torch.vmap(lambda clean, masked: divergence(clean, masked, kind=config.divergence))
        for term in config.reconstructions:
            passes = []
            for _ in range(term.draws):
                for routed in sample_routing(dict.fromkeys(lower, torch.Size()), term.routing, generator=_NO_DRAWS):
                    chosen = {name: lower[name] for name in routed}
                    kind: Any = term.masks
                    masks = sample_masks(chosen, kind=kind, delta=config.delta, generator=self.generators)
                    passes.append(distance(clean_output, stack.masked_forward(x, route(masks, routed))))
            losses[term.name] = torch.stack(passes).mean(0)
        return losses, lower

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {f"parameter|{name}": p.detach() for name, p in self.stack.parameters.items()}
        for group, adam in self.optimizers.items():
            tensors |= {f"adam.{group}|{key}": value for key, value in adam.tensors().items()}
        return tensors | {f"generator|{i}": g.get_state() for i, g in enumerate(self.generators)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        for name, p in self.stack.parameters.items():
            p.copy_(tensors[f"parameter|{name}"])
        for group, adam in self.optimizers.items():
            prefix = f"adam.{group}|"
            adam.load({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for i, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator|{i}"])


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)

"""`MemberLearner`: what changes while many train at once, and one step of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.masks import Importances, sample_masks
from spd_lens.core.routing import route, sample_routing
from spd_lens.core.squashings import lower_squash, upper_squash
from spd_lens.hosts.site import match_sites
from spd_lens.objective.adversary import PGD, ascend, random_sources
from spd_lens.objective.divergences import divergence
from spd_lens.objective.mask_sources import AdversarialMasks, Masks, mask_source, masks_from_sources
from spd_lens.training.config import TrainConfig
from spd_lens.training.member_adam import MemberAdam
from spd_lens.training.member_stack import MemberStack
from spd_lens.training.reconstruction import Reconstruction
from spd_lens.training.terms import IMPORTANCE_TERMS, StepView, coefficient
from spd_lens.training.weights import Weights

# Routing of all sites and of one site at a time draws nothing.
_NO_DRAWS = torch.Generator()
# Everything is switched off in a pass over all sites.
_ONE_PASS = Reconstruction()


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
        self.adversaries = [torch.Generator(device).manual_seed(m.seed * 1_000_003 + 2) for m in members]
        self.weights = Weights(members, (len(members),), like=next(iter(stack.trained["subcomponents"].values())))

    def warm_up_faithfulness(self) -> None:
        """L8, with an optimiser that is thrown away."""
        rates = _float64([m.faithfulness_warmup_lr for m in self.members])
        adam = MemberAdam(self.stack.trained["subcomponents"], rates)
        for _ in range(self.config.faithfulness_warmup):
            self.stack.faithfulness(self.config).sum().backward()
            adam.step(1.0)

    def step(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One training step; the losses `[S]` (with the weighted sum as `"loss"`) and the importances."""
        self.begin(step)
        return self.take(x, step)

    def begin(self, step: int) -> None:
        """The half of a step that the host computes: learning rates."""
        for adam in self.optimizers.values():
            adam.begin(self.config.lr_factor(step))

    def take(self, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The half of a step that the device computes; nothing in it waits for the device or sends it anything."""
        losses, lower = self._losses(x, step)
        total = torch.stack([self.weights.of(name) * loss for name, loss in losses.items()]).sum(0)
        total.sum().backward()
        self.optimizers["subcomponents"].descend(self.config.clip_subcomponents)
        self.optimizers["gates"].descend(self.config.clip_gates)
        if self.config.tolerance is not None:
            self.weights.spend(self.weights.mean_reconstruction(losses).detach(), step)
            self.weights.adapt()
        shown = {"loss": total, **losses, **self.weights.shown()}
        # Without their graph, which would live on until the next step's results take their place.
        return {name: t.detach() for name, t in shown.items()}, {name: g.detach() for name, g in lower.items()}

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

        def passes(term: Reconstruction, masks_of: Callable[[Importances], Masks], g: Importances) -> Tensor:
            found = []
            for _ in range(term.draws):
                for routed in sample_routing(dict.fromkeys(g, torch.Size()), term.routing, generator=_NO_DRAWS):
                    masks = masks_of({name: g[name] for name in routed})
                    found.append(distance(clean_output, stack.masked_forward(x, route(masks, routed))))
            return torch.stack(found).mean(0)

        if self.weights.measures(step):
            with torch.no_grad():
                self.weights.measure(passes(_ONE_PASS, self._sampled("off"), lower))
        for term in config.reconstructions:
            source = mask_source(term.masks)
            if isinstance(source, AdversarialMasks):
                masks_of = self._climbed(source.pgd, partial(passes, term), lower)
            else:
                masks_of = self._sampled(source.name)
            losses[term.name] = passes(term, masks_of, lower)
        return losses, lower

    def _sampled(self, kind: Any) -> Callable[[Importances], Masks]:
        return partial(sample_masks, kind=kind, delta=self.config.delta, generator=self.generators)

    def _climbed(
        self, pgd: PGD, passes: Callable[[Callable[[Importances], Masks], Importances], Tensor], lower: Importances
    ) -> Callable[[Importances], Masks]:
        """The masks of every member's own adversary (K3): a gradient of the sum over members is that of each."""
        g = {name: importance.detach() for name, importance in lower.items()}
        starts = [
            random_sources({name: own[i] for name, own in g.items()}, pgd.scope, generator)
            for i, generator in enumerate(self.adversaries)
        ]
        start = {name: torch.stack([own[name] for own in starts]) for name in g}

        def masks_of(sources: Mapping[str, Tensor]) -> Callable[[Importances], Masks]:
            return partial(masks_from_sources, sources=sources, delta=self.config.delta)

        return masks_of(ascend(lambda sources: passes(masks_of(sources), g).sum(), start, pgd))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {f"parameter|{name}": p.detach() for name, p in self.stack.parameters.items()}
        for group, adam in self.optimizers.items():
            tensors |= {f"adam.{group}|{key}": value for key, value in adam.tensors().items()}
        tensors |= {f"weights|{name}": value for name, value in self.weights.tensors().items()}
        tensors |= {f"adversary|{i}": g.get_state() for i, g in enumerate(self.adversaries)}
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
        for i, generator in enumerate(self.adversaries):
            generator.set_state(tensors[f"adversary|{i}"])
        self.weights.load({k.removeprefix("weights|"): v for k, v in tensors.items() if k.startswith("weights|")})


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)

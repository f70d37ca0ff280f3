"""One training step of SPD written the usual way, to measure the library against and to check it.

Nothing here is clever: a masked matrix is computed as `b + ((m * (x @ V)) @ U) + d * (x @ (W - V @ U))` (M1) on all
rows, `W - V @ U` is rebuilt for every site at every step, rows that are not routed are computed and then thrown away,
gates build `[batch pos C h]`, and all losses are summed before one backward pass. It shares no code with spd_lens: from
a decomposition it reads the factors and gate parameters to start from, and from `TrainConfig` the choices.

Random numbers are drawn in the library's order and shapes from generators seeded as `train` seeds them, so that
losses and gradients are the library's up to rounding. Left out: what `_check` refuses, position masks, entering at a
later block, and embeddings as sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spd_lens.objective import PGD, Merged, Persistent


class ReferenceGate(nn.Module):
    """Pre-activations `[... C]`; parameters by the library's names, those of vector gates as `[d_in C h]`."""

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor

    def __init__(self, kind: str, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kind = kind
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        if kind == "vector":
            self.w_in = nn.Parameter(einops.rearrange(self.w_in.detach(), "d_in (C h) -> d_in C h", C=len(self.b_out)))
            self.b_in = nn.Parameter(einops.rearrange(self.b_in.detach(), "(C h) -> C h", C=len(self.b_out)))

    def forward(self, x: Tensor, V: Tensor) -> Tensor:
        if self.kind == "shared":
            return F.gelu(x @ self.w_in + self.b_in) @ self.w_out + self.b_out
        if self.kind == "scalar":
            activations = einops.einsum(x, V, "... d_in, d_in C -> ... C")
            hidden = einops.einsum(activations, self.w_in, "... C, C h -> ... C h")
        else:
            hidden = einops.einsum(x, self.w_in, "... d_in, d_in C h -> ... C h")
        hidden = F.gelu(hidden + self.b_in)
        return einops.einsum(hidden, self.w_out, "... C h, C h -> ... C") + self.b_out


@dataclass(frozen=True)
class PassMasks:
    """What one site is masked with in one pass; `delta` None leaves the delta out, `routed` None is everywhere."""

    mask: Tensor
    delta: Tensor | None
    routed: Tensor | None


class ReferenceLinear(nn.Module):
    """`x @ W + b` that can be masked. A tied one is given the factors of the other and uses them transposed."""

    W: Tensor
    bias: Tensor | None

    def __init__(
        self, linear: nn.Linear, V: nn.Parameter, U: nn.Parameter, gate: ReferenceGate | None, *, tied: bool
    ) -> None:
        super().__init__()
        self.register_buffer("W", linear.weight.detach().T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.V, self.U, self.gate, self.tied = V, U, gate, tied
        self.delta: Tensor | None = None
        self.masks: PassMasks | None = None
        self.recording = False
        self.recorded: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """`V [d_in, C]`, `U [C, d_out]`."""
        return (self.U.T, self.V.T) if self.tied else (self.V, self.U)

    def rebuild_delta(self) -> None:
        """`W - V @ U`, with gradients, for all passes of one step."""
        V, U = self.factors()
        self.delta = self.W - einops.einsum(V, U, "d_in C, C d_out -> d_in d_out")

    def forward(self, x: Tensor) -> Tensor:
        if self.recording:
            self.recorded = x
        if self.masks is None:
            return self._target(x)
        V, U = self.factors()
        activations = einops.einsum(x, V, "... d_in, d_in C -> ... C")
        y = einops.einsum(activations * self.masks.mask, U, "... C, C d_out -> ... d_out")
        if self.masks.delta is not None:
            assert self.delta is not None
            unexplained = einops.einsum(x, self.delta, "... d_in, d_in d_out -> ... d_out")
            y = y + self.masks.delta.unsqueeze(-1) * unexplained
        if self.bias is not None:
            y = y + self.bias
        return y if self.masks.routed is None else torch.where(self.masks.routed.unsqueeze(-1), y, self._target(x))

    def _target(self, x: Tensor) -> Tensor:
        y = x @ self.W
        return y if self.bias is None else y + self.bias


class _Lower(torch.autograd.Function):
    """S1, straight."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        ctx.save_for_backward(pre)
        return torch.clamp(pre, 0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (pre,), grad = ctx.saved_tensors, grads[0]
        below = torch.where(grad < 0, 0.01 * grad, 0.0)
        return torch.where(pre <= 0, below, torch.where(pre <= 1, grad, 0.0))


def _upper(pre: Tensor) -> Tensor:
    """S2; the gradient at 0 is that of `p`, and TMS has many zeros."""
    return torch.where(pre > 1, 1 + 0.01 * (pre - 1), torch.where(pre >= 0, pre, 0.0))


def _uniform(like: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype)


class ReferenceStep:
    """`losses(batch)` and `step(batch)` of a model whose matrices are `ReferenceLinear`s.

    `sites` are named in the order in which the library draws masks: that of the forward pass.
    """

    def __init__(
        self, model: nn.Module, sites: Mapping[str, ReferenceLinear], config: Any, gate: Any | None = None
    ) -> None:
        _check(config)
        self.model, self.sites, self.config, self.gate = model, dict(sites), config, gate
        for p in model.parameters():
            p.requires_grad_(False)
        gates = [p for site in sites.values() if site.gate is not None for p in site.gate.parameters()]
        gates += [] if gate is None else list(gate.parameters())
        factors = [p for site in sites.values() if not site.tied for p in (site.V, site.U)]
        for p in gates + factors:
            p.requires_grad_(True)
        gate_lr = config.lr if config.gate_lr is None else config.gate_lr
        self.optimizer = torch.optim.Adam([{"params": factors}, {"params": gates, "lr": gate_lr}], lr=config.lr)
        seed = config.seed * 1_000_003
        self.masks, self.adversary, self.routing = (torch.Generator().manual_seed(seed + i) for i in (1, 2, 3))
        # Kept from step to step by a merged term (K4b, L9): one source for every row, position and channel.
        self.sources: dict[str, Tensor] = {}
        self.climbing: torch.optim.Optimizer | None = None

    def step(self, batch: Any) -> Tensor:
        """One training step; returns the total loss."""
        total = self.total(self.losses(batch))
        total.backward()
        self.update()
        return total.detach()

    def update(self) -> None:
        """What follows the backward pass."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.climbing is not None:
            self._ascend()

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return weighted_sum(losses, self.config)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """All terms at constant p, unweighted, by the library's names."""
        config = self.config
        if batch.start_at is not None or batch.position_mask is not None:
            raise ValueError("the reference runs whole passes and counts every position")
        clean, inputs = self._clean_pass(batch.inputs)
        if self.gate is not None:
            pre = self.gate(inputs)
        else:
            pre = {
                n: site.gate(inputs[n], site.factors()[0]) for n, site in self.sites.items() if site.gate is not None
            }
        lower = {name: _Lower.apply(p) for name, p in pre.items()}
        upper = {name: _upper(p) for name, p in pre.items()}
        if config.delta or config.faithfulness > 0:
            for site in self.sites.values():
                site.rebuild_delta()
        losses = {}
        if config.faithfulness > 0:
            losses["faithfulness"] = self._faithfulness()
        if config.minimality > 0:
            losses["minimality"] = torch.stack([self._penalty(g).sum(-1).mean() for g in upper.values()]).sum()
        if config.frequency > 0:
            means = [self._penalty(g).flatten(0, -2).mean(0) for g in upper.values()]
            terms = [(m * (1 + config.frequency_reference * m).log2()).sum() for m in means]
            losses["frequency"] = torch.stack(terms).sum()
        for term in config.reconstructions:
            losses[term.name] = self._reconstruction(term, batch.inputs, clean, lower)
        return losses

    def gradients(self) -> dict[str, Tensor]:
        """What a backward pass left, by the library's names."""
        found = {}
        for name, site in self.sites.items():
            if not site.tied:
                found |= {f"{name}.V": site.V.grad, f"{name}.U": site.U.grad}
            if site.gate is not None:
                found |= {f"{name}.gate.{key}": p.grad for key, p in site.gate.named_parameters()}
        return found if self.gate is None else found | self.gate.gradients()

    def _penalty(self, g: Tensor) -> Tensor:
        """L2's power, or S5 with its width at the start."""
        if self.config.penalty == "power":
            return (g + 1e-12).pow(self.config.p_start)
        return g**2 / (g**2 + self.config.gamma_start**2)

    @torch.no_grad()
    def _clean_pass(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self._set_masks({})
        for site in self.sites.values():
            site.recording = True
        output = self.model(inputs)
        recorded = {}
        for name, site in self.sites.items():
            recorded[name], site.recorded, site.recording = site.recorded, None, False
        return output, recorded

    def _set_masks(self, masks: Mapping[str, PassMasks]) -> None:
        for name, site in self.sites.items():
            site.masks = masks.get(name)

    def _faithfulness(self) -> Tensor:
        own = [site for site in self.sites.values() if not site.tied and site.delta is not None]
        deltas = [site.delta for site in own if site.delta is not None]
        if self.config.relative_faithfulness:
            errors = [d.square().sum() / site.W.square().sum() for d, site in zip(deltas, own, strict=True)]
            return torch.stack(errors).mean()
        return torch.stack([delta.square().sum() for delta in deltas]).sum() / sum(delta.numel() for delta in deltas)

    def _reconstruction(self, term: Any, inputs: Tensor, clean: Tensor, lower: Mapping[str, Tensor]) -> Tensor:
        passes = self._passes(term.routing, lower)
        if isinstance(term.masks, Merged):
            return self._merged(term.masks, inputs, clean, lower, passes[0])
        if term.masks == "stochastic":
            masks = [self._stochastic_masks(lower, routed) for routed in passes]
            return self._mean_loss(inputs, clean, masks)
        detached = {name: g.detach() for name, g in lower.items()}
        sources = {}
        for name, g in detached.items():
            shape = (*[1] * (g.ndim - 1), g.shape[-1] + 1)
            # In single precision also for a wider model, as the library draws them.
            sources[name] = torch.rand(shape, generator=self.adversary).to(g.dtype)
        assert isinstance(term.masks, PGD)
        for _ in range(term.masks.steps):
            leaves = {name: source.requires_grad_(True) for name, source in sources.items()}
            masks = [self._adversarial_masks(detached, leaves, routed) for routed in passes]
            gradients = torch.autograd.grad(self._mean_loss(inputs, clean, masks), list(leaves.values()))
            sources = {
                name: (leaf.detach() + term.masks.step_size * gradient.sign()).clamp(0, 1)
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
            }
        return self._mean_loss(inputs, clean, [self._adversarial_masks(lower, sources, routed) for routed in passes])

    def _merged(
        self, merged: Merged, inputs: Tensor, clean: Tensor, lower: Mapping[str, Tensor], routed: Mapping[str, Any]
    ) -> Tensor:
        """L9: the first rows under kept sources at all sites, the others under stochastic masks, as routed."""
        rows = round(merged.share * len(inputs))
        everywhere = dict.fromkeys(lower)
        if self.climbing is None:
            for name, g in lower.items():
                drawn = torch.rand((rows, *g.shape[1:-1], g.shape[-1] + 1), generator=self.adversary)
                self.sources[name] = drawn.to(g.dtype).requires_grad_()
            spec = merged.persistent
            self.climbing = torch.optim.Adam(self.sources.values(), lr=spec.lr, betas=spec.betas, maximize=True)
        detached = {name: g[:rows].detach() for name, g in lower.items()}
        for _ in range(merged.persistent.warm_steps):
            loss = self._mean_loss(
                inputs[:rows], clean[:rows], [self._adversarial_masks(detached, self.sources, everywhere)]
            )
            gradients = torch.autograd.grad(loss, list(self.sources.values()))
            for source, gradient in zip(self.sources.values(), gradients, strict=True):
                source.grad = gradient
            self._ascend()
        chosen = self._adversarial_masks({n: g[:rows] for n, g in lower.items()}, self.sources, everywhere)
        others = self._stochastic_masks({n: g[rows:] for n, g in lower.items()}, everywhere)
        both = {}
        for name, where in routed.items():
            a, b = chosen[name], others[name]
            delta = None if a.delta is None or b.delta is None else torch.cat([a.delta, b.delta])
            at = torch.cat([torch.ones_like(where[:rows]), where[rows:]])
            both[name] = PassMasks(torch.cat([a.mask, b.mask]), delta, at)
        return self._mean_loss(inputs, clean, [both])

    def _ascend(self) -> None:
        """One step of the kept sources on the gradients that they have."""
        assert self.climbing is not None
        self.climbing.step()
        self.climbing.zero_grad(set_to_none=True)
        with torch.no_grad():
            for source in self.sources.values():
                source.clamp_(0, 1)

    def _mean_loss(self, inputs: Tensor, clean: Tensor, masks: Iterable[Mapping[str, PassMasks]]) -> Tensor:
        losses = []
        for of_pass in masks:
            self._set_masks(of_pass)
            losses.append(_divergence(clean, self.model(inputs), self.config.divergence))
        return torch.stack(losses).mean()

    def _passes(self, routing: str, lower: Mapping[str, Tensor]) -> list[dict[str, Tensor | None]]:
        """K5: per pass, the masked sites and the positions where they are."""
        if routing == "all":
            return [dict.fromkeys(lower)]
        if routing == "layerwise":
            return [{name: None} for name in lower]
        positions = next(iter(lower.values())).shape[:-1]
        k = torch.randint(1, len(lower) + 1, positions, generator=self.routing)
        scores = torch.rand((len(lower), *positions), generator=self.routing)
        chosen = scores.argsort(0).argsort(0) < k
        return [dict(zip(lower, chosen, strict=True))]

    def _stochastic_masks(
        self, lower: Mapping[str, Tensor], routed: Mapping[str, Tensor | None]
    ) -> dict[str, PassMasks]:
        """K1, K2."""
        masks = {}
        for name, where in routed.items():
            g = lower[name]
            source = _uniform(g, g.shape, self.masks)
            delta = _uniform(g, g.shape[:-1], self.masks) if self.config.delta else None
            masks[name] = PassMasks(g + (1 - g) * source, delta, where)
        return masks

    def _adversarial_masks(
        self, lower: Mapping[str, Tensor], sources: Mapping[str, Tensor], routed: Mapping[str, Tensor | None]
    ) -> dict[str, PassMasks]:
        """K3."""
        masks = {}
        for name, where in routed.items():
            g, source = lower[name], sources[name]
            delta = source[..., -1].expand(g.shape[:-1]) if self.config.delta else None
            masks[name] = PassMasks(g + (1 - g) * source[..., :-1], delta, where)
        return masks


def _divergence(clean: Tensor, masked: Tensor, kind: str) -> Tensor:
    """L4."""
    if kind == "mse":
        return F.mse_loss(masked, clean)
    log_p, log_q = F.log_softmax(clean, dim=-1), F.log_softmax(masked, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def weighted_sum(losses: Mapping[str, Tensor], config: Any) -> Tensor:
    """The total loss."""
    weights = {name: getattr(config, name) for name in ("faithfulness", "minimality", "frequency")}
    weights |= {term.name: term.coefficient for term in config.reconstructions}
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _check(config: Any) -> None:
    """Refuse every choice that is not written here."""
    plain = {"squash": "straight", "precision": "fp32", "hidden": 0.0, "p_end": None, "tolerance": None}
    plain |= {"relative_reconstruction": False}
    plain |= {"clip_subcomponents": None, "clip_gates": None, "schedule": "constant", "lr_warmup": 0}
    for name, only in plain.items():
        if getattr(config, name) != only:
            raise ValueError(f"{name}={getattr(config, name)!r}; the reference knows only {only!r}")
    if config.frequency > 0 and config.frequency_reference is None:
        raise ValueError(f"frequency={config.frequency}; the reference knows it only with a frequency_reference")
    for term in config.reconstructions:
        pgd = isinstance(term.masks, PGD) and term.masks.scope == "batch"
        known = (term.masks == "stochastic" or pgd) and term.routing in ("all", "layerwise", "subset")
        merged = isinstance(term.masks, Merged) and term.routing == "subset" and _plain(term.masks.persistent)
        if not (known or merged) or term.draws != 1:
            raise ValueError(
                f"{term}; the reference knows stochastic and PGD(...), one draw, scope 'batch', and Merged with plain "
                "sources by position and subset routing"
            )


def _plain(spec: Persistent) -> bool:
    return spec.scope == "position" and spec.lr_warmup == spec.start == spec.first_steps == 0


def replace_linears(model: nn.Module, paths: Mapping[str, str], decomposition: Any) -> dict[str, ReferenceLinear]:
    """Put a `ReferenceLinear` with the decomposition's V, U and gate in place of the `nn.Linear` at each path.

    `paths` maps sites to modules of `model`; a tied site comes after the one that it is tied to.
    """
    start = {key: value.detach() for key, value in decomposition.tensors().items()}
    sites: dict[str, ReferenceLinear] = {}
    for name, path in paths.items():
        of_gate = {k.removeprefix(f"{name}.gate."): v for k, v in start.items() if k.startswith(f"{name}.gate.")}
        gate = ReferenceGate(decomposition.settings.gate, of_gate) if of_gate else None
        tied_to = decomposition[name].site.tied_to
        if tied_to is None:
            V, U = nn.Parameter(start[f"{name}.V"].clone()), nn.Parameter(start[f"{name}.U"].clone())
        else:
            V, U = sites[tied_to].V, sites[tied_to].U
        original: Any = model.get_submodule(path)
        sites[name] = ReferenceLinear(original, V, U, gate, tied=tied_to is not None)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, sites[name])
    return sites

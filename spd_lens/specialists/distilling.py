"""Short distillation: a small model learns the target's next-token distribution on the domain's text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spd_lens.support.given import given_function, given_instance, given_number, given_seed, given_whole, shown


def distil(
    model: nn.Module,
    target: Callable[[Tensor], Tensor],
    rows: Tensor,
    *,
    steps: int,
    lr: float = 1e-3,
    batch: int = 8,
    seed: int = 0,
    keep_zeros: bool = False,
) -> list[float]:
    """Train every parameter of `model` by `KL(target || model)` on rows drawn from `rows`; the loss of each step.

    Adam with a learning rate that falls to 0 along a cosine. `keep_zeros`: what is 0 stays 0, as pruning wants it.

    Raises ValueError if the loss does not stay finite; the model is spoilt then.
    """
    given_instance("model", model, nn.Module, "Specialist.model is one")
    given_function("target", target, "target(tokens) -> logits")
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not len(rows):
        raise TypeError(f"rows={shown(rows)}; expected token ids [row pos]")
    steps, batch = given_whole("steps", steps, least=1), given_whole("batch", batch, least=1)
    lr, seed = given_number("lr", lr, above=0.0), given_seed(seed)
    parameters = list(model.parameters())
    zeros = [p == 0 for p in parameters] if keep_zeros else []
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        part = rows[torch.randint(0, len(rows), (batch,), generator=generator)]
        with torch.no_grad():
            wanted = target(part).log_softmax(-1)
        with torch.enable_grad():
            logp = model(part).log_softmax(-1)
            # A token that the model can give no probability has a log-probability of minus infinity.
            known = logp != -torch.inf
            loss = (wanted.exp() * (wanted - logp.masked_fill(~known, 0.0)))[known].sum() / part.numel()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for p, zero in zip(parameters, zeros, strict=False):
                p.masked_fill_(zero, 0.0)
        losses.append(loss.detach())
    found = [float(loss) for loss in losses]
    wrong = next((step for step, loss in enumerate(found) if not math.isfinite(loss)), None)
    if wrong is not None:
        raise ValueError(f"the loss is {found[wrong]} at step {wrong} of {steps}; give a smaller lr than {lr:g}")
    return found

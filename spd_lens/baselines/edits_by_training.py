"""Ways to take a habit out of a model by training: a task vector, LoRA (peft), and fine-tuning of every parameter.

All train on the same examples as the others, by Adam, all at once. Against a habit the loss is
`-log(1 - p(answers))` where it comes next, plus the KL to the unedited model at the prompts' other positions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.baselines.edits_of_weights import site_deltas, weight_rival
from spd_lens.baselines.rival import Rival, against
from spd_lens.core import Decomposition
from spd_lens.editing import Habit, outputs_of

# Steps of Adam, all examples at once.
STEPS = 20


def _trained(
    decomposition: Decomposition, loss_of: Callable[[], Tensor], lr: float, steps: int
) -> list[tuple[Tensor, Tensor]]:
    """`(parameter, change)` of every parameter of the target after `steps` of Adam; the target stays as it was."""
    own = {id(p) for p in decomposition.subcomponent_parameters() + decomposition.gate_parameters()}
    parameters = [p for p in decomposition.model.parameters() if id(p) not in own and p.is_floating_point()]
    before = [(p.detach().clone(), p.requires_grad) for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        optimiser = torch.optim.Adam(parameters, lr=lr)
        for _ in range(steps):
            with torch.enable_grad():
                loss = loss_of()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
        moved = [p.detach() - old for p, (old, _) in zip(parameters, before, strict=True)]
    finally:
        for p, (old, wanted) in zip(parameters, before, strict=True):
            p.grad = None
            p.requires_grad_(wanted)
            p.data.copy_(old)
    return list(zip(parameters, moved, strict=True))


def fine_tuning(decomposition: Decomposition, habit: Habit, *, lr: float = 3e-4, steps: int = STEPS) -> Rival:
    """Every parameter of the target, fine-tuned against the habit."""
    forward = decomposition.host.forward
    with torch.no_grad():
        clean = forward(habit.prompts)
    moved = _trained(decomposition, lambda: against(habit, forward(habit.prompts), clean), lr, steps)
    return weight_rival("full fine-tuning", moved)


def task_vector(decomposition: Decomposition, habit: Habit, *, lr: float = 3e-4, steps: int = STEPS) -> Rival:
    """Fine-tune towards the habit, and go the other way."""
    forward = decomposition.host.forward
    moved = _trained(decomposition, lambda: -habit.log_probability(forward(habit.prompts)).mean(), lr, steps)
    return weight_rival("task vector", [(p, -delta) for p, delta in moved])


def lora(
    decomposition: Decomposition, plain: nn.Module, habit: Habit, *, rank: int = 4, lr: float = 3e-3, steps: int = STEPS
) -> Rival:
    """LoRA (peft) on every matrix that is decomposed, trained against the habit.

    `plain` is the unedited model as peft takes it: a Hugging Face GPT-2, or, for any host,
    `spd_lens.specialists.plain_copy(decomposition, cut_below=None)` (in a bridge the modules of TransformerLens's
    native model have other names).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'spd-lens[baselines]'") from error
    torch.manual_seed(0)
    model: Any = copy.deepcopy(plain)
    targets = {name: _sites_of(name) for name, m in model.named_modules() if hasattr(m, "weight")}
    targets = {name: parts for name, parts in targets.items() if parts and parts[0] in decomposition}
    # GPT-2's modules hold their matrices the other way round.
    is_conv = not all(isinstance(model.get_submodule(name), nn.Linear) for name in targets)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(targets), lora_dropout=0.0, fan_in_fan_out=is_conv
    )
    model = inject_adapter_in_model(config, model)
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in trained))
    optimiser = torch.optim.Adam(trained, lr=lr)
    with torch.no_grad():
        clean = decomposition.host.forward(habit.prompts)
    for _ in range(steps):
        with torch.enable_grad():
            loss = against(habit, outputs_of(model, habit.prompts), clean)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    deltas: dict[str, Tensor] = {}
    for name, sites in targets.items():
        layer = model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach()  # in the layout of the weight
        delta = delta if is_conv else delta.T
        for site, part in zip(sites, delta.split(delta.shape[1] // len(sites), dim=1), strict=True):
            deltas[site] = part
    rival = weight_rival("LoRA", site_deltas(decomposition, deltas))
    return Rival(rival.name, rival.at, sum(p.numel() for p in trained), rival.strongest)


_GPT2 = {"attn.c_attn": ("attn.W_Q", "attn.W_K", "attn.W_V"), "attn.c_proj": ("attn.W_O",), "mlp.c_fc": ("mlp.W_in",),
         "mlp.c_proj": ("mlp.W_out",)}  # fmt: skip
_NATIVE = {f"attn.{k}": (f"attn.W_{k.upper()}",) for k in "qkvo"} | {
    f"mlp.{k}": (f"mlp.W_{k}",) for k in ("gate", "in", "out")
}


def _sites_of(module: str) -> list[str]:
    """The sites whose matrices a module of GPT-2 or of a native model holds, side by side."""
    found = re.fullmatch(r"(?:transformer\.h|layers|blocks)\.(\d+)\.(.+)", module)
    if found is None:
        return []
    return [f"blocks.{found[1]}.{part}" for part in (_GPT2 | _NATIVE).get(found[2], ())]

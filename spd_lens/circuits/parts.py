"""What circuits can be made of: subcomponents, or heads and MLPs, under the same ablation and with the same metric.

A *part* can be kept, computed live from the clean prompt, or left out: then what it writes is that of the
corrupted prompt at the same position (`outside="corrupted"`), or 0 (`outside="zero"`). Everything that is no part
(embeddings, matrices that are not decomposed, biases) always stays live, so compare parts that cover the same
matrices: `HeadAndMLPParts` takes only heads and MLPs that have decomposed matrices.

Scores are attribution patching on the clean run: `|mean over rows of sum over positions of dm/du * (u_out - u)|`, the
first-order estimate of what leaving the part out does to the metric m; `u` is the part's activation. One backward
pass for all parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.interventions import HookList
from spd_lens.core.units import DELTA, Unit
from spd_lens.patching.frozen import output_names
from spd_lens.patching.hooks import Hook, add, hold, probe, put, store, zero
from spd_lens.patching.runner import Runner
from spd_lens.support.names import near_names
from spd_lens.tasks.task import NormalizedMetric, Task

Outside: TypeAlias = Literal["corrupted", "zero"]


class Parts(ABC):
    """Parts of one kind on one task. `labels` and `parameters` (numbers in their weight matrices) have one entry each.

    `what` names the kind and what stands in for a part that is left out.
    """

    what: str
    labels: list[str]
    parameters: list[int]

    def __init__(self, decomposition: Decomposition, task: Task, outside: Outside) -> None:
        if outside not in ("corrupted", "zero"):
            raise ValueError(f"outside={outside!r}; expected 'corrupted' (the other prompt's values) or 'zero'")
        if not isinstance(task, Task):
            raise TypeError(f"task is a {type(task).__name__}; expected a Task with clean and corrupted prompts")
        checked_decomposition(decomposition, type(self).__name__)
        self.decomposition, self.outside = decomposition, outside
        self.task = task.to(decomposition.device)
        self.metric: NormalizedMetric = self.task.metric(decomposition)
        sites = set(decomposition)
        # What stands before the first decomposed block runs once.
        self._clean = Runner(decomposition, self.task.clean, sites)
        self._start = self._clean.first_block(list(sites))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} parts on {len(self.task.clean)} prompts: {self.what})"

    @abstractmethod
    def hooks(self, kept: Bool[Tensor, " part"]) -> HookList:
        """Hooks for a pass over the clean prompts in which only the parts in `kept` are live."""

    @abstractmethod
    def scores(self) -> Float[Tensor, " part"]:
        """Attribution of every part (see the module); larger means that leaving it out should change more."""

    def logits(self, kept: Bool[Tensor, " part"]) -> Tensor:
        """Logits `[row pos d_vocab]` on the clean prompts with only the parts in `kept` live."""
        if kept.dtype != torch.bool or kept.shape != (len(self),):
            raise ValueError(f"kept is {kept.dtype} {tuple(kept.shape)}; expected bool ({len(self)},), one per part")
        return self._clean.run_hooked(1, self.hooks(kept), self._start)[0]

    def faithfulness(self, kept: Bool[Tensor, " part"]) -> float:
        """`(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted))` of the mean logit difference m.

        `m(corrupted)` is the whole model's on the corrupted prompts, also where left-out parts are 0.
        """
        return float(self.metric(self.logits(kept)))

    def index(self, label: str) -> int:
        """The number of a part by its label. Raises ValueError, with near labels, for others."""
        if label not in self.labels:
            raise ValueError(f"no part {label!r}; near: {near_names(label, self.labels)}")
        return self.labels.index(label)

    def _gradients(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The value at each hook point on the clean prompts, and the gradient of the metric by it."""
        values: dict[str, Tensor] = {}
        probes: dict[str, Tensor] = {}
        hooks = [(name, probe(probes, name, values)) for name in names]
        model, host = self.decomposition.model, self.decomposition.host
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            if self._start is None:
                output = host.forward(self.task.clean)
            else:
                output = host.forward_from(self._start, self._clean.residuals[self._start])
            found = torch.autograd.grad(self.metric(output), [probes[name] for name in names], allow_unused=True)
        gradients = {
            name: torch.zeros_like(values[name]) if grad is None else grad
            for name, grad in zip(names, found, strict=True)
        }
        return values, gradients

    def _recorded(self, names: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        hooks = [(name, store(values, name)) for name in names]
        with torch.no_grad(), self.decomposition.model.hooks(fwd_hooks=hooks):
            self.decomposition.host.forward(tokens)
        return values


class SubcomponentParts(Parts):
    """One part for every subcomponent (`"site[3]"`), and one for every site's delta `W - V U` (`"site[delta]"`).

    `units` has them as `Unit`s, in the order of `labels`.

    With the deltas, all parts together are the target, whatever the decomposition leaves unexplained; a delta has
    `d_in * d_out` parameters, a subcomponent `d_in + d_out`. With `deltas=False` deltas are no parts and always left
    out, as in `find_circuit`; then all parts together are only as faithful as `V U` is.
    """

    def __init__(
        self, decomposition: Decomposition, task: Task, *, outside: Outside = "corrupted", deltas: bool = True
    ) -> None:
        super().__init__(decomposition, task, outside)
        self.what = f"{'subcomponents and deltas' if deltas else 'subcomponents'}, left out: {outside}"
        self.units: list[Unit] = []
        self.parameters, self._slices, self._with_deltas = [], {}, deltas
        for site, weight in decomposition.items():
            d_in, d_out, count = weight.V.shape[0], weight.U.shape[1], weight.n_subcomponents
            first = len(self.units)
            self.units += [Unit(((site, c),)) for c in [*range(count), *([DELTA] if deltas else [])]]
            self.parameters += [d_in + d_out] * count + ([d_in * d_out] if deltas else [])
            self._slices[site] = slice(first, len(self.units))
        self.labels = [str(unit) for unit in self.units]
        self._outputs = output_names(decomposition)
        self._acts, self._deltas = self._values(self.task.corrupted)

    def _values(self, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """On a clean pass, every site's activations `a` and what its delta writes, `x @ (W - V U)`.

        The delta's part is read at the hook point of the site's output, in whatever layout the host has there, as the
        difference of two passes with all subcomponents off; what goes on from there is the clean output all the same.
        """
        acts_names = {site: weight.site.point_names()[0] for site, weight in self.decomposition.items()}
        clean = self._recorded([*acts_names.values(), *self._outputs.values()], tokens)
        parts: list[dict[str, Tensor]] = []
        for delta_off in (False, True):
            hooks: HookList = []
            parts.append({})
            for site, weight in self.decomposition.items():
                hooks.append((acts_names[site], zero()))
                if delta_off:
                    hooks.append((weight.site.point_names()[3], zero()))
                output = self._outputs[site]
                hooks += [(output, store(parts[-1], site)), (output, hold(clean[output]))]
            with torch.no_grad(), self.decomposition.model.hooks(fwd_hooks=hooks):
                self.decomposition.host.forward(tokens)
        deltas = {site: parts[0][site] - parts[1][site] for site in self.decomposition}
        return {site: clean[name] for site, name in acts_names.items()}, deltas

    def hooks(self, kept: Bool[Tensor, " part"]) -> HookList:
        hooks: HookList = []
        for site, weight in self.decomposition.items():
            acts_name, _, _, delta_name = weight.site.point_names()
            own = kept[self._slices[site]].to(self.decomposition.device)
            value = self._acts[site] if self.outside == "corrupted" else torch.zeros((), device=own.device)
            count = weight.n_subcomponents
            hooks.append((acts_name, put(~own[:count], value)))
            if not (self._with_deltas and bool(own[-1])):
                hooks.append((delta_name, zero()))
                if self.outside == "corrupted":
                    hooks.append((self._outputs[site], add(self._deltas[site])))
        return hooks

    def scores(self) -> Float[Tensor, " part"]:
        points = {site: weight.site.point_names()[0] for site, weight in self.decomposition.items()}
        values, gradients = self._gradients([*points.values(), *self._outputs.values()])
        _, clean_deltas = self._values(self.task.clean)
        found = []
        for site, name in points.items():
            out = self._acts[site] if self.outside == "corrupted" else 0.0
            products = gradients[name] * (out - values[name])
            found.append(products.flatten(0, -2).sum(0))
            if self._with_deltas:
                other = self._deltas[site] if self.outside == "corrupted" else 0.0
                found.append((gradients[self._outputs[site]] * (other - clean_deltas[site])).sum().reshape(1))
        # The metric is a mean over rows, so its gradient is divided by their number already.
        return torch.cat(found).abs()


class HeadAndMLPParts(Parts):
    """One part for every attention head (`"head 1.2"`, at `hook_z`) and MLP (`"mlp 1"`, at `hook_mlp_out`) that has a
    decomposed matrix, computed and replaced as a whole.

    Parameters are those of its weight matrices: `W_Q`, `W_K`, `W_V` and `W_O` of the head (keys and values that
    several heads share count for each of them), or all of the MLP's. Raises ValueError for models without these hook
    points, and if only embeddings are decomposed.
    """

    def __init__(self, decomposition: Decomposition, task: Task, *, outside: Outside = "corrupted") -> None:
        super().__init__(decomposition, task, outside)
        self.what = f"heads and MLPs, left out: {outside}"
        self.labels, self.parameters, self._places = [], [], []
        host = decomposition.host
        for layer, kind in decomposed_blocks(decomposition):
            if kind == "attn":
                for head in range(host.n_heads()):
                    self._place(f"head {layer}.{head}", host.heads_point(layer), head, host.parameters_per_head())
            else:
                self._place(f"mlp {layer}", host.mlp_point(layer), None, host.mlp_parameters(layer))
        if not self.labels:
            raise ValueError("no head and no MLP has a decomposed matrix; decompose some of blocks.*")
        self._names = list(dict.fromkeys(name for name, _ in self._places))
        self._corrupted = self._recorded(self._names, self.task.corrupted)

    def _place(self, label: str, name: str, head: int | None, parameters: int) -> None:
        self.labels.append(label)
        self.parameters.append(parameters)
        self._places.append((name, head))

    def hooks(self, kept: Bool[Tensor, " part"]) -> HookList:
        hooks: HookList = []
        for name in self._names:
            replaced = [head for (n, head), k in zip(self._places, kept.tolist(), strict=True) if n == name and not k]
            if replaced:
                value = (
                    self._corrupted[name] if self.outside == "corrupted" else torch.zeros_like(self._corrupted[name])
                )
                hooks.append((name, hold(value) if None in replaced else _replace_heads(replaced, value)))
        return hooks

    def scores(self) -> Float[Tensor, " part"]:
        values, gradients = self._gradients(self._names)
        found = []
        for name, head in self._places:
            out = self._corrupted[name] if self.outside == "corrupted" else torch.zeros_like(values[name])
            products = gradients[name] * (out - values[name])
            found.append(products.sum() if head is None else products[..., head, :].sum())
        return torch.stack(found).abs()


def decomposed_blocks(decomposition: Decomposition) -> list[tuple[int, str]]:
    """The blocks and halves of them (`"attn"`, `"mlp"`) that have a decomposed matrix."""
    found = [(w.site.layer, site.split(".")[2]) for site, w in decomposition.items() if w.site.layer is not None]
    return list(dict.fromkeys(found))


def _replace_heads(heads: Sequence[int | None], by: Tensor) -> Hook:
    """Hook: `by` in place of some heads of `[row pos head d_head]`."""
    where = torch.zeros(by.shape[-2], 1, dtype=torch.bool)
    where[list(heads)] = True
    return put(where, by)

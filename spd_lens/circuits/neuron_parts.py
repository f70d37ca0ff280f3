"""Heads and neurons as parts of a circuit, beside which subcomponents can be set."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lens.circuits.parts import Outside, Parts, decomposed_blocks
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.interventions import HookList
from spd_lens.patching.hooks import put
from spd_lens.tasks.task import Task


class HeadAndNeuronParts(Parts):
    """One part for every attention head (`"head 1.2"`, at `hook_z`) and neuron (`"neuron 1.37"`, at `hook_post`) of the
    heads and MLPs that have a decomposed matrix.

    Parameters are those of a head's matrices, and a neuron's share of its MLP's. A bias behind the neurons is no part
    of any of them and stays, where `HeadAndMLPParts` replaces it with the MLP's output. Raises ValueError for models
    without these hook points, and if only embeddings are decomposed.
    """

    def __init__(self, decomposition: Decomposition, task: Task, *, outside: Outside = "corrupted") -> None:
        super().__init__(decomposition, task, outside)
        self.what = f"heads and neurons, left out: {outside}"
        self.labels, self.parameters = [], []
        host = decomposition.host
        points = {}
        for layer, kind in decomposed_blocks(decomposition):
            name = host.heads_point(layer) if kind == "attn" else host.neurons_point(layer)
            if name is None:
                raise ValueError(f"block {layer} has no HookPoint of its neurons; expected a model that has one")
            points[name] = (layer, kind)
        if not points:
            raise ValueError("no head and no MLP has a decomposed matrix; decompose some of blocks.*")
        self._out = self._recorded(list(points), self.task.corrupted)
        if outside == "zero":
            self._out = {name: torch.zeros_like(value) for name, value in self._out.items()}
        self._slices: dict[str, slice] = {}
        self._trailing: dict[str, int] = {}
        for name, (layer, kind) in points.items():
            # Axes of a part's own values: a head's d_head, or none.
            self._trailing[name] = trailing = 1 if kind == "attn" else 0
            count, first = self._out[name].shape[-1 - trailing], len(self.labels)
            own = host.parameters_per_head() if kind == "attn" else host.mlp_parameters(layer) // count
            self.labels += [f"{'head' if kind == 'attn' else 'neuron'} {layer}.{i}" for i in range(count)]
            self.parameters += [own] * count
            self._slices[name] = slice(first, first + count)

    def hooks(self, kept: Bool[Tensor, " part"]) -> HookList:
        hooks: HookList = []
        for name, own in self._slices.items():
            left_out = ~kept[own]
            if bool(left_out.any()):
                where = left_out.reshape(-1, *[1] * self._trailing[name])
                hooks.append((name, put(where, self._out[name])))
        return hooks

    def scores(self) -> Float[Tensor, " part"]:
        values, gradients = self._gradients(list(self._slices))
        found = []
        for name, trailing in self._trailing.items():
            products = gradients[name] * (self._out[name] - values[name])
            found.append((products.sum(-1) if trailing else products).flatten(0, -2).sum(0))
        return torch.cat(found).abs()

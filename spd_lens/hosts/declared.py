"""Sites of any `HookedRootModule` that declares them: how a model of one's own becomes decomposable.

A model declares its matrices in a method `spd_sites() -> list[DeclaredSite]`. Nothing is guessed: a weight that is
not declared is not a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.hosts.host import Host
from spd_lens.hosts.provenance import Provenance
from spd_lens.hosts.site import ModuleInput, PointOutput, Site, StoredMatrix, argument


@dataclass(frozen=True)
class DeclaredSite:
    """One matrix that a model offers for decomposition, by names of its own modules.

    - `name`: the site's name, unique in the model (`"W"`, `"mlp.0.W_in"`).
    - `weight`: dotted path of the parameter.
    - `input`: dotted name of a HookPoint whose output enters the matmul, or of a module (`""` is the model
      itself) whose first argument does.
    - `output`: dotted name of the HookPoint that `x @ W + b` passes, before any non-linearity.
    - `bias`: dotted path of the bias that is in that output, or None.
    - `transposed`: the parameter is stored as `[d_out, d_in]`, or the matrix in use is its transpose.
    - `tied_to`: the site of the same parameter used the other way round; both share their subcomponents.
    - `is_lookup`: the input is integer indices (one-hot).
    """

    name: str
    weight: str
    input: str
    output: str
    bias: str | None = None
    transposed: bool = False
    tied_to: str | None = None
    is_lookup: bool = False


class DeclaredHost(Host):
    """A HookedRootModule with a method `spd_sites() -> list[DeclaredSite]`."""

    def _declared(self) -> dict[str, DeclaredSite]:
        return {declared.name: declared for declared in self.model.spd_sites()}

    def site_names(self) -> list[str]:
        return list(self._declared())

    def default_sites(self, layer: int) -> tuple[str, ...]:
        prefix = f"blocks.{layer}."
        return tuple(name.removeprefix(prefix) for name in self._declared() if name.startswith(prefix))

    def site(self, name: str) -> Site:
        declared = self._declared()[name]
        owner, _, attribute = declared.weight.rpartition(".")
        output = self.model.get_submodule(declared.output)
        if not isinstance(output, HookPoint):
            raise ValueError(
                f"site {name!r} declares output {declared.output!r}, a {type(output).__name__}; "
                "expected the name of a HookPoint"
            )
        entry = self.model.get_submodule(declared.input)
        read_from = (
            PointOutput(entry)
            if isinstance(entry, HookPoint)
            else ModuleInput(entry, partial(argument, name="x", index=0))
        )
        bias = None
        if declared.bias is not None:
            bias_owner, _, bias_attribute = declared.bias.rpartition(".")
            bias = (self.model.get_submodule(bias_owner), bias_attribute)
        pattern = "d_out d_in -> d_in d_out" if declared.transposed else "d_in d_out -> d_in d_out"
        in_block = name.startswith("blocks.")
        layer = int(name.split(".")[1]) if in_block else None
        inner = name if layer is None else name.split(".", 2)[2]
        stem = ("" if layer is None else f"blocks.{layer}.") + "hook_" + inner.replace(".", "_")
        return Site(
            name=name,
            point_stem=stem,
            parent=self.model if layer is None else self.block(layer) or self.model,
            layer=layer,
            matrix=StoredMatrix(self.model.get_submodule(owner), attribute, pattern),
            output=output,
            read_from=read_from,
            bias=bias,
            is_lookup=declared.is_lookup,
            tied_to=declared.tied_to,
        )

    def forward(self, batch: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As of any host; inputs of a shape or dtype that the model cannot multiply are a ValueError."""
        try:
            return super().forward(batch, attention_mask)
        except RuntimeError as error:
            # PyTorch has no class for these.
            text = str(error)
            if any(words in text for words in ("cannot be multiplied", "must match the size", "same dtype")):
                kind, given = type(self.model).__name__, f"{tuple(batch.shape)} of {batch.dtype}"
                raise ValueError(f"this {kind} cannot run inputs {given}: {text}") from error
            raise

    def provenance(self) -> Provenance:
        name = getattr(self.model, "name", None) or type(self.model).__name__
        return Provenance(model_name=str(name), host="HookedRootModule", weight_processing="none")

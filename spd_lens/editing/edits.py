"""`edit`: subcomponents scaled, ablated, or turned to other directions, tried as hooks before anything is written.

    W' = W + sum_c (s_c - 1) V_c U_c                      by subcomponent or component (C4)
    W' = W - V_c U_c + s_c V'_c U'_c                      by direction (`Rewrite`)

The delta `W - V U` and everything else stay. With `when=Above(...)` the sum is added only at positions where an
importance of the clean pass is above a threshold; such an edit has no matrix, so it can be tried and not baked.

Nothing here trains or looks for anything: `find` chooses what to edit, `report` says what an edit does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.gates import matmul_or_lookup
from spd_lens.core.input_reader import tapped_input
from spd_lens.core.inputs import checked_decomposition, checked_tokens
from spd_lens.core.interventions import HookList, check_site
from spd_lens.core.units import units_of
from spd_lens.editing.baking import explained_by_rounding, given_plain, outputs_of, plain_model, some_tokens
from spd_lens.editing.change import Above, Change, Changes, changes_of, check_condition, low_rank
from spd_lens.support.given import given_number


class Edit:
    """A checked edit of one decomposition. Made by `edit`.

    - `changes`: its lines. `when`: where it acts; None: everywhere.
    """

    def __init__(self, decomposition: Decomposition, changes: tuple[Change, ...], when: Above | None) -> None:
        self.decomposition, self.changes, self.when = decomposition, changes, when

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it changes, each once, in the decomposition's order."""
        named = {site for change in self.changes for site in change.unit.sites}
        return tuple(site for site in self.decomposition if site in named)

    @property
    def n_subcomponents(self) -> int:
        """How many subcomponents it changes."""
        return sum(len(change.unit.members) for change in self.changes)

    def factors(self, site: str) -> tuple[Tensor, Tensor]:
        """`A [d_in, r]`, `B [r, d_out]` in float64: the edited matrix is `W + A @ B`.

        Raises ValueError for a site that the edit leaves as it is.
        """
        check_site(self.decomposition, site)
        if site not in self.sites:
            raise ValueError(f"this edit does not change {site}; expected one of {', '.join(self.sites)}")
        A, B, _ = low_rank(self.decomposition, self.changes, site)
        return A, B

    def rank(self, site: str) -> int:
        """The rank of what is added to a site's matrix."""
        A, B = self.factors(site)
        R = torch.linalg.qr(A.cpu(), mode="r").R @ torch.linalg.qr(B.T.cpu(), mode="r").R.T
        return int(torch.linalg.matrix_rank(R))

    def __str__(self) -> str:
        where = "" if self.when is None else f", {self.when}"
        return "\n".join([f"edit of {self.n_subcomponents} subcomponents{where}", *(f"  {c}" for c in self.changes)])

    def __repr__(self) -> str:
        lines = [str(change) for change in self.changes[:3]]
        more = [f"{len(self.changes) - 3} more"] if len(self.changes) > 3 else []
        return f"Edit({'; '.join(lines + more)}{'' if self.when is None else f'; {self.when}'})"

    def scaled(self, strength: float) -> Edit:
        """The same edit at another strength: `W + strength * A @ B`; 0 would be no edit at all.

        Raises ValueError for a strength of 0, and for rewrites of what is read, which have no strength.
        """
        strength = given_number("strength", strength)
        changes = []
        for change in self.changes:
            if change.reads is not None:
                raise ValueError(f"{change}: an edit of what is read has no strengths; scale another edit")
            if change.writes is None:
                changes.append(Change(change.unit, 1 + strength * (change.scale - 1)))
            else:
                own = self.decomposition[change.unit.site].U[change.unit.id].detach()
                writes = own + strength * (change.scale * change.writes - own)
                changes.append(Change(change.unit, 1.0, writes))
        return _checked(self.decomposition, tuple(changes), self.when)

    # -- trying ------------------------------------------------------------------------------------------------

    def hooks(self, tokens: Any = None) -> HookList:
        """The edit as a list of ordinary TransformerLens hooks on the masks, to be added to others.

        A conditional edit needs the `tokens` of the pass: where it acts is read from a clean pass over them (S4).
        Raises ValueError for rewrites, which no mask can express (`applied` can), and for missing tokens.
        """
        self.decomposition.require_present()
        rewritten = [change for change in self.changes if change.is_rewrite]
        if rewritten:
            raise ValueError(f"{rewritten[0]}: masks only scale; use `with edit.applied():` for edits of directions")
        acts = self._acting(tokens)
        return [hook for site in self.sites for hook in self._mask_hooks(site, acts)]

    @contextmanager
    def applied(self, tokens: Any = None) -> Iterator[Any]:
        """While open, the model computes what the edited one computes; afterwards it is exactly as it was.

        Gives the model. A conditional edit needs the `tokens` of the passes that are run inside.
        """
        self.decomposition.require_present()
        acts = self._acting(tokens)
        with ExitStack() as stack:
            hooks: HookList = []
            for site in self.sites:
                if any(change.is_rewrite and site in change.unit.sites for change in self.changes):
                    hooks.append(stack.enter_context(self._rewriting(site, acts)))
                else:
                    hooks += self._mask_hooks(site, acts)
            stack.enter_context(self.decomposition.model.hooks(fwd_hooks=hooks))
            yield self.decomposition.model

    @torch.no_grad()
    def logits(self, tokens: Any) -> Tensor:
        """The edited model's output on tokens (or inputs)."""
        checked_decomposition(self.decomposition, "Edit.logits")
        tokens = checked_tokens(tokens, self.decomposition.host).to(self.decomposition.device)
        with self.applied(None if self.when is None else tokens):
            return self.decomposition.host.forward(tokens)

    # -- for good ----------------------------------------------------------------------------------------------

    def bake(self, *, check: bool = True) -> nn.Module:
        """A plain model whose weights are the edited ones; the decomposed model stays as it is.

        - of a HookedTransformer, or a model of one's own: one of the same class, without hooks;
        - of a bridge: a Hugging Face model (`save_pretrained` works); TransformerLens's native models stay bridges.

        Weights that a host stores grouped (grouped-query attention), folded, fused or scaled are written as they are
        stored. Of tied embeddings the one that is edited becomes a parameter of its own in a Hugging Face model. The
        two models are run on the same random tokens; `check=False` leaves that out.

        Raises ValueError for conditional edits, for one stored matrix that would need two values, for weights that the
        plain model has no place for, if rounding to the model's dtype leaves nothing of the edit, if the edited outputs
        are not finite, and for components if V and U have changed since they were found.
        """
        self.check_components()
        if self.when is not None:
            raise ValueError(
                f"this edit acts {self.when}, and a plain model has no gates that could tell; it can be tried "
                "(`with edit.applied(tokens):`), not baked. Leave `when` out to bake it for every position"
            )
        tokens = some_tokens(self.decomposition) if check else None
        if tokens is not None:
            with torch.no_grad():
                if not bool(self.decomposition.host.forward(tokens).isfinite().all()):
                    raise ValueError("the model that is edited gives no finite outputs; load a sound one")
        plain = plain_model(self.decomposition, {site: self.factors(site) for site in self.sites})
        if tokens is not None:
            with torch.no_grad():
                hooked, baked = self.logits(tokens), outputs_of(plain, tokens)
            # Sums in another order overflow at other scales, so one of the two may still be finite.
            for which, outputs in (("hooked", hooked), ("baked", baked)):
                if not bool(outputs.isfinite().all()):
                    raise ValueError(
                        f"with this edit the outputs of the {which} model are no longer finite in {outputs.dtype}: "
                        f"{self!r}. Give smaller scales"
                    )
            off, allowed = _largest_difference(hooked, baked), explained_by_rounding(hooked)
            if off > allowed:
                raise RuntimeError(
                    f"the baked model's outputs are off by {off:.3g}, where rounding explains {allowed:.3g}: this "
                    "model uses a weight in a way that cannot be written into it, or it has hooks of yours (an open "
                    "`applied()` is some), which a baked model has not"
                )
        return plain

    @torch.no_grad()
    def difference(self, plain: nn.Module, tokens: Tensor) -> float:
        """The largest difference between the outputs of a baked model and of the hooked one."""
        given_plain("plain", plain)
        return _largest_difference(self.logits(tokens), outputs_of(plain, tokens))

    def parameters_changed(self) -> dict[str, int]:
        """How many entries of each edited matrix change, in its own dtype."""
        found = {}
        for site in self.sites:
            A, B = self.factors(site)
            W = self.decomposition[site].target_weight.detach()
            found[site] = int(((W.double() + A @ B).to(W.dtype) != W).sum())
        return found

    def check_components(self) -> None:
        """Raise ValueError if V and U of a component have changed since it was found, or the decomposition is gone."""
        self.decomposition.require_present()
        units_of(self.decomposition, [change.unit for change in self.changes])
        if self.when is not None and self.when.of is not None:
            units_of(self.decomposition, self.when.of)

    # -- parts -------------------------------------------------------------------------------------------------

    def _acting(self, tokens: Any) -> list[Tensor] | None:
        """For each change, where it acts, bool `[batch pos]`; None: everywhere."""
        if self.when is None:
            return None
        if tokens is None:
            raise ValueError(
                f"this edit acts {self.when}, which is read from a clean pass: give the tokens, "
                "`with edit.applied(tokens):`"
            )
        importance = self.decomposition.importance(tokens)
        found = []
        for change in self.changes:
            unit = change.unit if self.when.of is None else self.when.of
            # A head axis (split inputs) has subcomponents of its own; any of them counts.
            each = [importance[site][..., c] > self.when.threshold for site, c in unit.members]
            found.append(torch.stack([e.flatten(2).any(-1) if e.ndim > 2 else e for e in each]).any(0))
        return found

    def _mask_hooks(self, site: str, acts: list[Tensor] | None) -> HookList:
        weight = self.decomposition[site]
        lead = () if acts is None else acts[0].shape
        factor = torch.ones(*lead, weight.n_subcomponents, device=weight.V.device, dtype=weight.V.dtype)
        for number, change in enumerate(self.changes):
            ids = change.unit.ids_at(site)
            if ids:
                new = change.scale if acts is None else torch.where(acts[number], change.scale, 1.0).unsqueeze(-1)
                factor[..., ids] = torch.as_tensor(new).to(factor)
        return self.decomposition.mask({site: factor}, delta={})

    @contextmanager
    def _rewriting(self, site: str, acts: list[Tensor] | None) -> Iterator[tuple[str, Any]]:
        weight = self.decomposition[site]
        A, B, owner = low_rank(self.decomposition, self.changes, site)
        where = None if acts is None else torch.stack([acts[number] for number in owner], -1)
        with tapped_input(weight) as taken:
            hook = partial(_add_change, taken=taken, weight=weight, A=A.to(weight.V), B=B.to(weight.V), where=where)
            yield weight.site.output.name or "", hook


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def edit(decomposition: Decomposition, changes: Changes, *, when: Above | None = None) -> Edit:
    """An edit of a decomposed model's weights, to be tried (`applied`), measured (`report`) and baked (`bake`).

    - `{site: {3: 0.0, (5, 7): 0.5}}`: subcomponent 3 is ablated, 5 and 7 are halved: the matrix becomes
      `W + sum_c (s_c - 1) V_c U_c`. `{site: [3, 5]}` takes both away.
    - `{unit: 0.5}`, a `Unit` or a list of units (components, the units of a circuit), also over several sites.
    - `{site: {3: Rewrite(writes=..., reads=...)}}`: the subcomponent writes, or reads, another direction.
    - `when=Above(0.5)`: only at positions where the clean importance of the changed unit (or of `Above(..., of=unit)`)
      is above 0.5. Such an edit can be tried, not baked: a plain model has no gates.

    Raises ValueError for unknown sites and ids, for a subcomponent named twice, for units that are not of this
    decomposition, for a decomposition that was removed, and for an edit that changes nothing.

    >>> from spd_lens import decompose
    >>> from spd_lens.models import load_tiny_lm
    >>> model = load_tiny_lm()
    >>> decomposition = decompose(model, {"blocks.0.mlp.W_in": 8})
    >>> print(edit(decomposition, {"blocks.0.mlp.W_in": {3: 0.0, (4, 5): 0.5}}))
    edit of 3 subcomponents
      blocks.0.mlp.W_in[3]: x 0
      blocks.0.mlp.W_in[4, 5]: x 0.5
    """
    checked_decomposition(decomposition, "edit")
    lines = changes_of(decomposition, changes)
    if when is not None:
        check_condition(decomposition, when)
    return _checked(decomposition, lines, when)


def checked_edit(edit: Any, caller: str) -> Edit:
    """`edit`, if it is one whose decomposition is still in its model; TypeError or ValueError otherwise."""
    if not isinstance(edit, Edit):
        raise TypeError(
            f"{caller} was given a {type(edit).__name__}; expected an Edit: edit(decomposition, ...) makes one"
        )
    edit.check_components()
    return edit


def _checked(decomposition: Decomposition, changes: tuple[Change, ...], when: Above | None) -> Edit:
    """The edit, if it changes anything."""
    made = Edit(decomposition, changes, when)
    factors = {site: made.factors(site) for site in made.sites}
    for site, parts in factors.items():
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(
                f"V or U of edited subcomponents of {site} hold NaN or infinite numbers; load an earlier state of the "
                "decomposition"
            )
    if not any(bool((A @ B).any()) for A, B in factors.values()):
        raise ValueError(
            f"this edit changes nothing: {'; '.join(map(str, changes[:3]))}. A scale of 1 leaves a subcomponent as it "
            "is, and one that is zero stays zero"
        )
    return made


def _add_change(
    value: Tensor,
    hook: Any,
    *,
    taken: dict[int, Tensor],
    weight: DecomposedWeight,
    A: Tensor,
    B: Tensor,
    where: Tensor | None,
) -> Tensor | None:
    """Hook on a site's output: `y + ((x @ A) * where) @ B`."""
    x = taken.pop(threading.get_ident(), None)
    if weight.swapped.state.recording is not None:  # a clean pass is the target's (S4)
        return None
    if x is None:
        raise RuntimeError(
            f"{weight.site.name}: its output came without its input; run whole passes in an applied edit"
        )
    if weight.site.flatten_input and x.ndim > value.ndim:
        x = x.flatten(-2)
    coefficients = matmul_or_lookup(x, A)
    if where is not None:
        coefficients = coefficients * (where if coefficients.ndim == 3 else where.unsqueeze(-2))
    return value + weight.through_U(coefficients, value, B).to(value.dtype)

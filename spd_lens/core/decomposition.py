"""`Decomposition`: what a user holds.

A decomposition is a mapping from site names to `DecomposedWeight`s that stand inside the model. Interventions are
lists of ordinary TransformerLens hooks; nothing is switched on or off in the model itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.core.decomposed_model import DecomposedModel
from spd_lens.core.decomposed_weight import DecomposedWeight
from spd_lens.core.hub import upload
from spd_lens.core.interventions import Factor, HookList, hooks_for_masks
from spd_lens.core.saving import check_same_weights, check_tensors, read_decomposition, write_decomposition
from spd_lens.core.settings import GateMaker, Settings
from spd_lens.core.site_checks import check_sites
from spd_lens.core.summary import Summary, summarise
from spd_lens.core.swap import swap_sites
from spd_lens.core.units import Unit, hooks_of
from spd_lens.hosts.host import Host
from spd_lens.hosts.opening import open_host
from spd_lens.support.files import numbers
from spd_lens.support.given import shown
from spd_lens.support.pages import table_html
from spd_lens.support.shown import text_html


class Decomposition(DecomposedModel):
    """The decomposed weights of one model, by site name.

    `copy.deepcopy(decomposition)` copies the model with it (`copy.model`); the two are then independent.
    """

    def __init__(
        self,
        host: Host,
        weights: dict[str, DecomposedWeight],
        settings: Settings,
    ) -> None:
        super().__init__(host, weights)
        self.settings = settings
        self.training_record: dict[str, Any] = {}
        # The Hub's repository, revision and commit, if it was loaded from there.
        self.loaded_from: dict[str, str | None] | None = None
        for weight in weights.values():
            weight.swapped.decomposition = self

    @staticmethod
    def of(model: nn.Module) -> Decomposition:
        """The decomposition that is in `model`: the way back from a copied or unpickled model.

        Raises ValueError if there is none, or more than one.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"given a {type(model).__name__}; expected the model that a decomposition is in")
        weights = [module for module in model.modules() if isinstance(module, DecomposedWeight)]
        found = {id(weight.swapped.decomposition): weight.swapped.decomposition for weight in weights}
        if len(found) != 1:
            names = [weight.site.name for weight in weights]
            what = f"{len(found)} decompositions, of {', '.join(names)}" if found else "no decomposition"
            raise ValueError(f"this {type(model).__name__} has {what}; expected one")
        return next(iter(found.values()))

    def __repr__(self) -> str:
        if self._removed:
            return f"Decomposition({type(self.model).__name__}, removed)"
        shown = [f"{name}: C={weight.n_subcomponents}" for name, weight in list(self.items())[:4]]
        sites = ", ".join([*shown, *([f"and {len(self) - 4} more"] if len(self) > 4 else [])])
        return f"Decomposition({type(self.model).__name__}, {{{sites}}})"

    def _repr_html_(self) -> str:
        if self._removed:
            return text_html(self)
        rows = [
            (name, f"{weight.V.shape[0]} x {weight.U.shape[1]}", str(weight.n_subcomponents))
            for name, weight in self.items()
        ]
        title = f"Decomposition of a {type(self.model).__name__}, gate: {self.settings.gate}"
        return table_html(title, ("site", "matrix", "C"), rows, ["summary() has errors and counts"])

    # -- parameters --------------------------------------------------------------------------------------------

    def subcomponent_parameters(self) -> list[nn.Parameter]:
        """All `V` and `U`; tied sites count once."""
        return [p for w in self.values() if w.tied_to is None for p in w.subcomponents.parameters()]

    def gate_parameters(self) -> list[nn.Parameter]:
        """All parameters of gates."""
        return [p for _, p in self.gates.named_parameters()]

    def to(self, *args: Any, **kwargs: Any) -> Decomposition:
        """Move the model together with its decomposition, as `model.to`; returns itself.

        V, U and gates stay in float32 when the model becomes half precision."""
        self.require_present()
        self.model.to(*args, **kwargs)
        return self

    # -- interventions: lists of TransformerLens hooks -----------------------------------------------------------

    def ablate(self, subcomponents: Mapping[str, Any] | Unit | Sequence[Unit]) -> HookList:
        """Hooks that remove the named subcomponents, or units: their mask is 0, all else (also the delta) stays.

        Use with `model.hooks(fwd_hooks=...)`; lists compose by addition, because every hook multiplies the mask
        that it receives.
        """
        return hooks_of(self, subcomponents, keep=False)

    def keep(self, subcomponents: Mapping[str, Any] | Unit | Sequence[Unit]) -> HookList:
        """Hooks that keep only the named subcomponents, or units, of each named site: all else there is 0."""
        return hooks_of(self, subcomponents, keep=True)

    def mask(
        self,
        masks: Mapping[str, Factor],
        delta: Factor | Mapping[str, Factor] = 1.0,
    ) -> HookList:
        """Hooks that multiply the masks of the named sites by `mask` (`[C]` or `[batch pos C]`).

        `delta` is one number (or tensor `[batch pos]`) for all named sites, or one for each: `{site: delta}`. Masks
        may be tensors or arrays of any dtype.
        """
        return hooks_for_masks(self, masks, delta)

    # -- reports -----------------------------------------------------------------------------------------------

    def summary(self, batch: Any = None) -> Summary:
        """One readable table: per site C, rank bound, relative faithfulness and the smallest one that C allows.

        With a batch of tokens (or inputs) also alive subcomponents (importance above 0.01 somewhere in it) and L0
        (mean number with importance above 0.01 per position), both of that batch.
        """
        trained = sum(p.numel() for p in self.subcomponent_parameters() + self.gate_parameters())
        return summarise(self, None if batch is None else self.importance(batch), trained)

    # -- saving (see `spd_lens.core.saving`) ----------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by a stable name: `"{site}.V"`, `"{site}.U"`, `"{site}.gate.{parameter}"`."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.items():
            if weight.tied_to is None:
                tensors |= {f"{name}.{k}": p for k, p in weight.subcomponents.named_parameters()}
        tensors |= dict(self.gates.named_parameters())
        return tensors

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Copy in tensors that `tensors()` gave; names and shapes are checked before anything is written."""
        own = self.tensors()
        check_tensors(own, saved)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def save_pretrained(self, directory: str | Path, *, license: str = "other") -> Path:
        """Write subcomponents, gates, settings and provenance to `directory`, replacing an earlier save there.

        Other files stay as they are, also a `README.md` that is not a generated one, or was edited. Whatever moment it
        is killed at, the earlier save or the new one loads. `license` is for the card, in the Hub's words: "mit",
        "apache-2.0".

        Raises ValueError if files of other programs have the names of ours, OSError if the disk is full; nothing is
        lost then.
        """
        self.require_present()
        for name, tensor in self.tensors().items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is NaN or infinite: there is nothing to save; load or decompose again")
        return write_decomposition(
            directory,
            self.tensors(),
            host=self.host,
            sites=[weight.site for weight in self.values()],
            settings=self.settings,
            training=self.training_record,
            license=license,
            loaded_from=self.loaded_from,
        )

    @staticmethod
    def from_pretrained(
        directory_or_hub_id: str | Path,
        model: nn.Module,
        *,
        revision: str | None = None,
        gate: GateMaker | None = None,
    ) -> Decomposition:
        """Load a saved decomposition, from a directory or the Hugging Face Hub, onto a model of equal weights.

        `revision` is a branch, a tag or (the only thing that cannot change) a commit of the Hub's repository; where
        it came from is in `loaded_from` and in what is saved from then on.

        `gate`: the gate of one's own that it was made with, if it was.

        Raises ValueError, naming the site, if a weight differs from the one it was made from, and for a truncated,
        altered, foreign or newer save; the model is then unchanged.
        """
        saved = read_decomposition(directory_or_hub_id, revision)
        host = open_host(model)
        settings = saved.settings.with_own(gate)
        sites = check_sites(host, settings.n_subcomponents)
        check_same_weights(saved, sites)
        swapped = swap_sites(host, sites, settings, torch.Generator().manual_seed(0))
        decomposition = Decomposition(host, swapped, settings)
        try:
            decomposition.load_tensors(saved.tensors)
        except BaseException as error:
            decomposition.remove()
            if isinstance(error, ValueError):
                raise ValueError(f"{saved.directory} is damaged: {error}") from error
            raise
        decomposition.training_record = numbers(saved.config.training)
        decomposition.loaded_from = saved.loaded_from or saved.config.provenance.loaded_from
        return decomposition

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str = "other",
        components: Any = None,
    ) -> str:
        """Upload the decomposition with a generated card to the Hugging Face Hub; returns the commit's address.

        `components` (`Components` of this decomposition) go with it as `components.json`. A README of your own that is
        there stays. Raises ValueError for components of another decomposition.
        """
        if components is not None:
            if not hasattr(components, "check_belongs"):
                raise TypeError(f"components={shown(components)}; expected Components of this decomposition")
            components.check_belongs(self)
        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / "decomposition", license=license)
            if components is not None:
                components.save(saved)
            return upload(saved, repo_id, private=private, token=token)

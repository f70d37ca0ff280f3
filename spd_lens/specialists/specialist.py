"""`Specialist`: a small model, what it keeps, what it costs and what it has lost; a folder that runs on its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import spd_lens.specialists.plain_transformer as model_file
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_tokens
from spd_lens.specialists.costs import Costs, costs_of, mean_loss
from spd_lens.specialists.plain_transformer import PlainTransformer
from spd_lens.support.files import check_tokenizer, given_directory, new_directory, write_json, write_tensors
from spd_lens.support.pages import table_html
from spd_lens.support.tables import format_table


@dataclass(frozen=True, eq=False, repr=False)
class Specialist:
    """A small model of a domain. Made by `specialise`.

    - `model`: takes tokens, gives logits; `before`: the whole model, written in the same way.
    - `kept[site]`: numbers of the subcomponents that are kept; None: the matrix is kept whole.
    - `ranks[site]`: how many directions stand for them; None: the matrix is stored as one.
    - `exact`: whether `model` computes what the decomposed model does with `masks()`.
    """

    model: PlainTransformer
    before: PlainTransformer
    decomposition: Decomposition
    kept: Mapping[str, tuple[int, ...] | None]
    exact: bool
    ranks: Mapping[str, int | None]

    @property
    def parameters(self) -> int:
        """Numbers that the small model stores."""
        return sum(p.numel() for p in self.model.parameters())

    def masks(self) -> list[tuple[str, Any]]:
        """Hooks with which the decomposed model keeps the same subcomponents, as they were, and no delta."""
        hooks = []
        for site, kept in self.kept.items():
            if kept is not None:
                mask = torch.zeros(self.decomposition[site].n_subcomponents)
                mask[list(kept)] = 1
                hooks += self.decomposition.mask({site: mask}, delta=0.0)
        return hooks

    def costs(self, tokens: Any) -> dict[str, Costs]:
        """`{"before": ..., "after": ...}`, on these tokens `[batch pos]`."""
        tokens = checked_tokens(tokens, self.decomposition.host).to(self.decomposition.device)
        return {"before": costs_of(self.before, tokens), "after": costs_of(self.model, tokens)}

    def losses(self, **texts: Any) -> dict[str, tuple[float, float]]:
        """Cross-entropy before and after on each text, tokens `[batch pos]`: `losses(inside=..., outside=...)`."""
        found = {}
        for name, tokens in texts.items():
            rows = checked_tokens(tokens, self.decomposition.host, name=name).to(self.decomposition.device)
            found[name] = mean_loss(self.before, rows), mean_loss(self.model, rows)
        return found

    def save(self, directory: str | Path, *, tokenizer: Any = None) -> Path:
        """Write `model.py`, `config.json`, `model.safetensors` (and the tokenizer) to a new directory, or nothing.

        It runs without this library: `sys.path.insert(0, directory); from model import load; load(directory)`.

        Raises ValueError if the directory exists, OSError for a place that cannot be written and for a full disk;
        nothing is left there then.
        """
        check_tokenizer(tokenizer)
        directory = given_directory(directory)
        with new_directory(directory) as temporary:
            shutil.copyfile(Path(model_file.__file__), temporary / "model.py")
            state = {n: v.detach().cpu().contiguous().clone() for n, v in self.model.state_dict().items()}
            if self.model.config["tied"]:
                del state["unembed.weight"]
            write_tensors(temporary / "model.safetensors", state)
            write_json(temporary / "config.json", self.model.config)
            write_json(temporary / "specialist.json", {"kept": {s: k and list(k) for s, k in self.kept.items()}})
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            for file in temporary.iterdir():
                # safetensors makes files that only their owner can read; the folder's mode tells the umask.
                file.chmod(temporary.stat().st_mode & 0o666)
        return directory

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        rows = []
        for site, kept in self.kept.items():
            weight = self.decomposition[site]
            d_in, d_out = weight.target_weight.shape
            n = "whole" if kept is None else f"{len(kept)} of {weight.n_subcomponents}"
            rank = self.ranks[site]
            cost = d_in * d_out if rank is None else rank * (d_in + d_out)
            rows.append(
                [site, f"{d_in} x {d_out}", n, "-" if rank is None else str(rank), f"{cost / (d_in * d_out):.0%}"]
            )
        before = sum(p.numel() for p in self.before.parameters())
        heads = [len(block["kv_of_head"]) for block in self.model.config["blocks"]]
        title = f"{self.parameters:,} of {before:,} parameters; heads by block: {', '.join(map(str, heads))}"
        return title, ["site", "matrix", "kept", "rank", "of its numbers"], rows

    def __str__(self) -> str:
        title, header, rows = self._table()
        return f"{title}\n{format_table(header, rows)}"

    def __repr__(self) -> str:
        return f"Specialist({self.parameters:,} parameters)"

    def _repr_html_(self) -> str:
        return table_html(*self._table())

"""What a direct path holds still besides the other subcomponents."""

from __future__ import annotations

from dataclasses import dataclass

from spd_lens.core.decomposition import Decomposition


@dataclass(frozen=True)
class Frozen:
    """What the direct path leaves out besides the other subcomponents."""

    attention: bool = True
    norms: bool = True
    delta: bool = True

    def __str__(self) -> str:
        def named(value: bool) -> str:
            return ", ".join(k for k, v in vars(self).items() if v is value) or "nothing"

        return f"frozen: {named(True)}; live: {named(False)}"


def output_names(decomposition: Decomposition) -> dict[str, str]:
    """The hook name of every site's output: where its `DecomposedWeight` stands, by site name."""
    by_identity = {id(point): name for name, point in decomposition.model.hook_dict.items()}
    return {site: by_identity[id(weight)] for site, weight in decomposition.items()}

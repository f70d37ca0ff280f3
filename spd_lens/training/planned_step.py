"""`PlannedStep`: the FLOPs and bytes of one training step, from shapes alone; `plan` asks it.

What is counted, and what is left out, stands in `spd_lens.training.planning`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from spd_lens.objective.adversary import PGD, Persistent
from spd_lens.objective.mask_sources import Merged
from spd_lens.training.config import TrainConfig
from spd_lens.training.model_shape import ModelShape
from spd_lens.training.reconstruction import Reconstruction

KnownGate = Literal["shared", "scalar", "vector"]

# How many tensors of each size are held when most are, fitted once to 34 small steps whose bytes were counted, with or
# without what saves memory (sums .90 to 1.16 of those counted), and rounded. Per token: importances (values under two
# squashings and their graphs), masks of a pass, attention scores, heads, logits (clean, masked, their gradient). Per
# step: matrices as large as the largest decomposed weight.
PER_IMPORTANCE, PER_MASK, PER_SCORE, PER_HEAD, PER_LOGIT, PER_WEIGHT = 5.6, 1.6, 1.5, 3.8, 3.6, 1.0
# With gates computed again.
PER_IMPORTANCE_AGAIN = 4.5
# Numbers of each of the three blocks that scalar gates on a CPU work in, whatever the batch.
WORKSPACE = 2**19


@dataclass(frozen=True)
class PlannedStep:
    """One training step, by its shapes."""

    shape: ModelShape
    counts: dict[str, int]
    config: TrainConfig
    context: int
    gate: KnownGate
    width: int
    target_bytes: int
    cached: bool
    gpus: int

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _size(self, site: str) -> tuple[int, int, int]:
        """`(d_in, d_out, C)`."""
        d_in, d_out = self.shape.block_matrices()[site.split(".", 2)[2]]
        return d_in, d_out, self.counts[site]

    def _first(self) -> int:
        return min(int(site.split(".")[1]) for site in self.counts)

    def n_trained(self) -> int:
        """V, U and gates."""
        return sum(self._n_trained(site) for site in self.counts)

    def _n_trained(self, site: str) -> int:
        d_in, d_out, C = self._size(site)
        w = self.width
        gates = {
            "shared": d_in * w + w + w * C + C,
            "scalar": 3 * C * w + C,
            "vector": d_in * C * w + 2 * C * w + C,
        }
        return C * (d_in + d_out) + gates[self.gate]

    # -- FLOPs -----------------------------------------------------------------------------------------------------

    def flops_by_term(self, rows: int) -> dict[str, float]:
        """Of one rank's step."""
        tokens, config = rows * self.context, self.config
        found = {"clean pass": self._host(tokens, self._first() if self.cached else 0), "gates": 0.0}
        forward_gates = 0.0
        for site in self.counts:
            d_in, _, C = self._size(site)
            w = self.width
            forward, both = {
                "shared": (d_in * w + w * C, 2 * d_in * w + 3 * w * C),
                "vector": (d_in * C * w, 2 * d_in * C * w),
                "scalar": (d_in * C, 2 * d_in * C + 2 * C * w),
            }[self.gate]
            forward_gates += 2 * tokens * forward
            found["gates"] += 2 * tokens * both
        if config.recompute in ("gates", "all"):
            found["gates again"] = forward_gates
        for term in config.reconstructions:
            forward, backward, by_factors = self._masked(tokens, term)
            # The last product of a pass is not needed again.
            last = self._last_product(tokens) * (len(self.counts) if term.routing == "layerwise" else 1)
            again = forward - last if config.recompute in ("passes", "all") else 0.0
            found[term.name] = term.draws * (forward + again + backward)
            if (n := _ascents(term)) > 0:
                share = term.masks.share if isinstance(term.masks, Merged) else 1.0
                found[f"{term.name} ascents"] = share * n * (forward + again + backward - by_factors)
        if config.accumulate > 1:
            # Of every part: for the frequency term, and for every ascent; of the first, for shapes.
            asked = any(_ascents(t) > 0 or t.routing not in ("all", "layerwise") for t in config.reconstructions)
            times = (config.frequency > 0) + sum(map(_ascents, config.reconstructions)) + asked / config.accumulate
            found["clean passes and gates for parts"] = times * (found["clean pass"] + forward_gates)
        if config.hidden > 0:
            forward, backward, _ = self._masked(tokens, Reconstruction())
            found["hidden"] = forward + backward
        if config.faithfulness > 0:
            found["faithfulness"] = sum(6.0 * a * b * C for a, b, C in map(self._size, self.counts))
        return found

    def _host(self, tokens: int, first: int) -> float:
        """The target's own products from block `first` on, forward."""
        shape = self.shape
        block = sum(a * b for a, b in shape.block_matrices().values())
        attention = 2 * self.context * shape.n_heads * shape.d_head
        return 2.0 * tokens * (self._end() - first) * (block + attention) + self._last_product(tokens)

    def _last_product(self, tokens: int) -> float:
        """Logits, where passes go to the end."""
        return 2.0 * tokens * self.shape.d_model * self.shape.d_vocab * (self.config.stop_at is None)

    def _masked(self, tokens: int, term: Reconstruction) -> tuple[float, float, float]:
        """Products of one draw: forward, backward, and the part of the backward that is for V and U."""
        match term.routing:
            case "layerwise":
                parts = [self._pass(tokens, {site}, 1.0) for site in self.counts]
                return tuple(map(sum, zip(*parts, strict=True)))  # pyright: ignore[reportReturnType]
            case "subset":
                share = (len(self.counts) + 1) / (2 * len(self.counts))
            case "all":
                share = 1.0
            case probability:
                share = float(probability)  # pyright: ignore[reportArgumentType]
        return self._pass(tokens, set(self.counts), share)

    def _pass(self, tokens: int, masked: set[str], share: float) -> tuple[float, float, float]:
        """One masked pass: a walk through its blocks that knows what depends on a mask."""
        shape = self.shape
        first = min(int(site.split(".")[1]) for site in masked)
        forward = backward = by_factors = 0.0
        residual = False
        for block in range(first, self._end()):
            inputs = attended = hidden = residual
            for name, (d_in, d_out) in shape.block_matrices().items():
                site = f"blocks.{block}.{name}"
                group = name.split(".")[1].lstrip("_")
                reads = {"W_O": attended, "W_gate": residual, "W_in": residual, "W_out": hidden}.get(group, inputs)
                product = 2.0 * tokens * d_in * d_out
                forward += product
                backward += product * reads
                if site in masked:
                    C = self.counts[site]
                    into, out = 2.0 * tokens * share * d_in * C, 2.0 * tokens * share * C * d_out
                    forward += into + out
                    backward += into * (1 + reads) + 2 * out
                    by_factors += into + out
                writes = reads or site in masked
                match group:
                    case "W_Q" | "W_K" | "W_V":
                        attended = attended or writes
                    case "W_O" | "W_out":
                        residual = residual or writes
                    case _:
                        hidden = hidden or writes
                if group == "W_V":
                    product = 4.0 * tokens * self.context * shape.n_heads * shape.d_head
                    forward += product
                    backward += 2 * product * attended
        product = self._last_product(tokens)
        return forward + product, backward + product * residual, by_factors

    # -- bytes -----------------------------------------------------------------------------------------------------

    def bytes_by_kind(self, rows: int) -> dict[str, float]:
        """Of one rank, at the largest moment of a step."""
        trained, parts = 4.0 * self.n_trained(), self.gpus if self.config.shard else 1
        activations = self._activations(rows * self.context / self.config.accumulate)
        # Behind the passes all gradients are there, and no activations.
        gradients = max(4.0 * self._gradients_in_passes(), trained - sum(activations.values()))
        found = {
            "target": self._target_bytes(),
            "V, U and gates": trained / parts,
            "gradients": gradients / parts,
            "Adam": 2 * trained / parts,
        }
        if parts > 1:
            # The largest site, or gate: gathered, whole, and its gradient before it is cut up.
            found["gathered"] = 3 * 4.0 * max(map(self._largest_group, self.counts))
        return found | activations

    def _target_bytes(self) -> float:
        """Weights of the target that stay where the run is."""
        block = sum(a * b for a, b in self.shape.block_matrices().values())
        unused = (self._first() if self.cached else 0) + self.shape.n_layers - self._end()
        return float((self.shape.n_parameters() - self.config.offload * unused * block) * self.target_bytes)

    def _gradients_in_passes(self) -> int:
        """How many gradients are there at the largest moment of a masked pass.

        Those of gates come after all passes, those of V and U with the first; with several parts all are there.
        """
        if self.config.accumulate > 1:
            return self.n_trained()
        terms = self.config.reconstructions
        # Of layer-wise passes the first, of all blocks, is the largest.
        once = len(terms) == 1 and terms[0].draws == 1 and self.config.hidden == 0
        return 0 if once else self._n_factors()

    def _n_factors(self) -> int:
        return sum(C * (d_in + d_out) for d_in, d_out, C in map(self._size, self.counts))

    def _largest_group(self, site: str) -> int:
        d_in, d_out, C = self._size(site)
        factors = C * (d_in + d_out)
        return max(factors, self._n_trained(site) - factors)

    def _end(self) -> int:
        """The block before which passes end."""
        return self.shape.n_layers if self.config.stop_at is None else self.config.stop_at

    def _activations(self, tokens: float) -> dict[str, float]:
        """What a step makes and drops again, when most of it is held: in the backward pass of a masked pass."""
        shape, half = self.shape, self.config.precision == "bf16"
        numbers = 2 if half else 4
        sizes = [self._size(site) for site in self.counts]
        masked = [C for _, _, C in sizes]
        each = all(term.routing == "layerwise" for term in self.config.reconstructions)
        if each:
            masked = [max(masked)]
        hidden = {
            "shared": 2 * self.width * len(sizes),
            "scalar": 0,
            "vector": 2 * self.width * sum(C for _, _, C in sizes),
        }[self.gate]
        passes = [[site] for site in self.counts] if each else [list(self.counts)]
        blocks = max((self._blocks(own) for own in passes), key=sum)
        per_importance, of_blocks = PER_IMPORTANCE, float(sum(blocks))
        if self.config.recompute in ("gates", "all"):
            hidden = {"shared": 2 * self.width, "scalar": 0, "vector": 2 * self.width * max(C for _, _, C in sizes)}[
                self.gate
            ]
            per_importance = PER_IMPORTANCE_AGAIN
        if self.config.recompute in ("passes", "all"):
            of_blocks = max(blocks) + len(blocks) * shape.d_model
        importances = per_importance * sum(C for _, _, C in sizes) + PER_MASK * sum(masked) + hidden
        return {
            "importances and masks": 4.0 * tokens * importances,
            "blocks' activations": float(numbers * tokens * of_blocks),
            "logits": 4.0 * tokens * PER_LOGIT * (shape.d_vocab if self.config.stop_at is None else shape.d_model),
            **({"workspace of gates": 12.0 * WORKSPACE} if self.gate == "scalar" else {}),
            "products of weights": 4.0 * PER_WEIGHT * max(a * b for a, b, _ in sizes) + half * 2.0 * self.n_trained(),
        }

    def _blocks(self, masked: list[str]) -> list[float]:
        """Numbers per token that every block keeps for the backward pass of a pass with these sites masked."""
        first = min(int(site.split(".")[1]) for site in masked)
        return [self._block(block, first, masked) for block in range(first, self._end())]

    def _block(self, block: int, first: int, masked: list[str]) -> float:
        shape = self.shape
        own = [site for site in masked if site.startswith(f"blocks.{block}.")]
        # Sites keep the outputs of target and subcomponents apart.
        share = min(1.0, 2 * len(own) / len(shape.block_matrices()))
        found = (7.5 + 14 * share) * shape.d_model + (1.5 + 0.45 * share) * shape.d_mlp * (1.7 if shape.gated else 1)
        if block > first or any(".attn." in site for site in own):
            found += shape.n_heads * (PER_SCORE * self.context + PER_HEAD * shape.d_head)
        return found

    def largest(self, memory: float) -> int:
        """Rows that fit into `memory` bytes on a rank."""
        parts = self.config.accumulate

        def fits(n: int) -> bool:
            return sum(self.bytes_by_kind(n * parts).values()) <= memory

        above = 1
        while fits(above):
            above *= 2
        return (bisect_left(range(1, above), True, key=lambda n: not fits(n))) * parts


def _ascents(term: Reconstruction) -> int:
    match term.masks:
        case PGD():
            return term.masks.steps
        case Persistent():
            return term.masks.warm_steps
        case Merged():
            return term.masks.persistent.warm_steps
        case "pgd":
            return PGD().steps
        case "persistent" | "merged":
            return Persistent().warm_steps
    return 0

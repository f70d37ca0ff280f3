"""`plan`: what a training run will cost, before anything is loaded. Bytes by kind, FLOPs by term, tokens a second.

Every number is calculated from shapes. FLOPs are those of matrix products, as the library performs them: two for every
multiply-add, `x @ W` of the target at all rows, `x @ V` and `@ U` at routed rows, one product in a backward pass for
every operand that needs a gradient. Bytes are the largest sum of what is alive at once: everything of the clean pass
and the gates, and the graph of one masked pass. Tests hold FLOPs and bytes to 15 % of what torch counts.

Left out: norms and other element-wise work (in FLOPs), the allocator's slack, the data in main memory, and what other
processes have on the card. Seconds come from a device's rated rate times a `utilisation` that you state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from spd_lens.core.gates import DEFAULT_WIDTH
from spd_lens.objective.adversary import PGD, Persistent
from spd_lens.objective.mask_sources import Merged
from spd_lens.support.names import near_names
from spd_lens.support.tables import format_table
from spd_lens.training.config import Reconstruction, TrainConfig
from spd_lens.training.model_shape import ModelShape

KnownGate = Literal["shared", "scalar", "vector"]
DEFAULT_WIDTHS = {kind: DEFAULT_WIDTH[kind] for kind in get_args(KnownGate)}


# How many tensors of each size are alive when most are, fitted once to 34 small steps whose bytes were counted, with or
# without what saves memory (sums .90 to 1.16 of those counted), and rounded. Per token: importances (values under two
# squashings and their graphs), masks of a pass, attention scores, heads, logits (clean, masked, their gradient). Per
# step: matrices as large as the largest decomposed weight.
PER_IMPORTANCE, PER_MASK, PER_SCORE, PER_HEAD, PER_LOGIT, PER_WEIGHT = 5.6, 1.6, 1.5, 3.8, 3.6, 1.0
# With gates computed again.
PER_IMPORTANCE_AGAIN = 4.5
# Numbers of each of the three blocks that scalar gates on a CPU work in, whatever the batch.
WORKSPACE = 2**19


@dataclass(frozen=True)
class Device:
    """A device by its rated rates: matrix FLOPs a second (dense) by precision, and bytes of memory."""

    name: str
    flops: Mapping[str, float]
    memory: float


DEVICES = {
    "h100": Device("NVIDIA H100 SXM", {"fp32": 67e12, "bf16": 989e12}, 80e9),
    "a100": Device("NVIDIA A100 80GB", {"fp32": 19.5e12, "bf16": 312e12}, 80e9),
    "4090": Device("NVIDIA RTX 4090", {"fp32": 82.6e12, "bf16": 165e12}, 24e9),
    "cpu": Device("two CPU cores with AVX-512", {"fp32": 0.15e12, "bf16": 0.3e12}, 16e9),
}


@dataclass(frozen=True)
class Plan:
    """What a run costs each rank: `bytes_by_kind`, `flops_by_term` of a step, and what follows from them.

    - `n_trained`, `n_target`: parameters. `rows`: of a batch, on this rank.
    - `largest_batch`: rows that fit, or 0 where not even one does; None without a device.
    - `tokens_per_second`: of all ranks together; None without a device.
    """

    n_target: int
    n_trained: int
    rows: int
    context: int
    gpus: int
    bytes_by_kind: dict[str, float]
    flops_by_term: dict[str, float]
    device: str | None = None
    utilisation: float | None = None
    largest_batch: int | None = None
    tokens_per_second: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> float:
        """All bytes of a rank."""
        return sum(self.bytes_by_kind.values())

    @property
    def flops(self) -> float:
        """All FLOPs of a rank's step."""
        return sum(self.flops_by_term.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, sums among them."""
        return {**asdict(self), "bytes": self.bytes, "flops": self.flops, "calculated": True}

    def __str__(self) -> str:
        lines = [
            f"calculated: {self.n_target:,} target weights, {self.n_trained:,} trained parameters, "
            f"{self.gpus} rank{'s' * (self.gpus > 1)}, {self.rows} rows of {self.context} tokens each",
            format_table(("bytes a rank", "GB"), _with_sum(self.bytes_by_kind, 1e9, ".3f")),
            format_table(("a step of a rank", "TFLOP"), _with_sum(self.flops_by_term, 1e12, ".4g")),
        ]
        if self.tokens_per_second is not None:
            fits = f"at most {self.largest_batch:,} rows a rank fit" if self.largest_batch else "not one row fits"
            lines.append(
                f"{self.device}: {fits}; {self.tokens_per_second:,.0f} tokens a second at {self.utilisation:.0%} of "
                "the rated rate"
            )
        return "\n\n".join([*lines, *self.notes])


def _with_sum(values: Mapping[str, float], unit: float, how: str) -> list[tuple[str, str]]:
    return [(name, f"{value / unit:{how}}") for name, value in [*values.items(), ("together", sum(values.values()))]]


def plan(
    shape: ModelShape,
    sites: Mapping[str, int | None],
    config: TrainConfig | None = None,
    *,
    batch_size: int = 8,
    context: int = 128,
    gate: KnownGate = "shared",
    gate_width: int | None = None,
    gpus: int = 1,
    target_bytes: int = 4,
    cached: bool = False,
    device: str | Device | None = None,
    utilisation: float = 0.3,
) -> Plan:
    """What each of `gpus` ranks needs for a run of `batch_size` rows (all ranks together) of `context` tokens.

    - `sites`: as for `decompose`. `target_bytes`: of a target's weight, 4 or 2.
    - `cached`: passes start at the first decomposed block, on cached residual streams.
    - `device`: a name in `DEVICES` or a `Device`; `utilisation`: the share of its rated rate that products reach.

    >>> from spd_lens.training import ModelShape
    >>> found = plan(ModelShape.of("gpt2"), {"blocks.5.mlp.W_*": 1152}, device="a100")
    >>> found.n_target
    123532032

    Raises ValueError for patterns that name nothing, gates that are not known here, and batches that do not divide.
    """
    config = config or TrainConfig()
    if gate not in DEFAULT_WIDTHS:
        raise ValueError(f"gate={gate!r} is not planned; near: {near_names(gate, DEFAULT_WIDTHS)}")
    if gpus < 1 or batch_size % gpus:
        raise ValueError(f"batch_size={batch_size} for {gpus} ranks; expected a multiple")
    rows = batch_size // gpus
    chosen = device if device is None or isinstance(device, Device) else _device(device)
    width = gate_width or DEFAULT_WIDTHS[gate]
    step = _Step(shape, shape.sites(sites), config, context, gate, width, target_bytes, cached, gpus)
    found = Plan(
        n_target=shape.n_parameters(),
        n_trained=step.n_trained(),
        rows=rows,
        context=context,
        gpus=gpus,
        bytes_by_kind=step.bytes_by_kind(rows),
        flops_by_term=step.flops_by_term(rows),
    )
    if chosen is None:
        return found
    seconds = found.flops / (chosen.flops[config.precision] * utilisation)
    return replace(
        found,
        device=chosen.name,
        utilisation=utilisation,
        largest_batch=step.largest(chosen.memory),
        tokens_per_second=batch_size * context / seconds,
    )


def _device(name: str) -> Device:
    if name not in DEVICES:
        raise ValueError(f"device={name!r}; near: {near_names(name, DEVICES)}; or a Device of your own")
    return DEVICES[name]


@dataclass(frozen=True)
class _Step:
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
        """What a step makes and drops again, when most of it is alive: in the backward pass of a masked pass."""
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

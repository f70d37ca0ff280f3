"""`plan`: what a training run will cost, before anything is loaded. Bytes by kind, FLOPs by term, tokens a second.

Every number is calculated from shapes. FLOPs are those of matrix products, as the library performs them: two for every
multiply-add, `x @ W` of the target at all rows, `x @ V` and `@ U` at routed rows, one product in a backward pass for
every operand that needs a gradient. Bytes are the largest sum of what is held at once: everything of the clean pass
and the gates, and the graph of one masked pass. Tests hold FLOPs and bytes to 15 % of what torch counts.

Left out: norms and other element-wise work (in FLOPs), the allocator's slack, the data in main memory, and what other
processes have on the card. Seconds come from a device's rated rate times a `utilisation` that you state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from spd_lens.core.gates import DEFAULT_WIDTH
from spd_lens.support.names import near_names
from spd_lens.support.shown import short_repr, text_html
from spd_lens.support.tables import format_table
from spd_lens.training.config import TrainConfig
from spd_lens.training.model_shape import ModelShape
from spd_lens.training.planned_step import KnownGate, PlannedStep

DEFAULT_WIDTHS = {kind: DEFAULT_WIDTH[kind] for kind in get_args(KnownGate)}


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

    __repr__ = short_repr
    _repr_html_ = text_html

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
    step = PlannedStep(shape, shape.sites(sites), config, context, gate, width, target_bytes, cached, gpus)
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

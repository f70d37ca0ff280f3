"""What one training step has to do, by formula from shapes: matrix products, numbers moved, GELUs, term by term.

The model, and what is left out of it:

- Matrix products. Masked passes by M2: the frozen `x @ W` wherever its input depends on a mask (without the delta, at
  unrouted rows alone), `x @ V` and `coefficients @ U` at routed rows alone. A backward pass has one product per
  operand that needs a gradient; an adversary's ascent needs none for V, U and gates. Faithfulness is `W - V @ U`
  computed directly. What does not depend on a mask is counted once per step, in the clean pass or in scalar gates,
  which compute `x @ V` there.
  `performed=True` counts instead what the library really does: `x @ W` at all rows, the part of the first masked block
  that lies below the masked sites again, `x @ V` of clean inputs in every pass, and the two sums over the hidden layer
  of a scalar gate by `bmm`. `tests/benchmarks` holds this equal to what torch counts while it runs.
- Numbers moved. Products read and write their own operands at the product's rate. Everything between two
  products is one pass over memory that reads each of its arguments and writes each of its results once: norms with
  residual sums, GELU, softmax, masks with coefficients, gathered and scattered rows, squashings, losses; a random
  number is written once; Adam reads p, g, m, v and writes p, m, v; each term that gives a parameter a gradient reads
  and writes it.
- GELUs (the function once forward, its derivative once backward) and random numbers are counted as evaluations, because
  they cost more than their traffic. Left out: other special functions, calls.

Known: shared, scalar, vector and global gates; HookedTransformer and TransformerBridge with plain attention and MLP
without gates, all heads their own keys; TMS. Embeddings as sites are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from benchmarks.configurations import ProductStep
from spd_lens import Decomposition, TrainConfig
from spd_lens.core import GlobalGate, sample_routing
from spd_lens.data import Batch
from spd_lens.objective import PGD, Merged, Persistent, mask_source
from spd_lens.toys import TMS

CLEAN, GATES, FAITHFULNESS, OPTIMIZER = "clean pass", "gates", "faithfulness", "optimizer"
# Rows that are masked, by site; one dict for every pass.
Rows = list[dict[str, float]]


def ascents(term: str) -> str:
    """The name of an adversary's own work, which is shown apart from the pass that the loss uses."""
    return f"{term} ascents"


@dataclass(frozen=True)
class Matmul:
    """`batch` products `[m k] @ [k n]`; `layout` tells which factor is stored transposed, `t` or `n` for each."""

    m: int
    k: int
    n: int
    batch: int = 1
    layout: Literal["nn", "nt", "tn"] = "nn"

    @property
    def flops(self) -> int:
        """Two for every multiply-add."""
        return 2 * self.batch * self.m * self.k * self.n


@dataclass
class Work:
    """Of each term matrix products and numbers that element-wise work moves; of the step GELUs (function, derivative)
    and random numbers."""

    matmuls: dict[str, list[Matmul]] = field(default_factory=lambda: defaultdict(list))
    moved: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    drawn: float = 0
    gelus: float = 0
    gelu_derivatives: float = 0

    def flops(self, term: str | None = None) -> int:
        """Of one term, or of all."""
        chosen = self.matmuls if term is None else {term: self.matmuls.get(term, [])}
        return sum(product.flops for products in chosen.values() for product in products)


@dataclass(frozen=True)
class Node:
    """One matrix product of the target: `[m k] @ [k n]`, `batch` times.

    `above[i]` are the sites on whose outputs operand i depends; a frozen matrix is no operand. `name` is the site's
    where the right factor is a weight. `moved` are the numbers that element-wise work around it moves, (forward,
    backward), `gelus` how many GELUs there are.
    """

    name: str
    shape: tuple[int, int, int]
    above: tuple[frozenset[str], ...]
    batch: int = 1
    block: int | None = None
    moved: tuple[float, float] = (0, 0)
    gelus: int = 0


def target_products(model: Any, batch: Batch) -> list[Node]:
    """The target's matrix products in the order of a forward pass."""
    if isinstance(model, TMS):
        return _tms_products(model, positions(batch))
    n_batch, n_pos = batch.inputs.shape[:2]
    return _transformer_products(model.cfg, n_batch, n_pos)


def _tms_products(model: TMS, n: int) -> list[Node]:
    nodes = [Node("W_enc", (n, model.n_features, model.n_hidden), (frozenset(),))]
    if model.has_identity:
        nodes.append(Node("W_id", (n, model.n_hidden, model.n_hidden), (frozenset({"W_enc"}),)))
    above = frozenset(node.name for node in nodes)
    relu = (2 * n * model.n_features, 3 * n * model.n_features)
    return [*nodes, Node("W_dec", (n, model.n_hidden, model.n_features), (above,), moved=relu)]


def _transformer_products(cfg: Any, n_batch: int, n_pos: int) -> list[Node]:
    n, d, heads = n_batch * n_pos, cfg.d_model, cfg.n_heads
    d_heads, pairs = heads * cfg.d_head, n_batch * heads * n_pos * n_pos
    # Residual sum and norm: two numbers read, two written, either way.
    norm = (4 * n * d, 4 * n * d)
    nodes: list[Node] = []
    above: frozenset[str] = frozenset()
    for block in range(cfg.n_layers):
        q, k, v, o, w_in, w_out = (
            f"blocks.{block}.{name}"
            for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
        )
        nodes += [Node(name, (n, d, d_heads), (above,), moved=norm if name == q else (0, 0)) for name in (q, k, v)]
        nodes.append(
            Node("scores", (n_pos, cfg.d_head, n_pos), (above | {q}, above | {k}), n_batch * heads,
                 moved=(2 * pairs, 3 * pairs))
        )  # fmt: skip
        nodes.append(Node("mix", (n_pos, n_pos, cfg.d_head), (above | {q, k}, above | {v}), n_batch * heads))
        nodes.append(Node(o, (n, d_heads, d), (above | {q, k, v},)))
        above = above | {q, k, v, o}
        nodes.append(Node(w_in, (n, d, cfg.d_mlp), (above,), moved=norm))
        gelu = (2 * n * cfg.d_mlp, 3 * n * cfg.d_mlp)
        nodes.append(Node(w_out, (n, cfg.d_mlp, d), (above | {w_in},), moved=gelu, gelus=n * cfg.d_mlp))
        above = above | {w_in, w_out}
        nodes[-8:] = [replace(node, block=block) for node in nodes[-8:]]
    return [*nodes, Node("unembed.W_U", (n, d, cfg.d_vocab), (above,), moved=norm)]


def positions(batch: Batch) -> int:
    """Rows of every site."""
    shape = batch.inputs.shape
    return (shape[:-1] if batch.inputs.is_floating_point() else shape).numel()


def expected_rows(sites: Sequence[str], routing: str | float, n: int) -> Rows:
    """Rows of every pass that a routing asks for, in the mean."""
    if routing == "layerwise":
        return [{name: n} for name in sites]
    share = {"all": 1.0, "subset": (len(sites) + 1) / (2 * len(sites))}.get(str(routing), routing)
    return [dict.fromkeys(sites, n * float(share))]


def drawn_rows(step: ProductStep, batch: Batch) -> dict[str, Rows]:
    """The rows that the next `step.losses(batch)` will draw, by term; its generators stay as they are."""
    learner = step.learner
    generator = torch.Generator()
    generator.set_state(learner.generators["routing"].get_state())
    order = learner.decomposition.clean_pass(batch.inputs, start_at=batch.start_at).inputs
    shapes = {name: x.shape[:-1] for name, x in order.items()}
    found: dict[str, Rows] = {}
    for term in learner.config.reconstructions:
        once = mask_source(term.masks).climbs
        passes = [
            routed
            for _ in range(1 if once else term.draws)
            for routed in sample_routing(shapes, term.routing, generator=generator)
        ]
        if isinstance(term.masks, Merged):
            for where in (where for routed in passes for where in routed.values() if where is not None):
                where[: round(term.masks.share * len(where))] = True
        found[term.name] = [
            {site: shapes[site].numel() if where is None else int(where.sum()) for site, where in routed.items()}
            for routed in passes
        ]
    return found


def count_work(
    decomposition: Decomposition,
    config: TrainConfig,
    batch: Batch,
    *,
    rows: Mapping[str, Rows] | None = None,
    performed: bool = False,
) -> Work:
    """The work of one step on `batch`, with `rows` routed (default: in the mean); see the module for `performed`."""
    return _Count(decomposition, config, batch, performed).all(rows or {})


class _Count:
    def __init__(self, decomposition: Decomposition, config: TrainConfig, batch: Batch, performed: bool) -> None:
        self.decomposition, self.config, self.batch, self.performed = decomposition, config, batch, performed
        self.nodes = target_products(decomposition.model, batch)
        self.n, self.work = positions(batch), Work()
        known = {node.name for node in self.nodes}
        if unknown := [name for name in decomposition if name not in known]:
            raise ValueError(f"no formula for {', '.join(unknown)}; there is one for {', '.join(sorted(known))}")

    def all(self, rows: Mapping[str, Rows]) -> Work:
        n_out = self.n * self.nodes[-1].shape[2]
        for node in self._nodes_from(self.batch.start_at):
            self._node(CLEAN, node, frozenset(), forward=True)
        self.work.moved[CLEAN] += 2 * n_out if self.config.divergence == "kl" else 0
        if self.decomposition.global_gate is not None:
            self._global_gate(self.decomposition.global_gate)
        else:
            for name in self.decomposition:
                self._gate(name)
        for term in self.config.reconstructions:
            if isinstance(term.masks, Merged):
                self._merged(term, term.masks, rows.get(term.name), n_out)
                continue
            passes = rows.get(term.name) or expected_rows(list(self.decomposition), term.routing, self.n) * term.draws
            climbs = term.masks.steps if isinstance(term.masks, PGD) else 0
            climbs = term.masks.warm_steps if isinstance(term.masks, Persistent) else climbs
            for masked in passes:
                for _ in range(climbs):
                    self._pass(ascents(term.name), masked, n_out, parameters=False, draws=False)
                self._pass(term.name, masked, n_out, parameters=True, draws=climbs == 0)
        self._faithfulness()
        trained = self.decomposition.subcomponent_parameters() + self.decomposition.gate_parameters()
        self.work.moved[OPTIMIZER] += 7 * sum(p.numel() for p in trained)
        return self.work

    def _nodes_from(self, block: int | None) -> list[Node]:
        return [node for node in self.nodes if node.block is None or node.block >= (block or 0)]

    def _linear(
        self, term: str, shape: tuple[float, int, int], *, forward: bool = True, by_input: bool = False,
        by_weight: bool = False, batch: int = 1,
    ) -> None:  # fmt: skip
        """`y [m n] = x [m k] @ w [k n]` and what its backward pass needs."""
        (m, k, n), products = (round(shape[0]), *shape[1:]), self.work.matmuls[term]
        products += [Matmul(m, k, n, batch)] * forward
        products += [Matmul(m, n, k, batch, "nt")] * by_input
        products += [Matmul(k, m, n, batch, "tn")] * by_weight

    def _node(self, term: str, node: Node, masked: frozenset[str], *, forward: bool) -> None:
        depends = [bool(above & masked) for above in node.above]
        self._linear(
            term, node.shape, forward=forward, by_input=depends[0], by_weight=any(depends[1:]), batch=node.batch
        )
        self.work.moved[term] += node.moved[0] * forward + node.moved[1] * any(depends)
        self.work.gelus += node.gelus * forward
        self.work.gelu_derivatives += node.gelus * any(depends)

    def _pass(self, term: str, rows: Mapping[str, float], n_out: int, *, parameters: bool, draws: bool) -> None:
        """One pass under masks and its backward pass, from the first masked block onwards."""
        masked = frozenset(rows)
        start = self.batch.start_at
        if self.decomposition.host.can_start_at_blocks():
            start = max(start or 0, self.decomposition.starts.first_block(rows) or 0)
        for node in self._nodes_from(start):
            is_clean = not any(above & masked for above in node.above)
            self._node(term, self._needed(node, rows), masked, forward=self.performed or not is_clean)
            if node.name in masked:
                self._masked_site(term, node.name, rows[node.name], not is_clean, parameters, draws)
        self.work.moved[term] += 3 * n_out

    def _merged(self, term: Any, merged: Merged, rows: Rows | None, n_out: int) -> None:
        """Ascents over the first rows at all sites, then one pass over all rows: these everywhere, others as routed."""
        first = round(merged.share * len(self.batch.inputs))
        rows_of_first = Batch(self.batch.inputs[:first], start_at=self.batch.start_at)
        part = _Count(self.decomposition, self.config, rows_of_first, self.performed)
        part.work = self.work
        everywhere = dict.fromkeys(self.decomposition, float(part.n))
        n_sources = part.n * sum(w.n_subcomponents + int(self.config.delta) for w in self.decomposition.values())
        for _ in range(merged.persistent.warm_steps):
            part._pass(ascents(term.name), everywhere, n_out * part.n // self.n, parameters=False, draws=False)
        self.work.moved[ascents(term.name)] += 7 * n_sources * (merged.persistent.warm_steps + 1)
        if rows is None:
            (others,) = expected_rows(list(self.decomposition), term.routing, self.n - part.n)
            rows = [{name: part.n + others[name] for name in self.decomposition}]
        drawn = self.work.drawn
        self._pass(term.name, rows[0], n_out, parameters=True, draws=True)
        self.work.drawn = drawn + (self.work.drawn - drawn) * (1 - part.n / self.n)

    def _needed(self, node: Node, rows: Mapping[str, float]) -> Node:
        """Without the delta, rows that are masked do not need the frozen matrix."""
        if self.performed or self.config.delta or node.name not in rows:
            return node
        return replace(node, shape=(self.n - round(rows[node.name]), *node.shape[1:]))

    def _masked_site(self, term: str, name: str, r: float, by_input: bool, parameters: bool, draws: bool) -> None:
        weight = self.decomposition[name]
        (d_in, C), d_out = weight.V.shape, weight.U.shape[1]
        # The gate has computed `x @ V` of clean inputs, and takes the gradients of all passes through it.
        shared = not (self.performed or by_input) and weight.gate is not None and weight.gate.reads_activations
        self._linear(term, (r, d_in, C), forward=not shared, by_input=by_input, by_weight=parameters and not shared)
        self._linear(term, (r, C, d_out), by_input=True, by_weight=parameters)
        # Masks and coefficients: g, source and a to coefficients; back their gradient, a, g to those of a and g.
        self.work.drawn += self.n * (C + int(self.config.delta)) * draws
        moved = self.n * C * draws + 4 * r * C + (6 if parameters else 4) * r * C
        moved += 3 * r * d_out + 2 * r * d_out
        if r < self.n:  # gathered and scattered
            moved += 2 * r * d_in + 2 * r * d_out + 3 * r * d_in * by_input
        self.work.moved[term] += moved + 2 * C * (d_in + d_out) * parameters

    def _gate(self, name: str) -> None:
        weight, n = self.decomposition[name], self.n
        gate, (d_in, C), moved = weight.gate, weight.V.shape, self.work.moved
        kind, squashings = None if gate is None else gate.kind, 2 * n * C + 3 * n * C
        parameters: dict[str, Any] = {} if gate is None else dict(gate.named_parameters())
        match kind:
            case "shared":
                hidden, moved_hidden = n * parameters["w_in"].shape[1], 5
                self._linear(GATES, (n, *parameters["w_in"].shape), by_weight=True)
                self._linear(GATES, (n, *parameters["w_out"].shape), by_input=True, by_weight=True)
            case "scalar":
                width = parameters["w_in"].shape[1]
                hidden, moved_hidden = n * C * width, 0
                self._linear(GATES, (n, d_in, C), by_weight=True)
                self.work.matmuls[GATES] += [Matmul(1, width, n, C)] * (2 * self.performed)
                squashings += 2 * n * C + 2 * C * d_in
            case "vector":
                hidden, moved_hidden = n * parameters["w_in"].shape[1], 5
                self._linear(GATES, (n, *parameters["w_in"].shape), by_weight=True)
            case _:
                raise ValueError(f"no formula for the gate of {name}; there is one for shared, scalar and vector gates")
        self.work.gelus += hidden
        self.work.gelu_derivatives += hidden
        moved[GATES] += moved_hidden * hidden + squashings + 2 * sum(p.numel() for p in parameters.values())

    def _global_gate(self, gate: GlobalGate) -> None:
        """One transformer over all sites: `gate.blocks` of attention and an MLP of four times the width."""
        n, width, total = self.n, gate.w_embed.shape[1], gate.w_out.shape[1]
        n_batch, n_pos = self.batch.inputs.shape[:2]
        self._linear(GATES, (n, gate.w_embed.shape[0], width), by_weight=True)
        blocks: Any = gate.blocks
        for block in blocks:
            for shape in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
                self._linear(GATES, (n, *shape), by_input=True, by_weight=True)
            d, heads = width // block.n_heads, n_batch * block.n_heads
            self._linear(GATES, (n_pos, d, n_pos), by_input=True, by_weight=True, batch=heads)
            self._linear(GATES, (n_pos, n_pos, d), by_input=True, by_weight=True, batch=heads)
            self.work.gelus += 4 * n * width
            self.work.gelu_derivatives += 4 * n * width
            # Two norms with their residual sums, the softmax, and the GELU, forward and back.
            self.work.moved[GATES] += 2 * 2 * 3 * n * width + 5 * heads * n_pos**2 + 5 * 4 * n * width
        self._linear(GATES, (n, width, total), by_input=True, by_weight=True)
        self.work.moved[GATES] += 2 * n * gate.w_embed.shape[0] + 5 * n * total
        self.work.moved[GATES] += 2 * sum(p.numel() for p in gate.parameters())

    def _faithfulness(self) -> None:
        if self.config.faithfulness == 0:
            return
        for weight in self.decomposition.values():
            if weight.tied_to is None:
                (d_in, C), d_out = weight.V.shape, weight.U.shape[1]
                self._linear(FAITHFULNESS, (d_in, C, d_out), by_input=True, by_weight=True)
                self.work.moved[FAITHFULNESS] += 3 * d_in * d_out + 2 * C * (d_in + d_out)

"""Attribution graphs of a data set: nodes are subcomponents, whatever the position; edges are means over positions.

With the direct attribution of C1, `A[t', t] = (d a_c[t] / d a_c'[t']) * a_c'[t']`, and I the positions at which a
subcomponent's importance is above a threshold, one prompt gives for every position t' of the sender

    B[t'] = sum over t in I_c of A[t', t]     where t' in I_c', else 0:

what c' at t' does to all of c that matters. An edge's `weight` is the mean of B, its `absolute` the mean of |B|, both
over all positions of all prompts (those of the position mask, where there is one). Where `absolute` is much larger than
`|weight|`, the sign depends on the text. |B| is of a sum over the receiver's positions, so opposite effects of one
sender on two positions cancel in both.

What is frozen, and what the direct path contains, is as in `spd_lens.graphs.of_prompt`.
Cost: one clean pass, one pass with gradients, and one backward pass for every receiver, for every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.core.decomposition import Decomposition
from spd_lens.core.inputs import checked_decomposition
from spd_lens.core.units import Unit
from spd_lens.data.streams import first_batches
from spd_lens.graphs.check import AttributionCheck, Reading, measured
from spd_lens.graphs.direct_pass import DirectPass, Origin, direct_pass, origin_of, sender_of
from spd_lens.graphs.graph import AttributionGraph
from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.graphs.measured_removals import Drop, Readouts
from spd_lens.graphs.nodes import (
    above_rounding,
    copies_per_pass,
    node_attributes,
    readout_attributes,
    threshold_given,
)
from spd_lens.patching.agreement import sampled
from spd_lens.patching.arguments import Metric
from spd_lens.patching.frozen import Frozen, frozen_given
from spd_lens.statistics.saved import tensors_sha256
from spd_lens.support.given import given_function, given_whole
from spd_lens.support.progress import tqdm

Kept = dict[str, list[int]]


@dataclass(frozen=True)
class _Batch:
    """Tokens, where positions count `[batch pos]`, and where each kept subcomponent does `[batch pos C]`."""

    tokens: Tensor
    counts: Tensor
    important: dict[str, Tensor]


@torch.inference_mode(False)
@torch.enable_grad()
def dataset_graph(
    decomposition: Decomposition,
    batches: Any,
    *,
    metric: Metric | None = None,
    importance_above: float | None = 0.1,
    max_nodes: int = 200,
    max_batches: int = 16,
    frozen: Frozen | None = None,
    n_checked: int = 32,
    generator: torch.Generator | None = None,
    per_pass: int | None = None,
) -> AttributionGraph:
    """Attribution graph of the first `max_batches` batches of tokens `[batch pos]`, with its check (see the module).

    Nodes are at most the `max_nodes` subcomponents with the largest share of what their site's subcomponents write:
    the sum of `|a_c| |U_c|` over positions where their importance is above `importance_above` (None: over all
    positions), divided by that of the site. `settings.left_out` counts the others that are active. Besides
    them one node for the delta of every site, one for every kind of embedding that is not decomposed, and with
    `metric` (logits -> one number per row, `[batch]`) one readout.

    The check samples edges, and for each of them one prompt and position in the first batch at which the sender is
    important; there the sender is removed for real, and the fall of the receiver's important activations is compared
    with B.

    Raises ValueError for empty data, batches that are no tokens, a metric without gradient, and inputs split by head.
    """
    frozen = frozen_given(frozen)
    max_nodes = given_whole("max_nodes", max_nodes, least=1)
    importance_above = threshold_given(importance_above)
    if metric is not None:
        given_function("metric", metric, "of the logits that returns one number per row, [batch]")
    checked_decomposition(decomposition, "dataset_graph")
    data = _read(decomposition, batches, max_batches, importance_above)
    kept, left_out = _largest_writers(decomposition, data, max_nodes)
    readouts = [] if metric is None else [_summed(metric)]
    sums = None
    n_receivers = sum(map(len, kept.values())) + len(readouts)
    with tqdm(total=len(data) * n_receivers, desc="data-set graph", leave=False, delay=2) as progress:
        for batch in data:
            n_copies = copies_per_pass(decomposition, batch.tokens, per_pass, n_receivers)
            whole = direct_pass(decomposition, batch.tokens, n_copies, frozen)
            sums = sums or _Sums(whole, kept, len(readouts))
            sums.add(whole, batch, readouts, progress)
    assert sums is not None
    n_positions = sum(int(batch.counts.sum()) for batch in data)
    graph, edges, strengths = sums.graph(decomposition, data, n_positions)
    check = _check(decomposition, data[0], sums, edges, strengths, readouts, frozen, n_checked, generator)
    settings = GraphSettings(
        model=decomposition.host.provenance().model_name,
        decomposition=tensors_sha256(decomposition),
        importance_above=importance_above,
        max_nodes=max_nodes,
        left_out=left_out,
        frozen=str(frozen),
        n_prompts=sum(len(batch.tokens) for batch in data),
        n_positions=n_positions,
        sites=tuple(sums.sites),
    )
    return AttributionGraph(graph, check, (), settings)


def _read(decomposition: Decomposition, batches: Any, max_batches: int, above: float | None) -> list[_Batch]:
    found = []
    for given in first_batches(batches, decomposition, max_batches, purpose="make a graph of"):
        batch = given.to(decomposition.device)
        tokens = batch.inputs
        if batch.attention_mask is not None:
            raise ValueError(
                "a batch is padded on the left, which data-set graphs do not hand to the model; pad on the right "
                "(tokenizer.padding_side = 'right')"
            )
        if batch.start_at is not None or tokens.is_floating_point() or tokens.ndim != 2:
            raise ValueError(
                f"a batch holds inputs of shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected tokens "
                "[batch pos] from the beginning of the model"
            )
        counts = torch.ones_like(tokens, dtype=torch.bool) if batch.position_mask is None else batch.position_mask
        if above is None:
            importances = {
                site: torch.ones(*tokens.shape, weight.n_subcomponents, device=tokens.device)
                for site, weight in decomposition.items()
            }
        else:
            importances = decomposition.importance(tokens)
        threshold = 0.0 if above is None else above
        important = {site: (g > threshold) & counts.unsqueeze(-1) for site, g in importances.items()}
        found.append(_Batch(tokens, counts, important))
    return found


@torch.no_grad()
def _largest_writers(decomposition: Decomposition, data: Sequence[_Batch], max_nodes: int) -> tuple[Kept, int]:
    """The subcomponents that write most where they are important, and how many active ones are left out."""
    sizes = {site: torch.zeros(weight.n_subcomponents) for site, weight in decomposition.items()}
    for batch in data:
        for site, x in decomposition.clean_pass(batch.tokens).inputs.items():
            weight = decomposition[site]
            # Chosen, not multiplied: where a position does not count, activations may be NaN.
            important = torch.where(batch.important[site], weight.activations(x).abs(), 0.0)
            written = important * weight.U.norm(dim=1)
            sizes[site] += written.sum((0, 1)).float().cpu()
    # As a share of the site: sites differ in the scale of what they write.
    flat = torch.cat([size / size.sum().clamp_min(torch.finfo(size.dtype).tiny) for size in sizes.values()])
    order = [i for i in flat.argsort(descending=True, stable=True).tolist() if flat[i] > 0]
    if not order:
        raise ValueError(
            "no subcomponent is important anywhere in the data; lower importance_above (None: take all of them)"
        )
    starts, first = {}, 0
    for site, size in sizes.items():
        starts[site] = first
        first += len(size)
    chosen = set(order[:max_nodes])
    kept = {site: [c for c in range(len(size)) if starts[site] + c in chosen] for site, size in sizes.items()}
    return kept, len(order) - len(chosen)


def _summed(metric: Metric) -> Any:
    def value(logits: Tensor) -> Tensor:
        found = metric(logits)
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the metric returned {shape}; expected one number per row, [{len(logits)}]")
        if torch.is_grad_enabled() and bool(found.isnan().any()):
            raise ValueError("the metric returned NaN; expected numbers")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError("the metric gives no gradient (it detaches or rounds); an attribution needs one")
        return found.sum()

    return value


class _Sums:
    """Sums of B and |B| over positions, `[receiver sender]`."""

    def __init__(self, whole: DirectPass, kept: Kept, n_readouts: int) -> None:
        self.sites = list(whole.activations)
        self.receivers = [(site, c) for site in self.sites for c in kept[site]]
        self.senders = [Unit(((site, c),)) for site, c in self.receivers]
        self.senders += [sender_of(origin, 0, None) for origin in whole.leaves if origin[0] != "subcomponent"]
        self.n_readouts = n_readouts
        self.eps = whole.eps
        shape = (len(self.receivers) + n_readouts, len(self.senders))
        self.signed, self.absolute = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def add(self, whole: DirectPass, batch: _Batch, readouts: Readouts, progress: tqdm) -> None:
        """Add one batch."""
        n = len(self.receivers) + self.n_readouts
        for first in range(0, n, whole.n_copies):
            numbers = range(first, min(first + whole.n_copies, n))
            values = [self.value(whole, batch, readouts, r, k) for k, r in enumerate(numbers)]
            for columns, terms in self.terms(whole.attributions(values), batch):
                rows = slice(first, numbers.stop)
                self.signed[rows, columns] += terms[: len(numbers)].double().sum((1, 2)).cpu()
                self.absolute[rows, columns] += terms[: len(numbers)].double().abs().sum((1, 2)).cpu()
            progress.update(len(numbers))

    def value(self, whole: DirectPass, batch: _Batch, readouts: Readouts, receiver: int, copy: int) -> Tensor:
        """The receiver's important activations, summed over prompts and positions, in one copy of the batch."""
        if receiver >= len(self.receivers):
            return readouts[receiver - len(self.receivers)](whole.copies(whole.output)[copy])
        site, c = self.receivers[receiver]
        return (whole.copies(whole.activations[site])[copy, ..., c] * batch.important[site][..., c]).sum()

    def terms(self, found: dict[Origin, Tensor], batch: _Batch) -> list[tuple[list[int], Tensor]]:
        """B as `[copy batch pos sender]`, with the numbers of these senders, for every origin."""
        result = []
        for origin, values in found.items():
            columns = [i for i, sender in enumerate(self.senders) if origin_of(sender) == origin]
            if not columns:
                continue
            if origin[0] == "subcomponent":
                ids = [self.senders[i].id for i in columns]
                result.append((columns, (values * batch.important[origin[1]])[..., ids]))
            else:
                result.append((columns, (values * batch.counts).unsqueeze(-1)))
        return result

    def graph(
        self, decomposition: Decomposition, data: Sequence[_Batch], n_positions: int
    ) -> tuple[Any, list[tuple[int, int]], Tensor]:
        """The networkx graph, its edges as (receiver, sender), and their weights."""
        import networkx as nx

        graph, row = nx.DiGraph(), {site: i + 1 for i, site in enumerate(self.sites)}
        names = []
        for sender in self.senders:
            node = node_attributes(sender, row.get(sender.site, 0), None)
            if node["kind"] == "subcomponent":
                fires = sum(int(batch.important[sender.site][..., sender.id].sum()) for batch in data)
                node["firing_rate"] = fires / n_positions
            names.append(str(sender))
            graph.add_node(names[-1], **node)
        for j in range(self.n_readouts):
            node = readout_attributes(-1 - j, None, len(row) + 1, None)
            graph.add_node("readout", **{**node, "label": "metric", "readout_weight": 1.0})
        receivers = names[: len(self.receivers)] + ["readout"] * self.n_readouts
        signed, absolute = self.signed / n_positions, self.absolute / n_positions
        edges = [(r, s) for r, s in above_rounding(absolute, self.eps).nonzero().tolist()]
        for r, s in edges:
            graph.add_edge(names[s], receivers[r], weight=float(signed[r, s]), absolute=float(absolute[r, s]))
        graph.remove_nodes_from([n for n, d in graph.nodes(data=True) if d["kind"] == "delta" and not graph.degree(n)])
        self.names, self.receiver_names = names, receivers
        return graph, edges, torch.tensor([float(absolute[r, s]) for r, s in edges], dtype=torch.float64)


def _check(
    decomposition: Decomposition,
    batch: _Batch,
    sums: _Sums,
    edges: Sequence[tuple[int, int]],
    strengths: Float[Tensor, " edge"],
    readouts: Readouts,
    frozen: Frozen,
    n_checked: int,
    generator: torch.Generator | None,
) -> AttributionCheck:
    """Remove senders at single positions of single prompts, and compare with B there."""
    generator = generator or torch.Generator().manual_seed(0)
    chosen, n_strongest = sampled(strengths, n_checked, generator)
    by_prompt: dict[int, list[tuple[int, int]]] = {}
    for i in chosen:
        sender = sums.senders[edges[i][1]]
        is_subcomponent = origin_of(sender)[0] == "subcomponent"
        where = (batch.important[sender.site][..., sender.id] if is_subcomponent else batch.counts).nonzero()
        if len(where):
            row, position = where[int(torch.randint(len(where), (), generator=generator))].tolist()
            by_prompt.setdefault(row, []).append((i, position))
    found: dict[int, tuple[float, float, float]] = {}
    for row, items in by_prompt.items():
        one = _Batch(
            batch.tokens[row : row + 1],
            batch.counts[row : row + 1],
            {site: mask[row : row + 1] for site, mask in batch.important.items()},
        )
        predicted = _predicted(decomposition, one, sums, [(*edges[i], t) for i, t in items], readouts, frozen)
        pairs = [(sums.senders[edges[i][1]].at(t), _reading(sums, one, edges[i][0])) for i, t in items]
        direct, total = measured(decomposition, one.tokens, pairs, readouts, frozen)
        found |= {i: values for (i, _), values in zip(items, zip(predicted, direct, total, strict=True), strict=True)}
    order = [i for i in chosen if i in found]
    return AttributionCheck(
        edges=tuple((sums.names[edges[i][1]], sums.receiver_names[edges[i][0]]) for i in order),
        predicted=tuple(found[i][0] for i in order),
        measured=tuple(found[i][1] for i in order),
        total=tuple(found[i][2] for i in order),
        n_strongest=len([i for i in chosen[:n_strongest] if i in found]),
        frozen=str(frozen),
    )


def _predicted(
    decomposition: Decomposition,
    one: _Batch,
    sums: _Sums,
    items: Sequence[tuple[int, int, int]],
    readouts: Readouts,
    frozen: Frozen,
) -> list[float]:
    """B of `(receiver, sender, position)` on one prompt."""
    whole = direct_pass(decomposition, one.tokens, len(items), frozen)
    values = [sums.value(whole, one, readouts, r, k) for k, (r, _, _) in enumerate(items)]
    terms = sums.terms(whole.attributions(values), one)
    found = [0.0] * len(items)
    for columns, term in terms:
        for k, (_, s, t) in enumerate(items):
            if s in columns:
                found[k] = float(term[k, 0, t, columns.index(s)])
    return found


def _reading(sums: _Sums, one: _Batch, receiver: int) -> Reading:
    if receiver >= len(sums.receivers):
        return lambda drop: drop.readouts[receiver - len(sums.receivers)]
    site, c = sums.receivers[receiver]
    return lambda drop: _fallen(drop, site, c, one.important[site][0, :, c])


def _fallen(drop: Drop, site: str, c: int, counts: Tensor) -> float:
    return float((drop.activations[site][:, c] * counts.cpu()).sum())

"""Attribution graphs of one prompt: which subcomponents act on which, directly, and by how much.

An edge from c' at position t' to c at position t is (C1)

    weight = (d a_c[t] / d a_c'[t']) * a_c'[t'],

the gradient stopped at all other subcomponents: a *direct* effect. It is exact where the path between them is linear,
and a first-order estimate where it passes the non-linearity of an MLP. Frozen by default: attention patterns,
normalisation scales, and the delta `x @ (W - V U)` of every site, which is a node of its own then. What is not
decomposed is part of the direct path.

Every edge predicts an intervention, so a graph always carries the measured outcome of some (C2,
`AttributionGraph.check`). Exact or not, a graph describes what moves activations on this prompt, no more; it is not a
claim about how the model works on other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.circuits.circuit import Circuit
from spd_lens.core.decomposition import Decomposition
from spd_lens.core.units import Unit
from spd_lens.graphs.check import Reading, prompt_check
from spd_lens.graphs.direct_pass import DirectPass, direct_pass, origin_of, sender_of
from spd_lens.graphs.graph import AttributionGraph
from spd_lens.graphs.graph_settings import GraphSettings
from spd_lens.graphs.measured_removals import Drop
from spd_lens.graphs.nodes import (
    above_rounding,
    copies_per_pass,
    node_attributes,
    readout_attributes,
    threshold_given,
)
from spd_lens.graphs.readouts import Readout, ReadoutsGiven, chosen_readouts
from spd_lens.patching.arguments import checked_input, checked_positions
from spd_lens.patching.frozen import Frozen, frozen_given
from spd_lens.statistics.saved import tensors_sha256
from spd_lens.support.given import given_instance, given_whole
from spd_lens.support.progress import tqdm


@torch.inference_mode(False)
@torch.enable_grad()
def attribution_graph(
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    *,
    readouts: ReadoutsGiven = None,
    position: int = -1,
    importance_above: float | None = 0.1,
    circuit: Circuit | None = None,
    max_nodes: int = 300,
    frozen: Frozen | None = None,
    n_checked: int = 64,
    generator: torch.Generator | None = None,
    per_pass: int | None = None,
) -> AttributionGraph:
    """The attribution graph of one prompt `[1 pos]` (see the module), with its check.

    Nodes:

    - subcomponents at positions where their importance is above `importance_above` (None: wherever they are) and whose
      linearised total effect on the readouts is not 0, at most the `max_nodes` with the largest (summed over readouts,
      `sum |gradient * a| * readout weight`; `settings.left_out` counts the rest). With a `circuit` its nodes,
      whatever their importance: found by `find_circuit`, then `.prune(1.0, 0.9)` prunes its edges;
    - the delta of every site at every position, unless `frozen.delta` is False;
    - token and position embeddings that are not decomposed, at every position; or, where the first decomposed block is
      a later one, the residual stream that enters it;
    - readouts: with None the likeliest next tokens at `position` (at most 10, until they have 95 % of the probability),
      or the tokens that are given, as ids or as text (`" whale"`); both as logit minus mean logit, `readout_weight`
      their probability. Or
      `{"he - she": lambda logits: logits[0, -1, 5] - logits[0, -1, 7]}`: functions of the logits `[1 pos d_vocab]`
      that return one number, of equal weight.

    `frozen=Frozen(attention=False)` lets gradients pass through attention patterns: then queries and keys act on what
    comes after them, to first order. `n_checked` edges (half the strongest, half at random from `generator`) are
    ablated for real.

    Edges that are only rounding (under `16 eps` of all that acts on the receiver) are left out.

    Cost: one backward pass for every receiver, `per_pass` at a time as copies of the prompt (None: as many as 128 MB of
    activations allow), and two passes for every sender that is checked.

    Raises ValueError for more than one prompt, unknown readouts and positions, `n_checked` < 1, inputs split by head,
    or if nothing is important; TypeError for wrong types.

    >>> from spd_lens import decompose
    >>> from spd_lens.models import load_tiny_lm
    >>> model = load_tiny_lm()
    >>> decomposition = decompose(model, {"blocks.*.mlp.W_*": 8})
    >>> graph = attribution_graph(decomposition, model.to_tokens("Call me"), importance_above=None)
    >>> 0.9 < graph.check.slope < 1.1
    True
    """
    frozen = frozen_given(frozen)
    tokens = _one_prompt(decomposition, tokens)
    (position,) = checked_positions([position], tokens) or [0]
    max_nodes = given_whole("max_nodes", max_nodes, least=1)
    importance_above = threshold_given(importance_above)
    if circuit is not None:
        given_instance("circuit", circuit, Circuit, "circuit_of(decomposition, ids), or find_circuit(...).circuit")
    wanted = chosen_readouts(decomposition, tokens, readouts, position)
    importances = None if importance_above is None else decomposition.importance(tokens)
    eligible = _eligible(decomposition, tokens, importances, importance_above, circuit)
    chosen, left_out = _important(decomposition, tokens, wanted, eligible, max_nodes, frozen)
    n_receivers = len(chosen) + len(wanted)
    whole = direct_pass(decomposition, tokens, copies_per_pass(decomposition, tokens, per_pass, n_receivers), frozen)
    order = list(whole.activations)
    chosen.sort(key=lambda unit: (order.index(unit.site), unit.position, unit.id))
    senders = chosen + _fixed_senders(whole, tokens.shape[1])
    weights, from_unshown = _weights(whole, chosen, senders, wanted)

    strings = decomposition.host.token_strings(tokens[0].tolist())
    graph = _with_nodes(whole, chosen, senders, wanted, strings, position, importances, from_unshown)
    names = list(graph.nodes)
    receivers = [*range(len(chosen)), *range(len(senders), len(senders) + len(wanted))]
    eps = whole.eps
    rows, columns = above_rounding(weights, eps).nonzero(as_tuple=True)
    edges = [(names[s], names[receivers[r]]) for r, s in zip(rows.tolist(), columns.tolist(), strict=True)]
    strengths = weights[rows, columns]
    graph.add_edges_from((s, t, {"weight": w}) for (s, t), w in zip(edges, strengths.tolist(), strict=True))
    pairs = [(senders[s], _reading(chosen, r)) for r, s in zip(rows.tolist(), columns.tolist(), strict=True)]
    values = [readout.value for readout in wanted]
    check = prompt_check(decomposition, tokens, edges, strengths, pairs, values, frozen, n_checked, generator)
    idle = [n for n, data in graph.nodes(data=True) if data["kind"] == "delta" and not graph.degree(n)]
    graph.remove_nodes_from(idle)
    settings = GraphSettings(
        model=decomposition.host.provenance().model_name,
        decomposition=tensors_sha256(decomposition),
        importance_above=importance_above,
        max_nodes=max_nodes,
        left_out=left_out,
        frozen=str(frozen),
        readout_position=position,
        sites=tuple(order),
    )
    return AttributionGraph(graph, check, tuple(strings), settings)


def _one_prompt(decomposition: Decomposition, tokens: Tensor) -> Tensor:
    tokens = checked_input(decomposition, tokens)
    if tokens.is_floating_point() or tokens.ndim != 2 or len(tokens) != 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected one prompt of token ids, "
            "[1 pos] (for many prompts: dataset_graph)"
        )
    return tokens.to(decomposition.device)


# -- nodes ------------------------------------------------------------------------------------------------------------


def _eligible(
    decomposition: Decomposition,
    tokens: Tensor,
    importances: Mapping[str, Tensor] | None,
    above: float | None,
    circuit: Circuit | None,
) -> dict[str, Bool[Tensor, "pos C"]]:
    """Which subcomponents may be nodes, by site; sites that are not in it: all of them."""
    if circuit is not None:
        n = tokens.shape[1]
        for site, kept in circuit.kept.items():
            if site not in decomposition or kept.shape[1] != decomposition[site].n_subcomponents:
                raise ValueError(f"the circuit has {kept.shape[1]} subcomponents at {site}; it is of other sites")
            if len(kept) not in (1, n):
                raise ValueError(f"the circuit has nodes at {len(kept)} positions, the prompt has {n}")
        none = {site: torch.zeros(1, w.n_subcomponents, dtype=torch.bool) for site, w in decomposition.items()}
        return {site: kept.expand(n, -1).to(decomposition.device) for site, kept in {**none, **circuit.kept}.items()}
    if importances is None or above is None:
        return {}
    return {site: g[0] > above for site, g in importances.items()}


def _important(
    decomposition: Decomposition,
    tokens: Tensor,
    readouts: Sequence[Readout],
    eligible: Mapping[str, Bool[Tensor, "pos C"]],
    max_nodes: int,
    frozen: Frozen,
) -> tuple[list[Unit], int]:
    """The subcomponents worth a node, and how many more would have been."""
    whole = direct_pass(decomposition, tokens, len(readouts), frozen, total=True)
    effects = whole.attributions([t.value(whole.output[i : i + 1]) for i, t in enumerate(readouts)])
    importance = torch.tensor([t.weight for t in readouts], device=decomposition.device)
    units, scores = [], []
    for (kind, site), effect in effects.items():
        if kind != "subcomponent":
            continue
        score = (effect[:, 0].abs() * importance.to(effect)[:, None, None]).sum(0)
        if not bool(score.isfinite().all()):
            raise ValueError(
                f"effects of subcomponents of {site} on the readouts are NaN or infinite: parameters or readouts are "
                "not finite, or a gradient is too large for the model's dtype (use float32)"
            )
        keep = score > 0
        if site in eligible:
            keep &= eligible[site]
        for t, c in keep.nonzero().tolist():
            units.append(Unit(((site, c),), (t,)))
        scores.append(score[keep].float().cpu())
    if not units:
        raise ValueError(
            "no subcomponent that may be a node has an effect on the readouts on this prompt; lower importance_above "
            "(None: take all), give a larger circuit, or decompose sites that the readouts depend on"
        )
    order = torch.cat(scores).argsort(descending=True, stable=True)[:max_nodes]
    return [units[i] for i in order.tolist()], len(units) - len(order)


def _fixed_senders(whole: DirectPass, n_positions: int) -> list[Unit]:
    """Deltas and embeddings at every position."""
    fixed = [origin for origin in whole.leaves if origin[0] != "subcomponent"]
    return [sender_of(origin, 0, t) for origin in fixed for t in range(n_positions)]


# -- edges ------------------------------------------------------------------------------------------------------------


def _weights(
    whole: DirectPass, chosen: Sequence[Unit], senders: Sequence[Unit], readouts: Sequence[Readout]
) -> tuple[Float[Tensor, "receiver sender"], Float[Tensor, " receiver"]]:
    """C1 for every receiver (subcomponents, then readouts) and sender, and what each has from those not shown."""
    n = len(chosen) + len(readouts)
    weights, unshown = torch.zeros(n, len(senders), dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    by_origin: dict[tuple[str, str], list[int]] = {}
    for i, sender in enumerate(senders):
        by_origin.setdefault(origin_of(sender), []).append(i)
    with tqdm(total=n, desc="attribution graph", leave=False, delay=2) as progress:
        for first in range(0, n, whole.n_copies):
            numbers = range(first, min(first + whole.n_copies, n))
            found = whole.attributions([_receiver_value(whole, chosen, readouts, r, k) for k, r in enumerate(numbers)])
            for origin, values in found.items():
                here = by_origin.get(origin, [])
                t = torch.tensor([senders[i].position for i in here], dtype=torch.long, device=values.device)
                c = torch.tensor([senders[i].id for i in here], dtype=torch.long, device=values.device)
                at = values[: len(numbers), 0]
                shown = (at[:, t, c] if origin[0] == "subcomponent" else at[:, t]).double().cpu()
                weights[first : numbers.stop, here] = shown
                if origin[0] == "subcomponent":
                    unshown[first : numbers.stop] += at.double().sum((1, 2)).cpu() - shown.sum(1)
            progress.update(len(numbers))
    return weights, unshown


def _receiver_value(
    whole: DirectPass, chosen: Sequence[Unit], readouts: Sequence[Readout], receiver: int, copy: int
) -> Tensor:
    if receiver >= len(chosen):
        return readouts[receiver - len(chosen)].value(whole.output[copy : copy + 1])
    unit = chosen[receiver]
    return whole.activations[unit.site][copy, unit.position, unit.id]


def _reading(chosen: Sequence[Unit], receiver: int) -> Reading:
    if receiver >= len(chosen):
        return lambda drop: drop.readouts[receiver - len(chosen)]
    return lambda drop: _fallen(drop, chosen[receiver])


def _fallen(drop: Drop, unit: Unit) -> float:
    return float(drop.activations[unit.site][unit.position, unit.id])


# -- the networkx graph -----------------------------------------------------------------------------------------------


def _with_nodes(
    whole: DirectPass,
    chosen: Sequence[Unit],
    senders: Sequence[Unit],
    readouts: Sequence[Readout],
    strings: Sequence[str],
    position: int,
    importances: Mapping[str, Tensor] | None,
    from_unshown: Tensor,
) -> Any:
    """A graph with a node for every sender and then every readout, in order."""
    import networkx as nx

    graph, row = nx.DiGraph(), {site: i + 1 for i, site in enumerate(whole.activations)}
    for i, sender in enumerate(senders):
        (kind, site), c, t = origin_of(sender), sender.id, sender.position
        assert t is not None
        node = node_attributes(sender, row.get(site, 0), strings[t])
        if kind == "subcomponent":
            node["activation"] = float(whole.clean[site][0, t, c])
            node["importance"] = None if importances is None else float(importances[site][0, t, c])
            node["from_unshown"] = float(from_unshown[i])
        graph.add_node(str(sender), **node)
    for j, readout in enumerate(readouts):
        node = readout_attributes(readout.number, position, len(row) + 1, strings[position])
        with torch.no_grad():
            node["activation"] = float(readout.value(whole.output[:1]))
        node |= {"label": readout.label, "readout_weight": readout.weight, "probability": readout.probability}
        node["predicts"] = readout.predicts
        node["from_unshown"] = float(from_unshown[len(chosen) + j])
        graph.add_node(f"readout {readout.number}", **node)
    return graph

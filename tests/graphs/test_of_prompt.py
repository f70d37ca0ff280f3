"""Attribution graphs against matrix arithmetic, finite differences under hooks by hand, and real ablations (C1, C2)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from spd_lens import Batch, Decomposition, decompose
from spd_lens.circuits import Circuit
from spd_lens.core import units_of
from spd_lens.graphs import AttributionCheck, AttributionGraph, attribution_graph, dataset_graph, influences, prune
from spd_lens.patching import Frozen, direct_changes
from tests import bridge_models, oracle
from tests.conftest import TL_MAJOR, needs_hooked
from tests.small_models import tiny_transformer, tokens

PROMPT = tokens(1, seed=1, length=6)
LINEAR = {"attn_only": True, "normalization_type": None}
SITES = {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_[VO]": 4, "unembed.W_U": 4}


def difference(logits: Tensor) -> Tensor:
    return logits[0, -1, 3] - logits[0, -1, 5]


def spread(logits: Tensor) -> Tensor:
    """Linear, and every position matters."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).sin()
    return (logits.reshape(len(logits), -1) * weights).sum(-1)


@pytest.fixture
def double() -> Decomposition:
    """All of the MLPs, values and outputs, in float64; the embeddings, queries and keys are not decomposed."""
    return decompose(tiny_transformer(dtype=torch.float64), SITES, gate="shared", gate_width=8)


def factors(decomposition: Decomposition, site: str, c: int) -> tuple[Tensor, Tensor]:
    return decomposition[site].V.detach()[:, c], decomposition[site].U.detach()[c]


def weight(graph: AttributionGraph, sender: str, receiver: str) -> float:
    """0 where there is no edge."""
    assert sender in graph.graph, sender
    assert receiver in graph.graph, receiver
    return graph.graph.edges[sender, receiver]["weight"] if graph.graph.has_edge(sender, receiver) else 0.0


# -- C1: arithmetic on a linear model ----------------------------------------------------------------------------


@needs_hooked
def test_edges_of_a_linear_model_are_products_of_matrices_and_patterns() -> None:
    target = oracle.tiny_model(dtype=torch.float64, **LINEAR)
    v, o, v1, o1 = "blocks.0.attn.W_V", "blocks.0.attn.W_O", "blocks.1.attn.W_V", "blocks.1.attn.W_O"
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys((v, o, v1, o1), 5))
    prompt = oracle.tokens_for(target, batch=1)
    got = attribution_graph(decomposition, prompt, readouts={"d": difference}, importance_above=None)
    with torch.no_grad():
        _, cache = target.run_with_cache(prompt)
    inputs = {site: x[0] for site, x in oracle.site_inputs(target, prompt).items()}
    a = {site: inputs[site] @ weight_.V.detach() for site, weight_ in decomposition.items()}
    for c, c1, t in itertools.product(range(5), range(5), range(5)):
        # Residual stream: the same position only.
        expected = a[o][t, c] * (factors(decomposition, o, c)[1] @ factors(decomposition, v1, c1)[0])
        assert weight(got, f"{o}[{c}] @{t}", f"{v1}[{c1}] @4") == pytest.approx(
            float(expected) if t == 4 else 0, abs=1e-12
        )
        # Attention: from every position, by each head's frozen pattern.
        pattern = cache["blocks.1.attn.hook_pattern"][0, :, 4, t]
        per_head = factors(decomposition, v1, c)[1].unflatten(0, (4, 6)) * pattern[:, None]
        expected = a[v1][t, c] * (per_head.flatten() @ factors(decomposition, o1, c1)[0])
        assert weight(got, f"{v1}[{c}] @{t}", f"{o1}[{c1}] @4") == pytest.approx(float(expected), abs=1e-12)
    embed, position_embed = cache["hook_embed"][0], cache["hook_pos_embed"][0]
    W_U = target.unembed.W_U.detach()
    for c, t in itertools.product(range(5), range(5)):
        V, U = factors(decomposition, v1, c)[0], factors(decomposition, o1, c)[1]
        assert weight(got, f"embed @{t}", f"{v1}[{c}] @{t}") == pytest.approx(float(embed[t] @ V), abs=1e-12)
        assert weight(got, f"pos_embed @{t}", f"{v1}[{c}] @{t}") == pytest.approx(
            float(position_embed[t] @ V), abs=1e-12
        )
        unexplained = (oracle.weight_of(target, o) - decomposition[o].weight).detach()
        expected = inputs[o][t] @ unexplained @ V
        assert weight(got, f"{o}[delta] @{t}", f"{v1}[{c}] @{t}") == pytest.approx(float(expected), abs=1e-12)
        if t == 4:
            expected = a[o1][4, c] * (U @ (W_U[:, 3] - W_U[:, 5]))
            assert weight(got, f"{o1}[{c}] @4", "readout -1") == pytest.approx(float(expected), abs=1e-12)
    # Completeness: all that acts on a receiver, and the biases on the way, are its activation.
    for c in range(5):
        name = f"{v1}[{c}] @4"
        parts = sum(d["weight"] for _, _, d in got.graph.in_edges(name, data=True))
        parts += got.graph.nodes[name]["from_unshown"]
        bias = float(target.blocks[0].attn.b_O.detach() @ factors(decomposition, v1, c)[0])
        assert parts + bias == pytest.approx(float(a[v1][4, c]), abs=1e-10)
        assert got.graph.nodes[name]["activation"] == pytest.approx(float(a[v1][4, c]), abs=1e-12)
    # Every path is linear, so every ablation is what its edge says.
    assert got.check.correlation == pytest.approx(1, abs=1e-12)
    assert got.check.slope == pytest.approx(1, abs=1e-12)
    assert got.check.max_error < 1e-12
    assert len(got.check.edges) == 64


# -- C1: finite differences, with hooks by hand, on both majors ---------------------------------------------------


def output_point(decomposition: Decomposition, site: str) -> str:
    """This file's own knowledge of where a weight's output passes."""
    model = decomposition.model
    if TL_MAJOR == 3:
        return oracle.output_name(model, site)
    short = {"W_V": "attn.v", "W_O": "attn.o", "W_in": "mlp.in", "W_out": "mlp.out"}
    return "unembed.hook_out" if site == "unembed.W_U" else f"{site[:9]}{short[site.rsplit('.', 1)[-1]]}.hook_out"


def by_hand(
    decomposition: Decomposition,
    prompt: Tensor,
    frozen: Frozen,
    moves: Sequence[tuple[str, int, int, float]],
    clean: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Activations and logits when each `(site, c, t, amount)` is added to one activation and all else is held."""
    hooks, found = [], {}

    def note(value: Tensor, hook: Any, site: str) -> None:
        found[site] = value.detach().clone()

    def hold(value: Tensor, hook: Any, name: str, site: str | None) -> Tensor:
        held = clean[name].clone()
        for moved, c, t, amount in moves:
            if moved == site and name.endswith("_acts"):
                held[0, t, c] += amount
            elif moved == site:
                flat = (amount * decomposition[site].U.detach()[c]).reshape(held[0, t].shape)
                held[0, t] += flat
        return held

    for site in decomposition:
        acts = decomposition[site].site.point_names()[0]
        hooks.append((acts, lambda value, hook, site=site: note(value, hook, site)))
        name = output_point(decomposition, site) if frozen.delta else acts
        hooks.append((name, lambda value, hook, name=name, site=site: hold(value, hook, name, site)))
    kinds = [kind for kind, is_frozen in (("pattern", frozen.attention), ("scale", frozen.norms)) if is_frozen]
    for name in clean:
        if any(name.endswith(f"hook_{kind}") for kind in kinds):
            hooks.append((name, lambda value, hook, name=name: hold(value, hook, name, None)))
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        logits = decomposition.model(prompt)
    return found, logits


@pytest.mark.parametrize(
    "frozen",
    [Frozen(), Frozen(attention=False), Frozen(norms=False), Frozen(delta=False), Frozen(False, False, False)],
    ids=str,
)
def test_edges_are_the_slopes_of_held_forwards(double: Decomposition, frozen: Frozen) -> None:
    got = attribution_graph(
        double, PROMPT, readouts={"d": difference, "s": lambda x: spread(x)[0]}, importance_above=None, frozen=frozen
    )
    with torch.no_grad():
        _, clean = double.model.run_with_cache(PROMPT)
    clean = dict(clean.items())
    eps, compared, largest = 1e-4, 0, 0.0
    # Central differences: the error is of order eps^2 times a third derivative of order 1. The bridge takes softmax in
    # float32 also in a float64 model: a live pattern is rounded by 6e-8 of itself, divided by 2 eps.
    rounded = TL_MAJOR >= 4 and not frozen.attention
    relative, absolute = (3e-4, 3e-5) if rounded else (1e-5, 1e-7)
    senders = [("blocks.0.mlp.W_in", 1, 2), ("blocks.0.attn.W_V", 3, 1), ("blocks.0.mlp.W_out", 0, 3)]
    senders += [("blocks.0.attn.W_O", 2, 5), ("blocks.1.attn.W_V", 0, 4), ("blocks.1.mlp.W_in", 3, 5)]
    for site, c, t in senders:
        (up, up_logits), (down, down_logits) = (
            by_hand(double, PROMPT, frozen, [(site, c, t, sign * eps)], clean) for sign in (1, -1)
        )
        size = float(clean[double[site].site.point_names()[0]][0, t, c]) / (2 * eps)
        sender = f"{site}[{c}] @{t}"
        for receiver, data in got.graph.nodes(data=True):
            if data["kind"] == "subcomponent":
                at = (0, data["position"], data["subcomponent"])
                slope = float(up[data["site"]][at] - down[data["site"]][at]) * size
            elif data["kind"] == "readout":
                metric = difference if data["number"] == -1 else lambda x: spread(x)[0]
                slope = float(metric(up_logits) - metric(down_logits)) * size
            else:
                continue
            assert weight(got, sender, receiver) == pytest.approx(slope, rel=relative, abs=absolute), (sender, receiver)
            compared += 1
            largest = max(largest, abs(slope))
    assert compared > 500
    assert largest > 1e-2


def test_live_attention_and_norms_change_edges(double: Decomposition) -> None:
    arguments: Any = {"readouts": {"s": lambda x: spread(x)[0]}, "importance_above": None}
    frozen = attribution_graph(double, PROMPT, **arguments)
    for other in (Frozen(attention=False), Frozen(norms=False), Frozen(delta=False)):
        live = attribution_graph(double, PROMPT, frozen=other, **arguments)
        shared = set(frozen.graph.edges) & set(live.graph.edges)
        moved = max(abs(frozen.graph.edges[e]["weight"] - live.graph.edges[e]["weight"]) for e in shared)
        new = set(live.graph.edges) - set(frozen.graph.edges)
        assert moved > 1e-3 or new
        assert str(other) == live.check.frozen == live.settings.frozen
    kinds = {data["kind"] for _, data in live.graph.nodes(data=True)}
    assert kinds == {"subcomponent", "embedding", "readout"}  # a live delta is no node


def test_queries_act_only_when_attention_is_live() -> None:
    sites = {"blocks.*.attn.W_*": 4}
    decomposition = decompose(tiny_transformer(), sites)
    arguments: Any = {"readouts": {"s": lambda x: spread(x)[0]}, "importance_above": None}
    frozen = attribution_graph(decomposition, PROMPT, **arguments)
    live = attribution_graph(decomposition, PROMPT, frozen=Frozen(attention=False), **arguments)
    for graph, expected in ((frozen, False), (live, True)):
        names = {data["site"].rsplit(".")[-1] for _, data in graph.graph.nodes(data=True) if data["kind"][0] == "s"}
        assert ("W_Q" in names) is expected
        assert "W_V" in names
    assert live.graph.has_edge("blocks.0.attn.W_Q[1] @3", "blocks.0.attn.W_O[2] @3")


def test_a_graph_has_no_cycle_and_no_edge_to_an_earlier_position(double: Decomposition) -> None:
    got = attribution_graph(double, PROMPT, readouts={"s": lambda x: spread(x)[0]}, importance_above=None)
    assert nx.is_directed_acyclic_graph(got.graph)
    crossing = 0
    for s, t in got.graph.edges:
        sender, receiver = got.graph.nodes[s], got.graph.nodes[t]
        assert sender["row"] < receiver["row"]
        if receiver["kind"] != "readout":
            assert sender["position"] <= receiver["position"]
            crossing += sender["position"] < receiver["position"]
    assert crossing > 50
    assert all(isinstance(v, (str, int, float, type(None))) for _, d in got.graph.nodes(data=True) for v in d.values())
    assert all(isinstance(d["weight"], float) for _, _, d in got.graph.edges(data=True))


@needs_hooked
@pytest.mark.parametrize("name", ["gqa", "gated", "rms_folded", "one_head_full_width", "attn_result", "parallel"])
def test_edges_of_other_architectures_are_their_ablations_where_paths_are_linear(name: str) -> None:
    target = oracle.CASES[name].build(dtype=torch.float64)
    sites = [s for s in oracle.all_sites(target) if s.rsplit(".", 1)[-1] not in ("W_Q", "W_K")]
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(sites, 5))
    prompt = oracle.tokens_for(target, batch=1)
    got = attribution_graph(
        decomposition, prompt, readouts={"d": difference}, importance_above=None, n_checked=400, max_nodes=1000
    )
    # In float64 what is left is rounding.
    _assert_linear_edges_agree(got, tolerance=1e-10)


@pytest.mark.parametrize(
    ("family", "mode"),
    [("gpt2", "raw"), ("gpt2", "compatibility"), ("pythia", "raw"), ("llama", "raw"), ("llama", "compatibility"),
     ("gemma2", "raw")],
)  # fmt: skip
def test_edges_on_bridges_are_their_ablations_where_paths_are_linear(family: str, mode: str) -> None:
    sites = [s for s in bridge_models.all_sites(family) if s[-3:] not in ("W_Q", "W_K", "W_E", "pos")]
    decomposition = bridge_models.swapped(family, mode, sites)
    got = attribution_graph(
        decomposition, bridge_models.random_tokens(1), readouts={"d": difference}, importance_above=None, n_checked=200
    )
    _assert_linear_edges_agree(got, tolerance=bridge_models.TOLERANCE)


def _assert_linear_edges_agree(graph: AttributionGraph, tolerance: float) -> None:
    """Only W_out reads through a non-linearity (and the readout through a soft cap, where there is one)."""
    compared, bent = 0, 0.0
    scale = max(abs(m) for m in graph.check.measured)
    for (sender, receiver), p, m in zip(graph.check.edges, graph.check.predicted, graph.check.measured, strict=True):
        into_out = "W_out" in receiver and ("W_in" in sender or "W_gate" in sender)
        if into_out:
            bent = max(bent, abs(m - p))
        elif not receiver.startswith("readout"):
            assert m == pytest.approx(p, abs=tolerance * scale), (sender, receiver)
            compared += 1
    assert compared > 60
    assert bent > 1e-3 * scale  # the comparison can tell


# -- C2 ----------------------------------------------------------------------------------------------------------


def held_without(
    decomposition: Decomposition, clean: Any, sender: dict[str, Any]
) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """C2 by hand: every output, attention pattern and scale as in the clean run, the sender's own without its part."""
    outputs = {"mlp.W_in": "mlp.hook_pre", "mlp.W_out": "hook_mlp_out", "attn.W_O": "hook_attn_out"}
    values = {name: clean[name] for name in clean if name.endswith(("hook_pattern", "hook_scale"))}
    for site in decomposition:
        block, matrix = f"blocks.{site.split('.')[1]}.", site.split(".", 2)[2]
        values[block + outputs[matrix]] = value = clean[block + outputs[matrix]].clone()
        if site == sender["site"]:
            a = clean[f"{block}hook_{matrix.split('.')[1]}_acts"][0, sender["position"], sender["subcomponent"]]
            value[0, sender["position"]] -= a * decomposition[site].U[sender["subcomponent"]].detach()
    return [(name, lambda y, hook, held=value: held) for name, value in values.items()]


def test_the_check_is_an_ablation_with_everything_else_held() -> None:
    """Held, and removed, by hooks of the test's own; `direct_changes` of path patching says the same."""
    double = decompose(tiny_transformer(dtype=torch.float64), {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_O": 2})
    got = attribution_graph(double, PROMPT, readouts={"d": difference}, importance_above=None, n_checked=60)
    with torch.no_grad():
        _, clean = double.model.run_with_cache(PROMPT)
    compared = bent = 0
    check = got.check
    for (s, r), predicted, measured, total in zip(
        check.edges, check.predicted, check.measured, check.total, strict=True
    ):
        sender, receiver = got.graph.nodes[s], got.graph.nodes[r]
        assert predicted == got.graph.edges[s, r]["weight"]
        if sender["kind"] != "subcomponent" or receiver["kind"] != "subcomponent":
            continue
        units = [units_of(double, {node["site"]: [node["subcomponent"]]}) for node in (sender, receiver)]
        change = direct_changes(double, PROMPT, {sender["site"]: torch.zeros(())}, *units, position=sender["position"])
        assert measured == pytest.approx(-float(change[0, 0, 0, receiver["position"]]), abs=1e-10)
        name, at = double[receiver["site"]].site.point_names()[0], (0, receiver["position"], receiver["subcomponent"])
        with torch.no_grad(), double.model.hooks(fwd_hooks=held_without(double, clean, sender)):
            _, held = double.model.run_with_cache(PROMPT, names_filter=name)
        assert measured == pytest.approx(float(clean[name][at] - held[name][at]), abs=1e-10)

        def ablate(acts: Tensor, hook: Any, node: dict[str, Any] = sender) -> Tensor:
            acts[0, node["position"], node["subcomponent"]] = 0
            return acts

        with torch.no_grad(), double.model.hooks(fwd_hooks=[(double[sender["site"]].site.point_names()[0], ablate)]):
            _, after = double.model.run_with_cache(PROMPT, names_filter=name)
        assert total == pytest.approx(float(clean[name][at] - after[name][at]), abs=1e-10)
        compared += 1
        bent += abs(measured - predicted) > 1e-3 * abs(measured)
    assert compared > 20
    assert bent  # through the MLP's non-linearity a prediction is an estimate
    assert check.n_strongest == 30
    strongest = sorted((abs(d["weight"]) for _, _, d in got.graph.edges(data=True)), reverse=True)[:30]
    assert sorted((abs(p) for p in check.predicted[:30]), reverse=True) == pytest.approx(strongest)


def made_check(predicted: tuple[float, ...], measured: tuple[float, ...], n_strongest: int = 2) -> AttributionCheck:
    n = len(predicted)
    return AttributionCheck(
        edges=(("a", "b"),) * n, predicted=predicted, measured=measured, total=(9.0,) * n, n_strongest=n_strongest,
        frozen="frozen: x",
    )  # fmt: skip


def test_the_numbers_of_a_check_are_the_textbook_ones() -> None:
    p, m = (1.0, -2.0, 0.5, 3.0), (1.1, -1.5, 0.4, 2.0)
    check = made_check(p, m)
    assert check.correlation == pytest.approx(np.corrcoef(p, m)[0, 1])
    assert check.slope == pytest.approx(np.linalg.lstsq(np.array(p)[:, None], np.array(m), rcond=None)[0][0])
    assert check.max_error == pytest.approx(1.0)
    assert check.relative_error == pytest.approx(0.5)
    assert (check.not_finite, check.same_sign) == (0, 1)
    assert made_check((1.0, -2.0, 0.0, 3.0), (1.1, 1.5, -4.0, 2.0)).same_sign == pytest.approx(2 / 3)
    assert math.isnan(made_check((1.0, 1.0), (1.0, 2.0)).correlation)
    broken = made_check((*p, 7.0), (*m, float("nan")))
    assert (broken.correlation, broken.slope, broken.max_error) == (check.correlation, check.slope, check.max_error)
    assert "1 of the ablations left no finite number" in str(broken)
    assert "4 edges ablated" in str(check)
    assert "+9" in str(check)


def test_deltas_and_embeddings_are_really_removed(double: Decomposition) -> None:
    """Removing the delta of `W_O` at a position: what `W_V` of the next block loses, by arithmetic in float64."""
    got = attribution_graph(double, PROMPT, readouts={"d": difference}, importance_above=None, n_checked=5000)
    found = {edge: i for i, edge in enumerate(got.check.edges)}
    assert len(found) == got.graph.number_of_edges()
    kinds = {got.graph.nodes[s]["kind"] for s, _ in found}
    assert kinds == {"subcomponent", "delta", "embedding"}
    for (s, r), i in found.items():
        if got.graph.nodes[s]["kind"] != "subcomponent" and "W_out" not in r:
            assert got.check.measured[i] == pytest.approx(got.check.predicted[i], abs=1e-9), (s, r)


@pytest.mark.parametrize("frozen", [Frozen(), Frozen(delta=False)], ids=str)
def test_a_later_block_alone_is_fed_by_the_residual_stream(frozen: Frozen) -> None:
    """What is not decomposed below bends no path: every edge but those through the MLP is its ablation."""
    decomposition = decompose(tiny_transformer(dtype=torch.float64), {"blocks.1.*.W_*": 4})
    got = attribution_graph(
        decomposition, PROMPT, readouts={"d": difference}, importance_above=None, n_checked=400, frozen=frozen
    )
    below = {data["label"] for _, data in got.graph.nodes(data=True) if data["kind"] == "embedding"}
    assert below == {"residual stream into blocks.1"}
    with torch.no_grad():
        _, cache = decomposition.model.run_with_cache(PROMPT)
    # A value reads the normalised stream: with a frozen scale, all of `a` is the stream and the norm's own bias.
    V = decomposition["blocks.1.attn.W_V"].V.detach()
    state = decomposition.model.state_dict()
    bias = next(value for key, value in state.items() if key in ("blocks.1.ln1.b", "blocks.1.ln1.bias"))
    name = "blocks.1.attn.W_V[2] @5"
    expected = float(cache["blocks.1.hook_W_V_acts"][0, 5, 2]) - float(bias @ V[:, 2])
    assert weight(got, "blocks.1 input @5", name) == pytest.approx(expected, abs=1e-9)
    compared = 0
    for (s, r), p, m in zip(got.check.edges, got.check.predicted, got.check.measured, strict=True):
        if "mlp.W_out" not in r and not (not frozen.delta and r.startswith("readout")):
            assert m == pytest.approx(p, abs=1e-9), (s, r)
            compared += s.startswith("blocks.1 input")
    assert compared > 5


# -- which nodes, and how ------------------------------------------------------------------------------------------


def test_nodes_are_important_and_the_rest_is_accounted_for(double: Decomposition) -> None:
    arguments: Any = {"readouts": {"s": lambda x: spread(x)[0]}, "max_nodes": 1000}
    importance = double.importance(PROMPT)
    middle = float(torch.cat([g.flatten() for g in importance.values()]).median())
    whole = attribution_graph(double, PROMPT, importance_above=None, **arguments)
    some = attribution_graph(double, PROMPT, importance_above=middle, **arguments)
    for name, data in whole.graph.nodes(data=True):
        if data["kind"] == "subcomponent":
            g = float(importance[data["site"]][0, data["position"], data["subcomponent"]])
            assert (name in some.graph) == (g > middle)
    assert 10 < some.graph.number_of_nodes() < whole.graph.number_of_nodes()
    checked = 0
    for name, data in some.graph.nodes(data=True):
        if data["kind"] in ("subcomponent", "readout"):
            missing = [d["weight"] for s, _, d in whole.graph.in_edges(name, data=True) if s not in some.graph]
            assert data["from_unshown"] == pytest.approx(sum(missing), abs=1e-10)
            checked += bool(missing)
            assert all(
                some.graph.edges[e]["weight"] == pytest.approx(whole.graph.edges[e]["weight"], abs=1e-12)
                for e in some.graph.in_edges(name)
            )
    assert checked > 10


@pytest.mark.parametrize("by_position", [False, True])
def test_a_circuits_graph_has_its_nodes_and_the_edges_of_the_whole_graph(
    double: Decomposition, by_position: bool
) -> None:
    n = PROMPT.shape[1]
    site, later = "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"
    kept = {name: torch.zeros(n if by_position else 1, 4, dtype=torch.bool) for name in (site, later)}
    kept[site][-1, 1] = kept[later][-1, [0, 2]] = True
    circuit = Circuit(kept, {name: k.double() for name, k in kept.items()})
    whole = attribution_graph(double, PROMPT, readouts={"s": spread}, importance_above=None)
    own = attribution_graph(double, PROMPT, readouts={"s": spread}, circuit=circuit)
    positions = [n - 1] if by_position else range(n)
    expected = {(s, c, t) for s, c in ((site, 1), (later, 0), (later, 2)) for t in positions}
    nodes = [data for _, data in own.graph.nodes(data=True) if data["kind"] == "subcomponent"]
    assert {(d["site"], d["subcomponent"], d["position"]) for d in nodes} == expected
    # Other subcomponents are held still whether they are shown or not.
    pairs = [(s, r) for s in own.graph for r in own.graph if whole.graph.has_edge(s, r)]
    assert len(pairs) > 5
    for s, r in pairs:
        assert weight(own, s, r) == pytest.approx(weight(whole, s, r), rel=1e-9)
    with pytest.raises(ValueError, match="nodes at 2 positions"):
        attribution_graph(double, PROMPT, circuit=Circuit({site: torch.ones(2, 4, dtype=torch.bool)}, {}))
    with pytest.raises(ValueError, match="it is of other sites"):
        attribution_graph(double, PROMPT, circuit=Circuit({site: torch.ones(1, 9, dtype=torch.bool)}, {}))


def test_the_largest_linearised_effects_are_kept(double: Decomposition) -> None:
    """Against gradients of the whole frozen pass by hand: one leaf per activation, nothing stopped."""
    metric = {"d": difference}
    got = attribution_graph(double, PROMPT, readouts=metric, importance_above=None, max_nodes=9)
    whole = attribution_graph(double, PROMPT, readouts=metric, importance_above=None, max_nodes=1000)
    leaves: dict[str, Tensor] = {}

    def leaf(acts: Tensor, hook: Any) -> Tensor:
        leaves[hook.name] = acts
        acts.retain_grad()
        return acts

    hooks = [(double[site].site.point_names()[0], leaf) for site in double]
    names = [n for n in double.model.hook_dict if n.endswith(("hook_pattern", "hook_scale"))]
    with (
        double.host.quiet_edits(),
        double.model.hooks(fwd_hooks=hooks + [(n, lambda x, hook: x.detach()) for n in names]),
    ):
        difference(double.model(PROMPT)).backward()
    scores = {}
    for site in double:
        acts = leaves[double[site].site.point_names()[0]]
        assert acts.grad is not None
        effect = (acts.grad * acts).detach().abs()[0]
        scores |= {f"{site}[{c}] @{t}": float(effect[t, c]) for t in range(6) for c in range(4)}
    double.model.zero_grad()
    expected = sorted(scores, key=lambda name: -scores[name])[:9]
    chosen = {n for n, d in got.graph.nodes(data=True) if d["kind"] == "subcomponent"}
    assert chosen == set(expected)
    n_whole = sum(d["kind"] == "subcomponent" for _, d in whole.graph.nodes(data=True))
    assert got.settings.left_out == n_whole - 9 > 10
    assert f"{n_whole - 9} important subcomponents left out" in str(got)


def test_readouts_are_centred_logits_of_the_likeliest_or_given_tokens(double: Decomposition) -> None:
    with torch.no_grad():
        logits = double.model(PROMPT)[0, 3]
    given = attribution_graph(double, PROMPT, readouts=[7, 2], position=3, importance_above=None)
    for i in (7, 2):
        node = given.graph.nodes[f"readout {i}"]
        assert node["activation"] == pytest.approx(float(logits[i] - logits.mean()), abs=1e-9)
        assert node["probability"] == pytest.approx(float(logits.softmax(-1)[i]), rel=1e-5)
        assert node["position"] == 3
    likeliest = attribution_graph(double, PROMPT, position=3, importance_above=None)
    found = [d["number"] for _, d in likeliest.graph.nodes(data=True) if d["kind"] == "readout"]
    assert found == logits.sort(descending=True).indices[: len(found)].tolist()
    shares = logits.softmax(-1).sort(descending=True).values.cumsum(0)
    assert len(found) == 10 or shares[len(found) - 1] >= 0.95 > shares[len(found) - 2]
    # Two centred logits and their difference.
    both = attribution_graph(double, PROMPT, readouts=[3, 5], importance_above=None)
    one = attribution_graph(double, PROMPT, readouts={"d": difference}, importance_above=None)
    name = "unembed.W_U[1] @5"
    assert weight(one, name, "readout -1") == pytest.approx(
        weight(both, name, "readout 3") - weight(both, name, "readout 5"), abs=1e-12
    )


@pytest.mark.parametrize("per_pass", [1, 7])
def test_receivers_together_equal_receivers_alone(double: Decomposition, per_pass: int) -> None:
    arguments: Any = {"readouts": {"d": difference}, "importance_above": None}
    alone = attribution_graph(double, PROMPT, per_pass=per_pass, **arguments)
    together = attribution_graph(double, PROMPT, **arguments)
    assert set(alone.graph.edges) == set(together.graph.edges)
    for s, t, data in alone.graph.edges(data=True):
        assert data["weight"] == pytest.approx(together.graph.edges[s, t]["weight"], abs=1e-12)


def test_the_model_is_left_as_it_was_also_after_an_error(double: Decomposition) -> None:
    with torch.no_grad():
        before = double.model(PROMPT)
        attribution_graph(double, PROMPT, importance_above=None, max_nodes=20)
    calls = []

    def breaks(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return difference(logits)

    with pytest.raises(KeyboardInterrupt):
        attribution_graph(double, PROMPT, readouts={"b": breaks}, importance_above=None, max_nodes=20)
    assert all(p.grad is None for p in double.model.parameters())
    assert not any(weight_.is_watched() for weight_ in double.values())
    assert not any(point._forward_hooks for name, point in double.model.hook_dict.items() if "hook_scale" in name)
    with torch.no_grad():
        assert torch.equal(double.model(PROMPT), before)


# -- data sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [None, "median"])
def test_a_data_set_graph_is_the_mean_of_prompt_graphs(double: Decomposition, above: str | None) -> None:
    data = tokens(3, seed=4, length=6)
    importance = double.importance(data)
    threshold = None if above is None else float(torch.cat([g.flatten() for g in importance.values()]).median())
    arguments: Any = {"importance_above": threshold, "max_nodes": 1000}
    got = dataset_graph(double, [data[:2], data[2:]], metric=spread, **arguments)
    signed: dict[tuple[str, str], float] = {}
    absolute: dict[tuple[str, str], float] = {}
    for row in data:
        one = attribution_graph(double, row[None], readouts={"s": lambda x: spread(x)[0]}, **arguments)
        sums: dict[tuple[str, str, int], float] = {}
        for s, r, d in one.graph.edges(data=True):
            sender, receiver = (n.split(" @")[0] for n in (s, r))
            key = (sender, "readout" if receiver.startswith("readout") else receiver, one.graph.nodes[s]["position"])
            sums[key] = sums.get(key, 0.0) + d["weight"]
        for (s, r, _), value in sums.items():
            signed[s, r] = signed.get((s, r), 0.0) + value / 18
            absolute[s, r] = absolute.get((s, r), 0.0) + abs(value) / 18
    assert set(got.graph.edges) == set(signed)
    for s, r, d in got.graph.edges(data=True):
        assert d["weight"] == pytest.approx(signed[s, r], abs=1e-10)
        assert d["absolute"] == pytest.approx(absolute[s, r], abs=1e-10)
    assert max(abs(d["weight"]) / d["absolute"] for _, _, d in got.graph.edges(data=True)) <= 1 + 1e-9
    assert min(abs(d["weight"]) / d["absolute"] for _, _, d in got.graph.edges(data=True)) < 0.5
    assert got.settings.n_positions == 18


def test_the_check_of_a_data_set_graph_removes_senders_at_single_positions(double: Decomposition) -> None:
    got = dataset_graph(double, [tokens(3, seed=4, length=6)], metric=spread, importance_above=None, n_checked=80)
    assert len(got.check.edges) == 80
    _assert_linear_edges_agree(got, tolerance=1e-9)


def test_masked_positions_do_not_count(double: Decomposition) -> None:
    data = tokens(2, seed=4, length=6)
    mask = torch.ones_like(data, dtype=torch.bool)
    mask[:, :2] = False
    got = dataset_graph(double, [Batch(data, position_mask=mask)], importance_above=None, n_checked=4)
    assert got.settings.n_positions == 8
    # From a position on, under causal attention, to itself and later ones: the sum of a single row by hand.
    one = attribution_graph(double, data[:1], readouts={"s": lambda x: spread(x)[0]}, importance_above=None)
    two = attribution_graph(double, data[1:], readouts={"s": lambda x: spread(x)[0]}, importance_above=None)
    s, r = "blocks.0.mlp.W_out[1]", "blocks.1.mlp.W_in[2]"
    total = sum(weight(g, f"{s} @{t}", f"{r} @{t}") for g in (one, two) for t in range(2, 6))
    assert got.graph.edges[s, r]["weight"] == pytest.approx(total / 8, abs=1e-10)
    # A delta reaches later positions through frozen attention: masked positions do not count as senders either.
    s, r = "blocks.0.attn.W_V[delta]", "blocks.0.attn.W_O[1]"
    pairs = [(t, u) for t in range(6) for u in range(t, 6)]
    each = {(t, u): sum(weight(g, f"{s} @{t}", f"{r} @{u}") for g in (one, two)) for t, u in pairs}
    total = sum(value for (t, _), value in each.items() if t >= 2)
    assert got.graph.edges[s, r]["weight"] == pytest.approx(total / 8, abs=1e-10)
    assert abs(sum(value for (t, u), value in each.items() if t < 2 <= u)) > 1e-3


# -- pruning -------------------------------------------------------------------------------------------------------


def random_dag(n: int, seed: int) -> np.ndarray:
    """`[receiver sender]`, edges from lower to higher numbers."""
    random = np.random.default_rng(seed)
    return np.tril(random.normal(size=(n, n)) * (random.random((n, n)) < 0.5), -1)


def test_influence_is_the_sum_over_all_paths() -> None:
    weights = random_dag(7, seed=0)
    readout_weights = np.array([0, 0, 0, 0, 0, 0.3, 0.7])
    expected = np.zeros(7)
    shares = np.abs(weights) / np.maximum(np.abs(weights).sum(1, keepdims=True), 1e-300)
    for length in range(2, 8):
        for path in itertools.combinations(range(7), length):
            product = np.prod([shares[b, a] for a, b in itertools.pairwise(path)])
            expected[path[0]] += readout_weights[path[-1]] * product
    np.testing.assert_allclose(influences(weights, readout_weights), expected, atol=1e-14)
    with pytest.raises(ValueError, match="has a cycle"):
        influences(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0.0, 1.0]))


@pytest.mark.parametrize("seed", range(5))
def test_pruning_keeps_the_smallest_sets_that_have_the_shares(seed: int) -> None:
    n, weights = 12, random_dag(12, seed)
    readout_weights = np.zeros(n)
    readout_weights[-2:] = 0.5
    always = np.zeros(n, dtype=bool)
    always[:2] = always[-2:] = True
    needs_input = ~always
    got = prune(
        weights, readout_weights, always_kept=always, needs_input=needs_input, node_threshold=0.7, edge_threshold=0.8
    )
    # The same by plain loops.
    influence = influences(weights, readout_weights)
    kept, total = set(np.flatnonzero(always)), 0.0
    for i in sorted(range(n), key=lambda i: -influence[i]):
        if total < 0.7 * influence.sum():
            kept.add(i)
            total += influence[i]
    left = np.array([[weights[t, s] if {s, t} <= kept else 0.0 for s in range(n)] for t in range(n)])
    inside = influences(left, readout_weights)
    scores = {}
    for t in range(n):
        for s in range(n):
            if left[t, s]:
                scores[t, s] = abs(left[t, s]) / np.abs(left[t]).sum() * (inside[t] + readout_weights[t])
    edges, total = set(), 0.0
    for edge in sorted(scores, key=lambda e: -scores[e]):
        if total < 0.8 * sum(scores.values()):
            edges.add(edge)
            total += scores[edge]
    while True:
        gone = {
            i for i in kept if not always[i] and not (any(s == i for _, s in edges) and any(t == i for t, _ in edges))
        }
        if not gone:
            break
        kept -= gone
        edges = {(t, s) for t, s in edges if not {s, t} & gone}
    assert set(np.flatnonzero(got.nodes)) == kept
    assert {(int(t), int(s)) for t, s in np.argwhere(got.edges)} == edges
    assert 0 < len(edges) < np.count_nonzero(weights)
    order = sorted(range(n), key=lambda i: -influence[i])
    np.testing.assert_allclose(got.cumulative[order], np.cumsum(influence[order]) / influence.sum())


def test_a_pruned_graph_accounts_for_what_it_drops(double: Decomposition) -> None:
    whole = attribution_graph(double, PROMPT, readouts={"d": difference}, importance_above=None)
    pruned = whole.prune(0.6, 0.9)
    assert 0 < pruned.graph.number_of_edges() < whole.graph.number_of_edges()
    assert set(pruned.graph.edges) < set(whole.graph.edges)
    assert pruned.check is whole.check
    for name, data in pruned.graph.nodes(data=True):
        if data["kind"] in ("subcomponent", "readout"):
            before = [whole.graph.edges[e]["weight"] for e in whole.graph.in_edges(name)
                      if whole.graph.nodes[e[0]]["kind"] == "subcomponent"]  # fmt: skip
            after = [pruned.graph.edges[e]["weight"] for e in pruned.graph.in_edges(name)
                     if pruned.graph.nodes[e[0]]["kind"] == "subcomponent"]  # fmt: skip
            assert sum(after) + data["from_unshown"] == pytest.approx(
                sum(before) + whole.graph.nodes[name]["from_unshown"], abs=1e-10
            )
    everything = whole.prune(1.0, 1.0)
    influence = whole.influence()
    assert all(influence[n] == 0 for n in set(whole.graph.nodes) - set(everything.graph.nodes))
    assert {n for n, d in whole.graph.nodes(data=True) if d["kind"] == "embedding"} <= set(pruned.graph.nodes)


def test_a_data_set_graph_says_nothing_of_what_it_has_not_measured(double: Decomposition) -> None:
    whole = dataset_graph(double, [tokens(2, length=6)], metric=spread, importance_above=None, n_checked=2)
    pruned = whole.prune(0.6, 0.9)
    assert pruned.graph.number_of_edges() < whole.graph.number_of_edges()
    assert {data["from_unshown"] for _, data in pruned.graph.nodes(data=True)} == {None}


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": tokens(2)}, r"shape \(2, 12\).*expected one prompt of token ids, \[1 pos\]"),
        ({"tokens": PROMPT + 40}, "token ids run from"),
        ({"readouts": [3, 99]}, r"readouts=\[3, 99\]; expected different token ids in 0..39"),
        ({"readouts": [3, 3]}, "expected different token ids"),
        ({"readouts": []}, "at least one"),
        ({"readouts": {}}, "readouts is empty"),
        ({"readouts": {"all": lambda logits: logits}}, "the readout 'all' returned .* expected one number"),
        ({"readouts": {"d": lambda logits: difference(logits).detach()}}, "the readout 'd' gives no gradient"),
        ({"position": 6}, r"positions \[6\]: expected some of 0..5"),
        ({"n_checked": 0}, "n_checked=0; expected at least 1"),
        ({"max_nodes": 0}, "max_nodes=0; expected at least 1"),
        ({"per_pass": 0}, "per_pass=0; expected at least 1"),
        ({"importance_above": 1.0}, "no subcomponent that may be a node"),
    ],
)
def test_mistakes_are_named(
    double: Decomposition, without_type_checks: None, change: dict[str, Any], text: str
) -> None:
    arguments: dict[str, Any] = {"tokens": PROMPT, "importance_above": None, **change}
    with pytest.raises(ValueError, match=text):
        attribution_graph(double, **arguments)


@needs_hooked
def test_attributions_that_are_no_numbers_are_an_error_and_not_left_out(double: Decomposition) -> None:
    def breaks(logits: Tensor) -> Tensor:
        # The value is 0; its gradient by two logits is infinite.
        return (logits[0, -1, :2] - logits[0, -1, :2].detach()).clamp_min(0).sqrt().sum()

    with pytest.raises(ValueError, match="on the readouts are NaN or infinite"):
        attribution_graph(double, PROMPT, readouts={"b": breaks}, importance_above=None)
    with pytest.raises(ValueError, match=r"\d+ of \d+ attributions are NaN or infinite"):
        dataset_graph(double, [PROMPT], metric=lambda x: breaks(x)[None], importance_above=None)


@needs_hooked
def test_inputs_split_by_head_are_refused() -> None:
    decomposition = decompose(oracle.CASES["split_qkv"].build(), {"blocks.*.attn.W_V": 4})
    with pytest.raises(ValueError, match="has one input per head, and an attribution graph needs one per position"):
        attribution_graph(decomposition, oracle.tokens_for(decomposition.model, batch=1), importance_above=None)


def test_mistakes_with_data_sets_are_named(double: Decomposition, without_type_checks: None) -> None:
    data = [tokens(2, length=6)]
    for arguments, text in (
        ({"batches": []}, "the data is empty"),
        ({"batches": [torch.rand(2, 6, 16)]}, "expected an integer tensor"),
        ({"batches": data, "importance_above": 1.0}, "no subcomponent is important anywhere"),
        (
            {"batches": data, "metric": lambda logits: logits},
            r"the metric returned .*expected one number per row, \[2\]",
        ),
        ({"batches": data, "n_checked": 0}, "n_checked=0"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            dataset_graph(double, **{"importance_above": None, **arguments})
    with pytest.raises(ValueError, match="this graph has no readout"):
        dataset_graph(double, data, importance_above=None, n_checked=2).prune()
    graph = attribution_graph(double, PROMPT, importance_above=None, n_checked=2)
    with pytest.raises(ValueError, match=r"node_threshold=2; expected a number at least 0 and at most 1"):
        graph.prune(node_threshold=2)


# -- models with a tokenizer, and in half precision ----------------------------------------------------------------


def test_readouts_may_be_tokens_as_text(without_type_checks: None) -> None:
    from spd_lens.models import load_tiny_lm

    model = load_tiny_lm()
    decomposition = decompose(model, {"blocks.1.mlp.W_*": 4})
    prompt = model.to_tokens("Call me")
    (number,) = model.tokenizer(" whale", add_special_tokens=False)["input_ids"]
    settings: Any = {"importance_above": None, "n_checked": 1}
    for given in (" whale", number, np.array([number]), [" whale"], [np.int64(number)]):
        made = attribution_graph(decomposition, prompt, readouts=given, **settings)
        (name,) = [n for n, data in made.graph.nodes(data=True) if data["kind"] == "readout"]
        assert (name, made.graph.nodes[name]["label"]) == (f"readout {number}", "logit of ' whale'")
    with pytest.raises(ValueError, match=r"the readout 'Ishmael' is \d tokens for this model, \['I', .* with a space"):
        attribution_graph(decomposition, prompt, readouts="Ishmael", **settings)
    with pytest.raises(TypeError, match="a token id, or a token as text"):
        attribution_graph(decomposition, prompt, readouts=[1.5], **settings)
    small = decompose(tiny_transformer(), {"blocks.1.mlp.W_*": 4})
    small.model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer; give the token's id"):
        attribution_graph(small, PROMPT, readouts=" whale", **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_graphs_of_models_in_half_precision_agree_as_well(dtype: torch.dtype, when: str) -> None:
    sites = {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_[VO]": 4}
    settings: Any = {"readouts": [3], "importance_above": None, "n_checked": 60}
    whole = attribution_graph(decompose(tiny_transformer(), sites), PROMPT, **settings)
    model = tiny_transformer()
    model = model.to(dtype) if when == "before" else model
    decomposition = decompose(model, sites)
    if when == "after":
        decomposition.to(dtype)
    half = attribution_graph(decomposition, PROMPT, **settings)
    assert half.check.not_finite == 0
    assert half.check.correlation == pytest.approx(whole.check.correlation, abs=0.1)
    assert half.graph.number_of_edges() < whole.graph.number_of_edges()  # rounding is coarser, and is no edge

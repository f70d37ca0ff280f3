"""Pruning of an attribution graph by cumulative influence on its readouts, the definition of circuit-tracer.

With `A[t, s] = |weight of s -> t|`, every row divided by its sum (`N`, rows of 0 stay 0), and `w` the weights of
readouts:

    influence(s)   = sum over k >= 1 of (w N^k)[s]                      indirect paths included, signs ignored
    influence(s,t) = N[t, s] * (influence(t) + w[t])                    of an edge, in the graph of the kept nodes

Nodes are kept from the largest influence down until their sum reaches `node_threshold` of the total (ties are kept);
embeddings and readouts always are. Then edges likewise with `edge_threshold`. Last, whatever was left without an
outgoing edge goes (readouts and embeddings stay), and subcomponents without an incoming one, until nothing changes.

The sum over k ends, because a graph of direct effects has no cycle. Plain arrays; cost `nodes^2` times the longest
path.
Source of the definition: github.com/safety-research/circuit-tracer, and Ameisen et al. 2025, "Circuit Tracing".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from spd_lens.support.given import given_number


@dataclass(frozen=True)
class Pruned:
    """What is kept, and for every node the share of all influence that it and the more influential ones have."""

    nodes: Bool[np.ndarray, " node"]
    edges: Bool[np.ndarray, "receiver sender"]
    cumulative: Float[np.ndarray, " node"]


def influences(
    weights: Float[np.ndarray, "receiver sender"], readout_weights: Float[np.ndarray, " node"]
) -> Float[np.ndarray, " node"]:
    """`influence(s)` of every node; 0 for nodes from which no readout is reached.

    Raises ValueError if the graph has a cycle.
    """
    normalised = _rows_to_one(weights)
    current, total = readout_weights @ normalised, np.zeros(len(weights))
    for _ in range(len(weights) + 1):
        if not current.any():
            return total
        total = total + current
        current = current @ normalised
    raise ValueError("the graph has a cycle, so influence does not end; a graph of direct effects has none")


def edge_influences(
    weights: Float[np.ndarray, "receiver sender"], readout_weights: Float[np.ndarray, " node"]
) -> Float[np.ndarray, "receiver sender"]:
    """`influence(s, t)` of every edge."""
    return _rows_to_one(weights) * (influences(weights, readout_weights) + readout_weights)[:, None]


def prune(
    weights: Float[np.ndarray, "receiver sender"],
    readout_weights: Float[np.ndarray, " node"],
    *,
    always_kept: Bool[np.ndarray, " node"],
    needs_input: Bool[np.ndarray, " node"],
    node_threshold: float,
    edge_threshold: float,
) -> Pruned:
    """Keep what has `node_threshold` of all influence, then the edges that have `edge_threshold` of what is left."""
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        given_number(name, value, least=0, most=1)
    influence = influences(weights, readout_weights)
    nodes = _largest(influence, node_threshold) | always_kept
    left = np.where(nodes[:, None] & nodes[None, :], weights, 0.0)
    scores = edge_influences(left, readout_weights)
    edges = _largest(scores.ravel(), edge_threshold).reshape(scores.shape)
    while True:
        kept = nodes & (always_kept | edges.any(0)) & (~needs_input | always_kept | edges.any(1))
        if bool((kept == nodes).all()):
            return Pruned(nodes, edges, cumulative_shares(influence))
        nodes = kept
        edges = edges & nodes[:, None] & nodes[None, :]


def _rows_to_one(weights: np.ndarray) -> np.ndarray:
    size = np.abs(weights.astype(np.float64))
    sums = size.sum(1, keepdims=True)
    return np.divide(size, sums, out=np.zeros_like(size), where=sums > 0)


def _largest(scores: np.ndarray, share: float) -> np.ndarray:
    """The largest scores whose sum reaches `share` of all; never a score of 0."""
    ordered = np.sort(scores)[::-1]
    sums = np.cumsum(ordered)
    if len(sums) == 0 or sums[-1] <= 0:
        return np.zeros(len(scores), dtype=bool)
    # Rounding may leave the last sums a hair under 1.
    index = min(int(np.searchsorted(sums / sums[-1], share)), len(sums) - 1)
    return (scores >= ordered[index]) & (scores > 0)


def cumulative_shares(scores: np.ndarray) -> np.ndarray:
    """For every score the share of all that it and the larger ones have."""
    order = np.argsort(-scores, kind="stable")
    shares = np.empty(len(scores))
    shares[order] = np.cumsum(scores[order]) / max(float(scores.sum()), np.finfo(float).tiny)
    return shares

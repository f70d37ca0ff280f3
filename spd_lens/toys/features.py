"""Sparse features: what the toy models are trained on, and the one-hot inputs on which importance is read.

Every feature is active independently of the others with a fixed probability, with a value from a uniform
distribution; otherwise it is 0. Batch number i depends on the seed and on i alone, so that a resumed run finds its
place at no cost. Only active entries are drawn: 0.15 ms for 4096 x 40 at probability 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.support.given import given_number, given_whole

# How many standard deviations more gaps than expected are drawn at first.
SPARE_DEVIATIONS = 6.0


class SparseFeatures:
    """Endless batches `x [batch features]` on the CPU, the same for the same arguments.

    `x[k, f] ~ U[low, high]` with probability `probability`, else 0, independently for all k and f.
    """

    def __init__(
        self,
        n_features: int,
        batch_size: int,
        *,
        probability: float,
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
    ) -> None:
        for what, count in (("n_features", n_features), ("batch_size", batch_size)):
            given_whole(what, count, least=1)
        given_number("probability", probability, above=0, most=1)
        if not given_number("low", low) < given_number("high", high):
            raise ValueError(f"values between low={low} and high={high}; expected low < high")
        given_whole("seed", seed, least=0)
        self.n_features, self.batch_size, self.seed = n_features, batch_size, seed
        self.probability, self.low, self.high = probability, low, high

    def __repr__(self) -> str:
        drawn = f"{self.n_features} features, probability {self.probability:g}, U({self.low:g}, {self.high:g})"
        return f"{type(self).__name__}({drawn}, batches of {self.batch_size}, seed {self.seed})"

    def __iter__(self) -> Iterator[Float[Tensor, "batch features"]]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[Float[Tensor, "batch features"]]:
        """The batches from number `start` on, without end."""
        index = start
        while True:
            yield self.batch(index)
            index += 1

    def batch(self, index: int) -> Float[Tensor, "batch features"]:
        """Batch number `index`."""
        x = np.zeros((self.batch_size, self.n_features), dtype=np.float32)
        self.write_batch(index, x.reshape(-1))
        return torch.from_numpy(x)

    def write_batch(self, index: int, x: np.ndarray) -> None:
        """Write the active entries of batch number `index` into `x [(batch features)]`, which holds zeros."""
        # A counter-based generator: the pair (seed, index) is its key, so batches are independent streams.
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        where = self._active(len(x), generator)
        values = generator.random(len(where), dtype=np.float32)
        x[where] = self.low + (self.high - self.low) * values

    def _active(self, n: int, generator: np.random.Generator) -> np.ndarray:
        """Which of n entries are active: the gaps between successes of a Bernoulli process are geometric."""
        expected = n * self.probability
        count = max(0, int(expected + SPARE_DEVIATIONS * expected**0.5)) + 8
        where = generator.geometric(self.probability, count).cumsum() - 1
        while where[-1] < n:  # one time in a billion
            where = np.concatenate([where, where[-1] + generator.geometric(self.probability, count).cumsum()])
        return where[: np.searchsorted(where, n)]


class ActiveRows(SparseFeatures):
    """Sparse features without the rows in which none is on: `batch_size` rows that have at least one.

    On an all-zero row every activation is 0, so reconstruction is exact under all masks and nothing is learned but that
    a gate should be 0 at 0, which the other rows teach as well. With 5 features at probability 0.05 they are 77 % of
    all rows: 256 active rows tell as much as 1,131 of the paper's.
    """

    def batch(self, index: int) -> Float[Tensor, "batch features"]:
        """Batch number `index`."""
        share = 1 - (1 - self.probability) ** self.n_features
        draw = int(1.3 * self.batch_size / share) + 200
        features = SparseFeatures(
            self.n_features, draw, probability=self.probability, low=self.low, high=self.high, seed=self.seed
        )
        x = features.batch(index)
        x = x[x.any(dim=1)][: self.batch_size]
        assert len(x) == self.batch_size, "seven standard deviations below the expected number of active rows"
        return x


def tms_features(n_features: int, batch_size: int, *, seed: int = 0) -> SparseFeatures:
    """The data of TMS: active with probability 0.05, `U[0, 1]`."""
    return SparseFeatures(n_features, batch_size, probability=0.05, seed=seed)


def resid_mlp_features(n_features: int, batch_size: int, *, seed: int = 0) -> SparseFeatures:
    """The data of the residual MLPs: active with probability 0.01, `U[-1, 1]`."""
    return SparseFeatures(n_features, batch_size, probability=0.01, low=-1.0, high=1.0, seed=seed)


def one_hot_inputs(n_features: int, value: float = 0.75) -> Float[Tensor, "input features"]:
    """Row i has feature i at `value` and nothing else; 0.75 is the paper's."""
    return value * torch.eye(n_features)

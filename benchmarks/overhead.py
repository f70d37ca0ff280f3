"""What a swap that nobody watches costs: `python benchmarks/overhead.py` prints one JSON object.

Two copies of a random HookedTransformer of 4 blocks, one with all 27 weights decomposed, run in turns on the same
tokens on one thread; ratios are of paired runs, medians over rounds. `added_ms` comes from a model so small that the
clock is sure (the cost does not depend on sizes); `ratio` from one whose forward takes at least 50 ms, the smallest of
three medians, because other load on the machine only adds.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
import warnings
from typing import Any

import torch

from spd_lens import decompose
from spd_lens.support import library_versions


def paired_times(rounds: int, batch: int, pos: int, **sizes: Any) -> tuple[list[float], list[float]]:
    """CPU seconds of the plain and the swapped model's forward, alternating which goes first."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(n_layers=4, n_ctx=128, act_fn="gelu", normalization_type="LN", seed=0, **sizes)
    plain = HookedTransformer(cfg)
    swapped = decompose(copy.deepcopy(plain), {"*": 8}).model
    tokens = torch.randint(0, cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(0))
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        assert torch.equal(plain(tokens), swapped(tokens))
        for i in range(rounds):
            for which in (0, 1) if i % 2 else (1, 0):
                started = time.process_time()
                (plain, swapped)[which](tokens)
                times[which].append(time.process_time() - started)
    return times


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    short = paired_times(300, 1, 4, d_model=16, d_head=4, d_mlp=32, d_vocab=30)
    large = [paired_times(20, 8, 128, d_model=256, d_head=64, d_mlp=1024, d_vocab=1000) for _ in range(3)]
    result = {
        "added_ms": 1e3 * statistics.median(b - a for a, b in zip(*short, strict=True)),
        "forward_ms": 1e3 * min(statistics.median(times[0]) for times in large),
        "ratio": min(statistics.median(b / a for a, b in zip(*times, strict=True)) for times in large),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": library_versions(),
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()

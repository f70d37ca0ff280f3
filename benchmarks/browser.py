"""Size, memory and time of harvests and their browser: `python -m benchmarks.browser [--json FILE]`.

Three parts. (1) Memory of a harvest of 10,000 subcomponents, streamed over synthetic importances on a part of 10
million tokens, and what it can grow to at most. (2) The list and the pages of a synthetic harvest of 10,000
subcomponents, and, with Chromium, the time until the list stands. (3) The same for the shipped decomposition of the
tiny language model.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from spd_lens.statistics import Harvest, HarvestSettings, HarvestSums, MadeFrom, SiteDirections, positions_of
from spd_lens.support import library_versions, tqdm, write_json

BATCH, CONTEXT = 8, 64


def zipf_tokens(n_rows: int, d_vocab: int, generator: torch.Generator) -> Tensor:
    """Rows of tokens whose frequencies fall as one over their rank."""
    weights = 1 / torch.arange(1, d_vocab + 1, dtype=torch.float64)
    return torch.multinomial(weights, n_rows * CONTEXT, replacement=True, generator=generator).view(n_rows, CONTEXT)


def add_synthetic(sums: HarvestSums, n_batches: int, l0: float, generator: torch.Generator) -> None:
    """Batches in which each subcomponent fires on tokens of its own and at random, `l0` at a position on average."""
    (site, C), d_vocab = next(iter(sums.counts.items())), sums.d_vocab
    own = torch.randint(0, d_vocab, (C,), generator=generator)
    for _ in tqdm(range(n_batches), desc="synthetic batches", leave=False):
        tokens = zipf_tokens(BATCH, d_vocab, generator)
        shape = (BATCH, CONTEXT, C)
        fires = (torch.rand(shape, generator=generator) < l0 / C) | (tokens[..., None] == own)
        g = torch.where(fires, 0.2 + 0.8 * torch.rand(shape, generator=generator), 0.0)
        a = torch.randn(shape, generator=generator)
        predicted = tokens.roll(-1, 1)
        sums.add({site: g}, {site: a}, positions_of(tokens, predicted, None, sums.settings))
        sums.note_read(tokens)


def synthetic_harvest(n_subcomponents: int, d_vocab: int, seed: int, n_batches: int = 2, l0: float = 100) -> Harvest:
    """A harvest of one site `W`, of random importances; its directions are random too."""
    generator = torch.Generator().manual_seed(seed)
    sums = HarvestSums({"W": n_subcomponents}, d_vocab, HarvestSettings())
    add_synthetic(sums, n_batches, l0, generator)
    ids = torch.randint(0, n_subcomponents, (n_subcomponents, 8), generator=generator).int()
    logits = torch.randint(0, d_vocab, (n_subcomponents, 10), generator=generator).int()
    values = torch.randn(n_subcomponents, 10, generator=generator).abs()
    directions = SiteDirections(
        torch.rand(n_subcomponents), ids, torch.rand(n_subcomponents, 8), logits, values, logits, -values
    )
    strings = {i: f" w{i}" for i in range(d_vocab)}
    return Harvest(sums, MadeFrom({"model": "synthetic"}, "0" * 64), {"W": directions}, strings)


def peak_megabytes() -> float:
    """The most memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured_pages(found: Harvest, folder: Path) -> dict[str, Any]:
    """Sizes of the pages, the time to write them, and until Chromium shows the list."""
    started, busy = time.perf_counter(), time.process_time()
    index = found.to_html(folder)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - busy
    sizes = [path.stat().st_size for path in folder.glob("s*/*.html")]
    return {
        "subcomponents": sum(len(site) for site in found.values()),
        "pages": len(sizes),
        "seconds_to_write": round(seconds, 1),
        "cpu_seconds_to_write": round(cpu_seconds, 1),
        "largest_page_bytes": max(sizes, default=0),
        "mean_page_bytes": round(sum(sizes) / max(1, len(sizes))),
        "list_bytes": index.stat().st_size,
        "all_megabytes": round((sum(sizes) + index.stat().st_size) / 2**20, 1),
        "seconds_until_the_list_stands": list_seconds(index),
    }


def list_seconds(index: Path) -> float | None:
    """From the request to the first rows, in a warm Chromium, the median of five; None without Chromium."""
    if shutil.which("chromium") is None:
        return None
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.chromium import chromium

    times = []
    profile = Path(tempfile.mkdtemp())
    with chromium(profile) as browser:
        for _ in range(5):
            browser.open("about:blank")
            started = time.perf_counter()
            browser.open(index)
            assert browser.do("document.querySelectorAll('.row').length") > 0
            times.append(time.perf_counter() - started)
    shutil.rmtree(profile, ignore_errors=True)
    return round(sorted(times)[2], 3)


def measured_memory(n_subcomponents: int, d_vocab: int, n_batches: int, l0: float) -> dict[str, Any]:
    """Memory of the sums after a part of the data, and the most that they can come to."""
    sums = HarvestSums({"W": n_subcomponents}, d_vocab, HarvestSettings())
    generator = torch.Generator().manual_seed(0)
    part, sizes, started = max(1, n_batches // 4), [], time.process_time()
    for _ in range(4):
        add_synthetic(sums, part, l0, generator)
        sizes.append(round(sums.bytes() / 2**20, 1))
    seconds = time.process_time() - started
    fixed = sum(t.numel() * t.element_size() for name, t in sums.tensors().items() if not _is_table(name))
    full_tables = 2 * n_subcomponents * sums.settings.tokens_kept * 16
    return {
        "subcomponents": n_subcomponents,
        "d_vocab": d_vocab,
        "fires_per_position": l0,
        "tokens_measured": 4 * part * BATCH * CONTEXT,
        "megabytes_after_each_quarter": sizes,
        "megabytes_at_most": round((fixed + full_tables) / 2**20, 1),
        "process_peak_megabytes": round(peak_megabytes()),
        "tokens_per_cpu_second": round(4 * part * BATCH * CONTEXT / seconds),
    }


def measured_tiny_lm(folder: Path, n_rows: int, effect_rows: int) -> dict[str, Any]:
    """A harvest of the shipped decomposition over held-out text, with the effect of every subcomponent; its pages."""
    from spd_lens import harvest, pack_tokens
    from spd_lens.models import load_moby_dick, load_tiny_lm

    decomposition = load_tiny_lm(decomposed=True)
    tokenizer = decomposition.model.tokenizer
    tokens = pack_tokens([load_moby_dick("held_out")], tokenizer, context=CONTEXT, prepend_bos=True, max_rows=n_rows)
    started, busy = time.perf_counter(), time.process_time()
    batches = [tokens[:effect_rows], *tokens[effect_rows:].split(BATCH)] if effect_rows else list(tokens.split(BATCH))
    found = harvest(decomposition, batches, max_batches=None, effect_batches=int(effect_rows > 0))
    effects = [site.effect for site in found.values() if site.effect is not None]
    effect = torch.cat(effects) if effects else torch.zeros(1)
    fires = torch.cat([site.fired for site in found.values()]) > 0
    measured = {
        "effect_positions": found.sums.effect_positions,
        "effect_nats_largest": round(float(effect.max()), 4),
        "effect_nats_median_where_it_fires": float(f"{float(effect[fires].median()):.2g}"),
        "share_of_effect_of_the_100_largest": round(float(effect.topk(100).values.sum() / effect.sum()), 3),
    }
    return {
        "tokens": found.n_positions,
        **(measured if effects else {}),
        "fires_per_position": round(sum(float(site.firing_rate.sum()) for site in found.values()), 1),
        "harvest_seconds": round(time.perf_counter() - started, 1),
        "harvest_cpu_seconds": round(time.process_time() - busy, 1),
        "harvest_megabytes": round(found.sums.bytes() / 2**20, 1),
        **measured_pages(found, folder),
    }


def _is_table(name: str) -> bool:
    return name.endswith(("inputs.keys", "inputs.counts", "predicted.keys", "predicted.counts"))


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the numbers")] = None,
    batches: Annotated[int, typer.Option(help="batches of 512 tokens that memory is measured on")] = 200,
    subcomponents: Annotated[int, typer.Option()] = 10_000,
    rows: Annotated[int, typer.Option(help="rows of 64 tokens that the tiny language model is harvested on")] = 96,
    effect_rows: Annotated[int, typer.Option(help="rows that every subcomponent is ablated on")] = 2,
    only_tiny_lm: Annotated[bool, typer.Option("--only-tiny-lm", help="the language model's part alone")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    # Wall time says little on a machine that is busy with other things.
    load = os.getloadavg()[0]
    found: dict[str, Any] = {"versions": library_versions(), "cores": os.cpu_count(), "load_at_start": round(load, 1)}
    with tempfile.TemporaryDirectory() as folder:
        if not only_tiny_lm:
            found["memory"] = measured_memory(subcomponents, 50_257, batches, l0=100)
            synthetic = synthetic_harvest(subcomponents, 50_257, seed=0, n_batches=8)
            found["synthetic"] = measured_pages(synthetic, Path(folder) / "synthetic")
        found["tiny_lm"] = measured_tiny_lm(Path(folder) / "tiny_lm", rows, effect_rows)
    print(json.dumps(found, indent=1))
    if json_file is not None:
        # What was not measured now stays as it was, with its own versions.
        kept = json.loads(json_file.read_text(encoding="utf-8")) if only_tiny_lm and json_file.exists() else {}
        write_json(json_file, {**kept, **found})


if __name__ == "__main__":
    typer.run(main)

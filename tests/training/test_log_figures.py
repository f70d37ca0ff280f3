"""Figures for loggers show what the importances are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spd_lens import decompose, train
from spd_lens.training import FigureLogger, importance_figures, wandb_logger
from tests.small_models import tiny_transformer, tokens


def test_the_figures_show_the_importances_of_the_positions_that_count() -> None:
    g = torch.zeros(2, 3, 4)
    g[..., 0] = 1.0
    g[0, :, 1] = 0.5
    g[1, 2] = 0.9
    counts = torch.ones(2, 3, dtype=torch.bool)
    counts[1, 2] = False
    figures = importance_figures({"a": g, "b": torch.zeros(2, 3, 2)}, counts)
    assert list(figures) == ["importance/histogram", "importance/density", "importance/L0"]
    bars = {text.get_text(): bar.get_width() for text, bar in _bars(figures["importance/L0"])}
    assert bars == {"a": pytest.approx(1.6), "b": 0.0}
    (a, b) = figures["importance/density"].axes[0].get_lines()
    assert a.get_ydata() == pytest.approx([1.0, 0.6])
    assert len(b.get_ydata()) == 0
    heights = figures["importance/histogram"].axes[0].patches[0].get_data().values
    assert heights[0] == 5 * 2 + 2
    assert heights[20] == 3
    assert heights[-1] == 5
    assert np.sum(heights) == 20


def _bars(figure: Any) -> Any:
    axes = figure.axes[0]
    return zip(axes.get_yticklabels(), axes.patches, strict=True)


def test_a_logger_gets_figures_when_it_wants_them_and_the_run_is_the_same(tmp_path: Path) -> None:
    got: list[tuple[int, str]] = []
    logger = FigureLogger(lambda step, values: None, lambda step, name, figure: got.append((step, name)), 2)
    runs = []
    for name, loggers in (("with", [logger]), ("without", [])):
        decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0)
        train(decomposition, [tokens(4)], steps=5, out_dir=tmp_path / name, loggers=loggers)
        runs.append(decomposition.tensors())
    assert sorted({step for step, _ in got}) == [0, 2, 4]
    assert len(got) == 9
    assert all(torch.equal(runs[1][name], tensor) for name, tensor in runs[0].items())
    with pytest.raises(ValueError, match="figures_every=0"):
        FigureLogger(logger.write, logger.figure, 0)


@pytest.mark.slow  # W&B starts a process of its own
def test_wandb_writes_an_offline_run_with_scalars_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = wandb_logger(mode="offline", dir=str(tmp_path), project="spd", figures_every=2, settings={"silent": True})
    decomposition = decompose(tiny_transformer(), {"blocks.0.mlp.W_in": 6}, seed=0)
    train(decomposition, [tokens(4)], steps=3, log_every=1, out_dir=tmp_path / "run", loggers=[logger])
    import wandb

    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    content = next(folder.glob("*.wandb")).read_bytes()
    assert b"faithfulness" in content
    assert len(list((folder / "files" / "media" / "images" / "importance").glob("*.png"))) == 6

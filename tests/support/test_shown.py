"""Whatever an object holds, a terminal gets one line and a notebook a small, escaped page."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch

import spd_lens
from spd_lens import decompose
from spd_lens.baselines import APD, APDConfig
from spd_lens.core import SiteMask
from spd_lens.data import Batch
from spd_lens.evaluation import WorstCase
from spd_lens.tasks import Task
from spd_lens.toys import TMS, tms_report
from spd_lens.training import ManyResult, TrainConfig, make_learner

BIG = torch.rand(300, 40)


def decomposed() -> Any:
    return decompose(TMS(40, 10, identity=True), {"W_*": 20})


def objects() -> dict[str, Any]:
    d = decomposed()
    many = ManyResult(5, (TrainConfig(),) * 20, [{"step": i, "loss": [1.0] * 20} for i in range(500)], [None] * 20)
    tokens = torch.zeros(300, 4, dtype=torch.int64)
    return {
        "masks": SiteMask(BIG, BIG[:, 0]),
        "clean pass": d.clean_pass(BIG),
        "batch": Batch(BIG),
        "learner": make_learner(d, TrainConfig(divergence="mse")),
        "many": many,
        "worst case": WorstCase({20: 0.1}, {20: {"W": BIG}}),
        "apd": APD(TMS(5, 2), APDConfig(n_components=5, k=1.0, lr=0.1, steps=1), {"W": BIG}, {"W": BIG}, []),
        "report": tms_report(d),
        "decomposition": d,
        "summary": d.summary(BIG),
        "task": Task("copy", tokens, tokens, tokens[:, :1], tokens[:, :1] + 1, torch.full((300,), 3)),
    }


# Protocols, and what no user makes or holds.
NAMELESS = {
    "APDLearner", "AdversarialMasks", "Bench", "BlockStarts", "CommandJob", "GateMaker", "GateOfAll", "Gates",
    "GatesBySite", "GraphedStep", "LossTerm", "MaskSource", "MemberAdam", "MemberLearner", "MergedMasks", "Needs",
    "Passes", "PersistentMasks", "PersistentSources", "Provider", "RowsGenerator", "SampledMasks", "Tally",
    "TokenCounts", "WorstMasks", "tqdm",
}  # fmt: skip


def test_what_holds_tensors_or_tables_does_not_print_them_and_what_users_make_has_a_name() -> None:
    shown, nameless = [], set()
    for found in pkgutil.iter_modules(spd_lens.__path__):
        face = importlib.import_module(f"spd_lens.{found.name}")
        for name in getattr(face, "__all__", ()):
            value = getattr(face, name)
            if not inspect.isclass(value) or not value.__module__.startswith("spd_lens."):
                continue
            if value.__repr__ is object.__repr__:
                nameless.add(name)
            elif dataclasses.is_dataclass(value) and inspect.unwrap(value.__repr__).__code__.co_filename == "<string>":
                kinds = [str(field.type) for field in dataclasses.fields(value) if field.repr]
                shown += [name] if any("Tensor" in k and not k.startswith("Callable") for k in kinds) else []
    assert shown == ["Cases"], shown  # spd_lens.audit's own digest counts every change there
    assert nameless == NAMELESS


def test_a_repr_is_one_short_line() -> None:
    for name, value in objects().items():
        shown = repr(value)
        assert "\n" not in shown, name
        assert len(shown) < 700, shown


def test_tensors_are_shown_by_shape_and_long_things_by_length() -> None:
    assert repr(SiteMask(BIG, None)) == "SiteMask(mask=float32 [300, 40], delta=None, routed=None)"
    assert "log=list of 500" in repr(objects()["many"])


def test_a_decomposition_of_many_sites_names_a_few() -> None:
    from tests.small_models import tiny_transformer

    d: Any = decompose(tiny_transformer(), {"blocks.*.mlp.W_*": 4, "blocks.*.attn.W_*": 4})
    assert f"and {len(d) - 4} more" in repr(d)
    page = d._repr_html_()
    assert all(name in page for name in d)
    d.remove()
    assert "removed" in d._repr_html_()


def test_a_summary_says_its_thresholds_and_counts_what_it_says() -> None:
    d = decomposed()
    summary = d.summary(BIG)
    g = d.importance(BIG)["W_id"]
    (site,) = [site for site in summary.sites if site.name == "W_id"]
    assert site.alive == int((g > 0.01).any(0).sum())
    assert site.l0 == pytest.approx(float((g > 0.01).float().sum(1).mean()))
    for shown in (str(summary), summary._repr_html_().replace("&gt;", ">")):
        assert "alive>0.01" in shown
        assert f"{site.error:.2e}" in shown
    assert "-" in str(d.summary())


def test_reports_in_a_notebook_are_escaped_text() -> None:
    page = tms_report(decomposed())._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    assert page.startswith("<pre>")
    assert ">=" not in page

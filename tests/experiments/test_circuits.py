"""The experiment on circuits of a real model, on the toy model and few steps: what is found is measured twice."""

from __future__ import annotations

from argparse import Namespace

import torch

from experiments.circuits import on_task
from spd_lens.circuits import check_circuit, circuit_of
from spd_lens.models import BOS, D_VOCAB, load_induction_decomposition
from spd_lens.tasks import induction_task
from tests.conftest import needs_hooked


@needs_hooked
def test_what_is_found_is_also_measured_on_fresh_prompts() -> None:
    decomposition = load_induction_decomposition()
    found_on, fresh = (induction_task(range(1, D_VOCAB), 4, length=10, bos=BOS, seed=seed) for seed in (0, 1))
    assert not torch.equal(found_on.clean, fresh.clean)
    values = on_task(
        decomposition, found_on, fresh, Namespace(searches=["naive"], steps=2, minimality=1e-4, seed=0)
    )  # fmt: skip
    naive = values["naive"]
    assert "honest" not in values
    assert sum(naive["nodes_by_site"].values()) == naive["nodes"] == naive["fresh"]["nodes"]
    ids = {site: list(own) for site, own in naive["ids"].items()}
    for task, numbers in ((found_on, naive), (fresh, naive["fresh"])):
        again = check_circuit(decomposition, circuit_of(decomposition, ids), task, budgets=(1,), restarts=1)
        assert abs(again.importance.kl - numbers["kl_importance"]) < 1e-5
        assert abs(again.off.kl - numbers["kl_everything_off"]) < 1e-5

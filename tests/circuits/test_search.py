"""Circuits against really edited weights, all subsets tried one by one, and sets known by construction."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spd_lens import PGD, Decomposition, decompose
from spd_lens.circuits import Circuit, CircuitReport, check_circuit, circuit_of, find_circuit
from spd_lens.core import Unit
from spd_lens.tasks import Task
from tests import bridge_models, oracle
from tests.conftest import needs_hooked
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

SITE = "blocks.0.mlp.W_in"


def task(n: int = 4, seed: int = 0, length: int = 6, vocabulary: int = 29) -> Task:
    """Random prompts with random answers: circuits need no task that makes sense."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, vocabulary, shape, generator=generator)

    clean, corrupted = draw(n, length), draw(n, length)
    said = torch.stack([torch.randperm(vocabulary, generator=generator)[:3] for _ in range(n)])
    return Task("random", clean, corrupted, said[:, :1], said[:, 1:], torch.full((n,), length - 1))


def kl_at(clean: Tensor, masked: Tensor, where: Tensor) -> float:
    """Mean over the positions in `where`, in float64 and by another route than the library's."""
    p, q = (x.double().log_softmax(-1) for x in (clean, masked))
    return float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1)[where].mean())


# -- measured against weights edited for real -------------------------------------------------------------


def check_against(
    report: CircuitReport, given: Task, clean: Tensor, alone: Tensor, without: Tensor, off: Tensor
) -> None:
    """The report's numbers are those of the logits of really edited models."""
    where = torch.zeros(given.clean.shape, dtype=torch.bool)
    where[:, -1] = True
    kl_off = kl_at(clean, off, where)
    for measured, logits in ((report.importance, alone), (report.knocked_out, without), (report.off, off)):
        kl = kl_at(clean, logits, where)
        assert measured.kl == pytest.approx(kl, rel=2e-3, abs=1e-5)
        assert measured.recovered == pytest.approx(1 - kl / kl_off, abs=5e-3)
        last = logits[:, -1].double()
        difference = last.gather(1, given.answers)[:, 0] - last.gather(1, given.wrong).logsumexp(1)
        assert measured.logit_difference == pytest.approx(float(difference.mean()), rel=1e-3, abs=1e-4)
    assert report.target.kl == pytest.approx(0, abs=1e-6)
    assert min(report.importance.kl, report.knocked_out.kl, report.off.kl) > 1e-3


@needs_hooked
@pytest.mark.parametrize("name", ["ln", "gqa", "llama_gqa_folded", "no_norm"])
def test_the_report_is_about_weights_that_one_could_edit(name: str) -> None:
    target = oracle.CASES[name].build()
    sites = oracle.all_sites(target)
    decomposition = decompose(copy.deepcopy(target), dict.fromkeys(sites, 5))
    ids = {site: [i % 5, (i + 2) % 5] for i, site in enumerate(sites)}
    given = task(length=5)
    report = check_circuit(decomposition, circuit_of(decomposition, ids), given, budgets=(2,), restarts=1, draws=1)

    def edited(inside: float, outside: float, delta: float) -> Tensor:
        masks = {}
        for site in sites:
            mask = torch.full((5,), float(outside))
            mask[ids[site]] = inside
            weight = decomposition[site]
            masks[site] = oracle.Masks(weight.V.detach(), weight.U.detach(), mask, torch.tensor(float(delta)))
        return oracle.run_written(target, masks, given.clean)

    clean = oracle.run_written(target, {}, given.clean)
    check_against(report, given, clean, edited(1, 0, 0), edited(0, 1, 1), edited(0, 0, 0))
    with torch.no_grad():
        corrupted = given.logit_difference(target(given.corrupted)).mean()
        m = given.logit_difference(edited(1, 0, 0)).mean()
        expected = (m - corrupted) / (given.logit_difference(clean).mean() - corrupted)
    assert report.importance.faithfulness == pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "raw"), ("llama", "raw"), ("gemma2", "compatibility")])
def test_the_report_of_a_bridge_is_about_weights_that_one_could_edit(family: str, mode: str) -> None:
    written = bridge_models.Written(family, mode)
    decomposition = bridge_models.swapped(family, mode)
    n = bridge_models.N
    ids = {site: [i % n, (i + 1) % n] for i, site in enumerate(decomposition)}
    given = task(length=5)
    circuit = circuit_of(decomposition, ids)
    report = check_circuit(decomposition, circuit, given, budgets=(2,), restarts=1, draws=1)

    def edited(inside: float, outside: float, delta: float) -> Tensor:
        masks = {}
        for site, weight in decomposition.items():
            mask = torch.full((n,), float(outside))
            mask[ids[site]] = inside
            masks[site] = bridge_models.Masks(weight.V.detach(), weight.U.detach(), mask, float(delta))
        with written.masked(masks) as model:
            return bridge_models.run(model, given.clean)

    clean = bridge_models.run(written.bridge, given.clean)
    check_against(report, given, clean, edited(1, 0, 0), edited(0, 1, 1), edited(0, 0, 0))
    # The same as lists of hooks.
    for hooks, expected in ((circuit.only, edited(1, 0, 0)), (circuit.without, edited(0, 1, 1))):
        got = bridge_models.run(decomposition.model, given.clean, hooks(decomposition))
        bridge_models.assert_close(got, expected, 1e-4)


# -- known by construction --------------------------------------------------------------------------------


def planted(
    seed: int = 0, lone: int = 3, pairs: int = 1, unused: int = 3, strength: float = 1.0, pair: float = 3.0
) -> Decomposition:
    """`W_in` of rank `lone`: that many subcomponents are W, others come in pairs that cancel, the rest are 0.

    With everything outside switched off the first `lone` are enough. But half of a pair without the other is not 0:
    whoever may choose the masks outside breaks such a circuit, so both of every pair belong to an honest one (E3).
    """
    decomposition = decompose(tiny_transformer(seed), {SITE: lone + 2 * pairs + unused}, gate="shared", gate_width=8)
    weight, generator = decomposition[SITE], torch.Generator().manual_seed(seed)
    d_in, d_out = weight.target_weight.shape
    V = torch.randn(d_in, weight.n_subcomponents, generator=generator) / d_in**0.5
    U = 3 * strength * torch.randn(weight.n_subcomponents, d_out, generator=generator)
    for i in range(lone, lone + 2 * pairs, 2):
        V[:, i] *= pair
        V[:, i + 1], U[i + 1] = V[:, i], -U[i]
    U[lone + 2 * pairs :] = 0
    with torch.no_grad():
        weight.V.copy_(V)
        weight.U.copy_(U)
        weight.site.matrix.write(V[:, :lone] @ U[:lone])
    return decomposition


def test_masks_of_importance_find_what_an_adversary_breaks_and_a_search_against_it_finds_what_holds() -> None:
    decomposition, rows = planted(), tokens(4)
    settings: dict[str, Any] = {"start": "all", "steps": 60, "pgd": PGD(4, 0.4), "minimality": 0.01}
    settings |= {"budgets": (20, 40), "prune_tries": 4}
    naive = find_circuit(decomposition, rows, masks="importance", **settings)
    assert naive.circuit.ids == {SITE: [0, 1, 2]}
    assert naive.importance.recovered > 0.999
    assert not naive.is_circuit
    assert naive.holds_up_to is None
    assert naive.verdict.startswith("NOT A CIRCUIT")
    assert "Verdict: NOT A CIRCUIT" in str(naive)
    honest = find_circuit(decomposition, rows, masks=("stochastic", "pgd"), **settings)
    assert honest.circuit.ids == {SITE: [0, 1, 2, 3, 4]}
    assert honest.is_circuit
    assert honest.holds_up_to == 40
    assert honest.verdict.startswith("holds against every adversary tried")
    assert honest.adversarial[40].recovered > 0.999 > 0.8 > naive.adversarial[20].recovered
    assert honest.n_parameters == 5 * (16 + 32)
    assert honest.knocked_out.recovered < 0.2


def test_random_masks_and_a_persistent_adversary_together_find_the_pairs_too() -> None:
    report = find_circuit(
        planted(seed=1), tokens(4), masks=("stochastic", "persistent"), start="all", steps=60, minimality=0.01,
        budgets=(20,), prune_tries=4,
    )  # fmt: skip
    assert report.circuit.ids == {SITE: [0, 1, 2, 3, 4]}
    assert report.is_circuit


def test_only_the_last_position_of_the_last_block_matters_for_the_last_prediction() -> None:
    site = "blocks.1.mlp.W_in"
    decomposition = decompose(tiny_transformer(), {site: 16}, init="exact")
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, -1] = True
    report = find_circuit(
        decomposition, tokens(2), position_mask=mask, masks="importance", by_position=True, start="all", steps=60,
        minimality=0.01, budgets=(2,), restarts=1,
    )  # fmt: skip
    assert report.circuit.by_position
    assert {unit.position for unit in report.circuit.units} == {11}
    assert 1 <= report.n_nodes == report.n_subcomponents <= 16
    assert report.n_candidates == 16 * 12


# -- all subsets tried one by one ---------------------------------------------------------------------------


def subsets(n: int) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(range(n), k) for k in range(n + 1))


class BruteForce:
    """The KL of every mask that is 0 or 1 at each of n subcomponents and the delta, with the weights really edited."""

    def __init__(self, decomposition: Decomposition, rows: Tensor, site: str = SITE) -> None:
        weight = decomposition[site]
        V, U, W = weight.V.detach(), weight.U.detach(), weight.target_weight.detach().clone()
        self.n, where = weight.n_subcomponents, torch.ones(rows.shape, dtype=torch.bool)
        self.kl: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            clean = decomposition.model(rows)
            for mask in product((0, 1), repeat=self.n + 1):
                m, d = torch.tensor(mask[:-1], dtype=W.dtype), mask[-1]
                weight.site.matrix.write((V * m) @ U + d * (W - V @ U))
                self.kl[mask] = kl_at(clean, decomposition.model(rows), where)
            weight.site.matrix.write(W)
        self.off = self.kl[(0,) * (self.n + 1)]

    def alone(self, kept: Sequence[int]) -> float:
        return self.kl[(*(int(c in kept) for c in range(self.n)), 0)]

    def worst(self, kept: Sequence[int]) -> float:
        """The largest KL over all masks of 0 and 1 outside."""
        return max(kl for mask, kl in self.kl.items() if all(mask[c] == 1 for c in kept))

    def values(self, loss: Any, minimality: float) -> dict[tuple[int, ...], float]:
        """What `find_circuit` minimises, for every subset."""
        return {kept: loss(kept) / self.off + minimality * len(kept) for kept in subsets(self.n)}


@pytest.mark.parametrize(("seed", "masks"), [(0, "importance"), (1, "importance"), (2, "importance"), (0, "pgd")])
def test_the_circuit_is_the_best_of_all_subsets(seed: int, masks: Any) -> None:
    decomposition, rows = planted(seed, lone=4, pairs=1, unused=1, strength=0.5, pair=1.0), tokens(3, seed=seed)
    with torch.no_grad():
        # Of very different sizes, so that some are worth their cost and some are not.
        for c, scale in enumerate((2.0, 1.0, 0.2, 0.05)):
            decomposition[SITE].U[c] *= scale
        weight = decomposition[SITE]
        weight.site.matrix.write(weight.V[:, :4] @ weight.U[:4])
    brute = BruteForce(decomposition, rows)
    loss = brute.alone if masks == "importance" else brute.worst
    minimality = 0.03
    values = brute.values(loss, minimality)
    # Within half the cost of a node of the best; few sets are.
    good = {kept for kept, value in values.items() if value <= min(values.values()) + minimality / 2}
    assert len(good) <= 4
    assert all(0 < len(kept) < brute.n for kept in good)
    report = find_circuit(
        decomposition, rows, masks=masks, start="all", steps=120 if masks == "importance" else 60,
        minimality=minimality, tolerance=minimality / 2, budgets=(1,), restarts=1, pgd=PGD(4, 0.4), prune_tries=5,
    )  # fmt: skip
    assert tuple(report.circuit.ids[SITE]) in good


@pytest.mark.parametrize("kept", [(0, 1), (0, 1, 2, 3), (2, 5)])
def test_the_adversary_of_the_report_finds_the_worst_of_all_masks_of_0_and_1(kept: tuple[int, ...]) -> None:
    decomposition, rows = planted(3, lone=4, pairs=1, unused=1, strength=0.5), tokens(3)
    brute = BruteForce(decomposition, rows)
    report = check_circuit(decomposition, circuit_of(decomposition, {SITE: kept}), rows, budgets=(20, 40), restarts=4)
    worst = brute.worst(kept)
    assert report.importance.kl == pytest.approx(brute.alone(kept), rel=1e-3, abs=1e-6)
    # Masks between 0 and 1 may be worse than the worst corner; an ascent may also end a little before it.
    assert report.adversarial[40].kl >= 0.98 * worst
    assert report.adversarial[40].kl <= 1.3 * worst
    assert worst > 1.5 * report.stochastic.kl


# -- verdicts -------------------------------------------------------------------------------------------------


def verdicts() -> list[tuple[tuple[float, float, float, float], str, int | None]]:
    """Recovered alone, random, at 20 and at 40 steps; how the verdict begins; the largest budget that it holds at."""
    return [
        ((0.9, 0.9, 0.9, 0.85), "holds against every adversary tried: 0.9 at 20 steps, 0.85 at 40 steps", 40),
        ((0.9, 0.9, 0.9, 0.2), "holds against an adversary of 20 steps of 0.1, not of more", 20),
        (
            (0.9, 0.9, 0.1, 0.9),
            "NOT A CIRCUIT: it holds under importance masks (0.9) and random ones (0.9), and an",
            None,
        ),
        ((0.9, 0.5, 0.1, 0.1), "NOT A CIRCUIT: it holds only under importance masks (0.9)", None),
        ((0.5, 0.9, 0.9, 0.9), "does not hold: alone it keeps 0.5", 40),
    ]


@pytest.mark.parametrize(("recovered", "begins", "up_to"), verdicts())
def test_verdicts(recovered: tuple[float, ...], begins: str, up_to: int | None) -> None:
    decomposition = planted()
    report = check_circuit(
        decomposition, circuit_of(decomposition, {SITE: [0]}), tokens(2), budgets=(1,), draws=1, restarts=1
    )

    def kept(value: float) -> Any:
        return dataclasses.replace(report.importance, recovered=value)

    alone, random, first, second = (kept(value) for value in recovered)
    report = dataclasses.replace(report, importance=alone, stochastic=random, adversarial={20: first, 40: second})
    assert report.verdict.startswith(begins)
    assert report.holds_up_to == up_to
    assert report.is_circuit == begins.startswith("holds against every")


def test_answers_as_the_objective_are_judged_by_the_logit_difference() -> None:
    decomposition = planted(strength=3.0)
    given = task(vocabulary=40)
    with torch.no_grad():
        # Let the target do the task: its answer is what it says, the wrong one what the corrupted prompts raise most.
        clean, corrupted = (decomposition.model(rows)[:, -1] for rows in (given.clean, given.corrupted))
    best = clean.argmax(-1, keepdim=True)
    other = (corrupted - clean).scatter(1, best, -torch.inf).argmax(-1, keepdim=True)
    given = dataclasses.replace(given, answers=best, wrong=other)
    report = find_circuit(
        decomposition, given, objective="answer", masks="importance", start="all", steps=20, budgets=(2,)
    )
    assert report.kept(report.importance) == report.importance.faithfulness
    assert report.target.faithfulness == pytest.approx(1)
    assert "logit difference recovered" in report.verdict
    assert report.target.accuracy == 1
    assert "accuracy" in str(report)


def test_a_share_of_what_the_model_does_not_do_is_refused() -> None:
    decomposition = planted(strength=3.0)
    given = task(vocabulary=40)
    with torch.no_grad():
        clean, corrupted = (decomposition.model(rows)[:, -1] for rows in (given.clean, given.corrupted))
    # The "answer" is what the corrupted prompts make likelier.
    turned = dataclasses.replace(
        given, answers=(corrupted - clean).argmax(-1)[:, None], wrong=(clean - corrupted).argmax(-1)[:, None]
    )
    with pytest.raises(ValueError, match=r"objective='answer', but .* this model does not do the task"):
        check_circuit(decomposition, circuit_of(decomposition, {SITE: [0]}), turned, objective="answer")


def test_a_larger_budget_is_never_reported_as_less_harm_and_json_has_the_nodes() -> None:
    decomposition, rows = planted(3, lone=4, pairs=2, unused=1, strength=0.5), tokens(3)
    circuit = circuit_of(decomposition, [Unit(((SITE, 1),), (2, 4)), Unit(((SITE, 3),))], n_positions=rows.shape[1])
    # Large steps jump over what they look for.
    report = check_circuit(decomposition, circuit, rows, budgets=range(1, 13), step_size=0.7, restarts=2)
    reached = [measured.kl for _, measured in sorted(report.adversarial.items())]
    assert reached == sorted(reached)
    assert len(set(reached)) > 1
    nodes = report.to_json()["nodes"]
    assert nodes == [
        [SITE, *pair] for pair in sorted([(1, 2), (1, 4), *((3, t) for t in range(12))], key=lambda n: n[::-1])
    ]


def test_harm_that_is_not_a_number_stays_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    decomposition, rows = planted(3, lone=4, pairs=2, unused=1, strength=0.5), tokens(3)
    circuit = circuit_of(decomposition, [Unit(((SITE, 1),))])
    settings: dict[str, Any] = {"budgets": (1, 2), "restarts": 1, "draws": 1, "step_size": 0.7}
    differing = check_circuit(decomposition, circuit, rows, **settings).adversarial
    assert differing[1] != differing[2]

    given = iter([float("nan"), 1.0])

    def distance(self: Any, output: Tensor, rows: Tensor | None = None) -> Tensor:
        """The ascents' own; of an output without a gradient (what the report compares), NaN and then 1."""
        return self.kl(output, rows) if output.requires_grad else torch.tensor(next(given))

    monkeypatch.setattr("spd_lens.circuits.behaviour.Behaviour.distance", distance)
    ladder = check_circuit(decomposition, circuit, rows, **settings).adversarial
    assert ladder[1] == ladder[2]


def test_nodes_everywhere_and_at_positions_stand_side_by_side() -> None:
    kept = {SITE: torch.tensor([[True, False]]), "blocks.1.mlp.W_in": torch.tensor([[True], [False], [True]])}
    units = Circuit(kept, {site: k.float() for site, k in kept.items()}).units
    assert units[0] == Unit(((SITE, 0),))
    assert units[1:] == [Unit((("blocks.1.mlp.W_in", 0),), (t,)) for t in (0, 2)]


def test_user_metrics_are_measured_in_every_regime() -> None:
    decomposition, rows = planted(), tokens(2)
    metrics = {"first": lambda logits: logits[0, 0, 0]}
    report = check_circuit(
        decomposition, circuit_of(decomposition, {SITE: [0, 1]}), rows, metrics=metrics, budgets=(1,), draws=1
    )
    with torch.no_grad():
        assert report.target.metrics["first"] == pytest.approx(float(decomposition.model(rows)[0, 0, 0]))
    assert all("first" in m.metrics for m in (report.importance, report.stochastic, report.knocked_out))
    assert "first" in str(report)
    assert report.to_json()["ids"] == {SITE: [0, 1]}


# -- what else must hold ----------------------------------------------------------------------------------------


def test_the_model_and_the_decomposition_are_left_as_they_were() -> None:
    decomposition, rows = planted(), tokens(2)
    state = {k: v.clone() for k, v in decomposition.model.state_dict().items()}
    before = decomposition.model(rows)
    find_circuit(decomposition, rows, steps=2, budgets=(2,), restarts=1, prune_tries=0, pgd=PGD(1, 0.4))
    seen: list[int] = []

    def fail(logits: Tensor) -> float:
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        find_circuit(decomposition, rows, steps=1, masks="importance", budgets=(2,), metrics={"failing": fail})
    assert torch.equal(decomposition.model(rows), before)
    assert all(torch.equal(v, state[k]) for k, v in decomposition.model.state_dict().items())
    assert all(p.grad is None for p in decomposition.model.parameters())
    assert not any(weight.is_watched() for weight in decomposition.values())


def test_the_same_seed_finds_the_same_circuit_and_rows_may_be_drawn() -> None:
    decomposition = planted()
    one, two = (
        find_circuit(
            decomposition,
            tokens(4),
            steps=4,
            rows_per_step=2,
            start="all",
            budgets=(3,),
            prune_tries=1,
            pgd=PGD(1, 0.4),
            restarts=1,
        )
        for _ in range(2)
    )
    assert one.to_json() == two.to_json()
    assert one.importance.recovered > 0.9


def test_gates_are_where_the_search_starts() -> None:
    decomposition = planted()
    gate = decomposition[SITE].gate
    assert gate is not None
    bias = [p for p in gate.parameters() if p.shape == (8,)][-1]
    with torch.no_grad():
        bias.copy_(1000 * torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1]))
    report = find_circuit(decomposition, tokens(2), masks="importance", steps=1, lr=1e-4, tolerance=0.0, budgets=(1,))
    assert report.how["n_candidates_above_0"] == 4


def test_a_model_without_positions() -> None:
    model = TiedAutoencoder()
    decomposition = decompose(model, {"encoder.W": 3, "decoder.W": None})
    circuit = circuit_of(decomposition, {"encoder.W": [0, 1], "decoder.W": [1, 2]})
    assert circuit.n_parameters(decomposition) == 3 * (5 + 2)
    assert circuit.n_nodes == 4
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    report = check_circuit(decomposition, circuit, x, budgets=(2,), draws=1)
    assert report.importance.kl > 0


def test_embeddings_are_sites_like_others() -> None:
    decomposition = decompose(tiny_transformer(), {"embed.W_E": 6, "unembed.W_U": 5})
    report = find_circuit(decomposition, tokens(3), masks="stochastic", steps=3, start="all", budgets=(2,), restarts=1)
    assert report.n_candidates == 11


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"masks": "adversarial"}, "masks='adversarial'; expected one or several different ones of 'importance'"),
        ({"masks": ()}, "expected one or several"),
        ({"objective": "answer"}, "objective='answer' needs a task"),
        ({"objective": "mse"}, "objective='mse'; expected 'kl' or 'answer'"),
        ({"start": "ones"}, "start='ones'; expected 'gates' or 'all'"),
        ({"steps": 0}, "steps=0; expected at least 1"),
        ({"rows_per_step": 0}, "rows_per_step=0"),
        ({"budgets": (0,)}, "budgets.*=0; expected at least 1"),
        ({"position_mask": torch.ones(2, 5, dtype=torch.bool)}, r"has shape \(2, 5\); expected \(2, 12\)"),
        ({"position_mask": torch.zeros(2, 12, dtype=torch.bool)}, "expected at least one position that counts"),
        ({"prompts": tokens(2) + 40}, "the vocabulary is 0..39"),
    ],
)  # fmt: skip
def test_mistakes_are_named(without_type_checks: None, arguments: dict[str, Any], text: str) -> None:
    given = {"prompts": tokens(2), **arguments}
    with pytest.raises(ValueError, match=text):
        find_circuit(planted(), given.pop("prompts"), **given)


def test_other_mistakes_are_named(without_type_checks: None) -> None:
    decomposition = planted()
    with pytest.raises(TypeError, match=r"prompts \(a Task, or tokens \[row pos\]\) is text; expected token ids"):
        find_circuit(decomposition, "w1 w2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"no decomposed site 'blocks.0.mlp.W_on'; near: '{SITE}'"):
        circuit_of(decomposition, {"blocks.0.mlp.W_on": [1]})
    with pytest.raises(ValueError, match=r"expected ids in 0..7"):
        circuit_of(decomposition, {SITE: [8]})
    with pytest.raises(ValueError, match="position_mask is given with a task"):
        find_circuit(decomposition, task(), position_mask=torch.ones(4, 6, dtype=torch.bool))
    other = Circuit({SITE: torch.ones(5, 8, dtype=torch.bool)}, {SITE: torch.ones(5, 8)})
    with pytest.raises(ValueError, match="a circuit with positions holds for prompts of one length"):
        check_circuit(decomposition, other, tokens(2))
    with torch.no_grad():
        decomposition[SITE].site.matrix.write(torch.zeros(16, 32))
        decomposition[SITE].U.zero_()
    with pytest.raises(ValueError, match="no circuit to find"):
        find_circuit(decomposition, tokens(2))

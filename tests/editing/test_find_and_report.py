"""Finding what a habit hangs on, measuring an edit, and relearning: numbers by hand, and a planted habit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.core import Unit
from spd_lens.editing import (
    Above,
    EditEffect,
    Habit,
    edit,
    find,
    generate,
    kl_from,
    measure,
    outputs_of,
    random_edits,
    relearning,
    report,
)
from spd_lens.tasks import Task
from tests.small_models import D_VOCAB, tiny_transformer, tokens

SITE, OTHER, ANSWER = "blocks.1.mlp.W_out", "blocks.0.mlp.W_in", 7


def planted() -> Decomposition:
    """Subcomponent 2 of `SITE` writes towards `ANSWER`, and the target's matrix has it too."""
    decomposition = decompose(tiny_transformer(), {SITE: 6, OTHER: 5}, seed=1)
    weight = decomposition[SITE]
    with torch.no_grad():
        logits_of = decomposition.model.unembed.W_U if hasattr(decomposition.model.unembed, "W_U") else None
        assert logits_of is not None
        direction = logits_of[:, ANSWER] - logits_of.mean(1)
        x = decomposition.clean_pass(tokens(4)).inputs[SITE].flatten(0, 1)
        weight.subcomponents.V[:, 2] = x.mean(0) / x.mean(0).norm()
        weight.subcomponents.U[2] = 6 * direction / direction.norm() / float(x.mean(0).norm())
        weight.site.matrix.write(weight.target_weight + torch.outer(weight.V[:, 2], weight.U[2]))
    return decomposition


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    return planted()


def a_habit(n: int = 6) -> Habit:
    text = tokens(n, seed=3)
    return Habit("seven", text[:, :7], torch.tensor([[ANSWER, -1]] * n), text[:, 7:])


def without(decomposition: Decomposition, batch: Tensor, site: str, c: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        clean = decomposition.model(batch).log_softmax(-1)
        with decomposition.model.hooks(fwd_hooks=decomposition.ablate({site: [c]})):
            return clean, decomposition.model(batch).log_softmax(-1)


def test_the_planted_subcomponent_is_found_first_with_numbers_that_are_right(decomposition: Decomposition) -> None:
    habit, controls = a_habit(), tokens(3, seed=9)
    found = find(decomposition, habit, controls, n_measured=8, n_checked=6)
    assert found.units[0] == Unit(((SITE, 2),))
    assert (len(found.candidates), found.n_units) == (8, 11)
    for candidate in found.candidates:
        ((site, c),) = candidate.unit.members
        clean, ablated = without(decomposition, habit.prompts, site, c)
        clean, ablated = clean[:, -1, ANSWER].double(), ablated[:, -1, ANSWER].double()
        drop = (clean - torch.log1p(-clean.exp())) - (ablated - torch.log1p(-ablated.exp()))
        assert candidate.drop == pytest.approx(float(drop.mean()), abs=1e-4)
        assert candidate.standard_error == pytest.approx(float(drop.std() / len(habit) ** 0.5), abs=1e-4)
        clean, ablated = without(decomposition, controls, site, c)
        assert candidate.cost == pytest.approx(float((clean.exp() * (clean - ablated)).sum(-1).mean()), abs=1e-6)
    assert found.agreement is not None
    assert "correlation with exact patching" in str(found)
    assert "blocks.1.mlp.W_out[2]" in found._repr_html_()


def test_components_are_measured_beside_subcomponents(decomposition: Decomposition) -> None:
    both = Unit(((SITE, 2), (OTHER, 1)), name="seven writer")
    found = find(decomposition, a_habit(), tokens(3), [both, Unit(((SITE, 0),)), Unit(((SITE, 1),))], n_measured=1)
    assert both in found.units
    assert len(found.candidates) == 2
    assert found.units[0].label == "seven writer"


def test_the_smallest_set_reaches_the_effect_and_needs_all_it_has(decomposition: Decomposition) -> None:
    habit = a_habit()
    found = find(decomposition, habit, tokens(3, seed=9), n_measured=11)
    before = habit.probability(decomposition.host.forward).mean()
    made = found.smallest(0.5)
    assert 1 - habit.probability(made.logits).mean() / before >= 0.5
    for change in made.changes if len(made.changes) > 1 else ():
        rest = [other.unit for other in made.changes if other is not change]
        assert 1 - habit.probability(edit(decomposition, rest).logits).mean() / before < 0.5
    with pytest.raises(ValueError, match=r"units the probability falls by .*%, not by 100.0%"):
        found.smallest(0.9999999)
    with pytest.raises(ValueError, match="expected a share of the probability"):
        found.smallest(1.5)


def test_what_a_report_says_is_what_is_there(decomposition: Decomposition, tmp_path: Path) -> None:
    habit, unrelated = a_habit(), tokens(3, seed=9)
    made = edit(decomposition, {SITE: [2]})
    got = report(
        made, habit, unrelated, n_random=2, n_generated=4, relearn_on=a_habit(3), wordings={"short": a_habit(2)}
    )
    clean, edited = without(decomposition, habit.tokens, SITE, 2)
    assert got.here.before == pytest.approx(float(clean[:, 6, ANSWER].exp().mean()), abs=1e-6)
    assert got.here.after == pytest.approx(float(edited[:, 6, ANSWER].exp().mean()), abs=1e-6)
    kl = (clean.exp() * (clean - edited)).sum(-1)
    assert got.here.kl_near == pytest.approx(float(kl[:, 7:12].mean()), abs=1e-5)
    others = [i for i in range(D_VOCAB) if i != ANSWER]
    p, q = (x[:, 6, others].log_softmax(-1) for x in (clean, edited))
    assert got.here.kl_at == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    clean, edited = without(decomposition, unrelated, SITE, 2)
    assert got.here.kl_elsewhere == pytest.approx(float((clean.exp() * (clean - edited)).sum(-1).mean()), abs=1e-5)
    assert got.here.effect > 0.5 > max(effect.effect for effect in got.random)
    assert got.here.count_after < got.here.count_before
    assert got.parameters_changed == {SITE: 32 * 16}
    assert got.ranks == {SITE: 1}
    assert got.baked_difference is not None
    assert got.baked_difference < 1e-3
    assert got.relearning is not None
    assert set(got.wordings) == {"short"}
    page = got.to_html(tmp_path / "edit.html", title="<b>seven</b>").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "<b>seven</b>" not in page
    assert re.search(r"blocks\.1\.mlp\.W_out\[2\]: x 0", page)
    assert "random subcomponents (mean of 2)" in str(got)


def test_an_edit_that_acts_nowhere_is_an_error(decomposition: Decomposition) -> None:
    habit = a_habit()
    # The subcomponent that is never much needed, and a threshold that it never passes.
    largest = {
        (s, c): v for s, g in decomposition.importance(habit.tokens).items() for c, v in enumerate(g.amax((0, 1)))
    }
    member, most = min(largest.items(), key=lambda item: float(item[1]))
    assert float(most) < 1
    never = edit(decomposition, {SITE: [2]}, when=Above(float(most), of=Unit((member,))))
    with pytest.raises(ValueError, match=r"changes no output on the prompts of 'seven'.*acts at none"):
        report(never, habit, tokens(2), n_random=0)


def test_random_edits_are_of_other_subcomponents_with_the_same_scales(decomposition: Decomposition) -> None:
    made = edit(decomposition, {SITE: {2: 0.25}, OTHER: [1]})
    for other in random_edits(made, tokens(2), 4):
        assert [(c.unit.site, c.scale) for c in other.changes] == [(c.unit.site, c.scale) for c in made.changes]
        assert all(c.unit not in {m.unit for m in made.changes} for c in other.changes)
    with pytest.raises(ValueError, match="no subcomponent left that is not edited"):
        random_edits(edit(decomposition, {SITE: list(range(6))}), tokens(2), 1)


def test_generation_samples_what_the_model_says_and_equal_models_write_alike(decomposition: Decomposition) -> None:
    prompts = tokens(1, length=3).repeat(400, 1)
    drawn = generate(decomposition.host.forward, prompts, 1, seed=1)[:, 0]
    with torch.no_grad():
        p = decomposition.model(prompts[:1])[0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=D_VOCAB) / 400
    assert float((frequency - p).abs().max()) < 0.1
    assert torch.equal(drawn, generate(decomposition.host.forward, prompts, 1, seed=1)[:, 0])
    assert not torch.equal(drawn, generate(decomposition.host.forward, prompts, 1, seed=2)[:, 0])


def test_relearning_counts_the_steps_that_bring_a_habit_back(decomposition: Decomposition) -> None:
    habit = a_habit()
    plain: Any = edit(decomposition, {SITE: [2]}).bake()
    goal = float(habit.probability(decomposition.host.forward).mean())
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    got = relearning(plain, habit, habit, goal=goal, steps=64, learning_rate=1e-2)
    assert got.back_after is not None
    assert got.probability[0] == pytest.approx(float(habit.probability(lambda t: outputs_of(plain, t)).mean()))
    assert got.probability[-1] >= 0.9 * goal > got.probability[0]
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    assert relearning(plain, habit, habit, goal=goal, steps=2, learning_rate=1e-9).back_after is None


def test_places_in_a_text_become_prompts() -> None:
    rows = torch.arange(60).view(2, 30)
    habit = Habit.in_text("x", rows, [10, 44, 45], context=4, first=99)
    assert sorted(habit.prompts.tolist()) == [[99, 6, 7, 8, 9], [99, 40, 41, 42, 43], [99, 41, 42, 43, 44]]
    assert sorted(habit.continuations.tolist())[0] == [10, 11, 12, 13, 14, 15]  # pyright: ignore
    assert habit.is_answer(torch.tensor([[10, 3], [44, 45], [0, 0]])).tolist() == [[1, 0], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match="no row of the text has one of the tokens"):
        Habit.in_text("x", rows, [200], context=4)


def test_a_task_is_a_habit_and_nothing_else_is(decomposition: Decomposition, without_type_checks: None) -> None:
    batch = tokens(3)
    one = torch.tensor([[ANSWER]] * 3)
    task = Task("t", batch, batch, one, one + 1, torch.full((3,), batch.shape[1] - 1))
    assert torch.equal(Habit.of_task(task).prompts, batch)
    with pytest.raises(ValueError, match="asks before the end"):
        Habit.of_task(Task("t", batch, batch, one, one + 1, torch.zeros(3, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"row 1 of 'twice' has the answers .* every token once"):
        Habit("twice", tokens(2), torch.tensor([[1, 2], [3, 3]]))
    with pytest.raises(TypeError, match="expected a Habit, or a Task"):
        find(decomposition, batch, batch)  # pyright: ignore
    with pytest.raises(TypeError, match="expected an Edit"):
        report({SITE: [2]}, a_habit(), batch)  # pyright: ignore


def test_an_effect_on_nothing_is_not_a_number() -> None:
    assert math.isnan(EditEffect(0.0, 0.0, 0, 0, 0.0, 0.0, 0.0).effect)
    assert EditEffect(0.5, 0.1, 0, 0, 0.0, 0.0, 0.0).effect == pytest.approx(0.8)


def test_measuring_equal_models_gives_nothing(decomposition: Decomposition) -> None:
    forward = decomposition.host.forward
    same = measure(forward, forward, a_habit(), tokens(2), n_generated=3)
    assert (same.effect, same.kl_at, same.kl_near, same.kl_elsewhere) == (0, 0, 0, 0)
    assert same.count_before == same.count_after
    with torch.no_grad():
        assert float(kl_from(forward(tokens(2)), forward(tokens(2, seed=4))).min()) > 0

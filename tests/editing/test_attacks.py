"""What an adversarial reading of editing tried: outputs that are not finite, 16 bits, second passes, doubled ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.cli import edit as edit_command
from spd_lens.cli import yaml_file
from spd_lens.components import Components
from spd_lens.core import Unit
from spd_lens.editing import (
    Findings,
    Habit,
    MeasuredUnit,
    Rewrite,
    edit,
    edits,
    find,
    load_edit,
    measure,
    relearning,
    report,
    save_edit,
)
from tests.small_models import tiny_transformer, tokens

SITE = "blocks.0.mlp.W_in"


def in_dtype(dtype: torch.dtype) -> Decomposition:
    return decompose(tiny_transformer(dtype=dtype), {SITE: 5}, seed=1)


# -- baking ------------------------------------------------------------------------------------------------------------


def test_an_edit_without_finite_outputs_is_not_baked() -> None:
    with pytest.raises(ValueError, match=r"outputs of the (hooked|baked) model are no longer finite in torch\.float32"):
        edit(in_dtype(torch.float32), {SITE: {1: 1e38}}).bake()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_baked_model_without_the_edit_is_an_error_in_every_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 roundings of 16 bits would be more than the logits themselves."""
    made = edit(in_dtype(dtype), {SITE: dict.fromkeys(range(5), 20.0)})
    baked = made.bake()
    off, scale = made.difference(baked, tokens(2)), float(made.logits(tokens(2)).abs().max())
    assert off < 0.03 * scale
    unedited = tiny_transformer(dtype=dtype)
    assert made.difference(unedited, tokens(2)) > 0.2 * scale
    monkeypatch.setattr(edits, "plain_model", lambda *_: unedited)
    with pytest.raises(RuntimeError, match="the baked model's outputs are off by"):
        made.bake()


def test_a_baked_model_that_gives_no_numbers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made = edit(in_dtype(torch.float32), {SITE: [1]})
    broken = tiny_transformer()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    monkeypatch.setattr(edits, "plain_model", lambda *_: broken)
    with pytest.raises(ValueError, match="the outputs of the baked model are no longer finite"):
        made.bake()


def test_numbers_that_are_none_are_named_where_they_are(without_type_checks: None) -> None:
    decomposition, habit = in_dtype(torch.float32), Habit("seven", tokens(2)[:, :5], torch.tensor([[7]] * 2))
    forward = decomposition.host.forward
    with torch.no_grad():
        decomposition[SITE].U[2] = torch.nan
    with pytest.raises(ValueError, match=r"V or U of edited subcomponents of blocks\.0\.mlp\.W_in hold NaN"):
        edit(decomposition, {SITE: [2]})
    with pytest.raises(ValueError, match=r"the edited model gives NaN on the prompts of 'seven'"):
        measure(forward, lambda rows: forward(rows) * torch.nan, habit, tokens(2), n_generated=0)
    with pytest.raises(TypeError, match=r"clean is 3, .*expected a function clean\(tokens"):
        measure(3, forward, habit, tokens(2))  # pyright: ignore[reportArgumentType]
    made = edit(decomposition, {SITE: [1]})
    with torch.no_grad():
        next(iter(decomposition.host.model.ln_final.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="the model that is edited gives no finite outputs"):
        made.bake()


def test_a_site_that_is_not_edited_and_a_decomposed_model_are_no_choice() -> None:
    decomposition = decompose(tiny_transformer(), {SITE: 5, "blocks.0.mlp.W_out": 5}, seed=1)
    made, habit = edit(decomposition, {SITE: [1]}), Habit("seven", tokens(2)[:, :5], torch.tensor([[7]] * 2))
    for ask in (made.rank, made.factors):
        with pytest.raises(
            ValueError, match=r"does not change blocks\.0\.mlp\.W_out; expected one of blocks\.0\.mlp\.W_in"
        ):
            ask("blocks.0.mlp.W_out")
    with pytest.raises(ValueError, match=r"plain is decomposed; expected a plain model"):
        made.difference(decomposition.model, tokens(1))
    with pytest.raises(ValueError, match=r"model is decomposed; expected a plain model"):
        relearning(decomposition.model, habit, habit, goal=0.5)


# -- what is meant -----------------------------------------------------------------------------------------------------


def test_an_edit_of_a_component_does_not_outlive_its_subcomponents(tmp_path: Path) -> None:
    """It was made, then V and U were trained on: its ids mean others now."""
    decomposition = in_dtype(torch.float32)
    made = edit(decomposition, Components.of(decomposition, [{SITE: [1, 2]}], names=["commas"])[0])
    by_number = edit(decomposition, {SITE: [1, 2]})
    assert made.difference(made.bake(), tokens(2)) < 1e-4
    with torch.no_grad():
        decomposition[SITE].U.mul_(1.5)
    habit = Habit("seven", tokens(2)[:, :5], torch.tensor([[7]] * 2))
    for act in (
        made.bake,
        lambda: save_edit(made, tmp_path / "edit.json"),
        lambda: report(made, habit, tokens(2), n_random=0, n_generated=0),
    ):
        with pytest.raises(ValueError, match=r"commas is a component of another decomposition"):
            act()
    assert by_number.difference(by_number.bake(), tokens(2)) < 1e-4


def test_a_unit_that_is_named_twice_in_a_list_is_refused() -> None:
    unit = Unit(((SITE, 1),))
    with pytest.raises(ValueError, match=r"W_in\[1\] is named twice"):
        edit(in_dtype(torch.float32), [unit, unit])


def test_controls_that_are_the_behaviour_are_refused() -> None:
    """What taking a habit away costs on its own prompts is its effect."""
    decomposition, text = in_dtype(torch.float32), tokens(4)
    habit = Habit("seven", text[:, :5], torch.tensor([[7]] * 4), text[:, 5:])
    made = edit(decomposition, {SITE: [1]})
    for own in (habit.prompts, text, torch.cat([text[:2], tokens(2, seed=8)])):
        with pytest.raises(ValueError, match=r"of the 4 rows of controls are prompts of 'seven'; expected other text"):
            find(decomposition, habit, own)
        with pytest.raises(ValueError, match=r"of the 4 rows of unrelated are prompts of 'seven'"):
            report(made, habit, own, n_random=0)
    one_of_five = torch.cat([text[:1], tokens(4, seed=8)])
    assert len(find(decomposition, habit, one_of_five, n_checked=0).candidates) == 5


def test_answers_and_rows_that_are_none_are_refused(without_type_checks: None) -> None:
    """Only -1 fills a short row: -5 would be counted from the end of the vocabulary by some, and left out by others."""
    prompts = tokens(2)[:, :5]
    with pytest.raises(ValueError, match=r"an answer of 'h' is -5; expected token ids, and -1 where"):
        Habit("h", prompts, torch.tensor([[3, -5], [3, -1]]))
    with pytest.raises(ValueError, match=r"the prompts of 'h' are \(2, 0\); expected \[row pos\], not empty"):
        Habit("h", prompts[:, :0], torch.tensor([[3], [3]]))
    habit = Habit("h", prompts, torch.tensor([[3], [3]]))
    with pytest.raises(ValueError, match="not empty"):
        habit[[]]
    with pytest.raises(TypeError, match=r"rows \[0.5\] of 'h'; expected whole numbers"):
        habit[[0.5]]  # pyright: ignore[reportArgumentType]
    made = edit(in_dtype(torch.float32), {SITE: [1]})
    with pytest.raises(TypeError, match=r"(?s)wordings=.*expected \{name: habit\}"):
        report(made, habit, tokens(1, seed=8), wordings={3: habit})  # pyright: ignore[reportArgumentType]


# -- what stays as it was ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_whatever_stops_an_edit_the_model_is_as_before(kind: type[BaseException]) -> None:
    """Stopped in the middle of a pass, between the reading of an input and the change of its output."""
    decomposition = decompose(tiny_transformer(), {SITE: 5, "blocks.1.attn.W_Q": 5}, seed=1)
    made = edit(
        decomposition,
        {SITE: {1: Rewrite(writes=torch.ones(32))}, "blocks.1.attn.W_Q": {2: Rewrite(reads=torch.ones(16))}},
    )
    batch = tokens(2)
    with torch.no_grad():
        clean = decomposition.host.forward(batch)
    hooks = {name: (len(p.fwd_hooks), len(p._forward_hooks)) for name, p in decomposition.model.hook_dict.items()}
    state = {name: value.clone() for name, value in decomposition.model.state_dict().items()}

    def stop(value: Tensor, hook: Any) -> None:
        raise kind("stopped")

    for where in ("blocks.0.mlp.hook_pre", "blocks.1.attn.hook_q", "blocks.0.hook_W_in_acts"):
        if where not in decomposition.model.hook_dict:
            continue
        with pytest.raises(kind), made.applied() as model, model.hooks(fwd_hooks=[(where, stop)]):
            decomposition.host.forward(batch)
        with torch.no_grad():
            assert torch.equal(decomposition.host.forward(batch), clean)
    after = {name: (len(p.fwd_hooks), len(p._forward_hooks)) for name, p in decomposition.model.hook_dict.items()}
    assert after == hooks
    assert all(torch.equal(state[name], value) for name, value in decomposition.model.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(made.logits(batch), clean)


# -- finding and measuring ---------------------------------------------------------------------------------------------


def test_units_that_another_makes_needless_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units 0 and 1 take 60 % away; 2 alone does, too, and 1 beside it takes that back: one pass keeps two of three."""
    decomposition = in_dtype(torch.float32)
    gone = {frozenset(): 0.0, frozenset({0}): 0.1, frozenset({1}): 0.0, frozenset({2}): 0.7, frozenset({0, 1}): 0.2,
            frozenset({0, 2}): 0.65, frozenset({1, 2}): 0.3, frozenset({0, 1, 2}): 0.6}  # fmt: skip

    def probability(self: Findings, units: Any) -> Tensor:
        return torch.tensor(1 - gone[frozenset(unit.id for unit in units)])

    monkeypatch.setattr(Findings, "_probability", probability)
    costs = {0: 3.0, 1: 2.0, 2: 1.0}
    candidates = tuple(MeasuredUnit(Unit(((SITE, c),)), 1.0, 0.01, costs[c], 1.0, 1.0) for c in (0, 1, 2))
    habit = Habit("h", tokens(2)[:, :4], torch.tensor([[1], [1]]))
    made = Findings(decomposition, habit, candidates, None, 3).smallest(0.599)
    assert [change.unit.id for change in made.changes] == [2]


def test_a_habit_that_the_model_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Findings, "_probability", lambda self, units: torch.tensor(0.0))
    found = Findings(
        in_dtype(torch.float32), Habit("none", tokens(2)[:, :4], torch.tensor([[1], [1]])),
        (MeasuredUnit(Unit(((SITE, 0),)), 1.0, 0.01, 1.0, 1.0, 1.0),), None, 1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model gives 'none' no probability at all"):
        found.smallest(0.5)


def test_other_wordings_are_measured_on_the_same_seed() -> None:
    decomposition = in_dtype(torch.float32)
    habit = Habit("seven", tokens(40)[:, :5], torch.tensor([list(range(20))] * 40))
    made = edit(decomposition, {SITE: dict.fromkeys(range(5), 9.0)})
    got = report(made, habit, tokens(2), wordings={"same": habit}, n_random=0, n_generated=6, seed=5)
    other = report(made, habit, tokens(2), n_random=0, n_generated=6, seed=0)
    assert (got.here.count_before, got.here.count_after) != (other.here.count_before, other.here.count_after)
    assert got.wordings["same"].count_before == got.here.count_before
    assert got.wordings["same"].count_after == got.here.count_after


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_a_direction_in_double_comes_back_in_double(tmp_path: Path) -> None:
    decomposition = in_dtype(torch.float64)
    decomposition.model.double()
    assert decomposition[SITE].U.dtype == torch.float64
    writes = torch.linspace(0, 1, 32, dtype=torch.float64).sin()
    made = edit(decomposition, {SITE: {1: Rewrite(writes=writes, scale=1 / 3)}})
    (loaded,) = load_edit(decomposition, save_edit(made, tmp_path / "edit.json")).changes
    assert loaded.writes is not None
    assert torch.equal(loaded.writes, writes)
    assert loaded.scale == 1 / 3


def test_an_edit_is_not_written_over_what_is_none(tmp_path: Path) -> None:
    decomposition = in_dtype(torch.float32)
    for name, text in (("diary.txt", "mine"), ("other.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} (is damaged|was not written as a spd_lens edit)"):
            save_edit(edit(decomposition, {SITE: [1]}), tmp_path / name)
        assert (tmp_path / name).read_text() == text
    for ids in ([1], [2]):
        path = save_edit(edit(decomposition, {SITE: ids}), tmp_path / "edit.json")
    assert [change.unit.id for change in load_edit(decomposition, path).changes] == [2]


@pytest.mark.parametrize("scale", [["b:3=0", "b:3=0.5"], ["b:3,3=0"], ["b:1,2=0", "b:2,4=0"]])
def test_an_id_that_is_given_twice_on_the_command_line_is_refused(scale: list[str]) -> None:
    with pytest.raises(yaml_file.ConfigError, match=r"b:[23] is named twice"):
        edit_command.read_changes(scale)
    assert edit_command.read_changes(["b:1,2=0", "c:1=0.5", "b:3=2"]) == {"b": {1: 0.0, 2: 0.0, 3: 2.0}, "c": {1: 0.5}}

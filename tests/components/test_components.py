"""Components: named units that go wherever subcomponents go, and a file that belongs to one decomposition."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spd_lens import Decomposition, decompose
from spd_lens.circuits import circuit_of
from spd_lens.components import Components, coeffects, ensemble, leiden, merge_subcomponents
from spd_lens.core import Unit, units_of
from spd_lens.patching import ablation_effects, attribution_patching
from spd_lens.statistics import coactivation
from tests.small_models import tiny_transformer, tokens

IN, OUT = "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"
GROUPS: list[Any] = [{IN: [1, 3], OUT: [0]}, {OUT: [2]}]
PROMPTS = tokens(3)


def decomposed(seed: int = 0) -> Decomposition:
    return decompose(tiny_transformer(), {IN: 8, OUT: 6}, gate="shared", gate_width=8, seed=seed)


@pytest.fixture
def decomposition() -> Decomposition:
    return decomposed()


@pytest.fixture
def components(decomposition: Decomposition) -> Components:
    return Components.of(decomposition, GROUPS, names=["reader", "writer"])


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def logits(decomposition: Decomposition, hooks: Any) -> Tensor:
    with torch.no_grad(), decomposition.model.hooks(fwd_hooks=hooks):
        return decomposition.model(PROMPTS)


def without_reader(decomposition: Decomposition) -> Tensor:
    """Logits of a copy from whose weights the members of "reader" are subtracted."""
    other = copy.deepcopy(decomposition)
    with torch.no_grad():
        for site, ids in {IN: [1, 3], OUT: [0]}.items():
            weight = other[site]
            change = sum(torch.outer(weight.V[:, c], weight.U[c]) for c in ids)
            weight.site.matrix.stored().sub_(change)
        other.remove()
        return other.model(PROMPTS)


def test_a_component_goes_wherever_a_subcomponent_goes(decomposition: Decomposition, components: Components) -> None:
    reader = components["reader"]
    assert isinstance(reader, Unit)
    assert (str(reader), reader.members) == ("reader", ((IN, 1), (IN, 3), (OUT, 0)))
    expected, close = without_reader(decomposition), {"atol": 1e-4, "rtol": 1e-4}
    assert not torch.allclose(expected, logits(decomposition, []), **close)
    torch.testing.assert_close(logits(decomposition, decomposition.ablate(reader)), expected, **close)
    circuit = circuit_of(decomposition, [reader])
    torch.testing.assert_close(logits(decomposition, circuit.without(decomposition)), expected, **close)
    kept = logits(decomposition, decomposition.keep(reader))
    torch.testing.assert_close(logits(decomposition, circuit.only(decomposition)), kept)
    effects = ablation_effects(decomposition, PROMPTS, metric, components)
    torch.testing.assert_close(effects.values[0, 0], metric(expected), **close)
    assert [unit.name for unit in effects.units] == ["reader", "writer"]
    patched = attribution_patching(decomposition, PROMPTS, tokens(3, seed=5), metric, components, n_checked=1)
    assert [unit.name for unit in patched.effects.units] == ["reader", "writer"]
    assert units_of(decomposition, components) == tuple(components)
    at_two = logits(decomposition, decomposition.ablate(reader.at(2)))
    torch.testing.assert_close(at_two[:, :2], logits(decomposition, [])[:, :2])


def test_components_are_a_sequence_with_names(components: Components) -> None:
    assert (len(components), components.names) == (2, ["reader", "writer"])
    assert components[1] is components["writer"] is list(components)[1]
    assert components.of_subcomponent(OUT, 2).name == "writer"
    assert components.only_groups().names == ["reader"]
    assert components.chosen(["writer", 0]).names == ["writer", "reader"]
    assert "reader" in str(components)
    assert "reader" in components._repr_html_()


def test_renaming_gives_others_and_keeps_the_first(components: Components) -> None:
    renamed = components.rename({"reader": "comma reader"})
    assert (renamed.names, components.names) == (["comma reader", "writer"], ["reader", "writer"])
    assert renamed["comma reader"] == components["reader"]
    with pytest.raises(KeyError, match="no component 'raeder'; near: 'reader'"):
        components.rename({"raeder": "x"})
    with pytest.raises(ValueError, match="two components are called 'writer'"):
        components.rename({"reader": "writer"})
    with pytest.raises(ValueError, match="a component is called ' '; expected a text"):
        components.rename({"reader": " "})


def test_what_was_found_becomes_components(decomposition: Decomposition) -> None:
    together = coactivation(decomposition, tokens(20), threshold=0.2)
    merging, runs = merge_subcomponents(together), ensemble(together, runs=3)
    for found in (merging, runs, leiden(together)):
        components = Components.of(decomposition, found)
        assert [set(unit.members) for unit in components] == [set(group) for group in found.groups]
        assert components[0].name == "component 0"
        assert json.dumps(components.how)
    fires = together.pair_counts().toarray().diagonal() > 0
    assert sum(len(unit.members) for unit in Components.of(decomposition, merging)) == fires.sum()
    first = Components.of(decomposition, merging).found[0]
    numbers = [together.number(*member) for member in merging.groups[0]]
    events = np.split(together.ids, together.starts[1:-1])
    assert first.rate == pytest.approx(np.mean([np.isin(own, numbers).any() for own in events]))
    assert Components.of(decomposition, runs).found[0].stability is not None


# -- saving ------------------------------------------------------------------------------------------------------------


def test_they_are_saved_beside_the_decomposition_and_loaded_with_it(
    decomposition: Decomposition, components: Components, tmp_path: Path
) -> None:
    saved = decomposition.save_pretrained(tmp_path / "saved")
    assert components.save(saved) == saved / "components.json"
    decomposition.save_pretrained(saved)  # a later save leaves the file alone
    loaded = Decomposition.from_pretrained(saved, tiny_transformer())
    again = Components.load(saved, loaded)
    assert (list(again), again.names, again.found) == (list(components), components.names, components.found)
    assert again.how == components.how == {"method": "by hand"}


def test_names_may_be_changed_in_the_file_and_nothing_else(
    decomposition: Decomposition, components: Components, tmp_path: Path
) -> None:
    path = components.save(tmp_path)
    text = path.read_text()
    path.write_text(text.replace('"writer"', '"full stops"'))
    assert Components.load(path, decomposition).names == ["reader", "full stops"]
    content = json.loads(text)
    content["names"]["given"] = ["one"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 names for 2 components"):
        Components.load(path, decomposition)
    content["names"]["given"] = ["same", "same"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="two components are called 'same'"):
        Components.load(path, decomposition)
    content = json.loads(text)
    content["components"][0]["members"][IN] = [1, 4]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged or was changed by hand"):
        Components.load(path, decomposition)
    path.write_text(text[:100])
    with pytest.raises(ValueError, match="is damaged"):
        Components.load(path, decomposition)


def test_components_of_another_decomposition_are_refused(
    decomposition: Decomposition, components: Components, tmp_path: Path, without_type_checks: None
) -> None:
    path = components.save(tmp_path)
    other = decomposed(seed=1)
    with pytest.raises(ValueError, match=r"belong to another decomposition \(V and U of blocks.0.mlp.W_in"):
        Components.load(path, other)
    for use in (lambda: other.ablate(components), lambda: ablation_effects(other, PROMPTS, metric, components)):
        with pytest.raises(ValueError, match="belong to another decomposition"):
            use()
    with torch.no_grad():
        decomposition[OUT].U.mul_(1.5)  # trained on, say
    with pytest.raises(ValueError, match=r"V and U of blocks.1.mlp.W_out"):
        decomposition.ablate(components)
    decomposition.remove()
    with pytest.raises(ValueError, match="was removed"):
        Components.load(path, decomposition)


def test_files_that_cannot_be_written_leave_what_was_there(components: Components, tmp_path: Path) -> None:
    path = components.save(tmp_path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="no room to write"):
            components.rename({"reader": "other"}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["components.json"]
    foreign = tmp_path / "notes.json"
    foreign.write_text("{}")
    with pytest.raises(ValueError, match="was not written as a spd_lens components"):
        components.save(foreign)
    with pytest.raises(ValueError, match="does not exist"):
        Components.load(tmp_path / "absent.json", decomposed())


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="a place that not even root may write to")
def test_a_read_only_directory_is_an_error(components: Components) -> None:
    with pytest.raises(OSError, match=r"/proc/sys/components.json cannot be written.*[Cc]hoose"):
        components.save(Path("/proc/sys"))


def test_bad_groups_are_named(decomposition: Decomposition, without_type_checks: None) -> None:
    with pytest.raises(ValueError, match=f"no decomposed site 'blocks.0.mlp.W_inn'; near: '{IN}'"):
        Components.of(decomposition, [{"blocks.0.mlp.W_inn": [0]}])
    with pytest.raises(ValueError, match=r"expected ids in 0\.\.7"):
        Components.of(decomposition, [{IN: [8]}])
    with pytest.raises(ValueError, match="there are no groups"):
        Components.of(decomposition, [])
    with pytest.raises(ValueError, match="1 names for 2 components"):
        Components.of(decomposition, GROUPS, names=["a"])
    with pytest.raises(TypeError, match=r"Components\.of was given a"):
        Components.of(decomposition.model, GROUPS)
    components = Components.of(decomposition, GROUPS)
    with pytest.raises(KeyError, match="no such site; near"):
        components.of_subcomponent("blocks.0.mlp.W_on", 1)
    with pytest.raises(KeyError, match="it never fired"):
        components.of_subcomponent(IN, 7)
    for outside in (2, -3):
        with pytest.raises(IndexError, match=rf"no component number {outside}; there are 2"):
            components[outside]
    for odd in (-3, True, 1.5):
        with pytest.raises(ValueError, match=rf"no component {odd}; expected a name, or a number in 0\.\.1"):
            components.chosen([odd])  # pyright: ignore[reportArgumentType]


def test_groups_that_were_found_in_another_decomposition_are_refused(decomposition: Decomposition) -> None:
    """Its sites and sizes are the same, so that every id exists here, too."""
    other, rows = decomposed(seed=1), tokens(8)
    together, elsewhere = coactivation(decomposition, rows), coactivation(other, rows)
    effects = coeffects(other, rows, {IN: [0, 1]}, threshold=1e-4)
    both = [together, coactivation(decomposition, tokens(8, seed=3))]
    for groups in (
        merge_subcomponents(elsewhere.between(1)),
        merge_subcomponents(effects),
        leiden(elsewhere),
        ensemble(elsewhere, runs=2),
    ):
        assert len(Components.of(other, groups))
        with pytest.raises(ValueError, match=r"these groups were found in another decomposition \(V and U of blocks"):
            Components.of(decomposition, groups)
    assert len(Components.of(decomposition, ensemble(both, runs=2)))
    assert len(Components.of(decomposition, merge_subcomponents(both[0] + both[1])))
    for mixed in (lambda: together + elsewhere, lambda: ensemble([together, elsewhere])):
        with pytest.raises(ValueError, match=r"counted in different decompositions \(V and U of blocks"):
            mixed()
    with torch.no_grad():
        other[OUT].U.mul_(1.1)  # trained on
    with pytest.raises(ValueError, match=r"V and U of blocks\.1\.mlp\.W_out differ"):
        Components.of(other, merge_subcomponents(elsewhere))


def test_importances_and_outputs_that_are_none_are_not_counted_as_off(decomposition: Decomposition) -> None:
    with torch.no_grad():
        decomposition[IN].V[:, 1] = torch.nan
    with pytest.raises(ValueError, match=r"without blocks\.0\.mlp\.W_in\[0\] the outputs are NaN"):
        coeffects(decomposition, PROMPTS, {IN: [0]})
    with torch.no_grad():
        next(iter(decomposition.host.model.embed.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's outputs are NaN on these data"):
        coeffects(decomposition, PROMPTS, {OUT: [0]})
    with pytest.raises(ValueError, match=r"importances of blocks\.0\.mlp\.W_in are NaN"):
        coactivation(decomposition, PROMPTS)

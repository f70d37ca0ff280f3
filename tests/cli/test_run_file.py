"""A run's file: whatever makes no sense in it is named with its line, its field and near names."""

from __future__ import annotations

from pathlib import Path

import pytest

from spd_lens import PGD, TrainConfig
from spd_lens.cli import ConfigError, RunFile, read_yaml

GOOD = """\
model: {name: tiny_lm}
decompose:
  sites:
    blocks.0.mlp.W_in: 16
data:
  text: moby_dick
  context: 16
train:
  steps: 20
  lr: 1e-3
  reconstructions:
    - {masks: stochastic}
    - masks: {type: PGD, steps: 3}
      coefficient: 0.5
"""


def _read(tmp_path: Path, text: str) -> RunFile:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return RunFile.read(path)


def test_a_file_says_what_python_says(tmp_path: Path) -> None:
    run = _read(tmp_path, GOOD)
    config = run.train_config
    assert config.steps == 20
    assert config.lr == 1e-3
    assert config.reconstructions[1].masks == PGD(steps=3)
    assert config.reconstructions[1].coefficient == 0.5
    assert config.minimality == TrainConfig().minimality
    assert run.decompose.sites == {"blocks.0.mlp.W_in": 16}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    run = _read(tmp_path, GOOD)
    run.write(tmp_path / "again.yaml")
    assert RunFile.read(tmp_path / "again.yaml") == run


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  steps: 20", "  stepps: 20", r"config\.yaml, line 9: train\.stepps: .*near: 'steps'"),
        ("  steps: 20", "  steps: twenty", r"line 9: train\.steps: .*whole number"),
        ("  steps: 20", "  steps: 0", r"line 9: train\.steps: .*1"),
        ("  lr: 1e-3", "  lr: -1", r"line 10: train\.lr: "),
        ("  lr: 1e-3", "  precision: bf17", r"line 10: train\.precision: 'bf17'; expected 'fp32' or 'bf16'"),
        ("masks: stochastic", "mask: stochastic", r"line 12: train\.reconstructions\.0\.mask: .*near: 'masks'"),
        ("masks: stochastic", "masks: stohastic", r"line 12: train\.reconstructions\.0\.masks: .*near: 'stochastic'"),
        ("type: PGD", "type: PDG", r"line 13: train\.reconstructions\.1\.masks\.type: 'PDG'.*near: 'PGD'"),
        ("  context: 16", "  contxt: 16", r"line 7: data\.contxt: .*near: 'context'"),
        ("  context: 16", "  context: 1", r"line 7: data\.context: 1; "),
        ("  text: moby_dick", "  text: moby", r"line 6: data\.text: 'moby'; .*near: 'moby_dick'"),
        ("  text: moby_dick", "  split: train", r"line 5: data: given none; expected one of text, files"),
        ("W_in: 16", "W_in: many", r"line 4: decompose\.sites\.blocks\.0\.mlp\.W_in: 'many'; .*integer"),
        ("W_in: 16", "W_in: 0", r"line 3: decompose\.sites: .*at least 1"),
        ("model: {name: tiny_lm}", "model: {nam: tiny_lm}", r"line 1: model\.name: is missing.*1 more"),
        ("model: {name: tiny_lm}", "modell: {name: tiny_lm}", r"config\.yaml, line 1: model: is missing"),
        ("  context: 16", "  text: moby_dick", r"line 7: data\.text stands twice \(first in line 6\)"),
        ("  context: 16", "  context: [16", r"line \d+: this is no YAML"),
    ],
)
def test_errors_name_line_field_and_near_names(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=expected):
        _read(tmp_path, GOOD.replace(old, new))


def test_a_field_of_the_evaluation_data_is_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 16: evaluate\.data\.spilt: .*near: 'split'"):
        _read(tmp_path, GOOD + "evaluate:\n  data: {spilt: held_out}\n")
    assert _read(tmp_path, GOOD + "evaluate:\n  data: {split: held_out}\n").evaluation_data.split == "held_out"


def test_fields_are_set_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    run = RunFile.read(path, ["train.steps=7", "data.exclude=[0, 1]", "decompose.sites={'blocks.1.mlp.W_in': 8}"])
    assert run.train_config.steps == 7
    assert run.data.exclude == [0, 1]
    assert run.decompose.sites == {"blocks.1.mlp.W_in": 8}
    for change, expected in (
        ("train.steps", "expected FIELD=VALUE"),
        ("train.stps=3", r"train\.stps: .*near: 'steps'"),
        ("out_dir.x.y=3", "out_dir: .*valid string"),
        ("train.steps=[", "is no YAML"),
    ):
        with pytest.raises(ConfigError, match=expected):
            RunFile.read(path, [change])


def test_files_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_yaml(tmp_path / "none.yaml")
    for text, expected in (("", "holds nothing"), ("- 1\n", "holds a list"), ("\x00", "no YAML|cannot be read")):
        path = tmp_path / "odd.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            read_yaml(path)


def test_what_is_for_streamed_data_alone_is_refused_elsewhere(tmp_path: Path) -> None:
    streamed = GOOD.replace("text: moby_dick", "files: [a.txt]\n  stream: true\n  shuffle: 8")
    assert _read(tmp_path, streamed).data.shuffle == 8
    for text, expected in (
        (GOOD.replace("moby_dick", "moby_dick\n  stream: true"), "stream: true with text"),
        (GOOD.replace("moby_dick", "moby_dick\n  shuffle: 8"), "add stream: true"),
        (streamed.replace("shuffle: 8", "max_rows: 8"), "read whole"),
    ):
        with pytest.raises(ConfigError, match=expected):
            _read(tmp_path, text)


def test_fields_that_the_origin_of_the_data_does_not_have_are_refused(tmp_path: Path) -> None:
    """A split of files would be read over, and what was trained on taken for held out."""
    files = GOOD.replace("text: moby_dick", "files: [a.txt]")
    for text, expected in (
        (files + "evaluate:\n  data: {split: held_out}\n", "split: held_out with files, .*give other files"),
        (files.replace("[a.txt]", "[a.txt]\n  column: words"), r"line 5: data: column: words with files"),
        (GOOD.replace("moby_dick", "moby_dick\n  revision: main"), r"revision: main with text, .*only for dataset"),
        (GOOD.replace("text: moby_dick", "tokens: a.npy\n  name: en"), "name: en with tokens"),
    ):
        with pytest.raises(ConfigError, match=expected):
            _read(tmp_path, text)


def test_data_to_evaluate_on_of_another_origin_have_nothing_of_the_first(tmp_path: Path) -> None:
    dataset = GOOD.replace("text: moby_dick", "dataset: books\n  split: part\n  column: words\n  stream: true")
    other = _read(tmp_path, dataset + "evaluate:\n  data: {files: [b.txt]}\n").evaluation_data
    assert (other.files, other.dataset, other.context) == (["b.txt"], None, 16)
    assert (other.split, other.column, other.stream) == ("train", "text", False)
    same = _read(tmp_path, dataset + "evaluate:\n  data: {split: rest}\n").evaluation_data
    assert (same.dataset, same.split, same.column, same.stream) == ("books", "rest", "words", True)

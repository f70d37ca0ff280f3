"""Shows for every kind of fault that its tests can fail: takes one mend out of a copy of the package and runs one test.

    python tests/house/see_fail.py            # all kinds
    python tests/house/see_fail.py 1 6        # some of them

The table of kinds is in tests/README.md. Status 0 if every test fails without its mend (and names a mend that is not
found any more).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mend:
    """`before` in `file` is what was mended, `after` takes the mend out, and `test` is to fail then."""

    kind: int
    file: str
    before: str
    after: str
    test: str


MENDS = (
    Mend(
        1, "training/belonging.py", 'if (found := difference(saved, now, ignore=("data",))) is not None:',
        "if (found := None) is not None:",
        "tests/training/test_run_files.py::test_another_model_decomposition_or_data_is_refused_by_name",
    ),
    Mend(
        2, "support/saved_pair.py", "return Path(os.path.realpath(path))", "return path",
        "tests/support/test_saved_pair.py::test_links_to_directories_and_to_files_are_followed",
    ),
    Mend(
        3, "training/run_files.py", "            path.mkdir()\n", "            path.mkdir(exist_ok=True)\n",
        "tests/training/test_run_files.py::test_runs_without_a_name_never_share_one",
    ),
    Mend(
        4, "training/run_files.py", "        if later:\n", "        if later and step < 0:\n",
        "tests/training/test_run_files.py::test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside",
    ),
    Mend(
        5, "training/conditions.py", "with torch.inference_mode(False), torch.enable_grad():", "if True:",
        "tests/training/test_conditions.py::test_gradients_that_are_switched_off_around_train_change_nothing",
    ),
    Mend(
        6, "core/pass_state.py", "class PassState(threading.local):", "class PassState:",
        "tests/core/test_passes.py::test_threads_under_one_ablation_get_what_each_would_get_alone",
    ),
    Mend(
        7, "core/decomposed_weight.py", "delta_point(self._ones(delta_point, a[..., :1]))",
        "delta_point(self._ones(delta_point, a[..., 0])).unsqueeze(-1)",
        "tests/core/test_borders.py::test_caches_are_sliced_as_those_of_the_whole_batch",
    ),
    Mend(
        8, "core/passes.py", "        return self._exact[key]\n", "        return True\n",
        "tests/core/test_passes.py::test_a_block_that_reads_more_than_the_residual_stream_is_never_entered",
    ),
    Mend(
        9, "core/inputs.py", "    return as_bool\n", "    return mask\n",
        "tests/data/test_batches.py::test_integers_become_int64_and_masks_of_ones_become_bool",
    ),
    Mend(
        10, "data/tokens.py", "if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):",
        "if not isinstance(texts, Iterable):",
        "tests/data/test_tokens.py::test_one_text_is_not_a_list_of_characters",
    ),
    Mend(
        11, "support/validated.py", "if not math.isfinite(number):", "if number is None:",
        "tests/circuits/test_config.py",
    ),
    Mend(
        12, "core/factored_weight.py",
        "return t.to(moved.device) if narrower and moved.dtype.itemsize < 4 else moved", "return moved",
        "tests/core/test_borders.py::test_subcomponents_stay_in_float32_when_the_model_is_cast",
    ),
    Mend(
        13, "data/processes.py", "            flat /= self.count\n", "",
        "tests/training/test_processes.py::test_two_and_four_processes_train_what_one_trains[stochastic]",
    ),
    Mend(
        14, "support/checked_json.py",
        "if not hmac.compare_digest(given, _checksum(whole, free).encode()):", "if not given:",
        "tests/support/test_fuzz_files.py::test_mutated_files_are_refused_or_harmless",
    ),
    Mend(
        15, "support/interrupts.py", "    if not callable(before):\n", "    if before is not None:\n",
        "tests/core/test_interrupts.py::test_a_signal_waits_until_the_work_is_done",
    ),
    Mend(
        15, "core/swap.py", "    except BaseException:\n        swap_out(host, sites)\n", "    except Exception:\n",
        "tests/core/test_interrupts.py::test_an_interrupt_at_any_line_of_the_swap_leaves_the_model_as_it_was",
    ),
    Mend(
        16, "support/pages.py", "    text = _HIDDEN.sub(", "    text = text or _HIDDEN.sub(",
        "tests/pictures/test_hostile.py::test_no_text_adds_an_element_or_reorders_a_page",
    ),
    Mend(
        17, "support/given.py", "if isinstance(number, bool) or not isinstance(number, Integral):", "if False:",
        "tests/house/test_all_mistakes.py::test_mistakes_are_named_in_words[judging]",
    ),
)  # fmt: skip


def fails_without(mend: Mend, folder: Path) -> bool:
    """Whether the test passes with the mend and fails without it, in a copy of the package in `folder`."""
    file = folder / "spd_lens" / mend.file
    text = (ROOT / "spd_lens" / mend.file).read_text()
    if text.count(mend.before) != 1:
        raise ValueError(f"kind {mend.kind}: {mend.before!r} stands {text.count(mend.before)} times in {mend.file}")
    file.write_text(text.replace(mend.before, mend.after))
    try:
        return _status(mend.test, folder) == 1
    finally:
        file.write_text(text)


def _status(test: str, folder: Path) -> int:
    environment = {**os.environ, "PYTHONPATH": str(folder), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=900).returncode


def main(kinds: list[int]) -> int:
    """The number of kinds whose test does not fail."""
    wrong = 0
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        for part in ("spd_lens", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for mend in MENDS:
            if not kinds or mend.kind in kinds:
                seen = fails_without(mend, folder)
                wrong += not seen
                print(
                    f"kind {mend.kind}: {'fails' if seen else 'DOES NOT FAIL'} without its mend: {mend.test}",
                    flush=True,
                )
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main([int(kind) for kind in sys.argv[1:]])))

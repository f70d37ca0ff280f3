"""Labels by a language model, against a stub of one on this machine: what is asked, scored, kept and refused."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from spd_lens.statistics import (
    Endpoint,
    Harvest,
    HarvestSettings,
    HarvestSums,
    MadeFrom,
    label_components,
    labels_for_pages,
    positions_of,
)

SITE, WORD = "W", 7


class Stub:
    """A server whose answers come from `answer(prompt)`; a number is a status to fail with."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[str], str | int] = knows
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                stub.prompts.append(prompt)
                stub.headers.append(dict(self.headers))
                found = stub.answer(prompt)
                status = found if isinstance(found, int) else 200
                text = {"choices": [{"message": {"content": found}}]} if status == 200 else {"error": "no"}
                content = json.dumps(text).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.server.server_port}/v1", "stub", key_variable="A_KEY", attempts=2)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    made = Stub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def contexts_of(prompt: str) -> list[str]:
    return [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', prompt, re.MULTILINE)]


def has_word(text: str) -> bool:
    return f" w{WORD} " in text + " "


def knows(prompt: str, label: str = "the word seven") -> str:
    """What a model would say that sees what the contexts have in common."""
    contexts = contexts_of(prompt)
    if "marked with" in prompt:
        return f'Sure: {{"label": "{label}", "confidence": 0.9, "reasons": "all have it"}}'
    if "Which of these" in prompt:
        fits = [i for i, text in enumerate(contexts, 1) if has_word(text) == ("the word seven" in prompt)]
        return json.dumps({"numbers": fits})
    return json.dumps({"number": next(i for i, text in enumerate(contexts, 1) if not has_word(text))})


@pytest.fixture(scope="module")
def found() -> Harvest:
    """Subcomponent 0 fires on the token 7 and nowhere else, 1 at random places, 2 never."""
    generator = torch.Generator().manual_seed(0)
    sums = HarvestSums({SITE: 3}, 40, HarvestSettings(before=3, after=2, random_k=20))
    tokens = torch.randint(0, 40, (60, 12), generator=generator)
    g = torch.zeros(60, 12, 3)
    g[..., 0] = (tokens == WORD).float()
    g[..., 1] = (torch.rand(60, 12, generator=generator) < 0.05).float()
    a = 1 + torch.rand(60, 12, 3, generator=generator)
    sums.add({SITE: g}, {SITE: a}, positions_of(tokens, None, None, sums.settings))
    sums.note_read(tokens)
    strings = {i: f" w{i}" for i in range(40)}
    return Harvest(sums, MadeFrom({"model": "none"}, "0" * 64), {}, strings)


def test_a_right_label_scores_one_and_contexts_without_anything_in_common_do_not(
    stub: Stub, found: Harvest, tmp_path: Path
) -> None:
    one, two = label_components(found, {SITE: [0, 1]}, stub.endpoint, tmp_path / "labels.jsonl")
    assert (one.label, one.confidence, one.reasons, one.provider) == ("the word seven", 0.9, "all have it", "stub")
    assert (one.detection, one.intruder) == (1.0, 1.0)
    assert two.detection is not None
    assert abs(two.detection - 0.5) <= 0.35
    assert labels_for_pages([one]) == {SITE: {0: "the word seven (detection 1.00)"}}


def test_a_wrong_label_scores_below_chance(stub: Stub, found: Harvest, tmp_path: Path) -> None:
    stub.answer = lambda prompt: knows(prompt, label="anything but that")
    (wrong,) = label_components(found, {SITE: [0]}, stub.endpoint, tmp_path / "labels.jsonl")
    assert wrong.detection == 0.0


def test_the_label_is_made_from_marked_contexts_and_scored_on_others_without_marks(
    stub: Stub, found: Harvest, tmp_path: Path
) -> None:
    label_components(found, {SITE: [0]}, stub.endpoint, tmp_path / "labels.jsonl", n_examples=4)
    first, detection = stub.prompts[0], stub.prompts[1]
    shown = contexts_of(first)
    assert len(shown) == 4
    assert all(f"« w{WORD}»" in text for text in shown)
    tested = contexts_of(detection)
    assert len(tested) == 8
    assert "«" not in detection
    assert sum(has_word(text) for text in tested) == 4
    assert not {text.replace("«", "").replace("»", "") for text in shown} & set(tested)


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(stub: Stub, found: Harvest, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    (first,) = label_components(found, {SITE: [0]}, stub.endpoint, path)
    with path.open("a") as file:
        file.write('{"site": "W", "id": 1, "la')  # what a kill leaves
    asked = len(stub.prompts)
    again = label_components(found, {SITE: [0, 1]}, stub.endpoint, path)
    assert again[0] == first
    assert len(stub.prompts) - asked == asked
    assert label_components(found, {SITE: [1, 0]}, stub.endpoint, path) == again[::-1]
    with pytest.raises(ValueError, match="something else than labels of this harvest with these settings"):
        label_components(found, {SITE: [0]}, stub.endpoint, path, n_examples=2)


def test_a_busy_server_is_asked_again_and_a_failing_one_named(stub: Stub, found: Harvest, tmp_path: Path) -> None:
    busy = iter([503])
    stub.answer = lambda prompt: next(busy, None) or knows(prompt)
    (one,) = label_components(found, {SITE: [0]}, stub.endpoint, tmp_path / "one.jsonl")
    assert one.detection == 1.0
    stub.answer = lambda prompt: 401
    with pytest.raises(ConnectionError, match="answered 401"):
        label_components(found, {SITE: [0]}, stub.endpoint, tmp_path / "two.jsonl")
    closed = Endpoint("http://127.0.0.1:9/v1", "none", attempts=1)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        closed.complete("hello")


@pytest.mark.parametrize("answer", ["", "no idea", "{", '{"label": 3}', "[1, 2]", '{"numbers": "all"}', "{" * 5000])
def test_answers_that_say_nothing_are_no_error(stub: Stub, found: Harvest, tmp_path: Path, answer: str) -> None:
    stub.answer = lambda prompt: answer
    (one,) = label_components(found, {SITE: [0]}, stub.endpoint, tmp_path / "labels.jsonl")
    assert (one.confidence, one.detection, one.intruder) == (None, 0.5, 0.0)


def test_the_key_comes_from_the_environment_and_goes_nowhere_in_the_clear(
    stub: Stub, found: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.endpoint.complete("marked with")
    assert "Authorization" not in stub.headers[-1]
    monkeypatch.setenv("A_KEY", "secret words")
    label_components(found, {SITE: [0]}, stub.endpoint, tmp_path / "labels.jsonl")
    assert stub.headers[-1]["Authorization"] == "Bearer secret words"
    assert "secret" not in (tmp_path / "labels.jsonl").read_text() + repr(stub.endpoint)
    with pytest.raises(ValueError, match="would send the key unencrypted; use https") as error:
        Endpoint("http://example.org/v1", "m", key_variable="A_KEY").complete("hello")
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match=r"base_url='file:///etc/passwd'; expected an address"):
        Endpoint("file:///etc/passwd", "m").complete("hello")


def test_what_never_fires_and_what_there_is_not_is_refused(stub: Stub, found: Harvest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="W 2 never fires, so there is nothing to label it by"):
        label_components(found, {SITE: [2]}, stub.endpoint, tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match=r"expected the id of a subcomponent, in 0\.\.2"):
        label_components(found, {SITE: [3]}, stub.endpoint, tmp_path / "labels.jsonl")
    assert not (tmp_path / "labels.jsonl").exists()

"""The page of a report: self-contained, no script, hostile text shown as text, two sheets of A4."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spd_lens.audit import AuditReport, audit_page
from spd_lens.models import CREDIT_ATTRIBUTES
from tests.audit.conftest import Audited, audited_cases

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = [
    "<script>document.title='broken'</script>", "</title><script>1</script>", '"><img src=x onerror=alert(1)>',
    "</style><script>1</script>", "<!--", "{{ 7 * 7 }}", "{% raw %}", "\u202egnp.exe", "a\x00b", "javascript:1",
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.seen


def test_the_page_needs_no_script_and_nothing_from_outside(audited: Audited, tmp_path: Path) -> None:
    page = audit_page(audited.report, tmp_path / "report.html").read_text(encoding="utf-8")
    tags = tags_of(page)
    assert not {"script", "iframe", "object", "embed", "img", "link", "form"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in tags for name in attrs)
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert "url(" not in page


def test_the_page_says_the_decision_every_reason_the_rest_and_the_limits(audited: Audited, tmp_path: Path) -> None:
    report = audited.report
    page = audit_page(report, tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.split("</style>")[1]))
    for wanted in ("declined", "What is not explained", "What this does not show", f"{report.rest.value:+.2f}"):
        assert wanted in text
    for reason in report.reasons:
        assert str(reason.place.words) in text
        assert f"{reason.effect:+.2f}" in text
    shown = [float(v) for v in re.findall(r'<td class="n">([+-]\d+\.\d\d)</td></tr>', page)]
    # Start, reasons and rest, as printed, add up to the margin as printed, but for rounding to two decimals.
    assert sum(shown[:-1]) == pytest.approx(shown[-1], abs=0.005 * len(shown) + 1e-9)


def test_a_report_shows_itself_as_the_sum_that_it_is(audited: Audited) -> None:
    report = audited.report.model_copy(update={"title": "<b>title"})
    text = str(report)
    numbers = [float(v) for v in re.findall(r"^ *([+-]\d+\.\d{3})  ", text, re.M)]
    assert len(numbers) == len(report.reasons) + 3
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.0005 * len(numbers) + 1e-9)
    assert all(reason.called in text for reason in report.reasons)
    assert "&lt;b&gt;title" in report._repr_html_()
    assert "<b>" not in report._repr_html_()
    assert len(repr(report)) < 120


def with_text(values: Any, text: str) -> Any:
    """The content of a report with `text` wherever data or a dictionary may put words."""
    if isinstance(values, list):
        return [with_text(v, text) for v in values]
    if not isinstance(values, dict):
        return values
    told = {"title", "model_name", "name", "says", "words", "instead", "outcome", "chosen_name", "other_name", "site"}
    found = {
        k: text if k in told and not isinstance(v, (float, dict)) else with_text(v, text) for k, v in values.items()
    }
    if "outcomes" in found:
        found["outcomes"] = {text: 3}
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_and_data_are_shown_as_text(audited: Audited, tmp_path: Path, text: str) -> None:
    plain = tags_of(audit_page(audited.report, tmp_path / "plain.html").read_text(encoding="utf-8"))
    hostile = AuditReport.model_validate(with_text(audited.report.model_dump(), text))
    page = audit_page(hostile, tmp_path / "hostile.html").read_text(encoding="utf-8")
    assert {tag for tag, _ in tags_of(page)} == {tag for tag, _ in plain}
    assert not any(name.startswith("on") for _, attrs in tags_of(page) for name in attrs)
    assert "\u202e" not in page
    assert "\x00" not in page
    if "7 * 7" in text:
        assert "{{ 7 * 7 }}" in page


def test_hostile_words_of_a_users_dictionary_reach_the_report_as_they_are(audited: Audited, tmp_path: Path) -> None:
    cases = audited_cases(dictionary=dict.fromkeys(CREDIT_ATTRIBUTES, HOSTILE[0]), outcomes=[HOSTILE[1]] * 150)
    report = audited.explain(cases=cases, title=HOSTILE[2])
    assert report.places[0].words == HOSTILE[0]
    assert AuditReport.load(report.save(tmp_path / "report.json")) == report
    page = audit_page(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert not {"script", "img"} & {tag for tag, _ in tags_of(page)}


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to print with")
def test_it_prints_to_two_pages_of_a4(audited: Audited, tmp_path: Path) -> None:
    page = audit_page(audited.report, tmp_path / "report.html")
    pdf = tmp_path / "report.pdf"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chrome'}",
               "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert 1 <= len(re.findall(rb"/Type\s*/Page[^s]", pdf.read_bytes())) <= 2

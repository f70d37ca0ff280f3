"""The page of a report: self-contained, no script, hostile text shown as text, two sheets of A4."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spd_lens.audit import audit_page
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


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_and_data_are_shown_as_text(audited: Audited, tmp_path: Path, text: str) -> None:
    plain = tags_of(audit_page(audited.report, tmp_path / "plain.html").read_text(encoding="utf-8"))
    cases = audited_cases(
        dictionary=dict.fromkeys(("duration", "credit history", "checking account", "savings"), text),
        vocabulary=[f"{text}{i}" for i in range(87)],
        places=[f"{text}{i}" for i in range(20)],
        outcomes=[text] * 150,
        outputs=["approved", "declined"],
    )
    report = audited.explain(cases=cases, title=text)
    page = audit_page(report, tmp_path / "hostile.html").read_text(encoding="utf-8")
    kinds = {tag for tag, _ in tags_of(page)}
    assert kinds <= {tag for tag, _ in plain}
    assert "\u202e" not in page
    assert "\x00" not in page
    assert "49" not in re.sub(r"[^4-9]", " ", page).split() or "7 * 7" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to print with")
def test_it_prints_to_two_pages_of_a4(audited: Audited, tmp_path: Path) -> None:
    page = audit_page(audited.report, tmp_path / "report.html")
    pdf = tmp_path / "report.pdf"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chrome'}",
               "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert 1 <= len(re.findall(rb"/Type\s*/Page[^s]", pdf.read_bytes())) <= 2

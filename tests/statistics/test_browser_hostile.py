"""Tokens, labels, sites and titles that mean to break out of the browser's pages are shown as text, and run nowhere."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from pathlib import Path

import pytest

from spd_lens.statistics import Harvest, inline_page
from spd_lens.support import shortened, visible
from tests.chromium import chromium, needs_chromium
from tests.pictures.test_hostile import PAYLOADS, Elements
from tests.statistics.browser_cases import hostile_harvest, small_harvest

PAGES = ["index", "component", "inline"]


@pytest.fixture(scope="module")
def found() -> Harvest:
    return small_harvest(top_k=2, random_k=1, per_band=1)


def page(kind: str, text: str, found: Harvest, folder: Path) -> str:
    hostile = hostile_harvest(text, found)
    labels = {name: dict.fromkeys(range(len(site)), text) for name, site in found.items()}
    if kind == "inline":
        return inline_page(hostile.contents(labels), title=text, max_pages=1)
    index = hostile.to_html(folder, title=text, labels=labels, max_pages=1)
    path = index if kind == "index" else next(iter(folder.glob("s*/*.html")))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def harmless(found: Harvest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """The elements of every page whose texts are harmless."""
    folder = tmp_path_factory.mktemp("harmless")
    return {kind: Elements(page(kind, "harmless", found, folder / kind)).found for kind in PAGES}


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_text_adds_an_element_or_a_script(
    kind: str, payload: str, found: Harvest, harmless: dict[str, list], tmp_path: Path
) -> None:
    written = page(kind, payload, found, tmp_path)
    hostile = Elements(written)
    assert hostile.found == harmless[kind]
    assert hostile.links == []
    before_data = written.split('<script type="application/json"')[0]
    assert not [c for c in html.unescape(before_data) if unicodedata.category(c) in ("Cf", "Cs") or c == "\0"]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', written, re.DOTALL)
    assert data is not None
    content = json.loads(data.group(1))
    inner = content["list"] if kind == "inline" else content
    assert set(inner["vocab"]) == {shortened(payload, 80)}
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', written)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'",
        policy.group(1),
    )


@needs_chromium
def test_chromium_shows_all_of_them_and_runs_none(found: Harvest, tmp_path: Path) -> None:
    ids = sorted(found.token_strings)
    strings = {i: PAYLOADS[k % len(PAYLOADS)] for k, i in enumerate(ids)}
    directions = {name: site.directions for name, site in found.items() if site.directions is not None}
    hostile = Harvest(found.sums, found.made_from, directions, strings)
    labels = {
        name: {c: PAYLOADS[(c + 17 * s) % len(PAYLOADS)] for c in range(len(site))}
        for s, (name, site) in enumerate(found.items())
    }
    index = hostile.to_html(tmp_path / "pages", title="harmless", labels=labels)
    inline = tmp_path / "inline.html"
    inline.write_text(inline_page(hostile.contents(labels), title="harmless", max_pages=30), encoding="utf-8")
    component = next(iter((tmp_path / "pages").glob("s1/*.html")))
    with chromium(tmp_path / "profile") as browser:
        browser.resize(1300, 3000)
        for path in (index, component, inline):
            browser.open(path)
            title = browser.do("document.title")
            if path != component:
                for key in ("g", "s", "s", "s", "s"):
                    browser.key(key)
                shown = browser.do("document.body.innerText")
                wanted = {
                    shortened(visible(text), 120).strip()
                    for name, own in labels.items()
                    for c, text in own.items()
                    if found[name].firing_rate[c] > 0 and len(text) < 100 and visible(text).strip()
                }
                missing = {text for text in wanted if " ".join(text.split()) not in " ".join(shown.split())}
                assert missing == set()
            if path != index:
                if path == inline:
                    browser.do("document.querySelector('.row').click()")
                for key in ("c", "2", "3", "1"):
                    browser.key(key)
                browser.do("document.querySelectorAll('th button').forEach(b=>b.click())")
                browser.do("$('png').click();$('json').click()")
            for kind in ("mouseover", "focus", "click"):
                browser.do(f"document.querySelectorAll('span,td').forEach(e=>e.dispatchEvent(new Event('{kind}')))")
            assert browser.do("document.title") == title
            tags = set(browser.do("[...document.querySelectorAll('*')].map(e=>e.tagName.toLowerCase())"))
            assert not {"img", "iframe", "b", "base", "link", "form"} & tags
            links = browser.do("[...document.querySelectorAll('[href]')].map(e=>e.getAttribute('href'))")
            assert all(re.fullmatch(r"(\.\./)?s\d+/\d+\.html(#[^\"]*)?|#", link) for link in links)
        assert browser.messages == []
        assert all(request.startswith(("file:", "blob:")) for request in browser.requests)


@needs_chromium
def test_a_hostile_address_and_hostile_stored_labels_change_nothing(found: Harvest, tmp_path: Path) -> None:
    index = found.to_html(tmp_path / "pages", title="harmless")
    with chromium(tmp_path / "profile") as browser:
        browser.open(index)
        key = f"spd_lens labels {found.made_from.decomposition}"
        for payload in PAYLOADS[:-1]:
            stored = json.dumps({f"{payload}\n3": payload, "blocks.1.mlp.W_in\n3": payload, "__proto__\n1": payload})
            browser.do(f"localStorage.setItem({json.dumps(key)},{json.dumps(stored)})")
            fragment = "&".join(
                f"{k}={{p}}" for k in ("sort", "site", "q", "in", "group", "dead", "at", "list", "kind")
            )
            encoded = payload.encode("utf-8", "replace").hex("%", 1)
            browser.open("about:blank")
            browser.open(index.as_uri() + "#" + fragment.replace("{p}", "%" + encoded))
            assert browser.do("document.title") == "harmless"
        browser.do(f"localStorage.setItem({json.dumps(key)},'not json')")
        browser.open("about:blank")
        browser.open(index)
        assert browser.do("document.querySelectorAll('.row').length") > 5
        assert browser.messages == []

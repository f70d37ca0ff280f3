"""The browser of components: what its files hold, and what Chromium makes of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from spd_lens.statistics import Harvest, read_labels, template_label, write_labels
from tests.chromium import Browser, chromium, needs_chromium
from tests.statistics.browser_cases import SITES, small_harvest

SITE = "blocks.1.mlp.W_in"


@pytest.fixture(scope="module")
def found() -> Harvest:
    return small_harvest()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def index(found: Harvest, tmp_path: Path) -> Path:
    return found.to_html(tmp_path / "pages", title="A small one", labels={SITE: {3: "the third", 5: "a fifth"}})


def data_of(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    return json.loads(data.group(1))


# -- files -------------------------------------------------------------------------------------------------------------


def test_every_subcomponent_is_listed_and_every_one_that_fires_has_a_page(found: Harvest, index: Path) -> None:
    data = data_of(index)
    assert data["sites"] == list(SITES)
    assert len(data["id"]) == sum(SITES.values())
    pages = {(int(p.parent.name[1:]), int(p.stem)) for p in index.parent.glob("s*/*.html")}
    fires = {(s, c) for s, name in enumerate(found) for c in range(SITES[name]) if found[name].fired[c] > 0}
    assert pages == fires
    assert {(s, c) for s, c, has in zip(data["site"], data["id"], data["page"], strict=True) if has} == fires
    row = 12 + 5
    assert data["rate"][row] == pytest.approx(float(found[SITE].firing_rate[5]), rel=5e-3)
    effect = found[SITE].effect
    assert effect is not None
    assert data["effect"][row] == pytest.approx(float(effect[5]), rel=5e-3)
    assert (data["label"][row], data["label"][7]) == ("a fifth", "")


def test_a_page_has_at_most_50_kb_also_where_contexts_are_long(tmp_path: Path) -> None:
    long = small_harvest(top_k=60, random_k=60, before=11, after=11)
    for number in list(long.token_strings):
        long.token_strings[number] = f"{number} a token of many letters and ü"
    index = long.to_html(tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.glob("s*/*.html")]
    assert max(sizes) <= 50_000
    data = data_of(next(iter(index.parent.glob("s0/*.html"))))
    assert len(data["contexts"]["top"]) > 3


def test_pages_name_nothing_to_load_or_to_go_to(index: Path) -> None:
    for path in index.parent.rglob("*.html"):
        text = re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"""(src|href|action)\s*=|https?://|@import|url\(""", text)
        assert "default-src 'none'" in text


def test_an_earlier_browser_is_replaced_and_other_files_are_not(found: Harvest, index: Path) -> None:
    others = [index.parent / "notes.txt", index.parent / "s0" / "mine.html"]
    for path in others:
        path.write_text("mine")
    found.to_html(index.parent, max_pages=2)
    assert len([p for p in index.parent.glob("s*/*.html") if p.stem.isdigit()]) == 2
    assert all(path.read_text() == "mine" for path in others)
    index.write_text("<html>my page</html>")
    with pytest.raises(ValueError, match=r"index.html is of something else; choose another directory"):
        found.to_html(index.parent)


def test_labels_are_written_read_and_checked(found: Harvest, tmp_path: Path) -> None:
    labels = {SITE: {3: "three", 17: "sieb\ud800zehn"}}
    path = write_labels(tmp_path / "labels.json", labels, decomposition_sha256=found.made_from.decomposition)
    assert read_labels(path) == labels
    assert data_of(found.to_html(tmp_path / "pages", labels=path))["label"][12 + 3] == "three"
    with pytest.raises(ValueError, match="holds labels of another decomposition"):
        read_labels(path, decomposition_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"labels name the site 'blocks.1.mlp.W_on'; near: 'blocks.1.mlp.W_in'"):
        found.to_html(tmp_path / "pages", labels={"blocks.1.mlp.W_on": {3: "x"}})
    with pytest.raises(ValueError, match=r"name subcomponent 20; expected ids in 0..19"):
        found.to_html(tmp_path / "pages", labels={SITE: {20: "x"}})
    path.write_text(path.read_text().replace('"17"', '"a17"'))
    with pytest.raises(ValueError, match="has the label 'a17'"):
        read_labels(path)


def test_a_template_label_names_the_tokens_that_matter(found: Harvest) -> None:
    site = found[SITE]
    c = site.most_used(1)[0]
    first = site.input_tokens(c, 1)[0]
    label = template_label(site, c, found.token_string)
    assert repr(found.token_string(first.token)) in label
    assert f"{first.precision:.0%}" in label
    silent = [c for c in range(len(site)) if not site.fired[c]]
    assert all(template_label(site, c, found.token_string) == "" for c in silent)


# -- in Chromium -------------------------------------------------------------------------------------------------------

ROWS = (
    "[...document.querySelectorAll('.row')].sort((a,b)=>a.dataset.row-b.dataset.row).map(e=>e.children[1].textContent)"
)


def address(browser: Browser) -> dict[str, str]:
    return {k: v[0] for k, v in parse_qs(urlparse(browser.do("location.href")).fragment).items()}


def choose(browser: Browser, control: str, value: str) -> None:
    kind = "input" if control == "q" else "change"
    browser.do(f"{{const e=$('{control}');e.value={json.dumps(value)};e.dispatchEvent(new Event('{kind}'))}}")


@needs_chromium
def test_the_list_sorts_searches_filters_and_groups_and_the_address_says_how(
    browser: Browser, found: Harvest, index: Path
) -> None:
    browser.resize(1300, 3000)
    browser.open(index)
    data = data_of(index)
    every = range(len(data["id"]))
    name = [f"{data['sites'][data['site'][i]]} · {data['id'][i]}" for i in every]
    fires = [i for i in every if data["rate"][i] > 0]
    for key in ("rate", "importance", "effect", "activation"):
        choose(browser, "sort", "use" if key == "rate" else key)
        expected = sorted(fires, key=lambda i: (-data[key][i], -data["rate"][i], i))
        assert browser.do(ROWS) == [name[i] for i in expected], key
    choose(browser, "sort", "unlabelled")
    assert set(browser.do(ROWS)[-2:]) == {f"{SITE} · 3", f"{SITE} · 5"} & {name[i] for i in fires}
    assert address(browser) == {"sort": "unlabelled"}

    choose(browser, "sort", "use")
    choose(browser, "site", "1")
    assert browser.do(ROWS) == [
        name[i] for i in sorted(fires, key=lambda i: (-data["rate"][i], i)) if data["site"][i] == 1
    ]
    choose(browser, "site", "")
    choose(browser, "q", "a FIFTH")
    assert browser.do(ROWS) == [f"{SITE} · 5"]
    choose(browser, "in", "tokens")
    assert browser.do(ROWS) == []
    token = data["vocab"][data["tokens"][fires[0]][0]]
    choose(browser, "q", token)
    having = {
        name[i] for i in fires if any(token in data["vocab"][t] for t in data["tokens"][i] + data["predicted"][i])
    }
    assert set(browser.do(ROWS)) == having
    browser.do("$('group').click()")
    groups = browser.do("[...document.querySelectorAll('.group')].map(e=>e.textContent)")
    assert len(groups) == len({data["tokens"][i][0] for i in fires if name[i] in having})
    assert address(browser) == {"q": token, "in": "tokens", "group": "1"}

    # Opened anew at that address, it shows the same.
    there = browser.do("location.href")
    browser.open("about:blank")
    browser.open(there)
    assert browser.do("[...document.querySelectorAll('.group')].map(e=>e.textContent)") == groups
    assert set(browser.do(ROWS)) == having
    assert browser.messages == []


@needs_chromium
def test_the_keyboard_leads_from_the_list_to_a_component_and_back(browser: Browser, index: Path) -> None:
    browser.resize(1300, 700)
    browser.open(index)
    choose(browser, "site", "1")
    names = browser.do(ROWS)
    browser.key("j")
    browser.key("ArrowDown")
    browser.key("k")
    assert address(browser) == {"site": "1", "at": "1"}
    browser.key("Enter", opens=True)
    assert browser.do("document.title") == names[1]
    browser.key("c")
    browser.key("2")
    assert {k: v for k, v in address(browser).items() if k != "list"} == {"colour": "activation", "kind": "random"}
    browser.key("ArrowRight", opens=True)
    assert browser.do("document.title") != names[1]
    assert browser.do("$('by_activation').className") == "on"
    browser.key("ArrowLeft", opens=True)
    assert browser.do("document.title") == names[1]
    browser.key("b", opens=True)
    assert address(browser) == {"site": "1", "at": "1"}
    browser.key("/")
    browser.type("fifth")
    assert browser.do(ROWS) == [f"{SITE} · 5"]
    browser.key("Escape")
    browser.key("Enter", opens=True)
    assert browser.do("document.title") == f"{SITE} · 5"
    assert browser.messages == []


@needs_chromium
def test_a_component_shows_what_was_counted(browser: Browser, found: Harvest, index: Path) -> None:
    site = found[SITE]
    c = site.most_used(1)[0]
    browser.resize(1300, 1500)
    browser.open(index.parent / "s1" / f"{c}.html")
    text = browser.do("document.body.innerText")
    for title in ("In numbers", "Tokens it fires on", "Tokens predicted there", "Similar directions", "Where it fires"):
        assert title in text
    assert f"{int(site.fired[c]):,}" in text
    examples = site.examples(c)
    token = "e=>[e.textContent,e.title,e.style.background,e.className]"
    contexts = browser.do(
        f"[...document.querySelectorAll('#contexts .text')].map(d=>[...d.querySelectorAll('.t')].map({token}))"
    )
    assert len(contexts) == len(examples)
    for shown, example in zip(contexts, examples, strict=True):
        assert [word for word, *_ in shown] == [found.token_string(t) for t in example.tokens]
        assert [i for i, (*_, kind) in enumerate(shown) if kind == "t c"] == [example.at]
        for (_, title, background, _), g in zip(shown, example.importances, strict=True):
            assert f"importance {round(g, 2):g}" in title
            assert bool(background) == (round(g, 2) > 0.02)
    browser.do("$('by_activation').click()")
    strongest = browser.do("document.querySelector('#contexts .c').style.background")
    assert re.search(r"var\(--(pos|neg)\)", strongest)
    assert browser.messages == []


@needs_chromium
def test_labels_that_are_typed_are_kept_listed_and_exported_and_imported(
    browser: Browser, found: Harvest, index: Path, tmp_path: Path
) -> None:
    browser.downloads(tmp_path)
    c = found[SITE].most_used(1)[0]
    browser.open(index.parent / "s1" / f"{c}.html")
    browser.key("e")
    browser.type("my <b>own</b> label")
    assert browser.do("document.activeElement.id") == "label"
    browser.do("$('labels').click()")
    assert (
        read_labels(tmp_path / "labels.json") == {SITE: {c: "my <b>own</b> label"}}
        if browser.downloaded(tmp_path / "labels.json")
        else False
    )
    (tmp_path / "labels.json").unlink()
    browser.open(index)
    choose(browser, "q", "own</b>")
    assert browser.do("document.querySelector('.row .lab').textContent") == "my <b>own</b> label"
    browser.do("$('export').click()")
    browser.downloaded(tmp_path / "labels.json")
    exported = read_labels(tmp_path / "labels.json", decomposition_sha256=found.made_from.decomposition)
    assert exported == {SITE: {3: "the third", 5: "a fifth", c: "my <b>own</b> label"}}
    path = tmp_path / "labels.json"
    path.write_text(path.read_text().replace("my <b>own</b> label", "read again"))
    node = browser.send("DOM.getDocument")["root"]["nodeId"]
    chosen = browser.send("DOM.querySelector", nodeId=node, selector="#import")["nodeId"]
    browser.send("DOM.setFileInputFiles", nodeId=chosen, files=[str(path)])
    browser.wait("$('message').textContent==='3 labels read'")
    choose(browser, "q", "read again")
    assert browser.do(ROWS) == [f"{SITE} · {c}"]
    browser.do("localStorage.clear()")
    assert browser.messages == []


@needs_chromium
def test_a_page_gives_itself_as_json_and_as_a_picture(
    browser: Browser, found: Harvest, index: Path, tmp_path: Path
) -> None:
    browser.downloads(tmp_path)
    c = found[SITE].most_used(1)[0]
    path = index.parent / "s1" / f"{c}.html"
    browser.open(path)
    browser.do("$('json').click()")
    assert json.loads(browser.downloaded(tmp_path / f"component_{c}.json")) == data_of(path)
    browser.do("$('png').click()")
    picture = browser.downloaded(tmp_path / f"component_{c}.png")
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20], "big")
    assert width == 2000


@needs_chromium
def test_light_and_dark_follow_the_system_until_one_is_chosen(browser: Browser, index: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    browser.dark(False)
    browser.open(index)
    assert browser.do(background) == "rgb(255, 255, 255)"
    browser.dark()
    assert browser.do(background) == "rgb(22, 22, 27)"
    browser.do("$('theme').click()")
    assert browser.do(background) == "rgb(255, 255, 255)"
    browser.dark(False)
    browser.do("$('theme').click()")
    browser.open(next(index.parent.glob("s1/*.html")))
    assert browser.do(background) == "rgb(22, 22, 27)"
    browser.do("localStorage.clear()")


@needs_chromium
def test_ten_thousand_are_listed_in_under_a_second(browser: Browser, tmp_path: Path) -> None:
    from benchmarks.browser import synthetic_harvest

    index = synthetic_harvest(n_subcomponents=10_000, d_vocab=2048, seed=0, n_batches=1).to_html(tmp_path, max_pages=0)
    best = float("inf")
    for _ in range(3):
        browser.open("about:blank")
        started = time.perf_counter()
        browser.open(index)
        shown = browser.do("document.querySelectorAll('.row').length")
        best = min(best, time.perf_counter() - started)
    assert best < 1.0
    assert 10 < shown < 200
    assert browser.do("$('dead').checked||!!$('dead').click()||$('count').textContent").startswith("10,000 of 10,000")
    browser.do("started=performance.now()")
    choose(browser, "sort", "importance")
    assert browser.do("performance.now()-started") < 1000

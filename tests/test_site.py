"""The docs site, as `make docs` left it in _site/: read in a real browser, wide and narrow, light and dark."""

import importlib
import json
import re
import tempfile
from pathlib import Path

import pytest
from browser import chromium, served

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_site"
PAGES = sorted(
    p.name for p in SITE.glob("*.html") if p.name not in ("search.html", "genindex.html")
)
SHOTS = Path(tempfile.gettempdir()) / "ddpm_nb-screenshots"
WIDTHS = {"wide": 1300, "phone": 390}


@pytest.fixture(scope="module")
def build():
    """docs/build.py as a module."""
    return importlib.import_module("build")


@pytest.fixture(scope="module")
def pages():
    """docs/pages.py as a module."""
    return importlib.import_module("pages")


@pytest.fixture(scope="module")
def site():
    with served(SITE) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser, site):
    """A tab that notes what goes wrong in it."""
    context = browser.new_context(viewport=dict(width=1300, height=900))
    tab = context.new_page()
    tab.wrong = []
    tab.on(
        "console", lambda m: tab.wrong.append(f"console: {m.text}") if m.type == "error" else None
    )
    tab.on("pageerror", lambda e: tab.wrong.append(f"script: {e}"))
    tab.on("requestfailed", lambda r: tab.wrong.append(f"failed: {r.url}"))
    tab.on(
        "response", lambda r: tab.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None
    )
    tab.on(
        "request",
        lambda r: (
            None
            if r.url.startswith((site, "data:", "blob:"))
            else tab.wrong.append(f"asks {r.url}")
        ),
    )
    yield tab
    context.close()


def open_page(tab, url):
    """Opens a page and waits until its formulas are set."""
    tab.goto(url)
    if tab.locator("script[src*=tex-svg]").count():
        tab.wait_for_function(
            "window.MathJax && MathJax.startup && MathJax.startup.promise", timeout=60_000
        )
        tab.evaluate("MathJax.startup.promise.then(() => true)")


# What the reader sees, without code and set formulas.
SEEN = """() => {
  const copy = document.querySelector("article").cloneNode(true);
  copy.querySelectorAll("pre, code, script, style, mjx-container, .headerlink, .animation").forEach(e => e.remove());
  return copy.textContent;
}"""

# Elements of the article that stick out of the page and cannot be scrolled to by themselves.
TOO_WIDE = """() => {
  const wide = [];
  for (const e of document.querySelectorAll("article *")) {
    const box = e.getBoundingClientRect();
    if (!box.width || box.right <= document.documentElement.clientWidth + 1) continue;
    let up = e, scrolls = false;
    while ((up = up.parentElement) && up.tagName != "ARTICLE")
      scrolls = scrolls || ["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX);
    if (!scrolls && !["auto", "scroll"].includes(getComputedStyle(e).overflowX)) wide.push(e.outerHTML.slice(0, 150));
  }
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth + 1) wide.push("the page itself");
  return wide;
}"""

RAW = re.compile(
    r"\$|\\[a-zA-Z]{2,}|#\||:::|\]\(|\*\*|(?m:^ *\|.*\|)|\{(?:toctree|note|tip|warning)\}|show_doc"
)


def test_site_is_built():
    assert PAGES, "no _site/: run `make docs` first"
    assert len(PAGES) == 1 + len(list((ROOT / "nbs").glob("*.ipynb"))), PAGES


@pytest.mark.parametrize("page", PAGES)
def test_page_reads_well(tab, site, page):
    open_page(tab, f"{site}/{page}")
    assert not (found := RAW.findall(tab.evaluate(SEEN))), f"raw text left on {page}: {found}"
    assert tab.locator("mjx-merror").count() == 0
    SHOTS.mkdir(exist_ok=True)
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        for name, width in WIDTHS.items():
            tab.set_viewport_size(dict(width=width, height=900))
            assert tab.evaluate("document.documentElement.dataset.theme") == scheme
            assert tab.evaluate(TOO_WIDE) == [], f"{page} at {width} px"
            tab.screenshot(path=SHOTS / f"{page[:-5]}-{name}-{scheme}.png", full_page=True)
    pictures = tab.evaluate(
        "[...document.querySelectorAll('article img')].map(i => [i.src.slice(-40), i.complete && i.naturalWidth > 0, i.alt])"
    )
    for src, there, alt in pictures:
        assert there and len(alt) > 15 and "_images" not in alt, (
            f"{page}: picture {src}, alt {alt!r}"
        )
    assert tab.wrong == []


def test_the_checks_can_fail(tab, site):
    open_page(tab, f"{site}/index.html")
    tab.evaluate(
        "document.querySelector('article').insertAdjacentHTML('beforeend', '<div style=\"width:3000px\">$x$</div>')"
    )
    assert tab.evaluate(TOO_WIDE) and RAW.findall(tab.evaluate(SEEN))
    tab.evaluate("fetch('nowhere.html')")
    tab.wait_for_timeout(300)
    assert any("404" in w for w in tab.wrong)


def test_search_finds_symbols_and_words(tab, site):
    for words, leads_to in (
        ("sample_prev_timestep", "scheduler.html#"),
        ("Tweedie", "sampling.html"),
    ):
        tab.goto(f"{site}/search.html?q={words}")
        tab.wait_for_selector("ul.search li a")
        tab.wait_for_load_state("networkidle")  # the excerpts
        hrefs = tab.eval_on_selector_all(
            "ul.search li a", "l => l.map(a => a.getAttribute('href'))"
        )
        assert any(leads_to in h for h in hrefs), (words, hrefs)
    tab.goto(f"{site}/search.html?q=sample_prev_timestep")
    tab.wait_for_selector("ul.search li a")
    tab.wait_for_load_state("networkidle")
    tab.locator("ul.search li a[href*='scheduler.html#']").first.click()
    tab.wait_for_load_state()
    assert "scheduler.html" in tab.url
    assert tab.locator("h3", has_text="sample_prev_timestep").first.is_visible()
    assert tab.wrong == []


def test_symbol_link_lands_on_its_anchor(tab, site):
    open_page(tab, f"{site}/sampling.html")
    link = tab.locator(
        "article p a", has=tab.locator("code", has_text="sample_prev_timestep")
    ).first
    link.click()
    tab.wait_for_load_state()
    tab.wait_for_timeout(500)
    assert tab.url.endswith("scheduler.html#noisescheduler.sample_prev_timestep")
    box = tab.locator("h3", has_text="sample_prev_timestep").first.bounding_box()
    assert -60 < box["y"] < 700


@pytest.mark.parametrize(
    "page", [p for p in PAGES if 'class="animation"' in (SITE / p).read_text(encoding="utf-8")]
)
def test_players_play(tab, site, page):
    open_page(tab, f"{site}/{page}")
    assert tab.locator(".animation").count() == 1
    tab.locator(".animation").scroll_into_view_if_needed()
    frame = "document.querySelector('.animation img').src"
    tab.wait_for_function(f"{frame}.startsWith('data:')")
    seen = {tab.evaluate(frame)}
    for title in ("Play", "Next frame", "Last frame", "First frame", "Play"):
        tab.locator(f".animation button[title='{title}']").click()
        tab.wait_for_timeout(600)
        seen.add(tab.evaluate(frame))
    assert len(seen) >= 3 and tab.wrong == []
    tab.set_viewport_size(dict(width=390, height=800))
    for part in ("img", ".anim-buttons button[title='Increase speed']"):
        box = tab.locator(f".animation {part}").bounding_box()
        assert box["x"] + box["width"] <= 390


def test_book_reads_from_front_to_back(tab, site):
    seen = ["index.html"]
    tab.goto(f"{site}/index.html")
    while tab.locator("a.right-next").count():
        tab.locator("a.right-next").click()
        tab.wait_for_load_state("domcontentloaded")
        seen.append(tab.url.split("/")[-1])
        assert tab.locator("a.left-prev").count() == 1
        links = tab.locator("p.page-links a").all_inner_texts()
        assert seen[-1] == "api.html" or links[:2] == ["Notebook", "Open in Colab"]
    assert sorted(seen) == PAGES and seen[1] == "tour.html"


def test_cheat_sheet_prints_on_two_sides(tab, site, tmp_path):
    open_page(tab, f"{site}/cheat_sheet.html")
    sheet = tab.pdf(path=tmp_path / "sheet.pdf", format="A4", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", sheet)) == 2


def test_every_public_name_has_an_entry():
    text = (SITE / "api.html").read_text(encoding="utf-8")
    for p in (ROOT / "ddpm_nb").glob("[a-z]*.py"):
        for name in importlib.import_module(f"ddpm_nb.{p.stem}").__all__:
            assert f'<span class="pre">{name}</span>' in text, name


def test_links_are_followed(build, tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="x"></p><a href="b.html#y">1</a><a href="b.html#z">2</a><a href="a.html#x">3</a>'
    )
    (tmp_path / "b.html").write_text(
        '<p id="y"></p><img src="no.png"><a href="c.html">4</a><a href="https://elsewhere.org">5</a>'
    )
    assert build.broken_links(tmp_path) == ["a.html: b.html#z", "b.html: c.html", "b.html: no.png"]


def test_symbols_are_linked_or_refused(pages):
    url = "site:scheduler.html#noisescheduler.add_noise"
    assert pages.link_symbols("as `add_noise` does", "p") == f"as [`add_noise`]({url}) does"
    assert (
        pages.link_symbols("as `NoiseScheduler.add_noise()` does", "p")
        == f"as [`NoiseScheduler.add_noise()`]({url}) does"
    )
    for plain in (
        "`torch.nn`",
        "`x0`",
        "`a.b`",
        "`NoiseScheduler.alpha_cumprod`",
        "[`add_noise`](elsewhere)",
    ):
        assert pages.link_symbols(plain, "p") == plain
    for wrong in ("`ddpm_nb.nothing`", "`ddpm_nb.scheduler.Nothing`", "`NoiseScheduler.add_nose`"):
        with pytest.raises(SystemExit, match="not a name of this package"):
            pages.link_symbols(wrong, "p")


def test_markdown_for_the_site(pages):
    files = {"01_scheduler.ipynb": "scheduler", "p": "page"}
    text = pages.markdown(
        "See [it](01_scheduler.ipynb#One-reverse-step).\n\n> **Tip:** two\n> lines\n\n```\n`add_noise`\n```",
        files,
        "p",
    )
    assert "[it](site:scheduler.html#one-reverse-step)" in text
    assert "[there](site:page.html#all-alike)" in pages.markdown("[there](#All-alike)", files, "p")
    assert ":::{tip}\ntwo\nlines\n:::" in text
    assert "```\n`add_noise`\n```" in text
    assert "\n\n$$\nx\n$$\n\n" in pages.markdown("it is\n$$x$$\nthen", files, "p")


def test_text_for_quarto():
    text = importlib.import_module("quarto").for_quarto(
        "![a](../figures/b.png)\n\n> **Note:** one\n> two\n\nthen"
    )
    assert text == "![a](figures/b.png)\n\n::: {.callout-note}\none\ntwo\n:::\n\nthen"


def test_notebooks_of_the_site_are_the_books():
    for p in (ROOT / "nbs").glob("*.ipynb"):
        assert json.loads((SITE / "nbs" / p.name).read_text()) == json.loads(p.read_text()), p.name

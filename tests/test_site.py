"""The docs site, as `make docs` left it in _site/: read in a real browser, wide and narrow, light and dark."""

import importlib
import json
import re
from pathlib import Path

import pytest
from browser import chromium, served

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_site"
PAGES = sorted(
    p.name for p in SITE.glob("*.html") if p.name not in ("search.html", "genindex.html")
)
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
  copy.querySelectorAll("pre, code, script, style, mjx-container, .headerlink, .player").forEach(e => e.remove());
  return copy.textContent;
}"""

# What a reader cannot see or can see only by luck, as lines of text. Nothing may stick out of the window or be cut: a box that
# hides what is too wide for it (overflow: hidden) is no better than the window's edge. What scrolls in a box of its own must
# fade where there is more of it; on a wide window nothing has to scroll, but code of more than 100 columns.
CUT = """(wide) => {
  const found = [], edge = document.documentElement.clientWidth + 1;
  const say = (what, e) => found.push(`${what}: ${e.outerHTML.slice(0, 150)}`);
  const seen = e => e.getClientRects().length && e.checkVisibility({ visibilityProperty: true });
  const overflow = e => getComputedStyle(e).overflowX;
  const sidebars = ", nav.page-toc *, .bd-sidebar-primary nav *";  // on a phone they are drawers
  const scrolls = e => ["auto", "scroll"].includes(overflow(e));
  for (const e of document.querySelectorAll(`article *${wide ? sidebars : ""}`)) {
    if (!seen(e) || e.parentElement.closest("svg") || e.closest("mjx-assistive-mml, .headerlink, .visually-hidden")) continue;
    const box = e.getBoundingClientRect();
    let up = e.parentElement, inside = null;            // the nearest box that cuts or scrolls
    while (up && overflow(up) == "visible") up = up.parentElement;
    inside = up && up != document.body && up != document.documentElement ? up : null;
    if (inside && !scrolls(inside) && box.right > inside.getBoundingClientRect().right + 1) say("hidden", e);
    if (!inside && box.right > edge) say("sticks out", e);
    if (inside && scrolls(inside) && inside.matches(".bd-content, .bd-sidebar, .bd-sidebar *, .bd-sidebar-secondary, .bd-main, .bd-article-container")
        && box.right > Math.min(edge, inside.getBoundingClientRect().right + 1)) say("sticks out", e);
    if (e.closest("article") && scrolls(e) && e.scrollWidth > e.clientWidth + 2) {
      const longest = e.tagName == "PRE" ? Math.max(...e.textContent.split("\\n").map(l => l.length)) : 0;
      if (wide && longest <= 100) say("has to scroll", e);
      if (getComputedStyle(e).maskImage == "none") say("scrolls without a hint", e);
    }
  }
  for (const e of document.querySelectorAll("nav.page-toc a"))
    if (wide && seen(e) && e.scrollWidth > e.clientWidth + 1) say("contents cut", e);
  for (const e of document.querySelectorAll("article img")) {
    const shrunk = e.getBoundingClientRect().width / e.naturalWidth;
    if (seen(e) && e.naturalWidth > 640 && shrunk < 0.5) say(`drawn at ${shrunk.toFixed(2)}`, e);
  }
  if (document.documentElement.scrollWidth > edge) found.push("the page itself");
  return found;
}"""


def what_is_cut(tab, width):
    """What CUT says once the page has settled: book.js hears of a new width a moment later."""
    for _ in range(20):
        if not (found := tab.evaluate(CUT, width > 1200)):
            break
        tab.wait_for_timeout(200)
    return found


# In the dark: the ground and the frame of each figure, which are white and none.
FRAMES = """() => [...document.querySelectorAll("article img, article .output.text_html")].filter(e => {
  const s = getComputedStyle(e), player = e.matches(".text_html");
  return s.padding != "0px" || !(player ? ["rgba(0, 0, 0, 0)"] : ["rgb(255, 255, 255)"]).includes(s.backgroundColor);
}).map(e => e.outerHTML.slice(0, 150))"""

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
    assert tab.locator("nav.page-toc a:visible").count() <= 40
    assert tab.evaluate(STACKED) == []
    for width in WIDTHS.values():
        tab.set_viewport_size(dict(width=width, height=900))
        assert what_is_cut(tab, width) == [], f"{page} at {width} px"
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    assert tab.evaluate(FRAMES) == [], f"{page}: frames around figures in the dark"
    pictures = tab.evaluate(
        "[...document.querySelectorAll('article img')].map(i => [i.src.slice(-40), i.complete && i.naturalWidth > 0, i.alt])"
    )
    for src, there, alt in pictures:
        assert there and len(alt) > 15 and "_images" not in alt, (
            f"{page}: picture {src}, alt {alt!r}"
        )
    assert tab.wrong == []


# Names of code that stand one under the other with nothing between.
STACKED = """[...document.querySelectorAll("article section:has(> h3 code) + section:has(> h3 code)")]
  .filter(e => !e.previousElementSibling.querySelector("pre")).map(e => e.id)"""


WIDE = '<div style="width:3000px">wide</div>'
DEFECTS = {  # what is planted at the end of a page -> what is said of it, on a wide window and on a phone
    WIDE: ("sticks out", "sticks out"),
    f'<div style="overflow:hidden">{WIDE}</div>': ("hidden", "hidden"),
    f'<div style="overflow-x:auto">{WIDE}</div>': ("without a hint", "without a hint"),
    f'<div class="more" style="overflow-x:auto">{WIDE}</div>': ("has to scroll", None),
    '<div class="highlight"><pre>' + "x" * 100 + "</pre></div>": (None, None),
    '<div class="highlight"><pre style="font-size:20px">' + "x" * 100 + "</pre></div>": (
        "has to scroll",
        None,
    ),
}


@pytest.mark.parametrize("planted", DEFECTS)
def test_what_is_cut_is_seen(tab, site, planted):
    open_page(tab, f"{site}/index.html")
    for (name, width), expected in zip(WIDTHS.items(), DEFECTS[planted], strict=True):
        tab.set_viewport_size(dict(width=width, height=900))
        tab.reload()
        script = "html => document.querySelector('article section').insertAdjacentHTML('beforeend', html)"
        tab.evaluate(script, planted)
        if "<pre" in planted:  # what book.js does for what was there when it looked
            tab.evaluate(
                "document.querySelectorAll('article pre').forEach(e => e.classList.add('more'))"
            )
        found = tab.evaluate(CUT, width > 1200)
        if expected:
            assert any(expected in f for f in found), (name, found)
        else:
            assert found == [], name


@pytest.mark.parametrize(
    "rule, width, said",
    [
        (
            ".sidebar-secondary-item { min-width: auto } nav.page-toc * { white-space: nowrap !important }",
            1300,
            "sticks out",
        ),
        (
            "nav.page-toc a { overflow: hidden; width: 5rem } nav.page-toc * { white-space: nowrap !important }",
            1300,
            "contents cut",
        ),
        (".bd-article pre { font-size: 1rem !important }", 1300, "has to scroll"),
        (".more { mask-image: none !important }", 390, "without a hint"),
        (".bd-article .wide img { min-width: 0 !important }", 390, "drawn at"),
        ("mjx-container { overflow: hidden !important }", 390, "hidden"),
    ],
)
def test_each_old_defect_is_seen(tab, site, rule, width, said):
    tab.set_viewport_size(dict(width=width, height=900))
    open_page(tab, f"{site}/scheduler.html")
    tab.add_style_tag(content=rule)
    tab.wait_for_timeout(200)
    assert any(said in f for f in tab.evaluate(CUT, width > 1200))


def test_a_frame_in_the_dark_is_seen(tab, site):
    tab.emulate_media(color_scheme="dark")
    open_page(tab, f"{site}/plot.html")
    assert tab.evaluate(FRAMES) == []
    for rule in (
        "img { padding: 8px !important }",
        ".text_html { background: #ced6dd !important }",
    ):
        tab.add_style_tag(content=f"html[data-theme] .bd-content .bd-article:not(#x) {rule}")
        assert tab.evaluate(FRAMES)
        tab.reload()


def test_other_checks_can_fail(tab, site):
    open_page(tab, f"{site}/index.html")
    tab.evaluate("document.querySelector('article').insertAdjacentHTML('beforeend', '<p>$x$</p>')")
    assert RAW.findall(tab.evaluate(SEEN))
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
    open_page(tab, f"{site}/tour.html")
    link = tab.locator("article a", has=tab.locator("code", has_text="sample_prev_timestep")).first
    link.click()
    tab.wait_for_load_state()
    tab.wait_for_timeout(500)
    assert tab.url.endswith("scheduler.html#noisescheduler.sample_prev_timestep")
    box = tab.locator("h3", has_text="sample_prev_timestep").first.bounding_box()
    assert -60 < box["y"] < 700


@pytest.mark.parametrize(
    "page", [p for p in PAGES if '<div class="player"' in (SITE / p).read_text(encoding="utf-8")]
)
def test_players_play(tab, site, page):
    open_page(tab, f"{site}/{page}")
    player = tab.locator(".player")
    assert player.count() == 1
    frame, step = (
        "document.querySelector('.player img').src",
        "document.querySelector('.player input').value",
    )
    last, top = tab.evaluate(frame), tab.evaluate(step)
    assert int(top) >= 5 and player.locator("output").inner_text()
    assert len(player.locator("xpath=..").inner_html()) < 150_000
    player.locator("input").fill("0")
    first, label = tab.evaluate(frame), player.locator("output").inner_text()
    assert first != last and first.startswith("data:image/png")
    player.locator("button").click()
    assert player.locator("button").inner_text() == "Pause"
    tab.wait_for_function(f"{step} > 0 && {step} < {top}")
    player.locator("button").click()
    held = tab.evaluate(step)
    tab.wait_for_timeout(700)
    assert tab.evaluate(step) == held and player.locator("output").inner_text() != label
    player.locator("button").click()
    tab.wait_for_function(f"{step} == {top}", timeout=20_000)
    assert tab.evaluate(frame) == last and player.locator("button").inner_text() == "Play"
    player.locator("button").click()  # from the end: once more from the start
    assert tab.evaluate(step) == "0"
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
        tab.wait_for_timeout(300)
        ink = tab.evaluate("getComputedStyle(document.querySelector('.player button')).color")
        assert (int(re.findall(r"\d+", ink)[0]) > 128) == (scheme == "dark")
        style = tab.evaluate("getComputedStyle(document.querySelector('.player')).colorScheme")
        assert style == scheme
    tab.set_viewport_size(dict(width=390, height=800))
    for part in ("img", "output"):
        box = player.locator(part).bounding_box()
        assert box["x"] + box["width"] <= 390
    assert tab.wrong == []


def test_contents_are_sections_and_public_names(tab, site):
    open_page(tab, f"{site}/scheduler.html")
    names = tab.locator("nav.page-toc li.toc-h3 a:visible").all_inner_texts()
    assert "NoiseScheduler" in names and "add_noise" in names
    assert not [n for n in names if "." in n or n.startswith("_")]
    headings = tab.locator("article h3 .owner + code").all_inner_texts()
    assert "add_noise" in headings
    color = "getComputedStyle(document.querySelector('article {}')).color"
    assert tab.evaluate(color.format("h3 code")) == tab.evaluate(color.format("h2"))


def test_sidebar_numbers_pages_but_not_appendices(tab, site):
    tab.goto(f"{site}/index.html")
    titles = tab.locator(".bd-sidebar-primary .toctree-l1 a").all_inner_texts()
    files = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
    numbered = [f[:2] for f in files if f < "9"]
    assert sorted(t[:2] for t in titles if t[:2].isdigit()) == numbered


def test_every_page_is_there_as_markdown(pages):
    docs = {
        re.search(r"^Docs: (\S+?)\"*$", p.read_text(encoding="utf-8"), re.M)[1]
        for p in (ROOT / "ddpm_nb").glob("[a-z]*.py")
    }
    made = {pages.HOST + p.name for p in SITE.glob("*.html.md")}
    assert docs <= made and made == {f"{pages.HOST}{p}.md" for p in PAGES}
    marks = re.compile(r"\{\.|:::|site:|data:image|<a id|show_doc|^#\||<div|<script", re.M)
    for p in SITE.glob("*.html.md"):
        text = p.read_text(encoding="utf-8")
        prose = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.M | re.S)
        assert text.startswith("# ") and not (found := marks.findall(prose)), (p.name, found)
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose)):
            name = link.removeprefix(pages.HOST).partition("#")[0]
            assert name.startswith("http") or (SITE / name).is_file(), (p.name, link)


def test_llms_txt_lists_every_page(pages):
    title, _, said, *rest = (SITE / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert title == "# ddpm_nb" and said.startswith("> ")
    listed = [re.fullmatch(r"- \[(.+)\]\((\S+)\): (\S.*)", x) for x in rest if x.startswith("-")]
    assert all(listed) and len(listed) == len(PAGES) - 1  # all but the front page
    for _, address, _ in (m.groups() for m in listed):
        assert (SITE / address.removeprefix(pages.HOST)).is_file(), address
    sections = [x for x in rest if x.startswith("#")]
    assert all(x.startswith("## ") for x in sections) and sections[-1] == "## Optional"


def test_book_reads_from_front_to_back():
    link = lambda kind, text: re.findall(rf'<a class="{kind}"\s+href="([^"]+)"', text)  # noqa: E731
    seen = ["index.html"]
    while following := link("right-next", (SITE / seen[-1]).read_text(encoding="utf-8")):
        assert following[0] not in seen
        text = (SITE / following[0]).read_text(encoding="utf-8")
        assert link("left-prev", text) == seen[-1:]
        seen += following
        (bar,) = re.findall(r'<p class="page-links">(.*?)</p>', text, re.S) or [""]
        named = re.findall(r"<a [^>]*>(Notebook|Open in Colab)</a>", bar)
        assert seen[-1] == "api.html" or named == ["Notebook", "Open in Colab"]
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


def test_private_names_are_passed_over(pages):
    cell = dict(cell_type="code", source="def _f(): pass\n\ndef g(): pass\n\nclass _C: pass")
    assert pages.defined(cell) == ["g"]
    assert pages.public("a.B.__init__") and not pages.public("a._b") and not pages.public("a.B._c")
    assert not [n for n in pages.NAMES if not pages.public(n)]
    text = f"[`_side`]({pages.HOST}plot.html#_side) and `_side`"
    assert pages.link_symbols(text, "p") == "`_side` and `_side`"


def test_folds_say_whose_code_they_hold(pages):
    for source, flags, label in (
        ("import torch\n\nfrom ddpm_nb.plot import book_style", {}, "Setup"),
        ("book_style()\nx = 1", {}, "Setup"),
        ("text = 'a'\nMarkdown(text)", {}, "The code of this table"),
        ("import torch\nx = 1", {}, "The code of this output"),
        ("plt.plot(x)", {"fig-alt": '"A line."'}, "The code of this figure"),
        ("def grade_one(x): pass", {}, "The grader"),
        ("grade_one(3)", {}, "A solution"),
    ):
        assert pages.fold_label(source, flags) == label


def test_plain_markdown():
    plain = importlib.import_module("plain")
    text = (
        '### [`A.`]{.owner}`b`\n\n{.symbol}\n<a id="a.b"></a>[source](x)\n\n:::{tip}\none\ntwo\n:::'
    )
    assert plain.plain_markdown(text) == "### `A.b`\n\n> **Tip:** one\n> two"
    assert plain.plain_markdown("[s](site:scheduler.html#a.b)") == "[s](scheduler.html.md#a.b)"
    assert plain.fenced("text", "a ``` b") == "````text\na ``` b\n````"


def test_wide_pictures_get_a_box(build, tmp_path):
    from PIL import Image

    for name, width in (("a", 600), ("b", 700), ("c", 1400)):
        Image.new("L", (width, 9)).save(tmp_path / f"{name}.png")
    text = "<article>" + "".join(f'<img src="{n}.png" />' for n in "abc") + "</article>"
    new = build.frame_pictures(text, tmp_path)
    assert new == (
        '<article><img src="a.png" /><span class="wide" style="--readable: 420px"><img src="b.png" /></span>'
        '<a href="c.png" class="wide" style="--readable: 840px"><img src="c.png" /></a></article>'
    )


def test_notebooks_of_the_site_are_the_books():
    for p in (ROOT / "nbs").glob("*.ipynb"):
        assert json.loads((SITE / "nbs" / p.name).read_text()) == json.loads(p.read_text()), p.name

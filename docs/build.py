"""The docs site: nbdev's processed notebooks, as pages for Sphinx. `python docs/build.py` writes _site/.

1. nbdev runs its directives: symbols become links, each exported definition gets a `show_doc` cell, hidden cells go.
2. pages.py turns such a notebook into one that MyST-NB shows well, and lists every public name.
3. Sphinx makes the site (conf.py; warnings are errors), and `broken_links` follows every link in it.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from nbdev.serve import proc_nbs
from pages import api_page, cell, front_matter, page
from PIL import Image
from plain import llms, plain_markdown, plain_page

import ddpm_nb

ROOT = Path(__file__).parent.parent
STAGE, SITE = ROOT / "build" / "site", ROOT / "_site"


def number(file):
    """What stands before a page's title in the sidebar: its number, but for the appendices (90 to 99)."""
    return "" if file.startswith("9") else f"{file[:2]} "


def toctrees(sections, files, titles):
    """The sidebar as Sphinx's hidden tables of contents."""
    text = ""
    for section in sections:
        lines = [f"{number(f)}{titles[f]} <{files[f]}>" for f in section["contents"]]
        lines += ["api"] if section is sections[-1] else []
        text += (
            f"```{{toctree}}\n:hidden:\n:caption: {section['section']}\n\n"
            + "\n".join(lines)
            + "\n```\n\n"
        )
    return text


def stage():
    """build/site/: everything that Sphinx reads. Returns what is Markdown on the site: file name -> text."""
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    processed = proc_nbs(str(ROOT / "nbs"), force=True, n_workers=0)
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]
    first, *sections = sidebar["contents"]
    order = [first] + [f for section in sections for f in section["contents"]]
    if differ := {p.name for p in (ROOT / "nbs").glob("*.ipynb")} ^ set(order):
        sys.exit(f"nbs/sidebar.yml and the pages in nbs/ differ: {', '.join(sorted(differ))}")
    notebooks = {f: json.loads((processed / f).read_text(encoding="utf-8")) for f in order}
    fronts = {f: front_matter(nb) for f, nb in notebooks.items()}
    files = {
        f: front.get("output-file", f.replace("ipynb", "html"))[:-5] for f, front in fronts.items()
    }
    titles = {f: front["title"] for f, front in fronts.items()}
    said = {f: front["description"] for f, front in fronts.items()}
    texts = {"llms.txt": llms(sections, titles, said, files)}
    for f, nb in notebooks.items():
        new = page(nb, f, files)
        texts[f"{files[f]}.html.md"] = plain_page(new)
        if f == first:
            new["cells"].append(cell("markdown", toctrees(sections, files, titles)))
        (STAGE / f"{files[f]}.ipynb").write_text(json.dumps(new), encoding="utf-8")
    names = api_page(order, files)
    (STAGE / "api.md").write_text(names, encoding="utf-8")
    texts["api.html.md"] = plain_markdown(names) + "\n"
    for folder in ("figures", "design_docs"):
        shutil.copytree(ROOT / folder, STAGE / folder)
    not_pages = shutil.ignore_patterns(".*", "*.yml", "*.css")
    shutil.copytree(ROOT / "nbs", STAGE / "extra" / "nbs", ignore=not_pages)
    return texts


def natural_width(picture):
    """How wide a browser would show a picture file, in pixels."""
    if picture.suffix == ".svg":
        points = re.search(r'<svg[^>]*? width="([\d.]+)pt"', picture.read_text(encoding="utf-8"))
        return round(float(points[1]) * 4 / 3) if points else 0
    with Image.open(picture) as image:
        return image.width


def frame_pictures(text, site):
    """A page whose wide pictures have a box that scrolls on a phone, at three fifths of their size or more; the widest, which
    every page must shrink, lead to the whole picture."""

    def framed(found):
        src = unquote(found[1])
        if urlsplit(src).scheme or (width := natural_width(site / src)) < 640:
            return found[0]
        tag = f'a href="{src}"' if width > 900 else "span"
        style = f"--readable: {round(0.6 * width)}px"
        return f'<{tag} class="wide" style="{style}">{found[0]}</{tag.split()[0]}>'

    start, end = text.find("<article"), text.find("</article>")
    body = re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', framed, text[start:end])
    return text[:start] + body + text[end:]


class Links(HTMLParser):
    """The ids of a page and what it links to or loads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get("id"), attrs.get("name")}
        self.links |= {attrs[k] for k in ("href", "src") if attrs.get(k)}


def broken_links(site):
    """Every link inside the site that leads nowhere: a page, a picture or an anchor that is not there."""
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in sorted(site.glob("*.html"))}
    broken = []
    for p, found in pages.items():
        for link in sorted(found.links):
            url = urlsplit(html.unescape(link))
            if url.scheme or url.netloc or link in ("#", "#top"):
                continue
            target = (p.parent / unquote(url.path)).resolve() if url.path else p
            if not target.is_file() or (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                broken.append(f"{p.relative_to(site)}: {link}")
    return broken


def main():
    texts = stage()
    made = ROOT / "build" / "html"
    shutil.rmtree(made, ignore_errors=True)
    sphinx = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-c",
        str(ROOT / "docs"),
    ]
    if subprocess.run(
        [*sphinx, "-d", str(ROOT / "build" / "doctrees"), str(STAGE), str(made)]
    ).returncode:
        sys.exit("Sphinx had something to say: see above")
    for p in set(made.glob("*.html")) - {
        made / "index.html"
    }:  # the front page's picture has no letters
        p.write_text(frame_pictures(p.read_text(encoding="utf-8"), made), encoding="utf-8")
    for name, text in texts.items():
        (made / name).write_text(text, encoding="utf-8")
    broken = broken_links(made)
    if broken:
        sys.exit("links that lead nowhere:\n" + "\n".join(broken))
    shutil.rmtree(SITE, ignore_errors=True)
    made.rename(SITE)
    print(
        f"{len(list(SITE.glob('*.html')))} pages of ddpm_nb {ddpm_nb.__version__}: {SITE.relative_to(ROOT)}/index.html"
    )


if __name__ == "__main__":
    main()

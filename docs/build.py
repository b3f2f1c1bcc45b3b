"""The docs site: nbdev's processed notebooks, as pages for Sphinx. `python docs/build.py` writes _site/.

1. nbdev runs its directives: symbols become links, each exported definition gets a `show_doc` cell, hidden cells go.
2. pages.py turns such a notebook into one that MyST-NB shows well, and lists every public name.
3. Sphinx makes the site (conf.py; warnings are errors), and `broken_links` follows every link in it.
"""

import html
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from nbdev.serve import proc_nbs
from pages import api_page, cell, front_matter, page

import ddpm_nb

ROOT = Path(__file__).parent.parent
STAGE, SITE = ROOT / "build" / "site", ROOT / "_site"


def toctrees(sections, files, titles):
    """The sidebar as Sphinx's hidden tables of contents."""
    text = ""
    for section in sections:
        lines = [f"{f[:2]} {titles[f]} <{files[f]}>" for f in section["contents"]]
        lines += ["api"] if section is sections[-1] else []
        text += (
            f"```{{toctree}}\n:hidden:\n:caption: {section['section']}\n\n"
            + "\n".join(lines)
            + "\n```\n\n"
        )
    return text


def stage():
    """build/site/: everything that Sphinx reads."""
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
    for f, nb in notebooks.items():
        new = page(nb, f, files)
        if f == first:
            titles = {f: front["title"] for f, front in fronts.items()}
            new["cells"].append(cell("markdown", toctrees(sections, files, titles)))
        (STAGE / f"{files[f]}.ipynb").write_text(json.dumps(new), encoding="utf-8")
    (STAGE / "api.md").write_text(api_page(order, files), encoding="utf-8")
    for folder in ("figures", "design_docs"):
        shutil.copytree(ROOT / folder, STAGE / folder)
    not_pages = shutil.ignore_patterns(".*", "*.yml", "*.css")
    shutil.copytree(ROOT / "nbs", STAGE / "extra" / "nbs", ignore=not_pages)


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
    stage()
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

"""Sphinx's settings. build.py stages the pages; nothing here needs a network, neither to build nor to read."""

import shutil
import tomllib
from importlib.metadata import distribution
from pathlib import Path

project, author, copyright = "ddpm_nb", "The ddpm_nb authors", "The ddpm_nb authors, Apache-2.0"
html_title = "ddpm_nb"
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["extra"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = [
    "dollarmath",
    "amsmath",
    "attrs_inline",
    "attrs_block",
    "colon_fence",
    "html_image",
]
myst_url_schemes = {"http": None, "https": None, "site": "{{path}}#{{fragment}}"}

static = Path(__file__).parent / "static"
about = tomllib.loads((static.parent.parent / "pyproject.toml").read_text())["project"]
html_static_path = [str(static)]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_extra_path = [str(Path(__file__).parent.parent / "build" / "site" / "extra")]
html_copy_source = False
html_favicon = html_logo = str(static / "favicon.svg")
html_context = {"default_mode": "auto"}
html_theme = "sphinx_book_theme"
html_theme_options = dict(
    logo=dict(text="ddpm_nb"),
    repository_url=about["urls"]["Repository"],
    use_repository_button=True,
    use_download_button=False,
    show_toc_level=2,
    navbar_persistent=[],
    home_page_in_toc=True,
    show_navbar_depth=1,
)

# MathJax in one file, from the package that holds it.
mathjax_path = "tex-svg-full.js"


def setup(app):
    held = next(
        f for f in distribution("sphinx-mathjax-offline").files if f.name == "tex-svg-full.js"
    )
    app.connect(
        "build-finished", lambda app, e: shutil.copy(held.locate(), Path(app.outdir) / "_static")
    )

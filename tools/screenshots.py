"""What the pages of the site look like: wide and on a phone, light and dark, as pictures to look at.

make docs && python tools/screenshots.py            # all pages, into build/screenshots
python tools/screenshots.py few_steps scheduler     # these two
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "docs")]
from browser import chromium, served  # noqa: E402
from test_site import PAGES, SITE, WIDTHS, open_page  # noqa: E402


def main():
    p = argparse.ArgumentParser("tools/screenshots.py", description=__doc__.splitlines()[0])
    p.add_argument("pages", nargs="*", help="names without .html; left out: all")
    p.add_argument("--out", type=Path, default=ROOT / "build" / "screenshots")
    a = p.parse_args()
    if not PAGES:
        raise SystemExit("no site: make docs comes first")
    names = [name.removesuffix(".html") for name in PAGES]
    if wrong := set(a.pages) - set(names):
        raise SystemExit(f"pages: expected some of {', '.join(names)}; got {', '.join(wrong)}")
    a.out.mkdir(parents=True, exist_ok=True)
    with served(SITE) as site, chromium() as browser:
        tab = browser.new_page()
        for name in a.pages or names:
            open_page(tab, f"{site}/{name}.html")
            for scheme in ("light", "dark"):
                tab.emulate_media(color_scheme=scheme)
                tab.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
                for width, pixels in WIDTHS.items():
                    tab.set_viewport_size(dict(width=pixels, height=900))
                    file = a.out / f"{name}-{width}-{scheme}.png"
                    tab.screenshot(path=file, full_page=True)
                    print(file, flush=True)


if __name__ == "__main__":
    main()

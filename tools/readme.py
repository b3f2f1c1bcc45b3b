"""README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` fails if it is not current."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme() -> str:
    """The index page as Markdown, with its links as seen from the project's folder."""
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown") + "\n"
    text = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", text)
    text = re.sub(r"\]\(#([^)]+)\)", lambda m: f"](#{m[1].lower()})", text)  # GitHub's anchors
    return text.replace("](../", "](")


if __name__ == "__main__":
    target = ROOT / "README.md"
    if "--check" in sys.argv:
        sys.exit(
            target.read_text(encoding="utf-8") != readme()
            and "README.md is not current: python tools/readme.py"
        )
    target.write_text(readme(), encoding="utf-8")

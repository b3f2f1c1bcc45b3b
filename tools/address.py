"""The repository's address, from pyproject.toml to wherever a text has to spell it out.

    python tools/address.py             # writes it, after [project.urls] was changed
    python tools/address.py --check     # names the files that say another one

Notebooks need it (their first cell fetches the book on Colab), and so do links out of the README.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = ("nbs/*.ipynb", "*.md", ".github/*.yml")


def address() -> str:
    "github.com/OWNER/NAME, as pyproject.toml has it."
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return urls["Repository"].removeprefix("https://")


def main(check: bool) -> None:
    right = address()
    any_owner = re.compile(r"github\.com/[\w.-]+/" + right.rsplit("/", 1)[1] + r"\b")
    files = subprocess.run(
        ["git", "ls-files", *PLACES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    wrong = []
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        new = any_owner.sub(right, text)
        if new != text:
            wrong.append(name)
            if not check:
                (ROOT / name).write_text(new, encoding="utf-8")
    if check and wrong:
        sys.exit(
            f"not pyproject.toml's address, python tools/address.py mends it: {' '.join(wrong)}"
        )


if __name__ == "__main__":
    main("--check" in sys.argv)

"""Runs before Quarto renders (nbs/_quarto.yml): in the folder of nbdev's processed notebooks, brings the pictures and turns our
`> **Note:** ...` into Quarto's callouts. Needs nothing but Python."""

import json
import re
import shutil
from pathlib import Path

CALLOUT = re.compile(r"^> \*\*(Note|Tip|Warning):\*\* ((?:.*\n?(?:^> ?.*\n?)*))", re.M)


def for_quarto(text):
    """A Markdown cell's text with Quarto's callouts and with the pictures inside the project."""
    text = re.sub(r"(\]\(|src=\")\.\./(figures|design_docs)/", r"\1\2/", text)

    def callout(m):
        inside = re.sub(r"^> ?", "", m[2], flags=re.M).strip()
        return f"::: {{.callout-{m[1].lower()}}}\n{inside}\n:::\n"

    return CALLOUT.sub(callout, text)


if __name__ == "__main__":
    for folder in ("figures", "design_docs"):
        shutil.copytree(Path("..") / folder, folder, dirs_exist_ok=True)
    for path in Path().glob("*.ipynb"):
        book = json.loads(path.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = for_quarto("".join(cell["source"]))
        path.write_text(json.dumps(book), encoding="utf-8")

"""Folds the scaffolding of the pages: writes the tags that hide a cell's source into the cells that the rule names.

`python tools/fold.py [PAGE ...]` writes, `python tools/fold.py --check [PAGE ...]` names the cells that differ and exits 1.

A code cell is folded if it is one of these; nothing else is:
- setup: nothing but imports and `%` lines, exported or not, or `book_style()` at its top level;
- what the site leaves out anyway: `#| hide` (the Colab cell), `#| echo: false`;
- drawing: `#| fig-alt`, boxes (`Diagram(`), a table set in Markdown (its last line is `Markdown(...)`); not if exported;
- the grader and the solution of an exercise (they name a `grade_...`); the reader's own cell (`#| eval: false`) stays open.
A line `#| fold: true` or `#| fold: false` in a cell wins over all of this.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def split(source):
    """A cell's `#| name: value` lines as a dict, and the other lines."""
    lines = source.splitlines()
    found = (re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", line) for line in lines)
    return {m[1]: m[2].strip() for m in found if m}, "\n".join(
        line for line in lines if not line.startswith("#|")
    )


def statements(code):
    """The parsed statements of a cell; `%` and `!` lines are left out."""
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M)).body


def is_setup(code):
    """Imports and `%` lines alone, or a cell that sets the book's style."""
    body = statements(code)
    styled = any(ast.unparse(s) == "book_style()" for s in body)
    only = all(isinstance(s, ast.Import | ast.ImportFrom | ast.Pass) for s in body)
    return styled or bool(body) and only


def is_drawing(flags, code):
    """A figure, boxes and arrows, or a table set in Markdown."""
    body = statements(code)
    table = bool(body) and ast.unparse(body[-1]).startswith("Markdown(")
    return "fig-alt" in flags or "Diagram(" in code or table


def folded(source):
    """Whether the rule folds a code cell."""
    flags, code = split(source)
    if "fold" in flags:
        return flags["fold"] != "false"
    if "hide" in flags or flags.get("echo") == "false" or is_setup(code):
        return True
    if flags.keys() & {"export", "exports", "exporti"}:
        return False
    if "grade_" in code:
        return flags.get("eval") != "false"
    return is_drawing(flags, code)


def with_tags(metadata, fold):
    """A cell's metadata, with or without what hides its source; all else in it stays."""
    tags = [t for t in metadata.get("tags", []) if t != "hide-input"] + ["hide-input"] * fold
    jupyter = {k: v for k, v in metadata.get("jupyter", {}).items() if k != "source_hidden"}
    jupyter |= {"source_hidden": True} if fold else {}
    rest = {k: v for k, v in metadata.items() if k not in ("tags", "jupyter")}
    return rest | ({"jupyter": jupyter} if jupyter else {}) | ({"tags": tags} if tags else {})


def fold(page, write):
    """The ids of the cells whose tags differ from the rule; writes the page if it is asked to."""
    nb = json.loads(page.read_text(encoding="utf-8"))
    differ = {}
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            wanted = folded("".join(cell["source"]))
            new = with_tags(cell["metadata"], wanted)
            if new != cell["metadata"]:
                differ[cell["id"]] = "should be folded" if wanted else "should be open"
                cell["metadata"] = new
    if differ and write:
        text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        page.write_text(text, encoding="utf-8")  # as nbdev-clean writes it
    return differ


def main():
    p = argparse.ArgumentParser("fold.py", description=__doc__.splitlines()[0])
    p.add_argument("pages", nargs="*", type=Path, help="notebooks; left out: all of nbs/")
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 if a cell differs")
    args = p.parse_args()
    count = 0
    for page in args.pages or sorted(NBS.glob("*.ipynb")):
        differ = fold(page, write=not args.check)
        count += len(differ)
        for cell, what in differ.items():
            print(f"{page.name}: cell {cell} {what}" if args.check else f"{page.name}: {cell}")
    if args.check and count:
        sys.exit(f"{count} cells differ from the rule: run python tools/fold.py")


if __name__ == "__main__":
    main()

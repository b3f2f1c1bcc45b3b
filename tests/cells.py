"""Cells of the pages, run by themselves: what the tests of graders are made of."""

import json
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def cell(page, start):
    """The source of the one code cell of a page in which a line starts like this; readers' own cells are passed over."""
    cells = json.loads((NBS / page).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    sources = [s for s in sources if "#| eval: false" not in s]
    found = [s for s in sources if any(line.startswith(start) for line in s.splitlines())]
    assert len(found) == 1, f"{page}: {len(found)} cells have a line that starts with {start!r}"
    return found[0]


def run_cells(page, *starts, **names):
    """What those cells define, given these names."""
    for start in starts:
        exec(compile(cell(page, start), f"{page}: {start}", "exec"), names)
    return names

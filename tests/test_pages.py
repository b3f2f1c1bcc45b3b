"""Every page runs from top to bottom, and says what its stored outputs say."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


def outputs(page):
    """The text of each cell's outputs; pictures count only as being there."""
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        text = ""
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            text += "".join(out.get("text", ""))
            text += "".join(data.get("text/markdown", ""))
            text += (
                "".join(data.get("text/plain", ""))
                if not any(k.startswith("image/") for k in data)
                else "picture\n"
            )
        yield "".join(cell["source"]), re.sub(r"0x[0-9a-f]+", "0x", text)


def same(a, b, rtol=0.05, atol=0.05):
    """Equal texts, up to the rounding that another processor may bring."""
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
    return all(x == y or abs(float(x) - float(y)) <= atol + rtol * abs(float(y)) for x, y in pairs)


def test_same_can_tell():
    assert same("loss 0.123 at 5", "loss 0.124 at 5") and same("1e-10", "3e-10")
    assert not same("loss 0.1", "gain 0.1") and not same("variance 0.99", "variance 0.85")


@pytest.mark.parametrize("page", PAGES)
def test_page(page, book, run):
    stored = list(outputs(book / "nbs" / page))
    run(
        "nbdev-test",
        f"nbs/{page}",
        "--save",
        "--n-workers",
        "0",
        cwd=book,
        PYTHONPATH=str(ROOT),
        PYTHONWARNINGS="ignore",
    )
    for (source, was), (_, now) in zip(stored, outputs(book / "nbs" / page), strict=True):
        assert same(now, was), (
            f"{page}: the stored output of this cell is not current:\n{source}\nstored: {was}\nnow: {now}"
        )

"""README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` fails if it is not current.

The table of results in both is made from the run cards of the weights that ship.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
MARKS = "<!-- results:start -->", "<!-- results:end -->"


def results() -> str:
    """One row a shipped network, from its run card."""
    rows = [
        "| weights | network | trained | bits/dim | FID | the ladder at the same n |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted((ROOT / "ddpm_nb" / "weights").glob("*/run_card.json")):
        card = json.loads(file.read_text(encoding="utf-8"))
        made = {what: [] for what in ("bits", "quality")}
        for row in card["evaluation"]:
            made[row["settings"]["what"]].append(row)
        best = min(made["quality"], key=lambda r: (-r["settings"]["n"], r["fid"]))
        s = best["settings"]
        way = f"{s['steps']} steps of " + (
            "DDIM" if s["method"] == "ddim" else s["variance"].replace("_", "-")
        )
        most = max(made["bits"], key=lambda r: (r["settings"]["n"], -r["settings"]["seed"]))
        bits = most["bits"]["test"]["optimal"]
        rungs = best["ladder"]
        noise = [k for k in rungs if k.startswith("noise")][-2:]
        ladder = ", ".join(f"{k} {rungs[k]:.2f}" for k in noise)
        rows.append(
            f"| `{card['name']}` | {card['parameters'] / 1e6:.1f} M parameters, {card['bytes'] / 1e6:.1f} MB "
            f"| {card['steps']:,} steps of {card['training']['batch_size']} on {card['device']}, "
            f"{card['wall_seconds'] / 60:.0f} minutes "
            f"| {bits['bits']:.2f} ± {bits['standard_error']:.2f} "
            f"| {best['fid']:.2f} ({way}, n = {s['n']:,}) "
            f"| real {rungs['real']:.2f}, {ladder} |"
        )
    return "\n".join(rows)


def with_results(text: str) -> str:
    """The text with the table between its marks."""
    start, end = MARKS
    between = re.escape(start) + r"[\s\S]*?" + re.escape(end)
    return re.sub(between, lambda _: f"{start}\n\n{results()}\n\n{end}", text)


def update_index() -> None:
    """Puts the table into the index page."""
    page = json.loads(INDEX.read_text(encoding="utf-8"))
    for cell in page["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and MARKS[0] in text:
            cell["source"] = with_results(text).splitlines(keepends=True)
    INDEX.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def readme() -> str:
    """The index page as Markdown, with its links as seen from the project's folder."""
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown") + "\n"
    text = with_results(text)
    text = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", text)
    text = re.sub(r"\]\(#([^)]+)\)", lambda m: f"](#{m[1].lower()})", text)  # GitHub's anchors
    return text.replace("](../", "](")


if __name__ == "__main__":
    target = ROOT / "README.md"
    if "--check" in sys.argv:
        stale = target.read_text(encoding="utf-8") != readme()
        index = INDEX.read_text(encoding="utf-8")
        stale |= not all(
            json.dumps(line, ensure_ascii=False)[1:-1] in index for line in results().splitlines()
        )
        sys.exit(stale and "README.md or the index is not current: python tools/readme.py")
    update_index()
    target.write_text(readme(), encoding="utf-8")

"""README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` fails if it is not current.

What both say in numbers is made: the table of results from the run cards of the weights that ship and
the logs of few steps, the speeds from the logs of the benchmarks, the counts of pages from the sidebar.
"""

import inspect
import json
import re
import statistics
import sys
from pathlib import Path

from ddpm_nb.sample import sample

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
WORDS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


def damage(name: str) -> str:
    """A rung of the ladder in words: what was done to real test pictures."""
    if name == "real":
        return "what real test pictures have"
    if noise := re.fullmatch(r"noise (\d+)/255", name):
        return f"what noise of {noise[1]} grey levels does to real ones"
    return f"what real ones have when {name}"


def between_seeds(name: str, settings: dict) -> str:
    """How far the FIDs of seeds differ (a standard deviation), where tools/paired_fid.py has measured it."""
    file = ROOT / "nbs" / "logs" / name / "paired.json"
    paired = json.loads(file.read_text()) if file.is_file() else dict(summary={}, settings={})
    found = paired["summary"].get(str(settings["steps"]), dict(sd={}))["sd"]
    same = all(paired["settings"].get(k) == settings[k] for k in ("n", "method", "features"))
    same &= not settings.get("labels")  # those were asked for nothing
    return f" ± {found[settings['variance']]:.2f}" if same and settings["variance"] in found else ""


def few_steps(name: str) -> str:
    """FID of the walk that `sample` takes if nothing is said, beside 50 ancestral steps with the same seeds."""
    file = ROOT / "nbs" / "logs" / name / "few_steps.jsonl"
    if not file.is_file():
        return ""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    default = {k: p.default for k, p in inspect.signature(sample).parameters.items()}
    ours = (default["method"], default["spacing"], default["steps"] or 20)  # None: 20, or all

    def by_seed(walk):
        fids = [r for r in rows if r["what"] == "fid"]
        return {r["seed"]: r for r in fids if (r["method"], r["spacing"], r["steps"]) == walk}

    few, many = by_seed(ours), by_seed(("ancestral", "uniform", 50))
    seeds = sorted(few.keys() & many.keys())
    off = [few[s]["fid"] - many[s]["fid"] for s in seeds]
    means = [statistics.mean(r[s]["fid"] for s in seeds) for r in (few, many)]
    error = statistics.stdev(off) / len(off) ** 0.5
    return (
        f"{means[0]:.2f} and {means[1]:.2f}: {statistics.mean(off):+.2f} ± {error:.2f} "
        f"({WORDS[len(seeds)]} seeds, n = {few[seeds[0]]['n']})"
    )


def results() -> str:
    """One row a shipped network, from its run card and the log of few steps."""
    rows = [
        "| network | bits/dim | FID, and what is like it "
        "| FID in 20 evaluations, as `ddpm-sample` draws, and in 50 ancestral steps |",
        "|---|---|---|---|",
    ]
    for file in sorted((ROOT / "ddpm_nb" / "weights").glob("*/run_card.json")):
        card = json.loads(file.read_text(encoding="utf-8"))
        if not card["evaluation"]:  # an early self of another, which it guides
            continue
        made = {what: [] for what in ("bits", "quality")}
        for row in card["evaluation"]:
            made[row["settings"]["what"]].append(row)
        best = min(made["quality"], key=lambda r: (-r["settings"]["n"], r["fid"]))
        most = max(made["bits"], key=lambda r: (r["settings"]["n"], -r["settings"]["seed"]))
        bits, rungs = most["bits"]["test"]["optimal"], best["ladder"]
        near = min(rungs, key=lambda k: abs(rungs[k] - best["fid"]))
        like = "less than" if best["fid"] < rungs["real"] else "about"
        apart = between_seeds(card["name"], best["settings"])
        asked = ", each class as often" if best["settings"].get("labels") else ""
        rows.append(
            f"| `{card['name']}`: {card['parameters'] / 1e6:.1f} M parameters, "
            f"{card['wall_seconds'] / 60:.0f} minutes on {card['device']} "
            f"| {bits['bits']:.2f} ± {bits['standard_error']:.2f} "
            f"| {best['fid']:.2f}{apart} ({best['settings']['steps']} steps{asked}, n = {best['settings']['n']:,}): "
            f"{like} {damage(near)} ({rungs[near]:.2f}) | {few_steps(card['name'])} |"
        )
    return "\n".join(rows)


def log_of(name: str) -> list[dict]:
    """The rows of a benchmark's log."""
    text = (ROOT / "nbs" / "logs" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def at_equal_precision(run: dict) -> str:
    """Ours against diffusers in one run of side by side, each as used and at its best."""
    ours = [r for r in run["rows"] if r["network"] == "ours"]
    ways = (
        f"{r['train_equal']:.2f} times in training and {r['sample_equal']:.2f} in sampling in "
        f"{r['precision']} {'at best' if r['best'] else 'as used'}"
        for r in ours
    )
    return (
        f"- A step, beside `diffusers`: {', '.join(ways)} (widths {str(run['widths'])[1:-1]}, batch "
        f"{run['batch']}, {run['size']} x {run['size']}; {run['device']}, {run['threads']} threads)."
    )


def to_full_quality(run: dict) -> str:
    """What it takes until pictures of a quality are there, in both libraries."""
    lines = []
    for what in ("ddim", "ddpm", "picture"):
        if (r := run.get(what)) is None:
            continue
        if r["ours"].get("seeds") == 1:  # the quickest of many walks, by chance as well as by merit
            continue
        method, _, steps = r["ours"]["way"]
        like = "the same pictures as" if what == "picture" else "as good as"
        took, n = r["solver_seconds"], r["ours"].get("seeds")
        solver = f" (diffusers with the same solver in as many: {took:.1f} s)" if took else ""
        seeds = f", {WORDS[n]} seeds" if n else ""
        lines.append(
            f"- {run['pictures']} pictures of `{run['name']}`, {like} {r['steps']:,} steps of "
            f"diffusers' `{r['pipeline']}` (within 10%{seeds}), in {steps} steps of `{method}`: "
            f"{r['ours']['seconds']:.1f} s and {r['seconds']:.1f} s, **{r['ratio']:.1f} times**"
            f"{solver}."
        )
    return "\n".join(lines)


def speed() -> str:
    """The ratios that the benchmarks print, one line a run."""
    lines = [at_equal_precision(run) for run in log_of("side_by_side")]
    newest = {run["name"]: run for run in log_of("quality")}
    return "\n".join(lines + [text for run in newest.values() if (text := to_full_quality(run))])


MADE = dict(results=results, speed=speed)


def counts() -> str:
    """How many pages and appendices (files 90 to 99) the sidebar lists, in words."""
    files = re.findall(r"- (\d\d)_\w+\.ipynb", (ROOT / "nbs" / "sidebar.yml").read_text())
    appendices = sum(f >= "90" for f in files)
    return f"{WORDS[len(files) - appendices].title()} pages and {WORDS[appendices]} appendices"


def with_numbers(text: str) -> str:
    """The text with what is made between its marks, and with the counts."""
    for name, make in MADE.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        between = re.escape(start) + r"[\s\S]*?" + re.escape(end)
        text = re.sub(between, lambda _, s=start, e=end, m=make: f"{s}\n\n{m()}\n\n{e}", text)
    return re.sub(r"\w+ pages and \w+ appendices", counts(), text)


def index() -> str:
    """The index page with the numbers in it, as a notebook file's text."""
    page = json.loads(INDEX.read_text(encoding="utf-8"))
    whole = "".join("".join(cell["source"]) for cell in page["cells"])
    if lost := [name for name in MADE if f"<!-- {name}:start -->" not in whole]:
        sys.exit(f"{INDEX.name} has lost the marks of: {', '.join(lost)}")
    for cell in page["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_numbers("".join(cell["source"])).splitlines(keepends=True)
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


def readme() -> str:
    """The index page as Markdown, with its links as seen from the project's folder."""
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown") + "\n"
    text = re.sub(r"\]\((\w+\.ipynb)(#[^)]*)?\)", r"](nbs/\1\2)", text)
    text = re.sub(r"\]\(#([^)]+)\)", lambda m: f"](#{m[1].lower()})", text)  # GitHub's anchors
    return text.replace("](../", "](")


if __name__ == "__main__":
    target = ROOT / "README.md"
    if "--check" in sys.argv:
        stale = INDEX.read_text(encoding="utf-8") != index()
        stale |= target.read_text(encoding="utf-8") != readme()
        sys.exit(stale and "README.md or the index is not current: python tools/readme.py")
    INDEX.write_text(index(), encoding="utf-8")
    target.write_text(readme(), encoding="utf-8")

"""README.md: its links lead somewhere, its counts and its picture are current."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headings(path):
    """The anchors of a notebook (as JupyterLab and GitHub make them) or of a Markdown file (as GitHub does)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(
            "".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"
        )
    found = re.findall(r"^#+ (.*?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    if path.suffix == ".ipynb":
        return {h.replace(" ", "-") for h in found}
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def broken(text, folder, itself):
    """The links of a Markdown text in a folder that lead nowhere: no such file, or no such heading in it."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        path = folder / name if name else itself
        if link.startswith("http"):
            continue
        if not path.exists() or (anchor and anchor not in headings(path)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    assert broken(path.read_text(encoding="utf-8"), ROOT, path) == []


def test_broken_links_are_seen():
    readme = ROOT / "README.md"
    for good in ("nbs/14_interop.ipynb#Side-by-side", "#two-commands", "LICENSE", "https://x.org"):
        assert broken(f"[a]({good})", ROOT, readme) == []
    for wrong in ("14_interop.ipynb#Side-by-side", "nbs/14_interop.ipynb#Side", "#Two-commands"):
        assert broken(f"[a]({wrong})", ROOT, readme) == [wrong]


def test_links_are_rewritten_with_their_anchors(monkeypatch, tmp_path):
    readme = tool("readme")
    text = "[a](01_x.ipynb) [b](01_x.ipynb#One-step) [c](#Your-own) [d](../LICENSE)"
    cells = [dict(cell_type="markdown", source=[text])]
    (tmp_path / "index.ipynb").write_text(json.dumps(dict(cells=cells)))
    monkeypatch.setattr(readme, "INDEX", tmp_path / "index.ipynb")
    assert readme.readme() == (
        "[a](nbs/01_x.ipynb) [b](nbs/01_x.ipynb#One-step) [c](#your-own) [d](LICENSE)\n"
    )


def test_counts_are_the_sidebars():
    numbered = [p for p in (ROOT / "nbs").glob("[0-8]*.ipynb")]
    appendices = [p for p in (ROOT / "nbs").glob("9*.ipynb")]
    words = tool("readme").WORDS
    said = f"{words[len(numbered)].title()} pages and {words[len(appendices)]} appendices"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## The pages") :]
    for p in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        assert f"(nbs/{p.name})" in table, p.name


def test_results_name_the_nearest_damage():
    rows = tool("readme").results().splitlines()[2:]
    cards = [json.loads(p.read_text()) for p in (ROOT / "ddpm_nb/weights").glob("*/run_card.json")]
    assert len(rows) == sum(bool(card["evaluation"]) for card in cards)
    for row in rows:
        fid = float(re.search(r"\| ([\d.]+)(?: ± [\d.]+)? \(\d+ steps", row)[1])
        near = float(re.search(r"\(([\d.]+)\) \|", row)[1])
        name = re.search(r"`(\w+)`", row)[1]
        card = json.loads((ROOT / f"ddpm_nb/weights/{name}/run_card.json").read_text())
        ladders = [r["ladder"] for r in card["evaluation"] if abs(r.get("fid", -1) - fid) < 0.005]
        assert any(
            abs(near - min(rungs.values(), key=lambda v: abs(v - fid))) < 0.005 for rungs in ladders
        )


def test_the_picture_is_what_the_weights_draw(tmp_path):
    hero = tool("hero")
    hero.draw(hero.walk(), tmp_path / "new.png")
    new, old = (
        np.asarray(Image.open(p).convert("L"), float) for p in (tmp_path / "new.png", hero.FILE)
    )
    assert new.shape == old.shape and np.abs(new - old).mean() < 1
    assert hero.FILE.stat().st_size < 60_000


def test_a_ratio_says_what_it_is_made_of():
    """The solver of diffusers stands beside ours where it has one, and nothing where it has none."""
    ours = dict(way=["dpm++", "uniform", 8], seconds=2.0, seeds=4)
    row = dict(pipeline="DDIMPipeline", steps=50, seconds=9.0, ours=ours, ratio=4.5)
    say = lambda took: tool("readme").to_full_quality(  # noqa: E731
        dict(name="digits", pictures=64, ddim=dict(row, solver_seconds=took))
    )
    assert "four seeds), in 8 steps of `dpm++`: 2.0 s and 9.0 s, **4.5 times** (diffusers" in say(
        3.0
    )
    assert say(None).endswith("**4.5 times**.")
    ours["seeds"] = 1  # the best of many by one number each
    assert say(3.0) == ""

"""Every page runs from top to bottom and says what its stored outputs say; its cells, and the modules made of them, keep to rules."""

import ast
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(
    p for p in (ROOT / "ddpm_nb").glob("*.py") if p.stem not in ("__init__", "_modidx")
)

# Pages whose cells don't keep to the rules yet.
TO_DO = []
RULED = [p for p in PAGES if p not in TO_DO]

# Definitions that stand in one exported cell, as "first, second": why they cannot be apart.
PAIRS = {}

# Exported definitions after which nothing is shown within two cells, as "first, second": why.
UNSHOWN = {}


# --- What a page says when it is run again ---

NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


def outputs(page):
    """The source and the text of each cell's outputs; pictures count only as being there."""
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


def is_noisy(source):
    """Whether a cell says that it trains or draws, so that its numbers depend on the processor."""
    return re.search(r"^#\| *noisy\b", source, re.M) is not None


def same(now, stored, rtol=1e-3, atol=1e-12):
    """Equal texts, up to the rounding that another processor may bring to each number."""
    if NUMBER.sub("#", now) != NUMBER.sub("#", stored):
        return False
    pairs = zip(NUMBER.findall(now), NUMBER.findall(stored), strict=True)
    return all(x == y or abs(float(x) - float(y)) <= atol + rtol * abs(float(y)) for x, y in pairs)


def test_same_can_tell():
    assert same("loss 0.1234 at 5", "loss 0.1235 at 5") and same("3e-16", "-8e-15")
    assert not same("loss 0.1", "gain 0.1") and not same("at 5", "at 6")
    assert not same("0.012", "0.013") and not same("3e-08", "4e-08") and not same("1e-9", "2e-10")
    assert same("0.51", "0.5", rtol=0.05) and not same("0.53", "0.5", rtol=0.05)
    assert is_noisy("#| noisy\nx = 1") and not is_noisy("noisy = 1  # | noisy")


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
        assert same(now, was, rtol=0.05 if is_noisy(source) else 1e-3), (
            f"{page}: the stored output of this cell is not current:\n{source}\nstored: {was}\nnow: {now}"
        )


# --- How a page is built ---


@dataclass
class Cell:
    """A code cell."""

    page: str
    id: str
    flags: dict  # its `#| name: value` lines
    code: str  # the other lines
    tags: list
    outputs: list

    def __str__(self):
        return f"{self.page}, cell {self.id} ({self.names or self.code.strip()[:40]!r})"

    @property
    def body(self):
        """Its statements; `%` and `!` lines are left out."""
        return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", self.code, flags=re.M)).body

    @property
    def definitions(self):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        return [s for s in self.body if isinstance(s, kinds)]

    @property
    def names(self):
        """What it defines, as "first, second"; a constant where it defines nothing else."""
        constants = [ast.unparse(s.targets[0]) for s in self.body if isinstance(s, ast.Assign)]
        return ", ".join([d.name for d in self.definitions] or constants)

    @property
    def only_imports(self):
        return all(isinstance(s, ast.Import | ast.ImportFrom | ast.Pass) for s in self.body)

    @property
    def exported(self):
        """Whether it exports something other than imports."""
        exports = self.flags.keys() & {"export", "exports", "exporti"}
        return bool(exports) and not self.only_imports

    @property
    def lines(self):
        """Its lines without blank ones, comments and directives."""
        return [x for x in map(str.strip, self.code.splitlines()) if x and not x.startswith("#")]

    @property
    def says_something(self):
        """Whether a reader sees a value, a table or a picture under it."""
        return "hide" not in self.flags and any(map(is_telling, self.outputs))


def is_telling(out):
    """Whether an output says more than True, None, a shape, or that an object exists."""
    data = out.get("data", {"text/plain": out.get("text", "")})
    if data.keys() - {"text/plain"}:
        return True
    text = "".join(data["text/plain"]).strip()
    nothing = r"(True|False|None|(torch\.Size\()?[\[(]\d+(, \d+)*,?[\])]+|<.*>)?"
    return out["output_type"] != "error" and not re.fullmatch(nothing, text, re.S)


def code_cells(page):
    """The code cells of a page."""
    found = []
    for c in json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]:
        if c["cell_type"] == "code":
            lines = "".join(c["source"]).splitlines()
            flags = [re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", x) for x in lines]
            flags = {m[1]: m[2] for m in flags if m}
            code = "\n".join(x for x in lines if not x.startswith("#|"))
            tags = c["metadata"].get("tags", [])
            found.append(Cell(page, c["id"], flags, code, tags, c["outputs"]))
    return found


def exported(pages):
    return [c for page in pages for c in code_cells(page) if c.exported]


def test_rules_can_tell():
    cell = Cell("p", "i", {"exports": ""}, "A = 1\n\n# why\ndef f():\n    return A", [], [])
    assert cell.exported and cell.names == "f" and len(cell.lines) == 3
    assert not Cell("p", "i", {"export": ""}, "%matplotlib inline\nimport math", [], []).exported
    text = lambda s: dict(output_type="execute_result", data={"text/plain": [s]})  # noqa: E731
    for nothing in ("True", "torch.Size([4, 1])", "(4, 1, 8)", "[3, 3]", "<f at 0x7f>", "None", ""):
        assert not is_telling(text(nothing)), nothing
    for telling in ("0.5", "tensor([1, 2])", "linear 0.02", "shape (4, 1), as it went in"):
        assert is_telling(text(telling)), telling
    assert is_telling(dict(output_type="display_data", data={"image/png": "", "text/plain": ""}))
    assert is_telling(dict(output_type="stream", text=["3 of 32\n"]))


@pytest.mark.parametrize("page", RULED)
def test_one_definition_a_cell(page):
    wrong = [c for c in exported([page]) if len(c.definitions) > 1 and c.names not in PAIRS]
    assert not wrong, "more than one definition:\n" + "\n".join(map(str, wrong))


def size_limit(cell):
    return 35 if any(isinstance(d, ast.ClassDef) for d in cell.definitions) else 25


@pytest.mark.parametrize("page", RULED)
def test_exported_cells_are_short(page):
    wrong = [c for c in exported([page]) if len(c.lines) > size_limit(c)]
    assert not wrong, "\n".join(
        f"{c}: {len(c.lines)} lines; {size_limit(c)} at most" for c in wrong
    )


def test_exported_cells_are_short_as_a_rule(record_property):
    lengths = [len(c.lines) for c in exported(RULED) if c.lines] or [0]
    middle = statistics.median(lengths)
    text = f"{len(lengths)} exported cells; lines: median {middle:g}, largest {max(lengths)}"
    record_property("cells", text)
    assert middle <= 14, text


@pytest.mark.parametrize("page", RULED)
def test_what_is_exported_is_shown(page):
    """Within two code cells after an exported cell that the site shows, the reader sees what it gives."""
    cells, wrong = [c for c in code_cells(page) if not c.only_imports], []
    for i, c in enumerate(cells):
        shown = any(near.says_something for near in cells[i : i + 3])
        if c.exported and "exports" in c.flags and not shown and c.names not in UNSHOWN:
            wrong.append(c)
    assert not wrong, "nothing is shown within two cells after:\n" + "\n".join(map(str, wrong))


def test_exceptions_are_of_use():
    """TO_DO, PAIRS and UNSHOWN name pages and cells that are there."""
    assert not set(TO_DO) - set(PAGES)
    there = {c.names for c in exported(PAGES)}
    assert not (PAIRS.keys() | UNSHOWN.keys()) - there


@pytest.mark.parametrize("page", RULED)
def test_columns(page):
    """At most 90 where the site shows the source, so that nothing is cut; 100 where it is folded or left out."""
    wrong = []
    for c in code_cells(page):
        left_out = c.flags.keys() & {"export", "exporti", "hide"} or c.flags.get("echo") == "false"
        limit = 100 if left_out or "hide-input" in c.tags else 90
        wrong += [f"{c}: {len(x)} > {limit}: {x}" for x in c.code.splitlines() if len(x) > limit]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_few_cells_are_noisy(page):
    noisy = [c for c in code_cells(page) if "noisy" in c.flags]
    assert len(noisy) <= 3, "\n".join(map(str, noisy))


FOLDED = [
    "import math",
    "#| export\nimport math",
    "%matplotlib inline",
    "book_style()",
    "#| hide\n!git clone x",
    '#| fig-alt: "a line"\nplt.plot(x)',
    "d = Diagram(3, 2)",
    'Markdown("a | b")',
    "def grade_x(answer): ...",
    "grade_x(lambda x: x)",
    "#| fold: true\nx = 1",
]
OPEN = [
    "x = 1",
    "import math\nx = math.pi",
    "#| exports\nclass Diagram: ...",
    "#| exports\ndef f(): return Diagram(3, 2)",
    "#| export\ndef f(): ...",
    "#| eval: false\ndef x(x): ...\n\n\ngrade_x(x)",
    '#| fig-alt: "a line"\n#| fold: false\nplt.plot(x)',
]


def test_fold_can_tell(run, tmp_path):
    """The rule on a page of its own: cells that carry the wrong tags are named, then mended, and nothing else changes."""
    hidden = dict(jupyter=dict(source_hidden=True), tags=["hide-input"])
    page = tmp_path / "page.ipynb"

    def written(wrong):
        cells = [
            dict(
                cell_type="code",
                execution_count=None,
                id=str(i),
                metadata=hidden if (source in FOLDED) != wrong else {},
                outputs=[],
                source=source.splitlines(keepends=True),
            )
            for i, source in enumerate(FOLDED + OPEN)
        ]
        nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"

    page.write_text(written(wrong=True), encoding="utf-8")
    said = run("python", "tools/fold.py", "--check", page, code=1).stdout
    assert said.count("should be folded") == len(FOLDED)
    assert said.count("should be open") == len(OPEN)
    run("python", "tools/fold.py", page)
    assert page.read_text(encoding="utf-8") == written(wrong=False)
    run("python", "tools/fold.py", "--check", page)


def test_cells_are_folded_by_rule(run):
    run("python", "tools/fold.py", "--check")


def test_code_in_pages_is_clean(run):
    """Ruff reads notebooks; which rules hold there stands in pyproject.toml."""
    run("ruff", "check", "nbs")


# --- The modules that are made of the pages ---


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """The `_name`s that a file takes from our modules, by import or as an attribute of a module."""
    found, modules = [], {"ddpm_nb"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = node.level > 0 or (node.module or "").split(".")[0] == "ddpm_nb"
            for a in node.names if ours else ():
                if not node.module or node.module == "ddpm_nb":
                    modules.add(a.asname or a.name)
                if is_private(a.name):
                    found.append(a.name)
        elif isinstance(node, ast.Import):
            modules |= {
                a.asname for a in node.names if a.asname and a.name.split(".")[0] == "ddpm_nb"
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner in modules or owner.startswith("ddpm_nb."):
                found.append(f"{owner}.{node.attr}")
    return found


def sources():
    """What we wrote, as (its name, its syntax tree): modules, tools, benchmarks, docs, and the pages' code."""
    for folder in ("ddpm_nb", "tools", "benchmarks", "docs"):
        for p in sorted((ROOT / folder).glob("*.py")):
            yield f"{folder}/{p.name}", ast.parse(p.read_text(encoding="utf-8"))
    for page in PAGES:
        body = [s for c in code_cells(page) if "hide" not in c.flags for s in c.body]
        yield page, ast.Module(body, [])


def test_private_names_stay_at_home():
    tree = "from .a import _x\nfrom ddpm_nb import b as c\nimport ddpm_nb.d\nc._y\nddpm_nb.d._z\nself._w"
    assert private_names(ast.parse(tree)) == ["_x", "c._y", "ddpm_nb.d._z"]
    wrong = {name: found for name, tree in sources() if (found := private_names(tree))}
    assert not wrong, wrong


def page_number(module):
    """The number of the page that a module is made of."""
    text = module.read_text(encoding="utf-8")
    return int(re.search(r"File to edit: \.\./nbs/(\d+)_\w+\.ipynb", text)[1])


def imported(module):
    """The names of our modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = (
                (node.module or "") if node.level else (node.module or "").removeprefix("ddpm_nb.")
            )
            if node.level or (node.module or "").split(".")[0] == "ddpm_nb":
                found |= {name} if name not in ("", "ddpm_nb") else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name[8:] for a in node.names if a.name.startswith("ddpm_nb.")}
    return found & {p.stem for p in MODULES}


# The appendices' modules: what they may import of ours, and who may import them.
MAY_IMPORT = dict(datasets=set(), device=set(), images={"data"}, plot={"images"})


def may_import(a, b, pages):
    """Whether module a may import module b: from an earlier page, but for the appendices."""
    if a == "cli":
        return True
    if a in MAY_IMPORT:
        return b in MAY_IMPORT[a]
    if b == "datasets":
        return a == "data"
    if b == "device":
        return True
    if b == "images":
        return pages[a] > pages["data"]  # images imports data
    return b not in ("plot", "cli") and pages[b] < pages[a]


def test_imports_go_one_way():
    pages = {m.stem: page_number(m) for m in MODULES}
    wrong = [
        f"{a.stem} (page {pages[a.stem]}) imports {b} (page {pages[b]})"
        for a in MODULES
        for b in sorted(imported(a))
        if not may_import(a.stem, b, pages)
    ]
    assert not wrong, "\n".join(wrong)


def test_public_names_are_few(record_property):
    """A name is public if a user of the library would call it."""
    count = {}
    for m in MODULES:
        for node in ast.parse(m.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                count[m.stem] = len(ast.literal_eval(node.value))
    text = f"{sum(count.values())} public names: " + ", ".join(f"{m} {n}" for m, n in count.items())
    record_property("names", text)
    assert sum(count.values()) <= 165, text

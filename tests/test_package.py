"""The package is what the notebooks say, imports with the run-time requirements alone, and can be built."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p.stem for p in (ROOT / "ddpm_nb").glob("*.py") if not p.stem.startswith("_"))
TREE = (
    "nbs",
    "ddpm_nb",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, as a git repository of its own, without what git ignores."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source,
                tmp_path / name,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
        else:
            shutil.copy(source, tmp_path / name)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "copy"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_package_is_what_the_notebooks_say(copy, run):
    for p in (copy / "ddpm_nb").glob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    run("nbdev-export", cwd=copy)
    run("nbdev-clean", cwd=copy)
    diff = run("git", "status", "--porcelain", "--untracked-files=all", cwd=copy).stdout
    assert diff == "", run("git", "diff", "--no-ext-diff", cwd=copy).stdout[:3000] or diff


BLOCK = """
import importlib.metadata as m, re, sys
from importlib.machinery import PathFinder
def closure(name, seen):
    key = re.sub("[-_.]+", "-", name).lower()
    if key in seen: return
    try: needs = m.requires(name) or []
    except m.PackageNotFoundError: return
    seen.add(key)
    for need in needs:
        if "extra ==" not in need: closure(re.split(r"[ ;<>=!~\\[(]", need)[0], seen)
seen = set()
closure("ddpm_nb", seen)
owners = m.packages_distributions()
allowed = lambda top: top not in owners or any(re.sub("[-_.]+", "-", d).lower() in seen for d in owners[top])
class OnlyAllowed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if allowed(name.split(".")[0]): return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [OnlyAllowed if f is PathFinder else f for f in sys.meta_path]
"""


# Each module into a process of its own that has imported torch, which takes the time, and nothing of ours.
EACH_ALONE = """
import importlib, os, torch
assert not [m for m in sys.modules if m.startswith("ddpm_nb")]
for name in sys.argv[1:]:
    if os.fork():
        if os.wait()[1]: print(f"{name} did not import", flush=True)
    else:
        try: importlib.import_module(name); os._exit(0)
        except BaseException as e: print(f"{name}: {type(e).__name__}: {e}", flush=True); os._exit(1)
"""


def test_imports_need_only_run_time_requirements(run):
    names = ["ddpm_nb", *(f"ddpm_nb.{m}" for m in MODULES)]
    assert run("python", "-c", BLOCK + EACH_ALONE, *names).stdout == ""
    assert len(MODULES) > 15


def test_an_import_of_more_is_seen(run):
    found = run(
        "python", "-c", BLOCK + EACH_ALONE, "ddpm_nb.scheduler", "nbdev", "diffusers"
    ).stdout
    assert found.count("No module named") == found.count("did not import") == 2
    assert "nbdev" in found and "ddpm_nb" not in found


def test_wheel_and_sdist(copy, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run("python", "-m", "build", "--no-isolation", "--outdir", out, copy)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entry = z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {f"ddpm_nb/{m}.py" for m in MODULES} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "nbs", "benchmarks"))]
    weights = {str(p.relative_to(ROOT)) for p in (ROOT / "ddpm_nb/weights").rglob("*.*")}
    assert weights and weights <= set(names)
    assert "Version: 0.1.0" in metadata and "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: torch>=2.6" in metadata and "Provides-Extra: dev" in metadata
    assert (
        "ddpm-train" in entry and "ddpm-sample" in entry and "ddpm_nb = ddpm_nb._modidx:d" in entry
    )
    target = tmp_path_factory.mktemp("site")
    run(
        "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel
    )
    code = "import ddpm_nb.train as t; print(t.__file__)"
    assert str(target) in run("python", "-c", code, cwd=target, PYTHONPATH=str(target)).stdout


def test_notebooks_hold_no_path_of_a_machine_and_no_errors():
    for p in (ROOT / "nbs").glob("*.ipynb"):
        text = p.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|Users|work|tmp)/\w", text), p
        for cell in json.loads(text)["cells"]:
            for out in cell.get("outputs", []):
                assert out["output_type"] != "error" and out.get("name") != "stderr", (p, out)


def test_python_is_new_enough():
    assert sys.version_info >= (3, 11)


def test_readme_is_the_index_page(run):
    run("python", "tools/readme.py", "--check")


def test_links_between_pages_lead_somewhere():
    for p in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                for link in re.findall(r"\]\(([^)#\s]+)", "".join(cell["source"])):
                    assert link.startswith("http") or (p.parent / link).exists(), (p.name, link)

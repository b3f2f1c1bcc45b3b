"""The book in JupyterLab: opened, followed by its links, run from the top, saved; and a long cell that is interrupted."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import chromium
from jupyter_client import KernelManager
from test_pages import outputs, same

ROOT = Path(__file__).parent.parent


@pytest.fixture
def lab(book, tmp_path):
    """JupyterLab as `make lab` starts it, over a copy of the book; gives its address and the copy."""
    flags = [
        f"--config={ROOT / 'tools' / 'lab.py'}",
        f"--ServerApp.root_dir={tmp_path}",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
    ]
    quiet = dict(
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        PYTHONWARNINGS="ignore",
        PYTHONPATH=str(ROOT),
    )
    log = tmp_path / "lab.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *flags],
            stdout=out,
            stderr=out,
            cwd=tmp_path,
            env={**os.environ, **quiet, "JUPYTER_CONFIG_DIR": str(tmp_path / "config")},
        )
    try:
        for _ in range(240):
            if found := re.search(r"http://(localhost|127\.0\.0\.1):(\d+)/lab", log.read_text()):
                break
            time.sleep(0.5)
        assert found, log.read_text()
        yield f"http://127.0.0.1:{found[2]}/lab/tree", tmp_path
    finally:
        server.terminate()
        server.wait(30)


PAGE, CONTROL = "03_embedding.ipynb", "09_control.ipynb"
COUNTS = "jupyterapp.shell.currentWidget.content.widgets.map(c => c.model.sharedModel.execution_count || c.model.type != 'code')"


def test_page_in_jupyterlab(lab):
    address, folder = lab
    stored = list(outputs(folder / "nbs" / PAGE))
    before = json.loads((folder / "nbs" / PAGE).read_text(encoding="utf-8"))
    with chromium() as browser:
        tab = browser.new_page(viewport=dict(width=1300, height=1000))
        tab.goto(f"{address}/nbs/index.ipynb?reset")
        tab.locator(".jp-RenderedMarkdown a", has_text="03 Time embedding").first.click(
            timeout=60_000
        )
        tab.wait_for_function(
            f"jupyterapp.shell.currentWidget?.context?.path == 'nbs/{PAGE}'", timeout=60_000
        )
        tab.wait_for_function(
            "jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'",
            timeout=60_000,
        )
        tab.evaluate("void jupyterapp.commands.execute('runmenu:restart-and-run-all')")
        tab.locator(".jp-Dialog .jp-mod-accept").click()
        runs = [
            c for c in before["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()
        ]
        tab.wait_for_function(
            f"{COUNTS}.filter(x => x && x !== true).length == {len(runs)}", timeout=120_000
        )
        tab.wait_for_function(
            "jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'",
            timeout=60_000,
        )
        tab.evaluate("jupyterapp.commands.execute('docmanager:save')")
        tab.wait_for_function("!jupyterapp.shell.currentWidget.context.model.dirty", timeout=30_000)
        tab.screenshot(path=folder / "lab.png")
    after = json.loads((folder / "nbs" / PAGE).read_text(encoding="utf-8"))
    blank = [
        i for i, c in enumerate(after["cells"]) if "#| eval: false" in "".join(c["source"])
    ]  # the exercises: unsolved
    for i, ((source, was), (_, now)) in enumerate(
        zip(stored, outputs(folder / "nbs" / PAGE), strict=True)
    ):
        if i not in blank:
            assert same(now, was), f"{source}\nstored: {was}\nnow: {now}"
            assert not any(
                o["output_type"] == "error" for o in after["cells"][i].get("outputs", [])
            ), source
    for c, d in zip(
        before["cells"], after["cells"], strict=True
    ):  # saved clean: nothing but outputs may differ
        assert {k: v for k, v in c.items() if k != "outputs"} == {
            k: v for k, v in d.items() if k != "outputs"
        }
    assert before["metadata"] == after["metadata"]


def test_sliders_draw(lab):
    """Page 09's sliders, with no more of the page than they need: a slider that is moved draws other pictures."""
    address, folder = lab
    page = json.loads((folder / "nbs" / CONTROL).read_text(encoding="utf-8"))
    needed = ("import json", "def eight", "ipywidgets")
    sources = ["".join(c["source"]) for c in page["cells"] if c["cell_type"] == "code"]
    kept = [next(s for s in sources if mark in s) for mark in needed]
    assert "#| hide" in kept[-1] and "#| eval: false" in kept[-1]
    lines = "from ddpm_nb.control import guided\ndenoiser = load_denoiser('digits')"
    cells = [kept[0], lines, *kept[1:]]
    blank = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    page["cells"] = [dict(blank, source=s, id=f"cell{i}") for i, s in enumerate(cells)]
    (folder / "nbs" / "sliders.ipynb").write_text(json.dumps(page))
    with chromium() as browser:
        tab = browser.new_page(viewport=dict(width=1300, height=1000))
        tab.goto(f"{address}/nbs/sliders.ipynb?reset")
        tab.wait_for_function(
            "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'",
            timeout=60_000,
        )
        tab.evaluate("void jupyterapp.commands.execute('runmenu:run-all')")
        picture = tab.locator(".widget-interact img")
        picture.wait_for(timeout=60_000)
        sliders = tab.locator(".widget-interact .noUi-handle")
        assert sliders.count() == 4
        seen = {picture.get_attribute("src")}
        for i in range(4):  # class, guidance, steps, seed: each counts
            sliders.nth(i).press("ArrowRight")
            tab.wait_for_function(
                "known => !known.includes(document.querySelector('.widget-interact img')?.src ?? known[0])",
                arg=sorted(seen),
                timeout=60_000,
            )
            seen.add(picture.get_attribute("src"))
        assert len(seen) == 5
        tab.screenshot(path=folder / "sliders.png")


LONG = """
import tempfile
from ddpm_nb.train import DiffusionConfig, ModelConfig, train_diffusion
out = tempfile.mkdtemp()
config = DiffusionConfig(out_dir=out, max_steps=100_000, save_every=10, log_every=5, precision="float32")
train_diffusion(config, ModelConfig(4, (1, 2), (1,), 16, channels=1))
"""


def test_an_interrupted_cell_leaves_the_kernel_usable(tmp_path):
    manager = KernelManager()
    manager.start_kernel(
        cwd=str(tmp_path), env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    )
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        job = client.execute(LONG)
        shown, deadline = "", time.time() + 120
        while (
            not re.search(r"\b[1-9]\d+/100000|\b[1-9]\d+/100,000", shown) and time.time() < deadline
        ):
            message = client.get_iopub_msg(timeout=120)
            assert message["msg_type"] != "error", message["content"]
            shown += message["content"].get("text", "") if message["msg_type"] == "stream" else ""
        assert time.time() < deadline, f"no progress shown: {shown[-300:]}"
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != job:
            pass
        assert reply["content"]["ename"] == "TrainingStopped", reply[
            "content"
        ]  # a stop that has been saved
        check = "from ddpm_nb.runs import load_denoiser; from ddpm_nb.sample import sample; print(sample(load_denoiser(out), 2, steps=3).shape)"
        for _ in range(20):  # right after an error a kernel may drop what is sent to it
            seen = []
            done = client.execute_interactive(check, timeout=60, output_hook=seen.append)
            if done["content"]["status"] != "aborted":
                break
            time.sleep(0.5)
        said = "".join(m["content"].get("text", "") for m in seen if m["msg_type"] == "stream")
        assert "[2, 1, 8, 8]" in said, (
            said,
            [m["content"] for m in seen if m["msg_type"] == "error"],
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

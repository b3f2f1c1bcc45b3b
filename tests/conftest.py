"""What the tests share: the project's folder, and commands run as a user runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forks

from ddpm_nb import cli

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def root():
    return ROOT


QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="session")
def forks():
    server = Forks({**os.environ, **QUIET})
    yield server
    server.close()


@pytest.fixture
def run(forks, tmp_path_factory):
    """Runs a command line and returns its result; `code` is the exit status that is expected."""

    def run(*args, code=0, timeout=600, cwd=None, **env):
        script = BIN / args[0]
        command = [str(script) if script.exists() else args[0], *map(str, args[1:])]
        env, cwd = {**os.environ, **QUIET, **env}, str(cwd or ROOT)
        if args[0].startswith(("ddpm-", "nbdev-")):
            out, err = (tmp_path_factory.mktemp("run") / name for name in ("out", "err"))
            job = dict(argv=command, cwd=cwd, env=env, stdout=str(out), stderr=str(err))
            status = forks.run(job, timeout)
            done = subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())
        else:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env
            )
        assert done.returncode == code, (
            f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a command says on stderr when it refuses what was typed: in this process, which is quicker than `run`."""

    def refused(command, *args, cwd=None):
        if cwd:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [command, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            getattr(cli, command.replace("ddpm-", "main_"))()
        said = capsys.readouterr().err
        assert ended.value.code == 2, f"{sys.argv} ended with {ended.value.code}\n{said}"
        return said

    return refused


@pytest.fixture
def book(tmp_path):
    """A copy of the book, so that running a page changes nothing."""
    for name in ("nbs", "figures", "design_docs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


TINY = [
    "--lowest-resolution-size",
    "4",
    "--dim-multiply",
    "1,2",
    "--transformer-layers",
    "1",
    "--base-dim",
    "16",
    "--channels",
    "1",
    "--batch-size",
    "16",
    "--precision",
    "float32",
    "--warmup-steps",
    "5",
    "--max-steps",
    "20",
]


@pytest.fixture
def tiny():
    """Flags of a network that trains in no time on the digits."""
    return TINY


def pytest_terminal_summary(terminalreporter):
    """Shows what tests have measured (record_property), also when workers ran them."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for _, text in report.user_properties:
            terminalreporter.write_line(text)

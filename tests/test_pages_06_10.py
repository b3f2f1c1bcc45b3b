"""Pages 06, 07 and 10: what their graders say to the usual slips, and what data, samplers and checkpoints refuse."""

import contextlib
import io
import math
import os
import shutil
import signal
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cells import run_cells
from PIL import Image
from scipy.optimize import brentq
from sklearn.datasets import load_digits

from ddpm_nb.data import (
    PictureFolder,
    _resize_crop,
    batch_indices,
    batches,
    check_model_range,
    epoch_order,
    load_data,
    load_labels,
    to_model_range,
)
from ddpm_nb.runs import (
    StopSignal,
    _write_tensors,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_pretrained,
    load_x0_error,
    open_run,
    read_checkpoint,
    save_checkpoint,
)
from ddpm_nb.sample import SAMPLERS, ddim_sample, ddim_step, sample, timestep_walk
from ddpm_nb.scheduler import LinearNoiseScheduler

linear = LinearNoiseScheduler()


def refused(message, call, *args, **kwargs):
    """The call raises a ValueError that says this."""
    with pytest.raises(ValueError) as said:
        call(*args, **kwargs)
    assert message in str(said.value)


# --- 06: data


def test_grader_of_padding():
    digits = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
    page = run_cells(
        "06_data.ipynb",
        "def grade_padding",
        "def to_padded_solution",
        **dict(digits=digits, torch=torch, F=F, to_model_range=to_model_range),
    )
    grade, right = page["grade_padding"], page["to_padded_solution"]
    assert grade(right).startswith("Correct")

    def scaled_first(pixels, size):
        d = (size - pixels.shape[-1]) // 2
        return F.pad(to_model_range(pixels), (d, d, d, d))

    assert "mid-grey" in grade(scaled_first)
    assert "middle 8 x 8" in grade(lambda pixels, size: right(pixels, size) / 2)
    assert "should be black" in grade(lambda p, size: F.pad(right(p, size - 2), (1,) * 4, value=1))
    assert "expected the shape" in grade(lambda pixels, size: to_model_range(pixels))
    assert "it raised" in grade(lambda pixels, size: pixels.nothing)


def test_grader_of_steps_of():
    names = dict(epoch_order=epoch_order, batch_indices=batch_indices)
    page = run_cells("06_data.ipynb", "def grade_steps", "def steps_of_solution", **names)
    grade, right = page["grade_steps"], page["steps_of_solution"]
    assert grade(right).startswith("Correct")

    def each_epoch(picture, seed, batch_size, n, epochs, offset):
        places = [int((epoch_order(seed, e, n) == picture).nonzero()) for e in range(epochs)]
        return [e * offset(n, batch_size) + p // batch_size for e, p in enumerate(places)]

    assert "nothing is dropped" in grade(lambda *a: each_epoch(*a, lambda n, size: n // size))
    assert "from the start of an epoch" in grade(lambda *a: each_epoch(*a, lambda n, size: 0))
    assert "from 0" in grade(lambda *a: [k + 1 for k in right(*a)])
    assert "it raised" in grade(lambda *a: 1 / 0)


def test_model_range_refuses():
    refused("got 0 to 16", check_model_range, torch.arange(17))
    refused("looks like [0, 1]", check_model_range, torch.rand(9))
    refused("nan", check_model_range, torch.tensor([-1.0, math.nan]))
    refused("-1.001", check_model_range, torch.tensor([-1.001, 1]))
    refused("too small: 6 x 10", _resize_crop, Image.new("L", (10, 6)), (8, 8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder `mixed` with pictures of 64 x 64 to 84 x 76, one of them broken, and a bomb; we stand above it."""
    monkeypatch.chdir(tmp_path)
    for name in ("mixed", "empty", "broken", "bomb"):
        (tmp_path / name).mkdir()
    for i in range(5):
        size = 64 + 5 * i, 64 + 3 * i
        Image.effect_noise(size, 50).convert("RGB").save(f"mixed/{i}.png")
    Path("mixed/9.png").write_text("not a picture")
    Path("broken/9.png").write_text("not a picture")
    bomb = bytearray(Path("mixed/0.png").read_bytes())
    bomb[16:24] = np.array([20000, 20000], ">u4").tobytes()  # width, height in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")  # and the header's checksum
    Path("bomb/bomb.png").write_bytes(bomb)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path


def test_folder_refuses(folder):
    refused("empty holds none", PictureFolder, "empty")
    refused("none of its 1 pictures can be read", PictureFolder, "broken")
    refused(
        "size: 1 of 5 pictures in mixed are too small for 65 x 64", PictureFolder, "mixed", (65, 64)
    )
    refused(
        "size: must be given, the pictures in mixed differ: 0.png is 64", PictureFolder, "mixed"
    )
    refused("size: expected a number of pixels", PictureFolder, "mixed", (32, 0))
    refused("bomb.png", PictureFolder, "bomb", 32)
    data = PictureFolder("mixed", 32)
    assert len(data) == 5 and list(data.skipped) == ["9.png"] and data.channels == 3
    assert data.inexact == "5 of 5 were resized to 32 x 32"
    assert PictureFolder("mixed", 64).inexact == "4 of 5 were resized to 64 x 64"
    assert torch.equal(data[-1], data[4])
    with pytest.raises(IndexError):
        data[5]


def test_load_data_refuses(folder):
    refused("did you mean fashion_mnist?", load_data, "fashion")
    refused("there is no folder pictures/of/cats", load_data, "pictures/of/cats")
    refused("FFHQ: expected a folder", load_data, "FFHQ", data_dir="elsewhere")
    refused("split: expected one of train, test, all", load_data, "digits", split="no-such-split")
    refused("split: expected a folder", load_data, "mixed", split="test")
    refused("size: digits has pictures of 8 x 8", load_data, "digits", size=32)
    refused("channels: digits has 1", load_data, "digits", channels=3)
    refused("channels: expected 1 or 3", load_data, "digits", channels=2)
    refused("looks like [0, 1]", load_data, torch.rand(3, 1, 8, 8))
    refused("expected uint8 pictures", load_data, torch.zeros(3, 8, 8, dtype=torch.uint8))
    refused("name: expected one of digits", load_labels, "no-such-data")
    assert load_data(torch.full((1, 1, 8, 8), -0.5)).inexact
    assert not load_data(to_model_range(torch.arange(64).view(1, 1, 8, 8))).inexact


def test_batches_refuse():
    data = load_data("digits")
    refused("batch_size: expected 1..10", batch_indices, 0, 0, 11, 10)
    refused("batch_size: expected 1..1500", batches, data, 0, 1501, 0, 1)
    refused("multiple of the 3", batches, data, 0, 64, 0, 1, world=3)


# --- 07: sampling


def test_grader_of_noise_share():
    starts = "def grade_noise_share", "def noise_share"
    page = run_cells("07_sampling.ipynb", *starts, linear=linear)
    grade, right = page["grade_noise_share"], page["noise_share"]
    assert grade(right).startswith("Correct")
    assert "eta scales" in grade(lambda s, t, t_prev, eta: eta * right(s, t, t_prev, 1))
    assert "variances add" in grade(lambda *a: right(*a) ** 0.5)
    fresh = lambda s, t, t_prev, eta: (eta * s.sampling_std(t, t_prev)) ** 2  # noqa: E731
    assert "divide it" in grade(fresh)
    assert "arrives at t_prev" in grade(
        lambda s, t, *rest: fresh(s, t, *rest) / (1 - s.alpha_cumprod[t])
    )
    assert "expected 0." in grade(lambda *a: 0.5)
    assert "nothing was returned" in grade(lambda *a: None)


def test_grader_of_heun_step():
    starts = "class Mixture", "def quantiles", "def grade_heun_step", "def heun_step"
    page = run_cells("07_sampling.ipynb", *starts[:1], torch=torch, math=math)
    names = dict(np=np, brentq=brentq, linear=linear, q=np.linspace(0.01, 0.99, 20))
    page |= names | dict(toy=page["Mixture"](linear))
    page = run_cells("07_sampling.ipynb", *starts[1:], **page)
    grade, right = page["grade_heun_step"], page["heun_step"]
    assert grade(right).startswith("Correct")

    def euler(s, model, xt, t, t_prev):
        return ddim_step(s, xt, model(xt, torch.tensor([t])), t, t_prev, clip=False)[0]

    assert "Euler's" in grade(euler)
    assert "does not fall" in grade(lambda s, model, xt, t, t_prev: xt)
    assert "nothing was returned" in grade(lambda *a: None)


def zeros(xt, t):
    return torch.zeros_like(xt)


def test_sampling_refuses():
    for steps in (0, 1001):
        refused("steps: expected 1..1000", timestep_walk, 1000, steps)
    refused("eta: expected a number in 0..1", ddim_sample, zeros, linear, torch.zeros(1), 2, eta=2)
    given = dict(model=zeros, scheduler=linear, n=4, shape=(1, 2, 2), steps=2)
    named = f"method: expected one of {', '.join(SAMPLERS)}; got 'no-such-sampler'"
    refused(named, sample, **given | dict(method="no-such-sampler"))
    refused("n and batch_size: expected at least 1; got 0 and 64", sample, **given | dict(n=0))
    refused("got 4 and 0", sample, **given | dict(batch_size=0))
    refused("shape: expected (c, h, w) for a model without", sample, **given | dict(shape=None))
    refused("steps: expected 1..1000", sample, **given | dict(steps=1001))
    refused("precision: expected one of", sample, **given | dict(precision="no-such-precision"))


def test_bar_of_sample():
    """There is none unless it is asked for, and an interrupted call closes it."""
    given = dict(model=zeros, scheduler=linear, n=2, shape=(1, 2, 2), steps=3)
    with contextlib.redirect_stderr(io.StringIO()) as bar:
        sample(**given)
    assert bar.getvalue() == ""
    with contextlib.redirect_stderr(io.StringIO()) as bar:
        sample(**given, batch_size=1, progress=True)
    assert "6/6" in bar.getvalue()

    def interrupt(first, t_prev, x_prev, x0_pred):
        raise KeyboardInterrupt

    with contextlib.redirect_stderr(io.StringIO()) as bar:
        with pytest.raises(KeyboardInterrupt):
            sample(**given, callback=interrupt, progress=True)
        print("interrupted", file=sys.stderr)
    assert bar.getvalue().endswith("\ninterrupted\n")


# --- 10: checkpoints


def graders_of_checkpoints():
    class Killed(BaseException):
        pass

    return run_cells(
        "10_checkpoints.ipynb",
        *("def grade_last_good", "def last_good", "def grade_replace_text"),
        **dict(tempfile=tempfile, shutil=shutil, sys=sys, Path=Path, torch=torch, Killed=Killed),
        **dict(save_checkpoint=save_checkpoint, checkpoints=checkpoints),
        read_checkpoint=read_checkpoint,
    )


def test_grader_of_last_good():
    page = graders_of_checkpoints()
    grade, right = page["grade_last_good"], page["last_good"]
    assert grade(right).startswith("Correct")
    assert "a bit of its weights" in grade(lambda folder: checkpoints(folder)[-1])
    assert "a bit of its weights" in grade(find_checkpoint)

    def of_the_right_size(folder):
        sizes = [(p / "model.safetensors").stat().st_size for p in checkpoints(folder)]
        return checkpoints(folder)[max(i for i, n in enumerate(sizes) if n == sizes[0])]

    assert "a bit of its weights" in grade(of_the_right_size)

    def one_before(folder):
        return checkpoints(folder)[-2]

    assert "config.json was cut off" in grade(one_before)

    def oldest_good(folder):
        for path in checkpoints(folder):
            with contextlib.suppress(ValueError):
                read_checkpoint(path, "model")
                return path

    assert "a newer good one" in grade(oldest_good)

    def raises_at_the_end(folder):
        if (found := right(folder)) is None:
            raise ValueError("none")
        return found

    assert "without a good one it raised" in grade(raises_at_the_end)
    assert "expected None" in grade(lambda folder: right(folder) or checkpoints(folder)[0])
    assert "expected the folder step-0000002" in grade(lambda folder: "here")
    assert "it raised ValueError" in grade(lambda folder: read_checkpoint(folder, "model"))


def test_grader_of_replace_text():
    page = graders_of_checkpoints()
    grade = page["grade_replace_text"]

    def right(file, text):
        temporary = file.with_name(f".tmp-{file.name}")
        temporary.write_text(text)
        temporary.replace(file)

    def deleted_first(file, text):
        temporary = file.with_name(f".tmp-{file.name}")
        temporary.write_text(text)
        file.unlink()
        temporary.rename(file)

    def in_place(file, text):
        with open(file, "w") as f:
            f.write(text)

    def never_renamed(file, text):
        file.with_name(f".tmp-{file.name}").write_text(text)

    traced = sys.gettrace()
    assert grade(right).startswith("Correct")
    assert "there is no file at all" in grade(deleted_first)
    assert "the file says ''" in grade(in_place)
    assert "the file says ''" in grade(lambda file, text: file.write_text(text))
    assert "at the end the file should say 'new'" in grade(never_renamed)
    assert "it raised ZeroDivisionError" in grade(lambda file, text: 1 / 0)
    assert sys.gettrace() is traced


def test_checkpoints_refuse(tmp_path):
    refused("name: expected one of digits", load_pretrained, "no-such-network")
    refused("there is no folder", find_checkpoint, tmp_path / "nowhere")
    refused("holds none", find_checkpoint, tmp_path)
    config = {part: {} for part in ("model", "scheduler", "data")} | dict(
        training=dict(max_steps=100)
    )
    run = tmp_path / "run"
    assert open_run(run, config, resume=False) is None
    tensors = dict(model=dict(x=torch.ones(2)), training=dict(x=torch.ones(2)))
    path = save_checkpoint(run, 100, tensors, config, keep=3)
    refused("variance: the optimal one needs a measured table", load_x0_error, run)
    refused("already holds a run", open_run, run, config, resume=False)
    assert open_run(run, config, resume=True) == path
    fewer = dict(config, training=dict(max_steps=50))
    refused("max_steps: expected at least the 100 steps", open_run, run, fewer, resume=True)
    other = dict(config, model=dict(base_dim=8))
    refused("is another run: base_dim is 8 and was None", open_run, run, other, resume=True)
    (tmp_path / "file").write_text("in the way")
    refused("out_dir: cannot write to", open_run, tmp_path / "file", config, resume=False)
    (path / "model.safetensors").unlink()
    refused("cannot be read", load_checkpoint, run)


def test_write_tensors_says_what_is_on_the_disk(tmp_path):
    file = tmp_path / "x.safetensors"
    first = _write_tensors(file, dict(x=torch.zeros(3)))
    assert first != _write_tensors(file, dict(x=torch.ones(3)))
    assert first == _write_tensors(file, dict(x=torch.zeros(3)))


def test_stop_signal_notes_and_gives_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.noted == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.noted == signal.SIGTERM
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))

"""Pages 06, 07 and 10: what their graders say to the usual slips, and what data, samplers and checkpoints refuse."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cells import run_cells
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_nb import runs
from ddpm_nb.data import (
    PictureFolder,
    _resize_crop,
    batch_indices,
    batches,
    check_model_range,
    epoch_order,
    load_data,
    to_model_range,
)
from ddpm_nb.objective import Denoiser, eval_mode
from ddpm_nb.runs import (
    StopSignal,
    _write_tensors,
    checkpoints,
    find_checkpoint,
    load_denoiser,
    load_x0_error,
    open_run,
    read_checkpoint,
    save_checkpoint,
)
from ddpm_nb.sample import (
    SAMPLERS,
    SPACINGS,
    _NoiseAhead,
    ancestral_sample,
    ddim_sample,
    sample,
    timestep_walk,
)
from ddpm_nb.scheduler import VARIANCES, LinearNoiseScheduler, stream
from ddpm_nb.unet import ModelConfig, UNet

linear = LinearNoiseScheduler()


def refused(message, call, *args, **kwargs):
    """The call raises a ValueError that says this, in one line."""
    with pytest.raises(ValueError) as said:
        call(*args, **kwargs)
    assert message in str(said.value) and "\n" not in str(said.value)


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
    refused("size: expected a number of pixels", PictureFolder, "mixed", "32")
    refused("too small for 32 x 80", PictureFolder, "mixed", (32, 80))
    refused("bomb.png", PictureFolder, "bomb", 32)
    data = PictureFolder("mixed", 32)
    assert len(data) == 5 and list(data.skipped) == ["9.png"] and data.channels == 3
    assert data.inexact == "5 of 5 were resized to 32 x 32"
    assert PictureFolder("mixed", 64).inexact == "4 of 5 were resized to 64 x 64"
    wide = PictureFolder("mixed", (32, 64))  # 64 x 64 is cut in height alone, the others shrink
    assert wide.inexact == "4 of 5 were resized to 32 x 64" and wide[1].shape == (3, 32, 64)
    first = torch.from_numpy(np.array(Image.open("mixed/0.png"))).permute(2, 0, 1)
    assert torch.equal(wide[0], first[:, 16:48])
    assert torch.equal(data[-1], data[4])
    with pytest.raises(IndexError):
        data[5]


def test_load_data_refuses(folder):
    refused("did you mean fashion_mnist?", load_data, "fashion")
    refused("there is no folder pictures/of/cats", load_data, "pictures/of/cats")
    refused("FFHQ: expected a folder", load_data, "FFHQ", data_dir="elsewhere")
    refused("split: expected one of train, test, all", load_data, "digits", split="no-such-split")
    refused("split: expected a folder", load_data, "mixed", split="test")
    refused("size: expected that of digits, 8 x 8; got 32 x 32", load_data, "digits", size=32)
    bytes_ = torch.zeros(3, 1, 8, 12, dtype=torch.uint8)
    refused("that of pictures, 8 x 12; got 12 x 8", load_data, bytes_, size=(12, 8))
    assert load_data(bytes_, size=[8, 12]).size == (8, 12)  # a list, as JSON has it
    for size in ("8", 8.5, True, (8, 8, 8), (8, 12.0)):
        refused("size: expected a number of pixels, or (h, w); got", load_data, bytes_, size=size)
    refused("channels: digits has 1", load_data, "digits", channels=3)
    refused("channels: expected 1 or 3", load_data, "digits", channels=2)
    refused("looks like [0, 1]", load_data, torch.rand(3, 1, 8, 8))
    refused("expected uint8 pictures", load_data, torch.zeros(3, 8, 8, dtype=torch.uint8))
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


def test_grader_of_eta_of_beta():
    starts = "def grade_eta_of_beta", "def eta_of_beta"
    page = run_cells("07_sampling.ipynb", *starts, linear=linear)
    grade, right = page["grade_eta_of_beta"], page["eta_of_beta"]
    assert grade(right).startswith("Correct")
    assert "ratio of the variances" in grade(lambda *a: right(*a) ** 2)
    assert "upside down" in grade(lambda *a: 1 / right(*a))
    assert "expected 1." in grade(lambda *a: 1.0)
    assert "nothing was returned" in grade(lambda *a: None)


def zeros(xt, t):
    return torch.zeros_like(xt)


def test_sampling_refuses():
    for steps in (0, 1001):
        refused(
            "steps: expected 1..1000 (where the walk starts); got", timestep_walk, linear, steps
        )
    refused("steps: expected 1..300 (where the walk", timestep_walk, linear, 301, t_start=300)
    refused("t: expected steps in 1..1000; got 0", timestep_walk, linear, t_start=0)
    named = f"spacing: expected one of {', '.join(SPACINGS)}; got 'no-such-spacing'"
    refused(named, timestep_walk, linear, 5, "no-such-spacing")
    xt, walk = torch.zeros(1), [1000, 500, 0]
    for eta in (-0.1, 2):
        refused("eta: expected a number in 0..1", ddim_sample, zeros, linear, xt, walk, eta=eta)
    named = f"variance: expected one of {', '.join(VARIANCES)}, or the error of the guess of x0"
    for bad in ("no-such-variance", None, torch.zeros(1000)):
        refused(named, ancestral_sample, zeros, linear, xt, walk, variance=bad)
    given = dict(denoiser=zeros, scheduler=linear, n=4, shape=(1, 2, 2), steps=2)
    named = f"method: expected one of {', '.join(SAMPLERS)}; got 'no-such-sampler'"
    refused(named, sample, **given | dict(method="no-such-sampler"))
    named = f"spacing: expected one of {', '.join(SPACINGS)}; got 'no-such-spacing'"
    refused(named, sample, **given | dict(spacing="no-such-spacing"))
    refused("n and batch_size: expected at least 1; got 0 and 64", sample, **given | dict(n=0))
    refused("got 4 and 0", sample, **given | dict(batch_size=0))
    refused("steps: expected 1..1000", sample, **given | dict(steps=1001))
    refused("precision: expected one of", sample, **given | dict(precision="no-such-precision"))


def test_arguments_that_no_sampler_takes():
    """Named, with what the sampler does take; what `sample` sees to itself is not among it."""
    given = dict(denoiser=zeros, scheduler=linear, n=2, shape=(1, 2, 2), steps=2)
    message = "no_such_thing: expected what 'ancestral' takes, clip, variance; got 5"
    refused(message, sample, **given, method="ancestral", no_such_thing=5)
    message = "variance: expected what 'ddim' takes, clip, eta; got 'beta'"
    refused(message, sample, **given, method="ddim", variance="beta")
    for method in SAMPLERS:
        for own in ("no_such_thing", "xt", "walk", "noise", "generator"):
            refused(f"{own}: expected what", sample, **given, method=method, **{own: 1})
        assert sample(**given, method=method, clip=False).shape == (2, 1, 2, 2)


def test_denoisers_that_do_not_say():
    """A plain function knows neither schedule nor shape, a Denoiser of a plain network no shape."""
    message = "{}: expected {}, for a denoiser that does not say; got None"
    one, shape = message.format("scheduler", "one"), message.format("shape", "(c, h, w)")
    refused(one, sample, zeros, 4)
    refused(one, sample, zeros, 4, shape=(1, 2, 2))
    refused(shape, sample, zeros, 4, scheduler=linear)
    refused(shape, sample, Denoiser(zeros, linear), 4)
    known = Denoiser(UNet(ModelConfig(4, (1, 2), (), 8, channels=3)), linear)
    assert sample(known, 2, steps=1).shape == (2, 3, 8, 8)
    assert sample(known, 2, shape=(3, 4, 8), steps=1).shape == (2, 3, 4, 8)
    other = sample(known, 2, scheduler=LinearNoiseScheduler(50), steps=2)
    assert not torch.equal(other, sample(known, 2, steps=2))


class Dropping(torch.nn.Module):
    """A network whose answers depend on its mode, with parts in modes of their own."""

    def __init__(self):
        super().__init__()
        self.trained, self.frozen = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()
        self.seen = []

    def forward(self, x, t):
        self.seen.append(tuple(m.training for m in self.modules()))
        return self.frozen(self.trained(x))


@pytest.mark.parametrize("method", SAMPLERS)
def test_sample_draws_without_dropout_and_puts_every_mode_back(method):
    net = Dropping()
    denoiser = Denoiser(net, linear, "x0")
    modes = [m.training for m in denoiser.modules()]
    assert modes == [True, True, True, False]
    given = dict(n=3, shape=(1, 4, 4), steps=4, method=method)
    trained = sample(denoiser, **given)
    assert set(net.seen) == {(False, False, False)}
    assert [m.training for m in denoiser.modules()] == modes
    assert torch.equal(trained, sample(denoiser.eval(), **given))
    assert not any(m.training for m in denoiser.modules())
    denoiser.train()
    net.frozen.eval()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(denoiser, **given, callback=interrupt)
    assert [m.training for m in denoiser.modules()] == modes
    with eval_mode(zeros):  # a function has no modes
        pass


@pytest.mark.parametrize("n, draws", [(1, 1), (3, 5)])
def test_noise_drawn_ahead_is_the_streams_own(n, draws):
    """However slow the reader is, draw k of picture i is the k-th of its own stream."""
    shape = 2, 3, 4
    with _NoiseAhead([stream(7, i) for i in range(n)], shape, "cpu", draws) as noise:
        drawn = []
        for k in range(draws):
            if k == 1:
                time.sleep(0.05)
            drawn.append(noise(torch.empty(n, *shape)))
        with pytest.raises(RuntimeError, match="no noise is left"):
            noise()
    for i in range(n):
        g = stream(7, i)
        for k in range(draws):
            assert torch.equal(drawn[k][i], torch.randn(shape, generator=g)), (i, k)
    assert all(x.dtype == torch.float32 for x in drawn)


def test_sample_takes_start_and_steps_from_the_pictures_stream():
    """Ancestral steps written out, with a generator for each picture: the same pictures."""
    half = lambda xt, t: 0.5 * xt  # noqa: E731
    x = sample(
        half,
        3,
        scheduler=linear,
        shape=(1, 2, 2),
        steps=3,
        method="ancestral",
        spacing="uniform",
        seed=4,
    )
    assert timestep_walk(linear, 3) == [1000, 667, 333, 0]
    walk = timestep_walk(linear, 3)
    for i in range(3):
        g = stream(4, i)
        xt = torch.randn(1, 2, 2, generator=g)
        for t, t_prev in zip(walk[:-1], walk[1:], strict=True):
            mean, variance = linear.posterior_mean_variance((0.5 * xt).clamp(-1, 1), xt, t, t_prev)
            xt = mean + variance**0.5 * torch.randn(1, 2, 2, generator=g) if t_prev else mean
        torch.testing.assert_close(x[i], xt.clamp(-1, 1), rtol=0, atol=1e-6)


def test_bar_of_sample():
    """There is none unless it is asked for, and an interrupted call closes it."""
    given = dict(denoiser=zeros, scheduler=linear, n=2, shape=(1, 2, 2), steps=3)
    given |= dict(method="ancestral")
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


def test_loading_draws_no_random_numbers():
    """The first weights of a network that is then filled from a file are nobody's business."""
    before = torch.get_rng_state()
    load_denoiser("digits")
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoints_refuse(tmp_path):
    message = "checkpoint: expected a run folder, a step folder or one of digits"
    refused(message, load_denoiser, "no-such-network")
    refused(
        "weights: expected ema or raw; got 'no-such-weights'",
        load_denoiser,
        "digits",
        "cpu",
        "no-such-weights",
    )
    refused("weights: expected ema for", load_denoiser, "digits", weights="raw")
    refused("there is no folder", find_checkpoint, tmp_path / "nowhere")
    refused("holds none", find_checkpoint, tmp_path)
    config = {part: {} for part in ("model", "scheduler", "data")} | dict(
        training=dict(max_steps=100), prediction="noise"
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
    refused("cannot be read", load_denoiser, run)


def test_a_run_of_the_first_edition_is_sampled_but_not_gone_on_with(tmp_path):
    """Its config has no prediction: the noise is meant, and its random numbers were others."""
    config, scheduler = ModelConfig(4, (1, 2), (), 8, channels=1), LinearNoiseScheduler()
    net = UNet(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    saved = dict(model=json.loads(json.dumps(asdict(config))), scheduler=scheduler.config, data={})
    saved |= dict(training=dict(max_steps=100))
    tensors = dict(model=net.state_dict(), training=dict(x=torch.ones(2)))
    save_checkpoint(tmp_path, 100, tensors, saved, keep=3)
    denoiser = load_denoiser(tmp_path)
    assert denoiser.prediction == "noise" and not denoiser.training
    xt, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 700])
    expected = scheduler.predict_x0(xt, net.eval()(xt, t), t)
    torch.testing.assert_close(denoiser(xt, t), expected)
    message = "is of the first edition, which drew other random numbers; sample from it, or start"
    refused(message, open_run, tmp_path, saved, resume=True)
    v = tmp_path / "v"
    v.mkdir()
    save_checkpoint(v, 100, tensors, saved | dict(prediction="v"), keep=3)
    assert load_denoiser(v).prediction == "v"
    assert open_run(v, saved | dict(prediction="v"), resume=True) == checkpoints(v)[-1]


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


# ---- page 10: written beside the run


def test_a_checkpoint_holds_what_the_tensors_held(tmp_path, monkeypatch):
    """The disk is slow here: the next step is done before the first byte is written."""
    go, write = threading.Event(), runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda *a: go.wait(10) and write(*a))
    weight = torch.ones(3)
    with runs.CheckpointWriter() as writer:
        writer.save(tmp_path, 1, dict(model=dict(weight=weight)), {}, 2)
        weight.zero_()
        assert checkpoints(tmp_path) == []
        go.set()
    (path,) = checkpoints(tmp_path)
    assert read_checkpoint(path, "model")[1]["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("where", ["look", "save", "wait", "end"])
def test_what_goes_wrong_while_writing_is_said(where, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(runs, "save_checkpoint", full)
    with pytest.raises(OSError, match="no space"), runs.CheckpointWriter() as writer:
        writer.save(tmp_path, 1, {}, {}, 2)
        writer.coming.exception()  # it is over
        if where == "look":
            writer.look()
        if where == "save":
            writer.save(tmp_path, 2, {}, {}, 2)
        if where == "wait":
            writer.wait()
        assert where == "end"


def test_another_error_is_not_hidden_by_one_of_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(runs, "save_checkpoint", full)
    with pytest.raises(FloatingPointError), runs.CheckpointWriter() as writer:
        writer.save(tmp_path, 1, {}, {}, 2)
        raise FloatingPointError


@pytest.mark.parametrize("told", [0, 1])
def test_processes_of_different_speed_stop_at_the_same_step(told):
    """Two processes as threads; one is three times as slow, and one of them hears the signal."""
    met, votes = threading.Barrier(2, timeout=20), [None, None]

    class Process:
        num_processes, device = 2, "cpu"

        def __init__(self, rank):
            self.rank, self.stopped, self.asked = rank, None, 0

        def reduce(self, vote, how):
            self.asked += 1
            votes[self.rank] = vote
            met.wait()
            total = votes[0] + votes[1]
            met.wait()
            return total

        def work(self):
            with StopSignal() as stop:
                for step in range(1, 10_000):
                    time.sleep(0.002 * (1 + 2 * self.rank))
                    if step == 150 and self.rank == told:
                        stop.note(signal.SIGTERM, None)
                    if stop.agreed(step, self):
                        self.stopped = step
                        return

    processes = [Process(0), Process(1)]
    threads = [threading.Thread(target=p.work) for p in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert processes[0].stopped == processes[1].stopped >= 150
    assert processes[0].asked == processes[1].asked < 100

"""What pages 11 and 91 to 94 leave to tests: how their graders answer, and what is refused."""

import math
import signal
from pathlib import Path

import pytest
import torch
from cells import run_cells

from ddpm_nb import cli
from ddpm_nb.data import load_data
from ddpm_nb.device import autocast
from ddpm_nb.objective import training_loss
from ddpm_nb.scheduler import SCHEDULES
from ddpm_nb.train import (
    DIFFUSION_PRESETS,
    DiffusionConfig,
    ModelConfig,
    Trainer,
    train_diffusion,
)

SMALL = ModelConfig(4, (1, 2), (1,), 16, channels=1)
RUN = dict(batch_size=16, learning_rate=1e-3, warmup_steps=5, log_every=5, precision="float32")


def grader(page, name):
    """A grader, made by its cell of a page."""
    return run_cells(page, f"def {name}(", torch=torch)[name]


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda decay, share: math.ceil(math.log(share) / math.log(decay)), "Correct"),
        (lambda decay, share: round(1 / (1 - decay)), "1/e"),
        (lambda decay, share: int(math.log(share) / math.log(decay)), "round up"),
        (lambda decay, share: math.log(share) / math.log(decay), "round up"),
        (lambda decay, share: 7, "expected"),
        (lambda decay, share: None, "nothing was returned"),
    ],
)
def test_grader_of_steps_to_forget(answer, said):
    assert said in grader("11_training.ipynb", "grade_steps_to_forget")(answer)


def weighted(weight):
    """An answer that gives each part's mean a weight: `weight(part, parts)`."""

    def accumulate(loss_of, parts):
        for part in parts:
            (loss_of(part).mean() * weight(part, parts)).backward()

    return accumulate


@pytest.mark.parametrize(
    "answer, said",
    [
        (weighted(lambda part, parts: len(part) / sum(map(len, parts))), "Correct"),
        (weighted(lambda part, parts: 1 / len(parts)), "mean of means"),
        (weighted(lambda part, parts: 1), "add up"),
        (weighted(lambda part, parts: len(part)), "its size over the total"),
        (lambda loss_of, parts: None, "there is no gradient"),
    ],
)
def test_grader_of_accumulate(answer, said):
    assert said in grader("11_training.ipynb", "grade_accumulate")(answer)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(max_steps=0), "max_steps: expected at least 1; got 0"),
        (dict(seed=-1), "seed: expected at least 0; got -1"),
        (
            dict(schedule="no-such-schedule"),
            f"schedule: expected one of {', '.join(SCHEDULES)}; got 'no-",
        ),
        (dict(precision="fp16"), "precision: expected one of auto, float32, bf16; got 'fp16'"),
        (dict(learning_rate=0.0), "learning_rate: expected a number above 0; got 0.0"),
        (dict(clip_norm=math.inf), "clip_norm: expected a number above 0; got inf"),
        (dict(clip_norm=math.nan), "clip_norm: expected a number above 0; got nan"),
        (dict(ema_decay=1.0), "ema_decay: expected at least 0 and below 1; got 1.0"),
        (dict(decay_start=5), "decay_start: expected a step before decay_end = None, or neither"),
        (dict(decay_start=5, decay_end=5), "decay_start: expected a step before decay_end = 5"),
        (
            dict(decay_start=5, decay_end=9, max_steps=10),
            "max_steps: expected at most decay_end = 9, where the learning rate is 0; got 10",
        ),
        (dict(keep=0, seed=-1), " | "),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError) as e:
        DiffusionConfig(**fields)
    assert message in str(e.value)


def test_presets():
    for name, fields in DIFFUSION_PRESETS.items():
        assert DiffusionConfig.preset(name) == DiffusionConfig(**fields)
    assert DiffusionConfig.preset("digits", seed=3).seed == 3
    with pytest.raises(ValueError, match="preset: expected one of digits, .*; got 'no-such-run'"):
        DiffusionConfig.preset("no-such-run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 20 steps."""
    folder = tmp_path_factory.mktemp("run")
    train_diffusion(
        DiffusionConfig(**RUN, max_steps=20, out_dir=str(folder)), SMALL, progress=False
    )
    return folder


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(batch_size=2000, out_dir="x"), "batch_size: expected at most the"),
        (dict(batch_size=15, grad_accumulation=2), "x grad_accumulation = 1 x 2; got 15"),
        (dict(dataset_name="no/such/folder"), "no/such/folder"),
        (dict(timesteps_diff=20), "num_timesteps: expected more than 20"),
        (dict(out_dir="/dev/null/x"), "out_dir: cannot write to"),
    ],
)
def test_training_refuses(fields, message):
    with pytest.raises(ValueError) as e:
        train_diffusion(DiffusionConfig(**RUN | fields), SMALL, progress=False)
    assert message in str(e.value)


def test_training_refuses_pictures_that_are_not_rescaled():
    with pytest.raises(ValueError, match=r"which looks like \[0, 1\]"):
        data = torch.rand(32, 1, 8, 8)
        train_diffusion(DiffusionConfig(**RUN), SMALL, data=data, progress=False)


def test_training_refuses_a_device_that_is_not_here():
    with pytest.raises(ValueError, match="device: expected cpu or .*; got 'no-such-device'"):
        train_diffusion(DiffusionConfig(**RUN), SMALL, progress=False, device="no-such-device")


@pytest.mark.parametrize(
    "fields, base_dim, resume, message",
    [
        (dict(), 16, False, "already holds a run"),
        (dict(seed=1), 16, True, "seed is 1 and was 0"),
        (dict(), 32, True, "base_dim is 32 and was 16"),
        (dict(max_steps=12), 16, True, "max_steps: expected at least the 20 steps"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(finished, fields, base_dim, resume, message):
    config = DiffusionConfig(**dict(RUN, max_steps=30, out_dir=str(finished)) | fields)
    network = ModelConfig(4, (1, 2), (1,), base_dim, channels=1)
    with pytest.raises(ValueError) as e:
        train_diffusion(config, network, resume=resume, progress=False)
    assert message in str(e.value)


def test_a_run_that_is_not_finite_says_which_checkpoint_is_good(finished):
    """The loss becomes infinite in step 23, between checkpoints; nothing of it is saved."""
    steps = iter(range(21, 40))
    broken = lambda *a: training_loss(*a) * (math.inf if next(steps) == 23 else 1)  # noqa: E731
    config = DiffusionConfig(**RUN, max_steps=30, out_dir=str(finished))
    trainer = Trainer(config.new_denoiser(SMALL), load_data("digits"), config, loss=broken)
    with pytest.raises(FloatingPointError) as e:
        trainer.fit(resume=True, progress=False)
    assert "not finite at step 23; last good checkpoint: " in str(e.value)
    assert "step-0000020; try a lower" in str(e.value)
    assert [p.name for p in finished.glob("step-*")] == ["step-0000020"]


def test_autocast_refuses():
    with pytest.raises(ValueError, match="precision: expected one of auto, float32, bf16; got"):
        autocast("cpu", "fp16")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("n: expected at least 1; got 0"), 2, "error: n: expected at least 1; got 0"),
        (OSError("disk full"), 1, "failed: disk full"),
        (FloatingPointError("not finite"), 1, "failed: not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_command_ends_with_one_line(error, status, line, monkeypatch, capsys):
    @cli._command
    def command():
        raise error

    monkeypatch.setattr("sys.argv", ["/usr/bin/ddpm-x"])
    with pytest.raises(SystemExit) as e:
        command()
    assert e.value.code == status and capsys.readouterr().err == f"ddpm-x: {line}\n"


def test_a_stopped_run_ends_with_its_signal(monkeypatch, capsys):
    from ddpm_nb.runs import TrainingStopped

    @cli._command
    def command():
        raise TrainingStopped(signal.SIGTERM, Path("run/step-0000010"))

    with pytest.raises(SystemExit) as e:
        command()
    assert e.value.code == 143 and "saved in run" in capsys.readouterr().err

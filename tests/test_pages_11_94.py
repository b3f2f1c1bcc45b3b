"""What pages 11 and 91 to 94 leave to tests: how their graders answer, and what is refused."""

import argparse
import json
import math
import signal
import sys
from dataclasses import MISSING, asdict
from dataclasses import fields as fields_of
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import run_cells
from PIL import Image

from ddpm_nb import cli
from ddpm_nb.data import load_data
from ddpm_nb.device import autocast
from ddpm_nb.images import save_grid
from ddpm_nb.objective import training_loss
from ddpm_nb.runs import find_checkpoint, load_denoiser
from ddpm_nb.sample import SAMPLERS, SPACINGS, ddim_sample, sample
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
        (
            dict(precision="fp16"),
            "precision: expected one of auto, float32, tf32, bf16; got 'fp16'",
        ),
        (dict(compile="fast"), "compile: expected one of auto, on, off, graphs; got 'fast'"),
        (dict(compile="graphs", grad_accumulation=2), "compile: expected no graphs with grad_acc"),
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
    with pytest.raises(
        ValueError, match="precision: expected one of auto, float32, tf32, bf16; got"
    ):
        autocast("cpu", "fp16")


USERS = dict(
    nothing="",
    first_names="torch.backends.cuda.matmul.allow_tf32 = True",
    high="torch.set_float32_matmul_precision('high')",
    medium="torch.set_float32_matmul_precision('medium')",
    newer_names="torch.backends.cuda.matmul.fp32_precision = 'tf32'",
)


@pytest.mark.parametrize("user", USERS)
def test_tf32_is_as_its_user_left_it(user, run):
    """torch has two sets of names for it and refuses a mixture: in a process of its own each."""
    code = f"""
import torch
from ddpm_nb.device import _read_tf32, autocast, float32_products
{USERS[user]}
def rate():
    try: return torch.get_float32_matmul_precision()
    except RuntimeError: return "mixed"
before = _read_tf32(), rate()
for device, precision in (("cpu", "float32"), ("cuda", "bf16")):
    with float32_products(device, precision): assert (_read_tf32(), rate()) == before
for precision, matrices in (("float32", ("highest", "ieee")), ("tf32", ("high", "tf32"))):
    with float32_products("cuda", precision):
        found = _read_tf32()
        assert found[0] in matrices, found
        assert found[1] in ((True, "tf32") if precision == "tf32" else (False, "ieee")), found
    assert (_read_tf32(), rate()) == before
"""
    run(sys.executable, "-W", "ignore", "-c", code)


def test_compile_of_an_old_config_is_read():
    assert [DiffusionConfig(compile=c).compile for c in (True, False)] == ["on", "off"]


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


# ---- page 94: flags


def parsed(*args):
    """What ddpm-train makes of what was typed, without training."""
    parser = argparse.ArgumentParser()
    for config in (DiffusionConfig, ModelConfig):
        cli._field_flags(parser, config)
    return vars(parser.parse_args(args))


def test_every_field_is_a_flag():
    """Each flag, with a value that is not the default's, comes back as the field's own type."""
    for config in (DiffusionConfig, ModelConfig):
        for f in fields_of(config):
            flag = "--" + f.name.replace("_", "-")
            if f.type is bool:
                assert parsed(flag) == {f.name: True}
                assert parsed("--no-" + flag[2:]) == {f.name: False}
            elif f.default is not MISSING and isinstance(f.default, float):
                assert parsed(flag, "0.25") == {f.name: 0.25}
            elif f.default is not MISSING and isinstance(f.default, str):
                assert parsed(flag, "no-such") == {f.name: "no-such"}
    assert parsed() == {}


def test_flags_of_loss_and_optimiser():
    typed = parsed(
        *"--prediction v --zero-terminal-snr --adam-betas 0.9,0.95 --weight-decay 0.01".split(),
    )
    assert typed["adam_betas"] == (0.9, 0.95) and typed["zero_terminal_snr"] is True
    run, _ = cli._training_configs("digits", None, typed)
    assert (run.prediction, run.zero_terminal_snr, run.weight_decay) == ("v", True, 0.01)
    assert run.scheduler().zero_terminal_snr and run.adam_betas == (0.9, 0.95)
    assert cli._training_configs("digits", None, parsed("--min-snr-gamma", "5"))[0] == (
        DiffusionConfig.preset("digits", min_snr_gamma=5.0)
    )
    assert parsed("--dim-multiply", "1,2,2")["dim_multiply"] == (1, 2, 2)
    with pytest.raises(ValueError, match="adam_betas: expected two numbers"):
        cli._training_configs("digits", None, parsed("--adam-betas", "0.9"))


def test_config_of_a_checkpoint_is_a_config_file(tmp_path):
    """Of a run with fields of every kind; what is typed still wins."""
    run = DiffusionConfig.preset(
        "digits", prediction="v", zero_terminal_snr=True, adam_betas=(0.8, 0.9), weight_decay=0.1
    )
    saved = dict(
        model=SMALL.to_dict(),
        scheduler=run.scheduler().config,
        prediction="v",
        training=asdict(run),
        data=dict(name="digits", num_levels=17),
        step=3,
        sha256={},
    )
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert cli._training_configs(None, tmp_path / "config.json", {}) == (run, SMALL)
    again, _ = cli._training_configs(None, tmp_path / "config.json", dict(prediction="x0"))
    assert again.prediction == "x0" and again.adam_betas == (0.8, 0.9)


@pytest.fixture
def typed(monkeypatch, capsys):
    """Calls a command as a shell would; gives its status and what it said where."""

    def typed(main, *args):
        name = main.__name__.replace("main_", "ddpm-")
        monkeypatch.setattr("sys.argv", [name, *map(str, args), "--device", "cpu"])
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        return status, capsys.readouterr()

    return typed


@pytest.fixture(scope="module")
def predicts_v(tmp_path_factory):
    """A run that was started from a shell, with flags of every kind."""
    folder = tmp_path_factory.mktemp("typed") / "run"
    args = f"ddpm-train digits --base-dim 16 --batch-size 16 --max-steps 3 --out-dir {folder} "
    args += "--prediction v --zero-terminal-snr --adam-betas 0.9,0.95 --weight-decay 0.01 "
    args += "--transformer-layers 1 --warmup-steps 0 --precision float32 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", args.split())
        cli.main_train()
    return folder


def test_a_run_that_was_typed(predicts_v):
    config = json.loads((find_checkpoint(predicts_v) / "config.json").read_text())
    assert config["prediction"] == "v" and config["scheduler"]["zero_terminal_snr"] is True
    assert config["training"]["adam_betas"] == [0.9, 0.95]
    denoiser = load_denoiser(predicts_v)
    assert denoiser.prediction == "v" and denoiser.scheduler.alpha_cumprod[-1] == 0


@pytest.mark.parametrize(
    "args, weights, how",
    [
        ([], "ema", dict()),
        (["--weights", "raw"], "raw", dict()),
        (["--no-clip"], "ema", dict(clip=False)),
        (
            ["--spacing", "log-snr", "--method", "heun"],
            "ema",
            dict(spacing="log-snr", method="heun"),
        ),
        (["--method", "ddim", "--eta", "0.5"], "ema", dict(method="ddim", eta=0.5)),
        (
            ["--method", "ancestral", "--variance", "beta"],
            "ema",
            dict(method="ancestral", variance="beta"),
        ),
    ],
)
def test_what_is_typed_is_what_is_drawn(args, weights, how, predicts_v, typed, tmp_path):
    """The command's grid, against the library's call that the flags stand for."""
    run = "fashion_mnist_plain" if "--no-clip" in args else predicts_v  # its guesses need clipping
    common = ["--n", 4, "--steps", 4, "--seed", 2, "--precision", "float32"]
    status, said = typed(cli.main_sample, run, *common, *args, "--out", tmp_path / "x.png")
    assert status == 0, said.err
    denoiser = load_denoiser(run, weights=weights)
    save_grid(sample(denoiser, 4, steps=4, seed=2, **how), tmp_path / "y.png")
    got, want = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "xy")
    assert np.array_equal(got, want)
    save_grid(sample(load_denoiser(run), 4, steps=4, seed=2), tmp_path / "z.png")
    plain = np.asarray(Image.open(tmp_path / "z.png"))
    assert np.array_equal(got, plain) == (args == [])  # the flag does something


@pytest.mark.parametrize("method", SAMPLERS)
def test_flags_of_another_sampler_are_refused(method, predicts_v, typed, tmp_path):
    """For every sampler there is: eta and variance are taken where the signature has them."""
    takes = dict(ddim="eta", ancestral="variance").get(method)
    for flag, value in (("eta", 0.5), ("variance", "beta")):
        args = ["--method", method, f"--{flag}", value, "--n", 2, "--steps", 2]
        status, said = typed(cli.main_sample, predicts_v, *args, "--out", tmp_path / "x.png")
        if flag == takes:
            assert status == 0 and (tmp_path / "x.png").is_file()
            continue
        owner = dict(eta="ddim", variance="ancestral")[flag]
        assert status == 2 and said.err == (
            f"ddpm-sample: error: {flag}: expected none with method {method}, "
            f"it is {owner}'s; got {value}\n"
        )


def test_samplers_and_spacings_of_ones_own_can_be_typed(
    predicts_v, typed, tmp_path, monkeypatch, capsys
):
    """What is added to the registries is a choice, with the flags that its signature has."""
    seen = []

    def mine(denoiser, scheduler, xt, walk, noise, eta=0.0, **kwargs):
        seen.append((eta, walk))
        return ddim_sample(denoiser, scheduler, xt, walk, noise, eta, **kwargs)

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    monkeypatch.setitem(SPACINGS, "as-mine", SPACINGS["uniform"])
    args = ["--method", "mine", "--spacing", "as-mine", "--eta", 0.3, "--n", 2, "--steps", 2]
    status, said = typed(cli.main_sample, predicts_v, *args, "--out", tmp_path / "x.png")
    assert status == 0 and seen == [(0.3, [1000, 500, 0])], said.err
    status, said = typed(cli.main_sample, predicts_v, "--eta", 0.3, "--n", 2)
    assert status == 2 and "it is ddim and mine's; got 0.3" in said.err


@pytest.mark.parametrize(
    "command, args, message",
    [
        ("sample", ["digits", "--weights", "raw"], "weights: expected ema for"),
        ("sample", ["digits", "--weights", "best"], "argument --weights: invalid choice: 'best'"),
        ("sample", ["digits", "--spacing", "none"], "argument --spacing: invalid choice: 'none'"),
        (
            "evaluate",
            ["digits", "--method", "ddim", "--variance", "beta"],
            "variance: expected none with method ddim, it is ancestral's; got beta",
        ),
        ("evaluate", ["digits", "--steps", "1001"], "steps: expected 1..1000"),
        (
            "train",
            ["digits", "--zero-terminal-snr"],
            "prediction: expected x0 or v with zero_terminal_snr",
        ),
        ("train", ["digits", "--prediction", "eps"], "prediction: expected one of noise, x0, v"),
        (
            "train",
            "digits --prediction v --zero-terminal-snr --min-snr-gamma 5".split(),
            "min_snr_gamma: expected a number above 0, and none with zero_terminal_snr; got 5.0",
        ),
        ("train", ["digits", "--adam-betas", "0.9"], "adam_betas: expected two numbers"),
        ("train", ["digits", "--adam-betas", "0.9,high"], "argument --adam-betas: invalid numbers"),
        ("train", ["digits", "--zero-terminal-snr", "yes"], "unrecognized arguments: yes"),
        ("diagnose", ["no-such-run"], "checkpoint: expected a run folder"),
    ],
)
def test_commands_refuse(command, args, message, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = typed(getattr(cli, f"main_{command}"), *args)
    assert status == 2 and message in said.err.splitlines()[-1], said.err
    assert not list(tmp_path.iterdir())  # before anything was begun


def test_diagnose_of_a_run_that_predicts_v(predicts_v, typed):
    """Three steps have taught it little, and its loss is judged as that of v."""
    status, said = typed(cli.main_diagnose, predicts_v, "--n", 16)
    assert status == 1 and said.out.splitlines()[-1] == "Look at: loss"
    assert "for the answer 0" in " ".join(said.out.split()) and "answers with" not in said.out

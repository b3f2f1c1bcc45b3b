"""What needs processes of its own: several of them, signals, kills, full disks."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ddpm_nb.data import PictureData, load_data
from ddpm_nb.objective import Denoiser
from ddpm_nb.runs import checkpoints, load_denoiser, read_checkpoint
from ddpm_nb.sample import sample
from ddpm_nb.train import (
    DiffusionConfig,
    ModelConfig,
    Trainer,
    _set_checkpointing,
    step_draws,
    train_diffusion,
)
from ddpm_nb.unet import UNet

BIN = Path(os.sys.executable).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def state(path):
    """All tensors of a checkpoint."""
    return {
        f"{part}/{k}": v
        for part in ("model", "training")
        for k, v in read_checkpoint(path, part)[1].items()
    }


def equal(a, b):
    """Whether two checkpoints are the same, bit for bit."""
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_lines(folder, without=("pictures_per_second", "memory")):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


def gradient(pictures, **fields):
    """The norm that the first step returns, and each parameter's gradient as the optimiser gets it.

    Adam divides by the gradient's size, so parameters after a step say nothing about its scale."""
    config = DiffusionConfig(**dict(batch_size=32, precision="float32", clip_norm=1e6) | fields)
    network = ModelConfig(4, (1, 2), (1,), 16, channels=1)
    run = Trainer(config.new_denoiser(network), load_data("digits"), config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the last layer starts at zero, and no gradient passes through it
        for p in run.model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    found = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: found.update((k, p.grad.clone()) for k, p in run.model.named_parameters())
    )
    return float(run.step(1, run.batch(1, pictures))), found


def size(gradients):
    """The norm of all gradients together."""
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


@pytest.fixture
def pictures():
    return load_data("digits").pictures[:32]


def test_accumulation_keeps_the_gradient(pictures):
    norm, whole = gradient(pictures)
    norm_of_parts, parts = gradient(pictures, grad_accumulation=4)
    assert norm_of_parts == pytest.approx(norm, rel=1e-4)
    for k, g in whole.items():
        assert g.norm() > 0, k
        torch.testing.assert_close(parts[k], g, rtol=0, atol=1e-5 * norm)


def weights_after_two_steps(pictures, checkpointing):
    "With dropout; and how often the first convolution of a block was computed in the second step."
    config = DiffusionConfig(
        batch_size=len(pictures), precision="float32", compile="off", checkpointing=checkpointing
    )
    net = ModelConfig.preset("digits", dropout=0.2)
    run, calls = Trainer(config.new_denoiser(net), PictureData(pictures, num_levels=17), config), []
    run.step(1, run.batch(1, pictures))
    run.model.up[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    run.step(2, run.batch(2, pictures))
    return torch.cat([p.detach().flatten() for p in run.parameters]), len(calls)


def test_checkpointing_computes_twice_and_changes_nothing(pictures):
    """Not a bit, with dropout too."""
    kept, once = weights_after_two_steps(pictures, False)
    again, twice = weights_after_two_steps(pictures, True)
    assert (once, twice) == (1, 2) and torch.equal(kept, again)


def test_checkpointing_needs_blocks_and_can_be_taken_off(pictures):
    config = DiffusionConfig(batch_size=len(pictures), checkpointing=True)
    data, denoiser = (
        PictureData(pictures, num_levels=17),
        config.new_denoiser(ModelConfig.preset("digits")),
    )
    net = Trainer(denoiser, data, config).model
    assert net.mid.resnet1.checkpointing
    Trainer(denoiser, data, dataclasses.replace(config, checkpointing=False))
    assert not net.mid.resnet1.checkpointing
    with pytest.raises(ValueError, match="checkpointing: expected True or False; got 'off'"):
        dataclasses.replace(config, checkpointing="off")
    plain = Denoiser(torch.nn.Conv2d(1, 1, 1), config.scheduler())
    with pytest.raises(
        ValueError, match="checkpointing: expected a network of ResNetBlocks; got Conv2d"
    ):
        Trainer(plain, data, config)


def test_checkpointing_with_dropout_is_refused_on_an_apple_gpu():
    """torch does not put that GPU's random numbers back: the second masks would be others."""
    net, apple = UNet(ModelConfig.preset("digits", dropout=0.1)), torch.device("mps")
    assert _set_checkpointing(net, False, apple) is net
    with pytest.raises(ValueError, match="no dropout on an Apple GPU"):
        _set_checkpointing(net, True, apple)
    _set_checkpointing(UNet(ModelConfig.preset("digits")), True, apple)


def test_gradient_is_clipped(pictures):
    """The optimiser gets the same direction at the length that was asked for; the log gets the length before."""
    norm, free = gradient(pictures)
    norm_before, clipped = gradient(pictures, clip_norm=norm / 8)
    assert size(free) == pytest.approx(norm, rel=1e-4) == norm_before
    assert size(clipped) == pytest.approx(norm / 8, rel=1e-4)
    for k, g in free.items():
        torch.testing.assert_close(clipped[k], g / 8, rtol=1e-4, atol=1e-6 * norm)


def test_pictures_are_flipped_in_training(pictures):
    """A step with flips is a step on pictures that were mirrored by hand, with the same draws."""
    _, flips, _ = step_draws(0, 1, len(pictures), 1000, pictures.shape[1:])
    assert 0 < flips.sum() < len(pictures)
    by_hand = pictures.clone()
    by_hand[flips] = pictures[flips].flip(-1)
    norm, flipped = gradient(pictures, use_augmentation=True)
    for k, g in gradient(by_hand)[1].items():
        torch.testing.assert_close(flipped[k], g, rtol=0, atol=1e-6 * norm)
    plain = gradient(pictures)[1]
    assert size({k: flipped[k] - plain[k] for k in plain}) > 0.05 * norm


def torchrun(processes, *args):
    """ddpm-train on several processes."""
    command = [
        BIN / "torchrun",
        "--standalone",
        f"--nproc_per_node={processes}",
        BIN / "ddpm-train",
        *map(str, args),
    ]
    done = subprocess.run(
        command,
        env={**ENV, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(tmp_path, tiny):
    flags = [
        *tiny,
        "--log-every",
        "4",
        "--learning-rate",
        "1e-3",
        "--max-steps",
        "8",
        "--use-augmentation",
    ]
    torchrun(1, "digits", *flags, "--out-dir", tmp_path / "one")
    torchrun(2, "digits", *flags, "--out-dir", tmp_path / "two")
    torchrun(2, "digits", *flags, "--grad-accumulation", "2", "--out-dir", tmp_path / "parts")
    one, two, parts = (log_lines(tmp_path / name) for name in ("one", "two", "parts"))
    assert [line["processes"] for line in (one[0], two[0], parts[0])] == [1, 2, 2]
    for other in (two, parts):
        for a, b in zip(one, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["loss_by_t"] == pytest.approx(b["loss_by_t"], rel=1e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)  # Adam hides its scale
    for name in ("two", "parts"):
        a, b = (state(checkpoints(tmp_path / n)[-1]) for n in ("one", name))
        for k in a:
            if k.startswith(("model/", "training/model/")):
                torch.testing.assert_close(b[k], a[k], rtol=0, atol=1e-4)


def start(folder, tiny, *more):
    """A long run in the background, once it has written its first line."""
    process = subprocess.Popen(
        [BIN / "ddpm-train", "digits", *tiny, "--log-every", "5", "--out-dir", str(folder), *more],
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(1200):
        if (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n"):
            return process
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the run wrote nothing")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, tiny, run, signum, code):
    process = start(tmp_path / "a", tiny, "--max-steps", "1500")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == code and "saved in" in err.splitlines()[-1] and "Traceback" not in err
    )
    (saved,) = checkpoints(tmp_path / "a")
    step = int(saved.name.removeprefix("step-"))
    more = str(step + 10)
    run(
        "ddpm-train",
        "digits",
        *tiny,
        "--log-every",
        "5",
        "--out-dir",
        tmp_path / "a",
        "--max-steps",
        more,
        "--resume",
    )
    run(
        "ddpm-train",
        "digits",
        *tiny,
        "--log-every",
        "5",
        "--out-dir",
        tmp_path / "b",
        "--max-steps",
        more,
    )
    assert equal(checkpoints(tmp_path / "a")[-1], checkpoints(tmp_path / "b")[-1])
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")


def test_kill_and_resume(tmp_path, tiny, run):
    """Killed in the middle of whatever it was doing, several times: each resume starts from a whole checkpoint."""
    flags = ["--max-steps", "1500", "--save-every", "3", "--keep", "2"]
    process = start(tmp_path / "a", tiny, *flags)
    for wait in (0.0, 0.5, 0.9):
        time.sleep(wait)
        process.kill()
        process.communicate()
        for path in checkpoints(tmp_path / "a"):
            state(path)
        process = subprocess.Popen(
            [
                BIN / "ddpm-train",
                "digits",
                *tiny,
                "--log-every",
                "5",
                "--out-dir",
                str(tmp_path / "a"),
                *flags,
                "--resume",
            ],
            env=ENV,
            stderr=subprocess.DEVNULL,
        )
        before = checkpoints(tmp_path / "a")[-1].name
        for _ in range(600):
            if checkpoints(tmp_path / "a")[-1].name > before:
                break
            assert process.poll() is None
            time.sleep(0.1)
    process.kill()
    process.communicate()
    end = int(checkpoints(tmp_path / "a")[-1].name.removeprefix("step-")) + 5
    for name, more in (("a", ["--resume"]), ("b", [])):
        run(
            "ddpm-train",
            "digits",
            *tiny,
            "--log-every",
            "5",
            "--max-steps",
            end,
            "--out-dir",
            tmp_path / name,
            *more,
        )
    assert equal(checkpoints(tmp_path / "a")[-1], checkpoints(tmp_path / "b")[-1])
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")


def test_full_disk_leaves_nothing_half_written(tmp_path, tiny):
    """A limit on file size stands for a full disk: the write fails half-way, as it does there."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); sys.argv[0] = 'ddpm-train'; "
    code = limit + "from ddpm_nb.cli import main_train; main_train()"
    done = subprocess.run(
        [
            os.sys.executable,
            "-c",
            code,
            "digits",
            *tiny,
            "--max-steps",
            "6",
            "--out-dir",
            str(tmp_path / "a"),
        ],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be written, nothing of it is left" in done.stderr.splitlines()[-1]
    assert checkpoints(tmp_path / "a") == [] and not list((tmp_path / "a").glob(".tmp*"))


def test_keep_and_samples(tmp_path, tiny, run):
    run(
        "ddpm-train",
        "digits",
        *tiny,
        "--max-steps",
        8,
        "--save-every",
        2,
        "--keep",
        2,
        "--sample-every",
        4,
        "--timesteps-diff",
        100,
        "--out-dir",
        tmp_path / "a",
    )
    assert [p.name for p in checkpoints(tmp_path / "a")] == ["step-0000006", "step-0000008"]
    assert sorted(p.name for p in (tmp_path / "a" / "samples").iterdir()) == [
        "step-0000004.png",
        "step-0000008.png",
    ]
    denoiser = load_denoiser(tmp_path / "a")
    assert denoiser.net.config.base_dim == 16 and denoiser.scheduler.num_timesteps == 100


def test_a_run_that_died_before_its_first_checkpoint_can_start_again(tmp_path):
    model = ModelConfig(4, (1, 2), (1,), 16, channels=1)
    config = DiffusionConfig(
        out_dir=str(tmp_path / "run"), max_steps=2, batch_size=8, log_every=1, precision="float32"
    )

    def out_of_memory(line, trainer):
        assert trainer.config is config and line["step"] == 1
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train_diffusion(config, model, callback=out_of_memory, progress=False)
    assert (tmp_path / "run" / "log.jsonl").exists() and not checkpoints(tmp_path / "run")
    assert train_diffusion(config, model, progress=False).name == "step-0000002"
    with pytest.raises(ValueError, match="already holds a run"):
        train_diffusion(config, model, progress=False)


@pytest.mark.parametrize("batch", [5, 16, 24, 40])
def test_draws_do_not_depend_on_the_number_of_processes(batch):
    """A slice of a step's draws is the slice of all of them, wherever it is cut."""
    whole = step_draws(3, 7, batch, 100, (1, 2, 2))
    for cut in range(1, batch):
        for a, b in ((0, cut), (cut, batch)):
            part = step_draws(3, 7, batch, 100, (1, 2, 2), a, b)
            assert all(torch.equal(x, y[a:b]) for x, y in zip(part, whole, strict=True))
    next_step = step_draws(3, 8, batch, 100, (1, 2, 2))
    assert not set(whole[2].flatten().tolist()) & set(next_step[2].flatten().tolist())


@pytest.mark.parametrize(
    "fields",
    [
        dict(prediction="v", zero_terminal_snr=True, schedule="cosine"),
        dict(prediction="x0", schedule="sigmoid", weight_decay=0.01, adam_betas=(0.8, 0.99)),
        dict(prediction="v", min_snr_gamma=5.0),
    ],
)
def test_every_prediction_trains_resumes_and_samples(tmp_path, fields):
    """Two steps and two more are the bits of four, and what was trained says what it predicts."""
    network = ModelConfig(4, (1, 2), (1,), 16, channels=1)
    same = dict(batch_size=8, log_every=1, precision="float32", timesteps_diff=50, **fields)
    runs = []
    for name, stops in (("parts", (2, 4)), ("whole", (4,))):
        for stop in stops:
            config = DiffusionConfig(out_dir=str(tmp_path / name), max_steps=stop, **same)
            path = train_diffusion(config, network, resume=stop != stops[0], progress=False)
        runs.append(path)
    assert equal(*runs)
    denoiser = load_denoiser(path)
    assert denoiser.prediction == fields["prediction"]
    assert denoiser.scheduler.zero_terminal_snr == fields.get("zero_terminal_snr", False)
    x = sample(denoiser, 2, steps=4)
    assert x.isfinite().all() and x.shape == (2, 1, 8, 8)
    raw = load_denoiser(path, weights="raw")
    assert not torch.equal(raw.net.stem.weight, denoiser.net.stem.weight)


def test_a_run_of_the_first_edition_is_sampled_and_not_resumed(tmp_path):
    """Its config.json says nothing of a prediction: it was the noise, and other random numbers."""
    network = ModelConfig(4, (1, 2), (1,), 16, channels=1)
    config = DiffusionConfig(out_dir=str(tmp_path / "old"), max_steps=2, batch_size=8)
    path = train_diffusion(config, network, progress=False)
    about = json.loads((path / "config.json").read_text())
    del about["prediction"]
    for new in ("prediction", "min_snr_gamma", "zero_terminal_snr", "adam_betas", "weight_decay"):
        del about["training"][new]
    del about["model"]["num_res_blocks"]
    (path / "config.json").write_text(json.dumps(about))
    old = load_denoiser(path)
    assert old.prediction == "noise" and sample(old, 1, steps=2).isfinite().all()
    with pytest.raises(ValueError, match="of the first edition"):
        train_diffusion(config, network, resume=True, progress=False)
    fine = DiffusionConfig(out_dir=str(tmp_path / "new"), max_steps=1, batch_size=8)
    tuned = Trainer(load_denoiser(path, weights="raw"), load_data("digits"), fine)
    before = load_denoiser(path, weights="raw").net.stem.weight
    assert torch.equal(tuned.model.stem.weight, before)
    assert load_denoiser(tuned.fit(progress=False)).net.stem.weight.shape == before.shape


def test_configs_that_cannot_be_trained():
    """Each is one line that names the field."""
    wrong = {
        "prediction: expected one of noise, x0, v; got 'no-such-thing'": dict(
            prediction="no-such-thing"
        ),
        "prediction: expected x0 or v with zero_terminal_snr": dict(zero_terminal_snr=True),
        "min_snr_gamma: expected a number above 0, and none with zero_terminal_snr; got 5": dict(
            prediction="v", zero_terminal_snr=True, min_snr_gamma=5.0
        ),
        "min_snr_gamma: expected a number above 0": dict(min_snr_gamma=0.0),
        "adam_betas: expected two numbers": dict(adam_betas=(0.9, 1.0)),
        "weight_decay: expected at least 0 and below 1; got -1": dict(weight_decay=-1),
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=message):
            DiffusionConfig(**fields)
    config = DiffusionConfig(schedule="cosine")
    denoiser = DiffusionConfig().new_denoiser(ModelConfig(4, (1, 2), (1,), 16, channels=1))
    with pytest.raises(ValueError, match="config: expected the denoiser's schedule"):
        Trainer(denoiser, load_data("digits"), config)

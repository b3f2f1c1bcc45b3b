"""The commands as their users type them: what works, and what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was trained for a moment."""
    from ddpm_nb.train import DiffusionConfig, ModelConfig, train_diffusion

    folder = tmp_path_factory.mktemp("run")
    train_diffusion(
        DiffusionConfig("digits", 1e-3, 16, max_steps=4, out_dir=str(folder), precision="float32"),
        ModelConfig(4, [1, 2], [1], 16, channels=1),
        progress=False,
    )
    return folder


@pytest.mark.parametrize(
    "args, message",
    [
        (["mnost"], "preset: expected one of"),
        ([], "preset: expected one of"),
        (["digits", "--max-steps", "0"], "max_steps: expected at least 1; got 0"),
        (["digits", "--batch-size", "5000"], "batch_size: expected at most the"),
        (["digits", "--channels", "3"], "channels"),
        (["digits", "--lowest-resolution-size", "3"], "size"),
        (
            ["digits", "--timesteps-diff", "20", "--schedule", "linear"],
            "num_timesteps: expected more than 20",
        ),
        (["digits", "--base-dim", "7", "--max-steps", "1"], "base_dim"),
        (["digits", "--data-dir", "/", "--dataset-name", "no_such_set"], "no_such_set"),
        (["digits", "--out-dir", "/dev/null/x"], "out_dir: cannot write to"),
        (["digits", "--config", "missing.json"], "config: cannot read missing.json"),
        (["digits", "--precision", "fp8"], "precision: expected one of"),
        (["digits", "--zero-terminal-snr"], "prediction: expected x0 or v with zero_terminal_snr"),
        (["digits", "--adam-betas", "0.9,0.999,0.9999"], "adam_betas: expected two numbers"),
        (["digits", "--no-such-flag", "1"], "unrecognized arguments"),
        (["digits", "--dim-multiply", "1,two"], "dim-multiply"),
    ],
)
def test_train_refuses(args, message, refused, tmp_path):
    out = [] if "--out-dir" in args else ["--out-dir", tmp_path / "run"]
    said = refused("ddpm-train", *args, *out, cwd=tmp_path)
    assert message in said.splitlines()[-1]
    assert not list((tmp_path / "run").glob("step*")) if (tmp_path / "run").exists() else True


def test_train_refuses_a_folder_that_holds_a_run_or_another_run(trained, tiny, run):
    done = run("ddpm-train", "digits", *tiny, "--out-dir", trained, code=2)
    assert "already holds a run" in done.stderr.splitlines()[-1]
    done = run("ddpm-train", "digits", *tiny, "--seed", 3, "--out-dir", trained, "--resume", code=2)
    line = done.stderr.splitlines()[-1]
    assert (
        "is another run" in line
        and "seed is 3 and was 0" in line
        and "schedule is 'cosine' and was 'linear'" in line
    )


def test_config_file(tmp_path, tiny, run):
    (tmp_path / "c.json").write_text(json.dumps(dict(max_steps=7, seed=5, base_dim=16)))
    run(
        "ddpm-train",
        "digits",
        "--config",
        tmp_path / "c.json",
        *tiny,
        "--max-steps",
        3,
        "--out-dir",
        tmp_path / "run",
    )
    saved = json.loads((tmp_path / "run" / "step-0000003" / "config.json").read_text())
    assert (
        saved["training"]["seed"] == 5 and saved["training"]["max_steps"] == 3
    )  # file over preset, typed over file
    run(
        "ddpm-train",
        "--config",
        tmp_path / "run" / "step-0000003" / "config.json",
        "--out-dir",
        tmp_path / "again",
    )
    assert (tmp_path / "again" / "step-0000003").is_dir()  # a checkpoint's config is a config file
    (tmp_path / "c.json").write_text(json.dumps(dict(max_step=7)))
    done = run("ddpm-train", "digits", "--config", tmp_path / "c.json", code=2)
    assert "unknown fields: max_step" in done.stderr.splitlines()[-1]


def test_sample(trained, run, tmp_path):
    run(
        "ddpm-sample",
        trained,
        "--n",
        5,
        "--steps",
        3,
        "--method",
        "ancestral",
        "--spacing",
        "uniform",
        "--out",
        tmp_path / "x.png",
        "--gif",
        tmp_path / "x.gif",
    )
    assert (
        Image.open(tmp_path / "x.png").size[0] > 100
        and Image.open(tmp_path / "x.gif").n_frames == 3
    )
    for name in "ab":
        run(
            "ddpm-sample",
            trained,
            "--n",
            5,
            "--steps",
            4,
            "--method",
            "ancestral",
            "--seed",
            1,
            "--batch-size",
            3 if name == "a" else 5,
            "--precision",
            "float32",
            "--out",
            tmp_path / name,
        )
    for i in range(5):
        a, b = (
            np.asarray(Image.open(tmp_path / name / f"{i:05d}.png")).astype(int) for name in "ab"
        )
        assert a.shape == (8, 8) and abs(a - b).max() <= 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--steps", "1001"], "steps: expected 1..1000"),
        (["--n", "0"], "expected at least 1; got 0"),
        (["--method", "ddim", "--eta", "2"], "eta: expected a number in 0..1"),
        (["--eta", "0.5"], "eta: expected none with method sde-dpm++, it is ddim's; got 0.5"),
        (["--method", "ddim", "--variance", "beta"], "variance: expected none with method ddim"),
        (["--out", "/dev/null/x/y.png"], "out: cannot write to"),
        (["--method", "no-such-sampler"], "invalid choice"),
        (["--method", "heun", "--eta", "0.5"], "eta: expected none with method heun"),
        (["--spacing", "no-such-spacing"], "invalid choice"),
    ],
)
def test_sample_refuses(trained, args, message, refused, tmp_path):
    assert message in refused("ddpm-sample", trained, *args, cwd=tmp_path)


def test_a_refusal_is_one_line(run, tmp_path):
    """As a shell sees it."""
    done = run("ddpm-sample", tmp_path / "none", code=2)
    assert "there is no folder" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    done = run("ddpm-train", "digits", "--max-steps", "0", code=2, cwd=tmp_path)
    assert "max_steps" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_sample_refuses_a_checkpoint_of_another_network(trained, run, tmp_path):
    config = trained / "step-0000004" / "config.json"
    good = config.read_text()
    changed = json.loads(good)
    changed["model"]["base_dim"] = 32
    config.write_text(json.dumps(changed))
    try:
        done = run("ddpm-sample", trained, "--out", tmp_path / "x.png", code=2)
    finally:
        config.write_text(good)
    assert "are not those of its config" in done.stderr.splitlines()[-1]


def test_help(run):
    for command in ("ddpm-train", "ddpm-sample"):
        assert "usage" in run(command, "--help").stdout


def test_seed_2_snippet(tmp_path, run):
    """The snippet with its five and four fields as they stand; CI adds only what keeps it short."""
    g = np.random.default_rng(0)
    for folder in ("00000", "01000"):
        (tmp_path / "FFHQ" / folder).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(g.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(
                tmp_path / "FFHQ" / folder / f"{folder[:4]}{i}.png"
            )
    snippet = """
from ddpm_nb.train import DiffusionConfig, ModelConfig, train_diffusion

diff_config = DiffusionConfig(
    dataset_name = "FFHQ",
    learning_rate = 0.001,
    batch_size= {batch},
    use_augmentation = False,
    timesteps_diff = 200{more}
)

model_config = ModelConfig(
    lowest_resolution_size = 8,
    dim_multiply = [1,2,2,4,8],
    transformer_layers = [3],
    base_dim = 64
)
train_diffusion(diff_config, model_config)
"""
    run("python", "-c", snippet.format(batch=1, more=", max_steps=1"), cwd=tmp_path)
    config = json.loads((tmp_path / "runs" / "ffhq" / "step-0000001" / "config.json").read_text())
    assert config["model"]["channels"] == 3 and config["scheduler"]["num_timesteps"] == 200
    done = run("python", "-c", snippet.format(batch=16, more=""), cwd=tmp_path / "runs", code=1)
    assert (
        "FFHQ" in done.stderr.splitlines()[-1] and "ValueError" in done.stderr.splitlines()[-1]
    )  # no such folder there


@pytest.mark.skipif(
    not FASHION.is_dir(),
    reason="the Fashion-MNIST files (package dataset-fashion-mnist) are not here",
)
def test_fashion_mnist_from_its_files(tmp_path, run):
    """The real files, with the preset's network made narrow so that it takes seconds."""
    run(
        "ddpm-train",
        "fashion_mnist",
        "--max-steps",
        3,
        "--batch-size",
        16,
        "--base-dim",
        16,
        "--warmup-steps",
        1,
        "--sample-every",
        0,
        "--out-dir",
        tmp_path / "run",
    )
    run("ddpm-sample", tmp_path / "run", "--n", 4, "--steps", 5, "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 50

"""ddpm-evaluate and the weights that come with the package, as their users meet them; the recipes."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import unlabelled
from PIL import Image
from safetensors.torch import load_file

from ddpm_nb.control import guided
from ddpm_nb.data import to_pixels
from ddpm_nb.distance import sampling_row
from ddpm_nb.runs import load_denoiser
from ddpm_nb.sample import sample

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "ddpm_nb" / "weights"
LOGS = ROOT / "nbs" / "logs"
QUICK = ["--bits-n", 8, "--strata", 10, "--n", 12, "--steps", 3]
BARE = ("digits_early", "fashion_mnist")  # one only guides, the other is still to be measured
SHIPPED = sorted(p.parent.name for p in WEIGHTS.glob("*/config.json"))


def numbers(row):
    """A row without its costs."""
    return {k: v for k, v in row.items() if k != "seconds"}


def test_evaluate_gives_the_same_numbers_for_the_same_seed(run, tmp_path):
    for name in ("a.json", "b.json"):
        done = run(
            "ddpm-evaluate", "digits", *QUICK, "--out", name, "--samples", "x.st", cwd=tmp_path
        )
        assert (
            "bits/dim, test: beta_tilde" in done.stdout
            and "ladder (n = 12, test pictures): real" in done.stdout
        )
    a, b = (json.loads((tmp_path / f).read_text()) for f in ("a.json", "b.json"))
    assert [numbers(r) for r in a] == [numbers(r) for r in b]
    bits, quality = a
    assert bits["settings"]["what"] == "bits" and bits["evaluations"] == 2 * 8 * 11
    assert set(bits["bits"]["test"]) == {"beta_tilde", "beta", "optimal"}
    assert quality["settings"]["features"] == "digits" and quality["evaluations"] == 36
    assert (precision := quality["settings"]["precision"]) in ("float32", "bf16")
    assert (
        f"n = 12, {precision}, 1500" in done.stdout and quality["settings"]["spacing"] == "uniform"
    )
    assert quality["ladder_n"] == 12 and quality["reference"] == "1500 training pictures"
    assert load_file(tmp_path / "x.st")["pictures"].shape == (12, 1, 8, 8)
    run("ddpm-evaluate", "digits", *QUICK, "--seed", 1, "--out", "a.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 4 and rows[2]["bits"]["test"] != bits["bits"]["test"]


def test_evaluate_asks_for_each_class_as_often(run, refused, tmp_path):
    "With labels, without, and led by them, which asks twice; a network without classes cannot be led."
    few = ["--bits-n", 0, "--n", 12, "--steps", 3, "--out", "rows.json", "--samples"]
    ways = dict(each=[], none=["--no-labels"], led=["--guidance", 2])
    for name, typed in ways.items():
        said = run("ddpm-evaluate", "digits", *few, name, *typed, cwd=tmp_path).stdout
        assert ("each class as often, guidance" in said) == (name != "none")
    drawn = [load_file(tmp_path / name)["pictures"] for name in ways]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    rows = json.loads((tmp_path / "rows.json").read_text())
    said = [(r["settings"]["labels"], r["settings"]["guidance"], r["evaluations"]) for r in rows]
    assert said == [(True, 1.0, 36), (False, 1.0, 36), (True, 2.0, 72)]
    labels = [i % 10 for i in range(12)]
    how = dict(steps=3, method="ancestral", spacing="uniform", batch_size=100)
    x = sample(guided(load_denoiser("digits"), 2), 12, labels=labels, **how)
    assert torch.equal(to_pixels(x), drawn[2])
    with pytest.raises(ValueError, match="got one that knows no classes"):
        sampling_row(unlabelled("digits"), WEIGHTS / "digits", {}, None, "digits", guidance=2)
    with pytest.raises(ValueError, match="guidance: expected 1 without labels; got 2"):
        how = dict(labels=False, guidance=2)
        sampling_row(load_denoiser("digits"), WEIGHTS / "digits", {}, None, "digits", **how)
    # at the start, before anything is measured
    assert "knows no classes" in refused("ddpm-evaluate", "fashion_mnist_plain", "--guidance", 2)
    assert "not allowed with" in refused("ddpm-evaluate", "digits", "--guidance", 2, "--no-labels")
    assert "expected a number; got nan" in refused("ddpm-evaluate", "digits", "--guidance", "nan")


def test_evaluate_measures_the_table_of_a_run_once(run, tmp_path, tiny):
    run("ddpm-train", "digits", *tiny, "--max-steps", 6, "--out-dir", "runs/d", cwd=tmp_path)
    flags = ["--method", "ancestral", "--variance", "optimal"]
    step = tmp_path / "runs/d/step-0000006"
    refused = run("ddpm-sample", "runs/d", "--n", 2, *flags, code=2, cwd=tmp_path)
    assert "ddpm-evaluate runs/d writes it" in refused.stderr
    run("ddpm-evaluate", "runs/d", *QUICK, *flags, cwd=tmp_path)
    table = load_file(step / "x0_error.safetensors")["x0_error"]
    assert table.shape == (1001,) and table[0] == 0 and (table[1:] > 0).all()
    before = (step / "x0_error.safetensors").stat().st_mtime_ns
    run("ddpm-evaluate", "runs/d", *QUICK, "--seed", 3, cwd=tmp_path)
    assert (step / "x0_error.safetensors").stat().st_mtime_ns == before
    assert len(json.loads((step / "evaluation.json").read_text())) == 4
    run("ddpm-sample", "runs/d", "--n", 2, "--steps", 3, *flags, cwd=tmp_path)


@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere"], "expected a run folder, a step folder or one of digits"),
        (["digits", "--features", "vgg"], "features: expected one of digits, fashion_mnist"),
        (["digits", "--bits-n", "1"], "bits-n: expected 0, or at least 2 pictures; got 1"),
        (
            ["digits", "--method", "ddim", "--variance", "beta"],
            "variance: expected none with method",
        ),
        (["digits", "--bits-n", "2", "--strata", "5000"], "strata: expected 1..999"),
        (["digits", "--steps", "2000", "--bits-n", "0"], "steps: expected 1..1000"),
        (["digits", "--out", "/dev/null/x.json"], "out, samples: cannot write to /dev/null"),
        (["digits", "--n", "2", "--bits-n", "0"], "n: expected 0, or at least 4 samples"),
    ],
)
def test_evaluate_refuses(args, message, refused, tmp_path):
    assert message in refused("ddpm-evaluate", *args, cwd=tmp_path).splitlines()[-1]


def pictures(folder, size, n=6, channels=3):
    """A folder of pictures that are no data set."""
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, channels)).astype(np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / f"{i}.png")


def test_resized_pictures_have_no_bits_per_dimension(run, tmp_path, tiny):
    pictures(tmp_path / "mine", (12, 16), n=20, channels=1)
    train = ["ddpm-train", "digits", *tiny, "--max-steps", 2, "--dataset-name", "mine"]
    run(*train, "--out-dir", "run", cwd=tmp_path)
    done = run("ddpm-evaluate", "run", *QUICK, code=2, cwd=tmp_path)
    assert "bits-n: expected 0, since 20 of 20 were resized to 8 x 8" in done.stderr
    quality = ["--bits-n", 0, "--n", 6, "--steps", 2, "--features", "digits"]
    done = run("ddpm-evaluate", "run", *quality, cwd=tmp_path)
    assert "no test pictures" in done.stdout and "FID" in done.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights(name, run, tmp_path):
    """They are what their card says, and draw pictures far from any data and any network."""
    folder, card = WEIGHTS / name, json.loads((WEIGHTS / name / "run_card.json").read_text())
    content = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == card["sha256"]
    assert len(content) == card["bytes"] < 12e6
    lines = (LOGS / name / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == card["steps"]
    if name in BARE:
        assert card["evaluation"] == [] and not (folder / "x0_error.safetensors").exists()
    else:
        assert {r["settings"]["what"] for r in card["evaluation"]} == {"bits", "quality"}
        assert load_file(folder / "x0_error.safetensors")["x0_error"].shape == (1001,)
    proxy = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    run("ddpm-sample", name, "--n", 4, "--steps", 4, "--out", "x.png", cwd=tmp_path, **proxy)
    with Image.open(tmp_path / "x.png") as image:
        assert np.asarray(image).std() > 30


def test_a_folder_of_ones_own_goes_before_a_shipped_name(tmp_path, monkeypatch):
    from ddpm_nb.runs import find_checkpoint, load_denoiser, shipped

    assert shipped() == SHIPPED and "digits" in SHIPPED
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # holds no checkpoint
    assert find_checkpoint("digits") == WEIGHTS / "digits"
    (tmp_path / "digits" / "step-0000001").mkdir()
    assert find_checkpoint("digits") == Path("digits/step-0000001")
    with pytest.raises(ValueError, match="a step folder or one of digits, digits_early"):
        load_denoiser("imagenet")


def test_feature_networks_are_what_their_cards_say():
    for card in WEIGHTS.glob("*_features.json"):
        facts, file = json.loads(card.read_text()), card.with_suffix(".safetensors")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == facts["sha256"]
        assert file.stat().st_size < 2e6 and facts["test_accuracy"] > 0.9


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="the Fashion-MNIST files (package dataset-fashion-mnist) are not here",
)
def test_the_stored_ladder_comes_out_again():
    """The shipped classifier and the real pictures give the stored ladder, number for number."""
    from ddpm_nb.data import load_data
    from ddpm_nb.distance import features_of, frechet_distance, ladder, load_features

    rows = json.loads((WEIGHTS / "fashion_mnist_plain" / "run_card.json").read_text())["evaluation"]
    row = min((r for r in rows if "ladder" in r), key=lambda r: r["ladder_n"])
    net, train = load_features("fashion_mnist"), load_data("fashion_mnist")
    test = load_data("fashion_mnist", split="test").pictures[: row["ladder_n"]]
    reference = features_of(net, train)
    for name, pixels in ladder(test).items():
        fid = frechet_distance(reference, features_of(net, pixels))
        assert abs(fid - row["ladder"][name]) < 0.01 * row["ladder"][name] + 1e-3, name


def test_cifar10_is_hos_recipe_and_runs(run, tmp_path):
    """On pictures of the right kind, in the binary files' format."""
    from ddpm_nb.train import DiffusionConfig, ModelConfig

    run_, network = DiffusionConfig.preset("cifar10"), ModelConfig.preset("cifar10")
    assert (run_.learning_rate, run_.warmup_steps, run_.batch_size) == (2e-4, 5000, 128)
    assert (run_.max_steps, run_.ema_decay, run_.clip_norm) == (800_000, 0.9999, 1.0)
    assert run_.use_augmentation and run_.schedule == "linear" and run_.timesteps_diff == 1000
    assert run_.decay_start is None and network.dropout == 0.1 and network.picture_size == 32
    assert (network.base_dim, network.dim_multiply, network.transformer_layers) == (
        128,
        (1, 2, 2, 2),
        (1,),
    )
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    records = torch.randint(0, 256, (8, 3073), dtype=torch.uint8, generator=g).numpy()
    records[:, 0] %= 10  # the label
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records.tofile(folder / name)
    steps = ["--max-steps", 2, "--batch-size", 2, "--sample-every", 0, "--out-dir", "run"]
    run("ddpm-train", "cifar10", *steps, cwd=tmp_path)
    large = ["--method", "ancestral", "--variance", "beta", "--steps", 2, "--n", 1]
    run("ddpm-sample", "run", *large, cwd=tmp_path)
    losses = [json.loads(x)["loss"] for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 1 and 0.5 < losses[0] < 2


def test_ffhq128_runs(run, tmp_path):
    pictures(tmp_path / "FFHQ", (128, 128), n=4)
    steps = ["--max-steps", 2, "--batch-size", 1, "--sample-every", 0, "--num-workers", 0]
    run("ddpm-train", "ffhq128", *steps, "--out-dir", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "step-0000002" / "model.safetensors").is_file()

"""Pages 12, 13 and 15: what their graders say to wrong answers, what is refused, and whether their logs fit."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from cells import run_cells

from ddpm_nb.data import PictureData, load_data, load_labels, to_model_range
from ddpm_nb.distance import load_features, quality_row, save_row, train_classifier
from ddpm_nb.likelihood import Denoised, bits_per_dim, decoder_term, denoise, denoising_term
from ddpm_nb.scheduler import LinearNoiseScheduler

ROOT = Path(__file__).parent.parent
LINEAR = LinearNoiseScheduler()


def grader(page, name):
    """A grader, made by its cell of a page."""
    return run_cells(
        page,
        f"def {name}(",
        math=math,
        torch=torch,
        denoising_term=denoising_term,
        LinearNoiseScheduler=LinearNoiseScheduler,
    )[name]


def cost(factor):
    return (1 / factor - 1 + math.log(factor)) / 2 / math.log(2)


def per_original(bits, size, padded):
    return bits * padded**2 / size**2


def steps_for(minutes, speed, batch):
    return int(minutes * 60 * speed // batch)


def fair(a, b):
    return all(a[k] == b[k] for k in ("n", "features", "reference"))


LIKELIHOOD, FASHION = "12_likelihood.ipynb", "15_fashion_mnist.ipynb"


@pytest.mark.parametrize(
    "page, name, answer, says",
    [
        (LIKELIHOOD, "grade_cost", cost, "Correct"),
        (LIKELIHOOD, "grade_cost", lambda f: cost(1 / f), "Not yet: that is r = factor"),
        (LIKELIHOOD, "grade_cost", lambda f: cost(f) * math.log(2), "Not yet: those are nats"),
        (LIKELIHOOD, "grade_cost", lambda f: None, "Not yet"),
        (LIKELIHOOD, "grade_per_original", per_original, "Correct"),
        (LIKELIHOOD, "grade_per_original", lambda b, s, p: b, "Not yet: the border"),
        (
            LIKELIHOOD,
            "grade_per_original",
            lambda b, s, p: b * s**2 / p**2,
            "Not yet: the other way",
        ),
        (LIKELIHOOD, "grade_per_original", lambda b, s, p: b * p / s, "Not yet: a picture has two"),
        (FASHION, "grade_steps", steps_for, "Correct"),
        (FASHION, "grade_steps", lambda m, s, b: int(m * s / b), "Not yet: the speed is per"),
        (FASHION, "grade_steps", lambda m, s, b: None, "Not yet"),
        (FASHION, "grade_fair", fair, "Correct"),
        (
            FASHION,
            "grade_fair",
            lambda a, b: a["features"] == b["features"],
            "Not yet: the two differ in n",
        ),
        (FASHION, "grade_fair", lambda a, b: None, "Not yet: nothing"),
    ],
)
def test_graders(page, name, answer, says):
    assert grader(page, name)(answer).startswith(says)


def digits(n=4):
    return load_data("digits", split="test").pictures[:n]


def nothing(xt, t):
    """A network that guesses no noise."""
    return torch.zeros_like(xt)


def one_picture():
    x, t = torch.zeros(1, 1, 2, 2), torch.ones(1, 2, dtype=torch.int64)
    return Denoised(x, x, t, torch.ones(2), t.double(), 256)


BETWEEN = load_data(torch.full((2, 1, 1, 1), -0.3))
FOUR = PictureData(digits(), "digits", 17)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: denoising_term(LINEAR, torch.ones(2), torch.ones(2).long()), "steps in 2..1000"),
        (
            lambda: decoder_term(
                LINEAR, to_model_range(digits(2), 17), torch.zeros(2, 1, 8, 8), 256
            ),
            "x0: expected pictures on 256 levels, 2k / 255 - 1; got values between them",
        ),
        (lambda: denoise(nothing, BETWEEN, LINEAR), "were rounded to 256 levels"),
        (lambda: denoise(nothing, FOUR, LINEAR, n=5), "n: expected 1..4, the pictures there are"),
        (lambda: denoise(nothing, FOUR, LINEAR, strata=1000), "strata: expected 1..999 (T - 1)"),
        (lambda: denoise(nothing, FOUR, LINEAR, strata=0), "strata: expected 1..999 (T - 1)"),
        (lambda: bits_per_dim(LINEAR, one_picture()), "denoised: expected at least 2 pictures"),
        (lambda: load_features("no-such-thing"), "features: expected one of digits, fashion_mnist"),
        (
            lambda: train_classifier(FOUR, load_labels("digits", split="test")[:4], batch_size=5),
            "batch_size: expected at most the 4 pictures; got 5",
        ),
        (lambda: quality_row(torch.zeros(3, 1, 8, 8), {}, None), "n: expected at least 4 samples"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("other", ["not rows", '{"a": 1}', "[1]"])
def test_a_file_that_holds_no_rows_is_left_alone(other, tmp_path):
    file = tmp_path / "evaluation.json"
    file.write_text(other)
    with pytest.raises(ValueError, match="is not a JSON list of rows"):
        save_row(file, dict(settings={}))
    assert file.read_text() == other and [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("file", sorted((ROOT / "nbs" / "logs").glob("*/paired.json")))
def test_paired_fids_are_of_the_weights_that_ship(file, monkeypatch):
    """And the log's means and errors are those of its FIDs."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    from paired_fid import summary

    log = json.loads(file.read_text())
    card = ROOT / "ddpm_nb" / "weights" / file.parent.name / "run_card.json"
    assert log["settings"]["weights"] == json.loads(card.read_text())["sha256"][:12]
    assert log["summary"].keys() == log["fid"].keys()
    for steps, fids in log["fid"].items():
        assert len(fids["optimal"]) >= 5
        for k, v in summary(fids).items():
            assert log["summary"][steps][k] == pytest.approx(v, rel=1e-9), (steps, k)

"""Pages 12, 13 and 15: what their graders say to wrong answers, what is refused, and whether their logs fit."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from cells import run_cells

from ddpm_nb import device
from ddpm_nb.data import PictureData, load_data, to_model_range
from ddpm_nb.device import resolve_precision
from ddpm_nb.distance import (
    likelihood_row,
    load_features,
    quality_row,
    row_text,
    sampling_row,
    save_row,
    train_classifier,
)
from ddpm_nb.likelihood import (
    Denoised,
    GaussianDenoiser,
    bits_per_dim,
    decoder_term,
    denoise,
    denoising_term,
    prior_term,
)
from ddpm_nb.objective import Denoiser
from ddpm_nb.runs import WEIGHTS, load_denoiser
from ddpm_nb.scheduler import CosineNoiseScheduler, LinearNoiseScheduler, stream

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
    """A denoiser that sees grey everywhere."""
    return torch.zeros_like(xt)


def one_picture():
    x, t = torch.zeros(1, 1, 2, 2), torch.ones(1, 2, dtype=torch.int64)
    return Denoised(x, x, t, torch.ones(2), t.double(), 256)


X = torch.zeros(1, 1, 2, 2)
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
        (
            lambda: denoise(nothing, FOUR),
            "scheduler: expected one, for a denoiser that does not say; got None",
        ),
        (lambda: GaussianDenoiser(torch.zeros(2, 1, 2, 2), LINEAR)(X, 1001), "t: expected steps"),
        (lambda: bits_per_dim(LINEAR, one_picture()), "denoised: expected at least 2 pictures"),
        (lambda: load_features("no-such-thing"), "features: expected one of digits, fashion_mnist"),
        (
            lambda: train_classifier(FOUR, load_data("digits").labels[:4], batch_size=5),
            "batch_size: expected at most the 4 pictures; got 5",
        ),
        (lambda: quality_row(torch.zeros(3, 1, 8, 8), {}, None), "n: expected at least 4 samples"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


class Dropping(torch.nn.Module):
    """A network whose answer depends on its mode, and that notes in which it was asked."""

    def __init__(self):
        super().__init__()
        self.drop, self.modes = torch.nn.Dropout(0.5), []

    def forward(self, x, t):
        self.modes.append(self.training)
        return self.drop(x)


def test_denoise_asks_in_evaluation_mode():
    denoiser = Denoiser(Dropping(), LINEAR, "x0").train()
    how = dict(strata=3, batch_size=2)
    first, again = (denoise(denoiser, FOUR, **how) for _ in range(2))
    assert denoiser.net.modes == [False] * 2 * 2 * 4 and denoiser.training
    assert denoiser.net.drop.training
    assert (first.error == again.error).all() and (first.error > 0).all()


def test_draws_of_a_picture_are_its_own():
    """Whatever the batch; and they are neither those of samples nor those of a run's steps."""
    one, four = (denoise(nothing, FOUR, LINEAR, strata=5, batch_size=b) for b in (1, 4))
    assert (one.t == four.t).all() and (one.error == four.error).all()
    assert (one.error[:, 0] == one.x0.square().flatten(1).mean(1).double()).all()

    def first_noise(i, purpose):
        g = stream(7, i, purpose)
        torch.randint(1, 2, (), generator=g)  # of t = 1
        return torch.randn(1, 8, 8, generator=g)

    seen = []
    denoise(lambda xt, t: seen.append((xt, t)) or xt, FOUR, LINEAR, strata=1, seed=7)
    (xt, t), x0 = seen[0], to_model_range(digits(), 17)
    assert (t == 1).all() and t.shape == (4,)
    for purpose in ("evaluate", "sample", "train"):
        noise = torch.stack([first_noise(i, purpose) for i in range(4)])
        assert torch.equal(LINEAR.add_noise(x0, noise, t), xt) == (purpose == "evaluate")


def test_a_schedule_may_end_without_signal():
    """Prior term 0; each later term a number, with every variance; a whole estimate of a Gaussian pixel."""
    for s in (
        LinearNoiseScheduler(zero_terminal_snr=True),
        CosineNoiseScheduler(50, zero_terminal_snr=True),
    ):
        T = s.num_timesteps
        assert (prior_term(s, to_model_range(digits(), 17)) == 0).all()
        error, t = torch.tensor([0.5, 0.5]), torch.tensor([T - 1, T])
        for variance in ("beta_tilde", "beta", torch.full((T + 1,), 0.5).double()):
            terms = denoising_term(s, error, t, variance)
            assert terms.isfinite().all() and (terms >= 0).all()
        # the SNR's drop to 0, times half the error
        abar = s.alpha_cumprod[T - 1]
        want = abar / (1 - abar) * 0.5 / 2 / math.log(2)
        assert denoising_term(s, error, t)[1] == pytest.approx(float(want), rel=1e-9)
        exact = GaussianDenoiser(to_model_range(load_data("digits").pictures, 17), s)
        bits = bits_per_dim(s, denoise(exact, FOUR, strata=8))
        assert math.isfinite(bits["bits"]) and bits["prior"] == 0


def test_a_gaussians_denoiser_is_a_denoiser():
    """For one t or one each; on its own device; in float32 at least; as far from x_T as it should be."""
    pictures = torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.4
    s = LinearNoiseScheduler(zero_terminal_snr=True)
    exact, t = GaussianDenoiser(pictures, s), torch.tensor([1, 500, 1000])
    xt = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    each = torch.cat([exact(x[None], int(k)) for x, k in zip(xt, t, strict=True)])
    torch.testing.assert_close(exact(xt, t), each, rtol=0, atol=1e-14)
    assert (exact(xt, t)[2] - pictures.double().mean(0)).abs().max() < 1e-12
    assert (exact(xt, t)[0] - xt[0]).abs().max() < 0.1  # hardly any noise to take away
    assert exact.device == torch.device("cpu") and exact.scheduler is s
    assert exact(xt.half(), t).dtype == torch.float32 and exact(xt, t).dtype == torch.float64


def test_rows_say_how_they_were_made(tmp_path, monkeypatch):
    """ "auto" is what it came to on the device; a solver that asks twice a step costs twice."""

    denoiser, data = load_denoiser("digits"), dict(train=FOUR, test=FOUR)
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    table = (WEIGHTS / "digits" / "x0_error.safetensors").read_bytes()
    (tmp_path / "x0_error.safetensors").write_bytes(table)
    (tmp_path / "config.json").write_text("{}")
    bits = likelihood_row(denoiser, tmp_path, data, 2, 2, precision="auto")
    assert bits["settings"] == dict(what="bits", n=2, strata=2, seed=0, precision="float32")
    features = load_features("digits")
    how = dict(n=4, steps=3, method="heun", spacing="karras", precision="auto")
    row = sampling_row(denoiser, tmp_path, data, features, "digits", **how)
    assert row["settings"] == dict(
        what="quality", features="digits", seed=0, variance=None, labels=True, guidance=1.0,
        **how | dict(precision="float32"),
    )  # fmt: skip
    assert row["evaluations"] == 4 * (2 * 3 - 1)
    assert "float32" in row_text(row).splitlines()[0]
    assert not denoiser._forward_hooks
    assert resolve_precision("cpu", "bf16") == "bf16"
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: True)
    assert resolve_precision("cpu", "auto") == "bf16"


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

"""Another denoiser, or another walk: guidance, holes, there and back, between two, from a picture."""

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import PLAIN, TEN, awake

from ddpm_nb.control import (
    _between,
    _repaint,
    _with_jumps,
    autoguided,
    decode,
    encode,
    guided,
    inpaint,
    interpolate,
    start_from,
)
from ddpm_nb.objective import Denoiser
from ddpm_nb.sample import SAMPLERS, sample, timestep_walk
from ddpm_nb.scheduler import CosineNoiseScheduler, LinearNoiseScheduler, stream

SCHEDULE = CosineNoiseScheduler(50)


def told(prediction="v", config=TEN, seed=0):
    return Denoiser(awake(config, seed), SCHEDULE, prediction)


def pictures(n=3, seed=1):
    return torch.rand(n, 1, 8, 8, generator=stream(seed, 0)) * 2 - 1


class Counted(torch.nn.Module):
    "A denoiser that notes how many pictures it was asked about, each time."

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.asked = denoiser, []
        self.net, self.scheduler, self.device = denoiser.net, denoiser.scheduler, denoiser.device

    def forward(self, xt, t, labels=None):
        self.asked.append(len(xt))
        return self.denoiser(xt, t, labels)


# ---- guidance


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_guidance_is_a_line_through_two_answers(prediction):
    """In one call of twice as many; for t as a number and as a tensor; beyond, between, and away."""
    denoiser = Counted(told(prediction))
    x, labels = pictures(), torch.tensor([3, 7, 3])
    free, led = denoiser(x, 30, torch.full((3,), 10)), denoiser(x, 30, labels)
    for w in (-1.0, 0.0, 0.5, 2, 4.0):
        denoiser.asked.clear()
        guess = guided(denoiser, w)(x, 30, labels)
        assert denoiser.asked == [6]
        torch.testing.assert_close(guess, free + w * (led - free), rtol=1e-4, atol=1e-3)
        each = guided(denoiser, w)(x, torch.full((3,), 30), labels)
        torch.testing.assert_close(each, guess, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_where_guidance_does_nothing_it_costs_nothing():
    denoiser, x, labels = Counted(told()), pictures(), torch.tensor([3, 7, 3])
    plain = denoiser(x, 30, labels)
    for w, interval in ((1, None), (1.0, (0, 50)), (3, (31, 50)), (3, (0, 29)), (3, (12.5, 29.9))):
        denoiser.asked.clear()
        assert torch.equal(guided(denoiser, w, interval)(x, 30, labels), plain)
        assert denoiser.asked == [3]
    strong = guided(denoiser, 3)
    for interval in ((30, 50), (0, 30), (30, 30)):  # both ends belong to it
        assert torch.equal(guided(denoiser, 3, interval)(x, 30, labels), strong(x, 30, labels))
    mixed = guided(denoiser, 3, (20, 30))(x, torch.tensor([30, 31, 19]), labels)
    torch.testing.assert_close(mixed[0], strong(x, 30, labels)[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mixed[1], denoiser(x, 31, labels)[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("method", SAMPLERS)
def test_every_sampler_takes_a_guided_denoiser(method, clip):
    """Strength 1 is the plain walk; 3 is another; in any batches; the network's mode comes back."""
    denoiser = told()
    denoiser.train()
    how = dict(steps=4, method=method, spacing="uniform", labels=[1, 2, 3], clip=clip)
    plain = sample(denoiser, 3, **how)
    assert torch.equal(sample(guided(denoiser, 1), 3, **how), plain)
    strong = sample(guided(denoiser, 3), 3, **how)
    assert (strong - plain).abs().amax((1, 2, 3)).min() > 1e-3 and denoiser.training
    torch.testing.assert_close(
        sample(guided(denoiser, 3), 3, batch_size=2, **how), strong, rtol=0, atol=1e-3
    )


@torch.no_grad()
def test_away_from_a_worse_self():
    good, bad = told(), told(seed=1)
    x, labels = pictures(), torch.tensor([3, 7, 3])
    for given in (labels, None):
        a, b = good(x, 30, given), bad(x, 30, given)
        guess = autoguided(good, bad, 2.5)(x, 30, given)
        torch.testing.assert_close(guess, b + 2.5 * (a - b))
    assert torch.equal(autoguided(good, bad, 1)(x, 30), good(x, 30))
    assert torch.equal(autoguided(good, bad, 3, (0, 20))(x, 30), good(x, 30))
    assert sample(autoguided(good, bad, 2), 2, steps=2).shape == (2, 1, 8, 8)
    other = Denoiser(awake(TEN), LinearNoiseScheduler(50), "v")
    with pytest.raises(ValueError, match="worse: expected a denoiser for the same noise"):
        autoguided(good, other, 2)


NO_ROW = replace(TEN, null_label=False)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: guided(told(config=PLAIN), 2), "got one that knows no classes"),
        (lambda: guided(told(config=NO_ROW), 2), "knows all pictures by their labels"),
        (lambda: guided(told(), float("nan")), "guidance: expected a number; got nan"),
        (lambda: guided(told(), "2"), "guidance: expected a number; got '2'"),
        (lambda: guided(told(), True), "guidance: expected a number; got True"),
        (lambda: guided(told(), 2, (30, 20)), r"interval: expected \(low, high\)"),
        (lambda: guided(told(), 2, 20), r"interval: expected \(low, high\)"),
        (lambda: sample(guided(told(), 2), 2, steps=1), "labels: expected a class .* got None"),
        (lambda: sample(guided(told(), 2), 2, steps=1, labels=11), "labels: expected 0..9"),
    ],
)
def test_guidance_refuses_what_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


# ---- a hole

MASK = torch.ones(8, 8)
MASK[:, 5:] = 0


def test_what_is_known_is_kept_and_the_rest_is_drawn():
    """Bit for bit what was given; the rest depends on the seed and on what is known."""
    denoiser, known = told(), pictures()
    how = dict(steps=5, jumps=2)
    x = inpaint(denoiser, known, MASK, **how)
    assert torch.equal(x[..., :5], known[..., :5]) and x.shape == known.shape
    assert not torch.equal(x[..., 5:], inpaint(denoiser, known, MASK, seed=1, **how)[..., 5:])
    other = inpaint(denoiser, -known, MASK, **how)
    assert (x[..., 5:] - other[..., 5:]).abs().amax((1, 2, 3)).min() > 1e-3
    hidden = torch.where(MASK == 1, known, 0.7)  # what stands in the hole is not looked at
    assert torch.equal(inpaint(denoiser, hidden, MASK, **how), x)
    few = inpaint(denoiser, known, MASK.bool(), batch_size=2, **how)
    torch.testing.assert_close(few, x, rtol=0, atol=1e-3)
    own = torch.stack([MASK, MASK, 1 - MASK])[:, None]  # a mask for each
    assert torch.equal(inpaint(denoiser, known, own, **how)[2, :, :, 5:], known[2, :, :, 5:])


def test_a_hole_of_a_class():
    denoiser, known = told(), pictures()
    plain, three = (inpaint(denoiser, known, MASK, 4, labels=k, jumps=1) for k in (None, 3))
    strong = inpaint(guided(denoiser, 4), known, MASK, 4, labels=3, jumps=1)
    for a, b in ((plain, three), (three, strong)):
        assert (a - b).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    "jumps, length, evaluations", [(1, 1, 8), (3, 1, 24), (2, 4, 16), (2, 3, 16)]
)
def test_each_stretch_is_walked_as_often_as_asked(jumps, length, evaluations):
    way = _with_jumps(timestep_walk(SCHEDULE, 8), jumps, length)
    assert way[0] == 50 and way[-1] == 0
    assert sum(b < a for a, b in zip(way, way[1:], strict=False)) == evaluations
    counted = Counted(told())
    inpaint(counted, pictures(), MASK, 8, jumps=jumps, jump_length=length)
    assert counted.asked == [3] * evaluations


def normal(g, xt):
    return torch.randn(xt.shape, generator=g, dtype=xt.dtype)


@torch.no_grad()
def test_a_hole_next_to_a_known_pixel_approaches_the_conditional():
    """Two normal pixels of correlation 0.8, one known to be 1.5: the other has mean 1.2.

    Without jumps 0.75. With them the error falls like one over their number.
    """
    s, n = LinearNoiseScheduler(200), 4000
    cov = torch.tensor([[1, 0.8], [0.8, 1]], dtype=torch.float64)

    def exact(xt, t):
        a = float(s.alpha_cumprod[t])
        inverse = torch.linalg.inv(a * cov + (1 - a) * torch.eye(2, dtype=torch.float64))
        return xt @ (a**0.5 * cov @ inverse).T

    known, mask = torch.tensor([0.0, 1.5]).double().expand(n, 2), torch.tensor([0.0, 1.0])
    mean = {}
    for jumps in (1, 4, 8):
        g = stream(0, jumps)
        noise = partial(normal, g)
        way = _with_jumps(timestep_walk(s, 50), jumps, 1)
        x = _repaint(exact, s, noise(known), way, noise, known, mask, "beta", clip=False)
        assert (x[:, 1] == 1.5).all()
        mean[jumps] = float(x[:, 0].mean())
    assert abs(mean[1] - 0.73) < 0.06 and abs(mean[4] - 1.06) < 0.06 and abs(mean[8] - 1.13) < 0.06


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: inpaint(told(), pictures(), MASK[:4]), "mask: expected .* 8 x 8; got 4 x 8"),
        (lambda: inpaint(told(), pictures(), MASK * 255), "mask: expected two values"),
        (lambda: inpaint(told(), pictures(), MASK / 2), "mask: expected two values"),
        (lambda: inpaint(told(), pictures(), MASK.expand(2, 1, 8, 8)), "one for all pictures"),
        (
            lambda: inpaint(told(), pictures().expand(-1, 3, -1, -1), MASK),
            r"known: .*\(n, 1, 8, 8\)",
        ),
        (lambda: inpaint(told(), pictures()[0], MASK), r"known: .*got \(1, 8, 8\)"),
        (lambda: inpaint(told(), pictures() + 2, MASK), r"known: expected values in"),
        (lambda: inpaint(told(), pictures(), MASK, jumps=0), "jumps: expected a whole number"),
        (lambda: inpaint(told(), pictures(), MASK, jump_length=1.5), "jump_length: expected"),
        (lambda: inpaint(told().net, pictures(), MASK), "denoiser: expected a Denoiser"),
        (lambda: encode(told(), pictures(1)[..., :4]), r"pictures: .*\(n, 1, 8, 8\)"),
        (lambda: interpolate(told(), pictures(3)), "pictures: expected two"),
        (lambda: interpolate(told(), pictures(2), n=1), "n: expected at least 2"),
        (lambda: start_from(told(), pictures(), 0), "strength: expected a number above 0"),
        (lambda: start_from(told(), pictures(), 1.01), "strength: expected a number above 0"),
        (lambda: start_from(told(), pictures(), 0.1, steps=6), r"steps: expected 1..5"),
        (lambda: decode(told(), pictures(), method="euler"), "method: expected one of"),
        (lambda: decode(told(), pictures()[0]), r"noise: .*got \(1, 8, 8\)"),
        (lambda: decode(told(), pictures() / 0), "noise: expected values"),
        (lambda: start_from(told(), pictures(), eta=0.5), "eta: expected what"),
        (lambda: start_from(told(), pictures(), True), "strength: expected a number"),
        (lambda: start_from(told(), (pictures() * 100).byte()), "of floats"),
        (lambda: inpaint(told(), pictures(), MASK, variance="bta"), "variance: expected"),
        (lambda: inpaint(told(), pictures(), "mask"), "mask: expected a tensor; got str"),
        (lambda: inpaint(told(), pictures(), MASK.expand(3, 8, 8)), "mask: expected"),
        (lambda: interpolate(told(), pictures(2), labels=[1, 2]), "labels: expected one"),
        (lambda: encode(told(), pictures(), batch_size=0), "n and batch_size: expected"),
        (lambda: guided(lambda x, t, labels: x, 2), "no_label: expected the label"),
    ],
)
def test_control_refuses_what_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


# ---- there and back, between two, from a picture


def gaussian(mean=0.2, var=0.09):
    "The exact denoiser of normal pixels, as a Denoiser that predicts x0."

    def net(x, t, labels=None):
        a, b = SCHEDULE.signal_noise(t, x)
        return (mean + a * var / (a**2 * var + b**2) * (x - a * mean)).to(x.dtype)

    return Denoiser(net, SCHEDULE, "x0")


def test_there_and_back_on_an_exact_denoiser():
    """The error of the round trip falls with the steps; batches and seeds change nothing."""
    x = (0.2 + 0.3 * torch.randn(4, 1, 8, 8, generator=stream(0, 0))).clamp(-1, 1)
    off = []
    for steps in (5, 10, 20, 40):
        z = encode(gaussian(), x, steps)
        off.append(
            float((decode(gaussian(), z, steps, method="ddim", clip=False) - x).square().mean())
        )
    assert all(b < a / 2 for a, b in zip(off, off[1:], strict=False)) and off[-1] < 2e-3
    assert 0.85 < z.std() < 1.05
    assert torch.equal(encode(gaussian(), x, 40, batch_size=3), z)


def test_between_two_pictures():
    """The ends are the pictures' own round trips; in between the noise keeps its length."""
    denoiser, two = told(), pictures(2)
    way = interpolate(denoiser, two, n=5, steps=6)
    ends = decode(denoiser, encode(denoiser, two, 6), 6)
    torch.testing.assert_close(way[[0, -1]], ends, rtol=0, atol=1e-3)
    assert way.shape == (5, 1, 8, 8) and not torch.equal(way[2], ends.mean(0))
    a, b = torch.randn(2, 1, 32, 32, generator=stream(0, 0))
    b = b * (a.norm() / b.norm())
    arc = _between(a, b, 9)
    lengths = arc.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, a.norm().expand(9), rtol=1e-4, atol=0)
    steps = (arc[1:] - arc[:-1]).flatten(1).norm(dim=1)  # evenly, along the arc
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-3, atol=0)
    assert torch.isfinite(_between(a, a, 3)).all()


def test_from_a_picture():
    """Little strength keeps it, all of it forgets it; the seed counts; labels and guidance do."""
    x, exact = pictures(2), gaussian()
    near, far = (start_from(exact, x, v, steps=1, method="ddim") for v in (0.02, 1.0))
    assert (near - x).abs().mean() < 0.15 and (far - 0.2).abs().mean() < 0.1
    denoiser = told()
    how = dict(strength=0.6, steps=3)
    base = start_from(denoiser, x, **how)
    for other in (
        start_from(denoiser, x, seed=1, **how),
        start_from(denoiser, x, labels=3, **how),
        start_from(denoiser, -x, **how),
    ):
        assert (other - base).abs().amax((1, 2, 3)).min() > 1e-3
    strong = start_from(guided(denoiser, 3), x, labels=3, **how)
    assert not torch.equal(strong, start_from(denoiser, x, labels=3, **how))
    few = start_from(denoiser, x, batch_size=1, **how)
    torch.testing.assert_close(few, base, rtol=0, atol=1e-3)


def test_all_of_it_on_the_shipped_digits():
    """Nothing here may depend on what a network predicts: the shipped one draws pictures."""
    from ddpm_nb.data import load_data, to_model_range
    from ddpm_nb.runs import load_denoiser

    data, denoiser = load_data("digits", split="test"), load_denoiser("digits")
    x = to_model_range(data.pictures[:2], data.num_levels)
    draw = partial(inpaint, denoiser, x, MASK, 10, jumps=2)
    for made in (draw(), interpolate(denoiser, x, 3, steps=10), start_from(denoiser, x, 0.3)):
        assert torch.isfinite(made).all() and made.std() > 0.3


def test_what_guidance_does_is_measured_row_by_row(tmp_path, monkeypatch):
    """tools/guidance.py: every way of asking once a seed, the same noise for all; what is there is not made again."""
    pytest.importorskip("torchmetrics")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tools")
    guidance = importlib.import_module("guidance")
    file, settings = tmp_path / "guidance.jsonl", dict(weights="abc")
    guidance.measure("digits", guidance.Log(file, settings), seeds=1, n=20)
    text = file.read_text()
    real, *rows = (json.loads(line) for line in text.splitlines())
    assert real["led"] == "real" and real["n"] == 297 and real["share"] > 0.99
    assert len(rows) == 5 + 1 + 6 and all((r["share"] is None) != r["labels"] for r in rows)
    assert min(r["share"] for r in rows if r["labels"]) > 0.8
    guidance.measure("digits", guidance.Log(file, settings), seeds=1, n=20)
    assert file.read_text() == text
    with pytest.raises(SystemExit, match="is of other weights"):
        guidance.Log(file, dict(weights="def"))


# ---- from the command line


def test_a_way_from_a_picture_on_the_command_line(tmp_path, run, refused):
    """The files are those that ddpm-sample writes; what is kept is kept in the file, too."""
    import numpy as np
    from PIL import Image

    few = ("--steps", "4", "--device", "cpu")
    run("ddpm-sample", "digits", "--n", "2", "--out", tmp_path / "two", *few)
    a, b = sorted((tmp_path / "two").glob("*.png"))
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = ("--out", tmp_path / "made", *few)
    run("ddpm-sample", "digits", "--inpaint", a, "--mask", tmp_path / "mask.png", "--n", "3",
        "--jumps", "2", *out)  # fmt: skip
    made = sorted((tmp_path / "made").glob("*.png"))
    assert len(made) == 3
    for file in made:
        same = np.asarray(Image.open(file)) == np.asarray(Image.open(a))
        assert same[:4].all() and not same[4:].all()
    grid = tmp_path / "grid.png"
    run("ddpm-sample", "digits", "--start-from", a, "--strength", "0.4", "--out", grid, *few)
    run("ddpm-sample", "digits", "--interpolate", a, b, "--label", "none", "--out", grid, *few)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "white.png")
    run("ddpm-sample", "digits", "--start-from", tmp_path / "white.png", "--method", "ddim",
        "--eta", "0.5", "--out", grid, *few)  # fmt: skip
    Image.fromarray(mask[:, :6]).save(tmp_path / "narrow.png")
    Image.fromarray(mask // 2).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([mask, mask, 255 - mask], -1)).save(tmp_path / "colour.png")
    inpaint = ("--inpaint", a, "--mask")
    for typed, said in (
        (("--inpaint", a), "mask: expected a picture"),
        (("--mask", a), "mask: expected none without --inpaint"),
        (("--strength", "0.4"), "strength: expected none without --start-from"),
        (("--interpolate", a, b, "--strength", "0.4"), "strength: expected none"),
        ((*inpaint, tmp_path / "narrow.png"), "mask: expected 8 x 8 pixels"),
        ((*inpaint, tmp_path / "grey.png"), "mask: expected two values"),
        ((*inpaint, tmp_path / "colour.png"), "mask: expected a grey picture"),
        ((*inpaint, tmp_path / "nothing.png"), "mask: cannot read"),
        (("--start-from", tmp_path / "narrow.png"), "start-from: expected 8 x 8 pixels"),
        (("--start-from", tmp_path / "colour.png"), "start-from: expected a grey picture"),
        (("--start-from", a, "--strength", "1.5"), "strength: expected a number above 0"),
        (("--start-from", a, "--gif", tmp_path / "x.gif"), "gif: expected none"),
        (("--label", "ten"), "label: expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, or none"),
        (("--start-from", a, "--variance", "beta"), "variance: expected none with method"),
        ((*inpaint, tmp_path / "mask.png", "--method", "ddim"), "method: expected none"),
        ((*inpaint, tmp_path / "mask.png", "--eta", "0.5"), "eta: expected none with method"),
        (("--interpolate", a, b, "--n", "0"), "n: expected at least 2"),
        (("--start-from", a, "--n", "0"), "n: expected at least 1; got 0"),
        (("--start-from", a, "--steps", "0"), "steps: expected 1.."),
        (("--interpolate", a, b, "--label", "1", "2"), "label: expected one for the whole way"),
    ):
        assert said in refused("ddpm-sample", "digits", "--out", grid, *few, *typed)

"""The recipes of CONTRIBUTING.md, each followed once: an entry in a registry, and everything knows it."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ddpm_nb import datasets, scheduler, train, unet
from ddpm_nb.data import load_data
from ddpm_nb.sample import SAMPLERS, reverse_walk, sample, timestep_walk
from ddpm_nb.scheduler import NoiseScheduler, make_scheduler
from ddpm_nb.train import DiffusionConfig, train_diffusion
from ddpm_nb.unet import ModelConfig

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(4, (1, 2), (), 8, channels=1)


@pytest.fixture
def sigmoid(monkeypatch):
    """The class as CONTRIBUTING.md writes it, in the registry."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    names = dict(vars(scheduler))
    exec(code, names)
    monkeypatch.setitem(scheduler.SCHEDULES, "sigmoid", names["SigmoidNoiseScheduler"])
    return names["SigmoidNoiseScheduler"]


def test_a_schedule(sigmoid, tmp_path):
    s = make_scheduler(dict(schedule="sigmoid", num_timesteps=500, beta_end=0.03))
    assert isinstance(s, NoiseScheduler) and s.config["beta_end"] == 0.03
    assert (s.beta[1:].diff() > 0).all() and s.alpha_cumprod[0] == 1
    assert_close(s.beta[1] + s.beta[500], torch.tensor(0.0301, dtype=torch.float64))
    run = DiffusionConfig(
        schedule="sigmoid", max_steps=1, batch_size=4, out_dir=str(tmp_path), precision="float32"
    )
    checkpoint = train_diffusion(run, TINY, progress=False)
    from ddpm_nb.runs import load_checkpoint

    assert torch.equal(load_checkpoint(checkpoint)[1].beta, sigmoid().beta)


def test_an_unknown_schedule_is_told_of_the_new_one(sigmoid):
    for make in (
        lambda: make_scheduler(dict(schedule="no-such-thing")),
        lambda: DiffusionConfig(schedule="no-such-thing"),
    ):
        with pytest.raises(ValueError, match="linear, cosine, sigmoid"):
            make()


def test_a_sampler(monkeypatch):
    def guess_once(model, s, xt, steps=None, *, generator=None, callback=None):
        def step(xt, noise_pred, t, t_prev):
            x0 = s.predict_x0(xt, noise_pred, t)
            return x0, x0

        return reverse_walk(model, xt, timestep_walk(s.num_timesteps, 1), step, callback)

    monkeypatch.setitem(SAMPLERS, "guess-once", guess_once)
    s = scheduler.LinearNoiseScheduler()

    def exact(xt, t):  # of data that are all 0.5
        return (xt - s.sqrt_alpha_cumprod[t[0]] * 0.5) / s.sqrt_one_minus_alpha_cumprod[t[0]]

    x = sample(exact, s, 3, shape=(1, 2, 2), method="guess-once")
    assert_close(x, torch.full((3, 1, 2, 2), 0.5), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="ancestral, ddim, guess-once"):
        sample(exact, s, 3, shape=(1, 2, 2), method="no-such-thing")


def test_a_data_set(monkeypatch):
    def stripes(data_dir, split):
        pictures = (torch.arange(8) % 2 * 255).to(torch.uint8).expand(5, 1, 8, 8).contiguous()
        return datasets.Pictures(pictures, torch.zeros(5, dtype=torch.int64), ("stripes",))

    monkeypatch.setitem(datasets.DATASETS, "stripes", stripes)
    data = load_data("stripes")
    assert len(data) == 5 and data.num_levels == 256 and data[0][0, 0, 1] == 255


def test_a_preset(monkeypatch):
    monkeypatch.setitem(unet.PRESETS, "mine", asdict(TINY))
    monkeypatch.setitem(train.DIFFUSION_PRESETS, "mine", dict(max_steps=3))
    assert ModelConfig.preset("mine") == TINY
    assert DiffusionConfig.preset("mine", seed=5).max_steps == 3
    with pytest.raises(ValueError, match="ffhq128_long.*mine.*no-such-thing"):
        DiffusionConfig.preset("no-such-thing")

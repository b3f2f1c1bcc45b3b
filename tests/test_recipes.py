"""The recipes of CONTRIBUTING.md, each followed once: an entry in a registry, and everything knows it."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cells import run_cells
from scipy.stats import kstest
from torch.testing import assert_close

from ddpm_nb import datasets, runs, scheduler, train, unet
from ddpm_nb import sample as sampling
from ddpm_nb.data import load_data
from ddpm_nb.sample import SAMPLERS, sample, timestep_walk
from ddpm_nb.scheduler import NoiseScheduler, make_scheduler
from ddpm_nb.train import DiffusionConfig, train_diffusion
from ddpm_nb.unet import ModelConfig

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(4, (1, 2), (), 8, channels=1)


def recipe(start, module):
    """What the one block of CONTRIBUTING.md that starts like this defines, written into this module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (code,) = (block for block in blocks if block.startswith(start))
    names = dict(vars(module))
    exec(code, names)
    return names


@pytest.fixture
def quadratic(monkeypatch):
    """The class as CONTRIBUTING.md writes it, in the registry."""
    schedule = recipe("class", scheduler)["QuadraticNoiseScheduler"]
    monkeypatch.setitem(scheduler.SCHEDULES, "quadratic", schedule)
    return schedule


@pytest.mark.parametrize("zero", [False, True])
def test_a_schedule(quadratic, zero, tmp_path):
    config = dict(num_timesteps=500, beta_end=0.03, zero_terminal_snr=zero)
    s = make_scheduler(dict(schedule="quadratic", **config))
    assert isinstance(s, NoiseScheduler) and s.config["beta_end"] == 0.03
    assert (s.beta[1:].diff() > 0).all() and s.alpha_cumprod[0] == 1
    assert s.zero_terminal_snr is zero and (s.alpha_cumprod[-1] == 0) == zero
    assert torch.equal(make_scheduler(s.config).beta, s.beta)
    run = DiffusionConfig(
        schedule="quadratic",
        zero_terminal_snr=zero,
        prediction="v",
        max_steps=1,
        batch_size=4,
        out_dir=str(tmp_path),
        precision="float32",
    )
    checkpoint = train_diffusion(run, TINY, progress=False)
    denoiser = runs.load_denoiser(checkpoint)
    assert torch.equal(denoiser.scheduler.beta, quadratic(zero_terminal_snr=zero).beta)
    assert denoiser.prediction == "v"


def test_roots_of_the_new_schedule_rise_linearly(quadratic):
    s = quadratic(500, 1e-4, 0.03)
    assert_close(s.beta[1:].sqrt().diff(), (0.03**0.5 - 0.01) / torch.full((499,), 499.0).double())
    assert_close(s.beta[[1, 500]], torch.tensor([1e-4, 0.03]).double(), rtol=1e-6, atol=0)


def test_an_unknown_schedule_is_told_of_the_new_one(quadratic):
    for make in (
        lambda: make_scheduler(dict(schedule="no-such-thing")),
        lambda: DiffusionConfig(schedule="no-such-thing"),
    ):
        with pytest.raises(ValueError, match="linear, cosine, sigmoid, quadratic"):
            make()


@pytest.fixture
def between(monkeypatch):
    """The sampler as CONTRIBUTING.md writes it, in the registry."""
    names = recipe("def between_step", sampling)
    monkeypatch.setitem(SAMPLERS, "between", names["between_sample"])
    return names


def test_a_sampler(between):
    """The mixture of page 07 comes back, at both ends of its option the library's own numbers do."""
    s = scheduler.LinearNoiseScheduler()
    page = run_cells("07_sampling.ipynb", "class Mixture", torch=torch, math=math)
    toy, seeded = page["Mixture"](s), lambda i: torch.Generator().manual_seed(i)
    start = torch.randn(4000, 1, 1, 1, dtype=torch.float64, generator=seeded(0))
    g = seeded(1)
    points = between["between_sample"](
        toy, s, start, timestep_walk(s), lambda x: scheduler.randn_like(x, g), clip=False
    )
    cdf = lambda x: toy.cdf(torch.tensor(x), 0).numpy()  # noqa: E731
    assert kstest(points.flatten().numpy(), cdf).pvalue > 1e-3
    given = dict(n=3, scheduler=s, shape=(1, 2, 2), steps=5)
    for share, variance in ((0.0, "beta_tilde"), (1.0, "beta")):
        x = sample(toy, **given, method="between", share=share)
        same = sample(toy, **given, method="ancestral", variance=variance)
        assert_close(x, same, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="ancestral, ddim.*, between; got 'no-such-thing'"):
        sample(toy, **given, method="no-such-thing")
    with pytest.raises(ValueError, match="eta: expected what 'between' takes, clip, share; got 1"):
        sample(toy, **given, method="between", eta=1)


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

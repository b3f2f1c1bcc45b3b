"""Runs are broken in each of the ways that `diagnose` knows: it must name that one, and no other."""

import json
import shutil
import sys

import pytest
import torch
from torch.testing import assert_close

from ddpm_nb import diagnose as dg
from ddpm_nb import train
from ddpm_nb.cli import main_diagnose
from ddpm_nb.data import load_data, to_model_range
from ddpm_nb.diagnose import diagnose, symptoms
from ddpm_nb.runs import find_checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from ddpm_nb.sample import sample
from ddpm_nb.scheduler import SCHEDULES, CosineNoiseScheduler, LinearNoiseScheduler, stream
from ddpm_nb.unet import ModelConfig, UNet

CHECKS = ["data", "schedule", "weights", "average", "loss", "clipping"]


def short_run(folder, steps=120, data=None, **changes):
    """A few seconds of training on the digits."""
    config = dict(
        learning_rate=4e-3, batch_size=64, warmup_steps=20, schedule="cosine", precision="float32"
    )
    config = train.DiffusionConfig(max_steps=steps, out_dir=str(folder), **{**config, **changes})
    network = ModelConfig(4, (1, 2), (), 8, channels=1)
    train.train_diffusion(config, network, data=data, progress=False)
    return folder


@pytest.fixture(scope="module")
def x0():
    digits = load_data("digits")
    return to_model_range(digits.pictures, digits.num_levels)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("sound") / "run")


@pytest.fixture(scope="module")
def network(sound):
    return load_checkpoint(sound)


def says(found):
    """All texts, not wrapped."""
    return " ".join(f.text for f in found)


def edited(run, folder, change):
    """A copy of a run's checkpoint with other tensors or another config."""
    path = find_checkpoint(run)
    config, model = read_checkpoint(path, "model")
    tensors = dict(model=model, training=read_checkpoint(path, "training")[1])
    change(config, tensors)
    folder.mkdir()
    save_checkpoint(folder, config["step"], tensors, config, keep=1)
    return folder


def test_a_sound_run_is_not_accused(sound, network, x0):
    found = diagnose(sound)
    assert found.wrong == [] and [f.check for f in found] == CHECKS
    assert "Nothing wrong was found." in str(found)
    assert diagnose(find_checkpoint(sound)).wrong == []
    samples = sample(*network, 16, steps=30, method="ddim")
    assert diagnose(sound, samples=samples).wrong == []
    assert diagnose(network[0], x0, network[1]).wrong == []
    assert diagnose(network[0], load_data("digits"), network[1]).wrong == []


def test_average_without_warm_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train.EMA, "decay", lambda self, step: self.max_decay)
    found = diagnose(short_run(tmp_path / "run"))
    assert found.wrong == ["average"] and "warm-up" in says(found)


def test_too_little_training(tmp_path):
    found = diagnose(short_run(tmp_path / "run", 5))
    assert found.wrong == ["loss"] and "train for longer" in says(found)


def test_unscaled_betas(tmp_path, monkeypatch):
    def unscaled(num_timesteps, beta_start=1e-4, beta_end=0.02):
        return LinearNoiseScheduler(num_timesteps, beta_start, beta_end)

    monkeypatch.setitem(SCHEDULES, "linear", unscaled)
    run = short_run(tmp_path / "run", schedule="linear", timesteps_diff=200)
    found = diagnose(run)
    assert found.wrong == ["schedule"] and "scaled with T" in says(found)


@pytest.mark.parametrize(
    "change, advice",
    [
        (lambda x: (x + 1) / 2, "2 * x - 1"),
        (lambda x: 127.5 * (x + 1), "to_model_range"),
        (lambda x: (x - x.mean()) / x.std(), "Expected [-1, 1]"),
        (lambda x: (x + 1) * 8 / 127.5 - 1, "num_levels"),
        (lambda x: x.index_fill(0, torch.tensor([1400]), torch.nan), "NaN"),
        (lambda x: torch.cat([x, x, x * 0 - 1], 1), "channel"),
    ],
)
def test_data(change, advice, sound, x0):
    found = diagnose(sound, change(x0))
    assert found.wrong == ["data"] and advice in found[0].text


@pytest.mark.parametrize("part, key", [("model", "head.weight"), ("training", "exp_avg/stem.bias")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(part, key, value, sound, tmp_path):
    def change(config, tensors):
        tensors[part][key].view(-1)[0] = value

    found = diagnose(edited(sound, tmp_path / "run", change))
    assert found.wrong == ["weights"] and f"{part}/{key}" in found[2].text


def test_half_precision(sound, network, x0, tmp_path):
    def halve(part):
        return lambda config, tensors: tensors.update(
            {part: {k: v.bfloat16() for k, v in tensors[part].items()}}
        )

    assert diagnose(edited(sound, tmp_path / "raw", halve("training"))).wrong == ["weights"]
    assert (
        diagnose(edited(sound, tmp_path / "small", halve("model"))).wrong == []
    )  # for sampling: fine
    half = load_checkpoint(sound)[0].bfloat16()
    assert diagnose(half, x0, network[1]).wrong == ["weights"]


def test_a_network_that_answers_another_question(network, x0):
    model, scheduler = network

    def guess(xt, t):
        return scheduler.predict_x0(xt, model(xt, t), t).clamp(-1, 1)

    found = diagnose(guess, x0, scheduler)
    assert found.wrong == ["loss"] and "NoiseFrom" in says(found)


def test_another_schedule_than_it_was_trained_for(sound, tmp_path):
    linear = LinearNoiseScheduler(1000).config
    run = edited(sound, tmp_path / "run", lambda config, tensors: config.update(scheduler=linear))
    assert diagnose(run).wrong == ["loss"]


def test_samples_drawn_without_clipping(sound, network):
    samples = sample(*network, 16, steps=30, method="ddim", clip=False)
    found = diagnose(sound, samples=samples)
    assert found.wrong == ["clipping"] and "without it" in says(found)


@pytest.mark.parametrize(
    "name, change",
    [
        ("black", lambda x: x * torch.nan),
        ("black", lambda x: x * 0 - 1),
        ("only noise", lambda x: torch.randn(x.shape, generator=stream(0, 0)).clamp(-1, 1)),
        ("grey", lambda x: 0.5 * x - 0.15),
        ("tinted", lambda x: x + torch.tensor([0.2, 0, 0]).view(3, 1, 1)),
        ("all alike", lambda x: x[:1].expand(16, -1, -1, -1)),
        ("burnt", lambda x: (4000 * (x + 0.5)).clamp(-1, 1)),
    ],
)
def test_symptoms(name, change, x0):
    shades = 0.2 * torch.randn(len(x0), 3, 1, 1, generator=stream(0, 1))
    colour = 0.7 * (x0 + shades)  # nothing at the limits
    samples, data = colour[:64], colour[64:]
    assert symptoms(samples, data) == []
    assert symptoms(change(samples), data) == [name]


def test_samples_of_an_untrained_network(x0):
    torch.manual_seed(0)
    new = UNet(ModelConfig(4, (1, 2), (), 8, channels=1))
    samples = sample(new, CosineNoiseScheduler(1000), 16, steps=30, method="ddim")
    assert symptoms(samples, x0) == ["only noise"]


def test_samples_are_reported(sound, x0):
    found = diagnose(sound, samples=x0[:1].expand(16, -1, -1, -1))
    assert found.wrong == ["samples"] and "same noise" in says(found)


def test_what_is_not_known_is_said(tmp_path, sound, x0):
    run = short_run(tmp_path / "run", 5, data=x0)
    found = diagnose(run)
    assert found.wrong == [] and "not known" in says(found) and len(found) == 3
    assert diagnose(run, x0).wrong == ["loss"]
    bare = tmp_path / "bare"
    shutil.copytree(find_checkpoint(sound), bare)
    (bare / "training.safetensors").unlink()
    found = diagnose(bare)  # only what sampling needs
    assert found.wrong == [] and "average" not in [f.check for f in found]


def test_refusals(sound, network, x0, tmp_path):
    with pytest.raises(ValueError, match="scheduler: expected"):
        diagnose(network[0], x0)
    with pytest.raises(ValueError, match="data: expected pictures"):
        diagnose(sound, x0[0])
    with pytest.raises(ValueError, match="checkpoint: expected a run folder"):
        diagnose(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="name: expected"):
        diagnose(sound, "dgits")


def test_command(sound, tmp_path, monkeypatch, capsys):
    def status(*args):
        monkeypatch.setattr(sys, "argv", ["ddpm-diagnose", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main_diagnose()
        return stop.value.code, capsys.readouterr()

    code, said = status(sound, "--n", 32)
    assert code == 0 and "32 pictures" in said.out and not said.err
    linear = LinearNoiseScheduler(1000).config
    broken = edited(
        sound, tmp_path / "run", lambda config, tensors: config.update(scheduler=linear)
    )
    code, said = status(broken)
    assert code == 1 and said.out.splitlines()[-1] == "Look at: loss"
    code, said = status(tmp_path / "nowhere")
    assert code == 2 and len(said.err.splitlines()) == 1 and "Traceback" not in said.err


def test_landmark_is_the_loss_of_the_best_guess_for_independent_pixels():
    """For such pixels the guess that takes each by itself is exact: a network that makes it has just that loss."""
    g, scheduler = torch.Generator().manual_seed(0), CosineNoiseScheduler(1000)
    std = torch.tensor([0.1, 0.5, 1.0, 2.0]).view(1, 1, 2, 2)
    x = std * torch.randn(4000, 1, 2, 2, generator=g)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) * std

    def best(xt, t):
        a = scheduler.alpha_cumprod[t].view(-1, 1, 1, 1).float()
        return (1 - a).sqrt() * xt / (a * std**2 + 1 - a)

    want, got = dg.pixelwise_loss(scheduler, x), dg.loss_by_t(best, scheduler, x)
    assert_close(got, want, rtol=0.05, atol=1e-3)
    louder = dg.loss_by_t(lambda xt, t: 1.5 * best(xt, t), scheduler, x)
    assert (louder > want + 0.03).all()


def test_how_good_is_good_enough():
    simple = torch.linspace(0.8, 0.0, 10)
    assert not dg._check_loss(0.7 * simple + 0.03, simple).wrong
    assert not dg._check_loss(1.05 * simple + 0.03, simple).wrong
    short = 0.7 * simple
    short[6] = 1.15 * simple[6] + 0.06
    found = dg._check_loss(short, simple)
    assert found.wrong and "in part 7 of 1..T: train for longer" in found.text
    short[2] = 1.2
    found = dg._check_loss(short, simple)
    assert found.wrong and "in part 3 of 1..T: the network answers another question" in found.text


@pytest.mark.parametrize("num_timesteps", [1000, 200, 25, 7])
def test_buckets_are_those_of_the_log(num_timesteps):
    log, t = train.LossLog(num_timesteps), torch.arange(1, num_timesteps + 1)
    log.add(t, t.float())
    means = [m for m in log.means()["loss_by_t"] if m is not None]
    assert means == pytest.approx(
        [float(part.double().mean()) for part in dg._t_buckets(num_timesteps)]
    )


@pytest.mark.parametrize("cap, steps", [(0.9999, 300), (0.9, 300), (0.0, 10)])
def test_average_age(cap, steps):
    """The mean age of the average's weights, from the average of 1, 2, 3, ... that `EMA` itself makes."""
    net = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    net.weight.data.zero_()
    ema = train.EMA(net, cap)
    for k in range(1, steps + 1):
        net.weight.data.fill_(k)
        ema.update(net, k)
    assert dg._average_age(cap, steps) == pytest.approx(steps - float(ema.model.weight), abs=1e-6)


def test_memory_is_counted_before_it_is_used():
    config = ModelConfig(8, (1, 2), (0,), 8, channels=1)

    def count(batch, device):
        with torch.device(device):
            model = UNet(config)
            x, t = torch.zeros(batch, 1, 16, 16), torch.ones(batch, dtype=torch.int64)
            return dg.saved_bytes(model, x, t)

    assert count(4, "cpu") == count(4, "meta")
    assert count(16, "meta") == pytest.approx(4 * count(4, "meta"), rel=0.02)
    plain = ModelConfig.from_dict({**config.to_dict(), "transformer_layers": []})
    with torch.device("meta"):
        x, t = torch.zeros(4, 1, 16, 16), torch.ones(4, dtype=torch.int64)
        more = dg.saved_bytes(UNet(config), x, t) - dg.saved_bytes(UNet(plain), x, t)
    assert more > 5 * 4 * (16 * 16) ** 2 * 4  # five tables of 4 pictures in float32


def test_memory_is_that_of_the_inputs_of_the_layers():
    class Two(torch.nn.Sequential):
        def forward(self, x, t):
            return super().forward(x)

    x = torch.zeros(1000, 8)[:4]
    two = Two(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    assert dg.saved_bytes(two, x, None) == 2 * 4 * 8 * 4  # neither the weights nor the other rows


def test_config_of_the_page_is_plain_json(sound):
    """What `diagnose` reads of a checkpoint is there under these names."""
    config = json.loads((find_checkpoint(sound) / "config.json").read_text())
    assert {"step", "data", "training"} <= config.keys() and "ema_decay" in config["training"]


def test_one_flat_colour_is_grey_and_not_noise():
    data = torch.randn(64, 1, 8, 8).cumsum(-1).clamp(-1, 1)
    assert symptoms(torch.zeros(16, 1, 8, 8), data) == ["grey"]
    assert symptoms(torch.ones(16, 1, 8, 8), data) == ["grey"]

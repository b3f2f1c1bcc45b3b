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
from ddpm_nb.objective import PREDICTIONS, Denoiser, prediction_target
from ddpm_nb.runs import find_checkpoint, load_denoiser, read_checkpoint, save_checkpoint
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
def denoiser(sound):
    return load_denoiser(sound)


RUNS = {
    "noise": {},
    "x0": dict(prediction="x0"),
    "v": dict(prediction="v"),
    "v, zero SNR at T": dict(prediction="v", zero_terminal_snr=True),
}


@pytest.fixture(scope="module")
def runs(sound, tmp_path_factory):
    """A sound run for each question that a network can be asked."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: short_run(folder / name, **fields) if fields else sound
        for name, fields in RUNS.items()
    }


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


@pytest.mark.parametrize("name", RUNS)
def test_a_sound_run_is_not_accused(name, runs, x0):
    run = runs[name]
    found = diagnose(run)
    assert found.wrong == [] and [f.check for f in found] == CHECKS
    assert "Nothing wrong was found." in str(found)
    assert diagnose(find_checkpoint(run)).wrong == []
    denoiser = load_denoiser(run)
    assert denoiser.prediction == RUNS[name].get("prediction", "noise")
    samples = sample(denoiser, 16, steps=30, method="ddim", spacing="uniform")
    assert diagnose(run, samples=samples).wrong == []
    assert diagnose(denoiser, x0).wrong == []
    assert diagnose(denoiser, load_data("digits")).wrong == []


def test_a_function_is_one_that_answers_with_x0(denoiser, x0):
    found = diagnose(lambda xt, t: denoiser(xt, t), x0, denoiser.scheduler)
    assert [f.check for f in found if f.check != "average"] == [c for c in CHECKS if c != "average"]
    exact = dict.fromkeys(["data", "schedule", "weights", "clipping"], False)
    assert exact.items() <= {f.check: f.wrong for f in found}.items()


def test_modes_are_put_back(sound, x0):
    training = load_denoiser(sound).train()
    assert diagnose(training, x0).wrong == [] and all(m.training for m in training.modules())


def test_average_without_warm_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train.EMA, "decay", lambda self, step: self.max_decay)
    found = diagnose(short_run(tmp_path / "run"))
    assert found.wrong == ["average"] and "warm-up" in says(found)


def test_too_little_training(tmp_path):
    found = diagnose(short_run(tmp_path / "run", 5))
    assert found.wrong == ["loss"] and "train for longer" in says(found)


def test_unscaled_betas(tmp_path, monkeypatch):
    def unscaled(num_timesteps, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False):
        return LinearNoiseScheduler(num_timesteps, beta_start, beta_end, zero_terminal_snr)

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


def test_half_precision(sound, x0, tmp_path):
    def halve(part):
        return lambda config, tensors: tensors.update(
            {part: {k: v.bfloat16() for k, v in tensors[part].items()}}
        )

    assert diagnose(edited(sound, tmp_path / "raw", halve("training"))).wrong == ["weights"]
    assert (
        diagnose(edited(sound, tmp_path / "small", halve("model"))).wrong == []
    )  # for sampling: fine
    assert diagnose(load_denoiser(sound).bfloat16(), x0).wrong == ["weights"]


@pytest.mark.parametrize("asked", PREDICTIONS)
@pytest.mark.parametrize("answers", PREDICTIONS)
def test_a_network_that_answers_another_question(answers, asked, runs, x0, tmp_path):
    """Each of the six ways to mix up three questions is found, with the answer's name; in a checkpoint too."""
    net, scheduler = load_denoiser(runs[answers]).net, CosineNoiseScheduler(1000)
    found = diagnose(Denoiser(net, scheduler, asked), x0, n=32)
    rename = lambda config, tensors: config.update(prediction=asked)  # noqa: E731
    read = diagnose(edited(runs[answers], tmp_path / "run", rename), n=32)
    if answers == asked:
        assert found.wrong == read.wrong == []
    else:
        assert found.wrong == read.wrong == ["loss"]
        for text in (says(found), says(read)):
            assert f"answers with {answers}, which is not what it is asked for" in text


def test_a_network_is_no_denoiser(denoiser, x0):
    """The bare network of a run that predicts the noise, given where a guess of x0 is expected."""
    found = diagnose(denoiser.net, x0, denoiser.scheduler)
    assert found.wrong == ["loss"] and "answers with noise" in says(found)


def test_a_guess_that_is_given_for_the_noise(denoiser, x0):
    answers_x0 = lambda xt, t: denoiser(xt, t).clamp(-1, 1)  # noqa: E731
    found = diagnose(Denoiser(answers_x0, denoiser.scheduler), x0)
    assert found.wrong == ["loss"] and "answers with x0" in says(found)


def test_v_of_the_other_sign(runs, x0):
    """It is no other question's answer: the loss says that something else is wrong."""
    v = load_denoiser(runs["v"])
    found = diagnose(Denoiser(lambda xt, t: -v.net(xt, t), v.scheduler, "v"), x0)
    assert found.wrong == ["loss"] and "Worse than the answer 0" in says(found)


@pytest.mark.parametrize("name", RUNS)
def test_a_new_network_has_the_loss_of_the_answer_0(name, runs, x0):
    """To one hundredth, on all the pictures; and training has led away from it."""
    sound = load_denoiser(runs[name])
    new = Denoiser(UNet(sound.net.config), sound.scheduler, sound.prediction)
    zero = dg._zero_loss(sound.scheduler, x0[:300], sound.prediction)
    loss = dg.loss_by_t(new, x0[:300])
    assert_close(loss, zero, rtol=0.05, atol=0)
    assert loss.mean() == pytest.approx(float(zero.mean()), rel=0.01)
    assert dg._check_loss(loss, *dg._landmarks(new, x0[:300])).wrong
    assert abs(dg._progress(loss, dg._landmarks(new, x0[:300]))) < 0.03


def test_another_schedule_than_it_was_trained_for(sound, tmp_path):
    linear = LinearNoiseScheduler(1000).config
    run = edited(sound, tmp_path / "run", lambda config, tensors: config.update(scheduler=linear))
    assert diagnose(run).wrong == ["loss"]


def test_samples_drawn_without_clipping(sound, denoiser, runs):
    how = dict(steps=30, method="ddim", spacing="uniform", clip=False)
    found = diagnose(sound, samples=sample(denoiser, 16, **how))
    assert found.wrong == ["clipping"] and "without it" in says(found)
    assert "100% of the first guess" in says(found) and "keep clip=True" in says(found)
    samples = sample(load_denoiser(runs["v"]), 16, **how)  # nothing was divided by
    found = diagnose(runs["v"], samples=samples)
    assert found.wrong == [] and "keep clip=True" not in says(found)


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
    new = Denoiser(UNet(ModelConfig(4, (1, 2), (), 8, channels=1)), CosineNoiseScheduler(1000))
    samples = sample(new, 16, steps=30, method="ddim", spacing="uniform")
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


def test_refusals(sound, denoiser, x0, tmp_path):
    with pytest.raises(ValueError, match="scheduler: expected one, .*; got None"):
        diagnose(denoiser.net, x0)
    for knows in (denoiser, sound):
        with pytest.raises(ValueError, match="scheduler: expected none, .*; got CosineNoise"):
            diagnose(knows, x0, denoiser.scheduler)
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


SCHEDULERS = {"cosine": CosineNoiseScheduler(1000)}
SCHEDULERS["zero SNR at T"] = CosineNoiseScheduler(1000, zero_terminal_snr=True)


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_landmark_is_the_loss_of_the_best_guess_for_independent_pixels(prediction, schedule):
    """For such pixels the guess that takes each by itself is exact: a network that makes it has just that loss."""
    g, scheduler = torch.Generator().manual_seed(0), SCHEDULERS[schedule]
    if prediction == "noise" and scheduler.zero_terminal_snr:
        pytest.skip("no such Denoiser")
    std = torch.tensor([0.1, 0.5, 1.0, 2.0]).view(1, 1, 2, 2)
    x = std * torch.randn(4000, 1, 2, 2, generator=g)
    x = (x - x.mean(0)) / x.std(0, unbiased=False) * std

    def best(xt, t):
        """The guess of x0, and what it is in the noise and in v."""
        a = scheduler.alpha_cumprod[t].view(-1, 1, 1, 1)
        guess = a.sqrt() * std**2 * xt / (a * std**2 + 1 - a)
        noise = (xt - a.sqrt() * guess) / (1 - a).sqrt()
        return dict(noise=noise, x0=guess, v=a.sqrt() * noise - (1 - a).sqrt() * guess)[prediction]

    want = dg._pixelwise_loss(scheduler, x, prediction)
    got = dg.loss_by_t(Denoiser(best, scheduler, prediction), x)
    assert_close(got, want, rtol=0.05, atol=1e-3)
    louder = lambda xt, t: 1.5 * best(xt, t)  # noqa: E731
    louder = dg.loss_by_t(Denoiser(louder, scheduler, prediction), x)
    zero = dg._zero_loss(scheduler, x, prediction)  # what is left is orthogonal to the best guess:
    assert_close(louder, want + 0.5**2 * (zero - want), rtol=0.05, atol=1e-3)
    assert prediction != "noise" or (louder > want + 0.03).all()


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_of_the_answer_0_is_the_mean_square_of_the_target(prediction, schedule, x0):
    """Against targets that are drawn, for every t of a part."""
    scheduler, g = SCHEDULERS[schedule], torch.Generator().manual_seed(0)
    zero = dg._zero_loss(scheduler, x0, prediction)
    assert zero.shape == (10,) and zero.dtype == torch.float64
    for k in (0, 4, 9):
        t = dg._t_buckets(1000)[k].repeat(15)  # each step once for 15 of the 1500 pictures
        pictures = x0[torch.randperm(1500, generator=g)]
        noise = torch.randn(x0.shape, generator=g)
        target = prediction_target(scheduler, pictures, noise, t, prediction)
        assert float(target.square().mean()) == pytest.approx(float(zero[k]), rel=0.02)


@pytest.mark.parametrize("size", [1.0, 0.4])
def test_how_good_is_good_enough(size):
    """The limits go with what the answer 0 has, which is another number for x0 and for v."""
    zero, simple = torch.full((10,), size), size * torch.linspace(0.8, 0.0, 10)
    assert not dg._check_loss(0.7 * simple + 0.03 * size, zero, simple).wrong
    assert not dg._check_loss(1.05 * simple + 0.03 * size, zero, simple).wrong
    short = 0.7 * simple
    short[6] = 1.15 * simple[6] + 0.06 * size
    found = dg._check_loss(short, zero, simple)
    assert found.wrong and "in part 7 of 1..T: train for longer" in found.text
    short[2] = 1.2 * size
    found = dg._check_loss(short, zero, simple)
    assert found.wrong and "Worse than the answer 0 in part 3 of 1..T" in found.text
    assert "another schedule or other pictures, or answers another question" in found.text
    found = dg._check_loss(short, zero, simple, "v")
    assert found.wrong and "answers with v, which is not what it is asked for" in found.text


@pytest.mark.parametrize("size", [1.0, 0.4])
def test_when_an_average_is_behind(size):
    marks = [torch.full((10,), size), torch.full((10,), 0.5 * size)]

    def wrong(averaged, raw):
        losses = (torch.full((10,), size * (1 - v / 2)) for v in (averaged, raw))
        return dg._check_average(*losses, marks, 10.0, 100).wrong

    assert not wrong(0.9, 0.9) and not wrong(0.82, 0.9) and not wrong(1.1, 0.9)
    assert wrong(0.8, 0.9) and wrong(0.0, 0.9) and wrong(0.0, 0.76)
    assert not wrong(0.0, 0.7)  # too early to tell


def test_what_is_drawn_has_streams_of_its_own(denoiser, x0, monkeypatch):
    """Another picture, the pictures' noise and the clipping's are no stream of samples or of training."""
    seen = []

    def noted(seed, index, purpose="sample"):
        seen.append((seed, index, purpose))
        return stream(seed, index, purpose)

    monkeypatch.setattr(dg, "stream", noted)
    before = torch.get_rng_state()
    diagnose(denoiser, x0)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(seen) == {(0, k, "diagnose") for k in range(3)}
    assert_close(dg.loss_by_t(denoiser, x0[:32]), dg.loss_by_t(denoiser, x0[:32]), rtol=0, atol=0)
    assert (dg.loss_by_t(denoiser, x0[:32]) != dg.loss_by_t(denoiser, x0[:32], 1)).all()


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
        ema.update(k)
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
    assert {"step", "data", "training", "prediction"} <= config.keys() and "ema_decay" in config[
        "training"
    ]


def test_one_flat_colour_is_grey_and_not_noise():
    data = torch.randn(64, 1, 8, 8).cumsum(-1).clamp(-1, 1)
    assert symptoms(torch.zeros(16, 1, 8, 8), data) == ["grey"]
    assert symptoms(torch.ones(16, 1, 8, 8), data) == ["grey"]

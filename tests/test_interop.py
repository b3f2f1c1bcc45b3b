"""The bridge, with diffusers as the oracle: networks, schedules, whole chains, commands; and scipy for the formulas.

Configs of published networks are written out, nothing is downloaded.
"""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from networks import unlabelled
from safetensors.torch import save_file
from scipy import stats

diffusers = pytest.importorskip(
    "diffusers", reason="the oracle of these tests: pip install '.[dev,interop]'"
)
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

from ddpm_nb import cli  # noqa: E402
from ddpm_nb.data import load_data, to_model_range  # noqa: E402
from ddpm_nb.diagnose import diagnose  # noqa: E402
from ddpm_nb.interop import (  # noqa: E402
    _PREDICTION_TYPES,
    _model_config,
    _to_our_weights,
    _to_their_weights,
    _unet_fields,
    export_checkpoint,
    from_diffusers,
    import_pipeline,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
    to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ddpm_nb.likelihood import GaussianDenoiser, decoder_term, denoising_term  # noqa: E402
from ddpm_nb.objective import Denoiser, noise_from_x0, training_loss  # noqa: E402
from ddpm_nb.runs import load_denoiser  # noqa: E402
from ddpm_nb.sample import ancestral_sample, ddim_sample, sample, timestep_walk  # noqa: E402
from ddpm_nb.scheduler import (  # noqa: E402
    CosineNoiseScheduler,
    LinearNoiseScheduler,
    NoiseScheduler,
    SigmoidNoiseScheduler,
    randn_like,
    rescale_zero_terminal_snr,
    stream,
)
from ddpm_nb.unet import PRESETS, ModelConfig, UNet  # noqa: E402

HO = dict(
    attention_head_dim=None,
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
)
SIX_LEVELS = dict(
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=4 * ("DownBlock2D",) + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + 4 * ("UpBlock2D",),
)
NAMED = {
    "google/ddpm-cifar10-32": dict(
        HO,
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    # celebahq, cat and church are one architecture
    "google/ddpm-*-256": dict(HO, sample_size=256, **SIX_LEVELS),
    "training example": dict(sample_size=64, **SIX_LEVELS),
    "one head of 8 channels in four": dict(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        norm_num_groups=8,
        in_channels=1,
        out_channels=1,
    ),
}
SCHEDULES = dict(linear=LinearNoiseScheduler(), squaredcos_cap_v2=CosineNoiseScheduler())
TO_ZERO = dict(
    linear=LinearNoiseScheduler(zero_terminal_snr=True),
    squaredcos_cap_v2=CosineNoiseScheduler(zero_terminal_snr=True),
)
ALONG = dict(method="ancestral", spacing="uniform")


def awaken(net, std=0.1):
    "Every parameter random, so that a test sees all of them."
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return net.eval()


def apart(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def check_agreement(ours, unet, size, dtype):
    "Answers, and the gradient of the loss in every parameter."
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    ours, unet, scheduler = ours.to(dtype), unet.to(dtype), SCHEDULES["linear"]
    torch.manual_seed(0)
    x0, noise = (torch.randn(2, ours.config.channels, *size, dtype=dtype) for _ in range(2))
    t = torch.tensor([1, 777])
    nets = ours, lambda x, t: unet(x, t - 1).sample
    with torch.no_grad():
        a, b = (net(x0, t) for net in nets)
    assert apart(a, b) < tolerance and b.std() > 1e-3
    unet.zero_grad()
    for net in nets:
        training_loss(Denoiser(net, scheduler), x0, t, noise).mean().backward()
    mapped = _to_their_weights({k: p.grad for k, p in ours.named_parameters()})
    theirs = {k: p.grad for k, p in unet.named_parameters()}
    assert mapped.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert max(float((mapped[k] - theirs[k]).abs().max()) for k in theirs) < tolerance * largest


SIZES = dict(digits=(8, 12), fashion_mnist=(28, 28), cifar10=(16, 16), ffhq128=(16, 16))
DIFFERENT = [k for i, k in enumerate(PRESETS) if PRESETS[k] not in list(PRESETS.values())[:i]]


@pytest.mark.parametrize("name", DIFFERENT)
def test_presets_go_out(name):
    config = replace(ModelConfig.preset(name), dropout=0.0)
    for dtype in (torch.float32, torch.float64):
        ours = awaken(UNet(config).to(dtype))
        unet = unet_to_diffusers(ours)
        again = unet_from_diffusers(unet).state_dict()
        assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())
        del again
        check_agreement(ours, unet, SIZES[name], dtype)


@pytest.mark.parametrize("name", NAMED)
def test_named_networks_come_in(name):
    factor = 2 ** (len(NAMED[name]["block_out_channels"]) - 1)
    unet = awaken(UNet2DModel(**NAMED[name]), 0.05)
    ours = unet_from_diffusers(unet)
    again = unet_to_diffusers(ours)
    assert _unet_fields(ours.config) == _unet_fields(_model_config(dict(again.config)))
    back = again.state_dict()
    assert all(torch.equal(v, back[k]) for k, v in unet.state_dict().items())
    del again, back
    check_agreement(ours, unet, (factor, 2 * factor), torch.float32)
    if sum(p.numel() for p in unet.parameters()) < 5e7:
        check_agreement(unet_from_diffusers(unet), unet, (factor, 2 * factor), torch.float64)


@pytest.mark.parametrize("name", NAMED)
def test_the_map_is_one_to_one(name):
    with torch.device("meta"):  # shapes without numbers
        ours, theirs = UNet(_model_config(NAMED[name])), UNet2DModel(**NAMED[name])
    there = _to_their_weights(ours.state_dict())
    assert {k: v.shape for k, v in there.items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    rows, count = {}, 0  # every row of every tensor gets a number, and each must arrive once
    for k, v in ours.state_dict().items():
        rows[k] = torch.arange(count, count + len(v)).view(-1, *[1] * (v.ndim - 1))
        count += len(v)
    there = _to_their_weights(rows)
    seen = torch.cat([v.flatten() for v in there.values()])
    assert torch.equal(seen.sort().values, torch.arange(count))
    back = _to_our_weights(there, rows)
    assert all(torch.equal(back[k], v) for k, v in rows.items())


def test_every_field_of_a_config_goes_out_and_comes_back():
    base = dict(
        lowest_resolution_size=2,
        dim_multiply=(1, 2),
        transformer_layers=(0,),
        base_dim=32,
        channels=2,
    )
    choices = dict(
        transformer_layers=[(), (1,), (0, 1)],
        attention_head_dim=[None, 8, 32],
        norm_num_groups=[None, 1, 32],
        norm_eps=[1e-6, 1e-3],
        downsample_padding=[0, 1],
        flip_sin_to_cos=[False, True],
        freq_shift=[0, 1],
        dropout=[0.0, 0.2],
    )
    for name, values in choices.items():
        for value in values:
            config = ModelConfig(**{**base, name: value})
            ours = awaken(UNet(config).double(), 0.2)
            unet = unet_to_diffusers(ours)
            assert unet_from_diffusers(unet).config == config
            x, t = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([1, 500])
            with torch.no_grad():
                assert apart(ours(x, t), unet(x, t - 1).sample) < 1e-12, (name, value)


def digits():
    data = load_data("digits")
    return to_model_range(data.pictures, data.num_levels).double()


def answering(exact, s, prediction):
    "A network that knows what the exact denoiser does, and says it as `prediction`."

    def net(x, t):
        x0, (signal, sigma) = exact(x, t), s.signal_noise(t, x)
        if prediction == "noise":
            return noise_from_x0(s, x, x0, t)
        return x0 if prediction == "x0" else (signal * x - x0) / sigma

    return net


def noise_of_their_walk():
    return partial(randn_like, generator=torch.Generator().manual_seed(1))


def with_our_table(theirs, s):
    theirs.alphas_cumprod = s.alpha_cumprod[1:].clone()
    theirs.one = theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return theirs


@torch.no_grad()
def their_walk(net, theirs, x, **kwargs):
    generator = torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        answer = net(x, torch.full((len(x),), int(t) + 1))
        x = theirs.step(answer, t, x, generator=generator, **kwargs).prev_sample
    return x


START = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CASES = [(name, s) for schedules in (SCHEDULES, TO_ZERO) for name, s in schedules.items()]
WHICH = [f"{name}{' to 0' * s.zero_terminal_snr}" for name, s in CASES]


def predictions(s):
    return [p for p in _PREDICTION_TYPES if p != "noise" or not s.zero_terminal_snr]


def their_fields(name, s, prediction, clip):
    return dict(
        beta_schedule=name,
        rescale_betas_zero_snr=s.zero_terminal_snr,
        prediction_type=_PREDICTION_TYPES[prediction],
        clip_sample=clip,
        timestep_spacing="trailing",
    )


def as_it_comes(theirs, s):
    return theirs


@pytest.mark.parametrize("name, s", CASES, ids=WHICH)
def test_chains_of_1000_steps(name, s):
    exact = GaussianDenoiser(digits(), s)
    for variance, clip, prediction in itertools.product(
        (("fixed_small", "beta_tilde"), ("fixed_large", "beta")), (True, False), predictions(s)
    ):
        net = answering(exact, s, prediction)
        ours = ancestral_sample(
            Denoiser(net, s, prediction),
            s,
            START,
            timestep_walk(s),
            noise_of_their_walk(),
            variance=variance[1],
            clip=clip,
        )
        makes = [(with_our_table, 1e-10)]
        if prediction == predictions(s)[0]:
            makes += [(as_it_comes, 1e-3)]
        for make, tolerance in makes:
            theirs = DDPMScheduler(
                **their_fields(name, s, prediction, clip), variance_type=variance[0]
            )
            off = (their_walk(net, make(theirs, s), START) - ours).abs().max()
            assert off < tolerance, (variance, clip, prediction, float(off))


def first_root(theirs):
    "What their first step with eta = 1 takes the root of: from no signal 0, but for rounding."
    t = theirs.timesteps[0]
    before = t - 1000 // theirs.num_inference_steps
    abar = theirs.alphas_cumprod[before] if before >= 0 else theirs.final_alpha_cumprod
    return 1 - abar - (theirs._get_variance(t, before) ** 0.5) ** 2


@pytest.mark.parametrize("name, s", CASES, ids=WHICH)
def test_ddim_where_the_steps_divide(name, s):
    exact = GaussianDenoiser(digits(), s)
    for eta, steps, clip, prediction in itertools.product(
        (0.0, 1.0), (1, 10, 125), (True, False), predictions(s)
    ):
        net = answering(exact, s, prediction)
        ours = ddim_sample(
            Denoiser(net, s, prediction),
            s,
            START,
            timestep_walk(s, steps),
            noise_of_their_walk(),
            eta=eta,
            clip=clip,
        )
        # from cosine noise of abar_T = 2e-9, float32 x0 is a difference of numbers 20,000 times its size
        lost = name != "linear" and prediction == "noise" and steps == 1 and not clip
        for make, tolerance in ((as_it_comes, 1.0 if lost else 1e-3), (with_our_table, 1e-10)):
            theirs = DDIMScheduler(**their_fields(name, s, prediction, clip))
            theirs.set_timesteps(steps)
            x = their_walk(net, make(theirs, s), START, eta=eta, use_clipped_model_output=True)
            if eta and s.zero_terminal_snr and first_root(theirs) < 0:
                assert x.isnan().all() and ours.isfinite().all()
                continue
            off = (x - ours).abs().max()
            assert off < tolerance, (eta, steps, clip, prediction, float(off))


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("name", TO_ZERO)
def test_fifty_steps_from_no_signal_as_they_come(name, prediction):
    "DDIM and ancestral, with their own tables in float32."
    s = TO_ZERO[name]
    net = answering(GaussianDenoiser(digits(), s), s, prediction)
    ours, walk = Denoiser(net, s, prediction), timestep_walk(s, 50)
    bound = dict(v=1e-5, x0=2e-5)[prediction]  # unclipped pixels reach 1.7, their tables 7 digits
    for clip in (True, False):
        fields = their_fields(name, s, prediction, clip)
        for eta in (0.0, 1.0):
            x = ddim_sample(ours, s, START, walk, noise_of_their_walk(), eta=eta, clip=clip)
            theirs = DDIMScheduler(**fields)
            theirs.set_timesteps(50)
            y = their_walk(net, theirs, START, eta=eta, use_clipped_model_output=True)
            assert (x - y).abs().max() < bound, (eta, clip)
        x = ancestral_sample(ours, s, START, walk, noise_of_their_walk(), clip=clip)
        theirs = DDPMScheduler(**fields)
        theirs.set_timesteps(50)
        y = their_walk(net, theirs, START)
        assert (x - y).abs().max() < bound and y.std() > 0.1, clip


def test_schedules_that_end_without_signal():
    "By name and flag where diffusers has them, as betas otherwise; tables to rounding, both ways."
    for name, s in TO_ZERO.items():
        theirs = scheduler_to_diffusers(s, prediction="v")
        c = theirs.config
        assert (c.beta_schedule, c.rescale_betas_zero_snr, c.trained_betas) == (name, True, None)
        assert float(theirs.alphas_cumprod[-1]) == 0
        table, ours = theirs.alphas_cumprod.double(), s.alpha_cumprod[1:]
        assert torch.allclose(table, ours, rtol=2e-5, atol=0)
        assert torch.allclose(table.sqrt(), ours.sqrt(), rtol=0, atol=1e-6)
        for kind in (DDPMScheduler, DDIMScheduler):
            again, _ = scheduler_from_diffusers(kind.from_config(c))
            assert again.config == s.config and torch.equal(again.beta, s.beta)
    for s in (
        SigmoidNoiseScheduler(zero_terminal_snr=True),
        CosineNoiseScheduler(100, s=0.02, zero_terminal_snr=True),
        NoiseScheduler([0.1, 0.2, 1.0]),
        NoiseScheduler([1.0]),
    ):
        theirs = scheduler_to_diffusers(s, prediction="x0")
        assert not theirs.config.rescale_betas_zero_snr and len(theirs.config.trained_betas)
        assert torch.equal(scheduler_from_diffusers(theirs)[0].beta, s.beta)
    betas = np.linspace(0.01, 0.2, 50) ** 2
    for fields, plain in [
        (dict(num_train_timesteps=50, trained_betas=betas), betas),
        (
            dict(beta_schedule="scaled_linear"),
            DDPMScheduler(beta_schedule="scaled_linear").betas.double(),
        ),
    ]:
        theirs = DDPMScheduler(**fields, rescale_betas_zero_snr=True, prediction_type="sample")
        s, _ = scheduler_from_diffusers(theirs)
        assert s.zero_terminal_snr
        assert torch.equal(s.beta[1:], rescale_zero_terminal_snr(torch.as_tensor(plain)))
        assert torch.allclose(
            s.alpha_cumprod[1:], theirs.alphas_cumprod.double(), rtol=2e-5, atol=0
        )


def test_no_noise_prediction_where_no_signal_is_left():
    for theirs in (
        DDPMScheduler(rescale_betas_zero_snr=True),
        DDIMScheduler(rescale_betas_zero_snr=True),
        DDPMScheduler(2, trained_betas=[0.5, 1.0]),
    ):
        with pytest.raises(
            ValueError, match="prediction_type: expected sample, v_prediction; got 'epsilon'"
        ):
            scheduler_from_diffusers(theirs)
    with pytest.raises(ValueError, match="prediction: expected x0 or v, since .*; got 'noise'"):
        scheduler_to_diffusers(TO_ZERO["linear"])


def pipeline_pictures(pipeline, n, steps):
    pipeline.set_progress_bar_config(disable=True)
    streams = [stream(0, i) for i in range(n)]
    return 2 * pipeline(n, streams, steps, output_type="pt").images - 1


IN_A_FRESH_PROCESS = """
import sys, torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained(sys.argv[1])
noise = [torch.Generator().manual_seed(int(s)) for s in sys.argv[3:]]
torch.save(pipeline(len(noise), noise, num_inference_steps=int(sys.argv[2]), output_type="pt").images, "x.pt")
pipeline(2, num_inference_steps=2).images[1].save("x.png")
assert not [m for m in sys.modules if m.startswith("ddpm_nb")]
"""


def test_a_trained_network_draws_the_same_pictures_in_diffusers(tmp_path, run, tiny):
    "Trained here, exported by the command, sampled by diffusers alone, and brought back."
    short = ["--max-steps", 200, "--timesteps-diff", 250]
    run("ddpm-train", "digits", *tiny, *short, "--out-dir", tmp_path / "run")
    done = run("ddpm-export", tmp_path / "run", tmp_path / "pipeline", "--variance", "beta")
    assert "DDPMPipeline.from_pretrained" in done.stdout
    config = json.loads((tmp_path / "pipeline/scheduler/scheduler_config.json").read_text())
    assert config["beta_schedule"] == "squaredcos_cap_v2" and config["trained_betas"] is None
    assert config["variance_type"] == "fixed_large" and config["timestep_spacing"] == "linspace"
    seeds = [stream(0, i).initial_seed() for i in range(4)]
    run("python", "-c", IN_A_FRESH_PROCESS, tmp_path / "pipeline", 250, *seeds, cwd=tmp_path)
    theirs = 2 * torch.load(tmp_path / "x.pt") - 1
    denoiser = load_denoiser(tmp_path / "run")
    model, scheduler = denoiser.net, denoiser.scheduler
    ours = sample(denoiser, 4, steps=250, **ALONG, variance="beta")
    assert (ours - theirs).abs().max() * 127.5 < 1 and ours.std() > 0.1
    assert (tmp_path / "x.png").stat().st_size > 50
    done = run("ddpm-import", tmp_path / "pipeline", tmp_path / "back", "--data", "digits")
    assert "--variance beta" in done.stdout
    back = load_denoiser(tmp_path / "back")
    assert back.scheduler.config == scheduler.config and back.net.config == model.config
    kept = json.loads((tmp_path / "back/step-0000000/config.json").read_text())
    assert kept["data"]["name"] == "digits"
    assert kept["prediction"] == back.prediction == "noise"
    back = back.net.state_dict()
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())
    assert not diagnose(str(tmp_path / "back")).wrong  # an import is a checkpoint like any other


@pytest.mark.parametrize("name", ["digits", "fashion_mnist_plain"])
def test_shipped_weights_draw_the_same_pictures(name):
    denoiser = unlabelled(name)
    ours = sample(denoiser, 2, steps=20, **ALONG)
    theirs = pipeline_pictures(DDPMPipeline(*to_diffusers(denoiser)), 2, 20)
    assert (ours - theirs).abs().max() * 127.5 < 1


@pytest.mark.parametrize("steps", [7, 20, 61])
def test_large_variance_ends_without_noise(steps):
    "fixed_large with a spacing that does not end at 0 would put noise on the pictures."
    denoiser = unlabelled("digits")
    pipeline = DDPMPipeline(*to_diffusers(denoiser, "beta"))
    theirs = pipeline_pictures(pipeline, 2, steps)
    walk = [t + 1 for t in pipeline.scheduler.timesteps.tolist()] + [0]
    assert walk[0] == 1000 and len(walk) == steps + 1
    streams = [stream(0, i) for i in range(2)]
    x = torch.stack([torch.randn(1, 8, 8, generator=g) for g in streams])
    noise = partial(randn_like, generator=streams)
    ours = ancestral_sample(denoiser, denoiser.scheduler, x, walk, noise, variance="beta")
    assert (ours - theirs).abs().max() * 127.5 < 1


def test_modes_dtypes_and_ddim():
    ours = UNet(ModelConfig(2, (1, 2), (0,), 32, channels=2, dropout=0.2))
    for training, dtype in itertools.product((True, False), (torch.float64, torch.bfloat16)):
        unet = unet_to_diffusers(ours.train(training).to(dtype))
        assert unet.training == training and unet.dtype == dtype
        again = unet_from_diffusers(unet)
        assert again.training == training and again.stem.weight.dtype == dtype
        assert all(p.dtype == dtype for p in again.parameters())
    came, _ = from_diffusers(DDPMPipeline(unet, DDPMScheduler()))
    assert came.net.stem.weight.dtype == torch.float32
    assert not any(m.training for m in came.modules())
    denoiser = unlabelled("digits")
    kind = dict(prediction_type=_PREDICTION_TYPES[denoiser.prediction])
    ddim = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **kind)
    again, how = from_diffusers(DDPMPipeline(unet_to_diffusers(denoiser.net), ddim))
    assert how == dict(method="ddim", spacing="uniform", clip=True)
    assert again.scheduler.config == denoiser.scheduler.config
    x = sample(again, 2, steps=5, **how)
    y = sample(denoiser, 2, steps=5, method="ddim", spacing="uniform")
    assert (x - y).abs().max() < 1e-4
    logs = DDPMScheduler(variance_type="fixed_small_log")
    assert from_diffusers(DDPMPipeline(unet, logs))[1]["variance"] == "beta_tilde"


def test_the_order_of_memory_is_each_librarys_own():
    "channels_last here, as `load_denoiser` has it; contiguous there."
    there, _ = to_diffusers(unlabelled("digits"))
    assert all(p.is_contiguous() for p in there.parameters())
    for net in (
        unet_from_diffusers(there),
        from_diffusers(DDPMPipeline(there, DDPMScheduler()))[0].net,
    ):
        kernels = [p for p in net.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize("name, s", CASES[1:], ids=WHICH[1:])
def test_every_prediction_goes_both_ways(name, s, tmp_path):
    "As a pipeline, as its folder, as a checkpoint and out again: the same pictures everywhere."
    unet = awaken(UNet2DModel(**NAMED["one head of 8 channels in four"]), 0.2)
    for prediction in predictions(s):
        pipeline = DDPMPipeline(unet, DDPMScheduler(**their_fields(name, s, prediction, True)))
        pipeline.save_pretrained(tmp_path / prediction)
        theirs = pipeline_pictures(pipeline, 2, 10)
        assert theirs.std() > 0.1
        checkpoint, how = import_pipeline(tmp_path / prediction, tmp_path / f"{prediction}_run")
        assert how == dict(ALONG, variance="beta_tilde", clip=True)
        kept = json.loads((checkpoint / "config.json").read_text())
        assert kept["prediction"] == prediction and kept["scheduler"] == s.config
        came = [from_diffusers(x)[0] for x in (pipeline, str(tmp_path / prediction))]
        for denoiser in (*came, load_denoiser(checkpoint)):
            assert (denoiser.prediction, denoiser.scheduler.config) == (prediction, s.config)
            ours = sample(denoiser, 2, steps=10, **how)  # the config's size is known
            assert (ours - theirs).abs().max() * 127.5 < 0.1, prediction
        out = export_checkpoint(checkpoint, tmp_path / f"{prediction}_out")
        again = pipeline_pictures(DDPMPipeline.from_pretrained(out), 2, 10)
        assert torch.equal(again, theirs), prediction


def test_the_commands_carry_v(tmp_path, run):
    "A v-predicting pipeline without signal at T, imported and exported by the commands."
    unet = awaken(UNet2DModel(**NAMED["one head of 8 channels in four"]), 0.2)
    theirs = DDPMScheduler(**their_fields("linear", TO_ZERO["linear"], "v", True))
    DDPMPipeline(unet, theirs).save_pretrained(tmp_path / "v")
    run("ddpm-import", tmp_path / "v", tmp_path / "run", HF_HUB_OFFLINE="1")
    run("ddpm-export", tmp_path / "run", tmp_path / "again")
    said = json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text())
    assert said["prediction_type"] == "v_prediction" and said["rescale_betas_zero_snr"] is True
    before = pipeline_pictures(DDPMPipeline(unet, theirs), 2, 5)
    after = pipeline_pictures(DDPMPipeline.from_pretrained(tmp_path / "again"), 2, 5)
    assert torch.equal(before, after)


@pytest.mark.parametrize("T, steps", [(20, 20), (200, 50)])
def test_import_says_how_to_draw(T, steps, tmp_path, monkeypatch, capsys):
    "The steps it names exist, however short the schedule."
    unet = UNet2DModel(**NAMED["one head of 8 channels in four"])
    DDPMPipeline(unet, DDPMScheduler(T)).save_pretrained(tmp_path / "theirs")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    typed = ["ddpm-import", tmp_path / "theirs", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", [str(word) for word in typed])
    cli.main_import()
    assert f"--steps {steps} --method ancestral" in capsys.readouterr().out


def test_every_beta_of_theirs(tmp_path):
    for schedule in ("linear", "squaredcos_cap_v2", "scaled_linear", "sigmoid", "laplace"):
        theirs = DDPMScheduler(beta_schedule=schedule)
        pipeline = DDPMPipeline(UNet2DModel(**NAMED["one head of 8 channels in four"]), theirs)
        s = from_diffusers(pipeline)[0].scheduler
        assert torch.allclose(
            s.alpha_cumprod[1:], theirs.alphas_cumprod.double(), rtol=2e-5, atol=0
        )
        ours = dict(linear="linear", squaredcos_cap_v2="cosine").get(schedule, "custom")
        assert s.config["schedule"] == ours  # their sigmoid is another curve than ours
    betas = np.linspace(0.03, 0.2, 77) ** 2
    given = DDPMScheduler(77, trained_betas=betas)  # an array, as its documentation says
    assert torch.equal(scheduler_from_diffusers(given)[0].beta[1:], torch.from_numpy(betas))
    odd = NoiseScheduler(betas)
    scheduler_to_diffusers(odd).save_pretrained(tmp_path)
    again, _ = from_diffusers(DDPMPipeline(pipeline.unet, DDPMScheduler.from_pretrained(tmp_path)))
    assert torch.equal(again.scheduler.beta, odd.beta)


def test_what_may_go_wrong(tmp_path, run):
    unet = UNet2DModel(**NAMED["one head of 8 channels in four"])
    bad = UNet2DModel(
        **NAMED["one head of 8 channels in four"] | dict(act_fn="gelu", class_embed_type="timestep")
    )
    with pytest.raises(ValueError) as e:
        from_diffusers(DDPMPipeline(bad, DDPMScheduler(thresholding=True, variance_type="learned")))
    for field in ("act_fn", "class_embed_type", "thresholding", "variance_type"):
        assert f"{field}: expected" in str(e.value)
    with pytest.raises(
        ValueError, match="DDPMScheduler or a DDIMScheduler; got EulerDiscreteScheduler"
    ):
        from_diffusers(DDPMPipeline(unet, diffusers.EulerDiscreteScheduler()))
    for theirs, message in [
        (
            DDPMScheduler(rescale_betas_zero_snr=True),
            "prediction_type: expected sample, v_prediction; got 'epsilon'",
        ),
        (DDPMScheduler(clip_sample_range=2.0), "clip_sample_range: expected 1; got 2.0"),
        (
            DDPMScheduler(20, trained_betas=[0.1] * 40),
            "expected num_train_timesteps = 20 of them; got 40",
        ),
        (DDIMScheduler(set_alpha_to_one=False), "set_alpha_to_one: expected True; got False"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_diffusers(DDPMPipeline(unet, theirs))
    with pytest.raises(ValueError, match="scheduler: expected .* got NoneType .* got NoneType"):
        from_diffusers(42)
    for fields, message in [
        (dict(sample_size=1), "sample_size: expected .*, multiples of 2; got 1"),
        (dict(block_out_channels=(32, 64, 64)), "block_out_channels: expected one a level, 2"),
        (dict(swiglu=True), "swiglu: expected 'no such field'; got True"),
    ]:
        with pytest.raises(ValueError, match=message):
            _model_config(NAMED["one head of 8 channels in four"] | fields)
    for wrong in (
        dict(list(unet.state_dict().items())[1:]),
        unet.state_dict() | dict(more=torch.ones(1)),
    ):
        with pytest.raises(ValueError, match="weights: expected .* left over: (conv_in|more)"):
            _to_our_weights(wrong, unet_from_diffusers(unet).state_dict())
    with pytest.raises(
        ValueError, match="scheduler: expected a ddpm_nb NoiseScheduler; got DDPMScheduler"
    ):
        scheduler_to_diffusers(DDPMScheduler())
    with pytest.raises(ValueError, match="model: expected a ddpm_nb UNet; got Linear"):
        to_diffusers(Denoiser(torch.nn.Linear(1, 1), SCHEDULES["linear"]))
    with pytest.raises(ValueError, match="denoiser: expected a ddpm_nb Denoiser; got UNet"):
        to_diffusers(unet_from_diffusers(unet))
    with pytest.raises(ValueError, match="prediction: expected one of noise, x0, v; got 'score'"):
        scheduler_to_diffusers(SCHEDULES["linear"], prediction="score")
    gelu = UNet2DModel(**NAMED["one head of 8 channels in four"] | dict(act_fn="gelu"))
    DDPMPipeline(gelu, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(
        tmp_path / "v"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    for call, args, message in [
        (export_checkpoint, ("nothing", tmp_path / "x"), "checkpoint: expected a run folder"),
        (export_checkpoint, ("digits", tmp_path / "full"), "folder: expected a new or empty one"),
        (export_checkpoint, ("digits", tmp_path / "no" / "x"), "folder: there is no folder"),
        (export_checkpoint, ("digits", tmp_path / "x", "learned"), "variance: expected one of"),
        (import_pipeline, (tmp_path / "full", tmp_path / "x"), "source: expected a pipeline"),
        (import_pipeline, (tmp_path / "v", tmp_path / "full"), "folder: expected a new or empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*args)
    done = run("ddpm-import", tmp_path / "v", tmp_path / "x", code=2, HF_HUB_OFFLINE="1")
    assert done.stderr.splitlines()[-1].endswith("act_fn: expected 'silu'; got 'gelu'")
    assert not (tmp_path / "x").exists() and (tmp_path / "full" / "mine.txt").is_file()
    assert not list(tmp_path.glob(".tmp-*"))


# An oracle that is neither of the two: scipy's distributions, on a grid.


@pytest.mark.parametrize("t, t_prev", [(1000, 999), (500, 499), (40, 30), (2, 1), (1000, 700)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_bayes_on_a_grid(schedule, t, t_prev):
    s, x0, xt = SCHEDULES[schedule], 0.3, -0.4
    abar_t, abar_s = float(s.alpha_cumprod[t]), float(s.alpha_cumprod[t_prev])
    alpha = abar_t / abar_s
    x = np.linspace(-8, 8, 400_001)  # x at t_prev
    log_p = stats.norm.logpdf(x, abar_s**0.5 * x0, (1 - abar_s) ** 0.5)
    log_p += stats.norm.logpdf(xt, alpha**0.5 * x, (1 - alpha) ** 0.5)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * x).sum()
    variance = (p * (x - mean) ** 2).sum()
    tensor = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    found = s.posterior_mean_variance(x0 * tensor, xt * tensor, t, t_prev)
    assert float(found[0]) == pytest.approx(mean, rel=1e-8, abs=1e-9)
    assert float(found[1]) == pytest.approx(variance, rel=1e-6)
    assert float(s.sampling_std(t, t_prev)) ** 2 == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("levels", [17, 256])
def test_decoder_is_scipys_probability_of_a_bin(variance, levels):
    s = SCHEDULES["linear"]
    x0 = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    mean = 0.9 * x0 + 0.01
    std = float(s.decoder_log_variance(variance)[1].exp()) ** 0.5
    half = 1 / (levels - 1)  # of a bin
    value, center = x0.numpy(), mean.numpy()
    low = np.where(value < half - 1, -np.inf, value - half)
    high = np.where(value > 1 - half, np.inf, value + half)
    left = stats.norm.logcdf(high, center, std), stats.norm.logcdf(low, center, std)
    right = stats.norm.logsf(low, center, std), stats.norm.logsf(high, center, std)
    most, rest = np.where(value > center, right, left)  # from the tail that the bin is in
    want = -(most + np.log1p(-np.exp(rest - most))) / np.log(2)
    each = [x.view(-1, 1, 1, 1) for x in (x0, mean)]  # one pixel a picture
    found = decoder_term(s, *each, levels, variance)
    assert np.allclose(found, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("t", [2, 50, 900])
def test_kl_is_an_integral_on_a_grid(variance, t):
    s, error = SCHEDULES["linear"], 0.01
    alpha, abar_t, abar_s = (
        float(x) for x in (s.alpha[t], s.alpha_cumprod[t], s.alpha_cumprod[t - 1])
    )
    shift = abar_s**0.5 * (1 - alpha) / (1 - abar_t) * error**0.5  # of the mean; x0 off by 0.1
    std_q = float(s.posterior_variance[t]) ** 0.5
    std_p = std_q if variance == "beta_tilde" else (1 - alpha) ** 0.5
    x = np.linspace(-15 * std_q, 15 * std_q, 200_001)
    q = stats.norm.logpdf(x, 0, std_q)
    kl = np.trapezoid(np.exp(q) * (q - stats.norm.logpdf(x, shift, std_p)), x) / np.log(2)
    found = denoising_term(s, torch.tensor(error), torch.tensor(t), variance)
    assert float(found) == pytest.approx(kl, rel=1e-6)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(pipeline, folder):
        folder.mkdir()
        (folder / "half.safetensors").write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="nothing of it is left: .*No space left"):
        export_checkpoint("digits", tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_folders_as_they_were_published_in_2022(tmp_path):
    "Everything at the root, a few fields only, attention under its old names: as on the hub."
    fields = NAMED["google/ddpm-cifar10-32"] | dict(
        block_out_channels=(32, 64, 64, 64), norm_num_groups=8
    )
    unet = awaken(UNet2DModel(**fields), 0.2)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = unet.state_dict()
    for new, before in old.items():
        weights = {k.replace(new, before): v for k, v in weights.items()}
    assert any(".proj_attn." in k for k in weights)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    version = dict(_diffusers_version="0.0.4")
    files = {
        "config.json": version | dict(_class_name="UNet2DModel", **fields),
        "scheduler_config.json": version
        | dict(_class_name="DDPMScheduler", variance_type="fixed_large", clip_sample=True),
        "model_index.json": version
        | dict(
            _class_name="DDPMPipeline",
            scheduler=["diffusers", "DDPMScheduler"],
            unet=["diffusers", "UNet2DModel"],
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    denoiser, how = from_diffusers(tmp_path)
    assert how == dict(ALONG, variance="beta", clip=True)
    assert denoiser.scheduler.config == LinearNoiseScheduler(1000, 1e-4, 0.02).config
    assert denoiser.prediction == "noise"
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 900])
    with torch.no_grad():
        assert apart(denoiser.answer(x, t), unet(x, t - 1).sample) < 1e-5

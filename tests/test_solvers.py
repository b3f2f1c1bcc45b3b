"""Page 08's samplers against diffusers' step by step, and what a step costs outside of the network."""

import math

import pytest
import torch
from cells import run_cells
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_nb import sample as sampling
from ddpm_nb.objective import PREDICTIONS, Denoiser, prediction_target
from ddpm_nb.sample import SAMPLERS, SPACINGS, reverse_walk, sample, timestep_walk
from ddpm_nb.scheduler import (
    CosineNoiseScheduler,
    LinearNoiseScheduler,
    NoiseScheduler,
    SigmoidNoiseScheduler,
)

diffusers = pytest.importorskip("diffusers")
THEIRS = dict(noise="epsilon", x0="sample", v="v_prediction")
SCHEDULES = {
    "linear": LinearNoiseScheduler(),
    "cosine": CosineNoiseScheduler(),
    "sigmoid": SigmoidNoiseScheduler(),
}


def smooth(scheduler, prediction):
    """A net whose picture is a smooth function of x_t, told in any of the three languages."""

    def net(x, t):
        signal, sigma = scheduler.signal_noise(t, x)
        x0 = 0.8 * torch.tanh(signal * x + 0.1 * t.view(-1, 1, 1, 1) / 1000)
        noise = (x - signal * x0) / sigma
        return prediction_target(scheduler, x0, noise, t, prediction)

    return net


def theirs_walk(theirs, net, x, walk, noises):
    """The walk with a scheduler of diffusers, whose timesteps count from 0."""
    theirs.set_timesteps(timesteps=[t - 1 for t in walk[:-1]])
    for t, z in zip(theirs.timesteps, noises, strict=True):
        out = net(x, torch.full((len(x),), int(t) + 1))
        x = theirs.step(out, t, x, variance_noise=z).prev_sample
    return x


def dpm(scheduler, prediction, clip, sde=False):
    """Their DPM-Solver++ with our betas, and its table in float64, as ours is."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=scheduler.beta[1:].tolist(),
        prediction_type=THEIRS[prediction],
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        thresholding=clip,
        sample_max_value=1.0,
    )
    theirs.alphas_cumprod = scheduler.alpha_cumprod[1:]
    return theirs


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["dpm++", "sde-dpm++"])
def test_dpm_solver_is_diffusers(method, schedule, prediction, spacing):
    s = SCHEDULES[schedule]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 4, 4, generator=g)
    # x0 from the noise is multiplied by 20,291 at cosine's T: the last digit of float32 shows there
    loose = prediction == "noise" and schedule != "linear"
    for steps in (6, 20):
        walk = timestep_walk(s, steps, spacing)
        noises = torch.randn(steps, 4, 1, 4, 4, generator=g)
        for clip in (True, False):
            draws = iter(noises)
            ours = SAMPLERS[method](
                Denoiser(smooth(s, prediction), s, prediction),
                s,
                x,
                walk,
                noise=lambda x, draws=draws: next(draws),
                clip=clip,
            )
            theirs = dpm(s, prediction, clip, method == "sde-dpm++")
            want = theirs_walk(theirs, smooth(s, prediction), x, walk, noises)
            assert_close(ours, want, rtol=0, atol=1e-3 if loose else 1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_is_diffusers_below_the_end_of_cosine(prediction):
    s, x = SCHEDULES["cosine"], torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    walk = [980, 900, 700, 450, 200, 60, 0]
    ours = SAMPLERS["dpm++"](Denoiser(smooth(s, prediction), s, prediction), s, x, walk)
    want = theirs_walk(dpm(s, prediction, True), smooth(s, prediction), x, walk, x.new_zeros(6, 1))
    assert_close(ours, want, rtol=0, atol=1e-5)


def test_dpm_solver_is_diffusers_with_no_signal_at_the_end():
    """Theirs puts 2^-24 where alpha_cumprod is 0; with a table of ours that ends there they agree."""
    zero, s = (LinearNoiseScheduler(zero_terminal_snr=True) for _ in range(2))
    s.alpha_cumprod[-1] = 2.0**-24
    s.sqrt_alpha_cumprod, s.sqrt_one_minus_alpha_cumprod = (
        s.alpha_cumprod.sqrt(),
        (1 - s.alpha_cumprod).sqrt(),
    )
    s.log_snr_half = (s.alpha_cumprod / (1 - s.alpha_cumprod)).log() / 2
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=LinearNoiseScheduler().beta[1:].tolist(),
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        thresholding=True,
    )
    theirs.alphas_cumprod = s.alpha_cumprod[1:]
    walk = timestep_walk(s, 12, "karras")
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    ours = SAMPLERS["dpm++"](Denoiser(smooth(s, "v"), s, "v"), s, x, walk)
    want = theirs_walk(theirs, smooth(s, "v"), x, walk, x.new_zeros(12, 1))
    assert_close(ours, want, rtol=0, atol=1e-5)
    # and ours with 0 there differs from it by no more than such a rest of signal can
    exact = SAMPLERS["dpm++"](Denoiser(smooth(zero, "v"), zero, "v"), zero, x, walk)
    assert_close(exact, ours, rtol=0, atol=5e-3)


@pytest.mark.parametrize("schedule, start", [("linear", 1000), ("cosine", 980)])
def test_edm_heun_is_diffusers(schedule, start):
    s = SCHEDULES[schedule]
    walk = [start, 900, 700, 450, 200, 60, 0]
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    net = smooth(s, "noise")
    edm = run_cells("08_few_steps.ipynb", "def edm_heun_sample", reverse_walk=reverse_walk,
                    errors=lambda f: [1.0, 0.25], slopes=lambda e: torch.tensor([2.0]).numpy(),
                    error={}, heun_sample=None)["edm_heun_sample"]  # fmt: skip
    ours = edm(Denoiser(net, s), s, x, walk)
    theirs = diffusers.HeunDiscreteScheduler(trained_betas=s.beta[1:].tolist())
    theirs.set_timesteps(timesteps=[t - 1 for t in walk[:-1]])
    y = x / s.sqrt_alpha_cumprod[start].float()
    for t in theirs.timesteps:
        told = torch.full((4,), int(t) + 1)
        out = net(theirs.scale_model_input(y, t), told)
        y = theirs.step(out, t, y).prev_sample
    assert_close(ours, y, rtol=0, atol=1e-5)


class Count(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "promote_types" not in str(op):  # of dtypes, not of tensors
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", SAMPLERS)
def test_a_step_costs_little_outside_of_the_network(method, prediction):
    """At most 15 tensor operations an evaluation, and no number is read back."""
    s, own = LinearNoiseScheduler(), {}
    if method == "ancestral":
        own = dict(variance=torch.rand(1001).double() / 100)
    if method == "ddim":
        own = dict(eta=0.5)
    answer = torch.zeros(2, 1, 4, 4)
    denoiser = Denoiser(lambda x, t: answer, s, prediction)
    x, z = torch.randn(2, 2, 1, 4, 4)
    counts = []
    for steps in (10, 20):
        walk = timestep_walk(s, steps)
        with Count() as count:
            SAMPLERS[method](denoiser, s, x, walk, noise=lambda x: z, **own)
        assert not any("item" in n or "_local_scalar" in n or "_to_copy" in n for n in count.names[10:]), (
            count.names
        )  # fmt: skip
        evaluations = 2 * steps - 1 if method == "heun" else steps
        counts.append((len(count.names), evaluations))
    (few, a), (many, b) = counts
    assert (many - few) / (b - a) <= 15, counts


def test_the_count_can_tell():
    """A look-up on the device in each step would be seen."""
    s, table = LinearNoiseScheduler(), torch.rand(1001)
    with Count() as count:
        float(table[torch.tensor(3)])
    assert any("_local_scalar" in n for n in count.names), s


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("scheduler", [
    CosineNoiseScheduler(zero_terminal_snr=True),
    LinearNoiseScheduler(50, zero_terminal_snr=True),
    NoiseScheduler([0.1, 0.3, 1.0]),
])  # fmt: skip
def test_walks_from_no_signal_are_finite(method, scheduler):
    denoiser = Denoiser(smooth(scheduler, "v"), scheduler, "v")
    for spacing in SPACINGS:
        for steps in (1, 2, 3):
            x = sample(denoiser, 3, shape=(1, 4, 4), steps=steps, method=method, spacing=spacing)
            assert x.isfinite().all() and (x.std() > 0 or steps == 1)


@pytest.mark.parametrize("spacing", ["log-snr", "karras"])
def test_no_step_is_spent_next_to_where_a_walk_starts(spacing):
    """A walk from T leaps to sigma = 40 signals first; one that starts below has no such leap to make."""
    s, few = CosineNoiseScheduler(), NoiseScheduler(LinearNoiseScheduler().beta[1:201])
    scale = (lambda lam: lam) if spacing == "log-snr" else (lambda lam: (-lam / 7).exp())
    for scheduler, t_start in ((s, 300), (s, 900), (few, 200)):
        for steps in (2, 3, 5, 10):
            walk = timestep_walk(scheduler, steps, spacing, t_start)
            assert len(walk) == steps + 1 and walk[0] == t_start and walk[-2:] == [1, 0]
            levels = scale(scheduler.log_snr_half[walk[:-1]])
            lengths = levels.diff().abs()
            assert lengths[0] > 0.6 * lengths.mean()
    from_T = timestep_walk(s, 10, spacing)
    assert s.log_snr_half[from_T[1]] >= -math.log(40) > s.log_snr_half[from_T[1] + 1]


def test_more_steps_lead_to_the_same_picture():
    """From no signal at all, too: the walk of 10 steps ends near that of 400."""
    s = CosineNoiseScheduler(zero_terminal_snr=True)
    draw = lambda steps, method: sample(  # noqa: E731
        Denoiser(smooth(s, "v"), s, "v"), 16, shape=(1, 4, 4), steps=steps, method=method
    )
    far = draw(400, "dpm++")
    off = {m: float((draw(20, m) - far).square().mean().sqrt()) for m in ("ddim", "dpm++")}
    assert off["dpm++"] < off["ddim"] / 2 < 0.1, off


def test_defaults_and_refusals():
    s = LinearNoiseScheduler()
    d = Denoiser(smooth(s, "noise"), s)
    a = sample(d, 2, shape=(1, 4, 4))
    assert torch.equal(
        a, sample(d, 2, shape=(1, 4, 4), steps=20, method="sde-dpm++", spacing="karras")
    )
    few = LinearNoiseScheduler(25)
    b = Denoiser(smooth(few, "noise"), few)
    assert torch.equal(sample(b, 2, shape=(1, 4, 4)), sample(b, 2, shape=(1, 4, 4), steps=20))
    fewer = NoiseScheduler([0.2, 0.5, 0.9])
    sample(Denoiser(smooth(fewer, "noise"), fewer), 2, shape=(1, 4, 4))
    refused = {
        "method: expected one of ancestral, ddim, heun, dpm++, sde-dpm++; got 'no-such-thing'": dict(
            method="no-such-thing"
        ),
        "spacing: expected one of uniform, log-snr, karras; got 'no-such-thing'": dict(
            spacing="no-such-thing"
        ),
        "steps: expected 1..1000": dict(steps=1001),
        "steps: expected 1..1000 ": dict(steps=0),
        "eta: expected what 'sde-dpm++' takes, clip; got 0.5": dict(eta=0.5),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message.replace("+", r"\+").replace("..", r"\.\.")):
            sample(d, 2, shape=(1, 4, 4), **wrong)


def test_registries_are_whole_whoever_imports_first(run):
    """`import ddpm_nb.sample` alone knows page 08's samplers."""
    code = "from ddpm_nb.sample import SAMPLERS, SPACINGS; print(*SAMPLERS, *SPACINGS)"
    out = run("python", "-c", code)
    assert "dpm++" in out.stdout and "karras" in out.stdout


def test_heun_turns_in_the_angle():
    """Two steps by hand, in numpy's words: v is (cos x - x0) / sin."""
    s = CosineNoiseScheduler()
    x0_of = lambda x, t: 0.8 * torch.tanh(x + t / 1000)  # noqa: E731
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    phi = {t: math.acos(float(s.sqrt_alpha_cumprod[t])) for t in (1000, 400)}
    v = lambda x, t: (math.cos(phi[t]) * x - x0_of(x, t)) / math.sin(phi[t])  # noqa: E731
    turn = phi[400] - phi[1000]
    there = math.cos(turn) * x + math.sin(turn) * v(x, 1000)
    want = x0_of(x + turn / 2 * (v(x, 1000) + v(there, 400)), 400)
    assert_close(SAMPLERS["heun"](x0_of, s, x, [1000, 400, 0], clip=False), want)
    assert sampling.SAMPLERS is SAMPLERS

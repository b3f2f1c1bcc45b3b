"""Pages 00 to 02: what their graders say to the usual slips, and what the scheduler and the objective promise and refuse."""

import inspect
import itertools
import json
import math

import cells
import pytest
import torch
from torch.testing import assert_close

from ddpm_nb import train
from ddpm_nb.objective import (
    PREDICTIONS,
    Denoiser,
    min_snr_weight,
    noise_from_v,
    noise_from_x0,
    noise_weight,
    prediction_target,
    training_loss,
    v_from_noise,
    x0_from_v,
)
from ddpm_nb.scheduler import (
    PURPOSES,
    SCHEDULES,
    VARIANCES,
    CosineNoiseScheduler,
    LinearNoiseScheduler,
    NoiseScheduler,
    SigmoidNoiseScheduler,
    make_scheduler,
    randn_like,
    rescale_zero_terminal_snr,
    stream,
)

linear, cosine = LinearNoiseScheduler(), CosineNoiseScheduler()


def run_cells(page, *starts, **names):
    """What those cells define, given these names and some that every page has."""
    return cells.run_cells(
        page, *starts, **dict(math=math, torch=torch, linear=linear, cosine=cosine), **names
    )


# ---- page 00: the tour


def test_grader_of_noise_step():
    page = run_cells("00_tour.ipynb", "T = 200", "def grade_noise_step", "def noise_step")
    grade, right, alpha, beta = (
        page[k] for k in ("grade_noise_step", "noise_step", "alpha", "beta")
    )
    randn = torch.randn_like
    torch.manual_seed(0)
    assert grade(right).startswith("Correct")
    assert "too little" in grade(lambda x, t: alpha[t].sqrt() * x + beta[t] * randn(x))
    assert "too much" in grade(lambda x, t: alpha[t].sqrt() * x + 2 * beta[t].sqrt() * randn(x))
    assert "shrinking" in grade(lambda x, t: alpha[t] * x + beta[t].sqrt() * randn(x))
    assert "shrinking" in grade(lambda x, t: x + beta[t].sqrt() * randn(x))
    assert "shape" in grade(lambda x, t: x[0])
    assert "shape" in grade(lambda x, t: None)


def test_grader_of_flow_step():
    """With an untrained network: only what the last line says depends on it."""
    parts = "def pinwheel", "T = 200", "def pairs", "def grade_flow_step", "def flow_step"
    walk = [torch.randn(1000, 2) for _ in range(201)]
    space = dict(net=lambda x, t: torch.zeros_like(x), walk=walk, fresh=walk[0], **sampler())
    page = run_cells("00_tour.ipynb", *parts, **space)
    grade, right, alpha_cumprod = (
        page[k] for k in ("grade_flow_step", "flow_step", "alpha_cumprod")
    )
    assert grade(right).startswith("Correct")
    assert "Algorithm 2's mean" in grade(space["reverse_mean"])
    assert "stays at t" in grade(lambda xt, noise_pred, t: xt)
    assert "shape" in grade(lambda xt, noise_pred, t: None)

    def no_noise(xt, noise_pred, t):
        return right(xt, noise_pred, t) - (1 - alpha_cumprod[t - 1]).sqrt() * noise_pred

    assert "two terms" in grade(no_noise)
    a = alpha_cumprod
    only_x0 = grade(lambda xt, e, t: (xt - (1 - a[t]).sqrt() * e) / a[t].sqrt())
    assert "guess of x_0" in only_x0


def sampler():
    """The tour's reverse mean, without its walk (which needs the trained network)."""
    space = run_cells("00_tour.ipynb", "T = 200")
    source = cells.cell("00_tour.ipynb", "def reverse_mean").replace("walk = sample(1000)", "")
    exec(compile(source, "00_tour.ipynb: def reverse_mean", "exec"), space)
    return {"reverse_mean": space["reverse_mean"]}


def refused(message, call, *args, **kwargs):
    """The call raises a ValueError that says this, in one line."""
    with pytest.raises(ValueError) as said:
        call(*args, **kwargs)
    assert message in str(said.value) and "\n" not in str(said.value)


# ---- page 01: the scheduler


def test_grader_of_crossing():
    page = run_cells(
        "01_scheduler.ipynb",
        "def grade_crossing",
        "def crossing",
        LinearNoiseScheduler=LinearNoiseScheduler,
    )
    grade, right = page["grade_crossing"], page["crossing"]
    assert grade(right).startswith("Correct")
    assert "amplitude" in grade(lambda s: int((s.sqrt_alpha_cumprod <= 0.5).nonzero()[0]))
    assert "one short" in grade(lambda s: int((s.alpha_cumprod[1:] <= 0.5).nonzero()[0]))
    assert "nothing" in grade(lambda s: None)
    assert "expected 260" in grade(lambda s: 500)


def test_grader_of_noise_from_x0():
    page = run_cells("01_scheduler.ipynb", "def grade_noise_from_x0", "def noise_from_x0")
    grade, right = page["grade_noise_from_x0"], page["noise_from_x0"]

    def root(s, xt, t):
        return s.signal_noise(t, xt)[1]

    assert grade(right).startswith("Correct")
    assert "sign" in grade(lambda *args: -right(*args))
    assert "factor" in grade(lambda s, xt, x0, t: right(s, xt, x0, t) / root(s, xt, t))
    assert "signal" in grade(lambda s, xt, x0, t: (xt - x0) / root(s, xt, t))
    assert "shapes" in grade(lambda s, xt, x0, t: xt / s.sqrt_one_minus_alpha_cumprod[t])
    assert "nothing" in grade(lambda *args: None)


def test_schedules_that_are_none():
    few = "num_timesteps: expected more than 20, since the scaled beta_end is 20 / T and stays below 1; got 20"
    refused(few, LinearNoiseScheduler, 20)
    assert LinearNoiseScheduler(21).beta.max() < 1 and LinearNoiseScheduler(20, beta_end=0.5)
    for bad in (0, -3, 2.5, None):
        message = f"num_timesteps: expected a whole number of at least 1; got {bad}"
        refused(message, LinearNoiseScheduler, bad)
        refused(message, CosineNoiseScheduler, bad)
        refused(message, SigmoidNoiseScheduler, bad)
    message = "beta: expected numbers above 0 and below 1 (the last may be 1); got "
    for bad, got in [
        ([0.0, 0.5], "0 to 0.5"),
        ([0.1, 1.5], "0.1 to 1.5"),
        ([1.0, 0.1], "0.1 to 1"),
        ([0.1, 1.0, 0.2], "0.1 to 1"),
        ([1.0, 1.0], "1 to 1"),
        ([0.1, float("nan")], "nan to nan"),
        ([float("nan"), 0.1], "nan to nan"),
    ]:
        refused(message + got, NoiseScheduler, bad)
    refused("beta: expected one number a step; got shape (0,)", NoiseScheduler, [])
    refused("beta: expected one number a step; got shape (1, 2)", NoiseScheduler, [[0.1, 0.2]])
    message = "zero_terminal_snr: expected at least 2 steps; got 1"
    refused(message, CosineNoiseScheduler, 1, zero_terminal_snr=True)


def test_betas_below_the_reach_of_float64():
    """They would leave alpha_cumprod as it was, and the posterior would divide 0 by 0."""
    message = "beta: expected alpha_cumprod to fall at each step, in float64; got "
    refused(message + "1e-17 at t = 1, where it stays 1", NoiseScheduler, [1e-17, 0.1])
    refused(message + "1e-17 at t = 2, where it stays 0.9", NoiseScheduler, [0.1, 1e-17, 0.2])
    refused(message + "0.999 at t = 109, where it stays 0", NoiseScheduler, [0.999] * 200)
    s = NoiseScheduler([1e-15, 0.1])
    assert (s.alpha_cumprod.diff() < 0).all()
    assert all(v.isfinite().all() for v in s.posterior_mean_variance(*torch.ones(2, 1, 1), 2)[:1])
    for schedule in SCHEDULES.values():
        for T in (21, 200, 1000, 4000):
            for zero in (False, True):
                s = schedule(T, zero_terminal_snr=zero)
                assert (s.alpha_cumprod.diff() < 0).all() and s.log_snr_half[1:-1].isfinite().all()


def test_make_scheduler_reads_the_registry(monkeypatch):
    known = ", ".join((*SCHEDULES, "custom"))
    message = f"schedule: expected one of {known}; got 'no-such-schedule'"
    refused(message, make_scheduler, dict(schedule="no-such-schedule"))
    refused("got None", make_scheduler, {})
    refused("schedule 'linear': ", make_scheduler, dict(schedule="linear", steps=5))

    class Flat(NoiseScheduler):
        def __init__(self, num_timesteps):
            super().__init__(torch.full((num_timesteps,), 0.1))
            self.config = dict(schedule="flat", num_timesteps=num_timesteps)

    monkeypatch.setitem(SCHEDULES, "flat", Flat)
    assert type(make_scheduler(Flat(7).config)) is Flat
    refused("flat, custom", make_scheduler, dict(schedule="flt"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_config_remembers_every_number(name):
    """Each argument off its default in turn: the betas change, and come back from the config."""
    make, plain = SCHEDULES[name], SCHEDULES[name](60)
    for k in list(inspect.signature(make).parameters)[1:]:
        value = plain.config[k]
        other = make(60, **{k: True if value is False else 0.9 * value})
        again = make_scheduler(json.loads(json.dumps(other.config)))
        assert torch.equal(again.beta, other.beta) and not torch.equal(again.beta, plain.beta), k


def test_steps_that_are_none():
    x = torch.zeros(2, 1, 2, 2)
    for bad, message in [
        ([-1, 5], "t: expected steps in 0..1000; got -1..5"),
        ([3, 1001], "t: expected steps in 0..1000; got 3..1001"),
        ([0.5, 5], "t: expected whole steps (int64); got torch.float32"),
    ]:
        refused(message, linear.add_noise, x, x, torch.tensor(bad))
    for step in (linear.sample_prev_timestep, linear.predict_x0, linear.mean_from_noise):
        refused("t: expected steps in 1..1000; got 0", step, x, x, 0)
    message = "t_prev: expected earlier steps than t; got t_prev = 5 for t = 5"
    refused(message, linear.sample_prev_timestep, x, x, 5, t_prev=5)
    message = "t_prev: expected steps in 0..1000; got -1"
    refused(message, linear.sample_prev_timestep, x, x, 5, t_prev=-1)
    for t_prev in (5, torch.tensor([4, 6])):
        refused("t_prev: expected earlier steps than t", linear.jump, torch.tensor([5, 6]), t_prev)
    for bad in (-1, 1001, torch.tensor([-1]), torch.tensor([3, 1001])):
        refused("t: expected steps in 0..1000; got ", linear.snr, bad)
    refused("t: expected steps in 0..1000; got -1", linear.snr, -1)


def test_variances_and_generators_that_are_none():
    message = "variance: expected one of beta_tilde, beta, or the error of the guess of x0 at t = 0..T, (1001,); got "
    refused(message + "'no-such-variance'", linear.sampling_std, 5, variance="no-such-variance")
    refused(message + "None", linear.sampling_std, 5, variance=None)
    refused(message + "(1000,)", linear.sampling_std, 5, variance=torch.zeros(1000))
    two = [torch.Generator(), torch.Generator()]
    message = "generator: expected one for each of the 3 pictures; got 2"
    refused(message, randn_like, torch.zeros(3, 1), two)
    refused(
        message, linear.sample_prev_timestep, torch.zeros(3, 1), torch.zeros(3, 1), 5, generator=two
    )
    message = f"purpose: expected one of {', '.join(PURPOSES)}; got 'no-such-purpose'"
    refused(message, stream, 0, 0, "no-such-purpose")


ZERO = {name: schedule(zero_terminal_snr=True) for name, schedule in SCHEDULES.items()}
each_zero = pytest.mark.parametrize("s", ZERO.values(), ids=ZERO)


@each_zero
def test_nothing_is_left_at_the_end(s):
    """beta is 1 at T and nowhere else, half the log-SNR runs from inf to -inf, and the config knows it."""
    assert s.zero_terminal_snr and s.beta[-1] == 1 and (s.beta[:-1] < 1).all()
    assert s.alpha_cumprod[-1] == 0 and s.log_snr_half[-1] == -math.inf
    assert s.log_snr_half[0] == math.inf and (s.log_snr_half.diff() < 0).all()
    inside = torch.arange(1, 1000)
    assert_close(s.log_snr_half[inside], s.snr(inside).log() / 2)
    assert torch.equal(make_scheduler(s.config).beta, s.beta)
    before = type(s)()
    assert not before.zero_terminal_snr and before.log_snr_half[-1].isfinite()
    assert_close(s.sqrt_alpha_cumprod[1], before.sqrt_alpha_cumprod[1], rtol=1e-12, atol=0)
    a, b = before.sqrt_alpha_cumprod, s.sqrt_alpha_cumprod  # one line through all roots
    slope = (b[1] - b[500]) / (a[1] - a[500])
    assert_close(b[1:], slope * (a[1:] - a[-1]), rtol=1e-9, atol=1e-12)
    again = NoiseScheduler(rescale_zero_terminal_snr(s.beta[1:]))
    assert_close(again.alpha_cumprod, s.alpha_cumprod, rtol=1e-9, atol=1e-12)


@each_zero
def test_what_divides_by_the_signal_is_refused_where_there_is_none(s):
    x = torch.ones(2, 1, 1, 1)
    for t, got in ((1000, "1000"), (torch.tensor([500, 1000]), "500..1000")):
        message = f"t: expected steps in 1..999 (at 1000 no signal is left, and this divides by it); got {got}"
        refused(message, s.predict_x0, x, x, t)
        refused(message, s.mean_from_noise, x, x, t)
        refused(message, s.sample_prev_timestep, x, x, t)
        refused(message, v_from_noise, s, x, x, t)
        refused(message, noise_weight, s, t)
        refused(message, min_snr_weight, s, t)
        assert x0_from_v(s, x, x, t)[-1] == -1 and noise_from_v(s, x, x, t)[-1] == 1
        assert noise_from_x0(s, x, 5 * x, t)[-1] == 1  # all of x_T is noise
        mean, variance = s.posterior_mean_variance(x, x, t, t // 2)
        assert mean.isfinite().all() and torch.as_tensor(variance).isfinite().all()
        for name in VARIANCES:
            assert torch.as_tensor(s.sampling_std(t, t // 2, name)).isfinite().all()
    assert s.decoder_log_variance().isfinite().all() and s.predict_x0(x, x, 999).isfinite().all()
    two = NoiseScheduler([0.5, 1.0])
    assert two.zero_terminal_snr and two.posterior_mean_variance(x, 9 * x, 2)[0][0] == 0.5**0.5
    assert two.jump(2).beta_tilde == 0.5


@each_zero
@pytest.mark.parametrize("t, t_prev", [(1000, 999), (1000, 400), (1000, 1), (700, 200), (2, 1)])
def test_posterior_by_bayes_on_a_grid(s, t, t_prev):
    """Likelihood times prior of x_s, added up: its mean and variance are those of eq. 7."""
    x0, xt = 0.6, 0.6 * float(s.sqrt_alpha_cumprod[t]) - float(s.sqrt_one_minus_alpha_cumprod[t])
    a, b = float(s.alpha_cumprod[t_prev]), float(s.alpha_cumprod[t] / s.alpha_cumprod[t_prev])
    middle, width = a**0.5 * x0, (1 - a) ** 0.5
    x = torch.linspace(middle - 9 * width, middle + 9 * width, 20_001, dtype=torch.float64)
    prior = -((x - middle) ** 2) / (2 * (1 - a))
    likelihood = -((xt - b**0.5 * x) ** 2) / (2 * (1 - b))
    p = (prior + likelihood).softmax(0)
    mean = p @ x
    got = s.posterior_mean_variance(*torch.tensor([[x0], [xt]], dtype=torch.float64), t, t_prev)
    assert_close(got[0][0], mean, rtol=1e-9, atol=1e-9)
    assert_close(got[1], float(p @ (x - mean) ** 2), rtol=1e-9, atol=1e-12)
    if t == 1000:  # x_T says nothing: what is left is q(x_s | x_0)
        assert_close(got[1], 1 - a)


def test_one_t_for_all_pictures_is_the_same_as_a_t_for_each():
    """Floats for an int, float64 for a tensor: jump, posterior and deviation give the same numbers."""
    x0, xt = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    table = torch.rand(1001, generator=torch.Generator().manual_seed(1)).double()
    equal = dict(rtol=1e-13, atol=1e-15)
    for s in (linear, cosine, *ZERO.values()):
        for t, t_prev in ((1, 0), (2, 1), (40, 3), (500, 0), (999, 998), (1000, 999), (1000, 0)):
            each, each_prev = torch.full((3,), t), torch.full((3,), t_prev)
            one, many, wide = (
                s.jump(t, t_prev),
                s.jump(each, each_prev),
                s.jump(each, each_prev, x0),
            )
            for name in ("abar_t", "abar_s", "lam_t", "lam_s", "alpha", "beta", "beta_tilde"):
                a, b, c = (getattr(j, name) for j in (one, many, wide))
                assert type(a) is float and b.shape == (3,) and c.shape == (3, 1, 1, 1)
                assert b.dtype == c.dtype == torch.float64
                assert_close(b, torch.full((3,), a, dtype=torch.float64), **equal)
                assert torch.equal(b, c.flatten())
            for variance in ("beta_tilde", "beta", table):
                for f in (s.reverse_variance, s.sampling_std):
                    a, b = f(t, t_prev, variance), f(each, each_prev, variance)
                    assert type(a) is float and b.shape == (3,) and b.dtype == torch.float64
                    assert_close(b, torch.full((3,), a, dtype=torch.float64), **equal)
            assert s.sampling_std(t, 0) == s.sampling_std(t, 0, table) == 0
            a = s.posterior_mean_variance(x0, xt, t, t_prev)
            b = s.posterior_mean_variance(x0, xt, each, each_prev)
            assert type(a[1]) is float and b[1].shape == (3, 1, 1, 1)
            assert_close(a[0], b[0], **equal)
            assert_close(torch.full((3, 1, 1, 1), a[1], dtype=torch.float64), b[1], **equal)
            if t == t_prev + 1:
                assert one == s.jump(t)


def a_step(x, y, t):
    return linear.sample_prev_timestep(x, y, t, generator=torch.Generator().manual_seed(2))


def posterior(x, y, t):
    return linear.posterior_mean_variance(x, y, t)[0]


OF_THE_SCHEDULER = linear.add_noise, linear.predict_x0, linear.mean_from_noise, posterior, a_step
OF_THE_OBJECTIVE = x0_from_v, noise_from_v, v_from_noise, noise_from_x0


@pytest.mark.parametrize("f", OF_THE_SCHEDULER + OF_THE_OBJECTIVE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_one_t_rounds_once(f, dtype):
    """As in float32, and then rounded: also where t is an int and the factors are plain numbers."""
    x, y = torch.randn(2, 50, 1, 4, 4, generator=torch.Generator().manual_seed(4)).to(dtype)
    first = (linear,) if f in OF_THE_OBJECTIVE else ()
    for t in (1, 300, 1000, torch.linspace(1, 1000, 50).long()):
        half, full = f(*first, x, y, t), f(*first, x.float(), y.float(), t)
        pairs = [(half, full)] if torch.is_tensor(half) else zip(half, full, strict=True)
        for a, b in pairs:
            assert a.dtype == dtype and torch.equal(a, b.to(dtype)), t
    signal, sigma = linear.signal_noise(300, x)
    assert signal.dtype == sigma.dtype == torch.float32
    assert all(type(v) is float for v in linear.signal_noise(300, x.float()))


def test_the_scheduler_does_not_move():
    """A t elsewhere is answered from a copy there; tables and config stay what and where they were."""
    s = LinearNoiseScheduler()
    t = torch.tensor([1, 1000])
    assert s.look_up("alpha_cumprod", t.to("meta")).is_meta and not s.alpha_cumprod.is_meta
    assert s.look_up("alpha_cumprod", t).equal(s.alpha_cumprod[t]) and not hasattr(s, "to")
    denoiser = Denoiser(torch.nn.Linear(1, 1), s).half()
    assert denoiser.scheduler.beta.dtype == torch.float64
    assert set(denoiser.state_dict()) == {"net.weight", "net.bias"}


@pytest.fixture
def asked(monkeypatch):
    """What the trainer's streams are asked for: (seed, index, purpose)."""
    calls = []

    def noted(seed, index, purpose="sample"):
        calls.append((seed, index, purpose))
        return stream(seed, index, purpose)

    monkeypatch.setattr(train, "stream", noted)
    return calls


@pytest.mark.parametrize("preset", train.DIFFUSION_PRESETS)
def test_purposes_of_random_numbers_do_not_meet(preset, asked):
    """Of seeds 0 to 9 no two purposes, and no two seeds, share a stream; torch keeps 32 bits of a seed."""
    c = train.DiffusionConfig.preset(preset)
    for step in (1, c.max_steps):
        train.step_draws(0, step, c.batch_size, 1000, (1, 1, 1))
    trained = range(min(asked)[1], max(asked)[1] + 1)
    assert {p for *_, p in asked} == {"train"}
    assert 0 <= trained[0] and len(trained) == c.max_steps * -(-c.batch_size // 16)
    lengths = dict.fromkeys(PURPOSES, 100_000)
    lengths |= dict(train=trained[-1] + 1, dropout=c.max_steps + 1)
    ranges = [
        (stream(seed, 0, p).initial_seed(), n) for seed in range(10) for p, n in lengths.items()
    ]
    for (a, n), (b, m) in itertools.combinations(ranges, 2):
        assert (b - a) % 2**32 >= n and (a - b) % 2**32 >= m, (preset, a, n, b, m)
    start = stream(3, 0, "train").initial_seed()
    assert stream(3, 5, "train").initial_seed() == (start + 5) % 2**32


# ---- page 02: the objective


def test_grader_of_v_from_x0():
    page = run_cells("02_objective.ipynb", "def grade_v_from_x0", "def v_from_x0")
    grade, right = page["grade_v_from_x0"], page["v_from_x0"]
    assert grade(right).startswith("Correct")
    assert "sign" in grade(lambda s, xt, x0, t: -right(s, xt, x0, t))
    assert "the noise" in grade(noise_from_x0)
    assert "nothing" in grade(lambda s, xt, x0, t: None)
    assert "places" in grade(lambda s, xt, x0, t: right(s, x0, xt, t))
    assert "other root" in grade(
        lambda s, xt, x0, t: xt - x0 / s.signal_noise(t, xt)[0],
    )
    assert "shape" in grade(lambda s, xt, x0, t: xt[:1])
    assert "raises" in grade(lambda s, xt, x0, t: xt.nothing)
    assert "wrong by" in grade(lambda s, xt, x0, t: xt)


def test_grader_of_even_times():
    page = run_cells("02_objective.ipynb", "def grade_even_times", "def even_times")
    grade, right = page["grade_even_times"], page["even_times"]
    assert grade(right).startswith("Correct")
    assert "missed" in grade(lambda n, T, g: torch.randint(1, T + 1, (n,), generator=g))
    assert "as often" in grade(lambda n, T, g: torch.arange(1, T + 1, T // n))
    assert "from 1" in grade(lambda n, T, g: right(n, T, g) - 1)
    assert "outside" in grade(lambda n, T, g: right(n, T, g) + 1)
    assert "Shuffle" in grade(lambda n, T, g: right(n, T, g).sort().values)
    assert "nothing" in grade(lambda n, T, g: None)
    assert "whole numbers" in grade(lambda n, T, g: right(n, T, g).float())


def test_predictions_that_are_none():
    message = "prediction: expected one of noise, x0, v; got 'no-such-prediction'"
    x = torch.zeros(1, 1, 2, 2)
    t = torch.tensor([1])
    refused(message, Denoiser, torch.nn.Identity(), linear, "no-such-prediction")
    refused(message, prediction_target, linear, x, x, t, "no-such-prediction")
    refused(message, min_snr_weight, linear, t, prediction="no-such-prediction")
    assert tuple(PREDICTIONS) == ("noise", "x0", "v")
    for zero in ZERO.values():
        message = "prediction: expected x0 or v, since this schedule ends with no signal"
        refused(message, Denoiser, torch.nn.Identity(), zero)
        refused(message, Denoiser, torch.nn.Identity(), zero, "noise")
        for prediction in ("x0", "v"):
            denoiser = Denoiser(lambda xt, t: xt, zero, prediction)
            message = "min_snr_gamma: expected none with zero_terminal_snr"
            refused(message, training_loss, denoiser, x, t, x, min_snr_gamma=5.0)
            for at in (t, torch.tensor([1000])):
                assert training_loss(denoiser, x + 1, at, x + 0.5).isfinite().all()
    assert training_loss(Denoiser(lambda xt, t: xt, linear), x, t, x, min_snr_gamma=5.0) == 0


def test_shapes_that_would_broadcast():
    x0, noise, t = (
        torch.randn(4, 3, 5, 5),
        torch.randn(4, 3, 5, 5),
        torch.tensor([1, 10, 500, 1000]),
    )

    same = Denoiser(lambda xt, t: xt, linear)
    narrow = Denoiser(lambda xt, t: xt[:, :1], linear)
    message = "net: expected an answer of shape (4, 3, 5, 5); got (4, 1, 5, 5)"
    refused(message, training_loss, narrow, x0, t, noise)
    refused(message, narrow, x0, t)
    message = "noise, t: expected shapes (4, 3, 5, 5) and (4,); got (4, 3, 5, 5) and (1,)"
    refused(message, training_loss, same, x0, t[:1], noise)
    message = "noise, t: expected shapes (4, 3, 5, 5) and (4,); got (1, 3, 5, 5) and (4,)"
    refused(message, training_loss, same, x0, t, noise[:1])
    assert training_loss(same, x0, t, noise).shape == (4,)

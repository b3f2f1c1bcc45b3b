"""Pages 00 to 02: what their graders say to the usual slips, and what the scheduler and the objective refuse."""

import math

import cells
import pytest
import torch

from ddpm_nb.objective import (
    PREDICTIONS,
    NoiseFrom,
    _cos_sin,
    min_snr_weight,
    noise_from_x0,
    prediction_target,
    training_loss,
)
from ddpm_nb.scheduler import (
    SCHEDULES,
    CosineNoiseScheduler,
    LinearNoiseScheduler,
    NoiseScheduler,
    make_scheduler,
    randn_like,
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
    """The call raises a ValueError that says this."""
    with pytest.raises(ValueError) as said:
        call(*args, **kwargs)
    assert message in str(said.value)


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
        return s.spread(s.sqrt_one_minus_alpha_cumprod[t], xt)

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
    refused("beta: expected numbers above 0 and below 1; got 0.1 to 1", NoiseScheduler, [0.1, 1.0])
    refused("beta: expected numbers above 0 and below 1; got 0 to 0.5", NoiseScheduler, [0.0, 0.5])
    refused("beta: expected numbers above 0", NoiseScheduler, [0.1, float("nan")])
    refused("beta: expected one number a step; got shape (0,)", NoiseScheduler, [])
    refused("beta: expected one number a step; got shape (1, 2)", NoiseScheduler, [[0.1, 0.2]])


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
    message = "t_prev: expected steps in 0..1000; got -1..-1"
    refused(message, linear.sample_prev_timestep, x, x, 5, t_prev=-1)


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


# ---- page 02: the objective


def test_grader_of_v_from_x0():
    page = run_cells(
        "02_objective.ipynb", "def grade_v_from_x0", "def v_from_x0", _cos_sin=_cos_sin
    )
    grade, right = page["grade_v_from_x0"], page["v_from_x0"]
    assert grade(right).startswith("Correct")
    assert "sign" in grade(lambda s, xt, x0, t: -right(s, xt, x0, t))
    assert "the noise" in grade(noise_from_x0)
    assert "nothing" in grade(lambda s, xt, x0, t: None)
    assert "places" in grade(lambda s, xt, x0, t: right(s, x0, xt, t))
    assert "other root" in grade(
        lambda s, xt, x0, t: xt - x0 / _cos_sin(s, t, xt)[0],
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
    refused(message, NoiseFrom, torch.nn.Identity(), linear, "no-such-prediction")
    refused(message, prediction_target, linear, x, x, t, "no-such-prediction")
    refused(message, min_snr_weight, linear, t, prediction="no-such-prediction")
    refused(message, training_loss, lambda xt, t: xt, linear, x, t, x, "no-such-prediction")
    assert PREDICTIONS == ("noise", "x0", "v")


def test_shapes_that_would_broadcast():
    x0, noise, t = (
        torch.randn(4, 3, 5, 5),
        torch.randn(4, 3, 5, 5),
        torch.tensor([1, 10, 500, 1000]),
    )

    def same(xt, t):
        return xt

    message = "model: expected an answer of shape (4, 3, 5, 5); got (4, 1, 5, 5)"
    refused(message, training_loss, lambda xt, t: xt[:, :1], linear, x0, t, noise)
    message = "noise, t: expected shapes (4, 3, 5, 5) and (4,); got (4, 3, 5, 5) and (1,)"
    refused(message, training_loss, same, linear, x0, t[:1], noise)
    message = "noise, t: expected shapes (4, 3, 5, 5) and (4,); got (1, 3, 5, 5) and (4,)"
    refused(message, training_loss, same, linear, x0, t, noise[:1])
    assert training_loss(same, linear, x0, t, noise).shape == (4,)

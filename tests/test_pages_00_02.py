"""Pages 00 to 02: what their graders say to the usual slips, and what the scheduler and the objective refuse."""

import json
import math
from pathlib import Path

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
from ddpm_nb.scheduler import CosineNoiseScheduler, LinearNoiseScheduler

NBS = Path(__file__).parent.parent / "nbs"
linear, cosine = LinearNoiseScheduler(), CosineNoiseScheduler()


def cell(page, start):
    """The source of the one code cell of a page in which a line starts like this."""
    cells = json.loads((NBS / page).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    found = [s for s in sources if any(line.startswith(start) for line in s.splitlines())]
    found = [s for s in found if "#| eval: false" not in s]
    assert len(found) == 1, f"{page}: {len(found)} cells have a line that starts with {start!r}"
    return found[0]


def run_cells(page, *starts, **names):
    """What those cells define, given these names."""
    space = dict(math=math, torch=torch, linear=linear, cosine=cosine, **names)
    for start in starts:
        exec(compile(cell(page, start), f"{page}: {start}", "exec"), space)
    return space


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


def refused(message, call, *args, **kwargs):
    """The call raises a ValueError that says this."""
    with pytest.raises(ValueError) as said:
        call(*args, **kwargs)
    assert message in str(said.value)


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

"""Pages 14 and 16: what their graders say to the usual slips, and what the bridge and the doctor refuse."""

import math

import cells
import pytest
import torch

from ddpm_nb import diagnose as dg
from ddpm_nb import interop
from ddpm_nb.runs import load_denoiser
from ddpm_nb.sample import ddim_sample, timestep_walk
from ddpm_nb.scheduler import LinearNoiseScheduler
from ddpm_nb.train import DiffusionConfig, train_diffusion
from ddpm_nb.unet import ModelConfig, UNet


def run_cells(page, *starts, **names):
    """What those cells define, given these names and some that every page has."""
    return cells.run_cells(page, *starts, **dict(torch=torch), **names)


# ---- page 14: the bridge


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="page 14 is about it: pip install '.[interop]'")


PAGE_14 = "14_interop.ipynb"


def test_grader_of_sines_first(diffusers):
    page = run_cells(
        PAGE_14,
        "def awaken",
        "def grade_sines_first",
        "def sines_first",
        UNet2DModel=diffusers.UNet2DModel,
        ModelConfig=ModelConfig,
        _unet_fields=interop._unet_fields,
    )
    grade, right, key = page["grade_sines_first"], page["sines_first"], "time_embedding.linear_1."

    def changed(change):
        return lambda weights: {**weights, key + "weight": change(weights[key + "weight"])}

    assert grade(right).startswith("Correct")
    assert "reverses" in grade(changed(lambda w: w.flip(1)))
    assert "rows" in grade(changed(lambda w: torch.cat(w.chunk(2, 0)[::-1], 0)))
    assert "nothing has changed" in grade(lambda weights: weights)
    assert "nothing came back" in grade(lambda weights: None)
    assert "does not take it" in grade(changed(lambda w: w[:1]))
    assert f"{key}bias has changed" in grade(
        lambda weights: {**right(weights), key + "bias": weights[key + "bias"] + 1}
    )
    assert "raises KeyError" in grade(lambda weights: weights["time_embedding"])
    assert "apart" in grade(changed(lambda w: 2 * w))


def test_grader_of_offset(diffusers):
    page = run_cells(
        PAGE_14,
        "def visits",
        "def grade_offset",
        "def offset",
        DDIMScheduler=diffusers.DDIMScheduler,
        DDPMScheduler=diffusers.DDPMScheduler,
        schedules=dict(linear=LinearNoiseScheduler()),
        timestep_walk=timestep_walk,
    )
    grade = page["grade_offset"]
    assert grade(page["offset"]).startswith("Correct")
    assert "one too many" in grade(lambda steps: 1000 // steps)
    assert "Stable Diffusion" in grade(lambda steps: 1)
    assert "expected a whole number" in grade(lambda steps: None)
    assert "starts at 800, and should at 999" in grade(lambda steps: 0)


def test_two_words_for_one_thing(diffusers):
    small = ModelConfig.preset("digits")
    words = dict(
        act_fn="swish",
        sample_size=(8, 8),
        time_embedding_dim=128,
        attn_norm_num_groups=8,
        num_train_timesteps=1000,
    )
    assert interop._model_config(interop._unet_fields(small) | words) == small


SIX = dict(
    sample_size=64,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=4 * ("DownBlock2D",) + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + 4 * ("UpBlock2D",),
)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(sample_size=100), "sample_size: expected height and width, multiples of 32; got 100"),
        (dict(sample_size=(64, 100)), r"sample_size: .* multiples of 32; got \[64, 100\]"),
        (dict(sample_size=(64, 64, 64)), r"sample_size: .*; got \[64, 64, 64\]"),
        (dict(out_channels=6, gate="swiglu"), "out_channels: .* gate: expected 'no such field'"),
        (
            dict(block_out_channels=(48, 96, 96, 96, 96, 96)),
            "norm_num_groups: expected None, or a divisor of base_dim; got 32",
        ),
        (dict(layers_per_block=0), "num_res_blocks: expected a whole number of at least 1; got 0"),
        (dict(block_out_channels=()), "block_out_channels: expected one a level, 6; got"),
        (dict(down_block_types=()), "block_out_channels: expected one a level, 0; got"),
    ],
)
def test_networks_that_cannot_come_in(fields, said, diffusers):
    with pytest.raises(ValueError, match=said):
        interop._model_config(SIX | fields)


@pytest.mark.parametrize("size, blocks", [((2, 4), 1), (3, 3)])
def test_depth_and_sizes_cross_the_bridge(size, blocks, diffusers):
    torch.manual_seed(0)
    net = UNet(ModelConfig(size, [1, 2], [1], 16, channels=1, num_res_blocks=blocks)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs = interop.unet_to_diffusers(net)
    x, t = torch.randn(2, *net.config.picture_shape), torch.tensor([1, 700])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t - 1).sample, net(x, t), rtol=1e-4, atol=1e-5)
    back = interop.unet_from_diffusers(theirs)
    assert back.config == net.config
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())


def test_what_the_bridge_refuses(tmp_path, diffusers):
    denoiser = load_denoiser("digits")
    scheduler = denoiser.scheduler
    with pytest.raises(ValueError, match="unet: expected a diffusers UNet2DModel; got UNet"):
        interop.unet_from_diffusers(denoiser.net)
    with pytest.raises(ValueError, match="denoiser: expected a ddpm_nb Denoiser; got UNet"):
        interop.to_diffusers(denoiser.net)
    with pytest.raises(ValueError, match="variance: expected one of beta_tilde, beta, .*'?optimal"):
        interop.scheduler_to_diffusers(scheduler, "optimal")
    with pytest.raises(ValueError, match="variance: expected one of .*got Tensor"):
        interop.scheduler_to_diffusers(scheduler, torch.ones(3))
    learned = diffusers.DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="variance_type: expected fixed_small, fixed_large"):
        interop.scheduler_from_diffusers(learned)
    with pytest.raises(ValueError, match="source: expected a pipeline, its folder"):
        interop.from_diffusers(tmp_path)


def test_a_compiled_network_goes_out(diffusers):
    denoiser = load_denoiser("digits")
    model = denoiser.net
    denoiser.net = torch.compile(model)
    there, _ = interop.to_diffusers(denoiser)
    assert there.config.sample_size == 8
    again = interop.unet_from_diffusers(torch.compile(there))
    assert torch.equal(again.stem.weight, model.stem.weight)


# ---- page 16: troubleshooting

PAGE_16 = "16_troubleshooting.ipynb"


def test_grader_of_drawn_mean():
    page = run_cells(
        PAGE_16,
        "def grade_drawn_mean",
        "def drawn_mean",
        LinearNoiseScheduler=LinearNoiseScheduler,
        ddim_sample=ddim_sample,
        timestep_walk=timestep_walk,
    )
    grade = page["grade_drawn_mean"]
    assert grade(page["drawn_mean"]).startswith("Correct")
    assert "data's mean" in grade(lambda m, s, alpha: m)
    assert "stretches" in grade(lambda m, s, alpha: m - alpha**0.5 * m)
    assert "got 7.000" in grade(lambda m, s, alpha: 7.0)


def test_grader_of_parts_needed():
    page = run_cells(PAGE_16, "def grade_parts_needed", "def parts_needed")
    grade, right = page["grade_parts_needed"], page["parts_needed"]

    def forgets_fixed(batch_size, bytes_a_picture, fixed, memory):
        return right(batch_size, bytes_a_picture, 0.0, memory)

    def unequal(batch_size, bytes_a_picture, fixed, memory):
        return math.ceil(batch_size * bytes_a_picture / (memory - fixed))

    assert grade(right).startswith("Correct")
    assert "counted in every part" in grade(forgets_fixed)
    assert "not equal" in grade(unequal)
    assert "not even one picture fits" in grade(lambda *case: right(*case) or 8)
    assert "expected 4, got 16" in grade(lambda *case: case[0])


def test_training_refuses_what_would_end_in_grey_or_nan(tmp_path):
    network, config = ModelConfig(4, (1, 2), (), 8, channels=1), DiffusionConfig(out_dir=tmp_path)
    unit = torch.rand(64, 1, 8, 8)
    poisoned = 2 * unit - 1
    poisoned[17, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"looks like \[0, 1\]: use 2 \* x - 1"):
        train_diffusion(config, network, data=unit, progress=False)
    with pytest.raises(ValueError, match=r"expected pixels in \[-1, 1\]; got nan"):
        train_diffusion(config, network, data=poisoned, progress=False)


def test_verdicts_on_data_of_every_wrong_kind():
    x = 2 * torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    wrong = [(x + 1) / 2, 127.5 * (x + 1), 3 * x, x / 17 - 0.9, x.clone().fill_(torch.nan)]
    wrong.append(torch.cat([x[:, :2], x[:, :1] * 0 - 1], 1))  # one channel is the same everywhere
    assert [dg._check_data(v).wrong for v in (x, *wrong)] == [False] + [True] * 6

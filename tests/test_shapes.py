"""Pictures that are not square, 8 x 12, from files and from memory: to a trained network, its samples, grids and GIFs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_nb.data import flip, load_data, to_model_range
from ddpm_nb.images import grid_image, save_gif, save_pictures
from ddpm_nb.runs import load_denoiser
from ddpm_nb.sample import sample
from ddpm_nb.train import DiffusionConfig, train_diffusion
from ddpm_nb.unet import ModelConfig

WIDE = ModelConfig((4, 6), (1, 2), (1,), 8)


@pytest.fixture(scope="module")
def pictures():
    """Twelve slopes `(12, 3, 8, 12)`, dark above a horizon and bright below it; no row and no column is like its mirror image."""
    rows, columns = torch.arange(8).view(8, 1), torch.arange(12)
    x = torch.stack([20 + 110 * (rows > 1 + i % 6) + 8 * columns + i for i in range(12)])
    return x.unsqueeze(1).repeat(1, 3, 1, 1).to(torch.uint8)


def save(folder, pictures, change=lambda i, pixels: pixels):
    folder.mkdir()
    for i, x in enumerate(pictures):
        pixels = change(i, x.permute(1, 2, 0).numpy())
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:02d}.png")
    return folder


def train(folder, data=None, **fields):
    few = dict(timesteps_diff=50, max_steps=3, batch_size=4, log_every=1, sample_every=3)
    config = DiffusionConfig(
        **few, seed=1, precision="float32", use_augmentation=True, out_dir=str(folder), **fields
    )
    return train_diffusion(config, WIDE, data=data, progress=False, device="cpu")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The last checkpoints of two runs: pictures read from a folder, and the same given as a tensor."""
    tmp = tmp_path_factory.mktemp("runs")
    files = save(tmp / "pictures", pictures)
    return train(tmp / "files", dataset_name=str(files)), train(tmp / "memory", data=pictures)


def test_larger_pictures_are_brought_to_a_rectangle(pictures, tmp_path):
    """Twice as large, and with a frame that is cut off: at the sides, above and below, or none."""

    def larger(i, pixels):
        frame = [((0, 0), (8, 8), (0, 0)), ((4, 4), (0, 0), (0, 0)), ((0, 0),) * 3][i % 3]
        return np.pad(pixels.repeat(2, 0).repeat(2, 1), frame)

    data = load_data(str(save(tmp_path / "large", pictures, larger)), size=(8, 12))
    assert data.size == (8, 12) and data.inexact == "12 of 12 were resized to 8 x 12"
    for i, x in enumerate(pictures):
        assert data[i].shape == x.shape
        off = (data[i].float() - x).abs()[:, 1:-1, 1:-1].mean()  # the rim sees the frame
        moved = (data[i].float().roll(1, -1) - x).abs()[:, 1:-1, 1:-1].mean()
        assert off < 4 < moved, i


def test_training_on_a_rectangle(trained, pictures):
    """Three steps, whose log, grid and checkpoint are there; from files and from memory the same to the last bit."""
    files, memory = (load_file(path / "model.safetensors") for path in trained)
    assert files.keys() == memory.keys()
    assert all(torch.equal(files[name], memory[name]) for name in files)
    for path in trained:
        lines = (path.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
        saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert saved["model"]["lowest_resolution_size"] == [4, 6]
        with Image.open(path.parent / "samples" / "step-0000003.png") as grid:
            assert grid.size == (5 * (4 * 13 + 1), 5 * (4 * 9 + 1))  # 4 x 4 pictures, and lines
    assert torch.equal(
        flip(pictures, torch.ones(12).bool()), pictures[..., torch.arange(11, -1, -1)]
    )


def test_samples_of_a_rectangle(trained, tmp_path):
    denoiser = load_denoiser(trained[0].parent)
    assert denoiser.net.config == WIDE
    frames = []
    x = sample(
        denoiser, 5, steps=4, method="ddim", spacing="uniform",
        callback=lambda first, t_prev, x_prev, x0_pred: frames.append(x_prev),
    )  # fmt: skip
    assert x.shape == (5, 3, 8, 12) and x.isfinite().all() and x.std() > 0.1
    assert sample(denoiser, 2, steps=2).shape == (2, 3, 8, 12)
    save_pictures(x, tmp_path)
    back = load_data(str(tmp_path), size=WIDE.picture_size)
    assert (to_model_range(back[4]) - x[4]).abs().max() < 1 / 127
    save_gif(frames, tmp_path / "walk.gif")
    with Image.open(tmp_path / "walk.gif") as walk:
        assert walk.n_frames == 4 and walk.size == (5 * (3 * 13 + 1), 5 * (2 * 9 + 1))


def test_a_grid_of_rectangles(pictures):
    """Picture (row, column) stands where it should, each pixel enlarged, the lines white."""
    grid = np.asarray(grid_image(to_model_range(pictures), ncols=4))[::5, ::5]
    assert grid.shape == (3 * 9 + 1, 4 * 13 + 1, 3)
    for i, x in enumerate(pictures):
        top, left = 9 * (i // 4) + 1, 13 * (i % 4) + 1
        assert (grid[top : top + 8, left : left + 12] == x.permute(1, 2, 0).numpy()).all()
    assert (grid[::9] == 255).all() and (grid[:, ::13] == 255).all()


def test_pictures_of_another_size_are_refused(pictures, tmp_path):
    """Before the run's folder is made, and with both sizes."""
    for x, theirs in ((pictures.mT, "12 x 8"), (pictures[..., :8], "8 x 8")):
        with pytest.raises(ValueError) as e:
            train(tmp_path / "run", data=x)
        assert str(e.value) == f"size: expected that of pictures, {theirs}; got 8 x 12"
    low = save(tmp_path / "low", pictures, lambda i, pixels: pixels[: 8 - i % 2])
    with pytest.raises(ValueError, match="6 of 12 pictures in .* too small for 8 x 12"):
        train(tmp_path / "run", dataset_name=str(low))
    assert not (tmp_path / "run").exists()

"""The picture at the top of README.md: `python tools/hero.py [FILE]` draws figures/clothes_walk.png.

The reverse walk of the weights that ship under the name fashion_mnist_plain: a row a picture, a column a step. The first four
pictures of seed 0, not chosen. Half a minute on one core.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from ddpm_nb.runs import load_denoiser
from ddpm_nb.sample import sample

FILE = Path(__file__).parent.parent / "figures" / "clothes_walk.png"
STEPS, LEVELS = 50, (980, 700, 500, 360, 240, 140, 60, 0)  # of T = 1000


def walk(n: int = 4) -> torch.Tensor:
    """x_t of the first n pictures at the LEVELS: `(n, levels, h, w)` uint8."""
    seen = {}
    sample(
        load_denoiser("fashion_mnist_plain"),
        n,
        steps=STEPS,
        method="ancestral",
        spacing="uniform",
        seed=0,
        callback=lambda first, t_prev, x_prev, x0_pred: seen.update({t_prev: x_prev.cpu()}),
    )
    x = torch.cat([seen[t] for t in LEVELS], 1)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def draw(pictures: torch.Tensor, path, zoom: int = 3, gap: int = 4) -> None:
    """The pictures as a grey PNG, with nothing between them, so that they stand on white and on black."""
    rows, columns, h, w = pictures.shape
    grid = Image.new("LA", (columns * (zoom * w + gap) - gap, rows * (zoom * h + gap) - gap))
    for i in range(rows):
        for j in range(columns):
            small = Image.fromarray(pictures[i, j].numpy() // 8 * 8 + 3).convert("LA")
            place = (j * (zoom * w + gap), i * (zoom * h + gap))
            grid.paste(small.resize((zoom * w, zoom * h), Image.Resampling.NEAREST), place)
    grid.save(path, optimize=True)


if __name__ == "__main__":
    draw(walk(), sys.argv[1] if len(sys.argv) > 1 else FILE)

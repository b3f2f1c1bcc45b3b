"""The same network trained to answer with the noise, the picture or v: what does each find hard?

    python tools/predictions.py      # three runs of about a minute and a half, each on one core

Trains the digits preset for 800 steps with each prediction, from the same seed, and writes the
losses by t of the last 200 steps to nbs/logs/predictions.json and a row of 16 samples each to
figures/predictions.png. Page 02 shows both.
"""

import json
import tempfile
from pathlib import Path

import torch

from ddpm_nb.images import save_grid
from ddpm_nb.objective import PREDICTIONS
from ddpm_nb.runs import load_denoiser
from ddpm_nb.sample import sample
from ddpm_nb.train import DiffusionConfig, train_diffusion
from ddpm_nb.unet import ModelConfig

ROOT = Path(__file__).parent.parent
STEPS, LAST = 800, 200


def train(prediction, folder):
    "The losses by t of the last steps, and 16 samples."
    c = DiffusionConfig.preset(
        "digits",
        prediction=prediction,
        max_steps=STEPS,
        decay_start=STEPS // 4,
        decay_end=STEPS,
        precision="float32",
        out_dir=str(folder),
    )
    lines = []
    train_diffusion(
        c,
        ModelConfig.preset("digits"),
        progress=False,
        device="cpu",
        callback=lambda line, trainer: lines.append(line),
    )
    rows = [line["loss_by_t"] for line in lines if line["step"] > STEPS - LAST]
    by_t = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return by_t, sample(load_denoiser(folder), 16, seed=1)


def main():
    out = dict(preset="digits", steps=STEPS, averaged_over=LAST, seed=0)
    out |= dict(precision="float32", device="cpu", torch=torch.__version__.split("+")[0])
    out["loss_by_t"], rows = {}, []
    for prediction in PREDICTIONS:
        with tempfile.TemporaryDirectory() as folder:
            out["loss_by_t"][prediction], x = train(prediction, Path(folder) / "run")
        rows.append(x)
        print(prediction, [round(v, 4) for v in out["loss_by_t"][prediction]], flush=True)
    save_grid(torch.cat(rows), ROOT / "figures" / "predictions.png", ncols=16)
    log = ROOT / "nbs" / "logs" / "predictions.json"
    log.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()

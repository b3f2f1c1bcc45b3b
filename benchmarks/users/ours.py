"""Trains on a folder of pictures with ddpm_nb, and draws 16.

In these lines: pictures are read as they are needed, those that cannot be read are skipped by name;
the loss by t, the gradient's norm, speed and memory go into log.jsonl. A checkpoint is whole or not
there, Ctrl-C and SIGTERM save first, the three newest are kept, and a run that goes on ends with the
very weights of one that was never stopped; one whose settings differ is refused. bf16 where the
hardware has it. The same on several GPUs, by torchrun. The grid takes 20 steps of DPM-Solver++,
where the other two programs take 250 of theirs. (ddpm-train and ddpm-sample do all this without a
line.)
Not in these lines: networks other than Ho's, and a place to publish what was trained.
"""

import sys
from pathlib import Path

from ddpm_nb.device import pick_device
from ddpm_nb.images import save_grid
from ddpm_nb.runs import checkpoints, load_denoiser
from ddpm_nb.sample import sample
from ddpm_nb.train import DiffusionConfig, train_diffusion
from ddpm_nb.unet import ModelConfig


def main(folder, out, size=32, width=64, steps=20_000, batch=64, sample_steps=20, save_every=1000):
    network = ModelConfig(size // 4, (1, 2, 2), (1,), width)
    run = DiffusionConfig(
        dataset_name=str(folder),
        out_dir=str(out),
        learning_rate=1e-4,
        batch_size=batch,
        max_steps=steps,
        save_every=save_every,
    )
    train_diffusion(run, network, resume=bool(checkpoints(out)))
    denoiser = load_denoiser(out, pick_device())
    save_grid(sample(denoiser, 16, steps=sample_steps), Path(out) / "samples.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Trains on a folder of pictures with denoising-diffusion-pytorch, and draws 16.

In these lines: pictures are read as they are needed; a grid of samples is drawn beside every
checkpoint, sample-N.png beside model-N.pt; mixed precision and several GPUs by a flag and by
accelerate launch; FID as it trains, by another flag.
Not in these lines: a picture that cannot be read ends the run, and the loss is on the bar alone. A
run that is killed goes on from its last checkpoint without its random numbers and from the start of
an epoch; one that is killed while it writes has to have that file deleted by hand. Old checkpoints
stay, nothing is saved after the last multiple of save_every, and a checkpoint does not say which
network it holds. A folder must hold 100 pictures, and a batch 16. The network predicts v, on a
sigmoid schedule: the library's own choice.
"""

import sys
from pathlib import Path

from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet


def main(folder, out, size=32, width=64, steps=20_000, batch=64, sample_steps=250, save_every=1000):
    unet = Unet(dim=width, dim_mults=(1, 2, 2), full_attn=(False, True, False))
    diffusion = GaussianDiffusion(unet, image_size=size, sampling_timesteps=sample_steps)
    trainer = Trainer(
        diffusion,
        folder,
        results_folder=out,
        train_lr=1e-4,
        train_batch_size=batch,
        train_num_steps=steps,
        save_and_sample_every=save_every,
        num_samples=16,
        augment_horizontal_flip=False,
        calculate_fid=False,
    )
    if saved := [int(file.stem.removeprefix("model-")) for file in Path(out).glob("model-*.pt")]:
        trainer.load(max(saved))
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])

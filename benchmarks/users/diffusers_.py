"""Trains on a folder of pictures with diffusers, and draws 16.

The loop of its tutorial on unconditional generation, with accelerate; the average and the
checkpoints as in its example script.
In these lines: every choice is in sight and can be changed. The result is a pipeline's folder, which
every tool of the ecosystem reads. Mixed precision and several GPUs, by accelerate launch.
Not in these lines: pictures are .png alone and held in memory, and one that cannot be read ends the
run; the loss is on the bar alone. A run that is killed goes on from its last checkpoint, the random
numbers too, but from the start of an epoch; one that is killed while it writes has to have that
checkpoint deleted by hand. Old checkpoints stay.
"""

import sys
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T
from tqdm import tqdm


def main(folder, out, size=32, width=64, steps=20_000, batch=64, sample_steps=250, save_every=1000):
    prepare = T.Compose(
        [T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize([0.5], [0.5])]
    )
    files = sorted(Path(folder).rglob("*.png"))
    pictures = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    loader = DataLoader(pictures, batch_size=batch, shuffle=True, drop_last=True)
    model = UNet2DModel(
        sample_size=size,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ema = EMAModel(model.parameters(), decay=0.9999)

    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(ema)
    if saved := sorted(Path(out).glob("checkpoint-*")):
        accelerator.load_state(saved[-1])
    ema.to(accelerator.device)

    batches = chain.from_iterable(repeat(loader))
    bar = tqdm(range(ema.optimization_step, steps))
    for step in bar:
        x0 = next(batches)
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),), device=x0.device)
        noise_pred = model(scheduler.add_noise(x0, noise, t), t).sample
        loss = F.mse_loss(noise_pred, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        bar.set_postfix(loss=loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            accelerator.save_state(Path(out) / f"checkpoint-{step + 1:07d}")

    ema.copy_to(model.parameters())
    pipeline = DDPMPipeline(accelerator.unwrap_model(model), scheduler)
    pipeline.save_pretrained(out)
    drawn = pipeline(batch_size=16, num_inference_steps=sample_steps).images
    make_image_grid(drawn, rows=4, cols=4).save(Path(out) / "samples.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

"The three libraries' steps, each on a network of the size that the command line asks for."

import importlib.util
import sys

import torch
import torch.nn.functional as F

from ddpm_nb.data import PictureData
from ddpm_nb.device import autocast, float32_products
from ddpm_nb.objective import Denoiser
from ddpm_nb.sample import sample
from ddpm_nb.scheduler import LinearNoiseScheduler
from ddpm_nb.train import DiffusionConfig, Trainer, step_draws
from ddpm_nb.unet import ModelConfig, UNet


class Ours:
    "The library's own steps."

    package = "ddpm_nb.train"
    parts = ("train", "sample", "randomness", "ema")

    def __init__(self, args, precision, best=False):
        compile = "on" if best else "off"  # the layout is channels_last anyway
        config = DiffusionConfig(batch_size=args.batch, precision=precision, compile=compile)
        data = PictureData(torch.randint(0, 256, picture_shape(args), dtype=torch.uint8))
        denoiser = config.new_denoiser(model_config(args)).to(args.device)
        self.trainer = Trainer(denoiser, data, config, optimizer=adam(denoiser.net))
        self.precision, self.steps, self.walk = precision, 0, walk_length(args)
        self.model = randomise(self.trainer.model)
        self.pictures = data.pictures
        self.xt = torch.randn(self.pictures.shape, device=self.trainer.device)

    def forget_average(self):
        self.trainer.ema = self.trainer.averaged = None

    def train(self):
        self.steps += 1
        self.trainer.step(self.steps, self.trainer.batch(self.steps, self.pictures))

    def sample(self):
        sample(
            self.trainer.denoiser,
            len(self.xt),
            shape=self.xt.shape[1:],
            steps=self.walk,
            method="ancestral",
            spacing="uniform",
            batch_size=len(self.xt),
            precision=self.precision,
        )

    def randomness(self):
        "What a step draws, and the noise it adds."
        c, x0 = self.trainer.config, self.xt
        t, _, noise = step_draws(c.seed, self.steps, len(x0), c.timesteps_diff, x0.shape[1:])
        self.trainer.scheduler.add_noise(x0, noise.to(x0.device), t.to(x0.device))

    def ema(self):
        self.trainer.ema.update(self.steps)


class Diffusers:
    "diffusers' network and scheduler, with our weights and optimiser, in its tutorial's loop."

    package = "diffusers.pipelines.ddpm.pipeline_ddpm"
    parts = ("train", "sample")

    def __init__(self, args, precision, best=False):
        from ddpm_nb.interop import to_diffusers

        ours = Denoiser(randomise(UNet(model_config(args))), LinearNoiseScheduler(1000))
        self.model, self.scheduler = to_diffusers(ours)
        self.model.to(args.device, memory_format=layout(best))
        self.network = torch.compile(self.model) if best else self.model
        self.precision, self.walk = precision, walk_length(args)
        self.optimizer = adam(self.model)
        self.x0 = torch.randn(picture_shape(args), device=args.device)

    def forget_average(self):
        pass  # there is none

    def train(self):
        noise = torch.randn_like(self.x0)
        t = torch.randint(0, 1000, (len(self.x0),), device=self.x0.device)
        xt = self.scheduler.add_noise(self.x0, noise, t)
        with float32_products(self.x0.device, self.precision):
            with autocast(self.x0.device, self.precision):
                noise_pred = self.network(xt, t).sample
            F.mse_loss(noise_pred.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self):
        x = torch.randn_like(self.x0)
        for t in self.scheduler.timesteps[: self.walk]:
            with autocast(x.device, self.precision):
                noise_pred = self.network(x, t).sample
            x = self.scheduler.step(noise_pred.float(), t, x).prev_sample
        x.clamp(-1, 1).cpu()


class Lucidrains:
    "denoising-diffusion-pytorch at the nearest size, stepped as by its Trainer."

    package = "denoising_diffusion_pytorch"
    parts = ("train", "sample")

    def __init__(self, args, precision, best=False):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        c = model_config(args)
        unet = Unet(
            dim=c.base_dim,
            dim_mults=c.dim_multiply,
            channels=c.channels,
            full_attn=tuple(i in c.transformer_layers for i in range(len(args.widths))),
        )
        kind = dict(objective="pred_noise", beta_schedule="linear")
        self.model = GaussianDiffusion(unet, image_size=args.size, **kind).to(args.device)
        self.model.to(memory_format=layout(best))
        self.precision, self.walk = precision, walk_length(args)
        self.average = EMA(self.model, beta=0.995, update_every=10)
        self.optimizer = adam(self.model)
        self.x0 = torch.rand(picture_shape(args), device=args.device)
        if best:
            unet.compile()

    def forget_average(self):
        self.average = None

    def train(self):
        with float32_products(self.x0.device, self.precision):
            with autocast(self.x0.device, self.precision):
                loss = self.model(self.x0)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()

    def sample(self):
        x = torch.randn_like(self.x0)
        with autocast(x.device, self.precision):
            for t in reversed(range(1000 - self.walk, 1000)):
                x, _ = self.model.p_sample(x, t)
        x.clamp(-1, 1).cpu()


SIDES = dict(ours=Ours, diffusers=Diffusers, lucidrains=Lucidrains)


def layout(best):
    return torch.channels_last if best else torch.contiguous_format


def adam(model):
    "The optimiser of all sides."
    return torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)


def installed(side):
    return importlib.util.find_spec(SIDES[side].package.split(".")[0]) is not None


def walk_length(args):
    "How many steps of sampling are timed in one piece."
    return 3 * args.steps


def picture_shape(args):
    return (args.batch, args.channels, args.size, args.size)


def model_config(args):
    "Our network, from the command line."
    base, levels = args.widths[0], len(args.widths)
    attention = [i for i in range(levels) if args.size // 2**i == args.attention]
    lowest = args.size // 2 ** (levels - 1)
    return ModelConfig(lowest, [w // base for w in args.widths], attention, base, args.channels)


def randomise(model):
    "The same weights every time; none is zero, as at initialisation, where every answer is zero."
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.5  # no layer drowns another
        p.data.copy_(scale * torch.randn(p.shape, generator=g))
    return model


@torch.no_grad()
def check_same(ours, theirs, shape, device):
    "Stops the run if the two networks do not answer the same."
    x, t = torch.randn(shape, device=device), torch.randint(1, 1001, shape[:1], device=device)
    with float32_products(device, "float32"):
        a, b = ours(x, t), theirs(x, t - 1).sample
    error = float((a - b).abs().max() / a.abs().max())
    if not error < 1e-4:
        sys.exit(f"ours and diffusers' network should answer the same, and differ by {error:.1e}")

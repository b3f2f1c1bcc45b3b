"""Small networks that tests share."""

from dataclasses import replace

import torch

from ddpm_nb.runs import load_denoiser
from ddpm_nb.unet import ModelConfig, UNet

PLAIN = ModelConfig(4, (1, 2), (1,), 16, channels=1)
TEN = replace(PLAIN, num_classes=10)


def unlabelled(name):
    "A network that ships, without classes: one that knows some hears no label, always."
    denoiser = load_denoiser(name)
    if denoiser.net.config.num_classes is not None:
        denoiser.net = denoiser.net.for_label()
    return denoiser


def awake(config, seed=0):
    "A network with no zeros in it, whose labels count."
    torch.manual_seed(seed)
    net = UNet(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net

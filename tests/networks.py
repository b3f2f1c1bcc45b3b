"""Small networks that tests share."""

from dataclasses import replace

import torch

from ddpm_nb.unet import ModelConfig, UNet

PLAIN = ModelConfig(4, (1, 2), (1,), 16, channels=1)
TEN = replace(PLAIN, num_classes=10)


def awake(config, seed=0):
    "A network with no zeros in it, whose labels count."
    torch.manual_seed(seed)
    net = UNet(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net

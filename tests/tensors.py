"""Random tensors, plain-Python probabilities, small videos and models that several tests need."""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from common import backbones
from common.io.models import save_model
from common.modality import MODALITIES


def random(*shape, seed=0, scale=3.0):
    """Normal random numbers, float32."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    """Random uint8 values."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def sigmoid(row):
    return [1 / (1 + math.exp(-v)) for v in row]


def naive_cross_entropy(logits, y):
    """The mean over the clips of -log p of the label; logits (B, K), y (B,) integers."""
    return sum(-math.log(softmax(row)[k]) for row, k in zip(logits.tolist(), y.tolist(), strict=True)) / len(
        y
    )


def picture_folder(path, frames):
    """A lossless video: a folder of numbered PNG files of uint8 frames (T, H, W, 3)."""
    path.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(np.asarray(frame)).save(path / f"{i:03d}.png", compress_level=1)


def save_tiny_model(path, recipe, classes, name="tsm10", seed=0, always=None):
    """Write the model.pt of a tiny network, which with `always` predicts that class; returns the network."""
    torch.manual_seed(seed)
    channels = MODALITIES[recipe.modality].channels
    build = dict(name=name, classes=len(classes), in_channels=channels, width=1 / 16)
    net = backbones.build(**build)
    nn.init.normal_(net.fc.weight, std=2.0)  # predictions that differ from video to video
    if always is not None:
        nn.init.constant_(net.fc.bias[always], 99.0)
    save_model(path, net, build, classes, recipe)
    return net.eval()

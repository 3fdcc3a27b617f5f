"""Optimisers by name, and the learning rate as a function of the step."""

import math

import torch


def build(name, parameters, lr, weight_decay):
    """sgd (momentum 0.9) or adamw."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)


def set_lr(optimizer, lr):
    """The learning rate of every group. It follows from the step, so that no resumption can lose it."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def warmup_cosine(step, total, warmup=0.0, first=0.0):
    """Half a cosine from 1 to 0 over `total` steps, times a line from `first` to 1 over `warmup` steps."""
    rise = first + (1 - first) * min(1.0, (step + 1) / max(1.0, warmup))
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))

"""Optimisers by name, and the learning rate as a function of the step."""

import math

import torch


def build(name, parameters, lr, weight_decay, fused=None):
    """sgd (momentum 0.9) or adamw; parameters may be groups, as torch.optim has them.

    fused: in one pass over memory, for networks whose steps are short; the last bits are others.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=fused)
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused)


def steps_of(epochs, epoch):
    """How many steps `epochs` are, of `epoch` steps each: none for 0, otherwise at least one."""
    return max(1, round(epochs * epoch)) if epochs else 0


def scaled_lr(lr, batch, reference, clips="clips"):
    """The learning rate of a step by the linear rule (Goyal et al. 2017, Sec. 2.1), and words that say both.

    lr: the rate for steps of `reference` clips; batch: the clips of a step; both count those of all ranks.
    clips: what is counted.
    """
    rate = lr * batch / reference
    return rate, f"learning rate {rate:.4g} = {lr:g} x {batch} / {reference} {clips} of a step"


def set_lr(optimizer, lr):
    """The learning rate of every group, times its "lr_factor" if it has one.

    It follows from the step, so that no resumption can lose it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def warmup_cosine(step, total, warmup=0.0, first=0.0):
    """Half a cosine from 1 to 0 over `total` steps, times a line from `first` to 1 over `warmup` steps."""
    return _rise(step, warmup, first) * 0.5 * (1 + math.cos(math.pi * step / total))


def warmup_steps(step, milestones, warmup=0.0, first=0.0):
    """1, a tenth of that from the first of `milestones` on, and so forth; times the line of warmup_cosine."""
    return _rise(step, warmup, first) * 0.1 ** sum(step >= milestone for milestone in milestones)


def schedule(step, total, epoch, milestones, warmup=0.0):
    """warmup_steps at `milestones`, or warmup_cosine if there are none; both and `warmup` in epochs."""
    if milestones:
        return warmup_steps(step, [round(e * epoch) for e in milestones], warmup * epoch)
    return warmup_cosine(step, total, warmup * epoch)


def _rise(step, warmup, first):
    return first + (1 - first) * min(1.0, (step + 1) / max(1.0, warmup))

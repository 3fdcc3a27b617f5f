"""Convolutions that avoid faults of oneDNN, torch's library for the CPU.

oneDNN 3.12 of torch 2.14.1 reads and writes beyond the ends of tensors when it computes the weight gradients
of two kinds of convolutions: the gradients are wrong, or the process dies sooner or later.
`python tests/bench/onednn.py --plain` shows it. The two classes here compute the same in another way.
"""

import torch.nn.functional as F
from torch import nn


class Subsampled(nn.Conv2d):
    """A convolution of 1 x 1 whose stride is taken before it."""

    def forward(self, x):
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


class Padded(nn.Conv3d):
    """A convolution before which clips are padded in time, unless they have more frames than its kernel."""

    def forward(self, x):
        t, *padding = self.padding
        if x.shape[2] >= self.kernel_size[0] + self.stride[0] - 1:
            return super().forward(x)
        return F.conv3d(F.pad(x, (0, 0, 0, 0, t, t)), self.weight, self.bias, self.stride, (0, *padding))


def avoid_onednn_faults(module: nn.Module) -> None:
    """Turn a convolution that oneDNN computes wrongly into one of the classes above; others stay."""
    if type(module) is nn.Conv2d:  # in channels_last, uxlfoundation/oneDNN issue 6035
        if module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels < 16:
            module.__class__ = Subsampled
    elif type(module) is nn.Conv3d:  # seen with a kernel of 7, a stride of 2 and clips of 5 to 7 frames
        if module.padding[0] > module.stride[0] > 1:
            module.__class__ = Padded

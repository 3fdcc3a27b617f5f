"""Views of a clip: uint8 (T, C, H, W) in, uint8 (T, C, H', W') out, the same for all its frames.

Any memory layout gives the same result; crops are fastest on frames as decoded (THWC memory). All
randomness comes from torch's default generator, which the caller seeds. A crop and the resize before it are
one resample (antialiased bilinear) of the cropped region. Sizes are pixels.

Usual names in papers: T_standard is jitter_crop + random_flip (SlowFast), T_weak is resize_crop,
T_strong is a crop + rand_augment + cutout (FixMatch). The scripts compose them.
"""

import functools
import math

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V


def _integer(low: int, high: int) -> int:
    """One of low..high, both included."""
    return int(torch.randint(low, high + 1, ()))


def _side(clip, size, short_side):
    """Side of the region that shows as `size` pixels after the short side became `short_side`."""
    short = min(clip.shape[-2:])
    return max(1, min(short, round(size * short / short_side)))


# ------------------------------------------------------------------------------------------- space


def jitter_crop(clip: torch.Tensor, size: int = 224, short=(256, 320)) -> torch.Tensor:
    """Resize the short side to a random integer in `short`, both ends included; cut a random square."""
    side = _side(clip, size, _integer(*short))
    H, W = clip.shape[-2:]
    return V.resized_crop(clip, _integer(0, H - side), _integer(0, W - side), side, side, [size, size])


def resize_crop(clip: torch.Tensor, size: int = 224, short_side: int = 256) -> torch.Tensor:
    """Resize the short side to `short_side`, cut the central square. Nothing is random."""
    side = _side(clip, size, short_side)
    H, W = clip.shape[-2:]
    return V.resized_crop(clip, (H - side) // 2, (W - side) // 2, side, side, [size, size])


def stretched_crop(clips: list, size=112, stretch=(128, 171), at: float | None = None) -> list[torch.Tensor]:
    """Resize to `stretch`, (height, width), whatever the aspect ratio; cut a square (Tran et al. 2018).

    The square is the same for all clips: one scene in any resolutions. It is random, or in the middle of
    the height and at the left (at = 0), middle (0.5) or right (1) of the width. Raises ValueError if `size`
    is larger than `stretch`.
    """
    if size > min(stretch):
        raise ValueError(f"a crop of {size} pixels does not fit in {stretch[0]} x {stretch[1]}")
    rows, columns = (side - size for side in stretch)
    top, left = (_integer(0, rows), _integer(0, columns)) if at is None else (rows // 2, int(columns * at))
    crops = []
    for clip in clips:
        h, w = (side / goal for side, goal in zip(clip.shape[-2:], stretch, strict=True))
        height, width = max(1, round(size * h)), max(1, round(size * w))
        y, x = min(round(top * h), clip.shape[-2] - height), min(round(left * w), clip.shape[-1] - width)
        crops.append(V.resized_crop(clip, y, x, height, width, [size, size]))
    return crops


def random_resized_crop(clip: torch.Tensor, size=224, scale=(0.08, 1), ratio=(3 / 4, 4 / 3)) -> torch.Tensor:
    """A random region, of a share of the area and an aspect ratio in these ranges, resized to a square."""
    return v2.RandomResizedCrop(size, scale, ratio)(clip)


# Crops of TSN: quarters of the free space that are above and to the left of the crop.
PLACES = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]


def multi_scale_crop(clips: list, size=224, scales=(1.0, 0.875, 0.75, 0.66)) -> list[torch.Tensor]:
    """TSN's crop (Wang et al. 2016, section 3.2), the same for all clips: one scene in any resolutions.

    Width and height are two of `scales`, equal or next to each other, times the short side. The place is
    one of the 13 PLACES: corners, middles of sides, centre, and the points between centre and corners.
    """
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) < 2]
    tall, wide = pairs[_integer(0, len(pairs) - 1)]
    row, column = PLACES[_integer(0, len(PLACES) - 1)]
    crops = []
    for clip in clips:
        H, W = clip.shape[-2:]
        h, w = (max(1, round(min(H, W) * share)) for share in (tall, wide))
        top, left = (H - h) * row // 4, (W - w) * column // 4
        crops.append(V.resized_crop(clip, top, left, h, w, [size, size]))
    return crops


def random_flip(clip: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    """Mirror left and right with probability p; not for data whose labels it changes."""
    return V.horizontal_flip(clip) if torch.rand(()) < p else clip


def three_crops(clip: torch.Tensor, size: int = 256) -> list[torch.Tensor]:
    """The squares at the start, middle and end of the long side, resized to `size`; one of a square clip."""
    H, W = clip.shape[-2:]
    side, spare = min(H, W), abs(H - W)
    starts = [(0, 0), (spare // 2, 0), (spare, 0)] if H > W else [(0, 0), (0, spare // 2), (0, spare)]
    return [V.resized_crop(clip, *start, side, side, [size, size]) for start in starts[: 3 if spare else 1]]


# ------------------------------------------------------------------------------ strong augmentation


def _in_chunks(op, clip):
    """op on 4 frames at a time, so that its temporary tensors stay in the cache."""
    return torch.cat([op(frames) for frames in clip.split(4)])


def _uint8(x):
    """A float clip as uint8, in place; the way over int16 takes half the time."""
    return x.clamp_(0, 255).to(torch.int16).to(torch.uint8)


def _blend(frames, other, ratio):
    return _uint8(frames.float().mul_(ratio).add_(other, alpha=1 - ratio))


def _grey(frames):
    """(T, 1, H, W) float, whole levels."""
    red, green, blue = frames.float().unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _contrast(clip, factor):
    mean = _in_chunks(_grey, clip).mean()
    return _in_chunks(lambda frames: _blend(frames, mean, factor), clip)


def _sharpness(frames, factor):
    """Blend with the rounded mean of 3 x 3 pixels, the middle one counted five times; the rim stays."""
    x, levels = frames.float(), frames.to(torch.int16)
    total = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
    total = total[..., :-2, :] + total[..., 1:-1, :] + total[..., 2:, :] + 4 * levels[..., 1:-1, 1:-1]
    blurred, inside = total.float().mul_(1 / 13).round_(), x[..., 1:-1, 1:-1]
    inside.add_(blurred.sub_(inside), alpha=1 - factor)
    return _uint8(x)


def _solarize(clip, threshold):
    below = (clip.to(torch.int16) - threshold).bitwise_right_shift_(15).to(torch.uint8)  # 255, otherwise 0
    return below.bitwise_not_().bitwise_xor_(clip)


def _autocontrast(clip):
    low, high = (level.view(-1, 1, 1).float() for level in (clip.amin((0, 2, 3)), clip.amax((0, 2, 3))))
    scale = torch.where(high > low, (high - low) * (1 / 255), 1.0)
    low = torch.where(high > low, low, 0.0)
    return _in_chunks(lambda frames: _uint8(frames.float().sub_(low).div_(scale)), clip)


def _equalize(clip):
    planes = clip.transpose(0, 1).flatten(1)  # (C, T H W)
    counts = torch.stack([plane.bincount(minlength=256) for plane in planes])  # (C, 256)
    cumulative = counts.cumsum(1)
    step = (planes.shape[1] - counts.gather(1, cumulative.argmax(1, keepdim=True))) // 255
    table = ((cumulative - counts + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256)).to(torch.uint8).flatten()
    first = 256 * torch.arange(len(planes), dtype=torch.int32).view(-1, 1, 1)  # of a channel, in the table
    return _in_chunks(lambda x: table.index_select(0, x.int().add_(first).flatten()).view(x.shape), clip)


def _warp(clip, move):
    """Move the pixels of all frames as `move`, an operation of torchvision, moves the pixels' numbers."""
    T, C, H, W = clip.shape
    source = move(torch.arange(1.0, H * W + 1).view(1, H, W)).long().view(1, -1)  # 0 is outside
    planes = clip.reshape(T * C, H * W).gather(1, (source - 1).clamp_(min=0).expand(T * C, -1))
    return planes.mul_((source > 0).to(torch.uint8)).view(clip.shape)


def _shear(clip, x, y):  # x, y: pixels per pixel, from the top left corner as in AutoAugment
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _warp(clip, lambda picture: V.affine(picture, 0.0, [0, 0], 1.0, degrees, center=[0, 0]))


# RandAugment's operations at strength v in [-1, 1], with the ranges of torchvision's RandAugment and its
# pixels, but with the colour statistics of the clip in place of a frame's. Uncovered pixels are black.
OPERATIONS = {
    "identity": lambda x, v: x,
    "shear_x": lambda x, v: _shear(x, 0.3 * v, 0.0),
    "shear_y": lambda x, v: _shear(x, 0.0, 0.3 * v),
    "translate_x": lambda x, v: V.crop(x, 0, int(150 / 331 * x.shape[3] * v), *x.shape[2:]),
    "translate_y": lambda x, v: V.crop(x, int(150 / 331 * x.shape[2] * v), 0, *x.shape[2:]),
    "rotate": lambda x, v: _warp(x, lambda picture: V.rotate(picture, 30 * v)),
    "brightness": lambda x, v: _in_chunks(lambda y: _blend(y, 0.0, 1 + 0.9 * v), x),
    "color": lambda x, v: _in_chunks(lambda y: _blend(y, _grey(y), 1 + 0.9 * v), x),
    "contrast": lambda x, v: _contrast(x, 1 + 0.9 * v),
    "sharpness": lambda x, v: _in_chunks(lambda y: _sharpness(y, 1 + 0.9 * v), x),
    "posterize": lambda x, v: V.posterize(x, 8 - round(4 * abs(v))),
    "solarize": lambda x, v: _solarize(x, round(255 * (1 - abs(v)))),
    "autocontrast": lambda x, v: _autocontrast(x),
    "equalize": lambda x, v: _equalize(x),
}


def rand_augment(clip: torch.Tensor, num_ops: int = 2, magnitude: float = 9) -> torch.Tensor:
    """RandAugment (Cubuk et al. 2020), drawn once per clip; RGB only.

    `num_ops` times one of OPERATIONS, with a strength uniform over 0 to magnitude / 10, and a sign.
    FixMatch's code draws strengths, too, over the whole range; v2.RandAugment has the fixed magnitude / 30.
    """
    clip = clip.contiguous()
    for _ in range(num_ops):
        op = list(OPERATIONS.values())[_integer(0, len(OPERATIONS) - 1)]
        strength, sign = torch.rand(2).tolist()
        clip = op(clip, math.copysign(strength * magnitude / 10, sign - 0.5))
    return clip.contiguous()


def cutout(clip: torch.Tensor, size: int) -> torch.Tensor:
    """A grey (127) square of side `size` at one place of all frames (DeVries and Taylor 2017).

    Its centre is any pixel, so that a part of it may lie outside. FixMatch's side is half the picture's.
    """
    H, W = clip.shape[-2:]
    top, left = _integer(0, H - 1) - size // 2, _integer(0, W - 1) - size // 2
    clip = clip.clone()
    clip[..., max(0, top) : top + size, max(0, left) : left + size] = 127
    return clip


@functools.cache  # made anew in every step, they would make the host wait for the GPU
def _scale_and_shift(mean, std, device):
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    both = torch.stack([1 / (255 * std), -mean / std]).float().to(device)
    return both.view(2, -1, 1, 1, 1)  # (2, C, 1, 1, 1)


def normalise(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 or int16 (B, T, C, H, W) to float32 (B, C, T, H, W), contiguous: (x / 255 - mean) / std.

    `mean` and `std` have C values, or one for all channels, in units of the white level.
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), x.device)
    x = x.transpose(1, 2)  # (B, C, T, H, W)
    return x.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)

"""Views of a clip: uint8 (T, C, H, W) in, uint8 (T, C, H', W') out, the same for all its frames.

Any memory layout gives the same result; frames as decoded (THWC memory) are the fast one for the
crops. All randomness comes from torch's default generator, which the caller seeds. A crop and the
resize before it are one resample (antialiased bilinear) of the cropped region. Sizes are pixels.

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


def _square(clip, top, left, side, size):
    return V.resized_crop(clip, top, left, side, side, [size, size], antialias=True)


def _side(clip, size, short_side):
    """Side of the region that shows as `size` pixels after the short side became `short_side`."""
    short = min(clip.shape[-2:])
    return max(1, min(short, round(size * short / short_side)))


# ------------------------------------------------------------------------------------------- space


def jitter_crop(clip: torch.Tensor, size: int = 224, short=(256, 320)) -> torch.Tensor:
    """Resize the short side to a random length, cut a random square (T_standard without the flip).

    The length is uniform over the integers of `short`, both ends included.
    """
    side = _side(clip, size, _integer(*short))
    H, W = clip.shape[-2:]
    return _square(clip, _integer(0, H - side), _integer(0, W - side), side, size)


def resize_crop(clip: torch.Tensor, size: int = 224, short_side: int = 256) -> torch.Tensor:
    """Resize the short side to `short_side`, cut the central square (T_weak). Nothing random."""
    side = _side(clip, size, short_side)
    H, W = clip.shape[-2:]
    return _square(clip, (H - side) // 2, (W - side) // 2, side, size)


def stretched_crop(
    clips: list[torch.Tensor], size: int = 112, stretch: tuple[int, int] = (128, 171), at: float | None = None
) -> list[torch.Tensor]:
    """Resize to `stretch`, height and width, whatever the shape; cut a square, at random or where `at` says.

    at: 0 is the left, 0.5 the middle and 1 the right of the width, in the middle of the height. The crop is
    the same of all clips, which show one scene in a resolution of their own. So Tran et al. 2018 and many
    after them see videos. Raises ValueError if the square is larger than `stretch`.
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
        crops.append(V.resized_crop(clip, y, x, height, width, [size, size], antialias=True))
    return crops


def random_resized_crop(
    clip: torch.Tensor,
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """A random region of this share of the area and this aspect ratio, resized to a square."""
    return v2.RandomResizedCrop(size, scale, ratio, antialias=True)(clip)


# Of `multi_scale_crop`, in quarters of what is left above and to the left.
PLACES = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]


def multi_scale_crop(
    clips: list[torch.Tensor], size: int = 224, scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
) -> list[torch.Tensor]:
    """TSN's crop (Wang et al. 2016, section 3.2), the same of all clips, which show one scene.

    Width and height are two of `scales`, equal or next to each other, times the short side; the place is
    one of 13, on a grid of quarters of what is left: corners, middles of sides, centre, and the points
    between centre and corners. Each clip may have a resolution of its own.
    """
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) < 2]
    tall, wide = pairs[_integer(0, len(pairs) - 1)]
    row, column = PLACES[_integer(0, len(PLACES) - 1)]
    crops = []
    for clip in clips:
        H, W = clip.shape[-2:]
        h, w = (max(1, round(min(H, W) * share)) for share in (tall, wide))
        top, left = (H - h) * row // 4, (W - w) * column // 4
        crops.append(V.resized_crop(clip, top, left, h, w, [size, size], antialias=True))
    return crops


def random_flip(clip: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    """Mirror left and right with probability p; not for data whose labels it changes."""
    return V.horizontal_flip(clip) if torch.rand(()) < p else clip


def three_crops(clip: torch.Tensor, size: int = 256) -> list[torch.Tensor]:
    """The squares at the start, the middle and the end of the long side, each resized to `size`.

    A square clip gives one crop: three equal ones would cost three times and change no average.
    """
    H, W = clip.shape[-2:]
    side = min(H, W)
    spare = max(H, W) - side
    starts = [0, spare // 2, spare] if spare else [0]
    return [_square(clip, s if H > W else 0, s if W > H else 0, side, size) for s in starts]


# ------------------------------------------------------------------------------ strong augmentation


def _one_picture(op, clip):
    """op on the frames as one tall picture: one colour map, from the statistics of the clip."""
    T, C, H, W = clip.shape
    return op(clip.transpose(0, 1).reshape(C, T * H, W)).view(C, T, H, W).transpose(0, 1)


def _sharpness(clip, factor):  # copies included, half the time in THWC memory
    thwc = clip.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return V.adjust_sharpness(thwc, factor).contiguous()


def _solarize(clip, threshold):  # inverts what is not below; ten times as fast as v2's
    return (clip >= threshold).to(torch.uint8).neg_().bitwise_xor_(clip)


def _shear(clip, x, y):  # x, y: pixels per pixel, from the top left corner as in AutoAugment
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return V.affine(clip, 0.0, [0, 0], 1.0, degrees, center=[0, 0])


# RandAugment's operations at strength v in [-1, 1], with the ranges of torchvision's RandAugment.
# Geometry takes the nearest pixel, and what it uncovers is black.
OPERATIONS = {
    "identity": lambda x, v: x,
    "shear_x": lambda x, v: _shear(x, 0.3 * v, 0.0),
    "shear_y": lambda x, v: _shear(x, 0.0, 0.3 * v),
    "translate_x": lambda x, v: V.crop(x, 0, int(150 / 331 * x.shape[3] * v), *x.shape[2:]),
    "translate_y": lambda x, v: V.crop(x, int(150 / 331 * x.shape[2] * v), 0, *x.shape[2:]),
    "rotate": lambda x, v: V.rotate(x, 30 * v),
    "brightness": lambda x, v: V.adjust_brightness(x, 1 + 0.9 * v),
    "color": lambda x, v: V.adjust_saturation(x, 1 + 0.9 * v),
    "contrast": lambda x, v: _one_picture(lambda y: V.adjust_contrast(y, 1 + 0.9 * v), x),
    "sharpness": lambda x, v: _sharpness(x, 1 + 0.9 * v),
    "posterize": lambda x, v: V.posterize(x, 8 - round(4 * abs(v))),
    "solarize": lambda x, v: _solarize(x, round(255 * (1 - abs(v)))),
    "autocontrast": lambda x, v: _one_picture(V.autocontrast, x),
    "equalize": lambda x, v: _one_picture(V.equalize, x),
}


def rand_augment(clip: torch.Tensor, num_ops: int = 2, magnitude: float = 9) -> torch.Tensor:
    """RandAugment (Cubuk et al. 2020), drawn once per clip; RGB only.

    Each of `num_ops` times: one of OPERATIONS, a strength uniform over 0 to magnitude / 10, a sign.
    FixMatch's code draws strengths too, over the whole range; v2.RandAugment has the fixed strength
    magnitude / 30.
    """
    clip = clip.contiguous()  # what all operations but sharpness are fastest on
    for _ in range(num_ops):
        op = list(OPERATIONS.values())[_integer(0, len(OPERATIONS) - 1)]
        strength, sign = torch.rand(2).tolist()
        clip = op(clip, math.copysign(strength * magnitude / 10, sign - 0.5))
    return clip.contiguous()


def cutout(clip: torch.Tensor, size: int) -> torch.Tensor:
    """A grey (127) square of side `size` at one place of all frames (DeVries and Taylor 2017).

    Its centre is anywhere in the picture and what sticks out is cut off. FixMatch's side is half
    that of the picture (16 of 32).
    """
    H, W = clip.shape[-2:]
    top, left = _integer(0, H - 1) - size // 2, _integer(0, W - 1) - size // 2
    clip = clip.clone()
    clip[..., max(0, top) : top + size, max(0, left) : left + size] = 127
    return clip


# ----------------------------------------------------------------------------------- on the device


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

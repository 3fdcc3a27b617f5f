"""The embedded data set: small real mp4 files in which the class is the motion and nothing else.

    make("data/toy")                 800 train, 200 val and 300 test videos of 10 motions, 48 x 48, 48 frames
    make("data/toy_mini", "mini")    240 train, 80 val and 120 test videos of 4 motions, 32 frames
    make("data/toy_b", "b")          other looks and classes
    make("data/toy_busy", "busy")    the ground is as bright and sharp as the shapes, and stands still
    make("data/toy_multi", "multi")  two shapes with a motion each: a video has two labels

Three textured shapes make the same motion over a slowly drifting background. One frame shows of a shape its
place in the picture (a torus: what leaves on one side enters on the other), its angle and its size. Each is
start + motion(t) + drift(t) on a circle, and the start is uniform on that circle. So in a frame at any time
place, angle and logarithm of the size are independent and uniform *whatever the motion*, and all else
(outline, textures, colours, clutter, speed) is drawn without looking at the class: a single frame says
nothing about it. Encoding keeps that, because its quantiser and its key frames are fixed.

The files are the same, byte for byte, on every processor. numpy's sin, exp and tanh are not: their last bits
differ between instruction sets. So pictures are made of random bits, of tables of rounded values, and of
sums, products, quotients and square roots, each of which IEEE 754 rounds in one way. Colours are converted in
whole numbers, and x264 is told to compute alike everywhere.
"""

import json
import os
import shutil
import uuid
from glob import escape
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.io import files

VERSION = 2  # of the contents: a change that alters a video needs another number
SIZE, FPS = 48, 25
SHAPES = 3
DRIFT = 1 / 400  # cycles per frame, at most, that anything drifts besides its motion
SWING = 0.2  # radius of circles and half the way of swings, as a share of the picture's side
BUMPS = (0.3, 0.5)  # how far an outline departs from a circle of radius 1
STATE = ("x", "y", "angle", "size")  # of a shape
WAVES = {"stripes": 1, "checks": 2, "waves": 3}  # number of plane waves of a texture

X264 = "cpu-independent=1"  # else it has faster ways for some processors, with other results
STEPS = 4096  # of a table


def table(function):
    """(STEPS,) float32 values of a function of [0, 1), rounded to 2**-16, without numpy's last bits."""
    return (np.rint(2**16 * function(np.arange(STEPS) / STEPS)) / 2**16).astype(np.float32)


COSINE = table(lambda circles: np.cos(2 * np.pi * circles))
HALF_SIZE = table(lambda x: 5 * 2**x)  # pixels, of a shape; log-uniform
PERIOD = table(lambda x: 16 * 2.5**x)  # frames that one cycle of a motion takes; log-uniform


def cosine(circles):
    """The cosine of angles in circles, float32."""
    return COSINE[(circles * STEPS).astype(np.int64) & (STEPS - 1)]


def sine(circles):
    return cosine(circles - 0.25)


# What p cycles of a motion, p (T,), add to the place (in pictures), the angle and the size (in circles).
MOTIONS = {
    "move_left": lambda p: dict(x=-p),
    "move_right": lambda p: dict(x=p),
    "move_up": lambda p: dict(y=-p),
    "move_down": lambda p: dict(y=p),
    "turn_clockwise": lambda p: dict(angle=p / 3),
    "turn_counterclockwise": lambda p: dict(angle=-p / 3),
    "grow": lambda p: dict(size=p / 2),
    "shrink": lambda p: dict(size=-p / 2),
    "circle_clockwise": lambda p: dict(x=SWING * cosine(p), y=SWING * sine(p)),
    "circle_counterclockwise": lambda p: dict(x=SWING * cosine(p), y=-SWING * sine(p)),
    "swing_sideways": lambda p: dict(x=SWING * sine(p)),
    "swing_upright": lambda p: dict(y=SWING * sine(p)),
}


class Look(NamedTuple):
    """A variant: which motions, how many training videos of each, and what they look like."""

    classes: tuple[str, ...]
    train_per_class: int
    textures: tuple[str, ...] = tuple(WAVES)
    outlines: tuple[str, ...] = ("blob", "star")
    inverted: bool = False  # dark shapes on bright ground
    clutter: int = 0  # at most so many small shapes that stand still
    busy: bool = False  # a ground as bright and as sharply textured as the shapes, that stands still
    several: bool = False  # two shapes instead of SHAPES, each with a motion of its own
    frames: int = 48  # of a video


ALL = tuple(MOTIONS)
VARIANTS = {
    "": Look((*ALL[:4], *ALL[6:]), 80),
    "a": Look((*ALL[:4], *ALL[6:10]), 60, textures=("waves",), outlines=("blob",)),
    "b": Look((*ALL[:2], *ALL[4:6], *ALL[10:]), 90, textures=("stripes",), inverted=True),
    "c": Look(ALL[2:9], 40, textures=("checks",), outlines=("star",), clutter=4),
    "busy": Look((*ALL[:4], *ALL[6:]), 80, clutter=4, busy=True),
    "multi": Look((*ALL[:4], *ALL[6:]), 80, several=True),
    "mini": Look(ALL[:4], 60, frames=32),
}
SUBSETS = ("train", "val", "test")


# ---- a folder that is complete or absent -----------------------------------------------------------


def make(root, variant="", train_per_class=None, val_per_class=20, test_per_class=30, seed=0):
    """After the call the set exists under `root`; a set that is there is left as it is.

    It has train/, val/, test/, the lists train.txt, val.txt, test.txt ("path label"), classes.txt, and
    toy.json, which says what it is. The counts are for a new set; train_per_class None: as in VARIANTS. val
    is for tuning. If several processes call it, one makes the set and the others wait. The files are a pure
    function of the arguments and the version of x264. Raises UserError if something else is in `root` or it
    cannot be written.
    """
    root = Path(os.path.realpath(root))
    stamp = {"version": VERSION, "variant": variant, "seed": seed}
    counts = train_per_class or VARIANTS[variant].train_per_class, val_per_class, test_per_class
    if _is_there(root, stamp):
        return
    unfinished = f".{root.name}.unfinished-"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with open(root.with_name(f".{root.name}.lock"), "w") as lock:
            is_locked = files.lock(lock)
            if _is_there(root, stamp):
                return
            for leftover in root.parent.glob(f"{escape(unfinished)}*") if is_locked else ():
                shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
            folder = root.with_name(unfinished + uuid.uuid4().hex)
            _write_set(folder, stamp, dict(zip(SUBSETS, counts, strict=True)))
            folder.rename(root)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"cannot make the toy videos in {root}: {error.strerror or error}") from None


def _is_there(root, stamp):
    """Whether the set is there; UserError if something else is in its place."""
    try:
        there = json.loads((root / "toy.json").read_text())
    except (OSError, ValueError):
        if not os.path.lexists(root) or root.is_dir() and not any(root.iterdir()):
            return False
        raise UserError(f"{root} holds no toy videos: move it away, or name another --root") from None
    for key, value in stamp.items():
        if there.get(key) != value:
            raise UserError(f"{root} holds toy videos of {key} {there.get(key)!r}, not {value!r}: delete it "
                            "to make them again")  # fmt: skip
    return True


def _write_set(root, stamp, counts):
    variant, classes, videos = stamp["variant"], VARIANTS[stamp["variant"]].classes, []
    texts = {"classes.txt": "".join(f"{name}\n" for name in classes)}
    for subset, per_class in counts.items():
        (root / subset).mkdir(parents=True)
        lines = []
        for i in range(per_class * len(classes)):
            y = labels(variant, i)
            name = f"{subset}/{'+'.join(classes[k] for k in y)}_{i // len(classes):04d}.mp4"
            videos.append((name, subset, i))
            lines.append(f"{name} {' '.join(map(str, y))}\n")
        texts[f"{subset}.txt"] = "".join(lines)
    # One process: threads would wait for each other, and child processes outlive a killed parent.
    for name, subset, i in tqdm(videos, "making toy videos", unit=" videos", mininterval=0.5):
        write(root / name, render(variant, subset, i, stamp["seed"]))
    for name, text in (texts | {"toy.json": json.dumps(stamp | counts) + "\n"}).items():
        files.write(root / name, text)


# ---- one video -------------------------------------------------------------------------------------


def labels(variant, i):
    """The classes of video i of a subset, one or two. Any K videos in a row are balanced over K classes."""
    look, K = VARIANTS[variant], len(VARIANTS[variant].classes)
    first = i % K
    return [first, (first + 1 + i // K % (K - 1)) % K] if look.several else [first]


class Draws:
    """Random numbers that follow from a seed, a tuple of ints, on every processor and in every numpy."""

    def __init__(self, seed):
        self._bits = np.random.PCG64(seed)  # numpy may change its distributions, but not these bits

    def uniform(self, low=0.0, high=1.0, size=1):
        """(size,) float64 in [low, high); size may be a tuple."""
        return low + (high - low) * ((self._bits.random_raw(size) >> 11) / 2**53)

    def number(self, below):
        """An int, 0 or more."""
        return int(below * self.uniform()[0])

    def choice(self, options):
        return options[self.number(len(options))]


def render(variant, subset, i, seed=0):
    """The pictures of video i of a subset, uint8 (T, H, W, 3); see `labels`."""
    look = VARIANTS[variant]
    motions = [MOTIONS[look.classes[k]] for k in labels(variant, i)]
    motions *= 1 if look.several else SHAPES  # one for each shape
    draws = Draws((seed, list(VARIANTS).index(variant), SUBSETS.index(subset), i))
    uniform = draws.uniform
    t = np.arange(look.frames)

    def drifting():  # (4, T): x, y, angle, size
        return uniform(size=(4, 1)) + uniform(-DRIFT, DRIFT, (4, 1)) * t

    x, y, *_ = drifting().astype(np.float32)[..., None, None]
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    if look.busy:  # it stands still: one picture for all times
        ground = _texture(grid - x[:1], grid[:, None] - y[:1], draws, look, cycles=4, sharpness=3)
        pictures = _between(uniform(0, 160, 3), uniform(120, 255, 3), ground).repeat(look.frames, 1)
    else:
        ground = _texture(grid - x, grid[:, None] - y, draws, look, cycles=2, sharpness=1)
        pictures = _between(uniform(0, 10, 3), uniform(10, 30, 3), ground)  # (3, T, H, W)

    for _ in range(draws.number(look.clutter + 1)):
        still = np.broadcast_to(uniform(size=(4, 1)), (4, look.frames))
        _paint(pictures, dict(zip(STATE, still, strict=True)), draws, look, scale=0.6)
    for motion in motions:
        state = dict(zip(STATE, drifting(), strict=True))
        moved = motion(uniform() + t / PERIOD[draws.number(STEPS)])
        for key, way in moved.items():
            state[key] = state[key] + way
        # A growing or shrinking size starts over, a drifting size is reflected: both stay uniform.
        size = state["size"] % 1
        state["size"] = size if "size" in moved else 1 - abs(1 - 2 * size)
        _paint(pictures, state, draws, look)

    pictures = np.rint(255 - pictures if look.inverted else pictures).astype(np.uint8)
    return np.ascontiguousarray(pictures.transpose(1, 2, 3, 0))


def _paint(pictures, state, draws, look, scale=1.0):
    """Put a random shape on pictures (3, T, H, W), in place; state: the values (T,) of STATE in circles."""
    x, y, angle, size = (state[name] for name in STATE)
    half = HALF_SIZE.take((size * STEPS).astype(np.int64), mode="clip")[:, None] * (scale / SIZE)  # (T, 1)
    cos, sin = cosine(angle)[:, None] / half, sine(angle)[:, None] / half
    x, y = (np.asarray(a, dtype=np.float32)[:, None] for a in (x, y))
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    dx = (grid - x + 0.5) % 1 - 0.5  # (T, W), to the nearest of the shape's images on the torus
    dy = (grid - y + 0.5) % 1 - 0.5  # (T, H)
    reach = half * (1 + BUMPS[1]) + 1 / SIZE
    near = np.flatnonzero((dx * dx)[:, None, :] + (dy * dy)[:, :, None] < (reach * reach)[:, None])
    t, row, column = np.unravel_index(near, pictures.shape[1:])

    u = (dx * cos)[t, column] + (dy * sin)[t, row]  # turned with the shape, in half-sizes
    v = (dy * cos)[t, row] - (dx * sin)[t, column]
    margin = _margin(u, v, draws, look) * (half * SIZE)[t, 0]  # in pixels
    texture = _texture(u, v, draws, look, cycles=0.4, sharpness=3)
    shape = _between(draws.uniform(120, 160, 3), draws.uniform(200, 255, 3), texture)  # (3, near)
    flat = pictures.reshape(3, -1)  # a view
    under = flat[:, near]
    flat[:, near] = under + np.clip(margin + 0.5, 0, 1) * (shape - under)


def _margin(u, v, draws, look):
    """How far the points (u, v) are inside a random outline around (0, 0) of radius about 1."""
    bumps = [1, 2, 3, 4] if draws.choice(look.outlines) == "blob" else [3 + draws.number(3)]
    cuts = np.sort(draws.uniform(size=len(bumps) - 1))
    heights = (draws.uniform(*BUMPS) * np.diff(cuts, prepend=0, append=1)).astype(np.float32)
    phases = draws.uniform(size=len(bumps))
    radius = np.sqrt(u * u + v * v)
    cos, sin = (a / np.maximum(radius, np.float32(1e-6)) for a in (u, v))  # of the direction
    outline, cos_n, sin_n = 1, 1, 0
    for n in range(1, max(bumps) + 1):  # of n times the direction
        cos_n, sin_n = cos_n * cos - sin_n * sin, sin_n * cos + cos_n * sin
        if n in bumps:
            i = bumps.index(n)
            outline = outline + heights[i] * (cos_n * cosine(phases[i]) - sin_n * sine(phases[i]))
    return outline - radius


def _texture(u, v, draws, look, cycles, sharpness):
    """A random pattern over the plane, in [0, 1], of about `cycles` waves per unit of u and v."""
    kind = draws.choice(look.textures)
    turn, phase = draws.uniform(size=(2, 3))
    turn[1] = turn[0] + 1 / 4
    rate = cycles * draws.uniform(0.7, 1.4, 3)
    parameters = np.stack([rate * cosine(turn), rate * sine(turn), phase], 1)[: WAVES[kind]].tolist()
    waves = [cosine(a * u + (b * v + c)) for a, b, c in parameters]
    x = sharpness * (waves[0] * waves[1] if kind == "checks" else sum(waves))
    return 0.5 + 0.5 * x / np.sqrt(1 + x * x)


def _between(low, high, share):
    """Colours between low and high, each (3,): (3, ...) for a share (...)."""
    low, high = (colour.reshape(3, *[1] * share.ndim).astype(np.float32) for colour in (low, high))
    return low + share * (high - low)


def write(path, pictures):
    """Encode uint8 (T, H, W, 3) as H.264 4:2:0 with B-frames and a key frame every 12 frames."""
    options = {"preset": "fast", "qp": "26", "g": "12", "sc_threshold": "0", "x264-params": X264}
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.thread_count, stream.thread_type = "yuv420p", 1, "FRAME"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(_yuv420p(picture), format="yuv420p")))
        file.mux(stream.encode())


def _yuv420p(picture):
    """uint8 (H, W, 3) to BT.601 planes below one another, in whole numbers: swscale's rounding varies."""
    rgb = picture.astype(np.int32)
    quarter = rgb[::2, ::2] + rgb[1::2, ::2] + rgb[::2, 1::2] + rgb[1::2, 1::2]
    luma = 16 + ((66 * rgb[..., 0] + 129 * rgb[..., 1] + 25 * rgb[..., 2] + 128) >> 8)
    chroma = [128 + ((r * quarter[..., 0] + g * quarter[..., 1] + b * quarter[..., 2] + 512) >> 10)
              for r, g, b in ((-38, -74, 112), (112, -94, -18))]  # fmt: skip
    return np.concatenate([plane.reshape(-1, picture.shape[1]) for plane in (luma, *chroma)]).astype(np.uint8)

"""The embedded data set: small real mp4 files in which the class is the motion and nothing else.

    make("data/toy")            800 train, 200 val and 300 test videos of 10 motions, 48 x 48, 48 frames
    make("data/toy_b", "b")     another look, other classes
    make("data/toy_busy", "busy")    the same classes on a ground as bright and sharp as the shapes, at rest
    make("data/toy_multi", "multi")  two shapes with a motion each: a video has two labels

Three textured shapes make the same motion over a slowly drifting background. What one frame shows of a
shape is its place in the picture (a torus: what leaves on one side enters on the other), its angle and
its size. Each of them is start + motion(t) + drift(t) on a circle, and the start is uniform on that
circle. So in a frame at any time place, angle and logarithm of the size are independent and uniform
*whatever the motion*, and all else (outline, textures, colours, clutter, speed) is drawn without
looking at the class: a single frame says nothing about it. Encoding keeps that, because its quantiser
and its key frames are fixed: motion changes the size of a file, not the quality of its pictures.

The fastest shapes cross a quarter of the picture in 4 frames, the slowest a tenth, so the motion of
neighbouring frames of a clip is coarse at a stride of 4 and finer at 2.
"""

import fcntl
import json
import os
import shutil
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from common import UserError

VERSION = 1  # of the contents: a change that alters a video needs another number
SIZE, FRAMES, FPS = 48, 48, 25
SHAPES = 3
HALF_SIZE = (5.0, 10.0)  # of a shape, in pixels; log-uniform
PERIOD = (16.0, 40.0)  # frames that one cycle of a motion takes; log-uniform
DRIFT = 1 / 400  # cycles per frame, at most, by which anything strays besides its motion
SWING = 0.2  # radius of circles and half the way of swings, as a share of the picture's side
BUMPS = (0.3, 0.5)  # how far an outline departs from a circle of radius 1
WAVES = {"stripes": 1, "checks": 2, "waves": 3}  # textures, and how many plane waves make one
TURN = 2 * np.pi

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
    "circle_clockwise": lambda p: dict(x=SWING * np.cos(TURN * p), y=SWING * np.sin(TURN * p)),
    "circle_counterclockwise": lambda p: dict(x=SWING * np.cos(TURN * p), y=-SWING * np.sin(TURN * p)),
    "swing_sideways": lambda p: dict(x=SWING * np.sin(TURN * p)),
    "swing_upright": lambda p: dict(y=SWING * np.sin(TURN * p)),
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


ALL = tuple(MOTIONS)
VARIANTS = {
    "": Look((*ALL[:4], *ALL[6:]), 80),
    "a": Look((*ALL[:4], *ALL[6:10]), 60, textures=("waves",), outlines=("blob",)),
    "b": Look((*ALL[:2], *ALL[4:6], *ALL[10:]), 90, textures=("stripes",), inverted=True),
    "c": Look(ALL[2:9], 40, textures=("checks",), outlines=("star",), clutter=4),
    "busy": Look((*ALL[:4], *ALL[6:]), 80, clutter=4, busy=True),
    "multi": Look((*ALL[:4], *ALL[6:]), 80, several=True),
}
PARTS = ("train", "val", "test")


# ---- a folder that is complete or absent -----------------------------------------------------------


def make(root, variant="", train_per_class=None, val_per_class=20, test_per_class=30, seed=0):
    """After the call the set exists under `root`; one that is there is left as it is.

    It holds train/, val/, test/, the lists train.txt, val.txt, test.txt ("path label"), classes.txt,
    and toy.json, which says what it is. The counts are for a set that is yet to be made; train_per_class
    None: as in VARIANTS. val is for tuning. Of several processes one makes the set, the others wait.
    The files are a pure function of the arguments and the versions of numpy and x264.
    Raises UserError if something else is in `root` or it cannot be written.
    """
    root = os.path.realpath(root)
    stamp = {"version": VERSION, "variant": variant, "seed": seed}
    if _there(root, stamp):
        return
    train_per_class = train_per_class or VARIANTS[variant].train_per_class
    counts = dict(zip(PARTS, (train_per_class, val_per_class, test_per_class), strict=True))
    folder, name = os.path.split(root)
    unfinished = os.path.join(folder, f".{name}.unfinished")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f".{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lifts it when this process ends, however it ends
            if not _there(root, stamp):
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                _write_set(unfinished, stamp, counts)
                os.rename(unfinished, root)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"cannot make the toy videos in {root}: {error.strerror or error}") from None


def _there(root, stamp):
    """Is the set there? Raises UserError if something else is in its place."""
    try:
        with open(os.path.join(root, "toy.json")) as file:
            found = json.load(file)
    except (OSError, ValueError):
        if os.path.isdir(root) and not os.listdir(root) or not os.path.lexists(root):
            return False
        raise UserError(f"{root} holds no toy videos: move it away, or name another --root") from None
    for key, value in stamp.items():
        if found.get(key) != value:
            raise UserError(f"{root} holds toy videos of {key} {found.get(key)!r}, but {value!r} is wanted: "
                            f"delete it to have them made anew")
    return True


def _write_set(root, stamp, counts):
    classes = VARIANTS[stamp["variant"]].classes
    jobs = []
    for part, per_class in counts.items():
        os.makedirs(os.path.join(root, part))
        ys = [labels(stamp["variant"], i) for i in range(per_class * len(classes))]
        kinds = ["+".join(classes[k] for k in y) for y in ys]
        names = [f"{part}/{kind}_{i // len(classes):04d}.mp4" for i, kind in enumerate(kinds)]
        lines = [" ".join(map(str, (name, *y))) for name, y in zip(names, ys, strict=True)]
        _write_lines(root, f"{part}.txt", lines)
        jobs += [(name, part, i) for i, name in enumerate(names)]
    _write_lines(root, "classes.txt", classes)
    # One process: threads wait for each other here, and child processes outlive a killed parent.
    for name, part, i in tqdm(jobs, "making toy videos", unit=" videos", mininterval=0.5):
        write(os.path.join(root, name), render(stamp["variant"], part, i, stamp["seed"]))
    _write_lines(root, "toy.json", [json.dumps(stamp | counts)])


def _write_lines(root, name, lines):
    with open(os.path.join(root, name), "w") as file:
        file.writelines(f"{line}\n" for line in lines)


# ---- one video -------------------------------------------------------------------------------------


def labels(variant, i):
    """The classes of video i of a part, so that every stretch is balanced: one, or two of all pairs."""
    look, K = VARIANTS[variant], len(VARIANTS[variant].classes)
    first = i % K
    return [first, (first + 1 + i // K % (K - 1)) % K] if look.several else [first]


def render(variant, part, i, seed=0):
    """The pictures of video i of a part, uint8 (T, H, W, 3); see `labels`."""
    look = VARIANTS[variant]
    motions = [MOTIONS[look.classes[k]] for k in labels(variant, i)]
    motions *= 1 if look.several else SHAPES  # one for each shape
    rng = np.random.default_rng((seed, list(VARIANTS).index(variant), PARTS.index(part), i))
    t = np.arange(FRAMES)

    def drifting():  # (4, T): x, y, angle, size
        return rng.uniform(size=(4, 1)) + rng.uniform(-DRIFT, DRIFT, (4, 1)) * t

    x, y, *_ = drifting().astype(np.float32)[..., None, None]
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    if look.busy:  # at rest: one picture for all times
        ground = _texture(grid - x[:1], grid[:, None] - y[:1], rng, look, cycles=4, sharpness=3)
        pictures = _between(rng.uniform(0, 160, 3), rng.uniform(120, 255, 3), ground).repeat(FRAMES, 1)
    else:
        ground = _texture(grid - x, grid[:, None] - y, rng, look, cycles=2, sharpness=1)
        pictures = _between(rng.uniform(0, 10, 3), rng.uniform(10, 30, 3), ground)  # (3, T, H, W)

    for _ in range(rng.integers(look.clutter + 1)):
        still = np.broadcast_to(rng.uniform(size=(4, 1)), (4, FRAMES))
        _paint(pictures, *still, rng, look, scale=0.6)
    for motion in motions:
        state = dict(zip(("x", "y", "angle", "size"), drifting(), strict=True))
        cycles = rng.uniform() + t * np.exp(-rng.uniform(*np.log(PERIOD)))
        moved = motion(cycles)
        for key, way in moved.items():
            state[key] = state[key] + way
        # A size that grows or shrinks starts over, one that drifts turns round: uniform, both.
        size = state["size"] % 1
        state["size"] = size if "size" in moved else 1 - abs(1 - 2 * size)
        _paint(pictures, **state, rng=rng, look=look)

    pictures = np.rint(255 - pictures if look.inverted else pictures).astype(np.uint8)
    return np.ascontiguousarray(pictures.transpose(1, 2, 3, 0))


def _paint(pictures, x, y, angle, size, rng, look, scale=1.0):
    """Put a random shape on pictures (3, T, H, W), in place; its state, (T,) each, counts in circles."""
    x, y, angle, size = (np.asarray(a, dtype=np.float32)[:, None] for a in (x, y, angle, size))  # (T, 1)
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    dx = (grid - x + 0.5) % 1 - 0.5  # (T, W), to the nearest of the shape's images on the torus
    dy = (grid - y + 0.5) % 1 - 0.5  # (T, H)
    half = scale * HALF_SIZE[0] * (HALF_SIZE[1] / HALF_SIZE[0]) ** size / SIZE
    reach = half * (1 + BUMPS[1]) + 1 / SIZE
    near = np.flatnonzero((dx**2)[:, None, :] + (dy**2)[:, :, None] < (reach**2)[:, None])
    t, row, column = np.unravel_index(near, pictures.shape[1:])

    cos, sin = np.cos(TURN * angle) / half, np.sin(TURN * angle) / half
    u = (dx * cos)[t, column] + (dy * sin)[t, row]  # turned with the shape, in half-sizes
    v = (dy * cos)[t, row] - (dx * sin)[t, column]
    margin = (_outline(np.arctan2(v, u), rng, look) - np.hypot(u, v)) * (half * SIZE)[t, 0]  # in pixels
    texture = _texture(u, v, rng, look, cycles=0.4, sharpness=3)
    shape = _between(rng.uniform(120, 160, 3), rng.uniform(200, 255, 3), texture)  # (3, near)
    flat = pictures.reshape(3, -1)  # a view
    under = flat[:, near]
    flat[:, near] = under + np.clip(margin + 0.5, 0, 1) * (shape - under)


def _outline(angle, rng, look):
    """Radius of a random shape, about 1, in the directions `angle`."""
    bumps = np.arange(1, 5) if rng.choice(look.outlines) == "blob" else rng.integers(3, 6, 1)
    heights = rng.uniform(*BUMPS) * rng.dirichlet(np.ones(len(bumps)))
    phases = rng.uniform(0, TURN, len(bumps))
    terms = zip(bumps.tolist(), heights.tolist(), phases.tolist(), strict=True)  # keep angle's float32
    return 1 + sum(height * np.cos(n * angle + phase) for n, height, phase in terms)


def _texture(u, v, rng, look, cycles, sharpness):
    """A random pattern over the plane, in [0, 1], of about `cycles` waves per unit of u and v."""
    kind = rng.choice(look.textures)
    turn, phase = rng.uniform(0, TURN, 3), rng.uniform(0, TURN, 3)
    turn[1] = turn[0] + TURN / 4
    rate = TURN * cycles * rng.uniform(0.7, 1.4, 3)
    parameters = np.stack([rate * np.cos(turn), rate * np.sin(turn), phase], 1)[: WAVES[kind]].tolist()
    waves = [np.sin(a * u + (b * v + c)) for a, b, c in parameters]
    return 0.5 + 0.5 * np.tanh(sharpness * (waves[0] * waves[1] if kind == "checks" else sum(waves)))


def _between(low, high, share):
    """Colours between low and high, each (3,): (3, ...) for a share (...)."""
    low, high = (colour.reshape(3, *[1] * share.ndim).astype(np.float32) for colour in (low, high))
    return low + share * (high - low)


def write(path, pictures):
    """Encode uint8 (T, H, W, 3) as H.264 4:2:0 with B-frames and a key frame every 12 frames."""
    options = {"preset": "fast", "qp": "26", "g": "12", "sc_threshold": "0"}
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.thread_count, stream.thread_type = "yuv420p", 1, "FRAME"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())

"""Optical flow: TV-L1 in torch, flow as 8-bit videos, and the command that extracts a data set.

    flow = tvl1(frames)                                       # (N, T, 3, H, W) -> (N, T - 1, 2, H, W) pixels
    with Flow("flow/Biking/v_Biking_g01_c04.mp4") as fields:  # extracted before
        x = fields.get(range(5))                              # uint8 (5, 2, H, W)
    with Computed("Biking/v_Biking_g01_c04.avi") as fields:   # the same, computed now
        x = fields.get(range(5))

Field i is the motion from frame i to frame i + 1: u to the right, v down, in pixels of the pictures it was
computed from. As bytes, zero motion is 128 and `bound` pixels are 127 steps from it (`to_bytes`). A flow
video is an ordinary file of one gray picture per field, u above v, each at the time of its first frame.

    python -m common.tools.flow DATA --out DIR                          every video; goes on where it was
    torchrun --nproc_per_node 8 -m common.tools.flow DATA --out DIR     shared among processes, and their GPUs

There may be more processes than GPUs: some read and write videos while others compute. The same command
may also be started several times, on several machines that share the disk.
"""

import json
import math
import os
import re
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common.errors import OutOfRange, UserError, VideoError, printable, reason_of, reasons
from common.io import files
from common.io.decode import FPS, Video, check_size
from common.io.encode import encode
from common.io.readers import forms, stem_of
from common.tvl1 import SCHEME, SMALLEST, _flow

BOUND = 20.0  # pixels that a byte of 1 or 255 stands for, where nothing else is said
SHORT_SIDE = 256  # pixels; of larger pictures, before their flow is computed
GOP = 12  # fields from one key frame of a flow video to the next
CHUNK = 2**24  # pixels of the frames of a video that are in memory at a time
EVERY = 60  # seconds between two lines of progress, where there is no terminal


# ---- flow as bytes ---------------------------------------------------------------------------------


def to_bytes(flow, bound=BOUND):
    """uint8 of pixels: 128 is no motion, 1 is -bound or less and 255 bound or more. Mirrored: 256 - x."""
    return (flow * (127 / bound)).round_().clamp_(-127, 127).add_(128).to(torch.uint8)


def to_pixels(x, bound=BOUND):
    """float32 pixels of bytes, the inverse of to_bytes up to half a step of bound / 127 pixels."""
    return (x.float() - 128) * (bound / 127)


def write_flow(path, fields, times=None, fps=FPS):
    """Write a flow video, complete or absent: uint8 (2, H, W) fields at `times` in seconds, or at a rate.

    fields: a tensor (T, 2, H, W), or anything that yields fields. Coded without loss: one step of a byte
    off is 0.16 pixels. Gray pictures have no colours at half size, so any height and width will do.
    """
    options = {"preset": "superfast", "qp": "0", "sc_threshold": "0"}
    pictures = (field.reshape(-1, field.shape[2]).numpy() for field in fields)
    with files.replacing(path) as file:
        files.lock(file)  # while it is written, see _sweep
        encode(file.name, pictures, fps, times, options, "gray", GOP)


# ---- fields of one video ---------------------------------------------------------------------------


class _Fields:
    """What Flow and Computed have in common. A context manager; raises VideoError as Video does.

    span: (start, end) in seconds; the fields whose first frame is in it count, at least one. So field i
    belongs to frame i of Video(path, span); the last frame of a video has none.
    times: (N,) seconds of the fields from the first frame of the file; fps: their rate.
    """

    def __enter__(self):
        with ExitStack() as stack, reasons():
            times = self._open(stack)
            self._stack = stack.pop_all()
        first, last = 0, len(times)
        if self.span is not None:
            first = min(int(np.searchsorted(times, self.span[0])), last - 1)
            last = max(int(np.searchsorted(times, self.span[1])), first + 1)
        self._first, self.times = first, times[first:last]
        return self

    def __exit__(self, *_):
        self._stack.close()

    def __len__(self):
        return len(self.times)

    def get(self, indices, short_side=None):
        """The fields `indices`, in any order and with repeats: uint8 (T, 2, H, W), as to_bytes has them.

        short_side: resize them as pictures; the values still count pixels of the size they had before.
        Raises VideoError if the file cannot give them, OutOfRange for an index outside the video.
        """
        indices = np.asarray(indices, dtype=np.int64).ravel()
        if indices.size == 0 or indices.min() < 0 or indices.max() >= len(self):
            raise OutOfRange(f"fields {indices.tolist()} of a video of {len(self)} fields")
        wanted, places = np.unique(indices + self._first, return_inverse=True)
        fields = self._read(wanted)
        size = list(fields.shape[2:])
        if short_side and short_side != min(size):
            size = [round(side * short_side / min(size)) for side in size]
            fields = TF.resize(fields, size, antialias=True)
        return fields[torch.from_numpy(places)]


class Flow(_Fields):
    """Extracted flow: a flow video, or a folder of flow_x_00001.jpg, flow_y_00001.jpg and so on.

    The rest is as in _Fields. The pictures of a folder are .jpg or .png, numbered without a gap from 0 or 1,
    fps to a second.
    """

    def __init__(self, path, span=None, fps=FPS):
        self.path, self.span, self.fps = os.fspath(path), span, fps

    def _open(self, stack):
        self._video = None
        if os.path.isdir(self.path):
            self._pairs = _pairs(self.path)
            return np.arange(len(self._pairs)) / self.fps
        self._video = stack.enter_context(Video(self.path))
        self.fps = self._video.fps
        return self._video.times

    def _read(self, wanted):
        if self._video is None:
            with reasons():
                pictures = [_flow_picture(path) for i in wanted for path in self._pairs[i]]
            if len({picture.shape for picture in pictures}) > 1:
                raise VideoError("the flow pictures differ in size")
            return torch.from_numpy(np.stack(pictures)).unflatten(0, (-1, 2))
        x = self._video.get(wanted)
        if x.shape[2] % 2 or not torch.equal(x[:, 0], x[:, 2]):
            raise VideoError("not a flow video: its pictures are not gray, u above v")
        return x[:, 0].unflatten(1, (2, -1)).contiguous()


def _pairs(folder):
    """[(path of x, path of y), ...] of a folder of flow pictures, by number."""
    found = {"x": {}, "y": {}}
    for name in os.listdir(folder):
        if match := re.fullmatch(r"(?i)flow_([xy])_?(\d+)\.(?:jpe?g|png)", name):
            axis, number = match[1].lower(), int(match[2])
            if number in found[axis]:
                raise VideoError(f"two files are flow_{axis} number {number}")
            found[axis][number] = os.path.join(folder, name)
    numbers = sorted(found["x"].keys() | found["y"].keys())
    if not numbers:
        raise VideoError("a folder without flow_x and flow_y pictures")
    start = min(numbers[0], 1)
    for i in range(start, start + len(numbers)):
        for axis in "xy":
            if i not in found[axis]:
                raise VideoError(f"flow_{axis} number {i} is missing, of {numbers[0]} to {numbers[-1]}")
    return [(found["x"][i], found["y"][i]) for i in numbers]


def _flow_picture(path):
    """uint8 (H, W) of a gray picture."""
    with Image.open(path) as image:
        check_size(image.height, image.width)
        return np.array(image.convert("L"))


class Computed(_Fields):
    """Flow that is computed when asked for, from a video at `short_side`, or its own size if that is less.

    The rest is as in _Fields. The values are those that `extract` writes: pixels of that size, by SCHEME.
    """

    def __init__(self, path, span=None, bound=BOUND, short_side=SHORT_SIDE, device="cpu"):
        self.path, self.span, self.bound, self.short_side = os.fspath(path), span, bound, short_side
        self.device = device

    def _open(self, stack):
        self._video = stack.enter_context(Video(self.path))
        self.fps = self._video.fps
        if len(self._video) < 2:
            raise VideoError("a single frame has no flow")
        sides = self._video.height, self._video.width
        if min(sides) < SMALLEST:
            raise VideoError(f"pictures of {sides[1]} x {sides[0]} pixels are too small for flow")
        self._small = min(self.short_side, *sides)
        self.height, self.width = (round(side * self._small / min(sides)) for side in sides)
        return self._video.times[:-1]

    def _read(self, wanted):
        needed = np.union1d(wanted, wanted + 1)  # frame i + 1 comes right after frame i
        with reasons():
            frames = self._video.get(needed, self._small)
        first = torch.from_numpy(np.searchsorted(needed, wanted)).to(self.device)
        return to_bytes(_flow(frames.to(self.device), first, **SCHEME), self.bound).cpu()


# ---- the flow of a data set ------------------------------------------------------------------------


def find_flow(root, name):
    """The path, for Flow, of the flow of the video `name` (Videos.name) in the folder `root`; or None.

    It is <root>/<name without suffix>.mp4, or a folder of that name that holds flow pictures, in either
    Unicode form.
    """
    for stem in (os.path.join(root, form) for form in forms(_stem(name))):
        if os.path.isfile(stem + ".mp4"):
            return stem + ".mp4"
        if os.path.isdir(stem):
            with os.scandir(stem) as entries:
                if any(entry.name.lower().startswith("flow_x") for entry in entries):
                    return stem
    return None


def scale_of(root):
    """(bound, short side), in pixels, of the flow in the folder `root`; BOUND and SHORT_SIDE if unknown."""
    settings = _settings_of(root) or {}
    return settings.get("bound", BOUND), settings.get("short_side", SHORT_SIDE)


def _stem(name):
    """A video's name without suffix; of one that leads out of the data set, its last two parts."""
    stem = stem_of(name)
    parts = stem.split("/")
    if os.path.isabs(stem) or ".." in parts:
        stem = "/".join([part for part in parts if part not in ("", ".", "..")][-2:])
    return stem


def _settings_of(root):
    path = os.path.join(root, "flow.json")
    try:
        with open(path) as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and make the flow again") from None


def extract_flow(
    videos, out, short_side=SHORT_SIDE, bound=BOUND, device=None, rank=0, world=1, say=print, bar=None
):
    """Make a flow video, <out>/<name without suffix>.mp4, of every file of `videos`, for `find`.

    videos: a datasets.Videos, or several. Pictures larger than short_side are made smaller. Files that
    are there are left. Of `world` processes each takes every world-th file, and needs no other: they may
    start and end when they like. Runs that are started separately share the work, too: a video that another
    is at comes last, once that is done. device: None is CUDA if there is any; bar: None is a progress bar
    if there is a terminal. Unreadable videos are listed in <out>/bad_videos.txt (path, tab, reason).
    Returns dict(made, there, bad), the numbers of files of this rank. Raises UserError if two videos
    differ only in suffix, if `out` has flow of other settings, and if it cannot be written.
    """
    if not 0 < bound < math.inf or short_side < SMALLEST:
        raise UserError(f"--bound {bound} must be above 0, --short_side {short_side} {SMALLEST} or more")
    jobs = _jobs([videos] if hasattr(videos, "path") else videos, out)[rank::world]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    counts = dict(made=0, there=0, bad=0)
    try:
        files.make_folder(out)
        there = _sweep(out, {target for _, target in jobs})
        settings = dict(method="TV-L1", short_side=short_side, bound=float(bound), **SCHEME)
        _agree(out, settings, there)
        todo = [job for job in jobs if job[1] not in there]
        counts["there"] = len(jobs) - len(todo)
        later = []
        for wait, batch in ((False, todo), (True, later)):
            for path, target in _progress(batch, rank, say, bar):
                state, reason = _extract_one(path, target, wait, short_side, bound, device)
                if state == "busy":
                    later.append((path, target))
                    continue
                if state != "there":
                    _list_bad(out, path, reason)
                counts[state] += 1
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; when that is mended, the same "
                        "command goes on where it stopped") from None  # fmt: skip
    return counts


def _jobs(parts, out):
    """Sorted [(path of a video, path of its flow), ...] of several Videos, each file once."""
    targets = {}
    for part in parts:
        for i in range(len(part)):
            path, target = part.path(i), os.path.join(out, _stem(part.name(i)) + ".mp4")
            if targets.setdefault(target, path) != path:
                both = f"{printable(path)} and {printable(targets[target])}"
                raise UserError(f"{both} would both become {printable(target)}")
    return sorted((path, target) for target, path in targets.items())


@contextmanager
def _alone(out):
    """Only one process at a time is in here."""
    with open(os.path.join(out, ".lock"), "w") as lock:
        files.lock(lock)
        yield


def _agree(out, settings, there):
    """Write the settings to flow.json. Raises UserError if it has others, or if videos are there without."""
    with _alone(out):
        for name in ("flow.json", "bad_videos.txt"):
            for half in Path(out).glob(f"{name}.*.tmp"):  # left by a process that was killed
                half.unlink()
        old = _settings_of(out)
        if old is None and there:
            raise UserError(f"{out} has videos of these names but no flow.json: choose another --out")
        if old is None:
            files.write(os.path.join(out, "flow.json"), json.dumps(settings, indent=1) + "\n")
    for key in settings if old else ():
        if old.get(key) != settings[key]:
            raise UserError(f"{out} has flow with {key} {old.get(key)}, not {settings[key]}: use that, or "
                            "another --out")  # fmt: skip


def _sweep(out, targets):
    """Those of the files `targets` that are there; removes what a run that was killed has left of them."""
    there = set()
    for folder, _, names in os.walk(out):
        for path in (os.path.join(folder, name) for name in names):
            if path in targets:
                there.add(path)
            elif re.sub(r"\.(\d+-\d+\.tmp|lock)$", "", path) in targets:
                with suppress(FileNotFoundError), open(path) as left:
                    if files.lock(left, wait=False):
                        os.unlink(path)
    return there


def _progress(jobs, rank, say, bar):
    """Yield the jobs; rank 0 shows how far it is, by a bar or by a line now and then."""
    bar = sys.stderr.isatty() if bar is None else bar
    began = shown = time.monotonic()
    hidden = rank or not bar or not jobs
    for n, job in enumerate(tqdm(jobs, "flow", unit=" videos", dynamic_ncols=True, disable=hidden)):
        now = time.monotonic()
        if rank == 0 and not bar and now - shown > EVERY:
            left = tqdm.format_interval((now - began) / n * (len(jobs) - n)) if n else "unknown"
            say(f"{n} of {len(jobs)} videos, time left {left}")
            shown = now
        yield job


def _extract_one(path, target, wait, short_side, bound, device):
    """Write the flow of one video. Returns its state, and why it is bad.

    made; there: another run has made it meanwhile; bad; busy: another run is at it, for which `wait` waits.
    """
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _claim(target, wait) as claimed:
            if not claimed:
                return "busy", None
            if os.path.exists(target):
                return "there", None
            with Computed(path, None, bound, short_side, device) as video:
                many = max(CHUNK // (video.height * video.width), 1)
                starts = range(0, len(video), many)
                chunks = (video.get(range(i, min(i + many, len(video)))) for i in starts)
                write_flow(target, (field for chunk in chunks for field in chunk), video.times, video.fps)
            return "made", None
    except (OSError, torch.AcceleratorError) as error:  # of the disk or the GPU, no fault of the video
        if getattr(error, "errno", None) in files.NAME_ERRORS:
            return "bad", reason_of(error)
        raise
    except Exception as error:
        return "bad", reason_of(error)


@contextmanager
def _claim(target, wait):
    """Whether no other process makes the file `target`, until the end of the block; without locks always."""
    path = f"{target}.lock"
    with open(path, "w") as lock:
        claimed = files.lock(lock, wait) is not False
        try:
            yield claimed
        finally:
            if claimed:
                with suppress(FileNotFoundError):
                    os.unlink(path)


def _list_bad(out, path, reason):
    """Put a video in bad_videos.txt; or, without a reason, take it out."""
    listed = os.path.join(out, "bad_videos.txt")
    if reason is None and not os.path.exists(listed):
        return
    with _alone(out):
        lines = []
        if os.path.exists(listed):
            with open(listed, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().splitlines()
        new = [line for line in lines if line.partition("\t")[0] != path]
        new += [f"{path}\t{reason}"] * (reason is not None)
        if new != lines:
            files.write(listed, "".join(f"{line}\n" for line in new))

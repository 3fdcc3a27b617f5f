"""Optical flow: flow as 8-bit videos, computed where there are none, and their extraction.

    with Flow("flow/Biking/v_Biking_g01_c04.mp4") as fields:            # extracted before
        x = fields.get(range(5))                                        # uint8 (5, 2, H, W)
    with Computed("Biking/v_Biking_g01_c04.avi", None, 20.0, 256) as fields:    # the same, computed now
        x = fields.get(range(5))

Field i is the motion from frame i to frame i + 1: u to the right, v down, in pixels of the pictures it was
computed from. In bytes, 128 is no motion and 1 and 255 are a motion of -`bound` and `bound` pixels or more
(`to_bytes`); that of the mirrored picture is 256 - u. A flow video is an ordinary file of one gray picture
per field, u above v, each at the time of its first frame.
"""

import json
import multiprocessing
import os
import re
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from common.errors import OutOfRange, UserError, VideoError, printable, reason_of, reasons
from common.io import files
from common.io.decode import FPS, Video, check_size
from common.io.encode import encode
from common.io.readers import forms, stem_of
from common.io.workers import in_parallel
from common.tvl1 import SCHEME, SMALLEST, flow_of_pairs

GOP = 12  # fields from one key frame of a flow video to the next
CHUNK = 2**24  # pixels of the frames of a video that are in memory at a time


def to_bytes(flow, bound):
    """uint8 of float pixels: 128 is no motion, 1 is -bound or less and 255 bound or more."""
    return (flow * (127 / bound)).round_().clamp_(-127, 127).add_(128).to(torch.uint8)


def write_flow(path, fields, times=None, fps=FPS):
    """Write a flow video, complete or absent: uint8 (2, H, W) fields at `times` in seconds, or at a rate.

    fields: a tensor (T, 2, H, W), or anything that yields fields. They are coded without loss, as one step of
    a byte is 0.16 pixels, and in gray, which allows any height and width.
    """
    options = {"preset": "superfast", "qp": "0", "sc_threshold": "0", "g": str(GOP)}
    pictures = (field.reshape(-1, field.shape[2]).numpy() for field in fields)
    with files.replacing(path) as file:
        files.lock(file)  # while it is written, see _sweep
        encode(file.name, pictures, fps, times, options)


# ---- fields of one video ---------------------------------------------------------------------------


class _Fields:
    """What Flow and Computed have in common: context managers that raise VideoError as Video does.

    span: (start, end) in seconds; only the fields whose first frame is in it count, at least one. So field i
    belongs to frame i of Video(path, span); the last frame of a video has none.
    times: (N,) seconds of the fields from the first frame of the file; fps: their rate.
    """

    def __enter__(self):
        with ExitStack() as stack, reasons():
            times = self._open(stack)  # seconds of all fields of the file
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
        positions, places = np.unique(indices + self._first, return_inverse=True)
        fields = self._read(positions)
        size = list(fields.shape[2:])
        if short_side and short_side != min(size):
            size = [round(side * short_side / min(size)) for side in size]
            fields = TF.resize(fields, size, antialias=True)
        return fields[torch.from_numpy(places)]


class Flow(_Fields):
    """Extracted flow: a flow video, or a folder of flow_x_00001.jpg, flow_y_00001.jpg and so on.

    The pictures of a folder are .jpg or .png, numbered without a gap from 0 or 1; fps is their rate.
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

    def _read(self, positions):
        if self._video is None:
            with reasons():
                pictures = [_flow_picture(path) for i in positions for path in self._pairs[i]]
            if len({picture.shape for picture in pictures}) > 1:
                raise VideoError("the flow pictures differ in size")
            return torch.from_numpy(np.stack(pictures)).unflatten(0, (-1, 2))
        x = self._video.get(positions)
        if x.shape[2] % 2 or not torch.equal(x[:, 0], x[:, 2]):
            raise VideoError("not a flow video: its pictures are not gray, u above v")
        return x[:, 0].unflatten(1, (2, -1)).contiguous()


def _pairs(folder):
    """[(path of x, path of y), ...] of a folder of flow pictures, by number."""
    paths = {}
    for name in os.listdir(folder):
        if match := re.fullmatch(r"(?i)flow_([xy])_?(\d+)\.(?:jpe?g|png)", name):
            axis, number = match[1].lower(), int(match[2])
            if (axis, number) in paths:
                raise VideoError(f"two files are flow_{axis} number {number}")
            paths[axis, number] = os.path.join(folder, name)
    numbers = sorted({number for _, number in paths})
    if not numbers:
        raise VideoError("a folder without flow_x and flow_y pictures")
    for number, axis in product(range(min(numbers[0], 1), numbers[-1] + 1), "xy"):
        if (axis, number) not in paths:
            raise VideoError(f"flow_{axis} number {number} is missing, of {numbers[0]} to {numbers[-1]}")
    return [(paths["x", number], paths["y", number]) for number in numbers]


def _flow_picture(path):
    """uint8 (H, W) of a gray picture."""
    with Image.open(path) as image:
        check_size(image.height, image.width)
        return np.array(image.convert("L"))


class Computed(_Fields):
    """Flow that is computed when asked for, by SCHEME: the values that `extract_flow` writes.

    bound: pixels of motion that a byte can hold. short_side: pixels of the pictures that the flow is computed
    from; smaller videos keep their size.
    """

    def __init__(self, path, span, bound, short_side, device="cpu"):
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
        self._side = min(self.short_side, *sides)
        self.height, self.width = (round(side * self._side / min(sides)) for side in sides)
        return self._video.times[:-1]

    def _read(self, positions):
        needed = np.union1d(positions, positions + 1)  # frame i + 1 comes right after frame i
        with reasons():
            frames = self._video.get(needed, self._side)
        first = torch.from_numpy(np.searchsorted(needed, positions)).to(self.device)
        return to_bytes(flow_of_pairs(frames.to(self.device), first, **SCHEME), self.bound).cpu()


# ---- the flow of a data set ------------------------------------------------------------------------


def find_flow(root, name):
    """The path, for Flow, of the flow of the video `name` (Videos.name) in the folder `root`, or None.

    It is <root>/<name without suffix>.mp4 or a folder of that name with flow pictures, in any Unicode form.
    """
    for stem in (os.path.join(root, form) for form in forms(_stem(name))):
        if os.path.isfile(stem + ".mp4"):
            return stem + ".mp4"
        if os.path.isdir(stem):
            with os.scandir(stem) as entries:
                if any(entry.name.lower().startswith("flow_x") for entry in entries):
                    return stem
    return None


def scale_of(root, default):
    """(bound, short side), in pixels, of the flow in the folder `root`; `default` where it does not say."""
    settings = _settings_of(root) or {}
    return settings.get("bound", default[0]), settings.get("short_side", default[1])


def _settings_of(root):
    path = os.path.join(root, "flow.json")
    try:
        with open(path) as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and make the flow again") from None


def extract_flow(videos, out, scale, device="cpu", share=(0, 1), workers=0):
    """Write the flow video <out>/<name without suffix>.mp4, for `find_flow`, of every file of some Videos.

    videos: a list of Videos. scale: (bound, short side) as of Computed. share: (rank, world); each of `world`
    ranks takes every world-th file, without waiting for the others. workers: as of workers.in_parallel. Flow
    videos that are there are kept, so the same call resumes. Unreadable videos are listed in
    <out>/bad_videos.txt (path, tab, reason). Returns {"made", "there", "bad"}: numbers of files of this rank.
    Raises UserError if two videos differ only in suffix or `out` has flow of other settings, and OSError if
    the disk is full.
    """
    rank, world = share
    jobs = _jobs(videos, out)[rank::world]
    files.make_folder(out)
    there = _sweep(out, {target for _, target in jobs})
    _agree(out, dict(method="TV-L1", short_side=scale[1], bound=float(scale[0]), **SCHEME), there)
    jobs_left = [job for job in jobs if job[1] not in there]
    extract = partial(_extract_one, scale=scale, device=device)
    results = in_parallel(extract, jobs_left, workers, "flow" if jobs_left and rank == 0 else None)
    bad = {path: reason for (path, _), reason in results if reason}
    _list_bad(out, {path for path, _ in jobs}, bad)
    return {"made": len(jobs_left) - len(bad), "there": len(there), "bad": len(bad)}


def _jobs(lists, out):
    """Sorted [(path of a video, path of its flow), ...] of a list of Videos, every file once."""
    paths = {}
    for videos in lists:
        for i in range(len(videos)):
            path, target = videos.path(i), os.path.join(out, _stem(videos.name(i)) + ".mp4")
            if paths.setdefault(target, path) != path:
                both = f"{printable(path)} and {printable(paths[target])}"
                raise UserError(f"{both} would both become {printable(target)}")
    return sorted((path, target) for target, path in paths.items())


def _stem(name):
    """A video's name without suffix; the last two folders of it if the name leads out of the data set."""
    stem = stem_of(name)
    folders = stem.split("/")
    if os.path.isabs(stem) or ".." in folders:
        stem = "/".join([folder for folder in folders if folder not in ("", ".", "..")][-2:])
    return stem


def _sweep(out, targets):
    """Those of the files `targets` that are there; removes half-written ones, unless a process has them."""
    there = set()
    for folder, _, names in os.walk(out):
        for path in (os.path.join(folder, name) for name in names):
            if path in targets:
                there.add(path)
            elif re.sub(r"\.\d+-\d+\.tmp$", "", path) in targets:
                with suppress(FileNotFoundError), open(path) as file:
                    if files.lock(file, wait=False):
                        os.unlink(path)
    return there


def _agree(out, settings, there):
    """Write the settings to flow.json; UserError if it has others, or if videos are there without it."""
    old = _settings_of(out)
    if old is None and there:
        raise UserError(f"{out} has videos of these names but no flow.json: choose another --out")
    for key in settings if old else ():
        if old.get(key) != settings[key]:
            raise UserError(f"{out} has flow with {key} {old.get(key)}, not {settings[key]}: use that, or "
                            "another --out")  # fmt: skip
    if old is None:
        files.write(os.path.join(out, "flow.json"), json.dumps(settings, indent=1) + "\n")


def _extract_one(job, scale, device):
    """Write the flow of one video. Returns why it cannot be made, or None."""
    path, target = job
    if multiprocessing.parent_process():  # one of several workers
        torch.set_num_threads(1)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with Computed(path, None, *scale, device) as video:
            size = max(CHUNK // (video.height * video.width), 1)
            chunks = (video.get(range(i, min(i + size, len(video)))) for i in range(0, len(video), size))
            write_flow(target, chain.from_iterable(chunks), video.times, video.fps)
    except (OSError, torch.AcceleratorError) as error:  # of the disk or the GPU, no fault of the video
        if getattr(error, "errno", None) in files.NAME_ERRORS:
            return reason_of(error)
        raise
    except Exception as error:
        return reason_of(error)


def _list_bad(out, paths, bad):
    """Write bad_videos.txt: {path: reason} of `bad` in place of the lines for the videos `paths`."""
    listed = Path(out, "bad_videos.txt")
    with open(os.path.join(out, ".lock"), "w") as lock:
        files.lock(lock)  # the ranks share the list
        lines = listed.read_text("utf-8", "surrogateescape").splitlines() if listed.exists() else []
        lines = [line for line in lines if line.partition("\t")[0] not in paths]
        lines += [f"{path}\t{reason}" for path, reason in bad.items()]
        files.write(listed, "".join(f"{line}\n" for line in sorted(lines)))

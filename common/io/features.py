"""Feature cache: the features of every view of every video, computed once and by all ranks.

    blocks = partial(evaluate.blocks, net, net.embed, run=run, workers=workers, bar="features")
    cache = extract("runs/x/features", Extraction(videos, recipe, blocks, {"weights": digest}), run)
    z = cache.rows[cache.first[i] :][: cache.counts[i]]  # (V, D), the views of video i

The folder must be visible to all ranks. All of it is readable without this package:

    features.npy     (N, D): the views of video 0, then those of video 1, ...
    index.npz        counts (videos,): rows of each video; bad, reasons: which videos are unreadable, and why
    features.json    what the features were computed from      videos.txt    the videos, lines 'path label'

index.npz is written last: without it the features are incomplete. Until then there is part-K.npz for each
finished block of videos, K being its first. Blocks do not depend on the number of ranks, and a finished block
is never computed again.
"""

import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.data import Videos
from common.errors import UserError
from common.io import files
from common.modality import Recipe

EVERY = 60  # seconds between two lines about the progress
PARTS, ROWS, INDEX, ABOUT = "part-*.npz", "features.npy", "index.npz", "features.json"
DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)  # of a damaged file


@dataclass(frozen=True, eq=False)
class Extraction:
    """What to compute.

    videos: Videos. recipe: what a view is; `sample` may give each video another number of clips.
    blocks: a function of videos, recipe and `done`, the first videos of finished blocks, such as a partial of
        evaluate.blocks. For the other blocks of this rank it yields (batch of clips.eval_loader, features of
        its views (views, D) float32 on the CPU, or None if no video is readable), until a signal comes.
    identity: plain values by name that tell these features from others, such as a digest of the weights.
        The videos, the recipe and `average` are always compared.
    average: one row for each video, the mean over its views.
    """

    videos: Videos
    recipe: Recipe
    blocks: Callable
    identity: dict = field(default_factory=dict)
    average: bool = False

    @cached_property
    def list(self):
        """The text of videos.txt."""
        return "".join(f"{line}\n" for line in self.videos.lines())

    @cached_property
    def about(self):
        """What is compared with the features.json of a folder: plain values by name."""
        about = self.identity | {f"recipe.{key}": value for key, value in asdict(self.recipe).items()}
        about |= {"average": self.average, "recipe": type(self.recipe).__name__}
        about["videos"] = hashlib.sha256(self.list.encode("utf-8", "surrogateescape")).hexdigest()
        return json.loads(json.dumps(about, default=str))  # as a reader of the file sees it


@dataclass(frozen=True, eq=False)
class Features:
    """rows: (N, D) float32, a memory map of the views of video 0, then those of video 1, ...

    counts: (videos,) int64, rows of each video, 0 where it is unreadable; bad: {index: reason}.
    A loader worker calls `load` itself: pickling a memory map would read all of it.
    """

    rows: np.ndarray
    counts: np.ndarray
    bad: dict

    @cached_property
    def first(self):
        """(videos,) int64: the first row of each video."""
        return np.cumsum(self.counts) - self.counts


def load(folder):
    """The Features in a folder; UserError if there are none, or incomplete or damaged ones."""
    folder = Path(folder)
    if not (folder / INDEX).exists():
        unfinished = ", the same command as before finishes them" * any(folder.glob(PARTS))
        raise UserError(f"{folder} has no complete features{unfinished}")
    try:
        with np.load(folder / INDEX) as index:
            counts, bad, reasons = (index[name] for name in ("counts", "bad", "reasons"))
        rows = np.load(folder / ROWS, mmap_mode="r")
        if len(rows) != counts.sum():
            raise ValueError("rows are missing")
    except (FileNotFoundError, *DAMAGE):
        raise UserError(f"the features in {folder} are damaged: delete that folder") from None
    return Features(rows, counts, dict(zip(bad.tolist(), reasons.tolist(), strict=True)))


@torch.no_grad()
def extract(folder, extraction, run):
    """The Features of an Extraction in `folder`: those that are there, or new ones, computed by all ranks.

    Returns None on all ranks if a signal has stopped one of them; the same call then resumes. The rows are
    the same numbers for any number of ranks, workers, signals and kills (on a GPU up to the last bits, if
    cuDNN chooses other kernels). Raises UserError where the folder has other features or cannot be written,
    where no video can be read, and where features are not finite.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        done = run.on_main(_begin, folder, extraction, run, stack)
        if done is not None:
            _compute(folder, extraction, run, done)
            stopped = torch.tensor(int(run.stop))
            dist.all_reduce(stopped, dist.ReduceOp.MAX, run.patient)
            if stopped:
                run.say(f"stopped by a signal; the finished features are kept in {folder}")
                return None
            run.on_main(_assemble, folder, extraction.videos)
    features = load(folder)
    for i, reason in list(features.bad.items())[:1]:
        counts = f"{len(features.bad)} of {len(features.counts)}"
        run.say(f"{counts} videos have no features, {extraction.videos.name(i)}: {reason}")
    return features


def _begin(folder, extraction, run, stack):
    """First videos of the finished blocks, None if all are. The folder is locked until `stack` is closed."""
    paths, is_complete = list(folder.glob(PARTS)), (folder / INDEX).exists()
    if paths or is_complete:
        _refuse_others(folder, extraction.about)
    if is_complete:
        for path in paths:  # left by a run that was killed just before the end
            path.unlink(missing_ok=True)
        return None
    files.make_folder(folder)
    lock = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, lock)
    if files.lock(lock, wait=False) is False:
        raise UserError(f"another run is computing the features in {folder}")
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    files.write(folder / ABOUT, json.dumps(extraction.about, indent=1))
    files.write(folder / "videos.txt", extraction.list)
    if paths:
        run.say(f"{folder} has the features of {len(paths)} blocks of videos already")
    return {int(path.stem.removeprefix("part-")) for path in paths}


def _refuse_others(folder, about):
    """Raise UserError if features.json of the folder says anything but `about`."""
    try:
        there = json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, ValueError):
        there = {}
    differ = [f"{key} {str(there.get(key))[:24]}, not {str(about.get(key))[:24]}"
              for key in sorted(there.keys() | about.keys()) if there.get(key) != about.get(key)]  # fmt: skip
    if differ:
        raise UserError(f"{folder} has other features ({'; '.join(differ[:3])}): choose another folder, or "
                        "delete that one to compute them again")  # fmt: skip


def _compute(folder, extraction, run, done):
    """Write a part file for each of this rank's blocks, until a signal comes."""
    reported, n_done, n_videos = time.monotonic(), 0, len(extraction.videos)
    for batch, z in extraction.blocks(extraction.videos, extraction.recipe, done=done):
        path = folder / PARTS.replace("*", f"{batch['index'][0]:09d}")
        arrays = _arrays(batch, z, extraction)
        try:
            with files.replacing(path) as file:
                np.savez(file, **arrays)
        except OSError as error:  # on any rank
            raise UserError(f"{path} cannot be written: {error.strerror}; the finished features are kept, "
                            "and the same command resumes") from None  # fmt: skip
        n_done += run.world * len(batch["index"])
        if time.monotonic() - reported >= EVERY and not sys.stderr.isatty():  # there is no progress bar
            run.say(f"features of {min(n_done, n_videos)} more of {n_videos} videos")
            reported = time.monotonic()


def _arrays(batch, z, extraction):
    """The arrays of a part file, from the features z (views, D) of a block."""
    counts = batch["counts"]
    if z is not None and extraction.average:
        z = torch.stack([views.mean(0) for views in z.split(counts.tolist()) if len(views)])
        counts = counts.clamp(max=1)
    rows = np.empty((0, 0), np.float32) if z is None else z.numpy()
    if not np.isfinite(rows).all():
        name = extraction.videos.name(int(batch["index"][0]))
        raise UserError(f"the features of {name} or of videos after it are not finite")
    bad, reasons = zip(*batch["bad"], strict=True) if batch["bad"] else ((), ())
    return {"counts": counts.numpy(), "rows": rows, "width": rows.shape[1],
            "bad": np.array(bad, np.int64), "reasons": np.array(reasons, str)}  # fmt: skip


def _read(path, *names):
    """Arrays of a file, every byte of them checked; UserError if it is damaged, which is deleted."""
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except DAMAGE:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} was damaged and is deleted: the same command computes it again") from None


def _assemble(folder, videos):
    """Write features.npy and index.npz from the part files, one in memory at a time; then delete those."""
    paths = sorted(folder.glob(PARTS))
    if not len(videos):
        raise UserError("none of the 0 videos can be read: the list is empty")
    columns = zip(*(_read(path, "counts", "bad", "reasons", "width") for path in paths), strict=True)
    counts, bad, reasons, widths = map(np.hstack, columns)
    if len(counts) != len(videos):
        n_missing = len(videos) - len(counts)
        raise UserError(f"{folder} lacks the features of {n_missing} of {len(videos)} videos: it must be one "
                        "folder, which all ranks see")  # fmt: skip
    if not counts.any():
        for path in paths:  # so that the same command tries again
            path.unlink()
        raise UserError(f"none of the {len(videos)} videos can be read: {reasons[0]}")
    with files.replacing(folder / ROWS) as file:
        # Written, not mapped: a full disk ends a process that writes into a memory map.
        header = {"descr": "<f4", "fortran_order": False, "shape": (int(counts.sum()), int(widths.max()))}
        np.lib.format.write_array_header_1_0(file, header)
        for path in paths:
            file.write(_read(path, "rows")[0].tobytes())
    with files.replacing(folder / INDEX) as file:
        np.savez(file, counts=counts, bad=bad, reasons=reasons)
    for path in paths:
        path.unlink(missing_ok=True)

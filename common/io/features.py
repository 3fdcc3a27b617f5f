"""Feature cache: the features of every view of every video on disk, computed once and by all ranks.

    what = Extraction(net, net.embed, data.train, recipe, identity={"weights": digest})
    cache = extract("runs/x/features", what, run, workers=8)
    z = cache.rows[cache.first[i] :][: cache.counts[i]]  # (V, D), the views of video i

The folder, which all ranks must see (all of it readable without this package):

    features.npy     (N, D): the views of video 0, then those of video 1, ...
    index.npz        counts (videos,): rows of each; bad, reasons: which videos are unreadable, and why
    features.json    what the features were computed from      videos.txt    the videos, lines 'path label'

index.npz is written last: without it the features are incomplete. Until then part-K.npz hold the finished
blocks of videos. Blocks do not depend on the number of ranks, and a finished one is never computed again, so
a killed run loses at most the last EVERY seconds.
"""

import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import evaluate
from common.data import Videos, as_list, digest_of_videos
from common.errors import UserError
from common.io import files
from common.modality import Recipe

EVERY = 60  # seconds of work in a part file
LARGEST = 2**28  # bytes of features in a part file
PATIENCE = timedelta(days=7)  # how long a finished rank waits for one with a slower disk
PARTS, ROWS, INDEX, ABOUT = "part-*.npz", "features.npy", "index.npz", "features.json"
DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)  # errors of a damaged file


@dataclass(frozen=True, eq=False)
class Extraction:
    """What to compute.

    net: a network; it is in eval mode meanwhile, with the batch-norm statistics of rank 0.
    call: a part of it, (B, C, T, H, W) to (B, D), such as net.embed.
    videos: Videos; recipe: a Recipe, whose `sample` may give each video another number of
        clips.
    identity: plain values by name that tell these features from others, such as a digest of the weights. The
        videos, the recipe and the two flags below are always compared.
    average: one row for each video, the mean over its views. half: keep float16 instead of float32.
    """

    net: torch.nn.Module
    call: Callable
    videos: Videos
    recipe: Recipe
    identity: dict = field(default_factory=dict)
    average: bool = False
    half: bool = False

    @cached_property
    def block(self):
        """How many videos make up a block."""
        return evaluate.videos_per_block(self.recipe)

    @cached_property
    def about(self):
        """What is compared with the features.json of a folder: plain values by name."""
        about = self.identity | {"average": self.average, "half": self.half, "videos_per_block": self.block}
        about["videos"] = digest_of_videos(self.videos)
        about |= {f"recipe.{key}": value for key, value in asdict(self.recipe).items()}
        about["recipe"] = type(self.recipe).__name__
        return json.loads(json.dumps(about, default=str))  # as a reader of the file sees it


@dataclass(frozen=True, eq=False)
class Features:
    """rows: (N, D) float32 or float16, a memory map of the views of video 0, then those of video 1, ...

    counts: (videos,) int64, the rows of each, 0 where it is unreadable; bad: index -> reason.
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
def extract(folder, what, run, workers=0):
    """The Features of an Extraction in `folder`: those that are there, or new ones, computed by all ranks.

    Returns None on all ranks if a signal has stopped one of them; the same call then resumes. The rows are
    the same numbers for any number of ranks, workers, signals and kills (on a GPU up to the last bits, if
    cuDNN chooses other kernels). Raises UserError where the folder has other features or cannot be written,
    where no video can be read, and where features are not finite.
    """
    folder, locks = Path(folder), []
    try:
        done = run.on_main(_begin, folder, what, run, locks)
        if done is not None:
            # For the wait at the end; the default group would give up after half an hour.
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            _compute(folder, what, run, workers, done)
            stopped = torch.tensor(int(run.stop))
            dist.all_reduce(stopped, dist.ReduceOp.MAX, group)
            dist.destroy_process_group(group)
            if stopped:
                run.say(f"stopped by a signal; the finished features are kept in {folder}")
                return None
            run.on_main(_assemble, folder, what)
    finally:
        for lock in locks:
            os.close(lock)
    features = load(folder)
    for i, reason in list(features.bad.items())[:1]:
        run.say(f"{len(features.bad)} of {len(what.videos)} videos have no features, "
                f"{what.videos.name(i)}: {reason}")  # fmt: skip
    return features


def _begin(folder, what, run, locks):
    """Numbers of the finished blocks, None if all is complete; appends a lock on the folder to `locks`."""
    _refuse_others(folder, what.about)
    if (folder / INDEX).exists():
        for path in folder.glob(PARTS):  # left by a run that was killed just before the end
            path.unlink(missing_ok=True)
        return None
    files.make_folder(folder)
    locks.append(os.open(folder, os.O_RDONLY))
    if files.lock(locks[0], wait=False) is False:
        raise UserError(f"another run is computing the features in {folder}")
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    files.write(folder / ABOUT, json.dumps(what.about, indent=1))
    files.write(folder / "videos.txt", as_list(what.videos))
    done = set()
    for path in sorted(folder.glob(PARTS)):
        try:
            done.update((_read(path)["index"] // what.block).tolist())
        except UserError as error:
            run.say(f"{error}; its features are computed again")
            path.unlink()
    if done:
        n_videos = min(len(done) * what.block, len(what.videos))
        run.say(f"{folder} has the features of {n_videos} videos already")
    return done


def _refuse_others(folder, about):
    """Raise UserError if the folder has features of which features.json says anything but `about`."""
    if not (folder / INDEX).exists() and not any(folder.glob(PARTS)):
        return
    try:
        there = json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, ValueError):
        raise UserError(f"{folder} has features of unknown origin: delete it, or choose another") from None
    differ = [f"{key} {str(there.get(key))[:24]}, not {str(about.get(key))[:24]}"
              for key in sorted(there.keys() | about.keys()) if there.get(key) != about.get(key)]  # fmt: skip
    if differ:
        some = "; ".join(differ[:3]) + "; ..." * (len(differ) > 3)
        raise UserError(f"{folder} has other features ({some}): choose another folder, or delete that one to "
                        "compute them again")  # fmt: skip


# -------------------------------------------------------------------------------- part files


def _compute(folder, what, run, workers, done):
    """Write this rank's share of the blocks that are not `done` into part files, until a signal comes."""
    part, n_videos, since, began = [], len(what.videos), time.monotonic(), time.monotonic()
    share = ceil((ceil(n_videos / what.block) - len(done)) / run.world)  # blocks of each rank
    blocks = evaluate.blocks(what.net, what.call, what.videos, what.recipe, run, workers, "features", done)
    for finished, (batch, z) in enumerate(blocks, 1):
        part.append(_block(batch, z, what))
        if time.monotonic() - since >= EVERY or sum(block["rows"].nbytes for block in part) >= LARGEST:
            _write(folder, part)
            part, since = [], time.monotonic()
            if not sys.stderr.isatty():  # there is no progress bar
                count = min((len(done) + finished * run.world) * what.block, n_videos)
                left = timedelta(seconds=round((since - began) / finished * (share - finished)))
                run.say(f"features of {count} of {n_videos} videos, time left {left}")
    if part:
        _write(folder, part)


def _block(batch, z, what):
    """The arrays of a block, from its features z (views, D); z is None if no video is readable."""
    counts, index = batch["counts"], batch["index"].numpy()
    z = torch.empty(0, 0) if z is None else z
    if what.average and len(z):
        z, counts = evaluate.mean_of_views(z, counts), counts.clamp(max=1)
    rows, counts = (z.half() if what.half else z).numpy(), counts.numpy()
    wrong = ~np.isfinite(rows).all(1)
    if wrong.any():
        name = what.videos.name(int(np.repeat(index, counts)[wrong.argmax()]))
        raise UserError(f"the features of {name} are not finite{' as float16' * what.half}")
    bad, reasons = zip(*batch["bad"], strict=True) if batch["bad"] else ((), ())
    bad, reasons = np.array(bad, np.int64), np.array(reasons, str)
    return {"index": index, "counts": counts, "rows": rows, "bad": bad, "reasons": reasons}


def _write(folder, blocks):
    """A part file, named after its first video; complete or absent."""
    part = {name: np.concatenate([block[name] for block in blocks])
            for name in ("index", "counts", "bad", "reasons")}  # fmt: skip
    rows = [block["rows"] for block in blocks if len(block["rows"])] or [blocks[0]["rows"]]
    path = folder / PARTS.replace("*", f"{part['index'][0]:09d}")
    try:
        with files.replacing(path) as file:
            np.savez(file, rows=np.concatenate(rows), width=rows[0].shape[1], **part)
    except OSError as error:  # on any rank
        raise UserError(f"{path} cannot be written: {error.strerror}; the finished features are kept, and "
                        "the same command resumes") from None  # fmt: skip


def _read(path, *names):
    """Arrays of a part file, all or those of some names, every byte checked; UserError if it is damaged."""
    try:
        with np.load(path) as part:
            return {name: part[name] for name in names or part.files}
    except DAMAGE:
        raise UserError(f"{path} is damaged") from None


def _assemble(folder, what):
    """Write features.npy and index.npz from the part files, one in memory at a time; then delete those."""
    paths, n_videos = sorted(folder.glob(PARTS)), len(what.videos)
    counts, bad, widths = np.full(n_videos, -1), {}, set()
    for path in paths:
        part = _read(path, "index", "counts", "bad", "reasons", "width")
        counts[part["index"]] = part["counts"]
        bad |= zip(part["bad"].tolist(), part["reasons"].tolist(), strict=True)
        widths |= {int(part["width"])} - {0}  # 0: none of its videos is readable
    if (counts < 0).any():
        raise UserError(f"{folder} lacks the features of {(counts < 0).sum()} of {n_videos} videos: it must "
                        "be one folder, which all ranks see")  # fmt: skip
    if not widths:
        for path in paths:  # so that the same command tries again
            path.unlink()
        reason = next(iter(bad.values()), "the list is empty")
        raise UserError(f"none of the {n_videos} videos can be read: {reason}")
    if len(widths) > 1:
        raise UserError(f"{folder} has features of two networks: delete that folder")
    first, width, dtype = np.cumsum(counts) - counts, widths.pop(), np.dtype("f2" if what.half else "f4")
    with files.replacing(folder / ROWS) as file:
        # Written, not mapped: a full disk ends a process that writes into a memory map.
        header = {"descr": dtype.str, "fortran_order": False, "shape": (int(counts.sum()), width)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for part in map(_read, paths):
            rows_of = np.split(part["rows"], np.cumsum(part["counts"])[:-1])
            for i, rows in zip(part["index"].tolist(), rows_of, strict=True):
                file.seek(start + int(first[i]) * width * dtype.itemsize)
                file.write(rows.tobytes())
    unreadable = np.array(sorted(bad), np.int64)
    with files.replacing(folder / INDEX) as file:
        np.savez(file, counts=counts, bad=unreadable, reasons=np.array([bad[i] for i in sorted(bad)], str))
    for path in paths:
        path.unlink(missing_ok=True)

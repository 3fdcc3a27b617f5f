"""Features of every view of every video, on disk: computed once, by all ranks; a kill costs a minute.

    found = extract("runs/x/features", net, net.embed, data.train, recipe, run, workers=8)
    z = found.rows[found.first[i] :][: found.counts[i]]  # (V, D), the views of video i
    found = load("runs/x/features")

The folder, which all ranks must see (all of it readable without this package):

    features.npy     (N, D): the views of video 0, then those of video 1, ...
    index.npz        counts (videos,) rows of each; bad, reasons: which cannot be read, and why
    features.json    what the features are of      videos.txt    the videos, lines 'path label'

index.npz is written last: without it the features are unfinished. Until then part-K.npz hold what is done, in
blocks of videos that do not depend on the number of ranks; nothing in them is computed again.
"""

import dataclasses
import json
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import UserError, datasets, evaluate, files

EVERY = 60  # seconds of work that a kill may cost a rank
COPIED = 4096  # rows that go to the device together
LARGEST = 2**28  # bytes of features that a rank holds in memory
PATIENCE = timedelta(days=7)  # of ranks that are done, for one whose disk is slower
PARTS, ROWS, INDEX, ABOUT = "part-*.npz", "features.npy", "index.npz", "features.json"
DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)  # what a damaged file raises


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """rows: (N, D) float32 or float16, a memory map of the views of video 0, then those of video 1, ...

    counts: (videos,) int64, the rows of each, 0 where it is unreadable; bad: index -> reason.
    A loader's worker does not get these but does `load` itself: to pickle a memory map is to read it all.
    """

    rows: np.ndarray
    counts: np.ndarray
    bad: dict

    @cached_property
    def first(self):
        """(videos,) int64: the first row of each video."""
        return np.cumsum(self.counts) - self.counts


def load(folder, about=None):
    """The Features that `extract` left in a folder; UserError if there are none, half of them, or others.

    about: what they must be of, see `describe`.
    """
    folder = Path(folder)
    if about is not None:
        _refuse_others(folder, about)
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
def extract(folder, net, call, videos, recipe, run, workers=0, identity=None, average=False, half=False):
    """Features of `videos` in `folder`, by all ranks of `run`: those that are there, or new ones.

    Args:
        net: the network, in eval mode meanwhile, with the batch-norm statistics of rank 0.
        call: a part of it, (B, C, T, H, W) to (B, D), e.g. net.embed.
        recipe: an evaluate.Recipe; its `sample` may give each video another number of clips.
        identity: plain values by name that tell these features from others, such as a hash of the weights;
            the videos, the recipe and the two flags below are always among them.
        average: one row for each video, the mean of its views. half: keep the rows as float16.

    Returns None on all ranks if a signal has stopped one of them; the same call then goes on. The rows are
    the same numbers for any number of ranks, workers, signals and kills (on a GPU but for the last bits, if
    cuDNN chooses other kernels). Raises UserError where the folder has other features or cannot be written,
    where no video can be read, and where features are not finite.
    """
    folder, locks = Path(folder), []
    about = describe(videos, recipe, identity, average, half)
    try:
        done = run.on_main(_begin, folder, about, videos, recipe, run, locks)
        if done is not None:
            # What waits for the slowest rank; the group that is there would give up after half an hour.
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            _compute(folder, net, call, videos, recipe, run, workers, average, half, done)
            stopped = torch.tensor(int(run.stop))
            dist.all_reduce(stopped, dist.ReduceOp.MAX, group)
            dist.destroy_process_group(group)
            if stopped:
                run.say(f"stopped by a signal; what is done of the features is kept in {folder}")
                return None
            run.on_main(_assemble, folder, videos, half)
    finally:
        for lock in locks:
            os.close(lock)
    found = load(folder)
    for i, reason in list(found.bad.items())[:1]:
        run.say(f"{len(found.bad)} of {len(videos)} videos have no features, {videos.name(i)}: {reason}")
    return found


def describe(videos, recipe, identity=None, average=False, half=False):
    """What features are of, as `extract` has the arguments: plain values by name, kept beside them."""
    about = (identity or {}) | {"average": bool(average), "half": bool(half)}
    about["videos"] = datasets.digest(videos)
    about["videos_per_block"] = evaluate.videos_per_block(recipe)
    about |= {f"recipe.{key}": value for key, value in dataclasses.asdict(recipe).items()}
    about["recipe"] = type(recipe).__name__
    return json.loads(json.dumps(about, default=str))  # as a reader of the file will see it


def _begin(folder, about, videos, recipe, run, locks):
    """Numbers of the blocks that are done, None if all is complete; adds a lock on the folder to `locks`."""
    block = about["videos_per_block"]
    _refuse_others(folder, about)
    if (folder / INDEX).exists():
        for path in folder.glob(PARTS):  # of a run that was killed just before the end
            path.unlink(missing_ok=True)
        return None
    files.make_folder(folder)
    locks.append(_lock(folder))
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    with _writing(folder):
        files.write(folder / ABOUT, json.dumps(about, indent=1))
        files.write(folder / "videos.txt", datasets.as_list(videos))
    done = set()
    for path in sorted(folder.glob(PARTS)):
        try:
            done.update((_read(path)["index"] // block).tolist())
        except UserError as error:
            run.say(f"{error}; what was in it is computed again")
            path.unlink()
    if done:
        run.say(f"{folder} has the features of {min(len(done) * block, len(videos))} videos already")
    return done


def _refuse_others(folder, about):
    """Raise UserError if there are features in the folder that are not what `about` says."""
    if not (folder / INDEX).exists() and not any(folder.glob(PARTS)):
        return
    try:
        there = json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, ValueError):
        raise UserError(f"{folder} has features of unknown origin: delete it, or choose another") from None
    differ = [f"{key} {_short(there.get(key))}, not {_short(about.get(key))}"
              for key in sorted(there.keys() | about.keys()) if there.get(key) != about.get(key)]  # fmt: skip
    if differ:
        some = "; ".join(differ[:3]) + "; ..." * (len(differ) > 3)
        raise UserError(f"{folder} has other features ({some}): choose another folder, or delete that one to "
                        "compute them again")  # fmt: skip


def _short(value):
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def _lock(folder):
    """A lock on a folder, held until it is closed; UserError if another process has it."""
    lock = os.open(folder, os.O_RDONLY)
    if files.lock(lock, wait=False) is False:
        os.close(lock)
        raise UserError(f"another run is computing the features in {folder}")
    return lock


@contextmanager
def _writing(path):
    """A disk that cannot take `path` is one sentence, on any rank."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; what is done of the features is kept, "
                        "and the same command goes on with them") from None  # fmt: skip


# -------------------------------------------------------------------------------- parts


def _compute(folder, net, call, videos, recipe, run, workers, average, half, done):
    """Write this rank's share of the blocks that are not `done` as part files, until a signal comes."""
    block, held, since, began = evaluate.videos_per_block(recipe), [], time.monotonic(), time.monotonic()
    share = ceil((ceil(len(videos) / block) - len(done)) / run.world)  # of the blocks, for each rank
    found = evaluate.blocks(net, call, videos, recipe, run, workers, "features", done)
    for mine, (batch, z) in enumerate(found, 1):
        held.append(_of_block(batch, z, videos, average, half))
        if time.monotonic() - since >= EVERY or sum(part["rows"].nbytes for part in held) >= LARGEST:
            _write(folder, held)
            held, since = [], time.monotonic()
            if not sys.stderr.isatty():  # without the bar
                count = min((len(done) + mine * run.world) * block, len(videos))
                left = timedelta(seconds=round((since - began) / mine * (share - mine)))
                run.say(f"features of {count} of {len(videos)} videos, time left {left}")
    if held:
        _write(folder, held)


def _of_block(batch, z, videos, average, half):
    """What a part file keeps of a block, and of its features z (views, D), None if no video is readable."""
    counts, index = batch["counts"], batch["index"].numpy()
    z = torch.empty(0, 0) if z is None else z
    if average and len(z):
        z = evaluate.mean_of_views(z, counts)
        counts = counts.clamp(max=1)
    rows, counts = (z.half() if half else z).numpy(), counts.numpy()
    wrong = ~np.isfinite(rows).all(1)
    if wrong.any():
        name = videos.name(int(np.repeat(index, counts)[wrong.argmax()]))
        raise UserError(f"the features of {name} are not finite{' as float16' * half}")
    bad, reasons = zip(*batch["bad"], strict=True) if batch["bad"] else ((), ())
    bad, reasons = np.array(bad, np.int64), np.array(reasons, str)
    return {"index": index, "counts": counts, "rows": rows, "bad": bad, "reasons": reasons}


def _write(folder, held):
    """A part file of some blocks, named after its first video; complete or absent."""
    part = {name: np.concatenate([x[name] for x in held]) for name in ("index", "counts", "bad", "reasons")}
    rows = np.concatenate([x["rows"] for x in held if len(x["rows"])] or [held[0]["rows"]])
    path = folder / PARTS.replace("*", f"{part['index'][0]:09d}")
    with _writing(path), files.replacing(path) as file:
        np.savez(file, rows=rows, width=rows.shape[1], **part)


def _read(path, *names):
    """Arrays of a part file, all or those of some names, every byte checked; UserError if it is damaged."""
    try:
        with np.load(path) as part:
            return {name: part[name] for name in names or part.files}
    except DAMAGE:
        raise UserError(f"{path} is damaged") from None


def _assemble(folder, videos, half):
    """Make features.npy and index.npz of the part files, with one in memory at a time; then delete those."""
    paths, counts, bad, widths = sorted(folder.glob(PARTS)), np.full(len(videos), -1), {}, set()
    for path in paths:
        part = _read(path, "index", "counts", "bad", "reasons", "width")
        counts[part["index"]] = part["counts"]
        bad |= zip(part["bad"].tolist(), part["reasons"].tolist(), strict=True)
        widths |= {int(part["width"])} - {0}  # 0: none of its videos can be read
    if (counts < 0).any():
        lacks = f"{folder} lacks the features of {(counts < 0).sum()} of {len(videos)} videos"
        raise UserError(f"{lacks}: it must be one folder, which all ranks see")
    if not widths:
        for path in paths:  # so that the same command tries again
            path.unlink()
        reason = next(iter(bad.values()), "the list is empty")
        raise UserError(f"none of the {len(videos)} videos can be read: {reason}")
    if len(widths) > 1:
        raise UserError(f"{folder} has features of two networks: delete that folder")
    _assemble_rows(folder / ROWS, paths, counts, widths.pop(), np.dtype(np.float16 if half else np.float32))
    unreadable = np.array(sorted(bad), np.int64)
    with _writing(folder / INDEX), files.replacing(folder / INDEX) as file:
        np.savez(file, counts=counts, bad=unreadable, reasons=np.array([bad[i] for i in sorted(bad)], str))
    for path in paths:
        path.unlink(missing_ok=True)


def _assemble_rows(target, paths, counts, width, dtype):
    """The .npy file of all rows. Written, not mapped: a full disk ends a process that writes to a map."""
    first = (np.cumsum(counts) - counts).tolist()
    with _writing(target), files.replacing(target) as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (int(counts.sum()), width)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for part in map(_read, paths):
            each = np.split(part["rows"], np.cumsum(part["counts"])[:-1])
            for i, rows in zip(part["index"].tolist(), each, strict=True):
                file.seek(start + first[i] * width * dtype.itemsize)
                file.write(rows.tobytes())


# -------------------------------------------------------------------------------- of several networks


class Table:
    """Features of several networks side by side, (N, D), of the videos of some lists, one after the other.

    Args:
        parts: for each list, for each network (rows, at): a memory map, such as Features.rows, and which of
            its rows, (N_i,) int64.
        widths: how many columns of a network's rows count, the first ones; D is their sum.

    Until `hold` they are read when they are asked for, in blocks, one block ahead. The numbers are the same.
    """

    def __init__(self, parts, widths, device):
        self.parts, self.widths, self.device, self.held = parts, widths, device, None
        self.ends = np.cumsum([len(networks[0][1]) for networks in parts])
        self.dtype = torch.float16 if parts[0][0][0].dtype == np.float16 else torch.float32

    def __len__(self):
        return int(self.ends[-1])

    @property
    def bytes(self):
        """What `hold` takes."""
        return len(self) * sum(self.widths) * self.dtype.itemsize

    def hold(self):
        """Keep all of them on the device."""
        held = torch.empty(len(self), sum(self.widths), dtype=self.dtype, device=self.device)
        for start in range(0, len(self), COPIED):
            block = held[start : start + COPIED]
            block.copy_(self._read(np.arange(start, start + len(block))))
        self.held = held

    def part(self, i):
        """(N_i, D) float32 on the device: those of list i."""
        first = int(self.ends[i - 1]) if i else 0
        if self.held is not None:
            return self.held[first : self.ends[i]].float()
        return self._read(np.arange(first, self.ends[i])).to(self.device).float()

    def batches(self, places, together=8):
        """Yield (at, (B, D) float32 on the device) for each of the sorted int64 arrays `at` (B,) of `places`.

        together: of how many of them the rows are read at once, if they are not held.
        """
        if self.held is not None:
            for at in places:
                yield at, self.held.index_select(0, torch.from_numpy(at).to(self.device)).float()
            return
        places = iter(places)
        with ThreadPoolExecutor(1) as pool:

            def ask():
                group = list(islice(places, together))
                union = np.unique(np.concatenate([np.empty(0, np.int64), *group]))
                return group, union, pool.submit(self._read, union)

            group, union, rows = ask()
            while group:
                following, rows = ask(), rows.result().to(self.device, non_blocking=True)
                for at in group:
                    among = torch.from_numpy(np.searchsorted(union, at)).to(self.device)
                    yield at, rows.index_select(0, among).float()
                group, union, rows = following

    def _read(self, places):
        """(len(places), D) of the rows at sorted `places`, on the CPU."""
        cuda = self.device.type == "cuda"
        out = torch.empty(len(places), sum(self.widths), dtype=self.dtype, pin_memory=cuda)
        cuts = [0, *np.searchsorted(places, self.ends)]
        for i, networks in enumerate(self.parts):
            mine = slice(cuts[i], cuts[i + 1])
            local = places[mine] - (self.ends[i - 1] if i else 0)
            for (rows, at), columns in zip(networks, out.split(self.widths, 1), strict=True):
                columns[mine] = torch.from_numpy(rows[at[local], : columns.shape[1]])
        return out


def free_bytes(device):
    """Bytes that tensors may still take on a device; of a CPU's memory, the share of one of its processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

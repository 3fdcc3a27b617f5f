"""Which frames: samplers, training and test sets, and batches that are a pure function of the step."""

from contextlib import ExitStack

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from common.errors import VideoError, reasons
from common.io.decode import Video
from common.io.workers import loader

MAX_UNREADABLE = 10  # videos in a row, after which training gives up


# ---- which of n frames: positions past the end start again at the beginning ----------------------


def dense(n, length, stride, rng):
    """(length,) int64: every stride-th frame of a random window of length * stride frames."""
    start = rng.integers(max(n - length * stride, 0) + 1)
    return (start + stride * np.arange(length)) % n


def dense_test(n, length, stride, clips):
    """(clips, length) int64: windows spread evenly over the video; a single one is central."""
    room = max(n - length * stride, 0)
    starts = np.rint(np.linspace(0, room, clips) if clips != 1 else [room / 2]).astype(np.int64)
    return (starts[:, None] + stride * np.arange(length)) % n


def dense_parts(n, length, stride, clips):
    """(clips, length) int64: windows at the starts of equal parts of where one can start; one is central."""
    room = max(n - stride * (length - 1), 1)
    starts = np.arange(clips) * room // clips if clips != 1 else np.array([room // 2])
    return (starts[:, None] + stride * np.arange(length)) % n


def uniform(n, length, rng=None):
    """(length,) int64: a frame of each of `length` equal segments (TSN), random or central."""
    inside = np.full(length, 0.5) if rng is None else rng.random(length)
    return ((np.arange(length) + inside) * n / length).astype(np.int64)


def uniform_test(n, length, clips):
    """(clips, length) int64: a frame of each of `length` equal segments, in clip i at its share i / clips.

    A single clip takes the centres of the segments.
    """
    if clips == 1:
        return uniform(n, length)[None]
    clip, segment = np.arange(clips)[:, None], np.arange(length)
    return (segment * clips + clip) * n // (length * max(clips, 1))


# ---- data sets -----------------------------------------------------------------------------------


class Order:
    """Endless shuffled passes over n things: order[p] = (index, number of the pass); order.take(p, 8)."""

    def __init__(self, n, seed):
        self.n, self.seed, self._passes = n, seed, {}

    def __getitem__(self, p):
        draw, place = divmod(p, self.n)
        return int(self._pass(draw)[place]), draw

    def take(self, first, count):
        """(count,) int64: the indices at the positions first, first + 1, ..."""
        draw, place = np.divmod(np.arange(first, first + count), self.n)
        return np.concatenate([self._pass(d)[place[draw == d]] for d in range(draw[0], draw[-1] + 1)])

    def _pass(self, draw):
        if draw not in self._passes:
            if len(self._passes) > 1:  # stand-ins may reach into the next pass
                del self._passes[min(self._passes)]
            self._passes[draw] = np.random.default_rng((self.seed, draw)).permutation(self.n)
        return self._passes[draw]


def open_video(videos, index):
    """The video `index` of a list, to be opened by `with`."""
    return Video(videos.path(index), videos.span(index))


def _decode(dataset, index, *rng):
    """(clips, the label that `sample` gives them, or None) of a video of Clips or Views.

    Raises VideoError if the video cannot be read, and whatever `sample` raises.
    """
    with ExitStack() as stack:
        with reasons():
            source = stack.enter_context(dataset.open(dataset.videos, index))
        sample = dataset.sample(source, *rng)
        windows, label = sample if isinstance(sample, tuple) else (sample, None)
        windows = [
            np.asarray(window, dtype=np.int64) for window in windows
        ]  # a bug of `sample` surfaces here
        with reasons():
            return source.clips(windows, dataset.short_side), label


class Clips(Dataset):
    """Training clips: clips[p] is position p of an endless shuffled order of `videos`.

    sample(video, rng) -> list of index arrays, one per clip, which are decoded in one call; or a tuple of
    that list and a tensor, a label that replaces the video's.
    open(videos, index) -> the source of the clips, a context manager like Video, which is the default.
    view(list of uint8 (T, C, H, W)) -> tensors in tuples or dicts, such as {net: {view: clip}}. Its
    randomness is torch's default generator, here a function of (seed, index, pass) and put back afterwards.
    clips[p] = dict(views=what view gives, label=int64 () or float32 (K,), index=int, bad=[(index, reason)]).
    An unreadable video is replaced by the next position, with a new random draw, so that no clip repeats in
    a batch; MAX_UNREADABLE in a row raise VideoError. A video is unreadable whatever opening or decoding it
    raises; what `sample` and `view` raise is a bug and surfaces.
    """

    def __init__(self, videos, sample, view, seed, short_side=None, open=open_video):
        self.videos, self.sample, self.view, self.seed, self.open = videos, sample, view, seed, open
        self.short_side, self.order = short_side, Order(len(videos), seed)

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, p):
        bad = []
        for k in range(MAX_UNREADABLE):
            index, draw = self.order[p + k]
            rng = np.random.default_rng((self.seed, index, draw, k))
            torch_seed = int(rng.integers(2**63))
            try:
                clips, label = _decode(self, index, rng)
            except VideoError as error:
                bad.append((index, str(error)))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(torch_seed)
                views = self.view(clips)
            label = _label_of(self.videos, index) if label is None else label
            return dict(views=views, label=label, index=index, bad=bad)
        path, reason = self.videos.path(bad[0][0]), bad[0][1]
        raise VideoError(f"{path}: {reason} (and so for the {MAX_UNREADABLE - 1} videos drawn after it)")


class Views(Dataset):
    """Test views: views[i] belongs to video i, which is never replaced.

    sample(video) -> list of index arrays; view(list of uint8 (T, C, H, W)) -> (V, T, C, H, W); open as in
    Clips. What is random in `view` (torch's default generator) is a function of i.
    views[i] = dict(views=(V, T, C, H, W) or None if unreadable, label, index, bad=reason or None).
    """

    def __init__(self, videos, sample, view, short_side=None, open=open_video):
        self.videos, self.sample, self.view = videos, sample, view
        self.short_side, self.open = short_side, open

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        item = dict(views=None, label=_label_of(self.videos, i), index=i, bad=None)
        try:
            clips, _ = _decode(self, i)
        except VideoError as error:
            return dict(item, bad=str(error))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(i)
            return dict(item, views=self.view(clips))


def _label_of(videos, index):
    label = torch.as_tensor(videos.labels[index])
    return label.float() if label.ndim else label.long()


# ---- batches -------------------------------------------------------------------------------------


def train_loader(sources, start, stop, rank=0, world=1, workers=0):
    """Batches start..stop-1 of sources = [(Clips, batch size per rank), ...], one set of workers.

    Batch k holds for a batch size of B the positions (k * world + rank) * B + 0..B-1; nothing
    before `start` is decoded. Yields a list with one dict per source: views, each (B, ...),
    label (B, ...), index (B,), bad=[(index, reason), ...].
    """
    return loader(_TrainBatches(sources, rank, world), range(start, stop), workers)


class _TrainBatches(Dataset):
    """The batches of one rank by the number of their step."""

    def __init__(self, sources, rank, world):
        self.sources, self.rank, self.world = sources, rank, world

    def __getitem__(self, step):
        return [
            self._batch(clips, size, (step * self.world + self.rank) * size) for clips, size in self.sources
        ]

    def _batch(self, clips, size, first):
        items = [clips[p] for p in range(first, first + size)]
        bad = [fault for item in items for fault in item["bad"]]
        return dict(_stack(items, "views", "label", "index"), bad=bad)


def _stack(items, *keys):
    return {key: default_collate([item[key] for item in items]) for key in keys}


def eval_loader(views, block, rank=0, world=1, workers=0, done=()):
    """The test set in blocks of `block` consecutive videos; rank r takes blocks r, r + world, ...

    So the same videos go through the network together for any number of ranks. done: first videos of the
    blocks that are left out; the ranks share the other blocks in the same way. Yields
    dict(views=(sum of V, T, C, H, W) or None if none is readable, counts=(videos,) views of each,
    label, index, bad=[(index, reason), ...]).
    """
    starts = [start for start in range(0, len(views), block) if start not in done]
    return loader(_TestBlocks(views, block), starts[rank::world], workers)


class _TestBlocks(Dataset):
    """The blocks of a test set by their first videos."""

    def __init__(self, views, block):
        self.views, self.block = views, block

    def __getitem__(self, start):
        items = [self.views[i] for i in range(start, min(start + self.block, len(self.views)))]
        readable = [item["views"] for item in items if item["bad"] is None]
        counts = torch.tensor([0 if item["bad"] else len(item["views"]) for item in items])
        bad = [(item["index"], item["bad"]) for item in items if item["bad"] is not None]
        views = torch.cat(readable) if readable else None
        return dict(_stack(items, "label", "index"), views=views, counts=counts, bad=bad)

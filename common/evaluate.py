"""Multi-view scoring across ranks, metrics, per-class and per-video files, one-file prediction.

    python -m common.tools.predict runs/cmpl/model.pt clip.mp4

A test view is one spatial crop of one clip. All views of a video go through the network together
and are averaged, as probabilities, logits or embeddings; a video is scored once, by one rank, in a block
of videos that does not depend on the number of ranks. So scores are the same numbers for any number of
ranks and workers.
"""

import csv
import io
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from common.clips import Views, eval_loader
from common.errors import UserError
from common.io import files
from common.io.workers import watched
from common.run import gather

VIEWS_PER_BATCH = 64  # how many views go through the network at once, about


@dataclass(frozen=True)
class Scores:
    """What a network says about the videos of a list, in the order of the list.

    probs (N, K) float32, one row per video (zero where it is unreadable); hits (N,) how many of its
    views (N,) were right; bad: index -> reason. logits (N, K) float32: the mean over the views, whatever
    average the probabilities are of.
    """

    probs: np.ndarray
    hits: np.ndarray
    views: np.ndarray
    labels: np.ndarray
    bad: dict
    logits: np.ndarray = None

    @classmethod
    def of(cls, probs, videos, bad):
        """Those of probabilities (N, K) of single-label `videos`, as if each had a single view."""
        readable = np.isin(np.arange(len(probs)), list(bad), invert=True)
        hits, views = readable & (probs.argmax(1) == videos.labels), np.ones(len(probs), np.int64)
        return cls(probs * readable[:, None], hits.astype(np.int64), views, videos.labels, bad)


def score(net, videos, recipe, run, workers=0, bar=False):
    """Score `videos` with all ranks of `run`; every rank returns the same Scores.

    The ranks begin with the batch-norm statistics of rank 0 and meet again only at the end, in one
    gather over CPU memory. None is returned on all ranks if a signal has stopped one of them.
    """

    def of_videos(y, batch):
        return average_views(net, y, batch, recipe.average, videos.labels.ndim == 2)

    found = _each_video(net, what_is_averaged(net, recipe), of_videos, videos, recipe, run, workers, bar)
    if found is None:
        return None
    rows, bad = found
    probs, logits = np.zeros((2, len(videos), len(rows[0][1])), np.float32)
    views = 1 if recipe.average == "embeddings" else recipe.views
    hits, counts = np.zeros(len(videos), np.int64), np.full(len(videos), views)
    for index, p, z, right, count in rows:
        probs[index], logits[index], hits[index], counts[index] = p, z, right, count
    return Scores(probs, hits, counts, videos.labels, bad, logits)


def embed(net, videos, recipe, run, workers=0, bar=False):
    """(features (N, D) float32, bad): net.embed averaged over the views of each video, on every rank.

    Rows of unreadable videos are zero, bad: index -> reason. None if a signal has stopped a rank.
    """

    def of_videos(z, batch):
        index = batch["index"][batch["counts"] > 0].tolist()
        return list(zip(index, mean_of_views(z, batch["counts"]).numpy(), strict=True))

    found = _each_video(net, net.embed, of_videos, videos, recipe, run, workers, bar)
    if found is None:
        return None
    rows, bad = found
    features = np.zeros((len(videos), len(rows[0][1])), np.float32)
    for index, z in rows:
        features[index] = z
    return features, bad


def save_features(path, net, videos, classes, recipe, run, workers=0):
    """Write `embed` of the readable videos: .npz of features (N, D), labels and names (N,), classes (K,)."""

    def write(features, good):
        names = np.array([videos.name(i) for i in good])
        with files.replacing(path) as file:
            np.savez(file, features=features[good], labels=videos.labels[good], names=names,
                     classes=np.array(classes))  # fmt: skip

    run.on_main(files.make_folder, Path(path).parent)  # before the long work
    found = embed(net, videos, recipe, run, workers, bar=True)
    if found is not None:
        run.on_main(write, found[0], np.setdiff1d(np.arange(len(videos)), list(found[1])))


def _each_video(net, call, of_videos, videos, recipe, run, workers, bar):
    """(rows, bad) of all ranks; a row is (index, ...) from of_videos(call(views of a block), block)."""
    rows, bad = [], {}
    for batch, y in blocks(net, call, videos, recipe, run, workers, bar and "scoring"):
        bad.update(batch["bad"])
        if y is not None:
            rows += of_videos(y, batch)
    return _gather(rows, bad, run.stop, videos)  # also of a rank without videos


def videos_per_block(recipe):
    """How many videos go through a network together, for any number of ranks."""
    return max(1, VIEWS_PER_BATCH // (recipe.views * recipe.pictures))


@torch.no_grad()
def blocks(net, call, videos, recipe, run, workers=0, bar=None, done=()):
    """Yield (batch of video.eval_loader, call(its views) as float32 on the CPU) for the blocks of this rank.

    The second is None where no video of a block can be read. All ranks begin with the batch-norm statistics
    of rank 0, and `net`, of which `call` is a part, is in eval mode until the end. A signal ends it after the
    block at hand. bar: the name of a progress bar on rank 0. done: numbers of blocks that are left out.
    """
    for buffer in net.buffers():  # since the last step of DDP each rank has had its own
        dist.broadcast(buffer, 0)
    views = Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)
    loader = eval_loader(views, videos_per_block(recipe), run.rank, run.world, workers, done)
    quiet = not (bar and run.main and sys.stderr.isatty())
    was_training = net.training
    net.eval()
    try:
        for batch in tqdm(watched(loader), total=len(loader), desc=bar, leave=False, disable=quiet):
            y = None
            if batch["views"] is not None:
                x = recipe.to_input(batch["views"], run.device)
                with run.autocast():
                    y = torch.cat([call(part) for part in x.split(VIEWS_PER_BATCH)])
                y = y.float().cpu()
            yield batch, y
            if run.stop:
                break
    finally:
        net.train(was_training)


def mean_of_views(z, counts):
    """(views of a block, D) to (its readable videos, D), counts (videos,) the views of each."""
    return torch.stack([views.mean(0) for views in z.split(counts.tolist()) if len(views)])


def what_is_averaged(net, recipe):
    """The part of `net` whose values `average_views` averages: net.embed, or the whole."""
    return net.embed if recipe.average == "embeddings" else net


@torch.no_grad()
def average_views(net, y, batch, average, multilabel):
    """y (views of a block, K) or (views, D) to a row per readable video.

    A row is (index, probabilities (K,), mean logits (K,), right views, views). Probabilities are softmax (or,
    for multi-label data, sigmoid), averaged over the views of a video (average="softmax"), or those of its
    averaged logits (average="logits"), or of the logits of its averaged embedding, in float32
    (average="embeddings"); the video then counts as a single view.
    """
    squash = torch.sigmoid if multilabel else lambda x: x.softmax(-1)
    counts, rows, start = batch["counts"], [], 0
    if average == "embeddings":
        z = mean_of_views(y, counts)
        y, counts = net.head(z.to(net.fc.weight.device)).float().cpu(), counts.clamp(max=1)
    for count, label, index in zip(counts, batch["label"], batch["index"], strict=True):
        if not count:
            continue  # unreadable
        part = y[start : start + int(count)]  # (V, K)
        start += int(count)
        logits = part.mean(0)
        p = squash(part).mean(0) if average == "softmax" else squash(logits)
        hits = 0 if multilabel else int((part.argmax(1) == label).sum())
        rows.append((int(index), p.numpy(), logits.numpy(), hits, len(part)))
    return rows


def _gather(rows, bad, halted, videos):
    everyone = gather((rows, bad, halted))
    if any(part[2] for part in everyone):
        return None
    rows = [row for part in everyone for row in part[0]]
    bad = dict(sorted(item for part in everyone for item in part[1].items()))
    if sorted([row[0] for row in rows] + list(bad)) != list(range(len(videos))):
        raise RuntimeError("a test video was scored twice or not at all")
    if not rows:
        raise UserError(f"none of the {len(videos)} test videos can be read: {next(iter(bad.values()))}")
    return rows, bad


@torch.no_grad()
def precise_bn(net, videos, recipe, run, workers=0, block=40):
    """Give every batch norm of `net` the mean and variance of its inputs over all clips of `videos`.

    But those of frozen stages, which stay in eval mode. PreciseBN (Wu and Johnson 2021, section 3). The
    layers before it are normalised by the statistics of blocks of `block` videos; all clips count alike. The
    blocks' sums are added in the order of the blocks: any number of ranks gives the same bits. Left out are
    unreadable videos, and a block of a single clip, which may have no variance; with nothing left the
    statistics stay. A signal ends it early: the test that follows then stops as well.
    """
    net.train()
    norms = [module for module in net.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]  # fmt: skip
    n_blocks = math.ceil(len(videos) / block)
    sums = [torch.zeros(n_blocks, 3, norm.num_features, dtype=torch.float64, device=run.device)
            for norm in norms]  # fmt: skip

    def add(total, module, inputs):  # numbers, sums and squares of the block at hand
        x = inputs[0].float()
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        mean, var = mean.double(), var.double()
        total[i] += count * torch.stack([torch.ones_like(mean), mean, var + mean**2])

    pairs = list(zip(norms, sums, strict=True))
    hooks = [norm.register_forward_pre_hook(partial(add, total)) for norm, total in pairs]
    views = Views(videos, recipe.sample, recipe.view, open=recipe.open)
    for batch in watched(eval_loader(views, block, run.rank, run.world, workers)):
        i = int(batch["index"][0]) // block
        if batch["views"] is not None and len(batch["views"]) > 1:
            with run.autocast():
                net.embed(recipe.to_input(batch["views"], run.device))
        if run.stop:
            break
    for hook in hooks:
        hook.remove()
    for norm, total in pairs:
        dist.all_reduce(total)  # exact: each block is of one rank, and zero on the others
        total = total.sum(0)
        if total.any():
            count, mean, square = total[0], total[1] / total[0], total[2] / total[0]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((square - mean**2) * count / (count - 1))
    net.eval()


# -------------------------------------------------------------------------------- metrics


def metrics(scores):
    """Percentages by name, counting every video: an unreadable one is wrong.

    top1, top5, mAP, mean_class (mean of the classes' accuracies) and clip_top1 (single views); of multi-label
    data mAP alone; videos and unreadable are counts.
    """
    if scores.labels.ndim == 2:
        found = {"mAP": 100 * mean_average_precision(scores.probs, scores.labels)}
    else:
        ranks = rank_of_label(scores)
        right = ranks == 0
        counts, K = np.bincount(scores.labels), scores.probs.shape[1]
        classes = counts > 0
        per_class = np.bincount(scores.labels, right)[classes] / counts[classes]
        found = {
            "top1": 100 * float(right.mean()),
            "top5": 100 * float((ranks < 5).mean()),
            "mAP": 100 * mean_average_precision(scores.probs, scores.labels[:, None] == np.arange(K)),
            "mean_class": 100 * float(per_class.mean()),
            "clip_top1": 100 * float(scores.hits.sum() / scores.views.sum()),
        }
    return found | {"videos": len(scores.labels), "unreadable": len(scores.bad)}


def rank_of_label(scores):
    """(N,) how many classes come before the true one (of equal ones the first).

    All of them for NaN, and more for an unreadable video. Counting is ten times as fast as sorting.
    """
    probs, y = scores.probs, scores.labels[:, None]
    own = np.take_along_axis(probs, y, 1)
    ranks = (~(probs <= own)).sum(1) + ((probs == own) & (np.arange(probs.shape[1]) < y)).sum(1)
    ranks[list(scores.bad)] = np.iinfo(ranks.dtype).max
    return ranks


def mean_average_precision(probs, labels):
    """Mean over classes of the mean precision at each positive; classes without one do not count."""
    found = []
    for p, y in zip(probs.T, labels.T, strict=True):
        if y.any():
            hit = y[np.argsort(-p, kind="stable")].astype(bool)
            found.append((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())
    return float(np.mean(found))


def write_files(out, scores, videos, classes):
    """predictions.csv (one row per video) and per_class.csv in the folder `out`."""
    multilabel = scores.labels.ndim == 2
    top = np.argsort(-scores.probs, axis=1, kind="stable")[:, :5]
    rows = []
    for i, order in enumerate(top):
        label = np.flatnonzero(scores.labels[i]) if multilabel else [scores.labels[i]]
        said = [f"{classes[k]}:{scores.probs[i, k]:.6f}" if i not in scores.bad else "" for k in order]
        rows.append([videos.name(i), "|".join(classes[k] for k in label), *said, scores.bad.get(i, "")])
    names = [f"top{k + 1}" for k in range(top.shape[1])]
    write_csv(out / "predictions.csv", ["video", "label", *names, "unreadable"], rows)
    if not multilabel:
        right, rows = rank_of_label(scores) == 0, []
        for k, name in enumerate(classes):
            mine = scores.labels == k
            accuracy = f"{100 * right[mine].mean():.2f}" if mine.any() else ""
            rows.append([name, int(mine.sum()), int(right[mine].sum()), accuracy])
        write_csv(out / "per_class.csv", ["class", "videos", "right", "accuracy"], rows)


def write_csv(path, header, rows):
    """Write a table, complete or absent."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    files.write(path, text.getvalue())


def report(net, data, recipe, run, workers, **words):
    """The last test of a run: all views of every test video.

    Writes predictions.csv, per_class.csv and result.json, prints RESULT with `words` in front.
    """
    scores = score(net, data.test, recipe, run, workers, bar=True)
    if scores is None:
        run.say("stopped by a signal during the test; the same command tests again")
        return
    if run.main:
        write_files(run.out, scores, data.test, data.classes)
    run.result({"script": run.script, "data": data.name, **words, **metrics(scores),
                "seconds": round(run.seconds)})  # fmt: skip

"""Multi-view scoring across ranks, metrics, and tables of classes and videos.

A test view is one spatial crop of one clip. All views of a video go through the network together and are
averaged as probabilities, logits or embeddings. A video is scored once, by one rank, in a block of videos
that does not depend on the number of ranks, so any number of ranks and workers gives the same numbers.

A `recipe` (common/modality.py has one) says what a network sees of a video: `open`, `sample`, `view` and
`short_side` for clips.Views, `to_input(views, device)`, `average`, and the numbers of `views` and `pictures`.
"""

import csv
import io
import math
import sys
from dataclasses import dataclass, replace
from functools import partial

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
LOGGED = ("top1", "top5", "mean_class", "mAP")  # metrics of a quick test


@dataclass(frozen=True)
class Scores:
    """Scores of the videos of a list, in the order of the list.

    probs (N, K) float32: one row per video, zero where it is unreadable. hits (N,): how many of its views
    (N,) were right. bad: {index: reason}. logits (N, K) float32: the mean over the views, however the
    probabilities were averaged.
    """

    probs: np.ndarray
    hits: np.ndarray
    views: np.ndarray
    labels: np.ndarray
    bad: dict
    logits: np.ndarray = None

    @classmethod
    def of(cls, probs, videos, bad):
        """Scores from probabilities (N, K) of single-label `videos`, as if each had a single view."""
        readable, views = np.ones(len(probs), bool), np.ones(len(probs), np.int64)
        readable[list(bad)] = False
        hits = readable & (probs.argmax(1) == videos.labels)
        return cls(probs * readable[:, None], hits.astype(np.int64), views, videos.labels, bad)


def score(net, videos, recipe, run, workers=0, bar=False):
    """Score `videos` with all ranks of `run`; every rank returns the same Scores.

    The ranks begin with the batch-norm statistics of rank 0 and meet again only at the end, in one
    gather over CPU memory. All ranks return None if a signal has stopped one of them. Raises UserError if no
    video can be read.
    """
    rows, bad = [], {}
    call = what_is_averaged(net, recipe)
    for batch, y in blocks(net, call, videos, recipe, run, workers, bar and "scoring"):
        bad.update(batch["bad"])
        if y is not None:
            rows += average_views(net, y, batch, recipe.average, videos.labels.ndim == 2)
    all_rows, all_bad, stopped = zip(*gather((rows, bad, run.stop)), strict=True)  # of every rank
    if any(stopped):
        return None
    rows = [row for rows in all_rows for row in rows]
    bad = dict(sorted(item for bad in all_bad for item in bad.items()))
    if sorted([row[0] for row in rows] + list(bad)) != list(range(len(videos))):
        raise RuntimeError("a test video was scored twice or not at all")
    if not rows:
        raise UserError(f"none of the {len(videos)} test videos can be read: {next(iter(bad.values()))}")
    probs, logits = np.zeros((2, len(videos), len(rows[0][1])), np.float32)
    n_views = 1 if recipe.average == "embeddings" else recipe.views
    hits, views = np.zeros(len(videos), np.int64), np.full(len(videos), n_views)
    for index, *row in rows:
        probs[index], logits[index], hits[index], views[index] = row
    return Scores(probs, hits, views, videos.labels, bad, logits)


def videos_per_block(recipe):
    """How many videos go through a network together, for any number of ranks."""
    return max(1, VIEWS_PER_BATCH // (recipe.views * recipe.pictures))


@torch.no_grad()
def blocks(net, call, videos, recipe, run, workers=0, bar=None, done=()):
    """Yield (batch of clips.eval_loader, call(views) as float32 on the CPU) for the blocks of this rank.

    The second is None if no video of the block can be read. All ranks begin with the batch-norm statistics
    of rank 0. `net`, of which `call` is a part, is in eval mode until the end. A signal ends the loop after
    the current block. bar: the name of a progress bar on rank 0. done: first videos of blocks to leave out.
    """
    for buffer in net.buffers():  # since the last step of DDP each rank has had its own
        dist.broadcast(buffer, 0)
    dataset = Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)
    loader = eval_loader(dataset, videos_per_block(recipe), run.rank, run.world, workers, done)
    quiet = not (bar and run.main and sys.stderr.isatty())
    was_training = net.training
    net.eval()
    try:
        for batch in tqdm(watched(loader), total=len(loader), desc=bar, leave=False, disable=quiet):
            y = None
            if batch["views"] is not None:
                x = recipe.to_input(batch["views"], run.device)
                with run.autocast():
                    y = torch.cat([call(views) for views in x.split(VIEWS_PER_BATCH)])
                y = y.float().cpu()
            yield batch, y
            if run.stop:
                break
    finally:
        net.train(was_training)


def mean_of_views(z, counts):
    """(views of a block, D) to (readable videos, D); counts (videos,): how many views each video has."""
    return torch.stack([views.mean(0) for views in z.split(counts.tolist()) if len(views)])


def what_is_averaged(net, recipe):
    """The part of `net` whose outputs `average_views` averages: net.embed, or the whole network."""
    return net.embed if recipe.average == "embeddings" else net


@torch.no_grad()
def average_views(net, y, batch, average, multilabel):
    """One row per readable video, from y (views of a block, K), or (views, D) for average="embeddings".

    A row is (index, probabilities (K,), mean logits (K,), right views, views). "softmax" averages the
    probabilities of the views, "logits" their logits. "embeddings" averages the embeddings, in float32, and
    classifies the mean, so the video counts as a single view. Probabilities are the softmax of logits, or the
    sigmoid for multi-label data.
    """
    squash = torch.sigmoid if multilabel else partial(torch.softmax, dim=-1)
    counts, rows = batch["counts"], []
    if average == "embeddings":
        z = mean_of_views(y, counts)
        y, counts = net.head(z.to(net.fc.weight.device)).float().cpu(), counts.clamp(max=1)
    views_of = y.split(counts.tolist())
    for views, label, index in zip(views_of, batch["label"], batch["index"], strict=True):  # views (V, K)
        if len(views):  # the video is readable
            logits = views.mean(0)
            p = squash(views).mean(0) if average == "softmax" else squash(logits)
            hits = 0 if multilabel else int((views.argmax(1) == label).sum())
            rows.append((int(index), p.numpy(), logits.numpy(), hits, len(views)))
    return rows


@torch.no_grad()
def precise_bn(net, videos, recipe, run, workers=0, block=40):
    """Give every batch norm of `net` the mean and variance of its inputs over all clips of `videos`.

    PreciseBN (Wu and Johnson 2021, section 3). Frozen stages, which stay in eval mode, keep their statistics.
    The layers before a batch norm are normalised by the statistics of blocks of `block` videos; all clips
    have the same weight. Sums are kept per block and added in the order of the blocks, so any number of ranks
    gives the same bits. Unreadable videos are left out, and so is a block of a single clip, which may have no
    variance. A signal ends it early; the test that follows then stops as well.
    """
    net.train()
    norms = [module for module in net.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]  # fmt: skip
    n_blocks = math.ceil(len(videos) / block)
    sums = [torch.zeros(n_blocks, 3, norm.num_features, dtype=torch.float64, device=run.device)
            for norm in norms]  # fmt: skip

    def add(sums_of_norm, module, inputs):  # counts, sums and sums of squares of the current block
        x = inputs[0].float()
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        mean, var = mean.double(), var.double()
        sums_of_norm[i] += count * torch.stack([torch.ones_like(mean), mean, var + mean**2])

    hooks = [
        norm.register_forward_pre_hook(partial(add, total)) for norm, total in zip(norms, sums, strict=True)
    ]
    dataset = Views(videos, recipe.sample, recipe.view, open=recipe.open)
    for batch in watched(eval_loader(dataset, block, run.rank, run.world, workers)):
        i = int(batch["index"][0]) // block
        if batch["views"] is not None and len(batch["views"]) > 1:
            with run.autocast():
                net.embed(recipe.to_input(batch["views"], run.device))
        if run.stop:
            break
    for hook, norm, total in zip(hooks, norms, sums, strict=True):
        hook.remove()
        dist.all_reduce(total)  # exact: a block belongs to one rank and is zero on the others
        count, mean, square = total.sum(0)
        if count.any():
            mean, square = mean / count, square / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((square - mean**2) * count / (count - 1))
    net.eval()


# -------------------------------------------------------------------------------- metrics


def metrics(scores):
    """Percentages by name; an unreadable video counts as wrong.

    Single-label data: top1, top5, mAP, mean_class (mean of the classes' accuracies) and clip_top1 (of single
    views). Multi-label data: mAP. Both: videos and unreadable, which are counts.
    """
    counts = {"videos": len(scores.labels), "unreadable": len(scores.bad)}
    if scores.labels.ndim == 2:
        return {"mAP": 100 * mean_average_precision(scores.probs, scores.labels)} | counts
    ranks, one_hot = rank_of_label(scores), scores.labels[:, None] == np.arange(scores.probs.shape[1])
    per_class = (one_hot & (ranks == 0)[:, None]).sum(0)[one_hot.any(0)] / one_hot.sum(0)[one_hot.any(0)]
    return {
        "top1": 100 * float((ranks == 0).mean()),
        "top5": 100 * float((ranks < 5).mean()),
        "mAP": 100 * mean_average_precision(scores.probs, one_hot),
        "mean_class": 100 * float(per_class.mean()),
        "clip_top1": 100 * float(scores.hits.sum() / scores.views.sum()),
        **counts,
    }


def rank_of_label(scores):
    """(N,) how many classes come before the true one; of classes with equal probabilities the first wins.

    It is at least K for NaN and for an unreadable video. Counting is ten times as fast as sorting.
    """
    probs, y = scores.probs, scores.labels[:, None]
    p_true = np.take_along_axis(probs, y, 1)
    ranks = (~(probs <= p_true)).sum(1) + ((probs == p_true) & (np.arange(probs.shape[1]) < y)).sum(1)
    ranks[list(scores.bad)] = np.iinfo(ranks.dtype).max
    return ranks


def mean_average_precision(probs, labels):
    """Mean over classes of the mean precision at each positive; classes without one do not count."""
    precisions = []
    for p, y in zip(probs.T, labels.T, strict=True):
        if y.any():
            hit = y[np.argsort(-p, kind="stable")].astype(bool)
            precisions.append((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean())
    return float(np.mean(precisions))


def write_files(out, scores, videos, classes):
    """predictions.csv (one row per video) and, for single-label data, per_class.csv in the folder `out`."""
    multilabel = scores.labels.ndim == 2
    top = np.argsort(-scores.probs, axis=1, kind="stable")[:, :5]
    rows = []
    for i, order in enumerate(top):
        label = np.flatnonzero(scores.labels[i]) if multilabel else [scores.labels[i]]
        best = [f"{classes[k]}:{scores.probs[i, k]:.6f}" if i not in scores.bad else "" for k in order]
        rows.append([videos.name(i), "|".join(classes[k] for k in label), *best, scores.bad.get(i, "")])
    names = [f"top{k + 1}" for k in range(top.shape[1])]
    write_csv(out / "predictions.csv", ["video", "label", *names, "unreadable"], rows)
    if not multilabel:
        is_right, rows = rank_of_label(scores) == 0, []
        for k, name in enumerate(classes):
            right = is_right[scores.labels == k]
            rows.append([name, len(right), right.sum(), f"{100 * right.mean():.2f}" if len(right) else ""])
        write_csv(out / "per_class.csv", ["class", "videos", "right", "accuracy"], rows)


def write_csv(path, header, rows):
    """Write a table, complete or absent."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    files.write(path, text.getvalue())


def quick_test(tested, videos, run, workers, step, more=None):
    """The test between two steps: one view of each video, into the log, unless a signal has stopped a rank.

    tested: {name: (network, recipe)}; more: a function of {name: Scores} that returns further {name: number}.
    """
    scores = {}
    for name, (net, recipe) in tested.items():
        one_view = replace(recipe, clips=min(1, recipe.clips), uniform=int(not recipe.clips), crops=1)
        scores[name] = score(net, videos, one_view, run, workers)
        if scores[name] is None:
            return
    log_scores(scores, run, step, **(more(scores) if more else {}))


def log_scores(scores, run, step, **more):
    """Log the accuracies of {name: Scores} after `step` steps as one row, and the numbers `more`."""
    row = {f"{name}_{key}": value for name, of_net in scores.items() for key, value in metrics(of_net).items()
           if key in LOGGED}  # fmt: skip
    row = {key: round(float(value), 4) for key, value in (row | more).items()}
    run.log({"step": step, "eval": "quick", **row})


def report(tested, data, run, workers, **words):
    """The last test of a run: all views of every test video, for each of {name: (network, recipe)}.

    Of the first network all metrics are in result.json and in the RESULT line, which begin with `words`, and
    predictions.csv and per_class.csv are written; of the others, top1 or mAP is among the words.
    """
    scores = {}
    for name, (net, recipe) in tested.items():
        scores[name] = score(net, data.test, recipe, run, workers, bar=True)
        if scores[name] is None:
            run.say("stopped by a signal during the test; the same command tests again")
            return
    first, *others = scores
    for name in others:
        key, value = next(iter(metrics(scores[name]).items()))
        words[f"{name}_{key}"] = value
    if run.main:
        write_files(run.out, scores[first], data.test, data.classes)
    run.result({"script": run.script, "data": data.name, **words, **metrics(scores[first]),
                "seconds": round(run.seconds)})  # fmt: skip

"""Motion-Augmented Self-Training for Video Recognition at Smaller Scale.

K. Gavrilyuk, M. Jain, I. Karmanov, C. G. M. Snoek. ICCV 2021.

From few labelled videos a network learns better from optical flow than from pictures, but flow is expensive
at test time. So a flow network, trained on the small labelled set, only makes labels: it looks at every clip
of a large unlabelled collection, its features are clustered, and a network that sees RGB alone learns to tell
the cluster of each clip. What it has learned of motion stays when it is fine-tuned on the small set.

    1 generator   labelled videos --> R clips of flow --> M_MPLG --> Eq. 1: the class of each clip
    2 pseudo      unlabelled videos --> dense clips of flow --> M_MPLG --> features --> (segments, Eq. 4)
                                                                              --> K-means --> pseudo-labels
    3 selftrain   unlabelled videos --> R clips of RGB --> M_RGB --> Eq. 1: the pseudo-label of each clip
    4 finetune    labelled videos --> R clips of RGB --> M_RGB, its early stages at rest --> the class
      retrieve    test clips ask for training clips, by the features of M_RGB

Equations:  Eq. 1 -> multi_clip_loss    Eq. 2 -> clip_order_loss    Eq. 3 -> batch_loss, all in train_step
            Eq. 4 -> boundaries, in segments    K-means (Sec. 3.2) -> KMeans    Sec. 4.5 -> recall
            MERS, MARS (Table 5) -> feature_loss

Names: B videos of a step, R clips of each, K classes or clusters, D width; source, target: the unlabelled and
the labelled videos.

Run (8 GPUs, the paper's two data sets; then one process on the embedded data set, on a CPU too):

    python -m common.flow ucf101 --out data/ucf101_flow
    torchrun --nproc_per_node 8 -m common.flow k400 --out data/k400_flow
    torchrun --nproc_per_node 8 motionfit.py --data ucf101 --source k400 --batch 1 2 1
    python motionfit.py --data toy

The stages are runs of their own in folders of `--out`, the last in `--out` itself; the same command goes on
where it was stopped. `--stage` runs one of them. `--generator`, `--pseudo` and `--init` take what another run
has made, and the stages before are left out: `--data hmdb51 --init RUN/selftrain/model.pt` is Table 4.
`--init none` is random initialisation, `--transfer mers` and `mars` the methods it is compared with.

Differences from the paper, and what it leaves open (VCOP is the code of its reference [67]):

D1  `--batch` is per GPU. The paper's batches, which it wants small, are totals, 8 videos a step and 16 in
    self-training (32 for S3D-G): on 8 GPUs `--batch 1 2 1`. Its learning rate, 0.001, is for these totals and
    scales linearly with the videos of a step over all GPUs (`--lr_batch`). Batch norm is each GPU's, and
    there is no dropout.
D2  Flow is TV-L1 as bytes, 20 pixels the bound, in pixels of the pictures it was computed from, whatever
    these are stretched to; a clip has two channels, u and v, normalised by 0.5 and 0.226. RGB has ImageNet's
    mean and deviation.
D3  The R clips of a video do not overlap if it is long enough; each has its own crop, as in VCOP, and
    nothing is mirrored unless `--flip`.
D4  Crops of S3D-G (224 pixels) are out of 256 x 342: `--size 224 --stretch 256 342`.
D5  The clips' order is predicted from the pooled features of all pairs, as in VCOP: 512 units for each pair,
    dropout 0.5, R! classes. The clips are in the order of time and their features are shuffled.
D6  R = 3 in all stages; the paper says so of the generator alone.
D7  Dense clips follow each other without overlap, `--hop` frames apart, at most 128 of a video, evenly
    spread, cropped in the centre; the features are those before the classifier, averaged over time and
    space, neither reduced nor normalised (DeepCluster does both).
D8  K-means starts once from K random rows and makes 20 iterations, or fewer if nothing changes; an empty
    cluster starts again at the row farthest from its centre.
D9  p of Eq. 4 is 75, of the differences within a video.
D10 A training clip of self-training is a dense clip with its pseudo-label; one that is longer than the
    generator's has that in its middle.
D11 Pseudo-labels of the next and the previous clip (Sec. 4.4) are told by a linear layer each; their losses
    are added to Eq. 1, and at the ends of a video there is none. Off by default: `--neighbours`.
D12 The held-out 10 % of the generator's and of self-training's videos (Sec. 4.2) are groups where the data
    set has them (UCF-101: gXX), so that one scene is never on both sides. They are for the log alone: the
    last weights are kept. `--holdout 0` learns from all, as fine-tuning does.
D13 In fine-tuning the stages before conv4 are at rest, with their batch norms. From random weights
    everything learns.
D14 Test: ten clips, the central crop, the average of their logits, as in VCOP.
D15 Retrieval asks with each clip, as the paper defines it (R1, R5, ...); VCOP averages a video's ten clips
    first (videos_R1, ...). Nearest by cosine, as in VCOP. The network is that before fine-tuning.
D16 A generator, or what has learned from it, is refused if it has learned from a test video, as that of
    UCF-101's split 1 on splits 2 and 3, and so is a source that holds test videos of `--data`; the paper does
    not say what it did. `--allow_leak` permits it, and models that do not say what they have learned from.
D17 MERS and MARS compare the features before the classifier, by the mean squared difference, times 50 beside
    cross-entropy (Crasto et al. 2019). MARS trains all stages from random weights.
D18 `--source all` or `rest` are the training videos of `--data`, with or without the labelled ones (Tables 8
    and S1). Of every other source the training list is used; `--source_part test` is Kinetics-val.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, factorial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import UserError, augment, backbones, datasets, evaluate, features, files, modality, optim, show
from common.flags import Parser, free_flags, wanted
from common.modality import MODALITIES
from common.run import PLACES, Run, agreed
from common.video import Clips, Views, train_loader

STAGES = "generator", "pseudo", "selftrain", "finetune"
TRAINED = "generator", "selftrain", "finetune"
# Flags with a value for each of these.
EACH = "frames", "multi_clips", "lam", "epochs", "batch", "lr_batch", "lr_steps"
# Flags that a stage does not look at: with another value, what it has made is still right.
UNUSED = {
    "generator": "source source_part source_list generator pseudo init transfer net neighbours hop "
                 "granularity percentile clusters iterations alpha frozen",
    "pseudo": "pseudo init transfer generator_on generator_net net width dropout neighbours alpha frozen lr "
              "warmup weight_decay optimizer stride size test_size stretch flip clips crops average "
              + " ".join(EACH),
    "selftrain": "generator_on generator_net hop granularity percentile clusters iterations frozen",
}  # fmt: skip
UNUSED = {stage: names.split() for stage, names in UNUSED.items()}
TEST = "clips", "crops", "average"  # what of a test is not in the model's file
# Defaults per data set (the flags' own defaults are UCF-101's, with Kinetics-400 as source). Sec. 4.2.
RECIPES = {
    "ucf101": {},
    "hmdb51": {},
    "toy": dict(
        per_class=8, source="all", generator_net="r2plus1d_10-pool", net="r2plus1d_10-pool", width=0.25,
        size=40, stretch=[48, 48], frames=[8], stride=2, hop=8, clusters=64, epochs=[30, 10, 20], batch=[8],
        lr_batch=[8], lr_steps=["cosine"], warmup=1, optimizer="adamw", lr=0.01, weight_decay=0.05, clips=5,
        eval_every=5, workers=1, channels_last=True,
    ),
}  # fmt: skip
RECIPES["weizmann"] = RECIPES["toy"] | dict(
    per_class=2, size=48, stretch=[54, 68], clusters=20, epochs=[60, 30, 40], warmup=3, eval_every=20
)
DENSE = 128  # clips of a video, at most, that are decoded together and get a pseudo-label
NEAREST = 1, 5, 10, 20, 50  # n of the recall
CHUNK = 4096  # rows that are compared with the centres at once
ENOUGH = 39  # rows for each cluster below which faiss warns, too


def parse_args(argv=None):
    p = Parser("motionfit", __doc__, RECIPES)
    g = p.data(unlabelled=None, ratio=1.0)
    g.add_argument("--source", default="k400", help="unlabelled: a data set, or all or rest of --data, D18")
    g.add_argument("--source_root", help="where that is; data/<name> if not given")
    g.add_argument("--source_part", choices=["train", "test"], default="train", help="its list, D18")
    g.add_argument("--source_list", metavar="FILE", help="its videos, if not all (Sec. 4.4, common classes)")
    g.add_argument("--flow", metavar="DIR", help="extracted optical flow of --data; <root>_flow")
    g.add_argument("--source_flow", metavar="DIR", help="that of --source; <source_root>_flow")
    g.add_argument("--stretch", type=int, nargs=2, default=[128, 171], help="height, width before the crop")
    g.add_argument("--holdout", type=float, default=0.1, help="share for validation in stages 1 and 3, D12")
    g.add_argument("--allow_leak", action="store_true", help="labels of test videos may have been used, D16")
    g = p.add_argument_group("method; of three values one is the generator's, of self-training, fine-tuning")
    g.add_argument("--stage", choices=["all", *STAGES, "retrieve"], default="all", help="do this one alone")
    g.add_argument("--generator", metavar="MODEL.PT", help="instead of stage 1")
    g.add_argument("--pseudo", metavar="FILE.NPZ", help="pseudo-labels, instead of stages 1 and 2")
    g.add_argument("--features", metavar="DIR", help="of stage 2, to be shared; <out>/pseudo/features")
    g.add_argument("--init", metavar="MODEL.PT", help="instead of stages 1 to 3; none: random, Table 4")
    g.add_argument("--transfer", choices=["pseudo", "mers", "mars"], default="pseudo", help="Table 5, D17")
    g.add_argument("--generator_on", choices=["field", "rgb"], default="field", help="flow or RGB, Table 1")
    g.add_argument("--generator_net", default="r2plus1d_18", help="backbone of M_MPLG")
    g.add_argument("--net", default="r2plus1d_18", help="backbone of M_RGB")
    g.add_argument("--width", type=float, default=1.0, help="width of the backbones")
    g.add_argument("--dropout", type=float, default=0.0, help="before the classifier")
    g.add_argument("--frames", type=int, nargs="+", default=[16], help="of a clip, Tables 1 and 4")
    g.add_argument("--stride", type=int, default=1, help="frames from one to the next, D3")
    g.add_argument("--multi_clips", type=int, nargs="+", default=[3], help="R of Eq. 1, Table 1, D6")
    g.add_argument("--lam", type=float, nargs="+", default=[1.0], help="lambda of Eq. 3; 0: order alone")
    g.add_argument("--neighbours", action="store_true", help="next and previous pseudo-label, Sec. 4.4, D11")
    g.add_argument("--hop", type=int, help="frames between dense clips; the length of one, D7")
    g.add_argument("--granularity", choices=["clip", "segment", "thirds", "video"], default="clip",
                   help="of pseudo-labels, Table 2")  # fmt: skip
    g.add_argument("--percentile", type=float, default=75.0, help="p of Eq. 4, D9")
    g.add_argument("--clusters", type=int, default=1000, help="K of K-means, Table 3")
    g.add_argument("--iterations", type=int, default=20, help="of K-means, at most, D8")
    g.add_argument("--alpha", type=float, default=50.0, help="weight of the features in MERS and MARS, D17")
    g.add_argument("--frozen", type=int, default=2, help="stages at rest in fine-tuning, Sec. 4.2, D13")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, nargs="+", default=[120, 45, 120], help="passes over the videos")
    g.add_argument("--batch", type=int, nargs="+", default=[8, 16, 8], help="videos per GPU and step, D1")
    g.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="sgd has momentum 0.9")
    g.add_argument("--lr", type=float, default=0.001, help="for --lr_batch videos a step, Sec. 4.2, D1")
    g.add_argument("--lr_batch", type=int, nargs="+", default=[8, 16, 8],
                   help="videos of a step, of all GPUs, for --lr; 32 in self-training of S3D-G")  # fmt: skip
    g.add_argument("--lr_steps", nargs="+", default=["40,60,80", "20,40", "40,60,80"],
                   help="epochs after which it is a tenth; cosine: to 0")  # fmt: skip
    g.add_argument("--warmup", type=float, default=0, help="epochs of a rising learning rate")
    g.add_argument("--weight_decay", type=float, default=5e-4, help="Sec. 4.2")
    g = p.run(test_scale=1)
    g.add_argument("--average", choices=["logits", "softmax"], default="logits", help="of test views, D14")
    g.add_argument("--sheet", type=int, default=8, help="queries on the sheet of retrieve, Fig. S1")
    p.set_defaults(size=112, flip=False, clips=10, crops=1)  # D3, D14
    args = p.parse(argv, also=TEST)
    for name in EACH:
        given = getattr(args, name)
        if len(given) not in (1, 3):
            p.error(f"--{name} has one value, or one for each of {', '.join(TRAINED)}, not {len(given)}")
        setattr(args, name, given * (3 // len(given)))
    p.at_least(1, args, "stride", "clusters", "iterations", "hop")
    p.at_least(0, args, "lr", "warmup", "weight_decay", "alpha", "sheet")
    if args.frozen not in range(5):
        p.error(f"--frozen is a number of stages, 0 to 4, not {args.frozen}")
    p.share(args, "holdout")
    for stage in TRAINED:
        scope = of_stage(args, stage)
        p.at_least(1, scope, "frames", "multi_clips", "batch", "lr_batch")
        p.at_least(0, scope, "epochs")
        p.share(scope, "lam")
        if scope.lam < 1 and scope.multi_clips not in range(2, 6):  # of R! orders: 9! would be a 26 GB layer
            p.error(f"--lam below 1 predicts the order of 2 to 5 clips, --multi_clips is {scope.multi_clips}")
        if not re.fullmatch(r"cosine|\d+(\.\d+)?(,\d+(\.\d+)?)*", scope.lr_steps):
            p.error(f"--lr_steps are epochs with commas, such as 40,60,80, or cosine, not {scope.lr_steps}")
    if not 0 <= args.percentile <= 100:
        p.error(f"--percentile is in 0 to 100, not {args.percentile}")
    if max(args.size, args.test_size) > min(args.stretch):
        p.error(f"--size and --test_size are crops of --stretch {args.stretch[0]} {args.stretch[1]}")
    for net in (args.generator_net, args.net):  # one of them would be missed days later
        if net not in backbones.NAMES:
            p.error(f"there is no backbone {net}: choose one of {', '.join(backbones.NAMES)}")
    if args.source in ("all", "rest") and args.source_part == "test":
        p.error(f"--source {args.source} is of training videos: --source_part test is for another data set")
    if args.transfer == "mars" and (args.init or args.stage == "retrieve"):
        p.error("--transfer mars starts from random weights: without --init; retrieve by --init RUN/model.pt")
    if args.transfer != "pseudo" and args.pseudo:
        p.error(f"--transfer {args.transfer} has no use for --pseudo")
    if args.transfer == "mers" and args.lam[1] < 1:
        p.error("--transfer mers matches features: --lam 1 in self-training")
    if args.neighbours and (args.granularity != "clip" or args.transfer != "pseudo"):
        p.error("--neighbours are of pseudo-labels of clips: --granularity clip, --transfer pseudo")
    return args


def of_stage(args, stage):
    """The flags with the values of one stage."""
    chosen = {name: getattr(args, name)[TRAINED.index(stage)] for name in EACH}
    return argparse.Namespace(**vars(args) | chosen)


# -------------------------------------------------------------------------------- the method


def multi_clip_loss(logits, y):
    """Eq. 1: L_mc = 1/B sum_b (1/R sum_i L_class(y_bi, y'_bi)).

    logits (B, R, K), y (B, R) int64, of which -1 does not count. The cross-entropies of single clips are
    averaged, not their logits, so that a clip of the background cannot drown one of the action.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
    return losses / (y >= 0).sum().clamp(min=1)


def clip_order_loss(logits, p):
    """Eq. 2: L_co = 1/B sum_b L_order(p_b, p'_b).

    logits (B, R!), p (B,) int64, the number of the order in `orders`. Mean over the videos.
    """
    return F.cross_entropy(logits.float(), p)


def batch_loss(loss_mc, loss_co, lam):
    """Eq. 3: L_batch = lambda L_mc + (1 - lambda) L_co."""
    return lam * loss_mc + (1 - lam) * loss_co


def boundaries(f, percentile):
    """Eq. 4: B = {t : |f_t - f_{t-1}|_1 > tau}, tau the percentile of these differences in the video (D9).

    f (T, D), the features of a video's clips. Returns (T,) bool: a segment begins at clip t.
    """
    found = np.zeros(len(f), dtype=bool)
    if len(f) > 1:
        change = np.abs(np.diff(f.astype(np.float64), axis=0)).sum(1)  # (T - 1,)
        found[1:] = change > np.percentile(change, percentile)
    return found


def segments(f, granularity, percentile):
    """Which segment each clip of a video belongs to: (T,) int64, numbers from 0 in the order of time.

    f (T, D). granularity: a segment is a "clip", lasts until an abrupt change ("segment", Eq. 4), is a third
    of the video ("thirds") or all of the "video" (Sec. 3.2).
    """
    t = np.arange(len(f))
    if granularity == "segment":
        return np.cumsum(boundaries(f, percentile))
    return {"clip": t, "thirds": t * min(3, len(t)) // len(t), "video": 0 * t}[granularity]


def segment_means(f, segments):
    """H = {h_s}, float32 (S, D): the features of segments, the means of those of their clips (Sec. 3.2)."""
    sums = np.zeros((segments[-1] + 1, f.shape[1]))
    np.add.at(sums, segments, f)
    return (sums / np.bincount(segments)[:, None]).astype(np.float32)


class KMeans(nn.Module):
    """K-means with Euclidean distance (Sec. 3.2): Lloyd's iterations over rows that the ranks share.

    Args:
        rows: (N, D) float32 or float16, N < 2^29: an array, a memory map or a CPU tensor, the same on every
            rank; read in blocks.
        K: the number of clusters.
        seed: of the K rows that are the first centres.
        run: a Run; this rank has every `world`-th block.

    `centres` (K, D) float32 is all the state there is. It is the same to the last bit for any number of
    ranks (of as many threads each), and so are the inertia and the assignment: a block is the same matrix
    product on any rank, and sums are exact. Raises UserError for fewer rows than clusters and for rows that
    are not finite.
    """

    def __init__(self, rows, K, seed, run):
        super().__init__()
        self.rows, self.run, self.held = np.asarray(rows), run, {}  # nothing is copied
        N, D = rows.shape
        if N < K:
            raise UserError(f"--clusters {K} needs as many clips or segments, and there are {N}: lower it")
        if N < ENOUGH * K:
            run.say(f"{N} clips are few for --clusters {K}: fewer than {ENOUGH} for each")
        self.starts = range(run.rank * CHUNK, N, run.world * CHUNK)
        # Integers of 24 bits times a power of two are exact as float32, and fewer than 2^29 of them add up
        # exactly in float64 in any order: over the rows, by CUDA's atomic additions, over the ranks.
        self.grid = 2.0 ** (math.frexp(self._largest())[1] - 24)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            need = 4 * D * CHUNK * len(self.starts)
            if need <= torch.cuda.mem_get_info(run.device)[0] / 2:
                self.held = {start: self._block(start) for start in self.starts}
        energy = torch.zeros(-(-N // CHUNK), dtype=torch.float64, device=run.device)
        for start in self.starts:
            energy[start // CHUNK] = self._block(start).double().square().sum()
        dist.all_reduce(energy)  # one rank's number and zeros
        self.energy = energy.sum()
        # Where this rank's rows are (at first in none of the clusters: K), and their sums there. As these are
        # exact, an iteration need only move the rows that change their cluster.
        self.labels = [torch.full((min(CHUNK, N - start),), K, device=run.device) for start in self.starts]
        self.sums = torch.zeros(K + 1, D, dtype=torch.float64, device=run.device)
        first = np.random.default_rng(seed).choice(N, K, replace=False)
        self.register_buffer("centres", self._on_grid(first) * self.grid)

    def _read(self, which):
        """Rows by a slice or an array of numbers, float32 on the device; always a copy."""
        part = self.rows[which]
        x = torch.empty(part.shape)  # aligned alike on every rank, unlike memory of numpy's or a file's
        x.numpy()[:] = part
        return x.to(self.run.device)

    def _on_grid(self, which):
        """Rows in units of the grid: integers up to 2^24, float32."""
        return self._read(which).mul_(1 / self.grid).round_()

    def _block(self, start):
        if start in self.held:
            return self.held[start]
        return self._on_grid(slice(start, start + CHUNK))

    def _largest(self):
        """max |x| over all rows; raises UserError on every rank if some are not finite."""
        N, largest, bad = len(self.rows), 0.0, []
        for start in self.starts:
            peaks = self._read(slice(start, start + CHUNK)).abs().amax(1)
            bad += (start + (~peaks.isfinite()).nonzero()[:, 0]).tolist()
            largest = max(largest, peaks.max().item())
        found = torch.tensor([largest, -min(bad, default=N)], dtype=torch.float64)
        count = torch.tensor(len(bad))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        dist.all_reduce(count)
        if count:
            raise UserError(f"the features of {count} of {N} clips are not finite, first those of clip "
                            f"{-found[1]:.0f} (from 0): the network that made them has diverged")  # fmt: skip
        return found[0].item()

    def _nearest(self):
        """Yield (first row, rows (n, D) in units of the grid, nearest (n,) int64) for this rank's blocks.

        The nearest centre has the largest x.c - |c|^2 / 2, in float32; of equal ones it is the first.
        """
        c = self.centres / self.grid
        bias = (c.double().square().sum(1) / -2).float()
        scores = torch.empty(CHUNK, len(c), device=c.device)
        for start in self.starts:
            x = self._block(start)
            out = torch.addmm(bias, x, c.T, out=scores[: len(x)])
            # numpy's argmax takes an eighth of the time of torch's on the CPU
            yield start, x, out.argmax(1) if out.is_cuda else torch.from_numpy(out.numpy().argmax(1))

    @torch.no_grad()
    def step(self):
        """One iteration; the same dict on every rank.

        inertia: the sum of squared distances to the centres before the update. empty: how many clusters got
        no row; once the others have moved, they start again at the rows farthest from their centres. moved:
        whether any centre has changed; when none has, none ever will.
        """
        c = self.centres.double() / self.grid
        counts = torch.zeros_like(c[:, 0])
        for old, (_, x, nearest) in zip(self.labels, self._nearest(), strict=True):
            counts += torch.bincount(nearest, minlength=len(c))
            changed = (nearest != old).nonzero()[:, 0]
            x = x[changed].double()
            self.sums.index_add_(0, nearest[changed], x)
            self.sums.index_add_(0, old[changed], x, alpha=-1)
            old.copy_(nearest)
        sums = self.sums[:-1].clone()
        dist.all_reduce(sums)
        dist.all_reduce(counts)
        # sum |x - c|^2 = sum |x|^2 - 2 c . sum x + n |c|^2, cluster by cluster
        inertia = self.energy + (c * (counts[:, None] * c - 2 * sums)).sum()
        centres = (sums / counts[:, None] * self.grid).float()
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            centres[empty] = self._farthest(centres, len(empty))
        moved = not torch.equal(centres, self.centres)
        self.centres.copy_(centres)
        return {"inertia": max(inertia.item(), 0.0) * self.grid**2, "empty": len(empty), "moved": moved}

    def _farthest(self, centres, n):
        """The n rows (n, D) farthest from the centres of their clusters; of equally far ones the first."""
        far, where = np.empty(0, np.float32), np.empty(0, np.int64)
        for start, nearest in zip(self.starts, self.labels, strict=True):
            apart = self._block(start) - centres[nearest] / self.grid
            far = np.concatenate([far, apart.square().sum(1).cpu().numpy()])
            where = np.concatenate([where, np.arange(start, start + len(apart))])
            best = np.lexsort((where, -far))[:n]
            far, where = far[best], where[best]
        everyone = [None] * self.run.world
        dist.all_gather_object(everyone, (far, where))
        far, where = map(np.concatenate, zip(*everyone, strict=True))
        return self._on_grid(where[np.lexsort((where, -far))[:n]]) * self.grid

    @torch.no_grad()
    def assign(self):
        """The nearest centre of every row, (N,) int32; the same array on every rank."""
        labels = torch.zeros(len(self.rows), dtype=torch.int32)
        for start, x, nearest in self._nearest():
            labels[start : start + len(x)] = nearest
        dist.all_reduce(labels)
        return labels.numpy()


def feature_loss(z, z_teacher):
    """MERS, MARS (Crasto et al. 2019): mean of (z - z_teacher)^2 over all features, the teacher detached."""
    return F.mse_loss(z.float(), z_teacher.detach().float())


def recall(z, y, z_train, y_train, nearest=NEAREST):
    """Sec. 4.5: the share, in per cent, of queries with a clip of their class among the n nearest; {n: %}.

    z (Q, D), y (Q,), the queries; z_train (N, D), y_train (N,). Nearest by cosine. Returns the numbers (Q, n)
    of the nearest training clips as well, n the largest.
    """
    most = min(max(nearest), len(z_train))
    train = F.normalize(z_train.float(), dim=1)
    parts = F.normalize(z.float(), dim=1).split(1024)
    found = torch.cat([(part @ train.T).topk(most).indices for part in parts])
    hits = (y_train[found] == y[:, None]).cummax(1).values  # (Q, n)
    return {n: 100 * hits[:, min(n, most) - 1].double().mean().item() for n in nearest}, found


def train_step(net, x, y, args, z_teacher=None):
    """The loss of one step, and its terms by name.

    x (B, R, C, T, H, W); y (B, R, 1) labels or pseudo-labels of the clips, or with --neighbours (B, R, 3), of
    the clip, the next and the previous one (D11), None in MERS; z_teacher (B R, D), the teacher's features.
    """
    p = torch.randint(factorial(args.multi_clips), (len(x),), device=x.device) if args.lam < 1 else None
    logits, order, z = net(x, p)
    if y is None:
        loss = feature_loss(z, z_teacher)  # MERS
        return loss, {"loss_features": loss}
    terms = {"loss_mc": multi_clip_loss(logits[0], y[..., 0])}  # Eq. 1
    loss = terms["loss_mc"]
    for head, name in enumerate(("loss_next", "loss_previous")[: len(logits) - 1], 1):
        terms[name] = multi_clip_loss(logits[head], y[..., head])  # D11
        loss = loss + terms[name]
    if args.lam < 1:
        terms["loss_co"] = clip_order_loss(order, p)  # Eq. 2
        loss = batch_loss(loss, terms["loss_co"], args.lam)  # Eq. 3
    if z_teacher is not None:
        terms["loss_features"] = feature_loss(z, z_teacher)
        loss = loss + args.alpha * terms["loss_features"]  # MARS, D17
    terms["clip_top1"] = (logits[0].argmax(-1) == y[..., 0]).float().mean()
    return loss, terms


# -------------------------------------------------------------------------------- networks


class Network(nn.Module):
    """A backbone, and what a step needs beside it: heads for the neighbours (D11), one for the order (D5)."""

    def __init__(self, backbone, R, ordered=False, neighbours=False):
        super().__init__()
        self.backbone, self.R = backbone, R
        D, K = backbone.fc.in_features, backbone.fc.out_features
        self.heads = nn.ModuleList(nn.Linear(D, K) for _ in range(2 * neighbours))
        self.order = OrderHead(D, R) if ordered else None

    def forward(self, x, p=None):
        """x (B, R, C, T, H, W), p (B,) orders. A list of logits (B, R, K), (B, R!) or None, z (B R, D)."""
        f = self.backbone.features(x.flatten(0, 1))[-1]
        z = f.mean((2, 3, 4))
        logits = [self.backbone.classify(f), *(head(z) for head in self.heads)]
        order = self.order(z.unflatten(0, (-1, self.R)), p) if self.order else None
        return [each.unflatten(0, (-1, self.R)) for each in logits], order, z


class OrderHead(nn.Module):
    """Which of the R! orders the features of R clips are in (Xu et al. 2019, Sec. 3.3; D5)."""

    def __init__(self, D, R, hidden=512):
        super().__init__()
        self.register_buffer("orders", torch.tensor(list(itertools.permutations(range(R)))), False)  # (R!, R)
        self.pairs = list(itertools.combinations(range(R), 2))
        self.pair = nn.Sequential(nn.Linear(2 * D, hidden), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.Dropout(0.5), nn.Linear(hidden * len(self.pairs), len(self.orders)))

    def forward(self, z, p):
        """z (B, R, D) in the order of time, which is put into the orders p (B,). Returns logits (B, R!)."""
        z = z.gather(1, self.orders[p][..., None].expand_as(z))
        pairs = [self.pair(torch.cat([z[:, i], z[:, j]], 1)) for i, j in self.pairs]
        return self.last(torch.cat(pairs, 1))


def build(args, net, classes, kind, run, init=None):
    """(Backbone on the CPU, the arguments that build it). `init` is a file; its classifier is not used."""
    made = dict(name=net, classes=classes, in_channels=MODALITIES[kind].channels, width=args.width,
                dropout=args.dropout)  # fmt: skip
    torch.manual_seed(args.seed)
    if init in backbones.PUBLISHED:
        run.on_main(backbones.fetch, net, init)  # one process downloads
    backbone = backbones.build(**made, weights=init)
    if not backbone.new_fc:  # there happen to be as many clusters as classes
        backbone.fc.reset_parameters()
    return backbone, made


# -------------------------------------------------------------------------------- data


def target(args, run, kinds, models, share=0.0):
    """(Data, labelled videos to learn from, `share` held out, (bound, short side) of the flow) of --data."""
    data = agreed(datasets.load, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video, which this method does not know")
    data, scale = modality.with_flow(data, args.data, args.root, args.flow, run, kinds, models)
    chosen = agreed(datasets.labelled, data, args.ratio, args.per_class, args.seed, args.labelled_list)
    videos = data.train.subset(chosen)
    learn, held = split(videos, args, share)
    run.say(f"{data.name}: {len(data.classes)} classes, {len(videos)} of {len(data.train)} training videos, "
            f"{len(held)} of them held out, {len(data.test)} test videos")  # fmt: skip
    for note in data.notes:
        run.say(note)
    run.write("labelled.txt", datasets.as_list(videos))
    return data, learn, held, scale


def source(args, run, kinds, models):
    """(Data, unlabelled videos, (bound, short side) of their flow) of --source."""
    if args.source in ("all", "rest"):  # D18
        name, root, folder, split = args.data, args.root, args.flow, args.split
    else:
        name, root, folder, split = args.source, args.source_root, args.source_flow, 1
    labels = args.source in ("all", "rest") or args.source_part == "test"
    data = agreed(datasets.load, name, root, split, labels)
    data, scale = modality.with_flow(data, name, root, folder, run, kinds, models)
    if args.source_part == "test":
        data = replace(data, train=data.test)
    chosen = np.arange(len(data.train))
    if args.source == "rest":
        few = agreed(datasets.labelled, data, args.ratio, args.per_class, args.seed, args.labelled_list)
        chosen = np.setdiff1d(chosen, few)
    if args.source_list:
        chosen = np.intersect1d(chosen, agreed(datasets.labelled, data, listfile=args.source_list))
    videos = data.train.subset(chosen)
    refuse_leak(args, f"--source {args.source}", {kind_of(data): stems(videos)})
    if not len(videos):
        none = "all training videos are labelled" if args.source == "rest" else "its list is empty"
        raise UserError(f"--source {args.source} has no videos: {none}")
    run.say(f"{data.name}: {len(videos)} unlabelled videos")
    for note in data.notes:
        run.say(note)
    return data, videos, scale


def split(videos, args, share):
    """(videos to learn from, `share` of them for validation)."""
    held = datasets.held_out(videos, share, args.seed)  # D12
    return videos.subset(np.flatnonzero(~held)), videos.subset(np.flatnonzero(held))


def span_of(frames, stride):
    """How many frames a clip reaches over."""
    return (frames - 1) * stride + 1


def window(start, n, frames, stride):
    """(frames,) int64: the clip from frame `start` of n; past the end it starts again at the beginning."""
    return (start + stride * np.arange(frames)) % n


def multi_clip(n, R, frames, stride, rng):
    """R clips of a video of n frames in the order of time, which do not overlap if there is room (D3)."""
    span = span_of(frames, stride)
    apart = span if n >= R * span else 0
    room = max(n - span - apart * (R - 1), 0)
    starts = np.sort(rng.integers(room + 1, size=R)) + apart * np.arange(R)
    return [window(start, n, frames, stride) for start in starts]


def dense_starts(n, frames, stride, hop):
    """(T,) int64: the first frames of the dense clips of a video of n frames, DENSE at most (D7)."""
    room = max(n - span_of(frames, stride), 0)
    if room // hop + 1 > DENSE:
        return np.rint(np.linspace(0, room, DENSE)).astype(np.int64)
    return np.arange(0, room + 1, hop)


@dataclass(frozen=True)
class Dense(evaluate.Recipe):
    """The recipe of a generator, for every dense clip of a video."""

    hop: int = 16

    def sample(self, source):
        n = len(source)
        starts = dense_starts(n, self.frames, self.stride, self.hop)
        return [window(start, n, self.frames, self.stride) for start in starts]


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-labels of dense clips: `labels` (N,) int32, those of video i from first[i] to first[i + 1].

    frames, stride, hop: of these clips; fewer: by how many frames the generator's video is shorter than that
    of RGB, 1 of flow; videos: datasets.digest of the source; learned: see `learned_by`.
    """

    labels: np.ndarray
    first: np.ndarray
    clusters: int
    frames: int
    stride: int
    hop: int
    fewer: int
    videos: str
    learned: dict
    granularity: str = "clip"

    def of(self, i):
        """(T,) the pseudo-labels of video i."""
        return self.labels[self.first[i] : self.first[i + 1]]

    def starts(self, n):
        """The first frames of the dense clips of a video of n frames of RGB."""
        return dense_starts(n - self.fewer, self.frames, self.stride, self.hop)

    def window(self, n, t, frames, stride):
        """The clip of `frames` that has dense clip t of n frames in its middle (D10)."""
        start = self.starts(n)[t] - (span_of(frames, stride) - span_of(self.frames, self.stride)) // 2
        return window(min(max(start, 0), max(n - span_of(frames, stride), 0)), n, frames, stride)


@dataclass(frozen=True)
class Middle(evaluate.Recipe):
    """The recipe of self-training's validation: the dense clip in the middle of a video."""

    pseudo: Pseudo | None = None

    def sample(self, source):
        middle = len(self.pseudo.starts(len(source))) // 2
        return [self.pseudo.window(len(source), middle, self.frames, self.stride)]


class Labelled(modality.Streams):
    """An open source video whose `clips` end with the pseudo-labels of those that `draw` has chosen.

    In `videos` the label of a video is its number in `pseudo`.
    """

    def __init__(self, videos, index, pseudo, neighbours):
        super().__init__(videos, index, ("rgb",))
        self.y, self.pseudo, self.neighbours = pseudo.of(videos.labels[index]), pseudo, neighbours

    def draw(self, rng, args):
        """Windows of R dense clips in the order of time, different ones if there are so many."""
        n = len(self)
        T = min(len(self.y), len(self.pseudo.starts(n)))
        self.drawn = np.sort(rng.choice(T, args.multi_clips, replace=T < args.multi_clips))
        return [self.pseudo.window(n, t, args.frames, args.stride) for t in self.drawn]

    def clips(self, windows, short_side=None):
        y = np.concatenate([self.y, [-1]])  # beyond the ends there is none
        steps = [0, 1, -1] if self.neighbours else [0]
        y = y[self.drawn[:, None] + steps]  # (R, 1) or (R, 3)
        return [*super().clips(windows, short_side), torch.from_numpy(y).long()]


def train_windows(source, rng, args, kinds):
    """R windows, each as often as there are `kinds`."""
    windows = multi_clip(len(source), args.multi_clips, args.frames, args.stride, rng)
    return [each for each in windows for _ in kinds]


def train_views(clips, args, kinds, labelled=False):
    """uint8 (R, T, C, H, W) of each of `kinds`, with the same crops; and the labels, if they come last."""
    *clips, y = clips if labelled else [*clips, None]
    moments = [clips[k : k + len(kinds)] for k in range(0, len(clips), len(kinds))]
    for r, moment in enumerate(moments):
        crops = augment.stretched_crop(moment, args.size, args.stretch)  # D3, D4
        if args.flip and torch.rand(()) < 0.5:
            crops = [modality.flip(clip, kind) for clip, kind in zip(crops, kinds, strict=True)]
        moments[r] = crops
    views = [torch.stack(crops) for crops in zip(*moments, strict=True)]
    return (*views, y) if labelled else tuple(views)


def training_clips(videos, args, kinds, scale):
    """Training clips of labelled videos, and of MERS: R at random moments, each in all of `kinds`."""
    streams = partial(modality.Streams, modalities=kinds, bound=scale[0], flow_side=scale[1])
    sample = partial(train_windows, args=args, kinds=kinds)
    return Clips(videos, sample, partial(train_views, args=args, kinds=kinds), args.seed, open=streams)


def pseudo_clips(videos, labels, args):
    """(Training clips with their pseudo-labels, the videos held out, whose label is that of the middle)."""
    readable = np.flatnonzero(np.diff(labels.first))
    videos = replace(videos, labels=np.arange(len(videos))).subset(readable)  # their own labels are gone
    videos, held = split(videos, args, args.holdout)
    middle = [labels.of(i)[len(labels.of(i)) // 2] for i in held.labels]
    streams = partial(Labelled, pseudo=labels, neighbours=args.neighbours)
    view = partial(train_views, args=args, kinds=("rgb",), labelled=True)
    clips = Clips(videos, partial(Labelled.draw, args=args), view, args.seed, open=streams)
    return clips, replace(held, labels=np.array(middle, dtype=np.int64))


def recipe_of(kind, args, scale):
    """How a network sees a test video (D14)."""
    return evaluate.Recipe(
        args.frames, args.stride, args.clips, args.crops, short_side=0, size=args.test_size,
        stretch=tuple(args.stretch), modality=kind, bound=scale[0], flow_side=scale[1], average=args.average,
        mean=MODALITIES[kind].mean, std=MODALITIES[kind].std,  # D2
    )  # fmt: skip


# -------------------------------------------------------------------------------- stages


def generator(args, run):
    """Stage 1 (Sec. 3.1): M_MPLG learns the labelled videos from flow, or from RGB."""
    args, kind = of_stage(args, "generator"), args.generator_on
    data, videos, held, scale = target(args, run, (kind,), {}, args.holdout)
    net, made = build(args, args.generator_net, len(data.classes), kind, run)
    recipe = recipe_of(kind, args, scale)
    clips = training_clips(videos, args, (kind,), scale)
    if fit(args, run, Network(net, args.multi_clips, args.lam < 1), clips, (recipe,), held):
        finish(args, run, net, made, data, recipe, {kind_of(data): stems(videos, held)}, stage="generator")


def pseudo(args, run):
    """Stage 2 (Sec. 3.2): features of the dense clips of the source, clusters of them, pseudo-labels."""
    path, net, recipe, learned = load_generator(args, run)
    hop = args.hop or recipe.frames * recipe.stride  # D7
    data, videos, _ = source(args, run, (recipe.modality,), {path: recipe})
    # How many clips a video may have decides how many videos are worked on together: where flow has to be
    # computed, one.
    slow = recipe.modality == "field" and videos.flow is None
    dense = Dense(**vars(recipe) | dict(clips=64 if slow else 8, crops=1, uniform=0, hop=hop))
    digest = datasets.digest(videos)
    identity = {"generator": evaluate.digest_of(net), "source": digest}
    folder = Path(args.features or run.out / "features")
    found = features.extract(folder, net, net.embed, videos, dense, run, args.workers, identity)
    if found is None:
        return
    if len(found.bad) > args.max_bad * len(videos):
        raise UserError(f"{len(found.bad)} of {len(videos)} videos have no features, more than --max_bad "
                        f"{args.max_bad}; when they are mended, delete {folder}")  # fmt: skip
    rows, segment = found.rows, np.arange(len(found.rows))
    if args.granularity != "clip":
        segment = run.on_main(write_segments, run.out / "segments.npy", found, args)
        rows = np.load(run.out / "segments.npy", mmap_mode="r")
    means = cluster(args, run, rows, identity)
    if means is None:
        return
    y = means.assign()[segment]
    about = dict(clusters=args.clusters, frames=recipe.frames, stride=recipe.stride, hop=hop,
                 granularity=args.granularity, fewer=int(recipe.modality == "field"), videos=digest,
                 learned=learned)  # fmt: skip
    run.on_main(write_pseudo, run.out / "pseudo.npz", y, np.append(found.first, len(y)), about)
    counts = {"videos": len(videos), "unreadable": len(found.bad), "seconds": round(run.seconds)}
    run.result({"script": run.script, "data": Path(args.data).name, "stage": "pseudo", "source": data.name,
                "clips": len(y), "segments": len(rows), "clusters": len(np.unique(y)),
                "purity": purity(y, np.repeat(videos.labels, found.counts, axis=0)), **counts})  # fmt: skip


def cluster(args, run, rows, identity):
    """KMeans of the rows at its end (D8), gone on with from last.pt; None if a signal has stopped it."""
    means = KMeans(rows, args.clusters, args.seed, run)
    iterations = range(run.resume(identity, samples=False, kmeans=means), args.iterations)
    for i in tqdm(iterations, "k-means", leave=False, disable=not (run.main and sys.stderr.isatty())):
        row = means.step()
        run.log({"step": i, "eval": "kmeans", **row})  # the inertia after i iterations
        run.save(i + 1, identity, kmeans=means)
        if run.told_to_stop():
            run.say(f"stopped by a signal after iteration {i + 1} of K-means")
            return None
        if not row["moved"]:
            break
    return means


def selftrain(args, run):
    """Stage 3 (Sec. 3.2): M_RGB learns the pseudo-labels of the source; in MERS the generator's features."""
    args = of_stage(args, "selftrain")
    if args.transfer == "mers":
        path, teacher, its, learned = load_generator(args, run)
        data, videos, scale = source(args, run, ("rgb", its.modality), {path: its})
        clips = training_clips(split(videos, args, args.holdout)[0], args, ("rgb", its.modality), scale)
        held = videos.subset([])  # MERS has nothing to validate, but learns from the same videos
        recipe = recipe_of("rgb", args, scale)
        recipes, learn, K = (recipe, its), "features", 1
    else:
        data, videos, scale = source(args, run, ("rgb",), {})
        labels, teacher = load_pseudo(args, run, videos), None
        clips, held = pseudo_clips(videos, labels, args)
        recipe = recipe_of("rgb", args, scale)
        recipes = (Middle(**vars(recipe), pseudo=labels),)
        learned, learn, K = labels.learned, "pseudo", labels.clusters
    taught = evaluate.digest_of(teacher) if teacher else hashlib.sha256(labels.labels.tobytes()).hexdigest()
    run.write("labelled.txt", datasets.as_list(clips.videos))
    net, made = build(args, args.net, K, "rgb", run)
    if teacher:
        check_width(path, teacher, net)
        net.fc.requires_grad_(False)  # which MERS has no use for
    wrapped = Network(net, args.multi_clips, args.lam < 1, args.neighbours)
    if fit(args, run, wrapped, clips, recipes, held, learn, teacher, taught=taught):
        if run.main:
            names = [f"cluster {k}" for k in range(K)]
            evaluate.save_model(run.out / "model.pt", net, made, names, recipe, learned=learned)
        run.result({"script": run.script, "data": Path(args.data).name, "stage": "selftrain",
                    "source": data.name, "transfer": args.transfer, "clusters": K,
                    "videos": len(clips.videos), "seconds": round(run.seconds)})  # fmt: skip


def finetune(args, run):
    """Stage 4 (Sec. 4.2): M_RGB learns the labelled videos, its early stages at rest; or MARS, all of it."""
    args, init = of_stage(args, "finetune"), start_of(args)
    teacher, models, learned = None, {}, {}
    if args.transfer == "mars":
        path, teacher, its, learned = load_generator(args, run)
        models = {path: its}
    elif init and init not in backbones.PUBLISHED:
        learned = learned_by(args, init, "selftrain")
    kinds = "rgb", *(its.modality for its in models.values())
    data, videos, none, scale = target(args, run, kinds, models)
    net, made = build(args, args.net, len(data.classes), "rgb", run, init)
    if teacher:
        check_width(path, teacher, net)
    if init:
        net.freeze(args.frozen)  # D13
    recipe = recipe_of("rgb", args, scale)
    clips = training_clips(videos, args, kinds, scale)
    wrapped = Network(net, args.multi_clips, args.lam < 1)
    if fit(args, run, wrapped, clips, (recipe, *models.values()), none, "labels", teacher):
        mine = {*learned.get(kind_of(data), []), *stems(videos)}
        learned = learned | {kind_of(data): sorted(mine)}
        finish(args, run, net, made, data, recipe, learned, transfer=args.transfer)


# -------------------------------------------------------------------------------- training


def fit(args, run, net, clips, recipes, held, learn="labels", teacher=None, **identity):
    """Train the Network `net`; False if a signal has stopped it.

    recipes: how it sees a clip, and how the teacher does; held: videos for validation; learn: "labels" of the
    videos, "pseudo"-labels that come with the clips, or "features" of the teacher (MERS) alone. identity:
    what else a resumption must share.
    """
    videos, backbone = clips.videos, net.backbone
    epoch = ceil(len(videos) / (args.batch * run.world))
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))
    milestones = [] if args.lr_steps == "cosine" else [float(e) for e in args.lr_steps.split(",")]
    net = run.distribute(net, args.channels_last, args.compile)
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch, "videos")  # D1
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = optim.build(args.optimizer, learning, lr, args.weight_decay)
    identity |= dict(labelled=datasets.digest(videos), classes=backbone.fc.out_features,
                     net=f"{backbone.name} x{args.width}",
                     flow=str([(recipe.bound, recipe.flow_side) for recipe in recipes]))  # fmt: skip
    start = run.resume(identity, net=net.module, optimizer=optimizer)
    run.say(f"{total} steps, {epoch} an epoch, of {args.batch * run.world} x {args.multi_clips} clips; "
            f"{rule}; {run.device.type}")  # fmt: skip
    loader = train_loader([(clips, args.batch)], start, total, run.rank, run.world, args.workers)
    test = partial(validate, args, run, backbone, held, recipes[0])
    for step, (batch,) in run.steps(loader, start, total, args.seed, [videos], epoch, test, every):
        pairs = zip(recipes, batch["views"], strict=False)  # pseudo-labels may be the last view
        x, *x_teacher = (recipe.to_input(views.flatten(0, 1), run.device) for recipe, views in pairs)
        if learn == "labels":
            y = batch["label"][:, None, None].expand(-1, args.multi_clips, 1).to(run.device)
        else:
            y = batch["views"][-1].to(run.device) if learn == "pseudo" else None
        with run.autocast():
            with torch.no_grad():
                z_teacher = teacher.embed(*x_teacher) if teacher else None
            loss, terms = train_step(net, x.unflatten(0, (-1, args.multi_clips)), y, args, z_teacher)
        optim.set_lr(optimizer, lr * optim.schedule(step, total, epoch, milestones, args.warmup))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
    if every and not run.stopped:
        test(total)
    return not run.stopped


def validate(args, run, net, held, recipe, step):
    """The accuracy on the held-out videos, of their middle clips, into the log (D12)."""
    if len(held):
        scores = evaluate.score(net, held, replace(recipe, clips=1, crops=1), run, args.workers)
        if scores is not None:
            run.log({"step": step, "eval": "quick", "val_top1": round(evaluate.metrics(scores)["top1"], 4)})


def finish(args, run, net, made, data, recipe, learned, **words):
    """model.pt, and the test of all views of every test video."""
    if run.main:
        evaluate.save_model(run.out / "model.pt", net, made, data.classes, recipe, learned=learned)
    evaluate.report(net, data, recipe, run, args.workers, **words, **wanted(args))


# -------------------------------------------------------------------------------- what stages leave to others


def stems(*lists):
    """Sorted names of videos, without suffix."""
    return sorted({datasets.stem_of(videos.name(i)) for videos in lists for i in range(len(videos))})


def load(args, run, path, stage):
    """(network at rest on the device, its Recipe, {data set: videos whose labels it knows}) of a model.pt."""
    learned = learned_by(args, path, stage)
    net, _, _, recipe = evaluate.load_model(path)
    return run.place(net, args.channels_last).requires_grad_(False), recipe, learned


def learned_by(args, path, stage):
    """{data set: videos whose labels it knows} of a model.pt that `stage` makes; UserError for a leak."""
    if not Path(path).exists():
        raise UserError(f"{path} is not there: --stage {stage} makes it")
    state = files.load(path)
    learned = state.get("learned") if isinstance(state, dict) else None
    if learned is None and not args.allow_leak:
        raise UserError(f"{path} does not say whose labels it has learned from: --allow_leak if you know")
    refuse_leak(args, path, learned or {})
    return learned or {}


def load_generator(args, run):
    """(path, *load) of M_MPLG."""
    path = args.generator or f"{args.out}/generator/model.pt"
    return path, *load(args, run, path, "generator")


def check_width(path, teacher, net):
    """MERS and MARS compare features, of which both networks must have as many."""
    if teacher.fc.in_features != net.fc.in_features:
        raise UserError(f"{path} has {teacher.fc.in_features} features, {net.name} {net.fc.in_features}: "
                        "--transfer wants --net and --width with as many")  # fmt: skip


def start_of(args):
    """What M_RGB starts fine-tuning from: a file, the name of published weights, or None."""
    if args.init == "none" or args.transfer == "mars":
        return None
    return args.init or f"{args.out}/selftrain/model.pt"


def refuse_leak(args, path, learned):
    """Raise UserError if `path` has learned from test videos of --data, {data set: videos} (D16)."""
    data = agreed(datasets.load, args.data, args.root, args.split)
    both = sorted(set(stems(data.test)) & set(learned.get(kind_of(data), [])))
    if both and not args.allow_leak:
        raise UserError(f"{path} knows {len(both)} of the {len(data.test)} test videos of {data.name}, split "
                        f"{data.split}: take one of this split, or --allow_leak")  # fmt: skip


def kind_of(data):
    """The name of a data set without its variant."""
    return data.name.partition(":")[0]


def write_segments(path, found, args):
    """Write the features of the segments, .npy (S, D); returns (N,) int64, the segment of each clip."""
    segment, H = np.empty(len(found.rows), np.int64), [np.empty((0, found.rows.shape[1]), np.float32)]
    n = 0
    for first, count in zip(found.first[found.counts > 0], found.counts[found.counts > 0], strict=True):
        f = found.rows[first : first + count]
        own = segments(f, args.granularity, args.percentile)  # Eq. 4
        segment[first : first + count] = n + own
        H.append(segment_means(f, own))
        n += len(H[-1])
    with files.replacing(path) as file:
        np.save(file, np.concatenate(H))
    return segment


def purity(clusters, y):
    """Per cent of the clips that have the most frequent class of their cluster; nothing learns from it.

    Clips of label -1 do not count; None for videos without labels, or of several.
    """
    if y.ndim > 1 or (y < 0).all():
        return None
    clusters, y = clusters[y >= 0], y[y >= 0]
    pairs, counts = np.unique(np.stack([clusters, y]), axis=1, return_counts=True)
    best = np.zeros(pairs[0].max() + 1, np.int64)
    np.maximum.at(best, pairs[0], counts)
    return 100 * float(best.sum() / len(y))


def write_pseudo(path, labels, first, about):
    with files.replacing(path) as file:
        np.savez(file, labels=labels.astype(np.int32), first=first, about=np.array(json.dumps(about)))


def load_pseudo(args, run, videos):
    """The Pseudo of --pseudo, or of this run; UserError if it is not of these videos."""
    path = args.pseudo or f"{args.out}/pseudo/pseudo.npz"
    try:
        with np.load(path) as file:
            found = Pseudo(file["labels"], file["first"], **json.loads(str(file["about"])))
    except FileNotFoundError:
        raise UserError(f"{path} is not there: --stage pseudo makes it") from None
    except (OSError, TypeError, AttributeError, *features.DAMAGE):
        raise UserError(f"{path} holds no pseudo-labels, or is damaged") from None
    if found.videos != datasets.digest(videos):
        raise UserError(f"{path} has pseudo-labels of other videos than --source {args.source} has")
    refuse_leak(args, path, found.learned)
    if args.neighbours and found.granularity != "clip":
        raise UserError(f"{path} has pseudo-labels of granularity {found.granularity}, --neighbours wants "
                        "clip")  # fmt: skip
    return found


# -------------------------------------------------------------------------------- retrieval


def retrieve(args, run):
    """Clip retrieval (Sec. 4.5, Table 7): clips of the test videos ask for those of the training videos."""
    data = agreed(datasets.load, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video, which retrieval does not know")
    path = start_of(args)
    if path and path not in backbones.PUBLISHED:
        net, recipe, _ = load(args, run, path, "selftrain")
    else:
        net, _ = build(args, args.net, len(data.classes), "rgb", run, path)
        net, recipe = run.place(net), recipe_of("rgb", of_stage(args, "finetune"), (0, 0))
    if recipe.modality != "rgb":
        raise UserError(f"{path} sees flow: retrieval is for a network that sees RGB")
    recipe, call = replace(recipe, clips=args.clips, crops=1, uniform=0), partial(max_features, net)
    found, identity = [], {"weights": evaluate.digest_of(net), "pooled": "max"}
    for part, videos in (("train", data.train), ("test", data.test)):
        folder = run.out / part
        found.append(features.extract(folder, net, call, videos, recipe, run, args.workers, identity))
        if found[-1] is None:
            return
    row = run.on_main(recalls, args, run, data, recipe, *found)
    counts = {"videos": len(data.test), "unreadable": len(found[1].bad), "seconds": round(run.seconds)}
    run.result({"script": run.script, "data": data.name, "stage": "retrieve", **row, **counts})


def max_features(net, x):
    """(B, D) float32: the maximum of the last stage over time and space (Sec. 4.5)."""
    return net.features(x)[-1].float().amax((2, 3, 4))


def recalls(args, run, data, recipe, train, test):
    """{"R1": %, ...} of clips, {"videos_R1": %, ...} of the means of a video's clips (D15); the sheet."""
    z_train, z = (torch.tensor(part.rows, device=run.device) for part in (train, test))
    y_train, y = (torch.from_numpy(np.repeat(videos.labels, part.counts)).to(run.device)
                  for videos, part in ((data.train, train), (data.test, test)))
    readable = len(y) / (recipe.clips * len(data.test))  # what cannot be read finds nothing
    found, nearest = recall(z, y, z_train, y_train)
    row = {f"R{n}": readable * share for n, share in found.items()}
    z, z_train = (part.unflatten(0, (-1, recipe.clips)).mean(1) for part in (z, z_train))
    found, _ = recall(z, y[:: recipe.clips], z_train, y_train[:: recipe.clips])
    row |= {f"videos_R{n}": readable * share for n, share in found.items()}
    sheet(run.out / "sheet.png", args.sheet, data, recipe, train, test, nearest[:, :3].tolist())
    return row


def sheet(path, count, data, recipe, train, test, nearest):
    """Fig. S1: the middle clips of `count` test videos, and for each the three nearest training clips."""
    videos = np.repeat(np.arange(len(data.train)), train.counts)  # of each training clip
    rows, captions = [], []
    asked = np.flatnonzero(test.counts)
    for i in asked[np.linspace(0, len(asked) - 1, min(count, len(asked))).round().astype(int)].tolist():
        middle = recipe.clips // 2
        rows.append(clip_of(data.test, i, middle, recipe))
        captions.append(f"{data.test.name(i)}: {data.classes[data.test.labels[i]]}")
        for place, clip in enumerate(nearest[test.first[i] + middle], 1):
            k = int(videos[clip])
            hit = "hit" if data.train.labels[k] == data.test.labels[i] else "miss"
            rows.append(clip_of(data.train, k, clip - int(train.first[k]), recipe))
            captions.append(f"  {place} {hit}: {data.classes[data.train.labels[k]]}, {data.train.name(k)}")
    if rows:
        show.contact_sheet(path, rows, captions)


def clip_of(videos, i, clip, recipe):
    """Clip number `clip` of video i, as the network sees it: uint8 (T, 3, H, W), eight frames at most."""
    view = Views(videos, recipe.sample, recipe.view, open=recipe.open)[i]["views"][clip]
    return view[:: ceil(len(view) / 8)]


# -------------------------------------------------------------------------------- runs


def stages_of(args):
    """The stages to run: --stage, or all whose results are not given."""
    if args.stage != "all":
        return [args.stage]
    without = {"pseudo": (), "mers": ("pseudo",), "mars": ("pseudo", "selftrain")}[args.transfer]
    stages = [stage for stage in STAGES if stage not in without]
    if args.init and args.transfer != "mars":
        return ["finetune"]
    if args.pseudo:
        return [stage for stage in stages if stage not in ("generator", "pseudo")]
    return [stage for stage in stages if stage != "generator" or not args.generator]


def test_only(args, run):
    """--eval: the test of one model."""
    data = agreed(datasets.load, args.data, args.root, args.split)
    changes = dict(clips=args.clips, crops=args.crops, average=args.average)
    learned_by(args, args.eval, "finetune")
    net, recipe = evaluate.load_for(args.eval, data, run.device, **changes)
    models = {args.eval: recipe}
    data, _ = modality.with_flow(data, args.data, args.root, args.flow, run, [recipe.modality], models)
    evaluate.report(net, data, recipe, run, args.workers, **wanted(args, also=TEST))


def one_run(args, stage):
    """A stage, or a test, in its folder; whether there is a result, and no signal to stop after it."""
    out = args.out if args.eval or stage == "finetune" else f"{args.out}/{stage}"
    config = vars(of_stage(args, stage) if stage in TRAINED else args)
    free = free_flags(args, TEST)
    if not args.eval:
        free = (*free, "stage", "flow", "source_flow", "features", "sheet", *UNUSED.get(stage, ()))
    places = (*PLACES, "source", "source_root", "source_list")
    often = args.log_every, args.max_bad, args.save_minutes
    with Run("motionfit", out, config, free, *often, places) as run:
        if args.eval:
            test_only(args, run)
        elif not run.finished():
            {"generator": generator, "pseudo": pseudo, "selftrain": selftrain, "finetune": finetune,
             "retrieve": retrieve}[stage](args, run)  # fmt: skip
        return run.ended and not run.told_to_stop()


@record
def main():
    args = parse_args()
    for stage in ["eval"] if args.eval else stages_of(args):
        if not one_run(args, stage):
            return


if __name__ == "__main__":
    main()

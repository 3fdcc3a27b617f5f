"""MotionFit: Motion-Augmented Self-Training for Video Recognition at Smaller Scale.

Kirill Gavrilyuk, Mihir Jain, Ilia Karmanov, Cees G. M. Snoek. ICCV 2021.

From a small labelled set a network learns more from optical flow than from RGB frames, but flow is slow to
compute at test time. So flow only makes pseudo-labels: a flow network, the generator, is trained on the
labelled set, and its features of the clips of a large unlabelled collection, the source, are clustered. An
RGB network learns to predict the cluster of each clip. It is then fine-tuned on a labelled set, the same one
or another (Table 4). Tests need no flow.

    1 generator   labelled videos -> R clips of flow -> M_MPLG -> Eq. 1 with the class
    2 pseudo      source videos -> dense clips of flow -> M_MPLG -> features (-> segments, Eq. 4)
                                                                         -> K-means -> pseudo-labels
    3 selftrain   source videos -> R clips of RGB -> M_RGB -> Eq. 1 with the pseudo-label of each clip
    4 finetune    labelled videos -> R clips of RGB -> M_RGB, early stages frozen -> Eq. 1 with the class

Equations:  Eq. 1 -> multi_clip_loss    Eq. 2 -> clip_order_loss    Eq. 3 -> batch_loss, all in train_step
            (clip order, Eq. 2 and 3, is an ablation: `--lam 1`, the default, leaves it out)
            Eq. 4 -> boundaries, in segments    K-means (Sec. 3.2) -> common/kmeans.py
            MERS, MARS (Table 5) -> feature_loss    retrieval (Table 7) -> common/tools/retrieve.py

Names: B videos of a step, R clips of each, T dense clips of a video, K classes or clusters, D features.

Run (the paper's data sets and batches on one GPU; then the embedded data set, on a CPU too):

    python -m common.tools.flow ucf101 --out data/ucf101_flow
    python -m common.tools.flow k400 --out data/k400_flow
    python motionfit.py --data ucf101 --source k400
    python motionfit.py --data toy:mini

This runs the four stages in turn. A flag goes to every stage that has it. Stages 1 to 3 write to the folders
generator, pseudo and selftrain of `--out`, fine-tuning to `--out` itself. A stage can also be run alone; its
input is then the earlier stages' files in `--out`, or the files that its flags name:

    python motionfit.py pseudo --data toy:mini --generator RUN/generator/model.pt --clusters 32 --out RUN_32
    python motionfit.py finetune --data toy:mini --init RUN/selftrain/model.pt --frames 16 --out RUN_16

Baselines: `finetune --init none`; MERS `selftrain --teacher MODEL.PT` before `finetune`;
MARS `finetune --teacher MODEL.PT`.

Differences from the paper, and what it leaves open (VCOP is the public code of its reference [67]):

D1  `--batch` is per GPU, the paper's batches are totals. Its rate is for `--lr_batch` videos a step and
    scales linearly with those of all GPUs. Batch norm is per GPU. There is no dropout.
D2  Flow is TV-L1 in bytes, up to 20 pixels; a clip has the channels u and v, normalised by 0.5 and 0.226.
D3  The R clips of a video do not overlap if it is long enough. Each has its own crop, as in VCOP, and is
    mirrored only with `--flip`. Clips of S3D-G, 224 pixels, are cropped from `--stretch 256 342`.
D4  Clip order is predicted from pooled features by VCOP's head: 512 units for each pair of clips, dropout
    0.5, R! classes. The features are shuffled, not the clips.
D5  R = 3 in all stages; the paper says so for the generator only.
D6  A video has T dense clips, at most 128, evenly spread without overlap, cropped at the centre. Features are
    averaged over time and space, not reduced or normalised. RGB clip t, of T that are spread in the same way,
    has the pseudo-label of flow clip t.
D7  K-means starts once from K random features, 20 iterations at most. p of Eq. 4 is 75, within a video.
D8  `--neighbours` (Sec. 4.4): a linear layer each predicts the pseudo-labels of the next and the previous
    dense clip; their losses are added to Eq. 1. Off: the paper does not say which of its results have it.
D9  The 10 % for validation (Sec. 4.2) are whole groups of videos, and for the log only: the last weights are
    kept. In self-training the central clip is tested against the pseudo-label of the middle dense clip.
D10 Fine-tuning freezes the stages before conv4, with their batch norms. With `--init none` all stages train.
D11 Test: ten clips, central crop, averaged logits, as in VCOP.
D12 A model trained on labels of another split of `--data` is refused: its training videos are test videos
    here. So is a source with test videos. `--allow_leak` accepts both. The paper does not say how its three
    splits share a generator.
D13 MERS and MARS compare pooled features by the mean squared difference (Crasto et al. 2019); MARS weighs it
    by 50 beside Eq. 1 and trains all stages from random weights.
D14 `--source all` and `rest` are the training videos of `--data`, with and without the labelled ones (Tables
    8 and S1); `k400:test` is Kinetics-val. Any folder of videos is a source: no labels are needed.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, factorial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import augment, backbones, evaluate, modality, optim
from common.clips import Clips, dense_test, train_loader
from common.data import as_list, digest_of_videos, hold_out, labelled_subset, load_data
from common.errors import UserError
from common.flags import Parser, at_least, by_stage, epochs, free_flags, share, wanted
from common.io import features, files
from common.io.models import digest_of_model, load_for, load_model, save_model
from common.io.weights import PUBLISHED, fetch
from common.kmeans import kmeans, purity
from common.modality import MODALITIES, Recipe
from common.run import PLACES, Run, agreed

STAGES = "generator", "pseudo", "selftrain", "finetune"
# Defaults per data set (the flags' own defaults are UCF-101's, with Kinetics-400 as source). Sec. 4.2.
RECIPES = {
    "toy": dict(
        per_class=8, source="all", net="r2plus1d_10-pool", width=0.25, size=40, stretch=[48, 48], frames=8,
        stride=2, hop=8, clusters=64, epochs=dict(generator=30, selftrain=10, finetune=20), batch=8,
        lr_batch=8, lr_steps=[], warmup=1, optimizer="adamw", lr=0.01, weight_decay=0.05, clips=5,
        eval_every=5, workers=1, channels_last=True,
    ),
}  # fmt: skip
RECIPES["small"] = RECIPES["toy"] | dict(per_class=2, size=48, stretch=[54, 68], clusters=20, warmup=3,
    eval_every=20, epochs=dict(generator=60, selftrain=30, finetune=40))  # fmt: skip
DENSE = 128  # dense clips of a video, at most: they are decoded together
START_FILES = "generator", "pseudo", "init", "teacher"  # flags that name a file of an earlier stage
UNUSED_WITH_TEACHER = "pseudo", "init"  # those that MERS and MARS do not read
NOT_A_PATH = (None, "none", *PUBLISHED)  # values of START_FILES that name no file


def parse_args(argv=None):
    """{stage: its arguments} of the stage that is named first, or of all four; {"eval": ...} for a test."""
    argv, parsers = sys.argv[1:] if argv is None else argv, {stage: parser_of(stage) for stage in STAGES}
    without = [f"--{flag}" for flag in START_FILES]
    words = {argv[0]: argv[1:]} if {*argv[:1]} & {*STAGES} else by_stage(argv, parsers, without)
    runs = {stage: parse_stage(stage, parsers[stage], words[stage]) for stage in words}
    tests = [args for args in runs.values() if args.eval]
    return {"eval": tests[-1]} if tests else runs


def parser_of(stage):
    """The parser of a stage's flags."""
    p = Parser("motionfit", __doc__, RECIPES, stage)
    add = p.data(unlabelled=None, ratio=1.0).add_argument
    add("--flow", metavar="DIR", help="extracted optical flow of --data; default: <root>_flow")
    add("--stretch", type=at_least(1), nargs=2, default=[128, 171], help="height, width before the crop, D3")
    add("--allow_leak", action="store_true", help="accept models and sources that know test videos, D12")
    if stage in ("pseudo", "selftrain"):
        add("--source", default="k400", help="unlabelled: a data set, a folder, all or rest, D14")
        add("--source_root", metavar="DIR", help="folder of --source; default: data/<name>")
        add("--source_flow", metavar="DIR", help="optical flow of --source; default: <source_root>_flow")
        add("--source_list", metavar="FILE", help="list of the videos of --source to use; default: all")
    if stage in ("generator", "selftrain"):
        add("--holdout", type=share, default=0.1, help="share of the videos for validation, D9")
    add = p.add_argument_group("method").add_argument
    if stage == "generator":
        add("--modality", choices=["field", "rgb"], default="field", help="optical flow or RGB, Table 1")
        add("--init", metavar="MODEL.PT", help="start from the weights of another generator (Sec. 4.3)")
    if stage == "pseudo":
        add("--generator", metavar="MODEL.PT", default="{out}/generator/model.pt", help="network that labels")
        add("--features", metavar="DIR", default="{out}/pseudo/features", help="feature cache")
        add("--hop", type=at_least(1), help="least frames between dense clips; default: those of a clip, D6")
        add("--granularity", choices=["clip", "segment", "thirds", "video"], default="clip", help="Table 2")
        add("--percentile", type=at_least(0.0, 100), default=75.0, help="p of Eq. 4, D7")
        add("--clusters", type=at_least(1), default=1000, help="K of K-means, Table 3")
        add("--iterations", type=at_least(1), default=20, help="K-means iterations, at most, D7")
    if stage == "selftrain":
        add("--pseudo", metavar="FILE.NPZ", default="{out}/pseudo/pseudo.npz", help="pseudo-labels")
        add("--teacher", metavar="MODEL.PT", help="MERS: match the features of this generator instead, D13")
        add("--neighbours", action="store_true", help="predict the next and previous pseudo-label, too, D8")
    if stage == "finetune":
        add("--init", metavar="MODEL.PT", default="{out}/selftrain/model.pt",
            help="weights to start from, or none: random weights (Table 4)")  # fmt: skip
        add("--teacher", metavar="MODEL.PT", help="MARS: match the features of this generator, too, D13")
        add("--alpha", type=at_least(0.0), default=50.0, help="weight of the feature loss of MARS, D13")
        add("--frozen", type=int, choices=range(5), default=2, help="number of frozen stages of the net, D10")
    if stage != "pseudo":
        add("--net", choices=backbones.NAMES, default="r2plus1d_18", metavar="NET", help="backbone")
        add("--width", type=float, default=1.0, help="channel multiplier of the backbone")
        add("--frames", type=at_least(1), default=16, help="frames of a clip, Tables 1 and 4")
        add("--stride", type=at_least(1), default=1, help="distance of the frames of a clip")
        add("--multi_clips", type=at_least(1), default=3, help="R of Eq. 1, Table 1, D5")
        add("--lam", type=share, default=1.0, help="lambda of Eq. 3; 0: clip order only")
        add = p.optimisation("videos", "videos", epochs=120, batch=8, lr=0.001, lr_batch=8,
                             weight_decay=5e-4).add_argument  # Sec. 4.2, D1  # fmt: skip
        add("--lr_steps", type=epochs, default="40,60,80", help="epochs at which --lr falls to a tenth")
    p.run(test_scale=1)
    p.set_defaults(size=112, flip=False, clips=10, crops=1)  # D3, D11
    if stage == "selftrain":
        p.set_defaults(epochs=45, batch=16, lr_batch=16, lr_steps="20,40")
    return p


def parse_stage(stage, p, argv):
    """The arguments of a stage, checked; files that it starts from are those of --out by default."""
    args = p.parse(argv)
    if max(args.size, args.test_size) > min(args.stretch):
        p.error("--size and --test_size are crops of --stretch {} {}".format(*args.stretch))
    given = {word.partition("=")[0] for word in argv}
    if "lam" in args and args.lam < 1 and args.multi_clips not in range(2, 6):  # 9 clips have 9! orders
        p.error(f"--lam below 1 predicts the order of 2 to 5 clips, --multi_clips is {args.multi_clips}")
    if stage == "selftrain" and args.teacher and ("--pseudo" in given or args.neighbours or args.lam < 1):
        p.error("--teacher learns features only: --lam 1, without --pseudo and --neighbours")
    if stage == "finetune" and args.teacher and "--init" in given:
        p.error("--teacher starts from random weights: without --init")
    return args


def start_files(args):
    """{flag: path} of the files that a stage starts from."""
    unused = START_FILES if args.eval else UNUSED_WITH_TEACHER if getattr(args, "teacher", None) else ()
    paths = {flag: getattr(args, flag, None) for flag in START_FILES if flag not in unused}
    return {flag: path for flag, path in paths.items() if path not in NOT_A_PATH}


# -------------------------------------------------------------------------------- the method


def multi_clip_loss(logits, y):
    """Eq. 1: L_mc = 1/B sum_b (1/R sum_i L_class(y_bi, y'_bi)).

    logits (B, R, K), y (B, R) int64, of which -1 does not count. The cross-entropies of the clips are
    averaged, not their logits: a clip of the background then cannot cancel the signal of one of the action.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
    return losses / (y >= 0).sum().clamp(min=1)


def clip_order_loss(logits, p):
    """Eq. 2: L_co = 1/B sum_b L_order(p_b, p'_b). logits (B, R!), p (B,) int64, a row of OrderHead.orders."""
    return F.cross_entropy(logits.float(), p)


def batch_loss(loss_mc, loss_co, lam):
    """Eq. 3: L_batch = lambda L_mc + (1 - lambda) L_co."""
    return lam * loss_mc + (1 - lam) * loss_co


def boundaries(f, percentile):
    """Eq. 4: B = {t : |f_t - f_{t-1}|_1 > tau}, tau the percentile of these differences in the video.

    f (T, D), the features of a video's clips. Returns (T,) bool: a segment begins at clip t.
    """
    change = np.abs(np.diff(f.astype(np.float64), axis=0)).sum(1)  # (T - 1,)
    tau = np.percentile(change, percentile) if len(change) else 0
    return np.append(False, change > tau)


def segments(f, granularity, percentile):
    """The segment of each clip of a video (Sec. 3.2): f (T, D) to int64 (T,), numbers from 0 in time order.

    A segment is a "clip", lasts until an abrupt change ("segment", Eq. 4), is a third of the video ("thirds")
    or all of the "video".
    """
    t = np.arange(len(f))
    if granularity == "segment":
        return np.cumsum(boundaries(f, percentile))
    return {"clip": t, "thirds": t * min(3, len(t)) // len(t), "video": 0 * t}[granularity]


def segment_means(f, segment):
    """H = {h_s}, float32 (S, D): the mean features of the clips of each segment (Sec. 3.2)."""
    sums = np.zeros((segment[-1] + 1, f.shape[1]))
    np.add.at(sums, segment, f)
    return (sums / np.bincount(segment)[:, None]).astype(np.float32)


def feature_loss(z, z_teacher):
    """MERS, MARS (Crasto et al. 2019): mean of (z - z_teacher)^2 over all features, the teacher detached."""
    return F.mse_loss(z.float(), z_teacher.detach().float())


def train_step(net, x, y, args, z_teacher=None):
    """The loss of one step, and its terms by name.

    x (B, R, C, T, H, W). y (B, R, 1), the label or pseudo-label of each clip, or with --neighbours (B, R, 3),
    of the clip, the next and the previous one; None for MERS. z_teacher (B R, D): the generator's features.
    """
    p = torch.randint(factorial(args.multi_clips), (len(x),), device=x.device) if args.lam < 1 else None
    logits, logits_order, z = net(x, p)
    if y is None:  # MERS
        loss = feature_loss(z, z_teacher)
        return loss, {"loss_features": loss}
    terms = {"loss_mc": multi_clip_loss(logits[0], y[..., 0])}  # Eq. 1
    loss = terms["loss_mc"]
    for k, name in enumerate(("loss_next", "loss_previous")[: len(logits) - 1], 1):
        terms[name] = multi_clip_loss(logits[k], y[..., k])  # D8
        loss = loss + terms[name]
    if args.lam < 1:
        terms["loss_co"] = clip_order_loss(logits_order, p)  # Eq. 2
        loss = batch_loss(loss, terms["loss_co"], args.lam)  # Eq. 3
    if z_teacher is not None:  # MARS
        terms["loss_features"] = feature_loss(z, z_teacher)
        loss = loss + args.alpha * terms["loss_features"]
    terms["clip_top1"] = (logits[0].argmax(-1) == y[..., 0]).float().mean()
    return loss, terms


# -------------------------------------------------------------------------------- networks


class Network(nn.Module):
    """A backbone, and what only training needs: heads for neighbours (D8), one for the clip order (D4)."""

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
        logits_order = self.order(z.unflatten(0, (-1, self.R)), p) if self.order else None
        return [y.unflatten(0, (-1, self.R)) for y in logits], logits_order, z


class OrderHead(nn.Module):
    """In which of the R! orders the features of R clips are (Xu et al. 2019, Sec. 3.3; D4)."""

    def __init__(self, D, R, hidden=512):
        super().__init__()
        self.register_buffer("orders", torch.tensor(list(itertools.permutations(range(R)))), False)  # (R!, R)
        self.pairs = list(itertools.combinations(range(R), 2))
        self.pair = nn.Sequential(nn.Linear(2 * D, hidden), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.Dropout(0.5), nn.Linear(hidden * len(self.pairs), len(self.orders)))

    def forward(self, z, p):
        """z (B, R, D) in time order, which is put into the orders p (B,). Returns logits (B, R!)."""
        z = z.gather(1, self.orders[p][..., None].expand_as(z))
        pairs = [self.pair(torch.cat([z[:, i], z[:, j]], 1)) for i, j in self.pairs]
        return self.last(torch.cat(pairs, 1))


# -------------------------------------------------------------------------------- data


def labelled_videos(args, run, kinds, models):
    """(Data, its labelled videos, (bound, short side) of their flow) of --data."""
    data = agreed(load_data, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video, which this method does not know")
    data, scale = modality.with_flow(data, args.data, args.root, args.flow, run, kinds, models)
    few = agreed(labelled_subset, data, args.ratio, args.per_class, args.seed, args.labelled_list)
    return data, data.train.subset(few), scale


def source_videos(args, run, kinds, models):
    """(Data, its videos that are used without labels, (bound, short side) of their flow) of --source."""
    name, root, folder, split = args.source.removesuffix(":test"), args.source_root, args.source_flow, 1
    if own := name in ("all", "rest") or (name == args.data and not root):  # D14
        name, root, folder, split = args.data, args.root, args.flow, args.split
    is_test = args.source.endswith(":test")
    data = agreed(load_data, name, root, split, labels=own or is_test)
    data, scale = modality.with_flow(data, name, root, folder, run, kinds, models)
    data = replace(data, train=data.test) if is_test else data
    use = np.arange(len(data.train))
    if args.source == "rest":
        few = agreed(labelled_subset, data, args.ratio, args.per_class, args.seed, args.labelled_list)
        use = np.setdiff1d(use, few)
    if args.source_list:
        use = np.intersect1d(use, agreed(labelled_subset, data, listfile=args.source_list))
    if not len(use):
        raise UserError(f"--source {args.source} has no video without a label")
    test = agreed(load_data, args.data, args.root, args.split).test
    leaked = {os.path.abspath(data.train.path(i)) for i in use}
    leaked &= {os.path.abspath(test.path(i)) for i in range(len(test))}
    if leaked and not args.allow_leak:
        raise UserError(f"--source {args.source} has {len(leaked)} of the {len(test)} test videos of --data, "
                        f"split {args.split}: leave them out, or --allow_leak")  # fmt: skip
    return data, data.train.subset(use), scale


def multi_clip(source, rng, args, kinds):
    """R windows in time order for each of `kinds`; they do not overlap if the video is long enough (D3)."""
    n, R, span = len(source), args.multi_clips, (args.frames - 1) * args.stride + 1
    gap = span if n >= R * span else 0
    n_free = max(n - span - gap * (R - 1), 0)
    starts = np.sort(rng.integers(n_free + 1, size=R)) + gap * np.arange(R)
    return [(start + args.stride * np.arange(args.frames)) % n for start in starts for _ in kinds]


def pseudo_labelled(source, rng, args, pseudo_labels):
    """(R windows, dense clips in time order; their pseudo-labels (R, 1), with --neighbours (R, 3))."""
    video = source.videos.labels[source.index]  # its number in pseudo_labels, see train
    y = np.append(pseudo_labels.of(video), -1)  # -1: no clip before the first or after the last
    T = len(y) - 1
    t = np.sort(rng.choice(T, args.multi_clips, replace=T < args.multi_clips))
    windows = dense_test(len(source), args.frames, args.stride, T)[t]  # D6
    return list(windows), torch.from_numpy(y[t[:, None] + ([0, 1, -1] if args.neighbours else [0])]).long()


def train_views(clips, args, kinds):
    """uint8 (R, T, C, H, W) of each of `kinds`; a clip has the same crop in all of them (D3)."""
    groups = [clips[k : k + len(kinds)] for k in range(0, len(clips), len(kinds))]  # a window's clips
    for r, group in enumerate(groups):
        groups[r] = augment.stretched_crop(group, args.size, args.stretch)
        if args.flip and torch.rand(()) < 0.5:
            groups[r] = [modality.flip(clip, kind) for clip, kind in zip(groups[r], kinds, strict=True)]
    return tuple(torch.stack(crops) for crops in zip(*groups, strict=True))


@dataclass(frozen=True)
class DenseClips(Recipe):
    """The recipe of a generator, for all dense clips of a video (D6)."""

    hop: int = 16

    def sample(self, source):
        room = max(len(source) - self.frames * self.stride, 0)
        return list(dense_test(len(source), self.frames, self.stride, min(DENSE, room // self.hop + 1)))


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-labels (N,) int32 of dense clips: labels[first[i] : first[i + 1]] are those of video i."""

    labels: np.ndarray
    first: np.ndarray
    clusters: int
    granularity: str
    unlabelled: str  # digest_of_videos of the source
    learned: dict  # see learned_by

    def of(self, i):
        return self.labels[self.first[i] : self.first[i + 1]]


# -------------------------------------------------------------------------------- pseudo-labels


def pseudo(args, run):
    """Stage 2 (Sec. 3.2): features of the dense clips of the source, their clusters, pseudo-labels."""
    net, recipe, learned = load_generator(args, args.generator, run)
    data, videos, _ = source_videos(args, run, (recipe.modality,), {args.generator: recipe})
    identity = {"unlabelled": digest_of_videos(videos)}
    if run.finished(identity):
        return
    # DenseClips sets the number of clips; `clips` only sets how many videos share a batch: one where flow is
    # computed, eight where it is read.
    clips = 64 if recipe.modality == "field" and videos.flow is None else 8
    dense = vars(recipe) | dict(clips=clips, crops=1, hop=args.hop or recipe.frames * recipe.stride)
    folder, generator = Path(args.features), {"generator": digest_of_model(net)}
    blocks = partial(evaluate.blocks, net, net.embed, run=run, workers=args.workers, bar="features")
    extraction = features.Extraction(videos, DenseClips(**dense), blocks, generator)
    found = features.extract(folder, extraction, run)
    if found is None:
        return
    if len(found.bad) > args.max_bad * len(videos):
        raise UserError(f"{len(found.bad)} of {len(videos)} videos have no features, more than --max_bad "
                        f"{args.max_bad}; when they are mended, delete {folder}")  # fmt: skip
    about = {"clusters": args.clusters, "granularity": args.granularity, "learned": learned, **identity}
    row = run.on_main(write_pseudo, args, run, found, videos.labels, about)
    run.save(1, identity)
    run.result(
        {
            "script": run.script,
            "data": Path(args.data).name,
            "stage": "pseudo",
            "source": data.name,
            **row,
            "videos": len(videos),
            "unreadable": len(found.bad),
            "seconds": round(run.seconds),
        }
    )


def write_pseudo(args, run, found, y, about):
    """Cluster the features of clips, segments or videos and write pseudo.npz; numbers for the RESULT line."""
    rows, segment = found.rows, np.arange(len(found.rows))
    if args.granularity != "clip":
        means, n = [], 0
        for first, count in zip(found.first, found.counts, strict=True):
            if count:
                own = segments(rows[first : first + count], args.granularity, args.percentile)
                means.append(segment_means(rows[first : first + count], own))
                segment[first : first + count] = n + own
                n += len(means[-1])
        rows = np.concatenate(means)
    if len(rows) < args.clusters:
        raise UserError(f"--clusters {args.clusters} is more than there are clips or segments, {len(rows)}")
    labels, _ = kmeans(rows, args.clusters, args.iterations, args.seed, run.device)
    labels = labels[segment].astype(np.int32)
    with files.replacing(run.out / "pseudo.npz") as file:
        np.savez(file, labels=labels, first=np.append(found.first, len(labels)), about=json.dumps(about))
    row = {"clips": len(labels), "segments": len(rows), "clusters": len(np.unique(labels))}
    return row | purity(labels, np.repeat(y, found.counts, axis=0))


def load_pseudo(args, videos):
    """The Pseudo of --pseudo; UserError if it cannot be used."""
    try:
        with np.load(args.pseudo) as file:
            pseudo = Pseudo(file["labels"], file["first"], **json.loads(str(file["about"])))
    except (OSError, TypeError, AttributeError, *features.DAMAGE):
        raise UserError(f"{args.pseudo} holds no pseudo-labels, or is damaged") from None
    if pseudo.unlabelled != digest_of_videos(videos):
        raise UserError(f"{args.pseudo} has pseudo-labels of other videos than --source {args.source} has")
    if args.neighbours and pseudo.granularity != "clip":
        raise UserError(f"--neighbours needs pseudo-labels of clips, {args.pseudo} has {pseudo.granularity}")
    learned_by(args, args.pseudo, pseudo.learned)
    return pseudo


def load_generator(args, path, run):
    """(network in eval mode, without gradients; its Recipe; {data set: splits} that it has learned)."""
    net, _, _, recipe = load_model(path)
    return run.to_device(net, args.channels_last).requires_grad_(False), recipe, learned_by(args, path)


def learned_by(args, path, learned=None):
    """{data set: splits} whose labels a file has learned; UserError for another split of --data (D12)."""
    if learned is None and isinstance(state := files.load(path), dict):
        learned = state.get("learned")
    if learned is None and not args.allow_leak:
        raise UserError(f"{path} does not say whose labels it has learned: --allow_leak if you know")
    learned = learned or {}
    others = {*learned.get(Path(args.data).name.partition(":")[0], [])} - {args.split}
    if others and not args.allow_leak:
        raise UserError(f"{path} has learned split {min(others)} of {args.data}, with test videos of split "
                        f"{args.split}: take a model of this split, or --allow_leak")  # fmt: skip
    return learned


# -------------------------------------------------------------------------------- training


def train(stage, args, run):
    """Stages 1 (Sec. 3.1), 3 (Sec. 3.2) and 4 (Sec. 4.2): a network learns labels or pseudo-labels."""
    # 1. The files that the stage starts from.
    teacher, models, pseudo_labels, learned = None, {}, None, {}
    init, path = getattr(args, "init", None), getattr(args, "teacher", None)
    if path:
        teacher, models[path], learned = load_generator(args, path, run)
        init = "none"
    elif init not in NOT_A_PATH:
        learned = learned_by(args, init)
    mers = teacher is not None and stage == "selftrain"

    # 2. Videos and clips.
    kind = getattr(args, "modality", "rgb")
    kinds = kind, *(recipe.modality for recipe in models.values())
    sample = partial(multi_clip, args=args, kinds=kinds)
    if stage == "selftrain":
        data, videos, scale = source_videos(args, run, kinds, models)
        if not mers:
            pseudo_labels = load_pseudo(args, videos)
            learned = pseudo_labels.learned
            sample = partial(pseudo_labelled, args=args, pseudo_labels=pseudo_labels)
            # From here on videos.labels holds each video's number in pseudo_labels, not a class.
            readable = np.flatnonzero(np.diff(pseudo_labels.first))
            videos = replace(videos, labels=np.arange(len(videos))).subset(readable)
        classes = [f"cluster {k}" for k in range(1 if mers else pseudo_labels.clusters)]
    else:
        data, videos, scale = labelled_videos(args, run, kinds, models)
        name = Path(args.data).name.partition(":")[0]
        learned = learned | {name: sorted({*learned.get(name, []), args.split})}
        classes = data.classes
    labelled, counts = as_list(videos), f"{len(videos)} videos, {len(classes)} classes"
    is_held_out = hold_out(videos, getattr(args, "holdout", 0), args.seed)  # D9
    held_out = videos.subset([] if mers else np.flatnonzero(is_held_out))
    videos = videos.subset(np.flatnonzero(~is_held_out))
    if pseudo_labels:
        middle = [pseudo_labels.of(i)[len(pseudo_labels.of(i)) // 2] for i in held_out.labels]
        held_out = replace(held_out, labels=np.array(middle, dtype=np.int64))
    open_video = partial(modality.Streams, modalities=kinds, bound=scale[0], flow_side=scale[1])
    clips = Clips(videos, sample, partial(train_views, args=args, kinds=kinds), args.seed, open=open_video)
    recipe = Recipe(  # D2, D11
        args.frames, args.stride, args.clips, args.crops, 0, args.test_size, stretch=tuple(args.stretch),
        modality=kind, bound=scale[0], flow_side=scale[1], average="logits", mean=MODALITIES[kind].mean,
        std=MODALITIES[kind].std,
    )  # fmt: skip
    identity = {"classes": len(classes), "net": args.net, "flow": str(scale)}
    identity["unlabelled" if stage == "selftrain" else "labelled"] = digest_of_videos(videos)
    if run.finished(identity):
        return
    run.say("\n".join([f"{data.name}: {counts}", *data.notes]))

    # 3. Network and optimiser.
    build = dict(name=args.net, classes=len(classes), in_channels=MODALITIES[kind].channels, width=args.width)
    if init in PUBLISHED:
        run.on_main(fetch, args.net, init)  # one process downloads
    torch.manual_seed(args.seed)
    backbone = backbones.build(**build, weights=None if init == "none" else init)
    if not backbone.new_fc:  # the file's classes are others, even if there are as many
        backbone.fc.reset_parameters()
    if stage == "finetune" and init != "none":
        backbone.freeze(args.frozen)  # D10
    backbone.fc.requires_grad_(not mers)
    if teacher and teacher.fc.in_features != backbone.fc.in_features:
        raise UserError(f"{path} has {teacher.fc.in_features} features, --net {args.net} x {args.width} has "
                        f"{backbone.fc.in_features}: choose one with as many")  # fmt: skip
    net = Network(backbone, args.multi_clips, args.lam < 1, getattr(args, "neighbours", False))
    net = run.distribute(net, args.channels_last, args.compile)
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch, "videos")  # D1
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = optim.build(args.optimizer, learning, lr, args.weight_decay)

    # 4. Steps.
    epoch = ceil(len(videos) / (args.batch * run.world))
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))
    parts = {"net": net.module, "optimizer": optimizer}
    start = run.resume(identity, **parts)
    if stage != "selftrain":
        run.write("labelled.txt", labelled)
    run.say(f"{total} steps, {epoch} an epoch, of {args.batch * run.world} x {args.multi_clips} clips; "
            f"{rule}; {run.device.type}")  # fmt: skip
    loader = train_loader([(clips, args.batch)], start, total, run.rank, run.world, args.workers)
    for step, batches in run.steps(loader, start, total, args.seed, [videos], len(held_out) and every):
        if batches is None:  # between two steps
            evaluate.quick_test({"val": (backbone, recipe)}, held_out, run, args.workers, step)  # D9
            continue
        views = zip((recipe, *models.values()), batches[0]["views"], strict=True)
        x, *x_teacher = (seen.to_input(view.flatten(0, 1), run.device) for seen, view in views)
        y = batches[0]["label"].to(run.device)
        if y.ndim == 1:  # of a video
            y = y[:, None, None].expand(-1, args.multi_clips, 1)
        with run.autocast():
            with torch.no_grad():
                z_teacher = teacher.embed(*x_teacher) if teacher else None
            x = x.unflatten(0, (-1, args.multi_clips))
            loss, terms = train_step(net, x, None if mers else y, args, z_teacher)
        optim.set_lr(optimizer, lr * optim.schedule(step, total, epoch, args.lr_steps, args.warmup))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
        if run.due(step + 1, epoch):
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return

    # 5. model.pt and the test.
    if run.main:
        save_model(run.out / "model.pt", backbone, build, classes, recipe, learned=learned)
    words = {"stage": stage} | ({"teacher": path} if teacher else {})
    if stage == "selftrain":
        run.result({"script": run.script, "data": Path(args.data).name, **words, "source": data.name,
                    "videos": len(videos), "seconds": round(run.seconds)})  # fmt: skip
    else:
        evaluate.report({"net": (backbone, recipe)}, data, run, args.workers, **words, **wanted(args))


def test(args, run):
    """--eval: the test of one model."""
    learned_by(args, args.eval)
    data = agreed(load_data, args.data, args.root, args.split)
    net, recipe = load_for(args.eval, data, run.device, clips=args.clips, crops=args.crops)
    kinds, models = (recipe.modality,), {args.eval: recipe}
    data, _ = modality.with_flow(data, args.data, args.root, args.flow, run, kinds, models)
    evaluate.report({"net": (net, recipe)}, data, run, args.workers, **wanted(args))


# -------------------------------------------------------------------------------- runs


def one_run(stage, args, runs):
    """Run a stage, or a test, in its own folder. True if it has a result and no signal asks to stop."""
    out = args.out if stage in ("finetune", "eval") else f"{args.out}/{stage}"
    starts, unused = start_files(args), UNUSED_WITH_TEACHER if getattr(args, "teacher", None) else ()
    # The configuration holds the digests of these files: with a changed file --out is refused.
    digests = {flag: files.digest(path) for flag, path in starts.items() if os.path.isfile(path)}
    config = vars(args) | dict.fromkeys(unused) | digests
    free = {*free_flags(args), *(() if args.eval else ("flow", "source_flow", "features", "allow_leak"))}
    places = (*PLACES, "source", "source_root", "source_list")
    with Run("motionfit", out, config, free, places) as run:
        for path in starts.values():
            if not os.path.isfile(path):
                raise UserError(f"{path} is not there: an earlier stage makes it ({', '.join(STAGES)})")
        if stage == "generator" and "pseudo" in runs:  # a bad --source is found before stage 1 trains
            source_videos(runs["pseudo"], run, (args.modality,), {})
        train_stage = pseudo if stage == "pseudo" else partial(train, stage)
        test(args, run) if stage == "eval" else train_stage(args, run)
        return run.ended and not run.should_stop()


@record
def main():
    runs = parse_args()
    for stage, args in runs.items():
        if not one_run(stage, args, runs):
            return


if __name__ == "__main__":
    main()

"""JEDI: Joint Expert Distillation in a Semi-Supervised Multi-Dataset Student-Teacher Scenario.

Lucian Bicsi, Bogdan Alexe, Radu Tudor Ionescu, Marius Leordeanu.

Each data set has an expert, a network trained on it alone, which sees the videos of the others in its own
way. All experts look at all videos once, and their embeddings are kept. On these alone are trained, together,
for each data set a student, which is its expert with a small change of the embedding and a new classifier,
and a teacher, which classifies by the embeddings of all students side by side. A student learns its labels,
and what its teacher says of the videos of all data sets: it ends better than the expert, and costs no more.

    1 experts   labelled videos of data set i --> expert i (where none is given)
    2 extract   videos of all data sets --> encoders of all experts, at rest --> e_1 ... e_n, kept on disk
    3 train     e_j --> + adjustment (Eq. 3) --> a_j --> head --> M_j, student j <---------- soft labels --+
                          a_1 ... a_n side by side --> dropout (Eq. 4) --> linear --> E_j, teacher j ------+
                M_i and E_i learn the labels of data set i, M_j learns E_j on all data sets (Eq. 1, 2)

Equations:  Eq. 1 -> combined_loss, in step_loss    Eq. 2 -> distillation_weights    Eq. 3 -> adjust
            Eq. 4, 5 -> teacher_dropout             Sec. 4.4 -> distillation_loss

Names: n experts; B videos of a step, `own[i]` those with a label of data set i; z (B, D) the embeddings of
all experts side by side, D = 7168 in the paper; K_j classes; m, e logits of students and teachers.

Run (extraction on 8 GPUs, training on one; then all of it on the embedded data sets, on a CPU too):

    torchrun --nproc_per_node 8 jedi.py --stage extract --half \\
        --data activitynet:whole,hmdb51,k400,ucf101 \\
        --expert tsn50:AN.pth:8 tsm50:HMDB.pth:16 swin3d_b:kinetics_imagenet22k tsm50:UCF.pth:16 --out RUN
    python jedi.py --half \\
        --data activitynet:whole,hmdb51,k400,ucf101 \\
        --expert tsn50:AN.pth:8 tsm50:HMDB.pth:16 swin3d_b:kinetics_imagenet22k tsm50:UCF.pth:16 --out RUN
    python jedi.py --data toy:a,toy:b,toy:c

The stages are runs of their own in folders of `--out`, the last in `--out` itself; the same command goes on
where it was stopped. `--teacher_input` and `--distill` are the two halves of Table 3, `--alternate` Sec. 3.1.

Differences from the paper, and what it leaves open:

D1  An epoch is one pass over the training videos of all data sets, shuffled together; a step has `--batch` of
    them per GPU, and Eq. 1 is averaged over these. So a large data set has more of each step, as in the sum
    over all samples of which the paper speaks. Its learning rate, 1e-5, is here for 512 videos a step (the
    paper has no number) and scales linearly with the videos of a step over all GPUs (`--lr_batch`).
D2  The teachers' hinge loss is torch's multi-margin loss: the sum over the wrong classes of Weston and
    Watkins (not the maximum of Crammer and Singer), divided by the number of classes. `ovr` is the sum of
    one against the rest. Students learn labels by cross-entropy, as experts do.
D3  A teacher's labels are constants for the student, and given without dropout, neither the teacher's nor the
    adjustment's. Its hinge logits go into the softmax as they are.
D4  The teachers' loss does reach the adjustment (Table 3 calls the dependence bidirectional), and with
    `--teacher_input predictions` the heads.
D5  Students begin as their experts: the head is the expert's, and the second layer of the adjustment is zero.
    Teachers begin at random; d of Eq. 4 is the width of what they see.
D6  An embedding is the mean over the expert's own test views of a video, of training videos as well; nothing
    is normalised. A student's score is that of this mean, from a video as from the disk.
D7  |D_j| counts the training videos of data set j, with or without a label. (The total of Table 1 is 3,783
    above the sum of its rows; the weights here are those of the rows.)
D8  All training videos have their labels; `--ratio`, `--per_class` and `--labelled_list` leave some without.
    `--labelled_list ,,FILE` has a list for the third data set, and all labels of the others. Videos of
    `--extra`, data sets without an expert, never have labels; their w_ij is |D_j| / sum_k |D_k|.
D9  mAP is the mean over the classes of the average precision of their probabilities, the softmax of logits.
    An expert's own score averages its views as its file says.
D10 The hold-out (15 % in Sec. 4.4) is of whole groups where a data set has them (UCF-101: gXX). All stages
    are then tested on it and learn from the rest. A given expert may have learned it, as those of the paper
    have: then scores are too high, and RESULT names its data set (`held_out_known_to`).
D11 `--alternate R` makes R rounds, each in the same number of steps first teachers, then students, from where
    they began ("from scratch"), without a burn-in.
D12 `--finetune` trains the encoders, too: embeddings come from random clips, one for each expert, with random
    crops (short side up to 5/4 of the test's) and batch norms at rest. The adjustment stays. Tests between
    steps are of one view, but the expert's of all.
D13 What one of the experts cannot read is left out of the training, and wrong in the test.
D14 Sec. 5 excludes Kinetics-400 from Table 3, yet its row of adjusted features and all data sets has the six
    numbers of Table 2, which are of four experts. README's command for that table has three.
"""

import argparse
import copy
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import UserError, augment, backbones, datasets, evaluate, features, files, modality, optim, video
from common.flags import LABELS, Parser, free_flags, wanted
from common.run import PLACES, Run, agreed, leave

STAGES = "experts", "extract", "train"
# Defaults per data set (the flags' own defaults are the paper's, Sec. 4.4).
RECIPES = {
    "toy": dict(
        net=["resnet3d10", "r2plus1d_10-pool", "tsm10-small"], width=0.25, frames=8, stride=2, size=40,
        jitter=[44, 56], views=[4, 1], dropout=0.0, expert_epochs=12, expert_batch=16,
        expert_optimizer="adamw", expert_lr=0.005, expert_weight_decay=0.05, epochs=100, batch=128, lr=1e-3,
        lr_batch=128, burn_in=5, hidden=64, eval_every=5, workers=1, channels_last=True,
    ),
}  # fmt: skip
RECIPES["weizmann"] = RECIPES["toy"] | dict(
    net=["r2plus1d_10-pool"], size=64, test_size=64, jitter=[72, 80], expert_epochs=100
)
VIEWS = "clips", "crops"  # flags of --eval that replace what the model's file says
# Flags that a supervised expert does not look at: with another value it is still right.
UNUSED = ("half", "alpha", "beta", "gamma", "distill", "teacher_input", "temperature", "student_loss",
          "teacher_loss", "hidden", "adjust_dropout", "neurons", "alternate", "finetune", "epochs", "burn_in",
          "batch", "lr_batch", "optimizer", "lr", "weight_decay", "clips", "crops",
          "extra_videos")  # fmt: skip
CHUNK = 4096  # videos that are read or tested at once
RGB = modality.MODALITIES["rgb"]
# Classification losses by name (D2): logits (B, K), y (B,) to (B,).
LOSSES = {
    "ce": partial(F.cross_entropy, reduction="none"),
    "hinge": partial(F.multi_margin_loss, reduction="none"),
    "ovr": lambda logits, y: F.relu(1 - (2 * F.one_hot(y, logits.shape[1]) - 1) * logits).sum(1),
}


def parse_args(argv=None):
    p = Parser("jedi", __doc__, RECIPES)
    g = p.data(unlabelled=None, ratio=1.0)
    g.add_argument("--extra", help="data sets without an expert, whose training videos have no labels, D8")
    g.add_argument("--extra_root", help="where they are; data/<name> if not given")
    g.add_argument("--extra_videos", type=int, help="learn from that many of each; 20000 in Sec. 5.2")
    g.add_argument("--holdout", type=float, default=0.0, help="share of videos for validation, Sec. 4.4, D10")
    g.add_argument("--jitter", type=int, nargs=2, default=[256, 320], help="short side, supervised training")
    g = p.add_argument_group("experts (of --expert and --net one, or one for each data set)")
    g.add_argument("--expert", nargs="+", default=["supervised"], metavar="EXPERT",
                   help="supervised: trained here; MODEL.PT; torchvision's NET:kinetics or "
                        "NET:kinetics_imagenet22k; NET:FILE:SEGMENTS or NET:FILE:FRAMESxSTRIDE; or the "
                        "folder experts of another run")  # fmt: skip
    g.add_argument("--net", nargs="+", default=["tsm50"], help="backbones of supervised experts")
    g.add_argument("--width", type=float, default=1.0, help="of these")
    g.add_argument("--dropout", type=float, default=0.5, help="before their classifier")
    g.add_argument("--init", help="their weights at the start: a file, imagenet or kinetics")
    g.add_argument("--frames", type=int, default=8, help="of their clips")
    g.add_argument("--stride", type=int, default=8, help="frames from one to the next")
    g.add_argument("--views", type=int, nargs=2, default=[10, 3], help="clips per video, crops per clip")
    g.add_argument("--expert_epochs", type=float, default=50, help="passes over the labelled videos")
    g.add_argument("--expert_batch", type=int, default=8, help="clips per GPU and step")
    g.add_argument("--expert_optimizer", choices=["sgd", "adamw"], default="sgd", help="sgd has momentum 0.9")
    g.add_argument("--expert_lr", type=float, default=0.001, help="for 8 clips a step, linear; cosine to 0")
    g.add_argument("--expert_weight_decay", type=float, default=5e-4, help="of supervised experts")
    g = p.add_argument_group("method")
    g.add_argument("--stage", choices=["all", *STAGES], default="all", help="do this one alone")
    g.add_argument("--cache", metavar="DIR", help="of the embeddings, to be shared; <out>/cache")
    g.add_argument("--half", action="store_true", help="embeddings in half precision")
    g.add_argument("--alpha", type=float, default=1.0, help="weight of the students' labels, Eq. 1")
    g.add_argument("--beta", type=float, default=1.0, help="weight of the teachers' labels, Eq. 1")
    g.add_argument("--gamma", type=float, default=0.4, help="weight of the distillation, Eq. 1")
    g.add_argument("--distill", default="all",
                   help="what teaches: all, none, own, or the name of a data set; Sec. 5.2")
    g.add_argument("--teacher_input", choices=["adjusted", "base", "predictions", "adjusted+predictions"],
                   default="adjusted", help="what teachers see, Sec. 5.1, D14")  # fmt: skip
    g.add_argument("--temperature", type=float, default=1.0, help="T of the distillation, Sec. 4.4")
    g.add_argument("--student_loss", choices=LOSSES, default="ce", help="L_cls of students, D2")
    g.add_argument("--teacher_loss", choices=LOSSES, default="hinge", help="L_cls of teachers, D2")
    g.add_argument("--hidden", type=int, default=256, help="units of the adjustment, Sec. 4.4")
    g.add_argument("--adjust_dropout", type=float, default=0.75, help="of the adjustment, Sec. 4.4")
    g.add_argument("--neurons", type=float, default=10.0, help="k of Eq. 4")
    g.add_argument("--alternate", type=int, default=0, metavar="R", help="rounds; 0: joint training, D11")
    g.add_argument("--finetune", action="store_true", help="train the encoders, too, from video, D12")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, default=500, help="D1")
    g.add_argument("--burn_in", type=float, default=25, help="epochs before the distillation")
    g.add_argument("--batch", type=int, default=512, help="videos per GPU and step, D1")
    g.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd has momentum 0.9")
    g.add_argument("--lr", type=float, default=1e-5, help="for --lr_batch videos a step, constant, D1")
    g.add_argument("--lr_batch", type=int, default=512, help="videos of a step, of all GPUs, for --lr")
    g.add_argument("--weight_decay", type=float, default=3e-3, help="of all parameters")
    g = p.run()
    g.add_argument("--memory", type=float, help="GB of the device for embeddings; half of what is free")
    p.set_defaults(data="toy:a,toy:b,toy:c", clips=None, crops=None)
    args = p.parse(argv)
    args.recipe = p.recipe
    p.at_least(1, args, "batch", "lr_batch", "expert_batch", "hidden", "frames", "stride", "extra_videos")
    p.at_least(0, args, "alpha", "beta", "gamma", "neurons", "alternate", "epochs", "burn_in", "lr",
               "weight_decay", "expert_epochs", "expert_lr", "expert_weight_decay", "memory")  # fmt: skip
    p.share(args, "holdout", "adjust_dropout")
    if not args.temperature > 0:
        p.error(f"--temperature must be above 0, not {args.temperature}")
    if not 1 <= args.jitter[0] <= args.jitter[1]:
        p.error(f"--jitter is a range such as 256 320, not {args.jitter[0]} {args.jitter[1]}")
    if args.views[0] < 1 or args.views[1] not in (1, 3):
        p.error(f"--views are clips and 1 or 3 crops, not {args.views[0]} {args.views[1]}")
    names, extra = args.data.split(","), (args.extra or "").split(",") * bool(args.extra)
    slugs = [slug(name) for name in names + extra]
    for name, one in zip(names + extra, slugs, strict=True):
        if not name or slugs.count(one) > 1 or one in ("experts", "cache"):
            p.error(f"--data and --extra name each data set once, not as {','.join(names + extra)}")
    known = [os.path.basename(os.path.abspath(name)) for name in names + extra]
    if args.distill not in ("all", "none", "own", *known):
        p.error(f"--distill is all, none, own, or one of {', '.join(known)}, not {args.distill}")
    for flag, of in (("root", names), ("labelled_list", names), ("extra_root", extra)):
        given = getattr(args, flag)
        if given and given.count(",") != len(of) - 1:
            p.error(f"--{flag} has a value for each of {', '.join(of)}, with commas, not {given}")
    n = len(names)
    for flag in ("expert", "net"):
        given = getattr(args, flag)
        if len(given) not in (1, n) and (flag == "expert" or len(given) < n):
            p.error(f"--{flag} has one value, or one for each of {args.data}, not {len(given)}")
        setattr(args, flag, given * n if len(given) == 1 else given[:n])
    if args.finetune and (args.alternate or args.stage == "extract"):
        p.error("--finetune sees videos, not embeddings: without --alternate and --stage extract")
    for net in args.net:
        if net not in backbones.NAMES:
            p.error(f"there is no backbone {net}: choose one of {', '.join(backbones.NAMES)}")
    return args


# -------------------------------------------------------------------------------- the method


def combined_loss(cls_m, cls_e, kd, w, alpha, beta, gamma):
    """Eq. 1: L = alpha L_cls(M_i(x), y) + beta L_cls(E_i(x), y) + gamma sum_j w_ij L_kd(M_j(x), E_j(x)).

    cls_m, cls_e (B,): the losses of the student and the teacher of each video's own data set i, 0 where it
    has no label; kd (B, n); w (B, n): for each video the row i of Eq. 2. Returns the mean over the B videos
    (D1).
    """
    return (alpha * cls_m + beta * cls_e + gamma * (w * kd).sum(1)).mean()


def distillation_weights(sizes, extra=0):
    """Eq. 2: w_ij = 1 if i = j, else |D_j| / sum_k |D_k|.

    sizes (n,): training videos of each data set (D7). Returns (n + extra, n) float32; the last rows are for
    videos of data sets without an expert (D8).
    """
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    w = share.repeat(len(sizes) + extra, 1)
    return w.fill_diagonal_(1).float()


def adjust(e, adapter):
    """Eq. 3: e <- (M + I) e, of low rank, M e = U SiLU(V e) with the biases of both layers (Fig. 2).

    e (B, D_j). Returns it twice: with dropout on the adjustment, for what learns, and without it and without
    gradient, for what only labels (D3).
    """
    change = adapter.change(e)
    return e + adapter.drop(change), (e + change).detach()


def teacher_dropout(K, d, k):
    """Eq. 4: p = max(0, 1 - k K / d); Eq. 5: so d (1 - p) = k K of the d inputs are active, in the mean."""
    return max(0.0, 1 - k * K / d)


def distillation_loss(m, e, temperature):
    """L_kd (Sec. 4.4): the cross-entropy of softmax(m / T) against softmax(e / T), m, e (B, K) to (B,).

    No gradient flows into e, the teacher's logits (D3).
    """
    return F.cross_entropy(m / temperature, (e.detach() / temperature).softmax(1), reduction="none")


def step_loss(m, e, labels, own, y, w, weights, args):
    """The loss of one step, and its terms by name.

    m, e, labels: what Joint returns, of B videos; own: for data set i a slice of these, its videos with a
    label; y (B,) int64, -1 without a label; w (B, n) rows of Eq. 2; weights: alpha, beta, gamma.
    """
    cls_m, cls_e, kd = w.new_zeros(len(y)), w.new_zeros(len(y)), torch.zeros_like(w)
    for i, mine in enumerate(own):
        cls_m[mine] = LOSSES[args.student_loss](m[i][mine].float(), y[mine])
        cls_e[mine] = LOSSES[args.teacher_loss](e[i].float(), y[mine])
    if labels is not None:
        pairs = zip(m, labels, strict=True)
        kd = torch.stack([distillation_loss(a.float(), b.float(), args.temperature) for a, b in pairs], 1)
    terms = {"loss_m": cls_m.mean(), "loss_e": cls_e.mean(), "loss_kd": (w * kd).sum(1).mean()}
    return combined_loss(cls_m, cls_e, kd, w, *weights), terms  # Eq. 1


# -------------------------------------------------------------------------------- networks


class Joint(nn.Module):
    """All students, without their encoders, and all teachers.

    experts: list of Expert, the students begin as these (D5); inputs: what teachers see, --teacher_input.
    """

    def __init__(self, experts, hidden, dropout, inputs, neurons):
        super().__init__()
        self.widths = [expert.net.fc.in_features for expert in experts]
        self.classes = [expert.net.fc.out_features for expert in experts]
        self.inputs = inputs
        self.adapters = nn.ModuleList(backbones.Adapter(D, hidden, dropout) for D in self.widths)
        self.heads = nn.ModuleList(nn.Linear(D, K) for D, K in zip(self.widths, self.classes, strict=True))
        d = sum(self.widths) * (inputs != "predictions") + sum(self.classes) * ("predictions" in inputs)
        self.teachers = nn.Linear(d, sum(self.classes))  # E_1 to E_n, one below the other
        self.p = [teacher_dropout(K, d, neurons) for K in self.classes]  # Eq. 4
        for j, expert in enumerate(experts):
            self.heads[j].load_state_dict(expert.net.fc.state_dict())
            if not isinstance(expert.net.adapter, nn.Identity):  # it is a student of another run
                self.adapters[j].load_state_dict(expert.net.adapter.state_dict())
        self.begin = {name: value.clone() for name, value in self.state_dict().items()}

    def restart(self, prefixes):
        """Give the parameters whose names start so the values they began with (D11)."""
        mine = {name: value for name, value in self.begin.items() if name.startswith(prefixes)}
        self.load_state_dict(mine, strict=False)

    def teacher_input(self, zs, a, m):
        """(B, d) of lists of base and adjusted embeddings and of predictions; gradients pass (D4)."""
        parts = {"base": zs, "adjusted": a, "predictions": m}
        return torch.cat([x for name in self.inputs.split("+") for x in parts[name]], 1)

    def forward(self, z, own, distill=True):
        """Logits from embeddings z (B, D), side by side.

        own: for data set i a slice of the B videos, those with a label. Returns lists over the n data sets:
        of the students (B, K_j), of the teachers for the videos of their own data set (own[j], K_j), and,
        with `distill`, the teachers' labels for all (B, K_j), which have no gradient.
        """
        zs = z.split(self.widths, 1)
        a, clean = zip(*map(adjust, zs, self.adapters), strict=True)  # Eq. 3
        m = self.students(a)
        x = self.teacher_input(zs, a, m)
        weights, biases = (part.split(self.classes) for part in (self.teachers.weight, self.teachers.bias))
        active = [F.dropout(x[mine], p, self.training) for mine, p in zip(own, self.p, strict=True)]
        e = [F.linear(*each) for each in zip(active, weights, biases, strict=True)]
        return m, e, self.labels(zs, clean) if distill else None

    @torch.no_grad()
    def labels(self, zs, a):
        """The teachers' logits, a list of (B, K_j), from base and adjusted embeddings, lists of (B, D_j).

        One product for all: without dropout they see the same (D3).
        """
        return self.teachers(self.teacher_input(zs, a, self.students(a))).split(self.classes, 1)

    def students(self, a):
        """The students' logits, a list of (B, K_j), from adjusted embeddings."""
        return [head(x) for head, x in zip(self.heads, a, strict=True)]

    @torch.no_grad()
    def logits(self, z):
        """(students', teachers') logits, lists of (B, K_j), of embeddings z (B, D), without any dropout."""
        zs = z.split(self.widths, 1)
        a = [adjust(x, adapter)[1] for x, adapter in zip(zs, self.adapters, strict=True)]
        return self.students(a), self.labels(zs, a)


class EndToEnd(nn.Module):
    """Joint on the embeddings of encoders that learn with it (D12)."""

    def __init__(self, encoders, joint, autocast):
        super().__init__()
        self.encoders, self.joint, self.autocast = nn.ModuleList(encoders), joint, autocast
        for encoder in encoders:
            encoder.fc.requires_grad_(False)  # the student's is in `joint`
            encoder.adapter.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.encoders.eval()  # their batch norms are of one data set each, and a step has them all
        return self

    def forward(self, x, own, distill=True):
        """x: for each encoder clips (B, C, T, H, W); otherwise as Joint."""
        with self.autocast():
            z = [encoder.embed(clips) for encoder, clips in zip(self.encoders, x, strict=True)]
        return self.joint(torch.cat(z, 1), own, distill)


# -------------------------------------------------------------------------------- data sets and experts


@dataclass(frozen=True, eq=False)
class Source:
    """A data set. labelled, held (N,) bool: which training videos have a label, and which are not learned.

    Those are held out for the test (D10) or, of --extra, not drawn. name, root: as --data and --root have
    them; number: of its expert, None without one (D8).
    """

    name: str
    root: str | None
    data: datasets.Data
    number: int | None
    labelled: np.ndarray
    held: np.ndarray

    @property
    def slug(self):
        return slug(self.data.name)

    @property
    def tested(self):
        """("train" or "test", indices): the videos of the tests."""
        if self.held.any():
            return "train", np.flatnonzero(self.held)
        return "test", np.arange(len(self.data.test))

    def videos(self, part):
        return self.data.train if part == "train" else self.data.test

    @property
    def supervised(self):
        """Indices of the training videos to learn from with their labels."""
        return np.flatnonzero(self.labelled & ~self.held)

    @property
    def learned(self):
        """Indices of the training videos to learn from, those with a label first."""
        return np.concatenate([self.supervised, np.flatnonzero(~self.labelled & ~self.held)])


def slug(name):
    """The name of a data set as that of a folder."""
    return os.path.basename(os.path.abspath(name)).replace(":", "-")


def labels_of(args, k):
    """(ratio, per_class, labelled_list) of the k-th data set: all labels if only others have a list (D8)."""
    listfile = one_of(args.labelled_list, k)
    return 1.0 if args.labelled_list and not listfile else args.ratio, args.per_class, listfile


def load_sources(args, run):
    """The Sources of --data, and of --extra behind them."""
    found = []
    run.say(f"recipe: {args.recipe or 'none, the defaults of the flags'}")
    for kind, names, roots in (("data", args.data, args.root), ("extra", args.extra, args.extra_root)):
        for k, name in enumerate(names.split(",") if names else []):
            root = one_of(roots, k)
            data = agreed(datasets.load, name, root, args.split)
            if data.multilabel and kind == "data":
                raise UserError(f"{data.name} has several labels per video, which JEDI does not know")
            labelled, held = (np.zeros(len(data.train), bool) for _ in range(2))
            if kind == "data":
                ratio, per_class, listfile = labels_of(args, k)
                labelled[agreed(datasets.labelled, data, ratio, per_class, args.seed, listfile)] = True
                held = datasets.held_out(data.train, args.holdout, args.seed)
                if not (labelled & ~held).any():
                    raise UserError(f"{data.name} has no video with a label beside the held-out ones")
            elif args.extra_videos:  # the whole list is embedded, for every number of videos
                held[np.random.default_rng(args.seed).permutation(len(held))[args.extra_videos :]] = True
            found.append(Source(name, root, data, k if kind == "data" else None, labelled, held))
    for source in found:
        data, kind = source.data, "no expert"
        if source.number is not None:
            kind = f"{len(data.classes)} classes, {len(data.test)} test videos"
        run.say(f"{data.name}: {kind}, {len(data.train)} training videos, {source.labelled.sum()} of them "
                f"labelled, {source.held.sum()} left out")  # fmt: skip
        for note in data.notes:
            run.say(note)
    return found


def one_of(values, k):
    """The k-th of some values with commas; None if there are none, or it is empty."""
    return (values or "").split(",")[k] or None if values else None


@dataclass(frozen=True, eq=False)
class Expert:
    """net: in eval mode; made: what builds it; recipe: how it sees a video; digest: of its weights.

    knows_held_out: whether it has learned, or may have, from videos that are held out (D10).
    """

    slug: str
    path: str
    net: nn.Module
    made: dict
    recipe: evaluate.Recipe
    digest: str
    knows_held_out: bool = False


def weights_of(args, k):
    """The file that --expert names for the k-th data set, or a word of torchvision's."""
    spec = args.expert[k] if args.expert[k] != "supervised" else f"{args.out}/experts"
    name, _, rest = spec.partition(":")
    if name in backbones.NAMES:
        return rest.partition(":")[0]
    if args.expert[k] == "supervised" or os.path.isdir(spec):
        return f"{spec}/{slug(args.data.split(',')[k])}/model.pt"
    return spec


def load_expert(args, run, source):
    """The Expert that --expert names for a data set."""
    spec, data, path = args.expert[source.number], source.data, weights_of(args, source.number)
    name, _, clip = spec.partition(":")
    own_list = None  # of the videos that a supervised expert has learned from
    if name in backbones.NAMES:
        weights, clip = path, clip.partition(":")[2]
        made = dict(name=name, classes=len(data.classes))
        recipe = published_recipe(name, weights, clip)
        if weights in backbones.PUBLISHED:
            run.on_main(backbones.fetch, name, weights)  # one process downloads
        net = backbones.build(**made, weights=weights, names=data.classes).eval()
        if net.new_fc:
            raise UserError(f"--expert {spec} does not know the classes of {data.name}")
    else:
        if not os.path.exists(path):
            raise UserError(f"there is no {path}: --stage experts trains it")
        net, made, recipe = evaluate.load_known(path, data)
        if recipe.multilabel:
            raise UserError(f"{path} has learned several labels per video, {data.name} has one")
        beside = Path(path).with_name("labelled.txt")
        own_list = beside.read_text("utf-8", "surrogateescape") if beside.exists() else None
        if own_list not in (None, datasets.as_list(data.train.subset(source.supervised))):
            sentence = f"{path} has learned from other videos than those with a label here"
            if spec == "supervised":
                raise UserError(f"{sentence}: choose another --out")
            run.say(f"{sentence}: {beside}")
    if made.get("adapter", args.hidden) != args.hidden:
        raise UserError(f"{path} has an adjustment of {made['adapter']} units, not of --hidden {args.hidden}")
    others = datasets.as_list(data.train.subset(np.flatnonzero(~source.held))).splitlines()
    knows = source.held.any() and (own_list is None or not set(own_list.splitlines()) <= set(others))
    if knows:
        run.say(f"--holdout: the expert of {data.name} may have learned the held-out videos (D10)")
    return Expert(source.slug, path, net, made, recipe, evaluate.digest_of(net), bool(knows))


def published_recipe(name, weights, clip):
    """How a network that is no model.pt sees a video: as torchvision says, or by FRAMES or FRAMESxSTRIDE."""
    if weights in backbones.PUBLISHED and not clip:
        return evaluate.Recipe(**backbones.published_input(name, weights))
    found = re.fullmatch("([1-9][0-9]*)(?:x([1-9][0-9]*))?", clip)
    if not found:
        raise UserError(f"--expert {name}:{weights} must say what it sees: :8 is 8 segments of a video, :8x4 "
                        f"clips of 8 frames with a stride of 4, not {clip!r}")  # fmt: skip
    frames, stride = found.groups()
    views = dict(clips=10) if stride else dict(clips=0, uniform=1)
    return evaluate.Recipe(int(frames), int(stride or 1), **views, mean=RGB.mean, std=RGB.std)


def supervised(args, run):
    """Stage 1: the expert of the one data set of --data, by cross-entropy on its labelled videos."""
    (source,) = load_sources(args, run)
    name, data, videos = args.net[source.number], source.data, source.data.train.subset(source.supervised)
    part, tested = source.tested
    data = replace(data, test=source.videos(part).subset(tested))
    flip, side = data.flip if args.flip is None else args.flip, args.test_size
    recipe = evaluate.Recipe(args.frames, args.stride, *args.views, side, side, mean=RGB.mean, std=RGB.std)
    view = partial(random_crops, sizes=[args.size], jitters=[args.jitter], flip=flip)
    clips = video.Clips(videos, partial(random_windows, recipes=[recipe]), view, args.seed)
    epoch = math.ceil(len(videos) / (args.expert_batch * run.world))
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.expert_epochs, args.eval_every))

    torch.manual_seed(args.seed)
    made = dict(name=name, classes=len(data.classes), width=args.width, dropout=args.dropout)
    if args.init in backbones.PUBLISHED:
        run.on_main(backbones.fetch, name, args.init)  # one process downloads
    net = run.distribute(backbones.build(**made, weights=args.init), args.channels_last, args.compile)
    lr, rule = optim.scaled_lr(args.expert_lr, args.expert_batch * run.world, 8)
    optimizer = optim.build(args.expert_optimizer, net.parameters(), lr, args.expert_weight_decay)
    identity = dict(labelled=datasets.digest(videos), classes=len(data.classes), net=name)
    start = run.resume(identity, net=net.module, optimizer=optimizer)
    run.write("labelled.txt", datasets.as_list(videos))
    run.say(f"{total} steps, {epoch} an epoch, of {args.expert_batch * run.world} clips; {rule}; "
            f"{run.device.type}")  # fmt: skip
    loader = video.train_loader([(clips, args.expert_batch)], start, total, run.rank, run.world, args.workers)
    for step, (batch,) in run.steps(loader, start, total, args.seed, [videos], every or total or 1):
        with run.autocast():
            logits = net(recipe.to_input(batch["views"][0], run.device))
            loss = F.cross_entropy(logits, batch["label"].to(run.device))
        optim.set_lr(optimizer, lr * optim.warmup_cosine(step, total))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss)
    if not run.stopped:
        if run.main:
            evaluate.save_model(run.out / "model.pt", net.module, made, data.classes, recipe)
        evaluate.report(net.module, data, recipe, run, args.workers, backbone=name, **wanted(args))


def random_windows(source, rng, recipes):
    """Frame indices of a random clip for each recipe."""
    n = len(source)
    return [video.dense(n, r.frames, r.stride, rng) if r.clips else video.uniform(n, r.frames, rng)
            for r in recipes]  # fmt: skip


def random_crops(clips, sizes, jitters, flip):
    """A random crop of each clip, `sizes` pixels wide, of short sides within `jitters`; one flip for all."""
    crops = [augment.jitter_crop(clip, *how) for clip, *how in zip(clips, sizes, jitters, strict=True)]
    mirror = flip and bool(torch.rand(()) < 0.5)
    return tuple(crop.flip(-1) if mirror else crop for crop in crops)


# -------------------------------------------------------------------------------- embeddings on disk


def cached(args, run, source, part, expert, compute=False):
    """The Features of a part of a data set for an expert, rows (D_j + K_j) of embedding and probabilities.

    They are computed where they are not there (None after a signal), or without `compute` refused, as are
    those of other weights, views or videos.
    """
    folder = folder_of(args, source, part, expert)
    identity = {"expert": expert.digest} | {f"network.{key}": value for key, value in expert.made.items()}
    recipe, about = expert.recipe, dict(identity=identity, average=True, half=args.half)
    if not compute:
        if not (folder / features.INDEX).exists():
            raise UserError(f"{folder} has no complete embeddings: --stage extract makes them")
        return features.load(folder, features.describe(source.videos(part), recipe, **about))
    models = {expert.path: recipe}
    data, _ = modality.with_flow(source.data, source.name, source.root, None, run, [recipe.modality], models)
    net, videos = run.place(expert.net, args.channels_last), data.train if part == "train" else data.test
    return features.extract(folder, net, partial(look, net), videos, recipe, run, args.workers, **about)


def folder_of(args, source, part, expert):
    """The folder of the Features of a part of a data set for an expert."""
    return Path(args.cache or f"{args.out}/cache", expert.slug, f"{source.slug}_{part}")


def look(net, x):
    """(B, D + K) float32: embeddings and class probabilities of clips (Sec. 4.3), to be averaged (D6)."""
    z = net.embed(x)
    return torch.cat([z, net.head(z).float().softmax(1)], 1)


def parts_of(source):
    """The lists of a data set whose videos are used."""
    return ["train", "test"] if source.number is not None and not source.held.any() else ["train"]


def extract(args, run):
    """Stage 2 (Sec. 4.3): what every expert sees in every video; False if a signal has stopped it."""
    sources = load_sources(args, run)
    for expert in [load_expert(args, run, source) for source in sources if source.number is not None]:
        run.say(f"expert {expert.slug}: {expert.path}, {expert.net.name}, {expert.net.fc.in_features} wide")
        for source in sources:
            for part in parts_of(source):
                found = cached(args, run, source, part, expert, compute=True)
                if found is None:
                    return False
                run.say(f"  {source.slug} {part}: {len(found.rows)} of {len(found.counts)} videos")
                if part == "train" and len(found.bad) > args.max_bad * len(found.counts):
                    reason = next(iter(found.bad.values()))
                    raise UserError(f"{len(found.bad)} of {len(found.counts)} videos of {source.slug} cannot "
                                    f"be read, more than --max_bad {args.max_bad}: {reason}; when they are "
                                    f"mended, delete {folder_of(args, source, part, expert)}")  # fmt: skip
        expert.net.cpu()
    return True


# -------------------------------------------------------------------------------- what is learned and tested


@dataclass(frozen=True, eq=False)
class Learned:
    """The training videos of all data sets, one after the other, of each those with a label first.

    videos: their list, and behind it those that cannot be read, `bad`: index -> reason; y (N,) int64, -1
    without a label; source (N,) int64: which data set; spans: for each data set with an expert where its
    videos with a label begin and end.
    """

    videos: datasets.Videos
    y: torch.Tensor
    source: torch.Tensor
    spans: list
    bad: dict

    @classmethod
    def of(cls, sources, unreadable):
        """unreadable: for each Source {index: reason} of training videos."""
        good, bad, spans = [], [], []
        for number, (source, without) in enumerate(zip(sources, unreadable, strict=True)):
            mine = [i for i in source.learned.tolist() if i not in without]
            if source.number is not None:
                spans.append((len(good), len(good) + int(source.labelled[mine].sum())))
            good += [(number, i) for i in mine]
            bad += [(number, i) for i in source.learned.tolist() if i in without]
        labels = [sources[k].data.train.labels[i] if sources[k].labelled[i] else -1 for k, i in good]
        paths, times = [], []
        for k, i in good + bad:
            train = sources[k].data.train
            paths.append(train.path(i))
            times.append(train.span(i) or (0, math.inf))
        videos = datasets.Videos.make("", paths, labels + [-1] * len(bad), spans=times)
        reasons = {len(good) + n: unreadable[k][i] for n, (k, i) in enumerate(bad)}
        return cls(videos, torch.tensor(labels), torch.tensor([k for k, _ in good]), spans, reasons)

    def own(self, places):
        """For each data set the slice of sorted `places` that are its videos with a label."""
        return [slice(*np.searchsorted(places, span)) for span in self.spans]


@dataclass(frozen=True, eq=False)
class Tested:
    """The test videos of a data set. good: indices of those that all experts can read; bad: index -> reason.

    expert: the figures of the data set's own expert, which never change.
    """

    source: Source
    good: np.ndarray
    bad: dict
    expert: dict | None = None

    @cached_property
    def videos(self):
        part, asked = self.source.tested
        return self.source.videos(part).subset(asked)

    def scores(self, p):
        """The Scores of probabilities (len(good), K)."""
        probs = np.zeros((len(self.videos), len(self.source.data.classes)), np.float32)
        probs[self.good] = p
        views, labels = np.ones(len(probs), np.int64), self.videos.labels
        right = np.isin(np.arange(len(probs)), self.good) & (probs.argmax(1) == labels)
        return evaluate.Scores(probs, right.astype(np.int64), views, labels, self.bad)


def readable(found, asked):
    """(places in `asked` of the videos that all Features `found` have, {place: reason} of the others)."""
    bad = {i: reason for one in found for i, reason in one.bad.items()}
    bad = {k: bad[i] for k, i in enumerate(asked.tolist()) if i in bad}
    return np.setdiff1d(np.arange(len(asked)), list(bad)), bad


class FromDisk:
    """What is learned from and tested on: the embeddings that stage 2 has left."""

    def __init__(self, args, run, sources, experts):
        self.args, self.run = args, run
        learn, test, unreadable, self.tested = [], [], [], []
        self.widths = [expert.net.fc.in_features for expert in experts]
        for source in sources:
            found = [cached(args, run, source, "train", expert) for expert in experts]
            good, bad = readable(found, source.learned)
            learn.append([(one.rows, one.first[source.learned[good]]) for one in found])
            unreadable.append({int(source.learned[k]): reason for k, reason in bad.items()})
            if source.number is not None:
                part, asked = source.tested
                if part == "test":
                    found = [cached(args, run, source, part, expert) for expert in experts]
                good, bad = readable(found, asked)
                test.append([(one.rows, one.first[asked[good]]) for one in found])
                mine = Tested(source, good, bad)
                seen = test[-1][source.number]
                self.tested.append(replace(mine, expert=figures(self.of_expert(mine, experts, *seen))))
        self.learned = Learned.of(sources, unreadable)
        if not len(self.learned.y):
            raise UserError("there is no training video that all experts can read")
        self.X, self.Z = (features.Table(parts, self.widths, run.device) for parts in (learn, test))
        need, free = self.X.bytes + self.Z.bytes, features.free_bytes(run.device)
        hold = need <= (free / 2 if args.memory is None else args.memory * 1e9)
        run.say(f"embeddings of {len(self.X)} training and {len(self.Z)} test videos, {sum(self.widths)} "
                f"wide: {need / 1e9:.2f} GB, of {free / 1e9:.1f} GB free on {run.device.type}; "
                + ("held there" if hold else "read from the disk as they are needed"))  # fmt: skip
        if hold:
            for table in (self.X, self.Z):
                table.hold()

    def of_expert(self, mine, experts, rows, at):
        """The Scores of a data set's own expert, from rows `at` of what it has seen (D9)."""
        expert = experts[mine.source.number]
        seen = torch.from_numpy(rows[at]).float()
        z, p = seen.split([self.widths[mine.source.number], len(mine.source.data.classes)], 1)
        if expert.recipe.average != "softmax":
            with torch.no_grad():
                p = expert.net.head(z).softmax(1)
        return mine.scores(p.numpy())

    def model(self, joint):
        return joint

    def loader(self, start, total):
        """One batch a step, a list of one dict; what cannot be read (D13) is told with the first."""
        B, run, bad = self.args.batch, self.run, list(self.learned.bad.items())
        passes = video.Order(len(self.learned.y), self.args.seed)
        firsts = (B * (step * run.world + run.rank) for step in range(start, total))
        for at, z in self.X.batches(np.sort(passes.take(first, B)) for first in firsts):
            yield [dict(places=at, z=z, bad=bad)]
            bad = []

    def inputs(self, batch):
        """(sorted places (B,) of the videos of a batch, what the model takes)."""
        return batch["places"], batch["z"]

    def tests(self, all_views):
        """[(Tested, what gives the embeddings (N, D) of its videos that can be read)]."""
        return [(mine, partial(self.Z.part, i)) for i, mine in enumerate(self.tested)]


class FromVideo:
    """The same with encoders that learn: clips in place of embeddings (D12)."""

    def __init__(self, args, run, sources, experts):
        self.args, self.run, self.experts, self.tested = args, run, experts, []
        self.recipes = [expert.recipe for expert in experts]
        if any(recipe.modality != "rgb" for recipe in self.recipes):
            raise UserError("--finetune is for experts that see RGB")
        self.learned = Learned.of(sources, [{}] * len(sources))
        self.encoders = [copy.deepcopy(expert.net) for expert in experts]
        self.flip = all(source.data.flip for source in sources) if args.flip is None else args.flip
        for source in sources[: len(experts)]:
            expert, good = experts[source.number], np.arange(len(source.tested[1]))
            mine = Tested(source, good, {})
            scores = evaluate.score(run.place(expert.net), mine.videos, expert.recipe, run, args.workers)
            expert.net.cpu()
            if scores is not None:  # else a signal has come, and `tests` says so
                self.tested.append(replace(mine, expert=figures(scores)))

    def model(self, joint):
        return EndToEnd(self.encoders, joint, self.run.autocast)

    def loader(self, start, total):
        args, run = self.args, self.run
        view = partial(random_crops, sizes=[r.size for r in self.recipes], flip=self.flip,
                       jitters=[(r.short_side, r.short_side * 5 // 4) for r in self.recipes])  # fmt: skip
        windows = partial(random_windows, recipes=self.recipes)
        clips = video.Clips(self.learned.videos, windows, view, args.seed)
        return video.train_loader([(clips, args.batch)], start, total, run.rank, run.world, args.workers)

    def inputs(self, batch):
        places, first = torch.as_tensor(batch["index"]).sort(stable=True)
        views = zip(self.recipes, batch["views"], strict=True)
        return places.numpy(), [recipe.to_input(x[first], self.run.device) for recipe, x in views]

    def tests(self, all_views):
        """As of FromDisk, by the encoders as they are, of all views or of one; None after a signal."""
        if len(self.tested) < len(self.experts):
            return None
        found = []
        for mine in self.tested:
            seen = []
            for encoder, r in zip(self.encoders, self.recipes, strict=True):
                r = r if all_views else replace(r, clips=min(r.clips, 1), uniform=int(not r.clips), crops=1)
                seen.append(evaluate.embed(encoder, mine.videos, r, self.run, self.args.workers))
                if seen[-1] is None:
                    return None
            bad = {i: reason for _, its in seen for i, reason in its.items()}
            good = np.setdiff1d(mine.good, list(bad))
            z = torch.from_numpy(np.concatenate([z[good] for z, _ in seen], 1))
            found.append((replace(mine, good=good, bad=bad), partial(z.to, self.run.device)))
        return found


# -------------------------------------------------------------------------------- training


def half_round(step, total, rounds):
    """Number of the half round, of teachers (even) or of students, that a step belongs to (D11)."""
    return 2 * rounds * step // total


def weights_at(step, total, epoch, args):
    """(alpha, beta, gamma) of Eq. 1 in a step: gamma is 0 in the burn-in; by turns with --alternate (D11)."""
    if args.alternate:
        teachers = half_round(step, total, args.alternate) % 2 == 0
        return (0, args.beta, 0) if teachers else (args.alpha, 0, args.gamma)
    return args.alpha, args.beta, args.gamma * (step >= round(args.burn_in * epoch))


def teaching(w, distill, sources):
    """w (data sets, n), the rows of Eq. 2, where the videos of a data set teach, else 0 (Sec. 5.2)."""
    if distill == "own":
        return w * torch.eye(*w.shape)
    return w * torch.tensor([[distill in ("all", source.data.name)] for source in sources])


def train(args, run):
    """Stage 3: students and teachers, and their test."""
    sources = load_sources(args, run)
    mine = [source for source in sources if source.number is not None]
    experts = [load_expert(args, run, source) for source in mine]
    feed = (FromVideo if args.finetune else FromDisk)(args, run, sources, experts)
    torch.manual_seed(args.seed)
    joint = Joint(experts, args.hidden, args.adjust_dropout, args.teacher_input, args.neurons)
    model = feed.model(joint)
    teachers = [*joint.teachers.parameters()]
    students = [p for name, p in model.named_parameters() if p.requires_grad and "teachers." not in name]
    w = distillation_weights([len(source.learned) for source in mine], len(sources) - len(mine))  # Eq. 2
    w = teaching(w, args.distill, sources).to(run.device)
    y, origin = feed.learned.y.to(run.device), feed.learned.source.to(run.device)
    epoch = math.ceil(len(y) / (args.batch * run.world))  # D1
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))
    if total < 2 * args.alternate:
        raise UserError(f"--alternate {args.alternate} needs {2 * args.alternate} steps, not {total}")

    net = run.distribute(model, args.channels_last, args.compile)
    groups = [dict(params=students), dict(params=teachers)]
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch, "videos")  # D1
    optimizer = optim.build(args.optimizer, groups, lr, args.weight_decay, fused=True)
    parts = dict(model=model, optimizer=optimizer)
    if args.alternate:  # the students of whom the teachers of this round have learned
        parts["elder"] = run.place(copy.deepcopy(joint)).eval()
    elder = parts.get("elder")

    def taught():
        """The network with the students of whom the teachers have learned, or learn."""
        return elder if elder and optimizer.param_groups[0].get("half", 0) % 2 else joint

    start = run.resume(identity_of(sources, experts), **parts)
    run.on_main(write_lists, run.out, mine)
    run.say(f"{total} steps, {epoch} an epoch, of {args.batch * run.world} videos; {rule}; {run.device.type}")

    def test(step):
        quick_test(run, joint, taught(), feed, step)

    loader, lists = feed.loader(start, total), [feed.learned.videos]
    saves = every or total or 1
    for step, (batch,) in run.steps(loader, start, total, args.seed, lists, saves, test, every, 0):
        weights = weights_at(step, total, epoch, args)
        if elder and half_round(step, total, args.alternate) != optimizer.param_groups[0].get("half"):
            begin_half(joint, elder, optimizer, half_round(step, total, args.alternate))
        places, x = feed.inputs(batch)
        own, at = feed.learned.own(places), torch.from_numpy(places).to(run.device)
        distil = weights[2] > 0 and args.distill != "none"
        m, e, labels = net(x, own, distil and not elder)
        if distil and elder:
            labels = elder.logits(x)[1]
        loss, terms = step_loss(m, e, labels, own, y[at], w[origin[at]], weights, args)
        optim.set_lr(optimizer, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, lr, loss=loss, **terms)
    if not run.stopped:
        if every:
            test(total)
        finish(args, run, joint, taught(), feed, experts)


def identity_of(sources, experts):
    """What a resumption must share: experts' weights, which videos are learned, how many with a label."""
    identity = {f"expert of {expert.slug}": [expert.net.name, expert.digest] for expert in experts}
    for source in sources:
        digest = datasets.digest(source.data.train, source.learned)
        identity[f"list of {source.slug}"] = [digest, len(source.supervised)]
    return identity


def write_lists(out, sources):
    """A folder for each data set, with the list of its videos with a label."""
    for source in sources:
        files.make_folder(out / source.slug)
        labelled = source.data.train.subset(source.supervised)
        files.write(out / source.slug / "labelled.txt", datasets.as_list(labelled))


def begin_half(joint, elder, optimizer, half):
    """The teachers, in an even half round, or the students begin once more, and the others rest (D11)."""
    teachers = half % 2 == 0
    if not teachers:
        elder.load_state_dict(joint.state_dict())
    joint.restart("teachers." if teachers else ("adapters.", "heads."))
    for group, learns in zip(optimizer.param_groups, (not teachers, teachers), strict=True):
        group["half"], group["lr_factor"] = half, float(learns)
        for p in group["params"]:
            optimizer.state.pop(p, None)


@torch.no_grad()
def measure(joint, taught, tests):
    """[{"student": Scores, "teacher": Scores}], for each of the `tests` of a feed.

    taught: the network with the students of whom the teachers have learned, `joint` or an elder (D11).
    """
    joint.eval()
    found = []
    for mine, embeddings in tests:
        i, p = mine.source.number, {"student": [], "teacher": []}
        for z in embeddings().split(CHUNK):
            m, e = joint.logits(z)
            e = e if taught is joint else taught.logits(z)[1]
            p["student"].append(m[i].softmax(1))
            p["teacher"].append(e[i].softmax(1))
        found.append({who: mine.scores(torch.cat(parts).cpu().numpy()) for who, parts in p.items()})
    joint.train()
    return found


def figures(scores):
    """{"top1", "top5", "mAP": per cent} (D9)."""
    found = evaluate.metrics(scores)
    positive = np.eye(scores.probs.shape[1], dtype=np.uint8)[scores.labels]
    return {"top1": found["top1"], "top5": found["top5"],
            "mAP": 100 * evaluate.mean_average_precision(scores.probs, positive)}  # fmt: skip


def quick_test(run, joint, taught, feed, step):
    """Experts, students and teachers of all data sets into the log (Fig. 3); experts stay as they are."""
    found = feed.tests(all_views=False)
    if found and run.main:
        row = {f"{mine.source.data.name}_{who}_{key}": round(value, 4)
               for (mine, _), scores in zip(found, measure(joint, taught, found), strict=True)
               for who, its in in_table(mine, scores).items() for key, value in its.items()}  # fmt: skip
        run.log({"step": step, "eval": "quick", **row})


def in_table(mine, scores):
    """{"expert", "student", "teacher": figures}, a data set's part of Table 2."""
    return {"expert": mine.expert} | {who: figures(its) for who, its in scores.items()}


def finish(args, run, joint, taught, feed, experts):
    """The last test, Table 2, and of each student its model.pt and what it says of every test video."""
    found = feed.tests(all_views=True)
    if found is None:
        run.say("stopped by a signal during the test; the same command tests again")
        return
    row = run.on_main(write_results, args, run, joint, taught, feed, experts, found)
    run.result({"script": run.script, **row, "seconds": round(run.seconds)})


def write_results(args, run, joint, taught, feed, experts, tests):
    """The files of `finish`; what the RESULT line says, means over the data sets."""
    parts, scores = [], measure(joint, taught, tests)
    for (mine, _), its, expert in zip(tests, scores, experts, strict=True):
        i, data, folder = mine.source.number, mine.source.data, run.out / mine.source.slug
        evaluate.write_files(folder, its["student"], mine.videos, data.classes)
        encoder = feed.encoders[i] if args.finetune else expert.net
        made, net = student(expert, encoder, joint, i, args.hidden)
        recipe = replace(expert.recipe, average="embeddings")
        evaluate.save_model(folder / "model.pt", net, made, data.classes, recipe)
        parts.append(in_table(mine, its))
    names = [mine.source.data.name for mine, _ in tests]
    table = {who: [part[who] for part in parts] for who in parts[0]}
    show_table(run, names, table)
    means = {who: {key: float(np.mean([one[key] for one in found])) for key in found[0]}
             for who, found in table.items()}  # fmt: skip
    known = ",".join(expert.slug for expert in experts if expert.knows_held_out)
    return {"data": ",".join(names), **wanted(args), **({"held_out_known_to": known} if known else {}),
            **means["student"],
            "expert_top1": means["expert"]["top1"], "teacher_top1": means["teacher"]["top1"],
            "videos": sum(len(mine.videos) for mine, _ in tests),
            "unreadable": sum(len(mine.bad) for mine, _ in tests)}  # fmt: skip


def student(expert, encoder, joint, i, hidden):
    """(what builds it, student i on the CPU): encoder, adjustment and head in one network."""
    made = expert.made | {"adapter": hidden}
    net = backbones.build(**made)
    state = encoder.state_dict()
    state |= {f"fc.{key}": value for key, value in joint.heads[i].state_dict().items()}
    state |= {f"adapter.{key}": value for key, value in joint.adapters[i].state_dict().items()}
    net.load_state_dict(state)
    return made, net


def show_table(run, names, table):
    """Table 2, on the screen and in table.csv: {who: [figures of each data set]}."""
    keys = ("top1", "top5", "mAP")
    header = ["", *(f"{name} {key}" for name in names for key in keys)]
    rows = [[who, *(f"{one[key]:.2f}" for one in found for key in keys)] for who, found in table.items()]
    wide = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, *rows]:
        run.say("  ".join(cell.rjust(width) for cell, width in zip(row, wide, strict=True)))
    evaluate.write_csv(run.out / "table.csv", header, rows)


# -------------------------------------------------------------------------------- runs


def test_only(args, run):
    """--eval: the test of one student on video, with its own views unless --clips or --crops."""
    data = agreed(datasets.load, args.data, args.root, args.split)
    changes = {name: getattr(args, name) for name in VIEWS if getattr(args, name) is not None}
    net, recipe = evaluate.load_for(args.eval, data, run.device, **changes)
    models = {args.eval: recipe}
    data, _ = modality.with_flow(data, args.data, args.root, None, run, [recipe.modality], models)
    evaluate.report(net, data, recipe, run, args.workers, **wanted(args))


def of_source(args, k):
    """The flags of the k-th data set alone, for its supervised expert."""
    names = args.data.split(",")
    each = dict(zip(LABELS, labels_of(args, k), strict=True), root=one_of(args.root, k))
    one = each | dict(data=names[k], extra=None, expert=[args.expert[k]], net=[args.net[k]])
    return argparse.Namespace(**vars(args) | one)


def runs_of(args):
    """[(stage, its flags, its folder)]."""
    if args.eval:
        return [("eval", args, args.out)]
    stages = [args.stage] if args.stage != "all" else STAGES
    experts = [k for k, spec in enumerate(args.expert) if spec == "supervised"] if "experts" in stages else []
    slugs = [slug(name) for name in args.data.split(",")]
    runs = [("experts", of_source(args, k), f"{args.out}/experts/{slugs[k]}") for k in experts]
    finished = args.stage == "all" and Path(args.out, "result.json").exists()
    if "extract" in stages and not args.finetune and not finished:
        runs.append(("extract", args, f"{args.out}/cache"))
    return runs + [("train", args, args.out)] * ("train" in stages)


def one_run(stage, args, out):
    """A stage, or a test, in its folder; False if a signal has stopped it."""
    free = {*free_flags(args), "recipe"}
    if stage != "eval":
        free |= {"stage", "cache", "memory", *(UNUSED if stage == "experts" else ())}
    often, places = (args.log_every, args.max_bad, args.save_minutes), (*PLACES, "extra", "extra_root")
    with Run("jedi", out, vars(args), free, *often, places) as run:
        run.lr_flag = "--expert_lr" if stage == "experts" else "--lr"
        if stage == "extract":
            return extract(args, run) and not run.told_to_stop()
        if stage == "eval":
            test_only(args, run)
        elif not run.finished():
            {"experts": supervised, "train": train}[stage](args, run)
        return run.ended and not run.told_to_stop()


@record
def main():
    args = parse_args()
    for k, spec in enumerate([] if args.eval else args.expert):  # before days of work for the others
        weights = weights_of(args, k)
        if spec != "supervised" and weights not in backbones.PUBLISHED and not os.path.isfile(weights):
            leave("jedi", f"--expert {spec}: there is no file {weights}, nor a backbone of that name")
    for one in runs_of(args):
        if not one_run(*one):
            return


if __name__ == "__main__":
    main()

"""JEDI: Joint Expert Distillation in a Semi-Supervised Multi-Dataset Student-Teacher Scenario for Video
Action Recognition. Lucian Bicsi, Bogdan Alexe, Radu Tudor Ionescu, Marius Leordeanu. arXiv:2308.04934, 2023.

Each data set has an expert, a network that was trained on it alone. The frozen encoders of all experts embed
the videos of all data sets once. Each data set then gets a student, its expert with a small adjustment of the
embedding, and a teacher, a linear classifier of all students' embeddings side by side. Adjustments, heads and
teachers are trained together, on embeddings alone: students and teachers learn labels, and a student also
learns what its teacher predicts for the videos of all data sets.

    1 experts   labelled videos of data set i --> expert i                          (common/supervised.py)
    2 embed     videos of all data sets --> frozen encoders of all experts --> e_1 ... e_n, feature cache
    3 train     e_j --> + adjustment (Eq. 3) --> a_j --> head --> M_j, student j <---- soft labels ----+
                          a_1 ... a_n side by side --> dropout (Eq. 4) --> linear --> E_j, teacher j --+
                M_i and E_i learn the labels of data set i, M_j learns E_j on all data sets (Eq. 1, 2)

Equations:  Eq. 1 -> combined_loss, in train_step    Eq. 2 -> distillation_weights    Eq. 3 -> adjust
            Eq. 4, 5 -> teacher_dropout              Sec. 4.4 -> distillation_loss

Names: n experts, K_j classes of data set j; B videos of a step, own[i] those with a label of data set i;
z (B, D) embeddings of all experts side by side, D = 7168 in the paper; m, e logits of students and teachers.

Run (embeddings on 8 GPUs, training on one; then everything on the embedded data sets):

    torchrun --nproc_per_node 8 jedi.py --stop_after embeddings --half --out RUN \\
        --data activitynet:whole,hmdb51,k400,ucf101 \\
        --expert tsn50:AN.pth:8 tsm50:HMDB.pth:16 swin3d_b:kinetics_imagenet22k tsm50:UCF.pth:16
    python jedi.py --half --out RUN \\
        --data activitynet:whole,hmdb51,k400,ucf101 \\
        --expert tsn50:AN.pth:8 tsm50:HMDB.pth:16 swin3d_b:kinetics_imagenet22k tsm50:UCF.pth:16
    python jedi.py --data toy:mini,toy:c

Every table and figure of the paper has its command in tests/claims/jedi.md.

Differences from the paper, and decisions that it leaves open:

D1  An epoch is one pass over the training videos of all data sets, shuffled together. Eq. 1 is averaged over
    the videos of a step. The paper's learning rate, 1e-5, is taken for 512 videos a step and scales linearly.
D2  The teachers' hinge loss is torch's multi-margin loss (Weston and Watkins), divided by the number of
    classes; `ovr` is the sum of one-against-the-rest hinges. Students learn labels by cross-entropy.
D3  Soft labels are detached and computed without any dropout. Hinge logits enter the softmax as they are.
D4  The gradient of the teachers' label loss reaches the students' adjustments (Table 3: bidirectional).
D5  Students start as their experts: the same head, and an adjustment of 0. Teachers start at random. d of
    Eq. 4 is the width of the teachers' input.
D6  An embedding is the mean over the expert's own test views, not normalised. Experts, students and teachers
    are all scored from this mean; the paper also stores experts' mean probabilities (Sec. 4.3).
D7  |D_j| of Eq. 2 counts the training videos of data set j with or without a label.
D8  Videos may lack labels (`--ratio`; with `--labelled_list ,,FILE` the first two data sets keep all labels).
    Data sets of `--extra` have no expert and no labels; w_ij of their videos is |D_j| / sum_k |D_k|.
D9  mAP is the mean over classes of the average precision of softmax probabilities.
D10 The hold-out (15 % in Sec. 4.4) takes whole groups of videos where a data set has them. An expert
    that was not trained here may have seen them; RESULT then names its data set (held_out_known_to).
D11 Training is joint. The alternating training of Sec. 3.1, for which the paper has no number, is left out.
D12 A video that any expert cannot decode is skipped in training and counts as wrong in the test.
D13 Sec. 5 excludes Kinetics-400, yet Table 3's row of all data sets and adjusted features has the six numbers
    of Table 2, which come from four experts. The table in tests/claims/jedi.md uses three.
"""

import itertools
import math
import os
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import backbones, evaluate, optim, supervised
from common.clips import Order
from common.data import Data, Videos, as_list, digest_of_videos, hold_out, labelled_subset, load_data
from common.errors import UserError
from common.flags import LABELS, Parser, at_least, free_flags, share, wanted
from common.io import features, files, models
from common.io.models import digest_of_model, load_for, save_model
from common.io.weights import PUBLISHED
from common.run import PLACES, Run, agreed

# Other defaults for some data sets (the flags' own defaults are the paper's, Sec. 4.4).
RECIPES = {"toy": dict(
    net=["resnet3d10", "r2plus1d_10-pool", "tsm10-small"], hidden=64, epochs=100, lr=1e-3, batch=128,
    lr_batch=128, burn_in=5, eval_every=5, workers=1, channels_last=True,
)}  # fmt: skip
RECIPES["small"] = RECIPES["toy"] | dict(net=["r2plus1d_10-pool"])
# The teachers' classification losses by name (D2): logits (B, K), y (B,) to (B,).
LOSSES = {
    "hinge": partial(F.multi_margin_loss, reduction="none"),
    "ovr": lambda logits, y: F.relu(1 - (2 * F.one_hot(y, logits.shape[1]) - 1) * logits).sum(1),
    "ce": partial(F.cross_entropy, reduction="none"),
}
INPUTS = "adjusted", "base", "predictions", "adjusted+predictions"
EXPERT_HELP = ("supervised (trained here), MODEL.PT, a folder RUN/experts, NET:kinetics or another word for "
               "torchvision's weights, NET:FILE:SEGMENTS or NET:FILE:FRAMESxSTRIDE")  # fmt: skip
PASSED = "split", "seed", "holdout", "workers", "log_every", "max_bad"  # flags that stage 1 shares
FIGURES, VIEWS = ("top1", "top5", "mAP"), ("clips", "crops")  # columns of Table 2; flags of --eval


def parse_args(argv=None):
    p = Parser("jedi", __doc__, RECIPES)
    add = p.data(unlabelled=None, ratio=1.0, crop=False).add_argument
    add("--extra", default="", help="data sets without an expert, for distillation alone (D8)")
    add("--extra_videos", type=at_least(1), help="videos drawn from each of --extra (Sec. 5.2)")
    add("--holdout", type=share, default=0.0, help="share of training videos to test on (D10)")
    add = p.add_argument_group("experts: one value for all data sets, or one for each").add_argument
    add("--expert", nargs="+", default=["supervised"], metavar="EXPERT", help=EXPERT_HELP)
    add("--net", nargs="+", default=["tsm50"], help="backbones of supervised experts")
    add("--init", nargs="+", default=["none"], help="their start: FILE, imagenet, kinetics, none")
    add("--expert_flags", nargs="+", default=[], metavar="NAME=VALUE",
        help="more flags of python -m common.supervised, such as epochs=60 jitter=256,320")  # fmt: skip
    add("--cache", metavar="DIR", default="{out}/cache", help="feature cache, which runs may share")
    add("--half", action="store_true", help="keep embeddings in memory in half precision")
    add("--stop_after", choices=["experts", "embeddings"], help="end after this stage")
    add = p.add_argument_group("method").add_argument
    add("--alpha", type=at_least(0.0), default=1.0, help="weight of students' label loss (Eq. 1)")
    add("--beta", type=at_least(0.0), default=1.0, help="weight of teachers' label loss (Eq. 1)")
    add("--gamma", type=at_least(0.0), default=0.4, help="weight of the distillation loss (Eq. 1)")
    add("--distill", default="all", metavar="VIDEOS",
        help="videos to distil on: all, none, own, or the name of one data set (Sec. 5.2)")  # fmt: skip
    add("--teacher_input", choices=INPUTS, default="adjusted",
        help="adjusted embeddings, those of experts, students' logits, or two (Sec. 5.1, D13)")  # fmt: skip
    add("--teacher_loss", choices=LOSSES, default="hinge", help="teachers' label loss (D2)")
    add("--temperature", type=at_least(1e-6), default=1.0, help="T of the distillation (Sec. 4.4)")
    add("--hidden", type=at_least(1), default=256, help="units of the adjustment (Sec. 4.4)")
    add("--adjust_dropout", type=share, default=0.75, help="dropout of the adjustment (Sec. 4.4)")
    add("--neurons", type=at_least(0.0), default=10.0, help="k of the teachers' dropout (Eq. 4)")
    add = p.add_argument_group("optimisation, by AdamW at a constant learning rate").add_argument
    add("--epochs", type=at_least(0.0), default=500, help="passes over all training videos (D1)")
    add("--burn_in", type=at_least(0.0), default=25, help="epochs before distillation (Sec. 4.4)")
    add("--batch", type=at_least(1), default=512, help="videos per GPU and step")
    add("--lr", type=at_least(0.0), default=1e-5, help="rate for --lr_batch videos a step (D1)")
    add("--lr_batch", type=at_least(1), default=512, help="videos of a step that --lr is for (D1)")
    add("--weight_decay", type=at_least(0.0), default=3e-3, help="weight decay of all parameters")
    p.run()
    p.set_defaults(data="toy:mini,toy:c", clips=None, crops=None)
    args = p.parse(argv)
    names, n = names_of(args), args.data.count(",") + 1
    if not all(names) or len(set(map(slug, names)) - {"experts", "cache"}) < len(names):
        p.error(f"--data and --extra name each data set once, not as {','.join(names)}")
    known = [os.path.basename(os.path.abspath(name)) for name in names]
    if args.distill not in ("all", "none", "own", *known):
        p.error(f"--distill is all, none, own, or one of {', '.join(known)}, not {args.distill}")
    for flag, of in (("root", names), ("labelled_list", names[:n])):
        given = getattr(args, flag)
        if given and given.count(",") + 1 not in (n, len(of)):
            p.error(f"--{flag} has a value for each of {', '.join(of)}, with commas, not {given}")
    for flag in ("expert", "net", "init"):
        given = getattr(args, flag)
        if len(given) not in (1, n) and given != p.get_default(flag):
            p.error(f"--{flag} has one value, or one for each of {args.data}, not {len(given)}")
    for flags in supervised_flags(args):
        supervised.parse_args(flags)
    return args


def names_of(args):
    """The data sets, those with an expert first."""
    return args.data.split(",") + list(filter(None, args.extra.split(",")))


def for_each(args, flag):
    """The values of a flag that has one for all data sets with an expert, or one for each."""
    n = args.data.count(",") + 1
    return (getattr(args, flag) * n)[:n]


# -------------------------------------------------------------------------------- the method


def combined_loss(loss_m, loss_e, loss_kd, w, alpha, beta, gamma):
    """Eq. 1: L = alpha L_cls(M_i(x), y) + beta L_cls(E_i(x), y) + gamma sum_j w_ij L_kd(M_j(x), E_j(x)).

    loss_m, loss_e (B,): label losses of the student and the teacher of each video's own data set i, 0 where
    it has no label; loss_kd (B, n); w (B, n): row i of Eq. 2 for each video. Returns the mean over the B
    videos (D1).
    """
    return (alpha * loss_m + beta * loss_e + gamma * (w * loss_kd).sum(1)).mean()


def distillation_weights(sizes, extra=0):
    """Eq. 2: w_ij = 1 if i = j, else |D_j| / sum_k |D_k|.

    sizes (n,): training videos of each data set (D7). Returns (n + extra, n) float32; the last rows are for
    the videos of data sets without an expert (D8).
    """
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    return share.repeat(len(sizes) + extra, 1).fill_diagonal_(1).float()


def distilled(w, distill, names):
    """w (data sets, n), the rows of Eq. 2, set to 0 for videos that `distill` leaves out (Sec. 5.2): it is
    all, none, own, or one of the `names` of the data sets."""
    if distill == "own":
        return w * torch.eye(*w.shape)
    return w * torch.tensor([[distill in ("all", name)] for name in names])


def adjust(e, adapter):
    """Eq. 3: e <- (M + I) e with M of low rank; here M e = U SiLU(V e), with a bias in both layers (Fig. 2).

    e (B, D_j). Returns the adjusted embedding twice: with dropout of the adjustment, to learn from, and
    detached without dropout, for soft labels (D3).
    """
    change = adapter.change(e)
    return e + adapter.drop(change), (e + change).detach()


def teacher_dropout(K, d, k):
    """Eq. 4: p = max(0, 1 - k K / d); Eq. 5: so k K of the d inputs are active on average."""
    return max(0.0, 1 - k * K / d)


def distillation_loss(m, e, temperature):
    """L_kd (Sec. 4.4): the cross-entropy of softmax(m / T) against softmax(e / T), m, e (B, K) to (B,).

    The teacher's logits e are detached (D3).
    """
    return F.cross_entropy(m / temperature, (e.detach() / temperature).softmax(1), reduction="none")


def train_step(joint, z, own, y, w, gamma, args):
    """The loss of a step, and its terms by name.

    z (B, D); own: for each data set the positions of its labelled videos among the B; y (B,) int64, -1
    without a label; w (B, n): rows of Eq. 2; gamma: the weight of the distillation in this step.
    """
    m, e, soft_labels = joint(z, own, distill=gamma > 0 and args.distill != "none")
    loss_m, loss_e, loss_kd = z.new_zeros(len(y)), z.new_zeros(len(y)), torch.zeros_like(w)
    for i, at in enumerate(own):
        loss_m[at] = F.cross_entropy(m[i][at], y[at], reduction="none")
        loss_e[at] = LOSSES[args.teacher_loss](e[i], y[at])
    if soft_labels is not None:
        pairs = zip(m, soft_labels, strict=True)
        loss_kd = torch.stack([distillation_loss(*pair, args.temperature) for pair in pairs], 1)
    terms = {"loss_m": loss_m.mean(), "loss_e": loss_e.mean(), "loss_kd": (w * loss_kd).sum(1).mean()}
    return combined_loss(loss_m, loss_e, loss_kd, w, args.alpha, args.beta, gamma), terms  # Eq. 1


# -------------------------------------------------------------------------------- networks


class Joint(nn.Module):
    """All students, without their encoders, and all teachers; students start as their experts (D5)."""

    def __init__(self, experts, args):
        super().__init__()
        self.widths = [expert.net.fc.in_features for expert in experts]
        self.classes = [expert.net.fc.out_features for expert in experts]
        hidden = [expert.build.get("adapter") or args.hidden for expert in experts]
        adapter = partial(backbones.Adapter, dropout=args.adjust_dropout)
        self.adapters = nn.ModuleList(map(adapter, self.widths, hidden))
        self.heads = nn.ModuleList(map(nn.Linear, self.widths, self.classes))
        for expert, head, adapter in zip(experts, self.heads, self.adapters, strict=True):
            head.load_state_dict(expert.net.fc.state_dict())
            if expert.build.get("adapter"):  # the expert is a student of another run
                adapter.load_state_dict(expert.net.adapter.state_dict())
        self.inputs = args.teacher_input.split("+")
        width = {"base": sum(self.widths), "adjusted": sum(self.widths), "predictions": sum(self.classes)}
        d = sum(width[name] for name in self.inputs)
        self.teachers = nn.Linear(d, sum(self.classes))  # E_1 to E_n, one below the other
        self.p = [teacher_dropout(K, d, args.neurons) for K in self.classes]  # Eq. 4

    def forward(self, z, own, distill=True):
        """Logits from embeddings z (B, D), as lists over the n data sets.

        own: for each data set j the positions of its labelled videos among the B. Returns the students'
        logits (B, K_j); the teachers' (len(own[j]), K_j) for the labelled videos of their own data set; and,
        with `distill`, the teachers' for all videos (B, K_j), the detached soft labels.
        """
        e = z.split(self.widths, 1)
        a, clean = zip(*map(adjust, e, self.adapters), strict=True)  # Eq. 3
        m = [head(x) for head, x in zip(self.heads, a, strict=True)]
        x = self.teacher_input(e, a, m)
        weights, biases = (p.split(self.classes) for p in (self.teachers.weight, self.teachers.bias))
        active = [F.dropout(x[at], p, self.training) for at, p in zip(own, self.p, strict=True)]
        logits_e = [F.linear(*layer) for layer in zip(active, weights, biases, strict=True)]
        return m, logits_e, self.predict(e, clean)[1] if distill else None

    def teacher_input(self, e, a, m):
        """(B, d) from lists of embeddings, adjusted embeddings and students' logits; gradients pass (D4)."""
        parts = {"base": e, "adjusted": a, "predictions": m}
        return torch.cat([x for name in self.inputs for x in parts[name]], 1)

    @torch.no_grad()
    def predict(self, e, a=None):
        """Logits (B, K_j) of students and of teachers from lists of embeddings e, and of the adjusted ones a,
        if those are known; without any dropout (D3)."""
        a = a or [adjust(x, adapter)[1] for x, adapter in zip(e, self.adapters, strict=True)]
        m = [head(x) for head, x in zip(self.heads, a, strict=True)]
        return m, self.teachers(self.teacher_input(e, a, m)).split(self.classes, 1)


# -------------------------------------------------------------------------------- stages 1 and 2


@dataclass(eq=False)
class Part:
    """Videos to learn or to test: `indices` of the `name` list, "train" or "test", of a data set.

    y (N,) int64: the labels to learn, -1 where there is none. z (N, D): the embeddings of all experts side
    by side, a view of one tensor on the device. bad: index -> reason of the videos that an expert cannot
    read (D12), where z is 0.
    """

    data: Data
    name: str
    indices: np.ndarray
    y: np.ndarray | None = None
    z: torch.Tensor | None = None
    bad: dict = field(default_factory=dict)

    @cached_property
    def videos(self):
        return getattr(self.data, self.name).subset(self.indices)

    @property
    def labelled_list(self):
        return as_list(self.data.train.subset(self.indices[self.y >= 0]))  # labelled.txt


def slug(name):
    """The name of a data set, or of its folder, as a folder name."""
    return os.path.basename(os.path.abspath(name)).replace(":", "-")


def nth(values, k):
    """Value k of a text with commas; None if there is no text, or the value is empty."""
    return next(iter((values or "").split(",")[k:]), None) or None


def labels_of(args, k):
    """(ratio, per_class, labelled_list) of data set k: all labels if only others have a list (D8)."""
    path = nth(args.labelled_list, k)
    return 1.0 if args.labelled_list and not path else args.ratio, args.per_class, path


def load_parts(args):
    """(Parts to learn, of all data sets; Parts to test, of those with an expert)."""
    learned, tests = [], []
    for k, name in enumerate(names_of(args)):
        data = agreed(load_data, name, nth(args.root, k), args.split)
        used, y = np.ones(len(data.train), bool), np.full(len(data.train), -1)
        if k <= args.data.count(","):
            if data.multilabel:
                raise UserError(f"{data.name} has several labels per video, which JEDI does not know")
            ratio, per_class, path = labels_of(args, k)
            labelled = agreed(labelled_subset, data, ratio, per_class, args.seed, path)
            y[labelled] = data.train.labels[labelled]
            used = ~hold_out(data.train, args.holdout, args.seed)  # D10
            tests.append(Part(data, "test", np.arange(len(data.test))) if used.all() else
                         Part(data, "train", np.flatnonzero(~used)))  # fmt: skip
            if (y[used] < 0).all():
                raise UserError(f"{data.name} has no video with a label beside the held-out ones")
        elif args.extra_videos:
            used[np.random.default_rng(args.seed).permutation(len(used))[args.extra_videos :]] = False
        learned.append(Part(data, "train", np.flatnonzero(used), y[used]))
    return learned, tests


def supervised_flags(args):
    """Stage 1: a command line of common.supervised for each data set whose expert is trained here."""
    lines = []
    stacked = zip(*(for_each(args, flag) for flag in ("expert", "net", "init")), strict=True)
    for k, (expert, net, init) in enumerate(stacked):
        if expert != "supervised":
            continue
        name, init = names_of(args)[k], None if init == "none" else init
        flags = {flag: getattr(args, flag) for flag in PASSED}
        flags |= dict(data=name, root=nth(args.root, k), net=net, init=init)
        flags |= zip(LABELS, labels_of(args, k), strict=True)
        lines.append([f"--out={args.out}/experts/{slug(name)}"])
        lines[-1] += [f"--{flag}={value}" for flag, value in flags.items() if value is not None]
        lines[-1] += ["--resume_changed"] * args.resume_changed
        for flag, _, value in (text.partition("=") for text in args.expert_flags):
            lines[-1] += [f"--{flag}", *filter(None, value.split(","))]
    return lines


def load_experts(args, run, learned, tests):
    """(models.Model of each data set, names of those that may have learned held-out videos, D10)."""
    experts, knowing = [], []
    for spec, part, test in zip(for_each(args, "expert"), learned, tests, strict=False):
        spec = f"{args.out}/experts" if spec == "supervised" else spec
        experts.append(models.load(spec, part.data, run))
        known = experts[-1].labelled_list
        if known not in (None, part.labelled_list):
            run.say(f"{experts[-1].path} was trained on other videos than those with a label here")
        held_out = as_list(test.videos).splitlines() if test.name == "train" else []
        if held_out and (known is None or set(held_out) & set(known.splitlines())):
            run.say(f"--holdout: the expert of {part.data.name} may have been trained on the held-out videos")
            knowing.append(part.data.name)
    return experts, knowing


def embed(args, run, parts, experts):
    """Stage 2 (Sec. 4.3): z (all videos, D) on the device; fills `z` and `bad` of the Parts, too.
    Returns None if a signal has stopped a rank. A lack of memory is noticed before the long work."""
    sizes, D, first = [len(part.indices) for part in parts], sum(x.net.fc.in_features for x in experts), 0
    dtype = torch.float16 if args.half else torch.float32
    try:
        z = torch.zeros(sum(sizes), D, dtype=dtype, device=run.device)
    except RuntimeError:
        size = f"{sum(sizes)} videos need {sum(sizes) * D * dtype.itemsize / 1e9:.1f} GB"
        raise UserError(f"the embeddings of {size} of memory on {run.device}, more than is free; with --half "
                        "they need half of what they need in full precision") from None  # fmt: skip
    for part, view in zip(parts, z.split(sizes), strict=True):
        part.z = view
    for expert, own in zip(experts, parts, strict=False):
        D = expert.net.fc.in_features
        run.say(f"expert of {own.data.name}: {expert.path}, {expert.net.name}, {D} wide")
        net, identity = run.to_device(expert.net, args.channels_last), {"expert": digest_of_model(expert.net)}
        identity |= {f"network.{key}": value for key, value in expert.build.items()}
        blocks = partial(evaluate.blocks, net, net.embed, run=run, workers=args.workers, bar="features")
        for part in parts:
            videos = getattr(part.data, part.name)  # the whole list, so that runs can share the cache
            extraction = features.Extraction(videos, expert.recipe, blocks, identity, average=True)
            folder = Path(args.cache, slug(own.data.name), f"{slug(part.data.name)}_{part.name}")
            cache = features.extract(folder, extraction, run)
            if cache is None:
                return None
            if part.name == "train" and len(cache.bad) > args.max_bad * len(videos):
                count, reason = f"{len(cache.bad)} of {len(videos)}", next(iter(cache.bad.values()))
                raise UserError(f"{count} videos of {part.data.name} cannot be read, more than --max_bad: "
                                f"{reason}; when they are mended, delete {folder}")  # fmt: skip
            good = np.flatnonzero(cache.counts[part.indices])
            rows = torch.from_numpy(cache.rows[cache.first[part.indices[good]]])
            part.z[torch.from_numpy(good), first : first + D] = rows.to(z)
            part.bad |= {i: cache.bad[v] for i, v in enumerate(part.indices.tolist()) if v in cache.bad}
        first += D
        net.cpu()
    return z


# -------------------------------------------------------------------------------- training


def train(args, run):
    """Stages 2 and 3, students and teachers jointly (D11); with --eval the test of one student on video."""
    if args.eval:
        data = agreed(load_data, args.data, args.root, args.split)
        views = {name: getattr(args, name) for name in VIEWS if getattr(args, name) is not None}
        net, recipe = load_for(args.eval, data, run.device, **views)
        evaluate.report({"net": (net, recipe)}, data, run, args.workers, **wanted(args))
        return

    # 1. Data sets and experts.
    learned, tests = load_parts(args)
    experts, knowing = load_experts(args, run, learned, tests)
    identity = {f"list of {part.data.name}": [digest_of_videos(part.videos), int((part.y >= 0).sum())]
                for part in learned}  # fmt: skip
    for part, expert in zip(tests, experts, strict=True):
        identity[f"expert of {part.data.name}"] = [expert.net.name, digest_of_model(expert.net)]
    if run.finished(identity):
        return
    run.say(f"recipe: {args.recipe or 'none, the defaults of the flags'}")
    for part in learned:
        counts = f"{len(part.data.classes)} classes, {len(part.y)} videos, {(part.y >= 0).sum()} labelled"
        run.say("\n".join([f"{part.data.name}: {counts}", *part.data.notes]))

    # 2. Embeddings z of all videos; of the training videos, which come first, labels and data sets.
    z = embed(args, run, learned + tests, experts)
    if z is None or args.stop_after:
        return
    y = torch.from_numpy(np.concatenate([part.y for part in learned]))
    origin = torch.cat([torch.full((len(part.y),), k) for k, part in enumerate(learned)])
    labelled_as = torch.where(y >= 0, origin, -1)
    rows = np.flatnonzero([i not in part.bad for part in learned for i in range(len(part.y))])  # D12
    if not len(rows):
        raise UserError("there is no training video that all experts can read")

    # 3. Students and teachers.
    torch.manual_seed(args.seed)
    joint, n = Joint(experts, args), len(experts)
    net = run.distribute(joint, compile=args.compile)
    w = distillation_weights([len(part.y) for part in learned[:n]], len(learned) - n)  # Eq. 2
    w = distilled(w, args.distill, [os.path.basename(part.data.name) for part in learned])
    y, origin, w = (x.to(run.device) for x in (y, origin, w))
    B, epoch = args.batch, math.ceil(len(rows) / (args.batch * run.world))  # D1
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))
    lr, rule = optim.scaled_lr(args.lr, B * run.world, args.lr_batch, "videos")  # D1
    optimizer = optim.build("adamw", joint.parameters(), lr, args.weight_decay, fused=True)
    parts = {"joint": joint, "optimizer": optimizer}
    start = run.resume(identity, **parts)
    for part in learned[:n]:
        run.on_main(files.make_folder, run.out / slug(part.data.name))
        run.write(f"{slug(part.data.name)}/labelled.txt", part.labelled_list)
    run.say(f"{total} steps, {epoch} an epoch, of {B * run.world} videos; {rule}; {run.device.type}")

    # 4. Each step takes the next B videos of a shuffled pass over all data sets.
    # run.steps expects a loader, but z is in memory: `reports` only names the unreadable videos, at first.
    passes = Order(len(rows), args.seed)
    paths = [Videos.make("", map(part.videos.path, range(len(part.y))), part.y) for part in learned]
    reports = itertools.chain([[{"bad": part.bad.items()} for part in learned]],
                              itertools.repeat([{"bad": ()}] * len(learned)))  # fmt: skip
    if every and total and not start:  # Fig. 3 begins with the experts
        quick_test(run, joint, experts, tests, 0)
    for step, batches in run.steps(reports, start, total, args.seed, paths, every):
        if batches is None:  # between two steps
            quick_test(run, joint, experts, tests, step)
            continue
        at = torch.from_numpy(np.sort(rows[passes.take(B * (step * run.world + run.rank), B)]))
        own = [(labelled_as[at] == i).nonzero()[:, 0].to(run.device) for i in range(n)]
        at = at.to(run.device)
        gamma = args.gamma * (step >= round(args.burn_in * epoch))
        loss, terms = train_step(net, z[at].float(), own, y[at], w[origin[at]], gamma, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
        if run.due(step + 1, total):  # an epoch is short
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return

    # 5. Models and the final test.
    row = run.on_main(write_results, args, run, joint, experts, tests)
    known = {"held_out_known_to": ",".join(knowing)} if knowing else {}
    run.result({"script": run.script, **row, **known, "seconds": round(run.seconds)})


# -------------------------------------------------------------------------------- results


@torch.no_grad()
def score(joint, experts, tests):
    """[{"expert", "student", "teacher": evaluate.Scores}] of all data sets, from the mean embeddings (D6)."""
    joint.eval()
    scores = []
    for i, (expert, part) in enumerate(zip(experts, tests, strict=True)):
        blocks = []
        for z in part.z.split(4096):
            e = z.float().split(joint.widths, 1)
            m, logits_e = joint.predict(e)
            blocks.append([x.cpu().softmax(1) for x in (expert.net.head(e[i].cpu()), m[i], logits_e[i])])
        probs = [torch.cat(p).numpy() for p in zip(*blocks, strict=True)]
        scores.append({who: evaluate.Scores.of(p, part.videos, part.bad)
                       for who, p in zip(("expert", "student", "teacher"), probs, strict=True)})  # fmt: skip
    joint.train()
    return scores


def quick_test(run, joint, experts, tests, step):
    """Table 2 after some steps, with mAP (D9), into the log (Fig. 3)."""
    if run.main:
        rows = zip(tests, score(joint, experts, tests), strict=True)
        named = {f"{part.data.name}_{who}": scores for part, row in rows for who, scores in row.items()}
        evaluate.log_scores(named, run, step)


def write_results(args, run, joint, experts, tests):
    """Write Table 2, and each student's model.pt and predictions; returns what RESULT says, means of all."""
    scores, names = score(joint, experts, tests), [part.data.name for part in tests]
    rows = [{who: evaluate.metrics(one) for who, one in row.items()} for row in scores]
    for i, (expert, part) in enumerate(zip(experts, tests, strict=True)):
        folder, classes = run.out / slug(part.data.name), part.data.classes
        evaluate.write_files(folder, scores[i]["student"], part.videos, classes)
        build = expert.build | {"adapter": joint.adapters[i].down.out_features}
        student, state = backbones.build(**build), expert.net.state_dict()  # encoder, adjustment and head
        for name, module in (("fc", joint.heads[i]), ("adapter", joint.adapters[i])):
            state |= {f"{name}.{key}": value.cpu() for key, value in module.state_dict().items()}
        student.load_state_dict(state, assign=True)
        recipe = replace(expert.recipe, average="embeddings")  # D6
        save_model(folder / "model.pt", student, build, classes, recipe)
    header = ["", *(f"{name} {key}" for name in names for key in FIGURES)]
    lines = [[who, *(f"{row[who][key]:.2f}" for row in rows for key in FIGURES)] for who in rows[0]]
    for line in (header, *lines):
        run.say("  ".join(cell.rjust(len(title) or 7) for cell, title in zip(line, header, strict=True)))
    evaluate.write_csv(run.out / "table.csv", header, lines)
    mean = {who: {key: float(np.mean([row[who][key] for row in rows])) for key in FIGURES} for who in rows[0]}
    return {"data": ",".join(names), **wanted(args), **mean["student"], "expert_top1": mean["expert"]["top1"],
            "teacher_top1": mean["teacher"]["top1"], "videos": sum(len(part.indices) for part in tests),
            "unreadable": sum(len(part.bad) for part in tests)}  # fmt: skip


def check_inputs(args):
    """Raise UserError for a data set or a file that a later stage would miss, before stage 1."""
    load_parts(args)
    pairs = zip(for_each(args, "expert"), names_of(args), strict=False)
    paths = {models.parse(spec, slug(name))[1] for spec, name in pairs if spec != "supervised"}
    for path in sorted(paths.union(for_each(args, "init")) - {"none", *PUBLISHED}):
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path}, which --expert or --init asks for")


@record
def main():
    args = parse_args()
    free = {*free_flags(args), "cache", "stop_after"}
    begin = partial(Run, "jedi", args.out, vars(args), free, (*PLACES, "extra"))
    if not args.eval:
        with begin():
            check_inputs(args)
        if not all(map(supervised.main, supervised_flags(args))) or args.stop_after == "experts":  # stage 1
            return
    with begin() as run:
        train(args, run)


if __name__ == "__main__":
    main()

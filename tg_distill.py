"""Learning from Temporal Gradient for Semi-supervised Action Recognition.

Junfei Xiao, Longlong Jing, Lin Zhang, Ju He, Qi She, Zongwei Zhou, Alan Yuille, Yingwei Li. CVPR 2022,
arXiv:2111.13241.

Few videos have a label, most have none. The temporal gradient (TG), the difference of two near frames, shows
what moves and hides the still background and its colours. An RGB network and a TG network are trained side
by side as FixMatch, on pseudo-labels that they make together, and the RGB network (the student) is pulled to
the TG network (the teacher) in every stage of the backbone and in a common embedding. The test needs the RGB
network alone, so motion knowledge costs nothing at inference.

    frames t      } one crop   x_rgb --> RGB student --> four stages, embedding, p_rgb --+
    frames t + n  } and flip                                  ^           ^              |  mean >= tau ?
                                                              | Eq. 9     | Eq. 10       +----> label y
             their difference  x_tg  --> TG teacher  --> four stages, embedding, p_tg  --+     (Eq. 2, 5)

    weak x_rgb, x_tg:     all of the above
    strong, RandAugment of either: both networks learn y (Eq. 3)
    labelled x_rgb, x_tg: both learn the true label (Eq. 1); Eq. 9 and 10 as for weak clips

Equations:  Eq. 1 -> supervised_loss    Eq. 2, 5 -> fuse + pseudo_label    Eq. 3 -> unlabelled_loss
            Eq. 4, 6 -> fixmatch_loss   Eq. 7, 8 -> distance    Eq. 9 -> alignment_loss
            Eq. 10 -> contrastive_loss  Eq. 11 -> total_loss    all are called in train_step

Names: <what>_<net>_<view>, net rgb or tg, view l labelled, w weak, s strong; B_l labelled and B_u unlabelled
clips of a step, K classes, tau the threshold (gamma in the paper, whose tau is `--temperature`), n =
`--interval` frames between the two of a difference. "weak" is the paper's alpha, "strong" its A.

Run (8 GPUs, the paper's settings; then one process on the embedded data set, on a CPU too):

    torchrun --nproc_per_node 8 tg_distill.py --data ucf101
    torchrun --nproc_per_node 8 tg_distill.py --data hmdb51:all
    python tg_distill.py --data toy:mini

Baselines: FixMatch `--nets rgb`, FixMatch on TG `--nets tg`. A command for each row of the paper's tables:
tests/claims/tg_distill.md. The student is saved as model.pt, the teacher as teacher.pt.

Differences from the paper, and what it leaves open ("the code" is what its authors published):

D1  An epoch is one pass over the unlabelled videos, which are all training videos, as in the code.
    `--unlabelled rest` leaves the labelled ones out. Labels are drawn balanced over the classes.
D2  The learning rate of 0.2 is for 8 GPUs with 5 labelled clips each (Kinetics-400: 8, as in the code). It
    scales linearly with the number of labelled clips in a step.
D3  The backbone has the max-pooling of Table 4 and the code; torchvision's R3D-18, `--net r3d_18`, has none.
    Its batch norm has epsilon 1e-3, as in the code.
D4  Eq. 5 averages probabilities; the code averages logits: `--fuse logits`.
D5  lambda_u is not given: 1, as in the code. Eq. 3 is averaged over all B_u clips, confident or not.
D6  TG is computed from the cropped frames and rounded down to whole grey levels; the code writes it to JPEG
    files. Both inputs are normalised with ImageNet's mean and standard deviation.
D7  The strong view is RandAugment of the weak one, drawn for RGB and TG separately, as in the code. Strengths
    and signs are drawn for each clip; the code fixes the strength and draws the signs once per process.
D8  All clips of a network share one forward pass, as in the code, so batch norm sees labelled, weak and
    strong clips together, on all GPUs (`--no-sync_bn`: on each GPU). Weight decay acts on every parameter.
D9  Eq. 8 is averaged over clips and positions, with 1 - cos in place of -cos and squares in place of the L2
    norm; Eq. 9 is summed over the stages, as in the code.
D10 Eq. 10 is the mean of both directions. Negatives are clips of the other modality on all GPUs, with their
    gradient. The three layers of a head are initialised with deviation 0.01. All as in the code.
D11 As in the code, both warm-ups last 30 epochs on UCF-101, 60 on HMDB-51, 10 and 15 on Kinetics-400: the
    learning rate rises from a tenth, Eq. 3 is left out. Gradients are clipped to norm 40.
D12 PreciseBN: each test uses a copy of the network whose batch-norm statistics are those of `--precise_bn`
    training videos, pooled over all clips; the code averages the variances of 200 batches.
D13 Test clips are spread from the first to the last frame; the code takes the middles of ten equal parts.
    Their logits are averaged, as in the code: `--average softmax` averages probabilities.
"""

import argparse
import math
import os
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.nn.functional import all_gather

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import augment, backbones, evaluate, modality, optim
from common.clips import Clips, dense, train_loader
from common.data import as_list, digest_of_videos, labelled_subset, load_data, semi_supervised
from common.errors import UserError
from common.flags import Parser, Range, at_least, free_flags, positive_share, share, wanted
from common.io.models import load_for, save_model
from common.modality import Recipe
from common.run import Run, agreed

# Defaults per data set, and what the nearest labelled share adds to them (the flags' own defaults are
# UCF-101's). Sec. 4.2, D11 and D12.
RECIPES = {
    "ucf101": dict(ratio=0.2),
    "hmdb51": dict(ratio=0.5, epochs=360, warmup=60, sup_warmup=60, precise_bn=4800),
    "k400": dict(batch=8, lr_batch=64),
    "k400 0.01": dict(epochs=45, warmup=10, sup_warmup=10),
    "k400 0.1": dict(epochs=90, warmup=15, sup_warmup=15),
    "toy": dict(
        per_class=8, tau=0.95, batch=8, net="r3d_10-pool", width=0.25, stride=4, size=40, area=[0.5, 1.0],
        dropout=0.0, epochs=8, optimizer="adamw", lr=0.01, lr_batch=8, weight_decay=0.05, warmup=0.5,
        sup_warmup=1, precise_bn=200, clips=2, crops=1, eval_every=2, workers=1, channels_last=True,
    ),
}  # fmt: skip
# 90 real clips of 180 x 144 pixels; a folder with lists. Tests at 73 pixels (8/7) would give the last stage
# of so small a network 3 x 3 positions in place of the 2 x 2 that it was trained with.
RECIPES["small"] = RECIPES["toy"] | dict(
    per_class=2, size=64, test_size=64, epochs=50, warmup=3, sup_warmup=6, precise_bn=60, eval_every=25
)

TEST = "average", "train_accuracy"  # flags of --eval that make it another test
RGB = modality.MODALITIES["rgb"]
SWITCH = argparse.BooleanOptionalAction


def parse_args(argv=None):
    p = Parser("tg_distill", __doc__, RECIPES)
    add = p.data(unlabelled="all").add_argument  # D1
    add("--area", type=positive_share, nargs=2, action=Range, default=[0.08, 1.0],
        help="range of the area of a crop, as a share of the frame")  # fmt: skip
    add("--interval", type=at_least(1), default=1, help="n of TG in frames; 7 is slow, Table 3a")
    add = p.add_argument_group("method").add_argument
    add("--nets", choices=["both", "rgb", "tg"], default="both", help="rgb, tg: FixMatch, Eq. 4")
    add("--w_fm", type=at_least(0.0), default=0.5, help="weight of FixMatch in Eq. 11")
    add("--w_kd", type=at_least(0.0), default=1.0, help="weight of the alignment in Eq. 11")
    add("--w_clr", type=at_least(0.0), default=1.0, help="weight of the contrast in Eq. 11")
    add("--lam_u", type=at_least(0.0), default=1.0, help="lambda_u, weight of L_u in Eq. 6 (D5)")
    add("--tau", type=share, default=0.3, help="confidence threshold gamma, Eq. 2, 5, Sec. 4.2")
    add("--mu", type=at_least(1), default=1, help="unlabelled clips per labelled clip, B_u / B_l")
    add("--pseudo", choices=["avg", "rgb", "tg", "self"], default="avg",
        help="whose prediction is the pseudo-label, Table 3d")  # fmt: skip
    add("--fuse", choices=["probs", "logits"], default="probs", help="what avg averages (D4)")
    add("--align", choices=["cosine", "l1", "l2"], default="cosine", help="D of Eq. 8, Table 3b")
    add("--align_stages", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4],
        help="stages of the backbone that are aligned, Table 3e")  # fmt: skip
    add("--stopgrad", action=SWITCH, default=True, help="detach the teacher in Eq. 9, Table 3c")
    add("--temperature", type=at_least(1e-6), default=0.5, help="tau of Eq. 10, Table 3g")
    add("--net", default="r3d_18-pool", help="backbone of both networks (D3)")
    add("--width", type=float, default=1.0, help="channel multiplier of the backbones")
    add("--dropout", type=float, default=0.5, help="dropout before the classifiers, Sec. 4.2")
    add("--frames", type=at_least(1), default=8, help="frames of a clip")
    add("--stride", type=at_least(1), default=8, help="video frames from one to the next")
    add("--rand_augment", type=at_least(0, 10), nargs=2, default=[2, 9],
        help="RandAugment of strong views: number of operations, magnitude (D7)")  # fmt: skip
    add = p.optimisation("labelled clips", "unlabelled videos", epochs=180, batch=5, lr=0.2, lr_batch=40,
                         weight_decay=1e-4, warmup=30).add_argument  # D1, D2, D11  # fmt: skip
    add("--sup_warmup", type=at_least(0.0), default=30, help="first epochs without L_u, Table 3f")
    add("--clip_grad", type=at_least(0.0), default=40.0, help="largest gradient norm; 0: no limit")
    add("--sync_bn", action=SWITCH, default=True, help="batch norm over all GPUs (D8)")
    add("--precise_bn", type=at_least(0), default=8000, help="training videos for PreciseBN, D12")
    add = p.run().add_argument
    add("--average", choices=["logits", "softmax"], default="logits",
        help="average the logits or the probabilities of a video's views (D13)")  # fmt: skip
    add("--train_accuracy", action="store_true", help="test the labelled videos, too, Table 6")
    args = p.parse(argv, also=TEST)
    if args.nets != "both" and args.pseudo not in ("avg", "self", args.nets):
        p.error(f"--nets {args.nets} cannot learn the labels of --pseudo {args.pseudo}")
    return args


# -------------------------------------------------------------------------------- the method


def supervised_loss(logits_l, y_l):
    """Eq. 1: L_l = -1/B_l sum_i y_i log f(alpha(x_i)).

    logits_l (B_l, K), y_l (B_l,) int64; mean over the labelled clips.
    """
    return F.cross_entropy(logits_l, y_l)


def pseudo_label(p_w, tau):
    """Eq. 2: C = {x_j : max f(alpha(x_j)) >= gamma}, labelled by the arg max.

    p_w (B_u, K) probabilities of the weak views. Returns y (B_u,) int64 and mask (B_u,) float, 1 in C.
    """
    confidence, y = p_w.max(dim=1)
    return y, (confidence >= tau).float()


def unlabelled_loss(logits_s, y, mask):
    """Eq. 3: L_u = -1/B_u sum_{x_j in C} y_j log f(A(x_j)).

    logits_s (B_u, K) of the strong views, the only side with gradient; y, mask (B_u,) from `pseudo_label`.
    The mean is over all B_u clips, so a step without a confident clip has loss 0.
    """
    return (F.cross_entropy(logits_s, y, reduction="none") * mask).mean()


def fixmatch_loss(loss_l, loss_u, lam_u):
    """Eq. 4, 6: L_fm = L_l + lambda_u L_u, of one network (Eq. 4: lambda_u = 1)."""
    return loss_l + lam_u * loss_u


def fuse(logits_w, pseudo, mean):
    """Eq. 5: p = (f_R(alpha(x^RGB)) + f_T(alpha(x^TG))) / 2, the probabilities that give the pseudo-labels.

    logits_w {net: (B_u, K)} of the weak views, detached here. pseudo (Table 3d): "avg", the mean of the
    probabilities or, with mean="logits", of the logits; "rgb" or "tg", one network's for both; "self", each
    network's own. Returns {net: (B_u, K)} probabilities.
    """
    logits_w = {net: logits.detach().float() for net, logits in logits_w.items()}
    p = {net: logits.softmax(dim=1) for net, logits in logits_w.items()}
    if pseudo == "self":
        return p
    if pseudo != "avg":
        return dict.fromkeys(p, p[pseudo])
    if mean == "logits":
        return dict.fromkeys(p, torch.stack([*logits_w.values()]).mean(0).softmax(dim=1))
    return dict.fromkeys(p, torch.stack([*p.values()]).mean(0))


def distance(f_rgb, f_tg, kind):
    """Eq. 8: D_cos = -cos(F_1, F_2) over the channels, D_L1 = |F_1 - F_2|_1, D_L2 = |F_1 - F_2|_2.

    f_rgb, f_tg (B, C, T, H, W) outputs of one stage. The mean over clips and positions, for L1 and L2 over
    channels, too (D9); gradient flows into both.
    """
    f_rgb, f_tg = f_rgb.float(), f_tg.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(f_rgb, f_tg, dim=1).mean()  # D9
    return F.l1_loss(f_rgb, f_tg) if kind == "l1" else F.mse_loss(f_rgb, f_tg)


def alignment_loss(f_rgb, f_tg, kind, stages, stopgrad=True):
    """Eq. 9: L_kd = sum_i D(F_i^RGB, stopgrad(F_i^TG)), the teacher detached.

    f_rgb, f_tg: outputs (B_l + B_u, C, T, H, W) of the four stages for labelled and weak clips; stages: which
    of 1..4 are aligned; stopgrad False: the teacher gets a gradient, too (Table 3c).
    """
    if stopgrad:
        f_tg = [f.detach() for f in f_tg]
    return sum(distance(f_rgb[i - 1], f_tg[i - 1], kind) for i in sorted({*stages}))


def contrastive_loss(z_rgb, z_tg, temperature):
    """Eq. 10: L_clr = -log exp(sim(q, k+) / tau) / sum_k exp(sim(q, k) / tau), sim the cosine.

    z_rgb, z_tg (B_l + B_u, D), row i of both from clip i. Queries are this rank's embeddings, keys those of
    the other modality on all ranks; the mean over queries and both directions; gradient flows into both
    sides. DDP averages the ranks' gradients, which gives the loss and gradient of the joint batch.
    """
    with torch.autocast(z_rgb.device.type, enabled=False):  # similarities in float32
        q_rgb, q_tg = F.normalize(z_rgb.float(), dim=1), F.normalize(z_tg.float(), dim=1)
        k_rgb, k_tg = gather(q_rgb), gather(q_tg)  # (B of all ranks, D)
        first = dist.get_rank() * len(q_rgb) if len(k_tg) > len(q_rgb) else 0  # this rank's keys begin here
        positive = first + torch.arange(len(q_rgb), device=q_rgb.device)
        to_tg = F.cross_entropy(q_rgb @ k_tg.T / temperature, positive)
        to_rgb = F.cross_entropy(q_tg @ k_rgb.T / temperature, positive)
    return (to_tg + to_rgb) / 2  # D10


def total_loss(loss_fm, loss_kd, loss_clr, w_fm, w_kd, w_clr):
    """Eq. 11: L = w_fm (L_fm^RGB + L_fm^TG) + w_kd L_kd + w_clr L_clr; loss_fm: one per network."""
    return w_fm * sum(loss_fm) + w_kd * loss_kd + w_clr * loss_clr


def train_step(nets, x, y_l, args, lam_u):
    """The loss of one step, its terms by name, {net: (pseudo-labels, mask)} and {net: its own labels}.

    nets: {"rgb": student, "tg": teacher}, or one of them for FixMatch; x: {net: {view: (B, C, T, H, W)}},
    view l, w or s; lam_u is 0 in the supervised warm-up. The labels are for the log.
    """
    logits_l, logits_w, logits_s, f, z = {}, {}, {}, {}, {}
    for net, views in x.items():
        clips = [views[view] for view in "lws"]
        sizes = [len(x) for x in clips]
        logits, f[net], z[net] = nets[net](torch.cat(clips), sizes[0] + sizes[1])  # D8
        logits_l[net], logits_w[net], logits_s[net] = logits.split(sizes)
    loss_l = {net: supervised_loss(logits_l[net], y_l) for net in nets}  # Eq. 1
    p_w = fuse(logits_w, args.pseudo, args.fuse)  # Eq. 5
    labels = {net: pseudo_label(p_w[net], args.tau) for net in nets}  # Eq. 2
    loss_u = {net: unlabelled_loss(logits_s[net], *labels[net]) for net in nets}  # Eq. 3
    loss_fm = {net: fixmatch_loss(loss_l[net], loss_u[net], lam_u) for net in nets}  # Eq. 4, 6
    terms = {f"loss_l_{net}": loss for net, loss in loss_l.items()}
    terms |= {f"loss_u_{net}": loss for net, loss in loss_u.items()}
    y_w = {net: logits_w[net].argmax(1) for net in nets}
    if len(nets) == 1:  # FixMatch, Eq. 4
        return *loss_fm.values(), terms, labels, y_w
    loss_kd = loss_clr = 0.0
    if args.w_kd:
        loss_kd = alignment_loss(f["rgb"], f["tg"], args.align, args.align_stages, args.stopgrad)  # Eq. 9
        terms["loss_kd"] = loss_kd
    if args.w_clr:
        loss_clr = contrastive_loss(z["rgb"], z["tg"], args.temperature)  # Eq. 10
        terms["loss_clr"] = loss_clr
    loss = total_loss(loss_fm.values(), loss_kd, loss_clr, args.w_fm, args.w_kd, args.w_clr)  # Eq. 11
    return loss, terms, labels, y_w


def pseudo_label_report(labels, y_w, y_true):
    """Shares of the unlabelled batch, for the log alone: the true labels, None if unknown, never train.

    kept_*: the pseudo-label is confident; right_*: it is confident and right; weak_top1_*: the network's own
    prediction on the weak view is right.
    """
    shares = {f"kept_{net}": mask.mean() for net, (_, mask) in labels.items()}
    for net, (y, mask) in labels.items() if y_true is not None else ():
        shares[f"right_{net}"] = (mask * (y == y_true)).mean()
        shares[f"weak_top1_{net}"] = (y_w[net] == y_true).float().mean()
    return shares


# -------------------------------------------------------------------------------- networks


class Network(nn.Module):
    """A backbone and its projection head for Eq. 10; one forward pass gives all that a step needs."""

    def __init__(self, backbone, project):
        super().__init__()
        self.backbone = backbone
        self.head = projection_head(backbone.fc.in_features) if project else None

    def forward(self, x, first):
        """Logits (B, K) of all clips; of the `first` ones the four stages' outputs and the embedding."""
        stages = self.backbone.features(x)
        z = stages[-1].mean((2, 3, 4), keepdim=True)  # (B, D, 1, 1, 1), whose mean is itself
        logits, firsts = self.backbone.classify(z), [stage[:first] for stage in stages]
        return logits, firsts, self.head(z[:first].flatten(1)) if self.head else None


def projection_head(D):
    """The 3-layer MLP of Sec. 3.4 and Suppl. A, (B, D) to (B, D); D3, D10."""
    layers = []
    for i in range(3):
        linear = nn.Linear(D, D, bias=False)
        nn.init.normal_(linear.weight, std=0.01)
        layers += [linear, nn.BatchNorm1d(D, affine=i < 2)]
        layers += [nn.ReLU(inplace=True)] if i < 2 else []
    return nn.Sequential(*layers)


def build_networks(args, classes, run):
    """{net: Network under DDP}, and the arguments of `backbones.build` for both backbones."""
    build = dict(name=args.net, classes=classes, width=args.width, dropout=args.dropout, bn_eps=1e-3)  # D3
    nets = {}
    for net in ["rgb", "tg"] if args.nets == "both" else [args.nets]:
        nets[net] = Network(backbones.build(**build), project=args.nets == "both" and args.w_clr > 0)
        if args.sync_bn and run.device.type == "cuda" and run.world > 1:
            nets[net] = nn.SyncBatchNorm.convert_sync_batchnorm(nets[net])
        nets[net] = run.distribute(nets[net], args.channels_last, args.compile)
    return nets, build


def gather(x):
    """x (B, ...) of all ranks, (B of all ranks, ...) in their order; gradient flows back to every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return torch.cat(all_gather(x))


# -------------------------------------------------------------------------------- data


def windows(source, rng, args):
    """One window: frames t and, if a network sees TG, each followed by frame t + n."""
    usable = max(1, len(source) - args.interval)  # the frames t; the same for RGB alone
    t = dense(usable, args.frames, args.stride, rng)
    return [t if args.nets == "rgb" else modality.pictures_of(t, "tg", len(source), args.interval)]


def weak(clip, args, flip):
    """alpha (Sec. 4.2): a random region of random aspect ratio, resized; mirrored half of the time."""
    clip = augment.random_resized_crop(clip, args.size, tuple(args.area))
    return augment.random_flip(clip) if flip else clip


def strong(clip, args):
    """A (Sec. 4.2), applied to a weak view: RandAugment (D7)."""
    return augment.rand_augment(clip, *args.rand_augment)


def by_network(clip, args):
    """{net: (T, C, H, W)} of a clip that `windows` chose, which went through one crop and flip."""
    if args.nets == "rgb":
        return {"rgb": clip}
    x = {"rgb": clip[::2], "tg": modality.temporal_gradient(clip[::2], clip[1::2])}  # D6
    return x if args.nets == "both" else {"tg": x["tg"]}


def labelled_views(clips, args, flip):
    """{net: {view: clip}} of a labelled video's clip."""
    return {net: {"l": x} for net, x in by_network(weak(clips[0], args, flip), args).items()}


def unlabelled_views(clips, args, flip):
    """{net: {view: clip}} of an unlabelled video's clip."""
    x = by_network(weak(clips[0], args, flip), args)
    return {net: {"w": clip, "s": strong(clip, args)} for net, clip in x.items()}


# -------------------------------------------------------------------------------- training


def recipes_of(args):
    """{net: what it sees of a test video}."""
    side, inputs = args.test_size, dict(mean=RGB.mean, std=RGB.std)  # D6
    rgb = Recipe(args.frames, args.stride, args.clips, args.crops, side, side, **inputs)
    rgb = replace(rgb, average=args.average)
    return {"rgb": rgb, "tg": replace(rgb, modality="tg", interval=args.interval)}


def train(args, run):
    """One run: data, networks, steps, final test."""
    data = agreed(load_data, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video; TG needs one (mml.py takes it)")
    given = args.ratio, args.per_class, args.seed, args.labelled_list
    if args.eval:
        changes = {name: getattr(args, name) for name in ("clips", "crops", "average")}
        net, recipe = load_for(args.eval, data, run.device, **changes)
        labelled = agreed(labelled_subset, data, *given) if args.train_accuracy else []
        final_test(args, run, data, net, recipe, data.train.subset(labelled))
        return
    if data.name == "hmdb51":
        run.say("the paper's labels are drawn from the videos of hmdb51:all, not of hmdb51")

    # 1. Data: labelled videos, unlabelled videos (D1), and how many steps an epoch has.
    videos_l, videos_u = semi_supervised(data, *given, args.unlabelled, run.say)
    flip = data.flip if args.flip is None else args.flip
    is_known = (videos_u.labels >= 0).all()  # the true labels, for the log
    sample = partial(windows, args=args)
    view_l, view_u = (partial(view, args=args, flip=flip) for view in (labelled_views, unlabelled_views))
    sources = [(Clips(videos_l, sample, view_l, 2 * args.seed), args.batch),
               (Clips(videos_u, sample, view_u, 2 * args.seed + 1), args.batch * args.mu)]  # fmt: skip
    epoch = math.ceil(len(videos_u) / (args.batch * args.mu * run.world))  # D1
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))
    identity = dict(labelled=digest_of_videos(videos_l), unlabelled=digest_of_videos(videos_u),
                    classes=len(data.classes), net=f"{args.net} x{args.width}", nets=args.nets)  # fmt: skip
    if run.finished(identity):
        return

    # 2. Networks and optimiser.
    torch.manual_seed(args.seed)
    nets, build = build_networks(args, len(data.classes), run)
    recipes = recipes_of(args)
    parameters = [p for net in nets.values() for p in net.parameters()]
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch, "labelled clips")  # D2
    optimizer = optim.build(args.optimizer, parameters, lr, args.weight_decay)
    parts = {net: nets[net].module for net in nets} | {"optimizer": optimizer}

    # 3. Steps.
    start = run.resume(identity, **parts)
    run.write("labelled.txt", as_list(videos_l))
    clips = " + ".join(f"{batch * run.world}" for _, batch in sources)
    run.say(f"{total} steps, {epoch} an epoch, of {clips} clips; {rule}; {run.device.type}")
    loader = train_loader(sources, start, total, run.rank, run.world, args.workers)
    lists = [clips.videos for clips, _ in sources]
    for step, batches in run.steps(loader, start, total, args.seed, lists, every):
        if batches is None:  # between two steps
            tested = for_test(args, nets, build, data, recipes, run)
            evaluate.quick_test(tested, data.test, run, args.workers, step)
            continue
        x = {net: {view: recipes["rgb"].to_input(clips, run.device)  # of TG, too: the loader has computed it
                   for batch in batches for view, clips in batch["views"][net].items()}
             for net in nets}  # fmt: skip
        y_l, y_u = (batch["label"].to(run.device) for batch in batches)
        lam_u = args.lam_u * (step >= args.sup_warmup * epoch)  # D11
        with run.autocast():
            loss, terms, labels, y_w = train_step(nets, x, y_l, args, lam_u)
        optim.set_lr(optimizer, lr * optim.warmup_cosine(step, total, args.warmup * epoch, first=0.1))
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(parameters, args.clip_grad)  # D11
        optimizer.step()
        terms |= pseudo_label_report(labels, y_w, y_u if is_known else None)
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
        if run.due(step + 1, epoch):
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return

    # 4. Models and the final test of the student, or of the only network.
    if not every:
        tested = for_test(args, nets, build, data, recipes, run)
        if run.should_stop():  # perhaps before their statistics were complete
            return
    kept = next(iter(nets))
    if run.main:
        for net, (copy, recipe) in tested.items():
            file = run.out / ("model.pt" if net == kept else "teacher.pt")
            save_model(file, copy, build, data.classes, recipe)
    final_test(args, run, data, *tested[kept], videos_l)


def for_test(args, nets, build, data, recipes, run):
    """{net: (copy of its backbone with exact batch-norm statistics (D12), recipe)}, for tests alone."""
    copies = {}
    for net, module in nets.items():
        copy = backbones.build(**build)
        copy.load_state_dict(module.module.backbone.state_dict())
        run.to_device(copy, args.channels_last)
        if args.precise_bn:
            chosen = np.random.default_rng(args.seed).permutation(len(data.train))[: args.precise_bn]
            centre = replace(recipes[net], clips=1, crops=1, size=args.size)
            evaluate.precise_bn(copy, data.train.subset(np.sort(chosen)), centre, run, args.workers)
        copies[net] = copy, recipes[net]
    return copies


def final_test(args, run, data, net, recipe, videos_l):
    """All views of every test video and, for Table 6, of the labelled videos."""
    words = wanted(args, also=TEST)
    if args.train_accuracy:
        scores = evaluate.score(net, videos_l, recipe, run, args.workers, bar=True)
        words |= {} if scores is None else {"train_top1": evaluate.metrics(scores)["top1"]}
    evaluate.report({"net": (net, recipe)}, data, run, args.workers, **words)


@record
def main():
    args = parse_args()
    with Run("tg_distill", args.out, vars(args), free_flags(args, TEST)) as run:
        train(args, run)


if __name__ == "__main__":
    main()

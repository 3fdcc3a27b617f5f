"""Learning from Temporal Gradient for Semi-supervised Action Recognition.

Junfei Xiao, Longlong Jing, Lin Zhang, Ju He, Qi She, Zongwei Zhou, Alan Yuille, Yingwei Li. CVPR 2022.

Few videos have a label, most have none. A network that sees the temporal gradient (TG), the difference of
two near frames, learns actions from few labels far better than one that sees the frames: what stands still
is gone, and so are its colours. Here both are trained side by side as FixMatch on labels they make
together, and the RGB network is pulled to the TG network, in every stage of the backbone and in a common
embedding. A test needs the RGB network alone, so it costs what it did.

    frames t      } one crop   x_rgb --> RGB student --> four stages, embedding, p_rgb --+
    frames t + n  } and flip                                  ^           ^              |  mean >= tau ?
                                                              | Eq. 9     | Eq. 10       +----> label y
             their difference  x_tg  --> TG teacher  --> four stages, embedding, p_tg  --+     (Eq. 2, 5)

    weak x_rgb, x_tg:     all of the above
    strong, RandAugment of either: both networks learn y (Eq. 3)
    labelled x_rgb, x_tg: both learn the true label (Eq. 1); Eq. 9 and 10 as for weak ones

Equations:  Eq. 1 -> supervised_loss    Eq. 2, 5 -> fuse + pseudo_label    Eq. 3 -> unlabelled_loss
            Eq. 4, 6 -> fixmatch_loss   Eq. 7, 8 -> distance    Eq. 9 -> alignment_loss
            Eq. 10 -> contrastive_loss  Eq. 11 -> total_loss    all are called in train_step

Names: <what>_<net>_<view>, net rgb or tg, view l labelled, w weak, s strong; B_l labelled and B_u unlabelled
clips of a step, K classes, tau the threshold (gamma in the paper, whose tau is `--temperature`), n =
`--interval` frames between the two of a difference. "weak" is the paper's alpha, "strong" its A.

Run (8 GPUs, the paper's settings; then one process on the embedded data set, on a CPU too):

    torchrun --nproc_per_node 8 tg_distill.py --data ucf101
    torchrun --nproc_per_node 8 tg_distill.py --data hmdb51:all
    python tg_distill.py --data toy

Table 1's rows: `--w_kd 0 --w_clr 0` (FixMatch, RGB alone), `--w_clr 0`, `--w_kd 0`, and all.
FixMatch on TG: `--nets tg`. The teacher is kept as teacher.pt: `--eval RUN/teacher.pt`.

Differences from the paper, and what it leaves open ("the code" is what its authors published):

D1  An epoch is one pass over the unlabelled videos, which are all training videos, labelled or not,
    as in the code; `--unlabelled rest` leaves the labelled ones out. Labels are drawn balanced, those of
    VideoSSL's lists, which the paper has (`--labelled_list`), are not. UCF-101 5, 10, 20, 50 %: 505, 1010,
    1919, 4848 videos, the lists have 476, 953, 1907, 4768 (20 %: 19 a class and 8 to 34).
    HMDB-51 40, 50, 60 % of `hmdb51:all`, the 5236 videos that are no test videos (`hmdb51` has the 3570 of
    the official list): 2142, 2652, 3162, the lists have 2094, 2618, 3141 (50 %: 52 a class and 30 to 272).
D2  The paper's learning rate, 0.2, is for 8 GPUs with 5 labelled clips each (Kinetics-400: 8, D11); it
    scales linearly with the labelled clips of a step over all GPUs (`--lr_batch`).
D3  The backbone has the max-pool that Table 4's sizes want (56 x 56 after conv1), as in the code;
    torchvision's R3D-18 has none and 3.6 times the operations: `--net r3d_18`. Its batch norm has the
    code's epsilon, 1e-3 (that of the heads 1e-5).
D4  Eq. 5 takes the mean of the probabilities; the code takes that of the logits: `--fuse logits`.
D5  lambda_u is not given: 1, as in the code. The mean of Eq. 3 is over all B_u clips, kept or not. A
    network that is trained alone learns by Eq. 4 as it is (`--w_fm` 1), as in the code.
D6  TG is made of the cropped frames, so that student and teacher see the same pixels, and rounded down
    to whole grey levels, which the code does in files; `--no-tg_round` keeps the half levels (but not
    in strong views). RGB and TG are normalised alike, with ImageNet's mean and deviation.
D7  The strong view is the weak one after RandAugment, on TG as if it were a picture and drawn for RGB
    and TG apart, as in the code. The code's has a fixed strength, signs drawn once per process, and also
    inversion and Cutout; here strength and sign are drawn for each clip.
D8  All clips of a network go through it in one pass, as in the code: batch norm, synchronised over GPUs
    (`--no-sync_bn`), sees the mixture, and the weak views that make labels have dropout. Weight decay
    acts on every parameter.
D9  Eq. 8 has no normaliser: means over clips and positions, 1 - cos in place of -cos (the same gradient),
    and for L1 and L2 mean absolute and mean squared differences. Eq. 9 sums over the stages.
D10 Eq. 10 both ways, RGB to TG and back, halved; negatives are of the other modality only, from all
    GPUs, with their gradient, as in the code. The heads are of the backbone's width (512), drawn with
    deviation 0.01, with batch norm after each layer, the last without scale and shift.
D11 The warm-ups last 30 epochs on UCF-101, 60 on HMDB-51, 10 and 15 on Kinetics-400, as in the code: the
    learning rate rises from a tenth, and Eq. 3 counts only afterwards. Gradients are clipped to norm 40.
    On Kinetics-400 a GPU has 8 + 8 clips, as in the code; Sec. 4.2 says 5 + 5 for all.
D12 PreciseBN renews the statistics of a copy, at every test and for the network tested, from centre crops
    of `--precise_bn` training videos; the code's 200 batches of 40 (HMDB-51: 120). They pool all clips,
    where the code averages the variances of batches.
D13 Test clips are spread evenly from the first to the last frame; the code's stand in the middle of ten
    equal parts. Their logits are averaged, as in the code; `--average softmax`.
D14 Corruptions (Table 5) have imgaug's range, a factor in 0.5 to 1.5, drawn once per video.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torchvision.transforms.v2 import functional as V

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import UserError, augment, backbones, datasets, evaluate, optim, show, video
from common.flags import Parser, free_flags, wanted
from common.run import Run, agreed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # D6
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
# 90 real clips of 180 x 144 pixels; a folder with lists. At 73 pixels (8/7) the last stage is 3 x 3 in
# place of 2 x 2, which so small a network has never seen: it then forgets even its labelled clips.
RECIPES["weizmann"] = RECIPES["toy"] | dict(
    per_class=2, size=64, test_size=64, epochs=50, warmup=3, sup_warmup=6, precise_bn=60, eval_every=25
)

TEST = "average", "corrupt", "train_accuracy"  # flags of --eval that make it another test


def parse_args(argv=None):
    p = Parser("tg_distill", __doc__, RECIPES)
    g = p.data(unlabelled="all")  # D1
    g.add_argument("--area", type=float, nargs=2, default=[0.08, 1.0], help="of the random crop, a share")
    g.add_argument("--interval", type=int, default=1, help="n of TG; 1 fast, 7 slow, Table 3a")
    g.add_argument("--tg_round", action=argparse.BooleanOptionalAction, default=True, help="D6")
    g = p.add_argument_group("method")
    g.add_argument("--nets", choices=["both", "rgb", "tg"], help="rgb if --w_kd 0 --w_clr 0, else both")
    g.add_argument("--w_fm", type=float, help="weight of FixMatch, Eq. 11: 0.5; 1 for one network, Eq. 4, D5")
    g.add_argument("--w_kd", type=float, default=1.0, help="weight of the alignment, Eq. 11")
    g.add_argument("--w_clr", type=float, default=1.0, help="weight of the contrast, Eq. 11")
    g.add_argument("--lam_u", type=float, default=1.0, help="weight of L_u, Eq. 6, D5")
    g.add_argument("--tau", type=float, default=0.3, help="confidence threshold gamma, Eq. 2, 5, Sec. 4.2")
    g.add_argument("--mu", type=int, default=1, help="B_u / B_l")
    g.add_argument("--pseudo", choices=["avg", "rgb", "tg", "self"], default="avg", help="Table 3d")
    g.add_argument("--fuse", choices=["probs", "logits"], default="probs", help="D4")
    g.add_argument("--align", choices=["cosine", "l1", "l2"], default="cosine", help="D of Eq. 8, Table 3b")
    g.add_argument("--align_stages", default="1,2,3,4", help="Table 3e")
    g.add_argument("--stopgrad", action=argparse.BooleanOptionalAction, default=True, help="Eq. 9, Table 3c")
    g.add_argument("--temperature", type=float, default=0.5, help="tau of Eq. 10, Table 3g")
    g.add_argument("--net", default="r3d_18-pool", help="backbone of both networks, D3")
    g.add_argument("--width", type=float, default=1.0, help="width of the backbones")
    g.add_argument("--dropout", type=float, default=0.5, help="before the classifier, Sec. 4.2")
    g.add_argument("--frames", type=int, default=8, help="frames of a clip")
    g.add_argument("--stride", type=int, default=8, help="frames from one to the next")
    g.add_argument("--rand_augment", type=int, nargs=2, default=[2, 9], help="operations, magnitude, D7")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, default=180, help="Sec. 4.2, D1")
    g.add_argument("--batch", type=int, default=5, help="labelled clips per GPU and step (B_l)")
    g.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="sgd has momentum 0.9")
    g.add_argument("--lr", type=float, default=0.2, help="for --lr_batch clips a step, D2; cosine to 0")
    g.add_argument("--lr_batch", type=int, default=40, help="labelled clips of a step, of all GPUs, for --lr")
    g.add_argument("--weight_decay", type=float, default=1e-4, help="Sec. 4.2")
    g.add_argument("--warmup", type=float, default=30, help="epochs of a rising learning rate, Table 3f, D11")
    g.add_argument("--sup_warmup", type=float, default=30, help="epochs without L_u, Table 3f, D11")
    g.add_argument("--clip_grad", type=float, default=40.0, help="norm of the gradient; 0: as it is, D11")
    g.add_argument("--sync_bn", action=argparse.BooleanOptionalAction, default=True, help="on several GPUs")
    g.add_argument("--precise_bn", type=int, default=8000, help="training videos; 0: off, Table 3f, D12")
    g = p.run()
    g.add_argument("--average", choices=["logits", "softmax"], default="logits", help="of test views, D13")
    g.add_argument("--train_accuracy", action=argparse.BooleanOptionalAction, default=True,
                   help="test the labelled videos too, Table 6")  # fmt: skip
    g.add_argument("--corrupt", choices=list(CORRUPTIONS), help="test videos of --eval, Table 5")
    g.add_argument("--cam", metavar="DIR", help="Grad-CAM sheets of --eval, Fig. 4")
    g.add_argument("--cam_with", metavar="MODEL.PT", nargs="*", default=[], help="more models for the sheets")
    g.add_argument("--cam_videos", type=int, default=8, help="number of sheets")
    g.add_argument("--features", metavar="FILE.NPZ", help="embeddings of the test set by --eval, Fig. 5")
    args = p.parse(argv, also=TEST)
    p.at_least(1, args, "batch", "lr_batch", "mu", "frames", "stride", "interval", "cam_videos")
    p.at_least(0, args, "w_fm", "w_kd", "w_clr", "lam_u", "epochs", "lr", "weight_decay", "warmup",
               "sup_warmup", "clip_grad", "precise_bn")  # fmt: skip
    p.share(args, "tau")
    p.rand_augment(args)
    if not 0 < args.temperature < math.inf:
        p.error(f"--temperature must be positive, not {args.temperature}")
    if not 0 < args.area[0] <= args.area[1] <= 1:
        p.error(f"--area is a range of shares such as 0.08 1, not {args.area[0]} {args.area[1]}")
    stages = args.align_stages.split(",")
    if not set(stages) <= set("1234") or len(set(stages)) < len(stages):
        p.error(f"--align_stages lists stages such as 1,2,3,4, not {args.align_stages}")
    if args.cam_with and not args.cam:
        p.error("--cam_with needs the folder of the sheets: --cam DIR")
    if not args.eval and (args.corrupt or args.cam or args.features):
        p.error("--corrupt, --cam and --features test a trained model: give it with --eval MODEL.PT")
    args.nets = args.nets or ("both" if args.w_kd or args.w_clr else "rgb")
    if args.w_fm is None:
        args.w_fm = 0.5 if args.nets == "both" else 1.0
    if args.nets != "both":  # there is nothing to align and nobody to label with
        args.w_kd = args.w_clr = 0.0
        args.pseudo = "self"
    return args


# -------------------------------------------------------------------------------- the method


def temporal_gradient(x, x_next, rounded=True):
    """TG = (x_t - x_{t+n} + 255) / 2 (Sec. 1 and Suppl. A), 127.5 where nothing moves.

    x, x_next uint8 (..., T, C, H, W), frames t and t + n. Returns uint8, rounded down, or exact float16.
    """
    difference = x.to(torch.int16) - x_next + 255
    return (difference >> 1).to(torch.uint8) if rounded else difference.half() / 2


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
    The mean is over all B_u clips, so an empty C means loss 0.
    """
    return (F.cross_entropy(logits_s, y, reduction="none") * mask).mean()


def fixmatch_loss(loss_l, loss_u, lam_u):
    """Eq. 4, 6: L_fm = L_l + lambda_u L_u, of one network (Eq. 4: lambda_u = 1)."""
    return loss_l + lam_u * loss_u


def fuse(logits_w, pseudo, mean):
    """Eq. 5: p = (f_R(alpha(x^RGB)) + f_T(alpha(x^TG))) / 2, what each network's labels are made of.

    logits_w {net: (B_u, K)} of the weak views, detached here. pseudo (Table 3d): the average ("avg", of
    probabilities or, with mean="logits", of logits), one network's p for both, or each network's "self".
    Returns {net: (B_u, K)} probabilities.
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

    f_rgb, f_tg (B, C, T, H, W) outputs of one stage. Normalised as D9 says; gradient flows into both.
    """
    f_rgb, f_tg = f_rgb.float(), f_tg.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(f_rgb, f_tg, dim=1).mean()  # D9
    return F.l1_loss(f_rgb, f_tg) if kind == "l1" else F.mse_loss(f_rgb, f_tg)


def alignment_loss(f_rgb, f_tg, kind, stages, stopgrad=True):
    """Eq. 9: L_kd = sum_i D(F_i^RGB, stopgrad(F_i^TG)), the teacher detached.

    f_rgb, f_tg: outputs of the four stages for labelled and weak clips; stages: which of 1..4 are aligned;
    stopgrad False: the teacher learns from it too (Table 3c).
    """
    if stopgrad:
        f_tg = [f.detach() for f in f_tg]
    return sum(distance(f_rgb[i - 1], f_tg[i - 1], kind) for i in stages)


def contrastive_loss(z_rgb, z_tg, temperature):
    """Eq. 10: L_clr = -log exp(sim(q, k+) / tau) / sum_k exp(sim(q, k) / tau), sim the cosine.

    z_rgb, z_tg (B, D), row i of both from clip i. Queries are this rank's, keys those of the other modality
    on all ranks, gradient into both; the mean over queries and both ways. With the ranks' gradients
    averaged, as DDP does, that is the loss and gradient of the joint batch.
    """
    with torch.autocast(z_rgb.device.type, enabled=False):  # similarities in float32
        q_rgb, q_tg = F.normalize(z_rgb.float(), dim=1), F.normalize(z_tg.float(), dim=1)
        k_rgb, k_tg = gather(q_rgb), gather(q_tg)  # (B of all ranks, D)
        positive = torch.arange(len(q_rgb), device=q_rgb.device) + rank() * len(q_rgb)
        to_tg = F.cross_entropy(q_rgb @ k_tg.T / temperature, positive)
        to_rgb = F.cross_entropy(q_tg @ k_rgb.T / temperature, positive)
    return (to_tg + to_rgb) / 2  # D10


def total_loss(loss_fm, loss_kd, loss_clr, w_fm, w_kd, w_clr):
    """Eq. 11: L = w_fm (L_fm^RGB + L_fm^TG) + w_kd L_kd + w_clr L_clr; loss_fm holds one per network."""
    return w_fm * sum(loss_fm) + w_kd * loss_kd + w_clr * loss_clr


def train_step(nets, x, y_l, args, lam_u):
    """The loss of one step, its terms by name; for the log {net: (labels, mask)} and {net: its own labels}.

    nets: {"rgb": student, "tg": teacher}, or one of them for FixMatch; x: {net: (labelled, weak, strong)}
    clips (B, C, T, H, W); lam_u is 0 in the supervised warm-up.
    """
    logits_l, logits_w, logits_s, f, z = {}, {}, {}, {}, {}
    for net, clips in x.items():
        sizes = [len(part) for part in clips]
        logits, f[net], z[net] = nets[net](torch.cat(clips), sizes[0] + sizes[1])  # D8
        logits_l[net], logits_w[net], logits_s[net] = logits.split(sizes)
    loss_l = {net: supervised_loss(logits, y_l) for net, logits in logits_l.items()}  # Eq. 1
    p_w = fuse(logits_w, args.pseudo, args.fuse)  # Eq. 5
    labels = {net: pseudo_label(p, args.tau) for net, p in p_w.items()}  # Eq. 2
    loss_u = {net: unlabelled_loss(logits_s[net], *labels[net]) for net in nets}  # Eq. 3
    loss_fm = [fixmatch_loss(loss_l[net], loss_u[net], lam_u) for net in nets]  # Eq. 4, 6
    terms = {f"loss_l_{net}": loss for net, loss in loss_l.items()}
    terms |= {f"loss_u_{net}": loss for net, loss in loss_u.items()}
    loss_kd = loss_clr = 0.0
    if args.w_kd:
        stages = [int(i) for i in args.align_stages.split(",")]
        loss_kd = alignment_loss(f["rgb"], f["tg"], args.align, stages, args.stopgrad)  # Eq. 9
        terms["loss_kd"] = loss_kd
    if args.w_clr:
        loss_clr = contrastive_loss(z["rgb"], z["tg"], args.temperature)  # Eq. 10
        terms["loss_clr"] = loss_clr
    loss = total_loss(loss_fm, loss_kd, loss_clr, args.w_fm, args.w_kd, args.w_clr)  # Eq. 11
    return loss, terms, labels, {net: logits.argmax(1) for net, logits in logits_w.items()}


def gather(x):
    """x (B, ...) of all ranks in one tensor, in their order; the gradient finds its way back."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return Gather.apply(x)


class Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # every rank's loss depends on this rank's part
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def pseudo_label_report(labels, y_w, y_true):
    """Shares of the unlabelled batch, for the log alone: the true labels never train.

    kept_*, right_*: of the labels that a network learns, confident, and confident and right;
    weak_top1_*: what the network itself says on the weak view is right.
    """
    found = {}
    for net, (y, mask) in labels.items():
        found[f"kept_{net}"] = mask.mean()
        found[f"right_{net}"] = (mask * (y == y_true)).mean()
        found[f"weak_top1_{net}"] = (y_w[net] == y_true).float().mean()
    return found


# -------------------------------------------------------------------------------- networks


class Network(nn.Module):
    """A backbone and, for Eq. 10, its projection head; one call gives all that a step needs of it."""

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
    """{net: Network under DDP}, and the arguments of their backbones."""
    build = dict(name=args.net, classes=classes, width=args.width, dropout=args.dropout, bn_eps=1e-3)  # D3
    nets = {}
    for net in ["rgb", "tg"] if args.nets == "both" else [args.nets]:
        nets[net] = Network(backbones.build(**build), project=args.w_clr > 0)
        if args.sync_bn and run.device.type == "cuda" and run.world > 1:
            nets[net] = nn.SyncBatchNorm.convert_sync_batchnorm(nets[net])
        nets[net] = run.distribute(nets[net], args.channels_last, args.compile)
    return nets, build


def for_test(net, build, args, data, recipe, run):
    """A copy of the backbone of `net` with exact batch-norm statistics (D12); training never sees it."""
    copy = backbones.build(**build)
    copy.load_state_dict(net.module.backbone.state_dict())
    run.place(copy, args.channels_last)
    if args.precise_bn:
        chosen = np.random.default_rng(args.seed).permutation(len(data.train))[: args.precise_bn]
        centre = replace(recipe, clips=1, crops=1, size=args.size)
        evaluate.precise_bn(copy, data.train.subset(np.sort(chosen)), centre, run, args.workers)
    return copy


# -------------------------------------------------------------------------------- data


def windows(source, rng, args):
    """Indices of the frames t of a clip and, behind them, of the frames t + n, decoded together."""
    usable = max(1, len(source) - args.interval)  # frames with one n after them; for RGB alone as well
    t = video.dense(usable, args.frames, args.stride, rng)
    return [t if args.nets == "rgb" else with_next(t, len(source), args.interval)]


def with_next(t, length, interval):
    """(2T,) frames t and t + n."""
    return np.concatenate([t, np.minimum(t + interval, length - 1)])


def weak(clip, args):
    """alpha (Sec. 4.2): a random region of random aspect ratio, resized; mirrored half of the time."""
    clip = augment.random_resized_crop(clip, args.size, tuple(args.area))
    return augment.random_flip(clip) if args.flip else clip


def strong(clip, args):
    """A (Sec. 4.2), applied to a weak view: RandAugment (D7)."""
    return augment.rand_augment(clip.to(torch.uint8), *args.rand_augment)


def networks_views(clip, args):
    """{net: (T, C, H, W)} of a clip of frames t and t + n, which went through one crop and flip."""
    if args.nets == "rgb":
        return {"rgb": clip}
    x, x_next = clip.chunk(2)
    tg = temporal_gradient(x, x_next, args.tg_round)
    return {"rgb": x, "tg": tg} if args.nets == "both" else {"tg": tg}


def labelled_views(clips, args):
    """The weak view of each network."""
    return tuple(networks_views(weak(clips[0], args), args).values())


def unlabelled_views(clips, args):
    """(weak, strong) of each network."""
    views = networks_views(weak(clips[0], args), args).values()
    return tuple(view for x in views for view in (x, strong(x, args)))


def clips_of_networks(nets, views_l, views_u):
    """{net: (labelled, weak, strong)} out of what the two functions above return."""
    return {net: (views_l[i], *views_u[2 * i : 2 * i + 2]) for i, net in enumerate(nets)}


# What a test video is changed by (Table 5, D14): frames (T, C, H, W) uint8, factor.
CORRUPTIONS = {
    "contrast": V.adjust_contrast,
    "brightness": V.adjust_brightness,
    "grayscale": lambda x, factor: V.rgb_to_grayscale(x, num_output_channels=3),
}


@dataclass(frozen=True)
class TestRecipe(evaluate.Recipe):
    """A Recipe for a network on TG (interval n, or 0 for RGB), or for corrupted videos."""

    interval: int = 0
    rounded: bool = True
    corrupt: str | None = None

    def sample(self, source):
        """Frame indices of the clips; for TG the frames t and then the frames t + n."""
        if not self.interval:
            return super().sample(source)
        usable = max(1, len(source) - self.interval)
        clips = video.dense_test(usable, self.frames, self.stride, self.clips)
        return [with_next(t, len(source), self.interval) for t in clips]

    def view(self, clips):
        """uint8 clips to views (V, T, C, size, size) of RGB or TG."""
        if self.corrupt:
            factor = 0.5 + float(torch.rand(()))  # one for all clips
            clips = [CORRUPTIONS[self.corrupt](clip.contiguous(), factor) for clip in clips]
        x = super().view(clips)
        return temporal_gradient(*x.chunk(2, dim=1), self.rounded) if self.interval else x


def recipes_of(args):
    """{net: how it sees a test video}; the RGB network's needs nothing of this script."""
    side = args.test_size  # short side and crop
    same = dict(clips=args.clips, crops=args.crops, short_side=side, size=side, average=args.average)
    rgb = evaluate.Recipe(args.frames, args.stride, **same, mean=MEAN, std=STD)
    return {"rgb": rgb, "tg": TestRecipe(**asdict(rgb), interval=args.interval, rounded=args.tg_round)}


# -------------------------------------------------------------------------------- training


def train(args, run):
    """One run: data, networks, steps, final test."""
    data = agreed(datasets.load, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video; this method needs one (mml.py takes it)")
    if args.eval:
        return test_only(args, data, run)
    if data.name == "hmdb51":
        run.say("the paper's labels are drawn from the videos of hmdb51:all (D1), not of hmdb51")
    args.flip = data.flip if args.flip is None else args.flip
    recipes = recipes_of(args)
    videos_l, videos_u = datasets.semi_supervised(
        data, args.ratio, args.per_class, args.seed, args.labelled_list, args.unlabelled, run.say
    )
    sample, view_l, view_u = (partial(f, args=args) for f in (windows, labelled_views, unlabelled_views))
    sources = [(video.Clips(videos_l, sample, view_l, 2 * args.seed), args.batch),
               (video.Clips(videos_u, sample, view_u, 2 * args.seed + 1), args.batch * args.mu)]  # fmt: skip
    epoch = math.ceil(len(videos_u) / (args.batch * args.mu * run.world))  # D1
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))

    torch.manual_seed(args.seed)
    nets, build = build_networks(args, len(data.classes), run)
    parameters = [p for net in nets.values() for p in net.parameters()]
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch, "labelled clips")  # D2
    optimizer = optim.build(args.optimizer, parameters, lr, args.weight_decay)
    parts = {name: net.module for name, net in nets.items()} | {"optimizer": optimizer}
    identity = dict(labelled=datasets.digest(videos_l), unlabelled=datasets.digest(videos_u),
                    classes=len(data.classes), net=f"{args.net} x{args.width}", nets=args.nets)  # fmt: skip

    start = run.resume(identity, **parts)
    run.write("labelled.txt", datasets.as_list(videos_l))
    clips = " + ".join(f"{batch * run.world}" for _, batch in sources)
    run.say(f"{total} steps, {epoch} an epoch, of {clips} clips; {rule}; {run.device.type}")
    loader = video.train_loader(sources, start, total, run.rank, run.world, args.workers)
    lists, test = [videos_l, videos_u], partial(quick_test, args, run, data, nets, build, recipes)
    for step, (batch_l, batch_u) in run.steps(loader, start, total, args.seed, lists, epoch, test, every):
        views_l, views_u = ([recipes["rgb"].to_input(x, run.device) for x in batch["views"]]
                            for batch in (batch_l, batch_u))  # fmt: skip
        x, y_l = clips_of_networks(nets, views_l, views_u), batch_l["label"].to(run.device)
        lam_u = args.lam_u * (step >= args.sup_warmup * epoch)  # D11
        with run.autocast():
            loss, terms, labels, y_w = train_step(nets, x, y_l, args, lam_u)
        optim.set_lr(optimizer, lr * optim.warmup_cosine(step, total, args.warmup * epoch, first=0.1))
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(parameters, args.clip_grad)  # D11
        optimizer.step()
        terms |= pseudo_label_report(labels, y_w, batch_u["label"].to(run.device))
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
    if run.stopped:
        return
    tested = test(total)
    if tested is None:
        run.say("stopped by a signal before the test; the same command goes on with it")
        return
    kept = next(iter(nets))  # the student, or the only network
    if run.main:
        for name, net in tested.items():
            path = run.out / ("model.pt" if name == kept else "teacher.pt")
            evaluate.save_model(path, net, build, data.classes, recipes[name])
    final_test(args, run, data, tested[kept], recipes[kept], videos_l if args.train_accuracy else None)


def quick_test(args, run, data, nets, build, recipes, step):
    """One view per test video for each network into the log, unless --eval_every is 0.

    Returns the copies that are tested, {net: backbone}, or None if a signal has stopped a rank.
    """
    row, tested = {"step": step, "eval": "quick"}, {}
    for name, net in nets.items():
        tested[name] = for_test(net, build, args, data, recipes[name], run)
        if not args.eval_every:
            continue
        recipe = replace(recipes[name], clips=1, crops=1)
        scores = evaluate.score(tested[name], data.test, recipe, run, args.workers)
        if scores is None:
            return None
        found = evaluate.metrics(scores)
        row |= {f"{name}_{key}": round(found[key], 4) for key in ("top1", "top5", "mean_class")}
    if run.told_to_stop():  # perhaps before the statistics of the copies were complete
        return None
    if args.eval_every:
        run.log(row)
    return tested


def final_test(args, run, data, net, recipe, videos_l):
    """All views of every test video and, for Table 6, of the labelled videos if they are given."""
    words = wanted(args, also=TEST)
    if videos_l is not None:
        scores = evaluate.score(net, videos_l, recipe, run, args.workers, bar=True)
        words |= {} if scores is None else {"train_top1": evaluate.metrics(scores)["top1"]}
    evaluate.report(net, data, recipe, run, args.workers, **words)


# -------------------------------------------------------------------------------- after training


def test_only(args, data, run):
    """--eval: the test, the accuracy on the labelled videos that lie beside the model, and the figures."""
    changes = dict(clips=args.clips, crops=args.crops, average=args.average, corrupt=args.corrupt)
    net, recipe = evaluate.load_for(args.eval, data, run.device, TestRecipe, **changes)
    beside, videos_l = Path(args.eval).with_name("labelled.txt"), None
    if args.train_accuracy and not args.corrupt and run.on_main(beside.exists):
        try:
            chosen = run.on_main(partial(datasets.labelled, data, listfile=str(beside)))
            videos_l = data.train.subset(chosen)
        except UserError as error:  # trained on another data set
            run.say(f"no accuracy on labelled videos: {error}")
    if args.cam:
        models = {args.eval: (net, recipe)}
        models |= {path: evaluate.load_for(path, data, run.device, TestRecipe) for path in args.cam_with}
        run.on_main(show.cam_sheets, args.cam, data.test, data.classes, models, args.cam_videos, run.device)
    if args.features:
        evaluate.save_features(args.features, net, data.test, data.classes, recipe, run, args.workers)
    final_test(args, run, data, net, recipe, videos_l)


@record
def main():
    args = parse_args()
    often = args.log_every, args.max_bad, args.save_minutes
    with Run("tg_distill", args.out, vars(args), free_flags(args, TEST), *often) as run:
        if args.eval or not run.finished():
            train(args, run)


if __name__ == "__main__":
    main()

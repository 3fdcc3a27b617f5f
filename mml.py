"""Mutual Modality Learning for Video Action Classification.

S. A. Komkov, M. D. Dzabraev, A. A. Petiushko. Computer Optics 47(4), 2023.

Networks that see different modalities of a video, RGB, optical flow, RGB differences, are better together
than alone, but a test that runs all of them is expensive. Here they teach each other instead: each learns the
true label and what the others say of the same moment, so that one of them, tested alone, knows something of
what only the others can see. Where they start matters as much: from an RGB network trained on the same
videos, whatever the modality. The best single network comes from three such trainings in a row.

    video --> frames i + xi ---------> RGB  network --> p_1 --+--> Eq. 3: each network minimises
          |                                                   |    KL(mean of the others || itself),
          +-> 5 fields of flow at i -> Flow network --> p_2 --+    the others are detached,
          |                                                   |
          +-> 5 differences at i ----> Diff network --> p_3 --+    and cross-entropy (Eq. 1, 2)

    --pipeline (Fig. 1):  1 RGB; RGB, each by cross-entropy, of two seeds --> 2 RGB + RGB mutual
                          --> 3 RGB + Flow (+ Diff) mutual

Equations:  Eq. 1, 2 -> network_loss, its L_CE (and Appendix 2) -> classification_loss
            Eq. 3 -> kl_loss    Eq. 4, for any number of networks -> mean_of_others
            MARS, D3D (Sec. 3.3, Appendix 2) -> mars_loss, d3d_loss      all are called in train_step
            Sec. 2.1 -> weights.load_weights      Sec. 2.3, 3.1.1 -> windows
            Appendix 1 -> clips.dense_parts, clips.uniform_test, by recipe_of
            Appendix 3 -> common/tools/ensemble.py

Names: <what>_<net>, net rgb, flow or diff, a second one rgb2; M networks, K classes, i the first frames of a
clip's input frames, xi their common offset; teacher: the frozen network of MARS and D3D.

Run (8 GPUs, the paper's pipeline; then one process on the embedded data set, on a CPU too):

    python -m common.tools.flow ssv2 --out data/ssv2_flow
    torchrun --nproc_per_node 8 mml.py --data ssv2 --pipeline --nets rgb,flow
    python mml.py --data toy:mini

One training: `--nets` lists the networks, `--init` where each starts, `--lam 0` is cross-entropy alone.
`--mutual mars --teacher RUN/flow.pt` (or d3d) are the methods it is compared with. Ensembles are tested by
`python -m common.tools.ensemble`; the best (Fig. 3) are of `--nets flow,flow --init A.pt,B.pt`, with A and B
from two runs of step 2, and likewise for each modality.

Differences from the paper, and what it leaves open ("the code" is what its authors published):

D1  All training videos have labels; `--ratio` and the like train on fewer, as the toy recipe does (10 %).
D2  The paper's learning rate, 0.025, is for its 64 clips a step (Charades: 0.0375 for 16); it scales
    linearly with the clips of a step over all GPUs (`--lr_batch`).
D3  As TSM's code ("standard setup"): weight decay 1e-4 on convolutions and the classifier's weight alone;
    a new classifier learns `--fc_lr` times as fast, biases twice that; gradients are clipped to norm 20.
D4  Dense sampling takes every 4th frame (8 frames out of 32), as in the code; the paper has no number. With
    Table 9's 16 frames that is `--frames 16 --stride 2`.
D5  Uniform clip i of m is at (i / m) T / N, as in the example of Appendix 1, whose formula is i m T / N; a
    single one takes the centres of the segments (code). T is N for RGB, N - 5 for flow and differences.
D6  The networks of a step see one crop, of TSN's four scales. Something-Something is never mirrored, as in
    the code; where labels allow it is done, and the flow's u changes sign.
D7  Flow is 8-bit, 128 no motion, 20 pixels the bound; normalised by 0.5 and 0.226, differences of frames in
    0..255 by 255 alone, as in the code.
D8  Eq. 4 takes the mean of the probabilities; the code takes that of the logits: `--mean logits`. What
    the others say is detached, as in the code: no network is pulled to the one it teaches.
D9  With several labels per video p is a sigmoid for each class and Eq. 3 the divergence of two coins; the
    paper gives its normaliser only (Appendix 2).
D10 MARS: mean squared difference of the last stage's output before pooling. D3D: squared distance of the
    logits, mean over the clips. Their weights are 50 and 1, divided by K with several labels (Appendix 2).
D11 All networks step in one process per GPU; the code has a process per modality. Batch norm is each GPU's.
D12 The last weights are kept; the code keeps the best of the test set.
D13 Views' logits are averaged, as in the code; `--average softmax`.
D14 Charades (Sec. 3.1.2) has SlowFast's optimiser, epochs and batch for I3D-R50, but a clip has all labels
    of its video, and TSN's crop, batch norm of one GPU, the mean of 10 x 3 views and ImageNet are used.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import augment, backbones, evaluate, modality, optim
from common.clips import Clips, dense, train_loader, uniform
from common.data import as_list, digest_of_videos, labelled_subset, load_data
from common.errors import UserError
from common.flags import Parser, at_least, free_flags, wanted
from common.io.models import load_for, save_model
from common.io.weights import PUBLISHED, fetch
from common.modality import MODALITIES, Recipe
from common.run import Run, agreed

LAM = {"kl": 1.0, "mars": 50.0, "d3d": 1.0}  # weights of the second loss, Eq. 1, 2 and Appendix 2
# Defaults per data set (the flags' own defaults are Something-Something's). Sec. 3.1.
RECIPES = {
    "ssv2": {},
    "charades": dict(
        net="i3d50", frames=16, stride=8, sampling="dense", batch=2, lr=0.0375, lr_batch=16,
        epochs=57, lr_steps=[41, 49], warmup=4, fc_lr=1, clip_grad=0, clips=10, uniform=0, crops=3,
    ),  # D14
    "toy": dict(  # D10: with a weight of 1, D3D's term starts hundreds of times as large as cross-entropy
        per_class=8, net="tsm10", width=0.25, init="none", size=40, batch=16, lr=0.015, lr_batch=16,
        optimizer="adamw", weight_decay=0.05, lr_steps=[], epochs=32, warmup=3, fc_lr=1, dropout=0.0,
        test_size=48, eval_every=16, workers=1, channels_last=True, lam=LAM | {"d3d": 0.001},  # D10
    ),
}  # fmt: skip
RECIPES["toy:multi"] = RECIPES["toy"] | dict(per_class=None, ratio=0.1, lam=LAM)
RECIPES["small"] = RECIPES["toy"] | dict(per_class=6, size=64, test_size=64, epochs=60, eval_every=30)
KINDS = ("rgb", "flow", "diff")  # of the modalities those of the paper
SECOND_SEED = 1000  # what --pipeline adds to --seed for the second network of its first step
TEST = "uniform", "test_crop", "average"  # flags of --eval that make it another test


def parse_args(argv=None):
    p = Parser("mml", __doc__, RECIPES)
    add = p.data(unlabelled=None, ratio=1.0).add_argument  # D1
    add("--label_seed", type=at_least(0), help="seed of the labelled subset; default: --seed")
    add("--flow", metavar="DIR", help="extracted optical flow; default: <root>_flow")
    add = p.add_argument_group("method").add_argument
    add("--nets", default="rgb,flow", help="networks: rgb, flow, diff, also twice: rgb,rgb")
    add("--init", default="imagenet",
        help="initial weights, one for all networks or one for each, with commas: imagenet, "
        "kinetics, none or a file (Sec. 2.1)")  # fmt: skip
    add("--pipeline", action="store_true",
        help="train the three steps of Fig. 1, of which the third has --nets")  # fmt: skip
    add("--mutual", choices=list(LAM), default="kl", help="mutual loss, or a teacher's: mars, d3d (Sec. 3.3)")
    add("--teacher", metavar="MODEL.PT", help="frozen network of --mutual mars and d3d")
    add("--lam", type=at_least(0.0), default=LAM,
        help="weight of the second loss, which follows from --mutual; 0: cross-entropy alone")  # fmt: skip
    add("--mean", choices=["probs", "logits"], default="probs",
        help="average the other networks' probabilities or logits, Eq. 4 (D8)")  # fmt: skip
    add("--net", default="tsm50", help="backbone of all networks")
    add("--width", type=float, default=1.0, help="channel multiplier of the backbones")
    add("--dropout", type=float, default=0.5, help="dropout rate before the classifiers")
    add("--frames", type=at_least(1), default=8, help="input frames of a clip (T of Sec. 2.3)")
    add("--sampling", choices=["both", "uniform", "dense"], default="both",
        help="how training clips are sampled; both: at random (Sec. 3.1.1)")  # fmt: skip
    add("--stride", type=at_least(1), default=4, help="distance of the frames of a dense clip (D4)")
    add = p.optimisation("clips", "training videos", epochs=50, batch=8, lr=0.025, lr_batch=64,
                         weight_decay=1e-4).add_argument  # D2, D3  # fmt: skip
    add("--lr_steps", type=float, nargs="*", default=[20, 40],
        help="epochs at which --lr falls to a tenth; none: cosine to 0")  # fmt: skip
    add("--fc_lr", type=at_least(0.0), default=5, help="factor on --lr for a new classifier (D3)")
    add("--clip_grad", type=at_least(0.0), default=20.0, help="largest gradient norm; 0: no limit")
    add = p.run().add_argument
    add("--uniform", type=at_least(0), default=2, help="uniform test clips beside the dense --clips")
    add("--test_crop", type=at_least(1), help="crop of the test picture; default: --test_size")
    add("--average", choices=["logits", "softmax"], default="logits",
        help="average the logits or the probabilities of a video's views (D13)")  # fmt: skip
    p.set_defaults(clips=1, crops=1, test_size=256)  # Appendix 1
    args = p.parse(argv, also=TEST, follow=[("lam", "mutual"), ("label_seed", "seed")])
    if args.test_crop and args.crops == 3:
        p.error("--test_crop is for one central crop: --crops 1")
    kinds = args.nets.split(",")
    if not set(kinds) <= set(KINDS):
        p.error(f"--nets lists {', '.join(KINDS)} with commas, such as rgb,flow, not {args.nets}")
    first = ["rgb", "rgb"] if args.pipeline else kinds
    if len(starts_of(args, first)) != len(first):
        p.error(f"--init {args.init} is not one start for each of {len(first)} networks, nor one for all")
    if (args.mutual == "kl") != (args.teacher is None):
        p.error("--mutual mars and d3d need a --teacher MODEL.PT, and --mutual kl has none")
    if args.pipeline and (args.teacher or args.eval):
        p.error("--pipeline is without --teacher and --eval")
    if args.pipeline and len(set(kinds)) < len(kinds):
        p.error(f"the last step of --pipeline starts from one network: its --nets differ, not {args.nets}")
    return args


def starts_of(args, kinds):
    """--init for each network."""
    given = args.init if isinstance(args.init, list) else args.init.split(",")
    return given * len(kinds) if len(given) == 1 else given


# -------------------------------------------------------------------------------- the method


def network_loss(loss_c, loss_kl, lam):
    """Eq. 1, 2: L_1 = L_CE(p_1, y) + L_KL(p_2 || p_1), and L_2 the other way round; lam is 1 in the paper."""
    return loss_c + lam * loss_kl


def classification_loss(logits, y):
    """L_CE; with several labels per video L_mlBCE of Appendix 2.

    logits (B, K); y (B,) int64, or (B, K) float of zeros and ones. Mean over clips, or clips and classes.
    """
    if y.ndim == 1:
        return F.cross_entropy(logits.float(), y)
    return F.binary_cross_entropy_with_logits(logits.float(), y)


def kl_loss(p, logits, multilabel=False):
    """Eq. 3: L_KL(p_i || p_j) = sum_n p_i^n log(p_i^n / p_j^n), p_j the softmax of `logits`.

    p (B, K), detached, is what the network is to say, logits (B, K) its own. The sum over classes, mean over
    clips. multilabel: p_j is a sigmoid for each class, a class the two outcomes p and 1 - p, and the mean is
    over clips and classes (Appendix 2, D9).
    """
    p, logits = p.detach(), logits.float()
    if not multilabel:
        return F.kl_div(logits.log_softmax(1), p, reduction="batchmean")
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return F.binary_cross_entropy_with_logits(logits, p) - entropy.mean()


def mean_of_others(logits, net, mean, multilabel=False):
    """Eq. 4: sum_{j != i} p_j / (M - 1), what network i is to say; with two networks the other's p_j.

    logits {net: (B, K)}, detached here. mean: of the "probs", or the probabilities of the mean of the
    "logits" (D8). Returns (B, K), softmax or, with multilabel, sigmoid.
    """
    squash = torch.sigmoid if multilabel else partial(torch.softmax, dim=-1)
    others = torch.stack([x.detach().float() for name, x in logits.items() if name != net])  # (M - 1, B, K)
    return squash(others.mean(0)) if mean == "logits" else squash(others).mean(0)


def mars_loss(f, f_teacher, multilabel_classes=1):
    """MARS (Crasto et al. 2019): mean of (f - f_teacher)^2 over the last feature map before pooling.

    f, f_teacher (B, D, T, H, W), the teacher detached; divided by the number of classes of multi-label data
    (Appendix 2, D10).
    """
    return F.mse_loss(f.float(), f_teacher.detach().float()) / multilabel_classes


def d3d_loss(logits, logits_teacher, multilabel_classes=1):
    """D3D (Stroud et al. 2020): |logits - logits_teacher|_2^2, mean over the clips.

    logits, logits_teacher (B, K), the teacher detached; divided as in mars_loss.
    """
    difference = logits.float() - logits_teacher.detach().float()
    return difference.square().sum(1).mean() / multilabel_classes


def train_step(nets, x, y, args, teacher=None):
    """The loss of one step of all networks (D11), its terms by name, and the logits {net: (B, K)}.

    nets {net: Network}; x {modality: (B, C, T, H, W)} of the same moments; y as in classification_loss;
    teacher: (Recipe, Network) of MARS and D3D.
    """
    multilabel = y.ndim == 2
    logits, f, terms = {}, {}, {}
    for net in nets:
        logits[net], f[net] = nets[net](x[modality_of(net)])
    if teacher:
        with torch.no_grad():
            logits_teacher, f_teacher = teacher[1](x[teacher[0].modality])
    losses, divisor = [], y.shape[1] if multilabel else 1
    for net in nets:
        terms[f"loss_c_{net}"] = loss_c = classification_loss(logits[net], y)
        second = None
        if args.mutual == "mars":
            second = mars_loss(f[net], f_teacher, divisor)
        elif args.mutual == "d3d":
            second = d3d_loss(logits[net], logits_teacher, divisor)
        elif len(nets) > 1:
            p = mean_of_others(logits, net, args.mean, multilabel)  # Eq. 4
            second = kl_loss(p, logits[net], multilabel)  # Eq. 3
        if second is not None:
            terms[f"loss_{args.mutual}_{net}"] = second
        losses.append(loss_c if second is None else network_loss(loss_c, second, args.lam))  # Eq. 1, 2
    return sum(losses), terms, logits


# -------------------------------------------------------------------------------- networks


class Network(nn.Module):
    """A backbone; one call gives all that a step needs of it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        """Logits (B, K), and the last stage's output (B, D, T', H', W')."""
        f = self.backbone.features(x)[-1]
        return self.backbone.classify(f), f


def names_of(kinds):
    """Names of the networks: rgb, flow, and rgb2 for a second one of a modality."""
    counts = [kinds[: k + 1].count(kind) for k, kind in enumerate(kinds)]
    return [kind + (str(n) if n > 1 else "") for kind, n in zip(kinds, counts, strict=True)]


def modality_of(net):
    return net.rstrip("0123456789")


def build_networks(args, classes, run):
    """{net: Network under DDP}, {net: the arguments of its backbone}, parameter groups of all."""
    kinds = args.nets.split(",")
    starts = starts_of(args, kinds)
    nets, builds, groups = {}, {}, []
    mutual = args.mutual == "kl" and (args.lam or args.pipeline)
    for start in sorted(set(starts) & set(PUBLISHED)):
        run.on_main(fetch, args.net, start)  # one process downloads
    for net, start in zip(names_of(kinds), starts, strict=True):
        channels = MODALITIES[modality_of(net)].channels
        builds[net] = dict(name=args.net, classes=classes, in_channels=channels, width=args.width,
                           dropout=args.dropout)  # fmt: skip
        backbone = backbones.build(**builds[net], weights=None if start == "none" else start)  # Sec. 2.1
        for other in nets:
            if mutual and same(backbone, nets[other].module.backbone):
                raise UserError(f"{other} and {net} start as one network and have nothing to teach each "
                                "other (Table 5): give --init two files")  # fmt: skip
        groups += parameter_groups(backbone, args.weight_decay, args.fc_lr if backbone.new_fc else 1.0)
        nets[net] = run.distribute(Network(backbone), args.channels_last, args.compile)
    return nets, builds, groups


def same(a, b):
    """Whether two networks have the same weights; they may be on two devices."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(p.shape == q.shape and torch.equal(p.cpu(), q.cpu()) for p, q in pairs)


def parameter_groups(backbone, weight_decay, fc_lr):
    """Groups for torch.optim with what D3 says of each."""
    fc = set(backbone.fc.parameters())
    rest = [p for p in backbone.parameters() if p not in fc]
    return [
        dict(params=[p for p in rest if p.ndim > 1], weight_decay=weight_decay),
        dict(params=[p for p in rest if p.ndim == 1], weight_decay=0.0),
        dict(params=[backbone.fc.weight], weight_decay=weight_decay, lr_factor=fc_lr),
        dict(params=[backbone.fc.bias], weight_decay=0.0, lr_factor=2 * fc_lr),
    ]


def load_teacher(args, data, run):
    """(Recipe, frozen Network) of --teacher, or None."""
    if not args.teacher:
        return None
    net, recipe = load_for(args.teacher, data, run.device)
    kind = MODALITIES[recipe.modality]
    if (tuple(recipe.mean), tuple(recipe.std)) != (kind.mean, kind.std):
        raise UserError(f"{args.teacher} has its input normalised in another way than this script does")
    run.to_device(net, args.channels_last)
    return recipe, Network(net).requires_grad_(False).eval()


def check_teacher(args, teacher, nets):
    """MARS compares feature maps, which must be alike."""
    for net in nets.values():
        own, its = ((x.backbone.name, x.backbone.fc.in_features) for x in (net.module, teacher[1]))
        if args.mutual == "mars" and own != its:
            raise UserError(f"{args.teacher} has other feature maps: --mutual mars wants its --net, --width")


# -------------------------------------------------------------------------------- data


def windows(source, rng, args):
    """Sec. 2.3: input frames (i_1, ..., i_T) of the modality that has fewest, + xi for one that has more."""
    n = min(source.lengths.values())
    is_dense = args.sampling == "dense" or args.sampling == "both" and rng.random() < 0.5
    sample = partial(dense, stride=args.stride) if is_dense else uniform  # Sec. 3.1.1
    i = sample(n, args.frames, rng=rng)
    return [i + rng.integers(N - n + 1) for N in source.lengths.values()]  # xi ~ unif{0, ..., N - n}


def train_views(clips, args, kinds, flip):
    """The uint8 clips of each modality, all of one crop (D6)."""
    clips = augment.multi_scale_crop(clips, args.size)
    if flip and torch.rand(()) < 0.5:
        clips = [modality.flip(clip, kind) for clip, kind in zip(clips, kinds, strict=True)]
    return tuple(clips)


def recipe_of(kind, args, scale, multilabel):
    """How the network of a modality sees a test video: k dense and m uniform clips (Appendix 1, D5)."""
    return Recipe(
        args.frames, args.stride, args.clips, args.crops, args.test_size, args.test_crop or args.test_size,
        uniform=args.uniform, spread="parts", modality=kind, bound=scale[0], flow_side=scale[1],
        multilabel=multilabel, average=args.average, mean=MODALITIES[kind].mean, std=MODALITIES[kind].std,
    )  # fmt: skip


def ablation_recipe(recipe, args):
    """That of the ablations (Sec. 3.1.1), here of quick tests: one uniform clip, the training crop."""
    clip = dict(clips=1, uniform=0) if args.sampling == "dense" else dict(clips=0, uniform=1)
    return replace(recipe, **clip, size=min(args.size, recipe.size))


# -------------------------------------------------------------------------------- training


def train(args, run):
    """One run: data, networks, steps, final test."""
    data = agreed(load_data, args.data, args.root, args.split)
    if args.eval:
        return test_only(args, data, run)

    # 1. Data: videos with a label, and what opens and samples them.
    flip = data.flip if args.flip is None else args.flip
    few = args.ratio, args.per_class, args.label_seed, args.labelled_list
    chosen = agreed(labelled_subset, data, *few)  # D1
    run.say(f"{data.name}: {len(data.classes)} classes, {len(chosen)} of {len(data.train)} training videos, "
            f"{len(data.test)} test videos")  # fmt: skip
    for note in data.notes:
        run.say(note)
    teacher = load_teacher(args, data, run)
    kinds = tuple(dict.fromkeys([*args.nets.split(","), *([teacher[0].modality] if teacher else [])]))
    models = {args.teacher: teacher[0]} if teacher else {}
    data, scale = modality.with_flow(data, args.data, args.root, args.flow, run, kinds, models)
    videos = data.train.subset(chosen)
    sample, view = partial(windows, args=args), partial(train_views, args=args, kinds=kinds, flip=flip)
    streams = partial(modality.Streams, modalities=kinds, bound=scale[0], flow_side=scale[1])
    clips = Clips(videos, sample, view, args.seed, open=streams)
    epoch = ceil(len(videos) / (args.batch * run.world))
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))

    identity = dict(labelled=digest_of_videos(videos), classes=len(data.classes),
                    net=f"{args.net} x{args.width}", nets=args.nets, flow=str(scale))  # fmt: skip
    if run.finished(identity):
        return

    # 2. Networks and optimiser.
    torch.manual_seed(args.seed)
    nets, builds, groups = build_networks(args, len(data.classes), run)
    if teacher:
        check_teacher(args, teacher, nets)
    recipes = {kind: recipe_of(kind, args, scale, data.multilabel) for kind in kinds}
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch)  # D2
    optimizer = optim.build(args.optimizer, groups, lr, args.weight_decay)
    parts = {name: net.module for name, net in nets.items()} | {"optimizer": optimizer}
    tested = {name: (net.module.backbone, recipes[modality_of(name)]) for name, net in nets.items()}
    quick = {name: (net, ablation_recipe(recipe, args)) for name, (net, recipe) in tested.items()}

    # 3. Steps.
    start = run.resume(identity, **parts)
    run.write("labelled.txt", as_list(videos))
    run.say(f"{total} steps, {epoch} an epoch, of {args.batch * run.world} clips; {rule}; {run.device.type}")
    loader = train_loader([(clips, args.batch)], start, total, run.rank, run.world, args.workers)
    for step, batches in run.steps(loader, start, total, args.seed, [videos], every):
        if batches is None:  # between two steps
            evaluate.quick_test(quick, data.test, run, args.workers, step)
            continue
        x = {kind: recipes[kind].to_input(views, run.device)
             for kind, views in zip(kinds, batches[0]["views"], strict=True)}  # D7  # fmt: skip
        y = batches[0]["label"].to(run.device)  # D14
        with run.autocast():
            loss, terms, logits = train_step(nets, x, y, args, teacher)
        optim.set_lr(optimizer, lr * optim.schedule(step, total, epoch, args.lr_steps, args.warmup))
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad:
            for net in nets.values():
                nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)  # D3
        optimizer.step()
        if len(nets) > 1:
            terms["agree"] = agreement(logits)
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
        if run.due(step + 1, epoch):
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return

    # 4. Models (the first is model.pt, the others have files of their names) and the final test of all.
    if run.main:
        for net, (backbone, recipe) in tested.items():
            path = run.out / ("model.pt" if net == next(iter(nets)) else f"{net}.pt")
            save_model(path, backbone, builds[net], data.classes, recipe)  # D12
    words = wanted(args) | ({} if args.label_seed == args.seed else {"label_seed": args.label_seed})
    evaluate.report(tested, data, run, args.workers, **words)


def agreement(logits):
    """Share of the clips for which all networks have the same first class; for the log."""
    first = torch.stack([x.argmax(1) for x in logits.values()])  # (M, B)
    return (first == first[0]).all(0).float().mean()


# -------------------------------------------------------------------------------- after training


def test_only(args, data, run):
    """--eval: the test of one model."""
    changes = dict(clips=args.clips, uniform=args.uniform, crops=args.crops, average=args.average)
    if args.test_crop:
        changes |= dict(size=args.test_crop)
    net, recipe = load_for(args.eval, data, run.device, **changes)
    kinds, models = [recipe.modality], {args.eval: recipe}
    data, _ = modality.with_flow(data, args.data, args.root, args.flow, run, kinds, models)
    evaluate.report({"net": (net, recipe)}, data, run, args.workers, **wanted(args, also=TEST))


# -------------------------------------------------------------------------------- runs


def pipeline(args):
    """Fig. 1: the runs of its three steps, each started from the one before.

    Step 1 is two runs of different seeds with the same labelled videos: independent starts, batches, crops.
    """
    starts = starts_of(args, ["rgb", "rgb"])
    ce, ce2, ml, last = (f"{args.out}/{step}" for step in ("1_ce", "1_ce2", "2_ml", "3_mml"))
    steps = {
        ce: dict(nets="rgb", lam=0.0, init=starts[:1]),
        ce2: dict(nets="rgb", lam=0.0, init=starts[1:], seed=args.seed + SECOND_SEED),
        ml: dict(nets="rgb,rgb", init=[f"{ce}/model.pt", f"{ce2}/model.pt"]),
        last: dict(init=[f"{ml}/model.pt"]),
    }
    for out, changes in steps.items():
        step = argparse.Namespace(**vars(args) | changes | {"out": out})
        if not one_run(step, free=("init",) if out in (ml, last) else ()):  # their --init follows from --out
            return


def one_run(args, free=()):
    """Train, or test, in the folder args.out; whether there is a result, and no signal to stop after it."""
    free = {*free_flags(args, TEST), *([] if args.eval else ["flow", *free])}
    with Run("mml", args.out, vars(args), free) as run:
        train(args, run)
        return run.ended and not run.should_stop()


@record
def main():
    args = parse_args()
    pipeline(args) if args.pipeline else one_run(args)


if __name__ == "__main__":
    main()

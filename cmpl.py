"""CMPL: Cross-Model Pseudo-Labeling for Semi-Supervised Action Recognition.

Yinghao Xu, Fangyun Wei, Xiao Sun, Ceyuan Yang, Yujun Shen, Bo Dai, Bolei Zhou, Stephen Lin. CVPR 2022.

Few videos have a label, most have none. FixMatch lets one network label the weakly augmented clip and
learn that label on the strongly augmented one, so it can only repeat what it already believes. CMPL
trains a second, much thinner network beside it and lets each label the other's clips. The thin one
leans on motion where the large one leans on appearance, so each knows classes the other does not.

    unlabelled video -- weak --> F (primary)   --> p_F >= tau ? --> label for A --+
           |                                                                       |
           |        weak (more frames) --> A (auxiliary) --> p_A >= tau ? --+      |
           |                                                      label for F      |
           +-- strong ---------------> F  learns A's label  (Eq. 4) <-------+      |
           +-- strong (more frames) -> A  learns F's label  (Eq. 5) <--------------+
    labelled video -- standard ------> F, A  learn the true label  (Eq. 2, 3)

Equations:  Eq. 1, 4, 5 -> pseudo_label + unlabelled_loss    Eq. 2, 3 -> supervised_loss
            Eq. 6 -> total_loss                              all are called in train_step

Names: <what>_<net>_<view>, net pri (F) or aux (A), view l labelled, w weak, s strong; B_l labelled and
B_u unlabelled clips of a step, K classes, tau the confidence threshold, lam the weight of Eq. 6.

Run (on 8 GPUs, the paper used 16; then one process on the embedded data set, on a CPU too):

    torchrun --nproc_per_node 8 cmpl.py --data k400 --ratio 0.01
    python cmpl.py --data toy:mini

Baselines: supervised `--lam 0`; FixMatch `--aux none`; FixMatch at two frame rates `--aux same`.

Differences from the paper, and what it leaves open:

D1  An epoch is one pass over the unlabelled videos (not said); the baselines make as many steps.
    With a smaller mu it has more steps, and so more passes over the labelled videos.
D2  The paper's learning rate, 0.1, is for its 32 labelled clips a step (16 GPUs with 2 each, beside 160
    unlabelled ones); it scales linearly with the labelled clips of a step over all GPUs (`--lr_batch`).
D3  Unlabelled videos are those without a label (Fig. 2); `--unlabelled all` adds the labelled ones.
D4  T_standard is SlowFast's: short side 256-320, crop 224, mirrored half of the time; each network
    draws its own. T_weak: short side `--weak_side` 256, centre crop, never mirrored.
D5  T_strong is T_standard, then RandAugment with 2 operations of magnitude up to 9, then a grey square
    of half the side (Cutout), as FixMatch has them; sizes are not in the paper.
D6  Weak and strong view show the same frames. A's window begins at most t_s = `--offset` seconds before or
    after F's. The unit is not given: 10, the best of Table 5, is the default; Tables 3, 4 and 6 have 0.
D7  The weak views have their own forward pass without gradient, in training mode; `--joint` puts them
    through with the rest, so that batch normalisation sees the mixture.
D8  Batch normalisation is per GPU, over the labelled and strong clips of a step together.
D9  Dropout 0.5 before the classifier and a zero-initialised last BN per block, as in SlowFast; no warm-up
    (`--warmup`) and no moving average, as none is mentioned. Weight decay acts on every parameter.
D10 A 256 x 256 test crop is pooled to one vector; SlowFast averages overlapping 224 x 224 windows.
D11 "3D-ResNet50" is read as SlowFast's slow pathway alone: 41.7 GMAC for 8 frames of 224 x 224. The
    weak and the strong pass make 83.5 (F) + 11.1 (A, 1/4 wide, 16 frames) GMAC; Table 3 says 94.
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
from common import augment, backbones, evaluate, optim
from common.clips import Clips, dense, train_loader
from common.data import as_list, digest_of_videos, load_data, semi_supervised
from common.errors import UserError
from common.flags import Parser, Range, at_least, free_flags, share, wanted
from common.io.models import load_for, save_model
from common.modality import Recipe
from common.run import Run, agreed

# Defaults per data set, and what the nearest labelled share adds to them (the flags' own defaults are
# Kinetics-400 at 1 %). Sec. 4.1 unless said.
RECIPES = {
    "k400 0.01": dict(lam=5.0),
    "k400 0.1": dict(lam=2.0),
    "ucf101": dict(weight_decay=1e-3),
    "ucf101 0.01": dict(lam=5.0),
    "ucf101 0.1": dict(lam=2.0),
    "toy": dict(
        per_class=4, lam=2.0, tau=0.95, batch=8, mu=3, net="resnet3d10", width=0.25,
        aux="resnet3d10", aux_width=0.125, frames=8, stride=4, aux_frames=16, aux_stride=2, dropout=0.0,
        size=40, jitter=[48, 56], weak_side=48, epochs=25, optimizer="adamw", lr=0.04, weight_decay=0.05,
        clips=2, crops=1, eval_every=12, offset=0.0, workers=1, channels_last=True,
    ),
}  # fmt: skip
RECIPES["toy:mini"] = RECIPES["toy"] | dict(epochs=20, eval_every=5)
# Hundreds of small clips, such as the 90 of Weizmann with 180 x 144 pixels.
RECIPES["small"] = RECIPES["toy"] | dict(
    per_class=2, batch=4, size=64, test_size=64, jitter=[72, 80], weak_side=72, epochs=45)  # fmt: skip

TEST = ("keep_every",)  # flags of --eval that make it another test


def parse_args(argv=None):
    p = Parser("cmpl", __doc__, RECIPES)
    add = p.data().add_argument
    add("--jitter", type=at_least(1), nargs=2, action=Range, default=[256, 320],
        help="range of the short side before a random crop, in pixels (D4)")  # fmt: skip
    add("--weak_side", type=at_least(1), help="short side of weak views (D4); default: 8/7 of --size")
    add = p.add_argument_group("method").add_argument
    add("--lam", type=at_least(0.0), default=5.0, help="weight of L_u, Eq. 6; 0: supervised only")
    add("--tau", type=share, default=0.9, help="confidence threshold, Eq. 1, 4, 5, Fig. 4a")
    add("--mu", type=at_least(1), default=5, help="unlabelled clips per labelled clip, Fig. 4b")
    add("--net", default="resnet3d50", help="backbone of the primary network F (D11)")
    add("--width", type=float, default=1.0, help="channel multiplier of F")
    add("--aux", default="resnet3d50", help="backbone of the auxiliary network A; none: FixMatch")
    add("--aux_width", type=float, default=0.25, help="channel multiplier of A, Table 3")
    add("--dropout", type=float, default=0.5, help="dropout before the classifiers (D9)")
    add("--frames", type=at_least(1), default=8, help="frames of a clip for F")
    add("--stride", type=at_least(1), default=8, help="distance of the frames of a clip for F")
    add("--aux_frames", type=at_least(1), default=16, help="frames of a clip for A, Table 4")
    add("--aux_stride", type=at_least(1), default=4, help="distance of the frames of a clip for A")
    add("--offset", type=at_least(0.0), default=10.0,
        help="largest distance t_s of the clips in seconds (D6)")  # fmt: skip
    add("--aux_losses", choices=["both", "sup", "unsup"], default="both",
        help="losses of A: both, supervised only, unsupervised only (Table 6)")  # fmt: skip
    add("--joint", action="store_true", help="one forward pass for weak and other views (D7)")
    add("--rand_augment", type=at_least(0, 10), nargs=2, default=[2, 9],
        help="RandAugment of strong views: number of operations, magnitude (D5)")  # fmt: skip
    p.optimisation("labelled clips", "unlabelled videos", epochs=200, batch=2, lr=0.1, lr_batch=32,
                   weight_decay=1e-4)  # D1, D2, D9  # fmt: skip
    add = p.run().add_argument
    add("--keep_every", type=at_least(1), default=1, help="repeat every n-th test frame, Fig. 5")
    return p.parse(argv, also=TEST)


# -------------------------------------------------------------------------------- the method


def pseudo_label(p_w, tau):
    """Eq. 1, 4, 5, what they share: y_hat_i = arg max p_i and the indicator 1(max p_i >= tau).

    p_w (B_u, K) probabilities of the weak views. Returns y (B_u,) int64, mask (B_u,) float.
    """
    confidence, y = p_w.max(dim=1)
    return y, (confidence >= tau).float()


def unlabelled_loss(logits_s, y, mask):
    """Eq. 1, 4, 5: L_u = 1/B_u sum_i 1(max p_i >= tau) H(y_hat_i, F(T_strong(u_i))).

    logits_s (B_u, K) of the strong views, gradient flows into them only; y, mask (B_u,) from
    `pseudo_label`, of the other network (Eq. 4, 5) or of the same (Eq. 1, FixMatch). The mean is over
    all B_u clips, so a step without a confident clip has loss 0.
    """
    return (F.cross_entropy(logits_s, y, reduction="none") * mask).mean()


def supervised_loss(logits_l, y_l):
    """Eq. 2, 3: L_s = 1/B_l sum_i H(y_i, F(T_standard(v_i))).

    logits_l (B_l, K), y_l (B_l,) int64; mean over the labelled clips.
    """
    return F.cross_entropy(logits_l, y_l)


def total_loss(loss_s, loss_u, lam):
    """Eq. 6: L = (L_s^F + L_s^A) + lam (L_u^F + L_u^A); both arguments hold one loss per network."""
    return sum(loss_s) + lam * sum(loss_u)


def forward(net, x, joint):
    """(logits_l, p_w, logits_s) of the clips x of one network; the probabilities p_w have no gradient.

    x: {view: clips (B, C, T, H, W)}, the labelled view alone for the supervised baseline.
    """
    if "w" not in x:
        return net(x["l"]), None, None
    if joint:
        logits = net(torch.cat([x["l"], x["w"], x["s"]]))
        logits_l, logits_w, logits_s = logits.split([len(x["l"]), len(x["w"]), len(x["s"])])
    else:
        with torch.no_grad():
            logits_w = net(x["w"])  # D7
        logits_l, logits_s = net(torch.cat([x["l"], x["s"]])).split([len(x["l"]), len(x["s"])])  # D8
    return logits_l, logits_w.detach().float().softmax(dim=1), logits_s


def train_step(nets, x, y_l, args):
    """The loss of one step, its terms by name, and {net: (pseudo-labels, mask)} for the log.

    nets: "pri" is F and "aux" is A, which FixMatch and the supervised baseline do not have and which is F
    itself for `--aux same`; x: {net: {view: clips (B, C, T, H, W)}}, view l, w or s.
    """
    loss_s, loss_u, labels = {}, {}, {}
    logits_l_pri, p_w_pri, logits_s_pri = forward(nets["pri"], x["pri"], args.joint)
    loss_s["pri"] = supervised_loss(logits_l_pri, y_l)  # Eq. 2
    if args.lam:
        y_pri, mask_pri = labels["pri"] = pseudo_label(p_w_pri, args.tau)
        if "aux" not in nets:
            loss_u["pri"] = unlabelled_loss(logits_s_pri, y_pri, mask_pri)  # Eq. 1: F labels for itself
    if "aux" in nets:
        logits_l_aux, p_w_aux, logits_s_aux = forward(nets["aux"], x["aux"], args.joint)
        y_aux, mask_aux = labels["aux"] = pseudo_label(p_w_aux, args.tau)
        loss_s["aux"] = supervised_loss(logits_l_aux, y_l)  # Eq. 3
        loss_u["pri"] = unlabelled_loss(logits_s_pri, y_aux, mask_aux)  # Eq. 4: A labels for F
        loss_u["aux"] = unlabelled_loss(logits_s_aux, y_pri, mask_pri)  # Eq. 5: F labels for A
    terms = {f"loss_s_{net}": loss for net, loss in loss_s.items()}
    terms |= {f"loss_u_{net}": loss for net, loss in loss_u.items()}
    if "aux" in nets:  # a loss that Table 6 leaves out has weight 0: every parameter keeps a gradient
        loss_s["aux"] = loss_s["aux"] * (args.aux_losses != "unsup")
        loss_u["aux"] = loss_u["aux"] * (args.aux_losses != "sup")
    return total_loss(loss_s.values(), loss_u.values(), args.lam), terms, labels  # Eq. 6


def pseudo_label_report(labels, y_true):
    """Shares of the unlabelled batch, for the log alone: the true labels, None if unknown, never train.

    kept_*: confident; right_*: confident and right (Fig. 2); agree: both say the same class;
    aux_kept_pri_right: confident for A, and F is right (Fig. 6, where A's own curve is right_aux).
    """
    shares = {f"kept_{net}": mask.mean() for net, (_, mask) in labels.items()}
    if "aux" in labels:
        shares["agree"] = (labels["pri"][0] == labels["aux"][0]).float().mean()
    if y_true is None:
        return shares
    shares |= {f"right_{net}": (mask * (y == y_true)).mean() for net, (y, mask) in labels.items()}
    if "aux" in labels:
        shares["aux_kept_pri_right"] = (labels["aux"][1] * (labels["pri"][0] == y_true)).mean()
    return shares


def test_report(scores, y_true, tau):
    """The same of the test videos, if they had pseudo-labels; scores {net: evaluate.Scores}."""
    labels = {net: pseudo_label(torch.from_numpy(of_net.probs), tau) for net, of_net in scores.items()}
    return {f"test_{key}": value for key, value in pseudo_label_report(labels, y_true).items()}


# -------------------------------------------------------------------------------- networks


def build_networks(args, classes, run):
    """{net: network under DDP}, F as "pri" and A, if there is one, as "aux"; {net: how it was built}."""
    builds = {"pri": dict(name=args.net, classes=classes, width=args.width, dropout=args.dropout)}
    if args.lam and args.aux not in ("none", "same"):  # without Eq. 4 A would teach nobody
        builds["aux"] = builds["pri"] | dict(name=args.aux, width=args.aux_width)
    nets = {net: backbones.build(**build) for net, build in builds.items()}
    nets = {net: run.distribute(module, args.channels_last, args.compile) for net, module in nets.items()}
    if args.lam and args.aux == "same":
        nets["aux"] = nets["pri"]
    return nets, builds


# -------------------------------------------------------------------------------- data


def windows(source, rng, args):
    """Frame indices of F's and A's clip: windows of one length at two frame rates, t_s apart (Sec. 3.3)."""
    n, span = len(source), args.frames * args.stride
    pri = dense(n, args.frames, args.stride, rng)
    if args.aux == "none" or not args.lam:
        return [pri]
    starts = source.times[: max(n - span, 0) + 1]  # in seconds, of all windows
    start = rng.choice(np.flatnonzero(abs(starts - starts[pri[0]]) <= args.offset))  # D6
    return [pri, (start + np.arange(args.aux_frames) * args.aux_stride) % n]


def standard(clip, args, flip):
    """T_standard (D4)."""
    clip = augment.jitter_crop(clip, args.size, args.jitter)
    return augment.random_flip(clip) if flip else clip


def weak(clip, args):
    """T_weak (D4)."""
    return augment.resize_crop(clip, args.size, args.weak_side or round(args.size * 8 / 7))


def strong(clip, args, flip):
    """T_strong (D5): T_standard, RandAugment, Cutout."""
    clip = augment.rand_augment(standard(clip, args, flip), *args.rand_augment)
    return augment.cutout(clip, args.size // 2)


def views(clips, args, flip, labelled):
    """{net: {view: clip}} of the clips of a labelled or unlabelled video, one clip for each network."""
    pairs = list(zip(("pri", "aux"), clips, strict=False))
    if labelled:
        return {net: {"l": standard(clip, args, flip)} for net, clip in pairs}
    return {net: {"w": weak(clip, args), "s": strong(clip, args, flip)} for net, clip in pairs}


# -------------------------------------------------------------------------------- training


def recipes_of(args):
    """{net: what it sees of a test video}; D10: the short side is the side of the crop."""
    pri = Recipe(args.frames, args.stride, args.clips, args.crops, args.test_size, args.test_size)
    return {"pri": pri, "aux": replace(pri, frames=args.aux_frames, stride=args.aux_stride)}


@dataclass(frozen=True)
class Thinned(Recipe):
    """A test where every n-th frame of a clip is kept and shown n times (Fig. 5)."""

    keep_every: int = 1

    def sample(self, source):
        kept = np.arange(self.frames) // self.keep_every * self.keep_every
        return [clip[kept] for clip in super().sample(source)]


def train(args, run):
    """One run: data, networks, steps, final test."""
    data = agreed(load_data, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video; CMPL needs one (mml.py takes it)")
    if args.eval:
        net, recipe = load_for(args.eval, data, run.device, clips=args.clips, crops=args.crops)
        recipe = Thinned(**vars(recipe), keep_every=args.keep_every)
        evaluate.report({"pri": (net, recipe)}, data, run, args.workers, **wanted(args, also=TEST))
        return

    # 1. Data: labelled videos, unlabelled videos (D3), and how many steps an epoch has.
    videos_l, videos_u = semi_supervised(
        data, args.ratio, args.per_class, args.seed, args.labelled_list, args.unlabelled, run.say
    )
    if args.lam and len(videos_l) == len(data.pool):
        raise UserError("every training video has a label: add --lam 0, or lower --ratio")
    if not args.lam:
        run.say("supervised: the unlabelled videos only set the number of steps (D1)")
    flip = data.flip if args.flip is None else args.flip
    is_known = (videos_u.labels >= 0).all()  # the true labels, for the log
    sample = partial(windows, args=args)
    view_l, view_u = (partial(views, args=args, flip=flip, labelled=labelled) for labelled in (True, False))
    sources = [(Clips(videos_l, sample, view_l, 2 * args.seed), args.batch)]
    if args.lam:
        sources.append((Clips(videos_u, sample, view_u, 2 * args.seed + 1), args.batch * args.mu))
    epoch = math.ceil(len(videos_u) / (args.batch * args.mu * run.world))  # D1
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))
    identity = dict(labelled=digest_of_videos(videos_l), unlabelled=digest_of_videos(videos_u),
                    classes=len(data.classes), net=f"{args.net} x{args.width}", aux=args.aux)  # fmt: skip
    if run.finished(identity):
        return

    # 2. Networks and optimiser.
    torch.manual_seed(args.seed)
    nets, builds = build_networks(args, len(data.classes), run)
    recipes = recipes_of(args)
    tested = {net: (module.module, recipes[net]) for net, module in nets.items()}
    test_shares = partial(test_report, y_true=torch.from_numpy(data.test.labels), tau=args.tau)
    parameters = [p for net in builds for p in nets[net].parameters()]
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch, "labelled clips")  # D2
    optimizer = optim.build(args.optimizer, parameters, lr, args.weight_decay)
    parts = {net: nets[net].module for net in builds} | {"optimizer": optimizer}

    # 3. Steps.
    start = run.resume(identity, **parts)
    run.write("labelled.txt", as_list(videos_l))
    clips = " + ".join(f"{batch * run.world}" for _, batch in sources)
    run.say(f"{total} steps, {epoch} an epoch, of {clips} clips; {rule}; {run.device.type}")
    loader = train_loader(sources, start, total, run.rank, run.world, args.workers)
    lists = [clips.videos for clips, _ in sources]
    for step, batches in run.steps(loader, start, total, args.seed, lists, every):
        if batches is None:  # between two steps
            evaluate.quick_test(tested, data.test, run, args.workers, step, test_shares)
            continue
        x = {net: {view: recipes[net].to_input(clips, run.device)
                   for batch in batches for view, clips in batch["views"][net].items()}
             for net in nets}  # fmt: skip
        with run.autocast():
            loss, terms, labels = train_step(nets, x, batches[0]["label"].to(run.device), args)
        optim.set_lr(optimizer, lr * optim.warmup_cosine(step, total, args.warmup * epoch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if labels:
            y_u = batches[1]["label"].to(run.device) if is_known else None
            terms |= pseudo_label_report(labels, y_u)
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss, **terms)
        if run.due(step + 1, epoch):
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return

    # 4. Models and the final test of F.
    if run.main:
        for net, file in (("pri", "model.pt"), ("aux", "model_aux.pt")):
            if net in builds:
                save_model(run.out / file, nets[net].module, builds[net], data.classes, recipes[net])
    recipe = Thinned(**vars(recipes["pri"]), keep_every=args.keep_every)
    evaluate.report({"pri": (nets["pri"].module, recipe)}, data, run, args.workers, **wanted(args))


@record
def main():
    args = parse_args()
    with Run("cmpl", args.out, vars(args), free_flags(args, TEST)) as run:
        train(args, run)


if __name__ == "__main__":
    main()

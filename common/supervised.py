"""A network trained by cross-entropy on labelled clips: a baseline for any method, an expert for some.

    torchrun --nproc_per_node 8 -m common.supervised --data ucf101 --net tsm50 --init FILE.pth --out RUN
    python -m common.supervised --data toy --net resnet3d10 --ratio 0.1

A training view is a random clip with a short side within --jitter, a random crop, and a flip where the labels
allow one. The learning rate follows a cosine to 0. The run folder has model.pt and the files of the test.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record

from common import augment, backbones, evaluate, modality, optim
from common.clips import Clips, dense, train_loader
from common.data import as_list, digest_of_videos, hold_out, labelled_subset, load_data
from common.errors import UserError
from common.flags import Parser, Range, at_least, free_flags, share, wanted
from common.io.models import load_for, save_model
from common.io.weights import PUBLISHED, fetch
from common.modality import Recipe
from common.run import Run, agreed

RECIPES = {"toy": dict(
    net="resnet3d10", width=0.25, dropout=0.0, frames=8, stride=2, size=40, jitter=[44, 56], epochs=12,
    batch=16, optimizer="adamw", lr=0.005, weight_decay=0.05, clips=4, crops=1, eval_every=5, workers=1,
    channels_last=True,
)}  # fmt: skip
RECIPES["small"] = RECIPES["toy"] | dict(
    net="r2plus1d_10-pool", size=64, test_size=64, jitter=[72, 80], epochs=100, eval_every=50
)


def parse_args(argv=None):
    p = Parser("supervised", __doc__, RECIPES)
    add = p.data(unlabelled=None, ratio=1.0).add_argument
    add("--holdout", type=share, default=0.0, help="share of training videos to test on")
    add("--jitter", type=at_least(1), nargs=2, action=Range, default=[256, 320],
        help="range of the short side before a random crop, in pixels")  # fmt: skip
    add = p.add_argument_group("network").add_argument
    add("--net", choices=backbones.NAMES, metavar="NET", default="tsm50", help="backbone")
    add("--width", type=float, default=1.0, help="channel multiplier of the backbone")
    add("--dropout", type=float, default=0.5, help="dropout rate before the classifier")
    add("--init", help="initial weights: a file, imagenet or kinetics; default: random")
    add("--frames", type=at_least(1), default=8, help="frames of a clip")
    add("--stride", type=at_least(1), default=8, help="frames from one to the next in a clip")
    p.optimisation("clips", "labelled videos", epochs=50, batch=8, lr=0.001, lr_batch=8, weight_decay=5e-4)
    p.run()
    return p.parse(argv)


def window(source, rng, args):
    """Frame indices of the one random clip of a training video."""
    return [dense(len(source), args.frames, args.stride, rng)]


def view(clips, args, flip):
    """The training view of a clip (T, C, H, W)."""
    crop = augment.jitter_crop(clips[0], args.size, args.jitter)
    return (augment.random_flip(crop) if flip else crop,)


def train(args, run):
    data = agreed(load_data, args.data, args.root, args.split)
    if args.eval:
        net, recipe = load_for(args.eval, data, run.device, clips=args.clips, crops=args.crops)
        evaluate.report({"net": (net, recipe)}, data, run, args.workers, **wanted(args))
        return
    labels = args.ratio, args.per_class, args.seed, args.labelled_list
    held_out = hold_out(data.train, args.holdout, args.seed)
    labelled = np.setdiff1d(agreed(labelled_subset, data, *labels), np.flatnonzero(held_out))
    videos = data.train.subset(labelled)
    if data.multilabel or not len(videos):
        few = "no labelled video beside the held-out ones"
        raise UserError(f"{data.name} has {'several labels per video' if data.multilabel else few}")
    if held_out.any():
        data = replace(data, test=data.train.subset(np.flatnonzero(held_out)))
    identity = dict(labelled=digest_of_videos(data.train, labelled), classes=len(data.classes), net=args.net)
    if run.finished(identity):
        return
    run.say(f"{data.name}: {len(data.classes)} classes, {len(videos)} labelled, {len(data.test)} test videos")
    rgb, side, views = modality.MODALITIES["rgb"], args.test_size, (args.clips, args.crops)
    recipe = Recipe(args.frames, args.stride, *views, side, side, mean=rgb.mean, std=rgb.std)
    flip = data.flip if args.flip is None else args.flip
    clips = Clips(videos, partial(window, args=args), partial(view, args=args, flip=flip), args.seed)
    epoch = math.ceil(len(videos) / (args.batch * run.world))
    total, every = (optim.steps_of(epochs, epoch) for epochs in (args.epochs, args.eval_every))

    torch.manual_seed(args.seed)
    build = dict(name=args.net, classes=len(data.classes), width=args.width, dropout=args.dropout)
    if args.init in PUBLISHED:
        run.on_main(fetch, args.net, args.init)  # one process downloads
    net = run.distribute(backbones.build(**build, weights=args.init), args.channels_last, args.compile)
    lr, rule = optim.scaled_lr(args.lr, args.batch * run.world, args.lr_batch)
    optimizer = optim.build(args.optimizer, net.parameters(), lr, args.weight_decay)
    parts, tested = {"net": net.module, "optimizer": optimizer}, {"net": (net.module, recipe)}
    start = run.resume(identity, **parts)
    run.write("labelled.txt", as_list(videos))
    run.say(f"{total} steps, {epoch} an epoch, of {args.batch * run.world} clips; {rule}; {run.device.type}")
    loader = train_loader([(clips, args.batch)], start, total, run.rank, run.world, args.workers)
    for step, batches in run.steps(loader, start, total, args.seed, [videos], every):
        if batches is None:  # between two steps
            evaluate.quick_test(tested, data.test, run, args.workers, step)
            continue
        with run.autocast():
            logits = net(recipe.to_input(batches[0]["views"][0], run.device))
            loss = F.cross_entropy(logits, batches[0]["label"].to(run.device))
        optim.set_lr(optimizer, lr * optim.warmup_cosine(step, total, args.warmup * epoch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.track(step, optimizer.param_groups[0]["lr"], loss=loss)
        if run.due(step + 1, epoch):
            run.save(step + 1, identity, **parts)
    if run.stopped:
        return
    if run.main:
        save_model(run.out / "model.pt", net.module, build, data.classes, recipe)
    evaluate.report(tested, data, run, args.workers, **wanted(args))


def main(argv=None):
    """Train a network, or find it trained; False if a signal has stopped it."""
    args = parse_args(argv)
    with Run("supervised", args.out, vars(args), free_flags(args)) as run:
        train(args, run)
        return run.ended and not run.should_stop()


if __name__ == "__main__":
    record(main)()

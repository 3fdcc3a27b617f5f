"""The equations of motionfit.py (a value by hand, a plain loop, where gradients go), its clips and labels,
what its stages learn and leave to each other, its command line."""

import gc
import itertools
import json
import math
import os
import re
import signal
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from tensors import random, softmax
from torch import nn

import motionfit
from common import backbones, evaluate, flags
from common.data import Videos, digest_of_videos, hold_out, load_data
from common.errors import UserError
from common.io.flow import Flow, write_flow
from common.io.models import load_model, save_model
from common.kmeans import kmeans, purity
from common.modality import Recipe
from common.run import Run

pytestmark = [pytest.mark.usefixtures("leave", "group"),
              pytest.mark.filterwarnings("ignore:.*rows are few")]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    with Run("motionfit", tmp_path / "out", {"log_every": 1}) as run:
        yield run


# ---- Eq. 1: multi-clip loss ------------------------------------------------------------------------


def naive_mc(logits, y):
    """Eq. 1: over the videos b, over their clips i; a clip of label -1 does not count."""
    B, R = y.shape
    terms = [-math.log(softmax(logits[b, i].tolist())[y[b, i]]) for b in range(B) for i in range(R)
             if y[b, i] >= 0]  # fmt: skip
    return sum(terms) / len(terms)


def test_eq1_known_value():
    """Of one video softmax (1/4, 3/4) and (1/2, 1/2), of the other (1/5, 4/5) and (1/10, 9/10)."""
    log = math.log
    logits = torch.tensor([[[0.0, log(3)], [7.0, 7.0]], [[0.0, log(4)], [0.0, log(9)]]])
    by_hand = ((log(4 / 3) + log(2)) / 2 + (log(5) + log(10 / 9)) / 2) / 2
    loss = motionfit.multi_clip_loss(logits, torch.tensor([[1, 0], [0, 1]]))
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


def test_eq1_without_clips_that_have_no_label():
    """All clips of a step may be the last of their videos, which have no next one (D8): a loss of 0."""
    logits, y = random(3, 4, 5).requires_grad_(), torch.arange(12).view(3, 4) % 6 - 1
    loss = motionfit.multi_clip_loss(logits, y)
    assert (y < 0).sum() == 2 and loss.item() == pytest.approx(naive_mc(logits, y), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    # (softmax - one-hot) over the ten clips that count
    expected = (logits.softmax(-1) - nn.functional.one_hot(y.clamp(min=0), 5)) * (y >= 0)[..., None] / 10
    assert torch.allclose(grad, expected.detach(), atol=1e-6)
    loss = motionfit.multi_clip_loss(logits, torch.full((3, 4), -1))
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


# ---- Eq. 2 and 3: order of the clips ---------------------------------------------------------------


def test_eq2_eq3_known_values():
    # softmax (1/4, 3/4) and (1/2, 1/2)
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    loss = motionfit.clip_order_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-6)
    assert motionfit.clip_order_loss(logits.bfloat16(), torch.tensor([0, 1])).dtype == torch.float32
    y = torch.zeros(1, 2, dtype=torch.int64)
    assert motionfit.multi_clip_loss(logits[None].bfloat16(), y).dtype == torch.float32  # under autocast
    assert [motionfit.batch_loss(2.0, 6.0, lam) for lam in (0.75, 1.0, 0.0)] == [3.0, 2.0, 6.0]


@pytest.mark.parametrize("R", [2, 4])
def test_eq2_head_matches_plain_layers_of_the_clips_in_the_order_that_it_predicts(R):
    """All pairs, each the features of two clips one after the other (Xu et al. 2019, Sec. 3.3)."""
    head, N = motionfit.OrderHead(3, R, hidden=5).eval(), math.factorial(R)
    assert sorted(map(tuple, head.orders.tolist())) == list(itertools.permutations(range(R)))
    z, p, (W, b), (V, c) = (
        random(N, R, 3),
        torch.arange(N).flip(0),
        head.pair.parameters(),
        head.last.parameters(),
    )
    for k, logits in enumerate(head(z, p)):
        shuffled = [z[k, i] for i in head.orders[p[k]]]
        pairs = [(torch.cat(pair) @ W.T + b).clamp(min=0) for pair in itertools.combinations(shuffled, 2)]
        assert torch.allclose(logits, torch.cat(pairs) @ V.T + c, atol=1e-5)
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.5]
    assert motionfit.OrderHead(4, 3).pair[0].out_features == 512  # D4


# ---- Eq. 4: segments -------------------------------------------------------------------------------


def test_eq4_known_value():
    # |f_t - f_{t-1}|_1 is 1, 6, 5, 0; the 75th percentile of (0, 1, 5, 6) is 5.25. By Euclidean distance, 5
    # and 4.24, or by the largest difference, 5 and 3, it would be the other.
    f = np.array([[0, 0], [1, 0], [4, 3], [9, 3], [9, 3]], np.float32)
    assert motionfit.boundaries(f, 75).tolist() == [False, False, True, False, False]
    assert motionfit.boundaries(f, 50).tolist() == [False, False, True, True, False]  # above 3


@pytest.mark.parametrize("percentile", [0, 10, 75, 100])
def test_eq4_matches_a_plain_loop(percentile):
    """The percentile is linear between the values in order, the least that of 0 and the largest of 100."""
    for T in range(3, 12):
        f = random(T, 5, seed=T).numpy()
        change = [sum(abs(float(a) - float(b)) for a, b in zip(f[t], f[t - 1], strict=True))
                  for t in range(1, T)]  # fmt: skip
        place, values = percentile / 100 * (len(change) - 1), sorted(change)
        low = min(int(place), len(change) - 2)
        tau = values[low] + (place - low) * (values[low + 1] - values[low])
        assert motionfit.boundaries(f, percentile).tolist() == [False, *(c > tau for c in change)]


@pytest.mark.parametrize("granularity, expected, means, of_one_and_two", [
    ("clip", [0, 1, 2, 3, 4, 5, 6], [0, 1, 7, 8, 15, 16, 17], ([0], [0, 1])),
    ("segment", [0, 0, 1, 1, 2, 2, 2], [0.5, 7.5, 16], ([0], [0, 0])),
    ("thirds", [0, 0, 0, 1, 1, 2, 2], [8 / 3, 11.5, 16.5], ([0], [0, 1])),
    ("video", [0, 0, 0, 0, 0, 0, 0], [64 / 7], ([0], [0, 0])),
])  # fmt: skip
def test_sec32_segments_by_hand(granularity, expected, means, of_one_and_two):
    """Changes of 1, 6, 1, 7, 1, 1, of which two are above 3.5, the 75th percentile; videos of few clips."""
    f = np.array([[0], [1], [7], [8], [15], [16], [17]], np.float32)
    segment = motionfit.segments(f, granularity, 75)
    assert segment.tolist() == expected
    H = motionfit.segment_means(f, segment)
    assert H.dtype == np.float32 and H[:, 0].tolist() == pytest.approx(means)
    assert tuple(motionfit.segments(f[:T], granularity, 75).tolist() for T in (1, 2)) == of_one_and_two


# ---- MERS and MARS ---------------------------------------------------------------------------------


def test_feature_loss_known_value_with_the_teacher_detached():
    z = torch.tensor([[3.0, 0.0], [1.0, 4.0]]).requires_grad_()
    teacher = torch.tensor([[0.0, 0.0], [0.0, 2.0]]).requires_grad_()
    loss = motionfit.feature_loss(z, teacher)
    assert loss.item() == (9 + 0 + 1 + 4) / 4
    loss.backward()
    assert teacher.grad is None and z.grad.tolist() == [[1.5, 0.0], [0.5, 1.0]]  # 2 (z - z') / 4
    assert motionfit.feature_loss(z.bfloat16(), teacher.bfloat16()).dtype == torch.float32


# ---- a small data set ------------------------------------------------------------------------------

FRAMES = [13, 24, 5, 17, 13, 21, 9, 13]  # of the training videos; of class a and b by turns
CLIPS = [3, 5, 1, 0, 3, 5]  # dense clips of 4 fields of the videos of src: 12, 23, 4, -, 12, 20 fields
NO_FLOW = 3  # the source video whose flow is missing


def write_video(root, name, v, n):
    """Frame t of video v is red 6 t, green 30 v, its class blue; of field t u says v, and v is 112 + t."""
    (root / name).mkdir(parents=True)
    for t in range(n):
        Image.new("RGB", (32, 24), (6 * t, 30 * v, 200 if v % 2 else 40)).save(root / name / f"{t:03d}.png")
    field = torch.empty(n - 1, 2, 24, 32, dtype=torch.uint8)
    field[:, 0] = 128 + (40 + 6 * v) * (-1) ** v
    field[:, 1] = 112 + torch.arange(n - 1).view(-1, 1, 1)
    target = root.with_name(f"{root.name}_flow") / f"{name}.mp4"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_flow(target, field)


def moment(clip):
    """(v, [t, ...]) of a clip (T, C, H, W) of frames or of fields."""
    clip = clip[..., 0, 0].int().tolist()
    if len(clip[0]) == 3:
        return clip[0][1] // 30, [frame[0] // 6 for frame in clip]
    return (abs(clip[0][0] - 128) - 40) // 6, [field[1] - 112 for field in clip]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of set (8 training, 5 test videos, one of them unreadable), src (6 and 2), and their flow."""
    root = tmp_path_factory.mktemp("sets")
    for name, frames, test in (("set", FRAMES, 5), ("src", FRAMES[:6], 2)):
        for part, numbers in (("train", frames), ("test", [13] * test)):
            lines = []
            for v, n in enumerate(numbers):
                folder = f"{'ab'[v % 2]}/{part}{v}"
                if (name, part, v) == ("set", "test", 1):
                    folder += ".mp4"
                    (root / name / folder).write_text("<html>404</html>")
                else:
                    write_video(root / name, folder, v, n)
                lines.append(f"{folder} {v % 2}\n")
            (root / name / f"{part}.txt").write_text("".join(lines))
        (root / name / "classes.txt").write_text("a\nb\n")
    (root / "src_flow" / "b" / f"train{NO_FLOW}.mp4").unlink()
    return root


SHORT = ("--net r3d_10-pool --width 0.0625 --size 16 --stretch 20 26 --frames 4 --lr_batch 2 --batch 2 "
         "--multi_clips 2 --epochs 1 --lr_steps cosine --optimizer adamw --lr 0.01 --clusters 2 --clips 2 "
         "--workers 0 --log_every 1 --eval_every 100 --holdout 0 --max_bad 0.5")  # fmt: skip


def args_of(stage, line, start="", key=None):
    """Arguments of a stage: the flags of `line` that it has, and `start`, the files that it starts from."""
    words = flags.by_stage(line.split(), {stage: motionfit.parser_of(stage) for stage in motionfit.STAGES})
    return motionfit.parse_args([stage, *words[stage], *start.split()])[key or stage]


def line_of(sets, out, more=""):
    return f"--data {sets}/set --source {sets}/src --out {out} {SHORT} {more}"


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def go(stage, sets, out, more="", start=""):
    """Run one stage; the rows of its log."""
    args = args_of(stage, line_of(sets, out, more), start)
    assert motionfit.one_run(stage, args, {stage: args})
    folder = out if stage == "finetune" else out / stage
    return rows_of(folder) if (folder / "log.jsonl").exists() else []


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
    """The run folder of all stages, as `main` runs them."""
    out = tmp_path_factory.mktemp("whole")
    line = line_of(sets, out, "--holdout 0.2 --epochs 10 --batch 4 --lr_batch 4 --lr 0.02")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["motionfit.py", *line.split()])
        motionfit.main()
    return out


# ---- clips -----------------------------------------------------------------------------------------


def train_args(**changes):
    return Namespace(**dict(multi_clips=2, frames=4, stride=1, size=16, stretch=(20, 26), flip=False, seed=0,
                            neighbours=False) | changes)  # fmt: skip


def drawn(n, R, frames, stride, seeds):
    args = train_args(multi_clips=R, frames=frames, stride=stride)
    return [motionfit.multi_clip(range(n), np.random.default_rng(s), args, ("rgb",)) for s in range(seeds)]


@pytest.mark.parametrize("n, R, frames, stride, apart, room", [
    (14, 3, 4, 1, 4, 2), (27, 3, 5, 2, 9, 0), (9, 1, 4, 2, 0, 2), (7, 2, 4, 1, 0, 3),  # a frame too few
])  # fmt: skip
def test_d3_clips_of_a_long_video_do_not_overlap(n, R, frames, stride, apart, room):
    """All starts in time order are drawn, a clip apart where the video is long enough."""
    starts = set()
    for windows in drawn(n, R, frames, stride, 400):
        assert all((np.diff(window) == stride).all() and len(window) == frames for window in windows)
        starts.add(tuple(int(window[0]) for window in windows))
    shifts = itertools.combinations_with_replacement(range(room + 1), R)
    assert starts == {tuple(k + i * apart for i, k in enumerate(shift)) for shift in shifts}
    for windows in drawn(3, R, 8, 2, 5):  # a video shorter than a clip starts again
        assert all(window.tolist() == [2 * t % 3 for t in range(8)] for window in windows)


@pytest.mark.parametrize("n, frames, stride, hop, expected", [
    (20, 4, 1, 4, [0, 4, 8, 12, 16]), (19, 4, 1, 4, [0, 5, 10, 15]), (20, 4, 1, 7, [0, 8, 16]),
    (20, 4, 3, 4, [0, 4, 8]), (4, 4, 1, 1, [0]), (5, 4, 1, 1, [0, 1]), (7, 4, 1, 4, [2]),
])  # fmt: skip
def test_d6_dense_clips_by_hand(n, frames, stride, hop, expected):
    windows = motionfit.DenseClips(frames, stride, hop=hop).sample(range(n))
    assert [int(window[0]) for window in windows] == expected
    assert all((np.diff(window) == stride).all() and len(window) == frames for window in windows)


def test_d6_no_more_than_128_dense_clips():
    starts = [int(w[0]) for w in motionfit.DenseClips(4, 1, hop=5).sample(range(1004))]
    assert len(starts) == 128 and (starts[0], starts[-1]) == (0, 1000) and set(np.diff(starts)) == {7, 8}
    (window,) = motionfit.DenseClips(3, 2, hop=6).sample(range(4))
    assert window.tolist() == [0, 2, 0]  # a short video starts again


def pseudo_of(counts, **about):
    """Pseudo-labels 100, 101, ... of the clips."""
    first = np.concatenate([[0], np.cumsum(counts)])
    labels = np.arange(100, 100 + first[-1], dtype=np.int32)
    about = dict(clusters=200, granularity="clip", unlabelled="", learned={}) | about
    return motionfit.Pseudo(labels, first, **about)


def write_pseudo(path, labels, **changes):
    about = {name: getattr(labels, name) for name in ("clusters", "granularity", "unlabelled", "learned")}
    np.savez(path, labels=labels.labels, first=labels.first, about=json.dumps(about | changes))


@pytest.fixture(scope="module")
def videos(sets):
    """The training videos of `set`; their labels are their numbers."""
    return replace(load_data(f"{sets}/set").train, labels=np.arange(8))


@pytest.mark.parametrize("frames, neighbours", [(4, False), (6, True)])
def test_d6_d8_labels_belong_to_the_windows(videos, frames, neighbours):
    """Clip t of T: the same share of the video, whatever the length of the clip; nobody knows true labels."""
    counts, args = [3, 5, 1, 4, 3, 5, 2, 3], train_args(frames=frames, neighbours=neighbours)
    labels, met = pseudo_of(counts), Counter()
    sample = partial(motionfit.pseudo_labelled, args=args, pseudo_labels=labels)
    streams = partial(motionfit.modality.Streams, modalities=("rgb",))
    clips = motionfit.Clips(videos, sample, lambda clips: (torch.stack(clips),), 0, open=streams)
    for p in range(64):
        item = clips[p]
        (x,), y, i = item["views"], item["label"], item["index"]
        assert x.shape[0] == 2 and y.dtype == torch.int64 and y.shape == (2, 3 if neighbours else 1)
        room = max(FRAMES[i] - frames, 0)
        for clip, ys in zip(x, y.tolist(), strict=True):
            t = ys[0] - 100 - int(labels.first[i])
            start = room * t / (counts[i] - 1) if counts[i] > 1 else room / 2
            assert moment(clip) == (i, [(round(start) + k) % FRAMES[i] for k in range(frames)])
            if neighbours:
                ends = ys[0] + 1 if t + 1 < counts[i] else -1, ys[0] - 1 if t > 0 else -1
                assert tuple(ys[1:]) == ends
            met[i, t] += 1
        assert y[0, 0] < y[1, 0] or counts[i] == 1  # in time order, and different if there are two
    assert len(met) == sum(counts)


def test_d9_whole_groups_are_held_out():
    sizes, chosen = [3, 1, 7, 2, 4, 5, 1, 9, 3, 5], set()  # 40
    groups = np.repeat(np.arange(10), sizes)
    videos = Videos.make("", [f"v{i}" for i in range(40)], [0] * 40, groups)
    for seed in range(20):
        is_held_out = hold_out(videos, 0.25, seed)
        assert is_held_out.dtype == bool and 10 <= is_held_out.sum() < 10 + 9
        assert all(is_held_out[groups == g].all() or not is_held_out[groups == g].any() for g in range(10))
        chosen.add(tuple(is_held_out))
    assert len(chosen) > 10 and np.array_equal(is_held_out, hold_out(videos, 0.25, 19))
    assert len(set(groups[~hold_out(videos, 1.0, 0)])) == 1  # a group at least is left
    ungrouped = Videos.make("", [f"v{i}" for i in range(40)], [0] * 40)
    assert hold_out(ungrouped, 0.1, 3).sum() == 4 and not hold_out(ungrouped, 0.0, 3).any()


# ---- views -----------------------------------------------------------------------------------------


def painted(R):
    """R moments, each a clip (2, 3, 60, 80) whose red tells the column and green the row, and flow of half
    the resolution whose v tells the column; u is 50 levels to the right. Blue and the last frame: which."""
    moments = []
    for r in range(R):
        x = torch.linspace(0, 240, 80).expand(2, 1, 60, 80)
        y = torch.linspace(0, 240, 60)[:, None].expand(2, 1, 60, 80)
        v = x.unflatten(3, (-1, 2)).mean(4)[:, :, ::2]
        which = torch.full_like(x, 20.0 * r)
        moments += [torch.cat([x, y, which], 1), torch.cat([torch.full_like(v, 178.0), v], 1)]
    return [clip.round().to(torch.uint8) for clip in moments]


def views_of(seed, R=3, **changes):
    torch.manual_seed(seed)
    args = train_args(size=24, stretch=[32, 44], multi_clips=R, **changes)
    return motionfit.train_views(painted(R), args, ("rgb", "field"))


def test_d3_one_crop_and_flip_for_all_that_is_seen_of_a_clip_and_others_for_each_clip():
    places, patterns = set(), Counter()
    for seed in range(80):
        rgb, field = views_of(seed, flip=seed < 60)
        assert rgb.shape == (3, 2, 3, 24, 24) and field.shape == (3, 2, 2, 24, 24)
        is_flipped = rgb[:, 0, 0, 0, 0] > rgb[:, 0, 0, 0, -1]
        assert (rgb[:, :, 0].int() - field[:, :, 1].int()).abs().max() <= 6
        assert (field[:, :, 0] == torch.where(is_flipped, 78, 178).view(3, 1, 1, 1)).all()
        assert rgb[:, 0, 2, 0, 0].tolist() == [0, 20, 40]  # the clips are in order
        if seed < 60:
            patterns[tuple(is_flipped.tolist())] += 1
        else:
            assert not is_flipped.any()
            places |= {tuple(clip[0, :2, 0, 0].tolist()) for clip in rgb}
    assert len(patterns) == 8 and len(places) > 40 and len({y for _, y in places}) == 9  # 32 - 24 and one


# ---- networks --------------------------------------------------------------------------------------


def network(R=2, K=3, ordered=False, neighbours=False):
    torch.manual_seed(0)
    backbone = backbones.build("r3d_10-pool", K, width=1 / 16)
    nn.init.normal_(backbone.fc.weight)
    return motionfit.Network(backbone, R, ordered, neighbours).eval()


# ---- a step ----------------------------------------------------------------------------------------


def naive_terms(net, x, y, p, z_teacher):
    """The terms of a step by plain loops."""
    z = net.backbone.embed(x.flatten(0, 1)).detach()
    heads = [net.backbone.fc, *net.heads] if y is not None else []
    logits = [(z @ head.weight.T + head.bias).detach().view(*x.shape[:2], -1) for head in heads]
    names = ["loss_mc", "loss_next", "loss_previous"][: len(heads)]
    terms = {name: naive_mc(row, y[..., k]) for k, (name, row) in enumerate(zip(names, logits, strict=True))}
    if p is not None:
        order = net.order(z.view(*x.shape[:2], -1), p).tolist()
        terms["loss_co"] = sum(-math.log(softmax(row)[k]) for row, k in zip(order, p, strict=True)) / len(p)
    if z_teacher is not None:
        pairs = list(zip(z.flatten().tolist(), z_teacher.flatten().tolist(), strict=True))
        terms["loss_features"] = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    if y is not None:
        terms["clip_top1"] = (logits[0].argmax(-1) == y[..., 0]).double().mean().item()
    return terms


@pytest.mark.parametrize("R, lam, neighbours, teacher, labels", [
    (2, 1.0, False, False, True), (3, 0.3, False, False, True), (3, 0.0, False, False, True),
    (2, 1.0, True, False, True), (2, 0.6, True, False, True),
    (2, 1.0, False, True, False), (2, 1.0, False, True, True),  # MERS, MARS
])  # fmt: skip
def test_train_step_matches_plain_loops(R, lam, neighbours, teacher, labels):
    """Eq. 3 weighs all losses of labels against the order; MARS adds 50 times the features (D13)."""
    net, orders = network(R, 3, lam < 1, neighbours), []
    x = random(3, R, 3, 4, 16, 16, scale=1.0)
    y = torch.arange(3 * R * 3).view(3, R, 3) * 5 % 7 % 4 - 1
    y[..., 0] = torch.arange(3 * R).view(3, R) % 3
    assert (y[..., 1:] < 0).any()
    y = (y if neighbours else y[..., :1]) if labels else None
    z_teacher = random(3 * R, 32, seed=5).requires_grad_() if teacher else None
    args = Namespace(multi_clips=R, lam=lam, alpha=50.0)
    loss, terms = motionfit.train_step(lambda x, p: (orders.append(p), net(x, p))[1], x, y, args, z_teacher)
    expected = naive_terms(net, x, y, orders[0], z_teacher)
    assert (orders[0] is None) == (lam == 1)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    of_labels = sum(expected.get(name, 0) for name in ("loss_mc", "loss_next", "loss_previous"))
    total = lam * of_labels + (1 - lam) * expected.get("loss_co", 0)
    total += (50 if labels else 1) * expected.get("loss_features", 0)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    loss.backward()
    fc = net.backbone.fc.weight.grad
    assert (fc is not None and bool(fc.any())) == (labels and lam > 0)  # lambda 0 is the order alone
    assert net.backbone.stem[0].weight.grad.any() and (not teacher or z_teacher.grad is None)
    assert net.order is None or net.order.last[1].weight.grad.any()
    # A parameter without a gradient would stop DistributedDataParallel; MERS has no use for the classifier.
    assert labels == all(p.grad is not None for p in net.parameters())


def test_step_draws_every_order_alike():
    orders = []

    def net(x, p):
        orders.append(p)
        return [torch.zeros(len(x), 3, 2)], torch.zeros(len(x), 6), None

    y = torch.zeros(600, 3, 1, dtype=torch.int64)
    motionfit.train_step(net, torch.zeros(600, 1), y, Namespace(multi_clips=3, lam=0.5))
    counts = torch.bincount(orders[0])
    assert len(counts) == 6 and counts.min() > 60  # of 100


# ---- training --------------------------------------------------------------------------------------


def moments_of(x, kind="rgb"):
    """[(v, [t, ...]), ...] of the clips of a normalised batch (B, R, C, T, H, W) or (B R, C, T, H, W)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in motionfit.MODALITIES[kind][2:4])
    x = ((x.flatten(0, -5) * std + mean) * 255).round()
    return [moment(clip.transpose(0, 1)) for clip in x]


@pytest.fixture
def steps(monkeypatch):
    """(x, y, z_teacher) of all steps that are trained."""
    found, real = [], motionfit.train_step

    def spied(net, x, y, args, z_teacher=None):
        found.append((x, y, z_teacher))
        return real(net, x, y, args, z_teacher)

    monkeypatch.setattr(motionfit, "train_step", spied)
    return found


@pytest.fixture
def scored(monkeypatch):
    """Names and labels of the videos that are scored: for validation one view of each, in the end six."""
    found, real = {}, evaluate.score

    def spied(net, videos, recipe, *rest, **words):
        found.update({videos.name(i): int(videos.labels[i]) for i in range(len(videos))})
        assert (recipe.clips, recipe.crops) == ((2, 3) if videos.name(0).startswith("a/test") else (1, 1))
        return real(net, videos, recipe, *rest, **words)

    monkeypatch.setattr(evaluate, "score", spied)
    return found


def weights(path):
    return torch.load(path, weights_only=True)["net"]


def start_of(classes):
    """The weights that seed 0 gives a network."""
    torch.manual_seed(0)
    return backbones.build("r3d_10-pool", classes, width=0.0625).state_dict()


def test_generator_learns_labelled_clips_of_flow_by_its_schedule(sets, tmp_path, steps, scored):
    """Sec. 4.2: a tenth of the rate at steps; a share of the videos is for validation only."""
    line = "--epochs 3 --lr_steps 1,2 --optimizer sgd --lr 0.1 --holdout 0.25 --eval_every 1 --crops 3"
    rows = go("generator", sets, tmp_path, line)
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3)
    assert [row["step"] for row in rows if "val_top1" in row] == [3, 6, 9]
    trained = set()
    for x, y, z_teacher in steps:
        assert x.shape == (2, 2, 2, 4, 16, 16) and z_teacher is None
        clips = [v for v, _ in moments_of(x, "field")]
        assert [v % 2 for v in clips] == y.flatten().tolist()
        trained |= {f"{'ab'[v % 2]}/train{v}" for v in clips}
    held = {name for name in scored if "train" in name}
    everything = {f"{'ab'[v % 2]}/train{v}" for v in range(8)}
    assert len(trained) == 6 and len(held) == 2 and trained | held == everything
    listed = [line.split()[0] for line in (tmp_path / "generator" / "labelled.txt").read_text().splitlines()]
    assert sorted(listed) == sorted(everything)  # what is held out is labelled, too
    recipe = load_model(tmp_path / "generator" / "model.pt")[3]
    assert (recipe.modality, recipe.crops, recipe.average) == ("field", 3, "logits")
    go("pseudo", sets, tmp_path)
    assert result_of(tmp_path / "pseudo")["clips"] == sum(CLIPS)  # of each clip one crop


def test_a_generator_may_learn_the_order_and_start_from_that(sets, tmp_path):
    """Sec. 4.3, lambda = 0, and then labels; the classifier starts anew."""
    (row, *_) = go("generator", sets, tmp_path / "a", "--lam 0.25 --modality rgb --multi_clips 3")
    assert row["loss"] == pytest.approx(0.25 * row["loss_mc"] + 0.75 * row["loss_co"], rel=1e-4)
    first = tmp_path / "a" / "generator" / "model.pt"
    _, made, _, recipe = load_model(first)
    assert recipe.modality == "rgb" and made["in_channels"] == 3
    go("generator", sets, tmp_path / "b", "--modality rgb --epochs 0", f"--init {first}")
    before, after = weights(first), weights(tmp_path / "b" / "generator" / "model.pt")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}


def test_fine_tuning_learns_all_labels_and_leaves_early_stages_frozen(whole, sets, tmp_path, steps):
    """Sec. 4.2, D10: parameters and statistics of all but conv4, conv5 and fc are those of self-training."""
    init = whole / "selftrain" / "model.pt"
    rows = go("finetune", sets, tmp_path, "--epochs 2", f"--init {init}")
    assert {v for x, *_ in steps for v, _ in moments_of(x)} == set(range(8))
    assert not any("eval" in row for row in rows)
    before, after = weights(init), weights(tmp_path / "model.pt")
    early = {key for key in before if key.startswith(("stem.", "layer1.", "layer2."))}
    late = {key for key in before if key.startswith(("layer3.", "layer4."))}
    assert len(early) > 20 and len(early | late) + 2 == len(before)
    assert all(torch.equal(before[key], after[key]) for key in early)
    assert not any(torch.equal(before[key], after[key]) for key in late)
    assert not torch.isin(after["fc.weight"], before["fc.weight"]).any()  # two clusters are not two classes


def test_mers_matches_features_only(whole, sets, tmp_path, steps):
    """Of the videos that pseudo-labels would be learned of; teacher and student see the same moments."""
    seen, embed = [], backbones.Backbone.embed

    def spied(net, x):
        assert not torch.is_grad_enabled() and not net.training
        seen.append(x)
        return embed(net, x)

    line, generator = "--source all --epochs 2 --holdout 0.3", whole / "generator" / "model.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones.Backbone, "embed", spied)
        rows = go("selftrain", sets, tmp_path, line, f"--teacher {generator}")
    assert all(row["loss"] == row["loss_features"] > 0 and "loss_mc" not in row for row in rows)
    held = hold_out(load_data(f"{sets}/set").train, 0.3, 0)
    assert {v for x, *_ in steps for v, _ in moments_of(x)} == set(np.flatnonzero(~held))
    for (x, y, z_teacher), x_teacher in zip(steps, seen, strict=True):
        assert moments_of(x) == moments_of(x_teacher, "field") and y is None and z_teacher.shape[1] == 32
    before, after = start_of(1), weights(tmp_path / "selftrain" / "model.pt")
    assert {key for key in before if torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}


def test_mars_learns_labels_and_features_from_random_weights(whole, sets, tmp_path):
    """All stages learn (D10), but the teacher's; it must have as many features."""
    path = whole / "generator" / "model.pt"
    before = path.read_bytes()
    (row, *_) = go("finetune", sets, tmp_path, "--alpha 7", f"--teacher {path}")
    assert row["loss"] == pytest.approx(row["loss_mc"] + 7 * row["loss_features"], rel=1e-4)
    after, start = weights(tmp_path / "model.pt"), start_of(2)
    assert not any(torch.equal(start[key], after[key]) for key in start) and path.read_bytes() == before
    assert result_of(tmp_path)["teacher"] == str(path)
    with pytest.raises(SystemExit, match="model.pt has 32 features, --net r3d_10-pool x 0.125 has 64"):
        go("finetune", sets, tmp_path / "wide", "--width 0.125", f"--teacher {path}")


def test_selftraining_learns_pseudo_labels_of_its_clips(sets, tmp_path, steps, scored):
    src = load_data(f"{sets}/src").train
    labels = pseudo_of(CLIPS)
    write_pseudo(tmp_path / "p.npz", labels, unlabelled=digest_of_videos(src))
    line = "--frames 6 --epochs 4 --neighbours --holdout 0.2 --crops 3"
    rows = go("selftrain", sets, tmp_path, line, f"--pseudo {tmp_path}/p.npz")
    trained = set()
    for x, y, _ in steps:
        assert y.shape == (2, 2, 3)
        for (v, frames), (k, k_next, _) in zip(moments_of(x), y.flatten(0, 1).tolist(), strict=True):
            t = k - 100 - labels.first[v]
            assert frames == motionfit.dense_test(FRAMES[v], 6, 1, CLIPS[v])[t].tolist()
            assert k_next == (k + 1 if t + 1 < CLIPS[v] else -1)
            trained.add(v)
    ((name, k),) = scored.items()
    assert trained | {int(name[-1])} == {0, 1, 2, 4, 5} and len(trained) == 4  # not 3, which has no labels
    assert k == labels.of(int(name[-1]))[CLIPS[int(name[-1])] // 2]  # D9
    assert {"loss_next", "loss_previous"} < set(rows[0]) and rows[-1]["eval"] == "quick"
    result = result_of(tmp_path / "selftrain")
    assert (result["videos"], result["source"]) == (4, "src")
    assert load_model(tmp_path / "selftrain" / "model.pt")[0].fc.out_features == 200


# ---- which videos ----------------------------------------------------------------------------------


def names_of(videos):
    return sorted(videos.name(i) for i in range(len(videos)))


def source_of(sets, run, more):
    args = args_of("pseudo", line_of(sets, "o", more))
    return names_of(motionfit.source_videos(args, run, ("rgb",), {})[1])


def test_d14_sources(sets, run, tmp_path, monkeypatch):
    own, src = load_data(f"{sets}/set"), load_data(f"{sets}/src")
    assert source_of(sets, run, "") == names_of(src.train)
    assert source_of(sets, run, f"--source {sets}/src:test") == names_of(src.test)
    for name in ("all", f"{sets}/set"):
        assert source_of(sets, run, f"--source {name}") == names_of(own.train)
    line = "--source rest --per_class 1 --seed 3"
    few = motionfit.labelled_videos(args_of("finetune", line_of(sets, "o", line)), run, ("rgb",), {})[1]
    rest = sorted({*names_of(own.train)} - {*names_of(few)})
    assert len(few) == 2 and source_of(sets, run, line) == rest
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in (*names_of(few), *rest[1:3])))
    assert source_of(sets, run, f"{line} --source_list {tmp_path}/list.txt") == rest[1:3]
    with pytest.raises(UserError, match="--source rest has no video"):
        source_of(sets, run, "--source rest")
    monkeypatch.setattr("motionfit.load_data", lambda *_, **__: replace(own, multilabel=True))
    with pytest.raises(UserError, match="set has several labels"):
        motionfit.labelled_videos(args_of("finetune", line_of(sets, "o")), run, ("rgb",), {})


def test_a_source_without_labels(sets, tmp_path):
    """All stages of one; there is no purity."""
    (tmp_path / "u").mkdir()
    for v in range(6):
        (tmp_path / "u" / f"clip{v}").symlink_to(sets / "src" / "ab"[v % 2] / f"train{v}")
    for stage in motionfit.STAGES:
        go(stage, sets, tmp_path / "out", f"--modality rgb --source {tmp_path}/u")
    result = result_of(tmp_path / "out" / "pseudo")
    assert "purity" not in result and result["videos"] == 6
    assert result_of(tmp_path / "out")["videos"] == 5


# ---- what may have learned of the test -------------------------------------------------------------


@pytest.fixture(scope="module")
def leaky(sets, tmp_path_factory):
    """A model and pseudo-labels that have learned split 2 of `set`, and a model that says nothing."""
    folder, learned = tmp_path_factory.mktemp("leaky"), {"set": [1, 2], "src": [1]}
    made = dict(name="r3d_10-pool", classes=2, in_channels=3, width=1 / 16)
    model = backbones.build(**made), made, "ab", Recipe(4, 1)
    save_model(folder / "m.pt", *model, learned=learned)
    save_model(folder / "unknown.pt", *model)
    src = load_data(f"{sets}/src").train
    write_pseudo(folder / "p.npz", pseudo_of(CLIPS), unlabelled=digest_of_videos(src), learned=learned)
    return folder


@pytest.mark.parametrize("stage, start", [
    ("generator", "--init {}/m.pt"), ("pseudo", "--generator {}/m.pt"), ("selftrain", "--pseudo {}/p.npz"),
    ("selftrain", "--teacher {}/m.pt"), ("finetune", "--teacher {}/m.pt"), ("finetune", "--init {}/m.pt"),
    ("eval", "--eval {}/m.pt"),
])  # fmt: skip
def test_d12_what_may_know_test_labels_is_refused(stage, start, leaky, sets, tmp_path):
    args = args_of("finetune" if stage == "eval" else stage, line_of(sets, tmp_path, "--modality rgb"),
                   start.format(leaky), key=stage)  # fmt: skip
    with pytest.raises(SystemExit) as end:
        motionfit.one_run(stage, args, {stage: args})
    sentence = str(end.value)
    assert f"{leaky}/" in sentence and "has learned split 2 of" in sentence and "--allow_leak" in sentence
    assert sentence.endswith("(2)") and "\n" not in sentence
    if stage == "finetune" and "--init" in start:  # --allow_leak may be added
        del end  # with the run, which holds the folder's lock
        gc.collect()
        torch.distributed.destroy_process_group()
        go("finetune", sets, tmp_path, "--modality rgb --allow_leak", start.format(leaky))
        learned = torch.load(tmp_path / "model.pt", weights_only=True)["learned"]
        assert learned == {"set": [1, 2], "src": [1]}


def test_d12_files_that_do_not_say_and_variants_of_a_data_set(leaky):
    args = Namespace(data="set:small", split=1, allow_leak=False)
    with pytest.raises(UserError, match="unknown.pt does not say whose labels"):
        motionfit.learned_by(args, leaky / "unknown.pt")
    with pytest.raises(UserError, match="split 2 of set:small"):
        motionfit.learned_by(args, "p.npz", {"set": [2]})
    assert motionfit.learned_by(args, "p.npz", {"other": [2]}) == {"other": [2]}


@pytest.mark.parametrize("source, count", [("set:test", 5), ("set/a", 3)])
def test_d12_a_source_with_test_videos_is_refused(source, count, sets, run):
    """As its test list, or as a folder that has some of them."""
    line = f"--source {sets}/{source}"
    with pytest.raises(UserError, match=f"{count} of the 5 test videos of --data, split 1"):
        source_of(sets, run, line)
    assert source_of(sets, run, f"{line} --allow_leak")


# ---- pseudo-labels ---------------------------------------------------------------------------------


def pseudo(whole, sets, out, more=""):
    """Run the stage with the generator of `whole`; the labels of each of the six videos, the file's bytes."""
    go("pseudo", sets, out, f"--clusters 5 {more}", f"--generator {whole}/generator/model.pt")
    path = out / "pseudo" / "pseudo.npz"
    with np.load(path) as file:
        labels = np.split(file["labels"], file["first"][1:-1])
    return [of_video.tolist() for of_video in labels], path.read_bytes()


def test_d6_features_are_those_of_the_dense_clips(whole, sets):
    net, _, _, recipe = load_model(whole / "generator" / "model.pt")
    rows, found = np.load(whole / "pseudo" / "features" / "features.npy"), []
    for start in (0, 5, 10, 14, 19):  # of the second video, of 23 fields
        with Flow(sets / "src_flow" / "b" / "train1.mp4") as source:
            clip = source.get(range(start, start + 4))
        with torch.no_grad():
            found.append(net.embed(recipe.to_input(recipe.view([clip]), "cpu"))[0].numpy())
    assert rows.shape == (sum(CLIPS), 32) and rows[3:8] == pytest.approx(np.stack(found), abs=1e-5)


@pytest.mark.parametrize("granularity, sizes", [
    ("clip", CLIPS), ("video", [1, 1, 1, 0, 1, 1]), ("thirds", [3, 3, 1, 0, 3, 3]), ("segment", None),
])  # fmt: skip
def test_sec32_what_gets_one_label(granularity, sizes, whole, sets, tmp_path):
    labels, _ = pseudo(whole, sets, tmp_path, f"--granularity {granularity}")
    f = np.split(np.load(tmp_path / "pseudo" / "features" / "features.npy"), np.cumsum(CLIPS)[:-1])
    own = [motionfit.segments(clips, granularity, 75) if len(clips) else np.zeros(0, int) for clips in f]
    means = [motionfit.segment_means(*pair) for pair in zip(f, own, strict=True) if len(pair[0])]
    expected, _ = kmeans(np.concatenate(means), 5)
    assert sizes is None or [len(set(segment)) for segment in own] == sizes
    for v, segment in enumerate(own):
        n = sum(len(set(other)) for other in own[:v])
        assert labels[v] == expected[n + segment].tolist()
    result = result_of(tmp_path / "pseudo")
    y = np.repeat([v % 2 for v in range(6)], CLIPS)
    assert result["purity"] == purity(np.array(sum(labels, [])), y)["purity"]
    assert (result["videos"], result["unreadable"], result["clips"]) == (6, 1, sum(CLIPS))
    assert (result["segments"], result["clusters"]) == (sum(map(len, means)), len(set(sum(labels, []))))


def test_pseudo_labels_are_a_function_of_the_seed_and_not_of_the_ranks(whole, sets, tmp_path):
    """One process clusters, and the others wait."""
    _, expected = pseudo(whole, sets, tmp_path / "a")
    assert pseudo(whole, sets, tmp_path / "c", "--seed 1")[1] != expected
    words = (f"pseudo --data {sets}/set --source {sets}/src --out {tmp_path}/b --clusters 5 --workers 0 "
             f"--max_bad 0.5 --generator {whole}/generator/model.pt")  # fmt: skip
    root = Path(motionfit.__file__).parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, root / "motionfit.py", *words.split()]
    process = forks.start(call, tmp_path, environment, ranks=2)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert (tmp_path / "b" / "pseudo" / "pseudo.npz").read_bytes() == expected


def test_hop_and_iterations(whole, sets, tmp_path):
    labels, _ = pseudo(whole, sets, tmp_path / "a", "--hop 3 --iterations 1")
    assert [len(of_video) for of_video in labels] == [3, 7, 1, 0, 3, 6]  # 12, 23, 4, -, 12 and 20 fields
    rows = np.load(tmp_path / "a" / "pseudo" / "features" / "features.npy")
    assert sum(labels, []) == kmeans(rows, 5, 1)[0].tolist()


@pytest.mark.parametrize("line, sentence", [
    ("--clusters 18", "--clusters 18 is more than there are clips or segments, 17"),
    ("--max_bad 0.1", "1 of 6 videos have no features, more than --max_bad 0.1;"),
])  # fmt: skip
def test_a_source_that_cannot_be_clustered(line, sentence, whole, sets, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        pseudo(whole, sets, tmp_path, line)


def loaded(sets, path, line=""):
    args = args_of("selftrain", line_of(sets, "o", line), f"--pseudo {path}")
    return motionfit.load_pseudo(args, load_data(f"{sets}/src").train)


def test_pseudo_labels_that_are_damaged_or_something_else(whole, sets, tmp_path):
    path, p = whole / "pseudo" / "pseudo.npz", tmp_path / "p.npz"
    labels = loaded(sets, path)
    assert (
        np.diff(labels.first).tolist() == CLIPS and labels.labels.dtype == np.int32 and labels.clusters == 2
    )
    good = path.read_bytes()
    at = good.index(b"NUMPY") + 150  # a label
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    np.savez(p, labels=np.zeros(3), first=np.zeros(2), about='{"clusters": 3}')
    for damaged in (good[:-200], b"", b"<html>404</html>", flipped, p.read_bytes()):
        p.write_bytes(damaged)
        with pytest.raises(UserError, match="p.npz holds no pseudo-labels, or is damaged"):
            loaded(sets, p)
    args = args_of("selftrain", line_of(sets, "o", "--source all"), f"--pseudo {path}")
    with pytest.raises(UserError, match="of other videos than --source all has"):
        motionfit.load_pseudo(args, load_data(f"{sets}/set").train)
    write_pseudo(p, labels, granularity="thirds")
    with pytest.raises(UserError, match="--neighbours needs pseudo-labels of clips, .* has thirds"):
        loaded(sets, p, "--neighbours")


# ---- all stages ------------------------------------------------------------------------------------


def test_fig2_all_stages_on_a_small_set(whole):
    """The class of these videos is plain in flow and in RGB; one of the five test videos is unreadable."""
    _, build, classes, recipe = load_model(whole / "generator" / "model.pt")
    assert (build["in_channels"], recipe.modality, recipe.stretch) == (2, "field", (20, 26))
    assert classes == ("a", "b")
    results = {name: result_of(whole / name) for name in ("generator", "pseudo", "selftrain", "")}
    assert (results["generator"]["top1"], results["generator"]["stage"]) == (80, "generator")
    assert results["pseudo"]["purity"] > 90 and results["selftrain"]["stage"] == "selftrain"
    assert (results[""]["top1"], results[""]["unreadable"], results[""]["videos"]) == (80, 1, 5)
    assert load_model(whole / "model.pt")[3].modality == "rgb"
    for path in ("generator/model.pt", "selftrain/model.pt", "model.pt"):
        assert torch.load(whole / path, weights_only=True)["learned"] == {"set": [1]}  # D12


def test_eval_tests_one_model(whole, sets, tmp_path, scored):
    line = line_of(sets, tmp_path, f"--eval {whole}/generator/model.pt --crops 3")
    runs = motionfit.parse_args(line.split())
    assert list(runs) == ["eval"]
    for _ in range(2):
        assert motionfit.one_run("eval", runs["eval"], runs)  # tested again
    result = result_of(tmp_path)
    assert (result["top1"], result["eval"]) == (80, f"{whole}/generator/model.pt")
    assert (result["clips"], result["crops"]) == (2, 3)
    more = "", "--clips 3", "--crops 3"
    assert len({motionfit.parse_args(f"--eval r/model.pt {line}".split())["eval"].out for line in more}) == 3


def test_stages_run_in_turn_until_one_is_stopped(sets, tmp_path, monkeypatch):
    done, stages = [], list(motionfit.STAGES)
    for line, last in (("", 3), ("", 1), ("finetune", 3)):
        monkeypatch.setattr(motionfit, "one_run", lambda stage, *_, last=last: (
            done.append(stage), stage != stages[last])[1])  # fmt: skip
        monkeypatch.setattr("sys.argv", ["motionfit.py", *line.split()])
        motionfit.main()
    assert done == [*stages, *stages[:2], "finetune"]
    monkeypatch.undo()
    monkeypatch.setattr(Run, "track", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    args = args_of("generator", line_of(sets, tmp_path))
    assert not motionfit.one_run("generator", args, {})
    folder = tmp_path / "generator"
    assert (folder / "last.pt").exists() and not (folder / "model.pt").exists()


def test_a_changed_input_is_a_sentence_and_no_old_result(whole, sets, tmp_path, capsys):
    """Other pseudo-labels in the same place, and an unchanged run once more."""
    start = f"--generator {whole}/generator/model.pt"
    go("pseudo", sets, tmp_path, "--clusters 3", start)
    go("selftrain", sets, tmp_path)
    capsys.readouterr()
    go("selftrain", sets, tmp_path)
    said = capsys.readouterr().out
    assert "nothing was run\nRESULT " in said and "steps" not in said
    for path in sorted((tmp_path / "pseudo").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    go("pseudo", sets, tmp_path, "--clusters 4", start)
    with pytest.raises(SystemExit, match=r"selftrain holds a run with --pseudo \w{64}, not \w{64}: "):
        go("selftrain", sets, tmp_path)
    assert "RESULT script=motionfit data=set stage=selftrain" not in capsys.readouterr().out


@pytest.mark.parametrize("line, word", [
    ("--source {}/nowhere", "nowhere"), ("--source_flow {}/none", "{}/none"),
    ("--source {}/set:test", "5 of the 5 test videos"), ("--source rest", "no video without a label"),
    ("pseudo", "generator/model.pt is not there: an earlier stage makes it"),
    ("selftrain", "pseudo/pseudo.npz is not there"), ("finetune", "selftrain/model.pt is not there"),
])  # fmt: skip
def test_mistakes_are_found_before_a_stage_trains(line, word, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(motionfit, "train", lambda *_: pytest.fail("trained"))
    line = line.format(sets)
    with pytest.raises(SystemExit, match=re.escape(word.format(sets))):
        if line in motionfit.STAGES:
            go(line, sets, tmp_path)
        monkeypatch.setattr("sys.argv", ["motionfit.py", *line_of(sets, tmp_path / "o", line).split()])
        motionfit.main()


# ---- command line ----------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    runs = motionfit.parse_args(["--data", "ucf101"])
    first, pseudo, second, third = runs.values()
    for args, numbers in ((first, (120, 8, 8, [40, 60, 80])), (second, (45, 16, 16, [20, 40])),
                          (third, (120, 8, 8, [40, 60, 80]))):  # fmt: skip
        assert (args.epochs, args.batch, args.lr_batch, args.lr_steps) == numbers
        assert (args.net, args.frames, args.stride) == ("r2plus1d_18", 16, 1)
        assert (args.multi_clips, args.lam) == (3, 1)
        assert (args.optimizer, args.lr, args.weight_decay, args.warmup) == ("sgd", 0.001, 5e-4, 0)
        assert (args.stretch, args.size, args.test_size, args.flip) == ([128, 171], 112, 112, False)
        assert (args.clips, args.crops, args.ratio, args.width) == (10, 1, 1.0, 1.0)
    assert first.holdout == second.holdout == 0.1 and first.modality == "field" and third.frozen == 2
    assert (pseudo.source, pseudo.clusters, pseudo.granularity, pseudo.hop) == ("k400", 1000, "clip", None)
    assert (pseudo.percentile, pseudo.iterations, third.alpha, second.neighbours) == (75, 20, 50, False)
    out = "runs/motionfit_ucf101_1.0_0"
    assert (pseudo.generator, second.pseudo) == (f"{out}/generator/model.pt", f"{out}/pseudo/pseudo.npz")
    assert third.init == f"{out}/selftrain/model.pt"
    assert first.init is second.teacher is third.teacher is None


def test_recipes_and_flags_go_to_the_stages_that_have_them():
    runs = motionfit.parse_args("--data toy:b --clusters 9 --flip --net r3d_18 --lr_steps 1,2.5".split())
    assert [args.epochs for args in (runs["generator"], runs["selftrain"], runs["finetune"])] == [30, 10, 20]
    assert runs["pseudo"].clusters == 9 and runs["pseudo"].source == runs["selftrain"].source == "all"
    assert all(args.flip and args.per_class == 8 for args in runs.values())
    assert [args.net for stage, args in runs.items() if stage != "pseudo"] == ["r3d_18"] * 3
    assert runs["finetune"].lr_steps == [1, 2.5] and not hasattr(runs["generator"], "clusters")
    args = motionfit.parse_args("finetune --lr_steps cosine --teacher g.pt --no-flip".split())["finetune"]
    assert (args.lr_steps, args.teacher, args.flip) == ([], "g.pt", False)


@pytest.mark.parametrize("line, word", [
    ("--lam 0.5 --multi_clips 1", "2 to 5 clips, --multi_clips is 1"), ("--lam 0 --multi_clips 9", "2 to 5"),
    ("--lam 1.5", "--lam: is a share in [0, 1], not 1.5"), ("--hop 0", "--hop: must be at least 1, not 0"),
    ("--lr_steps soon", "not soon"), ("--lr_steps 1,x", "not 1,x"), ("--percentile 101", "from 0.0 to 100"),
    ("--size 49", "--stretch 48 48"), ("--test_size 49", "--test_size"), ("--stretch 48 39", "--stretch"),
    ("--init m.pt", "--init is for one stage"), ("--teacher=m.pt", "--teacher is for one stage"),
    ("--pseudo p.npz", "name that first"), ("--stage finetune", "there is no flag or stage --stage"),
    ("train", "there is no flag or stage train; the stages are generator, pseudo, selftrain, finetune"),
    ("generator --clusters 3", "--clusters"), ("pseudo --net r3d_18", "--net"),
    ("selftrain --teacher g.pt --lam 0.5", "--lam 1"), ("selftrain --teacher g --neighbours", "--neighbours"),
    ("selftrain --teacher g.pt --pseudo p", "--pseudo"), ("finetune --teacher g --init m", "without --init"),
    *((line, line.split()[0]) for line in (
        "--lam -0.1", "--lr_steps nan", "--percentile nan", "--crops 2", "--holdout 1.5", "--clusters 0",
        "--clusters 1.5", "--iterations 0", "--stride 0", "--batch 0", "--frames 0", "--multi_clips 0",
        "--epochs -1", "--epochs nan", "--lr -1", "--lr inf", "--warmup -1", "--weight_decay nan",
        "--alpha -1", "--frozen 5", "--granularity frame", "--modality diff", "--optimizer lars",
        "--ratio 20", "--net r2plus1d_11")),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit) as end:
        motionfit.parse_args(line.split())
    said = str(end.value)
    assert said.startswith("motionfit: ") and word in said and said.endswith("(2)") and "\n" not in said

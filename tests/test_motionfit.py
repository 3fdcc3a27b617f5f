"""The equations of motionfit.py (a value by hand, a plain loop, where gradients go), its clips and labels,
what its stages learn and leave to each other, its command line."""

import itertools
import json
import math
import os
import re
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


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


# ---- Eq. 1: multi-clip loss ------------------------------------------------------------------------


def naive_mc(logits, y):
    """Eq. 1: over the videos b, over their clips i; what is labelled -1 is not there."""
    B, R = y.shape
    terms = [-math.log(softmax(logits[b, i].tolist())[y[b, i]]) for b in range(B) for i in range(R)
             if y[b, i] >= 0]  # fmt: skip
    return sum(terms) / len(terms)


# Of one video: softmax (1/4, 3/4) and (1/2, 1/2), of the other (1/5, 4/5) and (1/10, 9/10).
FOUR = torch.tensor([[[0.0, math.log(3.0)], [7.0, 7.0]], [[0.0, math.log(4.0)], [0.0, math.log(9.0)]]])


def test_eq1_known_value():
    by_hand = ((math.log(4 / 3) + math.log(2)) / 2 + (math.log(5) + math.log(10 / 9)) / 2) / 2
    found = motionfit.multi_clip_loss(FOUR, torch.tensor([[1, 0], [0, 1]]))
    assert found.item() == pytest.approx(by_hand, abs=1e-6)


def test_eq1_averages_losses_not_clips():
    logits, y = random(4, 3, 5), torch.arange(4)
    loss = motionfit.multi_clip_loss(logits, y[:, None].expand(-1, 3)).item()
    of_logits = nn.functional.cross_entropy(logits.mean(1), y).item()
    of_probs = nn.functional.nll_loss(logits.softmax(-1).mean(1).log(), y).item()
    assert loss > of_logits + 0.1 and loss > of_probs + 0.1  # as log is concave


def test_eq1_without_what_is_not_labelled():
    logits, y = random(3, 4, 5).requires_grad_(), torch.arange(12).view(3, 4) % 6 - 1
    loss = motionfit.multi_clip_loss(logits, y)
    assert (y < 0).sum() == 2 and loss.item() == pytest.approx(naive_mc(logits, y), rel=1e-5)
    loss.backward()
    # (softmax - one-hot) over the ten clips that count
    expected = (logits.softmax(-1) - nn.functional.one_hot(y.clamp(min=0), 5)) * (y >= 0)[..., None] / 10
    assert torch.allclose(logits.grad, expected.detach(), atol=1e-6)


def test_eq1_of_clips_without_any_label_is_zero():
    """All clips of a step may be the last of their videos, which have no next one (D11)."""
    logits = random(2, 3, 5).requires_grad_()
    loss = motionfit.multi_clip_loss(logits, torch.full((2, 3), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# ---- Eq. 2 and 3: order of the clips ---------------------------------------------------------------


def test_eq2_known_value():
    # softmax (1/4, 3/4) and (1/2, 1/2)
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    by_hand = (math.log(4) + math.log(2)) / 2
    found = motionfit.clip_order_loss(logits, torch.tensor([0, 1]))
    assert found.item() == pytest.approx(by_hand, abs=1e-6)
    assert motionfit.clip_order_loss(logits.bfloat16(), torch.tensor([0, 1])).dtype == torch.float32
    y = torch.zeros(1, 2, dtype=torch.int64)
    assert motionfit.multi_clip_loss(logits[None].bfloat16(), y).dtype == torch.float32  # under autocast


class Seen(nn.Module):
    """In place of the layer of a pair: keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.x = []

    def forward(self, x):
        self.x.append(x)
        return torch.zeros(len(x), 8)


@pytest.mark.parametrize("R", [2, 3, 4])
def test_eq2_the_head_sees_the_order_whose_number_it_shall_tell(R):
    """All pairs, each the features of two clips one after the other (Xu et al. 2019, Sec. 3.3)."""
    head, N = motionfit.OrderHead(3, R, hidden=8), math.factorial(R)
    assert sorted(map(tuple, head.orders.tolist())) == list(itertools.permutations(range(R)))
    z, p, head.pair = random(N, R, 3), torch.arange(N).flip(0), Seen()
    head(z, p)
    for b in range(N):
        shuffled = [z[b, i] for i in head.orders[p[b]]]
        expected = [torch.cat(pair) for pair in itertools.combinations(shuffled, 2)]
        assert torch.equal(torch.stack([x[b] for x in head.pair.x]), torch.stack(expected))


def test_eq2_head_matches_naive_layers():
    head = motionfit.OrderHead(4, 3, hidden=5).eval()
    z = random(2, 3, 4)
    (W, b), (V, c) = head.pair.parameters(), head.last.parameters()
    pairs = [torch.cat([z[:, i], z[:, j]], 1) @ W.T + b for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = torch.cat([pair.clamp(min=0) for pair in pairs], 1) @ V.T + c
    assert torch.allclose(head(z, torch.zeros(2, dtype=torch.int64)), expected, atol=1e-6)
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.5]
    assert motionfit.OrderHead(4, 3).pair[0].out_features == 512  # D5


def test_eq3_known_value():
    assert motionfit.batch_loss(2.0, 6.0, 0.75) == 3.0
    assert motionfit.batch_loss(2.0, 6.0, 1.0) == 2.0 and motionfit.batch_loss(2.0, 6.0, 0.0) == 6.0


# ---- Eq. 4: segments -------------------------------------------------------------------------------


def column(*numbers):
    return np.array(numbers, np.float32)[:, None]


def test_eq4_known_value():
    # |f_t - f_{t-1}|_1 is 1, 6, 5, 0; the 75th percentile of (0, 1, 5, 6) is 5.25. By Euclidean distance, 5
    # and 4.24, or by the largest difference, 5 and 3, it would be the other.
    f = np.array([[0, 0], [1, 0], [4, 3], [9, 3], [9, 3]], np.float32)
    assert motionfit.boundaries(f, 75).tolist() == [False, False, True, False, False]
    assert motionfit.boundaries(f, 50).tolist() == [False, False, True, True, False]  # above 3


def naive_percentile(values, percentile):
    """Linear between the values in order, of which the least is that of 0 and the largest that of 100."""
    values = sorted(values)
    place = percentile / 100 * (len(values) - 1)
    low = min(int(place), len(values) - 2) if len(values) > 1 else 0
    above = values[low + 1] if len(values) > 1 else values[low]
    return values[low] + (place - low) * (above - values[low])


@pytest.mark.parametrize("percentile", [0, 10, 50, 75, 90, 100])
def test_eq4_matches_naive_loop(percentile):
    for T in range(2, 12):
        f = random(T, 5, seed=T).numpy()
        change = [sum(abs(float(a) - float(b)) for a, b in zip(f[t], f[t - 1], strict=True))
                  for t in range(1, T)]  # fmt: skip
        tau = naive_percentile(change, percentile)
        assert motionfit.boundaries(f, percentile).tolist() == [False, *(c > tau for c in change)]


# Features whose changes are 1, 6, 1, 7, 1, 1: two of them are above 3.5, the 75th percentile.
JUMPS = column(0, 1, 7, 8, 15, 16, 17)


@pytest.mark.parametrize("granularity, expected, means", [
    ("clip", [0, 1, 2, 3, 4, 5, 6], [0, 1, 7, 8, 15, 16, 17]),
    ("segment", [0, 0, 1, 1, 2, 2, 2], [0.5, 7.5, 16]),
    ("thirds", [0, 0, 0, 1, 1, 2, 2], [8 / 3, 11.5, 16.5]),
    ("video", [0, 0, 0, 0, 0, 0, 0], [64 / 7]),
])  # fmt: skip
def test_sec32_segments_by_hand(granularity, expected, means):
    found = motionfit.segments(JUMPS, granularity, 75)
    assert found.tolist() == expected
    H = motionfit.segment_means(JUMPS, found)
    assert H.dtype == np.float32 and H[:, 0].tolist() == pytest.approx(means)


@pytest.mark.parametrize("T, clip, segment, thirds", [
    (1, [0], [0], [0]), (2, [0, 1], [0, 0], [0, 1]), (3, [0, 1, 2], [0, 0, 1], [0, 1, 2]),
    (4, [0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 2]),
])  # fmt: skip
def test_sec32_segments_of_short_videos(T, clip, segment, thirds):
    """Their changes grow: of two or three the last is above the percentile, a single one is not."""
    f = column(0, 1, 3, 6)[:T]
    expected = dict(clip=clip, segment=segment, thirds=thirds, video=[0] * T)
    assert {kind: motionfit.segments(f, kind, 75).tolist() for kind in expected} == expected


def test_sec32_thirds_are_equal():
    for T in range(3, 40):
        found = motionfit.segments(np.zeros((T, 1)), "thirds", 75)
        sizes = np.bincount(found)
        assert len(sizes) == 3 and sizes.max() - sizes.min() <= 1 and (np.diff(found) >= 0).all()


# ---- MERS and MARS ---------------------------------------------------------------------------------


def naive_features(z, z_teacher):
    pairs = list(zip(z.flatten().tolist(), z_teacher.flatten().tolist(), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


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


def args_of(stage, line, start=""):
    """Arguments of a stage: the flags of `line` that it has, and `start`, the files that it starts from."""
    words = flags.by_stage(line.split(), {stage: motionfit.parser_of(stage) for stage in motionfit.STAGES})
    return motionfit.parse_args([stage, *words[stage], *start.split()])[stage]


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


@pytest.mark.parametrize("n, R, frames, stride", [(12, 3, 4, 1), (40, 3, 4, 1), (27, 3, 5, 2), (9, 1, 4, 2)])
def test_d3_clips_of_a_long_video_do_not_overlap(n, R, frames, stride):
    for windows in drawn(n, R, frames, stride, 60):
        assert len(windows) == R and all((np.diff(window) == stride).all() for window in windows)
        assert all(a[-1] < b[0] for a, b in itertools.pairwise(windows))
        assert windows[0][0] >= 0 and windows[-1][-1] < n and all(len(w) == frames for w in windows)


def test_d3_every_start_is_possible():
    """14 frames have room for three clips of four and two frames more: of 0 to 2, in order, with repeats."""
    starts = Counter(tuple(int(w[0]) - 4 * i for i, w in enumerate(windows))
                     for windows in drawn(14, 3, 4, 1, 400))  # fmt: skip
    assert set(starts) == set(itertools.combinations_with_replacement(range(3), 3))


def test_d3_clips_of_a_video_without_room_overlap():
    met = set()
    for windows in drawn(11, 3, 4, 1, 100):  # one frame too few
        starts = [int(window[0]) for window in windows]
        assert starts == sorted(starts) and all((np.diff(window) == 1).all() for window in windows)
        met |= set(starts)
    assert met == set(range(8))


@pytest.mark.parametrize("n", [1, 3, 7])
def test_d3_a_video_shorter_than_a_clip_starts_again(n):
    for windows in drawn(n, 2, 8, 2, 5):
        assert all(window.tolist() == [2 * t % n for t in range(8)] for window in windows)


@pytest.mark.parametrize("n, frames, stride, hop, expected", [
    (20, 4, 1, 4, [0, 4, 8, 12, 16]), (19, 4, 1, 4, [0, 5, 10, 15]), (20, 4, 1, 7, [0, 8, 16]),
    (20, 4, 3, 4, [0, 4, 8]), (4, 4, 1, 1, [0]), (5, 4, 1, 1, [0, 1]), (7, 4, 1, 4, [2]),
])  # fmt: skip
def test_d6_dense_clips_by_hand(n, frames, stride, hop, expected):
    windows = motionfit.DenseClips(frames, stride, hop=hop).sample(range(n))
    assert [int(window[0]) for window in windows] == expected
    assert all((np.diff(window) == stride).all() and len(window) == frames for window in windows)


def test_d6_no_more_than_128_dense_clips_without_overlap():
    for n in range(4, 200):
        starts = [int(w[0]) for w in motionfit.DenseClips(4, 1, hop=4).sample(range(n))]
        assert len(starts) == max(n // 4, 1) and all(b - a >= 4 for a, b in itertools.pairwise(starts))
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
    sample = partial(motionfit.pseudo_labelled, args=args, labels=labels)
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


def test_a_clip_as_long_as_the_generators_is_the_dense_clip(videos):
    """From RGB, and from flow but for rounding: fields are one fewer than frames."""
    for n in (8, 13, 24, 61):
        for fewer in (0, 1):
            dense = motionfit.DenseClips(4, 1, hop=4).sample(range(n - fewer))
            found = motionfit.dense_test(n, 4, 1, len(dense))
            apart = [abs(int(a[0]) - int(b[0])) for a, b in zip(dense, found, strict=True)]
            assert max(apart) <= fewer


@pytest.mark.parametrize("kinds", [("rgb",), ("field",), ("rgb", "field")])
def test_all_networks_see_the_same_moments(kinds, videos, sets):
    fields, args = replace(videos, flow=f"{sets}/set_flow"), train_args()
    sample, view = (partial(f, args=args, kinds=kinds) for f in (motionfit.multi_clip, motionfit.train_views))
    streams, starts = partial(motionfit.modality.Streams, modalities=kinds), set()
    clips = motionfit.Clips(fields, sample, view, 0, open=streams)
    for p in range(24):
        item = clips[p]
        assert len(item["views"]) == len(kinds)
        for x, kind in zip(item["views"], kinds, strict=True):
            assert [moment(clip) for clip in x] == [moment(clip) for clip in item["views"][0]]
            assert x.shape == (2, 4, 3 if kind == "rgb" else 2, 16, 16)
        (v, first), (_, last) = map(moment, item["views"][0])
        assert v == item["label"] and first[0] <= last[0]
        starts.add((v, first[0], last[0]))
    assert len(starts) > 15


def groups_of(sizes):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return Videos.make("", [f"v{i}" for i in range(len(groups))], [0] * len(groups), groups)


def test_d9_whole_groups_are_held_out():
    videos = groups_of([3, 1, 7, 2, 4, 5, 1, 9, 3, 5])  # 40
    chosen = set()
    for seed in range(20):
        held = hold_out(videos, 0.25, seed)
        assert held.dtype == bool and 10 <= held.sum() < 10 + 9
        assert all(held[videos.groups == g].all() or not held[videos.groups == g].any() for g in range(10))
        assert np.array_equal(held, hold_out(videos, 0.25, seed))
        chosen.add(tuple(held))
    assert len(chosen) > 10


@pytest.mark.parametrize("share, left", [(0.0, 4), (1.0, 1), (0.3, 2)])
def test_d9_one_group_at_least_is_left(share, left):
    held = hold_out(groups_of([5, 5, 5, 5]), share, 0)
    assert len(set(groups_of([5, 5, 5, 5]).groups[~held])) == left
    assert not hold_out(groups_of([6]), 0.9, 0).any()


def test_d9_videos_without_groups_are_each_their_own():
    videos = Videos.make("", [f"v{i}" for i in range(40)], [0] * 40)
    held = hold_out(videos, 0.1, 3)
    assert held.sum() == 4 and not np.array_equal(held, hold_out(videos, 0.1, 4))


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


def test_d3_one_crop_for_all_that_is_seen_of_a_clip_and_another_for_each_clip():
    places = []
    for seed in range(20):
        rgb, field = views_of(seed)
        assert rgb.shape == (3, 2, 3, 24, 24) and field.shape == (3, 2, 2, 24, 24)
        assert (rgb[:, :, 0].int() - field[:, :, 1].int()).abs().max() <= 6
        assert rgb[:, 0, 2, 0, 0].tolist() == [0, 20, 40]  # the clips are in order
        assert (field[:, :, 0] == 178).all() and (rgb[:, :, 0, 0, 0] < rgb[:, :, 0, 0, -1]).all()
        places += [tuple(clip[0, :2, 0, 0].tolist()) for clip in rgb]
    assert len(set(places)) > 40 and len({y for _, y in places}) == 9  # 32 - 24 and one
    same = sum(len(set(places[k : k + 3])) < 3 for k in range(0, 60, 3))
    assert same < 5  # of 20


def test_flip_mirrors_all_kinds_of_a_clip_and_each_clip_by_itself():
    patterns = Counter()
    for seed in range(60):
        rgb, field = views_of(seed, R=2, flip=True)
        flipped = rgb[:, 0, 0, 0, 0] > rgb[:, 0, 0, 0, -1]
        assert (rgb[:, :, 0].int() - field[:, :, 1].int()).abs().max() <= 6
        assert (field[:, :, 0] == torch.where(flipped, 78, 178).view(2, 1, 1, 1)).all()
        patterns[tuple(flipped.tolist())] += 1
    assert len(patterns) == 4 and min(patterns.values()) > 5


# ---- networks --------------------------------------------------------------------------------------


def network(R=2, K=3, ordered=False, neighbours=False):
    torch.manual_seed(0)
    backbone = backbones.build("r3d_10-pool", K, width=1 / 16)
    nn.init.normal_(backbone.fc.weight)
    return motionfit.Network(backbone, R, ordered, neighbours).eval()


def test_network_gives_what_a_step_needs():
    net, x, p = network(3, 4, ordered=True, neighbours=True), random(2, 3, 3, 4, 16, 16), torch.tensor([5, 1])
    logits, order, z = net(x, p)
    clips = x.flatten(0, 1)
    assert torch.allclose(z, net.backbone.embed(clips), atol=1e-6)
    assert torch.allclose(logits[0], net.backbone(clips).view(2, 3, 4), atol=1e-5)
    for found, head in zip(logits[1:], net.heads, strict=True):
        assert torch.allclose(found, head(z).view(2, 3, 4), atol=1e-6)
    assert len(logits) == 3 and torch.allclose(order, net.order(z.view(2, 3, -1), p), atol=1e-6)


def test_network_has_no_part_that_nothing_trains():
    """A parameter without a gradient would stop DistributedDataParallel."""
    net = network()
    assert net.order is None and len(net.heads) == 0 and net(random(2, 2, 3, 4, 16, 16))[1] is None


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
        terms["loss_features"] = naive_features(z, z_teacher)
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


def test_step_draws_every_order_alike():
    found = []

    def net(x, p):
        found.append(p)
        return [torch.zeros(len(x), 3, 2)], torch.zeros(len(x), 6), None

    y = torch.zeros(600, 3, 1, dtype=torch.int64)
    motionfit.train_step(net, torch.zeros(600, 1), y, Namespace(multi_clips=3, lam=0.5))
    counts = torch.bincount(found[0])
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


def test_d10_from_random_weights_everything_learns(sets, tmp_path):
    go("finetune", sets, tmp_path, "", "--init none")
    after, before = weights(tmp_path / "model.pt"), start_of(2)
    assert not any(torch.equal(before[key], after[key]) for key in before)


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
    path = whole / "generator" / "model.pt"
    before = path.read_bytes()
    (row, *_) = go("finetune", sets, tmp_path, "--alpha 7", f"--teacher {path}")
    assert row["loss"] == pytest.approx(row["loss_mc"] + 7 * row["loss_features"], rel=1e-4)
    after, start = weights(tmp_path / "model.pt"), start_of(2)
    assert not any(torch.equal(start[key], after[key]) for key in start) and path.read_bytes() == before
    assert result_of(tmp_path)["teacher"] == str(path)


@pytest.mark.parametrize("stage", ["selftrain", "finetune"])
def test_table5_needs_a_teacher_of_the_same_width(stage, whole, sets, tmp_path):
    with pytest.raises(SystemExit, match="model.pt has 32 features, --net r3d_10-pool x 0.125 has 64"):
        go(stage, sets, tmp_path, "--width 0.125", f"--teacher {whole}/generator/model.pt")


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


def test_d14_sources(sets, run):
    mine, src = load_data(f"{sets}/set"), load_data(f"{sets}/src")
    assert source_of(sets, run, "") == names_of(src.train)
    assert source_of(sets, run, f"--source {sets}/src:test") == names_of(src.test)
    for own in ("all", f"{sets}/set"):
        assert source_of(sets, run, f"--source {own}") == names_of(mine.train)
    line = "--source rest --per_class 1 --seed 3"
    few = motionfit.labelled_videos(args_of("finetune", line_of(sets, "o", line)), run, ("rgb",), {})[1]
    assert len(few) == 2 and source_of(sets, run, line) == sorted({*names_of(mine.train)} - {*names_of(few)})
    with pytest.raises(UserError, match="--source rest has no video"):
        source_of(sets, run, "--source rest")


@pytest.mark.parametrize("line", ["--source all", "--source rest --labelled_list {few}"])
def test_source_list_names_the_videos(line, sets, run, tmp_path):
    (tmp_path / "list.txt").write_text("b/train3 1\na/train4 0\nb/train7 1\n")
    (tmp_path / "few.txt").write_text("a/train0 0\nb/train1 1\na/train2 0\n")
    line = line.format(few=tmp_path / "few.txt")
    found = source_of(sets, run, f"{line} --source_list {tmp_path}/list.txt")
    assert found == ["a/train4", "b/train3", "b/train7"]


@pytest.mark.parametrize("kind", ["flat", "train", "list"])
def test_a_source_without_labels(kind, sets, tmp_path):
    """All stages of one; there is no purity."""
    for v in range(6):
        place = tmp_path / "u" / ("train" if kind == "train" else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"clip{v}").symlink_to(sets / "src" / "ab"[v % 2] / f"train{v}")
    if kind == "list":
        (tmp_path / "u" / "train.txt").write_text("clip1\nclip4\nclip5\n")
    for stage in motionfit.STAGES:
        go(stage, sets, tmp_path / "out", f"--modality rgb --source {tmp_path}/u")
    found = result_of(tmp_path / "out" / "pseudo")
    assert "purity" not in found and found["videos"] == (3 if kind == "list" else 6)
    assert result_of(tmp_path / "out")["videos"] == 5


def test_data_of_several_labels_are_refused(sets, run, monkeypatch):
    data = load_data(f"{sets}/set")
    monkeypatch.setattr("motionfit.load_data", lambda *_, **__: replace(data, multilabel=True))
    with pytest.raises(UserError, match="set has several labels"):
        motionfit.labelled_videos(args_of("finetune", line_of(sets, "o")), run, ("rgb",), {})


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
    of = "finetune" if stage == "eval" else stage
    parsers = {stage: motionfit.parser_of(stage) for stage in motionfit.STAGES}
    words = flags.by_stage(line_of(sets, tmp_path, "--modality rgb").split(), parsers)[of]
    runs = motionfit.parse_args([of, *words, *start.format(leaky).split()])
    with pytest.raises(SystemExit) as end:
        motionfit.one_run(stage, runs[stage], runs)
    said = str(end.value)
    assert f"{leaky}/" in said and "has learned split 2 of" in said and "--allow_leak" in said
    assert said.endswith("(2)") and "\n" not in said


def test_d12_allow_leak_permits_and_may_be_added(leaky, sets, tmp_path):
    with pytest.raises(SystemExit, match="--allow_leak"):
        go("finetune", sets, tmp_path, "", f"--init {leaky}/m.pt")
    torch.distributed.destroy_process_group()
    go("finetune", sets, tmp_path, "--allow_leak", f"--init {leaky}/m.pt")
    learned = torch.load(tmp_path / "model.pt", weights_only=True)["learned"]
    assert learned == {"set": [1, 2], "src": [1]}
    assert go("finetune", sets, tmp_path, "--allow_leak", f"--init {leaky}/m.pt")


def test_d12_files_that_do_not_say_and_variants_of_a_data_set(leaky):
    args = Namespace(data="set:small", split=1, allow_leak=False)
    with pytest.raises(UserError, match="unknown.pt does not say whose labels"):
        motionfit.learned_by(args, leaky / "unknown.pt")
    with pytest.raises(UserError, match="split 2 of set:small"):
        motionfit.learned_by(args, "p.npz", {"set": [2]})
    assert motionfit.learned_by(args, "p.npz", {"other": [2]}) == {"other": [2]}


@pytest.mark.parametrize("source", ["{}/set:test", "{}/all"])
def test_d12_a_source_with_test_videos_is_refused(source, sets, run, tmp_path):
    """As its test list, or as a folder in which all videos are."""
    (tmp_path / "all").symlink_to(sets / "set")
    source = source.format(sets if "test" in source else tmp_path)
    if source.endswith("all"):
        (sets / "set" / "unlabelled.txt").write_text("a/test0\nb/train1\n")
        line = f"--data {tmp_path}/all --source {tmp_path}/all --source_root {tmp_path}/all"
    else:
        line = f"--source {source}"
    try:
        with pytest.raises(UserError, match="of the 5 test videos of --data, split 1"):
            source_of(sets, run, line)
        assert source_of(sets, run, f"{line} --allow_leak")
    finally:
        (sets / "set" / "unlabelled.txt").unlink(missing_ok=True)


def test_d12_stages_say_whose_labels_they_have_learned(whole):
    for path in ("generator/model.pt", "selftrain/model.pt", "model.pt"):
        assert torch.load(whole / path, weights_only=True)["learned"] == {"set": [1]}
    with np.load(whole / "pseudo" / "pseudo.npz") as file:
        assert json.loads(str(file["about"]))["learned"] == {"set": [1]}


# ---- pseudo-labels ---------------------------------------------------------------------------------


def pseudo(whole, sets, out, more=""):
    """Run the stage with the generator of `whole`; the labels of each of the six videos, the file's bytes."""
    go("pseudo", sets, out, f"--clusters 5 {more}", f"--generator {whole}/generator/model.pt")
    path = out / "pseudo" / "pseudo.npz"
    with np.load(path) as file:
        labels = np.split(file["labels"], file["first"][1:-1])
    return [each.tolist() for each in labels], path.read_bytes()


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


def test_pseudo_labels_are_a_function_of_the_seed(whole, sets, tmp_path):
    first, same, other = (pseudo(whole, sets, tmp_path / f"{k}", f"--seed {k // 2}")[1] for k in range(3))
    assert first == same != other


def test_any_number_of_ranks_makes_the_same_pseudo_labels(whole, sets, tmp_path):
    """One process clusters, and the others wait."""
    expected = pseudo(whole, sets, tmp_path / "a")[1]
    words = (f"pseudo --data {sets}/set --source {sets}/src --out {tmp_path}/b --clusters 5 --workers 0 "
             f"--max_bad 0.5 --generator {whole}/generator/model.pt")  # fmt: skip
    root = Path(motionfit.__file__).parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, root / "motionfit.py", *words.split()]
    process = forks.start(call, tmp_path, environment, ranks=3)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert (tmp_path / "b" / "pseudo" / "pseudo.npz").read_bytes() == expected


def test_hop_and_iterations(whole, sets, tmp_path):
    labels, _ = pseudo(whole, sets, tmp_path / "a", "--hop 3")
    assert [len(each) for each in labels] == [3, 7, 1, 0, 3, 6]  # 12, 23, 4, -, 12 and 20 fields
    rows = np.load(tmp_path / "a" / "pseudo" / "features" / "features.npy")
    labels, _ = pseudo(whole, sets, tmp_path / "b", "--hop 3 --iterations 1")
    assert sum(labels, []) == kmeans(rows, 5, 1)[0].tolist()


def test_more_clusters_than_clips(whole, sets, tmp_path):
    with pytest.raises(SystemExit, match="--clusters 18 is more than there are clips or segments, 17"):
        pseudo(whole, sets, tmp_path, "--clusters 18")


def test_a_source_without_its_flow_is_not_clustered(whole, sets, tmp_path):
    """One of six videos cannot be read, and --max_bad is the limit here, too."""
    pseudo(whole, sets, tmp_path / "b", "--max_bad 0.2")
    with pytest.raises(SystemExit, match="1 of 6 videos have no features, more than --max_bad 0.1;"):
        pseudo(whole, sets, tmp_path / "a", "--max_bad 0.1")


def loaded(sets, path, line=""):
    args = args_of("selftrain", line_of(sets, "o", line), f"--pseudo {path}")
    return motionfit.load_pseudo(args, load_data(f"{sets}/src").train)


def test_pseudo_labels_that_are_damaged_or_something_else(whole, sets, tmp_path):
    path, p = whole / "pseudo" / "pseudo.npz", tmp_path / "p.npz"
    found = loaded(sets, path)
    assert np.diff(found.first).tolist() == CLIPS and found.labels.dtype == np.int32 and found.clusters == 2
    good = path.read_bytes()
    at = good.index(b"NUMPY") + 150  # a label
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "arrays.npz", labels=np.zeros(3), first=np.zeros(2), about='{"clusters": 3}')
    others = [(tmp_path / name).read_bytes() for name in ("array.npy", "arrays.npz")]
    for damaged in (good[:-200], b"", b"<html>404</html>", flipped, *others):
        p.write_bytes(damaged)
        with pytest.raises(UserError, match="p.npz holds no pseudo-labels, or is damaged"):
            loaded(sets, p)


def test_pseudo_labels_of_another_source_or_granularity(whole, sets, tmp_path):
    path = whole / "pseudo" / "pseudo.npz"
    args = args_of("selftrain", line_of(sets, "o", "--source all"), f"--pseudo {path}")
    with pytest.raises(UserError, match="of other videos than --source all has"):
        motionfit.load_pseudo(args, load_data(f"{sets}/set").train)
    write_pseudo(tmp_path / "p.npz", loaded(sets, path), granularity="thirds")
    with pytest.raises(UserError, match="--neighbours needs pseudo-labels of clips, .* has thirds"):
        loaded(sets, tmp_path / "p.npz", "--neighbours")


# ---- all stages ------------------------------------------------------------------------------------


def test_fig2_all_stages_on_a_small_set(whole):
    """The class of these videos is plain in flow and in RGB; one of the five test videos is unreadable."""
    _, made, classes, recipe = load_model(whole / "generator" / "model.pt")
    assert (made["in_channels"], recipe.modality, recipe.stretch) == (2, "field", (20, 26))
    assert classes == ("a", "b")
    found = {name: result_of(whole / name) for name in ("generator", "pseudo", "selftrain", "")}
    assert (found["generator"]["top1"], found["generator"]["stage"]) == (80, "generator")
    assert found["pseudo"]["purity"] > 90 and found["selftrain"]["stage"] == "selftrain"
    assert (found[""]["top1"], found[""]["unreadable"], found[""]["videos"]) == (80, 1, 5)
    assert load_model(whole / "model.pt")[3].modality == "rgb"


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


@pytest.mark.parametrize("stop", [None, 1])
def test_stages_run_in_turn_until_one_is_stopped(stop, monkeypatch):
    done, stages = [], list(motionfit.STAGES)

    def one_run(stage, *_):
        done.append(stage)
        return stop is None or stage != stages[stop]

    monkeypatch.setattr(motionfit, "one_run", one_run)
    monkeypatch.setattr("sys.argv", ["motionfit.py"])
    motionfit.main()
    assert done == (stages if stop is None else stages[: stop + 1])
    monkeypatch.setattr("sys.argv", ["motionfit.py", "finetune"])
    motionfit.main()
    assert done[-1] == "finetune" and len(done) == (5 if stop is None else 3)


def test_a_stopped_stage_leaves_no_model(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "should_stop", lambda run: True)
    args = args_of("generator", line_of(sets, tmp_path))
    assert not motionfit.one_run("generator", args, {})
    folder = tmp_path / "generator"
    assert (folder / "last.pt").exists() and not (folder / "model.pt").exists() and len(rows_of(folder)) == 1


def test_a_changed_input_is_a_sentence_and_no_old_result(whole, sets, tmp_path, capsys):
    """Other pseudo-labels in the same place, and an unchanged run once more."""
    start = f"--generator {whole}/generator/model.pt"
    go("pseudo", sets, tmp_path, "--clusters 3", start)
    go("selftrain", sets, tmp_path)
    capsys.readouterr()
    go("selftrain", sets, tmp_path)
    assert capsys.readouterr().out.count("\n") == 1  # RESULT
    for path in sorted((tmp_path / "pseudo").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    go("pseudo", sets, tmp_path, "--clusters 4", start)
    with pytest.raises(SystemExit, match=r"selftrain holds a run with --pseudo \w{64}, not \w{64}: "):
        go("selftrain", sets, tmp_path)
    assert "RESULT script=motionfit data=set stage=selftrain" not in capsys.readouterr().out


@pytest.mark.parametrize("stage, lacks", [
    ("pseudo", "generator/model.pt"), ("selftrain", "pseudo/pseudo.npz"), ("finetune", "selftrain/model.pt"),
])  # fmt: skip
def test_a_stage_without_what_it_needs_says_so(stage, lacks, sets, tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}/{lacks} is not there: an earlier stage makes it"):
        go(stage, sets, tmp_path)


@pytest.mark.parametrize("line, word", [
    ("--source {}/nowhere", "nowhere"), ("--source_flow {}/none", "{}/none"),
    ("--source {}/set:test", "5 of the 5 test videos"), ("--source rest", "no video without a label"),
])  # fmt: skip
def test_mistakes_of_later_stages_are_found_before_the_first_trains(line, word, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(motionfit, "train", lambda *_: pytest.fail("trained"))
    line = line_of(sets, tmp_path / "o", line.format(sets))
    monkeypatch.setattr("sys.argv", ["motionfit.py", *line.split()])
    with pytest.raises(SystemExit, match=re.escape(word.format(sets))):
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


def test_help_lists_the_flags_of_all_stages(capsys):
    with pytest.raises(SystemExit):
        motionfit.parse_args(["--help"])
    out = capsys.readouterr().out
    assert all(f"motionfit.py {stage}" in out or f" {stage} [-h]" in out for stage in motionfit.STAGES)
    assert "--clusters" in out and "--neighbours" in out

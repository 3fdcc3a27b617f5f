"""The equations of tg_distill.py (a value by hand, a plain loop from the paper, where gradients go), its
views of a video, its exact batch-norm statistics, alone and on two ranks, and its command line."""

import contextlib
import copy
import json
import math
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import tg_distill
from common import augment, backbones, evaluate, modality
from common.clips import Clips, Views
from common.data import Data, Videos, labelled_subset
from common.io.models import save_model
from common.modality import Recipe, temporal_gradient
from common.run import Run

CLASSES = 3
ARGS = dict(
    nets="both", pseudo="avg", fuse="probs", tau=0.0, w_fm=0.5, w_kd=1.0, w_clr=1.0, align="cosine",
    align_stages=[1, 2, 3, 4], stopgrad=True, temperature=0.5, interval=1, size=16,
    area=[0.08, 1.0], rand_augment=[2, 9], frames=8, stride=8,
)  # fmt: skip


def arguments(**changes):
    return Namespace(**(ARGS | changes))


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# ---- frames and crops ------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64, 65, 72, 300])
def test_frames_t_and_t_plus_n(length, interval):
    args = arguments(interval=interval)
    recipe = tg_distill.recipes_of(parsed(f"--interval {interval} --frames 8 --stride 8 --clips 3"))["tg"]
    drawn = [tg_distill.windows(range(length), np.random.default_rng(s), args) for s in range(50)]
    assert all(len(clips) == 1 for clips in drawn)  # one array, so one decode and one crop
    tests = [modality.pictures_of(window, "tg", length, interval)
             for window in recipe.sample(range(max(1, length - interval)))]  # fmt: skip
    for window in [clips[0] for clips in drawn] + tests:
        t, t_next = window[::2], window[1::2]
        assert len(t) == 8 and t.min() >= 0 and t_next.max() < length
        if length > interval:
            assert (t_next - t == interval).all()
        else:  # too short for a difference of n frames: of the whole length
            assert (t == 0).all() and (t_next == length - 1).all()
        if length >= 64 + interval:
            assert (np.diff(t) == 8).all()


def test_windows_start_anywhere():
    """72 frames, of which the last is only t + 1: 8 x 8 frames start at 0 to 7."""
    args, drawn = arguments(), range(300)
    starts = {int(tg_distill.windows(range(72), np.random.default_rng(s), args)[0][0]) for s in drawn}
    assert starts == set(range(8))


def positions(T=4, H=30, W=40):
    """2T frames: red says where a pixel is in x, green in y, blue which frame; frames t + n have red
    and green exchanged, so that TG follows from the RGB view alone, if it is of the same pixels."""
    x = torch.linspace(0, 250, W).round().expand(T, 1, H, W)
    y = torch.linspace(0, 250, H).round()[:, None].expand(T, 1, H, W)
    t = (40 * torch.arange(T, dtype=torch.float32)).view(T, 1, 1, 1).expand(T, 1, H, W)
    pairs = torch.stack([torch.cat([x, y, t], 1), torch.cat([y, x, t], 1)], 1)  # (T, 2, C, H, W)
    return pairs.flatten(0, 1).to(torch.uint8)


def test_student_and_teacher_share_crop_and_flip():
    clip, args = positions(), arguments()
    mirrored, corners = [], set()
    for seed in range(60):
        torch.manual_seed(seed)
        views = tg_distill.by_network(tg_distill.weak(clip, args, True), args)
        rgb, tg = views["rgb"], views["tg"]
        assert rgb.shape == tg.shape == (4, 3, 16, 16) and rgb.dtype == torch.uint8
        assert torch.equal(tg, temporal_gradient(rgb, rgb[:, [1, 0, 2]]))
        assert (rgb[:, 2] == torch.tensor([0, 40, 80, 120]).view(4, 1, 1)).all()  # the first half, in order
        mirrored.append(bool(rgb[0, 0, 0, 0] > rgb[0, 0, 0, -1]))
        corners.add(tuple(rgb[0, :2, 0, 0].tolist()))
    assert 15 < sum(mirrored) < 45 and len(corners) > 40
    torch.manual_seed(0)
    assert not any((v := tg_distill.weak(clip, args, False))[0, 0, 0, 0] > v[0, 0, 0, -1] for _ in range(20))


def seeded(seed, function, *args):
    torch.manual_seed(seed)
    return function(*args)


@pytest.mark.parametrize("nets", ["both", "rgb", "tg"])
def test_strong_view_is_randaugment_of_the_weak_one(nets):
    names = ["rgb", "tg"] if nets == "both" else [nets]
    clip = positions()[:: 2 if nets == "rgb" else 1]  # RGB alone needs no frames t + n
    args, changed = arguments(nets=nets), 0
    for seed in range(8):
        views_l = seeded(seed, tg_distill.labelled_views, [clip], args, True)
        views_u = seeded(seed, tg_distill.unlabelled_views, [clip], args, True)
        assert list(views_l) == list(views_u) == names
        expected = tg_distill.by_network(seeded(seed, tg_distill.weak, clip, args, True), args)
        for net in names:  # the same crop, then a draw for each network
            assert list(views_l[net]) == ["l"] and list(views_u[net]) == ["w", "s"]
            assert torch.equal(views_l[net]["l"], expected[net])
            assert torch.equal(views_u[net]["w"], expected[net])
            assert torch.equal(views_u[net]["s"], augment.rand_augment(expected[net], 2, 9))
            changed += not torch.equal(views_u[net]["s"], expected[net])
    assert changed > 4


def picture_folder(path, frames):
    """A lossless video: numbered PNG files of uint8 (T, H, W, 3)."""
    path.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i:03d}.png", compress_level=1)


@pytest.mark.parametrize("interval", [1, 7])
def test_training_clips_of_a_video(interval, tmp_path):
    """Frame t is grey 5 t: RGB tells t, and TG is (255 - 5 n) / 2 everywhere, rounded down."""
    grey = np.arange(0, 250, 5, dtype=np.uint8)[:, None, None, None]
    picture_folder(tmp_path / "a", np.broadcast_to(grey, (50, 20, 20, 3)).copy())
    args = arguments(interval=interval, frames=4, stride=3)
    videos = Videos.make(tmp_path, ["a"], [0])
    clips = Clips(videos, lambda *a: tg_distill.windows(*a, args),
                        lambda c: tg_distill.labelled_views(c, args, True), 0)  # fmt: skip
    for p in range(10):
        rgb, tg = (views["l"] for views in clips[p]["views"].values())
        assert (np.diff(rgb[:, 0, 0, 0].int()) == 15).all() and (tg == (255 - 5 * interval) // 2).all()


# ---- Eq. 1 to 6: FixMatch --------------------------------------------------------------------------


def naive_supervised(logits, y):
    """Eq. 1, read off the paper."""
    return sum(-math.log(softmax(row)[k]) for row, k in zip(logits.tolist(), y, strict=True)) / len(y)


def naive_unlabelled(logits_s, p_w, tau):
    """Eq. 2 and 3, read off the paper."""
    total = 0.0
    for strong, p in zip(logits_s.tolist(), p_w, strict=True):
        if max(p) >= tau:
            total += -math.log(softmax(strong)[p.index(max(p))])
    return total / len(p_w)


def naive_average(*logits):
    """Eq. 5: the mean of the networks' probabilities, for each clip."""
    rows = zip(*(net.tolist() for net in logits), strict=True)
    return [[sum(p) / len(p) for p in zip(*map(softmax, row), strict=True)] for row in rows]


def test_eq1_known_value_and_naive_loop():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # p = (1/4, 3/4), (1/2, 1/2)
    by_hand = (math.log(4 / 3) + math.log(2)) / 2
    assert tg_distill.supervised_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(by_hand, abs=1e-6)
    logits, y = random(9, 5), torch.arange(9) % 5
    naive = naive_supervised(logits, y.tolist())
    assert tg_distill.supervised_loss(logits, y).item() == pytest.approx(naive, rel=1e-5)


def test_eq2_eq3_known_value():
    # tau 0.7 keeps the first clip, labelled 0. On its strong view class 0 has 1/5: log 5, over both clips.
    y, mask = tg_distill.pseudo_label(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), 0.7)
    assert y[0] == 0 and y.dtype == torch.int64 and mask.tolist() == [1.0, 0.0]
    strong = torch.tensor([[0.0, math.log(4.0)], [9.0, -9.0]])
    assert tg_distill.unlabelled_loss(strong, y, mask).item() == pytest.approx(math.log(5) / 2, abs=1e-6)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 0.9])
def test_eq2_eq3_match_naive_loop(tau):
    p_w, strong = random(40, 7, seed=1).softmax(1), random(40, 7, seed=2)
    ours = tg_distill.unlabelled_loss(strong, *tg_distill.pseudo_label(p_w, tau))
    assert ours.item() == pytest.approx(naive_unlabelled(strong, p_w.tolist(), tau), rel=1e-5)


def test_eq2_threshold_is_inclusive():
    _, mask = tg_distill.pseudo_label(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), 0.5)
    assert mask.tolist() == [1.0, 1.0]


def test_eq3_empty_set_gives_zero_loss_and_gradient():
    strong = random(5, 3).requires_grad_()
    loss = tg_distill.unlabelled_loss(strong, *tg_distill.pseudo_label(torch.full((5, 3), 1 / 3), 0.9))
    loss.backward()
    assert loss.item() == 0.0 and not strong.grad.any()


def test_eq4_eq6_known_value():
    assert tg_distill.fixmatch_loss(2.0, 3.0, 1.0) == 5.0 and tg_distill.fixmatch_loss(2.0, 3.0, 0.5) == 3.5


# p of RGB (12, 3, 1) / 16, of TG (1, 8, 7) / 16. Their mean (13, 11, 8) / 32 says class 0, the mean of
# logits, softmax of log sqrt(p q): (sqrt 12, sqrt 24, sqrt 7) / sum, says class 1.
DISAGREE = {"rgb": torch.tensor([[12.0, 3, 1]]).log() + 5, "tg": torch.tensor([[1.0, 8, 7]]).log() - 1}
ROOTS = [math.sqrt(12), math.sqrt(24), math.sqrt(7)]


@pytest.mark.parametrize("pseudo, mean, rgb, tg", [
    ("avg", "probs", [13 / 32, 11 / 32, 8 / 32], None),
    ("avg", "logits", [r / sum(ROOTS) for r in ROOTS], None),
    ("rgb", "probs", [12 / 16, 3 / 16, 1 / 16], None),
    ("tg", "logits", [1 / 16, 8 / 16, 7 / 16], None),
    ("self", "probs", [12 / 16, 3 / 16, 1 / 16], [1 / 16, 8 / 16, 7 / 16]),
])  # fmt: skip
def test_eq5_by_hand(pseudo, mean, rgb, tg):
    p = tg_distill.fuse(DISAGREE, pseudo, mean)
    assert list(p) == ["rgb", "tg"]
    assert p["rgb"][0].tolist() == pytest.approx(rgb, abs=1e-6)
    assert p["tg"][0].tolist() == pytest.approx(tg or rgb, abs=1e-6)


def test_eq5_average_matches_naive_loop():
    logits = {"rgb": random(20, 6, seed=1), "tg": random(20, 6, seed=2)}
    p = tg_distill.fuse(logits, "avg", "probs")["tg"]
    assert p.numpy() == pytest.approx(np.array(naive_average(*logits.values())), abs=1e-6)


@pytest.mark.parametrize("pseudo", ["avg", "rgb", "tg", "self"])
@pytest.mark.parametrize("mean", ["probs", "logits"])
def test_eq5_no_gradient_into_the_weak_views(pseudo, mean):
    weak = {net: random(6, 4, seed=i).requires_grad_() for i, net in enumerate(("rgb", "tg"))}
    strong = random(6, 4, seed=3).requires_grad_()
    for p in tg_distill.fuse(weak, pseudo, mean).values():
        assert not p.requires_grad
        tg_distill.unlabelled_loss(strong, *tg_distill.pseudo_label(p, 0.0)).backward()
    assert all(x.grad is None for x in weak.values()) and strong.grad.any()


# ---- Eq. 7 to 9: alignment -------------------------------------------------------------------------


def naive_distance(f_1, f_2, kind):
    """Eq. 8 for the channel vectors of each clip and place; D9 says how they are averaged."""
    B, C, T, H, W = f_1.shape
    found = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                for w in range(W):
                    u, v = f_1[b, :, t, h, w].tolist(), f_2[b, :, t, h, w].tolist()
                    if kind == "cosine":
                        dot = sum(i * j for i, j in zip(u, v, strict=True))
                        found.append(1 - dot / (math.hypot(*u) * math.hypot(*v) or 1))  # 1 for a zero vector
                    else:
                        power = 1 if kind == "l1" else 2
                        found.append(sum(abs(i - j) ** power for i, j in zip(u, v, strict=True)) / C)
    return sum(found) / len(found)


# The paper's own example, Sec. 4.5: (10, 10, 10) and (1, 1, 1) point the same way; |10 - 1| = 9.
@pytest.mark.parametrize("kind, value", [("cosine", 0.0), ("l1", 9.0), ("l2", 81.0)])
def test_eq8_known_value(kind, value):
    f = torch.ones(2, 3, 1, 2, 2)
    assert tg_distill.distance(10 * f, f, kind).item() == pytest.approx(value, abs=1e-6)
    if kind == "cosine":  # opposite: 2; at right angles: 1
        assert tg_distill.distance(-f, f, kind).item() == pytest.approx(2, abs=1e-6)
        turned = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1, 1).expand_as(f)
        assert tg_distill.distance(turned, f, kind).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_eq8_matches_naive_loop_with_gradient_into_both(kind):
    f_1, f_2 = (random(3, 5, 2, 3, 4, seed=i).requires_grad_() for i in range(2))
    loss = tg_distill.distance(f_1, f_2, kind)
    assert loss.item() == pytest.approx(naive_distance(f_1, f_2, kind), rel=1e-5)
    loss.backward()
    assert f_1.grad.any() and f_2.grad.any()


def test_eq8_where_the_student_is_silent():
    """A zero vector has no direction: distance 1, and through the ReLU that made it no gradient, not NaN."""
    x = torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 1, 2).clone().requires_grad_()
    loss = tg_distill.distance(x.relu(), torch.ones(1, 3, 1, 1, 2), "cosine")
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and x.grad.isfinite().all() and not x.grad[..., 0].any()


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("stages", [[1, 2, 3, 4], [4], [1, 3]])
def test_eq9_sums_over_the_stages_with_the_teacher_detached(kind, stages):
    f_rgb, f_tg = (
        [random(2, 2**i, 2, 2, 2, seed=10 * s + i).requires_grad_() for i in range(1, 5)] for s in range(2)
    )
    loss = tg_distill.alignment_loss(f_rgb, f_tg, kind, stages)
    naive = sum(naive_distance(f_rgb[i - 1], f_tg[i - 1], kind) for i in stages)
    assert loss.item() == pytest.approx(naive, rel=1e-5)
    loss.backward()
    assert [f.grad is not None and bool(f.grad.any()) for f in f_rgb] == [i in stages for i in range(1, 5)]
    assert all(f.grad is None for f in f_tg)
    tg_distill.alignment_loss(f_rgb, f_tg, kind, stages, stopgrad=False).backward()
    assert [f.grad is not None and bool(f.grad.any()) for f in f_tg] == [i in stages for i in range(1, 5)]


# ---- Eq. 10: contrast ------------------------------------------------------------------------------


def naive_contrast(queries, keys, tau):
    """Eq. 10 with q of one modality, k+ the same clip in the other, k- its other clips."""
    total = 0.0
    for i, q in enumerate(queries):
        e = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / math.hypot(*q) / math.hypot(*k) / tau)
             for k in keys]  # fmt: skip
        total += -math.log(e[i] / sum(e))
    return total / len(queries)


def test_eq10_known_value():
    # Directions: RGB e1, e2; TG e1, e1; tau 1/2. From RGB: both keys are alike, log 2 for each query.
    # From TG: cosines (1, 0), so -log e^2 / (e^2 + 1) and -log 1 / (e^2 + 1), mean log(e^2 + 1) - 1.
    z_rgb, z_tg = torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([[7.0, 0.0], [0.1, 0.0]])
    by_hand = (math.log(2) + math.log(math.exp(2) + 1) - 1) / 2
    assert tg_distill.contrastive_loss(z_rgb, z_tg, 0.5).item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_eq10_matches_naive_loop_both_ways_with_gradient_into_both(tau):
    z_rgb, z_tg = (random(6, 5, seed=i).requires_grad_() for i in range(2))
    loss = tg_distill.contrastive_loss(z_rgb, z_tg, tau)
    a, b = z_rgb.tolist(), z_tg.tolist()
    naive = (naive_contrast(a, b, tau) + naive_contrast(b, a, tau)) / 2
    assert loss.item() == pytest.approx(naive, rel=1e-5)
    loss.backward()
    assert (z_rgb.grad.abs().sum(1) > 0).all() and (z_tg.grad.abs().sum(1) > 0).all()


# ---- two ranks are one -----------------------------------------------------------------------------


class Projections(nn.Module):
    """Embeddings as linear maps, which the ranks share."""

    def __init__(self):
        super().__init__()
        self.rgb, self.tg = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        for seed, layer in enumerate((self.rgb, self.tg)):
            layer.weight = nn.Parameter(random(4, 6, seed=seed, scale=0.5))


def contrast_of(rows):
    """Loss and gradients of Eq. 10 for these of 8 clips."""
    maps, (x, y) = Projections(), (random(8, 6, seed=s, scale=1.0)[rows] for s in (5, 6))
    loss = tg_distill.contrastive_loss(maps.rgb(x), maps.tg(y), 0.2)
    loss.backward()
    return [loss.detach(), maps.rgb.weight.grad, maps.tg.weight.grad]


def tiny_backbone():
    torch.manual_seed(0)
    return backbones.build("r3d_10-pool", CLASSES, width=1 / 16, bn_eps=1e-3)


SMALL = Recipe(4, 1, 1, 1, 16, 16, mean=tg_distill.RGB.mean, std=tg_distill.RGB.std)


def statistics(net):
    """Means and variances of all batch norms, in the order of the modules."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm3d)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]


def on_a_rank(folder, *names):
    """What a rank of two computes, into a file."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = contrast_of(slice(4 * rank, 4 * rank + 4))
    for x in found:  # DDP's average
        dist.all_reduce(x)
        x /= 2
    net = tiny_backbone()
    run = SimpleNamespace(rank=rank, world=2, stop=False, device=torch.device("cpu"),
                          autocast=contextlib.nullcontext)  # fmt: skip
    evaluate.precise_bn(net, Videos.make(folder, names, [0] * len(names)), SMALL, run, block=3)
    torch.save((found, statistics(net)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


NAMES = [f"v{i}" for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten videos of random colours and textures, and one without pictures."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in NAMES:
        low, high = rng.integers(0, 100), rng.integers(120, 256)
        picture_folder(root / name, rng.integers(low, high, (5, 16, 20, 3), dtype=np.uint8))
    (root / "none").mkdir()
    return root


@pytest.fixture
def videos(folder):
    return Videos.make(folder, NAMES, [0] * len(NAMES))


@pytest.fixture
def run(tmp_path):
    with Run("tg_distill", tmp_path / "out", {}) as run:
        yield run
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(folder):
    """What two processes found, each in a group of two; one of their blocks is unreadable in part."""
    names = [*NAMES[:4], "none", *NAMES[4:]]
    here = Path(__file__)
    env = os.environ | {"PYTHONPATH": str(here.parent.parent)}
    process = forks.start([sys.executable, here, folder, *names], folder, env, ranks=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_eq10_of_two_ranks_is_that_of_the_joint_batch(two_ranks):
    whole = contrast_of(slice(None))
    for found, _ in two_ranks:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, whole, strict=True))
    assert not torch.allclose(contrast_of(slice(4))[0], whole[0], atol=0.1)  # negatives of the other rank


def test_precise_bn_of_two_ranks_is_that_of_one(two_ranks, folder, run):
    net, names = tiny_backbone(), [*NAMES[:4], "none", *NAMES[4:]]
    evaluate.precise_bn(net, Videos.make(folder, names, [0] * 11), SMALL, run, block=3)
    for _, found in two_ranks:
        assert all(map(torch.equal, found, statistics(net)))  # sums of four blocks


# ---- PreciseBN -------------------------------------------------------------------------------------


def whole_set(videos, recipe=SMALL):
    views = Views(videos, recipe.sample, recipe.view, open=recipe.open)
    return recipe.to_input(torch.cat([views[i]["views"] for i in range(len(videos))]), "cpu")


def test_precise_bn_leaves_frozen_stages_alone(videos, run):
    net = tiny_backbone().freeze(2)
    before = {name: value.clone() for name, value in net.named_buffers()}
    evaluate.precise_bn(net, videos, SMALL, run)
    after = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in after if "running" in name} == {"layer3", "layer4"}


@pytest.mark.parametrize("block", [40, 10, 4, 2])
def test_precise_bn_of_the_first_layer_is_that_of_all_clips(block, videos, run):
    net = tiny_backbone()
    x = net.stem[0](whole_set(videos)).detach().double().transpose(0, 1).flatten(1)  # (C, N)
    evaluate.precise_bn(net, videos, SMALL, run, block=block)
    assert torch.allclose(net.stem[1].running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-7)
    assert torch.allclose(net.stem[1].running_var.double(), x.var(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("recipe", [
    SMALL, replace(SMALL, modality="tg"),
], ids=["rgb", "tg"])  # fmt: skip
def test_precise_bn_of_one_block_is_a_training_pass(recipe, videos, run):
    net = tiny_backbone()
    reference, before = copy.deepcopy(net).train(), [p.clone() for p in net.parameters()]
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0  # the statistics of the last batch, the variance unbiased
    evaluate.precise_bn(net, videos, recipe, run, 0)
    with torch.no_grad():
        reference(whole_set(videos, recipe))
    assert len(statistics(net)) == 24
    for ours, torchs in zip(statistics(net), statistics(reference), strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-4, atol=1e-6)
    assert not net.training and all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("block", [40, 5])
def test_precise_bn_leaves_out_what_cannot_be_read(block, folder, videos, run):
    found = []
    for names in (NAMES, ["none", *NAMES[:4], "none", "gone", *NAMES[4:]]):
        # The stem alone: what the layers after it see depends on the blocks.
        net = nn.Sequential(*tiny_backbone().stem)
        net.embed = net.forward
        evaluate.precise_bn(net, Videos.make(folder, names, [0] * len(names)), SMALL, run, block=block)
        found.append(statistics(net))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*found, strict=True))


def test_precise_bn_without_a_block_of_two_keeps_what_was_there(folder, run):
    net = tiny_backbone()
    before = [buffer.clone() for buffer in statistics(net)]
    evaluate.precise_bn(net, Videos.make(folder, ["none", "gone", NAMES[0]], [0] * 3), SMALL, run)
    assert all(map(torch.equal, statistics(net), before)) and not net.training


def test_for_test_is_a_copy_with_exact_statistics(videos, run):
    build = dict(name="r3d_10-pool", classes=CLASSES, width=1 / 16, bn_eps=1e-3)
    net = SimpleNamespace(module=tg_distill.Network(tiny_backbone(), project=True))
    before = copy.deepcopy(net.module.state_dict())
    data = SimpleNamespace(train=videos)
    args = arguments(channels_last=False, precise_bn=4, seed=3, workers=0)
    many = replace(SMALL, clips=3, crops=3, size=20, short_side=18)  # the views of a test, not of PreciseBN
    copied = tg_distill.for_test(net, build, args, data, many, run)
    expected, chosen = tiny_backbone(), sorted(np.random.default_rng(3).permutation(10)[:4].tolist())
    evaluate.precise_bn(expected, videos.subset(chosen), replace(SMALL, short_side=18), run, 0)
    assert all(map(torch.equal, copied.state_dict().values(), expected.state_dict().values()))
    after = net.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # training never sees it
    args.precise_bn = 0
    same = tg_distill.for_test(net, build, args, data, many, run).state_dict()
    assert all(torch.equal(value, before[f"backbone.{k}"]) for k, value in same.items())


# ---- a step, Eq. 11 --------------------------------------------------------------------------------


def test_eq11_known_value():
    assert tg_distill.total_loss([1.0, 2.0], 10.0, 100.0, 0.5, 2.0, 0.25) == 0.5 * 3 + 20 + 25


def networks(train=False):
    """A student and a teacher; their last layers are large enough that the labels are no coin flips."""
    nets = {}
    for seed, name in enumerate(("rgb", "tg")):
        torch.manual_seed(seed)
        backbone = backbones.build("r3d_10-pool", CLASSES, width=1 / 16, bn_eps=1e-3)
        nets[name] = tg_distill.Network(backbone, project=True).train(train)
        nn.init.normal_(backbone.fc.weight)
        for layer in nets[name].head[::3]:
            nn.init.normal_(layer.weight, std=0.5)
    return nets


def step(nets, lam_u=1.0, x=None, **changes):
    """(x, y_l, what train_step returns); 2 labelled and 3 unlabelled clips."""
    x = x or {net: {view: random(3 - (view == "l"), 3, 8, 16, 16, seed=10 * i + j, scale=1.0)
                    for j, view in enumerate("lws")} for i, net in enumerate(nets)}  # fmt: skip
    y_l = torch.tensor([0, 2])
    return x, y_l, tg_distill.train_step(nets, x, y_l, arguments(**changes), lam_u)


def parts(nets, x):
    """{net: (logits_l, logits_w, logits_s, stages of l and w, z of l and w)}, one view at a time."""
    found = {}
    for net, views in x.items():
        labelled, weak, strong = views["l"], views["w"], views["s"]
        backbone, head = nets[net].backbone, nets[net].head
        first = [torch.cat(pair) for pair in zip(*map(backbone.features, (labelled, weak)), strict=True)]
        z = head(torch.cat([backbone.embed(labelled), backbone.embed(weak)]))
        found[net] = *(backbone(v) for v in (labelled, weak, strong)), first, z
    return found


def touched(net):
    """Names of the parameters that got a gradient; it is then cleared."""
    names = {k for k, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    net.zero_grad()
    return names


@pytest.mark.parametrize("changes", [
    {}, dict(tau=0.6), dict(pseudo="self"), dict(align="l2", align_stages=[2, 4]), dict(temperature=0.1),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_step_is_the_sum_of_its_parts(changes):
    nets, args = networks(), arguments(**changes)
    x, y_l, (loss, terms, labels, y_w) = step(nets, lam_u=0.7, **changes)
    rgb, tg = parts(nets, x).values()
    p = {net: naive_average(rgb[1], tg[1]) for net in nets}
    if args.pseudo == "self":
        p = {"rgb": naive_average(rgb[1]), "tg": naive_average(tg[1])}
    z_rgb, z_tg = rgb[4].tolist(), tg[4].tolist()
    by_hand = {
        "loss_l_rgb": naive_supervised(rgb[0], y_l.tolist()),
        "loss_l_tg": naive_supervised(tg[0], y_l.tolist()),
        "loss_u_rgb": naive_unlabelled(rgb[2], p["rgb"], args.tau),
        "loss_u_tg": naive_unlabelled(tg[2], p["tg"], args.tau),
        "loss_kd": sum(naive_distance(rgb[3][i - 1], tg[3][i - 1], args.align) for i in args.align_stages),
        "loss_clr": (naive_contrast(z_rgb, z_tg, args.temperature)
                     + naive_contrast(z_tg, z_rgb, args.temperature)) / 2,
    }  # fmt: skip
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(by_hand, rel=1e-4)
    fixmatch = sum(by_hand[f"loss_l_{net}"] + 0.7 * by_hand[f"loss_u_{net}"] for net in nets)
    assert loss.item() == pytest.approx(0.5 * fixmatch + by_hand["loss_kd"] + by_hand["loss_clr"], rel=1e-4)
    assert labels["tg"][0].tolist() == [row.index(max(row)) for row in p["tg"]]
    assert y_w["rgb"].tolist() == rgb[1].argmax(1).tolist()


@pytest.mark.parametrize("net", ["rgb", "tg"])
@torch.no_grad()
def test_step_of_one_network_is_fixmatch(net):
    """Eq. 4 with nothing in front of it, by the flags' own weights."""
    nets = {net: networks()[net]}
    args = parsed(f"--nets {net} --tau 0.5")
    weights = dict(w_fm=args.w_fm, w_kd=args.w_kd, w_clr=args.w_clr, pseudo=args.pseudo, tau=args.tau)
    x, y_l, (loss, terms, _, _) = step(nets, lam_u=0.7, **weights)
    logits = parts(nets, x)[net]
    by_hand = {f"loss_l_{net}": naive_supervised(logits[0], y_l.tolist()),
               f"loss_u_{net}": naive_unlabelled(logits[2], naive_average(logits[1]), 0.5)}  # fmt: skip
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(by_hand, rel=1e-4)
    total = by_hand[f"loss_l_{net}"] + 0.7 * by_hand[f"loss_u_{net}"]
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_step_eq9_trains_the_student_alone():
    nets = networks(train=True)
    step(nets)[2][1]["loss_kd"].backward()
    own = {k for k, _ in nets["rgb"].backbone.named_parameters() if not k.startswith("fc.")}
    assert touched(nets["rgb"]) == {f"backbone.{k}" for k in own} and not touched(nets["tg"])
    step(nets, stopgrad=False)[2][1]["loss_kd"].backward()
    assert touched(nets["tg"]) == touched(nets["rgb"]) == {f"backbone.{k}" for k in own}
    step(nets, align_stages=[1])[2][1]["loss_kd"].backward()
    assert not any("layer2" in k for k in touched(nets["rgb"]))


def test_step_eq3_and_eq10_train_whom_they_should():
    nets = networks(train=True)
    step(nets)[2][1]["loss_u_rgb"].backward()
    assert "backbone.fc.weight" in touched(nets["rgb"]) and not touched(nets["tg"])
    step(nets)[2][1]["loss_clr"].backward()
    for net in nets.values():
        names = touched(net)
        assert {"backbone.stem.0.weight", "head.6.weight"} <= names and "backbone.fc.weight" not in names


@pytest.mark.parametrize("lam_u", [0.0, 1.0])
def test_step_without_lambda_u_learns_nothing_from_strong_views(lam_u):
    nets = networks()
    x, _, _ = step(nets)
    for views in x.values():
        views["s"].requires_grad_()
    loss, terms, _, _ = step(nets, lam_u, x)[2]
    loss.backward()
    assert all(bool(views["s"].grad.any()) == bool(lam_u) for views in x.values())
    assert terms["loss_u_rgb"] > 0 and terms["loss_u_tg"] > 0  # reported all the same


@torch.no_grad()
def test_step_aligns_labelled_and_weak_clips_alone():
    nets = networks()
    x, _, (_, before, _, _) = step(nets)
    other = {net: views | {"s": views["s"] + 1} for net, views in x.items()}
    after = step(nets, x=other)[2][1]
    assert all(after[k] == before[k] for k in ("loss_kd", "loss_clr", "loss_l_rgb"))
    assert after["loss_u_rgb"] != before["loss_u_rgb"]
    for view in "lw":  # and both kinds of them count
        other = {net: views | {view: views[view] + 1} for net, views in x.items()}
        after = step(nets, x=other)[2][1]
        assert after["loss_kd"] != before["loss_kd"] and after["loss_clr"] != before["loss_clr"]


def test_step_sends_all_clips_through_at_once():
    """So batch norm sees the mixture, once a step."""
    nets = networks(train=True)
    step(nets)
    assert all(net.backbone.stem[1].num_batches_tracked == 1 for net in nets.values())


def test_report_counts_by_hand():
    y_true = torch.tensor([0, 1, 2, 2])
    labels = {"rgb": (torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.0, 1.0, 1.0])),
              "tg": (torch.tensor([0, 0, 2, 2]), torch.tensor([0.0, 1.0, 1.0, 0.0]))}  # fmt: skip
    y_w = {"rgb": torch.tensor([0, 0, 0, 0]), "tg": y_true}
    found = {k: v.item() for k, v in tg_distill.pseudo_label_report(labels, y_w, y_true).items()}
    assert found == {
        "kept_rgb": 0.75, "right_rgb": 0.5, "weak_top1_rgb": 0.25,
        "kept_tg": 0.5, "right_tg": 0.25, "weak_top1_tg": 1.0,
    }  # fmt: skip


def test_projection_head_has_three_layers_and_a_plain_last_norm():
    layers = list(tg_distill.projection_head(4))
    kinds = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(m).__name__ for m in layers] == 2 * kinds + kinds[:2]
    assert [m.affine for m in layers[1::3]] == [True, True, False]
    assert {m.eps for m in layers[1::3]} == {1e-5}  # as in the authors' code; the backbones have 1e-3
    assert {(m.in_features, m.out_features, m.bias) for m in layers[::3]} == {(4, 4, None)}


@pytest.mark.parametrize("line, names, heads", [
    ("", ["rgb", "tg"], True), ("--w_clr 0", ["rgb", "tg"], False), ("--nets rgb", ["rgb"], False),
    ("--nets tg", ["tg"], False),
])  # fmt: skip
def test_build_networks(line, names, heads, run):
    args = tg_distill.parse_args(["--width", "0.0625", *line.split()])
    nets, build = tg_distill.build_networks(args, CLASSES, run)
    assert list(nets) == names and all((net.module.head is not None) == heads for net in nets.values())
    weights = [net.module.backbone.stem[0].weight for net in nets.values()]
    assert len(weights) == 1 or not torch.equal(*weights)
    again = backbones.build(**build)
    assert again.stem[1].eps == 1e-3 and again.fc.out_features == CLASSES


# ---- test views ------------------------------------------------------------------------------------


def test_recipes_of_both_networks():
    args = tg_distill.parse_args(["--data", "ucf101", "--ratio", "0.2", "--interval", "7"])
    rgb, tg = tg_distill.recipes_of(args).values()
    assert (rgb.frames, rgb.stride, rgb.clips, rgb.crops, rgb.size, rgb.short_side) == (8, 8, 10, 3, 256, 256)
    assert rgb.average == "logits" and rgb.mean == (0.485, 0.456, 0.406) and rgb.std == (0.229, 0.224, 0.225)
    assert tg == replace(rgb, modality="tg", interval=7)


# ---- command line ----------------------------------------------------------------------------------


def parsed(line):
    return tg_distill.parse_args(line.split())


def fixed_size(name, n, K):
    """A data set of n training videos, which are as many in each of K classes as can be."""
    train = Videos.make("/", [f"{i}.mp4" for i in range(n)], np.arange(n) % K)
    return Data(name, 1, tuple(map(str, range(K))), train, train, False, True, ())


@pytest.mark.parametrize("name, n, K", [("ucf101", 9537, 101), ("hmdb51:all", 5236, 51)])
def test_counts_of_balanced_draws(name, n, K):
    """The page of claims says how many labels there are for the paper's shares."""
    shares, said = {"ucf101": ((0.05, 0.1, 0.2, 0.5), "505, 1010, 1919, 4848"),
                    "hmdb51:all": ((0.4, 0.5, 0.6), "2142, 2652, 3162")}[name]  # fmt: skip
    counts = [len(labelled_subset(fixed_size(name, n, K), ratio)) for ratio in shares]
    page = (Path(__file__).parent / "claims" / "tg_distill.md").read_text()
    assert ", ".join(map(str, counts)) == said and said in page


@pytest.mark.parametrize("line, ratio, per_class", [
    ("--data ucf101", 0.2, None), ("--data hmdb51:all", 0.5, None), ("--data hmdb51", 0.5, None),
    ("--data ucf101 --ratio 0.05", 0.05, None), ("--data ucf101 --per_class 3", None, 3),
    ("--data hmdb51:all --labelled_list l.txt", None, None), ("--data toy", None, 8),
])  # fmt: skip
def test_labels_by_default_are_the_papers(line, ratio, per_class):
    """Table 3 and Table 1: UCF-101 20 %, HMDB-51 50 %."""
    args = parsed(line)
    assert (args.ratio, args.per_class) == (ratio, per_class)


@pytest.mark.parametrize("line, epochs, warmup, batch, precise_bn", [
    ("--data ucf101", 180, 30, 5, 8000), ("--data hmdb51:all", 360, 60, 5, 4800),
    ("--data k400 --ratio 0.01", 45, 10, 8, 8000), ("--data k400 --ratio 0.1", 90, 15, 8, 8000),
])  # fmt: skip
def test_recipes_are_the_papers(line, epochs, warmup, batch, precise_bn):
    args = parsed(line)
    assert (args.epochs, args.warmup, args.sup_warmup) == (epochs, warmup, warmup)
    assert (args.batch, args.mu, args.precise_bn, args.unlabelled) == (batch, 1, precise_bn, "all")
    assert args.lr_batch == 8 * batch  # on 8 GPUs
    assert (args.lr, args.weight_decay, args.dropout, args.optimizer) == (0.2, 1e-4, 0.5, "sgd")
    assert (args.tau, args.w_fm, args.w_kd, args.w_clr, args.lam_u) == (0.3, 0.5, 1.0, 1.0, 1.0)
    assert (args.align, args.align_stages, args.stopgrad) == ("cosine", [1, 2, 3, 4], True)
    assert args.temperature == 0.5
    assert (args.nets, args.pseudo, args.fuse, args.interval) == ("both", "avg", "probs", 1)
    assert (args.frames, args.stride, args.size, args.test_size) == (8, 8, 224, 256)
    assert (args.clips, args.crops, args.net, args.width) == (10, 3, "r3d_18-pool", 1.0)


@pytest.mark.parametrize("line, word", [
    ("--tau 1.5", "--tau"), ("--tau nan", "--tau"), ("--temperature 0", "--temperature"),
    ("--temperature inf", "--temperature"), ("--area 0.5 0.2", "--area"), ("--area 0 1", "--area"),
    ("--area 0.5 1.5", "--area"), ("--align_stages 1 5", "--align_stages"),
    ("--align_stages 1,2", "--align_stages"), ("--mu 0", "--mu"), ("--interval 0", "--interval"),
    ("--w_kd -1", "--w_kd"), ("--lam_u nan", "--lam_u"), ("--precise_bn -1", "--precise_bn"),
    ("--nets rgb --pseudo tg", "--pseudo"), ("--rand_augment 2 11", "--rand_augment"),
    ("--pseudo other", "--pseudo"), ("--ratio 20", "--ratio"),
])  # fmt: skip
@pytest.mark.usefixtures("leave")
def test_bad_values_are_refused(line, word):
    with pytest.raises(SystemExit, match=f"tg_distill: .*{word}"):
        parsed(line)


# ---- after training --------------------------------------------------------------------------------


def test_eval_tests_labelled_videos_too_and_names_the_model(folder, run, tmp_path):
    net = backbones.build("r3d_10-pool", 2, width=1 / 16)
    nn.init.constant_(net.fc.bias[:1], 9.0)  # always the first class
    build = dict(name="r3d_10-pool", classes=2, width=1 / 16)
    save_model(tmp_path / "model.pt", net, build, ["a", "b"], SMALL)
    for name, names in (("train", NAMES[:5]), ("test", [*NAMES[5:], "page.mp4"])):
        (folder / f"{name}.txt").write_text("".join(f"{video} {i % 2}\n" for i, video in enumerate(names)))
    (folder / "classes.txt").write_text("a\nb\n")
    (folder / "page.mp4").write_text("<html>404</html>")
    (folder / "labelled.txt").write_text("v0 0\nv1 1\nv2 0\n")
    line = f"--data {folder} --eval {tmp_path}/model.pt --clips 2 --crops 1 --workers 0"
    tg_distill.train(parsed(f"{line} --train_accuracy --labelled_list {folder}/labelled.txt"), run)
    result = json.loads((run.out / "result.json").read_text())
    assert (result["eval"], result["videos"], result["unreadable"]) == (f"{tmp_path}/model.pt", 6, 1)
    assert result["train_top1"] == pytest.approx(200 / 3) and result["top1"] == 50.0
    tg_distill.train(parsed(line), run)
    assert "train_top1" not in json.loads((run.out / "result.json").read_text())


if __name__ == "__main__":
    on_a_rank(*sys.argv[1:])

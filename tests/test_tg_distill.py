"""The equations of tg_distill.py (a value by hand, a plain loop from the paper, where gradients go), its
views of a video, PreciseBN, both of them on two ranks as well, and its command line."""

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
from tensors import naive_cross_entropy, picture_folder, random, save_tiny_model, softmax
from torch import nn

import tg_distill
from common import augment, backbones, evaluate, modality
from common.clips import Views
from common.data import Videos
from common.modality import Recipe, temporal_gradient
from common.run import Run

CLASSES, STAGES, NETS = 3, [1, 2, 3, 4], ["rgb", "tg"]


def parsed(line=""):
    return tg_distill.parse_args(line.split())


def arguments(**changes):
    """The paper's settings on small clips; every pseudo-label is confident."""
    return Namespace(**vars(parsed("--data ucf101 --size 16 --tau 0")) | changes)


# ---- frames and crops ------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 64, 72, 300])
def test_frames_t_and_t_plus_n(length, interval):
    args = arguments(interval=interval, clips=3)
    windows = [tg_distill.windows(range(length), np.random.default_rng(s), args) for s in range(200)]
    assert all(len(clips) == 1 for clips in windows)  # one array, so one decode and one crop
    tests = tg_distill.recipes_of(args)["tg"].sample(range(max(1, length - interval)))
    for window in sum(windows, []) + [modality.pictures_of(t, "tg", length, interval) for t in tests]:
        t, t_next = window[::2], window[1::2]
        assert len(t) == 8 and t.min() >= 0 and t_next.max() < length
        if length > interval:
            assert (t_next - t == interval).all()
        else:  # too short for a difference of n frames: of the whole length
            assert (t == 0).all() and (t_next == length - 1).all()
        assert length < 64 + interval or (np.diff(t) == 8).all()
    if length == 72:  # clips of 8 frames at stride 8 span 57 of the 71 or 65 usable frames
        assert {int(clips[0][0]) for clips in windows} == set(range(72 - interval - 64 + 1))


def positions(T=4, H=30, W=40):
    """2T frames: red is a pixel's place in x, green in y, blue the number of the frame. Frames t + n have red
    and green exchanged, so TG follows from the RGB view alone if both have the same crop and flip."""
    x = torch.linspace(0, 250, W).round().expand(T, 1, H, W)
    y = torch.linspace(0, 250, H).round()[:, None].expand(T, 1, H, W)
    t = (40 * torch.arange(T, dtype=torch.float32)).view(T, 1, 1, 1).expand(T, 1, H, W)
    return torch.stack([torch.cat([x, y, t], 1), torch.cat([y, x, t], 1)], 1).flatten(0, 1).to(torch.uint8)


@pytest.mark.parametrize("flip", [True, False])
def test_student_and_teacher_share_crop_and_flip(flip):
    clip, args = positions(), arguments()
    n_mirrored, corners = 0, set()
    for seed in range(60):
        torch.manual_seed(seed)
        rgb, tg = tg_distill.by_network(tg_distill.weak(clip, args, flip), args).values()
        assert rgb.shape == tg.shape == (4, 3, 16, 16) and rgb.dtype == torch.uint8
        assert torch.equal(tg, temporal_gradient(rgb, rgb[:, [1, 0, 2]]))
        assert (rgb[:, 2] == torch.tensor([0, 40, 80, 120]).view(4, 1, 1)).all()  # frames t, in order
        n_mirrored += bool(rgb[0, 0, 0, 0] > rgb[0, 0, 0, -1])
        corners.add(tuple(rgb[0, :2, 0, 0].tolist()))
    assert len(corners) > 40 and (15 < n_mirrored < 45 if flip else n_mirrored == 0)


@pytest.mark.parametrize("nets", ["both", "rgb", "tg"])
def test_strong_view_is_randaugment_of_the_weak_one(nets):
    names, n_changed, args = NETS if nets == "both" else [nets], 0, arguments(nets=nets)
    clip = positions()[:: 2 if nets == "rgb" else 1]  # RGB alone needs no frames t + n
    for seed in range(8):
        views = []
        for function, clips in (("labelled_views", [clip]), ("unlabelled_views", [clip]), ("weak", clip)):
            torch.manual_seed(seed)
            views.append(getattr(tg_distill, function)(clips, args, True))
        views_l, views_u, x = *views[:2], tg_distill.by_network(views[2], args)
        assert list(views_l) == list(views_u) == names
        for net in names:  # the same crop, then a draw for each network
            x_s = augment.rand_augment(x[net], 2, 9)
            assert torch.equal(views_l[net]["l"], x[net]) and torch.equal(views_u[net]["w"], x[net])
            assert torch.equal(views_u[net]["s"], x_s)
            n_changed += not torch.equal(x_s, x[net])
    assert n_changed > 4


# ---- Eq. 1 to 6: FixMatch --------------------------------------------------------------------------


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


def test_eq1_to_eq3_known_values():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # p = (1/4, 3/4), (1/2, 1/2)
    by_hand = (math.log(4 / 3) + math.log(2)) / 2
    assert tg_distill.supervised_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(by_hand, abs=1e-6)
    # tau 0.75 keeps the first clip, which has exactly that, labelled 0. On its strong view class 0 has 1/5:
    # log 5, over both clips. Without a confident clip neither loss nor gradient.
    strong = torch.tensor([[0.0, math.log(4.0)], [9.0, -9.0]], requires_grad=True)
    for tau, kept, by_hand in ((0.75, [1.0, 0.0], math.log(5) / 2), (0.8, [0.0, 0.0], 0)):
        y, mask = tg_distill.pseudo_label(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), tau)
        assert y[0] == 0 and y.dtype == torch.int64 and mask.tolist() == kept
        loss = tg_distill.unlabelled_loss(strong, y, mask)
        assert loss.item() == pytest.approx(by_hand, abs=1e-6)
        assert torch.autograd.grad(loss, strong)[0].any(1).tolist() == [bool(m) for m in kept]


def test_eq4_eq6_eq11_known_values():
    assert tg_distill.fixmatch_loss(2.0, 3.0, 1.0) == 5.0 and tg_distill.fixmatch_loss(2.0, 3.0, 0.5) == 3.5
    assert tg_distill.total_loss([1.0, 2.0], 10.0, 100.0, 0.5, 2.0, 0.25) == 0.5 * 3 + 20 + 25


# p of RGB (12, 3, 1) / 16, of TG (1, 8, 7) / 16. Their mean (13, 11, 8) / 32 says class 0, the mean of
# logits, softmax of log sqrt(p q): (sqrt 12, sqrt 24, sqrt 7) / sum, says class 1.
P_RGB, P_TG = [12 / 16, 3 / 16, 1 / 16], [1 / 16, 8 / 16, 7 / 16]
ROOTS = [math.sqrt(12), math.sqrt(24), math.sqrt(7)]


@pytest.mark.parametrize("pseudo, mean, p_rgb, p_tg", [
    ("avg", "probs", [13 / 32, 11 / 32, 8 / 32], None),
    ("avg", "logits", [r / sum(ROOTS) for r in ROOTS], None),
    ("rgb", "probs", P_RGB, None), ("tg", "logits", P_TG, None), ("self", "probs", P_RGB, P_TG),
])  # fmt: skip
def test_eq5_by_hand_without_gradient(pseudo, mean, p_rgb, p_tg):
    shifts = {"rgb": (P_RGB, 5), "tg": (P_TG, -1)}
    logits = {net: (torch.tensor([p]).log() + c).requires_grad_() for net, (p, c) in shifts.items()}
    p = tg_distill.fuse(logits, pseudo, mean)
    assert list(p) == NETS and not any(x.requires_grad for x in p.values())
    assert p["rgb"][0].tolist() == pytest.approx(p_rgb, abs=1e-6)
    assert p["tg"][0].tolist() == pytest.approx(p_tg or p_rgb, abs=1e-6)


# ---- Eq. 7 to 9: alignment -------------------------------------------------------------------------


def naive_distance(f_1, f_2, kind):
    """Eq. 8 for the channel vectors of each clip and place; D9 says how they are averaged."""
    u_and_v = [f.movedim(1, -1).flatten(0, -2).tolist() for f in (f_1, f_2)]  # (B T H W, C)
    distances = []
    for u, v in zip(*u_and_v, strict=True):
        if kind == "cosine":
            dot = sum(i * j for i, j in zip(u, v, strict=True))
            distances.append(1 - dot / (math.hypot(*u) * math.hypot(*v) or 1))  # 1 for a zero vector
        else:
            power = 1 if kind == "l1" else 2
            distances.append(sum(abs(i - j) ** power for i, j in zip(u, v, strict=True)) / len(u))
    return sum(distances) / len(distances)


# The paper's own example, Sec. 4.5: (10, 10, 10) and (1, 1, 1) point the same way; |10 - 1| = 9. Then
# opposite vectors, and vectors at right angles, whose entries differ by 0, 2 and 1.
@pytest.mark.parametrize("kind, values", [("cosine", [0, 2, 1]), ("l1", [9, 2, 1]), ("l2", [81, 4, 5 / 3])])
def test_eq8_known_values(kind, values):
    f = torch.ones(2, 3, 1, 2, 2)
    turned = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1, 1).expand_as(f)
    distances = [tg_distill.distance(x, f, kind).item() for x in (10 * f, -f, turned)]
    assert distances == pytest.approx(values, abs=1e-6)


def test_eq8_where_the_student_is_silent():
    """A zero vector has no direction: distance 1, and through the ReLU that made it no gradient, not NaN."""
    x = torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 1, 2).clone().requires_grad_()
    loss = tg_distill.distance(x.relu(), torch.ones(1, 3, 1, 1, 2), "cosine")
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and x.grad.isfinite().all() and not x.grad[..., 0].any()


# ---- Eq. 10: contrast ------------------------------------------------------------------------------


def naive_contrast(queries, keys, tau):
    """Eq. 10 with q of one modality, k+ the same clip in the other, k- its other clips."""
    total = 0.0
    for i, q in enumerate(queries):
        e = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / math.hypot(*q) / math.hypot(*k) / tau)
             for k in keys]  # fmt: skip
        total += -math.log(e[i] / sum(e))
    return total / len(queries)


def naive_contrast_both_ways(z_rgb, z_tg, tau):
    """D10: the mean of both directions."""
    a, b = z_rgb.tolist(), z_tg.tolist()
    return (naive_contrast(a, b, tau) + naive_contrast(b, a, tau)) / 2


def test_eq10_known_value():
    # Directions: RGB e1, e2; TG e1, e1; tau 1/2. From RGB: both keys are alike, log 2 for each query.
    # From TG: cosines (1, 0), so -log e^2 / (e^2 + 1) and -log 1 / (e^2 + 1), mean log(e^2 + 1) - 1.
    z_rgb, z_tg = torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([[7.0, 0.0], [0.1, 0.0]])
    by_hand = (math.log(2) + math.log(math.exp(2) + 1) - 1) / 2
    assert tg_distill.contrastive_loss(z_rgb, z_tg, 0.5).item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_eq10_trains_both_networks_as_query_and_as_key(tau):
    z_rgb, z_tg = (random(6, 5, seed=i).requires_grad_() for i in range(2))
    tg_distill.contrastive_loss(z_rgb, z_tg, tau).backward()
    for z in (z_rgb, z_tg):  # the derivative when one side moves
        move, ends = 1e-4 * random(6, 5, seed=2).double(), []
        for sign in (1, -1):
            moved = [x.detach() + sign * move if x is z else x for x in (z_rgb, z_tg)]
            ends.append(naive_contrast_both_ways(*moved, tau))
        assert (z.grad * move).sum().item() == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-3)


# ---- two ranks are one -----------------------------------------------------------------------------


NAMES = [f"v{i}" for i in range(10)]
MIXED = [*NAMES[:4], "none", *NAMES[4:]]  # one video is unreadable
SMALL = Recipe(4, 1, 1, 1, 16, 16, mean=tg_distill.RGB.mean, std=tg_distill.RGB.std)
BUILD = dict(name="r3d_10-pool", classes=CLASSES, width=1 / 16, bn_eps=1e-3)


def contrast_of(rows):
    """Eq. 10 of these of 8 clips, whose embeddings are linear maps: [loss, gradients of both maps]."""
    maps = [random(4, 6, seed=s, scale=0.5).requires_grad_() for s in (0, 1)]
    z_rgb, z_tg = (random(8, 6, seed=5 + s, scale=1.0)[rows] @ maps[s].T for s in (0, 1))
    loss = tg_distill.contrastive_loss(z_rgb, z_tg, 0.2)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in maps)]


def tiny_backbone():
    torch.manual_seed(0)
    return backbones.build(**BUILD)


def list_of(folder, names):
    return Videos.make(folder, names, [0] * len(names))


def statistics(net):
    """Means and variances of all batch norms, in the order of the modules."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm3d)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]


def on_a_rank(folder):
    """What a rank of two computes, into a file."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    contrast = contrast_of(slice(4 * rank, 4 * rank + 4))
    for x in contrast:  # DDP's average
        dist.all_reduce(x)
        x /= 2
    net = tiny_backbone()
    run = SimpleNamespace(rank=rank, world=2, stop=False, device=torch.device("cpu"),
                          autocast=contextlib.nullcontext)  # fmt: skip
    evaluate.precise_bn(net, list_of(folder, MIXED), SMALL, run, block=3)
    torch.save((contrast, statistics(net)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


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
def run(tmp_path, group):
    with Run("tg_distill", tmp_path / "out", {}) as run:
        yield run


def test_two_ranks_are_one(folder, run):
    """Eq. 10 of the joint batch, with the negatives of the other rank; PreciseBN in four blocks."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = forks.start([sys.executable, __file__, folder], folder, env, ranks=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    net, whole = tiny_backbone(), contrast_of(slice(None))
    evaluate.precise_bn(net, list_of(folder, MIXED), SMALL, run, block=3)
    for rank in range(2):
        contrast, buffers = torch.load(folder / f"{rank}.pt")
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(contrast, whole, strict=True))
        assert all(map(torch.equal, buffers, statistics(net)))
    assert not torch.allclose(contrast_of(slice(4))[0], whole[0], atol=0.1)


# ---- PreciseBN -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [40, 4])
def test_precise_bn_pools_all_readable_clips(block, folder, run):
    """One block is a training pass; with several blocks only the first layer has the same inputs."""
    net = tiny_backbone()
    reference, before = copy.deepcopy(net).train(), [p.clone() for p in net.parameters()]
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0  # the statistics of the last batch, the variance unbiased
    views = Views(list_of(folder, NAMES), SMALL.sample, SMALL.view)
    with torch.no_grad():
        reference(SMALL.to_input(torch.cat([views[i]["views"] for i in range(len(NAMES))]), "cpu"))
    evaluate.precise_bn(net, list_of(folder, ["none", *MIXED, "gone"]), SMALL, run, block=block)
    pairs = list(zip(statistics(net), statistics(reference), strict=True))[: None if block == 40 else 2]
    assert all(torch.allclose(ours, torchs, rtol=1e-4, atol=1e-6) for ours, torchs in pairs)
    assert not net.training and all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("frozen, names, changed", [
    (2, NAMES, {"layer3", "layer4"}), (0, ["none", "gone", NAMES[0]], set()),  # no block of two clips
])  # fmt: skip
def test_precise_bn_leaves_alone(frozen, names, changed, folder, run):
    net = tiny_backbone().freeze(frozen)
    before = {name: value.clone() for name, value in net.named_buffers() if "running" in name}
    evaluate.precise_bn(net, list_of(folder, names), SMALL, run)
    after = dict(net.named_buffers())
    assert {k.split(".")[0] for k, v in before.items() if not torch.equal(v, after[k])} == changed
    assert not net.training


def test_for_test_is_a_copy_with_exact_statistics(folder, run):
    net, videos = tg_distill.Network(tiny_backbone(), project=True), list_of(folder, NAMES)
    args = arguments(channels_last=False, precise_bn=4, seed=3, workers=0)
    recipe = replace(SMALL, modality="tg", short_side=18)
    many = {"tg": replace(recipe, clips=3, crops=3, size=20)}  # the views of a test, not of PreciseBN

    def tested(precise_bn):
        args.precise_bn = precise_bn
        nets, data = {"tg": SimpleNamespace(module=net)}, SimpleNamespace(train=videos)
        return tg_distill.for_test(args, nets, BUILD, data, many, run)["tg"][0].state_dict().values()

    expected, chosen = tiny_backbone(), sorted(np.random.default_rng(3).permutation(10)[:4].tolist())
    evaluate.precise_bn(expected, videos.subset(chosen), recipe, run)
    assert all(map(torch.equal, tested(4), expected.state_dict().values()))
    before = tiny_backbone().state_dict().values()  # training never sees it
    assert all(map(torch.equal, net.backbone.state_dict().values(), before))
    assert all(map(torch.equal, tested(0), before))


# ---- a step ----------------------------------------------------------------------------------------


def networks(train=False):
    """A student and a teacher; their last layers are large enough that the labels are no coin flips."""
    nets = {}
    for seed, name in enumerate(NETS):
        torch.manual_seed(seed)
        backbone = backbones.build(**BUILD)
        nets[name] = tg_distill.Network(backbone, project=True).train(train)
        nn.init.normal_(backbone.fc.weight)
        for layer in nets[name].head[::3]:
            nn.init.normal_(layer.weight, std=0.5)
    return nets


def step(nets, args, lam_u=1.0):
    """(x, y_l, what train_step returns); 2 labelled and 3 unlabelled clips."""
    x = {net: {view: random(3 - (view == "l"), 3, 8, 16, 16, seed=10 * i + j, scale=1.0)
               for j, view in enumerate("lws")} for i, net in enumerate(nets)}  # fmt: skip
    y_l = torch.tensor([0, 2])
    return x, y_l, tg_distill.train_step(nets, x, y_l, args, lam_u)


def naive_terms(nets, x, y_l, args):
    """{term: value}, {net: probabilities of the pseudo-labels}; one view at a time through the networks."""
    logits, f, z = {}, {}, {}
    for net, views in x.items():
        backbone, labelled_and_weak = nets[net].backbone, [views["l"], views["w"]]
        logits[net] = {view: backbone(clips) for view, clips in views.items()}
        f[net] = [torch.cat(pair) for pair in zip(*map(backbone.features, labelled_and_weak), strict=True)]
        z[net] = nets[net].head(torch.cat([*map(backbone.embed, labelled_and_weak)]))
    p = dict.fromkeys(nets, naive_average(*(logits[net]["w"] for net in nets)))
    if args.pseudo == "self":
        p = {net: naive_average(logits[net]["w"]) for net in nets}
    terms = {f"loss_l_{net}": naive_cross_entropy(logits[net]["l"], y_l) for net in nets}
    terms |= {f"loss_u_{net}": naive_unlabelled(logits[net]["s"], p[net], args.tau) for net in nets}
    if len(nets) > 1:
        stages = [i - 1 for i in args.align_stages]
        terms["loss_kd"] = sum(naive_distance(f["rgb"][i], f["tg"][i], args.align) for i in stages)
        terms["loss_clr"] = naive_contrast_both_ways(z["rgb"], z["tg"], args.temperature)
    return terms, p


@pytest.mark.parametrize("changes", [
    {}, dict(tau=0.6), dict(pseudo="self"), dict(align="l2", align_stages=[2, 4]), dict(align="l1"),
    dict(temperature=0.1), dict(w_fm=2.0, w_kd=3.0, w_clr=5.0), dict(w_kd=0.0), dict(w_clr=0.0),
    dict(nets="rgb"), dict(nets="tg", tau=0.5),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_step_is_the_sum_of_its_terms(changes):
    """Eq. 11; of one network Eq. 4 with no weight in front of it."""
    args = arguments(**changes)
    nets = {net: network for net, network in networks().items() if args.nets in (net, "both")}
    x, y_l, (loss, terms, labels, y_w) = step(nets, args, lam_u=0.7)
    naive, p = naive_terms(nets, x, y_l, args)
    naive = {term: value for term, value in naive.items() if getattr(args, f"w_{term[5:]}", 1)}
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(naive, rel=1e-4)
    total = sum(naive[f"loss_l_{net}"] + 0.7 * naive[f"loss_u_{net}"] for net in nets)
    if len(nets) > 1:
        total *= args.w_fm
        total += args.w_kd * naive.get("loss_kd", 0) + args.w_clr * naive.get("loss_clr", 0)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    for net in nets:
        assert labels[net][0].tolist() == [row.index(max(row)) for row in p[net]]
        assert y_w[net].tolist() == nets[net].backbone(x[net]["w"]).argmax(1).tolist()


FEATURES = {"stem", "layer1", "layer2", "layer3", "layer4"}


@pytest.mark.parametrize("term, changes, rgb, tg", [
    ("loss_kd", {}, FEATURES, set()),  # Eq. 9 trains the student alone
    ("loss_kd", dict(stopgrad=False), FEATURES, FEATURES),
    ("loss_kd", dict(align_stages=[1]), {"stem", "layer1"}, set()),
    ("loss_u_rgb", {}, FEATURES | {"fc"}, set()),
    ("loss_clr", {}, FEATURES | {"head"}, FEATURES | {"head"}),
], ids=str)  # fmt: skip
def test_whom_a_term_trains(term, changes, rgb, tg):
    nets = networks(train=True)
    step(nets, arguments(**changes))[2][1][term].backward()
    for net, expected in (("rgb", rgb), ("tg", tg)):
        names = [k for k, p in nets[net].named_parameters() if p.grad is not None and p.grad.any()]
        assert {k.removeprefix("backbone.").split(".")[0] for k in names} == expected
        assert nets[net].backbone.stem[1].num_batches_tracked == 1  # D8: all clips in one forward pass


def test_report_counts_by_hand():
    y_true, y, mask = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0, 1, 1])
    report = tg_distill.pseudo_label_report({"tg": (y, mask)}, {"tg": torch.zeros(4)}, y_true)
    assert {k: v.item() for k, v in report.items()} == dict(kept_tg=0.75, right_tg=0.5, weak_top1_tg=0.25)
    assert list(tg_distill.pseudo_label_report({"tg": (y, mask)}, {"tg": torch.zeros(4)}, None)) == [
        "kept_tg"
    ]


@pytest.mark.parametrize("line, names, has_head", [
    ("", NETS, True), ("--w_clr 0", NETS, False), ("--nets rgb", ["rgb"], False),
    ("--nets tg", ["tg"], False),
])  # fmt: skip
def test_build_networks(line, names, has_head, run):
    nets, build = tg_distill.build_networks(parsed(f"--width 0.0625 {line}"), CLASSES, run)
    assert list(nets) == names
    weights = [net.module.backbone.stem[0].weight for net in nets.values()]
    assert len(weights) == 1 or not torch.equal(*weights)
    again = backbones.build(**build)
    assert again.stem[1].eps == 1e-3 and again.fc.out_features == CLASSES
    for head in [net.module.head for net in nets.values()]:
        assert (head is not None) == has_head
        layers = list(head or [])  # three layers, the last norm without a scale, D3, D10
        kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 3
        assert not has_head or [type(m) for m in layers] == kinds[:-1]
        assert not has_head or [m.affine for m in layers[1::3]] == [True, True, False]
        assert all(m.eps == 1e-5 for m in layers[1::3])
        assert all(m.bias is None and 0.007 < m.weight.std() < 0.013 for m in layers[::3])


# ---- command line ----------------------------------------------------------------------------------


PAPER = dict(
    net="r3d_18-pool", width=1.0, dropout=0.5, frames=8, stride=8, size=224, area=[0.08, 1.0],
    rand_augment=[2, 9], nets="both", interval=1, tau=0.3, lam_u=1.0, pseudo="avg", fuse="probs",
    align="cosine", align_stages=STAGES, stopgrad=True, temperature=0.5, w_fm=0.5, w_kd=1.0, w_clr=1.0,
    unlabelled="all", per_class=None, batch=5, mu=1, optimizer="sgd", lr=0.2, lr_batch=40,
    weight_decay=1e-4, epochs=180, warmup=30, sup_warmup=30, precise_bn=8000, test_size=256, clips=10,
    crops=3,
)  # fmt: skip


@pytest.mark.parametrize("line, changes", [
    ("--data ucf101", dict(ratio=0.2)), ("--data ucf101 --ratio 0.05", dict(ratio=0.05)),
    ("--data ucf101 --per_class 3", dict(ratio=None, per_class=3)),
    ("--data hmdb51:all", dict(ratio=0.5, epochs=360, warmup=60, sup_warmup=60, precise_bn=4800)),
    ("--data k400 --ratio 0.01", dict(epochs=45, warmup=10, sup_warmup=10, batch=8, lr_batch=64)),
    ("--data k400 --ratio 0.1", dict(epochs=90, warmup=15, sup_warmup=15, batch=8, lr_batch=64)),
])  # fmt: skip
def test_recipes_are_the_papers(line, changes):
    expected = PAPER | changes
    assert {flag: getattr(parsed(line), flag) for flag in expected} == expected


def test_recipes_of_both_networks():
    rgb, tg = tg_distill.recipes_of(parsed("--data ucf101 --interval 7")).values()
    assert rgb == Recipe(8, 8, 10, 3, 256, 256, average="logits",
                                  mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # fmt: skip
    assert tg == replace(rgb, modality="tg", interval=7)


@pytest.mark.parametrize("line", [
    "--tau 1.5", "--temperature 0", "--area 0.5 0.2", "--area 0 1", "--align_stages 1 5", "--mu 0",
    "--interval 0", "--w_kd -1", "--lam_u nan", "--precise_bn -1", "--pseudo tg --nets rgb",
    "--rand_augment 2 11",
])  # fmt: skip
@pytest.mark.usefixtures("leave")
def test_bad_values_are_refused(line):
    with pytest.raises(SystemExit, match=f"tg_distill: .*{line.split()[0]}"):
        parsed(line)


def test_eval_tests_labelled_videos_too(folder, run, tmp_path):
    save_tiny_model(tmp_path / "model.pt", SMALL, ["a", "b"], "r3d_10-pool", always=0)
    (folder / "page.mp4").write_text("<html>404</html>")
    for name, names in (("train", NAMES[:5]), ("test", [*NAMES[5:], "page.mp4"]), ("labelled", NAMES[:3])):
        (folder / f"{name}.txt").write_text("".join(f"{video} {i % 2}\n" for i, video in enumerate(names)))
    (folder / "classes.txt").write_text("a\nb\n")
    line = f"--data {folder} --eval {tmp_path}/model.pt --clips 2 --crops 1 --workers 0"
    tg_distill.train(parsed(f"{line} --train_accuracy --labelled_list {folder}/labelled.txt"), run)
    result = json.loads((run.out / "result.json").read_text())
    assert (result["videos"], result["unreadable"], result["top1"]) == (6, 1, 50.0)
    assert result["train_top1"] == pytest.approx(200 / 3)


if __name__ == "__main__":
    on_a_rank(*sys.argv[1:])

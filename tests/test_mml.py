"""The equations of mml.py (a value by hand, a plain loop from the paper, where gradients go), its clips, what
its optimiser does to which parameter, and its command line."""

import json
import math
import os
import signal
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensors import naive_cross_entropy, picture_folder, pixels, random, save_tiny_model, sigmoid, softmax
from torch import nn

import mml
from common import backbones, evaluate
from common.clips import Views
from common.data import Data, Videos, labelled_subset
from common.errors import UserError
from common.io.decode import read_frames
from common.io.flow import write_flow
from common.io.models import digest_of_model, load_model
from common.modality import BOUND, FLOW_SIDE, Recipe
from common.run import Run

pytestmark = pytest.mark.usefixtures("leave", "group")

MULTILABEL = pytest.mark.parametrize("multilabel", [False, True], ids=["single", "multilabel"])
B, K = 6, 5
SCALE = BOUND, FLOW_SIDE


def parsed(line=""):
    return mml.parse_args(line.split())


def several(B, K, seed=0):
    """Labels (B, K) of multi-label data."""
    return (torch.rand(B, K, generator=torch.Generator().manual_seed(seed)) < 0.4).float()


# ---- L_CE and L_mlBCE ------------------------------------------------------------------------------


def naive_classification(logits, y):
    """Appendix 2: L_CE of classes (B,), L_mlBCE of (B, K) zeros and ones."""
    if y.ndim == 1:
        return naive_cross_entropy(logits, y)
    total = 0.0
    for row, labels in zip(logits.tolist(), y.tolist(), strict=True):
        for p, label in zip(sigmoid(row), labels, strict=True):
            total -= label * math.log(p) + (1 - label) * math.log(1 - p)
    return total / y.numel()


def test_classification_loss_known_values():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # softmax (1/4, 3/4), (1/2, 1/2)
    by_hand = (math.log(4 / 3) + math.log(2)) / 2
    assert mml.classification_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(by_hand, abs=1e-6)
    # sigmoid (1/2, 3/4), (1/2, 1/2), of which 1/2, 1/4 and 1/2, 1/2 are right: over 2 clips and 2 classes.
    by_hand = (math.log(2) + math.log(4) + math.log(2) + math.log(2)) / 4
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert mml.classification_loss(logits, y).item() == pytest.approx(by_hand, abs=1e-6)


# ---- Eq. 3: KL -------------------------------------------------------------------------------------


def naive_kl(p, logits, multilabel):
    """Eq. 3 with p_i = p, p_j of the logits, over B; with several labels over B N, a class two outcomes."""
    total = 0.0
    for ps, row in zip(p.tolist(), logits.tolist(), strict=True):
        outcomes = list(zip(ps, sigmoid(row) if multilabel else softmax(row), strict=True))
        if multilabel:
            outcomes += [(1 - a, 1 - b) for a, b in outcomes]
        total += sum(a * math.log(a / b) for a, b in outcomes if a > 0) / (len(row) if multilabel else 1)
    return total / len(p)


def test_eq3_known_values():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3, and 0 for the second clip.
    p, logits = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.0, math.log(3.0)], [7.0, 7.0]])
    assert mml.kl_loss(p, logits).item() == pytest.approx(math.log(4 / 3) / 4, abs=1e-6)
    # Coins: 1/2 against 1/4 gives 1/2 log 4/3, 1 against 3/4 gives log 4/3; over 1 clip and 2 classes.
    logits = torch.tensor([[-math.log(3.0), math.log(3.0)]])
    loss = mml.kl_loss(torch.tensor([[0.5, 1.0]]), logits, multilabel=True)
    assert loss.item() == pytest.approx(0.75 * math.log(4 / 3), abs=1e-6)


@MULTILABEL
def test_eq3_is_finite_where_probabilities_are_0_and_1(multilabel):
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for factor in (0.0, -400.0):
        logits = (factor * (2 * p - 1)).requires_grad_()
        loss = mml.kl_loss(p, logits, multilabel)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all() and loss.item() > 0
    assert mml.kl_loss(p, 400 * (2 * p - 1), multilabel).item() == 0


# ---- Eq. 4: the target -----------------------------------------------------------------------------

# p of flow (12, 3, 1) / 16, of diff (1, 8, 7) / 16. Their mean is (13, 11, 8) / 32, that of logits
# (sqrt 12, sqrt 24, sqrt 7) / sum.
THREE = {"rgb": torch.tensor([[5.0, -7.0, 1.0]]), "flow": torch.tensor([[12.0, 3, 1]]).log() + 5,
         "diff": torch.tensor([[1.0, 8, 7]]).log() - 1}  # fmt: skip
ROOTS = [math.sqrt(12), math.sqrt(24), math.sqrt(7)]
# Several labels: sigmoids 3/4 and 1/4 are 1/2 in the mean, 9/10 and 1/2 are 7/10; of logits 1/2, 3/4.
COINS = {"rgb": torch.zeros(1, 2), "flow": torch.tensor([[3.0, 9]]).log(),
         "diff": torch.tensor([[1 / 3, 1]]).log()}  # fmt: skip


@pytest.mark.parametrize("logits, p_is_a_coin, mean, by_hand", [
    (THREE, False, "probs", [13 / 32, 11 / 32, 8 / 32]),
    (THREE, False, "logits", [r / sum(ROOTS) for r in ROOTS]),
    (COINS, True, "probs", [0.5, 0.7]), (COINS, True, "logits", [0.5, 0.75]),
], ids=["probs", "logits", "coins-probs", "coins-logits"])  # fmt: skip
def test_eq4_known_values_without_gradient(logits, p_is_a_coin, mean, by_hand):
    logits = {net: x.clone().requires_grad_() for net, x in logits.items()}
    p = mml.mean_of_others(logits, "rgb", mean, multilabel=p_is_a_coin)
    assert p[0].tolist() == pytest.approx(by_hand, abs=1e-6) and not p.requires_grad


def naive_target(logits, net, mean, multilabel):
    """Eq. 4: sum over j != i of p_j, by M - 1; or the probabilities of that mean of the logits."""
    others = [x.tolist() for name, x in logits.items() if name != net]
    squash, rows = sigmoid if multilabel else softmax, []
    for clip in zip(*others, strict=True):
        values = map(squash, clip) if mean == "probs" else clip
        row = [sum(v) / len(others) for v in zip(*values, strict=True)]
        rows.append(row if mean == "probs" else squash(row))
    return torch.tensor(rows)


# ---- MARS and D3D ----------------------------------------------------------------------------------


def naive_mars(f, teacher, divisor):
    pairs = list(zip(f.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs) / divisor


def naive_d3d(logits, teacher, divisor):
    rows = zip(logits.tolist(), teacher.tolist(), strict=True)
    return sum(sum((a - b) ** 2 for a, b in zip(*row, strict=True)) for row in rows) / len(logits) / divisor


@pytest.mark.parametrize("loss, x, by_hand", [
    (mml.mars_loss, [[[[[3.0, 0.0]]], [[[0.0, 1.0]]]]], 2.5),  # squares 9, 0, 0, 1
    (mml.d3d_loss, [[1.0, 2.0, 2.0], [1.0, 0.0, 0.0]], 5.0),  # squared lengths 9 and 1
], ids=["mars", "d3d"])  # fmt: skip
def test_mars_and_d3d_known_values(loss, x, by_hand):
    x = torch.tensor(x)
    assert loss(x, 0 * x).item() == by_hand and loss(x, 0 * x, 5).item() == by_hand / 5


@pytest.mark.parametrize("loss", [
    lambda own, other: mml.kl_loss(other.softmax(1), own), mml.mars_loss, mml.d3d_loss,
    lambda own, other: mml.kl_loss(other.sigmoid(), own, multilabel=True),
])  # fmt: skip
def test_the_other_side_of_a_loss_is_detached(loss):
    own, other = (random(8, 6, seed=seed).requires_grad_() for seed in (1, 2))
    loss(own, other).backward()
    assert own.grad.any() and other.grad is None


@pytest.mark.parametrize("loss", [
    lambda x: mml.classification_loss(x, torch.arange(B) % K), lambda x: mml.d3d_loss(x, x),
    lambda x: mml.classification_loss(x, several(B, K)), lambda x: mml.mars_loss(x, x),
    lambda x: mml.kl_loss(x.softmax(1).float(), x), lambda x: mml.kl_loss(x.sigmoid().float(), x, True),
    lambda x: mml.mean_of_others({"rgb": x, "flow": x}, "rgb", "probs"),
])  # fmt: skip
def test_losses_of_autocast_are_float32(loss):
    assert loss(random(B, K).bfloat16()).dtype == torch.float32


# ---- a step ----------------------------------------------------------------------------------------

CHANNELS = {"rgb": 3, "flow": 10, "diff": 15}


class Tiny(nn.Module):
    """Logits and a last feature map of (B, C, T, H, W), and how often it was called."""

    def __init__(self, channels, seed):
        super().__init__()
        self.body, self.fc, self.calls = nn.Linear(channels, 4), nn.Linear(4, K), 0
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(random(*p.shape, seed=10 * seed + i, scale=0.7))

    def forward(self, x):
        self.calls += 1
        f = self.body(x.movedim(1, -1)).movedim(-1, 1)  # (B, 4, T, H, W)
        return self.fc(f.mean((2, 3, 4))), f


def step(names, mutual="kl", lam=1.0, mean="probs", multilabel=False):
    """(nets, frozen teacher or None, x, y, what train_step returns) of tiny networks."""
    nets = {name: Tiny(CHANNELS[name.rstrip("2")], seed) for seed, name in enumerate(names)}
    teacher = None if mutual == "kl" else Tiny(15, 7)
    x = {kind: random(B, n, 2, 3, 3, seed=n, scale=1.0) for kind, n in CHANNELS.items()}
    y = several(B, K) if multilabel else torch.arange(B) % K
    recipe = Recipe(2, 1, modality="diff")
    args = Namespace(mutual=mutual, lam=lam, mean=mean)
    return nets, teacher, x, y, mml.train_step(nets, x, y, args, teacher and (recipe, teacher))


@MULTILABEL
@pytest.mark.parametrize("mutual, mean, lam", [
    ("kl", "probs", 0.7), ("kl", "logits", 0.7), ("kl", "probs", 0.0), ("mars", "", 0.7), ("d3d", "", 0.7),
])  # fmt: skip
@pytest.mark.parametrize("names", [["flow"], ["rgb", "rgb2"], ["rgb", "flow", "diff"]], ids=len)
@torch.no_grad()
def test_step_is_the_sum_of_its_terms(names, mutual, mean, lam, multilabel):
    nets, teacher, x, y, (loss, terms, logits) = step(names, mutual, lam, mean, multilabel)
    assert all(net.calls == 1 for net in nets.values())
    out = {name: net(x[name.rstrip("2")]) for name, net in nets.items()}
    by_hand, divisor = {}, K if multilabel else 1
    for name, (own, f) in out.items():
        by_hand[f"loss_c_{name}"] = naive_classification(own, y)
        if mutual == "kl" and len(names) > 1:
            target = naive_target({k: v[0] for k, v in out.items()}, name, mean, multilabel)
            by_hand[f"loss_kl_{name}"] = naive_kl(target, own, multilabel)
        elif mutual == "mars":
            by_hand[f"loss_mars_{name}"] = naive_mars(f, teacher(x["diff"])[1], divisor)
        elif mutual == "d3d":
            by_hand[f"loss_d3d_{name}"] = naive_d3d(own, teacher(x["diff"])[0], divisor)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(by_hand, rel=1e-4)  # also with lam 0
    total = sum(v * (1 if k.startswith("loss_c_") else lam) for k, v in by_hand.items())
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert list(logits) == names and all(torch.equal(logits[k], out[k][0]) for k in names)


@MULTILABEL
@pytest.mark.parametrize("mutual, mean", [("kl", "probs"), ("kl", "logits"), ("mars", ""), ("d3d", "")])
def test_a_loss_trains_its_own_network_alone(mutual, mean, multilabel):
    """Eq. 1, 2: L_i has no gradient for a network j nor for a teacher; the loss of a step is all L_i."""
    for name in ("rgb", "flow", "diff"):
        nets, teacher, _, _, (_, terms, _) = step(["rgb", "flow", "diff"], mutual, 1.0, mean, multilabel)
        (terms[f"loss_c_{name}"] + terms[f"loss_{mutual}_{name}"]).backward()
        trained = [k for k, net in nets.items() if all(p.grad is not None for p in net.parameters())]
        assert trained == [name] and sum(p.grad is not None for p in nets[name].parameters()) == 4
        assert all(p.grad is None for k in nets if k != name for p in nets[k].parameters())
        assert teacher is None or all(p.grad is None for p in teacher.parameters())


def test_eq1_and_agreement_by_hand():
    assert mml.network_loss(2.0, 3.0, 1.0) == 5.0 and mml.network_loss(2.0, 3.0, 50.0) == 152.0
    first_classes = [0, 1, 2, 2], [0, 1, 1, 2], [0, 2, 2, 2]
    assert mml.agreement(dict(enumerate(torch.eye(3)[torch.tensor(first_classes)]))).item() == 0.5


# ---- frames and crops ------------------------------------------------------------------------------


def windows(lengths, seed, sampling="both", frames=8, stride=4):
    args = Namespace(sampling=sampling, frames=frames, stride=stride)
    return mml.windows(SimpleNamespace(lengths=lengths), np.random.default_rng(seed), args)


@pytest.mark.parametrize("sampling", ["both", "uniform", "dense"])
def test_sec23_xi_is_one_of_0_to_N_minus_n_for_a_whole_clip(sampling):
    counts, N, n = Counter(), 65, 60
    for seed in range(900):
        i_rgb, i_flow, i_diff = windows(dict(rgb=N, flow=n, diff=n), seed, sampling)
        assert np.array_equal(i_flow, i_diff) and 0 <= i_flow.min() and i_flow.max() < n and i_rgb.max() < N
        (xi,) = set(i_rgb - i_flow)
        counts[int(xi)] += 1
    assert set(counts) == set(range(N - n + 1)) and min(counts.values()) > 100  # of 150 expected


def test_sec311_uniform_takes_a_frame_of_each_part_dense_every_nth():
    """Also a single modality, which has no offset, and short videos."""
    places, starts = [set() for _ in range(8)], set()
    for seed in range(200):
        (i,) = windows(dict(rgb=28), seed, "uniform")
        for place, frame in zip(places, i.tolist(), strict=True):
            place.add(frame)
        (i,) = windows(dict(rgb=40), seed, "dense", stride=3)
        assert (np.diff(i) == 3).all()
        starts.add(int(i[0]))
        for lengths in (dict(rgb=1), dict(rgb=12, flow=7), dict(flow=1, rgb=3)):
            for i, n in zip(windows(lengths, seed, frames=5, stride=7), lengths.values(), strict=True):
                assert len(i) == 5 and i.min() >= 0 and i.max() < n
    assert places == [set(range(math.floor(k * 3.5), math.ceil((k + 1) * 3.5))) for k in range(8)]
    assert starts == set(range(40 - 8 * 3 + 1))


def test_sec311_each_sampling_half_of_the_time():
    n_dense = sum(bool((np.diff(windows(dict(rgb=160), seed)[0]) == 4).all()) for seed in range(400))
    assert 160 < n_dense < 240  # four standard deviations


@pytest.mark.parametrize("mirror", [True, False])
def test_networks_see_one_crop_and_one_flip(mirror):
    """Red, the differences' red and v tell the column; u is 50 levels to the right before the flip."""
    across = torch.linspace(0, 240, 160)
    rgb = torch.zeros(2, 3, 120, 160) + across
    v = torch.zeros(5, 1, 60, 80) + across.view(-1, 2).mean(1)
    fields = torch.cat([torch.full_like(v, 178.0), v], 1)
    clips, args = [x.to(torch.uint8) for x in (fields, rgb, rgb)], Namespace(size=24)
    n_mirrored, places = 0, set()
    for seed in range(60):
        torch.manual_seed(seed)
        u, x, d = mml.train_views(clips, args, ("flow", "rgb", "diff"), mirror)
        assert x.shape == d.shape == (2, 3, 24, 24) and u.shape == (5, 2, 24, 24) and u.dtype == torch.uint8
        assert torch.equal(x, d) and (x[0, 0].int() - u[0, 1].int()).abs().max() <= 4
        is_mirrored = bool(x[0, 0, 0, 0] > x[0, 0, 0, -1])
        assert (u[:, 0] == (78 if is_mirrored else 178)).all()
        n_mirrored += is_mirrored
        places.add(tuple(sorted(x[0, 0, 0, [0, -1]].tolist())))
    assert len(places) > 15 and (15 < n_mirrored < 45 if mirror else n_mirrored == 0)


# ---- networks and what the optimiser does to them --------------------------------------------------


@pytest.mark.parametrize("name", ["tsm10", "i3d10"])
def test_every_parameter_is_in_one_group_with_its_decay(name):
    net = backbones.build(name, K, 10, width=1 / 16)
    groups = mml.parameter_groups(net, 0.03, 5.0)
    rules = {id(p): (g["weight_decay"], g.get("lr_factor", 1.0)) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(rules) == len(list(net.parameters()))
    expected = {id(net.fc.weight): (0.03, 5.0), id(net.fc.bias): (0.0, 10.0)}  # D3
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            expected[id(module.weight)] = (0.03, 1.0)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            expected |= {id(p): (0.0, 1.0) for p in module.parameters()}
    assert rules == expected


@pytest.fixture
def run(tmp_path):
    with Run("mml", tmp_path / "out", {"log_every": 1}) as run:
        yield run


def saved(path, classes=K, kind="rgb", seed=3):
    """A model.pt of a tiny network; the network."""
    recipe = mml.recipe_of(kind, parsed("--size 16 --test_size 16 --frames 2 --clips 1"), SCALE, False)
    return save_tiny_model(path, recipe, [f"class {k}" for k in range(classes)], seed=seed)


def built(run, line, classes=K):
    """{name: backbone}, their arguments, {name: factors on the rate of the classifier's weight and bias}."""
    args = parsed(f"--net tsm10 --width 0.0625 --fc_lr 5 --dropout 0.1 {line}")
    nets, builds, groups = mml.build_networks(args, classes, run)
    nets = {name: net.module.backbone for name, net in nets.items()}
    factors = {id(p): g.get("lr_factor", 1.0) for g in groups for p in g["params"]}
    assert len(factors) == sum(len(list(net.parameters())) for net in nets.values())
    of_fc = {name: tuple(factors[id(p)] for p in (net.fc.weight, net.fc.bias)) for name, net in nets.items()}
    return nets, builds, of_fc


def test_build_networks(run, tmp_path):
    source = saved(tmp_path / "a.pt")
    line = f"--nets rgb,rgb,flow,diff --init none,{tmp_path}/a.pt,{tmp_path}/a.pt,none --lam 0"
    nets, builds, factors = built(run, line)
    assert list(nets) == list(builds) == ["rgb", "rgb2", "flow", "diff"]
    assert [net.conv1.weight.shape[1] for net in nets.values()] == [3, 3, 10, 15]
    state, mean = source.state_dict(), source.conv1.weight.mean(1, keepdim=True)
    assert all(torch.equal(v, nets["rgb2"].state_dict()[k]) for k, v in state.items())
    assert torch.allclose(nets["flow"].conv1.weight, mean.expand(-1, 10, -1, -1))  # Sec. 2.1
    assert not torch.equal(nets["rgb"].layer1[0].conv1.weight, nets["diff"].layer1[0].conv1.weight)
    assert [*factors.values()] == [(5, 10), (1, 2), (1, 2), (5, 10)]  # D3: those that start afresh
    for net, build in zip(nets.values(), builds.values(), strict=True):
        again = backbones.build(**build)
        again.load_state_dict(net.state_dict())
        assert again.dropout.p == 0.1
    # D3: a classifier for other classes starts afresh, whatever the rest starts from.
    assert built(run, f"--nets flow --init {tmp_path}/a.pt", K + 2)[2] == {"flow": (5, 10)}


@pytest.mark.parametrize("line, is_refused", [
    ("rgb,rgb --init {}/a.pt", True), ("rgb,rgb --init {}/a.pt,{}/a.pt", True),
    ("rgb,flow,rgb --init {}/a.pt", True), ("rgb,flow --init {}/a.pt", False),
    ("rgb,rgb --init {}/a.pt --lam 0", False), ("rgb,rgb --init none", False),
    ("rgb,rgb --init {}/a.pt,{}/b.pt", False), ("rgb,rgb --init {}/a.pt --mutual d3d --teacher t.pt", False),
])  # fmt: skip
def test_one_network_twice_has_nothing_to_learn(line, is_refused, run, tmp_path):
    """Table 5: KL is zero otherwise; but cross-entropy, a teacher and other modalities need no second one."""
    saved(tmp_path / "a.pt")
    saved(tmp_path / "b.pt", seed=4)
    refusal = pytest.raises(UserError, match="rgb and rgb2 start as one network .*Table 5")
    with refusal if is_refused else nullcontext():
        built(run, f"--nets {line.replace('{}', str(tmp_path))}")


def test_network_gives_logits_and_the_last_stage():
    net = mml.Network(backbones.build("tsm10", K, 3, width=1 / 16)).eval()
    x = random(2, 3, 4, 32, 32, scale=1.0)
    logits, f = net(x)
    assert torch.equal(logits, net.backbone(x)) and torch.equal(f, net.backbone.features(x)[-1])


# ---- videos of a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos of nine PNG pictures."""
    root = tmp_path_factory.mktemp("videos")
    for v in range(6):
        picture_folder(root / f"v{v}", pixels(9, 16, 20, 3, seed=v))
    return root


@pytest.fixture(scope="module")
def fields(folder):
    """A folder with the flow of `folder`; the bytes of field i of a video are 10 i."""
    root = folder.parent / f"{folder.name}_flow"
    root.mkdir()
    for v in range(6):
        write_flow(root / f"v{v}.mp4", (10 * torch.arange(8).byte()).view(8, 1, 1, 1).expand(8, 2, 16, 20))
    return str(root)


def data_of(folder, n_train=3, K=3):
    train, test = (Videos.make(folder, [f"v{v}" for v in range(n)], np.arange(n) % K) for n in (n_train, 6))
    return Data("set", 1, tuple(f"class {k}" for k in range(K)), train, test, False, True, ())


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_eval_tests_one_model(folder, run, tmp_path, average):
    net, data = saved(tmp_path / "a.pt", 3, "diff"), data_of(folder)
    line = f"--eval {tmp_path}/a.pt --clips 1 --uniform 1 --workers 0 --average {average}"
    mml.test_only(parsed(line), data, run)
    recipe = replace(load_model(tmp_path / "a.pt")[3], clips=1, uniform=1)
    views = Views(data.test, recipe.sample, recipe.view, recipe.short_side, recipe.open)
    with torch.no_grad():
        x = torch.stack([net(recipe.to_input(views[i]["views"], "cpu")) for i in range(6)])  # (N, V, K)
    p = x.mean(1) if average == "logits" else x.softmax(2).mean(1)
    top1 = 100 * (p.argmax(1).numpy() == data.test.labels).mean()
    assert json.loads((run.out / "result.json").read_text())["top1"] == pytest.approx(top1)


@pytest.mark.parametrize("of_eval", [True, False])
def test_flow_of_another_bound_is_refused(of_eval, folder, run, tmp_path):
    saved(tmp_path / "a.pt", 3, "flow")
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "flow.json").write_text('{"bound": 10.0}')
    line = f"--workers 0 --flow {tmp_path}/flow {'--eval' if of_eval else '--teacher'} {tmp_path}/a.pt"
    with pytest.raises(UserError, match=r"a.pt wants flow of bound .*20.0, 256.*10.0, 256"):
        if of_eval:
            mml.test_only(parsed(line), data_of(folder), run)
        else:
            trained(f"--nets rgb --mutual d3d {line}", folder, run)


# ---- a training run --------------------------------------------------------------------------------


SHORT = ("--data ssv2 --net tsm10 --width 0.0625 --size 16 --test_size 16 --frames 2 --stride 1 --batch 2 "
         "--workers 0 --clips 1 --uniform 1 --epochs 2 --eval_every 1 --init none --dropout 0")  # fmt: skip


def trained(line, folder, run, **replaced):
    """Train on data_of(folder), 3 videos and so 2 steps an epoch. Returns the rows of the log.

    replaced: functions of mml.py that stand in for its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mml, "load_data", lambda *_: data_of(folder))
        for name, function in replaced.items():
            patch.setattr(mml, name, function)
        mml.train(parsed(f"{SHORT} {line}"), run)
    return [json.loads(row) for row in (run.out / "log.jsonl").read_text().splitlines()]


def test_each_network_sees_the_same_moment(folder, fields, run):
    """In its own modality and normalisation: xi is one number for a clip, and both are of one video."""
    counts, kinds, train_step = Counter(), ("diff", "flow", "rgb"), mml.train_step
    frames = [read_frames(str(folder / f"v{v}"), range(9)) for v in range(6)]
    rgb = mml.recipe_of("rgb", parsed(SHORT), SCALE, False)

    def spy(nets, x, y, args, teacher):
        assert list(x) == list(nets) == list(kinds) and teacher is None
        for b in range(len(y)):
            i = ((x["flow"][b, ::2, :, 0, 0] * 0.226 + 0.5) * 25.5).round().int()  # (5, T) fields
            assert (i[1:] - i[:1] == torch.arange(1, 5).view(4, 1)).all()
            first = x["diff"][b, :3].transpose(0, 1) * 255  # (T, 3, H, W), of the frames from i_t on
            gaps = [(first - f[i[0] + 1].float() + f[i[0]]).abs().max() for f in frames]
            assert [v for v in range(6) if gaps[v] < 0.01] == [int(y[b])]  # of the video with this label
            x_all = rgb.to_input(frames[int(y[b])][None], "cpu")[0]
            (xi,) = [n for n in range(6) if torch.allclose(x["rgb"][b], x_all[:, i[0] + n], atol=1e-5)]
            counts[xi] += 1
        return train_step(nets, x, y, args, teacher)

    line = f"--nets diff,flow,rgb --flow {fields} --epochs 8 --eval_every 100"
    rows = trained(line, folder, run, train_step=spy, train_views=lambda clips, **_: tuple(clips))
    assert set(counts) == set(range(6)) and counts.total() == 32  # 9 frames, 4 input frames of the others
    names = {f"loss_{term}_{net}" for term in ("c", "kl") for net in kinds}
    assert names | {"loss", "agree", "lr"} <= set(rows[0])
    result = json.loads((run.out / "result.json").read_text())
    assert {"top1", "flow_top1", "rgb_top1"} <= set(result) and "diff_top1" not in result
    for file, kind in (("model", "diff"), ("flow", "flow"), ("rgb", "rgb")):
        assert load_model(run.out / f"{file}.pt")[3].modality == kind


def test_a_run_follows_its_schedule_and_clips_gradients(folder, run, monkeypatch):
    """D2: 2 clips have 1 / 8 of the rate for 16. D3: each network's gradient has at most the norm given."""
    norms, recipes, score = [], [], evaluate.score

    def spied(optimizer, *_):
        gradients = [torch.cat([p.grad.flatten() for p in g["params"]]) for g in optimizer.param_groups]
        norms.extend([torch.cat(gradients[:4]).norm().item(), torch.cat(gradients[4:]).norm().item()])

    def scored(net, videos, recipe, *args, **kwargs):
        recipes.append((recipe.modality, recipe.clips, recipe.uniform, recipe.crops, recipe.size))
        return score(net, videos, recipe, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spied)
    monkeypatch.setattr(evaluate, "score", scored)
    line = ("--nets rgb,diff --lr 0.8 --lr_batch 16 --lr_steps 1 --fc_lr 5 --clip_grad 1e-3 --crops 3 "
            "--test_size 20")  # fmt: skip
    rows = [row for row in trained(line, folder, run) if "lr" in row]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.01, 0.01])  # epochs of 2 steps
    assert norms == pytest.approx([1e-3] * 8, rel=1e-3)
    quick = [("rgb", 0, 1, 1, 16), ("diff", 0, 1, 1, 16)]  # Sec. 3.1.1: one uniform clip, the training crop
    assert recipes == quick + quick + [("rgb", 1, 1, 3, 20), ("diff", 1, 1, 3, 20)]


@pytest.mark.parametrize("mutual", ["mars", "d3d"])
def test_a_run_with_a_teacher(mutual, folder, fields, run, tmp_path):
    net = saved(tmp_path / "teacher.pt", 3, "flow")
    inputs, train_step = [], mml.train_step

    def spy(nets, x, y, args, teacher):
        inputs.append((list(nets), list(x), teacher[0].modality, teacher[1].training))
        for p, q in zip(net.parameters(), teacher[1].parameters(), strict=True):
            assert torch.equal(p, q) and not q.requires_grad
        return train_step(nets, x, y, args, teacher)

    line = f"--nets rgb --mutual {mutual} --teacher {tmp_path}/teacher.pt --flow {fields} --epochs 1"
    row = trained(line, folder, run, train_step=spy)[0]
    assert inputs == [(["rgb"], ["rgb", "flow"], "flow", False)] * 2
    total = row["loss_c_rgb"] + mml.LAM[mutual] * row[f"loss_{mutual}_rgb"]
    assert row["loss"] == pytest.approx(total, rel=1e-3)


def test_mars_needs_a_teacher_with_feature_maps_of_the_same_size(folder, run, tmp_path):
    saved(tmp_path / "teacher.pt", 3)
    with pytest.raises(UserError, match="teacher.pt"):
        trained(f"--nets rgb --mutual mars --teacher {tmp_path}/teacher.pt --width 0.125", folder, run)


# ---- command line ----------------------------------------------------------------------------------


SSV2 = dict(
    net="tsm50", init="imagenet", frames=8, stride=4, sampling="both", ratio=1.0, batch=8, lr_batch=64,
    lr=0.025, epochs=50, lr_steps=[20, 40], optimizer="sgd", weight_decay=1e-4, dropout=0.5, clip_grad=20,
    fc_lr=5, size=224, clips=1, uniform=2, crops=1, test_size=256, test_crop=None, average="logits",
    nets="rgb,flow", mutual="kl", lam=1.0, mean="probs",
)  # fmt: skip
CHARADES = dict(
    net="i3d50", frames=16, stride=8, sampling="dense", batch=2, lr_batch=16, lr=0.0375, epochs=57,
    lr_steps=[41, 49], fc_lr=1, clip_grad=0, clips=10, uniform=0, crops=3,
)  # fmt: skip


@pytest.mark.parametrize("line, values", [
    ("--data ssv2", SSV2), ("--data charades", SSV2 | CHARADES),
    ("--data toy:multi", dict(net="tsm10", ratio=0.1)),
    ("--data WEIZMANN --recipe small", dict(net="tsm10", size=64, test_size=64, per_class=6)),
    ("--seed 3", dict(label_seed=3)), ("--seed 3 --label_seed 5", dict(seed=3, label_seed=5)),
    # Appendix 2's weights, but D3D's on the toy set (D10).
    ("--lam 0", dict(lam=0.0)), ("--mutual mars --teacher t.pt --lam 3", dict(lam=3.0)),
    ("--mutual mars --teacher t.pt", dict(lam=50.0)), ("--mutual d3d --teacher t.pt", dict(lam=0.001)),
    ("--mutual d3d --teacher t.pt --data ssv2", dict(lam=1.0)),
    ("--mutual d3d --teacher t.pt --data toy:multi", dict(lam=1.0)),
    ("--nets rgb,rgb --init a.pt,none", dict(init="a.pt,none")), ("--lr_steps", dict(lr_steps=[])),
    ("--pipeline --nets rgb,flow,diff --init a.pt,b.pt", dict(init="a.pt,b.pt")),
])  # fmt: skip
def test_recipes_are_the_papers(line, values):
    assert {flag: getattr(parsed(line), flag) for flag in values} == values


def test_recipes_of_tests():
    recipe = mml.recipe_of("flow", parsed("--data ssv2"), (9.0, 100), True)
    own = dict(spread="parts", modality="flow", bound=9.0, flow_side=100, multilabel=True)
    views = dict(uniform=2, average="logits", mean=(0.5,), std=(0.226,))
    assert recipe == Recipe(8, 4, 1, 1, 256, 256, **own, **views)
    args = parsed("--data ssv2 --clips 0 --uniform 1 --test_crop 224")  # Sec. 3.1.1
    diff, rgb = (mml.recipe_of(kind, args, SCALE, False) for kind in ("diff", "rgb"))
    assert (rgb.short_side, rgb.size, rgb.views) == (256, 224, 1)
    assert (diff.mean, diff.std, rgb.mean) == ((0.0,), (1.0,), (0.485, 0.456, 0.406))


@pytest.mark.parametrize("line, word", [
    ("--nets field", "--nets lists rgb, flow, diff"), ("--nets rgb2", "--nets"),
    ("--nets rgb,flow --init a.pt,b.pt,c.pt", "--init a.pt,b.pt,c.pt is not one start for each of 2"),
    ("--pipeline --nets rgb,flow,diff --init a.pt,b.pt,c.pt", "--init"), ("--mutual mars", "--teacher"),
    ("--test_crop 224 --crops 3", "--test_crop"), ("--teacher t.pt", "--teacher"),
    ("--pipeline --eval a.pt", "--pipeline"), ("--pipeline --mutual d3d --teacher t.pt", "--pipeline"),
    ("--pipeline --nets rgb,rgb", "--pipeline"), ("--lam -1", "--lam"), ("--batch 0", "--batch"),
    ("--frames 0", "--frames"), ("--stride 0", "--stride"), ("--uniform -1", "--uniform"),
    ("--clips 0 --uniform 0", "--clips"), ("--lr inf", "--lr"), ("--fc_lr -2", "--fc_lr"),
    ("--clip_grad nan", "--clip_grad"), ("--test_crop -5", "--test_crop"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit, match=rf"^mml: .*{word}.* \(2\)$"):
        parsed(line)


# ---- the pipeline ----------------------------------------------------------------------------------


def test_fig1_pipeline(monkeypatch):
    """Its folder may have any name."""
    steps = []
    monkeypatch.setattr(mml, "one_run", lambda args, free=(): steps.append(args) or True)
    mml.pipeline(parsed("--pipeline --nets rgb,flow,diff --out a,b --seed 4 --init c.pt,d.pt"))
    table = [(args.out, args.nets, args.lam, args.seed, mml.starts_of(args, args.nets.split(",")))
             for args in steps]  # fmt: skip
    assert table == [
        ("a,b/1_ce", "rgb", 0, 4, ["c.pt"]), ("a,b/1_ce2", "rgb", 0, 1004, ["d.pt"]),
        ("a,b/2_ml", "rgb,rgb", 1, 4, ["a,b/1_ce/model.pt", "a,b/1_ce2/model.pt"]),
        ("a,b/3_mml", "rgb,flow,diff", 1, 4, ["a,b/2_ml/model.pt"] * 3),
    ]  # fmt: skip
    assert {args.label_seed for args in steps} == {4}


def test_step_1_is_two_independent_trainings_that_resume(folder, tmp_path, monkeypatch):
    """Starts, batches and crops differ, labelled videos do not; stopped in the second, it ends the same."""
    data, steps, train_step, stop = data_of(folder, 6), [], mml.train_step, 0

    def spy(nets, x, y, args, teacher):
        steps.append((args.out.rsplit("/", 1)[1], x["rgb"], nets["rgb"].module.backbone.conv1.weight.clone()))
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(nets, x, y, args, teacher)

    monkeypatch.setattr(mml, "load_data", lambda *_: data)
    monkeypatch.setattr(mml, "train_step", spy)
    line = f"{SHORT} --pipeline --nets rgb,diff --per_class 1 --out {tmp_path}"
    mml.pipeline(parsed(f"{line}/a"))
    assert [folder for folder, *_ in steps] == ["1_ce"] * 4 + ["1_ce2"] * 4 + ["2_ml"] * 4 + ["3_mml"] * 4
    assert not torch.equal(steps[0][1], steps[4][1]) and not torch.equal(steps[0][2], steps[4][2])
    runs = [tmp_path / "a" / step for step in ("1_ce", "1_ce2", "2_ml")]
    chosen = [list(labelled_subset(data, None, 1, seed, None)) for seed in (0, 1000)]
    assert len({(out / "labelled.txt").read_text() for out in runs}) == 1 and chosen[0] != chosen[1]
    first, second, _ = (json.loads((out / "result.json").read_text()) for out in runs)
    assert (first["seed"], second["seed"], second["label_seed"]) == (0, 1000, 0) and "label_seed" not in first

    steps.clear()
    stop = 4 + 2
    mml.pipeline(parsed(f"{line}/b"))
    assert len(steps) == stop and not (tmp_path / "b" / "2_ml").exists()
    mml.pipeline(parsed(f"{line}/b"))
    assert len(steps) == 4 * 4  # the first step is not trained again
    for file in ("1_ce/model.pt", "1_ce2/model.pt", "2_ml/rgb2.pt", "3_mml/model.pt", "3_mml/diff.pt"):
        a, b = (digest_of_model(load_model(tmp_path / out / file)[0]) for out in "ab")
        assert a == b

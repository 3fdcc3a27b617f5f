"""The equations of mml.py (a value by hand, a plain loop from the paper, where gradients go), its clips, what
its optimiser does to which parameter, and its command line."""

import json
import math
import os
import signal
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import mml
from common import backbones, evaluate
from common.clips import Views, uniform
from common.data import Data, Videos, labelled_subset
from common.errors import UserError
from common.io.decode import read_frames
from common.io.flow import BOUND, SHORT_SIDE, write_flow
from common.io.models import digest_of_model, load_model, save_model
from common.modality import Recipe
from common.run import Run

pytestmark = pytest.mark.usefixtures("leave")


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def several(B, K, seed=0):
    """Labels (B, K) of multi-label data."""
    return (torch.rand(B, K, generator=torch.Generator().manual_seed(seed)) < 0.4).float()


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def sigmoid(row):
    return [1 / (1 + math.exp(-v)) for v in row]


# ---- L_CE and L_mlBCE ------------------------------------------------------------------------------


def naive_classification(logits, y):
    """Appendix 2: L_CE of classes (B,), L_mlBCE of (B, K) zeros and ones."""
    total = 0.0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        if isinstance(label, int):
            total -= math.log(softmax(row)[label])
        else:
            for p, one in zip(sigmoid(row), label, strict=True):
                total -= (one * math.log(p) + (1 - one) * math.log(1 - p)) / len(row)
    return total / len(logits)


def test_classification_loss_known_values():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # softmax (1/4, 3/4), (1/2, 1/2)
    by_hand = (math.log(4 / 3) + math.log(2)) / 2
    assert mml.classification_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(by_hand, abs=1e-6)
    # sigmoid (1/2, 3/4), (1/2, 1/2), of which 1/2, 1/4 and 1/2, 1/2 are right: over 2 clips and 2 classes.
    by_hand = (math.log(2) + math.log(4) + math.log(2) + math.log(2)) / 4
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert mml.classification_loss(logits, y).item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("y", [torch.arange(9) % 5, several(9, 5)], ids=["ce", "bce"])
def test_classification_loss_matches_naive_loop(y):
    logits = random(9, 5)
    naive = naive_classification(logits, y)
    assert mml.classification_loss(logits, y).item() == pytest.approx(naive, rel=1e-5)
    loss = mml.classification_loss(logits.bfloat16(), y)  # autocast's
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(naive, rel=0.02)


# ---- Eq. 3: KL -------------------------------------------------------------------------------------


def naive_kl(p, logits, multilabel):
    """Eq. 3 with p_i = p, p_j of the logits, over B; with several labels over B N, a class two outcomes."""
    total = 0.0
    for ps, row in zip(p.tolist(), logits.tolist(), strict=True):
        if multilabel:
            outcomes = [(a, b) for p, q in zip(ps, sigmoid(row), strict=True)
                        for a, b in ((p, q), (1 - p, 1 - q))]  # fmt: skip
            total += sum(a * math.log(a / b) for a, b in outcomes if a > 0) / len(row)
        else:
            total += sum(a * math.log(a / b) for a, b in zip(ps, softmax(row), strict=True) if a > 0)
    return total / len(p)


def test_eq3_known_value():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3, and 0 for the second clip.
    p, logits = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.0, math.log(3.0)], [7.0, 7.0]])
    assert mml.kl_loss(p, logits).item() == pytest.approx(math.log(4 / 3) / 4, abs=1e-6)


def test_eq3_of_several_labels_known_value():
    # Coins: 1/2 against 1/4 gives 1/2 log 4/3, 1 against 3/4 gives log 4/3; over 1 clip and 2 classes.
    logits = torch.tensor([[-math.log(3.0), math.log(3.0)]])
    found = mml.kl_loss(torch.tensor([[0.5, 1.0]]), logits, multilabel=True)
    assert found.item() == pytest.approx(0.75 * math.log(4 / 3), abs=1e-6)


@pytest.mark.parametrize("multilabel", [False, True])
def test_eq3_matches_naive_loop_with_gradient_into_own_logits_alone(multilabel):
    other, own = random(8, 6, seed=1).requires_grad_(), random(8, 6, seed=2).requires_grad_()
    p = other.sigmoid() if multilabel else other.softmax(1)
    loss = mml.kl_loss(p, own, multilabel)
    assert loss.item() == pytest.approx(naive_kl(p, own, multilabel), rel=1e-5)
    loss.backward()
    assert other.grad is None
    # d KL / d logits = (q - p) / B for softmax, (q - p) / (B K) for sigmoids.
    q = own.sigmoid() if multilabel else own.softmax(1)
    assert torch.allclose(own.grad, (q - p).detach() / (48 if multilabel else 8), atol=1e-6)
    assert mml.kl_loss(p, own.bfloat16(), multilabel).dtype == torch.float32


@pytest.mark.parametrize("multilabel", [False, True])
def test_eq3_is_zero_for_equals_and_never_negative(multilabel):
    squash = torch.sigmoid if multilabel else lambda x: x.softmax(1)
    for seed in range(40):
        a, b = random(5, 4, seed=seed, scale=8.0), random(5, 4, seed=seed + 100, scale=8.0)
        assert mml.kl_loss(squash(a), a, multilabel).item() == pytest.approx(0, abs=1e-6)
        assert mml.kl_loss(squash(a), b, multilabel).item() > 0


@pytest.mark.parametrize("multilabel", [False, True])
def test_eq3_is_finite_where_probabilities_are_0_and_1(multilabel):
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for logits in (torch.zeros(2, 2), torch.tensor([[400.0, -400.0], [-400.0, 400.0]])):
        logits.requires_grad_()
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


def test_eq4_known_values():
    p = mml.mean_of_others(THREE, "rgb", "probs")
    assert p[0].tolist() == pytest.approx([13 / 32, 11 / 32, 8 / 32], abs=1e-6)
    p = mml.mean_of_others(THREE, "rgb", "logits")
    assert p[0].tolist() == pytest.approx([r / sum(ROOTS) for r in ROOTS], abs=1e-6)
    # Several labels: sigmoids 3/4 and 1/4 are 1/2 in the mean, 9/10 and 1/2 are 7/10; of logits 1/2, 3/4.
    logits = {"rgb": torch.zeros(1, 2), "flow": torch.tensor([[3.0, 9.0]]).log(),
              "diff": torch.tensor([[1 / 3, 1.0]]).log()}  # fmt: skip
    assert mml.mean_of_others(logits, "rgb", "probs", True)[0].tolist() == pytest.approx([0.5, 0.7], abs=1e-6)
    assert mml.mean_of_others(logits, "rgb", "logits", True)[0].tolist() == pytest.approx([0.5, 0.75])


def naive_target(logits, net, mean, multilabel):
    """Eq. 4: sum over j != i of p_j, by M - 1; or the probabilities of that mean of the logits."""
    others = [x.tolist() for name, x in logits.items() if name != net]
    squash = sigmoid if multilabel else softmax
    rows = []
    for clip in zip(*others, strict=True):
        if mean == "probs":
            rows.append([sum(p) / len(others) for p in zip(*map(squash, clip), strict=True)])
        else:
            rows.append(squash([sum(x) / len(others) for x in zip(*clip, strict=True)]))
    return torch.tensor(rows)


NAMES = ["rgb", "flow", "diff", "rgb2"]


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("mean", ["probs", "logits"])
@pytest.mark.parametrize("M", [2, 3, 4])
def test_eq4_matches_naive_loop_and_is_detached(M, mean, multilabel):
    logits = {net: random(7, 5, seed=i).requires_grad_() for i, net in enumerate(NAMES[:M])}
    for net in logits:
        p = mml.mean_of_others(logits, net, mean, multilabel)
        assert torch.allclose(p, naive_target(logits, net, mean, multilabel), atol=1e-6)
        assert not p.requires_grad
        assert multilabel or torch.allclose(p.sum(1), torch.ones(7))
    half = {net: x.bfloat16() for net, x in logits.items()}
    assert mml.mean_of_others(half, "rgb", mean, multilabel).dtype == torch.float32


def test_eq1_eq2_the_target_is_the_other_network():
    """With M = 2 Eq. 4 is Eq. 1 and 2, whatever the mean."""
    logits = {"rgb": random(4, 3, seed=1), "rgb2": random(4, 3, seed=2)}
    for mean in ("probs", "logits"):
        assert torch.allclose(mml.mean_of_others(logits, "rgb", mean), logits["rgb2"].softmax(1))
        assert torch.allclose(mml.mean_of_others(logits, "rgb2", mean), logits["rgb"].softmax(1))


# ---- MARS and D3D ----------------------------------------------------------------------------------


def naive_mars(f, teacher, divisor):
    pairs = list(zip(f.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs) / divisor


def naive_d3d(logits, teacher, divisor):
    rows = zip(logits.tolist(), teacher.tolist(), strict=True)
    return sum(sum((a - b) ** 2 for a, b in zip(*row, strict=True)) for row in rows) / len(logits) / divisor


def test_mars_and_d3d_known_values():
    f = torch.zeros(2, 1, 1, 1, 2)
    f[0, ..., 0], f[1, ..., 1] = 3.0, 1.0  # squares 9, 0, 0, 1
    assert mml.mars_loss(f, torch.zeros_like(f)).item() == 2.5
    assert mml.mars_loss(f, torch.zeros_like(f), 5).item() == 0.5
    logits = torch.tensor([[1.0, 2.0, 2.0], [1.0, 0.0, 0.0]])  # squared lengths 9 and 1
    assert mml.d3d_loss(logits, torch.zeros(2, 3)).item() == 5.0
    assert mml.d3d_loss(logits, torch.zeros(2, 3), 4).item() == 1.25
    assert mml.LAM == {"kl": 1.0, "mars": 50.0, "d3d": 1.0}  # Appendix 2; Eq. 1


@pytest.mark.parametrize("loss, naive, shape", [
    (mml.mars_loss, naive_mars, (3, 4, 2, 3, 2)), (mml.d3d_loss, naive_d3d, (3, 7)),
], ids=["mars", "d3d"])  # fmt: skip
@pytest.mark.parametrize("divisor", [1, 7])
def test_mars_and_d3d_match_naive_loops_with_the_teacher_detached(loss, naive, shape, divisor):
    x, teacher = random(*shape, seed=1).requires_grad_(), random(*shape, seed=2).requires_grad_()
    found = loss(x, teacher, divisor)
    assert found.item() == pytest.approx(naive(x, teacher, divisor), rel=1e-5)
    found.backward()
    assert x.grad.any() and teacher.grad is None
    assert loss(x.bfloat16(), teacher.bfloat16(), divisor).dtype == torch.float32


# ---- a step ----------------------------------------------------------------------------------------

B, K = 6, 5
INPUTS = {"rgb": 3, "flow": 10, "diff": 15}


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


def tiny(names):
    return {name: Tiny(INPUTS[name.rstrip("2")], seed) for seed, name in enumerate(names)}


def frozen(net, kind="flow"):
    """What load_teacher gives."""
    return Recipe(2, 1, modality=kind), net


def step(nets, mutual="kl", lam=1.0, mean="probs", multilabel=False, teacher=None):
    x = {kind: random(B, n, 2, 3, 3, seed=n, scale=1.0) for kind, n in INPUTS.items()}
    y = several(B, K) if multilabel else torch.arange(B) % K
    args = Namespace(mutual=mutual, lam=lam, mean=mean)
    return x, y, mml.train_step(nets, x, y, args, teacher)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("mutual, mean", [("kl", "probs"), ("kl", "logits"), ("mars", ""), ("d3d", "")])
@pytest.mark.parametrize("names", [["flow"], ["rgb", "rgb2"], ["rgb", "flow", "diff"]], ids=len)
@torch.no_grad()
def test_step_is_the_sum_of_its_parts(names, mutual, mean, multilabel):
    nets, teacher = tiny(names), frozen(Tiny(10, 7)) if mutual != "kl" else None
    x, y, (loss, terms, logits) = step(nets, mutual, 0.7, mean, multilabel, teacher)
    assert all(net.calls == 1 for net in nets.values())
    out = {name: net(x[name.rstrip("2")]) for name, net in nets.items()}
    by_hand, divisor = {}, K if multilabel else 1
    for name, (own, f) in out.items():
        by_hand[f"loss_c_{name}"] = naive_classification(own, y)
        if mutual == "kl" and len(names) > 1:
            target = naive_target({k: v[0] for k, v in out.items()}, name, mean, multilabel)
            by_hand[f"loss_kl_{name}"] = naive_kl(target, own, multilabel)
        elif mutual == "mars":
            by_hand[f"loss_mars_{name}"] = naive_mars(f, teacher[1](x["flow"])[1], divisor)
        elif mutual == "d3d":
            by_hand[f"loss_d3d_{name}"] = naive_d3d(own, teacher[1](x["flow"])[0], divisor)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(by_hand, rel=1e-4)
    total = sum(v * (1 if k.startswith("loss_c_") else 0.7) for k, v in by_hand.items())
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert list(logits) == names and all(torch.equal(logits[k], out[k][0]) for k in names)


def gradients(net):
    """A copy of them, flat; they are then cleared."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return torch.cat([g.flatten() for g in parts])


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("mean", ["probs", "logits"])
@pytest.mark.parametrize("names", [["rgb", "flow"], ["rgb", "flow", "diff"]], ids=len)
def test_eq1_trains_the_first_network_alone(names, mean, multilabel):
    nets, own = tiny(names), {}
    for name in names:
        _, _, (_, terms, _) = step(nets, "kl", 1.0, mean, multilabel)
        (terms[f"loss_c_{name}"] + terms[f"loss_kl_{name}"]).backward()  # L_i
        found = {k: gradients(net) for k, net in nets.items()}
        own[name] = found.pop(name)
        assert own[name].any() and not any(g.any() for g in found.values())
    step(nets, "kl", 1.0, mean, multilabel)[2][0].backward()  # and the loss of a step is all of them
    assert all(torch.allclose(gradients(nets[name]), own[name], atol=1e-6) for name in names)


@pytest.mark.parametrize("mutual", ["mars", "d3d"])
def test_the_teacher_learns_nothing(mutual):
    nets, teacher = tiny(["rgb", "diff"]), Tiny(10, 7)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    _, _, (loss, terms, _) = step(nets, mutual, 2.0, teacher=frozen(teacher))
    terms[f"loss_{mutual}_rgb"].backward(retain_graph=True)
    assert gradients(nets["rgb"]).any() and not gradients(nets["diff"]).any()
    assert bool(nets["rgb"].fc.weight.requires_grad)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_eq1_known_value():
    assert mml.network_loss(2.0, 3.0, 1.0) == 5.0 and mml.network_loss(2.0, 3.0, 50.0) == 152.0


@pytest.mark.parametrize("mutual", ["kl", "mars", "d3d"])
def test_lam_0_is_cross_entropy_alone(mutual):
    nets = tiny(["rgb", "flow"])
    _, y, (loss, terms, logits) = step(nets, mutual, 0.0, teacher=frozen(Tiny(10, 7)))
    assert loss.item() == pytest.approx(sum(naive_classification(x, y) for x in logits.values()), rel=1e-5)
    assert terms[f"loss_{mutual}_rgb"] > 0  # reported all the same
    loss.backward(retain_graph=True)
    found = gradients(nets["flow"])
    terms["loss_c_flow"].backward()
    assert torch.allclose(gradients(nets["flow"]), found, atol=1e-7)


def test_agreement_by_hand():
    say = {"rgb": [0, 1, 2, 2], "flow": [0, 1, 1, 2], "diff": [0, 2, 2, 2]}
    logits = {net: torch.eye(3)[torch.tensor(y)] for net, y in say.items()}
    assert mml.agreement(logits).item() == 0.5
    del logits["diff"]
    assert mml.agreement(logits).item() == 0.75 and mml.agreement({"rgb": logits["rgb"]}).item() == 1


# ---- frames and crops ------------------------------------------------------------------------------


def windows(lengths, seed, sampling="both", frames=8, stride=4):
    args = Namespace(sampling=sampling, frames=frames, stride=stride)
    return mml.windows(SimpleNamespace(lengths=lengths), np.random.default_rng(seed), args)


@pytest.mark.parametrize("sampling", ["both", "uniform", "dense"])
def test_sec23_xi_is_one_of_0_to_N_minus_n_for_a_whole_clip(sampling):
    found, N, n = Counter(), 65, 60
    for seed in range(900):
        rgb, flow_, diff = windows(dict(rgb=N, flow=n, diff=n), seed, sampling)
        assert np.array_equal(flow_, diff) and 0 <= flow_.min() and flow_.max() < n and rgb.max() < N
        assert len(set(rgb - flow_)) == 1
        found[int((rgb - flow_)[0])] += 1
    assert set(found) == set(range(N - n + 1)) and min(found.values()) > 100  # of 150 expected


@pytest.mark.parametrize("lengths", [dict(rgb=40), dict(flow=40, diff=40)])
def test_sec23_without_more_frames_xi_is_0(lengths):
    for seed in range(60):
        found = windows(lengths, seed, "uniform")
        assert len(found) == len(lengths)
        assert all(np.array_equal(i, uniform(40, 8, np.random.default_rng(seed))) for i in found)
    starts = {int(i[0]) for seed in range(200) for i in windows(lengths, seed, "dense")}
    assert starts == set(range(40 - 8 * 4 + 1))


def test_sec311_uniform_takes_a_frame_of_each_part_dense_every_fourth():
    met = [set() for _ in range(8)]
    for seed in range(200):
        (i,) = windows(dict(rgb=28), seed, "uniform")
        for k in range(8):
            assert math.floor(k * 28 / 8) <= i[k] < math.ceil((k + 1) * 28 / 8)
            met[k].add(int(i[k]))
        (i,) = windows(dict(rgb=70), seed, "dense")
        assert (np.diff(i) == 4).all() and 0 <= i[0] and i[-1] < 70
        (i,) = windows(dict(rgb=70), seed, "dense", frames=5, stride=7)
        assert len(i) == 5 and (np.diff(i) == 7).all()
    assert met == [set(range(math.floor(k * 3.5), math.ceil((k + 1) * 3.5))) for k in range(8)]


def test_sec311_each_sampling_half_of_the_time():
    dense = sum(bool((np.diff(windows(dict(rgb=160), seed)[0]) == 4).all()) for seed in range(400))
    assert 160 < dense < 240  # four standard deviations


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_windows_of_short_videos_stay_inside(n):
    for seed in range(40):
        for lengths in (dict(rgb=n), dict(rgb=n + 5, flow=n), dict(flow=1, rgb=n)):
            found = windows(lengths, seed)
            assert all(i.min() >= 0 and i.max() < m for i, m in zip(found, lengths.values(), strict=True))


@pytest.mark.parametrize("mirror", [True, False])
def test_networks_see_one_crop_and_one_flip(mirror):
    """Red, the differences' red and v tell the column; u is 50 levels to the right before the flip."""
    across = torch.linspace(0, 240, 160)
    rgb = torch.zeros(2, 3, 120, 160) + across
    v = torch.zeros(5, 1, 60, 80) + across.view(-1, 2).mean(1)
    fields = torch.cat([torch.full_like(v, 178.0), v], 1)
    clips, args = [x.to(torch.uint8) for x in (fields, rgb, rgb)], Namespace(size=24, flip=mirror)
    mirrored, places = 0, set()
    for seed in range(60):
        torch.manual_seed(seed)
        u, x, d = mml.train_views(clips, args, ("flow", "rgb", "diff"))
        assert x.shape == d.shape == (2, 3, 24, 24) and u.shape == (5, 2, 24, 24) and u.dtype == torch.uint8
        assert torch.equal(x, d) and (x[0, 0].int() - u[0, 1].int()).abs().max() <= 4
        flipped = bool(x[0, 0, 0, 0] > x[0, 0, 0, -1])
        assert (u[:, 0] == (78 if flipped else 178)).all()
        mirrored += flipped
        places.add(tuple(sorted(x[0, 0, 0, [0, -1]].tolist())))
    assert len(places) > 15 and (15 < mirrored < 45 if mirror else mirrored == 0)


# ---- networks and what the optimiser does to them --------------------------------------------------


def test_names_of_networks():
    assert mml.names_of(["rgb", "flow", "rgb", "rgb"]) == ["rgb", "flow", "rgb2", "rgb3"]
    assert mml.names_of(["diff"]) == ["diff"]
    assert [mml.modality_of(net) for net in ("rgb", "rgb2", "flow12")] == ["rgb", "rgb", "flow"]


@pytest.mark.parametrize("name", ["tsm10", "tsm50", "i3d10", "r3d_10"])
def test_every_parameter_is_in_one_group_with_its_decay(name):
    net = backbones.build(name, K, 10, width=1 / 16)
    groups = mml.parameter_groups(net, 0.03, 5.0)
    found = {id(p): (g["weight_decay"], g.get("lr_factor", 1.0)) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(list(net.parameters()))
    expected = {id(net.fc.weight): (0.03, 5.0), id(net.fc.bias): (0.0, 10.0)}  # D3
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            assert module.bias is None
            expected[id(module.weight)] = (0.03, 1.0)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            expected |= {id(p): (0.0, 1.0) for p in module.parameters()}
    assert found == expected


@pytest.fixture
def run(tmp_path):
    with Run("mml", tmp_path / "out", {}, log_every=1) as run:
        yield run
    if dist.is_initialized():
        dist.destroy_process_group()


def saved(path, classes=K, kind="rgb", seed=3):
    """A model.pt of a tiny network; the network."""
    torch.manual_seed(seed)
    build = dict(name="tsm10", classes=classes, in_channels=mml.MODALITIES[kind].channels, width=1 / 16)
    net = backbones.build(**build)
    nn.init.normal_(net.fc.weight, std=2.0)
    recipe = mml.recipe_of(kind, parsed("--size 16 --test_size 16 --frames 2 --clips 1"), SCALE, False)
    save_model(path, net, build, [f"class {k}" for k in range(classes)], recipe)
    return net.eval()


SCALE = BOUND, SHORT_SIDE


def lr_factors(net, groups):
    """Of the classifier's weight and bias."""
    by_id = {id(p): g.get("lr_factor", 1.0) for g in groups for p in g["params"]}
    return by_id[id(net.fc.weight)], by_id[id(net.fc.bias)]


def test_build_networks(run, tmp_path):
    source = saved(tmp_path / "model.pt")
    args = parsed(f"--nets rgb,rgb,flow,diff --init none,{tmp_path}/model.pt,{tmp_path}/model.pt,none "
                  "--net tsm10 --width 0.0625 --fc_lr 5 --lam 0 --dropout 0.1")  # fmt: skip
    nets, builds, groups = mml.build_networks(args, K, run)
    nets = {name: net.module.backbone for name, net in nets.items()}
    assert list(nets) == list(builds) == ["rgb", "rgb2", "flow", "diff"]
    assert [net.conv1.weight.shape[1] for net in nets.values()] == [3, 3, 10, 15]
    state, mean = source.state_dict(), source.conv1.weight.mean(1, keepdim=True)
    assert all(torch.equal(v, nets["rgb2"].state_dict()[k]) for k, v in state.items())
    assert torch.allclose(nets["flow"].conv1.weight, mean.expand(-1, 10, -1, -1))  # Sec. 2.1
    assert all(torch.equal(v, nets["flow"].state_dict()[k]) for k, v in state.items() if k != "conv1.weight")
    assert not torch.equal(nets["rgb"].layer1[0].conv1.weight, nets["diff"].layer1[0].conv1.weight)
    factors = [lr_factors(net, groups) for net in nets.values()]
    assert factors == [(5, 10), (1, 2), (1, 2), (5, 10)]  # D3: those that start afresh
    for net, build in zip(nets.values(), builds.values(), strict=True):
        again = backbones.build(**build)
        again.load_state_dict(net.state_dict())
        assert again.dropout.p == 0.1
    assert len({id(p) for g in groups for p in g["params"]}) == sum(len(list(n.parameters()))
                                                                  for n in nets.values())  # fmt: skip


def test_a_classifier_for_other_classes_starts_afresh(run, tmp_path):
    """D3: so it learns faster, whatever the rest starts from."""
    saved(tmp_path / "model.pt", classes=K + 2)
    args = parsed(f"--nets flow --init {tmp_path}/model.pt --net tsm10 --width 0.0625 --fc_lr 5")
    nets, _, groups = mml.build_networks(args, K, run)
    assert lr_factors(nets["flow"].module.backbone, groups) == (5, 10)


def test_one_network_twice_has_nothing_to_learn(run, tmp_path):
    """Table 5: KL is zero otherwise; but cross-entropy, a teacher and other modalities need no second one."""
    saved(tmp_path / "a.pt")
    saved(tmp_path / "b.pt", seed=4)
    line = "--net tsm10 --width 0.0625 --init"
    for inits in (f"{tmp_path}/a.pt", f"{tmp_path}/a.pt,{tmp_path}/a.pt"):
        with pytest.raises(UserError, match="Table 5"):
            mml.build_networks(parsed(f"--nets rgb,rgb {line} {inits}"), K, run)
    with pytest.raises(UserError, match="rgb and rgb2 start as one"):
        mml.build_networks(parsed(f"--nets rgb,flow,rgb {line} {tmp_path}/a.pt"), K, run)
    for good in (f"--nets rgb,flow {line} {tmp_path}/a.pt", f"--nets rgb,rgb {line} {tmp_path}/a.pt --lam 0",
                 f"--nets rgb,rgb {line} {tmp_path}/a.pt,{tmp_path}/b.pt", f"--nets rgb,rgb {line} none",
                 f"--nets rgb,rgb {line} {tmp_path}/a.pt --mutual d3d --teacher t.pt"):  # fmt: skip
        assert len(mml.build_networks(parsed(good), K, run)[0]) == 2
    assert len(mml.build_networks(parsed(f"--nets rgb,rgb {line} {tmp_path}/a.pt"), K + 1, run)[0]) == 2


def test_network_gives_logits_and_the_last_stage():
    torch.manual_seed(0)
    net = mml.Network(backbones.build("tsm10", K, 3, width=1 / 16)).eval()
    x = random(2, 3, 4, 32, 32, scale=1.0)
    logits, f = net(x)
    assert torch.equal(logits, net.backbone(x)) and torch.equal(f, net.backbone.features(x)[-1])


# ---- test of models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos of nine PNG pictures."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for v in range(6):
        (root / f"v{v}").mkdir()
        for i, frame in enumerate(rng.integers(0, 256, (9, 16, 20, 3), dtype=np.uint8)):
            Image.fromarray(frame).save(root / f"v{v}" / f"{i:03d}.png", compress_level=1)
    return root


def data_of(folder, K=3):
    videos = [Videos.make(folder, [f"v{v}" for v in part], [v % K for v in part])
              for part in (range(3), range(6))]  # fmt: skip
    return Data("set", 1, tuple(f"class {k}" for k in range(K)), *videos, False, True, ())


def evaluated(model, folder, run, line=""):
    mml.test_only(parsed(f"--eval {model} --clips 1 --uniform 1 --workers 0 {line}"), data_of(folder), run)
    return json.loads((run.out / "result.json").read_text())


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_eval_tests_one_model(folder, run, tmp_path, average):
    net, data = saved(tmp_path / "a.pt", 3, "diff"), data_of(folder)
    result = evaluated(tmp_path / "a.pt", folder, run, f"--average {average}")
    recipe = replace(load_model(tmp_path / "a.pt")[3], clips=1, uniform=1)
    views = Views(data.test, recipe.sample, recipe.view, recipe.short_side, recipe.open)
    with torch.no_grad():
        x = torch.stack([net(recipe.to_input(views[i]["views"], "cpu")) for i in range(6)])  # (N, V, K)
    p = x.mean(1) if average == "logits" else x.softmax(2).mean(1)
    right = (p.argmax(1).numpy() == data.test.labels).mean()
    assert result["top1"] == pytest.approx(100 * right) and result["videos"] == 6


def test_eval_wants_flow_of_the_models_bound(folder, run, tmp_path):
    saved(tmp_path / "a.pt", 3, "flow")
    fields = tmp_path / "flow"
    for v in range(6):
        (fields / f"v{v}").parent.mkdir(exist_ok=True)
        write_flow(fields / f"v{v}.mp4", torch.full((8, 2, 16, 20), 128, dtype=torch.uint8))
    (fields / "flow.json").write_text('{"bound": 10.0}')
    with pytest.raises(UserError, match=r"a.pt wants flow of bound .*20.0, 256.*10.0, 256"):
        evaluated(tmp_path / "a.pt", folder, run, f"--flow {fields}")
    (fields / "flow.json").unlink()
    assert evaluated(tmp_path / "a.pt", folder, run, f"--flow {fields}")["unreadable"] == 0


def test_the_teacher_is_frozen_and_of_its_modality(folder, run, tmp_path):
    net = saved(tmp_path / "teacher.pt", 3, "diff")
    args = parsed(f"--nets rgb --mutual mars --teacher {tmp_path}/teacher.pt")
    recipe, teacher = mml.load_teacher(args, data_of(folder), run)
    assert recipe.modality == "diff" and not teacher.training
    assert all(torch.equal(a, b) and not b.requires_grad
               for a, b in zip(net.parameters(), teacher.parameters(), strict=True))  # fmt: skip
    assert mml.load_teacher(parsed("--nets rgb"), data_of(folder), run) is None


# ---- a training run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fields(folder):
    """A folder with the flow of `folder`; the bytes of field i of a video are 10 i."""
    root = folder.parent / f"{folder.name}_flow"
    root.mkdir()
    levels = (10 * torch.arange(8)).view(8, 1, 1, 1).expand(8, 2, 16, 20).to(torch.uint8)
    for v in range(6):
        write_flow(root / f"v{v}.mp4", levels)
    return str(root)


SHORT = ("--data ssv2 --net tsm10 --width 0.0625 --size 16 --test_size 16 --frames 2 --stride 1 --batch 2 "
         "--workers 0 --clips 1 --uniform 1 --epochs 2 --eval_every 1 --init none --dropout 0")  # fmt: skip


def trained(line, folder, run, monkeypatch, spy=None):
    """Train on data_of(folder), 3 videos and so 2 steps an epoch. Returns the rows of the log."""
    real = mml.train_step
    monkeypatch.setattr(mml, "load_data", lambda *_: data_of(folder))
    monkeypatch.setattr(mml, "train_step", lambda *args: (spy and spy(*args)) or real(*args))
    mml.train(parsed(f"{SHORT} {line}"), run)
    return [json.loads(row) for row in (run.out / "log.jsonl").read_text().splitlines()]


def test_each_network_sees_the_same_moment(folder, fields, run, monkeypatch):
    """In its own modality and normalisation: xi is one number for a clip, and both are of one video."""
    seen, kinds = Counter(), ("diff", "flow", "rgb")
    frames = [read_frames(str(folder / f"v{v}"), range(9)) for v in range(6)]
    monkeypatch.setattr(mml, "train_views", lambda clips, args, kinds: tuple(clips))

    def spy(nets, x, y, args, teacher):
        assert list(x) == list(nets) == list(kinds) and teacher is None
        rgb = Recipe(2, 1, mean=mml.MODALITIES["rgb"].mean, std=mml.MODALITIES["rgb"].std)
        for b in range(len(y)):
            i = ((x["flow"][b, ::2, :, 0, 0] * 0.226 + 0.5) * 25.5).round().int()  # (5, T) fields
            assert (i[1:] - i[:1] == torch.arange(1, 5).view(4, 1)).all()
            first = x["diff"][b, :3].transpose(0, 1) * 255  # (T, 3, H, W), of the frames from i_t on
            gaps = [(first - f[i[0] + 1].float() + f[i[0]]).abs().max() for f in frames]
            of = [v for v in range(6) if gaps[v] < 0.01]
            assert of == [int(y[b])]  # of the video with this label
            all_of_it = rgb.to_input(frames[of[0]][None], "cpu")[0]
            xi = [n for n in range(6) if torch.allclose(x["rgb"][b], all_of_it[:, i[0] + n], atol=1e-5)]
            assert len(xi) == 1
            seen[xi[0]] += 1

    line = f"--nets diff,flow,rgb --flow {fields} --epochs 8 --eval_every 100"
    rows = trained(line, folder, run, monkeypatch, spy)
    assert set(seen) == set(range(6)) and sum(seen.values()) == 32  # 9 frames, 4 input frames of the others
    names = {f"loss_{term}_{net}" for term in "c kl".split() for net in kinds}
    assert names | {"loss", "agree", "lr"} <= set(rows[0])
    result = json.loads((run.out / "result.json").read_text())
    assert {"top1", "flow_top1", "rgb_top1"} <= set(result) and "diff_top1" not in result
    for file, kind in (("model", "diff"), ("flow", "flow"), ("rgb", "rgb")):
        assert load_model(run.out / f"{file}.pt")[3].modality == kind


def test_a_run_follows_its_schedule_and_clips_gradients(folder, run, monkeypatch):
    """D2: 2 clips have 1 / 8 of the rate for 16. D3: each network's gradient has at most the norm given."""
    norms, recipes, score = [], [], evaluate.score

    def spied(optimizer, *_):
        norms.append([torch.cat([p.grad.flatten() for p in g["params"]]) for g in optimizer.param_groups])

    def scored(net, videos, recipe, *args, **kwargs):
        recipes.append((recipe.modality, recipe.clips, recipe.uniform, recipe.crops, recipe.size))
        return score(net, videos, recipe, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spied)
    monkeypatch.setattr(evaluate, "score", scored)
    line = ("--nets rgb,diff --lr 0.8 --lr_batch 16 --lr_steps 1 --fc_lr 5 --clip_grad 1e-3 --crops 3 "
            "--test_size 20")  # fmt: skip
    rows = [row for row in trained(line, folder, run, monkeypatch) if "lr" in row]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.1, 0.01, 0.01])  # epochs of 2 steps
    for groups in norms:
        each = [torch.cat(groups[:4]).norm().item(), torch.cat(groups[4:]).norm().item()]
        assert each == pytest.approx([1e-3, 1e-3], rel=1e-3)
    quick = [("rgb", 0, 1, 1, 16), ("diff", 0, 1, 1, 16)]  # Sec. 3.1.1: one uniform clip, the training crop
    assert recipes == quick + quick + [("diff", 1, 1, 3, 20), ("rgb", 1, 1, 3, 20)]


@pytest.mark.parametrize("mutual", ["mars", "d3d"])
def test_a_run_with_a_teacher(mutual, folder, fields, run, monkeypatch, tmp_path):
    saved(tmp_path / "teacher.pt", 3, "flow")
    seen = []

    def spy(nets, x, y, args, teacher):
        seen.append((list(nets), list(x), teacher[0].modality, teacher[1].training))

    line = f"--nets rgb --mutual {mutual} --teacher {tmp_path}/teacher.pt --flow {fields} --epochs 1"
    row = trained(line, folder, run, monkeypatch, spy)[0]
    assert seen == [(["rgb"], ["rgb", "flow"], "flow", False)] * 2
    total = row["loss_c_rgb"] + mml.LAM[mutual] * row[f"loss_{mutual}_rgb"]
    assert row["loss"] == pytest.approx(total, rel=1e-3)


def test_mars_needs_a_teacher_with_feature_maps_of_the_same_size(folder, run, monkeypatch, tmp_path):
    saved(tmp_path / "teacher.pt", 3)
    line = f"--nets rgb --mutual mars --teacher {tmp_path}/teacher.pt --width 0.125"
    with pytest.raises(UserError, match="teacher.pt"):
        trained(line, folder, run, monkeypatch)


def test_a_teacher_wants_flow_of_its_bound(folder, run, monkeypatch, tmp_path):
    saved(tmp_path / "teacher.pt", 3, "flow")
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "flow.json").write_text('{"bound": 10.0}')
    line = f"--nets rgb --mutual d3d --teacher {tmp_path}/teacher.pt --flow {tmp_path}/flow"
    with pytest.raises(UserError, match="bound"):
        trained(line, folder, run, monkeypatch)


# ---- command line ----------------------------------------------------------------------------------


def parsed(line):
    return mml.parse_args(line.split())


def test_recipe_of_something_something_is_the_papers():
    args = parsed("--data ssv2")
    assert (args.net, args.init, args.frames, args.stride) == ("tsm50", "imagenet", 8, 4)
    assert (args.sampling, args.ratio) == ("both", 1.0)
    assert (args.batch * 8, args.lr_batch, args.lr) == (64, 64, 0.025)
    assert (args.epochs, args.lr_steps) == (50, [20, 40])
    assert (args.optimizer, args.weight_decay, args.dropout, args.clip_grad) == ("sgd", 1e-4, 0.5, 20)
    assert (args.clips, args.uniform, args.crops, args.size) == (1, 2, 1, 224)  # Tab. 10: the best
    assert (args.test_size, args.test_crop, args.average) == (256, None, "logits")
    assert (args.nets, args.mutual, args.lam, args.mean, args.fc_lr) == ("rgb,flow", "kl", 1.0, "probs", 5)
    recipe = mml.recipe_of("flow", args, (9.0, 100), True)
    assert (recipe.bound, recipe.flow_side, recipe.multilabel) == (9.0, 100, True)
    assert (recipe.modality, recipe.spread, recipe.views) == ("flow", "parts", 3)
    assert (recipe.mean, recipe.std, recipe.short_side, recipe.size) == ((0.5,), (0.226,), 256, 256)
    diff, rgb = (mml.recipe_of(kind, args, SCALE, False) for kind in ("diff", "rgb"))
    assert (diff.mean, diff.std, rgb.mean) == ((0.0,), (1.0,), (0.485, 0.456, 0.406))


def test_recipes_of_other_sets():
    args = parsed("--data charades")
    assert (args.net, args.frames, args.stride, args.sampling) == ("i3d50", 16, 8, "dense")
    assert (args.clips, args.uniform, args.crops) == (10, 0, 3)
    assert (args.batch * 8, args.lr_batch, args.lr) == (16, 16, 0.0375)
    assert parsed("--data toy:multi").net == parsed("").net == "tsm10"
    assert parsed("--data weizmann").size == 64


@pytest.mark.parametrize("line, lam", [
    ("", 1.0), ("--lam 0", 0.0), ("--mutual mars --teacher t.pt", 50.0),
    ("--mutual d3d --teacher t.pt", 0.001),
    ("--mutual mars --teacher t.pt --lam 3", 3.0), ("--mutual d3d --teacher t.pt --data ssv2", 1.0),
    ("--mutual d3d --teacher t.pt --data charades", 1.0), ("--mutual d3d --teacher t.pt --lam 1", 1.0),
    ("--mutual d3d --teacher t.pt --data toy:multi", 1.0), ("--mutual mars --teacher t.pt --data ssv2", 50.0),
    ("--mutual d3d --teacher t.pt --data weizmann", 0.001),
])  # fmt: skip
def test_lam_follows_from_mutual_and_data(line, lam):
    """Appendix 2's weights, but D3D's on the toy set (D10)."""
    assert parsed(line).lam == lam


def test_ablations_test_crop():
    args = parsed("--data ssv2 --clips 0 --uniform 1 --test_crop 224")  # Sec. 3.1.1
    recipe = mml.recipe_of("rgb", args, SCALE, False)
    assert (recipe.short_side, recipe.size, recipe.views) == (256, 224, 1)
    recipe = mml.recipe_of("rgb", parsed("--test_size 40"), SCALE, False)
    assert (recipe.short_side, recipe.size) == (40, 40)


@pytest.mark.parametrize("line", [
    "--nets rgb,rgb --init none", "--nets rgb,rgb --init imagenet", "--nets rgb,rgb --init a.pt,b.pt",
    "--nets rgb,flow --init a.pt", "--nets rgb,rgb --init a.pt,none", "--pipeline --nets rgb,flow,diff",
    "--pipeline --nets rgb,flow,diff --init a.pt,b.pt",
    "--clips 0 --uniform 1", "--eval a.pt", "--lr_steps",
])  # fmt: skip
def test_good_lines(line):
    parsed(line)


@pytest.mark.parametrize("line, word", [
    ("--nets rgb,depth", "--nets"), ("--nets field", "--nets lists rgb, flow, diff"),
    ("--nets rgb,", "--nets"), ("--nets rgb2", "--nets"),
    ("--nets rgb,flow --init a.pt,b.pt,c.pt", "--init a.pt,b.pt,c.pt is not one start for each of 2"),
    ("--pipeline --nets rgb,flow,diff --init a.pt,b.pt,c.pt", "--init"), ("--mutual mars", "--teacher"),
    ("--test_crop 224 --crops 3", "--test_crop"), ("--teacher t.pt", "--teacher"),
    ("--mutual mse", "--mutual"), ("--pipeline --eval a.pt", "--pipeline"),
    ("--pipeline --mutual d3d --teacher t.pt", "--pipeline"), ("--pipeline --nets rgb,rgb", "--pipeline"),
    ("--lam -1", "--lam"), ("--lam nan", "--lam"), ("--batch 0", "--batch"), ("--frames 0", "--frames"),
    ("--stride 0", "--stride"), ("--uniform -1", "--uniform"), ("--clips 0 --uniform 0", "--clips"),
    ("--clips -1", "--clips"), ("--lr inf", "--lr"), ("--fc_lr -2", "--fc_lr"),
    ("--clip_grad nan", "--clip_grad"), ("--weight_decay -1", "--weight_decay"),
    ("--epochs nan", "--epochs"), ("--mean median", "--mean"), ("--sampling some", "--sampling"),
    ("--average max", "--average"), ("--ratio 20", "--ratio"), ("--test_crop -5", "--test_crop"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit) as end:
        parsed(line)
    said = str(end.value)
    assert said.startswith("mml: ") and word in said and said.endswith("(2)") and "\n" not in said


# ---- the pipeline ----------------------------------------------------------------------------------


def steps_of(line, monkeypatch, stop=None):
    """The arguments of the runs; number `stop` is stopped by a signal."""
    steps = []

    def one_run(args, free=()):
        steps.append(args)
        return len(steps) - 1 != stop

    monkeypatch.setattr(mml, "one_run", one_run)
    args = parsed(line)
    before = dict(vars(args))
    mml.pipeline(args)
    assert vars(args) == before
    return steps


def test_fig1_pipeline(monkeypatch):
    ce, ce2, ml, last = steps_of("--pipeline --nets rgb,flow,diff --out o --seed 4", monkeypatch)
    assert (ce.out, ce.nets, mml.starts_of(ce, ["rgb"]), ce.lam) == ("o/1_ce", "rgb", ["none"], 0)
    assert (ce2.out, ce2.nets, mml.starts_of(ce2, ["rgb"]), ce2.lam) == ("o/1_ce2", "rgb", ["none"], 0)
    assert (ml.out, ml.nets, ml.lam) == ("o/2_ml", "rgb,rgb", 1)
    assert mml.starts_of(ml, ["rgb", "rgb"]) == ["o/1_ce/model.pt", "o/1_ce2/model.pt"]
    assert (last.out, last.nets, last.lam) == ("o/3_mml", "rgb,flow,diff", 1)
    assert mml.starts_of(last, [1, 2, 3]) == ["o/2_ml/model.pt"] * 3  # of one network, for each
    assert [step.seed for step in (ce, ce2, ml, last)] == [4, 1004, 4, 4]
    assert [step.label_seed for step in (ce, ce2, ml, last)] == [4, 4, 4, 4]


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stopped_step_ends_the_pipeline(stop, monkeypatch):
    assert len(steps_of("--pipeline --out o", monkeypatch, stop)) == stop + 1


def test_fig1_folders_may_have_any_name(monkeypatch):
    ce, ce2, ml, last = steps_of("--pipeline --out a,b --init c.pt,d.pt", monkeypatch)
    assert [mml.starts_of(step, ["rgb"]) for step in (ce, ce2)] == [["c.pt"], ["d.pt"]]
    assert mml.starts_of(ml, ["rgb", "rgb"]) == ["a,b/1_ce/model.pt", "a,b/1_ce2/model.pt"]
    assert mml.starts_of(last, ["rgb", "flow"]) == ["a,b/2_ml/model.pt"] * 2


def test_step_1_is_two_independent_trainings_that_resume(folder, tmp_path, monkeypatch):
    """Starts, batches and crops differ, labelled videos do not; stopped in the second, it ends the same."""
    videos = Videos.make(folder, [f"v{v}" for v in range(6)], [v % 3 for v in range(6)])
    data, seen, real, stop = replace(data_of(folder), train=videos), [], mml.train_step, 0

    def spy(nets, x, y, args, teacher):
        seen.append((args.out.rsplit("/", 1)[1], x["rgb"], [p.clone() for p in nets["rgb"].parameters()]))
        if len(seen) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(nets, x, y, args, teacher)

    monkeypatch.setattr(mml, "load_data", lambda *_: data)
    monkeypatch.setattr(mml, "train_step", spy)
    line = f"{SHORT} --pipeline --nets rgb,diff --per_class 1 --out {tmp_path}"
    mml.pipeline(parsed(f"{line}/a"))
    assert [step for step, *_ in seen] == ["1_ce"] * 4 + ["1_ce2"] * 4 + ["2_ml"] * 4 + ["3_mml"] * 4
    (_, x, p), (_, x2, p2) = seen[0], seen[4]
    assert not torch.equal(x, x2)
    weights = [pair for pair in zip(p, p2, strict=True) if pair[0].ndim > 1]
    assert not any(torch.equal(*pair) for pair in weights)
    lists = {(tmp_path / "a" / step / "labelled.txt").read_text() for step in ("1_ce", "1_ce2", "2_ml")}
    chosen = [list(labelled_subset(data, None, 1, seed, None)) for seed in (0, 1000)]
    assert len(lists) == 1 and chosen[0] != chosen[1]
    paths = [tmp_path / "a" / step / "result.json" for step in ("1_ce", "1_ce2")]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert (first["seed"], second["seed"], second["label_seed"]) == (0, 1000, 0) and "label_seed" not in first

    seen.clear()
    stop = 4 + 2
    mml.pipeline(parsed(f"{line}/b"))
    assert len(seen) == stop and not (tmp_path / "b" / "2_ml").exists()
    mml.pipeline(parsed(f"{line}/b"))
    for file in ("1_ce/model.pt", "1_ce2/model.pt", "2_ml/rgb2.pt", "3_mml/model.pt", "3_mml/diff.pt"):
        nets = [load_model(tmp_path / out / file)[0] for out in "ab"]
        assert digest_of_model(nets[0]) == digest_of_model(nets[1])


def test_one_run_trains_once_and_tests_always(tmp_path, monkeypatch):
    called = []

    def train(args, run):
        called.append(run.out)
        if stops:
            return
        run.result({"script": "mml", "top1": 50.0})

    monkeypatch.setattr(mml, "train", train)
    args, stops = parsed(f"--out {tmp_path}/a"), True
    assert not mml.one_run(args) and len(called) == 1
    stops = False
    assert mml.one_run(args) and len(called) == 2
    assert mml.one_run(args) and len(called) == 2  # there is a result
    args = parsed(f"--out {tmp_path}/b --eval a.pt")
    assert mml.one_run(args) and mml.one_run(args) and len(called) == 4

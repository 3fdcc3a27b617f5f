"""The equations of jedi.py (values by hand, plain loops from the paper, where gradients go), experts that
become students, what is kept on disk, what is learned and tested, rounds by turns, and its command line."""

import csv
import json
import math
import os
import shutil
import signal
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import jedi
from common import UserError, backbones, datasets, evaluate, features, optim, video
from common.datasets import Data, Videos
from common.evaluate import Recipe, Scores
from common.features import Features
from common.run import Run

HERE = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("leave", "group")


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def cross_entropy(p, q):
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


# ---- Eq. 1 -----------------------------------------------------------------------------------------


def test_eq1_by_hand():
    """A video with a label, 0.5 * 1 + 2 * 2 + 0.4 * (1 + 0.25 * 2) = 5.1, and one without, 0.4 * 6.25."""
    cls_m, cls_e = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
    kd, w = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.25], [0.75, 1.0]])
    found = jedi.combined_loss(cls_m, cls_e, kd, w, 0.5, 2.0, 0.4)
    assert found.item() == pytest.approx((5.1 + 2.5) / 2)


def test_eq1_matches_naive_loop():
    cls_m, cls_e, kd, w = random(7), random(7, seed=1), random(7, 3, seed=2), random(7, 3, seed=3)
    total = 0.0
    for x in range(7):
        total += 1.5 * cls_m[x].item() + 0.7 * cls_e[x].item()
        for j in range(3):
            total += 0.3 * w[x, j].item() * kd[x, j].item()
    found = jedi.combined_loss(cls_m, cls_e, kd, w, 1.5, 0.7, 0.3)
    assert found.item() == pytest.approx(total / 7, rel=1e-5)


# A batch, sorted as the data sets are: (data set, label or None). Of data set 1 no video has a label, number
# 3 has no expert.
CLASSES = 4, 3, 2
BATCH = [(0, 3), (0, 0), (0, 0), (0, None), (1, None), (1, None), (2, 1), (2, 0), (3, None)]
OWN = [slice(0, 3), slice(4, 4), slice(6, 8)]
Y = torch.tensor([-1 if y is None else y for _, y in BATCH])
SIZES = 30, 60, 10


def naive_w(i, j, sizes=SIZES):
    """Eq. 2."""
    return 1.0 if i == j else sizes[j] / sum(sizes)


def naive_cls(kind, row, label):
    if kind == "ce":
        return -math.log(softmax(row)[label])
    if kind == "hinge":  # Crammer and Singer, over the number of classes (D2)
        return sum(max(0.0, 1 - row[label] + row[k]) for k in range(len(row)) if k != label) / len(row)
    return sum(max(0.0, 1 - (1 if k == label else -1) * row[k]) for k in range(len(row)))  # ovr


def naive_step(m, e, labels, weights, T, student, teacher, batch=BATCH):
    """Eq. 1 of one video after the other; e: the teachers' logits, one (B, K_i) for each."""
    alpha, beta, gamma = weights
    total, terms = 0.0, [0.0, 0.0, 0.0]
    for x, (i, label) in enumerate(batch):
        if label is not None:
            terms[0] += naive_cls(student, m[i][x].tolist(), label)
            terms[1] += naive_cls(teacher, e[i][x].tolist(), label)
        for j in range(len(CLASSES)):
            p = softmax([v / T for v in labels[j][x].tolist()])
            terms[2] += naive_w(i, j) * cross_entropy(p, softmax([v / T for v in m[j][x].tolist()]))
    for factor, term in zip((alpha, beta, gamma), terms, strict=True):
        total += factor * term
    return total / len(batch), [term / len(batch) for term in terms]


def logits(seed):
    return [random(len(BATCH), K, seed=seed + k, scale=2.0) for k, K in enumerate(CLASSES)]


def losses(student_loss="ce", teacher_loss="hinge", temperature=1.0):
    return Namespace(student_loss=student_loss, teacher_loss=teacher_loss, temperature=temperature)


W = torch.tensor([[naive_w(i, j) for j in range(3)] for i, _ in BATCH])


@pytest.mark.parametrize("student", ["ce", "hinge", "ovr"])
@pytest.mark.parametrize("teacher", ["ce", "hinge", "ovr"])
def test_step_loss_matches_naive_loop_over_videos(student, teacher):
    m, e, labels, weights = logits(0), logits(10), logits(20), (1.5, 0.7, 0.3)
    mine = [x[own] for x, own in zip(e, OWN, strict=True)]
    found, terms = jedi.step_loss(m, mine, labels, OWN, Y, W, weights, losses(student, teacher, 2.0))
    total, naive = naive_step(m, e, labels, weights, 2.0, student, teacher)
    assert found.item() == pytest.approx(total, rel=1e-5)
    assert list(terms) == ["loss_m", "loss_e", "loss_kd"]
    assert [term.item() for term in terms.values()] == pytest.approx(naive, rel=1e-5)


def test_step_loss_before_the_distillation():
    m, e = logits(0), logits(10)
    mine = [x[own] for x, own in zip(e, OWN, strict=True)]
    found, terms = jedi.step_loss(m, mine, None, OWN, Y, W, (1, 1, 0), losses())
    assert found.item() == pytest.approx(naive_step(m, e, e, (1, 1, 0), 1.0, "ce", "hinge")[0], rel=1e-5)
    assert terms["loss_kd"].item() == 0


def test_unlabelled_videos_have_the_third_term_alone():
    nobody, y = [slice(0, 0)] * 3, torch.full((9,), -1)
    m, labels = logits(0), logits(20)
    empty = [x[:0] for x in logits(10)]
    found = [jedi.step_loss(m, empty, labels, nobody, y, W, weights, losses())[0]
             for weights in ((1, 1, 0.3), (9, 8, 0.3))]  # fmt: skip
    unlabelled = [(i, None) for i, _ in BATCH]
    total, _ = naive_step(m, m, labels, (1, 1, 0.3), 1.0, "ce", "hinge", unlabelled)
    assert [loss.item() for loss in found] == pytest.approx([total, total], rel=1e-5)


def test_losses_by_hand():
    row, y = torch.tensor([[1.0, 0.5, -1.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
    # 1 - 1 + 0.5 and 1 - 1 - 1, of three classes; twice 1.
    assert jedi.LOSSES["hinge"](row, y).tolist() == pytest.approx([0.5 / 3, 2 / 3])
    # 1 - 1, 1 + 0.5, 1 - 1; each 1.
    assert jedi.LOSSES["ovr"](row, y).tolist() == pytest.approx([1.5, 3.0])


# ---- Eq. 2 -----------------------------------------------------------------------------------------


def test_eq2_by_hand():
    assert jedi.distillation_weights([1, 3]).tolist() == [[1.0, 0.75], [0.25, 1.0]]
    with_one_more = [[1.0, 0.75], [0.25, 1.0], [0.25, 0.75], [0.25, 0.75]]  # D8
    assert jedi.distillation_weights([1, 3], extra=2).tolist() == with_one_more


def test_eq2_of_table_1():
    w = jedi.distillation_weights([8398, 3570, 226070, 9537])
    assert w.dtype == torch.float32 and w.diagonal().tolist() == [1.0] * 4
    for j, expected in enumerate((0.0339, 0.0144, 0.9131, 0.0385)):
        column = [w[i, j].item() for i in range(4) if i != j]
        assert column == pytest.approx([expected] * 3, abs=5e-5)


def test_eq2_matches_naive_loop():
    w = jedi.distillation_weights(SIZES, extra=1)
    expected = [[naive_w(i, j) for j in range(3)] for i in range(4)]
    assert np.allclose(w, expected, atol=1e-7)


@pytest.mark.parametrize("distill, factors", [
    ("all", [[1, 1], [1, 1], [1, 1]]), ("none", [[0, 0], [0, 0], [0, 0]]), ("own", [[1, 0], [0, 1], [0, 0]]),
    ("ucf101", [[0, 0], [1, 1], [0, 0]]), ("k400", [[0, 0], [0, 0], [1, 1]]),
])  # fmt: skip
def test_what_teaches(distill, factors):
    """Sec. 5.2: all data sets, none, each student's own, or the videos of one, which may lack an expert."""
    sources = [SimpleNamespace(data=SimpleNamespace(name=name)) for name in ("hmdb51", "ucf101", "k400")]
    w = random(3, 2)
    assert torch.equal(jedi.teaching(w, distill, sources), w * torch.tensor(factors))


# ---- Eq. 3 -----------------------------------------------------------------------------------------


def stirred(module, seed=0, scale=0.5):
    """The module with random parameters: its adjustments are not 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return module


def test_eq3_matches_its_formula():
    adapter, e = stirred(backbones.Adapter(5, 2)), random(4, 5)
    V, b, U, c = (p.tolist() for p in adapter.parameters())
    for row, first, second in zip(e.tolist(), *jedi.adjust(e, adapter), strict=True):
        hidden = [sum(v * x for v, x in zip(vs, row, strict=True)) + s for vs, s in zip(V, b, strict=True)]
        hidden = [h / (1 + math.exp(-h)) for h in hidden]  # SiLU
        expected = [x + sum(u * h for u, h in zip(us, hidden, strict=True)) + s
                    for x, us, s in zip(row, U, c, strict=True)]  # fmt: skip
        assert first.tolist() == pytest.approx(expected, abs=1e-5)
        assert second.tolist() == pytest.approx(expected, abs=1e-5)


def test_eq3_begins_with_no_adjustment():
    e = random(4, 5)
    assert all(torch.equal(x, e) for x in jedi.adjust(e, backbones.Adapter(5, 2, 0.75)))


def test_eq3_is_of_low_rank():
    """As a matrix M = U V, so without what is not linear: of rank m = 3 for embeddings of 8."""
    adapter = stirred(backbones.Adapter(8, 3))
    with torch.no_grad():
        change = jedi.adjust(random(50, 8), adapter)[1] - random(50, 8)
        assert torch.linalg.matrix_rank(change - adapter.up.bias, atol=1e-4) == 3


def test_eq3_dropout_is_of_the_adjustment_and_scales_it():
    adapter, e = stirred(backbones.Adapter(40, 6, 0.75)), random(200, 40)
    torch.manual_seed(0)
    first, second = jedi.adjust(e, adapter)
    change = adapter.change(e)
    kept = (first - e).abs() > 1e-6
    assert torch.allclose((first - e)[kept], 4 * change[kept], atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.02)  # of 8000
    assert torch.allclose(second, e + change) and not second.requires_grad and first.requires_grad
    assert torch.equal(jedi.adjust(e, adapter.eval())[0], second)


# ---- Eq. 4 and 5 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("K, p", [(200, 0.721), (51, 0.929), (400, 0.442), (101, 0.859)])
def test_eq4_of_the_papers_data_sets(K, p):
    assert jedi.teacher_dropout(K, 7168, 10) == pytest.approx(p, abs=5e-4)


def test_eq4_by_hand_and_never_below_0():
    assert jedi.teacher_dropout(3, 60, 5) == 0.75
    assert jedi.teacher_dropout(717, 7168, 10) == jedi.teacher_dropout(400, 7168, 100) == 0


@pytest.mark.parametrize("K", [51, 400])
def test_eq5_counts_active_inputs(K):
    torch.manual_seed(0)
    active = F.dropout(torch.ones(400, 7168), jedi.teacher_dropout(K, 7168, 10)).count_nonzero(1).float()
    assert active.mean().item() == pytest.approx(10 * K, rel=0.01)


# ---- distillation ----------------------------------------------------------------------------------


def test_distillation_loss_by_hand():
    """Labels (1/2, 1/2), student (1/4, 3/4): 1/2 log 4 + 1/2 log 4/3."""
    m = torch.tensor([[0.0, math.log(3.0)]])
    by_hand = (math.log(4) + math.log(4 / 3)) / 2
    assert jedi.distillation_loss(m, torch.zeros(1, 2), 1.0).item() == pytest.approx(by_hand, abs=1e-6)
    # T = 2: logits twice as large give the same.
    assert jedi.distillation_loss(2 * m, torch.zeros(1, 2), 2.0).item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_distillation_loss_matches_naive_loop(T):
    m, e = random(6, 5, scale=3.0), random(6, 5, seed=1, scale=3.0)
    found = jedi.distillation_loss(m, e, T)
    for x in range(6):
        p = softmax([v / T for v in e[x].tolist()])
        q = softmax([v / T for v in m[x].tolist()])
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[x].item() == pytest.approx(cross_entropy(p, q), rel=1e-5)
        assert found[x].item() == pytest.approx(kl + cross_entropy(p, p), rel=1e-5)  # KL and entropy


def test_distillation_loss_has_no_gradient_into_the_teacher():
    m, e = random(6, 5).requires_grad_(), random(6, 5, seed=1).requires_grad_()
    jedi.distillation_loss(m, e, 2.0).sum().backward()
    assert e.grad is None
    assert torch.allclose(m.grad, ((m / 2).softmax(1) - (e / 2).softmax(1)).detach() / 2, atol=1e-6)


# ---- students and teachers: what they compute ------------------------------------------------------


class Headed(nn.Module):
    """Of a network what follows its encoder."""

    name = "headed"

    def __init__(self, D, K, hidden=0):
        super().__init__()
        self.fc = nn.Linear(D, K)
        self.adapter = backbones.Adapter(D, hidden) if hidden else nn.Identity()

    def head(self, z):
        return self.fc(self.adapter(z))


def expert_of(net, slug="one", made=None, recipe=None):
    return jedi.Expert(slug, f"{slug}.pt", net, made, recipe or Recipe(4, 1), "digest of " + slug)


WIDTHS = 6, 5, 3


def experts(hidden=0):
    return [expert_of(stirred(Headed(D, K, hidden), seed=D)) for D, K in zip(WIDTHS, CLASSES, strict=True)]


def joint_of(inputs="adjusted", dropout=0.0, neurons=1e9, stir=True):
    torch.manual_seed(1)
    joint = jedi.Joint(experts(), 4, dropout, inputs, neurons)
    return stirred(joint, seed=2) if stir else joint


INPUTS = ["adjusted", "base", "predictions", "adjusted+predictions"]
Z = random(len(BATCH), sum(WIDTHS), seed=5)


def naive_joint(joint, inputs, z=Z):
    """Sec. 3.3 and 5.1 one embedding after the other: logits of students and teachers, lists of (B, K_j)."""
    e = [z[:, :6], z[:, 6:11], z[:, 11:]]
    a, m = [], []
    for x, adapter, head in zip(e, joint.adapters, joint.heads, strict=True):
        hidden = x @ adapter.down.weight.T + adapter.down.bias
        a.append(x + (hidden * torch.sigmoid(hidden)) @ adapter.up.weight.T + adapter.up.bias)
        m.append(a[-1] @ head.weight.T + head.bias)
    seen = {"adjusted": a, "base": e, "predictions": m, "adjusted+predictions": [*a, *m]}[inputs]
    x = torch.cat(seen, 1)
    teachers, first = [], 0
    for K in CLASSES:
        weight, bias = joint.teachers.weight[first : first + K], joint.teachers.bias[first : first + K]
        teachers.append(x @ weight.T + bias)
        first += K
    return m, teachers


def alike(found, expected, atol=1e-5):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("inputs", INPUTS)
def test_joint_matches_the_naive_one(inputs):
    joint = joint_of(inputs)
    m, teachers = naive_joint(joint, inputs)
    found = joint(Z, OWN)
    assert alike(found[0], m) and alike(found[2], teachers)
    assert alike(found[1], [x[own] for x, own in zip(teachers, OWN, strict=True)])
    assert alike(joint.logits(Z)[0], m) and alike(joint.logits(Z)[1], teachers)
    assert joint(Z, OWN, distill=False)[2] is None
    d = {"adjusted": 14, "base": 14, "predictions": 9, "adjusted+predictions": 23}[inputs]
    assert joint.teachers.weight.shape == (9, d)
    assert joint_of(inputs, neurons=2).p == pytest.approx([max(0, 1 - 2 * K / d) for K in CLASSES])


@pytest.mark.parametrize("inputs", INPUTS)
def test_labels_are_without_any_dropout(inputs):
    """D3: neither the teachers' nor the adjustments', in train mode as at rest, and constants."""
    joint = joint_of(inputs, dropout=0.75, neurons=1)
    assert joint.training and max(joint.p) > 0.5
    m, e, labels = joint(Z, OWN)
    naive = naive_joint(joint, inputs)
    assert alike(labels, naive[1]) and not any(x.requires_grad for x in labels)
    assert not alike(m, naive[0], 1e-3)
    assert not alike(e, [x[own] for x, own in zip(naive[1], OWN, strict=True)], 1e-3)
    assert alike(joint.logits(Z)[0], naive[0]) and not any(x.requires_grad for x in joint.logits(Z)[0])
    m, e, _ = joint.eval()(Z, OWN)
    assert alike(m, naive[0]) and alike(e, [x[own] for x, own in zip(naive[1], OWN, strict=True)])


def test_a_teacher_sees_its_own_videos_alone():
    joint = joint_of()
    before = joint(Z, OWN)[1]
    for x in range(len(BATCH)):
        other = Z.clone()
        other[x] += 1
        for i, (old, new) in enumerate(zip(before, joint(other, OWN)[1], strict=True)):
            changed = (old != new).any(1).tolist()
            assert changed == [place == x for place in range(OWN[i].start, OWN[i].stop)]


def test_dropout_of_the_teachers_is_eq4():
    """Ones into a teacher of ones: its logit is the number of active inputs over 1 - p."""
    torch.manual_seed(0)
    joint = jedi.Joint(experts(), 4, 0.0, "base", 2)  # d = 14: p = 6/14, 8/14, 10/14
    nn.init.ones_(joint.teachers.weight)
    nn.init.zeros_(joint.teachers.bias)
    own = [slice(k * 4000, (k + 1) * 4000) for k in range(3)]
    e = joint(torch.ones(12000, 14), own)[1]
    for logit, p, K in zip(e, (6 / 14, 8 / 14, 10 / 14), CLASSES, strict=True):
        active = logit[:, 0] * (1 - p)
        assert torch.allclose(active, active.round(), atol=1e-4)
        assert active.mean().item() == pytest.approx(2 * K, rel=0.02)  # Eq. 5
        assert torch.allclose(logit[:, 0], logit[:, -1])  # one dropout for all classes of a teacher


# ---- where gradients go ----------------------------------------------------------------------------


def reached(joint, weights, own=OWN, y=Y):
    """The parameters that a step of Eq. 1 with these weights has a gradient for."""
    joint.zero_grad()
    jedi.step_loss(*joint(Z, own), own, y, W, weights, losses())[0].backward()
    return {name for name, p in joint.named_parameters() if p.grad is not None and p.grad.any()}


TEACHERS = {"teachers.weight", "teachers.bias"}
HEADS = {f"heads.{j}.{what}" for j in range(3) for what in ("weight", "bias")}
UP, DOWN = ({f"adapters.{j}.{layer}.{what}" for j in range(3) for what in ("weight", "bias")}
            for layer in ("up", "down"))  # fmt: skip


@pytest.mark.parametrize("inputs", INPUTS)
def test_distillation_teaches_students_alone(inputs):
    assert reached(joint_of(inputs), (0, 0, 1)) == HEADS | UP | DOWN


@pytest.mark.parametrize("inputs, beyond", [
    ("adjusted", UP | DOWN), ("base", set()), ("predictions", UP | DOWN | HEADS),
    ("adjusted+predictions", UP | DOWN | HEADS),
])  # fmt: skip
def test_labels_of_the_teachers_reach_what_they_see(inputs, beyond):
    """Sec. 5.1: bidirectional, but for base features (D4)."""
    assert reached(joint_of(inputs), (0, 1, 0)) == TEACHERS | beyond


def test_the_first_step_reaches_the_second_layers_of_the_adjustment():
    """They are 0, and so the first layers wait."""
    assert reached(joint_of(stir=False), (0, 1, 0)) == TEACHERS | UP


def test_labels_of_the_students_reach_those_who_have_some():
    """Data set 1 has none in this batch; no teacher is reached."""
    mine = {name for name in HEADS | UP | DOWN if ".1." not in name}
    assert reached(joint_of(), (1, 0, 0)) == mine


def test_the_teachers_of_data_sets_without_labels_in_the_batch_rest():
    joint = joint_of()
    reached(joint, (1, 1, 0))
    rows = joint.teachers.weight.grad.any(1).tolist()
    assert rows == [True] * 4 + [False] * 3 + [True] * 2


def test_unlabelled_videos_reach_nothing_without_distillation():
    nobody = [slice(0, 0)] * 3
    assert not reached(joint_of(), (1, 1, 0), nobody, torch.full((9,), -1))
    assert reached(joint_of(), (1, 1, 1), nobody, torch.full((9,), -1)) == HEADS | UP | DOWN


# ---- a student begins as its expert ----------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 4])
def test_students_begin_as_their_experts(hidden):
    """D5, and so it is where the expert is a student of another run."""
    joint = jedi.Joint(experts(hidden), 4, 0.75, "adjusted", 10).eval()
    for m, expert, e in zip(joint.logits(Z)[0], experts(hidden), Z.split(WIDTHS, 1), strict=True):
        assert torch.allclose(m, expert.net.head(e), atol=1e-6)
    assert alike(joint(Z, OWN)[0], joint.logits(Z)[0], 1e-6)


def small(name="resnet3d10-small", K=3, seed=0, **more):
    """(what builds it, a small network at rest)."""
    made = dict(name=name, classes=K, width=0.0625, **more)
    torch.manual_seed(seed)
    net = backbones.build(**made)
    for module in net.modules():  # of others than ones and zeros
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
    return made, net.eval()


@pytest.mark.parametrize("adapter", [0, 4])
def test_a_student_is_a_network_of_its_own(adapter, tmp_path):
    made, net = small(dropout=0.5, **{"adapter": adapter} if adapter else {})
    if adapter:
        stirred(net.adapter)
    joint = jedi.Joint([expert_of(net, made=made)] * 2, 4, 0.75, "adjusted", 10)
    z = random(5, net.fc.in_features, seed=3)
    _, same = jedi.student(expert_of(net, made=made), net, joint, 1, 4)
    assert torch.equal(same.eval().head(z), net.head(z))
    stirred(joint)
    made, student = jedi.student(expert_of(net, made=made), net, joint, 1, 4)
    m = joint.logits(torch.cat([torch.zeros_like(z), z], 1))[0][1]
    evaluate.save_model(tmp_path / "model.pt", student, made, "abc", Recipe(4, 1, average="embeddings"))
    x = random(2, 3, 4, 16, 16)
    for it in (student.eval(), evaluate.load_model(tmp_path / "model.pt")[0]):
        assert torch.allclose(it.head(z), m, atol=1e-6) and torch.equal(it.embed(x), net.embed(x))
        assert not torch.allclose(it.head(z), net.head(z), atol=1e-2)
        assert not any(p.is_cuda for p in it.parameters())


# ---- rounds by turns -------------------------------------------------------------------------------


def turns(**more):
    return Namespace(**dict(alpha=1.0, beta=2.0, gamma=0.4, burn_in=2.5, alternate=0) | more)


def test_distillation_begins_after_the_burn_in():
    for step in (0, 9):  # of 4 steps an epoch, 2.5 are 10
        assert jedi.weights_at(step, 100, 4, turns()) == (1.0, 2.0, 0.0)
    for step in (10, 99):
        assert jedi.weights_at(step, 100, 4, turns()) == (1.0, 2.0, 0.4)
    assert jedi.weights_at(0, 100, 4, turns(burn_in=0)) == (1.0, 2.0, 0.4)


def test_rounds_take_turns():
    """D11: three rounds of 24 steps, of four steps each first teachers, then students; no burn-in."""
    assert [jedi.half_round(step, 24, 3) for step in range(24)] == [h for h in range(6) for _ in range(4)]
    found = [jedi.weights_at(step, 24, 4, turns(alternate=3)) for step in range(24)]
    assert found == ([(0, 2.0, 0)] * 4 + [(1.0, 0, 0.4)] * 4) * 3
    halves = [jedi.half_round(step, 23, 2) for step in range(23)]  # not divisible: almost the same number
    assert halves == sorted(halves) and {halves.count(h) for h in range(4)} == {5, 6}


def of_students(joint):
    return [p for name, p in joint.named_parameters() if "teachers." not in name]


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other, *prefixes):
    """Whether the tensors agree whose names start so."""
    names = [name for name in one if name.startswith(prefixes or "")]
    assert names
    return all(torch.equal(one[name], other[name]) for name in names)


STUDENTS = "adapters.", "heads."


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("half", [2, 1])
def test_half_a_round_begins(name, half):
    joint = joint_of(stir=False)
    begin, elder = copies(joint), joint_of(stir=False)
    groups = [dict(params=of_students(joint)), dict(params=[*joint.teachers.parameters()])]
    optimizer = optim.build(name, groups, 0.1, 0.5)

    def step(weights):
        loss = jedi.step_loss(*joint(Z, OWN), OWN, Y, W, weights, losses())[0]
        optim.set_lr(optimizer, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step((1, 1, 0.4))
    before = copies(joint)
    assert not equal(before, begin, "teachers.") and not equal(before, begin, *STUDENTS)
    jedi.begin_half(joint, elder, optimizer, half)
    teachers = half == 2
    mine, others = (("teachers.",), STUDENTS) if teachers else (STUDENTS, ("teachers.",))
    now = copies(joint)
    assert equal(now, begin, *mine) and equal(now, before, *others)
    assert equal(copies(elder), begin if teachers else before)
    assert not any(optimizer.state.get(p) for p in joint.parameters())
    for _ in range(3):  # with gradients for both: the others rest all the same, and do not decay
        step((1, 1, 0.4))
    assert equal(copies(joint), before, *others) and not equal(copies(joint), begin, *mine)
    assert [group["lr"] for group in optimizer.param_groups] == ([0, 0.1] if teachers else [0.1, 0])
    assert equal(copies(elder), begin if teachers else before)
    jedi.begin_half(joint, elder, optimizer, half + 1)
    assert [group["lr_factor"] for group in optimizer.param_groups] == ([1, 0] if teachers else [0, 1])


# ---- data sets, and what is learned ----------------------------------------------------------------


def videos_of(name, n, K, groups=None):
    names, labels = [f"{name}{i}.mp4" for i in range(n)], [(i * i + i // 3) % K for i in range(n)]
    return Videos.make(f"/{name}", names, labels, groups)


def data_of(name, train, test, K, groups=None):
    classes = tuple(f"{name} {k}" for k in range(K))
    train, test = videos_of(name, train, K, groups), videos_of("t" + name, test, K)
    return Data(name, 1, classes, train, test, False, True, ())


def source_of(name, number, train=12, test=5, K=3, labelled=None, held=(), groups=None):
    labelled = range(train) if labelled is None else labelled
    marks = [np.isin(np.arange(train), places) for places in (labelled, held)]
    return jedi.Source(name, None, data_of(name, train, test, K, groups), number, *marks)


def three():
    """Two data sets with experts, one with labels for a part, one with a hold-out, and one without."""
    one = source_of("one", 0, 12, 5, 3, labelled=(1, 4, 5, 8, 11))
    return [one, source_of("two", 1, 9, 4, 2, held=(0, 4, 8)), source_of("more", None, 7, 3, 6, labelled=())]


UNREADABLE = [{4: "no frames", 6: "html"}, {8: "held out, and no frames"}, {0: "no such file"}]


def naive_learned(sources, unreadable=({}, {}, {})):
    """(number of the data set, index, label or -1) of the videos to learn from, in their order."""
    found = []
    for number, source in enumerate(sources):
        places = [i for i in np.flatnonzero(~source.held).tolist() if i not in unreadable[number]]
        known = [i for i in places if source.labelled[i]]
        found += [(number, i, int(source.data.train.labels[i])) for i in known]
        found += [(number, i, -1) for i in places if i not in known]
    return found


@pytest.mark.parametrize("unreadable", [[{}, {}, {}], UNREADABLE])
def test_learned_videos(unreadable):
    sources = three()
    learned, naive = jedi.Learned.of(sources, unreadable), naive_learned(sources, unreadable)
    assert learned.source.tolist() == [number for number, _, _ in naive]
    assert learned.y.tolist() == [label for _, _, label in naive] and learned.y.dtype == torch.int64
    paths = [learned.videos.path(k) for k in range(len(learned.videos))]
    assert paths[: len(naive)] == [sources[number].data.train.path(i) for number, i, _ in naive]
    assert learned.y[learned.source == 2].tolist() == [-1] * int((learned.source == 2).sum())
    bad = {learned.videos.path(k): reason for k, reason in learned.bad.items()}
    expected = {"/one/one4.mp4": "no frames", "/one/one6.mp4": "html", "/more/more0.mp4": "no such file"}
    assert bad == (expected if any(unreadable) else {})  # who is held out is no training video
    assert len(paths) == len(naive) + len(bad) and min(learned.bad, default=len(naive)) == len(naive)


def test_learned_videos_keep_their_time():
    """A segment of a file is read as such; a data set of whole files may stand beside it."""
    one, two = source_of("one", 0, 3, 2, 2, labelled=(1,)), source_of("two", 1, 2, 2, 2)
    train = replace(one.data.train, spans=np.array([[0, 1], [1, 2], [2, 3.5]]))
    one = replace(one, data=replace(one.data, train=train))
    learned = jedi.Learned.of([one, two], [{2: "no frames"}, {}])
    spans = [learned.videos.span(k) for k in range(5)]
    assert spans[:2] == [(1, 2), (0, 1)] and spans[4] == (2, 3.5)
    for start, end in filter(None, spans[2:4]):
        assert start == 0 and end == math.inf


def test_own_videos_of_a_batch_are_those_with_a_label():
    learned = jedi.Learned.of(three(), UNREADABLE)
    rng = np.random.default_rng(0)
    for size in (*range(1, 9), 40):
        places = np.sort(rng.integers(len(learned.y), size=size))
        own = learned.own(places)
        assert len(own) == 2
        for i, mine in enumerate(own):
            naive = [k for k, p in enumerate(places) if learned.source[p] == i and learned.y[p] >= 0]
            assert list(range(size))[mine] == naive


def test_nothing_that_is_held_out_is_learned():
    """D10: whole groups of scenes."""
    groups = [3, 3, 7, 7, 7, 9, 9, 12, 12, 3]
    held = datasets.held_out(videos_of("one", 10, 3, groups), 0.3, seed=1)
    known = 0, 1, 2, 3, 5, 7
    source = source_of("one", 0, 10, 5, 3, known, np.flatnonzero(held), groups)
    part, tested = source.tested
    learned, supervised = source.learned.tolist(), source.supervised.tolist()
    assert part == "train" and len(tested) >= 3
    assert not set(tested) & set(learned) and set(supervised) <= set(learned)
    assert sorted([*tested, *learned]) == list(range(10)) and learned[: len(supervised)] == supervised
    assert not {groups[i] for i in tested} & {groups[i] for i in learned}
    assert supervised == [i for i in known if i not in tested]
    assert jedi.parts_of(source) == ["train"] and source.videos(part) is source.data.train


def test_without_a_hold_out_the_test_videos_are_tested():
    one, two, more = three()
    part, tested = one.tested
    assert part == "test" and tested.tolist() == [0, 1, 2, 3, 4] and one.videos(part) is one.data.test
    assert [jedi.parts_of(source) for source in (one, two, more)] == [["train", "test"], ["train"], ["train"]]


SAID = SimpleNamespace(say=print)


@pytest.fixture
def library(monkeypatch):
    """datasets.load knows a few sets; which roots it was asked for."""
    asked = []

    def load(name, root, split):
        asked.append((name, root, split))
        data = data_of(name.split("/")[-1], 12, 5, 3, [i // 2 for i in range(12)])
        return replace(data, multilabel=name == "multi")

    monkeypatch.setattr(datasets, "load", load)
    return asked


def parsed(line):
    return jedi.parse_args(line.split())


def test_sources_of_the_command_line(library, tmp_path):
    (tmp_path / "list.txt").write_text("two3.mp4 1\ntwo5.mp4 2\n")
    (tmp_path / "one.txt").write_text("one1.mp4\n")
    lists = f"--labelled_list {tmp_path}/one.txt,{tmp_path}/list.txt"
    more = "--split 2 --extra more,less --extra_root /c, --extra_videos 5 --seed 3"
    one, two, more, less = jedi.load_sources(parsed(f"--data one,two --root /a,/b {lists} {more}"), SAID)
    assert library == [("one", "/a", 2), ("two", "/b", 2), ("more", "/c", 2), ("less", None, 2)]
    assert [source.number for source in (one, two, more, less)] == [0, 1, None, None]
    assert one.supervised.tolist() == [1] and two.supervised.tolist() == [3, 5]
    assert len(one.learned) == 12 and len(more.learned) == len(less.learned) == 5
    assert not one.held.any() and not two.held.any()
    assert not more.labelled.any() and not len(less.supervised)
    assert len(less.data.train) == 12 and jedi.parts_of(less) == ["train"]  # the whole list is embedded
    chosen = less.learned.tolist()
    assert chosen == sorted(set(chosen)) and chosen != [0, 1, 2, 3, 4]  # drawn at random
    (*_, everything) = jedi.load_sources(parsed("--data one --extra less --extra_videos 20 --seed 3"), SAID)
    assert len(everything.learned) == 12


@pytest.mark.parametrize("line, counts", [
    ("--labelled_list ,,LIST", (12, 12, 2)), ("--labelled_list LIST,,", (2, 12, 12)),
    ("--labelled_list LIST,,LIST", (2, 12, 2)), ("--labelled_list ,LIST, --holdout 0.3", (12, 2, 12)),
])  # fmt: skip
def test_few_labels_for_some_data_sets(library, tmp_path, line, counts):
    """The others have all; in the run of an expert of its own as well."""
    names = "one", "two", "six"
    for name in names:
        (tmp_path / f"{name}.txt").write_text(f"{name}3.mp4\n{name}5.mp4\n")
    lists = line.split()[1].split(",")
    lists = ",".join(f"{tmp_path}/{name}.txt" * bool(x) for name, x in zip(names, lists, strict=True))
    more = line.split()[2:]
    args = jedi.parse_args(["--data", ",".join(names), "--labelled_list", lists, *more])
    sources = jedi.load_sources(args, SAID)
    assert tuple(int(source.labelled.sum()) for source in sources) == counts
    for k, source in enumerate(sources):
        (alone,) = jedi.load_sources(jedi.of_source(args, k), SAID)
        assert np.array_equal(alone.supervised, source.supervised) and alone.name == names[k]


def test_labels_and_hold_outs_of_the_command_line(library):
    one, two = jedi.load_sources(parsed("--data one,two --per_class 2 --holdout 0.3"), SAID)
    for source in (one, two):
        assert source.labelled.sum() == 6 and source.held.sum() == 4  # of 12, by two
        scenes = [{i // 2 for i in places} for places in (source.tested[1], source.learned)]
        assert not scenes[0] & scenes[1] and len(source.learned) == 8
    (everything,) = jedi.load_sources(parsed("--data one"), SAID)
    assert everything.labelled.all() and not everything.held.any()


@pytest.mark.parametrize("line, sentence", [
    ("--data one,multi", "multi has several labels per video"),
    ("--data one --per_class 1 --holdout 0.95 --seed 2", "one has no video with a label beside the held-out"),
])
def test_data_sets_that_are_refused(library, line, sentence):
    with pytest.raises(UserError, match=sentence):
        jedi.load_sources(parsed(line), SAID)


def test_values_with_commas():
    assert [jedi.one_of("a,,c", k) for k in range(3)] == ["a", None, "c"]
    assert jedi.one_of(None, 1) is jedi.one_of("", 1) is None
    assert jedi.slug("toy:a") == "toy-a" and jedi.slug("/some/where/") == "where"


# ---- from disk -------------------------------------------------------------------------------------


def features_of(n, D, K, without, dtype, seed):
    """The rows of n videos but for some: embeddings and probabilities."""
    good = [i for i in range(n) if i not in without]
    z, p = random(len(good), D, seed=seed), random(len(good), K, seed=seed + 1).softmax(1)
    rows = torch.cat([z, p], 1).numpy().astype(dtype)
    return Features(rows, np.isin(np.arange(n), good).astype(np.int64), dict.fromkeys(without, f"bad {seed}"))


# Of (data set, part, expert) which videos cannot be read.
BAD = {("one", "train", 0): [4], ("one", "train", 1): [4, 6], ("two", "train", 1): [3, 8],
       ("more", "train", 0): [0], ("one", "test", 0): [2], ("one", "test", 1): [0]}  # fmt: skip


@pytest.fixture
def disk(monkeypatch):
    """What `cached` finds, for two experts with embeddings of 6 and of 5; numbers of half precision."""
    both = [expert_of(stirred(Headed(6, 3)), "one", recipe=Recipe(4, 1, average="logits")),
            expert_of(stirred(Headed(5, 2)), "two", recipe=Recipe(4, 1))]  # fmt: skip
    there = {}
    for s, source in enumerate(three()):
        for part in ("train", "test"):
            for k, (D, K) in enumerate(((6, 3), (5, 2))):
                without, n = BAD.get((source.name, part, k), []), len(source.videos(part))
                seed = 100 * s + 10 * k + len(part)
                there[source.name, part, k] = features_of(n, D, K, without, np.float16, seed)
    asked = []

    def cached(args, run, source, part, expert, compute=False):
        assert not compute
        asked.append((source.name, part))
        return there[source.name, part, both.index(expert)]

    monkeypatch.setattr(jedi, "cached", cached)
    return SimpleNamespace(experts=both, there=there, asked=asked)


def fed(disk, sources=None, **more):
    args = Namespace(**dict(memory=None, batch=4, seed=3) | more)
    run = SimpleNamespace(device=torch.device("cpu"), say=print, rank=0, world=1)
    return jedi.FromDisk(args, run, sources or three(), disk.experts)


def naive_rows(disk, name, part, i):
    """What all experts see in a video, side by side; None if one cannot read it."""
    found = []
    for k, D in enumerate((6, 5)):
        here = disk.there[name, part, k]
        if not here.counts[i]:
            return None
        found.append(here.rows[sum(here.counts[:i])][:D].astype(np.float32))
    return np.concatenate(found)


@pytest.mark.parametrize("memory", [1.0, 0.0, None])
def test_embeddings_from_disk(disk, memory, capsys):
    feed = fed(disk, memory=memory)
    naive = [(n, i) for n, i, _ in naive_learned(three())]
    rows = [(at, naive_rows(disk, three()[at[0]].name, "train", at[1])) for at in naive]
    rows = [(at, row) for at, row in rows if row is not None]
    assert [len(feed.X), len(rows), 21] == [len(feed.learned.y)] * 3  # 12 - 2, 9 - 3 - 1, 7 - 1
    ((places, z),) = feed.X.batches([np.arange(21)])
    assert z.dtype == torch.float32 and np.array_equal(z, [row for _, row in rows])
    assert feed.learned.source.tolist() == [number for (number, _), _ in rows]
    assert ("held there" in capsys.readouterr().out) == (memory != 0)
    assert (feed.X.held is None) == (feed.Z.held is None) == (memory == 0)
    bad = {feed.learned.videos.name(k) for k in feed.learned.bad}
    assert bad == {"/one/one4.mp4", "/one/one6.mp4", "/two/two3.mp4", "/more/more0.mp4"}  # two8 is held out
    tested, Z = zip(*((mine, z()) for mine, z in feed.tests(all_views=True)), strict=True)
    assert [mine.good.tolist() for mine in tested] == [[1, 3, 4], [0, 1]]  # of 5 test videos; of 0, 4, 8
    assert [sorted(mine.bad) for mine in tested] == [[0, 2], [2]]
    assert np.array_equal(Z[0], [naive_rows(disk, "one", "test", i) for i in (1, 3, 4)])
    assert np.array_equal(Z[1], [naive_rows(disk, "two", "train", i) for i in (0, 4)])
    assert ("two", "test") not in disk.asked and ("more", "test") not in disk.asked


def test_experts_scores_from_disk(disk, monkeypatch):
    """D9: of the first by the logits of the mean embedding, of the second by the mean probabilities."""
    monkeypatch.setattr(jedi, "figures", lambda scores: scores)
    one, two = (mine.expert for mine in fed(disk).tested)
    z = torch.from_numpy(np.stack([naive_rows(disk, "one", "test", i)[:6] for i in (1, 3, 4)]))
    assert np.allclose(one.probs[[1, 3, 4]], disk.experts[0].net.head(z).softmax(1).detach(), atol=1e-6)
    assert not one.probs[[0, 2]].any() and sorted(one.bad) == [0, 2]
    assert one.labels.tolist() == [0, 1, 1, 1, 2]
    held = disk.there["two", "train", 1]
    at = [int(sum(held.counts[:i])) for i in (0, 4)]
    assert np.array_equal(two.probs[:2], held.rows[at, 5:].astype(np.float32)) and not two.probs[2].any()
    assert two.labels.tolist() == [videos_of("two", 9, 2).labels[i] for i in (0, 4, 8)]


def test_what_cannot_be_read_is_wrong():
    source = source_of("one", 0, 4, 4, 2)
    mine = jedi.Tested(source, np.array([0, 1, 3]), {2: "no frames"})
    assert mine.videos.labels.tolist() == [0, 1, 0, 0]
    scores = mine.scores(np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], np.float32))
    assert np.allclose(scores.probs, [[0.9, 0.1], [0.2, 0.8], [0, 0], [0.3, 0.7]])
    assert scores.hits.tolist() == [1, 1, 0, 0] and scores.views.tolist() == [1] * 4
    assert jedi.figures(scores)["top1"] == 50.0 and jedi.figures(scores)["top5"] == 75.0


def test_batches_from_disk_are_passes_over_all_data_sets(disk):
    """D1; what cannot be read is told with the first, after a resumption too."""
    feed = fed(disk, batch=5)
    order, z = video.Order(21, 3), next(feed.X.batches([np.arange(21)]))[1]
    for start, world in ((0, 1), (7, 2)):
        for rank in range(world):
            feed.run.rank, feed.run.world = rank, world
            batches = list(feed.loader(start, 12))
            assert len(batches) == 12 - start
            for step, (batch,) in enumerate(batches, start):
                first = 5 * (step * world + rank)
                naive = sorted(order[p][0] for p in range(first, first + 5))
                places, seen = feed.inputs(batch)
                assert places.tolist() == naive and torch.equal(seen, z[naive])
                assert batch["bad"] == (list(feed.learned.bad.items()) if step == start else [])


def test_nothing_to_learn_from(disk):
    for key, found in disk.there.items():
        disk.there[key] = replace(found, counts=np.zeros_like(found.counts))
        disk.there[key].bad.update(dict.fromkeys(range(len(found.counts)), "gone"))
    with pytest.raises(UserError, match="no training video that all experts can read"):
        fed(disk)


# ---- figures ---------------------------------------------------------------------------------------


def naive_figures(probs, labels, bad):
    """Percentages; the rank of a class is how many have more; mAP from each class's list of all videos."""
    n, K = probs.shape
    ranks = [sum(p > probs[i, labels[i]] for p in probs[i]) for i in range(n)]
    hits = {k: sum(rank < k and i not in bad for i, rank in enumerate(ranks)) for k in (1, 5)}
    precisions = []
    for k in range(K):
        ranked, right, mine = sorted(range(n), key=lambda i: -probs[i, k]), 0, []
        for place, i in enumerate(ranked, 1):
            if labels[i] == k:
                right += 1
                mine.append(right / place)
        if mine:
            precisions.append(sum(mine) / len(mine))
    mean = sum(precisions) / len(precisions)
    return {"top1": 100 * hits[1] / n, "top5": 100 * hits[5] / n, "mAP": 100 * mean}


def test_figures_match_their_definitions():
    probs, labels = random(40, 9, scale=2.0).softmax(1).numpy(), np.arange(40) ** 2 % 8  # of class 8 is none
    probs[[3, 17]] = 0
    bad = {3: "no frames", 17: "html"}
    found = jedi.figures(Scores(probs, np.zeros(40), np.ones(40), labels, bad))
    assert found == pytest.approx(naive_figures(probs, labels, bad))


def test_map_by_hand():
    """Class 0: its videos are first and third, (1 + 2/3) / 2; class 1: its video is first."""
    probs = np.array([[0.9, 0.6], [0.8, 0.7], [0.3, 0.1]], np.float32)
    scores = Scores(probs, np.zeros(3), np.ones(3), np.array([0, 1, 0]), {})
    assert jedi.figures(scores)["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)


def test_table_2(tmp_path, capsys):
    def row(*numbers):
        return [dict(zip(("top1", "top5", "mAP"), numbers[k : k + 3], strict=True)) for k in (0, 3)]

    table = {"expert": row(73.81, 93.55, 42.83, 73.6, 93.66, 61.27),
             "student": row(81.561, 95, 82, 75, 93, 76), "teacher": row(88, 97, 90, 78, 94, 79)}  # fmt: skip
    jedi.show_table(SimpleNamespace(say=print, main=True, out=tmp_path), ["activitynet", "hmdb51"], table)
    rows = list(csv.reader(open(tmp_path / "table.csv")))
    assert rows[0] == ["", "activitynet top1", "activitynet top5", "activitynet mAP",
                       "hmdb51 top1", "hmdb51 top5", "hmdb51 mAP"]  # fmt: skip
    assert rows[1] == ["expert", "73.81", "93.55", "42.83", "73.60", "93.66", "61.27"]
    assert [row[:2] for row in rows[2:]] == [["student", "81.56"], ["teacher", "88.00"]]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["activitynet", "expert", "student", "teacher"]
    assert len({len(line) for line in said}) == 1


@pytest.mark.parametrize("chunk", [4096, 2])
def test_measure_tests_students_and_teachers(chunk, monkeypatch):
    """In pieces as at once; the teachers may be those of other students."""
    monkeypatch.setattr(jedi, "CHUNK", chunk)
    joint, elder = (joint_of(dropout=0.75, neurons=1) for _ in range(2))
    stirred(elder, seed=7).eval()
    tested = [jedi.Tested(source_of("abc"[i], i, 4, 5, K), np.arange(5), {})
              for i, K in enumerate(CLASSES)]  # fmt: skip
    tested[1] = replace(tested[1], good=np.array([0, 3]), bad=dict.fromkeys((1, 2, 4), "bad"))
    Z = [random(len(mine.good), 14, seed=30 + i) for i, mine in enumerate(tested)]
    for other in (joint, elder):
        tests = [(mine, z.clone) for mine, z in zip(tested, Z, strict=True)]
        found = jedi.measure(joint, other, tests)
        assert joint.training and len(found) == 3
        for i, (mine, its) in enumerate(zip(tested, found, strict=True)):
            m = naive_joint(joint, "adjusted", Z[i])[0][i]
            e = naive_joint(other, "adjusted", Z[i])[1][i]
            for who, x in (("student", m), ("teacher", e)):
                assert np.allclose(its[who].probs[mine.good], x.softmax(1).detach(), atol=1e-5)
                assert its[who].bad == mine.bad


# ---- command line ----------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    """Sec. 4.4."""
    args = parsed("--data hmdb51,ucf101")
    assert (args.alpha, args.beta, args.gamma, args.temperature) == (1, 1, 0.4, 1)
    assert (args.optimizer, args.lr, args.weight_decay) == ("adamw", 1e-5, 3e-3)
    assert args.lr_batch == args.batch == 512  # D1
    assert (args.epochs, args.burn_in) == (500, 25)
    assert (args.hidden, args.adjust_dropout, args.neurons) == (256, 0.75, 10)
    assert (args.student_loss, args.teacher_loss, args.teacher_input) == ("ce", "hinge", "adjusted")
    assert (args.distill, args.ratio, args.holdout, args.alternate) == ("all", 1.0, 0.0, 0)


@pytest.mark.parametrize("names, recipe", [
    (["toy:a", "toy:b"], "toy"), (["toy:a", "/x/weizmann"], "weizmann"),
    (["toy:a", "toy:b", "toy:c", "weizmann/"], "weizmann"), (["toy:a", "ucf101"], None),
    (["ucf101", "/x/weizmann", "toy"], None), (["hmdb51", "ucf101"], None),
])  # fmt: skip
def test_the_recipe_does_not_depend_on_the_order_of_the_data_sets(names, recipe, library, capsys):
    epochs, sizes = (100, {"toy": 40, "weizmann": 64}[recipe]) if recipe else (500, 224)
    for order in permutations(names):
        args = parsed(f"--data {','.join(order)}")
        assert (args.recipe, args.epochs, args.size) == (recipe, epochs, sizes)
        jedi.load_sources(args, SAID)
        assert f"recipe: {recipe or 'none'}" in capsys.readouterr().out


def test_one_expert_and_one_network_for_all_or_for_each():
    args = parsed("--data toy:a,toy:b --expert e --net tsm10")
    assert (args.expert, args.net) == (["e"] * 2, ["tsm10"] * 2)
    args = parsed("--data hmdb51,ucf101 --expert e f --net tsm10 tsn50")
    assert (args.expert, args.net) == (["e", "f"], ["tsm10", "tsn50"])
    args = parsed("")
    assert args.expert == ["supervised"] * 3 and len(set(args.net)) == 3
    line = "--data hmdb51,ucf101 --expert supervised f --net tsm10 tsn50 --root a,b --extra k400"
    one = jedi.of_source(parsed(line), 1)
    assert (one.data, one.root, one.expert, one.net, one.extra) == ("ucf101", "b", ["f"], ["tsn50"], None)


@pytest.mark.parametrize("line, word", [
    ("--data one,two --root /a", "--root has a value for each of one, two, with commas, not /a"),
    ("--data one --root /a,/b", "--root has a value for each of one, with commas, not /a,/b"),
    ("--data one --extra two,more --extra_root /a", "--extra_root has a value for each of two, more"),
    ("--data one,two --labelled_list l.txt", "--labelled_list has a value for each of one, two"),
    ("--data one,a/one", "each data set once, not as one,a/one"), ("--data one,", "once, not as one,"),
    ("--data one,two --extra two", "each data set once"), ("--data a/experts", "each data set once"),
    ("--data hmdb51 --distill ssv2", "--distill is all, none, own, or one of hmdb51, not ssv2"),
    ("--data hmdb51,ucf101 --expert a b c", "--expert has one value, or one for each of hmdb51,ucf101, not"),
    ("--net tsm10 tsn50", "--net has one value, or one for each of toy:a,toy:b,toy:c, not 2"),
    ("--net tsm11", "no backbone tsm11"), ("--batch 0", "--batch"), ("--temperature 0", "--temperature"),
    ("--alternate 2 --finetune", "--alternate"), ("--alternate -1", "--alternate"),
    ("--finetune --stage extract", "--stage extract"),
    ("--temperature nan", "--temperature"), ("--holdout 1.5", "--holdout"), ("--hidden 0", "--hidden"),
    ("--adjust_dropout -0.1", "--adjust_dropout"), ("--gamma -1", "--gamma"), ("--neurons -1", "--neurons"),
    ("--jitter 30 20", "--jitter"), ("--views 0 1", "--views"), ("--views 1 2", "--views"),
    ("--teacher_input base+predictions", "--teacher_input"), ("--student_loss mse", "--student_loss"),
    ("--memory -1", "--memory"), ("--extra_videos 0", "--extra_videos"), ("--epochs inf", "--epochs"),
    ("--stage test", "--stage"), ("--ratio 0", "--ratio"), ("--ratio 0.5 --per_class 2", "--per_class"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit) as end:
        parsed(line)
    said = str(end.value)
    assert said.startswith("jedi: ") and word in said and said.endswith("(2)") and "\n" not in said


def test_how_a_published_network_sees_a_video():
    eight = jedi.published_recipe("tsn50", "AN.pth", "8")
    assert (eight.frames, eight.clips, eight.uniform) == (8, 0, 1)
    dense = jedi.published_recipe("tsm50", "K.pth", "8x4")
    assert (dense.frames, dense.stride, dense.clips, dense.uniform) == (8, 4, 10, 0)
    for recipe in (eight, dense):
        assert (recipe.mean, recipe.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    swin = jedi.published_recipe("swin3d_b", "kinetics", "")
    assert swin == Recipe(**backbones.published_input("swin3d_b", "kinetics")) and swin.frames == 32
    assert jedi.published_recipe("swin3d_b", "kinetics", "16x2").frames == 16


@pytest.mark.parametrize("clip", ["", "eight", "8x4x2", "x4", "8x", "0", "8x0", "-8", "8 4", "8.5", "²"])
def test_a_network_that_is_no_model_must_say_what_it_sees(clip):
    with pytest.raises(UserError, match="--expert tsn50:AN.pth must say what it sees: :8 is 8 segments"):
        jedi.published_recipe("tsn50", "AN.pth", clip)


def test_runs_of_a_command(tmp_path):
    def runs(line):
        return [(stage, Path(out).relative_to(tmp_path).as_posix()) for stage, _, out in
                jedi.runs_of(parsed(f"--data toy:a,toy:b --out {tmp_path} {line}"))]  # fmt: skip

    extract, train = ("extract", "cache"), ("train", ".")
    assert runs("") == [("experts", "experts/toy-a"), ("experts", "experts/toy-b"), extract, train]
    assert runs("--expert supervised e.pt") == [("experts", "experts/toy-a"), extract, train]
    assert runs("--expert e.pt") == [extract, train] and runs("--expert e.pt --finetune") == [train]
    assert runs("--stage extract") == [extract] and runs("--stage train") == [train]
    assert runs("--stage experts --expert e.pt supervised") == [("experts", "experts/toy-b")]
    assert [stage for stage, _ in runs("--eval m.pt")] == ["eval"]


# ---- runs on videos --------------------------------------------------------------------------------

TINY = ("--hidden 4 --epochs 4 --burn_in 1 --batch 4 --lr_batch 4 --lr 0.02 --neurons 4 --max_bad 0.5 "
        "--log_every 1 --eval_every 1 --workers 0")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """So few views go through a network together that even a short list has several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "VIEWS_PER_BATCH", 4)
        yield


@pytest.fixture(scope="module")
def world(make, tmp_path_factory):
    """Two data sets, of each a training and a test video that cannot be read or none, and two experts."""
    root = tmp_path_factory.mktemp("world")
    for s, (name, K, counts) in enumerate((("one", 3, (5, 4)), ("two", 2, (4, 3)))):
        (root / name).mkdir()
        for part, n in zip(("train", "test"), counts, strict=True):
            names = [f"{part}{i}.mp4" for i in range(n)]
            for i, file in enumerate(names):  # another size is another picture
                side = 20 + 2 * (n * s + 9 * (part == "test") + i)
                make.write(root / name / file, frames=8 + i, size=(side, 16 + 2 * s))
            lines = "".join(f"{file} {i % K}\n" for i, file in enumerate(names))
            (root / name / f"{part}.txt").write_text(lines)
        (root / name / "classes.txt").write_text("".join(f"{name} {k}\n" for k in range(K)))
    for file in ("one/train1.mp4", "one/test2.mp4"):
        (root / file).write_text("<html>404</html>")
    recipes = [Recipe(4, 1, 2, 1, 16, 16), Recipe(2, 1, 0, 3, 16, 16, uniform=1, average="logits")]
    nets = ("one", "resnet3d10-small", 3), ("two", "tsm10-small", 2)
    for (name, net, K), recipe in zip(nets, recipes, strict=True):
        made, net = small(net, K, seed=K)
        (root / "experts" / name).mkdir(parents=True)
        classes = [f"{name} {k}" for k in range(K)]
        evaluate.save_model(root / "experts" / name / "model.pt", net, made, classes, recipe)
    return root


def words(world, out, more=""):
    sets = f"--data {world}/one,{world}/two --expert {world}/experts"
    return ["jedi.py", *f"{sets} --out {out} {TINY} {more}".split()]


def start(world, out, more=""):
    """A command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", words(world, out, more))
        jedi.main()
    return out


def refused(world, out, more=""):
    with pytest.raises(SystemExit) as end:
        start(world, out, more)
    dist.destroy_process_group()
    said = str(end.value)
    assert said.startswith("jedi: ") and said.endswith("(2)") and "\n" not in said
    return said


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of a run of all stages."""
    return start(world, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(tmp_path):
    with Run("test", tmp_path / "run", {}) as run:
        yield run


def table_of(out):
    header, *rows = csv.reader(open(out / "table.csv"))
    return {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}


def result_of(out):
    return json.loads((out / "result.json").read_text())


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_cache_holds_what_experts_see(world, whole):
    """Sec. 4.3, D6: the mean of the test views, of training videos too, and the mean probabilities."""
    data = datasets.load(world / "one")
    for name in ("one", "two"):
        net, _, _, recipe = evaluate.load_model(world / "experts" / name / "model.pt")
        for part in ("train", "test"):
            found = features.load(whole / "cache" / name / f"one_{part}")
            assert list(found.bad) == ([1] if part == "train" else [2])
            videos = data.train if part == "train" else data.test
            views = video.Views(videos, recipe.sample, recipe.view, recipe.short_side)
            for i in np.flatnonzero(found.counts).tolist():
                x = recipe.to_input(views[i]["views"], "cpu")
                assert len(x) == recipe.views > 1
                with torch.no_grad():
                    rows = [torch.cat([net.embed(v[None])[0], net(v[None])[0].softmax(0)]) for v in x]
                row = found.rows[found.first[i]]
                assert np.allclose(row, torch.stack(rows).mean(0), atol=1e-5) and len(row) == len(rows[0])


def test_what_a_run_leaves(world, whole):
    assert sorted(path.name for path in whole.iterdir() if path.suffix != ".pt") == [
        ".lock", "bad_videos.txt", "cache", "config.json", "log.jsonl", "one", "result.json", "table.csv",
        "two"]  # fmt: skip
    assert [line.split("\t")[0] for line in (whole / "bad_videos.txt").read_text().splitlines()] == [
        f"{world}/one/train1.mp4"]  # fmt: skip
    assert (whole / "one" / "labelled.txt").read_text().split()[::2] == [f"train{i}.mp4" for i in range(5)]
    row, table = result_of(whole), table_of(whole)
    assert (row["videos"], row["unreadable"]) == (7, 1)
    for key in ("top1", "top5", "mAP"):
        mean = np.mean([table["student"][f"{name} {key}"] for name in ("one", "two")])
        assert row[key] == pytest.approx(mean, abs=0.01)
    for who in ("expert", "teacher"):
        mean = np.mean([table[who][f"{name} top1"] for name in ("one", "two")])
        assert row[f"{who}_top1"] == pytest.approx(mean, abs=0.01)
    tests = [row for row in rows_of(whole) if row.get("eval") == "quick"]
    steps = [row for row in rows_of(whole) if "lr" in row]
    assert [row["step"] for row in tests] == [0, 2, 4, 6, 8] and len(steps) == 8  # 8 videos, 4 a step
    for name in ("one", "two"):
        assert len({row[f"{name}_expert_mAP"] for row in tests}) == 1  # Fig. 3: a straight line
        assert tests[-1][f"{name}_student_top1"] == pytest.approx(table["student"][f"{name} top1"], abs=0.01)
    assert tests[0]["two_student_mAP"] == tests[0]["two_expert_mAP"]  # D5, as this one averages logits
    assert [row["loss_kd"] > 0 for row in steps] == [False] * 2 + [True] * 6  # an epoch of burn-in
    for row in steps:
        parts = row["loss_m"] + row["loss_e"] + 0.4 * row["loss_kd"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5) and row["lr"] == 0.02


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_students_score_from_video_is_that_from_the_cache(world, whole, run, name):
    model = evaluate.load_model(whole / name / "model.pt")
    net, made, classes, recipe = model
    _, before, _, old = evaluate.load_model(world / "experts" / name / "model.pt")
    assert recipe == replace(old, average="embeddings") and made == before | {"adapter": 4}
    data = datasets.load(world / name)
    scores = evaluate.score(net, data.test, recipe, run)
    found = features.load(whole / "cache" / name / f"{name}_test")
    z = torch.from_numpy(np.array(found.rows))[:, : net.fc.in_features]
    assert net.adapter.up.weight.any() and not torch.allclose(net.adapter(z), z, atol=1e-3)
    p = net.head(z).softmax(1).detach().numpy()
    good = np.flatnonzero(found.counts)
    assert np.allclose(scores.probs[good], p, atol=1e-6) and sorted(scores.bad) == sorted(found.bad)
    assert np.ptp(p, 0).max() > 1e-4  # or any video's would do
    for key, value in jedi.figures(scores).items():
        assert table_of(whole)["student"][f"{name} {key}"] == pytest.approx(value, abs=0.006)
    said = list(csv.DictReader(open(whole / name / "predictions.csv")))
    for i, row in enumerate(said):
        assert bool(row["unreadable"]) == (i not in good)
        if i in good:
            best = int(scores.probs[i].argmax())
            assert row["top1"] == f"{classes[best]}:{float(row['top1'].split(':')[1]):.6f}"
            assert float(row["top1"].split(":")[1]) == pytest.approx(scores.probs[i, best], abs=2e-6)
    predicted = dict(evaluate.predict(model, data.test.path(int(good[-1]))))
    assert [predicted[k] for k in classes] == pytest.approx(scores.probs[good[-1]].tolist(), abs=1e-6)
    assert (whole / name / "per_class.csv").exists()


def test_one_student_is_tested_alone(world, whole, tmp_path):
    """--eval, with its own views."""
    start(world, tmp_path / "eval", f"--eval {whole}/one/model.pt --data {world}/one --expert supervised")
    row = result_of(tmp_path / "eval")
    assert row["top1"] == pytest.approx(table_of(whole)["student"]["one top1"], abs=0.006)
    assert row["unreadable"] == 1 and row["videos"] == 4


def times(folder):
    """When the files of a run, but for those of each command, were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")
            if path.suffix in (".pt", ".npy", ".npz", ".csv")}  # fmt: skip


def test_the_same_command_is_over(world, whole, capfd):
    before = times(whole)
    assert {"last.pt", "model.pt", "table.csv", "features.npy"} <= {path.name for path in before}
    start(world, whole)
    assert "RESULT script=jedi" in capfd.readouterr().out and times(whole) == before


# ---- the cache -------------------------------------------------------------------------------------


def changed(world, tmp_path, what):
    """The flags of the whole run with its cache, but for one thing, and the folder that does not fit."""
    if what in ("weights", "views", "network"):
        shutil.copytree(world / "experts", tmp_path / "experts")
        path = tmp_path / "experts" / "two" / "model.pt"
        net, made, classes, recipe = evaluate.load_model(path)
        if what == "weights":
            net.layer1[0].bn1.running_mean[0] += 1e-3
        if what == "network":  # with tensors of the same names, without the shift
            made = made | dict(name="tsn10-small")
        recipe = replace(recipe, crops=1) if what == "views" else recipe
        evaluate.save_model(path, net, made, classes, recipe)
        return f"--expert {tmp_path}/experts", "two/one_train"
    if what == "list":
        shutil.copytree(world / "two", tmp_path / "two")
        lines = (tmp_path / "two" / "test.txt").read_text().splitlines()
        (tmp_path / "two" / "test.txt").write_text("\n".join(lines[::-1]) + "\n")
        return f"--data {world}/one,{tmp_path}/two", "one/two_test"
    if what == "half":
        return "--half", "one/one_train"
    return "--expert_epochs 3", ""


@pytest.mark.parametrize("what, word", [("weights", "expert"), ("views", "recipe.crops 3, not 1"),
                                        ("network", "network.name tsm10-small, not tsn10-small"),
                                        ("list", "videos"), ("half", "half False, not True")])  # fmt: skip
def test_a_cache_of_something_else_is_refused(world, whole, tmp_path, what, word):
    more, folder = changed(world, tmp_path, what)
    said = refused(world, tmp_path / "out", f"--stage train --cache {whole}/cache {more}")
    assert f"{whole}/cache/{folder} has other features ({word}" in said
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_cache_of_the_same_is_shared(world, whole, tmp_path):
    more, _ = changed(world, tmp_path, "nothing")
    before = times(whole / "cache")
    start(world, tmp_path / "out", f"--cache {whole}/cache {more}")
    assert times(whole / "cache") == before and not list((tmp_path / "out").rglob("features.npy"))
    assert table_of(tmp_path / "out") == table_of(whole)
    assert (tmp_path / "out/one/predictions.csv").read_text() == (whole / "one/predictions.csv").read_text()


def test_a_sample_of_an_extra_data_set_on_a_shared_cache(world, whole, tmp_path):
    """The cache has the whole list, which serves every number of videos; none is embedded again."""
    before, learned = times(whole / "cache"), []
    more = f"--data {world}/one --extra {world}/two --distill two --stage {{}} --cache {whole}/cache"
    for n in (1, 2, 4):
        start(world, tmp_path / f"{n}", f"{more.format('all')} --extra_videos {n}")
        state = torch.load(tmp_path / f"{n}" / "last.pt", weights_only=True)
        learned.append(state["identity"]["list of two"])
        assert result_of(tmp_path / f"{n}")["videos"] == 4
    assert times(whole / "cache") == before and len(set(map(str, learned))) == 3
    start(world, tmp_path / "own", f"{more.format('extract')} --extra_videos 1 --cache {tmp_path}/cache")
    for name in ("index.npz", "features.npy", "videos.txt"):
        folder = Path("one", "two_train", name)
        assert (tmp_path / "cache" / folder).read_bytes() == (whole / "cache" / folder).read_bytes()


def test_experts_of_other_videos(world, whole, tmp_path, capfd):
    """A supervised expert of this run is refused; one of another run may know others, and it is said."""
    for name in ("one", "two"):
        shutil.copytree(world / "experts" / name, tmp_path / "out" / "experts" / name)
        (tmp_path / "out" / "experts" / name / "labelled.txt").write_text("train0.mp4 0\n")
    said = refused(world, tmp_path / "out", "--stage train --expert supervised")
    assert "out/experts/one/model.pt has learned from other videos than those with a label here" in said
    folder = tmp_path / "out" / "experts"
    start(world, tmp_path / "other", f"--stage train --cache {whole}/cache --expert {folder}")
    printed = capfd.readouterr().out
    assert f"{folder}/two/model.pt has learned from other videos" in printed and "RESULT" in printed


def test_too_many_videos_that_cannot_be_read(world, tmp_path):
    """After mending, what is kept of them must go."""
    said = refused(world, tmp_path / "out", "--stage extract --max_bad 0.1")
    assert "1 of 5 videos of one cannot be read, more than --max_bad 0.1" in said
    assert said.endswith(f"when they are mended, delete {tmp_path}/out/cache/one/one_train (2)")


def test_a_cache_that_is_not_there(world, tmp_path):
    said = refused(world, tmp_path / "out", f"--stage train --cache {tmp_path}/cache")
    assert f"{tmp_path}/cache/one/one_train has no complete embeddings: --stage extract makes them" in said


def test_embeddings_in_half_precision(world, whole, tmp_path):
    start(world, tmp_path / "out", "--half")
    for name in ("one/one_train", "two/one_test"):
        half, full = (features.load(out / "cache" / name) for out in (tmp_path / "out", whole))
        assert half.rows.dtype == np.float16 and np.array_equal(half.rows, full.rows.astype(np.float16))
    assert evaluate.load_model(tmp_path / "out" / "one" / "model.pt")[0].fc.weight.dtype == torch.float32


RANKS = """
import os, signal
import jedi
from common import evaluate, features

evaluate.VIEWS_PER_BATCH, features.EVERY = 4, 0
left, write = int(os.environ["PARTS"]), features._write

def counted(*args):
    global left
    write(*args)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

features._write = counted
jedi.main()
"""


def extracted_by(world, out, ranks, parts=-1, status=0):
    """Stage 2 in new processes, killed after a number of part files; what is then on disk."""
    out.mkdir()
    (out / "ranks.py").write_text(RANKS)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PARTS": str(parts)}
    call = [sys.executable, out / "ranks.py", *words(world, out, "--stage extract")[1:]]
    process = forks.start(call, HERE, env, ranks)
    said = process.communicate()
    assert process.returncode == status, said
    return files_of(out)


def files_of(out):
    return {path.relative_to(out / "cache").as_posix(): path.read_bytes()
            for path in (out / "cache").glob("*/*/*") if path.is_file()}  # fmt: skip


def test_two_ranks_leave_the_same_cache(world, whole, tmp_path):
    found = extracted_by(world, tmp_path / "out", 2)
    assert len(found) == 2 * 4 * 4 and found == files_of(whole)


def test_killed_while_extracting(world, whole, tmp_path, capfd):
    """After the part files of 5 training videos, in blocks of two, and the first of 4 test videos."""
    left = extracted_by(world, tmp_path / "out", None, 4, status=-signal.SIGKILL)
    assert sorted(left) == [f"one/{name}" for name in (
        "one_test/features.json", "one_test/part-000000000.npz", "one_test/videos.txt",
        "one_train/features.json", "one_train/features.npy", "one_train/index.npz",
        "one_train/videos.txt")]  # fmt: skip
    said = refused(world, tmp_path / "out", "--stage train")
    assert "two/one_train has no complete embeddings: --stage extract makes them" in said
    capfd.readouterr()
    start(world, tmp_path / "out")
    said = capfd.readouterr().out
    assert "one_test has the features of 2 " in said
    assert files_of(tmp_path / "out") == files_of(whole)
    assert table_of(tmp_path / "out") == table_of(whole)


# ---- other ways to train ---------------------------------------------------------------------------


def test_held_out_videos_are_tested_and_not_learned(world, tmp_path):
    start(world, tmp_path / "out", "--holdout 0.4")
    names = {"one": 5, "two": 4}
    for name, n in names.items():
        tested = [row["video"] for row in csv.DictReader(open(tmp_path / "out" / name / "predictions.csv"))]
        learned = (tmp_path / "out" / name / "labelled.txt").read_text().split()[::2]
        assert len(tested) == 2 and sorted([*tested, *learned]) == [f"train{i}.mp4" for i in range(n)]
    caches = {path.parent.name for path in (tmp_path / "out").glob("cache/*/*/index.npz")}
    assert caches == {"one_train", "two_train"}


def test_given_experts_that_know_the_held_out_videos_are_named(world, tmp_path, capfd):
    """An expert without a list of what it has learned may know them; one whose list has none does not."""
    more = "--holdout 0.4 --epochs 0.5"
    start(world, tmp_path / "a", more)
    assert result_of(tmp_path / "a")["held_out_known_to"] == "one,two"
    assert "the expert of two may have learned the held-out videos" in capfd.readouterr().out
    for name in ("one", "two"):
        shutil.copytree(world / "experts" / name, tmp_path / "experts" / name)
        shutil.copy(tmp_path / "a" / name / "labelled.txt", tmp_path / "experts" / name)
    start(world, tmp_path / "b", f"{more} --cache {tmp_path}/a/cache --expert {tmp_path}/experts")
    assert "held_out_known_to" not in result_of(tmp_path / "b")
    lines = "".join(f"train{i}.mp4 {i % 2}\n" for i in range(4))
    (tmp_path / "experts/two/labelled.txt").write_text(lines)
    start(world, tmp_path / "c", f"{more} --cache {tmp_path}/a/cache --expert {tmp_path}/experts")
    assert result_of(tmp_path / "c")["held_out_known_to"] == "two"
    start(world, tmp_path / "d", f"--epochs 0.5 --expert {tmp_path}/experts")
    assert "held_out_known_to" not in result_of(tmp_path / "d")


def test_students_and_teachers_by_turns(world, whole, tmp_path, monkeypatch):
    """D11: two rounds, of two steps of teachers and two of students each, who learn of the elder ones."""
    halves, steps, begin_half, step_loss = [], [], jedi.begin_half, jedi.step_loss
    batches, inputs = [], jedi.FromDisk.inputs

    def begun(joint, elder, optimizer, half):
        before = copies(joint)
        begin_half(joint, elder, optimizer, half)
        assert half == len(halves)
        halves.append((joint, elder, half % 2 == 0, before, copies(joint), copies(elder)))

    def stepped(m, e, labels, own, y, w, weights, args):
        joint, elder, teachers = halves[-1][:3]
        steps.append((weights, copies(joint), copies(elder), labels))
        if not teachers:
            z = batches[-1][1]
            assert alike(labels, elder.logits(z)[1])
            assert alike(labels, joint.logits(z)[1]) == (len(steps) == 3)  # the elder had not learned yet
        return step_loss(m, e, labels, own, y, w, weights, args)

    monkeypatch.setattr(jedi, "begin_half", begun)
    monkeypatch.setattr(jedi.FromDisk, "inputs", lambda *args: batches.append(inputs(*args)) or batches[-1])
    monkeypatch.setattr(jedi, "step_loss", stepped)
    start(world, tmp_path / "out", f"--alternate 2 --cache {whole}/cache --burn_in 3")
    assert len(halves) == 4
    begin = halves[0][4]
    for k, (_, _, teachers, before, now, elder) in enumerate(halves):
        mine, others = (("teachers.",), STUDENTS) if teachers else (STUDENTS, ("teachers.",))
        (weights, first, _, labels), (_, second, elder_then, _) = steps[2 * k : 2 * k + 2]
        assert equal(now, begin, *mine) and equal(now, before, *others)
        assert equal(first, now) and equal(second, now, *others) and not equal(second, now, *mine)
        assert weights == ((0, 1, 0) if teachers else (1, 0, 0.4)) and (labels is None) == teachers
        assert equal(elder_then, elder) and (teachers or equal(elder, before))
    last = {row["step"]: row for row in rows_of(tmp_path / "out") if "lr" in row}
    assert [last[step]["loss_kd"] > 0 for step in range(1, 9)] == ([False] * 2 + [True] * 2) * 2
    joint, elder = halves[-1][:2]
    saved, table = evaluate.load_model(tmp_path / "out" / "two" / "model.pt")[0], table_of(tmp_path / "out")
    assert torch.equal(saved.fc.weight, joint.heads[1].weight)
    assert not equal(copies(joint), copies(elder), *STUDENTS)
    one, two = (features.load(whole / "cache" / name / "two_test") for name in ("one", "two"))
    z = torch.from_numpy(np.concatenate([one.rows[:, : elder.widths[0]], two.rows[:, : elder.widths[1]]], 1))
    right = elder.logits(z)[1][1].argmax(1).numpy() == datasets.load(world / "two").test.labels
    assert table["teacher"]["two top1"] == pytest.approx(100 * right.mean(), abs=0.01)


def test_teachers_figures_are_of_those_who_learn(world, whole, tmp_path):
    """In a half round of teachers these change, in one of students they rest."""
    more = "--alternate 1 --epochs 20 --lr 0.05 --neurons 1000"
    start(world, tmp_path / "out", f"{more} --cache {whole}/cache")
    tests = [row for row in rows_of(tmp_path / "out") if row.get("eval") == "quick"]
    seen = [tuple(value for key, value in row.items() if "_teacher_" in key) for row in tests]
    assert [row["step"] for row in tests] == [*range(0, 41, 2)]
    assert len(set(seen[:11])) > 1 and len(set(seen[10:])) == 1


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A run that trains the encoders as well, of three steps; what its batches looked like."""
    seen, inputs = [], jedi.FromVideo.inputs

    def watched(self, batch):
        found = inputs(self, batch)
        seen.append((batch["index"].tolist(), found[0].tolist(), [x.shape for x in found[1]]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jedi.FromVideo, "inputs", watched)
        patch.setattr(evaluate, "VIEWS_PER_BATCH", 4)
        more = "--finetune --batch 4 --epochs 1 --burn_in 0.34 --lr 0.01"
        return start(world, tmp_path_factory.mktemp("tuned") / "run", more), seen


def test_batches_of_clips(tuned):
    _, seen = tuned
    assert len(seen) == 3  # 9 videos, of which one cannot be read
    for index, places, shapes in seen:
        assert places == sorted(index) and shapes == [(4, 3, 4, 16, 16), (4, 3, 2, 16, 16)]
    assert not (tuned[0] / "cache").exists()
    assert "train1.mp4\t" in (tuned[0] / "bad_videos.txt").read_text()


@pytest.mark.parametrize("name", ["one", "two"])
def test_encoders_that_learn(world, tuned, run, name):
    """D12: their weights do, their batch norms' statistics do not; the test is that of model.pt."""
    out, _ = tuned
    net, _, classes, recipe = evaluate.load_model(out / name / "model.pt")
    expert = evaluate.load_model(world / "experts" / name / "model.pt")[0].state_dict()
    now = net.state_dict()
    assert {key.split(".")[0] for key in now.keys() - expert.keys()} == {"adapter"}
    for key, value in expert.items():
        still = "running" in key or "batches" in key
        assert torch.equal(now[key], value) == still, key
    scores = evaluate.score(net, datasets.load(world / name).test, recipe, run)
    for key, value in jedi.figures(scores).items():
        assert table_of(out)["student"][f"{name} {key}"] == pytest.approx(value, abs=0.006)
    for i, row in enumerate(csv.DictReader(open(out / name / "predictions.csv"))):
        if i in scores.bad:
            assert row["top1"] == "" and row["unreadable"] == scores.bad[i]
        else:
            said, p = row["top1"].rsplit(":", 1)
            assert said == classes[scores.probs[i].argmax()]
            assert float(p) == pytest.approx(scores.probs[i].max(), abs=2e-6)
    assert result_of(out)["unreadable"] == 1


def test_signal_during_the_experts_test_of_a_run_that_has_learned(world, tmp_path, monkeypatch, capfd):
    """--finetune: the same command has the last test still to do."""
    score, more = evaluate.score, "--finetune --epochs 0"

    def signalled(net, videos, recipe, run, *args):
        run.stop = True
        return score(net, videos, recipe, run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(jedi, "finish", lambda *args: None)
        start(world, tmp_path / "out", more)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score", signalled)
        start(world, tmp_path / "out", more)
    assert "stopped by a signal during the test" in capfd.readouterr().out
    assert (tmp_path / "out" / "last.pt").exists() and not (tmp_path / "out" / "result.json").exists()


def test_encoders_get_gradients_and_their_batch_norms_rest():
    nets = [small(K=3)[1], small("tsm10-small", K=2, seed=1)[1]]
    joint = jedi.Joint([expert_of(net) for net in nets], 4, 0.75, "adjusted", 4)
    model = jedi.EndToEnd(nets, stirred(joint), nullcontext).train()
    assert joint.training and not any(module.training for net in nets for module in net.modules())
    before = [[b.clone() for b in net.buffers()] for net in nets]
    x = [random(3, 3, 4, 16, 16), random(3, 3, 2, 16, 16, seed=1)]
    own, y, w = [slice(0, 2), slice(2, 3)], torch.tensor([0, 2, 1]), torch.ones(3, 2)
    out = model(x, own)
    z = torch.cat([nets[0].embed(x[0]), nets[1].embed(x[1])], 1)
    assert alike(out[2], joint.logits(z)[1])
    jedi.step_loss(*out, own, y, w, (1, 1, 1), losses())[0].backward()
    for k, net in enumerate(nets):
        for name, p in net.named_parameters():
            assert (p.grad is None) == name.startswith("fc.") == (not p.requires_grad)
        assert next(net.parameters()).grad.any()
        assert len(before[k]) > 9 and alike(net.buffers(), before[k], 0)
    assert model(x, own, distill=False)[2] is None
    assert not model.eval().joint.training


def test_videos_and_clips_of_a_batch_are_sorted_alike():
    """Each clip carries its video's place as its grey; one place is there twice, in the loader's order."""
    index = torch.tensor([5, 2, 9, 2])
    grey = torch.stack([torch.full((2, 3, 4, 4), 10 * int(k), dtype=torch.uint8) for k in index])
    views = [grey.clone(), grey + 1]
    views[0][3] += 5
    recipes = [Recipe(2, 1, mean=(0.0,), std=(1 / 255,)), Recipe(2, 1, mean=(0.0,), std=(1 / 255,))]
    feed = SimpleNamespace(recipes=recipes, run=SimpleNamespace(device="cpu"))
    places, (x, other) = jedi.FromVideo.inputs(feed, {"index": index, "views": views})
    assert isinstance(places, np.ndarray) and places.tolist() == [2, 2, 5, 9] and x.shape == (4, 3, 2, 4, 4)
    assert x[:, 0, 0, 0, 0].round().tolist() == [20, 25, 50, 90]
    assert other[:, 2, 1, 3, 3].round().tolist() == [21, 21, 51, 91]


def test_random_clips_of_all_experts():
    """A window for each recipe, dense or of segments; crops of each size; one flip for all of a video."""
    recipes = [Recipe(4, 3, clips=2), Recipe(5, 1, clips=0, uniform=1)]
    starts = set()
    for seed in range(50):
        dense, segments = jedi.random_windows(range(30), np.random.default_rng(seed), recipes)
        assert np.diff(dense).tolist() == [3, 3, 3] and 0 <= dense[0] <= 20
        assert [i // 6 for i in segments] == [0, 1, 2, 3, 4]
        starts.add(int(dense[0]))
    assert len(starts) > 10
    ramp = torch.arange(40, dtype=torch.uint8).expand(2, 3, 30, 40)
    mirrored = set()
    for seed in range(30):
        torch.manual_seed(seed)
        crops = jedi.random_crops([ramp, ramp], [16, 20], [(20, 24), (24, 30)], flip=True)
        assert [tuple(crop.shape) for crop in crops] == [(2, 3, 16, 16), (2, 3, 20, 20)]
        ways = {bool(crop[0, 0, 0, 0] > crop[0, 0, 0, -1]) for crop in crops}
        assert len(ways) == 1
        mirrored |= ways
        torch.manual_seed(seed)
        crops = jedi.random_crops([ramp, ramp], [16, 20], [(20, 24), (24, 30)], flip=False)
        assert all(crop[0, 0, 0, 0] < crop[0, 0, 0, -1] for crop in crops)
    assert mirrored == {False, True}

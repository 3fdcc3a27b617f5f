"""jedi.py: its equations (values by hand, plain loops from the paper, where gradients go), data sets and
labels, embeddings, scores, its command line, and runs on videos."""

import csv
import json
import math
import os
import shutil
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import jedi
from common import backbones, evaluate
from common.clips import Views
from common.data import Data, Videos, load_data
from common.errors import UserError
from common.io import features
from common.io.features import Features
from common.io.models import digest_of_model, load_model, save_model
from common.modality import Recipe
from common.run import Run
from common.tools.predict import predict

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


# A batch: (data set, label or None). Of data set 1 no video has a label, number 3 has no expert.
CLASSES = 4, 3, 2
BATCH = [(0, 3), (2, 1), (0, 0), (1, None), (0, None), (3, None), (0, 0), (1, None), (2, 0)]
OWN = [torch.tensor(at, dtype=torch.int64) for at in ([0, 2, 6], [], [1, 8])]
Y = torch.tensor([-1 if y is None else y for _, y in BATCH])
SIZES = 30, 60, 10


def naive_w(i, j, sizes=SIZES):
    """Eq. 2."""
    return 1.0 if i == j else sizes[j] / sum(sizes)


def naive_cls(kind, row, label):
    if kind == "ce":
        return -math.log(softmax(row)[label])
    if kind == "hinge":  # Weston and Watkins, over the number of classes (D2)
        return sum(max(0.0, 1 - row[label] + row[k]) for k in range(len(row)) if k != label) / len(row)
    return sum(max(0.0, 1 - (1 if k == label else -1) * row[k]) for k in range(len(row)))  # ovr


def naive_step(m, e, weights, T=1.0, teacher="hinge", batch=BATCH):
    """Eq. 1 of one video after the other; m, e: logits of students and teachers, (B, K_j) for each."""
    total, terms = 0.0, [0.0, 0.0, 0.0]
    for x, (i, label) in enumerate(batch):
        if label is not None:
            terms[0] += naive_cls("ce", m[i][x].tolist(), label)
            terms[1] += naive_cls(teacher, e[i][x].tolist(), label)
        for j in range(len(CLASSES)):
            p = softmax([v / T for v in e[j][x].tolist()])
            terms[2] += naive_w(i, j) * cross_entropy(p, softmax([v / T for v in m[j][x].tolist()]))
    for factor, term in zip(weights, terms, strict=True):
        total += factor * term
    return total / len(batch), [term / len(batch) for term in terms]


def logits(seed):
    return [random(len(BATCH), K, seed=seed + k, scale=2.0) for k, K in enumerate(CLASSES)]


def settings(**more):
    defaults = dict(alpha=1.0, beta=1.0, temperature=1.0, teacher_loss="hinge", distill="all", hidden=4,
                    adjust_dropout=0.0, teacher_input="adjusted", neurons=1e9)  # fmt: skip
    return Namespace(**defaults | more)


W = torch.tensor([[naive_w(i, j) for j in range(3)] for i, _ in BATCH])


def step(m, e, gamma, own=OWN, y=Y, **more):
    """train_step of logits that do not depend on the embeddings."""

    def joint(z, own, distill):
        return m, [x[at] for x, at in zip(e, own, strict=True)], e if distill else None

    return jedi.train_step(joint, torch.zeros(len(BATCH), 2), own, y, W, gamma, settings(**more))


@pytest.mark.parametrize("teacher", ["ce", "hinge", "ovr"])
def test_train_step_matches_naive_loop_over_videos(teacher):
    m, e = logits(0), logits(10)
    found, terms = step(m, e, 0.3, alpha=1.5, beta=0.7, temperature=2.0, teacher_loss=teacher)
    total, naive = naive_step(m, e, (1.5, 0.7, 0.3), 2.0, teacher)
    assert found.item() == pytest.approx(total, rel=1e-5)
    assert list(terms) == ["loss_m", "loss_e", "loss_kd"]
    assert [term.item() for term in terms.values()] == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("gamma, distill", [(0, "all"), (0.4, "none")])
def test_train_step_without_distillation(gamma, distill):
    m, e = logits(0), logits(10)
    found, terms = step(m, e, gamma, distill=distill)
    assert found.item() == pytest.approx(naive_step(m, e, (1, 1, 0))[0], rel=1e-5)
    assert terms["loss_kd"].item() == 0


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


@pytest.mark.parametrize("distill, factors", [
    ("all", [[1, 1], [1, 1], [1, 1]]), ("none", [[0, 0], [0, 0], [0, 0]]), ("own", [[1, 0], [0, 1], [0, 0]]),
    ("ucf101", [[0, 0], [1, 1], [0, 0]]), ("k400", [[0, 0], [0, 0], [1, 1]]),
])  # fmt: skip
def test_what_is_distilled(distill, factors):
    """Sec. 5.2: all data sets, none, each student's own, or the videos of one, which may lack an expert."""
    w = random(3, 2)
    assert torch.equal(jedi.distilled(w, distill, ["hmdb51", "ucf101", "k400"]), w * torch.tensor(factors))


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


@pytest.mark.parametrize("K, d, k, p", [
    (200, 7168, 10, 0.721), (51, 7168, 10, 0.929), (400, 7168, 10, 0.442), (101, 7168, 10, 0.859),
    (3, 60, 5, 0.75), (717, 7168, 10, 0), (400, 7168, 100, 0),
])  # fmt: skip
def test_eq4_of_the_papers_data_sets_by_hand_and_never_below_0(K, d, k, p):
    assert jedi.teacher_dropout(K, d, k) == pytest.approx(p, abs=5e-4)


# ---- distillation ----------------------------------------------------------------------------------


def test_distillation_loss_by_hand():
    """Labels (1/2, 1/2), student (1/4, 3/4): 1/2 log 4 + 1/2 log 4/3."""
    m = torch.tensor([[0.0, math.log(3.0)]])
    by_hand = (math.log(4) + math.log(4 / 3)) / 2
    assert jedi.distillation_loss(m, torch.zeros(1, 2), 1.0).item() == pytest.approx(by_hand, abs=1e-6)
    # T = 2: logits twice as large give the same.
    assert jedi.distillation_loss(2 * m, torch.zeros(1, 2), 2.0).item() == pytest.approx(by_hand, abs=1e-6)


def test_distillation_loss_has_no_gradient_into_the_teacher():
    m, e = random(6, 5).requires_grad_(), random(6, 5, seed=1).requires_grad_()
    jedi.distillation_loss(m, e, 2.0).sum().backward()
    assert e.grad is None
    assert torch.allclose(m.grad, ((m / 2).softmax(1) - (e / 2).softmax(1)).detach() / 2, atol=1e-6)


# ---- students and teachers -------------------------------------------------------------------------


class Headed(nn.Module):
    """Of a network what follows its encoder."""

    name = "headed"

    def __init__(self, D, K, hidden=0):
        super().__init__()
        self.fc = nn.Linear(D, K)
        self.adapter = backbones.Adapter(D, hidden) if hidden else nn.Identity()

    def head(self, z):
        return self.fc(self.adapter(z))

    embed = head


def expert_of(net, path="one.pt", recipe=None, hidden=0):
    return SimpleNamespace(path=path, net=net, build={"adapter": hidden}, recipe=recipe or Recipe(4, 1))


WIDTHS = 6, 5, 3


def experts(hidden=0):
    return [expert_of(stirred(Headed(D, K, hidden), seed=D), hidden=hidden)
            for D, K in zip(WIDTHS, CLASSES, strict=True)]  # fmt: skip


def joint_of(inputs="adjusted", stir=True, **more):
    torch.manual_seed(1)
    joint = jedi.Joint(experts(), settings(teacher_input=inputs, **more))
    return stirred(joint, seed=2) if stir else joint


INPUTS = ["adjusted", "base", "predictions", "adjusted+predictions"]
Z = random(len(BATCH), sum(WIDTHS), seed=5)
E = Z.split(WIDTHS, 1)


def naive_joint(joint, inputs="adjusted", z=Z):
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


def own_of(logits):
    return [x[at] for x, at in zip(logits, OWN, strict=True)]


@pytest.mark.parametrize("inputs", INPUTS)
def test_joint_matches_the_naive_one(inputs):
    joint = joint_of(inputs)
    m, teachers = naive_joint(joint, inputs)
    found = joint(Z, OWN)
    assert alike(found[0], m) and alike(found[1], own_of(teachers)) and alike(found[2], teachers)
    assert alike(joint.predict(E)[0], m) and alike(joint.predict(E)[1], teachers)
    assert joint(Z, OWN, distill=False)[2] is None
    d = {"adjusted": 14, "base": 14, "predictions": 9, "adjusted+predictions": 23}[inputs]
    assert joint.teachers.weight.shape == (9, d)
    assert joint_of(inputs, neurons=2).p == pytest.approx([max(0, 1 - 2 * K / d) for K in CLASSES])


@pytest.mark.parametrize("inputs", INPUTS)
def test_soft_labels_are_without_any_dropout(inputs):
    """D3: neither the teachers' nor the adjustments', in train mode as in eval mode, and detached."""
    joint = joint_of(inputs, adjust_dropout=0.75, neurons=1)
    assert joint.training and max(joint.p) > 0.5
    m, e, soft_labels = joint(Z, OWN)
    naive = naive_joint(joint, inputs)
    assert alike(soft_labels, naive[1]) and not any(x.requires_grad for x in soft_labels)
    assert not alike(m, naive[0], 1e-3) and not alike(e, own_of(naive[1]), 1e-3)
    assert alike(joint.predict(E)[0], naive[0]) and not any(x.requires_grad for x in joint.predict(E)[0])
    m, e, _ = joint.eval()(Z, OWN)
    assert alike(m, naive[0]) and alike(e, own_of(naive[1]))


def test_a_teacher_sees_its_own_videos_alone():
    joint = joint_of()
    before = joint(Z, OWN)[1]
    for x in range(len(BATCH)):
        other = Z.clone()
        other[x] += 1
        for i, (old, new) in enumerate(zip(before, joint(other, OWN)[1], strict=True)):
            assert (old != new).any(1).tolist() == [at == x for at in OWN[i].tolist()]


def test_dropout_of_the_teachers_is_eq4():
    """Ones into a teacher of ones: its logit is the number of active inputs over 1 - p."""
    torch.manual_seed(0)
    joint = jedi.Joint(experts(), settings(teacher_input="base", neurons=2))  # d = 14: p = 6/14, 8/14, 10/14
    nn.init.ones_(joint.teachers.weight)
    nn.init.zeros_(joint.teachers.bias)
    e = joint(torch.ones(12000, 14), torch.randperm(12000).split(4000))[1]
    for logit, p, K in zip(e, (6 / 14, 8 / 14, 10 / 14), CLASSES, strict=True):
        active = logit[:, 0] * (1 - p)
        assert torch.allclose(active, active.round(), atol=1e-4)
        assert active.mean().item() == pytest.approx(2 * K, rel=0.02)  # Eq. 5
        assert torch.allclose(logit[:, 0], logit[:, -1])  # one dropout for all classes of a teacher


def reached(joint, weights, own=OWN, y=Y):
    """The parameters that a step of Eq. 1 with these weights has a gradient for."""
    joint.zero_grad()
    alpha, beta, gamma = weights
    jedi.train_step(joint, Z, own, y, W, gamma, settings(alpha=alpha, beta=beta))[0].backward()
    return {name for name, p in joint.named_parameters() if p.grad is not None and p.grad.any()}


TEACHERS = {"teachers.weight", "teachers.bias"}
HEADS = {f"heads.{j}.{what}" for j in range(3) for what in ("weight", "bias")}
UP, DOWN = ({f"adapters.{j}.{layer}.{what}" for j in range(3) for what in ("weight", "bias")}
            for layer in ("up", "down"))  # fmt: skip


NOBODY = [OWN[1]] * 3, torch.full((9,), -1)
FIRST = HEADS | UP | DOWN


@pytest.mark.parametrize("inputs, weights, batch, expected", [
    *((inputs, (0, 0, 1), (OWN, Y), FIRST) for inputs in INPUTS),  # distillation teaches students alone
    ("adjusted", (0, 1, 0), (OWN, Y), TEACHERS | UP | DOWN),  # Sec. 5.1: bidirectional, but for base (D4)
    ("base", (0, 1, 0), (OWN, Y), TEACHERS), ("predictions", (0, 1, 0), (OWN, Y), TEACHERS | FIRST),
    ("adjusted+predictions", (0, 1, 0), (OWN, Y), TEACHERS | FIRST),
    # Labels of students; data set 1 has none in this batch.
    ("adjusted", (1, 0, 0), (OWN, Y), {name for name in FIRST if ".1." not in name}),
    ("adjusted", (1, 1, 0), NOBODY, set()), ("adjusted", (1, 1, 1), NOBODY, FIRST),
])  # fmt: skip
def test_which_parameters_a_term_of_eq1_reaches(inputs, weights, batch, expected):
    assert reached(joint_of(inputs), weights, *batch) == expected


def test_the_first_step_reaches_the_second_layers_of_the_adjustment():
    """They are 0, and so the first layers wait."""
    assert reached(joint_of(stir=False), (0, 1, 0)) == TEACHERS | UP


def test_the_teachers_of_data_sets_without_labels_in_the_batch_rest():
    joint = joint_of()
    reached(joint, (1, 1, 0))
    rows = joint.teachers.weight.grad.any(1).tolist()
    assert rows == [True] * 4 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("hidden", [0, 7])
def test_students_start_as_their_experts(hidden):
    """D5, and so it is where the expert is a student of another run, with an adjustment of its own size."""
    joint = jedi.Joint(experts(hidden), settings(adjust_dropout=0.75, neurons=10)).eval()
    for m, expert, e in zip(joint.predict(E)[0], experts(hidden), E, strict=True):
        assert torch.allclose(m, expert.net.head(e), atol=1e-6)
    assert alike(joint(Z, OWN)[0], joint.predict(E)[0], 1e-6)


def small(name="resnet3d10-small", K=3, seed=0, **more):
    """(what builds it, a small network at rest)."""
    made = dict(name=name, classes=K, width=0.0625, **more)
    torch.manual_seed(seed)
    net = backbones.build(**made)
    for module in net.modules():  # of others than ones and zeros
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
    return made, net.eval()


# ---- data sets and labels --------------------------------------------------------------------------


def videos_of(name, n, K, groups=None):
    names, labels = [f"{name}{i}.mp4" for i in range(n)], [(i * i + i // 3) % K for i in range(n)]
    return Videos.make(f"/{name}", names, labels, groups)


def data_of(name, train, test, K, groups=None):
    classes = tuple(f"{name} {k}" for k in range(K))
    train, test = videos_of(name, train, K, groups), videos_of("t" + name, test, K)
    return Data(name, 1, classes, train, test, False, True, ())


@pytest.fixture
def library(monkeypatch):
    """load_data knows a few sets; which roots it was asked for."""
    asked = []

    def load(name, root, split):
        asked.append((name, root, split))
        data = data_of(name.split("/")[-1], 12, 5, 3, [i // 2 for i in range(12)])
        return replace(data, multilabel=name == "multi")

    monkeypatch.setattr("jedi.load_data", load)
    return asked


def parsed(line):
    return jedi.parse_args(line.split())


def loaded(line):
    return jedi.load_parts(parsed(line))


def labelled(part):
    return part.indices[part.y >= 0].tolist()


def test_parts_of_the_command_line(library, tmp_path):
    (tmp_path / "list.txt").write_text("two3.mp4 1\ntwo5.mp4 2\n")
    (tmp_path / "one.txt").write_text("one1.mp4\n")
    line = f"--labelled_list {tmp_path}/one.txt,{tmp_path}/list.txt --split 2 --extra more,multi --seed 3"
    learned, tests = loaded(f"--data one,two --root /a,/b,/c, {line} --extra_videos 5")
    assert library == [("one", "/a", 2), ("two", "/b", 2), ("more", "/c", 2), ("multi", None, 2)]
    assert [labelled(part) for part in learned] == [[1], [3, 5], [], []]
    assert [len(part.indices) for part in learned] == [12, 12, 5, 5]
    assert [(part.name, len(part.indices)) for part in tests] == [("test", 5), ("test", 5)]
    one, two = learned[:2]
    assert one.labelled_list == "one1.mp4 1\n"
    assert two.y[[3, 5]].tolist() == two.data.train.labels[[3, 5]].tolist()
    chosen = learned[2].indices.tolist()
    assert chosen == sorted(set(chosen)) and chosen != [0, 1, 2, 3, 4]  # drawn at random
    (*_, everything), _ = loaded("--data one --extra less --extra_videos 20 --seed 3")
    assert len(everything.indices) == 12


@pytest.mark.parametrize("line, counts", [
    (",,LIST", (12, 12, 2)), ("LIST,,", (2, 12, 12)), ("LIST,,LIST", (2, 12, 2)), (",LIST,", (12, 2, 12)),
])  # fmt: skip
def test_few_labels_for_some_data_sets(library, tmp_path, line, counts):
    """The others have all; in the run of an expert of its own as well."""
    names = "one", "two", "six"
    for name in names:
        (tmp_path / f"{name}.txt").write_text(f"{name}3.mp4\n{name}5.mp4\n")
    lists = [f"{tmp_path}/{name}.txt" * bool(x) for name, x in zip(names, line.split(","), strict=True)]
    args = jedi.parse_args(["--data", "one,two,six", "--labelled_list", ",".join(lists)])
    assert tuple(len(labelled(part)) for part in jedi.load_parts(args)[0]) == counts
    for path, own in zip(lists, jedi.supervised_flags(args), strict=True):
        assert (f"--labelled_list={path}" if path else "--ratio=1.0") in own
        assert sum("labelled_list" in flag or "ratio" in flag for flag in own) == 1


def test_labels_and_hold_outs_of_the_command_line(library):
    learned, tests = loaded("--data one,two --per_class 2 --holdout 0.3")
    for part, test in zip(learned, tests, strict=True):
        assert test.name == "train" and len(test.indices) == 4  # of 12, by two
        assert not {i // 2 for i in test.indices} & {i // 2 for i in part.indices}  # D10: whole groups
        assert sorted([*part.indices, *test.indices]) == list(range(12)) and 0 < len(labelled(part)) <= 6
    ((everything,), (test,)) = loaded("--data one")
    assert (everything.y >= 0).all() and test.name == "test" and len(everything.y) == 12


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--data one,multi", "multi has several labels per video"),
        (
            "--data one --per_class 1 --holdout 0.95 --seed 0",
            "one has no video with a label beside the held-out",
        ),
    ],
)
def test_data_sets_that_are_refused(library, line, sentence):
    with pytest.raises(UserError, match=sentence):
        loaded(line)


# ---- embeddings ------------------------------------------------------------------------------------

# Of (data set, part, expert) which videos cannot be read.
BAD = {("one", "train", 0): [4], ("one", "train", 1): [4, 6], ("two", "train", 1): [3, 8],
       ("more", "train", 0): [0], ("one", "test", 0): [2], ("one", "test", 1): [0]}  # fmt: skip


def features_of(n, D, without, seed):
    """The rows of n videos but for some."""
    good = [i for i in range(n) if i not in without]
    rows = random(len(good), D, seed=seed).numpy()
    return Features(rows, np.isin(np.arange(n), good).astype(np.int64), dict.fromkeys(without, f"bad {seed}"))


@pytest.fixture(params=[False, True])
def disk(request, monkeypatch):
    """Two data sets with experts, one of them with a hold-out, and one without an expert."""
    data = {"one": data_of("one", 12, 5, 3), "two": data_of("two", 9, 4, 2), "more": data_of("more", 7, 3, 6)}
    y = np.where(np.isin(np.arange(12), (1, 4, 5)), data["one"].train.labels, -1)
    learned = [jedi.Part(data["one"], "train", np.arange(12), y),
               jedi.Part(data["two"], "train", np.array([1, 2, 3, 5, 6, 7]), np.zeros(6, int)),
               jedi.Part(data["more"], "train", np.arange(7), np.full(7, -1))]  # fmt: skip
    tests = [jedi.Part(data["one"], "test", np.arange(5)),
             jedi.Part(data["two"], "train", np.array([0, 4, 8]))]  # fmt: skip
    there, asked = {}, []
    for s, (name, one) in enumerate(data.items()):
        for part in ("train", "test"):
            for k, D in enumerate((6, 5)):
                without, n = BAD.get((name, part, k), []), len(getattr(one, part))
                there[name, part, k] = features_of(n, D, without, 100 * s + 10 * k + len(part))

    def extract(folder, extraction, run):
        expert, name, part = folder.parts[-2], *folder.name.split("_")
        assert extraction.average and extraction.videos is getattr(data[name], part)
        asked.append(folder.name)
        return there[name, part, ["one", "two"].index(expert)]

    monkeypatch.setattr(features, "extract", extract)
    both = [expert_of(stirred(Headed(6, 3))), expert_of(stirred(Headed(5, 2)))]
    args = Namespace(half=request.param, cache="cache", channels_last=False, workers=0, max_bad=0.5)
    run = SimpleNamespace(device=torch.device("cpu"), say=print, to_device=lambda net, _: net)
    return SimpleNamespace(args=args, run=run, parts=learned + tests, experts=both, there=there, asked=asked)


def naive_row(disk, part, i):
    """What all experts see in a video, side by side; None if one cannot read it."""
    found = []
    for k in range(2):
        here = disk.there[part.data.name, part.name, k]
        if not here.counts[i]:
            return None
        found.append(here.rows[sum(here.counts[:i])])
    return np.concatenate(found)


def test_embeddings_of_all_experts_side_by_side(disk):
    parts = disk.parts
    z = jedi.embed(disk.args, disk.run, parts, disk.experts)
    assert z.shape == (12 + 6 + 7 + 5 + 3, 11)
    assert z.dtype == (torch.float16 if disk.args.half else torch.float32)
    assert torch.equal(z, torch.cat([part.z for part in parts]))
    for part in parts:
        for place, (i, row) in enumerate(zip(part.indices, part.z, strict=True)):
            expected = naive_row(disk, part, i)
            assert (place in part.bad) == (expected is None)
            assert expected is None or np.array_equal(row, expected.astype(row.numpy().dtype))
    assert [sorted(part.bad) for part in parts] == [[4, 6], [2], [0], [0, 2], [2]]
    assert "two_test" not in disk.asked and "more_test" not in disk.asked


def test_too_little_memory_is_a_sentence(disk, monkeypatch):
    def full(*shape, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    gigabytes = 33 * 11 * (2 if disk.args.half else 4) / 1e9
    with pytest.raises(UserError, match=f"33 videos need {gigabytes:.1f} GB of memory on cpu, .* --half"):
        jedi.embed(disk.args, disk.run, disk.parts, disk.experts)
    assert not disk.asked  # before the long work


def test_experts_students_and_teachers_are_scored_from_one_embedding(monkeypatch):
    """D6, D9, D12: from the mean embeddings, in blocks as at once; an unreadable video is wrong."""
    joint, three = joint_of(adjust_dropout=0.75, neurons=1), experts()
    tests = [jedi.Part(data_of("abc"[i], 4, 5000, K), "test", np.arange(5000)) for i, K in enumerate(CLASSES)]
    for i, part in enumerate(tests):
        part.z, part.bad = random(5000, 14, seed=30 + i), {3: "no frames", 17: "html"} if i else {}
    scores = jedi.score(joint, three, tests)
    assert joint.training and [list(row) for row in scores] == [["expert", "student", "teacher"]] * 3
    for i, (part, row) in enumerate(zip(tests, scores, strict=True)):
        m, e = naive_joint(joint, z=part.z)
        own = three[i].net.head(part.z.split(WIDTHS, 1)[i])
        for who, x in (("expert", own), ("student", m[i]), ("teacher", e[i])):
            probs = x.softmax(1).detach().numpy()
            good = np.setdiff1d(np.arange(5000), list(part.bad))
            assert np.allclose(row[who].probs[good], probs[good], atol=1e-5) and row[who].bad == part.bad
            assert not row[who].probs[list(part.bad)].any()
            right = (probs.argmax(1) == part.videos.labels)[good].sum()
            assert evaluate.metrics(row[who])["top1"] == pytest.approx(100 * right / 5000)


def test_map_by_hand():
    """Class 0: its videos are first and third, (1 + 2/3) / 2; class 1: its video is first."""
    probs = np.array([[0.9, 0.6], [0.8, 0.7], [0.3, 0.1]], np.float32)
    scores = evaluate.Scores.of(probs, Videos.make("", "abc", [0, 1, 0]), {})
    assert evaluate.metrics(scores)["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    assert scores.hits.tolist() == [1, 0, 1] and scores.views.tolist() == [1, 1, 1]


# ---- command line ----------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    """Sec. 4.4."""
    args = parsed("--data hmdb51,ucf101")
    assert (args.alpha, args.beta, args.gamma, args.temperature) == (1, 1, 0.4, 1)
    assert (args.lr, args.weight_decay, args.epochs, args.burn_in) == (1e-5, 3e-3, 500, 25)
    assert args.lr_batch == args.batch == 512  # D1
    assert (args.hidden, args.adjust_dropout, args.neurons) == (256, 0.75, 10)
    assert (args.teacher_loss, args.teacher_input) == ("hinge", "adjusted")
    assert (args.distill, args.ratio, args.holdout) == ("all", 1.0, 0.0)


@pytest.mark.parametrize("names, recipe", [
    (["toy:a", "toy:b"], "toy"), (["toy:a", "/x/weizmann"], "weizmann"),
    (["toy:a", "toy:b", "toy:c", "weizmann/"], "weizmann"), (["toy:a", "ucf101"], None),
    (["ucf101", "/x/weizmann", "toy"], None), (["hmdb51", "ucf101"], None),
])  # fmt: skip
def test_the_recipe_does_not_depend_on_the_order_of_the_data_sets(names, recipe):
    for order in permutations(names):
        args = parsed(f"--data {','.join(order)}")
        assert (args.recipe, args.epochs) == (recipe, 100 if recipe else 500)


def test_one_expert_and_one_network_for_all_or_for_each():
    args = parsed("--data toy:a,toy:b --expert e --net tsm10")
    assert [jedi.for_each(args, flag) for flag in ("expert", "net")] == [["e"] * 2, ["tsm10"] * 2]
    args = parsed("")
    expert, net, init = (jedi.for_each(args, flag) for flag in ("expert", "net", "init"))
    assert expert == ["supervised"] * 3 and len(set(net)) == 3 and init == ["none"] * 3
    line = "--data hmdb51,ucf101,k400 --expert supervised f supervised --net tsm10 tsn50 tsn101"
    line += " --init none a b --root a,b,c --seed 4 --expert_flags epochs=3 jitter=8,9 no-flip"
    first, last = jedi.supervised_flags(parsed(line))
    assert {"--data=hmdb51", "--root=a", "--net=tsm10", "--seed=4", "--epochs"} < set(first)
    assert {"--data=k400", "--root=c", "--net=tsn101", "--init=b", "--ratio=1.0"} < set(last)
    assert last[-6:] == ["--epochs", "3", "--jitter", "8", "9", "--no-flip"]
    assert not any("init" in flag for flag in first)


@pytest.mark.parametrize("line, word", [
    ("--data one,two --root /a", "--root has a value for each of one, two, with commas, not /a"),
    ("--data one --root /a,/b", "--root has a value for each of one, with commas, not /a,/b"),
    ("--data one --extra two,more --root /a,/b", "--root has a value for each of one, two, more"),
    ("--data one,two --labelled_list l.txt", "--labelled_list has a value for each of one, two"),
    ("--data one,a/one", "each data set once, not as one,a/one"), ("--data one,", "once, not as one,"),
    ("--data one,two --extra two", "each data set once"), ("--data a/experts", "each data set once"),
    ("--data hmdb51 --distill ssv2", "--distill is all, none, own, or one of hmdb51, not ssv2"),
    ("--data hmdb51,ucf101 --expert a b c", "--expert has one value, or one for each of hmdb51,ucf101, not"),
    ("--net tsm10 tsn50", "--net has one value, or one for each of toy:a,toy:b,toy:c, not 2"),
    ("--init a b", "--init has one value"), ("--batch 0", "--batch"), ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"), ("--holdout 1.5", "--holdout"), ("--hidden 0", "--hidden"),
    ("--adjust_dropout -0.1", "--adjust_dropout"), ("--gamma -1", "--gamma"), ("--neurons -1", "--neurons"),
    ("--teacher_input base+predictions", "--teacher_input"), ("--extra_videos 0", "--extra_videos"),
    ("--epochs inf", "--epochs"), ("--stop_after test", "--stop_after"), ("--ratio 0", "--ratio"),
    ("--ratio 0.5 --per_class 2", "--per_class"), ("--finetune", "--finetune"),
    ("--net tsm11", "tsm11"), ("--expert_flags jitter=30,20", "--jitter"),  # of stage 1
    ("--expert_flags epoch=3", "--epoch"), ("--expert_flags batch=0", "--batch"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit) as end:
        parsed(line)
    said = str(end.value)
    assert said.startswith(("jedi: ", "supervised: ")) and word in said
    assert said.endswith("(2)") and "\n" not in said


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
        save_model(root / "experts" / name / "model.pt", net, made, classes, recipe)
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
    """Sec. 4.3, D6: the mean embedding of the expert's test views, of training videos too."""
    data = load_data(world / "one")
    for name in ("one", "two"):
        net, _, _, recipe = load_model(world / "experts" / name / "model.pt")
        for part in ("train", "test"):
            found = features.load(whole / "cache" / name / f"one_{part}")
            assert list(found.bad) == ([1] if part == "train" else [2])
            views = Views(getattr(data, part), recipe.sample, recipe.view, recipe.short_side)
            for i in np.flatnonzero(found.counts).tolist():
                x = recipe.to_input(views[i]["views"], "cpu")
                assert len(x) == recipe.views > 1
                with torch.no_grad():
                    z = torch.stack([net.embed(v[None])[0] for v in x]).mean(0)
                assert np.allclose(found.rows[found.first[i]], z, atol=1e-5)


def test_what_a_run_leaves(world, whole):
    assert sorted(path.name for path in whole.iterdir() if path.suffix != ".pt") == [
        ".lock", "bad_videos.txt", "cache", "config.json", "log.jsonl", "one", "result.json", "table.csv",
        "two"]  # fmt: skip
    assert [line.split("\t")[0] for line in (whole / "bad_videos.txt").read_text().splitlines()] == [
        f"{world}/one/train1.mp4"]  # fmt: skip
    assert (whole / "one" / "labelled.txt").read_text().split()[::2] == [f"train{i}.mp4" for i in range(5)]
    row, table = result_of(whole), table_of(whole)
    assert (row["videos"], row["unreadable"]) == (7, 1) and list(table) == ["expert", "student", "teacher"]
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
        for key in ("top1", "top5", "mAP"):
            assert len({row[f"{name}_expert_{key}"] for row in tests}) == 1  # Fig. 3: a straight line
            assert tests[0][f"{name}_student_{key}"] == tests[0][f"{name}_expert_{key}"]  # D5
            last = tests[-1][f"{name}_student_{key}"]
            assert last == pytest.approx(table["student"][f"{name} {key}"], abs=0.01)
    assert [row["loss_kd"] > 0 for row in steps] == [False] * 2 + [True] * 6  # an epoch of burn-in
    for row in steps:
        parts = row["loss_m"] + row["loss_e"] + 0.4 * row["loss_kd"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5) and row["lr"] == 0.02


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_students_score_from_video_is_that_from_the_cache(world, whole, run, name):
    """It is a network of its own: encoder, adjustment and head."""
    model = load_model(whole / name / "model.pt")
    net, made, classes, recipe = model
    expert, before, _, old = load_model(world / "experts" / name / "model.pt")
    assert recipe == replace(old, average="embeddings") and made == before | {"adapter": 4}
    assert all(torch.equal(net.state_dict()[key], value) for key, value in expert.state_dict().items()
               if not key.startswith("fc."))  # fmt: skip
    data = load_data(world / name)
    scores = evaluate.score(net, data.test, recipe, run)
    found = features.load(whole / "cache" / name / f"{name}_test")
    z = torch.from_numpy(np.array(found.rows))
    assert net.adapter.up.weight.any() and not torch.allclose(net.adapter(z), z, atol=1e-3)
    p = net.head(z).softmax(1).detach().numpy()
    good = np.flatnonzero(found.counts)
    assert np.allclose(scores.probs[good], p, atol=1e-6) and sorted(scores.bad) == sorted(found.bad)
    assert np.ptp(p, 0).max() > 1e-4  # or any video's would do
    for key in ("top1", "top5", "mAP"):
        value = evaluate.metrics(scores)[key]
        assert table_of(whole)["student"][f"{name} {key}"] == pytest.approx(value, abs=0.006)
    said = list(csv.DictReader(open(whole / name / "predictions.csv")))
    for i, row in enumerate(said):
        assert bool(row["unreadable"]) == (i not in good)
        if i in good:
            best, (told, share) = int(scores.probs[i].argmax()), row["top1"].rsplit(":", 1)
            assert told == classes[best] and float(share) == pytest.approx(scores.probs[i, best], abs=2e-6)
    ((_, top, _),) = predict(model, [data.test.path(int(good[-1]))])
    predicted = dict(top)
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


def test_a_finished_run_shows_its_result_and_none_of_other_experts(world, whole, tmp_path, capfd):
    before = times(whole)
    assert {"last.pt", "model.pt", "table.csv", "features.npy"} <= {path.name for path in before}
    start(world, whole)
    assert "RESULT script=jedi" in capfd.readouterr().out and times(whole) == before
    more, _ = changed(world, tmp_path, "weights")
    shutil.copytree(whole, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["args"]["expert"] = [f"{tmp_path}/experts"] * 2  # the same folder, with another network in it
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    said = refused(world, tmp_path / "out", f"{more} --cache {tmp_path}/cache")
    assert "was trained with expert of two" in said


def test_stopped_and_resumed(world, whole, tmp_path, monkeypatch):
    """Bit for bit, from the middle of an epoch; unreadable videos are told once."""
    steps, train_step = [], jedi.train_step

    def stopping(*args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jedi, "train_step", stopping)
        start(world, tmp_path / "out", f"--cache {whole}/cache")
    assert len(steps) == 3 and not (tmp_path / "out" / "result.json").exists()
    start(world, tmp_path / "out", f"--cache {whole}/cache")
    for name in ("table.csv", "one/predictions.csv", "two/predictions.csv", "bad_videos.txt"):
        assert (tmp_path / "out" / name).read_text() == (whole / name).read_text()
    ours, theirs = (load_model(out / "one" / "model.pt")[0] for out in (tmp_path / "out", whole))
    assert digest_of_model(ours) == digest_of_model(theirs)


# ---- the cache -------------------------------------------------------------------------------------


def changed(world, tmp_path, what):
    """The flags of the whole run with its cache, but for one thing, and the folder that does not fit."""
    if what in ("weights", "views", "network"):
        shutil.copytree(world / "experts", tmp_path / "experts")
        path = tmp_path / "experts" / "two" / "model.pt"
        net, made, classes, recipe = load_model(path)
        if what == "weights":
            net.layer1[0].bn1.running_mean[0] += 1e-3
        if what == "network":  # with tensors of the same names, without the shift
            made = made | dict(name="tsn10-small")
        recipe = replace(recipe, crops=1) if what == "views" else recipe
        save_model(path, net, made, classes, recipe)
        return f"--expert {tmp_path}/experts", "two/one_train"
    shutil.copytree(world / "two", tmp_path / "two")
    lines = (tmp_path / "two" / "test.txt").read_text().splitlines()
    (tmp_path / "two" / "test.txt").write_text("\n".join(lines[::-1]) + "\n")
    return f"--data {world}/one,{tmp_path}/two", "one/two_test"


@pytest.mark.parametrize("what, word", [("weights", "expert"), ("views", "recipe.crops 3, not 1"),
                                        ("network", "network.name tsm10-small, not tsn10-small"),
                                        ("list", "videos")])  # fmt: skip
def test_a_cache_of_something_else_is_refused(world, whole, tmp_path, what, word):
    more, folder = changed(world, tmp_path, what)
    said = refused(world, tmp_path / "out", f"--cache {whole}/cache {more}")
    assert f"{whole}/cache/{folder} has other features ({word}" in said
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_sample_of_an_extra_data_set_on_a_shared_cache(world, whole, tmp_path):
    """The cache has the whole list, which serves every number of videos; none is embedded again."""
    before, learned = times(whole / "cache"), []
    more = f"--data {world}/one --extra {world}/two --distill two --cache {whole}/cache"
    for n in (1, 2, 4):
        start(world, tmp_path / f"{n}", f"{more} --extra_videos {n}")
        state = torch.load(tmp_path / f"{n}" / "last.pt", weights_only=True)
        learned.append(state["identity"]["list of two"])
        assert result_of(tmp_path / f"{n}")["videos"] == 4
    assert times(whole / "cache") == before and len(set(map(str, learned))) == 3
    more += f" --stop_after embeddings --extra_videos 1 --cache {tmp_path}/cache"
    start(world, tmp_path / "own", more)
    for name in ("index.npz", "features.npy", "videos.txt"):
        folder = Path("one", "two_train", name)
        assert (tmp_path / "cache" / folder).read_bytes() == (whole / "cache" / folder).read_bytes()


def test_experts_that_were_trained_on_other_videos_are_named(world, whole, tmp_path, capfd):
    shutil.copytree(world / "experts", tmp_path / "experts")
    (tmp_path / "experts" / "two" / "labelled.txt").write_bytes(b"train0.mp4 0\n\xff.mp4 1\n")  # not UTF-8
    start(world, tmp_path / "out", f"--cache {whole}/cache --expert {tmp_path}/experts")
    printed = capfd.readouterr().out
    assert f"{tmp_path}/experts/two/model.pt was trained on other videos" in printed and "RESULT" in printed
    assert "one/model.pt was trained on other videos" not in printed


@pytest.mark.parametrize("more, word", [
    ("--expert /nowhere.pt", "there is no file /nowhere.pt"),
    ("--expert tsn50:/nowhere.pth:8", "there is no file /nowhere.pth"),
    ("--expert /nowhere", "there is no file /nowhere/one/model.pt"),
    ("--max_bad 0.1", "1 of 5 videos of one cannot be read, more than --max_bad"),
    ("--expert tsn50:AN.pth", "must say what the network sees"),
    ("--expert supervised --init none /nowhere.pth", "there is no file /nowhere.pth"),
    ("--data /nowhere/one,/nowhere/two --expert supervised", "/nowhere/one"),
])  # fmt: skip
def test_what_is_not_there_is_missed_before_stage_1(world, tmp_path, more, word):
    said = refused(world, tmp_path / "out", more)
    assert word in said and not (tmp_path / "out" / "experts").exists()
    assert "mended" not in said or said.endswith(f"delete {tmp_path}/out/cache/one/one_train (2)")


RANKS = """
import jedi
from common import evaluate
from common.io import features

evaluate.VIEWS_PER_BATCH, features.EVERY = 4, 0
jedi.main()
"""


def test_two_ranks_leave_the_same_cache(world, whole, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    flags = words(world, tmp_path / "out", "--stop_after embeddings")[1:]
    process = forks.start([sys.executable, tmp_path / "ranks.py", *flags], HERE, env, 2)
    assert process.communicate() and process.returncode == 0
    caches = tmp_path / "out" / "cache", whole / "cache"
    ours, theirs = ({path.relative_to(cache): path.read_bytes() for path in cache.glob("*/*/*.*")}
                    for cache in caches)  # fmt: skip
    assert len(ours) == 2 * 4 * 4 and ours == theirs and not (tmp_path / "out" / "last.pt").exists()


# ---- hold-out --------------------------------------------------------------------------------------


def test_given_experts_that_know_the_held_out_videos_are_named(world, tmp_path, capfd):
    """Held-out videos are tested and not learned. An expert without a list of what it has learned may know
    them; one whose list has none does not."""
    more = "--holdout 0.4 --epochs 0.5"
    start(world, tmp_path / "a", more)
    for name, n in (("one", 5), ("two", 4)):
        tested = [row["video"] for row in csv.DictReader(open(tmp_path / "a" / name / "predictions.csv"))]
        learned = (tmp_path / "a" / name / "labelled.txt").read_text().split()[::2]
        assert len(tested) == 2 and sorted([*tested, *learned]) == [f"train{i}.mp4" for i in range(n)]
    caches = {path.parent.name for path in (tmp_path / "a").glob("cache/*/*/index.npz")}
    assert caches == {"one_train", "two_train"}
    assert result_of(tmp_path / "a")["held_out_known_to"] == "one,two"
    assert "the expert of two may have been trained on the held-out videos" in capfd.readouterr().out
    for name in ("one", "two"):
        shutil.copytree(world / "experts" / name, tmp_path / "experts" / name)
        shutil.copy(tmp_path / "a" / name / "labelled.txt", tmp_path / "experts" / name)
    more += f" --cache {tmp_path}/a/cache --expert {tmp_path}/experts"
    start(world, tmp_path / "b", more)
    assert "held_out_known_to" not in result_of(tmp_path / "b")
    lines = "".join(f"train{i}.mp4 {i % 2}\n" for i in range(4))
    (tmp_path / "experts/two/labelled.txt").write_text(lines)
    start(world, tmp_path / "c", more)
    assert result_of(tmp_path / "c")["held_out_known_to"] == "two"


def test_an_expert_may_be_a_student_of_another_run(world, whole, tmp_path):
    """The next generation: with its adjustment, which may have another number of units."""
    start(world, tmp_path / "out", f"--expert {whole} --hidden 6 --epochs 0 --max_bad 0.5")
    table = table_of(tmp_path / "out")
    for key, value in table_of(whole)["student"].items():
        assert table["expert"][key] == table["student"][key] == value
    assert load_model(tmp_path / "out" / "one" / "model.pt")[1]["adapter"] == 4

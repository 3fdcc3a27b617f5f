"""jedi.py: its equations (values by hand, plain loops from the paper, where gradients go), data sets and
labels, embeddings, scores, its command line, and runs on videos."""

import csv
import itertools
import json
import math
import shutil
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensors import random, softmax
from torch import nn

import jedi
from common import backbones, evaluate
from common.clips import Views
from common.data import Data, Videos, load_data
from common.errors import UserError
from common.io import features
from common.io.features import Features
from common.io.models import load_model, save_model
from common.modality import Recipe

pytestmark = pytest.mark.usefixtures("leave", "group")


def test_eq1_by_hand():
    """A video with a label, 0.5 * 1 + 2 * 2 + 0.4 * (1 + 0.25 * 2) = 5.1, and one without, 0.4 * 6.25."""
    loss_m, loss_e = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
    loss_kd, w = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.25], [0.75, 1.0]])
    loss = jedi.combined_loss(loss_m, loss_e, loss_kd, w, 0.5, 2.0, 0.4)
    assert loss.item() == pytest.approx((5.1 + 2.5) / 2)


# A batch: (data set, label or None). Of data set 1 no video has a label, number 3 has no expert.
CLASSES = 4, 3, 2
BATCH = [(0, 3), (2, 1), (0, 0), (1, None), (0, None), (3, None), (0, 0), (1, None), (2, 0)]
OWN = [torch.tensor(at, dtype=torch.int64) for at in ([0, 2, 6], [], [1, 8])]
Y = torch.tensor([-1 if y is None else y for _, y in BATCH])
SIZES = 30, 60, 10


def naive_w(i, j, sizes=SIZES):
    """Eq. 2."""
    return 1.0 if i == j else sizes[j] / sum(sizes)


def naive_label_loss(kind, row, label):
    if kind == "ce":
        return -math.log(softmax(row)[label])
    if kind == "hinge":  # Weston and Watkins, over the number of classes (D2)
        return sum(max(0.0, 1 - row[label] + row[k]) for k in range(len(row)) if k != label) / len(row)
    return sum(max(0.0, 1 - (1 if k == label else -1) * row[k]) for k in range(len(row)))  # ovr


def naive_step(m, e, weights, T=1.0, teacher="hinge"):
    """Eq. 1 video after video; m, e: logits of students and teachers, (B, K_j) for each data set."""
    terms = [0.0, 0.0, 0.0]
    for x, (i, label) in enumerate(BATCH):
        if label is not None:
            terms[0] += naive_label_loss("ce", m[i][x].tolist(), label)
            terms[1] += naive_label_loss(teacher, e[i][x].tolist(), label)
        for j in range(len(CLASSES)):
            p, q = (softmax([v / T for v in logits[j][x].tolist()]) for logits in (e, m))
            terms[2] -= naive_w(i, j) * sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    terms = [term / len(BATCH) for term in terms]
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)), terms


def settings(**more):
    defaults = dict(alpha=1.0, beta=1.0, temperature=1.0, teacher_loss="hinge", distill="all", hidden=4,
                    adjust_dropout=0.0, teacher_input="adjusted", neurons=1e9)  # fmt: skip
    return Namespace(**defaults | more)


W = torch.tensor([[naive_w(i, j) for j in range(3)] for i, _ in BATCH])


def test_losses_by_hand():
    row, y = torch.tensor([[1.0, 0.5, -1.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
    # 1 - 1 + 0.5 and 1 - 1 - 1, of three classes; twice 1.
    assert jedi.LOSSES["hinge"](row, y).tolist() == pytest.approx([0.5 / 3, 2 / 3])
    # 1 - 1, 1 + 0.5, 1 - 1; each 1.
    assert jedi.LOSSES["ovr"](row, y).tolist() == pytest.approx([1.5, 3.0])


def test_eq2_by_hand_and_of_table_1():
    with_two_more = [[1.0, 0.75], [0.25, 1.0], [0.25, 0.75], [0.25, 0.75]]  # D8
    assert jedi.distillation_weights([1, 3], extra=2).tolist() == with_two_more
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


def stirred(module, seed=0):
    """The module with random parameters: its adjustments are not 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return module


def test_eq3_by_hand_with_dropout_of_the_adjustment():
    adapter = backbones.Adapter(2, 1)
    parameters = [[[1.0, 0.0]], [0.0], [[4.0], [0.0]], [0.0, 1.0]]  # V, b, U, c
    for p, values in zip(adapter.parameters(), parameters, strict=True):
        p.data = torch.tensor(values)
    e = torch.tensor([[math.log(3), 2.0]])  # U SiLU(log 3) + c = (4 * 3/4 log 3, 1)
    for a in jedi.adjust(e, adapter):
        assert a[0].tolist() == pytest.approx([4 * math.log(3), 3])
    adapter, e = stirred(backbones.Adapter(40, 6, 0.75)), random(200, 40)
    a, clean = jedi.adjust(e, adapter)
    change = adapter.change(e)
    kept = (a - e).abs() > 1e-6
    assert torch.allclose((a - e)[kept], 4 * change[kept], atol=1e-5)
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.02)  # of 8000
    assert torch.allclose(clean, e + change) and not clean.requires_grad and a.requires_grad  # D3


def test_eq4_of_the_papers_data_sets_by_hand_and_never_below_0():
    for K, d, k, p in ((200, 7168, 10, 0.721), (51, 7168, 10, 0.929), (400, 7168, 10, 0.442),
                       (101, 7168, 10, 0.859), (3, 60, 5, 0.75), (400, 7168, 100, 0)):  # fmt: skip
        assert jedi.teacher_dropout(K, d, k) == pytest.approx(p, abs=5e-4)


def test_distillation_loss_by_hand_with_the_teacher_detached():
    """Labels (1/2, 1/2), student (1/4, 3/4): (log 4 + log 4/3) / 2; with T = 2 for logits twice as large."""
    m, by_hand = torch.tensor([[0.0, math.log(3.0)]]), (math.log(4) + math.log(4 / 3)) / 2
    for T in (1.0, 2.0):
        assert jedi.distillation_loss(T * m, torch.zeros(1, 2), T).item() == pytest.approx(by_hand, abs=1e-6)
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


WIDTHS = 6, 5, 3


def experts(hidden=0):
    return [SimpleNamespace(path="e.pt", net=stirred(Headed(D, K, hidden), seed=D), build={"adapter": hidden},
                            recipe=None)
            for D, K in zip(WIDTHS, CLASSES, strict=True)]  # fmt: skip


def joint_of(inputs="adjusted", **more):
    return stirred(jedi.Joint(experts(), settings(teacher_input=inputs, **more)), seed=2)


INPUTS = ["adjusted", "base", "predictions", "adjusted+predictions"]
Z = random(len(BATCH), sum(WIDTHS), seed=5)
E = Z.split(WIDTHS, 1)


def naive_joint(joint, inputs="adjusted", z=Z):
    """Sec. 3.3 and 5.1 one data set after the other: logits of students and teachers, lists of (B, K_j)."""
    e, a, m, teachers, first = [z[:, :6], z[:, 6:11], z[:, 11:]], [], [], [], 0
    for x, adapter, head in zip(e, joint.adapters, joint.heads, strict=True):
        hidden = x @ adapter.down.weight.T + adapter.down.bias
        a.append(x + (hidden * torch.sigmoid(hidden)) @ adapter.up.weight.T + adapter.up.bias)
        m.append(a[-1] @ head.weight.T + head.bias)
    x = torch.cat({"adjusted": a, "base": e, "predictions": m, "adjusted+predictions": [*a, *m]}[inputs], 1)
    for K in CLASSES:
        rows = slice(first, first + K)
        teachers.append(x @ joint.teachers.weight[rows].T + joint.teachers.bias[rows])
        first += K
    return m, teachers


@pytest.mark.parametrize("inputs, teacher, gamma, distill", [
    ("adjusted", "ce", 0.3, "all"), ("base", "hinge", 0.3, "all"), ("predictions", "ovr", 0.3, "all"),
    ("adjusted", "hinge", 0, "all"), ("adjusted+predictions", "hinge", 0.3, "none"),
])  # fmt: skip
def test_train_step_matches_a_plain_loop_over_videos(inputs, teacher, gamma, distill):
    """Without distillation, in the burn-in or by --distill, its term is 0."""
    joint = joint_of(inputs)
    weights = dict(alpha=1.5, beta=0.7, temperature=2.0, teacher_loss=teacher, distill=distill)
    loss, terms = jedi.train_step(joint, Z, OWN, Y, W, gamma, settings(**weights))
    gamma *= distill != "none"
    total, naive = naive_step(*naive_joint(joint, inputs), (1.5, 0.7, gamma), 2.0, teacher)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    naive[2] *= gamma > 0
    expected = dict(zip(("loss_m", "loss_e", "loss_kd"), naive, strict=True))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def alike(found, expected, atol=1e-5):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(found, expected, strict=True))


def own_of(logits):
    return [x[at] for x, at in zip(logits, OWN, strict=True)]


@pytest.mark.parametrize("inputs", INPUTS)
def test_joint_matches_the_plain_one(inputs):
    """Soft labels are detached and without any dropout, in train mode as in eval mode (D3)."""
    joint = joint_of(inputs, adjust_dropout=0.75, neurons=1)
    m, teachers = naive_joint(joint, inputs)
    m_train, e_train, soft_labels = joint(Z, OWN)
    assert alike(soft_labels, teachers) and not any(x.requires_grad for x in soft_labels)
    assert not alike(m_train, m, 1e-3) and not alike(e_train, own_of(teachers), 1e-3)
    for logits, expected in zip(joint.predict(E), (m, teachers), strict=True):
        assert alike(logits, expected) and not any(x.requires_grad for x in logits)
    joint.eval()
    assert alike(joint(Z, OWN)[0], m) and alike(joint(Z, OWN)[1], own_of(teachers))
    assert joint(Z, OWN, distill=False)[2] is None
    d = {"adjusted": 14, "base": 14, "predictions": 9, "adjusted+predictions": 23}[inputs]
    assert joint.teachers.weight.shape == (9, d)
    assert joint.p == pytest.approx([max(0, 1 - K / d) for K in CLASSES])


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


TEACHERS = {"teachers.weight", "teachers.bias"}
ADAPTERS = {f"adapters.{j}.{layer}.{what}" for j in range(3) for layer in ("up", "down")
            for what in ("weight", "bias")}  # fmt: skip
STUDENTS = ADAPTERS | {f"heads.{j}.{what}" for j in range(3) for what in ("weight", "bias")}
NOBODY = [OWN[1]] * 3, torch.full((9,), -1)


@pytest.mark.parametrize("inputs, weights, batch, expected", [
    *((inputs, (0, 0, 1), (OWN, Y), STUDENTS) for inputs in INPUTS),  # distillation trains students alone
    ("adjusted", (0, 1, 0), (OWN, Y), TEACHERS | ADAPTERS),  # Sec. 5.1: bidirectional, but for base (D4)
    ("base", (0, 1, 0), (OWN, Y), TEACHERS), ("predictions", (0, 1, 0), (OWN, Y), TEACHERS | STUDENTS),
    # Labels of students; data set 1 has none in this batch.
    ("adjusted", (1, 0, 0), (OWN, Y), {name for name in STUDENTS if ".1." not in name}),
    ("adjusted", (1, 1, 0), NOBODY, set()), ("adjusted", (1, 1, 1), NOBODY, STUDENTS),
])  # fmt: skip
def test_which_parameters_a_term_of_eq1_reaches(inputs, weights, batch, expected):
    joint, (alpha, beta, gamma) = joint_of(inputs), weights
    jedi.train_step(joint, Z, *batch, W, gamma, settings(alpha=alpha, beta=beta))[0].backward()
    assert {name for name, p in joint.named_parameters() if p.grad is not None and p.grad.any()} == expected


@pytest.mark.parametrize("hidden", [0, 7])
def test_students_start_as_their_experts(hidden):
    """D5, and so it is where the expert is a student of another run, with an adjustment of its own size."""
    joint = jedi.Joint(experts(hidden), settings(adjust_dropout=0.75, neurons=10)).eval()
    for m, expert, e in zip(joint.predict(E)[0], experts(hidden), E, strict=True):
        assert torch.allclose(m, expert.net.head(e), atol=1e-6)
    assert alike(joint(Z, OWN)[0], joint.predict(E)[0], 1e-6)


# ---- data sets and labels --------------------------------------------------------------------------


def data_of(name, n_train, n_test, K):
    """Data of videos that do not exist; two training videos in a row are a group."""
    groups = np.arange(n_train) // 2
    train, test = (Videos.make(f"/{name}", [f"{prefix}{i}.mp4" for i in range(n)], np.arange(n) % K, of_part)
                   for prefix, n, of_part in ((name, n_train, groups), ("t", n_test, None)))  # fmt: skip
    return Data(name, 1, tuple(f"{name} {k}" for k in range(K)), train, test, name == "multi", True, ())


@pytest.fixture
def library(monkeypatch):
    """load_data knows every set, with 12 training videos; (name, root, split) that it was asked for."""
    asked = []

    def load(name, root, split):
        asked.append((name, root, split))
        return data_of(name, 12, 5, 3)

    monkeypatch.setattr("jedi.load_data", load)
    return asked


def parsed(line):
    return jedi.parse_args(line.split())


def loaded(line):
    return jedi.load_parts(parsed(line))


def labelled(part):
    return part.indices[part.y >= 0].tolist()


def test_parts_of_the_command_line(library, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name}3.mp4\n{name}5.mp4\n")
    line = f"--labelled_list {tmp_path}/one.txt,,{tmp_path}/two.txt --split 2 --extra more,multi --seed 3"
    line = f"--data one,six,two --root /a,/b,/c,/d, {line} --extra_videos 5"
    learned, tests = loaded(line)
    assert library == [(name, root, 2) for name, root in zip(
        ("one", "six", "two", "more", "multi"), ("/a", "/b", "/c", "/d", None), strict=True)]  # fmt: skip
    assert [labelled(part) for part in learned] == [[3, 5], list(range(12)), [3, 5], [], []]  # D8
    assert [len(part.indices) for part in learned] == [12, 12, 12, 5, 5]
    assert [(part.name, len(part.indices)) for part in tests] == [("test", 5)] * 3
    assert learned[0].labelled_list == "one3.mp4 0\none5.mp4 2\n"
    chosen = learned[3].indices.tolist()
    assert chosen == sorted(set(chosen)) and chosen != [0, 1, 2, 3, 4]  # drawn at random
    assert len(loaded("--data one --extra less --extra_videos 20")[0][1].indices) == 12
    for name, flags in zip(("one", "six", "two"), jedi.supervised_flags(parsed(line)), strict=True):
        labels = {flag for flag in flags if "labelled_list" in flag or "ratio" in flag}
        assert labels == {"--ratio=1.0" if name == "six" else f"--labelled_list={tmp_path}/{name}.txt"}


def test_hold_outs_of_the_command_line(library):
    learned, tests = loaded("--data one,two --per_class 2 --holdout 0.3")
    for part, test in zip(learned, tests, strict=True):
        assert test.name == "train" and len(test.indices) == 4  # of 12, by two
        assert not {i // 2 for i in test.indices} & {i // 2 for i in part.indices}  # D10: whole groups
        assert sorted([*part.indices, *test.indices]) == list(range(12)) and 0 < len(labelled(part)) <= 6
    refused = {
        "one,multi": "multi has several labels",
        "one --holdout 0.95 --per_class 1": "no video with a label",
    }
    for line, sentence in refused.items():
        with pytest.raises(UserError, match=sentence):
            loaded(f"--data {line}")


# ---- embeddings ------------------------------------------------------------------------------------

# Of (data set, list, expert) which videos cannot be read.
BAD = {("one", "train", 0): [4], ("one", "train", 1): [4, 6], ("two", "train", 1): [3, 8],
       ("more", "train", 0): [0], ("one", "test", 0): [2], ("one", "test", 1): [0]}  # fmt: skip


def value(name, part, k, i):
    """What expert k embeds a video as, in all units; a float16 can hold it."""
    return 512 * k + 64 * ["one", "two", "more"].index(name) + 32 * (part == "test") + i


@pytest.fixture(params=[False, True])
def disk(request, monkeypatch):
    """Two data sets with experts, one of them with a hold-out, and one without an expert."""
    data = {"one": data_of("one", 12, 5, 3), "two": data_of("two", 9, 4, 2), "more": data_of("more", 7, 3, 6)}
    y = np.where(np.isin(np.arange(12), (1, 4, 5)), data["one"].train.labels, -1)
    parts = [jedi.Part(data["one"], "train", np.arange(12), y),
             jedi.Part(data["two"], "train", np.array([1, 2, 3, 5, 6, 7]), np.zeros(6, int)),
             jedi.Part(data["more"], "train", np.arange(7), np.full(7, -1)),
             jedi.Part(data["one"], "test", np.arange(5)),
             jedi.Part(data["two"], "train", np.array([0, 4, 8]))]  # fmt: skip
    asked = []

    def extract(folder, extraction, run):
        k, (name, part) = ["one", "two"].index(folder.parts[-2]), folder.name.split("_")
        assert extraction.average and extraction.videos is getattr(data[name], part)
        asked.append(folder.name)
        bad, n = BAD.get((name, part, k), []), len(extraction.videos)
        rows = [[value(name, part, k, i)] * WIDTHS[k] for i in range(n) if i not in bad]
        return Features(
            np.array(rows, np.float32),
            (~np.isin(np.arange(n), bad)).astype(np.int64),
            dict.fromkeys(bad, "html"),
        )

    monkeypatch.setattr(features, "extract", extract)
    args = Namespace(half=request.param, cache="cache", channels_last=False, workers=0, max_bad=0.5)
    run = SimpleNamespace(device=torch.device("cpu"), say=print, to_device=lambda net, _: net)
    return SimpleNamespace(args=args, run=run, parts=parts, experts=experts()[:2], asked=asked)


def test_embeddings_of_all_experts_side_by_side(disk):
    z = jedi.embed(disk.args, disk.run, disk.parts, disk.experts)
    assert z.shape == (12 + 6 + 7 + 5 + 3, 11)
    assert z.dtype == (torch.float16 if disk.args.half else torch.float32)
    assert torch.equal(z, torch.cat([part.z for part in disk.parts]))
    assert [sorted(part.bad) for part in disk.parts] == [[4, 6], [2], [0], [0, 2], [2]]
    for part in disk.parts:
        for place in set(range(len(part.indices))) - set(part.bad):
            v = part.data.name, part.name
            expected = [value(*v, k, part.indices[place]) for k in (0, 1) for _ in range(WIDTHS[k])]
            assert part.z[place].tolist() == expected
    assert "two_test" not in disk.asked and "more_test" not in disk.asked


def test_too_little_memory_is_a_sentence(disk, monkeypatch):
    def zeros(*shape, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    gigabytes = 33 * 11 * (2 if disk.args.half else 4) / 1e9
    with pytest.raises(UserError, match=f"33 videos need {gigabytes:.1f} GB of memory on cpu, .* --half"):
        jedi.embed(disk.args, disk.run, disk.parts, disk.experts)
    assert not disk.asked  # before the long work


def test_experts_students_and_teachers_are_scored_from_one_embedding():
    """D6, D9, D12: from the mean embeddings, in blocks as at once; an unreadable video is wrong."""
    joint, three = joint_of(adjust_dropout=0.75, neurons=1), experts()
    tests = [jedi.Part(data_of("abc"[i], 4, 5000, K), "test", np.arange(5000)) for i, K in enumerate(CLASSES)]
    for i, part in enumerate(tests):
        part.z, part.bad = random(5000, 14, seed=30 + i), {3: "no frames", 17: "html"} if i else {}
    scores = jedi.score(joint, three, tests)
    assert joint.training and [list(row) for row in scores] == [["expert", "student", "teacher"]] * 3
    for i, (part, row) in enumerate(zip(tests, scores, strict=True)):
        m, e = naive_joint(joint, z=part.z)
        expert = three[i].net.head(part.z.split(WIDTHS, 1)[i])
        good = np.setdiff1d(np.arange(5000), list(part.bad))
        for who, x in (("expert", expert), ("student", m[i]), ("teacher", e[i])):
            probs = x.softmax(1).detach().numpy()
            assert np.allclose(row[who].probs[good], probs[good], atol=1e-5) and row[who].bad == part.bad
            assert not row[who].probs[list(part.bad)].any()
            right = (probs.argmax(1) == part.videos.labels)[good].sum()
            assert evaluate.metrics(row[who])["top1"] == pytest.approx(100 * right / 5000)


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
    (["toy:a", "ucf101"], None), (["toy:a", "folder"], None),
    (["ucf101", "folder", "toy"], None), (["toy:a", "toy:b"], "toy"),
])  # fmt: skip
def test_the_recipe_does_not_depend_on_the_order_of_the_data_sets(names, recipe):
    for order in itertools.permutations(names):
        args = parsed(f"--data {','.join(order)}")
        assert (args.recipe, args.epochs) == (recipe, 100 if recipe else 500)


def test_one_expert_and_one_network_for_all_or_for_each():
    args = parsed("--data toy:a,toy:b --expert e --net tsm10")
    assert [jedi.for_each(args, flag) for flag in ("expert", "net")] == [["e"] * 2, ["tsm10"] * 2]
    args = parsed("--data toy:a,toy:b,toy:c")
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
    ("--data one --extra two,more --root /a,/b", "--root has a value for each of one, two, more"),
    ("--data one,two --labelled_list l.txt", "--labelled_list has a value for each of one, two"),
    ("--data one,a/one", "each data set once, not as one,a/one"), ("--data one,", "once, not as one,"),
    ("--data one,two --extra two", "each data set once"), ("--data a/experts", "each data set once"),
    ("--data hmdb51 --distill ssv2", "--distill is all, none, own, or one of hmdb51, not ssv2"),
    ("--data hmdb51,ucf101 --expert a b c", "--expert has one value, or one for each of hmdb51,ucf101, not"),
    ("--net tsm10 tsn50 tsm50", "--net has one value, or one for each of toy:mini,toy:c, not 3"),
    ("--ratio 0.5 --per_class 2", "--per_class"),
    ("--net tsm11", "tsm11"), ("--expert_flags jitter=30,20", "--jitter"),  # of stage 1
    ("--expert_flags epoch=3", "--epoch"), ("--expert_flags batch=0", "--batch"),
    *((line, line.split()[0]) for line in (
        "--init a b c", "--batch 0", "--temperature 0", "--temperature nan", "--holdout 1.5", "--hidden 0",
        "--adjust_dropout -0.1", "--gamma -1", "--neurons -1", "--teacher_input base+predictions",
        "--extra_videos 0", "--epochs inf", "--stop_after test", "--ratio 0", "--finetune")),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit) as end:
        parsed(line)
    sentence = str(end.value)
    assert sentence.startswith(("jedi: ", "supervised: ")) and word in sentence
    assert sentence.endswith("(2)") and "\n" not in sentence


# ---- runs on videos --------------------------------------------------------------------------------

TINY = ("--hidden 4 --epochs 4 --burn_in 1 --batch 4 --lr_batch 4 --lr 0.02 --neurons 4 --max_bad 0.5 "
        "--log_every 1 --eval_every 1 --workers 0")  # fmt: skip


@pytest.fixture(scope="module")
def world(make, tmp_path_factory):
    """Two data sets, of each a training and a test video that cannot be read or none, and two experts."""
    root = tmp_path_factory.mktemp("world")
    for s, (name, K, counts) in enumerate((("one", 3, (5, 4)), ("two", 2, (4, 3)))):
        (root / name).mkdir()
        for part, n in zip(("train", "test"), counts, strict=True):
            for i in range(n):  # another size is another picture
                side = 20 + 2 * (n * s + 9 * (part == "test") + i)
                make.write(root / name / f"{part}{i}.mp4", frames=8 + i, size=(side, 16 + 2 * s))
            lines = "".join(f"{part}{i}.mp4 {i % K}\n" for i in range(n))
            (root / name / f"{part}.txt").write_text(lines)
        (root / name / "classes.txt").write_text("".join(f"{name} {k}\n" for k in range(K)))
    for file in ("one/train1.mp4", "one/test2.mp4"):
        (root / file).write_text("<html>404</html>")
    recipes = [Recipe(4, 1, 2, 1, 16, 16), Recipe(2, 1, 0, 3, 16, 16, uniform=1, average="logits")]
    nets = ("one", "resnet3d10-small", 3), ("two", "tsm10-small", 2)
    for (name, net, K), recipe in zip(nets, recipes, strict=True):
        build = dict(name=net, classes=K, width=0.0625)
        torch.manual_seed(K)
        net = backbones.build(**build)
        for module in net.modules():  # of others than zeros
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.2, 0.2)
        (root / "experts" / name).mkdir(parents=True)
        classes = [f"{name} {k}" for k in range(K)]
        save_model(root / "experts" / name / "model.pt", net.eval(), build, classes, recipe)
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
    sentence = str(end.value)
    assert sentence.startswith("jedi: ") and sentence.endswith("(2)") and "\n" not in sentence
    return sentence


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of a run of all stages."""
    return start(world, tmp_path_factory.mktemp("whole") / "run")


def table_of(out):
    header, *rows = csv.reader(open(out / "table.csv"))
    return {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}


def result_of(out):
    return json.loads((out / "result.json").read_text())


def test_cache_holds_what_experts_see(world, whole):
    """Sec. 4.3, D6: the mean embedding of the expert's test views, of training videos too."""
    data = load_data(world / "one")
    for name in ("one", "two"):
        net, _, _, recipe = load_model(world / "experts" / name / "model.pt")
        for part in ("train", "test"):
            cache = features.load(whole / "cache" / name / f"one_{part}")
            assert list(cache.bad) == ([1] if part == "train" else [2])
            views = Views(getattr(data, part), recipe.sample, recipe.view, recipe.short_side)
            for i in np.flatnonzero(cache.counts).tolist():
                x = recipe.to_input(views[i]["views"], "cpu")
                assert len(x) == recipe.views > 1
                with torch.no_grad():
                    z = torch.stack([net.embed(v[None])[0] for v in x]).mean(0)
                assert np.allclose(cache.rows[cache.first[i]], z, atol=1e-5)


def test_what_a_run_leaves(world, whole):
    assert sorted(path.name for path in whole.iterdir() if path.suffix != ".pt") == [
        ".lock", "bad_videos.txt", "cache", "config.json", "log.jsonl", "one", "result.json", "table.csv",
        "two"]  # fmt: skip
    assert (whole / "bad_videos.txt").read_text().split("\t")[0] == f"{world}/one/train1.mp4"
    assert (whole / "one" / "labelled.txt").read_text().split()[::2] == [f"train{i}.mp4" for i in range(5)]
    row, table = result_of(whole), table_of(whole)
    assert (row["videos"], row["unreadable"]) == (7, 1) and list(table) == ["expert", "student", "teacher"]
    for who, key in itertools.product(table, ("top1", "top5", "mAP")):
        mean = np.mean([table[who][f"{name} {key}"] for name in ("one", "two")])
        word = key if who == "student" else f"{who}_{key}"
        assert word not in row or row[word] == pytest.approx(mean, abs=0.01)
    assert {"top1", "top5", "mAP", "expert_top1", "teacher_top1"} < row.keys()
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    tests, steps = [row for row in log if "eval" in row], [row for row in log if "lr" in row]
    assert [row["step"] for row in tests] == [0, 2, 4, 6, 8] and len(steps) == 8  # 8 videos, 4 a step
    for name in ("one", "two"):
        for key in ("top1", "top5", "mAP"):
            assert len({row[f"{name}_expert_{key}"] for row in tests}) == 1  # Fig. 3: a straight line
            assert tests[0][f"{name}_student_{key}"] == tests[0][f"{name}_expert_{key}"]  # D5
            last = tests[-1][f"{name}_student_{key}"]
            assert last == pytest.approx(table["student"][f"{name} {key}"], abs=0.01)
    assert [row["loss_kd"] > 0 for row in steps] == [False] * 2 + [True] * 6  # an epoch of burn-in
    for row in steps:
        terms = row["loss_m"] + row["loss_e"] + 0.4 * row["loss_kd"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5) and row["lr"] == 0.02


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_students_score_from_video_is_that_from_the_cache(world, whole, tmp_path, name):
    """It is a network of its own: encoder, adjustment and head; --eval tests it alone, with its own views."""
    net, build, classes, recipe = load_model(whole / name / "model.pt")
    expert, before, _, old = load_model(world / "experts" / name / "model.pt")
    assert recipe == replace(old, average="embeddings") and build == before | {"adapter": 4}
    assert all(torch.equal(net.state_dict()[key], value) for key, value in expert.state_dict().items()
               if not key.startswith("fc."))  # fmt: skip
    cache = features.load(whole / "cache" / name / f"{name}_test")
    z = torch.from_numpy(np.array(cache.rows))
    assert net.adapter.up.weight.any() and not torch.allclose(net.adapter(z), z, atol=1e-3)
    p = iter(net.head(z).softmax(1).tolist())
    start(world, tmp_path, f"--eval {whole}/{name}/model.pt --data {world}/{name} --expert supervised")
    files = [list(csv.DictReader(open(folder / "predictions.csv"))) for folder in (whole / name, tmp_path)]
    for i, rows in enumerate(zip(*files, strict=True)):
        probs = next(p) if cache.counts[i] else None
        for row in rows:
            assert bool(row["unreadable"]) == (probs is None)
            if probs:
                best, share = row["top1"].rsplit(":", 1)
                assert best == classes[int(np.argmax(probs))]
                assert float(share) == pytest.approx(max(probs), abs=2e-6)
    row, table = result_of(tmp_path), table_of(whole)["student"]
    for key in ("top1", "top5", "mAP"):
        assert row[key] == pytest.approx(table[f"{name} {key}"], abs=0.006)
    assert row["unreadable"] == int(name == "one") and (whole / name / "per_class.csv").exists()


def change_expert(world, tmp_path, what):
    """--expert: a copy of the experts, of which the second has changed."""
    if not (tmp_path / "experts").exists():
        shutil.copytree(world / "experts", tmp_path / "experts")
    path = tmp_path / "experts" / "two" / "model.pt"
    net, build, classes, recipe = load_model(path)
    if what == "weights":
        net.layer1[0].bn1.running_mean[0] += 1e-3
    if what == "network":  # with tensors of the same names, without the shift
        build = build | dict(name="tsn10-small")
    save_model(path, net, build, classes, recipe)
    return f"--expert {tmp_path}/experts"


@pytest.mark.parametrize("what, folder, word", [
    ("weights", "two/one_train", "expert"),
    ("network", "two/one_train", "network.name tsm10-small, not tsn10-small"),
])  # fmt: skip
def test_a_cache_of_something_else_is_refused(world, whole, tmp_path, what, folder, word):
    more = change_expert(world, tmp_path, what)
    sentence = refused(world, tmp_path / "out", f"--cache {whole}/cache {more}")
    assert f"{whole}/cache/{folder} has other features ({word}" in sentence
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_finished_run_does_not_show_its_result_for_other_experts(world, whole, tmp_path):
    more = change_expert(world, tmp_path, "nothing")
    start(world, tmp_path / "out", f"{more} --cache {whole}/cache --epochs 0.5")
    change_expert(world, tmp_path, "weights")
    sentence = refused(world, tmp_path / "out", f"{more} --cache {tmp_path}/cache --epochs 0.5")
    assert "was trained with expert of two" in sentence


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npy", ".npz")}


def test_a_sample_of_an_extra_data_set_on_a_shared_cache(world, whole, tmp_path, monkeypatch):
    """The cache has the whole list, which serves every number of videos; none is embedded again. The extra
    videos have no label, and alone are distilled."""
    before, learned, train_step = times(whole / "cache"), set(), jedi.train_step

    def spied(net, z, own, y, w, *rest):
        assert own[0].tolist() == (y >= 0).nonzero()[:, 0].tolist() and w[:, 0].tolist() == (y < 0).tolist()
        return train_step(net, z, own, y, w, *rest)

    monkeypatch.setattr(jedi, "train_step", spied)
    more = f"--data {world}/one --extra {world}/two --distill two --cache {whole}/cache"
    for n in (1, 4):
        start(world, tmp_path / f"{n}", f"{more} --extra_videos {n}")
        state = torch.load(tmp_path / f"{n}" / "last.pt", weights_only=True)
        learned.add(str(state["identity"]["list of two"]))
        assert result_of(tmp_path / f"{n}")["videos"] == 4
    assert times(whole / "cache") == before and len(before) > 8 and len(learned) == 2


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
    sentence = refused(world, tmp_path / "out", more)
    assert word in sentence and not (tmp_path / "out" / "experts").exists()
    assert "mended" not in sentence or sentence.endswith(f"delete {tmp_path}/out/cache/one/one_train (2)")


def test_given_experts_that_know_the_held_out_videos_are_named(world, tmp_path, capfd):
    """Held-out videos are tested and not learned. An expert without a list of what it has learned may know
    them; one whose list has none does not. A list of other videos than those with a label is named."""
    more = "--holdout 0.4 --epochs 0.5"
    start(world, tmp_path / "a", more)
    for name, n in (("one", 5), ("two", 4)):
        tested = [row["video"] for row in csv.DictReader(open(tmp_path / "a" / name / "predictions.csv"))]
        learned = (tmp_path / "a" / name / "labelled.txt").read_text().split()[::2]
        assert len(tested) == 2 and sorted([*tested, *learned]) == [f"train{i}.mp4" for i in range(n)]
        shutil.copytree(world / "experts" / name, tmp_path / "experts" / name)
        shutil.copy(tmp_path / "a" / name / "labelled.txt", tmp_path / "experts" / name)
    caches = {path.parent.name for path in (tmp_path / "a").glob("cache/*/*/index.npz")}
    assert caches == {"one_train", "two_train"}
    assert result_of(tmp_path / "a")["held_out_known_to"] == "one,two"
    assert "the expert of two may have been trained on the held-out videos" in capfd.readouterr().out
    more += f" --cache {tmp_path}/a/cache --expert {tmp_path}/experts"
    start(world, tmp_path / "b", more)
    assert "held_out_known_to" not in result_of(tmp_path / "b")
    lines = "".join(f"train{i}.mp4 {i % 2}\n" for i in range(4)).encode()
    (tmp_path / "experts/two/labelled.txt").write_bytes(lines + b"\xff.mp4 1\n")  # not UTF-8
    capfd.readouterr()
    start(world, tmp_path / "c", more)
    printed = capfd.readouterr().out
    assert result_of(tmp_path / "c")["held_out_known_to"] == "two"
    assert "two/model.pt was trained on other videos" in printed
    assert "one/model.pt was trained on other videos" not in printed


def test_an_expert_may_be_a_student_of_another_run(world, whole, tmp_path):
    """The next generation: with its adjustment, which may have another number of units."""
    start(world, tmp_path / "out", f"--expert {whole} --hidden 6 --epochs 0 --max_bad 0.5")
    table = table_of(tmp_path / "out")
    for key, value in table_of(whole)["student"].items():
        assert table["expert"][key] == table["student"][key] == value
    assert load_model(tmp_path / "out" / "one" / "model.pt")[1]["adapter"] == 4

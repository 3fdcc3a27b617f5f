"""The equations of motionfit.py (a value by hand, a plain loop from the paper, where gradients go), its clips
and their labels, what its stages learn and leave to each other, retrieval, and its command line. KMeans has a
file of its own."""

import itertools
import json
import math
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

import motionfit
from common import UserError, backbones, datasets, evaluate, flow, optim, show
from common.datasets import Data, Videos
from common.features import Features
from common.run import Run

pytestmark = pytest.mark.usefixtures("leave", "group")


@pytest.fixture
def run(tmp_path):
    with Run("motionfit", tmp_path / "out", {}, log_every=1) as run:
        yield run


def parsed(line):
    return motionfit.parse_args(line.split())


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


def test_eq1_matches_naive_loop():
    logits, y = random(4, 3, 5), torch.arange(12).view(4, 3) % 5
    total = 0.0
    for b in range(4):
        total += sum(-math.log(softmax(logits[b, i].tolist())[y[b, i]]) for i in range(3)) / 3
    assert motionfit.multi_clip_loss(logits, y).item() == pytest.approx(total / 4, rel=1e-5)
    loss = motionfit.multi_clip_loss(logits.bfloat16(), y)  # autocast's
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total / 4, rel=0.02)


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


def test_eq2_matches_naive_loop():
    logits, p = random(7, 6), torch.arange(7) % 6
    naive = sum(-math.log(softmax(row)[k]) for row, k in zip(logits.tolist(), p.tolist(), strict=True)) / 7
    assert motionfit.clip_order_loss(logits, p).item() == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("R", [2, 3, 4])
def test_eq2_every_order_has_one_number(R):
    head = motionfit.OrderHead(5, R, hidden=8)
    orders = [tuple(order) for order in head.orders.tolist()]
    assert sorted(orders) == sorted(itertools.permutations(range(R))) and len(set(orders)) == len(orders)
    assert head(random(2, R, 5), torch.tensor([0, 1])).shape == (2, math.factorial(R))


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


@pytest.mark.parametrize("percentile", [10, 50, 75, 90])
def test_eq4_matches_naive_loop(percentile):
    for T in range(2, 12):
        f = random(T, 5, seed=T).numpy()
        change = [sum(abs(float(a) - float(b)) for a, b in zip(f[t], f[t - 1], strict=True))
                  for t in range(1, T)]  # fmt: skip
        tau = naive_percentile(change, percentile)
        assert motionfit.boundaries(f, percentile).tolist() == [False, *(c > tau for c in change)]


def test_eq4_ends_of_the_percentile():
    f = column(0, 3, 4, 4, 9)  # changes 3, 1, 0, 5
    assert motionfit.boundaries(f, 0).tolist() == [False, True, True, False, True]  # any but the least
    assert not motionfit.boundaries(f, 100).any()


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


def test_sec32_segment_means_match_naive_loop():
    f, own = random(9, 4).numpy(), np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])
    expected = [np.mean([f[t] for t in range(9) if own[t] == s], axis=0) for s in range(5)]
    assert motionfit.segment_means(f, own) == pytest.approx(np.stack(expected), rel=1e-6)


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


# ---- retrieval -------------------------------------------------------------------------------------


def naive_recall(z, y, z_train, y_train, n):
    """Sec. 4.5: for a query the n nearest training clips; any of its class makes it correct."""
    correct = 0
    for q, label in zip(z.tolist(), y.tolist(), strict=True):
        cosines = [sum(a * b for a, b in zip(q, k, strict=True)) / (math.hypot(*q) * math.hypot(*k))
                   for k in z_train.tolist()]  # fmt: skip
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:n]
        correct += label in [int(y_train[i]) for i in nearest]
    return 100 * correct / len(z)


def test_recall_known_value():
    # By cosine the first query is nearest to the first clip, though the third is at its side.
    z_train, y_train = torch.tensor([[9.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([0, 1, 2])
    z, y = torch.tensor([[1.0, 0.1], [0.1, 9.0], [0.2, 1.0]]), torch.tensor([0, 2, 0])
    found, nearest = motionfit.recall(z, y, z_train, y_train, nearest=(1, 2, 3))
    assert found == pytest.approx({1: 100 / 3, 2: 200 / 3, 3: 100})
    assert nearest.tolist() == [[0, 2, 1], [1, 2, 0], [1, 2, 0]]


def test_recall_matches_brute_force():
    z, y = random(40, 6, seed=1), torch.arange(40) % 9
    z_train, y_train = random(120, 6, seed=2) * torch.rand(120, 1).add(0.1), torch.arange(120) * 7 % 9
    found, nearest = motionfit.recall(z, y, z_train, y_train)
    assert list(found) == [1, 5, 10, 20, 50] and nearest.shape == (40, 50)
    assert found == pytest.approx({n: naive_recall(z, y, z_train, y_train, n) for n in found})
    assert 0 < found[1] < found[5] < found[10] < 100


def test_recall_with_fewer_training_clips_than_n():
    z, y = random(9, 3, seed=1), torch.arange(9) % 4
    z_train, y_train = random(4, 3, seed=2), torch.tensor([0, 1, 1, 2])
    found, nearest = motionfit.recall(z, y, z_train, y_train)
    assert nearest.shape == (9, 4)
    assert found == pytest.approx({n: naive_recall(z, y, z_train, y_train, n) for n in found})
    assert found[50] == pytest.approx(700 / 9)  # nothing has class 3


def test_recall_of_many_queries():
    z = torch.eye(3)[torch.arange(2500) % 3]
    found, nearest = motionfit.recall(z, torch.arange(2500) % 3, torch.eye(3), torch.arange(3), nearest=[1])
    assert found == {1: 100} and torch.equal(nearest[:, 0], torch.arange(2500) % 3)


def part_of(rows, counts):
    return Features(np.array(rows, np.float32), np.array(counts), {})


def directions(*angles):
    """Unit vectors in the plane, of degrees."""
    return [[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in angles]


def test_recalls_of_clips_and_of_videos(run):
    """Two clips of a video may be apart, and their mean in between (D15); a video without clips is wrong."""
    train, test = Videos.make("", ["t0", "t1"], [0, 1]), Videos.make("", list("qrst"), [0, 0, 1, 0])
    data, recipe = Data("set", 1, ("a", "b"), train, test, False, True, ()), evaluate.Recipe(2, 1, 2, 1)
    z_train = part_of(directions(0, 90, 50, 52), [2, 2])  # the means are at 45 and 51
    # q: both clips are next to the first video, and the mean at 45; r is unreadable; s: both clips are next
    # to the first video, which is wrong, but the mean at 51 is right; t: all wrong.
    z = part_of(directions(1, 89, 10, 92, 50, 53), [2, 0, 2, 2])
    row = motionfit.recalls(Namespace(sheet=0), run, data, recipe, z_train, z)
    assert (row["R1"], row["videos_R1"]) == pytest.approx((100 * 2 / 8, 100 * 2 / 4))
    assert (row["R5"], row["videos_R5"]) == pytest.approx((75, 75))  # with all there is, all but r
    assert set(row) == {f"{kind}R{n}" for kind in ("", "videos_") for n in (1, 5, 10, 20, 50)}
    assert not (run.out / "sheet.png").exists()


def test_sheet_shows_queries_and_their_three_nearest(sets, run, monkeypatch):
    """Middle clips of two of the four readable test videos, the first and the last."""
    data, sheets = datasets.load(f"{sets}/set"), []
    monkeypatch.setattr(show, "contact_sheet", lambda *sheet: sheets.append(sheet))
    recipe = evaluate.Recipe(4, 1, 3, 1, size=16, stretch=(20, 26))
    z_train = random(24, 5, seed=3).numpy()
    z = z_train[[0, 7, 1, 2, 3, 4, 5, 6, 8, 9, 22, 10]]  # the middle clips are 7, 3, 6 and 22
    row = motionfit.recalls(Namespace(sheet=2), run, data, recipe, part_of(z_train, [3] * 8),
                            part_of(z, [3, 0, 3, 3, 3]))  # fmt: skip
    assert row["R50"] == 80
    (path, rows, captions), = sheets  # fmt: skip
    assert path == run.out / "sheet.png" and len(rows) == len(captions) == 8
    for k, (test, middle) in enumerate(((0, 7), (4, 22))):
        with evaluate.Recipe.open(recipe, data.test, test) as source:
            frames = recipe.sample(source)[1].tolist()
        assert moment(rows[4 * k]) == (test, frames)
        assert captions[4 * k] == f"{data.test.name(test)}: {'ab'[test % 2]}"
        cosines = [float(z_train[middle] @ x / np.linalg.norm(x)) for x in z_train]
        for place, clip in enumerate(sorted(range(24), key=lambda i: -cosines[i])[:3], 1):
            with evaluate.Recipe.open(recipe, data.train, clip // 3) as source:
                frames = recipe.sample(source)[clip % 3].tolist()
            assert moment(rows[4 * k + place]) == (clip // 3, frames)
            hit = "hit" if clip // 3 % 2 == test % 2 else "miss"
            name = data.train.name(clip // 3)
            assert captions[4 * k + place] == f"  {place} {hit}: {'ab'[clip // 3 % 2]}, {name}"


def test_sec45_features_are_maxima():
    f = random(2, 5, 3, 2, 2)
    net = SimpleNamespace(features=lambda x: [x, f])
    expected = [[max(f[b, d].flatten().tolist()) for d in range(5)] for b in range(2)]
    assert motionfit.max_features(net, None).tolist() == expected


# ---- a small data set ------------------------------------------------------------------------------

FRAMES = [13, 24, 5, 17, 13, 21, 9, 13]  # of the training videos; of class a and b by turns
DENSE = [3, 5, 1, 4, 3, 5, 2, 3]  # clips of 4 fields in the fields, which are one fewer
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
    flow.write(target, field)


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


SHORT = ("--generator_net r3d_10-pool --net r3d_10-pool --width 0.0625 --size 16 --stretch 20 26 --frames 4 "
         "--lr_batch 2 --batch 2 --multi_clips 2 --epochs 1 --lr_steps cosine --optimizer adamw --lr 0.01 "
         "--clusters 2 --clips 2 --workers 0 --log_every 1 --eval_every 100 --holdout 0 "
         "--max_bad 0.5")  # fmt: skip


def line_of(sets, out, more=""):
    return parsed(f"--data {sets}/set --source {sets}/src --out {out} {SHORT} {more}")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def go(stage, sets, out, more=""):
    """Run one stage; the rows of its log."""
    assert motionfit.one_run(line_of(sets, out, more), stage)
    return rows_of(out if stage == "finetune" else out / stage)


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
    """The run folder of all stages, as `main` runs them, and of retrieval."""
    out = tmp_path_factory.mktemp("whole")
    flags = f"--data {sets}/set --source {sets}/src --out {out} {SHORT} --holdout 0.2"
    with pytest.MonkeyPatch.context() as patch:
        for more in ("", "--stage retrieve --sheet 2 --clips 3"):
            line = f"{flags} --epochs 10 8 16 --batch 4 --lr_batch 4 --lr 0.02 {more}"
            patch.setattr("sys.argv", ["motionfit.py", *line.split()])
            motionfit.main()
    return out


# ---- clips -----------------------------------------------------------------------------------------


def drawn(n, R, frames, stride, seeds):
    return [motionfit.multi_clip(n, R, frames, stride, np.random.default_rng(s)) for s in range(seeds)]


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
    (20, 4, 1, 4, [0, 4, 8, 12, 16]), (19, 4, 1, 4, [0, 4, 8, 12]), (20, 4, 1, 7, [0, 7, 14]),
    (20, 4, 3, 4, [0, 4, 8]), (4, 4, 1, 1, [0]), (5, 4, 1, 1, [0, 1]), (3, 4, 1, 4, [0]), (0, 4, 1, 4, [0]),
])  # fmt: skip
def test_d7_dense_clips_by_hand(n, frames, stride, hop, expected):
    assert motionfit.dense_starts(n, frames, stride, hop).tolist() == expected


def test_d7_no_more_than_128_dense_clips():
    assert motionfit.dense_starts(127 * 5 + 6, 4, 1, 5).tolist() == list(range(0, 636, 5))  # 128 of them
    assert len(motionfit.dense_starts(128 * 5 + 4, 4, 1, 5)) == 128
    starts = motionfit.dense_starts(1004, 4, 1, 5)
    assert len(starts) == 128 and (starts[0], starts[-1]) == (0, 1000) and starts.dtype == np.int64
    assert set(np.diff(starts)) == {7, 8}  # 1000 / 127


def test_d7_dense_recipe_gives_their_frames():
    windows = motionfit.Dense(3, 2, hop=6).sample(range(18))
    assert [w.tolist() for w in windows] == [[0, 2, 4], [6, 8, 10], [12, 14, 16]]
    (window,) = motionfit.Dense(3, 2, hop=6).sample(range(4))
    assert window.tolist() == [0, 2, 0]


def pseudo_of(counts, frames=4, stride=1, hop=4, fewer=1, learned=None, videos=""):
    """The labels of the clips are 100, 101, ..."""
    first = np.concatenate([[0], np.cumsum(counts)])
    labels = np.arange(100, 100 + first[-1], dtype=np.int32)
    return motionfit.Pseudo(labels, first, 200, frames, stride, hop, fewer, videos, learned or {})


@pytest.mark.parametrize("fewer", [0, 1])
@pytest.mark.parametrize("n, stride, hop", [(5, 1, 4), (13, 1, 4), (24, 1, 3), (24, 2, 5), (900, 1, 4)])
def test_d10_a_clip_as_long_as_the_generators_is_the_dense_clip(n, stride, hop, fewer):
    """Field i is the motion from frame i on."""
    labels = pseudo_of([1], 4, stride, hop, fewer)
    clips = motionfit.Dense(4, stride, hop=hop).sample(range(n - fewer))
    if n - fewer > 3 * stride:
        assert len(labels.starts(n)) == len(clips)
        assert all(np.array_equal(labels.window(n, t, 4, stride), clip) for t, clip in enumerate(clips))


@pytest.mark.parametrize("n, t, frames, stride, expected", [
    (24, 2, 8, 1, range(6, 14)), (24, 2, 7, 1, range(7, 14)), (24, 2, 6, 2, range(5, 17, 2)),
    (24, 2, 2, 1, range(9, 11)),  # shorter: in the middle of the dense clip
    (24, 0, 8, 1, range(8)), (24, 4, 12, 1, range(12, 24)), (24, 4, 14, 1, range(10, 24)),  # up to the ends
    (6, 0, 8, 1, [0, 1, 2, 3, 4, 5, 0, 1]),
])  # fmt: skip
def test_d10_a_longer_clip_has_the_dense_clip_in_its_middle(n, t, frames, stride, expected):
    """The dense clips start at 0, 4, 8, 12 and 16."""
    assert pseudo_of([1]).window(n, t, frames, stride).tolist() == list(expected)


def test_pseudo_labels_of_a_video():
    labels = pseudo_of([3, 0, 2])
    assert [labels.of(i).tolist() for i in range(3)] == [[100, 101, 102], [], [103, 104]]


@pytest.fixture(scope="module")
def videos(sets):
    """The training videos of `set`; their labels are their numbers."""
    return replace(datasets.load(f"{sets}/set").train, labels=np.arange(8))


@pytest.mark.parametrize("frames, neighbours", [(4, False), (6, True)])
def test_d10_d11_labels_belong_to_the_windows(videos, frames, neighbours):
    labels, args = pseudo_of(DENSE), Namespace(multi_clips=2, frames=frames, stride=1)
    for i, seed in itertools.product(range(8), range(4)):
        with motionfit.Labelled(videos, i, pseudo=labels, neighbours=neighbours) as source:
            windows = source.draw(np.random.default_rng(seed), args)
            *clips, y = source.clips(windows)
        assert len(clips) == 2 and y.dtype == torch.int64 and y.shape == (2, 3 if neighbours else 1)
        for clip, ys in zip(clips, y.tolist(), strict=True):
            t = ys[0] - labels.first[i] - 100
            assert moment(clip) == (i, labels.window(FRAMES[i], t, frames, 1).tolist())
            if neighbours:
                ends = ys[0] + 1 if t + 1 < DENSE[i] else -1, ys[0] - 1 if t > 0 else -1
                assert tuple(ys[1:]) == ends
        assert y[0, 0] < y[1, 0] or DENSE[i] == 1  # in the order of time, and different if there are two


def test_d10_every_dense_clip_is_drawn(videos):
    labels, args, met = pseudo_of(DENSE), Namespace(multi_clips=3, frames=4, stride=1), Counter()
    for seed in range(40):
        with motionfit.Labelled(videos, 1, pseudo=labels, neighbours=False) as source:
            source.draw(np.random.default_rng(seed), args)
            met.update(source.drawn.tolist())
    assert set(met) == set(range(5)) and min(met.values()) > 12  # of 24 expected


def test_d10_a_video_with_fewer_frames_than_its_flow_told(videos):
    labels, args = pseudo_of([*DENSE[:6], 7, 3]), Namespace(multi_clips=2, frames=4, stride=1)
    with motionfit.Labelled(videos, 6, pseudo=labels, neighbours=False) as source:  # 9 frames: clips 0, 1
        source.draw(np.random.default_rng(0), args)
    assert source.drawn.tolist() == [0, 1]


def seen_args(**changes):
    return train_args(**dict(clips=2, crops=1, test_size=16, average="logits") | changes)


def train_args(**changes):
    return Namespace(**dict(multi_clips=2, frames=4, stride=1, size=16, stretch=(20, 26), flip=False, seed=0,
                            holdout=0.0, neighbours=False) | changes)  # fmt: skip


def test_pseudo_clips_know_no_true_label(videos):
    labels = pseudo_of([*DENSE[:3], 0, *DENSE[4:]])  # of video 3 nothing could be read
    clips, held = motionfit.pseudo_clips(replace(videos, labels=np.array([7] * 8)), labels,
                                         train_args(holdout=0.25))  # fmt: skip
    assert sorted([*clips.videos.labels, *(int(held.name(i)[-1]) for i in range(len(held)))]) == [
        0, 1, 2, 4, 5, 6, 7]  # fmt: skip
    assert all(clips.videos.name(i)[-1] == str(number) for i, number in enumerate(clips.videos.labels))
    for i in range(len(held)):
        own = labels.of(int(held.name(i)[-1]))
        assert held.labels[i] == own[len(own) // 2]
    for p in range(10):
        item = clips[p]
        x, y = item["views"]
        assert x.shape == (2, 4, 3, 16, 16) and y.shape == (2, 1)
        assert all(int(k) in labels.of(moment(clip)[0]) for clip, k in zip(x, y, strict=True))


def test_held_out_pseudo_label_is_that_of_the_clip_seen():
    """Middle shows the dense clip whose label pseudo_clips gives the video."""
    labels = pseudo_of(DENSE)
    recipe = motionfit.Middle(6, 1, pseudo=labels)
    for i, n in enumerate(FRAMES):
        (window,) = recipe.sample(range(n))
        assert np.array_equal(window, labels.window(n, len(labels.of(i)) // 2, 6, 1))


@pytest.mark.parametrize("kinds", [("rgb",), ("field",), ("rgb", "field")])
def test_all_networks_see_the_same_moments(kinds, videos, sets):
    fields = replace(videos, flow=f"{sets}/set_flow")
    clips, starts = motionfit.training_clips(fields, train_args(), kinds, (20.0, 256)), set()
    for p in range(24):
        item = clips[p]
        assert len(item["views"]) == len(kinds)
        for x in item["views"]:
            assert [moment(clip) for clip in x] == [moment(clip) for clip in item["views"][0]]
        assert [clip.shape[1] for x in item["views"] for clip in x] == [3 if k == "rgb" else 2 for k in kinds
                                                                        for _ in range(2)]  # fmt: skip
        (v, first), (_, last) = map(moment, item["views"][0])
        assert v == item["label"] and first[0] <= last[0]
        starts.add((v, first[0], last[0]))
    assert len(starts) > 15


def groups_of(sizes):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return Videos.make("", [f"v{i}" for i in range(len(groups))], [0] * len(groups), groups)


def test_d12_whole_groups_are_held_out():
    videos = groups_of([3, 1, 7, 2, 4, 5, 1, 9, 3, 5])  # 40
    chosen = set()
    for seed in range(20):
        held = datasets.held_out(videos, 0.25, seed)
        assert held.dtype == bool and 10 <= held.sum() < 10 + 9
        assert all(held[videos.groups == g].all() or not held[videos.groups == g].any() for g in range(10))
        assert np.array_equal(held, datasets.held_out(videos, 0.25, seed))
        chosen.add(tuple(held))
    assert len(chosen) > 10


@pytest.mark.parametrize("share, left", [(0.0, 4), (1.0, 1), (0.3, 2)])
def test_d12_one_group_at_least_is_left(share, left):
    held = datasets.held_out(groups_of([5, 5, 5, 5]), share, 0)
    assert len(set(groups_of([5, 5, 5, 5]).groups[~held])) == left
    assert not datasets.held_out(groups_of([6]), 0.9, 0).any()


def test_d12_videos_without_groups_are_each_their_own():
    videos = Videos.make("", [f"v{i}" for i in range(40)], [0] * 40)
    held = datasets.held_out(videos, 0.1, 3)
    assert held.sum() == 4 and not np.array_equal(held, datasets.held_out(videos, 0.1, 4))


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


def test_labels_come_last():
    y = torch.tensor([[4], [5]])
    (*clips,) = painted(2)[::2]
    args = train_args(size=24, stretch=[32, 44])
    views = motionfit.train_views([*clips, y], args, ("rgb",), labelled=True)
    assert len(views) == 2 and views[0].shape == (2, 2, 3, 24, 24) and torch.equal(views[1], y)


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


def test_build_networks(run, sets):
    args = line_of(sets, "o", "--dropout 0.3 --seed 4")
    net, made = motionfit.build(args, "r2plus1d_10", 7, "field", run)
    assert net.name == "r2plus1d_10" and net.stem[0].weight.shape[1] == 2 and net.fc.out_features == 7
    again = backbones.build(**made)
    again.load_state_dict(net.state_dict())
    assert again.dropout.p == 0.3 and again.fc.in_features == 512 // 16
    same, _ = motionfit.build(args, "r2plus1d_10", 7, "field", run)
    assert all(map(torch.equal, net.parameters(), same.parameters()))
    args.seed = 5
    other, _ = motionfit.build(args, "r2plus1d_10", 7, "field", run)
    assert not torch.equal(net.stem[0].weight, other.stem[0].weight)


@pytest.mark.parametrize("classes", [3, 5])
def test_the_classifier_of_clusters_is_not_that_of_classes(classes, run, sets, tmp_path):
    """Not even where there are as many of them."""
    torch.manual_seed(1)
    made = dict(name="r3d_10-pool", classes=3, in_channels=3, width=1 / 16, dropout=0.0)
    source = backbones.build(**made)
    evaluate.save_model(tmp_path / "m.pt", source, made, "abc", evaluate.Recipe(4, 1))
    args = line_of(sets, "o")
    net, _ = motionfit.build(args, "r3d_10-pool", classes, "rgb", run, str(tmp_path / "m.pt"))
    own, theirs = net.state_dict(), source.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in own if not key.startswith("fc."))
    assert net.fc.out_features == classes and not torch.isin(own["fc.weight"], theirs["fc.weight"]).any()


# ---- a step ----------------------------------------------------------------------------------------


class Spy:
    """A network, and the orders it was given."""

    def __init__(self, net):
        self.net, self.p = net, None

    def __call__(self, x, p):
        self.p = p
        return self.net(x, p)


def step(R=2, lam=1.0, neighbours=False, teacher=False, y=True):
    """(network, x, y, z_teacher, p, loss, {name: value}) of a step of 3 videos."""
    net = network(R, 3, lam < 1, neighbours)
    spied, x = Spy(net), random(3, R, 3, 4, 16, 16, scale=1.0)
    y = torch.arange(3 * R * 3).view(3, R, 3) * 5 % 7 % 4 - 1 if y else None
    if y is not None:
        y[..., 0] = torch.arange(3 * R).view(3, R) % 3
        y = y if neighbours else y[..., :1]
    z_teacher = random(3 * R, 32, seed=5).requires_grad_() if teacher else None
    args = Namespace(multi_clips=R, lam=lam, alpha=50.0)
    loss, terms = motionfit.train_step(spied, x, y, args, z_teacher)
    return net, x, y, z_teacher, spied.p, loss, {name: term.item() for name, term in terms.items()}


def outputs(net, x):
    z = net.backbone.embed(x.flatten(0, 1)).detach()
    fc = net.backbone.fc
    return z, (z @ fc.weight.T + fc.bias).detach().view(*x.shape[:2], -1)


def test_step_of_clips_alone():
    net, x, y, _, p, loss, terms = step()
    _, logits = outputs(net, x)
    right = sum(int(logits[b, i].argmax()) == int(y[b, i, 0]) for b in range(3) for i in range(2))
    assert p is None and terms == pytest.approx(
        {"loss_mc": naive_mc(logits, y[..., 0]), "clip_top1": right / 6}, rel=1e-4)  # fmt: skip
    assert loss.item() == pytest.approx(terms["loss_mc"], rel=1e-6)


def test_step_with_the_order():
    net, x, y, _, p, loss, terms = step(R=3, lam=0.3)
    z, logits = outputs(net, x)
    order = net.order(z.view(3, 3, -1), p)
    naive = sum(-math.log(softmax(row)[k]) for row, k in zip(order.tolist(), p.tolist(), strict=True)) / 3
    assert set(terms) == {"loss_mc", "loss_co", "clip_top1"}
    assert terms["loss_mc"] == pytest.approx(naive_mc(logits, y[..., 0]), rel=1e-4)
    assert terms["loss_co"] == pytest.approx(naive, rel=1e-4)
    assert loss.item() == pytest.approx(0.3 * terms["loss_mc"] + 0.7 * naive, rel=1e-4)


def test_step_draws_every_order_alike():
    found = []

    def net(x, p):
        found.append(p)
        return [torch.zeros(len(x), 3, 2)], torch.zeros(len(x), 6), None

    y = torch.zeros(600, 3, 1, dtype=torch.int64)
    motionfit.train_step(net, torch.zeros(600, 1), y, Namespace(multi_clips=3, lam=0.5))
    counts = torch.bincount(found[0])
    assert len(counts) == 6 and counts.min() > 60  # of 100


def test_step_with_neighbours():
    net, x, y, _, _, loss, terms = step(neighbours=True)
    z, logits = outputs(net, x)
    by_hand = {"loss_mc": naive_mc(logits, y[..., 0])}
    for k, name in ((1, "loss_next"), (2, "loss_previous")):
        head = net.heads[k - 1]
        by_hand[name] = naive_mc((z @ head.weight.T + head.bias).detach().view(3, 2, 3), y[..., k])
    assert (y[..., 1:] < 0).any() and set(terms) == {*by_hand, "clip_top1"}
    assert terms["clip_top1"] == pytest.approx((logits.argmax(-1) == y[..., 0]).double().mean().item())
    assert {name: terms[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-4)
    assert loss.item() == pytest.approx(sum(by_hand.values()), rel=1e-4)


def test_step_with_neighbours_and_the_order():
    """Eq. 3 weighs all that is told of pseudo-labels against the order."""
    *_, loss, terms = step(R=2, lam=0.6, neighbours=True)
    labels = terms["loss_mc"] + terms["loss_next"] + terms["loss_previous"]
    assert loss.item() == pytest.approx(0.6 * labels + 0.4 * terms["loss_co"], rel=1e-5)


def test_step_of_mers():
    net, x, _, z_teacher, _, loss, terms = step(teacher=True, y=False)
    by_hand = naive_features(outputs(net, x)[0], z_teacher)
    assert terms == pytest.approx({"loss_features": by_hand}, rel=1e-4)
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    loss.backward()
    assert z_teacher.grad is None and net.backbone.fc.weight.grad is None
    assert net.backbone.stem[0].weight.grad.any()


def test_step_of_mars():
    net, x, y, z_teacher, _, loss, terms = step(teacher=True)
    z, logits = outputs(net, x)
    by_hand = naive_mc(logits, y[..., 0]), naive_features(z, z_teacher)
    assert set(terms) == {"loss_mc", "loss_features", "clip_top1"}
    assert (terms["loss_mc"], terms["loss_features"]) == pytest.approx(by_hand, rel=1e-4)
    assert loss.item() == pytest.approx(by_hand[0] + 50 * by_hand[1], rel=1e-4)  # D17
    loss.backward()
    assert z_teacher.grad is None and net.backbone.fc.weight.grad.any()


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_eq3_lambda_0_is_the_order_alone(lam):
    net, *_, loss, terms = step(R=3, lam=lam)
    loss.backward()
    assert bool(net.backbone.fc.weight.grad.any()) == (lam > 0) and terms["loss_mc"] > 0  # reported
    assert net.backbone.stem[0].weight.grad.any() and net.order.last[1].weight.grad.any()


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
    """Names and labels of the videos that are scored: in training one view of each, with --crops 3 in the end
    six."""
    found, real = {}, evaluate.score

    def spied(net, videos, recipe, *rest, **words):
        found.update({videos.name(i): int(videos.labels[i]) for i in range(len(videos))})
        assert (recipe.clips, recipe.crops) == ((2, 3) if videos.name(0).startswith("a/test") else (1, 1))
        return real(net, videos, recipe, *rest, **words)

    monkeypatch.setattr(evaluate, "score", spied)
    return found


def weights(path):
    return torch.load(path, weights_only=True)["net"]


def test_generator_learns_labelled_clips_of_flow_by_its_schedule(sets, tmp_path, steps, scored):
    """Sec. 4.2: a tenth of the rate at steps; a share of the videos is for validation alone."""
    line = "--epochs 3 --lr_steps 1,2 --optimizer sgd --lr 0.1 --holdout 0.25 --eval_every 1 --crops 3"
    rows = go("generator", sets, tmp_path, line)
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3)
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
    recipe = evaluate.load_model(tmp_path / "generator" / "model.pt")[3]
    assert (recipe.modality, recipe.crops) == ("field", 3)
    go("pseudo", sets, tmp_path, "--crops 3")
    assert result_of(tmp_path / "pseudo")["clips"] == 17  # of each clip one crop


def test_generator_may_learn_the_order(sets, tmp_path):
    (row, *_) = go("generator", sets, tmp_path, "--lam 0.25 --generator_on rgb --multi_clips 3")
    assert row["loss"] == pytest.approx(0.25 * row["loss_mc"] + 0.75 * row["loss_co"], rel=1e-4)
    net, made, _, recipe = evaluate.load_model(tmp_path / "generator" / "model.pt")
    assert recipe.modality == "rgb" and made["in_channels"] == 3


def test_d1_the_rate_follows_the_videos_of_a_step(sets, run, monkeypatch):
    args, rates = motionfit.of_stage(line_of(sets, "o", "--lr 0.1 --lr_batch 2"), "generator"), []

    def build(name, parameters, lr, weight_decay):
        rates.append((name, lr, weight_decay))
        raise KeyError

    monkeypatch.setattr(optim, "build", build)
    videos = datasets.load(f"{sets}/set").train
    clips = motionfit.training_clips(videos, args, ("rgb",), (20.0, 256))
    for run.world in (1, 4):
        with pytest.raises(KeyError):
            motionfit.fit(args, run, network(), clips, (evaluate.Recipe(4, 1),), videos.subset([]))
    assert rates == [("adamw", 0.1, 5e-4), ("adamw", pytest.approx(0.4), 5e-4)]


def test_sec42_finetuning_leaves_early_stages_at_rest(whole, sets, tmp_path):
    """Parameters and statistics of all but conv4, conv5 and fc are those of self-training."""
    init = whole / "selftrain" / "model.pt"
    go("finetune", sets, tmp_path, f"--init {init}")
    before, after = weights(init), weights(tmp_path / "model.pt")
    early = {key for key in before if key.startswith(("stem.", "layer1.", "layer2."))}
    late = {key for key in before if key.startswith(("layer3.", "layer4."))}
    assert len(early) > 20 and len(early | late) + 2 == len(before)
    assert all(torch.equal(before[key], after[key]) for key in early)
    assert not any(torch.equal(before[key], after[key]) for key in late)


def test_d13_from_random_weights_everything_learns(sets, tmp_path):
    go("finetune", sets, tmp_path, "--init none")
    torch.manual_seed(0)
    before = backbones.build("r3d_10-pool", 2, width=0.0625).state_dict()
    after = weights(tmp_path / "model.pt")
    assert not any(torch.equal(before[key], after[key]) for key in before)


class Teacher:
    """In place of a generator, of the student's width: keeps what it is shown."""

    def __init__(self):
        self.x, self.fc, self.state_dict = [], nn.Linear(32, 2), dict

    def embed(self, x):
        assert not torch.is_grad_enabled()
        self.x.append(x)
        return torch.zeros(len(x), 32)


@pytest.mark.parametrize("stage, transfer", [("selftrain", "mers"), ("finetune", "mars")])
def test_table5_teacher_and_student_see_one_moment(stage, transfer, sets, tmp_path, steps, monkeypatch):
    teacher, its = Teacher(), motionfit.recipe_of("field", seen_args(), (20.0, 256))
    monkeypatch.setattr(motionfit, "load_generator", lambda *_: ("g.pt", teacher, its, {}))
    go(stage, sets, tmp_path, f"--transfer {transfer} --source all")
    assert len(steps) == len(teacher.x) == 4
    for (x, y, z_teacher), x_teacher in zip(steps, teacher.x, strict=True):
        assert x.shape[2] == 3 and x_teacher.shape[1] == 2 and z_teacher.shape == (4, 32)
        found = moments_of(x)
        assert found == moments_of(x_teacher, "field")
        assert y is None if transfer == "mers" else y.flatten().tolist() == [v % 2 for v, _ in found]


def test_mers_trains_features_alone(whole, sets, tmp_path, steps):
    """Of the videos that pseudo-labels would be learned of."""
    line = f"--transfer mers --generator {whole}/generator/model.pt --source all --epochs 2 --holdout 0.3"
    rows = go("selftrain", sets, tmp_path, line)
    assert all(row["loss"] == row["loss_features"] > 0 and "loss_mc" not in row for row in rows)
    held = datasets.held_out(datasets.load(f"{sets}/set").train, 0.3, 0)
    assert {v for x, *_ in steps for v, _ in moments_of(x)} == set(np.flatnonzero(~held))
    torch.manual_seed(0)
    before = backbones.build("r3d_10-pool", 1, width=0.0625).state_dict()
    after = weights(tmp_path / "selftrain" / "model.pt")
    assert {key for key in before if torch.equal(before[key], after[key])} == {"fc.weight", "fc.bias"}


def test_mars_teacher_stays_and_all_stages_learn(whole, sets, tmp_path, monkeypatch):
    teachers, load = [], motionfit.load_generator
    monkeypatch.setattr(motionfit, "load_generator", lambda *a: teachers.append(load(*a)) or teachers[0])
    path = whole / "generator" / "model.pt"
    (row, *_) = go("finetune", sets, tmp_path, f"--transfer mars --generator {path} --alpha 7")
    assert row["loss"] == pytest.approx(row["loss_mc"] + 7 * row["loss_features"], rel=1e-4)
    net, before = teachers[0][1], weights(path)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.manual_seed(0)
    start = backbones.build("r3d_10-pool", 2, width=0.0625).state_dict()
    after = weights(tmp_path / "model.pt")
    assert not any(torch.equal(start[key], after[key]) for key in start)


def test_selftraining_learns_pseudo_labels_of_its_clips(sets, tmp_path, steps, scored):
    """Each clip of RGB has in its middle the dense clip of flow whose label it learns."""
    src = datasets.load(f"{sets}/src").train
    labels = pseudo_of([3, 5, 1, 0, 3, 5], videos=datasets.digest(src, range(6)))
    path = tmp_path / "pseudo.npz"
    about = dict(clusters=200, frames=4, stride=1, hop=4, fewer=1, videos=labels.videos, learned={})
    motionfit.write_pseudo(path, labels.labels, labels.first, about)
    line = f"--pseudo {path} --frames 4 6 4 --epochs 4 --neighbours --holdout 0.2 --crops 3"
    rows = go("selftrain", sets, tmp_path, line)
    trained = set()
    for x, y, _ in steps:
        assert y.shape == (2, 2, 3)
        for (v, frames), (k, k_next, _) in zip(moments_of(x), y.flatten(0, 1).tolist(), strict=True):
            t = k - 100 - labels.first[v]
            assert frames == labels.window([13, 24, 5, 17, 13, 21][v], t, 6, 1).tolist()
            assert k_next == (k + 1 if t + 1 < len(labels.of(v)) else -1)
            trained.add(v)
    ((name, k),) = scored.items()
    assert trained | {int(name[-1])} == {0, 1, 2, 4, 5} and len(trained) == 4  # not 3, which has no labels
    assert k == labels.of(int(name[-1]))[len(labels.of(int(name[-1]))) // 2]
    assert {"loss_next", "loss_previous"} < set(rows[0]) and rows[-1]["eval"] == "quick"
    result = result_of(tmp_path / "selftrain")
    assert (result["clusters"], result["videos"], result["source"]) == (200, 4, "src")
    assert evaluate.load_model(tmp_path / "selftrain" / "model.pt")[0].fc.out_features == 200


# ---- which videos ----------------------------------------------------------------------------------


def names_of(videos):
    return sorted(videos.name(i) for i in range(len(videos)))


def source_of(sets, run, more):
    args = line_of(sets, "o", more)
    return motionfit.source(args, run, ("rgb",), {})


def test_source_is_another_set_or_the_same(sets, run):
    data, videos, _ = source_of(sets, run, "")
    assert data.name == "src" and names_of(videos) == names_of(datasets.load(f"{sets}/src").train)
    mine = datasets.load(f"{sets}/set")
    data, videos, _ = source_of(sets, run, "--source all")
    assert data.name == "set" and names_of(videos) == names_of(mine.train)
    data, videos, _ = source_of(sets, run, "--source_part test")
    assert names_of(videos) == names_of(datasets.load(f"{sets}/src").test)


@pytest.mark.parametrize("kind", ["flat", "train", "list"])
def test_a_source_without_labels(kind, sets, run, tmp_path):
    """No list at all; and only flow knows anything of the videos."""
    for v in range(6):
        place = tmp_path / "u" / ("train" if kind == "train" else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"clip{v}").symlink_to(sets / "src" / "ab"[v % 2] / f"train{v}")
    if kind == "list":
        (tmp_path / "u" / "train.txt").write_text("clip1\nclip4\n")
    _, videos, _ = source_of(sets, run, f"--source {tmp_path}/u")
    assert [videos.name(i)[-5:] for i in range(len(videos))] == (
        ["clip1", "clip4"] if kind == "list" else [f"clip{v}" for v in range(6)])  # fmt: skip
    assert (videos.labels == -1).all()


def test_all_stages_with_a_source_without_labels(sets, tmp_path):
    (tmp_path / "u").mkdir()
    for v in range(6):
        (tmp_path / "u" / f"clip{v}").symlink_to(sets / "src" / "ab"[v % 2] / f"train{v}")
    more = f"--generator_on rgb --source {tmp_path}/u"
    for stage in ALL:
        go(stage, sets, tmp_path / "out", more)
    found = result_of(tmp_path / "out" / "pseudo")
    assert found["purity"] is None and found["clips"] > 6 and result_of(tmp_path / "out")["videos"] == 5


def test_d12_fine_tuning_learns_from_all_labels(sets, run):
    args = line_of(sets, "o", "--holdout 0.4")
    _, learn, held, _ = motionfit.target(args, run, ("rgb",), {})
    assert (len(learn), len(held)) == (8, 0)
    _, learn, held, _ = motionfit.target(args, run, ("rgb",), {}, args.holdout)
    assert (len(learn), len(held)) == (4, 4)


def test_d18_the_rest_is_what_is_not_labelled(sets, run):
    line = "--source rest --per_class 1 --seed 3"
    _, rest, _ = source_of(sets, run, line)
    _, few, _, _ = motionfit.target(line_of(sets, "o", line), run, ("rgb",), {})
    assert len(few) == 2 and names_of(rest) == sorted(
        set(names_of(datasets.load(f"{sets}/set").train)) - set(names_of(few)))  # fmt: skip
    with pytest.raises(UserError, match="--source rest has no videos"):
        source_of(sets, run, "--source rest")


@pytest.mark.parametrize("line", ["--source all", "--source rest --labelled_list {few}"])
def test_source_list_names_the_videos(line, sets, run, tmp_path):
    (tmp_path / "list.txt").write_text("b/train3 1\na/train4 0\nb/train7 1\n")
    (tmp_path / "few.txt").write_text("a/train0 0\nb/train1 1\na/train2 0\n")
    line = line.format(few=tmp_path / "few.txt")
    _, videos, _ = source_of(sets, run, f"{line} --source_list {tmp_path}/list.txt")
    assert names_of(videos) == ["a/train4", "b/train3", "b/train7"]


def test_data_of_several_labels_are_refused(sets, run, monkeypatch):
    data = datasets.load(f"{sets}/set")
    monkeypatch.setattr(datasets, "load", lambda *_, **__: replace(data, multilabel=True))
    for call in (lambda args: motionfit.target(args, run, ("rgb",), {}),
                 lambda args: motionfit.retrieve(args, run)):  # fmt: skip
        with pytest.raises(UserError, match="set has several labels"):
            call(line_of(sets, "o"))


# ---- labels of test videos -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaky(sets, tmp_path_factory):
    """A model and pseudo-labels that know the label of a test video of `set`."""
    folder, learned = tmp_path_factory.mktemp("leaky"), {"set": ["a/test2", "a/train0"], "src": ["a/test0"]}
    made = dict(name="r3d_10-pool", classes=2, in_channels=3, width=1 / 16)
    evaluate.save_model(folder / "m.pt", backbones.build(**made), made, "ab", evaluate.Recipe(4, 1),
                        learned=learned)  # fmt: skip
    src = datasets.load(f"{sets}/src").train
    labels = pseudo_of([3, 5, 1, 0, 3, 5])
    about = dict(clusters=200, frames=4, stride=1, hop=4, fewer=1, learned=learned,
                 videos=datasets.digest(src, range(6)))  # fmt: skip
    motionfit.write_pseudo(folder / "p.npz", labels.labels, labels.first, about)
    return folder


@pytest.mark.parametrize("stage, line", [
    ("pseudo", "--generator {}/m.pt"), ("selftrain", "--transfer mers --generator {}/m.pt"),
    ("finetune", "--transfer mars --generator {}/m.pt"), ("finetune", "--init {}/m.pt"),
    ("retrieve", "--init {}/m.pt"), ("selftrain", "--pseudo {}/p.npz"), ("eval", "--eval {}/m.pt"),
])  # fmt: skip
def test_d16_what_knows_test_labels_is_refused(stage, line, leaky, sets, tmp_path):
    with pytest.raises(SystemExit) as end:
        go(stage, sets, tmp_path, line.format(leaky))
    said = str(end.value)
    assert f"{leaky}/" in said and "1 of the 5 test videos of set, split 1" in said
    assert "--allow_leak" in said and said.endswith("(2)") and "\n" not in said


def test_d16_a_source_with_test_videos_is_refused(sets, run):
    """--source set is that of --data: its test list is what is tested."""
    line = f"--source {sets}/set --source_part test"
    with pytest.raises(UserError, match="set knows 5 of the 5 test videos of set"):
        source_of(sets, run, line)
    assert len(source_of(sets, run, f"{line} --allow_leak")[1]) == 5
    assert len(source_of(sets, run, f"--source {sets}/set")[1]) == 8


def test_d16_a_model_that_says_nothing_is_refused(sets, tmp_path):
    """Of another script, say."""
    made = dict(name="r3d_10-pool", classes=2, in_channels=3, width=1 / 16)
    evaluate.save_model(tmp_path / "m.pt", backbones.build(**made), made, "ab", evaluate.Recipe(4, 1))
    args = line_of(sets, "o")
    with pytest.raises(UserError, match="m.pt does not say whose labels"):
        motionfit.learned_by(args, tmp_path / "m.pt", "generator")
    args.allow_leak = True
    assert motionfit.learned_by(args, tmp_path / "m.pt", "generator") == {}


def test_d16_allow_leak_permits(leaky, sets, run):
    args = line_of(sets, "o", f"--allow_leak --generator {leaky}/m.pt --pseudo {leaky}/p.npz")
    assert motionfit.load_generator(args, run)[0] == f"{leaky}/m.pt"
    assert motionfit.load_pseudo(args, run, datasets.load(f"{sets}/src").train).clusters == 200


@pytest.mark.parametrize("name, learned, refused", [
    ("set", {"set": ["a/test2"]}, True), ("set:small", {"set": ["a/test2"]}, True),
    ("set", {"set": ["a/train0", "b/test1"]}, True),  # whatever its suffix, here .mp4
    ("set", {"set": ["a/train2"]}, False), ("set", {"other": ["a/test2"]}, False), ("set", {}, False),
])  # fmt: skip
def test_d16_it_is_the_videos_that_count(name, learned, refused, sets, monkeypatch):
    data = replace(datasets.load(f"{sets}/set"), name=name)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)
    if refused:
        with pytest.raises(UserError, match="m.pt knows 1 of the 5 test videos"):
            motionfit.refuse_leak(line_of(sets, "o"), "m.pt", learned)
    else:
        motionfit.refuse_leak(line_of(sets, "o"), "m.pt", learned)


@pytest.mark.parametrize("line, learned", [
    ("--init {}/selftrain/model.pt", {"set": range(8)}), ("--init none", {"set": [1, 4, 6]}),
    ("--transfer mars --generator {}/generator/model.pt", {"set": range(8)}),
    ("--data {sets}/src --init {}/selftrain/model.pt", {"set": range(8), "src": [1, 4]}),
])  # fmt: skip
def test_d16_a_model_says_whose_labels_it_has_learned(line, learned, whole, sets, tmp_path, monkeypatch):
    """Those of its own three videos, and of all that made what it started from."""
    found = []
    monkeypatch.setattr(motionfit, "fit", lambda *_, **__: True)
    monkeypatch.setattr(motionfit, "finish", lambda *a, **_: found.append(a[-1]))
    (tmp_path / "list.txt").write_text("b/train1 1\na/train4 0\n" + "a/train6 0\n" * ("src" not in line))
    args = line_of(sets, tmp_path, f"--labelled_list {tmp_path}/list.txt --holdout 0.3 "
                   + line.format(whole, sets=sets))  # fmt: skip
    motionfit.one_run(args, "finetune")
    assert found == [{name: sorted(f"{'ab'[v % 2]}/train{v}" for v in numbers)
                      for name, numbers in learned.items()}]  # fmt: skip


def test_d16_labels_of_all_stages_are_told(whole):
    """All eight, those held out too."""
    everything = {"set": sorted(f"{'ab'[v % 2]}/train{v}" for v in range(8))}
    for path in ("generator/model.pt", "selftrain/model.pt", "model.pt"):
        assert torch.load(whole / path, weights_only=True)["learned"] == everything
    with np.load(whole / "pseudo" / "pseudo.npz") as file:
        assert json.loads(str(file["about"]))["learned"] == everything


# ---- pseudo-labels ---------------------------------------------------------------------------------


def test_purity_by_hand():
    # Cluster 0 has classes 1, 1, 0; cluster 2 has 0, 2 of which one is right; cluster 5 has 2, 2.
    clusters, y = np.array([0, 2, 5, 0, 0, 2, 5], np.int32), np.array([1, 0, 2, 1, 0, 2, 2])
    assert motionfit.purity(clusters, y) == pytest.approx(100 * (2 + 1 + 2) / 7)
    assert motionfit.purity(clusters, np.zeros((7, 3))) is motionfit.purity(clusters, 0 * y - 1) is None
    y[[0, 2]] = -1  # without a label
    assert motionfit.purity(clusters, y) == pytest.approx(100 * (1 + 1 + 1) / 5)


def loaded(sets, run, path):
    return motionfit.load_pseudo(line_of(sets, "o", f"--pseudo {path}"), run,
                                 datasets.load(f"{sets}/src").train)  # fmt: skip


def test_pseudo_labels_are_written_and_read(whole, sets, run):
    found = loaded(sets, run, whole / "pseudo" / "pseudo.npz")
    assert (found.clusters, found.frames, found.stride, found.hop, found.fewer) == (2, 4, 1, 4, 1)
    assert np.diff(found.first).tolist() == [3, 5, 1, 0, 3, 5] and len(found.labels) == 17
    assert found.labels.dtype == np.int32


def test_pseudo_labels_that_are_not_there_or_damaged(whole, sets, run, tmp_path):
    with pytest.raises(UserError, match="nothing.npz is not there: --stage pseudo"):
        loaded(sets, run, tmp_path / "nothing.npz")
    good = (whole / "pseudo" / "pseudo.npz").read_bytes()
    at = good.index(b"NUMPY") + 150  # a label
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for damaged in (good[:-200], b"", b"<html>404</html>", flipped):
        (tmp_path / "p.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="p.npz holds no pseudo-labels, or is damaged"):
            loaded(sets, run, tmp_path / "p.npz")


@pytest.mark.parametrize("other", ["array", "folder", "arrays"])
def test_pseudo_labels_that_are_something_else(other, sets, run, tmp_path):
    """Features, the folder of the file, a file of another time."""
    path = tmp_path / "p.npz"
    if other == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif other == "arrays":
        motionfit.write_pseudo(path, np.zeros(3), np.zeros(2), {"clusters": 3})
    else:
        path.mkdir()
    with pytest.raises(UserError, match="p.npz"):
        loaded(sets, run, path)


def test_neighbours_are_of_clips(whole, sets, run, tmp_path):
    with np.load(whole / "pseudo" / "pseudo.npz") as file:
        about = json.loads(str(file["about"])) | {"granularity": "thirds"}
        motionfit.write_pseudo(tmp_path / "p.npz", file["labels"], file["first"], about)
    args = line_of(sets, "o", f"--pseudo {tmp_path}/p.npz --neighbours")
    with pytest.raises(UserError, match="labels of granularity thirds, --neighbours"):
        motionfit.load_pseudo(args, run, datasets.load(f"{sets}/src").train)


def test_other_pseudo_labels_are_not_gone_on_with(whole, sets, tmp_path, monkeypatch):
    """The file behind --pseudo is another one after a stop."""
    with np.load(whole / "pseudo" / "pseudo.npz") as file:
        first, about, y = file["first"], json.loads(str(file["about"])), file["labels"]
    motionfit.write_pseudo(tmp_path / "p.npz", y, first, about)
    line = f"--pseudo {tmp_path}/p.npz --epochs 3"
    with monkeypatch.context() as patch:
        patch.setattr(motionfit.Run, "told_to_stop", lambda run: True)
        assert not motionfit.one_run(line_of(sets, tmp_path / "o", line), "selftrain")
    motionfit.write_pseudo(tmp_path / "p.npz", 1 - y, first, about)
    with pytest.raises(SystemExit, match="was trained with taught"):
        go("selftrain", sets, tmp_path / "o", line)


def test_a_source_without_its_flow_is_not_clustered(whole, sets, tmp_path):
    """One of six videos cannot be read, and --max_bad is the limit here, too."""
    line = f"--generator {whole}/generator/model.pt --max_bad"
    go("pseudo", sets, tmp_path / "b", f"{line} 0.2")
    with pytest.raises(SystemExit, match="1 of 6 videos have no features, more than --max_bad 0.1;"):
        go("pseudo", sets, tmp_path / "a", f"{line} 0.1")


@pytest.mark.parametrize("line", ["--batch 4 2 4", "--clusters 3", "--frozen 1", "--iterations 4"])
def test_flags_of_later_stages_may_change(line, whole, sets, capsys):
    """The generator that is there stays right: its RESULT is shown again."""
    with open(whole / "generator" / "config.json") as file:
        before = json.load(file)
    flags = [w for w in before["command"].split()[1:]]
    args = motionfit.parse_args([*flags, *line.split()])
    assert motionfit.one_run(args, "generator") and "stage=generator" in capsys.readouterr().out
    (whole / "generator" / "config.json").write_text(json.dumps(before))


def test_pseudo_labels_of_another_source_are_refused(whole, sets, run):
    args = line_of(sets, "o", f"--pseudo {whole}/pseudo/pseudo.npz --source all")
    with pytest.raises(UserError, match="of other videos than --source all has"):
        motionfit.load_pseudo(args, run, datasets.load(f"{sets}/set").train)


def pseudo(whole, sets, out, more=""):
    """Run the stage with the generator of `whole`; the labels of each of the six videos, the file's bytes."""
    go("pseudo", sets, out, f"--generator {whole}/generator/model.pt --clusters 5 {more}")
    path = out / "pseudo" / "pseudo.npz"
    with np.load(path) as file:
        labels = np.split(file["labels"], file["first"][1:-1])
    return [each.tolist() for each in labels], path.read_bytes()


def test_d7_features_are_those_of_the_dense_clips(whole, sets, run):
    net, _, _, recipe = evaluate.load_model(whole / "generator" / "model.pt")
    rows = np.load(whole / "pseudo" / "features" / "features.npy")
    found, first = [], 3  # the rows of the second video, of 23 fields
    for start in (0, 4, 8, 12, 16):
        with flow.Flow(sets / "src_flow" / "b" / "train1.mp4") as source:
            clip = source.get(range(start, start + 4))
        x = recipe.to_input(recipe.view([clip]), "cpu")
        with torch.no_grad():
            found.append(net.embed(x)[0].numpy())
    assert rows.shape == (17, 32) and rows[first : first + 5] == pytest.approx(np.stack(found), abs=1e-5)


def test_pseudo_labels_are_the_nearest_centres(whole, sets, tmp_path):
    labels, _ = pseudo(whole, sets, tmp_path)
    rows = np.load(tmp_path / "pseudo" / "features" / "features.npy").astype(np.float64)
    centres = torch.load(tmp_path / "pseudo" / "last.pt", weights_only=True)["parts"]["kmeans"]["centres"]
    apart = ((rows[:, None] - centres.double().numpy()) ** 2).sum(2)
    assert sum(labels, []) == apart.argmin(1).tolist()
    result = result_of(tmp_path / "pseudo")
    y = [v % 2 for v in range(6) for _ in labels[v]]
    assert result["purity"] == pytest.approx(motionfit.purity(np.array(sum(labels, [])), np.array(y)))
    assert (result["videos"], result["unreadable"], result["clips"], result["segments"]) == (6, 1, 17, 17)
    assert result["clusters"] == len(set(sum(labels, []))) and result["source"] == "src"
    rows = rows_of(tmp_path / "pseudo")
    assert [row["step"] for row in rows] == list(range(len(rows))) and 1 < len(rows) < 20
    assert [row["moved"] for row in rows] == [True] * (len(rows) - 1) + [False]


@pytest.mark.parametrize("granularity, sizes", [
    ("video", [1, 1, 1, 0, 1, 1]), ("thirds", [3, 3, 1, 0, 3, 3]), ("segment", None),
])  # fmt: skip
def test_sec32_a_segment_has_one_label(granularity, sizes, whole, sets, tmp_path):
    labels, _ = pseudo(whole, sets, tmp_path, f"--granularity {granularity}")
    folder, H, last = tmp_path / "pseudo", np.load(tmp_path / "pseudo" / "segments.npy"), 0
    f = np.split(np.load(folder / "features" / "features.npy"), np.cumsum([3, 5, 1, 0, 3])).copy()
    centres = torch.load(folder / "last.pt", weights_only=True)["parts"]["kmeans"]["centres"].numpy()
    for v, clips in enumerate(f):
        if not len(clips):
            assert labels[v] == []
            continue
        own = motionfit.segments(clips, granularity, 75)
        means = motionfit.segment_means(clips, own)
        assert np.array_equal(H[last : last + len(means)], means)
        nearest = ((means[:, None] - centres) ** 2).sum(2).argmin(1)
        assert labels[v] == nearest[own].tolist() and (sizes is None or len(means) == sizes[v])
        last += len(means)
    assert last == len(H) == result_of(folder)["segments"] and result_of(folder)["clips"] == 17


def test_pseudo_labels_are_the_same_again(whole, sets, tmp_path):
    assert pseudo(whole, sets, tmp_path / "a")[1] == pseudo(whole, sets, tmp_path / "b")[1]
    assert pseudo(whole, sets, tmp_path / "c", "--seed 1")[1] != pseudo(whole, sets, tmp_path / "a")[1]


def test_kmeans_goes_on_where_it_was_stopped(whole, sets, tmp_path, monkeypatch):
    labels, expected = pseudo(whole, sets, tmp_path / "a")
    args = line_of(sets, tmp_path / "b", f"--generator {whole}/generator/model.pt --clusters 5")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda run: True)
        assert not motionfit.one_run(args, "pseudo")
    folder = tmp_path / "b" / "pseudo"
    assert len(rows_of(folder)) == 1 and not (folder / "pseudo.npz").exists()
    assert pseudo(whole, sets, tmp_path / "b")[1] == expected
    assert rows_of(folder) == rows_of(tmp_path / "a" / "pseudo")


@pytest.mark.parametrize("limit", [1, 2])
def test_d8_no_more_iterations_than_asked_for(limit, whole, sets, tmp_path):
    pseudo(whole, sets, tmp_path, f"--iterations {limit}")
    assert len(rows_of(tmp_path / "pseudo")) == limit


def test_d7_dense_clips_may_overlap(whole, sets, tmp_path):
    labels, _ = pseudo(whole, sets, tmp_path, "--hop 3")
    assert [len(each) for each in labels] == [3, 7, 1, 0, 3, 6]  # 12, 23, 4, -, 12 and 20 fields
    with np.load(tmp_path / "pseudo" / "pseudo.npz") as file:
        assert json.loads(str(file["about"]))["hop"] == 3


def test_digest_of_weights():
    net = network().backbone
    before = evaluate.digest_of(net)
    assert evaluate.digest_of(network().backbone.to(memory_format=torch.channels_last_3d)) == before
    with torch.no_grad():
        net.stem[1].running_mean[0] += 1
    assert evaluate.digest_of(net) != before


# ---- all stages ------------------------------------------------------------------------------------


def test_fig2_all_stages_on_a_small_set(whole):
    """The class of these videos is plain in flow and in RGB; one of the five test videos is unreadable."""
    net, made, classes, recipe = evaluate.load_model(whole / "generator" / "model.pt")
    assert (made["in_channels"], recipe.modality, recipe.stretch) == (2, "field", (20, 26))
    assert classes == ("a", "b")
    found = {name: result_of(whole / name) for name in ("generator", "pseudo", "selftrain", "", "retrieve")}
    assert (found["generator"]["top1"], found["generator"]["stage"]) == (80, "generator")
    assert found["pseudo"]["purity"] > 90 and found["selftrain"]["clusters"] == 2
    assert (found[""]["top1"], found[""]["unreadable"], found[""]["videos"]) == (80, 1, 5)
    assert (found["retrieve"]["R1"], found["retrieve"]["videos_R1"]) == pytest.approx((80, 80))
    assert found["retrieve"]["unreadable"] == 1
    assert evaluate.load_model(whole / "model.pt")[3].modality == "rgb"
    with Image.open(whole / "retrieve" / "sheet.png") as sheet:
        assert sheet.size == (4 * 16, 8 * (16 + show.CAPTION))


def test_table7_features_are_those_before_finetuning(whole, sets):
    """Of each clip, of which a video has three here, by the self-trained network."""
    net, _, _, recipe = evaluate.load_model(whole / "selftrain" / "model.pt")
    recipe, data = replace(recipe, clips=3), datasets.load(f"{sets}/set")
    with recipe.open(data.train, 1) as source:
        x = recipe.to_input(recipe.view(source.clips(recipe.sample(source))), "cpu")
    with torch.no_grad():
        z = net.features(x)[-1].amax((2, 3, 4)).numpy()
    rows = np.load(whole / "retrieve" / "train" / "features.npy")
    assert len(rows) == 8 * 3 and rows[3:6] == pytest.approx(z, abs=1e-5)
    assert len(np.load(whole / "retrieve" / "test" / "features.npy")) == 4 * 3


def test_retrieval_of_random_weights(sets, tmp_path, monkeypatch):
    seen, real = [], motionfit.max_features
    monkeypatch.setattr(motionfit, "max_features", lambda net, x: seen.append(len(x)) or real(net, x))
    assert motionfit.one_run(line_of(sets, tmp_path, "--init none --sheet 0 --crops 3"), "retrieve")
    result = result_of(tmp_path / "retrieve")
    assert result["stage"] == "retrieve" and result["R50"] == pytest.approx(80)
    assert sum(seen) == 2 * (8 + 4)


def test_retrieval_wants_a_network_that_sees_rgb(whole, sets, tmp_path):
    with pytest.raises(SystemExit, match="generator/model.pt sees flow"):
        motionfit.one_run(line_of(sets, tmp_path, f"--init {whole}/generator/model.pt"), "retrieve")


def test_eval_tests_one_model(whole, sets, tmp_path, scored):
    args = line_of(sets, tmp_path, f"--eval {whole}/generator/model.pt --crops 3")
    assert motionfit.one_run(args, "eval") and motionfit.one_run(args, "eval")  # tested again
    result = result_of(tmp_path)
    assert (result["top1"], result["eval"]) == (80, f"{whole}/generator/model.pt")
    assert (result["clips"], result["crops"], result["average"]) == (2, 3, "logits")


def test_eval_of_other_views_has_a_folder_of_its_own():
    more = "", "--clips 3", "--average softmax", "--crops 3"
    assert len({parsed(f"--eval r/model.pt {line}").out for line in more}) == 4


@pytest.mark.parametrize("transfer", ["mers", "mars"])
def test_table5_needs_a_teacher_of_the_same_width(transfer, whole, sets, tmp_path):
    stage = {"mers": "selftrain", "mars": "finetune"}[transfer]
    with pytest.raises(SystemExit, match="generator/model.pt"):
        go(stage, sets, tmp_path,
           f"--transfer {transfer} --generator {whole}/generator/model.pt --width 0.125")  # fmt: skip


# ---- the order of the stages -----------------------------------------------------------------------

ALL = ["generator", "pseudo", "selftrain", "finetune"]


@pytest.mark.parametrize("line, expected", [
    ("", ALL), ("--generator g.pt", ALL[1:]), ("--pseudo p.npz", ALL[2:]), ("--init m.pt", ALL[3:]),
    ("--init none", ALL[3:]), ("--generator g.pt --pseudo p.npz", ALL[2:]), ("--init kinetics", ALL[3:]),
    ("--generator g.pt --init none", ALL[3:]), ("--pseudo p.npz --init m.pt", ALL[3:]),
    ("--transfer mers", ["generator", "selftrain", "finetune"]),
    ("--transfer mers --generator g.pt", ["selftrain", "finetune"]), ("--transfer mers --init m.pt", ALL[3:]),
    ("--transfer mars", ["generator", "finetune"]), ("--transfer mars --generator g.pt", ["finetune"]),
    *((f"--stage {stage}", [stage]) for stage in (*ALL, "retrieve")),
    ("--stage selftrain --pseudo p.npz", ["selftrain"]), ("--stage generator --init m.pt", ["generator"]),
])  # fmt: skip
def test_stages_of_a_command(line, expected):
    assert motionfit.stages_of(parsed(line)) == expected


def test_what_finetuning_starts_from():
    lines = "", "--init none", "--init m.pt", "--init kinetics", "--transfer mers", "--transfer mars"
    found = [motionfit.start_of(parsed(f"--out o {line}")) for line in lines]
    assert found == ["o/selftrain/model.pt", None, "m.pt", "kinetics", "o/selftrain/model.pt", None]


@pytest.mark.parametrize("stop", [None, 1])
def test_stages_run_in_turn_until_one_is_stopped(stop, monkeypatch):
    done = []

    def one_run(args, stage):
        done.append(stage)
        return stop is None or stage != ALL[stop]

    monkeypatch.setattr(motionfit, "one_run", one_run)
    monkeypatch.setattr("sys.argv", ["motionfit.py"])
    motionfit.main()
    assert done == (ALL if stop is None else ALL[: stop + 1])
    monkeypatch.setattr("sys.argv", ["motionfit.py", "--eval", "m.pt"])
    motionfit.main()
    assert done[-1] == "eval"


def test_each_stage_has_its_folder_and_ends_once(tmp_path, monkeypatch):
    calls, stops = [], True

    def stage(args, run):
        calls.append(run.out)
        if not stops:
            run.result({"top1": 50.0})

    for name in (*ALL, "retrieve"):
        monkeypatch.setattr(motionfit, name, stage)
    args = parsed(f"--out {tmp_path}")
    assert not motionfit.one_run(args, "pseudo")
    stops = False
    for name in (*ALL, "retrieve"):
        assert motionfit.one_run(args, name) and motionfit.one_run(args, name)
    folders = [tmp_path / "pseudo", *(tmp_path / name for name in ALL[:3]), tmp_path, tmp_path / "retrieve"]
    assert calls == folders
    args = parsed(f"--out {tmp_path} --stage retrieve --sheet 3")  # neither changes what there is
    assert motionfit.one_run(args, "generator") and len(calls) == 6


def test_a_stopped_stage_leaves_no_model(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "told_to_stop", lambda run: True)
    assert not motionfit.one_run(line_of(sets, tmp_path), "generator")
    folder = tmp_path / "generator"
    assert (folder / "last.pt").exists() and not (folder / "model.pt").exists() and len(rows_of(folder)) == 1


def test_a_stage_without_what_it_needs_says_who_makes_it(sets, tmp_path):
    for stage, maker in (("pseudo", "generator"), ("selftrain", "pseudo"), ("finetune", "selftrain"),
                         ("retrieve", "selftrain")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"{tmp_path}/{maker}/.* is not there: --stage {maker} makes it"):
            motionfit.one_run(line_of(sets, tmp_path), stage)
        dist.destroy_process_group()


def test_flags_of_a_stage():
    args = parsed("--frames 8 16 32 --batch 4 --lr_steps 1,2 cosine 3 --lam 0.5 1 0")
    found = {stage: motionfit.of_stage(args, stage) for stage in motionfit.TRAINED}
    assert [found[stage].frames for stage in ("generator", "selftrain", "finetune")] == [8, 16, 32]
    assert [scope.lr_steps for scope in found.values()] == ["1,2", "cosine", "3"]
    assert [(scope.batch, scope.lam) for scope in found.values()] == [(4, 0.5), (4, 1), (4, 0)]
    assert found["generator"].net == args.net and args.frames == [8, 16, 32]


# ---- command line ----------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    args = parsed("--data ucf101")
    assert (args.generator_net, args.net, args.generator_on) == ("r2plus1d_18", "r2plus1d_18", "field")
    assert (args.stretch, args.size, args.test_size) == ([128, 171], 112, 112)  # Sec. 4.2
    assert (args.frames, args.multi_clips, args.lam) == ([16] * 3, [3] * 3, [1.0] * 3)
    assert (args.epochs, args.batch, args.lr_batch) == ([120, 45, 120], [8, 16, 8], [8, 16, 8])
    assert args.lr_steps == ["40,60,80", "20,40", "40,60,80"]
    assert (args.optimizer, args.lr, args.weight_decay, args.warmup) == ("sgd", 0.001, 5e-4, 0)
    assert (args.holdout, args.frozen, args.clusters, args.granularity) == (0.1, 2, 1000, "clip")
    assert (args.source, args.source_part, args.ratio, args.transfer) == ("k400", "train", 1.0, "pseudo")
    assert (args.clips, args.crops, args.average, args.flip, args.dropout) == (10, 1, "logits", False, 0)
    assert (args.percentile, args.iterations, args.alpha, args.hop, args.stride) == (75, 20, 50, None, 1)
    assert not args.neighbours and not args.allow_leak and args.stage == "all"
    assert {**vars(parsed("--data hmdb51")), "data": "ucf101", "out": args.out} == vars(args)
    recipe = motionfit.recipe_of("field", motionfit.of_stage(args, "finetune"), (9.0, 100))
    assert (recipe.frames, recipe.stride, recipe.clips, recipe.crops) == (16, 1, 10, 1)
    assert (recipe.size, recipe.stretch, recipe.average) == (112, (128, 171), "logits")
    assert (recipe.modality, recipe.bound, recipe.flow_side) == ("field", 9.0, 100)
    assert (recipe.mean, recipe.std) == ((0.5,), (0.226,))  # D2
    recipe = motionfit.recipe_of("rgb", seen_args(crops=3, test_size=20), (9.0, 100))
    assert (recipe.size, recipe.crops, recipe.mean) == (20, 3, (0.485, 0.456, 0.406))


def test_recipes_of_other_sets():
    assert parsed("").source == "all"
    nets = {parsed(f"--data {data}").net for data in ("toy", "toy:b", "weizmann")}
    assert nets == {"r2plus1d_10-pool"}


@pytest.mark.parametrize("line", [
    "--frames 8", "--frames 8 16 32", "--lam 0 --multi_clips 2", "--lam 0.5 1 1 --multi_clips 3 1 1",
    "--multi_clips 1", "--multi_clips 9", "--lam 0 --multi_clips 5", "--lr_steps cosine",
    "--lr_steps 1.5,2 cosine 3", "--percentile 0", "--percentile 100",
    "--test_size 32", "--holdout 0", "--neighbours", "--size 48 --test_size 48", "--frozen 0", "--frozen 4",
])  # fmt: skip
def test_good_lines(line):
    parsed(line)


@pytest.mark.parametrize("line, word", [
    ("--frames 8 16", "--frames has one value, or one for each of generator, selftrain, finetune, not 2"),
    ("--lr_steps 1 2", "--lr_steps"), ("--epochs 1 2 3 4", "--epochs"),
    ("--lam 0.5 --multi_clips 1", "--multi_clips"), ("--lam 1 1 0 --multi_clips 3 3 1", "--multi_clips"),
    ("--lam 0.5 --multi_clips 6", "2 to 5 clips, --multi_clips is 6"), ("--lam 0 --multi_clips 9", "2 to 5"),
    ("--lam 1.5", "--lam"), ("--lam -0.1", "--lam"), ("--lr_steps soon", "not soon"),
    ("--lr_steps 1 1,x 1", "not 1,x"), ("--percentile 101", "--percentile"), ("--percentile nan", "--per"),
    ("--percentile -1", "--percentile"), ("--size 49", "--size"), ("--test_size 49", "--test_size"),
    ("--stretch 48 39", "--stretch 48 39"), ("--crops 2", "--crops"),
    ("--neighbours --granularity thirds", "--neighbours"), ("--neighbours --transfer mers", "--neighbours"),
    ("--neighbours --transfer mars", "--neighbours"), ("--holdout 1.5", "--holdout"), ("--hop 0", "--hop"),
    ("--clusters 0", "--clusters"), ("--iterations 0", "--iterations"), ("--stride 0", "--stride"),
    ("--batch 4 0 4", "--batch"), ("--frames 0", "--frames"), ("--multi_clips 0", "--multi_clips"),
    ("--epochs 1 1 -1", "--epochs"), ("--epochs nan", "--epochs"), ("--lr -1", "--lr"), ("--lr inf", "--lr"),
    ("--warmup -1", "--warmup"), ("--weight_decay nan", "--weight_decay"), ("--alpha -1", "--alpha"),
    ("--frozen -1", "--frozen"), ("--sheet -1", "--sheet"), ("--granularity frame", "--granularity"),
    ("--transfer both", "--transfer"), ("--stage 2", "--stage"), ("--source_part val", "--source_part"),
    ("--generator_on diff", "--generator_on"), ("--optimizer lars", "--optimizer"), ("--ratio 20", "--ratio"),
    ("--average max", "--average"),
    # what would be noticed days later
    ("--net r2plus1d_11", "r2plus1d_11"), ("--generator_net x", "backbone x"),
    ("--frozen 5", "--frozen"), ("--transfer mers --lam 0.5", "--lam"), ("--lr_steps nan", "--lr_steps"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(line, word):
    with pytest.raises(SystemExit) as end:
        parsed(line)
    said = str(end.value)
    assert said.startswith("motionfit: ") and word in said and said.endswith("(2)") and "\n" not in said

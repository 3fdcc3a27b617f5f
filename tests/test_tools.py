"""Tools on finished models: ensembles (Table 13 of Mutual Modality Learning), retrieval, figures."""

import csv
import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensors import picture_folder, pixels, random, save_tiny_model
from torch import nn
from torch.nn import functional as F

from common import evaluate
from common.clips import Views
from common.data import Data, Videos, load_data
from common.evaluate import Scores
from common.io.features import Features
from common.io.models import load_model
from common.modality import Recipe, stacked
from common.tools import ensemble, figures, retrieve
from common.tools.shared import CAPTION, contact_sheet

pytestmark = pytest.mark.usefixtures("leave", "group")
HERE = Path(__file__).resolve().parent.parent


# ---- ensemble --------------------------------------------------------------------------------------

MULTILABEL = pytest.mark.parametrize("multilabel", [False, True], ids=["single", "multilabel"])
AVERAGES = pytest.mark.parametrize("average", ["softmax", "logits"])


def scores_of_logits(logits, labels, bad=None):
    """Scores of one view; float64 until here, so that the naive averages are exact."""
    logits, labels = torch.as_tensor(logits).double(), np.array(labels)
    squash = torch.sigmoid if labels.ndim == 2 else partial(torch.softmax, dim=-1)
    probs, ones = squash(logits).numpy().astype(np.float32), np.ones(len(labels), np.int64)
    return Scores(probs, 0 * ones, ones, labels, bad or {}, logits.numpy().astype(np.float32))


def test_table13_by_hand():
    p = dict(r1=[0.3] * 4, r2=[0.9] * 4, f1=[0.9, 0.9, 0.9, 0.3], f2=[0.25] * 4)  # of class 0, the label
    models = {m: scores_of_logits(np.log([[x, 1 - x] for x in row]), [0] * 4) for m, row in p.items()}
    modalities = dict(r1="rgb", r2="rgb", f1="flow", f2="flow")
    rows = ensemble.ensembles(models, modalities, "softmax")
    # (.9 + .9, ...): r2 f1 4 of 4, r2 f2 (1.15) 4 of 4: positions 0 and 1, 0.5 each; r1 f1 (1.2) 3 of 4,
    # position 2; r1 f2 none, position 3.
    pairs = [(members, row["top1"]) for members, row in rows if len(members) == 2]
    assert pairs == [(("r2", "f1"), 100), (("r2", "f2"), 100), (("r1", "f1"), 75), (("r1", "f2"), 0)]
    sums = ensemble.sums_of_positions(rows, modalities)
    assert list(sums.items()) == [("r2", 0.5 + 0.5), ("f1", 0.5 + 2), ("f2", 0.5 + 3), ("r1", 2 + 3)]
    assert len(rows) == 4 + 4
    # Of three modalities: r2 f1 f2 (2.05) 4 of 4; r1 f1 f2 (1.45, the last .85) none.
    kinds = modalities | dict(f2="diff")
    rows = ensemble.ensembles(models, kinds, "softmax")
    assert [members for members, _ in rows if len(members) == 3] == [("r2", "f1", "f2"), ("r1", "f1", "f2")]
    assert len(rows) == 4 + (2 + 2 + 1) + 2
    assert ensemble.sums_of_positions(rows, kinds) == dict(r2=0, f1=0 + 1, f2=0 + 1, r1=1)


@MULTILABEL
@AVERAGES
def test_combine_is_that_of_the_raw_logits(average, multilabel):
    """A video that one model cannot read is wrong for the ensemble."""
    logits, y = random(3, 20, 6, scale=30.0).double(), [0] * 20
    if multilabel:
        y = (random(20, 6, seed=1) > 1).int().numpy()
    squash = torch.sigmoid if multilabel else partial(torch.softmax, dim=-1)
    expected = squash(logits.mean(0)) if average == "logits" else squash(logits).mean(0)
    expected[7] = 0
    models = [scores_of_logits(x, y, {7: "no flow"} if k == 1 else {}) for k, x in enumerate(logits)]
    scores = ensemble.combine(models, average)
    assert scores.probs.dtype == scores.logits.dtype == np.float32 and scores.bad == {7: "no flow"}
    assert scores.probs == pytest.approx(expected.numpy(), rel=1e-4)  # small ones, too
    assert scores.logits == pytest.approx(logits.mean(0).numpy(), rel=1e-4)
    assert models[0].probs[7].any()  # the Scores of a model stay
    assert list(ensemble.percentages(scores)) == (
        ["mAP"] if multilabel else ["top1", "top5", "mean_class", "mAP"]
    )


def test_combine_of_several_labels_keeps_logits_that_a_probability_cannot():
    """Logits 30 and -20: float32 has no number for the first's probability, and 0 would be 1 / 2."""
    scores = ensemble.combine([scores_of_logits([[x]], [[1]]) for x in (30.0, -20.0)], "logits")
    assert scores.probs[0, 0] == pytest.approx(1 / (1 + math.exp(-5)))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Six test videos of nine pictures, three classes; the last one has no pictures."""
    for v in range(6):
        picture_folder(tmp_path / f"v{v}", pixels(9 * (v < 5), 16, 20, 3, seed=v))
    videos = Videos.make(tmp_path, [f"v{v}" for v in range(6)], [v % 3 for v in range(6)])
    data = Data("set", 1, ("x", "y", "z"), videos, videos, False, True, ())
    monkeypatch.setattr(ensemble, "load_data", lambda *_: data)
    return data


@pytest.fixture
def models(tmp_path):
    """{path: (network, Recipe)} of two RGB models, whose own averages differ, and one of differences."""
    models = {}
    for name, kind, average in (("a", "rgb", "logits"), ("b", "rgb", "softmax"), ("c", "diff", "logits")):
        recipe = Recipe(2, 1, 1, 1, 16, 16, uniform=1, modality=kind, average=average)
        path = f"{tmp_path}/{name}.pt"
        models[path] = save_tiny_model(path, recipe, ["x", "y", "z"], seed=len(models)), recipe
    return models


@AVERAGES
def test_command_writes_every_ensemble(data, models, tmp_path, average):
    out, (a, b, c), logits, probs = tmp_path / "out", models, {}, {}
    ensemble.main([a, b, c, "--data", "set", "--out", str(out), "--workers", "0", "--average", average])
    for path, (net, recipe) in models.items():
        views = Views(data.test, recipe.sample, recipe.view, recipe.short_side, recipe.open)
        with torch.no_grad():
            x = torch.stack([net(recipe.to_input(views[i]["views"], "cpu")) for i in range(5)])  # (N, V, K)
        logits[path] = x.mean(1)
        probs[path] = x.softmax(2).mean(1) if recipe.average == "softmax" else x.mean(1).softmax(1)

    def top1(*members):
        mean = sum((logits if average == "logits" else probs)[path] for path in members)
        return 100 * (mean.argmax(1).numpy() == data.test.labels[:5]).sum() / 6  # the unreadable one is wrong

    rows = list(csv.DictReader(open(out / "ensembles.csv")))
    table = {tuple(row["models"].split(" + ")): float(row["top1"]) for row in rows}
    assert table == {members: pytest.approx(top1(*members)) for members in [(a,), (b,), (c,), (a, c), (b, c)]}
    sums = {row["model"]: float(row["sum"]) for row in csv.DictReader(open(out / "positions.csv"))}
    place = 0.5 + (top1(b, c) > top1(a, c)) / 2 - (top1(b, c) < top1(a, c)) / 2  # of a and c, from 0
    assert sums == {a: place, b: 1 - place, c: 1}
    result = json.loads((out / "result.json").read_text())
    assert result["top1"] == pytest.approx(top1(a, b, c)) and result["models"] == 3
    assert (result["script"], result["videos"], result["unreadable"]) == ("ensemble", 6, 1)
    assert len(list(csv.reader(open(out / "predictions.csv")))) == 7


def test_another_test_has_another_folder_and_a_signal_leaves_no_result(data, models, tmp_path, monkeypatch):
    a, b, _ = models
    line = ["--data", "set", "--workers", "0", "--out", f"{tmp_path}/out"]
    for _ in range(2):
        ensemble.main([a, *line])
    for words in ([b, *line], [a, *line, "--average", "softmax"]):
        with pytest.raises(SystemExit, match="choose another --out"):
            ensemble.main(words)
        dist.destroy_process_group()
    monkeypatch.setattr(evaluate, "score", lambda *_, **__: None)
    ensemble.main([a, *line, "--out", f"{tmp_path}/stopped"])
    assert not (tmp_path / "stopped" / "result.json").exists()


@pytest.mark.parametrize("line, words", [
    ("{}/a.pt --data set", "required: --out"), ("--data set --out o", "required: MODEL.PT"),
    ("a.pt --data set --out o --workers -1", "--workers"), ("missing.pt --data set --out {}/o", "missing.pt"),
    ("{}/v0/000.png --data set --out {}/o", "000.png"),
    ("{}/a.pt --data set --out {}/run", "run holds a run of mml"),
])  # fmt: skip
def test_mistakes_of_ensemble(data, models, tmp_path, line, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    (tmp_path / "run" / "config.json").write_text('{"script": "mml", "args": {}}')
    with pytest.raises(SystemExit, match=f"^ensemble: .*{words}.*\\(2\\)$"):
        ensemble.main(line.replace("{}", str(tmp_path)).split())


# ---- retrieve --------------------------------------------------------------------------------------


def naive_recall(z, y, z_train, y_train, n):
    """For a query the n nearest training clips; any of its class makes it correct."""
    correct = 0
    for q, label in zip(z.tolist(), y.tolist(), strict=True):
        cosines = [np.dot(q, k) / (math.hypot(*q) * math.hypot(*k)) for k in z_train.tolist()]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:n]
        correct += label in [int(y_train[i]) for i in nearest]
    return 100 * correct / len(z)


@pytest.mark.parametrize("Q, N", [(40, 120), (1100, 4)])
def test_recall_matches_brute_force(Q, N):
    """Also with fewer training clips than n, and more queries than are compared at once."""
    z, y = random(Q, 6, seed=1), torch.arange(Q) % 9
    z_train, y_train = random(N, 6, seed=2) * torch.rand(N, 1).add(0.1), torch.arange(N) * 7 % 9
    recall = retrieve.recall(z, y, z_train, y_train)
    assert list(recall) == [1, 5, 10, 20, 50]
    assert recall == pytest.approx({n: naive_recall(z, y, z_train, y_train, n) for n in recall})


def test_features_are_maxima():
    f = random(2, 5, 3, 2, 2)
    z = retrieve.max_features(SimpleNamespace(features=lambda x: [x, f]), None)
    assert z.tolist() == [[max(channel.flatten().tolist()) for channel in clip] for clip in f]


def features_at(angles, counts):
    """Features of clips in the plane, at angles in degrees."""
    rows = [[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in angles]
    return Features(np.array(rows, np.float32), np.array(counts), {})


def test_recalls_of_clips_and_of_videos():
    """Two clips of a video may be apart, and their mean in between; a video without clips is wrong."""
    train, test = Videos.make("", ["t0", "t1"], [0, 1]), Videos.make("", list("qrst"), [0, 0, 1, 0])
    data = Data("set", 1, ("a", "b"), train, test, False, True, ())
    z_train = features_at([0, 90, 50, 52], [2, 2])  # the means are at 45 and 51
    # q: both clips are next to the first video, and the mean at 45; r is unreadable; s: both clips are next
    # to the first video, which is wrong, but the mean at 51 is right; t: all wrong.
    z = features_at([1, 89, 10, 92, 50, 53], [2, 0, 2, 2])
    row = retrieve.recalls(data, 2, {"train": z_train, "test": z}, "cpu")
    assert (row["R@1"], row["videos_R@1"]) == pytest.approx((100 * 2 / 8, 100 * 2 / 4))
    assert (row["R@5"], row["videos_R@5"]) == pytest.approx((75, 75))  # with all there is, all but r
    assert set(row) == {f"{kind}R@{n}" for kind in ("", "videos_") for n in (1, 5, 10, 20, 50)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four training and three test videos of two classes; red tells which, one test video is unreadable."""
    root = tmp_path_factory.mktemp("set")
    for kind, red in (("train", [10, 50, 90, 130]), ("test", [10, None, 110])):
        for v, level in enumerate(red):
            frames = np.zeros((9, 24, 32, 3), np.uint8)
            frames[..., 0], frames[..., 1] = level or 0, 20 * np.arange(9)[:, None, None]
            picture_folder(root / kind / "ab"[v % 2] / f"{v}", frames)
    for picture in (root / "test/b/1").iterdir():
        picture.write_text("<html>404</html>")
    return root


def test_the_sheet_shows_distinct_videos(folder, tmp_path, monkeypatch):
    """The nearest clips of the first query are all of one video, of which the sheet shows the nearest."""
    data, sheets = load_data(str(folder)), []
    monkeypatch.setattr(retrieve, "contact_sheet", lambda *sheet: sheets.append(sheet))
    recipe = Recipe(4, 1, 3, 1, size=16, stretch=(20, 26))
    train = features_at([0, 1, 2, 40, 20, 60, 90, 91, 92, 150, 151, 152], [3, 3, 3, 3])
    test = features_at([3, 0.9, 3, 0, 90, 0], [3, 3, 0])  # the middle clips are at 0.9 and 90
    retrieve.sheet(tmp_path / "s.png", 5, data, recipe, {"train": train, "test": test})
    (path, rows, captions), = sheets  # fmt: skip
    videos = [[int(row[0, 0, 0, 0]) for row in rows[k + 1 : k + 4]] for k in (0, 4)]
    assert videos == [[10, 90, 50], [50, 90, 130]] and len(rows) == len(captions) == 8
    assert captions[0] == "test/a/0: a" and captions[4] == "test/a/2: a"
    assert captions[1:4] == ["  1 hit: a, train/a/0", "  2 hit: a, train/a/2", "  3 miss: b, train/b/1"]
    with recipe.open(data.train, 0) as source:
        expected = recipe.view([source.get(recipe.sample(source)[1])])[0]  # the clip at 1 degree
    assert torch.equal(rows[1], expected)


@pytest.mark.parametrize("net", ["r3d_10", "tsm10"])
def test_a_retrieval(net, folder, tmp_path, capsys, monkeypatch):
    model, recipe = tmp_path / "m.pt", Recipe(4, 1, 10, 3, 20, 16)
    save_tiny_model(model, recipe, "abcdefg", net)
    line = f"retrieve {model} --data {folder} --clips 2 --sheet 2 --workers 0"
    monkeypatch.setattr("sys.argv", line.split())
    retrieve.main()
    (out,) = tmp_path.glob("retrieve_*")
    result = json.loads((out / "result.json").read_text())
    assert result["R@50"] == pytest.approx(200 / 3) and result["unreadable"] == 1
    assert "RESULT script=retrieve" in capsys.readouterr().out
    assert np.load(out / "train" / "features.npy").shape[0] == 8
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (4 * 16, 8 * (16 + CAPTION))
    save_tiny_model(model, recipe, "abc", net, seed=1)
    with pytest.raises(SystemExit, match="other features"):
        retrieve.main()


def test_several_labels_are_no_classes_to_retrieve(folder, tmp_path, monkeypatch):
    data = Data(**vars(load_data(str(folder))) | {"multilabel": True})
    monkeypatch.setattr(retrieve, "load_data", lambda *_: data)
    monkeypatch.setattr("sys.argv", ["retrieve", "m.pt", "--data", str(folder), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="several labels"):
        retrieve.main()


# ---- figures ---------------------------------------------------------------------------------------


def test_contact_sheet(tmp_path):
    rows = [pixels(3, 3, 8, 10), pixels(2, 3, 6, 20, seed=1)]  # 30 and 40 pixels wide
    contact_sheet(tmp_path / "a.png", rows, ["row 1", "r\udcfcck"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * CAPTION + 8 + 6, 40, 3) and sheet.dtype == np.uint8
    for top, row in ((CAPTION, rows[0]), (2 * CAPTION + 8, rows[1])):
        strip = np.concatenate([*row.permute(0, 2, 3, 1).numpy()], axis=1)  # (H, T W, 3)
        assert np.array_equal(sheet[top : top + len(strip), : strip.shape[1]], strip)
        assert sheet[top - CAPTION : top].any()  # the caption
    assert not sheet[CAPTION : CAPTION + 8, 30:].any()  # black beside the narrower row
    with pytest.raises(ValueError):
        contact_sheet(tmp_path / "b.png", rows, ["a caption too few"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_heat_is_blue_where_low_and_red_where_high():
    values = torch.tensor([[[0.0, 0.5, 1.0]]])  # (T, H, W)
    heat = figures.heat(torch.zeros(1, 3, 1, 3, dtype=torch.uint8), values)
    assert heat.shape == (1, 3, 1, 3) and heat.dtype == torch.uint8
    (r0, r5, r1), (g0, g5, g1), (b0, b5, b1) = heat[0, :, 0].tolist()
    assert b0 > r0 == g0 == 0 and r1 > b1 == g1 == 0 and g5 > max(r5, b5)
    # Half of the picture shines through, and nothing overflows.
    white = figures.heat(torch.full((1, 3, 1, 3), 255, dtype=torch.uint8), values)
    assert (white.int() - heat.int() >= 127).all() and (white.int() - heat.int() <= 128).all()


class Tiny(nn.Module):
    """The only stage is the clip at half its size; the classes weigh its channels by +1, -1 and -1, +1."""

    def __init__(self):
        super().__init__()
        self.gain, self.fc = nn.Parameter(torch.ones(())), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def features(self, x):
        return [torch.zeros(1), self.gain * F.avg_pool3d(x[:, :2], (1, 2, 2))]

    def classify(self, f):
        return self.fc(f[..., ::2, ::2].mean((2, 3, 4)))  # so the gradient differs between positions

    def forward(self, x):
        return self.classify(self.features(x)[-1])


def test_grad_cam_by_hand():
    # Channels [[1, 2], [3, 4]] and [[1, 1], [5, 1]]: their difference is [[0, 1], [-2, 3]].
    f = torch.tensor([[[[[1.0, 2.0], [3.0, 4.0]]], [[[1.0, 1.0], [5.0, 1.0]]]]])  # (B, D, T', H', W')
    # Class 0 and class 1; -f, where the same place speaks for class 1; equal channels, of which none
    # speaks for a class.
    f, y = torch.cat([f, 10 * f, -f, torch.ones_like(f)]), torch.tensor([0, 1, 1, 0])
    x = f.expand(-1, -1, 3, -1, -1).repeat_interleave(2, 3).repeat_interleave(2, 4)  # (4, 2, 3, 4, 4)
    cam = figures.grad_cam(Tiny(), x, y)
    assert cam.shape == (4, 3, 4, 4) and not cam.requires_grad
    maps = torch.tensor([[[0, 1], [0, 3.0]], [[0, 0], [1, 0]], [[0, 1], [0, 3]], [[0, 0], [0, 0]]])
    expected = F.interpolate(maps[:, None], (4, 4), mode="bilinear")  # then the largest becomes 1
    expected = expected / expected.amax((2, 3), keepdim=True).clamp_min(1e-12)
    assert torch.allclose(cam, expected.expand(-1, 3, -1, -1), atol=1e-6)
    assert cam[:, 0, 3, 3].tolist() == [1, 0, 1, 0] and cam[1, 0, 3, 0] == 1  # by hand, at the corners


@pytest.fixture
def videos(tmp_path):
    """Four videos of pictures; the second has none."""
    for i in range(4):
        picture_folder(tmp_path / f"v{i}", pixels(0 if i == 1 else 3, 12, 16, 3, seed=i))
    return Videos.make(tmp_path, [f"v{i}" for i in range(4)], [0, 1, 0, 1])


def corrupted(kind, *clips):
    """uint8 (V, T, C, 12, 12)."""
    return figures.Corrupted(2, 1, 2, 1, 12, 12, corruption=kind).view([*clips])


@pytest.mark.parametrize("kind, levels", [("brightness", (0, 100)), ("contrast", (80, 120))])
def test_one_factor_per_video(kind, levels):
    """Uniform in 0.5 to 1.5, it scales the level, or the spread around the mean."""
    halves = torch.cat([torch.full((2, 3, 12, 6), level, dtype=torch.uint8) for level in levels], dim=3)
    factors = []
    for seed in range(80):
        torch.manual_seed(seed)
        views = corrupted(kind, halves, halves).int()
        (difference,) = (views[..., -1] - views[..., 0]).unique().tolist()
        assert views.shape == (2, 2, 3, 12, 12)
        assert kind == "brightness" or abs(views.float().mean() - 100) < 1.5
        factors.append(difference / (levels[1] - levels[0]))
    assert 0.47 <= min(factors) < 0.6 and 1.4 < max(factors) <= 1.53


def test_corrupt_grayscale_has_no_colour():
    x = pixels(2, 3, 12, 12)
    luminance = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert ((corrupted("grayscale", x)[0] - luminance).abs() <= 1.1).all()


@pytest.mark.parametrize("kind", figures.CORRUPTIONS)
def test_the_two_frames_of_a_difference_are_corrupted_alike(kind):
    """A video is corrupted, not its TG: what is still stays grey."""
    x = pixels(2, 3, 12, 12).repeat_interleave(2, 0)  # frames t and t + n of a still video
    assert (stacked(corrupted(kind, x), "tg") == 127).all()


def test_corruption_is_a_function_of_the_video(videos):
    recipe = figures.Corrupted(2, 1, 2, 1, 12, 12, corruption="brightness")
    views = Views(videos.subset([0] * 4), recipe.sample, recipe.view)  # one file: only the index tells
    before = [views[i]["views"] for i in range(4)]
    torch.manual_seed(99)
    assert all(torch.equal(before[i], views[i]["views"]) for i in (3, 1, 0, 2))
    assert all(not torch.equal(before[i], before[j]) for i in range(4) for j in range(i))


@pytest.fixture
def command(videos, tmp_path):
    """Runs the command on a student and a TG teacher; returns the folder of the results."""
    (tmp_path / "v1" / "00.png").write_text("no picture")
    shutil.copytree(tmp_path / "v0", tmp_path / "w0")
    (tmp_path / "train.txt").write_text("w0 0\n")
    (tmp_path / "test.txt").write_text("v0 0\nv1 1\nv2 0\nv3 1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for name, kind in (("model", "rgb"), ("teacher", "tg"), ("fields", "flow")):
        recipe = Recipe(2, 1, 2, 1, 12, 12, modality=kind)
        save_tiny_model(tmp_path / f"{name}.pt", recipe, ["a", "b"], "r3d_10-pool", always=0)

    def run(figure, *models, flags=("--workers", "0")):
        models = [f"{tmp_path}/{name}.pt" for name in models]
        figures.main([figure, *models, "--data", str(tmp_path), "--out", f"{tmp_path}/out", *flags])
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("count, numbers", [(2, [0, 3]), (99, [0, 2, 3])])
def test_cam_of_student_and_teacher(command, tmp_path, count, numbers):
    """Of one centre clip of videos spread over the list, but for the unreadable one, for the true class."""
    out = command("cam", "model", "teacher", flags=["--videos", f"{count}", "--workers", "0"])
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:05d}.png" for i in numbers]
    videos = Videos.make(tmp_path, [f"v{i}" for i in range(4)], [0, 1, 0, 1])
    for i in numbers:
        rows, captions = [], [f"v{i}: {'ab'[i % 2]}"]
        for name in ("model", "teacher"):
            net, _, _, recipe = load_model(tmp_path / f"{name}.pt")
            recipe = replace(recipe, clips=1, crops=1)
            views = Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)[i]["views"]
            x = recipe.to_input(views, "cpu")
            seen = stacked(views, recipe.modality)[0]
            rows += [] if name == "teacher" else [seen]
            rows += [figures.heat(seen, figures.grad_cam(net.eval(), x, torch.tensor([i % 2]))[0])]
            captions += [f"{tmp_path}/{name}.pt: a"]  # what they always predict
        contact_sheet(tmp_path / "a.png", rows, captions)
        sheet, expected = (
            np.asarray(Image.open(path)) for path in (out / f"{i:05d}.png", tmp_path / "a.png")
        )
        assert np.array_equal(sheet, expected)


@pytest.mark.parametrize("model", ["model", "teacher"])
def test_embedding(command, model, tmp_path):
    table = np.load(command("embedding", model) / "embedding.npz")
    assert table["features"].shape == (3, 32) and table["features"].dtype == np.float32
    assert table["names"].tolist() == ["v0", "v2", "v3"] and table["labels"].tolist() == [0, 0, 1]
    assert table["classes"].tolist() == ["a", "b"]
    net, _, _, recipe = load_model(tmp_path / f"{model}.pt")
    videos = Videos.make(tmp_path, ["v3"], [1])
    x = Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)[0]["views"]
    expected = net.embed(recipe.to_input(x, "cpu")).mean(0).detach().numpy()
    assert table["features"][2] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("words, sentence", [
    (("cam", "fields"), "fields.pt sees flow"), (("cam", "nowhere"), "nowhere.pt"),
    (("embedding", "model", "teacher"), "embedding takes one model"),
])  # fmt: skip
def test_mistakes_of_figures(command, words, sentence):
    with pytest.raises(SystemExit, match=f"figures: .*{sentence}"):
        command(*words)


def test_corruption_with_workers(command, tmp_path):
    """The workers' Recipe is pickled by a process whose main module is the command."""
    words = ["-m", "common.tools.figures", "corruption", f"{tmp_path}/model.pt", f"{tmp_path}/teacher.pt"]
    words += ["--data", str(tmp_path), "--out", f"{tmp_path}/c", "--workers", "1"]
    process = forks.start([forks.sys.executable, *words], HERE, os.environ | {"PYTHONPATH": str(HERE)})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "clean contrast brightness grayscale" in out, out + err
    head, *rows = csv.reader(open(tmp_path / "c" / "corruption.csv"))
    assert head == ["model", "clean", "contrast", "brightness", "grayscale"]
    assert [row[1:] for row in rows] == [["50.0"] * 4] * 2  # two of four: one is wrong, one unreadable

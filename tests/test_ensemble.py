"""common/tools/ensemble.py: scores of ensembles, Table 13 of Mutual Modality Learning, and the command."""

import csv
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensors import picture_folder, pixels, random, save_tiny_model

from common import evaluate
from common.clips import Views
from common.data import Data, Videos
from common.evaluate import Scores
from common.modality import Recipe
from common.tools import ensemble
from common.tools.ensemble import combine, ensembles, percentages, sums_of_positions

pytestmark = pytest.mark.usefixtures("leave", "group")

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
    rows = ensembles(models, modalities, "softmax")
    # (.9 + .9, ...): r2 f1 4 of 4, r2 f2 (1.15) 4 of 4: positions 0 and 1, 0.5 each; r1 f1 (1.2) 3 of 4,
    # position 2; r1 f2 none, position 3.
    pairs = [(members, row["top1"]) for members, row in rows if len(members) == 2]
    assert pairs == [(("r2", "f1"), 100), (("r2", "f2"), 100), (("r1", "f1"), 75), (("r1", "f2"), 0)]
    sums = sums_of_positions(rows, modalities)
    assert list(sums.items()) == [("r2", 0.5 + 0.5), ("f1", 0.5 + 2), ("f2", 0.5 + 3), ("r1", 2 + 3)]
    assert len(rows) == 4 + 4
    # Of three modalities: r2 f1 f2 (2.05) 4 of 4; r1 f1 f2 (1.45, the last .85) none.
    kinds = modalities | dict(f2="diff")
    rows = ensembles(models, kinds, "softmax")
    assert [members for members, _ in rows if len(members) == 3] == [("r2", "f1", "f2"), ("r1", "f1", "f2")]
    assert len(rows) == 4 + (2 + 2 + 1) + 2
    assert sums_of_positions(rows, kinds) == dict(r2=0, f1=0 + 1, f2=0 + 1, r1=1)


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
    scores = combine(models, average)
    assert scores.probs.dtype == scores.logits.dtype == np.float32 and scores.bad == {7: "no flow"}
    assert scores.probs == pytest.approx(expected.numpy(), rel=1e-4)  # small ones, too
    assert scores.logits == pytest.approx(logits.mean(0).numpy(), rel=1e-4)
    assert models[0].probs[7].any()  # the Scores of a model stay
    assert list(percentages(scores)) == (["mAP"] if multilabel else ["top1", "top5", "mean_class", "mAP"])


def test_combine_of_several_labels_keeps_logits_that_a_probability_cannot():
    """Logits 30 and -20: float32 has no number for the first's probability, and 0 would be 1 / 2."""
    scores = combine([scores_of_logits([[x]], [[1]]) for x in (30.0, -20.0)], "logits")
    assert scores.probs[0, 0] == pytest.approx(1 / (1 + math.exp(-5)))


# ---- the command -----------------------------------------------------------------------------------


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
def test_mistakes_are_one_sentence_with_status_2(data, models, tmp_path, line, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    (tmp_path / "run" / "config.json").write_text('{"script": "mml", "args": {}}')
    with pytest.raises(SystemExit, match=f"^ensemble: .*{words}.*\\(2\\)$"):
        ensemble.main(line.replace("{}", str(tmp_path)).split())

"""common/tools/ensemble.py: scores of ensembles, Table 13 of Mutual Modality Learning, and the command."""

import csv
import json
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from common import backbones, evaluate, modality
from common.clips import Views
from common.data import Data, Videos
from common.evaluate import Scores
from common.io.models import save_model
from common.modality import Recipe
from common.tools import ensemble
from common.tools.ensemble import combine, ensembles, percentages, sums_of_positions

pytestmark = pytest.mark.usefixtures("leave")


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(probs, labels, bad=None, logits=None):
    """Scores of one view: of probabilities, or of logits."""
    probs, labels, ones = np.array(probs, np.float32), np.array(labels), np.ones(len(labels), np.int64)
    if logits is None:
        with np.errstate(divide="ignore"):
            logits = np.log(probs) - (np.log1p(-probs) if labels.ndim == 2 else 0)
    return Scores(probs, 0 * ones, ones, labels, bad or {}, np.float32(logits))


def scores_of(logits, labels):
    squash = torch.sigmoid if np.ndim(labels) == 2 else partial(torch.softmax, dim=-1)
    logits = torch.as_tensor(logits).double()
    return scores(squash(logits).numpy(), labels, logits=logits.numpy())


def tables(given, modalities, average):
    rows = ensembles(given, modalities, average)
    return rows, sums_of_positions(rows, modalities)


def test_three_models_by_hand():
    y = [0, 1]
    models = {
        "a": scores([[0.9, 0.1], [0.6, 0.4]], y), "b": scores([[0.2, 0.8], [0.1, 0.9]], y),
        "c": scores([[0.45, 0.55], [0.55, 0.45]], y),
    }  # fmt: skip
    rows, sums = tables(models, dict(a="rgb", b="flow", c="diff"), "softmax")
    # a + b: (.55, .45), (.35, .65); a + c is wrong about the second, b + c about the first;
    # all: (.517, .483), (.417, .583).
    found = {members: row["top1"] for members, row in rows}
    assert found == {("a",): 50, ("b",): 50, ("c",): 0, ("a", "b"): 100, ("a", "c"): 50, ("b", "c"): 50,
                     ("a", "b", "c"): 100}  # fmt: skip
    assert [row["top1"] for _, row in rows] == [100, 100, 50, 50, 50, 50, 0]
    assert sums == dict(a=0, b=0, c=0)  # one set of all modalities


def share(right, n=4):
    """Probabilities of class 0 of n videos, all of that class: so many right."""
    return [[0.9, 0.1]] * right + [[0.3, 0.7]] * (n - right)


def test_table13_by_hand():
    y = [0] * 4
    models = {"r1": scores(share(0), y), "r2": scores(share(4), y), "f1": scores(share(3), y),
              "f2": scores([[0.25, 0.75]] * 4, y)}  # fmt: skip
    modalities = dict(r1="rgb", r2="rgb", f1="flow", f2="flow")
    rows, sums = tables(models, modalities, "softmax")
    # (.9 + .9, ...): r2 f1 4 of 4, r2 f2 (1.15) 4 of 4: positions 0 and 1, 0.5 each; r1 f1 (1.2) 3 of 4,
    # position 2; r1 f2 none, position 3.
    pairs = [(members, row["top1"]) for members, row in rows if len(members) == 2]
    assert pairs == [(("r2", "f1"), 100), (("r2", "f2"), 100), (("r1", "f1"), 75), (("r1", "f2"), 0)]
    assert list(sums.items()) == [("r2", 0.5 + 0.5), ("f1", 0.5 + 2), ("f2", 0.5 + 3), ("r1", 2 + 3)]
    assert len(rows) == 4 + 4 and not any({"r1", "r2"} <= set(members) for members, _ in rows)


def mean_positions(values):
    """Of each value, from 0 for the largest; equal ones share the mean of theirs."""
    return [sum(w > v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_table13_matches_naive_loop(average, multilabel):
    """Thirty videos, so that many ensembles are equal."""
    rng, names = np.random.default_rng(0), dict(rgb=["r1", "r2", "r3"], flow=["f1", "f2"], diff=["d1", "d2"])
    y, kinds = rng.integers(5, size=30), {m: kind for kind, models in names.items() for m in models}
    logits = {m: rng.normal(size=(30, 5)) + rng.uniform(0.5, 2) * np.eye(5)[y] for m in kinds}
    labels = np.eye(5, dtype=int)[y] if multilabel else y
    given = {m: scores_of(x, labels) for m, x in logits.items()}
    rows, found = tables(given, kinds, average)
    triples = {}
    for members in product(*names.values()):
        mean = sum(given[m].probs.astype(float) if average == "softmax" else logits[m] for m in members)
        triples[members] = (mean.argmax(1) == y).mean()
        if multilabel:
            triples[members] = evaluate.mean_average_precision(mean, labels)
    places = dict(zip(triples, mean_positions([*triples.values()]), strict=True))
    assert multilabel or any(place % 1 for place in places.values())
    sums = {m: sum(place for members, place in places.items() if m in members) for m in kinds}
    assert found == sums and list(found.values()) == sorted(sums.values())
    assert len(rows) == 7 + (3 * 2 + 3 * 2 + 2 * 2) + 12
    key = "mAP" if multilabel else "top1"
    assert [row[key] / 100 for members, row in rows if len(members) == 3] == pytest.approx(
        sorted(triples.values(), reverse=True)
    )


PRINTED = {  # Table 13
    "rgb": [9486, 10711, 13112, 15670, 26918, 28069, 31281, 31793, 31968, 35475, 36167, 46044, 50959],
    "flow": [22434, 25793, 28193, 28954, 28972, 29238, 32372, 32659, 34290, 50577, 54171],
    "diff": [42079, 49533, 67475, 67528, 69895, 71179],
}


def test_sums_of_table13_are_those_printed():
    """Each modality's sums are those of all 858 positions: from 0, they are 857 x 858 / 2."""
    rng, y = np.random.default_rng(0), [0, 1]
    kinds = {f"{kind}{n}": kind for kind, printed in PRINTED.items() for n in range(len(printed))}
    given = {m: scores_of(rng.normal(size=(2, 2)), y) for m in kinds}
    rows, sums = tables(given, kinds, "logits")
    assert sum(len(members) == 3 for members, _ in rows) == 858
    total = {kind: sum(v for m, v in sums.items() if kinds[m] == kind) for kind in PRINTED}
    assert total == dict(rgb=sum(PRINTED["rgb"]), flow=sum(PRINTED["flow"]), diff=857 * 858 / 2)
    assert sum(PRINTED["diff"]) - total["diff"] == 36  # one of the six is misprinted


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_combine_is_that_of_the_raw_logits(average, multilabel):
    raw, y = random(3, 20, 6, scale=30.0).double(), [0] * 20
    if multilabel:
        y = (random(20, 6, seed=1) > 1).int().numpy()
    squash = torch.sigmoid if multilabel else partial(torch.softmax, dim=-1)
    expected = squash(raw.mean(0)) if average == "logits" else squash(raw).mean(0)
    found = combine([scores_of(x, y) for x in raw], average)
    assert found.probs.dtype == found.logits.dtype == np.float32
    assert found.probs == pytest.approx(expected.numpy(), rel=1e-4)  # small ones, too
    assert found.logits == pytest.approx(raw.mean(0).numpy(), rel=1e-4)


def test_combine_of_several_labels_keeps_logits_that_a_probability_cannot():
    """Logits 30 and -20: float32 has no number for the first's probability, and 0 would be 1 / 2."""
    found = combine([scores_of([[x]], [[1]]) for x in (30.0, -20.0)], "logits")
    assert found.probs[0, 0] == pytest.approx(1 / (1 + math.exp(-5)))


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_combine_without_a_video_that_one_model_lacks(average, multilabel):
    y = np.eye(2)[[0, 0, 1]] if multilabel else [0, 0, 1]
    good = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
    holes = np.array([[0.9, 0.1], [0.0, 0.0], [0.1, 0.9]])
    parts = [scores(good, y), scores(holes, y, {1: "no flow"})]
    found = combine(parts, average)
    assert found.bad == {1: "no flow"} and not found.probs[1].any() and found.probs[0].any()
    assert parts[0].probs[1].any()  # what was given stays
    if not multilabel:
        assert percentages(found)["top1"] == pytest.approx(200 / 3)
    assert combine(parts[::-1], average).bad == {1: "no flow"}


def test_percentages_are_what_an_ensemble_has():
    assert list(percentages(scores(share(3), [0] * 4))) == ["top1", "top5", "mean_class", "mAP"]
    y = np.array([[1, 0], [0, 1]])
    assert percentages(scores([[0.9, 0.2], [0.1, 0.3]], y)) == {"mAP": 100}


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Six test videos of nine PNG pictures, three classes; the last one has no pictures."""
    rng = np.random.default_rng(0)
    for v in range(6):
        (tmp_path / f"v{v}").mkdir()
        for i, frame in enumerate(rng.integers(0, 256, (9 * (v < 5), 16, 20, 3), dtype=np.uint8)):
            Image.fromarray(frame).save(tmp_path / f"v{v}" / f"{i:03d}.png", compress_level=1)
    videos = Videos.make(tmp_path, [f"v{v}" for v in range(6)], [v % 3 for v in range(6)])
    data = Data("set", 1, ("x", "y", "z"), videos, videos, False, True, ())
    monkeypatch.setattr("common.tools.ensemble.load_data", lambda *_: data)
    yield data
    if dist.is_initialized():
        dist.destroy_process_group()


def saved(path, kind, seed, average="logits"):
    """A model.pt of a tiny network; the network and its recipe."""
    torch.manual_seed(seed)
    build = dict(name="tsm10", classes=3, in_channels=modality.MODALITIES[kind].channels, width=1 / 16)
    net = backbones.build(**build)
    nn.init.normal_(net.fc.weight, std=2.0)
    recipe = Recipe(2, 1, 1, 1, 16, 16, uniform=1, modality=kind, average=average)
    save_model(path, net, build, ["x", "y", "z"], recipe)
    return net.eval(), recipe


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_command_writes_every_ensemble(data, tmp_path, average):
    """Of models whose own averages differ; an unreadable video is wrong for each of them."""
    paths = [str(tmp_path / name) for name in ("a.pt", "b.pt", "c.pt")]
    models = [saved(paths[0], "rgb", 0), saved(paths[1], "rgb", 1, "softmax"), saved(paths[2], "diff", 2)]
    out = tmp_path / "out"
    ensemble.main([*paths, "--data", "set", "--out", str(out), "--workers", "0", "--average", average])
    logits, probs = {}, {}
    for path, (net, recipe) in zip(paths, models, strict=True):
        views = Views(data.test, recipe.sample, recipe.view, recipe.short_side, recipe.open)
        with torch.no_grad():
            x = torch.stack([net(recipe.to_input(views[i]["views"], "cpu")) for i in range(5)])  # (N, V, K)
        logits[path] = x.mean(1)
        probs[path] = x.softmax(2).mean(1) if recipe.average == "softmax" else x.mean(1).softmax(1)

    def top1(members):
        mean = sum((logits if average == "logits" else probs)[path] for path in members)
        return 100 * (mean.argmax(1).numpy() == data.test.labels[:5]).sum() / 6

    rows = list(csv.DictReader(open(out / "ensembles.csv")))
    found = {tuple(row["models"].split(" + ")): float(row["top1"]) for row in rows}
    pairs = [(paths[0], paths[2]), (paths[1], paths[2])]
    assert found == {members: pytest.approx(top1(members)) for members in [*[(p,) for p in paths], *pairs]}
    sums = {row["model"]: float(row["sum"]) for row in csv.DictReader(open(out / "positions.csv"))}
    places = mean_positions([top1(pair) for pair in pairs])
    assert sums == dict(zip(paths, [*places, sum(places)], strict=True))
    result = json.loads((out / "result.json").read_text())
    assert result["top1"] == pytest.approx(top1(paths)) and result["models"] == 3
    assert (result["script"], result["videos"], result["unreadable"]) == ("ensemble", 6, 1)
    assert len(list(csv.reader(open(out / "predictions.csv")))) == 7


def test_views_are_the_models_own_or_those_asked_for(data, tmp_path, monkeypatch):
    saved(tmp_path / "a.pt", "rgb", 0)
    seen, score = [], evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda net, videos, recipe, *args, **kwargs: (
        seen.append((recipe.clips, recipe.uniform, recipe.crops, recipe.size))
        or score(net, videos, recipe, *args, **kwargs)))  # fmt: skip
    line = [f"{tmp_path}/a.pt", "--data", "set", "--workers", "0", "--out"]
    ensemble.main([*line, f"{tmp_path}/own"])
    ensemble.main([*line, f"{tmp_path}/asked", *"--clips 0 --uniform 2 --crops 3 --size 8".split()])
    assert seen == [(1, 1, 1, 16), (0, 2, 3, 8)]
    result = json.loads((tmp_path / "asked" / "result.json").read_text())
    assert [result[name] for name in ("clips", "uniform", "crops", "size")] == [0, 2, 3, 8]


def test_another_test_has_another_folder(data, tmp_path):
    saved(tmp_path / "a.pt", "rgb", 0)
    saved(tmp_path / "b.pt", "rgb", 1)
    line = ["--data", "set", "--out", f"{tmp_path}/out", "--workers", "0"]
    ensemble.main([f"{tmp_path}/a.pt", *line])
    ensemble.main([f"{tmp_path}/a.pt", *line])
    for other in ([f"{tmp_path}/b.pt", *line], [f"{tmp_path}/a.pt", *line, "--average", "softmax"]):
        with pytest.raises(SystemExit, match="choose another --out"):
            ensemble.main(other)
        dist.destroy_process_group()


def test_a_signal_ends_the_test_without_a_result(data, tmp_path, monkeypatch):
    saved(tmp_path / "a.pt", "rgb", 0)
    monkeypatch.setattr(evaluate, "score", lambda *_, **__: None)
    ensemble.main([f"{tmp_path}/a.pt", "--data", "set", "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("line, words", [
    ("a.pt --data set", "required: --out"), ("--data set --out o", "required: MODEL.PT"),
    ("a.pt --data set --out o --clips -1", "--clips must be at least 0"),
    ("a.pt --data set --out o --size 0", "--size must be at least 1"),
    ("a.pt --data set --out o --average max", "--average"),
    ("missing.pt --data set --out {}/o", "missing.pt"), ("{}/v0/000.png --data set --out {}/o", "000.png"),
    ("{}/a.pt --data set --out {}/o --clips 0 --uniform 0", "a.pt has no test clips left"),
    ("{}/a.pt --data set --out {}/run", "run holds a run of mml"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_status_2(data, tmp_path, line, words):
    saved(tmp_path / "a.pt", "rgb", 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    (tmp_path / "run" / "config.json").write_text('{"script": "mml", "args": {}}')
    with pytest.raises(SystemExit) as end:
        ensemble.main(line.replace("{}", str(tmp_path)).split())
    said = str(end.value)
    assert said.startswith("ensemble: ") and words in said and said.endswith("(2)") and "\n" not in said

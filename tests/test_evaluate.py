"""Scoring: averages over views, metrics against definitions, files, predictions of videos."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensors import picture_folder, pixels, save_tiny_model

from common import backbones, evaluate
from common.clips import Views
from common.data import Videos
from common.errors import UserError
from common.evaluate import Scores
from common.io.models import load_model, save_model
from common.modality import Recipe
from common.run import Run
from common.tools import predict


def scores(probs, labels, bad=None, hits=None, views=None):
    n = len(probs)
    hits = np.zeros(n, int) if hits is None else np.array(hits)
    views = np.ones(n, int) if views is None else np.array(views)
    return Scores(np.array(probs, np.float32), hits, views, np.array(labels), bad or {})


def test_metrics_by_hand():
    # Three videos of class 0, one of class 1; right, wrong, unreadable, right.
    probs = [[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 0.0], [0.1, 0.6, 0.3]]
    found = evaluate.metrics(scores(probs, [0, 0, 0, 1], {2: "no frames"}, [2, 1, 0, 2], [2, 2, 2, 2]))
    assert found["top1"] == 50.0
    assert found["top5"] == 75.0  # of three classes, so that only the unreadable one is missed
    assert found["mean_class"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert found["clip_top1"] == 62.5
    assert (found["videos"], found["unreadable"]) == (4, 1)


def test_top5_by_hand():
    probs = np.tile(np.linspace(0.9, 0.1, 8), (3, 1))
    assert evaluate.metrics(scores(probs, [0, 4, 5]))["top5"] == pytest.approx(200 / 3)


def test_rank_of_label_is_that_of_a_stable_sort():
    rng = np.random.default_rng(0)
    probs, labels = rng.integers(4, size=(300, 7)) / 4, rng.integers(7, size=300)  # many are equal
    order = np.argsort(-probs, axis=1, kind="stable")
    found = evaluate.rank_of_label(scores(probs, labels))
    assert found.tolist() == [list(row).index(y) for row, y in zip(order, labels, strict=True)]


def test_nothing_is_right_about_nan():
    found = evaluate.metrics(scores(np.full((2, 6), np.nan), [0, 5]))
    assert found["top1"] == found["top5"] == 0


def test_mean_average_precision_against_its_definition():
    rng = np.random.default_rng(0)
    probs, labels = rng.random((30, 5)), rng.random((30, 5)) < 0.3
    labels[:, 4] = False  # a class without a positive does not count
    naive = []
    for k in range(4):
        order = sorted(range(30), key=lambda i: -probs[i, k])
        right, precisions = 0, []
        for place, i in enumerate(order, 1):
            if labels[i, k]:
                right += 1
                precisions.append(right / place)
        naive.append(sum(precisions) / len(precisions))
    assert evaluate.mean_average_precision(probs, labels) == pytest.approx(sum(naive) / 4)


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_views_are_averaged_per_video(average):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    label, index = torch.tensor([0, 0, 1]), torch.tensor([4, 5, 7])
    batch = dict(counts=torch.tensor([2, 0, 1]), label=label, index=index)  # video 5 is unreadable
    found = evaluate.average_views(None, logits, batch, average, multilabel=False)
    (i, p, z, hits, count), (j, q, w, _, _) = found
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    by_hand = (sigmoid(2.0) + sigmoid(-1.0)) / 2 if average == "softmax" else sigmoid(0.5)
    assert (i, j, hits, count) == (4, 7, 1, 2)
    assert p[0] == pytest.approx(by_hand, abs=1e-6) and q[1] == pytest.approx(sigmoid(3.0), abs=1e-6)
    assert z.tolist() == [1, 0.5] and w.tolist() == [0, 3]  # logits are kept, whatever is averaged


def test_clips_at_parts_and_uniform_ones():
    """Appendix 1 of Mutual Modality Learning: dense clips first, then uniform ones."""
    frames = range(20)  # T' = 20 - 3 * 3 = 11
    recipe = Recipe(4, 3, clips=2, uniform=2, spread="parts", crops=3)
    assert [i.tolist() for i in recipe.sample(frames)] == [
        [0, 3, 6, 9], [5, 8, 11, 14], [0, 5, 10, 15], [2, 7, 12, 17]]  # fmt: skip
    assert recipe.views == 12
    one = Recipe(4, 3, clips=0, uniform=1, crops=1)
    assert [i.tolist() for i in one.sample(frames)] == [[2, 7, 12, 17]] and one.views == 1
    first = Recipe(4, 3, clips=2, uniform=0)
    assert [i.tolist() for i in first.sample(frames)] == [[0, 3, 6, 9], [8, 11, 14, 17]]


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A list of one video of 11 pictures."""
    root = tmp_path_factory.mktemp("moving")
    picture_folder(root / "a", pixels(11, 20, 26, 3))
    return Videos.make(root, ["a"], [0])


@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_videos(moving, tmp_path, monkeypatch, training):
    monkeypatch.setattr(evaluate, "VIEWS_PER_BATCH", 4)
    videos = Videos.make(moving.root, ["none", "none", "a", "none", "a", "a"], [0] * 6)
    net, recipe, seen = torch.nn.BatchNorm3d(3).train(training), Recipe(2, 3, 2, 1, 16, 16), []
    net.running_mean += 5

    def call(x):
        seen.append((len(x), net.training))
        return net(x).double().mean((2, 3, 4))

    def blocks(**how):
        return evaluate.blocks(net, call, videos, recipe, run, **how)

    with Run("evaluate", tmp_path, {}) as run:
        found = list(blocks())
        assert [batch["index"].tolist() for batch, _ in found] == [[0, 1], [2, 3], [4, 5]]
        assert found[0][1] is None and [len(y) for _, y in found[1:]] == [2, 4]
        assert all(y.dtype == torch.float32 and not y.requires_grad and (y < 0).all() for _, y in found[1:])
        assert seen == [(2, False), (4, False)] and net.training == training
        assert [batch["index"].tolist() for batch, _ in blocks(done={0, 4})] == [[2, 3]]
        for batch, _ in blocks():
            run.stop = batch["index"][0] == 2
        assert batch["index"].tolist() == [2, 3] and net.training == training
        for _ in blocks():
            break
        assert net.training == training


def test_files_name_every_video(tmp_path):
    classes = ("bend", "jack, jump", "run")
    found = scores([[0.1, 0.7, 0.2], [0.0, 0.0, 0.0]], [1, 2], {1: "no frames"})
    videos = SimpleNamespace(name=lambda i: f"a,{i}.mp4")
    evaluate.write_files(tmp_path, found, videos, classes)
    rows = list(csv.reader(open(tmp_path / "predictions.csv")))
    assert rows[1][:3] == ["a,0.mp4", "jack, jump", "jack, jump:0.700000"] and rows[2][-1] == "no frames"
    rows = list(csv.reader(open(tmp_path / "per_class.csv")))
    assert rows[1:] == [["bend", "0", "0", ""], ["jack, jump", "1", "1", "100.00"], ["run", "1", "0", "0.00"]]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_model_file_round_trip(memory, tmp_path):
    """The memory format is that of the file: other kernels round otherwise."""
    build = dict(name="r3d_10-pool", classes=3, width=0.25, dropout=0.5)
    net = backbones.build(**build).to(memory_format=memory).eval()
    save_model(tmp_path / "model.pt", net, build, ["a", "b", "c"], Recipe(8, 4, 2, 1, 32, 32))
    again, _, classes, recipe = load_model(tmp_path / "model.pt")
    x = torch.randn(2, 3, 8, 32, 32)
    assert torch.equal(net(x), again(x)) and not again.training
    assert [p.stride() for p in again.parameters()] == [p.stride() for p in net.parameters()]
    assert classes == ("a", "b", "c") and recipe == Recipe(8, 4, 2, 1, 32, 32)
    file = torch.load(tmp_path / "model.pt")
    file["input"]["keep_every"] = 1  # as in files of earlier versions
    torch.save(file, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt")[3] == recipe


@pytest.mark.parametrize("content", [{"net": {}}, {"something": torch.ones(2)}, [1, 2]])
def test_foreign_model_file(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match="not a model.pt"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("workers", [0, 1])
def test_predictions_of_files_folders_and_patterns(moving, tmp_path, capsys, workers):
    """A video that cannot be read has its reason in its row, and does not end the others."""
    shutil.copytree(f"{moving.root}/a", tmp_path / "set" / "b" / "c")
    (tmp_path / "set" / "page.mp4").write_text("<html>")
    recipe = Recipe(2, 3, 1, 1, 16, 16)
    net = save_tiny_model(tmp_path / "m.pt", recipe, ["x", "y", "z"])
    words = [f"{tmp_path}/{name}" for name in ("m.pt", "none.mp4", "set", "set/*/c", "set/b/c")]
    words += ["--workers", str(workers)]
    assert predict.main(words) == 2
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header == ["video", "top1", "top2", "top3"]
    names = "none.mp4", "set/b/c", "set/page.mp4", "set/b/c", "set/b/c"
    assert [row[0] for row in rows] == [f"{tmp_path}/{name}" for name in names]
    assert [row[1].startswith("cannot be read: ") for row in rows] == [True, False, True, False, False]
    assert predict.main([*words[:1], *words[3:], "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[1])
    views = Views(moving, recipe.sample, recipe.view, recipe.short_side)[0]["views"]
    p = net(recipe.to_input(views, "cpu"))[0].softmax(0)
    assert [top["probability"] for top in row["top"]] == pytest.approx(
        p.sort(descending=True)[0].tolist(), abs=1e-6
    )
    assert row["top"][0]["class"] == "xyz"[p.argmax()] and row["unreadable"] is None


def test_prediction_without_a_model_is_one_sentence(tmp_path, capsys):
    assert predict.main([f"{tmp_path}/m.pt", "a.mp4"]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/m.pt does not exist\n"


# ---- averages of embeddings ------------------------------------------------------------------------


class Bent(torch.nn.Module):
    """Embeddings of two numbers, and a head with an adapter that is not linear."""

    def __init__(self):
        super().__init__()
        self.fc, self.adapter = torch.nn.Linear(2, 2), backbones.Adapter(2, 1)
        self.dropout = torch.nn.Dropout(0.5)
        with torch.no_grad():
            for layer, weight in ((self.fc, [[1.0, 0.0], [0.0, 1.0]]), (self.adapter.down, [[2.0, 0.0]]),
                                  (self.adapter.up, [[3.0], [0.0]])):  # fmt: skip
                layer.weight.copy_(torch.tensor(weight))
                layer.bias.zero_()

    def embed(self, x):
        """Mean and maximum of the first frame's red."""
        red = x[:, 0, 0].flatten(1)
        return torch.stack([red.mean(1), red.amax(1)], 1)

    def head(self, z):
        return self.fc(self.dropout(self.adapter(z)))

    def forward(self, x):
        raise AssertionError("it is the embedding that is averaged")


def bent(z):
    """Its probability of class 0: logits z_0 + 3 SiLU(2 z_0) and z_1."""
    return 1 / (1 + np.exp(z[1] - z[0] - 3 * 2 * z[0] / (1 + np.exp(-2 * z[0]))))


@pytest.mark.parametrize("grad", [False, True])
def test_embeddings_are_averaged_per_video(grad):
    """The mean of (1, 0), (-2, 1) is (-1/2, 1/2); video 5 is unreadable, and a video is a single view."""
    z = torch.tensor([[1.0, 0.0], [-2.0, 1.0], [0.5, 2.0]])
    batch = dict(counts=torch.tensor([2, 0, 1]), label=torch.tensor([1, 0, 1]), index=torch.tensor([4, 5, 7]))
    net = Bent().eval()
    with torch.set_grad_enabled(grad):
        found = evaluate.average_views(net, z, batch, "embeddings", multilabel=False)
    (i, p, x, hits, count), (j, q, _, missed, one) = found
    assert torch.tensor(x).softmax(0).tolist() == pytest.approx(p.tolist(), abs=1e-6)
    assert (i, j, count, one) == (4, 7, 1, 1)
    assert p.tolist() == pytest.approx([bent((-0.5, 0.5)), 1 - bent((-0.5, 0.5))], abs=1e-6)
    assert q[0] == pytest.approx(bent((0.5, 2.0)), abs=1e-6)
    assert hits == (p[0] < 0.5) == 1 and missed == (q[0] < 0.5) == 0
    logits = net.head(z[:2]).mean(0).softmax(0)
    assert abs(logits[0].item() - p[0]) > 0.2  # another number than of averaged logits


def test_several_labels_of_an_averaged_embedding():
    z = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])
    batch = dict(counts=torch.tensor([2]), label=torch.tensor([[1, 0]]), index=torch.tensor([0]))
    ((_, p, x, hits, count),) = evaluate.average_views(Bent().eval(), z, batch, "embeddings", multilabel=True)
    logit = -0.5 + 3 * -1 / (1 + np.exp(1.0))
    assert p.tolist() == pytest.approx([1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-0.5))], abs=1e-6)
    assert x.tolist() == pytest.approx([logit, 0.5], abs=1e-6) and (hits, count) == (0, 1)


@pytest.mark.parametrize("training", [False, True])
def test_score_and_prediction_of_averaged_embeddings(moving, tmp_path, training):
    """Two clips by three crops of a video, one that cannot be read, and one file."""
    videos = Videos.make(moving.root, ["a", "none", "a"], [0, 0, 1])
    net, recipe = Bent().train(training), Recipe(2, 3, 2, 3, 16, 16, average="embeddings")
    item = Views(videos, recipe.sample, recipe.view, recipe.short_side)[0]
    views = recipe.to_input(item["views"], "cpu")
    assert len(views) == 6
    p = bent(net.embed(views).mean(0).tolist())
    with Run("evaluate", tmp_path, {}) as run:
        found = evaluate.score(net, videos, recipe, run)
    assert net.training == training
    assert found.probs[0].tolist() == pytest.approx([p, 1 - p], abs=1e-5) and not found.probs[1].any()
    assert np.allclose(found.probs[0], found.probs[2], atol=1e-6) and list(found.bad) == [1]
    assert np.allclose(torch.from_numpy(found.logits).softmax(1)[[0, 2]], found.probs[[0, 2]], atol=1e-6)
    assert not found.logits[1].any()
    assert found.views.tolist() == [1, 1, 1] and found.hits.tolist() == [int(p > 0.5), 0, int(p < 0.5)]
    model = net.eval(), {}, ("x", "y"), recipe
    ((_, top, reason),) = predict.predict(model, [f"{moving.root}/a"])
    predicted = dict(top)
    assert reason is None and [predicted["x"], predicted["y"]] == pytest.approx(
        found.probs[0].tolist(), abs=1e-6
    )

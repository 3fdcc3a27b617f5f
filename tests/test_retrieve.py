"""common.tools.retrieve: recall by hand and by brute force, clips and videos, the sheet, a run."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensors import picture_folder, random, save_tiny_model

from common.data import Data, Videos, load_data
from common.io.features import Features
from common.modality import Recipe
from common.tools import retrieve
from common.tools.shared import CAPTION

pytestmark = pytest.mark.usefixtures("leave", "group")


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
def test_a_run(net, folder, tmp_path, capsys, monkeypatch):
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


def test_several_labels_are_refused(folder, tmp_path, monkeypatch):
    data = Data(**vars(load_data(str(folder))) | {"multilabel": True})
    monkeypatch.setattr(retrieve, "load_data", lambda *_: data)
    monkeypatch.setattr("sys.argv", ["retrieve", "m.pt", "--data", str(folder), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="several labels"):
        retrieve.main()

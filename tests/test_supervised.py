"""A network trained by cross-entropy (common/supervised.py), and trained ones (common/io/models.py)."""

import csv
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from common import backbones, supervised
from common.data import hold_out, load_data
from common.errors import UserError
from common.io import models
from common.io import weights as weights_of
from common.io.models import digest_of_model, load_model
from common.modality import Recipe

pytestmark = pytest.mark.usefixtures("leave", "group")
TINY = (
    "--net resnet3d10-small --width 0.0625 --dropout 0 --size 16 --test_size 16 --jitter 18 22 --frames 4 "
    "--stride 1 --clips 2 --crops 1 --epochs 2 --batch 2 --eval_every 1 --log_every 1 --workers 0"
)


@pytest.fixture(scope="module")
def data(make, tmp_path_factory):
    """Eight training videos of two classes, three test videos."""
    root = tmp_path_factory.mktemp("data") / "set"
    root.mkdir()
    for part, n in (("train", 8), ("test", 3)):
        for i in range(n):
            make.write(root / f"{part}{i}.mp4", frames=8 + i, size=(24 + 2 * i + 10 * (part == "test"), 20))
        (root / f"{part}.txt").write_text("".join(f"{part}{i}.mp4 {i % 2}\n" for i in range(n)))
    (root / "classes.txt").write_text("one\ntwo\n")
    return root


def start(data, out, more=""):
    assert supervised.main(f"--data {data} --out {out} {TINY} {more}".split())
    return out


def refused(data, out, more=""):
    with pytest.raises(SystemExit) as end:
        start(data, out, more)
    if dist.is_initialized():
        dist.destroy_process_group()
    return str(end.value)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return start(data, tmp_path_factory.mktemp("whole") / "run", "--per_class 3 --seed 2")


def result_of(out):
    return json.loads((out / "result.json").read_text())


def rows_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_what_a_run_leaves(data, whole):
    _, build, classes, recipe = load_model(whole / "model.pt")
    assert (build["name"], build["width"], classes) == ("resnet3d10-small", 0.0625, ("one", "two"))
    assert (recipe.frames, recipe.stride, recipe.clips, recipe.crops, recipe.size) == (4, 1, 2, 1, 16)
    assert len((whole / "labelled.txt").read_text().splitlines()) == 6 and result_of(whole)["videos"] == 3
    steps = [row["step"] for row in rows_of(whole) if "lr" in row]
    tests = [row["step"] for row in rows_of(whole) if "eval" in row]
    assert steps == [1, 2, 3, 4, 5, 6] and tests == [3, 6]  # 6 videos, 2 a step


def test_stopped_and_resumed(data, whole, tmp_path, monkeypatch):
    """Bit for bit."""
    loss, steps = supervised.F.cross_entropy, []

    def stopping(*args):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    line = f"--data {data} --out {tmp_path} {TINY} --per_class 3 --seed 2".split()
    with monkeypatch.context() as patch:
        patch.setattr(supervised.F, "cross_entropy", stopping)
        assert not supervised.main(line)
    assert supervised.main(line) and rows_of(tmp_path) == rows_of(whole)
    ours, theirs = (load_model(out / "model.pt")[0] for out in (tmp_path, whole))
    assert digest_of_model(ours) == digest_of_model(theirs)


def test_a_finished_run_shows_its_result_and_none_of_other_labels(data, tmp_path, capfd):
    few, out = tmp_path / "few.txt", tmp_path / "out"
    few.write_text("train0.mp4\ntrain1.mp4\n")
    start(data, out, f"--labelled_list {few}")
    before = (out / "model.pt").stat().st_mtime_ns
    capfd.readouterr()
    start(data, out, f"--labelled_list {few}")
    assert "\nRESULT script=supervised" in capfd.readouterr().out
    assert (out / "model.pt").stat().st_mtime_ns == before
    few.write_text("train2.mp4\ntrain3.mp4\n")
    assert "the labelled videos are not those of" in refused(data, out, f"--labelled_list {few}")


def test_held_out_videos_are_tested_and_not_learned(data, tmp_path):
    start(data, tmp_path, "--holdout 0.4 --epochs 0")
    tested = [row["video"] for row in csv.DictReader(open(tmp_path / "predictions.csv"))]
    learned = (tmp_path / "labelled.txt").read_text().split()[::2]
    assert len(tested) == 4 and sorted([*tested, *learned]) == [f"train{i}.mp4" for i in range(8)]


def test_data_without_a_label_to_learn_are_refused(data, tmp_path):
    held_out = hold_out(load_data(data).train, 0.4, 0)
    (tmp_path / "few.txt").write_text("".join(f"train{i}.mp4\n" for i in np.flatnonzero(held_out)))
    said = refused(data, tmp_path / "out", f"--holdout 0.4 --labelled_list {tmp_path}/few.txt")
    assert "set has no labelled video beside the held-out ones" in said
    shutil.copytree(data, tmp_path / "multi")
    for part in ("train", "test"):
        (tmp_path / "multi" / f"{part}.txt").write_text("".join(f"{part}{i}.mp4 0 1\n" for i in range(3)))
    assert "multi has several labels per video" in refused(tmp_path / "multi", tmp_path / "out2")


def test_a_model_is_tested_and_another_starts_from_it(data, whole, tmp_path):
    start(data, tmp_path / "eval", f"--eval {whole}/model.pt")
    assert result_of(tmp_path / "eval")["top1"] == result_of(whole)["top1"]
    start(data, tmp_path / "init", f"--init {whole}/model.pt --epochs 0 --eval_every 0")
    ours, theirs = (load_model(out / "model.pt")[0] for out in (tmp_path / "init", whole))
    assert digest_of_model(ours) == digest_of_model(theirs)


def test_views_are_crops_with_one_flip():
    args, mirrored = SimpleNamespace(size=16, jitter=(20, 24)), set()
    ramp = torch.arange(40, dtype=torch.uint8).expand(2, 3, 30, 40)
    for seed in range(30):
        torch.manual_seed(seed)
        (crop,) = supervised.view([ramp], args, flip=True)
        (direction,) = (crop[..., 0] > crop[..., -1]).unique().tolist()
        assert crop.shape == (2, 3, 16, 16)
        mirrored.add(direction)
        assert (supervised.view([ramp], args, flip=False)[0].diff(dim=-1) >= 0).all()
    assert mirrored == {False, True}


@pytest.mark.parametrize("line, word", [
    ("--jitter 30 20", "--jitter is a range"), ("--net tsm11", "tsm11"), ("--batch 0", "--batch"),
    ("--holdout 2", "--holdout"), ("--epochs -1", "--epochs"), ("--frames 0", "--frames"),
])  # fmt: skip
def test_mistakes_are_one_sentence(line, word):
    with pytest.raises(SystemExit, match=f"supervised: .*{word}.*\\(2\\)$"):
        supervised.parse_args(line.split())


# ---- trained networks by a specification -----------------------------------------------------------


def test_how_a_network_of_another_toolbox_sees_a_video():
    assert models.parse("a/m.pt", "set") == (None, "a/m.pt", None)
    for spec, clip in (
        ("tsn50:AN.pth:8", dict(frames=8, clips=0, uniform=1)),
        ("tsm50:K.pth:8x4", dict(frames=8, stride=4, clips=10, uniform=0)),
    ):
        name, weights, recipe = models.parse(spec, "set")
        assert spec.startswith(f"{name}:{weights}:") and {k: getattr(recipe, k) for k in clip} == clip
        assert (recipe.mean, recipe.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    swin = models.parse("swin3d_b:kinetics", "set")[2]
    assert swin == Recipe(**weights_of.published_input("swin3d_b", "kinetics")) and swin.frames == 32
    assert models.parse("swin3d_b:kinetics:16x2", "set")[2].frames == 16


@pytest.mark.parametrize("clip", ["", "eight", "8x4x2", "x4", "8x", "0", "8x0", "-8", "8 4", "8.5", "²"])
def test_a_network_that_is_no_model_must_say_what_it_sees(clip):
    with pytest.raises(UserError, match="tsn50:AN.pth must say what the network sees: :8 for 8 segments"):
        models.parse(f"tsn50:AN.pth:{clip}", "set")


def test_models_are_loaded_with_the_list_that_they_learned(data, whole, tmp_path):
    loaded = load_data(data)
    model = models.load(f"{whole}/model.pt", loaded, None)
    assert model.labelled_list == (whole / "labelled.txt").read_text() and not model.net.training
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "model.pt").write_bytes((whole / "model.pt").read_bytes())
    again = models.load(str(tmp_path), loaded, None)  # a folder has one for each data set
    assert again.labelled_list is None and again.path == f"{tmp_path}/set/model.pt"
    assert digest_of_model(again.net) == digest_of_model(model.net)
    torch.save(backbones.build("tsm10", 3, width=0.0625).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth"):
        models.load(f"tsm10:{tmp_path}/other.pth:4", loaded, None)

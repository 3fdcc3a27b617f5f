"""Contact sheets pixel by pixel, Grad-CAM by hand, corruptions by their factor, and the command."""

import csv
import os
import shutil
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import backbones
from common.clips import Views
from common.data import Videos
from common.io.models import load_model, save_model
from common.modality import Recipe, stacked
from common.tools import figures

HERE = Path(__file__).resolve().parent.parent


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_contact_sheet(tmp_path):
    rows = [pixels(3, 3, 8, 10), pixels(2, 3, 6, 20, seed=1)]  # 30 and 40 pixels wide
    figures.contact_sheet(tmp_path / "a.png", rows, ["row 1", "r\u00fcck"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    line = figures.CAPTION
    assert sheet.shape == (2 * line + 8 + 6, 40, 3) and sheet.dtype == np.uint8
    for top, row in ((line, rows[0]), (2 * line + 8, rows[1])):
        T, _, H, W = row.shape
        for t in range(T):
            frame = sheet[top : top + H, t * W : (t + 1) * W]
            assert np.array_equal(frame, row[t].permute(1, 2, 0).numpy())
    assert not sheet[line : line + 8, 30:].any()  # black beside the narrower row
    assert sheet[:line].any() and sheet[line + 8 : 2 * line + 8].any()  # captions
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_contact_sheet_wants_a_caption_for_each_row(tmp_path):
    with pytest.raises(ValueError):
        figures.contact_sheet(tmp_path / "a.png", [pixels(1, 3, 4, 4)] * 2, ["one"])
    assert not list(tmp_path.iterdir())


def test_heat_is_blue_where_low_and_red_where_high():
    values = torch.tensor([[[0.0, 0.5, 1.0]]])  # (T, H, W)
    seen = figures.heat(torch.zeros(1, 3, 1, 3, dtype=torch.uint8), values)
    assert seen.shape == (1, 3, 1, 3) and seen.dtype == torch.uint8
    (r0, r5, r1), (g0, g5, g1), (b0, b5, b1) = seen[0, :, 0].tolist()
    assert b0 > r0 == g0 == 0 and r1 > b1 == g1 == 0 and g5 > max(r5, b5)
    # Half of the picture shines through, and nothing overflows.
    white = figures.heat(torch.full((1, 3, 1, 3), 255, dtype=torch.uint8), values)
    assert (white.int() - seen.int() >= 127).all() and (white.int() - seen.int() <= 128).all()


class Tiny(nn.Module):
    """A network whose only stage is its input, and whose classes weigh the channels by +1, -1 and -1, +1."""

    def __init__(self):
        super().__init__()
        self.gain, self.fc = nn.Parameter(torch.ones(())), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def features(self, x):
        return [torch.zeros(1), self.gain * x[:, :2]]

    def classify(self, f):
        return self.fc(f.mean((2, 3, 4)))

    def forward(self, x):
        return self.classify(self.features(x)[-1])


# Channels [[1, 2], [3, 4]] and [[1, 1], [5, 1]]: their difference is [[0, 1], [-2, 3]].
X = torch.tensor([[[[[1.0, 2.0], [3.0, 4.0]]], [[[1.0, 1.0], [5.0, 1.0]]]]])  # (B, C, T, H, W)


@pytest.mark.parametrize("y, cam", [(0, [[0, 1 / 3], [0, 1]]), (1, [[0, 0], [1, 0]])])
def test_grad_cam_by_hand(y, cam):
    found = figures.grad_cam(Tiny(), X, torch.tensor([y]))
    assert found.shape == (1, 1, 2, 2) and not found.requires_grad
    assert found[0, 0].numpy() == pytest.approx(np.array(cam), abs=1e-6)


def test_grad_cam_of_each_clip_and_its_own_class():
    x = torch.cat([X, 10 * X, -X])  # the last: what speaks for class 1 there speaks for class 0 in the first
    found = figures.grad_cam(Tiny(), x, torch.tensor([0, 1, 1]))[:, 0]
    assert torch.allclose(found[2], found[0]) and found[1].tolist() == [[0, 0], [1, 0]]
    assert found.amax((1, 2)).tolist() == [1, 1, 1]


class Coarse(Tiny):
    """The same with a stage of half the clip's size."""

    def features(self, x):
        return super().features(F.avg_pool3d(x, (1, 2, 2)))


def test_grad_cam_is_resized_and_may_be_empty():
    x = torch.cat([X, torch.ones(1, 2, 1, 2, 2)]).expand(2, 2, 3, 2, 2)
    x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)  # (2, 2, 3, 4, 4)
    found = figures.grad_cam(Coarse(), x, torch.tensor([0, 0]))
    assert found.shape == (2, 3, 4, 4) and found.min() == 0 and found[0].max() == 1
    assert not found[1].any()  # no channel speaks for the class
    assert found[0, 0, -1, -1] == 1 and found[0, 0, 0, 0] == 0 and torch.equal(found[0, 0], found[0, 2])


@pytest.fixture
def videos(tmp_path):
    """Four videos of pictures; the second has none."""
    for i in range(4):
        (tmp_path / f"v{i}").mkdir()
        for t in range(0 if i == 1 else 3):
            picture = pixels(12, 16, 3, seed=10 * i + t).numpy()
            Image.fromarray(picture).save(tmp_path / f"v{i}" / f"{t:02d}.png")
    return Videos.make(tmp_path, [f"v{i}" for i in range(4)], [0, 1, 0, 1])


def test_cam_sheets(videos, tmp_path):
    recipe = Recipe(3, 1, 10, 3, 12, 12)
    models = {"student": (Tiny(), recipe), "teacher": (Tiny(), recipe)}
    figures.cam_sheets(tmp_path / "new" / "cam", videos, ("a", "b"), models, 99, torch.device("cpu"))
    sheets = sorted(path.name for path in (tmp_path / "new" / "cam").iterdir())
    assert sheets == ["00000.png", "00002.png", "00003.png"]
    for i in (0, 2, 3):
        sheet = np.asarray(Image.open(tmp_path / "new" / "cam" / f"{i:05d}.png"))
        assert sheet.shape == (3 * (12 + figures.CAPTION), 3 * 12, 3)
        for t in range(3):  # the central crop of the whole frames, then where each model looks
            frame = np.asarray(Image.open(tmp_path / f"v{i}" / f"{t:02d}.png"))[:, 2:14]
            at = [slice(top, top + 12) for top in (14, 40, 66)]
            shown = [sheet[rows, 12 * t : 12 * t + 12].astype(int) for rows in at]
            assert np.array_equal(shown[0], frame) and np.array_equal(shown[1], shown[2])
            assert (np.abs(shown[1] - frame / 2 - 64) <= 64.5).all() and not np.array_equal(shown[1], frame)


def test_cam_sheets_are_of_videos_spread_over_the_list(videos, tmp_path):
    models = {"student": (Tiny(), Recipe(3, 1, 1, 1, 12, 12))}
    figures.cam_sheets(tmp_path / "cam", videos, ("a", "b"), models, 2, torch.device("cpu"))
    assert sorted(path.name for path in (tmp_path / "cam").iterdir()) == ["00000.png", "00003.png"]


# ---- corruptions -----------------------------------------------------------------------------------


def corrupted(kind):
    return figures.Corrupted(2, 1, 2, 1, 12, 12, corruption=kind)


def test_corrupt_brightness_has_one_factor_per_video():
    clips, factors = [torch.full((2, 3, 12, 12), 100, dtype=torch.uint8)] * 3, set()
    for seed in range(80):
        torch.manual_seed(seed)
        seen = corrupted("brightness").view(clips)
        assert seen.shape == (3, 2, 3, 12, 12) and seen.unique().numel() == 1
        factors.add(int(seen[0, 0, 0, 0, 0]))
    assert 49 <= min(factors) < 60 and 140 < max(factors) <= 150  # 0.5 to 1.5


def test_corrupt_contrast_scales_the_spread():
    half = torch.cat([torch.full((2, 3, 12, 6), level, dtype=torch.uint8) for level in (80, 120)], dim=3)
    spreads = set()
    for seed in range(40):
        torch.manual_seed(seed)
        seen = corrupted("contrast").view([half, half]).int()
        spread = seen[..., -1] - seen[..., 0]
        assert spread.unique().numel() == 1 and abs(seen.float().mean() - 100) < 1.5
        spreads.add(int(spread.flatten()[0]))
    assert 19 <= min(spreads) < 26 and 54 < max(spreads) <= 61  # 40 times 0.5 to 1.5


def test_corrupt_grayscale_has_no_colour():
    x = pixels(2, 3, 12, 12)
    seen = corrupted("grayscale").view([x])[0]
    assert seen.shape == x.shape and (seen == seen[:, :1]).all()
    luminance = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert ((seen[:, 0] - luminance).abs() <= 1.1).all()


@pytest.mark.parametrize("kind", figures.CORRUPTIONS)
def test_the_two_frames_of_a_difference_are_corrupted_alike(kind):
    """A video is corrupted, not its TG: what is still stays grey."""
    x = pixels(2, 3, 12, 12).repeat_interleave(2, 0)  # frames t and t + n of a still video
    assert (stacked(corrupted(kind).view([x]), "tg") == 127).all()


def test_corruption_is_a_function_of_the_video(videos):
    same = videos.subset([0] * 4)  # one file, so only the index can tell them apart
    recipe = corrupted("brightness")
    views = Views(same, recipe.sample, recipe.view)
    first = [views[i]["views"] for i in range(4)]
    torch.manual_seed(99)
    torch.rand(7)
    again = [views[i]["views"] for i in (3, 1, 0, 2)]
    assert all(torch.equal(first[i], x) for i, x in zip((3, 1, 0, 2), again, strict=True))
    assert all(not torch.equal(first[i], first[j]) for i in range(4) for j in range(i))


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(videos, tmp_path, leave, group):
    """Runs the command on a student and a TG teacher; returns the folder of the results."""
    (tmp_path / "v1" / "00.png").write_text("no picture")
    shutil.copytree(tmp_path / "v0", tmp_path / "w0")
    (tmp_path / "train.txt").write_text("w0 0\n")
    (tmp_path / "test.txt").write_text("v0 0\nv1 1\nv2 0\nv3 1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    build = dict(name="r3d_10-pool", classes=2, width=1 / 16)
    for name, kind in (("model", "rgb"), ("teacher", "tg"), ("fields", "flow")):
        net, recipe = backbones.build(**build), Recipe(2, 1, 2, 1, 12, 12, modality=kind)
        nn.init.constant_(net.fc.bias[:1], 9.0)  # always says "a"
        save_model(tmp_path / f"{name}.pt", net, build, ["a", "b"], recipe)

    def run(figure, *models, flags=("--workers", "0")):
        models = [f"{tmp_path}/{name}.pt" for name in models]
        figures.main([figure, *models, "--data", str(tmp_path), "--out", f"{tmp_path}/out", *flags])
        return tmp_path / "out"

    return run


def test_cam_of_student_and_teacher(command):
    out = command("cam", "model", "teacher", flags=["--videos", "4", "--workers", "0"])
    assert sorted(path.name for path in out.glob("*.png")) == ["00000.png", "00002.png", "00003.png"]
    sheet = np.asarray(Image.open(out / "00000.png"))
    assert sheet.shape == (3 * (12 + figures.CAPTION), 2 * 12, 3)


@pytest.mark.parametrize("model", ["model", "teacher"])
def test_embedding(command, model, tmp_path):
    table = np.load(command("embedding", model) / "embedding.npz")
    assert table["features"].shape == (3, 32) and table["features"].dtype == np.float32
    assert table["names"].tolist() == ["v0", "v2", "v3"] and table["labels"].tolist() == [0, 0, 1]
    assert table["classes"].tolist() == ["a", "b"]
    net, _, _, recipe = load_model(tmp_path / f"{model}.pt")
    listed = Videos.make(tmp_path, ["v3"], [1])
    x = Views(listed, recipe.sample, recipe.view, recipe.short_side, recipe.open)[0]["views"]
    expected = net.embed(recipe.to_input(x, "cpu")).mean(0).detach().numpy()
    assert table["features"][2] == pytest.approx(expected, abs=1e-5)


def test_corruption(command):
    out = command("corruption", "model", "teacher")
    rows = list(csv.reader(open(out / "corruption.csv")))
    assert rows[0] == ["model", "clean", "contrast", "brightness", "grayscale"]
    assert [row[1:] for row in rows[1:]] == [["50.0"] * 4] * 2  # two of four: one is wrong, one unreadable


@pytest.mark.parametrize("words, sentence", [
    (("cam", "fields"), "fields.pt sees flow"), (("cam", "nowhere"), "nowhere.pt"),
    (("embedding", "model", "teacher"), "embedding takes one model"),
])  # fmt: skip
def test_mistakes_are_one_sentence(command, words, sentence):
    with pytest.raises(SystemExit, match=f"figures: .*{sentence}"):
        command(*words)


def test_command_with_workers(command, tmp_path):
    """What the workers get is pickled by a process whose main module is the command."""
    command("cam", "model")
    words = ["-m", "common.tools.figures", "corruption", f"{tmp_path}/teacher.pt", "--data", str(tmp_path)]
    process = forks.start([forks.sys.executable, *words, "--out", f"{tmp_path}/c", "--workers", "1"], HERE,
                          os.environ | {"PYTHONPATH": str(HERE)})  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "clean contrast brightness grayscale" in out, out + err

"""Contact sheets pixel by pixel, Grad-CAM by hand, corruptions by their factor, and the command."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from tensors import picture_folder, pixels, save_tiny_model
from torch import nn
from torch.nn import functional as F

from common.clips import Views
from common.data import Videos
from common.io.models import load_model
from common.modality import Recipe, stacked
from common.tools import figures
from common.tools.shared import CAPTION as LINE
from common.tools.shared import contact_sheet

HERE = Path(__file__).resolve().parent.parent


def test_contact_sheet(tmp_path):
    rows = [pixels(3, 3, 8, 10), pixels(2, 3, 6, 20, seed=1)]  # 30 and 40 pixels wide
    contact_sheet(tmp_path / "a.png", rows, ["row 1", "r\udcfcck"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * LINE + 8 + 6, 40, 3) and sheet.dtype == np.uint8
    for top, row in ((LINE, rows[0]), (2 * LINE + 8, rows[1])):
        strip = np.concatenate([*row.permute(0, 2, 3, 1).numpy()], axis=1)  # (H, T W, 3)
        assert np.array_equal(sheet[top : top + len(strip), : strip.shape[1]], strip)
        assert sheet[top - LINE : top].any()  # the caption
    assert not sheet[LINE : LINE + 8, 30:].any()  # black beside the narrower row
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


# ---- corruptions -----------------------------------------------------------------------------------


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


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(videos, tmp_path, leave, group):
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
def test_mistakes_are_one_sentence(command, words, sentence):
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

"""Pictures for people: contact sheets pixel by pixel, Grad-CAM by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import show
from common.datasets import Videos
from common.evaluate import Recipe


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_contact_sheet(tmp_path):
    rows = [pixels(3, 3, 8, 10), pixels(2, 3, 6, 20, seed=1)]  # 30 and 40 pixels wide
    show.contact_sheet(tmp_path / "a.png", rows, ["row 1", "r\u00fcck"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    line = show.CAPTION
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
        show.contact_sheet(tmp_path / "a.png", [pixels(1, 3, 4, 4)] * 2, ["one"])
    assert not list(tmp_path.iterdir())


def test_heat_is_blue_where_low_and_red_where_high():
    values = torch.tensor([[[0.0, 0.5, 1.0]]])  # (T, H, W)
    seen = show.heat(torch.zeros(1, 3, 1, 3, dtype=torch.uint8), values)
    assert seen.shape == (1, 3, 1, 3) and seen.dtype == torch.uint8
    (r0, r5, r1), (g0, g5, g1), (b0, b5, b1) = seen[0, :, 0].tolist()
    assert b0 > r0 == g0 == 0 and r1 > b1 == g1 == 0 and g5 > max(r5, b5)
    # Half of the picture shines through, and nothing overflows.
    white = show.heat(torch.full((1, 3, 1, 3), 255, dtype=torch.uint8), values)
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
    found = show.grad_cam(Tiny(), X, torch.tensor([y]))
    assert found.shape == (1, 1, 2, 2) and not found.requires_grad
    assert found[0, 0].numpy() == pytest.approx(np.array(cam), abs=1e-6)


def test_grad_cam_of_each_clip_and_its_own_class():
    x = torch.cat([X, 10 * X, -X])  # the last: what speaks for class 1 there speaks for class 0 in the first
    found = show.grad_cam(Tiny(), x, torch.tensor([0, 1, 1]))[:, 0]
    assert torch.allclose(found[2], found[0]) and found[1].tolist() == [[0, 0], [1, 0]]
    assert found.amax((1, 2)).tolist() == [1, 1, 1]


class Coarse(Tiny):
    """The same with a stage of half the clip's size."""

    def features(self, x):
        return super().features(F.avg_pool3d(x, (1, 2, 2)))


def test_grad_cam_is_resized_and_may_be_empty():
    x = torch.cat([X, torch.ones(1, 2, 1, 2, 2)]).expand(2, 2, 3, 2, 2)
    x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)  # (2, 2, 3, 4, 4)
    found = show.grad_cam(Coarse(), x, torch.tensor([0, 0]))
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
    show.cam_sheets(tmp_path / "new" / "cam", videos, ("a", "b"), models, 99, torch.device("cpu"))
    sheets = sorted(path.name for path in (tmp_path / "new" / "cam").iterdir())
    assert sheets == ["00000.png", "00002.png", "00003.png"]
    for i in (0, 2, 3):
        sheet = np.asarray(Image.open(tmp_path / "new" / "cam" / f"{i:05d}.png"))
        assert sheet.shape == (3 * (12 + show.CAPTION), 3 * 12, 3)
        for t in range(3):  # the central crop of the whole frames, then where each model looks
            frame = np.asarray(Image.open(tmp_path / f"v{i}" / f"{t:02d}.png"))[:, 2:14]
            at = [slice(top, top + 12) for top in (14, 40, 66)]
            shown = [sheet[rows, 12 * t : 12 * t + 12].astype(int) for rows in at]
            assert np.array_equal(shown[0], frame) and np.array_equal(shown[1], shown[2])
            assert (np.abs(shown[1] - frame / 2 - 64) <= 64.5).all() and not np.array_equal(shown[1], frame)


def test_cam_sheets_are_of_videos_spread_over_the_list(videos, tmp_path):
    models = {"student": (Tiny(), Recipe(3, 1, 1, 1, 12, 12))}
    show.cam_sheets(tmp_path / "cam", videos, ("a", "b"), models, 2, torch.device("cpu"))
    assert sorted(path.name for path in (tmp_path / "cam").iterdir()) == ["00000.png", "00003.png"]

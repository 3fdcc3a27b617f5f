"""Views of clips: the same for all frames, any memory layout, the right region, one seed one result."""

from collections import Counter

import pytest
import torch
from torchvision.transforms.v2 import functional as V

from common import augment

T = 4


def random_clip(H=60, W=80, T=T, seed=0):
    """(T, 3, H, W) in THWC memory, as frames are decoded: smooth patches with some noise."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (T, 3, 6, 8), generator=g, dtype=torch.uint8)
    clip = V.resize(coarse, [H, W]).int() + torch.randint(-9, 10, (T, 3, H, W), generator=g)
    return clip.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def ramp(H=64, W=96):
    """One frame whose red is the column and whose green is the row."""
    clip = torch.zeros(1, 3, H, W, dtype=torch.uint8)
    clip[:, 0] = torch.arange(W, dtype=torch.uint8)
    clip[:, 1] = torch.arange(H, dtype=torch.uint8)[:, None]
    return clip


VIEWS = {
    "jitter_crop": lambda clip: augment.jitter_crop(clip, 32, (40, 56)),
    "resize_crop": lambda clip: augment.resize_crop(clip, 32, 40),
    "random_resized_crop": lambda clip: augment.random_resized_crop(clip, 32),
    "multi_scale_crop": lambda clip: augment.multi_scale_crop([clip], 32)[0],
    "stretched_crop": lambda clip: augment.stretched_crop([clip], 32, (40, 48))[0],
    "random_flip": lambda clip: augment.random_flip(clip, 1.0),
    "three_crops": lambda clip: augment.three_crops(clip, 32)[1],
    "rand_augment": lambda clip: augment.rand_augment(clip, 3, 10),
    "cutout": lambda clip: augment.cutout(clip, 30),
}
VIEWS |= {f"{name}{v:+}": lambda clip, name=name, v=v: augment.OPERATIONS[name](clip, v)
          for name in augment.OPERATIONS for v in (0.7, -0.3)}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_view_is_one_function_of_seed_for_all_frames_and_layouts(name):
    moving, height = random_clip(), 32 if "crop" in name else 60
    still = moving[:1].expand(T, -1, -1, -1)
    for seed in range(6):
        outputs = []
        for x in (moving, moving.contiguous(), still):
            torch.manual_seed(seed)
            outputs.append(VIEWS[name](x))
        out, planar, frames = outputs
        assert out.dtype == torch.uint8 and out.shape[:3] == (T, 3, height)
        assert torch.equal(planar, out) and (frames == frames[:1]).all()
    assert torch.equal(moving, random_clip()), "the clip given was written to"


# ------------------------------------------------------------------------------------------- space


@pytest.mark.parametrize("H, W", [(48, 64), (64, 48), (60, 60), (45, 81), (7, 5), (2, 2), (1, 9)])
def test_crops_of_any_picture_have_the_size_asked_for_and_stay_inside(H, W):
    clip = torch.full((2, 3, H, W), 200, dtype=torch.uint8)
    for seed in range(20):
        torch.manual_seed(seed)
        views = [augment.jitter_crop(clip, 40, (44, 52)), augment.resize_crop(clip, 40, 48)]
        views += [augment.random_resized_crop(clip, 40), *augment.multi_scale_crop([clip], 40)]
        views += [*augment.stretched_crop([clip], 40, (44, 44)), *augment.three_crops(clip, 40)]
        assert {view.shape for view in views} == {(2, 3, 40, 40)} and len(views) == (6 if H == W else 8)
        assert min(view.min() for view in views) == 200


def test_resize_crop_is_resize_then_centre_crop():
    clip = random_clip(120, 160)
    whole = V.center_crop(V.resize(clip, [60, 80], antialias=True), [52, 52])
    out = augment.resize_crop(clip, 52, 60)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # the rim may look past the region
    assert (out[inside].int() - whole[inside].int()).abs().max() <= 1
    assert torch.equal(augment.resize_crop(clip, 100, 120), V.center_crop(clip, [100, 100]))


def test_jitter_crop_reaches_every_place_and_scale():
    """Positions and sizes read off a ramp: uniform, within the picture, no change of aspect."""
    places, sides = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        out = augment.jitter_crop(ramp(64, 96), 32, (40, 64))[0].float()
        across, down = out[0, 16, 31] - out[0, 16, 0], out[1, 31, 16] - out[1, 0, 16]
        assert abs(across - down) <= 2
        places.append((out[0, 16, 0].item(), out[1, 0, 16].item()))
        sides.append(across.item() * 32 / 31)
    # 32 pixels of a short side of 40 to 64 show 51 to 32 of 64 rows.
    assert 30 <= min(sides) < 34 and 48 < max(sides) <= 52
    left, top = zip(*places, strict=True)
    assert min(left) <= 1 and max(left) >= 58 and min(top) <= 1 and max(top) >= 26
    assert len(set(left)) > 40 and len(set(top)) > 20
    out = augment.jitter_crop(ramp(48, 60), 32, (48, 48))  # without jitter pixels are copied
    left, top = out[0, 0, 0, 0].item(), out[0, 1, 0, 0].item()
    assert torch.equal(out, ramp(48, 60)[..., top : top + 32, left : left + 32])


def test_random_flip_obeys_p():
    clip = random_clip()
    assert torch.equal(augment.random_flip(clip, 0.0), clip)
    assert torch.equal(augment.random_flip(clip, 1.0), clip.flip(-1))
    torch.manual_seed(0)
    flips = sum(not torch.equal(augment.random_flip(clip), clip) for _ in range(200))
    assert 70 < flips < 130


@pytest.mark.parametrize("turned", [False, True])
def test_three_crops_span_the_long_side(turned):
    clip = ramp(40, 91)
    crops = augment.three_crops(clip.transpose(2, 3) if turned else clip, 40)
    for crop, start in zip(crops, (0, 25, 51), strict=True):
        assert torch.equal(crop.transpose(2, 3) if turned else crop, clip[..., start : start + 40])


def regions(monkeypatch, view, clips, draws):
    """Of each clip, (top, left, height, width) of the regions that `draws` calls of `view` cut from it."""
    cut = []
    monkeypatch.setattr(augment.V, "resized_crop", lambda x, *box: cut.append(box[:4]) or x)
    torch.manual_seed(0)
    for _ in range(draws):
        view(clips)
    return [cut[k :: len(clips)] for k in range(len(clips))]


@pytest.mark.parametrize("H, W", [(240, 320), (320, 240), (101, 180)])
def test_multi_scale_crop_has_the_regions_of_tsn(H, W, monkeypatch):
    """Scales of the short side, at most one apart, at four corners, four sides, the centre, and the points
    between centre and corners; all pairs alike, and all places."""
    expected, scales = set(), (1.0, 0.875, 0.75, 0.66)
    places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0)]
    places += [(1, 1), (1, 3), (3, 1), (3, 3)]
    for i, j in [(i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1]:
        h, w = round(min(H, W) * scales[i]), round(min(H, W) * scales[j])
        expected |= {((H - h) * down // 4, (W - w) * right // 4, h, w) for down, right in places}
    (cut,) = regions(monkeypatch, augment.multi_scale_crop, [torch.zeros(1, 3, H, W)], 4000)
    assert {*cut} == expected
    sizes = Counter(box[2:] for box in cut)
    assert len(sizes) == 10 and 320 < min(sizes.values()) and max(sizes.values()) < 480  # of 400
    if (H, W) == (240, 320):  # no two of the five columns are one
        left = Counter(box[1] / (320 - box[3]) * 4 for box in cut if box[3] == 240)
        share = [left[float(k)] / sum(left.values()) * 13 for k in range(5)]
        assert share == pytest.approx([3, 2, 3, 2, 3], abs=0.6)


@pytest.mark.parametrize("view", [augment.multi_scale_crop, augment.stretched_crop])
def test_crops_cut_one_scene_alike(view, monkeypatch):
    clips = [torch.zeros(2, 3, 240, 320), torch.zeros(5, 2, 120, 160), torch.zeros(1, 3, 480, 640)]
    for a, b, c in zip(*regions(monkeypatch, view, clips, 200), strict=True):
        assert a == pytest.approx([2 * x for x in b], abs=2) and c == pytest.approx([2 * x for x in a], abs=2)


def test_stretched_crop_reaches_every_place(monkeypatch):
    """Of a picture of 20 x 30 as 10 x 15 pixels, squares of 8: its rows and columns in steps of two."""
    clips = [torch.zeros(1, 3, 20, 30)]
    (cut,) = regions(monkeypatch, lambda x: augment.stretched_crop(x, 8, (10, 15)), clips, 400)
    assert {*cut} == {(2 * row, 2 * column, 16, 16) for row in range(3) for column in range(8)}
    for at, left in ((0, 0), (0.5, 6), (1, 14)):
        (cut,) = regions(monkeypatch, lambda x, at=at: augment.stretched_crop(x, 8, (10, 15), at), clips, 1)
        assert cut == [(2, left, 16, 16)]


def test_stretched_crop_is_the_resized_picture_cut():
    clip = random_clip(64, 96)
    (out,) = augment.stretched_crop([clip], 32, (32, 32), 0.5)
    assert torch.equal(out, V.resize(clip, [32, 32], antialias=True))
    with pytest.raises(ValueError, match="33 pixels does not fit in 32 x 40"):
        augment.stretched_crop([clip], 33, (32, 40))


# ------------------------------------------------------------------------------ strong augmentation


@pytest.mark.parametrize("kind", ["patches", "dark", "flat", "two levels", "thin"])
@pytest.mark.parametrize("v", [0.9, 0.33, 0.0, -0.5])
def test_operations_are_those_of_torchvision(v, kind):
    """Pixel by pixel of one frame, and of the frames of a clip as one tall picture: its colour statistics."""
    x = random_clip(*((33, 47) if kind != "thin" else (2, 1)), T=6)
    x = {"dark": x // 5, "two levels": x // 128 * 90 + 7}.get(kind, x)
    if kind == "flat":
        x[:, 1] = 77
    (H, W), factor = x.shape[2:], 1 + 0.9 * v
    right, down = -int(150 / 331 * W * v), -int(150 / 331 * H * v)  # a crop moves the other way
    shear = torch.tensor(0.3 * v).double().atan().rad2deg().item()
    expected = {
        "identity": x,
        "shear_x": V.affine(x, 0.0, [0, 0], 1.0, [shear, 0.0], center=[0, 0]),
        "shear_y": V.affine(x, 0.0, [0, 0], 1.0, [0.0, shear], center=[0, 0]),
        "translate_x": V.affine(x, 0.0, [right, 0], 1.0, [0.0, 0.0]),
        "translate_y": V.affine(x, 0.0, [0, down], 1.0, [0.0, 0.0]),
        "rotate": V.rotate(x, 30 * v),
        "brightness": V.adjust_brightness(x, factor),
        "color": V.adjust_saturation(x, factor),
        "sharpness": V.adjust_sharpness(x, factor),
        "posterize": V.posterize(x, 8 - round(4 * abs(v))),
        "solarize": V.solarize(x, round(255 * (1 - abs(v)))),
    }
    statistics = {"contrast": lambda picture: V.adjust_contrast(picture, factor),
                  "autocontrast": V.autocontrast, "equalize": V.equalize}  # fmt: skip
    assert expected.keys() | statistics.keys() == augment.OPERATIONS.keys()
    for name, op in statistics.items():
        expected[name] = op(x.transpose(0, 1).reshape(3, -1, W)).view(3, -1, H, W).transpose(0, 1)
        assert torch.equal(augment.OPERATIONS[name](x[:1], v), op(x[:1])), name
    for name, want in expected.items():
        assert torch.equal(augment.OPERATIONS[name](x, v), want), name
        assert v or name in ("solarize", "autocontrast", "equalize") or torch.equal(want, x), name


def test_rand_augment_strengths(monkeypatch):
    """Uniform up to magnitude / 10 of both signs; every operation comes as often as another."""
    names, strengths = [], []
    spies = {n: lambda x, v, n=n: (names.append(n), strengths.append(v), x)[2] for n in augment.OPERATIONS}
    monkeypatch.setattr(augment, "OPERATIONS", spies)
    torch.manual_seed(0)
    for _ in range(700):
        augment.rand_augment(random_clip(8, 8, T=1), 2, 5)
    v = torch.tensor(strengths)
    assert len(v) == 1400 and all(60 < names.count(name) < 145 for name in spies)
    assert v.abs().max() <= 0.5 and v.abs().mean().sub(0.25).abs() < 0.02 and v.mean().abs() < 0.03


def test_cutout_is_one_grey_square():
    clip = torch.full((T, 3, 32, 32), 255, dtype=torch.uint8)
    areas, centre_hit = set(), 0
    for seed in range(200):
        torch.manual_seed(seed)
        hole = augment.cutout(clip, 16) == 127
        rows, columns = hole[0, 0].any(1), hole[0, 0].any(0)
        assert torch.equal(hole, (rows[:, None] & columns).expand_as(hole))
        assert 8 <= rows.sum() <= 16 and 8 <= columns.sum() <= 16
        areas.add(int(hole[0, 0].sum()))
        centre_hit += bool(hole[0, 0, 16, 16])
    assert max(areas) == 256 and len(areas) > 20  # cut off at the rim, whole inside
    assert 30 < centre_hit < 75  # 16 x 16 of 32 x 32 centres
    assert torch.equal(augment.cutout(clip, 0), clip)


def test_normalise():
    mean, std = (0.45, 0.4, 0.3), (0.225, 0.2, 0.1)
    x = torch.stack([random_clip(9, 11), random_clip(9, 11, seed=1)])
    want = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for layout in (x.contiguous(), x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        out = augment.normalise(layout, mean, std)
        assert out.dtype == torch.float32 and out.shape == (2, 3, T, 9, 11) and out.is_contiguous()
        assert (out.transpose(1, 2) - want).abs().max() < 2e-6
    assert torch.equal(layout, x), "the batch given was written to"
    grey = augment.normalise(x[:, :, :2], (0.5,), (0.226,))
    assert torch.allclose(grey, ((x[:, :, :2] / 255 - 0.5) / 0.226).transpose(1, 2), atol=1e-5)

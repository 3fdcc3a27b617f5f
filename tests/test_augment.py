"""Views of clips: the same for all frames, any memory layout, the right region, one seed one result."""

from collections import Counter

import pytest
import torch
from torchvision.transforms.v2 import functional as V

from common import augment

T = 4


def random_clip(H=60, W=80, T=T, seed=0):
    """(T, 3, H, W) in THWC memory, as video.read gives it: smooth patches with some noise."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (T, 3, 6, 8), generator=g, dtype=torch.uint8)
    clip = V.resize(coarse, [H, W]).int() + torch.randint(-9, 10, (T, 3, H, W), generator=g)
    return thwc(clip.clamp(0, 255).to(torch.uint8))


def thwc(clip):
    return clip.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def ramp(H=64, W=96):
    """One frame whose red is the column and whose green is the row."""
    clip = torch.zeros(1, 3, H, W, dtype=torch.uint8)
    clip[:, 0] = torch.arange(W, dtype=torch.uint8)
    clip[:, 1] = torch.arange(H, dtype=torch.uint8)[:, None]
    return clip


def operation(name, v):
    return pytest.param(lambda clip: augment.OPERATIONS[name](clip, v), 60, id=f"{name}{v:+}")


VIEWS = [
    pytest.param(lambda clip: augment.jitter_crop(clip, 32, (40, 56)), 32, id="jitter_crop"),
    pytest.param(lambda clip: augment.resize_crop(clip, 32, 40), 32, id="resize_crop"),
    pytest.param(lambda clip: augment.random_resized_crop(clip, 32), 32, id="random_resized_crop"),
    pytest.param(lambda clip: augment.multi_scale_crop([clip], 32)[0], 32, id="multi_scale_crop"),
    pytest.param(lambda clip: augment.stretched_crop([clip], 32, (40, 48))[0], 32, id="stretched_crop"),
    pytest.param(lambda clip: augment.random_flip(clip, 1.0), 60, id="random_flip"),
    pytest.param(lambda clip: augment.three_crops(clip, 32)[1], 32, id="three_crops"),
    pytest.param(lambda clip: augment.rand_augment(clip, 3, 10), 60, id="rand_augment"),
    pytest.param(lambda clip: augment.cutout(clip, 30), 60, id="cutout"),
    *(operation(name, v) for name in augment.OPERATIONS for v in (0.7, -0.3)),
]


@pytest.mark.parametrize("view, height", VIEWS)
def test_view_is_one_function_of_seed_for_all_frames_and_layouts(view, height):
    moving = random_clip()
    still = moving[:1].expand(T, -1, -1, -1)
    for seed in range(6):
        torch.manual_seed(seed)
        out = view(moving)
        assert out.dtype == torch.uint8 and out.shape[:3] == (T, 3, height)
        torch.manual_seed(seed)
        assert torch.equal(view(moving.contiguous()), out)
        torch.manual_seed(seed)
        frames = view(still)
        assert (frames == frames[:1]).all()
    assert torch.equal(moving, random_clip()), "the clip given was written to"


def test_views_draw_from_the_seed_only():
    clip = random_clip()

    def view(seed):
        torch.manual_seed(seed)
        return augment.cutout(augment.rand_augment(augment.jitter_crop(clip, 32, (40, 56))), 16)

    outs = [view(seed) for seed in range(8)]
    assert all(torch.equal(view(seed), out) for seed, out in enumerate(outs))
    assert len({out.numpy().tobytes() for out in outs}) == 8


# ------------------------------------------------------------------------------------------- space


@pytest.mark.parametrize("H, W", [(48, 64), (64, 48), (60, 60), (45, 81), (7, 5), (2, 2), (1, 9)])
def test_crops_of_any_picture_have_the_size_asked_for(H, W):
    clip = random_clip(H, W, T=2)
    assert augment.jitter_crop(clip, 40, (44, 52)).shape == (2, 3, 40, 40)
    assert augment.resize_crop(clip, 40, 48).shape == (2, 3, 40, 40)
    assert augment.random_resized_crop(clip, 40).shape == (2, 3, 40, 40)
    crops = augment.three_crops(clip, 40)
    assert [crop.shape for crop in crops] == [(2, 3, 40, 40)] * (1 if H == W else 3)


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


def test_jitter_crop_without_jitter_copies_pixels():
    torch.manual_seed(0)
    out = augment.jitter_crop(ramp(48, 60), 32, (48, 48))
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


def tsn_regions(H, W, scales=(1.0, 0.875, 0.75, 0.66)):
    """(top, left, height, width) of all crops of TSN: scales of the short side, at most one apart, at four
    corners, four sides, the centre, and the points between centre and corners."""
    found = set()
    for i, tall in enumerate(scales):
        for j, wide in enumerate(scales):
            h, w = round(min(H, W) * tall), round(min(H, W) * wide)
            places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0)]
            places += [(1, 1), (1, 3), (3, 1), (3, 3)]
            if abs(i - j) <= 1:
                found |= {((H - h) * down // 4, (W - w) * right // 4, h, w) for down, right in places}
    return found


def regions(monkeypatch, clips, draws):
    """Of each clip, the regions that `draws` calls cut from it."""
    cut = []
    monkeypatch.setattr(augment.V, "resized_crop", lambda x, *args, **_: cut.append(args) or x)
    torch.manual_seed(0)
    for _ in range(draws):
        augment.multi_scale_crop(clips, 32)
    return [cut[k :: len(clips)] for k in range(len(clips))]


@pytest.mark.parametrize("H, W", [(240, 320), (320, 240), (101, 180)])
def test_multi_scale_crop_has_the_regions_of_tsn(H, W, monkeypatch):
    (cut,) = regions(monkeypatch, [torch.zeros(1, 3, H, W)], 2500)
    assert all(args[4] == [32, 32] for args in cut)
    assert {args[:4] for args in cut} == tsn_regions(H, W)
    assert all(top + h <= H and left + w <= W for top, left, h, w, _ in cut)
    assert max(top + h for top, _, h, *_ in cut) == H and max(left + w for _, left, _, w, _ in cut) == W


def test_multi_scale_crop_takes_all_pairs_and_places_alike(monkeypatch):
    """In a picture of 100 x 200 no two of the 13 places are one, and 10 pairs of scales."""
    (cut,) = regions(monkeypatch, [torch.zeros(1, 3, 100, 200)], 4000)
    sizes = Counter(args[2:4] for args in cut)
    assert len(sizes) == 10 and 320 < min(sizes.values()) and max(sizes.values()) < 480  # of 400
    assert (100, 88) in sizes and (88, 100) in sizes and (100, 75) not in sizes
    left = Counter(args[1] / (200 - args[3]) * 4 for args in cut if args[3] == 100)
    share = [left[float(k)] / sum(left.values()) * 13 for k in range(5)]
    assert share == pytest.approx([3, 2, 3, 2, 3], abs=0.6)


def test_multi_scale_crop_cuts_one_scene_alike(monkeypatch):
    clips = [torch.zeros(2, 3, 240, 320), torch.zeros(5, 2, 120, 160), torch.zeros(1, 3, 480, 640)]
    for a, b, c in zip(*regions(monkeypatch, clips, 200), strict=True):
        assert a[:4] == pytest.approx([2 * x for x in b[:4]], abs=2)
        assert c[:4] == pytest.approx([2 * x for x in a[:4]], abs=2)


def test_multi_scale_crop_shows_the_region():
    clip = ramp(64, 96)
    for seed in range(12):
        torch.manual_seed(seed)
        (out,) = augment.multi_scale_crop([clip], 64, scales=(1.0,))  # whole short side: pixels are copied
        assert torch.equal(out, clip[..., int(out[0, 0, 0, 0]) :][..., :64])
        torch.manual_seed(seed)
        small, large = augment.multi_scale_crop([random_clip(60, 80), random_clip(60, 80)], 24)
        torch.manual_seed(seed)
        alone = augment.multi_scale_crop([random_clip(60, 80)], 24)[0]
        assert torch.equal(small, large) and torch.equal(small, alone)


@pytest.mark.parametrize("H, W", [(48, 64), (7, 5), (2, 2), (1, 9)])
def test_multi_scale_crop_of_any_picture_has_the_size_asked_for(H, W):
    for seed in range(20):
        torch.manual_seed(seed)
        (out,) = augment.multi_scale_crop([random_clip(H, W, T=2)], 40)
        assert out.shape == (2, 3, 40, 40) and out.dtype == torch.uint8


# ------------------------------------------------------------------------------ strong augmentation


def test_stretched_crop_reaches_every_place(monkeypatch):
    """Of a picture of 20 x 30 as 10 x 15 pixels, squares of 8: its rows and columns in steps of two."""
    boxes, at = set(), torch.stack(torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij"))
    clip = torch.cat([at, at[:1] * 0])[None].to(torch.uint8)  # red is the row, green the column
    monkeypatch.setattr(augment.V, "resized_crop", lambda x, top, left, h, w, size, antialias: (
        boxes.add((int(x[0, 0, top, left]), int(x[0, 1, top, left]), h, w, *size)), x)[1])  # fmt: skip
    torch.manual_seed(0)
    for _ in range(400):
        augment.stretched_crop([clip], 8, (10, 15))
    assert boxes == {(2 * row, 2 * column, 16, 16, 8, 8) for row in range(3) for column in range(8)}
    boxes.clear()
    for at in (0, 0.5, 1):
        augment.stretched_crop([clip], 8, (10, 15), at)
    assert boxes == {(2, column, 16, 16, 8, 8) for column in (0, 6, 14)}


def test_stretched_crop_is_the_resized_picture_cut():
    clip = random_clip(64, 96)
    (out,) = augment.stretched_crop([clip], 32, (32, 32), 0.5)
    assert torch.equal(out, augment.V.resize(clip, [32, 32], antialias=True))
    with pytest.raises(ValueError, match="33 pixels does not fit in 32 x 40"):
        augment.stretched_crop([clip], 33, (32, 40))


@pytest.mark.parametrize("H, W", [(45, 45), (45, 61), (33, 48), (7, 5)])
def test_stretched_crop_stays_in_the_picture(H, W):
    clip = torch.full((1, 3, H, W), 200, dtype=torch.uint8)
    for seed in range(100):
        torch.manual_seed(seed)
        assert augment.stretched_crop([clip], 40, (48, 48))[0].min() == 200


def test_stretched_crop_cuts_one_scene_alike():
    small, large = (torch.arange(side).float().div(side).mul(255).to(torch.uint8) for side in (48, 480))
    clips = [ramp.view(1, 1, 1, -1).expand(2, 3, len(ramp), -1) for ramp in (small, large)]
    torch.manual_seed(1)
    for _ in range(5):
        a, b = augment.stretched_crop(clips, 24, (32, 40))
        assert (a.int() - b.int()).abs().max() <= 8  # a pixel of the small one is five levels


@pytest.mark.parametrize("v", [0.9, 0.33, -0.5])
def test_operations_are_those_of_torchvision(v):
    """One frame at a time: on a whole clip the colour statistics are the clip's."""
    x = random_clip(33, 47, T=1)
    right, down = -int(150 / 331 * 47 * v), -int(150 / 331 * 33 * v)  # a crop moves the other way
    expected = {
        "identity": x,
        "translate_x": V.affine(x, 0.0, [right, 0], 1.0, [0.0, 0.0]),
        "translate_y": V.affine(x, 0.0, [0, down], 1.0, [0.0, 0.0]),
        "rotate": V.rotate(x, 30 * v),
        "brightness": V.adjust_brightness(x, 1 + 0.9 * v),
        "color": V.adjust_saturation(x, 1 + 0.9 * v),
        "contrast": V.adjust_contrast(x, 1 + 0.9 * v),
        "sharpness": V.adjust_sharpness(x, 1 + 0.9 * v),
        "posterize": V.posterize(x, 8 - round(4 * abs(v))),
        "solarize": V.solarize(x, round(255 * (1 - abs(v)))),
        "autocontrast": V.autocontrast(x),
        "equalize": V.equalize(x),
    }
    for name, want in expected.items():
        assert torch.equal(augment.OPERATIONS[name](x, v), want), name
    assert expected.keys() | {"shear_x", "shear_y"} == augment.OPERATIONS.keys()


def test_shear_moves_a_row_by_its_number():
    column = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    column[..., 20] = 255
    out = augment.OPERATIONS["shear_x"](column, 1.0)[0, 0]
    moved = out.int().argmax(1) - out[0].int().argmax()
    assert (moved.abs() - 0.3 * torch.arange(40)).abs().max() <= 1
    turned = augment.OPERATIONS["shear_y"](column.transpose(2, 3), 1.0)[0, 0]
    assert (turned.int().argmax(0) - turned[:, 0].int().argmax() - moved).abs().max() <= 1


COLOURS = ("brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize")


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_is_mapped_alike_in_all_frames(name):
    """Also when the frames have different statistics: no flicker comes from the operation."""
    clip = random_clip(seed=3)
    clip[1] //= 2
    out = augment.OPERATIONS[name](clip, 0.6)
    for c in range(3):
        images = {}
        for old, new in zip(clip[:, c].flatten().tolist(), out[:, c].flatten().tolist(), strict=True):
            assert images.setdefault(old, new) == new


def test_rand_augment_strengths(monkeypatch):
    """Uniform up to magnitude / 10 of both signs; every operation comes as often as another."""
    seen = []
    spies = {n: lambda x, v, n=n: (seen.append((n, v)), x)[1] for n in augment.OPERATIONS}
    monkeypatch.setattr(augment, "OPERATIONS", spies)
    torch.manual_seed(0)
    for _ in range(700):
        augment.rand_augment(random_clip(8, 8, T=1), 2, 5)
    names, v = [n for n, _ in seen], torch.tensor([v for _, v in seen])
    assert len(seen) == 1400
    assert all(60 < names.count(name) < 145 for name in spies)
    assert v.abs().max() <= 0.5 and v.abs().mean().sub(0.25).abs() < 0.02 and v.mean().abs() < 0.03


def test_rand_augment_of_magnitude_0_keeps_place_and_light(monkeypatch):
    clip = random_clip()
    for name, op in augment.OPERATIONS.items():
        if name not in ("autocontrast", "equalize", "solarize"):
            assert torch.equal(op(clip, 0.0), clip), name
    assert torch.equal(augment.rand_augment(clip, 0), clip)


def test_translate_scales_with_the_picture():
    for W in (32, 224):
        out = augment.OPERATIONS["translate_x"](torch.full((1, 3, 8, W), 255, dtype=torch.uint8), 1.0)
        assert (out == 0).sum() / out.numel() == pytest.approx(150 / 331, abs=1 / W)


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


# ----------------------------------------------------------------------------------- on the device


def test_normalise():
    mean, std = (0.45, 0.4, 0.3), (0.225, 0.2, 0.1)
    x = torch.stack([random_clip(9, 11), random_clip(9, 11, seed=1)])
    want = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for layout in (x.contiguous(), x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        out = augment.normalise(layout, mean, std)
        assert out.dtype == torch.float32 and out.shape == (2, 3, T, 9, 11) and out.is_contiguous()
        assert (out.transpose(1, 2) - want).abs().max() < 2e-6
    assert torch.equal(layout, x), "the batch given was written to"
    one = augment.normalise(x[:, :, :2], (0.5,), (0.226,))
    assert torch.allclose(one, ((x[:, :, :2] / 255 - 0.5) / 0.226).transpose(1, 2), atol=1e-5)

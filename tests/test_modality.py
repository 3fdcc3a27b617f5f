"""Frames, differences and flow of a video: which pictures, in which channels, mirrored how."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import modality
from common.clips import Views
from common.data import Data, Videos
from common.errors import UserError, VideoError
from common.io.decode import read_frames, read_windows
from common.io.flow import BOUND, SHORT_SIDE, to_bytes, to_pixels, write_flow
from common.modality import MODALITIES, Recipe, Streams, flip, stacked, temporal_gradient
from common.tvl1 import tvl1

N, H, W = 12, 20, 24  # of the longest video
LENGTHS = {f"v{n}": n for n in (1, 2, 3, 4, 5, 6, 7, N)}


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """(Videos, {name: frames (N, 3, H, W)}, {name: fields (N - 1, 2, H, W)}): PNG folders, flow videos."""
    root = tmp_path_factory.mktemp("modality")
    frames = {name: pixels(n, 3, H, W, seed=n) for name, n in LENGTHS.items()}
    fields = {name: pixels(n - 1, 2, H, W, seed=50 + n) for name, n in LENGTHS.items() if n > 1}
    (root / "flow").mkdir()
    for name, x in frames.items():
        (root / name).mkdir()
        for i, picture in enumerate(x):
            file = root / name / f"{i:03d}.png"
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, compress_level=1)
        if name in fields:
            write_flow(root / "flow" / f"{name}.mp4", fields[name])
    return Videos.make(root, LENGTHS, [0] * len(LENGTHS), flow=str(root / "flow")), frames, fields


def index_of(videos, name):
    return [videos.name(i) for i in range(len(videos))].index(name)


def opened(library, name, *kinds, **changes):
    videos = replace(library[0], **changes)
    return Streams(videos, index_of(videos, name), kinds)


# ---- which pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n", LENGTHS.items())
def test_lengths_of_n_frames(library, name, n):
    """n frames, n - 5 differences of six, n - 1 fields and so n - 5 of five; at least one."""
    kinds = ("rgb", "diff", "flow") if n > 1 else ("rgb", "diff")
    with opened(library, name, *kinds) as source:
        assert source.lengths == {kind: n if kind == "rgb" else max(1, n - 5) for kind in kinds}
        assert list(source.lengths) == list(kinds) and len(source) == max(1, n - 5)
    with opened(library, name, "rgb") as source:
        assert len(source) == n


@pytest.mark.parametrize("name, n", LENGTHS.items())
@pytest.mark.parametrize("window", [[0], [6, 0, 3], [2, 2]], ids=str)
def test_pictures_of_a_window(library, name, n, window):
    """Input frame i: frame i; frames i to i + 5; fields i to i + 4. At the end the last one is repeated."""
    window = [i % max(1, n - 5) for i in window]
    kinds = ("diff", "rgb", "flow") if n > 1 else ("diff", "rgb")
    with opened(library, name, *kinds) as source:
        found = dict(zip(kinds, source.clips([np.array(window)] * len(kinds)), strict=True))
    frames, fields = library[1][name], library[2].get(name)
    assert all(x.dtype == torch.uint8 for x in found.values())
    assert torch.equal(found["rgb"], torch.stack([frames[i] for i in window]))
    six = [frames[min(i + k, n - 1)] for i in window for k in range(6)]
    assert torch.equal(found["diff"], torch.stack(six))
    if n > 1:
        five = [fields[min(i + k, n - 2)] for i in window for k in range(5)]
        assert torch.equal(found["flow"], torch.stack(five))


def test_windows_of_several_modalities_are_in_turn_and_read_once(library, monkeypatch):
    asked, together = [], read_windows
    monkeypatch.setattr(
        "common.modality.read_windows", lambda *args: asked.append(args[0]) or together(*args)
    )
    _, frames, fields = (part if k == 0 else part[f"v{N}"] for k, part in enumerate(library))
    with opened(library, f"v{N}", "flow", "rgb") as source:
        a, b, c, d = source.clips([np.array([1]), np.array([8, 11]), np.array([6]), np.array([0])])
    assert torch.equal(a, fields[1:6]) and torch.equal(c, fields[6:11])
    assert torch.equal(b, frames[[8, 11]]) and torch.equal(d, frames[:1])
    assert len(asked) == 2  # the frames, and the flow
    with opened(library, f"v{N}", "diff") as source:  # one modality: all windows are of it
        a, b = source.clips([np.array([0]), np.array([6])])
    assert torch.equal(a, frames[:6]) and torch.equal(b, frames[6:]) and len(asked) == 3


def test_frames_are_those_of_read(library, make, tmp_path):
    """Of a compressed file, too, in any size."""
    make.write(tmp_path / "a.mp4", frames=20)
    videos = Videos.make(tmp_path, ["a.mp4"], [0])
    for side in (None, 30):
        with Streams(videos, 0, ("rgb", "diff")) as source:
            rgb, diff = source.clips([np.array([3, 17]), np.array([14])], side)
        assert torch.equal(rgb, read_frames(videos.path(0), [3, 17], side))
        assert torch.equal(diff, read_frames(videos.path(0), range(14, 20), side))


def test_flow_of_a_span_begins_with_its_first_frame(library):
    _, frames, fields = (part if k == 0 else part[f"v{N}"] for k, part in enumerate(library))
    spans = [[3 / 25 - 0.001, 11 / 25 - 0.001]] * len(LENGTHS)  # frames and fields 3 to 10
    with opened(library, f"v{N}", "rgb", "flow", spans=np.array(spans)) as source:
        assert source.lengths == dict(rgb=8, flow=4)
        rgb, x = source.clips([np.array([0]), np.array([3])])
    assert torch.equal(rgb, frames[3:4]) and torch.equal(x, fields[6:11])


@pytest.mark.parametrize("bound", [20.0, 8.0])
def test_flow_that_is_not_there_is_computed(library, bound):
    videos = replace(library[0], flow=None)
    with Streams(videos, index_of(videos, f"v{N}"), ("flow",), bound) as source:
        assert source.lengths == dict(flow=N - 5)
        (x,) = source.clips([np.array([4, 1])])
    frames = library[1][f"v{N}"]
    pairs = torch.stack([frames[[i + k, i + k + 1]] for i in (4, 1) for k in range(5)])
    expected = to_bytes(tvl1(pairs)[:, 0], bound)
    assert (x.int() - expected.int()).abs().max() <= 1  # rounding
    with Streams(videos, index_of(videos, f"v{N}"), ("flow",), bound, flow_side=16) as source:
        assert source.clips([np.array([0])])[0].shape == (5, 2, 16, 19)


def test_missing_flow_is_a_video_error(library, tmp_path):
    with pytest.raises(VideoError, match=f"no extracted flow of it in {tmp_path}"):
        with opened(library, f"v{N}", "rgb", "flow", flow=str(tmp_path)):
            pass
    with pytest.raises(VideoError, match="single frame"):
        with opened(library, "v1", "flow", flow=None):
            pass
    with opened(library, f"v{N}", "rgb", "diff", flow=str(tmp_path)) as source:  # nobody asked for it
        assert len(source) == N - 5


def test_flow_of_another_video_is_refused(library, tmp_path):
    """Two fields more or less are let pass: some extractors leave out some at the end."""
    for n, good in ((N - 4, False), (N - 3, True), (N + 1, True), (N + 2, False)):
        write_flow(tmp_path / f"v{N}.mp4", pixels(n, 2, 16, 16))
        if good:
            with opened(library, f"v{N}", "rgb", "flow", flow=str(tmp_path)) as source:
                assert source.lengths == dict(rgb=N, flow=n - 4)
        else:
            with pytest.raises(VideoError, match=f"flow has {n} fields, for {N} frames"):
                opened(library, f"v{N}", "rgb", "flow", flow=str(tmp_path)).__enter__()


def test_nothing_stays_open(library, make, tmp_path):
    make.write(tmp_path / "a.mp4", frames=8)
    (tmp_path / "flow").mkdir()
    videos = Videos.make(tmp_path, ["a.mp4"], [0], flow=str(tmp_path / "flow"))

    def files():
        return {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{n}")}  # fmt: skip

    with pytest.raises(VideoError):
        Streams(videos, 0, ("rgb", "flow")).__enter__()
    assert videos.path(0) not in files()
    write_flow(tmp_path / "flow" / "a.mp4", pixels(7, 2, 16, 16))
    with Streams(videos, 0, ("rgb", "flow")):
        assert {videos.path(0), str(tmp_path / "flow" / "a.mp4")} <= files()
    assert not {videos.path(0), str(tmp_path / "flow" / "a.mp4")} & files()


def test_subsets_keep_the_flow(library):
    videos = replace(library[0], flow=None)
    data = Data("set", 1, ("a",), videos, videos, False, True, ()).with_flow("there")
    assert data.train.flow == data.test.flow == data.train.subset([2, 1]).flow == "there"
    assert videos.flow is None and data.train.subset([2, 1]).name(0) == videos.name(2)


# ---- channels --------------------------------------------------------------------------------------


def test_channels_of_each_modality():
    channels = {kind: m.channels for kind, m in MODALITIES.items()}
    assert channels == dict(rgb=3, tg=3, diff=15, flow=10, field=2)


def test_stacked_differences_match_a_loop():
    """Channel 3 k + c is colour c of frame k + 1 less that of frame k."""
    x = pixels(2, 3 * 6, 3, 4, 5)
    out = stacked(x, "diff")
    assert out.shape == (2, 3, 15, 4, 5) and out.dtype == torch.int16
    for b in range(2):
        for t in range(3):
            for k in range(5):
                for c in range(3):
                    later, before = x[b, 6 * t + k + 1, c].int(), x[b, 6 * t + k, c].int()
                    assert torch.equal(out[b, t, 3 * k + c].int(), later - before)
    ends = torch.tensor([0, 255, 0, 255, 255, 0], dtype=torch.uint8).view(1, 6, 1, 1, 1)
    out = stacked(ends.expand(-1, -1, 3, 1, 1), "diff")
    assert out[0, 0, ::3, 0, 0].tolist() == [255, -255, 255, 0, -255]


def test_stacked_flow_matches_a_loop():
    """Channel 2 k is u of field k, channel 2 k + 1 its v."""
    x = pixels(2, 3 * 5, 2, 4, 6)
    out = stacked(x, "flow")
    assert out.shape == (2, 3, 10, 4, 6) and out.dtype == torch.uint8
    for t in range(3):
        for k in range(5):
            assert torch.equal(out[:, t, 2 * k], x[:, 5 * t + k, 0])
            assert torch.equal(out[:, t, 2 * k + 1], x[:, 5 * t + k, 1])


def test_tg_of_all_pairs_of_levels():
    """(x_t - x_t+n + 255) / 2, rounded down: 127 where nothing moves."""
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    tg = temporal_gradient(*(v.to(torch.uint8).view(1, 1, 256, 256) for v in (a, b)))
    assert tg.dtype == torch.uint8 and (tg[0, 0].diagonal() == 127).all()
    assert tg[0, 0].tolist() == [[(i - j + 255) // 2 for j in range(256)] for i in range(256)]


def test_stacked_tg_matches_a_loop():
    x = pixels(2, 3 * 2, 3, 4, 5)
    out = stacked(x, "tg")
    assert out.shape == (2, 3, 3, 4, 5) and out.dtype == torch.uint8
    for t in range(3):
        assert torch.equal(out[:, t], temporal_gradient(x[:, 2 * t], x[:, 2 * t + 1]))


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("name, n", LENGTHS.items())
def test_tg_is_of_frames_an_interval_apart(library, name, n, interval):
    frames, window = library[1][name], [i % max(1, n - interval) for i in (0, 3, 2)]
    with Streams(library[0], index_of(library[0], name), ("tg",), interval=interval) as source:
        assert len(source) == max(1, n - interval)
        (clip,) = source.clips([np.array(window)])
    assert torch.equal(clip[::2], frames[window])
    assert torch.equal(clip[1::2], frames[[min(i + interval, n - 1) for i in window]])


@pytest.mark.parametrize("crops", [1, 3])
def test_a_recipe_of_tg_is_the_tg_of_the_crops(library, crops):
    rgb = Recipe(2, 1, 2, crops, 12, 12, mean=(0.5,), std=(0.5,))
    recipe, i = replace(rgb, modality="tg", interval=2), index_of(library[0], f"v{N}")
    views = Views(library[0], recipe.sample, recipe.view, open=recipe.open)[i]["views"]
    x = recipe.to_input(views, "cpu")
    starts = [0, N - 2 - 2]  # of two clips, first and last
    a, b = (rgb.view([library[1][f"v{N}"][[s + n, s + n + 1]] for s in starts]) for n in (0, 2))
    assert x.shape == (2 * crops, 3, 2, 12, 12)
    assert torch.equal(x, rgb.to_input(temporal_gradient(a, b), "cpu"))


def test_stacked_rgb_is_as_it_was():
    x = pixels(2, 4, 3, 5, 6)
    assert torch.equal(stacked(x, "rgb"), x)


def test_a_field_is_one_of_flow(library):
    _, frames, fields = (part if k == 0 else part[f"v{N}"] for k, part in enumerate(library))
    with opened(library, f"v{N}", "rgb", "field") as source:
        assert source.lengths == dict(rgb=N, field=N - 1) and len(source) == N - 1
        rgb, x = source.clips([np.array([0, 3]), np.array([7, 2, 7])])
    assert torch.equal(rgb, frames[[0, 3]]) and torch.equal(x, fields[[7, 2, 7]])
    assert torch.equal(stacked(x[None], "field"), x[None])
    assert torch.equal(flip(x, "field"), flip(x, "flow"))


# ---- mirrored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "tg", "diff"])
def test_flip_mirrors_pictures(kind):
    clip = pixels(6, 3, 4, 5)
    assert torch.equal(flip(clip, kind), clip.flip(-1))


def test_flip_of_flow_negates_u():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 2, 1, 256).contiguous()
    out, before = flip(levels, "flow"), levels.clone()
    assert out[0, 1, 0].tolist() == list(range(255, -1, -1))  # v only moves
    assert out[0, 0, 0].tolist() == [min(256 - x, 255) for x in range(255, -1, -1)]
    assert torch.equal(levels, before)  # what was given stays
    again = flip(out, "flow")
    assert torch.equal(again[..., 1:], levels[..., 1:])  # bytes 1 to 255, all that there are
    x = torch.tensor([-20.0, -3.2, 0.0, 7.0, 20.0])
    fields = torch.stack([to_bytes(x), to_bytes(x)]).view(1, 2, 1, 5)
    mirrored = to_pixels(flip(fields, "flow"))
    assert torch.allclose(mirrored[0, 0, 0], -to_pixels(fields)[0, 0, 0].flip(-1), atol=1e-6)
    assert torch.equal(mirrored[0, 1, 0], to_pixels(fields)[0, 1, 0].flip(-1))


def test_flip_of_flow_is_the_flow_of_the_mirrored_video():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")

    def scene(dx, dy):
        a, b = x - dx, y - dy
        return 0.5 + 0.2 * torch.sin(0.4 * a + 0.1 * b) + 0.2 * torch.cos(0.35 * b - 0.15 * a)

    frames = torch.stack([scene(1.5 * t, -0.8 * t) for t in range(2)])[None]
    fields, mirrored = (to_bytes(tvl1(f)[0], 4.0) for f in (frames, frames.flip(-1)))
    inside = (..., slice(8, -8), slice(8, -8))
    gap = (flip(fields, "flow").int() - mirrored.int()).abs()[inside].float()
    assert gap.mean() < 1 and gap.quantile(0.99) < 5  # of 127 / 4 steps to a pixel
    u, v = to_pixels(flip(fields, "flow"), 4.0)[inside][0].mean((1, 2))
    assert u == pytest.approx(-1.5, abs=0.1) and v == pytest.approx(-0.8, abs=0.1)


def test_flow_of_a_data_set(tmp_path, monkeypatch):
    said, made = [], []
    run = SimpleNamespace(say=said.append, device="cpu", rank=0, world=1)
    monkeypatch.setattr(
        "common.io.flow.extract_flow", lambda videos, out, **_: made.append((len(videos), out))
    )
    monkeypatch.setattr(modality.dist, "barrier", lambda: None)
    videos = Videos.make(tmp_path, ["a.mp4"], [0])
    data = Data("set", 1, ("a",), videos, videos, False, True, ())

    def found(name="ssv2", root=f"{tmp_path}/set/", folder=None, kinds=("rgb", "flow"), **models):
        with_flow, scale = modality.with_flow(data, name, root, folder, run, kinds, models)
        assert with_flow.train.flow == with_flow.test.flow
        return with_flow.train.flow, *scale

    usual = BOUND, SHORT_SIDE
    fine = {"a": Recipe(2, 1, modality="flow", bound=8.0, flow_side=100), "b": Recipe(2, 1)}
    assert (
        found() == (None, *usual)
        and f"python -m common.tools.flow ssv2 --out {tmp_path}/set_flow" in said.pop()
    )
    assert found(**fine) == (None, 8.0, 100) and said.pop()  # computed as the model wants it
    (tmp_path / "set_flow").mkdir()
    (tmp_path / "set_flow" / "flow.json").write_text('{"bound": 8.0, "short_side": 100}')
    assert found() == found(**fine) == found(kinds=("field",)) == (f"{tmp_path}/set_flow", 8.0, 100)
    assert found(kinds=("rgb", "diff")) == (None, *usual)
    assert found("ssv2", None, f"{tmp_path}/set_flow") == (f"{tmp_path}/set_flow", 8.0, 100)
    for kind in ("flow", "field"):
        with pytest.raises(UserError, match="c wants flow"):
            found(**fine, c=Recipe(2, 1, modality=kind, bound=8.0))
    with pytest.raises(UserError, match="flow nowhere is not there: python -m common.tools.flow ssv2"):
        found(folder="nowhere")
    assert not made and not said
    assert found("toy:multi", None)[0] == "data/toy_multi_flow"
    assert made == [(2, "data/toy_multi_flow")]  # training and test videos

"""TV-L1 against known motion, plain loops and OpenCV; flow videos and folders; the extraction."""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
import unicodedata
from pathlib import Path

import av
import forks
import numpy as np
import pytest
import torch
from PIL import Image

from common.data import Videos
from common.errors import UserError, VideoError
from common.io.decode import Video
from common.io.flow import (
    Computed,
    Flow,
    _progress,
    extract_flow,
    find_flow,
    scale_of,
    to_bytes,
    to_pixels,
    write_flow,
)
from common.tools import flow
from common.tvl1 import SCHEME, TOGETHER, _dual, _fused, _gray, _primal, _pyramid, tvl1

REPOSITORY = Path(__file__).resolve().parent.parent
FIXTURE = Path(__file__).parent / "data" / "tvl1_opencv.npz"
H, W = 48, 64


# ---- pictures whose motion is known ----------------------------------------------------------------


def scene(*motions, height=H, width=W, seed=0, waves=60):
    """float32 (T, H, W), 0 to 1: a texture at rest, then moved by affine maps (2, 3) about its centre."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.uniform(np.log(0.1), np.log(1.2), waves))
    turn, phase = rng.uniform(0, 2 * np.pi, (2, waves))
    kx, ky, size = rate * np.cos(turn), rate * np.sin(turn), 0.3 / rate
    frames = []
    for motion in (np.eye(2, 3), *motions):
        inverse = np.linalg.inv(motion[:, :2])
        x, y = np.moveaxis((grid(height, width) - motion[:, 2]) @ inverse.T, -1, 0)[..., None]
        frames.append((size * np.sin(kx * x + ky * y + phase)).sum(-1))
    frames = np.stack(frames)
    return torch.from_numpy(0.5 + 40 / 255 * frames / frames.std()).clamp(0, 1).float()


def grid(height, width):
    """(H, W, 2): x and y of the pixels, from the centre."""
    y, x = np.mgrid[:height, :width].astype(float)
    return np.stack([x - (width - 1) / 2, y - (height - 1) / 2], -1)


def shift(u, v):
    return np.array([[1, 0, u], [0, 1, v]])


def turn(degrees, zoom=1.0):
    cos, sin = zoom * np.cos(np.radians(degrees)), zoom * np.sin(np.radians(degrees))
    return np.array([[cos, -sin, 0], [sin, cos, 0]])


def motion_field(motion, height=H, width=W):
    """(2, H, W): where the affine map takes each pixel, from where it is."""
    x = grid(height, width)
    return np.moveaxis(x @ motion[:, :2].T + motion[:, 2] - x, -1, 0)


def epe(a, b, margin=0):
    """(H, W) distances of two flows (2, H, W) in pixels, without a margin."""
    inside = slice(margin, -margin or None)
    return np.linalg.norm(np.asarray(a) - np.asarray(b), axis=0)[inside, inside]


MOTIONS = {
    "right": shift(2, 0), "left": shift(-2, 0), "down": shift(0, 2), "up": shift(0, -2),
    "half a pixel": shift(0.5, -0.25), "a tenth": shift(-0.1, 0.1), "five pixels": shift(4, -3),
    "clockwise": turn(4), "counter-clockwise": turn(-4), "nearer": turn(0, 1.05), "farther": turn(0, 0.95),
}  # fmt: skip


def test_known_motion():
    flows = tvl1(torch.stack([scene(motion) for motion in MOTIONS.values()]))[:, 0]
    for found, (name, motion) in zip(flows, MOTIONS.items(), strict=True):
        error, length = epe(found, motion_field(motion), 6), np.hypot(*motion_field(motion)).mean()
        assert error.mean() < 0.05 + 0.03 * length and np.median(error) < 0.1, (name, error.mean())
    u, v = flows[:4].mean((2, 3)).T  # right, left, down, up
    assert u[0] > 1.8 and u[1] < -1.8 and v[2] > 1.8 and v[3] < -1.8
    assert abs(u[2:]).max() < 0.1 and abs(v[:2]).max() < 0.1


def test_no_motion_is_zero():
    assert tvl1(scene(shift(0, 0))[None]).abs().max() == 0
    assert tvl1(torch.full((1, 2, 20, 30), 0.7)).abs().max() == 0  # nowhere a gradient


def test_neighbouring_frames_are_compared():
    frames = scene(shift(1, 0), shift(1, 1), shift(-1, 1))
    found = tvl1(frames[None])[0].mean((2, 3))
    assert (found - torch.tensor([[1, 0], [0, 1], [-2.0, 0]])).abs().max() < 0.1


def test_a_batch_is_its_parts():
    frames = torch.stack([scene(shift(1, 0), turn(2), seed=seed) for seed in range(3)])
    whole = tvl1(frames)
    assert whole.shape == (3, 2, 2, H, W) and whole.dtype == torch.float32 and whole.is_contiguous()
    for n in range(3):
        for t in range(2):
            part = tvl1(frames[n : n + 1, t : t + 2])[0, 0]
            assert (part - whole[n, t]).abs().max() < 1e-5


def test_chunks_change_nothing(monkeypatch):
    frames = scene(*(shift(i, 0) for i in range(1, 6)))[None]
    whole = tvl1(frames)
    monkeypatch.setitem(TOGETHER, "cpu", 2 * H * W)  # two pairs at a time, at the finest level
    assert (tvl1(frames) - whole).abs().max() < 1e-5


def test_the_kind_of_frames_does_not_matter():
    frames = (255 * scene(turn(3))[None]).byte()
    wanted = tvl1(frames)
    rgb = frames[:, :, None].expand(1, 2, 3, H, W)
    thwc = rgb.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for others in (frames.float() / 255, frames.double() / 255, rgb, thwc, rgb.float() / 255):
        apart = (tvl1(others) - wanted).abs()
        assert apart.max() < 0.02 and apart.mean() < 1e-4  # rounding


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((1, 1, 32, 32), "two frames, not 1"), ((1, 2, 15, 64), "64 x 15 pixels are too small"),
     ((1, 2, 3, 64, 15), "15 x 64 pixels"), ((2, 32, 32), "not .2, 32, 32"),
     ((1, 2, 4, 32, 32), "not .1, 2, 4, 32, 32")],
)  # fmt: skip
def test_what_has_no_flow(shape, reason):
    with pytest.raises(ValueError, match=reason):
        tvl1(torch.zeros(shape))


@pytest.mark.parametrize(
    ("frames", "reason"),
    [(torch.linspace(0, 255, 512).view(1, 2, 16, 16), "from 0 to 1, not from 0 to 255"),
     (torch.full((1, 2, 16, 16), -0.5), "not from -0.5 to -0.5"),
     (torch.full((1, 2, 16, 16), torch.nan), "not from nan"),
     (torch.ones(1, 2, 16, 16, dtype=torch.int64), "uint8, or floats from 0 to 1, not torch.int64")],
)  # fmt: skip
def test_values_that_are_no_pictures(frames, reason):
    with pytest.raises(ValueError, match=reason):
        tvl1(frames)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU")
def test_on_a_gpu():
    assert _fused() != (_primal, _dual)  # it compiles
    frames = torch.stack([scene(motion) for motion in MOTIONS.values()])
    for some in (frames, frames[:1], frames[..., 1:]):
        assert (tvl1(some.cuda()).cpu() - tvl1(some)).abs().mean() < 1e-3


def test_the_smallest_pictures():
    motion = shift(0.5, 0)
    found = tvl1(scene(motion, height=16, width=16)[None], nscales=50)[0, 0]
    assert epe(found, motion_field(motion, 16, 16), 4).mean() < 0.1


# ---- the scheme, in plain loops --------------------------------------------------------------------


def test_pyramid_in_loops():
    x = torch.rand(1, 24, 33)
    levels = _pyramid(x, 9, 0.8)
    assert [tuple(level.shape[1:]) for level in levels] == [(24, 33), (19, 26)]  # the next: 15 x 21
    assert [x.shape[1] for x in _pyramid(torch.rand(1, 256, 340), 5, 0.8)] == [256, 205, 164, 131, 105]
    big, small = x[0].tolist(), levels[1][0]
    for i in range(19):
        for j in range(26):
            y, x = (min(max((n + 0.5) * 1.25 - 0.5, 0), side - 1) for n, side in ((i, 24), (j, 33)))
            (y0, dy), (x0, dx) = (divmod(a, 1) for a in (y, x))
            y0, x0 = int(y0), int(x0)
            y1, x1 = min(y0 + 1, 23), min(x0 + 1, 32)
            top = big[y0][x0] * (1 - dx) + big[y0][x1] * dx
            bottom = big[y1][x0] * (1 - dx) + big[y1][x1] * dx
            assert abs(small[i, j] - (top * (1 - dy) + bottom * dy)) < 1e-5


def one_iteration(u, p, rho_c, g, tau, lam, theta):
    """Zach et al. pixel by pixel: u (2, H, W), and its dual variables p (2, 2, H, W), p[i] those of u[i]."""
    _, height, width = u.shape
    v, new_u, new_p = np.zeros_like(u), np.zeros_like(u), np.zeros_like(p)
    pixels = [(y, x) for y in range(height) for x in range(width)]
    for y, x in pixels:
        square = g[0, y, x] ** 2 + g[1, y, x] ** 2
        rho = rho_c[y, x] + g[0, y, x] * u[0, y, x] + g[1, y, x] * u[1, y, x]
        for d in range(2):
            if rho < -lam * theta * square:
                step = lam * theta * g[d, y, x]
            elif rho > lam * theta * square:
                step = -lam * theta * g[d, y, x]
            else:
                step = -rho * g[d, y, x] / square if square > 0 else 0
            v[d, y, x] = u[d, y, x] + step
    for d in range(2):
        for y, x in pixels:
            back_x = p[d, 0, y, x - 1] if x else 0
            back_y = p[d, 1, y - 1, x] if y else 0
            divergence = p[d, 0, y, x] - back_x + p[d, 1, y, x] - back_y
            new_u[d, y, x] = v[d, y, x] + theta * divergence
        for y, x in pixels:
            dx = new_u[d, y, x + 1] - new_u[d, y, x] if x < width - 1 else 0
            dy = new_u[d, y + 1, x] - new_u[d, y, x] if y < height - 1 else 0
            norm = 1 + tau / theta * np.hypot(dx, dy)
            new_p[d, 0, y, x] = (p[d, 0, y, x] + tau / theta * dx) / norm
            new_p[d, 1, y, x] = (p[d, 1, y, x] + tau / theta * dy) / norm
    return new_u, new_p


@pytest.mark.parametrize("room", [True, False])
def test_an_iteration_in_loops(room):
    rng, (tau, lam, theta) = np.random.default_rng(0), (0.2, 0.4, 0.35)
    u, g, rho_c = rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 5, 6)), 0.3 * rng.normal(size=(5, 6))
    g[:, 2, 3] = 0
    p = rng.normal(size=(2, 2, 5, 6))
    p[:, 0, :, -1] = p[:, 1, -1] = 0
    square = (g**2).sum(0)
    factor = np.where(square > 0, -1 / np.where(square > 0, square, 1), 0)
    rho = rho_c + (g * u).sum(0)
    assert min((rho < -lam * theta * square).sum(), (rho > lam * theta * square).sum()) > 3  # all three cases
    assert (abs(rho) < lam * theta * square).sum() > 3
    x, px, py, a, b, g_ = (
        torch.from_numpy(array)[None].clone()
        for array in (u, theta * p[:, 0], theta * p[:, 1], rho_c * factor, g * factor, g)
    )
    into = (torch.empty_like(a), x) if room else ()
    buffers = [torch.zeros_like(x) for _ in range(3)] if room else ()
    for _ in range(3):
        u, p = one_iteration(u, p, rho_c, g, tau, lam, theta)
        x = _primal(x, px, py, a, b, g_, lam * theta, *into)
        _dual(x, px, py, tau, theta, *buffers)
        assert np.abs(x[0].numpy() - u).max() < 1e-9
        assert np.abs(torch.stack([px, py], 2)[0].numpy() / theta - p).max() < 1e-9


# ---- OpenCV ----------------------------------------------------------------------------------------


def opencv_pairs():
    """uint8 (P, 2, H, W) pictures of translation, rotation, zoom, and all of them with noise."""
    motions = (shift(1.5, -0.7), turn(3), turn(0, 1.04), turn(-2, 0.97) + shift(1, 1) - shift(0, 0))
    frames = [255 * scene(motion, height=40, width=56, seed=i) for i, motion in enumerate(motions)]
    frames = np.stack(frames)
    frames[3] += np.random.default_rng(0).normal(0, 2, frames[3].shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def make_fixture():
    """Write FIXTURE; needs opencv-contrib-python: python -c "import test_flow; test_flow.make_fixture()"."""
    import cv2

    algorithm = cv2.optflow.createOptFlow_DualTVL1()
    algorithm.setOuterIterations(1)
    algorithm.setMedianFiltering(1)
    algorithm.setEpsilon(0)
    frames = opencv_pairs()
    flows = [algorithm.calc(*pair, None).transpose(2, 0, 1) for pair in frames]
    rgb = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    FIXTURE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURE, frames=frames, flows=np.stack(flows), rgb=rgb, gray=gray)


def test_agrees_with_opencv():
    with np.load(FIXTURE) as file:
        frames, flows, rgb, gray = (file[name] for name in ("frames", "flows", "rgb", "gray"))
    assert np.abs(frames.astype(int) - opencv_pairs()).max() <= 1  # the pictures are those made here
    found = tvl1(torch.from_numpy(frames))[:, 0]
    error = np.stack([epe(a, b) for a, b in zip(found, flows, strict=True)])
    assert error.mean() < 0.005 and np.median(error) < 0.001 and np.abs(flows).max() > 1.5
    ours = _gray(torch.from_numpy(rgb).permute(2, 0, 1)[None])[0].numpy()
    assert np.abs(ours - gray).max() <= 0.51  # it rounds


# ---- bytes and flow videos -------------------------------------------------------------------------


def test_bytes():
    x = torch.tensor([0, -0.01, 20, -20, 35, -1000, 20 / 127, -20 / 127, 10, 5])
    assert to_bytes(x).tolist() == [128, 128, 255, 1, 255, 1, 129, 127, 192, 160]
    assert to_bytes(x).dtype == torch.uint8 and to_bytes(torch.tensor(3.0), bound=3).item() == 255
    pixels = torch.linspace(-8, 8, 999)
    assert (to_pixels(to_bytes(pixels, 8), 8) - pixels).abs().max() <= 8 / 127 / 2 + 1e-5
    assert torch.equal(to_bytes(-pixels, 8).int(), 256 - to_bytes(pixels, 8).int())  # the mirror
    levels = torch.arange(1, 256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_pixels(levels)), levels) and to_pixels(torch.tensor(128)) == 0
    assert x[2] == 20  # untouched


def test_mirrored_frames_give_mirrored_flow():
    frames = scene(turn(3) + shift(0.4, 0) - shift(0, 0))[None]
    a, b = to_bytes(tvl1(frames), 5)[0, 0].int(), to_bytes(tvl1(frames.flip(-1)), 5)[0, 0].int().flip(-1)
    assert (256 - b[0] - a[0]).abs().float().mean() < 0.5 and (b[1] - a[1]).abs().float().mean() < 0.5


def fields(count, height, width, seed=0):
    """uint8 (T, 2, H, W) in which every level from 0 to 255 is."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, 2, height, width), dtype=np.uint8)
    x.reshape(-1)[:256] = np.arange(256)
    return torch.from_numpy(x)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (17, 19), (33, 16), (16, 31)])
def test_flow_video_gives_the_very_same_levels(tmp_path, height, width):
    x = fields(30, height, width)
    write_flow(tmp_path / "a.mp4", x, fps=12.5)
    assert os.listdir(tmp_path) == ["a.mp4"]
    with Flow(tmp_path / "a.mp4") as video:
        assert len(video) == 30 and abs(video.fps - 12.5) < 1e-9
        assert np.abs(video.times - np.arange(30) / 12.5).max() < 1e-4
        assert torch.equal(video.get(range(30)), x)
        indices = [29, 3, 3, 17]
        part = video.get(indices)
        assert torch.equal(part, x[indices]) and part.is_contiguous()
        with pytest.raises(IndexError):
            video.get([30])
    with Video(tmp_path / "a.mp4") as video:  # an ordinary file to anyone else
        assert (video.height, video.width) == (2 * height, width) and video.codec == "h264"
        assert np.diff([video._source.pts.index(key) for key in video._source.keys]).tolist() == [12, 12]
        assert torch.equal(video.get([5])[0, 1], x[5].reshape(-1, width))


def test_times_of_a_flow_video_survive(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.005, 0.7, 20))
    times -= times[0]
    x = fields(20, 16, 20)
    write_flow(tmp_path / "a.mp4", (field for field in x), times, fps=3.0)
    with Flow(tmp_path / "a.mp4") as video:
        assert np.abs(video.times - times).max() < 1e-4 and torch.equal(video.get([19, 0]), x[[19, 0]])
    span = (times[7] - 0.001, times[11] - 0.001)
    with Flow(tmp_path / "a.mp4", span) as video:
        assert len(video) == 4 and torch.equal(video.get(range(4)), x[7:11])
        assert np.abs(video.times - times[7:11]).max() < 1e-4
    with Flow(tmp_path / "a.mp4", (1e6, 2e6)) as video:
        assert len(video) == 1 and torch.equal(video.get([0]), x[19:])


def test_short_side(tmp_path):
    x = torch.full((3, 2, 32, 48), 128, dtype=torch.uint8)
    x[:, 0, :, 24:], x[:, 1] = 200, 50
    write_flow(tmp_path / "a.mp4", x)
    with Flow(tmp_path / "a.mp4") as video:
        small = video.get([0, 2], short_side=16)
        assert small.shape == (2, 2, 16, 24) and small.dtype == torch.uint8
        assert (small[:, 1] == 50).all()  # neither rescaled nor mixed with u above
        assert (small[:, 0, :, :8] == 128).all() and (small[:, 0, :, 16:] == 200).all()


def test_broken_flow_videos(tmp_path, make):
    write_flow(tmp_path / "a.mp4", fields(40, 32, 32))
    make.cut(tmp_path / "a.mp4", tmp_path / "cut.mp4", 0.5)
    (tmp_path / "page.mp4").write_text("<html>")
    with av.open(str(tmp_path / "rgb.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), (250, 10, 10), np.uint8))))
        file.mux(stream.encode())
    for name, reason in (("cut.mp4", "Invalid data"), ("page.mp4", "Invalid data"),
                         ("none.mp4", "no such file"), ("rgb.mp4", "not a flow video")):  # fmt: skip
        with pytest.raises(VideoError, match=reason), Flow(tmp_path / name) as video:
            video.get([0])


def test_flow_across_a_jump_of_hours(tmp_path):
    times = np.arange(8) / 25
    times[5:] += 30 * 3600
    x = fields(8, 16, 20)
    write_flow(tmp_path / "a.mp4", x, times)
    with Flow(tmp_path / "a.mp4") as video:
        assert np.abs(video.times - times).max() < 1e-4 and torch.equal(video.get(range(8)), x)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def breaks():
        yield from fields(5, 16, 16)
        raise VideoError("the file ends early")

    with pytest.raises(VideoError):
        write_flow(tmp_path / "a.mp4", breaks())
    assert os.listdir(tmp_path) == []


# ---- folders of flow pictures ----------------------------------------------------------------------


def folder(path, x, name="flow_{}_{:05d}.png", start=1):
    path.mkdir(parents=True)
    for i, (u, v) in enumerate(x.numpy(), start):
        Image.fromarray(u).save(path / name.format("x", i))
        Image.fromarray(v).save(path / name.format("y", i))
    return path


@pytest.mark.parametrize(
    ("name", "start"), [("flow_{}_{:05d}.png", 1), ("flow_{}_{}.PNG", 0), ("flow_{}_{:04d}.jpg", 1)]
)
def test_flow_folder(tmp_path, name, start):
    x = torch.arange(12, dtype=torch.uint8)[:, None, None, None].repeat(1, 2, 16, 20) * 9
    x[:, 1] += 100
    path = folder(tmp_path / "v", x, name, start)
    Image.new("RGB", (20, 16)).save(path / "img_00001.jpg")
    with Flow(path) as video:
        assert len(video) == 12 and video.times[1] == 1 / 25
        got = video.get([11, 0, 10, 10]).int()
        tolerance = 3 if name.endswith("jpg") else 0
        assert (got - x[[11, 0, 10, 10]].int()).abs().max() <= tolerance and got.shape == (4, 2, 16, 20)
    with Flow(path, (0.1, 0.2), fps=20.0) as video:
        assert len(video) == 2 and (video.get([0, 1]).int() - x[2:4].int()).abs().max() <= tolerance
        assert video.get([0], short_side=8).shape == (1, 2, 8, 10)


def test_flow_folders_that_are_not_whole(tmp_path):
    def reason(change, *indices):
        path = folder(tmp_path / str(len(os.listdir(tmp_path))), fields(6, 16, 20))
        change(path)
        with pytest.raises(VideoError) as caught, Flow(path) as video:
            video.get(indices)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert reason(lambda p: (p / "flow_y_00004.png").unlink()) == "flow_y number 4 is missing, of 1 to 6"
    assert reason(lambda p: (p / "flow_x_00006.png").unlink()) == "flow_x number 6 is missing, of 1 to 6"
    assert "flow_x number 1 is missing, of 2" in reason(lambda p: [f.unlink() for f in p.glob("*1.png")])
    assert "two files" in reason(lambda p: (p / "flow_x_3.jpg").write_bytes(b""))
    assert "without flow" in reason(lambda p: [f.unlink() for f in p.iterdir()])
    assert "identify" in reason(lambda p: (p / "flow_x_00002.png").write_bytes(b"x"), 1)
    small = Image.new("L", (8, 8))
    assert "differ in size" in reason(lambda p: small.save(p / "flow_x_00002.png"), 1)


# ---- computed and extracted ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(make, tmp_path_factory):
    """A data set of small videos, of different lengths and sizes, two of them unreadable."""
    root = tmp_path_factory.mktemp("flow") / "set"
    for part in ("train", "test"):
        for kind in ("walk", "run"):
            (root / part / kind).mkdir(parents=True)
    times = np.cumsum(np.random.default_rng(5).integers(5, 300, 9))
    make.write(root / "train/walk/uneven.mp4", 9, size=(64, 48), times=times)
    make.write(root / "train/walk/large.mp4", 4, size=(96, 80))
    make.write(root / "train/run/a.b.avi", 5, "mpeg4", (48, 48))
    make.write(root / "train/run/one.mp4", 1, size=(48, 48))
    make.write(root / "test/walk/odd.mkv", 6, size=(49, 33), pix_fmt="yuv444p")
    make.write(root / "test/run/last.mp4", 14, size=(48, 48))
    (root / "test/run/page.mp4").write_text("<html>")
    return root


GOOD = {"train/walk/uneven": 8, "train/walk/large": 3, "train/run/a.b": 4}  # fields
GOOD |= {"test/walk/odd": 5, "test/run/last": 13}
BAD = {"test/run/page.mp4": "Invalid data", "train/run/one.mp4": "a single frame has no flow"}


def listed(root):
    names = [*BAD, "train/walk/uneven.mp4", "train/walk/large.mp4", "train/run/a.b.avi"]
    return Videos.make(root, [*names, "test/walk/odd.mkv", "test/run/last.mp4"], [0] * 7)


def whole(out):
    """dict name -> bytes of the files below `out`, the lines of bad_videos.txt in order."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return files | {"bad_videos.txt": sorted(files["bad_videos.txt"].splitlines())}


@pytest.fixture(scope="module")
def extracted(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("flow") / "out"
    said = []
    counts = extract_flow(listed(videos), out, short_side=48, bound=12, say=said.append, bar=False)
    assert counts == dict(made=5, there=0, bad=2) and said == []
    return out


def test_computed_is_what_is_extracted(videos, extracted):
    for name in GOOD:
        source = next(videos.glob(f"{name}.*"))
        path = find_flow(extracted, str(source.relative_to(videos)))
        assert path == str(extracted / f"{name}.mp4")
        with Flow(path) as a, Computed(source, bound=12, short_side=48) as b, Video(source) as video:
            assert len(a) == len(b) == len(video) - 1 == GOOD[name]
            assert np.abs(a.times - b.times).max() < 1e-4 and np.array_equal(b.times, video.times[:-1])
            indices = [len(a) - 1, 0, 1, 1]
            assert (a.get(indices).int() - b.get(indices).int()).abs().max() <= 1
            assert a.get([0]).shape[2:] == (b.height, b.width) and min(b.height, b.width) <= 48
            small = a.get([1], 24).int() - b.get([1], 24).int()
            assert small.abs().max() <= 1
            with pytest.raises(IndexError):
                b.get([len(b)])


def test_computed_values(videos):
    with Computed(videos / "train/walk/uneven.mp4", bound=6) as fields, Video(fields.path) as video:
        frames, decoded = video.get([2, 3, 4]), []
        fields._video.get = lambda indices, side: decoded.append(list(indices)) or video.get(indices, side)
        got = fields.get([3, 2, 3])
        assert decoded == [[2, 3, 4]]  # each needed frame once
    wanted = to_bytes(tvl1(frames[None])[0], 6)[[1, 0, 1]]
    assert (got.int() - wanted.int()).abs().max() <= 1 and wanted.float().std() > 5


def test_spans_choose_the_same_fields(videos, extracted):
    source = videos / "train/walk/uneven.mp4"
    with Video(source) as video:
        times = video.times
    for start, end in ((1, 4), (0, 9), (6, 9), (8, 9), (3, 3)):
        span = (times[start] - 1e-3, times[end] - 1e-3 if end < 9 else 99.0)
        with Flow(extracted / "train/walk/uneven.mp4", span) as a, Computed(source, span, 12, 48) as b:
            assert len(a) == len(b) == max(min(end, 8) - start, 1), (start, end)
            assert (a.get(range(len(a))).int() - b.get(range(len(b))).int()).abs().max() <= 1
            assert np.abs(a.times - b.times).max() < 1e-4 and b.times[0] == times[min(start, 7)]


def test_computed_refuses(videos, make, tmp_path):
    make.write(tmp_path / "tiny.mp4", 3, size=(64, 12))
    bad = [(tmp_path / "tiny.mp4", "64 x 12 pixels are too small"), (videos / "none.mp4", "no such file")]
    for path, reason in bad + [(videos / name, reason) for name, reason in BAD.items()]:
        with pytest.raises(VideoError, match=reason), Computed(path):
            pass


def test_find(tmp_path):
    (tmp_path / "walk").mkdir()
    (tmp_path / "walk" / "a.b.mp4").write_bytes(b"")
    folder(tmp_path / "walk" / "c", fields(1, 16, 16))
    (tmp_path / "walk" / "frames").mkdir()
    (tmp_path / "walk" / "frames" / "img_1.jpg").write_bytes(b"")
    for name in ("walk/a.b", "walk/a.b.avi", "walk/a.b.MP4", "/data/walk/a.b.webm", "../walk/a.b.avi"):
        assert find_flow(tmp_path, name) == str(tmp_path / "walk" / "a.b.mp4"), name
    assert find_flow(tmp_path, "walk/c.avi") == find_flow(tmp_path, "walk/c") == str(tmp_path / "walk" / "c")
    assert find_flow(tmp_path, "walk/frames") is None and find_flow(tmp_path, "walk/a") is None
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):  # a Mac decomposes names
        path = tmp_path / unicodedata.normalize(form, f"é{form}.mp4")
        path.write_bytes(b"")
        assert find_flow(tmp_path, unicodedata.normalize(other, f"é{form}.avi")) == str(path)
    assert find_flow(tmp_path / "nowhere", "walk/c.avi") is None


def test_what_extraction_leaves(videos, extracted, tmp_path):
    names = [f"{name}.mp4" for name in GOOD]
    assert set(whole(extracted)) == {*names, "flow.json", "bad_videos.txt", ".lock"}
    settings = json.loads((extracted / "flow.json").read_text())
    assert scale_of(extracted) == (settings["bound"], settings["short_side"]) == (12, 48)
    assert scale_of(videos) == (20, 256)
    assert settings["short_side"] == 48 and settings["tau"] == 0.25 and settings["iterations"] == 30
    assert settings["zfactor"] == 0.8 and settings["nscales"] == SCHEME["nscales"]
    lines = [line.split("\t") for line in (extracted / "bad_videos.txt").read_text().splitlines()]
    assert {path: reason for path, reason in lines}.keys() == {str(videos / name) for name in BAD}
    assert all(re.search(BAD[os.path.relpath(path, videos)], reason) for path, reason in lines)
    (tmp_path / "flow.json").write_text("{")
    with pytest.raises(UserError, match="flow.json cannot be read"):
        scale_of(tmp_path)


def test_two_ranks_make_what_one_makes(videos, extracted, tmp_path):
    halves = [
        extract_flow(listed(videos), tmp_path, 48, 12, rank=rank, world=2, bar=False) for rank in (1, 0)
    ]
    assert sum(half["made"] for half in halves) == 5 and all(half["made"] for half in halves)
    assert whole(tmp_path) == whole(extracted)


def test_runs_that_are_started_separately_share_the_work(videos, extracted, tmp_path, monkeypatch):
    """While one run is at its first video, another makes the rest; then it waits for that one."""
    first, others, real = threading.Event(), threading.Event(), write_flow
    counts = {}

    def write(path, *args):
        if not first.is_set():
            first.set()
            assert others.wait(60)
        real(path, *args)
        if len(list(tmp_path.rglob("*.mp4"))) == 4:
            others.set()

    def run(name):
        counts[name] = extract_flow(listed(videos), tmp_path, 48, 12, bar=False)

    monkeypatch.setattr("common.io.flow.write_flow", write)
    runs = [threading.Thread(target=run, args=[name]) for name in "ab"]
    runs[0].start()
    assert first.wait(60)
    runs[1].start()
    for thread in runs:
        thread.join(60)
    assert counts["a"] == dict(made=1, there=4, bad=2) and counts["b"] == dict(made=4, there=1, bad=2)
    assert whole(tmp_path) == whole(extracted)


def test_extraction_again(videos, tmp_path, make):
    first = listed(videos).subset([0, 2, 3])
    root = tmp_path / "set"
    for i in range(3):
        path = root / first.name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(first.path(i)).read_bytes())
    first = Videos.make(root, [first.name(i) for i in range(3)], [0] * 3)
    out = tmp_path / "out"
    assert extract_flow([first, first], out, 48, 12, bar=False) == dict(made=2, there=0, bad=1)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    (out / "train" / "walk" / "uneven.mp4.12-34.tmp").write_bytes(b"half")  # of a run that was killed
    (out / "train" / "walk" / "other.mp4.12-34.tmp").write_bytes(b"half")  # of another rank, at work
    (out / "bad_videos.txt.12-34.tmp").write_bytes(b"half")
    (out / "train" / "walk" / "large.mp4").rename(out / "train" / "walk" / "large.mp4.lock")  # the same
    said = []
    assert extract_flow(first, out, 48, 12, say=said.append, bar=False) == dict(made=1, there=1, bad=1)
    assert len((out / "bad_videos.txt").read_text().splitlines()) == 1
    assert [path.name for path in out.rglob("*.mp4.*")] == ["other.mp4.12-34.tmp"]
    assert (out / "train/walk/uneven.mp4").stat().st_mtime_ns == stamps[out / "train/walk/uneven.mp4"]
    make.write(root / "test/run/page.mp4", 3, size=(48, 48))  # mended
    assert extract_flow(first, out, 48, 12, bar=False) == dict(made=1, there=2, bad=0)
    assert (out / "bad_videos.txt").read_text() == ""
    for kind, values in (("bound", (48, 10)), ("short_side", (32, 12))):
        with pytest.raises(UserError, match=f"has flow with {kind} .*, not .*another --out"):
            extract_flow(first, out, *values)
    (out / "flow.json").unlink()
    with pytest.raises(UserError, match="no flow.json: choose another --out"):  # not flow, perhaps
        extract_flow(first, out, 48, 12)
    twins = Videos.make(root, ["walk/x.avi", "walk/x.mp4"], [0, 0])
    with pytest.raises(UserError, match="x.mp4 and .*x.avi would both become .*x.mp4"):
        extract_flow(twins, tmp_path / "twins")
    assert not (tmp_path / "twins").exists()


def test_progress_without_a_terminal(monkeypatch):
    clock = iter(range(0, 1000, 40))  # a video takes 40 seconds
    monkeypatch.setattr(flow.time, "monotonic", lambda: next(clock))
    said, jobs = [], list("abcde")
    assert list(_progress(jobs, 0, said.append, False)) == jobs
    assert said == ["1 of 5 videos, time left 05:20", "3 of 5 videos, time left 01:46"]
    assert list(_progress(jobs, 1, said.append, False)) == jobs and len(said) == 2


def test_long_videos_go_in_chunks(videos, extracted, tmp_path, monkeypatch):
    sizes, get = [], Computed.get
    monkeypatch.setattr("common.io.flow.CHUNK", 5 * 48 * 48)
    monkeypatch.setattr(Computed, "get", lambda self, at: sizes.append(len(at)) or get(self, at))
    one = listed(videos).subset([6])
    assert extract_flow(one, tmp_path, 48, 12, bar=False)["made"] == 1 and sizes == [5, 5, 3]
    with Flow(tmp_path / "test/run/last.mp4") as a, Flow(extracted / "test/run/last.mp4") as b:
        assert (a.get(range(13)).int() - b.get(range(13)).int()).abs().max() <= 1


def command(videos, out):
    return [str(videos), "--out", str(out), "--short_side", "48", "--bound", "12"]


def test_a_full_disk_stops_the_extraction(videos, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # stands for it: no file may be larger
    try:
        status = flow.main(command(videos, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "File too large" in said and "goes on where it stopped" in said
    assert not list(tmp_path.rglob("*.mp4*")) and not (tmp_path / "bad_videos.txt").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("of another\nkind"), "TypeError: of another"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_no_video_ends_the_extraction(videos, tmp_path, monkeypatch, error, reason):
    get = Video.get

    def fails(self, *args, **options):
        if self.path.endswith("large.mp4"):
            raise error
        return get(self, *args, **options)

    monkeypatch.setattr(Video, "get", fails)
    assert extract_flow(listed(videos), tmp_path, 48, 12, bar=False) == dict(made=4, there=0, bad=3)
    lines = dict(line.split("\t") for line in (tmp_path / "bad_videos.txt").read_text().splitlines())
    assert lines[str(videos / "train/walk/large.mp4")] == reason and not list(tmp_path.rglob("*.tmp"))


def test_a_lost_gpu_is_no_bad_video(videos, tmp_path, monkeypatch):
    def lost(*args, **options):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure", 719)

    monkeypatch.setattr("common.io.flow._flow", lost)
    with pytest.raises(torch.AcceleratorError):
        extract_flow(listed(videos), tmp_path, 48, 12, bar=False)
    assert not (tmp_path / "bad_videos.txt").exists()


# ---- the command -----------------------------------------------------------------------------------


def test_stopped_in_the_middle_of_a_file(videos, tmp_path, monkeypatch, capfd):
    begun, real = [], to_bytes

    def third(*args):
        begun.append(args)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr("common.io.flow.to_bytes", third)
    before = signal.getsignal(signal.SIGTERM)
    assert flow.main(command(videos, tmp_path)) == 130
    assert capfd.readouterr() == ("", "") and signal.getsignal(signal.SIGTERM) is before
    assert len(list(tmp_path.rglob("*.mp4"))) == 2 and not list(tmp_path.rglob("*.tmp"))


def test_killed_and_resumed_by_two_ranks(videos, extracted, tmp_path, monkeypatch, capsys, request):
    def start():
        call = [sys.executable, "-m", "common.tools.flow", *command(videos, tmp_path)]
        process = forks.start(call, REPOSITORY, os.environ)
        request.addfinalizer(process.kill)
        return process

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    process, deadline = start(), time.time() + 300
    while not list(tmp_path.rglob("*.mp4")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert 0 < len(done) < 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    process = start()
    monkeypatch.setenv("RANK", "0")
    assert flow.main(command(videos, tmp_path)) == 0
    (other, errors), said = process.communicate(timeout=300), capsys.readouterr().out
    assert process.returncode == 0 and errors == ""
    assert re.fullmatch(r"rank 0 of 2: .*\nrank 1 of 2: .*\n", said + other)
    counts = [sum(map(int, re.findall(rf"(\d+) {word}", said + other)))
              for word in ("made", "were there", "unreadable")]  # fmt: skip
    assert counts == [5 - len(done), len(done), 2]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert whole(tmp_path) == whole(extracted)  # byte for byte, and nothing else is left
    monkeypatch.delenv("RANK")  # WORLD_SIZE alone says nothing
    assert flow.main(command(videos, tmp_path)) == 0
    assert "0 made, 5 were there, 2 unreadable (listed in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["nothing", "--out", "{out}"], "no data set or folder nothing"),
     (["{set}", "--out", "{set}/flow"], "lies in"),
     (["{set}", "--out", "{out}", "--bound", "0"], "--bound 0"),
     (["{set}", "--out", "{out}", "--short_side", "8"], "--short_side 8"),
     (["{set}", "--out", "{set}/train/run/a.b.avi/x", "--root", "{set}/train"], ""),
     (["{set}", "--out", "{out}", "--split", "2"], "--split 2")],
)  # fmt: skip
def test_mistakes(videos, tmp_path, capsys, words, reason):
    words = [word.format(set=videos, out=tmp_path / "out") for word in words]
    assert flow.main(words) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1 and "Traceback" not in said
    assert not list(tmp_path.rglob("*.mp4"))

"""TV-L1 optical flow against known motion and against OpenCV."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.tvl1 import PIXELS_AT_ONCE, _dual, _fused, _gray, _primal, tvl1

FIXTURE = Path(__file__).parent / "data" / "tvl1_opencv.npz"
H, W = 48, 64


def scene(*motions, height=H, width=W, seed=0, waves=60):
    """float32 (T, H, W), 0 to 1: a texture at rest, then moved by affine maps (2, 3) about its centre."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.uniform(np.log(0.1), np.log(1.2), waves))
    turn, phase = rng.uniform(0, 2 * np.pi, (2, waves))
    kx, ky, size = rate * np.cos(turn), rate * np.sin(turn), 0.3 / rate
    frames = []
    for motion in (np.eye(2, 3), *motions):
        moved = (grid(height, width) - motion[:, 2]) @ np.linalg.inv(motion[:, :2]).T
        x, y = np.moveaxis(moved, -1, 0)[..., None]
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


def errors(flow, motion, margin):
    """(distances in pixels of a flow (2, H, W) from the affine map, its mean length), without a margin."""
    x = grid(*flow.shape[1:])
    field = np.moveaxis(x @ motion[:, :2].T + motion[:, 2] - x, -1, 0)
    distances = np.linalg.norm(flow.numpy() - field, axis=0)
    return distances[margin:-margin, margin:-margin], np.hypot(*field).mean()


MOTIONS = {
    "right": shift(2, 0), "left": shift(-2, 0), "down": shift(0, 2), "up": shift(0, -2),
    "half a pixel": shift(0.5, -0.25), "a tenth": shift(-0.1, 0.1), "five pixels": shift(4, -3),
    "clockwise": turn(4), "counter-clockwise": turn(-4), "nearer": turn(0, 1.05), "farther": turn(0, 0.95),
}  # fmt: skip


def test_known_motion():
    flows = tvl1(torch.stack([scene(motion) for motion in MOTIONS.values()]))[:, 0]
    for flow, (name, motion) in zip(flows, MOTIONS.items(), strict=True):
        error, length = errors(flow, motion, 6)
        assert error.mean() < 0.05 + 0.03 * length and np.median(error) < 0.1, (name, error.mean())
    u, v = flows[:4].mean((2, 3)).T  # right, left, down, up
    assert u[0] > 1.8 and u[1] < -1.8 and v[2] > 1.8 and v[3] < -1.8
    assert abs(u[2:]).max() < 0.1 and abs(v[:2]).max() < 0.1


def test_no_motion_is_zero():
    assert tvl1(scene(shift(0, 0))[None]).abs().max() == 0
    assert tvl1(torch.full((1, 2, 20, 30), 0.7)).abs().max() == 0  # nowhere a gradient


def test_each_pair_of_neighbouring_frames_has_its_flow(monkeypatch):
    """Whatever else is in the batch, and however many pairs are computed at once."""
    frames = torch.stack([scene(shift(1, 0), turn(2), seed=seed) for seed in range(3)])
    whole = tvl1(frames)
    assert whole.shape == (3, 2, 2, H, W) and whole.dtype == torch.float32 and whole.is_contiguous()
    for n in range(3):
        for t in range(2):
            assert (tvl1(frames[n : n + 1, t : t + 2])[0, 0] - whole[n, t]).abs().max() < 1e-5
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 4 * H * W)  # four of six pairs, at the finest level
    assert (tvl1(frames) - whole).abs().max() < 1e-5


def test_the_kind_of_frames_does_not_matter():
    frames = (255 * scene(turn(3))[None]).byte()
    expected = tvl1(frames)
    rgb = frames[:, :, None].expand(1, 2, 3, H, W)
    thwc = rgb.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for others in (frames.float() / 255, frames.double() / 255, rgb, thwc, rgb.float() / 255):
        apart = (tvl1(others) - expected).abs()
        assert apart.max() < 0.02 and apart.mean() < 1e-4  # rounding


@pytest.mark.parametrize("frames, reason", [
    (torch.zeros(1, 1, 32, 32), "two frames, not 1"), (torch.zeros(2, 32, 32), "not .2, 32, 32"),
    (torch.zeros(1, 2, 15, 64), "64 x 15 pixels are too small"),
    (torch.zeros(1, 2, 4, 32, 32), "not .1, 2, 4, 32, 32"),
    (torch.linspace(0, 255, 512).view(1, 2, 16, 16), "from 0 to 1, not from 0 to 255"),
    (torch.full((1, 2, 16, 16), torch.nan), "not from nan"),
    (torch.ones(1, 2, 16, 16, dtype=torch.int64), "uint8, or floats from 0 to 1, not torch.int64"),
])  # fmt: skip
def test_frames_without_flow(frames, reason):
    with pytest.raises(ValueError, match=reason):
        tvl1(frames)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU")
def test_on_a_gpu():
    assert _fused() != (_primal, _dual)  # it compiles
    frames = torch.stack([scene(motion) for motion in MOTIONS.values()])
    for some in (frames, frames[:1], frames[..., 1:]):
        assert (tvl1(some.cuda()).cpu() - tvl1(some)).abs().mean() < 1e-3


def test_the_smallest_pictures():
    flow = tvl1(scene(shift(0.5, 0), height=16, width=16)[None], nscales=50)[0, 0]
    assert errors(flow, shift(0.5, 0), 4)[0].mean() < 0.1


def test_the_steps_for_a_compiler_are_those_in_place():
    """A GPU runs them compiled and without memory of their own; the CPU, compared with OpenCV, in place."""
    g = torch.Generator().manual_seed(0)
    u, px, py, b, gradient = (torch.randn(2, 2, 5, 6, generator=g) for _ in range(5))
    a = torch.randn(2, 5, 6, generator=g)
    px[..., -1], py[..., -1, :] = 0, 0
    states = [[x.clone() for x in (u, px, py)] for _ in range(2)]
    memory, factor = [torch.zeros_like(u) for _ in range(3)], torch.empty_like(a)
    for _ in range(3):
        u, px, py = states[0]
        states[0][0] = _primal(u, px, py, a, b, gradient, 0.14)
        _dual(states[0][0], px, py, 0.2, 0.35)
        u, px, py = states[1]
        _primal(u, px, py, a, b, gradient, 0.14, factor, u)
        _dual(u, px, py, 0.2, 0.35, *memory)
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*states, strict=True))


def opencv_pairs():
    """uint8 (P, 2, H, W) pictures of translation, rotation, zoom, and all of them with noise."""
    motions = (shift(1.5, -0.7), turn(3), turn(0, 1.04), turn(-2, 0.97) + shift(1, 1) - shift(0, 0))
    frames = np.stack([255 * scene(motion, height=40, width=56, seed=i) for i, motion in enumerate(motions)])
    frames[3] += np.random.default_rng(0).normal(0, 2, frames[3].shape)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def make_fixture():
    """Write FIXTURE; needs opencv-contrib-python: python -c "import test_tvl1; test_tvl1.make_fixture()"."""
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
    error = np.linalg.norm(tvl1(torch.from_numpy(frames))[:, 0].numpy() - flows, axis=1)
    assert error.mean() < 0.005 and np.median(error) < 0.001 and np.abs(flows).max() > 1.5
    our_gray = _gray(torch.from_numpy(rgb).permute(2, 0, 1)[None])[0].numpy()
    assert np.abs(our_gray - gray).max() <= 0.51  # it rounds

"""Frames, differences and flow of a video: which pictures, in which channels, mirrored how."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensors import picture_folder, pixels

from common import augment, modality
from common.clips import Views
from common.data import Data, Videos
from common.errors import UserError, VideoError
from common.io.decode import read_frames, read_windows
from common.io.flow import to_bytes, write_flow
from common.modality import BOUND, FLOW_SIDE, MODALITIES, Recipe, Streams, pictures_of
from common.tvl1 import tvl1

N, H, W = 12, 20, 24  # of the longest video
LENGTHS = {f"v{n}": n for n in (1, 2, 5, 6, 7, N)}
FRAMES = {name: pixels(n, 3, H, W, seed=n) for name, n in LENGTHS.items()}
FIELDS = {name: pixels(n - 1, 2, H, W, seed=50 + n) for name, n in LENGTHS.items() if n > 1}
LONGEST = f"v{N}"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """FRAMES as folders of PNG files, FIELDS as flow videos."""
    root = tmp_path_factory.mktemp("modality")
    (root / "flow").mkdir()
    for name, frames in FRAMES.items():
        picture_folder(root / name, frames.permute(0, 2, 3, 1))
    for name, fields in FIELDS.items():
        write_flow(root / "flow" / f"{name}.mp4", fields)
    return Videos.make(root, LENGTHS, [0] * len(LENGTHS), flow=str(root / "flow"))


def index_of(name):
    return list(LENGTHS).index(name)


# ---- which pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n", LENGTHS.items())
@pytest.mark.parametrize("window", [[0], [6, 0, 3], [2, 2]], ids=str)
def test_pictures_of_a_window(videos, name, n, window):
    """Input frame i: frame i; frames i to i + 5; i and i + 4; fields i to i + 4. The last one is repeated."""
    window = [i % max(1, n - 5) for i in window]
    kinds = ("diff", "tg", "rgb", "flow", "field") if n > 1 else ("diff", "tg", "rgb")
    lengths = dict(rgb=n, tg=max(1, n - 4), diff=max(1, n - 5), flow=max(1, n - 5), field=n - 1)
    pictures = dict(
        rgb=[FRAMES[name][i] for i in window],
        tg=[FRAMES[name][min(i + k, n - 1)] for i in window for k in (0, 4)],
        diff=[FRAMES[name][min(i + k, n - 1)] for i in window for k in range(6)],
        flow=[FIELDS[name][min(i + k, n - 2)] for i in window for k in range(5) if n > 1],
        field=[FIELDS[name][i] for i in window if n > 1],
    )
    with Streams(videos, index_of(name), kinds, interval=4) as source:
        assert source.lengths == {kind: lengths[kind] for kind in kinds} and len(source) == max(1, n - 5)
        for kind, clip in zip(kinds, source.clips([np.array(window)] * len(kinds)), strict=True):
            assert clip.dtype == torch.uint8 and torch.equal(clip, torch.stack(pictures[kind]))


def test_windows_of_several_modalities_are_in_turn_and_read_once(videos, monkeypatch):
    frames, fields, calls = FRAMES[LONGEST], FIELDS[LONGEST], []
    monkeypatch.setattr(modality, "read_windows", lambda *args: calls.append(args) or read_windows(*args))
    with Streams(videos, index_of(LONGEST), ("flow", "rgb")) as source:
        a, b, c, d = source.clips([np.array([1]), np.array([8, 11]), np.array([6]), np.array([0])])
    assert torch.equal(a, fields[1:6]) and torch.equal(c, fields[6:11])
    assert torch.equal(b, frames[[8, 11]]) and torch.equal(d, frames[:1])
    assert len(calls) == 2  # the frames, and the flow
    with Streams(videos, index_of(LONGEST), ("diff",)) as source:  # one modality: all windows are of it
        a, b = source.clips([np.array([0]), np.array([6])])
    assert torch.equal(a, frames[:6]) and torch.equal(b, frames[6:]) and len(calls) == 3


def test_frames_of_a_file_in_any_size_and_nothing_stays_open(make, tmp_path):
    paths = [make.write(tmp_path / "a.mp4", frames=20), str(tmp_path / "flow" / "a.mp4")]
    (tmp_path / "flow").mkdir()
    videos = Videos.make(tmp_path, ["a.mp4"], [0], flow=str(tmp_path / "flow"))

    def are_open():
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        files = {os.readlink(link) for link in links if os.path.exists(link)}
        return [path in files for path in paths]

    with pytest.raises(VideoError, match=f"no extracted flow of it in {tmp_path}/flow"):
        Streams(videos, 0, ("rgb", "flow")).__enter__()
    assert are_open() == [False, False]
    write_flow(paths[1], pixels(19, 2, 16, 16))
    for side in (None, 30):
        with Streams(videos, 0, ("rgb", "diff", "flow")) as source:
            rgb, diff, _ = source.clips([np.array([3, 17]), np.array([14]), np.array([0])], side)
            assert are_open() == [True, True]
        assert torch.equal(rgb, read_frames(paths[0], [3, 17], side))
        assert torch.equal(diff, read_frames(paths[0], range(14, 20), side))
    assert are_open() == [False, False]


def test_flow_of_a_span_begins_with_its_first_frame(videos):
    spans = np.array([[3 / 25 - 0.001, 11 / 25 - 0.001]] * len(LENGTHS))  # frames and fields 3 to 10
    with Streams(replace(videos, spans=spans), index_of(LONGEST), ("rgb", "flow")) as source:
        assert source.lengths == dict(rgb=8, flow=4)
        rgb, fields = source.clips([np.array([0]), np.array([3])])
    assert torch.equal(rgb, FRAMES[LONGEST][3:4]) and torch.equal(fields, FIELDS[LONGEST][6:11])


@pytest.mark.parametrize("bound", [20.0, 8.0])
def test_flow_that_is_not_there_is_computed(videos, bound):
    videos = replace(videos, flow=None)
    with Recipe(2, 1, modality="flow", bound=bound).open(videos, index_of(LONGEST)) as source:
        assert source.lengths == dict(flow=N - 5)
        (clip,) = source.clips([np.array([4, 1])])
    pairs = torch.stack([FRAMES[LONGEST][[i + k, i + k + 1]] for i in (4, 1) for k in range(5)])
    expected = to_bytes(tvl1(pairs)[:, 0], bound)
    assert (clip.int() - expected.int()).abs().max() <= 1  # rounding
    with Streams(videos, index_of(LONGEST), ("flow",), bound, flow_side=16) as source:
        assert source.clips([np.array([0])])[0].shape == (5, 2, 16, 19)
    with pytest.raises(VideoError, match="single frame"):
        Streams(videos, index_of("v1"), ("flow",)).__enter__()


@pytest.mark.parametrize("n, is_refused", [(N - 4, True), (N - 3, False), (N + 1, False), (N + 2, True)])
def test_flow_of_another_video_is_refused(videos, tmp_path, n, is_refused):
    """Two fields more or less are let pass: some extractors leave out some at the end."""
    write_flow(tmp_path / f"{LONGEST}.mp4", pixels(n, 2, 16, 16))
    streams = Streams(replace(videos, flow=str(tmp_path)), index_of(LONGEST), ("rgb", "flow"))
    if is_refused:
        with pytest.raises(VideoError, match=f"flow has {n} fields, for {N} frames"):
            streams.__enter__()
    else:
        with streams as source:
            assert source.lengths == dict(rgb=N, flow=n - 4)


# ---- channels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, C, dtype, channel", [  # channel(pictures of an input frame, number)
    ("rgb", 3, torch.uint8, lambda x, n: x[0, n]),
    ("tg", 3, torch.uint8, lambda x, n: modality.temporal_gradient(x[0, n], x[1, n])),
    ("diff", 15, torch.int16, lambda x, n: x[n // 3 + 1, n % 3].int() - x[n // 3, n % 3].int()),
    ("flow", 10, torch.uint8, lambda x, n: x[n // 2, n % 2]),
    ("field", 2, torch.uint8, lambda x, n: x[0, n]),
])  # fmt: skip
def test_channels_match_a_loop(kind, C, dtype, channel):
    """diff: 3 k + c is colour c of frame k + 1 less that of frame k; flow: 2 k is u of field k, 2 k + 1 v."""
    x = pixels(2, 3 * MODALITIES[kind].pictures, 2 if MODALITIES[kind].source == "flow" else 3, 4, 5)
    out, frames = modality.stacked(x, kind), x.unflatten(1, (3, -1))
    assert out.shape == (2, 3, C, 4, 5) and out.dtype == dtype and MODALITIES[kind].channels == C
    for b, t, n in np.ndindex(2, 3, C):
        assert torch.equal(out[b, t, n].int(), channel(frames[b, t], n).int())


def test_tg_of_all_pairs_of_levels():
    """(x_t - x_t+n + 255) / 2, rounded down: 127 where nothing moves."""
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    tg = modality.temporal_gradient(*(levels.to(torch.uint8).view(1, 1, 256, 256) for levels in (a, b)))
    assert tg.dtype == torch.uint8 and (tg[0, 0].diagonal() == 127).all()
    assert tg[0, 0].tolist() == [[(i - j + 255) // 2 for j in range(256)] for i in range(256)]


@pytest.mark.parametrize("kind", MODALITIES)
@pytest.mark.parametrize("crops", [1, 3])
def test_a_recipe_crops_the_pictures_of_an_input_frame_alike(videos, kind, crops):
    recipe = Recipe(2, 3, 2, crops, 12, 12, modality=kind, interval=2, mean=(0.5,), std=(0.25,))
    views = Views(videos, recipe.sample, recipe.view, open=recipe.open)[index_of(LONGEST)]["views"]
    pictures = (FIELDS if MODALITIES[kind].source == "flow" else FRAMES)[LONGEST]
    n = {"rgb": N, "tg": N - 2, "diff": N - 5, "flow": N - 5, "field": N - 1}[kind]  # input frames
    shown = []
    for window in ([0, 3], [n - 6, n - 3]):
        clip = pictures[pictures_of(window, kind, len(pictures), 2)]
        shown += [augment.resize_crop(clip, 12, 12)] if crops == 1 else augment.three_crops(clip, 12)
    x = modality.stacked(torch.stack(shown), kind).transpose(1, 2)
    x_net = recipe.to_input(views, "cpu")
    assert x_net.shape == (2 * crops, MODALITIES[kind].channels, 2, 12, 12)
    assert torch.allclose(x_net, (x / 255 - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("kind", MODALITIES)
def test_flip_mirrors_pictures_and_negates_u(kind):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 2, 1, 256).contiguous()
    mirrored, before = modality.flip(levels, kind), levels.clone()
    assert mirrored[0, 1, 0].tolist() == list(range(255, -1, -1))  # v only moves
    is_flow = kind in ("flow", "field")  # u of byte b is b - 128 steps
    assert mirrored[0, 0, 0].tolist() == [min(256 - b, 255) if is_flow else b for b in range(255, -1, -1)]
    assert torch.equal(levels, before)  # the clip itself stays
    assert torch.equal(
        modality.flip(mirrored, kind)[..., 1:], levels[..., 1:]
    )  # bytes 1 to 255, all that there are


# ---- the flow of a data set ------------------------------------------------------------------------


def test_flow_of_a_data_set(tmp_path, monkeypatch):
    messages, extracted = [], []
    run = SimpleNamespace(say=messages.append, device="cpu", rank=0, world=1)
    monkeypatch.setattr(
        "common.io.flow.extract_flow", lambda *args: extracted.append((len(args[0]), args[1]))
    )
    monkeypatch.setattr(modality.dist, "barrier", lambda: None)
    videos = Videos.make(tmp_path, ["a.mp4"], [0])
    data = Data("set", 1, ("a",), videos, videos, False, True, ())

    def flow_of(name="ssv2", root=f"{tmp_path}/set/", folder=None, kinds=("rgb", "flow"), **models):
        """(folder, bound, short side)."""
        with_flow, scale = modality.with_flow(data, name, root, folder, run, kinds, models)
        assert with_flow.train.flow == with_flow.test.flow == with_flow.train.subset([0]).flow
        return with_flow.train.flow, *scale

    models = {"a": Recipe(2, 1, modality="flow", bound=8.0, flow_side=100), "b": Recipe(2, 1)}
    assert flow_of() == (None, BOUND, FLOW_SIDE)
    assert f"python -m common.tools.flow ssv2 --out {tmp_path}/set_flow" in messages.pop()
    assert flow_of(**models) == (None, 8.0, 100) and messages.pop()  # computed as the model wants it
    (tmp_path / "set_flow").mkdir()
    (tmp_path / "set_flow" / "flow.json").write_text('{"bound": 8.0, "short_side": 100}')
    extracted_before = (f"{tmp_path}/set_flow", 8.0, 100)
    assert flow_of() == flow_of(**models) == flow_of(kinds=("field",)) == extracted_before
    assert flow_of(kinds=("rgb", "diff")) == (None, BOUND, FLOW_SIDE)
    assert flow_of("ssv2", None, f"{tmp_path}/set_flow") == extracted_before
    for kind in ("flow", "field"):
        with pytest.raises(UserError, match="c wants flow"):
            flow_of(**models, c=Recipe(2, 1, modality=kind, bound=8.0))
    with pytest.raises(UserError, match="flow nowhere is not there: python -m common.tools.flow ssv2"):
        flow_of(folder="nowhere")
    assert not extracted and not messages
    assert flow_of("toy:multi", None)[0] == "data/toy_multi_flow"
    assert extracted == [(2, "data/toy_multi_flow")]  # training and test videos

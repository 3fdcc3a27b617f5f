"""Flow as bytes and flow videos, folders of flow pictures, flow computed on the fly, and the extraction."""

import json
import os
import re
import resource
import signal
import sys
import time
import unicodedata
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from tensors import pixels

from common.data import Videos
from common.errors import UserError, VideoError
from common.io.decode import Video
from common.io.flow import Computed, Flow, extract_flow, find_flow, scale_of, to_bytes, write_flow
from common.tools import flow
from common.tvl1 import SCHEME

REPOSITORY = Path(__file__).resolve().parent.parent
SCALE = 12.0, 48  # bound and short side in pixels


# ---- bytes and flow videos -------------------------------------------------------------------------


def test_bytes():
    x = torch.tensor([0, -0.01, 20, -20, 35, -1000, 20 / 127, -20 / 127, 10, 5])
    assert to_bytes(x, 20.0).tolist() == [128, 128, 255, 1, 255, 1, 129, 127, 192, 160]
    assert to_bytes(x, 20.0).dtype == torch.uint8 and x[2] == 20  # untouched
    flow = torch.linspace(-8, 8, 999)
    x = to_bytes(flow, 8).int()
    assert ((x - 128) * (8 / 127) - flow).abs().max() <= 8 / 127 / 2 + 1e-5
    assert torch.equal(to_bytes(-flow, 8).int(), 256 - x)  # the mirror


def fields(count, height, width, seed=0):
    """uint8 (T, 2, H, W) with every level from 0 to 255."""
    x = pixels(count, 2, height, width, seed=seed)
    x.view(-1)[:256] = torch.arange(256)
    return x


@pytest.mark.parametrize(("height", "width"), [(48, 64), (17, 19)])
def test_flow_video_gives_the_very_same_levels(tmp_path, height, width):
    x = fields(30, height, width)
    write_flow(tmp_path / "a.mp4", x, fps=12.5)
    assert os.listdir(tmp_path) == ["a.mp4"]
    with Flow(tmp_path / "a.mp4") as video:
        assert len(video) == 30 and abs(video.fps - 12.5) < 1e-9
        assert np.abs(video.times - np.arange(30) / 12.5).max() < 1e-4
        assert torch.equal(video.get(range(30)), x)
        some = video.get([29, 3, 3, 17])
        assert torch.equal(some, x[[29, 3, 3, 17]]) and some.is_contiguous()
        with pytest.raises(IndexError):
            video.get([30])
    with Video(tmp_path / "a.mp4") as video:  # an ordinary file to anyone else
        assert (video.height, video.width) == (2 * height, width) and video.codec == "h264"
        assert np.diff([video._source.pts.index(key) for key in video._source.keys]).tolist() == [12, 12]
        assert torch.equal(video.get([5])[0, 1], x[5].reshape(-1, width))


@pytest.mark.parametrize("jump", [0, 30 * 3600])
def test_times_of_a_flow_video_survive(tmp_path, jump):
    times = np.cumsum(np.random.default_rng(0).uniform(0.005, 0.7, 20))
    times -= times[0]
    times[15:] += jump
    x = fields(20, 16, 20)
    write_flow(tmp_path / "a.mp4", (field for field in x), times, fps=3.0)
    with Flow(tmp_path / "a.mp4") as video:
        assert np.abs(video.times - times).max() < 1e-4 and torch.equal(video.get([19, 0]), x[[19, 0]])
    with Flow(tmp_path / "a.mp4", (times[7] - 0.001, times[11] - 0.001)) as video:
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


@pytest.mark.parametrize("name, reason", [
    ("cut", "Invalid data"), ("page", "Invalid data"), ("none", "no such file"), ("rgb", "not a flow video"),
])  # fmt: skip
def test_broken_flow_videos(tmp_path, make, name, reason):
    write_flow(tmp_path / "a.mp4", fields(40, 32, 32))
    make.cut(tmp_path / "a.mp4", tmp_path / "cut.mp4", 0.5)
    (tmp_path / "page.mp4").write_text("<html>")
    make.write(tmp_path / "rgb.mp4", 1, size=(64, 64))
    with pytest.raises(VideoError, match=reason), Flow(tmp_path / f"{name}.mp4") as video:
        video.get([0])


# ---- folders of flow pictures ----------------------------------------------------------------------


def folder(path, x, name="flow_{}_{:05d}.png", start=1):
    path.mkdir(parents=True)
    for i, (u, v) in enumerate(x.numpy(), start):
        Image.fromarray(u).save(path / name.format("x", i))
        Image.fromarray(v).save(path / name.format("y", i))
    return path


@pytest.mark.parametrize("name, start", [
    ("flow_{}_{:05d}.png", 1), ("flow_{}_{}.PNG", 0), ("flow_{}_{:04d}.jpg", 1),
])  # fmt: skip
def test_flow_folder(tmp_path, name, start):
    x = torch.arange(12, dtype=torch.uint8)[:, None, None, None].repeat(1, 2, 16, 20) * 9
    x[:, 1] += 100
    path = folder(tmp_path / "v", x, name, start)
    Image.new("RGB", (20, 16)).save(path / "img_00001.jpg")
    with Flow(path) as video:
        assert len(video) == 12 and video.times[1] == 1 / 25
        read = video.get([11, 0, 10, 10]).int()
        tolerance = 3 if name.endswith("jpg") else 0
        assert (read - x[[11, 0, 10, 10]].int()).abs().max() <= tolerance and read.shape == (4, 2, 16, 20)
    with Flow(path, (0.1, 0.2), fps=20.0) as video:
        assert len(video) == 2 and (video.get([0, 1]).int() - x[2:4].int()).abs().max() <= tolerance
        assert video.get([0], short_side=8).shape == (1, 2, 8, 10)


@pytest.mark.parametrize("change, index, reason", [
    (lambda p: (p / "flow_y_00004.png").unlink(), 0, "^flow_y number 4 is missing, of 1 to 6$"),
    (lambda p: (p / "flow_x_00006.png").unlink(), 0, "^flow_x number 6 is missing, of 1 to 6$"),
    (lambda p: [f.unlink() for f in p.glob("*1.png")], 0, "flow_x number 1 is missing, of 2"),
    (lambda p: (p / "flow_x_3.jpg").write_bytes(b""), 0, "two files"),
    (lambda p: [f.unlink() for f in p.iterdir()], 0, "without flow"),
    (lambda p: (p / "flow_x_00002.png").write_bytes(b"x"), 1, "identify"),
    (lambda p: Image.new("L", (8, 8)).save(p / "flow_x_00002.png"), 1, "differ in size"),
])  # fmt: skip
def test_flow_folders_that_are_not_whole(tmp_path, change, index, reason):
    path = folder(tmp_path / "v", fields(6, 16, 20))
    change(path)
    with pytest.raises(VideoError, match=reason) as caught, Flow(path) as video:
        video.get([index])
    assert "\n" not in str(caught.value)


# ---- computed and extracted ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(make, tmp_path_factory):
    """A data set of small videos, of different lengths and sizes, two of them unreadable."""
    root = tmp_path_factory.mktemp("flow") / "set"
    for name in ("train/walk", "train/run", "test/walk", "test/run"):
        (root / name).mkdir(parents=True)
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


def videos_of(root):
    names = [*BAD, "train/walk/uneven.mp4", "train/walk/large.mp4", "train/run/a.b.avi"]
    return Videos.make(root, [*names, "test/walk/odd.mkv", "test/run/last.mp4"], [0] * 7)


def contents(out):
    """{name: bytes} of the files below `out`."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def extracted(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("flow") / "out"
    assert extract_flow([videos_of(videos)], out, SCALE) == dict(made=5, there=0, bad=2)
    return out


def test_computed_is_what_is_extracted(videos, extracted):
    for name in GOOD:
        source = next(videos.glob(f"{name}.*"))
        path = find_flow(extracted, str(source.relative_to(videos)))
        assert path == str(extracted / f"{name}.mp4")
        with Flow(path) as a, Computed(source, None, *SCALE) as b, Video(source) as video:
            assert len(a) == len(b) == len(video) - 1 == GOOD[name]
            assert np.abs(a.times - b.times).max() < 1e-4 and np.array_equal(b.times, video.times[:-1])
            for indices, side in (([len(a) - 1, 0, 1, 1], None), ([1], 24)):
                assert (a.get(indices, side).int() - b.get(indices, side).int()).abs().max() <= 1
            assert a.get([0]).shape[2:] == (b.height, b.width) and min(b.height, b.width) <= 48
            with pytest.raises(IndexError):
                b.get([len(b)])


def test_spans_choose_the_same_fields(videos, extracted):
    source = videos / "train/walk/uneven.mp4"
    with Video(source) as video:
        times = video.times
    for start, end in ((1, 4), (0, 9), (6, 9), (8, 9), (3, 3)):
        span = (times[start] - 1e-3, times[end] - 1e-3 if end < 9 else 99.0)
        with Flow(extracted / "train/walk/uneven.mp4", span) as a, Computed(source, span, *SCALE) as b:
            assert len(a) == len(b) == max(min(end, 8) - start, 1), (start, end)
            assert (a.get(range(len(a))).int() - b.get(range(len(b))).int()).abs().max() <= 1
            assert np.abs(a.times - b.times).max() < 1e-4 and b.times[0] == times[min(start, 7)]


def test_computed_refuses(videos, make, tmp_path):
    make.write(tmp_path / "tiny.mp4", 3, size=(64, 12))
    bad = [(tmp_path / "tiny.mp4", "64 x 12 pixels are too small"), (videos / "none.mp4", "no such file")]
    for path, reason in bad + [(videos / name, reason) for name, reason in BAD.items()]:
        with pytest.raises(VideoError, match=reason), Computed(path, None, *SCALE):
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
    files = {f"{name}.mp4" for name in GOOD} | {"flow.json", "bad_videos.txt", ".lock"}
    assert set(contents(extracted)) == files
    settings = json.loads((extracted / "flow.json").read_text())
    assert settings == dict(method="TV-L1", bound=12, short_side=48, **SCHEME)
    assert scale_of(extracted, (20.0, 256)) == SCALE and scale_of(videos, (20.0, 256)) == (20.0, 256)
    reasons = dict(line.split("\t") for line in (extracted / "bad_videos.txt").read_text().splitlines())
    assert reasons.keys() == {str(videos / name) for name in BAD}
    assert all(re.search(BAD[os.path.relpath(path, videos)], reason) for path, reason in reasons.items())
    (tmp_path / "flow.json").write_text("{")
    with pytest.raises(UserError, match="flow.json cannot be read"):
        scale_of(tmp_path, SCALE)


def test_extraction_again(videos, tmp_path, make):
    root, out, uneven = tmp_path / "set", tmp_path / "out", "train/walk/uneven.mp4"
    names = ["test/run/page.mp4", uneven, "train/walk/large.mp4"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((videos / name).read_bytes())
    again = Videos.make(root, names, [0] * 3)
    assert extract_flow([again, again], out, SCALE) == dict(made=2, there=0, bad=1)
    stamp = (out / uneven).stat().st_mtime_ns
    (out / f"{uneven}.12-34.tmp").write_bytes(b"half")  # of a run that was killed
    (out / "train/walk/other.mp4.12-34.tmp").write_bytes(b"half")  # of another rank
    (out / "train/walk/large.mp4").unlink()
    assert extract_flow([again], out, SCALE) == dict(made=1, there=1, bad=1)
    assert len((out / "bad_videos.txt").read_text().splitlines()) == 1
    assert [path.name for path in out.rglob("*.mp4.*")] == ["other.mp4.12-34.tmp"]
    assert (out / uneven).stat().st_mtime_ns == stamp
    make.write(root / "test/run/page.mp4", 3, size=(48, 48))  # readable now
    assert extract_flow([again], out, SCALE) == dict(made=1, there=2, bad=0)
    assert (out / "bad_videos.txt").read_text() == ""
    for kind, scale in (("bound", (10.0, 48)), ("short_side", (12.0, 32))):
        with pytest.raises(UserError, match=f"has flow with {kind} .*, not .*another --out"):
            extract_flow([again], out, scale)
    (out / "flow.json").unlink()
    with pytest.raises(UserError, match="no flow.json: choose another --out"):  # not flow, perhaps
        extract_flow([again], out, SCALE)
    twins = Videos.make(root, ["walk/x.avi", "walk/x.mp4"], [0, 0])
    with pytest.raises(UserError, match="x.mp4 and .*x.avi would both become .*x.mp4"):
        extract_flow([twins], tmp_path / "twins", SCALE)
    assert not (tmp_path / "twins").exists()


def test_long_videos_go_in_chunks(videos, extracted, tmp_path, monkeypatch):
    sizes, get = [], Computed.get
    monkeypatch.setattr("common.io.flow.CHUNK", 5 * 48 * 48)
    monkeypatch.setattr(Computed, "get", lambda self, at: sizes.append(len(at)) or get(self, at))
    last = videos_of(videos).subset([6])
    assert extract_flow([last], tmp_path, SCALE)["made"] == 1 and sizes == [5, 5, 3]
    with Flow(tmp_path / "test/run/last.mp4") as a, Flow(extracted / "test/run/last.mp4") as b:
        assert (a.get(range(13)).int() - b.get(range(13)).int()).abs().max() <= 1


@pytest.mark.parametrize("error, reason", [
    (TypeError("of another\nkind"), "TypeError: of another"),
    (OSError(5, "Input/output error"), "Input/output error"),
])  # fmt: skip
def test_no_video_ends_the_extraction(videos, tmp_path, monkeypatch, error, reason):
    get = Video.get

    def fails(self, *args, **options):
        if self.path.endswith("large.mp4"):
            raise error
        return get(self, *args, **options)

    monkeypatch.setattr(Video, "get", fails)
    assert extract_flow([videos_of(videos)], tmp_path, SCALE) == dict(made=4, there=0, bad=3)
    lines = (tmp_path / "bad_videos.txt").read_text().splitlines()
    assert f"{videos}/train/walk/large.mp4\t{reason}" in lines and not list(tmp_path.rglob("*.tmp"))


def test_a_lost_gpu_is_no_bad_video(videos, tmp_path, monkeypatch):
    def lost(*args, **options):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure", 719)

    monkeypatch.setattr("common.io.flow.flow_of_pairs", lost)
    with pytest.raises(torch.AcceleratorError):
        extract_flow([videos_of(videos)], tmp_path, SCALE)
    assert not (tmp_path / "bad_videos.txt").exists()


# ---- the command -----------------------------------------------------------------------------------


def command(videos, out):
    return [str(videos), "--out", str(out), "--short_side", "48", "--bound", "12"]


def test_a_full_disk_stops_the_extraction(videos, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # stands for it: no file may be larger
    try:
        status = flow.main(command(videos, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "File too large" in sentence and "run the same command again" in sentence
    assert not list(tmp_path.rglob("*.mp4*")) and not (tmp_path / "bad_videos.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_by_two_ranks(videos, extracted, tmp_path, monkeypatch, capsys, request, number):
    """One of them with workers."""

    def start():
        call = [sys.executable, "-m", "common.tools.flow", *command(videos, tmp_path)]
        process = forks.start(call, REPOSITORY, os.environ)
        request.addfinalizer(process.kill)
        return process

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    process, deadline = start(), time.time() + 300
    while not list(tmp_path.rglob("*.mp4")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    assert "Traceback" not in process.communicate(timeout=300)[1]
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert 0 < len(stamps) < 5 and (number == signal.SIGKILL or not list(tmp_path.rglob("*.tmp")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    process = start()
    monkeypatch.setenv("RANK", "0")
    workers = ["--workers", "2"] if number == signal.SIGTERM else []
    assert flow.main(command(videos, tmp_path) + workers) == 0
    text = capsys.readouterr().out + process.communicate(timeout=300)[0]
    assert process.returncode == 0 and re.fullmatch(r"rank 0 of 2: .*\nrank 1 of 2: .*\n", text)
    counts = [sum(map(int, re.findall(rf"(\d+) {word}", text))) for word in ("made", "were", "unreadable")]
    assert counts == [5 - len(stamps), len(stamps), 2]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert contents(tmp_path) == contents(extracted)  # byte for byte, and nothing else is left
    monkeypatch.delenv("RANK")  # WORLD_SIZE alone says nothing
    assert flow.main(command(videos, tmp_path)) == 0
    assert "0 made, 5 were there, 2 unreadable (listed in " in capsys.readouterr().out


@pytest.mark.parametrize("words, reason", [
    ("nothing --out {out}", "no data set or folder nothing"), ("{set} --out {set}/flow", "lies in"),
    ("{set} --out {set}/train/run/a.b.avi/x --root {set}/train", ""),
    ("{set} --out {out} --split 2", "--split 2"),
])  # fmt: skip
def test_mistakes(videos, tmp_path, capsys, words, reason):
    assert flow.main(words.format(set=videos, out=tmp_path / "out").split()) == 2
    sentence = capsys.readouterr().err
    assert reason in sentence and sentence.count("\n") == 1 and "Traceback" not in sentence
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize("flag, value", [("--bound", "0"), ("--bound", "inf"), ("--short_side", "8")])
def test_scales_out_of_range(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        flow.main(["nothing", "--out", str(tmp_path), flag, value])
    assert f"argument {flag}: must be at least" in capsys.readouterr().err

"""The tools check and shrink on real files, good and bad."""

import dataclasses
import os
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from trees import lists, text, tree

from common.data import labelled_subset, load_data
from common.io.decode import Video
from common.io.readers import stem_of
from common.io.workers import in_parallel
from common.tools import check, flow, shrink
from common.tools.check import _check_one
from common.tools.shrink import _shrink_one

TOOLS = dict(check=check, shrink=shrink)


def tool(name, *arguments, workers=0):
    """Exit status of `check ...` or `shrink ...`."""
    return TOOLS[name].main([*map(str, arguments), "--workers", str(workers)])


def bad_videos(folder):
    """{path: reason} of the file that a tool has written."""
    return dict(line.split("\t") for line in (folder / "bad_videos.txt").read_text().splitlines())


def test_names_that_are_not_utf_8(tmp_path, make, capsys):
    """Paths are bytes to the system: what is printed of them is escaped, what is written is as it was."""
    root, out = tmp_path / os.fsdecode(b"set\xff"), tmp_path / os.fsdecode(b"out\xff")
    root.mkdir(), out.mkdir()
    names = [os.fsdecode(b"%d\xfe.mp4" % i) for i in range(6)]
    for i, name in enumerate(names):
        make.write(root / name, frames=8 + i)
    (root / names[1]).write_text("<html>")
    lines = [f"{name} {i % 2}" for i, name in enumerate([*names[:5], os.fsdecode(b"gone\xfd.mp4")])]
    data = load_data(lists(root, lines, [f"{names[5]} 1"], [os.fsdecode(b"k\xe9"), "l"]))
    assert len(labelled_subset(data, per_class=1)) == 2
    assert tool("check", root, "--out", out) == 1
    printed = capsys.readouterr().out
    assert "gone\\xfd.mp4" in printed and "5 of 6 videos decode" in printed and "out\\xff" in printed
    rows = (out / "bad_videos.txt").read_bytes()
    assert rows.startswith(os.fsencode(data.train.path(1)) + b"\t") and rows.count(b"\n") == 1
    assert tool("shrink", root, "--out", out / "small") == 0
    assert "5 of 6 videos are in" in capsys.readouterr().out
    assert len(load_data(out / "small").train) == 4
    assert flow.main([str(root), "--out", str(out / "flow"), "--short_side", "16"]) == 0
    assert "5 made" in capsys.readouterr().out


@pytest.fixture
def videos(tmp_path, make):
    """A data set of real files: wide, rotated, of variable frame rate, odd, small, pictures, and bad."""
    root = tmp_path / "set"
    for name in ("train/run", "train/walk", "test/run/frames"):
        os.makedirs(root / name)
    make.write(root / "train/run/wide.avi", codec="mpeg4", size=(320, 180), frames=30, gop=250)
    times = np.cumsum(np.random.default_rng(0).integers(5, 200, 40))
    make.write(root / "train/run/variable #1.mp4", times=times, frames=40, bf=2)
    make.rotate(make.write(root / "train/walk/turned.mp4", size=(128, 96), frames=20), 90)
    make.write(root / "train/walk/odd.webm", codec="libvpx-vp9", size=(99, 65), frames=10)
    make.write(root / "test/run/a.b.mp4", frames=12)
    for i in range(9):
        Image.fromarray(make.picture(i)).save(root / f"test/run/frames/img_{i:05d}.png")
    (root / "train/run/broken.mp4").write_bytes(b"<html>404</html>")
    text(root / "classes.txt", "walk", "run")
    return root


GOOD = {"train/run/wide.avi": 30, "train/run/variable #1.mp4": 40, "train/walk/turned.mp4": 20}
GOOD |= {"train/walk/odd.webm": 10, "test/run/a.b.mp4": 12, "test/run/frames": 9}


@pytest.mark.parametrize("flags", [[], ["--all_windows"]])
def test_check_lists_bad_videos_and_deletes_nothing(videos, make, monkeypatch, capsys, flags):
    make.cut(videos / "test/run/a.b.mp4", videos / "test/run/short.mp4", 0.5)
    monkeypatch.chdir(videos.parent)
    assert tool("check", "set", *flags) == 1
    bad = bad_videos(Path())
    assert list(bad) == ["set/test/run/short.mp4", "set/train/run/broken.mp4"] and all(bad.values())
    assert (videos / "train/run/broken.mp4").exists()
    assert "6 of 8 videos decode" in capsys.readouterr().out


@pytest.mark.parametrize("wrong, windows", [(34, "33 to 40"), (99, "92 to 99"), (50, None)])
def test_check_compares_what_is_sought_with_one_pass(tmp_path, make, monkeypatch, wrong, windows):
    path, get = make.write(tmp_path / "a.mp4", frames=100), Video.get

    def fails(video, indices, short_side=None):
        return get(video, indices, short_side) * (torch.tensor([*indices]) != wrong).view(-1, 1, 1, 1)

    assert _check_one(path, all_windows=True) is None
    monkeypatch.setattr(Video, "get", fails)
    reason = windows and f"frames {windows} after a seek differ from those of one pass"
    assert _check_one(path) == reason
    assert _check_one(path, all_windows=True).endswith("differ from those of one pass")


def test_what_the_tools_refuse(videos, tmp_path, capsys):
    assert tool("check", "ucf101", "--root", tmp_path) == 2 and str(tmp_path) in capsys.readouterr().err
    assert tool("shrink", videos, "--out", videos / "small") == 2
    assert "folder of its own" in capsys.readouterr().err


def test_shrink(videos, make, tmp_path, capsys):
    out = tmp_path / "small" / "set"
    assert tool("shrink", videos, "--out", out, "--short_side", "90") == 0
    printed = capsys.readouterr().out
    assert "6 of 7" in printed and "broken.mp4" in (out / "bad_videos.txt").read_text()
    old, new = load_data(videos), load_data(out)
    assert new.classes == old.classes == ("walk", "run") and (len(new.train), len(new.test)) == (4, 2)
    train = old.train.subset([i for i in range(5) if old.train.name(i) in GOOD])
    good = dataclasses.replace(old, train=train)
    draws = [[stem_of(d.train.name(i)) for i in labelled_subset(d, per_class=1)] for d in (good, new)]
    assert draws[0] == draws[1]  # the same videos keep their labels
    assert not list(out.rglob("*.tmp"))
    for name, frames in GOOD.items():
        with Video(videos / name) as a, Video(out / (stem_of(name) + ".mp4")) as b:
            assert len(a) == len(b) == frames and np.abs(a.times - b.times).max() < 1e-4, name
            assert abs(a.fps - b.fps) < 1e-2 and b.width % 2 == b.height % 2 == 0
            assert min(b.width, b.height) == min(90, min(a.width, a.height) // 2 * 2), name
            assert abs(b.width / b.height - a.width / a.height) < 0.03
            pictures = b.get(range(frames))
            turned = np.rot90(pictures.numpy(), int("turned" in name), (2, 3))
            assert [make.number(x) for x in turned] == list(range(frames)), name
            gaps = np.diff([b._source.pts.index(pts) for pts in b._source.keys])
            assert b.codec == "h264" and (gaps <= 12).all() and (frames <= 12 or len(gaps))


def test_shrink_goes_on_where_it_stopped(videos, tmp_path, capsys):
    """A killed run leaves complete videos and a temporary file; only the other videos are made then."""
    out = tmp_path / "small"
    assert tool("shrink", videos, "--out", out) == 0
    first, *others = sorted(out.rglob("*.mp4"))
    stamps = {path: path.stat().st_mtime_ns for path in others}
    first.rename(f"{first}.1-2.tmp")
    assert tool("shrink", videos, "--out", out, workers=1) == 0
    assert "5 of 7 videos are done already" in capsys.readouterr().out
    assert sorted(out.rglob("*.mp4")) == [first, *others] and not list(out.rglob("*.tmp"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert tool("shrink", videos, "--out", out, "--gop", "5") == 2
    assert "shrink.json" in capsys.readouterr().err


ERRORS = [
    ("check", TypeError("of another\nkind"), "TypeError: of another"),
    ("check", OSError(5, "Input/output error"), "Input/output error"),
    ("shrink", OSError(5, "Input/output error"), "Input/output error"),
]


@pytest.mark.parametrize("command, error, reason", ERRORS)
def test_no_video_ends_a_command(videos, tmp_path, monkeypatch, capsys, command, error, reason):
    """Whatever it raises, its type and first line are in the list, and the rest goes on."""
    get = Video.get

    def fails(self, *args, **options):
        if self.path.endswith("odd.webm"):
            raise error
        return get(self, *args, **options)

    monkeypatch.setattr(Video, "get", fails)
    out = tmp_path / "out"
    out.mkdir()
    assert tool(command, videos, "--out", out) == (1 if command == "check" else 0)
    assert "5 of 7 videos" in capsys.readouterr().out
    bad = bad_videos(out)
    assert bad.pop(str(videos / "train/walk/odd.webm")) == reason
    assert list(bad) == [str(videos / "train/run/broken.mp4")]


def stamped(path, make, stamps, **options):
    """A video in Matroska whose packets have these time stamps, in milliseconds."""
    source = make.write(f"{path}.avi", len(stamps), "mpeg4", **options)
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target, stamps = new.add_stream_from_template(stream), list(stamps)
        for packet in old.demux(stream):
            if packet.size:
                packet.time_base, packet.stream = Fraction(1, 1000), target
                packet.pts = packet.dts = int(stamps.pop(0))
                new.mux(packet)
    os.remove(source)
    return str(path)


JUMP, HOUR = 40 * np.arange(40), 3_600_000 * (np.arange(40) >= 15)
FREEZE = np.r_[40 * np.arange(10), [400] * 200, 2000 + 40 * np.arange(10)]
STAMPS = {  # time stamps in milliseconds, seconds of the frames, and the tolerance of those
    "all equal": ([0] * 130, np.arange(130) / 20, 1e-4),  # the rate is that of the codec
    "many equal in a row": (FREEZE, None, 200 / 9e4),
    "a jump of an hour": (JUMP + HOUR, (JUMP + HOUR) / 1000, 1e-4),
    "a jump of 27 hours": (JUMP + 27 * HOUR, None, 27 * 3600 / 2e9),
    "a jump of 400 hours": (JUMP + 400 * HOUR, None, 400 * 3600 / 2e9),
}


@pytest.mark.parametrize("case", STAMPS)
def test_shrink_of_odd_time_stamps(tmp_path, make, case):
    stamps, expected, tolerance = STAMPS[case]
    path, target = stamped(tmp_path / "a.mkv", make, stamps, rate=20), str(tmp_path / "b.mp4")
    assert _shrink_one((path, target, dict(short_side=64, gop=12, crf=23))) is None
    with Video(path) as video, Video(target) as copy:
        assert np.abs(copy.times - (video.times if expected is None else expected)).max() < tolerance + 1e-4
        assert (np.diff(copy.times) > 0).all()
        frames = copy.get(range(len(copy))).numpy()
    assert [make.number(x) for x in frames] == list(range(len(stamps)))


def test_shrink_of_a_damaged_file(tmp_path, make, capsys):
    """One packet is lost, and so the frame before it is there twice."""
    root, out = tree(tmp_path / "set", "train/run/a.avi", "test/run/a.avi"), tmp_path / "out"
    for part in ("train", "test"):
        path = make.write(root / part / "run/a.avi", 60, "mjpeg", pix_fmt="yuvj420p")
    with av.open(path) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(bytes(packet), b"\xff" * packet.size))
    assert tool("shrink", root, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"{path}: damaged frames replaced by a neighbour: 1\n" in printed
    assert "2 of 2 videos are in" in printed
    with Video(out / "test/run/a.mp4") as video:
        seen = [make.number(x) for x in video.get(range(60)).numpy()]
        assert seen == [19 if i == 20 else i for i in range(60)]


def test_shrink_lists_what_cannot_be_encoded(tmp_path, make, capsys):
    root, out = tree(tmp_path / "set", "train/run/a.txt", "test/run/a.mp4"), tmp_path / "out"
    sizes = dict(one=(1, 1), two=(2, 2), three=(3, 3), thin=(64, 1), wide=(16400, 2))
    for name, size in sizes.items():
        make.write(root / f"train/run/{name}.mkv", 4, "ffv1", size, pix_fmt="bgr0")
    long = "x" * 250  # a name that leaves no room for the suffix of a file being written
    make.write(root / f"train/run/{long}.mp4", 4)
    make.write(root / "test/run/a.mp4", 4)
    assert tool("shrink", root, "--out", out) == 0
    assert f"3 of 7 videos are in {out}" in capsys.readouterr().out
    assert {os.path.basename(path): reason for path, reason in bad_videos(out).items()} == {
        "one.mkv": "pictures of 1 x 1 pixels are too small to encode",
        "thin.mkv": "pictures of 64 x 1 pixels are too small to encode",
        "wide.mkv": "pictures of 16400 x 2 pixels cannot be encoded: Generic error in an external library",
        f"{long}.mp4": "File name too long",
    }
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(("size", "workers"), [(0, 0), (3000, 0), (3000, 1)])
def test_a_full_disk_is_no_bad_video(videos, tmp_path, capsys, size, workers):
    """It shows at the first or a later write, in this process or another, and nothing is listed."""
    command, out = ("shrink", videos, "--out", tmp_path / "small"), tmp_path / "small"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert tool(*command) == 0  # before the limit, since the annotations are written, too
    (out / "bad_videos.txt").unlink()
    for path in out.rglob("*.mp4"):
        path.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # stands for it: no file may be larger
    try:
        status = tool(*command, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    printed = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "File too large; when that is mended, run the same command again" in printed
    assert not list(out.rglob("*.mp4")) and not list(out.rglob("*.tmp"))
    assert not (out / "bad_videos.txt").exists()
    assert tool(*command) == 0 and len(list(out.rglob("*.mp4"))) == 6


def test_a_video_that_kills_its_process_is_reported_and_the_rest_goes_on():
    items = ["1", "2", "__import__('os')._exit(9)", "3", "4", "5"]
    results = list(in_parallel(eval, items, 1, "test"))
    assert len(results) == 6 and dict(results).pop(items[2]) == "the process that decoded it died"
    assert all(result == int(item) for item, result in results if item != items[2])

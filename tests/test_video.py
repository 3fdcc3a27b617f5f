import csv
import multiprocessing
import os
import pickle
import re
import shutil
import time
from fractions import Fraction
from pathlib import Path

import av
import conftest
import numpy as np
import pytest
import torch
from conftest import KINDS
from PIL import Image

from common.clips import (
    Clips,
    Order,
    Views,
    dense,
    dense_parts,
    dense_test,
    eval_loader,
    train_loader,
    uniform,
    uniform_test,
)
from common.errors import VideoError
from common.io.decode import Video, _by_number, read_frames, read_windows
from common.io.workers import watched

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pictures(clip):
    """(T, C, H, W) tensor -> (T, H, W, C) array."""
    return clip.permute(0, 2, 3, 1).numpy()


# ---- exactness -----------------------------------------------------------------------------------


SLOW = "intra_refresh.mkv", "transport.ts"  # key frames that cannot be sought


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_full_decode(kinds, name, monkeypatch):
    path, full = kinds[name]
    monkeypatch.setattr(Video, "_salvage", None)  # the slow ways must not be needed
    rng = np.random.default_rng(1)
    with Video(path) as v:
        if name not in SLOW:
            v._source.decoders = v._source.decoders[:1]
        n = len(v)
        assert n == len(full) == len(v.times)
        assert (v.height, v.width) == full[0].shape[:2]
        assert v.times[0] == 0 and np.all(np.diff(v.times) > 0)
        windows = [np.arange(n), [0], [n - 1], [n - 1, 0, 0], [0, n // 2, n - 1]]
        windows += [np.sort(rng.integers(n, size=5)) for _ in range(6)]
        windows += [(rng.integers(n) + np.arange(8)) % n for _ in range(4)]
        for window in windows:
            clip = v.get(window)
            assert clip.dtype == torch.uint8 and clip.stride()[1] == 1  # THWC memory
            assert np.array_equal(pictures(clip), np.stack([full[i] for i in window])), window


def test_kinds_are_what_they_are_called(kinds, make):
    """The files do have the traits that make them hard, or the test above would prove nothing."""

    def scan(name):
        with av.open(kinds[name][0]) as container:
            stream = container.streams.video[0]
            return stream.frames, [p for p in container.demux(stream) if p.size]

    assert [make.number(f) for f in kinds["b_frames.mp4"][1]] == list(range(60))
    assert [p.pts for p in scan("b_frames.mp4")[1]] != sorted(p.pts for p in scan("b_frames.mp4")[1])
    assert len({p.pts for p in scan("raw.h264")[1]}) == 1  # None
    assert scan("edit_list.mp4")[0] == 60 and len(kinds["edit_list.mp4"][1]) == 10
    assert [make.number(f) for f in kinds["edit_list.mp4"][1]] == list(range(14, 24))
    assert scan("gaps.avi")[0] > 100
    with av.open(kinds["packed.avi"][0]) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert len(stamps) == 61 and stamps != sorted(stamps)
    steps = np.diff(sorted(p.pts for p in scan("variable_rate.mp4")[1]))
    assert steps.min() * 5 < steps.max()
    for name, turns in (("rotated_90.mp4", 1), ("rotated_180.mp4", 2), ("rotated_270.mp4", 3)):
        assert make.number(np.rot90(kinds[name][1][5], turns)) == 5  # what was shown was clockwise


def test_hidden_vp8_packets_do_not_count(kinds):
    """A VP8 packet without a picture: turn off show_frame of one packet in the middle."""
    path, full = kinds["vp8_hidden_frames.webm"]
    with av.open(path) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    data = Path(path).read_bytes()
    at = data.index(packets[30])
    changed = path.replace(".webm", "_30.webm")
    Path(changed).write_bytes(data[:at] + bytes([data[at] & ~0x10]) + data[at + 1 :])
    with av.open(changed) as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(decoded) == 59
    with Video(changed) as v:
        assert len(v) == 59
        assert np.array_equal(
            pictures(v.get([20, 29, 30, 50])), np.stack([decoded[i] for i in [20, 29, 30, 50]])
        )


def test_seeks_instead_of_decoding_everything(make, tmp_path, monkeypatch):
    path = make.write(tmp_path / "long.mp4", frames=200, gop=20, bf=2, sc_threshold=0)
    with Video(path) as v:
        runs = v._source._runs([v._source.pts[i] for i in (3, 10, 18, 21, 120, 199)])
        assert [len(needed) for _, needed in runs] == [4, 1, 1]  # 21 is not worth a seek
        assert [make.number(p) for p in pictures(v.get([199, 3, 120]))] == [199, 3, 120]


def test_resize_is_one_path_and_keeps_the_shape(kinds):
    path, full = kinds["rotated_90.mp4"]  # 64 x 96, upright
    with Video(path) as v:
        assert v.get([0, 3], short_side=32).shape == (2, 3, 48, 32)
        assert v.get([0], short_side=100).shape == (1, 3, 150, 100)
        assert v.get([0], short_side=64).shape == (1, 3, 96, 64)
        small = v.get([7, 2, 7], short_side=16)
    from torchvision.transforms.v2 import functional as TF

    wanted = TF.resize(torch.from_numpy(full[7].copy()).permute(2, 0, 1), [24, 16], antialias=True)
    assert (small[0].int() - wanted.int()).abs().max() <= 1
    assert torch.equal(small[0], small[2]) and torch.equal(small[1:2], read_frames(path, [2], short_side=16))


def test_a_picture_size_that_changes(make, tmp_path):
    a = make.write(tmp_path / "a.h264", frames=20, format="h264", size=(96, 64))
    b = make.write(tmp_path / "b.h264", frames=20, format="h264", size=(64, 48))
    (tmp_path / "ab.h264").write_bytes(Path(a).read_bytes() + Path(b).read_bytes())
    clip = read_frames(tmp_path / "ab.h264", [0, 19, 20, 39])
    assert clip.shape == (4, 3, 64, 96)
    assert [make.number(p) for p in pictures(clip)] == [0, 19, 0, 19]


def test_index_errors_are_the_callers(kinds):
    with Video(kinds["one_frame.mp4"][0]) as v:
        for wrong in ([1], [-1], []):
            with pytest.raises(IndexError):
                v.get(wrong)


def test_a_span_of_a_video(kinds, make):
    path, full = kinds["b_frames.mp4"]  # 25 frames a second
    cases = [((0, 0.4), 0, 10), ((0.4, 1.0), 10, 25), ((2.0, 99), 50, 60), ((1.001, 1.002), 26, 27)]
    cases += [((50, 60), 59, 60), ((-5, 0), 0, 1)]
    for span, first, end in cases:
        with Video(path, span) as v:
            assert (len(v), v.times[0]) == (end - first, first / 25)
            assert make.number(pictures(v.get([0]))[0]) == first
            assert make.number(pictures(v.get([len(v) - 1]))[0]) == end - 1


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "sp ace's [1] #%d.mp4", "视频-é.mp4", "-x.mp4"])
def test_names(kinds, tmp_path, monkeypatch, name):
    shutil.copy(kinds["three_frames.avi"][0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert read_frames(name, [0, 2]).shape == (2, 3, 64, 96)


def test_a_name_that_is_not_utf8(kinds, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.avi"
    shutil.copy(kinds["three_frames.avi"][0], path)
    assert read_frames(os.fsdecode(path), [2]).shape == (1, 3, 64, 96)


def test_tags_that_are_not_utf8(make, tmp_path):
    path = tmp_path / "tags.avi"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        out.metadata["title"] = "XXXXXXXX"
        for i in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(make.picture(i), format="rgb24")))
        out.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"XXXXXXXX", b"\xe9\xff\xfe\xe9\xe9\xe9\xe9\xe9"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert read_frames(path, [0, 2]).shape[0] == 2


def test_a_folder_of_pictures(make, tmp_path):
    for i in range(12):  # without leading zeros: the order is that of the numbers
        Image.fromarray(make.picture(i)).save(tmp_path / f"img_{i + 1}.png")
        Image.fromarray(make.picture(99)).save(tmp_path / f"flow_x_{i + 1}.png")
    (tmp_path / "._img_1.png").write_bytes(b"x")
    Image.fromarray(make.picture(12)).convert("L").save(tmp_path / "img_13.jpg")
    with Video(tmp_path) as v:
        assert (len(v), v.fps, v.width, v.height) == (13, 25, 96, 64)
        assert [make.number(p) for p in pictures(v.get([12, 0, 10, 1]))] == [12, 0, 10, 1]
        assert np.array_equal(pictures(v.get([3]))[0], make.picture(3))
        assert v.get([0, 12], short_side=32).shape == (2, 3, 32, 48)
    with Video(tmp_path, fps=10, span=(0.5, 1)) as v:
        assert len(v) == 5 and v.times[0] == 0.5
    (tmp_path / "img_11.png").write_bytes((tmp_path / "img_11.png").read_bytes()[:99])
    assert [make.number(p) for p in pictures(read_frames(tmp_path, [9, 10, 11]))] == [9, 9, 11]


ORDERS = {
    "a size behind": [f"img_{i:05d}_640x480.png" for i in range(12)],
    "a time behind": [f"frame{i + 1:04d}_t{i * 0.08:.2f}s.png" for i in range(40)],
    "a time before": [f"{1672531200 + 41 * i}_{i}.jpg" for i in range(12)],
    "a checksum before": [f"{i * 7919 % 100003}_{i}.jpg" for i in range(12)],
    "a checksum behind": [f"{i}_{i * 7919 % 100003:05d}.png" for i in range(12)],
    "checksums with letters": [f"{i}_{i * 7919 % 65521:x}.png" for i in range(12)],
    "letters before": [f"{i * 7919 % 65521:x}_{i}.png" for i in range(12)],
    "without zeros": [f"img{i}.jpg" for i in range(120)],
    "a number of the video": [f"v12_g03_{i}.jpg" for i in range(12)],
    "two parts": [f"part{p}_{i}.jpg" for p in (1, 2) for i in (9, 10, 11)],
    "no numbers": ["a.jpg", "b.jpg", "c.jpg"],
}


@pytest.mark.parametrize("case", ORDERS)
def test_pictures_are_ordered_by_the_number_that_counts(make, tmp_path, case):
    names = ORDERS[case]
    for i, name in enumerate(names):
        Image.fromarray(make.picture(i)).save(tmp_path / name)
    with Video(tmp_path) as v:
        assert [make.number(p) for p in pictures(v.get(range(len(v))))] == list(range(len(names)))
    assert _by_number(sorted(names)) == _by_number(names[::-1]) == names


def test_pictures_of_flowers_are_no_flow(make, tmp_path):
    for i in range(3):
        Image.fromarray(make.picture(i)).save(tmp_path / f"flower_{i}.png")
        for name in ("flow_x_{}", "flow_y_{}", "Flow_{}", "flowx_{}"):
            Image.fromarray(make.picture(99)).save(tmp_path / f"{name.format(i)}.png")
    assert [make.number(p) for p in pictures(read_frames(tmp_path, [0, 1, 2]))] == [0, 1, 2]


# ---- files that are cut short, damaged, or no video ----------------------------------------------


def good_frames(make, path):
    """Numbers of the frames that decode in order from the start; None where nothing opens."""
    try:
        return [make.number(frame) for frame in make.full_decode(path)]
    except (av.FFmpegError, IndexError):
        return None


@pytest.mark.parametrize(
    "name", ["faststart.mp4", "b_frames.mp4", "fragmented.mp4", "b_frames.mkv", "mpeg4.avi"]
)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.8, 0.97])
def test_a_file_cut_short(kinds, make, tmp_path, name, share):
    """Either at least half is there, and the last good frame stands in, or the reason is told."""
    path = make.cut(kinds[name][0], tmp_path / name, share)
    good = good_frames(make, path)
    try:
        with Video(path) as v:
            n = len(v)
            seen = [make.number(p) for p in pictures(v.get(np.arange(n)))]
            # Alone, the last one may come: a damaged frame that nothing refers to is skipped.
            assert make.number(pictures(v.get([n - 1]))[0]) in (good[-1], n - 1)
    except VideoError as error:
        reasons = "only .* of |Invalid data|no (frames|video stream)|End of file"
        assert re.search(reasons, str(error))
        assert not good or len(good) < 30 and not name.endswith("mkv")
        return
    assert seen == good + [good[-1]] * (n - len(good))
    assert len(good) >= 30 or name in ("b_frames.mkv", "fragmented.mp4")  # no count in the header


def test_cut_short_in_the_middle_of_the_data(make, tmp_path):
    """A known place: a faststart file of 60 frames of which some packets are whole."""
    path = make.write(tmp_path / "a.mp4", movflags="faststart", bf=0)
    with av.open(path) as container:
        ends = [p.pos + p.size for p in container.demux(video=0) if p.size]
    for whole, wanted in ((45, 45), (31, 31), (20, None)):
        data = Path(path).read_bytes()[: ends[whole - 1]]
        (tmp_path / "cut.mp4").write_bytes(data)
        if wanted is None:
            with pytest.raises(VideoError, match="^only 20 of 60 frames are in the file$"):
                read_frames(tmp_path / "cut.mp4", [0])
            with Video(tmp_path / "cut.mp4", min_share=0.2) as v:
                assert len(v) == 20
        else:
            with Video(tmp_path / "cut.mp4") as v:
                assert len(v) == wanted
                assert make.number(pictures(v.get([wanted - 1]))[0]) == wanted - 1


def test_bit_rot(make, tmp_path):
    """Noise over the packets from frame 40 (or 10) on: the frames before it are exact."""
    path = make.write(tmp_path / "a.mp4", bf=0)
    full = make.full_decode(path)
    with av.open(path) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for first in (40, 10):
        data = bytearray(Path(path).read_bytes())
        for at, size in packets[first:]:
            data[at : at + size] = b"\xff" * size
        (tmp_path / "rot.mp4").write_bytes(data)
        if first == 40:
            with Video(tmp_path / "rot.mp4") as v:
                clip = pictures(v.get([3, 39, 40, 55]))
                assert [make.number(p) for p in clip] == [3, 39, 39, 39]
                assert np.array_equal(clip[1], full[39]) and np.array_equal(clip[3], full[39])
        else:
            with pytest.raises(VideoError, match="^only 10 of 60 frames decode: "):
                read_frames(tmp_path / "rot.mp4", [0, 55])


def damage(path, out, numbers):
    """Overwrite the packets `numbers` of a video by 0xff. Returns out as a str."""
    data, end = bytearray(Path(path).read_bytes()), 0
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for k, packet in enumerate(packets):
        at = data.index(packet, end)
        end = at + len(packet)
        if k in numbers:
            data[at:end] = b"\xff" * len(packet)
    Path(out).write_bytes(data)
    return str(out)


def decodable(path, damaged):
    """dict position -> uint8 (H, W, 3) of the frames that a decoder gives that goes on after an error."""
    frames = {}
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    with av.open(damaged) as container:
        context = container.streams.video[0].codec_context
        context.thread_count = 1
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for packet, stamp in zip(packets, stamps, strict=True):
            packet.pts = sorted(stamps).index(stamp)  # damage changes the stamps that libavformat guesses
        for packet in [*packets, None]:
            try:
                decoded = context.decode(packet)
            except av.FFmpegError:
                continue
            frames |= {frame.pts: frame.to_ndarray(format="rgb24", threads=1) for frame in decoded}
    return frames


CODECS = {
    "h264.mp4": dict(bf=0),
    "h264_b.mp4": dict(bf=3),
    "h264_b.mkv": dict(bf=3),
    "h264.avi": dict(bf=0),
    "h265.mp4": {"codec": "libx265", "x265-params": "log-level=none"},
    "mpeg4.avi": dict(codec="mpeg4"),
    "mpeg4_b.mp4": dict(codec="mpeg4", bf=2, b_strategy=0),
    "mpeg2.mkv": dict(codec="mpeg2video"),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "vp8.webm": {"codec": "libvpx", "cpu-used": 8},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": 8},
    "av1.mp4": dict(codec="libsvtav1", preset=12),
    "ffv1.mkv": dict(codec="ffv1"),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_decoder_goes_on_after_an_error(make, tmp_path, name):
    path, rng = make.write(tmp_path / name, frames=100, gop=25, **CODECS[name]), np.random.default_rng(4)
    for k in (60, 20, 0):
        damaged = damage(path, tmp_path / f"{k}_{name}", [k])
        if (k, name) == (0, "h264.avi"):  # the only parameter sets are lost, and av.open finds no codec
            with pytest.raises(VideoError, match="Invalid data"):
                read_frames(damaged, [0])
            continue
        frames = decodable(path, damaged)
        places = [max([j for j in frames if j <= i], default=min(frames)) for i in range(100)]
        assert 75 <= len(frames) < 100
        with Video(damaged) as v:
            assert len(v) == 100
            windows = [np.arange(100), np.arange(k, min(k + 30, 100)), [99, 0, k]]
            for window in windows + [np.sort(rng.integers(100, size=5)) for _ in range(6)]:
                wanted = np.stack([frames[places[i]] for i in window])
                assert np.array_equal(pictures(v.get(window)), wanted), (k, window)
            assert v.stand_ins == set(range(100)) - set(frames)
        with Video(damaged, min_share=1.0) as v, pytest.raises(VideoError) as caught:
            v.get(range(100))
        assert str(caught.value).startswith(f"only {len(frames)} of 100 frames decode: ")


@pytest.mark.parametrize("first", [0, 25, 50])
def test_a_video_is_unreadable_below_min_share_wherever_the_damage_is(make, tmp_path, first):
    path = make.write(tmp_path / "a.avi", frames=100, codec="mjpeg", pix_fmt="yuvj420p")
    with Video(damage(path, tmp_path / "half.avi", range(first, first + 50))) as v:
        seen = [make.number(p) for p in pictures(v.get(range(100)))]
        stand_in = first - 1 if first else 50
        assert seen == [stand_in if first <= i < first + 50 else i for i in range(100)]
        assert v.stand_ins == set(range(first, first + 50))
    less = damage(path, tmp_path / "less.avi", {*range(first, first + 50), (first + 50) % 100})
    with pytest.raises(VideoError, match="^only 49 of 100 frames decode: Invalid data"):
        read_frames(less, [first + 1])
    there = (first + 70) % 100
    assert make.number(pictures(read_frames(less, [there]))[0]) == there  # what is there is given


def test_stand_ins_of_a_span(make, tmp_path):
    path = make.write(tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p")  # 25 frames a second
    with Video(damage(path, tmp_path / "b.avi", [20, 30]), span=(0.8, 1.6)) as v:
        assert [make.number(p) for p in pictures(v.get([0, 1, 10]))] == [19, 21, 29]
        assert v.stand_ins == {0, 10}


def test_counted_frames_stay_in_their_places_after_damage(make, tmp_path):
    """Where time stamps are guessed, a frame that is lost must not move the others."""
    for name, options in (("h264.avi", dict(bf=2)), ("mpeg4.avi", dict(codec="mpeg4", bf=2, b_strategy=0))):
        path = make.write(tmp_path / name, frames=100, gop=10, **options)
        for k in (31, 62, 99):
            with Video(damage(path, tmp_path / f"{k}_{name}", [k])) as v:
                seen = [make.number(p) for p in pictures(v.get(range(100)))]
                assert 1 <= len(v.stand_ins) <= 3
            wrong = [i for i in range(100) if seen[i] != i]
            assert len(wrong) < 10 and all(abs(i - k) < 10 for i in wrong)  # its group at most


def test_tiny_packets_are_frames(make, tmp_path):
    """A P-frame of 16 x 16 pixels in which nothing moves has 8 bytes; what XviD sends for none has 7."""
    path = str(tmp_path / "a.avi")
    with av.open(path, "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(30):
            grey = np.full((16, 16, 3), 90, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        out.mux(stream.encode())
    with av.open(path) as container:
        assert min(packet.size for packet in container.demux(video=0) if packet.size) <= 8
    assert read_frames(path, range(30)).shape[0] == 30 == len(make.full_decode(path))


def test_a_folder_with_damaged_pictures(make, tmp_path):
    for i in range(12):
        Image.fromarray(make.picture(i)).save(tmp_path / f"{i:02}.png")
    whole = (tmp_path / "05.png").read_bytes()
    (tmp_path / "00.png").write_bytes(b"")
    (tmp_path / "05.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "06.png").write_bytes(b"<html>404</html>")
    with Video(tmp_path) as v:
        assert (len(v), v.width, v.height) == (12, 96, 64)
        seen = [make.number(p) for p in pictures(v.get(range(12)))]
        assert seen == [1, 1, 2, 3, 4, 4, 4, 7, 8, 9, 10, 11] and v.stand_ins == {0, 5, 6}
    with Video(tmp_path, min_share=1.0) as v:
        assert make.number(pictures(v.get([7]))[0]) == 7
        with pytest.raises(VideoError, match="^only 9 of 12 frames decode: "):
            v.get([7, 6])
    for i in range(12):
        (tmp_path / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(VideoError, match="cannot identify image file"):
        read_frames(tmp_path, [0])


def test_a_frame_that_is_not_there(make, tmp_path):
    """One frame marked "not coded" (MPEG-4 has a bit for it): the one before it stands in."""
    path = make.write(tmp_path / "a.mp4", codec="mpeg4", bf=1, b_strategy=0, gop=30)
    with av.open(path) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        places = {pts: i for i, pts in enumerate(sorted(p.pts for p in packets))}
        packet, late = packets[4], packets[3]
        assert packet.pts < late.pts  # a B-frame
    data, hole = bytearray(Path(path).read_bytes()), places[packet.pts]
    assert data[packet.pos : packet.pos + 4] == b"\0\0\1\xb6" and packet.size > 8
    data[packet.pos + 5] &= ~0x20  # before it: 2 bits of type, 1 of seconds, 1, 5 of time, 1
    Path(path).write_bytes(data)
    assert [make.number(f) for f in make.full_decode(path)] == [i for i in range(60) if i != hole]
    with Video(path) as v:
        seen = [make.number(p) for p in pictures(v.get(range(hole - 2, hole + 3)))]
        assert seen == [hole - 2, hole - 1, hole - 1, hole + 1, hole + 2]


def test_one_frame_of_a_truncated_avi(make, tmp_path):
    path = make.write(tmp_path / "a.avi", codec="mpeg4", bf=0)
    with av.open(path) as container:
        end = next(p.pos + p.size for p in container.demux(video=0))
    (tmp_path / "cut.avi").write_bytes(Path(path).read_bytes()[: end + 8])
    with pytest.raises(VideoError, match="only 1 of 60 frames"):
        read_frames(tmp_path / "cut.avi", [0])


# ---- odd files -----------------------------------------------------------------------------------


def write_grey(path, codec, pix_fmt, frames=30):
    """Grey pictures that carry their number; with a palette, of which 0 is black and 255 is white."""
    palette = np.random.default_rng(0).integers(0, 255, (256, 4), dtype=np.uint8)  # ARGB
    palette[0], palette[255] = (255, 0, 0, 0), 255
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        stream.codec_context.gop_size = 10
        for i in range(frames):
            grey = conftest.picture(i)[..., 0]
            picture = (grey, palette) if pix_fmt == "pal8" else grey
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pix_fmt)))
        out.mux(stream.encode())


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("raw.avi", "rawvideo", "pal8"),
        ("raw.mov", "rawvideo", "pal8"),
        ("smc.mov", "smc", "pal8"),
        ("msrle.mov", "msrle", "pal8"),
        ("msrle.avi", "msrle", "pal8"),
        ("qtrle.mov", "qtrle", "gray"),
        ("raw_grey.mov", "rawvideo", "gray"),
        ("png.mov", "png", "pal8"),
    ],
)
def test_palettes(make, tmp_path, name, codec, pix_fmt):
    """The palette may come with the first packet only, which a seek leaves out."""
    write_grey(tmp_path / name, codec, pix_fmt)
    with av.open(str(tmp_path / name)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "pal8"
    full = make.full_decode(tmp_path / name)
    assert [make.number(p) for p in full] == list(range(30))
    for window in ([29], [12, 13, 25], range(30), [3]):
        assert np.array_equal(
            pictures(read_frames(tmp_path / name, window)), np.stack([full[i] for i in window])
        )


def test_key_frames_that_are_none(make, tmp_path):
    """Without its list of key frames every frame of an mp4 file counts as one."""
    path = make.write(tmp_path / "a.mp4", codec="mpeg4", gop=12)
    full = make.full_decode(path)
    Path(path).write_bytes(Path(path).read_bytes().replace(b"stss", b"free"))
    with av.open(path) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    for window in ([30], [5, 6, 50], range(60)):
        assert np.array_equal(pictures(read_frames(path, window)), np.stack([full[i] for i in window]))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.h264"])
@pytest.mark.parametrize("kind", ["all", "some", "none"])
def test_two_fields_are_one_frame(make, tmp_path, name, kind):
    """Interlaced H.264 whose fields come in packets of their own: all, every third frame's, or none."""
    is_field = dict(all=lambda i: True, some=lambda i: i % 3 == 0, none=lambda i: False)[kind]
    path = make.interlaced(tmp_path / name, 30, is_field)
    with av.open(path) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert len(packets) == dict(all=60, some=40, none=30)[kind]
    full = make.full_decode(path)
    assert [make.number(p) for p in full] == list(range(30))
    with Video(path, min_share=1.0) as v:
        assert len(v) == 30 and v.fps == pytest.approx(25) and np.allclose(v.times, np.arange(30) / 25)
        for window in (range(30), [29], [3, 4, 20], [17]):
            assert np.array_equal(pictures(v.get(window)), np.stack([full[i] for i in window]))
        assert not v.stand_ins


def test_interlaced_frames_are_sought(make, tmp_path):
    path = make.write(tmp_path / "b.mp4", bf=3, **{"x264-params": "interlaced=1"})
    with Video(path, min_share=1.0) as v:
        v._source.decoders = v._source.decoders[:1]
        assert not v._source.counted
        assert [make.number(p) for p in pictures(v.get([2, 11, 25]))] == [2, 11, 25]


@pytest.mark.parametrize("name, lost", [("a.ts", range(35, 60)), ("a.mp4", [24]), ("b.mp4", [25])])
def test_interlaced_files_cut_short_or_damaged(make, tmp_path, name, lost):
    """A frame without both of its fields is no frame, and the file is damaged."""
    path = make.interlaced(tmp_path / name, 30, lambda i: True)
    path = (
        make.cut(path, tmp_path / "c.ts", 0.6) if name == "a.ts" else damage(path, tmp_path / "c.mp4", lost)
    )
    with Video(path) as v:
        seen = [make.number(p) for p in pictures(v.get(range(len(v))))]
        assert seen[:16] == [i for i in range(30) if {2 * i, 2 * i + 1}.isdisjoint(lost)][:16]
    if name != "a.ts":
        with pytest.raises(VideoError, match="^only 29 of 30 frames are in the file$"):
            Video(path, min_share=1.0).__enter__()


def shown(full, a, b, c, d):
    """Pictures as a display matrix shows them: pixel (x, y) at (a x + c y, b x + d y)."""
    height, width = full.shape[1:3]
    y, x = np.mgrid[:height, :width]
    column, row = a * x + c * y, b * x + d * y
    out = np.empty((len(full), np.ptp(row) + 1, np.ptp(column) + 1, 3), np.uint8)
    out[:, row - row.min(), column - column.min()] = full
    return out


@pytest.mark.parametrize(
    "matrix",
    [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)]
    + [(0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)],
)
def test_display_matrices(make, tmp_path, matrix):
    """The eight symmetries of a square, in the file and by EXIF."""
    path = make.write(tmp_path / "a.mp4", frames=10)
    full = np.stack(make.full_decode(path))
    make.display(path, *matrix)
    wanted = shown(full, *matrix)
    with Video(path) as v:
        assert (v.height, v.width) == wanted.shape[1:3]
        assert np.array_equal(pictures(v.get([7, 2])), wanted[[7, 2]])
        assert v.get([0], short_side=32).shape[2:] == ((48, 32) if matrix[1] else (32, 48))
    orientations = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1)}
    orientations |= {5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}
    exif = Image.Exif()
    exif[0x0112] = next(number for number, other in orientations.items() if other == matrix)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(full[i]).save(folder / f"{i}.png", exif=exif)
    with Video(folder) as v:
        assert (v.height, v.width) == wanted.shape[1:3]
        assert np.array_equal(pictures(v.get([1, 0])), wanted[[1, 0]])


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_other_matrices_are_ignored(make, tmp_path, matrix):
    path = make.write(tmp_path / "a.mp4", frames=3)
    full = np.stack(make.full_decode(path))
    make.display(path, *matrix)
    assert np.array_equal(pictures(read_frames(path, range(3))), full)


def test_side_data_that_av_does_not_know(make, tmp_path):
    """The frames of TIFF pictures have EXIF data, which av has no name for."""
    write_grey(tmp_path / "a.mov", "tiff", "gray", 3)
    assert [make.number(p) for p in pictures(read_frames(tmp_path / "a.mov", range(3)))] == [0, 1, 2]


def test_damaged_exif(make, tmp_path):
    Image.fromarray(make.picture(3)).save(tmp_path / "1.jpg", exif=b"Exif\0\0XX*\0garbage")
    assert make.number(pictures(read_frames(tmp_path, [0]))[0]) == 3


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_the_best_stream_is_taken(make, tmp_path, name):
    def write(*streams):
        """(codec, frames, width, disposition) of each."""
        with av.open(str(tmp_path / name), "w") as out:
            targets = []
            for codec, _, width, disposition in streams:
                stream = out.add_stream(codec, rate=25)
                stream.width, stream.height, stream.disposition = width, 64, disposition
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                targets.append(stream)
            for i in range(30):
                for stream, (_, frames, width, _) in zip(targets, streams, strict=True):
                    if i < frames:
                        frame = av.VideoFrame.from_ndarray(make.picture(i, width, 64), format="rgb24")
                        out.mux(stream.encode(frame))
            for stream in targets:
                out.mux(stream.encode())
        with Video(tmp_path / name) as v:
            assert make.number(pictures(v.get([len(v) - 1]))[0]) == len(v) - 1
            return len(v), v.width

    cover = av.stream.Disposition.attached_pic
    assert write(("mjpeg", 1, 320, 0), ("libx264", 30, 96, 0)) == (30, 96)  # one picture first
    assert write(("mjpeg", 1, 320, cover), ("libx264", 30, 96, 0)) == (30, 96)
    assert write(("libx264", 30, 96, 0), ("mjpeg", 1, 320, 0)) == (30, 96)
    assert write(("libx264", 20, 96, 1), ("libx264", 30, 160, 1)) == (20, 96)  # no other is better
    if name != "a.avi":  # which marks none
        assert write(("libx264", 30, 160, 0), ("libx264", 20, 96, 1)) == (20, 96)  # the default


def test_codecs_without_a_decoder(make, tmp_path):
    mp4 = Path(make.write(tmp_path / "a.mp4", frames=5)).read_bytes()
    avi = Path(make.write(tmp_path / "a.avi", frames=5, codec="mpeg4")).read_bytes()
    for name, data, reason in (
        ("b.mp4", mp4.replace(b"avc1", b"evc1"), r"^no decoder for codec evc \(evc1 / 0x31637665\)$"),
        ("c.mp4", mp4.replace(b"avc1", b"xyz9"), r"^no decoder for codec none \(xyz9 / 0x397A7978\)$"),
        ("b.avi", avi.replace(b"FMP4", b"XYZ9"), r"^no decoder for codec none \(XYZ9 / 0x395A5958\)$"),
    ):
        (tmp_path / name).write_bytes(data)
        assert_reason(tmp_path / name, reason)
    assert av.logging.get_level() is None


def test_texts_and_pictures_are_no_videos(make, tmp_path):
    (tmp_path / "notes.txt").write_text("Some notes on the weather.\n" * 200)
    (tmp_path / "a.nfo").write_text("\x1b[31mred\n")
    for name in ("notes.txt", "a.nfo"):
        assert_reason(tmp_path / name, "^a text, not a video$")
    image = Image.fromarray(make.picture(5))
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tiff", "a.ico", "a.gif", "a.avif", "a.jp2", "a.pdf"):
        if Image.registered_extensions().get(name[1:]) in Image.SAVE:
            image.save(tmp_path / name)
            assert_reason(tmp_path / name, "^a picture, not a video$")
    image.save(tmp_path / "a.mp4", format="jpeg")
    assert_reason(tmp_path / "a.mp4", "^a picture, not a video$")
    first, *others = [Image.fromarray(make.picture(i)) for i in range(4)]
    first.save(tmp_path / "moving.gif", save_all=True, append_images=others, duration=40)
    assert [make.number(p) for p in pictures(read_frames(tmp_path / "moving.gif", range(4)))] == [0, 1, 2, 3]


def test_16_bits_of_grey(tmp_path):
    grey = (np.arange(96 * 64).reshape(64, 96) * 10 % 65536).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "1.png")
    picture = pictures(read_frames(tmp_path, [0]))[0]
    assert picture.dtype == np.uint8 and np.array_equal(picture, (grey // 256)[..., None].repeat(3, 2))


def test_the_size_limit_is_that_of_the_resized_pictures_too(make, tmp_path):
    path = make.write(tmp_path / "a.mkv", 2, "ffv1", (4000, 2), pix_fmt="yuv444p")
    with Video(path) as v:
        assert v.get([0]).shape == (1, 3, 2, 4000) and v.get([0], short_side=32).shape == (1, 3, 32, 64000)
        with pytest.raises(VideoError, match="^pictures of 512000 x 256 pixels are refused$"):
            v.get([0], short_side=256)


@pytest.mark.parametrize("bf", [0, 1, 3])
def test_an_avi_remuxed_by_copy_is_whole(make, tmp_path, bf):
    """Its clock is finer than a frame, so that its header counts 24 ticks for the last one."""
    path, source = str(tmp_path / "a.avi"), make.write(tmp_path / "a.mp4", bf=bf)
    with av.open(source) as old, av.open(path, "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        to_start_codes = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream, target)
        for packet in old.demux(stream):
            for converted in to_start_codes.filter(packet if packet.size else None):
                converted.stream = target
                new.mux(converted)
    with av.open(path) as container:
        assert container.streams.video[0].frames == 24 * 60
    with Video(path, min_share=1.0) as v:
        assert len(v) == 60 and np.allclose(v.times, np.arange(60) / 25) and v.fps == pytest.approx(25)
        assert [make.number(p) for p in pictures(v.get(range(60)))] == list(range(60))
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="^only .* of 60 frames are in the file$"):
        Video(path, min_share=1.0).__enter__()


def test_stamps_in_decoding_order(make, tmp_path):
    """An AVI with B-frames remuxed to mp4: as its frames are decoded so they are stamped."""
    source, path = make.write(tmp_path / "a.avi", bf=3), str(tmp_path / "a.mp4")
    with av.open(source) as old, av.open(path, "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.size:
                packet.stream = target
                new.mux(packet)
    assert [make.number(p) for p in pictures(read_frames(path, range(60)))] == list(range(60))


def test_the_rate_does_not_count_jumps_of_hours(make, tmp_path):
    path = make.write(tmp_path / "a.mkv", times=np.r_[np.arange(30) * 40, np.arange(30) * 40 + 30_000_000])
    with Video(path) as v:
        assert v.times[-1] == pytest.approx(30_001.16) and v.fps == pytest.approx(25, rel=1e-6)
        assert [make.number(p) for p in pictures(v.get([29, 30, 59]))] == [29, 30, 59]


def test_what_is_no_video(make, kinds, tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"")
    assert_reason(path, "Invalid data|End of file")
    path.write_text("<!DOCTYPE html><html><body>404</body></html>" * 50)
    assert_reason(path, "Invalid data")
    path.write_bytes(os.urandom(5000))
    assert_reason(path, "Invalid data|no video stream|no frames|only")
    assert_reason(tmp_path / "missing.mp4", "^no such file$")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    assert_reason(tmp_path / "link.mp4", "^no such file$")
    (tmp_path / "folder.mp4").mkdir()
    assert_reason(tmp_path / "folder.mp4", "^a folder without pictures$")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert_reason(tmp_path / "pipe.mp4", "^not a file$")
    for name in (
        "http://127.0.0.1/a.mp4",
        f"concat:{kinds['three_frames.avi'][0]}|b.avi",
        "pipe:0",
    ):
        assert_reason(name, "^no such file$")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{kinds['three_frames.avi'][0]}'\n")
    assert_reason(tmp_path / "list.mp4", "list of other files|Operation not permitted|Invalid")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        for n in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 8000, 1024 * n
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert_reason(tmp_path / "sound.mp4", "^no video stream$")


def assert_reason(path, pattern):
    with pytest.raises(VideoError, match=pattern) as caught:
        read_frames(path, [0])
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 250


def test_absurd_sizes_are_refused(make, tmp_path, monkeypatch):
    path = make.write(tmp_path / "a.mp4", frames=3)
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    data[at : at + 4] = (65535).to_bytes(2, "big") * 2
    (tmp_path / "header.mp4").write_bytes(data)
    with av.open(str(tmp_path / "header.mp4")) as container:
        width = container.streams.video[0].codec_context.width
    if width == 65535:  # libavformat believes the header
        assert_reason(tmp_path / "header.mp4", "65535 x 65535 pixels are refused")
    monkeypatch.setattr("common.io.decode.MAX_PIXELS", 96 * 64 - 1)
    assert_reason(path, "^pictures of 96 x 64 pixels are refused$")
    Image.new("RGB", (96, 64)).save(tmp_path / "1.png")
    assert_reason(tmp_path, "96 x 64 pixels are refused")


def test_a_closed_video_leaves_no_open_file(kinds):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name in ("b_frames.mp4", "raw.h264", "packed.avi"):
        for _ in range(5):
            read_frames(kinds[name][0], [0, 2])
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


ODD = SHARED / "odd_videos"
DAMAGED = {"corrupted.mp4": (50, 1), "no_timescale.mp4": (182, 12)}  # frames; of those, stand-ins
ROWS = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.exists() else []


@pytest.mark.skipif(not ROWS, reason="../shared/data/odd_videos is absent")
@pytest.mark.parametrize("row", ROWS, ids=[row["path"].split("/")[-1] for row in ROWS])
def test_odd_videos(make, row):
    path, outcome = ODD / row["path"], row["outcome"]
    if outcome == "no_video_stream":
        assert_reason(path, "^no video stream$")
    elif outcome == "zero_frames":
        assert_reason(path, "^no frames$")
    elif outcome.startswith("open_fails"):
        assert_reason(path, "Invalid data")
    elif path.name in DAMAGED:  # the row counts up to the first error
        n, stand_ins = DAMAGED[path.name]
        with Video(path) as v:
            v.get(range(len(v)))
            assert len(v) == n and len(v.stand_ins) == stand_ins
    elif outcome.startswith("error_after"):
        with pytest.raises(VideoError, match="only .* of .* frames"), Video(path) as v:
            v.get(range(len(v)))
    else:
        full, rng = make.full_decode(path), np.random.default_rng(2)
        assert len(full) == int(row["decoded"])
        with Video(path) as v:
            assert len(v) == len(full)
            for _ in range(4):
                window = rng.integers(len(v), size=4)
                assert np.array_equal(pictures(v.get(window)), np.stack([full[i] for i in window]))


UCF = sorted((SHARED / "ucf101").glob("**/*.avi"))


@pytest.mark.skipif(not UCF, reason="../shared/data/ucf101 is absent")
@pytest.mark.parametrize("path", UCF[:12], ids=lambda path: path.stem)
def test_ucf101_files(make, path):
    """Some are packed bitstreams, whose frames carry each other's time stamps."""
    full, rng = make.full_decode(path), np.random.default_rng(3)
    with Video(path) as v:
        assert len(v) == len(full)
        window = np.sort(rng.integers(len(v), size=6))
        assert np.array_equal(pictures(v.get(window)), np.stack([full[i] for i in window]))


# ---- samplers ------------------------------------------------------------------------------------


def test_dense():
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(200):
        window = dense(20, 4, 4, rng)
        assert window.dtype == np.int64 and list(np.diff(window)) == [4, 4, 4]
        starts.add(int(window[0]))
    assert starts == {0, 1, 2, 3, 4}  # 20 - 4 * 4 + 1 places
    assert list(dense(3, 4, 2, rng)) == [0, 2, 1, 0]  # 0 2 4 6, looped
    assert list(dense(1, 3, 8, rng)) == [0, 0, 0]


def test_dense_test():
    assert dense_test(20, 4, 2, 4).tolist() == [[s, s + 2, s + 4, s + 6] for s in (0, 4, 8, 12)]
    assert dense_test(20, 2, 2, 1).tolist() == [[8, 10]]
    assert dense_test(3, 4, 1, 2).tolist() == [[0, 1, 2, 0]] * 2
    assert dense_test(1, 2, 8, 10).tolist() == [[0, 0]] * 10


def test_uniform():
    assert uniform(8, 4).tolist() == [1, 3, 5, 7]
    assert uniform(9, 3).tolist() == [1, 4, 7]
    assert uniform(2, 4).tolist() == [0, 0, 1, 1]
    assert uniform(1, 3).tolist() == [0, 0, 0]
    rng = np.random.default_rng(0)
    drawn = np.stack([uniform(12, 3, rng) for _ in range(200)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def paper_dense(T, N, tau, k):
    """Appendix 1 of Mutual Modality Learning: the frames of its k dense clips, T' = T - tau (N - 1)."""
    room = T - tau * (N - 1)
    if k == 1:
        return [[room // 2 + tau * j for j in range(N)]]
    return [[int(Fraction(i * room, k) + tau * j) for j in range(N)] for i in range(k)]


def paper_uniform(T, N, m):
    """The same for m uniform clips, with i / m in place of the misprinted i m."""
    return [[int((j + Fraction(i, m)) * T / N) for j in range(N)] for i in range(m)]


def test_dense_parts_by_hand():
    # 20 frames, 4 at stride 3: T' = 11, parts begin at 0, 5.5 or at 0, 3.67, 7.33; the only one at 5.
    assert dense_parts(20, 4, 3, 2).tolist() == [[0, 3, 6, 9], [5, 8, 11, 14]]
    assert dense_parts(20, 4, 3, 3).tolist() == [[0, 3, 6, 9], [3, 6, 9, 12], [7, 10, 13, 16]]
    assert dense_parts(20, 4, 3, 1).tolist() == [[5, 8, 11, 14]]
    assert dense_parts(20, 4, 3, 0).shape == (0, 4)
    assert dense_parts(10, 4, 3, 2).tolist() == [[0, 3, 6, 9]] * 2  # T' = 1
    assert dense_parts(3, 4, 1, 2).tolist() == [[0, 1, 2, 0]] * 2  # too short: looped
    assert dense_parts(1, 3, 8, 1).tolist() == [[0, 0, 0]]


def test_uniform_test_by_hand():
    assert uniform_test(20, 4, 1).tolist() == [[2, 7, 12, 17]]  # a single one: centres
    assert uniform_test(10, 4, 1).tolist() == [[1, 3, 6, 8]]
    assert uniform_test(1, 3, 1).tolist() == [[0, 0, 0]]
    assert uniform_test(20, 4, 2).tolist() == [[0, 5, 10, 15], [2, 7, 12, 17]]  # + 0.5 T / N = 2.5
    assert uniform_test(10, 4, 2).tolist() == [[0, 2, 5, 7], [1, 3, 6, 8]]
    assert uniform_test(20, 4, 0).shape == (0, 4)
    assert uniform_test(2, 4, 2).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert uniform_test(1, 3, 3).tolist() == [[0, 0, 0]] * 3


@pytest.mark.parametrize("T", [1, 2, 5, 8, 28, 29, 30, 37, 64, 301])
@pytest.mark.parametrize("N, tau", [(8, 4), (16, 2), (5, 1), (1, 3)])
def test_appendix_1_as_printed(T, N, tau):
    for count in range(5):
        k_dense, m_uniform = dense_parts(T, N, tau, count), uniform_test(T, N, count)
        assert k_dense.dtype == m_uniform.dtype == np.int64
        assert k_dense.shape == m_uniform.shape == (count, N)
        if count == 1:  # as the code of MML and TSM: the centre of each part
            assert m_uniform.tolist() == [[(2 * part + 1) * T // (2 * N) for part in range(N)]]
        else:
            assert m_uniform.tolist() == paper_uniform(T, N, count)
        if T > tau * (N - 1):
            assert k_dense.tolist() == paper_dense(T, N, tau, count)
        assert (
            not count or 0 <= min(k_dense.min(), m_uniform.min()) <= max(k_dense.max(), m_uniform.max()) < T
        )


def test_together_asks_once(kinds):
    path, frames = kinds["b_frames.mp4"]
    with Video(path) as v:
        calls, get = [], v.get
        v.get = lambda *args: calls.append(args) or get(*args)
        clips = read_windows(v, [[7, 3], range(40, 43), np.array([3])])
    assert [len(clip) for clip in clips] == [2, 3, 1] and len(calls) == 1
    for clip, window in zip(clips, ([7, 3], [40, 41, 42], [3]), strict=True):
        assert np.array_equal(clip.permute(0, 2, 3, 1), np.stack([frames[i] for i in window]))


def test_order():
    order = Order(7, seed=3)
    first = [order[p] for p in range(21)]
    for d in range(3):
        assert sorted(i for i, _ in first[7 * d : 7 * d + 7]) == list(range(7))
        assert {draw for _, draw in first[7 * d : 7 * d + 7]} == {d}
    again = Order(7, seed=3)
    assert [again[p] for p in reversed(range(21))] == first[::-1]  # whatever the way through it
    assert [Order(7, seed=4)[p] for p in range(7)] != first[:7]


def test_order_takes_several_at_once():
    """Within a pass, across its end, of several passes; forwards, and again from an earlier place."""
    order, again = Order(7, seed=3), Order(7, seed=3)
    for first, count in ((0, 3), (3, 7), (13, 1), (14, 7), (20, 2), (5, 30), (700, 4), (2, 5), (6, 8)):
        found, each = order.take(first, count), [again[p][0] for p in range(first, first + count)]
        assert found.dtype == np.int64 and found.tolist() == each


# ---- data sets and batches -----------------------------------------------------------------------


class Videos:
    """What Clips and Views need of common.data.Videos."""

    def __init__(self, paths, labels, spans=None):
        self.paths, self.labels, self.spans = [str(p) for p in paths], labels, spans

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        return self.paths[i]

    def span(self, i):
        return self.spans and self.spans[i]


def sample_two(v, rng):
    start = rng.integers(len(v))
    return [(start + np.arange(3)) % len(v), dense(len(v), 2, 4, rng)]


def view_two(clips):
    a, b = clips
    noise = torch.randint(0, 255, (2, 2))
    return a[:, :, :8, :8].contiguous(), b.float().mean((2, 3)), noise


def sample_views(v):
    return list(dense_test(len(v), 2, 4, 1 + len(v) % 2))


def view_stack(clips):
    return torch.stack(clips)


@pytest.fixture(scope="module")
def library(make, tmp_path_factory):
    """Ten videos of 20 to 29 frames; number 3 is an error page, number 7 is missing."""
    folder = tmp_path_factory.mktemp("library")
    paths = [make.write(folder / f"{i}.mp4", frames=20 + i, size=(96, 64)) for i in range(10)]
    Path(paths[3]).write_text("<html>404</html>")
    os.remove(paths[7])
    return Videos(paths, np.arange(10, dtype=np.int64) * 10)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def test_clips_are_a_function_of_the_position(library):
    clips = Clips(library, sample_two, view_two, seed=5)
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    items = [clips[p] for p in range(30)]
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], state)
    torch.rand(3), np.random.rand()
    again = pickle.loads(pickle.dumps(Clips(library, sample_two, view_two, seed=5)))
    assert all(same(again[p], items[p]) for p in (29, 3, 17))
    other = Clips(library, sample_two, view_two, seed=6)
    assert not all(same(other[p], items[p]) for p in range(10))
    # The draws of one video differ from pass to pass: another window, other noise.
    index = items[0]["index"]
    noises = [item["views"][2] for item in items if item["index"] == index and not item["bad"]]
    assert len(noises) == 3 and not torch.equal(noises[0], noises[1])
    assert all(item["label"].dtype == torch.int64 for item in items)


def test_unreadable_videos_are_replaced_by_the_next_in_the_order(library):
    clips = Clips(library, sample_two, view_two, seed=5)
    order, named = Order(10, 5), set()
    for p in range(20):
        item, k = clips[p], 0
        while order[p + k][0] in (3, 7):
            assert item["bad"][k][0] == order[p + k][0] and item["bad"][k][1]
            named.add(order[p + k][0])
            k += 1
        assert len(item["bad"]) == k and item["index"] == order[p + k][0]
        assert item["label"] == 10 * item["index"]
        if k:  # another draw than the one that the stand-in has at its own place
            assert not same(item["views"], clips[p + k]["views"])
    assert named == {3, 7}
    hopeless = Clips(Videos([library.path(3)] * 4, np.zeros(4, np.int64)), sample_two, view_two, seed=0)
    with pytest.raises(VideoError, match="3.mp4: Invalid data"):
        hopeless[0]


def fails_in_sample(v, rng):
    raise ValueError("a bug in sample")


def fails_in_view(clips):
    raise IndexError("a bug in view")


def outside_in_sample(v, *rng):
    return [np.array([0, len(v)])]


def test_bugs_of_the_script_surface(library):
    with pytest.raises(IndexError, match="frames .* of a video of"):
        Clips(library, outside_in_sample, view_two, seed=5)[0]
    with pytest.raises(IndexError, match="frames .* of a video of"):
        Views(library, outside_in_sample, view_stack)[0]
    with pytest.raises(TypeError):
        Clips(library, lambda v, rng: None, view_two, seed=5)[0]
    with pytest.raises(ValueError, match="a bug in sample"):
        Clips(library, fails_in_sample, view_two, seed=5)[0]
    with pytest.raises(IndexError, match="a bug in view"):
        Clips(library, sample_two, fails_in_view, seed=5)[0]
    with pytest.raises(IndexError, match="a bug in view"):
        Views(library, sample_views, fails_in_view)[0]


class Fails:
    """A source of clips that raises `error` at `place`."""

    def __init__(self, videos, index, place, error):
        if place == "open":
            raise error
        self.place, self.error = place, error

    def __enter__(self):
        if self.place == "enter":
            raise self.error
        return self

    def __exit__(self, *_):
        pass

    def __len__(self):
        return 20

    def clips(self, windows, short_side=None):
        raise self.error


@pytest.mark.parametrize("place", ["open", "enter", "clips"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("no\ntraceback"), "TypeError: no"),
        (RuntimeError(), "RuntimeError"),
        (IndexError("list index out of range"), "list index out of range"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (VideoError("no frames"), "no frames"),
    ],
)
def test_a_video_is_unreadable_whatever_decoding_it_raises(library, place, error, reason):
    def opened(videos, index):
        return Fails(videos, index, place, error) if index == 2 else Video(videos.path(index))

    clips = Clips(library, sample_two, view_two, seed=5, open=opened)
    bad = {item for p in range(10) for item in clips[p]["bad"]}
    assert (2, reason) in bad and {i for i, _ in bad} == {2, 3, 7}
    item = Views(library, sample_views, view_stack, open=opened)[2]
    assert item["views"] is None and item["bad"] == reason


def test_without_workers_too_a_hung_disk_is_no_bad_video(library, monkeypatch):
    monkeypatch.setattr("common.io.workers.TIMEOUT", 1)

    def hangs(videos, index):
        time.sleep(60)

    clips = Clips(library, sample_two, view_two, seed=5, open=hangs)
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        next(watched(train_loader([(clips, 2)], 0, 1)))


def test_labels_and_spans(library, make):
    paths = [library.path(0), library.path(1)]
    many = np.array([[1, 0, 1], [0, 1, 0]], np.uint8)
    clips = Clips(Videos(paths, many, spans=[(0.2, 0.4), (0.0, 0.04)]), sample_two, lambda c: (c[0],), seed=0)
    items = [clips[p] for p in range(2)]
    for item in items:
        assert item["label"].dtype == torch.float32 and item["label"].tolist() == many[item["index"]].tolist()
        seen = {make.number(p) for p in pictures(item["views"][0])}
        assert seen <= (set(range(5, 10)) if item["index"] == 0 else {0})


def sources(library):
    a = Clips(library, sample_two, view_two, seed=5)
    b = Clips(library, sample_two, view_two, seed=6, short_side=32)
    return [(a, 2), (b, 3)]


def test_train_batches_are_the_same_for_any_workers_and_any_start(library):
    wanted = list(train_loader(sources(library), 0, 8))
    assert len(wanted) == 8 and any(part["bad"] for batch in wanted for part in batch)
    for a, b in wanted:
        assert a["views"][0].shape == (2, 3, 3, 8, 8) and b["views"][0].shape == (3, 3, 3, 8, 8)
        assert a["index"].dtype == a["label"].dtype == torch.int64
        assert torch.equal(a["label"], a["index"] * 10) and len(b["index"]) == 3
    assert same(list(train_loader(sources(library), 5, 8)), wanted[5:])
    for workers in (1, 2):
        torch.manual_seed(workers)
        loader = train_loader(sources(library), 3, 8, workers=workers)
        assert len(loader) == 5
        assert same(list(loader), wanted[3:])


def test_ranks_share_the_stream(library):
    one = list(train_loader([(Clips(library, sample_two, view_two, 5), 4)], 0, 5))
    halves = [
        list(train_loader([(Clips(library, sample_two, view_two, 5), 2)], 0, 5, rank=r, world=2))
        for r in range(2)
    ]
    for k in range(5):
        for key in ("index", "label"):
            joined = torch.cat([halves[r][k][0][key] for r in range(2)])
            assert torch.equal(joined, one[k][0][key])
        joined = [
            torch.cat(parts) for parts in zip(*(halves[r][k][0]["views"] for r in range(2)), strict=True)
        ]
        assert same(joined, list(one[k][0]["views"]))


def test_a_small_labelled_set_wraps_around(library):
    few = Videos([library.path(0), library.path(1)], np.array([4, 5]))
    (batch,) = next(iter(train_loader([(Clips(few, sample_two, view_two, 0), 5)], 0, 1)))
    assert sorted(set(batch["index"].tolist())) == [0, 1] and len(batch["index"]) == 5


def test_views_are_never_replaced(library):
    views = pickle.loads(pickle.dumps(Views(library, sample_views, view_stack)))
    for i in range(10):
        item = views[i]
        assert item["index"] == i and item["label"] == 10 * i
        if i in (3, 7):
            assert item["views"] is None and item["bad"]
        else:
            assert item["views"].shape == (1 + i % 2, 2, 3, 64, 96) and item["bad"] is None


def test_test_blocks_do_not_depend_on_the_ranks(library):
    views = Views(library, sample_views, view_stack)
    whole = list(eval_loader(views, block=3))
    assert [batch["index"].tolist() for batch in whole] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [batch["counts"].tolist() for batch in whole] == [[1, 2, 1], [0, 1, 2], [1, 0, 1], [2]]
    assert [i for i, _ in whole[1]["bad"] + whole[2]["bad"]] == [3, 7]
    assert [len(batch["views"]) for batch in whole] == [4, 3, 2, 2]
    for world in (2, 3, 5):
        shares = [list(eval_loader(views, 3, rank, world)) for rank in range(world)]
        dealt = [shares[k % world][k // world] for k in range(4)]
        assert same(dealt, whole) and sum(map(len, shares)) == 4
    assert same(list(eval_loader(views, 3, workers=2)), whole)
    rest = [whole[1], whole[2], whole[3]]
    assert same(list(eval_loader(views, 3, done={0})), rest)
    assert same(list(eval_loader(views, 3, 0, 2, done={0})), rest[::2])
    assert same(list(eval_loader(views, 3, 1, 2, done={0})), rest[1::2])
    assert not list(eval_loader(views, 3, done={0, 1, 2, 3}))
    broken = Views(Videos([library.path(3)], np.array([1])), sample_views, view_stack)
    (only,) = eval_loader(broken, 4)
    assert only["views"] is None and only["counts"].tolist() == [0]


def child(pipe, path):
    pipe.send(read_frames(path, [0, 5]).float().mean().item())


def test_reading_in_another_process(kinds):
    """Decoding in the parent first must not hang a child."""
    path = kinds["b_frames.mp4"][0]
    wanted = read_frames(path, [0, 5]).float().mean().item()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there, path))
    process.start()
    assert here.poll(60) and here.recv() == wanted
    process.join(10)


@pytest.mark.parametrize("error", [EOFError("ends"), ConnectionResetError(104, "reset by peer")])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error):
    def batches(error):
        yield 1
        raise error

    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        list(watched(batches(error)))
    with pytest.raises(type(error), match="Caught"):  # what the code of a view or sample raises
        list(watched(batches(type(error)("Caught it in DataLoader worker process 0."))))

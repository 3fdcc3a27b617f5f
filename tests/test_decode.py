"""Exact frames of files of every kind, of damaged ones, and of folders of pictures."""

import csv
import os
import re
import shutil
import wave
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import KINDS, cut, display, full_decode, interlaced, number, picture, write
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.errors import VideoError
from common.io.decode import Video, _by_number, read_frames, read_windows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ODD, UCF = SHARED / "odd_videos", sorted((SHARED / "ucf101").glob("**/*.avi"))


def pictures(clip):
    """(T, C, H, W) tensor -> (T, H, W, C) array."""
    return clip.permute(0, 2, 3, 1).numpy()


def numbers(video, indices=None):
    """The numbers that the frames `indices` of a Video or path carry, by default all."""
    if not isinstance(video, Video):
        with Video(video) as opened:
            return numbers(opened, indices)
    return [number(frame) for frame in video.get(range(len(video)) if indices is None else indices)]


def assert_exact(video, full, *windows):
    """The frames of each window are those of `full`, a list of uint8 (H, W, 3)."""
    for window in windows:
        clip = video.get(window)
        assert clip.dtype == torch.uint8 and clip.stride()[1] == 1  # THWC memory
        assert np.array_equal(pictures(clip), np.stack([full[i] for i in window])), window


def assert_refused(path, pattern, **options):
    """Opening the video or reading all of it ends with a sentence."""
    with pytest.raises(VideoError, match=pattern) as caught, Video(path, **options) as video:
        video.get(range(len(video)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 250


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


# ---- whole files ---------------------------------------------------------------------------------


NOT_SOUGHT = "intra_refresh.mkv", "transport.ts"  # their key frames cannot be sought


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_full_decode(kinds, name):
    path, full = kinds[name]
    n, rng = len(full), np.random.default_rng(1)
    windows = [np.arange(n), [0], [n - 1], [n - 1, 0, 0], [0, n // 2, n - 1]]
    windows += [np.sort(rng.integers(n, size=5)) for _ in range(6)]
    windows += [(rng.integers(n) + np.arange(8)) % n for _ in range(4)]
    with Video(path) as v:
        v._salvage = None  # it must not be needed
        if name not in NOT_SOUGHT:
            v._source.decoders = v._source.decoders[:1]
        assert len(v) == n == len(v.times) and (v.height, v.width) == full[0].shape[:2]
        assert v.times[0] == 0 and np.all(np.diff(v.times) > 0)
        assert_exact(v, full, *windows)


def test_kinds_are_what_they_are_called(kinds):
    """The files do have the traits that make them hard, or the test above would prove nothing."""

    def stamps(name):
        return [packet.pts for packet in packets_of(kinds[name][0])]

    def header(name):
        with av.open(kinds[name][0]) as container:
            return container.streams.video[0].frames

    assert [number(frame) for frame in kinds["b_frames.mp4"][1]] == list(range(60))
    assert stamps("b_frames.mp4") != sorted(stamps("b_frames.mp4"))
    assert set(stamps("raw.h264")) == {None}
    assert header("edit_list.mp4") == 60 and header("gaps.avi") > 100
    assert [number(frame) for frame in kinds["edit_list.mp4"][1]] == list(range(14, 24))
    with av.open(kinds["packed.avi"][0]) as container:
        decoded = [frame.pts for frame in container.decode(video=0)]
    assert len(decoded) == 61 and decoded != sorted(decoded)
    steps = np.diff(sorted(stamps("variable_rate.mp4")))
    assert steps.min() * 5 < steps.max()
    for turns in (1, 2, 3):
        assert number(np.rot90(kinds[f"rotated_{90 * turns}.mp4"][1][5], turns)) == 5  # clockwise


def test_hidden_vp8_packets_do_not_count(kinds, tmp_path):
    """A VP8 packet without a picture: turn off show_frame of one packet in the middle."""
    path = kinds["vp8_hidden_frames.webm"][0]
    data, packet = bytearray(Path(path).read_bytes()), bytes(packets_of(path)[30])
    data[data.index(packet)] &= ~0x10
    (tmp_path / "a.webm").write_bytes(data)
    full = full_decode(tmp_path / "a.webm")
    with Video(tmp_path / "a.webm") as v:
        assert len(v) == len(full) == 59
        assert_exact(v, full, [20, 29, 30, 50])


def test_seeks_instead_of_decoding_everything(tmp_path):
    path = write(tmp_path / "long.mp4", frames=200, gop=20, bf=2, sc_threshold=0)
    with Video(path) as v:
        runs = v._source._runs([v._source.pts[i] for i in (3, 10, 18, 21, 120, 199)])
        assert [len(stamps) for _, stamps in runs] == [4, 1, 1]  # 21 is not worth a seek
        assert numbers(v, [199, 3, 120]) == [199, 3, 120]


def test_windows_are_read_in_one_call(kinds):
    path, full = kinds["b_frames.mp4"]
    with Video(path) as v:
        calls, get = [], v.get
        v.get = lambda *args: calls.append(args) or get(*args)
        clips = read_windows(v, [[7, 3], range(40, 43), np.array([3])])
    assert len(calls) == 1
    for clip, window in zip(clips, ([7, 3], [40, 41, 42], [3]), strict=True):
        assert np.array_equal(pictures(clip), np.stack([full[i] for i in window]))


def test_resize_is_one_path_and_keeps_the_shape(kinds):
    path, full = kinds["rotated_90.mp4"]  # 64 x 96, upright
    with Video(path) as v:
        assert v.get([0, 3], short_side=32).shape == (2, 3, 48, 32)
        assert v.get([0], short_side=100).shape == (1, 3, 150, 100)
        assert v.get([0], short_side=64).shape == (1, 3, 96, 64)
        small = v.get([7, 2, 7], short_side=16)
    expected = TF.resize(torch.from_numpy(full[7].copy()).permute(2, 0, 1), [24, 16], antialias=True)
    assert (small[0].int() - expected.int()).abs().max() <= 1
    assert torch.equal(small[0], small[2]) and torch.equal(small[1:2], read_frames(path, [2], short_side=16))


def test_a_picture_size_that_changes(tmp_path):
    paths = [write(tmp_path / f"{w}.h264", 20, format="h264", size=(w, h)) for w, h in ((96, 64), (64, 48))]
    (tmp_path / "ab.h264").write_bytes(b"".join(Path(path).read_bytes() for path in paths))
    clip = read_frames(tmp_path / "ab.h264", [0, 19, 20, 39])
    assert clip.shape == (4, 3, 64, 96) and [number(frame) for frame in clip] == [0, 19, 0, 19]


def test_index_errors_are_the_callers(kinds):
    with Video(kinds["one_frame.mp4"][0]) as v:
        for indices in ([1], [-1], []):
            with pytest.raises(IndexError):
                v.get(indices)


@pytest.mark.parametrize(
    "span, first, end",
    [((0, 0.4), 0, 10), ((0.4, 1.0), 10, 25), ((2.0, 99), 50, 60), ((1.001, 1.002), 26, 27)]
    + [((50, 60), 59, 60), ((-5, 0), 0, 1)],
)
def test_a_span_of_a_video(kinds, span, first, end):
    with Video(kinds["b_frames.mp4"][0], span) as v:  # 25 frames a second
        assert len(v) == end - first and v.times[0] == first / 25
        assert numbers(v) == list(range(first, end))


@pytest.mark.parametrize(
    "name",
    ["a:b.mp4", "http:x.mp4", "sp ace's [1] #%d.mp4", "视频-é.mp4", "-x.mp4", os.fsdecode(b"\xff.avi")],
)
def test_names(kinds, tmp_path, monkeypatch, name):
    shutil.copy(kinds["three_frames.avi"][0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(name) == numbers(tmp_path / name) == [0, 1, 2]


# ---- files of odd kinds --------------------------------------------------------------------------


def write_frames(path, codec, frames, title=""):
    """Encode av.VideoFrames of the encoder's pixel format."""
    with av.open(str(path), "w") as out:
        out.metadata["title"] = title
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.codec_context.gop_size = 10
        for frame in frames:
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def write_grey(path, codec, pix_fmt):
    """Grey pictures that carry their number; with a palette, of which 0 is black and 255 is white."""
    palette = np.random.default_rng(0).integers(0, 255, (256, 4), dtype=np.uint8)  # ARGB
    palette[0], palette[255] = (255, 0, 0, 0), 255
    planes = [(picture(i)[..., 0], palette) if pix_fmt == "pal8" else picture(i)[..., 0] for i in range(30)]
    write_frames(path, codec, [av.VideoFrame.from_ndarray(plane, format=pix_fmt) for plane in planes])


def write_tagged(path):
    """HMDB-51 has tags that are not UTF-8."""
    frames = [av.VideoFrame.from_ndarray(picture(i)).reformat(format="yuv420p") for i in range(30)]
    write_frames(path, "mpeg4", frames, title="XXXXXXXX")
    path.write_bytes(path.read_bytes().replace(b"XXXXXXXX", b"\xe9\xff\xfe\xe9\xe9\xe9\xe9\xe9"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))


def write_key_frames_only(path):
    """Without its list of key frames every frame of an mp4 file counts as one."""
    write(path, codec="mpeg4", gop=12)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    assert all(packet.is_keyframe for packet in packets_of(path))


def remux(path, source, packet_filter=None):
    """Copy the packets of a file to another container, if need be through a filter of FFmpeg."""
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        if packet_filter:
            change = av.bitstream.BitStreamFilterContext(packet_filter, stream, target).filter
        for packet in old.demux(stream):
            packets = change(packet if packet.size else None) if packet_filter else [packet][: packet.size]
            for out in packets:
                out.stream = target
                new.mux(out)


def copied_avi(path, bf):
    """Its clock is finer than a frame, so that its header counts 24 ticks for the last one."""
    remux(path, write(path.with_suffix(".mp4"), bf=bf), "h264_mp4toannexb")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 24 * 60


# Which frames are two packets of a field each; the number of packets.
FIELDS = {"all": (lambda i: True, 60), "third": (lambda i: i % 3 == 0, 40), "late": (lambda i: i > 20, 39)}
FIELDS["none"] = (lambda i: False, 30)
ODD_KINDS = {
    f"{kind}_fields.{suffix}": partial(interlaced, frames=30, is_field=is_field)
    for kind, (is_field, _) in FIELDS.items()
    for suffix in ("mp4", "mkv", "ts", "avi", "h264")
}
ODD_KINDS |= {  # the palette may come with the first packet only, which a seek leaves out
    f"palette_{codec}.{suffix}": partial(write_grey, codec=codec, pix_fmt=pix_fmt)
    for codec, suffix, pix_fmt in [("rawvideo", "avi", "pal8"), ("rawvideo", "mov", "pal8")]
    + [("smc", "mov", "pal8"), ("msrle", "mov", "pal8"), ("msrle", "avi", "pal8"), ("png", "mov", "pal8")]
    + [("qtrle", "mov", "gray")]
}
ODD_KINDS |= {
    "palette_of_greys.mov": partial(write_grey, codec="rawvideo", pix_fmt="gray"),
    "unknown_side_data.mov": partial(write_grey, codec="tiff", pix_fmt="gray"),  # EXIF, of TIFF pictures
    "interlaced.mp4": partial(write, bf=3, **{"x264-params": "interlaced=1"}),
    "decoding_order.mp4": lambda path: remux(path, write(path.with_suffix(".avi"), bf=3)),  # of its stamps
    "jump_of_hours.mkv": partial(write, times=np.arange(60) * 40 + 30_000_000 * (np.arange(60) >= 30)),
    "tags.avi": write_tagged,
    "key_frames_only.mp4": write_key_frames_only,
    **{f"copied_{bf}.avi": partial(copied_avi, bf=bf) for bf in (0, 1, 3)},
}


@pytest.mark.parametrize("name", ODD_KINDS)
def test_odd_kinds(tmp_path, name):
    path = tmp_path / name
    ODD_KINDS[name](path)
    full = full_decode(path)
    n = len(full)
    assert [number(frame) for frame in full] == list(range(n)) and n in (30, 60)
    if "fields" in name:
        assert len(packets_of(path)) == FIELDS[name.split("_")[0]][1]
    if "palette" in name:
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.pix_fmt == "pal8"
    for window in (range(n), [n - 1], [3, 4, 20], [12, 13, 25], [17]):
        with Video(path, min_share=1.0) as v:
            if "side_data" not in name:  # which a strict decoder takes for damage
                v._salvage = None
            if name == "interlaced.mp4":  # its frames are whole, and can be sought
                v._source.decoders = [v._source.by_seeking]
            assert len(v) == n and v.fps == pytest.approx(25, rel=1e-6)
            assert np.isclose(np.diff(v.times), 1 / 25).sum() >= n - 2
            assert_exact(v, full, window)


def test_tiny_packets_are_frames(tmp_path):
    """A P-frame of 16 x 16 pixels in which nothing moves has 8 bytes; what XviD sends for none has 7."""
    grey = [av.VideoFrame.from_ndarray(np.full((24, 16), 90, np.uint8), format="yuv420p") for _ in range(30)]
    write_frames(tmp_path / "a.avi", "mpeg4", grey)
    assert min(packet.size for packet in packets_of(tmp_path / "a.avi")) <= 8
    with Video(tmp_path / "a.avi") as v:
        assert len(v) == 30 == len(full_decode(tmp_path / "a.avi"))


SYMMETRIES = {  # display matrix -> EXIF orientation
    (1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8,
}  # fmt: skip


@pytest.mark.parametrize("matrix", SYMMETRIES)
def test_display_matrices(tmp_path, matrix):
    """The eight symmetries of a square, in the file and by EXIF."""
    path, exif = write(tmp_path / "a.mp4", frames=10), Image.Exif()
    exif[0x0112] = SYMMETRIES[matrix]
    (tmp_path / "folder").mkdir()
    shown = []
    for i, frame in enumerate(full_decode(path)):
        Image.fromarray(frame).save(tmp_path / f"folder/{i}.png", exif=exif)
        shown.append(np.array(ImageOps.exif_transpose(Image.open(tmp_path / f"folder/{i}.png"))))
    display(path, *matrix)
    for source in (path, tmp_path / "folder"):
        with Video(source) as v:
            assert (v.height, v.width) == shown[0].shape[:2]
            assert_exact(v, shown, [7, 2])
            assert v.get([0], short_side=32).shape[2:] == ((48, 32) if matrix[1] else (32, 48))


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_other_matrices_are_ignored(tmp_path, matrix):
    path = write(tmp_path / "a.mp4", frames=3)
    display(path, *matrix)
    assert numbers(path) == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi"])
def test_the_best_stream_is_taken(tmp_path, name):
    def write(*streams):
        """(codec, frames, width, disposition) of each."""
        with av.open(str(tmp_path / name), "w") as out:
            targets = [out.add_stream(codec, rate=25) for codec, *_ in streams]
            for target, (codec, _, width, disposition) in zip(targets, streams, strict=True):
                target.width, target.height, target.disposition = width, 64, disposition
                target.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for target, (_, frames, width, _) in zip(targets, streams, strict=True):
                for i in range(frames):
                    out.mux(target.encode(av.VideoFrame.from_ndarray(picture(i, width, 64))))
                out.mux(target.encode())
        with Video(tmp_path / name) as v:
            assert numbers(v, [len(v) - 1]) == [len(v) - 1]
            return len(v), v.width

    cover = av.stream.Disposition.attached_pic
    assert write(("mjpeg", 1, 320, 0), ("libx264", 30, 96, 0)) == (30, 96)  # one picture first
    assert write(("mjpeg", 1, 320, cover), ("libx264", 30, 96, 0)) == (30, 96)
    assert write(("libx264", 30, 96, 0), ("mjpeg", 1, 320, 0)) == (30, 96)
    assert write(("libx264", 20, 96, 1), ("libx264", 30, 160, 1)) == (20, 96)  # no other is better
    if name != "a.avi":  # which marks none
        assert write(("libx264", 30, 160, 0), ("libx264", 20, 96, 1)) == (20, 96)  # the default


def test_a_closed_video_leaves_no_open_file(kinds):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name in ("b_frames.mp4", "raw.h264", "packed.avi"):
        for _ in range(5):
            read_frames(kinds[name][0], [0, 2])
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


# ---- files that are cut short or damaged ---------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["faststart.mp4", "b_frames.mp4", "fragmented.mp4", "b_frames.mkv", "mpeg4.avi"]
)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.8, 0.97])
def test_a_file_cut_short(kinds, tmp_path, name, share):
    """Either at least half is there, and the last good frame stands in, or the reason is told."""
    path = cut(kinds[name][0], tmp_path / name, share)
    try:
        good = [number(frame) for frame in full_decode(path)]
    except (av.FFmpegError, IndexError):  # nothing opens
        good = None
    try:
        with Video(path) as v:
            n, seen = len(v), numbers(v)
            # Alone, the last one may come: a damaged frame that nothing refers to is skipped.
            assert numbers(v, [n - 1])[0] in (good[-1], n - 1)
    except VideoError as error:
        assert re.search("only .* of |Invalid data|no (frames|video stream)|End of file", str(error))
        assert not good or len(good) < 30 and not name.endswith("mkv")
        return
    assert seen == good + [good[-1]] * (n - len(good))
    assert len(good) >= 30 or name in ("b_frames.mkv", "fragmented.mp4")  # no count in the header


@pytest.mark.parametrize("whole", [45, 31, 20])
def test_cut_short_in_the_middle_of_the_data(tmp_path, whole):
    """A known place: a faststart file of 60 frames of which some packets are whole."""
    path = write(tmp_path / "a.mp4", movflags="faststart", bf=0)
    last = packets_of(path)[whole - 1]
    Path(path).write_bytes(Path(path).read_bytes()[: last.pos + last.size])
    if whole < 30:
        assert_refused(path, "^only 20 of 60 frames are in the file$")
    with Video(path, min_share=0.2) as v:
        assert numbers(v) == list(range(whole))


def damage(path, out, lost):
    """Overwrite the packets with the numbers `lost` by 0xff. Returns `out` as a str."""
    data, end = bytearray(Path(path).read_bytes()), 0
    for k, packet in enumerate(map(bytes, packets_of(path))):
        at = data.index(packet, end)
        end = at + len(packet)
        if k in lost:
            data[at:end] = b"\xff" * len(packet)
    Path(out).write_bytes(data)
    return str(out)


def decodable(path, damaged):
    """dict position -> uint8 (H, W, 3) of the frames that a decoder gives that goes on after an error."""
    frames, stamps = {}, [packet.pts for packet in packets_of(path)]
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
def test_a_decoder_goes_on_after_an_error(tmp_path, name):
    path, rng = write(tmp_path / name, frames=100, gop=25, **CODECS[name]), np.random.default_rng(4)
    for k in (60, 20, 0):
        damaged = damage(path, tmp_path / f"{k}_{name}", [k])
        if (k, name) == (0, "h264.avi"):  # the only parameter sets are lost, and av.open finds no codec
            assert_refused(damaged, "Invalid data")
            continue
        frames = decodable(path, damaged)
        assert 75 <= len(frames) < 100
        expected = [frames[max([j for j in frames if j <= i], default=min(frames))] for i in range(100)]
        windows = [range(100), range(k, min(k + 30, 100)), [99, 0, k]]
        with Video(damaged) as v:
            assert len(v) == 100
            assert_exact(v, expected, *windows, *(np.sort(rng.integers(100, size=5)) for _ in range(6)))
            assert v.stand_ins == set(range(100)) - set(frames)
        assert_refused(damaged, f"^only {len(frames)} of 100 frames decode: ", min_share=1.0)


@pytest.mark.parametrize("first", [0, 25, 50])
def test_a_video_is_unreadable_below_min_share_wherever_the_damage_is(tmp_path, first):
    path = write(tmp_path / "a.avi", frames=100, codec="mjpeg", pix_fmt="yuvj420p")
    lost = set(range(first, first + 50))
    with Video(damage(path, tmp_path / "half.avi", lost)) as v:
        assert numbers(v) == [(first - 1 if first else 50) if i in lost else i for i in range(100)]
        assert v.stand_ins == lost
    less = damage(path, tmp_path / "less.avi", lost | {(first + 50) % 100})
    with Video(less) as v:
        present = (first + 70) % 100
        assert numbers(v, [present]) == [present]  # what is there is given
        with pytest.raises(VideoError, match="^only 49 of 100 frames decode: Invalid data"):
            v.get([first + 1])


def test_stand_ins_of_a_span(tmp_path):
    path = write(tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p")  # 25 frames a second
    with Video(damage(path, tmp_path / "b.avi", [20, 30]), span=(0.8, 1.6)) as v:
        assert numbers(v, [0, 1, 10]) == [19, 21, 29] and v.stand_ins == {0, 10}


@pytest.mark.parametrize("options", [dict(bf=2), dict(codec="mpeg4", bf=2, b_strategy=0)])
@pytest.mark.parametrize("k", [31, 62, 99])
def test_counted_frames_stay_in_their_places_after_damage(tmp_path, options, k):
    """Where time stamps are guessed, a frame that is lost must not move the others."""
    path = write(tmp_path / "a.avi", frames=100, gop=10, **options)
    with Video(damage(path, tmp_path / "b.avi", [k])) as v:
        wrong = [i for i, seen in enumerate(numbers(v)) if seen != i]
        assert 1 <= len(v.stand_ins) <= 3
    assert len(wrong) < 10 and all(abs(i - k) < 10 for i in wrong)  # its group at most


@pytest.mark.parametrize("name, lost", [("a.ts", range(35, 60)), ("a.mp4", [24]), ("a.mp4", [25])])
def test_interlaced_files_cut_short_or_damaged(tmp_path, name, lost):
    """A frame without both of its fields is no frame, and the file is damaged."""
    path = interlaced(tmp_path / name, 30, lambda i: True)
    if name == "a.ts":
        path = cut(path, path, 0.6)
    else:
        damage(path, path, lost)
        assert_refused(path, "^only 29 of 30 frames are in the file$", min_share=1.0)
    whole = [i for i in range(30) if {2 * i, 2 * i + 1}.isdisjoint(lost)]
    assert numbers(path)[:16] == whole[:16]


def test_a_frame_that_is_not_there(tmp_path):
    """One frame marked "not coded" (MPEG-4 has a bit for it): the one before it stands in."""
    path = write(tmp_path / "a.mp4", codec="mpeg4", bf=1, b_strategy=0, gop=30)
    packets = packets_of(path)
    packet = packets[4]
    assert packet.pts < packets[3].pts  # a B-frame
    data, hole = bytearray(Path(path).read_bytes()), sorted(p.pts for p in packets).index(packet.pts)
    assert data[packet.pos : packet.pos + 4] == b"\0\0\1\xb6" and packet.size > 8
    data[packet.pos + 5] &= ~0x20  # before it: 2 bits of type, 1 of seconds, 1, 5 of time, 1
    Path(path).write_bytes(data)
    assert [number(frame) for frame in full_decode(path)] == [i for i in range(60) if i != hole]
    window = range(hole - 2, hole + 3)
    assert numbers(path, window) == [i - (i == hole) for i in window]


# ---- files that are no video ---------------------------------------------------------------------


def test_files_that_are_no_video(kinds, tmp_path):
    mp4, avi = Path(kinds["one_frame.mp4"][0]).read_bytes(), Path(kinds["three_frames.avi"][0]).read_bytes()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(8000))
    for name, data, reason in (
        ("a.mp4", b"", "Invalid data|End of file"),
        ("b.mp4", b"<!DOCTYPE html><html><body>404</body></html>" * 50, "Invalid data"),
        ("c.mp4", os.urandom(5000), "Invalid data|no video stream|no frames|only"),
        ("d.mp4", b"ffconcat version 1.0\nfile 'sound.wav'\n", "list of other files|not permitted|Invalid"),
        ("e.mp4", (tmp_path / "sound.wav").read_bytes(), "^no video stream$"),
        ("notes.txt", b"Some notes on the weather.\n" * 200, "^a text, not a video$"),
        ("a.nfo", b"\x1b[31mred\n", "^a text, not a video$"),
        ("f.mp4", mp4.replace(b"avc1", b"evc1"), r"^no decoder for codec evc \(evc1 / 0x31637665\)$"),
        ("g.mp4", mp4.replace(b"avc1", b"xyz9"), r"^no decoder for codec none \(xyz9 / 0x397A7978\)$"),
        ("a.avi", avi.replace(b"FMP4", b"XYZ9"), r"^no decoder for codec none \(XYZ9 / 0x395A5958\)$"),
    ):
        (tmp_path / name).write_bytes(data)
        assert_refused(tmp_path / name, reason)
    assert av.logging.get_level() is None
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    for name in ("no.mp4", "link.mp4"):
        assert_refused(tmp_path / name, "^no such file$")
    for name in ("http://127.0.0.1/a.mp4", f"concat:{kinds['one_frame.mp4'][0]}", "pipe:0"):
        assert_refused(name, "^no such file$")
    (tmp_path / "folder.mp4").mkdir()
    assert_refused(tmp_path / "folder.mp4", "^a folder without pictures$")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert_refused(tmp_path / "pipe.mp4", "^not a file$")


def test_pictures_are_no_videos(tmp_path):
    first, *others = [Image.fromarray(picture(i)) for i in range(4)]
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tiff", "a.ico", "a.gif", "a.avif", "a.jp2", "a.pdf"):
        if Image.registered_extensions().get(name[1:]) in Image.SAVE:
            first.save(tmp_path / name)
            assert_refused(tmp_path / name, "^a picture, not a video$")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=others, duration=40)
    assert numbers(tmp_path / "moving.gif") == [0, 1, 2, 3]


def test_absurd_sizes_are_refused(tmp_path, monkeypatch):
    with Video(write(tmp_path / "a.mkv", 2, "ffv1", (4000, 2), pix_fmt="yuv444p")) as v:
        assert v.get([0]).shape == (1, 3, 2, 4000) and v.get([0], short_side=32).shape == (1, 3, 32, 64000)
        with pytest.raises(VideoError, match="^pictures of 512000 x 256 pixels are refused$"):
            v.get([0], short_side=256)
    monkeypatch.setattr("common.io.decode.MAX_PIXELS", 96 * 64 - 1)
    assert_refused(write(tmp_path / "a.mp4", frames=3), "^pictures of 96 x 64 pixels are refused$")
    Image.new("RGB", (96, 64)).save(tmp_path / "1.png")
    assert_refused(tmp_path, "96 x 64 pixels are refused")


# ---- folders of pictures -------------------------------------------------------------------------


def test_a_folder_of_pictures(tmp_path):
    for i in range(12):  # without leading zeros: the order is that of the numbers
        Image.fromarray(picture(i)).save(tmp_path / f"flower_{i + 1}.png")
        for name in ("flow_x_{}", "flow_y_{}", "Flow_{}", "flowx_{}"):  # pictures of optical flow
            Image.fromarray(picture(99)).save(tmp_path / f"{name.format(i)}.png")
    (tmp_path / "._flower_1.png").write_bytes(b"x")
    Image.fromarray(picture(12)).convert("L").save(tmp_path / "flower_13.jpg")
    with Video(tmp_path) as v:
        assert (len(v), v.fps, v.width, v.height) == (13, 25, 96, 64)
        assert numbers(v, [12, 0, 10, 1]) == [12, 0, 10, 1]
        assert_exact(v, {3: picture(3)}, [3])
        assert v.get([0, 12], short_side=32).shape == (2, 3, 32, 48)
    with Video(tmp_path, fps=10, span=(0.5, 1)) as v:
        assert len(v) == 5 and v.times[0] == 0.5


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


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_pictures_are_ordered_by_the_number_that_counts(names):
    assert _by_number(sorted(names)) == _by_number(names[::-1]) == names


def test_a_folder_with_damaged_pictures(tmp_path):
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"{i:02}.png")
    data = (tmp_path / "05.png").read_bytes()
    (tmp_path / "00.png").write_bytes(b"")
    (tmp_path / "05.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "06.png").write_bytes(b"<html>404</html>")
    with Video(tmp_path) as v:
        assert (len(v), v.width, v.height) == (12, 96, 64)
        assert numbers(v) == [1, 1, 2, 3, 4, 4, 4, 7, 8, 9, 10, 11] and v.stand_ins == {0, 5, 6}
    with Video(tmp_path, min_share=1.0) as v:
        assert numbers(v, [7]) == [7]
        with pytest.raises(VideoError, match="^only 9 of 12 frames decode: "):
            v.get([7, 6])
    for i in range(12):
        (tmp_path / f"{i:02}.png").write_bytes(b"")
    assert_refused(tmp_path, "cannot identify image file")


def test_damaged_exif(tmp_path):
    Image.fromarray(picture(3)).save(tmp_path / "1.jpg", exif=b"Exif\0\0XX*\0garbage")
    assert numbers(tmp_path) == [3]


def test_16_bits_of_grey(tmp_path):
    grey = (np.arange(96 * 64).reshape(64, 96) * 10 % 65536).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "1.png")
    rgb = pictures(read_frames(tmp_path, [0]))[0]
    assert rgb.dtype == np.uint8 and np.array_equal(rgb, (grey // 256)[..., None].repeat(3, 2))


# ---- real files ----------------------------------------------------------------------------------


ROWS = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.exists() else []
DAMAGED = {"corrupted.mp4": (50, 1), "no_timescale.mp4": (182, 12)}  # frames; of those, stand-ins
REASONS = {
    "no_video_stream": "^no video stream$",
    "zero_frames": "^no frames$",
    "open_fails": "Invalid data",
    "error_after": "only .* of .* frames",
}


@pytest.mark.skipif(not ROWS, reason="../shared/data/odd_videos is absent")
@pytest.mark.parametrize("row", ROWS, ids=[row["path"].split("/")[-1] for row in ROWS])
def test_odd_videos(row):
    path, rng = ODD / row["path"], np.random.default_rng(2)
    reason = next((text for outcome, text in REASONS.items() if row["outcome"].startswith(outcome)), None)
    if path.name in DAMAGED:  # the row counts up to the first error
        with Video(path) as v:
            v.get(range(len(v)))
            assert (len(v), len(v.stand_ins)) == DAMAGED[path.name]
    elif reason:
        assert_refused(path, reason)
    else:
        full = full_decode(path)
        with Video(path) as v:
            assert len(v) == len(full) == int(row["decoded"])
            assert_exact(v, full, *(rng.integers(len(v), size=4) for _ in range(4)))


@pytest.mark.skipif(not UCF, reason="../shared/data/ucf101 is absent")
@pytest.mark.parametrize("path", UCF[:12], ids=lambda path: path.stem)
def test_ucf101_files(path):
    """Some are packed bitstreams, whose frames carry each other's time stamps."""
    full, rng = full_decode(path), np.random.default_rng(3)
    with Video(path) as v:
        assert len(v) == len(full)
        assert_exact(v, full, np.sort(rng.integers(len(v), size=6)))

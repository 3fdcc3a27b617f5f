"""Small video files whose pictures carry their own number, so that a wrong frame shows."""

import gc
import io
import os
import re
import struct
from contextlib import suppress
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist

from common import flags

torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()  # most of what a run's end costs here is looking for cycles in the modules


def pytest_unconfigure():
    gc.unfreeze()  # else libraries complain, as the interpreter ends, of what is left


@pytest.fixture(scope="module")
def leave():
    """What ends the process raises instead."""

    def leave(script, message, status=2):
        raise SystemExit(f"{script}: {message} ({status})")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "leave", leave)
        patch.setattr("common.run.leave", leave)
        yield


@pytest.fixture
def group():
    """A run that has ended with a sentence leaves its process group."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def picture(i, width=96, height=64):
    """uint8 (H, W, 3): number i in eight black or white blocks above a moving texture."""
    base = np.random.default_rng(width * height).integers(0, 90, (height, width, 3), dtype=np.uint8)
    out = np.roll(base, (2 * i, 3 * i), (0, 1))
    for bit in range(8):
        out[: height // 3, bit * width // 8 : (bit + 1) * width // 8] = 255 * (i >> bit & 1)
    return out


def number(rgb):
    """The number that a picture (H, W, 3) or (3, H, W) carries."""
    rgb = np.asarray(rgb)
    rgb = rgb.transpose(1, 2, 0) if rgb.shape[0] == 3 else rgb
    height, width = rgb.shape[:2]
    centres = [(2 * bit + 1) * width // 16 for bit in range(8)]
    return sum((int(rgb[height // 6, x].mean()) > 127) << bit for bit, x in enumerate(centres))


def write(path, frames=60, codec="libx264", size=(96, 64), gop=12, times=None, rate=25, **options):
    """Encode pictures 0..frames-1. Returns the path as a str.

    times: their time stamps in 1/1000 s, for a variable frame rate. options go to the encoder
    (bf, x264-params, ...), but format, pix_fmt and movflags.
    """
    if codec == "libx264":  # its macroblock tree differs from run to run on AVX-512 machines
        options["x264-params"] = "mbtree=0:" + options.get("x264-params", "")
    pix_fmt = options.pop("pix_fmt", "yuv420p")
    container_options = {k: options.pop(k) for k in ("movflags",) if k in options}
    with av.open(str(path), "w", format=options.pop("format", None), options=container_options) as out:
        stream = out.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return str(path)


def full_decode(path):
    """Every frame by the plainest means: a list of uint8 (H, W, 3); after an error the decoder goes on."""
    frames = []
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = []
        with suppress(av.FFmpegError):
            packets.extend(packet for packet in container.demux(stream) if packet.size)
        for packet in [*packets, None]:
            try:
                decoded = stream.codec_context.decode(packet)
            except av.FFmpegError:
                continue
            for frame in decoded:
                turns = frame.rotation // 90 if frame.rotation % 90 == 0 else 0
                frames.append(np.rot90(frame.to_ndarray(format="rgb24", threads=1), turns))
    return frames


def display(path, a, b, c, d):
    """Set the display matrix of an mp4 file: players show pixel (x, y) at (a x + c y, b x + d y)."""
    data, one = bytearray(open(path, "rb").read()), 1 << 16
    at = data.index(b"tkhd") + 44
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    data[at : at + 36] = struct.pack(">9i", *map(int, matrix))
    open(path, "wb").write(data)


def rotate(path, degrees):
    """Set the display matrix of an mp4 file, so that players turn it clockwise."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    display(path, cos, sin, -sin, cos)


def interlaced(path, frames, is_field, size=(96, 64)):
    """Pictures 0..frames-1 in H.264, those for which is_field(i) as two packets of a field each.

    All is in PCM macroblocks, each tenth frame is a key frame. Returns the path as a str.
    """

    def golomb(*values):
        codes = [f"{value + 1:b}" for value in values]
        return "".join("0" * (len(code) - 1) + code for code in codes)

    def nal(first, bits):
        bits += "1" + "0" * (-(len(bits) + 1) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8, "big")
        return b"\0\0\0\1" + bytes([first]) + re.sub(b"\0\0(?=[\0-\3])", b"\0\0\3", data)

    def coded(planes, i, field, idr):
        """A slice: of the frame if field is None, of the upper field if it is 0, of the lower if 1."""
        out = golomb(0, 7, 0) + f"{i % 10:04b}" + ("0" if field is None else f"1{field}")
        out += golomb(0) * idr + f"{2 * (i % 10) + (field or 0):08b}" + ("00" if idr else "0") + golomb(0)
        rows = slice(field, None, 1 if field is None else 2)
        luma, *chroma = (plane[rows] for plane in planes)
        for y in range(0, luma.shape[0], 16):
            for x in range(0, luma.shape[1], 16):
                out += golomb(25)  # I_PCM
                out += "0" * (-len(out) % 8)
                block = [luma[y : y + 16, x : x + 16]]
                block += [plane[y // 2 : y // 2 + 8, x // 2 : x // 2 + 8] for plane in chroma]
                out += "".join(f"{value:08b}" for part in block for value in part.ravel().tolist())
        return nal(0x65 if idr else 0x61, out)

    (width, height), packets = size, []  # (bytes, time in fields, key frame)
    head = "01001101" + "00000000" + "00011110" + golomb(0, 0, 0, 4, 1) + "0"  # Main profile
    head = nal(0x67, head + golomb(width // 16 - 1, height // 32 - 1) + "001000")
    head += nal(0x68, golomb(0, 0) + "00" + golomb(0, 0, 0) + "000" + golomb(0, 0, 0) + "000")
    for i in range(frames):
        frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24").reformat(format="yuv420p")
        data = np.maximum(frame.to_ndarray(), 1).ravel()  # PCM samples are not 0
        ends = [width * height, width * height * 5 // 4]
        planes = [x.reshape(-1, width >> (n > 0)) for n, x in enumerate(np.split(data, ends))]
        idr = i % 10 == 0
        for field in (0, 1) if is_field(i) else (None,):
            data = coded(planes, i, field, idr and not field)
            packets.append((head * (idr and not field) + data, 2 * i + (field or 0), idr and not field))
    raw = io.BytesIO(b"".join(data for data, _, _ in packets))
    if str(path).endswith("h264"):
        open(path, "wb").write(raw.getvalue())
        return str(path)
    with av.open(raw, format="h264") as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for data, time, key in packets:
            packet = av.Packet(data)
            packet.time_base, packet.pts, packet.dts, packet.stream = Fraction(1, 50), time, time, stream
            packet.is_keyframe, packet.duration = key, 1
            out.mux(packet)
    return str(path)


def cut(path, out, share):
    """The first `share` of a file's bytes, as an interrupted download leaves them."""
    data = open(path, "rb").read()
    open(out, "wb").write(data[: int(len(data) * share)])
    return str(out)


@pytest.fixture(scope="session")
def make():
    """The helpers of this file: make.write, make.picture, make.number, make.full_decode, ..."""
    return SimpleNamespace(
        write=write,
        picture=picture,
        number=number,
        full_decode=full_decode,
        rotate=rotate,
        display=display,
        interlaced=interlaced,
        cut=cut,
    )


KINDS = {
    "b_frames.mp4": dict(bf=3, gop=12),
    "one_gop.mp4": dict(bf=3, gop=250, frames=100),
    "open_gop.mp4": {"x264-params": "open-gop=1:keyint=12:scenecut=0:bframes=3:b-pyramid=normal"},
    "intra_refresh.mkv": {"x264-params": "intra-refresh=1:keyint=20:bframes=0"},
    "b_frames.mkv": dict(bf=3),
    "transport.ts": dict(bf=3),
    "raw.h264": dict(bf=3, format="h264"),
    "raw_one_frame.h264": dict(frames=1, format="h264"),
    "faststart.mp4": dict(bf=3, movflags="faststart"),
    "fragmented.mp4": dict(bf=3, movflags="frag_keyframe+empty_moov"),
    "variable_rate.mp4": dict(bf=3, times=np.cumsum(np.random.default_rng(5).integers(5, 300, 60))),
    "mpeg4.avi": dict(codec="mpeg4"),
    "mpeg4_b_frames.avi": dict(codec="mpeg4", bf=2),
    "mpeg4_one_gop.avi": dict(codec="mpeg4", bf=2, gop=250),
    "vp8_hidden_frames.webm": {
        "codec": "libvpx",
        "auto-alt-ref": 1,
        "lag-in-frames": 16,
        "gop": 40,
    },
    "vp9.webm": {"codec": "libvpx-vp9", "auto-alt-ref": 1, "lag-in-frames": 16, "cpu-used": 8},
    "odd_size.mkv": dict(codec="libx264", size=(97, 63), pix_fmt="yuv444p"),
    "odd_size.webm": dict(codec="libvpx-vp9", size=(99, 65), frames=20),
    "ten_bit.mp4": dict(pix_fmt="yuv420p10le", bf=3),
    "grey.mp4": dict(pix_fmt="gray", bf=3),
    "one_frame.mp4": dict(frames=1),
    "three_frames.avi": dict(frames=3, codec="mpeg4"),
    "rotated_90.mp4": dict(bf=3),
    "rotated_180.mp4": dict(bf=3),
    "rotated_270.mp4": dict(bf=3),
    "edit_list.mp4": dict(bf=3),
    "gaps.avi": dict(codec="mpeg4", times=40 * np.arange(60) ** 2 // 20),
    "h264.avi": dict(bf=3),
    "packed.avi": dict(codec="mpeg4", bf=1, frames=61, b_strategy=0),
}


def trim(path, media_time, duration):
    """Rewrite an mp4's edit list: show `duration` (1/1000 s) from `media_time` (track units) on."""
    data = bytearray(open(path, "rb").read())
    at = data.index(b"elst") + 4
    assert struct.unpack(">II", data[at : at + 8]) == (0, 1)  # version 0, one edit
    data[at + 8 : at + 16] = struct.pack(">Ii", duration, media_time)
    open(path, "wb").write(data)


def pack(path):
    """Repack an MPEG-4 AVI as DivX and XviD do: a B-frame rides with the frame before it."""
    vop = b"\0\0\1\xb6"
    with av.open(path) as container:
        stream = container.streams.video[0]
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
        out = []
        for data in packets:
            if data[data.index(vop) + 4] >> 6 == 2 and len(out) > 8:  # a B-frame; some are left
                out[-1] += data
                out.append(vop + bytes([0b01010000, 0b01111111]))  # "not coded"
            else:
                tag = data.find(b"\0\0\1\xb2")  # user data: the name of the encoder
                if tag >= 0:
                    end = data.index(b"\0\0\1", tag + 4)
                    data = data[:tag] + b"\0\0\1\xb2DivX503b1393p" + data[end:]
                out.append(data)
        with av.open(path + ".avi", "w") as packed:
            target = packed.add_stream_from_template(stream)
            for n, data in enumerate(out):
                packet = av.Packet(data)
                packet.pts = packet.dts = n
                packet.time_base, packet.stream = stream.time_base, target
                packet.is_keyframe = data[data.index(vop) + 4] >> 6 == 0
                packed.mux(packet)
    os.replace(path + ".avi", path)


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """dict name -> (path, frames of a full decode) of one small file of every kind in KINDS."""
    folder, files = tmp_path_factory.mktemp("kinds"), {}
    for name, options in KINDS.items():
        path = write(folder / name, **options)
        if name.startswith("rotated"):
            rotate(path, int(name[8:-4]))
        if name == "edit_list.mp4":
            trim(path, 512 * 14 + 1024, 400)  # 10 of the 60 frames
        if name == "packed.avi":
            pack(path)
        files[name] = path, full_decode(path)
    return files

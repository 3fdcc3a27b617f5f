"""Time reading clips beside other packages, where these are installed, on one thread.

    python tests/bench/decode.py                the readers, pictures of a short side of 256
    python tests/bench/decode.py --native       the same at the videos' own size, as training reads them
    python tests/bench/decode.py --shrunken     a 720p file before and after python -m common.tools.shrink

The readers run interleaved in random order in one process, and what counts are ratios of their CPU times.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.clips import dense  # noqa: E402
from common.io.decode import read_frames  # noqa: E402
from common.tools import shrink  # noqa: E402

LENGTH, STRIDE, SIDE = 8, 8, 256  # the clip that is asked for: frames, stride, short side


def scene(width, height, frames, seed=0):
    """Yield uint8 (H, W, 3) pictures: a panning texture, textured discs, noise, one cut."""
    rng = np.random.default_rng(seed)

    def texture(h, w):
        spectrum = np.fft.rfft2(rng.standard_normal((3, h, w)))
        fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)
        t = np.fft.irfft2(spectrum / np.maximum(np.hypot(fy, fx), 1 / w) ** 1.25, (h, w))
        t = (t - t.min()) / (t.max() - t.min()) * 255
        return t.transpose(1, 2, 0).astype(np.float32)

    backs = [texture(height, width + frames) for _ in range(2)]
    radius = height // 8
    disc = np.hypot(*np.mgrid[-radius:radius, -radius:radius])[..., None] < radius
    skins = [texture(2 * radius, 2 * radius) for _ in range(4)]
    phases, speeds = rng.uniform(0, 6.3, (4, 2)), rng.uniform(0.01, 0.05, (4, 2))
    noise = rng.normal(0, 2, (8, height, width, 3)).astype(np.float32)
    for t in range(frames):
        picture = backs[2 * t // frames][:, t : t + width].copy()
        for skin, phase, speed in zip(skins, phases, speeds, strict=True):
            room = np.array([height, width]) - 2 * radius
            y, x = ((np.sin(phase + speed * t) + 1) / 2 * room).astype(int)
            part = picture[y : y + 2 * radius, x : x + 2 * radius]
            np.copyto(part, skin, where=disc)
        yield np.clip(picture + np.roll(noise[t % 8], 7 * t, 1), 0, 255).astype(np.uint8)


def encode(path, pictures, codec, gop, width, height):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One slice per frame, as in files from the web: sliced threads would flatter decoders.
        stream.thread_type, stream.codec_context.thread_count = "FRAME", 1
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "23", "preset": "medium", "bf": "3"}
        else:
            stream.bit_rate = 400_000
        stream.time_base = Fraction(1, 30)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def resize(rgb):
    """uint8 (T, H, W, C) array -> (T, C, H, W) tensor of short side SIDE."""
    x = torch.from_numpy(rgb).permute(0, 3, 1, 2)
    size = [round(side * SIDE / min(x.shape[2:])) for side in x.shape[2:]] if SIDE else list(x.shape[2:])
    return x if list(x.shape[2:]) == size else TF.resize(x, size, antialias=True)


def size_of(path):
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        sides = context.width, context.height
        return [round(side * SIDE / min(sides)) for side in sides] if SIDE else sides


def ours(path, indices):
    return read_frames(path, indices, SIDE)


def naive(path, indices):
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return resize(np.stack([pictures[i] for i in indices]))


def with_decord(path, indices):
    from decord import VideoReader, cpu

    width, height = size_of(path)
    reader = VideoReader(path, ctx=cpu(0), width=width, height=height, num_threads=1)
    return torch.from_numpy(reader.get_batch(list(indices)).asnumpy()).permute(0, 3, 1, 2)


def with_torchcodec(path, indices, mode="exact"):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode, dimension_order="NHWC")
    return resize(decoder.get_frames_at(list(indices)).data.numpy())


def with_torchcodec_approximate(path, indices):
    return with_torchcodec(path, indices, "approximate")


def with_opencv(path, indices):
    import cv2

    cv2.setNumThreads(1)
    capture, pictures = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), []
    capture.set(cv2.CAP_PROP_POS_FRAMES, indices[0])
    for i in range(indices[0], indices[-1] + 1):
        capture.grab()
        if i in indices:
            pictures.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return resize(np.stack(pictures))


class DecodeOnly:
    """What libavcodec alone needs: the packets already in memory, nothing converted."""

    def __init__(self, path):
        self.container = av.open(path)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        self.pts = sorted(packet.pts for packet in self.packets)

    def __call__(self, path, indices):
        """Seconds of CPU time."""
        context, needed = self.stream.codec_context, {self.pts[i] for i in indices}
        first, ahead = min(needed), set(needed)
        start = max(n for n, p in enumerate(self.packets) if p.is_keyframe and p.pts <= first)
        begin = time.process_time()
        context.flush_buffers()
        for packet in self.packets[start:]:
            context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
            context.decode(packet)
            ahead.discard(packet.pts)
            if not ahead:
                context.decode(None)
                break
        return time.process_time() - begin


def verdict(clip, indices, truth):
    """How a clip compares with the frames of a full decode."""
    if torch.equal(clip, truth[indices]):
        return "bit-exact"
    wrong = 0
    for picture, i in zip(clip.float(), indices, strict=True):
        near = range(max(i - 3, 0), min(i + 4, len(truth)))
        wrong += near[int(np.argmin([(picture - truth[j]).abs().mean() for j in near]))] != i
    return f"{wrong}/{len(indices)} WRONG" if wrong else "right frames"


def measure(path, readers, args):
    """Returns ({reader: median seconds of CPU time}, {reader: set of verdicts}) for one file."""
    rng = random.Random(0)
    last = args.frames - LENGTH * STRIDE
    starts = [rng.randint(0, last) for _ in range(args.windows)]
    jobs = [(name, range(s, s + LENGTH * STRIDE, STRIDE)) for name in readers for s in starts]
    rng.shuffle(jobs)
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        truth = torch.cat([resize(picture[None]) for picture in pictures])
    seconds, verdicts = {name: [] for name in readers}, {name: set() for name in readers}
    for name, window in jobs:
        begin = time.process_time()
        clip = readers[name](path, list(window))
        spent = time.process_time() - begin
        if isinstance(clip, torch.Tensor):
            verdicts[name].add(verdict(clip, list(window), truth))
        else:
            spent = clip
        seconds[name].append(spent)
    return {name: float(np.median(times)) for name, times in seconds.items()}, verdicts


KINDS = [  # name, codec, key frame interval, width, height, suffix
    ("h264 340x256 gop 250", "libx264", 250, 340, 256, "mp4"),
    ("h264 340x256 gop 12", "libx264", 12, 340, 256, "mp4"),
    ("h264 1280x720 gop 250", "libx264", 250, 1280, 720, "mp4"),
    ("h264 1280x720 gop 12", "libx264", 12, 1280, 720, "mp4"),
    ("mpeg4 320x240 gop 12", "mpeg4", 12, 320, 240, "avi"),
]


def decode(args):
    """Clips/s of common.io.decode.read_frames against other readers and against libavcodec alone."""
    torch.set_num_threads(1)
    readers = {"common.io.decode": ours, "naive PyAV": naive, "decord": with_decord}
    readers |= {"torchcodec exact": with_torchcodec, "OpenCV": with_opencv}
    readers["torchcodec approximate"] = with_torchcodec_approximate
    trial = os.path.join(args.folder, "trial.mp4")
    encode(trial, scene(64, 64, 12), "libx264", 12, 64, 64)
    for name in list(readers):
        try:
            readers[name](trial, [0, 8])
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name}: not installed ({str(error).partition(chr(10))[0][:60]})")
            del readers[name]
    size = f"short side {SIDE}" if SIDE else "own size"
    print(f"{LENGTH} frames, stride {STRIDE}, {size}; one thread; medians of CPU time")
    for kind, codec, gop, width, height, suffix in KINDS:
        if args.only not in kind:
            continue
        path = os.path.join(args.folder, f"{width}_{gop}_{args.frames}.{suffix}")
        if not os.path.exists(path):
            encode(path, scene(width, height, args.frames), codec, gop, width, height)
        rate = os.path.getsize(path) * 8 * 30 / args.frames / 1000
        everything = dict(readers, **{"decode only": DecodeOnly(path)})
        medians, verdicts = measure(path, everything, args)
        us, worst = medians["common.io.decode"], medians["naive PyAV"]
        print(f"\n{kind}, {args.frames} frames, {rate:.0f} kb/s")
        print(f"{'':24}{'ms/clip':>9}{'clips/s':>9}{'x naive':>9}{'x ours':>9}  frames")
        for name, t in sorted(medians.items(), key=lambda item: item[1]):
            numbers = f"{1e3 * t:9.1f}{1 / t:9.1f}{worst / t:9.1f}{us / t:9.2f}"
            print(f"{name:24}{numbers}  {', '.join(sorted(verdicts[name]))}", flush=True)


def shrunken(args):
    """Clips/s of decode.read_frames from 720p with a key frame every 250, before and after shrinking."""
    torch.set_num_threads(1)
    before, after = os.path.join(args.folder, "before"), os.path.join(args.folder, "after")
    os.makedirs(before, exist_ok=True)
    for part in ("train", "test"):
        encode(f"{before}/{part}.mp4", scene(1280, 720, args.frames), "libx264", 250, 1280, 720)
        with open(f"{before}/{part}.txt", "w") as file:
            file.write(f"{part}.mp4 0\n")
    assert shrink.main([before, "--out", after, "--workers", "0"]) == 0
    rng, times = np.random.default_rng(0), {before: [], after: []}
    for _ in range(args.windows):
        indices = dense(args.frames, LENGTH, STRIDE, rng)
        for folder in rng.permutation([before, after]):
            start = time.process_time()
            read_frames(f"{folder}/train.mp4", indices, SIDE)
            times[str(folder)].append(time.process_time() - start)
    old, new = (1e3 * np.median(times[folder]) for folder in (before, after))
    rate = os.path.getsize(f"{before}/train.mp4") * 8 * 30 / args.frames / 1000
    print(f"{rate:.0f} kb/s: {old:.1f} ms a clip before, {new:.1f} ms after, {old / new:.1f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shrunken", action="store_true", help="time a file before and after shrinking")
    parser.add_argument("--native", action="store_true", help="do not resize the pictures")
    parser.add_argument("--windows", type=int, default=16, help="random clips per file")
    parser.add_argument("--frames", type=int, default=300, help="frames per file")
    parser.add_argument("--folder", help="keep the files here (default: a temporary folder)")
    parser.add_argument("--only", default="", help="only kinds of file whose name has this in it")
    args = parser.parse_args()
    global SIDE
    SIDE = None if args.native else SIDE
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or folder
        shrunken(args) if args.shrunken else decode(args)


if __name__ == "__main__":
    main()

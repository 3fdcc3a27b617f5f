"""Time one training item of CMPL beside what people use for it, on one thread.

    python tests/bench/item.py --folder VIDEOS

An item is the weak and the strong view of a clip of 8 and of one of 16 frames, 224 pixels, of one video. The
others make views of the same sizes from the same frames: decord with RandAugment of PIL, picture by picture,
as the code of many papers has it, and decord or torchcodec with torchvision's v2 transforms. All run in turn,
in random order, in one process: compare the CPU milliseconds of one table only.
"""

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandAugment, v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from decode import encode, scene  # noqa: E402

import cmpl  # noqa: E402
from common.clips import Clips  # noqa: E402
from common.data import Videos  # noqa: E402

SIZE, WEAK = 224, 256


def ours(paths):
    """index -> the views of cmpl.py, as its loader makes them."""
    args = cmpl.parse_args(["--data", "k400"])
    view = partial(cmpl.views, args=args, flip=True, labelled=False)
    clips = Clips(Videos.make("/", paths, [0] * len(paths)), partial(cmpl.windows, args=args), view, seed=0)
    return lambda i: clips[i]


def windows(frames):
    """Frame numbers of a clip of 8 frames at stride 8 and of one of 16 at stride 4, looped."""
    return [(np.random.randint(frames) + np.arange(n) * stride) % frames for n, stride in ((8, 8), (16, 4))]


def decord(path):
    """uint8 (T, H, W, 3) of both clips."""
    from decord import VideoReader, cpu

    reader = VideoReader(path, ctx=cpu(0), num_threads=1)
    return [reader.get_batch(list(window)).asnumpy() for window in windows(len(reader))]


def torchcodec(path):
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return [reader.get_frames_at(list(window)).data.numpy() for window in windows(len(reader))]


def with_pil(read, path):
    """RandAugment of PIL on each picture, the same random choices for all of a clip."""
    augment = RandAugment(2, 9)
    for frames in read(path):
        scale = np.random.randint(256, 321) / min(frames.shape[1:3])
        size = [round(side * scale) for side in frames.shape[1:3]]
        top, left = (np.random.randint(side - SIZE + 1) for side in size)
        seed, strong, weak = random.getrandbits(32), [], []
        for picture in frames:
            picture = Image.fromarray(picture)
            torch.manual_seed(seed)
            resized = picture.resize(size[::-1], Image.BILINEAR)
            strong.append(np.asarray(augment(resized.crop((left, top, left + SIZE, top + SIZE)))))
            short = [round(side * WEAK / min(frames.shape[1:3])) for side in frames.shape[1:3]]
            weak.append(np.asarray(picture.resize(short[::-1], Image.BILINEAR)))
        np.stack(weak), np.stack(strong)


def with_torchvision(read, path):
    """torchvision's v2 transforms on whole clips."""
    strong = v2.Compose([v2.RandomShortestSize(256, 320, antialias=True), v2.RandomCrop(SIZE),
                         v2.RandomHorizontalFlip(), v2.RandAugment(2, 9)])  # fmt: skip
    weak = v2.Compose([v2.Resize(WEAK, antialias=True), v2.CenterCrop(SIZE)])
    for frames in read(path):
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
        weak(clip), strong(clip)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", help="time these videos (default: a made one of 340 x 256 pixels)")
    parser.add_argument("--repeats", type=int, default=5, help="items of each video")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(str(path.resolve()) for path in Path(args.folder or folder).rglob("*.*")
                       if path.suffix in (".avi", ".mp4", ".mkv", ".webm"))  # fmt: skip
        if not args.folder:
            paths = [str(Path(folder, "made.mp4"))]
            encode(paths[0], scene(340, 256, 300), "libx264", 12, 340, 256)
        item = ours(paths)
        variants = {
            "cmpl.py": item,
            "decord, RandAugment of PIL": lambda i: with_pil(decord, paths[i]),
            "decord, torchvision v2": lambda i: with_torchvision(decord, paths[i]),
            "torchcodec, torchvision v2": lambda i: with_torchvision(torchcodec, paths[i]),
        }
        seconds = {}
        for name, make in variants.items():
            try:
                make(0)
                seconds[name] = []
            except (ImportError, RuntimeError, OSError) as error:
                print(f"{name}: not installed ({str(error).partition(chr(10))[0][:60]})")
        jobs = [(name, i) for name in seconds for i in range(len(paths))] * args.repeats
        random.Random(0).shuffle(jobs)
        for name, i in jobs:
            begin = time.process_time()
            variants[name](i)
            seconds[name].append(time.process_time() - begin)
    own = np.mean(seconds["cmpl.py"])
    print(f"{len(paths)} videos, {args.repeats} items of each; one thread")
    for name, times in seconds.items():
        print(f"{name:30}{1e3 * np.mean(times):8.1f} ms CPU an item{np.mean(times) / own:8.2f} x")


if __name__ == "__main__":
    main()

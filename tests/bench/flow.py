"""Time TV-L1 beside OpenCV's, where that is installed, on pairs of known motion, on one thread.

python tests/bench/flow.py
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from decode import scene  # noqa: E402  (beside this file)

from common.tvl1 import SCHEME, _gray, tvl1  # noqa: E402

HEIGHT, WIDTH, MARGIN = 256, 340, 16  # of the pictures of a pair; what known motion is compared without


def photos():
    """Gray float32 (H, W) pictures, larger than a pair's: two photographs of scikit-learn, or a texture."""
    try:
        from sklearn.datasets import load_sample_images

        pictures = [np.asarray(picture) for picture in load_sample_images().images]
    except ImportError:
        print("scikit-learn and its photographs are not there: on a texture")
        pictures = [next(scene(640, 427, 1))]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return _gray(TF.resize(x, [320, 480], antialias=True))


# name: degrees, zoom, and shift to the right and down in pixels, about the centre
MOVES = {"1.5 px": (0, 1, 1.2, -0.9), "7.2 px": (0, 1, -6, 4), "turn": (3, 1, 0, 0), "zoom": (0, 1.04, 0, 0),
         "all": (1.5, 1.02, 2, 1.5)}  # fmt: skip


def moved(picture):
    """Yield uint8 (2, HEIGHT, WIDTH), with noise, and the motion (2, HEIGHT, WIDTH) from 0 to 1."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] - np.array([HEIGHT - 1, WIDTH - 1])[:, None, None] / 2
    here, half = x + 1j * y, np.array(picture.shape)[::-1] / 2
    for degrees, zoom, u, v in MOVES.values():
        turn, by, frames = zoom * np.exp(1j * np.radians(degrees)), u + 1j * v, []
        for place in (here, (here - by) / turn):  # where in the picture it was
            grid = torch.from_numpy(np.stack([place.real, place.imag], -1) / half).float()
            frame = F.grid_sample(picture[None, None], grid[None], "bicubic", "reflection", False)
            frames.append(frame[0, 0] + torch.from_numpy(rng.normal(0, 1, (HEIGHT, WIDTH))))
        motion = here * (turn - 1) + by
        yield torch.stack(frames).round().clamp(0, 255).byte(), np.stack([motion.real, motion.imag])


def opencv_flow(**settings):
    """pair -> (2, H, W) by OpenCV's DualTVL1. Raises ImportError without OpenCV or its contrib modules."""
    import cv2

    cv2.setNumThreads(1)
    if not hasattr(cv2, "optflow"):
        raise ImportError("OpenCV without its contrib modules")
    algorithm = cv2.optflow.createOptFlow_DualTVL1()
    for name, value in settings.items():
        getattr(algorithm, f"set{name}")(value)
    return lambda pair: algorithm.calc(*pair.numpy(), None).transpose(2, 0, 1)


def main():
    """TV-L1 of common.tvl1 on pairs of known motion: CPU ms a pair, and errors beside those of OpenCV."""
    torch.set_num_threads(1)
    same = dict(OuterIterations=1, MedianFiltering=1, Epsilon=0)
    variants = {
        "ours": lambda pair: tvl1(pair[None])[0, 0].numpy(),
        "ours, flow videos": lambda pair: tvl1(pair[None], **SCHEME)[0, 0].numpy(),
        "ours, zfactor 0.5": lambda pair: tvl1(pair[None], zfactor=0.5)[0, 0].numpy(),
    }
    try:
        variants["OpenCV, same iterations"] = opencv_flow(**same)
        variants["OpenCV, default"] = opencv_flow()
        variants["OpenCV, same, 8 levels"] = opencv_flow(**same, ScalesNumber=SCHEME["nscales"])
        variants["OpenCV, 8 levels"] = opencv_flow(ScalesNumber=SCHEME["nscales"])
    except ImportError as error:
        print(f"without OpenCV ({error})")
    pairs = [pair for photo in photos() for pair in moved(photo)]
    jobs = [(variant, i) for variant in variants for i in range(len(pairs))]
    random.Random(0).shuffle(jobs)
    found, seconds = {}, {}
    variants["ours"](pairs[0][0])  # the first call is slower
    for variant, i in jobs:
        begin = time.process_time()
        found[variant, i] = variants[variant](pairs[i][0])
        seconds[variant, i] = time.process_time() - begin

    def errors(variant, truth, margin=0):
        inside = slice(margin, -margin or None)
        every = [np.linalg.norm(found[variant, i] - truth[i], axis=0) for i in range(len(pairs))]
        every = [error[inside, inside] for error in every]
        return f"{np.mean(every):9.4f} {np.median(every):9.5f} {max(np.mean(e) for e in every):9.4f}"

    print(f"{len(pairs)} pairs of {WIDTH} x {HEIGHT}, one thread; errors in px: mean, median, worst pair")
    print(f"{'':25}{'ms':>6}  {'to the known motion':^29}  {'to OpenCV, same iterations':^29}")
    for variant in variants:
        ms = 1e3 * np.mean([seconds[variant, i] for i in range(len(pairs))])
        line = f"{variant:25}{ms:6.0f}  {errors(variant, [motion for _, motion in pairs], MARGIN)}"
        if "OpenCV, same iterations" in variants:
            theirs = [found["OpenCV, same iterations", i] for i in range(len(pairs))]
            line += "  " + errors(variant, theirs)
        print(line)
    if torch.cuda.is_available():
        batch = torch.stack([pair for pair, _ in pairs]).cuda().repeat(16, 1, 1, 1)
        tvl1(batch)  # compiles
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        on_gpu = tvl1(batch)
        end.record()
        torch.cuda.synchronize()
        apart = on_gpu[: len(pairs), 0].cpu().numpy() - [found["ours", i] for i in range(len(pairs))]
        print(f"{torch.cuda.get_device_name()}: {begin.elapsed_time(end) / len(batch):.2f} ms a pair, of "
              f"{len(batch)}; {np.linalg.norm(apart, axis=1).mean():.5f} px from the CPU")  # fmt: skip


if __name__ == "__main__":
    main()

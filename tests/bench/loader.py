"""Time the training loader: items a second, start of a worker, memory of a worker for lists of any length.

    python tests/bench/loader.py

Items are those of CMPL at 224 pixels (see item.py), of one made video that a list names again and again.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from decode import encode, scene  # noqa: E402

import cmpl  # noqa: E402
from common.clips import Clips, train_loader  # noqa: E402
from common.data import Videos  # noqa: E402


def clips_of(root, entries):
    """The unlabelled clips of cmpl.py's Kinetics-400 recipe, of a list of `entries` lines."""
    args = cmpl.parse_args(["--data", "k400"])
    names = [f"{'x' * 40}/../made.mp4"] * entries  # as long as a path of Kinetics-400
    videos = Videos.make(root, names, np.zeros(entries, np.int64))
    view = partial(cmpl.views, args=args, flip=True, labelled=False)
    return Clips(videos, partial(cmpl.windows, args=args), view, seed=0)


def private_megabytes(pid):
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="items of a batch")
    parser.add_argument("--steps", type=int, default=16, help="batches that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        Path(root, "x" * 40).mkdir()
        encode(f"{root}/made.mp4", scene(340, 256, 300), "libx264", 12, 340, 256)
        for workers, entries in ((1, 100), (1, 10_000), (1, 240_000), (2, 10_000)):
            began = time.perf_counter()
            source = [(clips_of(root, entries), args.batch)]
            batches = iter(train_loader(source, 0, args.steps + 2, workers=workers))
            next(batches)
            first = time.perf_counter() - began
            next(batches)
            began = time.perf_counter()
            for _ in range(args.steps):
                next(batches)
            rate = args.steps * args.batch / (time.perf_counter() - began)
            memory = [private_megabytes(child.pid) for child in multiprocessing.active_children()]
            print(f"workers {workers}, {entries:7} entries: {rate:6.1f} items/s, first batch after "
                  f"{first:.1f} s, a worker's own memory {np.mean(memory):.0f} MB", flush=True)  # fmt: skip
            del batches
            while multiprocessing.active_children():
                time.sleep(0.1)


if __name__ == "__main__":
    main()

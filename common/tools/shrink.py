"""A smaller copy of a data set that loads several times faster."""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from common.data import load_everything
from common.errors import UserError, VideoError, printable, reason_of, reasons, status_of
from common.flags import data_flags
from common.io import files
from common.io.decode import Video
from common.io.encode import encode
from common.io.readers import path_parts, scan_videos, stem_of
from common.io.workers import in_parallel


def main(argv=None):
    """The command. Returns the exit status: 2 after a UserError, and 0 with bad videos, too."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.shrink", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Re-encode every video to small pictures and close key frames; finished ones are kept.",
    )  # fmt: skip
    data_flags(parser)
    parser.add_argument("--out", required=True, help="folder for the new data set")
    parser.add_argument("--short_side", type=int, default=256, help="pixels; smaller videos keep their size")
    parser.add_argument("--gop", type=int, default=12, help="frames from one key frame to the next")
    parser.add_argument("--crf", type=int, default=23, help="quality of H.264: lower is better and larger")
    args = parser.parse_args(argv)
    return status_of(shrink, args, args.out)


def shrink(args):
    """Every video again, as <same name>.mp4 under args.out, and the annotations beside them."""
    if args.short_side < 16 or args.gop < 1 or not 0 <= args.crf <= 51:
        raise UserError("--short_side must be 16 or more, --gop 1 or more, --crf 0 to 51")
    root, data = load_everything(args.data, args.root, args.split)
    paths = data.paths()
    if Path(args.out).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"--out {args.out} lies in {root}: the new data set needs a folder of its own")
    targets = {}
    for path in paths:
        name = os.path.relpath(path, root)
        name = name if not name.startswith("..") else os.path.join(*path_parts(path)[-2:])
        target = os.path.join(args.out, stem_of(name) + ".mp4")
        if target in targets:
            both = f"{printable(path)} and {printable(targets[target])}"
            raise UserError(f"{both} would both become {printable(target)}")
        targets[target] = path
    settings = dict(short_side=args.short_side, gop=args.gop, crf=args.crf)
    os.makedirs(args.out, exist_ok=True)
    _same_settings(os.path.join(args.out, "shrink.json"), settings)
    for temp in Path(args.out).rglob("*.mp4.*.tmp"):  # of a run that was killed
        temp.unlink()
    for file in _annotations(Path(root)):
        copy = Path(args.out, file.relative_to(root))
        copy.parent.mkdir(exist_ok=True)
        with files.replacing(copy) as new:
            new.write(file.read_bytes())
    there = {os.path.join(args.out, name) for name in scan_videos(args.out)}
    jobs = [(path, target, settings) for target, path in targets.items() if target not in there]
    if len(jobs) < len(paths):
        print(f"{len(paths) - len(jobs)} of {len(paths)} videos are done already", flush=True)
    bad = []
    for (path, *_), result in in_parallel(_shrink_one, jobs, args.workers, "shrink"):
        if isinstance(result, str):
            bad.append((path, result))
        elif result:
            print(f"{printable(path)}: damaged frames replaced by a neighbour: {result}", flush=True)
    files.report_bad(args.out, bad, len(paths), f"are in {args.out}")
    return 0


def _annotations(root):
    """Lists and tables in a data set's folder and the folders in it."""
    for folder in (root, *(folder for folder in sorted(root.iterdir()) if folder.is_dir())):
        for file in folder.iterdir():
            of_shrink = file.name in ("shrink.json", "bad_videos.txt")
            if file.suffix in (".txt", ".csv", ".json") and file.is_file() and not of_shrink:
                yield file


def _same_settings(path, settings):
    """Remember the settings in a file; raises UserError if it has others."""
    if os.path.exists(path) and (old := json.loads(Path(path).read_text())) != settings:
        raise UserError(f"{path} has other settings ({old}); use those, or another --out")
    files.write(path, json.dumps(settings) + "\n")


def _shrink_one(job):
    """Re-encode one video, every frame at its time.

    Returns why that failed, else for how many frames others stand in, None if for none.
    """
    torch.set_num_threads(1)
    path, target, settings = job
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with Video(path) as video, files.replacing(target) as file:
            options = {"preset": "fast", "crf": str(settings["crf"])}
            pictures = _small(video, settings["short_side"])
            times = encode(file.name, pictures, video.fps, video.times, options, gop=settings["gop"])
            with Video(file.name) as copy:
                if len(copy) != len(video) or np.abs(copy.times - times).max() > 1e-3:
                    raise VideoError(f"{len(copy)} of {len(video)} frames arrived, or at other times")
            return len(video.stand_ins) or None
    except OSError as error:  # of the disk: what the video raises is a VideoError
        if error.errno in files.NAME_ERRORS:
            return reason_of(error)
        raise
    except Exception as error:
        return reason_of(error)


def _small(video, short_side):
    """Yield the frames of a Video, uint8 (H, W, 3) of even sizes, the short side at most short_side."""
    with reasons():
        sides = video.height, video.width
        if min(sides) < 2:
            raise VideoError(f"pictures of {sides[1]} x {sides[0]} pixels are too small to encode")
        waiting, n = {}, 0  # a file can be so damaged that its frames come in another order
        for i, picture in video.one_pass(min(short_side, *sides)):
            waiting[i] = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
            while n in waiting:
                yield waiting.pop(n)
                n += 1


if __name__ == "__main__":
    sys.exit(main())

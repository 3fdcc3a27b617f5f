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
from common.flags import at_least, data_flags
from common.io import files
from common.io.decode import Video
from common.io.encode import encode
from common.io.readers import LISTS, path_parts, scan_videos, stem_of
from common.io.workers import in_parallel


def main(argv=None):
    """The command. Returns the exit status: 2 after a UserError, and 0 with bad videos, too."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.shrink", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Re-encode every video to small pictures and close key frames; finished ones are kept.",
    )  # fmt: skip
    data_flags(parser)
    parser.add_argument("--out", required=True, help="folder for the new data set")
    parser.add_argument(
        "--short_side", type=at_least(16), default=256, help="pixels; smaller videos keep theirs"
    )
    parser.add_argument("--gop", type=at_least(1), default=12, help="frames from one key frame to the next")
    parser.add_argument(
        "--crf", type=at_least(0, 51), default=23, help="H.264 quality; lower: better, larger"
    )
    args = parser.parse_args(argv)
    return status_of(shrink, args, args.out)


def shrink(args):
    """Every video again, as <same name>.mp4 under args.out, and the annotations beside them."""
    root, data = load_everything(args.data, args.root, args.split)
    if Path(args.out).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"--out {args.out} lies in {root}: the new data set needs a folder of its own")
    paths, targets = data.paths(), {}
    for path in paths:
        name = os.path.relpath(path, root)
        name = os.path.join(*path_parts(path)[-2:]) if name.startswith("..") else name
        target = os.path.join(args.out, stem_of(name) + ".mp4")
        if targets.setdefault(target, path) != path:
            both = f"{printable(path)} and {printable(targets[target])}"
            raise UserError(f"{both} would both become {printable(target)}")
    settings = dict(short_side=args.short_side, gop=args.gop, crf=args.crf)
    copy_annotations(Path(root), Path(args.out), settings)
    finished = {os.path.join(args.out, name) for name in scan_videos(args.out)}
    jobs = [(path, target, settings) for target, path in targets.items() if target not in finished]
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


def copy_annotations(root, out, settings):
    """Copy the lists and tables in root and in the folders in it, and remove what a killed run has left.

    Raises UserError if `out` was made with other settings, which are kept in shrink.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "shrink.json"
    if stamp.exists() and (previous := json.loads(stamp.read_text())) != settings:
        raise UserError(f"{stamp} has other settings ({previous}); use those, or another --out")
    files.write(stamp, json.dumps(settings) + "\n")
    for path in out.rglob("*.mp4.*.tmp"):
        path.unlink()
    for path in (*root.glob("*"), *root.glob("*/*")):
        is_list = path.suffix in LISTS and path.name not in ("shrink.json", "bad_videos.txt")
        if is_list and path.is_file():
            copy = out / path.relative_to(root)
            copy.parent.mkdir(exist_ok=True)
            with files.replacing(copy) as file:
                file.write(path.read_bytes())


def _shrink_one(job):
    """Re-encode one video (path, target, settings), every frame at its time.

    Returns the reason if that failed, else how many frames are replaced by a neighbour, None for none.
    """
    torch.set_num_threads(1)
    path, target, settings = job
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with Video(path) as video, files.replacing(target) as file:
            options = {"preset": "fast", "crf": str(settings["crf"]), "g": str(settings["gop"])}
            frames = _small_frames(video, settings["short_side"])
            times = encode(file.name, frames, video.fps, video.times, options)
            with Video(file.name) as copy:
                if len(copy) != len(video) or np.abs(copy.times - times).max() > 1e-3:
                    raise VideoError(f"{len(copy)} of {len(video)} frames arrived, or at other times")
            return len(video.stand_ins) or None
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in files.NAME_ERRORS:
            raise  # of the disk: what the video raises is a VideoError
        return reason_of(error)


def _small_frames(video, short_side):
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

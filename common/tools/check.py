"""Decode every file of a data set and list the bad ones."""

import argparse
import os
import sys
from functools import partial

import torch

from common.data import load_everything
from common.errors import UserError, reason_of, status_of
from common.flags import data_flags
from common.io import files
from common.io.decode import Video
from common.io.workers import in_parallel


def main(argv=None):
    """The command. Returns the exit status: 1 if there are bad videos, 2 after a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.check", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Decode every file and list the bad ones in bad_videos.txt; nothing is deleted.",
    )  # fmt: skip
    data_flags(parser)
    parser.add_argument("--out", default=".", help="folder for bad_videos.txt")
    text = "compare every frame after a seek with that of one pass, not four windows of 8 frames"
    parser.add_argument("--all_windows", action="store_true", help=text)
    args = parser.parse_args(argv)
    return status_of(check, args, args.out)


def check(args):
    """Decode every video and write bad_videos.txt; the exit status."""
    _, data = load_everything(args.data, args.root, args.split)
    if not os.access(args.out, os.W_OK):
        raise UserError(f"--out {args.out} is not a folder that can be written to")
    check_one, paths = partial(_check_one, all_windows=args.all_windows), data.paths()
    bad = [(path, reason) for path, reason in in_parallel(check_one, paths, args.workers, "check") if reason]
    files.report_bad(args.out, bad, len(paths), "decode")
    return 1 if bad else 0


def _check_one(path, all_windows=False):
    """Decode a file in one pass, and windows of it by seeks, too. Returns why it is bad, or None."""
    torch.set_num_threads(1)
    try:
        with Video(path, min_share=1.0) as video:
            hashes, n = {i: hash(picture.tobytes()) for i, picture in video.one_pass(16)}, len(video)
            for start in range(0, n, 8) if all_windows else {0, n // 3, 2 * n // 3, max(n - 8, 0)}:
                window = range(start, min(start + 8, n))
                clip = video.get(window, 16).permute(0, 2, 3, 1).numpy()
                if [hash(picture.tobytes()) for picture in clip] != [hashes[i] for i in window]:
                    return f"frames {start} to {window[-1]} after a seek differ from those of one pass"
    except Exception as error:
        return reason_of(error)


if __name__ == "__main__":
    sys.exit(main())

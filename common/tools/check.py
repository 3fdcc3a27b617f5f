"""Decode every file of a data set and list the bad ones."""

import argparse
import os
import sys
from functools import partial

import torch

from common.data import default_root, load_data
from common.errors import UserError, printable, reason_of, survive_output
from common.io import files
from common.io.decode import Video
from common.io.workers import in_parallel
from common.tools.shrink import _shrink

# ---- commands --------------------------------------------------------------------------------------


def main(argv=None):
    """`check` and `shrink`; returns the exit status: 1 if check found bad videos, 2 after a UserError."""
    survive_output()
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    texts = {
        "check": "decode every file and list the bad ones in bad_videos.txt; deletes nothing",
        "shrink": "re-encode every file to small pictures and close key frames; goes on where it was",
    }
    for name, text in texts.items():
        defaults = argparse.ArgumentDefaultsHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=defaults)
        sub.add_argument("data", help="name of a data set, or a folder")
        sub.add_argument("--root", help="where the data set is (data/<name> if not given)")
        sub.add_argument("--split", type=int, default=1, help="which lists are read")
        sub.add_argument("--workers", type=int, default=cores, help="processes, or 0")
        if name == "check":
            sub.add_argument("--out", default=".", help="folder for bad_videos.txt")
            text = "compare every frame after a seek with that of one pass, not four windows of 8 frames"
            sub.add_argument("--all_windows", action="store_true", help=text)
            continue
        sub.add_argument("--out", required=True, help="folder for the new data set")
        sub.add_argument("--short_side", type=int, default=256, help="pixels; smaller videos keep their size")
        sub.add_argument("--gop", type=int, default=12, help="frames from one key frame to the next")
        sub.add_argument("--crf", type=int, default=23, help="quality of H.264: lower is better and larger")
    args = parser.parse_args(argv)
    try:
        if args.workers < 0:
            raise UserError(f"--workers {args.workers} is less than 0")
        return dict(check=_check, shrink=_shrink)[args.command](args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{error.filename or args.out}: {error.strerror}; when that is mended, run the same command "
            "again",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _paths(args):
    """(root, sorted paths of all files of the data set args.data)."""
    name = "hmdb51:all" if args.data == "hmdb51" else args.data
    root = args.root or default_root(name)
    data = load_data(name, root, args.split)
    for note in data.notes:
        print(printable(note), flush=True)
    return root, sorted({part.path(i) for part in (data.train, data.test) for i in range(len(part))})


def _check(args):
    _, paths = _paths(args)
    if not os.access(args.out, os.W_OK):
        raise UserError(f"--out {args.out} is not a folder that can be written to")
    job = partial(_check_one, all_windows=args.all_windows)
    bad = [(path, reason) for path, reason in in_parallel(job, paths, args.workers, "check") if reason]
    _report(args.out, bad, len(paths), "decode")
    return 1 if bad else 0


def _report(out, bad, total, verb):
    """Write bad_videos.txt (path, tab, reason; empty if all is well), and say how many there are."""
    path = os.path.join(out, "bad_videos.txt")
    files.write(path, "".join(f"{name}\t{reason}\n" for name, reason in sorted(bad)))
    listed = f"; the others are in {path}" if bad else ""
    print(printable(f"{total - len(bad)} of {total} videos {verb}{listed}"))


def _check_one(path, all_windows=False):
    """Decode a file in one pass, and windows of it by seeks, too. Returns why it is bad, or None."""
    torch.set_num_threads(1)
    try:
        with Video(path, min_share=1.0) as video:
            pictures, n = {i: hash(picture.tobytes()) for i, picture in video.one_pass(16)}, len(video)
            for start in range(0, n, 8) if all_windows else {0, n // 3, 2 * n // 3, max(n - 8, 0)}:
                window = range(start, min(start + 8, n))
                clip = video.get(window, 16).permute(0, 2, 3, 1).numpy()
                if [hash(picture.tobytes()) for picture in clip] != [pictures[i] for i in window]:
                    return f"frames {start} to {window[-1]} after a seek differ from those of one pass"
    except Exception as error:
        return reason_of(error)


if __name__ == "__main__":
    sys.exit(main())

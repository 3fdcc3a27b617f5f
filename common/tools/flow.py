"""Optical flow of a data set's videos, once."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

from common.data import load_everything
from common.errors import UserError, printable, survive_output
from common.io.flow import BOUND, SHORT_SIDE, extract_flow


def main(argv=None):
    """The command. Returns the exit status: 2 after a UserError, 130 after SIGINT or SIGTERM, else 0.

    So it is 0 with bad videos, too: another would make torchrun end the ranks that are not done.
    """
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.flow", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Make a flow video of every video of a data set.",
    )  # fmt: skip
    parser.add_argument("data", help="name of a data set, or a folder")
    parser.add_argument("--out", required=True, help="folder for the flow videos")
    parser.add_argument("--root", help="where the data set is (data/<name> if not given)")
    parser.add_argument("--split", type=int, default=1, help="which lists are read")
    parser.add_argument(
        "--short_side", type=int, default=SHORT_SIDE, help="pixels; smaller videos keep their size"
    )
    parser.add_argument("--bound", type=float, default=BOUND, help="pixels of motion that a byte can hold")
    args = parser.parse_args(argv)
    survive_output()
    group = os.environ if "RANK" in os.environ else {}
    rank, world = int(group.get("RANK", 0)), int(group.get("WORLD_SIZE", 1))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # no file is left half-written
    try:
        counts = _extract_data(args, rank, world)
    except UserError as error:
        if rank:
            time.sleep(5)  # rank 0 says the same, and torchrun then ends this rank
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    share = f"rank {rank} of {world}: " * (world > 1)
    listed = f" (listed in {os.path.join(args.out, 'bad_videos.txt')})" * (counts["bad"] > 0)
    made, there, bad = (counts[key] for key in ("made", "there", "bad"))
    print(printable(f"{share}{made} made, {there} were there, {bad} unreadable{listed}"))
    return 0


def _extract_data(args, rank, world):
    root, data = load_everything(args.data, args.root, args.split)
    if Path(args.out).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"--out {args.out} lies in {root}: its files would be taken for videos of that")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    videos = list(data.parts().values())
    return extract_flow(videos, args.out, args.short_side, args.bound, device, rank, world)


if __name__ == "__main__":
    sys.exit(main())

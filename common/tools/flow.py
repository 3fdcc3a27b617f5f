"""TV-L1 optical flow of every video of a data set; the same command resumes.

    python -m common.tools.flow DATA --out DIR
    torchrun --nproc_per_node 8 -m common.tools.flow DATA --out DIR     shared among processes and their GPUs

There may be more processes than GPUs: some then read and write videos while others compute.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

from common.data import load_everything
from common.errors import UserError, printable, status_of
from common.flags import at_least
from common.io.flow import extract_flow
from common.modality import BOUND, FLOW_SIDE
from common.tvl1 import SMALLEST


def main(argv=None):
    """The command. Returns the exit status: 2 after a UserError or an error of the disk, 130 after SIGINT.

    With unreadable videos it is 0: torchrun would end the other ranks after another status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.flow", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=__doc__.partition("\n")[0],
    )  # fmt: skip
    parser.add_argument("data", help="name of a data set, or a folder")
    parser.add_argument("--out", required=True, help="folder for the flow videos")
    parser.add_argument("--root", help="where the data set is (data/<name> if not given)")
    parser.add_argument("--split", type=int, default=1, help="which lists are read")
    parser.add_argument("--short_side", type=at_least(SMALLEST), default=FLOW_SIDE,
                        help="pixels of the pictures; smaller videos keep their size")  # fmt: skip
    parser.add_argument("--bound", type=at_least(1.0), default=BOUND, help="pixels of motion a byte can hold")
    parser.add_argument("--workers", type=at_least(0), default=0,
                        help="processes of each rank, which survive videos that crash the decoder; "
                        "0: the rank itself")  # fmt: skip
    args = parser.parse_args(argv)
    return status_of(extract, args, args.out)


def extract(args):
    """Extract this rank's share of the flow, and print how many videos there were."""
    ranks = os.environ if "RANK" in os.environ else {}
    rank, world = int(ranks.get("RANK", 0)), int(ranks.get("WORLD_SIZE", 1))
    try:
        root, data = load_everything(args.data, args.root, args.split)
        if Path(args.out).resolve().is_relative_to(Path(root).resolve()):
            raise UserError(f"--out {args.out} lies in {root}: its files would be taken for videos of that")
        device = "cpu"
        if torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        videos, scale = list(data.parts().values()), (args.bound, args.short_side)
        counts = extract_flow(videos, args.out, scale, device, (rank, world), args.workers)
    except UserError:
        if rank:
            time.sleep(5)  # rank 0 says the same, and torchrun then ends this rank
        raise
    made, there, bad = counts.values()
    name = f"rank {rank} of {world}: " * (world > 1)
    listed = f" (listed in {os.path.join(args.out, 'bad_videos.txt')})" * (bad > 0)
    print(printable(f"{name}{made} made, {there} were there, {bad} unreadable{listed}"))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no file is left half-written
    sys.exit(main())

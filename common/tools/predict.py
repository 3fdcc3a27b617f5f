"""The most probable classes of video files.

    python -m common.tools.predict MODEL.PT clip.mp4 folder 'more/*.avi'

prints a table, or with --json an object a line: one row for each file, and for each video below a folder. A
video that cannot be read has the reason in its row, and the exit status is then 2.
"""

import argparse
import glob
import json
import os
import sys

import numpy as np
import torch

from common.clips import Views, eval_loader
from common.data import Videos
from common.errors import printable, status_of
from common.evaluate import VIEWS_PER_BATCH, average_views, what_is_averaged
from common.io.models import load_model
from common.io.readers import scan_videos


@torch.no_grad()
def predict(model, paths, device="cpu", top=5, workers=0):
    """Yield (path, [(class, probability), ...] best first, reason why it cannot be read or None) of videos.

    model: what load_model returns; the network must be on `device`.
    """
    net, _, classes, recipe = model
    dataset = Views(Videos.make("", paths, [0] * len(paths)), recipe.sample, recipe.view, recipe.short_side,
                    recipe.open)  # fmt: skip
    call = what_is_averaged(net, recipe)
    for path, batch in zip(paths, eval_loader(dataset, 1, workers=workers), strict=True):
        if batch["views"] is None:
            yield path, [], batch["bad"][0][1]
        else:
            x = recipe.to_input(batch["views"], device)
            y = torch.cat([call(views) for views in x.split(VIEWS_PER_BATCH)]).float().cpu()
            ((_, p, *_),) = average_views(net, y, batch, recipe.average, recipe.multilabel)
            yield path, [(classes[k], float(p[k])) for k in np.argsort(-p, kind="stable")[:top]], None


def paths_of(words):
    """Paths of the videos that are meant by files, folders, and patterns such as '*.mp4'."""
    paths = []
    for word in words:
        for path in [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True)) or [word]:
            names = scan_videos(path) if os.path.isdir(path) else []
            paths += [os.path.join(path, name) for name in names] or [path]
    return paths


def print_predictions(args):
    """Print a row for each video. Returns the exit status."""
    device, status = "cuda" if torch.cuda.is_available() else "cpu", 0
    model = load_model(args.model)
    model[0].to(device)
    if not args.json:
        print("video", *(f"top{k}" for k in range(1, min(5, len(model[2])) + 1)), sep="\t")
    for path, top, reason in predict(model, paths_of(args.videos), device, workers=args.workers):
        status = 2 if reason else status
        if args.json:
            classes = [{"class": name, "probability": p} for name, p in top]
            print(json.dumps({"video": printable(path), "top": classes, "unreadable": reason}))
        else:
            cells = [f"{name} {p:.4f}" for name, p in top] or [f"cannot be read: {reason}"]
            print(printable("\t".join([path, *cells])))
    return status


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.tools.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL.PT", help="the model.pt of a run")
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help="files, folders or patterns such as '*.mp4'"
    )
    parser.add_argument("--json", action="store_true", help="print an object a line instead of a table")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0: decode in this process")
    args = parser.parse_args(argv)
    return status_of(print_predictions, args, "standard output")


if __name__ == "__main__":
    sys.exit(main())

"""The top classes of one video."""

import argparse
import sys

import numpy as np
import torch

from common.clips import Views
from common.errors import UserError, printable, survive_output
from common.evaluate import average_views, what_is_averaged
from common.io.models import load_model


@torch.no_grad()
def predict(model, path, device="cpu", top=5):
    """[(class, probability)] of one video file, best first."""
    net, _, classes, recipe = model
    views = Views(OneFile(path), recipe.sample, recipe.view, recipe.short_side, recipe.open)
    item = views[0]
    if item["bad"]:
        raise UserError(f"{path} cannot be read: {item['bad']}")
    y = what_is_averaged(net, recipe)(recipe.to_input(item["views"], device)).float().cpu()
    batch = {"counts": torch.tensor([len(y)]), "label": [-1], "index": [0]}
    p = average_views(net, y, batch, recipe.average, recipe.multilabel)[0][1]
    return [(classes[k], float(p[k])) for k in np.argsort(-p, kind="stable")[:top]]


class OneFile:
    """A list of one unlabelled video, for `Views`."""

    flow = None

    def __init__(self, file):
        self.file, self.labels = str(file), np.zeros(1, np.int64)

    def __len__(self):
        return 1

    def path(self, index):
        return self.file

    def span(self, index):
        return None


def main():
    survive_output()
    description = "Print the top five classes of video files."
    parser = argparse.ArgumentParser(prog="python -m common.tools.predict", description=description)
    parser.add_argument("model", help="a model.pt")
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = 0
    try:
        model = load_model(args.model)
        model[0].to(device)
        for path in args.videos:
            try:
                for name, p in predict(model, path, device):
                    print(printable(f"{path}\t{name}\t{p:.4f}"))
            except UserError as error:
                print(error, file=sys.stderr)
                status = 2
    except UserError as error:
        print(error, file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()

"""A trained network as one file that runs without this repository.

    python -m common.tools.export MODEL.PT OUT.pt2

OUT.pt2 maps normalised clips (B, C, T, H, W) of any B to logits (B, K); see README, Leaving the package.
"""

import argparse
import json
import sys

import torch

from common.errors import UserError, status_of
from common.io import files
from common.io.models import load_model


@torch.no_grad()
def export(path, out):
    """Write the file `out`, complete or absent; UserError if its logits are not those of the network."""
    net, build, classes, recipe = load_model(path)
    size = build.get("in_channels", 3), recipe.frames, recipe.size, recipe.size
    x, other = (torch.rand(B, *size) for B in (2, 3))
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    about = {"classes.json": json.dumps(classes), "input.json": json.dumps(vars(recipe))}
    with files.replacing(out) as file:
        torch.export.save(program, file, extra_files=about)
        file.flush()
        with open(file.name, "rb") as written:
            logits, expected = torch.export.load(written).module()(other), net(other)
        if not torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max())):
            raise UserError(f"the program exported from {path} gives other logits than the network")


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.tools.export", description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL.PT", help="the model.pt of a run")
    parser.add_argument("out", metavar="OUT.pt2", help="the file to write")
    args = parser.parse_args(argv)
    return status_of(lambda args: export(args.model, args.out), args, args.out)


if __name__ == "__main__":
    sys.exit(main())

"""What several tools share: flags, the flow that models need, and sheets of frames."""

import numpy as np
from PIL import Image, ImageDraw

from common import modality
from common.clips import Views
from common.flags import Parser, at_least
from common.io import files

CAPTION = 14  # pixels of a line of text on a sheet


def tool_parser(tool, doc):
    """A Parser with the flags of a tool that runs models on the videos of a data set."""
    p = Parser(tool, doc, {})
    p.prog, p.epilog = f"python -m common.tools.{tool}", None
    p.add_argument("--data", required=True, help="name of the data set whose videos are used, or a folder")
    p.add_argument("--root", help="where the data set is; data/<name> if not given")
    p.add_argument("--split", type=int, default=1, help="official split of UCF-101 and HMDB-51")
    p.add_argument("--flow", metavar="DIR", help="extracted optical flow; <root>_flow if that is there")
    p.add_argument("--workers", type=at_least(0), default=8, help="loader processes per GPU")
    return p


def with_flow(data, args, run, recipes):
    """`data` with the flow that models {path: Recipe} need; UserError as of modality.with_flow."""
    kinds = [recipe.modality for recipe in recipes.values()]
    return modality.with_flow(data, args.data, args.root, args.flow, run, kinds, recipes)[0]


def item_of(videos, i, recipe):
    """What clips.Views gives for video i as `recipe` sees it: its views, label, and why it is unreadable."""
    return Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)[i]


def evenly_spread(n, count):
    """At most `count` of 0..n-1, with the first and the last."""
    return np.linspace(0, n - 1, min(count, n)).round().astype(int).tolist()


def contact_sheet(path, rows, captions):
    """Write clips as rows of frames, each under its caption.

    path: a .png file, complete or absent. rows: uint8 clips (T, 3, H, W), which may differ in T, H and W.
    captions: a line of text for each. The sheet is as wide as the widest row, on black.
    """
    strips = [row.permute(2, 0, 3, 1).flatten(1, 2) for row in rows]  # (H, T W, 3)
    width = max(strip.shape[1] for strip in strips)
    height = sum(len(strip) + CAPTION for strip in strips)
    sheet, top = Image.new("RGB", (width, height)), 0
    draw = ImageDraw.Draw(sheet)
    for strip, caption in zip(strips, captions, strict=True):
        draw.text((2, top + 1), caption.encode("ascii", "replace").decode(), fill="white")
        sheet.paste(Image.fromarray(strip.contiguous().numpy()), (0, top + CAPTION))
        top += len(strip) + CAPTION
    with files.replacing(path) as file:
        sheet.save(file, "PNG")

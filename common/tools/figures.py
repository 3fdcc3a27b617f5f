"""Figures of trained models: Grad-CAM sheets, embeddings, and accuracy on corrupted videos.

    python -m common.tools.figures cam MODEL.PT ... --data ucf101 --out sheets
    python -m common.tools.figures embedding MODEL.PT --data ucf101 --out embeddings
    python -m common.tools.figures corruption MODEL.PT ... --data ucf101 --out corrupted

The models are model.pt files of any script. The folder --out gets, of the test videos,

    cam           00000.png, ...: for some videos, the frames and where each model looks for the true class
    embedding     embedding.npz of each model: features (N, D), labels and names (N,), classes (K,)
    corruption    corruption.csv: top-1 accuracy of each model on clean and on corrupted videos
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as V

from common import evaluate, modality
from common.clips import Views
from common.data import load_data
from common.errors import UserError
from common.flags import Parser, at_least
from common.io import files
from common.io.models import load_for
from common.modality import Recipe
from common.run import Run, agreed

CAPTION = 14  # pixels of a line of text
# How frames (T, C, H, W) uint8 are changed by a factor.
CORRUPTIONS = {
    "contrast": V.adjust_contrast,
    "brightness": V.adjust_brightness,
    "grayscale": lambda x, factor: V.rgb_to_grayscale(x, num_output_channels=3),
}


def contact_sheet(path, rows, captions):
    """Write clips as rows of frames, each under its caption.

    path: a .png file, complete or absent. rows: uint8 clips (T, 3, H, W), each of its own T, H and W.
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


def heat(clip, values):
    """A uint8 clip (T, 3, H, W) under a map of `values` (T, H, W) in 0..1: blue low, red high."""
    distance = 4 * values[:, None] - torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)  # (T, 3, H, W)
    colours = 255 * (1.5 - distance.abs()).clamp(0, 1)
    return ((clip + colours) / 2).to(torch.uint8)


def grad_cam(net, x, y):
    """Grad-CAM of the last stage (Selvaraju et al. 2017, Eq. 1, 2).

    x (B, C, T, H, W), y (B,) classes. Returns (B, T, H, W) in 0..1: where the channels that speak for y
    respond, ReLU(sum_c a_c A_c), a_c the mean of d logit_y / dA_c.
    """
    f = net.features(x)[-1]  # (B, D, T', H', W')
    logits = net.classify(f)
    grad = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), f)[0]
    cam = (grad.mean((2, 3, 4), keepdim=True) * f).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam.detach().float(), x.shape[2:], mode="trilinear")[:, 0]
    return cam / cam.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


def cam_sheets(folder, videos, classes, models, count, device):
    """Grad-CAM of `models` {name: (net, recipe)} on the same videos: one PNG for each of `count` videos.

    The videos are spread evenly over the list; rows are the central clip and, for each model, what it
    sees of that, under where it looks for the true class, with the class it says. A video that cannot
    be read is left out.
    """
    files.make_folder(folder)
    chosen = np.linspace(0, len(videos) - 1, min(count, len(videos))).round().astype(int)
    for i in chosen.tolist():
        rows, captions = [], []
        for name, (net, recipe) in models.items():
            recipe = replace(recipe, clips=1, crops=1)
            item = Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)[i]
            if item["bad"]:
                break
            if not rows:
                seen = Recipe(recipe.frames, recipe.stride, 1, 1, recipe.short_side, recipe.size)
                rows.append(Views(videos, seen.sample, seen.view, seen.short_side)[i]["views"][0])
                captions.append(f"{videos.name(i)}: {classes[item['label']]}")
            x, y = recipe.to_input(item["views"], device), item["label"][None].to(device)
            (clip,) = modality.stacked(item["views"], recipe.modality)
            rows.append(heat(clip, grad_cam(net, x, y)[0].cpu()))
            with torch.no_grad():
                captions.append(f"{name}: {classes[net(x).argmax(1)]}")
        if rows:
            contact_sheet(Path(folder) / f"{i:05d}.png", rows, captions)


@dataclass(frozen=True)
class Corrupted(Recipe):
    """A Recipe for test videos that are corrupted before anything else is computed from them.

    The factor, uniform in 0.5 to 1.5 (imgaug's range), is drawn once per video.
    """

    corruption: str = "contrast"

    def view(self, clips):
        """uint8 clips (T, C, H, W) to views (V, T, C, size, size)."""
        factor = 0.5 + float(torch.rand(()))
        return super().view([CORRUPTIONS[self.corruption](clip.contiguous(), factor) for clip in clips])


def corruption_table(models, data, run, workers):
    """[(model, top-1 % on clean videos, and under each of CORRUPTIONS)], or None if a signal has come.

    models: {name: (net, recipe)}.
    """
    rows = []
    for name, (net, recipe) in models.items():
        recipes = [recipe, *(Corrupted(**vars(recipe), corruption=kind) for kind in CORRUPTIONS)]
        row = [name]
        for changed in recipes:
            scores = evaluate.score(net, data.test, changed, run, workers, bar=True)
            if scores is None:
                return None
            row.append(evaluate.metrics(scores)["top1"])
        rows.append(row)
    return rows


def parse_args(argv=None):
    p = Parser("figures", __doc__, {})
    p.prog, p.epilog = "python -m common.tools.figures", None
    p.add_argument("figure", choices=["cam", "embedding", "corruption"], help="what to make")
    p.add_argument("models", nargs="+", metavar="MODEL.PT", help="models to make it of")
    p.add_argument("--data", required=True, help="data set whose test videos are used, or a folder")
    p.add_argument("--root", help="where the data set is; data/<name> if not given")
    p.add_argument("--split", type=int, default=1, help="official split of UCF-101 and HMDB-51")
    p.add_argument("--out", required=True, help="folder of the results")
    p.add_argument("--videos", type=at_least(1), default=8, help="number of Grad-CAM sheets")
    p.add_argument("--clips", type=at_least(1), help="test clips per video; as the model says if not given")
    p.add_argument("--crops", type=int, choices=[1, 3], help="crops per clip; as the model says if not given")
    p.add_argument("--workers", type=at_least(0), default=8, help="loader processes per GPU")
    args = p.parse_args(argv)
    if args.figure == "embedding" and len(args.models) > 1:
        p.error("embedding takes one model: choose another --out for the next")
    return args


def make(args, run):
    """The figure that `args` ask for, in the folder of the run."""
    data = agreed(load_data, args.data, args.root, args.split)
    views = {name: getattr(args, name) for name in ("clips", "crops") if getattr(args, name) is not None}
    models = {path: load_for(path, data, run.device, **views) for path in args.models}
    for path, (_, recipe) in models.items():
        if modality.MODALITIES[recipe.modality].channels != 3 and args.figure != "embedding":
            raise UserError(f"{path} sees {recipe.modality}: {args.figure} is for models of rgb and tg")
    if args.figure == "cam":
        run.on_main(cam_sheets, run.out, data.test, data.classes, models, args.videos, run.device)
    elif args.figure == "embedding":
        ((net, recipe),) = models.values()
        file = run.out / "embedding.npz"
        evaluate.save_features(file, net, data.test, data.classes, recipe, run, args.workers)
    else:
        rows = corruption_table(models, data, run, args.workers)
        if rows is not None and run.main:
            table = [["model", "clean", *CORRUPTIONS], *rows]
            evaluate.write_csv(run.out / "corruption.csv", table[0], rows)
            for row in table:
                run.say(" ".join(f"{value:.2f}" if isinstance(value, float) else value for value in row))


def main(argv=None):
    args = parse_args(argv)
    with Run("figures", args.out, vars(args), free=("out", "workers")) as run:
        make(args, run)


if __name__ == "__main__":
    main()

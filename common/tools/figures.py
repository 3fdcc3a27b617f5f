"""Figures of trained models: Grad-CAM sheets, embeddings, and accuracy on corrupted videos.

    python -m common.tools.figures cam MODEL.PT ... --data ucf101 --out sheets
    python -m common.tools.figures embedding MODEL.PT --data ucf101 --out embeddings
    python -m common.tools.figures corruption MODEL.PT ... --data ucf101 --out corrupted

The models are model.pt files of any script. The folder --out gets, of the test videos,

    cam           00000.png, ...: for some videos, the frames and where each model looks for the true class
    embedding     embedding.npz of the model: features (N, D), labels and names (N,), classes (K,)
    corruption    corruption.csv: top-1 accuracy of each model on clean and on corrupted videos
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as V

from common import evaluate, modality
from common.data import load_data
from common.errors import UserError
from common.flags import at_least
from common.io import features, files
from common.io.models import digest_of_model, load_for
from common.modality import Recipe
from common.run import Run, agreed
from common.tools.shared import contact_sheet, evenly_spread, item_of, tool_parser, with_flow

# How frames (T, C, H, W) uint8 are changed by a factor.
CORRUPTIONS = {
    "contrast": V.adjust_contrast,
    "brightness": V.adjust_brightness,
    "grayscale": lambda x, factor: V.rgb_to_grayscale(x, num_output_channels=3),
}


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


def cam_sheets(args, run, data, models):
    """Grad-CAM of `models` {path: (net, Recipe)} on the same videos: one PNG for each of args.videos videos.

    The videos are spread evenly over the test list. A video that a model cannot read is left out.
    """
    for i in evenly_spread(len(data.test), args.videos):
        items = [item_of(data.test, i, replace(recipe, clips=1, crops=1)) for _, recipe in models.values()]
        if not any(item["bad"] for item in items):
            contact_sheet(run.out / f"{i:05d}.png", *cam_rows(data, i, models, items, run.device))


def cam_rows(data, i, models, items, device):
    """(clips, captions) of a sheet: the central clip, and for each model the input under its heat map.

    items: what each model sees of test video i. The maps are where it looks for the true class, the captions
    name the class it predicts.
    """
    first = next(iter(models.values()))[1]
    rgb = Recipe(first.frames, first.stride, 1, 1, first.short_side, first.size)
    rows = [item_of(data.test, i, rgb)["views"][0]]
    captions = [f"{data.test.name(i)}: {data.classes[items[0]['label']]}"]
    for (path, (net, recipe)), item in zip(models.items(), items, strict=True):
        x, y = recipe.to_input(item["views"], device), item["label"][None].to(device)
        (clip,) = modality.stacked(item["views"], recipe.modality)
        rows.append(heat(clip, grad_cam(net, x, y)[0].cpu()))
        with torch.no_grad():
            captions.append(f"{path}: {data.classes[net(x).argmax(1)]}")
    return rows, captions


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


def embedding(args, run, data, models):
    """embedding.npz of the only model, from the features of all test videos in the folder `features`."""
    ((net, recipe),) = models.values()
    identity = {"weights": digest_of_model(net)}
    blocks = partial(evaluate.blocks, net, net.embed, run=run, workers=args.workers, bar="features")
    extraction = features.Extraction(data.test, recipe, blocks, identity, average=True)
    cache = features.extract(run.out / "features", extraction, run)
    if cache is not None and run.main:
        readable = np.flatnonzero(cache.counts)
        names = np.array([data.test.name(i) for i in readable])
        with files.replacing(run.out / "embedding.npz") as file:
            np.savez(file, features=cache.rows, labels=data.test.labels[readable], names=names,
                     classes=np.array(data.classes))  # fmt: skip


def corruption_table(args, run, data, models):
    """corruption.csv: top-1 % of each model on clean videos, and under each of CORRUPTIONS."""
    table = [["model", "clean", *CORRUPTIONS]]
    for path, (net, recipe) in models.items():
        recipes = [recipe, *(Corrupted(**vars(recipe), corruption=kind) for kind in CORRUPTIONS)]
        table.append([path])
        for changed in recipes:
            scores = evaluate.score(net, data.test, changed, run, args.workers, bar=True)
            if scores is None:  # a signal
                return
            table[-1].append(evaluate.metrics(scores)["top1"])
    if run.main:
        evaluate.write_csv(run.out / "corruption.csv", table[0], table[1:])
    for row in table:
        run.say(" ".join(f"{value:.2f}" if isinstance(value, float) else value for value in row))


FIGURES = {"cam": cam_sheets, "embedding": embedding, "corruption": corruption_table}


def parse_args(argv=None):
    p = tool_parser("figures", __doc__)
    p.add_argument("figure", choices=list(FIGURES), help="what to make")
    p.add_argument("models", nargs="+", metavar="MODEL.PT", help="models to make it of")
    p.add_argument("--out", required=True, help="folder of the results")
    p.add_argument("--videos", type=at_least(1), default=8, help="number of Grad-CAM sheets")
    args = p.parse_args(argv)
    if args.figure == "embedding" and len(args.models) > 1:
        p.error("embedding takes one model: choose another --out for the next")
    return args


def make(args, run):
    """The figure that `args` ask for, in the folder of the run."""
    data = agreed(load_data, args.data, args.root, args.split)
    models = {path: load_for(path, data, run.device) for path in args.models}
    for path, (_, recipe) in models.items():
        if modality.MODALITIES[recipe.modality].channels != 3 and args.figure != "embedding":
            raise UserError(f"{path} sees {recipe.modality}: {args.figure} is for models of rgb and tg")
    data = with_flow(data, args, run, {path: recipe for path, (_, recipe) in models.items()})
    if args.figure == "cam":
        run.on_main(cam_sheets, args, run, data, models)
    else:
        FIGURES[args.figure](args, run, data, models)


def main(argv=None):
    args = parse_args(argv)
    with Run("figures", args.out, vars(args), free=("out", "workers")) as run:
        make(args, run)


if __name__ == "__main__":
    main()

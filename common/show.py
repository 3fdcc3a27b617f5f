"""Pictures for people: contact sheets of clips as PNG files, and where a network looks (Grad-CAM)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common import evaluate, files, video

CAPTION = 14  # pixels of a line of text


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
    be read is left out. Raises OSError if the folder cannot be written.
    """
    files.make_folder(folder)
    chosen = np.linspace(0, len(videos) - 1, min(count, len(videos))).round().astype(int)
    for i in chosen.tolist():
        rows, captions = [], []
        for name, (net, recipe) in models.items():
            recipe = replace(recipe, clips=1, crops=1)
            item = video.Views(videos, recipe.sample, recipe.view, recipe.short_side, recipe.open)[i]
            if item["bad"]:
                break
            if not rows:
                seen = evaluate.Recipe(recipe.frames, recipe.stride, 1, 1, recipe.short_side, recipe.size)
                rows.append(video.Views(videos, seen.sample, seen.view, seen.short_side)[i]["views"][0])
                captions.append(f"{videos.name(i)}: {classes[item['label']]}")
            x, y = recipe.to_input(item["views"], device), item["label"][None].to(device)
            rows.append(heat(item["views"][0], grad_cam(net, x, y)[0].cpu()))
            with torch.no_grad():
                captions.append(f"{name}: {classes[net(x).argmax(1)]}")
        if rows:
            contact_sheet(Path(folder) / f"{i:05d}.png", rows, captions)

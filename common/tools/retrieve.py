"""Clip retrieval: clips of the test videos ask for training clips (MotionFit, Sec. 4.5 and Table 7).

    python -m common.tools.retrieve runs/x/selftrain/model.pt --data toy
    torchrun --nproc_per_node 8 -m common.tools.retrieve MODEL.PT --data ucf101 --split 1

The model.pt may be of any script. Features are the maxima of the last stage over time and space, and compared
by their cosine. R@n is the share of queries with a clip of their class among the n nearest training clips;
videos_R@n asks with the mean of a video's clips, as the code of VCOP does (Xu et al. 2019).

The folder --out gets result.json, the features in train/ and test/, and sheet.png: for some test videos the
training videos that are found first (Fig. S1).
"""

from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import evaluate
from common.data import load_data
from common.errors import UserError
from common.flags import at_least
from common.io import features
from common.io.models import digest_of_model, load_model
from common.run import Run, agreed
from common.tools.shared import contact_sheet, evenly_spread, item_of, tool_parser, with_flow

NEAREST = 1, 5, 10, 20, 50  # n of R@n
SHOWN = 3  # training videos of a query on the sheet


def parse_args(argv=None):
    p = tool_parser("retrieve", __doc__)
    p.add_argument("model", metavar="MODEL.PT", help="model of any script, with any classes")
    p.add_argument("--out", help="folder of the results; retrieve_<data> beside the model if not given")
    p.add_argument("--clips", type=at_least(1), default=10, help="clips of a video")
    p.add_argument("--sheet", type=at_least(0), default=8, help="queries on sheet.png; 0: no sheet")
    args = p.parse_args(argv)
    args.out = args.out or str(Path(args.model).parent / f"retrieve_{Path(args.data).name.replace(':', '-')}")
    return args


def retrieve(args, run):
    """Features of all training and test videos, by all ranks; the recall, the sheet and RESULT."""
    data = agreed(load_data, args.data, args.root, args.split)
    if data.multilabel:
        raise UserError(f"{data.name} has several labels per video, which retrieval does not know")
    net, _, _, recipe = load_model(args.model)
    data = with_flow(data, args, run, {args.model: recipe})
    recipe = replace(recipe, clips=args.clips, crops=1, uniform=0)
    identity = {"weights": digest_of_model(net), "pooled": "max"}
    net, bank = net.to(run.device), {}
    max_of_stage = partial(max_features, net)
    blocks = partial(evaluate.blocks, net, max_of_stage, run=run, workers=args.workers, bar="features")
    for subset, videos in (("train", data.train), ("test", data.test)):
        extraction = features.Extraction(videos, recipe, blocks, identity)
        bank[subset] = features.extract(run.out / subset, extraction, run)
        if bank[subset] is None:  # a signal
            return
    counts = {"videos": len(data.test), "unreadable": len(bank["test"].bad), "seconds": round(run.seconds)}
    run.result({"script": run.script, "data": data.name, "model": args.model, "clips": args.clips,
                **run.on_main(recalls, data, args.clips, bank, run.device), **counts})  # fmt: skip
    if args.sheet:
        run.on_main(sheet, run.out / "sheet.png", args.sheet, data, recipe, bank)


def max_features(net, x):
    """(B, C, T, H, W) to (B, D) float32: the maxima of the last stage over time and space."""
    return net.features(x)[-1].float().amax((2, 3, 4))


def recall(z, y, z_train, y_train):
    """{n: per cent of the queries with a row of their class among the n nearest training rows, by cosine}.

    z (Q, D), y (Q,): the queries; z_train (N, D), y_train (N,).
    """
    most = min(max(NEAREST), len(z_train))
    z, z_train = F.normalize(z.float(), dim=1), F.normalize(z_train.float(), dim=1)
    nearest = torch.cat([(queries @ z_train.T).topk(most).indices for queries in z.split(1024)])
    hits = (y_train[nearest] == y[:, None]).cummax(1).values  # (Q, n)
    return {n: 100 * hits[:, min(n, most) - 1].double().mean().item() for n in NEAREST}


def recalls(data, clips, bank, device):
    """{"R@1": %, ...} of clips, {"videos_R@1": %, ...} of videos; unreadable test videos find nothing.

    clips: of each video; bank: {"train": Features, "test": Features}.
    """
    y = {subset: torch.from_numpy(videos.labels[bank[subset].counts > 0]).to(device)
         for subset, videos in (("train", data.train), ("test", data.test))}  # fmt: skip
    z = {subset: torch.tensor(features.rows, device=device).unflatten(0, (-1, clips))
         for subset, features in bank.items()}  # (readable videos, clips, D)  # fmt: skip
    y_clips = {subset: labels.repeat_interleave(clips) for subset, labels in y.items()}
    of_clips = recall(z["test"].flatten(0, 1), y_clips["test"], z["train"].flatten(0, 1), y_clips["train"])
    of_videos = recall(z["test"].mean(1), y["test"], z["train"].mean(1), y["train"])
    readable = len(y["test"]) / len(data.test)
    row = {f"R@{n}": readable * share for n, share in of_clips.items()}
    return row | {f"videos_R@{n}": readable * share for n, share in of_videos.items()}


def sheet(path, count, data, recipe, bank):
    """Fig. S1: the middle clips of `count` test videos, and the nearest clips of distinct training videos."""
    train, test, middle = bank["train"], bank["test"], recipe.clips // 2
    z_train = F.normalize(torch.tensor(train.rows).float(), dim=1)
    video_of = np.repeat(np.arange(len(data.train)), train.counts)
    rows, captions, readable = [], [], np.flatnonzero(test.counts)
    for i in readable[evenly_spread(len(readable), count)].tolist():
        rows.append(clip_of(data.test, i, middle, recipe))
        captions.append(f"{data.test.name(i)}: {data.classes[data.test.labels[i]]}")
        cosines = z_train @ torch.tensor(test.rows[test.first[i] + middle]).float()
        order = cosines.argsort(descending=True, stable=True).numpy()
        _, first = np.unique(video_of[order], return_index=True)  # the nearest clip of each video
        for place, clip in enumerate(order[np.sort(first)[:SHOWN]].tolist(), 1):
            k = int(video_of[clip])
            hit = "hit" if data.train.labels[k] == data.test.labels[i] else "miss"
            rows.append(clip_of(data.train, k, clip - int(train.first[k]), recipe))
            captions.append(f"  {place} {hit}: {data.classes[data.train.labels[k]]}, {data.train.name(k)}")
    contact_sheet(path, rows, captions)


def clip_of(videos, i, clip, recipe):
    """RGB of clip number `clip` of video i, uint8 (T, 3, H, W), eight frames at most."""
    item = item_of(videos, i, replace(recipe, modality="rgb"))
    if item["bad"]:  # its flow may be readable
        raise UserError(f"{videos.path(i)} cannot be shown on the sheet: {item['bad']}")
    view = item["views"][clip]
    return view[:: ceil(len(view) / 8)]


def main():
    args = parse_args()
    with Run("retrieve", args.out, vars(args), ("out", "root", "workers", "sheet", "flow")) as run:
        retrieve(args, run)


if __name__ == "__main__":
    main()

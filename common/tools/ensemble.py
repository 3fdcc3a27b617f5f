"""Test several models and their ensembles, one model of each modality (Mutual Modality Learning, Appendix 3).

    python -m common.tools.ensemble A.pt B.pt C.pt --data ssv2 --out runs/ensembles
    torchrun --nproc_per_node 8 -m common.tools.ensemble ...

The models are model.pt files of any script. Every combination of models with different modalities is an
ensemble. The folder --out gets

    ensembles.csv     every single model and ensemble, best first
    positions.csv     Table 13: how well each model fits the others, best first
    predictions.csv, per_class.csv and result.json of the ensemble of all models
"""

from dataclasses import replace
from functools import partial
from itertools import combinations, product

import numpy as np
import torch

from common import evaluate, modality
from common.data import load_data
from common.errors import UserError
from common.flags import Parser
from common.io.models import load_for
from common.run import Run, agreed

VIEWS = ("clips", "uniform", "crops", "size")  # fields of a Recipe
METRICS = ("top1", "top5", "mean_class", "mAP")  # of evaluate.metrics those that an ensemble has


def parse_args(argv=None):
    p = Parser("ensemble", __doc__, {})
    p.prog, p.epilog = "python -m common.tools.ensemble", None
    p.add_argument("models", nargs="+", metavar="MODEL.PT", help="models to test and to combine")
    p.add_argument("--data", required=True, help="data set whose test videos are scored, or a folder")
    p.add_argument("--root", help="where the data set is; data/<name> if not given")
    p.add_argument("--split", type=int, default=1, help="official split of UCF-101 and HMDB-51")
    p.add_argument("--flow", metavar="DIR", help="extracted optical flow; <root>_flow if that is there")
    p.add_argument("--out", required=True, help="folder of the results")
    p.add_argument("--average", choices=["logits", "softmax"], default="logits",
                   help="average the models' logits (authors' code) or their probabilities")  # fmt: skip
    p.add_argument("--clips", type=int, help="dense test clips per video; as the model says if not given")
    p.add_argument("--uniform", type=int, help="uniform test clips per video; as the model says if not given")
    p.add_argument("--crops", type=int, choices=[1, 3], help="crops per clip; as the model says if not given")
    p.add_argument("--size", type=int, help="pixels of a test crop; as the model says if not given")
    p.add_argument("--workers", type=int, default=8, help="loader processes per GPU")
    args = p.parse_args(argv)
    p.at_least(0, args, "clips", "uniform", "workers")
    p.at_least(1, args, "size")
    return args


def test(args, run):
    """Score the models one after the other, combine the scores, write the tables."""
    data = agreed(load_data, args.data, args.root, args.split)
    views = {name: getattr(args, name) for name in VIEWS if getattr(args, name) is not None}
    recipes = {path: load_for(path, data, "cpu", **views)[1] for path in args.models}
    modalities = {path: recipe.modality for path, recipe in recipes.items()}
    data, _ = modality.with_flow(data, args.data, args.root, args.flow, run, modalities.values(), recipes)
    scores = {}
    for path, recipe in recipes.items():
        if not recipe.views:
            raise UserError(f"{path} has no test clips left: give --clips or --uniform")
        net, _ = load_for(path, data, run.device)
        scores[path] = evaluate.score(net, data.test, recipe, run, args.workers, bar=True)
        if scores[path] is None:
            run.say("stopped by a signal during the test; the same command tests again")
            return
    everything = combine(scores.values(), args.average)
    if run.main:
        rows = ensembles(scores, modalities, args.average)
        sums = sums_of_positions(rows, modalities)
        for members, metrics in rows[:20]:
            shown = " ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            run.say(f"{' + '.join(members)}  {shown}")
        for path, total in sums.items():
            run.say(f"sum of positions {total:.1f}: {path}")
        lines = [[" + ".join(members), *metrics.values()] for members, metrics in rows]
        evaluate.write_csv(run.out / "ensembles.csv", ["models", *rows[0][1]], lines)
        evaluate.write_csv(run.out / "positions.csv", ["model", "sum"], sums.items())
        evaluate.write_files(run.out, everything, data.test, data.classes)
    counts = {"videos": len(data.test), "unreadable": len(everything.bad), "seconds": round(run.seconds)}
    run.result({"script": run.script, "data": data.name, "models": len(scores), "average": args.average,
                **views, **percentages(everything), **counts})  # fmt: skip


def combine(scores, average):
    """The Scores of an ensemble: the probabilities of the mean logits, or the mean of the probabilities.

    scores: Scores of the same videos, one for each model. A video that a model cannot read counts as wrong.
    """
    scores = list(scores)
    squash = torch.sigmoid if scores[0].labels.ndim == 2 else partial(torch.softmax, dim=1)
    logits = torch.stack([torch.from_numpy(s.logits) for s in scores]).mean(0)  # (N, K)
    probs = torch.stack([torch.from_numpy(s.probs) for s in scores]).mean(0)
    p = squash(logits) if average == "logits" else probs
    bad = {i: reason for s in scores for i, reason in s.bad.items()}
    p[list(bad)] = 0
    return replace(scores[0], probs=p.numpy(), logits=logits.numpy(), bad=bad)


def percentages(scores):
    """{metric: %} of Scores, the first one is what ensembles are ordered by: top-1 accuracy or mAP."""
    metrics = evaluate.metrics(scores)
    return {name: metrics[name] for name in METRICS if name in metrics}


def ensembles(scores, modalities, average):
    """Every set of models of different modalities, best first: [(models, {metric: %})].

    scores {model: Scores}, modalities {model: modality}.
    """
    groups = {}
    for model in scores:
        groups.setdefault(modalities[model], []).append(model)
    rows = []
    for size in range(1, len(groups) + 1):
        for chosen in combinations(groups.values(), size):
            for members in product(*chosen):
                rows.append((members, percentages(combine([scores[model] for model in members], average))))
    return sorted(rows, key=lambda row: -next(iter(row[1].values())))


def sums_of_positions(rows, modalities):
    """Table 13: {model: sum of the positions of the ensembles of all modalities that it is in}, least first.

    rows as `ensembles` returns them. Positions count from 0 (the printed sums of the RGB and of the Flow
    models are 857 x 858 / 2); equal ensembles share the mean of their positions.
    """
    full = [row for row in rows if len(row[0]) == len(set(modalities.values()))]
    errors = [-next(iter(metrics.values())) for _, metrics in full]
    first, last = (np.searchsorted(errors, errors, side) for side in ("left", "right"))  # of its equals
    sums = dict.fromkeys(modalities, 0.0)
    for (members, _), position in zip(full, (first + last - 1) / 2, strict=True):
        for model in members:
            sums[model] += float(position)
    return dict(sorted(sums.items(), key=lambda item: item[1]))


def main(argv=None):
    args = parse_args(argv)
    with Run("ensemble", args.out, vars(args), free=("out", "workers")) as run:
        test(args, run)


if __name__ == "__main__":
    main()

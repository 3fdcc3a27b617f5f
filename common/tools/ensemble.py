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

from common import evaluate
from common.data import load_data
from common.io.models import load_for
from common.run import Run, agreed
from common.tools.shared import tool_parser, with_flow

METRICS = ("top1", "top5", "mean_class", "mAP")  # of evaluate.metrics those that an ensemble has


def parse_args(argv=None):
    p = tool_parser("ensemble", __doc__)
    p.add_argument("models", nargs="+", metavar="MODEL.PT", help="models to test and to combine")
    p.add_argument("--out", required=True, help="folder of the results")
    p.add_argument("--average", choices=["logits", "softmax"], default="logits",
                   help="average the models' logits (authors' code) or their probabilities")  # fmt: skip
    return p.parse_args(argv)


def test(args, run):
    """Score the models one after the other, each on its own views, combine the scores, write the tables."""
    data = agreed(load_data, args.data, args.root, args.split)
    recipes = {path: load_for(path, data, "cpu")[1] for path in args.models}
    modalities = {path: recipe.modality for path, recipe in recipes.items()}
    data, scores = with_flow(data, args, run, recipes), {}
    for path, recipe in recipes.items():
        net, _ = load_for(path, data, run.device)
        scores[path] = evaluate.score(net, data.test, recipe, run, args.workers, bar=True)
        if scores[path] is None:
            run.say("stopped by a signal during the test; the same command tests again")
            return
    ensemble = combine(scores.values(), args.average)
    if run.main:
        write_tables(run, ensembles(scores, modalities, args.average), modalities)
        evaluate.write_files(run.out, ensemble, data.test, data.classes)
    counts = {"videos": len(data.test), "unreadable": len(ensemble.bad), "seconds": round(run.seconds)}
    run.result({"script": run.script, "data": data.name, "models": len(scores), "average": args.average,
                **percentages(ensemble), **counts})  # fmt: skip


def write_tables(run, rows, modalities):
    """ensembles.csv and positions.csv of `ensembles`; the first 20 rows and all positions on the screen."""
    sums = sums_of_positions(rows, modalities)
    for members, metrics in rows[:20]:
        values = " ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        run.say(f"{' + '.join(members)}  {values}")
    for path, total in sums.items():
        run.say(f"sum of positions {total:.1f}: {path}")
    lines = [[" + ".join(members), *metrics.values()] for members, metrics in rows]
    evaluate.write_csv(run.out / "ensembles.csv", ["models", *rows[0][1]], lines)
    evaluate.write_csv(run.out / "positions.csv", ["model", "sum"], sums.items())


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
    first, last = (np.searchsorted(errors, errors, side) for side in ("left", "right"))  # of equal errors
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

"""Time common.kmeans beside scikit-learn and faiss, where these are installed, on one thread.

    python tests/bench/kmeans.py --clusters 128

All start from the same rows and make the same number of iterations, and then assign the rows. They run in
turn, in random order, in one process: compare the CPU seconds of one table only.
"""

import argparse
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.kmeans import kmeans  # noqa: E402


def features(rows, dim, clusters):
    """float32 (rows, dim): overlapping clusters in 16 directions, and noise in all."""
    rng = np.random.default_rng(0)
    places = rng.standard_normal((clusters, 16))[rng.integers(0, clusters, rows)]
    x = (places + 0.3 * rng.standard_normal((rows, 16))) @ rng.standard_normal((16, dim))
    return (x + 0.5 * rng.standard_normal((rows, dim))).astype(np.float32)


def ours(x, start, iterations):
    return kmeans(x, len(start), iterations, seed=0)[::-1]


def scikit_learn(x, start, iterations):
    import sklearn.cluster
    from threadpoolctl import threadpool_limits

    means = sklearn.cluster.KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged
        means.fit(x)
    return means.cluster_centers_, means.labels_


def faiss(x, start, iterations):
    import faiss

    faiss.omp_set_num_threads(1)
    means = faiss.Kmeans(x.shape[1], len(start), niter=iterations, min_points_per_centroid=1,
                         max_points_per_centroid=len(x))  # fmt: skip
    means.train(x, init_centroids=start)
    return means.centroids, means.assign(x)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512, help="numbers of a row")
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = features(args.rows, args.dim, args.clusters)
    start = x[np.random.default_rng(0).choice(len(x), args.clusters, replace=False)]  # as kmeans draws them
    variants = []
    for variant in (ours, scikit_learn, faiss):
        try:
            variant(x[:500], start[:10], 1)  # the first call is slower
            variants.append(variant)
        except ImportError as error:
            print(f"without {variant.__name__} ({error})")
    jobs = variants * args.repeats
    random.Random(0).shuffle(jobs)
    seconds, results = {variant: [] for variant in variants}, {}
    for variant in jobs:
        began = time.process_time()
        results[variant] = variant(x, start, args.iterations)
        seconds[variant].append(time.process_time() - began)
    print(f"{args.rows} x {args.dim}, {args.clusters} clusters, {args.iterations} iterations, one thread")
    print(f"{'':15}{'CPU s':>7}{'to ours':>9}{'inertia to ours':>17}{'same label':>12}")
    inertia = {v: float(np.square(x - centres[labels]).sum()) for v, (centres, labels) in results.items()}
    for v in variants:
        s, same = np.median(seconds[v]), (results[v][1] == results[ours][1]).mean()
        print(f"{v.__name__:15}{s:7.2f}{s / np.median(seconds[ours]):9.2f}"
              f"{inertia[v] / inertia[ours]:17.5f}{same:12.2%}")  # fmt: skip


if __name__ == "__main__":
    main()

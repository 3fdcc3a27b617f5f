"""common.kmeans: against a plain loop, ties, empty clusters, kinds of rows, equal bits, memory."""

import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import kmeans as module
from common.kmeans import kmeans, purity

pytestmark = pytest.mark.filterwarnings("ignore:.*rows are few")


@pytest.fixture(autouse=True, params=[16, 4096])
def blocks(request, monkeypatch):
    """Several blocks, and one."""
    monkeypatch.setattr(module, "BLOCK", request.param)


def column(*numbers):
    return np.array(numbers, np.float32)[:, None]


def random_rows(N, D, seed=0):
    """Rows of unlike length, around a common mean."""
    rng = np.random.RandomState(seed)
    return (rng.normal(0.5, 1, (N, D)) * rng.lognormal(0, 1, (N, 1))).astype(np.float32)


def naive(rows, K, iterations, seed):
    """Lloyd's iterations row by row, in float64: labels, centres, the number of empty clusters on the way."""
    rows = rows.astype(np.float64)
    centres, labels, n_empty = rows[np.random.default_rng(seed).choice(len(rows), K, replace=False)], None, 0
    for iteration in range(iterations + 1):
        before, labels = labels, []
        for x in rows:
            apart = [sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in centres]
            labels.append(apart.index(min(apart)))
        if iteration == iterations or labels == before:
            return labels, centres, n_empty
        members = [[x for x, label in zip(rows, labels, strict=True) if label == k] for k in range(K)]
        centres = [sum(xs) / len(xs) if xs else None for xs in members]
        apart = [((x - centres[label]) ** 2).sum() for x, label in zip(rows, labels, strict=True)]
        farthest = iter(sorted(range(len(rows)), key=lambda i: -apart[i]))
        n_empty += sum(c is None for c in centres)
        centres = np.array([rows[next(farthest)] if c is None else c for c in centres])


def start_at(monkeypatch, *rows):
    """The first centres are these rows."""
    rng = SimpleNamespace(choice=lambda *_, **__: np.array(rows))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: rng)


@pytest.mark.parametrize("N, K, iterations, seed", [
    (96, 8, 0, 0), (97, 8, 1, 1), (97, 8, 2, 2), (150, 9, 50, 3), (40, 40, 50, 4), (70, 1, 50, 5),
])  # fmt: skip
def test_matches_a_plain_loop(N, K, iterations, seed):
    rows = random_rows(N, 5)
    labels, centres = kmeans(rows, K, iterations, seed)
    expected, means, _ = naive(rows, K, iterations, seed)  # starts at K rows that follow from the seed
    assert labels.tolist() == expected and np.allclose(centres, means, atol=1e-5)
    assert (labels.dtype, centres.dtype, centres.shape) == (np.int64, np.float32, (K, 5))


@pytest.mark.parametrize("seed", range(3))
def test_empty_clusters_match_the_plain_loop(seed, monkeypatch):
    start_at(monkeypatch, 0, 1, 2, 3, 10, 20)
    rows = random_rows(60, 3, seed)
    rows[1:4] = rows[0]
    labels, centres = kmeans(rows, 6, 20)
    expected, means, n_empty = naive(rows, 6, 20, 0)
    assert n_empty >= 3 and labels.tolist() == expected and np.allclose(centres, means, atol=1e-5)


def test_ties_go_to_the_lower_number(monkeypatch):
    rows = np.concatenate([column(-1, 1), np.tile(column(0, -2, 2), (16, 1))])
    start_at(monkeypatch, 0, 1)
    assert kmeans(rows, 2, 0)[0].tolist() == [0, 1] + [0, 0, 1] * 16
    start_at(monkeypatch, 1, 0)
    assert kmeans(rows, 2, 0)[0].tolist() == [1, 0] + [0, 1, 0] * 16


def test_empty_clusters_start_again_at_the_farthest_rows(monkeypatch):
    """One cluster has all rows, of mean 2: far from there, and not from 0; of equally far ones the first."""
    rows = np.zeros((101, 1), np.float32)
    rows[[7, 40, 41, 99, 100]] = column(-60, 63, 64, 62, 2 * 101 - 129)
    start_at(monkeypatch, 0, 1, 2, 3)
    assert kmeans(rows, 4, 1)[1][:, 0].tolist() == [2, 73, -60, 64]  # -60 and 64 are 62 from the mean


def test_fewer_distinct_rows_than_clusters():
    rows = np.tile(np.array([[1, 2], [-5, 0], [3, 4]], np.float32), (20, 1))
    labels, centres = kmeans(rows, 6)
    assert len(set(labels.tolist())) == 3 and np.array_equal(centres[labels], rows)


def test_float16_and_files(tmp_path):
    rows = random_rows(300, 5).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    expected = kmeans(rows.astype(np.float32), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (rows, np.load(tmp_path / "rows.npy", mmap_mode="r")):
            assert all(map(np.array_equal, kmeans(same, 7), expected))
    assert np.array_equal(rows, random_rows(300, 5).astype(np.float16))  # left as they were
    with pytest.warns(UserWarning, match="77 rows are few for 2 clusters"):
        kmeans(random_rows(77, 2), 2)


def test_purity_by_hand():
    # Cluster 0 has classes 1, 1, 0; cluster 2 has 0, 2 of which one is right; cluster 5 has 2, 2.
    clusters, y = np.array([0, 2, 5, 0, 0, 2, 5]), np.array([1, 0, 2, 1, 0, 2, 2])
    assert purity(clusters, y) == {"purity": pytest.approx(100 * (2 + 1 + 2) / 7)}
    assert purity(clusters, np.zeros((7, 3))) == purity(clusters, 0 * y - 1) == {}
    y[[0, 2]] = -1  # without a label
    assert purity(clusters, y) == {"purity": pytest.approx(100 * (1 + 1 + 1) / 5)}


def test_rows_are_never_copied_whole(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 256)
    rows = np.random.default_rng(0).standard_normal((20_000, 40)).astype(np.float16)
    tracemalloc.start()
    kmeans(rows, 2, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU")
def test_on_a_gpu(monkeypatch):
    rows = random_rows(500, 5)
    labels, centres = kmeans(rows, 7)
    for free in (2**30, 0):  # rows on the device, and read from memory
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        results = [kmeans(rows, 7, device="cuda") for _ in range(2)]
        assert all(map(np.array_equal, *results))
        assert np.array_equal(results[0][0], labels) and np.allclose(results[0][1], centres, atol=1e-5)

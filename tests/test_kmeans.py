"""common.kmeans: against a plain loop, ties, empty clusters, what rows may be, equal bits, memory."""

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
    rng = np.random.default_rng(seed)
    return (rng.normal(0.5, 1, (N, D)) * rng.lognormal(0, 1, (N, 1))).astype(np.float32)


def naive(rows, K, iterations, seed=0):
    """Lloyd's iterations one row at a time, in float64: labels, centres, how often a cluster was empty."""
    rows = rows.astype(np.float64)
    centres, labels, empties = rows[np.random.default_rng(seed).choice(len(rows), K, replace=False)], None, 0
    for iteration in range(iterations + 1):
        before, labels = labels, []
        for x in rows:
            apart = [sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in centres]
            labels.append(apart.index(min(apart)))
        if iteration == iterations or labels == before:
            return labels, centres, empties
        centres, empty = np.zeros_like(centres), []
        for k in range(K):
            members = [x for x, label in zip(rows, labels, strict=True) if label == k]
            if members:
                centres[k] = sum(members) / len(members)
            else:
                empty.append(k)
        apart = [((x - centres[label]) ** 2).sum() for x, label in zip(rows, labels, strict=True)]
        farthest = sorted(range(len(rows)), key=lambda i: -apart[i])
        for k, i in zip(empty, farthest, strict=False):
            centres[k] = rows[i]
        empties += len(empty)


@pytest.mark.parametrize("iterations", [0, 1, 2, 50])
@pytest.mark.parametrize("N, K", [(96, 8), (97, 8), (150, 9), (40, 40), (70, 1)])
def test_matches_a_naive_loop(N, K, iterations):
    rows = random_rows(N, 5)
    labels, centres = kmeans(rows, K, iterations)
    expected, means, _ = naive(rows, K, iterations)
    assert labels.tolist() == expected and np.allclose(centres, means, atol=1e-5)
    assert (labels.dtype, centres.dtype, centres.shape) == (np.int64, np.float32, (K, 5))


def test_known_clusters_are_found():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 203)
    places = np.array([[0, 0, 9], [0, 9, 0], [9, 0, 0], [-9, -9, -9]])
    rows = (places[truth] + rng.normal(0, 0.3, (203, 3))).astype(np.float32)
    labels, centres = kmeans(rows, 4, seed=3)
    pairs = set(zip(truth.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == len({label for _, label in pairs}) == 4
    for place, label in pairs:
        assert np.allclose(centres[label], rows[truth == place].mean(0), atol=1e-5)


def test_starts_at_distinct_rows_that_follow_from_the_seed():
    rows = np.arange(60, dtype=np.float32).reshape(30, 2)
    first, same, other = (kmeans(rows, 29, 0, seed)[1] for seed in (1, 1, 2))
    chosen = {tuple(row) for row in first.tolist()}
    assert len(chosen) == 29 and chosen < {tuple(row) for row in rows.tolist()}
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def start_at(monkeypatch, *which):
    """The first centres are the rows `which`."""
    rng = SimpleNamespace(choice=lambda *_, **__: np.array(which))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: rng)


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
    assert kmeans(rows, 4, 1)[1][:, 0].tolist() == [2, 73, -60, 64]  # 62 from the mean both
    rows = np.tile(column(3, -3), (16, 1))
    rows[20:24, 0] = 4, -4, -4, 4
    rows[:4] = 0
    start_at(monkeypatch, 0, 1, 2, 3)
    assert kmeans(rows, 4, 1)[1][:, 0].tolist() == [0, 4, -4, -4]


def test_empty_clusters_match_the_naive_loop(monkeypatch):
    start_at(monkeypatch, 0, 1, 2, 3, 10, 20)
    for seed in range(6):
        rows = np.random.RandomState(seed).lognormal(0, 1, (60, 3)).astype(np.float32)
        rows[1:4] = rows[0]
        labels, centres = kmeans(rows, 6, 20)
        expected, means, empties = naive(rows, 6, 20)
        assert empties >= 3 and labels.tolist() == expected and np.allclose(centres, means, atol=1e-5)


def test_fewer_distinct_rows_than_clusters():
    rows = np.tile(np.array([[1, 2], [-5, 0], [3, 4]], np.float32), (20, 1))
    labels, centres = kmeans(rows, 6)
    assert len(set(labels.tolist())) == 3 and np.array_equal(centres[labels], rows)
    assert not kmeans(np.zeros((5, 2), np.float32), 2)[0].any()


def test_float16_and_files(tmp_path):
    rows = random_rows(300, 5).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    expected = kmeans(rows.astype(np.float32), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (rows, np.load(tmp_path / "rows.npy", mmap_mode="r")):
            assert all(map(np.array_equal, kmeans(same, 7), expected))
    assert np.array_equal(rows, random_rows(300, 5).astype(np.float16))  # left as they were


def test_few_rows_are_warned_of():
    with pytest.warns(UserWarning, match="77 rows are few for 2 clusters"):
        kmeans(random_rows(77, 2), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kmeans(random_rows(78, 2), 2)


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
        found = [kmeans(rows, 7, device="cuda") for _ in range(2)]
        assert all(map(np.array_equal, *found))
        assert np.array_equal(found[0][0], labels) and np.allclose(found[0][1], centres, atol=1e-5)

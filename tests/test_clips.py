"""Samplers, training and test sets, and batches that are a pure function of (seed, step, rank, world)."""

import os
import pickle
import time
from fractions import Fraction
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from common import clips as samplers
from common.clips import Clips, Order, Views, dense, dense_test, eval_loader, train_loader, uniform
from common.data import Videos
from common.errors import VideoError
from common.io.decode import Video
from common.io.workers import watched

# ---- samplers ------------------------------------------------------------------------------------


def test_random_frames_stay_in_their_windows_and_segments():
    rng = np.random.default_rng(0)
    windows = np.stack([dense(20, 4, 4, rng) for _ in range(200)])
    assert windows.dtype == np.int64 and (np.diff(windows) == 4).all()
    assert set(windows[:, 0].tolist()) == {0, 1, 2, 3, 4}  # 20 - 4 * 4 + 1 places
    assert list(dense(3, 4, 2, rng)) == [0, 2, 1, 0]  # 0 2 4 6, looped
    assert list(dense(1, 3, 8, rng)) == [0, 0, 0]
    drawn = np.stack([uniform(12, 3, rng) for _ in range(200)])
    assert [set(column) for column in drawn.T.tolist()] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}]


FRAMES = [
    ("dense_test", (20, 4, 2, 4), [[s, s + 2, s + 4, s + 6] for s in (0, 4, 8, 12)]),
    ("dense_test", (20, 2, 2, 1), [[8, 10]]),
    ("dense_test", (3, 4, 1, 2), [[0, 1, 2, 0]] * 2),
    ("dense_test", (1, 2, 8, 10), [[0, 0]] * 10),
    # 20 frames, 4 at stride 3: T' = 11, parts begin at 0, 3.67, 7.33
    ("dense_parts", (20, 4, 3, 3), [[0, 3, 6, 9], [3, 6, 9, 12], [7, 10, 13, 16]]),
    ("dense_parts", (3, 4, 1, 2), [[0, 1, 2, 0]] * 2),  # too short: looped
    ("uniform", (8, 4), [1, 3, 5, 7]),
    ("uniform", (2, 4), [0, 0, 1, 1]),
    ("uniform_test", (20, 4, 1), [[2, 7, 12, 17]]),  # a single clip: centres
    ("uniform_test", (20, 4, 2), [[0, 5, 10, 15], [2, 7, 12, 17]]),  # + 0.5 T / N = 2.5
]


@pytest.mark.parametrize("sampler, arguments, frames", FRAMES)
def test_samplers_by_hand(sampler, arguments, frames):
    assert getattr(samplers, sampler)(*arguments).tolist() == frames


def paper_dense(T, N, tau, k):
    """Appendix 1 of Mutual Modality Learning: the frames of its k dense clips, T' = T - tau (N - 1)."""
    room = T - tau * (N - 1)
    if k == 1:
        return [[room // 2 + tau * j for j in range(N)]]
    return [[int(Fraction(i * room, k) + tau * j) for j in range(N)] for i in range(k)]


def paper_uniform(T, N, m):
    """The same for m uniform clips, with i / m in place of the misprinted i m.

    A single one takes the centre of each part, as the code of MML and TSM does.
    """
    if m == 1:
        return [[(2 * part + 1) * T // (2 * N) for part in range(N)]]
    return [[int((j + Fraction(i, m)) * T / N) for j in range(N)] for i in range(m)]


@pytest.mark.parametrize("T", [1, 2, 5, 8, 28, 29, 30, 37, 64, 301])
@pytest.mark.parametrize("N, tau", [(8, 4), (16, 2), (5, 1), (1, 3)])
def test_appendix_1_as_printed(T, N, tau):
    for count in range(5):
        k_dense, m_uniform = samplers.dense_parts(T, N, tau, count), samplers.uniform_test(T, N, count)
        assert k_dense.dtype == m_uniform.dtype == np.int64
        assert k_dense.shape == m_uniform.shape == (count, N)
        assert m_uniform.tolist() == paper_uniform(T, N, count)
        if T > tau * (N - 1):
            assert k_dense.tolist() == paper_dense(T, N, tau, count)
        assert ((k_dense >= 0) & (k_dense < T)).all()


def test_an_order_is_a_permutation_a_pass():
    order, again = Order(7, seed=3), Order(7, seed=3)
    positions = [order[p] for p in range(21)]
    for d in range(3):
        indices, draws = zip(*positions[7 * d : 7 * d + 7], strict=True)
        assert sorted(indices) == list(range(7)) and set(draws) == {d}
    assert [again[p] for p in reversed(range(21))] == positions[::-1]
    assert [Order(7, seed=4)[p] for p in range(7)] != positions[:7]
    # Several positions at once: in a pass, across its end, of several passes, and from an earlier place.
    for first, count in ((0, 3), (3, 7), (13, 1), (14, 7), (20, 2), (5, 30), (700, 4), (2, 5), (6, 8)):
        indices = order.take(first, count)
        assert indices.dtype == np.int64
        assert indices.tolist() == [again[p][0] for p in range(first, first + count)]


# ---- data sets -----------------------------------------------------------------------------------


def sample_two(v, rng):
    start = rng.integers(len(v))
    return [(start + np.arange(3)) % len(v), dense(len(v), 2, 4, rng)]


def view_two(clips):
    a, b = clips
    noise = torch.randint(0, 255, (2, 2))
    return a[:, :, :8, :8].contiguous(), b.float().mean((2, 3)), noise


def sample_views(v):
    return list(dense_test(len(v), 2, 4, 1 + len(v) % 2))


def bug(*_):
    raise IndexError("a bug of the script")


def training_clips(library, seed=5, **options):
    return Clips(library, sample_two, view_two, seed, **options)


@pytest.fixture(scope="module")
def library(make, tmp_path_factory):
    """Ten videos of 20 to 29 frames: number 3 is an error page, number 7 is missing."""
    folder, names = tmp_path_factory.mktemp("library"), [f"{i}.mp4" for i in range(10)]
    paths = [make.write(folder / name, frames=20 + i, size=(96, 64)) for i, name in enumerate(names)]
    Path(paths[3]).write_text("<html>404</html>")
    os.remove(paths[7])
    return Videos.make(folder, names, np.arange(10) * 10)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def test_clips_are_a_function_of_the_position(library):
    clips = training_clips(library)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    items = [clips[p] for p in range(30)]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.rand(3), np.random.rand()
    again = pickle.loads(pickle.dumps(training_clips(library)))
    assert all(same(again[p], items[p]) for p in (29, 3, 17))
    other = training_clips(library, seed=6)
    assert not all(same(other[p], items[p]) for p in range(10))
    # The draws of one video differ from pass to pass: another window, other noise.
    index = items[0]["index"]
    noises = [item["views"][2] for item in items if item["index"] == index and not item["bad"]]
    assert len(noises) == 3 and not torch.equal(noises[0], noises[1])
    assert all(item["label"].dtype == torch.int64 for item in items)


def test_unreadable_videos_are_replaced_by_the_next_in_the_order(library):
    clips, order, unreadable = training_clips(library), Order(10, 5), set()
    for p in range(20):
        item, k = clips[p], 0
        while order[p + k][0] in (3, 7):
            assert item["bad"][k][0] == order[p + k][0] and item["bad"][k][1]
            unreadable.add(order[p + k][0])
            k += 1
        assert len(item["bad"]) == k and item["index"] == order[p + k][0]
        assert item["label"] == 10 * item["index"]
        if k:  # another draw than the one that the stand-in has at its own place
            assert not same(item["views"], clips[p + k]["views"])
    assert unreadable == {3, 7}
    with pytest.raises(VideoError, match="3.mp4: Invalid data"):
        training_clips(library.subset([3] * 4))[0]


BUGS = [
    (lambda v, *rng: [np.array([0, len(v)])], list, "frames .* of a video of"),
    (lambda v, *rng: None, list, "not iterable"),
    (bug, list, "a bug of the script"),
    (lambda v, *rng: [np.array([0])], bug, "a bug of the script"),
]


@pytest.mark.parametrize("sample, view, message", BUGS)
def test_bugs_of_the_script_surface(library, sample, view, message):
    for dataset in (Clips(library, sample, view, seed=5), Views(library, sample, view)):
        with pytest.raises((IndexError, TypeError), match=message):
            dataset[0]


UNREADABLE = [
    (TypeError("no\ntraceback"), "TypeError: no"),
    (RuntimeError(), "RuntimeError"),
    (IndexError("list index out of range"), "list index out of range"),
    (OSError(5, "Input/output error"), "Input/output error"),
    (VideoError("no frames"), "no frames"),
]


@pytest.mark.parametrize("place", ["open", "__enter__", "clips"])
@pytest.mark.parametrize("error, reason", UNREADABLE)
def test_a_video_is_unreadable_whatever_decoding_it_raises(library, place, error, reason):
    def open(videos, index):
        if index != 2:
            return Video(videos.path(index))
        if place == "open":
            raise error
        source = MagicMock()
        source.__enter__.return_value, source.__len__.return_value = source, 20
        getattr(source, place).side_effect = error
        return source

    clips = training_clips(library, open=open)
    bad = {fault for p in range(10) for fault in clips[p]["bad"]}
    assert (2, reason) in bad and {i for i, _ in bad} == {2, 3, 7}
    item = Views(library, sample_views, torch.stack, open=open)[2]
    assert item["views"] is None and item["bad"] == reason


def test_labels_and_spans(library, make):
    hot, spans = np.array([[1, 0, 1], [0, 1, 0]], np.uint8), [(0.2, 0.4), (0.0, 0.04)]
    videos = Videos.make(library.root, ["0.mp4", "1.mp4"], hot, spans=spans)
    clips = Clips(videos, sample_two, lambda clips: clips[0], seed=0)
    for item in (clips[0], clips[1]):
        assert item["label"].dtype == torch.float32 and item["label"].tolist() == hot[item["index"]].tolist()
        frames = {make.number(frame) for frame in item["views"]}
        assert frames <= (set(range(5, 10)) if item["index"] == 0 else {0})


def test_views_are_never_replaced(library):
    views = pickle.loads(pickle.dumps(Views(library, sample_views, torch.stack)))
    for i in range(10):
        item = views[i]
        assert item["index"] == i and item["label"] == 10 * i
        if i in (3, 7):
            assert item["views"] is None and item["bad"]
        else:
            assert item["views"].shape == (1 + i % 2, 2, 3, 64, 96) and item["bad"] is None


# ---- batches -------------------------------------------------------------------------------------


def test_train_batches_are_the_same_for_any_workers_and_any_start(library):
    sources = [(training_clips(library), 2), (training_clips(library, seed=6, short_side=32), 3)]
    batches = list(train_loader(sources, 0, 8))
    assert len(batches) == 8 and any(source["bad"] for batch in batches for source in batch)
    for a, b in batches:
        assert a["views"][0].shape == (2, 3, 3, 8, 8) and b["views"][0].shape == (3, 3, 3, 8, 8)
        assert a["index"].dtype == a["label"].dtype == torch.int64
        assert torch.equal(a["label"], a["index"] * 10) and len(b["index"]) == 3
    assert same(list(train_loader(sources, 5, 8)), batches[5:])
    for workers in (1, 2):
        torch.manual_seed(workers)
        loader = train_loader(sources, 3, 8, workers=workers)
        assert len(loader) == 5 and same(list(loader), batches[3:])


def test_ranks_share_the_stream(library):
    whole = list(train_loader([(training_clips(library), 4)], 0, 5))
    ranks = [list(train_loader([(training_clips(library), 2)], 0, 5, rank, world=2)) for rank in range(2)]
    for (batch,), *shares in zip(whole, *ranks, strict=True):
        for key in ("index", "label"):
            assert torch.equal(torch.cat([share[key] for (share,) in shares]), batch[key])
        views = zip(*(share["views"] for (share,) in shares), strict=True)
        assert same([torch.cat(view) for view in views], list(batch["views"]))


def test_a_small_labelled_set_wraps_around(library):
    (batch,) = next(iter(train_loader([(training_clips(library.subset([0, 1])), 5)], 0, 1)))
    assert sorted(set(batch["index"].tolist())) == [0, 1] and len(batch["index"]) == 5


def test_test_blocks_do_not_depend_on_the_ranks(library):
    views = Views(library, sample_views, torch.stack)
    whole = list(eval_loader(views, block=3))
    assert [batch["index"].tolist() for batch in whole] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [batch["counts"].tolist() for batch in whole] == [[1, 2, 1], [0, 1, 2], [1, 0, 1], [2]]
    assert [i for i, _ in whole[1]["bad"] + whole[2]["bad"]] == [3, 7]
    assert [len(batch["views"]) for batch in whole] == [4, 3, 2, 2]
    for world in (2, 3, 5):
        shares = [list(eval_loader(views, 3, rank, world)) for rank in range(world)]
        assert same([shares[k % world][k // world] for k in range(4)], whole)
        assert sum(map(len, shares)) == 4
    assert same(list(eval_loader(views, 3, workers=2)), whole)
    assert same(list(eval_loader(views, 3, done={3})), [whole[0], *whole[2:]])
    assert same(list(eval_loader(views, 3, 1, 2, done={3})), whole[2:3])
    assert not list(eval_loader(views, 3, done={0, 3, 6, 9}))
    (batch,) = eval_loader(Views(library.subset([3]), sample_views, torch.stack), 4)
    assert batch["views"] is None and batch["counts"].tolist() == [0]


def test_without_workers_too_a_hung_disk_is_no_bad_video(library, monkeypatch):
    monkeypatch.setattr("common.io.workers.TIMEOUT", 1)
    clips = training_clips(library, open=lambda videos, index: time.sleep(60))
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        next(watched(train_loader([(clips, 2)], 0, 1)))


@pytest.mark.parametrize("error", [EOFError("ends"), ConnectionResetError(104, "reset by peer")])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error):
    def batches(error):
        yield 1
        raise error

    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        list(watched(batches(error)))
    with pytest.raises(type(error), match="Caught"):  # what the code of a view or sample raises
        list(watched(batches(type(error)("Caught it in DataLoader worker process 0."))))

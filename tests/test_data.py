"""Videos, labelled subsets, and what follows from the data set and not from the name of its folder."""

import dataclasses
import os
import pickle
import shutil
import unicodedata
from argparse import Namespace

import numpy as np
import pytest
from trees import counts, fails, pairs, text, tree

from common.data import Data, Videos, digest_of_videos, labelled_subset, load_data, semi_supervised
from common.flags import Parser
from common.io.readers import READERS, stem_of

# ---- Videos ----------------------------------------------------------------------------------------


def test_videos_give_back_what_went_in():
    names = ["a/v_g01.avi", "ü/#[x] 'y'.mp4", os.fsdecode(b"\xff\xfe.avi"), "/far/away.mp4", "a\nb.mp4"]
    spans = [(i, i + 0.5) for i in range(5)]
    videos = pickle.loads(pickle.dumps(Videos.make("data/x", names, [3, 1, 2, 0, 0], range(5), spans)))
    assert [videos.name(i) for i in range(5)] == names and videos.name(-1) == "a\nb.mp4"
    assert videos.path(0) == "data/x/a/v_g01.avi" and videos.path(3) == "/far/away.mp4"
    assert videos.labels.dtype == np.int64 and videos.groups.dtype == np.int32 and videos.span(2) == (2, 2.5)
    two = videos.subset([4, 1])
    assert pairs(two) == {names[4]: 0, names[1]: 1}
    assert two.span(1) == (1, 1.5) and two.groups.tolist() == [4, 1] and len(two) == 2
    assert len(videos.subset([])) == 0 and videos.subset([]).spans.shape == (0, 2)
    both = two.joined(Videos.make("data/x", ["c"], [-1]))
    assert both.path(2) == "data/x/c" and both.labels.tolist() == [0, 1, -1] and both.groups is None
    assert [both.span(i) for i in range(3)] == [(4, 4.5), (1, 1.5), (0, np.inf)]
    assert two.joined(two.subset([])) is two
    with pytest.raises(IndexError):
        videos.name(5)
    with pytest.raises(ValueError):
        Videos.make("x", ["a", "b"], [0])


def test_a_quarter_million_videos_stay_small():
    names = [f"train/some class name/abcdefghi{i:06d}_000010_000020.mp4" for i in range(240_000)]
    videos = Videos.make("data/k400", names, np.zeros(240_000))
    assert len(pickle.dumps(videos)) < sum(map(len, names)) + 16 * 240_000 + 10_000
    assert not any(isinstance(value, list | tuple) for value in vars(videos).values())


def test_digest_sees_names_labels_spans_and_order():
    def digest(names="xy", labels=(0, 1), indices=(0, 1), root="a", **options):
        return digest_of_videos(Videos.make(root, [*names], labels, **options), indices)

    assert digest(root="b") == digest() and len(digest()) == 64
    others = [digest(indices=[1, 0]), digest(indices=[0]), digest("xz"), digest(labels=[0, 2])]
    others += [digest(labels=[[1, 0], [0, 1]]), digest(spans=[(0, 1), (1, 2)])]
    assert len({digest(), *others}) == 7


def test_a_folder_is_what_it_holds_and_not_what_it_is_called(tmp_path):
    """Renamed, it draws the same labelled videos and is mirrored; called like a data set, it is not that."""
    files = [f"{part}/{k}/{i}.mp4" for part in ("train", "test") for k in ("run", "walk") for i in range(30)]
    tree(tmp_path / "first", *files)
    draws = []
    for name in ("things", "toyota_smarthome", "ssv2", "toy", "ucf101"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        data = load_data(tmp_path / name)
        assert data.flip and data.name == (data.train.root if name in READERS else name)
        draws.append(labelled_subset(data, ratio=0.1).tolist())
    assert draws == draws[:1] * 5 and len(draws[0]) == 6


def test_a_copy_in_another_unicode_form_is_the_same_data(tmp_path):
    names = [f"train/{k}/{c}{i}ü.mp4" for k in ("run", "wálk") for i in range(9) for c in "aeéfzž"]
    draws, digests = [], []
    for form in ("NFC", "NFD"):
        files = [unicodedata.normalize(form, name) for name in names]
        data = load_data(tree(tmp_path / form / "set", "test/run/t.mp4", *files))
        draws.append(labelled_subset(data, per_class=3).tolist())
        digests.append(digest_of_videos(data.train))
    assert draws[0] == draws[1] and digests[0] == digests[1]


# ---- labelled subsets ------------------------------------------------------------------------------


def data_of(name="things", sizes=(5, 30, 100), split=1, suffix=".mp4"):
    names = [f"c{k}/{i:04d}{suffix}" for k, size in enumerate(sizes) for i in range(size)]
    train = Videos.make("root", names, np.repeat(np.arange(len(sizes)), sizes))
    classes = tuple(f"c{k}" for k in range(len(sizes)))
    return Data(name, split, classes, train, train.subset([]), False, True, ())


RATIOS = [  # data set, class sizes, ratio, and how many of each class are labelled
    ("things", (5, 30, 100), 0.1, [5, 5, 5]),  # ceil(0.1 x 45)
    ("things", (10, 10), 0.3, [3, 3]),  # not 4: 0.3 x 10 > 3
    ("things", (5, 30, 100), 1e-6, [1, 1, 1]),
    ("things", (5, 30, 100), 1, [5, 30, 100]),
    ("k400", (700, 690, 72), 0.01, [6, 6, 6]),
    ("k400", (700, 690, 72), 0.1, [60, 60, 60]),
    ("ucf101", (700, 690, 72), 0.01, [1, 1, 1]),
    ("ucf101", (700, 690, 72), 0.1, [10, 10, 10]),
]


@pytest.mark.parametrize("name, sizes, ratio, expected", RATIOS)
def test_ratio_is_balanced(name, sizes, ratio, expected):
    data = data_of(name, sizes)
    few = labelled_subset(data, ratio)
    assert few.dtype == np.int64 and (np.diff(few) > 0).all() and counts(data, few) == expected


def test_small_classes_give_all_with_one_warning():
    data, sentence = data_of(sizes=(2, 0, 9)), r"^2 classes have fewer than 4 videos: c0 \(2\), c1 \(0\)$"
    with pytest.warns(UserWarning, match=sentence) as warned:
        few = labelled_subset(data, per_class=4)
    assert counts(data, few) == [2, 0, 4] and len(warned) == 1


DRAWS = {  # a new version must not draw others
    "things": "48d95689ef1823f1a772437eee13e32172f1a639bbc43636c814a3965009a7ef",
    "toy": "0ede4ff76e9364f27cf888d8a9d01bdb4897de54315368bbc27be851dde72c0f",
}


def test_the_draw_is_a_function_of_its_arguments():
    def names(data, **options):
        return {stem_of(data.train.name(i)) for i in labelled_subset(data, per_class=4, **options)}

    data = data_of()
    shuffled = data.train.subset(np.random.default_rng(0).permutation(135))
    for same in (data_of(suffix=".avi"), dataclasses.replace(data, train=shuffled)):
        assert names(same) == names(data)
    draws = [names(data), names(data, seed=1), *map(names, (data_of(split=2), data_of("toy")))]
    assert len(set(map(frozenset, [*draws, names(data_of("ucf101"))]))) == 5
    for name, digest in DRAWS.items():
        data = data_of(name)
        assert digest_of_videos(data.train, labelled_subset(data, per_class=2)) == digest


def test_several_labels_draw_videos():
    data = data_of()
    hot = np.eye(3, dtype=np.uint8)[data.train.labels]
    data = dataclasses.replace(data, multilabel=True, train=dataclasses.replace(data.train, labels=hot))
    assert len(labelled_subset(data, ratio=0.1)) == 14 and len(labelled_subset(data, ratio=1)) == 135
    fails("--ratio", call=labelled_subset, data=data, per_class=3)


LINES = [  # spellings of c0/0001.mp4 of class 0 and c1/0003.mp4 of class 1
    ["c0/0001.mp4 0", "c1/0003.mp4 1"],
    ["c1/0003.mp4", "c0/0001"],
    ["c0/0001.mp4 0", "c1/0003 120 1"],
    ["c0/0001.avi 0", "/x/c1/0003.mp4,1"],
    ["c0/0001 0", "c1/0003 1", "c0/0001 0"],
]


@pytest.mark.parametrize("lines", LINES)
def test_list_of_labelled_videos(tmp_path, lines):
    path, data = text(tmp_path / "few.txt", *lines), data_of()
    names = [data.train.name(i) for i in labelled_subset(data, listfile=path)]
    assert names == ["c0/0001.mp4", "c1/0003.mp4"]
    with pytest.warns(UserWarning, match="1 of .* videos .* x.mp4"):
        text(path, "x.mp4", *lines)
        assert [data.train.name(i) for i in labelled_subset(data, listfile=path)] == names


def test_list_by_name_alone(tmp_path):
    names = ["a/v_x_g01_c01.avi", "b/v_y_g01_c02.avi", "a/u.avi", "b/u.avi"]
    data = dataclasses.replace(data_of(sizes=(2, 2)), train=Videos.make("r", names, [0, 1, 0, 1]))
    path = text(tmp_path / "few.txt", "v_y_g01_c02", "v_x_g01_c01.mp4", "v_x_g01_c01.mp4")
    assert labelled_subset(data, listfile=path).tolist() == [0, 1]
    text(path, "v_y_g01_c02", "u.avi")
    fails("few.txt:2", "several", "u.avi", call=labelled_subset, data=data, listfile=path)


FAULTS = [  # options, or lines of the list of labelled videos, and parts of the sentence
    (dict(ratio=0), ["(0, 1]"]),
    (dict(ratio=10), ["(0, 1]"]),
    (dict(ratio=float("nan")), ["nan"]),
    (dict(per_class=0), ["--per_class 0"]),
    (dict(), ["exactly one"]),
    (dict(ratio=0.1, per_class=1), ["exactly one"]),
    (None, ["few.txt", "cannot read"]),
    (["c0/0001.mp4 0", "c1/0003.mp4 2"], ["few.txt:2", "label 2", "has 1", "1 of 2 lines differ"]),
    (["c0/0001.mp4 1", "c1/0003.mp4 2"], ["few.txt:1", "labels count from 0"]),
    (["x.mp4 1", "y.mp4 2"], ["none of its 2 videos", "c0/0000.mp4"]),
]


@pytest.mark.parametrize("options, parts", FAULTS)
def test_bad_options_and_lists(tmp_path, options, parts):
    if isinstance(options, list):
        text(tmp_path / "few.txt", *options)
    options = options if isinstance(options, dict) else dict(listfile=tmp_path / "few.txt")
    fails(*parts, call=labelled_subset, data=data_of(), **options)


# ---- labelled and unlabelled videos ----------------------------------------------------------------

POOLS = [  # options, unlabelled videos, and how many are labelled, unlabelled, and of these of known label
    (dict(ratio=0.5), 0, 6, 6, 6),
    (dict(ratio=0.5), 4, 6, 10, 6),
    (dict(ratio=0.5, unlabelled="all"), 4, 6, 16, 12),
    (dict(ratio=1), 0, 12, 12, 12),  # the rest would be empty
    (dict(ratio=1), 4, 12, 4, 0),
    (dict(ratio=1, unlabelled="all"), 4, 12, 16, 12),
]


@pytest.mark.parametrize("options, n_extra, n_labelled, n_unlabelled, known", POOLS)
def test_unlabelled_videos_join_the_pool(tmp_path, options, n_extra, n_labelled, n_unlabelled, known):
    """They are never drawn as labelled, and no label is invented for them."""
    names = [f"train/{k}/{i}.mp4" for k in ("run", "walk") for i in range(6)]
    tree(tmp_path, *names, *(f"unlabelled/u{i}.mp4" for i in range(n_extra)), "test/run/t.mp4")
    data, sentences = load_data(tmp_path), []
    options = dict(per_class=None, seed=0, listfile=None, say=sentences.append) | options
    labelled, unlabelled = semi_supervised(data, **options)
    assert (len(labelled), len(unlabelled)) == (n_labelled, n_unlabelled)
    assert (labelled.labels >= 0).all() and (unlabelled.labels >= 0).sum() == known
    assert {name.split("/")[0] for name in pairs(unlabelled)} <= {"train", "unlabelled"}
    assert f"{n_labelled} labelled videos, {n_unlabelled} unlabelled videos" in sentences[0]
    if n_extra:
        path = text(tmp_path / "few.txt", "unlabelled/u0.mp4 0")
        fails("none of its 1 videos", call=labelled_subset, data=data, listfile=path)


def test_the_labelled_share_is_one_of_all_training_videos(tmp_path):
    tree(tmp_path, *(f"train/run/{i}.mp4" for i in range(4)), "test/run/t.mp4", "unlabelled/a.mp4")
    options = dict(root=None, split=1, ratio=None, per_class=2, seed=0, labelled_list=None)
    assert Parser.labelled_share(None, Namespace(data=str(tmp_path), **options)) == 2 / 5

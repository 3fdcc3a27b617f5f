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
    names = [
        "Biking/v_Biking_g01_c04.avi",
        "ü/#[x] 'y'.mp4",
        os.fsdecode(b"\xff\xfe.avi"),
        "/far/away.mp4",
        "a\nb.mp4",
    ]
    videos = Videos.make(
        "data/x", names, [3, 1, 2, 0, 0], groups=range(5), spans=[(i, i + 0.5) for i in range(5)]
    )
    copy = pickle.loads(pickle.dumps(videos))
    assert [copy.name(i) for i in range(5)] == names and copy.name(-1) == "a\nb.mp4"
    assert copy.path(0) == "data/x/Biking/v_Biking_g01_c04.avi" and copy.path(3) == "/far/away.mp4"
    assert copy.labels.dtype == np.int64 and copy.groups.dtype == np.int32 and copy.span(2) == (2.0, 2.5)
    two = copy.subset([4, 1])
    assert [two.name(i) for i in range(2)] == [names[4], names[1]] and two.labels.tolist() == [0, 1]
    assert two.span(1) == (1.0, 1.5) and two.groups.tolist() == [4, 1] and len(two) == 2
    with pytest.raises(IndexError):
        copy.name(5)
    assert len(copy.subset([])) == 0 and copy.subset([]).spans.shape == (0, 2)
    with pytest.raises(ValueError):
        Videos.make("x", ["a", "b"], [0])


def test_a_quarter_million_videos_stay_small():
    names = [f"train/some class name/abcdefghi{i:06d}_000010_000020.mp4" for i in range(240_000)]
    videos = Videos.make("data/k400", names, np.zeros(240_000))
    size = len(pickle.dumps(videos))
    assert size < sum(map(len, names)) + 16 * 240_000 + 10_000
    assert not any(isinstance(value, list | tuple) for value in vars(videos).values())


def test_digest_sees_names_labels_spans_and_order():
    videos = Videos.make("a", ["x", "y"], [0, 1])
    same = digest_of_videos(videos, [0, 1])
    assert digest_of_videos(Videos.make("b", ["x", "y"], [0, 1]), [0, 1]) == same and len(same) == 64
    others = [
        digest_of_videos(videos, [1, 0]),
        digest_of_videos(videos, [0]),
        digest_of_videos(Videos.make("a", ["x", "z"], [0, 1]), [0, 1]),
        digest_of_videos(Videos.make("a", ["x", "y"], [0, 2]), [0, 1]),
        digest_of_videos(Videos.make("a", ["x", "y"], [0, 1], spans=[(0, 1), (1, 2)]), [0, 1]),
        digest_of_videos(Videos.make("a", ["x", "y"], [[1, 0], [0, 1]]), [0, 1]),
    ]
    assert len({same, *others}) == 7


def test_a_folder_is_what_it_holds_and_not_what_it_is_called(tmp_path):
    """A renamed folder draws the same labelled videos, and its clips are mirrored. One that is called like a
    data set is not that data set."""
    files = [f"{part}/{k}/{i}.mp4" for part in ("train", "test") for k in ("run", "walk") for i in range(30)]
    tree(tmp_path / "first", *files)
    draws = []
    for name in ("things", "toyota_smarthome", "ssv2", "toy", "ucf101"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        data = load_data(tmp_path / name)
        assert data.flip and data.name == (data.train.root if name in READERS else name)
        draws.append(labelled_subset(data, ratio=0.1).tolist())
        assert len(draws[-1]) == 6
    assert draws == draws[:1] * 5


def test_a_copy_in_another_unicode_form_is_the_same_data(tmp_path):
    names = [f"train/{k}/{c}{i}ü.mp4" for k in ("run", "wálk") for i in range(9) for c in "aeéfzž"]
    datas = []
    for form in ("NFC", "NFD"):
        root = tmp_path / form / "set"
        tree(root, "test/run/t.mp4", *(unicodedata.normalize(form, name) for name in names))
        datas.append(load_data(str(root)))
    draws = [labelled_subset(data, per_class=3) for data in datas]
    assert draws[0].tolist() == draws[1].tolist()
    assert digest_of_videos(datas[0].train, range(108)) == digest_of_videos(datas[1].train, range(108))


def test_videos_are_joined():
    videos = Videos.make("x", ["a", "b"], [0, 1], groups=[1, 2])
    both = videos.joined(Videos.make("x", ["c"], [-1], spans=[(1, 2)]))
    assert [both.path(i) for i in range(3)] == ["x/a", "x/b", "x/c"] and both.labels.tolist() == [0, 1, -1]
    assert [both.span(i) for i in range(3)] == [(0, np.inf), (0, np.inf), (1, 2)] and both.groups is None
    assert videos.joined(videos.subset([])) is videos


# ---- labelled subsets ------------------------------------------------------------------------------


def data_of(name="things", sizes=(5, 30, 100), split=1, suffix=".mp4"):
    names = [f"c{k}/{i:04d}{suffix}" for k, size in enumerate(sizes) for i in range(size)]
    train = Videos.make("root", names, np.repeat(np.arange(len(sizes)), sizes))
    classes = tuple(f"c{k}" for k in range(len(sizes)))
    return Data(name, split, classes, train, train.subset([]), False, True, ())


@pytest.mark.parametrize(
    "name, sizes, ratio, expected",
    [
        ("things", (5, 30, 100), 0.1, [5, 5, 5]),  # ceil(0.1 x 45)
        ("things", (10, 10), 0.3, [3, 3]),  # not 4: 0.3 x 10 > 3
        ("things", (5, 30, 100), 1e-6, [1, 1, 1]),
        ("things", (5, 30, 100), 1, [5, 30, 100]),
        ("k400", (700, 690, 72), 0.01, [6, 6, 6]),
        ("k400", (700, 690, 72), 0.1, [60, 60, 60]),
        ("ucf101", (700, 690, 72), 0.01, [1, 1, 1]),
        ("ucf101", (700, 690, 72), 0.1, [10, 10, 10]),
    ],
)
def test_ratio_is_balanced(name, sizes, ratio, expected):
    data = data_of(name, sizes)
    few = labelled_subset(data, ratio)
    assert few.dtype == np.int64 and (np.diff(few) > 0).all() and counts(data, few) == expected


def test_small_classes_give_all_with_one_warning():
    data = data_of(sizes=(2, 0, 9))
    with pytest.warns(
        UserWarning, match=r"^2 classes have fewer than 4 videos: c0 \(2\), c1 \(0\)$"
    ) as warned:
        few = labelled_subset(data, per_class=4)
    assert counts(data, few) == [2, 0, 4] and len(warned) == 1


def test_the_draw_is_a_function_of_its_arguments():
    def names(data, **options):
        return {stem_of(data.train.name(i)) for i in labelled_subset(data, **options)}

    data = data_of()
    first = names(data, per_class=4)
    assert names(data_of(suffix=".avi"), per_class=4) == first
    shuffled = data.train.subset(np.random.default_rng(0).permutation(135))
    assert names(dataclasses.replace(data, train=shuffled), per_class=4) == first
    draws = [first, names(data, per_class=4, seed=1), names(data_of(split=2), per_class=4)]
    draws += [names(data_of(name), per_class=4) for name in ("toy", "ucf101")]
    assert len(set(map(frozenset, draws))) == 5
    for name, digest in DRAWS.items():
        data = data_of(name)
        assert digest_of_videos(data.train, labelled_subset(data, per_class=2)) == digest


DRAWS = {  # a new version must not draw others
    "things": "48d95689ef1823f1a772437eee13e32172f1a639bbc43636c814a3965009a7ef",
    "toy": "0ede4ff76e9364f27cf888d8a9d01bdb4897de54315368bbc27be851dde72c0f",
}


def test_several_labels_draw_videos():
    data = data_of()
    hot = np.eye(3, dtype=np.uint8)[data.train.labels]
    data = dataclasses.replace(data, multilabel=True, train=dataclasses.replace(data.train, labels=hot))
    assert len(labelled_subset(data, ratio=0.1)) == 14 and len(labelled_subset(data, ratio=1)) == 135
    fails("--ratio", call=labelled_subset, data=data, per_class=3)


@pytest.mark.parametrize(
    "options, part",
    [
        (dict(ratio=0), "(0, 1]"),
        (dict(ratio=10), "(0, 1]"),
        (dict(ratio=float("nan")), "nan"),
        (dict(per_class=0), "--per_class 0"),
        (dict(), "exactly one"),
        (dict(ratio=0.1, per_class=1), "exactly one"),
    ],
)
def test_bad_ratios(options, part):
    fails(part, call=labelled_subset, data=data_of(), **options)


LINES = [
    "c1/0003.mp4 1",
    "c1/0003.mp4",
    "c1/0003 1",
    "c1/0003.avi 1",
    "c1/0003 120 1",
    "/x/c1/0003.mp4,1",
]


@pytest.mark.parametrize("line", LINES)
def test_list_of_labelled_videos(tmp_path, line):
    path, data = text(tmp_path / "few.txt", "c0/0001.mp4 0", line), data_of()
    names = [data.train.name(i) for i in labelled_subset(data, listfile=path)]
    assert names == ["c0/0001.mp4", "c1/0003.mp4"]


def test_list_by_name_alone(tmp_path):
    names = ["a/v_x_g01_c01.avi", "b/v_y_g01_c02.avi", "a/u.avi", "b/u.avi"]
    data = dataclasses.replace(data_of(sizes=(2, 2)), train=Videos.make("r", names, [0, 1, 0, 1]))
    path = text(tmp_path / "few.txt", "v_y_g01_c02", "v_x_g01_c01.mp4", "v_x_g01_c01.mp4")
    assert labelled_subset(data, listfile=path).tolist() == [0, 1]
    text(path, "v_y_g01_c02", "u.avi")
    fails("few.txt:2", "several", "u.avi", call=labelled_subset, data=data, listfile=path)


@pytest.mark.parametrize(
    "lines, parts",
    [
        (None, ["few.txt", "cannot read"]),
        (["c0/0001.mp4 0", "c1/0003.mp4 2"], ["few.txt:2", "label 2", "has 1", "1 of 2 lines differ"]),
        (["c0/0001.mp4 1", "c1/0003.mp4 2"], ["few.txt:1", "labels count from 0"]),
        (["x.mp4 1", "y.mp4 2"], ["none of its 2 videos", "c0/0000.mp4"]),
    ],
)
def test_bad_lists_of_labelled_videos(tmp_path, lines, parts):
    path = tmp_path / "few.txt"
    if lines:
        text(path, *lines)
    fails(*parts, call=labelled_subset, data=data_of(), listfile=path)


def test_a_list_of_labelled_videos_may_name_others_too(tmp_path):
    path = text(tmp_path / "few.txt", "x.mp4 1", "c0/0001.mp4 0")
    with pytest.warns(UserWarning, match="1 of 2 videos .* x.mp4"):
        assert labelled_subset(data_of(), listfile=path).tolist() == [1]


# ---- labelled and unlabelled videos ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options, n_extra, n_labelled, n_unlabelled, known",
    [
        (dict(ratio=0.5), 0, 6, 6, 6),
        (dict(ratio=0.5), 4, 6, 10, 6),
        (dict(ratio=0.5, unlabelled="all"), 4, 6, 16, 12),
        (dict(ratio=1), 0, 12, 12, 12),  # the rest would be empty
        (dict(ratio=1), 4, 12, 4, 0),
        (dict(ratio=1, unlabelled="all"), 4, 12, 16, 12),
    ],
)
def test_unlabelled_videos_join_the_pool(tmp_path, options, n_extra, n_labelled, n_unlabelled, known):
    """They are never drawn as labelled, and no label is invented for them."""
    names = [f"train/{k}/{i}.mp4" for k in ("run", "walk") for i in range(6)]
    tree(tmp_path, *names, *(f"unlabelled/{i}.mp4" for i in range(n_extra)), "test/run/t.mp4")
    data, sentences = load_data(tmp_path), []
    options = dict(per_class=None, seed=0, listfile=None, say=sentences.append) | options
    labelled, unlabelled = semi_supervised(data, **options)
    assert (len(labelled), len(unlabelled)) == (n_labelled, n_unlabelled)
    assert (labelled.labels >= 0).all() and (unlabelled.labels >= 0).sum() == known
    assert {name.split("/")[0] for name in pairs(unlabelled)} <= {"train", "unlabelled"}
    assert f"{n_labelled} labelled videos, {n_unlabelled} unlabelled videos" in sentences[0]


def test_the_labelled_share_is_one_of_all_training_videos(tmp_path):
    tree(tmp_path, *(f"train/run/{i}.mp4" for i in range(4)), "test/run/t.mp4", "unlabelled/a.mp4")
    args = Namespace(
        data=str(tmp_path), root=None, split=1, ratio=None, per_class=2, seed=0, labelled_list=None
    )
    assert Parser.labelled_share(None, args) == 2 / 5


def test_an_unlabelled_video_cannot_be_listed_as_labelled(tmp_path):
    tree(tmp_path, "train/run/a.mp4", "unlabelled/b.mp4", "test/run/t.mp4")
    path = text(tmp_path / "few.txt", "unlabelled/b.mp4 0")
    fails("none of its 1 videos", call=labelled_subset, data=load_data(tmp_path), listfile=path)

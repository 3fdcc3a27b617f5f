"""Readers on small trees in the official formats, with the traps; labelled subsets; check and shrink."""

import csv
import dataclasses
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from fractions import Fraction
from pathlib import Path

import av
import forks
import numpy as np
import pytest
import torch
from PIL import Image

from common.clips import Clips, train_loader
from common.data import Data, Videos, as_list, digest_of_videos, labelled_subset, load_data
from common.errors import UserError
from common.io.decode import Video
from common.io.readers import _scan, stem_of
from common.io.workers import in_parallel
from common.tools import check, flow, shrink
from common.tools.check import _check_one
from common.tools.shrink import _shrink_one

SHARED = Path(__file__).parents[2] / "shared" / "data"
LISTS = SHARED / "splits"
shared = pytest.mark.skipif(not LISTS.is_dir(), reason="without the real lists")


def tool(command):
    """Exit status of `check ...` or `shrink ...`."""
    return {"check": check, "shrink": shrink}[command[0]].main(command[1:])


def tree(root, *names):
    """Empty files; a name that ends in "/" is a folder of three pictures."""
    for name in names:
        files = [f"{name}img_{i:05d}.jpg" for i in (1, 2, 3)] if name.endswith("/") else [name]
        for file in files:
            path = os.path.join(root, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "wb").close()
    return root


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    return path


def pairs(videos):
    """{name: label, or tuple of labels}"""
    labels = videos.labels
    tuples = labels.tolist() if labels.ndim == 1 else [tuple(np.flatnonzero(y).tolist()) for y in labels]
    return dict(zip(map(videos.name, range(len(videos))), tuples, strict=True))


def fails(*parts, call=load_data, **options):
    """The sentence of the UserError that the call must raise; it must have all the parts."""
    with pytest.raises(UserError) as error:
        call(**options)
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in parts:
        assert str(part) in sentence, sentence
    return sentence


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


# ---- folders with lists ----------------------------------------------------------------------------


def lists(root, train, test=("walk/t.mp4 1",), classes=("run", "walk")):
    text(root / "train.txt", *train)
    text(root / "test.txt", *test)
    if classes:
        text(root / "classes.txt", *classes)
    return root


STRANGE = [
    "run/with blanks  two.mp4",
    "run/#2_gum [x](y)!&;+~@'.avi",
    "run/-minus.mp4",
    "run/:colon.mp4",
    "walk/a,b.mkv",
    "walk/ünï.webm",
    os.fsdecode(b"walk/\xff\xfe.avi"),
    "walk/v 12.mp4",
    "walk/concat:a|b.mp4",
]


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "   ", " \t "])
@pytest.mark.parametrize("end", ["\n", "\r\n", "  \n\n"])
def test_lists_of_every_form(tmp_path, separator, end):
    tree(tmp_path, *STRANGE, "walk/t.mp4")
    lists(tmp_path, [])
    lines = [f"{name}{separator}{int(name.startswith('walk'))}" for name in STRANGE]
    content = "\ufeff" + end.join(lines)  # with a byte order mark, without an end of the last line
    (tmp_path / "train.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    data = load_data(str(tmp_path))
    assert pairs(data.train) == {name: int(name.startswith("walk")) for name in STRANGE}
    assert pairs(data.test) == {"walk/t.mp4": 1} and data.classes == ("run", "walk")
    assert data.name == tmp_path.name and data.flip and not data.multilabel and data.split == 1
    assert ("8 blank lines" in str(data.notes)) == ("\n\n" in end)
    assert all(os.path.exists(data.train.path(i)) for i in range(len(data.train)))


def test_lists_of_frame_folders(tmp_path):
    tree(tmp_path, "run/a/", "run/b 1/", "walk/c/", "walk/t/")
    os.makedirs(tmp_path / "run" / "empty")
    lists(tmp_path, ["run/a 163 0", "run/b 1,3,0", "walk/c 1"], ["walk/t 7 1"])
    assert pairs(load_data(str(tmp_path)).train) == {"run/a": 0, "run/b 1": 0, "walk/c": 1}


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_lists_of_segments_of_frame_folders(tmp_path, make, separator):
    """MMAction2's with_offset: folder, start, frames, label. The frames are those, also after shrink."""
    root, out = tmp_path / "set", tmp_path / "out"
    pictures(root / "long", make, 40)
    tree(root, "test/")
    lines = [separator.join(map(str, line)) for line in SEGMENTS]
    lists(root, lines, ["test 0 3 1"])
    data = load_data(str(root))
    assert data.train.labels.tolist() == [0, 1, 1] and data.test.labels.tolist() == [1]
    assert sorted(note.partition(" are read as folder, start, frames, label")[0] for note in data.notes) == [
        f"the lines of {root}/{part}.txt" for part in ("test", "train")
    ]
    pictures(root / "test", make, 3)
    assert tool(["shrink", str(root), "--out", str(out), "--workers", "0"]) == 0
    for videos in (data.train, load_data(str(out)).train):
        for i, (_, start, frames, _) in enumerate(SEGMENTS):
            with Video(videos.path(i), videos.span(i)) as video:
                numbers = [make.number(x) for x in video.get(range(len(video))).numpy()]
            assert numbers == list(range(start, start + frames)), (videos.path(i), i)
    part = data.train.subset([2, 0])
    few = text(tmp_path / "few.txt", *as_list(part).splitlines())
    assert few.read_text() == "long 25 15 1\nlong 0 10 0\n"
    assert labelled_subset(data, listfile=few).tolist() == [0, 2]
    text(few, "long 1")
    assert labelled_subset(data, listfile=few).tolist() == [1, 2]  # without start: all that have the label
    text(few, "long 25 15 1", "long 3 4 0")
    with pytest.warns(UserWarning, match="1 of 2 videos .* are not training videos"):
        assert labelled_subset(data, listfile=few).tolist() == [2]
    unlabelled = load_data(str(root), labels=False).train
    assert [unlabelled.span(i) for i in range(3)] == [data.train.span(i) for i in range(3)]


SEGMENTS = [("long", 0, 10, 0), ("long", 10, 15, 1), ("long", 25, 15, 1)]


def pictures(folder, make, n):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(make.picture(i)).save(folder / f"img_{i + 1:05d}.jpg", quality=95)


def test_lines_of_three_numbers_that_are_no_segments(tmp_path):
    tree(tmp_path, "a/", "b/", "c.mp4", "t.mp4")
    lists(tmp_path, ["a 99 1 2", "b 99 0"], ["t.mp4 0"], ["x", "y", "z"])  # not all lines
    assert pairs(load_data(str(tmp_path)).train) == {"a": (1, 2), "b": (0,)}
    lists(tmp_path, ["a 99 0 2"], ["t.mp4 0"], ["x", "y", "z"])  # none has 0 frames
    assert pairs(load_data(str(tmp_path)).train) == {"a": (0, 2)}
    lists(tmp_path, ["c.mp4 2 1 0"], ["t.mp4 0"], ["x", "y", "z"])  # not a folder
    assert pairs(load_data(str(tmp_path)).train) == {"c.mp4": (0, 1, 2)}
    lists(tmp_path, ['a,99,"1,2"'], ["t.mp4 0"], ["x", "y", "z"])
    assert pairs(load_data(str(tmp_path)).train) == {"a": (1, 2)}


def test_lists_of_several_labels(tmp_path):
    tree(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d/", "t.mp4")
    lists(tmp_path, ["a.mp4 0", "b.mp4 2 0", 'c.mp4 "1,2"', "d 99 1 2"], ["t.mp4"], ["x", "y", "z"])
    data = load_data(str(tmp_path))
    assert data.multilabel and data.train.labels.dtype == np.uint8 and data.train.labels.shape == (4, 3)
    assert pairs(data.train) == {"a.mp4": (0,), "b.mp4": (0, 2), "c.mp4": (1, 2), "d": (1, 2)}
    assert pairs(data.test) == {"t.mp4": ()}


def test_names_are_found_with_other_suffixes_prefixes_and_spellings(tmp_path):
    tree(
        tmp_path,
        "clips/riding a bike/a.mp4",
        "clips/riding a bike/b.x.webm",
        "clips/jump/c/",
        "clips/jump/t.mp4",
    )
    train = ["/mnt/blob/riding_a_bike/a.avi 0", "RidingABike/b.x.mp4 0", "c 1"]
    lists(tmp_path, train, ["./clips/jump/t 1"], ["riding a bike", "jump"])
    data = load_data(str(tmp_path))
    assert pairs(data.train) == {
        "clips/riding a bike/a.mp4": 0,
        "clips/riding a bike/b.x.webm": 0,
        "clips/jump/c": 1,
    }


def test_a_video_of_the_same_name_elsewhere_does_not_stand_in(tmp_path):
    tree(tmp_path, "s1/1.mp4", "s1/2.mp4", "s1/3.mp4", "s9/t.mp4")
    lists(tmp_path, ["s1/1.mp4 0", "s1/2.mp4 0", "s2/1.mp4 1", "s1/3.mp4 0"], ["s9/t.mp4 1"])
    data = load_data(str(tmp_path))
    assert pairs(data.train) == {"s1/1.mp4": 0, "s1/2.mp4": 0, "s1/3.mp4": 0}
    assert "1 of 4 videos" in data.notes[0] and "s2/1.mp4" in data.notes[0]


def test_paths_that_lead_elsewhere(tmp_path):
    tree(tmp_path, "far/run/a.mp4", "far/walk/b/", "far/walk/t.mp4", "data/run/c.mp4")
    root = tmp_path / "data"
    lists(
        root,
        [f"{tmp_path}/far/run/a.mp4 0", "../far/walk/b 1", f"{root}/run/c.mp4 0"],
        ["../far/walk/t.mp4 1"],
    )
    data = load_data(str(root))
    assert sorted(os.path.realpath(data.train.path(i)) for i in range(3)) == sorted(
        f"{tmp_path}/{name}" for name in ("far/run/a.mp4", "far/walk/b", "data/run/c.mp4")
    )


def test_a_whole_path_is_not_ambiguous(tmp_path):
    tree(tmp_path, "train/run/1.mp4", "test/run/1.mp4", "test/walk/2.mp4")
    lists(tmp_path, [f"{tmp_path}/train/run/1.mp4 0"], ["test/run/1.mp4 0"])
    data = load_data(str(tmp_path))
    assert pairs(data.train) == {"train/run/1.mp4": 0} and pairs(data.test) == {"test/run/1.mp4": 0}


def test_a_shrunk_list_of_frame_folders_is_read(tmp_path):
    tree(tmp_path, "run/a.mp4", "run/b 1.mp4", "walk/t.mp4")
    lists(tmp_path, ["run/a 163 0", "run/b 1,3,0"], ["/mnt/blob/walk/t.avi 1"])
    assert pairs(load_data(str(tmp_path)).train) == {"run/a.mp4": 0, "run/b 1.mp4": 0}


def test_missing_videos_are_reported(tmp_path):
    names = [f"run/{i}.mp4" for i in range(20)]
    tree(tmp_path, *names[:13], "walk/t.mp4")
    os.symlink("nowhere.mp4", tmp_path / "run" / "13.mp4")
    os.mkdir(tmp_path / "run" / "14.mp4")
    lists(tmp_path, [f"{name} 0" for name in names])
    notes = load_data(str(tmp_path)).notes
    assert len(notes) == 1 and "7 of 20 videos" in notes[0] and "train.txt" in notes[0]
    assert "run/17.mp4, ..." in notes[0] and "run/18.mp4" not in notes[0]
    for name in names[8:13]:
        os.remove(tmp_path / name)
    fails("12 of 20", "train.txt", "--root", name=str(tmp_path))


def test_repeated_lines_and_blank_lines_are_noted(tmp_path):
    tree(tmp_path, "run/a.mp4", "run/b.mp4", "walk/t.mp4")
    lists(tmp_path, ["run/a.mp4 0", "", "run/b.mp4 0", "run/a.mp4 0"])
    data = load_data(str(tmp_path))
    assert len(data.train) == 2 and "1 blank lines" in data.notes[0] and "1 repeated" in data.notes[1]


ERRORS = {
    "not an integer": (
        ["run/a.mp4 0", "run/b.mp4 x", "c.mp4 1.5"],
        ["train.txt:2", "run/b.mp4 x", "integer"],
    ),
    "no label": (["a.mp4"], ["train.txt:1", "integer"]),
    "negative": (["a.mp4 0", "b.mp4 -1"], ["train.txt:2", "-1", "0 to 1"]),
    "out of range": (["a.mp4 0", "", "b.mp4 7"], ["train.txt:3", "7", "0 to 1"]),
    "1-based": (["a.mp4 1", "b.mp4 2"], ["train.txt:2", "look 1-based"]),
    "1-based in folders": (["run/a.mp4 1"], ["train.txt:1", "label 1 (walk)", "class 0 (run)"]),
    "another class": (["run/a.mp4 0", "run/b.mp4 1"], ["train.txt:2", "run/b.mp4", "class 0 (run)"]),
    "two labels": (["a.mp4 0", "c.mp4 0", "a.mp4 1"], ["train.txt:3", "train.txt:1", "a.mp4"]),
    "also tested": (["a.mp4 0", "t.mp4 0"], ["train.txt:2", "test.txt:1", "t.mp4"]),
    "address": (["a.mp4 0", "http://host/b.mp4 0"], ["train.txt:2", "http://host/b.mp4", "files on disk"]),
    "ambiguous": (["a.mp4 0", "same 1"], ["train.txt:2", "several", "same"]),
    "empty": ([], ["train.txt", "empty"]),
    "nothing there": (["x.mp4 0", "y.mp4 0"], ["2 of 2", "x.mp4, y.mp4"]),
    "only addresses for av": (
        ["concat:a.mp4|b.mp4 0", "a.txt 0", "a.mp4 0"],
        ["2 of 3", "concat:a.mp4|b.mp4"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_in_lists_name_file_and_line(tmp_path, case):
    train, parts = ERRORS[case]
    tree(
        tmp_path,
        "a.mp4",
        "b.mp4",
        "c.mp4",
        "run/a.mp4",
        "run/b.mp4",
        "x1/same.mp4",
        "x2/same.mp4",
        "t.mp4",
        "a.txt",
    )
    lists(tmp_path, train, ["t.mp4 1"])
    fails(*parts, name=str(tmp_path))


def test_lists_without_class_names(tmp_path):
    tree(tmp_path, "a.mp4", "b.mp4", "c.mp4", "t.mp4")
    lists(tmp_path, ["a.mp4 0", "b.mp4 2", "c.mp4 1"], ["t.mp4 3"], classes=None)
    assert load_data(str(tmp_path)).classes == ("0", "1", "2", "3")
    lists(tmp_path, ["a.mp4 1", "b.mp4 3", "c.mp4 2"], ["t.mp4 3"], classes=None)
    fails("train.txt", "must begin at 0", "classes.txt", name=str(tmp_path))


def numbered(root, labels, classes=None, columns="{}"):
    """A new folder with a list of files that ends in these labels."""
    root = root / str(len(os.listdir(root)))
    tree(root, *(f"{i}.mp4" for i in range(len(labels))), "t.mp4")
    lines = [f"{i}.mp4 {columns.format(y)}" for i, y in enumerate(labels)]
    return str(lists(root, lines, ["t.mp4 0"], classes))


@pytest.mark.parametrize("label", [8, 1672531200, 10**30])
def test_a_label_far_from_all_others_is_refused(tmp_path, label):
    """Three lines and one cannot name the classes between."""
    name = numbered(tmp_path, [0, label, 2])
    fails("train.txt:2", f"label {label}", "4 lines", "classes.txt", name=name)
    fails("train.txt:2", f"label {label}", "0 to 2", name=numbered(tmp_path, [0, label, 2], ["x", "y", "z"]))
    assert load_data(numbered(tmp_path, [0, 6, 2])).classes[-1] == "6"  # four without a video
    name = numbered(tmp_path, [*range(20), label * 100, *range(20)])
    assert "frames" not in fails("train.txt:21", f"label {label * 100}", name=name)


FRAME_COUNTS = np.random.default_rng(0).normal(180, 60, 1000).astype(int).clip(29)


@pytest.mark.parametrize("n", [6, 20, 300, 1000])
@pytest.mark.parametrize("columns", ["{}", "0 {}", "{} 0"])
def test_numbers_of_frames_are_no_labels(tmp_path, n, columns):
    name = numbered(tmp_path, FRAME_COUNTS[:n], None, columns)
    fails("train.txt", "look like numbers of frames", name=name)
    name = numbered(tmp_path, FRAME_COUNTS[:n], ["x", "y"], columns)
    fails("train.txt:1", f"label {FRAME_COUNTS[0]}", "look like numbers of frames", name=name)


@pytest.mark.parametrize(
    "labels", [range(30), [*range(0, 30, 2)] * 4, [*range(12)], np.arange(400) % 101, [0, 3, 8, 9, 10]]
)
def test_labels_are_no_numbers_of_frames(tmp_path, labels):
    assert len(load_data(numbered(tmp_path, labels)).classes) == max(labels) + 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_lists_in_utf_16_are_told(tmp_path, encoding):
    tree(tmp_path, "a.mp4", "t.mp4")
    lists(tmp_path, ["a.mp4 0"], ["t.mp4 1"])
    for name in ("train.txt", "classes.txt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.decode().encode(encoding))
        fails(tmp_path / name, "UTF-16", "save it as UTF-8", name=str(tmp_path))
        (tmp_path / name).write_bytes(content)
    few = tmp_path / "few.txt"
    few.write_bytes("a.mp4 0\n".encode(encoding))
    fails(few, "save it as UTF-8", call=labelled_subset, data=load_data(str(tmp_path)), listfile=few)
    cvdf(tmp_path, TRAIN, VAL)
    path = tmp_path / "annotations/train.csv"
    path.write_bytes(path.read_text().encode(encoding))
    os.remove(tmp_path / "train.txt")
    fails(path, "save it as UTF-8", name="k400", root=str(tmp_path))


def test_names_in_two_unicode_forms_are_the_same(tmp_path):
    """Made on a Mac, which decomposes them, and listed elsewhere; or the other way."""
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        root = tmp_path / form

        def a(text, form=form):
            return unicodedata.normalize(form, text)

        def b(text, other=other):
            return unicodedata.normalize(other, text)

        tree(root, a("train/café/é.mp4"), a("train/run/b.mp4"), b("train/café/c.mp4"), b("test/café/d.mp4"))
        data = load_data(str(root))
        assert data.classes == (unicodedata.normalize("NFC", "café"), "run")
        assert list(pairs(data.train).values()).count(0) == 2 and list(pairs(data.test).values()) == [0]
        assert all(os.path.exists(data.train.path(i)) for i in range(3))
        few = text(tmp_path / "few.txt", b("train/café/é.mp4"), a("c"))
        assert [data.train.labels[i] for i in labelled_subset(data, listfile=few)] == [0, 0]
        far = tmp_path / a("weit wég")
        tree(far, a("é.mp4"))
        lines = [f"{b(str(far / 'é.mp4'))} 0", f"{root}/{b('train/café/é.mp4')} 0", "train/run/b.mp4 1"]
        lists(root, lines, [b("test/café/d.mp4") + " 0"], [b("café"), "run"])
        data = load_data(str(root))
        assert data.classes == (unicodedata.normalize("NFC", "café"), "run") and not data.notes
        assert len(data.train) == 3 and all(os.path.exists(data.train.path(i)) for i in range(3))
        text(root / "classes.txt", a("café"), b("café"))
        fails("classes.txt", "is there twice", name=str(root))


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


def test_class_names_may_be_numbered(tmp_path):
    tree(tmp_path, "a.mp4", "t.mp4")
    for names in (
        ["1 x y", "2 z"],
        ["0: x y", "1: z"],
        ["0,x y", "1,z"],
        ["x y\r", "z\r"],
        ["\ufeffx y", "z"],
    ):
        lists(tmp_path, ["a.mp4 0"], ["t.mp4 1"], names)
        assert load_data(str(tmp_path)).classes == ("x y", "z")
    lists(tmp_path, ["a.mp4 0"], ["t.mp4 1"], ["3 point shot", "2 step"])
    assert load_data(str(tmp_path)).classes == ("3 point shot", "2 step")
    lists(tmp_path, ["a.mp4 0"], ["t.mp4 1"], ["x", "x"])
    fails("classes.txt", "x is there twice", name=str(tmp_path))


def test_validation_lists_serve_as_test_and_test_goes_first(tmp_path):
    tree(tmp_path, "a.mp4", "v.mp4", "t.mp4")
    text(tmp_path / "train.csv", "a.mp4,0")
    text(tmp_path / "my_val_list_videos.txt", "v.mp4 1")
    assert pairs(load_data(str(tmp_path)).test) == {"v.mp4": 1}
    text(tmp_path / "test.txt", "t.mp4 1")
    text(tmp_path / "train_log.txt", "not a list")
    text(tmp_path / "train_1_percent_labeled_videos.txt", "v.mp4 1")
    assert pairs(load_data(str(tmp_path)).test) == {"t.mp4": 1}
    assert pairs(load_data(str(tmp_path)).train) == {"a.mp4": 0}


def test_class_folders(tmp_path):
    tree(
        tmp_path,
        "train/walk/a.mp4",
        "train/run/b.avi",
        "train/run/c/",
        "val/run/d.mp4",
        "train/run/notes.txt",
        "train/run/.hidden.mp4",
    )
    data = load_data(str(tmp_path))
    assert data.classes == ("run", "walk") and pairs(data.test) == {"val/run/d.mp4": 0}
    assert pairs(data.train) == {"train/run/b.avi": 0, "train/run/c": 0, "train/walk/a.mp4": 1}
    text(tmp_path / "classes.txt", "walk", "run")
    assert pairs(load_data(str(tmp_path)).test) == {"val/run/d.mp4": 1}
    tree(tmp_path, "val/swim/x.mp4")
    fails(tmp_path / "val", "swim", name=str(tmp_path))


SUFFIXES = ".MTS .m2ts .m2v .mpe .vob .asf .3g2 .f4v .gif .y4m .h264 .mxf .ogm .divx .dv .ogv".split()


def test_videos_of_all_suffixes_are_read_and_other_files_counted(tmp_path):
    """What may be meant as a video and is none makes a note: other files, and folders too far down."""
    tree(tmp_path, *(f"train/run/a{suffix}" for suffix in SUFFIXES), "test/run/t.mp4")
    data = load_data(str(tmp_path))
    assert set(pairs(data.train)) == {f"train/run/a{suffix}" for suffix in SUFFIXES} and not data.notes
    tree(tmp_path, "train/run/x.xyz", "train/run/y.XYZ", "test/run/z.part", "README", "train/run/.z.xyz")
    deep = "train/run/1/2/3/4"
    tree(tmp_path, f"{deep}/seen.mp4", "train/run/1/2/3/5/", f"{deep}/5/lost.mp4", f"{deep}/6/", "notes.txt")
    data = load_data(str(tmp_path))
    assert {f"{deep}/seen.mp4", "train/run/1/2/3/5"} < set(pairs(data.train))
    assert len(data.train) == len(SUFFIXES) + 2 and len(data.notes) == 2
    assert data.notes[0].endswith("4 files that are not videos: 1 .part, 2 .xyz, 1 README")
    assert data.notes[1].endswith(f"2 folders more than 6 levels down: {deep}/5, {deep}/6")
    for path in (tmp_path / "train").rglob("a.*"):
        os.rename(path, f"{path}.xyz")
    os.remove(tmp_path / "test/run/t.mp4")
    os.rename(tmp_path / "train/run/1", tmp_path / "train/run/.1")
    fails("no videos", "18 .xyz", name=str(tmp_path))


def loose(root, *names):
    """What load finds of these and of a test video, and its notes."""
    tree(root, *names, "test/run/t.mp4")
    data = load_data(str(root))
    return set(pairs(data.train)), data.notes


def test_loose_pictures_do_not_hide_clips(tmp_path):
    found, notes = loose(
        tmp_path,
        "train/run/s1/clip1/",
        "train/run/s1/clip2/",
        "train/run/s1/thumb_1.jpg",
        "train/run/s2/a.mp4",
        "train/run/s2/thumb_1.jpg",
        "train/run/s2/thumb_2.PNG",
        "train/run/cover_1.jpg",
    )
    assert found == {"train/run/s1/clip1", "train/run/s1/clip2", "train/run/s2/a.mp4"}
    assert len(notes) == 1 and "4 pictures in train/run, train/run/s1, train/run/s2" in notes[0]


@pytest.mark.parametrize("other", ["last_00004.jpg", "cover.jpg", "n_frames", "a.mp4", "sub/a.mp4", "x.wav"])
def test_a_video_of_pictures_is_one_series_alone(tmp_path, other):
    found, notes = loose(tmp_path, "train/run/b.mp4", "train/run/c/", f"train/run/c/{other}")
    assert found == {"train/run/b.mp4"} | ({f"train/run/c/{other}"} if "mp4" in other else set())
    count = 4 if other.endswith("jpg") else 3
    assert f"{count} pictures in train/run/c;" in " ".join(notes)


def test_what_does_not_disturb_a_series(tmp_path):
    for other in ("._img_00001.jpg", ".DS_Store", "Thumbs.db", "flow_x_00001.jpg", "img_4.PNG"):
        found = loose(tmp_path / other, "train/run/c/", f"train/run/c/{other}")
        assert found == ({"train/run/c"}, ()), other
    names = ["train/run/flow/flow_x_1.jpg", "train/run/flow/flow_y_1.jpg", "train/run/flower/flower_1.jpg"]
    assert loose(tmp_path / "flow", *names) == ({"train/run/flow", "train/run/flower"}, ())
    names = [f"train/run/t/frame{i:04d}_t{i / 25:.2f}s_640x480.png" for i in range(30)]
    assert loose(tmp_path / "t", *names) == ({"train/run/t"}, ())


def test_a_folder_of_100_000_pictures_is_scanned_fast(monkeypatch):
    """No picture is looked at: only the names are."""

    class Entry:
        def __init__(self, name):
            self.name = name

        def is_dir(self):
            return self.name == "clip"

    class Folder(list):
        __enter__, __exit__ = list.__iter__, lambda *_: None

    names = [f"img_{i:06d}.jpg" for i in np.random.default_rng(0).permutation(100_000)]
    folders = {"root": Folder([Entry("clip")]), "root/clip": Folder(map(Entry, names))}
    monkeypatch.setattr(os, "scandir", lambda path: folders[os.path.normpath(path)])
    started = time.process_time()
    assert _scan("root") == ["clip"]
    assert time.process_time() - started < 1


def test_folders_without_data(tmp_path):
    fails("no/such", "ucf101", name="no/such")
    fails("no videos", tmp_path, "train.txt", name=str(tmp_path))
    tree(tmp_path, "a.mp4")
    fails("neither a list nor class folders of the train part", "train/<class>/", name=str(tmp_path))
    tree(tmp_path, "train/a.mp4")
    fails("no class folder", tmp_path / "train", name=str(tmp_path))
    tree(tmp_path / "b", "train/run/a.mp4")
    fails("test part", tmp_path / "b", name=str(tmp_path / "b"))
    fails("--split 2", "only split 1", name=str(tmp_path), split=2)


UNLABELLED = {  # files; the videos that count
    "flat": (["b.mp4", "a.mp4", "c/"], ["a.mp4", "b.mp4", "c"]),
    "nested": (["2019/x/a.mp4", "b.mp4", "deep/a.mp4"], ["2019/x/a.mp4", "b.mp4", "deep/a.mp4"]),
    "train": (["train/b.mp4", "train/a.mp4", "test/c.mp4"], ["train/a.mp4", "train/b.mp4"]),
    "classes": (["train/run/a.mp4", "train/walk/b.mp4", "val/run/c.mp4"],
                ["train/run/a.mp4", "train/walk/b.mp4"]),
    "unlabelled": (["train/run/a.mp4", "unlabelled/b.mp4"], ["unlabelled/b.mp4"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLABELLED)
def test_folders_without_labels(name, tmp_path):
    files, expected = UNLABELLED[name]
    tree(tmp_path, *files)
    data = load_data(str(tmp_path), labels=False)
    assert pairs(data.train) == dict.fromkeys(expected, -1) and data.train.path(0).startswith(f"{tmp_path}/")
    assert (len(data.test), data.classes, data.multilabel) == (0, (), False)
    if name != "classes":
        with pytest.raises(UserError):
            load_data(str(tmp_path))


def test_lists_without_labels(tmp_path):
    """Only paths, or some labels; unlabelled.txt before train.txt, and a list before a folder."""
    tree(tmp_path, *(f"v/{k}.mp4" for k in range(5)), "train/x.mp4", "unlabelled/y.mp4")
    text(tmp_path / "train.txt", "v/0.mp4", "v/1.mp4 7", "v/2.avi 1 2", "v/9.mp4", "v/1.mp4 7")
    (tmp_path / "unlabelled" / "y.mp4").unlink()
    data = load_data(str(tmp_path), labels=False)
    assert pairs(data.train) == {"v/0.mp4": -1, "v/1.mp4": 7, "v/2.mp4": -1} and "v/9.mp4" in data.notes[0]
    text(tmp_path / "unlabelled.txt", "v/4.mp4", "v/3.mp4")
    assert pairs(load_data(str(tmp_path), labels=False).train) == {"v/4.mp4": -1, "v/3.mp4": -1}
    text(tmp_path / "unlabelled.txt", "w/8.mp4", "w/9.mp4")
    fails("2 of 2 videos", tmp_path / "unlabelled.txt", name=str(tmp_path), labels=False)


def test_videos_without_labels_are_chosen_by_a_list(tmp_path):
    tree(tmp_path / "d", "a.mp4", "b.mp4", "c.mp4")
    chosen = text(tmp_path / "list.txt", "c.mp4 3", "a.mp4")
    assert labelled_subset(load_data(str(tmp_path / "d"), labels=False), listfile=chosen).tolist() == [0, 2]


def test_a_folder_without_videos(tmp_path):
    fails("no videos", "unlabelled.txt or train.txt", name=str(tmp_path), labels=False)


def test_a_known_data_set_has_its_labels_anyway(tmp_path):
    tree(tmp_path, "train/abseiling/abcdefghijk.mp4", "val/zumba/abcdefghij2.mp4")
    assert pairs(load_data("k400", str(tmp_path), labels=False).train) == {
        "train/abseiling/abcdefghijk.mp4": 0
    }


def test_unreadable_folder(tmp_path, monkeypatch):
    tree(tmp_path, "train/run/a.mp4")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("run"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    fails("train/run", "Permission denied", name=str(tmp_path))


# ---- Kinetics-400 ----------------------------------------------------------------------------------

SKI = "skiing (not slalom or crosscountry)"
KINETICS = ["abseiling", "massaging person's head", SKI, "skiing crosscountry", "zumba"]
LABELS = [0, 196, 308, 309, 399]
SPELLINGS = {
    "blanks": lambda name: name,
    "underscores": lambda name: name.replace(" ", "_"),
    "stripped": lambda name: name.replace(" ", "_").replace("'", "").replace("(", "").replace(")", ""),
    "squeezed": lambda name: name.replace(" ", "").replace('"', ""),
}


@pytest.mark.parametrize("folders", ["{}", "videos_{}", "videos/{}"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_k400_class_folders_in_all_spellings(tmp_path, spelling, folders):
    for part in ("train", "val"):
        for k, name in enumerate(KINETICS):
            folder = f"{folders.format(part)}/{SPELLINGS[spelling](name)}"
            tree(tmp_path, f"{folder}/{part[0]}-2_4567890{k}_000010_000020.mp4")
    data = load_data("k400", str(tmp_path))
    assert len(data.classes) == 400 and [data.classes[k] for k in LABELS] == KINETICS
    assert sorted(data.train.labels) == sorted(data.test.labels) == LABELS
    for videos in (data.train, data.test):
        for name, k in pairs(videos).items():
            assert SPELLINGS[spelling](data.classes[k]) == name.split("/")[-2]


def test_k400_links_as_arrange_by_classes_makes_them(tmp_path):
    tree(tmp_path, "flat/abcdefghijk_000001_000011.mp4", "videos/val/zumba/abcdefghij2_000001_000011.mp4")
    os.makedirs(tmp_path / "videos/train/zumba")
    os.symlink(
        tmp_path / "flat/abcdefghijk_000001_000011.mp4", tmp_path / "videos/train/zumba/abcdefghijk.mp4"
    )
    os.symlink(tmp_path / "gone.mp4", tmp_path / "videos/train/zumba/gone.mp4")
    assert pairs(load_data("k400", str(tmp_path)).train) == {"videos/train/zumba/abcdefghijk.mp4": 399}


def cvdf(root, train, val, split_name="{}"):
    for part, rows in (("train", train), ("val", val)):
        path = root / "annotations" / f"{split_name.format(part)}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow("label youtube_id time_start time_end split is_cc".split())
            writer.writerows([*row, part, 0] for row in rows)
    return root


TRAIN = [
    (SKI, "-_3456789ab", 1989, 1999),
    ("abseiling", "-_3456789ac", "1.0", "11.0"),
    ("zumba", "xxxxxxxxxx1", 0, 10),
]
VAL = [("massaging person's head", "xxxxxxxxxx2", 5, 15)]


@pytest.mark.parametrize("lists_called", ["{}", "kinetics_{}", "kinetics-400_{}"])
def test_k400_flat_with_csv(tmp_path, lists_called):
    cvdf(tmp_path, TRAIN, VAL, lists_called)
    tree(
        tmp_path,
        "train/-_3456789ab_001989_001999.mp4",
        "train/-_3456789ac_000001_000011.mp4",
        "train/xxxxxxxxxx1.mp4",
        "val/xxxxxxxxxx2_000005_000015.mp4",
        "val/not_in_the_csv.mp4",
    )
    data = load_data("k400", str(tmp_path))
    assert pairs(data.train) == {
        "train/-_3456789ab_001989_001999.mp4": 308,
        "train/-_3456789ac_000001_000011.mp4": 0,
        "train/xxxxxxxxxx1.mp4": 399,
    }
    assert pairs(data.test) == {"val/xxxxxxxxxx2_000005_000015.mp4": 196} and not data.notes
    os.remove(tmp_path / "train/xxxxxxxxxx1.mp4")
    tree(tmp_path, "train/xxxxxxxxxx1_000010_000020.mp4")  # another part of the same video
    data = load_data("k400", str(tmp_path))
    assert len(data.train) == 2 and "1 of 3" in data.notes[0] and "xxxxxxxxxx1_000000_000010" in data.notes[0]


def test_k400_csv_without_rows(tmp_path):
    tree(cvdf(tmp_path, TRAIN, []), "train/xxxxxxxxxx1.mp4")
    fails("no videos are listed for the test part", "annotations/train.csv", name="k400", root=str(tmp_path))


def test_k400_replacements_go_first(tmp_path):
    cvdf(tmp_path, TRAIN, VAL)
    better = "replacement/replacement_for_corrupted_k400/-_3456789ac_000001_000011.mp4"
    tree(
        tmp_path,
        "train/-_3456789ab_001989_001999.mp4",
        "train/-_3456789ac_000001_000011.mp4",
        "train/xxxxxxxxxx1.mp4",
        "val/xxxxxxxxxx2_000005_000015.mp4",
        better,
    )
    assert pairs(load_data("k400", str(tmp_path)).train)[better] == 0


def test_k400_csv_over_class_folders_of_the_wrong_class(tmp_path):
    cvdf(tmp_path, TRAIN[:1], VAL)
    tree(
        tmp_path,
        "train/skiing_crosscountry/-_3456789ab_001989_001999.mp4",
        "val/xxxxxxxxxx2_000005_000015.mp4",
    )
    fails("train.csv:2", "308", "309 (skiing crosscountry)", name="k400", root=str(tmp_path))


def test_k400_lists_of_mmaction_with_frames_beside_videos(tmp_path):
    tree(tmp_path, "videos_train/zumba/a.mp4", "rawframes_train/zumba/a/", "videos_val/abseiling/b.mp4")
    text(tmp_path / "kinetics400_train_list_videos.txt", "zumba/a.mp4 399")
    text(tmp_path / "kinetics400_train_list_rawframes.txt", "zumba/a 300 399")
    text(tmp_path / "kinetics400_val_list_videos.txt", "abseiling/b.mp4 0")
    data = load_data("k400", str(tmp_path))
    assert pairs(data.train) == {"videos_train/zumba/a.mp4": 399} and len(data.test) == 1
    text(tmp_path / "kinetics400_train_list_videos.txt", "zumba/a.mp4 398")
    fails("list_videos.txt:1", "398", "399 (zumba)", name="k400", root=str(tmp_path))


def test_k400_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(
        "data/k400",
        "--root",
        "annotations/train.csv",
        "videos_train/",
        "kinetics400_train_list_videos.txt",
        name="k400",
    )
    fails("no videos", "videos_train/", name="k400", root=str(tmp_path))
    tree(tmp_path, "train/a.mp4", "val/b.mp4")
    fails("class folder", "annotations/train.csv", name="k400", root=str(tmp_path))
    tree(tmp_path / "b", "train/dancing on the moon/a.mp4", "val/zumba/b.mp4")
    fails("dancing on the moon", "abseiling", name="k400", root=str(tmp_path / "b"))
    fails("--split 2", "only split 1", name="k400", root=str(tmp_path), split=2)


# ---- UCF-101, HMDB-51 ------------------------------------------------------------------------------


def ucf101(
    root, train, test, classes=("Hammering", "HammerThrow", "HandstandPushups"), lists="ucfTrainTestlist"
):
    text(root / lists / "classInd.txt", *(f"{k} {name}\r" for k, name in enumerate(classes, 1)))
    for split in (1, 2, 3):
        text(root / lists / f"trainlist0{split}.txt", *train)
        text(root / lists / f"testlist0{split}.txt", *test)
    return root


UCF_TRAIN = [
    "Hammering/v_Hammering_g08_c01.avi 1",
    "HammerThrow/v_HammerThrow_g25_c02.avi 2",
    "HandstandPushups/v_HandStandPushups_g09_c03.avi 3",
]
UCF_TEST = ["Hammering/v_Hammering_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c03.avi"]
UCF = [line.split()[0] for line in UCF_TRAIN + UCF_TEST]


@pytest.mark.parametrize("lists", ["ucfTrainTestlist", "annotations", ""])
@pytest.mark.parametrize("form", ["UCF-101/{}.avi", "videos/{}.mp4", "rawframes/{}/", "{}.avi"])
def test_ucf101(tmp_path, lists, form):
    tree(tmp_path, *(form.format(name[:-4]) for name in UCF))
    data = load_data("ucf101", str(ucf101(tmp_path, UCF_TRAIN, UCF_TEST, lists=lists)), split=2)
    assert data.classes == ("Hammering", "HammerThrow", "HandstandPushups")
    assert data.train.labels.tolist() == [0, 1, 2] and data.test.labels.tolist() == [0, 2]
    assert data.train.groups.tolist() == [8, 125, 209] and data.split == 2 and not data.notes
    assert data.train.name(0).startswith("Hammering/v_Hammering_g08_c01")
    assert all(os.path.exists(data.train.path(i)) for i in range(3))


def test_ucf101_errors(tmp_path):
    ucf101(tmp_path, UCF_TRAIN, UCF_TEST)
    fails("no videos", "UCF-101/<class>/", name="ucf101", root=str(tmp_path))
    tree(tmp_path, *(f"UCF-101/{name}" for name in UCF))
    fails("--split 4", "1, 2 and 3", name="ucf101", root=str(tmp_path), split=4)
    ucf101(tmp_path, [UCF_TRAIN[0], UCF_TRAIN[1][:-1] + "1", UCF_TRAIN[2]], UCF_TEST)
    fails("trainlist01.txt:2", "HammerThrow", name="ucf101", root=str(tmp_path))
    ucf101(tmp_path, UCF_TRAIN, [*UCF_TEST, UCF[0]])
    fails("trainlist01.txt:1", "testlist01.txt:3", name="ucf101", root=str(tmp_path))
    os.remove(tmp_path / "ucfTrainTestlist/classInd.txt")
    fails("no classInd.txt", tmp_path, "ucfTrainTestlist/", name="ucf101", root=str(tmp_path))


def test_ucf101_lists_of_mmaction(tmp_path):
    tree(tmp_path, *(f"videos/{name}" for name in UCF))
    text(tmp_path / "annotations/classInd.txt", "1 Hammering", "2 HammerThrow", "3 HandstandPushups")
    text(
        tmp_path / "annotations/ucf101_train_split_1_videos.txt",
        *(f"{name} {k}" for k, name in enumerate(UCF[:3])),
    )
    text(tmp_path / "annotations/ucf101_val_split_1_videos.txt", f"{UCF[3]} 0", f"{UCF[4]} 2")
    data = load_data("ucf101", str(tmp_path))
    assert data.train.labels.tolist() == [0, 1, 2] and data.test.labels.tolist() == [0, 2]


def hmdb51(root, split=1):
    files = {
        "chew": ["#2_Gum_chew_h_nm_0.avi 1 ", "x[1](2)&;+~@!.avi 0 ", "c.avi 2 "],
        "swing_baseball": ["c.avi 1", "d.avi 2"],
    }
    for name, lines in files.items():
        text(root / "testTrainMulti_7030_splits" / f"{name}_test_split{split}.txt", *lines)
        tree(root, *(f"hmdb51_org/{name}/{line.split()[0]}" for line in lines))
    return root


def test_hmdb51(tmp_path):
    root = str(hmdb51(hmdb51(tmp_path), split=3))
    data = load_data("hmdb51", root, split=3)
    assert data.classes == ("chew", "swing_baseball") and "2 classes, not of 51" in data.notes[0]
    assert pairs(data.train) == {"chew/#2_Gum_chew_h_nm_0.avi": 0, "swing_baseball/c.avi": 1}
    assert pairs(data.test) == {"chew/c.avi": 0, "swing_baseball/d.avi": 1}
    assert "chew/x[1](2)&;+~@!.avi" in pairs(load_data("hmdb51:all", root).train)
    fails("_test_split2.txt", "testTrainMulti_7030_splits", name="hmdb51", root=root, split=2)
    text(tmp_path / "testTrainMulti_7030_splits/chew_test_split1.txt", "c.avi 1", "d.avi 3")
    fails("chew_test_split1.txt:2", "0, 1 or 2", name="hmdb51", root=root)


# ---- Something-Something, Charades, ActivityNet ----------------------------------------------------


@pytest.mark.parametrize(
    "names",
    ["labels/{}.json", "something-something-v2-{}.json", "annotations/something-something-v2-{}.json"],
)
@pytest.mark.parametrize("form", ["20bn-something-something-v2/{}.webm", "videos/{}.mp4", "rawframes/{}/"])
def test_ssv2(tmp_path, names, form):
    labels = {"Putting something": "1", "Approaching something": "0", "Moving number of things": "10"}
    labels |= {f"z{k}": str(k) for k in range(2, 10)}
    items = [
        ("78687", "Putting [something]"),
        ("7", "Moving [number of] things"),
        ("9", "Approaching [something]"),
    ]
    items = [dict(id=i, label="..", template=template, placeholders=[]) for i, template in items]
    for part, content in (("labels", labels), ("train", items[:2]), ("validation", items[2:])):
        text(tmp_path / names.format(part), json.dumps(content))
    tree(tmp_path, *(form.format(i) for i in ("78687", "7", "9")))
    data = load_data("ssv2", str(tmp_path))
    assert data.classes[0] == "Approaching something" and data.classes[10] == "Moving number of things"
    assert sorted(data.train.labels) == [1, 10] and data.test.labels.tolist() == [0] and not data.flip
    items[0]["template"] = "Eating [something]"
    text(tmp_path / names.format("train"), json.dumps(items[:2]))
    fails("train.json", "78687", "Eating something", name="ssv2", root=str(tmp_path))
    text(tmp_path / names.format("train"), '[{"id": "7"')
    fails("annotations", tmp_path, name="ssv2", root=str(tmp_path))


@pytest.mark.parametrize("form", ["Charades_v1_480/{}.mp4", "Charades_v1/{}.mp4", "Charades_v1_rgb/{}/"])
def test_charades(tmp_path, form):
    head = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
    row = '{},S,Kitchen,6,7,Yes,"A person, ""says""\nhello.",a;b,"x, y",{},24.83'
    text(
        tmp_path / "Charades_v1_train.csv",
        head,
        row.format("AAAA1", "c156 11.90 21.20;c147 0.00 12.60;c147 20.0 99.9"),
        row.format("BBBB2", ""),
    )
    text(tmp_path / "Charades_v1_test.csv", head, row.format("CCCC3", "c000 0.0 1.0"))
    text(tmp_path / "Charades_v1_classes.txt", *(f"c{k:03d} Doing thing {k}" for k in range(157)))
    tree(tmp_path, *(form.format(i) for i in ("AAAA1", "BBBB2", "CCCC3")))
    data = load_data("charades", str(tmp_path))
    assert data.multilabel and data.train.labels.shape == (2, 157) and data.classes[147] == "Doing thing 147"
    assert sorted(pairs(data.train).values()) == [(), (147, 156)] and list(pairs(data.test).values()) == [
        (0,)
    ]
    text(tmp_path / "Charades_v1_test.csv", head, row.format("CCCC3", "opening a door"))
    fails("Charades_v1_test.csv:3", "opening a door", name="charades", root=str(tmp_path))
    text(tmp_path / "Charades_v1_test.csv", "id,label", "CCCC3,5")
    fails("Charades_v1_test.csv:2", "actions", name="charades", root=str(tmp_path))


def activitynet(root):
    def video(subset, duration, *actions):
        return dict(
            subset=subset, duration=duration, annotations=[dict(segment=s, label=y) for s, y in actions]
        )

    database = {
        "abc-_345678": video(
            "training",
            100.0,
            ([10.5, 20], "Making a sandwich"),
            ([90, 120.0], "Arm wrestling"),
            ([30, 30.01], "Arm wrestling"),
            ([101, 102], "Arm wrestling"),
            ([10.5, 20], "Arm wrestling"),
        ),
        "v_defghijkl": video("training", 50.0, ([-1, 5], "Applying sunscreen")),
        "00000000001": video("validation", 10.0, ([0, 10], "Arm wrestling")),
        "00000000002": video("testing", 10.0),
    }
    text(
        root / "activity_net.v1-3.min.json",
        json.dumps(dict(version="VERSION 1.3", taxonomy=[], database=database)),
    )
    return tree(root, "videos/v_abc-_345678.mp4", "videos/v_defghijkl.mkv", "videos/v_00000000001.webm")


def test_activitynet(tmp_path):
    root = str(activitynet(tmp_path))
    data = load_data("activitynet", root)
    assert (
        data.classes == ("Applying sunscreen", "Arm wrestling", "Making a sandwich") and not data.multilabel
    )
    rows = {
        (data.train.name(i), data.train.span(i), int(data.train.labels[i])) for i in range(len(data.train))
    }
    assert rows == {
        ("v_abc-_345678.mp4", (10.5, 20.0), 2),
        ("v_abc-_345678.mp4", (90.0, 100.0), 1),
        ("v_defghijkl.mkv", (0.0, 5.0), 0),
    }
    assert "2 empty segments" in data.notes[0] and data.test.span(0) == (0.0, 10.0)
    whole = load_data("activitynet:whole", root)
    assert (
        pairs(whole.train) == {"v_abc-_345678.mp4": 2, "v_defghijkl.mkv": 0} and whole.train.span(0) is None
    )
    text(tmp_path / "few.txt", "v_abc-_345678")
    assert len(labelled_subset(data, listfile=tmp_path / "few.txt")) == 2
    text(tmp_path / "few.txt", "v_abc-_345678.avi 1")
    assert data.train.labels[labelled_subset(data, listfile=tmp_path / "few.txt")].tolist() == [1]


def test_toy_is_made_and_read(tmp_path, monkeypatch):
    from common.io import toy

    def make(root, variant):
        assert (root, variant) == (os.path.join("data", "toy_b"), "b")
        tree(root, "train/a.mp4", "test/b.mp4")
        lists(Path(root), ["train/a.mp4 0"], ["test/b.mp4 1"], ["left", "right"])

    monkeypatch.setattr(toy, "make", make)
    monkeypatch.chdir(tmp_path)
    data = load_data("toy:b")
    assert data.name == "toy:b" and data.classes == ("left", "right") and not data.flip
    assert data.train.path(0) == os.path.join("data", "toy_b", "train/a.mp4")


# ---- labelled subsets ------------------------------------------------------------------------------


def some(name="things", sizes=(5, 30, 100), split=1, suffix=".mp4"):
    names = [f"c{k}/{i:04d}{suffix}" for k, size in enumerate(sizes) for i in range(size)]
    train = Videos.make("root", names, np.repeat(np.arange(len(sizes)), sizes))
    return Data(
        name, split, tuple(f"c{k}" for k in range(len(sizes))), train, train.subset([]), False, True, ()
    )


def counts(data, indices):
    return np.bincount(data.train.labels[indices], minlength=len(data.classes)).tolist()


def test_ratio_is_balanced():
    data = some()
    few = labelled_subset(data, ratio=0.1)
    assert (
        few.dtype == np.int64 and (np.diff(few) > 0).all() and counts(data, few) == [5, 5, 5]
    )  # ceil(0.1 x 45)
    assert counts(some(sizes=(10, 10)), labelled_subset(some(sizes=(10, 10)), ratio=0.3)) == [
        3,
        3,
    ]  # not 4: 0.3 x 10 > 3
    assert counts(data, labelled_subset(data, ratio=1e-6)) == [1, 1, 1]
    assert labelled_subset(data, ratio=1).tolist() == list(range(135))


def test_small_classes_give_all_with_one_warning():
    data = some(sizes=(2, 0, 9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        few = labelled_subset(data, per_class=4)
    assert counts(data, few) == [2, 0, 4] and len(caught) == 1
    assert "2 classes have fewer than 4" in str(caught[0].message) and "c0 (2), c1 (0)" in str(
        caught[0].message
    )


@pytest.mark.parametrize(
    "name, ratio, each", [("k400", 0.01, 6), ("k400", 0.1, 60), ("ucf101", 0.01, 1), ("ucf101", 0.1, 10)]
)
def test_ratios_that_papers_agree_on(name, ratio, each):
    data = some(name, sizes=(700, 690, 72))
    assert counts(data, labelled_subset(data, ratio)) == [each] * 3


def test_the_draw_is_a_function_of_its_arguments():
    def names(data, **options):
        return {stem_of(data.train.name(i)) for i in labelled_subset(data, **options)}

    first = names(some(), per_class=4)
    assert names(some(), per_class=4) == first and names(some(suffix=".avi"), per_class=4) == first
    shuffled = some()
    shuffled = dataclasses.replace(
        shuffled, train=shuffled.train.subset(np.random.default_rng(0).permutation(135))
    )
    assert names(shuffled, per_class=4) == first
    others = [
        names(some(), per_class=4, seed=1),
        names(some("other"), per_class=4),
        names(some(split=2), per_class=4),
    ]
    assert all(other != first for other in others) and others[0] != others[1] != others[2]
    assert digest_of_videos(some().train, labelled_subset(some(), per_class=2)) == (
        "1cb6625bdd66df8997c0bae0a5d264738e4d6eb63c03c981de6c8b9e7bce0474"
    )  # a new version must not draw others


def test_several_labels_draw_videos():
    data = some()
    hot = np.eye(3, dtype=np.uint8)[data.train.labels]
    data = dataclasses.replace(data, multilabel=True, train=dataclasses.replace(data.train, labels=hot))
    assert len(labelled_subset(data, ratio=0.1)) == 14 and len(labelled_subset(data, ratio=1)) == 135
    fails("--ratio", call=labelled_subset, data=data, per_class=3)


@pytest.mark.parametrize(
    "options, part",
    [
        (dict(ratio=0), "(0, 1]"),
        (dict(ratio=-0.1), "(0, 1]"),
        (dict(ratio=10), "(0, 1]"),
        (dict(ratio=float("nan")), "nan"),
        (dict(per_class=0), "--per_class 0"),
        (dict(), "exactly one"),
        (dict(ratio=0.1, per_class=1), "exactly one"),
    ],
)
def test_bad_ratios(options, part):
    fails(part, call=labelled_subset, data=some(), **options)


LINES = {
    "as it is": "c1/0003.mp4 1",
    "no label": "c1/0003.mp4",
    "no suffix": "c1/0003 1",
    "other suffix": "c1/0003.avi 1",
    "frames": "c1/0003 120 1",
    "prefix": "/mnt/blob/things/c1/0003.mp4,1",
    "only no suffix": "c1/0003",
}


@pytest.mark.parametrize("form", LINES)
def test_list_of_labelled_videos(tmp_path, form):
    path = text(tmp_path / "few.txt", "c0/0001.mp4 0", LINES[form])
    data = some()
    assert [data.train.name(i) for i in labelled_subset(data, listfile=path)] == [
        "c0/0001.mp4",
        "c1/0003.mp4",
    ]


def test_list_by_name_alone(tmp_path):
    names = ["a/v_x_g01_c01.avi", "b/v_y_g01_c02.avi", "a/u.avi", "b/u.avi"]
    data = dataclasses.replace(some(sizes=(2, 2)), train=Videos.make("r", names, [0, 1, 0, 1]))
    path = text(tmp_path / "few.txt", "v_y_g01_c02", "v_x_g01_c01.mp4", "v_x_g01_c01.mp4")
    assert labelled_subset(data, listfile=path).tolist() == [0, 1]
    text(path, "v_y_g01_c02", "u.avi")
    fails("few.txt:2", "several", "u.avi", call=labelled_subset, data=data, listfile=path)


def test_bad_lists_of_labelled_videos(tmp_path):
    path, data = tmp_path / "few.txt", some()
    fails("few.txt", "cannot read", call=labelled_subset, data=data, listfile=path)
    text(path, "c0/0001.mp4 0", "c1/0003.mp4 2")
    fails(
        "few.txt:2", "label 2", "has 1", "1 of 2 lines differ", call=labelled_subset, data=data, listfile=path
    )
    text(path, "c0/0001.mp4 1", "c1/0003.mp4 2")
    fails("few.txt:1", "1-based", call=labelled_subset, data=data, listfile=path)
    text(path, "x.mp4 1", "y.mp4 2")
    fails("none of its 2 videos", "c0/0000.mp4", call=labelled_subset, data=data, listfile=path)
    text(path, "x.mp4 1", "c0/0001.mp4 0")
    with pytest.warns(UserWarning, match="1 of 2 videos .* x.mp4"):
        assert labelled_subset(data, listfile=path).tolist() == [1]


# ---- the real lists --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_ucf101(tmp_path_factory):
    root = tmp_path_factory.mktemp("ucf101")
    os.symlink(LISTS / "ucfTrainTestlist", root / "ucfTrainTestlist")
    for part in ("train", "test"):
        names = [line.split()[0] for line in open(LISTS / f"ucfTrainTestlist/{part}list01.txt")]
        tree(root / "UCF-101", *names)
    return str(root)


@shared
@pytest.mark.parametrize("split, train", [(1, 9537), (2, 9586), (3, 9624)])
def test_real_ucf101(real_ucf101, split, train):
    data = load_data("ucf101", real_ucf101, split)
    assert len(data.train) == train and len(data.test) == 13320 - train and not data.notes
    assert data.classes[34:36] == ("Hammering", "HammerThrow") and data.classes[46:48] == (
        "JumpingJack",
        "JumpRope",
    )
    assert data.classes == tuple((LISTS / "label_maps/ucf101/label_map.txt").read_text().split())
    for videos in (data.train, data.test):
        assert all(name.split("/")[0] == data.classes[k] for name, k in pairs(videos).items())
    assert not set(data.train.groups) & set(data.test.groups)
    assert len(np.unique(np.concatenate([data.train.groups, data.test.groups]))) == 101 * 25
    assert len(labelled_subset(data, 0.01)) == 101 and len(labelled_subset(data, 0.1)) == 1010


@shared
@pytest.mark.parametrize("percent, number", [(5, 476), (10, 953), (20, 1907), (50, 4768)])
def test_videossl_ucf101(real_ucf101, percent, number):
    data = load_data("ucf101", real_ucf101)
    path = (
        LISTS
        / f"videossl/ucf101/videossl_splits/ucf101_train_{percent}_percent_labeled_split_1_rawframes.txt"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = labelled_subset(data, listfile=path)
    assert len(few) == number and (counts(data, few)[21] == 0) == (percent == 5)


@shared
def test_lists_in_alphabetical_order_are_told(real_ucf101, tmp_path):
    data = load_data("ucf101", real_ucf101)
    swapped = {"Hammering": 35, "HammerThrow": 34}
    names = [data.train.name(i) for i in np.flatnonzero(np.isin(data.train.labels, (33, 34, 35)))]
    lines = [f"{name} {swapped.get(name.split('/')[0], 33)}" for name in names]
    fails("label 35", "has 34", call=labelled_subset, data=data, listfile=text(tmp_path / "few.txt", *lines))


@shared
def test_real_hmdb51(tmp_path):
    os.symlink(LISTS / "hmdb51_testTrainMulti_7030_splits", tmp_path / "testTrainMulti_7030_splits")
    for path in (tmp_path / "testTrainMulti_7030_splits").glob("*_split1.txt"):
        folder = path.name.removesuffix("_test_split1.txt")
        tree(tmp_path, *(f"hmdb51_org/{folder}/{line.split()[0]}" for line in open(path)))
    root = str(tmp_path)
    for split in (1, 2, 3):
        data = load_data("hmdb51", root, split)
        assert (len(data.train), len(data.test), len(data.classes)) == (3570, 1530, 51) and not data.notes
        assert counts(data, range(3570)) == [70] * 51
    assert data.classes == tuple((LISTS / "label_maps/hmdb51/label_map.txt").read_text().split())
    data = load_data("hmdb51:all", root)
    assert len(data.train) == 5236
    for percent, number, differ in ((40, 2094, 54), (50, 2618, 73), (60, 3141, 65), (100, 5236, 132)):
        name = f"videossl/hmdb51/videossl_splits/hmdb51_train_{percent}_percent_labeled_split_1_rawframes.txt"
        with pytest.warns(
            UserWarning, match=f" {differ} of {number} lines differ, the labels of hmdb51:all count"
        ):
            assert len(labelled_subset(data, listfile=LISTS / name)) == number
    with pytest.warns(UserWarning, match="of 2094 videos"):
        few = labelled_subset(load_data("hmdb51", root), listfile=LISTS / name.replace("100", "40"))
    assert 1300 < len(few) < 1550


@shared
def test_real_k400_lists(tmp_path):
    folder = LISTS / "videossl/kinetics400/videossl_splits"
    lines = (folder / "kinetics400_train_10_percent_labeled_videos.txt").read_text().splitlines()
    text(tmp_path / "kinetics400_train_list_videos.txt", *lines)
    tree(tmp_path, *(f"videos_train/{line.rsplit(' ', 1)[0]}" for line in lines))
    rows = list(csv.DictReader(open(LISTS / "kinetics400/kinetics-400_val.csv")))
    os.makedirs(tmp_path / "annotations")
    os.symlink(LISTS / "kinetics400/kinetics-400_val.csv", tmp_path / "annotations/kinetics-400_val.csv")
    tree(
        tmp_path,
        *(
            f"val/{r['youtube_id']}_{int(r['time_start']):06d}_{int(r['time_end']):06d}.mp4"
            for r in rows[25:]
        ),
    )
    started = time.process_time()
    data = load_data("k400", str(tmp_path))
    assert time.process_time() - started < 10
    assert len(data.train) == 24000 and len(data.test) == len(rows) - 25 and len(data.notes) == 1
    names = [line.rstrip("\n") for line in open(LISTS / "label_maps/kinetics/label_map_k400.txt")]
    assert list(data.classes) == names
    assert (
        counts(data, labelled_subset(data, 0.01)) == [6] * 400
        and counts(data, labelled_subset(data, 0.1)) == [60] * 400
    )
    assert (
        len(labelled_subset(data, listfile=folder / "kinetics400_train_10_percent_labeled_rawframes.txt"))
        == 24000
    )
    labels = {(r["youtube_id"], int(r["time_start"])): names.index(r["label"]) for r in rows}
    for name, k in pairs(data.test).items():
        assert labels[name[4:15], int(name[16:22])] == k


@shared
def test_real_weizmann():
    data = load_data(str(SHARED / "weizmann"))
    assert (data.name, len(data.train), len(data.test), len(data.classes)) == ("weizmann", 60, 30, 10)
    assert counts(data, labelled_subset(data, per_class=2)) == [2] * 10 and not data.notes


@shared
def test_unfitting_root_of_ucf101():
    fails("classInd.txt", "ucfTrainTestlist/", name="ucf101", root=str(SHARED / "ucf101"))


# ---- check and shrink ------------------------------------------------------------------------------


@pytest.fixture
def unnamable(tmp_path, make):
    """A data set whose folder, classes and videos have names that are not UTF-8."""
    root = tmp_path / os.fsdecode(b"set\xff")
    root.mkdir()
    names = [os.fsdecode(b"%d\xfe.mp4" % i) for i in range(6)]
    for i, name in enumerate(names):
        make.write(root / name, frames=8 + i)
    (root / names[1]).write_text("<html>")
    lines = [f"{name} {i % 2}" for i, name in enumerate([*names[:5], os.fsdecode(b"gone\xfd.mp4")])]
    return lists(root, lines, [f"{names[5]} 1"], [os.fsdecode(b"k\xe9"), "l"])


def test_names_that_are_not_utf_8(unnamable, tmp_path, capsys):
    """Paths are bytes to the system: what is printed of them is escaped, what is written is as it was."""
    data, out = load_data(str(unnamable)), tmp_path / os.fsdecode(b"out\xff")
    out.mkdir()
    assert len(labelled_subset(data, per_class=1)) == 2
    clips = train_loader([(Clips(data.train, whole_video, first_number, seed=0), 5)], 0, 1, workers=1)
    (batch,) = next(iter(clips))
    assert {i for i, _ in batch["bad"]} == {1} and len(batch["views"][0]) == 5
    assert tool(["check", str(unnamable), "--out", str(out), "--workers", "0"]) == 1
    said = capsys.readouterr().out
    assert "gone\\xfd.mp4" in said and "5 of 6 videos decode" in said and "out\\xff" in said
    listed = (out / "bad_videos.txt").read_bytes()
    assert listed.startswith(os.fsencode(data.train.path(1)) + b"\t") and listed.count(b"\n") == 1
    small = ["shrink", str(unnamable), "--out", str(out / "small"), "--workers", "0"]
    assert tool(small) == 0 and "5 of 6 videos are in" in capsys.readouterr().out
    assert len(load_data(str(out / "small")).train) == 4
    flow_of = [str(unnamable), "--out", str(out / "flow"), "--short_side", "16"]
    assert flow.main(flow_of) == 0 and "5 made" in capsys.readouterr().out


def whole_video(source, rng):
    return [np.arange(8)]


def first_number(clips):
    return (clips[0][:1],)


@pytest.fixture
def videos(tmp_path, make):
    """A data set of real files: wide, rotated, of variable frame rate, odd, small, pictures, and bad."""
    root = tmp_path / "set"
    for name in ("train/run", "train/walk", "test/run"):
        os.makedirs(root / name)
    make.write(root / "train/run/wide.avi", codec="mpeg4", size=(320, 180), frames=30, gop=250)
    times = np.cumsum(np.random.default_rng(0).integers(5, 200, 40))
    make.write(root / "train/run/variable #1.mp4", times=times, frames=40, bf=2)
    make.write(root / "train/walk/turned.mp4", size=(128, 96), frames=20)
    make.rotate(root / "train/walk/turned.mp4", 90)
    make.write(root / "train/walk/odd.webm", codec="libvpx-vp9", size=(99, 65), frames=10)
    make.write(root / "test/run/a.b.mp4", frames=12)
    os.mkdir(root / "test/run/frames")
    for i in range(9):
        from PIL import Image

        Image.fromarray(make.picture(i)).save(root / f"test/run/frames/img_{i:05d}.png")
    (root / "train/run/broken.mp4").write_bytes(b"<html>404</html>")
    text(root / "classes.txt", "walk", "run")
    return root


GOOD = {
    "train/run/wide.avi": 30,
    "train/run/variable #1.mp4": 40,
    "train/walk/turned.mp4": 20,
    "train/walk/odd.webm": 10,
    "test/run/a.b.mp4": 12,
    "test/run/frames": 9,
}


def test_check_lists_bad_videos_and_deletes_nothing(videos, make, monkeypatch, capsys):
    make.cut(videos / "test/run/a.b.mp4", videos / "test/run/short.mp4", 0.5)
    monkeypatch.chdir(videos.parent)
    assert tool(["check", "set", "--workers", "0"]) == 1
    lines = [line.split("\t") for line in Path("bad_videos.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == ["set/test/run/short.mp4", "set/train/run/broken.mp4"]
    assert all(reason for _, reason in lines) and (videos / "train/run/broken.mp4").exists()
    assert "6 of 8 videos decode" in capsys.readouterr().out
    assert _check_one(str(videos / "train/run/wide.avi")) is None


@pytest.mark.parametrize("wrong, windows", [(34, "33 to 40"), (99, "92 to 99"), (50, None)])
def test_check_compares_what_is_sought_with_one_pass(tmp_path, make, monkeypatch, wrong, windows):
    path, get = make.write(tmp_path / "a.mp4", frames=100), Video.get

    def fails(video, indices, short_side=None):
        return get(video, indices, short_side) * (torch.tensor([*indices]) != wrong).view(-1, 1, 1, 1)

    assert _check_one(path, all_windows=True) is None
    monkeypatch.setattr(Video, "get", fails)
    reason = windows and f"frames {windows} after a seek differ from those of one pass"
    assert _check_one(path) == reason
    assert _check_one(path, all_windows=True).endswith("differ from those of one pass")


def test_check_of_all_windows(videos, capsys, monkeypatch):
    (videos.parent / "list").mkdir()
    command = ["check", str(videos), "--out", str(videos.parent / "list"), "--workers", "0"]
    assert tool(command) == tool([*command, "--all_windows"]) == 1
    first, second = capsys.readouterr().out.split("\n")[-3:-1]
    assert first == second and "6 of 7 videos decode" in first


def test_check_of_nothing(tmp_path, capsys):
    assert tool(["check", "ucf101", "--root", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_shrink(videos, make, tmp_path, capsys):
    out = tmp_path / "small" / "set"
    command = ["shrink", str(videos), "--out", str(out), "--short_side", "90", "--workers", "0"]
    assert tool(command) == 0
    said = capsys.readouterr().out
    assert "6 of 7" in said and "broken.mp4" in (out / "bad_videos.txt").read_text()
    old, new = load_data(str(videos)), load_data(str(out))
    assert new.classes == old.classes == ("walk", "run") and (len(new.train), len(new.test)) == (4, 2)
    good = dataclasses.replace(
        old, train=old.train.subset([i for i in range(5) if old.train.name(i) in GOOD])
    )
    draws = [[stem_of(d.train.name(i)) for i in labelled_subset(d, per_class=1)] for d in (good, new)]
    assert draws[0] == draws[1]  # the same videos keep their labels
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]
    for name, frames in GOOD.items():
        copy = out / (stem_of(name) + ".mp4")
        with Video(videos / name) as a, Video(copy) as b:
            assert len(a) == len(b) == frames and np.abs(a.times - b.times).max() < 1e-4, name
            assert abs(a.fps - b.fps) < 1e-2
            assert b.width % 2 == b.height % 2 == 0 and b.rotation == 0
            assert min(b.width, b.height) == min(90, min(a.width, a.height) // 2 * 2), name
            assert abs(b.width / b.height - a.width / a.height) < 0.03
            pictures = b.get(range(frames))
            turned = np.rot90(pictures.numpy(), int("turned" in name), (2, 3))
            assert [make.number(x) for x in turned] == list(range(frames)), name
            every = np.diff([b._source.pts.index(pts) for pts in b._source.keys])
            assert b.codec == "h264" and (every <= 12).all() and (frames <= 12 or len(every))


def test_shrink_goes_on_where_it_stopped(videos, tmp_path, capsys):
    out = tmp_path / "small"
    command = ["shrink", str(videos), "--out", str(out), "--workers", "1"]
    here = Path(__file__).parents[1]
    started = forks.start(
        [sys.executable, "-m", f"common.tools.{command[0]}", *command[1:]], here, os.environ
    )
    deadline = time.time() + 60
    while not list(out.rglob("*.mp4")) and time.time() < deadline:
        time.sleep(0.01)
    started.kill()
    started.communicate(timeout=60)  # its workers see that it is gone, too
    assert started.returncode == -signal.SIGKILL
    while subprocess.run(["pgrep", "-s", str(started.pid)], capture_output=True).stdout:
        assert time.time() < deadline  # its workers see that it is gone
        time.sleep(0.05)
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert done
    for path in done:
        with Video(path) as video:
            video.get(range(len(video)))
    (next(iter(done)).parent / "x.mp4.1-2.tmp").write_bytes(b"half")
    command[-1] = "0"
    assert tool(command) == 0
    assert len(list(out.rglob("*.mp4"))) == 6 and not list(out.rglob("*.tmp"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert "are done already" in capsys.readouterr().out
    assert tool([*command, "--gop", "5"]) == 2 and "shrink.json" in capsys.readouterr().err


def test_shrink_refuses_to_write_into_its_source(videos, capsys):
    assert tool(["shrink", str(videos), "--out", str(videos / "small")]) == 2
    assert "folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "shrink"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("of another\nkind"), "TypeError: of another"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_no_video_ends_a_command(videos, tmp_path, monkeypatch, capsys, command, error, reason):
    """Whatever it raises, its type and first line are in the list, and the rest goes on."""
    get = Video.get

    def fails(self, *args, **options):
        if self.path.endswith("odd.webm"):
            raise error
        return get(self, *args, **options)

    monkeypatch.setattr(Video, "get", fails)
    out = tmp_path / "out"
    out.mkdir()
    status = tool([command, str(videos), "--out", str(out), "--workers", "0"])
    assert status == (1 if command == "check" else 0) and "5 of 7 videos" in capsys.readouterr().out
    lines = dict(line.split("\t") for line in (out / "bad_videos.txt").read_text().splitlines())
    assert lines.pop(str(videos / "train/walk/odd.webm")) == reason
    assert list(lines) == [str(videos / "train/run/broken.mp4")]


def stamped(path, make, stamps, **options):
    """A video in Matroska whose packets have these time stamps, in milliseconds."""
    source = make.write(f"{path}.avi", len(stamps), "mpeg4", **options)
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target, stamps = new.add_stream_from_template(stream), list(stamps)
        for packet in old.demux(stream):
            if packet.size:
                packet.time_base, packet.stream = Fraction(1, 1000), target
                packet.pts = packet.dts = int(stamps.pop(0))
                new.mux(packet)
    os.remove(source)
    return str(path)


def shrunk(path, target):
    assert _shrink_one((str(path), str(target), dict(short_side=64, gop=12, crf=23))) is None
    with Video(target) as copy:
        return copy.times, copy.fps, copy.get(range(len(copy)))


def test_shrink_of_equal_time_stamps(tmp_path, make):
    """They say nothing of the rate: that of the codec counts."""
    path = stamped(tmp_path / "a.mkv", make, [0] * 130, rate=20)
    times, fps, frames = shrunk(path, tmp_path / "b.mp4")
    with Video(path) as video:
        assert np.allclose(video.times, np.arange(130) / 20) and video.fps == pytest.approx(20)
    assert np.abs(times - np.arange(130) / 20).max() < 1e-4 and fps == pytest.approx(20)
    assert [make.number(x) for x in frames.numpy()] == list(range(130))


def test_shrink_of_many_equal_time_stamps_in_a_row(tmp_path, make):
    stamps = np.r_[40 * np.arange(10), [400] * 200, 2000 + 40 * np.arange(10)]
    path = stamped(tmp_path / "a.mkv", make, stamps)
    times, _, frames = shrunk(path, tmp_path / "b.mp4")
    with Video(path) as video:
        assert (np.diff(times) > 0).all() and np.abs(times - video.times).max() < 200 / 90000 + 1e-4
    assert [make.number(x) for x in frames.numpy()] == list(range(220))


@pytest.mark.parametrize("hours", [1, 6, 7, 12, 27, 400])
def test_shrink_of_a_jump_of_hours(tmp_path, make, hours):
    stamps = 40 * np.arange(40)
    stamps[15:] += 3_600_000 * hours
    times, _, frames = shrunk(stamped(tmp_path / "a.mkv", make, stamps), tmp_path / "b.mp4")
    assert np.abs(times - stamps / 1000).max() < max(1e-4, hours * 3600 / 2e9)
    assert [make.number(x) for x in frames.numpy()] == list(range(40))


def test_shrink_of_a_damaged_file(tmp_path, make, capsys):
    """One packet is lost, and so the frame before it is there twice."""
    root, out = tmp_path / "set", tmp_path / "out"
    for part in ("train", "test"):
        (root / part / "run").mkdir(parents=True)
        path = make.write(root / part / "run/a.avi", 60, "mjpeg", pix_fmt="yuvj420p")
    with av.open(path) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(bytes(packet), b"\xff" * packet.size))
    assert tool(["shrink", str(root), "--out", str(out), "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert f"{path}: damaged frames replaced by a neighbour: 1\n" in text and "2 of 2 videos are in" in text
    with Video(out / "test/run/a.mp4") as video:
        seen = [make.number(x) for x in video.get(range(60)).numpy()]
        assert seen == [19 if i == 20 else i for i in range(60)]


def test_shrink_lists_what_cannot_be_encoded(tmp_path, make, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    (root / "train/run").mkdir(parents=True)
    (root / "test/run").mkdir(parents=True)
    sizes = dict(one=(1, 1), two=(2, 2), three=(3, 3), thin=(64, 1), wide=(16400, 2))
    for name, size in sizes.items():
        make.write(root / f"train/run/{name}.mkv", 4, "ffv1", size, pix_fmt="bgr0")
    long = "x" * 250  # a name that leaves no room for the suffix of a file being written
    make.write(root / f"train/run/{long}.mp4", 4)
    make.write(root / "test/run/a.mp4", 4)
    assert tool(["shrink", str(root), "--out", str(out), "--workers", "0"]) == 0
    assert f"3 of 7 videos are in {out}" in capsys.readouterr().out
    lines = dict(line.split("\t") for line in (out / "bad_videos.txt").read_text().splitlines())
    assert {os.path.basename(path): reason for path, reason in lines.items()} == {
        "one.mkv": "pictures of 1 x 1 pixels are too small to encode",
        "thin.mkv": "pictures of 64 x 1 pixels are too small to encode",
        "wide.mkv": "pictures of 16400 x 2 pixels cannot be encoded: Generic error in an external library",
        f"{long}.mp4": "File name too long",
    }
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(("size", "workers"), [(0, "0"), (3000, "0"), (3000, "1")])
def test_a_full_disk_is_no_bad_video(videos, tmp_path, capsys, size, workers):
    """It shows at the first or a later write, in this process or another, and nothing is listed."""
    out = tmp_path / "small"
    command = ["shrink", str(videos), "--out", str(out), "--workers", "0"]
    assert tool(command) == 0
    (out / "bad_videos.txt").unlink()
    for path in out.rglob("*.mp4"):
        path.unlink()
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # stands for it: no file may be larger
    try:
        status = tool([*command[:-1], workers])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "File too large; when that is mended, run the same command again" in said
    assert not list(out.rglob("*.mp4")) and not list(out.rglob("*.tmp"))
    assert not (out / "bad_videos.txt").exists()
    assert tool(command) == 0 and len(list(out.rglob("*.mp4"))) == 6


def test_a_video_that_kills_its_process_is_reported_and_the_rest_goes_on():
    items = ["1", "2", "__import__('os')._exit(9)", "3", "4", "5"]
    results = list(in_parallel(eval, items, 1, "test"))
    assert len(results) == 6 and dict(results).pop(items[2]) == "the process that decoded it died"
    assert all(result == int(item) for item, result in results if item != items[2])

"""Readers on small trees in the official formats, with their traps, and on the real lists."""

import csv
import json
import os
import unicodedata
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from trees import counts, fails, lists, pairs, text, tree

from common.data import as_list, labelled_subset, load_data
from common.io.decode import Video
from common.io.readers import scan_videos
from common.tools import shrink

SHARED = Path(__file__).parents[2] / "shared" / "data"
LISTS = SHARED / "splits"
shared = pytest.mark.skipif(not LISTS.is_dir(), reason="without the real lists")


# ---- lists -----------------------------------------------------------------------------------------

STRANGE = ["run/with blanks  two.mp4", "run/#2_gum [x](y)!&;+~@'.avi", "run/-minus.mp4", "run/:colon.mp4"]
STRANGE += ["walk/a,b.mkv", "walk/ünï.webm", os.fsdecode(b"walk/\xff\xfe.avi"), "walk/v 12.mp4"]
STRANGE += ["walk/concat:a|b.mp4"]


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "   ", " \t "])
@pytest.mark.parametrize("end", ["\n", "\r\n", "  \n\n"])
def test_lists_of_every_form(tmp_path, separator, end):
    tree(lists(tmp_path, []), *STRANGE, "walk/t.mp4")
    lines = [f"{name}{separator}{int(name.startswith('walk'))}" for name in STRANGE]
    content = "\ufeff" + end.join(lines)  # with a byte order mark, without an end of the last line
    (tmp_path / "train.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    data = load_data(tmp_path)
    assert pairs(data.train) == {name: int(name.startswith("walk")) for name in STRANGE}
    assert pairs(data.test) == {"walk/t.mp4": 1} and data.classes == ("run", "walk")
    assert data.name == tmp_path.name and data.flip and not data.multilabel and data.split == 1
    assert not data.notes and all(os.path.exists(data.train.path(i)) for i in range(len(data.train)))


CASES = {  # files, beside test/run/t.mp4; lines of lists (class 0 is run, 1 is walk); what is read of them
    "frames": (["run/a/", "run/b 1/", "walk/c/"], dict(train=["run/a 163 0", "run/b 1,3,0", "walk/c 1"]),
               dict(train={"run/a": 0, "run/b 1": 0, "walk/c": 1})),
    "shrunk frames": (["run/a.mp4", "run/b 1.mp4"], dict(train=["run/a 163 0", "run/b 1,3,0"]),
                      dict(train={"run/a.mp4": 0, "run/b 1.mp4": 0})),
    "suffix, prefix, spelling": (["x/Run_/a.mp4", "x/Run_/b.x.webm", "x/walk/c/"],
                                 dict(train=["/mnt/blob/run/a.avi 0", "RUN/b.x.mp4 0", "c 1"]),
                                 dict(train={"x/Run_/a.mp4": 0, "x/Run_/b.x.webm": 0, "x/walk/c": 1})),
    "not of the same name": (["s1/1.mp4", "s1/2.mp4"], dict(train=["s1/1.mp4 0", "s1/2.mp4 0", "s2/1.mp4 1"]),
                             dict(train={"s1/1.mp4": 0, "s1/2.mp4": 0}, note="s2/1.mp4")),
    "elsewhere": (["../far/run/a.mp4", "../far/walk/b/"],
                  dict(train=["../far/run/a.mp4 0", "../far/walk/b 1"]),
                  dict(train={"../far/run/a.mp4": 0, "../far/walk/b": 1})),
    "whole path": (["train/run/1.mp4", "test/run/1.mp4"], dict(train=["{root}/train/run/1.mp4 0"]),
                   dict(train={"train/run/1.mp4": 0})),
    "class folder": (["walk/a.mp4", "run/b.mp4"], dict(train=["walk/a.mp4", "run/b.mp4"]),
                     dict(train={"walk/a.mp4": 1, "run/b.mp4": 0})),
    "repeated": (["run/a.mp4", "run/b.mp4"], dict(train=["run/a.mp4 0", "run/b.mp4 0", "run/a.mp4 0"]),
                 dict(train={"run/a.mp4": 0, "run/b.mp4": 0}, note="1 repeated videos of")),
    "several labels": (["a.mp4", "b.mp4", "d/"],
                       dict(train=["a.mp4 1 0", "d 99 1"], unlabelled=["b.mp4"], test=["test/run/t.mp4"]),
                       dict(train={"a.mp4": (0, 1), "d": (1,)}, unlabelled={"b.mp4": ()},
                            test={"test/run/t.mp4": ()})),
    "not all are segments": (["a/", "b/"], dict(train=["a 99 1 0", "b 99 0"]),
                             dict(train={"a": (0, 1), "b": (0,)})),
    "a segment has frames": (["a/"], dict(train=["a 99 0 1"]), dict(train={"a": (0, 1)})),
    "unlabelled folder": (["train/run/a.mp4", "unlabelled/b.mp4", "unlabelled/x/c.mp4"], {},
                          dict(train={"train/run/a.mp4": 0},
                               unlabelled={"unlabelled/b.mp4": -1, "unlabelled/x/c.mp4": -1})),
    "unlabelled list": (["a.mp4", "b.mp4", "c/"], dict(train=["a.mp4 0"], unlabeled=["b.mp4", "c", "a.mp4"]),
                        dict(train={"a.mp4": 0}, unlabelled={"b.mp4": -1, "c": -1}, note="1 repeated")),
    "all that is unlabelled": (["a.mp4", "b.mp4", "unlabelled/d.mp4"], dict(train=["b.mp4", "a.mp4 0"]),
                               dict(train={"a.mp4": 0}, unlabelled={"b.mp4": -1, "unlabelled/d.mp4": -1})),
    "unlabelled, also tested": (["a.mp4", "b.mp4"],
                                dict(train=["a.mp4 0"], unlabelled=["b.mp4 1", "test/run/t.mp4"]),
                                dict(train={"a.mp4": 0}, unlabelled={"b.mp4": -1}, note="1 repeated")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_videos_of_a_list_are_matched_with_those_on_disk(tmp_path, case):
    files, content, expected = CASES[case]
    note = expected.get("note")
    root = tree(tmp_path / "set", *files, "test/run/t.mp4")
    for name, lines in dict(content, classes=["run", "walk"]).items():
        text(root / f"{name}.txt", *(line.format(root=root) for line in lines))
    data = load_data(root)
    for part in ("train", "val", "unlabelled", *{"test"}.intersection(expected)):
        assert pairs(getattr(data, part)) == expected.get(part, {})
    assert all(map(os.path.exists, data.paths()))
    assert note in data.notes[0] if note else not data.notes


SEGMENTS = [("long", 0, 10, 0), ("long", 10, 15, 1), ("long", 25, 15, 1)]


@pytest.mark.parametrize("separator", [" ", ","])
def test_lists_of_segments_of_frame_folders(tmp_path, make, separator):
    """MMAction2's with_offset: folder, start, frames, label. The frames are those, also after shrink."""
    root, out = tree(tmp_path / "set", "long/", "test/"), tmp_path / "out"
    for i in range(43):
        path = root / (f"long/img_{i + 1:05d}.jpg" if i < 40 else f"test/img_{i - 39:05d}.jpg")
        Image.fromarray(make.picture(i)).save(path, quality=95)
    lists(root, [separator.join(map(str, line)) for line in SEGMENTS], ["test 0 3 1"])
    data = load_data(root)
    assert data.train.labels.tolist() == [0, 1, 1] and data.test.labels.tolist() == [1]
    assert f"the lines of {root}/train.txt are read as folder, start, frames, label" in data.notes
    assert shrink.main([str(root), "--out", str(out), "--workers", "0"]) == 0
    for videos in (data.train, load_data(out).train):
        for i, (_, start, frames, _) in enumerate(SEGMENTS):
            with Video(videos.path(i), videos.span(i)) as video:
                numbers = [make.number(x) for x in video.get(range(len(video))).numpy()]
            assert numbers == list(range(start, start + frames)), (videos.path(i), i)
    few = text(tmp_path / "few.txt", *as_list(data.train.subset([2, 0])).splitlines())
    assert few.read_text() == "long 25 15 1\nlong 0 10 0\n"
    assert labelled_subset(data, listfile=few).tolist() == [0, 2]
    text(few, "long 1")
    assert labelled_subset(data, listfile=few).tolist() == [1, 2]  # without start: all that have the label
    text(few, "long 25 15 1", "long 3 4 0")
    with pytest.warns(UserWarning, match="1 of 2 videos .* are not training videos"):
        assert labelled_subset(data, listfile=few).tolist() == [2]
    unlabelled = load_data(root, labels=False).train
    assert [unlabelled.span(i) for i in range(3)] == [data.train.span(i) for i in range(3)]


def test_missing_videos_are_reported(tmp_path):
    names = [f"run/{i}.mp4" for i in range(20)]
    tree(tmp_path, *names[:13], "walk/t.mp4")
    os.symlink("nowhere.mp4", tmp_path / "run" / "13.mp4")
    os.mkdir(tmp_path / "run" / "14.mp4")
    (note,) = load_data(lists(tmp_path, [f"{name} 0" for name in names])).notes
    assert "7 of 20 videos" in note and "train.txt" in note
    assert "run/17.mp4, ..." in note and "run/18.mp4" not in note
    for name in names[8:13]:
        os.remove(tmp_path / name)
    fails("12 of 20", "train.txt", "--root", name=tmp_path)


FILES = ["a.mp4", "b.mp4", "c.mp4", "run/a.mp4", "run/b.mp4", "x1/same.mp4", "x2/same.mp4", "t.mp4", "a.txt"]
ERRORS = {  # lines of train.txt, parts of the sentence, lines of other lists
    "not an integer": (["run/a.mp4 0", "run/b.mp4 x"], ["train.txt:2", "run/b.mp4 x", "integer"], {}),
    "no label": (["a.mp4"], ["train.txt:1", "'a.mp4' is not followed by an integer label", "run, walk"], {}),
    "negative": (["a.mp4 0", "b.mp4 -1"], ["train.txt:2", "-1", "0 to 1"], {}),
    "1-based": (["a.mp4 1", "", "b.mp4 2"], ["train.txt:3", "2", "0 to 1: labels count from 0"], {}),
    "1-based in folders": (["run/a.mp4 1"], ["train.txt:1", "label 1 (walk)", "class 0 (run)"], {}),
    "two labels": (["a.mp4 0", "c.mp4 0", "a.mp4 1"], ["train.txt:3", "train.txt:1", "a.mp4"], {}),
    "also tested": (["a.mp4 0", "t.mp4 0"], ["train.txt:2", "test.txt:1", "t.mp4"], {}),
    "also validated": (["a.mp4 0", "b.mp4 0"], ["train.txt:2", "val.txt:1", "b.mp4"], dict(val=["b.mp4 0"])),
    "validated and tested": (["a.mp4 0"], ["val.txt:1", "test.txt:1"], dict(val=["t.mp4 1"])),
    "ambiguous": (["a.mp4 0", "same.mp4 1"], ["train.txt:2", "several", "same"], {}),
    "empty": ([], ["train.txt", "empty"], {}),
    "nothing there": (["x.mp4 0", "y.mp4 0"], ["2 of 2", "x.mp4, y.mp4"], {}),
    "an address": (["concat:a.mp4|b.mp4 0", "http://host/y.mp4 0", "a.mp4 0"],
                   ["2 of 3", "concat:a.mp4|b.mp4"], {}),
    "no class names": (["a.mp4 0", "b.mp4 3"], ["train.txt:2", "label 3", "no line has label 2", "classes."],
                       dict(classes=None)),
    "1-based without class names": (["a.mp4 1", "b.mp4 2"], ["train.txt:2", "no line has label 0"],
                                    dict(classes=None)),
    "numbers of frames": (["run/ 30 163", "a.mp4 180"], ["train.txt:2", "180", "folder frames label"],
                          dict(classes=None)),
    "a class twice": (["a.mp4 0"], ["classes.txt", "run is there twice"], dict(classes=["run", "run"])),
    "several lists": (None, ["several lists of the train part", "x_train.txt, ", "y_train.txt"],
                      dict(x_train=["a.mp4 0"], y_train=["a.mp4 0"])),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_in_lists_name_file_and_line(tmp_path, case):
    train, parts, others = ERRORS[case]
    lists(tree(tmp_path, *FILES), train, **{"test": ["t.mp4 1"]} | others)
    fails(*parts, name=tmp_path)


CLASSES = {
    ("x y", "z"): [["1 x y", "2 z"], ["0: x y", "1: z"], ["0,x y", "1,z"], ["\ufeffx y\r", "z\r"]],
    ("3 point shot", "2 step"): [["3 point shot", "2 step"]],
}


def test_class_names_may_be_numbered_or_missing(tmp_path):
    tree(tmp_path, "a.mp4", "b.mp4", "t.mp4")
    for classes, spellings in CLASSES.items():
        for lines in spellings:
            assert load_data(lists(tmp_path, ["a.mp4 0"], ["t.mp4 1"], lines)).classes == classes
    os.remove(tmp_path / "classes.txt")
    assert load_data(lists(tmp_path, ["a.mp4 0", "b.mp4 2"], ["t.mp4 1"], None)).classes == ("0", "1", "2")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("file", ["train.txt", "classes.txt"])
def test_lists_in_utf_16_are_told(tmp_path, encoding, file):
    path = lists(tree(tmp_path, "a.mp4", "t.mp4"), ["a.mp4 0"], ["t.mp4 1"]) / file
    path.write_bytes(path.read_text().encode(encoding))
    fails(path, "UTF-16", "save it as UTF-8", name=tmp_path)


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_two_unicode_forms_are_the_same(tmp_path, form, other):
    """Made on a Mac, which decomposes them, and listed elsewhere; or the other way."""
    root = tmp_path / "set"
    a, b = (lambda text, form=form: unicodedata.normalize(form, text) for form in (form, other))
    tree(root, a("train/café/é.mp4"), a("train/run/b.mp4"), b("train/café/c.mp4"), b("test/café/d.mp4"))
    data = load_data(root)
    assert data.classes == (unicodedata.normalize("NFC", "café"), "run")
    assert list(pairs(data.train).values()).count(0) == 2 and list(pairs(data.test).values()) == [0]
    few = text(tmp_path / "few.txt", b("train/café/é.mp4"), a("train/café/c.mp4"))
    assert [data.train.labels[i] for i in labelled_subset(data, listfile=few)] == [0, 0]
    far = tree(tmp_path / a("weit wég"), a("é.mp4"))
    lines = [f"{b(str(far / 'é.mp4'))} 0", f"{root}/{b('train/café/é.mp4')} 0", "train/run/b.mp4 1"]
    data = load_data(lists(root, lines, [b("test/café/d.mp4") + " 0"], [b("café"), "run"]))
    assert len(data.train) == 3 and not data.notes
    assert all(os.path.exists(data.train.path(i)) for i in range(3))


# ---- folders ---------------------------------------------------------------------------------------


def test_a_val_part_is_for_validation_or_serves_as_test(tmp_path):
    tree(tmp_path, "a.mp4", "v.mp4", "t.mp4")
    text(tmp_path / "train.csv", "a.mp4,0")
    text(tmp_path / "my_val_list_videos.txt", "v.mp4 1")
    data = load_data(tmp_path)
    assert pairs(data.test) == {"v.mp4": 1} and not len(data.val)
    text(tmp_path / "test.txt", "t.mp4 1")
    text(tmp_path / "train_log.txt", "not a list")
    text(tmp_path / "train_1_percent_labeled_videos.txt", "v.mp4 1")
    data = load_data(tmp_path)
    expected = [{"a.mp4": 0}, {"v.mp4": 1}, {"t.mp4": 1}]
    assert [pairs(videos) for videos in (data.train, data.val, data.test)] == expected
    assert data.lists()["validation videos"] == ["v.mp4 1"] and not data.lists()["unlabelled videos"]
    assert data.paths() == [f"{tmp_path}/{name}.mp4" for name in "atv"]
    assert data.with_flow("there").val.flow == "there"


def test_class_folders(tmp_path):
    names = ["train/walk/a.mp4", "train/run/b.avi", "train/run/c/", "validation/run/d.mp4", "test/run/e.mp4"]
    data = load_data(tree(tmp_path, *names, "train/run/notes.txt", "train/run/.hidden.mp4"))
    assert data.classes == ("run", "walk") and not data.notes
    assert pairs(data.test) == {"test/run/e.mp4": 0} and pairs(data.val) == {"validation/run/d.mp4": 0}
    assert pairs(data.train) == {"train/run/b.avi": 0, "train/run/c": 0, "train/walk/a.mp4": 1}
    text(tmp_path / "classes.txt", "walk", "run")
    assert pairs(load_data(tmp_path).test) == {"test/run/e.mp4": 1}
    tree(tmp_path, "validation/swim/x.mp4")
    fails(tmp_path / "validation", "swim", name=tmp_path)


WITHOUT_LABELS = {  # files, and the videos of a folder that needs no labels
    "flat": (["b.mp4", "a.mp4", "c/"], ["a.mp4", "b.mp4", "c"]),
    "nested": (["2019/x/a.mp4", "b.mp4", "deep/a.mp4"], ["2019/x/a.mp4", "b.mp4", "deep/a.mp4"]),
    "train": (["train/b.mp4", "train/a.mp4", "test/c.mp4"], ["train/a.mp4", "train/b.mp4"]),
    "classes": (["train/run/a.mp4", "val/run/c.mp4"], ["train/run/a.mp4"]),
    "unlabelled": (["train/run/a.mp4", "unlabelled/b.mp4"], ["unlabelled/b.mp4"]),
}


@pytest.mark.parametrize("case", WITHOUT_LABELS)
def test_folders_that_need_no_labels(case, tmp_path):
    files, expected = WITHOUT_LABELS[case]
    data = load_data(tree(tmp_path, *files), labels=False)
    assert pairs(data.train) == dict.fromkeys(expected, -1)
    assert (len(data.test), data.classes, data.multilabel) == (0, (), False)
    chosen = text(tmp_path / "list.txt", f"{expected[-1]} 3")
    assert labelled_subset(data, listfile=chosen).tolist() == [len(expected) - 1]


def test_lists_that_need_no_labels(tmp_path):
    """Only paths, or some labels, which are kept; unlabelled.txt goes first, and a list before a folder."""
    tree(tmp_path, *(f"v/{k}.mp4" for k in range(5)), "train/x.mp4", "empty/notes.txt")
    text(tmp_path / "train.txt", "v/0.mp4", "v/1.mp4 7", "v/2.avi 1 2", "v/9.mp4", "v/1.mp4 7")
    data = load_data(tmp_path, labels=False)
    assert pairs(data.train) == {"v/0.mp4": -1, "v/1.mp4": 7, "v/2.mp4": -1} and "v/9.mp4" in data.notes[0]
    text(tmp_path / "unlabelled.txt", "v/4.mp4", "v/3.mp4")
    assert pairs(load_data(tmp_path, labels=False).train) == {"v/4.mp4": -1, "v/3.mp4": -1}
    text(tmp_path / "unlabelled.txt", "w/8.mp4", "w/9.mp4")
    fails("2 of 2 videos", tmp_path / "unlabelled.txt", name=tmp_path, labels=False)
    fails("no videos", "unlabelled.txt or train.txt", name=tmp_path / "empty", labels=False)


SUFFIXES = ".MTS .m2ts .m2v .mpe .vob .asf .3g2 .f4v .gif .y4m .h264 .mxf .ogm .divx .dv .ogv".split()


def test_videos_of_all_suffixes_are_read_and_other_files_counted(tmp_path):
    """What may be meant as a video and is none makes a note: other files, and folders too far down."""
    data = load_data(tree(tmp_path, *(f"train/run/a{suffix}" for suffix in SUFFIXES), "test/run/t.mp4"))
    assert set(pairs(data.train)) == {f"train/run/a{suffix}" for suffix in SUFFIXES} and not data.notes
    deep = "train/run/1/2/3/4"
    tree(tmp_path, "train/run/x.xyz", "train/run/y.XYZ", "README", "train/run/.z.xyz", "notes.txt")
    tree(tmp_path, f"{deep}/seen.mp4", "train/run/1/2/3/5/", f"{deep}/5/lost.mp4", f"{deep}/6/")
    data = load_data(tmp_path)
    assert {f"{deep}/seen.mp4", "train/run/1/2/3/5"} < set(pairs(data.train))
    assert len(data.train) == len(SUFFIXES) + 2 and len(data.notes) == 1
    for part in ("2 .xyz", "1 README", f"2 folders more than 6 levels down in {deep}"):
        assert part in data.notes[0]


SERIES = {  # files in train/run, the videos among them, and how many pictures are left out of which folders
    "loose pictures": (["s1/clip1/", "s1/clip2/", "s1/thumb_1.jpg", "s2/a.mp4", "s2/t_1.jpg", "s2/t_2.PNG"],
                       ["s1/clip1", "s1/clip2", "s2/a.mp4"], {"s1": 1, "s2": 2}),
    "another series": (["c/", "c/last_00004.jpg", "b.mp4"], ["b.mp4"], {"c": 4}),
    "a cover": (["c/", "c/cover.jpg", "b.mp4"], ["b.mp4"], {"c": 4}),
    "a file": (["c/", "c/x.wav", "b.mp4"], ["b.mp4"], {"c": 3}),
    "a folder": (["c/", "c/sub/a.mp4"], ["c/sub/a.mp4"], {"c": 3}),
    "hidden files": (["c/", "c/._img_00001.jpg", "c/.DS_Store", "c/Thumbs.db"], ["c"], {}),
    "flow": (["c/", "c/flow_x_00001.jpg", "d/flow_x_1.jpg", "d/flow_y_1.jpg", "flower/flower_1.jpg"],
             ["c", "d", "flower"], {}),
    "another suffix": (["c/", "c/img_4.PNG"], ["c"], {}),
    "several numbers": ([f"t/frame{i:04d}_t{i / 25:.2f}s_640x480.png" for i in range(30)], ["t"], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SERIES)
def test_a_video_of_pictures_is_one_series_alone(tmp_path, case):
    files, expected, left_out = SERIES[case]
    data = load_data(tree(tmp_path, *(f"train/run/{name}" for name in files), "test/run/t.mp4"))
    assert set(pairs(data.train)) == {f"train/run/{name}" for name in expected}
    for folder, count in left_out.items():
        assert f"{count} pictures in train/run/{folder}, which is not one" in data.notes[0]
    assert bool(data.notes) == bool(left_out)


def test_pictures_are_known_by_their_names(monkeypatch):
    """So a folder of 100,000 pictures is scanned fast: nobody asks the disk what each of them is."""
    folder = SimpleNamespace(name="clip", is_dir=lambda: True)
    files = [SimpleNamespace(name=f"img_{i:06d}.jpg") for i in range(1000)]  # without is_dir and is_file
    entries = {"root/": [folder], "root/clip": files}
    monkeypatch.setattr(os, "scandir", lambda path: nullcontext(entries[path]))
    assert scan_videos("root") == ["clip"]


FOLDERS = {  # files, and parts of the sentence
    "nothing": ([], ["no videos", "train.txt"]),
    "other files": (["train/run/x.xyz"], ["no videos", "1 .xyz"]),
    "no parts": (["a.mp4"], ["neither a list nor class folders of the train part", "train/<class>/"]),
    "no class folder": (["train/a.mp4", "test/run/t.mp4"], ["no class folder", "/train has", "train/a.mp4"]),
    "no test": (["train/run/a.mp4"], ["neither a list nor class folders of the test part"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_without_data(tmp_path, case):
    files, parts = FOLDERS[case]
    fails(*parts, tmp_path, name=tree(tmp_path, *files))


def test_what_is_no_data_set(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    fails("no/such", "ucf101", name="no/such")
    fails("--split 2", "only split 1", name=tmp_path, split=2)
    monkeypatch.setattr(os, "scandir", refuse)
    fails(tmp_path, "Permission denied", name=tmp_path)


# ---- Kinetics-400 ----------------------------------------------------------------------------------

SKI = "skiing (not slalom or crosscountry)"
KINETICS = {
    "abseiling": 0,
    "massaging person's head": 196,
    SKI: 308,
    "skiing crosscountry": 309,
    "zumba": 399,
}
SPELLINGS = {  # folders of a part, and how class names are spelled there
    "{}": lambda name: name,
    "videos_{}": lambda name: name.replace(" ", "_"),
    "videos/{}": lambda name: name.replace(" ", "_").replace("'", "").replace("(", "").replace(")", ""),
    "rawframes_{}": lambda name: name.replace(" ", "").replace('"', ""),
}


@pytest.mark.parametrize("folder", SPELLINGS)
def test_k400_class_folders_in_all_spellings(tmp_path, folder):
    for name, k in KINETICS.items():
        for part in ("train", "val"):
            tree(tmp_path, f"{folder.format(part)}/{SPELLINGS[folder](name)}/{k}-2_{part}_000010_000020.mp4")
    data = load_data("k400", tmp_path)
    assert len(data.classes) == 400 and all(data.classes[k] == name for name, k in KINETICS.items())
    for videos in (data.train, data.test):
        assert sorted(videos.labels) == list(KINETICS.values())
        assert all(name.split("/")[-1].startswith(f"{k}-") for name, k in pairs(videos).items())


TRAIN = [f"{SKI},-_3456789ab,1989,1999", "abseiling,-_3456789ac,1.0,11.0", "zumba,xxxxxxxxxx1,0,10"]
VAL = ["massaging person's head,xxxxxxxxxx2,5,15"]


def cvdf(root, train, val, name="{}"):
    for part, rows in (("train", train), ("val", val)):
        lines = ["label,youtube_id,time_start,time_end,split,is_cc", *(f"{row},{part},0" for row in rows)]
        text(root / "annotations" / f"{name.format(part)}.csv", *lines)
    return root


@pytest.mark.parametrize("name", ["{}", "kinetics_{}", "kinetics-400_{}"])
def test_k400_flat_with_csv(tmp_path, name):
    root, better = cvdf(tmp_path, TRAIN, VAL, name), "replacement/x/-_3456789ac_000001_000011.mp4"
    tree(tmp_path, "train/-_3456789ab_001989_001999.mp4", "train/-_3456789ac_000001_000011.mp4", better,
         "train/xxxxxxxxxx1.mp4", "val/xxxxxxxxxx2_000005_000015.mp4", "val/not_in_the_csv.mp4")  # fmt: skip
    data = load_data("k400", root)
    train = {"train/-_3456789ab_001989_001999.mp4": 308, better: 0, "train/xxxxxxxxxx1.mp4": 399}
    assert pairs(data.train) == train  # the replacement of a corrupt file goes first
    assert pairs(data.test) == {"val/xxxxxxxxxx2_000005_000015.mp4": 196} and not data.notes
    os.rename(tmp_path / "train/xxxxxxxxxx1.mp4", tmp_path / "train/xxxxxxxxxx1_000010_000020.mp4")
    data = load_data("k400", root)  # another segment of the same video
    assert len(data.train) == 2 and "1 of 3" in data.notes[0] and "xxxxxxxxxx1_000000_000010" in data.notes[0]
    file = "-_3456789ab_001989_001999.mp4"
    (tmp_path / "train/skiing_crosscountry").mkdir()
    os.rename(tmp_path / "train" / file, tmp_path / "train/skiing_crosscountry" / file)
    fails("train.csv:2", "308", "309 (skiing crosscountry)", name="k400", root=root)
    cvdf(tmp_path, TRAIN, [], name)
    fails("no videos are listed for the test part", name="k400", root=root)


def test_k400_lists_of_mmaction_with_frames_beside_videos(tmp_path):
    tree(tmp_path, "videos_train/zumba/a.mp4", "rawframes_train/zumba/a/", "videos_val/abseiling/b.mp4")
    text(tmp_path / "kinetics400_train_list_videos.txt", "zumba/a.mp4 399")
    text(tmp_path / "kinetics400_train_list_rawframes.txt", "zumba/a 300 399")
    text(tmp_path / "kinetics400_val_list_videos.txt", "abseiling/b.mp4 0")
    data = load_data("k400", tmp_path)
    assert pairs(data.train) == {"videos_train/zumba/a.mp4": 399} and len(data.test) == 1


def test_k400_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = ["annotations/train.csv", "videos_train/", "kinetics400_train_list_videos.txt"]
    fails("data/k400", "--root", *layout, name="k400")
    fails("no videos", *layout, name="k400", root=tmp_path)
    tree(tmp_path, "train/a.mp4", "val/b.mp4")
    fails("class folder", *layout, name="k400", root=tmp_path)
    tree(tmp_path / "b", "train/dancing on the moon/a.mp4", "val/zumba/b.mp4")
    fails("dancing on the moon", "abseiling", name="k400", root=tmp_path / "b")


# ---- UCF-101, HMDB-51 ------------------------------------------------------------------------------

UCF = ["Hammering/v_Hammering_g08_c01.avi", "HammerThrow/v_HammerThrow_g25_c02.avi"]
UCF += ["HandstandPushups/v_HandStandPushups_g09_c03.avi", "Hammering/v_Hammering_g01_c01.avi"]
UCF += ["HandstandPushups/v_HandStandPushups_g01_c03.avi"]
UCF_TRAIN = [f"{name} {k}" for k, name in enumerate(UCF[:3], 1)]


def ucf101(root, train=UCF_TRAIN, test=UCF[3:], folder="ucfTrainTestlist"):
    text(root / folder / "classInd.txt", "1 Hammering\r", "2 HammerThrow\r", "3 HandstandPushups\r")
    text(root / folder / "trainlist02.txt", *train)
    text(root / folder / "testlist02.txt", *test)
    return root


FORMS = [("UCF-101/{}.avi", "ucfTrainTestlist"), ("videos/{}.mp4", "annotations"), ("rawframes/{}/", "")]


@pytest.mark.parametrize("form, folder", [*FORMS, ("{}.avi", "")])
def test_ucf101(tmp_path, form, folder):
    tree(tmp_path, *(form.format(name[:-4]) for name in UCF))
    data = load_data("ucf101", ucf101(tmp_path, folder=folder), split=2)
    assert data.classes == ("Hammering", "HammerThrow", "HandstandPushups")
    assert data.train.labels.tolist() == [0, 1, 2] and data.test.labels.tolist() == [0, 2]
    assert data.train.groups.tolist() == [8, 125, 209] and data.split == 2 and not data.notes
    assert data.train.name(0).startswith("Hammering/v_Hammering_g08_c01")


def test_ucf101_lists_of_mmaction(tmp_path):
    tree(ucf101(tmp_path, folder="annotations"), *(f"videos/{name}" for name in UCF))
    for part, labels in dict(train=[(0, 0), (1, 1), (2, 2)], val=[(3, 0), (4, 2)]).items():
        path = tmp_path / f"annotations/ucf101_{part}_split_1_videos.txt"
        text(path, *(f"{UCF[i]} {label}" for i, label in labels))
    data = load_data("ucf101", tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2] and data.test.labels.tolist() == [0, 2]


def test_ucf101_errors(tmp_path):
    options = dict(name="ucf101", root=ucf101(tmp_path), split=2)
    fails("no videos", "UCF-101/<class>/", **options)
    tree(tmp_path, *(f"UCF-101/{name}" for name in UCF))
    fails("--split 4", "1, 2 and 3", **options | dict(split=4))
    ucf101(tmp_path, [UCF_TRAIN[0], UCF_TRAIN[1][:-1] + "1", UCF_TRAIN[2]])
    fails("trainlist02.txt:2", "HammerThrow", **options)
    ucf101(tmp_path, test=[*UCF[3:], UCF[0]])
    fails("trainlist02.txt:1", "testlist02.txt:3", **options)
    os.remove(tmp_path / "ucfTrainTestlist/classInd.txt")
    fails("no classInd.txt", tmp_path, "ucfTrainTestlist/", **options)


def test_hmdb51(tmp_path):
    chew = ["#2_Gum_chew_h_nm_0.avi 1 ", "x[1](2)&;+~@!.avi 0 ", "c.avi 2 "]
    for name, lines in {"chew": chew, "swing_baseball": ["c.avi 1", "d.avi 2"]}.items():
        tree(tmp_path, *(f"hmdb51_org/{name}/{line.split()[0]}" for line in lines))
        for split in (1, 3):
            text(tmp_path / f"testTrainMulti_7030_splits/{name}_test_split{split}.txt", *lines)
    data = load_data("hmdb51", tmp_path, split=3)
    assert data.classes == ("chew", "swing_baseball") and "2 classes, not of 51" in data.notes[0]
    assert pairs(data.train) == {"chew/#2_Gum_chew_h_nm_0.avi": 0, "swing_baseball/c.avi": 1}
    assert pairs(data.test) == {"chew/c.avi": 0, "swing_baseball/d.avi": 1}
    assert "chew/x[1](2)&;+~@!.avi" in pairs(load_data("hmdb51:all", tmp_path).train)
    fails("_test_split2.txt", "testTrainMulti_7030_splits", name="hmdb51", root=tmp_path, split=2)
    text(tmp_path / "testTrainMulti_7030_splits/chew_test_split1.txt", "c.avi 1", "d.avi 3")
    fails("chew_test_split1.txt:2", "0, 1 or 2", name="hmdb51", root=tmp_path)


# ---- Something-Something, Charades, ActivityNet, toy ----------------------------------------------


FORMS = [("labels/{}.json", "20bn-something-something-v2/{}.webm")]
FORMS += [("something-something-v2-{}.json", "videos/{}.mp4")]
FORMS += [("annotations/something-something-v2-{}.json", "rawframes/{}/")]


@pytest.mark.parametrize("names, form", FORMS)
def test_ssv2(tmp_path, names, form):
    labels = {"Putting something": "1", "Approaching something": "0", "Moving number of things": "10"}
    labels |= {f"z{k}": str(k) for k in range(2, 10)}
    templates = {"78687": "Putting [something]", "7": "Moving [number of] things"}
    templates |= {"9": "Approaching [something]"}
    videos = [dict(id=i, label="..", template=template, placeholders=[]) for i, template in templates.items()]
    for part, content in (("labels", labels), ("train", videos[:2]), ("validation", videos[2:])):
        text(tmp_path / names.format(part), json.dumps(content))
    tree(tmp_path, *map(form.format, templates))
    data = load_data("ssv2", tmp_path)
    assert data.classes[0] == "Approaching something" and data.classes[10] == "Moving number of things"
    assert sorted(data.train.labels) == [1, 10] and data.test.labels.tolist() == [0] and not data.flip
    videos[0]["template"] = "Eating [something]"
    text(tmp_path / names.format("train"), json.dumps(videos[:2]))
    fails("train.json", "78687", "Eating something", name="ssv2", root=tmp_path)
    text(tmp_path / names.format("train"), '[{"id": "7"')
    fails("annotations", tmp_path, name="ssv2", root=tmp_path)


@pytest.mark.parametrize("form", ["Charades_v1_480/{}.mp4", "Charades_v1/{}.mp4", "Charades_v1_rgb/{}/"])
def test_charades(tmp_path, form):
    head = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
    row = '{},S,Kitchen,6,7,Yes,"A person, ""says""\nhello.",a;b,"x, y",{},24.83'
    rows = [row.format("AAAA1", "c156 11.90 21.20;c147 0.00 12.60;c147 20.0 99.9"), row.format("BBBB2", "")]
    text(tmp_path / "Charades_v1_train.csv", head, *rows)
    text(tmp_path / "Charades_v1_test.csv", head, row.format("CCCC3", "c000 0.0 1.0"))
    text(tmp_path / "Charades_v1_classes.txt", *(f"c{k:03d} Doing thing {k}" for k in range(157)))
    tree(tmp_path, *(form.format(i) for i in ("AAAA1", "BBBB2", "CCCC3")))
    data = load_data("charades", tmp_path)
    assert data.multilabel and data.train.labels.shape == (2, 157) and data.classes[147] == "Doing thing 147"
    assert sorted(pairs(data.train).values()) == [(), (147, 156)] and [*pairs(data.test).values()] == [(0,)]
    text(tmp_path / "Charades_v1_test.csv", head, row.format("CCCC3", "opening a door"))
    fails("Charades_v1_test.csv:3", "opening a door", name="charades", root=tmp_path)
    text(tmp_path / "Charades_v1_test.csv", "id,label", "CCCC3,5")
    fails("Charades_v1_test.csv:2", "actions", name="charades", root=tmp_path)


ACTIVITIES = {  # subset, and segments with their labels
    "abc-_345678": ("training", ([10.5, 20], "Making a sandwich"), ([90, 120.0], "Arm wrestling"),
                    ([30, 30.01], "Arm wrestling"), ([101, 102], "Arm wrestling"),
                    ([10.5, 20], "Arm wrestling")),
    "v_defghijkl": ("training", ([-1, 5], "Applying sunscreen")),
    "00000000001": ("validation", ([0, 10], "Arm wrestling")),
    "00000000002": ("testing",),
}  # fmt: skip


def test_activitynet(tmp_path):
    database = {
        key: dict(subset=subset, duration=100.0, annotations=[dict(segment=s, label=y) for s, y in actions])
        for key, (subset, *actions) in ACTIVITIES.items()
    }
    text(tmp_path / "activity_net.v1-3.min.json", json.dumps(dict(taxonomy=[], database=database)))
    tree(tmp_path, "videos/v_abc-_345678.mp4", "videos/v_defghijkl.mkv", "videos/v_00000000001.webm")
    data = load_data("activitynet", tmp_path)
    assert data.classes == ("Applying sunscreen", "Arm wrestling", "Making a sandwich")
    assert not data.multilabel
    assert {(data.train.name(i), data.train.span(i), int(y)) for i, y in enumerate(data.train.labels)} == {
        ("v_abc-_345678.mp4", (10.5, 20.0), 2),
        ("v_abc-_345678.mp4", (90.0, 100.0), 1),
        ("v_defghijkl.mkv", (0.0, 5.0), 0),
    }
    assert "2 empty segments" in data.notes[0] and data.test.span(0) == (0.0, 10.0)
    whole = load_data("activitynet:whole", tmp_path).train
    assert pairs(whole) == {"v_abc-_345678.mp4": 2, "v_defghijkl.mkv": 0} and whole.span(0) is None
    for line, labels in (("v_abc-_345678", [2, 1]), ("v_abc-_345678.avi 1", [1])):
        few = text(tmp_path / "few.txt", line)
        assert data.train.labels[labelled_subset(data, listfile=few)].tolist() == labels


def test_toy_is_made_and_read(tmp_path, monkeypatch):
    def make(root, variant):
        assert (root, variant) == (os.path.join("data", "toy_b"), "b")
        tree(root, "train/a.mp4", "test/b.mp4", "val/c.mp4")
        lists(Path(root), ["train/a.mp4 0"], ["test/b.mp4 1"], ["left", "right"], val=["val/c.mp4 1"])

    monkeypatch.setattr("common.io.toy.make", make)
    monkeypatch.chdir(tmp_path)
    data = load_data("toy:b")
    assert data.name == "toy:b" and data.classes == ("left", "right") and not data.flip
    assert data.val.path(0) == os.path.join("data", "toy_b", "val/c.mp4")


# ---- the real lists --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_ucf101(tmp_path_factory):
    root = tmp_path_factory.mktemp("ucf101")
    os.symlink(LISTS / "ucfTrainTestlist", root / "ucfTrainTestlist")
    for part in ("train", "test"):
        names = [line.split()[0] for line in open(LISTS / f"ucfTrainTestlist/{part}list01.txt")]
        tree(root / "UCF-101", *names)
    return root


@shared
@pytest.mark.parametrize("split, n_train", [(1, 9537), (2, 9586), (3, 9624)])
def test_real_ucf101(real_ucf101, split, n_train):
    data = load_data("ucf101", real_ucf101, split)
    assert len(data.train) == n_train and len(data.test) == 13320 - n_train and not data.notes
    assert data.classes == tuple((LISTS / "label_maps/ucf101/label_map.txt").read_text().split())
    for videos in (data.train, data.test):
        assert all(name.split("/")[0] == data.classes[k] for name, k in pairs(videos).items())
    assert not set(data.train.groups) & set(data.test.groups)
    assert len(np.unique(np.concatenate([data.train.groups, data.test.groups]))) == 101 * 25
    assert len(labelled_subset(data, 0.01)) == 101 and len(labelled_subset(data, 0.1)) == 1010


@shared
@pytest.mark.parametrize("percent, number", [(5, 476), (10, 953), (20, 1907), (50, 4768)])
def test_videossl_ucf101(real_ucf101, percent, number):
    data, folder = load_data("ucf101", real_ucf101), LISTS / "videossl/ucf101/videossl_splits"
    path = folder / f"ucf101_train_{percent}_percent_labeled_split_1_rawframes.txt"
    with warnings.catch_warnings(action="error"):
        few = labelled_subset(data, listfile=path)
    assert len(few) == number and (counts(data, few)[21] == 0) == (percent == 5)


@shared
def test_real_hmdb51(tmp_path):
    os.symlink(LISTS / "hmdb51_testTrainMulti_7030_splits", tmp_path / "testTrainMulti_7030_splits")
    for path in (tmp_path / "testTrainMulti_7030_splits").glob("*_split1.txt"):
        folder = path.name.removesuffix("_test_split1.txt")
        tree(tmp_path, *(f"hmdb51_org/{folder}/{line.split()[0]}" for line in open(path)))
    for split in (1, 2, 3):
        data = load_data("hmdb51", tmp_path, split)
        assert counts(data, range(3570)) == [70] * 51 and len(data.test) == 1530 and not data.notes
    assert data.classes == tuple((LISTS / "label_maps/hmdb51/label_map.txt").read_text().split())
    data, folder = load_data("hmdb51:all", tmp_path), LISTS / "videossl/hmdb51/videossl_splits"
    assert len(data.train) == 5236
    for percent, number, differ in ((40, 2094, 54), (50, 2618, 73), (60, 3141, 65), (100, 5236, 132)):
        path = folder / f"hmdb51_train_{percent}_percent_labeled_split_1_rawframes.txt"
        sentence = f" {differ} of {number} lines differ, the labels of hmdb51:all count"
        with pytest.warns(UserWarning, match=sentence):
            assert len(labelled_subset(data, listfile=path)) == number


@shared
def test_real_k400_lists(tmp_path):
    folder = LISTS / "videossl/kinetics400/videossl_splits"
    lines = (folder / "kinetics400_train_10_percent_labeled_videos.txt").read_text().splitlines()
    text(tmp_path / "kinetics400_train_list_videos.txt", *lines)
    tree(tmp_path, *(f"videos_train/{line.rsplit(' ', 1)[0]}" for line in lines))
    rows = list(csv.DictReader(open(LISTS / "kinetics400/kinetics-400_val.csv")))
    (tmp_path / "annotations").mkdir()
    os.symlink(LISTS / "kinetics400/kinetics-400_val.csv", tmp_path / "annotations/kinetics-400_val.csv")
    times = [f"{int(row['time_start']):06d}_{int(row['time_end']):06d}" for row in rows]
    names = [f"val/{row['youtube_id']}_{time}.mp4" for row, time in zip(rows, times, strict=True)]
    tree(tmp_path, *names[25:])
    data = load_data("k400", tmp_path)
    assert len(data.train) == 24000 and len(data.test) == len(rows) - 25 and len(data.notes) == 1
    classes = (LISTS / "label_maps/kinetics/label_map_k400.txt").read_text().splitlines()
    assert list(data.classes) == classes
    assert pairs(data.test) == {
        name: classes.index(row["label"]) for name, row in zip(names[25:], rows[25:], strict=True)
    }
    assert counts(data, labelled_subset(data, 0.01)) == [6] * 400
    assert counts(data, labelled_subset(data, 0.1)) == [60] * 400
    path = folder / "kinetics400_train_10_percent_labeled_rawframes.txt"
    assert len(labelled_subset(data, listfile=path)) == 24000


@shared
def test_real_weizmann():
    data = load_data(SHARED / "weizmann")
    assert (data.name, len(data.train), len(data.test), len(data.classes)) == ("weizmann", 60, 30, 10)
    assert counts(data, labelled_subset(data, per_class=2)) == [2] * 10 and not data.notes

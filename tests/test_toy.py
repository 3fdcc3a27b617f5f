"""The embedded data set: complete or absent, the same bytes everywhere; the class is the motion alone."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data import load_data
from common.errors import UserError
from common.io import toy

REPOSITORY = Path(__file__).resolve().parent.parent
FEW = dict(train_per_class=1, val_per_class=1, test_per_class=1)
MAKE = "import sys; from common.io import toy; toy.make(sys.argv[1], 'c', int(sys.argv[2]), 1, 1)"


def start(root, train_per_class):
    command = [sys.executable, "-c", MAKE, str(root), str(train_per_class)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def decode(path):
    with av.open(str(path)) as file:  # one thread: for small pictures threads only wait
        file.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in file.decode(video=0)])


def rows_of(root, subset):
    """[name, class, ...] of the videos of a list."""
    return [line.split() for line in (root / f"{subset}.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "data" / "toy"
    toy.make(root, **FEW)
    return root


def test_lists_name_every_file_with_its_class(small):
    classes = (small / "classes.txt").read_text().split()
    assert classes == list(toy.VARIANTS[""].classes) and len(classes) == 10
    rows = {subset: rows_of(small, subset) for subset in toy.SUBSETS}
    assert all(sorted(int(k) for _, k in listed) == list(range(10)) for listed in rows.values())
    listed = {name: classes[int(k)] for subset in toy.SUBSETS for name, k in rows[subset]}
    assert {name for name in contents(small) if name.endswith(".mp4")} == set(listed)
    assert all(kind in name for name, kind in listed.items())
    assert {p.name for p in small.parent.iterdir()} == {"toy", ".toy.lock"}  # nothing unfinished is left
    for i, (name, _) in enumerate(rows["val"]):
        frames, rendered = decode(small / name), toy.render("", "val", i)
        assert frames.shape == rendered.shape == (48, 48, 48, 3)
        # In grey: half the resolution of the colours is lost by design (4:2:0).
        assert np.abs(frames.mean(-1) - rendered.astype(float).mean(-1)).mean() < 4


def test_same_arguments_same_bytes(small, tmp_path):
    toy.make(tmp_path / "again", **FEW)
    assert contents(tmp_path / "again") == contents(small)
    videos = [toy.render(v, subset, i) for v in toy.VARIANTS for subset in toy.SUBSETS for i in (0, 420)]
    videos.append(toy.render("", "train", 0, seed=1))
    assert len({video.tobytes() for video in videos}) == len(videos)


def test_a_set_is_left_alone_and_another_is_refused(small, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    toy.make(small)
    with pytest.raises(UserError, match="variant '', not 'a': delete it"):
        toy.make(small, "a")
    with pytest.raises(UserError, match="seed 0"):
        toy.make(small, seed=3)
    monkeypatch.setattr(toy, "VERSION", toy.VERSION + 1)
    with pytest.raises(UserError, match=f"{small} .*version"):
        toy.make(small)
    assert before == {p: p.stat().st_mtime_ns for p in small.rglob("*")}


def test_a_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match="no toy videos"):
        toy.make(tmp_path, **FEW)
    assert contents(tmp_path) == {"notes.txt": b"notes"}
    with pytest.raises(UserError, match="cannot make the toy videos in .*notes.txt"):
        toy.make(tmp_path / "notes.txt" / "toy", **FEW)


def test_killed_in_the_middle_then_complete(tmp_path):
    root, child = tmp_path / "toy", start(tmp_path / "toy", 2000)
    try:
        for _ in range(600):
            if len(list(tmp_path.glob(".toy.unfinished-*/train/*"))) > 5:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the child wrote nothing")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not root.exists() and list(tmp_path.glob(".toy.unfinished-*"))
    toy.make(root, "c", **FEW)
    assert len([name for name in contents(root) if name.endswith(".mp4")]) == 3 * 7
    assert {p.name for p in tmp_path.iterdir()} == {"toy", ".toy.lock"}


def test_two_processes_make_one_set(tmp_path):
    children = [start(tmp_path / "toy", count) for count in (3, 4)]
    assert [child.wait(120) for child in children] == [0, 0]
    stamp = json.loads((tmp_path / "toy" / "toy.json").read_text())
    assert len(rows_of(tmp_path / "toy", "train")) == 7 * stamp["train"]
    assert len(os.listdir(tmp_path / "toy" / "train")) == 7 * stamp["train"]


# ---- the class is the motion -----------------------------------------------------------------------

NUMBER, FOLDS, CHANCE = 200, 5, 0.1
SIGMA = (CHANCE * (1 - CHANCE) / NUMBER) ** 0.5  # of the accuracy of guesses


def decoded(root, variant=""):
    """(N, T, 3, H, W) uint8, decoded from the files; video i is of class i % 10."""
    toy.make(root, variant, train_per_class=NUMBER // 10, val_per_class=0, test_per_class=0)
    clips = np.stack([decode(root / name) for name, _ in rows_of(root, "train")])
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return decoded(tmp_path_factory.mktemp("toy") / "toy")


def accuracy(x):
    """Accuracy of logistic regressions on features x (N, D): tested on a fold, trained on the other folds."""
    y, fold = torch.arange(len(x)) % 10, torch.arange(len(x)) // 10 % FOLDS
    is_right = [predicted(x, y, fold != k)[fold == k] == y[fold == k] for k in range(FOLDS)]
    return torch.cat(is_right).float().mean().item()


def predicted(x, y, train):
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    weight, bias = torch.zeros(x.shape[1], 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x[train] @ weight + bias, y[train]) + 0.02 * (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x @ weight + bias).argmax(1)


def picture_features(pictures):
    """(N, 3, H, W) uint8 -> (N, D): mean, spread, histogram of each channel, and the picture at 12 x 12."""
    x = pictures.float() / 255
    histogram = F.one_hot((pictures // 32).long().flatten(2), 8).float().mean(2)
    features = [x.mean((2, 3)), x.std((2, 3)), histogram, F.avg_pool2d(x, 4)]
    return torch.cat([feature.flatten(1) for feature in features], 1)


@pytest.mark.parametrize("frame", ["first", "middle", "last", "random"])
def test_one_frame_tells_nothing(videos, frame):
    n, T = videos.shape[:2]
    draws = np.random.default_rng(0).integers(T, size=n)
    t = {"first": 0, "middle": T // 2, "last": T - 1, "random": draws}[frame]
    assert accuracy(picture_features(videos[np.arange(n), t])) < CHANCE + 3 * SIGMA + 0.01


def test_busy_videos_hide_the_shapes_in_a_still_ground(videos, tmp_path):
    """One frame tells nothing; the ground is as bright as the shapes, and gone in a difference."""
    busy = decoded(tmp_path / "toy", "busy")
    assert accuracy(picture_features(busy[:, busy.shape[1] // 2])) < CHANCE + 3 * SIGMA + 0.01
    assert busy[:50].float().mean() > 2.5 * videos[:50].float().mean()
    assert ((busy[:50, 1:].short() - busy[:50, :-1]).abs() <= 8).float().mean() > 0.75


def test_two_frames_tell_much(videos):
    """How well a frame fits the one 3 frames later, shifted by -4 to 4 pixels, even to a linear model."""
    grey = videos[:, ::3].float().mean(2) / 255  # (N, T, H, W)
    shifts = [(dy, dx) for dy in (-4, 0, 4) for dx in (-4, 0, 4)]
    fits = [(grey[:, :-1].roll(shift, (2, 3)) - grey[:, 1:]).abs().mean((1, 2, 3)) for shift in shifts]
    assert accuracy(torch.stack(fits, 1).log()) > CHANCE + 10 * SIGMA


# ---- two labels per video --------------------------------------------------------------------------


def test_multi_labels_are_all_pairs_in_balance():
    pairs = [tuple(toy.labels("multi", i)) for i in range(90)]
    assert set(pairs) == set(permutations(range(10), 2)) and toy.labels("multi", 90) == [0, 1]
    for i in range(0, 200, 10):  # every ten videos have each class twice
        assert sorted(k for j in range(i, i + 10) for k in toy.labels("multi", j)) == sorted([*range(10)] * 2)
    assert [toy.labels("", i) for i in (0, 9, 10, 23)] == [[0], [9], [0], [3]]


@pytest.mark.parametrize("variant, i, n_shapes", [("multi", 17, 2), ("multi", 45, 2), ("", 4, 3)])
def test_videos_show_the_motions_of_their_labels(monkeypatch, variant, i, n_shapes):
    """Each of two labels moves one shape; a single label moves three."""
    moved = []

    def watched(name, motion):
        return lambda p: moved.append(name) or motion(p)

    monkeypatch.setattr(toy, "MOTIONS", {name: watched(name, m) for name, m in toy.MOTIONS.items()})
    toy.render(variant, "train", i)
    kinds = [toy.VARIANTS[variant].classes[k] for k in toy.labels(variant, i)]
    assert moved == kinds * (n_shapes // len(kinds))


def test_multi_set_has_two_labels_per_video(tmp_path):
    toy.make(tmp_path / "multi", "multi", **FEW)
    classes, rows = toy.VARIANTS["multi"].classes, rows_of(tmp_path / "multi", "train")
    for i, (name, *y) in enumerate(rows):
        assert [int(k) for k in y] == toy.labels("multi", i)
        assert Path(name).name == "+".join(classes[int(k)] for k in y) + "_0000.mp4"
    data = load_data("toy:multi", str(tmp_path / "multi"))
    assert data.multilabel and data.train.labels.shape == (10, 10)
    labels = {data.train.name(i): np.flatnonzero(data.train.labels[i]).tolist() for i in range(10)}
    assert labels == {name: sorted(map(int, y)) for name, *y in rows}


# ---- the same files everywhere ---------------------------------------------------------------------

# sha256 of the pictures of some videos of version 2; other pictures need another toy.VERSION.
PICTURES = {
    ("", "train", 3): "de8fed52dce4",
    ("a", "train", 0): "6ad6774b8683",
    ("b", "test", 11): "416e54a5cc79",
    ("c", "val", 2): "8aa372432d9b",
    ("busy", "test", 7): "7de2902d20bc",
    ("multi", "train", 45): "f2d941140c16",
    ("mini", "train", 5): "d89fd90454d3",
}
HASH = """
import hashlib
from common.io import toy
for key in {keys}:
    print(hashlib.sha256(toy.render(*key).tobytes()).hexdigest()[:12])
"""


@pytest.mark.parametrize("features", ["all", "none"])
def test_pictures_are_those_of_this_version(features):
    """With all instruction sets that numpy uses here, and with those alone that all processors have."""
    core = getattr(np, "_core", None) or np.core
    off = "" if features == "all" else " ".join(core._multiarray_umath.__cpu_dispatch__)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HASH.format(keys=list(PICTURES))],
                          cwd=REPOSITORY, env=os.environ | {"NPY_DISABLE_CPU_FEATURES": off},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert toy.VERSION == 2 and done.stdout.split() == list(PICTURES.values())


def test_no_value_of_a_table_is_close_to_a_half():
    """So numpy's last bits do not decide how a value is rounded: 1e-7 around each half there is none."""
    x = np.arange(toy.STEPS) / toy.STEPS
    functions = {"COSINE": np.cos(2 * np.pi * x), "HALF_SIZE": 5 * 2**x, "PERIOD": 16 * 2.5**x}
    for name, exact in functions.items():
        assert abs(exact * 2**16 % 1 - 0.5).min() > 1e-7
        assert abs(getattr(toy, name) - exact).max() <= 2**-17


def test_files_do_not_depend_on_the_encoders_processor(tmp_path, monkeypatch):
    pictures = toy.render("c", "train", 5)
    toy.write(tmp_path / "own.mp4", pictures)
    for asm in ("0", "SSE2,SSSE3", "AVX,AVX2,FMA3,BMI2"):
        monkeypatch.setattr(toy, "X264", f"cpu-independent=1:asm={asm}")
        toy.write(tmp_path / "other.mp4", pictures)
        assert (tmp_path / "other.mp4").read_bytes() == (tmp_path / "own.mp4").read_bytes()


def test_colours_are_those_of_swscale():
    """Within one of 256 steps."""
    for colour in np.random.default_rng(0).choice([0, 64, 255], (50, 3)):
        picture = np.full((4, 6, 3), colour, np.uint8)
        swscale = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p").to_ndarray()
        planes = toy._yuv420p(picture)
        assert planes.shape == swscale.shape and abs(planes.astype(int) - swscale).max() <= 1

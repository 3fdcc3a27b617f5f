"""The feature cache: its rows are the same whatever kills, signals, full disks and numbers of ranks."""

import fcntl
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from torch import nn

from common import augment, evaluate
from common.clips import dense_parts
from common.data import Videos
from common.errors import UserError
from common.io import features, files
from common.io.decode import read_frames
from common.io.features import Extraction
from common.modality import Recipe
from common.run import Run

HERE = Path(__file__).resolve().parent.parent
NAMES = [f"v{i}.mp4" for i in range(11)]
BAD = (4, 6, 7)  # of blocks of two: in one block the first, in one both


@dataclass(frozen=True)
class Uneven(Recipe):
    """One to three clips, by the number of frames; `opened` has the videos that were decoded."""

    opened = []

    def open(self, videos, index):
        self.opened.append(index)
        return super().open(videos, index)

    def sample(self, source):
        return list(dense_parts(len(source), self.frames, self.stride, 1 + len(source) % 3))


RECIPE = Uneven(frames=2, stride=3, clips=2, crops=1, short_side=16, size=16)


class Net(nn.Module):
    """Features of 64 numbers, with a batch norm whose statistics are not those of the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv3d(3, 64, (1, 3, 3)), nn.BatchNorm3d(64)
        self.norm.running_mean.uniform_(-1, 1)

    def embed(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3, 4))


def videos_in(root, names=NAMES):
    return Videos.make(root, names, np.arange(len(names)))


@pytest.fixture(scope="module")
def root(make, tmp_path_factory):
    """A folder of eleven videos of 8, 9, 10, ... frames, of which three cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(NAMES):
        if i in BAD:
            (folder / name).write_text("<html>404</html>")
        else:
            make.write(folder / name, frames=8 + i, size=(32, 16))
    return folder


@pytest.fixture(scope="module")
def videos(root):
    return videos_in(root)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(evaluate, "VIEWS_PER_BATCH", 4)  # two videos
    RECIPE.opened.clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with Run("features", tmp_path_factory.mktemp("run"), {}) as run:
        yield run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "there" / "features"


@pytest.fixture(scope="module")
def whole(videos, run, tmp_path_factory):
    """The features as one process computes them without a stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "VIEWS_PER_BATCH", 4)
        return extract(tmp_path_factory.mktemp("whole") / "features", videos, run)


class Killed(Exception):
    pass


def kill():
    raise Killed


sigterm = partial(signal.raise_signal, signal.SIGTERM)
sigkill = partial(signal.raise_signal, signal.SIGKILL)


def extract(folder, videos, run, recipe=RECIPE, embed=Net.embed, after=None, end=kill, net=None, **how):
    """The Features; `end` is called in the call number `after` of the network."""
    net, n_calls = net or Net(), iter(range(99))

    def call(x):
        if next(n_calls) == after:
            end()
        return embed(net, x)

    blocks = partial(evaluate.blocks, net, call, run=run, bar="features")
    return features.extract(folder, Extraction(videos, recipe, blocks, **how), run)


def killed_after(n, folder, videos, run, **how):
    with pytest.raises(Killed):
        extract(folder, videos, run, after=n, **how)
    RECIPE.opened.clear()


def same(features, whole):
    assert features.rows.dtype == whole.rows.dtype and np.array_equal(features.rows, whole.rows)
    assert np.array_equal(features.counts, whole.counts) and features.bad == whole.bad
    return True


def names(folder):
    return sorted(path.name for path in folder.iterdir())


COMPLETE = ["features.json", "features.npy", "index.npz", "videos.txt"]


def incomplete(*first):
    """Files of a folder with the part files of the blocks that begin with these videos."""
    return ["features.json", *(f"part-{i:09d}.npz" for i in first), "videos.txt"]


# ---- what they are ---------------------------------------------------------------------------------


def naive(videos):
    """The features (V, 64) of each readable video, one view at a time."""
    net, rows_of = Net().eval(), {}
    for i in set(range(len(videos))) - set(BAD):
        n = 8 + i
        clips, room = 1 + n % 3, n - 3  # windows of frames f, f + 3
        rows_of[i] = []
        for start in [room // 2] if clips == 1 else [k * room // clips for k in range(clips)]:
            clip = read_frames(videos.path(i), [start, start + 3], 16)
            x = (augment.resize_crop(clip, 16, 16).float() / 255 - 0.45) / 0.225
            rows_of[i].append(net.embed(x.transpose(0, 1)[None])[0].detach().numpy())
    return {i: np.stack(rows_of[i]) for i in sorted(rows_of)}


@pytest.mark.parametrize("average", [False, True])
def test_rows_of_a_naive_loop(videos, run, folder, capsys, average):
    cache = extract(folder, videos, run, average=average, identity={"weights": "abc"})
    rows_of = {i: z.mean(0, keepdims=True) if average else z for i, z in naive(videos).items()}
    assert cache.counts.tolist() == [len(rows_of.get(i, ())) for i in range(11)]
    assert isinstance(cache.rows, np.memmap) and cache.rows.dtype == np.float32
    assert np.allclose(cache.rows, np.concatenate(list(rows_of.values())), atol=1e-6)
    assert np.allclose(cache.rows[cache.first[9] :][: cache.counts[9]], rows_of[9], atol=1e-6)
    assert sorted(cache.bad) == list(BAD) and all(cache.bad.values())
    assert f"3 of 11 videos have no features, v4.mp4: {cache.bad[4]}" in capsys.readouterr().out
    assert RECIPE.opened == list(range(11)) and same(features.load(folder), cache)
    about = json.loads((folder / "features.json").read_text())
    assert about["weights"] == "abc" and about["recipe.clips"] == 2 and about["recipe"] == "Uneven"
    assert (folder / "videos.txt").read_text().splitlines()[:2] == ["v0.mp4 0", "v1.mp4 1"]
    assert names(folder) == COMPLETE


@pytest.mark.parametrize("call, name", [(0, "v0.mp4"), (2, "v2.mp4"), (3, "v4.mp4")])
def test_features_that_are_not_finite(videos, run, folder, call, name):
    """Blocks of 3 + 1, 2 + 3, 0 + 2 views; the second takes two calls, of four views and of one."""
    n_calls = iter(range(99))

    def embed(net, x):
        return net.embed(x) * (float("nan") if next(n_calls) == call else 1)

    with pytest.raises(UserError, match=f"features of {name} or of videos after it are not finite"):
        extract(folder, videos, run, embed=embed)
    assert names(folder) == incomplete(*range(0, int(name[1]), 2))


def test_no_video_can_be_read(root, run, folder, tmp_path):
    few = videos_in(tmp_path, ["v4.mp4", "v6.mp4"])
    with pytest.raises(UserError, match="none of the 2 videos can be read: no such file"):
        extract(folder, few, run)
    shutil.copy(root / "v0.mp4", tmp_path / "v6.mp4")  # mended
    cache = extract(folder, few, run)
    assert cache.counts.tolist() == [0, 3] and cache.bad == {0: "no such file"}
    with pytest.raises(UserError, match="none of the 0 videos can be read: the list is empty"):
        extract(folder / "empty", videos_in(root, []), run)


# ---- kills and signals -----------------------------------------------------------------------------


def test_killed_and_resumed(videos, run, folder, whole, capsys):
    killed_after(4, folder, videos, run)  # in the block after 4 and 5
    assert names(folder) == incomplete(0, 2, 4, 6)
    with pytest.raises(UserError, match="no complete features, the same command"):
        features.load(folder)
    (folder / "part-000000008.npz.7-8.tmp").touch()
    assert same(extract(folder, videos, run), whole) and RECIPE.opened == [8, 9, 10]
    assert f"{folder} has the features of 4 blocks of videos already" in capsys.readouterr().out
    shutil.copy(folder / "index.npz", folder / "part-000000000.npz")  # left by a kill just before the end
    complete = features.extract(folder, Extraction(videos, RECIPE, blocks=None), run)
    assert same(complete, whole) and names(folder) == COMPLETE


def test_signal(videos, run, folder, whole, capsys):
    net = Net()
    assert extract(folder, videos, run, after=3, end=sigterm, net=net) is None
    run.stop = False
    assert net.training and names(folder) == incomplete(0, 2, 4) and RECIPE.opened == list(range(6))
    assert f"stopped by a signal; the finished features are kept in {folder}" in capsys.readouterr().out
    assert same(extract(folder, videos, run), whole) and RECIPE.opened == list(range(11))


@pytest.mark.parametrize("kind", ["cut short", "one bit", "text", "empty"])
def test_damaged_part_is_computed_again(videos, run, folder, whole, kind):
    killed_after(6, folder, videos, run)
    path = folder / "part-000000002.npz"
    data = bytearray(path.read_bytes())
    if kind == "one bit":
        data[data.index(whole.rows[5].tobytes())] ^= 4
    path.write_bytes({"cut short": data[:-9], "one bit": data, "text": b"no features", "empty": b""}[kind])
    with pytest.raises(UserError, match="part-000000002.npz was damaged and is deleted: the same command"):
        extract(folder, videos, run)
    RECIPE.opened.clear()
    assert same(extract(folder, videos, run), whole) and RECIPE.opened == [2, 3]


@pytest.mark.parametrize("name", ["features.npy", "index.npz", "part-000000002.npz"])
def test_killed_while_assembling(videos, run, folder, whole, monkeypatch, name):
    """Before the two files are in place, or before a part file is deleted after that."""

    def before(function):
        def call(*paths, **how):
            if str(paths[-1]).endswith(name) and len(list(folder.glob("part-*.npz"))) >= 5:
                kill()
            return function(*paths, **how)

        return call

    with monkeypatch.context() as patch:
        if name.startswith("part"):
            patch.setattr(Path, "unlink", before(Path.unlink))
        else:
            patch.setattr(files.os, "replace", before(os.replace))
        killed_after(None, folder, videos, run)
    assert ("index.npz" in names(folder)) == name.startswith("part")
    assert same(extract(folder, videos, run), whole) and not RECIPE.opened and names(folder) == COMPLETE


# ---- other features --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complete", [False, True])
def test_other_features_are_refused(videos, root, run, folder, is_complete):
    how = dict(identity={"weights": "a" * 64})
    if is_complete:
        extract(folder, videos, run, **how)
    else:
        killed_after(2, folder, videos, run, **how)
    RECIPE.opened.clear()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    fewer, plain = videos_in(root, NAMES[:-1]), Recipe(**vars(RECIPE))
    for others, recipe, changes, words in (
        (videos, RECIPE, dict(identity={"weights": "b" * 64}), r"weights a{24}, not b{24}\)"),
        (videos, RECIPE, dict(identity={}), "weights a{24}, not None"),
        (videos, RECIPE, how | dict(average=True), "average False, not True"),
        (fewer, RECIPE, how, "videos "),
        (videos, replace(RECIPE, stride=2), how, "recipe.stride 3, not 2"),
        (videos, plain, how, "recipe Uneven, not Recipe"),
    ):
        with pytest.raises(UserError, match=rf"{folder} has other features \({words}.*delete that one"):
            extract(folder, others, run, recipe, **changes)
    assert not RECIPE.opened and before == {path: path.read_bytes() for path in folder.iterdir()}
    for text in "{", None:
        (folder / "features.json").write_text(text) if text else (folder / "features.json").unlink()
        with pytest.raises(UserError, match=r"other features \(average None, not False; "):
            extract(folder, videos, run, **how)


def test_a_mistake_before_the_first_part_can_be_mended(videos, run, folder, whole):
    killed_after(0, folder, videos, run, identity={"weights": "wrong"})
    assert names(folder) == incomplete() and same(extract(folder, videos, run), whole)


def test_damaged_features(videos, run, folder):
    with pytest.raises(UserError, match="has no complete features$"):
        features.load(folder)
    extract(folder, videos, run)
    rows, index = folder / "features.npy", folder / "index.npz"
    data = rows.read_bytes()
    fewer = data.replace(b"(17, 64)", b"(16, 64)")[: -64 * 4]
    for path, wrong in ((rows, data[:-1]), (rows, b""), (rows, fewer), (rows, None), (index, b"text")):
        path.write_bytes(wrong) if wrong is not None else path.unlink()
        with pytest.raises(UserError, match="damaged: delete"):
            features.load(folder)
        rows.write_bytes(data)


def test_two_runs_in_one_folder(videos, run, folder, whole):
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is computing"):
        extract(folder, videos, run)
    os.close(lock)
    extract(folder, videos, run)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run has let go
    assert same(extract(folder, videos, run), whole)  # complete features need no lock
    os.close(lock)


# ---- disk and words --------------------------------------------------------------------------------


@contextmanager
def disk_of(size):
    """No file can be larger than this number of bytes."""
    old, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("size, name, n_parts", [(2400, "part-000000002.npz", 1), (4000, "features.npy", 6)])
def test_full_disk(videos, run, folder, whole, size, name, n_parts):
    with disk_of(size), pytest.raises(UserError, match=f"{name} cannot be written: File too large"):
        extract(folder, videos, run)
    assert len(list(folder.glob("part-*.npz"))) == n_parts and not list(folder.glob("*.tmp"))
    RECIPE.opened.clear()
    assert same(extract(folder, videos, run), whole) and RECIPE.opened == list(range(2 * n_parts, 11))


def test_progress_in_words(videos, run, folder, capsys, monkeypatch):
    seconds = iter(range(0, 999, 25))
    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    extract(folder, videos, run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("of 11 videos")]
    assert lines == ["features of 6 more of 11 videos", "features of 11 more of 11 videos"]


# ---- several processes -----------------------------------------------------------------------------

RANKS = """
import sys
import test_features as t

root, out, what = sys.argv[1:]
t.evaluate.VIEWS_PER_BATCH = 4
with t.Run("features", out + "/run", {}) as run:
    net = t.Net()
    net.norm.running_mean += run.rank  # the statistics of rank 0 count
    after = 1 if what != "run" and run.rank else None
    end = {"kill": t.sigkill, "signal": t.sigterm}.get(what)
    cache = t.extract(out + "/features", t.videos_in(root), run, net=net, after=after, end=end)
    t.Path(out, f"opened{run.rank}").write_text(f"{t.RECIPE.opened} {cache and cache.bad}")
"""


def two_ranks(root, out, what="run", status=0):
    """What the ranks opened, and which videos were unreadable, of those that came to their end."""
    (out / "ranks.py").write_text(RANKS)
    for old in out.glob("opened*"):
        old.unlink()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}"}
    process = forks.start([sys.executable, out / "ranks.py", root, out, what], HERE, env, ranks=2)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    return [path.read_text() for path in sorted(out.glob("opened*"))]


def test_two_ranks_and_a_signal_to_the_second(root, whole, tmp_path):
    first, second = two_ranks(root, tmp_path, "signal")
    assert first == "[0, 1, 4, 5, 8, 9] None" and second == "[2, 3] None"
    assert two_ranks(root, tmp_path) == [f"[6, 7] {whole.bad}", f"[10] {whole.bad}"]
    assert same(features.load(tmp_path / "features"), whole)


def test_death_of_the_second_of_two_ranks(root, videos, run, whole, tmp_path):
    """The first rank finishes its share and then ends, too."""
    assert not two_ranks(root, tmp_path, "kill", status=1)
    assert names(tmp_path / "features") == incomplete(0, 4, 8)
    assert same(extract(tmp_path / "features", videos, run), whole)


def test_ranks_that_do_not_see_one_folder(videos, run, folder, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "world", 2)  # and the other writes elsewhere
        with pytest.raises(UserError, match=f"{folder} lacks the features of 5 of 11 videos: it must be one"):
            extract(folder, videos, run)
    assert same(extract(folder, videos, run), whole)

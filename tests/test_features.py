"""The feature cache: its values, which kills, signals, full disks and the number of ranks do not change."""

import fcntl
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from common.io import features
from common.io.decode import Video, read_frames
from common.io.features import Extraction
from common.modality import Recipe
from common.run import Run

HERE = Path(__file__).resolve().parent.parent
NAMES = [f"v{i}.mp4" for i in range(11)]
BAD = (4, 6, 7)  # of blocks of two: in one block the first, in one both
CALLS = 5  # blocks that have a readable video


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


@pytest.fixture
def often(monkeypatch):
    """A part file for every block."""
    monkeypatch.setattr(features, "EVERY", 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with Run("features", tmp_path_factory.mktemp("run"), {}) as run:
        yield run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "there" / "features"


@pytest.fixture(scope="module")
def whole(videos, run, tmp_path_factory):
    """The features as one process computes them in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "VIEWS_PER_BATCH", 4)
        return extracted(tmp_path_factory.mktemp("whole") / "features", videos, run)[0]


class Killed(Exception):
    pass


def calls(net, after=None, end=Killed):
    """net.embed, and the list of its calls; after that number of them it raises `end`, or calls it."""
    made = []

    def call(x):
        if len(made) == after:
            if end is Killed:
                raise Killed
            end()
        made.append(len(x))
        return net.embed(x)

    return call, made


def signalled():
    os.kill(os.getpid(), signal.SIGTERM)


def extract(folder, videos, run, call=None, net=None, recipe=RECIPE, **how):
    net = net or Net()
    return features.extract(folder, Extraction(net, call or net.embed, videos, recipe, **how), run)


def killed_after(n, folder, videos, run, **how):
    net = Net()
    with pytest.raises(Killed):
        extract(folder, videos, run, calls(net, n)[0], net, **how)
    RECIPE.opened.clear()


def extracted(folder, videos, run, recipe=RECIPE, **how):
    """(Features, number of calls of the network)."""
    net = Net()
    call, made = calls(net)
    return extract(folder, videos, run, call, net, recipe, **how), len(made)


def same(found, whole):
    assert found.rows.dtype == whole.rows.dtype and np.array_equal(found.rows, whole.rows)
    assert np.array_equal(found.counts, whole.counts) and found.bad == whole.bad
    return True


def names(folder):
    return sorted(path.name for path in folder.iterdir())


COMPLETE = ["features.json", "features.npy", "index.npz", "videos.txt"]


def parts(*first):
    """The names of the part files that begin with these videos."""
    return [f"part-{i:09d}.npz" for i in first]


# ---- what they are ---------------------------------------------------------------------------------


def naive(videos):
    """The features (V, 64) of each video, one view at a time; None if it is unreadable."""
    net, found = Net().eval(), []
    for i in range(len(videos)):
        if i in BAD:
            found.append(None)
            continue
        n = 8 + i
        clips, room = 1 + n % 3, n - 3  # windows of frames f, f + 3
        starts = [room // 2] if clips == 1 else [k * room // clips for k in range(clips)]
        rows = []
        for start in starts:
            clip = read_frames(videos.path(i), [start, start + 3], 16)
            x = (augment.resize_crop(clip, 16, 16).float() / 255 - 0.45) / 0.225
            rows.append(net.embed(x.transpose(0, 1)[None])[0])
        found.append(torch.stack(rows).detach().numpy())
    return found


def test_rows_of_a_naive_loop(videos, run, folder, capsys):
    found, made = extracted(folder, videos, run)
    expected = naive(videos)
    assert found.counts.tolist() == [0 if z is None else len(z) for z in expected]
    assert found.counts.tolist() == [3, 1, 2, 3, 0, 2, 0, 0, 2, 3, 1] and found.counts.dtype == np.int64
    assert found.first.tolist() == [0, 3, 4, 6, 9, 9, 11, 11, 11, 13, 16]
    assert isinstance(found.rows, np.memmap) and found.rows.shape == (17, 64)
    assert found.rows.dtype == np.float32
    assert np.allclose(found.rows, np.concatenate([z for z in expected if z is not None]), atol=1e-6)
    assert np.array_equal(found.rows[found.first[9] :][: found.counts[9]], found.rows[13:16])
    assert sorted(found.bad) == list(BAD) and all(found.bad.values())
    assert made > CALLS  # three and three views are two parts of a block of four
    assert RECIPE.opened == list(range(11)) and names(folder) == COMPLETE
    assert f"3 of 11 videos have no features, v4.mp4: {found.bad[4]}" in capsys.readouterr().out
    assert same(features.load(folder), found)


def test_average_is_the_mean_over_views(videos, run, folder):
    found, _ = extracted(folder, videos, run, average=True)
    readable = [i for i in range(11) if i not in BAD]
    expected = [naive(videos)[i].mean(0) for i in readable]
    assert np.allclose(found.rows, expected, atol=1e-6) and sorted(found.bad) == list(BAD)
    assert found.counts.tolist() == [int(i not in BAD) for i in range(11)]
    half, _ = extracted(folder / "half", videos, run, average=True, half=True)
    assert half.rows.dtype == np.float16 and np.array_equal(half.rows, found.rows.astype(np.float16))
    assert os.path.getsize(folder / "half" / "features.npy") == 128 + 2 * half.rows.size


def test_files_are_readable_without_this_package(videos, run, folder):
    extracted(folder, videos, run, identity={"weights": "abc"})
    about = json.loads((folder / "features.json").read_text())
    assert about["weights"] == "abc" and about["recipe.clips"] == 2 and about["recipe"] == "Uneven"
    assert len(about["videos"]) == 64 and about["half"] is False
    assert (folder / "videos.txt").read_text().splitlines()[:2] == ["v0.mp4 0", "v1.mp4 1"]
    with np.load(folder / "index.npz") as index:
        assert sorted(index.files) == ["bad", "counts", "reasons"]


@pytest.mark.parametrize("call, row, name", [(0, 3, "v1.mp4"), (2, 1, "v3.mp4"), (3, 0, "v5.mp4")])
def test_features_that_are_not_finite(videos, run, folder, call, row, name):
    """Blocks of 3 + 1, 2 + 3, 0 + 2 views; the second takes two calls, of four and of one view."""
    net, count = Net(), iter(range(99))

    def embed(x):
        z = net.embed(x)
        if next(count) == call:
            z[row if row < len(z) else 0] = float("nan")
        return z

    with pytest.raises(UserError, match=f"features of {name} are not finite$"):
        extract(folder, videos, run, embed, net)
    with pytest.raises(UserError, match="v0.mp4 are not finite as float16"):
        extract(folder / "half", videos, run, lambda x: 1e6 * Net.embed(net, x), net, half=True)


def test_no_video_can_be_read(root, run, folder, tmp_path):
    few = videos_in(tmp_path, ["v4.mp4", "v6.mp4"])
    with pytest.raises(UserError, match="none of the 2 videos can be read: no such file"):
        extracted(folder, few, run)
    shutil.copy(root / "v0.mp4", tmp_path / "v6.mp4")  # mended
    found, _ = extracted(folder, few, run)
    assert found.counts.tolist() == [0, 3] and found.bad == {0: "no such file"}
    with pytest.raises(UserError, match="none of the 0 videos"):
        extracted(folder / "empty", videos_in(root, []), run)


def test_no_video_ends_an_extraction(videos, run, folder, whole, monkeypatch):
    """Whatever decoding raises: the others have their features, and the list names its type."""
    get = Video.get

    def fails(self, *args):
        if self.path.endswith("v2.mp4"):
            raise TypeError("of another\nkind")
        return get(self, *args)

    monkeypatch.setattr(Video, "get", fails)
    found, _ = extracted(folder, videos, run)
    assert found.bad == whole.bad | {2: "TypeError: of another"} and found.counts[2] == 0
    rest = np.arange(len(whole.rows)) - whole.first[2]
    assert np.allclose(found.rows, whole.rows[(rest < 0) | (rest >= whole.counts[2])], atol=1e-6)


# ---- kills and signals -----------------------------------------------------------------------------


def test_killed_and_resumed(videos, run, folder, whole, often):
    killed_after(4, folder, videos, run)  # in the block after 4 and 5
    assert names(folder) == ["features.json", *parts(0, 2, 4, 6), "videos.txt"]
    found, made = extracted(folder, videos, run)
    assert same(found, whole) and made == 3 and RECIPE.opened == [8, 9, 10]  # 2 + 3 views are two calls
    assert names(folder) == COMPLETE
    RECIPE.opened.clear()
    assert same(extracted(folder, videos, run)[0], whole) and not RECIPE.opened


def test_parts_hold_a_minute_or_a_quarter_gigabyte(videos, run, folder, monkeypatch):
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    killed_after(6, folder, videos, run)
    assert names(folder) == ["features.json", *parts(0, 4), "videos.txt"]  # 3 x 25 seconds
    monkeypatch.setattr(features, "EVERY", 10**9)
    monkeypatch.setattr(features, "LARGEST", 9 * 64 * 4)  # rows of the first two blocks
    killed_after(6, folder / "large", videos, run)
    assert names(folder / "large") == ["features.json", *parts(0), "videos.txt"]
    with np.load(folder / "large" / "part-000000000.npz") as part:
        assert part["index"].tolist() == [0, 1, 2, 3] and part["rows"].shape == (9, 64)


def test_nothing_of_a_minute_is_lost_to_a_signal(videos, run, folder, whole, capsys):
    net = Net()
    call, made = calls(net, 3, signalled)
    assert extract(folder, videos, run, call, net) is None
    assert len(made) == 4 and RECIPE.opened == list(range(6)) and net.training
    assert names(folder) == ["features.json", *parts(0), "videos.txt"]
    assert f"stopped by a signal; the finished features are kept in {folder}" in capsys.readouterr().out
    with pytest.raises(UserError, match="no complete features, the same command"):
        features.load(folder)
    run.stop = False
    RECIPE.opened.clear()
    found, _ = extracted(folder, videos, run)
    assert same(found, whole) and RECIPE.opened == list(range(6, 11))
    assert f"{folder} has the features of 6 videos already" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cut short", "one bit", "text", "empty"])
def test_damaged_part_is_done_again(videos, run, folder, whole, often, capsys, monkeypatch, kind):
    killed_after(4, folder, videos, run)
    first, path, _, _ = sorted(folder.glob("part-*"))
    first.unlink()  # so that what was in the other comes into a file of another name
    data = bytearray(path.read_bytes())
    if kind == "one bit":
        data[data.index(whole.rows[5].tobytes())] ^= 4
    path.write_bytes({"cut short": data[:-9], "one bit": data, "text": b"no features", "empty": b""}[kind])
    monkeypatch.setattr(features, "EVERY", 60)
    found, _ = extracted(folder, videos, run)
    assert same(found, whole) and RECIPE.opened == [0, 1, 2, 3, 8, 9, 10]
    assert f"{path} is damaged; its features are computed again" in capsys.readouterr().out


def test_part_that_is_damaged_before_the_end(videos, run, folder, whole, often, monkeypatch):
    def damage(*args):
        path = folder / "part-000000002.npz"
        data = bytearray(path.read_bytes())
        data[data.index(whole.rows[5].tobytes())] ^= 4
        path.write_bytes(data)
        return assemble(*args)

    assemble = features._assemble
    with monkeypatch.context() as patch:
        patch.setattr(features, "_assemble", damage)
        with pytest.raises(UserError, match="part-000000002.npz is damaged"):
            extracted(folder, videos, run)
    assert not (folder / "index.npz").exists()
    RECIPE.opened.clear()
    assert same(extracted(folder, videos, run)[0], whole) and RECIPE.opened == [2, 3]


# ---- other features --------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True])
def test_other_features_are_refused(videos, root, run, folder, complete, often):
    how = dict(identity={"weights": "a" * 64})
    if complete:
        extracted(folder, videos, run, **how)
    else:
        killed_after(2, folder, videos, run, **how)
    there = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="videos_per_block 2, not 4"):
        patch.setattr(evaluate, "VIEWS_PER_BATCH", 8)
        extracted(folder, videos, run, **how)
    fewer, plain = videos_in(root, NAMES[:-1]), Recipe(**vars(RECIPE))
    for others, recipe, changes, words in (
        (videos, RECIPE, dict(identity={"weights": "b" * 64}), r"weights a{24}, not b{24}\)"),
        (videos, RECIPE, dict(identity={}), "weights a{24}, not None"),
        (videos, RECIPE, how | dict(average=True), "average False, not True"),
        (videos, RECIPE, how | dict(half=True), "half False, not True"),
        (fewer, RECIPE, how, "videos "),
        (videos, replace(RECIPE, stride=2), how, "recipe.stride 3, not 2"),
        (videos, plain, how, "recipe Uneven, not Recipe"),
    ):
        with pytest.raises(UserError, match=rf"{folder} has other features \({words}.*delete that one"):
            extracted(folder, others, run, recipe, **changes)
    assert not RECIPE.opened or complete
    assert {path: path.read_bytes() for path in folder.iterdir()} == there


def test_a_mistake_before_the_first_part_can_be_mended(videos, run, folder, whole):
    killed_after(1, folder, videos, run, identity={"weights": "wrong"})
    assert names(folder) == ["features.json", "videos.txt"]
    assert same(extracted(folder, videos, run)[0], whole)


def test_features_of_unknown_origin(videos, run, folder, often):
    killed_after(2, folder, videos, run)
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match="unknown origin"):
        extracted(folder, videos, run)
    (folder / "features.json").unlink()
    with pytest.raises(UserError, match="unknown origin"):
        extracted(folder, videos, run)


def test_network_of_another_width(videos, run, folder, often):
    """If the identity is the same by mistake."""
    killed_after(2, folder, videos, run)
    net = Net()
    with pytest.raises(UserError, match="two networks"):
        extract(folder, videos, run, lambda x: net.embed(x)[:, :32], net)


def test_complete_features_need_nothing(videos, run, folder, whole, often, monkeypatch):
    extracted(folder, videos, run)
    shutil.copy(folder / "index.npz", folder / "part-000000000.npz")  # as a kill just before the end leaves
    monkeypatch.setattr(evaluate, "blocks", None)
    assert same(features.extract(folder, Extraction(None, None, videos, RECIPE), run, workers=3), whole)
    assert names(folder) == COMPLETE


def test_damaged_features(videos, run, folder):
    with pytest.raises(UserError, match="has no complete features$"):
        features.load(folder)
    extracted(folder, videos, run)
    rows, index = folder / "features.npy", folder / "index.npz"
    data = rows.read_bytes()
    fewer = data.replace(b"(17, 64)", b"(16, 64)")[: -64 * 4]
    for path, wrong in ((rows, data[:-1]), (rows, data[:64]), (rows, b""), (rows, fewer), (index, b"text")):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="damaged: delete"):
            features.load(folder)
        rows.write_bytes(data)
    rows.unlink()
    with pytest.raises(UserError, match="damaged: delete"):
        features.load(folder)


def test_two_runs_in_one_folder(videos, run, folder, whole):
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is computing"):
        extracted(folder, videos, run)
    os.close(lock)
    found, _ = extracted(folder, videos, run)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go
    assert same(extracted(folder, videos, run)[0], whole)  # what is complete is everybody's
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


def test_disk_that_cannot_take_a_part(videos, run, folder, whole, often, monkeypatch):
    savez, count = np.savez, iter(range(99))

    def full(file, **arrays):
        savez(file, **arrays)
        if next(count) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(features.np, "savez", full)
        sentence = r"part-000000004.npz cannot be written: No space left on device; .* same command resumes"
        with pytest.raises(UserError, match=sentence):
            extracted(folder, videos, run)
    assert names(folder) == ["features.json", *parts(0, 2), "videos.txt"]
    RECIPE.opened.clear()
    assert same(extracted(folder, videos, run)[0], whole) and RECIPE.opened == list(range(4, 11))


def test_disk_that_cannot_take_the_whole(videos, run, folder, whole, often):
    with disk_of(4000), pytest.raises(UserError, match="cannot be written: File too large"):
        extracted(folder, videos, run)
    assert len(list(folder.glob("part-*.npz"))) == 6 and not list(folder.glob("*.tmp"))
    RECIPE.opened.clear()
    assert same(extracted(folder, videos, run)[0], whole) and not RECIPE.opened


def test_folder_that_cannot_be_made(videos, run, folder):
    folder.parent.write_text("a file")
    with pytest.raises(UserError, match=f"{folder} cannot be written"):
        extracted(folder, videos, run)
    assert not RECIPE.opened


def test_progress_in_words(videos, run, folder, often, capsys, monkeypatch):
    def said():
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if "time left" in line]
        assert all(line[:2] + line[3:6] == "features of of 11 videos,".split() for line in lines)
        return [(int(line[2]), line[-1]) for line in lines]

    seconds = iter(range(0, 10**4, 10))  # of a clock that is looked at twice a block
    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    killed_after(3, folder, videos, run)
    assert said() == [(2, "0:01:40"), (4, "0:01:20")]  # five blocks are left, then four
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(run, "world", 2)
        extracted(folder, videos, run)
    assert said() == [(8, "0:00:20"), (11, "0:00:00")]  # two of them are this rank's


# ---- several processes -----------------------------------------------------------------------------

RANKS = """
import os, signal, sys, zlib
import test_features as t
from common import evaluate
from common.io import features, files
from common.run import Run

root, out, what, n = sys.argv[1:]
evaluate.VIEWS_PER_BATCH, features.EVERY = 4, 60 if what == "run" else 0
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

def before(function, name):
    def instead(*paths, **how):
        if str(paths[-1]).endswith(name):
            kill()
        return function(*paths, **how)
    return instead

with Run("features", out + "/run", {}) as run:
    if what == "replace":
        files.os.replace = before(os.replace, n)
    elif what == "unlink":
        t.Path.unlink = before(t.Path.unlink, n)
    net = t.Net()
    net.norm.running_mean += run.rank  # which counts for nothing on rank 1
    end = {"kill": kill, "kill one": kill, "signal one": t.signalled}.get(what)
    call, made = t.calls(net, int(n) if end and (what == "kill" or run.rank) else None, end)
    found = t.extract(out + "/features", t.videos_in(root), run, call, net)
    said = run.rank, len(made), t.RECIPE.opened, found and zlib.crc32(found.rows), found and found.bad
    t.Path(out, f"said{run.rank}").write_text(" ".join(map(str, said)))
"""


def ranks(n, root, out, what="run", after="", status=0):
    """What each rank says at its end, if it comes to that."""
    (out / "ranks.py").write_text(RANKS)
    for old in out.glob("said*"):
        old.unlink()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}"}
    process = forks.start([sys.executable, out / "ranks.py", root, out, what, after], HERE, env, n)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    return [path.read_text() for path in sorted(out.glob("said*"))]


def test_two_ranks(root, whole, tmp_path):
    first, second = ranks(2, root, tmp_path)
    assert first.startswith("0 4 [0, 1, 4, 5, 8, 9] ") and second.startswith("1 3 [2, 3, 6, 7, 10] ")
    assert first.split("]")[1] == second.split("]")[1] and str(whole.bad) in first
    assert same(features.load(tmp_path / "features"), whole)


def test_ranks_that_do_not_see_one_folder(videos, run, folder, whole, often, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "world", 2)  # and the other writes elsewhere
        with pytest.raises(UserError, match=f"{folder} lacks the features of 5 of 11 videos: it must be one"):
            extracted(folder, videos, run)
    assert same(extracted(folder, videos, run)[0], whole)


def test_two_ranks_are_killed_and_one_goes_on(root, videos, run, whole, tmp_path):
    ranks(2, root, tmp_path, "kill", 2, status=-signal.SIGKILL)
    assert sorted(path.name for path in (tmp_path / "features").glob("part-*")) == parts(0, 2, 4, 6)
    found, _ = extracted(tmp_path / "features", videos, run)
    assert same(found, whole) and RECIPE.opened == [8, 9, 10]


def test_signal_to_one_of_two_ranks(root, whole, tmp_path):
    first, second = ranks(2, root, tmp_path, "signal one", 0)
    assert first.endswith("[0, 1, 4, 5, 8, 9] None None") and second.endswith("[2, 3] None None")
    first, second = ranks(2, root, tmp_path)
    assert "[6, 7]" in first and "[10]" in second
    assert same(features.load(tmp_path / "features"), whole)


def test_death_of_one_of_two_ranks(root, videos, run, whole, tmp_path):
    """The other does its share, and does not wait for the dead."""
    assert not ranks(2, root, tmp_path, "kill one", 2, status=1)
    assert sorted(path.name for path in (tmp_path / "features").glob("part-*")) == parts(0, 2, 4, 6, 8)
    found, _ = extracted(tmp_path / "features", videos, run)
    assert same(found, whole) and RECIPE.opened == [10]


@pytest.mark.parametrize("what, name", [("replace", "features.npy"), ("replace", "index.npz"),
                                        ("unlink", "part-000000002.npz")])  # fmt: skip
def test_killed_while_assembling(root, videos, run, whole, tmp_path, what, name):
    ranks(None, root, tmp_path, what, name, status=-signal.SIGKILL)
    folder = tmp_path / "features"
    left = names(folder)
    assert (any(x.startswith(name) for x in left) and left != COMPLETE) if what == "replace" else name in left
    assert ("index.npz" in left) == (what == "unlink")
    found, made = extracted(folder, videos, run)
    assert same(found, whole) and not made and not RECIPE.opened and names(folder) == COMPLETE

"""The frame of a run: checkpoints, resumption, logs, signals, errors."""

import errno
import importlib
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch

from common import run as run_module
from common.data import Videos
from common.errors import UserError, VideoError, explain
from common.io import files
from common.io.workers import SIGNALS
from common.run import Run, step_seed


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


HERE = Path(__file__).resolve().parent.parent
IDENTITY = {"labelled": "abc", "classes": 3}


def start(path, code, *words, ranks=None):
    """A script of this code at this path, in a process of its own or one for each rank."""
    path.write_text(code)
    return forks.start([sys.executable, path, *words], HERE, os.environ | {"PYTHONPATH": str(HERE)}, ranks)


def small_net(value=0.0):
    net = torch.nn.Linear(4, 3)
    torch.nn.init.constant_(net.weight, value)
    return net


def saved(out, *values):
    """A run folder in which checkpoints of steps 1, 2, ... with these weights were saved."""
    with Run("cmpl", out, {}) as run:
        for step, value in enumerate(values, 1):
            run.save(step, IDENTITY, net=small_net(value))


def resumed(out, script="cmpl", identity=IDENTITY):
    with Run(script, out, {}) as run:
        net = small_net()
        return run.resume(identity, net=net), net.weight[0, 0].item()


def test_what_is_untimed_leaves_the_randomness_of_the_step(tmp_path):
    with Run("cmpl", tmp_path, {}) as run:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with run.untimed():
            torch.rand(9)
        assert torch.equal(torch.rand(4), expected)


def damage(kind, path):
    data = bytearray(path.read_bytes())
    if kind == "cut short":
        data = data[: len(data) // 2]
    elif kind == "one bit":  # in the middle of the weights, where torch.load sees nothing
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
        lengths = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        data[info.header_offset + 30 + sum(lengths) + info.file_size // 2] ^= 4
    else:
        data = b""
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut short", "one bit", "empty"])
def test_damaged_newest_falls_back(kind, tmp_path, capsys):
    saved(tmp_path, 1.0, 2.0)
    damage(kind, tmp_path / "last.pt")
    assert resumed(tmp_path) == (1, 1.0)
    assert "trying the one before" in capsys.readouterr().out
    with Run("cmpl", tmp_path, {}) as run:  # and the damaged one never takes the place of the good one
        run.save(2, IDENTITY, net=small_net(2.0))
    assert resumed(tmp_path) == (2, 2.0)
    for name in ("last.pt", "last.prev.pt"):
        damage(kind, tmp_path / name)
    with Run("cmpl", tmp_path, {}) as run, pytest.raises(UserError, match="every checkpoint"):
        run.resume(IDENTITY, net=small_net())


def test_foreign_checkpoints_are_refused(tmp_path):
    saved(tmp_path, 1.0)
    with Run("cmpl", tmp_path, {}) as run:
        with pytest.raises(UserError, match="labelled.txt"):
            run.resume(IDENTITY | {"labelled": "other"}, net=small_net())
        with pytest.raises(UserError, match="the unlabelled videos are not those of .*last.pt"):
            run.resume(IDENTITY | {"unlabelled": "other"}, net=small_net())
        with pytest.raises(UserError, match="classes 3, not 5"):
            run.resume(IDENTITY | {"classes": 5}, net=small_net())
        run.script = "mml"
        with pytest.raises(UserError, match="checkpoint of cmpl, not of mml"):
            run.resume(IDENTITY, net=small_net())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saved(tmp_path, 1.0)
    with Run("cmpl", tmp_path, {}) as run, pytest.raises(UserError, match="not finite after step 2"):
        run.save(2, IDENTITY, net=small_net(float("nan")))
    assert resumed(tmp_path) == (1, 1.0)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_malicious_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Malicious()}, "last.pt")
    with pytest.raises(UserError, match="cannot be loaded safely"):
        files.load("last.pt")
    assert not os.path.exists("owned")


SAVER = """
import sys, torch
from common.run import Run
with Run("cmpl", sys.argv[1], {}) as run:
    net = torch.nn.Linear(1000, 1000)
    for step in range(1, 10**6):
        torch.nn.init.constant_(net.weight, step)
        run.save(step, {}, net=net)
        with open(sys.argv[2], "a") as said:
            print(step, file=said)
"""


def test_kill_9_while_saving(tmp_path):
    """Killed at random moments of a loop that does nothing but save, there is always a whole checkpoint."""
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for i in range(6):
        said = tmp_path / f"said{i}"
        child = start(tmp_path / "saver.py", SAVER, out, said)
        while not said.exists() or "\n" not in said.read_text():
            assert child.poll() is None, child.communicate()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        done = [int(line) for line in said.read_text().split("\n")[:-1]]
        with Run("cmpl", out, {}) as run:
            net = torch.nn.Linear(1000, 1000)
            step = run.resume({}, net=net)
        assert step >= done[-1] and bool((net.weight == step).all())
        assert not list(out.glob("*.tmp"))


@contextmanager
def largest_file(size):
    """A write that would make a file larger is cut there, as on a full disk."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


class FullDisk(io.FileIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_that_cannot_take_a_checkpoint(tmp_path):
    """Training goes on with the old file, and the run ends with status 1 and a sentence."""
    saved(tmp_path, 1.0)
    with pytest.raises(SystemExit) as end, Run("cmpl", tmp_path, {}) as run:
        with largest_file(500):
            run.save(2, IDENTITY, net=small_net(2.0))
        assert "step 2 is not in" in run.save_failed
    assert end.value.code == 1
    assert resumed(tmp_path) == (1, 1.0) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("number, tolerated", [(errno.EINVAL, True), (errno.EIO, False)])
def test_folder_that_cannot_be_synced(tmp_path, monkeypatch, number, tolerated):
    """CIFS and VirtualBox say EINVAL; a disk that fails is no such file system."""

    def fsync(descriptor, real=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if tolerated else pytest.raises(OSError, match="Input/output error"):
        files.write(tmp_path / "a.txt", "a")


def begun(out, args, name="last.pt"):
    """A run folder with a checkpoint, or with a result, of these flags."""
    with Run("cmpl", out, args) as run:
        run.save(1, IDENTITY, net=small_net()) if name == "last.pt" else run.result({"top1": 1.0})


@pytest.mark.parametrize("flag, before, now", [
    ("data", "w/tiny", "w/tiny/"), ("data", "a/one,b/two", "c/one,c/two"), ("root", None, "/scratch/1"),
    ("labelled_list", "a/few.txt", "/b/few.txt"),
])  # fmt: skip
def test_data_that_are_elsewhere_can_be_the_same(tmp_path, flag, before, now):
    """Their identity decides, of a checkpoint and of a result."""
    begun(tmp_path, {flag: before})
    with Run("cmpl", tmp_path, {flag: now}) as run:
        assert run.resume(IDENTITY, net=small_net()) == 1
        assert not run.finished(IDENTITY)
        run.result({"top1": 1.0})
        assert run.finished(IDENTITY)
        with pytest.raises(UserError, match="classes 3, not 5"):
            run.finished(IDENTITY | {"classes": 5})


@pytest.mark.parametrize("flag, before, now", [
    ("data", "w/tiny", "w/other"), ("labelled_list", None, "few.txt"), ("labelled_list", "few.txt", None),
    ("data", "one,two", "two,one"), ("init", "a/model.pt", "b/model.pt"), ("lr", 0.1, 0.2),
    ("lr_steps", [1, 2], [1, 3]), ("net", "r3d_18", "r3d_10"),
])  # fmt: skip
def test_what_is_something_else_is_refused(tmp_path, flag, before, now):
    begun(tmp_path, {flag: before, "workers": 2})
    said = re.escape(f"--{flag} {before}, not {now}")
    config = {flag: before, "workers": 4}
    with Run("cmpl", tmp_path, config, ["workers"]) as run, pytest.raises(UserError, match=said):
        run.config = config | {flag: now}
        run._check_config()


def test_a_result_without_a_checkpoint_does_not_know_what_data_are(tmp_path):
    begun(tmp_path, {"data": "a/tiny"}, "result.json")
    with Run("cmpl", tmp_path, {"data": "a/tiny"}) as run, pytest.raises(UserError, match="not b/tiny"):
        run.config = {"data": "b/tiny"}
        run._check_config()


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def unable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unable)
    with Run("cmpl", tmp_path, {}):
        pass
    assert "cannot be locked" in capsys.readouterr().out


def test_other_number_of_ranks_goes_on_at_the_same_sample(tmp_path, capsys):
    saved(tmp_path, *range(1, 8))
    with Run("cmpl", tmp_path, {}) as run:
        run.world = 2  # as far as the arithmetic goes
        assert run.resume(IDENTITY, net=small_net()) == 3
    assert "with 2 it is step 3" in capsys.readouterr().out


def test_more_processes_than_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="nproc_per_node 1"):
        Run("cmpl", tmp_path, {})._join_group()


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_log_on_a_full_disk(tmp_path, monkeypatch):
    """No half a row is left, and the next row that the disk takes brings those before it."""
    with Run("cmpl", tmp_path, {}) as run:
        monkeypatch.setattr(run, "say", lambda _: None)  # standard output is a file here
        run.log({"step": 1})
        with largest_file(len('{"step": 1}\n') + 5):
            run.log({"step": 2})
            run.log({"step": 3})
        assert rows(tmp_path) == [{"step": 1}]
        run.log({"step": 4})
        assert rows(tmp_path) == [{"step": n} for n in (1, 2, 3, 4)]


def test_log_on_a_disk_that_stays_full(tmp_path, capsys):
    with pytest.raises(SystemExit) as end, Run("cmpl", tmp_path, {}) as run:
        shutil.rmtree(tmp_path)
        run.log({"step": 1})
    assert end.value.code == 1 and "log.jsonl could not be written" in capsys.readouterr().err


def test_two_runs_in_one_folder(tmp_path):
    code = "import sys\nfrom common.run import Run\nwith Run('cmpl', sys.argv[1], {}): pass"
    with Run("cmpl", tmp_path / "out", {}):
        other = start(tmp_path / "other.py", code, tmp_path / "out")
        _, err = other.communicate()
    assert other.returncode == 2 and "in use by another run" in err and "Traceback" not in err


def loader(n, bad=()):
    return [[{"bad": list(bad) if k == 1 else []}] for k in range(n)]


def videos(n):
    return Videos.make("/nowhere", [f"v{i}.mp4" for i in range(n)], np.zeros(n))


def saving(run, total, every, start=0, bad=()):
    """The steps of a loop that saves as the scripts do."""
    for step, _ in run.steps(loader(total - start, bad), start, total, 0, [videos(100)]):
        yield step
        if run.due(step + 1, every):
            run.save(step + 1, IDENTITY, net=small_net(1.0))


def test_resumption_forgets_later_rows(tmp_path):
    saved(tmp_path, 1.0, 1.0)
    rows = [{"step": 1}, {"step": 1, "eval": "quick"}, {"step": 2}, {"step": 2, "eval": "quick"}, {"step": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "lo')
    resumed(tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == rows[:3]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_logs_the_same_rows(tmp_path, stop):
    """A row is the mean of the same steps, wherever the run was stopped."""
    losses = np.random.default_rng(0).normal(size=7)
    for out, stops in (("whole", []), ("cut", [stop])):
        for until in (*stops, 7):
            with Run("cmpl", tmp_path / out, {"log_every": 3}) as run:
                start = run.resume(IDENTITY, net=small_net(1.0))
                for step in saving(run, 7, 100, start):
                    run.track(step, 0.1, loss=losses[step], top1=step)
                    run.stop = step + 1 == until < 7
    logs = [rows(tmp_path / out) for out in ("whole", "cut")]
    whole, cut = ([{k: v for k, v in row.items() if "seconds" not in k} for row in found] for found in logs)
    assert cut == whole and [row["step"] for row in whole] == [3, 6, 7]
    assert [row["loss"] for row in whole] == pytest.approx([x.mean() for x in np.split(losses, [3, 6])])
    assert all(row["seconds_compute"] > 0 for found in logs for row in found)


@pytest.mark.parametrize("line", [
    b'{"step": 2, "lo{"step": 2}', b'{"step": 2, "loss": 0.5', b"\0" * 64, b'{"step": 2, "eval": "\xff"}',
    b"3", b"{}",
])  # fmt: skip
def test_damaged_log(tmp_path, capsys, line):
    """A full disk or a power cut leaves such lines; last.pt decides where the run resumes."""
    saved(tmp_path, 1.0, 1.0, 1.0)
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}')
    assert resumed(tmp_path) == (3, 1.0)
    with Run("cmpl", tmp_path, {}) as run:
        run.log({"step": 4})
    assert rows(tmp_path) == [{"step": 1}, {"step": 3}, {"step": 4}]
    assert "log.jsonl: 1 of 3 lines are damaged" in capsys.readouterr().out


@pytest.mark.parametrize("text", [b"", b"\0\0", b'{"top1": "\xff"}', b'{"top1": 1'])
def test_damaged_result(tmp_path, capsys, text):
    (tmp_path / "result.json").write_bytes(text)
    with Run("cmpl", tmp_path, {}) as run:
        assert not run.finished(IDENTITY)
    assert "result.json is damaged" in capsys.readouterr().out


def test_damaged_list_of_bad_videos(tmp_path):
    (tmp_path / "bad_videos.txt").write_text("v1.mp4\tno frames\nv3.m")
    with Run("cmpl", tmp_path, {"log_every": 1}) as run:
        for step, _ in run.steps(loader(3, [(3, "x")]), 0, 3, 0, [videos(100)]):
            run.track(step, 0.1, loss=0.0)
    assert (tmp_path / "bad_videos.txt").read_text() == "v1.mp4\tno frames\nv3.mp4\tx\n"


def test_loss_that_is_not_finite(tmp_path):
    """What the sentence says to do works, and nothing less."""
    begun(tmp_path, {"lr": 0.1})
    with Run("cmpl", tmp_path, {"lr": 0.1, "log_every": 1}, ["log_every"]) as run:
        with pytest.raises(UserError, match="not finite at step 8: loss_u; .*lower --lr in") as found:
            run.track(7, 0.1, loss=torch.tensor(1.0), loss_u=torch.tensor(float("nan")))
        run.config["lr"] = 0.01
        with pytest.raises(UserError, match="another --out"):
            run._check_config()
    for path in tmp_path.parent.glob(str(found.value).split(f"{tmp_path.parent}/")[1]):
        path.unlink()
    with Run("cmpl", tmp_path, {"lr": 0.01}) as run:
        assert run.resume(IDENTITY, net=small_net()) == 0
    assert json.loads((tmp_path / "config.json").read_text())["args"] == {"lr": 0.01}


def test_bad_videos_are_named_once_and_counted(tmp_path):
    found = [(3, "no frames\n of it"), (3, "no frames"), (4, "no such file")]
    for _ in range(2):  # the second time as a resumption
        with Run("cmpl", tmp_path, {"log_every": 1}) as run:
            for step, _ in run.steps(loader(3, found), 0, 3, 0, [videos(100)]):
                row = run.track(step, 0.1, loss=0.0)
        assert row["unreadable"] == 2
        lines = (tmp_path / "bad_videos.txt").read_text().splitlines()
        assert lines == ["v3.mp4\tno frames", "v4.mp4\tno such file"]


def test_too_many_bad_videos(tmp_path):
    run = Run("cmpl", tmp_path, {"log_every": 1, "max_bad": 0.05})
    with run, pytest.raises(UserError, match="2 of 20"):
        for step, _ in run.steps(loader(3, [(0, "x"), (1, "x")]), 0, 3, 0, [videos(20)]):
            run.track(step, 0.1, loss=0.0)


@pytest.mark.parametrize("every, test_every, saved_after", [(2, 0, [2, 4, 5]), (9, 0, [5]), (9, 3, [3, 5])])
def test_when_a_checkpoint_is_due(tmp_path, every, test_every, saved_after):
    """At multiples of `every`, at the last step, and before a test."""
    with Run("cmpl", tmp_path, {}) as run:
        steps = run.steps(loader(5), 0, 5, 0, [videos(1)], test_every)
        assert [step + 1 for step, batch in steps if batch and run.due(step + 1, every)] == saved_after


@pytest.mark.parametrize(
    "start, total, tested_after", [(0, 5, [2, 4, 5]), (4, 5, [4, 5]), (5, 5, [5]), (0, 0, [0])]
)
def test_when_a_quick_test_is_due(tmp_path, start, total, tested_after):
    """Also at the step of a checkpoint, which a resumption begins with, and after the last."""
    with Run("cmpl", tmp_path, {}) as run:
        steps = [*run.steps(loader(total - start), start, total, 0, [videos(1)], 2)]
    assert [step for step, batch in steps if batch is None] == tested_after
    assert [step for step, batch in steps if batch is not None] == [*range(start, total)]


def test_a_signal_during_a_quick_test_ends_the_loop_there(tmp_path):
    with Run("cmpl", tmp_path, {}) as run:
        for step, batch in run.steps(loader(9), 0, 9, 0, [videos(1)], 4):  # noqa: B007
            run.stop = batch is None
        assert step == 4 and run.stopped


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_ends_after_the_step(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)
    with Run("cmpl", tmp_path, {}) as run:
        for step in saving(run, 9, 9):
            if step == 2:
                os.kill(os.getpid(), number)
        assert run.stopped and step == 2 and files.load(tmp_path / "last.pt")["step"] == 3
    signal.signal(number, before)


def test_nohup_keeps_its_promise(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Run("cmpl", tmp_path, {}):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """Besides those of each epoch, one after the first step that ends so many minutes after the last."""
    saved_after, clock = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Run("cmpl", tmp_path, {"save_minutes": 10}) as run:
        monkeypatch.setattr(files, "save", lambda state, *_, **__: saved_after.append(state["step"]))
        for _ in saving(run, 9, 7):
            clock[0] += 60 * 4
    assert saved_after == [3, 6, 7, 9]


TALKS = """
import os, sys
sys.stdout.flush()
how, out = sys.argv[1:]
if how == "closed":
    for number in (0, 1, 2):
        os.close(number)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None  # as an interpreter then has it
elif how == "broken":
    reader, writer = os.pipe()
    os.close(reader)
else:
    writer = os.open("/dev/full", os.O_WRONLY)
if how != "closed":
    os.dup2(writer, 1)
    os.dup2(writer, 2)

import warnings
from common.run import Run
with Run("cmpl", out, {"log_every": 1}) as run:
    for step, _ in run.steps([[]] * 99, 0, 99, 0, []):
        run.track(step, 0.1, loss=0.0)
        print("x" * 99, file=sys.stderr)
    warnings.warn("y")
    assert min(os.open(os.devnull, os.O_RDONLY), run.lock.fileno()) > 2
"""


@pytest.mark.parametrize("how", ["closed", "broken", "full"])
def test_output_that_nobody_takes(tmp_path, how):
    """`>&-`, `| head -1`, a full disk: the run goes on and ends with status 0."""
    process = start(tmp_path / "talks.py", TALKS, how, tmp_path / "out")
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(rows(tmp_path / "out")) == 99


ALONE = """
import sys
from common.run import Run
with Run("cmpl", sys.argv[1], {}) as run:
    print("ranks", run.world)
"""


@pytest.mark.parametrize("left, status, words", [
    ({"RANK": "0"}, 2, "unset RANK"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, 2, "unset RANK"),
    ({"WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 0, "ranks 1"),
])  # fmt: skip
def test_environment_of_ranks_without_the_ranks(tmp_path, monkeypatch, left, status, words):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    process = start(tmp_path / "alone.py", ALONE, tmp_path / "out")
    printed, err = process.communicate(timeout=120)
    assert process.returncode == status and words in printed + err and "Traceback" not in err


COMPILES = """
import sys, torch
from common.run import Run
with Run("cmpl", sys.argv[1], {}) as run:
    run.distribute(torch.nn.Linear(2, 2), compile=True)(torch.zeros(1, 2))
"""


def test_compile_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    process = start(tmp_path / "compiles.py", COMPILES, tmp_path / "out")
    _, err = process.communicate(timeout=240)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 2 and "--compile" in last and "compiler" in last and "Traceback" not in err


def test_one_value_of_a_channel_in_batch_norm():
    with pytest.raises(ValueError) as failed:
        torch.nn.BatchNorm3d(2)(torch.zeros(1, 2, 1, 1, 1))
    sentence, status = explain(failed.value)
    assert sentence.startswith("batch norm needs more than one value") and status == 2


FAILS = """
import itertools, sys, time
from pathlib import Path

import numpy as np
import torch

from common.clips import Clips, train_loader
from common import run as run_module
from common.data import Videos
from common.run import Run

out, root, where = Path(sys.argv[1]), *sys.argv[2:]
SIZES = itertools.count(1)


def fail(place):
    class Local(Exception):  # cannot be sent to another process
        pass

    if place in where.split():
        (out / f"failed{time.time_ns()}").touch()
        raise (Local if "local" in where else TypeError)("a bug in " + place)


def sample(source, rng):
    fail("sample")
    return [np.arange(2)]


def view(clips):
    fail("view")
    if where == "batch":  # a result that cannot be sent
        return (type("Word", (str,), {})(),)
    return clips if where != "collate" else (torch.zeros(next(SIZES)),)


if __name__ == "__main__":
    with Run("cmpl", out, {}) as run:
        net = run.distribute(torch.nn.Linear(3, 2))
        videos = Videos.make(root, ["a.mp4"] * 8, np.zeros(8, np.int64))
        loader = train_loader([(Clips(videos, sample, view, 0), 4)], 0, 9, run.rank, run.world, 2)
        for step, (batch,) in run.steps(loader, 0, 9, 0, [videos]):
            net(batch["views"][0].float().mean((1, 3, 4))).sum().backward()
            fail("main")
"""


FAILURES = {  # where -> what standard error has
    "sample": "TypeError: a bug in sample",
    "view": "TypeError: a bug in view",
    "collate": "RuntimeError: stack expects",
    "view local": "Local: a bug in view",
    "batch": "a loader worker cannot send a batch: PicklingError",
}
CASES = [(where, None) for where in FAILURES] + [(where, 2) for where in ("sample", "view", "collate")]


@pytest.mark.parametrize("where, ranks", CASES)
def test_an_exception_ends_the_run(tmp_path, make, where, ranks):
    """Status 1, the traceback of the worker that raised, and no process is left behind."""
    make.write(tmp_path / "a.mp4", 4)
    process = start(tmp_path / "fails.py", FAILS, tmp_path / "out", tmp_path, where, ranks=ranks)
    _, err = process.communicate(timeout=120)
    ended = time.time_ns()
    assert set(process.codes.values()) == {1} and FAILURES[where] in err, err
    assert ("Traceback" in err) == (where != "batch")
    failed = [int(path.name[6:]) for path in (tmp_path / "out").glob("failed*")]
    assert ended - min(failed, default=ended) < 40e9  # ns
    until = time.monotonic() + 20
    for pid in process.pids:  # each leads a session
        while subprocess.run(["pgrep", "-s", str(pid)], capture_output=True).stdout:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_workers_start_under_a_long_tmpdir(tmp_path, make, monkeypatch):
    """The path of a socket has at most 107 characters; batch systems have temporary folders of more."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    make.write(tmp_path / "a.mp4", 4)
    process = start(tmp_path / "fails.py", FAILS, tmp_path / "out", tmp_path, "main")
    _, err = process.communicate(timeout=120)
    assert "a bug in main" in err and process.returncode == 1  # it comes after the first batch


def test_step_randomness_depends_on_all_three():
    seeds = {step_seed(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**31, 5, 7)]}
    assert len(seeds) == 5 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("error, status, words", [
    (UserError("--x is wrong"), 2, "--x is wrong"),
    (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), 1, "another rank has died"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "--workers"),
    (RuntimeError("DataLoader timed out after 600 seconds"), 1, "--workers"),
    (RuntimeError("unable to allocate shared memory(shm) for file </t>: No space left on device"), 1, "shm"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nstack expects"), None, None),
    (VideoError("Caught VideoError in DataLoader worker process 0.\nTraceback\n"
                "common.errors.VideoError: 10 videos in a row are unreadable"), 2, "10 videos in a row"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "--batch"),
    (OSError(28, "No space left on device", "runs/x/log.jsonl"), 1, "runs/x/log.jsonl"),
    (RuntimeError("shape mismatch"), None, None),
])  # fmt: skip
def test_errors_as_sentences(error, status, words):
    sentence, code = explain(error)
    assert code == status and (words is None or words in sentence)


def test_changed_code_never_passes_for_the_old(tmp_path, monkeypatch, capsys):
    """Neither as a finished run nor as one that is resumed; the flags of a script say what to do."""
    begun(tmp_path, {"resume_changed": True})
    with Run("cmpl", tmp_path, {"resume_changed": True}, ["resume_changed"]) as run:
        run.code = "other code"
        run.config = {"resume_changed": False}
        with pytest.raises(UserError, match="holds a run of code .*, not other code; nothing was run"):
            run._check_config()
        run.config = {"resume_changed": True}
        run._check_config()
        assert run.resume(IDENTITY, net=small_net()) == 1 and not run.finished(IDENTITY)
        run.result({"top1": 1.0})
    assert "code=other code" in capsys.readouterr().out
    with Run("cmpl", tmp_path, {"resume_changed": True}, ["resume_changed"]) as run:
        assert run.finished(IDENTITY) and "by code other code" in capsys.readouterr().out
    with Run("cmpl", tmp_path, {"resume_changed": False}, ["resume_changed"]) as run:
        run.code = "newer code"
        with pytest.raises(UserError, match="holds a finished run of code"):
            run._check_config()


def test_the_code_of_a_run_is_its_script_and_common(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("mine")
    before = run_module.digest_of_code("mine")
    assert before == run_module.digest_of_code("mine") != run_module.digest_of_code("cmpl")
    (tmp_path / "mine.py").write_text("x = 2")
    assert before != run_module.digest_of_code("mine") and len(before) == 12


@pytest.mark.parametrize("seconds, sentence", [(0.5, "about 1 minutes here\n"), (50, "without a GPU")])
def test_a_run_says_how_long_it_takes(tmp_path, capsys, seconds, sentence):
    with Run("cmpl", tmp_path, {"log_every": 1}) as run:
        for step, _ in run.steps(loader(90), 0, 90, 0, [videos(1)]):
            run.mark -= seconds * (step == 0)
            run.track(step, 0.1, loss=0.0)
    said = capsys.readouterr().out
    assert said.count("steps to go") == 1 and "89 steps to go" in said and sentence in said


def test_on_a_full_disk_the_oldest_checkpoint_makes_room(tmp_path, monkeypatch):
    saved(tmp_path, 1.0, 2.0)
    with Run("cmpl", tmp_path, {}) as run, monkeypatch.context() as patch:

        def full(path, mode):
            return (FullDisk if (tmp_path / "last.prev.pt").exists() else io.FileIO)(path, mode)

        patch.setattr(files, "open", full, raising=False)
        run.save(3, IDENTITY, net=small_net(3.0))
    assert resumed(tmp_path) == (3, 3.0) and not (tmp_path / "last.prev.pt").exists()


def test_model_on_a_full_disk(tmp_path, monkeypatch):
    """torch.save hides what the disk says; the sentence names the file and the space needed."""
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError) as failed:
        files.save({"net": torch.nn.Linear(1000, 1000).state_dict()}, tmp_path / "model.pt")
    sentence, status = explain(failed.value)
    assert str(tmp_path / "model.pt") in sentence and "4.0 MB are needed" in sentence and status == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError) as failed:
        files.write(tmp_path / "result.json", "{}")
    assert str(tmp_path / "result.json") in explain(failed.value)[0]


@pytest.mark.parametrize("free, fits", [(190e3, False), (200e3, True)])
def test_space_is_checked_before_training(tmp_path, monkeypatch, free, fits):
    """For three checkpoints with Adam's two moments, and for model.pt: 10 times 20 kB of weights."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1e6, free=free))
    net = torch.nn.Linear(1000, 5, bias=False)
    optimizer = torch.optim.AdamW(net.parameters())
    with Run("cmpl", tmp_path, {}) as run:
        with nullcontext() if fits else pytest.raises(UserError, match=r"0.2 MB free.* need 0.2 MB"):
            run.resume(IDENTITY, net=net, optimizer=optimizer)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_mistake_leaves_no_new_run_folder(tmp_path, leave, is_new):
    out = tmp_path / "out"
    if not is_new:
        out.mkdir()
    with pytest.raises(SystemExit, match="no data set"), Run("cmpl", out, {}):
        raise UserError("there is no data set")
    assert out.exists() != is_new and tmp_path.exists()

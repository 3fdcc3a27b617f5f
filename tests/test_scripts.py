"""Rules that hold for every script, on a small toy set.

What a script can get wrong is tested for all of them; what is common/run.py's alone, for the first. A run is
`fresh`, started as a user starts it, once for each script and where the test is about torchrun (a fork,
its ranks are not); the others fork from an interpreter that has imported torch (forks.py).
RANKS_2_RUNS (default 6) is how many finished runs of two ranks must all leave with status 0.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import forks
import pytest
import torch

from common.io import toy

HERE = Path(__file__).resolve().parent.parent
TINY = {
    "cmpl": "--per_class 2 --width 0.0625 --aux_width 0.0625 --size 16 --test_size 16 --jitter 20 24 "
    "--batch 2 --mu 2 --epochs 8 --clips 1 --tau 0.2 --log_every 2 --eval_every 2 --workers 0",
    "tg_distill": "--per_class 2 --width 0.0625 --size 16 --test_size 16 --batch 2 --mu 2 --unlabelled rest "
    "--epochs 6 --clips 1 --tau 0.1 --warmup 1 --sup_warmup 1 --precise_bn 10 --log_every 2 --eval_every 3 "
    "--workers 0",
    "mml": "--per_class 2 --nets rgb,diff --width 0.0625 --size 16 --test_size 16 --batch 4 --epochs 8 "
    "--warmup 1 --clips 1 --uniform 1 --log_every 2 --eval_every 4 --workers 0",
    "motionfit": "--per_class 2 --modality rgb --width 0.0625 --size 16 --stretch 20 24 --frames 4 "
    "--clusters 8 --batch 4 --multi_clips 2 --epochs 4 --clips 1 --log_every 2 --eval_every 2 "
    "--max_bad 0.1 --workers 0",
    "jedi": "--per_class 2 --net resnet3d10 --expert_flags width=0.0625 size=16 test_size=16 jitter=20,24 "
    "frames=4 clips=1 crops=1 epochs=0.2 eval_every=0 --hidden 8 --batch 8 --epochs 60 --burn_in 1 "
    "--log_every 2 --eval_every 30 --workers 0",
}
# What the last line of log.jsonl, a quick test, says of the networks.
LOGGED = {
    "cmpl": {"pri_top1", "aux_top1", "test_kept_aux", "test_agree"},
    "tg_distill": {"rgb_top1", "tg_top1"},
    "mml": {"rgb_top1", "diff_top1"},
    "motionfit": {"val_top1"},
    "jedi": {"toy_expert_mAP", "toy_student_top1", "toy_teacher_top5"},
}
TINY_EXPERT = shlex.split(TINY["jedi"])[5:10]
SCRIPTS = list(TINY)
FIRST = SCRIPTS[0]


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "toy"
    toy.make(root, train_per_class=4, val_per_class=1, test_per_class=2)
    return root


@pytest.fixture
def broken_root(toy_root, tmp_path):
    """The same set with one training video cut short, one test video that is a web page."""
    root = tmp_path / "broken"
    shutil.copytree(toy_root, root)
    train, test = (
        [line.rsplit(maxsplit=1)[0] for line in (root / f"{part}.txt").read_text().splitlines()]
        for part in ("train", "test")
    )
    (root / train[1]).write_bytes((root / train[1]).read_bytes()[:200])
    (root / test[1]).write_text("<html>404</html>")
    return root, train[1], test[1]


def command(script, root, out, *flags):
    return [sys.executable, f"{HERE / script}.py", "--data", "toy", "--root", str(root), "--out", str(out),
            *shlex.split(TINY[script]), *flags]  # fmt: skip


def torchrun(call, *flags):
    return [call[0], "-m", "torch.distributed.run", *flags, *call[1:]]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE)}


def start(call, ranks=None, fresh=False):
    if not fresh:
        return forks.start(call, HERE, environment(), ranks)
    if ranks:  # torchrun, which is not ours, is a fork; the ranks that it starts are not
        return start(torchrun(call, "--standalone", "--nproc_per_node", str(ranks)))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(call, cwd=HERE, env=environment(), start_new_session=True, **pipes)


def run(*args, status=0, **how):
    process = start(command(*args), **how)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for pid in getattr(process, "pids", [process.pid]):
            with suppress(ProcessLookupError):  # the others of its group may have ended
                os.killpg(pid, signal.SIGKILL)
        raise
    assert process.returncode == status, out + err
    return out, err


def made(script, out):
    """Where a run leaves its network: jedi.py has one for each data set."""
    return out / "toy" if script == "jedi" else out


def quick_log_of(script, out):
    """The folder whose log has quick tests: motionfit.py's last stage learns from all labels and has none."""
    return out / "generator" if script == "motionfit" else out


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(out):
    """The rows of the log without what they say of time."""
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows(out)]


def wait_for_rows(out, n, process):
    """Until the log of a running process has n rows."""
    until = time.time() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < n:
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.02)


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def checkpoint(out):
    return torch.load(out / "last.pt", weights_only=True)


SAYS = """
import atexit, json, multiprocessing, os, signal, sys, threading
atexit.register(print, "at exit")
open_files = sorted(os.listdir("/proc/self/fd"))
found = {"threads": len(os.listdir("/proc/self/task")), "thread": threading.current_thread().name}
found |= {"name": __name__, "file": sys.modules["__main__"].__file__, "argv": sys.argv, "path": sys.path}
found |= {"environment": sorted(os.environ), "folder": os.getcwd(), "files": open_files}
found |= {"signals": [str(signal.getsignal(number)) for number in range(1, 32)]}
found |= {"process": multiprocessing.current_process().name, "parent": multiprocessing.parent_process()}
found |= {"leader": os.getpid() == os.getsid(0) == os.getpgid(0), "terminal": sys.stderr.isatty()}
found |= {"ours": [name for name in sys.modules if name.split(".")[0] in ("common", "pytest", "forks")]}
print(json.dumps(found))
{}
"""


ENDS = "", "sys.exit(3)", "sys.exit('why')", "1 / 0", "os._exit(7)", "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_is_a_new_interpreter(tmp_path, end):
    (tmp_path / "says.py").write_text(SAYS.replace("{}", end))
    call = [sys.executable, str(tmp_path / "says.py"), "a", "--b"]
    fresh, fork = start(call, fresh=True), start(call)
    (out, err), (out_fork, err_fork) = (process.communicate(timeout=240) for process in (fresh, fork))
    said, said_fork = (text.split("\n", 1) for text in (out, out_fork))
    assert json.loads(said_fork[0]) == json.loads(said[0]) and json.loads(said[0])["threads"] == 1
    assert (said_fork[1:], fork.returncode) == (said[1:], fresh.returncode)
    assert err_fork.splitlines()[-1:] == err.splitlines()[-1:]


def test_forks_share_no_randomness(tmp_path):
    (tmp_path / "draws.py").write_text(
        "import numpy, random, torch\n"
        "print(hash('a'), numpy.random.rand(), random.random(), torch.rand(1).item(), sep='\\n')"
    )
    draws = [start([sys.executable, str(tmp_path / "draws.py")]).communicate()[0].split() for _ in range(2)]
    assert all(a != b for a, b in zip(*draws, strict=True)) and len(draws[0]) == 4


@pytest.fixture(scope="session", params=SCRIPTS)
def finished(request, toy_root, tmp_path_factory):
    """(script, run folder, what it printed) of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("finished") / request.param
    printed, _ = run(request.param, toy_root, out, fresh=True)
    return request.param, out, printed


def test_run_folder_is_complete(finished, toy_root):
    script, out, printed = finished
    names = "config.json labelled.txt log.jsonl last.pt model.pt result.json per_class.csv predictions.csv"
    folder = made(script, out)
    assert set(names.split()) <= {path.name for path in [*out.iterdir(), *folder.iterdir()]}
    result = json.loads((out / "result.json").read_text())
    line = [line for line in printed.splitlines() if line.startswith("RESULT ")][-1]  # of the last stage
    assert line.startswith(f"RESULT script={script} data=toy ") and f"top1={result['top1']:.2f}" in line
    assert re.search(r"videos=20 unreadable=0 seconds=\d+$", line)
    test, log = rows(quick_log_of(script, out))[-1], rows(out)
    assert test["eval"] == "quick" and LOGGED[script] <= test.keys()
    steps = [row["step"] for row in log if "eval" not in row]
    assert steps == list(range(2, steps[-1] + 1, 2))
    first = next(row for row in log if "eval" not in row)
    assert {"lr", "loss", "seconds_data", "seconds_compute"} <= first.keys()
    assert len((folder / "labelled.txt").read_text().splitlines()) == 20  # two of each of ten classes
    assert len(list(csv.reader(open(folder / "predictions.csv")))) == 21


BATCH = {"cmpl": 2, "tg_distill": 2, "mml": 4, "motionfit": 4, "jedi": 8}  # of TINY


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_learning_rate_follows_the_clips_of_a_step_over_all_ranks(script, toy_root, tmp_path):
    """One rank with the batch of two has their rate; the screen says it and its rule, the log has it."""
    said, rates = [], []
    for ranks, batch in ((None, 2 * BATCH[script]), (2, BATCH[script])):
        flags, out = f"--lr 0.5 --lr_batch 40 --epochs 0.2 --batch {batch}", tmp_path / f"{ranks}"
        printed, _ = run(script, toy_root, out, *flags.split(), ranks=ranks)
        said.append(re.findall(r"learning rate .* of a step", printed)[-1])
        rates.append(next(row["lr"] for row in rows(out) if "lr" in row))
    clips = 2 * BATCH[script]
    rule = f"learning rate {clips / 80:.4g} = 0.5 x {clips} / 40 "
    assert said[0] == said[1] and said[0].startswith(rule) and rates[0] == rates[1] <= clips / 80


HELP = """
import runpy, sys
path, scripts = sys.path[:], sys.argv[1:]
for script in scripts:
    sys.path[:], sys.argv = path, [script, "--help"]
    for name in [name for name in sys.modules if name.split(".")[0] == "common"]:
        del sys.modules[name]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


def bare(words, folder):
    """(standard output, standard error, status) of a command of bash in which `python` has no docstrings,
    and does not look for modules beside a script.
    """
    env = environment() | {"PYTHONOPTIMIZE": "2", "PYTHONSAFEPATH": "1"}
    del env["PYTHONPATH"]
    call = ["bash", "-c", f"set -o pipefail; {words}"]
    done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    return done.stdout, done.stderr, done.returncode


def test_help_of_a_bare_interpreter(tmp_path):
    call = [sys.executable, "-c", HELP, *(f"{HERE / script}.py" for script in SCRIPTS)]
    printed, err, status = bare(shlex.join(call), tmp_path)
    assert (err, status) == ("", 0)
    usages = [line.split()[1] for line in printed.splitlines() if line.startswith("usage: ")]
    assert list(dict.fromkeys(usages)) == [f"{script}.py" for script in SCRIPTS]


def test_run_of_a_bare_interpreter_whose_output_nobody_reads(toy_root, tmp_path):
    call = command(FIRST, toy_root, tmp_path / "out", "--epochs", "1", "--workers", "1")
    line, err, status = bare(f"{shlex.join(call)} | head -1", tmp_path)
    assert line.startswith("toy: ") and "Traceback" not in err and status == 0
    assert (tmp_path / "out" / "result.json").exists()
    call = [sys.executable, "-m", "common.tools.predict", tmp_path / "out" / "model.pt"]
    call += [toy_root / name for name in (toy_root / "test.txt").read_text().split()[::2]]
    _, err, status = bare(f"PYTHONPATH={HERE} {shlex.join(map(str, call))} | true", tmp_path)
    assert (err, status) == ("", 0)


def test_finished_run_shows_its_result_again_and_does_nothing(finished, toy_root):
    script, out, printed = finished
    before = (out / "last.pt").stat().st_mtime_ns
    again, _ = run(script, toy_root, out)
    results = [[line for line in text.splitlines() if "RESULT " in line] for text in (printed, again)]
    assert results[0] == results[1]
    assert (out / "last.pt").stat().st_mtime_ns == before


def test_one_file_can_be_predicted(finished, toy_root):
    script, out = finished[0], made(*finished[:2])
    name = (toy_root / "test.txt").read_text().split()[0]
    call = [sys.executable, "-m", "common.tools.predict", out / "model.pt"]
    done = start([*call, toy_root / name], fresh=script == FIRST)
    printed, err = done.communicate(timeout=240)
    lines = [line.split("\t") for line in printed.splitlines()]
    assert done.returncode == 0 and len(lines) == 5, err
    said = next(csv.DictReader(open(out / "predictions.csv")))
    assert said["video"] == name and said["top1"].split(":")[0] == lines[0][1]
    done = start([*call, "nowhere.mp4"])
    _, err = done.communicate(timeout=240)
    assert done.returncode == 2 and err.count("\n") == 1 and "nowhere.mp4" in err


# A network beside model.pt, and its name in the log.
BESIDE = {"cmpl": ("model_aux.pt", "aux"), "tg_distill": ("teacher.pt", "tg")}


@pytest.mark.parametrize("finished", BESIDE, indirect=True)
def test_the_network_beside_can_be_tested_and_predicts(finished, toy_root):
    """One view per video by --eval, in a folder of its own, is the last quick test; `predict` reads it."""
    script, out, _ = finished
    file, net = BESIDE[script]
    flags = f"--data toy --root {toy_root} --eval {out / file} --clips 1 --crops 1 --workers 0"
    process = start([sys.executable, f"{HERE / script}.py", *flags.split()])
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0, printed + err
    (path,) = out.glob(f"eval_toy_{Path(file).stem.removeprefix('model_')}*/result.json")
    result, log = json.loads(path.read_text()), rows(out)[-1]
    for key in ("top1", "top5", "mean_class"):
        assert result[key] == pytest.approx(log[f"{net}_{key}"], abs=1e-3)
    name = (toy_root / "test.txt").read_text().split()[0]
    process = start([sys.executable, "-m", "common.tools.predict", out / file, toy_root / name])
    printed, err = process.communicate(timeout=240)
    assert (process.returncode, printed.count("\n")) == (0, 5), printed + err


def test_scores_do_not_depend_on_ranks_or_workers(finished, toy_root, tmp_path):
    """Bit for bit: the same predictions.csv and the same RESULT."""
    script, out, _ = finished
    results = []
    for ranks, workers in ((None, "0"), (3, "0"), (1, "1"))[: 3 if script == FIRST else 2]:
        folder = tmp_path / f"{ranks}"
        model = made(script, out) / "model.pt"
        flags = ("--eval", str(model), "--workers", workers, "--clips", "8", "--crops", "3")
        run(script, toy_root, folder, *flags, ranks=ranks)
        result = json.loads((folder / "result.json").read_text())
        result.pop("seconds")
        results.append(((folder / "predictions.csv").read_text(), result))
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resumed_run_is_the_uninterrupted_one(finished, toy_root, tmp_path, ranks, number):
    """Bit for bit: weights, optimiser, and the rows of the log but for their seconds."""
    script, whole, _ = finished
    pairs = [(2, signal.SIGTERM), (1, signal.SIGKILL)]
    if (ranks, number) not in pairs[: 2 if script == FIRST else 1]:
        pytest.skip("the signals and ranks are run.py's; one or two of the four pairs do for a script")
    ranks = None if ranks == 1 else ranks
    if ranks:
        whole = tmp_path / "whole"
        run(script, toy_root, whole, ranks=ranks)
    out, agent = tmp_path / "cut", bool(ranks) and script == FIRST
    often = ("--save_minutes", "0.002") if number == signal.SIGKILL else ()  # not only after each epoch
    process = start(command(script, toy_root, out, *often), ranks, fresh=agent)
    wait_for_rows(out, 4, process)
    if number == signal.SIGKILL:
        for victim in [*children(process), process.pid] if agent else process.pids:
            os.kill(victim, number)
        process.communicate()
    else:
        process.send_signal(number)
        printed, err = process.communicate(timeout=60)
        assert "stopped by a signal" in printed, err
        assert process.returncode == (1 if agent else 0)  # torchrun always says 1
    assert (out / "last.pt").exists() and not (out / "result.json").exists()
    stopped_at = checkpoint(out)["step"]
    more = () if ranks else ("--workers", "1", "--eval_every", "8")  # each test starts workers
    printed, _ = run(script, toy_root, out, *more, ranks=ranks)
    assert f"after step {stopped_at}" in printed
    a, b = checkpoint(whole), checkpoint(out)
    assert a["step"] == b["step"] and equal(a["parts"], b["parts"])
    a, b = ((made(script, folder) / "predictions.csv").read_text() for folder in (whole, out))
    assert a == b
    a, b = ([row for row in untimed(folder) if "eval" not in row] for folder in (whole, out))
    assert a == b and a[-1]["step"] > stopped_at


def stopped(script, root, out, *flags):
    """A run that a signal has ended after a few rows; what it has printed."""
    process = start(command(script, root, out, *flags))
    wait_for_rows(out, 2, process)
    process.send_signal(signal.SIGTERM)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not (out / "result.json").exists(), err
    return printed


def test_a_run_goes_on_where_its_data_are_now(finished, toy_root, tmp_path):
    """In the scratch folder of another job, under another spelling: what the data are counts, not where."""
    script, whole, _ = finished
    out, place = tmp_path / "out", tmp_path / "job1" / "toy"
    shutil.copytree(toy_root, place)
    stopped(script, place, out, "--data", str(place))
    place = shutil.move(place.parent, tmp_path / "job2") / "toy"
    run(script, place, out, "--data", f"{place}/")
    assert untimed(out) == untimed(whole) and equal(checkpoint(out)["parts"], checkpoint(whole)["parts"])
    a, b = ((made(script, folder) / "predictions.csv").read_text() for folder in (whole, out))
    assert a == b


@pytest.mark.parametrize("script", ["cmpl", "tg_distill"])
def test_a_changed_unlabelled_list_is_refused(script, toy_root, tmp_path):
    root, out = shutil.copytree(toy_root, tmp_path / "toy"), tmp_path / "out"
    few = [line for line in (root / "train.txt").read_text().splitlines() if "_0003" not in line]
    (tmp_path / "few.txt").write_text("\n".join(few))
    with pytest.MonkeyPatch.context() as patch:
        call = TINY[script].replace("--per_class 2", f"--labelled_list {tmp_path}/few.txt")
        patch.setitem(TINY, script, call)
        stopped(script, root, out)
        next(root.glob("train/*_0003.mp4")).unlink()
        _, err = run(script, root, out, status=2)
    assert "the unlabelled videos are not those of " in err.splitlines()[-1]


TESTS = {
    "cmpl": ["--keep_every 2"],
    "tg_distill": ["--average softmax", "--train_accuracy"],
    "mml": ["--uniform 3", "--test_crop 8", "--average softmax"],
    "motionfit": [],
    "jedi": [],
}


def test_every_test_has_a_folder_of_its_own_and_names_what_it_was_asked(finished, toy_root):
    script, out, _ = finished
    folders, model = [], made(script, out) / "model.pt"
    before = len(list(model.parent.glob("eval_*/result.json")))  # of other tests of this run
    for flag in ("--clips 1", "--clips 2", "--crops 3", *TESTS[script]):
        words = f"--data toy --root {toy_root} --workers 0 --eval {model} {flag}".split()
        process = start([sys.executable, f"{HERE / script}.py", *words])
        printed, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        said = dict(word.split("=", 1) for word in printed.splitlines()[-1].split() if "=" in word)
        name, value = flag.removeprefix("--").split() if " " in flag else ("train_accuracy", "True")
        assert said[name] == value and said["split"] == "1" and said["eval"] == str(model)
        folders.append(sorted(path for path in model.parent.glob("eval_*/result.json")))
    assert len(folders[-1]) == before + len(folders)
    words += ["--clips", "7", "--out", str(folders[0][0].parent)]
    process = start([sys.executable, f"{HERE / script}.py", *words])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2 and "choose another --out" in err


SIGNAL_IN_A_TEST = """
import os, runpy, signal, sys
from common.run import Run
untimed, tests = Run.untimed, []
def signalled(self):
    tests.append(1)
    if len(tests) == 1:  # the first
        os.kill(os.getpid(), signal.SIGTERM)
    return untimed(self)
Run.untimed = signalled
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_signal_during_a_quick_test_loses_no_row(finished, toy_root, tmp_path):
    script, whole, _ = finished
    (tmp_path / "signalled.py").write_text(SIGNAL_IN_A_TEST)
    call, out = command(script, toy_root, tmp_path / "out"), tmp_path / "out"
    process = start([call[0], str(tmp_path / "signalled.py"), *call[1:]])
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "stopped by a signal" in printed, err
    tests = [row["step"] for row in rows(whole) if "eval" in row and row["step"]]
    assert script == "motionfit" or checkpoint(out)["step"] == tests[0]
    run(script, toy_root, out)
    assert untimed(out) == untimed(whole)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_quick_tests_and_no_training(script, toy_root, tmp_path):
    """--eval_every 0 and --epochs 0."""
    run(script, toy_root, tmp_path / "untested", "--eval_every", "0", "--epochs", "1")
    log = rows(quick_log_of(script, tmp_path / "untested"))
    assert log and not [row for row in log if "eval" in row] and checkpoint(tmp_path / "untested")["step"] > 0
    out = tmp_path / "untrained"
    printed, _ = run(script, toy_root, out, "--epochs", "0")
    assert "0 steps" in printed and "RESULT" in printed and (made(script, out) / "model.pt").exists()
    assert [(row["step"], row["eval"]) for row in rows(quick_log_of(script, out))] == [(0, "quick")]


def test_two_ranks_finish_with_status_0(toy_root, tmp_path):
    """A gloo group can abort the interpreter at its exit; here it never does."""
    for i in range(int(os.environ.get("RANKS_2_RUNS", 6))):
        run(FIRST, toy_root, tmp_path / str(i), "--epochs", "0.2", ranks=2)


def test_broken_videos(finished, broken_root, tmp_path):
    """In training another stands in; in the test they are wrong, and both are named."""
    script, _, _ = finished
    root, train, test = broken_root
    out = tmp_path / "out"
    run(script, root, out, "--epochs", "3")
    result = json.loads((out / "result.json").read_text())
    assert (result["videos"], result["unreadable"]) == (20, 1)
    bad = [line.split("\t")[0] for line in (out / "bad_videos.txt").read_text().splitlines()]
    assert bad == [str(root / train) if script == "jedi" else train]  # it has several roots
    predictions = open(made(script, out) / "predictions.csv")
    said = {row["video"]: row["unreadable"] for row in csv.DictReader(predictions)}
    assert [name for name, reason in said.items() if reason] == [test]
    _, err = run(script, root, tmp_path / "strict", "--epochs", "3", "--max_bad", "0.01", status=2)
    assert "--max_bad" in err and "Traceback" not in err


def test_dead_rank_ends_the_run_which_then_resumes(toy_root, tmp_path):
    out = tmp_path / "out"
    process = start(command(FIRST, toy_root, out), ranks=2)
    wait_for_rows(out, 5, process)
    os.kill(process.pids[1], signal.SIGKILL)
    began = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - began < 40
    assert "another rank has died" in err
    printed, _ = run(FIRST, toy_root, out, ranks=2)
    assert "resumed from" in printed and "RESULT" in printed


def test_result_of_two_ranks_is_that_of_their_model(finished, toy_root, tmp_path):
    """Batch-norm statistics differ between ranks after a step; a score must not."""
    script, flags = finished[0], ("--clips", "8", "--crops", "3")  # 24 views: blocks of 2 videos
    its = ("--expert_flags", *TINY_EXPERT, "clips=8", "crops=3") if script == "jedi" else flags
    run(script, toy_root, tmp_path / "a", "--epochs", "1", *its, ranks=2)
    folder = made(script, tmp_path / "a")
    run(script, toy_root, tmp_path / "b", *flags, "--eval", str(folder / "model.pt"))
    a, b = ((place / "predictions.csv").read_text() for place in (folder, tmp_path / "b"))
    if script == "jedi":  # from embeddings on disk, and from video: products of other sizes
        a, b = (re.sub(r"\d\.\d{6}", lambda p: f"{float(p[0]):.4f}", text) for text in (a, b))
    assert a == b


OF_RANK = """
import os, runpy, sys
sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def differing(script, tmp_path, *flags, folder="**"):
    """The sentence of two ranks that leave no log in `folder`, where "RANK" in a flag is that of the rank."""
    (tmp_path / "of_rank.py").write_text(OF_RANK)
    call = command(script, tmp_path / "RANK", tmp_path / "out", *flags)
    process = start([call[0], str(tmp_path / "of_rank.py"), *call[1:]], ranks=2)
    printed, err = process.communicate(timeout=120)
    assert set(process.codes.values()) == {2} and "Traceback" not in err, err
    assert not list((tmp_path / "out").glob(f"{folder}/log.jsonl")), printed
    return err.strip().splitlines()[0]


@pytest.fixture
def two_roots(toy_root, tmp_path):
    """The toy set twice, in tmp_path/0 and tmp_path/1, for a rank each."""
    for rank in range(2):
        shutil.copytree(toy_root, tmp_path / str(rank))
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_that_lack_training_videos(script, two_roots):
    names = sorted((two_roots / "1" / "train").glob("*_0003.mp4"))[:2]  # no test video is called so
    for name in names:
        name.unlink()
    said = differing(script, two_roots)
    assert "rank 1 on " in said and f"lacks 2 training videos of rank 0 (train/{names[0].name} " in said


def spoil(root, what):
    """Change the data set of a rank in one way; a word of what is said then."""
    lists = {part: (root / f"{part}.txt").read_text().splitlines() for part in ("train", "test", "classes")}
    if what == "test":
        (root / "only.mp4").unlink()
        return "lacks 1 test videos of rank 0"
    if what == "label":
        name, label = lists["train"][0].split()
        lists["train"][0] = f"{name} {(int(label) + 1) % 10}"
    if what == "order":
        lists["train"] = lists["train"][::-1]
    if what == "classes":
        lists["classes"] = lists["classes"][::-1]
    for part, lines in lists.items():
        (root / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines))
    if what == "root":
        shutil.rmtree(root)
        return "(on rank 1, "
    return {"label": "lacks 1 training videos of rank 0", "order": "has its training videos in another order",
            "classes": "has its classes in another order"}[what]  # fmt: skip


@pytest.mark.parametrize("what", ["test", "label", "order", "classes", "root"])
def test_ranks_with_other_data(what, two_roots):
    """A folder of one's own, whose class folders do not tell the labels."""
    for rank in range(2):
        shutil.move(two_roots / str(rank), two_roots / f"{rank}_")
        (two_roots / str(rank)).mkdir()
        own = shutil.move(two_roots / f"{rank}_", two_roots / str(rank) / "own")
        shutil.copy(next(own.glob("test/*.mp4")), own / "only.mp4")
        with open(own / "test.txt", "a") as file:
            file.write("only.mp4 0\n")
    word, own = spoil(own, what), f"{two_roots}/RANK/own"
    assert word in differing(FIRST, two_roots, "--data", own, "--root", own)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_with_other_labelled_lists(script, two_roots):
    lines = (two_roots / "0" / "train.txt").read_text().splitlines()
    call = TINY[script].replace("--per_class 2", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, script, f"{call} --labelled_list {two_roots}/RANK/few.txt")
        (two_roots / "0" / "few.txt").write_text("\n".join(lines[:30]))
        if script == FIRST:
            said = differing(script, two_roots)
            assert f"{two_roots}/1/few.txt" in said and "(on rank 1, " in said
        (two_roots / "1" / "few.txt").write_text("\n".join(lines[:29]))
        assert "lacks 1 labelled videos of rank 0" in differing(script, two_roots)


@pytest.mark.parametrize(
    "script, flag, folder", [("motionfit", "--source", "generator"), ("jedi", "--extra", ".")]
)
def test_ranks_with_other_videos_without_labels(script, flag, folder, two_roots, toy_root):
    for rank in range(2):
        shutil.copytree(toy_root, two_roots / str(rank) / "second")
    next((two_roots / "1" / "second" / "train").glob("*_0003.mp4")).unlink()
    said = differing(script, two_roots, flag, f"{two_roots}/RANK/second", folder=folder)
    assert "lacks 1 training videos of rank 0" in said


WAITS = """
import sys, time
from datetime import timedelta
from common import run
run.timedelta = lambda minutes: timedelta(seconds=2) if minutes == 30 else timedelta(minutes=minutes)
with run.Run("cmpl", sys.argv[1], {}) as run:
    print(run.on_main(lambda: time.sleep(6) or 7))
"""


def test_ranks_wait_for_work_of_rank_0_without_a_time_out(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    process = start([sys.executable, str(tmp_path / "waits.py"), str(tmp_path / "out")], ranks=2)
    out, err = process.communicate(timeout=240)
    assert out.split() == ["7", "7"] and process.returncode == 0, err


RAISES = """
import sys
from common.run import Run
with Run("cmpl", sys.argv[1], {}) as run:
    for step, _ in run.steps([[]] * 9, 0, 9, 0, []):
        if step == 2 and run.rank == 1:
            raise ValueError("boom")
"""


def test_a_rank_that_raises(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    call = [sys.executable, str(tmp_path / "raises.py"), str(tmp_path / "out")]
    process = start(call, ranks=2)
    _, err = process.communicate(timeout=240)
    assert all(process.codes.values()) and "ValueError: boom" in err


def test_signal_to_all_processes_with_workers(toy_root, tmp_path):
    """As batch systems and Ctrl-C do it; nothing is left running."""
    out = tmp_path / "out"
    process = start(command(FIRST, toy_root, out, "--workers", "2"))
    wait_for_rows(out, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    printed, err = process.communicate(timeout=90)
    assert "stopped by a signal" in printed and process.returncode == 0, err
    until = time.time() + 20
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.time() < until
        time.sleep(0.1)


def test_a_killed_loader_worker_is_noticed(toy_root, tmp_path):
    out = tmp_path / "out"
    process = start(command(FIRST, toy_root, out, "--workers", "1"))
    wait_for_rows(out, 2, process)
    found = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(max(map(int, found)), signal.SIGKILL)  # the youngest process
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "--workers" in err and "Traceback" not in err, err


def test_no_loader_worker_outlives_a_killed_run(toy_root, tmp_path):
    out = tmp_path / "out"
    process = start(command(FIRST, toy_root, out, "--workers", "1"))
    wait_for_rows(out, 2, process)
    session = ["pgrep", "-s", str(process.pids[0])]
    assert len(subprocess.run(session, capture_output=True, text=True).stdout.split()) > 2
    os.kill(process.pids[0], signal.SIGKILL)
    process.communicate(timeout=60)
    until = time.time() + 20
    while subprocess.run(session, capture_output=True).stdout:
        assert time.time() < until
        time.sleep(0.1)


def test_several_nodes(toy_root, tmp_path):
    """Two torchrun agents that meet at one address, as on two machines."""
    out, port = tmp_path / "out", 20000 + os.getpid() % 20000
    agents = []
    for node in (0, 1):
        flags = ["--nnodes", "2", "--node_rank", f"{node}", "--nproc_per_node", "1"]
        flags += ["--master_addr", "127.0.0.1", "--master_port", f"{port}"]
        agents.append(start(torchrun(command(FIRST, toy_root, out, "--epochs", "0.5"), *flags)))
    assert [(agent.communicate(timeout=120), agent.returncode)[1] for agent in agents] == [0, 0]
    assert json.loads((out / "result.json").read_text())["videos"] == 20


VARIANTS = {
    "cmpl": [
        "--aux same --joint --warmup 1 --optimizer sgd",
        "--aux_losses sup --offset 1 --unlabelled all --channels_last --keep_every 2",
        "--aux none --dropout 0.5 --crops 3 --flip",
        "--lam 0 --no-channels_last",
    ],
    "tg_distill": [
        "--nets rgb --optimizer sgd --average softmax --crops 3",
        "--nets tg --interval 7 --precise_bn 0 --train_accuracy",
        "--align l1 --align_stages 3 4 --no-stopgrad --w_clr 0 --pseudo tg --dropout 0.5 --clip_grad 0",
        "--w_kd 0 --pseudo self --flip --unlabelled all --no-channels_last --net r3d_10",
    ],
    "mml": [
        "--nets rgb,rgb,diff --mean logits --sampling dense --optimizer sgd --lr_steps 0.5 --average softmax",
        "--nets diff --lam 0 --net i3d10 --flip --dropout 0.5 --no-channels_last --crops 3",
    ],
    "motionfit": [
        "--lam 0.5 --neighbours --optimizer sgd --lr_steps 0.4,0.6 --flip --no-channels_last --hop 3",
        "--source rest --net r2plus1d_10 --multi_clips 1 --holdout 0.3",
        "--granularity segment --lam 0 --iterations 1",
    ],
    "jedi": [
        "--teacher_input adjusted+predictions --distill own --burn_in 0",
        "--teacher_input base --teacher_loss ovr --half",
        "--holdout 0.3 --distill none --net tsm10 --temperature 2 --teacher_input predictions",
    ],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_baselines_and_ablations_run(script, toy_root, tmp_path):
    def one(i):
        out = tmp_path / f"{i}"
        printed, _ = run(script, toy_root, out, "--epochs", "0.8", *VARIANTS[script][i].split())
        assert "RESULT" in printed, VARIANTS[script][i]
        assert rows(quick_log_of(script, out))[-1]["eval"] == "quick", VARIANTS[script][i]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(VARIANTS[script]))))


MISTAKES = {
    FIRST: {  # what common/flags.py, datasets.py and run.py refuse, too
        "--data k400 --root /nowhere": "/nowhere",
        "--data nonsense": "nonsense",
        "--net resnet3d11": "resnet3d11",
        "--lr 1e30 --optimizer sgd": "--lr",
        "--ratio 0": "--ratio",
        "--ratio 1.5": "--ratio",
        "--ratio 1": "--lam",
        "--split 4": "split",
        "--labelled_list /nowhere.txt": "/nowhere.txt",
        "--eval /nowhere.pt": "/nowhere.pt",
        f"--seed {2**63}": "--seed",
        "--lam 0 --batch 1 --frames 1": "--batch",  # one value of each channel
        "--jitter 24 20": "--jitter",
        "--workers -1": "--workers",
        "--out /proc/nowhere": "--out",
    },
    "tg_distill": {
        "--align_stages 4 5": "--align_stages",
        "--lr 1e30 --optimizer sgd --clip_grad 0": "--lr",
    },
    "mml": {
        "--nets rgb,sound": "--nets",
        "--mutual mars": "--teacher",
        "--init /nowhere.pt": "/nowhere.pt",
        "--lr 1e30 --optimizer sgd --clip_grad 0": "--lr",
    },
    "motionfit": {
        "--frames 0": "--frames",
        "--init /nowhere.pt": "--init is for one stage",
        "--source /nowhere": "/nowhere",
        "--clusters 1000": "--clusters 1000",
        "--size 32": "--size",
        "--lr 1e30 --optimizer sgd": "--lr",
    },
    "jedi": {
        "--expert /nowhere.pt": "/nowhere.pt",
        "--expert_flags lr=1e30 optimizer=sgd epochs=4": "lower --lr in another --out",
        "--expert tsn50:/nowhere.pth:8": "/nowhere.pth",
        "--expert tsn50:/nowhere.pth": "must say what the network sees",
        "--distill nowhere": "--distill",
        "--lr 1e30": "--lr",
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_one_sentence(script, toy_root, tmp_path):
    """Exit status 2, the sentence names what is wrong, and there is no traceback."""

    def one(mistake):
        flags, word = mistake
        call = command(script, toy_root, tmp_path / flags.replace("/", ""))
        if "--ratio" in flags or "--labelled_list" in flags:
            del call[call.index("--per_class") : call.index("--per_class") + 2]
        if "--data" in flags:
            del call[call.index("--root") : call.index("--root") + 2]
        process = start(call + flags.split())
        _, err = process.communicate(timeout=120)
        last = err.strip().splitlines()[-1]
        good = process.returncode == 2 and word in last and "Traceback" not in err
        return None if good else (flags, process.returncode, err[-500:])

    with ThreadPoolExecutor(2) as pool:
        assert [found for found in pool.map(one, MISTAKES[script].items()) if found] == []


def test_restart_by_torchrun(toy_root, tmp_path):
    """--max-restarts: a rank is killed, torchrun starts all again, the run resumes and ends well."""
    out = tmp_path / "out"
    flags = ["--max-restarts", "1", "--standalone", "--nproc_per_node", "2"]
    process = start(torchrun(command(FIRST, toy_root, out), *flags))
    wait_for_rows(out, 5, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resumed from" in printed and "RESULT" in printed


def test_ranks_without_their_torchrun_save_and_leave(toy_root, tmp_path):
    """Some signals (SIGUSR1 of a batch system) end torchrun and not its processes."""
    out = tmp_path / "out"
    process = start(command(FIRST, toy_root, out), ranks=2, fresh=True)
    wait_for_rows(out, 4, process)
    orphans = children(process)
    process.kill()
    printed, _ = process.communicate(timeout=60)
    assert "stopped by a signal" in printed and not (out / "result.json").exists()
    until = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.time() < until
        time.sleep(0.1)

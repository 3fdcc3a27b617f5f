"""Rules that hold for every script, on a small toy set; what is common/run.py's alone, for the first script.

`fresh` runs are started as a user starts them. The others run in this process, or, where they need ranks of
their own or get a signal, fork from an interpreter that has imported torch (forks.py).
"""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch

from common.io import toy
from common.io.models import load_model
from common.run import Run
from common.tools.predict import predict

pytestmark = pytest.mark.usefixtures("leave", "group")
HERE = Path(__file__).resolve().parent.parent
TINY = {
    "cmpl": "--per_class 2 --width 0.0625 --aux_width 0.0625 --size 16 --test_size 16 --jitter 20 24 "
    "--batch 2 --mu 2 --epochs 4 --clips 1 --tau 0.2 --eval_every 2",
    "tg_distill": "--per_class 2 --width 0.0625 --size 16 --test_size 16 --batch 2 --mu 2 --unlabelled rest "
    "--epochs 4 --clips 1 --tau 0.1 --warmup 1 --sup_warmup 1 --precise_bn 10 --eval_every 2",
    "mml": "--per_class 2 --nets rgb,diff --width 0.0625 --size 16 --test_size 16 --batch 4 --epochs 4 "
    "--warmup 1 --clips 1 --uniform 1 --eval_every 2",
    "motionfit": "--per_class 2 --modality rgb --width 0.0625 --size 16 --stretch 20 24 --frames 4 "
    "--clusters 8 --batch 4 --multi_clips 2 --epochs 2 --clips 1 --eval_every 1 --max_bad 0.1",
    "jedi": "--per_class 2 --net resnet3d10 --expert_flags width=0.0625 size=16 test_size=16 jitter=20,24 "
    "frames=4 clips=1 crops=1 epochs=0.2 eval_every=0 --hidden 8 --batch 8 --epochs 12 --burn_in 1 "
    "--eval_every 6",
}
BATCH = {"cmpl": 2, "tg_distill": 2, "mml": 4, "motionfit": 4, "jedi": 8}  # of TINY
EXPERT = shlex.split(TINY["jedi"])[5:10]
# What the last line of log.jsonl, a quick test, says of the networks.
LOGGED = {
    "cmpl": {"pri_top1", "aux_top1", "test_kept_aux", "test_agree"},
    "tg_distill": {"rgb_top1", "tg_top1"},
    "mml": {"rgb_top1", "diff_top1"},
    "motionfit": {"val_top1"},
    "jedi": {"toy_expert_mAP", "toy_student_top1", "toy_teacher_top5"},
}
SCRIPTS = list(TINY)
FIRST = SCRIPTS[0]
scripts = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "toy"
    toy.make(root, train_per_class=4, val_per_class=1, test_per_class=2)
    return root


def words(script, root, out, *flags):
    return ["--data", "toy", "--root", f"{root}", "--out", f"{out}", "--workers", "0", "--log_every", "2",
            *shlex.split(TINY[script]), *flags]  # fmt: skip


def command(script, *args):
    return [sys.executable, f"{HERE / script}.py", *words(script, *args)]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE)} | more


def start(call, ranks=None, fresh=False, **more):
    if not fresh:
        return forks.start(call, HERE, environment(**more), ranks)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(call, cwd=HERE, env=environment(), start_new_session=True, **pipes)


def torchrun(call, *flags):
    """torchrun, which is not ours, is a fork; the ranks that it starts are not."""
    return start([call[0], "-m", "torch.distributed.run", *flags, *call[1:]])


def output_of(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status and "Traceback" not in err, out + err
    return out + err


def run(script, *flags):
    """A run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{script}.py", *map(str, flags)])
        importlib.import_module(script).main()


def refused(script, *flags):
    """The sentence with which a run in this process ends."""
    with pytest.raises(SystemExit) as end:
        run(script, *flags)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sentence = str(end.value)
    assert sentence.endswith("(2)") and "\n" not in sentence, sentence
    return sentence


def model_folder(script, out):
    """Where a run leaves its network: jedi.py has one for each data set."""
    return out / "toy" if script == "jedi" else out


def quick_log_of(script, out):
    """The folder whose log has quick tests: motionfit.py's last stage learns from all labels and has none."""
    return out / "generator" if script == "motionfit" else out


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for_rows(out, n, process):
    """Until the log of a running process has n rows."""
    until = time.time() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < n:
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.02)


def wait_for_end_of(*pgrep):
    until = time.time() + 20
    while pids_of(*pgrep):
        assert time.time() < until
        time.sleep(0.1)


def pids_of(*pgrep):
    return [int(pid) for pid in subprocess.run(["pgrep", *pgrep], capture_output=True).stdout.split()]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def state_of(script, out):
    """What two equal runs have in common: step, weights, optimiser, log without times, predictions."""
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    log = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows(out)]
    predictions = (model_folder(script, out) / "predictions.csv").read_text()
    return checkpoint["step"], checkpoint["parts"], log, predictions


# ---- every script ----------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=SCRIPTS)
def finished(request, toy_root, tmp_path_factory):
    """(script, run folder, what it printed) of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("finished") / request.param
    return request.param, out, output_of(start(command(request.param, toy_root, out), fresh=True))


def results_in(printed):
    return [line for line in printed.splitlines() if "RESULT " in line]


def test_run_folder_is_complete_and_shows_its_result_again(finished, toy_root, capfd):
    script, out, printed = finished
    names = "config.json labelled.txt log.jsonl last.pt model.pt result.json per_class.csv predictions.csv"
    folder = model_folder(script, out)
    assert set(names.split()) <= {path.name for path in [*out.iterdir(), *folder.iterdir()]}
    result = json.loads((out / "result.json").read_text())
    line = results_in(printed)[-1]  # of the last stage
    assert f"RESULT script={script} data=toy " in line and f"top1={result['top1']:.2f}" in line
    assert re.search(r"videos=20 unreadable=0 seconds=\d+ code=\w{12}$", line)
    test, log = rows(quick_log_of(script, out))[-1], rows(out)
    assert test["eval"] == "quick" and LOGGED[script] <= test.keys()
    steps = [row["step"] for row in log if "eval" not in row]
    assert steps == list(range(2, steps[-1] + 1, 2))
    first = next(row for row in log if "eval" not in row)
    assert {"lr", "loss", "seconds_data", "seconds_compute"} <= first.keys()
    assert len((folder / "labelled.txt").read_text().splitlines()) == 20  # two of each of ten classes
    assert len(list(csv.reader(open(folder / "predictions.csv")))) == 21
    before = (out / "last.pt").stat().st_mtime_ns
    run(script, *words(script, toy_root, out))
    assert results_in(capfd.readouterr().out) == results_in(printed)
    assert (out / "last.pt").stat().st_mtime_ns == before


SIGNALLED = """
import itertools, os, runpy, sys
from common.run import Run
log, what, at, number = Run.log, *os.environ["SIGNAL_AT"].split()
count = itertools.count(1)
def signalled(run, row):
    log(run, row)
    if row["step"] and ("eval" in row) == (what == "test") and next(count) == int(at):
        os.kill(os.getpid(), int(number))
Run.log = signalled
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_stopped_killed_and_moved_run_is_the_uninterrupted_one(finished, toy_root, tmp_path):
    """Bit for bit: SIGTERM in the first quick test, kill -9 in the middle of an epoch, another folder and
    spelling of the data, as in the scratch folder of another job, and another number of workers."""
    script, whole, _ = finished
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    out, place = tmp_path / "out", tmp_path / "job1" / "toy"
    shutil.copytree(toy_root, place)

    def signalled(when, status, *flags):
        call = command(script, place, out, *flags)
        process = start([call[0], tmp_path / "signalled.py", *call[1:]], SIGNAL_AT=when)
        printed = output_of(process, status)
        assert not (model_folder(script, out) / "model.pt").exists()
        return printed

    printed = signalled("test 1 15", 0)
    assert "stopped by a signal" in printed
    place = shutil.move(place.parent, tmp_path / "job2") / "toy"
    signalled("row 3 9", -9, "--root", f"{place}/", "--save_minutes", "0")
    folders = [out / stage for stage in ("", "generator", "selftrain") if (out / stage / "last.pt").exists()]
    step = torch.load(folders[-1] / "last.pt", weights_only=True)["step"]
    printed = output_of(start(command(script, place, out, "--workers", "1")))
    assert f"after step {step}" in printed
    assert equal(state_of(script, out), state_of(script, whole))


# A network beside model.pt, and its name in the log; flags of --eval that make it another test.
BESIDE = {"cmpl": ("model_aux.pt", "aux"), "tg_distill": ("teacher.pt", "tg")}
TESTS = {
    "cmpl": ["--keep_every 2"],
    "tg_distill": ["--average softmax", "--train_accuracy"],
    "mml": ["--uniform 3", "--test_crop 8", "--average softmax"],
    "motionfit": [],
    "jedi": [],
}


def test_models_of_a_run_predict_and_are_tested_again(finished, toy_root, capfd):
    script, out, _ = finished
    folder = model_folder(script, out)
    first = next(csv.DictReader(open(folder / "predictions.csv")))
    ((_, top, _),) = predict(load_model(folder / "model.pt"), [toy_root / first["video"]])
    assert len(top) == 5 and first["top1"].split(":")[0] == top[0][0]
    flags = ["--clips 3", "--crops 3", *TESTS[script]]
    line = f"--data toy --root {toy_root} --workers 0 --eval {folder / 'model.pt'}"
    parsed = [importlib.import_module(script).parse_args(f"{line} {flag}".split()) for flag in ["", *flags]]
    outs = [(args["eval"] if script == "motionfit" else args).out for args in parsed]
    assert len(set(outs)) == len(outs) and {Path(path).parent for path in outs} == {folder}
    flags = [flag for flag in flags if script != "mml" or flag != "--crops 3"]  # --test_crop is central
    run(script, *f"{line} {' '.join(flags)}".split())
    (line,) = results_in(capfd.readouterr().out)
    asked = [" ".join((flag + " True").removeprefix("--").split()[:2]).replace(" ", "=") for flag in flags]
    assert {*asked, "split=1", f"eval={folder / 'model.pt'}"} <= set(line.split())
    if script in BESIDE:  # a view of each video by --eval is the last quick test
        file, net = BESIDE[script]
        run(script, *f"--data toy --root {toy_root} --eval {out / file} --clips 1 --crops 1".split())
        (path,) = out.glob(f"eval_toy_{Path(file).stem.removeprefix('model_')}*/result.json")
        result, log = json.loads(path.read_text()), rows(out)[-1]
        for key in ("top1", "top5", "mean_class"):
            assert result[key] == pytest.approx(log[f"{net}_{key}"], abs=1e-3)


@scripts
def test_two_ranks(script, toy_root, tmp_path):
    """The rate follows the clips of a step over all ranks. Scores are those of one process bit for bit, but
    the ranks' batch-norm statistics differ after a step."""
    views = "--clips", "8", "--crops", "3"  # 24 views: blocks of 2 videos
    flags = ("--expert_flags", *EXPERT, "clips=8", "crops=3") if script == "jedi" else views
    flags = "--epochs", "1", "--lr", "0.5", "--lr_batch", "40", *flags
    printed = output_of(start(command(script, toy_root, tmp_path / "a", *flags), 2))
    clips, rates = 2 * BATCH[script], [row["lr"] for row in rows(tmp_path / "a") if "lr" in row]
    assert f"learning rate {clips / 80:.4g} = 0.5 x {clips} / 40 " in printed
    assert clips / 320 < max(rates) <= clips / 80
    folder, texts = model_folder(script, tmp_path / "a"), []
    for ranks, workers in ((1, "0"), (3, "1"))[: 2 if script == FIRST else 1]:
        out, model = tmp_path / f"eval{ranks}", folder / "model.pt"
        call = words(script, toy_root, out, *views, "--eval", f"{model}", "--workers", workers)
        if ranks > 1:
            output_of(start([sys.executable, f"{HERE / script}.py", *call], ranks))
        else:
            run(script, *call)
        texts.append((out / "predictions.csv").read_text())
    texts.append((folder / "predictions.csv").read_text())
    if script == "jedi":  # from embeddings on disk, and from video: products of other sizes
        texts = [re.sub(r"\d\.\d{6}", lambda p: f"{float(p[0]):.4f}", text) for text in texts]
    assert len(set(texts)) == 1


@scripts
def test_no_quick_tests_and_no_training(script, toy_root, tmp_path, capfd):
    """--eval_every 0 and --epochs 0."""
    run(script, *words(script, toy_root, tmp_path / "untested", "--eval_every", "0", "--epochs", "1"))
    log = rows(quick_log_of(script, tmp_path / "untested"))
    assert log and not [row for row in log if "eval" in row]
    out = tmp_path / "untrained"
    capfd.readouterr()
    run(script, *words(script, toy_root, out, "--epochs", "0"))
    printed = capfd.readouterr().out
    assert "0 steps" in printed and results_in(printed) and (model_folder(script, out) / "model.pt").exists()
    assert [(row["step"], row["eval"]) for row in rows(quick_log_of(script, out))] == [(0, "quick")]


@scripts
def test_broken_videos(script, toy_root, tmp_path):
    """In training another stands in; in the test they are wrong, and both are named."""
    root, out = shutil.copytree(toy_root, tmp_path / "broken"), tmp_path / "out"
    train, test = ((root / f"{part}.txt").read_text().split()[2] for part in ("train", "test"))
    (root / train).write_bytes((root / train).read_bytes()[:200])
    (root / test).write_text("<html>404</html>")
    run(script, *words(script, root, out, "--epochs", "2"))
    result = json.loads((out / "result.json").read_text())
    assert (result["videos"], result["unreadable"]) == (20, 1)
    bad = [line.split("\t")[0] for line in (out / "bad_videos.txt").read_text().splitlines()]
    assert bad == [str(root / train) if script == "jedi" else train]  # it has several roots
    with open(model_folder(script, out) / "predictions.csv") as predictions:
        assert [row["video"] for row in csv.DictReader(predictions) if row["unreadable"]] == [test]
    strict = words(script, root, tmp_path / "strict", "--epochs", "2", "--max_bad", "0.01")
    assert "--max_bad" in refused(script, *strict)


@pytest.mark.parametrize("script", ["cmpl", "tg_distill"])
def test_a_changed_unlabelled_list_is_refused(script, toy_root, tmp_path, monkeypatch):
    root, out = shutil.copytree(toy_root, tmp_path / "toy"), tmp_path / "out"
    few = [line for line in (root / "train.txt").read_text().splitlines() if "_0003" not in line]
    (tmp_path / "few.txt").write_text("\n".join(few))
    call = TINY[script].replace("--per_class 2", f"--labelled_list {tmp_path}/few.txt")
    monkeypatch.setitem(TINY, script, call)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "track", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        run(script, *words(script, root, out))
    assert (out / "last.pt").exists() and not (out / "result.json").exists()
    next(root.glob("train/*_0003.mp4")).unlink()
    assert "the unlabelled videos are not those of " in refused(script, *words(script, root, out))


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
        "--source rest --net r2plus1d_10 --multi_clips 1 --holdout 0.3 --granularity segment",
    ],
    "jedi": [
        "--teacher_input adjusted+predictions --distill own --burn_in 0 --half --teacher_loss ovr",
        "--holdout 0.3 --distill none --net tsm10 --temperature 2 --teacher_input predictions",
    ],
}


@pytest.mark.parametrize(
    "script, flags", [(script, flags) for script in SCRIPTS for flags in VARIANTS[script]]
)
def test_baselines_and_ablations_run(script, flags, toy_root, tmp_path, capfd):
    run(script, *words(script, toy_root, tmp_path, "--epochs", "0.4", *flags.split()))
    assert results_in(capfd.readouterr().out) and rows(quick_log_of(script, tmp_path))[-1]["eval"] == "quick"


MISTAKES = {
    FIRST: {  # what common/flags.py, data.py and run.py refuse, too
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
    "tg_distill": {"--align_stages 4 5": "--align_stages", "--lr 1e30 --optimizer sgd --clip_grad 0": "--lr"},
    "mml": {
        "--nets rgb,sound": "--nets",
        "--mutual mars": "--teacher",
        "--init /nowhere.pt": "/nowhere.pt",
        "--lr 1e30 --optimizer sgd --clip_grad 0": "--lr",
    },
    "motionfit": {"--clusters 1000": "--clusters 1000", "--lr 1e30 --optimizer sgd": "--lr"},
    "jedi": {
        "--expert_flags lr=1e30 optimizer=sgd epochs=4": "lower --lr in another --out",
        "--lr 1e30": "--lr",
    },
}


@pytest.mark.parametrize(
    "script, flags", [(script, flags) for script in SCRIPTS for flags in MISTAKES[script]]
)
def test_mistakes_are_one_sentence(script, flags, toy_root, tmp_path):
    """Exit status 2, and the sentence names what is wrong."""
    call = words(script, toy_root, tmp_path / "out")
    if "--ratio" in flags or "--labelled_list" in flags:
        del call[call.index("--per_class") : call.index("--per_class") + 2]
    if "--data" in flags:
        del call[call.index("--root") : call.index("--root") + 2]
    assert MISTAKES[script][flags] in refused(script, *call, *flags.split())


# ---- how runs are started --------------------------------------------------------------------------

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


def bare(line, folder):
    """(standard output, standard error, status) of a command of bash in which `python` has no docstrings,
    and does not look for modules beside a script.
    """
    env = environment(PYTHONOPTIMIZE="2", PYTHONSAFEPATH="1")
    del env["PYTHONPATH"]
    call = ["bash", "-c", f"set -o pipefail; {line}"]
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


ENDS = """
import atexit, json, multiprocessing, os, random, signal, sys, threading
atexit.register(print, "at exit")
same = {"threads": len(os.listdir("/proc/self/task")), "thread": threading.current_thread().name}
same |= {"name": __name__, "file": sys.modules["__main__"].__file__, "argv": sys.argv, "path": sys.path}
same |= {"environment": sorted(os.environ), "folder": os.getcwd(), "terminal": sys.stderr.isatty()}
same |= {"leader": os.getpid() == os.getsid(0) == os.getpgid(0), "files": len(os.listdir("/proc/self/fd"))}
same |= {"signals": [str(signal.getsignal(number)) for number in range(1, 32)]}
same |= {"ours": [name for name in sys.modules if name.split(".")[0] in ("common", "pytest", "forks")]}
draws = [hash("a"), random.random()]
if "torch" in sys.modules:
    draws += [sys.modules["numpy"].random.rand(), sys.modules["torch"].rand(1).item()]
print(json.dumps([same, draws]))
{}
"""


@pytest.mark.parametrize("end", ["1 / 0", "os.kill(os.getpid(), 9)"])
def test_a_fork_is_a_new_interpreter(tmp_path, end):
    (tmp_path / "ends.py").write_text(ENDS.replace("{}", end))
    call = [sys.executable, str(tmp_path / "ends.py"), "a", "--b"]
    processes = [start(call, fresh=True), start(call), start(call)]
    outs, errs = zip(*(process.communicate(timeout=240) for process in processes), strict=True)
    (same, _), (fork, draws), (other, other_draws) = (json.loads(out.split("\n", 1)[0]) for out in outs)
    assert same == fork == other and same["threads"] == 1
    assert len(draws) == 4 and all(a != b for a, b in zip(draws, other_draws, strict=True))
    assert len({out.split("\n", 1)[1] for out in outs}) == len({p.returncode for p in processes}) == 1
    assert len({"".join(err.splitlines()[-1:]) for err in errs}) == 1


# ---- ranks -----------------------------------------------------------------------------------------


def test_a_dead_rank_ends_the_run_which_resumes_bit_for_bit(toy_root, tmp_path):
    """The second time on two nodes."""
    for name in ("whole", "cut"):
        out = tmp_path / name
        if name == "cut":
            process = start(command(FIRST, toy_root, out, "--save_minutes", "0"), 2)
            wait_for_rows(out, 4, process)
            os.kill(process.pids[1], signal.SIGKILL)
            began = time.time()
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1 and time.time() - began < 40 and "another rank has died" in err
        printed = output_of(start(command(FIRST, toy_root, out), 2, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"))
        assert ("resumed from" in printed) == (name == "cut")
    assert equal(state_of(FIRST, tmp_path / "cut"), state_of(FIRST, tmp_path / "whole"))


def test_restart_by_torchrun(toy_root, tmp_path):
    """--max-restarts: a rank is killed, torchrun starts all again, the run resumes and ends well."""
    flags = ["--max-restarts", "1", "--standalone", "--nproc_per_node", "2"]
    process = torchrun(command(FIRST, toy_root, tmp_path), *flags)
    wait_for_rows(tmp_path, 5, process)
    os.kill(pids_of("-P", f"{process.pid}")[-1], signal.SIGKILL)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resumed from" in printed and "RESULT" in printed


def test_ranks_without_their_torchrun_save_and_leave(toy_root, tmp_path):
    """Some signals (SIGUSR1 of a batch system) end torchrun and not its processes."""
    process = torchrun(command(FIRST, toy_root, tmp_path), "--standalone", "--nproc_per_node", "2")
    wait_for_rows(tmp_path, 2, process)
    orphans = pids_of("-P", f"{process.pid}")
    process.kill()
    printed, _ = process.communicate(timeout=60)
    assert "stopped by a signal" in printed and not (tmp_path / "result.json").exists()
    until = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.time() < until
        time.sleep(0.1)


READS = """
import os, sys
from common.data import labelled_subset, load_data
from common.errors import UserError
from common.run import Run, agreed
with Run("cmpl", sys.argv[1], {}) as run:
    for case in sys.argv[2:]:
        own = f"{case}/{run.rank}"
        try:
            data = agreed(load_data, own, own)
            agreed(labelled_subset, data, listfile=f"{own}/few.txt")
        except UserError as error:
            if run.main:
                print(error)
        else:
            print("no difference")
"""
DIFFERENCES = {  # of rank 1: what is said then
    "train": "lacks 1 training videos of rank 0 (",
    "test": "lacks 1 test videos of rank 0 (",
    "label": "lacks 1 training videos of rank 0 (",
    "order": "has its training videos in another order",
    "classes": "has its classes in another order",
    "labelled": "lacks 1 labelled videos of rank 0",
    "no list": "few.txt",
    "root": "(on rank 1, ",
}


def test_ranks_with_other_data(tmp_path, make):
    """Folders of a data set of one's own, whose class folders do not tell the labels."""
    video = make.write(tmp_path / "v.mp4", 2)
    for case in DIFFERENCES:
        for rank in "01":
            root, is_changed = tmp_path / case / rank, rank == "1"
            if is_changed and case == "root":
                continue
            lists = {"train": [f"v{i}.mp4 {i % 2}" for i in range(4)], "test": ["t0.mp4 0", "t1.mp4 1"],
                     "classes": ["a", "b"], "few": ["v0.mp4", "v1.mp4", "v2.mp4"]}  # fmt: skip
            if is_changed and case == "label":
                lists["train"][0] = "v0.mp4 1"
            if is_changed and case in ("order", "classes"):
                lists["train" if case == "order" else case].reverse()
            if is_changed and case == "labelled":
                del lists["few"][2]
            root.mkdir(parents=True)
            for name in ("v0", "v1", "v2", "v3", "t0", "t1"):
                shutil.copy(video, root / f"{name}.mp4")
            for name, lines in lists.items():
                (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
            if is_changed and case in ("train", "test", "no list"):
                (root / {"train": "v3.mp4", "test": "t1.mp4", "no list": "few.txt"}[case]).unlink()
    (tmp_path / "reads.py").write_text(READS)
    cases = [tmp_path / case for case in DIFFERENCES]
    call = [sys.executable, tmp_path / "reads.py", tmp_path / "out", *cases]
    printed = output_of(start(call, 2)).splitlines()
    sentences = [line for line in printed if str(tmp_path) in line or "rank" in line]
    for sentence, words_of_case in zip(sentences, DIFFERENCES.values(), strict=True):
        assert words_of_case in sentence and "rank 1" in sentence


@scripts
def test_a_script_reads_data_and_lists_through_agreed(script):
    source = (HERE / f"{script}.py").read_text()
    assert "agreed(load_data, " in source and not re.search(r"\b(load_data|labelled_subset)\(", source)


WAITS = """
import sys, time
from datetime import timedelta
from common import run
run.timedelta = lambda minutes: timedelta(seconds=1) if minutes == 30 else timedelta(minutes=minutes)
with run.Run("cmpl", sys.argv[1], {}) as run:
    print(run.on_main(lambda: time.sleep(3) or 7))
"""


def test_ranks_wait_for_work_of_rank_0_without_a_time_out(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    call = [sys.executable, tmp_path / "waits.py", tmp_path / "out"]
    assert output_of(start(call, 2)).split() == ["7", "7"]


# ---- loader workers --------------------------------------------------------------------------------


def test_a_killed_loader_worker_is_noticed(toy_root, tmp_path):
    process = start(command(FIRST, toy_root, tmp_path, "--workers", "1"))
    wait_for_rows(tmp_path, 2, process)
    os.kill(max(pids_of("-s", f"{process.pid}")), signal.SIGKILL)  # the youngest process
    assert "--workers" in output_of(process, status=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_loader_worker_outlives_a_run(number, toy_root, tmp_path):
    """SIGTERM to all processes, as batch systems and Ctrl-C send it, and kill -9 of the run alone."""
    process = start(command(FIRST, toy_root, tmp_path, "--workers", "2"))
    wait_for_rows(tmp_path, 2, process)
    assert len(pids_of("-s", f"{process.pid}")) > 2
    (os.killpg if number == signal.SIGTERM else os.kill)(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert number == signal.SIGKILL or ("stopped by a signal" in printed and process.returncode == 0)
    wait_for_end_of("-s", f"{process.pid}")

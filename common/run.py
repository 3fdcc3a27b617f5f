"""One run of a script: process group, run folder, log, checkpoint, stop signal.

    with Run("cmpl", out, vars(args)) as run:
        start = run.resume(identity, net=net, optimizer=optimizer)
        for step, (batch,) in run.steps(loader, start, total, seed, [videos]):
            ...
            run.track(step, lr, loss=loss)
            if run.due(step + 1, epoch):
                run.save(step + 1, identity, net=net, optimizer=optimizer)

The run folder (all of it readable without this package):

    config.json       every argument, versions, command line      log.jsonl        one object per logged step
    labelled.txt      the labelled videos (written by the script)  bad_videos.txt   path, tab, reason
    last.pt           newest checkpoint, last.prev.pt the one before, model.pt and result.json at the end
"""

import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.errors import FULL, UserError, explain, first_line, leave, survive_output
from common.io import files
from common.io.workers import SIGNALS, watched

PLACES = "data", "root", "labelled_list"  # flags of data, which may be elsewhere in a resumption
RUNS = itertools.count()  # of this process
PATIENCE = timedelta(days=30)  # how long ranks wait for work of rank 0 alone
PARENT = os.getppid()  # torchrun, while it lives


class Run:
    """A context manager around one run, on one rank or many.

    Args:
        script: name of the method; a run folder and a checkpoint belong to one.
        out: the run folder, made if missing.
        config: every argument by name (JSON values). A folder of another configuration is refused.
            The run's own, with their defaults: `log_every` (10), the steps between two rows of log.jsonl;
            `save_minutes` (15), the minutes between two checkpoints, at most; `max_bad` (0.05), the share of
            the training videos that may be unreadable before the run stops.
        free: names in `config` that may change between a run and its resumption.
        places: names in `config` of data, which a checkpoint knows by what they are: a list or a data set may
            be elsewhere under the same name, and a "..root" anywhere.

    Inside the block a UserError becomes one sentence and exit status 2, the death of a rank or of a
    loader worker one sentence and status 1. SIGTERM, SIGINT, SIGUSR1 and SIGHUP end `steps` after the
    current step on all ranks (a second SIGINT ends the process at once).
    """

    def __init__(self, script, out, config, free=(), places=PLACES):
        self.script, self.out, self.config = script, Path(out), dict(config)
        self.free, self.places = set(free), set(places)
        own = {"log_every": 10, "save_minutes": 15, "max_bad": 0.05} | self.config
        self.log_every, self.save_minutes = own["log_every"], own["save_minutes"]
        self.max_bad = own["max_bad"]
        self.rank, self.world, self.main = 0, 1, os.environ.get("RANK", "0") == "0"
        self.code, self.identity = digest_of_code(script), None  # identity: see `finished`
        self.stop = False  # a signal has reached this rank
        self.stopped = False  # a signal has reached a rank, and all ranks have agreed to stop
        self.ended = False  # there is a result
        self.is_new = False  # this rank has made the run folder
        self.total = self.test_every = self.videos = 0  # see `steps`
        # Since the last row of log.jsonl: sums of terms, steps, seconds of waiting and of all.
        self.sums, self.count, self.wait, self.elapsed, self.mark = {}, 0, 0.0, 0.0, 0.0
        self.bad, self.new_bad = set(), {}  # names of unreadable videos; {name: reason} of new ones
        self.unwritten = {}  # file of the run folder -> text that the disk has not taken yet
        self.save_failed = None  # a sentence, if the last checkpoint could not be written
        self.has_estimate = False  # how long the run takes has been said
        self.began = self.saved = time.monotonic()
        self.seconds_before = 0.0  # of the time before a resumption
        self.lock = self.bar = None

    # ---------------------------------------------------------------------------- begin and end

    def __enter__(self):
        survive_output()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # what nohup asks for
                signal.signal(number, self._on_signal)
        if not self.main:
            warnings.simplefilter("ignore")  # rank 0 has the same to say
        try:
            self._join_group()
            given = [(name, value) for name, value in self.config.items() if not name.endswith("root")]
            flags = [f"--{name} {_names(value)}" for name, value in given if name not in self.free]
            agree({"flags": flags, "code": [self.code]})
            self.bad = self.on_main(self._open_folder)
        except BaseException as error:
            if not self.__exit__(type(error), error, error.__traceback__):
                raise
        return self

    def _join_group(self):
        cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
        if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
            raise UserError(f"there are more processes than GPUs on this node: use --nproc_per_node {gpus}")
        local = int(os.environ.get("LOCAL_RANK", 0)) if "RANK" in os.environ else 0
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise UserError("SLURM_NTASKS is above 1, but its tasks do not know each other: start torchrun "
                            "on each node (srun --ntasks-per-node 1 torchrun --nproc_per_node GPUS ...), or "
                            "set SLURM_NTASKS=1 for one process")  # fmt: skip
        if self._orphaned():  # between two runs: nobody would answer
            raise UserError("torchrun has exited; run the same command again to resume")
        store = dist.HashStore()
        if "RANK" in os.environ:
            try:
                store, self.rank, self.world = next(dist.rendezvous("env://", timeout=timedelta(minutes=15)))
            except (ValueError, dist.DistError) as error:
                raise UserError("RANK is set, but the ranks cannot meet: start with torchrun, "
                                f"or unset RANK ({first_line(error)})") from None  # fmt: skip
            # A restarted attempt, or the next run of one process, must not read the addresses that the one
            # before left in the store.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt{attempt}/{next(RUNS)}", store)
        # Small CPU tensors (stop flags, names of bad videos) go over gloo and never wait for the GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world,
            timeout=timedelta(minutes=30), device_id=self.device if cuda else None,
        )  # fmt: skip
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def _open_folder(self):
        try:
            self.is_new = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written: {error.strerror}") from None
        locked = files.lock(self.lock, wait=False)
        if locked is False:
            raise UserError(f"--out {self.out} is in use by another run")
        if locked is None:
            self.say(f"{self.out} cannot be locked: do not start two runs there")
        for stale in self.out.glob("*.tmp"):
            stale.unlink()
        self._check_config()
        path = self.out / "bad_videos.txt"
        lines = path.read_text(errors="surrogateescape").splitlines() if path.exists() else []
        lines = [line for line in lines if "\t" in line]  # a full disk may have cut one short
        if lines:
            files.write(path, "".join(f"{line}\n" for line in lines))
        return {line.split("\t")[0] for line in lines}

    def _check_config(self):
        path = self.out / "config.json"
        args = json.loads(json.dumps(self.config))  # as a reader of the file will see them
        has_checkpoint = any((self.out / name).exists() for name in ("last.pt", "last.prev.pt"))
        if (has_checkpoint or (self.out / "result.json").exists()) and path.exists():
            try:
                old = json.loads(path.read_text())
                script, old_args = old["script"], old["args"]
            except (ValueError, KeyError):
                raise UserError(f"{path} is damaged: delete it or choose another --out") from None
            if script != self.script:
                raise UserError(f"--out {self.out} holds a run of {script}, not {self.script}")
            if old.get("code") != self.code and self.config.get("resume_changed") is False:
                kind = "a finished run" if (self.out / "result.json").exists() else "a run"
                raise UserError(f"{self.out} holds {kind} of code {old.get('code')}, not {self.code}; "
                                "nothing was run. --rerun trains anew in a folder beside it, "
                                "--resume_changed takes what is there")  # fmt: skip
            for key in sorted((args.keys() | old_args.keys()) - self.free):
                before, now = old_args.get(key), args.get(key)
                is_same_name = key.endswith("root") or _names(before) == _names(now)
                is_same_data = has_checkpoint and key in self.places and is_same_name
                if _paths(before) != _paths(now) and not is_same_data:
                    raise UserError(f"{self.out} holds a run with --{key} {before}, not {now}: choose "
                                    "another --out")  # fmt: skip
        config = {"script": self.script, "code": self.code, "args": args, "world": self.world,
                  "device": str(self.device), "versions": versions(),
                  "command": " ".join(sys.argv)}  # fmt: skip
        files.write(path, json.dumps(config, indent=1))

    def _on_signal(self, number, frame):
        if self.stop and number == signal.SIGINT:
            os._exit(130)
        if self.main and not self.stop and self.bar is not None:
            os.write(2, b"\nstopping after this step\n")  # print may be at work already
        self.stop = True

    def __exit__(self, kind, error, trace):
        if self.bar is not None:
            self.bar.close()
        message, status = explain(error)
        if message is not None:
            if self.is_new and self.out.is_dir() and {*os.listdir(self.out)} <= {"config.json", ".lock"}:
                shutil.rmtree(self.out)  # of a mistake in the command, before anything was done
            leave(self.script, message, status)
        if error is None:
            gc.collect()  # a gloo group that still knows a DDP module can abort the interpreter at its exit
            dist.destroy_process_group()
            if self.lock:
                self.lock.close()
            for name in list(self.unwritten):
                self._append(name, "")
            failures = [f"{self.out / name} could not be written" for name in self.unwritten]
            failures += [self.save_failed] if self.save_failed else []
            for sentence in failures:
                print(f"{self.script}: {sentence}", file=sys.stderr)
            if failures:
                sys.exit(1)
        return False

    # ---------------------------------------------------------------------------- words and ranks

    def say(self, sentence):
        """Print a line from rank 0, above the progress bar."""
        if self.main:
            tqdm.write(sentence.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))

    def on_main(self, function, *args):
        """Run `function` on rank 0 alone; its value, or its UserError, reaches every rank.

        The others wait without a time-out. A file that cannot be written is a UserError, too.
        """
        answer = [None, None]  # value, sentence of an error
        if self.main:
            try:
                answer[0] = function(*args)
            except UserError as error:
                answer[1] = str(error)
            except OSError as error:
                answer[1] = f"{error.filename or f'a file of {self.out}'} cannot be written: {error.strerror}"
        dist.broadcast_object_list(answer, group=self.patient)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    @property
    def seconds(self):
        """Wall seconds of this run, the time before a resumption included."""
        return self.seconds_before + time.monotonic() - self.began

    # ---------------------------------------------------------------------------- networks

    def to_device(self, net, channels_last=False):
        """The network on this rank's device, in the memory format asked for."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        for p in net.to(self.device).parameters():  # .to takes one format for all, 2D and 3D kernels alike
            p.data = p.data.contiguous(memory_format=formats.get(p.dim(), torch.contiguous_format))
        return net

    def distribute(self, net, channels_last=False, compile=False):
        """The network on this rank's device under DistributedDataParallel."""
        self.to_device(net, channels_last)
        # A kernel of 1 x 1 has both layouts at once, and its gradient the other: a copy, no error.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        if compile:
            net.compile()
        return DistributedDataParallel(net)

    def autocast(self):
        """The context of a forward pass: bfloat16 on CUDA, float32 on the CPU.

        Without the cache: weights that a pass without gradient has cast carry none in the next.
        """
        cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False)

    # ---------------------------------------------------------------------------- steps and log

    def steps(self, loader, start, total, seed, lists, test_every=0):
        """Yield (step, batches) for the steps start..total-1, batches with one dict for each of `lists`.

        Before each step torch's generators are seeded from (seed, step, rank). (step, None) comes where a
        quick test is due: after each `test_every` steps (0: never) and after the last one. The time and the
        randomness of a test are its own. The loop ends early, with `stopped` True, after a step or a test
        in which a signal has reached any rank; a resumption makes such a test again.

        Waiting for the loader and computing are timed apart. Unreadable videos, (index, reason) in the "bad"
        of each dict, are named in bad_videos.txt at the next logged step.
        """
        self.total, self.test_every = total, test_every
        self.videos = len({videos.name(i) for videos in lists for i in range(len(videos))})
        self.bar = tqdm(total=total, initial=start, dynamic_ncols=True, smoothing=0.05,
                        disable=not (self.main and sys.stderr.isatty()))  # fmt: skip
        self.mark, self.saved = time.perf_counter() - self.elapsed, time.monotonic()
        batches = watched(loader)
        step = start
        while not self.stopped:
            if self._tests(step):
                with self.untimed():
                    yield step, None
                self.stopped = self.should_stop()
            if step == total or self.stopped:
                break
            asked = time.perf_counter()
            batch = next(batches)
            self.wait += time.perf_counter() - asked
            for views, videos in zip(batch, lists, strict=True):
                self.new_bad.update((videos.name(i), reason) for i, reason in views["bad"])
            torch.manual_seed(step_seed(seed, step, self.rank))
            yield step, batch
            self.bar.update()
            step += 1
        if self.stopped:
            self.say(f"stopped by a signal after step {step}")
        self._gather_bad()
        self.bar.close()
        self.bar = None

    def _tests(self, step):
        """Whether a quick test is due after `step` steps."""
        return self.test_every and (step == self.total or step > 0 and step % self.test_every == 0)

    def due(self, step, every):
        """Whether a checkpoint is due after `step` steps; all ranks must ask, in each step.

        It is at multiples of `every`, after the last step, before a quick test, `save_minutes` after the last
        checkpoint, and where a signal has reached any rank, which also ends `steps`.
        """
        self.stopped = self.should_stop()
        at_once = self.stopped or self.is_late or step == self.total
        return at_once or step % every == 0 or self._tests(step)

    @contextmanager
    def untimed(self):
        """What is done inside (a test between two steps) is not timed and leaves the step's randomness."""
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            yield
        self.mark += time.perf_counter() - began

    def should_stop(self):
        """Whether a signal has reached any rank; all ranks must ask. Sets `is_late`, too."""
        is_late = self.main and time.monotonic() - self.saved >= 60 * self.save_minutes
        flags = torch.tensor([self.stop or self._orphaned(), is_late], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        should_stop, self.is_late = flags.bool().tolist()
        return should_stop

    def _orphaned(self):
        """Whether torchrun has exited, which some signals cause without stopping its workers."""
        return "RANK" in os.environ and os.getppid() != PARENT

    def track(self, step, lr, **terms):
        """Add the scalar tensors `terms` of one step to the running means; None when no row is due.

        Every `log_every` steps, and at the last, logs and returns the means since the last row, over all
        ranks. Raises UserError on every rank when one of them is not finite.
        """
        for name, value in terms.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        if (step + 1) % self.log_every and step + 1 != self.total:
            return None
        self._gather_bad()
        packed = torch.stack(list(self.sums.values())).cpu() / self.count  # waits for the GPU
        now = time.perf_counter()
        timing = torch.tensor([self.wait, now - self.mark - self.wait]) / self.count
        both = torch.cat([packed, timing])
        dist.all_reduce(both)
        *values, wait, compute = (both / self.world).tolist()
        row = dict(step=step + 1, lr=lr, **dict(zip(self.sums, values, strict=True)))
        row |= {"unreadable": len(self.bad), "seconds_data": wait, "seconds_compute": compute}
        if not self.has_estimate and step + 1 < self.total:
            self._say_how_long(self.total - step - 1, wait + compute)
        self.sums, self.count, self.wait, self.mark = {}, 0, 0.0, now
        wrong = [name for name, value in row.items() if not math.isfinite(value)]
        if wrong:
            raise self._diverged(f"not finite at step {step + 1}: {', '.join(wrong)}")
        self.log(row)
        return row

    def _say_how_long(self, steps, seconds):
        """Say how long the rest takes, from the seconds of a step so far."""
        self.has_estimate, minutes = True, steps * seconds / 60
        sentence = f"{steps} steps to go, about {math.ceil(minutes)} minutes here"
        if self.device.type == "cpu" and minutes > 60:
            sentence += " without a GPU; --recipe small, a smaller --size or fewer --epochs take less"
        self.say(sentence)

    def log(self, row):
        """Append one JSON object to log.jsonl and show it (rank 0)."""
        if not self.main:
            return
        self._append("log.jsonl", json.dumps(row) + "\n")
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        if "eval" in row or self.bar is None or self.bar.disable:
            self.say(f"{row.get('eval', 'train')} step {row['step']} {shown}")
        else:
            self.bar.set_postfix_str(shown[:160], refresh=False)

    def _diverged(self, what):
        return UserError(f"{what}; start again with a lower --lr in another --out, or here after "
                         f"deleting {self.out}/last*.pt")  # fmt: skip

    def _append(self, name, text):
        """Add text to a file of the run folder. What the disk does not take is tried again with the next."""
        path, is_first = self.out / name, name not in self.unwritten
        text, size = self.unwritten.pop(name, "") + text, path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
        except OSError as error:
            self.unwritten[name] = text
            if is_first:
                self.say(f"{path} cannot be written: {error.strerror}; training goes on")
            with suppress(OSError):
                os.truncate(path, size)  # no half a line

    def _gather_bad(self):
        """Let all ranks know all unreadable videos; rank 0 names each once in bad_videos.txt.

        Raises UserError on every rank when more than `max_bad` of the training videos are bad.
        """
        for unreadable in gather(self.new_bad):
            for name, reason in unreadable.items():
                if name not in self.bad:
                    self.bad.add(name)
                    self.say(f"unreadable, nothing is learned from it: {name}: {reason}")
                    if self.main:
                        self._append("bad_videos.txt", f"{name}\t{' '.join(reason.split())}\n")
        self.new_bad = {}
        if len(self.bad) > self.max_bad * self.videos:
            raise UserError(
                f"{len(self.bad)} of {self.videos} training videos are unreadable, more than --max_bad "
                f"{self.max_bad}; mend what {self.out / 'bad_videos.txt'} names, and delete that file"
            )

    # ---------------------------------------------------------------------------- checkpoints

    def save(self, step, identity, **parts):
        """Write last.pt: `step` finished steps, the state_dict of every part, and `identity`.

        `identity` is a flat dict of what a resumption must share (labelled list, classes, networks).
        The file is complete or absent, and the one before is kept, unless a full disk needs its room. A disk
        that cannot take it is reported; training goes on, and the run ends with status 1. Raises UserError on
        every rank when the weights are not finite.
        """
        nets = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        if not all(torch.isfinite(p).all() for net in nets for p in net.parameters()):  # equal on all ranks
            raise self._diverged(f"weights not finite after step {step}")
        sums = {name: value.item() for name, value in self.sums.items()}
        # Since the last row of log.jsonl, so that the next one is of the same steps.
        since = gather((sums, self.count, self.wait, time.perf_counter() - self.mark))
        if not self.main:
            return
        state = {"script": self.script, "identity": identity, "step": step, "world": self.world,
                 "parts": {name: part.state_dict() for name, part in parts.items()},
                 "code": self.code, "seconds": self.seconds, "since_row": since}  # fmt: skip
        last, previous = self.out / "last.pt", self.out / "last.prev.pt"
        try:
            try:
                files.save(state, last, keep=previous)
            except OSError as error:
                if error.errno not in FULL or not previous.exists():
                    raise
                previous.unlink()  # a full disk has room for the new one without the oldest
                files.save(state, last)
            self.save_failed = None
        except OSError as error:
            self.save_failed = f"the checkpoint of step {step} is not in {last}: {error.strerror}"
            self.say(self.save_failed + "; training goes on, the older one is kept")
        self.saved = time.monotonic()

    def resume(self, identity, **parts):
        """Load last.pt into `parts` if it is there; returns the number of finished steps, else 0.

        Only rank 0 reads the file. A damaged one falls back to last.prev.pt with a warning. A run
        that goes on with another number of ranks has steps of another size: their number is
        converted, so that it has seen as many samples. Raises UserError for another script, another
        identity, or files that are all damaged.
        """
        state = self.on_main(self._read_checkpoint, identity)
        self.on_main(self._truncate_log, state["step"] if state else 0)
        self.on_main(self._check_space, parts)
        if state is None:
            return 0
        try:
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.out} has a checkpoint of another {name}: {reason}") from None
        self.seconds_before = state["seconds"]
        if state["world"] == self.world:
            sums, self.count, self.wait, self.elapsed = state["since_row"][self.rank]
            self.sums = {name: torch.tensor(value, device=self.device) for name, value in sums.items()}
        self.say(f"resumed from {state['path']} after step {state['step']}")
        step = state["step"] * state["world"] // self.world
        if state["world"] != self.world:
            self.say(f"that was with {state['world']} ranks; with {self.world} it is step {step}, and the "
                     "batch of a step, and a learning rate that follows it, are others")  # fmt: skip
        return step

    def _read_checkpoint(self, identity):
        paths = [p for p in (self.out / "last.pt", self.out / "last.prev.pt") if p.exists()]
        for path in paths:
            try:
                state = files.load(path)
                step = state["step"]
            except (UserError, KeyError, TypeError) as error:
                self.say(f"{error}; trying the one before")
                path.replace(path.with_name("last.damaged.pt"))  # so that it never replaces a good one
                continue
            if state.get("script") != self.script:
                raise UserError(f"{path} is a checkpoint of {state.get('script')}, not of {self.script}")
            self._check_identity(path, state["identity"], identity)
            return {**state, "step": step, "path": str(path)}
        if paths:
            raise UserError(f"every checkpoint in {self.out} is damaged: delete them to start again")
        return None

    def _check_identity(self, path, old, new):
        """Raise UserError if `path` is of another identity."""
        for key in sorted(old.keys() | new.keys()):
            before, now = old.get(key), new.get(key)
            if before != now and key in ("labelled", "unlabelled"):
                file = self.out / "labelled.txt" if key == "labelled" else path
                raise UserError(f"the {key} videos are not those of {file}: have files gone or come? "
                                "Put them back, or choose another --out")  # fmt: skip
            if before != now:
                raise UserError(f"{path} was trained with {key} {before}, not {now}: choose another --out")

    def _truncate_log(self, step):
        """Drop the rows of log.jsonl that the run will write again, and damaged lines."""
        path, rows, n_damaged = self.out / "log.jsonl", [], 0
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line.decode())
                # A row about step n was written after n steps; an evaluation there is done again.
                rows += [line.decode() + "\n"] * (row["step"] < step + ("eval" not in row))
            except (ValueError, KeyError, TypeError):
                n_damaged += 1
        if n_damaged:
            self.say(f"{path}: {n_damaged} of {len(lines)} lines are damaged and were dropped")
        if lines:
            files.write(path, "".join(rows))

    def _check_space(self, parts):
        """Raise UserError where what the run is going to keep does not fit on the disk."""
        nets = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        need = model = files.size([net.state_dict() for net in nets])
        for part in parts.values():
            if isinstance(part, torch.optim.Optimizer):  # Adam's two moments or SGD's momentum
                moments = 2 if "betas" in part.defaults else 1
                need += moments * files.size([group["params"] for group in part.param_groups])
        # last.pt, last.prev.pt, and a new one while it is written.
        need *= 3 - sum((self.out / name).exists() for name in ("last.pt", "last.prev.pt"))
        disk = shutil.disk_usage(self.out)
        free = disk.free if disk.total else math.inf  # some file systems do not say
        if free < need + model:
            raise UserError(f"--out {self.out} is on a disk with {free / 1e6:.1f} MB free; last.pt, "
                            f"last.prev.pt and model.pt need {(need + model) / 1e6:.1f} MB")  # fmt: skip

    # ---------------------------------------------------------------------------- results

    def write(self, name, text):
        """Write a text file of the run folder, complete or absent (rank 0)."""
        if self.main:
            files.write(self.out / name, text)

    def finished(self, identity):
        """Whether a run has already ended here; its RESULT line is then printed again.

        Raises UserError if the result is one of another `identity`, see `save`.
        """
        self.identity = identity
        row = self.on_main(self._read_result, identity)
        if row:
            self._show_result(row)
        return self.ended

    def _read_result(self, identity):
        path = self.out / "result.json"
        if not path.exists():
            return None
        try:
            row = json.loads(path.read_text())
            code, old = row["code"], row["identity"]
        except (ValueError, KeyError, TypeError):
            self.say(f"{path} is damaged: the test is made again")
            return None
        self._check_identity(path, old, identity)
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        self.say(f"finished on {date} by code {code}; nothing was run")
        return row

    def result(self, row):
        """Write result.json and print the final RESULT line, `RESULT name=value ...` (rank 0)."""
        row = {**row, "code": self.code, "identity": self.identity}
        self.write("result.json", json.dumps(row, indent=1))
        self._show_result(row)

    def _show_result(self, row):
        self.ended = True
        words = (
            f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k != "identity"
        )
        self.say(" ".join(["RESULT", *words]))


# -------------------------------------------------------------------------------- functions


def _names(value):
    """The files that a value of a flag, "a,b", may name, without their folders; other values as they are."""
    if not isinstance(value, str):
        return value
    return ",".join(os.path.basename(os.path.abspath(part)) for part in value.split(","))


def _paths(value):
    """The same with their folders, so that "runs/a" and "./runs/a" are one."""
    return ",".join(map(os.path.realpath, value.split(","))) if isinstance(value, str) else value


def agreed(function, *args, **named):
    """What load_data or labelled_subset returns, which must be the same on every rank.

    Raises UserError on every rank, one sentence, where a rank raises one or finds something else: none trains
    alone, and none waits for one that has left.
    """
    value = error = None
    try:
        value = function(*args, **named)
    except UserError as problem:
        error = str(problem)
    errors = gather(error)
    if any(errors):
        rank, hosts = next(rank for rank, text in enumerate(errors) if text), gather(socket.gethostname())
        place = f" (on rank {rank}, {hosts[rank]})" if len({*errors}) > 1 else ""
        raise UserError(errors[rank] + place)
    agree(value.lists() if hasattr(value, "lists") else {"labelled videos": args[0].train.lines(value)})
    return value


def agree(lists):
    """Raise UserError on every rank, saying which one lacks what, where {what: list of lines} differ."""
    digests = [hashlib.sha256(os.fsencode("\n".join(lines))).digest() for lines in lists.values()]
    if all(other == digests for other in gather(digests)):
        return
    of_rank_0, differences = [lists], []
    dist.broadcast_object_list(of_rank_0)
    for what, lines in of_rank_0[0].items():
        missing, more = sorted({*lines} - {*lists[what]}), sorted({*lists[what]} - {*lines})
        if missing:
            differences.append(f"lacks {len(missing)} {what} of rank 0 ({', '.join(missing[:3])})")
        if more:
            differences.append(f"has {len(more)} {what} that rank 0 lacks ({', '.join(more[:3])})")
        if not missing and not more and lists[what] != lines:
            differences.append(f"has its {what} in another order")
    pairs = enumerate(gather((differences, socket.gethostname())))
    sentences = [f"rank {rank} on {host} {' and '.join(texts)}" for rank, (texts, host) in pairs if texts]
    raise UserError(f"all ranks must find the same: {'; '.join(sentences[:3])}")


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def digest_of_code(script):
    """Twelve hex digits that change with the file of `script` and with common/, but for its tools."""
    modules = sys.modules.get(script), sys.modules["__main__"]
    own = [Path(getattr(module, "__file__", None) or "") for module in modules]
    own = [path for path in own if path.stem == script]
    folder, sha = Path(__file__).parent, hashlib.sha256()
    for path in own[:1] + sorted(path for path in folder.rglob("*.py") if path.parent.name != "tools"):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def step_seed(seed, step, rank):
    """A 63-bit seed for what is random in one step of one rank (dropout, on-device noise)."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def versions():
    """Versions of what the numbers of a run depend on, and the commit if there is one."""
    here, packages = Path(__file__).parent, ("torch", "torchvision", "av", "numpy")
    try:
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    except OSError:
        git = ""
    numbers = {name: metadata.version(name) for name in packages}
    return {"python": sys.version.split()[0], **numbers, "commit": git.strip() or None}

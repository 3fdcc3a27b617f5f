"""Loader workers and pools of processes: a failure ends in one sentence, and no process is left behind."""

import atexit
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # those that stop a run
LONGEST_TMPDIR = 75  # bytes: multiprocessing adds 32 to name a socket, which may have 107
TIMEOUT = 600  # seconds to wait for one batch: a hung disk ends the run with an error


def loader(dataset, keys, workers):
    """A DataLoader of dataset[key] for the keys, which are whole batches; `workers` processes make them."""
    options = dict(sampler=keys, batch_size=None, collate_fn=_unchanged, pin_memory=torch.cuda.is_available())
    if workers:  # no plain fork: the main process has threads, and CUDA does not survive it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.transforms.v2", "av"])  # once, not per worker
        _start_forkserver()
        options.update(num_workers=workers, multiprocessing_context=context)
    return DataLoader(dataset, worker_init_fn=_begin_worker, **options)


def _unchanged(batch):
    return batch


class _Hung(BaseException):
    """Not an Exception: without workers it is raised while a video is decoded, and is no fault of that."""


def _raise_hung(*_):
    raise _Hung


def watched(batches):
    """The batches of a loader; RuntimeError when one takes more than TIMEOUT seconds (main thread only).

    With the loader's own time-out it would take as long to see that a worker has died.
    """
    handler, batches = signal.signal(signal.SIGALRM, _raise_hung), iter(batches)
    try:
        while True:
            signal.alarm(TIMEOUT)
            try:
                batch = next(batches)
            except StopIteration:
                return
            except _Hung:
                raise RuntimeError(f"DataLoader timed out after {TIMEOUT} seconds") from None
            except (EOFError, ConnectionError) as error:  # killed while it was handing over a batch
                if "in DataLoader worker" in str(error):  # raised by what the worker ran
                    raise
                raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
            finally:
                signal.alarm(0)
            yield batch
    finally:
        signal.signal(signal.SIGALRM, handler)


def _start_forkserver():
    """Start it with the signals that stop a run ignored: it and its workers are needed for the last step."""
    handlers = [(number, signal.signal(number, signal.SIG_IGN)) for number in SIGNALS]
    folder = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        tempfile.tempdir = "/tmp"
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = folder
        for number, handler in handlers:
            signal.signal(number, handler)


def _begin_worker(worker):
    """The main process decides when to stop: Ctrl-C and batch systems signal its workers as well."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_unsendable)
    end_with_parent()


def _unsendable(error, item):
    """End this worker: multiprocessing would drop the batch, and the main process would wait for it."""
    trace = getattr(item[1], "exc_msg", "")  # of an exception instead of a batch
    print(f"{trace}a loader worker cannot send a batch: {error!r}", file=sys.stderr)
    os._exit(1)


@atexit.register
def _kill_workers():
    """At exit multiprocessing sends its workers SIGTERM, which loader workers ignore, and waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def end_with_parent():
    """End this process when the one that started it ends, even by kill -9.

    PyTorch's own watch looks at the parent of a worker, which is the fork server: that lives as long as its
    workers, which would wait for work for ever.
    """

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_parallel(job, items, workers, text):
    """Yield (item, job(item)) in order of completion, from a pool of processes with a progress bar.

    The result of a job whose process dies (decoders crash on some files) is a sentence that says so.
    With 0 workers all jobs run in this process. Without a text there is no bar.
    """
    results = _pool(job, items, workers) if workers else ((item, job(item)) for item in items)
    interval = 0.5 if sys.stderr.isatty() else 60
    bar = dict(unit="video", mininterval=interval, dynamic_ncols=True, disable=not text)
    yield from tqdm(results, text, len(items), **bar)


def _pool(job, items, workers):
    waiting = deque(items)
    while waiting:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_process)
        running = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    running[pool.submit(job, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:  # one of the running jobs is the reason; alone, it shows which
            if len(running) == 1:
                yield running.popitem()[1], "the process that decoded it died"
            for item in running.values():
                yield from _pool(job, [item], 1)
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process():
    """A worker leaves Ctrl-C to the main process, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()

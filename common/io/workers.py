"""Loader workers and pools of processes that end with a sentence and outlive nobody."""

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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # those that stop a run
LONGEST_TMPDIR = 75  # bytes: multiprocessing adds 32 to name a socket, which may have 107
TIMEOUT = 600  # seconds to wait for one batch: a hung disk ends the run with an error


def _loader(dataset, batches, collate, workers):
    options = dict(batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available())
    if workers:  # no plain fork: the main process has threads, and CUDA does not survive it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.transforms.v2", "av"])  # once, not per worker
        _start_forkserver()
        options.update(num_workers=workers, multiprocessing_context=context)
    return DataLoader(dataset, worker_init_fn=_begin_worker, **options)


class _Hung(BaseException):
    """Not an Exception: without workers it is raised while a video is decoded, and is no fault of that."""


def watched(loader):
    """The batches of a loader; RuntimeError when one takes more than TIMEOUT seconds (main thread only).

    The loader's own time-out would also hide for as long that a worker has died.
    """

    def hung(*_):
        raise _Hung

    before, batches = signal.signal(signal.SIGALRM, hung), iter(loader)
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
        signal.signal(signal.SIGALRM, before)


def _start_forkserver():
    """Start it deaf to the signals that stop a run: it and its workers must outlive the last step."""
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
    trace = getattr(item[1], "exc_msg", "")  # of an exception in place of a batch
    print(f"{trace}a loader worker cannot send a batch: {error!r}", file=sys.stderr)
    os._exit(1)


@atexit.register
def _kill_workers():
    """At exit multiprocessing sends its workers SIGTERM, which loader workers ignore, and waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def end_with_parent():
    """Let this process end when the one that asked for it does, even by kill -9.

    A loader's own watch looks at the parent of a worker, which is the fork server: that lives as long as its
    workers, and they would wait for work for ever.
    """

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_parallel(job, items, workers, text):
    """Yield (item, job(item)) in order of completion, from a pool of processes with a progress bar.

    A job whose process dies (decoders crash on some files) has a sentence that says so for a result;
    those that ran beside it are done again, one at a time. With 0 workers all run in this process. Without a
    text there is no bar.
    """
    from tqdm import tqdm

    every = 0.5 if sys.stderr.isatty() else 60
    todo, suspects = deque(items), deque()
    with tqdm(
        total=len(items), desc=text, unit="video", mininterval=every, dynamic_ncols=True, disable=not text
    ) as bar:
        while todo and not workers:
            yield todo[0], job(todo.popleft())
            bar.update()
        while todo or suspects:
            queue, limit = (suspects, 1) if suspects else (todo, 2 * workers)
            pool = ProcessPoolExecutor(
                min(limit, workers), multiprocessing.get_context("spawn"), _begin_process
            )
            running = {}
            try:
                while queue or running:
                    while queue and len(running) < limit:
                        running[pool.submit(job, queue[0])] = queue[0]
                        queue.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
                        bar.update()
            except BrokenProcessPool:
                if queue is suspects and running:
                    yield running.popitem()[1], "the process that decoded it died"
                    bar.update()
                suspects += running.values()
            finally:
                pool.shutdown(cancel_futures=True)


def _begin_process():
    """A worker leaves Ctrl-C to the main process, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()

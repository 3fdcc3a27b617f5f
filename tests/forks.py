"""Script runs that fork from an interpreter that has already imported what scripts import.

    process = forks.start([sys.executable, "cmpl.py", "--data", "toy"], cwd, env, ranks=2)
    out, err = process.communicate(timeout=60)

A tiny run is a second of work after seconds of importing torch, torchvision and av. Here a server has
imported them and forks for every run. The child is what a new interpreter is at the first line of a script:
leader of its own session, with its own environment, output and random numbers, one thread, default signal
handlers, nothing of `common` imported; and it ends as an interpreter does, as nothing is caught. (A child of
multiprocessing's server would not.) What a fork cannot show is how an interpreter starts and what a script
forgot to import. The ranks of a group get torchrun's environment, but no torchrun that ends the others when
one fails.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

PRELOAD = ("torch", "torch.distributed.elastic.multiprocessing.errors", "torchvision.transforms.v2",
           "torchvision.models.video", "av", "PIL.ImageDraw", "tqdm")  # fmt: skip
SERVERS = []  # (socket, process) of two servers with other string hashes: ranks do not order a set alike


def request(number, *words_and_files):
    """Ask a server for a fork."""
    while len(SERVERS) < 2:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            # How many threads OpenMP and OpenBLAS start is asked when they are loaded: a fork has one only.
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                                "PYTHONHASHSEED": f"{len(SERVERS)}"}  # fmt: skip
            call = [sys.executable, __file__, f"{there.fileno()}"]
            SERVERS.append((here, subprocess.Popen(call, pass_fds=[there.fileno()], start_new_session=True,
                                                   stdin=subprocess.DEVNULL, env=env)))  # fmt: skip
    *words, files = words_and_files
    socket.send_fds(SERVERS[number % 2][0], [json.dumps(words).encode()], files)


@atexit.register
def stop():
    for here, process in SERVERS:
        here.close()  # a server ends with its client, however that ends
        process.wait()


class Forked:
    """What the tests use of a subprocess.Popen; several ranks are signalled and waited for together."""

    count = 0

    def __init__(self, call, cwd, env, ranks):
        self.args, self.returncode, self.pids, self.codes, self.replies = call, None, [], {}, []
        if ranks:
            from torch.distributed import TCPStore  # here, as the servers start without it

            # Here and not in rank 0, as torchrun has it: its port is free, and nobody else can take it.
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{self.store.port}", "WORLD_SIZE": f"{ranks}",
                   "LOCAL_WORLD_SIZE": f"{ranks}", "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RESTART_COUNT": "0"} | env  # fmt: skip
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        Forked.count += 1
        for rank in range(ranks or 1):
            own = {"LOCAL_RANK": f"{rank}"} | env | {"RANK": f"{rank}"} if ranks else env
            reply, to_reply = os.pipe()
            request(Forked.count + rank, call, cwd, own, [to_out, to_err, to_reply])
            os.close(to_reply)
            self.replies.append(open(reply))
            self.pids.append(int(self.replies[-1].readline()))
        os.close(to_out)
        os.close(to_err)
        self.pid, self.text = self.pids[0], ["", ""]
        self.readers = [threading.Thread(target=self._read, args=pipe, daemon=True)
                        for pipe in enumerate((out, err))]  # fmt: skip
        for reader in self.readers:
            reader.start()

    def _read(self, i, pipe):
        with open(pipe) as file:
            self.text[i] = file.read()

    def poll(self, seconds=0):
        """The status once all have ended: that of the first rank that has not 0."""
        until = time.monotonic() + seconds
        for pid, reply in zip(self.pids, self.replies, strict=True):
            if pid not in self.codes and select.select([reply], [], [], max(0, until - time.monotonic()))[0]:
                self.codes[pid] = int(reply.readline())
                reply.close()
        if len(self.codes) == len(self.pids):
            self.returncode = next(filter(None, map(self.codes.get, self.pids)), 0)
        return self.returncode

    def communicate(self, timeout=240):
        """(stdout, stderr), once nobody has them open any more; a process left behind is a time-out."""
        until = time.monotonic() + timeout
        for reader in self.readers:
            reader.join(max(0, until - time.monotonic()))
        status = self.poll(max(0, until - time.monotonic()))
        if status is None or any(reader.is_alive() for reader in self.readers):
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(self.text)

    def send_signal(self, number):
        self.poll()
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(call, cwd, env, ranks=None):
    """Like subprocess.Popen with pipes, of [sys.executable, script or "-m", ...], in a group of `ranks`."""
    return Forked([str(word) for word in call], str(cwd), dict(env), ranks)


# ---- in the server ---------------------------------------------------------------------------------


def serve(control):
    """Fork for every request; in the child: call, cwd, env, the files for its output."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for overseers
    while True:
        words, files, *_ = socket.recv_fds(control, 1 << 20, 3)
        if not words:
            sys.exit()
        if not os.fork():  # the overseer of a run, which tells its process and how it ends
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            *output, reply = files
            pid = os.fork()
            if not pid:
                os.close(reply)
                return *json.loads(words), output
            for file in output:
                os.close(file)
            with suppress(BrokenPipeError), open(reply, "w", buffering=1) as file:
                file.write(f"{pid}\n")
                file.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
            os._exit(0)
        for file in files:
            os.close(file)


def become(call, cwd, env, output):
    """Be a new interpreter at the first line of a script."""
    os.setsid()
    for here, there in zip(output, (1, 2), strict=True):
        os.dup2(here, there)
        os.close(here)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    numpy.random.seed()  # what has no seed must not have the server's; `random` sees to itself
    torch.default_generator.seed()
    path = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    is_module = call[1] == "-m"
    sys.argv = call[2:] if is_module else call[1:]
    sys.path[:1] = [cwd if is_module else os.path.dirname(os.path.abspath(call[1])), *path]
    if is_module:
        runpy.run_module(call[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(call[1], run_name="__main__")


if __name__ == "__main__":
    sys.modules["triton"] = None  # only GPUs use it, and it complains at an exit with frozen objects
    for name in PRELOAD:
        __import__(name)
    import numpy
    import torch

    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread, which a fork would lose"
    gc.freeze()  # most of an interpreter's end is looking for cycles in its modules
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))

"""Script runs that fork from an interpreter that has already imported what scripts import.

    process = forks.start([sys.executable, "cmpl.py", "--data", "toy"], cwd, env, ranks=2)
    out, err = process.communicate(timeout=60)

A tiny run is a second of work after seconds of importing torch, torchvision and av. Here a server has
imported them and forks for every run. The child is what a new interpreter is at the first line of a script:
leader of its own session, with its own environment, output and random numbers, one thread, default signal
handlers, nothing of `common` imported; and it ends as an interpreter does, as nothing is caught. A child of
multiprocessing's server would not: it has a parent there, and leaves without its exit functions.

What a fork cannot show is how an interpreter starts and what a script forgot to import; so the tests also
start each script as a user does. The ranks of a group get torchrun's environment, but no torchrun that ends
the others when one fails.
"""

import atexit
import gc
import itertools
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

PRELOAD = ("torch", "torch.distributed.elastic.multiprocessing.errors", "torchvision.transforms.v2",
           "torchvision.models.video", "av", "PIL.ImageDraw", "tqdm")  # fmt: skip
PAIR = socket.AF_UNIX, socket.SOCK_SEQPACKET  # sockets that keep messages apart and carry open files
SERVERS, RUNS, LOCK = [], itertools.count(), threading.Lock()


def servers():
    """The sockets of two servers with other string hashes: no two runs in a row order a set alike."""
    with LOCK:
        while len(SERVERS) < 2:
            SERVERS.append(new_server(len(SERVERS)))
    return [here for here, _ in SERVERS]


def new_server(seed):
    here, there = socket.socketpair(*PAIR)
    with there:
        # How many threads OpenMP and OpenBLAS start is asked when they are loaded: a fork has one only.
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": f"{seed}"}
        process = subprocess.Popen([sys.executable, __file__, f"{there.fileno()}"], pass_fds=[there.fileno()],
                                   stdin=subprocess.DEVNULL, start_new_session=True, env=env)  # fmt: skip
    return here, process


@atexit.register
def stop():
    for here, process in SERVERS:
        here.close()  # a server ends with its client, however that ends
        process.wait()


def start(call, cwd, env, ranks=None):
    """Like subprocess.Popen with pipes, of [sys.executable, script or "-m", ...], in a group of `ranks`."""
    return Forked([str(word) for word in call], str(cwd), dict(env), ranks)


class Forked:
    """What the tests use of a subprocess.Popen; several ranks are signalled and waited for together."""

    def __init__(self, call, cwd, env, ranks):
        self.args, self.returncode, self.pids, self.codes, self.replies = call, None, [], {}, []
        if ranks:
            from torch.distributed import TCPStore

            # Here and not in rank 0, as torchrun has it: its port is free, and nobody else can take it.
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{self.store.port}", "WORLD_SIZE": f"{ranks}",
                    "LOCAL_WORLD_SIZE": f"{ranks}", "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        first = next(RUNS)
        for rank in range(ranks or 1):
            if ranks:
                env |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            reply, theirs = socket.socketpair(*PAIR)
            with theirs:
                request = json.dumps([call, cwd, env]).encode()
                server = servers()[(first + rank) % 2]
                socket.send_fds(server, [request], [theirs.fileno(), to_out, to_err])
            self.pids.append(int(reply.recv(99)))
            self.replies.append(reply)
        os.close(to_out)
        os.close(to_err)
        self.pid, self.text = self.pids[0], ["", ""]
        self.readers = []
        for i, pipe in enumerate((out, err)):
            self.readers.append(threading.Thread(target=self._read, args=(i, pipe), daemon=True))
            self.readers[i].start()

    def _read(self, i, pipe):
        with open(pipe) as file:
            self.text[i] = file.read()

    def poll(self, seconds=0):
        """The status once all have ended: that of the first rank that has not 0."""
        until = time.monotonic() + seconds
        for pid, reply in zip(self.pids, self.replies, strict=True):
            if pid not in self.codes and select.select([reply], [], [], max(0, until - time.monotonic()))[0]:
                self.codes[pid] = int(reply.recv(99))
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
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(self.text)

    def send_signal(self, number):
        self.poll()
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# ---- in the server ---------------------------------------------------------------------------------


def serve(control):
    """Fork for every request, and report how the child ends; in the child: (request, stdout, stderr)."""
    children = {}  # of an open pid: (pid, socket for the reply)
    while True:
        for ready in select.select([control, *children], [], [])[0]:
            if ready is not control:
                pid, reply = children.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with reply:
                    answer(reply, code)
                continue
            request, fds, *_ = socket.recv_fds(control, 1 << 20, 3)
            if not request:
                sys.exit()
            reply = socket.socket(fileno=fds[0])
            pid = os.fork()
            if not pid:
                for other in (control, reply, *(sibling for _, sibling in children.values())):
                    other.close()
                for other in children:
                    os.close(other)
                return json.loads(request), *fds[1:]
            os.close(fds[1])
            os.close(fds[2])
            children[os.pidfd_open(pid)] = pid, reply
            answer(reply, pid)


def answer(reply, number):
    try:
        reply.send(str(number).encode())
    except BrokenPipeError:  # the test that asked is over
        pass


def become(call, cwd, env, out, err):
    """Be a new interpreter at the first line of a script."""
    os.setsid()
    for here, there in ((out, 1), (err, 2)):
        os.dup2(here, there)
        os.close(here)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    numpy.random.seed()  # what has no seed must not have the server's; `random` sees to itself
    torch.default_generator.seed()
    path = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if call[1] == "-m":
        sys.path[:1], sys.argv = [cwd, *path], call[2:]
        runpy.run_module(call[2], run_name="__main__", alter_sys=True)
    else:
        sys.path[:1], sys.argv = [os.path.dirname(os.path.abspath(call[1])), *path], call[1:]
        runpy.run_path(call[1], run_name="__main__")


if __name__ == "__main__":
    sys.modules["triton"] = None  # only GPUs use it, and it complains at an exit with frozen objects
    for name in PRELOAD:
        __import__(name)
    import numpy
    import torch

    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread, which a fork would lose"
    gc.freeze()  # most of an interpreter's end is looking for cycles in its modules
    request, *files = serve(socket.socket(fileno=int(sys.argv[1])))
    become(*request, *files)

"""Errors as sentences: those that a user can correct, and what errors of videos, torch and the disk mean."""

import errno
import io
import os
import re
import signal
import sys
import time
from contextlib import contextmanager

import av
from PIL import Image

from common.io.workers import SIGNALS

FULL = errno.ENOSPC, errno.EDQUOT  # the disk is full, or the user's quota of it


class UserError(Exception):
    """A mistake that a user can correct: one sentence that names the file, line or flag, and what is right.

    A script prints it without a traceback and exits with status 2.
    """


class VideoError(UserError):
    """A file whose frames cannot be read; str() is the reason, in one line."""


# What av, PIL and the system raise for a bad file. The type of any other exception is part of the reason.
FAULTS = (VideoError, av.FFmpegError, OSError, IndexError, ValueError, EOFError, MemoryError)
FAULTS += (Image.DecompressionBombError,)


class OutOfRange(IndexError):
    """The caller asked for frames that the video does not have: a bug in the program, not a bad video."""


@contextmanager
def reasons():
    """A context in which every exception but OutOfRange becomes a VideoError."""
    try:
        yield
    except (VideoError, OutOfRange):
        raise
    except Exception as fault:
        raise VideoError(reason_of(fault)) from fault


def reason_of(fault):
    """An exception in one line; its type is named unless bad files are known to raise it."""
    text = getattr(fault, "strerror", None) or str(fault).partition("\n")[0]
    if not isinstance(fault, FAULTS):
        text = f"{type(fault).__name__}: {text}".removesuffix(": ")
    return text[:200] or type(fault).__name__


def printable(name):
    """A name in which bytes that are not UTF-8 are escaped, to be printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# What an error of torch means to the person who started the run: {pattern in it: (sentence, exit status)}.
TROUBLES = {
    "Expected more than 1 value per channel": (
        "batch norm needs more than one value of each channel: raise --batch, --frames or --size", 2),
    "Connection (closed|reset) by peer|Broken pipe|NCCL error|Socket Timeout|Timed out wait|process exited": (
        "another rank has died; its own message says why. The same command resumes from last.pt", 1),
    r"DataLoader (worker \(pid|timed out)|shared memory|unable to (mmap|write to file|resize file)": (
        "a loader worker died or hung (memory or /dev/shm full, stalled storage, or a file that crashes the "
        "decoder, which python -m common.tools.check names): try fewer --workers. The same command resumes "
        "from last.pt", 1),
    "out of memory": ("the GPU is out of memory: lower --batch, --frames or --size, or use more GPUs", 1),
}  # fmt: skip


def leave(script, message, status=2):
    """End the process with a sentence, which rank 0 alone prints if all ranks have it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # rank 0 prints the same, and torchrun then ends this rank
    print(f"{script}: {message}", file=sys.stderr, flush=True)
    os._exit(status)  # peers may be gone: no collective clean-up can be trusted to end


def explain(error):
    """(sentence, exit status) for an error that a user can understand, else (None, None)."""
    if isinstance(error, UserError):  # one from a loader worker has the worker's traceback before it
        return re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1]), 2
    if isinstance(error, OSError) and error.errno in FULL:
        return (f"{error.filename or 'a file'} could not be written: {error.strerror}. Free some space; the "
                "same command resumes from last.pt"), 1  # fmt: skip
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 1
    if isinstance(error, RuntimeError | ValueError):
        for pattern, (sentence, status) in TROUBLES.items():
            if re.search(pattern, str(error)):
                return f"{sentence} ({first_line(error)})", status
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return f"--compile fails: install what is missing or leave it out ({first_line(error)})", 2
    return None, None


def first_line(error):
    return str(error).strip().partition("\n")[0][:120]


class Output(io.FileIO):
    """Standard output or error that drops what a closed pipe, lost terminal or full disk does not accept."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def survive_output():
    """Let the process continue when its output cannot be written (`| head -1`, `>&-`, a full disk)."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # in place of those that are closed
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # also None, but not the stream of a notebook or a test
            file = io.BufferedWriter(Output(number, "w", closefd=False))
            encoding = getattr(stream, "encoding", None)
            setattr(sys, name, io.TextIOWrapper(file, encoding, "backslashreplace", line_buffering=True))


def status_of(command, args, out):
    """Exit status of a tool, command(args): 2 after a UserError or an error of the disk, 130 after Ctrl-C."""
    survive_output()
    try:
        return command(args)
    except UserError as error:
        sentence = str(error)
    except OSError as error:
        sentence = (
            f"{error.filename or out}: {error.strerror}; when that is mended, run the same command again"
        )
    except KeyboardInterrupt:
        return 130
    print(sentence, file=sys.stderr)
    return 2

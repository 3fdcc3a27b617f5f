"""Files that are complete or absent, and checkpoints that are safe to read."""

import errno
import os
import pickle
import tempfile
import threading
import zipfile
from pathlib import Path

import torch

from common import UserError

# Errors of a file's name alone; after any other, the disk takes no other file either.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)
OLD = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # what torch.save wrote first before 1.6


def free_bytes(folder):
    """Bytes that can still be written to the disk of `folder`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def lock(file, wait=True):
    """Lock an open file (or descriptor) for this process; whether that is done.

    False if another process has it and `wait` is False; None on a file system without locks.
    """
    import fcntl  # POSIX alone has it

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def make_folder(path):
    """Make a folder where there is none, and try to write in it: OSError before long work, not after."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class replacing:
    """Open a file for writing (binary) that takes the place of `path` only once it is complete.

    With `keep`, the file that stood there before remains under that name. On an error nothing is
    left behind and `path` is untouched.
    """

    def __init__(self, path, keep=None):
        self.path, self.keep = Path(path), keep
        self.temp = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.tmp")

    def __enter__(self):
        self.file = open(self.temp, "wb")
        return self.file

    def __exit__(self, kind, error, trace):
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                if self.keep and self.path.exists():
                    os.replace(self.path, self.keep)
                os.replace(self.temp, self.path)
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            try:
                self.file.close()
            finally:
                self.temp.unlink(missing_ok=True)
        return False


def write(path, text):
    """Write a text file that is complete or absent."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def load(path):
    """Read a file written by torch.save, on the CPU, without running code from it.

    Raises UserError (one sentence) when it is missing, damaged (every byte is checked against the
    archive's CRC-32; files of torch before 1.6 are no archives and have none) or holds anything but
    tensors and plain values.
    """
    try:
        with open(path, "rb") as file:
            old = file.read(len(OLD)) == OLD
        if not old:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise UserError(f"{path} is damaged (bad bytes in {broken})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UserError:
        raise
    except (zipfile.BadZipFile, EOFError):
        raise UserError(f"{path} is damaged, cut short, or not a checkpoint") from None
    except Exception as error:  # torch.load has no error type of its own
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be loaded safely: {reason}") from None

"""Files that are complete or absent, and checkpoints that are safe to read."""

import errno
import hashlib
import os
import pickle
import tempfile
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import FULL, UserError, printable

# Errors of the name of a file; after any other error the disk takes no other file either.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)
OLD = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # how files of torch before 1.6 begin


def lock(file, wait=True):
    """Lock an open file (or descriptor) for this process, until it is closed. Returns whether it is locked:

    False if another process has the lock and `wait` is False; None on a file system without locks.
    """
    import fcntl  # only on POSIX

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def digest(path):
    """sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path):
    """Make a folder unless it exists, and try to write in it, so that an OSError comes before long work."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing(path, keep=None):
    """Open a temporary file for writing (binary) that replaces `path` at the end of the block.

    keep: a name for the previous file. On an error nothing is left behind and `path` is untouched; an OSError
    of the disk names `path`.
    """
    path = Path(path)
    temp = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temp, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename is None or os.path.abspath(error.filename) == os.path.abspath(temp):
            raise OSError(error.errno, error.strerror, str(path)) from None  # av's error has a fixed name
        raise
    finally:
        temp.unlink(missing_ok=True)


def _sync(folder):
    """Write the names in a folder to the disk, if the file system can: CIFS and VirtualBox's cannot."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write(path, text):
    """Write a text file that is complete or absent."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def size(state):
    """Bytes of the tensors in a state_dict, or in dicts and lists of some."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(size, values))


def save(state, path, keep=None):
    """torch.save, complete or absent; see `replacing`. The OSError of a full disk names the space needed."""
    try:
        with replacing(path, keep) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        fault = error if isinstance(error, OSError) else error.__context__  # torch hides a full disk's error
        if not isinstance(fault, OSError):
            raise
        needed = f", {size(state) / 1e6:.1f} MB are needed" if fault.errno in FULL else ""
        raise OSError(fault.errno, f"{fault.strerror}{needed}", str(path)) from None


def load(path):
    """What torch.save wrote, on the CPU, without running code from the file.

    Raises UserError if the file is missing, is damaged (every byte is checked against the archive's CRC-32;
    files of torch before 1.6 are no archives and have none) or holds anything but tensors and plain values.
    """
    try:
        with open(path, "rb") as file:
            is_old = file.read(len(OLD)) == OLD
        if not is_old:
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


def report_bad(out, bad, total, verb):
    """Write bad_videos.txt (path, tab, reason; empty if all is well), and print how many there are."""
    path = os.path.join(out, "bad_videos.txt")
    write(path, "".join(f"{name}\t{reason}\n" for name, reason in sorted(bad)))
    listed = f"; the others are in {path}" if bad else ""
    print(printable(f"{total - len(bad)} of {total} videos {verb}{listed}"))

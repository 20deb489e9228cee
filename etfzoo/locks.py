"""Locks on folders: one process at a time, freed by its death."""

import contextlib
import errno
import os
import re
import socket
import time
from pathlib import Path

from etfzoo import files
from etfzoo.errors import EtfzooError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

NAME = ".lock"
_held: set[str] = set()  # by this process, which may ask for a folder again


@contextlib.contextmanager
def lock(folder, what: str, patience: float = 0.0):
    """Keeps other processes out of a folder; yields the descriptor of the lock, or None.

    The folder and its parents are made if need be, and removed again if nothing came into it.
    Processes that inherit the descriptor hold the lock, too. There is none (None is yielded) where
    this process has it already, on Windows, and where the folder cannot be written.

    Args:
        folder: what is locked.
        what: what a process does there, for the message: `"a run"`.
        patience: seconds to wait where the process that took the lock is gone, and others have
            inherited it.

    Raises:
        EtfzooError: another process is at work there; the message says which.
    """
    folder = Path(folder).expanduser()
    key = os.path.realpath(folder)
    if fcntl is None or key in _held:
        yield None
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _locked(files.make_directory(folder) / NAME, folder, what, patience)
    _held.add(key)
    try:
        yield file and file.fileno()
    finally:
        _held.discard(key)
        if file:
            if made:
                _remove_if_empty(made)
            file.close()


def _locked(path, folder, what, patience):
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            file = files.open_regular(path, "a+", follow=False)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO):
                raise EtfzooError(
                    f"{path} is no lock but a link, a pipe or a device: delete it"
                ) from error
            return None  # what is to be written there will say so
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if time.monotonic() > deadline or _alive(holder):
                raise EtfzooError(
                    f"{what} is at work in {folder} ({holder or 'it has not said which'}): wait "
                    "for it, or choose another folder"
                ) from None
            if not told:
                print(f"waiting for what {holder} has left running in {folder}", flush=True)
            told = True
            time.sleep(0.5)
            continue
        except OSError:  # a file system without locks
            file.close()
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # the one before has removed it: what is locked is no file any more
        files.make_directory(folder)
    file.seek(0)
    file.truncate()
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
    file.flush()
    return file


def _alive(holder):
    match = re.match(r"process (\d+) on (\S+),", holder)
    if not match or match[2] != socket.gethostname():
        return bool(match)
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove_if_empty(folders):
    with contextlib.suppress(OSError):
        if os.listdir(folders[0]) == [NAME]:
            (folders[0] / NAME).unlink()
            for folder in folders:
                folder.rmdir()

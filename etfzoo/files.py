"""Files that are either whole or not there: written under another name, then renamed."""

import contextlib
import errno
import json
import math
import os
import stat
import uuid
from pathlib import Path

from etfzoo.errors import EtfzooError

MAX_DOCUMENT = 2**23  # bytes of a stranger's JSON; classes of ImageNet-21k take 2**21
_NONBLOCK, _NOFOLLOW = (getattr(os, f"O_{name}", 0) for name in ("NONBLOCK", "NOFOLLOW"))
_MAX_OWN = 2**28  # of one that a run has written


@contextlib.contextmanager
def atomic(path, follow: bool = True):
    """Opens a temporary binary file beside `path` that takes its place when the block ends well.

    Args:
        path: of the file.
        follow: whether a link is written through, so that the file changes that it leads to; else
            the file takes the place of the link.

    Raises:
        EtfzooError: the file could not be written (full disk, no permission, see `destination`);
            `path` is untouched.
    """
    path = destination(path, follow)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise EtfzooError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def destination(path, follow: bool = True) -> Path:
    """The file that is written where a path is given: the one that a link leads to, if it counts.

    Raises:
        EtfzooError: a folder, a FIFO or a device; nothing is opened.
    """
    path = Path(path)
    try:
        mode = os.stat(path, follow_symlinks=follow).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise EtfzooError(f"cannot write {path}: it is no regular file")
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is to be made, or writing it will say why not
    except OSError as error:
        raise EtfzooError(f"cannot write {path}: {error.strerror or error}") from error
    return Path(os.path.realpath(path)) if follow and path.is_symlink() else path


def write_text(path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def open_regular(
    path, mode="rb", buffering: int = -1, follow: bool = True, dir_fd: int | None = None
):
    """Opens a regular file; waits for no FIFO, and touches no device.

    Args:
        path: of the file.
        mode, buffering: as those of `open`; no mode that empties a file.
        follow: whether a link is followed.
        dir_fd: descriptor of the folder that a relative path starts in.

    Raises:
        OSError: as `open`; also where it is no regular file.
    """

    def opener(path, flags):
        flags |= _NONBLOCK | (0 if follow else _NOFOLLOW)
        descriptor = os.open(path, flags, 0o666, dir_fd=dir_fd)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        return descriptor

    return open(path, mode, buffering, opener=opener)


def read_bytes(path, limit: int | None = None) -> bytes:
    """Reads a regular file.

    Args:
        path: of the file.
        limit: number of bytes from which on it is refused.

    Raises:
        EtfzooError: no such file, no permission, no regular file, or a larger one.
    """
    try:
        with open_regular(path) as file:
            content = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise EtfzooError(f"{path} cannot be read: {error.strerror or error}") from error
    if limit is not None and len(content) > limit:
        raise EtfzooError(f"{path} cannot be read: it is larger than {limit} bytes")
    return content


def read_json(path):
    """Reads a JSON file.

    Raises:
        EtfzooError: no such file, or not JSON.
    """
    content = read_bytes(path, _MAX_OWN)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EtfzooError(f"{path} is not valid JSON: {error}") from error


def parse_json(content: bytes):
    """A JSON document that was not written here: strict, so that all readers agree about it.

    Raises:
        ValueError: not UTF-8, not JSON, a key twice in one object, a number that is not finite, or
            nested too deeply.
    """

    def pairs(items):
        document = dict(items)
        if len(document) < len(items):
            raise ValueError("a key occurs twice")
        return document

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:40]} is not finite")
        return value

    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_float=number,
            parse_constant=number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def expand(path) -> Path:
    """A path that a user gave, with `~` and `~name` as the home folders that they stand for.

    Raises:
        EtfzooError: no such user, or what no file system takes: nothing, a null character, a name
            of more than 255 bytes.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise EtfzooError(f"{text!r} is no path")
    if any(len(os.fsencode(part)) > 255 for part in text.split(os.sep)):
        raise EtfzooError(f"{text[:60]}... is no path: it has a name of more than 255 bytes")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition(os.sep)[0]
        raise EtfzooError(f"no home folder is known for {user}, in the path {text}") from None


def cache_home() -> Path:
    """The folder of the cache: `ETFZOO_HOME`, by default `~/.cache/etfzoo`."""
    return expand(os.environ.get("ETFZOO_HOME") or "~/.cache/etfzoo")


def make_directory(path) -> Path:
    """Creates a directory and its parents.

    Raises:
        EtfzooError: it cannot be created.
    """
    path = expand(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EtfzooError(f"cannot create directory {path}: {error.strerror or error}") from error
    return path


def remove_temporaries(directory, name: str = "*") -> None:
    """Deletes what a killed process left half-written by `atomic`, of one file or of all."""
    for path in Path(directory).glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def strip_local_folder(name: str) -> str:
    """A name without the folders of this machine that it starts with, for what is published.

    `/home/me/runs/a` becomes `a`, `folder:../photos` becomes `folder:photos`; what lies below the
    current folder stays, and so do addresses.
    """
    kind, colon, path = name.rpartition(":")
    if not path.startswith(("/", "~", "..")) or path.startswith("//"):
        return name
    return kind + colon + Path(path).name

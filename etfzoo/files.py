"""Files that are either whole or not there: written under another name, then renamed."""

import contextlib
import json
import math
import os
import stat
import uuid
from pathlib import Path

from etfzoo.errors import EtfzooError


@contextlib.contextmanager
def atomic(path):
    """Opens a temporary binary file beside `path` that takes its place when the block ends well.

    Raises:
        EtfzooError: the file could not be written (full disk, no permission); `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise EtfzooError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def read_bytes(path) -> bytes:
    """Reads a regular file; waits for no FIFO and reads no device.

    Raises:
        EtfzooError: no such file, no permission, or no regular file.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits until somebody writes to it.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise EtfzooError(f"{path} cannot be read: it is no regular file")
            return file.read()
    except OSError as error:
        raise EtfzooError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path):
    """Reads a JSON file.

    Raises:
        EtfzooError: no such file, or not JSON.
    """
    content = read_bytes(path)
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

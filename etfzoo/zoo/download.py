"""One file from an address to the disk: resumed, bounded, checked, with errors in one line.

How its bytes come is in `etfzoo.zoo.transport`. No more of them are ever written than were
announced, and a server gets no more time for them than `time_limit` says.
"""

import contextlib
import hashlib
import os
import queue
import shutil
import threading
import time

from etfzoo.errors import EtfzooError
from etfzoo.zoo import transport
from etfzoo.zoo.transport import Interrupted, NetworkError, WrongContent, timeout

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each new attempt
_AHEAD = 16  # pieces that may come before the first of them is written
_SLOWEST = 10_000  # bytes a second
_PROGRESS_BYTES = 1 << 20  # so many new bytes make the attempts count from the start again


class _Ended(Interrupted):
    """The file ended too early, and the server seems to think that this is all."""


def time_limit(size: int) -> float:
    """Seconds in which a file of that many bytes must have come, all attempts together."""
    return 10 * timeout() + size / _SLOWEST


def join(base: str, name: str) -> str:
    """The address of a file in the folder of that address."""
    base, at, revision = base.partition("@") if base.startswith("hf://") else (base, "", "")
    return f"{base.rstrip('/')}/{name}{at}{revision}"


def fetch_bytes(url: str, limit: int) -> bytes:
    """The content of a file, which is held in memory and not resumed.

    Args:
        url: its address.
        limit: number of bytes from which on it is refused.

    Raises:
        NetworkError, WrongContent: it cannot be had, see `fetch_file`, or is larger.
    """
    deadline = time.monotonic() + time_limit(limit)

    def attempt():
        content = bytearray()
        with contextlib.closing(_received(url, 0, deadline)) as received:
            next(received)
            for chunk in received:
                content += chunk
                if len(content) > limit:
                    raise WrongContent(f"{url} is larger than {limit} bytes: refused")
        return bytes(content)

    return _attempts(url, attempt, lambda: 0)


def fetch_file(url: str, file, size: int, sha256: str, on_bytes=lambda count: None) -> None:
    """Downloads a file, going on behind the bytes that are there already.

    Args:
        url: its address.
        file: where it goes, open to read and write, unbuffered; what is there of an earlier attempt
            is used if the hash confirms it.
        size: announced number of bytes; no more are taken.
        sha256: announced hash, hex digits.
        on_bytes: called with the number of bytes that are there, now and then.

    Raises:
        NetworkError: no connection, an answer of 500 or more, a stall of more than `timeout()`
            seconds or a dropped connection, after several attempts where these make sense; or
            `time_limit(size)` is over. `file` keeps what has come.
        WrongContent: nothing there for us (403, 404, a bad redirect), more bytes than announced or
            another hash; of a wrong file nothing stays.
        OSError: `file` cannot be written (full disk).
    """
    deadline = time.monotonic() + time_limit(size)
    if _size(file) > size:
        file.truncate(0)
    resumed = 0 < _size(file)
    try:
        _complete(url, file, size, sha256, on_bytes, deadline)
    except WrongContent:
        if not resumed:
            raise
        # The old part may be of another file; without it the server gets a fair chance.
        _complete(url, file, size, sha256, on_bytes, deadline)


def _complete(url, file, size, sha256, on_bytes, deadline):
    try:
        _fill(url, file, size, sha256, on_bytes, deadline)
    except WrongContent:
        file.truncate(0)
        raise


def _fill(url, file, size, sha256, on_bytes, deadline):
    def attempt():
        have = _size(file)
        if have < size:
            have = _append(url, file, have, size, on_bytes, deadline)
        if have < size:
            raise _Ended(f"it ends after {have} of {size} bytes")

    _attempts(url, attempt, lambda: _size(file))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise WrongContent(
            f"{url} is not the published file: its sha256 is {digest[:12]}... instead of "
            f"{sha256[:12]}...; it was deleted; try another address or tell the publisher"
        )


def _append(url, file, have, size, on_bytes, deadline) -> int:
    """Writes what comes behind the first `have` bytes; the number of bytes that are there then."""
    with contextlib.closing(_received(url, have, deadline)) as received:
        have = next(received)
        file.truncate(have)
        file.seek(have)
        for chunk in received:
            have += len(chunk)
            if have > size:
                raise WrongContent(
                    f"{url} sends more than the {size} bytes that were announced: refused; try "
                    "another address or tell the publisher"
                )
            file.write(chunk)
            on_bytes(have)
    return have


def _received(url, start, deadline):
    """Yields where the bytes begin that come (`start`, or 0), and then these bytes.

    They come in a thread of their own: no timeout of a socket ends a server that sends a byte, of
    its headers or of the file, just often enough.
    """
    items: queue.Queue = queue.Queue(_AHEAD)
    left = threading.Event()

    def receive():
        try:
            begin, chunks = transport.open_address(url, start)
            items.put(begin)
            with contextlib.closing(chunks):
                for chunk in chunks:
                    items.put(chunk)
                    if left.is_set():
                        return
            items.put(None)
        except BaseException as error:
            items.put(error)

    threading.Thread(target=receive, daemon=True).start()
    try:
        while True:
            try:
                item = items.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                item = None
            if time.monotonic() > deadline:
                raise NetworkError(
                    f"cannot download {url}: it comes too slowly, less than {_SLOWEST:,} bytes a "
                    "second; try again later (what has come is kept), or another address"
                )
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        left.set()
        with contextlib.suppress(queue.Empty):
            while True:
                items.get_nowait()


def _attempts(url, attempt, progress):
    """Calls `attempt` until it is not interrupted; progress() counts bytes that have come."""
    failures, mark = 0, progress()
    while True:
        try:
            return attempt()
        except Interrupted as e:
            if progress() - mark >= _PROGRESS_BYTES:
                failures, mark = 0, progress()
            if failures == len(WAITS) and isinstance(e, _Ended):
                raise WrongContent(
                    f"{url} is not the published file: {e}; try another address or tell the "
                    "publisher"
                ) from None
            if failures == len(WAITS):
                raise NetworkError(
                    f"cannot download {url}: {e}; gave up after {failures + 1} attempts, try "
                    "again later (what has come is kept)"
                ) from None
            time.sleep(WAITS[failures])
            failures += 1


def _size(file) -> int:
    return os.fstat(file.fileno()).st_size


def check_free_space(folder, needed: int) -> None:
    """Raises EtfzooError where a file system has no room for that many more bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EtfzooError(
            f"the download needs {needed / 1e6:,.0f} MB and {folder} has {free / 1e6:,.0f} MB "
            "left: free some space, or set ETFZOO_HOME to another disk"
        )

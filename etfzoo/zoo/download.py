"""One file from an address to the disk: resumed, bounded, checked, with errors in one line.

`https://` and `http://` go through requests (its proxies, certificates and ~/.netrc count), `gs://`
through tf.io.gfile and `hf://owner/repo[/folder][@revision]` through huggingface_hub, which gives
the https address and the token (neither was ever run against Google's or Hugging Face's servers).
No more bytes are ever written than were announced, and a server gets no more time for them than
`time_limit` says.
"""

import contextlib
import hashlib
import os
import queue
import re
import shutil
import threading
import time
from urllib.parse import urljoin, urlsplit

import requests
import urllib3.exceptions

from etfzoo.errors import EtfzooError, first_line

SCHEMES = ("https", "http", "gs", "hf")
TIMEOUT = 30.0  # seconds without a byte, see `timeout`
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each new attempt
_CHUNK = 1 << 16
_AHEAD = 16  # pieces that may come before the first of them is written
_SLOWEST = 10_000  # bytes a second
_MAX_REDIRECTS = 10
_PROGRESS_BYTES = 1 << 20  # so many new bytes make the attempts count from the start again


class NetworkError(EtfzooError):
    """No connection, or one that ended too early; what has come is worth keeping."""


class WrongContent(EtfzooError):
    """The address has not what was announced; what has come is worth nothing."""


class _Interrupted(Exception):
    """Worth another attempt."""


class _Ended(_Interrupted):
    """The file ended too early, and the server seems to think that this is all."""


def timeout() -> float:
    """Seconds without a byte after which a server counts as stalled: ETFZOO_TIMEOUT, or 30.

    Raises:
        EtfzooError: ETFZOO_TIMEOUT is no positive number.
    """
    text = os.environ.get("ETFZOO_TIMEOUT") or str(TIMEOUT)
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e6:
            return value
    raise EtfzooError(f"ETFZOO_TIMEOUT must be a number of seconds; got {text!r}")


def time_limit(size: int) -> float:
    """Seconds in which a file of that many bytes must have come, all attempts together."""
    return 10 * timeout() + size / _SLOWEST


def join(base: str, name: str) -> str:
    """The address of a file in the folder of that address."""
    base, at, revision = base.partition("@") if base.startswith("hf://") else (base, "", "")
    return f"{base.rstrip('/')}/{name}{at}{revision}"


def fetch_bytes(url: str, limit: int) -> bytes:
    """The content of a small file.

    Args:
        url: its address.
        limit: number of bytes from which on it is refused.

    Raises:
        NetworkError, WrongContent: it cannot be had, see `fetch_file`, or is larger.
    """
    deadline = time.monotonic() + time_limit(limit)

    def attempt():
        content = b""
        with contextlib.closing(_received(url, 0, deadline)) as received:
            next(received)
            for chunk in received:
                content += chunk
                if len(content) > limit:
                    raise WrongContent(f"{url} is larger than {limit} bytes: refused")
        return content

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
            begin, chunks = _open(url, start)
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
        except _Interrupted as e:
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


def _open(url, start):
    """Where the bytes begin that come (`start`, or 0), and an iterator of them."""
    scheme = urlsplit(url).scheme
    if scheme == "gs":
        return _open_gfile(url, start)
    if scheme == "hf":
        address, headers = _hugging_face(url)
        return _open_http(url, address, start, headers)
    return _open_http(url, url, start, {})


def _open_http(shown, url, start, headers):
    """`shown` is what errors name; `headers` go to the first host alone."""
    response = _follow(shown, url, start, headers)
    status = response.status_code
    if status == 416 and start:  # it has nothing there; what is there was of another file
        response.close()
        return _open_http(shown, url, 0, headers)
    if status in (408, 425, 429) or status >= 500:
        response.close()
        raise _Interrupted(f"the server answers {_status(response)}")
    if status not in (200, 206):
        response.close()
        raise WrongContent(f"cannot download {shown}: {_status(response)}; {_advice(status)}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise WrongContent(
            f"cannot download {shown}: the server sends it compressed; tell its owner"
        )
    if status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return start, _chunks(response)
    if status == 206:
        response.close()
        raise WrongContent(f"cannot download {shown}: the server answers with another part of it")
    return 0, _chunks(response)


def _follow(shown, url, start, headers):
    """The response behind all redirects."""
    seen = set()
    host = urlsplit(url).netloc
    while True:
        if url in seen or len(seen) == _MAX_REDIRECTS:
            raise WrongContent(
                f"cannot download {shown}: its redirects lead nowhere; tell its owner"
            )
        seen.add(url)
        response = _get(shown, url, start, headers if urlsplit(url).netloc == host else {})
        if response.status_code not in (301, 302, 303, 307, 308):
            return response
        target = urljoin(url, response.headers.get("Location", ""))
        response.close()
        before, after = urlsplit(url).scheme, urlsplit(target).scheme
        if after not in ("https", "http") or (before, after) == ("https", "http"):
            raise WrongContent(
                f"cannot download {shown}: it redirects from {before} to {after or 'nowhere'}: "
                "refused; tell its owner"
            )
        url = target


def _get(shown, url, start, headers):
    headers = {"Accept-Encoding": "identity"} | headers
    if start:
        headers["Range"] = f"bytes={start}-"
    seconds = timeout()
    try:
        return requests.get(
            url, headers=headers, stream=True, timeout=seconds, allow_redirects=False
        )
    except requests.exceptions.SSLError as e:
        raise NetworkError(
            f"cannot download {shown}: no secure connection ({_cause(e)}); check the address, the "
            "clock and the certificates of this machine"
        ) from e
    except requests.ReadTimeout as e:
        raise _Interrupted(f"no byte came for {seconds:g} s") from e
    except requests.ConnectTimeout as e:
        raise NetworkError(
            f"cannot download {shown}: no connection within {seconds:g} s; check the address and "
            "the network"
        ) from e
    except requests.ConnectionError as e:
        if not _connected(e):
            raise NetworkError(
                f"cannot download {shown}: no connection ({_cause(e)}); check the address and the "
                "network"
            ) from e
        raise _Interrupted("the connection was dropped") from e
    except (requests.RequestException, ValueError) as e:
        raise NetworkError(f"cannot download {shown}: {_cause(e)}; check the address") from e


def _chunks(response):
    seconds = timeout()
    with response:
        try:
            # Other ways to read take all that is left where a chunk has a negative size.
            while chunk := response.raw.read1(_CHUNK, decode_content=False):
                yield chunk
        except (urllib3.exceptions.ProtocolError, urllib3.exceptions.SSLError) as e:
            raise _Interrupted("the connection was dropped") from e
        except urllib3.exceptions.ReadTimeoutError as e:
            raise _Interrupted(f"no byte came for {seconds:g} s") from e
        except urllib3.exceptions.HTTPError as e:
            raise _Interrupted(_cause(e)) from e


def _open_gfile(url, start):
    import tensorflow as tf

    def chunks():
        try:
            with tf.io.gfile.GFile(url, "rb") as file:
                file.seek(start)
                while chunk := file.read(_CHUNK):
                    yield chunk
        except (tf.errors.NotFoundError, tf.errors.PermissionDeniedError) as e:
            raise WrongContent(
                f"cannot download {url}: {first_line(e)}; check the address and your access to it"
            ) from e
        except tf.errors.OpError as e:
            raise NetworkError(
                f"cannot download {url}: {first_line(e)}; check the network and your login"
            ) from e

    return start, chunks()


def _hugging_face(url):
    """The https address of `hf://owner/repo/path[@revision]`, and the user's headers for it."""
    try:
        import huggingface_hub
    except ImportError:
        raise EtfzooError(
            f"{url} needs huggingface_hub: pip install 'etfzoo[hf]', or pip install huggingface_hub"
        ) from None
    path, _, revision = url.removeprefix("hf://").partition("@")
    owner, repository, name = path.split("/", 2)
    try:
        address = huggingface_hub.hf_hub_url(
            f"{owner}/{repository}", name, revision=revision or None
        )
        return address, huggingface_hub.utils.build_hf_headers()
    except Exception as e:  # it has many, and none is the user's to debug
        raise NetworkError(f"cannot download {url}: {first_line(e)}; check the address") from e


def _connected(error) -> bool:
    """Whether there was a connection: then another attempt makes sense."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    refused = urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProxyError
    return not isinstance(reason, refused)


def _cause(error) -> str:
    """The innermost reason that requests and urllib3 wrap, in a few words."""
    while True:
        inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = getattr(error, "strerror", None) or first_line(error)
    return re.sub(r"^\[Errno -?\d+\] ", "", text.rpartition(": ")[2])


def _status(response) -> str:
    return f"{response.status_code} {(response.reason or '')[:80]}".strip()


def _advice(status) -> str:
    if status in (404, 410):
        return "check the address: the folder of a version, such as .../1, is meant"
    if status in (401, 403, 407):
        return "you may not read it: ask its owner, or put your login for this host into ~/.netrc"
    return "check the address"


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

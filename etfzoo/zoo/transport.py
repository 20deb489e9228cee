"""How the bytes of a file come from an address, by its scheme.

`https://` and `http://` go through requests (its proxies, certificates and ~/.netrc count), `gs://`
through tf.io.gfile and `hf://owner/repo[/folder][@revision]` through huggingface_hub, which gives
the https address and the token (neither was ever run against Google's or Hugging Face's servers).
"""

import contextlib
import os
import re
from urllib.parse import urljoin, urlsplit

import requests
import urllib3.exceptions

from etfzoo.errors import EtfzooError, extra, first_line

SCHEMES = ("https", "http", "gs", "hf")
TIMEOUT = 30.0  # seconds without a byte, see `timeout`
_CHUNK = 1 << 16
_MAX_REDIRECTS = 10


class NetworkError(EtfzooError):
    """No connection, or one that ended too early; what has come is worth keeping."""


class WrongContent(EtfzooError):
    """The address has not what was announced; what has come is worth nothing."""


class Interrupted(Exception):
    """Worth another attempt."""


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


def open_address(url: str, start: int):
    """Asks for the bytes of a file from `start` on.

    Returns:
        Where the bytes begin that come (`start`, or 0), and a generator of them.

    Raises:
        Interrupted, NetworkError, WrongContent: also while they come.
    """
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
        raise Interrupted(f"the server answers {_status(response)}")
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
        raise Interrupted(f"no byte came for {seconds:g} s") from e
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
        raise Interrupted("the connection was dropped") from e
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
            raise Interrupted("the connection was dropped") from e
        except urllib3.exceptions.ReadTimeoutError as e:
            raise Interrupted(f"no byte came for {seconds:g} s") from e
        except urllib3.exceptions.HTTPError as e:
            raise Interrupted(_cause(e)) from e


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
    with extra("hf"):
        import huggingface_hub
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

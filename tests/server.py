"""A local HTTP server of files that can be told to misbehave."""

import contextlib
import http.server
import re
import threading
import time
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults` says what goes wrong, by path.

    Attributes:
        url: its address.
        requests: (path, Range header or None) of every request.
        faults: path -> list of functions of the handler and the file's bytes, one a request; the
            last one stays. Without one the file is served as it should be.
    """

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = Path(root)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.faults = [], {}
        self.closing = threading.Event()

    def handle_error(self, request, client_address):
        pass  # a client that goes away in the middle is what the tests are about

    def paths(self):
        return [path for path, _ in self.requests]


@contextlib.contextmanager
def serve(root):
    """A running Server of a folder."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        path = self.server.root / self.path.lstrip("/")
        content = path.read_bytes() if path.is_file() else None
        faults = self.server.faults.get(self.path)
        if faults:
            (faults.pop(0) if len(faults) > 1 else faults[0])(self, content)
        elif content is None:
            status(404)(self, content)
        else:
            good(self, content)

    def start(self, code=200, length=None, **headers):
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def good(handler, content):
    """The file, or the part of it that is asked for."""
    start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "bytes=0-")[1])
    if start >= len(content) > 0:
        return status(416)(handler, content)
    if start:
        part = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.start(206, len(content) - start, Content_Range=part)
    else:
        handler.start(200, len(content))
    handler.wfile.write(content[start:])


def ignore_range(handler, content):
    handler.start(200, len(content))
    handler.wfile.write(content)


def status(code, **headers):
    return lambda handler, content: handler.start(code, 0, **headers)


def redirect(target, code=302):
    return status(code, Location=target)


def other(content):
    """Another file than the one that is there."""
    return lambda handler, _: good(handler, content)


def drop(count):
    """The connection ends after some bytes of what is asked for."""

    def fault(handler, content):
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        code = 206 if start else 200
        part = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.start(code, len(content) - start, Content_Range=part)
        handler.wfile.write(content[start : start + count])

    return fault


def stall(count=0, headers=True):
    """Nothing comes after some bytes, and the connection stays open."""

    def fault(handler, content):
        if headers:
            handler.start(200, len(content))
            handler.wfile.write(content[:count])
        handler.server.closing.wait(60)

    return fault


def drip(seconds=0.02, headers=True):
    """A byte at a time, of the headers or of the file: each comes before any timeout."""

    def fault(handler, content):
        if headers:
            handler.start(200, len(content))
        else:
            content = b"HTTP/1.0 200 OK\r\nX-Name: " + bytes(10**6)
        with contextlib.suppress(OSError):
            for byte in content:
                handler.wfile.write(bytes([byte or 65]))
                if handler.server.closing.wait(seconds):
                    break

    return fault


def chunked(sizes, body):
    """An endless body in chunks; `sizes` is what stands in place of their sizes."""

    def fault(handler, content):
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.start(200, Transfer_Encoding="chunked")
        with contextlib.suppress(OSError):
            while not handler.server.closing.is_set():
                handler.wfile.write(sizes + b"\r\n" + body)

    return fault


def reason(code, text):
    """A status with a reason of the server's own."""

    def fault(handler, content):
        handler.send_response(code, text)
        handler.end_headers()

    return fault


def claim(length, more=b""):
    """A Content-Length that is not that of the file; `more` bytes come behind the file."""

    def fault(handler, content):
        handler.start(200, length)
        handler.wfile.write(content + more)

    return fault


def endless(handler, content):
    """No length, and no end."""
    handler.start(200)
    with contextlib.suppress(OSError):
        while not handler.server.closing.is_set():
            handler.wfile.write(b"x" * 65536)


def slowly(chunk, seconds):
    """The file in small pieces."""

    def fault(handler, content):
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        part = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.start(206 if start else 200, len(content) - start, Content_Range=part)
        for begin in range(start, len(content), chunk):
            handler.wfile.write(content[begin : begin + chunk])
            time.sleep(seconds)

    return fault

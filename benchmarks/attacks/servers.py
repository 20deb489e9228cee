"""Servers that misbehave in each way that HTTP leaves room for."""

import gzip
import os
import resource
import socket
import struct
from contextlib import ExitStack, suppress

from attacks import core, hosts


def _raw(*parts, then=None):
    """Writes bytes as they are, and then closes, resets or keeps the connection."""

    def fault(handler, content):
        handler.close_connection = True
        with suppress(OSError):
            for part in parts:
                handler.wfile.write(part(content) if callable(part) else part)
            if then == "wait":
                handler.server.closing.wait(20)
            if then == "reset":
                linger = struct.pack("ii", 1, 0)
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                handler.connection.close()

    return fault


def _forever(*parts):
    def fault(handler, content):
        handler.close_connection = True
        with suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 ")
            while not handler.server.closing.is_set():
                for part in parts:
                    handler.wfile.write(part)

    return fault


def _ok(*headers):
    return b"HTTP/1.1 200 OK\r\n" + b"".join(h + b"\r\n" for h in headers) + b"\r\n"


def _changing(rng):
    def fault(handler, content):
        import server as http

        http.good(handler, content[:-1] + bytes([rng.randrange(256)]))

    return fault


def faults(rng, server):
    """One thing that a server may do, and its name."""
    import server as http

    size = lambda c: b"Content-Length: %d" % len(c)  # noqa: E731
    n = rng.choice([0, 1, 100, 65536, 200_000, 299_999])
    junk = rng.randbytes(rng.choice([1, 10, 1000]))
    location = rng.choice(
        [
            "//x",
            "http://",
            "http://[::1",
            "http://127.0.0.1:1/x",
            f"https://127.0.0.1:{server.server_port}/x",
        ]
        + [
            "javascript:1",
            "file:///etc/passwd",
            "gopher://x",
            "\\\\x",
            "?",
            "#",
            "/" + "a" * 70_000,
        ]
        + ["http://u:p@127.0.0.1:1/", "http://127.0.0.1:99999/", "http://a b/", "http://\udcff/"]
        + [
            "http://xn--/",
            "http://" + "a" * 300 + ".invalid/",
            "ht!tp://x",
            "data:,x",
            "/%00",
            "..//..",
        ]
    )
    many = [b"X-%d: y" % i for i in range(rng.choice([50, 99, 20_000]))]
    reply = rng.choice(
        [b"HTTP/9.9 200 OK", b"HTTP/1.1 -1 no", b"HTTP/1.1 99999 x", b"ICY 200 OK", b"200"]
    )
    bomb = gzip.compress(bytes(10**7))
    kinds = {
        "drops": http.drop(n),
        "stalls": http.stall(n),
        "stalls before its headers": http.stall(headers=False),
        "drips": http.drip(0.005),
        "drips its headers": http.drip(0.005, headers=False),
        "claims": http.claim(rng.choice([0, 1, 299_999, 300_001, 10**18]), junk),
        "endless": http.endless,
        "chunks": http.chunked(
            rng.choice(
                [b"-1", b"fffffffffffffffff", b" 5", b"0x5", b"5;" + junk, b"5_0", b"\xd9\xa3"]
            ),
            junk * 70,
        ),
        "reason": http.reason(
            rng.choice([200, 404, 500, 301]), "\x1b[31m" + "é" * 200 + "\x9b1m\x07"
        ),
        "code": http.status(
            rng.choice([100, 101, 204, 206, 300, 304, 305, 401, 402, 407, 410, 418, 451, 511, 599])
        ),
        "redirect": _raw(
            b"HTTP/1.1 302 x\r\nLocation: "
            + location.encode("utf-8", "surrogateescape")
            + b"\r\nContent-Length: 0\r\n\r\n"
        ),
        "redirect with more headers in it": _raw(
            b"HTTP/1.1 302 x\r\nLocation: /a\rX: b\r\nContent-Length: 0\r\n\r\n"
        ),
        "redirect to nowhere": http.status(rng.choice([301, 303, 308])),
        "ever other redirects": lambda h, c: http.redirect(h.path + "x")(h, c),
        "another part": lambda h, c: (
            h.start(
                206,
                10,
                Content_Range=rng.choice(["bytes 5-14/300000", "x", "bytes */3", "bytes 0-9/*"]),
            )
            or h.wfile.write(c[:10])
        ),
        "parts": _raw(
            b"HTTP/1.1 206 x\r\nContent-Type: multipart/byteranges; boundary=a\r\n\r\n--a\r\n\r\n",
            lambda c: c,
        ),
        "two lengths": _raw(lambda c: _ok(size(c), b"Content-Length: 5"), lambda c: c),
        "odd length": _raw(
            _ok(
                b"Content-Length: "
                + rng.choice(
                    [b"-1", b"1e5", b"+300000", b"", b"300000, 300000", b"\xff", b"9" * 5000]
                )
            ),
            lambda c: c,
        ),
        "length and chunks": _raw(
            lambda c: _ok(size(c), b"Transfer-Encoding: chunked"),
            lambda c: b"5\r\nhello\r\n0\r\n\r\n",
        ),
        "compressed": _raw(
            _ok(
                b"Content-Encoding: "
                + rng.choice([b"gzip", b"br", b"deflate, gzip", b"identity, gzip"]),
                b"Content-Length: %d" % len(bomb),
            ),
            bomb,
        ),
        "compressed and not told": _raw(_ok(b"Content-Length: %d" % len(bomb)), bomb),
        "compressed transfer": _raw(
            _ok(b"Transfer-Encoding: gzip, chunked"), b"5\r\n" + bomb[:5] + b"\r\n0\r\n\r\n"
        ),
        "many headers": _raw(_ok(*many), lambda c: c),
        "a long header": _raw(
            _ok(b"X: " + b"y" * rng.choice([60_000, 70_000, 10**7])), lambda c: c
        ),
        "headers without end": _forever(b"200 OK\r\n" + b"X: y\r\n" * 100),
        "continue without end": _forever(b"100 Continue\r\n\r\nHTTP/1.1 "),
        "odd reply": _raw(reply + b"\r\n\r\n", lambda c: c),
        "no reply": _raw(junk, then="wait"),
        "HTTP/0.9": _raw(lambda c: c),
        "reset": _raw(lambda c: _ok(size(c)) + c[:n], then="reset"),
        "closes": _raw(),
        "trailers": _raw(
            _ok(b"Transfer-Encoding: chunked"),
            lambda c: b"%x\r\n" % len(c) + c + b"\r\n0\r\n" + b"T: x\r\n" * 10**5,
            then="wait",
        ),
        "chunks of one byte": _raw(
            _ok(b"Transfer-Encoding: chunked"),
            lambda c: b"".join(b"1\r\n%c\r\n" % x for x in c[:n]),
            then="wait",
        ),
        "zero bytes": _raw(_ok(b"Content-Length: 300000"), bytes(n), then="wait"),
        "changing": _changing(rng),
        "cookies": _raw(
            lambda c: _ok(
                size(c),
                b"Set-Cookie: a=b; Domain=\xff; Max-Age=x; Path=/"
                + junk.replace(b"\n", b"").replace(b"\r", b""),
            ),
            lambda c: c,
        ),
        "HTML": http.other(b"<html>" + junk),
        "good": http.good,
    }
    name = rng.choice(list(kinds))
    return kinds[name], name


@core.group("http", 59)
def servers(root):
    from cache_test import DATA, assert_same_folder, leftovers, make_version

    import server as http
    from etfzoo.zoo import cache, manifest

    with ExitStack() as stack:
        hosts.quick(stack)
        make_version(root / "site/rn18_etf.x/1")
        server = stack.enter_context(http.serve(root / "site"))
        address, folder = f"{server.url}/rn18_etf.x/1", root / "site/rn18_etf.x/1"

        def make(one):
            os.environ["ETFZOO_HOME"] = str(one.place / "cache")
            server.faults.clear()
            notes = []
            for name in one.rng.sample(
                [DATA, DATA, manifest.NAME, "saved_model.pb"], one.rng.choice([1, 1, 2])
            ):
                drawn = [faults(one.rng, server) for _ in range(one.rng.choice([1, 1, 2, 3]))]
                server.faults[f"/rn18_etf.x/1/{name}"] = [fault for fault, _ in drawn]
                notes.append(f"{os.path.basename(name)} {', '.join(n for _, n in drawn)}")
            one.what = "; ".join(notes)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                assert_same_folder(cache.fetch_url(address), folder)
                text = "the files of the publisher"
                if leftovers():
                    raise core.Silent(f"left: {leftovers()[:3]}")
            finally:
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
                if grown > 300_000:
                    raise core.Silent(f"it took {grown / 1000:.0f} MB")
                server.faults.clear()
                assert_same_folder(cache.fetch_url(address), folder)
                if leftovers():
                    raise core.Silent(f"left: {leftovers()[:3]}")
            return text

        yield make

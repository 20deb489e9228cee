"""What comes from elsewhere: models of strangers, servers, and caches that others write to."""

import dataclasses
import gzip
import json
import os
import resource
import shutil
import socket
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import numpy as np

from attacks import core, worlds


def change_value(rng, document, drawn):
    """Changes one value somewhere in a JSON document; says which."""
    where, names = document, []
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = rng.choice(keys)
        names.append(str(key))
        inner = where[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            where = inner
            continue
        kind = rng.randrange(4)
        if kind == 0 and isinstance(where, dict):
            del where[key]
        elif kind == 1 and isinstance(where, dict):
            where[drawn(rng)[:50]] = inner
        elif kind == 2 and isinstance(where, list):
            where.append(inner)
        else:
            where[key] = _near(rng, inner, drawn)
        return f"{'.'.join(names)[:80]} is {str(where.get(key, 'gone') if isinstance(where, dict) else where[-1])[:60]}"


def _near(rng, value, drawn):
    from attacks.settings import document

    if isinstance(value, bool) or value is None or rng.random() < 0.3:
        return document(rng, 2)
    if isinstance(value, int):
        return rng.choice([value + 1, -value, value * 2, value * 10**9, float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([value * 1.5, -value, 0.0, str(value), 1e300])
    if isinstance(value, str):
        return rng.choice([value[:-1], value.upper(), value + "\n", drawn(rng), value[::-1], ""])
    return rng.choice([[], {}, [value], None])


def damaged(rng, content):
    """Bytes that something has gone wrong with, and what."""
    at, length = rng.randrange(len(content)), rng.randint(1, 64)
    kinds = {
        "a bit": lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        "cut": lambda: content[:at],
        "longer": lambda: content + rng.randbytes(length),
        "doubled": lambda: content[:at] + content[at : at + length] * 2 + content[at + length :],
        "lost": lambda: content[:at] + content[at + length :],
        "turned": lambda: content[:at] + content[at : at + length][::-1] + content[at + length :],
        "zeros": lambda: content[:at] + bytes(length) + content[at + length :],
        "ones": lambda: content[:at] + b"\xff" * length + content[at + length :],
        "halves swapped": lambda: content[at:] + content[:at],
    }
    name = rng.choice(list(kinds))
    return kinds[name](), f"{name} at {at}"


def _models(root):
    import etfzoo
    from testing import randomize

    for name, classes in (("model", 5), ("other", 7)):
        model = etfzoo.build_classifier("rn18", classes, input_shape=(32, 32, 3))
        etfzoo.publish(randomize(model, seed=classes), root / name)
    return root / "model/1", root / "other/1"


def _quick(stack):
    from etfzoo.zoo import download

    stack.enter_context(mock.patch.object(download, "WAITS", (0.01, 0.02)))
    stack.enter_context(mock.patch.object(download, "_SLOWEST", 10**6))
    os.environ |= {"ETFZOO_TIMEOUT": "0.5", "ETFZOO_OFFLINE": ""}


@core.group("metadata", 46)
def metadata(root):
    """Models with a file that is damaged or hostile, half of them with hashes that are right."""
    import etfzoo
    import mutations
    import server as http
    import testing
    from attacks.settings import text
    from etfzoo.models import weights
    from etfzoo.zoo import manifest, publish

    with ExitStack() as stack:
        stack.enter_context(testing.shallow_rn18())
        _quick(stack)
        os.environ["ETFZOO_TIMEOUT"] = "5"
        version, other = _models(root)
        server = stack.enter_context(http.serve(root / "world/site"))
        known = weights.as_arrays(etfzoo.load(version).variables)
        names = list(mutations.MUTATIONS)

        def make(one):
            world = mutations.World(root / "world", version, other, server)
            if one.number % 2:
                name = one.rng.choice(names)
                where, mutate = mutations.MUTATIONS[name]
                one.what = f"{name}: {mutate(one.rng, world)}"
                faults, message = mutations.refusal(world, where)
                if faults:
                    raise core.Silent(f"{faults}: {message}")
                raise core.Refused(message)
            where = one.rng.choice(["folder", "address", "pinned", "index"])
            name = one.rng.choice(
                [publish.METADATA] * 4 + ["index"] * 2 + [manifest.NAME, mutations.INDEX]
                + ["saved_model.pb", mutations.DATA, mutations.WARM_UP]
            )
            listed = name == "index"
            where = "index" if listed else where
            content = json.dumps(world.index).encode() if listed else (world.folder / name).read_bytes()
            if content[:1] == b"{" and one.rng.random() < 0.8:
                document = json.loads(content)
                one.what = change_value(one.rng, document, text)
                content = json.dumps(document).encode()
            else:
                content, one.what = damaged(one.rng, content)
            one.what = f"{name} ({where}): {one.what}"
            if listed:
                world.write_index(content)
            else:
                rehash = name != manifest.NAME and where in ("folder", "address")
                world.write(name, content, rehash=rehash)
                one.what += ", with its hash" if rehash else ""
            return loaded(world, where, known)

        yield make


def loaded(world, where, known):
    """Loads a model; if it can be, it is what its metadata says, with the weights it had."""
    import etfzoo
    from etfzoo.models import weights
    from etfzoo.zoo import publish

    os.environ["ETFZOO_HOME"] = str(world.root / "cache")
    os.environ["ETFZOO_INDEX"] = str(world.root / "index.json")
    before = world.snapshot()
    try:
        model = etfzoo.load(world.handle(where))
    except etfzoo.EtfzooError:
        if world.snapshot() != before or world.cached():
            raise core.Silent("refused, and something has changed") from None
        raise
    spec = json.loads((world.folder / publish.METADATA).read_bytes())["spec"]
    own = json.loads(json.dumps(dataclasses.asdict(model.spec)))
    if any(own[name] != value for name, value in spec.items()):
        raise core.Silent(f"its spec is {own}")
    found = weights.as_arrays(model.variables)
    if found.keys() != known.keys() or any(not np.array_equal(found[n], known[n]) for n in known):
        raise core.Silent("its weights are others")
    if not np.isfinite(model(np.full((1, 32, 32, 3), 100.0, np.float32)).numpy()).all():
        raise core.Silent("its outputs are not finite")
    return "loaded: as its metadata says, all weights as they were"


# ------------------------------------------------------------------------------------ servers


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
        ["//x", "http://", "http://[::1", "http://127.0.0.1:1/x", "https://127.0.0.1:%d/x" % server.server_port]
        + ["javascript:1", "file:///etc/passwd", "gopher://x", "\\\\x", "?", "#", "/" + "a" * 70_000]
        + ["http://u:p@127.0.0.1:1/", "http://127.0.0.1:99999/", "http://a b/", "http://\udcff/"]
        + ["http://xn--/", "http://" + "a" * 300 + ".invalid/", "ht!tp://x", "data:,x", "/%00", "..//.."]
    )
    many = [b"X-%d: y" % i for i in range(rng.choice([50, 99, 20_000]))]
    reply = rng.choice([b"HTTP/9.9 200 OK", b"HTTP/1.1 -1 no", b"HTTP/1.1 99999 x", b"ICY 200 OK", b"200"])
    bomb = gzip.compress(bytes(10**7))
    kinds = {
        "drops": http.drop(n),
        "stalls": http.stall(n),
        "stalls before its headers": http.stall(headers=False),
        "drips": http.drip(0.005),
        "drips its headers": http.drip(0.005, headers=False),
        "claims": http.claim(rng.choice([0, 1, 299_999, 300_001, 10**18]), junk),
        "endless": http.endless,
        "chunks": http.chunked(rng.choice([b"-1", b"fffffffffffffffff", b" 5", b"0x5", b"5;" + junk, b"5_0", b"\xd9\xa3"]), junk * 70),
        "reason": http.reason(rng.choice([200, 404, 500, 301]), "\x1b[31m" + "é" * 200 + "\x9b1m\x07"),
        "code": http.status(rng.choice([100, 101, 204, 206, 300, 304, 305, 401, 402, 407, 410, 418, 451, 511, 599])),
        "redirect": _raw(b"HTTP/1.1 302 x\r\nLocation: " + location.encode("utf-8", "surrogateescape") + b"\r\nContent-Length: 0\r\n\r\n"),
        "redirect with more headers in it": _raw(b"HTTP/1.1 302 x\r\nLocation: /a\rX: b\r\nContent-Length: 0\r\n\r\n"),
        "redirect to nowhere": http.status(rng.choice([301, 303, 308])),
        "ever other redirects": lambda h, c: http.redirect(h.path + "x")(h, c),
        "another part": lambda h, c: h.start(206, 10, Content_Range=rng.choice(["bytes 5-14/300000", "x", "bytes */3", "bytes 0-9/*"])) or h.wfile.write(c[:10]),
        "parts": _raw(b"HTTP/1.1 206 x\r\nContent-Type: multipart/byteranges; boundary=a\r\n\r\n--a\r\n\r\n", lambda c: c),
        "two lengths": _raw(lambda c: _ok(size(c), b"Content-Length: 5"), lambda c: c),
        "odd length": _raw(_ok(b"Content-Length: " + rng.choice([b"-1", b"1e5", b"+300000", b"", b"300000, 300000", b"\xff", b"9" * 5000])), lambda c: c),
        "length and chunks": _raw(lambda c: _ok(size(c), b"Transfer-Encoding: chunked"), lambda c: b"5\r\nhello\r\n0\r\n\r\n"),
        "compressed": _raw(_ok(b"Content-Encoding: " + rng.choice([b"gzip", b"br", b"deflate, gzip", b"identity, gzip"]), b"Content-Length: %d" % len(bomb)), bomb),
        "compressed and not told": _raw(_ok(b"Content-Length: %d" % len(bomb)), bomb),
        "compressed transfer": _raw(_ok(b"Transfer-Encoding: gzip, chunked"), b"5\r\n" + bomb[:5] + b"\r\n0\r\n\r\n"),
        "many headers": _raw(_ok(*many), lambda c: c),
        "a long header": _raw(_ok(b"X: " + b"y" * rng.choice([60_000, 70_000, 10**7])), lambda c: c),
        "headers without end": _forever(b"200 OK\r\n" + b"X: y\r\n" * 100),
        "continue without end": _forever(b"100 Continue\r\n\r\nHTTP/1.1 "),
        "odd reply": _raw(reply + b"\r\n\r\n", lambda c: c),
        "no reply": _raw(junk, then="wait"),
        "HTTP/0.9": _raw(lambda c: c),
        "reset": _raw(lambda c: _ok(size(c)) + c[:n], then="reset"),
        "closes": _raw(),
        "trailers": _raw(_ok(b"Transfer-Encoding: chunked"), lambda c: b"%x\r\n" % len(c) + c + b"\r\n0\r\n" + b"T: x\r\n" * 10**5, then="wait"),
        "chunks of one byte": _raw(_ok(b"Transfer-Encoding: chunked"), lambda c: b"".join(b"1\r\n%c\r\n" % x for x in c[:n]), then="wait"),
        "zero bytes": _raw(_ok(b"Content-Length: 300000"), bytes(n), then="wait"),
        "changing": _changing(rng),
        "cookies": _raw(lambda c: _ok(size(c), b"Set-Cookie: a=b; Domain=\xff; Max-Age=x; Path=/" + junk.replace(b"\n", b"").replace(b"\r", b"")), lambda c: c),
        "HTML": http.other(b"<html>" + junk),
        "good": http.good,
    }  # fmt: skip
    name = rng.choice(list(kinds))
    return kinds[name], name


@core.group("http", 59)
def servers(root):
    import server as http
    from cache_test import DATA, assert_same_folder, leftovers, make_version
    from etfzoo.zoo import cache, manifest

    with ExitStack() as stack:
        _quick(stack)
        make_version(root / "site/rn18_etf.x/1")
        server = stack.enter_context(http.serve(root / "site"))
        address, folder = f"{server.url}/rn18_etf.x/1", root / "site/rn18_etf.x/1"

        def make(one):
            os.environ["ETFZOO_HOME"] = str(one.place / "cache")
            server.faults.clear()
            notes, lasting = [], True
            for name in one.rng.sample([DATA, DATA, manifest.NAME, "saved_model.pb"], one.rng.choice([1, 1, 2])):
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


# ------------------------------------------------------------------------------------- caches


def _cached_features(root):
    """A cache of features, and what makes them with it."""
    import etfzoo
    from etfzoo.data import sources
    from etfzoo.data.pipeline import evaluation_pipeline
    from etfzoo.measure import features

    model = etfzoo.build_classifier("rn18", 10, input_shape=(8, 8, 3))
    source = sources.resolve("digits", str(worlds.data(root / "data")))
    extractor, pipeline = features.Extractor(model), evaluation_pipeline(model.spec, source, 50)

    def read(folder):
        found = extractor.load(pipeline, "test", folder)
        return np.array(found.features), np.array(found.labels)

    expected = read(root / "kept")

    def check(folder):
        if any(not np.array_equal(a, b) for a, b in zip(read(folder), expected, strict=True)):
            raise core.Silent("other features or labels")
        return "features and labels as without a cache"

    return root / "kept", check


@core.group("caches", 10)
def caches(root):
    """Files of the cache of features, and of that of models, which are no longer what they were."""
    import server as http
    import testing
    from cache_test import assert_same_folder, make_version
    from etfzoo.zoo import cache

    with ExitStack() as stack:
        stack.enter_context(testing.shallow_rn18())
        _quick(stack)
        features, check = _cached_features(root / "features")
        site = make_version(root / "site/rn18_etf.x/1")
        server = stack.enter_context(http.serve(root / "site"))

        def make(one):
            os.environ["ETFZOO_HOME"] = str(one.place / "cache")
            if one.number % 2:
                cache.fetch_url(f"{server.url}/rn18_etf.x/1")
            else:
                shutil.copytree(features, "cache")
            for _ in range(one.rng.choice([1, 1, 2])):
                paths = sorted(p for p in Path("cache").rglob("*") if p.is_file() and p.stat().st_size)
                path, kind = one.rng.choice(paths), one.rng.randrange(6)
                if kind == 0:
                    path.unlink()
                    path.mkdir()
                elif kind == 1:
                    path.chmod(0)
                elif kind == 2:
                    path.write_bytes(one.rng.choice(paths).read_bytes()[::-1])
                else:
                    content, what = damaged(one.rng, path.read_bytes())
                    path.write_bytes(content)
                    one.what += what + " "
                one.what += f"{kind} {path}; "
            if not one.number % 2:
                return check("cache")
            assert_same_folder(cache.fetch_url(f"{server.url}/rn18_etf.x/1"), site)
            return "the files of the publisher"

        yield make


@core.group("links", 14)
def links(root):
    """Links, pipes and devices that another user of a cache has planted in it."""
    import server as http
    import testing
    from cache_test import assert_same_folder, make_version
    from etfzoo.errors import EtfzooError
    from etfzoo.zoo import cache

    with ExitStack() as stack:
        stack.enter_context(testing.shallow_rn18())
        _quick(stack)
        features, check = _cached_features(root / "features")
        site = make_version(root / "site/rn18_etf.x/1")
        server = stack.enter_context(http.serve(root / "site"))

        def make(one):
            os.environ["ETFZOO_HOME"] = str(one.place / "cache")
            address = f"{server.url}/rn18_etf.x/1"
            if one.number % 3 == 0:
                shutil.copytree(features, "cache")
            else:
                target = cache.fetch_url(address)
                if one.rng.random() < 0.6:  # it is to be downloaded again, a part is there
                    part = target.with_name(f".download-{target.name}") / "files"
                    shutil.copytree(target, part)
                    (target / one.rng.choice(["saved_model.pb", "variables"])).rename(target / "x")
            path = one.rng.choice(sorted(Path("cache").rglob("*")))
            with one.preparing():
                _plant(one, path)
            try:
                if one.number % 3 == 0:
                    return check("cache")
                assert_same_folder(cache.fetch_url(address), site)
                return "the files of the publisher"
            except EtfzooError as error:
                if path.name not in str(error) and str(path.parent.name) not in str(error):
                    raise core.Silent(f"it does not say where: {error}") from None
                raise

        yield make


def _plant(one, path):
    """Puts a link or what is no file in place of something, at the same place or above it."""
    outside = one.outside
    if path.is_dir() and not path.is_symlink():
        kind = one.rng.choice(["a link to a folder", "a link to its own copy", "a pipe", "a circle"])
        if kind == "a link to its own copy":
            path.rename(one.place / "copy")
            path.symlink_to(one.place / "copy")
            one.what = f"{path}: {kind}"
            return
        core.remove(path)
    else:
        kind = one.rng.choice(
            ["a link to a file", "a second name", "a pipe", "a device", "a link to nothing", "a socket"]
        )
        path.unlink()
    one.what = f"{path}: {kind}"
    if kind == "a link to a folder":
        path.symlink_to(outside)
    elif kind == "a link to a file":
        path.symlink_to(outside / "file")
    elif kind == "a link to nothing":
        path.symlink_to(outside / "new")
    elif kind == "a second name":
        os.link(outside / "file", path)
    elif kind == "a device":
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, one.rng.choice([3, 5, 7])))
    elif kind == "a circle":
        path.symlink_to(path.name)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listening, suppress(OSError):
            listening.bind(os.path.relpath(path))
    else:
        os.mkfifo(path)

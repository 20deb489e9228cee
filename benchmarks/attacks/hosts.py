"""What comes from elsewhere: models of strangers, and caches that others write to."""

import dataclasses
import json
import os
import shutil
import socket
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
        now = where[-1] if isinstance(where, list) else where.get(key, "gone")
        return f"{'.'.join(names)[:80]} is {str(now)[:60]}"


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
        "a bit": lambda: (
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        ),
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


def quick(stack):
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
        stack.enter_context(testing.small_rn18())
        quick(stack)
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
                [publish.METADATA] * 4
                + ["index"] * 2
                + [manifest.NAME, mutations.INDEX]
                + ["saved_model.pb", mutations.DATA, mutations.WARM_UP]
            )
            listed = name == "index"
            where = "index" if listed else where
            content = (
                json.dumps(world.index).encode() if listed else (world.folder / name).read_bytes()
            )
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
    from cache_test import assert_same_folder, make_version

    import server as http
    import testing
    from etfzoo.zoo import cache

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        quick(stack)
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
                paths = sorted(
                    p for p in Path("cache").rglob("*") if p.is_file() and p.stat().st_size
                )
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
    from cache_test import assert_same_folder, make_version

    import server as http
    import testing
    from etfzoo.errors import EtfzooError
    from etfzoo.zoo import cache

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        quick(stack)
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
        kind = one.rng.choice(
            ["a link to a folder", "a link to its own copy", "a pipe", "a circle"]
        )
        if kind == "a link to its own copy":
            path.rename(one.place / "copy")
            path.symlink_to(one.place / "copy")
            one.what = f"{path}: {kind}"
            return
        core.remove(path)
    else:
        kind = one.rng.choice(
            [
                "a link to a file",
                "a second name",
                "a pipe",
                "a device",
                "a link to nothing",
                "a socket",
            ]
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

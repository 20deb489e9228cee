"""Damaged and hostile models and indexes: what each of them is, and how it is served.

Used by hostile_test.py and benchmarks/attack.py. A mutation is a function of a random generator
and a World; what it draws (which byte, which file) differs from seed to seed. Each must be refused.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import server as http
from etfzoo.zoo import manifest, publish

DATA = "variables/variables.data-00000-of-00001"
INDEX = "variables/variables.index"
WARM_UP = "assets.extra/tf_serving_warmup_requests"
NAME = "rn18_etf.x"
FILES = ("saved_model.pb", WARM_UP, DATA, INDEX, publish.METADATA, "README.md")

PATHS = (  # what no list may name
    "../evil",
    "../../evil",
    "../../../../../../../../tmp/etfzoo_evil",
    "/tmp/etfzoo_evil",
    "{world}/evil",
    "variables/../../evil",
    "variables/..",
    "assets/../evil",
    "assets/./evil",
    "assets//evil",
    "assets/evil/",
    "..\\evil",
    "assets\\..\\..\\evil",
    "C:\\evil",
    "C:evil",
    "\\\\host\\share\\evil",
    "assets/.evil",
    ".download-1/evil",
    "assets/evil\x00.txt",
    "assets/evil\n.txt",
    "assets/evil.",
    "assets/evil ",
    "%2e%2e/evil",
    "assets/%2e%2e/%2e%2e/evil",
    "assets/\uff0e\uff0e/evil",
    "assets/\u202eevil",
    "~/evil",
    "$HOME/evil",
    "",
    ".",
    "..",
    "evil.pkl",
    "variables/evil.pkl",
    "assets.extra/a/b/c/d/e",
    "assets/" + "x" * 300,
    "saved_model.PB",
)
DOCUMENTS = {  # what is no document
    "empty": b"",
    "not JSON": b"<html>404</html>",
    "not UTF-8": b'{"format": 1, "files": {"\xff\xfe": {}}}',
    "UTF-16": '{"format": 1, "files": {}}'.encode("utf-16"),
    "nested": b"[" * 200_000,
    "nested objects": b'{"files":' * 100_000,
    "a key twice": b'{"format": 1, "format": 1, "files": {}}',
    "NaN": b'{"format": NaN, "files": {}}',
    "infinite": b'{"format": 1e999, "files": {}}',
    "a long number": b'{"format": ' + b"9" * 10_000 + b', "files": {}}',
    "a list": b"[1, 2]",
    "null": b"null",
    "large": b'{"format": 1, "files": {' + b" " * (2 << 20) + b"}}",
    "a pickle": pickle.dumps({"format": 1}),
}


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class World:
    """A folder with a server's files, a cache and room around them, of which nothing may change.

    Attributes:
        root: everything; `root/site` is served, `root/cache` is ETFZOO_HOME.
        folder: the version folder on the server, made of hard links: files are replaced, never
            written into.
        index: document of the index that lists it.
    """

    def __init__(self, root, version, other, server):
        self.root, self.server, self.other = Path(root), server, Path(other)
        self.folder = self.root / "site" / NAME / "1"
        shutil.rmtree(self.root / "site", ignore_errors=True)
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        shutil.copytree(version, self.folder, copy_function=os.link)
        (self.root / "cache").mkdir(parents=True)
        (self.root / "around").mkdir(exist_ok=True)
        (self.root / "around/file").write_text("must stay")
        self.address = f"{server.url}/{NAME}/1"
        server.faults.clear()
        pin = hashlib.sha256((self.folder / manifest.NAME).read_bytes()).hexdigest()
        self.pinned = f"{self.address}#sha256={pin}"
        listing = manifest.read(self.folder)
        listing[manifest.NAME] = manifest.entry_of(self.folder / manifest.NAME)
        self.entry = {
            "urls": [self.address],
            "files": manifest.as_json(listing),
            "metrics": {"top1": 0.5},
            "created": None,
        }
        self.row = {
            "tag": "x",
            "dataset": "shapes",
            "num_classes": 5,
            "input_shape": [32, 32, 3],
            "head": "etf",
            "command": "python",
            "metrics": {},
            "licence": None,
            "versions": {"1": self.entry},
        }
        self.index = {
            "format": 2,
            "index_version": 1,
            "defaults": {"rn18_etf": "x"},
            "models": {NAME: self.row},
        }
        self.write_index(json.dumps(self.index).encode())

    def handle(self, where):
        """What a user loads."""
        return {
            "folder": self.folder,
            "address": self.address,
            "pinned": self.pinned,
            "index": NAME,
        }[where]

    def write(self, name, content, rehash=False):
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if rehash:
            self.rehash()

    def rehash(self):
        """A files.json that is right about what is there: the publisher himself is hostile."""
        (self.folder / manifest.NAME).unlink()
        manifest.write(self.folder)

    def write_index(self, content):
        (self.root / "index.json").write_bytes(content)

    def snapshot(self):
        """Everything around the cache: names, kinds, sizes, times."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if (self.root / "cache") not in (path, *path.parents):
                status = path.lstat()
                found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
        return found

    def cached(self):
        """Files and folders that are left in the cache, but for the locks."""
        found = (p for p in (self.root / "cache").rglob("*") if ".locks" not in p.parts)
        return sorted(map(str, found))


MUTATIONS = {}  # name -> (where it is loaded from, function)


def mutation(*where):
    def register(function):
        for place in where:
            MUTATIONS[f"{function.__name__} ({place})"] = place, function
        return function

    return register


@mutation("folder", "address", "pinned", "index")
def flipped_bit(rng, world):
    name = rng.choice((*FILES, manifest.NAME))
    content = bytearray((world.folder / name).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    world.write(name, bytes(content))
    return name


@mutation("folder", "address")
def changed_byte_of_the_list(rng, world):
    content = bytearray((world.folder / manifest.NAME).read_bytes())
    place = rng.randrange(len(content))
    content[place] = rng.choice([b for b in range(256) if b != content[place]])
    world.write(manifest.NAME, bytes(content))
    return place


@mutation("folder", "address", "index")
def truncated(rng, world):
    name = rng.choice((*FILES, manifest.NAME))
    content = (world.folder / name).read_bytes()
    world.write(name, content[: rng.randrange(len(content))])
    return name


@mutation("folder", "address", "index")
def longer(rng, world):
    name = rng.choice((*FILES, manifest.NAME))
    world.write(name, (world.folder / name).read_bytes() + rng.choice((b"\n", b" ", b"\0" * 999)))
    return name


@mutation("folder", "address", "index")
def missing_file(rng, world):
    name = rng.choice((*FILES, manifest.NAME))
    (world.folder / name).unlink()
    return name


@mutation("folder")
def additional_file(rng, world):
    name = rng.choice(("evil.pkl", "variables/evil.pkl", "assets.extra/evil.py", ".evil", "x/y/z"))
    (world.folder / name).parent.mkdir(parents=True, exist_ok=True)
    world.write(name, pickle.dumps(Bomb(world.root / "evil")))
    return name


@mutation("folder", "address")
def pickle_in_place_of(rng, world):
    name = rng.choice((*FILES, manifest.NAME))
    world.write(name, pickle.dumps(Bomb(world.root / "evil")))
    return name


@mutation("folder", "address")
def pickle_with_its_hash(rng, world):
    name = rng.choice((DATA, INDEX, publish.METADATA))
    world.write(name, pickle.dumps(Bomb(world.root / "evil")), rehash=True)
    return name


@mutation("folder")
def symbolic_link(rng, world):
    target = world.root / "around/file"
    name = rng.choice((*FILES, manifest.NAME, "assets/new", "variables", "assets.extra"))
    path = world.folder / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        target = world.root / "around" / path.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(path, target)  # the very files, in another place
    elif path.exists() and rng.random() < 0.5:
        target = world.root / "around" / path.name
        target.write_bytes(path.read_bytes())
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return name


@mutation("folder")
def named_pipe(rng, world):
    name = rng.choice((*FILES, manifest.NAME, "assets/pipe"))
    path = world.folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return name


@mutation("folder", "address")
def path_in_the_list(rng, world):
    path = rng.choice(PATHS).format(world=world.root)
    listing = json.loads((world.folder / manifest.NAME).read_bytes())
    if rng.random() < 0.5:
        listing["files"][path] = listing["files"]["README.md"]
    else:
        listing["files"][path] = listing["files"].pop(rng.choice(FILES))
    listing["files"] = dict(sorted(listing["files"].items()))
    world.write(manifest.NAME, (json.dumps(listing, indent=1) + "\n").encode())
    return repr(path)


@mutation("folder", "address")
def two_names_of_one_file(rng, world):
    listing = json.loads((world.folder / manifest.NAME).read_bytes())
    for path in rng.choice((("assets/x", "assets/X"), ("assets/x", "assets/x/y"))):
        listing["files"][path] = listing["files"]["README.md"]
    listing["files"] = dict(sorted(listing["files"].items()))
    world.write(manifest.NAME, (json.dumps(listing, indent=1) + "\n").encode())


@mutation("folder", "address")
def document_in_place_of_the_list(rng, world):
    name = rng.choice(sorted(DOCUMENTS))
    world.write(manifest.NAME, DOCUMENTS[name])
    return name


@mutation("folder", "address")
def document_in_place_of_the_metadata(rng, world):
    name = rng.choice(sorted(DOCUMENTS))
    world.write(publish.METADATA, DOCUMENTS[name], rehash=True)
    return name


@mutation("folder", "address")
def value_in_the_list(rng, world):
    listing = json.loads((world.folder / manifest.NAME).read_bytes())
    entry = listing["files"][rng.choice(FILES)]
    changes = {
        "future format": lambda: listing.update(format=2),
        "old format": lambda: listing.update(format=0),
        "format as text": lambda: listing.update(format="1"),
        "format true": lambda: listing.update(format=True),
        "another field": lambda: listing.update(run="evil"),
        "no files": lambda: listing.pop("files"),
        "files as list": lambda: listing.update(files=list(listing["files"])),
        "huge": lambda: entry.update(size=10 ** rng.randrange(13, 19)),
        "too large": lambda: entry.update(size=entry["size"] + 1),
        "too small": lambda: entry.update(size=entry["size"] - 1),
        "negative": lambda: entry.update(size=-1),
        "size as text": lambda: entry.update(size=str(entry["size"])),
        "size as float": lambda: entry.update(size=float(entry["size"])),
        "size true": lambda: entry.update(size=True),
        "wrong hash": lambda: entry.update(sha256=hashlib.sha256(rng.randbytes(8)).hexdigest()),
        "hash in capitals": lambda: entry.update(sha256=entry["sha256"].upper() + "A"),
        "short hash": lambda: entry.update(sha256=entry["sha256"][:63]),
        "no hash": lambda: entry.pop("sha256"),
        "hash null": lambda: entry.update(sha256=None),
        "entry as list": lambda: listing["files"].update({"README.md": [1]}),
        "lists itself": lambda: listing["files"].update({manifest.NAME: entry}),
    }
    what = rng.choice(sorted(changes))
    changes[what]()
    world.write(manifest.NAME, (json.dumps(listing, indent=1) + "\n").encode())
    return what


@mutation("folder", "address")
def value_in_the_metadata(rng, world):
    document = json.loads((world.folder / publish.METADATA).read_bytes())
    spec = document["spec"]
    changes = {
        "future format": lambda: document.update(format=99),
        "format 0": lambda: document.update(format=0),
        "format true": lambda: document.update(format=True),
        "no spec": lambda: document.pop("spec"),
        "spec as list": lambda: document.update(spec=[1]),
        "other backbone": lambda: spec.update(backbone="rn34"),
        "unknown backbone": lambda: spec.update(backbone="../evil"),
        "backbone as list": lambda: spec.update(backbone=["rn18"]),
        "one class more": lambda: spec.update(num_classes=6, class_names=None),
        "a billion classes": lambda: spec.update(num_classes=10**9, class_names=None),
        "classes as text": lambda: spec.update(num_classes="5"),
        "negative classes": lambda: spec.update(num_classes=-5),
        "linear head": lambda: spec.update(head="linear", scale=1.0, feature_norm="none"),
        "no head": lambda: spec.update(head=None, scale=1.0, feature_norm="none"),
        "other norm": lambda: spec.update(norm="sw"),
        "unknown norm": lambda: spec.update(norm="__import__"),
        "shape": lambda: spec.update(input_shape=[32, 32, 4]),
        "shape of text": lambda: spec.update(input_shape="abc"),
        "negative shape": lambda: spec.update(input_shape=[-1, 32, 3]),
        "short mean": lambda: spec.update(mean=[1.0]),
        "mean of text": lambda: spec.update(mean=["a", "b", "c"]),
        "std of zeros": lambda: spec.update(std=[0, 0, 0]),
        "crop": lambda: spec.update(crop=2),
        "dtype": lambda: spec.update(dtype="float33"),
        "dtype as object": lambda: spec.update(dtype={"class_name": "Lambda"}),
        "another field": lambda: spec.update(module="os"),
        "class names": lambda: spec.update(class_names=[1, 2, 3, 4, 5]),
        "metrics": lambda: document.update(metrics="best"),
    }
    what = rng.choice(sorted(changes))
    changes[what]()
    world.write(publish.METADATA, json.dumps(document).encode(), rehash=True)
    return what


@mutation("folder", "address")
def weights_of_another_model(rng, world):
    """Healthy files with their hashes, and shapes that do not fit."""
    which = rng.choice(((DATA, INDEX), (DATA,), (INDEX,)))
    for name in which:
        world.write(name, (world.other / name).read_bytes())
    world.rehash()
    return " and ".join(which)


@mutation("folder", "address")
def damaged_weights_with_their_hash(rng, world):
    """As a publisher with a bad disk would offer them; the checkpoint has checksums of its own."""
    content = bytearray((world.folder / DATA).read_bytes())
    if rng.random() < 0.5:
        content[rng.randrange(len(content) // 2, len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content) // 2, len(content)) :]
    world.write(DATA, bytes(content), rehash=True)


@mutation("pinned", "index")
def whole_list_of_another_publisher(rng, world):
    """A consistent model, only not the one that is asked for."""
    world.write("README.md", rng.randbytes(100), rehash=True)


@mutation("address", "index")
def served_wrongly(rng, world):
    name = rng.choice([n for n in FILES if n != "README.md"])
    faults = {
        "404": http.status(404),
        "another file": http.other(rng.randbytes(1000)),
        "to a file": http.redirect("file:///etc/passwd"),
        "in a circle": http.redirect(f"/{NAME}/1/{name}"),
        "endless": http.endless,
        "compressed": http.status(200, Content_Encoding="gzip"),
        "one byte more": lambda handler, content: http.good(handler, content + b"x"),
        "changed": lambda handler, content: http.good(handler, bytes(len(content))),
    }
    what = rng.choice(sorted(faults))
    world.server.faults[f"/{NAME}/1/{name}"] = [faults[what]]
    return f"{name}: {what}"


@mutation("index")
def document_in_place_of_the_index(rng, world):
    name = rng.choice([n for n in sorted(DOCUMENTS) if n != "large"])
    world.write_index(DOCUMENTS[name])
    return name


@mutation("index")
def truncated_index(rng, world):
    content = json.dumps(world.index).encode()
    world.write_index(content[: rng.randrange(len(content))])


@mutation("index")
def path_in_the_index(rng, world):
    path = rng.choice(PATHS).format(world=world.root)
    if rng.random() < 0.3:
        world.index["models"][path] = world.row
    else:
        world.entry["files"][path] = world.entry["files"]["README.md"]
    world.write_index(json.dumps(world.index).encode())
    return repr(path)


@mutation("index")
def value_in_the_index(rng, world):
    index, row, entry = world.index, world.row, world.entry
    listed = entry["files"][rng.choice((*FILES, manifest.NAME))]
    changes = {
        "future format": lambda: index.update(format=3),
        "old format": lambda: index.update(format=1),
        "no version": lambda: index.pop("index_version"),
        "another field": lambda: index.update(run="evil"),
        "default of nothing": lambda: index["defaults"].update(rn18_etf="y"),
        "defaults as list": lambda: index.update(defaults=["rn18_etf"]),
        "models as list": lambda: index.update(models=[row]),
        "row as text": lambda: index["models"].update({NAME: "row"}),
        "field of a row": lambda: row.update(run="evil"),
        "no command": lambda: row.pop("command"),
        "command as list": lambda: row.update(command=["rm"]),
        "command of two lines": lambda: row.update(command="a\nb"),
        "tag": lambda: row.update(tag="y"),
        "classes": lambda: row.update(num_classes=0),
        "classes as text": lambda: row.update(num_classes="5"),
        "shape": lambda: row.update(input_shape=[32, 32]),
        "head": lambda: row.update(head="evil"),
        "licence": lambda: row.update(licence=3),
        "metrics": lambda: row.update(metrics=None),
        "versions as list": lambda: row.update(versions=[entry]),
        "version as path": lambda: row["versions"].update({"../../evil": entry}),
        "version 0": lambda: row["versions"].update({"0": entry}),
        "version 01": lambda: row["versions"].update({"01": entry}),
        "url of a file": lambda: entry.update(urls=["file:///etc"]),
        "url as number": lambda: entry.update(urls=[1]),
        "url of two lines": lambda: entry.update(urls=["https://a\n/b"]),
        "no urls": lambda: entry.update(urls=[]),
        "field of a version": lambda: entry.update(run="evil"),
        "no files": lambda: entry.update(files={}),
        "no files.json": lambda: entry["files"].pop(manifest.NAME),
        "wrong hash": lambda: listed.update(sha256="0" * 64),
        "short hash": lambda: listed.update(sha256="0"),
        "huge": lambda: listed.update(size=10**18),
        "too large": lambda: listed.update(size=listed["size"] + 1),
        "too small": lambda: listed.update(size=listed["size"] - 1),
        "size true": lambda: listed.update(size=True),
    }
    what = rng.choice(sorted(changes))
    changes[what]()
    world.write_index(json.dumps(index).encode())
    return what


def refusal(world, where):
    """Loads what a mutation left there; what is wrong about how it was refused, and the message."""
    import etfzoo

    os.environ["ETFZOO_HOME"] = str(world.root / "cache")
    os.environ["ETFZOO_INDEX"] = str(world.root / "index.json")
    before = world.snapshot()
    faults = []
    try:
        etfzoo.load(world.handle(where))
        message = "loaded"
        faults.append("NOT REFUSED")
    except etfzoo.EtfzooError as error:
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        faults.append("not an EtfzooError")
    if not message.strip() or any(not c.isprintable() for c in message) or len(message) > 900:
        faults.append("not one clear line")
    if world.snapshot() != before:
        faults.append("something outside of the cache changed")
    if world.cached():
        faults.append(f"left in the cache: {world.cached()[:3]}")
    if Path("/tmp/etfzoo_evil").exists():
        faults.append("written outside")
    return faults, message

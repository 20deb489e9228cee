"""The index: names of published models, where they are and what they are made of.

`index.json` is package data, so that a release of etfzoo always means the same weights by a name.
The file that the environment variable `ETFZOO_INDEX` names, if any, is read too and comes first (a
zoo of one's own). Either is a root of trust, like the package itself: the files of a model are
checked against the hashes in it (see `etfzoo.zoo.cache`), and nothing checks it but for its form.

    format          2
    index_version   an integer, one higher with every change
    defaults        tag of a name without one: {"rn101_etf": "in1k"}
    models          by full name, <backbone>_<method>.<tag>:
        tag, dataset (the source of the weights), num_classes, input_shape, head (left out: the
        one of the method), command (what trains it), metrics, licence (null: unknown)
        versions    by number, empty while no weights are published: `urls` of the version folder
                    (none: it is in saved_models/ of a checkout only), `files` {path: {sha256,
                    size}}, files.json among them, `metrics`, `created`
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from etfzoo import files, locks
from etfzoo.errors import EtfzooError, first_line
from etfzoo.models.table import (
    BACKBONES,
    CUSTOM,
    MAX_VERSION,
    METHODS,
    VERSION,
    by_short_name,
)
from etfzoo.zoo import manifest, transport

FORMAT = 2

_PACKAGE = Path(__file__).absolute().parent
_NAME = re.compile(r"([a-z0-9]+)_([a-z]+)\.([A-Za-z0-9][A-Za-z0-9_-]{0,99})")
_ROW = {"tag", "dataset", "num_classes", "input_shape", "command", "metrics", "licence", "versions"}


@dataclasses.dataclass(frozen=True)
class Version:
    """A published version: addresses of its folder, its files, its results, when it was made."""

    urls: tuple[str, ...]
    files: dict[str, manifest.Entry]
    metrics: dict
    created: str | None

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the index; see the module's docstring."""

    tag: str
    dataset: str
    num_classes: int
    input_shape: tuple[int, int, int]
    command: str
    metrics: dict
    licence: str | None
    versions: dict[int, Version]
    head: str | None = None


@dataclasses.dataclass(frozen=True)
class Index:
    """Rows by full name, default tags by name without one."""

    models: dict[str, Row]
    defaults: dict[str, str]
    index_version: int = 0


def read() -> Index:
    """The index of the package, after that of ETFZOO_INDEX.

    Raises:
        EtfzooError: no such file, or a broken one.
    """
    index = load(_PACKAGE / "index.json")
    path = os.environ.get("ETFZOO_INDEX")
    if not path:
        return index
    own = load(files.expand(path))
    return Index(index.models | own.models, index.defaults | own.defaults, own.index_version)


def load(path) -> Index:
    """An index file, checked.

    Raises:
        EtfzooError: says what is wrong with it.
    """
    return _checked(_document(path), path)


def add(path, name: str, version: int, row: dict, published: dict, default: bool = False) -> None:
    """Adds a version to an index file, which is made if needed; all or nothing.

    The name without its tag means this model from now on if `default` says so, or if it meant
    nothing before, or a model without published weights.

    Args:
        path: the file.
        name: full name of the model.
        version: number that the index does not have yet, or has with just this entry.
        row: the fields of the model but for `tag` and `versions`.
        published: the fields of the version.
        default: whether the tag becomes the default one.

    Raises:
        EtfzooError: another version of that number is there, another process adds to the file just
            now, or the result would be no valid index.
    """
    with _alone(path):
        _add(path, name, version, row, published, default)


def _add(path, name, version, row, published, default):
    empty: dict = {"format": FORMAT, "index_version": 0, "defaults": {}, "models": {}}
    document = _document(path) if os.path.lexists(path) else empty
    _checked(document, path)
    tag = name.partition(".")[2]
    versions = document["models"].get(name, {}).get("versions", {})
    if versions.get(str(version)) == published:
        return
    if str(version) in versions:
        raise EtfzooError(f"{path} has a version {version} of {name} already; choose another one")
    versions = versions | {str(version): published}
    document["models"][name] = {"tag": tag} | row | {"versions": versions}
    bare, defaults = name.partition(".")[0], document["defaults"]
    if default or bare not in defaults or not _is_published(document, bare):
        defaults[bare] = tag
    document["index_version"] += 1
    _checked(document, path)
    files.write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def _alone(path):
    """Keeps others from adding to an index between reading and writing it."""
    place = Path(path).absolute()
    lock = place.with_name(f".{place.name}.lock")
    with locks.lock(lock, "a publication"):
        files.remove_temporaries(place.parent, place.name)
        yield
        shutil.rmtree(lock, ignore_errors=True)


def check_name(name: str) -> tuple[str, str, str]:
    """Backbone, method and tag of a full name.

    Raises:
        EtfzooError: it is none.
    """
    match = _NAME.fullmatch(name)
    if not match or match[1] not in by_short_name() or match[2] not in METHODS:
        raise EtfzooError(
            f"{name[:200]!r} is no name for a model: it must be <backbone>_<method>.<tag>, the "
            f"backbone {', '.join(BACKBONES)}, a network of keras.applications in small letters or "
            f"{CUSTOM}, the method {', '.join(METHODS)}"
        )
    return match[1], match[2], match[3]


def _is_published(document, bare):
    """Whether the default of a name has weights; its row is there, as the index was checked."""
    return bool(document["models"][f"{bare}.{document['defaults'][bare]}"]["versions"])


def _document(path) -> dict:
    try:
        content = files.read_bytes(path, files.MAX_DOCUMENT)
    except EtfzooError as e:
        raise EtfzooError(f"index {e}") from e
    try:
        document = files.parse_json(content)
    except ValueError as e:
        raise EtfzooError(f"index {path} is damaged: {first_line(e)}") from e
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise EtfzooError(f"{path} is no index: it has no format number")
    if document["format"] != FORMAT:
        raise EtfzooError(
            f"index {path} has format {document['format']}, and this etfzoo reads {FORMAT}: "
            "upgrade etfzoo, or the index"
        )
    return document


def _checked(document, path) -> Index:
    def need(condition, what):
        if not condition:
            raise EtfzooError(f"index {path} is broken: {what}")

    def is_text(value):
        return isinstance(value, str) and value.isprintable()

    models, defaults = document.get("models"), document.get("defaults")
    number = document.get("index_version")
    need(document.keys() == {"format", "index_version", "defaults", "models"}, "unknown fields")
    need(type(number) is int and number >= 0, "index_version is no number")
    need(isinstance(models, dict) and isinstance(defaults, dict), "no models or defaults")
    rows = {}
    for name, row in models.items():
        tag = check_name(name)[2]
        need(isinstance(row, dict) and row.keys() - {"head"} == _ROW, f"the fields of {name}")
        for field in ("tag", "dataset", "command"):
            need(is_text(row[field]), f"{field} of {name}")
        need(row["tag"] == tag, f"tag of {name}")
        need(row.get("head") in (None, "etf", "linear"), f"head of {name}")
        need(row["licence"] is None or is_text(row["licence"]), f"licence of {name}")
        need(type(row["num_classes"]) is int and row["num_classes"] > 0, f"num_classes of {name}")
        shape = row["input_shape"]
        need(
            isinstance(shape, list)
            and len(shape) == 3
            and all(type(n) is int and n > 0 for n in shape)
            and shape[2] == 3,
            f"input_shape of {name}",
        )
        need(isinstance(row["metrics"], dict), f"metrics of {name}")
        need(isinstance(row["versions"], dict), f"versions of {name}")
        versions = {}
        for version, published in row["versions"].items():
            what = f"version {version[:20]} of {name}"
            need(re.fullmatch(VERSION, version) and int(version) <= MAX_VERSION, what)
            fields = {"urls", "files", "metrics", "created"}
            need(isinstance(published, dict) and published.keys() == fields, f"fields of {what}")
            urls = published["urls"]
            need(
                isinstance(urls, list)
                and all(is_text(u) and urlsplit(u).scheme in transport.SCHEMES for u in urls),
                f"urls of {what}",
            )
            need(isinstance(published["metrics"], dict), f"metrics of {what}")
            need(published["created"] is None or is_text(published["created"]), f"date of {what}")
            listing = manifest.check_index_listing(published["files"], f"index {path}, {what}")
            versions[int(version)] = Version(
                tuple(urls), listing, published["metrics"], published["created"]
            )
        values = row | {"versions": versions, "input_shape": tuple(shape)}
        rows[name] = Row(**values)
    for name, tag in defaults.items():
        need(f"{name}.{tag}" in models, f"the default {name[:100]!r} is no model of it")
    return Index(rows, dict(defaults), number)

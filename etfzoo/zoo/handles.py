"""Models by name, folder or address, known without Keras: `list_models`, `info` and `spec`.

A handle is one of

- a name `<backbone>_<method>[.<tag>][@<version>]`, e.g. `rn101_etf.in1k@1`: the short name of a
  backbone, a row of METHODS, the training data, an integer;
- the path of a version folder, of a model folder (its highest version counts) or of the workdir of
  a training run;
- the address of a version folder (`https://`, `http://`, `gs://`, `hf://`), see `etfzoo.zoo.cache`.

A name is looked up in the cache (`ETFZOO_HOME`), then in `saved_models/` of a source checkout,
each laid out as `<name>/<version>/` (see `etfzoo.publish`), and then in the index
(`etfzoo.zoo.index`), whose models are downloaded into the cache, and among the files of Keras's
(`etfzoo.zoo.keras_weights`). What is here is taken; `name@2` asks for version 2.

Version folders are compared with their list of files before anything is read from them (those of
the index with the hashes in there); only folders that are older than that list are taken as they
are.
"""

import dataclasses
import fnmatch
import os
import re
from pathlib import Path

from etfzoo import files
from etfzoo.errors import EtfzooError, unknown
from etfzoo.models.spec import ClassifierSpec
from etfzoo.models.table import METHODS, VERSION, by_short_name
from etfzoo.progress import notify
from etfzoo.workdir import Workdir
from etfzoo.zoo import cache, card, index, keras_weights, manifest
from etfzoo.zoo.metadata import read_metadata, version_folders

_PACKAGE = Path(__file__).absolute().parents[1]


def spec(name_or_path) -> ClassifierSpec:
    """What a model is: its architecture, classes, pixels and dtype; no weights are read.

    Args:
        name_or_path: as for `load`; a model of the index with an address is downloaded.

    Returns:
        The ClassifierSpec of which `load` builds the network.

    Raises:
        EtfzooError: as `load`, but for weights that are not published.

    Examples:
        With the model that the example of `etfzoo.publish` wrote:

        >>> import etfzoo
        >>> etfzoo.spec("models/rn18_etf.birds").input_shape
        (32, 32, 3)
    """
    source = find(name_or_path)
    if source.workdir is not None:
        from etfzoo.models import checkpoint  # NumPy, which no published model needs here

        return checkpoint.read_spec(source.workdir)
    return (fetched(source) if has_address(source) else source).spec()


def list_models(filter: str = "*") -> list[str]:
    """Sorted names of the models that are here, in the index, or files of Keras's.

    Args:
        filter: shell pattern, e.g. `"rn50_*"`.

    Examples:
        >>> import etfzoo
        >>> etfzoo.list_models("rn50_*.in1k")
        ['rn50_etf.in1k', 'rn50_linear.in1k', 'rn50_sw.in1k']
    """
    names = {*_local_names(), *index.read().models, *keras_weights.NETWORKS}
    return sorted(fnmatch.filter(names, filter))


def info(name_or_path) -> dict:
    """What is known about a model, without building it.

    Args:
        name_or_path: as for `load`, but no workdir. A model of the index is not downloaded for it,
            an address is.

    Returns:
        A dict with `name`, `version`, `path` (None where it is not here), `size_bytes` (None where
        no weights are published), `published`, `spec` (the arguments of
        `etfzoo.build_classifier`; what the index knows of them where the model is not here),
        `num_classes`, `class_names`, `input_shape`, `dataset`, `command`, `provenance`, `metrics`,
        `licence`, `created` and `card` (the model card, Markdown; None where it is not here).

    Raises:
        EtfzooError: as `load`.

    Examples:
        >>> import etfzoo
        >>> found = etfzoo.info("rn101_etf.in1k")
        >>> found["name"], found["num_classes"], found["input_shape"]
        ('rn101_etf.in1k', 1000, (224, 224, 3))
        >>> found["command"]
        'python recipes/pretrain.py --backbone=rn101 --head=etf'
    """
    source = find(name_or_path)
    if source.workdir is not None:
        raise EtfzooError(f"{source} is a training run; info describes published models")
    spec = source.spec()
    found = {"name": source.name, "version": source.version}
    if source.folder is not None:
        metadata = read_metadata(source.folder)
        provenance = metadata.get("provenance") or {}
        found |= {
            "path": str(source.folder),
            "size_bytes": sum(p.stat().st_size for p in source.folder.rglob("*") if p.is_file()),
            "published": True,
            "dataset": provenance.get("dataset"),
            "command": provenance.get("command"),
            "provenance": provenance,
            "metrics": metadata.get("metrics") or {},
            "licence": metadata.get("licence"),
            "created": metadata.get("created"),
            "card": card.read(source.folder),
        }
    elif source.is_keras:
        made = {"title": "ImageNet-1k weights of keras.applications, converted when loaded"}
        found |= {
            "path": None,
            "size_bytes": None,
            "published": True,
            "dataset": "ImageNet-1k",
            "command": None,
            "provenance": made | {"dataset": "ImageNet-1k"},
            "metrics": {},
            "licence": keras_weights.LICENCE,
            "created": None,
            "card": None,
        }
    else:
        row, version = source.row, source.row.versions.get(source.version)
        found |= {
            "path": None,
            "size_bytes": version and version.size,
            "published": version is not None,
            "dataset": row.dataset,
            "command": row.command,
            "provenance": {"dataset": row.dataset, "command": row.command},
            "metrics": (version or row).metrics,
            "licence": row.licence,
            "created": version and version.created,
            "card": None,
        }
    return found | {
        "spec": dataclasses.asdict(spec),
        "num_classes": spec.num_classes,
        "class_names": spec.class_names,
        "input_shape": spec.input_shape,
    }


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a handle leads: one of folder, workdir and row is set, or none: Keras has it."""

    name: str
    version: int | None = None
    folder: Path | None = None
    workdir: Path | None = None
    row: index.Row | None = None
    bare: str | None = None

    def __str__(self):
        return str(self.folder or self.workdir or self.name)

    @property
    def is_keras(self) -> bool:
        """Whether its weights are a file of Keras's, see `etfzoo.zoo.keras_weights`."""
        return self.folder is None and self.workdir is None and self.row is None

    def spec(self) -> ClassifierSpec:
        if self.folder is not None:
            return read_metadata(self.folder)["spec"]
        if self.is_keras:
            return keras_weights.spec(self.name)
        backbone, method = self.name.split(".")[0].split("_")
        head, norm = METHODS[method]
        return ClassifierSpec(
            by_short_name()[backbone],
            self.row.num_classes,
            head=self.row.head or head,
            norm=norm,
            input_shape=self.row.input_shape,
        )


def find(handle) -> Source:
    """Where a handle leads. Of what is downloaded for it, an address is and a name is not.

    Raises:
        EtfzooError: as `load`.
    """
    text = os.fspath(handle)
    if "://" in text:
        return _find_address(text)
    path = files.expand(text)
    separators = [s for s in (os.sep, os.altsep) if s]
    if isinstance(handle, Path) or any(s in text for s in separators) or path.is_dir():
        return _find_path(path)
    return _find_name(text)


def _find_address(handle) -> Source:
    from etfzoo.zoo.load import load

    folder = cache.fetch_url(handle, try_out=load)
    *parents, last = cache.parse_handle(handle)[0].partition("@")[0].split("/")
    version = int(last) if re.fullmatch(VERSION, last) else None
    return Source(last if version is None else parents[-1], version, folder=folder)


def _find_path(path) -> Source:
    if not path.exists():
        raise EtfzooError(f"no such folder: {path}")
    if (path / "saved_model.pb").exists():
        version = int(path.name) if re.fullmatch(VERSION, path.name) else None
        return Source(path.absolute().parent.name, version, folder=_verified(path))
    versions = _complete_versions(path)
    if versions:
        version = max(versions)
        return Source(path.absolute().name, version, folder=_verified(versions[version]))
    if Workdir(path).is_run:
        return Source(path.absolute().name, workdir=path)
    raise EtfzooError(
        f"{path} is no model: it holds neither a saved_model.pb, nor a version folder such as 1/ "
        "with one, nor the checkpoints/ of a training run"
    )


def _find_name(text) -> Source:
    name, _, suffix = text.partition("@")
    if "@" in text and not re.fullmatch(VERSION, suffix):
        raise EtfzooError(f"{text}: what follows @ must be a version number")
    version = int(suffix) if suffix else None
    known = index.read()
    bare = name if "." not in name else None
    names = [name]
    if name in known.defaults:
        names.append(f"{name}.{known.defaults[name]}")
    for full in names:
        row = known.models.get(full)
        published = row.versions if row else {}
        here = set()
        for root in _roots():
            versions = _complete_versions(root / full)
            here |= versions.keys()
            chosen = max(versions, default=None) if version is None else version
            if chosen not in versions:
                continue
            if version is None and chosen < max(published, default=0):
                newest = f"{full}@{max(published)}"
                notify("%s is newer than version %d here and published", newest, chosen)
            if root == cache.home():
                cache.check_not_linked(versions[chosen])
                if chosen in published:
                    return fetched(Source(full, chosen, row=row, bare=bare))
            return Source(full, chosen, folder=_verified(versions[chosen]), bare=bare)
        if version is not None and version not in published and (here or row):
            if not here:
                raise EtfzooError(f"{full} has no published version {version}")
            have = ", ".join(map(str, sorted(here | published.keys())))
            raise EtfzooError(f"{full} has no version {version} here; it has: {have}")
        if row:
            chosen = version or max(published, default=None)
            return Source(full, chosen, row=row, bare=bare)
    if name in keras_weights.NETWORKS and version is None:
        return Source(name)
    raise unknown("model", name, {*list_models(), *known.defaults})


def has_address(source) -> bool:
    """Whether the version that a source leads to can be downloaded."""
    versions = source.row.versions if source.row else {}
    return source.version in versions and bool(versions[source.version].urls)


def fetched(source) -> Source:
    """The source with its folder here, if its weights are published."""
    if source.row is None or source.version is None:
        return source
    published = source.row.versions[source.version]
    folder = cache.fetch_version(source.name, source.version, published.urls, published.files)
    return dataclasses.replace(source, row=None, folder=folder)


def _verified(folder) -> Path:
    if not manifest.verify(folder) and read_metadata(folder).get("manifest"):
        raise EtfzooError(
            f"{folder / manifest.NAME} is missing: an incomplete copy; copy or publish it again"
        )
    return folder


def _roots() -> list[Path]:
    checkout = _PACKAGE.parent
    roots = [cache.home()]
    if (checkout / "setup.py").exists():
        roots.append(checkout / "saved_models")
    return roots


def _complete_versions(folder) -> dict[int, Path]:
    versions = version_folders(folder)
    return {v: path for v, path in versions.items() if (path / "saved_model.pb").exists()}


def _local_names() -> set[str]:
    return {
        folder.name
        for root in _roots()
        if root.is_dir()
        for folder in root.iterdir()
        if _complete_versions(folder)
    }

"""Models by name, folder or address: `load`, `list_models` and `info`.

A handle is one of

- a name `<backbone>_<method>[.<tag>][@<version>]`, e.g. `rn101_etf.in1k@1`: a row of BACKBONES, a
  row of METHODS, the training data, an integer;
- the path of a version folder, of a model folder (its highest version counts) or of the workdir of
  a training run;
- the address of a version folder (`https://`, `http://`, `gs://`, `hf://`), see `etfzoo.zoo.cache`.

A name is looked up in the cache (`ETFZOO_HOME`), then in `saved_models/` of a source checkout,
each laid out as `<name>/<version>/` (see `etfzoo.publish`), and then in the index
(`etfzoo.zoo.index`),
whose models are downloaded into the cache. What is here is taken; `name@2` asks for version 2.

Version folders are compared with their list of files before anything is read from them (those of
the index with the hashes in there); only folders that are older than that list are taken as they
are.
"""

import dataclasses
import fnmatch
import os
import re
from pathlib import Path

import keras

from etfzoo.errors import EtfzooError, first_line, unknown
from etfzoo.models import checkpoint, classifier, weights
from etfzoo.models.classifier import ClassifierSpec, ImageClassifier
from etfzoo.models.table import METHODS, VERSION
from etfzoo.progress import notify
from etfzoo.workdir import Workdir
from etfzoo.zoo import cache, card, index, manifest, publish, verify

AUTO = "auto"

_PACKAGE = Path(__file__).absolute().parents[1]


def load(
    name_or_path,
    num_classes: int | None = None,
    head: str | None = AUTO,
    load_weights: bool = True,
    input_shape=None,
    dtype: str | None = None,
) -> ImageClassifier:
    """The published model of that name, folder or address, as a trainable Keras model.

    Called plainly, the result is bit-equal to the model that was published. Only arrays and JSON
    are read from the folder, after all its hashes were checked; nothing in it is executed.

    Args:
        name_or_path: a zoo name (see `etfzoo.list_models`), downloaded if it is not here; a path:
            a version folder, a model folder (its highest version is taken) or the workdir of a
            training run; or the `https://`, `gs://` or `hf://` address of a version folder. What
            holds `://` is an address, what holds a path separator or is an existing folder a path.
        num_classes: given, the head is a fresh one of that many classes.
        head: `"auto"` is the published head, or a fresh linear one with `num_classes`. `"etf"`
            and `"linear"` keep the published head where it is of that kind and `num_classes` is
            left out, and are fresh otherwise. None gives the pooled features.
        load_weights: False gives the untrained network.
        input_shape: `(height, width, 3)` instead of the published one.
        dtype: Keras dtype policy instead of the published one, e.g. `"mixed_bfloat16"`.

    Returns:
        An ImageClassifier.

    Raises:
        EtfzooError: unknown name (with close matches), no published weights, a download that
            fails, a folder that holds no model or a damaged one.

    Examples:
        With the model that the example of `etfzoo.publish` wrote:

        >>> import etfzoo
        >>> etfzoo.load("models/rn18_etf.birds").output_shape
        (None, 7)
        >>> etfzoo.load("models/rn18_etf.birds", num_classes=37).spec.head
        'linear'
        >>> etfzoo.load("models/rn18_etf.birds", head=None).output_shape
        (None, 512)
    """
    source = _find(name_or_path)
    if load_weights or _has_address(source):  # with its files the spec is the exact one
        source = _fetched(source)
    model = None
    if source.workdir is not None:
        model = checkpoint.load_model(source.workdir)
        spec = model.spec
    else:
        spec = source.spec()
        if load_weights and source.folder is None:
            raise _not_published(source)
    target, fresh = _changed(spec, source, num_classes, head, input_shape, dtype)
    if source.bare:
        _say(source, spec)
    if not load_weights:
        return _build(target, source)
    if model is None:
        # Read before the network is built, so that a damaged file fails at once.
        arrays = publish.read_weights(source.folder)
        verify.check_weights(arrays, f"the weights of {source}")
        _check_classes(spec, arrays, source)
    elif target == spec and not fresh:
        return model
    else:
        arrays = weights.as_arrays(model.variables)
    result = _build(target, source)
    if not fresh:
        verify.check_kernel(result, arrays, f"the weights of {source}")
    skip = classifier.is_head_variable if fresh else lambda path: False
    weights.assign(result.variables, arrays, f"the weights of {source}", skip)
    return result


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
    source = _find(name_or_path)
    if source.workdir is not None:
        return checkpoint.read_spec(source.workdir)
    return (_fetched(source) if _has_address(source) else source).spec()


def list_models(filter: str = "*") -> list[str]:
    """Sorted names of the models that are here or in the index.

    Args:
        filter: shell pattern, e.g. `"rn50_*"`.

    Examples:
        >>> import etfzoo
        >>> etfzoo.list_models("rn50_*.in1k")
        ['rn50_etf.in1k', 'rn50_linear.in1k', 'rn50_sw.in1k']
    """
    return sorted(fnmatch.filter({*_local_names(), *index.read().models}, filter))


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
    source = _find(name_or_path)
    if source.workdir is not None:
        raise EtfzooError(f"{source} is a training run; info describes published models")
    spec = source.spec()
    found = {"name": source.name, "version": source.version}
    if source.folder is not None:
        metadata = publish.read_metadata(source.folder)
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
class _Source:
    """Where a handle leads: exactly one of folder, workdir and row is set."""

    name: str
    version: int | None = None
    folder: Path | None = None
    workdir: Path | None = None
    row: index.Row | None = None
    bare: str | None = None

    def __str__(self):
        return str(self.folder or self.workdir or self.name)

    def spec(self) -> ClassifierSpec:
        if self.folder is not None:
            return publish.read_metadata(self.folder)["spec"]
        backbone, method = self.name.split(".")[0].split("_")
        head, norm = METHODS[method]
        return ClassifierSpec(
            backbone,
            self.row.num_classes,
            head=self.row.head or head,
            norm=norm,
            input_shape=self.row.input_shape,
        )


def _find(handle) -> _Source:
    text = os.fspath(handle)
    if "://" in text:
        return _find_address(text)
    path = Path(text).expanduser()
    separators = [s for s in (os.sep, os.altsep) if s]
    if isinstance(handle, Path) or any(s in text for s in separators) or path.is_dir():
        return _find_path(path)
    return _find_name(text)


def _find_address(handle) -> _Source:
    folder = cache.fetch_url(handle, try_out=load)
    *parents, last = cache.parse_handle(handle)[0].partition("@")[0].split("/")
    version = int(last) if re.fullmatch(VERSION, last) else None
    return _Source(last if version is None else parents[-1], version, folder=folder)


def _find_path(path) -> _Source:
    if not path.exists():
        raise EtfzooError(f"no such folder: {path}")
    if (path / "saved_model.pb").exists():
        version = int(path.name) if re.fullmatch(VERSION, path.name) else None
        return _Source(path.absolute().parent.name, version, folder=_verified(path))
    versions = _complete_versions(path)
    if versions:
        version = max(versions)
        return _Source(path.absolute().name, version, folder=_verified(versions[version]))
    if Workdir(path).is_run:
        return _Source(path.absolute().name, workdir=path)
    raise EtfzooError(
        f"{path} is no model: it holds neither a saved_model.pb, nor a version folder such as 1/ "
        "with one, nor the checkpoints/ of a training run"
    )


def _find_name(text) -> _Source:
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
            if root == cache.home() and chosen in published:
                return _fetched(_Source(full, chosen, row=row, bare=bare))
            return _Source(full, chosen, folder=_verified(versions[chosen]), bare=bare)
        if version is not None and version not in published and (here or row):
            if not here:
                raise EtfzooError(f"{full} has no published version {version}")
            have = ", ".join(map(str, sorted(here | published.keys())))
            raise EtfzooError(f"{full} has no version {version} here; it has: {have}")
        if row:
            chosen = version or max(published, default=None)
            return _Source(full, chosen, row=row, bare=bare)
    raise unknown("model", name, {*list_models(), *known.defaults})


def _has_address(source) -> bool:
    versions = source.row.versions if source.row else {}
    return source.version in versions and bool(versions[source.version].urls)


def _fetched(source) -> _Source:
    """The source with its folder here, if its weights are published."""
    if source.row is None or source.version is None:
        return source
    published = source.row.versions[source.version]
    folder = cache.fetch_version(source.name, source.version, published.urls, published.files)
    return dataclasses.replace(source, row=None, folder=folder)


def _verified(folder) -> Path:
    if not manifest.verify(folder) and publish.read_metadata(folder).get("manifest"):
        raise EtfzooError(
            f"{folder / manifest.NAME} is missing: an incomplete copy; copy or publish it again"
        )
    return folder


def _changed(spec, source, num_classes, head, input_shape, dtype):
    """The spec that is asked for, and whether its head is a fresh one."""
    changes = {}
    if input_shape is not None:
        changes["input_shape"] = input_shape
    if dtype is not None:
        try:
            changes["dtype"] = keras.dtype_policies.get(dtype).name
        except (TypeError, ValueError):
            raise EtfzooError(f"unknown dtype policy {dtype!r}, e.g. mixed_bfloat16") from None
    if head == AUTO:
        head = spec.head if num_classes is None else "linear"
    fresh = num_classes is not None or head != spec.head
    if head is None and num_classes is not None:
        raise EtfzooError("head=None gives features and takes no num_classes")
    if head is not None and num_classes is None and spec.num_classes is None:
        raise EtfzooError(f"{source} has no head: head={head!r} needs num_classes")
    if fresh:  # as in replace_head, nothing of the old head is taken over ...
        changes |= {"head": head, "feature_norm": "none", "scale": None}
        if head is None or num_classes is not None:  # ... but for the classes, if they stay
            changes |= {"num_classes": num_classes}
            changes |= {"class_names": None, "class_descriptions": None}
    return dataclasses.replace(spec, **changes), fresh


def _build(spec, source):
    try:
        return ImageClassifier(spec)
    except (TypeError, ValueError) as e:  # values of the spec that Keras or a layer refuses
        raise EtfzooError(f"{source} cannot be built: {first_line(e)}") from e


def _check_classes(spec, arrays, source):
    """Before a network is built that a wrong number makes too large for any memory."""
    kernel = arrays.get("logits/kernel")
    if spec.head is not None and kernel is not None and kernel.shape[-1:] != (spec.num_classes,):
        raise EtfzooError(
            f"the weights of {source} do not fit the model: {kernel.shape[-1:]} classes instead of "
            f"{spec.num_classes}"
        )


def _not_published(source):
    return EtfzooError(
        f"{source.row.dataset} weights of {source.name} are not published; train them with "
        f"`{source.row.command}`, or pass load_weights=False for the untrained network"
    )


def _roots() -> list[Path]:
    checkout = _PACKAGE.parent
    roots = [cache.home()]
    if (checkout / "setup.py").exists():
        roots.append(checkout / "saved_models")
    return roots


def _complete_versions(folder) -> dict[int, Path]:
    versions = publish.version_folders(folder)
    return {v: path for v, path in versions.items() if (path / "saved_model.pb").exists()}


def _local_names() -> set[str]:
    return {
        folder.name
        for root in _roots()
        if root.is_dir()
        for folder in root.iterdir()
        if _complete_versions(folder)
    }


def _say(source, spec):
    """One line about what a name without a tag stands for."""
    height, width, _ = spec.input_shape
    parts = [f"{height or 'any'}x{width or 'any'} pixels"]
    parts.append("features" if spec.head is None else f"{spec.num_classes} classes")
    end = ""
    if source.folder is None:
        unpublished = f": {source.row.dataset} weights are not published"
        parts.append("untrained" + ("" if source.version else unpublished))
    else:
        metadata = publish.read_metadata(source.folder)
        dataset = (metadata.get("provenance") or {}).get("dataset")
        if dataset:
            parts.insert(0, f"trained on {dataset}")
        top1 = (metadata.get("metrics") or {}).get("top1")
        if isinstance(top1, int | float):
            parts.append(f"top-1 {100 * top1:.1f} %")
        wanted = index.read().models.get(f"{source.bare}.in1k")
        if wanted and not wanted.versions and source.name != f"{source.bare}.in1k":
            end = f"; {wanted.dataset} weights are not published"
    version = f" version {source.version}" if source.version else ""
    where = f" ({source.folder})" if source.folder else ""
    notify("%s is %s%s%s: %s%s", source.bare, source.name, version, where, ", ".join(parts), end)

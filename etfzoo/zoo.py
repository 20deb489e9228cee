"""Models by name or folder: `load`, `list_models` and `info`.

A name is `<backbone>_<method>[.<tag>][@<version>]`, e.g. `rn101_etf.in1k@1`: a row of BACKBONES, a
row of METHODS, the training data, an integer. It is looked up in

1. the folder of the environment variable `ETFZOO_HOME`, by default `~/.cache/etfzoo`,
2. `saved_models/` of a source checkout,

each laid out as `<name>/<version>/` (see `etfzoo.publish`), and then in `index.json`, which is
package data:

    format      1
    defaults    tag of a name without one: {"rn101_etf": "in1k"}
    models      by full name: `dataset`, `num_classes`, `input_shape`, the `command` that trains
                it, and `versions`, which is empty while no weights are published
"""

import dataclasses
import fnmatch
import json
import logging
import os
import re
import sys
from pathlib import Path

import keras

from etfzoo import checkpoint, classifier, export, weights
from etfzoo.classifier import ClassifierSpec, ImageClassifier
from etfzoo.errors import EtfzooError, unknown

# method: (head, norm); in the words of the paper Trainable, SW and Fixed
METHODS = {"linear": ("linear", "bn"), "sw": ("linear", "sw"), "etf": ("etf", "bn")}

AUTO = "auto"

_PACKAGE = Path(__file__).absolute().parent
_log = logging.getLogger("etfzoo")


def load(
    name_or_path,
    num_classes: int | None = None,
    head: str | None = AUTO,
    load_weights: bool = True,
    input_shape=None,
    dtype: str | None = None,
) -> ImageClassifier:
    """The published model of that name or folder, as a trainable Keras model.

    Called plainly, the result is bit-equal to the model that was published. Only arrays and JSON
    are read from the folder; nothing in it is executed.

    Args:
        name_or_path: a zoo name (see `etfzoo.list_models`), or a path: a version folder, a
            model folder (its highest version is taken) or the workdir of a training run. What
            holds a path separator or is an existing folder is a path.
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
        EtfzooError: unknown name (with close matches), no published weights, a folder that holds
            no model or a damaged one.
    """
    source = _find(name_or_path)
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
        arrays = export.read_weights(source.folder)
    elif target == spec and not fresh:
        return model
    else:
        arrays = weights.as_arrays(model.variables)
    result = _build(target, source)
    skip = classifier.is_head if fresh else lambda path: False
    weights.assign(result.variables, arrays, f"the weights of {source}", skip)
    return result


def list_models(filter: str = "*") -> list[str]:
    """Sorted names of the models that are here or in the index.

    Args:
        filter: shell pattern, e.g. `"rn50_*"`.
    """
    return sorted(fnmatch.filter({*_local_names(), *_read_index()["models"]}, filter))


def info(name_or_path) -> dict:
    """What is known about a model, without building it.

    Args:
        name_or_path: as for `load`, but no workdir.

    Returns:
        A dict with `name`, `version`, `path` and `size_bytes` (None where it is not here),
        `published`, `spec` (the arguments of `etfzoo.build_classifier`), `num_classes`,
        `class_names`, `input_shape`, `command`, `provenance`, `metrics`, `licence`, `created`.

    Raises:
        EtfzooError: as `load`.
    """
    source = _find(name_or_path)
    if source.workdir is not None:
        raise EtfzooError(f"{source} is a training run; info describes published models")
    if source.folder is None:
        row = source.row
        spec = dataclasses.asdict(source.spec())
        metadata = {"provenance": {"dataset": row["dataset"], "command": row["command"]}}
        summary = row
    else:
        metadata = export.read_metadata(source.folder)
        spec = summary = dataclasses.asdict(metadata["spec"])
    files = [p for p in Path(source.folder).rglob("*") if p.is_file()] if source.folder else []
    provenance = metadata.get("provenance") or {}
    return {
        "name": source.name,
        "version": source.version,
        "path": source.folder and str(source.folder),
        "size_bytes": sum(p.stat().st_size for p in files) if source.folder else None,
        "published": source.folder is not None or bool(source.row["versions"]),
        "spec": spec,
        "num_classes": summary["num_classes"],
        "class_names": summary.get("class_names"),
        "input_shape": tuple(summary["input_shape"]),
        "command": provenance.get("command"),
        "provenance": provenance,
        "metrics": metadata.get("metrics") or {},
        "licence": metadata.get("licence"),
        "created": metadata.get("created"),
    }


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a handle leads: exactly one of folder, workdir and row is set."""

    name: str
    version: int | None = None
    folder: Path | None = None
    workdir: Path | None = None
    row: dict | None = None
    bare: str | None = None

    def __str__(self):
        return str(self.folder or self.workdir or self.name)

    def spec(self) -> ClassifierSpec:
        if self.folder is not None:
            return export.read_metadata(self.folder)["spec"]
        backbone, method = self.name.split(".")[0].split("_")
        head, norm = METHODS[method]
        return ClassifierSpec(
            backbone,
            self.row["num_classes"],
            head=head,
            norm=norm,
            input_shape=self.row["input_shape"],
        )


def _find(handle) -> _Source:
    text = os.fspath(handle)
    if "://" in text:
        raise EtfzooError(f"{text}: only zoo names and local paths can be loaded")
    path = Path(text).expanduser()
    separators = [s for s in (os.sep, os.altsep) if s]
    if isinstance(handle, Path) or any(s in text for s in separators) or path.is_dir():
        return _find_path(path)
    return _find_name(text)


def _find_path(path) -> _Source:
    if not path.exists():
        raise EtfzooError(f"no such folder: {path}")
    if (path / "saved_model.pb").exists():
        version = int(path.name) if path.name.isdecimal() else None
        return _Source(path.absolute().parent.name, version, folder=path)
    versions = _complete_versions(path)
    if versions:
        version = max(versions)
        return _Source(path.absolute().name, version, folder=versions[version])
    if checkpoint.is_workdir(path):
        return _Source(path.absolute().name, workdir=path)
    raise EtfzooError(
        f"{path} is no model: it holds neither a saved_model.pb, nor a version folder such as 1/ "
        "with one, nor the checkpoints/ of a training run"
    )


def _find_name(text) -> _Source:
    name, _, suffix = text.partition("@")
    if "@" in text and not re.fullmatch(r"[1-9][0-9]*", suffix):
        raise EtfzooError(f"{text}: what follows @ must be a version number")
    version = int(suffix) if suffix else None
    index = _read_index()
    bare = name if "." not in name else None
    names = [name]
    if name in index["defaults"]:
        names.append(f"{name}.{index['defaults'][name]}")
    for full in names:
        here = set()
        for root in _roots():
            versions = _complete_versions(root / full)
            here |= versions.keys()
            chosen = max(versions, default=None) if version is None else version
            if chosen in versions:
                return _Source(full, chosen, folder=versions[chosen], bare=bare)
        if here:
            have = ", ".join(map(str, sorted(here)))
            raise EtfzooError(f"{full} has no version {version} here; it has: {have}")
        if full in index["models"]:
            row = index["models"][full]
            if version is not None and version not in row["versions"]:
                raise EtfzooError(f"{full} has no published version {version}")
            return _Source(full, version, row=row, bare=bare)
    raise unknown("model", name, {*list_models(), *index["defaults"]})


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
            changes |= {"num_classes": num_classes, "class_names": None}
    return dataclasses.replace(spec, **changes), fresh


def _build(spec, source):
    try:
        return ImageClassifier(spec)
    except (TypeError, ValueError) as e:  # values of the spec that Keras or a layer refuses
        raise EtfzooError(f"{source} cannot be built: {export.first_line(e)}") from e


def _not_published(source):
    return EtfzooError(
        f"{source.row['dataset']} weights of {source.name} are not published; train them with "
        f"`{source.row['command']}`, or pass load_weights=False for the untrained network"
    )


def _roots() -> list[Path]:
    home = os.environ.get("ETFZOO_HOME") or "~/.cache/etfzoo"
    checkout = _PACKAGE.parent
    roots = [Path(home).expanduser()]
    if (checkout / "setup.py").exists():
        roots.append(checkout / "saved_models")
    return roots


def _complete_versions(folder) -> dict[int, Path]:
    versions = export.version_folders(folder)
    return {v: path for v, path in versions.items() if (path / "saved_model.pb").exists()}


def _local_names() -> set[str]:
    return {
        folder.name
        for root in _roots()
        if root.is_dir()
        for folder in root.iterdir()
        if _complete_versions(folder)
    }


def _read_index() -> dict:
    return json.loads((_PACKAGE / "index.json").read_text("utf-8"))


def _say(source, spec):
    """One line about what a name without a tag stands for."""
    height, width, _ = spec.input_shape
    parts = [f"{height or 'any'}x{width or 'any'} pixels"]
    parts.append("features" if spec.head is None else f"{spec.num_classes} classes")
    if source.folder is None:
        parts.append(f"untrained: {source.row['dataset']} weights are not published")
    else:
        top1 = (export.read_metadata(source.folder).get("metrics") or {}).get("top1")
        if isinstance(top1, int | float):
            parts.append(f"top-1 {100 * top1:.1f} %")
    version = f" version {source.version}" if source.version else ""
    where = f" ({source.folder})" if source.folder else ""
    # The application's logging configuration counts; without one the line still shows.
    if not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler(sys.stderr))
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO)
    _log.info("%s is %s%s%s: %s", source.bare, source.name, version, where, ", ".join(parts))

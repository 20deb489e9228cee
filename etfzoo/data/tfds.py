"""Data sets of tensorflow_datasets (TFDS) as sources; TFDS is imported when one is opened."""

import contextlib
import logging
import os
import re
from pathlib import Path

import numpy as np

from etfzoo import files
from etfzoo.data.datasets import DATASETS, EMBEDDED, Dataset
from etfzoo.data.source import Source
from etfzoo.data.tfds_source import TfdsSource, file_size
from etfzoo.errors import EtfzooError, first_line, unknown

log = logging.getLogger("etfzoo")

# Names are made of what a file says is their number.
_MOST_CLASSES = 10**6


def open_tfds(name: str, data_dir: str | None = None, prepare: bool = True) -> Source:
    """The source of a TFDS name or prepared folder, see `etfzoo.data.sources.resolve`."""
    # Importing TFDS costs a second; folders do without.
    import tensorflow_datasets as tfds

    if data_dir is not None and not os.path.isdir(data_dir):
        raise EtfzooError(f"data directory {data_dir} does not exist; check `data_dir`")
    if ":" in name and not re.fullmatch(r"[\w/]+:[\d.*]+", name):
        raise EtfzooError(
            f"{name!r} is no data set: before a colon stands a name of TFDS, behind it a version; "
            "what TFDS calls namespaces would run the code of others"
        )
    row = DATASETS.get(name)
    _check_documents(_prepared_folder(_place(row.tfds if row else name, data_dir)), name)
    with _own_features_alone(tfds):
        if name in EMBEDDED and prepare:
            from etfzoo.data import shapes

            shapes.prepare(data_dir, [name])
        if name == "tiny_imagenet":
            from etfzoo.data import tiny_imagenet  # noqa: F401 - TFDS knows it from here on
        builder = _tfds_builder(tfds, name, row, data_dir, prepare)
    image_key, label_key = _feature_keys(tfds, name, builder)
    label = builder.info.features[label_key]
    if not 0 < (label.num_classes or 0) <= _MOST_CLASSES:
        raise EtfzooError(
            f"data set {name} says in features.json that it has {label.num_classes} classes"
        )
    names = tuple(label.names) if label.num_classes == len(label.names or ()) else ()
    if not names:
        names = tuple(str(i) for i in range(label.num_classes))
    return TfdsSource(
        name=name,
        row=row or _derived_row(name, builder),
        class_names=names,
        builder=builder,
        image_key=image_key,
        label_key=label_key,
    )


def _tfds_builder(tfds, name, row, data_dir, prepare):
    folder = None if row else _prepared_folder(_place(name, data_dir))
    if folder is not None:
        try:
            return tfds.builder_from_directory(str(folder))
        except Exception as error:  # TFDS raises whatever its parsers raise
            raise EtfzooError(
                f"{folder} is no prepared TFDS data set that can be read: {first_line(error)}"
            ) from error
    try:
        builder = tfds.builder(row.tfds if row else name, data_dir=data_dir)
    except Exception as error:  # as above
        if row is None:
            known = set(DATASETS) | _folder_names(data_dir)
            raise unknown("data set", name, known) from error
        raise EtfzooError(f"data set {name} cannot be opened: {first_line(error)}") from error
    if builder.info.splits:
        return builder
    where = f"under {builder.data_dir}"
    if row is not None and row.manual:
        raise EtfzooError(f"data set {name} is not prepared {where}. {row.manual}")
    if not prepare:
        raise EtfzooError(f"data set {name} is not prepared {where}")
    log.info("downloading and preparing %s %s", name, where)
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises whatever its download library raises
        raise EtfzooError(
            f"data set {name} is not prepared {where} and could not be downloaded: "
            f"{first_line(error)}; connect to the internet or pass `data_dir`"
        ) from error
    return builder


def _place(name, data_dir) -> Path:
    """Where the versions of a data set are, or a prepared folder itself.

    Below the data directory; a path from the current folder where there is nothing.
    """
    bare = name.partition(":")[0]
    below, here = files.expand(os.path.join(data_dir or ".", bare)), files.expand(bare)
    return here if "/" in bare and not below.exists() and _prepared_folder(here) else below


def _check_documents(folder, name):
    """Raises EtfzooError where TFDS would read a file elsewhere, or wait for a FIFO for ever."""
    for path in (*folder.glob("*.json"), *folder.glob("*.txt")) if folder else ():
        if not path.is_dir():
            file_size(path, folder, name)


@contextlib.contextmanager
def _own_features_alone(tfds):
    """Lets TFDS make its own features and no others.

    It imports the module of any class that features.json names, and so runs its code.
    """
    own = {
        f"{c.__module__}.{c.__qualname__}": c
        for c in (getattr(tfds.features, name) for name in tfds.features.__all__)
        if isinstance(c, type)
    }
    connector = tfds.features.FeatureConnector
    imported = connector.__dict__["cls_from_name"]

    def known(cls, name):
        if name not in own:
            raise EtfzooError(f"features.json names {name[:100]!r}, which is no feature of TFDS")
        return own[name]

    connector.cls_from_name = classmethod(known)
    try:
        yield
    finally:
        connector.cls_from_name = imported


def _prepared_folder(path: Path) -> Path | None:
    """The folder with `dataset_info.json`: the path itself or its last version."""
    if (path / "dataset_info.json").is_file():
        return path
    versions = [p.parent for p in path.glob("*.*.*/dataset_info.json")]
    return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], default=None)


def _folder_names(data_dir):
    if data_dir is None:
        return set()
    return {p.name for p in Path(data_dir).iterdir() if _prepared_folder(p)}


def _feature_keys(tfds, name, builder):
    features = builder.info.features
    images = [
        k
        for k, f in features.items()
        if isinstance(f, tfds.features.Image) and np.dtype(f.np_dtype).name in ("uint8", "uint16")
    ]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    for keys, kind, usual in ((images, "image", "image"), (labels, "class label", "label")):
        if not keys:
            raise EtfzooError(
                f"data set {name} has no {kind} feature: it is not for image classification"
            )
        keys.sort(key=lambda k, usual=usual: k != usual)
    return images[0], labels[0]


def _derived_row(name, builder) -> Dataset:
    """Roles for a data set without a row, from the splits that it has."""
    splits = set(builder.info.splits)
    if "train" not in splits:
        raise EtfzooError(f"data set {name} has no train split; it has: {', '.join(splits)}")
    roles: dict = {}
    if {"validation", "test"} <= splits:
        roles = {"fit": "train", "select": "validation", "test": "test"}
    elif "validation" in splits:
        roles = {"test": "validation"}
    elif "test" not in splits:
        roles = {"train": "train[:80%]", "fit": "train[:70%]", "select": "train[70%:80%]"}
        roles["test"] = "train[80%:]"
    if any("[" in s for s in roles.values()) or "fit" not in roles:
        if builder.info.disable_shuffling:
            raise EtfzooError(
                f"data set {name} was written without shuffling, so a slice of its train split is "
                "no fair held-out set; prepare it with shuffling or with a validation split"
            )
    return Dataset(builder.info.full_name, 0, **roles)

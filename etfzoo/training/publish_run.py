"""From a finished training to a published version with its card and its line in the index."""

import contextlib
import dataclasses
import os
import re
import shlex
from pathlib import Path

from etfzoo import files
from etfzoo.data import sources
from etfzoo.data.datasets import DATASETS
from etfzoo.data.source import ROLES
from etfzoo.data.tfds_source import WORDS
from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint, weights
from etfzoo.models.classifier import ImageClassifier
from etfzoo.progress import notify
from etfzoo.runtime import hardware
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo import index, publication
from etfzoo.zoo.handles import info
from etfzoo.zoo.load import load
from etfzoo.zoo.publish import check_backend

_WORDNET_ID = re.compile(r"n[0-9]{8}")


def publish_run(
    source,
    name: str,
    models_dir="saved_models",
    version: int | None = None,
    *,
    licence: str | None = None,
    intended_use: str | None = None,
    limits: str | None = None,
    storage: str = "float32",
    index_path=None,
    url: str | None = None,
    default: bool = False,
    data_dir=None,
) -> Path:
    """Publishes a trained model as `<models_dir>/<name>/<version>/`, with card and index entry.

    The version is read back and compared with the model before it gets its place (see
    `etfzoo.publish`); then `<models_dir>/<name>/README.md` becomes its card, and the index gets
    its entry. Where one of these fails nothing is left. Killed at any point, the same call again
    finishes it (see `etfzoo.zoo.publication`).

    Args:
        source: the workdir of a finished training, or a handle of `etfzoo.load`.
        name: full name, `<backbone>_<method>.<tag>`.
        models_dir: folder of the models.
        version: None is one above the highest that exists, in the folder and in the index.
        licence: licence of the weights; None is the published one of a handle, and for a workdir
            the terms of the images that the weights were made from.
        intended_use, limits: what the card says that the model is good for and not good for; None
            leaves both to the facts.
        storage: `"float32"` or `"float16"`, see `etfzoo.publish`.
        index_path: an index file that gets an entry; None leaves all alone.
        url: address under which the content of `models_dir` can be had; with an index only. None
            is for models that a checkout brings with it.
        default: whether the name without its tag means this model from now on, see
            `etfzoo.zoo.index.add`.
        data_dir: where the data set of a workdir is, if it is not where the training found it: of
            classes with WordNet ids its words.txt tells the meanings.

    Returns:
        Path of the version folder.

    Raises:
        EtfzooError: another backend than TensorFlow, an unfinished training, a name that does not
            fit the model, a version that exists, images whose terms are not known and no
            `licence`, an address that could not be loaded, a model that is not what it should be
            (see `etfzoo.publish`), or something that cannot be written.
    """
    check_backend()
    backbone, method, tag = index.check_name(name)
    if index_path is None and (url is not None or default):
        raise EtfzooError("an address and a default belong into an index: say which with `index`")
    if index_path is not None and os.path.lexists(index_path):
        index.load(index_path)
    model, provenance, metrics, known_licence = _read_source(source, data_dir)
    _check_name_fits(name, model.spec, backbone, method)
    licence = licence or known_licence or _licence(provenance)
    stated = {"intended_use": intended_use, "limits": limits}
    provenance |= {field: text for field, text in stated.items() if text}
    details = {"provenance": provenance, "metrics": metrics, "licence": licence, "storage": storage}
    entry = {"index_path": index_path, "url": url, "default": default}
    request = {"source": os.path.abspath(source), "version": version} | details | entry
    return publication.make(model, name, models_dir, version, request=request, **details, **entry)


def _read_source(source, data_dir):
    """The model, its provenance, its metrics and its licence, if it is published with one."""
    workdir = Workdir(source)
    if not workdir.is_run:
        model = load(source)
        known = info(source)
        return model, known["provenance"], known["metrics"], known["licence"]
    result = workdir.read_result()
    if result is None:
        raise EtfzooError(
            f"{workdir} is not finished: it has no {workdir.result.name}; train it to its end"
        )
    config = TrainConfig.load(workdir.config)
    model = _described(checkpoint.load_model(workdir), config, data_dir)
    settings = config.results_in()
    for name in ("dataset", "init"):
        settings[name] = settings[name] and files.strip_local_folder(settings[name])
    made = hardware.read(workdir)
    if made.get("command"):
        made["command"] = _strip_local_folders(made["command"])
    row = DATASETS.get(config.dataset)
    frozen = "none: the head was fitted to frozen features" if "C" in result else config.epochs
    provenance = {
        "dataset": settings["dataset"],
        "title": row.title if row else "",
        "licences": _licences(config),
        "init": settings["init"],
        "epochs": result.get("epoch", frozen),
        "seed": config.seed,
        **made,
        "config": settings,
    }
    split = config.eval_split
    if row and split in ROLES:
        split = getattr(row, split)
    return model, provenance, result | {"split": split}, None


def _described(model, config, data_dir):
    """The model with the meanings of its classes, where these are named by WordNet ids."""
    names = model.spec.class_names
    if not names or not all(_WORDNET_ID.fullmatch(name) for name in names):
        return model
    descriptions = None
    with contextlib.suppress(EtfzooError):
        source = sources.resolve(config.dataset, data_dir or config.data_dir, prepare=False)
        if source.class_names == names:
            descriptions = source.class_descriptions
    if descriptions is None:
        notify("the classes keep their WordNet ids: no %s of %s was found", WORDS,
            config.dataset)  # fmt: skip
        return model
    described = ImageClassifier(dataclasses.replace(model.spec, class_descriptions=descriptions))
    weights.assign(described.variables, weights.as_arrays(model.variables))
    return described


def _licences(config) -> dict:
    """Terms by data set of all images that a run's weights were made from; empty: not known."""
    terms = {}
    if config.init:
        if Workdir(config.init).is_run:
            terms = _licences(TrainConfig.load(Workdir(config.init).config))
        else:
            with contextlib.suppress(EtfzooError):  # it may have been removed since
                terms = info(config.init)["provenance"].get("licences") or {}
        if not terms:
            return {}
    row = DATASETS.get(config.dataset)
    return terms | {config.dataset: row.licence} if row and row.licence else {}


def _licence(provenance) -> str | None:
    """That of weights whose publisher states none: the terms of the images they were made from."""
    if "config" not in provenance:  # a model whose training nothing is known of
        return None
    if not provenance.get("licences"):
        start = f" or of {provenance['init']}, its start," if provenance["init"] else ""
        raise EtfzooError(
            f"the terms of {provenance['dataset']}{start} are not known: say under which licence "
            "the weights are published, e.g. `licence=CC-BY-4.0`"
        )
    terms = dict.fromkeys(provenance["licences"].values())
    return f"as the training images ({'; '.join(terms)})"


def _strip_local_folders(command):
    """A command whose arguments name no folder of the machine that it ran on."""
    parts = (word.rpartition("=") for word in shlex.split(command))
    return shlex.join(
        flag + equals + files.strip_local_folder(value) for flag, equals, value in parts
    )


def _check_name_fits(name, spec, backbone, method):
    fits = {"etf": spec.norm == "bn", "sw": spec.norm == "sw", "linear": spec.norm == "bn"}
    fixed = spec.head == "etf"
    if backbone != spec.short_name or not fits[method] or (fixed and method != "etf"):
        raise EtfzooError(
            f"{name} is no name for this model: it is a {spec.backbone} with {spec.norm} and the "
            f"{spec.head} head (etf and sw may have got a linear head by fine-tuning)"
        )

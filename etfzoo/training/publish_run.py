"""From a finished training to a published version with its card and its line in the index."""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import uuid
from pathlib import Path

import numpy as np

from etfzoo import files
from etfzoo.data import sources
from etfzoo.data.datasets import DATASETS
from etfzoo.data.source import ROLES
from etfzoo.data.tfds import WORDS
from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint, weights
from etfzoo.models.classifier import ImageClassifier
from etfzoo.progress import notify
from etfzoo.runtime import hardware
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo import card, index, manifest, saved_model
from etfzoo.zoo.handles import info
from etfzoo.zoo.load import load
from etfzoo.zoo.metadata import read_metadata, version_folders
from etfzoo.zoo.publish import check_backend, publish

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
    """Publishes a trained model as `<models_dir>/<name>/<version>/` and checks what was written.

    The version is loaded back and must give the same logits bit for bit before it gets its place;
    then `<models_dir>/<name>/README.md` becomes its card, and the index gets its entry. Where one
    of these fails nothing is left.

    Args:
        source: the workdir of a finished training, or a handle of `etfzoo.load`.
        name: full name, `<backbone>_<method>.<tag>`.
        models_dir: folder of the models.
        version: None is one above the highest that exists.
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
            `licence`, or something that cannot be written.
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
    folder = files.make_directory(models_dir) / name
    known = version_folders(folder)
    version = max(known, default=0) + 1 if version is None else version
    if version in known:
        raise EtfzooError(f"{folder / str(version)} already exists; choose another `version`")

    staging = folder.parent / f".publish-{uuid.uuid4().hex[:8]}"
    target, carded = None, False
    readme = folder / card.NAME
    old_card = readme.read_text("utf-8") if readme.exists() else None
    try:
        written = publish(
            model,
            staging / name,
            version,
            provenance=provenance,
            metrics=metrics,
            licence=licence,
            storage=storage,
        )
        check(model, written, storage)
        files.make_directory(folder)
        try:
            os.rename(written, folder / str(version))
        except OSError as e:
            raise EtfzooError(f"cannot write {folder / str(version)}: {e.strerror or e}") from e
        target = folder / str(version)
        files.write_text(readme, card.read(target))
        carded = True
        if index_path is not None:
            entry = _entry(target, [address(url, name, version)] if url else [])
            index.add(index_path, name, version, _row(target, licence), entry, default)
    except BaseException:
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
        if carded and old_card is not None:
            files.write_text(readme, old_card)
        elif carded:
            readme.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def address(url: str, name: str, version) -> str:
    """Where a version is found below the address of a models folder."""
    return f"{url.rstrip('/')}/{name}/{version}"


def check(model: ImageClassifier, folder, storage: str = "float32") -> None:
    """Compares a published version with the model in memory, bit for bit.

    With float16 storage it is compared with the model whose weights are rounded to float16.

    Raises:
        EtfzooError: a weight or a logit differs.
    """
    loaded = load(Path(folder))
    expected = weights.as_arrays(model.variables)
    for path, array in expected.items():
        stored = array.astype(saved_model.stored_dtype(path, str(array.dtype), storage))
        expected[path] = stored.astype(array.dtype)
    found = weights.as_arrays(loaded.variables)
    different = [path for path, a in expected.items() if not np.array_equal(a, found.get(path))]
    if different or found.keys() != expected.keys():
        raise EtfzooError(
            f"{folder} was not written as it should be: {len(different)} weights differ, "
            f"{', '.join(different[:3])}; please report this"
        )
    twin = model
    if storage != "float32":
        twin = ImageClassifier(model.spec)
        weights.assign(twin.variables, expected)
    shape = [n or 224 for n in model.spec.input_shape]
    images = np.random.default_rng(0).uniform(0, 255, (4, *shape)).astype("float32")
    if not np.array_equal(np.asarray(twin(images)), np.asarray(loaded(images))):
        raise EtfzooError(f"{folder} gives other logits than the model; please report this")


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
    if backbone != spec.backbone or not fits[method] or (fixed and method != "etf"):
        raise EtfzooError(
            f"{name} is no name for this model: it is a {spec.backbone} with {spec.norm} and the "
            f"{spec.head} head (etf and sw may have got a linear head by fine-tuning)"
        )


def _row(folder, licence) -> dict:
    metadata = read_metadata(folder)
    spec, provenance = metadata["spec"], metadata.get("provenance") or {}
    if spec.head is None or None in spec.input_shape:
        raise EtfzooError("a model without head or with an open image size has no index entry")
    return {
        "dataset": provenance.get("dataset") or card.UNKNOWN,
        "num_classes": spec.num_classes,
        "input_shape": list(spec.input_shape),
        "head": spec.head,
        "command": provenance.get("command") or card.UNKNOWN,
        "metrics": metadata.get("metrics") or {},
        "licence": licence,
    }


def _entry(folder, urls) -> dict:
    metadata = read_metadata(folder)
    listing = manifest.read(folder) | {manifest.NAME: manifest.entry_of(folder / manifest.NAME)}
    return {
        "urls": urls,
        "files": manifest.as_json(listing),
        "metrics": metadata.get("metrics") or {},
        "created": metadata.get("created"),
    }

"""From a finished training to a published version with its card and its line in the index."""

import contextlib
import os
import shlex
import shutil
import uuid
from pathlib import Path

import numpy as np

from etfzoo import files
from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint, weights
from etfzoo.models.classifier import ImageClassifier
from etfzoo.runtime import hardware
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo import card, index, manifest, saved_model
from etfzoo.zoo.load import info, load
from etfzoo.zoo.publish import check_backend, publish, read_metadata, version_folders


def release(
    source,
    name: str,
    models_dir="saved_models",
    version: int | None = None,
    *,
    licence: str | None = None,
    storage: str = "float32",
    index_path=None,
    url: str | None = None,
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
        licence: licence of the weights.
        storage: `"float32"` or `"float16"`, see `etfzoo.publish`.
        index_path: an index file that gets an entry; None leaves all alone.
        url: address under which the content of `models_dir` can be had; with an index only.

    Returns:
        Path of the version folder.

    Raises:
        EtfzooError: another backend than TensorFlow, an unfinished training, a name that does not
            fit the model, a version that exists, or something that cannot be written.
    """
    check_backend()
    backbone, method, tag = index.check_name(name)
    if (index_path is None) != (url is None):
        raise EtfzooError(
            "an index entry needs both: the index file, and the address where the models folder "
            "will be found (--index=PATH --url=BASE_URL)"
        )
    if index_path is not None and os.path.lexists(index_path):
        index.load(index_path)
    model, provenance, metrics = _read_source(source)
    _check_name_fits(name, model.spec, backbone, method)
    folder = files.make_directory(models_dir) / name
    known = version_folders(folder)
    version = max(known, default=0) + 1 if version is None else version
    if version in known:
        raise EtfzooError(f"{folder / str(version)} already exists; choose another --version")

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
            entry = _entry(target, address(url, name, version))
            index.add(index_path, name, version, _row(target, licence), entry)
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


def _read_source(source):
    """The model, its provenance and its metrics."""
    workdir = Workdir(source)
    if not workdir.is_run:
        model = load(source)
        known = info(source)
        return model, known["provenance"], known["metrics"]
    result = workdir.read_result()
    if result is None:
        raise EtfzooError(
            f"{workdir} is not finished: it has no {workdir.result.name}; train it to its end"
        )
    model = checkpoint.load_model(workdir)
    config = TrainConfig.load(workdir.config)
    settings = config.results_in()
    for name in ("dataset", "init"):
        settings[name] = settings[name] and files.without_place(settings[name])
    made = hardware.read(workdir)
    if made.get("command"):
        made["command"] = _without_places(made["command"])
    provenance = {
        "dataset": settings["dataset"],
        "init": settings["init"],
        "seed": config.seed,
        **made,
        "config": settings,
    }
    return model, provenance, result | {"split": config.eval_split}


def _without_places(command):
    """A command whose arguments name no folder of the machine that it ran on."""
    parts = (word.rpartition("=") for word in shlex.split(command))
    return shlex.join(flag + equals + files.without_place(value) for flag, equals, value in parts)


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


def _entry(folder, url) -> dict:
    metadata = read_metadata(folder)
    listing = manifest.read(folder) | {manifest.NAME: manifest.entry_of(folder / manifest.NAME)}
    return {
        "urls": [url],
        "files": manifest.as_json(listing),
        "metrics": metadata.get("metrics") or {},
        "created": metadata.get("created"),
    }

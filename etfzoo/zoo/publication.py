"""A publication as one transaction: a version, the card of its model and its entry in an index.

All is prepared in a folder beside the models, `.publish-<name>`, which one process at a time has:
the version, checked, and then `pending.json` that says what else is to be done. From there on a
publication is finished, by whoever publishes there next, however often it is killed; before, it
never was. One that fails is undone.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from etfzoo import files, locks
from etfzoo.errors import EtfzooError
from etfzoo.progress import notify
from etfzoo.zoo import cache, card, index, manifest
from etfzoo.zoo.publish import publish, read_metadata, tidy, version_folders

_PREFIX, _PENDING = ".publish-", "pending.json"


def make(
    model,
    name: str,
    models_dir,
    version: int | None = None,
    *,
    index_path=None,
    url: str | None = None,
    default: bool = False,
    request: dict | None = None,
    **details,
) -> Path:
    """Publishes a classifier as `<models_dir>/<name>/<version>/`, with card and index entry.

    Args:
        model: the classifier.
        name: full name, `<backbone>_<method>.<tag>`.
        models_dir: folder of the models; made if needed.
        version: None is one above the highest in the folder and in the index.
        index_path: an index file that gets an entry; None leaves all alone.
        url: address under which the content of `models_dir` can be had; None is for models that a
            checkout brings with it.
        default: see `etfzoo.zoo.index.add`.
        request: what is asked for, as JSON values: where the same was asked for and stopped, that
            publication is finished and no other one is made.
        **details: see `etfzoo.publish`.

    Returns:
        Path of the version folder.

    Raises:
        EtfzooError: a version that exists, an address that could not be loaded, another process
            that publishes under this name, or what `etfzoo.publish` raises.
    """
    models_dir = files.make_directory(models_dir)
    if url is not None:
        check_url(url, name)
    _finish_others(models_dir, name)
    folder, staging = models_dir / name, models_dir / f"{_PREFIX}{name}"
    with _one_line(folder), _alone(staging):
        request = json.loads(json.dumps(request, default=str))
        finished = _finish(staging)
        if finished and request and finished["request"] == request:
            return folder / str(finished["version"])
        tidy(folder)
        version = _free_version(folder, name, version, index_path)
        written = publish(model, staging / name, version, **details)
        pending = {"request": request, "name": name, "version": version, "index": None}
        pending["card"] = _text_of(folder / card.NAME)
        if index_path is not None:
            pending["index"] = {
                "path": os.path.abspath(index_path),
                "row": _row(written),
                "entry": _entry(written, [address(url, name, version)] if url else []),
                "default": default,
            }
        files.write_text(staging / _PENDING, json.dumps(pending) + "\n")
        _commit(staging, pending)
    return folder / str(version)


def address(url: str, name: str, version) -> str:
    """Where a version is found below the address of a models folder."""
    return f"{url.rstrip('/')}/{name}/{version}"


def check_url(url: str, name: str) -> None:
    """Raises EtfzooError for an address of a models folder from which nothing could be loaded."""
    if "#" in url:
        raise EtfzooError(f"{url[:200]!r} is no address of a folder of models: it has a #")
    cache.parse_handle(address(url, name, 1))


def _free_version(folder, name, version, index_path) -> int:
    known = set(version_folders(folder))
    if index_path is not None and os.path.lexists(index_path):
        row = index.load(index_path).models.get(name)
        known |= set(row.versions) if row else set()
    if version is None:
        return max(known, default=0) + 1
    if os.path.lexists(folder / str(version)):
        raise EtfzooError(f"{folder / str(version)} already exists; choose another `version`")
    if version in known:
        raise EtfzooError(
            f"{index_path} has a version {version} of {name} already; choose another `version`"
        )
    return version


@contextlib.contextmanager
def _one_line(folder):
    try:
        yield
    except OSError as e:
        raise EtfzooError(f"cannot publish to {folder}: {e.strerror or e}") from e


@contextlib.contextmanager
def _alone(staging):
    """Keeps other processes out; at the end nothing is left but what has to be finished."""
    with locks.lock(staging, "a publication"):
        try:
            yield
        finally:
            _remove(staging)


def _finish_others(models_dir, name) -> None:
    """Ends what killed processes left under other names; what goes on is left alone."""
    for staging in sorted(models_dir.glob(f"{_PREFIX}*")):
        if staging.name == _PREFIX + name:
            continue
        with (
            contextlib.suppress(EtfzooError, OSError),
            locks.lock(staging, "a publication") as lock,
        ):
            if lock is not None:  # else it may go on: this process's own, or there are no locks
                try:
                    _finish(staging)
                finally:
                    _remove(staging)


def _remove(staging) -> None:
    if not (staging / _PENDING).exists():
        shutil.rmtree(staging, ignore_errors=True)


def _finish(staging) -> dict | None:
    """Ends what a killed process left: what was pending is committed, all else is removed."""
    pending = None
    if (staging / _PENDING).exists():
        pending = files.read_json(staging / _PENDING)
        target = staging.parent / pending["name"] / str(pending["version"])
        if _staged(staging, pending).exists() or target.exists():
            _commit(staging, pending)
            notify("finished a publication that was stopped: %s", target)
        else:  # killed while it was undone
            _restore_card(staging, pending)
            pending = None
    _clear(staging)
    return pending


def _commit(staging, pending) -> None:
    """Gives the version its place, then its card, then its entry; all of it or nothing."""
    folder = staging.parent / pending["name"]
    target, staged = folder / str(pending["version"]), _staged(staging, pending)
    try:
        if staged.exists():
            files.make_directory(folder)
            try:
                os.rename(staged, target)
            except OSError as e:
                raise EtfzooError(f"cannot write {target}: {e.strerror or e}") from e
        files.remove_temporaries(folder, card.NAME)
        files.write_text(folder / card.NAME, card.read(target))
        listed = pending["index"]
        if listed:
            index.add(
                listed["path"],
                pending["name"],
                pending["version"],
                listed["row"],
                listed["entry"],
                listed["default"],
            )
    except BaseException:
        if not (pending["index"] and _is_listed(pending)):  # Ctrl-C may come after the last step
            if not staged.exists():  # then the version in its place is ours
                os.rename(target, staging / "undone")
            _restore_card(staging, pending)
            with contextlib.suppress(OSError):
                folder.rmdir()
        _clear(staging)
        raise
    _clear(staging)


def _staged(staging, pending) -> Path:
    return staging / pending["name"] / str(pending["version"])


def _is_listed(pending) -> bool:
    path = pending["index"]["path"]
    row = index.load(path).models.get(pending["name"]) if os.path.lexists(path) else None
    return row is not None and pending["version"] in row.versions


def _restore_card(staging, pending) -> None:
    readme = staging.parent / pending["name"] / card.NAME
    if _text_of(readme) == pending["card"]:
        return
    if pending["card"] is not None:
        files.write_text(readme, pending["card"])
    else:
        readme.unlink(missing_ok=True)


def _clear(staging) -> None:
    """Removes all but the lock; first what tells how to go on, which is no use without the rest."""
    (staging / _PENDING).unlink(missing_ok=True)
    for path in staging.iterdir():
        if path.name != locks.NAME:
            shutil.rmtree(path, ignore_errors=True)


def _text_of(path) -> str | None:
    return path.read_text("utf-8") if path.exists() else None


def _row(folder) -> dict:
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
        "licence": metadata["licence"],
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

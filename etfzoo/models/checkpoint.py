"""Checkpoints: one file with weights, optimizer slots and the state of the loop.

The file is NumPy's npz (arrays by variable path, each with a CRC) and holds the model's spec too,
so that a workdir can be loaded without knowing how it was made.
"""

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from etfzoo import arrays as stored
from etfzoo import files
from etfzoo.errors import EtfzooError, TrainingDiverged, first_line
from etfzoo.models import weights
from etfzoo.models.spec import ClassifierSpec
from etfzoo.models.weights import StoredModel
from etfzoo.workdir import Workdir

if TYPE_CHECKING:
    from etfzoo.models.classifier import ImageClassifier

log = logging.getLogger("etfzoo")

_MODEL, _TRAINED, _OPTIMIZER, _STATE = "model/", "trained/", "optimizer/", "state"
_FORMAT = 1


class CheckpointManager:
    """The checkpoints of a workdir: the last few, and the best one.

    Args:
        workdir: the run's directory; checkpoints go to its `checkpoints`.
        keep: number of latest checkpoints that are kept.
        trained: the model that is trained, where the one that is saved and loaded is an average of
            it; its weights are saved and restored beside the other's.
    """

    def __init__(self, workdir, keep: int = 2, trained=None):
        self.directory = Workdir(workdir).checkpoints
        self.keep = keep
        self.trained = trained

    def _path(self, step) -> Path:
        return self.directory / f"step-{step:010d}.npz"

    def paths(self) -> list[Path]:
        """Checkpoints by step, latest first; no file that only looks like one."""
        found = {step_of(path): path for path in self.directory.glob("step-*.npz")}
        return [found[step] for step in sorted(found.keys() - {None}, reverse=True)]

    @property
    def best(self) -> Path:
        return self.directory / "best.npz"

    def save(
        self, step: int, model, optimizer, state: dict, best: bool = False, write: bool = True
    ) -> Path:
        """Writes a checkpoint, then removes those that are too old.

        Args:
            step: global step, the name of the file.
            model: the classifier.
            optimizer: its optimizer; None for a model that was not trained by steps.
            state: JSON-able state of the loop.
            best: whether `best.npz` becomes this one.
            write: whether this process writes; of several workers one does, and all find out that
                the weights are not finite.

        Raises:
            TrainingDiverged: a weight is not finite; nothing is written.
            EtfzooError: the file cannot be written; the earlier ones are kept.
        """
        arrays: dict = {_MODEL + k: v for k, v in weights.as_arrays(model.variables).items()}
        if self.trained is not None:
            trained = weights.as_arrays(self.trained.variables)
            arrays |= {_TRAINED + k: v for k, v in trained.items()}
        for path, array in arrays.items():
            if not np.isfinite(array).all():
                raise TrainingDiverged(f"weight {path.split('/', 1)[1]} is not finite")
        path = self._path(step)
        if not write:
            return path
        slots = weights.as_arrays(optimizer.variables) if optimizer else {}
        arrays |= {_OPTIMIZER + k: v for k, v in slots.items()}
        document = {"format": _FORMAT, "spec": dataclasses.asdict(model.spec), **state}
        arrays[_STATE] = np.frombuffer(json.dumps(document).encode(), np.uint8)
        files.make_directory(self.directory)
        with files.atomic(path) as file:
            np.savez(file, **arrays)
        if best:
            self.mark_best(step)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def mark_best(self, step: int) -> None:
        """Makes the checkpoint of a step `best.npz`."""
        path = self._path(step)
        temporary = self.best.with_name(f".best.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            with files.atomic(self.best) as file:
                file.write(path.read_bytes())
            return
        os.replace(temporary, self.best)

    def restore(
        self, model, optimizer, tidy: bool = True, check=lambda path, state: None
    ) -> dict | None:
        """Restores the latest readable checkpoint.

        A damaged file is skipped with a warning and the one before it is taken.

        Args:
            model, optimizer: what takes the weights and slots.
            tidy: whether what an interrupted save left behind is removed.
            check: called with path and state; an EtfzooError that it raises counts as damage.

        Returns:
            the state of the loop, or None where there is no checkpoint.

        Raises:
            EtfzooError: there are checkpoints and none can be read, or one does not fit.
        """
        if not self.directory.is_dir():
            return None
        if tidy:
            files.remove_temporaries(self.directory)
        found = latest(self.paths(), check=check)
        if found is None:
            return None
        _, arrays, state = found
        weights.assign(model.variables, _part(arrays, _MODEL), "the checkpoint's weights")
        if self.trained is not None:
            trained = _part(arrays, _TRAINED)
            weights.assign(self.trained.variables, trained, "the checkpoint's weights in training")
        weights.assign(optimizer.variables, _part(arrays, _OPTIMIZER), "the optimizer's slots")
        return state


def step_of(path) -> int | None:
    """The step that the name of a checkpoint tells; None where it is no such name."""
    match = re.fullmatch(r"step-(\d{10,18})\.npz", Path(path).name)
    return int(match[1]) if match else None


def latest(
    paths, only_state: bool = False, check=lambda path, state: None
) -> tuple[Path, dict, dict] | None:
    """The first readable checkpoint of some paths: its path, arrays and state; see `read`.

    Args:
        paths, only_state: see `read`.
        check: see `CheckpointManager.restore`.

    Raises:
        EtfzooError: there are paths, and none can be read.
    """
    damaged = []
    for path in paths:
        try:
            arrays, state = read(path, only_state)
            check(path, state)
        except EtfzooError as error:
            log.warning("%s; trying the checkpoint before it", error)
            damaged.append(path)
            continue
        return path, arrays, state
    if damaged:
        raise EtfzooError(
            f"no readable checkpoint in {damaged[0].parent}: all {len(damaged)} are damaged; "
            "delete them to start again"
        )
    return None


def read(path, only_state: bool = False) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a checkpoint file; nothing in it is unpickled.

    Args:
        path: of the file.
        only_state: whether the arrays are left unread.

    Returns:
        arrays by prefixed path, and the state.

    Raises:
        EtfzooError: missing, truncated, damaged or of a later format.
    """
    arrays = stored.read_npz(path, [_STATE] if only_state else None)
    try:
        state = json.loads(arrays.pop(_STATE).tobytes())
        if not isinstance(state, dict) or not isinstance(state.get("spec"), dict):
            raise ValueError("it has no spec")
    except (KeyError, RecursionError, ValueError) as error:
        raise EtfzooError(f"checkpoint {path} is damaged: {first_line(error)}") from error
    if state.get("format") != _FORMAT:
        raise EtfzooError(
            f"checkpoint {path} has format {state.get('format')}, this etfzoo reads {_FORMAT}"
        )
    return arrays, state


def load_model(workdir, best: bool | None = None) -> "ImageClassifier":
    """The classifier of a workdir, with the weights of its last or best checkpoint.

    Args:
        workdir: of the run.
        best: which one; None is that of the run's result, which is the best one of a finished run
            with `early_stopping`, and otherwise the last.

    Raises:
        EtfzooError: no checkpoint there, or none that can be read.
    """
    from etfzoo.models.classifier import ImageClassifier

    stored = read_model(workdir, best)
    model = ImageClassifier(stored.spec)
    weights.assign(model.variables, stored.arrays, stored.what)
    return model


def read_model(workdir, best: bool | None = None) -> StoredModel:
    """What `load_model` builds a network of.

    Args:
        workdir, best: see `load_model`.

    Raises:
        EtfzooError: no checkpoint there, or none that can be read.
    """
    manager = CheckpointManager(workdir)
    if best is None:
        best = "stopped_after" in (Workdir(workdir).usable_result() or {})
    found = latest([manager.best] if best else manager.paths())
    if found is None:
        raise EtfzooError(f"no checkpoint in {workdir}; train into it first")
    _, arrays, _ = found
    return StoredModel(_spec(found), _part(arrays, _MODEL), "the checkpoint's weights")


def read_spec(workdir) -> ClassifierSpec:
    """What the classifier of a workdir is, without reading its weights.

    Raises:
        EtfzooError: no checkpoint there, or none that can be read.
    """
    found = latest(CheckpointManager(workdir).paths(), only_state=True)
    if found is None:
        raise EtfzooError(f"no checkpoint in {workdir}; train into it first")
    return _spec(found)


def _spec(found) -> ClassifierSpec:
    path, _, state = found
    try:
        return ClassifierSpec.from_dict(state["spec"])
    except (TypeError, ValueError) as error:
        raise EtfzooError(f"checkpoint {path} has no usable spec: {first_line(error)}") from error


def _part(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

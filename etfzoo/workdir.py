"""The folder of a run: the only owner of the names of its files."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from pathlib import Path

from etfzoo import files, locks
from etfzoo.errors import EtfzooError

log = logging.getLogger("etfzoo")

_LONGEST_NAME = 120  # bytes of a data set's name in a path, whose parts have at most 255


@dataclasses.dataclass(frozen=True)
class Workdir(os.PathLike):
    """A run's folder, there or not; goes wherever a path does.

    Attributes:
        path: the folder, also given as text.
    """

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    @property
    def config(self) -> Path:
        """All settings, from which the run can be repeated."""
        return self.path / "config.json"

    @property
    def result(self) -> Path:
        """The last figures; it is there where the run is finished."""
        return self.path / "result.json"

    @property
    def machine(self) -> Path:
        """Hardware, seconds and command."""
        return self.path / "machine.json"

    @property
    def selection(self) -> Path:
        """Scores of the candidates of a search."""
        return self.path / "selection.json"

    @property
    def data(self) -> Path:
        """What the data looked like when the run began."""
        return self.path / "data.json"

    @property
    def corrupt(self) -> Path:
        """The list of images that cannot be read."""
        return self.path / "corrupt.json"

    @property
    def metrics_csv(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _select(self) -> Path:
        return self.path / "select"

    def candidate(self, name: str) -> "Workdir":
        """The run of a candidate of this run's search."""
        return Workdir(self._select / name)

    def candidates(self) -> list["Workdir"]:
        """The candidates' runs that are there."""
        return [Workdir(path) for path in sorted(self._select.glob("*")) if path.is_dir()]

    @property
    def begun(self) -> bool:
        """Whether the run, or its search, has left anything."""
        return self.config.exists() or self._select.exists()

    @property
    def finished(self) -> bool:
        return self.result.exists()

    @property
    def is_run(self) -> bool:
        """Whether this is a run's folder, with weights in it."""
        return self.checkpoints.is_dir()

    def lock(self):
        """Keeps other processes out while a run is at work here, see `etfzoo.locks.lock`."""
        return locks.lock(self.path, "a run")

    def claim(self) -> None:
        """Creates the folder, or tidies up after a run that was killed."""
        files.make_directory(self.path)
        files.remove_temporaries(self.path)

    def read_result(self) -> dict | None:
        """The figures of a finished run, None where it is not finished.

        Raises:
            EtfzooError: the file cannot be read, or holds no result.
        """
        if not self.finished:
            return None
        result = files.read_json(self.result)
        if not _is_result(result):
            raise _damaged(self.result, "it holds no result of a run")
        return result

    def usable_result(self) -> dict | None:
        """As `read_result`, but None where the file is damaged: the run makes it again."""
        try:
            return self.read_result()
        except EtfzooError as error:
            log.warning("%s", error)
            return None

    def write_result(self, result: dict) -> None:
        """Marks the run as finished."""
        files.write_text(self.result, json.dumps(result, indent=2) + "\n")

    def read_selection(self) -> list[dict]:
        """The candidates of a search with their scores; [] of none.

        Raises:
            EtfzooError: the file cannot be read, or is no such list.
        """
        rows = files.read_json(self.selection) if self.selection.exists() else []
        names = {"learning_rate", "weight_decay"}
        if not isinstance(rows, list) or not all(_are_numbers(row, names) for row in rows):
            raise _damaged(self.selection, "it is no list of candidates")
        return rows

    def history(self) -> list[dict]:
        """The epochs so far; [] before the first.

        Raises:
            EtfzooError: a file that cannot be read, or a line that is no epoch.
        """
        if not self.metrics_jsonl.exists():
            return []
        try:
            lines = files.read_bytes(self.metrics_jsonl).decode().splitlines()
            rows = [json.loads(line) for line in lines]
        except (RecursionError, ValueError) as error:  # an EtfzooError is a ValueError, too
            raise EtfzooError(f"cannot read {self.metrics_jsonl}: {error}") from error
        if not all(_are_numbers(row, {"epoch", "train_loss"}) for row in rows):
            raise EtfzooError(
                f"{self.metrics_jsonl} is damaged: it has a line that is no epoch; delete it, and "
                "this run has no curves"
            )
        return rows

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def is_number(value, low=-math.inf, high=math.inf) -> bool:
    """Whether a value that was read is a number in a range; NaN is in none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _are_numbers(row, names) -> bool:
    """Whether it is a dict that has those names and, but for switches, numbers of any size."""
    return (
        isinstance(row, dict)
        and names <= row.keys()
        and all(isinstance(value, int | float) for value in row.values())
    )


def _is_result(result) -> bool:
    return (
        _are_numbers(result, {"top1", "examples"})
        and all(is_number(result.get(name, 0), 0, 1) for name in ("top1", "mean_per_class"))
        and is_number(result["examples"], 1)
    )


def _damaged(path, how) -> EtfzooError:
    return EtfzooError(
        f"{path} is damaged: {how}; start the run's own command again, which makes it again"
    )


def folder_name(dataset: str) -> str:
    """The name of a data set as part of a path; of a long one the end, and a hash of all of it."""
    name = dataset.replace(":", "_").replace("/", "_")
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME:
        return name
    end = encoded[-_LONGEST_NAME + 9 :].decode(errors="ignore")
    return f"{hashlib.sha256(encoded).hexdigest()[:8]}_{end}"

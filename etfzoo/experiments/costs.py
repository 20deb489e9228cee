"""What the cells of a sweep cost, and how much of it is done."""

import functools
import re
from pathlib import Path

import numpy as np

from etfzoo.data.datasets import DATASETS
from etfzoo.data.long_tail import long_tailed, tail_counts
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.experiments.sweep import Cell
from etfzoo.runtime import hardware
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import EVALUATE
from etfzoo.workdir import Workdir


@functools.cache
def examples(dataset: str, role: str, data_dir: str | None = None, imbalance: float = 1.0) -> int:
    """Number of examples of a role: those that are there, else those that the row states.

    Args:
        dataset: name of a data set.
        role: `train`, `fit`, `select` or `test`.
        data_dir: TFDS data directory.
        imbalance: of the long tail that is trained on; where the data are not there, as if their
            classes were of one size.
    """
    row = DATASETS.get(dataset)
    try:
        source = resolve(dataset, data_dir, prepare=False)
    except EtfzooError:
        if row is None:
            raise
    else:
        return long_tailed(source, imbalance, "train").size(role)
    total = 0
    for part in getattr(row, role).split("+"):
        name, start, stop = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", part).groups()
        count = row.counts[name]
        total += round(count * int(stop or 100) / 100) - round(count * int(start or 0) / 100)
    if imbalance != 1 and role in ("train", "fit"):
        of_a_class = np.full(row.num_classes, total // row.num_classes)
        return int(tail_counts(of_a_class, imbalance).sum())
    return total


def _examples(config, role):
    return examples(config.dataset, role, config.data_dir, config.imbalance)


def steps(config: TrainConfig) -> int:
    """Number of training steps of a run."""
    return config.epochs * (_examples(config, config.train_split) // config.batch_size)


def _run_images(config: TrainConfig) -> float:
    """Images that a training takes; one that is only evaluated counts as a third."""
    train, test = (_examples(config, split) for split in (config.train_split, config.eval_split))
    seen = -(-config.epochs // config.eval_every) * test
    if config.neural_collapse_every:
        seen += -(-config.epochs // config.neural_collapse_every) * (train + test)
    return steps(config) * config.batch_size + seen / 3


def _work(cell: Cell) -> list[tuple[Path, float, float]]:
    """Workdir, images and the share of them that is done, of each run of a cell."""
    runs = cell.runs()
    if runs:
        return [(path, _run_images(config), _done(path, config)) for path, config in runs]
    config, foreign = cell.config, cell.job.ood_datasets
    if cell.mode == EVALUATE:
        roles = ("test", "test", "train") if foreign else ("test",)
    else:
        roles = ("fit", "select", "train", "test")
    images = sum(_examples(config, role) for role in roles)
    images += sum(examples(name, "test", config.data_dir) for name in foreign)
    return [(cell.workdir, images / 3, float(cell.finished))]


def _done(workdir, config) -> float:
    """Share of a training that is done: whole epochs."""
    workdir = Workdir(workdir)
    try:
        return 1.0 if workdir.finished else len(workdir.history()) / config.epochs
    except EtfzooError:  # of a log: the run writes it again
        return 0.0


def remaining_images(cell: Cell) -> float:
    """Images that are left of a cell, without a widening of its search."""
    if cell.finished:
        return 0.0
    return sum(images * (1 - done) for _, images, done in _work(cell))


def kind(cell: Cell) -> tuple:
    """What cells must have in common to take as long for an image."""
    mode = cell.mode if not cell.runs() else "train"
    return mode, cell.config.backbone, cell.config.norm, cell.config.image_size


def measured_rates(all_cells) -> dict[tuple, float]:
    """Images a second by `kind`, of whole and partial runs in the sweep's directory."""
    totals = {}
    for cell in all_cells:
        for path, images, done in _work(cell):
            seconds = hardware.read(path).get("seconds", 0)
            if done and seconds:
                before = totals.get(kind(cell), (0, 0))
                totals[kind(cell)] = before[0] + done * images, before[1] + seconds
    return {key: images / seconds for key, (images, seconds) in totals.items()}

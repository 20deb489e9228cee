"""Search for a learning rate and a weight decay on a data set's selection split."""

import dataclasses
import json
import logging
import math

import numpy as np

from etfzoo import files
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, TrainingDiverged
from etfzoo.runtime.interruption import exit_if_worker_lost
from etfzoo.runtime.strategy import chief_first, get_strategy, is_chief
from etfzoo.training import loop
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir

log = logging.getLogger("etfzoo")

EXTENSIONS = 3  # values that a grid is widened by, at most


def beyond(grid, scores) -> float | None:
    """The value to try next when the best one lies at the edge of a grid.

    Args:
        grid: distinct positive values, in any order.
        scores: of the values; -inf is a value that failed.

    Returns:
        the next value on that side, in the ratio of the two last ones (below, where all failed);
        None where a value inside is as good as any, and for fewer than two values.

    Raises:
        EtfzooError: a value is not positive.
    """
    if len(grid) < 2:
        return None
    if min(grid) <= 0:
        raise EtfzooError(f"only a grid of positive values can be widened; got {min(grid):g}")
    order = np.argsort(grid)
    values, scores = np.asarray(grid, float)[order], np.asarray(scores, float)[order]
    best = np.flatnonzero(scores == scores.max())
    if math.isfinite(scores.max()) and np.any((best > 0) & (best < len(values) - 1)):
        return None
    edge, inner = values[:2] if best[0] == 0 else values[:-3:-1]
    return float(f"{edge * edge / inner:.6g}")


def pick(
    config: TrainConfig,
    workdir,
    learning_rates=(),
    weight_decays=(),
    widen=False,
    epochs=None,
    pretrained=None,
) -> TrainConfig:
    """Trains candidates on the `fit` split and compares them on `select` by the data's metric.

    Every candidate is a workdir of its own below `<workdir>/select`, so a stopped search goes on
    where it was; once it is finished its checkpoints are removed. `<workdir>/selection.json` tells
    the scores.

    Args:
        config: the run; its own rate and decay count where no candidates are given.
        workdir: directory of the run.
        learning_rates, weight_decays: candidates; one or none is taken as it is.
        widen: whether learning rates are added, `EXTENSIONS` at most, while the best lies at the
            edge of their grid; their rows in `selection.json` have `widened` true.
        epochs: of each candidate, its warm-up and steps in proportion; None is the run's.
        pretrained: see `etfzoo.training.loop.train_and_evaluate`.

    Returns:
        the configuration with the picked values.
    """
    rates = list(dict.fromkeys(learning_rates or (config.learning_rate,)))
    decays = list(dict.fromkeys(weight_decays or (config.weight_decay,)))
    candidates = _candidates(config, rates, decays)
    if len(candidates) == 1:
        return candidates[0]
    strategy = get_strategy(config.strategy, config.tpu, config.num_virtual_devices)
    with exit_if_worker_lost(strategy):
        source = chief_first(strategy, lambda: resolve(config.dataset, config.data_dir))
    metric, given = source.row.metric, len(rates)
    chief = is_chief(strategy)

    def score(candidates):
        runs = (trial(c, epochs) for c in candidates)
        return [_score(run, workdir, metric, chief, pretrained) for run in runs]

    scores = score(candidates)
    while widen and len(rates) < given + EXTENSIONS:
        # The candidates of one rate stand together, whatever their decays.
        further = beyond(rates, np.reshape(scores, (len(rates), -1)).max(1))
        if further is None:
            break
        best = _best(candidates, scores)
        print(
            f"the best learning rate, {best.learning_rate:g}, lies at the edge of the grid: "
            f"trying {further:g} too",
            flush=True,
        )
        rates.append(further)
        added = _candidates(config, [further], decays)
        candidates += added
        scores += score(added)
    best = _best(candidates, scores)
    if len(rates) > 1 and best.learning_rate in (min(rates), max(rates)):
        log.warning(
            "the best learning rate, %g, lies at the edge of the grid%s",
            best.learning_rate,
            " as far as it was widened" if widen else ": widen it",
        )
    print(f"picked learning rate {best.learning_rate:g}, weight decay {best.weight_decay:g}")
    rows = [
        {"learning_rate": c.learning_rate, "weight_decay": c.weight_decay, metric: score}
        | ({"widened": c.learning_rate not in rates[:given]} if widen else {})
        for c, score in zip(candidates, scores, strict=True)
    ]
    if chief:
        files.write_text(Workdir(workdir).selection, json.dumps(rows, indent=2) + "\n")
    return best


def _candidates(config, rates, decays):
    return [
        dataclasses.replace(config, learning_rate=rate, weight_decay=decay)
        for rate in rates
        for decay in decays
    ]


def _best(candidates, scores):
    """The first of the best candidates, if possible one whose rate lies inside the grid."""
    rates = [c.learning_rate for c in candidates]
    best = [c for c, score in zip(candidates, scores, strict=True) if score == max(scores)]
    inside = [c for c in best if min(rates) < c.learning_rate < max(rates)]
    return (inside or best)[0]


def trial(candidate: TrainConfig, epochs=None) -> TrainConfig:
    """A candidate's run on the part of the training data that is for fitting; see `pick`."""
    changes: dict = {"train_split": "fit", "eval_split": "select", "neural_collapse_every": 0}
    if epochs:
        share = epochs / candidate.epochs
        changes |= {"epochs": epochs, "warmup_epochs": candidate.warmup_epochs * share}
        changes |= {"step_epochs": tuple(round(e * share) for e in candidate.step_epochs)}
        stages = [(size, int(e * share)) for size, e in candidate.image_size_schedule]
        changes |= {"image_size_schedule": tuple(stage for stage in stages if stage[1])}
    return dataclasses.replace(candidate, **changes)


def folder(workdir, candidate: TrainConfig) -> Workdir:
    """The workdir of a candidate of the search in a workdir."""
    name = f"lr{candidate.learning_rate:g}_wd{candidate.weight_decay:g}"
    return Workdir(workdir).candidate(name)


def _score(run, workdir, metric, chief, pretrained):
    candidate = folder(workdir, run)
    print(f"candidate {candidate.path.name}", flush=True)
    try:
        score = loop.train_and_evaluate(run, candidate, pretrained)[metric]
    except TrainingDiverged as error:
        log.warning("%s", error)
        return -math.inf
    if chief:  # of a search only the scores are needed, and weights take gigabytes
        candidate.remove_checkpoints()
    return score

"""What a trained model is worth on its own data set, and what that looked like in its training."""

import time
from typing import NamedTuple

import numpy as np

from etfzoo import files
from etfzoo.data.source import Source
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.measure import accuracy, calibration
from etfzoo.progress import notify
from etfzoo.runtime import hardware
from etfzoo.training import build, identity
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo.handles import info
from etfzoo.zoo.load import load


class Seen(NamedTuple):
    """What a model was trained on.

    Attributes:
        source: the data set as its run saw it, see `etfzoo.training.build.run_source`.
        split: of it, that was trained on.
        imbalance: of the long tail that this split is; 1 is none.
    """

    source: Source
    split: str
    imbalance: float

    @property
    def is_tail(self) -> bool:
        return self.imbalance != 1

    def counts(self) -> np.ndarray:
        """Images of each class, `[K]`."""
        return self.source.class_counts(self.split)


def trained_with(handle) -> tuple[TrainConfig | None, Workdir | None]:
    """The settings that a model was trained with, and its workdir.

    The first is None of a published model that does not tell it, the second of any published one.

    Raises:
        EtfzooError: no such model, or settings that this version does not know.
    """
    workdir = Workdir(handle)
    if workdir.is_run:
        return TrainConfig.load(workdir.config), workdir
    values = info(handle)["provenance"].get("config")
    return values and TrainConfig.from_dict(values, handle), None


def seen_in_training(handle, dataset: str, source: Source, required: bool = False) -> Seen | None:
    """What a model was trained on, if that is in a data set.

    The images of a published model's run are counted and chosen again there.

    Args:
        handle: a workdir, a published folder or a name of the zoo.
        dataset: name of the data set.
        source: the data set.
        required: whether it is an error if that is not known.

    Returns:
        None where the model does not tell it, or tells another data set. If it learned a long tail
        of that one a line says so.

    Raises:
        EtfzooError: it is `required` and would be None, or there is no such model.
    """
    try:
        config, workdir = trained_with(handle)
    except EtfzooError:
        if required:
            raise
        return None  # what does not need it can be measured all the same
    if config is None:
        why = f"{handle} does not tell what it was trained on"
    elif files.strip_local_folder(config.dataset) != files.strip_local_folder(dataset):
        why = f"{handle} was trained on {config.dataset}, not on {dataset}"
    else:
        source = build.run_source(config, source, workdir, False)
        return Seen(source, config.train_split, config.imbalance)
    if required:
        raise EtfzooError(why)
    if config is not None and config.imbalance != 1:
        notify("the long tail that was trained on is not looked at: %s", why)
    return None


def figures(predictions, num_classes: int, counts=None) -> dict:
    """Accuracy, calibration, and accuracy by the number of training images.

    Args:
        predictions: see `etfzoo.measure.accuracy.evaluate`.
        num_classes: K.
        counts: training images of each class `[K]`; None leaves the last out.

    Returns:
        see `etfzoo.measure.accuracy.summary`; with `ece`, see `etfzoo.measure.calibration`, and as
        `shots` what `etfzoo.measure.accuracy.by_shots` gives.
    """
    labels, predicted = predictions.labels, predictions.predicted
    found: dict = accuracy.summary(predictions, num_classes)
    found["ece"] = calibration.reliability(predictions.confidence, labels == predicted).error
    if counts is not None:
        found["shots"] = accuracy.by_shots(labels, predicted, counts)
    return found


def evaluate(config: TrainConfig, workdir, ood_datasets=()) -> dict:
    """Evaluates the model of `config.init` on its own data set, as a run with a workdir.

    Args:
        config: the run: the model, its data set and where that is, batch size and `eval_split`.
        workdir: directory of the run; where all that is asked for was measured it is not again.
        ood_datasets: names of data sets of other things.

    Returns:
        numbers by name: those of `figures`, of which, after a long tail, `shots` are
        `shots/<group>` (not of a group without classes) and `shots/<group>_classes`; and
        `ood/<data set>/<score>/auroc` and `.../fpr95`, see `etfzoo.measure.ood.evaluate`.

    Raises:
        EtfzooError: bad input, or a model that was trained on something else.
    """
    if config.init is None:
        raise EtfzooError("evaluation needs a trained model")
    workdir = Workdir(workdir)
    with workdir.lock():
        identity.check(config, workdir)
        finished = workdir.usable_result()
        if finished is not None and not missing(finished, ood_datasets):
            return finished
        start, source = time.monotonic(), resolve(config.dataset, config.data_dir)
        seen = seen_in_training(config.init, config.dataset, source, required=True)
        foreign = {name: resolve(name, config.data_dir) for name in ood_datasets}
        model = load(config.init)
        identity.claim(config, workdir, source.fingerprint())
        predictions = accuracy.evaluate(model, source, config.eval_split, config.batch_size)
        result = figures(predictions, source.num_classes, seen.counts() if seen.is_tail else None)
        for group, row in result.pop("shots", {}).items():
            result |= {f"shots/{group}": row["accuracy"]} if row["classes"] else {}
            result[f"shots/{group}_classes"] = row["classes"]
        if foreign:
            from etfzoo.measure import ood  # takes scikit-learn, which nothing else here does

            scores = ood.evaluate(model, seen.source, foreign, config.batch_size, seen.split)
            result |= {
                f"ood/{name}/{score}/{measure}": value
                for name, by_score in scores.items()
                for score, row in by_score.items()
                for measure, value in row.items()
            }
        hardware.write(workdir, time.monotonic() - start)
        workdir.write_result(result)
        return result


def missing(result: dict, ood_datasets) -> list[str]:
    """The data sets of other things that a result of `evaluate` does not have."""
    return [name for name in ood_datasets if f"ood/{name}/msp/auroc" not in result]

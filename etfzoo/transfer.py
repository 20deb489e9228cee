"""Transfer of a pretrained model: full fine-tuning with a picked rate, and linear probes."""

import dataclasses
import json
import logging
import math
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from etfzoo import evaluation, files, machine, neural_collapse, step_tf, training
from etfzoo.checkpoint import CheckpointManager
from etfzoo.classifier import replace_head
from etfzoo.config import TrainConfig
from etfzoo.data.augment import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, TrainingDiverged
from etfzoo.interruption import leaving_when_a_worker_is_lost
from etfzoo.progress import Progress
from etfzoo.strategy import chief_first, get_strategy, is_chief

log = logging.getLogger("etfzoo")

# Inverse L2 strengths of the probe, on standardised features.
PROBE_GRID = tuple(10.0**e for e in range(-5, 2))


def finetune(config: TrainConfig, workdir, learning_rates=(), weight_decays=()) -> dict:
    """Fine-tunes all weights of `config.init`.

    With several candidates each is trained on the data set's `fit` split and scored on `select`
    by the data set's metric; the best is then trained on `config.train_split`. Every candidate is
    a workdir of its own below `<workdir>/select`, so a stopped search goes on where it was.

    Args:
        config: the run; its own rate and decay count where no candidates are given.
        workdir: directory of the run.
        learning_rates, weight_decays: candidates; one or none is taken as it is.

    Returns:
        see `etfzoo.training.train_and_evaluate`; with candidates `selection.json` beside it tells
        their scores.
    """
    if config.init is None:
        raise EtfzooError("fine-tuning needs a pretrained model")
    candidates = [
        dataclasses.replace(config, learning_rate=rate, weight_decay=decay)
        for rate in learning_rates or (config.learning_rate,)
        for decay in weight_decays or (config.weight_decay,)
    ]
    if len(candidates) == 1:
        return training.train_and_evaluate(candidates[0], workdir)
    strategy = get_strategy(config.strategy, config.tpu, config.num_virtual_devices)
    with leaving_when_a_worker_is_lost(strategy):
        source = chief_first(strategy, lambda: resolve(config.dataset, config.data_dir))
    metric = source.row.metric
    scores = []
    for candidate in candidates:
        name = f"lr{candidate.learning_rate:g}_wd{candidate.weight_decay:g}"
        trial = dataclasses.replace(candidate, train_split="fit", eval_split="select")
        print(f"candidate {name}", flush=True)
        try:
            score = training.train_and_evaluate(trial, Path(workdir) / "select" / name)[metric]
        except TrainingDiverged as error:
            log.warning("%s", error)
            score = -math.inf
        scores.append(score)
    best = candidates[int(np.argmax(scores))]
    if best.learning_rate in (min(learning_rates), max(learning_rates)) and len(learning_rates) > 1:
        log.warning(
            "the best learning rate, %g, lies at the edge of the grid: widen it",
            best.learning_rate,
        )
    print(f"picked learning rate {best.learning_rate:g}, weight decay {best.weight_decay:g}")
    result = training.train_and_evaluate(best, workdir)
    rows = [
        {"learning_rate": c.learning_rate, "weight_decay": c.weight_decay, metric: score}
        for c, score in zip(candidates, scores, strict=True)
    ]
    if is_chief(strategy):
        files.write_text(Path(workdir) / "selection.json", json.dumps(rows, indent=2) + "\n")
    return result


def linear_probe(config: TrainConfig, workdir, grid=PROBE_GRID) -> dict:
    """Fits an L2 logistic regression on the frozen pooled features of `config.init`.

    Features are standardised by the training split; the regularisation is picked on the `select`
    split, then the probe is fitted on `config.train_split`. The result is a checkpoint like any
    other: the probe, standardisation folded in, is the linear head of the model.

    Args:
        config: the run: model, data, image size and crop count.
        workdir: directory of the run.
        grid: inverse regularisation strengths C that are tried.

    Returns:
        see `etfzoo.evaluation.summary`; with `C`, `scatter_ratio_train` and `scatter_ratio_test`
        (tr S_W / tr S_B of the frozen features).
    """
    if config.init is None or config.head != "linear":
        raise EtfzooError("a linear probe needs a pretrained model and --head=linear")
    if config.strategy not in ("auto", "one_device"):
        raise EtfzooError("a linear probe runs on one device: leave out --strategy")
    training.check_workdir(config, workdir)
    finished = training.finished_result(workdir)
    if finished is not None:
        return finished
    source = resolve(config.dataset, config.data_dir)
    model = training.make_model(config, source)
    frozen = replace_head(model, None, None)
    pipeline = training.make_pipeline(config, source, model, workdir)
    workdir = training.claim_workdir(config, workdir)
    start = time.monotonic()
    extract = step_tf.inference(frozen)
    splits = {
        role: _features(extract, pipeline, role)
        for role in ("fit", "select", config.train_split, config.eval_split)
    }
    train, test = splits[config.train_split], splits[config.eval_split]
    strength = _pick_strength(
        splits["fit"], splits["select"], grid, source.row.metric, source.num_classes
    )
    kernel, bias = _fit(*train, strength, source.num_classes)
    head = model.get_layer("logits")
    head.kernel.assign(kernel)
    head.bias.assign(bias)
    predictions = evaluation.predict(
        step_tf.evaluation_step(model), pipeline.evaluation(config.eval_split)
    )
    result = evaluation.summary(predictions, source.num_classes) | {
        "C": strength,
        "scatter_ratio_train": neural_collapse.scatter_ratio(*train),
        "scatter_ratio_test": neural_collapse.scatter_ratio(*test),
    }
    CheckpointManager(workdir).save(0, model, None, {})
    machine.write(workdir, time.monotonic() - start)
    files.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def extract(model, source, split: str, batch_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features of the evaluation images of a split, at the model's own image size.

    Args:
        model: an ImageClassifier, with any head or none.
        source: see `etfzoo.data.sources.resolve`.
        split: split or role.
        batch_size: images a step.

    Returns:
        features, float64 `[N, p]`, and class numbers `[N]`.

    Raises:
        EtfzooError: the model has no image size, or an image cannot be decoded.
    """
    height, width = model.spec.input_shape[:2]
    if height is None or width is None:
        raise EtfzooError("the model has no image size; load it with input_shape=(224, 224, 3)")
    if batch_size < 1:
        raise EtfzooError(f"the batch size must be at least 1; got {batch_size}")
    pipeline = Pipeline(
        source, height, width, model.spec.crop, batch_size, Augmentation("none", flip=False), 0
    )
    headless = model if model.spec.head is None else replace_head(model, None, None)
    return _features(step_tf.inference(headless), pipeline, split)


def _features(extract, pipeline, split):
    progress = Progress(
        f"features of the {split} split", -(-pipeline.size(split) // pipeline.batch_size)
    )
    batches = []
    with pipeline.naming_corrupt_records(split):
        for images, labels in pipeline.evaluation(split):
            batches.append((extract(images), labels))
            progress.update(len(batches))
    progress.finish()
    features, labels = zip(*batches, strict=True)
    return np.concatenate(features).astype(np.float64), np.concatenate(labels)


def _pick_strength(fit, select, grid, metric, num_classes) -> float:
    scores = []
    for strength in grid:
        kernel, bias = _fit(*fit, strength, num_classes)
        predicted = np.argmax(select[0] @ kernel + bias, axis=1)
        scores.append(evaluation.accuracy(select[1], predicted, num_classes, metric))
    return grid[int(np.argmax(scores))]


def _fit(features, labels, strength, num_classes):
    """Kernel `[p, K]` and bias `[K]` of the probe on raw features."""
    mean, deviation = features.mean(0), features.std(0)
    deviation = np.where(deviation > 1e-6 * max(deviation.max(), 1e-30), deviation, np.inf)
    probe = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        # The largest C need not converge to be compared: accuracy stands still long before.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit((features - mean) / deviation, labels)
    coefficients, intercept = probe.coef_, probe.intercept_
    if len(probe.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    coefficients = coefficients / deviation
    kernel = np.zeros((features.shape[1], num_classes))
    # A class without a training example must never win.
    bias = np.full(num_classes, intercept.min() - 1e4)
    kernel[:, probe.classes_] = coefficients.T
    bias[probe.classes_] = intercept - coefficients @ mean
    return kernel, bias

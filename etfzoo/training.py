"""Training: epochs, checkpoints, progress and logs around one backend's step."""

import contextlib
import csv
import io
import json
import logging
import math
import signal
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from etfzoo import evaluation, files, schedules, step_tf
from etfzoo.checkpoint import CheckpointManager
from etfzoo.classifier import ImageClassifier, build_classifier, replace_head
from etfzoo.config import TrainConfig
from etfzoo.data.augment import Augmentation
from etfzoo.data.pipeline import Pipeline, find_corrupt
from etfzoo.data.sources import Source, resolve
from etfzoo.errors import EtfzooError, TrainingDiverged
from etfzoo.progress import Progress
from etfzoo.strategy import get_strategy

log = logging.getLogger("etfzoo")

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and stopped by a signal; start again to go on


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C: the run was saved at its exact step and can be started again."""

    def __init__(self):
        super().__init__(EXIT_STOPPED)


def train_and_evaluate(config: TrainConfig, workdir) -> dict:
    """Trains a classifier, or goes on where an earlier call was stopped.

    Writes to `workdir`: `config.json` (complete: repeats the run), `checkpoints/`, `metrics.csv`
    and `metrics.jsonl` (one row an epoch), `tensorboard/`, and `result.json` at the end.

    Args:
        config: what to train.
        workdir: directory of this run; a finished one is not trained again.

    Returns:
        the metrics of the last epoch on the evaluation split, see `evaluation.summary`, with
        `train_loss`, `train_top1`, `epoch` and `step`.

    Raises:
        EtfzooError: bad input, or a workdir that holds another run.
        TrainingDiverged: loss or weights became non-finite; the last good checkpoint is kept.
        Stopped: SIGTERM or SIGINT arrived; the run is saved.
    """
    if not step_tf.is_tensorflow():
        raise EtfzooError(
            f"training needs the TensorFlow backend; KERAS_BACKEND is {keras.backend.backend()}"
        )
    # First of all what can fail without cost: the device, the workdir, the data, the model.
    strategy = get_strategy(config.strategy, config.tpu)
    check_workdir(config, workdir)
    finished = finished_result(workdir)
    if finished is not None:
        return finished
    step_tf.set_determinism(config.deterministic)
    keras.utils.set_random_seed(config.seed)
    source = resolve(config.dataset, config.data_dir)
    with strategy.scope():
        model = make_model(config, source)
    pipeline = make_pipeline(config, source, model, workdir)
    workdir = claim_workdir(config, workdir)
    return _Run(config, workdir, strategy, pipeline, model).train()


def check_workdir(config: TrainConfig, workdir) -> None:
    """Raises EtfzooError when a workdir holds a run with other settings; writes nothing."""
    path = Path(workdir) / "config.json"
    if path.exists():
        differences = TrainConfig.load(path).differences(config)
        if differences:
            raise EtfzooError(
                f"{workdir} holds a run with other settings ({'; '.join(differences[:4])}); "
                "choose another --workdir or delete it"
            )


def claim_workdir(config: TrainConfig, workdir) -> Path:
    """Creates the workdir with its `config.json`."""
    workdir = files.make_directory(workdir)
    config.save(workdir / "config.json")
    return workdir


def finished_result(workdir) -> dict | None:
    """The result of a finished run, None where it is not finished."""
    path = Path(workdir) / "result.json"
    return files.read_json(path) if path.exists() else None


def make_model(config: TrainConfig, source: Source) -> ImageClassifier:
    """The classifier that a configuration starts from."""
    policy = {"none": "float32", "bfloat16": "mixed_bfloat16"}[config.mixed_precision]
    size = config.image_size
    if config.norm == "sw":
        step_tf.use_full_float32()
    common = {
        "feature_norm": config.feature_norm,
        "scale": config.scale,
        "seed": config.seed,
        "input_shape": (size, size, 3),
        "crop": config.crop,
        "class_names": source.class_names,
        "dtype": policy,
    }
    try:
        if config.init is not None:
            from etfzoo import zoo

            return replace_head(zoo.load(config.init), source.num_classes, config.head, **common)
        return build_classifier(
            config.backbone,
            source.num_classes,
            config.head,
            config.norm,
            mean=config.mean,
            std=config.std,
            **common,
        )
    except EtfzooError:
        raise
    except ValueError as error:  # no ETF of these sizes
        raise EtfzooError(str(error)) from error


def make_pipeline(config: TrainConfig, source: Source, model, workdir) -> Pipeline:
    """The pipeline of a configuration; checks that there is something to train on."""
    corrupt = ()
    if config.skip_corrupt:
        corrupt = _corrupt_keys(config, source, Path(workdir) / "corrupt.json")
    pipeline = Pipeline(
        source,
        *model.spec.input_shape[:2],
        model.spec.crop,
        config.batch_size,
        Augmentation(config.augment, config.min_area, config.flip),
        config.seed,
        corrupt,
    )
    size = pipeline.size(config.train_split)
    if size < config.batch_size:
        raise EtfzooError(
            f"the training split of {source.name} has {size} images, fewer than one batch; "
            f"pass --batch_size={max(1, size // 4)} or less"
        )
    if pipeline.size(config.eval_split) == 0:
        raise EtfzooError(f"the evaluation split of {source.name} is empty")
    return pipeline


def _corrupt_keys(config, source, path) -> tuple[int, ...]:
    if not path.exists():
        found = find_corrupt(source, (config.train_split, config.eval_split))
        files.make_directory(path.parent)
        files.write_text(path, json.dumps({str(k): v for k, v in found.items()}, indent=2))
    corrupt = files.read_json(path)
    log.warning("left out %d corrupt images, listed in %s", len(corrupt), path)
    return tuple(int(key) for key in corrupt)


class _Run:
    """One run: the loop and its state."""

    def __init__(self, config, workdir, strategy, pipeline, model):
        self.config = config
        self.workdir = workdir
        self.pipeline = pipeline
        self.model = model
        self.steps = pipeline.size(config.train_split) // config.batch_size
        with strategy.scope():
            self.optimizer = keras.optimizers.SGD(
                schedules.learning_rate(config, self.steps),
                momentum=config.momentum,
                nesterov=config.nesterov,
                name="sgd",  # variable paths must not depend on what was built before
            )
            self.optimizer.build(model.trainable_variables)
        self.stepper = step_tf.Stepper(
            model,
            self.optimizer,
            strategy,
            config.weight_decay,
            config.label_smoothing,
            config.decay_all,
        )
        self.checkpoints = CheckpointManager(workdir, config.keep_checkpoints)
        # Everything that the loop needs to go on as if it had never stopped.
        self.state = {"epoch": 0, "step": 0, "totals": [0.0, 0.0, 0.0], "history": [], "best": -1.0}

    def train(self) -> dict:
        restored = self.checkpoints.restore(self.model, self.optimizer)
        if restored is not None:
            self.state = {name: restored[name] for name in self.state}
            log.info(
                "resuming %s at epoch %d, step %d",
                self.workdir, self.state["epoch"] + 1, self.state["step"],
            )  # fmt: skip
            # The process may have died between its last checkpoint and the log files.
            self._write_logs()
        writer = tf.summary.create_file_writer(str(self.workdir / "tensorboard"))
        with _StopRequest() as stop, writer.as_default():
            try:
                while self.state["epoch"] < self.config.epochs:
                    self._epoch(stop)
            except TrainingDiverged as error:
                raise self._diverged(error) from error
        result = self.state["history"][-1]
        files.write_text(self.workdir / "result.json", json.dumps(result, indent=2) + "\n")
        return result

    def _epoch(self, stop):
        epoch, split = self.state["epoch"], self.config.train_split
        progress = Progress(f"Epoch {epoch + 1}/{self.config.epochs}", self.steps)
        totals = np.asarray(self.state["totals"])
        batches = self.stepper.distribute(self.pipeline.training(split, epoch, self.state["step"]))
        iterator = iter(batches)
        while self.state["step"] < self.steps:
            with self.pipeline.naming_corrupt_records(split, epoch, self.state["step"]):
                images, labels = next(iterator)
            totals = totals + self.stepper.train(images, labels)
            self.state["step"] += 1
            progress.update(self.state["step"], lambda t=totals: _averages(t))
            if stop.requested:
                self._stop(totals)
            done = epoch * self.steps + self.state["step"]
            if done % self.config.checkpoint_every == 0:
                self._save(totals)
        self._finish_epoch(totals, progress)
        if stop.requested:
            self._stop(np.zeros(3))

    def _finish_epoch(self, totals, progress):
        train = _averages(totals)
        epoch = self.state["epoch"] + 1
        row = {
            "epoch": epoch,
            "step": epoch * self.steps,
            "learning_rate": float(self.optimizer.learning_rate),
            "train_loss": train["loss"],
            "train_top1": train["top1"],
        }
        evaluated = epoch % self.config.eval_every == 0 or epoch == self.config.epochs
        if evaluated:
            row |= self._evaluate()
            train["val_top1"] = row["top1"]
        progress.finish(train)
        best = evaluated and row["top1"] > self.state["best"]
        self.state |= {
            "epoch": epoch,
            "step": 0,
            "history": [*self.state["history"], row],
            "best": max(row.get("top1", -1.0), self.state["best"]),
        }
        self.state["totals"] = [0.0, 0.0, 0.0]
        if evaluated:
            self._save(np.zeros(3), best)
        self._log(row)

    def _evaluate(self):
        split = self.config.eval_split
        with self.pipeline.naming_corrupt_records(split):
            predictions = evaluation.predict(self.stepper.evaluate, self.pipeline.evaluation(split))
        return evaluation.summary(predictions, self.model.spec.num_classes)

    def _stop(self, totals):
        self._save(totals)
        log.info("stopped by a signal and saved; run the same command to go on")
        raise Stopped

    def _save(self, totals, best=False):
        totals = np.asarray(totals)
        _check_finite(totals[0])
        self.state["totals"] = totals.tolist()
        step = self.state["epoch"] * self.steps + self.state["step"]
        self.checkpoints.save(step, self.model, self.optimizer, self.state, best)

    def _log(self, row):
        self._write_logs()
        for name, value in row.items():
            if name not in ("epoch", "step"):
                tf.summary.scalar(name, value, step=row["epoch"])
        tf.summary.flush()

    def _write_logs(self):
        """Log files are rewritten from the history, so that a resumed run repeats no row."""
        rows = self.state["history"]
        files.write_text(
            self.workdir / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows)
        )
        table = io.StringIO()
        columns = dict.fromkeys(name for r in rows for name in r)
        writer = csv.DictWriter(table, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.workdir / "metrics.csv", table.getvalue())

    def _diverged(self, error):
        kept = self.checkpoints.paths()
        where = f"the last good state is {kept[0]}" if kept else "there was no checkpoint yet"
        return TrainingDiverged(
            f"training diverged in epoch {self.state['epoch'] + 1}, by step "
            f"{self.state['step']}: {error}; {where}; lower --learning_rate (now "
            f"{self.config.learning_rate:g}) or add --warmup_epochs"
        )


class _StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop looks at after each step."""

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _averages(totals) -> dict[str, float]:
    loss, right, count = (float(t) for t in totals)
    _check_finite(loss)
    return {"loss": loss / max(count, 1), "top1": right / max(count, 1)}


def _check_finite(loss) -> None:
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the loss is {float(loss)}")

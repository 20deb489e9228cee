"""Training: epochs, checkpoints, progress and logs around one backend's step."""

import contextlib
import csv
import io
import json
import logging
import math
import time

import keras
import numpy as np
import tensorflow as tf

from etfzoo import files, internals
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, TrainingDiverged, extra, first_line
from etfzoo.measure import accuracy, features, neural_collapse
from etfzoo.models import checkpoint
from etfzoo.models.checkpoint import CheckpointManager
from etfzoo.progress import Progress
from etfzoo.runtime import backend, hardware
from etfzoo.runtime.averaging import WeightAverage
from etfzoo.runtime.interruption import Stopped, StopRequest, exit_if_worker_lost
from etfzoo.runtime.strategy import (
    check_agreement,
    check_batch_size,
    chief_first,
    get_strategy,
    is_chief,
    num_workers,
    wait_for_all,
)
from etfzoo.training import ending, identity
from etfzoo.training.build import (
    make_loss,
    make_pipeline,
    make_stepper,
    mixing,
    start_model,
)
from etfzoo.training.config import TrainConfig
from etfzoo.training.guidance import Guide
from etfzoo.training.optimizers import make_optimizer
from etfzoo.workdir import Workdir, is_number

with extra("train"):
    import tensorboard  # noqa: F401  without it tf.summary has no `scalar`

log = logging.getLogger("etfzoo")

_MOST = 1e30  # of the sums of an epoch


def train_and_evaluate(config: TrainConfig, workdir, pretrained=None) -> dict:
    """Trains a classifier, or goes on where an earlier call was stopped.

    Writes to `workdir`: `config.json` (complete: repeats the run), `checkpoints/`, `metrics.csv`
    and `metrics.jsonl` (one row an epoch), `machine.json` (hardware, seconds so far, command),
    `tensorboard/`, and `result.json` at the end.

    Args:
        config: what to train.
        workdir: directory of this run; a finished one is not trained again.
        pretrained: gives the StoredModel of `config.init` where runs share one; None reads it.

    Returns:
        the metrics of the last epoch on the evaluation split, see `accuracy.summary`, with
        `train_loss`, `train_top1`, `epoch` and `step`; with `neural_collapse_every` also
        `nc/<split>/<measure>`, see `etfzoo.measure.neural_collapse`.

    Raises:
        EtfzooError: bad input, or a workdir that holds another run.
        TrainingDiverged: loss or weights became non-finite; the last good checkpoint is kept.
        Stopped: SIGTERM or SIGINT arrived, here or at another worker; the run is saved.

    With several workers, a lost one ends the process: see
    `etfzoo.runtime.interruption.exit_if_worker_lost`.
    """
    if keras.backend.backend() not in backend.SUPPORTED:
        raise EtfzooError(
            f"training needs KERAS_BACKEND={' or '.join(backend.SUPPORTED)}; it is "
            f"{keras.backend.backend()}"
        )
    # First of all what can fail without cost: the device, the workdir, the data, the model.
    strategy = get_strategy(config.strategy, config.tpu, config.num_virtual_devices)
    with exit_if_worker_lost(strategy):
        check_batch_size(config.batch_size, strategy, config.accumulate_steps)
        mixing(config).check_batch_size(config.batch_size, strategy.num_replicas_in_sync)
        workdir = Workdir(workdir)
        with workdir.lock() if is_chief(strategy) else contextlib.nullcontext():
            identity.check(config, workdir)
            finished = workdir.usable_result()
            seen = config.results_in() | {"a finished run": finished is not None}
            check_agreement(strategy, seen)
            with internals.forgetting_gradients():
                return finished or _train(config, workdir, strategy, pretrained)


def _train(config, workdir, strategy, pretrained):
    source = chief_first(strategy, lambda: resolve(config.dataset, config.data_dir))
    model = start_model(config, source, strategy, pretrained)
    pipeline = make_pipeline(config, source, model, workdir, is_chief(strategy))
    loss = make_loss(config, model.spec, pipeline.source)
    cache = backend.device_cache(pipeline, strategy) if config.cache == "device" else None
    run = identity.claim(config, workdir, source.fingerprint()) if is_chief(strategy) else None
    return Trainer(config, workdir, strategy, pipeline, model, loss, cache, run).train()


class Trainer:
    """One run: the loop and its state."""

    def __init__(self, config, workdir, strategy, pipeline, model, loss, cache, run):
        self.config = config
        self.run = run  # its identity; the chief's alone, who writes
        self.workdir = workdir
        self.strategy = strategy
        self.chief = is_chief(strategy)
        self.pipeline = pipeline
        self.loss = loss
        self.cache = cache
        self.steps = pipeline.size(config.train_split) // config.batch_size
        self.optimizer = make_optimizer(config, self.steps, model, strategy)
        self.average = WeightAverage(model, config.ema, strategy) if config.ema else None
        self.trained = model
        self.guide = None
        if model.spec.guided:
            self.guide = Guide(model, strategy, [self.average.model] if self.average else [])
        self.size = None  # of the images that the current step is made for
        # What is evaluated, measured and loaded later; the steps go on with `model`.
        self.model = self.average.model if self.average else model
        self.evaluate = backend.evaluation_step(self.model, config.label_smoothing, strategy)
        if config.neural_collapse_every:
            self.extractor = features.Extractor(self.model, strategy)
        self.checkpoints = CheckpointManager(
            workdir, config.keep_checkpoints, trained=model if self.average else None
        )
        # Everything that the loop needs to go on as if it had never stopped.
        self.state = {"epoch": 0, "step": 0, "totals": [0.0, 0.0, 0.0], "history": [], "best": -1.0}

    def train(self) -> dict:
        self.start, self.seconds = time.monotonic(), 0.0
        restored = self.checkpoints.restore(
            self.model, self.optimizer, tidy=self.chief, check=self._check_state
        )
        if restored is not None:
            if self.chief:
                identity.check_state(self.run, restored, self.workdir)
            self.state = {name: restored[name] for name in self.state}
            self.seconds = hardware.read(self.workdir).get("seconds", 0.0)
            log.info(
                "resuming %s at epoch %d, step %d",
                self.workdir, self.state["epoch"] + 1, self.state["step"],
            )  # fmt: skip
            # The process may have died between its last checkpoint and the log files.
            if self.chief:
                self._write_logs()
                best = ending.best_epoch(self.state["history"])
                if best and best["epoch"] == self.state["epoch"] and self.state["step"] == 0:
                    self.checkpoints.mark_best(best["step"])
        start = {name: self.state[name] for name in ("epoch", "step", "totals")}
        check_agreement(self.strategy, start | {"steps an epoch": self.steps})
        self.writer = tf.summary.create_noop_writer()
        if self.chief:
            with _only_a_log(self.workdir.tensorboard):
                self.writer = tf.summary.create_file_writer(str(self.workdir.tensorboard))
        with StopRequest() as stop:
            try:
                while not ending.ended(self.config, self.state["history"]):
                    self._epoch(stop)
            except TrainingDiverged as error:
                raise self._diverged(error) from error
        result = ending.result(self.config, self.state["history"])
        if self.chief:
            self.workdir.write_result(result)
        # Whoever leaves first ends the others.
        wait_for_all(self.strategy)
        return result

    def _check_state(self, path, state):
        """Raises EtfzooError where a checkpoint's state cannot be one of this run."""
        epoch, step, totals, history = (state.get(n) for n in list(self.state)[:4])
        whole = all(type(n) is int for n in (epoch, step)) and is_number(state.get("best"), -1, 1)
        fits = whole and 0 <= epoch <= self.config.epochs and 0 <= step <= self.steps
        fits = fits and checkpoint.step_of(path) == epoch * self.steps + step
        fits = fits and isinstance(totals, list) and len(totals) == 3
        fits = fits and all(is_number(total, 0, _MOST) for total in totals)
        fits = fits and isinstance(history, list) and len(history) == epoch
        for number, row in enumerate(history if fits else (), 1):
            fits = fits and isinstance(row, dict) and row.get("epoch") == number
            fits = fits and all(isinstance(value, int | float) for value in row.values())
        if not fits or (epoch == self.config.epochs and "top1" not in history[-1]):
            raise EtfzooError(f"checkpoint {path} is damaged: its state is none of this run")

    def _epoch(self, stop):
        epoch, split = self.state["epoch"], self.config.train_split
        self._set_size(self.config.train_size(epoch))
        title = f"Epoch {epoch + 1}/{self.config.epochs}"
        if self.config.image_size_schedule:
            title += f" at {self.size} px"
        progress = Progress(title, self.steps, quiet=not self.chief)
        totals = np.asarray(self.state["totals"])
        start = self.state["step"]
        # Inside an epoch the frame of its start is in the checkpoint. New weights that no step has
        # moved, and norms without statistics, tell nothing of the classes.
        if self.guide and start == 0 and (epoch > 0 or self.config.init):
            self.guide.turn(self.pipeline, split)
        batches = iter(self._batches(self.images, "training", split, epoch, start))
        while self.state["step"] < self.steps:
            count = min(self.config.steps_per_execution, self.steps - self.state["step"])
            with self.pipeline.naming_corrupt_records(split, epoch, self.state["step"]):
                sums = self.stepper.train(batches, count, stop.requested)
            totals = totals + sums[:3]
            before = epoch * self.steps + self.state["step"]
            self.state["step"] += count
            progress.update(self.state["step"], lambda t=totals: _averages(t))
            if self._stopping(stop, sums[3]):
                self._stop(totals)
            every = self.config.checkpoint_every
            if (before + count) // every > before // every:
                self._save(totals)
        self._finish_epoch(totals, progress)
        if self._stopping(stop):
            self._stop(np.zeros(3))

    def _set_size(self, size):
        """Makes step and images of a size; the weights and slots are those of every size."""
        if size == self.size:
            return
        self.size = size
        model = self.trained.at_size(size, size)
        self.stepper = make_stepper(
            self.config, model, self.optimizer, self.strategy, self.loss, self.average
        )
        self.images = self.cache or self.pipeline
        if size != self.config.image_size:
            self.images = self.images.at_size(size, size)

    def _batches(self, images, kind, *which):
        """Global batches of `Pipeline.training` or `Pipeline.evaluation`."""
        batches = getattr(images, kind)
        if self.cache is not None:
            return batches(*which)
        return backend.distribute(self.strategy, lambda share: batches(*which, share=share))

    def _stopping(self, stop, votes=None) -> bool:
        """Whether a signal arrived; with several workers, at any of them by the same step."""
        if num_workers(self.strategy) == 1:
            return stop.requested
        # Reading the votes waits for the device, which collectives have made wait anyway.
        return votes is not None and float(votes) > 0

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
        every = self.config.neural_collapse_every
        if every and (epoch % every == 0 or epoch == self.config.epochs):
            row |= self._neural_collapse()
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
            batches = self._batches(self.cache or self.pipeline, "evaluation", split)
            predictions = accuracy.predict(self.evaluate, batches)
        return accuracy.summary(predictions, self.model.spec.num_classes)

    def _neural_collapse(self):
        """Collapse measures of both splits, as the network sees them at evaluation.

        Of the features, so that runs with a projector and without compare. Behind one the head acts
        on its output, and what compares head and features, nc3 and nc4, is left out.
        """
        found, row, classes = {}, {}, self.model.spec.num_classes
        on_features = self.model.spec.penultimate == "features"
        head = features.linear_head(self.model) if on_features else None
        for split in dict.fromkeys((self.config.train_split, self.config.eval_split)):
            batches = self.extractor.batches(self.pipeline, split)
            if not self.chief:  # takes part in computing the features, and no more
                for _ in batches:
                    pass
                continue
            found[split] = features.in_temporary_file(batches, self.workdir)
            try:
                measured = features.collapse(found[split], classes, head)
            except EtfzooError as error:  # no reason to end a training
                log.warning("no collapse measures of the %s split: %s", split, error)
                continue
            row |= neural_collapse.scalars(measured, f"nc/{split}/")
        equal = features.equal_nc1(found, classes)
        return row | {f"nc/{split}/nc1_equal": value for split, value in equal.items()}

    def _stop(self, totals):
        self._save(totals)
        wait_for_all(self.strategy)
        if self.chief:
            log.info("stopped by a signal and saved; run the same command to go on")
        raise Stopped

    def _save(self, totals, best=False):
        totals = np.asarray(totals)
        _check_finite(totals[0])
        self.state["totals"] = totals.tolist()
        step = self.state["epoch"] * self.steps + self.state["step"]
        state = self.state
        if self.chief:
            identity.check_claim(self.run, self.workdir)
            state = self.run | state
        self.checkpoints.save(step, self.model, self.optimizer, state, best, write=self.chief)
        if self.chief:
            seconds = self.seconds + time.monotonic() - self.start
            hardware.write(self.workdir, seconds, self.strategy)

    def _log(self, row):
        if not self.chief:
            return
        self._write_logs()
        with _only_a_log(self.workdir.tensorboard), self.writer.as_default():
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    tf.summary.scalar(name, value, step=row["epoch"])

    def _write_logs(self):
        """Log files are rewritten from the history, so that a resumed run repeats no row."""
        rows = self.state["history"]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with _only_a_log(self.workdir.metrics_jsonl):
            files.write_text(self.workdir.metrics_jsonl, lines)
        table = io.StringIO()
        columns = dict.fromkeys(name for r in rows for name in r)
        writer = csv.DictWriter(table, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)
        with _only_a_log(self.workdir.metrics_csv):
            files.write_text(self.workdir.metrics_csv, table.getvalue())

    def _diverged(self, error):
        kept = self.checkpoints.paths()
        where = f"the last good state is {kept[0]}" if kept else "there was no checkpoint yet"
        return TrainingDiverged(
            f"training diverged in epoch {self.state['epoch'] + 1}, by step "
            f"{self.state['step']}: {error}; {where}; lower `learning_rate` (now "
            f"{self.config.learning_rate:g}) or add `warmup_epochs`"
        )


@contextlib.contextmanager
def _only_a_log(path):
    """Lets a run go on where a file cannot be written that it does not need."""
    try:
        yield
    except (EtfzooError, OSError, tf.errors.OpError) as error:
        log.warning("the run goes on without %s: %s", path, first_line(error))


def _averages(totals) -> dict[str, float]:
    loss, right, count = (float(t) for t in np.asarray(totals))
    _check_finite(loss)
    return {"loss": loss / max(count, 1), "top1": right / max(count, 1)}


def _check_finite(loss) -> None:
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the loss is {float(loss)}")

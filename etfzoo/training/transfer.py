"""Transfer of a pretrained model: fine-tuning with a picked rate, linear probes and k-NN."""

import dataclasses
import functools
import logging
import time
import warnings

import numpy as np

from etfzoo.data.pipeline import Pipeline
from etfzoo.data.source import Source
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, extra
from etfzoo.measure import accuracy, features, neural_collapse
from etfzoo.models.checkpoint import CheckpointManager
from etfzoo.models.classifier import ImageClassifier
from etfzoo.runtime import backend, hardware
from etfzoo.training import build, identity, loop, search
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo.load import read

with extra("train"):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestNeighbors

log = logging.getLogger("etfzoo")

# Inverse L2 strengths of the probe, on standardised features.
PROBE_GRID = tuple(10.0**e for e in range(-5, 2))
PROBE_ITERATIONS = 10_000
KNN_GRID = (1, 5, 10, 20, 50, 100, 200)
KNN_TEMPERATURE = 0.07


def _alone(function):
    """The function of a config and a workdir, with other processes kept out of that."""

    @functools.wraps(function)
    def locked(config, workdir, *args, **kwargs):
        with Workdir(workdir).lock():
            return function(config, workdir, *args, **kwargs)

    return locked


def finetune(
    config: TrainConfig, workdir, learning_rates=(), weight_decays=(), widen=False
) -> dict:
    """Fine-tunes all weights of `config.init`.

    With several candidates each is trained on the data set's `fit` split and scored on `select`
    by the data set's metric; the best is then trained on `config.train_split`. Every candidate is
    a workdir of its own below `<workdir>/select`, so a stopped search goes on where it was.

    Args:
        config: the run; its own rate and decay count where no candidates are given.
        workdir: directory of the run.
        learning_rates, weight_decays: candidates; one or none is taken as it is.
        widen: whether learning rates are added while the best lies at the edge of their grid, see
            `etfzoo.training.search.pick`.

    Returns:
        see `etfzoo.training.loop.train_and_evaluate`; with candidates `selection.json` beside it
        tells their scores.
    """
    if config.init is None:
        raise EtfzooError("fine-tuning needs a pretrained model")
    pretrained = functools.cache(lambda: read(config.init))  # once for all candidates
    best = search.pick(config, workdir, learning_rates, weight_decays, widen, pretrained=pretrained)
    return loop.train_and_evaluate(best, workdir, pretrained)


@_alone
def linear_probe(config: TrainConfig, workdir, grid=PROBE_GRID, feature_cache=None) -> dict:
    """Fits an L2 logistic regression on the frozen pooled features of `config.init`.

    Features are standardised by the training split; the regularisation is picked on the `select`
    split, then the probe is fitted on `config.train_split`. The result is a checkpoint like any
    other: the probe, standardisation folded in, is the linear head of the model.

    Args:
        config: the run: model, data, image size and crop count.
        workdir: directory of the run.
        grid: inverse regularisation strengths C that are tried, from the smallest on, until two
            in a row are worse than the best; while the best lies at the edge of those tried, up
            to `etfzoo.training.search.EXTENSIONS` further ones are added on that side.
        feature_cache: see `etfzoo.measure.features.Extractor.load`.

    Returns:
        see `etfzoo.measure.accuracy.summary`; with `C`, and the collapse measures of the frozen
        features as `nc/train/...` and `nc/test/...` (see `etfzoo.measure.neural_collapse`).
    """
    frozen = _Frozen.open(config, workdir, "C", "a linear probe")
    if frozen.finished is not None:
        return frozen.finished
    splits, source = frozen.features(feature_cache), frozen.source
    classes, select = source.num_classes, splits["select"]
    strength = _pick_strength(splits["fit"], select, grid, source.row.metric, classes)
    ((kernel, bias),) = _fit(splits["train"], (strength,), classes)
    model = frozen.model
    head = model.get_layer("logits")
    head.kernel.assign(kernel)
    head.bias.assign(bias)
    predictions = accuracy.predict(
        backend.evaluation_step(model), frozen.pipeline.evaluation(config.eval_split)
    )
    result = accuracy.summary(predictions, classes) | {"C": strength}
    measured = {split: splits[split] for split in ("train", "test")}
    equal = features.equal_nc1(measured, classes)
    for split, found in measured.items():
        result |= neural_collapse.scalars(features.collapse(found, classes), f"nc/{split}/")
        result |= {f"nc/{split}/nc1_equal": equal[split]} if equal else {}
    CheckpointManager(frozen.workdir).save(0, model, None, frozen.run)
    return frozen.finish(result)


@_alone
def knn(config: TrainConfig, workdir, grid=KNN_GRID, feature_cache=None) -> dict:
    """Classifies by the nearest training examples in the cosine of frozen pooled features.

    Each of the k nearest votes for its class with weight exp(cosine / 0.07) (Wu et al.,
    "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018); k is
    picked on the `select` split, with the `fit` split as neighbours. There is nothing to load
    afterwards: the workdir holds the result only.

    Args:
        config: the run: model, data, image size and crop count.
        workdir: directory of the run.
        grid: numbers of neighbours that are tried; more than there are examples count as all.
        feature_cache: see `etfzoo.measure.features.Extractor.load`.

    Returns:
        `top1`, `mean_per_class`, `examples` and `k`.
    """
    frozen = _Frozen.open(config, workdir, "k", "k-NN")
    if frozen.finished is not None:
        return frozen.finished
    splits, row, classes = (
        frozen.features(feature_cache),
        frozen.source.row,
        frozen.source.num_classes,
    )
    votes = _neighbours(splits["fit"], splits["select"], grid, classes)
    k = _pick(grid, votes, splits["select"].labels, row.metric, classes)
    (predicted,) = _neighbours(splits["train"], splits["test"], (k,), classes)
    labels = splits["test"].labels
    result = {
        metric: accuracy.accuracy(labels, predicted, classes, metric)
        for metric in ("top1", "mean_per_class")
    }
    return frozen.finish(result | {"examples": len(labels), "k": k})


@dataclasses.dataclass
class _Frozen:
    """A run on frozen features; `finished` is its result where it was run before."""

    config: TrainConfig
    workdir: Workdir
    finished: dict | None = None
    source: Source = None
    model: ImageClassifier = None
    pipeline: Pipeline = None
    run: dict = None
    start: float = 0.0

    @classmethod
    def open(cls, config, workdir, mark, what):
        if config.init is None or config.head != "linear":
            raise EtfzooError(f"{what} needs a pretrained model and `head=linear`")
        if config.strategy not in ("auto", "one_device"):
            raise EtfzooError(f"{what} runs on one device: leave out `strategy`")
        if config.keep_head:
            raise EtfzooError(f"{what} makes a head of its own: leave out `keep_head`")
        if config.projector_layers:
            raise EtfzooError(f"{what} reads the features: leave out `projector_layers`")
        identity.check(config, workdir)
        finished = Workdir(workdir).usable_result()
        if finished is not None:
            if mark not in finished:
                raise EtfzooError(f"{workdir} holds a run that is not {what}; choose another")
            return cls(config, Workdir(workdir), finished)
        source = resolve(config.dataset, config.data_dir)
        model = build.make_model(config, source)
        pipeline = build.make_pipeline(config, source, model, workdir)
        run = identity.claim(config, workdir, source.fingerprint())
        workdir = Workdir(workdir)
        return cls(config, workdir, None, source, model, pipeline, run, time.monotonic())

    def features(self, cache) -> dict:
        """Features of `fit`, `select` and of what the run trains and tests on."""
        extractor = features.Extractor(self.model)
        roles = {"fit": "fit", "select": "select"}
        roles |= {"train": self.config.train_split, "test": self.config.eval_split}
        return {role: extractor.load(self.pipeline, split, cache) for role, split in roles.items()}

    def finish(self, result) -> dict:
        hardware.write(self.workdir, time.monotonic() - self.start)
        self.workdir.write_result(result)
        return result


def _pick_strength(fit, select, grid, metric, num_classes):
    """The inverse regularisation that scores best on `select`, of equal ones the first tried.

    From the smallest on, until two in a row score below the best: the largest take longest by far.
    """
    strengths, scores = [], []

    def tried():
        for strength in sorted(grid):
            if len(scores) > 2 and max(scores[-2:]) < max(scores):
                return
            strengths.append(strength)
            yield strength
        for _ in range(search.EXTENSIONS):  # asked for only when all before are scored
            further = search.beyond(strengths, scores)
            if further is None:
                return
            print(f"the best C lies at the edge of the grid: trying {further:g} too", flush=True)
            strengths.append(further)
            yield further

    for probe in _fit(fit, tried(), num_classes):
        predicted = _logits(select, *probe).argmax(1)
        scores.append(accuracy.accuracy(select.labels, predicted, num_classes, metric))
    best = strengths[int(np.argmax(scores))]
    if search.beyond(strengths, scores) is not None:
        log.warning("the best C, %g, lies at the edge of the grid as far as it was widened", best)
    return best


def _pick(grid, predictions, labels, metric, num_classes):
    """The candidate whose predictions score best; of equal ones the first."""
    scores = [accuracy.accuracy(labels, p, num_classes, metric) for p in predictions]
    return grid[int(np.argmax(scores))]


def _logits(found, kernel, bias):
    return np.concatenate([batch @ kernel + bias for batch in found.batches()])


def _fit(found, strengths, num_classes):
    """Kernel `[p, K]` and bias `[K]` of the probe on raw features, for each strength in turn.

    Each fit starts from the one before. It is run until the gradient is 1e-6 of the loss's scale,
    far beyond the point where accuracies stand still, so that rounding does not decide them.
    """
    x = np.asarray(found.features, np.float64)
    mean, deviation = x.mean(0), x.std(0)
    deviation = np.where(deviation > 1e-6 * max(deviation.max(), 1e-30), deviation, np.inf)
    x = (x - mean) / deviation
    probe = LogisticRegression(tol=1e-6, max_iter=PROBE_ITERATIONS, warm_start=True)
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in our words
            probe.set_params(C=strength).fit(x, found.labels)
        if probe.n_iter_.max() >= PROBE_ITERATIONS:
            log.warning(
                "the probe with C=%g was stopped after %d steps before it converged: its accuracy "
                "may change by some tenths of a point from run to run", strength, PROBE_ITERATIONS,
            )  # fmt: skip
        coefficients, intercept = probe.coef_, probe.intercept_
        if len(probe.classes_) == 2:  # scikit-learn keeps one row for two classes
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercept = np.concatenate([-intercept, intercept]) / 2
        coefficients = coefficients / deviation
        kernel = np.zeros((x.shape[1], num_classes))
        # A class without a training example must never win.
        bias = np.full(num_classes, intercept.min() - 1e4)
        kernel[:, probe.classes_] = coefficients.T
        bias[probe.classes_] = intercept - coefficients @ mean
        yield kernel, bias


def _neighbours(train, test, grid, num_classes):
    """Predicted classes `[N]` of the test examples, for each number of neighbours."""
    most = min(max(grid), len(train.labels))
    search = NearestNeighbors(n_neighbors=most, metric="cosine", algorithm="brute")
    distances, found = search.fit(train.features).kneighbors(test.features)
    # Less the nearest one's, so that no weight overflows.
    weights = np.exp((distances[:, :1] - distances) / KNN_TEMPERATURE)
    labels = np.asarray(train.labels, np.int64)[found]
    for k in grid:
        votes = np.zeros((len(labels), num_classes))
        for column in range(min(k, most)):
            votes[np.arange(len(labels)), labels[:, column]] += weights[:, column]
        yield votes.argmax(1)

"""What a configuration says arrives where it is meant: no setting of the run here is a default.

The parts of a run are replaced by ones that write down what they are given and compute nothing, so
that a run takes a moment. One short run is real, and is compared with a training written out.
"""

import contextlib
import dataclasses
import inspect
import json
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from config_test import FIELDS, OTHER
from sklearn.linear_model import LogisticRegression

import etfzoo
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.datasets import DATASETS, Dataset
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.source import Source
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.measure import accuracy, neural_collapse
from etfzoo.measure.features import Features
from etfzoo.models.checkpoint import load_model
from etfzoo.runtime import backend
from etfzoo.training import build, loop, search, transfer
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir

# 3 replicas take 4 images each; 6 steps an epoch.
CHANGED = OTHER | {"batch_size": 12, "checkpoint_every": 7}
REPLICAS, STEPS = 3, 6
SGD = keras.optimizers.SGD
ROW = Dataset("pictures", 5, fit="one", select="two", test="three", metric="mean_per_class")
SIZES = {"train": 300, "fit": 12 * STEPS + 7, "select": 20, "test": 40}
SCORES = (0.5, 0.8, 0.6, 0.7)  # of the evaluations: the second is the best


class Pictures(Source):
    """A data set of no images."""

    def size(self, split):
        return SIZES[split]


PICTURES = Pictures("pictures", ROW, tuple("abcde"))
READABLE = dataclasses.replace(PICTURES, name="readable pictures")


class Calls(dict):
    """What was called, by name: a list of the arguments of each call."""

    def note(self, name, /, **arguments):
        self.setdefault(name, []).append(arguments)

    def all(self, name, argument):
        return [arguments[argument] for arguments in self.get(name, [])]

    def spy(self, name, real, answer=None):
        """In place of a function or class: notes its arguments, then answers."""
        signature = inspect.signature(real)

        def spied(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.note(name, **bound.arguments)
            return real(*args, **kwargs) if answer is real else answer and answer(bound.arguments)

        return spied


class Images:
    """A pipeline or a cache that gives no images; notes which were asked for."""

    def __init__(self, calls, side, source=None):
        self.calls, self.side, self.batch_size = calls, side, 12
        self.lost = 2 if source is READABLE else 0

    def size(self, split):
        return SIZES[split] - self.lost

    def at_size(self, height, width):
        assert height == width
        return Images(self.calls, height)

    def training(self, split, epoch, start_step=0, share=None):
        self.calls.note("training", split=split, epoch=epoch, start=start_step, side=self.side)
        self.calls.note("share", share=share)
        return []

    def evaluation(self, split, share=None):
        self.calls.note("evaluation", split=split, side=self.side)
        return []

    @contextlib.contextmanager
    def naming_corrupt_records(self, *which):
        yield


def network(calls, side=48):
    inputs = keras.Input((4,), name="images")
    x = keras.layers.BatchNormalization(name="features")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(x))
    model.spec = types.SimpleNamespace(
        input_shape=(side, side, 3), crop=0.7, num_classes=5, head="linear"
    )
    model.at_size = lambda height, width: calls.note("at_size", height=height) or model
    return model


class Strategy:
    num_replicas_in_sync = REPLICAS
    scope = contextlib.nullcontext


class Part(types.SimpleNamespace):
    """A part of the run that notes nothing more."""


def stepper(calls):
    def train(batches, steps=1, stop=False):
        calls.note("steps", count=steps)
        epoch = calls["training"][-1]["epoch"] + 1  # which loss and accuracy tell
        return np.array([12.0 * epoch, epoch, 12.0, 0.0]) * steps

    return Part(train=train)


def checkpoints(calls):
    def save(step, model, optimizer, state, best=False, write=True):
        calls.note("save", step=step, best=best, epoch=state["epoch"], model=model)

    return Part(restore=lambda *args, **kwargs: None, save=save, paths=list)


def extractor(calls):
    def batches(pipeline, split):
        calls.note("features", split=split, epoch=calls["training"][-1]["epoch"])
        rng = np.random.default_rng(0)
        yield rng.normal(size=(20, 4)), np.arange(20) % 5

    return Part(batches=batches)


def predictions(number):
    right = np.arange(10) < 10 * SCORES[number % len(SCORES)]
    return accuracy.Predictions(np.zeros(10, int), 1 - right, right, np.ones(10))


def spied_run(config, workdir, patch):
    """Calls and optimizer of a run whose parts compute nothing."""
    calls = Calls()

    def replace(owner, name, answer=None):
        patch.setattr(owner, name, calls.spy(name, getattr(owner, name), answer))

    replace(loop, "get_strategy", lambda a: Strategy())
    replace(loop, "resolve", lambda a: PICTURES)
    replace(loop, "WeightAverage", lambda a: Part(model=network(calls)))
    replace(loop, "CheckpointManager", lambda a: checkpoints(calls))
    replace(loop.features, "Extractor", lambda a: extractor(calls))
    replace(accuracy, "predict", lambda a: predictions(len(calls["predict"]) - 1))
    patch.setattr(loop.hardware, "write", lambda *args: None)
    replace(keras.utils, "set_random_seed")
    replace(build, "build_classifier", lambda a: network(calls))
    replace(build, "replace_head", lambda a: network(calls))
    patch.setattr("etfzoo.training.build.load", lambda handle: f"model {handle}")
    replace(build.initialization, "initialize")
    replace(build, "readable", lambda a: READABLE)
    replace(build, "Pipeline", lambda a: Images(calls, a["height"], a["source"]))
    replace(build, "Augmentation", Augmentation)
    replace(build, "Mixing", build.Mixing)
    replace(keras.optimizers, "SGD", keras.optimizers.SGD)
    replace(backend, "Stepper", lambda a: stepper(calls))
    replace(backend, "device_cache", lambda a: Images(calls, a["pipeline"].side))
    replace(backend, "evaluation_step", lambda a: Part(model=a["model"]))
    patch.setattr(backend, "distribute", lambda strategy, of: of("its share"))
    for name in ("set_determinism", "synchronize", "use_full_float32"):
        replace(backend, name)
    loop.train_and_evaluate(config, workdir)
    return calls


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which every setting differs from its default."""
    workdir = tmp_path_factory.mktemp("wired")
    with pytest.MonkeyPatch.context() as patch:
        calls = spied_run(TrainConfig(**CHANGED), workdir, patch)
    calls.workdir = Workdir(workdir)
    return calls


# The calls in which a setting's value is an argument: of each function its argument's name.
ARRIVES = {
    "dataset": {"resolve": "name"},
    "data_dir": {"resolve": "data_dir"},
    "backbone": {"build_classifier": "backbone"},
    "head": {"build_classifier": "head"},
    "norm": {"build_classifier": "norm"},
    "feature_norm": {"build_classifier": "feature_norm"},
    "frame": {"build_classifier": "frame"},
    "scale": {"build_classifier": "scale"},
    "mean": {"build_classifier": "mean"},
    "std": {"build_classifier": "std"},
    "initializer": {"initialize": "initializer"},
    "zero_gamma": {"initialize": "zero_gamma"},
    "crop": {"build_classifier": "crop", "Pipeline": "crop"},
    "augment": {"Augmentation": "crop"},
    "min_area": {"Augmentation": "min_area"},
    "antialias": {"Augmentation": "antialias"},
    "flip": {"Augmentation": "flip"},
    "rand_augment": {"Augmentation": "rand_augment"},
    "batch_size": {"Pipeline": "batch_size"},
    "momentum": {"SGD": "momentum"},
    "nesterov": {"SGD": "nesterov"},
    "weight_decay": {"Stepper": "weight_decay"},
    "decay_all": {"Stepper": "decay_all"},
    "label_smoothing": {"Stepper": "label_smoothing", "evaluation_step": "label_smoothing"},
    "mixup": {"Mixing": "mixup"},
    "cutmix": {"Mixing": "cutmix"},
    "ema": {"WeightAverage": "decay"},
    "seed": {
        "set_random_seed": "seed", "build_classifier": "seed", "initialize": "seed",
        "Pipeline": "seed",
    },
    "deterministic": {"set_determinism": "deterministic"},
    "strategy": {"get_strategy": "name"},
    "tpu": {"get_strategy": "tpu"},
    "num_virtual_devices": {"get_strategy": "num_virtual_devices"},
    "synchronize_norms": {"synchronize": "value"},
    "jit_compile": {"Stepper": "jit_compile"},
    "keep_checkpoints": {"CheckpointManager": "keep"},
}  # fmt: skip


def rates(run):
    """The learning rate before each step, and what it is by hand: a step schedule."""
    ((schedule,),) = ([a["learning_rate"]] for a in run["SGD"])
    t = np.arange(7 * STEPS)
    peak = 0.037 * np.sqrt(12 / 256)
    by_hand = peak * np.minimum(1, t / (1.5 * STEPS)) * 0.37 ** ((t >= 12) * 1 + (t >= 30) * 1)
    return [float(schedule(i)) for i in t], pytest.approx(list(by_hand), rel=1e-5)


# What is seen of a setting that is no argument, and what that must be.
SEEN = {
    "train_split": lambda run: (set(run.all("training", "split")), {"fit"}),
    "eval_split": lambda run: (set(run.all("evaluation", "split")), {"select"}),
    "image_size": lambda run: (
        (run.all("build_classifier", "input_shape"), set(run.all("evaluation", "side"))),
        ([(48, 48, 3)], {48}),
    ),
    "image_size_schedule": lambda run: (
        (run.all("training", "side"), run.all("at_size", "height")),
        ([16, 16, 24, 48, 48, 48, 48], [16, 24, 48]),
    ),
    "protocol": lambda run: (
        json.loads(run.workdir.config.read_text())["protocol"],
        "quickstart",
    ),
    "epochs": lambda run: (run.all("training", "epoch"), [0, 1, 2, 3, 4, 5, 6]),
    "mixed_precision": lambda run: (
        (run.all("build_classifier", "dtype"), type(run["Stepper"][0]["optimizer"])),
        (["mixed_float16"], keras.optimizers.LossScaleOptimizer),
    ),
    "cache": lambda run: (len(run["device_cache"]), 1),
    # 6 steps an epoch, 4 at a time.
    "steps_per_execution": lambda run: (run.all("steps", "count"), [4, 2] * 7),
    "eval_every": lambda run: (epochs_of_evaluations(run), [2, 4, 6, 7]),
    "neural_collapse_every": lambda run: (
        [(a["epoch"] + 1, a["split"]) for a in run["features"]],
        [(epoch, split) for epoch in (3, 6, 7) for split in ("fit", "select")],
    ),
    # At the first look after every 7 steps; and after each evaluation.
    "checkpoint_every": lambda run: (
        run.all("save", "step"),
        [10, 12, 16, 22, 24, 28, 36, 36, 42, 42],
    ),
    "skip_corrupt": lambda run: (
        (run["readable"], run.all("Pipeline", "source")),
        ([{"source": PICTURES, "path": run.workdir.corrupt, "write": True}], [READABLE]),
    ),
} | dict.fromkeys(
    ("learning_rate", "learning_rate_scaling", "schedule", "warmup_epochs", "step_epochs",
     "step_factor"), rates,
)  # fmt: skip


def epochs_of_evaluations(run):
    rows = run.workdir.history()
    assert len(rows) == 7
    return [row["epoch"] for row in rows if "top1" in row]


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("init", "keep_head")])
def test_every_setting_arrives(run, name):
    """A setting that is new and has no row above fails here."""
    assert (name in ARRIVES) != (name in SEEN), f"where does {name} go?"
    for called, argument in ARRIVES.get(name, {}).items():
        found = run.all(called, argument)
        assert found and found == [CHANGED[name]] * len(found), called
    if name in SEEN:
        found, wanted = SEEN[name](run)
        assert found == wanted


def test_parts_are_handed_on_to_each_other(run):
    (average,) = run.all("WeightAverage", "model")
    assert all(a["average"].model is not average for a in run["Stepper"])
    averaged = run["Stepper"][0]["average"].model
    # Steps move the model; the average is evaluated, measured and saved.
    assert all(model is average for model in run.all("Stepper", "model"))
    assert run.all("evaluation_step", "model") == run.all("Extractor", "model") == [averaged]
    assert run.all("CheckpointManager", "trained") == [average]
    assert set(map(id, run.all("save", "model"))) == {id(averaged)}
    (sgd,) = run.all("SGD", "name")
    assert sgd == "sgd" and run["Stepper"][0]["optimizer"].inner_optimizer.name == "sgd"
    assert run.all("build_classifier", "num_classes") == [5]
    assert run.all("build_classifier", "class_names") == [tuple("abcde")]
    (mixing,), (augmentation,) = run.all("Pipeline", "mixing"), run.all("Pipeline", "augmentation")
    assert (mixing.mixup, augmentation.rand_augment) == (0.3, 3.0)
    assert len(run["use_full_float32"]) == 1  # whitening needs it


def test_the_best_epoch_is_the_one_that_scored_best(run):
    assert [a["epoch"] for a in run["save"] if a["best"]] == [2, 4]
    result = run.workdir.read_result()
    assert result["top1"] == SCORES[-1] and result["epoch"] == 7 and result["step"] == 42
    rows = run.workdir.history()
    assert rows[-1] == result and [row["step"] for row in rows] == list(range(6, 43, 6))
    assert [row["train_loss"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["train_top1"] for row in rows] == [n / 12 for n in (1, 2, 3, 4, 5, 6, 7)]


def test_a_deterministic_run_leaves_xla_off(tmp_path, monkeypatch):
    plain = {"deterministic": True, "jit_compile": None, "cache": "none", "ema": 0.0}
    plain |= {"mixed_precision": "none", "norm": "bn", "skip_corrupt": False}
    calls = spied_run(TrainConfig(**(CHANGED | plain)), tmp_path, monkeypatch)
    assert set(calls.all("Stepper", "jit_compile")) == {False}
    assert calls.all("set_determinism", "deterministic") == [True]
    assert not {"device_cache", "WeightAverage", "use_full_float32", "readable"} & set(calls)
    assert type(calls["Stepper"][0]["optimizer"]) is SGD
    assert calls.all("build_classifier", "dtype") == ["float32"]
    assert calls.all("training", "split") == ["fit"] * 7  # by way of the pipeline
    assert calls.all("share", "share") == ["its share"] * 7


def test_a_model_that_is_fine_tuned_arrives(tmp_path, monkeypatch):
    started = {"init": "rn34_sw.mine", "initializer": "glorot_uniform", "zero_gamma": False}
    calls = spied_run(TrainConfig(**(CHANGED | started)), tmp_path, monkeypatch)
    (given,) = calls["replace_head"]
    assert given["model"] == "model rn34_sw.mine"
    assert (given["num_classes"], given["head"]) == (5, "linear")
    assert given["changes"] == {
        "feature_norm": "l2", "frame": "orthogonal", "scale": 3.5, "seed": 3,
        "input_shape": (48, 48, 3), "crop": 0.7,
        "class_names": tuple("abcde"), "dtype": "mixed_float16",
    }  # fmt: skip
    assert not {"build_classifier", "initialize"} & set(calls)


def test_a_batch_at_least_and_something_to_evaluate_on(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(build, "Pipeline", lambda *args: Images(calls, 48))
    whole = TrainConfig(**CHANGED | {"batch_size": SIZES["fit"], "skip_corrupt": False})
    build.make_pipeline(whole, PICTURES, network(calls))
    more = dataclasses.replace(whole, batch_size=SIZES["fit"] + 1)
    with pytest.raises(EtfzooError, match="has 79 images, fewer than one batch; .*=19` or less"):
        build.make_pipeline(more, PICTURES, network(calls))
    monkeypatch.setitem(SIZES, "select", 0)
    with pytest.raises(EtfzooError, match="the evaluation split of pictures is empty"):
        build.make_pipeline(whole, PICTURES, network(calls))


# Selection: what is fitted on what, and compared by what.


def test_a_search_compares_by_the_metric_of_the_data_set(tmp_path, monkeypatch):
    seen = []

    def train(config, workdir, pretrained):
        seen.append(config)
        return {"top1": config.learning_rate, "mean_per_class": 1 - config.learning_rate}

    monkeypatch.setattr(search, "get_strategy", lambda *args: Strategy())
    monkeypatch.setattr(search, "resolve", lambda *args: PICTURES)
    monkeypatch.setattr(loop, "train_and_evaluate", train)
    config = TrainConfig(**CHANGED | {"epochs": 20, "init": None})
    best = search.pick(config, tmp_path, (0.3, 0.1, 0.2), (0.0, 1e-3), epochs=10)
    assert (best.learning_rate, best.weight_decay) == (0.1, 0.0)
    assert best == dataclasses.replace(config, learning_rate=0.1, weight_decay=0.0)
    rows = Workdir(tmp_path).read_selection()
    assert [row["mean_per_class"] for row in rows] == pytest.approx([0.7, 0.7, 0.9, 0.9, 0.8, 0.8])
    pairs = [(c.learning_rate, c.weight_decay) for c in seen]
    assert pairs == [(rate, decay) for rate in (0.3, 0.1, 0.2) for decay in (0.0, 1e-3)]
    for candidate in seen:
        assert (candidate.train_split, candidate.eval_split) == ("fit", "select")
        assert (candidate.epochs, candidate.warmup_epochs) == (10, 0.75)
        assert (candidate.step_epochs, candidate.neural_collapse_every) == ((1, 2), 0)


def test_a_search_widens_its_grid_until_the_best_lies_inside(tmp_path, monkeypatch):
    def train(config, workdir, pretrained):
        return {"top1": 0.5, "mean_per_class": 1 - abs(config.learning_rate - 0.03)}

    monkeypatch.setattr(search, "get_strategy", lambda *args: Strategy())
    monkeypatch.setattr(search, "resolve", lambda *args: PICTURES)
    monkeypatch.setattr(loop, "train_and_evaluate", train)
    best = search.pick(TrainConfig("x"), tmp_path, (0.1, 0.3), (0.0, 1e-3), widen=True)
    assert (best.learning_rate, best.weight_decay) == (0.0333333, 0.0)
    rows = Workdir(tmp_path).read_selection()[::2]
    assert [row["learning_rate"] for row in rows] == [0.1, 0.3, 0.0333333, 0.0111111]
    assert [row["widened"] for row in rows] == [False, False, True, True]


ROLES = {"fit": 60, "select": 30, "test": 40, "train": 90}


@pytest.fixture
def frozen(monkeypatch):
    """Features of four different splits, and which of them each step of a transfer is given."""
    rng = np.random.default_rng(0)
    splits = {}
    for role, count in ROLES.items():
        labels = np.arange(count) % 5
        splits[role] = Features(rng.normal(size=(count, 4)) + labels[:, None], labels)
    name = {id(found.labels): role for role, found in splits.items()}
    calls = Calls(loaded=[])
    model = network(calls)
    monkeypatch.setattr(transfer, "resolve", lambda *args: PICTURES)
    monkeypatch.setattr(build, "make_model", lambda *args: model)
    monkeypatch.setattr(build, "make_pipeline", lambda *args: Images(calls, 48))
    monkeypatch.setattr(transfer.hardware, "write", lambda *args: None)

    def load(pipeline, split, cache):
        calls.note("load", split=split, cache=cache)
        return splits[split]

    monkeypatch.setattr(transfer.features, "Extractor", lambda model: Part(load=load))

    def noting(function, *places):
        real = getattr(transfer, function)

        def spied(*args, **kwargs):
            calls.note(function, on=tuple(name[id(args[i].labels)] for i in places))
            return real(*args, **kwargs)

        monkeypatch.setattr(transfer, function, spied)

    noting("_fit", 0)
    noting("_logits", 0)
    noting("_neighbours", 0, 1)
    score = accuracy.accuracy

    def scored(labels, predicted, num_classes, metric="top1"):
        calls.note("accuracy", on=name[id(labels)], metric=metric)
        return score(labels, predicted, num_classes, metric)

    monkeypatch.setattr(accuracy, "accuracy", scored)
    calls.model, calls.splits = model, splits
    return calls


FROZEN = {
    "init": "x", "initializer": "glorot_uniform", "zero_gamma": False, "strategy": "auto",
    "train_split": "train", "eval_split": "test",
}  # fmt: skip


def test_knn_picks_k_on_the_selection_split(frozen, tmp_path):
    config = TrainConfig(**CHANGED | FROZEN)
    result = transfer.knn(config, tmp_path, (1, 5), "cache")
    assert frozen.all("load", "split") == ["fit", "select", "train", "test"]
    assert set(frozen.all("load", "cache")) == {"cache"}
    assert frozen.all("_neighbours", "on") == [("fit", "select"), ("train", "test")]
    by = [(a["on"], a["metric"]) for a in frozen["accuracy"]]
    assert by == [("select", "mean_per_class")] * 2 + [("test", "top1"), ("test", "mean_per_class")]
    assert result["examples"] == ROLES["test"]
    assert transfer.knn(config, tmp_path) == result and len(frozen["load"]) == 4  # not again
    with pytest.raises(EtfzooError, match="holds a run that is not a linear probe"):
        transfer.linear_probe(config, tmp_path)


def test_a_probe_picks_its_strength_on_the_selection_split(frozen, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(backend, "evaluation_step", lambda model: Part(model=model))
    monkeypatch.setattr(accuracy, "predict", lambda step, batches: predictions(0))
    monkeypatch.setattr(
        transfer, "CheckpointManager", lambda workdir: Part(save=lambda *a: seen.update(saved=a))
    )
    config = TrainConfig(**CHANGED | FROZEN)
    result = transfer.linear_probe(config, tmp_path, (1e-3, 1e-1, 10.0), "cache")
    assert frozen.all("_fit", "on") == [("fit",), ("train",)]
    assert set(frozen.all("_logits", "on")) == {("select",)}
    assert {(a["on"], a["metric"]) for a in frozen["accuracy"]} == {("select", "mean_per_class")}
    assert frozen.all("evaluation", "split") == ["test"]
    # The head is the probe of the training split, and that model is kept.
    x, y = frozen.splits["train"]
    wanted = LogisticRegression(C=result["C"], tol=1e-8, max_iter=10_000)
    wanted.fit((x - x.mean(0)) / x.std(0), y)
    head = frozen.model.get_layer("logits")
    kernel = wanted.coef_.T / x.std(0)[:, None]
    np.testing.assert_allclose(head.kernel, kernel, rtol=0, atol=1e-4)
    np.testing.assert_allclose(head.bias, wanted.intercept_ - x.mean(0) @ kernel, rtol=0, atol=1e-3)
    assert seen["saved"][1] is frozen.model
    # Collapse measures are those of the splits that the run is named after.
    for role in ("train", "test"):
        collected = neural_collapse.NeuralCollapseStatistics(5, 4)
        collected.update(*frozen.splits[role])
        wanted = collected.result()["nc1_ratio"]
        assert result[f"nc/{role}/nc1_ratio"] == pytest.approx(wanted)


# One real run, against a training written out.


@pytest.fixture(scope="module")
def trained(embedded_dir, tmp_path_factory):
    """Workdir, result and data of a run of 3 epochs of a step: rounding grows from step to step."""
    row = dataclasses.replace(
        DATASETS["digits"], train="train[:20%]", fit="train[20%:65%]", select="validation[:30%]",
        test="test[:10%]", metric="mean_per_class",
    )  # fmt: skip
    config = TrainConfig(
        "digits", data_dir=str(embedded_dir), train_split="fit", eval_split="select",
        backbone="rn18", feature_norm="bn", scale=3.0, mean=(120.0,) * 3, std=(60.0,) * 3,
        image_size=16, crop=1.0, augment="shift", flip=True, epochs=3, batch_size=80, seed=3,
        learning_rate=0.0002, warmup_epochs=1.0, momentum=0.8, nesterov=True, weight_decay=0.5,
        decay_all=True, label_smoothing=0.2, eval_every=2, keep_checkpoints=1,
    )  # fmt: skip
    workdir = Workdir(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", row)
        result = loop.train_and_evaluate(config, workdir)
        yield workdir, result, resolve("digits", config.data_dir)


def by_hand(source):
    """The same training without the code of `etfzoo.training` and `etfzoo.runtime`."""
    keras.utils.set_random_seed(3)
    model = etfzoo.build_classifier(
        "rn18", 10, "etf", "bn", (16, 16, 3), feature_norm="bn", scale=3.0, seed=3,
        mean=(120.0,) * 3, std=(60.0,) * 3, crop=1.0,
    )  # fmt: skip
    images = Pipeline(source, 16, 16, 1.0, 80, Augmentation("shift", flip=True), seed=3)
    start = [np.array(v.value) for v in model.variables]
    variables = model.trainable_variables
    velocity = [np.zeros(v.shape, np.float32) for v in variables]
    losses = []
    for epoch, rate in enumerate((0.0, 0.0002, 0.0001)):  # a warm-up, then a cosine of two steps
        ((pixels, labels),) = images.training("fit", epoch)
        target = 0.8 * np.eye(10)[labels] + 0.02
        with tf.GradientTape() as tape:
            logits = model(pixels, training=True)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(target, logits))
        gradients = tape.gradient(loss, [v.value for v in variables])
        for i, (v, g) in enumerate(zip(variables, gradients, strict=True)):
            step = rate * (g.numpy() + 0.5 * np.array(v.value))
            velocity[i] = 0.8 * velocity[i] - step
            v.assign_add(0.8 * velocity[i] - step)
        losses.append(float(loss))
    logits, labels = (
        np.concatenate(part)
        for part in zip(
            *((model(x, training=False), y) for x, y in images.evaluation("select")), strict=True
        )
    )
    return start, model, losses, logits, labels


def test_a_run_is_the_training_written_out(trained):
    workdir, result, source = trained
    start, model, losses, logits, labels = by_hand(source)
    rows = workdir.history()
    assert [row["epoch"] for row in rows if "top1" in row] == [2, 3] and rows[-1] == result
    np.testing.assert_allclose([row["train_loss"] for row in rows], losses, rtol=1e-5)
    there = load_model(workdir)
    for found, wanted, first in zip(there.variables, model.variables, start, strict=True):
        way = np.abs(wanted.value - first).max()
        np.testing.assert_allclose(found.value, wanted.value, rtol=0, atol=0.02 * way + 1e-7)
    np.testing.assert_array_equal(
        there.get_layer("logits").kernel, model.get_layer("logits").kernel
    )
    assert result["examples"] == len(labels) == 90
    assert result["top1"] == pytest.approx(np.mean(logits.argmax(1) == labels), abs=1.01 / 90)
    p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -(0.8 * p[np.arange(len(labels)), labels] + 0.02 * p.sum(1)).mean()
    assert result["loss"] == pytest.approx(loss, rel=1e-4)

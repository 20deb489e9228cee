"""A run of a moment: its parts write down what they are given, and compute nothing."""

import contextlib
import dataclasses
import inspect
import types

import keras
import numpy as np
from config_test import OTHER

from etfzoo.data.augmentation import Augmentation
from etfzoo.data.datasets import Dataset
from etfzoo.data.source import Source
from etfzoo.measure import accuracy
from etfzoo.runtime import backend
from etfzoo.training import build, loop, optimizers

# 3 replicas take 4 images each; 6 steps an epoch.
CHANGED = OTHER | {"batch_size": 12, "checkpoint_every": 7}
REPLICAS, STEPS = 3, 6
SGD = keras.optimizers.SGD
ROW = Dataset("pictures", 5, fit="one", select="two", test="three", metric="mean_per_class")
SIZES = {"train": 300, "fit": 12 * STEPS + 7, "select": 20, "test": 40}
COUNTS = {"fit": [40, 20, 12, 7, 0]}
SCORES = (0.5, 0.8, 0.6, 0.7)  # of the evaluations: the second is the best


class Pictures(Source):
    """A data set of no images."""

    def size(self, split):
        return SIZES[split]

    def class_counts(self, split):
        return np.array(COUNTS[split])


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
        self.calls, self.side, self.batch_size, self.source = calls, side, 12, source
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
        input_shape=(side, side, 3), crop=0.7, num_classes=5, head="linear", guided=False,
        penultimate="features", mean=(1.0, 2.0, 3.0),
    )  # fmt: skip
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


def noted(calls, kind):
    """A class that notes with what its objects are made."""

    def __init__(self, *args, **kwargs):
        calls.note(kind.__name__, **kwargs)
        kind.__init__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__init__": __init__})


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
    replace(loop, "check_batch_size", loop.check_batch_size)
    replace(loop, "resolve", lambda a: PICTURES)
    replace(loop, "WeightAverage", lambda a: Part(model=network(calls)))
    replace(loop, "CheckpointManager", lambda a: checkpoints(calls))
    replace(loop.features, "Extractor", lambda a: extractor(calls))
    replace(accuracy, "predict", lambda a: predictions(len(calls["predict"]) - 1))
    patch.setattr(loop.hardware, "write", lambda *args: None)
    replace(keras.utils, "set_random_seed")
    replace(build, "build_classifier", lambda a: network(calls))
    replace(build, "with_fresh_head", lambda a: network(calls))
    patch.setattr("etfzoo.training.build.read", lambda handle: f"model {handle}")
    replace(build.initialization, "initialize")
    replace(build, "readable", lambda a: READABLE)
    replace(build, "long_tailed", lambda a: a["source"])
    replace(build, "Pipeline", lambda a: Images(calls, a["height"], a["source"]))
    replace(build, "Augmentation", Augmentation)
    replace(build, "Mixing", build.Mixing)
    replace(build, "freeze")
    replace(optimizers, "layer_rates", lambda a: [a["decay"]] * 4)
    patch.setattr(keras.optimizers, "SGD", noted(calls, SGD))
    replace(backend, "Stepper", lambda a: stepper(calls))
    replace(backend, "device_cache", lambda a: Images(calls, a["pipeline"].side))
    replace(backend, "evaluation_step", lambda a: Part(model=a["model"]))
    patch.setattr(backend, "distribute", lambda strategy, of: of("its share"))
    for name in ("set_determinism", "synchronize", "use_full_float32"):
        replace(backend, name)
    loop.train_and_evaluate(config, workdir)
    return calls

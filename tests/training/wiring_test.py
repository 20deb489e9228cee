"""What a configuration says arrives where it is meant: no setting of the run here is a default."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from config_test import ALONE, FIELDS
from spies import (
    CHANGED,
    PICTURES,
    READABLE,
    SCORES,
    SGD,
    SIZES,
    STEPS,
    Calls,
    Images,
    network,
    spied_run,
)

from etfzoo.errors import EtfzooError
from etfzoo.runtime import losses
from etfzoo.training import build
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir


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
    "learn_scale": {"build_classifier": "learn_scale"},
    "projector_layers": {"build_classifier": "projector_layers"},
    "projector_width": {"build_classifier": "projector_width"},
    "projector_kind": {"build_classifier": "projector_kind"},
    "guided": {"build_classifier": "guided"},
    "entropy_weight": {"Stepper": "entropy_weight"},
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
    "random_erasing": {"Augmentation": "random_erasing"},
    "batch_size": {"Pipeline": "batch_size"},
    "imbalance": {"long_tailed": "imbalance"},
    "momentum": {"SGD": "momentum"},
    "layer_decay": {"layer_rates": "decay"},
    "freeze": {"freeze": "names"},
    "clip_norm": {"Stepper": "clip_norm"},
    "accumulate_steps": {"Stepper": "accumulate_steps", "check_batch_size": "parts"},
    "nesterov": {"SGD": "nesterov"},
    "weight_decay": {"Stepper": "weight_decay"},
    "decay_all": {"Stepper": "decay_all"},
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


def loss_of(run):
    """The options of the training loss, which is one at all sizes of the images."""
    (loss,) = set(run.all("Stepper", "loss"))
    assert loss.func is losses.cross_entropy
    assert loss.keywords.keys() == {"label_smoothing", "adjustment", "class_weights"}
    return loss.keywords


def by_effective_number(beta):
    counts = np.array([40, 20, 12, 7, 1])
    weights = (1 - beta) / (1 - beta**counts)
    return pytest.approx(weights * 79 / (weights * [40, 20, 12, 7, 0]).sum(), rel=1e-12)


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
    "label_smoothing": lambda run: (
        (loss_of(run)["label_smoothing"], run.all("evaluation_step", "label_smoothing")),
        (0.07, [0.07]),
    ),
    "logit_adjustment": lambda run: (
        loss_of(run)["adjustment"],
        pytest.approx(1.5 * np.log(np.array([40, 20, 12, 7, 1]) / 80), rel=1e-12),
    ),
    "class_balance": lambda run: (loss_of(run)["class_weights"], by_effective_number(0.9)),
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
    # The second of four evaluations, after epoch 4 of 7, is the best: none ends the run.
    "early_stopping": lambda run: (run.workdir.read_result()["stopped_after"], 7),
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


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ALONE])
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
    assert (augmentation.random_erasing, augmentation.mean) == (0.4, (1.0, 2.0, 3.0))
    assert len(run["use_full_float32"]) == 1  # whitening needs it


def test_the_best_epoch_is_the_one_that_scored_best(run):
    assert [a["epoch"] for a in run["save"] if a["best"]] == [2, 4]
    result = run.workdir.read_result()
    assert result["top1"] == SCORES[1] and result["epoch"] == 4 and result["step"] == 24
    rows = run.workdir.history()
    assert rows[3] | {"stopped_after": 7} == result and rows[-1]["top1"] == SCORES[-1]
    assert [row["step"] for row in rows] == list(range(6, 43, 6))
    assert [row["train_loss"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["train_top1"] for row in rows] == [n / 12 for n in (1, 2, 3, 4, 5, 6, 7)]


def test_a_run_ends_after_epochs_that_brought_nothing(tmp_path, monkeypatch):
    early = {"early_stopping": 2, "eval_every": 1, "image_size_schedule": ()}
    calls = spied_run(TrainConfig(**(CHANGED | early)), tmp_path, monkeypatch)
    result = Workdir(tmp_path).read_result()
    assert (result["epoch"], result["stopped_after"], result["top1"]) == (2, 4, SCORES[1])
    assert calls.all("training", "epoch") == [0, 1, 2, 3]
    assert [a["epoch"] for a in calls["save"] if a["best"]] == [1, 2]


def test_a_deterministic_run_leaves_xla_off(tmp_path, monkeypatch):
    plain = {"deterministic": True, "jit_compile": None, "cache": "none", "ema": 0.0}
    plain |= {"mixed_precision": "none", "norm": "bn", "skip_corrupt": False, "layer_decay": 1.0}
    plain |= {"early_stopping": 0, "freeze": ()}
    calls = spied_run(TrainConfig(**(CHANGED | plain)), tmp_path, monkeypatch)
    assert set(calls.all("Stepper", "jit_compile")) == {False}
    assert calls.all("set_determinism", "deterministic") == [True]
    assert not {"device_cache", "WeightAverage", "use_full_float32", "readable"} & set(calls)
    assert type(calls["Stepper"][0]["optimizer"]).__mro__[1] is SGD and "freeze" not in calls
    assert Workdir(tmp_path).read_result()["epoch"] == 7
    assert calls.all("build_classifier", "dtype") == ["float32"]
    assert calls.all("training", "split") == ["fit"] * 7  # by way of the pipeline
    assert calls.all("share", "share") == ["its share"] * 7


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_another_optimizer_takes_the_decay(tmp_path, monkeypatch, optimizer):
    plain = {"optimizer": optimizer, "momentum": 0.9, "nesterov": False}
    calls = spied_run(TrainConfig(**(CHANGED | plain)), tmp_path, monkeypatch)
    assert set(calls.all("Stepper", "weight_decay")) == {0.0}
    inner = calls["Stepper"][0]["optimizer"].inner_optimizer
    kinds = {"adamw": keras.optimizers.Adam, "lamb": keras.optimizers.Lamb}
    assert isinstance(inner, kinds[optimizer]) and inner.name == optimizer
    assert inner.decays == [CHANGED["weight_decay"]] * 4 and inner.rates == [0.7] * 4


def test_a_model_that_is_fine_tuned_arrives(tmp_path, monkeypatch):
    started = {"init": "rn34_sw.mine", "initializer": "glorot_uniform", "zero_gamma": False}
    calls = spied_run(TrainConfig(**(CHANGED | started)), tmp_path, monkeypatch)
    (given,) = calls["with_fresh_head"]
    assert given["stored"] == "model rn34_sw.mine"
    assert (given["num_classes"], given["head"]) == (5, "linear")
    assert given["changes"] == {
        "feature_norm": "l2", "frame": "orthogonal", "scale": 3.5, "learn_scale": True,
        "guided": True, "projector_layers": 2, "projector_width": 96, "projector_kind": "etf",
        "seed": 3, "input_shape": (48, 48, 3), "crop": 0.7,
        "class_names": tuple("abcde"), "dtype": "mixed_float16",
    }  # fmt: skip
    assert not {"build_classifier", "initialize"} & set(calls)


def test_a_batch_at_least_and_something_to_evaluate_on(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(build, "Pipeline", lambda *args: Images(calls, 48))
    plain = {"skip_corrupt": False, "accumulate_steps": 1}
    whole = TrainConfig(**CHANGED | plain | {"batch_size": SIZES["fit"]})
    build.make_pipeline(whole, PICTURES, network(calls))
    more = dataclasses.replace(whole, batch_size=SIZES["fit"] + 1)
    with pytest.raises(EtfzooError, match="has 79 images, fewer than one batch; .*=19` or less"):
        build.make_pipeline(more, PICTURES, network(calls))
    monkeypatch.setitem(SIZES, "select", 0)
    with pytest.raises(EtfzooError, match="the evaluation split of pictures is empty"):
        build.make_pipeline(whole, PICTURES, network(calls))

"""The settings of a run: their declarations, checks and flags."""

import dataclasses
import json
import math
import typing

import pytest

from etfzoo.data import augmentation
from etfzoo.errors import EtfzooError
from etfzoo.layers import frames
from etfzoo.layers.etf_classifier import FEATURE_NORMS
from etfzoo.models.classifier import ClassifierSpec
from etfzoo.runtime import losses
from etfzoo.training import protocols
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import Job
from etfzoo.training.settings import kind_of
from testing import fresh_python

pytestmark = pytest.mark.small_rn18

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}

# What goes with few of the others.
ALONE = {"init", "keep_head", "loss", "optimizer", "class_weights"}
# A value of each other setting: no default, no protocol's value and not that of a data set's row.
OTHER = {
    "dataset": "folder:photos", "data_dir": "/data", "train_split": "fit", "eval_split": "select",
    "backbone": "rn34", "head": "linear", "norm": "sw", "feature_norm": "l2", "scale": 3.5,
    "frame": "orthogonal", "learn_scale": True, "guided": True, "projector_layers": 2,
    "projector_width": 96, "projector_kind": "etf", "entropy_weight": 0.05,
    "initializer": "he_fan_out", "zero_gamma": True, "mean": (1.0, 2.0, 3.0),
    "std": (4.0, 5.0, 6.0), "image_size": 48, "image_size_schedule": ((16, 2), (24, 1)),
    "crop": 0.7, "augment": "shift", "min_area": 0.31, "antialias": False, "flip": False,
    "protocol": "quickstart", "epochs": 7, "batch_size": 36, "learning_rate": 0.037,
    "learning_rate_scaling": "sqrt", "schedule": "step", "warmup_epochs": 1.5,
    "step_epochs": (2, 5), "step_factor": 0.37, "momentum": 0.77, "nesterov": True,
    "clip_norm": 1.5, "accumulate_steps": 2, "layer_decay": 0.7, "freeze": ("stem", "stage2"),
    "early_stopping": 4,
    "weight_decay": 3e-5, "decay_all": True, "logit_adjustment": 1.5, "class_balance": 0.9,
    "label_smoothing": 0.07, "mixup": 0.3, "cutmix": 0.6, "rand_augment": 3.0,
    "random_erasing": 0.4, "ema": 0.97,
    "mixed_precision": "float16", "seed": 3,
    "deterministic": False, "strategy": "mirrored", "tpu": "local", "num_virtual_devices": 2,
    "cache": "device", "synchronize_norms": False, "steps_per_execution": 4, "jit_compile": True,
    "eval_every": 2, "neural_collapse_every": 3, "checkpoint_every": 11, "keep_checkpoints": 5,
    "imbalance": 10.0, "skip_corrupt": True,
}  # fmt: skip


def test_every_setting_is_declared_whole():
    assert set(OTHER) | ALONE == set(FIELDS)
    for name, field in FIELDS.items():
        assert field.metadata["group"] and len(field.metadata["help"]) > 5, name
        if name != "dataset" and name not in ALONE:
            assert field.default != OTHER[name], name
    TrainConfig("digits")  # the defaults go together


def test_every_number_has_limits():
    for name, field in FIELDS.items():
        kind, _ = kind_of(field)
        if {int, float} & {kind, *typing.get_args(kind)}:
            assert math.isfinite(field.metadata["low"] + field.metadata["high"]), name


def test_names_that_a_setting_may_be_are_those_of_what_takes_them():
    choices = {name: field.metadata["choices"] for name, field in FIELDS.items()}
    assert choices["feature_norm"] == FEATURE_NORMS
    assert choices["frame"] == tuple(frames.FRAMES)
    assert choices["augment"] == augmentation.CROPS
    assert choices["loss"] == tuple(losses.LOSSES)
    for head in choices["head"]:
        ClassifierSpec("rn18", 5, head)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("nesterov", "false", "nesterov must be true or false; got 'false'"),
        ("flip", "no", "flip must be true or false"),
        ("flip", 1, "flip must be true or false"),
        ("epochs", 1.5, "epochs must be a whole number; got 1.5"),
        ("epochs", True, "epochs must be a whole number"),
        ("epochs", 0, "epochs must be between 1 and 1000000; got 0"),
        ("batch_size", 0, "batch_size must be between 1 and"),
        ("projector_layers", 4, "projector_layers must be between 0 and 3; got 4"),
        ("projector_layers", True, "projector_layers must be a whole number"),
        ("projector_width", 64, "a projector without a hidden layer is linear, .*in disguise"),
        ("projector_kind", "etf", "no projector: with `projector_kind=etf` give `proj"),
        ("projector_kind", "frozen", "unknown projector_kind 'frozen'; known: etf, trained"),
        ("guided", 1, "guided must be true or false; got 1"),
        ("entropy_weight", -0.1, "entropy_weight must be between 0 and 100; got -0.1"),
        ("step_epochs", [-3], "step_epochs must be between 0 and 1000000; got -3"),
        ("step_epochs", [1.5], "step_epochs must be a whole number"),
        ("scale", True, "scale must be a number"),
        ("mean", 3, "mean must be a list; got 3"),
        ("mean", "123", "mean must be a list"),
        ("std", [1.0, "x", 2.0], "std must be a number; got 'x'"),
        ("learning_rate", float("nan"), "learning_rate must be between 0 and 1000000; got nan"),
        ("learning_rate", "fast", "learning_rate must be a number"),
        ("learning_rate", 10**400, "learning_rate must be between 0 and"),
        ("mean", [1, 2], "mean must be 3 values"),
        ("mean", {"a": 1}, "mean must be a list"),
        ("mean", [300, 1, 1], "mean must be between 0 and 255; got 300"),
        ("std", [0, 1, 1], "std must be between 0.001 and 255; got 0"),
        ("scale", 0, "scale must be between 1e-06 and"),
        ("seed", -1, "seed must be between 0 and 4294967295; got -1"),
        ("seed", 2**32, "seed must be between 0 and 4294967295"),
        ("num_virtual_devices", 100_000, "num_virtual_devices must be between 1 and 64"),
        ("protocol", "papr", "unknown protocol 'papr'; did you mean paper"),
        ("dataset", "", "dataset must be 1 to 4096 letters"),
        ("train_split", "a\nb", "train_split must be 1 to 4096 letters in one line"),
        ("data_dir", "~nobody-of-this-name", "no home folder is known"),
        ("data_dir", "y" * 256, "a name of more than 255 bytes"),
        ("loss", "mse", "unknown loss 'mse'; known: cross_entropy, dot_regression, squared_error"),
        ("logit_adjustment", -1, "logit_adjustment must be between 0 and 100; got -1"),
        ("class_balance", 1.1, "class_balance must be between 0 and 1; got 1.1"),
        ("class_weights", [1, -1], "class_weights must be between 0 and 1000000; got -1"),
        ("freeze", ["stage5"], "unknown freeze 'stage5'; did you mean stage"),
        ("layer_decay", 1.5, "layer_decay must be between 0 and 1; got 1.5"),
        ("imbalance", 0.5, "imbalance must be between 1 and 1000000; got 0.5"),
        ("imbalance", float("nan"), "imbalance must be between 1 and"),
        ("crop", 1.2, "crop must be between 0.01 and 1; got 1.2"),
        ("dataset", None, "dataset must be text"),
        ("workers", 3, "unexpected keyword"),
        ("backbone", "rn19", "unknown backbone 'rn19'; did you mean rn18"),
        ("seed", "0", "seed must be a whole number"),
        ("warmup_epochs", 101, "warmup_epochs must be between 0 and 100"),
        ("image_size_schedule", [[16, 100]], "leaves none of the 100 epochs"),
        ("image_size_schedule", [[16, 1, 1]], "must be pairs"),
        ("image_size_schedule", [16], "must be pairs"),
        ("image_size_schedule", "16:1", "must be a list"),
        ("image_size_schedule", [[16.5, 1]], "must be a whole number; got 16.5"),
        ("image_size_schedule", [[16, 0]], "must be between 1 and 8192; got 0"),
        ("image_size_schedule", [[9000, 1]], "must be between 1 and 8192"),
    ],
)
def test_bad_values_are_named(name, value, message):
    with pytest.raises((EtfzooError, TypeError), match=message):
        TrainConfig(**{"dataset": "digits", name: value})


@pytest.mark.parametrize("loss", ["dot_regression", "squared_error"])
def test_what_only_the_cross_entropy_takes(loss):
    for other in ({"label_smoothing": 0.1}, {"logit_adjustment": 1}):
        with pytest.raises(EtfzooError, match=f"set them to 0 with `loss={loss}`"):
            TrainConfig("digits", loss=loss, **other)
    config = TrainConfig("digits", loss=loss, class_balance=0.9, mixup=0.2)
    there = TrainConfig("digits", class_balance=0.9, mixup=0.2)
    assert there.differences(config) == [f"loss cross_entropy there, {loss} here"]


def test_neighbours_take_two_images():
    with pytest.raises(EtfzooError, match="asks for neighbours: give `batch_size=2` or more"):
        TrainConfig("digits", batch_size=1, entropy_weight=0.05)
    TrainConfig("digits", batch_size=2, entropy_weight=0.05)


def test_parts_of_a_batch_are_equal_and_large_enough():
    with pytest.raises(EtfzooError, match="`accumulate_steps=3` does not divide `batch_size=128`"):
        TrainConfig("digits", accumulate_steps=3)
    with pytest.raises(EtfzooError, match="give `batch_size=128` or more"):
        TrainConfig("digits", batch_size=64, accumulate_steps=64, entropy_weight=0.1)


def test_classes_are_weighed_once():
    with pytest.raises(EtfzooError, match="both weigh the classes: leave one of them out"):
        TrainConfig("digits", class_weights=(1, 2), class_balance=0.9)
    config = TrainConfig("digits", class_weights=[1, 2])
    assert config.class_weights == (1, 2)
    assert config.differences(TrainConfig("digits")) == ["class_weights (1, 2) there, () here"]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_what_only_sgd_takes(optimizer):
    for other in ({"momentum": 0.8}, {"nesterov": True}):
        with pytest.raises(EtfzooError, match=f"`nesterov=False`, with `optimizer={optimizer}`"):
            TrainConfig("digits", optimizer=optimizer, **other)
    config = TrainConfig("digits", optimizer=optimizer)
    assert TrainConfig("digits").differences(config) == [f"optimizer sgd there, {optimizer} here"]


def test_a_file_gives_back_every_setting(tmp_path):
    values = OTHER | {"deterministic": False, "init": None}
    config = TrainConfig(**values)
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["image_size_schedule"] == [[16, 2], [24, 1]]  # flat, and nothing but JSON
    # A file from before a setting was added has the default.
    del document["antialias"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert TrainConfig.load(tmp_path / "config.json").antialias is True


RUNTIME = {
    "data_dir", "strategy", "tpu", "num_virtual_devices", "steps_per_execution", "jit_compile",
    "checkpoint_every", "keep_checkpoints",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_what_may_differ_when_a_run_is_resumed(name):
    config = TrainConfig(**(OTHER | {"jit_compile": None}))
    others = {"dataset": "digits", "jit_compile": True, "projector_layers": 1}
    value = others.get(name, FIELDS[name].default)
    differences = config.differences(dataclasses.replace(config, **{name: value}))
    if name in RUNTIME:
        assert differences == []
    else:
        assert len(differences) == 1 and differences[0].startswith(f"{name} ")


_FLAGS = """
import json, sys
from etfzoo.cli import configs, finetune, flags, pretrain

command, given, known = json.loads(sys.argv[1])
{"pretrain": pretrain, "finetune": finetune}[command].app.run = lambda *args, **options: None
{"pretrain": pretrain, "finetune": finetune}[command].run()
flags.FLAGS(["x", *given])
config = configs.train_config(command, **known)
print(json.dumps({name: getattr(config, name) for name in config.__dataclass_fields__}))
"""


def from_flags(command, given, **known):
    return json.loads(fresh_python(_FLAGS, json.dumps([command, given, known])))


def as_flag(name, value):
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    if isinstance(value, tuple):
        value = ",".join(":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return f"--{name}={value}"


def test_every_setting_has_a_flag_that_arrives():
    given = [as_flag(name, value) for name, value in OTHER.items() if name != "learning_rate"]
    found = from_flags("pretrain", given, learning_rate=OTHER["learning_rate"])
    wanted = dataclasses.asdict(TrainConfig(**OTHER))
    assert found == json.loads(json.dumps(wanted))


@pytest.mark.parametrize("init", [None, "runs/a"])
def test_the_arguments_of_a_job_give_its_config(init):
    other = OTHER | {"init": init}
    if init:  # these belong to new models
        other |= {"initializer": "glorot_uniform", "zero_gamma": False}
    config = TrainConfig(**other)
    job = Job(config, "runs/b", feature_cache=None)
    *given, workdir = [text for text in job.arguments() if not text.startswith("--mode")]
    assert workdir == "--workdir=runs/b"
    known = {"learning_rate": config.learning_rate}  # a flag that takes several
    known |= {"weight_decay": config.weight_decay} if init else {}
    if init:
        model = ("init", "backbone", "norm", "mean", "std", "feature_norm", "frame", "scale",
                 "learn_scale", "guided", "projector_layers", "projector_width",
                 "projector_kind")  # fmt: skip
        known |= {name: getattr(config, name) for name in model}
    given = [text for text in given if text.partition("=")[0][2:] not in ("model", *known)]
    found = from_flags(job.command, given, **known)
    assert found == json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_loss_has_a_flag_that_arrives(command):
    known = {"init": "runs/a"} if command == "finetune" else {}
    config = TrainConfig("digits", loss="squared_error", **known)
    assert "--loss=squared_error" in Job(config, "runs/b").arguments()
    found = from_flags(command, ["--loss=squared_error", "--class_balance=0.99"], **known)
    assert found["loss"] == "squared_error" and found["class_balance"] == 0.99


def test_flags_left_alone_come_from_the_protocol_the_row_and_the_declaration():
    found = from_flags("pretrain", ["--protocol=small", "--dataset=digits", "--backbone=rn18"])
    assert found["mixed_precision"] == "bfloat16" and found["image_size"] == 64
    assert found["weight_decay"] == 5e-4 and found["warmup_epochs"] == 2
    assert found["flip"] is False and found["checkpoint_every"] == 500
    found = from_flags("finetune", ["--dataset=cifar10"], init="x", backbone="rn18")
    row = protocols.settings("standard", "finetune", "rn18", None)
    assert {name: found[name] for name in ("epochs", "batch_size", "nesterov")} == {
        name: row[name] for name in ("epochs", "batch_size", "nesterov")
    }
    assert found["head"] == "linear" and found["protocol"] == "standard"


def test_a_config_takes_neither_keras_nor_tensorflow():
    code = """
import sys
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import Job
TrainConfig("digits")
print({"keras", "tensorflow", "keras_cv", "jax"} & set(sys.modules))
"""
    assert fresh_python(code).strip() == "set()"


def test_settings_in_texts_of_the_library_become_flags():
    code = """
from etfzoo.cli import flags
flags.settings("batch_size", "flip", "data_dir")
flags.FLAGS(["x"])
text = "pass `batch_size=4` or less, `flip` or `flip=False`; `data_dir`, not `nothing=1` or `a b`"
print(flags.as_flags(text))
"""
    assert fresh_python(code).strip() == (
        "pass --batch_size=4 or less, --flip or --noflip; --data_dir, not `nothing=1` or `a b`"
    )

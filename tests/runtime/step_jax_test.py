"""JAX: the arithmetic of TensorFlow on any number of devices, and runs that change backends."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

import etfzoo
from etfzoo.data.sources import resolve
from etfzoo.measure import accuracy
from etfzoo.models import checkpoint, table
from etfzoo.training import loop
from etfzoo.training.config import TrainConfig
from testing import (
    CHECKOUT,
    assert_same_in_float64,
    fresh_python,
    last_checkpoint,
    make_image_folder,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="JAX is not installed"
)


# Keras rounds all 64-bit results to 32 bits on JAX; exact comparisons lift that.
_FLOAT64 = """
import keras
if keras.backend.backend() == "jax":
    import jax
    from keras.src.backend.common import dtypes
    jax.config.update("jax_enable_x64", True)
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
"""


_RN18 = table.BACKBONES["rn18"]
# A ResNet of 5 blocks: what is compared here does not hang on depth, and XLA compiles each block.
_SMALL = """
import dataclasses
from etfzoo.models import table
table.BACKBONES["rn18"] = dataclasses.replace(table.BACKBONES["rn18"], blocks=(2, 1, 1, 1))
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What one process has compiled others find; and this one knows the small ResNet, too."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with mock.patch.dict(os.environ, cache), mock.patch.dict(table.BACKBONES):
        exec(_SMALL)
        yield


def on_jax(code, *args, **environment):
    return fresh_python(code, *args, KERAS_BACKEND="jax", **environment)


_STEPS = """
import os, keras, numpy as np, pytest, tensorflow as tf
import step_tf_test as t
from etfzoo.runtime.backend import Stepper, distribute, evaluation_step, synchronize
from etfzoo.errors import EtfzooError
from etfzoo.runtime.strategy import best_here, get_strategy

assert keras.backend.backend() == "jax"
for name, arguments, message in (
    ("mirored", (), "did you mean mirrored"),
    ("multiworker", (), "does not know the workers: set TF_CONFIG"),
    ("tpu", ("grpc://there",), "leave out `tpu`"),
    ("tpu", (), "JAX sees no TPU"),
    ("mirrored", (None, 0), "at least 1"),
    ("one_device", (None, 2), "goes with `strategy=mirrored`"),
):
    with pytest.raises(EtfzooError, match=message):
        get_strategy(name, *arguments)
with pytest.raises(EtfzooError, match="start a new process"):  # JAX has looked for a TPU
    get_strategy("mirrored", None, 3)
with pytest.raises(EtfzooError, match="JAX sees no GPU .* `num_virtual_devices=2`"):
    get_strategy("mirrored")
with pytest.raises(EtfzooError, match="leave out `synchronize_norms=False`"):
    synchronize(None, False)
assert best_here() == "one_device" and len(get_strategy("auto").devices) == 1

strategy = get_strategy("one_device")
with pytest.raises(EtfzooError, match="float64 model needs KERAS_BACKEND=tensorflow"):
    Stepper(t._model(), keras.optimizers.SGD(name="sgd"), strategy)
exec(os.environ["FLOAT64"])

def trained(batches, rate, strategy, scaled=False, **options):
    model = t._model()
    optimizer = keras.optimizers.SGD(rate, **options.pop("sgd", {}), name="sgd")
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=7)
    optimizer.build(model.trainable_variables)
    before = [np.array(v.value) for v in model.trainable_variables]
    kept = [np.asarray(v.value) for v in model.trainable_variables]  # views: donation spares them
    stepper = Stepper(model, optimizer, strategy, **options)
    ahead = distribute(strategy, lambda share: batches)
    sums = [np.asarray(stepper.train(ahead, stop=True))]
    sums.append(np.asarray(stepper.train(ahead, steps=len(batches) - 1)))
    for a, b in zip(before, kept, strict=True):
        np.testing.assert_array_equal(a, b)
    return model, optimizer, before, sums


data = t._batches()
batches = tf.data.Dataset.from_tensor_slices(tuple(np.stack(part) for part in zip(*data)))
for nesterov, decay_all, scaled in ((0, 0, 0), (1, 1, 0), (0, 1, 1)):
    sgd = {"momentum": t.MOMENTUM, "nesterov": bool(nesterov)}
    model, optimizer, weights, sums = trained(
        batches, t.RATE, strategy, scaled, sgd=sgd, weight_decay=t.DECAY, decay_all=bool(decay_all)
    )
    velocity, losses, right = [0.0, 0.0], [], []
    for x, y in data:
        logits = x @ weights[0] + weights[1]
        losses.append((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]).sum())
        right.append((logits.argmax(1) == y).sum())
        gradients = list(t._gradients(*weights, x, y))
        for i in range(2 if decay_all else 1):
            gradients[i] = gradients[i] + t.DECAY * weights[i]
        for i, g in enumerate(gradients):
            velocity[i] = t.MOMENTUM * velocity[i] + g
            update = g + t.MOMENTUM * velocity[i] if nesterov else velocity[i]
            weights[i] = weights[i] - t.RATE * update
    for expected, variable in zip(weights, model.trainable_variables, strict=True):
        np.testing.assert_allclose(variable.value, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sums[0], [losses[0], right[0], 8, 1], rtol=1e-12)
    np.testing.assert_allclose(sums[1], [sum(losses[1:]), sum(right[1:]), 792, 0], rtol=1e-6)
    if scaled:
        assert float(optimizer.dynamic_scale) == 2.0 ** (15 + 100 // 7)
    assert int(optimizer.iterations) == 100

t.check_norms(
    lambda model, optimizer: Stepper(model, optimizer, strategy),
    lambda x, y: distribute(strategy, lambda share: tf.data.Dataset.from_tensors((x, y))),
    evaluation_step,
)

x, y = tf.random.stateless_normal((7, 6), (0, 1), dtype=tf.float64), tf.range(7) - 1
labels, predicted, top5, loss, _ = evaluation_step(model)(x, y % 4)
assert labels.shape == loss.shape == predicted.shape == (7,) and np.all(top5)
"""


def test_steps_equal_numpy_and_bad_strategies_are_one_clear_line():
    on_jax(_STEPS, FLOAT64=_FLOAT64)


_TRAIN = (
    _FLOAT64
    + _SMALL
    + """
import functools, sys, keras, numpy as np
from etfzoo.runtime import backend, losses; from etfzoo.measure import accuracy as evaluation
from etfzoo.models.classifier import build_classifier
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.runtime.strategy import get_strategy, is_chief, num_workers, wait_for_all
from etfzoo.models.weights import as_arrays

name, devices, norm, folder, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
strategy = get_strategy(name, None, devices if name == "mirrored" else None)
assert strategy.num_replicas_in_sync == devices
# All constants are sums of few powers of 2: TensorFlow casts Python's numbers by way of float32.
model = build_classifier(
    "rn18", 4, "etf", norm, (32, 32, 3),
    feature_norm="bn", mean=(128,) * 3, std=(64,) * 3, dtype="float64",
)
rng = np.random.default_rng(0)
for v in model.trainable_variables:  # Keras draws other weights on each backend
    if v.name == "kernel":
        v.assign(rng.normal(size=v.shape) / np.sqrt(np.prod(v.shape[:-1])))
optimizer = keras.optimizers.SGD(2**-8, momentum=0.875, nesterov=True, name="sgd")
optimizer.build(model.trainable_variables)
source = resolve("folder:" + folder)
pipeline = Pipeline(source, 32, 32, 1.0, 12, Augmentation("shift", flip=True), seed=3)
loss = functools.partial(losses.cross_entropy, label_smoothing=0.125)
stepper = backend.Stepper(model, optimizer, strategy, 2**-10, loss)
batches = iter(backend.distribute(strategy, lambda s: pipeline.training("train", 0, 0, s)))
arrays = {"sums": sum(np.asarray(stepper.train(batches)) for _ in range(5))}
arrays |= as_arrays(model.variables)
arrays |= {"slot " + k: v for k, v in as_arrays(optimizer.variables).items()}
predictions = evaluation.evaluate(model, source, "test", 12, strategy)._asdict()
arrays |= {"prediction " + k: v for k, v in predictions.items()}
if devices > 1:
    images, labels = next(
        backend.distribute(strategy, lambda s: pipeline.training("train", 0, 0, s))
    )
    here = devices // num_workers(strategy)
    assert {s.data.shape for s in images.addressable_shards} == {(12 // devices, 32, 32, 3)}
    assert len({s.device for s in labels.addressable_shards}) == here
    assert {len(v.value.addressable_shards) for v in optimizer.variables} == {here}
if is_chief(strategy):
    np.savez(out, **{k.replace("/", "|"): v for k, v in arrays.items()})
wait_for_all(strategy)
"""
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights, slots and predictions after five steps in float64; each computed once."""
    folder = tmp_path_factory.mktemp("trained")
    # A fifth of each class is the test split: 19 images, which 2 and 12 do not divide.
    photos = make_image_folder(folder / "p", {"a": 21, "b": 24, "c": 25, "d": 26}, size=(32, 32))
    done = {}

    def train(backend, devices, norm):
        key = backend, devices, norm
        if key not in done:
            out = folder / ("_".join(map(str, key)) + ".npz")
            fresh_python(
                _TRAIN, "mirrored" if devices > 1 else "one_device", devices, norm, photos, out,
                KERAS_BACKEND=backend,
            )  # fmt: skip
            done[key] = dict(np.load(out))
        return done[key]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "sw"])
@pytest.mark.parametrize("backend, devices", [("jax", 2), ("tensorflow", 1)])
def test_equal_to_one_device(trained, norm, backend, devices):
    one, other = trained("jax", 1, norm), trained(backend, devices, norm)
    assert_same_in_float64(one, other)


@pytest.fixture(scope="module")
def config(embedded_dir):
    return TrainConfig(
        dataset="digits",
        data_dir=str(embedded_dir),
        backbone="rn18",
        norm="sw",
        image_size=16,
        crop=1.0,
        augment="shift",
        epochs=2,
        batch_size=50,
        learning_rate=0.02,
        warmup_epochs=0.5,
        eval_split="select",
        checkpoint_every=1,
        keep_checkpoints=100,
        neural_collapse_every=2,
    )


_RUN = f"""
{_SMALL}
import sys
from etfzoo.training import loop as training
from etfzoo.training.config import TrainConfig
print(training.train_and_evaluate(TrainConfig.load(sys.argv[1]), sys.argv[2]))
"""


def run_on_jax(config, workdir, **environment):
    path = workdir.parent / f"{workdir.name}.json"
    config.save(path)
    on_jax(_RUN, path, workdir, **environment)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Uninterrupted runs of 8 steps, by backend, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_jax(config, folder / "jax")
    loop.train_and_evaluate(config, folder / "tensorflow")
    return {name: folder / name for name in ("jax", "tensorflow")}


def state_of(workdir, step):
    return last_checkpoint(workdir, workdir / f"checkpoints/step-{step:010d}.npz")


def begun(workdir, target, step):
    """A copy of a run as it was after a step."""
    (target / "checkpoints").mkdir(parents=True)
    name = f"checkpoints/step-{step:010d}.npz"
    shutil.copy(workdir / name, target / name)
    return target


def assert_same_end(a, b):
    (arrays_a, state_a), (arrays_b, state_b) = state_of(a, 8), state_of(b, 8)
    assert state_a == state_b and arrays_a.keys() == arrays_b.keys()
    for name in arrays_a:
        np.testing.assert_array_equal(arrays_a[name], arrays_b[name], name)


@pytest.mark.slow
def test_checkpoints_do_not_tell_the_backend(finished):
    (ours, state), (theirs, other) = (state_of(finished[b], 8) for b in ("jax", "tensorflow"))
    assert state.keys() == other.keys()
    kinds = [{k: (v.shape, v.dtype.kind) for k, v in a.items()} for a in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert state["history"][1].keys() == other["history"][1].keys() >= {"nc/train/nc1"}


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_resuming_ends_bit_equal(finished, config, tmp_path, step):
    run_on_jax(config, begun(finished["jax"], tmp_path / "run", step))
    assert_same_end(finished["jax"], tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_under_the_other_backend(finished, config, tmp_path):
    step = 5
    first = begun(finished["tensorflow"], tmp_path / "to_jax", step)
    run_on_jax(config, first)
    second = begun(finished["jax"], tmp_path / "to_tensorflow", step)
    loop.train_and_evaluate(config, second)
    for changed, stayed in ((first, finished["tensorflow"]), (second, finished["jax"])):
        sums = [state_of(folder, step + 1)[1]["totals"] for folder in (changed, stayed)]
        before = state_of(stayed, step)[1]["totals"]
        losses = [(total[0] - before[0]) / (total[2] - before[2]) for total in sums]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert state_of(changed, 8)[1]["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(finished, config, tmp_path, precision):
    mixed = dataclasses.replace(
        config, mixed_precision=precision, epochs=1, neural_collapse_every=0
    )
    run_on_jax(mixed, tmp_path / "run")
    arrays, state = state_of(tmp_path / "run", 1)
    assert {v.dtype for k, v in arrays.items() if k.startswith("model/")} == {np.dtype("float32")}
    assert state["totals"][0] == pytest.approx(
        state_of(finished["jax"], 1)[1]["totals"][0], rel=0.02
    )
    assert ("optimizer/loss_scale/dynamic_scale" in arrays) == (precision == "float16")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert np.isfinite(result["train_loss"]) and result["step"] == 4


FINE_TUNED = {
    "optimizer": "adamw", "clip_norm": 1.0, "accumulate_steps": 5, "freeze": ("stem",),
    "layer_decay": 0.8,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, FINE_TUNED], ids=["plain", "fine-tuned"])
def test_averaged_weights_and_mixing(config, tmp_path, changes):
    strong = dataclasses.replace(
        config, ema=0.9, mixup=0.2, cutmix=1.0, neural_collapse_every=0, norm="bn", **changes
    )
    run_on_jax(strong, tmp_path / "jax")
    states = [state_of(tmp_path / "jax", step) for step in (2, 3)]
    (before, _), (after, state) = states
    keep = min(0.9, (1 + 3) / (10 + 3))
    names = [name.removeprefix("model/") for name in after if name.startswith("model/")]
    for name in names:
        expected = keep * before["model/" + name] + (1 - keep) * after["trained/" + name]
        np.testing.assert_allclose(after["model/" + name], expected, rtol=1e-5, atol=1e-6)
    run_on_jax(strong, begun(tmp_path / "jax", tmp_path / "resumed", 3))
    assert_same_end(tmp_path / "jax", tmp_path / "resumed")
    loop.train_and_evaluate(strong, begun(tmp_path / "jax", tmp_path / "tensorflow", 2))
    total = state_of(tmp_path / "tensorflow", 3)[1]["totals"]
    assert total == pytest.approx(state["totals"], rel=1e-5)


def recipe(name, *flags, backend="jax", code=0, kill_when=None):
    environment = os.environ | {"KERAS_BACKEND": backend}
    process = subprocess.Popen(
        [sys.executable, CHECKOUT / f"recipes/{name}.py", *map(str, flags)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if kill_when:
        number, directory = kill_when
        while not list(directory.glob("checkpoints/step-*.npz")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"{name} ended with {process.returncode}:\n{out}\n{err}"
    return out, err


TINY = ("--protocol=quickstart", "--epochs=2", "--batch_size=50")


@pytest.mark.slow
def test_recipes_from_pretraining_to_a_published_model(embedded_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(table.BACKBONES, "rn18", _RN18)  # as the recipes know it
    data = f"--data_dir={embedded_dir}"
    flags = ("--backbone=rn18", "--dataset=digits", data, *TINY, "--checkpoint_every=1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out, _ = recipe("pretrain", *flags, f"--workdir={whole}")
    assert "strategy: one_device" in out and "Epoch 2/2 - 4/4" in out
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        shutil.rmtree(killed, ignore_errors=True)
        wait = (number, killed)
        recipe("pretrain", *flags, f"--workdir={killed}", code=code, kill_when=wait)
    recipe("pretrain", *flags, f"--workdir={killed}")
    assert_same_end(whole, killed)

    data = ("--dataset=shapes/outlines", data)
    tuned = tmp_path / "tuned"
    two = ("--strategy=mirrored", "--num_virtual_devices=2")
    recipe(
        "finetune", f"--model={killed}", *data, *TINY, *two, "--steps_per_execution=3",
        "--learning_rate=0.005,0.01", f"--workdir={tuned}",
    )  # fmt: skip
    result = json.loads((tuned / "result.json").read_text())
    publish = (f"--workdir={tuned}", "--name=rn18_linear.outlines", "--licence=CC0-1.0")
    publish += (f"--models_dir={tmp_path / 'models'}",)
    _, err = recipe("publish", *publish, code=2)
    assert err.count("\n") == 1 and "repeat this with KERAS_BACKEND=tensorflow" in err
    assert not (tmp_path / "models").exists()
    recipe("publish", *publish, backend="tensorflow")

    published = tmp_path / "models/rn18_linear.outlines/1"
    model = etfzoo.load(published)
    arrays, _ = checkpoint.read(checkpoint.CheckpointManager(tuned).paths()[0])
    for v in model.variables:
        np.testing.assert_array_equal(v.value, arrays["model/" + v.path])
    source = resolve("shapes/outlines", str(embedded_dir))
    here = accuracy.evaluate(model, source)
    reports = []
    for strategy in (("--strategy=one_device",), two):
        report = tmp_path / f"report{len(reports)}"
        recipe("evaluate", f"--model={published}", *data, *strategy, f"--output={report}")
        reports.append(json.loads((report / "metrics.json").read_text()))
    assert {report["examples"] for report in reports} == {len(here.labels)} == {500}
    # One image may lie so close to the edge of a decision that rounding takes it across.
    top1 = accuracy.summary(here, 10)["top1"]
    there = [result["top1"], *(report["top1"] for report in reports)]
    assert there == pytest.approx([top1] * 3, abs=1.01 / 500)
    photos = make_image_folder(tmp_path / "photos", {"a": 2})
    out, _ = recipe("predict", f"--model={published}", photos)
    assert out.count("%") == 10


_RECIPE = f"""
{_SMALL}
import sys
from testing import run_recipe
run_recipe(*sys.argv[1:])
"""


@pytest.mark.slow
def test_frozen_features(finished, embedded_dir, tmp_path):
    flags = (f"--model={finished['jax']}", f"--data_dir={embedded_dir}", "--feature_cache=")
    results = {}
    for backend in ("jax", "tensorflow"):
        folder = tmp_path / backend
        for mode in ("linear_probe", "knn"):
            fresh_python(
                _RECIPE, "finetune", *flags, "--dataset=shapes/outlines", f"--mode={mode}", *TINY,
                f"--workdir={folder / mode}", KERAS_BACKEND=backend,
            )  # fmt: skip
            found = json.loads((folder / mode / "result.json").read_text())
            results.setdefault(mode, []).append(found["top1"])
        fresh_python(
            _RECIPE, "neural_collapse", *flags, "--dataset=digits",
            f"--output={folder / 'nc.json'}", KERAS_BACKEND=backend,
        )  # fmt: skip
        found = json.loads((folder / "nc.json").read_text())["splits"]["test"]
        results.setdefault("nc1", []).append(found["nc1"])
    for ours, theirs in results.values():
        assert ours == pytest.approx(theirs, rel=1e-2)

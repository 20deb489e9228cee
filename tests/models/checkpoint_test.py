"""Checkpoints: whole or not there, and damaged ones skipped."""

import logging
import os

import keras
import numpy as np
import pytest

import etfzoo
from etfzoo import files
from etfzoo.errors import EtfzooError, TrainingDiverged
from etfzoo.models import checkpoint
from testing import small_disk

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    return etfzoo.build_classifier("rn18", 3, input_shape=(32, 32, 3))


@pytest.fixture(scope="module")
def optimizer(model):
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, name="sgd")
    optimizer.build(model.trainable_variables)
    return optimizer


def _fill(variables, seed):
    rng = np.random.RandomState(seed)
    for v in variables:
        v.assign(rng.uniform(0, 1, v.shape).astype(v.dtype))


def _values(model, optimizer):
    return [np.array(v.value) for v in [*model.variables, *optimizer.variables]]


def test_round_trip_is_bit_equal_and_keeps_the_last(tmp_path, model, optimizer):
    manager = checkpoint.CheckpointManager(tmp_path, keep=2)
    for step in (3, 12, 7):  # a sort by name would fail without the zeros
        _fill(optimizer.variables, step)
        manager.save(step, model, optimizer, {"epoch": step, "text": "ü"})
    assert [p.name for p in manager.paths()] == ["step-0000000012.npz", "step-0000000007.npz"]
    _fill(optimizer.variables, 12)
    expected = _values(model, optimizer)
    _fill([*model.variables, *optimizer.variables], 99)
    state = manager.restore(model, optimizer)
    assert state["epoch"] == 12 and state["text"] == "ü"
    for a, b in zip(expected, _values(model, optimizer), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = checkpoint.load_model(tmp_path)
    assert loaded.spec == model.spec
    for a, b in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(a.value, b.value)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path, model, optimizer, damage, caplog
):
    manager = checkpoint.CheckpointManager(tmp_path)
    manager.save(1, model, optimizer, {"epoch": 1})
    last = manager.save(2, model, optimizer, {"epoch": 2})
    content = bytearray(last.read_bytes())
    if damage == "flip":
        content[content.index(np.array(model.variables[0]).tobytes()) + 99] ^= 0xFF
    last.write_bytes(
        {
            "truncate": content[: len(content) * 2 // 3],
            "flip": content,
            "empty": b"",
            "text": b"not a zip file",
        }[damage]
    )
    with caplog.at_level(logging.WARNING, "etfzoo"):
        assert manager.restore(model, optimizer)["epoch"] == 1
    assert str(last) in caplog.text and "damaged" in caplog.text
    manager.paths()[1].write_bytes(b"")
    with pytest.raises(EtfzooError, match="all 2 are damaged"):
        manager.restore(model, optimizer)


def test_best_follows_and_survives_the_removal_of_its_step(tmp_path, model, optimizer):
    manager = checkpoint.CheckpointManager(tmp_path, keep=1)
    _fill(model.variables, 1)
    manager.save(1, model, optimizer, {"epoch": 1}, best=True)
    best = [np.array(v.value) for v in model.variables]
    _fill(model.variables, 2)
    manager.save(2, model, optimizer, {"epoch": 2})
    assert checkpoint.read(manager.best)[1]["epoch"] == 1
    for is_best, wanted in ((True, best), (False, [v.value for v in model.variables])):
        loaded = checkpoint.load_model(tmp_path, best=is_best)
        for a, b in zip(loaded.variables, wanted, strict=True):
            np.testing.assert_array_equal(a.value, b)
    manager.save(3, model, optimizer, {"epoch": 3}, best=True)
    assert checkpoint.read(manager.best)[1]["epoch"] == 3


def test_weights_that_are_not_finite_are_never_written(tmp_path, model, optimizer):
    manager = checkpoint.CheckpointManager(tmp_path)
    manager.save(1, model, optimizer, {"epoch": 1})
    bias = model.get_layer("conv1_bn").beta
    good = np.array(bias.value)
    bias.assign(np.full_like(good, np.nan))
    with pytest.raises(TrainingDiverged, match="conv1_bn/beta"):
        manager.save(2, model, optimizer, {"epoch": 2})
    bias.assign(good)
    assert [p.name for p in manager.paths()] == ["step-0000000001.npz"]


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "checkpoints" / "step-0000000001.npz"
    path.parent.mkdir()
    np.savez(path, state=np.array([{"format": 1}], dtype=object))
    with pytest.raises(EtfzooError, match="damaged"):
        checkpoint.load_model(tmp_path)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, model, optimizer):
    path = checkpoint.CheckpointManager(tmp_path / "roomy").save(1, model, optimizer, {"epoch": 1})
    size = path.stat().st_size
    with small_disk(tmp_path / "disk", f"{3 * size // 2048}k") as disk:
        manager = checkpoint.CheckpointManager(disk)
        manager.save(1, model, optimizer, {"epoch": 1})
        with pytest.raises(EtfzooError, match="No space left on device"):
            manager.save(2, model, optimizer, {"epoch": 2})
        assert os.listdir(manager.directory) == ["step-0000000001.npz"]
        assert manager.restore(model, optimizer)["epoch"] == 1


def test_atomic_files(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "one")
    with pytest.raises(RuntimeError), files.atomic(path) as file:
        file.write(b"tw")
        raise RuntimeError
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / ".a.txt.12345678.tmp").write_text("left by a kill")
    files.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(EtfzooError, match="cannot write"):
        files.write_text(tmp_path / "missing" / "a.txt", "one")

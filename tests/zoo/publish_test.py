"""Tests of publishing: what is written, what it serves, and that it is written whole or not."""

import dataclasses
import json
import os
import shutil
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.zoo import manifest, publish, saved_model
from testing import held_by_another_process, leftovers, small_disk
from testing import make_classifier as make

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def version(model, tmp_path_factory):
    return etfzoo.publish(
        model,
        tmp_path_factory.mktemp("models") / "rn18_etf.test",
        provenance={"command": "train", "seed": np.int64(3)},
        metrics={"top1": np.float32(0.5)},
        licence="Apache-2.0",
    )


def test_first_version_and_its_files(version):
    assert version.name == "1"
    assert leftovers(version.parent) == ["1"]
    files = {str(p.relative_to(version)) for p in version.rglob("*") if p.is_file()}
    assert files == {
        "saved_model.pb",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
        "assets.extra/etfzoo.json",
        "assets.extra/tf_serving_warmup_requests",
        "assets.extra/files.json",
        "README.md",
    }
    assert manifest.verify(version)


def test_metadata(model, version):
    metadata = json.loads((version / "assets.extra/etfzoo.json").read_text("utf-8"))
    assert metadata["format"] == 1
    assert metadata["etfzoo_version"] == etfzoo.__version__
    assert metadata["keras_version"] == keras.__version__
    assert metadata["spec"] == json.loads(json.dumps(dataclasses.asdict(model.spec)))
    assert metadata["provenance"] == {"command": "train", "seed": 3}
    assert metadata["metrics"] == {"top1": 0.5}
    assert metadata["licence"] == "Apache-2.0"
    assert metadata["created"].endswith("+00:00")
    assert metadata["variables"] == {v.path: [list(v.shape), v.dtype] for v in model.variables}
    assert publish.read_metadata(version)["spec"] == model.spec


def test_versions(model, version, tmp_path):
    directory = tmp_path / "deep" / "rn18_etf.x"
    shutil.copytree(version, directory / "4")
    (directory / "notes").mkdir()
    (directory / "017").mkdir()
    with pytest.raises(etfzoo.EtfzooError, match="/4 already exists; choose another version"):
        etfzoo.publish(model, directory, version=4)
    changed = make(seed=2)
    assert etfzoo.publish(changed, directory) == directory / "5"
    assert etfzoo.publish(changed, directory, version=4, overwrite=True) == directory / "4"
    assert sorted(leftovers(directory)) == ["017", "4", "5", "notes"]
    for written in ("4", "5"):
        np.testing.assert_array_equal(
            publish.Weights(directory / written)["conv1_conv/kernel"],
            changed.get_layer("conv1_conv").kernel.numpy(),
        )


@pytest.mark.parametrize("version", [0, -1, "2", 1.0, True, 2**63, 10**30])
def test_bad_versions(model, tmp_path, version):
    with pytest.raises(etfzoo.EtfzooError, match="positive integer"):
        etfzoo.publish(model, tmp_path / "m", version=version)
    assert leftovers(tmp_path) == []


def test_versions_are_those_of_tf_serving(model, version, tmp_path):
    shutil.copytree(version, tmp_path / "m" / str(2**63 - 1))
    (tmp_path / "m" / str(2**63)).mkdir()
    assert publish.version_folders(tmp_path / "m").keys() == {2**63 - 1}
    with pytest.raises(etfzoo.EtfzooError, match="below 2\\^63"):
        etfzoo.publish(model, tmp_path / "m")


def test_only_classifiers_are_published(tmp_path):
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(etfzoo.EtfzooError, match="only an etfzoo.ImageClassifier.*Sequential"):
        etfzoo.publish(plain, tmp_path / "m")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "given, message",
    [
        ({"metrics": {"top1": float("nan")}}, "metrics cannot be written as JSON"),
        ({"provenance": {"model": object()}}, "provenance cannot be written as JSON: a object"),
        ({"metrics": [1]}, "metrics must be a dict"),
    ],
)
def test_bad_metadata(model, tmp_path, given, message):
    with pytest.raises(etfzoo.EtfzooError, match=message):
        etfzoo.publish(model, tmp_path / "m", **given)
    assert leftovers(tmp_path) == []


def test_bad_places(model, version, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(etfzoo.EtfzooError, match="could not publish to .*Not a directory"):
        etfzoo.publish(model, tmp_path / "file")
    with pytest.raises(etfzoo.EtfzooError, match="is a version folder"):
        etfzoo.publish(model, version)
    with pytest.raises(etfzoo.EtfzooError, match="local folders only"):
        etfzoo.publish(model, "gs://bucket/m")
    assert leftovers(tmp_path) == ["file"]


# The disk ends in the weights; and it holds the weights and not the graph as well.
@pytest.mark.parametrize("share", [0.4, 1.1])
def test_full_disk_leaves_nothing(model, tmp_path, share):
    size = share * sum(v.numpy().nbytes for v in model.variables)
    with small_disk(tmp_path / "disk", f"{size / 1024:.0f}k") as disk:
        target = disk / "models" / "rn18_etf.x"
        with pytest.raises(etfzoo.EtfzooError) as error:
            etfzoo.publish(model, target)
        assert str(error.value) == (
            f"could not publish to {target}/1: No space left on device; free some space or "
            "choose another directory"
        )
        assert leftovers(disk) == []


@pytest.mark.parametrize(
    "failure, existing", [(RuntimeError("broken\nmore"), False), (KeyboardInterrupt(), True)]
)
def test_failure_in_the_middle(model, version, tmp_path, monkeypatch, failure, existing):
    directory = tmp_path / "m"
    if existing:
        shutil.copytree(version, directory / "1")
    write = tf.saved_model.save

    def write_and_fail(*args, **kwargs):
        write(*args, **kwargs)
        assert [name for name in leftovers(directory) if name.startswith(".publishing-")]
        raise failure

    monkeypatch.setattr(tf.saved_model, "save", write_and_fail)
    expected = etfzoo.EtfzooError if isinstance(failure, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        etfzoo.publish(model, directory, version=1, overwrite=True)
    if expected is etfzoo.EtfzooError:
        assert str(error.value) == f"could not publish to {directory}/1: RuntimeError: broken"
    assert leftovers(directory) == (["1"] if existing else [])
    assert directory.exists() == existing
    if existing:
        assert publish.Weights(directory / "1")


@pytest.fixture
def replacing(tmp_path):
    """A version, and another one that is to take its place."""
    new, old = tmp_path / ".publishing-1-x" / "1", tmp_path / "1"
    for folder, text in ((new, "new"), (old, "old")):
        folder.mkdir(parents=True)
        (folder / "whose").write_text(text)
    return new, old


def test_overwriting_keeps_the_old_version_where_it_fails(replacing, tmp_path, monkeypatch):
    new, old = replacing
    rename = os.rename

    def no_new_one(source, target):
        if source == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", no_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        publish._move_into_place(new, old, overwrite=True)
    assert (old / "whose").read_text() == "old"
    monkeypatch.undo()
    shutil.rmtree(new.parent / "replaced")
    publish._move_into_place(new, old, overwrite=True)
    assert (old / "whose").read_text() == "new"
    publish.tidy(tmp_path)
    assert leftovers(tmp_path) == ["1"] and (old / "whose").read_text() == "new"


def test_killed_while_overwriting_the_old_version_comes_back(replacing, tmp_path, monkeypatch):
    new, old = replacing
    rename = os.rename

    class Killed(BaseException):
        """No handler takes it back, as none runs in a process that is killed."""

    def killed_between(source, target):
        if source == new:
            monkeypatch.undo()  # what would set things right in a living process fails, too
            monkeypatch.setattr(publish.os, "rename", lambda *args: None)
            raise Killed
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", killed_between)
    with pytest.raises(Killed):
        publish._move_into_place(new, old, overwrite=True)
    monkeypatch.undo()
    assert leftovers(tmp_path) == [".publishing-1-x"]
    with held_by_another_process(new.parent):
        publish.tidy(tmp_path)  # of a process that lives nothing is taken
        assert leftovers(tmp_path) == [".publishing-1-x"]
    publish.tidy(tmp_path)
    assert leftovers(tmp_path) == ["1"] and (old / "whose").read_text() == "old"


def test_two_publishers_of_one_version(tmp_path, monkeypatch):
    """Both are past the first check; one wins, the other one is told, nothing is mixed."""
    save, both_here, one_at_a_time = saved_model.save, threading.Barrier(2), threading.Lock()

    def slow_save(*args):
        both_here.wait(60)
        with one_at_a_time:
            save(*args)

    monkeypatch.setattr(saved_model, "save", slow_save)
    models = [make(seed=1), make(seed=2)]
    results = [None, None]

    def run(i):
        try:
            results[i] = etfzoo.publish(models[i], tmp_path / "m")
        except etfzoo.EtfzooError as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i in range(2) if results[i] == tmp_path / "m" / "1"]
    assert "m/1 already exists; choose another version" in str(results[1 - winner])
    assert leftovers(tmp_path / "m") == ["1"]
    arrays = publish.Weights(tmp_path / "m" / "1")
    np.testing.assert_array_equal(
        arrays["conv1_conv/kernel"], models[winner].get_layer("conv1_conv").kernel.numpy()
    )

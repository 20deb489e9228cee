"""Features of a data set, their cache, and the collapse measures that recipes print of them."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

import etfzoo
from etfzoo import locks
from etfzoo.data import sources
from etfzoo.data.augment import evaluation_image
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.errors import EtfzooError
from etfzoo.measure import features
from etfzoo.models.classifier import replace_head
from etfzoo.training import loop
from etfzoo.training.config import TrainConfig
from testing import (
    CHECKOUT,
    forked_python,
    leftovers,
    make_classifier,
    make_image_folder,
    randomize,
)

pytestmark = pytest.mark.small_rn18

COUNTS = {"a": 12, "b": 9, "c": 7}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("photos"), COUNTS, (40, 36))


@pytest.fixture(scope="module")
def model():
    return randomize(etfzoo.build_classifier("rn18", 3, input_shape=(32, 32, 3), crop=0.8))


def pipeline(photos, size=32, crop=0.8, batch_size=5, corrupt=()):
    source = sources.resolve(f"folder:{photos}")
    augmentation = Augmentation("none", flip=False)
    return Pipeline(source, size, size, crop, batch_size, augmentation, 0, corrupt)


def test_features_are_those_of_the_network_in_inference_mode(photos, model):
    found = features.Extractor(model).load(pipeline(photos), "train")
    records = list(sources.resolve(f"folder:{photos}").records("train"))
    images = np.stack([evaluation_image(r["image"], 32, 32, 0.8) for r in records])
    wanted = np.asarray(etfzoo.feature_model(model)(images.astype(np.uint8))["features"])
    np.testing.assert_allclose(found.features, wanted, rtol=1e-4, atol=1e-5 * wanted.max())
    np.testing.assert_array_equal(found.labels, [r["label"] for r in records])
    assert [len(b) for b in found.batches(10)] == [10, 10, 3] and len(found.labels) == 23


def test_cache_is_by_content(photos, model, tmp_path, capsys):
    extractor = features.Extractor(model)
    data = pipeline(photos)
    first = extractor.load(data, "train", tmp_path)
    assert (
        len(leftovers(tmp_path)) == 2 and "features of the train split" in capsys.readouterr().out
    )
    again = features.Extractor(replace_head(model, 7)).load(data, "train", tmp_path)
    assert "features" not in capsys.readouterr().out  # the head does not count
    np.testing.assert_array_equal(again.features, first.features)
    np.testing.assert_array_equal(again.labels, first.labels)

    key = features.content_hash(model, data, "train")
    changed = replace_head(model, 3, "etf")
    kernel = changed.get_layer("conv1_conv").kernel
    kernel.assign(np.asarray(kernel) * (1 + 1e-6))
    others = [
        features.content_hash(changed, data, "train"),
        features.content_hash(replace_head(model, 3, mean=(1.0, 2, 3)), data, "train"),
        features.content_hash(model, data, "test"),
        features.content_hash(model, pipeline(photos, size=24), "train"),
        features.content_hash(model, pipeline(photos, crop=1.0), "train"),
    ]
    assert len({key, *others}) == 6
    assert features.content_hash(model, pipeline(photos, batch_size=7), "train") == key


def test_other_images_of_the_same_names_are_other_data(photos, model, tmp_path):
    make_image_folder(tmp_path, COUNTS, (40, 36))
    key = features.content_hash(model, pipeline(photos), "train")
    assert features.content_hash(model, pipeline(tmp_path), "train") == key
    path = next(p for p in sorted(tmp_path.rglob("*.png")) if _in_train(tmp_path, p))
    other = path.with_name("001.png" if path.name != "001.png" else "002.png").read_bytes()
    path.write_bytes(other)
    assert features.content_hash(model, pipeline(tmp_path), "train") != key


def _in_train(root, path):
    records = sources.resolve(f"folder:{root}").records("train")
    return path.read_bytes() in [r["image"].numpy() for r in records]


def _reversed_labels(path, labels):
    with np.load(labels) as there:
        np.savez(labels, labels=there["labels"][::-1], digest=there["digest"])


def _labels_alone(path, labels):
    with np.load(labels) as there:
        np.savez(labels, labels=there["labels"])


def _pipe(path, labels):
    path.unlink()
    os.mkfifo(path)
    labels.touch()


def _half_of_the_classes(path, labels):
    """As many whole rows as labels would still fit."""
    found = np.fromfile(path, np.float32)
    found[: len(found) // 2].tofile(path)


DAMAGES = {
    "truncated": lambda path, labels: path.write_bytes(path.read_bytes()[:-3]),
    "half a file": _half_of_the_classes,
    "emptied": lambda path, labels: path.write_bytes(b""),
    "NaN": lambda path, labels: np.full(path.stat().st_size // 4, np.nan, np.float32).tofile(path),
    "a value": lambda path, labels: os.pwrite(os.open(path, os.O_WRONLY), b"\0\0\0@", 400),
    "labels emptied": lambda path, labels: labels.write_bytes(b""),
    "labels reversed": _reversed_labels,
    "labels alone": _labels_alone,
    "no features": lambda path, labels: path.unlink(),
    "no labels": lambda path, labels: labels.unlink(),
}


@pytest.fixture(scope="module")
def extractor(model):
    return features.Extractor(model)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(photos, extractor, tmp_path, damage, caplog):
    data = pipeline(photos)
    wanted = extractor.load(data, "test", tmp_path)
    wanted = features.Features(np.array(wanted.features), wanted.labels)
    (path,) = tmp_path.glob("*.float32")
    (labels,) = tmp_path.glob("*.npz")
    DAMAGES[damage](path, labels)
    for _ in range(2):
        found = extractor.load(data, "test", tmp_path)
        np.testing.assert_array_equal(found.features, wanted.features)
        np.testing.assert_array_equal(found.labels, wanted.labels)
    assert path.stat().st_size == wanted.features.nbytes and len(leftovers(tmp_path)) == 2
    told = [m for m in caplog.messages if "is damaged: made again" in m]
    assert len(told) == (not damage.startswith("no "))


def test_a_pipe_in_the_cache_of_features(photos, extractor, tmp_path):
    data = pipeline(photos)
    extractor.load(data, "test", tmp_path)
    _pipe(*tmp_path.glob("*.float32"), *tmp_path.glob("*.npz"))
    with pytest.raises(EtfzooError, match="float32: it is no regular file"):
        extractor.load(data, "test", tmp_path)


@pytest.mark.parametrize("suffix", ["float32", "npz"])
@pytest.mark.parametrize("target", ["file", "none", "copy"])
def test_a_link_in_the_cache_of_features_is_not_followed(photos, model, tmp_path, suffix, target):
    """Another user may have planted it: nothing outside changes, or is taken for features."""
    extractor, data = features.Extractor(model), pipeline(photos)
    wanted = np.array(extractor.load(data, "test", tmp_path / "cache").features)
    (path,) = (tmp_path / "cache").glob(f"*.{suffix}")
    (tmp_path / "file").write_text("must stay")
    path.rename(tmp_path / "copy")
    copy = (tmp_path / "copy").stat()
    path.symlink_to(tmp_path / target)
    for _ in range(2):
        found = extractor.load(data, "test", tmp_path / "cache")
        np.testing.assert_array_equal(found.features, wanted)
    assert not path.is_symlink() and (tmp_path / "copy").stat() == copy
    assert (tmp_path / "file").read_text() == "must stay"
    assert sorted(leftovers(tmp_path)) == ["cache", "copy", "file"]


def test_a_cache_that_cannot_be_written(photos, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EtfzooError, match="cannot create directory"):
        features.Extractor(model).load(pipeline(photos), "test", tmp_path / "file")
    with pytest.raises(EtfzooError, match="cannot keep features in"):
        features.in_temporary_file([], tmp_path / "file")


@pytest.mark.parametrize(
    "head, norm",
    [
        ("linear", "none"),
        ("etf", "none"),
        ("etf", "bn"),
        ("etf", "l2"),
        ("etf", "bn_l2"),
        ("etf", "scale"),
    ],
)
def test_linear_head_chooses_as_the_head(head, norm):
    changes = {} if head == "linear" else {"feature_norm": norm}
    if norm == "scale":
        changes = {"feature_norm": "none", "learn_scale": True}
    model = make_classifier(head, **changes)
    weights, bias = features.linear_head(model)
    pooled = np.random.default_rng(0).gamma(1, 1, (300, weights.shape[1])).astype(np.float32)
    logits = np.asarray(model.get_layer("logits")(pooled))
    found = pooled @ weights.T + bias
    np.testing.assert_array_equal(found.argmax(1), logits.argmax(1))
    if not norm.endswith("l2"):
        np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-4)
    assert len(set(logits.argmax(1))) > 1
    with pytest.raises(EtfzooError, match="no head"):
        features.linear_head(make_classifier(None))


def test_behind_a_projector(photos, tmp_path):
    model = make_classifier("linear", projector_layers=2, projector_width=24)
    data = pipeline(photos)
    extractors = {tap: features.Extractor(model, tap=tap) for tap in ("features", "projected")}
    found = {tap: e.load(data, "train", tmp_path) for tap, e in extractors.items()}
    assert [f.features.shape[1] for f in found.values()] == [32, 24]
    images = np.stack(
        [
            evaluation_image(r["image"], 32, 32, 0.8)
            for r in sources.resolve(f"folder:{photos}").records("train")
        ]
    ).astype(np.uint8)
    wanted = etfzoo.feature_model(model, ("features", "projected", "logits"))(images)
    for tap, some in found.items():
        value = np.asarray(wanted[tap])
        np.testing.assert_allclose(some.features, value, rtol=1e-4, atol=1e-5 * value.max())
    # The cached features are those of the backbone, whatever stands behind it ...
    key = features.content_hash(model, data, "train")
    bare = replace_head(model, 5)
    assert features.content_hash(bare, data, "train") == key
    model.get_layer("projector1_dense").kernel.assign(np.ones((32, 24)))
    assert features.content_hash(model, data, "train") == key
    # ... and what the projector makes of them hangs on it.
    keys = {features.content_hash(model, data, "train", tap) for tap in found}
    assert len(keys) == 2 and not (tmp_path / f"{max(keys - {key})}.float32").exists()
    # The head has weights on the output of the projector, and none on the features.
    weights, bias = features.linear_head(model, "projected")
    logits = found["projected"].features @ weights.T + bias
    np.testing.assert_allclose(logits, wanted["logits"], rtol=1e-3, atol=1e-4)
    with pytest.raises(EtfzooError, match="the head acts on `projected`, not on `features`"):
        features.linear_head(model)
    with pytest.raises(EtfzooError, match="the head acts on `features`, not on `projected`"):
        features.linear_head(bare, "projected")
    with pytest.raises(EtfzooError, match="unknown tap 'projected'"):
        features.Extractor(bare, tap="projected")


def test_collapse_of_features_with_the_head(photos, model):
    found = features.Extractor(model).load(pipeline(photos), "train")
    other = features.Extractor(model).load(pipeline(photos, crop=0.5), "test")
    result = features.collapse(found, 3, features.linear_head(model), other)
    x, y = np.asarray(found.features, np.float64), found.labels
    means = np.stack([x[y == k].mean(0) for k in range(3)])
    nearest = np.square(x[:, None] - means).sum(2).argmin(1)
    logits = np.asarray(model.get_layer("logits")(found.features))
    assert result["nc4"] == np.mean(nearest != logits.argmax(1))
    cosines = means @ other.features.mean(0, np.float64)
    cosines /= np.linalg.norm(means, axis=1) * np.linalg.norm(other.features.mean(0))
    np.testing.assert_allclose(result["nc5"], cosines.mean(), rtol=1e-5)
    assert result["examples"] == 23 and "nc4" not in features.collapse(found, 3)


_DEVICES = """
import sys, numpy as np
import etfzoo
from etfzoo import locks
from etfzoo.measure import features
from etfzoo.runtime.strategy import get_strategy
sys.path.insert(0, sys.argv[3])
from features_test import pipeline
strategy = get_strategy("mirrored", None, int(sys.argv[1]))
with strategy.scope():
    model = etfzoo.load(sys.argv[4])
data = pipeline(sys.argv[2], batch_size=6)
found = features.Extractor(model, strategy).load(data, "train")
np.savez(sys.argv[5], features=found.features, labels=found.labels)
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_several_devices_see_every_example_once(photos, model, tmp_path, devices):
    etfzoo.publish(model, tmp_path / "model")
    out = tmp_path / "out.npz"
    forked_python(_DEVICES, devices, photos, CHECKOUT / "tests/measure", tmp_path / "model", out)
    several = dict(np.load(out))
    one = features.Extractor(model).load(pipeline(photos), "train")
    np.testing.assert_array_equal(several["labels"], one.labels)
    np.testing.assert_allclose(
        several["features"], one.features, rtol=1e-4, atol=1e-5 * one.features.max()
    )


def _gaussian(count, seed, classes=20, dim=64):
    """Features of Gaussian classes, `count` of each; the classes are the same for every seed."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), count))
    means = np.random.default_rng(0).normal(size=(classes, dim))
    noise = np.random.default_rng([1, seed]).normal(size=(len(labels), dim))
    return features.Features((means[labels] + 2 * noise).astype(np.float32), labels)


def test_nc1_on_equally_many_examples():
    """One distribution at 200 and at 20 examples a class."""
    equal, plain = [], []
    for seed in range(3):
        found = {"train": _gaussian(200, seed), "test": _gaussian(20, seed + 10)}
        equal.append(features.equal_nc1(found, 20))
        plain.append({name: features.collapse(f, 20)["nc1"] for name, f in found.items()})
        assert equal[-1]["test"] == pytest.approx(plain[-1]["test"], rel=1e-9)
    train, test = (np.mean([e[name] for e in equal]) for name in ("train", "test"))
    assert train == pytest.approx(test, rel=0.03)
    train, test = (np.mean([e[name] for e in plain]) for name in ("train", "test"))
    assert train > 1.15 * test


def test_equal_rows_take_the_smaller_count_of_each_class_at_random():
    few, many = np.repeat([0, 1, 3], [4, 2, 5]), np.repeat([0, 1, 2, 3], [3, 50, 7, 5])
    masks = features.equal_rows([few, many], 4)
    for labels, mask in zip((few, many), masks, strict=True):
        assert np.bincount(labels[mask], minlength=4).tolist() == [3, 2, 0, 5]
    np.testing.assert_array_equal(masks[1], features.equal_rows([few, many], 4)[1])
    chosen = np.flatnonzero(masks[1][3:53])
    assert chosen.tolist() not in ([0, 1], [48, 49])
    assert not features.equal_nc1({"test": _gaussian(5, 0)}, 20)


def test_equal_nc1_is_left_out_where_there_is_none(caplog):
    apart = {"a": _gaussian(5, 0), "b": features.Features(np.eye(64)[:4], np.full(4, 3))}
    assert features.equal_nc1(apart, 20) == {}
    assert "no NC1 on equally many examples: neural collapse needs examples" in caplog.text


def test_names_by_which_sets_of_different_size_compare():
    names = ["nc1", "nc1_ratio", "nc1_ratio_unbiased", "nc3", "cdnv"]
    assert features.comparable(names) == ["nc1", "nc1_ratio_unbiased", "nc3", "cdnv"]
    assert features.comparable([*names, "nc1_equal"])[0] == "nc1_ratio_unbiased"


def test_measures_of_a_training_and_of_its_resumption(embedded_dir, tmp_path):
    config = TrainConfig(
        dataset="digits", data_dir=str(embedded_dir), backbone="rn18", image_size=16, crop=1.0,
        augment="none", flip=False, epochs=2, batch_size=50, eval_split="select",
        neural_collapse_every=1, checkpoint_every=1, keep_checkpoints=100,
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = loop.train_and_evaluate(config, whole)
    rows = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    names = {name for name in result if name.startswith("nc/")}
    assert {name.split("/")[1] for name in names} == {"train", "select"}
    assert {"nc/select/nc4", "nc/train/cdnv", "nc/train/nc3", "nc/train/nc1_equal"} <= names
    # 300 images of 10 classes against 200: fewer of each count.
    assert result["nc/train/nc1_equal"] <= result["nc/train/nc1"]
    assert all(names <= row.keys() for row in rows)
    # The same as from the finished model.
    source = sources.resolve("digits", config.data_dir)
    data = Pipeline(source, 16, 16, 1.0, 50, Augmentation("none", flip=False), 0)
    model = etfzoo.load(whole)
    found = features.Extractor(model).load(data, "train")
    again = features.collapse(found, 10, features.linear_head(model))
    assert result["nc/train/nc1"] == pytest.approx(again["nc1"], rel=1e-6)
    assert result["nc/train/nc4"] == pytest.approx(again["nc4"])
    left = set(leftovers(whole)) - {locks.NAME}
    assert not [name for name in left if name.startswith(("tmp", "."))]
    _assert_logged(whole / "tensorboard", "nc/select/nc1", [1, 2])

    (killed / "checkpoints").mkdir(parents=True)
    name = "checkpoints/step-0000000005.npz"  # in epoch 2, after the measures of epoch 1
    shutil.copy(whole / name, killed / name)
    assert loop.train_and_evaluate(config, killed) == result
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.slow
def test_measures_now_and_then_change_nothing_else(embedded_dir, tmp_path):
    config = TrainConfig(
        dataset="digits", data_dir=str(embedded_dir), backbone="rn18", image_size=16, crop=1.0,
        augment="none", flip=False, epochs=3, batch_size=50, neural_collapse_every=2, eval_every=3,
    )  # fmt: skip
    measured = loop.train_and_evaluate(config, tmp_path / "measured")
    rows = (tmp_path / "measured/metrics.jsonl").read_text().splitlines()
    assert ["nc/train/nc1" in json.loads(row) for row in rows] == [False, True, True]
    header, *lines = (tmp_path / "measured/metrics.csv").read_text().splitlines()
    assert {line.count(",") for line in lines} == {header.count(",")}
    config = dataclasses.replace(config, neural_collapse_every=0)
    plain = loop.train_and_evaluate(config, tmp_path / "plain")
    assert plain == {k: v for k, v in measured.items() if not k.startswith("nc/")}


def _assert_logged(folder, tag, epochs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Tensors(tag)] == epochs

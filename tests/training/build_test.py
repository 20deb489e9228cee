"""Tests of the model that a run starts from, where it keeps its head."""

import dataclasses

import keras
import numpy as np
import pytest

from etfzoo.data.datasets import Dataset
from etfzoo.data.source import Source
from etfzoo.errors import EtfzooError
from etfzoo.models import weights
from etfzoo.runtime import losses
from etfzoo.training import build, transfer
from etfzoo.training.config import TrainConfig
from testing import CLASS_NAMES, SIDE, make_classifier, random_pixels

pytestmark = pytest.mark.small_rn18


def continued(start, names=CLASS_NAMES, **changes):
    source = Source("pictures", Dataset("", len(names)), tuple(names))
    config = TrainConfig(
        "pictures", init="x", keep_head=True, image_size=SIDE, head=start.spec.head, seed=9
    )
    config = dataclasses.replace(config, **changes)
    return build.make_model(config, source, lambda: weights.StoredModel.of(start))


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_it_is_the_model_that_it_starts_from(head):
    start = make_classifier(head)
    model = continued(start)
    assert model is not start and model.spec == start.spec
    for path, array in weights.as_arrays(start.variables).items():
        np.testing.assert_array_equal(array, weights.as_arrays(model.variables)[path], path)


def test_a_trained_head_goes_on_in_the_order_of_the_data():
    start = make_classifier("linear")
    names = [CLASS_NAMES[i] for i in (3, 0, 6, 1, 2, 5, 4)]
    model = continued(start, names)
    images = random_pixels()
    wanted = dict(zip(CLASS_NAMES, np.asarray(start(images)).T, strict=True))
    assert model.spec.class_names == tuple(names)
    for name, logits in zip(names, np.asarray(model(images)).T, strict=True):
        np.testing.assert_allclose(logits, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "head, names, message",
    [
        ("etf", CLASS_NAMES[::-1], "classes in another order, and those of an ETF are fixed"),
        ("linear", CLASS_NAMES[:3], "has some of the model's classes only; leave out `keep_head`"),
        ("linear", ["a", *CLASS_NAMES[1:]], r"others \(ant, bee, cat, dog, ...; a, bee"),
        ("linear", [*CLASS_NAMES, "yak"], "has 7 classes, data set pictures has 8"),
    ],
)
def test_a_head_of_other_classes_is_not_kept(head, names, message):
    with pytest.raises(EtfzooError, match=message):
        continued(make_classifier(head), names)


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_a_projector_is_kept_with_its_head(head):
    start = make_classifier(head, projector_layers=2, projector_width=24)
    for model in (continued(start), continued(start, projector_layers=2, projector_width=24)):
        assert model.spec == start.spec
        np.testing.assert_array_equal(model(random_pixels()), start(random_pixels()))
    with pytest.raises(EtfzooError, match="has a projector of 2 layers, not 1"):
        continued(start, projector_layers=1)
    fresh = continued(start, keep_head=False, head="linear")
    assert fresh.spec.projector_layers == 0
    assert fresh.get_layer("logits").kernel.shape == (32, len(CLASS_NAMES))
    fresh = continued(start, keep_head=False, head="linear", projector_layers=1)
    assert fresh.spec.projector_layers == 1 and fresh.spec.projector_width == 32


class Pictures(Source):
    """A data set of which only the classes of its fit split are known."""

    def class_counts(self, split):
        assert split == "fit"
        return np.array([50, 30, 20, 9, 4, 1, 0])


def made_loss(spec, **changes):
    source = Pictures("pictures", Dataset("", 7), CLASS_NAMES)
    config = TrainConfig("pictures", train_split="fit", **changes)
    return build.make_loss(config, spec, source)


def test_the_loss_of_a_run():
    model = make_classifier("etf", feature_norm="l2")
    plain = build.make_loss(TrainConfig("x"), model.spec, None)  # opens no data set
    assert plain.func is losses.cross_entropy and not plain.keywords
    dot = made_loss(model.spec, loss="dot_regression")
    features = keras.Model(model.input, model.get_layer("features").output)
    h, rows = np.array(features(random_pixels())), np.array(model.get_layer("logits").kernel).T
    h, labels = h / np.linalg.norm(h, axis=1, keepdims=True), np.array([0, 3, 6, 3])
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    wanted = [
        (rows[y] @ x - lengths[y]) ** 2 / (2 * lengths[y]) for x, y in zip(h, labels, strict=True)
    ]
    np.testing.assert_allclose(dot(labels, model(random_pixels())), wanted, rtol=1e-4)
    assert made_loss(model.spec, loss="squared_error").func is losses.squared_error


def test_the_loss_hangs_on_the_whole_split_and_on_no_batch():
    spec = make_classifier("linear").spec
    one, other = (
        made_loss(spec, logit_adjustment=0.7, class_balance=0.99, batch_size=size).keywords
        for size in (4, 32)
    )
    assert one.keys() == other.keys() == {"adjustment", "class_weights"}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_allclose(one["adjustment"][[0, 6]], 0.7 * np.log([50 / 115, 1 / 115]))


@pytest.mark.parametrize(
    "head, changes",
    [
        ("linear", {}),
        ("etf", {"feature_norm": "none"}),
        ("etf", {"feature_norm": "bn"}),
        ("etf", {"feature_norm": "bn_l2", "learn_scale": True}),
    ],
)
def test_dot_regression_takes_cosines(head, changes):
    with pytest.raises(EtfzooError, match="compares cosines: it takes an etf head with") as error:
        made_loss(make_classifier(head, **changes).spec, loss="dot_regression")
    assert "\n" not in str(error.value)


def test_what_keeps_no_head(tmp_path):
    with pytest.raises(EtfzooError, match="the head that is kept is etf, not linear"):
        continued(make_classifier("etf"), head="linear")
    with pytest.raises(EtfzooError, match="keep_head goes on with the head of a pretrained model"):
        TrainConfig("digits", keep_head=True)
    config = TrainConfig("digits", init="x", head="linear", keep_head=True)
    for mode in (transfer.linear_probe, transfer.knn):
        with pytest.raises(EtfzooError, match="makes a head of its own: leave out `keep_head`"):
            mode(config, tmp_path / "w")
    config = TrainConfig("digits", init="x", head="linear", projector_layers=1)
    for mode in (transfer.linear_probe, transfer.knn):
        with pytest.raises(EtfzooError, match="reads the features: leave out `projector_layers`"):
            mode(config, tmp_path / "w")

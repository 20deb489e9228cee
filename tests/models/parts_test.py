"""The parts of a classifier: what is frozen does not move, and rates fall from head to stem."""

import keras
import numpy as np
import pytest

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.models import parts
from etfzoo.models.weights import as_arrays
from testing import make_classifier, random_pixels


def step(model):
    """One step of plain SGD; which variables it moved, by path."""
    before = as_arrays(model.variables)
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    model.train_on_batch(random_pixels(6), np.arange(6) % model.output_shape[-1])
    after = as_arrays(model.variables)
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize(
    "names, still",
    [
        (("stem",), ("conv1_",)),
        (("stage1", "stage3"), ("v2_stack_0_", "v2_stack_2_")),
        (("backbone",), ("conv1_", "v2_stack_")),
        (("stem", "backbone"), ("conv1_", "v2_stack_")),
    ],
)
def test_frozen_parts_stay_with_their_moving_statistics(names, still):
    model = make_classifier("linear")
    parts.freeze(model, names)
    moved = step(model)
    assert moved == {v.path for v in model.variables if not v.path.startswith(still)}
    # In inference mode: the output hangs on the moving statistics.
    taps = etfzoo.feature_model(model, ["stem"])
    images = random_pixels(3)
    training = np.asarray(taps(images, training=True)["stem"])
    same = np.allclose(training, taps(images, training=False)["stem"], rtol=1e-4)
    assert same == ("stem" in names or "backbone" in names)


@pytest.mark.parametrize("norm", ["sw"])
def test_whitening_is_frozen_too(norm):
    model = make_classifier("linear", norm=norm)
    parts.freeze(model, ("stem",))
    moved = step(model)
    assert not {path for path in moved if path.startswith("conv1_")}
    assert {path for path in moved if path.startswith("v2_stack_0_")}


def own_backbone():
    network = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(8, 3, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Conv2D(8, 3, name="last"),
        ]
    )
    return etfzoo.build_classifier(
        network, 5, "linear", projector_layers=1, projector_width=6, mean=(1,) * 3, std=(2,) * 3
    )


def test_another_backbone_is_one_part():
    model = own_backbone()
    with pytest.raises(EtfzooError, match="unknown part of custom to freeze, 'stage4'; known: b"):
        parts.freeze(model, ("stage4",))
    assert set(parts.layer_rates(model, 0.5)) == {0.5, 1.0}
    parts.freeze(model, ("backbone",))
    moved = step(model)
    assert moved and all(path.startswith(("projector", "logits")) for path in moved)
    assert set(parts.layer_rates(model, 0.5)) == {1.0}


def test_rates_fall_from_the_head_to_the_stem():
    model = make_classifier("etf", learn_scale=True)
    found = dict(
        zip((v.path for v in model.trainable_variables), parts.layer_rates(model, 0.5), strict=True)
    )
    wanted = {"logits": 1, "v2_stack_3": 0.5, "v2_stack_2": 0.25, "v2_stack_1": 0.125,
              "v2_stack_0": 0.0625, "conv1": 0.03125}  # fmt: skip
    assert len(found) > 50
    for path, rate in found.items():
        (beginning,) = (name for name in wanted if path.startswith(name))
        assert rate == wanted[beginning], path


def test_two_stages_are_two_parts(small_network):
    model = make_classifier("linear")
    assert min(parts.layer_rates(model, 0.5)) == 0.5**3
    with pytest.raises(EtfzooError, match="unknown part of rn18 to freeze, 'stage3'; did you mean"):
        parts.freeze(model, ("stage3",))


def test_a_fixed_head_on_a_frozen_backbone_leaves_nothing():
    model = etfzoo.build_classifier("rn18", 7, "etf", input_shape=(32, 32, 3))
    with pytest.raises(EtfzooError, match="nothing is left to train with `freeze=backbone`"):
        parts.freeze(model, ("backbone",))

"""Tests of weights as arrays."""

import keras
import numpy as np
import pytest

from etfzoo.errors import EtfzooError
from etfzoo.models import weights


def make_model(*names):
    """Dense layers of these names on three inputs, with random biases too."""
    inputs = x = keras.Input((3,))
    for name in names:
        x = keras.layers.Dense(4, name=name)(x)
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(0)
    for v in model.variables:
        v.assign(rng.normal(size=v.shape))
    return model


def test_as_arrays():
    model = make_model("a", "b")
    arrays = weights.as_arrays(model.variables)
    assert list(arrays) == ["a/kernel", "a/bias", "b/kernel", "b/bias"]
    assert {path: a.shape for path, a in arrays.items()} == {
        "a/kernel": (3, 4),
        "a/bias": (4,),
        "b/kernel": (4, 4),
        "b/bias": (4,),
    }
    np.testing.assert_array_equal(arrays["b/kernel"], model.get_layer("b").kernel)
    before = arrays["a/bias"].copy()
    model.get_layer("a").bias.assign(before + 1)
    np.testing.assert_array_equal(arrays["a/bias"], before)


def test_two_variables_of_one_path():
    variables = make_model("a").variables + make_model("a").variables
    with pytest.raises(EtfzooError, match="same path"):
        weights.as_arrays(variables)


def test_assign():
    model = make_model("a", "b")
    arrays = {path: a + 1 for path, a in weights.as_arrays(model.variables).items()}
    weights.assign(model.variables, arrays)
    for path, array in weights.as_arrays(model.variables).items():
        np.testing.assert_array_equal(array, arrays[path])


def test_skipped_paths_are_left_alone_on_both_sides():
    model = make_model("a", "head")
    before = weights.as_arrays(model.variables)
    arrays = {"a/kernel": np.ones((3, 4)), "a/bias": np.ones(4), "head/kernel": np.ones((9, 9))}
    weights.assign(model.variables, arrays, skip=lambda path: path.startswith("head/"))
    after = weights.as_arrays(model.variables)
    assert (after["a/kernel"] == 1).all() and (after["a/bias"] == 1).all()
    np.testing.assert_array_equal(after["head/kernel"], before["head/kernel"])


def rename(arrays):
    arrays["c/bias"] = arrays.pop("b/bias")


def drop(arrays):
    del arrays["a/kernel"]


def add(arrays):
    arrays["c/kernel"] = np.zeros((4, 4))


def transpose(arrays):
    arrays["a/kernel"] = arrays["a/kernel"].T


def flatten(arrays):
    arrays["b/kernel"] = arrays["b/kernel"].ravel()


@pytest.mark.parametrize(
    "break_it, message",
    [
        (drop, "file.h5 do not fit the model: missing: a/kernel"),
        (add, "file.h5 do not fit the model: not in the model: c/kernel"),
        (rename, "file.h5 do not fit the model: missing: b/bias; not in the model: c/bias"),
        (transpose, "file.h5 do not fit the model: of another shape: a/kernel (4, 3) for (3, 4)"),
        (flatten, "file.h5 do not fit the model: of another shape: b/kernel (16,) for (4, 4)"),
    ],
)
def test_misfit_names_the_variables_and_assigns_nothing(break_it, message):
    model = make_model("a", "b")
    before = weights.as_arrays(model.variables)
    arrays = {path: a + 1 for path, a in before.items()}
    break_it(arrays)
    with pytest.raises(EtfzooError) as error:
        weights.assign(model.variables, arrays, what="file.h5")
    assert str(error.value) == message
    for path, array in weights.as_arrays(model.variables).items():
        np.testing.assert_array_equal(array, before[path])


def test_long_lists_are_cut():
    model = make_model(*"gfedcba")
    with pytest.raises(EtfzooError) as error:
        weights.assign(model.variables, {})
    assert str(error.value) == (
        "weights do not fit the model: missing: a/bias, a/kernel, b/bias, b/kernel, c/bias "
        "and 9 more"
    )

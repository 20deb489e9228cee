"""Tests of the exports: ONNX against ONNX Runtime, .keras files in Keras alone, and the recipe."""

import json
import sys

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.zoo import export as formats
from testing import assert_close, fresh_python, leftovers, run_recipe, small_disk
from testing import make_classifier as make
from testing import random_pixels as pixels

pytestmark = pytest.mark.small_rn18


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [output.name for output in session.get_outputs()]
    return name, session.run(None, {"images": images})[0], session


@pytest.mark.parametrize(
    "head, changes",
    [
        ("etf", {}),
        ("linear", {"norm": "sw"}),
        (None, {"input_shape": (None, None, 3)}),
        ("etf", {"projector_layers": 2, "projector_width": 24}),
        ("linear", {"projector_layers": 1, "projector_kind": "etf"}),
        pytest.param("linear", {"dtype": "mixed_bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_onnx(tmp_path, head, changes):
    path = tmp_path / "model.onnx"
    model = make(head, **changes)
    formats.export_onnx(model, path)
    single = make(head, **(changes | {"dtype": "float32"}))
    for n, side in ((1, 32), (3, 49 if head is None else 32)):
        name, outputs, session = run_onnx(path, pixels(n, side=side))
        assert name == ("features" if head is None else "logits")
        assert_close(outputs, single(pixels(n, side=side)))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (
        etfzoo.models.classifier.ClassifierSpec.from_dict(json.loads(metadata["spec"]))
        == model.spec
    )
    names = json.loads(metadata["class_names"])
    assert names == (list(model.spec.class_names) if head else None)
    assert formats.onnx_difference(model, path) <= 1e-5
    # Another model's file is noticed.
    assert formats.onnx_difference(make(head, seed=2, **changes), path) > 1e-2
    assert leftovers(tmp_path) == ["model.onnx"]


def test_onnx_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    message = r"tf2onnx is not installed: pip install 'etfzoo\[onnx\]'"
    with pytest.raises(etfzoo.EtfzooError, match=message):
        formats.export_onnx(make(), tmp_path / "model.onnx")
    assert leftovers(tmp_path) == []


def test_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", "200k") as disk:
        for export, name in ((formats.export_onnx, "m.onnx"), (formats.export_keras, "m.keras")):
            with pytest.raises(etfzoo.EtfzooError, match="cannot write .*No space left on device"):
                export(make(), disk / name)
            assert leftovers(disk) == []


LOAD = """
import sys
import keras, numpy as np
for path in sys.argv[2:]:
    model = keras.saving.load_model(path)
    assert not [name for name in sys.modules if name.startswith(("etfzoo", "keras_cv"))]
    np.save(path + ".npy", model.predict(np.load(sys.argv[1]), verbose=0))
"""


def test_keras_files_in_keras_alone(tmp_path):
    np.save(tmp_path / "x.npy", pixels())
    heads = {"none": ("etf", "none"), "bn_l2": ("etf", "bn_l2"), "linear": ("linear", None)}
    models = {}
    for name, (head, feature_norm) in heads.items():
        folder = tmp_path / name
        folder.mkdir()
        model = make(head, **({"feature_norm": feature_norm} if feature_norm else {}))
        formats.export_keras(model, folder / "model.keras")
        assert leftovers(folder) == ["model.keras"]
        models[folder / "model.keras"] = model
    fresh_python(LOAD, tmp_path / "x.npy", *models)
    for path, model in models.items():
        assert_close(np.load(f"{path}.npy"), model(pixels()))


def test_keras_file_with_switchable_whitening(tmp_path):
    """Keras has no such layer: reading the file takes etfzoo."""
    model = make("linear", norm="sw")
    formats.export_keras(model, tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded(pixels()), model(pixels()))
    foreign = {type(x).__name__ for x in loaded.layers if type(x).__module__.startswith("etfzoo")}
    assert foreign == {"SwitchableWhitening"}


def test_keras_file_of_another_name(tmp_path):
    with pytest.raises(etfzoo.EtfzooError, match="name ends in .keras; got .*model.h5"):
        formats.export_keras(make(), tmp_path / "model.h5")


def test_recipe(tmp_path):
    model = make()
    version = etfzoo.publish(model, tmp_path / "rn18_etf.x")
    flags = f"--model={version}", "--format=onnx", f"--output={tmp_path}/new/m.onnx"
    assert "ONNX Runtime differs from Keras by" in run_recipe("export", *flags)
    assert_close(run_onnx(tmp_path / "new/m.onnx", pixels())[1], model(pixels()))
    (tmp_path / "m.onnx").touch()
    flags = f"--model={version}", "--format=onnx", f"--output={tmp_path}/m.onnx"
    again = run_recipe("export", *flags, code=2)
    assert again == f"error: {tmp_path}/m.onnx already exists; choose another --output\n"
    bad = run_recipe("export", f"--model={version}", "--format=tflite", code=2)
    assert bad.startswith("error: flag --format=tflite: unknown format 'tflite'")


@pytest.mark.slow
def test_recipe_stores_halves(tmp_path):
    model = make()
    version = etfzoo.publish(model, tmp_path / "rn18_etf.x")
    run_recipe("export", f"--model={version}", "--storage=float16", f"--output={tmp_path}/half")
    served = tf.saved_model.load(str(tmp_path / "half" / "1"))
    logits = served.signatures["serving_default"](images=pixels())["logits"]
    assert_close(logits, model(pixels()), 1e-2)

"""Tests of the exports: each in the runtime that it is for, .keras files in Keras alone."""

import importlib.util
import json
import sys
import types
import zipfile

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

import etfzoo
from etfzoo.zoo import export as formats
from testing import (
    assert_close,
    fresh_python,
    leftovers,
    make_image_folder,
    randomize,
    run_recipe,
    small_disk,
    smooth_image,
)
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
    assert formats.compare(model, path, "onnx").difference <= 1e-5
    # Another model's file is noticed.
    assert formats.compare(make(head, seed=2, **changes), path, "onnx").difference > 1e-2
    assert leftovers(tmp_path) == ["model.onnx"]


def test_onnx_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    message = r"tf2onnx is not installed: pip install 'etfzoo\[onnx\]'"
    with pytest.raises(etfzoo.EtfzooError, match=message):
        formats.export_onnx(make(), tmp_path / "model.onnx")
    assert leftovers(tmp_path) == []


def test_full_disk(tmp_path):
    exports = [(formats.export_onnx, "m.onnx"), (formats.export_keras, "m.keras")]
    exports += [(formats.export_litert, "m.tflite")]
    if importlib.util.find_spec("openvino"):
        exports += [(formats.export_openvino, "m.xml")]
    with small_disk(tmp_path / "disk", "16k") as disk:
        for export, name in exports:
            with pytest.raises(etfzoo.EtfzooError, match=f"cannot write .*{name}: "):
                export(make(), disk / name)
            assert leftovers(disk) == []


# ------------------------------------------------------------------------------ LiteRT, OpenVINO


def photos(count, side=32):
    """uint8 images as a camera delivers them."""
    return np.stack([smooth_image(side, side, seed) for seed in range(count)])


def run_litert(path, images):
    """What the interpreter says of a batch, and of what it takes and gives."""
    interpreter = tf.lite.Interpreter(str(path))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(taken["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(given["index"]), interpreter


def run_openvino(path, images):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(images)[0], core.read_model(str(path))


FILES = {
    "litert": (formats.export_litert, run_litert, "m.tflite"),
    "openvino": (formats.export_openvino, run_openvino, "m.xml"),
}


def exported(form, model, folder, *arguments):
    """The file of a format; skips where that is not installed."""
    if form == "openvino":
        pytest.importorskip("openvino")
    export, run, name = FILES[form]
    export(model, folder / name, *arguments)
    return folder / name, run


@pytest.mark.parametrize(
    "head, changes",
    [
        ("etf", {}),
        (None, {"dtype": "mixed_bfloat16"}),
        ("linear", {"norm": "sw"}),
    ],
)
@pytest.mark.parametrize("form", FILES)
def test_other_runtimes(form, head, changes, tmp_path):
    model = make(head, **changes)
    if form == "openvino" and changes.get("norm") == "sw":
        with pytest.raises(etfzoo.EtfzooError, match="Switchable Whitening .*export to ONNX"):
            formats.export_openvino(model, tmp_path / "m.xml")
        assert leftovers(tmp_path) == []
        return
    path, run = exported(form, model, tmp_path)
    images = photos(3)
    expected = make(head, **(changes | {"dtype": "float32"}))(images.astype("float32"))
    assert_close(run(path, images)[0], expected)  # normalisation is in the graph
    found = formats.compare(model, path, form, images)
    assert found.difference <= 1e-5 and found.agreement == 1 and found.images == 3
    assert formats.compare(make(head, seed=2, **changes), path, form).difference > 1e-2
    assert sorted(leftovers(tmp_path)) == sorted({path.name, *("m.bin",) * (form == "openvino")})


@pytest.mark.parametrize("form", FILES)
def test_halves_and_int8(form, tmp_path):
    model, images = make(), photos(40)
    sizes, differences = {}, {}
    for storage in formats.STORAGES:
        calibration = images[:32] if storage == "int8" else None
        path, _ = exported(form, model, tmp_path, storage, calibration)
        sizes[storage] = sum(p.stat().st_size for p in tmp_path.iterdir())
        differences[storage] = formats.compare(model, path, form, images[32:]).difference
    assert sizes["float16"] < 0.6 * sizes["float32"] and sizes["int8"] < 0.4 * sizes["float32"]
    assert differences["float32"] < 1e-5 < differences["float16"] < 5e-3
    assert differences["float16"] < differences["int8"] < 0.5


def test_int8_of_litert_computes_in_int8(tmp_path):
    images = photos(20)
    path, _ = exported("litert", make(), tmp_path, "int8", images)
    outputs, interpreter = run_litert(path, images)
    assert outputs.dtype == np.float32 and len(outputs) == 20
    kinds = {t["dtype"] for t in interpreter.get_tensor_details() if len(t["shape"]) == 4}
    floats = [
        t for t in interpreter.get_tensor_details()
        if t["dtype"] == np.float32 and len(t["shape"]) == 4 and t["shape"][-1] > 3
    ]  # fmt: skip
    assert np.int8 in kinds and not floats  # float32 are the pixels, before they are quantized


def test_metadata(tmp_path):
    model = make()
    path, _ = exported("litert", model, tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("labels.txt").decode().splitlines() == list(model.spec.class_names)
        spec = json.loads(archive.read("spec.json"))
    assert etfzoo.models.classifier.ClassifierSpec.from_dict(spec) == model.spec
    path, run = exported("openvino", model, tmp_path)
    stored = run(path, photos(1))[1]
    assert [x.any_name for x in (*stored.inputs, *stored.outputs)] == ["images", "logits"]
    spec = json.loads(stored.get_rt_info(["etfzoo", "spec"]).value)
    assert etfzoo.models.classifier.ClassifierSpec.from_dict(spec) == model.spec
    names = json.loads(stored.get_rt_info(["etfzoo", "class_names"]).value)
    assert names == list(model.spec.class_names)


def test_openvino_of_any_size(tmp_path):
    model = make(None, input_shape=(None, None, 3))
    path, run = exported("openvino", model, tmp_path)
    for side in (32, 49):
        images = photos(2, side)
        assert_close(run(path, images)[0], model(images.astype("float32")))


BAD = [
    (formats.export_litert, "m.tflite", {}, ("float8",), "unknown storage 'float8'"),
    (formats.export_litert, "m.tflite", {}, ("int8",), "int8 needs images"),
    (
        formats.export_openvino,
        "m.xml",
        {},
        ("int8", np.zeros([0, 32, 32, 3], "uint8")),
        "int8 needs images",
    ),
    (formats.export_openvino, "m.onnx", {}, (), "name ends in .xml; got .*m.onnx"),
    (
        formats.export_litert,
        "m",
        {"input_shape": (None, None, 3)},
        (),
        "LiteRT needs an image size",
    ),
]


@pytest.mark.parametrize("export, name, changes, arguments, message", BAD)
def test_exports_that_cannot_be(export, name, changes, arguments, message, tmp_path):
    with pytest.raises(etfzoo.EtfzooError, match=message):
        export(make(**changes), tmp_path / name, *arguments)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("package, storage", [("openvino", "float32"), ("nncf", "int8")])
def test_openvino_without_its_packages(package, storage, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", types.ModuleType("openvino"))
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{package} is not installed: pip install 'etfzoo\[openvino\]'"
    with pytest.raises(etfzoo.EtfzooError, match=message):
        formats.export_openvino(make(), tmp_path / "m.xml", storage, photos(2))
    assert leftovers(tmp_path) == []


# ----------------------------------------------------------------------------------------- Keras

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


def test_recipe_in_int8(tmp_path):
    model = make()
    make_image_folder(tmp_path / "photos", {"a": 20, "b": 20}, (40, 40))
    (tmp_path / "photos" / "a" / "000.png").write_bytes(b"no image")
    version = etfzoo.publish(model, tmp_path / "rn18_etf.x")
    flags = [f"--model={version}", "--format=litert", f"--output={tmp_path}/new/m.tflite"]
    flags += ["--storage=int8", f"--dataset=folder:{tmp_path}/photos", "--split=all"]
    assert "a/000.png (all split of folder:" in run_recipe("export", *flags, code=2)
    assert not (tmp_path / "new").exists()
    out = run_recipe("export", *flags, "--skip_corrupt", "--calibration_images=30")
    assert "LiteRT differs from Keras by" in out and "% of 9 images" in out
    assert run_litert(tmp_path / "new/m.tflite", photos(2))[0].shape == (2, 7)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--format=onnx", "--storage=float16"),
            "--format=onnx has no --storage=float16; it has: ",
        ),
        (("--storage=int8",), "--format=saved_model has no --storage=int8; it has: float32, float"),
        (
            ("--format=litert", "--storage=int8"),
            "of each layer from images: say of which --dataset",
        ),
        (("--format=litert", "--dataset=digits"), "--dataset is for --storage=int8"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path):
    assert message in run_recipe("export", "--model=none", *flags, code=2, cwd=tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_recipe_stores_halves(tmp_path):
    model = make()
    version = etfzoo.publish(model, tmp_path / "rn18_etf.x")
    run_recipe("export", f"--model={version}", "--storage=float16", f"--output={tmp_path}/half")
    served = tf.saved_model.load(str(tmp_path / "half" / "1"))
    logits = served.signatures["serving_default"](images=pixels())["logits"]
    assert_close(logits, model(pixels()), 1e-2)


@pytest.mark.parametrize("form, end", [("onnx", "onnx"), ("litert", "tflite"), ("openvino", "xml")])
def test_a_network_with_constants_of_its_own(form, end, tmp_path):
    """Those that Keras's Normalization keeps are no weights."""
    images = keras.Input((32, 32, 3))
    x = keras.layers.Normalization(mean=[9.0, 90, 200], variance=[2.0, 30, 400])(images)
    network = keras.Model(images, keras.layers.Conv2D(4, 3)(x))
    model = randomize(etfzoo.build_classifier(network, 3, head="linear"))
    path = str(tmp_path / f"model.{end}")
    getattr(formats, f"export_{form}")(model, path)
    assert formats.compare(model, path, form).difference <= 1e-5

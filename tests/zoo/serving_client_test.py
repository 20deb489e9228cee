"""Serving: the SavedModel in TensorFlow's C++ loader, and clients that ask a server for it.

TF Serving's own binary takes no part in these tests: see prediction_service.py.
"""

import base64
import contextlib
import json
import re
import socket
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow as tf

import etfzoo
from bad_requests import REFUSALS, answer, bad_requests, encode, legal_images, strings
from c_api import Loader, StatusError
from etfzoo.data.augment import evaluation_image
from etfzoo.data.folders import image_files
from etfzoo.data.sources import resolve
from etfzoo.zoo import export, serving_client
from prediction_service import Models
from prediction_service import serving as serving_models
from testing import (
    CHECKOUT,
    assert_close,
    finish,
    randomize,
    run_recipe,
    smooth_image,
    start_recipe,
)

pytestmark = pytest.mark.small_rn18

ROOT = CHECKOUT
SIDE = 32
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnü")
PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "rest"])


@pytest.fixture(scope="module")
def model():
    spec = {"num_classes": len(NAMES), "class_names": NAMES, "input_shape": (SIDE, SIDE, 3)}
    model = etfzoo.build_classifier("rn18", head="etf", feature_norm="bn", **spec)
    return randomize(model)


@pytest.fixture(scope="module")
def version(model, tmp_path_factory):
    return etfzoo.publish(model, tmp_path_factory.mktemp("models") / "rn18_etf.animals")


@pytest.fixture(scope="module")
def loader(version):
    with Loader(version) as loader:
        yield loader


@pytest.fixture(scope="module")
def images():
    """Encoded images of mixed kinds and sizes."""
    sizes = [(32, 32), (51, 75), (90, 40), (48, 64), (20, 17), (200, 33)]
    return [
        encode(smooth_image(*size, seed), ("PNG", "JPEG")[seed % 2])
        for seed, size in enumerate(sizes)
    ]


def evaluated(model, images):
    """What Keras says of encoded images: probabilities `[n, K]`."""
    pixels = [evaluation_image(i, SIDE, SIDE, model.spec.crop) for i in images]
    return tf.nn.softmax(model(np.stack(pixels))).numpy()


def assert_top5(outputs, probabilities):
    order = np.argsort(-probabilities, axis=-1)[:, :5]
    np.testing.assert_array_equal(outputs["class_ids"], order)
    # A logit of 20 that is 1e-5 of itself off changes its probability by up to 5e-5.
    assert_close(outputs["scores"], np.take_along_axis(probabilities, order, axis=-1), 1e-4)
    labels = [[x.decode() if isinstance(x, bytes) else x for x in row] for row in outputs["labels"]]
    assert labels == [[NAMES[i] for i in row] for row in order]


def test_loader_is_tensorflow_without_its_python(loader):
    assert "numpy" in loader.modules
    assert not {"tensorflow", "keras", "etfzoo"} & set(loader.modules)


def test_signatures_as_the_loader_returns_them(loader):
    kinds = {
        name: {
            way: {key: (dtype, shape) for key, (_, dtype, shape) in tensors.items()}
            for way, tensors in signature.items()
        }
        for name, signature in loader.signatures.items()
    }
    assert kinds.keys() == {"serving_default", "serving_bytes", "features"}
    pixels = {"images": ("float32", [-1, SIDE, SIDE, 3])}
    assert kinds["serving_default"] == {
        "inputs": pixels,
        "outputs": {
            "logits": ("float32", [-1, 7]),
            "probabilities": ("float32", [-1, 7]),
            "class_ids": ("int64", [-1]),
        },
    }
    assert kinds["serving_bytes"] == {
        "inputs": {"image_bytes": ("string", [-1])},
        "outputs": {
            "class_ids": ("int64", [-1, 5]),
            "labels": ("string", [-1, 5]),
            "scores": ("float32", [-1, 5]),
        },
    }
    assert kinds["features"]["inputs"] == pixels
    assert kinds["features"]["outputs"]["features"] == ("float32", [-1, 32])


@pytest.mark.parametrize("count", [1, 5])
def test_pixels_equal_keras(loader, model, count):
    pixels = np.random.default_rng(count).uniform(0, 255, (count, SIDE, SIDE, 3)).astype("float32")
    logits = model(pixels).numpy()
    outputs = loader.run("serving_default", images=pixels)
    assert_close(outputs["logits"], logits)
    assert_close(outputs["probabilities"], tf.nn.softmax(logits), 1e-4)
    np.testing.assert_array_equal(outputs["class_ids"], logits.argmax(-1))


def test_features_equal_keras(loader, model):
    pixels = np.random.default_rng(0).uniform(0, 255, (3, SIDE, SIDE, 3)).astype("float32")
    outputs = loader.run("features", images=pixels)
    expected = etfzoo.feature_model(model, [*outputs])(pixels)
    for name, value in outputs.items():
        assert_close(value, expected[name])


def test_bytes_equal_keras(loader, model, images):
    outputs = loader.run("serving_bytes", image_bytes=strings(*images))
    assert_top5(outputs, evaluated(model, images))


def test_strange_but_legal_images_equal_keras(loader, model):
    images = list(legal_images().values())
    outputs = loader.run("serving_bytes", image_bytes=strings(*images))
    assert_top5(outputs, evaluated(model, images))


def test_bad_bytes_are_refused_and_the_next_request_is_answered(loader, model, images):
    for bad in (b"", b"not an image", images[0][:60], images[1][:200]):
        with pytest.raises(StatusError) as error:
            loader.run("serving_bytes", image_bytes=strings(images[0], bad))
        assert error.value.code == "INVALID_ARGUMENT"
        outputs = loader.run("serving_bytes", image_bytes=strings(images[0]))
        assert_top5(outputs, evaluated(model, images[:1]))


def test_bad_requests(loader, images):
    """Two of each kind that benchmarks/attack.py sends by the hundred."""
    good = {"image_bytes": strings(*images)}
    expected = loader.run("serving_bytes", **good)["scores"]
    seen = []
    for number, (kind, signature, inputs) in enumerate(bad_requests(1, 66, SIDE)):
        code, message = answer(loader, signature, inputs)
        assert code in REFUSALS, (kind, code, message)
        if number == 3:
            before = loader.resident_kib()
        if number >= 3:
            np.testing.assert_array_equal(loader.run("serving_bytes", **good)["scores"], expected)
        seen.append(kind)
    assert len(set(seen)) == 33
    assert loader.peak_kib() - before < 100 * 1024  # a bomb would take gigabytes


def test_a_folder_that_is_no_saved_model(tmp_path):
    with pytest.raises(StatusError) as error:
        Loader(tmp_path)
    assert error.value.code == "NOT_FOUND"


# --- a server


@pytest.fixture(scope="module")
def other_version(tmp_path_factory):
    """Of the same model folder, and with other answers."""
    spec = {"num_classes": 3, "class_names": ("x", "y", "z"), "input_shape": (SIDE, SIDE, 3)}
    model = randomize(etfzoo.build_classifier("rn18", head="linear", **spec), seed=5)
    return etfzoo.publish(model, tmp_path_factory.mktemp("other") / "m", version=2)


@pytest.fixture(scope="module")
def addresses(loader, other_version):
    """Of a server with two versions of `animals`."""
    with Loader(other_version) as other:
        models = Models({"animals": {1: loader, 2: other}}, {"animals": {"stable": 1}})
        with serving_models(models) as addresses:
            yield addresses


@PROTOCOLS
def test_client_gives_what_keras_gives(addresses, protocol, model, images):
    client = serving_client.connect(
        addresses[protocol], "animals", protocol, version_label="stable"
    )
    for batch in (images, images[2:3]):  # the second one over the same connection
        assert_top5(client.predict(batch), evaluated(model, batch))


@PROTOCOLS
def test_versions_and_labels(addresses, protocol, images):
    def best(**which):
        client = serving_client.connect(addresses[protocol], "animals", protocol, **which)
        return client.predict(images[:1])["labels"][0, 0]

    assert best() == best(version=2)  # the highest one
    assert best() in ("x", "y", "z")
    assert best(version=1) == best(version_label="stable")
    assert best(version=1) in NAMES


@PROTOCOLS
@pytest.mark.parametrize(
    "given, code, message",
    [
        ({"model": "plants"}, "NOT_FOUND", "serves no model 'plants': Servable not found"),
        ({"version": 7}, "NOT_FOUND", "serves no model 'animals' version 7"),
        ({"version_label": "new"}, "INVALID_ARGUMENT", "Unrecognized servable version label: new"),
        ({"signature": "nope"}, None, 'Serving signature key "nope" not found'),
        ({"signature": "features"}, "INVALID_ARGUMENT", "inputs do not match the signature"),
        ({"images": [b"bad"]}, "INVALID_ARGUMENT", "neither a JPEG nor a PNG image"),
        ({"images": []}, "INVALID_ARGUMENT", "batch is empty"),
    ],
)
def test_refusals_are_one_clear_line(addresses, protocol, images, given, code, message):
    given = {"model": "animals", "images": images[:1], "signature": "serving_bytes"} | given
    images, signature = given.pop("images"), given.pop("signature")
    client = serving_client.connect(addresses[protocol], protocol=protocol, **given)
    with pytest.raises(serving_client.RequestFailed) as error:
        client.predict(images, signature)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "{{node" not in str(error.value)
    assert code in (None, error.value.code)


@PROTOCOLS
def test_no_answer_in_time(protocol, images):
    with socket.create_server(("localhost", 0)) as silent:
        address = f"localhost:{silent.getsockname()[1]}"
        client = serving_client.connect(address, "animals", protocol, timeout=0.3)
        with pytest.raises(serving_client.RequestFailed, match=f"{address} gave no .* 0.3 s") as e:
            client.predict(images[:1], "serving_bytes")
    assert e.value.code == "DEADLINE_EXCEEDED"


@PROTOCOLS
def test_no_server_there(protocol):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    client = serving_client.connect(f"localhost:{port}", "animals", protocol)
    with pytest.raises(
        serving_client.RequestFailed, match=f"no server answers at localhost:{port}"
    ):
        client.predict([b"x"])


@contextlib.contextmanager
def canned_server(*answers):
    """Reads a request and sends the next answer as it is, a connection each; its address."""
    with socket.create_server(("localhost", 0)) as server:

        def serve():
            for content in answers:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(content)

        threading.Thread(target=serve, daemon=True).start()
        yield f"localhost:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no server answers at"),  # it hangs up
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "without TF Serving's JSON"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "no server answers at"),
    ],
)
def test_rest_client_and_something_else(content, message):
    with canned_server(content) as address:
        with pytest.raises(serving_client.RequestFailed, match=message):
            serving_client.connect(address, "m", "rest").predict([b"x"])


def test_rest_client_connects_again_where_the_server_closed_an_idle_connection():
    body = b'{"outputs": [[0.5, NaN]]}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with canned_server(answer, answer) as address:
        client = serving_client.connect(address, "m", "rest")
        for _ in range(2):
            np.testing.assert_array_equal(client.predict([b"x"])["outputs"], [[0.5, np.nan]])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"protocol": "grcp"}, "unknown protocol 'grcp'; did you mean grpc"),
        ({"version": 1, "version_label": "a"}, "not both"),
        ({"server": "http://host:1"}, "written host:port"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(etfzoo.EtfzooError, match=message):
        serving_client.connect(**{"server": None, "model": "m"} | given)


def test_grpc_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(etfzoo.EtfzooError, match="pip install --no-deps tensorflow-serving-api"):
        serving_client.connect(None, "m")


@pytest.mark.parametrize(
    "body",
    [
        '{"signature_name": "serving_bytes", "instances": [{"b64": "%s"}, {"b64": "%s"}]}',
        '{"signature_name": "serving_bytes", "instances": [{"image_bytes": {"b64": "%s"}}, '
        '{"image_bytes": {"b64": "%s"}}]}',
    ],
)
def test_row_format_as_the_readme_of_serving_sends_it(addresses, model, images, body):
    encoded = tuple(base64.b64encode(image).decode() for image in images[:2])
    url = f"http://{addresses['rest']}/v1/models/animals/versions/1:predict"
    with urllib.request.urlopen(url, (body % encoded).encode()) as response:
        rows = json.load(response)["predictions"]
    assert_top5({k: [row[k] for row in rows] for k in rows[0]}, evaluated(model, images[:2]))
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(url, b'{"instances": []')
    assert error.value.code == 400


# --- the recipes, as a user calls them


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    for number, image in enumerate(images):
        suffix = "png" if image.startswith(b"\x89PNG") else "jpg"
        place = folder / "deep" if number > 3 else folder
        (place / f"{number}.{suffix}").write_bytes(image)
    (folder / "notes.txt").write_text("no image")
    return folder


def table_of(out):
    """Name of the file to its cells, `[(label, percent)]`."""
    rows = re.findall(r"^\S*?(\w+\.\w+) +((?:\w+ [\d.]+ % *)+)$", out, re.MULTILINE)
    return {name: re.findall(r"(\w+) ([\d.]+) %", cells) for name, cells in rows}


def expected_table(model, images):
    table = {}
    for number, row in enumerate(evaluated(model, images)):
        suffix = "png" if images[number].startswith(b"\x89PNG") else "jpg"
        best = np.argsort(-row)[:5]
        table[f"{number}.{suffix}"] = [(NAMES[i], f"{100 * row[i]:.1f}") for i in best]
    return table


def assert_same_table(actual, expected):
    assert actual.keys() == expected.keys()
    for name, cells in expected.items():
        for (label, percent), (wanted, share) in zip(actual[name], cells, strict=True):
            assert abs(float(percent) - float(share)) < 0.11
            assert label == wanted or float(share) < 0.2  # which is a tie in print


@PROTOCOLS
def test_serve_client(addresses, protocol, photos, model, images):
    flags = (f"--server={addresses[protocol]}", f"--protocol={protocol}", "--model=animals")
    flags += ("--version_label=stable", "--repeat=3", "--concurrency=4")
    out = run_recipe("serve_client", *flags, photos)
    assert_same_table(table_of(out), expected_table(model, images))
    assert re.search(
        r"18 requests, 4 at a time: p50 [\d.]+ ms  p90 [\d.]+ ms  p99 [\d.]+ ms  [\d.]+ images/s",
        out,
    )
    bars = re.findall(r"to +[\d.]+ ms +(\d+)", out)
    assert len(bars) == 10 and sum(map(int, bars)) == 18


def test_serve_client_names_the_bad_image(addresses, photos):
    flags = (f"--server={addresses['grpc']}", "--model=animals")
    err = run_recipe("serve_client", *flags, photos / "0.png", photos / "notes.txt", code=2)
    assert "notes.txt: localhost" in err and "neither a JPEG nor a PNG image" in err


def test_predict(version, photos, model, images, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "half.jpg").write_bytes(images[1][:-100])
    csv = tmp_path / "predictions.csv"
    flags = (f"--model={version.parent}", "--batch_size=4", f"--output={csv}")
    err = run_recipe("predict", *flags, photos, bad, photos / "0.png", code=2)
    assert (
        f"{bad}/half.jpg is not a readable image: jpeg" in err and "; --skip_corrupt leaves" in err
    )
    assert not csv.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["bad"]
    out = run_recipe("predict", *flags, "--skip_corrupt", bad, photos)
    assert f"left out: {bad}/half.jpg is not a readable image" in out
    assert_same_table(table_of(out), expected_table(model, images))
    lines = csv.read_text("utf-8").splitlines()
    assert lines[0].startswith("image,class1,score1,class2") and len(lines) == 7
    best = evaluated(model, images[:1])[0]
    name, label, score = lines[1].split(",")[:3]
    assert (name, label) == (f"{photos}/0.png", NAMES[best.argmax()])
    assert abs(float(score) - best.max()) < 2e-6


def test_predict_without_an_image():
    assert "no such file or folder: no/such.jpg" in run_recipe(
        "predict", "--model=m", "no/such.jpg", code=2
    )


def test_image_files(photos, tmp_path):
    names = [str(p.relative_to(photos)) for p in image_files([photos, photos / "notes.txt"])]
    assert names == ["0.png", "1.jpg", "2.png", "3.jpg", "deep/4.png", "deep/5.jpg", "notes.txt"]
    with pytest.raises(etfzoo.EtfzooError, match=f"no images in {tmp_path}"):
        image_files([tmp_path])


@pytest.mark.slow
def test_from_training_to_the_answers_of_a_server(embedded_dir, tmp_path):
    """Workdir of a fine-tuning, publish, C++ loader, service, client: the recipes of the docs."""
    flags = (f"--data_dir={embedded_dir}", "--protocol=quickstart", "--epochs=1")
    source, tuned = tmp_path / "source", tmp_path / "tuned"
    flags = (*flags, "--batch_size=50")
    run_recipe("pretrain", "--dataset=digits", "--backbone=rn18", *flags, f"--workdir={source}")
    target = "--dataset=shapes/outlines"
    run_recipe("finetune", f"--model={source}", target, *flags, f"--workdir={tuned}")
    model = etfzoo.load(tuned)
    version = etfzoo.publish(model, tmp_path / "models" / "rn18_etf.outlines")
    records = list(resolve("shapes/outlines", str(embedded_dir)).records("test").take(12))
    images = [record["image"].numpy() for record in records]
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(images):
        suffix = "png" if image.startswith(b"\x89PNG") else "jpg"
        (photos / f"{number:02d}.{suffix}").write_bytes(image)
    height, width = model.spec.input_shape[:2]
    pixels = np.stack([evaluation_image(i, height, width, model.spec.crop) for i in images])
    with Loader(version) as loader, serving_models(Models({"outlines": {1: loader}})) as addresses:
        assert "tensorflow" not in loader.modules
        assert_close(loader.run("serving_default", images=pixels)["logits"], model(pixels))
        tables = [
            table_of(run_recipe("serve_client", f"--server={address}", f"--protocol={protocol}",
                         "--model=outlines", photos))
            for protocol, address in addresses.items()
        ]  # fmt: skip
    predicted = table_of(run_recipe("predict", f"--model={tuned}", photos))
    best = [model.spec.class_names[i] for i in model(pixels).numpy().argmax(-1)]
    assert [cells[0][0] for cells in predicted.values()] == best
    for table in tables:
        assert_same_table(table, predicted)


# --- what lies in serving/


def models_config():
    """The entries of serving/models.config by name."""
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = (ROOT / "serving" / "models.config").read_text("utf-8")
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    models = {model.name: model for model in config.model_config_list.config}
    assert len(models) == len(config.model_config_list.config)
    return models


def test_models_config():
    models = models_config()
    assert len(models) >= 2
    policies = {m.model_version_policy.WhichOneof("policy_choice") for m in models.values()}
    assert policies == {"latest", "specific"}
    for model in models.values():
        assert model.base_path.startswith("/models/") and model.model_platform == "tensorflow"
        served = set(model.model_version_policy.specific.versions)
        assert set(model.version_labels.values()) <= served
        folder = ROOT / "saved_models" / model.base_path.removeprefix("/models/")
        assert all((folder / str(version) / "saved_model.pb").exists() for version in served or [1])
    assert any(model.version_labels for model in models.values())


@pytest.mark.slow
def test_what_models_config_names_is_served_as_keras_has_it(tmp_path):
    images = [smooth_image(90, 120, seed) for seed in range(3)]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(encode(image, "PNG"))
    for name, entry in models_config().items():
        folder = ROOT / "saved_models" / entry.base_path.removeprefix("/models/") / "1"
        with Loader(folder) as loader, serving_models(Models({name: {1: loader}})) as addresses:
            where = f"--server={addresses['rest']}", "--protocol=rest", f"--model={name}"
            served = table_of(run_recipe("serve_client", *where, tmp_path))
        predict = start_recipe("predict", f"--model={folder}", tmp_path)  # knows the real rn18
        assert_same_table(served, table_of(finish("predict", predict)))


def test_batching_config():
    """Against the fields of BatchingParameters, whose protobuf no package on PyPI carries."""
    text = (ROOT / "serving" / "batching.config").read_text("utf-8")
    text = re.sub(r"#.*", "", text)
    values = dict(re.findall(r"(\w+) \{ value: (\d+) \}", text))
    names = ["max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"]
    assert sorted(values) == sorted(names)
    sizes = [int(size) for size in re.findall(r"allowed_batch_sizes: (\d+)", text)]
    assert sizes == sorted(set(sizes)) and sizes[-1] == int(values["max_batch_size"])
    rest = re.sub(r"\w+ \{ value: \d+ \}|allowed_batch_sizes: \d+", "", text)
    assert not rest.strip()


def test_compose_names_files_that_are_there():
    text = (ROOT / "serving" / "compose.yaml").read_text("utf-8")
    files = re.findall(r"=/config/(\S+)", text)
    assert {"models.config", "batching.config", "monitoring.config"} == set(files)
    assert all((ROOT / "serving" / name).is_file() for name in files)


@pytest.mark.slow
@pytest.mark.parametrize("backbone, limits", [("rn50", (106, 54)), ("rn101", (182, 92))])
def test_large_networks_agree_everywhere(backbone, limits, tmp_path):
    """Keras, TensorFlow's Python loader, its C++ loader and ONNX Runtime; sizes in MB."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = etfzoo.build_classifier(backbone, 1000, head="linear")
    randomize(model)
    images = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype("float32")
    expected = np.asarray(model(images))
    folder = etfzoo.publish(model, tmp_path / f"{backbone}_linear.x")
    served = tf.saved_model.load(str(folder)).signatures["serving_default"]
    assert_close(served(images=images)["logits"], expected)
    with Loader(folder) as loader:
        assert_close(loader.run("serving_default", images=images)["logits"], expected)
    export.export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert_close(session.run(None, {"images": images})[0], expected)
    assert np.array_equal(etfzoo.load(folder)(images), expected)
    half = etfzoo.publish(model, tmp_path / "half", storage="float16")
    for path, limit in zip((folder, half), limits, strict=True):
        files = [p for p in path.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) <= limit * 1e6
        assert max(p.stat().st_size for p in files) <= 95e6

"""Keras's ImageNet weights, by files of their layout that Keras writes here.

The public files themselves cannot be had here: what is not tested is that they have this layout.
"""

import hashlib

import h5py
import keras
import numpy as np
import pytest
from keras.applications import imagenet_utils
from keras.src.legacy.saving import legacy_h5_format

import etfzoo
import server as http
from etfzoo import internals
from etfzoo.errors import EtfzooError
from etfzoo.zoo import cache, download, keras_weights
from testing import assert_close, random_pixels

NAME = "resnet50_linear.in1k_keras"
FILE = "resnet50_weights_tf_dim_ordering_tf_kernels.h5"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Keras's ResNet50 in a state that no initializer gives, and its file."""
    network = keras.applications.ResNet50(weights=None, classifier_activation=None)
    rng = np.random.default_rng(0)
    for v in network.variables:
        noise = rng.normal(size=v.shape)
        if v.name in ("gamma", "moving_variance"):
            v.assign(np.abs(1 + 0.2 * noise))
        elif v.name != "kernel":
            v.assign(0.1 * noise)
    path = tmp_path_factory.mktemp("server") / FILE
    with h5py.File(path, "w") as file:  # as the public files are: by layers in their order
        legacy_h5_format.save_weights_to_hdf5_group(file, network)
    return network, path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Empty caches of etfzoo and Keras; the second one."""
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "keras/models").mkdir(parents=True)
    return tmp_path / "keras"


@pytest.fixture
def list_file(tmp_path, monkeypatch):
    """Lets Keras's table name a file, of which a server is there; gives the server's faults."""
    monkeypatch.setattr(download, "WAITS", (0.01,))

    def of(path, md5=None):
        url = f"{served.url}/{path.name}"
        there = url, md5 or hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setattr(internals, "keras_weights", lambda network: there)
        served.root = path.parent
        return served.faults

    with http.serve(tmp_path) as served:
        yield of


@pytest.fixture
def small(tmp_path):
    """A file whose content is no matter."""
    path = tmp_path / FILE
    path.write_bytes(b"weights" * 999)
    return path


@pytest.mark.slow
def test_outputs_are_those_of_keras(theirs, list_file, tmp_path):
    list_file(theirs[1])
    model = etfzoo.load(NAME)
    assert model.spec.backbone == "keras:ResNet50" and model.spec.num_classes == 1000
    assert model.spec.class_names[0] == "n01440764" and model.spec.class_names[999] == "n15075141"
    images = random_pixels(2, side=224)
    given = imagenet_utils.preprocess_input(images.copy(), mode="caffe")
    wanted = keras.ops.convert_to_numpy(theirs[0](given))
    assert_close(model(images), wanted, 1e-5)
    flowers = etfzoo.load(NAME, num_classes=102, head="etf", input_shape=(64, 64, 3))
    assert flowers.output_shape == (None, 102)
    kept = cache.home() / "keras"
    assert [path.name for path in kept.iterdir()] == [FILE]
    published = etfzoo.publish(model, tmp_path / NAME, licence=keras_weights.LICENCE)
    assert_close(etfzoo.load(published)(images), wanted, 1e-5)


def test_a_wrong_file_is_refused(small, list_file):
    list_file(small, md5="0" * 32)
    with pytest.raises(EtfzooError, match=f"{FILE} is not the file that Keras lists"):
        keras_weights.fetch("ResNet50")
    list_file(small)["/" + FILE] = [http.status(404)]
    with pytest.raises(EtfzooError, match="404"):
        keras_weights.fetch("ResNet50")
    assert not list((cache.home() / "keras").iterdir())


def test_a_file_of_something_else(small, list_file):
    list_file(small)["/" + FILE] = [http.drop(100), http.good]
    assert keras_weights.fetch("ResNet50").read_bytes() == b"weights" * 999
    with pytest.raises(EtfzooError, match="is no file of ResNet50"):
        etfzoo.load(NAME)


def test_files_that_are_here_are_not_downloaded(small, list_file, home, monkeypatch):
    list_file(small)
    monkeypatch.setenv("ETFZOO_OFFLINE", "1")
    with pytest.raises(EtfzooError, match="ETFZOO_OFFLINE forbids"):
        keras_weights.fetch("ResNet50")
    own = home / "models" / FILE
    own.write_bytes(b"another")
    with pytest.raises(EtfzooError, match="ETFZOO_OFFLINE forbids"):
        keras_weights.fetch("ResNet50")
    own.write_bytes(small.read_bytes())
    assert keras_weights.fetch("ResNet50") == own
    assert etfzoo.load(NAME, load_weights=False, num_classes=5).output_shape == (None, 5)


def test_what_is_known_without_the_file():
    assert set(keras_weights.NETWORKS) <= set(etfzoo.list_models())
    found = etfzoo.info(NAME)
    assert found["licence"].startswith("MIT") and found["num_classes"] == 1000
    assert found["published"] and found["path"] is None
    spec = etfzoo.spec(NAME)
    assert spec.bgr and spec.mean == (123.68, 116.779, 103.939) and spec.head == "linear"
    for network in keras_weights.NETWORKS.values():
        url, md5 = internals.keras_weights(network.lower())
        assert url.startswith("https://") and len(md5) == 32
    with pytest.raises(EtfzooError, match="did you mean .*resnet50_linear.in1k_keras"):
        etfzoo.info("resnet50_linear.in1k")

"""What reaches into TensorFlow, Keras and Python, by what the public sees of it.

A test that fails with a new version names what has moved. Some also try to do without: where that
works too, the function of `etfzoo.internals` can go.
"""

import contextlib
import ctypes
import gc
import os
import signal
import struct
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from etfzoo import internals
from testing import CHECKOUT


def value_of(loaded):
    return loaded.double(tf.constant(1.0)).numpy().tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A SavedModel of `weights.a%2Fb`, and of 3 times it plus 1, which is not stored."""
    module = tf.Module()
    module.weights = {"a%2Fb": tf.Variable([1.0, 2.0]), "other": tf.Variable(5, dtype=tf.int64)}
    module.beside = tf.Variable([7.0])
    module.derived = internals.variable_without_value([2])

    def derive():
        module.derived.assign(3 * module.weights["a%2Fb"] + 1)

    module.on_load = internals.run_on_load(derive)
    module.double = tf.function(
        lambda x: x * (module.derived + module.derived),
        input_signature=[tf.TensorSpec([], tf.float32)],
    )
    path = tmp_path_factory.mktemp("saved") / "model"
    signatures = {"double": module.double.get_concrete_function()}
    tf.saved_model.save(module, str(path), signatures=signatures)
    return path


def test_a_variable_without_value_is_not_stored_and_derived_on_load(folder):
    stored = dict(tf.train.list_variables(str(folder / "variables/variables")))
    shapes = [shape for name, shape in stored.items() if "_CHECKPOINTABLE" not in name]
    assert sorted(shapes) == [[], [1], [2]]  # other, beside, and a%2Fb alone
    loaded = tf.saved_model.load(str(folder))
    assert value_of(loaded) == [8.0, 14.0]
    assert loaded.signatures["double"](tf.constant(1.0))["output_0"].numpy().tolist() == [8.0, 14.0]


def test_a_session_derives_on_load_too(folder):
    """Restored and initialised by the graph's own operations, as in TF Serving."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        graph = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
        signature = graph.signature_def["double"]
        (given,), (wanted,) = signature.inputs.values(), signature.outputs.values()
        assert session.run(wanted.name, {given.name: 1.0}).tolist() == [8.0, 14.0]


def test_copies_in_one_process_share_nothing(folder):
    first, second = tf.saved_model.load(str(folder)), tf.saved_model.load(str(folder))
    first.derived.assign([0.0, 0.0])
    assert value_of(second) == [8.0, 14.0]
    del first
    gc.collect()
    assert value_of(second) == [8.0, 14.0]


def test_what_is_derived_is_derived_again_where_it_is_saved_again(folder, tmp_path):
    loaded = tf.saved_model.load(str(folder))
    loaded.weights["a%2Fb"].assign([0.0, 1.0])
    assert value_of(loaded) == [8.0, 14.0]
    tf.saved_model.save(loaded, str(tmp_path / "again"))
    assert value_of(tf.saved_model.load(str(tmp_path / "again"))) == [2.0, 8.0]


def test_saved_dict(folder):
    found = internals.SavedDict(folder, "weights")
    assert found.keys() == {"a%2Fb", "other"} and len(found) == 2
    assert found.shapes == {"a%2Fb": (2,), "other": ()}
    np.testing.assert_array_equal(found["a%2Fb"], np.array([1, 2], np.float32), strict=True)
    np.testing.assert_array_equal(found["other"], np.array(5, np.int64), strict=True)
    assert dict(internals.SavedDict(folder, "none")) == {}
    with pytest.raises(tf.errors.NotFoundError):
        internals.SavedDict(folder / "none", "weights")


def crc(content):
    """CRC-32C, masked as in TensorFlow's tables."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def number(value):
    """A varint of a protocol buffer."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def saved_dict(folder, entries, data, dtype=1):
    """Variables whose index says what it is told to: sizes of arrays by key, all at one place.

    Written by hand, as a table of one block: TensorFlow writes no such index.
    """

    def block(rows):
        content = b"".join(
            number(0) + number(len(k)) + number(len(v)) + k + v for k, v in sorted(rows.items())
        )
        starts, at = [], 0
        for k, v in sorted(rows.items()):
            starts.append(at)
            at += len(number(0) + number(len(k)) + number(len(v)) + k + v)
        content += struct.pack(f"<{len(starts or [0]) + 1}I", *(starts or [0]), len(starts or [0]))
        return content, content + b"\0" + crc(content + b"\0")

    rows = {b"": b"\x08\x01\x1a\x02\x08\x01"}  # one shard, of the first version
    for name, count in entries.items():
        dim = b"\x08" + number(count)
        shape = b"\x12" + number(len(dim)) + dim
        entry = b"\x08" + number(dtype) + b"\x12" + number(len(shape)) + shape
        entry += b"\x28" + number(4 * count) + b"\x35" + crc(data[: 4 * count])
        rows[f"weights/{name}/.ATTRIBUTES/VARIABLE_VALUE".encode()] = entry
    table = b""
    handles = []
    for content in (rows, {}):
        plain, framed = block(content)
        handles.append(number(len(table)) + number(len(plain)))
        table += framed
    plain, framed = block({b"x": handles[0]})
    handles.append(number(len(table)) + number(len(plain)))
    table += framed + (handles[1] + handles[2]).ljust(40, b"\0")
    (folder / "variables").mkdir(parents=True)
    path = folder / "variables/variables.index"
    path.write_bytes(table + struct.pack("<Q", 0xDB4775248B80FB57))
    path.with_name("variables.data-00000-of-00001").write_bytes(data)
    return folder


def test_an_index_never_unfolds_its_files(tmp_path):
    data = np.arange(500, dtype=np.float32).tobytes()
    good = internals.SavedDict(saved_dict(tmp_path / "good", {"x": 300, "y": 200}, data), "weights")
    np.testing.assert_array_equal(good["y"], np.arange(200, dtype=np.float32))
    names = {f"n{i:04d}": 500 for i in range(300)}
    for case, entries in {
        "shared": names,
        "large": {"x": 10**12},
        "longer": {"x": 501},
        "overflowing": {"x": 2**62},
    }.items():
        folder = saved_dict(tmp_path / case, entries, data)
        with pytest.raises((ValueError, tf.errors.OpError)) as caught:
            internals.SavedDict(folder, "weights")
        assert "declares other values than the data files hold" in str(caught.value)
    texts = saved_dict(tmp_path / "texts", {"x": 10}, data, dtype=7)
    with pytest.raises(ValueError, match="declares other values"):
        internals.SavedDict(texts, "weights")
    index = tmp_path / "good/variables/variables.index"
    os.truncate(index, internals.MAX_INDEX + 1)
    with pytest.raises(ValueError, match="the index is larger than 4194304 bytes"):
        internals.SavedDict(tmp_path / "good", "weights")


def test_output_shapes_are_inferred_where_they_are_not_stored(tmp_path):
    module = tf.Module()
    module.kernel = tf.Variable(np.random.default_rng(0).normal(size=(3, 3, 3, 4)), dtype="float32")

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.float32, name="images")])
    def features(images):
        y = tf.nn.relu(tf.nn.conv2d(images, module.kernel, 2, "SAME"))
        return {"features": tf.reduce_mean(y, [1, 2])}

    module.features = features
    tf.saved_model.save(module, str(tmp_path), signatures={"features": features})
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")

    def outputs():
        signature = tf.saved_model.load(str(tmp_path)).signatures["features"]
        return signature.structured_outputs, signature(images=images)["features"].numpy()

    graph, before = tmp_path / "saved_model.pb", outputs()
    size = graph.stat().st_size
    internals.remove_output_shapes(tmp_path)
    # Where it stays as large, TensorFlow does not store them any more.
    assert graph.stat().st_size < 0.95 * size and not (tmp_path / "fingerprint.pb").exists()
    after = outputs()
    assert after[0] == before[0] and after[0]["features"].shape == (None, 4)
    np.testing.assert_array_equal(after[1], before[1])


def test_prediction_log():
    log = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2").PredictionLog
    inputs = {
        "images": tf.make_tensor_proto(np.arange(300.0).reshape(3, 100)),
        "image_bytes": tf.make_tensor_proto([b"\0" * 20_000, b""]),
    }
    found = log.FromString(internals.prediction_log("serving_bytes", inputs))
    expected = log()
    request = expected.predict_log.request
    request.model_spec.signature_name = "serving_bytes"
    for name, proto in inputs.items():
        request.inputs[name].CopyFrom(proto)
    assert found == expected


def xla_compiles_in(**options):
    """What a function and one that it calls see while they are traced."""
    seen = []

    @tf.function(autograph=False)
    def inner(x):
        seen.append(internals.xla_compiles())
        return x

    def outer(x):
        seen.append(internals.xla_compiles())
        return tf.while_loop(lambda i: i < 3, lambda i: inner(i) + 1, [inner(x)])

    tf.function(outer, autograph=False, **options).get_concrete_function(
        tf.TensorSpec([], tf.int32)
    )
    assert len(set(seen)) == 1 and len(seen) > 1
    return seen[0]


def test_xla_compiles(monkeypatch):
    assert not internals.xla_compiles()
    assert not xla_compiles_in() and not xla_compiles_in(jit_compile=False)
    assert xla_compiles_in(jit_compile=True)
    assert not internals.xla_compiles()
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_auto_jit=2")
    assert internals.xla_compiles()
    monkeypatch.delenv("TF_XLA_FLAGS")
    tf.config.optimizer.set_jit(True)
    try:
        assert internals.xla_compiles()
    finally:
        tf.config.optimizer.set_jit(False)


def test_slurm_tasks():
    found = internals.slurm_tasks("node[9-10],login,gpu[08,10-11]", "1(x2),2,4(x3)")
    hosts = ["node9", "node10", "login", "gpu08", "gpu10", "gpu11"]
    assert found == list(zip(hosts, [1, 1, 2, 4, 4, 4], strict=True))


@pytest.mark.parametrize("step", [("node[", "1"), ("a,b", "1"), ("a", "many"), ("", "1")])
def test_slurm_tasks_that_cannot_be_read(step):
    with pytest.raises(ValueError):
        internals.slurm_tasks(*step)


class Doubled(keras.layers.Dense):
    def call(self, inputs):
        return 2 * super().call(inputs)


def network():
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2)(keras.layers.Dense(3, name="first")(inputs))
    return keras.Model(inputs, outputs)


def test_a_changed_class_counts_in_the_graph_it_is_in():
    model, x = network(), np.ones((5, 4), "float32")
    layer = model.get_layer("first")
    variables, before = list(layer.variables), model.predict(x, verbose=0)
    internals.change_class(layer, Doubled)
    assert type(layer) is Doubled and all(
        a is b for a, b in zip(layer.variables, variables, strict=True)
    )
    np.testing.assert_allclose(model(x), 2 * before, rtol=1e-6)  # the biases are zero
    # Keras goes by the class where it makes the layer again.
    assert type(keras.models.clone_model(model).get_layer("first")) is Doubled
    with pytest.raises(TypeError, match="no subclass"):
        internals.change_class(layer, keras.layers.Conv2D)


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # of the files that do not fit
def test_weight_files_of_a_subclass_and_its_base(tmp_path):
    class Twice(keras.layers.Dense):
        pass

    def filled(value):
        model = network()
        internals.change_class(model.get_layer("first"), Twice)
        model.set_weights([np.full_like(w, value) for w in model.get_weights()])
        return model

    path, plain = tmp_path / "x.weights.h5", network()
    filled(1.0).save_weights(path)
    with pytest.raises(ValueError, match="twice|first"):  # else it is not needed any more
        plain.load_weights(path)
    internals.share_weight_files(Twice)
    filled(2.0).save_weights(path)
    plain.load_weights(path)
    assert all((w == 2).all() for w in plain.get_weights())
    plain.set_weights([w + 1 for w in plain.get_weights()])
    plain.save_weights(path)
    model = filled(0.0)
    model.load_weights(path)
    assert all((w == 3).all() for w in model.get_weights())


@pytest.fixture
def noisy(tmp_path, monkeypatch):
    """Modules that write to file descriptor 2 while they are imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "noisy_good.py").write_text("import os\nos.write(2, b'a notice')\n")
    (tmp_path / "noisy_bad.py").write_text("import os\nos.write(2, b'why')\nimport no_such_thing\n")
    yield
    sys.modules.pop("noisy_good", None)


def test_import_quietly(noisy, capfd):
    internals.import_quietly("noisy_good")
    os.write(2, b"after")
    assert "noisy_good" in sys.modules and capfd.readouterr().err == "after"
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        internals.import_quietly("noisy_bad")
    os.write(2, b" after")
    assert capfd.readouterr().err == "why after"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_take_back_sigterm():
    libc, heard = ctypes.CDLL(None), []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        libc.signal(signal.SIGTERM, ctypes.c_void_p(1))  # SIG_IGN, behind Python's back
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        internals.take_back_sigterm()
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


PARENT = """
import subprocess, sys, time
from etfzoo import internals
assert not {"tensorflow", "keras"} & sys.modules.keys()
wait = "trap 'echo told to end; exit' TERM; echo waits; for i in $(seq 200); do sleep 0.05; done"
subprocess.Popen(["sh", "-c", wait], preexec_fn=internals.end_with_parent)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_a_child_is_told_to_end_when_its_parent_is_killed():
    """And the module is one that a light process can import."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=CHECKOUT, text=True
    )
    with parent:
        assert parent.stdout.readline() == "waits\n"
        parent.send_signal(signal.SIGKILL)
        # It ends when the child has ended as well.
        assert parent.stdout.read() == "told to end\n"


@pytest.mark.parametrize("forgotten", [True, False])
def test_forgotten_gradients_let_go_of_their_variables(forgotten):
    """Without `forgetting_gradients` TensorFlow keeps them: where it does not, that can go."""

    @tf.custom_gradient
    def square(x, weights):
        return x * weights, lambda dy: (dy * weights, dy * x)

    def traced():
        weights = tf.Variable([2.0])
        step = tf.function(lambda x: square(x, weights.value()))
        assert step(tf.constant(3.0)).numpy() == 6
        return weakref.ref(step.get_concrete_function(tf.TensorSpec([], tf.float32)).graph)

    with internals.forgetting_gradients() if forgotten else contextlib.nullcontext():
        graph = traced()
    gc.collect()
    assert (graph() is None) == forgotten

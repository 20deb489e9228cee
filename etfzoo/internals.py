"""The one address of what reaches past the public names of TensorFlow, Keras, JAX and Python.

Each function says what it touches and why there is no public way. `tests/internals_test.py` (of
JAX `tests/runtime/workers_jax_test.py`) tests them by their effect, so far with TensorFlow 2.21.0,
Keras 3.15.1 and JAX 0.10.2: try new versions with it.

Every room may use this module: it imports TensorFlow and Keras only where a function needs them.
"""

import atexit
import collections
import contextlib
import ctypes
import importlib
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

MAX_INDEX = 2**22  # bytes of a SavedModel's index of variables; that of a ResNet101 has 2**16
# Layers of ConvNeXt that Keras has no public name for; its files address them by their module.
UNNAMED_LAYERS = ("LayerScale", "StochasticDepth")
_ENDS = itertools.count()  # of this process, see end_without_jax_workers
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

# TensorFlow: SavedModels.


def variable_without_value(shape):
    """A float32 tf.Variable that a SavedModel has without storing a value of it.

    Something has to assign it when the SavedModel is loaded, see `run_on_load`.

    Overrides two methods that TensorFlow asks of every trackable object, of one object here:
    `_serialize_to_tensors` gives nothing to write, and `_export_to_saved_model_graph` makes another
    variable for the graph of the SavedModel, which has nothing to write either. All that a public
    tf.saved_model.experimental.TrackableResource could hold goes by one name in all copies of a
    SavedModel that a process loads, so that they would share their values.
    """
    import tensorflow as tf

    variable = tf.Variable(tf.zeros(shape), trainable=False)
    export = variable._export_to_saved_model_graph

    def export_without_value(object_map, *args, **kwargs):
        tensors = export(object_map, *args, **kwargs)
        object_map[variable]._serialize_to_tensors = dict
        return tensors

    variable._serialize_to_tensors = dict
    variable._export_to_saved_model_graph = export_without_value
    return variable


def run_on_load(function):
    """A trackable object that runs a function when the SavedModel that has it has been loaded.

    The methods of tf.saved_model.experimental.TrackableResource are public; that the resource holds
    nothing and is made only for its `_initialize` is not what they are meant for. TensorFlow has no
    other hook that loading runs, in Python as in TF Serving.

    Args:
        function: without arguments; it is traced when the SavedModel is written.
    """
    import tensorflow as tf

    name = f"initializer_{uuid.uuid4().hex}"

    class Initializer(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self):
            return tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[], shared_name=name)

        def _initialize(self):
            function()

    return Initializer()


def remove_output_shapes(folder) -> None:
    """Removes the shape of each node's outputs from a SavedModel: an eighth of the graphs here.

    They are inferred where they are not given. TensorFlow always writes them, as the attribute
    `_output_shapes`, and exports no class for the file. fingerprint.pb, which is optional, goes as
    well, as it is that of the file before.

    Args:
        folder: of the SavedModel, a path.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    path = Path(folder, "saved_model.pb")
    content = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for meta_graph in content.meta_graphs:
        graph = meta_graph.graph_def
        for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
            for node in nodes:
                node.attr.pop("_output_shapes", None)
    path.write_bytes(content.SerializeToString(deterministic=True))
    Path(folder, "fingerprint.pb").unlink()


class SavedDict(Mapping):
    """The variables of a SavedModel that are in a dict of the saved object; nothing of it is run.

    A NumPy array by key of the dict; each is read when it is asked for. Builds on the keys of
    TensorFlow's checkpoints, `<attribute>/<key>/.ATTRIBUTES/VARIABLE_VALUE`, because the public way
    to restore by name needs the objects, and so the SavedModel loaded.

    Args:
        folder: of the SavedModel.
        attribute: name of the dict. Its keys have neither `/` nor `.`, which TensorFlow escapes.

    Attributes:
        shapes: of the arrays, tuples by key.

    Raises:
        tf.errors.OpError, IndexError, OSError, RuntimeError, ValueError: missing, truncated or
            damaged files, a large index, or one by which the arrays are larger than the files; also
            where an array is read.
    """

    def __init__(self, folder, attribute: str):
        import tensorflow as tf

        prefix, suffix = f"{attribute}/", "/.ATTRIBUTES/VARIABLE_VALUE"
        path = Path(folder, "variables", "variables")
        index = path.with_name("variables.index")
        if index.exists() and index.stat().st_size > MAX_INDEX:
            raise ValueError(f"the index is larger than {MAX_INDEX} bytes")
        self._reader = tf.train.load_checkpoint(str(path))
        shapes, types = (
            self._reader.get_variable_to_shape_map(),
            self._reader.get_variable_to_dtype_map(),
        )
        self._keys = {
            key[len(prefix) : -len(suffix)]: key
            for key in shapes
            if key.startswith(prefix) and key.endswith(suffix)
        }
        self.shapes = {name: tuple(shapes[key]) for name, key in self._keys.items()}
        # Arrays may share their bytes, of which then a few would unfold to any size.
        declared = sum(math.prod(shapes[key]) * types[key].size for key in self._keys.values())
        held = sum(data.stat().st_size for data in path.parent.glob("variables.data-*"))
        if declared > held or any(types[key] == tf.string for key in self._keys.values()):
            raise ValueError("the index declares other values than the data files hold")

    def __getitem__(self, name):
        return self._reader.get_tensor(self._keys[name])

    def __iter__(self):
        return iter(self._keys)

    def __len__(self):
        return len(self._keys)


def prediction_log(signature: str, inputs: dict) -> bytes:
    """A serialized tensorflow.serving.PredictionLog of one request, for TF Serving's warm-up.

    Written by hand, as the classes of tensorflow-serving-api are no dependency: with its own it
    would bring `tensorflow` to where `tensorflow-cpu` is.

    Args:
        signature: name of the signature that is asked.
        inputs: a TensorProto (tf.make_tensor_proto) by name of its argument.
    """
    request = _field(1, _field(3, signature.encode()))  # PredictRequest.model_spec.signature_name
    for name, proto in inputs.items():
        entry = _field(1, name.encode()) + _field(2, proto.SerializeToString())
        request += _field(2, entry)  # PredictRequest.inputs
    return _field(6, _field(1, request))  # PredictionLog.predict_log.request


def _field(number, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    length, digits = len(content), []
    while length > 127:
        digits.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *digits, length]) + content


# TensorFlow: graphs and clusters.


def xla_compiles() -> bool:
    """Whether XLA compiles what TensorFlow is tracing here, or may choose to.

    What `jit_compile=True` says of a graph only `tensorflow.python` can tell; TF_XLA_FLAGS is read
    by TensorFlow's C++ alone. The global switch, tf.config.optimizer.get_jit, is public.
    """
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return bool(
        control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
        or tf.config.optimizer.get_jit()
        or "tf_xla_auto_jit" in os.environ.get("TF_XLA_FLAGS", "")
    )


def slurm_tasks(nodes: str, tasks_per_node: str) -> list[tuple[str, int]]:
    """The hosts of a Slurm job step in Slurm's order, and the number of tasks of each.

    By two functions of `tensorflow.python`, because the public SlurmClusterResolver sorts the
    hosts, so that node10 comes before node9 and takes its rank, and hands out GPUs, which Slurm has
    done, and fails where there are none.

    Args:
        nodes: SLURM_STEP_NODELIST, e.g. `node[9-10],login`.
        tasks_per_node: SLURM_STEP_TASKS_PER_NODE, e.g. `1(x2),2`.

    Raises:
        ValueError: one of them cannot be read, or they do not fit each other.
    """
    from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver as slurm

    counts = slurm.expand_tasks_per_node(tasks_per_node)
    return list(zip(slurm.expand_hostlist(nodes), counts, strict=True))


@contextlib.contextmanager
def forgetting_gradients():
    """Lets go of the custom gradients of all graphs that are traced inside.

    TensorFlow registers each under a name of its own, for ever, and with it the graph and all
    variables that it reads: weights and velocities of each training of a process. No public way
    takes one back. Graphs traced inside cannot be differentiated afterwards.
    """
    from tensorflow.python.framework import ops

    known = ops.gradient_registry._registry
    before = set(known)
    try:
        yield
    finally:
        for name in set(known) - before:
            if name.startswith("CustomGradient-"):
                del known[name]


# JAX: clusters.


def end_without_jax_workers(seconds: float) -> None:
    """Lets this process end by itself, unless all workers of its JAX cluster come here in time.

    At its end JAX waits for all processes. One that fails alone would wait there for the others,
    and they in a collective for it, until minutes later a watch aborts them all. There is no switch
    against it: so what JAX does at exit is unregistered, and the objects whose destructors would
    wait as well are kept for ever. The client, by which all can meet, has no public name either.

    Args:
        seconds: to wait for the others. If all come, each ends in JAX's order.
    """
    from jax._src import api, distributed

    state = distributed.global_state
    try:
        state.client.wait_at_barrier(f"etfzoo_end_{next(_ENDS)}", round(1000 * seconds))
    except Exception:  # too late, or the first worker, who counts who has come, is gone
        atexit.unregister(api.clean_up)
        for kept in (state.client, state.service):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


# Keras.


def change_class(layer, kind) -> None:
    """Makes a layer one of a subclass, with the weights and the places in graphs that it has.

    Assigns `__class__`, so that the subclass must have the same state. The public way,
    keras.models.clone_model, would make every weight of the network anew, from other random draws.

    Raises:
        TypeError: `kind` is no subclass of the layer's class.
    """
    if not issubclass(kind, type(layer)):
        raise TypeError(f"{kind} is no subclass of {type(layer)}")
    layer.__class__ = kind


def share_weight_files(kind) -> None:
    """Lets weight files of models with a subclass of a layer and with its base fit each other.

    Keras's files address layers by the `__name__` of their classes, and no public name stands for
    it: so the subclass takes that of its base.
    """
    kind.__name__ = kind.__base__.__name__


@contextlib.contextmanager
def fresh_names():
    """Lets Keras count the layers that have no name of their own from the start again, inside.

    Such a layer is called by how many of its kind the process has made: inside its name hangs on
    nothing but what is built there. keras.backend.clear_session would reset more than that.
    """
    from keras.src.backend.common import global_state

    name = "object_name_uids"
    kept = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(name, kept)


@contextlib.contextmanager
def without_values():
    """Layers that are built inside have variables of their shapes, and no memory for values.

    keras.StatelessScope(initialize_variables=False) is public. But Keras keeps a list of such
    variables and gives all on it values later, when it next builds a layer of any model: they are
    taken off it here.
    """
    import keras
    from keras.src.backend.common import global_state

    name = "uninitialized_variables"
    kept = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(name, [] if kept is None else kept)


def name_by_layer(layer, prefix: str = "") -> None:
    """Gives variables that Keras has counted the path of their layer, by which weights are kept.

    Those are the states of random numbers, as dropout has one, and weights without a name. Their
    paths tell how many of their kind the process has made; Keras has no way to choose them.

    Args:
        layer: a layer or model; with all that is in it.
        prefix: its path, with a slash at the end; none for a model.
    """
    states = [generator.state for generator in layer._seed_generators]
    own = [*layer._trainable_variables, *layer._non_trainable_variables, *states]
    for number, variable in enumerate(own):
        if re.fullmatch(r"seed_generator_state|variable(_\d+)?", variable.name):
            variable._path = f"{prefix}{variable.name.partition('_')[0]}_{number}"
    for part in layer._layers:
        name_by_layer(part, f"{prefix}{part.name}/")


def unnamed_layers() -> dict:
    """The classes of UNNAMED_LAYERS by name."""
    from keras.src.applications import convnext

    return {name: getattr(convnext, name) for name in UNNAMED_LAYERS}


def keras_weights(network: str) -> tuple[str, str]:
    """Address and MD5 of the ImageNet weights, with their top, that Keras has of a ResNet.

    They stand in the module of its constructor, which downloads them by itself and to its own place
    only.

    Args:
        network: name in Keras's table, e.g. `resnet50`.
    """
    from keras.src.applications import resnet

    name = f"{network}_weights_tf_dim_ordering_tf_kernels.h5"
    return resnet.BASE_WEIGHTS_PATH + name, resnet.WEIGHTS_HASHES[network][0]


# Processes.


def import_quietly(name: str) -> None:
    """Imports a module, and shows what was written to the standard error only when that fails.

    TensorFlow's libraries write notices to file descriptor 2 while they load, before any switch of
    TensorFlow counts: so the descriptor is a file meanwhile.

    Raises:
        ImportError: or whatever the import raises.
    """
    with tempfile.TemporaryFile() as notices:
        saved = os.dup(2)
        os.dup2(notices.fileno(), 2)
        try:
            importlib.import_module(name)
        except BaseException:
            os.dup2(saved, 2)
            notices.seek(0)
            sys.stderr.write(notices.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def take_back_sigterm() -> None:
    """Gives SIGTERM back to Python's handler where a library has taken it for itself.

    TensorFlow's C++ does when several workers join (its preemption notifier), without a switch
    against it. Setting the handler that Python believes in makes the system call again.
    """
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def end_with_parent() -> None:
    """Lets this process get SIGTERM when its parent ends, also where it is killed. Linux only.

    A `preexec_fn` of subprocess.Popen. Python has no name for the system call: it goes through
    libc, which is opened beforehand, as little may be done between fork and exec.
    """
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

"""Any Keras model as a backbone: its graph as JSON, which holds no code, and back.

What a spec keeps of such a backbone is the config of a functional model of Keras's own layers. Of a
stranger's file too nothing else is read from it: every class in it is looked up in a list before
Keras is asked to build one (`check`).
"""

import collections
import json

import keras
import numpy as np

from etfzoo import internals
from etfzoo.errors import EtfzooError, first_line, shown
from etfzoo.layers import FusedBatchNormalization
from etfzoo.models.backbones import BATCH_NORM_MOMENTUM, rebuild
from etfzoo.models.table import PREFIX

# Code, or files of the machine that loads them.
_REFUSED = {
    "FlaxLayer", "IntegerLookup", "JaxLayer", "Lambda", "StringLookup", "TFSMLayer",
    "TextVectorization", "TorchModuleWrapper",
}  # fmt: skip
_MODELS = {
    ("keras", "Model"), ("keras", "Sequential"), ("keras.src.models.functional", "Functional"),
}  # fmt: skip
_OTHERS = _MODELS | {
    ("keras", "DTypePolicy"),
    *(("keras.src.applications.convnext", name) for name in internals.UNNAMED_LAYERS),
    *((None, name) for name in ("__keras_tensor__", "__numpy__", "__tensor__", "__slice__")),
    (None, "__ellipsis__"),
}
_PARTS = ("initializers", "regularizers", "constraints")
_OPERATIONS = {
    f"keras.src.ops.{name}" for name in ("core", "image", "linalg", "math", "nn", "numpy")
}
_OWN_NAMES = ("images", "normalize", "features", "logits")


def application(name: str) -> keras.Model:
    """A network of keras.applications without its head, to be described; it holds no weights.

    Its batch norms have torch's momentum, as all of etfzoo's (see `etfzoo.models.backbones`).

    Args:
        name: `keras:` and the name of the constructor, e.g. `"keras:EfficientNetB0"`.
    """
    constructor = getattr(keras.applications, name.removeprefix(PREFIX))
    with internals.fresh_names(), internals.without_values():
        network = constructor(include_top=False, weights=None)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = BATCH_NORM_MOMENTUM
    return network


def describe(model: keras.Model) -> str:
    """The graph of a model as JSON, from which `apply_network` builds it anew.

    A Normalization that was adapted becomes one with that mean and variance. Layers in the dtype
    policy that most of them have take the one of the classifier.

    Args:
        model: a functional or sequential model of Keras's own layers, from images `[N, H, W, 3]`
            to a map `[N, h, w, p]` or features `[N, p]`.

    Raises:
        EtfzooError: another kind of model, another input or output, or a layer that is not Keras's.
    """
    inputs, outputs = (getattr(model, name, None) or () for name in ("inputs", "outputs"))
    if not isinstance(model, keras.Model) or not (inputs and outputs):
        raise EtfzooError(
            f"a backbone must be a functional Keras model, whose layers are its graph; "
            f"{shown(getattr(model, 'name', model))} is a {type(model).__name__} without one"
        )
    if len(inputs) != 1 or len(outputs) != 1:
        raise EtfzooError(
            f"a backbone must have one input and one output; {model.name} has {len(inputs)} and "
            f"{len(outputs)}"
        )
    plain = keras.Model(inputs[0], outputs[0], name="network")
    try:
        config = keras.saving.serialize_keras_object(plain)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise EtfzooError(f"{model.name} is no backbone: {first_line(error)}") from error
    config = json.loads(json.dumps(config, default=_plain))
    _complete(config, plain)
    policies = collections.Counter(_policies(config))
    usual = max(policies, key=policies.get, default=None)
    check(config)
    _check_graph(plain)
    return json.dumps(_without_policy(config, usual), separators=(",", ":"))


def _plain(value):
    return np.asarray(value).tolist()


def _complete(config, model) -> None:
    """Gives adapted norms of a config their constants, which are weights in the model."""
    for entry in config["config"]["layers"]:
        if entry["class_name"] == "Normalization" and entry["config"].get("mean") is None:
            layer = model.get_layer(entry["config"]["name"])
            for name, value in (("mean", layer.adapt_mean), ("variance", layer.adapt_variance)):
                entry["config"][name] = keras.ops.convert_to_numpy(value.value).tolist()
        elif (entry.get("module"), entry["class_name"]) in _MODELS:
            _complete(entry, model.get_layer(entry["config"]["name"]))


def _policies(config):
    """Names of the dtype policies of a config, one for each place."""
    for part in _objects(config):
        if part["class_name"] == "DTypePolicy":
            yield part["config"]["name"]


def _without_policy(value, usual):
    if isinstance(value, list):
        return [_without_policy(part, usual) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_policy(part, usual)
        for name, part in value.items()
        if not (name == "dtype" and isinstance(part, dict) and part["config"]["name"] == usual)
    }


def _objects(value):
    """All objects of a config: dicts that name a class, from the outer to the inner ones."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if "class_name" in value:
                yield value
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def check(config) -> None:
    """Refuses a config that names anything but Keras's own layers, operations and their parts.

    Raises:
        EtfzooError: says which class, or what is wrong with it.
    """
    if not isinstance(config, dict) or (config.get("module"), config.get("class_name")) not in (
        _MODELS - {("keras", "Sequential")}
    ):
        raise EtfzooError("a backbone's config is that of a functional model")
    for part in _objects(config):
        module, name = part.get("module"), part["class_name"]
        registered = part.get("registered_name")
        if not isinstance(name, str) or not (module is None or isinstance(module, str)):
            raise EtfzooError("a backbone's config is damaged")
        if name == "function":  # an activation, by its name
            if isinstance(part.get("config"), str) and module in ("builtins", "keras.activations"):
                if hasattr(keras.activations, part["config"]):
                    continue
        elif registered in (None, name) and _is_stock(module, name):
            continue
        if name == "Lambda":
            reason = "a Lambda layer holds code"
        else:
            reason = f"{registered or name} is no layer of Keras's own"
        raise EtfzooError(
            f"{reason}: a backbone is stored as a config without code, so it takes only stock "
            "layers of keras.layers"
        )


def _is_stock(module, name) -> bool:
    if (module, name) in _OTHERS:
        return True
    if module == "keras.layers":
        kind = getattr(keras.layers, name, None)
        return isinstance(kind, type) and issubclass(kind, keras.Layer) and name not in _REFUSED
    if module in _OPERATIONS:
        return name.isidentifier()  # Keras takes classes of operations only
    return module in {f"keras.{part}" for part in _PARTS} and hasattr(
        getattr(keras, module.partition(".")[2]), name
    )


def _check_graph(network) -> None:
    """Checks that a functional model stands where a backbone stands."""
    given, made = network.inputs[0].shape, network.outputs[0].shape
    if len(given) != 4 or given[-1] != 3:
        raise EtfzooError(f"a backbone must take images [N, height, width, 3]; it takes {given}")
    if len(made) not in (2, 4) or made[-1] is None:
        raise EtfzooError(
            "a backbone must give a map [N, height, width, p] or features [N, p] of a known p; it "
            f"gives {made}"
        )
    first = network.layers[0].name  # the input, whose name is not kept
    for layer in _walk(network):
        if layer.name != first and (layer.name in _OWN_NAMES or layer.name.startswith("projector")):
            raise EtfzooError(
                f"the backbone has a layer {layer.name}, which is the name of a layer of the "
                "classifier: rename it"
            )


def _walk(model):
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _walk(layer)


def normalizes(model: keras.Model) -> bool:
    """Whether a model begins with a Rescaling or Normalization, so that it takes 0..255."""
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    first = layers[0] if layers else None
    if isinstance(first, keras.Model):
        return normalizes(first)
    return isinstance(first, keras.layers.Rescaling | keras.layers.Normalization)


def read_network(text: str) -> keras.Model:
    """The functional model of a description, without values of its weights.

    Args:
        text: what `describe` gave, or a stranger's.

    Raises:
        EtfzooError: it is not, or holds more than stock layers, or Keras cannot build it.
    """
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise EtfzooError(f"a backbone's config is no JSON: {first_line(error)}") from error
    check(config)
    try:
        with internals.without_values():
            network = keras.saving.deserialize_keras_object(
                config, custom_objects=internals.unnamed_layers()
            )
    except Exception as error:  # of a stranger's config, of any kind
        raise EtfzooError(f"a backbone cannot be built: {first_line(error)}") from error
    if len(network.inputs) != 1 or len(network.outputs) != 1:
        raise EtfzooError("a backbone must have one input and one output")
    _check_graph(network)
    internals.name_by_layer(network)
    return network


def apply_network(text: str, images) -> keras.KerasTensor:
    """Calls the fresh network of a description on a symbolic image tensor.

    Args:
        text: see `describe`.
        images: KerasTensor `[N, H, W, 3]`.

    Returns:
        Its output, in the graph of `images`, so that every layer is a direct layer of the model
        around it. On TensorFlow its batch norms are `etfzoo.layers.FusedBatchNormalization`.

    Raises:
        EtfzooError: see `read_network`; also images of a size that it does not take.
    """
    network, last = read_network(text), []
    maker = next((op for op in network.operations if op.output is network.output), None)

    def clone(layer):
        kind = type(layer)
        if kind is keras.layers.BatchNormalization and keras.backend.backend() == "tensorflow":
            kind = FusedBatchNormalization
        copy = kind.from_config(layer.get_config())
        last.extend([copy] * (layer is maker))
        return copy

    if maker is None:
        raise EtfzooError("a backbone's last layer must not be used elsewhere in it")
    try:
        rebuild(network, images, clone)
    except ValueError as error:
        size = f"{images.shape[1]}x{images.shape[2]}"
        raise EtfzooError(
            f"the backbone cannot take images of {size} pixels: {first_line(error)}"
        ) from error
    # As in `apply_backbone`: the first node of a layer is the one that hangs on `images`.
    return last[0].output


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Gives the layers of a model the weights of another's layers of the same names.

    Args:
        source: what `describe` described.
        target: a model with its layers, such as the ImageClassifier around it.
    """
    for layer in source.layers:
        if isinstance(layer, keras.Model):
            copy_weights(layer, target.get_layer(layer.name))
        elif layer.weights and not isinstance(layer, keras.layers.Normalization):
            target.get_layer(layer.name).set_weights(layer.get_weights())


def check_shapes(text: str, shapes) -> None:
    """Refuses weights of other shapes before a network is built that no memory could hold.

    Args:
        text: see `describe`.
        shapes: of the weights, by path of the variable.

    Raises:
        EtfzooError: the network has a weight that is not among them, or of another shape.
    """
    for variable in read_network(text).weights:
        if tuple(shapes.get(variable.path, ())) != tuple(variable.shape):
            raise EtfzooError(
                f"{variable.path} is {shapes.get(variable.path, 'missing')} instead of "
                f"{tuple(variable.shape)}"
            )

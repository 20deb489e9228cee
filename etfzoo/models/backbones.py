"""KerasCV ResNets as rows of data.

KerasCV and not its successor KerasHub: its ResNet V1 is built offline by a plain constructor. (The
paper names ResNet50 and ResNet101, and no variant.)
"""

import os
import re

import keras

from etfzoo import internals
from etfzoo.errors import EtfzooError
from etfzoo.layers import ETFClassifier, FusedBatchNormalization, SwitchableWhitening
from etfzoo.models.table import get_backbone

# torch's value (0.1 there); the paper gives none. Keras's default of 0.99 needs hundreds of steps
# before evaluation sees the statistics that training uses. The moving variance is biased, as always
# in Keras; torch's is n/(n - 1) times it, with n the values of a channel in a batch.
BATCH_NORM_MOMENTUM = 0.9


def apply_backbone(name: str, images, norm: str = "bn") -> keras.KerasTensor:
    """Calls a fresh backbone on a symbolic image tensor.

    Args:
        name: a row of `BACKBONES`.
        images: KerasTensor `[N, H, W, 3]`, normalised.
        norm: `"bn"`, or `"sw"` for Switchable Whitening at the published places.

    Returns:
        The last feature map, `[N, H/32, W/32, feature_dim]` (rounded up), in the graph of
        `images`, so that every KerasCV layer is a direct layer of the model around it. On
        TensorFlow its batch norms are `etfzoo.layers.FusedBatchNormalization`.

    Raises:
        EtfzooError: unknown name, or a setting of Keras under which this network cannot be built.
    """
    row = get_backbone(name)
    _check_settings()
    import keras_cv  # after the check, as it chooses its Keras while it is imported

    network = keras_cv.models.ResNetBackbone(
        stackwise_filters=list(row.filters),
        stackwise_blocks=list(row.blocks),
        stackwise_strides=[1, 2, 2, 2][: len(row.blocks)],
        block_type=row.block_type,
        include_rescaling=False,
        input_tensor=images,
    )
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = BATCH_NORM_MOMENTUM
            if keras.backend.backend() == "tensorflow":
                internals.change_class(layer, FusedBatchNormalization)
    if norm == "sw":
        network = whiten(network, images)
    # ResNetBackbone clones its graph when its input is not an Input; the layer's first node is
    # still the one that hangs on `images`.
    return network.layers[-1].output


def _check_settings():
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("true", "True", "1"):  # as TensorFlow reads it
        raise EtfzooError(
            "TF_USE_LEGACY_KERAS asks for Keras 2, and the models of etfzoo are those of Keras 3: "
            "unset it"
        )
    if keras.config.image_data_format() != "channels_last":
        raise EtfzooError(
            "image_data_format of Keras is channels_first, and the models of etfzoo take images "
            "[N, H, W, 3]: set it to channels_last in keras.json (of ~/.keras or KERAS_HOME), or "
            "call keras.config.set_image_data_format('channels_last')"
        )


def whiten(network: keras.Model, inputs=None, **options) -> keras.Model:
    """A copy of a KerasCV ResNet with Switchable Whitening at the published places.

    Those are (Pan et al. 2019) the norm of the stem, and in stages 1 to 3 the norm after the 3x3
    convolution of every second block, the first norm of a basic block: 7 layers in ResNet50, 15 in
    ResNet101. Layer names stay, and so do the weights of the layers that stay.

    Args:
        network: a functional model with the layer names of `keras_cv.models.ResNetBackbone`.
        inputs: KerasTensor to build the copy on; None makes a new Input.
        **options: arguments of `etfzoo.layers.SwitchableWhitening`; momentum and dtype policy are
            otherwise those of the batch norm whose place it takes.

    Returns:
        A plain functional Keras model.

    Raises:
        EtfzooError: no such norm in the network.
    """
    bottleneck = any(layer.name.endswith("_3_bn") for layer in network.layers)
    number = 2 if bottleneck else 1
    # Blocks are counted from 1.
    place = re.compile(rf"conv1_bn|v2_stack_[012]_block\d*[02468]_{number}_bn")
    swapped = [layer.name for layer in network.layers if place.fullmatch(layer.name)]
    if len(swapped) < 2:
        raise EtfzooError(f"{network.name} is not a KerasCV ResNet: it has none of its norms")

    def whitening(layer):
        defaults = {"momentum": layer.momentum, "dtype": layer.dtype_policy}
        return SwitchableWhitening(name=layer.name, **(defaults | options))

    replacements = {name: whitening(network.get_layer(name)) for name in swapped}
    return _copy(network, replacements, inputs)


def stock(network: keras.Model) -> keras.Model:
    """A copy of a functional model of Keras's own layers, so that loading it takes no etfzoo.

    FusedBatchNormalization becomes keras.layers.BatchNormalization; ETFClassifier a frozen
    keras.layers.Dense whose kernel holds the scale, in a keras.Sequential with the layers that
    norm the features, where there are any. SwitchableWhitening, which Keras does not have, stays,
    and loading then does take etfzoo. The outputs stay the same but for rounding, and so do the
    names of the layers and the weights of the rest.

    Args:
        network: a functional model, for instance an etfzoo.ImageClassifier.

    Returns:
        A plain functional Keras model.

    Raises:
        EtfzooError: not a functional model of one input, or one with a model inside that holds
            other layers than Keras's.
    """
    inputs = getattr(network, "inputs", None) or ()
    if isinstance(network, keras.Sequential) or len(inputs) != 1:
        raise EtfzooError(f"{network.name} is not a functional model of one input")
    replacements, weights = {}, {}
    for layer in network.layers:
        kind = type(layer)
        if kind in (FusedBatchNormalization, keras.layers.BatchNormalization):
            # Over how many replicas it took its statistics is a property of the run.
            config = layer.get_config() | {"synchronized": False}
            replacements[layer.name] = keras.layers.BatchNormalization.from_config(config)
            weights[layer.name] = layer.get_weights()
        elif kind is ETFClassifier:
            replacements[layer.name], weights[layer.name] = _stock_head(layer)
        elif isinstance(layer, keras.Model) and not _is_plain(layer):
            raise EtfzooError(f"{network.name} has the model {layer.name} among its layers")
    copy = _copy(network, replacements)
    for name, values in weights.items():
        copy.get_layer(name).set_weights(values)
    return copy


def _is_plain(model) -> bool:
    """Whether a model inside of another is one of Keras's own layers already."""
    kinds = {type(model), *map(type, model.layers)}
    return all(kind.__module__.partition(".")[0] == "keras" for kind in kinds)


def _stock_head(layer: ETFClassifier):
    """What computes an ETFClassifier in Keras alone, and its weights."""
    parts, norm, dtype = [], layer.batch_norm, layer.logits_dtype
    if norm is not None:
        config = norm.get_config() | {"synchronized": False}
        parts.append(keras.layers.BatchNormalization.from_config(config))
    if layer.feature_norm.endswith("l2"):
        parts.append(keras.layers.UnitNormalization(name="unit_length", dtype=dtype))
    options = {"use_bias": False, "trainable": False, "dtype": dtype}
    parts.append(keras.layers.Dense(layer.num_classes, name=layer.name, **options))
    head = parts[0] if len(parts) == 1 else keras.Sequential(parts, name=layer.name)
    weights = norm.get_weights() if norm is not None else []
    kernel = keras.ops.convert_to_numpy(layer.logit_scale * layer.kernel)
    return head, [*weights, kernel]


def _copy(network, replacements, inputs=None) -> keras.Model:
    """A copy of a functional model with fresh layers by name; the others keep their weights."""
    if inputs is None:
        old = network.input
        inputs = keras.Input(batch_shape=old.shape, dtype=old.dtype, name=network.layers[0].name)

    def clone(layer):
        if layer.name in replacements:
            return replacements[layer.name]
        return layer.__class__.from_config(layer.get_config())

    copy = rebuild(network, inputs, clone)
    for layer in network.layers:
        if layer.weights and layer.name not in replacements:
            copy.get_layer(layer.name).set_weights(layer.get_weights())
    return copy


def rebuild(network: keras.Model, inputs, clone_function) -> keras.Model:
    """The graph of a functional model on other inputs, from what a function makes of each layer."""
    return keras.models.clone_model(
        network,
        input_tensors=inputs,
        clone_function=clone_function,
        # KerasCV's norms are called with a mask of None.
        call_function=lambda layer, *args, **kwargs: layer(*args, **kwargs),
    )


def tap_layers(name: str) -> dict[str, str]:
    """Layer names of the taps: `stem` (after the first pooling) and `stage1` to `stage4`."""
    blocks = get_backbone(name).blocks
    stages = {f"stage{i + 1}": f"v2_stack_{i}_block{n}_out" for i, n in enumerate(blocks)}
    return {"stem": "pool1_pool"} | stages

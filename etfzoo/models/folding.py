"""Batch norm folded into the layer before it: the network that is served."""

import collections

import keras
from keras import ops

from etfzoo import internals


def fold_batch_norm(network: keras.Model) -> keras.Model:
    """A copy for inference in which one layer with a bias stands for a linear layer and its norm.

    Every convolution and dense layer whose output goes into a batch norm and nowhere else becomes
    one layer, with the weights of `folded_weights`. Other norms stay. Layer and output names stay.

    Args:
        network: a functional model.

    Returns:
        A functional Keras model of stock layers where `network` has such; with initial weights.
    """
    pairs = norms_by_layer(network)

    def clone(layer):
        config = layer.get_config()
        return type(layer).from_config(config | ({"use_bias": True} if layer in pairs else {}))

    folded = {norm.name for norm in pairs.values()}
    copy = keras.models.clone_model(
        network,
        clone_function=clone,
        # KerasCV's norms are called with a mask of None.
        call_function=lambda layer, *args, **kwargs: (
            args[0] if layer.name in folded else layer(*args, **kwargs)
        ),
    )
    internals.name_by_layer(copy)
    return copy


def folded_weights(network: keras.Model, weights: dict) -> dict:
    """The weights of `fold_batch_norm(network)`.

    Args:
        network: what was folded.
        weights: arrays or tensors by path of `network`'s variables.

    Returns:
        `weights` with `kernel gamma / s` and `beta + (bias - moving_mean) gamma / s` for the layers
        that were folded, where `s = sqrt(moving_variance + epsilon)`, and without their norms.
        What such a layer does not have counts as gamma 1, beta 0, bias 0.
    """
    result = dict(weights)
    for linear, norm in norms_by_layer(network).items():
        gamma, beta, mean, variance = (
            result.pop(f"{norm.name}/{name}", usual)
            for name, usual in (
                ("gamma", 1.0), ("beta", 0.0), ("moving_mean", None), ("moving_variance", None)
            )
        )  # fmt: skip
        scale = gamma / ops.sqrt(variance + norm.epsilon)
        bias = weights.get(f"{linear.name}/bias", 0.0)
        result[f"{linear.name}/kernel"] = weights[f"{linear.name}/kernel"] * scale
        result[f"{linear.name}/bias"] = beta + (bias - mean) * scale
    return result


def norms_by_layer(network) -> dict:
    """The batch norm that is folded into a convolution or dense layer, by that layer."""
    # Of a plain model, whatever class the network has: its config is the graph.
    graph = keras.Model(network.inputs, network.outputs).get_config()
    sources = {
        entry["name"]: [_history(node) for node in entry["inbound_nodes"]]
        for entry in graph["layers"]
    }
    readers = collections.Counter(
        name for nodes in sources.values() for names in nodes for name in names
    )
    readers.update(part for part in keras.tree.flatten(graph["output_layers"]) if part in sources)
    layers = {layer.name: layer for layer in network.layers}
    pairs = {}
    for norm in network.layers:
        if not isinstance(norm, keras.layers.BatchNormalization) or len(sources[norm.name]) != 1:
            continue
        name = sources[norm.name][0][0]
        linear = layers.get(name)
        if (
            type(linear) in (keras.layers.Conv2D, keras.layers.Dense)
            and len(sources[name]) == readers[name] == 1
            and linear.activation is keras.activations.linear
            and norm.axis in (-1, len(linear.output.shape) - 1)
            and not norm.renorm
        ):
            pairs[linear] = norm
    return pairs


def _history(value) -> list[str]:
    """Names of the layers whose tensors a call of a layer gets, by its part of a config."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return [value["config"]["keras_history"][0]]
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [name for part in value for name in _history(part)]
    return []

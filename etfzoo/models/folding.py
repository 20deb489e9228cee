"""Batch norm folded into the convolution before it: the network that is served."""

import keras
from keras import ops


def fold_batch_norm(network: keras.Model) -> keras.Model:
    """A copy for inference in which a convolution with a bias stands for convolution and norm.

    Every `<name>_conv` that is followed by its batch norm `<name>_bn` becomes one convolution,
    with the weights of `folded_weights`. Other norms stay. Layer and output names stay.

    Args:
        network: a functional model with the layer names of a KerasCV ResNet.

    Returns:
        A functional Keras model of stock layers where `network` has such; with initial weights.
    """
    pairs = _pairs(network)

    def clone(layer):
        config = layer.get_config()
        return type(layer).from_config(config | ({"use_bias": True} if layer in pairs else {}))

    folded = {norm.name for norm in pairs.values()}
    return keras.models.clone_model(
        network,
        clone_function=clone,
        # KerasCV's norms are called with a mask of None.
        call_function=lambda layer, *args, **kwargs: (
            args[0] if layer.name in folded else layer(*args, **kwargs)
        ),
    )


def folded_weights(network: keras.Model, weights: dict) -> dict:
    """The weights of `fold_batch_norm(network)`.

    Args:
        network: what was folded.
        weights: arrays or tensors by path of `network`'s variables.

    Returns:
        `weights` with `kernel gamma / s` and `beta - moving_mean gamma / s` for the convolutions
        that were folded, where `s = sqrt(moving_variance + epsilon)`, and without their norms.
    """
    result = dict(weights)
    for conv, norm in _pairs(network).items():
        gamma, beta, mean, variance = (
            result.pop(f"{norm.name}/{name}")
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / ops.sqrt(variance + norm.epsilon)
        result[f"{conv.name}/kernel"] = weights[f"{conv.name}/kernel"] * scale
        result[f"{conv.name}/bias"] = beta - mean * scale
    return result


def _pairs(network) -> dict:
    """Batch norm by the convolution that it follows."""
    layers = {layer.name: layer for layer in network.layers}
    pairs = {}
    for norm in network.layers:
        conv = layers.get(norm.name.removesuffix("_bn") + "_conv")
        if isinstance(norm, keras.layers.BatchNormalization) and conv and not conv.use_bias:
            pairs[conv] = norm
    return pairs

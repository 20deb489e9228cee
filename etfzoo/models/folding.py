"""Batch norm folded into the layer before it: the network that is served."""

import keras
from keras import ops


def fold_batch_norm(network: keras.Model) -> keras.Model:
    """A copy for inference in which one layer with a bias stands for a linear layer and its norm.

    Every `<name>_conv`, and `<name>_dense` of a projector, that is followed by its batch norm
    `<name>_bn` becomes one layer, with the weights of `folded_weights`. Other norms stay. Layer
    and output names stay.

    Args:
        network: a functional model with the layer names of an ImageClassifier.

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
        `weights` with `kernel gamma / s` and `beta - moving_mean gamma / s` for the layers that
        were folded, where `s = sqrt(moving_variance + epsilon)`, and without their norms.
    """
    result = dict(weights)
    for linear, norm in _pairs(network).items():
        gamma, beta, mean, variance = (
            result.pop(f"{norm.name}/{name}")
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / ops.sqrt(variance + norm.epsilon)
        result[f"{linear.name}/kernel"] = weights[f"{linear.name}/kernel"] * scale
        result[f"{linear.name}/bias"] = beta - mean * scale
    return result


def _pairs(network) -> dict:
    """Batch norm by the convolution or dense layer that it follows."""
    layers = {layer.name: layer for layer in network.layers}
    pairs = {}
    for norm in network.layers:
        stem = norm.name.removesuffix("_bn")
        linear = layers.get(f"{stem}_conv") or layers.get(f"{stem}_dense")
        if isinstance(norm, keras.layers.BatchNormalization) and linear and not linear.use_bias:
            pairs[linear] = norm
    return pairs

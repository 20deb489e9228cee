"""The projector: an expendable MLP between the pooled features and the head.

Source: Sariyildiz et al., "No reason for no supervision: improved generalization in supervised
models" (t-ReX), ICLR 2023, and its public code. What differs from that, and why: docs/layers.md.
"""

import keras

from etfzoo.models.backbones import BATCH_NORM_MOMENTUM

# torch's value, as t-ReX has it: at Keras's 1e-3 it would outweigh the variance of what a kernel
# makes of features of unit length.
EPSILON = 1e-5


def apply_projector(features, layers: int, width: int, dtype: str) -> keras.KerasTensor:
    """Calls a fresh projector on symbolic features.

    With u = h / max(|h|, 1e-12), the features at unit length, each layer is

        u <- ReLU(gamma (u V - mean) / sqrt(variance + 1e-5) + beta)

    with a kernel V without bias, and mean and variance of the batch while training. No linear
    layer follows: W behind a linear N would be W N, a trainable classifier.

    Args:
        features: KerasTensor `[N, p]`.
        layers: number of layers, 1 or more.
        width: units of each.
        dtype: what it computes in.

    Returns:
        The output of the last layer, `[N, width]`, not negative. Layers are named `projector_l2`,
        `projector1_dense`, `projector1_bn`, `projector1_relu` and so on.
    """
    x = keras.layers.UnitNormalization(name="projector_l2", dtype=dtype)(features)
    for number in range(1, layers + 1):
        name = f"projector{number}"
        x = keras.layers.Dense(width, use_bias=False, name=f"{name}_dense", dtype=dtype)(x)
        norm = keras.layers.BatchNormalization(
            momentum=BATCH_NORM_MOMENTUM, epsilon=EPSILON, name=f"{name}_bn", dtype=dtype
        )
        x = keras.layers.ReLU(name=output_layer(number), dtype=dtype)(norm(x))
    return x


def output_layer(layers: int) -> str:
    """Name of the last layer of a projector of so many layers."""
    return f"projector{layers}_relu"


def is_projector_variable(path: str) -> bool:
    """Whether a variable path belongs to a projector."""
    return path.startswith("projector")

"""The projector: an expendable MLP between the pooled features and the head.

Sources: of the trained one Sariyildiz et al., "No reason for no supervision: improved
generalization in supervised models" (t-ReX), ICLR 2023; of the one of frozen ETFs Harun et al.,
"Controlling neural collapse enhances out-of-distribution detection and transfer learning", ICML
2025; and their public code. What differs from that, and why: docs/layers.md.
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


def apply_etf_projector(features, layers: int, dtype: str) -> keras.KerasTensor:
    """Calls a projector of frozen simplex ETFs on symbolic features; it has no weights.

    With the ETF `M = sqrt(p/(p-1)) (I - 11^T/p)` of p vectors in p dimensions it is

        u <- ReLU(M u)  in each hidden layer, from the features h on,   then   M u / |M u|

    M takes the mean off, but for a factor. The layer normalisation that stands for it here has
    another positive factor, of each example its own, which the unit length at the end takes out.

    Args:
        features: KerasTensor `[N, p]`.
        layers: number of hidden layers, 1 or more; 1 is the paper's projector of two layers.
        dtype: what it computes in.

    Returns:
        The output of the last layer, `[N, p]`, of length 1 and sum 0. Layers are named
        `projector1_etf`, `projector1_relu` and so on, `projector_etf`, `projector_l2`.
    """

    def etf(name):
        return keras.layers.LayerNormalization(center=False, scale=False, name=name, dtype=dtype)

    x = features
    for number in range(1, layers + 1):
        x = etf(f"projector{number}_etf")(x)
        x = keras.layers.ReLU(name=f"projector{number}_relu", dtype=dtype)(x)
    x = etf("projector_etf")(x)
    return keras.layers.UnitNormalization(name=output_layer(layers, "etf"), dtype=dtype)(x)


def output_layer(layers: int, kind: str = "trained") -> str:
    """Name of the last layer of a projector of that kind and so many layers."""
    return "projector_l2" if kind == "etf" else f"projector{layers}_relu"


def is_projector_variable(path: str) -> bool:
    """Whether a variable path belongs to a projector."""
    return path.startswith("projector")

"""KerasCV ResNets as rows of data.

KerasCV and not its successor KerasHub: its ResNet V1 is the network of the paper's protocol in
Keras, and it is built offline by a plain constructor.
"""

import dataclasses

import keras
import keras_cv

from etfzoo.errors import unknown

# torch's value, in whose framework the paper's networks were trained. Keras's default of 0.99 needs
# hundreds of steps before evaluation sees the statistics that training uses.
BATCH_NORM_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One ResNet: what `keras_cv.models.ResNetBackbone` is built from."""

    block_type: str
    blocks: tuple[int, ...]
    feature_dim: int


BACKBONES = {
    "rn18": Backbone("basic_block", (2, 2, 2, 2), 512),
    "rn34": Backbone("basic_block", (3, 4, 6, 3), 512),
    "rn50": Backbone("block", (3, 4, 6, 3), 2048),
    "rn101": Backbone("block", (3, 4, 23, 3), 2048),
}


def get_backbone(name: str) -> Backbone:
    """The row of that name.

    Raises:
        EtfzooError: unknown name, with close matches.
    """
    if name not in BACKBONES:
        raise unknown("backbone", name, BACKBONES)
    return BACKBONES[name]


def apply_backbone(name: str, images) -> keras.KerasTensor:
    """Calls a fresh backbone on a symbolic image tensor.

    Args:
        name: a row of `BACKBONES`.
        images: KerasTensor `[N, H, W, 3]`, normalised.

    Returns:
        The last feature map, `[N, H/32, W/32, feature_dim]` (rounded up), in the graph of
        `images`, so that every KerasCV layer is a direct layer of the model around it.
    """
    row = get_backbone(name)
    network = keras_cv.models.ResNetBackbone(
        stackwise_filters=[64, 128, 256, 512],
        stackwise_blocks=list(row.blocks),
        stackwise_strides=[1, 2, 2, 2],
        block_type=row.block_type,
        include_rescaling=False,
        input_tensor=images,
    )
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = BATCH_NORM_MOMENTUM
    # ResNetBackbone clones its graph when its input is not an Input; the layer's first node is
    # still the one that hangs on `images`.
    return network.layers[-1].output


def tap_layers(name: str) -> dict[str, str]:
    """Layer names of the taps: `stem` (after the first pooling) and `stage1` to `stage4`."""
    blocks = get_backbone(name).blocks
    stages = {f"stage{i + 1}": f"v2_stack_{i}_block{n}_out" for i, n in enumerate(blocks)}
    return {"stem": "pool1_pool"} | stages

"""Initial weights as torch's ResNets have them, in place of Keras's."""

import re
import zlib

import keras
import numpy as np

from etfzoo.models.table import get_backbone


def initialize(model, initializer: str, zero_gamma: bool, seed: int) -> None:
    """Draws the weights of a new classifier anew; the same ones on every backend and replica.

    Args:
        model: an ImageClassifier that was just built.
        initializer: `"glorot_uniform"` leaves Keras's draw; `"he_fan_out"` draws the kernels of
            convolutions from N(0, 2/fan_out), fan_out = height x width x output channels (He et
            al. 2015, in the backward form; torchvision's ResNets and the script of Switchable
            Whitening), and kernel and bias of projector and linear head evenly from +-1/sqrt(p),
            p inputs, as torch.nn.Linear does. A fixed ETF stays.
        zero_gamma: whether the last norm of each residual block starts with gamma 0, so that the
            block starts as its shortcut (Goyal et al. 2017). That is a batch norm also with
            Switchable Whitening, which takes earlier places of a block.
        seed: of the draw.
    """
    if initializer == "he_fan_out":
        # Apart from the other draws of that seed, the ETF's among them.
        rng = np.random.default_rng([seed, zlib.crc32(b"initial weights")])
        for layer in model.layers:
            if isinstance(layer, keras.layers.Conv2D):
                height, width, _, filters = shape = layer.kernel.shape
                deviation = np.sqrt(2 / (height * width * filters))
                layer.kernel.assign(deviation * rng.standard_normal(shape))
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dense):
                limit = 1 / np.sqrt(layer.kernel.shape[0])
                for variable in layer.trainable_variables:
                    variable.assign(rng.uniform(-limit, limit, variable.shape))
    if zero_gamma:
        bottleneck = get_backbone(model.spec.backbone).block_type == "block"
        last = re.compile(rf"v2_stack_\d+_block\d+_{3 if bottleneck else 2}_bn")
        for layer in model.layers:
            if last.fullmatch(layer.name):
                layer.gamma.assign(np.zeros(layer.gamma.shape))

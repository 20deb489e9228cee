"""Settings of a run: what the classifier is."""

import dataclasses

from etfzoo.data.datasets import IMAGENET_STATISTICS
from etfzoo.models.table import (
    FEATURE_NORMS,
    FRAMES,
    HEADS,
    INITIALIZERS,
    NORMS,
    PROJECTOR_KINDS,
    PROJECTOR_LAYERS,
    PROJECTOR_WIDTH,
)
from etfzoo.training.settings import setting


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The group Model."""

    init: str | None = setting(
        "Model", None, "handle of the model that is fine-tuned; none trains from scratch"
    )
    backbone: str = setting(
        "Model",
        "rn50",
        "rn18, rn34, rn50 or rn101; or keras:NAME of keras.applications, e.g. keras:EfficientNetB0 "
        "or keras:ConvNeXtTiny",
    )
    head: str = setting("Model", "etf", "etf (fixed) or linear (trainable)", choices=HEADS)
    keep_head: bool = setting(
        "Model", False, "go on with the head of the pretrained model, for the same classes"
    )
    norm: str = setting(
        "Model",
        "bn",
        "batch norm (bn) or Switchable Whitening at its places (sw)",
        choices=NORMS,
    )
    feature_norm: str = setting(
        "Model",
        "none",
        "features before the ETF: none, bn, l2 or bn_l2",
        choices=FEATURE_NORMS,
    )
    frame: str = setting(
        "Model",
        "simplex_etf",
        "rows of the fixed classifier: simplex_etf (the paper), centred_etf, orthogonal, hadamard, "
        "or softmax_code for more classes than dimensions",
        choices=FRAMES,
    )
    scale: float | None = setting(
        "Model",
        None,
        "factor on the ETF's logits (default: 1, on features of unit length 16)",
        low=1e-6,
        high=10**6,
    )
    learn_scale: bool = setting("Model", False, "train the factor on the ETF's logits too")
    guided: bool = setting(
        "Model",
        False,
        "turn the simplex ETF to the class means of the features before each epoch, from the "
        "second on",
    )
    projector_layers: int = setting(
        "Model",
        0,
        "hidden layers of a projector between features and head, which fine-tuning leaves out; 0 "
        "is none",
        low=0,
        high=PROJECTOR_LAYERS,
    )
    projector_width: int | None = setting(
        "Model",
        None,
        "units of each of them, on which the head acts (default: as many as features)",
        low=1,
        high=PROJECTOR_WIDTH,
    )
    projector_kind: str = setting(
        "Model",
        "trained",
        "trained, or etf for one of frozen simplex ETFs, as wide as the features",
        choices=PROJECTOR_KINDS,
    )
    initializer: str = setting(
        "Model",
        "glorot_uniform",
        "weights of a new model: glorot_uniform, or he_fan_out as torch's ResNets have it",
        choices=INITIALIZERS,
    )
    zero_gamma: bool = setting(
        "Model", False, "gamma 0 in the last norm of each residual block of a new model"
    )
    mean: tuple[float, ...] = setting(
        "Model",
        IMAGENET_STATISTICS[0],
        "of each channel, in 0..255, for a new model",
        low=0,
        high=255,
        count=3,
    )
    std: tuple[float, ...] = setting(
        "Model",
        IMAGENET_STATISTICS[1],
        "of each channel, in 0..255, for a new model",
        low=1e-3,
        high=255,
        count=3,
    )

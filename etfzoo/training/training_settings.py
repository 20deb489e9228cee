"""Settings of a run: how long and by which rule it trains, and what it minimises."""

import dataclasses

from etfzoo.data.augmentation import MAX_MAGNITUDE
from etfzoo.models.table import PARTS
from etfzoo.training.protocols import PROTOCOLS
from etfzoo.training.settings import MOST_IMAGES, SEEDS, setting

OPTIMIZERS = ("sgd", "adamw", "lamb")
LEARNING_RATE_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The group Training."""

    protocol: str = setting(
        "Training", "paper", "where unset flags take their values from", choices=PROTOCOLS
    )
    epochs: int = setting("Training", 100, "passes over the training split", low=1, high=10**6)
    batch_size: int = setting(
        "Training", 128, "images a step, over all devices", low=1, high=MOST_IMAGES
    )
    learning_rate: float = setting("Training", 0.01, "peak learning rate", low=0, high=10**6)
    learning_rate_scaling: str = setting(
        "Training",
        "none",
        "none, linear or sqrt: the rate is for batches of 256, and is multiplied by batch_size / "
        "256 (Goyal et al. 2017) or by its root",
        choices=LEARNING_RATE_SCALING,
    )
    schedule: str = setting(
        "Training",
        "cosine",
        "cosine (to zero), step (times step_factor at step_epochs) or constant",
        choices=("cosine", "step", "constant"),
    )
    warmup_epochs: float = setting(
        "Training",
        0.0,
        "linear warm-up of the learning rate from zero, in epochs",
        low=0,
        high=10**6,
    )
    step_epochs: tuple[int, ...] = setting(
        "Training", (30, 60, 90), "epochs at which the step schedule drops", low=0, high=10**6
    )
    step_factor: float = setting(
        "Training", 0.1, "what the step schedule multiplies by", low=0, high=1
    )
    optimizer: str = setting("Training", "sgd", "sgd, adamw or lamb", choices=OPTIMIZERS)
    layer_decay: float = setting(
        "Training",
        1.0,
        "learning rate of each stage by that of the one after it: 1 in the head, in stage4 this, "
        "in the stem this to the power of 5; of other backbones the whole has this",
        low=0,
        high=1,
    )
    freeze: tuple[str, ...] = setting(
        "Training",
        (),
        "parts that are not trained, their norms in inference mode: of stem, stage1 to stage4 and "
        "backbone, of which backbones other than ResNets have the last only",
        choices=PARTS,
    )
    early_stopping: int = setting(
        "Training",
        0,
        "epochs without a better top1 on eval_split after which the run ends; its result are the "
        "weights of the best epoch; 0 is off",
        low=0,
        high=10**6,
    )
    momentum: float = setting("Training", 0.9, "of SGD", low=0, high=0.999999)
    nesterov: bool = setting("Training", False, "Nesterov's momentum, of SGD")
    clip_norm: float = setting(
        "Training",
        0.0,
        "largest norm of the gradient of all weights, without weight decay; 0 is off",
        low=0,
        high=10**6,
    )
    accumulate_steps: int = setting(
        "Training",
        1,
        "parts of a batch that a step takes one after the other, to save memory",
        low=1,
        high=MOST_IMAGES,
    )
    seed: int = setting("Training", 0, "of weights, order, augmentation and the ETF", **SEEDS)
    eval_every: int = setting(
        "Training", 1, "epochs between evaluations; the last is always evaluated", low=1, high=10**6
    )
    neural_collapse_every: int = setting(
        "Training",
        0,
        "epochs between collapse measures of both splits; 0 is never",
        low=0,
        high=10**6,
    )


@dataclasses.dataclass(frozen=True)
class RegularisationSettings:
    """The group Regularisation."""

    weight_decay: float = setting(
        "Regularisation",
        2e-4,
        "on kernels: of sgd L2 added to the gradient before momentum, of adamw and lamb decoupled",
        low=0,
        high=1000,
    )
    decay_all: bool = setting(
        "Regularisation", False, "decay of biases, gamma, beta and the logits of sw too"
    )
    label_smoothing: float = setting(
        "Regularisation", 0.0, "share of the target spread over all classes", low=0, high=0.999999
    )
    entropy_weight: float = setting(
        "Regularisation",
        0.0,
        "of a loss that keeps the features of a batch apart, e.g. 0.05; 0 is off",
        low=0,
        high=100,
    )
    mixup: float = setting(
        "Regularisation", 0.0, "alpha of mixup, e.g. 0.2; 0 is off", low=0, high=1000
    )
    cutmix: float = setting(
        "Regularisation",
        0.0,
        "alpha of cutmix, e.g. 1; with mixup each takes half",
        low=0,
        high=1000,
    )
    rand_augment: float = setting(
        "Regularisation",
        0.0,
        "magnitude of RandAugment, 0 to 10, two operations an image; 0 is off",
        low=0,
        high=MAX_MAGNITUDE,
    )
    random_erasing: float = setting(
        "Regularisation",
        0.0,
        "share of the images of which a rectangle is erased, e.g. 0.1; 0 is off",
        low=0,
        high=1,
    )
    ema: float = setting(
        "Regularisation",
        0.0,
        "decay of the average of the weights that is evaluated and published, e.g. 0.9999; 0 is "
        "off",
        low=0,
        high=0.9999999,
    )


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The group Loss."""

    loss: str = setting(
        "Loss",
        "cross_entropy",
        "what training minimises: cross_entropy, dot_regression (of an ETF on l2 features) or "
        "squared_error; evaluation tells the cross-entropy",
        choices=("cross_entropy", "dot_regression", "squared_error"),
    )
    logit_adjustment: float = setting(
        "Loss",
        0.0,
        "cross-entropy of logits + this * log(share of each class in the training split), e.g. 1; "
        "0 is off",
        low=0,
        high=100,
    )
    class_balance: float = setting(
        "Loss",
        0.0,
        "beta of the weights (1 - beta) / (1 - beta^n) of classes of n examples, e.g. 0.9999; 1 "
        "weighs them by 1/n, as what scikit-learn calls balanced; 0 is off",
        low=0,
        high=1,
    )
    class_weights: tuple[float, ...] = setting(
        "Loss",
        (),
        "what the losses of each class are multiplied by, one number a class in the data set's "
        "order; none weighs all the same",
        low=0,
        high=10**6,
    )

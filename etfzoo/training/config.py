"""The one frozen object that describes a training run; commands make it from flags.

A setting is declared once, here: its type, default, help, group, limits and choices. Flags, checks
(`etfzoo.training.settings`) and `config.json` come from the declaration.
"""

import dataclasses
import json
from pathlib import Path

from etfzoo import files
from etfzoo.data.augmentation import CROPS, MAX_MAGNITUDE
from etfzoo.data.datasets import IMAGENET_STATISTICS
from etfzoo.errors import EtfzooError, first_line, shown
from etfzoo.models.spec import check_projector
from etfzoo.models.table import (
    BACKBONES,
    CUSTOM,
    FEATURE_NORMS,
    FRAMES,
    HEADS,
    INITIALIZERS,
    NORMS,
    PROJECTOR_KINDS,
    PROJECTOR_LAYERS,
    PROJECTOR_WIDTH,
    check_backbone,
)
from etfzoo.runtime.strategies import STRATEGIES
from etfzoo.training.protocols import PROTOCOLS
from etfzoo.training.settings import IMAGE_SIZES, MOST_IMAGES, SEEDS, checked, setting

LEARNING_RATE_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run of `etfzoo.training.loop.train_and_evaluate`; its fields are the settings below.

    Raises:
        EtfzooError: a value of another type, outside of its limits, or two that exclude each other.
    """

    dataset: str = setting(
        "Data",
        dataclasses.MISSING,
        "imagenet2012, imagenet_resized/64x64, cifar100, cifar10, stl10, svhn_cropped, "
        "oxford_iiit_pet, oxford_flowers102, dtd, the embedded shapes/source, shapes/textures, "
        "shapes/outlines and digits; any other TFDS name or prepared TFDS folder; folder:PATH with "
        "one subfolder of images a class; or csv:FILE with the columns path, label and maybe split",
    )
    data_dir: str | None = setting(
        "Data", None, "TFDS data directory (default: TFDS's own)", path=True, runtime=True
    )
    train_split: str = setting(
        "Data", "train", "split or role (train, fit, select, test) that is trained on"
    )
    eval_split: str = setting("Data", "test", "split or role that is evaluated on")
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
    image_size: int = setting("Data", 224, "height and width in pixels", **IMAGE_SIZES)
    image_size_schedule: tuple[tuple[int, int], ...] = setting(
        "Data",
        (),
        "progressive resizing: size:epochs pairs for the start of a training, e.g. 32:10; the "
        "other epochs, at least one, and evaluation are at image_size",
        **IMAGE_SIZES,
    )
    crop: float = setting(
        "Data", 0.875, "share of the shorter side that evaluation keeps", low=0.01, high=1
    )
    augment: str = setting("Data", "resized_crop", "resized_crop, shift or none", choices=CROPS)
    min_area: float = setting(
        "Data", 0.08, "smallest share of the image in a resized crop", low=1e-6, high=1
    )
    antialias: bool = setting(
        "Data", True, "filter resized crops that become smaller, as evaluation does"
    )
    flip: bool = setting("Data", True, "mirror half of the images")
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
    momentum: float = setting("Training", 0.9, "of SGD", low=0, high=0.999999)
    nesterov: bool = setting("Training", False, "Nesterov's momentum")
    weight_decay: float = setting(
        "Regularisation",
        2e-4,
        "L2 added to the gradient before momentum, on kernels",
        low=0,
        high=1000,
    )
    decay_all: bool = setting(
        "Regularisation", False, "L2 on biases, gamma, beta and the logits of sw too"
    )
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
        "beta of the weights (1 - beta) / (1 - beta^n) of classes of n examples, e.g. 0.9999; 0 is "
        "off",
        low=0,
        high=0.9999999,
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
    mixed_precision: str = setting(
        "Machine",
        "none",
        "none, bfloat16 or float16 (with loss scaling)",
        choices=("none", "bfloat16", "float16"),
    )
    seed: int = setting("Training", 0, "of weights, order, augmentation and the ETF", **SEEDS)
    deterministic: bool = setting("Machine", True, "repeat bit for bit (slower on some devices)")
    strategy: str = setting(
        "Machine",
        "auto",
        "auto, one_device, mirrored, multiworker or tpu",
        choices=STRATEGIES,
        runtime=True,
    )
    tpu: str | None = setting(
        "Machine", None, "TPU name or address; local for the one in this machine", runtime=True
    )
    num_virtual_devices: int | None = setting(
        "Machine", None, "CPU devices for the strategy mirrored", low=1, high=64, runtime=True
    )
    cache: str = setting(
        "Machine",
        "none",
        "device: decoded images live on the device (JAX); or none",
        choices=("none", "device"),
    )
    synchronize_norms: bool = setting("Machine", True, "norm statistics over all replicas")
    steps_per_execution: int = setting(
        "Machine",
        1,
        "steps between two looks at signals and the clock",
        low=1,
        high=10**6,
        runtime=True,
    )
    jit_compile: bool | None = setting(
        "Machine",
        None,
        "compile with XLA, as JAX always does (default: on one GPU, when not deterministic)",
        runtime=True,
    )
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
    checkpoint_every: int = setting(
        "Machine", 500, "steps between checkpoints", low=1, high=10**9, runtime=True
    )
    keep_checkpoints: int = setting(
        "Machine",
        2,
        "latest checkpoints that are kept, beside the best",
        low=1,
        high=10**6,
        runtime=True,
    )
    imbalance: float = setting(
        "Data",
        1.0,
        "largest class by smallest of an exponential long tail that is made of the training "
        "split, e.g. 100; 1 is off",
        low=1,
        high=10**6,
    )
    skip_corrupt: bool = setting(
        "Data", False, "check every image of a split first and leave out broken ones"
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        stages = self.image_size_schedule
        if stages and sum(epochs for _, epochs in stages) >= self.epochs:
            raise EtfzooError(
                f"image_size_schedule leaves none of the {self.epochs} epochs for image_size: "
                f"{stages}"
            )
        if self.warmup_epochs > self.epochs:
            raise EtfzooError(
                f"warmup_epochs must be between 0 and {self.epochs}; got {self.warmup_epochs}"
            )
        check_backbone(self.backbone, self.norm)
        if self.init is None and self.backbone == CUSTOM:
            raise EtfzooError(
                f"{CUSTOM} is the backbone of a Keras model that `etfzoo.build_classifier` was "
                "given: it can be fine-tuned only"
            )
        drawn = self.initializer != "glorot_uniform" or self.zero_gamma
        if self.init is None and self.backbone not in BACKBONES and drawn:
            raise EtfzooError(
                f"`initializer=he_fan_out` and `zero_gamma` are for {', '.join(BACKBONES)}: with "
                f"{self.backbone} pass `initializer=glorot_uniform` and `zero_gamma=False`"
            )
        if self.init is not None and (self.initializer != "glorot_uniform" or self.zero_gamma):
            raise EtfzooError(
                "initializer and zero_gamma are for training from scratch: leave them out with a "
                "pretrained model"
            )
        if self.keep_head and self.init is None:
            raise EtfzooError(
                "keep_head goes on with the head of a pretrained model: there is none"
            )
        check_projector(self.projector_layers, self.projector_width, self.projector_kind)
        if self.entropy_weight and self.batch_size < 2:
            raise EtfzooError("entropy_weight asks for neighbours: give `batch_size=2` or more")
        if self.loss != "cross_entropy" and (self.label_smoothing or self.logit_adjustment):
            raise EtfzooError(
                "label_smoothing and logit_adjustment belong to the cross-entropy: set them to 0 "
                f"with `loss={self.loss}`"
            )
        if self.jit_compile and self.deterministic:
            raise EtfzooError(
                "XLA's max-pooling has no deterministic gradient: with `jit_compile` add "
                "`deterministic=False`"
            )

    def train_size(self, epoch: int) -> int:
        """Height and width in pixels of the images that an epoch (from 0) trains on."""
        for size, epochs in self.image_size_schedule:
            if epoch < epochs:
                return size
            epoch -= epochs
        return self.image_size

    def save(self, path: Path) -> None:
        """Writes the complete configuration as JSON, atomically."""
        files.write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path) -> "TrainConfig":
        """Reads what `save` wrote, also before a setting was added.

        Raises:
            EtfzooError: no such file, not JSON, or fields that this version does not know.
        """
        try:
            values = files.parse_json(files.read_bytes(path))
        except ValueError as error:
            raise EtfzooError(
                f"{path} is no training configuration: {first_line(error)}"
            ) from error
        if isinstance(values, dict):  # see etfzoo.training.identity
            values = {k: v for k, v in values.items() if k not in ("run", "settings")}
        return cls.from_dict(values, path)

    @classmethod
    def from_dict(cls, values, source) -> "TrainConfig":
        """What `dataclasses.asdict` gave, also after a trip through JSON.

        Args:
            values: of the settings by name; those that are missing have their defaults.
            source: where they come from, for the message.

        Raises:
            EtfzooError: no object, or settings that this version does not know.
        """
        if not isinstance(values, dict) or "dataset" not in values:
            raise EtfzooError(f"{source} is no training configuration: it names no dataset")
        extra = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if extra:
            raise EtfzooError(
                f"{source} is no training configuration (unknown: {shown(', '.join(extra))})"
            )
        try:
            return cls(**values)
        except EtfzooError as error:
            raise EtfzooError(f"{source}: {error}") from error

    @property
    def peak_rate(self) -> float:
        """The learning rate after scaling by the batch size."""
        power = LEARNING_RATE_SCALING[self.learning_rate_scaling]
        return self.learning_rate * (self.batch_size / 256) ** power

    def results_in(self) -> dict:
        """The settings that what is computed depends on, as JSON values by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata["runtime"]
        }

    def differences(self, other: "TrainConfig") -> list[str]:
        """Readable list of the settings that make another result."""
        mine, theirs = self.results_in(), other.results_in()
        return [
            f"{name} {mine[name]} there, {theirs[name]} here"
            for name in mine
            if mine[name] != theirs[name]
        ]

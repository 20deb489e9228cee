"""The one frozen object that describes a training run; recipes make it from flags."""

import dataclasses
import json
import math
import operator
from pathlib import Path

from etfzoo import files
from etfzoo.data.augment import CROPS
from etfzoo.data.rand_augment import MAX_MAGNITUDE
from etfzoo.errors import EtfzooError, unknown
from etfzoo.layers.etf_classifier import FEATURE_NORMS
from etfzoo.models.backbones import BACKBONES, NORMS
from etfzoo.models.classifier import HEADS
from etfzoo.models.initialization import INITIALIZERS
from etfzoo.runtime.strategy import STRATEGIES

SCHEDULES = ("cosine", "step", "constant")
MIXED_PRECISION = ("none", "bfloat16", "float16")
CACHES = ("none", "device")
LEARNING_RATE_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}

# What may differ when a run is resumed: where it runs, not what it computes.
_RUNTIME = (
    "data_dir", "strategy", "tpu", "num_virtual_devices", "steps_per_execution", "jit_compile",
    "checkpoint_every", "keep_checkpoints",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run of `etfzoo.training.loop.train_and_evaluate`.

    Attributes:
        dataset: see `etfzoo.data.sources.resolve`.
        data_dir: TFDS data directory; None is TFDS's default.
        train_split, eval_split: roles (`train`, `fit`, `select`, `test`) or names of splits.
        init: model handle (see `etfzoo.load`) that is fine-tuned; None trains from scratch.
        backbone, head, norm, feature_norm, scale: see `etfzoo.build_classifier`; with `init` the
            backbone and norm are the loaded model's.
        initializer, zero_gamma: of a new model's weights, see
            `etfzoo.models.initialization.initialize`;
            refused with `init`, whose weights are taken as they are.
        mean, std: normalisation of a new model, per channel in 0..255; with `init` the model's.
        image_size: height and width in pixels.
        image_size_schedule: progressive resizing: pairs of a size in pixels and the epochs that are
            trained at it, from the start; the other epochs, at least one, are trained at
            `image_size`, which evaluation always has. Empty trains at `image_size` throughout.
        crop: share of the shorter side that evaluation keeps.
        augment, min_area, antialias, flip: see `etfzoo.data.augment.Augmentation`.
        protocol: name of the row in `etfzoo.training.protocols` that the values came from.
        epochs: passes over the training split.
        batch_size: examples a step, over all devices.
        learning_rate: peak value.
        learning_rate_scaling: `none`, or `linear` or `sqrt`: the rate is then meant for batches of
            256 and is multiplied by batch_size / 256 (Goyal et al. 2017) or by its square root.
        schedule: `cosine` (to zero), `step` (times `step_factor` at `step_epochs`) or `constant`.
        warmup_epochs: linear warm-up from zero, in epochs.
        momentum, nesterov: of SGD.
        weight_decay: L2 coefficient, added to the gradient BEFORE momentum, on kernels.
        decay_all: whether L2 counts for biases, gamma, beta and the logits of `sw` too.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: see `etfzoo.data.mixing.Mixing`; 0 is off. Training's top-1 then counts the
            class with the largest share.
        rand_augment: magnitude of RandAugment (0..10), two operations an image; 0 is off.
        ema: decay of the average of the weights, see `etfzoo.runtime.averaging.WeightAverage`; 0
            is off. Training goes on with the weights themselves; the average is what is evaluated,
            measured, and given by `etfzoo.load` and publishing.
        mixed_precision: `none`, `bfloat16` or `float16` (with loss scaling).
        seed: of initialisation, order, augmentation and the ETF.
        deterministic: whether the backend's ops must repeat bit for bit.
        strategy, tpu, num_virtual_devices: see `etfzoo.runtime.strategy.get_strategy`.
        cache: `device` keeps the decoded images on the device, see `etfzoo.runtime.device_cache`,
            or `none`.
        synchronize_norms: whether norms take their statistics over all replicas.
        steps_per_execution: steps between two looks at the clock, signals and checkpoints.
        jit_compile: whether XLA compiles the step; None: on one GPU, when not deterministic. Under
            JAX it always does.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        neural_collapse_every: epochs between collapse measures on both splits, also after the last
            epoch; 0 is never. Each takes a pass over both splits.
        checkpoint_every: steps between checkpoints; evaluated epochs end with one too.
        keep_checkpoints: number of latest checkpoints that are kept, beside the best.
        skip_corrupt: decode every record once before training and leave out the broken ones.
    """

    dataset: str
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    init: str | None = None
    backbone: str = "rn50"
    head: str = "etf"
    norm: str = "bn"
    feature_norm: str = "none"
    scale: float | None = None
    initializer: str = "glorot_uniform"
    zero_gamma: bool = False
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    image_size: int = 224
    image_size_schedule: tuple[tuple[int, int], ...] = ()
    crop: float = 0.875
    augment: str = "resized_crop"
    min_area: float = 0.08
    antialias: bool = True
    flip: bool = True
    protocol: str = "paper"
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.01
    learning_rate_scaling: str = "none"
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    step_epochs: tuple[int, ...] = (30, 60, 90)
    step_factor: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    decay_all: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    rand_augment: float = 0.0
    ema: float = 0.0
    mixed_precision: str = "none"
    seed: int = 0
    deterministic: bool = True
    strategy: str = "auto"
    tpu: str | None = None
    num_virtual_devices: int | None = None
    cache: str = "none"
    synchronize_norms: bool = True
    steps_per_execution: int = 1
    jit_compile: bool | None = None
    eval_every: int = 1
    neural_collapse_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    skip_corrupt: bool = False

    def __post_init__(self):
        for name in ("mean", "std", "step_epochs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_sizes()
        for name, choices in (
            ("backbone", BACKBONES),
            ("head", HEADS),
            ("norm", NORMS),
            ("feature_norm", FEATURE_NORMS),
            ("initializer", INITIALIZERS),
            ("strategy", STRATEGIES),
            ("schedule", SCHEDULES),
            ("augment", CROPS),
            ("mixed_precision", MIXED_PRECISION),
            ("cache", CACHES),
            ("learning_rate_scaling", LEARNING_RATE_SCALING),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)
        if self.init is not None and (self.initializer != "glorot_uniform" or self.zero_gamma):
            raise EtfzooError(
                "initializer and zero_gamma are for training from scratch: leave them out with a "
                "pretrained model"
            )
        if self.jit_compile and self.deterministic:
            raise EtfzooError(
                "XLA's max-pooling has no deterministic gradient: with --jit_compile add "
                "--nodeterministic"
            )
        for name, low, high in (
            ("image_size", 1, 8192),
            ("epochs", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("eval_every", 1, math.inf),
            ("neural_collapse_every", 0, math.inf),
            ("checkpoint_every", 1, math.inf),
            ("keep_checkpoints", 1, math.inf),
            ("steps_per_execution", 1, math.inf),
            ("crop", 0.01, 1),
            ("min_area", 1e-6, 1),
            ("learning_rate", 0, math.inf),
            ("step_factor", 0, 1),
            ("warmup_epochs", 0, self.epochs),
            ("momentum", 0, 0.999999),
            ("weight_decay", 0, math.inf),
            ("label_smoothing", 0, 0.999999),
            ("mixup", 0, math.inf),
            ("cutmix", 0, math.inf),
            ("rand_augment", 0, MAX_MAGNITUDE),
            ("ema", 0, 0.9999999),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise EtfzooError(f"{name} must be a number; got {value!r}")
            if not (low <= value <= high and math.isfinite(value)):
                limit = f"between {low} and {high}" if math.isfinite(high) else f"at least {low}"
                raise EtfzooError(f"{name} must be {limit}; got {value}")

    def _check_sizes(self):
        stages = self.image_size_schedule
        try:
            stages = tuple(
                (operator.index(size), operator.index(epochs)) for size, epochs in stages
            )
        except (TypeError, ValueError) as error:
            raise EtfzooError(
                f"image_size_schedule must be pairs of a size in pixels and epochs; got {stages!r}"
            ) from error
        object.__setattr__(self, "image_size_schedule", stages)
        if not all(1 <= size <= 8192 and epochs >= 1 for size, epochs in stages):
            raise EtfzooError(
                "image_size_schedule takes sizes between 1 and 8192 and at least one epoch each; "
                f"got {stages}"
            )
        if stages and sum(epochs for _, epochs in stages) >= self.epochs:
            raise EtfzooError(
                f"image_size_schedule leaves none of the {self.epochs} epochs for image_size: "
                f"{stages}"
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
        """Reads what `save` wrote.

        Raises:
            EtfzooError: no such file, not JSON, or fields that this version does not know.
        """
        values = files.read_json(path)
        known = {f.name for f in dataclasses.fields(cls)}
        extra = sorted(set(values) - known) if isinstance(values, dict) else ["not an object"]
        if extra or "dataset" not in values:
            raise EtfzooError(f"{path} is no training configuration (unknown: {', '.join(extra)})")
        return cls(**values)

    @property
    def peak_rate(self) -> float:
        """The learning rate after scaling by the batch size."""
        power = LEARNING_RATE_SCALING[self.learning_rate_scaling]
        return self.learning_rate * (self.batch_size / 256) ** power

    def results_in(self) -> dict:
        """The settings that what is computed depends on, as JSON values by name."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _RUNTIME}

    def differences(self, other: "TrainConfig") -> list[str]:
        """Readable list of the settings that make another result."""
        mine, theirs = self.results_in(), other.results_in()
        return [
            f"{name} {mine[name]} there, {theirs[name]} here"
            for name in mine
            if mine[name] != theirs[name]
        ]

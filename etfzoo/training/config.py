"""The one frozen object that describes a training run; commands make it from flags.

A setting is declared once, in the module of its group (`etfzoo.training.data_settings`,
`model_settings`, `training_settings`, `machine_settings`): its type, default, help, limits and
choices. Flags, checks (`etfzoo.training.settings`) and `config.json` come from the declaration.
"""

import dataclasses
import json
from pathlib import Path

from etfzoo import files
from etfzoo.errors import EtfzooError, first_line, shown
from etfzoo.models.spec import check_projector
from etfzoo.models.table import BACKBONES, CUSTOM, check_backbone
from etfzoo.training.data_settings import DataSettings
from etfzoo.training.machine_settings import MachineSettings
from etfzoo.training.model_settings import ModelSettings
from etfzoo.training.settings import checked
from etfzoo.training.training_settings import (
    LEARNING_RATE_SCALING,
    LossSettings,
    RegularisationSettings,
    TrainingSettings,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(
    MachineSettings,
    LossSettings,
    RegularisationSettings,
    TrainingSettings,
    ModelSettings,
    DataSettings,  # the last base comes first: `dataset`, which has no default
):
    """A run of `etfzoo.training.loop.train_and_evaluate`; its fields are the settings of its bases.

    Raises:
        EtfzooError: a value of another type, outside of its limits, or two that exclude each other.
    """

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
        if self.entropy_weight and self.batch_size // self.accumulate_steps < 2:
            raise EtfzooError(
                "entropy_weight asks for neighbours: give "
                f"`batch_size={2 * self.accumulate_steps}` or more"
            )
        if self.loss != "cross_entropy" and (self.label_smoothing or self.logit_adjustment):
            raise EtfzooError(
                "label_smoothing and logit_adjustment belong to the cross-entropy: set them to 0 "
                f"with `loss={self.loss}`"
            )
        if self.optimizer != "sgd" and (self.momentum != 0.9 or self.nesterov):
            raise EtfzooError(
                "momentum and nesterov are of SGD: leave them out, or pass `momentum=0.9` and "
                f"`nesterov=False`, with `optimizer={self.optimizer}`"
            )
        if self.batch_size % self.accumulate_steps:
            raise EtfzooError(
                f"`accumulate_steps={self.accumulate_steps}` does not divide "
                f"`batch_size={self.batch_size}`"
            )
        if self.class_weights and self.class_balance:
            raise EtfzooError(
                "class_weights and class_balance both weigh the classes: leave one of them out"
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

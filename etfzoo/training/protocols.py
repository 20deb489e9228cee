"""Protocols: named sets of hyper-parameters, one row each."""

import dataclasses
from collections.abc import Mapping

from etfzoo.data.datasets import Dataset
from etfzoo.errors import unknown


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Hyper-parameters of pretraining and of fine-tuning; fields of TrainConfig.

    Attributes:
        source: where the values come from.
        pretrain, finetune: values by field.
        epochs: pretraining epochs by backbone, where they differ.
        assumed: what the source leaves open and this row fills in, by task; printed with every
            run.
        notes: what no field tells: where a run differs from the source or the source is silent, by
            task, and as `"sw"` what counts for Switchable Whitening; printed with every run.
    """

    source: str
    pretrain: Mapping
    finetune: Mapping
    epochs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    assumed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def settings(self, task: str, backbone: str) -> dict:
        """Values for `"pretrain"` or `"finetune"` of a backbone."""
        values = dict(getattr(self, task))
        if task == "pretrain" and backbone in self.epochs:
            values["epochs"] = self.epochs[backbone]
        return values


TASKS = ("pretrain", "finetune")

_PAPER = "Tiomoko Ali et al., fixed random classifiers transfer better across domains"
_PAPER_SGD = {
    "batch_size": 128,
    "learning_rate": 0.01,
    "schedule": "cosine",
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 2e-4,
}
_PAPER_ASSUMED = {
    "pretrain": (
        "schedule", "warmup_epochs", "nesterov", "decay_all", "initializer", "zero_gamma",
        "image_size", "mean", "std", "augment", "min_area", "flip", "crop", "loss",
        "label_smoothing", "feature_norm", "scale",
    ),
    # The paper gives no fine-tuning setting at all.
    "finetune": (
        "head", "epochs", "batch_size", "learning_rate", "schedule", "warmup_epochs", "momentum",
        "nesterov", "weight_decay", "decay_all", "image_size", "augment", "min_area", "flip",
        "crop", "loss", "label_smoothing",
    ),
}  # fmt: skip
_PAPER_NOTES = {
    "pretrain": (
        "the paper names no framework and no variant of ResNet, and says neither how weight decay "
        "enters (here as L2 added to the gradient before momentum, as torch does it) nor what the "
        "norms are (here batch norm with momentum 0.9)"
    ),
    "finetune": (
        "the paper gives no setting of its fine-tuning; here all weights are trained, and the "
        "target's classifier is a trainable one for all methods"
    ),
    "sw": (
        "this is not the paper's SW arm: that arm's ImageNet figures, 77.93 and 79.13, are 100 "
        "less the errors of the official Switchable Whitening checkpoints, 22.07 and 20.87, so "
        "that it probably is those, trained by another recipe (sw_official)"
    ),
}
# Without random resized crops.
_LOWRES_ASSUMED = {
    task: tuple(name for name in names if name != "min_area")
    for task, names in _PAPER_ASSUMED.items()
}
_STANDARD_FINETUNE = {
    "epochs": 50,
    "batch_size": 64,
    "learning_rate": 0.01,
    "nesterov": True,
    "weight_decay": 1e-4,
    "min_area": 0.25,
}
# Kornblith et al. search rate and decay on a grid, and count steps and not epochs.
_STANDARD_ASSUMED = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "decay_all", "warmup_epochs",
    "augment", "min_area", "crop", "label_smoothing",
)  # fmt: skip
_LOW_RESOLUTION = {"augment": "shift", "crop": 1.0}
_CROPS = {"augment": "resized_crop", "crop": 0.875}
_SMALL = {
    "image_size": 64,
    "augment": "resized_crop",
    "min_area": 0.25,
    "crop": 1.0,
    "warmup_epochs": 2.0,
    "weight_decay": 5e-4,
    "mixed_precision": "bfloat16",
}

PROTOCOLS = {
    "paper": Protocol(
        source=_PAPER,
        pretrain=_PAPER_SGD | _CROPS | {"min_area": 0.08, "epochs": 100},
        finetune=_PAPER_SGD | _CROPS | {"min_area": 0.25, "epochs": 100},
        epochs={"rn50": 180, "rn101": 100},
        assumed=_PAPER_ASSUMED,
        notes=_PAPER_NOTES,
    ),
    "paper_lowres": Protocol(
        source=f"{_PAPER}; at 32 or 64 pixels, the size that its target accuracies point to",
        pretrain=_PAPER_SGD | _LOW_RESOLUTION | {"epochs": 100},
        finetune=_PAPER_SGD | _LOW_RESOLUTION | {"epochs": 100},
        epochs={"rn50": 180, "rn101": 100},
        assumed=_LOWRES_ASSUMED,
        notes=_PAPER_NOTES,
    ),
    "standard": Protocol(
        source=(
            "pretraining: Goyal et al. 2017 with a cosine schedule; fine-tuning: Kornblith et al. "
            "2019 (SGD Nesterov, cosine, rate picked on the selection split)"
        ),
        pretrain=_CROPS
        | {
            "epochs": 90,
            "batch_size": 256,
            "learning_rate": 0.1,
            "warmup_epochs": 5.0,
            "weight_decay": 1e-4,
            "min_area": 0.08,
        },
        finetune=_CROPS | _STANDARD_FINETUNE,
        assumed={
            "pretrain": ("min_area", "crop"),
            "finetune": _STANDARD_ASSUMED,
        },
        notes={
            "pretrain": (
                "Goyal et al. draw convolutions from He's normal distribution and the last layer "
                "from one of deviation 0.01, and start the last gamma of a block at 0; "
                "`initializer=he_fan_out` with `zero_gamma` comes closest"
            )
        },
    ),
    "strong": Protocol(
        source=(
            "pretraining: Vryniotis 2021, torchvision's SGD recipe for ResNet50 (How to train "
            "state-of-the-art models using TorchVision's latest primitives), whose averaging of "
            "0.99998 every 32 steps is 0.99997 a step after its script's correction for the length "
            "of the training (here it starts with a warm-up of its own, (1 + t) / (10 + t) at step "
            "t, which stays below 0.99997 for 300,000 steps; theirs copies the weights while the "
            "rate warms up and then has the full decay); with RandAugment at magnitude 7 (Wightman "
            "et al. 2021, ResNet strikes back, A2) in place of TrivialAugment, and trained and "
            "evaluated at one size, not at 176 and 224. Torchvision's random erasing is off "
            "(`random_erasing=0.1` adds it). Neither repeated augmentation of these sources nor "
            "stochastic depth and binary cross-entropy of A2 are in etfzoo, and its LAMB is not "
            "taken: do not expect their accuracies. Fine-tuning: as in standard"
        ),
        pretrain=_CROPS
        | {
            "crop": 0.965,  # 224 of 232 pixels
            "epochs": 600,
            "batch_size": 1024,
            "learning_rate": 0.5,
            "warmup_epochs": 5.0,
            "momentum": 0.9,
            "weight_decay": 2e-5,
            "label_smoothing": 0.1,
            "mixup": 0.2,
            "cutmix": 1.0,
            "rand_augment": 7.0,
            "ema": 0.99997,
            "min_area": 0.08,
        },
        finetune=_CROPS | _STANDARD_FINETUNE,
        assumed={
            "pretrain": ("image_size", "rand_augment"),
            "finetune": _STANDARD_ASSUMED,
        },
        notes={
            "pretrain": "torchvision initialises otherwise: `initializer=he_fan_out` is its rule"
        },
    ),
    "sw_official": Protocol(
        source="Pan et al. 2019, Switchable Whitening, and its ImageNet script",
        pretrain=_CROPS
        | {
            "epochs": 100,
            "batch_size": 256,
            "learning_rate": 0.1,
            "schedule": "step",
            "step_epochs": (30, 60, 90),
            "step_factor": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "decay_all": True,
            "initializer": "he_fan_out",
            "min_area": 0.08,
        },
        # The source does not fine-tune a classifier.
        finetune=_CROPS | _STANDARD_FINETUNE,
        assumed={
            "finetune": (
                "head",
                "epochs",
                "batch_size",
                "learning_rate",
                "schedule",
                "warmup_epochs",
                "momentum",
                "nesterov",
                "weight_decay",
                "decay_all",
                "image_size",
                "augment",
                "min_area",
                "flip",
                "crop",
                "label_smoothing",
            )
        },
        notes={
            "pretrain": (
                "unlike the script's network, a bottleneck strides in its first 1x1 convolution "
                "and not in the 3x3, convolutions and pooling pad as TensorFlow's SAME does, batch "
                "norm's epsilon is 1.001e-5 and not 1e-5, its moving variance is biased, and norms "
                "take their statistics over all devices and not on each"
            )
        },
    ),
    "small": Protocol(
        source=(
            "etfzoo: images of 64 pixels, for the published models that are trained on 100 classes "
            "of Tiny ImageNet; SGD on a cosine with a warm-up, bfloat16"
        ),
        pretrain=_SMALL | {"epochs": 20, "batch_size": 128, "learning_rate": 0.1},
        finetune=_SMALL | {"epochs": 30, "batch_size": 64, "learning_rate": 0.01},
    ),
    "quickstart": Protocol(
        source="etfzoo: small images, few epochs, for a laptop",
        pretrain=_LOW_RESOLUTION
        | {"epochs": 8, "batch_size": 128, "learning_rate": 0.05, "weight_decay": 0.0},
        finetune=_LOW_RESOLUTION
        | {"epochs": 20, "batch_size": 64, "learning_rate": 0.02, "weight_decay": 0.0},
    ),
}


def get_protocol(name: str) -> Protocol:
    """The row of that name.

    Raises:
        EtfzooError: unknown name, with close matches.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def settings_of_rows() -> frozenset[str]:
    """Names of the settings that come from a protocol or, under it, from the data set's row."""
    rows = [row.settings(task, "rn50") for row in PROTOCOLS.values() for task in TASKS]
    return frozenset().union(*rows, ("image_size", "mean", "std", "flip"))


def settings(name: str, task: str, backbone: str, dataset: Dataset | None) -> dict:
    """TrainConfig fields of a protocol on a data set.

    Args:
        name: a row of PROTOCOLS.
        task: `"pretrain"` or `"finetune"`.
        backbone: a row of `etfzoo.models.table.BACKBONES`.
        dataset: the data set's row, None for one without.
    """
    size, mean, std = (dataset or Dataset("", 0)).inputs(name)
    values = {"image_size": size, "mean": mean, "std": std, "protocol": name}
    values |= get_protocol(name).settings(task, backbone)
    if dataset is not None:
        values["flip"] = dataset.flip
    return values


def assumed(name: str, task: str) -> tuple[str, ...]:
    """Names of the settings that the protocol's source leaves open."""
    return get_protocol(name).assumed.get(task, ())


def notes(name: str, task: str, norm: str = "bn") -> tuple[str, ...]:
    """What is to be known of a run under a protocol and no field tells, see Protocol.

    Args:
        name: a row of PROTOCOLS.
        task: `"pretrain"` or `"finetune"`.
        norm: `"bn"` or `"sw"`.
    """
    found = get_protocol(name).notes
    return tuple(found[key] for key in (task, norm) if key in found)

"""Data sets: one row each for ImageNet, the targets and the embedded set."""

import dataclasses
from collections.abc import Mapping

IMAGENET_STATISTICS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set: what is known of it before any file is read.

    Attributes:
        tfds: TFDS name with its major version pinned.
        num_classes: number of classes.
        train: split of the final training.
        fit, select: splits for picking hyper-parameters: train on one, compare on the other.
        test: split of the reported figures.
        counts: examples of the official TFDS splits.
        metric: the headline figure, `"top1"` or `"mean_per_class"`; both are always reported.
        native: shorter side in pixels that `paper_lowres` takes.
        statistics: per-channel mean and deviation (0..255) for training from scratch at low
            resolution; protocols at 224 pixels use ImageNet's, as their backbones do.
        flip: whether a mirrored image keeps its class.
        manual: what to do when TFDS cannot download it by itself.
        title: what it is, where its name does not say so.
        licence: terms of its images, as its owners state them, and so of weights made from them.
    """

    tfds: str
    num_classes: int
    train: str = "train"
    fit: str = "train[:90%]"
    select: str = "train[90%:]"
    test: str = "test"
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    metric: str = "top1"
    native: int = 32
    statistics: tuple = IMAGENET_STATISTICS
    flip: bool = True
    manual: str = ""
    title: str = ""
    licence: str = ""

    def inputs(self, protocol: str) -> tuple[int, tuple, tuple]:
        """Image size in pixels, mean and deviation under a protocol (`etfzoo.protocols`)."""
        if protocol in ("paper_lowres", "quickstart"):
            return self.native, *self.statistics
        return 224, *IMAGENET_STATISTICS


_IMAGENET_TERMS = "ImageNet's terms: non-commercial research and education only"
_CIFAR_TERMS = "none stated; its authors ask to be cited (Krizhevsky 2009)"

EMBEDDED = ("shapes/source", "shapes/textures", "shapes/outlines", "digits")

# Split sizes: the TFDS catalogue. Metrics: Kornblith et al. 2019, table 1, which scores Pets and
# Flowers102 by mean per-class accuracy, and DTD and the CIFARs by top-1; the rest by top-1 too.
# (DTD has 40 images of each class in each split: both metrics are one there.)
DATASETS = {
    "imagenet2012": Dataset(
        "imagenet2012:5.*.*",
        1000,
        fit="train[:99%]",
        select="train[99%:]",
        test="validation",
        counts={"train": 1_281_167, "validation": 50_000},
        native=64,
        manual=(
            "ILSVRC2012 must be downloaded by hand: register at image-net.org, put "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
            "<data_dir>/downloads/manual/, then run "
            "`tfds build imagenet2012 --data_dir=<data_dir>` (needs about 300 GB)"
        ),
        title="ImageNet-1k (ILSVRC2012)",
        licence=_IMAGENET_TERMS,
    ),
    "imagenet_resized/64x64": Dataset(
        "imagenet_resized/64x64:0.*.*",
        1000,
        fit="train[:99%]",
        select="train[99%:]",
        test="validation",
        counts={"train": 1_281_167, "validation": 50_000},
        native=64,
        title="ImageNet-1k (ILSVRC2012) shrunk to 64 x 64 pixels",
        licence=_IMAGENET_TERMS,
    ),
    "tiny_imagenet": Dataset(
        "tiny_imagenet:1.*.*",
        100,
        test="validation",
        counts={"train": 50_000, "validation": 5_000},
        native=64,
        manual=(
            "Download http://cs231n.stanford.edu/tiny-imagenet-200.zip by hand, then run "
            "`python recipes/prepare.py --archive=tiny-imagenet-200.zip --data_dir=<data_dir>`"
        ),
        title="100 classes of Tiny ImageNet, every second of its 200 sorted by WordNet id",
        licence=_IMAGENET_TERMS,
    ),
    "cifar100": Dataset(
        "cifar100:3.*.*",
        100,
        counts={"train": 50_000, "test": 10_000},
        statistics=((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
        licence=_CIFAR_TERMS,
    ),
    "cifar10": Dataset(
        "cifar10:3.*.*",
        10,
        counts={"train": 50_000, "test": 10_000},
        statistics=((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        licence=_CIFAR_TERMS,
    ),
    "stl10": Dataset(
        "stl10:1.*.*",
        10,
        counts={"train": 5_000, "test": 8_000, "unlabelled": 100_000},
        licence=_IMAGENET_TERMS,
    ),
    "svhn_cropped": Dataset(
        "svhn_cropped:3.*.*",
        10,
        counts={"train": 73_257, "test": 26_032, "extra": 531_131},
        flip=False,
        licence="non-commercial use only",
    ),
    "oxford_iiit_pet": Dataset(
        "oxford_iiit_pet:4.*.*",
        37,
        counts={"train": 3_680, "test": 3_669},
        metric="mean_per_class",
        licence="CC BY-SA 4.0",
    ),
    "oxford_flowers102": Dataset(
        "oxford_flowers102:2.*.*",
        102,
        train="train+validation",
        fit="train",
        select="validation",
        counts={"train": 1_020, "validation": 1_020, "test": 6_149},
        metric="mean_per_class",
        licence="none stated; made for research",
    ),
    "dtd": Dataset(
        "dtd:3.*.*",
        47,
        train="train+validation",
        fit="train",
        select="validation",
        counts={"train": 1_880, "validation": 1_880, "test": 1_880},
        licence="for research purposes",
    ),
    # Embedded: drawn or bundled, see etfzoo.data.shapes.
    **{
        name: Dataset(
            f"{name}:1.*.*",
            classes,
            fit="train",
            select="validation",
            counts=counts,
            statistics=((127.5, 127.5, 127.5), (64.0, 64.0, 64.0)),
            flip=name != "digits",
            licence="CC BY 4.0 (UCI)" if name == "digits" else "Apache-2.0 (drawn by etfzoo)",
        )
        for name, classes, counts in (
            ("shapes/source", 18, {"train": 2880, "validation": 360, "test": 900}),
            ("shapes/textures", 10, {"train": 300, "validation": 100, "test": 500}),
            ("shapes/outlines", 10, {"train": 300, "validation": 100, "test": 500}),
            ("digits", 10, {"train": 200, "validation": 300, "test": 1297}),
        )
    },
}

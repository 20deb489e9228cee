"""What is drawn at random for a training image; how, see `etfzoo.data.augment`."""

import dataclasses

from etfzoo.data.datasets import IMAGENET_STATISTICS
from etfzoo.errors import EtfzooError, unknown

CROPS = ("resized_crop", "shift", "none")
MAX_MAGNITUDE = 10.0  # of RandAugment


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is drawn at random for a training image.

    Attributes:
        crop: `"resized_crop"` (a random window, resized: Szegedy et al. 2015, drawn as by
            torchvision's RandomResizedCrop), `"shift"` (the whole image resized, then moved by up
            to an eighth of its side over black: the usual CIFAR augmentation) or `"none"` (the
            evaluation crop).
        min_area: smallest share of the image in a resized crop.
        antialias: whether a resized crop that is made smaller is always filtered, as evaluation
            is; otherwise only one of more than twice the target, which takes less time and leaves
            training images sharper than those of evaluation.
        flip: whether half of the images are mirrored left to right.
        rand_augment: magnitude of RandAugment's two operations, in 0..10; 0 is none.
        random_erasing: share of the images of which a rectangle is erased (Zhong et al. 2020), see
            `etfzoo.data.random_erasing`.
        mean: colour of what is erased, in 0..255, rounded: the mean pixel of the data set.
    """

    crop: str = "resized_crop"
    min_area: float = 0.08
    flip: bool = True
    rand_augment: float = 0.0
    antialias: bool = True
    random_erasing: float = 0.0
    mean: tuple[float, ...] = IMAGENET_STATISTICS[0]

    def __post_init__(self):
        if self.crop not in CROPS:
            raise unknown("augmentation", self.crop, CROPS)
        if not 0 < self.min_area <= 1:
            raise EtfzooError(f"min_area must be in (0, 1]; got {self.min_area}")
        if not 0 <= self.rand_augment <= MAX_MAGNITUDE:
            raise EtfzooError(f"rand_augment must be between 0 and 10; got {self.rand_augment}")
        if not 0 <= self.random_erasing <= 1:
            raise EtfzooError(f"random_erasing must be between 0 and 1; got {self.random_erasing}")

    @property
    def erased_pixel(self) -> tuple[int, ...]:
        """`mean` in whole numbers."""
        return tuple(round(value) for value in self.mean)

"""Settings of a run: what is trained and evaluated on, and how images are drawn."""

import dataclasses

from etfzoo.data.augmentation import CROPS
from etfzoo.training.settings import IMAGE_SIZES, setting


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The group Data."""

    dataset: str = setting(
        "Data",
        dataclasses.MISSING,
        "imagenet2012, imagenet_resized/64x64, cifar100, cifar10, stl10, svhn_cropped, "
        "oxford_iiit_pet, oxford_flowers102, dtd, the embedded shapes/source, shapes/textures, "
        "shapes/outlines and digits; any other TFDS name or prepared TFDS folder; folder:PATH with "
        "one subfolder of images a class; csv:FILE with the columns path, label and maybe split; "
        "hf:NAME or hf:PATH, a data set of Hugging Face",
    )
    data_dir: str | None = setting(
        "Data", None, "TFDS data directory (default: TFDS's own)", path=True, runtime=True
    )
    train_split: str = setting(
        "Data", "train", "split or role (train, fit, select, test) that is trained on"
    )
    eval_split: str = setting("Data", "test", "split or role that is evaluated on")
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

"""Images: where they come from, how they are decoded, cropped, augmented and mixed."""

from typing import TYPE_CHECKING

from etfzoo.data.augmentation import Augmentation

if TYPE_CHECKING:
    from etfzoo.data.loading import class_names, load

__all__ = ["Augmentation", "class_names", "load"]


def __getattr__(name):
    if name in ("class_names", "load"):
        from etfzoo.data import loading  # TensorFlow

        return getattr(loading, name)
    raise AttributeError(f"module 'etfzoo.data' has no attribute {name!r}")

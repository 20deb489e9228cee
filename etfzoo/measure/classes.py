"""Which class of a model is which class of a data set: they are matched by their names."""

import keras
import numpy as np

from etfzoo.data.source import Source
from etfzoo.errors import EtfzooError
from etfzoo.models.classifier import ClassifierSpec, ImageClassifier
from etfzoo.progress import notify

_SHOWN = 4  # names of each side in a message


def places(spec: ClassifierSpec, source: Source, ignore_names: bool = False) -> np.ndarray:
    """The place among a model's classes of each class of a data set, int64 `[K]`.

    Where the model has no class names, or they are to be ignored, only the numbers of classes are
    compared, and the order is taken as it is.

    Args:
        spec: of the model.
        source: the data set. Its classes may be some of the model's, in any order.
        ignore_names: whether classes with other names are taken as the same ones.

    Raises:
        EtfzooError: the model has no head, or the data set has classes that the model does not.
    """
    own, names = spec.class_names, source.class_names
    if spec.head is None:
        raise EtfzooError(
            f"the model has no head, and {source.name} has {len(names)} classes: fine-tune the "
            "model on this data set first"
        )
    if ignore_names or own is None or own == names:
        if len(names) == spec.num_classes:
            return np.arange(len(names))
    elif len(set(own)) == len(own) and len(set(names)) == len(names) and set(names) <= set(own):
        place = {name: number for number, name in enumerate(own)}
        return np.array([place[name] for name in names])
    there, here = set(own or ()), set(names)
    lists = ""
    if own is not None and not ignore_names:
        lists = f" ({_listed(own, here)}; {_listed(names, there)})"
    ways = "fine-tune the model on this data set first"
    if lists and len(names) == spec.num_classes:
        ways += ", or pass `ignore_class_names` if they are the same classes in the same order"
    raise EtfzooError(
        f"the model has {spec.num_classes} classes, data set {source.name} has {len(names)}"
        f"{', others' if lists else ''}{lists}: {ways}"
    )


def on_classes(model: ImageClassifier, places: np.ndarray) -> keras.Model:
    """The model with the logits of some of its classes, in the given order.

    Says in one line that classes are left out, where it is so. Whoever is evaluated on a part of
    its classes chooses among these alone, as ImageNet-A and ImageNet-R are evaluated (Hendrycks et
    al. 2021, "Natural adversarial examples", "The many faces of robustness").

    Args:
        model: the classifier.
        places: see `places`.
    """
    total = model.spec.num_classes
    if np.array_equal(places, np.arange(total)):
        return model
    if len(places) < total:
        notify(
            "the data set has %d of the model's %d classes: the model chooses among these, the "
            "logits of the others are left out", len(places), total,
        )  # fmt: skip
    return keras.Model(model.input, keras.ops.take(model.output, places, axis=-1))


def _listed(names, others) -> str:
    """Some names, those first that the other side has not."""
    ordered = sorted(names, key=lambda name: name in others)  # stable
    shown = ", ".join(name[:30] for name in ordered[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")

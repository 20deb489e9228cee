"""The parts of a classifier, from images to logits: what is frozen, and at which rate one trains.

Of a KerasCV ResNet they are `stem` and `stage1` to `stage4`, of any other backbone it is `backbone`
as a whole; then follows the head, with its projector.
"""

import re

from etfzoo.errors import EtfzooError, unknown
from etfzoo.models.classifier import ImageClassifier, is_head_variable
from etfzoo.models.table import BACKBONES, PARTS

BACKBONE, HEAD = PARTS[-1], "head"
_STAGE = re.compile(r"v2_stack_(\d)_")


def freeze(model: ImageClassifier, names) -> None:
    """Takes parts of a classifier out of training; their batch norms go into inference mode.

    Args:
        model: the classifier.
        names: of PARTS; `backbone` is all but the head.

    Raises:
        EtfzooError: a part that this backbone does not have, or nothing is left to train.
    """
    known = dict.fromkeys((*_order(model.spec)[:-1], BACKBONE))
    for name in names:
        if name not in known:
            raise unknown(f"part of {model.spec.backbone} to freeze,", name, known)
    for layer in model.layers:
        part = _part(model.spec, layer)
        if part in names or (BACKBONE in names and part != HEAD):
            layer.trainable = False
    if not model.trainable_variables:
        raise EtfzooError(
            f"nothing is left to train with `freeze={','.join(names)}` and this fixed head: freeze "
            "less, or pass `head=linear`"
        )


def layer_rates(model: ImageClassifier, decay: float) -> list[float]:
    """What the learning rate of each trainable variable is multiplied by.

    It is 1 in the head and smaller by the factor `decay` in each part before it, as Bao et al.
    ("BEiT: BERT pre-training of image transformers", ICLR 2022) have it for the blocks of a
    transformer: in `stem` of a ResNet `decay ** 5`.

    Args:
        model: the classifier.
        decay: in 0..1.
    """
    distances = {part: i for i, part in enumerate(reversed(_order(model.spec)))}
    rates = {
        variable.path: decay ** distances[_part(model.spec, layer)]
        for layer in model.layers
        for variable in layer.variables
    }
    return [rates[variable.path] for variable in model.trainable_variables]


def _order(spec) -> tuple[str, ...]:
    """The parts from images to logits."""
    if spec.backbone not in BACKBONES:
        return BACKBONE, HEAD
    stages = len(BACKBONES[spec.backbone].blocks)
    return (*PARTS[: 1 + stages], HEAD)


def _part(spec, layer) -> str:
    if is_head_variable(f"{layer.name}/"):
        return HEAD
    if spec.backbone not in BACKBONES:
        return BACKBONE
    stage = _STAGE.match(layer.name)
    return f"stage{int(stage[1]) + 1}" if stage else "stem"

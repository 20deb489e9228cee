"""ImageNet weights that Keras publishes, as classifiers of etfzoo: ResNet50 and ResNet101.

They are those of keras.applications: the stride in the first 1x1 convolution as in KerasCV, but
with explicit padding, biases in the convolutions and channels in the order blue, green, red. So the
backbone is Keras's own network (`keras:ResNet50`), and the outputs are Keras's. File, address and
hash (MD5) come from the table of the installed Keras.
"""

import hashlib
import os
from pathlib import Path

from etfzoo import files, internals
from etfzoo.errors import EtfzooError, first_line
from etfzoo.models.spec import PIXELS, ClassifierSpec
from etfzoo.models.table import PREFIX
from etfzoo.progress import notify
from etfzoo.zoo import cache, download

# Network of keras.applications by the name of the model.
NETWORKS = {"resnet50_linear.in1k_keras": "ResNet50", "resnet101_linear.in1k_keras": "ResNet101"}
LICENCE = (
    "MIT (Keras's documentation: ported from the ones released by Kaiming He, "
    "https://github.com/KaimingHe/deep-residual-networks)"
)
CLASSES, SIDE = 1000, 224
_MOST = 2**29  # bytes of a file; that of ResNet101 has 45 million weights


def spec(name: str) -> ClassifierSpec:
    """What such a model is, without Keras and without its network.

    Args:
        name: a key of NETWORKS.
    """
    mean, std, bgr = PIXELS["caffe"]
    shape = (SIDE, SIDE, 3)
    backbone = f"{PREFIX}{NETWORKS[name]}"
    return ClassifierSpec(
        backbone, CLASSES, "linear", input_shape=shape, mean=mean, std=std, bgr=bgr
    )


def load(name: str, load_weights: bool = True):
    """The ImageClassifier of that name, from Keras's file, which is downloaded once.

    The logits are those before Keras's softmax. The classes are the WordNet ids of ImageNet-1k in
    their order.

    Args:
        name: a key of NETWORKS.
        load_weights: False gives the untrained network and downloads nothing.

    Raises:
        EtfzooError: offline, a download that fails, or a file that is not the one that Keras lists.
    """
    import keras
    import tensorflow_datasets as tfds

    from etfzoo.models import custom
    from etfzoo.models.classifier import build_classifier

    network = NETWORKS[name]
    names = tfds.builder("imagenet2012").info.features["label"].names
    model = build_classifier(
        f"keras:{network}", CLASSES, "linear", pixels="caffe", class_names=names, dtype="float32"
    )
    if not load_weights:
        return model
    path = fetch(network)
    try:
        theirs = getattr(keras.applications, network)(weights=str(path))
    except (KeyError, OSError, ValueError) as error:
        raise EtfzooError(f"{path} is no file of {network}: {first_line(error)}") from error
    *_, pooled, logits = theirs.layers
    custom.copy_weights(keras.Model(theirs.inputs, pooled.input), model)
    model.get_layer("logits").set_weights(logits.get_weights())
    return model


def fetch(network: str) -> Path:
    """Keras's file of a network: from Keras's own cache, from that of etfzoo, or downloaded.

    Args:
        network: a value of NETWORKS.

    Raises:
        EtfzooError: see `load`.
    """
    url, md5 = internals.keras_weights(network.lower())
    name = url.rpartition("/")[2]
    target = cache.home() / "keras" / name
    theirs = files.expand(os.environ.get("KERAS_HOME") or "~/.keras") / "models" / name
    for path in (target, theirs):
        if path.is_file():
            if _md5(path) == md5:
                return path
            notify("%s is not the file that Keras lists: it is left alone", path)
    if cache.is_offline():
        raise EtfzooError(
            f"{name} is not in {target.parent}, and ETFZOO_OFFLINE forbids to download it: unset "
            "ETFZOO_OFFLINE, or copy the file there"
        )
    files.make_directory(target.parent)
    notify("downloading %s; licence: %s", url, LICENCE)
    content = download.fetch_bytes(url, _MOST)
    if hashlib.md5(content).hexdigest() != md5:
        raise EtfzooError(
            f"{url} is not the file that Keras lists: its MD5 is not {md5}; nothing was kept"
        )
    with files.atomic(target) as file:
        file.write(content)
    return target


def _md5(path) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "md5").hexdigest()

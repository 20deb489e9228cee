"""The image classifier: normalisation -> KerasCV ResNet -> pooling -> (projector ->) head."""

import contextlib
import dataclasses

import keras

from etfzoo.errors import unknown
from etfzoo.layers.etf_classifier import ETFClassifier, full_precision
from etfzoo.models import backbones, projector, weights
from etfzoo.models.spec import HEAD_FIELDS, IMAGENET_MEAN, IMAGENET_STD, ClassifierSpec


@keras.saving.register_keras_serializable(package="etfzoo")
class ImageClassifier(keras.Model):
    """A functional Keras model from images `[N, H, W, 3]`, RGB in 0..255, to logits `[N, K]`.

    The normalisation is its first layer, so the pixels that it takes are the same everywhere.
    Without a head (`head=None`) the output is the pooled features `[N, p]`. The features are taken
    before the projector, where there is one.

    Attributes:
        spec: the ClassifierSpec that it was built from.
        taps: KerasTensors by name: `stem`, `stage1` to `stage4`, `features`, `projected` (the
            output of the projector, where there is one), `logits`.
    """

    def __init__(self, spec: ClassifierSpec, name=None):
        with _dtype_policy(spec.dtype):
            dtype = full_precision(keras.config.dtype_policy().compute_dtype)
            images = keras.Input(spec.input_shape, name="images", dtype=dtype)
            x = keras.layers.Rescaling(
                [1.0 / s for s in spec.std],
                [-m / s for m, s in zip(spec.mean, spec.std, strict=True)],
                name="normalize",
                dtype=dtype,
            )(images)
            x = backbones.apply_backbone(spec.backbone, x, spec.norm)
            x = keras.layers.GlobalAveragePooling2D(name="features")(x)
            if spec.projector_kind == "etf":
                x = projector.apply_etf_projector(x, spec.projector_layers, dtype)
            elif spec.projector_layers:
                x = projector.apply_projector(x, spec.projector_layers, spec.projector_width, dtype)
            if spec.head == "etf":
                x = ETFClassifier(
                    spec.num_classes,
                    spec.scale,
                    spec.feature_norm,
                    spec.seed,
                    spec.frame,
                    spec.learn_scale,
                    name="logits",
                )(x)
            elif spec.head == "linear":
                x = keras.layers.Dense(spec.num_classes, name="logits", dtype=dtype)(x)
            # Under the policy, too: it tells Keras's `compile` whether to scale the loss.
            super().__init__(inputs=images, outputs=x, name=name or f"{spec.backbone}_{spec.head}")
        self._spec = spec

    @property
    def spec(self) -> ClassifierSpec:
        return self._spec

    @property
    def taps(self) -> dict[str, keras.KerasTensor]:
        names = backbones.tap_layers(self.spec.backbone) | {"features": "features"}
        if self.spec.projector_layers:
            names["projected"] = projector.output_layer(
                self.spec.projector_layers, self.spec.projector_kind
            )
        if self.spec.head is not None:
            names["logits"] = "logits"
        return {tap: self.get_layer(layer).output for tap, layer in names.items()}

    def at_size(self, height: int, width: int) -> keras.Model:
        """The same layers with the same weights, on images of another size in pixels."""
        if (height, width) == self.spec.input_shape[:2]:
            return self
        images = keras.Input((height, width, 3), name="images", dtype=self.inputs[0].dtype)
        return backbones.rebuild(self, images, lambda layer: layer)

    def get_config(self):
        return {"spec": dataclasses.asdict(self.spec), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(ClassifierSpec.from_dict(config["spec"]), name=config["name"])


def build_classifier(
    backbone: str,
    num_classes: int | None,
    head: str | None = "etf",
    norm: str = "bn",
    input_shape=(224, 224, 3),
    *,
    feature_norm: str = "none",
    scale: float | None = None,
    seed: int = 0,
    frame: str = "simplex_etf",
    learn_scale: bool = False,
    projector_layers: int = 0,
    projector_width: int | None = None,
    projector_kind: str = "trained",
    guided: bool = False,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    crop: float = 0.875,
    class_names=None,
    dtype: str | None = None,
) -> ImageClassifier:
    """Builds an untrained image classifier on a KerasCV ResNet.

    Args:
        backbone: `"rn18"`, `"rn34"`, `"rn50"` or `"rn101"`.
        num_classes: K, or None with `head=None`.
        head: `"etf"` (fixed), `"linear"` (trainable, with bias) or None (features).
        norm: normalisation in the backbone: `"bn"`, or `"sw"` for Switchable Whitening at the
            published places (see `etfzoo.models.backbones.whiten`) and batch norm elsewhere.
        input_shape: `(height, width, 3)`; height and width may be None.
        feature_norm: `"none"`, `"bn"`, `"l2"` or `"bn_l2"`; ETF head only.
        scale: factor on the ETF head's logits; None means 16 on features of unit length, else 1.
        seed: seed of the ETF. The other weights draw from Keras's global seed
            (`keras.utils.set_random_seed`).
        frame, learn_scale: of the fixed classifier, see `etfzoo.layers.ETFClassifier`.
        projector_layers: hidden layers of the projector between features and head, 1 to 3; 0 is
            none. See `etfzoo.models.projector`.
        projector_width: units of each; None is as many as features. It is the p of an ETF.
        projector_kind: `"trained"`, or `"etf"` for one of frozen ETFs.
        guided: whether training turns the simplex ETF to the class means, see
            `etfzoo.layers.frames.nearest_etf`; ETF head only. Here it has the place of its seed.
        mean, std: per channel, on the 0..255 scale.
        crop: share of the shorter side that evaluation keeps around the centre.
        class_names: label names in the order of the logits, or None.
        dtype: Keras dtype policy, e.g. `"mixed_bfloat16"`; None takes the global one.

    Returns:
        An ImageClassifier.

    Raises:
        EtfzooError: a name that is not known or shapes that do not fit.
        ValueError: an ETF that does not exist (see `etfzoo.layers.ETFClassifier`).

    Examples:
        >>> import etfzoo
        >>> model = etfzoo.build_classifier("rn18", 7, head="etf", input_shape=(32, 32, 3))
        >>> model.output_shape
        (None, 7)
        >>> model.get_layer("logits").trainable_variables
        []
    """
    return ImageClassifier(
        ClassifierSpec(
            backbone=backbone,
            num_classes=num_classes,
            head=head,
            norm=norm,
            input_shape=input_shape,
            feature_norm=feature_norm,
            scale=scale,
            seed=seed,
            frame=frame,
            learn_scale=learn_scale,
            projector_layers=projector_layers,
            projector_width=projector_width,
            projector_kind=projector_kind,
            guided=guided,
            mean=mean,
            std=std,
            crop=crop,
            class_names=class_names,
            dtype=dtype or keras.config.dtype_policy().name,
        )
    )


def replace_head(
    model: ImageClassifier, num_classes: int | None, head: str | None = "linear", **changes
) -> ImageClassifier:
    """A new classifier with this backbone's weights and a fresh head; `model` is left alone.

    A projector goes with its head: the fresh one acts on the pooled features.

    Args:
        model: the classifier whose backbone is taken over.
        num_classes: classes of the new head.
        head: `"linear"`, `"etf"` or None (features).
        **changes: other fields of ClassifierSpec that change, e.g. `input_shape`, `class_names`;
            what belongs to the old head, as class names, frame and projector, is not taken
            over; `projector_layers` makes a fresh projector.

    Examples:
        >>> import etfzoo
        >>> model = etfzoo.build_classifier("rn18", 7, head="etf", input_shape=(32, 32, 3))
        >>> flowers = etfzoo.replace_head(model, 102)
        >>> flowers.spec.head, flowers.output_shape
        ('linear', (None, 102))
    """
    defaults: dict = {"class_names": None, "class_descriptions": None}
    changes = defaults | HEAD_FIELDS | changes | {"num_classes": num_classes, "head": head}
    spec = dataclasses.replace(model.spec, **changes)
    fresh = ImageClassifier(spec)
    weights.assign(fresh.variables, weights.as_arrays(model.variables), skip=is_head_variable)
    return fresh


def is_head_variable(path: str) -> bool:
    """Whether a variable path belongs to the head, or to the projector that goes with it."""
    return path.startswith("logits/") or projector.is_projector_variable(path)


def feature_model(model: ImageClassifier, taps=("features",)) -> keras.Model:
    """A Keras model from images to a dict of the named taps (see ImageClassifier.taps).

    Args:
        model: the classifier.
        taps: names of what is given.

    Raises:
        EtfzooError: a tap that is not known, with close matches.

    Examples:
        >>> import etfzoo, numpy as np
        >>> model = etfzoo.build_classifier("rn18", None, head=None, input_shape=(32, 32, 3))
        >>> found = etfzoo.feature_model(model, ["stage3", "features"])(np.zeros((1, 32, 32, 3)))
        >>> {name: tuple(value.shape) for name, value in sorted(found.items())}
        {'features': (1, 512), 'stage3': (1, 2, 2, 256)}
    """
    for tap in taps:
        if tap not in model.taps:
            raise unknown("tap", tap, model.taps)
    return keras.Model(model.input, {tap: model.taps[tap] for tap in taps}, name="features")


@contextlib.contextmanager
def _dtype_policy(name: str):
    # KerasCV's constructor takes no dtype for its layers; they read the global policy.
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)

"""The image classifier: normalisation -> backbone -> pooling -> (projector ->) head."""

import contextlib
import dataclasses

import keras

from etfzoo import internals
from etfzoo.errors import EtfzooError, first_line, unknown
from etfzoo.layers.etf_classifier import ETFClassifier, full_precision
from etfzoo.models import backbones, custom, projector, weights
from etfzoo.models.spec import HEAD_FIELDS, IMAGENET_MEAN, IMAGENET_STD, PIXELS, ClassifierSpec
from etfzoo.models.table import BACKBONES, CUSTOM, check_backbone


@keras.saving.register_keras_serializable(package="etfzoo")
class ImageClassifier(keras.Model):
    """A functional Keras model from images `[N, H, W, 3]`, RGB in 0..255, to logits `[N, K]`.

    The normalisation is its first layer, so the pixels that it takes are the same everywhere.
    Without a head (`head=None`) the output is the pooled features `[N, p]`. The features are taken
    before the projector, where there is one.

    Attributes:
        spec: the ClassifierSpec that it was built from.
        taps: KerasTensors by name: `stem`, `stage1` to `stage4` (of a backbone that is no row of
            BACKBONES instead `map`, what is pooled, where it gives one), `features`, `projected`
            (the output of the projector, where there is one), `logits`.
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
            if spec.bgr:
                x = keras.ops.flip(x, axis=-1)
            if spec.backbone in BACKBONES:
                x = backbones.apply_backbone(spec.backbone, x, spec.norm)
            elif spec.network is None:
                raise EtfzooError(f"this model's backbone, {spec.backbone}, is not with its spec")
            else:
                x = custom.apply_network(spec.network, x)
            if len(x.shape) == 4:
                x = keras.layers.GlobalAveragePooling2D(name="features")(x)
            else:
                x = keras.layers.Identity(name="features")(x)
            width = spec.projector_width_behind(x.shape[-1])
            spec = dataclasses.replace(spec, projector_width=width)
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
            super().__init__(
                inputs=images, outputs=x, name=name or f"{spec.short_name}_{spec.head}"
            )
            if spec.network is not None:
                internals.name_by_layer(self)
        self._spec = spec

    @property
    def spec(self) -> ClassifierSpec:
        return self._spec

    @property
    def taps(self) -> dict[str, keras.KerasTensor]:
        found, names = {}, {"features": "features"}
        if self.spec.network is None:
            names = backbones.tap_layers(self.spec.backbone) | names
        elif len((pooled := self.get_layer("features").input).shape) == 4:
            found["map"] = pooled
        if self.spec.projector_layers:
            names["projected"] = projector.output_layer(
                self.spec.projector_layers, self.spec.projector_kind
            )
        if self.spec.head is not None:
            names["logits"] = "logits"
        return found | {tap: self.get_layer(layer).output for tap, layer in names.items()}

    def at_size(self, height: int, width: int) -> keras.Model:
        """The same layers with the same weights, on images of another size in pixels."""
        if (height, width) == self.spec.input_shape[:2]:
            return self
        images = keras.Input((height, width, 3), name="images", dtype=self.inputs[0].dtype)
        try:
            return backbones.rebuild(self, images, lambda layer: layer)
        except ValueError as error:
            raise EtfzooError(
                f"{self.name} cannot take images of {height}x{width} pixels: {first_line(error)}"
            ) from error

    def get_config(self):
        return {"spec": dataclasses.asdict(self.spec), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(ClassifierSpec.from_dict(config["spec"]), name=config["name"])


def build_classifier(
    backbone: "str | keras.Model",
    num_classes: int | None,
    head: str | None = "etf",
    norm: str = "bn",
    input_shape=None,
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
    pixels: str | None = None,
    crop: float = 0.875,
    class_names=None,
    dtype: str | None = None,
) -> ImageClassifier:
    """Builds an image classifier on a KerasCV ResNet or on any Keras model; its head is untrained.

    A Keras model is a functional or sequential one of stock layers, from images to a map
    `[N, h, w, p]`, of which the features are the average, or to features `[N, p]`. Its layers are
    made anew, with its weights, and frozen ones stay frozen. Stored is their config, and no code.

    Args:
        backbone: `"rn18"`, `"rn34"`, `"rn50"` or `"rn101"`; `"keras:"` and a constructor of
            keras.applications, as in `"keras:EfficientNetB0"`, without head and weights and with
            torch's momentum in its batch norms; or a keras.Model.
        num_classes: K, or None with `head=None`.
        head: `"etf"` (fixed), `"linear"` (trainable, with bias) or None (features).
        norm: normalisation in the backbone: `"bn"`, or `"sw"` for Switchable Whitening at the
            published places (see `etfzoo.models.backbones.whiten`) and batch norm elsewhere.
        input_shape: `(height, width, 3)`; height and width may be None. Left out, it is that of a
            keras.Model that has one, else `(224, 224, 3)`.
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
        mean, std: per channel, on the 0..255 scale; see `pixels`.
        pixels: what a backbone other than KerasCV's was trained to take, by the names of
            keras.applications.imagenet_utils.preprocess_input: `"torch"` (ImageNet's mean and
            standard deviation), `"tf"` (-1..1), `"caffe"` (blue, green, red without ImageNet's
            mean), or `"raw"` (0..255 as they are). None is `"raw"` where the network begins with a
            Rescaling or Normalization of its own, as EfficientNet and ConvNeXt do, and otherwise
            `mean` and `std`.
        crop: share of the shorter side that evaluation keeps around the centre.
        class_names: label names in the order of the logits, or None.
        dtype: Keras dtype policy, e.g. `"mixed_bfloat16"`; None takes the global one.

    Returns:
        An ImageClassifier.

    Raises:
        EtfzooError: a name that is not known or shapes that do not fit; a keras.Model that is not
            functional, has a Lambda or a layer of the user's own, several inputs or other channels.
        ValueError: an ETF that does not exist (see `etfzoo.layers.ETFClassifier`).

    Examples:
        >>> import etfzoo
        >>> model = etfzoo.build_classifier("rn18", 7, head="etf", input_shape=(32, 32, 3))
        >>> model.output_shape
        (None, 7)
        >>> model.get_layer("logits").trainable_variables
        []

        A network of one's own:

        >>> import keras
        >>> network = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(16, 3)])
        >>> etfzoo.build_classifier(network, 7).taps["features"].shape
        (None, 16)
    """
    source, fields = _backbone_fields(backbone, pixels)
    if input_shape is None:
        own = source.inputs[0].shape[1:] if source else ()
        input_shape = own if all(own) and own else (224, 224, 3)
    spec = ClassifierSpec(
        **{"mean": mean, "std": std} | fields,
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
        crop=crop,
        class_names=class_names,
        dtype=dtype or keras.config.dtype_policy().name,
    )
    model = ImageClassifier(spec)
    if spec.backbone == CUSTOM:
        weights.as_arrays(model.variables)  # two of the same path could not be told apart
        custom.copy_weights(source, model)
    return model


def _backbone_fields(backbone, pixels):
    """The Keras model that a backbone is, if it is one, and the fields of the spec that it sets."""
    if isinstance(backbone, str):
        check_backbone(backbone)
    if backbone == CUSTOM:
        raise EtfzooError(f"{CUSTOM} stands for a keras.Model: pass the model itself")
    if isinstance(backbone, str) and backbone in BACKBONES:
        if pixels is not None:
            raise EtfzooError(f"pixels is for other backbones: {backbone} takes `mean` and `std`")
        return None, {"backbone": backbone}
    name, source = CUSTOM, backbone
    if isinstance(backbone, str):
        name, source = backbone, custom.application(backbone)
    fields = {"backbone": name, "network": custom.describe(source)}
    if pixels is None and custom.normalizes(source):
        pixels = "raw"
    if pixels is not None:
        if pixels not in PIXELS:
            raise unknown("pixels", pixels, PIXELS)
        mean, std, bgr = PIXELS[pixels]
        fields |= {"mean": mean, "std": std, "bgr": bgr}
    return source, fields


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
    return with_fresh_head(weights.StoredModel.of(model), num_classes, head, **changes)


def with_fresh_head(
    stored: weights.StoredModel, num_classes: int | None, head: str | None, **changes
) -> ImageClassifier:
    """`replace_head` of a model that was read only."""
    defaults: dict = {"class_names": None, "class_descriptions": None}
    changes = defaults | HEAD_FIELDS | changes | {"num_classes": num_classes, "head": head}
    fresh = ImageClassifier(dataclasses.replace(stored.spec, **changes))
    weights.assign(fresh.variables, stored.arrays, stored.what, skip=is_head_variable)
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

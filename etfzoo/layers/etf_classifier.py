"""The fixed classifier: an equiangular tight frame, or another frame."""

import math
import warnings

import keras
from keras import ops

from etfzoo.layers import frames

FEATURE_NORMS = ("none", "bn", "l2", "bn_l2")


def full_precision(compute_dtype: str) -> str:
    """float32 for 16-bit compute dtypes, otherwise the compute dtype itself."""
    return "float32" if compute_dtype in ("float16", "bfloat16") else compute_dtype


def minimum_scale(num_classes: int) -> float:
    """Smallest logit scale at which collapsed, L2-normalised features reach p_true >= 0.99.

    At perfect collapse the logit of the true class is s and of every other -s/(K-1), hence
    s >= (K-1)/K ln((K-1) 0.99/0.01).
    """
    k = num_classes
    return (k - 1) / k * math.log((k - 1) * 0.99 / 0.01)


@keras.saving.register_keras_serializable(package="etfzoo")
class ETFClassifier(keras.layers.Layer):
    """Logits from a fixed classifier, by default the simplex ETF: `scale * h W^T`, W never trained.

    Source: "Deep neural network models trained with a fixed random classifier transfer better
    across domains" (Tiomoko Ali et al.): W = sqrt(K/(K-1)) P Q, no bias, raw pooled features.

    Input `[batch, p]`, output `[batch, K]`: float32 under a 16-bit policy, the compute dtype
    otherwise. `kernel` `[p, K]` is a non-trainable weight: it is saved with the model, gets no
    gradient, weight decay or optimizer slot, stays frozen under `model.trainable = True`, and is
    drawn again bit for bit from its seed on every backend.

    Args:
        num_classes: K >= 2.
        scale: factor on the logits. With L2-normalised features choose about 16: at 1 the softmax
            cannot become certain, and the layer warns.
        feature_norm: what is done to the features first: `"none"` (the paper), `"bn"` (batch
            normalisation), `"l2"` (unit length) or `"bn_l2"` (both, in this order).
        seed: seed of the random rotation.
        frame: the rows of W: `"simplex_etf"` (the paper; p >= K-1), `"centred_etf"` (orthogonal to
            the all-ones vector; p >= K), `"orthogonal"`, `"hadamard"` (both p >= K), or
            `"softmax_code"` for more classes than p+1; see `etfzoo.layers.frames`.
        learn_scale: whether the factor is trained too, as the weight `log_scale`, from `scale` on;
            the directions of the classes stay fixed.

    Raises:
        ValueError: K < 2, a frame that does not exist in p dimensions, features that are not
            rank 2, or an unknown `feature_norm` or `frame`.

    Examples:
        Rows of length 1, and the cosine -1/(K-1) between any two:

        >>> import etfzoo, numpy as np
        >>> layer = etfzoo.layers.ETFClassifier(num_classes=5)
        >>> layer(np.ones((2, 16), "float32")).shape.as_list()
        [2, 5]
        >>> w = np.asarray(layer.kernel).T
        >>> np.allclose(w @ w.T, 1.25 * np.eye(5) - 0.25, atol=1e-6)
        True
    """

    def __init__(
        self,
        num_classes,
        scale=1.0,
        feature_norm="none",
        seed=0,
        frame="simplex_etf",
        learn_scale=False,
        **kwargs,
    ):
        # Casting is done here: autocast would round float32 features to 16 bits.
        super().__init__(autocast=False, **kwargs)
        if feature_norm not in FEATURE_NORMS:
            raise ValueError(
                f"feature_norm must be one of {', '.join(FEATURE_NORMS)}; got {feature_norm!r}"
            )
        if frame not in frames.FRAMES:
            raise ValueError(f"frame must be one of {', '.join(frames.FRAMES)}; got {frame!r}")
        if num_classes < 2:
            raise ValueError(f"ETFClassifier needs num_classes >= 2; got {num_classes}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number; got {scale}")
        if feature_norm.endswith("l2") and scale < minimum_scale(num_classes):
            warnings.warn(
                f"scale={scale:g} is too small for L2-normalised features and {num_classes} "
                f"classes: even perfectly collapsed features stay below 99 % certainty; use at "
                f"least {minimum_scale(num_classes):.1f} (16 is usual)",
                stacklevel=2,
            )
        self.num_classes = int(num_classes)
        self.scale = float(scale)
        self.feature_norm = feature_norm
        self.seed = int(seed)
        self.frame = frame
        self.learn_scale = bool(learn_scale)
        self.logits_dtype = full_precision(self.compute_dtype)
        self.batch_norm = None
        if feature_norm.startswith("bn"):
            self.batch_norm = keras.layers.BatchNormalization(
                name="feature_norm", dtype=self.logits_dtype
            )

    def build(self, input_shape):
        if len(input_shape) != 2 or input_shape[-1] is None:
            raise ValueError(
                f"ETFClassifier needs pooled features [batch, p] with a known p; got {input_shape}"
            )
        frame = frames.build(self.frame, self.num_classes, input_shape[-1], self.seed)
        self.kernel = self.add_weight(
            name="kernel",
            shape=frame.T.shape,
            dtype=self.logits_dtype,
            initializer=lambda shape, dtype: ops.convert_to_tensor(frame.T, dtype=dtype),
            trainable=False,
            autocast=False,
        )
        if self.batch_norm is not None:
            self.batch_norm.build(input_shape)
        if self.learn_scale:
            # Its logarithm, so that no step can turn its sign.
            self.log_scale = self.add_weight(
                name="log_scale",
                shape=(),
                dtype=self.logits_dtype,
                initializer=keras.initializers.Constant(math.log(self.scale)),
                autocast=False,
            )

    @property
    def logit_scale(self):
        """The factor on the logits as it is now: `scale` until it is trained."""
        return ops.exp(self.log_scale) if self.learn_scale else self.scale

    def normalized(self, features, training=None):
        """Features `[batch, p]` after the feature norm: what is multiplied by the kernel."""
        h = ops.cast(features, self.logits_dtype)
        if self.batch_norm is not None:
            h = self.batch_norm(h, training=training)
        if self.feature_norm.endswith("l2"):
            h = ops.normalize(h, axis=-1, order=2)
        return h

    def call(self, features, training=None):
        h = self.normalized(features, training)
        return self.logit_scale * ops.matmul(h, self.kernel)

    @property
    def synchronized(self) -> bool:
        """Whether the feature norm's statistics are over all replicas; never saved."""
        return self.batch_norm is not None and self.batch_norm.synchronized

    @synchronized.setter
    def synchronized(self, value):
        if self.batch_norm is not None:
            self.batch_norm.synchronized = value

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_classes)

    def compute_output_spec(self, features, training=None):
        return keras.KerasTensor(self.compute_output_shape(features.shape), dtype=self.logits_dtype)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        return config | {
            "num_classes": self.num_classes,
            "scale": self.scale,
            "feature_norm": self.feature_norm,
            "seed": self.seed,
            "frame": self.frame,
            "learn_scale": self.learn_scale,
        }

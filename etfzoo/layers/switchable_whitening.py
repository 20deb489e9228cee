"""Switchable Whitening: a mixture of whitening and standardisation with learned weights."""

import math

import keras
from keras import ops

from etfzoo.layers.etf_classifier import full_precision

# What each type mixes, in the order of its logits.
STATISTICS = {
    1: ("bw",),
    2: ("bw", "iw"),
    3: ("bw", "iw", "ln"),
    5: ("bw", "iw", "bn", "in", "ln"),
}


@keras.saving.register_keras_serializable(package="etfzoo")
class SwitchableWhitening(keras.layers.Layer):
    """Whitens groups of channels by a learned mixture of statistics.

    Source: Pan, Zhan, Shi, Tang, Luo, "Switchable Whitening for Deep Representation Learning",
    ICCV 2019. With `w` and `v` the softmax of the mean and of the covariance logits, per sample n
    and group of c channels

        mu_n = sum_k w_k mu_k,   S_n = sum_k v_k S_k + epsilon I,
        y = gamma * S_n^(-1/2) (x - mu_n) + beta

    where k runs over batch whitening (bw: mean and covariance of the batch), instance whitening
    (iw: of the sample), batch and instance normalisation (bn, in: the diagonals of these) and
    layer normalisation (ln: mean and variance over all channels of the sample). All covariances
    are biased. The inverse square root is `iterations` steps of Newton and Schulz, in the coupled
    form: it gives what the usual form gives, and does not diverge when iterated on.

    Input and output `[batch, ..., channels]`, channels last: maps of any number of dimensions, or
    flat features, which count as maps of one position. In training, bw and bn are the batch's
    statistics and are averaged into `moving_mean` `[C]` and `moving_covariance` `[C/c, c, c]`; in
    inference (and with `layer.trainable = False`, as in keras.layers.BatchNormalization) they are
    those averages. iw, in and ln are always the sample's own.

    Statistics are float32 under a 16-bit policy, else of the compute dtype. On GPUs that round
    float32 products to TF32, switch that off (`tf.config.experimental.
    enable_tensor_float_32_execution(False)`; etfzoo's training does).

    First derivatives are exact; second derivatives are not defined by this layer.

    Attributes:
        synchronized: whether the batch's statistics are taken over all replicas of a
            `tf.distribute` strategy. A property of the run: False at first, never saved.

    Args:
        group_size: channels c that are whitened together; divides the number of channels.
        sw_type: 1 (bw), 2 (bw, iw), 3 (bw, iw, ln) or 5 (bw, iw, bn, in, ln).
        iterations: steps of Newton and Schulz.
        epsilon: added to the diagonal of the covariance.
        momentum: of the moving averages, `moving = momentum * moving + (1 - momentum) * batch`.
        tie_weight: whether the covariances are mixed by the means' weights.

    Raises:
        ValueError: unknown `sw_type`, other arguments out of range, channels that `group_size`
            does not divide, inputs of rank below 2, or a mask.

    Examples:
        Batch whitening leaves channels without correlation:

        >>> import etfzoo, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")
        >>> x[..., 1] += x[..., 0]
        >>> layer = etfzoo.layers.SwitchableWhitening(group_size=4, sw_type=1, iterations=10)
        >>> y = np.asarray(layer(x, training=True)).reshape(-1, 4)
        >>> np.allclose(np.cov(y.T), np.eye(4), atol=1e-2)
        True
    """

    def __init__(
        self,
        group_size=16,
        sw_type=2,
        iterations=5,
        epsilon=1e-5,
        momentum=0.99,
        tie_weight=False,
        **kwargs,
    ):
        # Casting is done here: autocast would round inputs and weights to 16 bits.
        super().__init__(autocast=False, **kwargs)
        if sw_type not in STATISTICS:
            raise ValueError(f"sw_type must be one of {list(STATISTICS)}; got {sw_type!r}")
        for name, value, lowest in (("group_size", group_size, 1), ("iterations", iterations, 1)):
            if int(value) != value or value < lowest:
                raise ValueError(f"{name} must be a whole number from {lowest}; got {value!r}")
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon must be positive; got {epsilon!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1; got {momentum!r}")
        self.group_size = int(group_size)
        self.sw_type = int(sw_type)
        self.iterations = int(iterations)
        self.epsilon = float(epsilon)
        self.momentum = float(momentum)
        self.tie_weight = bool(tie_weight)
        self.synchronized = False
        self.statistics_dtype = full_precision(self.compute_dtype)

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "SwitchableWhitening needs [batch, ..., channels] with a known number of channels; "
                f"got {input_shape}"
            )
        channels, c = input_shape[-1], self.group_size
        if channels % c:
            raise ValueError(
                f"SwitchableWhitening: {channels} channels cannot be split into groups of {c}; "
                "choose a group_size that divides them"
            )

        def weight(name, shape, initializer, **kwargs):
            return self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
                dtype=self.statistics_dtype,
                autocast=False,
                **kwargs,
            )

        def moving(name, shape, initializer):
            return weight(name, shape, initializer, trainable=False, aggregation="mean")

        mixed = len(STATISTICS[self.sw_type])
        self.mean_logits = weight("mean_logits", (mixed,), "ones")
        self.covariance_logits = self.mean_logits
        if not self.tie_weight:
            self.covariance_logits = weight("covariance_logits", (mixed,), "ones")
        self.gamma = weight("gamma", (channels,), "ones")
        self.beta = weight("beta", (channels,), "zeros")
        self.moving_mean = moving("moving_mean", (channels,), "zeros")
        # Identity, so that a layer that was never trained does not whiten by epsilon.
        self.moving_covariance = moving(
            "moving_covariance",
            (channels // c, c, c),
            lambda shape, dtype: ops.broadcast_to(ops.eye(c, dtype=dtype), shape),
        )

    def call(self, inputs, training=None, mask=None):
        if mask is not None:
            raise ValueError("SwitchableWhitening does not support masks")
        training = bool(training) and self.trainable
        shape = ops.shape(inputs)
        n, positions = shape[0], math.prod(shape[1:-1])
        c = self.group_size
        groups = self.moving_covariance.shape[0]
        vectors = (-1, groups, 1, c)

        # [n, g, m, c]: each group is a matrix of its own, so that all products are batched.
        x = ops.cast(inputs, self.statistics_dtype)
        x = ops.transpose(ops.reshape(x, (n, positions, groups, c)), (0, 2, 1, 3))
        x, mean, covariance = _centred_moments(x)

        if training:
            batch_mean = self._batch_average(mean)
            offset = mean - batch_mean
            # Law of total covariance: no second pass over the maps.
            batch_covariance = self._batch_average(
                covariance + ops.swapaxes(offset, -1, -2) * offset
            )
            self._update(self.moving_mean, batch_mean)
            self._update(self.moving_covariance, batch_covariance)
        else:
            offset = mean - ops.reshape(self.moving_mean, vectors)
            batch_covariance = ops.expand_dims(self.moving_covariance, 0)

        offset, covariance = self._mix(mean, offset, covariance, batch_covariance)
        whitening = _inverse_square_root(covariance, self.iterations)
        # Rows are vectors here, and the whitening matrix is symmetric.
        matrix = whitening * ops.reshape(self.gamma, vectors)
        # x is centred by a constant: no derivative may flow through the mean that is put back.
        offset = offset + (ops.stop_gradient(mean) - mean)
        bias = ops.matmul(offset, matrix) + ops.reshape(self.beta, vectors)
        y = ops.matmul(x, matrix) + bias
        y = ops.reshape(ops.transpose(y, (0, 2, 1, 3)), shape)
        return ops.cast(y, self.compute_dtype)

    def _mix(self, mean, offset, covariance, batch_covariance):
        """Distance of each sample's mean from the mixed mean, and the mixed covariance."""
        kinds = STATISTICS[self.sw_type]
        w, v = (
            dict(zip(kinds, ops.unstack(ops.exp(ops.log_softmax(logits))), strict=True))
            for logits in (self.mean_logits, self.covariance_logits)
        )
        eye = ops.eye(self.group_size, dtype=self.statistics_dtype)
        diagonal = self.epsilon
        shift = (w["bw"] + w.get("bn", 0)) * offset
        if "ln" in kinds:
            layer_offset = mean - ops.mean(mean, axis=(1, 2, 3), keepdims=True)
            variance = ops.sum(covariance * eye, axis=-2, keepdims=True) + layer_offset**2
            shift = shift + w["ln"] * layer_offset
            diagonal = diagonal + v["ln"] * ops.mean(variance, axis=(1, 2, 3), keepdims=True)
        mixed = (v["bw"] + v.get("bn", 0) * eye) * batch_covariance + diagonal * eye
        # With bw alone the sum has no sample axis yet: zero times the sample's own gives it one.
        mixed = mixed + (v.get("iw", 0) + v.get("in", 0) * eye) * covariance
        return shift, mixed

    def _batch_average(self, values):
        if self.synchronized:
            return ops.moments(values, axes=[0], keepdims=True, synchronized=True)[0]
        return ops.mean(values, axis=0, keepdims=True)

    def _update(self, moving, batch):
        batch = ops.reshape(batch, moving.shape)
        moving.assign(self.momentum * moving + (1 - self.momentum) * batch)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        return config | {
            "group_size": self.group_size,
            "sw_type": self.sw_type,
            "iterations": self.iterations,
            "epsilon": self.epsilon,
            "momentum": self.momentum,
            "tie_weight": self.tie_weight,
        }


@ops.custom_gradient
def _centred_moments(x):
    """`[n, g, m, c]` centred over m, its mean `[n, g, 1, c]` and biased covariance `[n, g, c, c]`.

    Centred, because raw second moments lose digits where the mean is large. What was subtracted
    counts as a constant: the caller sees to the derivative through the mean. The gradient is given
    by hand because autodiff takes a second product and one more tensor of the size of x.
    """
    rows = ops.cast(ops.shape(x)[-2], x.dtype)
    mean = ops.sum(x, axis=-2, keepdims=True) / rows
    centred = x - mean
    covariance = ops.matmul(ops.swapaxes(centred, -1, -2), centred) / rows

    def gradient(*upstream):
        # JAX passes one tuple, the others three arguments.
        d_centred, d_mean, d_covariance = upstream[0] if len(upstream) == 1 else upstream
        d_covariance = (d_covariance + ops.swapaxes(d_covariance, -1, -2)) / rows
        return d_centred + ops.matmul(centred, d_covariance) + d_mean / rows

    return (centred, mean, covariance), gradient


def _inverse_square_root(matrices, iterations):
    """Newton-Schulz for S^(-1/2) of `[..., c, c]`, coupled: Y -> S^(1/2), P -> S^(-1/2)."""
    eye = ops.eye(matrices.shape[-1], dtype=matrices.dtype)
    trace = ops.sum(matrices * eye, axis=(-2, -1), keepdims=True)
    y = matrices / trace
    p = step = 1.5 * eye - 0.5 * y  # from P = I
    for _ in range(iterations - 1):
        y = ops.matmul(y, step)
        step = 1.5 * eye - 0.5 * ops.matmul(p, y)
        p = ops.matmul(step, p)
    return p * ops.rsqrt(trace)

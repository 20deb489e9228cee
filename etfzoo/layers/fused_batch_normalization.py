"""Batch normalisation by TensorFlow's fused op."""

import keras
from keras import ops

from etfzoo import internals

_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
if _ON_TENSORFLOW:
    import tensorflow as tf


@keras.saving.register_keras_serializable(package="etfzoo", name="FusedBatchNormalization")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization through one op of TensorFlow, where there is one.

    Same arguments, weights, output, gradients and moving statistics as the layer of Keras, which
    on TensorFlow computes the moments and the affine map as many ops with as many passes over
    memory. What it saves: `benchmarks/batch_norm.py`.

    The op takes maps `[batch, height, width, channels]` in float32, float16 or bfloat16, with
    statistics in float32. All else is computed by the formula of Keras: other backends, ranks,
    axes and dtypes, masks, `renorm`, a layer without scale or centre, statistics over several
    replicas, training with a frozen layer (the op's gradient for constant statistics does not
    repeat bit for bit on GPUs), and whatever XLA compiles: XLA fuses the formula by itself, and
    would turn the op's variance into E[x^2] - E[x]^2, which loses digits and can become negative
    (with `tf.config.optimizer.set_jit` or TF_XLA_FLAGS=--tf_xla_auto_jit, that is everything).

    On GPUs with deterministic ops TensorFlow has no gradient of the op in inference mode: there,
    take gradients of `stock(model)(images, training=False)`, see `etfzoo.models.backbones.stock`.

    In weight files the layer goes by the name of Keras's, so that each loads the other's.

    Attributes:
        synchronized: whether the batch's statistics are taken over all replicas of a
            `tf.distribute` strategy. A property of the run: never saved.

    Args:
        *args, **kwargs: those of keras.layers.BatchNormalization.
    """

    def call(self, inputs, training=None, mask=None):
        if not self._fuses(inputs, training, mask):
            return super().call(inputs, training=training, mask=mask)
        training = bool(training)
        none = tf.zeros([0])
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=ops.cast(self.gamma, "float32"),
            offset=ops.cast(self.beta, "float32"),
            mean=none if training else ops.cast(self.moving_mean, "float32"),
            variance=none if training else ops.cast(self.moving_variance, "float32"),
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            # The op's variance is unbiased, n / (n - 1) times that of Keras; n = 1 gives 0.
            one_over_n = inputs.shape[-1] / tf.cast(tf.size(inputs), "float32")
            self._update(self.moving_mean, mean)
            self._update(self.moving_variance, tf.math.multiply_no_nan(variance, 1 - one_over_n))
        return y

    def _fuses(self, inputs, training, mask) -> bool:
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return (
            _ON_TENSORFLOW
            and mask is None
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.scale
            and self.center
            and not self.renorm
            and dtype == self.compute_dtype
            and dtype in ("float32", "float16", "bfloat16")
            and not (training and (not self.trainable or self._over_replicas()))
            and not internals.xla_compiles()
        )

    def _over_replicas(self) -> bool:
        return self.synchronized and tf.distribute.get_strategy().num_replicas_in_sync > 1

    def _update(self, moving, batch):
        moving.assign(ops.cast(moving, batch.dtype) * self.momentum + batch * (1.0 - self.momentum))

    def get_config(self):
        config = super().get_config()
        del config["synchronized"]
        return config


internals.share_weight_files(FusedBatchNormalization)

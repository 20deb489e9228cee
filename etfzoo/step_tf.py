"""One training and one evaluation step on TensorFlow, for any tf.distribute strategy."""

import keras
import tensorflow as tf
from keras import ops

from etfzoo import losses


class Stepper:
    """Training and evaluation steps of a model; the part of training that knows the backend.

    The L2 term is added to the gradient before momentum, as the paper's framework (torch) and its
    numbers have it; Keras's SGD(weight_decay=) is decoupled from momentum and, at momentum 0.9,
    ten times weaker for the same coefficient.

    Args:
        model: the classifier, built under `strategy.scope()`.
        optimizer: a Keras optimizer without weight decay, built under the same scope.
        strategy: a tf.distribute strategy.
        weight_decay: L2 coefficient on the variables that `losses.decayed` names.
        label_smoothing: see `losses.cross_entropy`.
        decay_all: whether L2 counts for all trainable variables.
    """

    def __init__(
        self,
        model,
        optimizer,
        strategy,
        weight_decay=0.0,
        label_smoothing=0.0,
        decay_all=False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.strategy = strategy
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self._decayed = [losses.decayed(v, decay_all) for v in model.trainable_variables]
        self._train = tf.function(self._distributed_train, reduce_retracing=True)
        self.evaluate = evaluation_step(model, label_smoothing)

    def distribute(self, batches):
        """Batches as this strategy takes them: split over the replicas where there are several."""
        if self.strategy.num_replicas_in_sync == 1:
            return batches
        return self.strategy.experimental_distribute_dataset(batches)

    def train(self, images, labels):
        """One SGD step on a global batch.

        Returns:
            float64 tensor `[3]`: sum of losses, number right, number of examples.
        """
        return self._train(images, labels)

    def _distributed_train(self, images, labels):
        sums = self.strategy.run(self._replica_train, (images, labels))
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    def _replica_train(self, images, labels):
        replicas = self.strategy.num_replicas_in_sync
        variables = self.model.trainable_variables
        values = [v.value for v in variables]
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            per_example = losses.cross_entropy(labels, logits, self.label_smoothing)
            # Gradients are summed over replicas: divide by the global batch, not by this share.
            size = ops.cast(ops.shape(labels)[0] * replicas, per_example.dtype)
            loss = ops.sum(per_example) / size
        gradients = tape.gradient(loss, values)
        if self.weight_decay:
            share = self.weight_decay / replicas
            gradients = [
                g + share * tf.cast(w, g.dtype) if decayed else g
                for g, w, decayed in zip(gradients, values, self._decayed, strict=True)
            ]
        self.optimizer.apply(gradients, variables)
        right = ops.argmax(logits, axis=-1) == ops.cast(labels, "int32")
        sums = [ops.sum(per_example), ops.sum(ops.cast(right, "float32")), ops.shape(labels)[0]]
        return tf.stack([tf.cast(s, tf.float64) for s in sums])


def evaluation_step(model, label_smoothing=0.0):
    """A function `(images, labels) -> (loss, predicted, in_top5)`, per example, in inference mode.

    `in_top5` tells whether the label is among the five highest logits (all, where K < 5).
    """

    @tf.function(reduce_retracing=True)
    def step(images, labels):
        logits = model(images, training=False)
        top5 = tf.math.in_top_k(labels, tf.cast(logits, tf.float32), k=min(5, logits.shape[-1]))
        loss = losses.cross_entropy(labels, logits, label_smoothing)
        return loss, ops.argmax(logits, axis=-1), top5

    return step


def inference(model):
    """A compiled `images -> output` in inference mode."""
    return tf.function(lambda images: model(images, training=False), reduce_retracing=True)


def set_determinism(deterministic: bool) -> None:
    """Makes TensorFlow's ops repeat bit for bit; cannot be undone in this process."""
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def use_full_float32() -> None:
    """Keeps float32 products at 24 bits on GPUs, where TensorFlow would round them to TF32.

    The switch is TensorFlow's and counts for the whole process; whitening needs it.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)


def is_tensorflow() -> bool:
    """Whether Keras runs on TensorFlow."""
    return keras.backend.backend() == "tensorflow"

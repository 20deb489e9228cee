"""What the training steps of all backends are made from."""

import keras
from keras import ops

from etfzoo.runtime import losses


class BaseStepper:
    """Training steps of a model, see `etfzoo.runtime.step_tf.Stepper` for the arithmetic.

    Args:
        model: the classifier, built under `strategy.scope()`.
        optimizer: a Keras optimizer, built under the same scope; or one in a
            keras.optimizers.LossScaleOptimizer.
        strategy: see `etfzoo.runtime.strategy.get_strategy`.
        weight_decay: L2 coefficient on the variables that `losses.decayed` names; 0 where the
            optimizer has a decay of its own.
        loss: a function `(labels, logits) -> losses [N]`, see `etfzoo.runtime.losses`. Gradients
            are of their mean over the global batch.
        decay_all: whether L2 counts for all trainable variables.
        jit_compile: whether XLA compiles the step; None is the backend's choice.
        average: an `etfzoo.runtime.averaging.WeightAverage` that follows the model; None is none.
        entropy_weight: factor on `losses.crowding` of the features, the layer of that name, among
            those of the global batch. It is added to the loss that is minimised, and as L2 not to
            the one that is told.
        clip_norm: largest norm of the gradient of all weights, over all replicas and before L2 is
            added: what torch's `clip_grad_norm_` does after `backward`. 0 is off.
        accumulate_steps: parts of a batch, of which a step takes one after the other, so that it
            keeps activations of one part only. Norms take the statistics of a part, and move their
            averages with each; `crowding` looks for neighbours in a part.

    Attributes:
        jit_compile: whether XLA compiles the step.
    """

    def __init__(
        self,
        model,
        optimizer,
        strategy,
        weight_decay=0.0,
        loss=losses.cross_entropy,
        decay_all=False,
        jit_compile=None,
        average=None,
        entropy_weight=0.0,
        clip_norm=0.0,
        accumulate_steps=1,
    ):
        self.model = model
        # What a step calls: it gives the features, too, where they count.
        self.network = model
        if entropy_weight:
            taps = [model.outputs[0], model.get_layer("features").output]
            self.network = keras.Model(model.inputs, taps)
        self.entropy_weight = entropy_weight
        self.optimizer = optimizer
        self.strategy = strategy
        self.weight_decay = weight_decay
        self.loss = loss
        self.average = average
        self.clip_norm = clip_norm
        self.accumulate_steps = accumulate_steps
        self._decayed = [losses.decayed(v, decay_all) for v in model.trainable_variables]
        self.jit_compile = self._compile(jit_compile)

    def _compile(self, jit_compile) -> bool:
        """Makes the step; returns whether XLA compiles it."""
        raise NotImplementedError

    def _clipped(self, gradients, of_all_replicas, scale):
        """Gradients, times what brings their norm down to `clip_norm`.

        Args:
            gradients: of a replica, times `scale`.
            of_all_replicas: their sums over the replicas.
            scale: what the loss was multiplied by.
        """
        parts = [g / ops.cast(scale, g.dtype) for g in of_all_replicas]
        norm = ops.sqrt(sum(ops.cast(ops.sum(ops.square(g)), parts[0].dtype) for g in parts))
        factor = ops.minimum(1.0, self.clip_norm / (norm + 1e-6))  # as torch has it
        return [g * ops.cast(factor, g.dtype) for g in gradients]


def part(values, number, count: int):
    """Every `count`-th of a batch from `number` on: of any number of replicas the same ones."""
    shape = (-1, count, *values.shape[1:])
    return ops.take(ops.reshape(values, shape), number, axis=1)

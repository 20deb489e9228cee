"""What the training steps of all backends are made from."""

import keras

from etfzoo.runtime import losses


class BaseStepper:
    """Training steps of a model, see `etfzoo.runtime.step_tf.Stepper` for the arithmetic.

    Args:
        model: the classifier, built under `strategy.scope()`.
        optimizer: a Keras optimizer without weight decay, built under the same scope; or one in a
            keras.optimizers.LossScaleOptimizer.
        strategy: see `etfzoo.runtime.strategy.get_strategy`.
        weight_decay: L2 coefficient on the variables that `losses.decayed` names.
        loss: a function `(labels, logits) -> losses [N]`, see `etfzoo.runtime.losses`. Gradients
            are of their mean over the global batch.
        decay_all: whether L2 counts for all trainable variables.
        jit_compile: whether XLA compiles the step; None is the backend's choice.
        average: an `etfzoo.runtime.averaging.WeightAverage` that follows the model; None is none.
        entropy_weight: factor on `losses.crowding` of the features, the layer of that name, among
            those of the global batch. It is added to the loss that is minimised, and as L2 not to
            the one that is told.

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
        self._decayed = [losses.decayed(v, decay_all) for v in model.trainable_variables]
        self.jit_compile = self._compile(jit_compile)

    def _compile(self, jit_compile) -> bool:
        """Makes the step; returns whether XLA compiles it."""
        raise NotImplementedError

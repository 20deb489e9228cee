"""The optimizer of a run: Keras's, with layer-wise rates and the decay of a run's own rule."""

import keras
from keras import ops

from etfzoo.models.parts import layer_rates
from etfzoo.runtime import losses
from etfzoo.training import schedules
from etfzoo.training.config import TrainConfig


def make_optimizer(config: TrainConfig, steps: int, model, strategy):
    """The optimizer of a configuration on its schedule, built for a model.

    SGD's weight decay is no part of it: L2 is added to the gradient, see
    `etfzoo.runtime.step_tf.Stepper`. AdamW and Lamb decay the variables that `losses.decayed` names
    by rate times coefficient before they move (Loshchilov and Hutter, "Decoupled weight decay
    regularization", ICLR 2019). Lamb's ratio of norms is of the update without decay, as Keras has
    it; You et al. ("Large batch optimization for deep learning", ICLR 2020) add the decay to it.

    Args:
        config: the run.
        steps: of an epoch.
        model: the classifier.
        strategy: see `etfzoo.runtime.strategy.get_strategy`.
    """
    # AdamW of Keras is its Adam with a decay whose rate would be that of all layers.
    kinds = {"adamw": keras.optimizers.Adam, "lamb": keras.optimizers.Lamb}
    kind = kinds.get(config.optimizer, keras.optimizers.SGD)
    sgd = config.optimizer == "sgd"
    options = {"momentum": config.momentum, "nesterov": config.nesterov} if sgd else {}
    rates = layer_rates(model, config.layer_decay) if config.layer_decay != 1 else None
    if rates or not sgd:
        kind = type(f"Layerwise{kind.__name__}", (Layerwise, kind), {})
    with strategy.scope():
        optimizer = kind(
            learning_rate=schedules.learning_rate(config, steps),
            name=config.optimizer,  # variable paths must not depend on what was built before
            **options,
        )
        if rates or not sgd:
            trained = model.trainable_variables
            decay = 0.0 if sgd else config.weight_decay
            optimizer.rates = rates or [1.0] * len(trained)
            optimizer.decays = [decay * losses.decayed(v, config.decay_all) for v in trained]
        if config.mixed_precision == "float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale")
        optimizer.build(model.trainable_variables)
    return optimizer


class Layerwise:
    """Before a keras.optimizers.Optimizer: each variable has a rate and a decay of its own.

    Attributes:
        rates: what the learning rate of each variable is multiplied by.
        decays: the coefficient of each variable's decoupled weight decay.
    """

    rates: list[float]
    decays: list[float]

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)  # type: ignore[attr-defined]
        rate = learning_rate * self.rates[index]
        if self.decays[index]:
            share = ops.cast(rate * self.decays[index], variable.dtype)
            self.assign_sub(variable, variable * share)  # type: ignore[attr-defined]
        super().update_step(gradient, variable, rate)  # type: ignore[misc]

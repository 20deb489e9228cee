"""Learning-rate schedules: from epochs to Keras schedules in steps."""

import keras

from etfzoo.training.config import TrainConfig


def learning_rate(config: TrainConfig, steps_per_epoch: int):
    """The schedule of a run, in steps.

    Args:
        config: its schedule, warm-up and peak, in epochs.
        steps_per_epoch: steps an epoch.

    Returns:
        A Keras LearningRateSchedule.
    """
    peak = config.peak_rate
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else peak,
            max(total - warmup, 1),
            warmup_target=peak if warmup else None,
            warmup_steps=warmup,
        )
    drops = [e for e in config.step_epochs if e < config.epochs]
    if config.schedule == "constant":
        drops = []
    values = [peak * config.step_factor**i for i in range(len(drops) + 1)]
    return WarmupSteps([e * steps_per_epoch for e in drops], values, warmup)


@keras.saving.register_keras_serializable(package="etfzoo")
class WarmupSteps(keras.optimizers.schedules.LearningRateSchedule):
    """Piecewise-constant rates after a linear warm-up."""

    def __init__(self, boundaries, values, warmup):
        self.boundaries, self.values, self.warmup = list(boundaries), list(values), warmup

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rate = keras.ops.convert_to_tensor(self.values[0], "float32")
        for boundary, value in zip(self.boundaries, self.values[1:], strict=True):
            rate = keras.ops.where(step < boundary, rate, value)
        if self.warmup:
            rate = rate * keras.ops.minimum(1.0, step / self.warmup)
        return rate

    def get_config(self):
        return {"boundaries": self.boundaries, "values": self.values, "warmup": self.warmup}

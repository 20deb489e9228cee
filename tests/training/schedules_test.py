"""Schedules against closed forms."""

import dataclasses

import keras
import numpy as np

from etfzoo.training import schedules
from etfzoo.training.config import TrainConfig


def _rates(config, steps):
    schedule = schedules.learning_rate(config, steps)
    return np.array([float(schedule(i)) for i in range(config.epochs * steps + 1)])


def test_schedules_against_closed_forms():
    base = TrainConfig("digits", learning_rate=0.4, epochs=10, warmup_epochs=2.0)
    t = np.arange(51)
    cosine = np.where(t < 10, 0.04 * t, 0.2 * (1 + np.cos(np.pi * (t - 10) / 40)))
    np.testing.assert_allclose(_rates(base, 5), cosine, atol=1e-6)
    plain = dataclasses.replace(base, warmup_epochs=0.0)
    np.testing.assert_allclose(_rates(plain, 5), 0.2 * (1 + np.cos(np.pi * t / 50)), atol=1e-6)
    step = dataclasses.replace(base, schedule="step", step_epochs=(3, 6, 90))
    drops = 0.4 * np.where(t < 15, 1, np.where(t < 30, 0.1, 0.01))
    np.testing.assert_allclose(_rates(step, 5), drops * np.minimum(1, t / 10), atol=1e-6)
    for rule, factor in (("linear", 0.25), ("sqrt", 0.5)):
        small = dataclasses.replace(plain, batch_size=64, learning_rate_scaling=rule)
        np.testing.assert_allclose(_rates(small, 5)[0], 0.4 * factor, rtol=1e-6)
    constant = dataclasses.replace(plain, schedule="constant")
    np.testing.assert_allclose(_rates(constant, 5), 0.4, atol=1e-7)


def test_momentum_differs_from_torchs_at_every_step_of_a_cosine():
    """Keras: v = m v - rate g, w += v; torch: v = m v + g, w -= rate v."""
    gradients = 1 + np.random.default_rng(0).normal(size=400).astype("float32")
    for schedule, same in (("cosine", False), ("constant", True)):
        config = TrainConfig("digits", learning_rate=0.1, epochs=400, schedule=schedule)
        rates = _rates(config, 1)[:400]
        weight = keras.Variable([0.0])
        optimizer = keras.optimizers.SGD(schedules.learning_rate(config, 1), momentum=0.9)
        found, velocity, torch = [0.0], 0.0, [0.0]
        for gradient, rate in zip(gradients, rates, strict=True):
            optimizer.apply([keras.ops.convert_to_tensor([gradient])], [weight])
            found.append(float(weight[0]))
            velocity = 0.9 * velocity + gradient
            torch.append(torch[-1] - rate * velocity)
        apart = np.abs(np.diff(found) - np.diff(torch)) > 1e-4  # of steps of 1; rounding: 2e-5
        assert not apart.any() if same else apart[10:].mean() > 0.95
        # Nine steps at the peak more, of a path of 400 at half the peak.
        longer = 0 if same else 9 / (400 / 2)
        np.testing.assert_allclose(found[-1] / torch[-1], 1 + longer, atol=2e-3)

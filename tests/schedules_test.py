"""Schedules against closed forms."""

import dataclasses

import numpy as np

from etfzoo import schedules
from etfzoo.config import TrainConfig


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

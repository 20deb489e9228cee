"""Training, evaluation and feature steps on the backend that Keras runs on."""

import keras

SUPPORTED = ("tensorflow", "jax")

if keras.backend.backend() == "jax":
    from etfzoo.runtime.step_jax import (
        Stepper,
        device_cache,
        device_memory,
        distribute,
        evaluation_step,
        feature_step,
        repeated,
        set_determinism,
        synchronize,
        use_full_float32,
    )
else:
    from etfzoo.runtime.step_tf import (  # type: ignore[assignment]  # the other has no base
        Stepper,
        device_cache,
        device_memory,
        distribute,
        evaluation_step,
        feature_step,
        repeated,
        set_determinism,
        synchronize,
        use_full_float32,
    )

__all__ = [
    "SUPPORTED",
    "Stepper",
    "device_cache",
    "device_memory",
    "distribute",
    "evaluation_step",
    "feature_step",
    "repeated",
    "set_determinism",
    "synchronize",
    "use_full_float32",
]

"""Names of what `etfzoo.runtime.strategy.get_strategy` opens, known without TensorFlow."""

STRATEGIES = ("auto", "one_device", "mirrored", "multiworker", "tpu")

"""What op determinism costs: the training step with it against without it.

  python benchmarks/determinism.py --rounds=3

Determinism cannot be switched off again in a process, so each measurement is a process of its own;
the two are interleaved and compared by CPU seconds, which a busy machine disturbs least.
"""

import argparse
import os
import subprocess
import sys
import time


def measure(deterministic: bool, steps: int) -> float:
    import keras
    import numpy as np
    import tensorflow as tf

    import etfzoo
    from etfzoo.runtime import step_tf

    step_tf.set_determinism(deterministic)
    keras.utils.set_random_seed(0)
    model = etfzoo.build_classifier("rn18", 100, input_shape=(32, 32, 3))
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    stepper = step_tf.Stepper(model, optimizer, tf.distribute.get_strategy(), 1e-4)
    rng = np.random.RandomState(0)
    images = tf.constant(rng.randint(256, size=(128, 32, 32, 3), dtype=np.uint8))
    labels = tf.constant(rng.randint(100, size=128), tf.int32)
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    for _ in range(5):
        stepper.train(batches).numpy()
    start = time.process_time()
    for _ in range(steps):
        stepper.train(batches).numpy()
    return (time.process_time() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--child", choices=["on", "off"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(measure(args.child == "on", args.steps))
        return
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    ratios = []
    for number in range(args.rounds):
        seconds = {}
        for mode in ("on", "off") if number % 2 else ("off", "on"):
            command = [sys.executable, __file__, f"--child={mode}", f"--steps={args.steps}"]
            out = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout
            seconds[mode] = float(out)
        ratios.append(seconds["on"] / seconds["off"])
        print(
            f"rn18, 32 px, batch 128: off {1e3 * seconds['off']:.0f} CPU ms a step, "
            f"on {1e3 * seconds['on']:.0f}, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {sorted(ratios)[len(ratios) // 2]:.3f}")


if __name__ == "__main__":
    main()

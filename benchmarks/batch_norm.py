"""What a training step of ResNet50 costs with fused batch norm and with Keras's.

  python benchmarks/batch_norm.py --rounds=5

Both networks have the same weights and live in one process. Times are CPU seconds on one thread,
medians over rounds in which they take turns: the ratio means something, the milliseconds do not.
The fastest step of each says more where other work runs on the machine, which only adds time.
The step is that of etfzoo's training: forward, backward, L2 and SGD with momentum.
"""

import argparse
import os
import re
import time

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

STEPS = ((224, 8), (64, 32))  # image size, batch size


def stepper(kind, size, batch, dtype):
    """`step()` of a ResNet50 with batch norms of that class, and the loss of its first step."""
    import keras
    import tensorflow as tf

    import etfzoo
    from etfzoo.runtime import step_tf

    keras.utils.set_random_seed(0)
    rng = np.random.RandomState(0)
    images = tf.constant(rng.randint(256, size=(batch, size, size, 3), dtype=np.uint8))
    labels = tf.constant(rng.randint(1000, size=batch), tf.int32)
    shape = (size, size, 3)
    model = etfzoo.build_classifier("rn50", 1000, "linear", input_shape=shape, dtype=dtype)
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    for layer in norms:
        layer.__class__ = kind
    assert len(norms) == 53
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)  # otherwise the second step is traced again
    train = step_tf.Stepper(model, optimizer, tf.distribute.get_strategy(), 1e-4).train
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    loss = train(batches).numpy()[0] / batch
    train(batches).numpy()
    return lambda: train(batches).numpy(), loss


def cpu_seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="Keras dtype policy")
    args = parser.parse_args()

    import keras
    import tensorflow as tf

    from etfzoo.layers import FusedBatchNormalization

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    with open("/proc/cpuinfo") as info:
        cpu = re.search(r"model name\s*: (.*)|$", info.read())[1]
    print(f"{cpu}, {os.cpu_count()} cores, TensorFlow {tf.__version__}, {args.dtype}", flush=True)
    kinds = FusedBatchNormalization, keras.layers.BatchNormalization
    for size, batch in STEPS:
        made = [stepper(kind, size, batch, args.dtype) for kind in kinds]
        steps, losses = zip(*made, strict=True)
        times = 1e3 * np.array([[cpu_seconds(step) for step in steps] for _ in range(args.rounds)])
        fused, plain = np.median(times, axis=0)
        ratios, fastest = times[:, 0] / times[:, 1], times.min(axis=0)
        print(
            f"rn50, {size} px, batch {batch}: fused {fused:.0f} CPU ms a step, Keras {plain:.0f}, "
            f"ratio {fused / plain:.3f} (rounds {ratios.min():.3f} to {ratios.max():.3f}); fastest "
            f"{fastest[0]:.0f} and {fastest[1]:.0f}, ratio {fastest[0] / fastest[1]:.3f}; "
            f"first losses {losses[0]:.5f} and {losses[1]:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

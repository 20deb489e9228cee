"""What a whole epoch of training costs beyond its steps.

  python benchmarks/epoch.py --data_dir=DIR --dataset=tiny_imagenet --image_size=64 --rounds=5

An epoch as recipes/pretrain.py runs it (reading, decoding, augmenting, progress, checkpoint, logs)
and as many bare steps on a batch in memory take turns in one process. Wall time, because the input
is there to be overlapped. With the evaluation, and without: a bare loop has none.
"""

import argparse
import contextlib
import os
import re
import tempfile
import time

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="shapes/source")
    parser.add_argument("--data_dir")
    parser.add_argument("--backbone", default="rn18")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--share", default="10%", help="of the train and of the test split")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    import tensorflow as tf

    from etfzoo.data.sources import resolve
    from etfzoo.runtime import backend
    from etfzoo.runtime.interruption import StopRequest
    from etfzoo.runtime.strategy import get_strategy
    from etfzoo.training import build, identity, loop
    from etfzoo.training.config import TrainConfig
    from etfzoo.workdir import Workdir

    source = resolve(args.dataset, args.data_dir)
    config = TrainConfig(
        args.dataset,
        args.data_dir,
        train_split=f"{source.split('train')}[:{args.share}]",
        eval_split=f"{source.split('test')}[:{args.share}]",
        backbone=args.backbone,
        image_size=args.image_size,
        batch_size=args.batch_size,
        epochs=args.rounds + 1,
    )
    strategy = get_strategy("one_device")
    model = build.make_model(config, source)
    pipeline = build.make_pipeline(config, source, model)
    batch = next(iter(pipeline.training(config.train_split, 0)))
    evaluating = 0.0

    class Timed(loop.Trainer):
        def _evaluate(self):
            nonlocal evaluating
            start = time.perf_counter()
            try:
                return super()._evaluate()
            finally:
                evaluating = time.perf_counter() - start

    with open("/proc/cpuinfo") as info:
        cpu = re.search(r"model name\s*: (.*)|$", info.read())[1]
    print(f"{cpu}, {os.cpu_count()} cores, TensorFlow {tf.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        known = identity.claim(config, folder, {})
        loss = build.make_loss(config, model.spec, pipeline.source)
        run = Timed(config, Workdir(folder), strategy, pipeline, model, loss, None, known)
        run.start, run.seconds = time.monotonic(), 0.0
        run.writer = tf.summary.create_noop_writer()
        bare = backend.repeated(strategy, *(x.numpy() for x in batch))
        rows = []
        with StopRequest() as stop:
            for _ in range(args.rounds + 1):
                start = time.perf_counter()
                with contextlib.redirect_stdout(nowhere):
                    run._epoch(stop)
                epoch = time.perf_counter() - start
                start = time.perf_counter()
                for _ in range(run.steps):
                    sums = run.stepper.train(bare)
                sums.numpy()
                rows.append((epoch, epoch - evaluating, time.perf_counter() - start))
    whole, training_only, steps = np.array(rows[1:]).T  # the first one compiles
    for name, seconds in (("without", training_only), ("with", whole)):
        ratios = seconds / steps
        print(
            f"{args.backbone}, {args.image_size} px, {run.steps} steps of {args.batch_size}: an "
            f"epoch {name} evaluation takes {np.median(seconds):.1f} s, the bare steps "
            f"{np.median(steps):.1f} s, ratio {np.median(ratios):.3f} "
            f"({ratios.min():.3f} to {ratios.max():.3f})"
        )


if __name__ == "__main__":
    main()

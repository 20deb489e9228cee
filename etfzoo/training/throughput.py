"""How many images a second a step trains on, a model answers, and an input pipeline delivers."""

import dataclasses
import itertools
import math
import resource
import sys
import time
import types
from collections.abc import Callable, Mapping

import numpy as np

from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.runtime import backend
from etfzoo.runtime.averaging import WeightAverage
from etfzoo.runtime.strategy import check_batch_size, get_strategy, num_workers
from etfzoo.training import build
from etfzoo.training.config import TrainConfig
from etfzoo.training.optimizers import make_optimizer

INPUT_BOUND = 0.1  # share of the step's rate that is lost to the input


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images a second.

    Attributes:
        median, lowest, highest: over the rounds.
        first_seconds: of the first call, with tracing and compilation.
    """

    median: float
    lowest: float
    highest: float
    first_seconds: float


def measure(
    works: Mapping[str, Callable], images: int, rounds: int = 3, seconds: float = 5.0
) -> dict[str, Rate]:
    """Times several pieces of work in turns, so that what else the machine does hits all of them.

    Args:
        works: by name, functions that start one unit of work and return something that NumPy can
            read, which waits for the device.
        images: of a unit.
        rounds: of all works.
        seconds: of each work in a round, roughly.
    """
    first, counts = {}, {}
    for name, work in works.items():
        first[name] = _seconds(work, 1)
        count = 1
        # What was prefetched comes at once: only a longer look tells the rate.
        while (took := _seconds(work, count)) < seconds / 2:
            count *= 2
        counts[name] = max(1, math.ceil(seconds / took * count))
    found = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(images * counts[name] / _seconds(work, counts[name]))
    return {
        name: Rate(float(np.median(rates)), min(rates), max(rates), first[name])
        for name, rates in found.items()
    }


def _seconds(work, count):
    start = time.perf_counter()
    for _ in range(count):
        result = work()
    np.asarray(result)
    return time.perf_counter() - start


def synthetic(
    config: TrainConfig, num_classes: int = 1000, rounds: int = 3, seconds: float = 5.0
) -> dict:
    """Training and inference on one batch of random pixels in memory.

    On a GPU with TensorFlow the batch is copied to it in each step, as in a run.

    Args:
        config: of the run; its data set is not opened.
        num_classes: K.
        rounds, seconds: see `measure`.

    Returns:
        `training` and `inference`, both a Rate; `peak_memory` in bytes, and `memory_of`, the
        `device` or, where a backend does not tell, the `process`; `jit_compile`, whether XLA
        compiled the training step.

    Raises:
        EtfzooError: no such device, several workers, or settings that do not go together.
    """
    strategy = _open(config)
    classes = types.SimpleNamespace(
        num_classes=num_classes,
        class_names=None,
        class_counts=lambda split: np.ones(num_classes, np.int64),
    )
    model = build.start_model(config, classes, strategy)
    optimizer = make_optimizer(config, 1000, model, strategy)
    loss = build.make_loss(config, model.spec, classes)
    stepper = build.make_stepper(config, model, optimizer, strategy, loss)
    evaluate = backend.evaluation_step(model, strategy=strategy)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, *model.spec.input_shape)
    images = rng.integers(256, size=shape, dtype=np.uint8)
    labels = rng.integers(num_classes, size=len(images)).astype(np.int32)
    batches = backend.repeated(strategy, images, labels)
    batch = next(batches)
    found = measure(
        {
            "training": lambda: stepper.train(batches),
            "inference": lambda: evaluate(*batch)[1],
        },
        config.batch_size,
        rounds,
        seconds,
    )
    memory, of = peak_memory(strategy)
    return found | {"peak_memory": memory, "memory_of": of, "jit_compile": stepper.jit_compile}


def profile(config: TrainConfig, rounds: int = 3, seconds: float = 5.0) -> dict[str, Rate]:
    """What a run waits for: its step, or its images.

    Args:
        config: the run; nothing is written.
        rounds, seconds: see `measure`.

    Returns:
        rates of `input` (the pipeline alone), `step` (on one batch in memory) and `training` (the
        step with its input, as in a run).

    Raises:
        EtfzooError: bad input, an image that cannot be decoded, or several workers.
    """
    strategy = _open(config)
    source = resolve(config.dataset, config.data_dir)
    model = build.start_model(config, source, strategy)
    pipeline = build.make_pipeline(config, source, model)
    optimizer = make_optimizer(config, 1000, model, strategy)
    average = WeightAverage(model, config.ema, strategy) if config.ema else None
    loss = build.make_loss(config, model.spec, pipeline.source)
    stepper = build.make_stepper(config, model, optimizer, strategy, loss, average)
    with pipeline.naming_corrupt_records(config.train_split, 0):
        return _profile(config, strategy, pipeline, stepper, rounds, seconds)


def _profile(config, strategy, pipeline, stepper, rounds, seconds):
    cache = backend.device_cache(pipeline, strategy) if config.cache == "device" else None

    def batches():
        if cache is not None:
            epochs = itertools.count()
            return itertools.chain.from_iterable(
                cache.training(config.train_split, e) for e in epochs
            )
        return iter(
            backend.distribute(
                strategy,
                lambda share: pipeline.training(config.train_split, 0, 0, share).repeat(),
            )
        )

    alone, together = batches(), batches()
    first = next(iter(pipeline.training(config.train_split, 0)))
    one = backend.repeated(strategy, *(x.numpy() for x in first))
    return measure(
        {
            "input": lambda: _corner(next(alone)),
            "step": lambda: stepper.train(one),
            "training": lambda: stepper.train(together),
        },
        config.batch_size,
        rounds,
        seconds,
    )


def verdict(rates: Mapping[str, Rate], cacheable: bool) -> str:
    """Whether a run is input-bound, and what to do then.

    What counts is the step with its input: input and step may share the processor.

    Args:
        rates: see `profile`.
        cacheable: whether the data could be kept on the device and is not yet.
    """
    ready, step, both = (rates[name].median for name in ("input", "step", "training"))
    lost = max(0.0, 1 - both / step)
    text = f"{100 * lost:.0f} % of the step's rate is lost to the input"
    if lost < INPUT_BOUND:
        return f"not input-bound: {text}, which alone is {ready / step:.1f} times as fast"
    if ready < step:
        text += f"; the step could take {step / ready:.1f} times what arrives"
    else:
        text += (
            f", although alone it is {ready / step:.1f} times as fast: they share the processor, "
            "or the way to the device"
        )
    text = f"input-bound: {text}\nGive the host more cores, or store smaller images."
    if cacheable:
        text += "\nData that fits on the device can stay there: KERAS_BACKEND=jax, `cache=device`."
    return text


def _open(config):
    """The strategy of what is measured, in one process.

    Every worker would choose its number of steps by its own clock, and wait for others' for ever.
    """
    strategy = get_strategy(config.strategy, config.tpu, config.num_virtual_devices)
    if num_workers(strategy) > 1:
        raise EtfzooError("measuring takes one process: leave out `strategy=multiworker`")
    check_batch_size(config.batch_size, strategy, config.accumulate_steps)
    return strategy


def _corner(batch):
    """Some pixel of a batch, which is there when the batch is."""
    images = batch[0]
    images = images.values[0] if hasattr(images, "values") else images  # of one replica
    return images[0, 0, 0]


def peak_memory(strategy) -> tuple[int, str]:
    """Peak memory in bytes of the first device, or of this process where that is not known."""
    found = backend.device_memory(strategy)
    if found:
        return found, "device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process"

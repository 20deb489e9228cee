"""How many images a second a step trains on, a model answers, and an input pipeline delivers."""

import dataclasses
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping

import keras
import numpy as np

from etfzoo import assembly, backend
from etfzoo.classifier import build_classifier
from etfzoo.config import TrainConfig
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.strategy import check_batch_size, get_strategy


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
    """Training and inference on one batch of random pixels that the device holds.

    Args:
        config: of the run; its data set is not opened.
        num_classes: K.
        rounds, seconds: see `measure`.

    Returns:
        `training` and `inference`, both a Rate; `peak_memory` in bytes, and `memory_of`, the
        `device` or, where a backend does not tell, the `process`.

    Raises:
        EtfzooError: no such device, or settings that do not go together.
    """
    strategy = get_strategy(config.strategy, config.tpu, config.num_virtual_devices)
    check_batch_size(config.batch_size, strategy)
    backend.set_determinism(config.deterministic)
    keras.utils.set_random_seed(config.seed)
    try:
        with strategy.scope():
            model = build_classifier(
                config.backbone,
                num_classes,
                config.head,
                config.norm,
                input_shape=(config.image_size, config.image_size, 3),
                dtype=assembly.policy(config),
            )
    except ValueError as error:  # no ETF of these sizes
        raise EtfzooError(str(error)) from error
    if strategy.num_replicas_in_sync > 1:
        backend.synchronize(model, config.synchronize_norms)
    optimizer = assembly.make_optimizer(config, 1000, model, strategy)
    stepper = assembly.make_stepper(config, model, optimizer, strategy)
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
    return found | {"peak_memory": memory, "memory_of": of}


def profile(config: TrainConfig, rounds: int = 3, seconds: float = 5.0) -> dict[str, Rate]:
    """What a run waits for: its step, or its images.

    Args:
        config: the run; nothing is written.
        rounds, seconds: see `measure`.

    Returns:
        rates of `input` (the pipeline alone), `step` (on one batch that the device holds) and
        `training` (the step with its input, as in a run).

    Raises:
        EtfzooError: bad input.
    """
    strategy = get_strategy(config.strategy, config.tpu, config.num_virtual_devices)
    check_batch_size(config.batch_size, strategy)
    backend.set_determinism(config.deterministic)
    source = resolve(config.dataset, config.data_dir)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        model = assembly.make_model(config, source)
    if strategy.num_replicas_in_sync > 1:
        backend.synchronize(model, config.synchronize_norms)
    # Broken images are a run's affair; here there is no workdir for their list.
    pipeline = assembly.make_pipeline(
        dataclasses.replace(config, skip_corrupt=False), source, model
    )
    cache = backend.device_cache(pipeline, strategy) if config.cache == "device" else None
    optimizer = assembly.make_optimizer(config, 1000, model, strategy)
    stepper = assembly.make_stepper(config, model, optimizer, strategy)

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

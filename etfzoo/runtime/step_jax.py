"""One training and one evaluation step on JAX, compiled once for all devices of a strategy."""

import itertools

import jax
import keras
import numpy as np
from jax import numpy as jnp
from keras import ops

from etfzoo.errors import EtfzooError
from etfzoo.runtime import losses
from etfzoo.runtime.stepper import BaseStepper, part
from etfzoo.runtime.strategy import get_strategy

_LARGE_VMEM = ("TPU v5 lite", "TPU v6 lite")  # chips with 128 MiB of vector memory
_deterministic = False  # see set_determinism


class Stepper(BaseStepper):
    """Training steps of a model; the arithmetic is that of `step_tf.Stepper`.

    The step is a pure function of weights, slots and batch. Its inputs are donated: new weights
    take the memory of the old ones. Between two calls the values are in the Keras variables.

    XLA compiles all that JAX computes, whatever `jit_compile` says.

    Raises:
        EtfzooError: a float64 model, which Keras would compute in float32.
    """

    def _compile(self, jit_compile):
        model, averages = self.model, []
        if self.average is not None:  # in the order of the model, of which layers may be frozen
            found = {v.path: v for v in self.average.model.variables}
            both = (*model.trainable_variables, *model.non_trainable_variables)
            averages = [found[v.path] for v in both]
        self._variables = (
            model.trainable_variables,
            model.non_trainable_variables,
            self.optimizer.variables,
            averages,
        )
        _check_float64(model)
        self._step = _compiled(self._pure_step, self.strategy, donate_argnums=0)
        return True

    def train(self, batches, steps=1, stop=False):
        """SGD steps on the next global batches of an iterator.

        Args:
            batches: iterator over what `distribute` returned.
            steps: number of steps.
            stop: this process's vote for stopping after these steps.

        Returns:
            JAX array `[4]`, float64 where JAX has it switched on, else float32: sum of losses,
            number right, number of examples, and the votes of all devices of all steps.
        """
        state = _values(self._variables, self.strategy)
        if self.strategy.num_workers > 1:  # each has its own vote
            stop = np.full(len(self.strategy.local_devices), stop)
            stop = self.strategy.place(stop, self.strategy.split)
        total = 0.0
        try:
            for _ in range(steps):
                batch = _placed(next(batches), self.strategy)
                state, sums = self._step(state, *batch, stop)
                total = total + sums
        finally:  # the old values are gone, also where a batch cannot be read
            for variable, value in zip(sum(self._variables, []), sum(state, []), strict=True):
                variable.assign(value)
        return total

    def compile_ahead(self, images_shape):
        """The step compiled for the strategy's devices, which need not be there; nothing is run.

        Args:
            images_shape: of a global batch of uint8 images.

        Returns:
            a `jax.stages.Compiled`, which tells what memory it takes.
        """

        def shaped(shape, dtype, sharding):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def shapes(variables):
            return [shaped(v.shape, v.value.dtype, self.strategy.replicated) for v in variables]

        state = tuple(shapes(variables) for variables in self._variables)
        images = shaped(images_shape, "uint8", self.strategy.split)
        labels = shaped(images_shape[:1], "int32", self.strategy.split)
        traced = self._step.trace(state, images, labels, False)
        return traced.lower(lowering_platforms=(self.strategy.devices[0].platform,)).compile()

    def _pure_step(self, state, images, labels, stop):
        trainable, others, slots, averages = state
        with keras.StatelessScope(zip(self.optimizer.variables, slots, strict=True)):
            scale = self.optimizer.scale_loss(1.0)

        if self.accumulate_steps == 1:
            parts = self._gradients(trainable, others, scale, images, labels)
        else:
            parts = self._accumulated(trainable, others, scale, images, labels)
        gradients, others, sums = parts
        if self.clip_norm:
            gradients = self._clipped(gradients, gradients, scale)
        if self.weight_decay:
            gradients = [
                g + ops.cast(scale * self.weight_decay, g.dtype) * ops.cast(w, g.dtype)
                if decayed
                else g
                for g, w, decayed in zip(gradients, trainable, self._decayed, strict=True)
            ]
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        if self.average is not None:
            with keras.StatelessScope(zip(self.optimizer.variables, slots, strict=True)):
                rate = self.average.rate(self.optimizer.iterations)
            averages = [
                a + ops.cast(rate, a.dtype) * (w - a)
                if jnp.issubdtype(a.dtype, jnp.floating)
                else a
                for a, w in zip(averages, [*trainable, *others], strict=True)
            ]
        state = list(trainable), list(others), list(slots), averages
        return state, jnp.stack([jnp.asarray(s, float) for s in (*sums, ops.sum(stop))])

    def _gradients(self, trainable, others, scale, images, labels):
        """Gradients, the other variables afterwards, and sums of losses, hits and examples."""

        def loss(trainable):
            outputs, updated = self.network.stateless_call(trainable, others, images, training=True)
            logits = outputs[0] if self.entropy_weight else outputs
            per_example = self.loss(labels, logits)
            minimised = per_example
            if self.entropy_weight:
                crowding = ops.cast(losses.crowding(outputs[1]), per_example.dtype)
                minimised = per_example + self.entropy_weight * crowding
            size = len(labels) * self.accumulate_steps
            return scale * (ops.sum(minimised) / size), (updated, logits, per_example)

        gradients, (others, logits, per_example) = jax.grad(loss, has_aux=True)(trainable)
        right = ops.argmax(logits, axis=-1) == losses.label_classes(labels)
        return gradients, others, [ops.sum(per_example), ops.sum(right), len(labels)]

    def _accumulated(self, trainable, others, scale, images, labels):
        """As `_gradients`, of the parts of a batch one after the other."""
        count = self.accumulate_steps

        def add(number, found):
            gradients, others, sums = found
            taken = part(images, number, count), part(labels, number, count)
            more, others, further = self._gradients(trainable, others, scale, *taken)
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
            return gradients, others, [a + b for a, b in zip(sums, further, strict=True)]

        nothing = [jnp.zeros_like(w) for w in trainable], others, [jnp.zeros(())] * 3
        return jax.lax.fori_loop(0, count, add, nothing)


def distribute(strategy, dataset_of):
    """The batches of a data set on the devices of a strategy, one ahead of the one in use.

    Args:
        strategy: an `etfzoo.runtime.strategy_jax.DataParallel`.
        dataset_of: `share -> tf.data.Dataset` of the batches of a share; called once, for that of
            this process, of which each batch is whole (see `Pipeline.evaluation`), so that one
            shape is compiled.

    Yields:
        tuples of JAX arrays.
    """
    ahead = None
    for batch in dataset_of(strategy.share).as_numpy_iterator():
        batch = _placed(batch, strategy)  # returns before the copy is done
        if ahead is not None:
            yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead


def repeated(strategy, *batch):
    """Endless batches on a strategy's devices, all equal.

    Args:
        strategy: an `etfzoo.runtime.strategy_jax.DataParallel`.
        *batch: arrays of a global batch, of which a process takes as much as its share.
    """
    size = len(batch[0]) // strategy.num_workers
    return itertools.repeat(_placed([values[:size] for values in batch], strategy))


def device_memory(strategy) -> int:
    """Peak bytes that JAX took of a strategy's first device; 0 where it does not tell, as a CPU."""
    return (strategy.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def device_cache(pipeline, strategy):
    """The batches of a pipeline made on the devices, see `etfzoo.runtime.device_cache`."""
    from etfzoo.runtime.device_cache import DeviceCache  # few runs need it

    return DeviceCache(pipeline, strategy)


def evaluation_step(model, label_smoothing=0.0, strategy=None):
    """`(images, labels) -> (labels, predicted, in_top5, loss, confidence)`, in inference mode.

    Each is an array over the examples of the global batch. `in_top5` tells whether the label is
    among the five highest logits (all, where K < 5), `confidence` is the probability of the
    predicted class. The loss is the cross-entropy, whatever the training's is.
    """

    def outcome(logits, labels):
        top5 = ops.in_top_k(labels, ops.cast(logits, "float32"), k=min(5, logits.shape[-1]))
        loss = losses.cross_entropy(labels, logits, label_smoothing)
        return labels, ops.argmax(logits, axis=-1), top5, loss, losses.confidence(logits)

    return _inference(model, strategy, outcome)


def feature_step(model, strategy=None):
    """A function `(images, labels) -> (labels, features)` over the examples of the global batch.

    Args:
        model: a Keras model from images to features `[B, p]`, run in inference mode.
        strategy: an `etfzoo.runtime.strategy_jax.DataParallel`; None is one device.
    """
    return _inference(
        model, strategy, lambda features, labels: (labels, ops.cast(features, "float32"))
    )


def _inference(model, strategy, outcome):
    strategy = strategy or get_strategy("one_device")
    variables = (model.trainable_variables, model.non_trainable_variables)
    _check_float64(model)

    def run(values, images, labels):
        outputs, _ = model.stateless_call(*values, images, training=False)
        return outcome(outputs, labels)

    run = _compiled(run, strategy)
    return lambda *batch: run(_values(variables, strategy), *_placed(batch, strategy))


def synchronize(model, value: bool) -> None:
    """Statistics over all devices; under JAX there are no others.

    Raises:
        EtfzooError: `value` is False.
    """
    if not value:
        raise EtfzooError(
            "under JAX norms take their statistics over all devices: leave out "
            "`synchronize_norms=False`"
        )


def set_determinism(deterministic: bool) -> None:
    """Whether the steps that are built from now on repeat bit for bit on GPUs too."""
    global _deterministic
    _deterministic = deterministic


def use_full_float32() -> None:
    """Keeps float32 products at 24 bits on GPUs and TPUs, where JAX would round their factors.

    The switch is JAX's and counts for the whole process; whitening needs it.
    """
    jax.config.update("jax_default_matmul_precision", "highest")


def _compiled(function, strategy, **options):
    """The function, compiled; its results are on all devices."""
    device = strategy.devices[0]
    if _deterministic and device.platform == "gpu":
        options["compiler_options"] = {"xla_gpu_deterministic_ops": True}
    if device.device_kind in _LARGE_VMEM:
        # With whitening, a copy of a ReLU's mask takes 19 MiB, and XLA stops at 16 unless told.
        options["compiler_options"] = {"xla_tpu_scoped_vmem_limit_kib": 32 * 1024}
    return jax.jit(function, out_shardings=strategy.replicated, **options)


def _values(variables, strategy):
    """Values of lists of Keras variables, on all devices."""
    strategy.settle(sum(variables, []))
    return tuple([strategy.place(v.value, strategy.replicated) for v in some] for some in variables)


def _placed(batch, strategy):
    """A batch of arrays or TensorFlow tensors, a process's share, split over all devices."""
    return tuple(strategy.place(values, strategy.split) for values in batch)


def _check_float64(model):
    # Keras on JAX rounds what it computes to float32, even where JAX has float64 switched on.
    exact = jax.config.jax_enable_x64 and keras.backend.result_type("float64") == "float64"
    if not exact and any(v.dtype == "float64" for v in model.variables):
        raise EtfzooError("a float64 model needs KERAS_BACKEND=tensorflow: Keras has none on JAX")

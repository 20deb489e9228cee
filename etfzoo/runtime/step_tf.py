"""One training and one evaluation step on TensorFlow, for any tf.distribute strategy."""

import keras
import tensorflow as tf
from keras import ops

from etfzoo.data.pipeline import InputShare
from etfzoo.data.source import reading
from etfzoo.errors import EtfzooError
from etfzoo.runtime import losses
from etfzoo.runtime.stepper import BaseStepper, part


class Stepper(BaseStepper):
    """Training and evaluation steps of a model; the part of training that knows the backend.

    The L2 term is added to the gradient before momentum, as torch's SGD does it, whose recipes the
    coefficients of the protocols are from (the paper names no framework); Keras's
    SGD(weight_decay=) is decoupled from momentum and, at momentum 0.9, ten times weaker for the
    same coefficient. Momentum is Keras's, with the rate of each gradient's own step inside the
    velocity: torch applies the present rate to all of it, so that here an update lags behind a
    changing rate, by momentum / (1 - momentum) steps on average.

    XLA compiles where it pays and is known to work, on one GPU, unless `jit_compile` says
    otherwise.

    Raises:
        EtfzooError: jit_compile with several replicas.
    """

    def _compile(self, jit_compile):
        several = self.strategy.num_replicas_in_sync > 1
        if jit_compile and several:
            # Batch norm's and the optimizer's reductions leave the replica, which XLA cannot.
            raise EtfzooError("jit_compile works with one replica only; leave it out")
        if jit_compile is None:
            jit_compile = not several and bool(tf.config.list_physical_devices("GPU"))
        steps = (self._replica_train, self._replica_part, self._replica_apply)
        if jit_compile:
            steps = (tf.function(step, jit_compile=True) for step in steps)
        self._whole_step, self._part_step, self._apply_step = steps
        self._train = tf.function(self._distributed_train, reduce_retracing=True)
        return bool(jit_compile)

    def train(self, batches, steps=1, stop=False):
        """SGD steps on the next global batches of an iterator.

        Args:
            batches: iterator over what `distribute` returned: images, with labels or targets as
                `etfzoo.runtime.losses` takes them.
            steps: number of steps, all in one call of the device.
            stop: this process's vote for stopping after these steps.

        Returns:
            float64 tensor `[4]`: sum of losses, number right (of a target the class with the
            largest share), number of examples, and the votes of all replicas of all steps.
        """
        return self._train(batches, tf.constant(stop), steps)

    def _distributed_train(self, batches, stop, steps):
        def one():
            if self.accumulate_steps == 1:
                sums = self.strategy.run(self._whole_step, (*next(batches), stop))
            else:
                sums = self._accumulated(*next(batches), stop)
            if self.average is not None:
                self.average.update(self.optimizer.iterations)
            return self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

        sums = one()
        if steps > 1:
            for _ in tf.range(steps - 1):
                sums += one()
        return sums

    def _accumulated(self, images, labels, stop):
        """A step whose gradient is the sum of those of the parts of a batch."""
        # A loop, so that the parts follow each other; outside of the replicas, as norms reduce.
        gradients, sums = self.strategy.run(self._part_step, (images, labels, stop, 0))
        for number in tf.range(1, self.accumulate_steps):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            further = self.strategy.run(self._part_step, (images, labels, stop, number))
            gradients, sums = self.strategy.run(_added, ((gradients, sums), further))
        self.strategy.run(self._apply_step, (gradients,))
        return sums

    def _replica_part(self, images, labels, stop, number):
        count = self.accumulate_steps
        return self._gradients(part(images, number, count), part(labels, number, count), stop)

    def _replica_train(self, images, labels, stop):
        gradients, sums = self._gradients(images, labels, stop)
        self._replica_apply(gradients)
        return sums

    def _gradients(self, images, labels, stop):
        replicas = self.strategy.num_replicas_in_sync
        values = [v.value for v in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = self.network(images, training=True)
            logits = outputs[0] if self.entropy_weight else outputs
            per_example = self.loss(labels, logits)
            minimised = per_example
            if self.entropy_weight:
                crowding = ops.cast(_crowding(outputs[1], replicas), per_example.dtype)
                minimised = per_example + self.entropy_weight * crowding
            # Gradients are summed over replicas: divide by the global batch, not by this share.
            shares = replicas * self.accumulate_steps
            size = ops.cast(ops.shape(labels)[0] * shares, per_example.dtype)
            loss = self.optimizer.scale_loss(ops.sum(minimised) / size)
        gradients = tape.gradient(loss, values)
        right = ops.argmax(logits, axis=-1) == ops.cast(losses.label_classes(labels), "int32")
        sums = [ops.sum(per_example), ops.sum(ops.cast(right, "float32")), ops.shape(labels)[0]]
        return gradients, tf.stack([tf.cast(s, tf.float64) for s in (*sums, stop)])

    def _replica_apply(self, gradients):
        replicas = self.strategy.num_replicas_in_sync
        variables = self.model.trainable_variables
        values = [v.value for v in variables]
        if self.clip_norm:
            whole = gradients
            if replicas > 1:
                context = tf.distribute.get_replica_context()
                whole = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            gradients = self._clipped(gradients, whole, self.optimizer.scale_loss(1.0))
        if self.weight_decay:
            share = self.optimizer.scale_loss(self.weight_decay / replicas)
            gradients = [
                g + tf.cast(share, g.dtype) * tf.cast(w, g.dtype) if decayed else g
                for g, w, decayed in zip(gradients, values, self._decayed, strict=True)
            ]
        self.optimizer.apply(gradients, variables)


def _added(one, other):
    return tf.nest.map_structure(tf.add, one, other)


def _crowding(features, replicas):
    """`losses.crowding` of a replica's features among those of all replicas."""
    if replicas == 1:
        return losses.crowding(features)
    context = tf.distribute.get_replica_context()
    # What is gathered has gradients: each replica gets those of all the others.
    others = _dense_gradient(context.all_gather(losses.unit_length(features), axis=0))
    first = context.replica_id_in_sync_group * ops.shape(features)[0]
    return losses.crowding(features, others, first)


@tf.custom_gradient
def _dense_gradient(values):
    """The values. Collectives take no gradient of some rows, as what takes rows has."""
    return tf.identity(values), tf.convert_to_tensor


def distribute(strategy, dataset_of):
    """A data set as a strategy takes it; its batches are copied to GPUs ahead of their step.

    Args:
        strategy: a tf.distribute strategy.
        dataset_of: `share -> tf.data.Dataset` of the batches of one replica; called once for each
            input pipeline, with None where there is one replica.
    """
    if strategy.num_replicas_in_sync == 1:
        gpus = tf.config.list_logical_devices("GPU")
        return ahead(dataset_of(None), gpus[0].name) if gpus else dataset_of(None)
    # By default tf.distribute copies what it distributes ahead, too.
    # Not experimental_distribute_dataset: its sharding decodes everything everywhere.
    return strategy.distribute_datasets_from_function(
        lambda context: dataset_of(
            InputShare(
                context.input_pipeline_id,
                context.num_input_pipelines,
                context.num_replicas_in_sync,
            )
        )
    )


def ahead(dataset: tf.data.Dataset, device: str) -> tf.data.Dataset:
    """Batches that are copied to a device while it computes the step before."""
    return dataset.apply(tf.data.experimental.prefetch_to_device(device, 2))


def repeated(strategy, *batch):
    """Endless batches on a strategy's devices, all equal: to each replica the same share of one.

    Args:
        strategy: a tf.distribute strategy.
        *batch: arrays of a global batch.
    """
    size = len(batch[0]) // strategy.num_replicas_in_sync
    share = tuple(tf.constant(values[:size]) for values in batch)
    data = tf.data.Dataset.from_tensors(share).repeat().with_options(reading())
    return iter(distribute(strategy, lambda _: data))


def device_memory(strategy) -> int:
    """Peak bytes that TensorFlow took of the first GPU; 0 where it computes elsewhere."""
    if not tf.config.list_logical_devices("GPU"):
        return 0
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def device_cache(pipeline, strategy):
    """Raises EtfzooError: batches are made on the device under JAX only."""
    raise EtfzooError("`cache=device` needs KERAS_BACKEND=jax; leave it out under TensorFlow")


def evaluation_step(model, label_smoothing=0.0, strategy=None):
    """`(images, labels) -> (labels, predicted, in_top5, loss, confidence)`, in inference mode.

    Each is a tensor over the examples of the global batch. `in_top5` tells whether the label is
    among the five highest logits (all, where K < 5), `confidence` is the probability of the
    predicted class. The loss is the cross-entropy, whatever the training's is.
    """
    strategy = strategy or tf.distribute.get_strategy()

    def replica(images, labels):
        logits = model(images, training=False)
        top5 = tf.math.in_top_k(labels, tf.cast(logits, tf.float32), k=min(5, logits.shape[-1]))
        loss = losses.cross_entropy(labels, logits, label_smoothing)
        return labels, ops.argmax(logits, axis=-1), top5, loss, losses.confidence(logits)

    if strategy.num_replicas_in_sync == 1:
        return tf.function(replica, reduce_retracing=True)

    def replica_table(images, labels):
        # One table of numbers of one kind, because each tensor that is gathered is a collective.
        return tf.stack([tf.cast(v, tf.float64) for v in replica(images, labels)], axis=1)

    @tf.function(reduce_retracing=True)
    def run(images, labels):
        return strategy.run(replica_table, (images, labels))

    def step(images, labels):
        table = strategy.gather(run(images, labels), axis=0)
        labels, predicted, top5, *numbers = tf.unstack(table, axis=1)
        return tf.cast(labels, tf.int32), tf.cast(predicted, tf.int32), top5 > 0, *numbers

    return step


def feature_step(model, strategy=None):
    """A function `(images, labels) -> (labels, features)` over the examples of the global batch.

    Args:
        model: a Keras model from images to features `[B, p]`, run in inference mode.
        strategy: a tf.distribute strategy; None is one device.
    """
    strategy = strategy or tf.distribute.get_strategy()

    def replica(images, labels):
        return labels, tf.cast(model(images, training=False), tf.float32)

    if strategy.num_replicas_in_sync == 1:
        return tf.function(replica, reduce_retracing=True)

    def replica_table(images, labels):
        # One tensor that is gathered is one collective; float32 holds labels up to 2^24.
        labels, features = replica(images, labels)
        return tf.concat([tf.cast(labels, tf.float32)[:, None], features], axis=1)

    @tf.function(reduce_retracing=True)
    def run(images, labels):
        return strategy.run(replica_table, (images, labels))

    def step(images, labels):
        table = strategy.gather(run(images, labels), axis=0)
        return tf.cast(table[:, 0], tf.int32), table[:, 1:]

    return step


def synchronize(model, value: bool) -> None:
    """Switches statistics over all replicas on or off in every layer that can; before tracing."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            synchronize(layer, value)
        elif hasattr(layer, "synchronized"):
            layer.synchronized = value


def set_determinism(deterministic: bool) -> None:
    """Makes TensorFlow's ops repeat bit for bit; cannot be undone in this process."""
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def use_full_float32() -> None:
    """Keeps float32 products at 24 bits on GPUs, where TensorFlow would round them to TF32.

    The switch is TensorFlow's and counts for the whole process; whitening needs it.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)

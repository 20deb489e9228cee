"""An exponential moving average of a model's weights (EMA)."""

from keras import ops

from etfzoo.models import weights
from etfzoo.models.classifier import ImageClassifier


class WeightAverage:
    """A second model that holds the average of a model's weights over the steps of training.

    After step t (from 1) the average moves by 1 - d_t towards the weights, with
    d_t = min(decay, (1 + t) / (10 + t)): without that warm-up the random weights of the start would
    count for most of a short training (Tan and Le, EfficientNet, 2019, do the same). All variables
    are averaged, the moving statistics of batch norm too, as in timm and torchvision.

    Args:
        model: the classifier that is trained, in the state where the average starts; built under
            `strategy.scope()`.
        decay: in 0..1.
        strategy: a tf.distribute strategy.

    Attributes:
        model: an ImageClassifier with the averaged weights.
    """

    def __init__(self, model, decay: float, strategy):
        self.decay = decay
        self.strategy = strategy
        with strategy.scope():
            self.model = ImageClassifier(model.spec)
        weights.assign(self.model.variables, weights.as_arrays(model.variables))
        trained = {v.path: v for v in model.variables}
        # Whole numbers, such as the state of dropout's draws, have no average.
        self._pairs = [(v, trained[v.path]) for v in self.model.variables if "float" in v.dtype]

    def rate(self, step):
        """1 - d_t, float32.

        Args:
            step: number of steps taken, this one included; where float16 overflowed, steps that
                were left out do not count.
        """
        return ops.maximum(1 - self.decay, 9 / (10 + ops.cast(step, "float32")))

    def update(self, step) -> None:
        """Moves the average on TensorFlow; to be called outside of replicas, in the step's graph.

        Args:
            step: see `rate`.
        """
        rate = self.rate(step)

        def move(average, weight):
            # In this form what does not change, such as a fixed ETF, stays as it is bit for bit.
            average.assign_add(ops.cast(rate, average.dtype) * (weight - average))

        for average, weight in self._pairs:
            args = (weight.value,)
            self.strategy.extended.update(average.value, move, args=args, group=False)

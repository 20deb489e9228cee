"""The parts of a run from its configuration: model, pipeline, optimizer and step."""

import dataclasses
import functools

import keras
import numpy as np

from etfzoo.data.augmentation import Augmentation
from etfzoo.data.long_tail import long_tailed
from etfzoo.data.mixing import Mixing
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.readable import readable
from etfzoo.data.source import Source
from etfzoo.errors import EtfzooError
from etfzoo.measure import classes
from etfzoo.models import initialization, weights
from etfzoo.models.classifier import ImageClassifier, build_classifier, with_fresh_head
from etfzoo.models.parts import freeze
from etfzoo.models.spec import HEAD_FIELDS
from etfzoo.runtime import backend, losses
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir
from etfzoo.zoo import verify
from etfzoo.zoo.load import read


def policy(config: TrainConfig) -> str:
    """The Keras dtype policy of a configuration."""
    return {"none": "float32"}.get(config.mixed_precision, f"mixed_{config.mixed_precision}")


def start_model(config: TrainConfig, source, strategy, pretrained=None) -> ImageClassifier:
    """The classifier that a run starts from, seeded and on the devices of a strategy.

    Called after the data set is there: preparing one draws random numbers too, but only once.

    Args:
        config, source, pretrained: see `make_model`.
        strategy: see `etfzoo.runtime.strategy.get_strategy`.
    """
    backend.set_determinism(config.deterministic)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        model = make_model(config, source, pretrained)
    if config.freeze:
        freeze(model, config.freeze)
    if strategy.num_replicas_in_sync > 1:
        backend.synchronize(model, config.synchronize_norms)
    return model


def make_model(config: TrainConfig, source: Source, pretrained=None) -> ImageClassifier:
    """The classifier that a configuration starts from.

    Args:
        config: the run.
        source: its data set, or what has its `num_classes` and `class_names`.
        pretrained: gives the StoredModel of `config.init`; None reads it.
    """
    size = config.image_size
    if config.norm == "sw":
        backend.use_full_float32()
    common: dict = {
        **{name: getattr(config, name) for name in HEAD_FIELDS},
        "seed": config.seed,
        "input_shape": (size, size, 3),
        "crop": config.crop,
        "class_names": source.class_names,
        "dtype": policy(config),
    }
    try:
        if config.init is not None:
            start = pretrained() if pretrained else read(config.init)
            if config.keep_head:
                return _with_its_head(start, source, config, common)
            return with_fresh_head(start, source.num_classes, config.head, **common)
        model = build_classifier(
            config.backbone,
            source.num_classes,
            config.head,
            config.norm,
            mean=config.mean,
            std=config.std,
            **common,
        )
    except EtfzooError:
        raise
    except ValueError as error:  # no ETF of these sizes
        raise EtfzooError(str(error)) from error
    initialization.initialize(model, config.initializer, config.zero_gamma, config.seed)
    return model


def _with_its_head(start, source, config, common) -> ImageClassifier:
    """A copy of the model with its head, whose classes come in the order of the data set."""
    order = classes.places(start.spec, source)
    if start.spec.head != config.head:
        raise EtfzooError(f"the head that is kept is {start.spec.head}, not {config.head}")
    kept = start.spec.projector_layers
    if config.projector_layers not in (0, kept):
        raise EtfzooError(
            f"the head that is kept has a projector of {kept} layers, not {config.projector_layers}"
        )
    moved = not np.array_equal(order, np.arange(start.spec.num_classes))
    if len(order) < start.spec.num_classes or (moved and config.head == "etf"):
        raise EtfzooError(
            f"the head can't be kept: {source.name} has "
            + (
                "the classes in another order, and those of an ETF are fixed"
                if len(order) == start.spec.num_classes
                else "some of the model's classes only"
            )
            + "; leave out `keep_head` for a fresh one"
        )
    if config.guided and not start.spec.guided:
        raise EtfzooError("the head that is kept is an ETF that stays as it is: leave out `guided`")
    kept = {name: common[name] for name in ("input_shape", "crop", "class_names", "dtype")}
    model = ImageClassifier(dataclasses.replace(start.spec, **kept, class_descriptions=None))
    arrays = dict(start.arrays)
    if moved:
        for path in ("logits/kernel", "logits/bias"):
            arrays[path] = arrays[path][..., order]
    verify.check_kernel(model, arrays, start.what)
    weights.assign(model.variables, arrays, start.what)
    return model


def run_source(config: TrainConfig, source: Source, workdir=None, chief: bool = True) -> Source:
    """The data set as a run sees it: without broken images, and its training split a long tail.

    Args:
        config, source, workdir, chief: see `make_pipeline`.
    """
    if config.skip_corrupt:
        source = readable(source, None if workdir is None else Workdir(workdir).corrupt, chief)
    return long_tailed(source, config.imbalance, config.train_split)


def make_pipeline(
    config: TrainConfig, source: Source, model, workdir=None, chief: bool = True
) -> Pipeline:
    """The pipeline of a configuration; checks that there is something to train on.

    Args:
        config: the run.
        source: its data set.
        model: gives image size and crop.
        workdir: where the list of corrupt images is kept, with `skip_corrupt`; None keeps none.
        chief: whether this process writes that list.
    """
    pipeline = Pipeline(
        run_source(config, source, workdir, chief),
        model.spec.input_shape[0],
        model.spec.input_shape[1],
        model.spec.crop,
        config.batch_size,
        Augmentation(
            config.augment,
            config.min_area,
            config.flip,
            config.rand_augment,
            config.antialias,
            config.random_erasing,
            model.spec.mean,
        ),
        config.seed,
        mixing(config),
    )
    size = pipeline.size(config.train_split)
    if size < config.batch_size:
        raise EtfzooError(
            f"the training split of {source.name} has {size} images, fewer than one batch; "
            f"pass `batch_size={max(1, size // 4)}` or less"
        )
    if pipeline.size(config.eval_split) == 0:
        raise EtfzooError(f"the evaluation split of {source.name} is empty")
    return pipeline


def mixing(config: TrainConfig) -> Mixing:
    """How the images of a configuration are mixed."""
    return Mixing(config.mixup, config.cutmix)


def make_loss(config: TrainConfig, spec, source):
    """The training loss of a configuration, a function `(labels, logits) -> losses [N]`.

    Args:
        config: the run.
        spec: of the model that is trained, see `ClassifierSpec`.
        source: its data set, or what has its `class_counts`; asked only where the loss takes
            them, and then for the whole split that is trained on.

    Raises:
        EtfzooError: not a weight for each class; dot regression, and a head whose logits are no
            cosines, or are their multiples by a factor that it would not train.
    """
    options: dict = {}
    if config.loss == "dot_regression":
        if spec.head != "etf" or not spec.feature_norm.endswith("l2") or spec.learn_scale:
            raise EtfzooError(
                "`loss=dot_regression` compares cosines: it takes an etf head with "
                "`feature_norm=l2` or `feature_norm=bn_l2`, and no `learn_scale`"
            )
        options["scale"] = spec.scale
    if config.label_smoothing:
        options["label_smoothing"] = config.label_smoothing
    if config.logit_adjustment or config.class_balance:
        counts = source.class_counts(config.train_split)
        if config.logit_adjustment:
            options["adjustment"] = losses.logit_adjustment(counts, config.logit_adjustment)
        if config.class_balance:
            options["class_weights"] = losses.balanced_weights(counts, config.class_balance)
    if config.class_weights:
        if len(config.class_weights) != spec.num_classes:
            raise EtfzooError(
                f"class_weights must be one for each of the {spec.num_classes} classes; got "
                f"{len(config.class_weights)}"
            )
        options["class_weights"] = np.array(config.class_weights)
    return functools.partial(losses.LOSSES[config.loss], **options)


def make_stepper(config: TrainConfig, model, optimizer, strategy, loss, average=None):
    """The training step of a configuration, see `etfzoo.runtime.step_tf.Stepper`.

    Args:
        config: the run.
        model, optimizer, strategy, average: see there.
        loss: see `make_loss`.
    """
    return backend.Stepper(
        model,
        optimizer,
        strategy,
        config.weight_decay if config.optimizer == "sgd" else 0.0,
        loss,
        config.decay_all,
        False if config.deterministic else config.jit_compile,
        average,
        config.entropy_weight,
        config.clip_norm,
        config.accumulate_steps,
    )

"""A published model, or that of a training run, as a trainable Keras model: `load`."""

import dataclasses

import keras

from etfzoo.errors import EtfzooError, first_line
from etfzoo.models import checkpoint, classifier, custom, weights
from etfzoo.models.classifier import ImageClassifier
from etfzoo.models.spec import HEAD_FIELDS
from etfzoo.models.weights import StoredModel
from etfzoo.progress import notify
from etfzoo.zoo import index, keras_weights, publish, verify
from etfzoo.zoo.handles import fetched, find, has_address
from etfzoo.zoo.metadata import read_metadata

AUTO = "auto"


def load(
    name_or_path,
    num_classes: int | None = None,
    head: str | None = AUTO,
    load_weights: bool = True,
    input_shape=None,
    dtype: str | None = None,
) -> ImageClassifier:
    """The published model of that name, folder or address, as a trainable Keras model.

    Called plainly, the result is bit-equal to the model that was published. Only arrays and JSON
    are read from the folder, after all its hashes were checked; nothing in it is executed.

    Args:
        name_or_path: a zoo name (see `etfzoo.list_models`), downloaded if it is not here; a path:
            a version folder, a model folder (its highest version is taken) or the workdir of a
            training run; or the `https://`, `gs://` or `hf://` address of a version folder. What
            holds `://` is an address, what holds a path separator or is an existing folder a path.
        num_classes: given, the head is a fresh one of that many classes.
        head: `"auto"` is the published head, or a fresh linear one with `num_classes`. `"etf"`
            and `"linear"` keep the published head where it is of that kind and `num_classes` is
            left out, and are fresh otherwise. None gives the pooled features. A projector stays
            with the published head, and a fresh one acts on the pooled features.
        load_weights: False gives the untrained network.
        input_shape: `(height, width, 3)` instead of the published one.
        dtype: Keras dtype policy instead of the published one, e.g. `"mixed_bfloat16"`.

    Returns:
        An ImageClassifier.

    Raises:
        EtfzooError: unknown name (with close matches), no published weights, a download that
            fails, a folder that holds no model or a damaged one.

    Examples:
        With the model that the example of `etfzoo.publish` wrote:

        >>> import etfzoo
        >>> etfzoo.load("models/rn18_etf.birds").output_shape
        (None, 7)
        >>> etfzoo.load("models/rn18_etf.birds", num_classes=37).spec.head
        'linear'
        >>> etfzoo.load("models/rn18_etf.birds", head=None).output_shape
        (None, 512)
    """
    source = find(name_or_path)
    if load_weights or has_address(source):  # with its files the spec is the exact one
        source = fetched(source)
    stored = _read(source, load_weights)
    target, fresh = _changed(stored.spec, source, num_classes, head, input_shape, dtype)
    if source.bare:
        _say(source, stored.spec)
    result = _build(target, source)
    if load_weights:
        if not fresh:
            verify.check_kernel(result, stored.arrays, stored.what)
        skip = classifier.is_head_variable if fresh else lambda path: False
        weights.assign(result.variables, stored.arrays, stored.what, skip)
    return result


def read(name_or_path) -> StoredModel:
    """What `load` builds a network of: the spec and the weights of a model.

    Args:
        name_or_path: as for `load`.

    Raises:
        EtfzooError: as `load`.
    """
    source = fetched(find(name_or_path))
    stored = _read(source)
    if source.bare:
        _say(source, stored.spec)
    return stored


def _read(source, load_weights=True) -> StoredModel:
    """The spec of a source, and its weights, which were checked; none without `load_weights`."""
    what = f"the weights of {source}"
    if source.is_keras:
        model = keras_weights.load(source.name, load_weights)
        return StoredModel(model.spec, weights.as_arrays(model.variables), what)
    if source.workdir is not None:
        if not load_weights:
            return StoredModel(checkpoint.read_spec(source.workdir), {}, what)
        return checkpoint.read_model(source.workdir)
    spec = source.spec()
    if not load_weights:
        return StoredModel(spec, {}, what)
    if source.folder is None:
        raise _not_published(source)
    arrays = publish.Weights(source.folder)
    _check_sizes(spec, arrays.shapes, source)
    verify.check_weights(arrays, what)
    return StoredModel(spec, arrays, what)


def _changed(spec, source, num_classes, head, input_shape, dtype):
    """The spec that is asked for, and whether its head is a fresh one."""
    changes = {}
    if input_shape is not None:
        changes["input_shape"] = input_shape
    if dtype is not None:
        try:
            changes["dtype"] = keras.dtype_policies.get(dtype).name
        except (TypeError, ValueError):
            raise EtfzooError(f"unknown dtype policy {dtype!r}, e.g. mixed_bfloat16") from None
    if head == AUTO:
        head = spec.head if num_classes is None else "linear"
    fresh = num_classes is not None or head != spec.head
    if head is None and num_classes is not None:
        raise EtfzooError("head=None gives features and takes no num_classes")
    if head is not None and num_classes is None and spec.num_classes is None:
        raise EtfzooError(f"{source} has no head: head={head!r} needs num_classes")
    if fresh:  # as in replace_head, nothing of the old head is taken over ...
        changes |= {"head": head} | HEAD_FIELDS
        if head is None or num_classes is not None:  # ... but for the classes, if they stay
            changes |= {"num_classes": num_classes}
            changes |= {"class_names": None, "class_descriptions": None}
    return dataclasses.replace(spec, **changes), fresh


def _build(spec, source):
    try:
        return ImageClassifier(spec)
    except (TypeError, ValueError) as e:  # values of the spec that Keras or a layer refuses
        raise EtfzooError(f"{source} cannot be built: {first_line(e)}") from e


def _check_sizes(spec, shapes, source):
    """Before a network is built that a wrong number makes too large for any memory."""
    kernel = shapes.get("logits/kernel")
    if spec.head is not None and kernel is not None and kernel[-1:] != (spec.num_classes,):
        raise EtfzooError(
            f"the weights of {source} do not fit the model: {kernel[-1:]} classes instead of "
            f"{spec.num_classes}"
        )
    if spec.network is not None:
        try:
            custom.check_shapes(spec.network, shapes)
        except EtfzooError as error:
            raise EtfzooError(f"the weights of {source} do not fit the model: {error}") from error
    if not spec.projector_layers or spec.projector_kind == "etf":  # which has no weights
        return
    units = shapes.get("projector1_dense/kernel", ())[-1:]
    if units != (spec.projector_width,):
        raise EtfzooError(
            f"the weights of {source} do not fit the model: {units} units in the projector instead "
            f"of {spec.projector_width}"
        )


def _not_published(source):
    return EtfzooError(
        f"{source.row.dataset} weights of {source.name} are not published; train them with "
        f"`{source.row.command}`, or pass load_weights=False for the untrained network"
    )


def _say(source, spec):
    """One line about what a name without a tag stands for."""
    height, width, _ = spec.input_shape
    parts = [f"{height or 'any'}x{width or 'any'} pixels"]
    parts.append("features" if spec.head is None else f"{spec.num_classes} classes")
    end = ""
    if source.folder is None:
        unpublished = f": {source.row.dataset} weights are not published"
        parts.append("untrained" + ("" if source.version else unpublished))
    else:
        metadata = read_metadata(source.folder)
        dataset = (metadata.get("provenance") or {}).get("dataset")
        if dataset:
            parts.insert(0, f"trained on {dataset}")
        top1 = (metadata.get("metrics") or {}).get("top1")
        if isinstance(top1, int | float):
            parts.append(f"top-1 {100 * top1:.1f} %")
        wanted = index.read().models.get(f"{source.bare}.in1k")
        if wanted and not wanted.versions and source.name != f"{source.bare}.in1k":
            end = f"; {wanted.dataset} weights are not published"
    version = f" version {source.version}" if source.version else ""
    where = f" ({source.folder})" if source.folder else ""
    notify("%s is %s%s%s: %s%s", source.bare, source.name, version, where, ", ".join(parts), end)

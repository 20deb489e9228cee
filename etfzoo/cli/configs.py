"""From flags to what the library takes, and what the commands print alike."""

import dataclasses
import hashlib
import os
import shlex
from pathlib import Path

import etfzoo
from etfzoo.cli.flags import FLAGS, as_flags, as_started
from etfzoo.data.datasets import DATASETS
from etfzoo.models.spec import HEAD_FIELDS, PROJECTOR_FIELDS
from etfzoo.training import protocols
from etfzoo.training.config import TrainConfig
from etfzoo.workdir import Workdir, folder_name


def open_strategy(settings):
    """The strategy of flags or of a TrainConfig; to be called before TensorFlow computes."""
    from etfzoo.runtime.strategy import best_here, get_strategy

    name = settings.strategy or "auto"
    if name == "auto":
        print(f"strategy: {best_here(settings.tpu)}", flush=True)
    return get_strategy(name, settings.tpu, settings.num_virtual_devices)


def open_source(name):
    """A data set by its name, without its broken images where --skip_corrupt says so."""
    from etfzoo.data.readable import readable
    from etfzoo.data.sources import resolve

    source = resolve(name, FLAGS.data_dir)
    return readable(source) if FLAGS.skip_corrupt else source


def print_profile(config):
    """Measures a run without writing anything, and says what it waits for."""
    from etfzoo.training import throughput

    print("measuring the input, the step and both; this takes a minute", flush=True)
    rates = throughput.profile(config, seconds=2)
    for name, says in (
        ("input", "images delivered, with nobody taking time for them"),
        ("step", "steps on one batch in memory"),
        ("training", "steps on delivered images, as in a run"),
    ):
        r = rates[name]
        print(f"  {r.median:9.1f} images/s ({r.lowest:.1f} to {r.highest:.1f}): {says}")
    cacheable = config.cache != "device" and not (
        config.rand_augment or config.mixup or config.cutmix
    )
    print(as_flags(throughput.verdict(rates, cacheable)))


def train_config(task, **known):
    """The TrainConfig that the flags describe.

    Args:
        task: `"pretrain"` or `"finetune"`: which half of the protocol.
        **known: fields that are not flags, or whose flag lists several values.
    """
    given = {
        field.name: FLAGS[field.name].value
        for field in dataclasses.fields(TrainConfig)
        if field.name in FLAGS and field.name not in known and FLAGS[field.name].value is not None
    }
    if FLAGS.config:
        given = {name: value for name, value in given.items() if FLAGS[name].present}
        return dataclasses.replace(TrainConfig.load(FLAGS.config), **(given | known))
    values = given | known
    row = DATASETS.get(values["dataset"])
    backbone = values.get("backbone", "rn50")
    defaults = protocols.settings(values["protocol"], task, backbone, row)
    return TrainConfig(**(defaults | values))


def finetune_config(handle, learning_rates=(), weight_decays=()):
    """The TrainConfig that the flags describe for fine-tuning a model.

    Args:
        handle: of the pretrained model; None where `--config` names it.
        learning_rates, weight_decays: candidates, of which the first is the config's own.
    """
    known = {}
    if handle:
        handle = os.path.abspath(handle) if os.path.exists(handle) else handle
        spec = etfzoo.spec(handle)
        known = {"init": handle, "backbone": spec.backbone, "norm": spec.norm}
        known |= {"mean": spec.mean, "std": spec.std}
        if "keep_head" in FLAGS and FLAGS["keep_head"].value and spec.head:
            known["head"] = spec.head
            fields = HEAD_FIELDS if spec.head == "etf" else PROJECTOR_FIELDS
            known |= {name: getattr(spec, name) for name in fields}
    known |= {"learning_rate": learning_rates[0]} if learning_rates else {}
    known |= {"weight_decay": weight_decays[0]} if weight_decays else {}
    return train_config("finetune", **known)


def print_assumed(config, task):
    """Says which settings the protocol's source leaves open, and what no setting tells."""
    assumed = protocols.assumed(config.protocol, task)
    if assumed:
        values = ", ".join(f"{name}={getattr(config, name)}" for name in assumed)
        print(f"assumed (not in the protocol's source): {values}", flush=True)
    for note in protocols.notes(config.protocol, task, config.norm):
        print(f"note: {as_flags(note)}", flush=True)


def print_next(command, **flags):
    """Suggests a command, quoted as a shell needs it; flags without a value are left out."""
    given = [f"--{name}={value}" for name, value in flags.items() if value]
    command = shlex.join(["python", f"recipes/{command}.py", *given])
    print(as_started(f"next: {command}"), flush=True)


def report_place(command, handle, *data) -> str:
    """Where the report of a command has its place unless a flag says where.

    Args:
        command: that makes it.
        handle: of the model; None of none.
        *data: names of what it is about: data set, splits.
    """
    parts = ["runs", command, folder_name("_".join(data))]
    if handle:
        parts.insert(2, model_label(handle))
    return os.path.join(*parts)


def model_label(handle) -> str:
    """A name that tells a model from all others, as part of a path.

    It is `<name>@<version>`. A folder's version has the start of its hash behind it; that of a
    workdir is the start of its run's id, which is drawn when the run begins.
    """
    from etfzoo.training import identity
    from etfzoo.zoo import manifest

    path = Path(handle).absolute()
    if Workdir(path).is_run:
        run = identity.run_of(path) or hashlib.sha256(os.fsencode(path)).hexdigest()
        return folder_name(f"{path.name}@{run[:8]}")
    found = etfzoo.info(handle)
    version = str(found["version"] or path.name)
    listing = Path(found["path"]) / manifest.NAME
    if path.exists() and listing.exists():  # there may be others of that name elsewhere
        version += f"-{manifest.sha256(listing)[:8]}"
    return folder_name(f"{found['name']}@{version}")


def image_arguments(arguments):
    """The images that the arguments of a recipe name: files, and folders of them.

    Raises:
        EtfzooError: none, or no such file.
    """
    from etfzoo.data.folders import image_files

    if not arguments:
        raise etfzoo.EtfzooError("say which images: files or folders, beside the flags")
    return image_files(arguments)


def print_predictions(paths, predictions):
    """A table of the likeliest classes of each image.

    Args:
        paths: of the images.
        predictions: for each image its pairs of a label and a score in 0..1, best first.
    """
    from etfzoo.experiments import html

    rows = [
        [_printable(path), *(f"{label} {100 * score:.1f} %" for label, score in classes)]
        for path, classes in zip(paths, predictions, strict=True)
    ]
    print(html.text_table([["image", *map(str, range(1, len(rows[0])))], *rows]), flush=True)


def _printable(path) -> str:
    """A path with a mark for each byte that is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")

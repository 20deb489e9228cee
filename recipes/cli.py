"""What the recipes share: flags of a training run, readable help, errors in one line."""

import importlib
import logging
import os
import sys
import tempfile

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, _ROOT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

try:
    from absl import app, flags
    from absl import logging as absl_logging

    import etfzoo
except ImportError as error:
    sys.exit(
        f"error: {error}. Run `make demo` once in {_ROOT}, then start recipes with .venv/bin/python"
    )

FLAGS = flags.FLAGS
_GROUPS: dict[str, list[str]] = {}


def _define(group, define, name, default, help_text, **kwargs):
    define(name, default, help_text, **kwargs)
    _GROUPS.setdefault(group, []).append(name)


def string(group, name, default, help_text):
    """Defines a string flag in a group of the help page."""
    _define(group, flags.DEFINE_string, name, default, help_text)


def numbers(group, name, default, help_text):
    """Defines a flag that takes one number or several, separated by commas."""
    _define(group, flags.DEFINE_list, name, default, help_text)


def strings(group, name, default, help_text):
    """Defines a flag that takes one name or several, separated by commas."""
    _define(group, flags.DEFINE_list, name, default, help_text)


def integer(group, name, default, help_text):
    """Defines a whole-number flag."""
    _define(group, flags.DEFINE_integer, name, default, help_text)


def real(group, name, default, help_text):
    """Defines a real-number flag."""
    _define(group, flags.DEFINE_float, name, default, help_text)


def boolean(group, name, default, help_text):
    """Defines a flag that is switched with --name or --noname."""
    _define(group, flags.DEFINE_bool, name, default, help_text)


def data_flags(dataset):
    """Which images, and where they are."""
    string(
        "Data",
        "dataset",
        dataset,
        "imagenet2012, imagenet_resized/64x64, tiny_imagenet (see recipes/prepare.py), cifar100, "
        "cifar10, stl10, svhn_cropped, oxford_iiit_pet, oxford_flowers102, dtd, the embedded "
        "shapes/source, shapes/textures, shapes/outlines and digits; any other TFDS name or "
        "prepared TFDS folder; or folder:PATH with one subfolder of images a class",
    )
    string("Data", "data_dir", None, "TFDS data directory (default: TFDS's own)")


def training_flags(protocol):
    """Flags with the names of TrainConfig's fields; unset ones come from the protocol."""
    string("Data", "augment", None, "resized_crop, shift or none (default: the protocol's)")
    real("Data", "min_area", None, "smallest share of the image in a resized crop")
    boolean(
        "Data",
        "antialias",
        None,
        "filter resized crops as evaluation does (default: yes)",
    )
    boolean("Data", "flip", None, "mirror half of the images (default: the data set's row)")
    boolean("Data", "skip_corrupt", None, "check every image first and leave out broken ones")
    integer("Data", "image_size", None, "height and width in pixels (default: the protocol's)")
    strings(
        "Data",
        "image_size_schedule",
        None,
        "size:epochs pairs for the start of a training, e.g. 32:10; the other epochs and "
        "evaluation are at image_size",
    )
    string(
        "Training",
        "protocol",
        protocol,
        "paper, paper_lowres, standard, strong, sw_official, small or quickstart: where unset "
        "flags take their values from",
    )
    integer("Training", "epochs", None, "passes over the training split")
    integer("Training", "batch_size", None, "images a step, over all devices")
    string(
        "Training",
        "learning_rate_scaling",
        None,
        "none, linear or sqrt: multiply the rate by batch_size / 256 or its root (default: none)",
    )
    string("Training", "schedule", None, "cosine, step or constant")
    real("Training", "warmup_epochs", None, "linear warm-up of the learning rate, in epochs")
    real("Training", "momentum", None, "of SGD")
    boolean("Training", "nesterov", None, "Nesterov's momentum")
    real("Training", "label_smoothing", None, "share of the target spread over all classes")
    real("Training", "mixup", None, "alpha of mixup, e.g. 0.2; 0 is off (default: the protocol's)")
    real("Training", "cutmix", None, "alpha of cutmix, e.g. 1; with mixup each takes half")
    real("Training", "rand_augment", None, "magnitude of RandAugment, 0 to 10; 0 is off")
    real(
        "Training",
        "ema",
        None,
        "decay of the average of the weights that is evaluated and kept, e.g. 0.9999; 0 is off",
    )
    boolean("Training", "decay_all", None, "L2 on biases, gamma, beta and logits of sw too")
    integer("Training", "seed", 0, "of weights, order, augmentation and the ETF")
    strategy_flags()
    boolean("Machine", "synchronize_norms", True, "norm statistics over all replicas")
    string(
        "Machine",
        "mixed_precision",
        None,
        "none, bfloat16 or float16 (with loss scaling; default: the protocol's, else none)",
    )
    string("Machine", "cache", "none", "device: decoded images live on the device (JAX); or none")
    integer("Machine", "steps_per_execution", 1, "steps between two looks at signals and the clock")
    boolean(
        "Machine", "jit_compile", None, "compile with XLA (default: one GPU, --nodeterministic)"
    )
    boolean("Machine", "deterministic", True, "repeat bit for bit (slower on some devices)")
    integer("Training", "eval_every", 1, "epochs between evaluations")
    integer("Training", "neural_collapse_every", 0, "epochs between collapse measures; 0 is never")
    integer("Machine", "checkpoint_every", 500, "steps between checkpoints")
    integer("Machine", "keep_checkpoints", 2, "latest checkpoints that are kept")
    string("Files", "workdir", None, "directory of this run (default: one below runs/)")
    string("Files", "config", None, "config.json of an earlier run to repeat; flags override it")


def strategy_flags():
    """Where to compute."""
    string("Machine", "strategy", "auto", "auto, one_device, mirrored, multiworker or tpu")
    string("Machine", "tpu", None, "TPU name or address; local for the one in this machine")
    integer("Machine", "num_virtual_devices", None, "CPU devices for --strategy=mirrored")


def feature_cache_flag():
    """Where features of frozen networks are kept."""
    string(
        "Files",
        "feature_cache",
        "runs/features",
        "directory of features by hash of weights, images and preprocessing; empty keeps none",
    )


def open_strategy(settings):
    """The strategy of flags or of a TrainConfig; to be called before TensorFlow computes."""
    from etfzoo.strategy import best_here, get_strategy

    if settings.strategy == "auto":
        print(f"strategy: {best_here(settings.tpu)}", flush=True)
    return get_strategy(settings.strategy, settings.tpu, settings.num_virtual_devices)


def profile_flag():
    """Whether a run is measured and not made."""
    boolean(
        "Machine",
        "profile",
        False,
        "only measure what the run would wait for: step or images",
    )


def print_profile(config):
    """Measures a run without writing anything, and says what it waits for."""
    from etfzoo import throughput

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
    print(throughput.verdict(rates, cacheable))


def train_config(task, **known):
    """The TrainConfig that the flags describe.

    Args:
        task: `"pretrain"` or `"finetune"`: which half of the protocol.
        **known: fields that are not flags, or whose flag lists several values.
    """
    import dataclasses

    from etfzoo import protocols
    from etfzoo.config import TrainConfig
    from etfzoo.data.datasets import DATASETS

    given = {
        f.name: FLAGS[f.name].value
        for f in dataclasses.fields(TrainConfig)
        if f.name in FLAGS and not isinstance(FLAGS[f.name].value, list | None)
    }
    if FLAGS.image_size_schedule is not None:
        known["image_size_schedule"] = _size_schedule(FLAGS.image_size_schedule)
    if FLAGS.config:
        given = {name: value for name, value in given.items() if FLAGS[name].present}
        return dataclasses.replace(TrainConfig.load(FLAGS.config), **(given | known))
    values = given | known
    row = DATASETS.get(values["dataset"])
    backbone = values.get("backbone", "rn50")
    defaults = protocols.settings(values["protocol"], task, backbone, row)
    return TrainConfig(**(defaults | values))


def _size_schedule(texts) -> list[tuple[int, int]]:
    try:
        return [(int(size), int(epochs)) for size, epochs in (t.split(":") for t in texts if t)]
    except ValueError as error:
        raise etfzoo.EtfzooError(
            f"--image_size_schedule is size:epochs, several separated by commas; got {texts}"
        ) from error


def finetune_config(handle, learning_rates=(), weight_decays=()):
    """The TrainConfig that the flags describe for fine-tuning a model.

    Args:
        handle: of the pretrained model; None where `--config` names it.
        learning_rates, weight_decays: candidates, of which the first is the config's own.
    """
    known = {}
    if handle:
        open_strategy(FLAGS)  # loading computes
        handle = os.path.abspath(handle) if os.path.exists(handle) else handle
        spec = etfzoo.load(handle).spec
        known = {"init": handle, "backbone": spec.backbone, "norm": spec.norm}
        known |= {"mean": spec.mean, "std": spec.std}
    known |= {"learning_rate": learning_rates[0]} if learning_rates else {}
    known |= {"weight_decay": weight_decays[0]} if weight_decays else {}
    return train_config("finetune", **known)


def print_assumed(config, task):
    """Says which settings the protocol's source leaves open, and what no setting tells."""
    from etfzoo import protocols

    assumed = protocols.assumed(config.protocol, task)
    if assumed:
        values = ", ".join(f"{name}={getattr(config, name)}" for name in assumed)
        print(f"assumed (not in the protocol's source): {values}", flush=True)
    for note in protocols.notes(config.protocol, task, config.norm):
        print(f"note: {note}", flush=True)


def data_dir_flag(config) -> str:
    """The `--data_dir` of a run, as it belongs into a suggested next command."""
    return f" --data_dir={config.data_dir}" if config.data_dir else ""


def parse_numbers(name, texts=None) -> list[float]:
    """Values of a `numbers` flag.

    Args:
        name: of the flag.
        texts: to be read in place of the flag's own.

    Raises:
        EtfzooError: one of them is not a number.
    """
    try:
        return [float(text) for text in (FLAGS[name].value if texts is None else texts)]
    except ValueError as error:
        raise etfzoo.EtfzooError(f"--{name} takes numbers separated by commas: {error}") from error


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
    from etfzoo import report

    rows = [
        [str(path), *(f"{label} {100 * score:.1f} %" for label, score in classes)]
        for path, classes in zip(paths, predictions, strict=True)
    ]
    print(report.text_table([["image", *map(str, range(1, len(rows[0])))], *rows]), flush=True)


def run(main, doc, arguments=False, extra="jax"):
    """Parses the flags and runs a recipe; bad input ends it with one line and exit code 2.

    Args:
        main: the recipe.
        doc: what `--help` prints above the flags.
        arguments: whether `main` takes a list of what is written beside the flags.
        extra: of setup.py, that brings the JAX which the recipe needs.
    """

    def guarded(argv):
        if len(argv) > 1 and not arguments:
            _fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger("etfzoo")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        # TFDS and TensorFlow warn about each other's deprecations; no user can act on these.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        absl_logging.set_verbosity(absl_logging.ERROR)
        if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
            _import_backend(os.environ["KERAS_BACKEND"], extra)
        _import_tensorflow()
        try:
            main(argv[1:]) if arguments else main()
        except etfzoo.EtfzooError as error:
            _fail(error)
        except KeyboardInterrupt:
            sys.exit(130)

    def parse(argv):
        if {"--help", "-h", "-help", "--helpshort"} & set(argv):
            _print_help(doc)
            sys.exit(0)
        try:
            return FLAGS(argv)
        except flags.Error as error:
            _fail(f"{error}; --help lists the flags")

    app.run(guarded, flags_parser=parse)


def _import_tensorflow():
    # TensorFlow writes notices straight to file descriptor 2 while it loads; hold them back, and
    # show them only when loading fails.
    with tempfile.TemporaryFile() as notices:
        saved = os.dup(2)
        os.dup2(notices.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
            loaded = True
        except ImportError:
            loaded = False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        if not loaded:
            notices.seek(0)
            sys.stderr.write(notices.read().decode(errors="replace"))
            importlib.import_module("tensorflow")


def _import_backend(name, extra):
    try:
        importlib.import_module("keras")
    except (ImportError, ValueError) as error:
        hint = f"pip install 'etfzoo[{extra}]'" if name == "jax" else "tensorflow and jax can train"
        _fail(f"KERAS_BACKEND={name} cannot be used: {error}; {hint}")


def _fail(error):
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def _print_help(doc):
    print(doc.strip())
    for group, names in _GROUPS.items():
        print(f"\n{group}:")
        for name in names:
            flag = FLAGS[name]
            default = "" if flag.default is None else f" (default: {flag.default_as_str})"
            print(f"  --{name}: {flag.help.strip()}{default.replace(chr(39), '')}")

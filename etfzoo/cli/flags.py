"""Flags of the commands, in groups of the help page."""

from absl import flags

FLAGS = flags.FLAGS
GROUPS: dict[str, list[str]] = {}


def _define(group, define, name, default, help_text, **kwargs):
    define(name, default, help_text, **kwargs)
    GROUPS.setdefault(group, []).append(name)


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


def profile_flag():
    """Whether a run is measured and not made."""
    boolean(
        "Machine",
        "profile",
        False,
        "only measure what the run would wait for: step or images",
    )

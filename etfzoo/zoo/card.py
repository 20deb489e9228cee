"""The model card of a published version: what is known about it, and nothing else."""

from pathlib import Path

from etfzoo import files
from etfzoo.errors import printable

NAME = "README.md"
UNKNOWN = "unknown"


def text(name: str, version: int, metadata: dict) -> str:
    """The card as Markdown. What is not recorded is said to be unknown.

    Args:
        name: full name of the model.
        version: its number.
        metadata: see `etfzoo.zoo.metadata.read_metadata`; of `provenance` it shows `command`,
            `dataset` and its `title`, `init`, `epochs`, `seed`, `hardware`, `seconds` (of
            training), `licences` (terms by data set), `intended_use`, `limits` and, of its
            `config`, `imbalance`.
    """
    spec, made = metadata["spec"], metadata.get("provenance") or {}
    height, width, _ = spec.input_shape
    size = "any size" if height is None or width is None else f"{height} x {width} pixels"
    if spec.head is None:
        head = "no head: pooled features"
    elif spec.head == "etf":
        turned = ", turned to the class means" if spec.guided else ""
        head = f"fixed ETF head{turned}, {spec.num_classes} classes"
    else:
        head = f"trainable linear head, {spec.num_classes} classes"
    if spec.projector_layers:
        layers = f"{spec.projector_layers} hidden layer{'s' * (spec.projector_layers > 1)}"
        frozen = "frozen ETF " if spec.projector_kind == "etf" else ""
        head = f"{frozen}projector ({layers} of {spec.projector_width} units), {head}"
    norm = "switchable whitening" if spec.norm == "sw" else "batch norm"
    command, dataset, title = (made.get(name) for name in ("command", "dataset", "title"))
    trained_on = f"{dataset}: {title}" if dataset and title else dataset
    terms = [f"{data}: {licence}" for data, licence in (made.get("licences") or {}).items()]
    rows = [
        ("Network", f"{spec.backbone} ({norm}), {head}, RGB images of {size}"),
        ("Trained on", f"{trained_on}{_tail(made)}" if trained_on else None),
        ("Started from", made.get("init") or ("random weights" if "init" in made else None)),
        ("Command", f"`{command}`" if command else None),
        ("Epochs", made.get("epochs")),
        ("Seed", made.get("seed")),
        ("Hardware", made.get("hardware")),
        ("Training time", _duration(made.get("seconds"))),
        ("Made", metadata.get("created")),
        ("Licence of the weights", metadata.get("licence")),
    ]
    rows += [("Terms of the training images", "; ".join(terms))] if terms else []
    lines = [f"# {name}, version {version}", "", "| | |", "|---|---|"]
    lines += [f"| {title} | {_cell(value)} |" for title, value in rows]
    lines += ["", "## Accuracy", "", *_accuracy(metadata.get("metrics") or {})]
    like = f"those of {dataset}" if dataset else "those it was trained on"
    good = [
        f"A start for fine-tuning on other images of about {size}, by all weights or by its "
        "features alone."
    ]
    bad = ["Data and uses that it was not evaluated on; above is all that it was evaluated on."]
    if spec.head is not None:
        good.insert(0, f"Telling its {spec.num_classes} classes apart on images like {like}.")
        bad.insert(0, "Images that show none of its classes: it gives one of them to any image.")
    top1 = (metadata.get("metrics") or {}).get("top1")
    if isinstance(top1, int | float):
        bad.append(f"What must be right: of 100 images {100 * (1 - top1):.0f} get a wrong class.")
    use = made.get("intended_use") or "\n".join(f"- {line}" for line in good)
    limits = made.get("limits") or "\n".join(f"- {line}" for line in bad)
    lines += ["", "## Good for", "", use, "", "## Not good for", "", limits]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import etfzoo",
        "",
        f'model = etfzoo.load("{name}@{version}")   # or the path or address of this folder',
        'logits = model(etfzoo.preprocess(model, "image.jpg"))',
    ]
    if spec.head is not None:
        lines += ["etfzoo.decode_predictions(model, logits)"]
    lines += [
        "```",
        "",
        "The folder is a TensorFlow SavedModel: TF Serving reads its parent as `model_base_path`.",
    ]
    return "\n".join(lines) + "\n"


def read(folder) -> str | None:
    """The card of a version folder, None where it has none."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    return printable(files.read_bytes(path, files.MAX_DOCUMENT).decode("utf-8", errors="replace"))


def _accuracy(metrics):
    names = {"top1": "Top-1", "top5": "Top-5", "mean_per_class": "Mean per class"}
    lines = [
        f"- {title}: {100 * metrics[key]:.2f} %"
        for key, title in names.items()
        if isinstance(metrics.get(key), int | float)
    ]
    if not lines:
        return [f"{UNKNOWN.capitalize()}."]
    on = f"On {metrics.get('examples', f'an {UNKNOWN} number of')} images"
    return [f"{on} of the {metrics.get('split', UNKNOWN)} split:", "", *lines]


def _tail(made):
    """That what was trained on is a long tail of the data set."""
    config = made.get("config")
    imbalance = config.get("imbalance", 1) if isinstance(config, dict) else 1
    if not isinstance(imbalance, int | float) or imbalance == 1:
        return ""
    return (
        f"; of its training images a long tail, {imbalance:g} times as many of the largest class "
        "as of the smallest"
    )


def _duration(seconds):
    if not isinstance(seconds, int | float):
        return None
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if seconds >= 3600 else f"{seconds:.0f} s"


def _cell(value):
    if value is None or value == "":
        return UNKNOWN
    return str(value).replace("|", "\\|").replace("\n", " ")

"""What the workdirs of a sweep (backbones x methods x targets x seeds) hold, as rows."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from etfzoo import files
from etfzoo.data.datasets import DATASETS, Dataset
from etfzoo.errors import EtfzooError, unknown
from etfzoo.experiments.methods import TABLES
from etfzoo.runtime import hardware
from etfzoo.workdir import Workdir, folder_name

METRICS = {"top1": "top-1", "mean_per_class": "mean per-class"}
MODES = {
    "source": "pretraining",
    "full": "full fine-tuning",
    "linear_probe": "linear probe",
    "knn": "k-NN",
    "evaluate": "evaluation",
}
TRAINED = ("source", "full")  # modes that train a network
_PLAN = {
    "source": str, "backbones": list, "methods": list, "targets": list, "seeds": list,
    "modes": list, "protocol": str,
}  # fmt: skip
# What the plan of an older version does not tell.
_DEFAULTS = {"table": "table1", "imbalances": [1.0], "ood_datasets": []}
# Figures that not every cell has.
_MEASURES = ("nc/", "shots/", "ood/", "ece")


def read_plan(root) -> dict:
    """The arguments of a sweep, from its `sweep.json`.

    Raises:
        EtfzooError: no such file, or one that is not of a sweep.
    """
    path = Path(root) / "sweep.json"
    plan = files.read_json(path)
    for name, kind in _PLAN.items():
        if not isinstance(plan, dict) or not isinstance(plan.get(name), kind):
            raise EtfzooError(f"{path} is not of a sweep: it has no {kind.__name__} {name!r}")
    for mode in plan["modes"]:
        if mode not in MODES:
            raise EtfzooError(f"{path}: unknown mode {mode!r}; known: {', '.join(MODES)}")
    plan = _DEFAULTS | plan
    if plan["table"] not in TABLES:
        raise unknown(f"table in {path}", str(plan["table"]), TABLES)
    return plan


def planned(plan) -> Iterator[tuple[dict, str]]:
    """Every cell of a sweep: what tells it from the others, see `place`; and its workdir."""
    modes = [mode for mode in plan["modes"] if mode != "source"]
    cells = [(plan["source"], "source")]
    cells += [(plan["source"], "evaluate")] if plan["table"] != "table1" else []
    cells += [(target, mode) for target in plan["targets"] for mode in modes]
    for dataset, mode in cells:
        for backbone, imbalance in itertools.product(plan["backbones"], plan["imbalances"]):
            for method, seed in itertools.product(plan["methods"], plan["seeds"]):
                cell = {"backbone": backbone, "imbalance": imbalance, "method": method}
                cell |= {"seed": seed, "dataset": dataset, "mode": mode}
                yield cell, place(**cell)


def place(backbone, imbalance, method, seed, dataset, mode) -> str:
    """The workdir of a cell below the sweep's directory.

    Args:
        backbone, imbalance, method, seed: of the pretraining.
        dataset: the source, or what it is transferred to.
        mode: a key of `MODES`.
    """
    tail = "" if imbalance == 1 else f"_im{imbalance:.12g}"
    name = f"{backbone}_{method}{tail}_s{seed}"
    return f"source/{name}" if mode == "source" else f"{folder_name(dataset)}/{name}/{mode}"


def series(plan) -> dict[str, dict]:
    """What stands in one table: by its name the backbone and imbalance."""
    pairs = itertools.product(plan["backbones"], plan["imbalances"])
    found = [{"backbone": backbone, "imbalance": imbalance} for backbone, imbalance in pairs]
    return {series_name(known): known for known in found}


def series_name(row) -> str:
    """The backbone, and the imbalance if there is one."""
    tail = "" if row["imbalance"] == 1 else f", imbalance {row['imbalance']:.12g}"
    return row["backbone"] + tail


def rows(root) -> list[dict]:
    """One row for each finished cell of a sweep, in the order of `planned`.

    Args:
        root: the sweep's directory, with `sweep.json`.

    Returns:
        rows of `backbone`, `imbalance`, `method`, `seed`, `dataset`, `mode` (a key of `MODES`),
        `top1` and `mean_per_class` (shares of 1), `examples` (test images), `learning_rate` and
        `weight_decay` (as picked) and `epochs` of what was trained, `C` of probes, `k` of k-NN,
        `image_size`, `protocol`, `seconds` (of the run itself), `search_seconds` (of the candidates
        for the learning rate), `workdir` (below `root`), the collapse measures
        `nc/<split>/<measure>` and what `etfzoo.training.evaluation.evaluate` gives. What a cell
        does not have is None; these measures are left out.

    Raises:
        EtfzooError: no sweep there, or a file of a finished cell is missing or damaged.
    """
    root = Path(root)
    return [
        cell | _row(root, workdir, cell["mode"] in TRAINED)
        for cell, workdir in planned(read_plan(root))
        if Workdir(root / workdir).finished
    ]


def _row(root, workdir, trained):
    path = Workdir(root / workdir)
    result, config = path.read_result(), files.read_json(path.config)
    searched = [hardware.read(candidate) for candidate in path.candidates()]
    try:
        return {
            "top1": result["top1"],
            "mean_per_class": result["mean_per_class"],
            "examples": result["examples"],
            "learning_rate": config["learning_rate"] if trained else None,
            "weight_decay": config["weight_decay"] if trained else None,
            "epochs": config["epochs"] if trained else None,
            "C": result.get("C"),
            "k": result.get("k"),
            "image_size": config["image_size"],
            "protocol": config["protocol"],
            "seconds": hardware.read(path).get("seconds"),
            "search_seconds": sum(m.get("seconds", 0) for m in searched) if searched else None,
            "workdir": workdir,
        } | {name: value for name, value in result.items() if name.startswith(_MEASURES)}
    except (KeyError, TypeError) as error:
        raise EtfzooError(f"{path} holds no result of this sweep: {error} is missing") from error


def select(rows, **values) -> list[dict]:
    """The rows that have all these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def headline_metric(dataset: str) -> str:
    """The metric that a data set is scored by: `top1` or `mean_per_class`."""
    return DATASETS.get(dataset, Dataset("", 0)).metric


def subset_of(rows, dataset: str) -> int | None:
    """Number of test images if they are not the official test split's; else, or unknown, None."""
    row = DATASETS.get(dataset)
    official = row.counts.get(row.test) if row else None
    counts = {r["examples"] for r in rows if r["dataset"] == dataset} - {official}
    return min(counts) if official and counts else None


def label(rows, dataset: str) -> str:
    """A data set's name, with the number of test images where they are a subset."""
    count = subset_of(rows, dataset)
    return dataset if count is None else f"{dataset} (subset of {count:,} images)"


def spread(values, percent: bool = True) -> str:
    """Mean, with the range where there are several values; `-` of none.

    Args:
        values: numbers.
        percent: whether these are shares, shown in percent; else three digits count.
    """
    values = list(values)
    if not values:
        return "-"

    def text(value):
        return f"{100 * value:.1f}" if percent else f"{value:.3g}"

    mean = text(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"

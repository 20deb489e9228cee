"""What the workdirs of a sweep (backbones x methods x targets x seeds) hold, as rows."""

import re
from collections.abc import Iterator
from pathlib import Path

from etfzoo import files
from etfzoo.data.datasets import DATASETS, Dataset
from etfzoo.errors import EtfzooError
from etfzoo.runtime import hardware
from etfzoo.workdir import Workdir

METRICS = {"top1": "top-1", "mean_per_class": "mean per-class"}
MODES = {
    "source": "pretraining",
    "full": "full fine-tuning",
    "linear_probe": "linear probe",
    "knn": "k-NN",
}
TRAINED = ("source", "full")  # modes that train a network
_PLAN = {
    "source": str, "backbones": list, "methods": list, "targets": list, "seeds": list,
    "modes": list, "protocol": str,
}  # fmt: skip


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
    return plan


def planned(plan) -> Iterator[tuple[dict, str]]:
    """Every cell of a sweep: its backbone, method, seed, dataset and mode; and its workdir."""
    modes = [mode for mode in plan["modes"] if mode != "source"]
    cells = [(plan["source"], "source")]
    cells += [(target, mode) for target in plan["targets"] for mode in modes]
    for dataset, mode in cells:
        for backbone in plan["backbones"]:
            for method in plan["methods"]:
                for seed in plan["seeds"]:
                    cell = {"backbone": backbone, "method": method, "seed": seed}
                    name = f"{backbone}_{method}_s{seed}"
                    workdir = f"source/{name}"
                    if mode != "source":
                        workdir = f"{re.sub('[/:]', '_', dataset)}/{name}/{mode}"
                    yield cell | {"dataset": dataset, "mode": mode}, workdir


def rows(root) -> list[dict]:
    """One row for each finished cell of a sweep, in the order of `planned`.

    Args:
        root: the sweep's directory, with `sweep.json`.

    Returns:
        rows of `backbone`, `method`, `seed`, `dataset`, `mode` (source, full, linear_probe, knn),
        `top1` and `mean_per_class` (shares of 1), `examples` (test images), `learning_rate` and
        `weight_decay` (as picked) and `epochs` of what was trained, `C` of probes, `k` of k-NN,
        `image_size`, `protocol`, `seconds` (of the run itself), `search_seconds` (of the candidates
        for the learning rate), `workdir` (below `root`) and the collapse measures
        `nc/<split>/<measure>`. What a cell does not have is None; collapse measures are left out.

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
        } | {name: value for name, value in result.items() if name.startswith("nc/")}
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


def spread(values) -> str:
    """Mean of shares in percent, with the range where there are several; `-` of none."""
    values = [100 * value for value in values]
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"

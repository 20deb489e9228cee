"""One line a method: the tables of long tails and of variants, as text, JSON and in a report."""

import json
from typing import NamedTuple

import numpy as np

from etfzoo.experiments import html
from etfzoo.experiments.results import METRICS, headline_metric, select, series, spread

SHOTS = {"many": "many (over 100)", "medium": "medium (20 to 100)", "few": "few (under 20)"}
SCORES = ("msp", "energy", "neco", "nci")  # of `etfzoo.measure.ood`
_SHORT = {"full": "fine-tuned", "linear_probe": "probe", "knn": "k-NN"}


class Column(NamedTuple):
    """A figure of a method.

    Attributes:
        name: in the JSON.
        title: in the table.
        cells: whose mean it is: the data set and mode of a row of `results.rows`, and the name of
            the figure there. A seed that lacks one of them does not count.
        percent: whether it is a share, shown in percent.
    """

    name: str
    title: str
    cells: tuple[tuple[str, str, str], ...]
    percent: bool = True

    def values(self, rows, seeds) -> list[float]:
        """One figure a seed.

        Args:
            rows: of one method, backbone and imbalance.
            seeds: of the sweep.
        """
        found = {
            (row["seed"], dataset, mode, name): row[name]
            for dataset, mode, name in self.cells
            for row in select(rows, dataset=dataset, mode=mode)
            if name in row
        }
        wanted = [[(seed, *cell) for cell in self.cells] for seed in seeds]
        return [np.mean([found[k] for k in keys]) for keys in wanted if found.keys() >= {*keys}]


def columns(plan) -> list[Column]:
    """The columns of a sweep's table."""
    source = plan["source"]
    if plan["table"] == "table_longtail":
        shown = {**METRICS, **{f"shots/{group}": title for group, title in SHOTS.items()}}
        return [
            Column(name.removeprefix("shots/"), title, ((source, "evaluate", name),))
            for name, title in shown.items()
        ]
    metric = headline_metric(source)
    found = [Column("source", f"{source}, {METRICS[metric]}", ((source, "source", metric),))]
    for mode in [mode for mode in _SHORT if mode in plan["modes"]]:
        cells = [(target, mode, headline_metric(target)) for target in plan["targets"]]
        for cell in cells:
            title = f"{cell[0]}, {_SHORT[mode]}, {METRICS[cell[2]]}"
            found.append(Column(f"{cell[0]}/{mode}", title, (cell,)))
        if len(cells) > 1:
            found.append(Column(f"targets/{mode}", f"targets, {_SHORT[mode]}", tuple(cells)))
    for name, title in (("nc1", "NC1"), ("cdnv_unbiased", "CDNV")):
        cell = (source, "source", f"nc/train/{name}")
        found.append(Column(name, f"{title}, train", (cell,), False))
    found.append(Column("ece", "ECE", ((source, "evaluate", "ece"),)))
    return found + _strangers(plan, ("msp",))


def _strangers(plan, scores):
    return [
        Column(
            f"ood/{name}/{score}",
            f"AUROC, {name}" + (f" by {score}" if len(scores) > 1 else ""),
            ((plan["source"], "evaluate", f"ood/{name}/{score}/auroc"),),
        )
        for name in plan["ood_datasets"]
        for score in scores
    ]


def notes(plan) -> list[str]:
    """What the figures of the table are."""
    if plan["table"] == "table_longtail":
        return [
            "On the whole test split, whose classes keep their size. Many, medium and few: the "
            "mean accuracy of the classes with so many training images (Liu et al. 2019)."
        ]
    if plan["table"] == "table_variants":
        return [
            "Targets: the mean of the targets. NC1 and CDNV (unbiased) of the pretrained features "
            "on the training split. ECE: calibration error on the source's test split. AUROC: how "
            "well the source's test images are told from those of another data set by the largest "
            "probability. Probabilities are the softmax of the logits, which squared error and dot "
            "regression do not train."
        ]
    return []


def _lines(plan, found, shown):
    """Of each series its name, what it is, and for each method the values of the columns."""
    for title, known in series(plan).items():
        by_method = {}
        for method in plan["methods"]:
            rows = select(found, method=method, **known)
            by_method[method] = [column.values(rows, plan["seeds"]) for column in shown]
        yield title, known, by_method


def _parts(plan):
    """Captions and columns of the tables; of scores of foreign images all have their own one."""
    what = "mean over seeds (least to most), shares in %"
    yield what, columns(plan)
    if plan["ood_datasets"]:
        yield f"images of something else, {what}", _strangers(plan, SCORES)


def text_tables(plan, found):
    """Captions, and rows with a header, see `etfzoo.experiments.tables.text_tables`."""
    for caption, shown in _parts(plan):
        for title, known, by_method in _lines(plan, found, shown):
            table = [["method", *(column.title for column in shown)]]
            for method, values in by_method.items():
                cells = zip(values, shown, strict=True)
                table.append([method, *(_text(plan, v, column.percent) for v, column in cells)])
            yield f"{title}{_classes(found, known)}: {caption}", table


def _text(plan, values, percent):
    missing = 0 < len(values) < len(plan["seeds"])
    return spread(values, percent) + (f", {len(values)} of the seeds" if missing else "")


def _classes(found, known):
    """How many classes have many, some and few training images."""
    for row in select(found, mode="evaluate", **known):
        names = [f"shots/{group}_classes" for group in SHOTS]
        if row.keys() >= {*names}:
            counts = zip((row[name] for name in names), SHOTS, strict=True)
            return f" ({', '.join(f'{n} {group}' for n, group in counts)}-shot classes)"
    return ""


def html_tables(plan, found) -> list[html.Table]:
    """The same, with the ranges in small print."""
    return [
        html.Table(caption, [header, *([method, *map(_cell, line)] for method, *line in body)])
        for caption, (header, *body) in text_tables(plan, found)
    ]


def _cell(text):
    mean, _, limits = text.partition(" ")
    return html.Cell(mean, limits.strip("()"))


def json_text(plan, found) -> str:
    """The table as JSON: one object for each line, shares as shares of 1."""
    every = columns(plan) + _strangers(plan, SCORES)
    lines = []
    for _, known, by_method in _lines(plan, found, every):
        for method, values in by_method.items():
            figures = {
                column.name: {
                    "mean": float(np.mean(of_seeds)),
                    "least": float(min(of_seeds)),
                    "most": float(max(of_seeds)),
                    "seeds": len(of_seeds),
                }
                for column, of_seeds in zip(every, values, strict=True)
                if of_seeds
            }
            lines.append({**known, "method": method, "figures": figures})
    names = ("table", "source", "protocol", "command", "version")
    document = {name: plan.get(name) for name in names} | {"lines": lines}
    return json.dumps(document, indent=2) + "\n"

"""The tables of a sweep: as csv, as Markdown and as blocks of an HTML report."""

import csv
import io
import itertools
import urllib.parse
from collections.abc import Iterator

import numpy as np

from etfzoo.experiments import html, results, summary
from etfzoo.experiments.methods import TABLES
from etfzoo.experiments.results import (
    METRICS,
    MODES,
    headline_metric,
    label,
    select,
    series,
    series_name,
    spread,
)
from etfzoo.measure.features import comparable

_FEATURES = {
    "source": "pretrained",
    "full": "fine-tuned",
    "linear_probe": "frozen",
    "knn": "frozen",
    "evaluate": "pretrained",
}
_SHORT = {"full": "full", "linear_probe": "probe", "knn": "k-NN"}


def csv_text(found) -> str:
    """All rows of `sweep_results.rows`, with their columns."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in found for name in row)))
    writer.writeheader()
    writer.writerows(found)
    return table.getvalue()


def markdown(plan, found) -> str:
    """The accuracies, what to be careful about, and every finished cell with links."""
    lines = [f"# {_markdown_cell(headline(plan))}", "", progress(plan, found), ""]
    lines += itertools.chain.from_iterable((text, "") for text in cautions(plan, found))
    for caption, table in text_tables(plan, found):
        lines += [f"## {_markdown_cell(caption)}", "", *_markdown_table(table), ""]
    lines += ["## Every finished cell", ""]
    return "\n".join([*lines, *_markdown_table(cells(found))]) + "\n"


def text_tables(plan, found) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables that a sweep is for: captions, and rows with a header."""
    if plan["table"] != "table1":
        yield from summary.text_tables(plan, found)
        return
    for caption, metric, modes, body in accuracies(plan, found):
        header = ["data", *([] if metric else ["metric"])]
        header += [f"{method}, {_SHORT[mode]}" for mode in modes for method in plan["methods"]]
        table = [header]
        for name, shown, line in body:
            title = [name] if metric else [name, METRICS[shown]]
            table.append(title + [_as_text(seeds, shown) for seeds in line])
        yield caption, table


def _markdown_table(table):
    head, *body = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]


def _markdown_cell(cell):
    if isinstance(cell, html.Link):
        return f"[{_markdown_cell(cell.text)}]({cell.href})"
    text = " ".join(str(cell).split())
    return "".join("\\" + c if c in "\\`*[]<>|" else c for c in text)


def headline(plan) -> str:
    """Headline of a sweep."""
    return TABLES[plan["table"]].format(source=plan["source"], protocol=plan["protocol"])


def progress(plan, found) -> str:
    """How many cells are finished."""
    total = sum(1 for _ in results.planned(plan))
    text = f"{len(found)} of {total} cells are finished."
    return text if len(found) == total else text + " The others show as -."


def cautions(plan, found) -> list[str]:
    """What a reader must know before believing the table."""
    found_cautions = []
    if len(plan["seeds"]) == 1:
        found_cautions.append(
            "Caution: there is one seed. Differences between methods may be those between two "
            "seeds of one method; no conclusion can be drawn from them."
        )
    names = [label(found, d) for d in datasets(plan) if results.subset_of(found, d)]
    if names:
        found_cautions.append(
            f"Caution: not on the official test split: {', '.join(names)}. Figures of a subset "
            "cannot be compared with published ones."
        )
    return found_cautions


def datasets(plan) -> list[str]:
    """The source and the targets, each once."""
    return list(dict.fromkeys([plan["source"], *plan["targets"]]))


def accuracies(plan, found) -> Iterator[tuple[str, str | None, list[str], list[tuple]]]:
    """For each backbone the headline figures, top-1 and mean per-class accuracy.

    Yields:
        a caption; the metric, None for each data set's own; the modes of the columns (source row
        in that of `full`); and lines of a data set, its name as shown, the metric, and for each
        mode and method the rows of all seeds, None where nothing is planned.
    """
    modes = [m for m in MODES if m == "full" or m in plan["modes"] and m != "source"]
    blocks = [(plan["source"], True), *((target, False) for target in plan["targets"])]
    for backbone, metric in itertools.product(plan["backbones"], (None, *METRICS)):
        lines = []
        for dataset, source in blocks:
            name = label(found, dataset) + (", source" if source else "")
            line = []
            for mode, method in itertools.product(modes, plan["methods"]):
                wanted = mode == "full" if source else mode in plan["modes"]
                mode = "source" if source else mode
                known = {"backbone": backbone, "dataset": dataset, "mode": mode, "method": method}
                line.append(select(found, **known) if wanted else None)
            lines.append((name, metric or headline_metric(dataset), line))
        title = METRICS[metric] if metric else "headline metric of each data set"
        yield f"{backbone}: {title} (%), mean over seeds (least to most)", metric, modes, lines


def main_tables(plan, found) -> list[html.Table]:
    """`text_tables` for the report; those of table 1 with links to the files of each seed."""
    if plan["table"] != "table1":
        return summary.html_tables(plan, found)
    tables = []
    for caption, metric, modes, lines in accuracies(plan, found):
        names = ["data"] if metric else ["data", "metric"]
        groups = [("", len(names)), (f"{MODES['source']} / {MODES['full']}", len(plan["methods"]))]
        groups += [(MODES[mode], len(plan["methods"])) for mode in modes[1:]]
        table = [names + plan["methods"] * len(modes)]
        for name, shown, line in lines:
            title = [name] if metric else [name, METRICS[shown]]
            table.append(title + [_with_links(seeds, shown) for seeds in line])
        tables.append(html.Table(caption, table, groups))
    return tables


def _with_links(seeds, metric):
    if not seeds:
        return "" if seeds is None else "-"
    mean, _, limits = spread(row[metric] for row in seeds).partition(" ")
    details = [(f"seed {row['seed']}:", *_links(row)) for row in seeds]
    return html.Cell(mean, limits.strip("()"), _count(seeds), details)


def _as_text(seeds, metric):
    if not seeds:
        return "" if seeds is None else "-"
    return f"{spread(row[metric] for row in seeds)}, {_count(seeds)}"


def _count(seeds):
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _links(row):
    return [
        html.Link(name, urllib.parse.quote(f"{row['workdir']}/{name}.json"))
        for name in ("config", "result")
    ]


def differences(plan, found) -> tuple[html.Table, list[str]]:
    """Whether the methods differ by more than their seeds.

    Returns:
        a table, and the verdicts in it, each `METHOD above|below …` where ranges are apart.
    """
    first, *others = compared(plan)
    table = [["data", "metric", "backbone", "mode", *(f"{first} and {o}" for o in others)]]
    verdicts = []
    for (dataset, mode), (name, of_series) in itertools.product(blocks(plan), series(plan).items()):
        metric = headline_metric(dataset)
        known = {"dataset": dataset, "mode": mode, **of_series}
        seeds = {
            method: [row[metric] for row in select(found, method=method, **known)]
            for method in plan["methods"]
        }
        said = [compare(first, seeds[first], other, seeds[other]) for other in others]
        verdicts += said
        table.append([label(found, dataset), METRICS[metric], name, MODES[mode], *said])
    caption = "Difference of the means in points, and whether the ranges of the seeds are apart"
    return html.Table(caption, table), verdicts


def compared(plan) -> list[str]:
    """The method that the others are compared with (etf where it is there), and the others."""
    first = "etf" if "etf" in plan["methods"] else plan["methods"][0]
    return [first, *(method for method in plan["methods"] if method != first)]


def compare(a: str, of_a, b: str, of_b) -> str:
    """How the seeds of two methods lie to each other; accuracies are shares of 1."""
    if not of_a or not of_b:
        return "-"
    points = f"{100 * (np.mean(of_a) - np.mean(of_b)):+.1f}"
    if len(of_a) == len(of_b) == 1:
        return f"{points}, one seed"
    if min(of_a) > max(of_b):
        return f"{a} above {b} in all seeds ({points})"
    if min(of_b) > max(of_a):
        return f"{a} below {b} in all seeds ({points})"
    return f"ranges overlap ({points})"


def blocks(plan) -> list[tuple[str, str]]:
    """Data sets with each of their modes, the source first."""
    modes = [mode for mode in plan["modes"] if mode != "source"]
    return [(plan["source"], "source"), *itertools.product(plan["targets"], modes)]


def collapse(plan, found) -> list[html.Table]:
    """Collapse measures of each series on the source and the targets, where there are any."""
    names = [name for row in found for name in row if name.startswith("nc/")]
    # Splits and data sets of different size stand side by side.
    measures = comparable(list(dict.fromkeys(name.rpartition("/")[2] for name in names)))
    tables = []
    for title, known in series(plan).items():
        table = [["data", "method", "features, split", *measures]]
        for (dataset, mode), method in itertools.product(blocks(plan), plan["methods"]):
            seeds = select(found, dataset=dataset, mode=mode, method=method, **known)
            names = [name for row in seeds for name in row if name.startswith("nc/")]
            for split in dict.fromkeys(name[3:].rpartition("/")[0] for name in names):
                line = [label(found, dataset), method, f"{_FEATURES[mode]}, {split}"]
                for measure in measures:
                    name = f"nc/{split}/{measure}"
                    line.append(_figures([row[name] for row in seeds if name in row]))
                table.append(line)
        if len(table) > 1:
            tables.append(html.Table(title, table))
    return tables


def _figures(values):
    if not values:
        return "-"
    mean = f"{np.mean(values):.3g}"
    several = len(values) > 1
    return html.Cell(mean, f"{min(values):.3g} to {max(values):.3g}" if several else "")


def cells(found, commands=None) -> list[list]:
    """A header, and a line for each finished cell.

    Args:
        found: see `sweep_results.rows`.
        commands: workdir -> what tells its command, for a further column.
    """
    header = [
        "data", "backbone", "method", "seed", "mode", "top-1 (%)", "mean per-class (%)",
        "test images", "learning rate", "C", "k", "epochs", "pixels", "protocol", "time (s)",
        "settings", "metrics",
    ]  # fmt: skip
    lines = [header + ([] if commands is None else ["command"])]
    for row in found:
        values = [label(found, row["dataset"]), series_name(row), row["method"], row["seed"]]
        values += [MODES[row["mode"]], *(f"{100 * row[metric]:.2f}" for metric in METRICS)]
        values += [row["examples"], _number(row["learning_rate"]), _number(row["C"])]
        values += [_number(row[n]) for n in ("k", "epochs", "image_size")]
        values += [row["protocol"], _number(row["seconds"]), *_links(row)]
        if commands is not None:
            values.append(commands.get(row["workdir"], "not recorded"))
        lines.append(values)
    return lines


def _number(value):
    return "" if value is None else f"{value:.6g}"

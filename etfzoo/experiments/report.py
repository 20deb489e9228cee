"""The report of a sweep: table1.csv, table1.md and report.html, from the files of its workdirs.

Of another table than the first the files have its name, and there is its JSON too.
"""

import itertools
import math
import platform
import textwrap
from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from etfzoo import files
from etfzoo.data.datasets import DATASETS
from etfzoo.experiments import html, plots, results, summary, tables
from etfzoo.experiments.results import (
    METRICS,
    MODES,
    TRAINED,
    label,
    rows,
    select,
    series,
    series_name,
)
from etfzoo.runtime import hardware
from etfzoo.training import protocols
from etfzoo.version import __version__
from etfzoo.workdir import Workdir

# Top-1 in percent: Tiomoko Ali et al., "Deep neural network models trained with a fixed random
# classifier transfer better across domains", table 1. data set -> method -> (rn50, rn101).
PAPER = {
    "imagenet2012": {"linear": (75.25, 79.20), "sw": (77.93, 79.13), "etf": (76.72, 77.29)},
    "cifar100": {"linear": (61.59, 59.86), "sw": (62.55, 60.30), "etf": (62.33, 62.38)},
    "cifar10": {"linear": (89.56, 87.93), "sw": (88.68, 88.43), "etf": (89.33, 88.38)},
    "stl10": {"linear": (60.03, 56.32), "sw": (63.32, 61.91), "etf": (63.73, 65.17)},
    "svhn_cropped": {"linear": (95.10, 95.56), "sw": (95.67, 95.67), "etf": (94.40, 95.02)},
    "oxford_iiit_pet": {"linear": (40.50, 46.47), "sw": (39.22, 45.10), "etf": (48.32, 53.17)},
    "oxford_flowers102": {"linear": (38.05, 37.09), "sw": (41.56, 44.07), "etf": (60.30, 57.03)},
    "dtd": {"linear": (29.09, 28.24), "sw": (24.62, 30.74), "etf": (40.90, 34.68)},
}
PAPER_BACKBONES = ("rn50", "rn101")
# What a fine-tuning takes from its model or picks on the selection split.
_PICKED = ("mean", "std", "learning_rate", "weight_decay")

EVIDENCE = (
    "For the paper's claim: classifiers that are fixed, random and orthogonal lose almost nothing "
    "on the data that they were trained on (Hoffer, Hubara and Soudry 2018; Kasarla et al. 2022 "
    "for the simplex), and features with a lower CDNV, that is more collapsed ones, do better at "
    "few-shot transfer (Galanti, György and Hutter 2021).",
    "Against it: losses that separate classes further help on the source and hurt the transfer of "
    "frozen features, with little effect after full fine-tuning (Kornblith et al. 2021); stronger "
    "collapse improves the detection of data from elsewhere and worsens generalisation to it "
    "(Harun et al. 2025). So full fine-tuning and frozen features stand side by side here, with "
    "collapse measures of the train and the test split. A head that also leads on the source may "
    "just train faster at the given learning rate.",
)


def write(root) -> Path:
    """Writes the table as csv, md and (but for table 1) json, and report.html, each atomically.

    The sweep may be partly finished: only cells with a result count, missing ones show as `-`.

    Args:
        root: the sweep's directory; see `etfzoo.experiments.results.rows`.

    Returns:
        the path of report.html.

    Raises:
        EtfzooError: no sweep there, or a file of a finished cell is missing or damaged.
    """
    root = Path(root)
    plan, found = results.read_plan(root), rows(root)
    name = plan["table"]
    files.write_text(root / f"{name}.csv", tables.csv_text(found))
    files.write_text(root / f"{name}.md", tables.markdown(plan, found))
    if name != "table1":
        files.write_text(root / f"{name}.json", summary.json_text(plan, found))
    html.write(root / "report.html", tables.headline(plan), _sections(root, plan, found))
    return root / "report.html"


def text(root) -> str:
    """The tables that a sweep is for, as they are printed."""
    plan, found = results.read_plan(root), rows(root)
    parts = (f"{title}\n{html.text_table(t)}\n" for title, t in tables.text_tables(plan, found))
    return "\n".join(parts)


def _sections(root, plan, found):
    configs = {r["workdir"]: files.read_json(Workdir(root / r["workdir"]).config) for r in found}
    machines = {r["workdir"]: hardware.read(root / r["workdir"]) for r in found}
    sections = [("Results", tables.progress(plan, found))]
    sections += [(None, text) for text in tables.cautions(plan, found)]
    sections += [(None, table) for table in tables.main_tables(plan, found)]
    beside = f"{plan['table']}.csv and {plan['table']}.md beside this file hold the same figures."
    sections += [(None, text) for text in (*summary.notes(plan), beside)]
    sections += _differences(plan, found)
    if plan["table"] == "table1":
        sections += _beside_the_paper(plan, found, configs)
    sections += _accuracy_plots(plan, found)
    sections += _curves(root, plan, found)
    sections += _collapse(plan, found)
    sections += _learning_rates(root, plan, found)
    sections += _assumed(plan, found, configs)
    if plan["targets"]:
        sections += _heading("Evidence on both sides", EVIDENCE)
    sections += _commands(plan, found, machines)
    sections += _versions(plan, found, machines)
    return sections


def _heading(heading, blocks):
    """Blocks under one heading."""
    return [(heading if not number else None, block) for number, block in enumerate(blocks)]


def _differences(plan, found):
    first, *others = tables.compared(plan)
    if not others:
        return []
    table, verdicts = tables.differences(plan, found)
    count = len(plan["seeds"])
    if count == 1:
        text = "There is one seed: whether a difference exceeds that between seeds is unknown."
    else:
        above, below = (
            sum(v.startswith(f"{first} {word} ") for v in verdicts) for word in ("above", "below")
        )
        overlap = sum(v.startswith("ranges overlap") for v in verdicts)
        text = (
            f"Of {above + below + overlap} comparisons, {first} is above the other method in all "
            f"seeds in {above} and below it in {below}; in {overlap} the ranges overlap. "
            "Of two methods that do not differ, the ranges are apart by chance alone in one of "
            f"{math.comb(2 * count, count) / 2:g} comparisons of {count} seeds each. That the test "
            "images are a sample too is no part of these ranges."
        )
    return _heading("Do the methods differ by more than the seeds?", [text, table])


def _beside_the_paper(plan, found, configs):
    heading = "Beside the paper's figures"
    reason = _why_not_compared(plan, found, configs)
    if reason:
        return [(heading, f"Not compared with the paper's table: {reason}.")]
    text = (
        "Top-1 (%) after full fine-tuning; paper: table 1 of Tiomoko Ali et al., one figure a cell "
        "without a range. Its ImageNet figures of SW are 100 less the errors that Pan et al. "
        "publish for their own checkpoints. The paper gives no fine-tuning settings."
    )
    blocks = [text]
    for column, backbone in enumerate(PAPER_BACKBONES):
        methods = [m for m in plan["methods"] if m in PAPER["imagenet2012"]]
        table = [["data", *(f"{m}, {who}" for m in methods for who in ("here", "paper"))]]
        for dataset in tables.datasets(plan):
            if dataset not in PAPER or results.subset_of(found, dataset):
                continue
            line = [dataset]
            mode = "source" if dataset == plan["source"] else "full"
            for method in methods:
                seeds = select(found, dataset=dataset, mode=mode, backbone=backbone, method=method)
                figure = PAPER[dataset][method][column]
                line += [results.spread(row["top1"] for row in seeds), f"{figure:.2f}"]
            table.append(line)
        if backbone in plan["backbones"]:
            blocks.append(html.Table(backbone, table))
    return _heading(heading, blocks)


def _why_not_compared(plan, found, configs):
    """None where the sweep is the paper's: source, protocol, and its settings unchanged."""
    if plan["source"] != "imagenet2012":
        return f"the paper pretrains on ImageNet (imagenet2012), this sweep on {plan['source']}"
    if plan["protocol"] not in ("paper", "paper_lowres"):
        return f"that needs the protocol paper or paper_lowres, this sweep has {plan['protocol']}"
    if not set(plan["backbones"]) & set(PAPER_BACKBONES):
        return f"the paper has no {' or '.join(plan['backbones'])}"
    for row in found:
        if row["mode"] not in TRAINED:
            continue
        task = "pretrain" if row["mode"] == "source" else "finetune"
        dataset, config = DATASETS.get(row["dataset"]), configs[row["workdir"]]
        known = protocols.settings(plan["protocol"], task, row["backbone"], dataset)
        for name, value in known.items():
            value = list(value) if isinstance(value, tuple) else value
            if config.get(name) != value and not (task == "finetune" and name in _PICKED):
                return f"{row['workdir']} has {name} {config.get(name)}, the protocol has {value}"
    if not any(row["dataset"] in PAPER and row["mode"] in TRAINED for row in found):
        return "no cell with a figure there is finished"
    return None


def _accuracy_plots(plan, found):
    blocks = []
    for dataset in tables.datasets(plan):
        pictures = []
        metric = results.headline_metric(dataset)
        for mode in [mode for name, mode in tables.blocks(plan) if name == dataset]:
            cells = select(found, dataset=dataset, mode=mode)
            points = {}
            for row in cells:
                methods = points.setdefault(series_name(row), {})
                methods.setdefault(row["method"], []).append(row[metric])
            if points:
                figure = plots.accuracy_by_method(
                    MODES[mode], f"test {METRICS[metric]} (%)", plan["methods"], points
                )
                pictures.append((figure, _describe(dataset, mode, metric, points)))
        if pictures:
            blocks.append(html.Gallery(label(found, dataset), pictures))
    return _heading("Accuracy by method", blocks)


def _describe(dataset, mode, metric, points):
    said = [
        f"{method} ({backbone}) {results.spread(values)}"
        for backbone, methods in points.items()
        for method, values in methods.items()
    ]
    return f"{dataset}, {MODES[mode]}, {METRICS[metric]} in percent: {'; '.join(said)}"


def _curves(root, plan, found):
    blocks = []
    for title, known in series(plan).items():
        pictures = []
        for dataset, mode in [block for block in tables.blocks(plan) if block[1] in TRAINED]:
            runs = {}
            for row in select(found, dataset=dataset, mode=mode, **known):
                history = Workdir(root / row["workdir"]).history()
                if history:
                    runs.setdefault(row["method"], []).append(history)
            if runs:
                name = textwrap.fill(label(found, dataset), 42)  # as wide as the picture
                figure = plots.training_curves(f"{name}\n{MODES[mode]}", runs)
                last = {m: [history[-1] for history in h] for m, h in runs.items()}
                said = "; ".join(
                    f"{method} ends at training loss {np.mean([e['train_loss'] for e in ends]):.3g}"
                    f" and test top-1 {results.spread(e['top1'] for e in ends)} %"
                    for method, ends in last.items()
                )
                pictures.append((figure, f"{title}, {dataset}, {MODES[mode]}: {said}"))
        if pictures:
            caption = f"{title}: means over seeds, shaded from least to most"
            blocks.append(html.Gallery(caption, pictures))
    return _heading("Learning curves", blocks)


def _collapse(plan, found):
    collapse = tables.collapse(plan, found)
    text = (
        "Means over seeds (least to most); lower is more collapsed. What ends in unbiased is less "
        "what the number of images a class adds to it, so that splits and data sets of different "
        "size compare. nc1_equal is NC1 on equally many images of each class in both splits, and "
        "compares these two alone; nc1 without it grows with the number of images, and compares "
        "methods within one split. nc1_ratio is tr S_W / tr S_B; nc2_norms, nc2_angles and "
        "nc2_gram tell how far the class means are from a simplex, nc3 how far the classifier is "
        "from them, nc4 how often it disagrees with the nearest class mean; these are of the "
        "sampled means, whose noise shows in small classes. tr_c_over_p is the paper's tr(C°)/p, "
        "which grows with the square of the features' scale; nc1, nc1_ratio, cdnv and "
        "tr_c_over_p_l2 (of features of unit length) do not. The csv file has the plain forms too."
    )
    return _heading("Neural collapse", [text, *collapse]) if collapse else []


def _learning_rates(root, plan, found):
    trained = [
        (row, Workdir(root / row["workdir"]).read_selection())
        for row in found
        if row["mode"] in TRAINED
    ]
    if not trained:
        return []
    keys = sorted({_candidate(c) for _, candidates in trained for c in candidates})
    several_decays = len({decay for _, decay in keys}) > 1
    header = ["data", "mode", "backbone", "method", "seed", "picked", "at the edge"]
    table = [
        header
        + [f"{rate:g}, decay {decay:g}" if several_decays else f"{rate:g}" for rate, decay in keys]
    ]
    for row, candidates in trained:
        picked = _candidate(row)
        scores = {_candidate(c): _score(c, _candidate(c) == picked) for c in candidates}
        rates = [rate for rate, _ in scores]
        edge = "yes" if len(set(rates)) > 1 and picked[0] in (min(rates), max(rates)) else "no"
        line = [label(found, row["dataset"]), MODES[row["mode"]], series_name(row), row["method"]]
        line += [row["seed"], f"{picked[0]:g}", edge if candidates else "not searched here"]
        table.append(line + [scores.get(key, "-") for key in keys])
    text = (
        "Scores (%) of the candidates on the selection split, by the headline metric of the data "
        "set. Every method starts from the same grid. Candidates marked added joined because the "
        "best one lay at its edge; if the picked one still does, a wider grid may give more."
    )
    caption = "Picked learning rate, and the score of each candidate"
    return _heading("Learning rates", [text, html.Table(caption, table)])


def _candidate(values):
    return values["learning_rate"], values["weight_decay"]


def _score(candidate, picked):
    score = next(candidate[metric] for metric in METRICS if metric in candidate)
    text = f"{100 * score:.1f}" if score is not None and math.isfinite(score) else "diverged"
    return text + (", added" if candidate.get("widened") else "") + (", picked" if picked else "")


def _assumed(plan, found, configs):
    heading = "Assumed settings"
    tasks = {"pretrain": "source"} | ({"finetune": "full"} if plan["targets"] else {})
    names = {task: protocols.assumed(plan["protocol"], task) for task in tasks}
    protocol = protocols.get_protocol(plan["protocol"])
    text = f"Protocol {plan['protocol']}; its source: {protocol.source}."
    norms = ("bn", "sw") if "sw" in plan["methods"] else ("bn",)
    said = [n for t in tasks for norm in norms for n in protocols.notes(plan["protocol"], t, norm)]
    notes = [f"Note: {note}." for note in dict.fromkeys(said)]
    if not any(names.values()):
        return _heading(heading, [f"{text} It leaves nothing open.", *notes])
    table = [["setting", *(MODES[mode] for mode in tasks.values())]]
    for name in dict.fromkeys(itertools.chain(*names.values())):
        line = [name]
        for task, mode in tasks.items():
            values = {str(configs[row["workdir"]].get(name)) for row in select(found, mode=mode)}
            line.append(", ".join(sorted(values)) or "-" if name in names[task] else "given")
        table.append(line)
    text += " It leaves these settings open; here they have these values."
    table = html.Table("Settings that are not in the source", table)
    return _heading(heading, [text, table, *notes])


def _commands(plan, found, machines):
    recorded = {workdir: m["command"] for workdir, m in machines.items() if m.get("command")}
    numbers = {c: i for i, c in enumerate(dict.fromkeys(recorded.values()), 1)}
    table = tables.cells(found, {w: numbers[command] for w, command in recorded.items()})
    blocks = [html.Table("Settings and metrics lead to the files of the cell", table)]
    sections = _heading("Every finished cell", blocks)
    sections.append(("Commands", "The whole sweep:"))
    sections.append((None, (str(plan.get("command", "not recorded")),)))
    if numbers:
        sections.append((None, "The commands that began the cells, by number in the table above:"))
        sections.append((None, tuple(f"[{number}] {c}" for c, number in numbers.items())))
    return sections


def _versions(plan, found, machines):
    table = [["what", "version"], ["etfzoo, of the sweep", plan.get("version", "not recorded")]]
    table += [["etfzoo, of this report", __version__]]
    table += [["keras", keras.__version__], ["tensorflow", tf.__version__]]
    table += [["keras-cv", metadata.version("keras-cv")], ["numpy", np.__version__]]
    table += [["python", platform.python_version()]]
    seconds = sum((row["seconds"] or 0) + (row["search_seconds"] or 0) for row in found)
    kinds = dict.fromkeys(m["hardware"] for m in machines.values() if m.get("hardware"))
    text = f"Finished cells took {seconds / 3600:.2f} hours in all, searches included."
    caption = "Versions; those of the packages are of the process that wrote this report"
    machine_table = [["hardware"], *([name] for name in kinds)]
    return _heading(
        "Versions and hardware",
        [html.Table(caption, table), html.Table("Ran on", machine_table), text],
    )

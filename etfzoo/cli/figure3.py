"""The paper's Figure 3: the covariance within classes C° of several models' features on a target.

  python recipes/figure3.py --models=runs/linear,runs/etf,runs/sw --dataset=oxford_flowers102
  python recipes/figure3.py --models=runs/flowers_linear,runs/flowers_etf --names=linear,etf

Each model is fine-tuned on the target first, as in the paper: the workdir of a full fine-tuning on
--dataset (finetune.py) is taken as it is; any other model is fine-tuned here, below <workdir>, all
with the same settings and candidates. The second row shows the frozen features of the models
that the fine-tuning started from. tr(C°)/p grows with the scale of the features, so that two
measures without a scale are beside it. The paper does not say which split its figure is of; here it
is --split, the test split unless said otherwise. Writes figure3.png, .pdf, .csv and .npz.
"""

import csv
import io
import os
from pathlib import Path

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.training.config import TrainConfig

import numpy as np  # isort: skip (after cli, which says what to do where it is missing)
from etfzoo.workdir import Workdir, folder_name


def main():
    import etfzoo
    from etfzoo import files
    from etfzoo.experiments import figures
    from etfzoo.measure.features import extract
    from etfzoo.models.classifier import with_fresh_head
    from etfzoo.zoo.load import read

    if not FLAGS.models:
        raise etfzoo.EtfzooError("say which models with --models=A,B,... (workdirs, names)")
    names = FLAGS.names or [os.path.basename(m.rstrip("/")) for m in FLAGS.models]
    if len(set(names)) != len(FLAGS.models):
        raise etfzoo.EtfzooError(
            f"{len(FLAGS.models)} models need as many different names: pass --names=A,B,..."
        )
    target = folder_name(FLAGS.dataset)
    place = Path(FLAGS.workdir or f"runs/figure3/{target}")
    tuned = [_finetuned(handle) for handle in FLAGS.models]  # wrong workdirs fail before training
    source = configs.open_source(FLAGS.dataset)
    rows = {"fine-tuned": {}, "frozen": {}}
    table = []
    for name, handle, workdir in zip(names, FLAGS.models, tuned, strict=True):
        workdir = workdir or _finetune(handle, place / "finetuned" / name)
        config = TrainConfig.load(Workdir(workdir).config)
        top1 = Workdir(workdir).read_result()["top1"]
        print(
            f"{name}: {workdir}, from {config.init}, {config.epochs} epochs, learning rate "
            f"{config.learning_rate:g}, test top-1 {100 * top1:.2f} %",
            flush=True,
        )
        model = etfzoo.load(workdir)
        kept = {"input_shape": model.spec.input_shape, "crop": model.spec.crop}
        frozen = with_fresh_head(read(config.init), None, None, **kept)
        for row, network in (("fine-tuned", model), ("frozen", frozen)):
            features = extract(network, source, FLAGS.split, FLAGS.batch_size or 128)
            rows[row][name] = c = figures.Covariance.of(*features)
            table.append([name, row, c.trace, c.unit_trace, c.scatter_ratio])
            table[-1] += (
                [top1, config.learning_rate, config.epochs] if row != "frozen" else [""] * 3
            )
            table[-1] += [workdir if row != "frozen" else config.init]
    output = place
    if not FLAGS.workdir:
        models = "+".join(map(configs.model_label, FLAGS.models))
        output = place / folder_name(f"{models}_{FLAGS.split}")
    files.make_directory(output)
    title = f"covariance within classes C° of pooled features, {source.name} ({FLAGS.split} split)"
    figures.save(figures.covariances(rows, title), output / "figure3")
    _write(output, rows, table)
    for row in rows:
        for what, column in (("tr(C°)/p", 2), ("L2-normalised tr(C°)/p", 3), ("trSW/trSB", 4)):
            order = sorted((r for r in table if r[1] == row), key=lambda r: r[column])
            print(f"{row}, {what}: " + " < ".join(f"{r[0]} {r[column]:.3g}" for r in order))
    print(f"written to {output}: figure3.png, figure3.pdf, figure3.csv, figure3.npz")


def _finetuned(handle):
    """The workdir, if it is that of a finished fine-tuning on the target; None for other models.

    Raises:
        EtfzooError: a fine-tuning that is of no use here.
    """
    import etfzoo

    workdir = Path(handle)
    if not Workdir(workdir).config.exists():
        etfzoo.info(handle)  # an unknown name fails here
        return None
    config = TrainConfig.load(Workdir(workdir).config)
    if config.init is None:
        return None
    if config.dataset != FLAGS.dataset:
        raise etfzoo.EtfzooError(
            f"{handle} was fine-tuned on {config.dataset}, not on {FLAGS.dataset}: give the model "
            "that it started from, or the other --dataset"
        )
    result = Workdir(workdir).read_result()
    if result is None:
        raise etfzoo.EtfzooError(f"{handle} is not finished: start its fine-tuning again")
    if {"C", "k"} & result.keys():
        raise etfzoo.EtfzooError(f"{handle} is a probe or k-NN: its features are the frozen ones")
    return workdir


def _finetune(handle, workdir):
    """Fine-tunes a model on the target; goes on where it was stopped."""
    from etfzoo.training import transfer

    rates, decays = FLAGS.learning_rate or [], FLAGS.weight_decay or []
    config = configs.finetune_config(handle, rates, decays)
    print(f"fine-tuning {config.init} on {config.dataset} -> {workdir}", flush=True)
    configs.print_assumed(config, "finetune")
    transfer.finetune(config, workdir, rates, decays)
    return workdir


def _write(output, rows, table):
    from etfzoo import files

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["model", "features", "tr_c_over_p", "tr_c_over_p_l2", "scatter_ratio"]
        + ["top1", "learning_rate", "epochs", "weights"]
    )
    writer.writerows(table)
    files.write_text(output / "figure3.csv", text.getvalue())
    arrays = {f"{row}_{name}": c.matrix for row, cs in rows.items() for name, c in cs.items()}
    with files.atomic(output / "figure3.npz") as file:
        np.savez_compressed(file, **{k: v.astype(np.float32) for k, v in arrays.items()})


def run():
    """Defines the flags and runs the command."""
    flags.handles("Model", "models", None, "pretrained models, or workdirs of their fine-tunings")
    flags.strings("Model", "names", None, "what they are called (default: the last part of each)")
    flags.settings("head", head="linear")
    flags.string(
        "Data", "split", "test", "split or role (the paper does not say which): train or test"
    )
    flags.training_flags("standard", "oxford_flowers102", lists=("learning_rate", "weight_decay"))
    app.run(main, __doc__)

"""The whole of etfzoo in some five minutes on two CPU cores, without any download.

Pretrains a ResNet18 with a fixed ETF classifier and with a trainable one on drawn shapes,
transfers both to textured shapes, outlines and scanned digits, compares them, publishes the ETF
model, loads it back by name and classifies three images with it.

  python recipes/demo.py --workdir=demo_output
"""

import os
import shlex
from pathlib import Path

from etfzoo.cli import app, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.workdir import Workdir

HEADS = ("etf", "linear")
TARGETS = ("shapes/textures", "shapes/outlines", "digits")
# One budget for both heads, fixed beforehand with the linear head.
PRETRAIN = {"batch_size": 64, "epochs": 8, "learning_rate": 0.05}
FINETUNE = {"batch_size": 32, "epochs": 12, "learning_rate": 0.02, "eval_every": 3}


def main():
    import etfzoo
    from etfzoo.data.datasets import DATASETS
    from etfzoo.experiments import html, plots
    from etfzoo.measure import accuracy
    from etfzoo.training import loop, protocols, transfer
    from etfzoo.training.config import TrainConfig

    root = Path(FLAGS.workdir)
    common = {"data_dir": str(root / "data"), "backbone": "rn18", "seed": FLAGS.seed}
    os.makedirs(common["data_dir"], exist_ok=True)

    def config(dataset, task, **values):
        row = DATASETS[dataset]
        return TrainConfig(
            dataset=dataset,
            **(protocols.settings("quickstart", task, "rn18", row) | common | values),
        )

    rows = [["head", "data", "fine-tuned top-1 (95 % interval)", "linear probe", "trSW/trSB"]]
    histories, lines = {}, {}
    for head in HEADS:
        source = str(root / f"source_{head}")
        print(f"\n== pretraining rn18 with the {head} head on shapes/source", flush=True)
        result = loop.train_and_evaluate(
            config("shapes/source", "pretrain", head=head, **PRETRAIN), source
        )
        interval = accuracy.binomial_interval(result["top1"], result["examples"])
        rows.append([head, "shapes/source", _percent(result["top1"], *interval), "", ""])
        lines[head] = [(result["top1"], *interval)]
        histories[f"shapes/source: {head}"] = Workdir(source).history()
        for target in TARGETS:
            workdir = str(root / f"{target.replace('/', '_')}_{head}")
            print(f"\n== fine-tuning the {head} model on {target}", flush=True)
            values = {"head": "linear", "init": source, **FINETUNE}
            tuned = transfer.finetune(config(target, "finetune", **values), workdir)
            probe = transfer.linear_probe(config(target, "finetune", **values), workdir + "_probe")
            interval = accuracy.binomial_interval(tuned["top1"], tuned["examples"])
            ratio = probe.get("nc/test/nc1_ratio_unbiased")
            ratio = "-" if ratio is None else f"{ratio:.2f}"
            probed = f"{100 * probe['top1']:.1f}"
            rows.append([head, target, _percent(tuned["top1"], *interval), probed, ratio])
            lines[head].append((tuned["top1"], *interval))
            histories[f"{target}: {head}"] = Workdir(workdir).history()
    curves = plots.learning_curves(histories)
    shifts = plots.accuracy_by_domain(["shapes/source", *TARGETS], lines)
    plots.save_png(curves, root / "learning_curves.png")
    plots.save_png(shifts, root / "accuracy_by_shift.png")
    note = (
        f"One seed ({FLAGS.seed}), toy images: it shows the machinery, not the paper's claim. "
        "trSW/trSB: scatter within classes over scatter between them, of frozen features on the "
        "target's test split, less what the sampling of class means adds; lower is more collapsed."
    )
    command = ["python", "recipes/demo.py", f"--seed={FLAGS.seed}", f"--workdir={root}"]
    html.write(
        root / "report.html",
        "etfzoo demo: fixed ETF against trainable classifier",
        [
            ("Results", rows),
            ("What this is", note),
            ("Accuracy by shift", shifts),
            ("Learning curves", curves),
            ("Command", (shlex.join(command),)),
        ],
    )
    print(f"\n{html.text_table(rows)}\n{note}")
    print(f"\nreport: {root / 'report.html'}\n")
    _publish_and_classify(etfzoo, root)


def _publish_and_classify(etfzoo, root):
    import numpy as np

    from etfzoo.data import augment, sources

    models = root / "models"
    etfzoo.publish(
        etfzoo.load(root / "source_etf"),
        models / "rn18_etf.shapes",
        version=1,
        provenance={"command": "make demo", "dataset": "shapes/source"},
        metrics=Workdir(root / "source_etf").read_result(),
        overwrite=True,
    )
    os.environ["ETFZOO_HOME"] = str(models)
    model = etfzoo.load("rn18_etf.shapes")
    print(f'published {models}/rn18_etf.shapes/1; etfzoo.load("rn18_etf.shapes") says:')
    source = sources.resolve("shapes/source", str(root / "data"))
    for record in source.records("test", shuffle_seed=FLAGS.seed).take(3):
        height, width = model.spec.input_shape[:2]
        image = augment.evaluation_image(record["image"], height, width, model.spec.crop)
        logits = np.asarray(model(image[None]))[0]
        share = np.exp(logits - logits.max())
        share /= share.sum()
        best = int(share.argmax())
        truth = source.class_names[int(record["label"])]
        print(f"  a {truth}: {model.spec.class_names[best]} ({100 * share[best]:.0f} % sure)")


def _percent(share, low, high):
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def run():
    """Defines the flags and runs the command."""
    flags.path("Files", "workdir", "demo_output", "where everything is written; goes on if stopped")
    flags.seed_flag("of everything that is drawn")
    app.run(main, __doc__)

"""The whole of etfzoo in three to five minutes on two CPU cores, without any download.

Pretrains a ResNet18 with a fixed ETF classifier and with a trainable one on drawn shapes,
fine-tunes both on line drawings and on scanned digits, compares them there, also frozen (k nearest
neighbours, covariance within classes), publishes the ETF model, loads it back by its name and
classifies images with it. Writes report.html.

  python recipes/demo.py --workdir=demo_output
"""

import os
import shlex
from pathlib import Path

from etfzoo.cli import app, flags
from etfzoo.cli.flags import FLAGS, as_started
from etfzoo.workdir import Workdir, folder_name

HEADS = ("etf", "linear")
SOURCE, TARGETS = "shapes/source", ("shapes/outlines", "digits")
NAME = "rn18_etf.shapes"
# One budget for both heads.
PRETRAIN = {"batch_size": 64, "epochs": 2, "learning_rate": 0.01, "eval_every": 2}
FINETUNE = {"batch_size": 32, "epochs": 4, "learning_rate": 0.003, "eval_every": 4}
FEATURES = "features"  # folder of those that were computed, for whoever needs them next
SHOWN = 6  # images of each data set


def main():
    from etfzoo.data import sources
    from etfzoo.experiments import figures, html, plots
    from etfzoo.measure.features import extract
    from etfzoo.models.checkpoint import load_model

    root = Path(FLAGS.workdir)
    data_dir = root / "data"
    os.makedirs(data_dir, exist_ok=True)
    rows = [["head", "data", "top-1 (95 % interval)", "top-1 of k-NN, frozen"]]
    histories, lines, covariances = {}, {}, {}
    for head in HEADS:
        pretrained = _pretrain(head, root, data_dir)
        text, line = _accuracy(pretrained)
        rows.append([head, SOURCE, text, ""])
        lines[head] = [line]
        histories[f"{SOURCE}: {head}"] = pretrained.history()
        for target in TARGETS:
            tuned, neighbours = _transfer(head, target, pretrained, root, data_dir)
            text, line = _accuracy(tuned)
            rows.append([head, target, text, f"{100 * neighbours['top1']:.1f}"])
            lines[head].append(line)
        shifted = sources.resolve(TARGETS[0], str(data_dir))
        found = extract(load_model(pretrained), shifted, "test", cache=root / FEATURES)
        covariances[head] = figures.Covariance.of(*found)
    note = (
        f"One seed ({FLAGS.seed}), drawn images, a budget of seconds: it shows the machinery, not "
        "the paper's claim."
    )
    print(f"\n{html.text_table(rows)}\n{note}\n", flush=True)
    shown = {name: _images(name, data_dir) for name in (SOURCE, *TARGETS)}
    command = ["python", "recipes/demo.py", f"--seed={FLAGS.seed}", f"--workdir={root}"]
    html.write(
        root / "report.html",
        "etfzoo demo: fixed ETF against trainable classifier",
        [
            ("Results", rows),
            (None, note),
            ("Images", html.Gallery("A test image of six classes", _strips(shown))),
            (None, html.Gallery("What the published model says", _published(root, shown[SOURCE]))),
            *_trained_model(),
            ("Accuracy by shift", plots.accuracy_by_domain([SOURCE, *TARGETS], lines)),
            ("Covariance within classes of the frozen features (the paper's Figure 3)",
             figures.covariances({TARGETS[0]: covariances}, "pretrained with either head")),
            ("Learning curves of the pretraining", plots.learning_curves(histories)),
            ("Command", (as_started(shlex.join(command)),)),
        ],
    )  # fmt: skip
    print(f"\nreport: {root / 'report.html'}")


def _config(dataset, task, data_dir, **values):
    from etfzoo.data.datasets import DATASETS
    from etfzoo.training import protocols
    from etfzoo.training.config import TrainConfig

    settings = protocols.settings("quickstart", task, "rn18", DATASETS[dataset])
    common = {"data_dir": str(data_dir), "backbone": "rn18", "seed": FLAGS.seed}
    return TrainConfig(dataset=dataset, **(settings | common | values))


def _pretrain(head, root, data_dir):
    from etfzoo.training import loop

    print(f"\n== pretraining rn18 with the {head} head on {SOURCE}", flush=True)
    workdir = Workdir(root / f"source_{head}")
    loop.train_and_evaluate(_config(SOURCE, "pretrain", data_dir, head=head, **PRETRAIN), workdir)
    return workdir


def _transfer(head, target, pretrained, root, data_dir):
    """The workdir of the fine-tuning, and the result of k-NN on the frozen features."""
    from etfzoo.training import transfer

    print(f"\n== fine-tuning the {head} model on {target}", flush=True)
    values = {"head": "linear", "init": str(pretrained), **FINETUNE}
    config = _config(target, "finetune", data_dir, **values)
    workdir = Workdir(root / f"{folder_name(target)}_{head}")
    transfer.finetune(config, workdir)
    return workdir, transfer.knn(config, f"{workdir}_knn", feature_cache=root / FEATURES)


def _accuracy(workdir):
    """As text, and with its interval as shares of 1."""
    from etfzoo.measure import accuracy

    result = workdir.read_result()
    low, high = accuracy.binomial_interval(result["top1"], result["examples"])
    text = f"{100 * result['top1']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return text, (result["top1"], low, high)


def _images(dataset, data_dir):
    """The first test images of different classes, and what they show."""
    import tensorflow as tf

    from etfzoo.data import sources

    source = sources.resolve(dataset, str(data_dir))
    found = {}
    for record in source.records("test", shuffle_seed=FLAGS.seed):
        name = source.class_names[int(record["label"])]
        found.setdefault(name, tf.io.decode_image(record["image"], channels=3).numpy())
        if len(found) == SHOWN:
            break
    return found


def _strips(shown):
    from etfzoo.experiments import plots

    return [
        (plots.strip(name, [(image, text) for text, image in images.items()]), f"images of {name}")
        for name, images in shown.items()
    ]


def _published(root, images):
    """Publishes the ETF model, loads it by its name and shows what it says about images."""
    import etfzoo
    from etfzoo.experiments import plots
    from etfzoo.training.publish_run import publish_run

    models = root / "models"
    if not (models / NAME / "1").exists():
        print(f"== publishing {models / NAME / '1'}", flush=True)
        publish_run(root / "source_etf", NAME, models, version=1)
    os.environ["ETFZOO_HOME"] = str(models)
    model = etfzoo.load(NAME)
    print(f'etfzoo.load("{NAME}") says:')
    logits = model(etfzoo.preprocess(model, list(images.values())))
    captions = []
    for truth, ((_, label, score),) in zip(
        images, etfzoo.decode_predictions(model, logits, top=1), strict=True
    ):
        print(f"  a {truth}: {label} ({100 * score:.0f} % sure)")
        captions.append(f"{label}\n{100 * score:.0f} %")
    pictures = list(zip(images.values(), captions, strict=True))
    return [(plots.strip(f"{NAME}, predictions", pictures), ", ".join(captions).replace("\n", " "))]


def _trained_model():
    """What a published model that has seen photographs says, where the checkout has one."""
    import etfzoo
    from etfzoo.errors import extra
    from etfzoo.experiments import html, plots

    name = "rn101_etf"
    if etfzoo.info(name)["path"] is None:
        return []
    with extra("train"):
        from sklearn.datasets import load_sample_image

    photographs = [load_sample_image(f) for f in ("china.jpg", "flower.jpg")]
    model = etfzoo.load(name)
    logits = model(etfzoo.preprocess(model, photographs))
    print(f'\netfzoo.load("{name}") says of two photographs that scikit-learn brings:')
    pictures = []
    for photograph, found in zip(
        photographs, etfzoo.decode_predictions(model, logits, top=3), strict=True
    ):
        # of the words for a class the first
        lines = [f"{label.split(',')[0]} ({100 * score:.0f} %)" for _, label, score in found]
        print("  " + ", ".join(lines))
        figure = plots.strip("", [(photograph, "\n".join(lines))], 2.4)
        pictures.append((figure, ", ".join(lines)))
    return [(None, html.Gallery(f"What {name} says about two photographs", pictures))]


def run():
    """Defines the flags and runs the command."""
    flags.path("Files", "workdir", "demo_output", "where everything is written; goes on if stopped")
    flags.seed_flag("of everything that is drawn")
    app.run(main, __doc__)

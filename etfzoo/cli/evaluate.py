"""Evaluates a model: top-1, top-5, mean per-class accuracy, accuracy by class, confusion matrix,
and whether it is as certain as it is right.

  python recipes/evaluate.py --model=runs/my_run --dataset=oxford_flowers102
  python recipes/evaluate.py --model=rn50_etf --dataset=folder:photos --split=test --output=report
  python recipes/evaluate.py --model=runs/my_run --dataset=oxford_flowers102 --ood_dataset=digits

With --ood_dataset also whether it can tell images of that data set from those of its own, by four
scores: the largest probability, the energy, NECO and NCI. That reads the training split too.

Of a model that learned a long tail (--imbalance), also the accuracy of the classes with many (over
100), medium (20 to 100) and few training images; --shots asks for it of any model that tells what
it was trained on. The training images are counted again in the data set that is evaluated on.

Writes metrics.json, per_class.csv, confusion.png and reliability.png, by default into a folder
below runs/evaluate that names the model, its version, the data set and the split. Takes seconds
to minutes.
"""

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS


def main():
    import etfzoo
    from etfzoo import files
    from etfzoo.experiments import plots
    from etfzoo.measure import accuracy, calibration, ood
    from etfzoo.runtime.interruption import exit_if_worker_lost
    from etfzoo.runtime.strategy import chief_first, is_chief, wait_for_all

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    strategy = configs.open_strategy(FLAGS)
    with exit_if_worker_lost(strategy):
        with strategy.scope():
            model = etfzoo.load(FLAGS.model)
        source = chief_first(strategy, lambda: configs.open_source(FLAGS.dataset))
        counts = _training_counts()
        predictions = accuracy.evaluate(
            model, source, FLAGS.split, FLAGS.batch_size, strategy, FLAGS.ignore_class_names
        )
        wait_for_all(strategy)
    foreign = configs.open_source(FLAGS.ood_dataset) if FLAGS.ood_dataset else None
    if not is_chief(strategy):
        return
    metrics = accuracy.summary(predictions, source.num_classes)
    right = predictions.labels == predictions.predicted
    reliability = calibration.reliability(predictions.confidence, right)
    metrics["ece"] = reliability.error
    if counts is not None:
        metrics["shots"] = accuracy.by_shots(predictions.labels, predictions.predicted, counts)
    if foreign is not None:
        found = ood.evaluate(model, source, foreign, FLAGS.batch_size)
        metrics["ood"] = {"dataset": FLAGS.ood_dataset} | found
    low, high = accuracy.binomial_interval(metrics["top1"], metrics["examples"])
    output = files.make_directory(
        FLAGS.output or configs.report_place("evaluate", FLAGS.model, FLAGS.dataset, FLAGS.split)
    )
    accuracy.write_report(output, predictions, source.class_names, metrics)
    plots.confusion_png(
        output / "confusion.png",
        accuracy.confusion_matrix(predictions, source.num_classes),
        source.class_names,
    )
    plots.reliability_png(output / "reliability.png", reliability)
    print(
        f"top-1 {100 * metrics['top1']:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})  "
        f"top-5 {100 * metrics['top5']:.2f} %  mean per-class "
        f"{100 * metrics['mean_per_class']:.2f} %  on {metrics['examples']} images\n"
        f"negative log-likelihood {metrics['loss']:.4f}  calibration error (ECE) "
        f"{100 * metrics['ece']:.2f} %: {100 * predictions.confidence.mean(dtype=float):.2f} % "
        f"certain on average"
    )
    if counts is not None:
        print(_shots_text(metrics["shots"]))
    for name, row in metrics.get("ood", {}).items():
        if name != "dataset":
            print(
                f"{FLAGS.ood_dataset} by {name}: AUROC {100 * row['auroc']:.2f} %, "
                f"{100 * row['fpr95']:.2f} % pass where 95 % of its own images do"
            )
    print(f"written to {output}: metrics.json, per_class.csv, confusion.png, reliability.png")


def _training_counts():
    """Training images of each class where accuracy by their number is wanted; else None."""
    from etfzoo import files
    from etfzoo.data.sources import resolve
    from etfzoo.errors import EtfzooError
    from etfzoo.progress import notify
    from etfzoo.training import build

    asked = FLAGS.shots
    if asked is False:
        return None
    try:
        config, workdir = configs.trained_with(FLAGS.model)
    except EtfzooError:
        if asked:
            raise
        return None  # it can be evaluated all the same
    if not asked and (config is None or config.imbalance == 1):
        return None
    if config is None:
        why = f"{FLAGS.model} does not tell what it was trained on"
    elif files.strip_local_folder(config.dataset) != files.strip_local_folder(FLAGS.dataset):
        why = f"{FLAGS.model} was trained on {config.dataset}, not on {FLAGS.dataset}"
    else:
        source = build.run_source(config, resolve(FLAGS.dataset, FLAGS.data_dir), workdir, False)
        return source.class_counts(config.train_split)
    if asked:
        raise EtfzooError(f"{why}: leave out `shots`")
    notify("no accuracy by number of training images: %s", why)
    return None


def _shots_text(shots) -> str:
    """One line; groups without classes are left out."""
    return "  ".join(
        f"{name}-shot {100 * row['accuracy']:.2f} % ({row['classes']} classes)"
        for name, row in shots.items()
        if row["classes"]
    )


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.data_flags("imagenet2012")
    flags.class_names_flag()
    flags.string(
        "Data",
        "split",
        "test",
        "a split, or a role: train, fit, select or test; several as train+test; all",
    )
    flags.boolean(
        "Data",
        "shots",
        None,
        "accuracy of classes with many, medium and few training images, as the model's run had "
        "them (default: where it learned a long tail)",
    )
    flags.string("Data", "ood_dataset", None, "a data set of other things, to be told apart")
    flags.batch_flag(128)
    flags.strategy_flags()
    flags.path("Files", "output", None, "directory of the report (default: below runs/evaluate)")
    app.run(main, __doc__)

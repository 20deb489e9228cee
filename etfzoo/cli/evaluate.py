"""Evaluates a model: top-1, top-5, mean per-class accuracy, accuracy by class, confusion matrix,
and whether it is as certain as it is right.

  python recipes/evaluate.py --model=runs/my_run --dataset=oxford_flowers102
  python recipes/evaluate.py --model=rn50_etf --dataset=folder:photos --split=test --output=report
  python recipes/evaluate.py --model=runs/my_run --dataset=oxford_flowers102 --ood_dataset=digits

With --ood_dataset also whether it can tell images of that data set (or of several) from those of
its own, by four scores: the largest probability, the energy, NECO and NCI. That reads the training
split too, or what is left of it where the model learned a long tail of it.

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
    from etfzoo.training import evaluation

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    strategy = configs.open_strategy(FLAGS)
    with exit_if_worker_lost(strategy):
        with strategy.scope():
            model = etfzoo.load(FLAGS.model)
        source = chief_first(strategy, lambda: configs.open_source(FLAGS.dataset))
        seen = _seen_in_training(source)
        predictions = accuracy.evaluate(
            model, source, FLAGS.split, FLAGS.batch_size, strategy, FLAGS.ignore_class_names
        )
        wait_for_all(strategy)
    foreign = {name: configs.open_source(name) for name in FLAGS.ood_dataset or ()}
    if not is_chief(strategy):
        return
    by_shots = FLAGS.shots or (FLAGS.shots is None and seen is not None and seen.is_tail)
    metrics = evaluation.figures(
        predictions, source.num_classes, seen.counts() if by_shots else None
    )
    if foreign:
        known, split = (seen.source, seen.split) if seen else (source, "train")
        metrics["ood"] = ood.evaluate(model, known, foreign, FLAGS.batch_size, split)
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
    right = predictions.labels == predictions.predicted
    reliability = calibration.reliability(predictions.confidence, right)
    plots.reliability_png(output / "reliability.png", reliability)
    print(
        f"top-1 {100 * metrics['top1']:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})  "
        f"top-5 {100 * metrics['top5']:.2f} %  mean per-class "
        f"{100 * metrics['mean_per_class']:.2f} %  on {metrics['examples']} images\n"
        f"negative log-likelihood {metrics['loss']:.4f}  calibration error (ECE) "
        f"{100 * metrics['ece']:.2f} %: {100 * predictions.confidence.mean(dtype=float):.2f} % "
        f"certain on average"
    )
    if by_shots:
        print(_shots_text(metrics["shots"]))
    for name, by_score in metrics.get("ood", {}).items():
        for score, row in by_score.items():
            print(
                f"{name} by {score}: AUROC {100 * row['auroc']:.2f} %, "
                f"{100 * row['fpr95']:.2f} % pass where 95 % of its own images do"
            )
    print(f"written to {output}: metrics.json, per_class.csv, confusion.png, reliability.png")


def _seen_in_training(source):
    """What the model was trained on, where that is asked for and known."""
    from etfzoo.errors import EtfzooError
    from etfzoo.training import evaluation

    if FLAGS.shots is False and not FLAGS.ood_dataset:
        return None
    try:
        return evaluation.seen_in_training(FLAGS.model, FLAGS.dataset, source, bool(FLAGS.shots))
    except EtfzooError as error:
        raise EtfzooError(f"{error}: leave out `shots`") from error


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
    flags.strings(
        "Data", "ood_dataset", None, "a data set of other things, to be told apart, or several"
    )
    flags.batch_flag(128)
    flags.strategy_flags()
    flags.path("Files", "output", None, "directory of the report (default: below runs/evaluate)")
    app.run(main, __doc__)

"""Evaluates a model: top-1, top-5, mean per-class accuracy, accuracy by class, confusion matrix.

  python recipes/evaluate.py --model=runs/my_run --dataset=oxford_flowers102
  python recipes/evaluate.py --model=rn50_etf --dataset=folder:photos --split=test --output=report

Writes metrics.json, per_class.csv and confusion.png. Takes seconds to minutes.
"""

import os

import cli
from cli import FLAGS


def main():
    import etfzoo
    from etfzoo import evaluation, files, plots
    from etfzoo.data import sources
    from etfzoo.interruption import leaving_when_a_worker_is_lost
    from etfzoo.strategy import chief_first, is_chief, wait_for_all

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    strategy = cli.open_strategy(FLAGS)
    with strategy.scope():
        model = etfzoo.load(FLAGS.model)
    with leaving_when_a_worker_is_lost(strategy):
        source = chief_first(strategy, lambda: sources.resolve(FLAGS.dataset, FLAGS.data_dir))
        predictions = evaluation.evaluate(model, source, FLAGS.split, FLAGS.batch_size, strategy)
        wait_for_all(strategy)
    if not is_chief(strategy):
        return
    metrics = evaluation.summary(predictions, source.num_classes)
    low, high = evaluation.binomial_interval(metrics["top1"], metrics["examples"])
    output = files.make_directory(
        FLAGS.output or f"runs/evaluate/{os.path.basename(FLAGS.model.rstrip('/'))}"
    )
    evaluation.write_report(output, predictions, source.class_names, metrics)
    plots.confusion_png(
        output / "confusion.png",
        evaluation.confusion_matrix(predictions, source.num_classes),
        source.class_names,
    )
    print(
        f"top-1 {100 * metrics['top1']:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})  "
        f"top-5 {100 * metrics['top5']:.2f} %  mean per-class "
        f"{100 * metrics['mean_per_class']:.2f} %  on {metrics['examples']} images\n"
        f"written to {output}: metrics.json, per_class.csv, confusion.png"
    )


if __name__ == "__main__":
    cli.string("Model", "model", None, "a workdir, a published folder or a name of the zoo")
    cli.data_flags("imagenet2012")
    cli.string("Data", "split", "test", "a split, or a role: train, fit, select or test")
    cli.integer("Machine", "batch_size", 128, "images a step, over all devices")
    cli.strategy_flags()
    cli.string("Files", "output", None, "directory of the report (default: below runs/evaluate)")
    cli.run(main, __doc__)

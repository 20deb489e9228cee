"""Measures neural collapse of a model's features on a data set: NC1 to NC5, CDNV, tr(C)/p.

  python recipes/neural_collapse.py --model=runs/my_run --dataset=oxford_flowers102
  python recipes/neural_collapse.py --model=rn50_etf --dataset=cifar10 --split=test
  python recipes/neural_collapse.py --model=runs/my_run --dataset=cifar10 --ood_dataset=svhn_cropped

Prints a table and writes json. What each measure is: see etfzoo/measure/neural_collapse.py. nc3 and
nc4 compare the classifier with the class means, and need a model of the classes of the data. Behind
a projector the classifier acts on its output: --tap=projected measures that and not the features.
Of a model that learned a long tail of the data, the training split is that tail.
Splits differ in size, which nc1, nc1_ratio, cdnv and tr(C)/p depend on: of several splits the table
has their unbiased forms, and as nc1_equal NC1 on equally many images of each class. The json has
all.
"""

import json
import os

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS


def main():
    import etfzoo
    from etfzoo import files
    from etfzoo.data.pipeline import evaluation_pipeline
    from etfzoo.experiments import html
    from etfzoo.measure import features
    from etfzoo.runtime.interruption import exit_if_worker_lost
    from etfzoo.runtime.strategy import check_batch_size, chief_first, is_chief, wait_for_all
    from etfzoo.training import evaluation

    if not FLAGS.model:
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    data = [FLAGS.dataset, *FLAGS.split]
    data += [f"ood_{FLAGS.ood_dataset}"] if FLAGS.ood_dataset else []
    data += [FLAGS.tap] if FLAGS.tap != "features" else []
    output = FLAGS.output or f"{configs.report_place('neural_collapse', FLAGS.model, *data)}.json"
    files.destination(output)  # said before minutes of measuring
    strategy = configs.open_strategy(FLAGS)
    with exit_if_worker_lost(strategy):
        check_batch_size(FLAGS.batch_size, strategy)
        with strategy.scope():
            model = etfzoo.load(FLAGS.model)
        extractor = features.Extractor(model, strategy, FLAGS.tap)

        def load(source, split):
            pipeline = evaluation_pipeline(model.spec, source, FLAGS.batch_size)
            return extractor.load(pipeline, split, FLAGS.feature_cache or None)

        def opened(name):
            return chief_first(strategy, lambda: configs.open_source(name))

        ood = load(opened(FLAGS.ood_dataset), "test") if FLAGS.ood_dataset else None
        sets, results, source, imbalance = {}, {}, opened(FLAGS.dataset), 1.0
        seen = evaluation.seen_in_training(FLAGS.model, FLAGS.dataset, source)
        if seen is not None and seen.is_tail:
            source, imbalance = seen.source, seen.imbalance
        for split in FLAGS.split:
            sets[split] = load(source, split)
        if is_chief(strategy):
            head = _classifier(model, source)
            for split, found in sets.items():
                results[split] = features.collapse(found, source.num_classes, head, ood)
            for split, value in features.equal_nc1(sets, source.num_classes).items():
                results[split]["nc1_equal"] = value
        wait_for_all(strategy)
    if not is_chief(strategy):
        return
    names = list(dict.fromkeys(name for result in results.values() for name in result))
    if len(results) > 1:
        names = features.comparable(names)
    rows = [["measure", *results]]
    rows += [[name, *(_text(result.get(name)) for result in results.values())] for name in names]
    print(html.text_table(rows))
    files.make_directory(os.path.dirname(output) or ".")
    document = {"model": FLAGS.model, "dataset": FLAGS.dataset, "ood_dataset": FLAGS.ood_dataset}
    document |= {"tap": FLAGS.tap, "etfzoo": etfzoo.__version__, "splits": results}
    document |= {"imbalance": imbalance} if imbalance != 1 else {}
    files.write_text(output, json.dumps(document, indent=2) + "\n")
    print(f"written to {output}")


def _classifier(model, source):
    """The head as weights and biases in the order of the data's classes; None where it has others.

    It must have these alone: the means of some of the classes are centred elsewhere.
    """
    import etfzoo
    from etfzoo.measure import classes, features

    why = "the data set has some of the model's classes only"
    try:
        places = classes.places(model.spec, source, FLAGS.ignore_class_names)
        if len(places) == model.spec.num_classes:
            return tuple(part[places] for part in features.linear_head(model, FLAGS.tap))
    except etfzoo.EtfzooError as error:
        why = flags.as_flags(str(error))
    print(f"nc3 and nc4 are left out: {why}", flush=True)
    return None


def _text(value):
    if isinstance(value, list):
        return f"{len(value)} classes" if value else "none"
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.string(
        "Model", "tap", "features", "features, or projected: what a projector makes of them",
        choices=("features", "projected"),
    )  # fmt: skip
    flags.data_flags("imagenet2012")
    flags.class_names_flag()
    flags.strings("Data", "split", "train,test", "splits or roles (train, fit, select, test)")
    flags.string("Data", "ood_dataset", None, "other data, whose test split nc5 compares with")
    flags.batch_flag(128)
    flags.strategy_flags()
    flags.feature_cache_flag()
    flags.path("Files", "output", None, "json file (default: below runs/neural_collapse)")
    app.run(main, __doc__)

"""Pretrains a KerasCV ResNet with a fixed ETF classifier or with a trainable one.

  python recipes/pretrain.py --head=etf                  # the paper: RN50, ImageNet, 180 epochs
  python recipes/pretrain.py --head=etf --strategy=tpu   # the same on a TPU
  python recipes/pretrain.py --head=linear --norm=sw --protocol=sw_official
  python recipes/pretrain.py --dataset=shapes/source --backbone=rn18 --protocol=quickstart
  python recipes/pretrain.py --dataset=folder:photos --backbone=rn18 --protocol=quickstart

Several learning rates (comma separated): each is trained on one part of the training data and
compared on the other, for --search_epochs; the best is trained again on all of it.

Stop it at any moment and start it again: it goes on at the same step. To expect: see
docs/results.md for measured times and accuracies.
"""

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.models.table import short_name
from etfzoo.workdir import folder_name


def main():
    import etfzoo
    from etfzoo.training.job import Job

    rates = FLAGS.learning_rate or []
    config = configs.train_config("pretrain", **({"learning_rate": rates[0]} if rates else {}))
    configs.open_strategy(config)
    workdir = FLAGS.workdir or (
        f"runs/{folder_name(config.dataset)}_{config.image_size}_"
        f"{short_name(config.backbone)}_{config.head}{'_sw' if config.norm == 'sw' else ''}_"
        f"s{config.seed}"
    )
    layers = config.projector_layers
    kind = "" if config.projector_kind == "trained" else f"{config.projector_kind} "
    parts = [f"{kind}projector of {layers}"] * bool(layers) + [f"{config.head} head", config.norm]
    print(
        f"pretraining {config.backbone} ({', '.join(parts)}) on {config.dataset} at "
        f"{config.image_size} px for {config.epochs} epochs, etfzoo {etfzoo.__version__} -> "
        f"{workdir}",
        flush=True,
    )
    configs.print_assumed(config, "pretrain")
    if FLAGS.profile:
        configs.print_profile(config)
        return
    result = Job(
        config, workdir, learning_rates=rates, widen=FLAGS.widen, search_epochs=FLAGS.search_epochs
    ).run()
    print(
        f"top-1 {100 * result['top1']:.2f} %  top-5 {100 * result['top5']:.2f} %  mean per-class "
        f"{100 * result['mean_per_class']:.2f} %  on {result['examples']} images"
    )
    configs.print_next(
        "finetune", model=workdir, dataset="oxford_flowers102", data_dir=config.data_dir
    )


def run():
    """Defines the flags and runs the command."""
    flags.settings(
        "backbone", "head", "norm", "feature_norm", "frame", "scale", "learn_scale",
        "projector_layers", "projector_width", "projector_kind", "guided", "initializer",
        "zero_gamma", "mean", "std", backbone="rn50", head="etf",
    )  # fmt: skip
    flags.training_flags("paper", "imagenet2012", lists=("learning_rate",))
    flags.boolean("Training", "widen", False, "add rates while the best lies at the grid's edge")
    flags.integer(
        "Training", "search_epochs", None, "epochs of each of several rates", low=1, high=10**6
    )
    flags.profile_flag()
    app.run(main, __doc__)

"""Fine-tunes a pretrained model on another data set, or classifies by its frozen features.

  python recipes/finetune.py --model=runs/my_pretraining --dataset=oxford_flowers102
  python recipes/finetune.py --model=rn50_etf --dataset=cifar10 --mode=linear_probe
  python recipes/finetune.py --model=rn50_etf --dataset=cifar10 --mode=knn
  python recipes/finetune.py --model=DIR --dataset=dtd --learning_rate=0.003,0.01,0.03
  python recipes/finetune.py --model=runs/a --keep_head --dataset=SAME --epochs=20  # goes on

Several learning rates or weight decays (comma separated): each is trained on one part of the
training data and compared on the other; the best is trained again on all of it. With --widen
learning rates are added while the best lies at the edge of the grid. The reported figures are
those of the last epoch on the test split.
"""

import os

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.workdir import folder_name

MODES = ("full", "linear_probe", "knn")


def main():
    import etfzoo
    from etfzoo.training.job import Job

    if not (FLAGS.model or FLAGS.config):
        raise etfzoo.EtfzooError("say which model with --model=WORKDIR, a published folder or name")
    rates, decays = FLAGS.learning_rate or [], FLAGS.weight_decay or []
    config = configs.finetune_config(FLAGS.model, rates, decays)
    name = os.path.basename(str(config.init).rstrip("/"))
    workdir = FLAGS.workdir or (f"runs/{name}/{folder_name(config.dataset)}_{FLAGS.mode}")
    full = FLAGS.mode == "full"
    job = Job(
        config,
        workdir,
        FLAGS.mode,
        rates,
        decays,
        FLAGS.widen,
        feature_cache=None if full else FLAGS.feature_cache or None,
    )
    print(f"{FLAGS.mode} of {config.init} on {config.dataset} -> {workdir}", flush=True)
    if job.mode == "full":
        configs.print_assumed(config, "finetune")
        if FLAGS.profile:
            configs.print_profile(config)
            return
    result = job.run()
    top5 = f"  top-5 {100 * result['top5']:.2f} %" if "top5" in result else ""
    print(
        f"top-1 {100 * result['top1']:.2f} %{top5}  mean per-class "
        f"{100 * result['mean_per_class']:.2f} %  on {result['examples']} images of the "
        f"{config.eval_split} split"
    )
    if job.mode != "knn":  # which leaves no model
        configs.print_next(
            "evaluate", model=workdir, dataset=config.dataset, data_dir=config.data_dir
        )


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.string("Model", "mode", "full", "full, linear_probe or knn", choices=MODES)
    flags.settings("head", "keep_head", head="linear")
    flags.training_flags("standard", "oxford_flowers102", lists=("learning_rate", "weight_decay"))
    flags.feature_cache_flag()
    flags.boolean("Training", "widen", False, "add rates while the best lies at the grid's edge")
    flags.profile_flag()
    app.run(main, __doc__)

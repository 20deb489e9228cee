"""Variants of the classifier: source, targets, collapse, calibration, strangers, in one table.

  python recipes/table_variants.py --quick           # small embedded data, without any download
  python recipes/table_variants.py --dry_run         # the plan: cells, steps, time, commands
  python recipes/table_variants.py --source=tiny_imagenet --targets=oxford_flowers102,cifar100 \\
    --ood_datasets=dtd,svhn_cropped --seeds=0,1 --data_dir=DIR
  python recipes/table_variants.py --methods=linear,etf,etf_l2,etf_projector1 --data_dir=DIR

A trainable classifier and the paper's ETF, and then one change of either: another frame, a norm of
the features, a trained factor, another loss, a projector (etfzoo/experiments/methods.py says what
each name sets). All have the same budget and the same search of the rate. Top-1 on the source,
full fine-tuning and linear probe on the targets, NC1 and CDNV, the calibration error, and how well
the source is told from images of other data sets. Each cell is a workdir and a process of its own;
stop it at any moment, and the same command goes on.
"""

from etfzoo.cli import app
from etfzoo.cli.sweeps import Command

COMMAND = Command(
    "table_variants",
    defaults={
        "source": "tiny_imagenet",
        "targets": "oxford_flowers102,cifar100,dtd",
        "ood_datasets": "digits,shapes/textures",
        "backbones": "rn18",
        "modes": "full,linear_probe",
        "protocol": "small",
        "seeds": "0",
    },
    quick={
        "source": "shapes/source",
        "targets": ["digits"],
        "ood_datasets": ["shapes/textures"],
        "methods": ["linear", "etf", "etf_dot_regression", "etf_projector1"],
        "protocol": "quickstart",
        "epochs": 3,
        "batch_size": 64,
        "source_learning_rate": [0.003, 0.01, 0.03],
        "source_search_epochs": 1,
        "finetune_epochs": 3,
        "learning_rate": [0.003, 0.01, 0.03],
        "finetune_batch_size": 32,
        "eval_every": 3,
        "jobs": 2,
    },
)


def main():
    COMMAND.main()


def run():
    """Defines the flags and runs the command."""
    COMMAND.define()
    app.run(main, __doc__)

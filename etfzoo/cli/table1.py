"""Table 1: backbones x methods x targets x seeds from one command, as tables and a report.

  python recipes/table1.py --quick                   # small embedded data, without any download
  python recipes/table1.py --dry_run                 # the plan: cells, steps, time, commands
  python recipes/table1.py --source=imagenet2012 --data_dir=DIR --workdir=runs/table1
  python recipes/table1.py --source=tiny_imagenet --targets=oxford_flowers102,cifar10 \\
    --backbones=rn18 --protocol=quickstart --data_dir=DIR

Methods: a trainable classifier (linear), one with Switchable Whitening (sw), a fixed ETF (etf), all
under the same settings and with the same search. Each cell is a workdir and a process of its own;
stop it at any moment, and the same command goes on.
"""

from etfzoo.cli import app
from etfzoo.cli.sweeps import Command

COMMAND = Command(
    "table1",
    defaults={
        "source": "imagenet2012",
        "targets": "cifar100,cifar10,stl10,svhn_cropped,oxford_iiit_pet,oxford_flowers102,dtd",
        "backbones": "rn50,rn101",
        "methods": "linear,sw,etf",
        "modes": "full,linear_probe,knn",
        "protocol": "paper_lowres",
        "seeds": "0",
    },
    # Few epochs, and a search of the fine-tuning's rate in each cell.
    quick={
        "source": "shapes/source",
        "targets": ["digits"],
        "backbones": ["rn18"],
        "seeds": [0, 1],
        "protocol": "quickstart",
        "epochs": 3,
        "batch_size": 64,
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

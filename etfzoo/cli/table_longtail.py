"""Long tails: methods x imbalances x seeds from one command, by the size of the classes.

  python recipes/table_longtail.py --quick           # small embedded data, without any download
  python recipes/table_longtail.py --dry_run         # the plan: cells, steps, time, commands
  python recipes/table_longtail.py --source=cifar100 --imbalances=100,10 --seeds=0,1,2 \\
    --data_dir=DIR
  python recipes/table_longtail.py --source=tiny_imagenet --protocol=small --backbones=rn18 \\
    --methods=linear,linear_adjusted,etf --data_dir=DIR

Methods: a trainable classifier and a fixed ETF, each with cross-entropy (linear, etf) and with
logit adjustment (linear_adjusted, etf_adjusted), and the ETF with dot regression
(etf_dot_regression); others by name. Each learns the same long tail of the source, with the rate
that the same search picks for it. Top-1 and mean per-class accuracy on the whole test split, and
the accuracy of classes with many (over 100), medium (20 to 100) and few training images. Each cell
is a workdir and a process of its own; stop it at any moment, and the same command goes on.
"""

from etfzoo.cli import app
from etfzoo.cli.sweeps import Command
from etfzoo.experiments.methods import LONG_TAIL

COMMAND = Command(
    "table_longtail",
    defaults={
        "source": "cifar100",
        "imbalances": "100,10",
        "backbones": "rn18",
        "methods": ",".join(LONG_TAIL),
        "protocol": "paper_lowres",
        "seeds": "0",
    },
    # Of 160 images a class 16 are left to the smallest.
    quick={
        "source": "shapes/source",
        "imbalances": [10],
        "seeds": [0, 1],
        "protocol": "quickstart",
        "epochs": 4,
        "batch_size": 32,
        "source_learning_rate": [0.003, 0.01, 0.03],
        "source_search_epochs": 2,
        "eval_every": 4,
        "jobs": 2,
    },
)


def main():
    COMMAND.main()


def run():
    """Defines the flags and runs the command."""
    COMMAND.define()
    app.run(main, __doc__)

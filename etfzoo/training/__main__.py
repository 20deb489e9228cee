"""`python -m etfzoo.training --config=FILE`: a job from its file, without any flag of its own.

FILE is what `etfzoo.training.job.Job.save` writes, or, with `--workdir=DIR`, the `config.json` of
a run, which is repeated there.
"""

import argparse
import logging
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from etfzoo.errors import EtfzooError  # noqa: E402
from etfzoo.training.config import TrainConfig  # noqa: E402
from etfzoo.training.job import Job  # noqa: E402


def main():
    """Runs the job that the arguments name; bad input ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser("python -m etfzoo.training", description=__doc__)
    parser.add_argument("--config", required=True, help="file of a job or of a run")
    parser.add_argument("--workdir", help="directory of the run, with a run's config.json")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("etfzoo").setLevel(logging.INFO)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        if given.workdir:
            job = Job(TrainConfig.load(given.config), given.workdir)
        else:
            job = Job.load(given.config)
        # Under this name the run's record can be repeated by anybody.
        sys.argv = [f"etfzoo {job.command}", *job.arguments()]
        result = job.run()
    except EtfzooError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(f"top-1 {100 * result['top1']:.2f} % on {result['examples']} images")


if __name__ == "__main__":
    main()

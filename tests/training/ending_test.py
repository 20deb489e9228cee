"""When a run ends: by hand, epoch by epoch."""

import pytest

from etfzoo.training import ending
from etfzoo.training.config import TrainConfig


def history(*scores):
    """A row an epoch; of those without a score none was evaluated."""
    return [
        {"epoch": number} | ({} if score is None else {"top1": score})
        for number, score in enumerate(scores, 1)
    ]


@pytest.mark.parametrize(
    "patience, scores, best, over",
    [
        (0, (0.3, 0.2, 0.1, 0.1), 1, False),
        (0, (0.3, 0.2, 0.1, 0.1, 0.1), 1, True),
        (2, (), None, False),
        (2, (None,), None, False),
        (2, (0.3,), 1, False),
        (2, (0.3, 0.2), 1, False),
        (2, (0.3, 0.2, 0.1), 1, True),
        (2, (0.3, 0.3, 0.3), 1, True),  # as good is not better
        (2, (0.3, 0.2, 0.4), 3, False),
        (2, (0.3, 0.2, 0.4, 0.1, 0.5), 5, True),  # all epochs
        (1, (None, 0.3, None), 2, False),  # at the next evaluation
        (1, (None, 0.3, None, 0.3), 2, True),
        (4, (None, 0.3, None, 0.3), 2, False),
    ],
)
def test_when_it_ends(patience, scores, best, over):
    config = TrainConfig("digits", epochs=5, early_stopping=patience)
    rows = history(*scores)
    assert ending.best_epoch(rows) == (rows[best - 1] if best else None)
    assert ending.ended(config, rows) is over
    if over:
        wanted = rows[best - 1] | {"stopped_after": len(rows)} if patience else rows[-1]
        assert ending.result(config, rows) == wanted

"""Which of equal figures is the best."""

from transformers import TrainerControl, TrainerState

from inft.training.best import criterion_of
from inft.training.callbacks import BestCallback, BestSoFar
from params import SFTParams

CHRF = criterion_of(SFTParams(best_metric="chrf"))


def stored_steps(so_far, figures):
    stored = []
    keep = lambda step, value: stored.append(step)  # noqa: E731
    callback = BestCallback(so_far, keep=keep, patience=0, threshold=0.0, criterion=CHRF)
    for step, (loss, chrf) in enumerate(figures, start=1):
        metrics = {"eval_loss": loss, "eval_chrf": chrf}
        callback.on_evaluate(None, TrainerState(global_step=step, max_steps=99), TrainerControl(), metrics=metrics)
    return stored


def test_a_tie_is_decided_by_the_loss_of_the_adapter_that_is_stored_not_by_the_lowest_seen() -> None:
    assert stored_steps(BestSoFar(), [(2.0, 10.0), (5.0, 20.0), (4.0, 20.0), (4.5, 20.0)]) == [1, 2, 3]


def test_a_checkpoint_that_kept_no_loss_leaves_a_tie_with_the_earlier_one() -> None:
    assert stored_steps(BestSoFar(step=1, value=20.0, reference=20.0), [(0.1, 20.0), (3.0, 21.0)]) == [2]

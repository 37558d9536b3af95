"""Learning-rate schedules: what a step's factor is, and which settings cannot hold together; no torch needed."""

import math
from collections.abc import Callable

from params.encoder import SchedulerParams

WSD_DECAY_SHARE = 0.1  # of max_steps, where scheduler.decay_steps is not set


def make_schedule(scheduler: SchedulerParams, max_steps: int) -> Callable[[int], float]:
    """Return the factor of the peak learning rate at an optimizer step, of which the first is step 1.

    Warm-up is linear: step s of w has s / w, so that no step is wasted at 0. Then cosine and linear fall to
    final_lr_ratio at decay_steps (max_steps without it) and stay there; wsd stays at 1 until its decay_steps last
    steps (a tenth of max_steps without it), over which it falls linearly. Source: Loshchilov and Hutter 2017 (cosine),
    Hu et al. 2024, MiniCPM (wsd).
    """
    start, end = decay_span(scheduler, max_steps)
    floor = scheduler.final_lr_ratio

    def factor(step: int) -> float:
        if step < scheduler.warmup_steps:
            return step / scheduler.warmup_steps
        share = min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)
        left = (1 + math.cos(math.pi * share)) / 2 if scheduler.name == "cosine" else 1 - share
        return floor + (1 - floor) * left

    return factor


def decay_span(scheduler: SchedulerParams, max_steps: int) -> tuple[int, int]:
    """The last step at the peak and the first at the floor."""
    if scheduler.name == "wsd":
        length = scheduler.decay_steps or max(1, round(WSD_DECAY_SHARE * max_steps))
        return max_steps - length, max_steps
    return scheduler.warmup_steps, scheduler.decay_steps or max_steps


def schedule_problems(scheduler: SchedulerParams, max_steps: int) -> list[str]:
    """One message, with its remedy, for each setting of the schedule that cannot hold; empty when all do."""
    warmup, (start, end) = scheduler.warmup_steps, decay_span(scheduler, max_steps)
    if warmup >= max_steps:
        return [
            f"scheduler.warmup_steps {warmup} leaves no step of trainer.max_steps {max_steps} at the peak: lower it (a "
            f"tenth would be {max(1, max_steps // 10)}), or raise trainer.max_steps."
        ]
    if scheduler.name == "wsd" and start < warmup:
        return [
            f"scheduler.decay_steps {end - start} begin at step {start}, before the warm-up ends at step {warmup}: "
            f"lower one of them, or raise trainer.max_steps {max_steps}."
        ]
    if scheduler.name != "wsd" and end <= warmup:
        return [
            f"scheduler.decay_steps {end} is the step at which the decay ends, and the warm-up ends at step {warmup}: "
            "raise it, or lower scheduler.warmup_steps."
        ]
    return []

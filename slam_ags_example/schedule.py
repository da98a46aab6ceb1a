"""What steps, how often, and at which learning rate."""

import math
from collections.abc import Callable

import torch

from slam_ags_example.config import RunConfig
from slam_ags_example.objectives import Objective

__all__ = ["base_optimizer", "steps_per_epoch", "warm_up_then_cosine"]


def base_optimizer(objective: Objective, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` on all that the objective trains."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            trained, lr=config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)


def steps_per_epoch(n_positive: int, n_negative: int, batch_size: int, n_micro: int) -> int:
    """Steps that see every patch once in batches of at most about ``batch_size`` of both tasks."""
    wanted = math.ceil((n_positive + n_negative) / batch_size)
    return max(1, min(wanted, n_positive // (2 * n_micro), n_negative // (2 * n_micro)))


def warm_up_then_cosine(n_steps: int, warm_up: float) -> Callable[[int], float]:
    """Factor on the learning rate: linear up over the first part, half a cosine down to 0."""
    n_warm = max(1, round(warm_up * n_steps))

    def factor(step: int) -> float:
        if step < n_warm:
            return (step + 1) / n_warm
        done = (step - n_warm) / max(1, n_steps - n_warm)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor

"""An aggregator by its name, new or from a saved state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slam_ags_example.config import AGGREGATORS, InputError, one_of
from slam_ags_example.mil.aggregators import (
    FEATURE_RMS,
    Aggregator,
    GatedAttention,
    MaxPooling,
    MeanPooling,
)
from slam_ags_example.mil.pamil import PrototypeAttention

__all__ = ["AGGREGATORS", "N_PROTOTYPES", "build_aggregator", "load_aggregator"]

N_PROTOTYPES = 10


def build_aggregator(
    name: str,
    dim: int,
    *,
    generator: torch.Generator,
    prototypes: Tensor | None = None,
    prototype_prediction: bool = False,
    instance_loss: bool = False,
) -> Aggregator:
    """A new aggregator on the CPU, whose transform is still the identity.

    Args:
        name: one of ``AGGREGATORS``.
        dim: d, features of an embedding.
        generator: a CPU generator, which draws the weights.
        prototypes: [P, d] standardised embeddings that pamil starts from; None draws 10 at random,
            as the authors' script does.
        prototype_prediction: pamil's prototypes vote on the bag too.
        instance_loss: pamil labels the instances at the ends of its attention.

    Raises:
        InputError: there is no aggregator of this name.
    """
    one_of("--aggregator", name, AGGREGATORS)
    if name == "pamil":
        if prototypes is None:
            prototypes = FEATURE_RMS * torch.randn(N_PROTOTYPES, dim, generator=generator)
        return PrototypeAttention(
            prototypes.cpu(),
            generator=generator,
            prototype_prediction=prototype_prediction,
            instance_loss=instance_loss,
        )
    if name == "abmil":
        return GatedAttention(dim, generator=generator)
    return MeanPooling(dim) if name == "mean" else MaxPooling(dim)


def load_aggregator(name: str, state: Mapping[str, Tensor]) -> Aggregator:
    """The trained aggregator, on the CPU, that ``state_dict()`` gave ``state``.

    Raises:
        InputError: there is no aggregator of this name, or the state is another one's.
    """
    random = torch.Generator().manual_seed(0)  # every weight that it draws is overwritten
    try:
        model = build_aggregator(
            name,
            len(state["standardise.centre"]),
            generator=random,
            prototypes=state.get("prototypes"),
            prototype_prediction="vote.weight" in state,
            instance_loss="instance.weight" in state,
        )
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"the saved model is not one of aggregator {name}: give one that the same aggregator "
            "was trained to"
        ) from error
    return model

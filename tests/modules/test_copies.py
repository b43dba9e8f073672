"""Averages of weights, over a clustering, are refused; copies that are something else are not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import MapMismatchError

IDS = random_features({"user": 1000, "day": 7}, 20, 3, seed=0)


def collection() -> CCEEmbeddingBagCollection:
    return CCEEmbeddingBagCollection(tables=[cce(), full()])


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).values().square().sum().backward()
        optimizer.step()


class ByHand(nn.Module):
    """As people write it, with `data`, which autograd does not see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    def update_parameters(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "swa": AveragedModel,
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "by hand": ByHand,
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize(
    "use",
    [
        lambda one: one.module(IDS),
        lambda one: one.state_dict(),
        lambda one: one.module.snapshot(),
        lambda one: one.module.recluster(seed=0),
    ],
    ids=["forward", "state_dict", "snapshot", "recluster"],
)
def test_an_average_over_a_clustering_is_of_no_use(
    average: Callable[[nn.Module], Any], use: Callable[[Any], Any]
) -> None:
    model = collection()
    averaged = average(model)
    train(model)
    averaged.update_parameters(model)
    model.recluster(seed=1)
    use(averaged)  # as it was before
    if not averaged.module.pointer_map("t_user").generation:
        train(model)
        averaged.update_parameters(model)
        with pytest.raises(MapMismatchError, match=r"'t_user': the weights of this copy, .*generation 0.*generation 1"):
            use(averaged)
        again = average(model)
        again.update_parameters(model)
        use(again)


def test_a_copy_that_stays_or_trains_by_itself_is_none_of_an_average() -> None:
    model = collection()
    before, other = copy.deepcopy(model), copy.deepcopy(model)
    embeddings = before(IDS).values()
    train(other)
    model.recluster(seed=1)
    assert torch.equal(before(IDS).values(), embeddings)
    train(other)
    other(IDS)
    other.recluster(seed=2)
    train(model)
    model(IDS)


def test_a_copy_that_catches_up_may_average_again() -> None:
    model = collection()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    model.recluster(seed=1)
    averaged.update_parameters(model)
    averaged.module.attach_pointer_map("t_user", model.pointer_map("t_user"))
    averaged.module.load_state_dict(model.state_dict())
    averaged.update_parameters(model)
    assert torch.allclose(averaged(IDS).values(), model(IDS).values())


def test_weights_that_are_loaded_are_no_average() -> None:
    model = collection()
    saved, other = {name: value.clone() for name, value in model.state_dict().items()}, copy.deepcopy(model)
    train(model)
    model.recluster(seed=1)
    nn.init.ones_(other.ebc.embedding_bags["t_user"].weight)  # as for a reason of one's own
    other.load_state_dict(saved)
    other(IDS)


def test_a_pickle_knows_of_no_copies() -> None:
    model = collection()
    other = pickle.loads(pickle.dumps(model))
    model.recluster(seed=1)
    nn.init.ones_(other.ebc.embedding_bags["t_user"].weight)
    other(IDS)

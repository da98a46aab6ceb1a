"""Groups of some of the ranks, groups without a CPU backend, interrupts, and what is moved."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from training import Network, Setting, batches, full, make, train

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.backward import differentiate
from gradsurgery.distributed.group import Group


def in_halves() -> tuple[Tensor, str]:
    """Ranks 0, 1 and ranks 2, 3 train for themselves; the last makes a mistake."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    half = dist.get_rank() // 2
    network = Network(seed=half)
    optimizer = AdaptiveGradientSurgery(
        torch.optim.SGD(network.parameters(), lr=0.1), process_group=groups[half]
    )
    for batch in batches(3):
        optimizer.zero_grad()
        optimizer.backward(network(batch))
        optimizer.step()
    losses = network(batches(1)[0])
    message = ""
    try:
        optimizer.backward(losses[: 3 - dist.get_rank() // 3])
    except ValueError as error:
        message = str(error)
    return full(network.parameters()), message


def test_groups_of_some_ranks(four: Processes) -> None:
    answers = four(in_halves)
    vectors = [vector for vector, _ in answers]
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[2], vectors[3])
    assert not torch.equal(vectors[0], vectors[2])
    assert [bool(message) for _, message in answers] == [False, False, True, True]
    assert "rank 2 has" in answers[3][1]
    assert "rank 3 has" in answers[3][1]


def outside() -> str:
    group = dist.new_group([0])
    try:
        AdaptiveGradientSurgery(torch.optim.SGD(Network().parameters()), process_group=group)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def test_a_group_without_this_process_is_refused(two: Processes) -> None:
    inside, other = two(outside)
    assert inside == ""
    assert "process_group" in other


def with_backend(name: str) -> tuple[Tensor, bool, float]:
    """A training over gloo that is told another backend, and whether hosts have their own group."""
    described = dist.get_backend_config
    dist.get_backend_config = lambda group=None: name
    try:
        hosts = Group(dist.group.WORLD)._hosts
        seconds = hosts._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        return train(Setting()), hosts is not dist.group.WORLD, seconds
    finally:
        dist.get_backend_config = described


def test_hosts_agree_in_a_group_of_their_own(two: Processes) -> None:
    """As with NCCL alone, which has nothing for the CPU."""
    for vector, own_group, seconds in two(with_backend, "cuda:nccl"):
        assert own_group
        assert seconds == two.seconds
        assert torch.equal(vector, two(train, Setting())[0])


def test_backends_that_average_while_they_reduce(two: Processes) -> None:
    """NCCL's way to send a row, on gloo, which has the same collective."""
    expected = two(train, Setting())[0]
    (first, _, _), (second, own_group, _) = two(with_backend, "cpu:nccl")
    assert not own_group
    assert torch.equal(first, second)
    # The same sums in another order.
    assert (first - expected).norm() < 1e-6 * expected.norm()


def with_large_parameters(setting: Setting) -> Tensor:
    """Every gradient is copied as soon as it is there."""
    limit, differentiate._LARGE = differentiate._LARGE, 1
    try:
        return train(setting)
    finally:
        differentiate._LARGE = limit


@pytest.mark.parametrize("setting", [Setting("ddp"), Setting(micro_batches=3)], ids=str)
def test_large_parameters(two: Processes, setting: Setting) -> None:
    assert torch.equal(two(with_large_parameters, setting)[1], two(train, setting)[0])


def interrupted() -> tuple[str, bool, Tensor]:
    """Ctrl-C on rank 1 inside a backward; the ranks stay in step."""
    network, _, optimizer = make(Setting())
    losses = network(batches(1)[0])

    def interrupt(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    if dist.get_rank() == 1:
        losses[0].register_hook(interrupt)
    said = ""
    try:
        optimizer.backward(losses)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    clean = all(p.grad is None for p in network.parameters())
    optimizer.backward(network(batches(1)[0]))
    return said, clean, torch.cat([p.grad.flatten() for p in network.heads.parameters()])


def test_an_interrupt_on_one_rank(two: Processes) -> None:
    (first, clean, gradient), (second, also_clean, other) = two(interrupted)
    assert first == "RuntimeError: rank 1: KeyboardInterrupt: "
    assert second.startswith("KeyboardInterrupt")
    assert clean
    assert also_clean
    assert torch.equal(gradient, other)


def rows_in_memory(count: int) -> tuple[int, int, int]:
    """Elements of D, of full rows, of parts."""
    network = nn.Linear(100, 100, bias=False)
    nn.init.ones_(network.weight)
    optimizer = AdaptiveGradientSurgery(
        torch.optim.SGD(network.parameters()), process_group=dist.group.WORLD
    )
    out = network(torch.ones(1, 100))
    optimizer.backward([out[0, t] + out.square().sum() for t in range(count)])
    rows = optimizer._surgery._source.rows
    own = sum(part.numel() for part in rows.columns)
    return 10_000, sum(buffer.numel() for buffer in rows.full.buffers), own


@pytest.mark.parametrize("count", [2, 3, 8])
def test_two_full_rows_whatever_the_number_of_tasks(four: Processes, count: int) -> None:
    for width, full_rows, parts in four(rows_in_memory, count):
        # Widths are padded to whole parts of 64 bytes each.
        assert 2 * width <= full_rows <= 2 * (width + 64)
        assert count * width // 4 <= parts <= count * (width + 64) // 4


def loopback_bytes() -> int:
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
    return next(int(words[9]) for words in lines if words[0] == "lo:")


def bytes_of_fully_shard(count: int) -> list[float]:
    """Bytes of all ranks in a step: T backwards alone, and with surgery."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    fully_shard(model)
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.ones(4, 256)
    found: list[float] = []
    for surgery in (False, True):
        least = float("inf")
        for _ in range(5):
            dist.barrier()
            before = loopback_bytes()
            dist.barrier()
            out = model(x)
            losses = [(out[:, t] - t).square().mean() for t in range(count)]
            if surgery:
                optimizer.backward(losses)
            else:
                for loss in losses:
                    loss.backward(retain_graph=True)
            dist.barrier()
            time.sleep(0.02)
            least = min(least, loopback_bytes() - before)
            dist.barrier()
            optimizer.zero_grad()
        found.append(least)
    return found


def test_surgery_on_shards_moves_only_the_gram_matrix(two: Processes) -> None:
    plain, surgery = two(bytes_of_fully_shard, 4)[0]
    # M, agreement and the headers of a few messages: far from a row (526,336 bytes here).
    assert 0 < surgery - plain < 16_384

"""History: records, what is read of them, and what the step does to each task."""

from __future__ import annotations

import gc
import io
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.report import History


class Net(nn.Module):
    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks))
        self.double()

    def losses(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        z = self.trunk(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        return {
            f"task {t}": (head(z) - (-1) ** t * (t + 1)).square().mean()
            for t, head in enumerate(self.heads)
        }


def plugin(model: nn.Module, kind: Any = torch.optim.SGD, **arguments: Any) -> Any:
    return AdaptiveGradientSurgery(kind(model.parameters(), lr=0.01), **arguments)


def train(model: Net, optimizer: Any, steps: range) -> list[Any]:
    reports = []
    for index in steps:
        optimizer.zero_grad()
        optimizer.backward(model.losses(index))
        optimizer.step()
        reports.append(optimizer.last)
    return reports


def test_every_surgery_is_recorded_as_its_report_says() -> None:
    model = Net()
    optimizer = plugin(model)
    with History(optimizer) as history:
        reports = train(model, optimizer, range(4))
    found = history.read()
    assert len(history) == 4
    assert history.names == ("task 0", "task 1", "task 2")
    assert found["step"].tolist() == [0, 1, 2, 3]
    for index, report in enumerate(reports):
        for name in ("gram", "weights", "norms", "cosine", "scale", "cosine_to_sum"):
            assert torch.equal(found[name][index], getattr(report, name)), name
        assert float(found["conflict_rate"][index]) == float(report.conflicts) / 3
    # AGS keeps the sum's length.
    assert (found["scale"] - 1).abs().max() < 1e-9
    train(model, optimizer, range(4, 6))
    assert len(history) == 4


def test_every_nth_and_the_latest() -> None:
    model = Net()
    optimizer = plugin(model)
    thinned, short = History(optimizer, every=3), History(optimizer, capacity=2)
    train(model, optimizer, range(7))
    assert thinned.read()["step"].tolist() == [0, 3, 6]
    assert short.read()["step"].tolist() == [5, 6]


def test_steps_without_a_new_surgery_leave_no_record() -> None:
    model = Net()
    optimizer = plugin(model, every=3)
    history = History(optimizer)
    train(model, optimizer, range(5))
    optimizer.step()
    assert history.read()["step"].tolist() == [0, 3]


def test_other_tasks_have_a_segment_of_their_own_and_go_on_in_it() -> None:
    """Also where loaders alternate; a single task, which is no surgery, leaves no record."""
    model = Net()
    optimizer = plugin(model)
    history = History(optimizer)
    for index in range(7):
        losses = list(model.losses(index).values())
        optimizer.zero_grad()
        optimizer.backward(losses[: 1 if index == 3 else 2 + index % 2])
        optimizer.step()
    two, three = ("task_0", "task_1"), ("task_0", "task_1", "task_2")
    assert history.segments == [two, three]
    assert history.names == two
    assert history.read()["step"].tolist() == [0, 2, 4, 6]
    assert history.read(1)["step"].tolist() == [1, 5]


def test_attached_between_backward_and_step_it_begins_with_the_next_surgery() -> None:
    model = Net()
    optimizer = plugin(model)
    optimizer.backward(model.losses(0))
    history = History(optimizer, step_effect=True)
    optimizer.step()
    assert len(history) == 0
    train(model, optimizer, range(1, 3))
    assert history.read()["step"].tolist() == [1, 2]


def test_a_closure_runs_backward_within_the_step() -> None:
    """Nothing is known before the very first step; then as without a closure."""
    model = Net()
    optimizer = plugin(model)
    history = History(optimizer, step_effect=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = model.losses(0)
        optimizer.backward(losses)
        return sum(loss.detach() for loss in losses.values())

    for _ in range(3):
        optimizer.step(closure)
    found = history.read()
    assert found["effect"][0].isnan().all()
    wanted = -0.01 * (found["gram"] @ found["weights"][..., None])[..., 0]
    # float64; θ + Δθ is rounded at 1e-16 of θ, and Δθ is 1e-2 of it and more.
    torch.testing.assert_close(found["effect"][1:], wanted[1:], rtol=1e-9, atol=1e-12)


def test_two_histories_of_steps_and_one_is_closed() -> None:
    model = Net()
    optimizer = plugin(model)
    first, second = History(optimizer, step_effect=True), History(optimizer, step_effect=True)
    train(model, optimizer, range(2))
    first.close()
    train(model, optimizer, range(2, 4))
    first.close()
    assert second.read()["effect"].isfinite().all()
    assert len(second) == 4
    second.close()
    assert not optimizer._surgery._source.keep_rows


@pytest.mark.parametrize("closed", [False, True])
def test_the_model_does_not_outlive_its_training(closed: bool) -> None:
    model = Net()
    optimizer = plugin(model)
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(2))
    if closed:
        history.close()
    weight = weakref.ref(model.trunk[0].weight)
    del model, optimizer
    gc.collect()
    assert weight() is None
    assert len(history) == 2


def test_methods_that_measure_no_gradients(tmp_path: Path) -> None:
    model = Net()
    optimizer = plugin(model, method="famo")
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(3))
    assert history.read()["conflict_rate"].isnan().all()
    assert history.read()["weights"].isfinite().all()
    assert "nan" not in history.table()
    history.plot(tmp_path / "weights.png")


def test_parts_put_together_are_the_model() -> None:
    """Length and angle of the whole gradient, from the gradients themselves."""
    model, plain = Net(), Net()
    sum(plain.losses(0).values()).backward()
    optimizer = plugin(model, granularity="parameter", scope="all")
    history = History(optimizer)
    train(model, optimizer, range(1))
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    rows = [torch.stack([p.grad.flatten(), q.grad.flatten()]) for p, q in pairs]
    combined, plain_sum = torch.cat(rows, 1)
    turned = torch.nn.functional.cosine_similarity(combined, plain_sum, dim=0)
    header, line = history.table().splitlines()
    assert header.split()[:8] == [
        "step", "conflicts", "lowest", "cos", "length", "cos", "to", "sum"
    ]  # fmt: skip
    # As many digits as the table shows.
    assert float(line.split()[3]) == pytest.approx(
        float(combined.norm() / plain_sum.norm()), rel=5e-3
    )
    assert float(line.split()[4]) == pytest.approx(float(turned), abs=5e-4)


def test_a_state_without_effects_is_refused_where_they_are_recorded() -> None:
    model = Net()
    optimizer = plugin(model)
    history = History(optimizer)
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match="step_effect is True here"):
        History(optimizer, step_effect=True).load_state_dict(history.state_dict())


@pytest.mark.parametrize("granularity", ["group", "parameter"])
def test_parts(granularity: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = plugin(model, granularity=granularity)
    history = History(optimizer)
    train(model, optimizer, range(3))
    parts = 1 if granularity == "group" else 8
    assert history.read()["gram"].shape == (3, parts, 3, 3)
    assert "task 0" in history.table()
    history.plot(tmp_path / "parts.png")


def test_recording_waits_for_nothing() -> None:
    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert "_local_scalar_dense" not in func.name()
            return func(*args, **(kwargs or {}))

    model = Net()
    optimizer = plugin(model)
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    optimizer.backward(model.losses(1))
    with NoReads():
        optimizer.step()
    assert len(history) == 2


@pytest.mark.parametrize("method", ["ags", "pcgrad", "sum"])
def test_the_effect_of_a_plain_step_is_known(method: str) -> None:
    """SGD: Δθ = -lr g, so g_t·Δθ = -lr (Mw)_t."""
    model = Net()
    optimizer = plugin(model, method=method)
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(3))
    found = history.read()
    wanted = -0.01 * (found["gram"] @ found["weights"][..., None])[..., 0]
    torch.testing.assert_close(found["effect"], wanted, rtol=1e-9, atol=1e-12)


def test_the_effect_of_adam_is_that_of_its_own_step() -> None:
    model = Net()
    optimizer = plugin(model, torch.optim.Adam)
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(3))
    trunk = list(model.trunk.parameters())
    losses = model.losses(3)
    each = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()]
    before = [p.detach().clone() for p in trunk]
    train(model, optimizer, range(3, 4))
    wanted = [
        sum(
            float((g * (p.detach() - old)).sum())
            for g, p, old in zip(own, trunk, before, strict=True)
        )
        for own in each
    ]
    assert history.read()["effect"][-1].tolist() == pytest.approx(wanted, rel=1e-9)


def test_a_history_that_watches_steps_changes_no_bit() -> None:
    found = []
    for watched in (False, True):
        model = Net()
        optimizer = plugin(model, torch.optim.Adam)
        if watched:
            History(optimizer, step_effect=True)
        train(model, optimizer, range(4))
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_closing_gives_the_memory_back() -> None:
    model = Net()
    optimizer = plugin(model)
    with History(optimizer, step_effect=True):
        train(model, optimizer, range(2))
        assert optimizer._surgery._source.rows.buffers[0].shape[0] == 4
    train(model, optimizer, range(2))
    assert optimizer._surgery._source.rows.buffers[0].shape[0] == 3


def test_resume() -> None:
    model = Net()
    optimizer = plugin(model)
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    other = History(optimizer, step_effect=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(3, 5))
    for name, value in history.read().items():
        assert torch.equal(value, other.read()[name]), name


def test_table_plot_and_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = plugin(model)
    history = History(optimizer, step_effect=True)
    train(model, optimizer, range(5))
    lines = history.table(last=2).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:4] == ["step", "conflicts", "lowest", "cos"]
    assert lines[-1].split()[0] == "4"
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000

    class Writer:
        def __init__(self) -> None:
            self.seen: dict[str, list[float]] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen.setdefault(name, []).append(value)

    writer = Writer()
    history.write_to(writer)
    assert len(writer.seen["surgery/weights/task 1"]) == 5
    assert "surgery/effect/task 2" in writer.seen
    history.write_to(writer)
    assert len(writer.seen["surgery/weights/task 1"]) == 5
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        history.plot(tmp_path / "other.png")


def test_wrong_arguments() -> None:
    model = Net()
    with pytest.raises(TypeError, match="SGD"):
        History(torch.optim.SGD(model.parameters(), lr=0.1))
    for name in ("every", "capacity"):
        with pytest.raises(ValueError, match=name):
            History(plugin(model), **{name: 0})
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        History(plugin(model)).read()


def test_a_step_that_a_scaler_skips_leaves_no_record() -> None:
    model = Net().float()
    optimizer = plugin(model)
    history = History(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        z = model.trunk(torch.randn(5, 4, generator=generator))
        losses = [head(z).square().mean() for head in model.heads]
        if index == 1:
            losses[0] = losses[0] * float("inf")
        optimizer.zero_grad()
        optimizer.backward(scaler.scale(losses))
        scaler.step(optimizer)
        scaler.update()
    assert len(history) == 2
    assert history.read()["weights"].isfinite().all()

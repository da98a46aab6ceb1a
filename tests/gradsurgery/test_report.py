"""What `optimizer.last` says, and how it looks when it is printed."""

from __future__ import annotations

import torch

from gradsurgery import AdaptiveGradientSurgery, SurgeryReport


def report(count: int) -> SurgeryReport:
    """Unit gradients; every second pair of neighbours conflicts."""
    gram = torch.eye(count, dtype=torch.float64) * 4
    for i in range(0, count - 1, 2):
        gram[i, i + 1] = gram[i + 1, i] = -1.0
    names = tuple(f"task number {i}" for i in range(count))
    return SurgeryReport(names, gram, torch.ones(count, dtype=torch.float64))


def test_norms_cosines_and_conflicts() -> None:
    found = report(5)
    assert found.norms.tolist() == [2.0] * 5
    assert found.cosine[0].tolist() == [1.0, -0.25, 0.0, 0.0, 0.0]
    assert int(found.conflicts) == 2
    assert found.conflicts.dim() == 0


def test_a_zero_gradient_has_no_direction() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = SurgeryReport(("a", "b"), gram, torch.ones(2))
    assert found.cosine.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_table() -> None:
    lines = str(report(3)).splitlines()
    assert lines[0].split("  ")[0].strip() == "task"
    assert "cos task number 2" in lines[0]
    assert lines[1].split() == ["task", "number", "0", "2", "1", "+1.000", "-0.250", "+0.000"]
    assert lines[-1] == "1 of 3 pairs in conflict"


def test_many_tasks_still_fit_on_a_screen() -> None:
    lines = str(report(12)).splitlines()
    assert max(map(len, lines)) <= 160
    assert "cos 12" in lines[0]
    assert lines[12].startswith("12 task number 11")


def test_a_single_loss_has_nothing_to_report() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD([p], lr=0.1))
    assert optimizer.last is None
    optimizer.backward({"only": p.sum()})
    assert optimizer.last is not None
    assert optimizer.last.names == ("only",)
    assert optimizer.last.weights.tolist() == [1.0]
    assert optimizer.last.norms.isnan().all()
    assert str(optimizer.last).endswith("gradients were not measured")
    assert "nan" not in str(optimizer.last)

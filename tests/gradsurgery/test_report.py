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


def parts_report() -> SurgeryReport:
    """Part 1 of 3 has the one conflict; part 2 was not reached."""
    gram = torch.tensor(
        [[[1.0, 0.5], [0.5, 4.0]], [[1.0, -1.0], [-1.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]],
        dtype=torch.float64,
    )
    weights = torch.tensor([[1.0, 1.0], [1.25, 2.0], [1.0, 1.0]], dtype=torch.float64)
    return SurgeryReport(("a", "b"), gram, weights, ("trunk", "neck", "idle"))


def test_scale_and_turnedare_those_of_the_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    found = SurgeryReport(("a", "b", "c"), rows @ rows.mT, weights, tuple("pqrs"))
    combined, plain = (weights[:, None] @ rows)[:, 0], rows.sum(1)
    torch.testing.assert_close(found.scale, combined.norm(dim=1) / plain.norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(combined, plain)
    torch.testing.assert_close(found.cosine_to_sum, cosine)
    # w = 1 takes the same operations, so the ratio is 1 to the bit.
    same = SurgeryReport(found.names, found.gram, torch.ones_like(weights), found.parts)
    assert same.scale.tolist() == [1.0] * 4


def test_parts_have_a_first_dimension_and_the_worst_comes_first() -> None:
    found = parts_report()
    assert found.norms.tolist() == [[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]
    assert found.conflicts.tolist() == [0, 1, 0]
    assert found.cosine[:, 0, 1].tolist() == [0.25, -0.5, 0.0]
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["neck", "idle", "trunk"]
    assert lines[1].split()[1:4] == ["1", "of", "1"]
    assert lines[2].split()[-2:] == ["-", "-"]
    assert lines[-1] == "1 of 3 pairs in conflict"


def test_many_parts_fit_on_a_screen() -> None:
    few = parts_report()
    names = tuple(f"layer {i}" for i in range(60))
    found = SurgeryReport(few.names, few.gram.repeat(20, 1, 1), few.weights.repeat(20, 1), names)
    lines = str(found).splitlines()
    assert lines[-2:] == ["and 48 more parts", "20 of 60 pairs in conflict"]
    assert len(lines) == 15


def test_what_was_not_measured_is_a_dash() -> None:
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    nothing = SurgeryReport(("a", "b"), torch.full((2, 2), torch.nan, dtype=weights.dtype), weights)
    assert "nan" not in str(nothing)
    assert str(nothing).splitlines()[1].split() == ["a", "-", "0.4", "-", "-"]

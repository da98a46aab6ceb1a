"""Checkpoints that earlier versions wrote load, and training goes on as it did there.

At a release, and when the version of the state is raised, write a file beside the others, and
commit it:

    PYTHONPATH=. python tests/gradsurgery/test_checkpoint_file.py

It refuses to overwrite a file. Files of versions that are out are never written again: a
checkpoint of theirs that no longer loads is what this test is there to find.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery
from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.methods import DWA, FAMO, GradVac, Method, Uncertainty, resolve

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("checkpoint_*.pt"))
TASKS, BEFORE, AFTER = 4, 6, 8
# Training is in float64. Another CPU rounds tanh and products otherwise, by 1e-16 in each
# operation (without vector instructions the ends were 1e-16 apart), and eight steps do not make
# 1e-9 of that. What was not loaded showed as 4e-2.
TOLERANCE, SHOWS = 1e-9, 1e-3

# What a release had; methods that came later are not in its file. Some get arguments with which
# their running state shows within a few steps.
METHODS: dict[str, Callable[[], Method]] = {
    **{name: partial(resolve, name) for name in gradsurgery.methods.available()},
    "dwa": lambda: DWA(period=2),
    "famo": lambda: FAMO(lr=0.5),
    "gradvac": lambda: GradVac(beta=0.2),
    "uncertainty": lambda: Uncertainty(lr=0.2),
}


def make_model() -> nn.Module:
    """Its numbers come from the file."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def make_optimizer(model: nn.Module, method: str, seed: int) -> AdaptiveGradientSurgery:
    """AdamW in two groups; the second one with a rate of its own."""
    first, last = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first}, {"params": last, "lr": 0.01}]
    return AdaptiveGradientSurgery(
        torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1), METHODS[method](), seed=seed
    )


def losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Named tasks on the same outputs, pulling apart."""
    out = model(inputs)
    return {
        f"task {index}": (index + 1) * (out - target).square().mean()
        for index, target in enumerate(targets)
    }


def train(model: nn.Module, optimizer: Any, inputs: Tensor, targets: Tensor) -> None:
    """One step for each row of `inputs`."""
    for each in inputs:
        optimizer.zero_grad()
        optimizer.backward(losses(model, each, targets))
        optimizer.step()


def write(file: Path) -> None:
    """One run for each method: its state in the middle, and its parameters at the end.

    The data is in the file too, so that the test does not depend on random numbers of torch.
    """
    stream = torch.Generator().manual_seed(11)
    inputs = torch.randn(BEFORE + AFTER, 6, 3, generator=stream, dtype=torch.float64)
    targets = torch.randn(TASKS, 6, 2, generator=stream, dtype=torch.float64)
    targets[1] = -2 * targets[0]
    saved: dict[str, Any] = {"inputs": inputs, "targets": targets, "runs": {}}
    saved["versions"] = {"gradsurgery": version(), "torch": str(torch.__version__)}
    for method in sorted(gradsurgery.methods.available()):
        torch.manual_seed(5)
        model = make_model()
        optimizer = make_optimizer(model, method, seed=21)
        train(model, optimizer, inputs[:BEFORE], targets)
        # Cloned: what is saved must not move on with the training.
        start = {key: value.clone() for key, value in model.state_dict().items()}
        torch.save(optimizer.state_dict(), file)
        state = torch.load(file, weights_only=True)
        train(model, optimizer, inputs[BEFORE:], targets)
        saved["runs"][method] = {
            "model": start,
            "optimizer": state,
            "expected": model.state_dict(),
            "weights": optimizer.last.weights,
        }
    torch.save(saved, file)


def name() -> str:
    """What this version writes: the library's version and that of its state."""
    state = make_optimizer(make_model(), "sum", seed=0).state_dict()
    number = state["param_groups"][0]["gradient_surgery"]["version"]
    return f"checkpoint_{version()}_state_{number}.pt"


def version() -> str:
    """As in pyproject.toml, which a checkout may be newer in than what is installed."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def saved(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A stored file, read as `torch.load` reads by default."""
    return torch.load(request.param, weights_only=True)


def distance(model: nn.Module, expected: dict[str, Tensor]) -> float:
    """The largest difference of any parameter."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def resume(saved: dict[str, Any], method: str, *, forget: str = "") -> float:
    """Load, go on, and return how far the end is from the stored one; `forget`: load without."""
    run = saved["runs"][method]
    model = make_model()
    optimizer = make_optimizer(model, method, seed=99)
    model.load_state_dict(run["model"])
    groups = [dict(group) for group in run["optimizer"]["param_groups"]]
    if forget == "surgery":
        del groups[0]["gradient_surgery"]
    elif forget:
        fresh = optimizer.state_dict()["param_groups"][0]["gradient_surgery"][forget]
        groups[0]["gradient_surgery"] = groups[0]["gradient_surgery"] | {forget: fresh}
    optimizer.load_state_dict({**run["optimizer"], "param_groups": groups})
    assert distance(model, run["expected"]) > 1e-2
    train(model, optimizer, saved["inputs"][BEFORE:], saved["targets"])
    if not forget:
        weights = optimizer.last.weights
        torch.testing.assert_close(weights, run["weights"], rtol=0, atol=TOLERANCE)
    return distance(model, run["expected"])


def test_there_are_files_of_the_first_version_and_of_this_one() -> None:
    """And no file is empty: each holds every method of its version."""
    assert "checkpoint_0.1.0_state_1" in {file.stem for file in FILES}
    assert name() in {file.name for file in FILES}, "this version has no file yet: see above"
    for file in FILES:
        runs = torch.load(file, weights_only=True)["runs"]
        assert {"ags", "gradvac", "pcgrad"} <= set(runs)
        assert set(runs) <= set(gradsurgery.methods.available())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_stored_checkpoint_goes_on(saved: dict[str, Any], method: str) -> None:
    """Eight steps after loading, parameters and task weights are the stored ones."""
    if method not in saved["runs"]:
        pytest.skip(f"{saved['versions']['gradsurgery']} had no {method}")
    found = resume(saved, method)
    print(f"\n{method}: {found:.1e} from what {saved['versions']} stored")
    assert found <= TOLERANCE


@pytest.mark.parametrize(
    ("method", "forget"),
    [
        ("ags", "surgery"),
        ("pcgrad", "order"),
        ("gradvac", "order"),
        ("gradvac", "method_state"),
        ("cr_mogm", "method_state"),
        ("dwa", "method_state"),
        ("famo", "method_state"),
        ("uncertainty", "method_state"),
        ("random", "order"),
    ],
)
def test_a_part_that_is_not_loaded_shows(saved: dict[str, Any], method: str, forget: str) -> None:
    """The stored runs need everything that is in the state: the test above can fail."""
    if method not in saved["runs"]:
        pytest.skip(f"{saved['versions']['gradsurgery']} had no {method}")
    assert resume(saved, method, forget=forget) > SHOWS


if __name__ == "__main__":
    path = DATA / name()
    if path.exists():
        sys.exit(f"{path} is there already")
    write(path)

"""Without a GPU: every Triton kernel compiles for sm_80 and sm_90, and runs in the interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

compiled = pytest.importorskip("compiled")
triton_rows = pytest.importorskip("gradsurgery.kernels.triton_rows")
triton_tasks = pytest.importorskip("gradsurgery.kernels.triton_tasks")
triton_barrier = pytest.importorskip("gradsurgery.kernels.triton_barrier")
triton_spectral = pytest.importorskip("gradsurgery.kernels.triton_spectral")

HERE = Path(__file__).parent
TYPES = ["fp16", "bf16", "fp32", "fp64"]


CAPABILITIES = [pytest.param(80, marks=pytest.mark.slow), 90]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [2, 7, 16, 64])
def test_kernels_on_rows_compile(count: int, dtype: str, capability: int) -> None:
    import triton.language as tl

    padded = triton.next_power_of_2(count)
    rows, number, index = f"*{dtype}", "*fp64", "*i64"
    double = dtype == "fp64"
    in_float64 = double or count <= 8 or dtype == "fp32"
    # A few columns are summed in float64; many need 64-bit offsets.
    for size, wide, segmented in (
        ("i32", in_float64, False),
        ("i64", double, False),
        ("i32", in_float64, True),
    ):
        tile = triton_rows._tile(count, wide)
        constants = {
            "P": padded,
            "B": tile.columns,
            "INNER": tile.inner,
            "ACC": tl.float64 if wide else tl.float32,
            "SEGMENTED": segmented,
            "WEIGHTED": segmented,
        }
        # Factors for the columns are float32, and float64 for float64 rows.
        roots = "*fp64" if double else "*fp32"
        types = [rows, roots, index, number, size, size, "i32", "i32"]
        if padded > 8:
            kernel = triton_rows.gram_by_products
            short = dtype in ("fp16", "bf16") and not segmented
            constants["PRECISION"] = "tf32" if short else "tf32x3"
        else:
            kernel = triton_rows.gram_by_lanes
        assert compiled.compiled(kernel, types, constants, capability)
        wider = tl.float64 if dtype in ("fp32", "fp64") else tl.float32
        constants = {"B": triton_rows.COMBINE_COLUMNS, "ACC": wider, "SEGMENTED": segmented}
        types = [rows, number, rows, index, index, size, size, "i32", "i32", "i32"]
        assert compiled.compiled(triton_rows.combine_rows, types, constants, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("count", [2, 64])
def test_small_kernels_compile(count: int, capability: int) -> None:
    padded = triton.next_power_of_2(count)
    sizes: dict[str, Any] = {"T": count, "P": padded}
    number, order = "*fp64", "*i64"
    limits = {"LIMIT": math.inf, "NOISE": 1e-8}
    cases: list[tuple[Any, list[str], dict[str, Any]]] = [
        (triton_tasks.project_all, [number, order, number], {**limits, "RESCALE": False, **sizes}),
        (triton_tasks.project_all, [number, order, number], {**limits, "RESCALE": True, **sizes}),
        (
            triton_tasks.vaccinate_row,
            [number, order, number, number],
            {"BETA": 0.01, "MOST": 1 - 1e-6, **sizes},
        ),
        (triton_tasks.sum_rows, [number, number], sizes),
        (triton_tasks.rescale_one, [number] * 3, {"LIMIT": 2.0, "NOISE": 1e-8, **sizes}),
    ]
    for segmented in (True, False):
        constants = {"P": padded, "N": 1024 // padded, "SEGMENTED": segmented}
        types = [number, number, order, "i32", "i32"]
        cases.append((triton_rows.sum_partials, types, constants))
    for shared in (True, False):
        types, constants = [order, "i32", order, "i32"], {"SHARED": shared, **sizes}
        cases.append((triton_tasks.random_orders, types, constants))
    for kernel, types, constants in cases:
        assert compiled.compiled(kernel, types, constants, capability)


@pytest.mark.parametrize("capability", [*CAPABILITIES, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [2, 8, 64])
def test_solvers_in_one_launch_compile(count: int, capability: int, tmp_path: Path) -> None:
    sizes = triton_tasks._sizes(count)
    warps = sizes.pop("num_warps")
    numbers = {"TOLERANCE": 1e-10, "NOISE": 1e-14}
    for kernel, constants in (
        (triton_barrier.balance_one, {"EXPONENT": 0.5, "RIDGE": 1e-12}),
        (triton_spectral.imtl_g_one, numbers),
        (triton_spectral.config_one, numbers),
        (triton_spectral.gradops_one, numbers),
        (triton_spectral.aligned_mtl_one, {"TOLERANCE": 1e-13}),
    ):
        code = compiled.compiled(kernel, ["*fp64"] * 2, constants | sizes, capability, warps)
        # A thread holds 128 bytes of a matrix of 64 × 64; what is too much stays in the cache.
        assert compiled.resources(code, tmp_path).stack <= (1024 if count == 64 else 64)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_triton.py", "test_triton_spectral.py"])
def test_kernels_in_the_interpreter(file: str) -> None:
    """In a process where Triton runs on the CPU from the start."""
    pytest.importorskip("numpy")
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / file)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout

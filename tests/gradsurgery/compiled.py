"""Triton kernels compiled without a GPU, and what their machine code takes of one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import triton

__all__ = ["Resources", "compiled", "resources"]


class Resources(NamedTuple):
    """Of one thread: registers, and bytes of memory that stands in for registers."""

    registers: int
    stack: int


def compiled(
    kernel: Any,
    types: list[str],
    constants: dict[str, Any],
    capability: int,
    num_warps: int | None = None,
) -> bytes:
    """The machine code of a kernel, as its launch with arguments of these types would make it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature=ordered, constexprs=constants)
    options = {} if num_warps is None else {"num_warps": num_warps}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # What an H100 has for one block; an A100 has 163 KiB.
    assert built.metadata.shared <= 160 * 1024
    code: bytes = built.asm["cubin"]
    return code


def resources(code: bytes, folder: Path) -> Resources:
    """Read from machine code by a tool that comes with Triton; `folder` is for its input."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    text = subprocess.run(
        [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    [(registers, stack, local)] = re.findall(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", text)
    return Resources(int(registers), int(stack) + int(local))

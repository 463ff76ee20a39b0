"""Compile every Triton kernel for real GPUs without one, and hold what comes out under the cards' limits.

Each kernel × tile × dtype × architecture is compiled to a cubin; registers and spills are read from it, shared memory
from Triton, 16-byte loads and stores from the disassembly. A room states its kernels in ``parity_tests/kernel_specs``.

Run: python -m parity_tests.kernels (in a process without TRITON_INTERPRET).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parity_tests.kernel_specs import KernelSpec, specs
from so8t_torch.core.launch import Tile

CAPABILITIES = (80, 86, 89, 90)
SHARED_LIMIT = 101_376
"""Bytes of shared memory per block on sm_86 and sm_89, the smallest of the cards served."""
REGISTER_LIMIT = 255
OPCODE = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.[A-Z0-9_]+)*)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """What one compilation came to."""

    kernel: str
    tile: str
    element: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    wide_loads: int
    wide_stores: int
    problems: tuple[str, ...]


def gate(kernels: Iterable[KernelSpec], capabilities: Iterable[int] = CAPABILITIES) -> list[KernelRow]:
    """Compile each kernel × tile × element type × architecture and say what breaks a limit.

    Raises:
        RuntimeError: kernels were decorated in a process with TRITON_INTERPRET=1 and cannot be compiled.
    """
    tasks = [
        (spec, tile, element, capability)
        for spec in map(_compilable, kernels)
        for capability in capabilities
        for tile, element in _variants(spec)
    ]
    # Kernels do not pickle: a forked process finds the tasks where they are and is told a number.
    _TASKS[:] = tasks
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_task, range(len(tasks)), chunksize=4))


_TASKS: list[tuple[KernelSpec, Tile, str, int]] = []


def _compile_task(number: int) -> KernelRow:
    return _compile(*_TASKS[number])


def _compilable(spec: KernelSpec) -> KernelSpec:
    if not isinstance(spec.kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"{spec.room}: expected a compiled kernel, got {type(spec.kernel).__name__}; "
            "run this in a process started without TRITON_INTERPRET"
        )
    return spec


def _variants(spec: KernelSpec) -> Iterator[tuple[Tile, str]]:
    for tile in spec.tiles:
        for element in spec.elements:
            yield tile, element


def _compile(spec: KernelSpec, tile: Tile, element: str, capability: int) -> KernelRow:
    compiled = triton.compile(
        _source(spec, tile, element),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    registers, stack, local, counts = _inspect(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    wide = {name: sum(n for op, n in counts.items() if op.startswith(name) and ".128" in op) for name in ("LDG", "STG")}
    problems = [
        *([f"spills: {stack} B of stack, {local} B of local memory"] if stack or local else []),
        *([f"shared memory {shared} B, limit {SHARED_LIMIT} B"] if shared > SHARED_LIMIT else []),
        *([f"{registers} registers, limit {REGISTER_LIMIT}"] if registers > REGISTER_LIMIT else []),
        *(
            [f"{wide['LDG']} loads of 16 B, expected {spec.wide_loads} or more"]
            if wide["LDG"] < spec.wide_loads
            else []
        ),
        *(
            [f"{wide['STG']} stores of 16 B, expected {spec.wide_stores} or more"]
            if wide["STG"] < spec.wide_stores
            else []
        ),
    ]
    return KernelRow(
        kernel=f"{spec.room}.{spec.kernel.__name__}",
        tile=f"{' '.join(f'{k}={v}' for k, v in tile.constants.items())} warps={tile.warps}",
        element=element,
        capability=capability,
        registers=registers,
        stack=stack,
        local=local,
        shared=shared,
        wide_loads=wide["LDG"],
        wide_stores=wide["STG"],
        problems=tuple(problems),
    )


def _source(spec: KernelSpec, tile: Tile, element: str) -> ASTSource:
    """Return the kernel specialised as a launch would: pointers, and integers marked ``:16``, divisible by 16."""
    constants = {**spec.constants, **tile.constants}
    signature, divisible = {}, {}
    for position, name in enumerate(spec.kernel.arg_names):
        kind = "constexpr" if name in constants else spec.signature[name]
        signature[name] = f"*{element}" if kind == "*" else kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            divisible[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=divisible)


def _inspect(cubin: bytes) -> tuple[int, int, int, dict[str, int]]:
    """Return registers, stack bytes, local bytes, and how often each opcode occurs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = USAGE.search(_tool("cuobjdump", "-res-usage", path))
        listing = _tool("nvdisasm", "-c", path)
    if usage is None:
        raise RuntimeError(
            "expected register, stack and local usage from cuobjdump, found none; was its output changed?"
        )
    counts: dict[str, int] = {}
    for opcode in OPCODE.findall(listing):
        counts[opcode] = counts.get(opcode, 0) + 1
    registers, stack, local = (int(value) for value in usage.groups())
    return registers, stack, local, counts


def _tool(name: str, *arguments: object) -> str:
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Print the table and return 1 when a limit is broken."""
    rows = gate(specs())
    table = Table(title="Triton kernels, compiled without a GPU")
    for heading in (
        "kernel",
        "tile",
        "element",
        "sm",
        "registers",
        "spills B",
        "shared B",
        "LDG.128",
        "STG.128",
        "verdict",
    ):
        table.add_column(heading, justify="left" if heading in ("kernel", "tile", "element", "verdict") else "right")
    for row in rows:
        verdict = "[green]pass[/green]" if not row.problems else f"[red]{'; '.join(row.problems)}[/red]"
        figures = (row.capability, row.registers, row.stack + row.local, row.shared, row.wide_loads, row.wide_stores)
        table.add_row(row.kernel, row.tile, row.element, *map(str, figures), verdict)
    failed = sum(bool(row.problems) for row in rows)
    console = Console()
    console.print(table)
    console.print(f"{len(rows)} compilations, {failed} over a limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""A classifier to ``pt2``: torch.export's program, or compiled by AOTInductor for this machine."""

import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from trainkit.export.archive import copy_archive
from trainkit.export.quiet import quiet_exporter
from trainkit.serve.errors import InputError

# Of a node's record, what names this machine's source files and the author's classes.
TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_program(model: nn.Module, example: Sequence[Tensor], path: Path) -> None:
    """Write ``model`` as a torch.export program; both axes dynamic, no source paths inside."""
    torch.export.save(_program(model, example), path)


def compile_program(model: nn.Module, example: Sequence[Tensor], path: Path) -> None:
    """Compile ``model`` to machine code with AOTInductor; it runs on processors like this one.

    Raises InputError if there is no C++ compiler.
    """
    program = _program(model, example)
    with quiet_exporter(), tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / path.name
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        except torch._inductor.exc.InvalidCxxCompiler:
            raise InputError(
                "AOTInductor needs a C++ compiler and found none; install g++ or clang, or export "
                "--format pt2, which needs none."
            ) from None
        copy_archive(package, path, _without_paths)


def _without_paths(name: str, record: bytes) -> bytes | None:
    """Leave out the generated C++, and the libraries' debug symbols: both name source files."""
    if name.endswith(".cpp"):
        return None
    if not name.endswith(".so"):
        return record
    with tempfile.NamedTemporaryFile(suffix=".so") as library:
        library.write(record)
        library.flush()
        # Of the binutils, without which no compiler links anything.
        subprocess.run(["strip", "--strip-unneeded", library.name], check=True)
        stripped = Path(library.name).read_bytes()
    # What is left stands in the texts of assertions; the length of a text must stay.
    for folder in (str(Path(torch.__file__).parents[1]), cache_dir()):
        stripped = stripped.replace(folder.encode(), b"_" * len(folder.encode()))
    return stripped


def _program(model: nn.Module, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with quiet_exporter(), torch.no_grad():
        program = torch.export.export(
            model.eval(), tuple(example), dynamic_shapes=tuple(dynamic for _ in example)
        )
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for trace in TRACES:
                node.meta.pop(trace, None)
    return program


def this_machine() -> dict[str, Any]:
    """Name what compiled code depends on."""
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }

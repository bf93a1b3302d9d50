"""``trainkit env``."""

from typing import TYPE_CHECKING

from trainkit.commands.common import json_option, print_json
from trainkit.commands.options import command
from trainkit.serve.errors import CheckFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from trainkit.env import EnvironmentReport


@command()
@json_option
def env(as_json: bool) -> None:
    """Show the versions, providers, processor, cores and GPU here, and what is wrong with them.

    Exits with 1 if something is wrong. Paste its output into a report of a problem: it holds no
    name of the machine or the user.

    \b
    trainkit env
    trainkit env --json
    """
    from trainkit.console import stdout
    from trainkit.env import inspect_environment

    report = inspect_environment()
    if as_json:
        print_json(report)
    else:
        stdout.print(_table(report))
    if report.findings:
        raise CheckFailedError(
            "; ".join(f"{found.problem}. Remedy: {found.remedy}" for found in report.findings)
        )


def _table(report: "EnvironmentReport") -> "Table":
    from rich.table import Table

    here = report.environment
    quota = "none" if here.quota_cores is None else f"{here.quota_cores:g} cores"
    rows = {
        "trainkit": here.versions.get("trainkit"),
        "Python": f"{here.python} on {here.platform}",
        "processor": here.processor,
        "features": " ".join(here.flags),
        "cores": f"{here.cores} usable, CPU quota: {quota}",
        "memory": f"{here.memory_bytes / 1e9:.1f} GB",
        "GPU": here.gpu + (f", driver {here.gpu_driver}" if here.gpu_driver else ""),
        "ONNX Runtime": ", ".join(here.providers) or "cannot be imported",
        "torch's CUDA": report.torch_cuda or "none",
    }
    rows |= {name: version for name, version in here.versions.items() if name != "trainkit"}
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value or "not installed")
    return table

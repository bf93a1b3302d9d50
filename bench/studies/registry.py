"""All studies by name; a module is imported when its study is asked for."""

from importlib import import_module
from typing import Any

import click

from trainkit.bench.studies.study import Study

MODULES = {
    name: f"trainkit.bench.studies.{name}"
    for name in (
        "ablation",
        "accuracy",
        "export_cost",
        "families",
        "footprint",
        "grid",
        "operators",
        "padding_scaling",
        "precision",
        "suite",
        "training",
        "trec",
    )
} | {"serving": "trainkit.bench.studies.serving.study"}


def find(name: str) -> Study[Any]:
    """Return the study of that name."""
    study: Study[Any] = import_module(MODULES[name]).STUDY
    return study


class Studies(click.Group):
    """A group with one command per study, and ``publish``."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of the studies."""
        return [*sorted(MODULES), *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return the command of a study."""
        return find(name).command if name in MODULES else super().get_command(context, name)

"""``trainkit data``: the group of its commands."""

import click

from trainkit.commands.data_stats import data_stats
from trainkit.commands.data_trec import data_trec


@click.group()
def data() -> None:
    """Look at labelled texts, or fetch the TREC questions.

    \b
    trainkit data stats questions.csv
    """


for command in (data_stats, data_trec):
    data.add_command(command)

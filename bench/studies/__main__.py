"""``python -m trainkit.bench.studies NAME``: the project's own measurements."""

import click

from trainkit.bench.studies.publish import publish
from trainkit.bench.studies.registry import Studies


@click.group(cls=Studies)
def main() -> None:
    """Measure what the documents say, from a checkout; results go to bench/results."""


main.command()(publish)

if __name__ == "__main__":
    main()

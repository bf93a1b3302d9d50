"""``python -m trainkit``: the command line."""

from trainkit.cli import main

main()

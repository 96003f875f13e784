"""``python -m fastsam``: the ``fastsam`` command."""

from fastsam.commands.cli import main

main()

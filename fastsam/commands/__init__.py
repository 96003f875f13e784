"""The ``fastsam`` command, one module or package for each subcommand."""

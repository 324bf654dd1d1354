"""The small subcommands of ``subnets``; each module has ``add_arguments(parser)`` and ``main(args) -> int``."""

"""``python -m subnets``: the command ``subnets``."""

import sys

from .cli import main

sys.exit(main())

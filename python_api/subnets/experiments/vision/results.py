from dataclasses import dataclass
from typing import Any


@dataclass
class VisionResults:
    rows: list
    bases: dict
    discoveries: dict
    seconds: dict
    real: Any
    planned: int = 0

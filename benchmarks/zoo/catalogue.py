"""Every case by its name.

``python -m benchmarks.zoo.catalogue NAME`` measures one, and prints its row as JSON after each figure.
"""

import json
import sys

from benchmarks.zoo import flax_models, foreign_models
from benchmarks.zoo.cases import Case
from benchmarks.zoo.measure import measure

CASES: dict[str, Case] = {case.name: case for case in (*flax_models.CASES, *foreign_models.CASES)}

if __name__ == "__main__":
    row = measure(CASES[sys.argv[1]], lambda row: print(json.dumps(row), flush=True))
    print(json.dumps(row))

"""Make the models of one family: ``python -m tests.golden.make FOLDER FAMILY``, in a process of its own.

Its environment says how numbers are computed, which torch reads once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.golden import adapter

if __name__ == "__main__":
    adapter.models(Path(sys.argv[1]), sys.argv[2])

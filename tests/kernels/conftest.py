"""agreement/ imports what tests/ptx has: here (slow) it is compiled and its PTX run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ptx"))  # gpu.py

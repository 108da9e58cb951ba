import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "gpu"))  # test_gpu_ops.py
collect_ignore_glob = ["test_*"] if os.environ.get("TRITON_INTERPRET") == "1" else []

"""Makes entangle_fast/dispatch_table.json from bench/results: where a CUDA C++ kernel is the default.

    python bench/dispatch_table.py

Read are the GPU folders' files with a "device" and "backends" (bench/gpu_backends.py writes them): records of op, backend
"cuda", dtype, elements, ms, triton_ms, and correct, true where absent. A range of sizes goes into the table where every
size measured in it was at least 1.1 times as fast as Triton; its speedup is the least of them.
"""

import json
from itertools import groupby
from pathlib import Path

NEEDED = 1.1
ROOT = Path(__file__).resolve().parent.parent


def table(results: Path) -> list[dict]:
    points = []
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        if path.parent.name.startswith("cpu") or not isinstance(content, dict):
            continue
        for r in content.get("backends", ()):
            if r.get("backend") == "cuda":
                faster = r["triton_ms"] / r["ms"] if r.get("correct", True) else 0.0
                points.append(((r["op"], content["device"], r["dtype"]), r["elements"], faster))
    rows = []
    for (op, device, dtype), group in groupby(sorted(points), key=lambda p: p[0]):
        for good, stretch in groupby(group, key=lambda p: p[2] >= NEEDED):
            if good:
                sizes, speedups = zip(*((e, s) for _, e, s in stretch))
                rows.append({"op": op, "device": device, "dtype": dtype, "least": min(sizes), "most": max(sizes),
                             "speedup": round(min(speedups), 3)})  # fmt: skip
    return rows


if __name__ == "__main__":
    found = table(ROOT / "bench" / "results")
    (ROOT / "entangle_fast" / "dispatch_table.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} ranges where the CUDA kernels are the default")

"""The trained models that the unlearning benchmarks start from."""

from __future__ import annotations

from pathlib import Path

from entangle_fast import demo
from entangle_fast.storage import load_tensors


def original(task, sets, seed: int, folder: Path | None):
    """The demo's model of a seed: original-SEED.safetensors of a comparison's ``models`` folder, or trained here without one."""
    if folder is None:
        return demo.train_original(task, sets, seed)[0]
    model = demo.model_for(task)
    model.load_state_dict(load_tensors(folder / f"original-{seed}.safetensors"))
    return model.eval()

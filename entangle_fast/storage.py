"""Files that are whole or absent: atomic writes, tensors without pickle, JSON and TOML."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import tomlkit
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_VIEWS = "entangle_fast.views"  # metadata key: name -> [stored tensor, offset, shape, stride]


class CheckpointError(RuntimeError):
    """A file could not be written or read back; the message names the path and the mend."""


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[Path], object]) -> Path:
    """Put `content` at `path`, whole or not at all.

    content: the bytes, or a function that writes the temporary path it is given.
    The temporary file lies in the folder of `path` (made if missing), is fsynced and renamed over
    `path`. On any failure the old file stays as it was and the temporary one is removed.
    Raises CheckpointError when the system refuses (disk full, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # the rename itself must survive a power cut
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); what was there before is untouched; "
            "free space or choose another folder, then save again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Save named dense tensors (any shape, dtype and device) as safetensors, atomically.

    Tensors that share memory (tied weights, views of one buffer) are stored once and share memory
    again after `load_tensors`. metadata: strings to keep beside them, see `load_metadata`.
    Raises CheckpointError, also for tensors that safetensors cannot hold (sparse, meta).
    """
    stored: dict[str, Tensor] = {}
    views: dict[str, list] = {}
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {_kind(tensor)}; needs a dense tensor with values; "
                "convert it with .to_dense() or leave it out"
            )
        # an expanded tensor repeats its memory, so it has no place of its own to share
        repeated = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape))
        alone = repeated or tensor.numel() == 0
        groups[(name,) if alone else (tensor.device, tensor.untyped_storage().data_ptr())].append(name)

    for names in groups.values():
        first = tensors[names[0]].detach()
        if len(names) == 1:
            stored[names[0]] = first.cpu().contiguous()
            continue
        if odd := [n for n in names if tensors[n].dtype != first.dtype]:
            raise CheckpointError(
                f"{path}: tensors {names[0]!r} and {odd[0]!r} share memory as {first.dtype} and "
                f"{tensors[odd[0]].dtype}; shared memory needs one dtype; clone() one of them"
            )
        start = min(tensors[n].storage_offset() for n in names)
        end = max(tensors[n].storage_offset() + _extent(tensors[n]) for n in names)
        # the plain name where one tensor is the whole of it, so that other readers find it
        whole = [n for n in names if tensors[n].is_contiguous() and tensors[n].numel() == end - start]
        base = whole[0] if whole else _free_name(f"{names[0]}.storage", tensors)
        flat = first.as_strided((end - start,), (1,), start)
        stored[base] = (tensors[base].detach() if whole else flat).cpu().contiguous()
        for n in names:
            if n != base:
                t = tensors[n]
                views[n] = [base, t.storage_offset() - start, list(t.shape), list(t.stride())]

    header = dict(metadata or {})
    if views:
        header[_VIEWS] = json.dumps({"views": views, "buffers": [n for n in stored if n not in tensors]})
    return atomic_write(path, lambda temporary: save_file(stored, temporary, metadata=header or None))


def must_be_writable(folder: str | os.PathLike) -> None:
    """Raise CheckpointError where nothing can be written to the folder, which is made if missing: before hours of work, not after."""
    atomic_write(Path(folder) / f".{secrets.token_hex(4)}", b"").unlink()


def _kind(tensor: Tensor) -> str:
    return "on the meta device" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")


def _extent(tensor: Tensor) -> int:
    """Elements of storage from the first to the last that the tensor touches."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))


def _free_name(name: str, taken: Mapping) -> str:
    while name in taken:
        name += "_"
    return name


def load_tensors(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read what `save_tensors` wrote (or any safetensors file); shared memory is shared again.

    Raises FileNotFoundError, or CheckpointError for a file that is cut off, damaged or forged.
    """
    layout = json_object(_header(path).get(_VIEWS, "{}"), path)
    try:
        tensors = load_file(path, device=str(device))
        for name, (base, offset, shape, stride) in layout.get("views", {}).items():
            flat = tensors[base].reshape(-1)
            # torch checks the bounds, but not that stride 0 makes terabytes out of nothing
            if math.prod(shape) > flat.numel() or min(offset, *shape, *stride) < 0:
                raise ValueError(f"tensor {name!r} does not fit in {base!r}")
            tensors[name] = flat.as_strided(shape, stride, offset)
        for name in layout.get("buffers", []):
            del tensors[name]
    except (safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    return tensors


def load_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings that were saved beside the tensors. Raises as `load_tensors`."""
    return {key: value for key, value in _header(path).items() if key != _VIEWS}


def _header(path: str | os.PathLike) -> dict[str, str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a readable safetensors file ({error}); it is cut off, damaged or of another "
        "format; delete it and run again, or take an older copy"
    )


def json_object(text: str | bytes, where: str | os.PathLike) -> dict[str, Any]:
    """Parse a JSON object that came from a file; CheckpointError names `where`."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, needs an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable JSON ({error}); write it again") from error
    return value


def load_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return json_object(path.read_bytes(), path)


def save_json(path: str | os.PathLike, data: Any) -> Path:
    """Save as strict JSON, atomically. Dataclasses, paths, tensors and numpy values become plain;
    nan and infinities, which JSON lacks, become null."""
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    return atomic_write(path, (text + "\n").encode())


def save_toml(path: str | os.PathLike, data: Mapping[str, Any]) -> Path:
    """Save nested mappings as TOML, atomically; keys that are None, which TOML lacks, are left out."""
    return atomic_write(path, tomlkit.dumps(_without_none(data)).encode())


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if value is not None
    }


def plain(value: Any) -> Any:
    """`value` in types that JSON has. Raises TypeError for what has no plain form."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no plain form; give numbers, strings, lists or dicts")

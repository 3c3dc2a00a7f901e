"""Where the benchmarks compute: the one place that decides device, precision, waiting and peak memory.

A process has one device, as it has one number of threads. :func:`use` sets it; :mod:`benchmarks.shapes` makes what it
makes there, and :mod:`benchmarks.harness` waits for it around each timed call. A CPU's peak memory belongs to a process
and needs a fresh one for each side; a GPU's allocator counts, so that both sides are measured in this process.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deftx.core.delta import SparseDelta

KINDS = ("cpu", "cuda")
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Device:
    """Where this process computes.

    Attributes:
        kind: One of ``KINDS``.
        precision: One of ``PRECISIONS``, named as in the trainer's settings; it holds for forward passes in training.
    """

    kind: str = "cpu"
    precision: str = "32-true"

    @property
    def is_default(self) -> bool:
        """Whether this is what every benchmark and every target is meant for."""
        return self == Device()


_current = Device()


def use(kind: str = "cpu", precision: str = "32-true") -> Device:
    """Make everything from now on compute there.

    Raises:
        ValueError: There is no such device or precision here.
    """
    global _current
    if kind not in KINDS or precision not in PRECISIONS:
        raise ValueError(f"unknown device {kind!r} or precision {precision!r}; available: {KINDS}, {PRECISIONS}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; use the device cpu")
    _current = Device(kind, precision)
    return _current


def current() -> Device:
    """Return where this process computes."""
    return _current


def put(content: Any) -> Any:
    """Return a tensor, a module, an SFT, or a dict of these, on the device; other values come back as they are."""
    if _current.kind == "cpu":
        return content
    if isinstance(content, Tensor | nn.Module):
        return content.to(_current.kind)
    if isinstance(content, SparseDelta):
        tensors = put(content.indices), put(content.values)
        return SparseDelta(*tensors, content.shapes, head=put(content.head), metadata=content.metadata)
    if isinstance(content, Mapping):
        return {name: put(value) for name, value in content.items()}
    return content


def wait() -> None:
    """Return when the device has done all it was given; a CPU has."""
    if _current.kind == "cuda":
        torch.cuda.synchronize()


def autocast() -> contextlib.AbstractContextManager[Any]:
    """Return what a training step's forward pass runs in, as Lightning does it for the precision."""
    if _current.precision == "bf16-mixed":
        return torch.autocast(_current.kind, torch.bfloat16)
    return contextlib.nullcontext()


def settle() -> int:
    """Give the GPU's unused memory back and start its high-water mark afresh; return the bytes allocated now."""
    gc.collect()
    wait()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def high_water() -> int:
    """Return the most bytes allocated on the GPU since :func:`settle`."""
    return torch.cuda.max_memory_allocated()


def facts() -> dict[str, Any]:
    """Return what a figure depends on besides the machine."""
    known: dict[str, Any] = {"device": _current.kind, "precision": _current.precision}
    if _current.kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return known

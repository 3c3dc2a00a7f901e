"""A sparse fine-tuning φ: which coordinates of a base model change, and by how much; its file.

Step 6 of docs/method.md. Keys are the base model's own parameter names, indices are flat and sorted, values
float32 in the order of the indices. On disk it is a folder: ``sft.safetensors`` (``<name>.gaps``: the indices as
:mod:`deftx.core.gaps` writes them, about one byte each; ``<name>.values``: float32, or float16 or bfloat16 on
request; ``head.<name>``), ``sft.json`` (what it is, for which base, and the sha256 of both) and a model card;
never a pickle. Format version 1 (``<name>.indices``: int32 or int64) is still read.
Sources: LT-SFT (Ansell et al. 2022, arXiv 2110.07560), DeFT-X (Simon & Jyothi 2025, arXiv 2505.15090).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deftx.core.folder import model_card, read_folder, write_folder
from deftx.core.gaps import pack, unpack
from deftx.core.settings import VALUE_DTYPES, part_of
from deftx.errors import DeftxError, did_you_mean, listed

__all__ = ["SparseDelta", "fingerprint", "need_float32"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Identity of a base model's weights: sha256 over names, dtypes, shapes and bytes, in the order of the names.

    Args:
        tensors: parameters by the base model's own names. ``pooler.*`` does not count: a masked language
            model has none, a classifier of the same base has, and both share all the rest.

    Returns:
        64 hexadecimal digits; the same on every device.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith("pooler."):
            continue
        tensor = tensors[name].detach()
        digest.update(f"{name}\n{str(tensor.dtype).removeprefix('torch.')}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def need_float32(name: str, *tensors: Tensor) -> None:
    """Refuse parameters of another dtype.

    Raises:
        DeftxError: one of the tensors is not float32; the message names the parameter and its dtype.
    """
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise DeftxError(
                f"{name} is {tensor.dtype}: sparse fine-tunings are defined on float32 parameters; load the base with "
                "dtype=float32 (autocast may still compute in lower precision)"
            )


@dataclass
class SparseDelta:
    """One sparse fine-tuning.

    Attributes:
        indices: by parameter name, the sorted flat indices that change, int64 of shape (count,), count > 0.
        values: by the same names, the changes, float32 of shape (count,), finite.
        shapes: by the same names, the parameter's shape.
        head: trained head tensors by the training model's names; float tensors of any shape.
        metadata: plain JSON. ``base_fingerprint`` (see :func:`fingerprint`) is required to save or to
            compose; further keys with a meaning of their own: ``base_model``, ``kind`` (``language`` or
            ``task``), ``method``, ``rank``, ``residual``, ``language``, ``task``, ``labels``, ``metrics``,
            ``settings``, ``provenance``.
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    head: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what the class does not allow."""
        if not self.indices.keys() == self.values.keys() == self.shapes.keys():
            raise DeftxError("indices, values and shapes of a sparse fine-tuning must have the same names")
        for name, index in self.indices.items():
            value = self.values[name]
            if not index.numel():
                raise DeftxError(f"{name} changes no coordinate: leave it out of the sparse fine-tuning")
            _check_indices(name, index, math.prod(self.shapes[name]))
            if value.dtype != torch.float32 or value.shape != index.shape:
                raise DeftxError(
                    f"{name}: {index.numel()} indices need as many float32 values, found {value.dtype} of shape "
                    f"{tuple(value.shape)}"
                )
            if not bool(value.isfinite().all()):
                raise DeftxError(f"{name}: the values contain NaN or infinity; the training behind them has diverged")
        for name, tensor in self.head.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise DeftxError(f"head {name}: NaN or infinity; the training behind it has diverged")

    @classmethod
    def from_states(
        cls,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        *,
        selection: Mapping[str, Tensor] | None = None,
        head: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SparseDelta:
        """Return the difference tuned − base on the selected coordinates.

        The difference is rounded to float32, so base + φ gives the tuned bits wherever the change is smaller
        than the weight (it is then exact), and else differs from them by a rounding.

        Args:
            base: float32 parameters by the base model's own names, before training.
            tuned: the same names and shapes, after training.
            selection: sorted flat indices by name, as of ``select_topk``; names may be missing. All of them
                are kept, also where nothing changed. None: every coordinate whose bits differ.
            head: trained head tensors.
            metadata: see the class; ``base_fingerprint`` is computed from ``base`` where it is not given (a
                task SFT that was trained on top of a language SFT must give that of θ⁰).

        Raises:
            DeftxError: names or shapes that differ, another dtype than float32, a selection that does not
                fit, or a difference that is not finite.
        """
        _same_keys(base, tuned)
        unknown = sorted(set(selection or {}) - set(base))
        if unknown:
            raise DeftxError(f"the selection names parameters that the model does not have: {listed(unknown)}")
        indices, values, shapes = {}, {}, {}
        for name, before in base.items():
            before, after = before.detach(), tuned[name].detach().to(before.device)
            need_float32(name, before, after)
            flat_before, flat_after = before.reshape(-1), after.reshape(-1)
            if selection is None:
                index = (flat_before.view(torch.int32) != flat_after.view(torch.int32)).nonzero().flatten()
            else:
                index = selection.get(name, torch.empty(0, dtype=torch.int64)).to(before.device)
                _check_indices(name, index, before.numel())
            if index.numel():
                indices[name] = index.cpu()
                values[name] = (flat_after[index] - flat_before[index]).cpu()
                shapes[name] = tuple(before.shape)
        facts = dict(metadata or {})
        facts.setdefault("base_fingerprint", None)
        if facts["base_fingerprint"] is None:
            facts["base_fingerprint"] = fingerprint(base)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in (head or {}).items()}
        return cls(indices, values, shapes, tensors, facts)

    @property
    def base_fingerprint(self) -> str:
        """:func:`fingerprint` of the base that it belongs to.

        Raises:
            DeftxError: the metadata does not name one.
        """
        fingerprint = self.metadata.get("base_fingerprint")
        if not isinstance(fingerprint, str) or not fingerprint:
            raise DeftxError("the sparse fine-tuning does not say which base it is for: base_fingerprint is missing")
        return fingerprint

    @property
    def k(self) -> int:
        """How many coordinates it changes; the head does not count."""
        return sum(index.numel() for index in self.indices.values())

    def density(self, maskable: int) -> float:
        """Return the share of ``maskable`` coordinates that it changes."""
        return self.k / maskable

    def per_layer_counts(self) -> dict[str, int]:
        """Changed coordinates by part of the model, in its order: ``embeddings``, ``layer.0``, …, ``pooler``."""
        counts: dict[str, int] = {}
        for name, index in self.indices.items():
            counts[part_of(name)] = counts.get(part_of(name), 0) + index.numel()
        order = {"embeddings": -1, "pooler": math.inf}

        def sort_key(part: str) -> tuple[float, str]:
            number = re.fullmatch(r"layer\.(\d+)", part)
            return (float(number[1]) if number else order.get(part, 1e9), part)

        return {part: counts[part] for part in sorted(counts, key=sort_key)}

    def statistics(self) -> dict[str, Any]:
        """Return counts and magnitudes as plain JSON.

        Returns:
            ``k``, ``head_elements``, ``norm`` (L2 of all values), ``layers`` (as :meth:`per_layer_counts`)
            and
            ``parameters``: by name ``count``, ``density`` (of that parameter), ``mean_abs``, ``max_abs`` and
            ``norm``.
        """
        parameters = {}
        for name, value in self.values.items():
            size = value.abs()
            parameters[name] = {
                "count": value.numel(),
                "density": value.numel() / math.prod(self.shapes[name]),
                "mean_abs": float(size.mean(dtype=torch.float64)),
                "max_abs": float(size.max()),
                "norm": float(torch.linalg.vector_norm(value, dtype=torch.float64)),
            }
        return {
            "k": self.k,
            "head_elements": sum(tensor.numel() for tensor in self.head.values()),
            "norm": math.hypot(*(entry["norm"] for entry in parameters.values())),
            "layers": self.per_layer_counts(),
            "parameters": parameters,
        }

    def save(self, folder: str | Path, value_dtype: str = "float32") -> Path:
        """Write the folder, whole or not at all; equal content gives equal bytes.

        Args:
            folder: where; must not exist, or be empty. Parents are made.
            value_dtype: of the values in the file; they are float32 again when loaded, and the head keeps its own
                dtype. ``float32`` loses nothing. The other two halve the values and lose bits, so that base + φ no
                longer gives the tuned weights: ``float16`` keeps 11 significant bits, fewer below 6.1e-5, turns
                what is at most 3.0e-8 into a change of zero, and cannot hold 65520 or more; ``bfloat16`` keeps 8
                significant bits over the range of float32.

        Returns:
            The folder.

        Raises:
            DeftxError: something lies at ``folder``; it cannot be written (permission, space); the metadata
                is not plain JSON or lacks ``base_fingerprint``; ``value_dtype`` is none of the three, or
                cannot hold a value.
        """
        folder = Path(folder)
        tensors = _packed(self, value_dtype)
        facts = {
            "value_dtype": value_dtype,
            "k": self.k,
            "parameters": {
                name: {"count": index.numel(), "shape": list(self.shapes[name])} for name, index in self.indices.items()
            },
            "head": sorted(self.head),
            "metadata": {**self.metadata, "base_fingerprint": self.base_fingerprint},
        }
        card = model_card(self.metadata, self.k, self.per_layer_counts(), list(self.head), value_dtype)
        write_folder(folder, tensors, facts, card)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SparseDelta:
        """Read and verify a folder that :meth:`save` wrote, in this format version or an earlier one.

        Raises:
            DeftxError: a missing folder or file, a pickle, an unknown format version, content that was
                truncated or edited after it was written, values of another dtype than described, malformed
                gaps, or indices that are not sorted, unique and within their parameter.
        """
        folder = Path(folder)
        tensors, facts = read_folder(folder)
        try:
            return _unpacked(tensors, facts)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise DeftxError(
                f"{folder} does not hold the tensors that it describes ({error}): fetch it again"
            ) from error
        except DeftxError as error:
            raise DeftxError(f"{folder}: {error}") from error


def _same_keys(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(base) - set(tuned)), sorted(set(tuned) - set(base))
    if missing or extra:
        raise DeftxError(
            "the tuned model's parameters are not the base's: "
            f"missing {listed(missing) or 'none'}; unknown {listed(extra) or 'none'}"
        )
    differing = [
        f"{name} ({list(tensor.shape)} and {list(tuned[name].shape)})"
        for name, tensor in base.items()
        if tensor.shape != tuned[name].shape
    ]
    if differing:
        raise DeftxError(f"shapes of the base and the tuned model differ: {listed(differing)}")


def _check_indices(name: str, index: Tensor, size: int) -> None:
    if index.dim() != 1 or index.dtype != torch.int64:
        raise DeftxError(
            f"{name}: indices must be a vector of int64, found {index.dtype} of shape {tuple(index.shape)}"
        )
    if not index.numel():
        return
    if not bool((index[1:] > index[:-1]).all()):
        raise DeftxError(f"{name}: the indices are not sorted, or hold the same coordinate twice")
    if int(index[0]) < 0 or int(index[-1]) >= size:
        raise DeftxError(f"{name}: indices from {int(index[0])} to {int(index[-1])} lie outside its {size} entries")


def _packed(delta: SparseDelta, value_dtype: str) -> dict[str, Tensor]:
    dtype = _dtype(value_dtype)
    tensors = {f"head.{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in delta.head.items()}
    too_large = []
    for name, index in delta.indices.items():
        value = delta.values[name].cpu()
        pair = {f"{name}.gaps": pack(index.cpu()), f"{name}.values": value.to(dtype).contiguous()}
        if dtype != torch.float32 and not bool(pair[f"{name}.values"].isfinite().all()):
            too_large.append(f"{name} ({float(value.abs().max()):.4g})")
        if not tensors.keys().isdisjoint(pair):
            raise ValueError(f"parameter {name} and a head tensor would share the key {sorted(pair)} in the file")
        tensors.update(pair)
    if too_large:
        limit = torch.finfo(dtype).max
        wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        raise DeftxError(
            f"{value_dtype} holds changes up to {limit:.4g}: {listed(too_large)}; save with value_dtype={wider}"
        )
    return tensors


def _unpacked(tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> SparseDelta:
    # The tensors are views of the mapped file. What is kept is copied, so that nothing depends on the file afterwards.
    head = {name: tensors.pop(f"head.{name}").clone() for name in facts["head"]}
    names = sorted(facts["parameters"])
    stored = "float32" if facts["format_version"] == 1 else facts["value_dtype"]
    indices, values = {}, {}
    for name in names:
        if facts["format_version"] == 1:
            indices[name] = tensors.pop(f"{name}.indices").to(torch.int64, copy=True)
        else:
            indices[name] = _unpacked_indices(name, tensors.pop(f"{name}.gaps"))
        value = tensors.pop(f"{name}.values")
        if value.dtype != _dtype(stored):
            raise DeftxError(f"{name} must have {stored} values, found {value.dtype}")
        values[name] = value.to(torch.float32, copy=True)
    if tensors:
        raise KeyError(f"undescribed: {listed(sorted(tensors))}")
    shapes = {name: tuple(facts["parameters"][name]["shape"]) for name in names}
    return SparseDelta(indices, values, shapes, head, dict(facts["metadata"]))


def _unpacked_indices(name: str, gaps: Tensor) -> Tensor:
    try:
        return unpack(gaps)
    except DeftxError as error:
        raise DeftxError(f"{name}: the indices cannot be read: {error}") from error


def _dtype(name: str) -> torch.dtype:
    if name not in VALUE_DTYPES:
        hint = did_you_mean(str(name), VALUE_DTYPES)
        raise DeftxError(f"unknown value_dtype {name!r}{hint} (available: {', '.join(VALUE_DTYPES)})")
    dtype: torch.dtype = getattr(torch, name)
    return dtype

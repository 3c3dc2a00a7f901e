"""An SFT on disk: ``SparseDelta.save`` and ``load`` beside ``torch.save`` and ``torch.load`` of COO tensors.

Plain keeps what ``(tuned - base).to_sparse()`` gives, matrices with two indices an entry. Each save goes into a
folder of its own; what is read has just been written, so that neither side waits for a disk. Ours also verifies
what it reads.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Goal, Row, Run, timed_row
from deftx.core.delta import SparseDelta


def coo(delta: SparseDelta) -> dict[str, Tensor]:
    """The SFT as COO tensors in its parameters' shapes."""
    found = {}
    for name, size in delta.shapes.items():
        places = torch.stack(torch.unravel_index(delta.indices[name], size))
        found[name] = torch.sparse_coo_tensor(
            places, delta.values[name], size, is_coalesced=True, check_invariants=False
        )
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Disk:
    """Both sides of saving and loading, in folders below ``root``."""

    def __init__(self, root: Path, delta: SparseDelta) -> None:
        self.delta, self.tensors = delta, coo(delta)
        self.root, self.number = root, 0
        self.saved = {"ours": root, "plain": root}

    def save_ours(self) -> None:
        """Write the SFT's folder."""
        self.saved["ours"] = self._folder() / "sft"
        self.delta.save(self.saved["ours"])

    def save_plain(self) -> None:
        """Pickle the COO tensors."""
        self.saved["plain"] = self._folder()
        torch.save(self.tensors, self.saved["plain"] / "sft.pt")

    def load_ours(self) -> SparseDelta:
        """Read and verify the last folder."""
        return SparseDelta.load(self.saved["ours"])

    def load_plain(self) -> dict[str, Tensor]:
        """Read the last pickle."""
        loaded: dict[str, Tensor] = torch.load(self.saved["plain"] / "sft.pt", weights_only=True)
        return loaded

    def forget(self) -> None:
        """Remove all folders but the last of each side."""
        kept = {self.saved["plain"], self.saved["ours"].parent}
        for folder in self.root.iterdir():
            if folder not in kept:
                shutil.rmtree(folder)

    def _folder(self) -> Path:
        self.number += 1
        made = self.root / str(self.number)
        made.mkdir()
        return made


def measure(run: Run) -> list[Row]:
    """Seconds to save and to load, and bytes."""
    run.say("making an SFT")
    delta = shapes.sparse_delta(run.shape, run.shape.k, 0)
    with tempfile.TemporaryDirectory() as root:
        disk = Disk(Path(root), delta)
        saves = run.alternate("save", {"ours": disk.save_ours, "plain": disk.save_plain}, disk.forget)
        loads = run.alternate("load", {"ours": disk.load_ours, "plain": disk.load_plain})
        sizes = {side: folder_bytes(folder) for side, folder in disk.saved.items()}
    k = delta.k
    fast = (Goal("value", 0.5),)
    return [
        Row(
            f"SFT file, K = {k:,}",
            sizes["ours"],
            sizes["plain"],
            "bytes",
            goals=(Goal("value", 5.1 * k),),
            quoted="49.5 MB → 38.4 MB",
            note=f"{sizes['ours'] / k:.2f} and {sizes['plain'] / k:.2f} bytes an entry; ours is the whole folder",
            facts={"k": k},
        ),
        timed_row("SFT file: save", saves, goals=fast, quoted="12.8 s → 0.12 s"),
        timed_row("SFT file: load", loads, goals=fast, quoted="2.5 s → 0.06 s"),
    ]

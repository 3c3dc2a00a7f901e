"""Fixtures of the data room: clones and hub copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from upstream_folders import Upstream, write, write_clones


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """A ``data.root`` with every language of every set."""
    return write_clones(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def hub_copy(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder laid out like a hub data set: ``<config>/<split>-*.parquet`` and a card that configures them."""
    from datasets import Dataset, Features

    def build(
        name: str, configs: dict[str, dict[str, dict[str, list[object]]]], features: Features | None = None
    ) -> Path:
        folder = tmp_path / name
        card = ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, columns in splits.items():
                file = folder / config / f"{split}-00000-of-00001.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                Dataset.from_dict(columns, features=features).to_parquet(str(file))
                card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        write(folder / "README.md", "\n".join([*card, "---", "# A copy", ""]))
        return folder

    return build

"""A model's key and a download cover the same files: all that are read."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import huggingface_hub
import pytest

from deftx.cache import StageCache
from deftx.stages.base import model_key, resolve_model
from deftx.training.settings import ModelSettings

COMMIT = "0123456789" * 4
FILES = {
    "config.json": '{"model_type": "bert"}',
    "tokenizer.json": "{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "part-1.bin", "b": "parts/2.safetensors"}}),
    "part-1.bin": "1",
    "parts/2.safetensors": "2",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**FILES, "README.md": "x", "other.bin": "x"}.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text(content, "utf-8")
    return tmp_path / "m"


@pytest.mark.parametrize("name", [*FILES, "README.md", "other.bin"])
def test_the_key_covers_every_file_that_is_read(folder: Path, tmp_path: Path, name: str) -> None:
    cache = StageCache(tmp_path / "cache")
    before = model_key(folder, cache)
    with (folder / name).open("a") as stream:
        stream.write(" ")
    assert (model_key(folder, cache) != before) == (name in FILES)


def test_a_download_asks_for_what_the_key_covers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision == COMMIT, "what is keyed is what is read, whatever is pushed meanwhile"
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("deftx.stages.base.resolve_commit", lambda name, revision, kind: COMMIT)
    assert resolve_model(ModelSettings(hub="someone/model", revision="main")) == (folder, COMMIT)
    wanted = {name for name in FILES if any(fnmatch.fnmatch(name, pattern) for pattern in asked)}
    assert wanted == set(FILES) - {"part-1.bin"}  # refused where it is found

"""Fixtures of the training tests: tiny encoders made on the fly, settings of seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import write_bert, write_xlmr

from deftx.training.settings import TrainerSettings, TrainingSettings


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "bert": write_bert(tmp_path_factory.mktemp("bert")),
            "xlm-roberta": write_xlmr(tmp_path_factory.mktemp("xlmr")),
        }


@pytest.fixture(params=["bert", "xlm-roberta"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(folders: dict[str, Path], family: str) -> Path:
    """The model folder of each family in turn."""
    return folders[family]


@pytest.fixture
def settings() -> TrainingSettings:
    return TrainingSettings(
        learning_rate=5e-3, batch_size=8, max_length=16, epochs=1, max_steps=6, eval_every=3, l1_full=0.1, l1_sparse=0.1
    )


@pytest.fixture
def trainer() -> TrainerSettings:
    return TrainerSettings(accelerator="cpu", progress=False, threads=1)

"""What jobs of one command have in common is looked at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose

from deftx.config import hydra_session, study_settings
from deftx.data.settings import DataSettings, LanguageSettings
from deftx.errors import DeftxError
from deftx.stages import preflight


def test_jobs_of_a_command_read_a_test_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def load_test(task: str, language: LanguageSettings, data: DataSettings, split: str) -> None:
        reads.append(f"{language.code} {split}")
        raise DeftxError(f"no {split} rows of {language.code}")

    monkeypatch.setattr(preflight, "load_test", load_test)
    common = ["task=nusax", "language=[ace,ban]", f"data.root={tmp_path}"]
    found: dict[str, list[str]] = {}
    problems = []
    with hydra_session():
        for job in ("seed=0", "seed=1", "rank=3", "split=dev"):
            study = study_settings(compose("run", overrides=[*common, job]))
            problems.append(preflight.preflight(study, "run", {}, checked=found))
    assert reads == ["ace test", "ban test", "ace dev", "ban dev"]
    assert problems[0] == problems[1] == problems[2]
    assert "no test rows of ban" in problems[2]
    assert "no dev rows of ban" in problems[3]

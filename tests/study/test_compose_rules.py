"""What takes the place of a plain sum of φ_T and φ_L, from the command to the predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_study import Command, Outcome

from deftx.core.delta import SparseDelta

ONE = ("compare=[]", "controls=[]")


def predictions(outcome: Outcome, language: str, **cell: str) -> pd.DataFrame:
    """Scores of every row of a target under one condition."""
    assert outcome.status == 0, outcome.err
    (path,) = outcome.folder.rglob("predictions.parquet")
    frame = pd.read_parquet(path)
    for column, value in {"language": language, **cell}.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 30
    return frame[[name for name in frame if name.startswith("score_")]].reset_index(drop=True)


def sft_folder(cache: Path, outcome: Outcome, language: str) -> Path:
    """The language SFT that a run composed."""
    cell = next(cell for cell in outcome.result()["cells"] if cell["language"] == language)
    key = next(term["key"] for term in cell["terms"] if term["kind"] == "language")
    return next(path for path in cache.glob(f"*/{key[:16]}*/sft"))


def test_a_proxy_of_weight_one_is_the_relatives_sft(deftx: Command) -> None:
    plain = deftx("run", "compare=[]", "controls=[other_language_sft]")
    proxied = deftx("run", *ONE, "compose.proxy.qbb.qba=1.0")
    other = predictions(plain, "qbb", condition="other_language_sft", variant="qba")
    pd.testing.assert_frame_equal(predictions(proxied, "qbb", condition="deftx_by_proxy"), other, check_exact=True)
    own = predictions(plain, "qba", condition="deftx")
    pd.testing.assert_frame_equal(predictions(proxied, "qba", condition="deftx"), own, check_exact=True)


def test_a_weight_of_zero_leaves_the_language_sft_out(deftx: Command) -> None:
    weightless = deftx("run", *ONE, "language=[qba]", "compose.language=0.0")
    halved = deftx("run", *ONE, "language=[qba]", "compose.language=0.5")
    without = deftx("run", *ONE, "compose.proxy.qba.qbb=0.0")
    expected = predictions(without, "qba", condition="deftx_by_proxy")
    pd.testing.assert_frame_equal(predictions(weightless, "qba"), expected, check_exact=True)
    assert not predictions(halved, "qba").equals(expected)
    assert halved.result()["settings"]["compose.language"] == 0.5


def test_an_average_is_the_mean_of_the_seeds_sfts(deftx: Command, shared_cache: Path) -> None:
    one, two = (deftx("run", *ONE, "language=[qba]", f"seed={seed}") for seed in (0, 1))
    both = deftx("run", *ONE, "language=[qba]", "compose.average=[0,1]")
    first, second, mean = (SparseDelta.load(sft_folder(shared_cache, run, "qba")) for run in (one, two, both))
    for name, shape in mean.shapes.items():
        expected = torch.zeros(shape, dtype=torch.float64).flatten()
        for delta in (first, second):
            if name in delta.indices:
                expected[delta.indices[name]] += delta.values[name].double() / 2
        found = torch.zeros_like(expected)
        found[mean.indices[name]] = mean.values[name].double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert mean.metadata["seeds"] == [0, 1]


@pytest.mark.parametrize("rule", ["ties", "dare", "tsv", "denoised_sum"])
def test_every_rule_runs_and_says_so(deftx: Command, rule: str) -> None:
    merged = deftx("run", *ONE, "language=[qba]", f"compose={rule}")
    plain = deftx("run", *ONE, "language=[qba]")
    assert not predictions(merged, "qba").equals(predictions(plain, "qba"))
    assert merged.result()["settings"]["compose.rule"] == rule
    assert json.dumps(merged.result()["settings"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compose=tie", "unknown compose 'tie'; did you mean 'ties'?"),
        ("compose.drop=0.1", "compose.drop=0.1: rule=sum does not read it; it is one of rule=dare"),
        ("compose.language=inf", "compose.language=inf: must be a finite number"),
        ("compose.language_layers.layer9=1.0", "compose.language_layers.layer9: this model has no such part"),
        ("compose.proxy.qbb.qbc=1.0", "compose.proxy.qbb.qbc: only other targets have a φ_L to lend"),
        ("compose.proxy.qbb=kin", "compose.proxy.qbb=kin: write compose.proxy.qbb=family"),
        ("compose.proxy.qbb=family", "no other target is of its family"),
        ("compose.average=[1,1]", "a seed is named twice"),
        ("compose.rank=soft", "unknown rank policy 'soft'"),
    ],
)
def test_a_composition_that_cannot_be_is_refused(deftx: Command, override: str, message: str) -> None:
    outcome = deftx("run", *ONE, override)
    assert outcome.status != 0
    assert message in outcome.err
    assert "Traceback" not in outcome.err

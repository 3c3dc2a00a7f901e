"""Results and sweeps of schemas 1 and 2, as runs wrote them: what they are given as fields when they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from deftx.tracking import RunRecord, read_result, read_sweep, with_keys

OLD = Path(__file__).parent / "legacy"
"""Results of the small study of ``tests/study``, cut down to what says something of SFTs and cells."""

DEFTX = "deftx rank=energy:0.9 residual=prune:0.05"
QAA, QBA, QBB = (f"language {code} {DEFTX}" for code in ("qaa", "qba", "qbb"))
ON, ALONE = f"task on θ⁰+qaa {DEFTX}", f"task on θ⁰ {DEFTX}"


def record(name: str) -> RunRecord:
    return read_result(OLD / f"{name}.json")


def composed(made: RunRecord) -> dict[str, tuple[str, ...]]:
    """Names of what each cell composes."""
    names = {sft.key: sft.name for sft in made.sfts}
    return {
        " ".join(filter(None, (cell.language, cell.condition, cell.variant))): tuple(names[t.key] for t in cell.terms)
        for cell in made.cells
    }


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        (
            "run",
            {
                "qba deftx": (ON, QBA),
                "qba ltsft": ("task on θ⁰+qaa ltsft", "language qba ltsft"),
                "qbb ltsft": ("task on θ⁰+qaa ltsft", "language qbb ltsft"),
                "qba no_language_sft": (ALONE,),
                "qba source_sft": (ON, QAA),
                "qbb source_sft": (ON, QAA),
                "qba other_language_sft qbb": (ON, QBB),
                "qbb other_language_sft qba": (ON, QBA),
            },
        ),
        (
            # φ_S and a target's own SFT of the same language are two.
            "source_is_target",
            {
                "qaa deftx": (
                    "task on θ⁰+qaa deftx rank=4 residual=prune:0.05",
                    "language qaa deftx rank=4 residual=prune:0.05",
                ),
                "qaa source_sft": ("task on θ⁰+qaa deftx rank=4 residual=prune:0.05", QAA),
                "qba other_language_sft qaa": (
                    "task on θ⁰+qaa deftx rank=4 residual=prune:0.05",
                    "language qaa deftx rank=4 residual=prune:0.05",
                ),
            },
        ),
        ("no_source", {"qba deftx": (ALONE, QBA), "qba no_language_sft": (ALONE,)}),
        (
            "several_sources",
            {
                "qba deftx": (f"task on θ⁰+qab+qac {DEFTX}", QBA),
                "qba source_sft": (f"task on θ⁰+qab+qac {DEFTX}", f"language qab {DEFTX}"),
                "qba no_language_sft": (f"task qab+qac on θ⁰ {DEFTX}",),
            },
        ),
        ("no_text", {"qba deftx": (ON, QBA), "qbb deftx": (ON,), "qbb ltsft": ("task on θ⁰+qaa ltsft",)}),
        # lang.rank=none under method=deftx: what DeFT-X composes is trained as LT-SFT's is.
        ("mixed", {"qba deftx": (ON, "language qba ltsft"), "qba no_language_sft": (ALONE,)}),
        ("random_mask", {"qbb random_mask": ("task on θ⁰+qaa random_mask", "language qbb random_mask")}),
        ("no_second_phase", {"qba deftx": (f"{ON} without second phase", f"{QBA} without second phase")}),
        (
            "eval",
            {
                "qba composed": ("task qaa deftx", "language qba deftx"),
                "qba source_language_only": ("task qaa deftx",),
                "qbb source_language_only": ("task qaa deftx",),
            },
        ),
        ("sft_task", {}),
    ],
)
def test_cells_of_older_results_say_what_they_compose(name: str, cells: dict[str, tuple[str, ...]]) -> None:
    made = record(name)
    found = composed(made)
    assert {cell: found.get(cell) for cell in cells} == cells
    assert {(cell.language, cell.condition) for cell in made.cells} == {(m.language, m.condition) for m in made.metrics}
    # The key of a cell is that of its stage.
    assert {cell.key for cell in made.cells} == {stage["key"] for stage in made.stages}


@pytest.mark.parametrize(
    ("name", "sft", "fields"),
    [
        ("run", QBA, {"kind": "language", "method": "deftx", "rank": "energy:0.9", "residual": "prune:0.05", "on": ()}),
        ("run", QBA, {"languages": ("qba",), "task": None, "density": 0.3, "seed": 0, "second_phase": True}),
        ("run", ON, {"kind": "task", "task": "synthetic", "languages": ("qaa",), "on": (QAA,)}),
        ("run", ALONE, {"on": ()}),
        ("run", "task on θ⁰+qaa ltsft", {"rank": None, "residual": None, "on": (QAA,), "mask": "magnitude"}),
        ("random_mask", "language qba random_mask", {"method": "random_mask", "rank": None, "mask": "random"}),
        ("no_second_phase", f"{QBA} without second phase", {"second_phase": False, "method": "deftx"}),
        (
            "several_sources",
            f"task on θ⁰+qab+qac {DEFTX}",
            {"on": (f"language qab {DEFTX}", f"language qac {DEFTX}"), "languages": ("qab", "qac")},
        ),
        # The name of an SFT that was given says no rank; the settings do.
        ("eval", "task qaa deftx", {"rank": "energy:0.9", "seed": 0, "task": "synthetic"}),
        ("eval", "language qba deftx", {"rank": "energy:0.9", "residual": "prune:0.05"}),
        ("sft_task", ON, {"on": (QAA,)}),
    ],
)
def test_sfts_of_older_results_have_fields(name: str, sft: str, fields: dict[str, object]) -> None:
    made = record(name)
    (found,) = (item for item in made.sfts if item.name == sft)
    assert {field: getattr(found, field) for field in fields} == fields
    assert found.base == made.fingerprints["base"]


def test_the_first_schema_said_nothing_but_names(tmp_path: Path) -> None:
    content = json.loads((OLD / "run.json").read_text())
    content["schema_version"] = 1
    del content["job_type"], content["languages"]
    content["sfts"] = [{key: sft[key] for key in ("name", "sha256", "metrics")} for sft in content["sfts"]]
    (tmp_path / "result.json").write_text(json.dumps(content))
    made, newer = read_result(tmp_path), record("run")
    assert made.job_type == "run"
    assert composed(made) == composed(newer)
    assert [(sft.kind, sft.method, sft.rank, sft.on) for sft in made.sfts] == [
        (sft.kind, sft.method, sft.rank, sft.on) for sft in newer.sfts
    ]


def test_sentences_of_older_results_become_remarks() -> None:
    first, second = record("no_text").notes
    assert (first.kind, first.line) == ("other", "qbb: no unlabelled text, so no language SFT in its row")
    assert second.kind == "constant_predictions"
    assert "qbb ltsft" in second.about
    assert second.text == "one class is predicted throughout, nothing was learnt or transferred"


def test_an_older_result_says_no_data_and_no_provenance_of_its_stages() -> None:
    made = record("run")
    assert made.provenances == []
    assert "data.read" not in made.settings


def test_diagnostics_without_keys_have_the_names() -> None:
    old = pd.DataFrame({"what": ["sft", "pair"], "sft": ["a", "b"], "other": [None, "c"]})
    assert with_keys(old)["key"].tolist() == ["a", "b"]
    assert with_keys(old)["other_key"].tolist()[1] == "c"
    new = old.assign(key=["k", "l"], other_key=[None, "m"])
    assert with_keys(new)["key"].tolist() == ["k", "l"]
    assert "key" not in with_keys(pd.DataFrame({"x": [1]}))


def test_an_older_sweep_has_its_knobs_as_fields(tmp_path: Path) -> None:
    shutil.copy(OLD / "sweep.json", tmp_path)
    made = read_sweep(tmp_path)
    assert [job.knobs for job in made.jobs[:3]] == [
        {"rank": "2", "density": "0.1"},
        {"rank": "2", "density": "0.3"},
        {"rank": "energy:0.9", "density": "0.1"},
    ]
    assert "experiment=demo" in made.shared
    assert not [text for text in made.shared if text.startswith(("rank", "density"))]

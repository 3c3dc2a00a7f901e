"""Keys hold what changes a result and nothing else; cells compose what their condition says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose
from transformers import BertConfig

from deftx.cache import StageCache
from deftx.config import hydra_session
from deftx.config.resolve import study_settings
from deftx.stages.evaluate import SFT, plan_cells
from deftx.stages.inputs import Base
from deftx.stages.recipes import Recipe
from deftx.stages.settings import StudySettings
from deftx.stages.sft import Trainer

EVERYTHING = {"full", "decompose", "select", "sparse"}


def study(*overrides: str) -> StudySettings:
    with hydra_session():
        return study_settings(compose("run", overrides=["language=[qba]", *overrides]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(made)
    return made


def keys(folder: Path, cache: Path, *overrides: str, kind: str = "language", data: str = "d") -> dict[str, str]:
    """Keys of the stages of one SFT, by stage."""
    settings = study(*overrides)
    sft = settings.language_sft if kind == "language" else settings.task_sft
    recipe = Recipe(
        kind=kind,
        language="qba",
        sft=settings.sft_for(settings.methods[0], sft),
        inputs={"base": "b", "data": data},
        load=lambda: pytest.fail("nothing is loaded to make a key"),
        data=lambda: pytest.fail("nothing is read to make a key"),
        metadata=lambda: pytest.fail("nothing is read to make a key"),
    )
    plan = Trainer(settings, Base("tiny", folder, "b"), StageCache(cache), lambda _: []).plan(recipe)
    stages = {"full": plan.full, "decompose": plan.decompose, "select": plan.select, plan.made.kind: plan.made}
    return {name: stage.key for name, stage in stages.items() if stage is not None}


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["rank=3"], {"select", "sparse"}),
        (["lang.rank=3"], {"select", "sparse"}),
        (["residual=drop"], {"select", "sparse"}),
        (["density=0.1"], {"select", "sparse"}),
        (["k=17"], {"select", "sparse"}),
        (["lang.exclude=['embeddings.*']"], EVERYTHING - {"full"}),
        (["lang.training.l1_sparse=0.5"], {"sparse"}),
        (["value_dtype=float16"], {"sparse"}),
        (["lang.value_dtype=bfloat16"], {"sparse"}),
        (["lang.training.l1_full=0.5"], EVERYTHING),
        (["lang.training.learning_rate=1e-5"], EVERYTHING),
        (["lang.training.batch_size=5"], EVERYTHING),
        (["lang.training.mlm_probability=0.3"], EVERYTHING),
        (["seed=1"], EVERYTHING),
        (["trainer.precision=bf16-mixed"], EVERYTHING),
        (["rank=energy:0.90"], set()),
        (["value_dtype=float32", "task.value_dtype=float16", "source.value_dtype=float16"], set()),
        (["task.rank=3", "source.rank=3", "task.training.epochs=9"], set()),
        (["trainer=cpu", "trainer.threads=2", "trainer.num_workers=1", "trainer.progress=false"], set()),
        (["logger=csv", "study=other", "paths.cache=/elsewhere", "paths.output=/elsewhere"], set()),
        (["compare=[ltsft]", "controls=[]", "language=[qba,qbb]", "split=test", "missing_text=skip"], set()),
        (["lang.training.log_every=3"], set()),
        (["launcher=joblib", "only=[full:task]", "search.trials=3", "mask=magnitude", "second_phase=true"], set()),
    ],
)
def test_a_setting_changes_the_keys_it_should(
    folder: Path, tmp_path: Path, overrides: list[str], changed: set[str]
) -> None:
    before, after = keys(folder, tmp_path), keys(folder, tmp_path, *overrides)
    assert {name for name in before if before[name] != after[name]} == changed


def test_inputs_are_in_the_keys(folder: Path, tmp_path: Path) -> None:
    one, other = keys(folder, tmp_path), keys(folder, tmp_path, data="other")
    assert not set(one.values()) & set(other.values())


def test_ltsft_ignores_the_rank_and_shares_the_full_phase(folder: Path, tmp_path: Path) -> None:
    denoised = keys(folder, tmp_path)
    plain = keys(folder, tmp_path, "method=ltsft", "rank=3", "residual=drop")
    assert plain == keys(folder, tmp_path, "method=ltsft") == keys(folder, tmp_path, "rank=none")
    assert set(plain) == EVERYTHING - {"decompose"}
    assert plain["full"] == denoised["full"]
    assert plain["sparse"] != denoised["sparse"]


def test_a_random_mask_knows_neither_full_phase_nor_rank(folder: Path, tmp_path: Path) -> None:
    plain, drawn = keys(folder, tmp_path), keys(folder, tmp_path, "mask=random")
    assert set(drawn) == EVERYTHING - {"decompose"}
    assert drawn["full"] == plain["full"]
    assert not {drawn["select"], drawn["sparse"]} & set(plain.values())
    assert drawn == keys(folder, tmp_path, "mask=random", "rank=3", "residual=drop")
    assert drawn["select"] == keys(folder, tmp_path, "mask=random", "lang.training.learning_rate=1e-5")["select"]
    assert drawn["select"] != keys(folder, tmp_path, "mask=random", "seed=1")["select"]


def test_without_a_second_phase_the_change_itself_is_the_sft(folder: Path, tmp_path: Path) -> None:
    plain, direct = keys(folder, tmp_path), keys(folder, tmp_path, "second_phase=false")
    assert set(direct) == {"full", "decompose", "select", "direct"}
    assert {name: direct[name] for name in ("full", "decompose", "select")} == {
        name: plain[name] for name in ("full", "decompose", "select")
    }
    assert direct == keys(folder, tmp_path, "second_phase=false", "lang.training.l1_sparse=0.5")
    ranks = {keys(folder, tmp_path, "second_phase=false", "mask=random", f"rank={rank}")["direct"] for rank in (2, 3)}
    assert len(ranks) == 2, "Δ̂ on a random mask still depends on the rank"


def test_tasks_that_learn_from_the_same_rows_share_their_sft(folder: Path, tmp_path: Path) -> None:
    def of(task: str, language: str) -> dict[str, str]:
        chosen = (f"task={task}", f"language=[{language}]", "data.root=.", "model=minilm", "model.path=.")
        return keys(folder, tmp_path, *chosen, kind="task")

    assert of("americasnli", "quy") == of("xnli", "swa")
    assert not set(of("americasnli", "quy").values()) & set(of("nusax", "ace").values())


def test_without_denoising_a_study_is_called_ltsft() -> None:
    assert study("rank=none").methods == ("ltsft",)
    assert study("rank=none", "compare=[ltsft]").methods == ("ltsft",)
    assert study("lang.rank=none", "task.rank=4").methods == ("deftx",)


def sft(role: str, name: str) -> SFT:
    return SFT(role, name, Path(name), name)


def test_cells_compose_what_their_condition_says() -> None:
    task = {method: sft("task", f"task {method}") for method in ("deftx", "ltsft")}
    language = {(code, m): sft("language", f"{code} {m}") for code in ("ace", "ban", "min") for m in task}
    del language["min", "deftx"], language["min", "ltsft"]  # a target without text
    alone, source = sft("task", "task on θ⁰"), sft("language", "ind")
    cells = plan_cells(
        ["ace", "ban", "min"],
        "deftx",
        task,
        language,
        without_language=alone,
        source_sft=source,
        controls=("no_language_sft", "source_sft", "other_language_sft"),
    )
    found = {
        (cell.language, cell.condition, cell.variant): (
            cell.task.name,
            cell.language_sft.name if cell.language_sft else None,
        )
        for cell in cells
    }
    assert len(found) == len(cells)
    assert found == {
        ("ace", "no_language_sft", ""): ("task on θ⁰", None),
        ("ban", "no_language_sft", ""): ("task on θ⁰", None),
        ("min", "no_language_sft", ""): ("task on θ⁰", None),
        ("ace", "source_sft", ""): ("task deftx", "ind"),
        ("ban", "source_sft", ""): ("task deftx", "ind"),
        ("min", "source_sft", ""): ("task deftx", "ind"),
        ("ace", "other_language_sft", "ban"): ("task deftx", "ban deftx"),
        ("ban", "other_language_sft", "ace"): ("task deftx", "ace deftx"),
        ("min", "other_language_sft", "ace"): ("task deftx", "ace deftx"),
        ("min", "other_language_sft", "ban"): ("task deftx", "ban deftx"),
        ("ace", "deftx", ""): ("task deftx", "ace deftx"),
        ("ban", "deftx", ""): ("task deftx", "ban deftx"),
        ("min", "deftx", ""): ("task deftx", None),
        ("ace", "ltsft", ""): ("task ltsft", "ace ltsft"),
        ("ban", "ltsft", ""): ("task ltsft", "ban ltsft"),
        ("min", "ltsft", ""): ("task ltsft", None),
    }
    assert plan_cells(["ace"], "deftx", task, language, without_language=None, source_sft=None, controls=()) == [
        cell for cell in cells if cell.language == "ace" and cell.condition in task
    ]

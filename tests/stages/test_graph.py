"""Keys of one SFT hold what changes it and nothing else; cells compose what their condition says."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose
from safetensors.numpy import save_file

from deftx.cache import StageCache
from deftx.config import hydra_session
from deftx.config.resolve import study_settings
from deftx.stages.evaluate import cells_of
from deftx.stages.graph import graph, parts_of
from deftx.stages.node import ordered
from deftx.stages.objectives import SFT
from deftx.stages.settings import StudySettings
from deftx.training.model_folder import bert_facts
from deftx.training.settings import PretrainSettings

EVERYTHING = {"full", "decompose", "select", "sparse"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder that can be fingerprinted; nothing loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    facts = bert_facts(PretrainSettings(hidden=16, intermediate=32), 90)
    (folder / "config.json").write_text(json.dumps(facts))
    save_file({"pooler.dense.bias": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@functools.cache
def study(*overrides: str) -> StudySettings:
    with hydra_session():
        return study_settings(compose("run", overrides=["language=[qba]", *overrides]))


@functools.cache
def keys(cache: Path, *overrides: str, whose: str = "language:qba") -> dict[str, str]:
    """Keys of the stages of one SFT by the main method, by stage."""
    settings = study(*overrides)
    nodes = graph(settings, StageCache(cache))
    parts = [p for p in nodes.parts if p.whose == whose and p.method in ("", settings.methods[0])]
    return {node.stage.kind: node.key for part in parts for node in part.nodes}


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
def test_a_setting_changes_the_keys_it_should(tmp_path: Path, overrides: list[str], changed: set[str]) -> None:
    before, after = keys(tmp_path), keys(tmp_path, *overrides)
    assert {name for name in before if before[name] != after[name]} == changed


def test_inputs_are_in_the_keys(tmp_path: Path) -> None:
    one, other = keys(tmp_path), keys(tmp_path, "corpus.min_words=2")
    assert not set(one.values()) & set(other.values())


def test_ltsft_ignores_the_rank_and_shares_the_full_phase(tmp_path: Path) -> None:
    denoised = keys(tmp_path)
    plain = keys(tmp_path, "method=ltsft", "rank=3", "residual=drop")
    assert plain == keys(tmp_path, "method=ltsft") == keys(tmp_path, "rank=none")
    assert set(plain) == EVERYTHING - {"decompose"}
    assert plain["full"] == denoised["full"]
    assert plain["sparse"] != denoised["sparse"]


def test_a_random_mask_knows_neither_full_phase_nor_rank(tmp_path: Path) -> None:
    plain, drawn = keys(tmp_path), keys(tmp_path, "mask=random")
    assert set(drawn) == {"select", "sparse"}
    assert not {drawn["select"], drawn["sparse"]} & set(plain.values())
    assert drawn == keys(tmp_path, "mask=random", "rank=3", "residual=drop")
    assert drawn["select"] == keys(tmp_path, "mask=random", "lang.training.learning_rate=1e-5")["select"]
    assert drawn["select"] != keys(tmp_path, "mask=random", "seed=1")["select"]


def test_without_a_second_phase_the_change_itself_is_the_sft(tmp_path: Path) -> None:
    plain, direct = keys(tmp_path), keys(tmp_path, "second_phase=false")
    assert set(direct) == {"full", "decompose", "select", "direct"}
    assert {name: direct[name] for name in ("full", "decompose", "select")} == {
        name: plain[name] for name in ("full", "decompose", "select")
    }
    assert direct == keys(tmp_path, "second_phase=false", "lang.training.l1_sparse=0.5")
    ranks = {keys(tmp_path, "second_phase=false", "mask=random", f"rank={rank}")["direct"] for rank in (2, 3)}
    assert len(ranks) == 2, "Δ̂ on a random mask still depends on the rank"


def test_tasks_that_learn_from_the_same_rows_share_their_sft(tmp_path: Path, model: Path) -> None:
    header = "premise\thypothesis\tlabel\n"
    files = {
        "multinli/train-en.tsv": header,
        "xnli/dev-sw.tsv": header,
        "xnli/test-sw.tsv": header,
        "americasnli/data/anli_final/test/quy.tsv": "id\tlanguage\tpremise\thypothesis\tlabel\n",
        **{f"unlabelled/{code}.txt": f"text of {code}\n" for code in ("eng", "quy", "swa")},
    }
    for name, text in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def of(task: str, language: str) -> dict[str, str]:
        chosen = (f"task={task}", f"language=[{language}]", f"data.root={tmp_path / 'data'}", "model=minilm")
        return keys(tmp_path / "cache", *chosen, f"model.path={model}", "sparsity=share", "budget=small", whose="task")

    shared = of("americasnli", "quy")
    assert set(shared) == EVERYTHING
    assert shared == of("xnli", "swa")
    (tmp_path / "data" / "multinli" / "train-en.tsv").write_text(header + "a\tb\tneutral\n", encoding="utf-8")
    keys.cache_clear()
    assert not set(of("xnli", "swa").values()) & set(shared.values())


def test_without_denoising_a_study_is_called_ltsft() -> None:
    assert study("rank=none").methods == ("ltsft",)
    assert study("rank=none", "compare=[ltsft]").methods == ("ltsft",)
    assert study("lang.rank=none", "task.rank=4").methods == ("deftx",)


def sft(kind: str, name: str) -> SFT:
    return SFT(kind, name, key=name)


def test_cells_compose_what_their_condition_says() -> None:
    methods = ("deftx", "ltsft")
    sfts = {("task", "", method): sft("task", f"task {method}") for method in methods}
    # The target min has no text.
    sfts |= {("language", code, m): sft("language", f"{code} {m}") for code in ("ace", "ban") for m in methods}
    sfts["task_alone", "", "deftx"] = sft("task", "task on θ⁰")
    sfts["source", "ind", ""] = sft("language", "ind")
    controls = ("no_language_sft", "source_sft", "other_language_sft")
    cells = cells_of(["ace", "ban", "min"], methods, controls, "ind", sfts)
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
        ("min", "deftx_without_language_sft", ""): ("task deftx", None),
        ("ace", "ltsft", ""): ("task ltsft", "ace ltsft"),
        ("ban", "ltsft", ""): ("task ltsft", "ban ltsft"),
        ("min", "ltsft_without_language_sft", ""): ("task ltsft", None),
    }
    assert cells_of(["ace"], methods, (), "ind", sfts) == [
        cell for cell in cells if cell.language == "ace" and cell.condition in methods
    ]


# ------------------------------------------------------------------------------------------------------- the graph


def test_every_node_stands_after_what_it_needs(tmp_path: Path) -> None:
    nodes = graph(study("compare=[ltsft]"), StageCache(tmp_path)).nodes
    seen: set[str] = set()
    for node in nodes:
        assert {need.key for need in node.needs.values()} <= seen
        assert {need.key for need in node.needs.values()} <= set(node.stage.inputs.values())
        seen.add(node.key)
    assert len(seen) == len(nodes)
    assert nodes == ordered(nodes)


def test_the_parts_of_a_study_are_those_that_only_takes(tmp_path: Path) -> None:
    for overrides in ((), ("compare=[ltsft]",), ("source=none", "controls=[]"), ("mask=random",)):
        settings = study(*overrides)
        named = {part.name for part in graph(settings, StageCache(tmp_path)).parts}
        assert named == {part.name for part in parts_of(settings)}

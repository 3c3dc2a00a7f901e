"""φ_S is made as the language SFTs of its column are, by its method; or it is shared, and every table says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose

from deftx.cache import StageCache
from deftx.config import hydra_session, study_settings
from deftx.stages.graph import StudyGraph, graph
from deftx.stages.objectives import SFT
from deftx.stages.settings import StudySettings
from deftx.tracking import title_of


def settings(*overrides: str) -> StudySettings:
    with hydra_session():
        return study_settings(compose("run", overrides=["language=[qba]", "controls=[]", *overrides]))


def built(tmp_path: Path, *overrides: str) -> StudyGraph:
    return graph(settings(*overrides), StageCache(tmp_path))


def under(nodes: StudyGraph) -> dict[str, SFT]:
    """φ_S by the method of the task SFT on it."""
    by_key = {sft.key: sft for sft in nodes.sfts}
    tasks = {cell.condition: cell.task for cell, _ in nodes.cells}
    return {condition: by_key[task.on[0]] for condition, task in tasks.items()}


def policies(sft: SFT) -> dict[str, object]:
    """What decides an SFT's mask and values, from the nodes that make it."""
    assert sft.node is not None
    select = sft.node.needs["select"].stage.settings
    return {**select, "kind": sft.node.stage.kind}


def test_every_column_has_its_own_source_sft(tmp_path: Path) -> None:
    nodes = built(tmp_path, "compare=[ltsft,random_mask]", "rank=3", "residual=drop", "density=0.07")
    sources = under(nodes)
    assert len({sft.key for sft in sources.values()}) == 3
    languages = {cell.condition: cell.language_sft for cell, _ in nodes.cells}
    for method, source in sources.items():
        own, language = policies(source), languages[method]
        assert language is not None
        for name in ("language", "objective"):
            own.pop(name, None)
        assert own == {
            name: value for name, value in policies(language).items() if name not in ("language", "objective")
        }
        assert own["density"] == 0.07
    assert {method: policies(sft).get("rank") for method, sft in sources.items()} == {
        "deftx": "3",
        "ltsft": None,
        "random_mask": None,
    }
    # What LT-SFT and DeFT-X learn of the source's text alone is the same full phase; the task's is each one's own.
    full = [node for node in nodes.nodes if node.stage.kind == "full"]
    assert sorted(node.stage.label for node in full) == ["language qaa", "language qba", *["task on θ⁰+qaa"] * 2]


@pytest.mark.parametrize("ablation", ["denoising", "sparsity", "second_phase", "selection"])
def test_an_ablation_is_one_of_the_source_sft_too(tmp_path: Path, ablation: str) -> None:
    whole, ablated = (built(tmp_path, f"ablate={name}") for name in ("nothing", ablation))
    (before,), (after,) = under(whole).values(), under(ablated).values()
    assert before.key != after.key


def test_a_shared_source_sft_is_one_and_moves_with_nothing(tmp_path: Path) -> None:
    first = under(built(tmp_path, "source=shared", "compare=[ltsft]", "rank=3"))
    second = under(built(tmp_path, "source=shared", "compare=[ltsft]", "rank=4", "density=0.5"))
    assert len({sft.key for sft in (*first.values(), *second.values())}) == 1


@pytest.mark.parametrize(
    ("experiment", "shared"),
    [
        *((name, True) for name in ("rank_ablation", "rank_x_sparsity", "residual_ablation", "sparsity_ablation")),
        *((name, True) for name in ("search", "xnli_morphology")),
        *((name, False) for name in ("component_ablation", "nusax", "americasnli", "demo")),
    ],
)
def test_shipped_experiments_say_whose_source_sft_it_is(experiment: str, shared: bool) -> None:
    with hydra_session():
        config = compose("run", overrides=[f"experiment={experiment}"])
    assert config.source.shared is shared


def test_titles_say_that_it_is_shared() -> None:
    assert title_of("ltsft", shared_source=True) == "LT-SFT, shared φ_S"
    assert title_of("ltsft") == "LT-SFT"
    assert title_of("no_language_sft", shared_source=True) == "no language SFTs"

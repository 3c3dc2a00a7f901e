"""What a composed configuration resolves to: which knob moves which SFT."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose

from deftx.config import hydra_session, study_settings
from deftx.core.settings import RankPolicy
from deftx.stages.settings import SFTSettings


def sfts(*overrides: str) -> dict[str, SFTSettings]:
    with hydra_session():
        study = study_settings(compose("run", overrides=list(overrides)))
    assert study.source_sft is not None
    return {"lang": study.language_sft, "task": study.task_sft, "source": study.source_sft}


@pytest.mark.parametrize(
    ("overrides", "name", "expected"),
    [
        # A knob at the top moves all SFTs, a scope's own one of them; φ_S follows the language SFTs.
        (["rank=3"], "rank", (RankPolicy("fixed", 3), RankPolicy("fixed", 3), RankPolicy("fixed", 3))),
        (["rank=3", "task.rank=none"], "rank", (RankPolicy("fixed", 3), None, RankPolicy("fixed", 3))),
        (["mask=random"], "mask", ("random", "random", "random")),
        (["lang.mask=random"], "mask", ("random", "magnitude", "random")),
        (["source.mask=random"], "mask", ("magnitude", "magnitude", "random")),
        (["mask=random", "task.mask=magnitude"], "scored", ("random", "denoised_change", "random")),
        (["task.second_phase=false"], "second_phase", (True, False, True)),
        (["second_phase=false", "lang.second_phase=true"], "second_phase", (True, False, True)),
        (["second_phase=false"], "second_phase", (False, False, False)),
        (["value_dtype=float16"], "value_dtype", ("float16", "float16", "float16")),
        (["denoise.exclude=[b,a]"], "exclude", (["a", "b"], ["a", "b"], ["a", "b"])),
        # Of sizes the SFT's own counts, then the top's, then the sparsity group's.
        (["k=7"], "size", ((7, None), (7, None), (7, None))),
        (["k=7", "task.density=0.5"], "size", ((7, None), (None, 0.5), (7, None))),
        (["lang.k=8", "k=7"], "size", ((8, None), (7, None), (8, None))),
        (["sparsity.language.k=9"], "size", ((9, None), (None, 0.3), (9, None))),
        # A φ_S that all share stands apart.
        (
            ["source=shared", "rank=3"],
            "rank",
            (RankPolicy("fixed", 3), RankPolicy("fixed", 3), RankPolicy("energy", 0.9)),
        ),
        (["source=shared", "mask=random"], "mask", ("random", "random", "magnitude")),
        (["source=shared", "k=7"], "size", ((7, None), (7, None), (None, 0.3))),
        (["source=shared", "value_dtype=float16"], "value_dtype", ("float16", "float16", "float32")),
    ],
)
def test_a_knob_moves_its_sfts(overrides: list[str], name: str, expected: tuple[Any, ...]) -> None:
    found = sfts(*overrides)
    values = [(sft.k, sft.density) if name == "size" else getattr(sft, name) for sft in found.values()]
    assert tuple(values) == expected


@pytest.mark.parametrize(
    ("asked", "overrides", "methods"),
    [
        (["deftx", "ltsft"], [], ("deftx", "ltsft")),
        (["deftx", "ltsft"], ["rank=none"], ("ltsft",)),
        (["deftx", "ltsft", "random_mask"], ["mask=random"], ("random_mask",)),
        (["deftx", "ltsft"], ["mask=random", "lang.mask=magnitude"], ("deftx", "ltsft")),
        (["deftx", "ltsft"], ["second_phase=false"], ("deftx", "ltsft")),
        # Δ̂ on a random mask is what random_mask makes of these settings; Δ is not.
        (["deftx"], ["mask=random", "second_phase=false"], ("random_mask",)),
        (["ltsft"], ["mask=random", "second_phase=false"], ("ltsft",)),
        (["deftx", "ltsft"], ["mask=random", "second_phase=false"], ("random_mask", "ltsft")),
        (["ltsft", "deftx"], ["mask=random", "second_phase=false"], ("ltsft", "random_mask")),
        (["deftx", "ltsft"], ["mask=random", "second_phase=false", "rank=none"], ("random_mask",)),
    ],
)
def test_a_method_is_called_what_its_choices_make_it(
    asked: list[str], overrides: list[str], methods: tuple[str, ...]
) -> None:
    chosen = [f"method={asked[0]}", f"compare=[{','.join(asked[1:])}]"]
    with hydra_session():
        study = study_settings(compose("run", overrides=["experiment=demo", *chosen, *overrides]))
    assert study.methods == methods
    # Whatever it is called, it is trained as it was asked for, and each once.
    made: list[list[SFTSettings]] = []
    for name in asked:
        if (both := [study.language_sft.by(name), study.task_sft.by(name)]) not in made:
            made.append(both)
    assert [[study.language_sft.by(name), study.task_sft.by(name)] for name in study.methods] == made

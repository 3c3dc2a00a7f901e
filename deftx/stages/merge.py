"""Nodes that make one language SFT from several: an average over seeds, or a proxy for a language without text.

An average is the mean of the φ_L of several seeds; a proxy is a weighted sum of relatives' φ_L. Both are SFTs like any
other to what reads them. They have no head: what they are composed with brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deftx.cache import Workspace
from deftx.stages.inputs import write_json
from deftx.stages.learn import METRICS
from deftx.stages.node import Loggers, node
from deftx.stages.objectives import SFT, SFT_FOLDER


def merged_sft(language: str, name: str, terms: Sequence[tuple[SFT, float]], facts: Mapping[str, object]) -> SFT:
    """Return the weighted sum of language SFTs as an SFT of its own.

    Args:
        language: Code of the language that it stands for.
        name: For tables and logs.
        terms: SFTs that the study trains, and their weights; in this order they are added.
        facts: What ``sft.json`` says of how it was made.
    """
    needs = {f"sft.{number}": sft.node for number, (sft, _) in enumerate(terms) if sft.node is not None}
    if len(needs) < len(terms):
        raise ValueError(f"{name}: only SFTs that the study trains are merged into one")

    def compute(work: Workspace, loggers: Loggers) -> None:
        from deftx.core.delta import SparseDelta
        from deftx.core.merging import Term, merge

        deltas = [SparseDelta.load(work.inputs[need].path / SFT_FOLDER) for need in needs]
        # Numbers with leading zeros, because terms are added in the order of their names.
        parts = [
            Term(f"{number:04}", replace(delta, head={}), weight)
            for number, (delta, (_, weight)) in enumerate(zip(deltas, terms, strict=True))
        ]
        merged = merge("sum", parts)
        own = {"languages": [language], "k": merged.k, "density": None, "metrics": {}, **facts}
        replace(merged, metadata={**deltas[0].metadata, **own}).save(work.out / SFT_FOLDER)
        write_json(work.out / METRICS, {})

    made = node(
        "merge",
        1,
        {"language": language, "weights": [weight for _, weight in terms]},
        compute,
        needs=needs,
        label=name,
        product=(f"{SFT_FOLDER}/sft.safetensors",),
        size=sum(sft.node.size for sft, _ in terms if sft.node is not None),
    )
    first = terms[0][0]
    return SFT("language", name, made.key, node=made, composition=first.composition)

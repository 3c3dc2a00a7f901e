"""Measures of each target's text beside its scores, as a cached stage: does the best sparsity follow morphology?"""

from __future__ import annotations

import json
from typing import Any

from deftx.cache import Stage, StageCache, Workspace
from deftx.stages.inputs import Base, Corpus


def profile_stage(language: str, corpus: Corpus, base: Base) -> Stage:
    """The stage of one language's measures: they depend on its text and on the base's tokenizer."""
    return Stage(
        kind="profile",
        version=1,
        settings={"language": language},
        inputs={"text": corpus.key, "base": base.key},
        label=f"text measures {language}",
    )


def profile(language: str, corpus: Corpus, base: Base, cache: StageCache) -> dict[str, Any]:
    """Subword fertility, type-token ratio and words per sentence of a language (:mod:`deftx.data.morphology`)."""

    def compute(work: Workspace) -> None:
        from deftx.data.morphology import text_profile
        from deftx.training.encoder import load_tokenizer

        tokenizer = load_tokenizer(base.folder)

        def count(words: list[str]) -> int:
            encoded = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
            return sum(map(len, encoded))

        found = text_profile(corpus.lines("train"), count)
        (work.out / "profile.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    entry = cache.get_or_compute(profile_stage(language, corpus, base), compute)
    return dict(json.loads(entry.file("profile.json").read_text(encoding="utf-8")))

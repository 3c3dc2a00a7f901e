"""conf/language: one file a language, each usable by every loader it names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from upstream_folders import AMERICAS, CONF, NUSAX, XNLI, Upstream, language, write

from deftx.data.corpora import build_corpus, resolve_text
from deftx.data.labelled import AMERICASNLI_LANGUAGES, NUSAX_LANGUAGES, TASKS, XNLI_LANGUAGES
from deftx.data.settings import LANGUAGE_ALIASES, CorpusSettings, DataSettings, LanguageSettings
from deftx.data.tasks import load_test, protected_texts

NATURAL = sorted(path.stem for path in CONF.glob("*.yaml") if not re.fullmatch(r"q[a-t][a-z]", path.stem))
PUBLIC = [code for code in NATURAL if {language(code).nusax, language(code).americasnli, language(code).xnli} != {None}]
"""Languages of the public sets; others may stand beside them."""
NO_WIKIPEDIA = {"bbc", "nij", "bzd", "cni", "hch", "oto", "shp", "tar"}
WIKIPEDIA = {"jav": "jv", "sun": "su", "quy": "qu", "aym": "ay", "gn": "gn", "ind": "id", "eng": "en", "zho": "zh"}


@pytest.mark.parametrize("code", NATURAL)
def test_file_opens_with_its_package_and_a_command(code: str) -> None:
    first, second = (CONF / f"{code}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert first == f"# @package language.{code}"
    assert re.match(rf"# deftx run .*\blanguage={code} ", second)


@pytest.mark.parametrize("code", NATURAL)
def test_file_fills_the_settings(code: str) -> None:
    values = yaml.safe_load((CONF / f"{code}.yaml").read_text(encoding="utf-8"))
    assert set(values) <= {item.name for item in dataclasses.fields(LanguageSettings)}
    assert values["code"] == code
    assert values["name"]
    assert values["family"]
    assert values["script"]


def test_every_language_of_every_set_has_one_file() -> None:
    settings = {code: language(code) for code in PUBLIC}
    assert sorted(item.nusax for item in settings.values() if item.nusax) == sorted(NUSAX)
    assert sorted(item.americasnli for item in settings.values() if item.americasnli) == sorted(AMERICAS)
    assert sorted(item.xnli for item in settings.values() if item.xnli) == sorted(XNLI)
    assert {code for code, item in settings.items() if item.nusax} == set(NUSAX_LANGUAGES)
    assert {code for code, item in settings.items() if item.americasnli} == set(AMERICASNLI_LANGUAGES)
    assert {item.xnli for item in settings.values() if item.xnli} == set(XNLI_LANGUAGES)
    assert len(settings) == 12 + 10 + 15 - 1  # English is in NusaX and XNLI; Spanish is one of XNLI's


def test_wikipedia_codes() -> None:
    assert {code for code in PUBLIC if language(code).wikipedia is None} == NO_WIKIPEDIA
    assert {code: language(code).wikipedia for code in WIKIPEDIA} == WIKIPEDIA


def test_aliases_name_files_and_hide_none() -> None:
    assert set(LANGUAGE_ALIASES.values()) <= set(NATURAL)
    assert not set(LANGUAGE_ALIASES) & set(NATURAL)
    assert {"en": "eng", "es": "spa", "id": "ind", "jv": "jav"}.items() <= LANGUAGE_ALIASES.items()


@pytest.mark.parametrize("code", PUBLIC)
def test_a_clone_with_the_language_is_enough(code: str, upstream: Upstream, tmp_path: Path) -> None:
    """Also for languages whose data nobody had at hand while this was written."""
    settings = language(code)
    data = DataSettings(root=str(upstream.root))
    tasks = [task for task in ("nusax", "americasnli", "xnli") if getattr(settings, task)]
    assert tasks
    expected = 0
    for task in tasks:
        for split in ("dev", "test"):
            rows = load_test(task, settings, data, split)
            assert len(rows) == 6
            assert set(rows["label"]) == {0, 1, 2}
            assert rows["text_pair"].notna().all() == TASKS[task].pair
            expected += 12 if TASKS[task].pair else 6
    protected = protected_texts(settings, data).texts
    assert len(protected) == expected

    text = write(tmp_path / "t.txt", "".join(f"{line}\n" for line in protected) + "one two three\nfour five six\n" * 40)
    settings.text = [str(text)]
    corpus = build_corpus(resolve_text(settings, data), protected, CorpusSettings(deduplicate=False), seed=0)
    assert corpus.report["leak"]["by_kind"]["exact"] == expected
    assert set(corpus.train) == {"one two three", "four five six"}


@pytest.mark.parametrize("code", PUBLIC)
def test_text_is_found_below_the_root_or_on_wikipedia(code: str, tmp_path: Path) -> None:
    settings = language(code)
    own = write(tmp_path / "unlabelled" / f"{code}.txt", "line\n")
    assert resolve_text(settings, DataSettings(root=str(tmp_path))).files == (own,)
    for pattern in settings.local_text:
        assert not Path(pattern).is_absolute()
        known = write(tmp_path / pattern.replace("*", "x"), "line\n")
        assert known in resolve_text(settings, DataSettings(root=str(tmp_path))).files
    if settings.wikipedia is not None:
        hub = resolve_text(settings, DataSettings()).hub
        assert hub is not None
        assert (hub.dataset, hub.config) == ("wikimedia/wikipedia", f"20231101.{settings.wikipedia}")


def test_evaluation_translations_are_not_text_sources(tmp_path: Path) -> None:
    """AmericasNLP's dev and test files are AmericasNLI sentences: no pattern may match them."""
    for code in AMERICAS:
        folder = tmp_path / "americasnlp2021/data/some-spanish"
        for split in ("dev", "test"):
            write(folder / f"{split}.{code}", "line\n")
        train = write(folder / ("train_nontok.tar" if code == "tar" else f"train.{code}"), "line\n")
        assert resolve_text(language(code), DataSettings(root=str(tmp_path))).files == (train,)

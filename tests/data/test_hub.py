"""The hub without a network: which commit a name is, and rows and text from a hub cache laid out by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import pytest
from huggingface_hub.errors import RevisionNotFoundError
from upstream_folders import Upstream, language

from deftx.data import hub
from deftx.data.corpora import resolve_text
from deftx.data.hub import HubRef, load_hub, resolve_commit
from deftx.data.settings import DataSettings
from deftx.data.tasks import load_test, load_train, protected_texts, train_places
from deftx.errors import DeftxError

OLD, NEW = "a" * 40, "b" * 40
Put = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's local cache, empty, with ``HF_HUB_OFFLINE=1``."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    resolve_commit.cache_clear()
    yield folder
    resolve_commit.cache_clear()


@pytest.fixture
def put(cache: Path, hub_copy: Callable[..., Path]) -> Put:
    """Put a data set into the hub's cache at a commit, and let ``main`` be it."""

    def build(repo: str, commit: str, configs: dict[str, dict[str, dict[str, list[object]]]]) -> Path:
        folder = cache / f"datasets--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(hub_copy("made", configs), snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return snapshot

    return build


def answer(monkeypatch: pytest.MonkeyPatch, reply: Callable[[str, str | None], str]) -> list[tuple[object, ...]]:
    """Let the hub answer; what it was asked is returned."""
    asked: list[tuple[object, ...]] = []

    class Api:
        def repo_info(self, repo_id: str, *, revision: str | None, repo_type: str, timeout: float) -> object:
            asked.append((repo_id, revision, repo_type))
            return SimpleNamespace(sha=reply(repo_id, revision))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return asked


# --- commits


def test_a_full_commit_is_asked_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, lambda repo, revision: NEW)
    assert resolve_commit("owner/name", OLD, "dataset") == OLD
    assert asked == []


def test_the_hub_is_asked_once_a_process_and_remembered_by_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        asked = answer(patch, lambda repo, revision: {None: NEW, "v1": OLD}[revision])
        for _ in range(2):
            assert resolve_commit("owner/name", None, "dataset") == NEW
            assert resolve_commit("owner/name", "v1", "model") == OLD
    assert asked == [("owner/name", None, "dataset"), ("owner/name", "v1", "model")]
    resolve_commit.cache_clear()
    assert resolve_commit("owner/name", None, "dataset") == NEW
    assert resolve_commit("owner/name", "v1", "model") == OLD
    assert [path.name for path in (cache / "datasets--owner--name/refs").iterdir()] == ["main"]


@pytest.mark.parametrize(("kind", "step"), [("dataset", r"data\.<name>=FOLDER"), ("model", r"model\.path=FOLDER")])
def test_a_commit_nobody_knows_is_one_message(cache: Path, kind: str, step: str) -> None:
    with pytest.raises(DeftxError, match=rf"{kind} 'owner/name': .* which commit 'v2' is .*{step}"):
        resolve_commit("owner/name", "v2", kind)
    note = cache / f"{kind}s--owner--name/refs/v2"
    note.parent.mkdir(parents=True)
    note.write_text("half a comm")
    with pytest.raises(DeftxError, match="the local cache does not know it"):
        resolve_commit("owner/name", "v2", kind)
    note.write_text(f"{OLD}\n")
    assert resolve_commit("owner/name", "v2", kind) == OLD


def test_a_revision_that_is_gone_is_not_read_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(repo: str, revision: str | None) -> str:
        raise RevisionNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://x")))

    answer(monkeypatch, gone)
    note = cache / "datasets--owner--name/refs/v2"
    note.parent.mkdir(parents=True)
    note.write_text(OLD)
    with pytest.raises(DeftxError, match=r"dataset 'owner/name' has no revision 'v2' on the hub"):
        resolve_commit("owner/name", "v2", "dataset")


def test_a_folder_has_no_commit(cache: Path, tmp_path: Path) -> None:
    ref = HubRef(str(tmp_path), "ace")
    assert ref.resolved() is ref
    (cache / "datasets--owner--name/refs").mkdir(parents=True)
    (cache / "datasets--owner--name/refs/main").write_text(NEW)
    assert HubRef("owner/name", "ace").resolved() == HubRef("owner/name", "ace", NEW)


# --- reading at a commit


def sentiment(*texts: str) -> dict[str, list[object]]:
    return {"text": list(texts), "label": [0, 1, 2][: len(texts)]}


def test_rows_are_those_of_the_commit(put: Put, tmp_path: Path) -> None:
    for commit, text in ((OLD, "old"), (NEW, "new")):
        put("mteb/NusaX-senti", commit, {"ace": {"test": sentiment(text, "b", "c"), "validation": sentiment("d")}})
    data = DataSettings(cache_dir=str(tmp_path / "cache"))
    assert load_test("nusax", language("ace"), data)["text"].tolist() == ["new", "b", "c"]
    assert load_test("nusax", language("ace"), data, "dev")["text"].tolist() == ["d"]
    data.revisions = {"nusax": OLD}
    assert load_test("nusax", language("ace"), data)["text"].tolist() == ["old", "b", "c"]
    data.revisions = {"nusax": "c" * 40}
    with pytest.raises(DeftxError, match=r"mteb/NusaX-senti \(ace\), split 'test', could not be loaded.*data\.root"):
        load_test("nusax", language("ace"), data)


def test_training_rows_protected_sentences_and_text_come_from_the_cache(
    put: Put, upstream: Upstream, tmp_path: Path
) -> None:
    train = upstream.root / "indonlu/dataset/smsa_doc-sentiment-prosa/train_preprocess.tsv"
    leaked = train.read_text().splitlines()[1].split("\t")[0]
    put("mteb/NusaX-senti", NEW, {"ind": {"test": sentiment(leaked, "b"), "validation": sentiment("c")}})
    put("wikimedia/wikipedia", OLD, {"20231101.id": {"train": {"text": ["Satu.\nDua.", "Tiga."]}}})
    data = DataSettings(smsa=str(upstream.root / "indonlu"), protect=["nusax"], cache_dir=str(tmp_path / "cache"))
    loaded = load_train("smsa", language("ind"), data, seed=0)
    assert loaded.report["train"]["leak"]["dropped"] == 1
    assert loaded.report["leak"]["protected"] == 3
    assert protected_texts(language("ind"), data).texts == ["c", leaked, "b"]
    wiki = resolve_text(language("ind"), data)
    assert list(wiki.pieces(0.5)) == [(["Satu.", "Dua.", "Tiga."], 2)]
    assert wiki.identity() == {"hub": "wikimedia/wikipedia", "config": "20231101.id", "revision": OLD}


def test_part_of_a_split_is_not_the_split(put: Put, tmp_path: Path) -> None:
    snapshot = put("owner/name", NEW, {"default": {"train": {"text": ["a"]}, "test": {"text": ["b"]}}})
    (shard,) = (snapshot / "default").glob("train-*")
    shard.rename(shard.with_name("train-00000-of-00002.parquet"))
    ref = HubRef("owner/name", "default", cache_dir=str(tmp_path / "cache"))
    assert load_hub(ref, "test")["text"][:] == ["b"]
    with pytest.raises(DeftxError, match=r"split 'train', .*holds 1 of its 2 files"):
        load_hub(ref, "train")
    shutil.copy(shard.with_name("train-00000-of-00002.parquet"), shard.with_name("train-00001-of-00002.parquet"))
    assert load_hub(ref, "train")["text"][:] == ["a", "a"]


def test_a_folder_is_read_as_it_is_now(hub_copy: Callable[..., Path], tmp_path: Path) -> None:
    """``datasets`` alone would give what it prepared of the folder before."""
    for texts in (["a"], ["b", "c"]):
        folder = hub_copy("copy", {"ace": {"test": {"text": texts}}})
        assert load_hub(HubRef(str(folder), "ace", cache_dir=str(tmp_path / "cache")), "test")["text"][:] == texts


def test_what_datasets_prepared_of_another_commit_is_not_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, ``datasets`` takes the newest commit it has prepared, whichever is asked for."""
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=OLD, config=None))
    monkeypatch.setattr(hub, "_snapshot_builder", lambda ref, split: None)
    with pytest.raises(DeftxError, match=f"the cache of datasets holds commit {OLD}, not {NEW}"):
        load_hub(HubRef("owner/name", None, NEW), "train")


# --- keys


def test_protected_rows_of_the_hub_are_known_by_id_and_commit(
    cache: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, lambda repo, revision: {"a/nusax": OLD, "b/nusax": NEW}.get(repo, "c" * 40))
    prints = {}
    for nusax in ("a/nusax", "b/nusax", "c/nusax"):
        data = DataSettings(root=str(upstream.root), nusax=nusax)
        places = train_places("smsa", language("ind"), data)
        assert [place.split for place in places.protected] == ["validation", "test"]
        assert [place.hub.dataset for place in places.protected if place.hub] == [nusax] * 2
        prints[nusax] = tuple(place.fingerprint() for place in places.protected)
    assert len(set(prints.values())) == 3
    assert len({text for pair in prints.values() for text in pair}) == 6
    place = train_places("smsa", language("ind"), DataSettings(root=str(upstream.root), nusax="a/nusax")).protected[1]
    assert place.description() == {
        "hub": "a/nusax",
        "config": "ind",
        "revision": OLD,
        "digest": prints["a/nusax"][1],
    }

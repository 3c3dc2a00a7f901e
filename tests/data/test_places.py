"""Places and text sources as values: what they are identified by before anything is read, and what is in no key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from upstream_folders import AMERICASNLI_HEADER, Upstream, language, tsv, write

from deftx.cache import StageCache
from deftx.data.corpora import TextSource, resolve_text
from deftx.data.labelled import SETS, TASKS, TRAIN_SETS
from deftx.data.places import Origin, Place, digest_files
from deftx.data.rows import read_rows, read_sentences
from deftx.data.settings import PROTECTED, DataSettings, FamilyData, LanguageSettings, SyntheticSettings
from deftx.data.synthetic import family_data, generate_family
from deftx.data.tasks import (
    Evaluation,
    TrainPlaces,
    evaluation_place,
    load_test,
    load_train,
    protected_places,
    protected_texts,
    train_places,
)
from deftx.errors import DeftxError

OWN = LanguageSettings(code="xxx", name="Own")
COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def hub_knows_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every revision on the hub is one commit, unless it is one itself."""
    monkeypatch.setattr(
        "deftx.data.hub.resolve_commit", lambda repo, revision, kind: revision if len(revision or "") == 40 else COMMIT
    )


def everything(places: TrainPlaces) -> list[Place]:
    return [place for place in (places.train, places.valid, *places.protected) if place is not None]


def names(places: Sequence[Origin], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for place in places for path in place.local_files]


# --- the table


def test_sets_and_their_readings() -> None:
    assert {"synthetic", "nusax", "americasnli", "xnli", "sentiment", "nli", "tsv"} <= set(TASKS)
    assert {"smsa", "nusax", "multinli", "synthetic", "sentiment", "nli", "tsv"} <= set(TRAIN_SETS)
    assert not {"smsa", "multinli"} & set(TASKS)
    assert not {"americasnli", "xnli"} & set(TRAIN_SETS)  # their dev and test never train or select
    assert set(SETS) == {*TASKS, *TRAIN_SETS}
    assert {name for name, spec in TASKS.items() if not spec.own and not spec.generated} == set(PROTECTED)
    assert {guard.name for spec in SETS.values() for guard in spec.guards} <= set(TASKS)
    assert {name for name, spec in SETS.items() if not spec.several} == {"synthetic", "smsa"}


def test_what_training_reads(upstream: Upstream, hub_copy: Callable[..., Path], tmp_path: Path) -> None:
    data = DataSettings(root=str(upstream.root))
    smsa = train_places("smsa", language("ind"), data)
    assert names(everything(smsa), upstream.root) == [
        "indonlu/dataset/smsa_doc-sentiment-prosa/train_preprocess.tsv",
        "indonlu/dataset/smsa_doc-sentiment-prosa/valid_preprocess.tsv",
        "nusax/datasets/sentiment/indonesian/valid.csv",
        "nusax/datasets/sentiment/indonesian/test.csv",
    ]
    multinli = train_places("multinli", language("spa"), data)
    assert multinli.valid is None
    assert names(everything(multinli), upstream.root) == [
        "multinli/train-es.tsv",
        "xnli/dev-es.tsv",
        "xnli/test-es.tsv",
    ]
    nusax = train_places("nusax", language("ace"), data)
    assert names(nusax.protected, upstream.root) == ["nusax/datasets/sentiment/acehnese/test.csv"]
    # Only evaluation sets at hand filter MultiNLI.
    hub = train_places("multinli", language("eng"), DataSettings())
    assert hub.train.hub is not None
    assert hub.protected == ()
    copy = hub_copy(
        "copy", {"ace": {split: {"text": ["a"], "label": [0]} for split in ("train", "validation", "test")}}
    )
    assert len(train_places("nusax", language("ace"), DataSettings(nusax=str(copy))).train.local_files) == 4
    smsa = train_places("smsa", language("ind"), DataSettings(nusax=str(upstream.root / "nusax")))
    assert smsa.train.url.endswith("/train_preprocess.tsv")
    assert smsa.train.identity()["url"] == smsa.train.url


@pytest.mark.parametrize("train", ["smsa", "nusax", "multinli", "sentiment"])
def test_loading_reads_the_places_and_nothing_else(
    train: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write(tmp_path / "own.tsv", tsv("text label", [[f"row number {i} here", "neutral"] for i in range(40)]))
    data = DataSettings(root=str(upstream.root), train=str(file), test=str(file).replace("own", "{language}"))
    write(tmp_path / "ind.tsv", tsv("text label", [["one of the test rows", "neutral"]]))
    spoken = language("eng" if train == "multinli" else "ind")
    read = []
    monkeypatch.setattr("deftx.data.tasks.read_rows", lambda place: read.append(place) or read_rows(place))
    monkeypatch.setattr("deftx.data.tasks.read_sentences", lambda place: read.append(place) or read_sentences(place))
    load_train(train, spoken, data, seed=0)
    assert set(read) == set(everything(train_places(train, spoken, data)))
    read.clear()
    protected_texts(spoken, data)
    assert read == protected_places(spoken, data)
    read.clear()
    load_test("xnli", language("swa"), data)
    assert read == [evaluation_place("xnli", language("swa"), data)]
    read.clear()
    evaluation = Evaluation("xnli" if train == "multinli" else "sentiment", ("test",), (spoken, language("jav")))
    load_train(train, spoken, data, 0, evaluation)
    assert set(read) == set(everything(train_places(train, spoken, data, evaluation)))
    read.clear()
    protected_texts(spoken, data, evaluation)
    assert read == protected_places(spoken, data, evaluation)
    assert len(read) == len(protected_places(spoken, data)) + (train != "multinli")


# --- fingerprints


def test_digest_is_the_caches(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.txt", "x\n"), write(tmp_path / "b.txt", "y\n")]
    assert digest_files(files) == StageCache(tmp_path / "cache").fingerprint(files)
    with pytest.raises(DeftxError, match=r"none\.txt cannot be read: No such file"):
        digest_files([tmp_path / "none.txt"])


def test_text_is_identified_by_content_and_order(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", "x\n"), write(tmp_path / "b.txt", "y\n")
    moved = write(tmp_path / "elsewhere/c.md", "x\n")

    def fingerprint(*files: Path) -> str:
        return TextSource(language="xxx", files=files).fingerprint()

    assert fingerprint(a) == fingerprint(moved)
    assert len({fingerprint(a), fingerprint(b), fingerprint(a, b), fingerprint(b, a)}) == 4
    hub = {resolve_text(language(code), DataSettings()).fingerprint() for code in ("quy", "aym")}
    hub.add(resolve_text(language("quy"), DataSettings(revisions={"wikipedia": "a" * 40})).fingerprint())
    assert len(hub) == 3
    wiki = resolve_text(language("quy"), DataSettings())
    about = {"hub": "wikimedia/wikipedia", "config": "20231101.qu", "revision": COMMIT}
    assert wiki.identity() == about
    assert wiki.description() == {**about, "digest": wiki.fingerprint()}


def test_nothing_is_hashed_before_it_is_asked_for(tmp_path: Path, upstream: Upstream) -> None:
    def refuse(files: Sequence[Path]) -> str:
        raise AssertionError(files)

    asked: list[tuple[Path, ...]] = []

    def digest(files: Sequence[Path]) -> str:
        asked.append(tuple(files))
        return "d"

    data = DataSettings(root=str(upstream.root))
    place = evaluation_place("nusax", language("ace"), data)
    assert asked == []
    assert place.identity(digest) == {
        "dataset": "nusax",
        "split": "test",
        "language": "acehnese",
        "files": [".csv"],
        "digest": "d",
    }
    assert asked == [place.files]
    evaluation_place("nusax", language("ace"), DataSettings()).fingerprint(refuse)  # a commit says it


def test_places_that_give_other_rows_differ(tmp_path: Path, hub_copy: Callable[..., Path]) -> None:
    rows = [["1", "quy", "a", "b", "neutral"]]
    path = "data/anli_final/test/quy.tsv"
    prints: dict[str, str] = {}
    for name, text in (("here", "a"), ("there", "a"), ("other", "c")):
        rows[0][2] = text
        write(tmp_path / name / path, tsv(AMERICASNLI_HEADER, rows))
        data = DataSettings(americasnli=str(tmp_path / name))
        place = evaluation_place("americasnli", language("quy"), data)
        assert str(tmp_path) not in json.dumps(place.identity())
        assert place.description() == {"path": str(tmp_path / name / path), "digest": place.fingerprint()}
        prints[name] = place.fingerprint()
    assert prints["here"] == prints["there"] != prints["other"]

    # One file of XNLI's own release holds all languages.
    write(tmp_path / "xnli/xnli.test.tsv", "language\tgold_label\tsentence1\tsentence2\n")
    xnli = DataSettings(xnli=str(tmp_path / "xnli"))
    assert len({evaluation_place("xnli", language(code), xnli).fingerprint() for code in ("deu", "fra")}) == 2

    # The same bytes are other rows as CSV or TSV. What labels mean is not in it: the sentences are the same.
    file = write(tmp_path / "t.csv", "text,label\na,no\n")
    shutil.copy(file, tmp_path / "t.tsv")
    own = {
        evaluation_place("tsv", OWN, DataSettings(test=str(file.with_suffix(end)), labels=labels)).fingerprint()
        for end in (".csv", ".tsv")
        for labels in (["no", "yes"], ["yes", "no"])
    }
    assert len(own) == 2

    # The ids of several files are made of their names.
    for name in ("one/train-en", "one/train_extra-en", "two/train-en", "two/train_more-en"):
        write(tmp_path / f"{name}.tsv", tsv("premise hypothesis label", [["a", "b", "neutral"]]))
    several = [
        train_places("multinli", language("eng"), DataSettings(multinli=str(tmp_path / n))) for n in ("one", "two")
    ]
    assert several[0].train.fingerprint() != several[1].train.fingerprint()

    # Two configurations of one local copy, and a copy elsewhere.
    splits = {"test": {"text": ["a"], "label": [0]}}
    copy = hub_copy("copy", {"ace": splits, "ban": splits})
    write(copy / ".cache/x", "what a download leaves behind is not read")
    places = [evaluation_place("nusax", language(code), DataSettings(nusax=str(copy))) for code in ("ace", "ban")]
    assert places[0].fingerprint() != places[1].fingerprint()
    assert places[0].description()["path"] == str(copy)
    moved = shutil.copytree(copy, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(".cache"))
    again = evaluation_place("nusax", language("ace"), DataSettings(nusax=str(moved)))
    assert again.fingerprint() == places[0].fingerprint()
    (shard,) = (moved / "ace").iterdir()
    shard.rename(moved / "ace/aaa.parquet")  # the order of the files stays: their names say which are the split's
    assert again.fingerprint() != places[0].fingerprint()


# --- the generated family

SMALL = SyntheticSettings(lines_high=20, lines_low=20, train=9, valid=3, test=3)
MEMBERS = [language(code) for code in SMALL.members]


@pytest.fixture
def later(tmp_path: Path) -> FamilyData:
    """The family as it will be."""
    return family_data(DataSettings(), SMALL, tmp_path / "family", "key")


def test_the_family_is_known_before_it_is_there(later: FamilyData) -> None:
    def places() -> list[Origin]:
        found: list[Origin] = [evaluation_place("synthetic", member, later) for member in MEMBERS]
        training = train_places("synthetic", MEMBERS[0], later)
        assert training.protected == ()
        evaluation = Evaluation("synthetic", ("test",), tuple(MEMBERS))
        text = resolve_text(MEMBERS[0], later)
        assert protected_places(MEMBERS[0], later, evaluation, text) == []
        # Text that is not the family's own may hold its sentences.
        given = Origin(files=(Path(__file__),))
        protected = protected_places(MEMBERS[0], later, evaluation, given)
        assert protected == [evaluation_place("synthetic", member, later) for member in MEMBERS]
        assert protected_places(MEMBERS[0], later) == []
        return [*found, *everything(training), *(resolve_text(member, later) for member in MEMBERS)]

    def refuse(files: Sequence[Path]) -> str:
        raise AssertionError(files)

    before, root = places(), Path(str(later.root))
    prints = [place.fingerprint(refuse) for place in before]
    assert len(set(prints)) == len(prints) == 14
    assert all(place.generated for place in before)
    assert later.family is not None
    assert before[0].identity(refuse)["files"] == ["family key: sentiment/qaa/test.tsv"]
    generate_family(root, SMALL)
    assert sorted(later.family.names) == sorted(
        path.relative_to(root).as_posix() for path in root.glob("*/**/*") if path.is_file()
    )
    assert places() == before
    assert len(load_test("synthetic", MEMBERS[3], later)) == 3
    other = family_data(DataSettings(), SMALL, root, "other")
    assert evaluation_place("synthetic", MEMBERS[0], other).fingerprint() != prints[0]
    with pytest.raises(DeftxError, match=r"synthetic has no dev file for 'qba'"):
        evaluation_place("synthetic", MEMBERS[3], later, "dev")


def test_own_files_beside_the_family_start_here(
    later: FamilyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "mine/test-qba.tsv", tsv("text label", [["a", "yes"]]))
    text = write(tmp_path / "mine/t.txt", "a line\n")
    later.test, later.labels = "mine/test-{language}.tsv", ["no", "yes"]
    places = Evaluation("tsv", ("test",), tuple(MEMBERS)).places(later)
    assert [(place.language, place.files, place.generated) for place in places] == [("qba", (file,), False)]
    plain = DataSettings(test=str(tmp_path / "mine/test-{language}.tsv"), labels=["no", "yes"])
    assert places[0].fingerprint() == evaluation_place("tsv", language("qba"), plain).fingerprint()
    # Without files of one's own, `sentiment` is the family's.
    later.test = None
    assert evaluation_place("sentiment", language("qba"), later).generated
    assert Evaluation("sentiment", ("test",), tuple(MEMBERS)).places(later) == []
    with pytest.raises(DeftxError, match=r"nli has no test file for 'qba'"):
        evaluation_place("nli", language("qba"), later)

    spoken = language("qba")
    spoken.text = ["unlabelled/qba.txt", "mine/t.txt"]
    source = resolve_text(spoken, later)
    assert source.files == (Path(str(later.root)) / "unlabelled/qba.txt", text)
    assert source.generated
    before = source.fingerprint()
    text.write_text("another line\n")
    assert source.fingerprint() != before
    spoken.text = ["mine/*.txt"]
    assert resolve_text(spoken, later).files == (text,)
    assert not resolve_text(spoken, later).generated
    spoken.text = ["unlabelled/qb*.txt"]
    assert len(resolve_text(spoken, later).files) == 3
    spoken.text = ["*.txt"]
    own = write(tmp_path / "o.txt", "mine alone\n")
    assert resolve_text(spoken, later).files == (own,)
    spoken.text = ["nowhere.txt"]
    with pytest.raises(DeftxError, match=r"no text file matches nowhere\.txt"):
        resolve_text(spoken, later)
    spoken.text = []
    assert resolve_text(spoken, later).generated
    with pytest.raises(DeftxError, match="no unlabelled text for 'xxx'"):
        resolve_text(OWN, later)

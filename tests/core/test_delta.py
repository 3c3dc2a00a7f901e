"""Sparse fine-tunings: difference, statistics, and a folder that is whole, reproducible and verified."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deftx.core.delta import SparseDelta, fingerprint
from deftx.errors import DeftxError

METADATA: dict[str, Any] = {
    "base_model": "tiny/encoder",
    "base_fingerprint": "f" * 64,
    "kind": "task",
    "task": "nusax",
    "language": "ind",
    "labels": ["negative", "neutral", "positive"],
    "rank": "energy:0.9",
    "metrics": {"macro_f1": 0.5},
}


def make_base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {
        "embeddings.word_embeddings.weight": (13, 5),
        "encoder.layer.0.attention.self.query.weight": (5, 5),
        "encoder.layer.0.attention.self.query.bias": (5,),
        "encoder.layer.10.output.dense.weight": (5, 7),
        "encoder.layer.2.output.dense.weight": (5, 7),
        "pooler.dense.weight": (5, 5),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def make_tuned(base: dict[str, Tensor]) -> dict[str, Tensor]:
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["embeddings.word_embeddings.weight"][3, 1] += 0.25
    tuned["embeddings.word_embeddings.weight"][12, 4] -= 0.5
    tuned["encoder.layer.0.attention.self.query.bias"][0] *= 1.5
    tuned["encoder.layer.10.output.dense.weight"][4, 6] = 0.0
    return tuned


def make_delta(**metadata: object) -> SparseDelta:
    base = make_base()
    head = {"classifier.weight": torch.arange(15.0).view(3, 5), "classifier.bias": torch.zeros(3)}
    return SparseDelta.from_states(base, make_tuned(base), head=head, metadata={**METADATA, **metadata})


def same(a: SparseDelta, b: SparseDelta) -> bool:
    pairs = [(a.indices, b.indices), (a.values, b.values), (a.head, b.head)]
    tensors = all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)
    return tensors and a.shapes == b.shapes and a.metadata == b.metadata


def test_difference_of_what_changed() -> None:
    base, delta = make_base(), make_delta()
    assert {name: index.tolist() for name, index in delta.indices.items()} == {
        "embeddings.word_embeddings.weight": [16, 64],
        "encoder.layer.0.attention.self.query.bias": [0],
        "encoder.layer.10.output.dense.weight": [34],
    }
    tuned = make_tuned(base)
    for name, index in delta.indices.items():
        expected = tuned[name].flatten()[index] - base[name].flatten()[index]
        assert torch.equal(delta.values[name], expected)
        assert delta.shapes[name] == tuple(base[name].shape)
    assert delta.k == 4
    assert delta.density(400) == 0.01


def test_bits_decide_what_changed() -> None:
    base = {"w": torch.tensor([0.0, 1.0, 2.0])}
    delta = SparseDelta.from_states(base, {"w": torch.tensor([-0.0, 1.0, 2.0])}, metadata=METADATA)
    assert delta.indices["w"].tolist() == [0]


def test_difference_on_a_selection() -> None:
    base = make_base()
    selection = {
        "encoder.layer.0.attention.self.query.bias": torch.tensor([0, 3]),
        "pooler.dense.weight": torch.tensor([]),
    }
    selection["pooler.dense.weight"] = selection["pooler.dense.weight"].long()
    delta = SparseDelta.from_states(base, make_tuned(base), selection=selection, metadata=METADATA)
    assert delta.indices.keys() == {"encoder.layer.0.attention.self.query.bias"}
    assert delta.k == 2
    assert delta.values["encoder.layer.0.attention.self.query.bias"][1] == 0.0


def test_base_fingerprint_is_computed_where_it_is_not_given() -> None:
    base = make_base()
    assert SparseDelta.from_states(base, make_tuned(base)).base_fingerprint == fingerprint(base)
    assert make_delta().base_fingerprint == "f" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base, tuned: tuned.pop("pooler.dense.weight"), "missing pooler.dense.weight; unknown none"),
        (lambda base, tuned: tuned.update(x=torch.ones(1)), "missing none; unknown x"),
        (lambda base, tuned: tuned.update({"pooler.dense.weight": torch.ones(5, 4)}), r"\[5, 5\] and \[5, 4\]"),
        (
            lambda base, tuned: [d.update({"pooler.dense.weight": torch.ones(5, 5).half()}) for d in (base, tuned)],
            r"pooler.dense.weight is torch.float16.*dtype=float32",
        ),
        (
            lambda base, tuned: tuned.update({"pooler.dense.weight": torch.full((5, 5), float("nan"))}),
            "pooler.dense.weight: the values contain NaN",
        ),
    ],
)
def test_states_that_do_not_fit(change: Any, message: str) -> None:
    base = make_base()
    tuned = make_tuned(base)
    change(base, tuned)
    with pytest.raises(DeftxError, match=message):
        SparseDelta.from_states(base, tuned, metadata=METADATA)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"nowhere": [0]}, "does not have: nowhere"),
        ({"pooler.dense.weight": [3, 2]}, "not sorted"),
        ({"pooler.dense.weight": [2, 2]}, "twice"),
        ({"pooler.dense.weight": [0, 25]}, "indices from 0 to 25 lie outside its 25 entries"),
        ({"pooler.dense.weight": [-1, 2]}, "lie outside"),
    ],
)
def test_selection_that_does_not_fit(selection: dict[str, list[int]], message: str) -> None:
    base = make_base()
    chosen = {name: torch.tensor(index) for name, index in selection.items()}
    with pytest.raises(DeftxError, match=message):
        SparseDelta.from_states(base, make_tuned(base), selection=chosen, metadata=METADATA)


def test_statistics() -> None:
    base = {
        "encoder.layer.2.w": torch.zeros(4, 5),
        "encoder.layer.10.w": torch.zeros(10),
        "embeddings.w": torch.zeros(3),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["encoder.layer.2.w"][0, :2] = torch.tensor([3.0, -4.0])
    tuned["encoder.layer.10.w"][7] = -12.0
    tuned["embeddings.w"][1] = 84.0
    delta = SparseDelta.from_states(base, tuned, head={"c": torch.ones(6)}, metadata=METADATA)
    facts = delta.statistics()
    assert facts["parameters"]["encoder.layer.2.w"] == {
        "count": 2,
        "density": 0.1,
        "mean_abs": 3.5,
        "max_abs": 4.0,
        "norm": 5.0,
    }
    assert (facts["k"], facts["head_elements"], facts["norm"]) == (4, 6, pytest.approx(85.0))
    assert list(facts["layers"].items()) == [("embeddings", 1), ("layer.2", 2), ("layer.10", 1)]
    assert facts["layers"] == delta.per_layer_counts()
    json.dumps(facts, allow_nan=False)


def test_folder_round_trip(tmp_path: Path) -> None:
    delta = make_delta()
    folder = delta.save(tmp_path / "deep" / "er" / "sft")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "sft.json", "sft.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["sft"]
    loaded = SparseDelta.load(str(folder))
    assert same(loaded, delta)
    assert all(index.dtype == torch.int64 for index in loaded.indices.values())
    facts = json.loads((folder / "sft.json").read_text(encoding="utf-8"))
    assert (facts["format_version"], facts["k"], facts["head"]) == (1, 4, ["classifier.bias", "classifier.weight"])
    digest = hashlib.sha256((folder / "sft.safetensors").read_bytes()).hexdigest()
    assert facts["sha256"]["sft.safetensors"] == digest


def test_folder_without_head_or_coordinates(tmp_path: Path) -> None:
    base = make_base()
    delta = SparseDelta.from_states(base, base, metadata=METADATA)
    assert delta.k == 0
    assert same(SparseDelta.load(delta.save(tmp_path / "sft")), delta)
    assert delta.statistics()["norm"] == 0.0


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one = make_delta()
    other = SparseDelta(
        *({name: part[name] for name in reversed(part)} for part in (one.indices, one.values, one.shapes, one.head)),
        {key: one.metadata[key] for key in reversed(one.metadata)},
    )
    folders = one.save(tmp_path / "one"), other.save(tmp_path / "other")
    for file in ("sft.safetensors", "sft.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    other.values["encoder.layer.0.attention.self.query.bias"] += 1e-6
    assert (other.save(tmp_path / "third") / "sft.safetensors").read_bytes() != (
        folders[0] / "sft.safetensors"
    ).read_bytes()


def test_metadata_survives_json(tmp_path: Path) -> None:
    delta = make_delta(labels=("ä", "b|c"), settings={10: 1, 9: None}, metrics={"f1": 0.1 + 0.2})
    loaded = SparseDelta.load(delta.save(tmp_path / "sft"))
    assert loaded.metadata["labels"] == ["ä", "b|c"]
    assert loaded.metadata["settings"] == {"10": 1, "9": None}
    assert loaded.metadata["metrics"] == {"f1": 0.1 + 0.2}


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, torch.ones(1), Path("x")])
def test_metadata_that_is_not_json(bad: object, tmp_path: Path) -> None:
    with pytest.raises(DeftxError, match="must be plain JSON"):
        make_delta(metrics={"f1": bad}).save(tmp_path / "sft")
    assert list(tmp_path.iterdir()) == []


def test_base_must_be_named(tmp_path: Path) -> None:
    delta = make_delta()
    del delta.metadata["base_fingerprint"]
    with pytest.raises(DeftxError, match="base_fingerprint is missing"):
        delta.save(tmp_path / "sft")
    assert list(tmp_path.iterdir()) == []


def test_card_says_what_it_is(tmp_path: Path) -> None:
    card = (make_delta(task="nusax|x").save(tmp_path / "sft") / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nlibrary_name: "deftx"\n')
    for line in ('base_model: "tiny/encoder"', "| coordinates changed (K) | 4 |", "nusax\\|x", "| layer.10 | 1 |"):
        assert line in card
    assert "| metric: macro_f1 | 0.5 |" in card


@pytest.fixture(scope="module")
def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        made = make_delta().save(Path(folder) / "sft")
        return {path.name: path.read_bytes() for path in made.iterdir()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("file", ["sft.safetensors", "sft.json"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_edited_byte(file: str, data: st.DataObject, saved: dict[str, bytes]) -> None:
    content = bytearray(saved[file])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as root:
        folder = write(Path(root) / "sft", {**saved, file: bytes(content)})
        if file == "sft.json" and is_same_json(bytes(content), saved[file]):  # white space carries no content
            assert same(SparseDelta.load(folder), make_delta())
        else:
            with pytest.raises(DeftxError, match="sft"):
                SparseDelta.load(folder)


def is_same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("file", ["sft.safetensors", "sft.json"])
def test_truncated(file: str, saved: dict[str, bytes], tmp_path: Path) -> None:
    for keep in (0, 1, 7, 8, 100, len(saved[file]) - 2):
        folder = write(tmp_path / str(keep), {**saved, file: saved[file][:keep]})
        with pytest.raises(DeftxError, match=r"fetch or train it again|truncated or edited"):
            SparseDelta.load(folder)


@pytest.mark.parametrize("missing", ["sft.safetensors", "sft.json"])
def test_missing_file(missing: str, saved: dict[str, bytes], tmp_path: Path) -> None:
    folder = write(tmp_path / "sft", {name: content for name, content in saved.items() if name != missing})
    with pytest.raises(DeftxError, match=f"{missing} missing \\(found: README.md"):
        SparseDelta.load(folder)


def test_not_there_or_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DeftxError, match="no such folder"):
        SparseDelta.load(tmp_path / "nothing")
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(DeftxError, match="is a file; a sparse fine-tuning is the folder"):
        SparseDelta.load(tmp_path / "x.safetensors")


class Bomb:
    """Leaves a mark if anybody unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["sft.bin", "sft.pt", "sft.pkl", "sft.ckpt", "no_suffix", "sft.safetensors"])
def test_pickle_is_refused_and_never_opened(
    name: str, saved: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Bomb()))
    folders = [file, write(tmp_path / "in folder", {"pytorch_diff.bin": pickle.dumps(Bomb())})]
    folders.append(write(tmp_path / "disguised", {**saved, "sft.safetensors": pickle.dumps(Bomb())}))
    torch.save({"x": torch.ones(1)}, tmp_path / "zip")
    folders.append(tmp_path / "zip")
    for offered in folders:
        with pytest.raises(DeftxError, match=r"is a pickle, which can run code.*call save\(\)"):
            SparseDelta.load(offered)
    assert not (tmp_path / "exploded").exists()


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    # The first byte of a safetensors file is the lowest of its header's length: 0x80, a pickle's, is as good as any.
    for length in range(1, 200):
        base = {"w" * length: torch.zeros(3, 4)}
        delta = SparseDelta.from_states(base, {"w" * length: torch.ones(3, 4)}, metadata=METADATA)
        folder = tmp_path / str(length)
        delta.save(folder)
        if (folder / "sft.safetensors").read_bytes()[0] == 0x80:
            assert SparseDelta.load(folder).k == 12
            return
    raise AssertionError("no name gave a header whose length ends in 0x80")


def forged(saved: dict[str, bytes], tensors: Any = None, facts: Any = None) -> dict[str, bytes]:
    """A folder whose digests are right although its content is wrong."""
    content = safetensors.torch.load(saved["sft.safetensors"])
    description = json.loads(saved["sft.json"])
    del description["sha256"]
    if tensors:
        tensors(content)
    if facts:
        facts(description)
    data = safetensors.torch.save(content)
    own = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    description["sha256"] = {
        "sft.safetensors": hashlib.sha256(data).hexdigest(),
        "sft.json": hashlib.sha256(own).hexdigest(),
    }
    return {"sft.safetensors": data, "sft.json": json.dumps(description).encode()}


WORDS = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        (None, None, None),
        (None, lambda d: d.update(format_version=2), "format version 2; this deftx reads version 1: update deftx"),
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([64, 16])}), None, "not sorted"),
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([16, 16])}), None, "twice"),
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([16, 65])}), None, "outside its 65 entries"),
        (lambda t: t.update({f"{WORDS}.values": torch.ones(3)}), None, "2 indices need as many float32 values"),
        (lambda t: t.update({f"{WORDS}.values": torch.ones(2).double()}), None, "float32 values, found torch.float64"),
        (lambda t: t.update({f"{WORDS}.values": torch.tensor([1, float("inf")])}), None, "NaN or infinity"),
        (lambda t: t.update({"head.classifier.bias": torch.full((3,), float("nan"))}), None, "NaN or infinity"),
        (lambda t: t.update({"stranger": torch.ones(2)}), None, "undescribed: stranger"),
        (lambda t: t.pop(f"{WORDS}.values"), None, f"{WORDS}.values"),
        (None, lambda d: d.pop("head"), "head"),
        (None, lambda d: d.update(parameters=[WORDS]), "does not hold the tensors that it describes"),
    ],
)
def test_forged_folder(tensors: Any, facts: Any, message: str | None, saved: dict[str, bytes], tmp_path: Path) -> None:
    folder = write(tmp_path / "sft", forged(saved, tensors, facts))
    if message is None:  # the forgery itself is sound
        assert same(SparseDelta.load(folder), make_delta())
        return
    with pytest.raises(DeftxError, match=message) as caught:
        SparseDelta.load(folder)
    assert str(folder) in str(caught.value)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    delta = make_delta()
    folder = delta.save(tmp_path / "sft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DeftxError, match="exists already and is not overwritten"):
        make_delta(task="xnli").save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeftxError, match="exists already"):
        delta.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    delta.save(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "sft"]


@pytest.mark.parametrize("where", ["mkdir", "mkdtemp", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_cannot_write(where: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    owner = {"mkdir": Path, "mkdtemp": tempfile, "fsync": os, "replace": Path}[where]
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(DeftxError, match=rf"cannot write .*sft: {os.strerror(code)}; check permissions and free space"):
        make_delta().save(tmp_path / "sft")
    assert list(tmp_path.iterdir()) == []


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeftxError, match="cannot write the sparse fine-tuning"):
        make_delta().save(tmp_path / "file" / "sft")


def test_folder_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = make_delta().save(tmp_path / "sft")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_delta_keeps_its_rules() -> None:
    good = {"w": torch.tensor([1, 3])}, {"w": torch.ones(2)}, {"w": (4,)}
    SparseDelta(*good)
    none = torch.empty(0, dtype=torch.int64)
    for broken in (
        ({"w": torch.tensor([3, 1])}, good[1], good[2]),
        (good[0], {"w": torch.ones(2).half()}, good[2]),
        (good[0], {"v": torch.ones(2)}, good[2]),
        ({"w": torch.tensor([1, 3]).int()}, good[1], good[2]),
        ({"w": none}, {"w": torch.empty(0)}, good[2]),
    ):
        with pytest.raises(DeftxError):
            SparseDelta(*broken)


def test_fingerprint_equals_its_definition() -> None:
    tensors = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor(3.0), "pooler.x": torch.ones(2)}
    expected = hashlib.sha256(
        b"a\nfloat32\n[]\n" + struct.pack("<f", 3.0) + b"b\nfloat32\n[1, 2]\n" + struct.pack("<2f", 1.5, -2.0)
    ).hexdigest()
    assert fingerprint(tensors) == expected
    assert fingerprint({name: tensors[name] for name in ("a", "b")}) == expected
    assert fingerprint({"a": tensors["a"], "b": tensors["b"].T.contiguous().T}) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.tensor([[1.5, -2.0000002]])},
        {"b": torch.tensor([1.5, -2.0])},
        {"b": torch.tensor([[1.5, -2.0]]).double()},
        {"b": torch.tensor([[-2.0, 1.5]])},
        {"c": torch.ones(1)},
    ],
)
def test_fingerprint_sees_everything(change: dict[str, Tensor]) -> None:
    tensors = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor([3.0]).bfloat16()}
    assert fingerprint({**tensors, **change}) != fingerprint(tensors)

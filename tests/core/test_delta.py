"""Sparse fine-tunings: difference, statistics, and a folder that is whole, reproducible and verified."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
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
    assert (facts["format_version"], facts["k"], facts["head"]) == (2, 4, ["classifier.bias", "classifier.weight"])
    assert facts["value_dtype"] == "float32"
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


FOUR_BITS = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def gaps(*content: int) -> Tensor:
    return torch.tensor(content, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        (None, None, None),
        (
            None,
            lambda d: d.update(format_version=3),
            "format version 3; this deftx reads versions 1 and 2: update deftx",
        ),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(16, 48)}), None, "16 to 65 lie outside its 65 entries"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(16, 128 + 47)}), None, f"{WORDS}: .*last gap is cut off"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(128 + 16, 0, 47)}), None, f"{WORDS}: .*more bytes than it needs"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(*[255] * 9, 1)}), None, f"{WORDS}: .*more than 9 bytes"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(*[255] * 8, 127, 0)}), None, "not sorted|outside"),  # past int64
        (lambda t: t.update({f"{WORDS}.gaps": gaps(0, *[255] * 8, 127)}), None, "not sorted|outside"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(16, 47).char()}), None, "vector of uint8, found torch.int8"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(16, 47)[None]}), None, r"vector of uint8, .* shape \(1, 2\)"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps()}), None, "changes no coordinate"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(16, 46, 0)}), None, "3 indices need as many float32 values"),
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([16, 64])}), None, f"undescribed: {WORDS}.indices"),
        (lambda t: t.pop(f"{WORDS}.gaps"), None, f"{WORDS}.gaps"),
        (lambda t: t.update({f"{WORDS}.values": torch.ones(2).half()}), None, "float32 values, found torch.float16"),
        (lambda t: t.update({"head.classifier.bias": FOUR_BITS}), None, "isfinite"),  # torch cannot compute with it
        (None, lambda d: d.update(metadata=[1]), "does not hold the tensors that it describes"),
        (None, lambda d: d.update(value_dtype="float16"), "float16 values, found torch.float32"),
        (None, lambda d: d.update(value_dtype="int8"), "unknown value_dtype 'int8'"),
        (None, lambda d: d.pop("value_dtype"), "value_dtype"),
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


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_forged_tensor_file_loads_or_is_refused(data: st.DataObject, saved: dict[str, bytes]) -> None:
    content = bytearray(saved["sft.safetensors"])
    header = 8 + struct.unpack("<Q", content[:8])[0]
    where = st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(where)] = data.draw(st.integers(0, 255))
    files = forged(saved)
    facts = json.loads(files["sft.json"])
    facts["sha256"]["sft.safetensors"] = hashlib.sha256(content).hexdigest()
    with tempfile.TemporaryDirectory() as root:
        folder = write(Path(root) / "sft", {"sft.safetensors": bytes(content), "sft.json": json.dumps(facts).encode()})
        with contextlib.suppress(DeftxError):
            loaded = SparseDelta.load(folder)
            assert loaded.shapes == make_delta().shapes


def version_1(width: torch.dtype, change: Any = None) -> dict[str, bytes]:
    """The folder of :func:`make_delta` as format version 1 laid it out."""
    delta = make_delta()
    tensors = {f"head.{name}": tensor for name, tensor in delta.head.items()}
    parameters = {}
    for name, index in delta.indices.items():
        tensors |= {f"{name}.indices": index.to(width), f"{name}.values": delta.values[name]}
        parameters[name] = {"count": len(index), "shape": list(delta.shapes[name])}
    if change:
        change(tensors)
    facts = {"format_version": 1, "head": sorted(delta.head), "k": delta.k, "metadata": METADATA}
    facts["parameters"] = parameters
    data = safetensors.torch.save(tensors)
    own = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    facts["sha256"] = {
        "sft.json": hashlib.sha256(own).hexdigest(),
        "sft.safetensors": hashlib.sha256(data).hexdigest(),
    }
    return {"sft.safetensors": data, "sft.json": json.dumps(facts).encode(), "README.md": b"# An older one"}


@pytest.mark.parametrize("width", [torch.int32, torch.int64])
def test_version_1_is_read(width: torch.dtype, saved: dict[str, bytes], tmp_path: Path) -> None:
    loaded = SparseDelta.load(write(tmp_path / "old", version_1(width)))
    assert same(loaded, make_delta())
    assert all(index.dtype == torch.int64 for index in loaded.indices.values())
    again = loaded.save(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([64, 16])}), "not sorted"),
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([16, 16])}), "twice"),
        (lambda t: t.update({f"{WORDS}.indices": torch.tensor([16, 65])}), "outside its 65 entries"),
        (lambda t: t.update({f"{WORDS}.values": torch.ones(2).half()}), "float32 values, found torch.float16"),
        (lambda t: t.update({f"{WORDS}.gaps": gaps(16, 47)}), f"undescribed: {WORDS}.gaps"),
        (lambda t: t.pop(f"{WORDS}.indices"), f"{WORDS}.indices"),
    ],
)
def test_forged_version_1(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeftxError, match=message):
        SparseDelta.load(write(tmp_path / "sft", version_1(torch.int32, change)))


def with_values(*values: float) -> SparseDelta:
    index = torch.arange(len(values))
    return SparseDelta({"w": index}, {"w": torch.tensor(values)}, {"w": (len(values),)}, {}, dict(METADATA))


@pytest.mark.parametrize(
    ("value_dtype", "code"),
    [("float32", "f"), ("float16", "e"), ("bfloat16", None)],
)
def test_value_dtypes(value_dtype: str, code: str | None, tmp_path: Path) -> None:
    values = [65504.0, -1e-7, 2.0**-25, 0.1]
    folder = with_values(*values).save(tmp_path / "sft", value_dtype=value_dtype)
    facts, card = json.loads((folder / "sft.json").read_text()), (folder / "README.md").read_text()
    assert (facts["value_dtype"], facts["format_version"]) == (value_dtype, 2)
    assert f"| values stored as | {value_dtype} |" in card
    loaded = SparseDelta.load(folder)
    assert loaded.values["w"].dtype == torch.float32
    if code:  # by the standard library's own rounding
        expected = [struct.unpack(f"<{code}", struct.pack(f"<{code}", value))[0] for value in values]
    else:  # the upper half of float32, rounded to nearest, ties to even
        words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
        words = [(word + 0x7FFF + (word >> 16 & 1)) & 0xFFFF0000 for word in words]
        expected = [struct.unpack("<f", struct.pack("<I", word))[0] for word in words]
    assert loaded.values["w"].tolist() == expected
    assert (loaded.values["w"].tolist()[2] == 0) == (value_dtype == "float16")  # the loss that the docstring names
    again = loaded.save(tmp_path / "again", value_dtype=value_dtype)
    for file in ("sft.safetensors", "sft.json", "README.md"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize(
    ("value_dtype", "value", "message"),
    [
        (
            "float16",
            -65520.0,
            r"float16 holds changes up to 6.55e\+04: w \(6.552e\+04\).*value_dtype=bfloat16 or float32",
        ),
        ("bfloat16", 3.4e38, r"bfloat16 holds changes up to 3.39e\+38: w .*value_dtype=float32"),
        (
            "float61",
            1.0,
            "unknown value_dtype 'float61'; did you mean 'float16'. .available: float32, float16, bfloat16",
        ),
    ],
)
def test_values_that_a_dtype_cannot_hold(value_dtype: str, value: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeftxError, match=message):
        with_values(0.5, value).save(tmp_path / "sft", value_dtype=value_dtype)
    assert list(tmp_path.iterdir()) == []
    with_values(0.5, 65519.0).save(tmp_path / "largest", value_dtype="float16")


def test_a_loaded_one_does_not_depend_on_its_file(tmp_path: Path) -> None:
    for number, files in enumerate((version_1(torch.int64), None)):
        folder = tmp_path / str(number)
        loaded = SparseDelta.load(write(folder, files) if files else make_delta().save(folder))
        path = folder / "sft.safetensors"
        with path.open("r+b") as file:  # in place, the file that may still be mapped
            file.write(b"\xff" * path.stat().st_size)
        assert same(loaded, make_delta())


def test_bytes_an_entry(tmp_path: Path) -> None:
    # The papers' density, spread unevenly: 2.2 % of a large matrix, 4 % of others, 0.1 % of one.
    generator = torch.Generator().manual_seed(0)
    shapes = {"embeddings.w": ((4000, 768), 0.022), "a": ((768, 768), 0.04), "b": ((768, 3072), 0.04)}
    shapes["c"] = ((768, 768), 0.001)
    indices = {
        name: (torch.rand(math.prod(shape), generator=generator) < density).nonzero().flatten()
        for name, (shape, density) in shapes.items()
    }
    values = {name: torch.randn(len(index), generator=generator) for name, index in indices.items()}
    delta = SparseDelta(indices, values, {name: shape for name, (shape, _) in shapes.items()}, {}, dict(METADATA))
    for value_dtype, most in (("float32", 5.1), ("bfloat16", 3.1)):
        folder = delta.save(tmp_path / value_dtype, value_dtype=value_dtype)
        assert (folder / "sft.safetensors").stat().st_size <= most * delta.k
    assert same(SparseDelta.load(tmp_path / "float32"), delta)


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


@pytest.mark.parametrize("where", ["mkdir", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_cannot_write(where: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    owner = os if where == "fsync" else Path
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

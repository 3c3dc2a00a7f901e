"""Adaptations: put on a classifier, taken off, and every bit is what it was; methods as a table of choices."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import LABELS

from deftx.core.delta import SparseDelta
from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.errors import DeftxError
from deftx.methods import METHODS, SCORED, SECOND_PHASES
from deftx.methods.adaptation import COMPOSITIONS, AdaptedClassifier, SparseAdaptation
from deftx.methods.sparse import BUDGETS
from deftx.stages.settings import SFTSettings
from deftx.training.encoder import base_fingerprint_of, base_parameters, head_parameters, load_classifier


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def make_sft(model: torch.nn.Module, folder: Path, seed: int, *, head: bool) -> SparseAdaptation:
    """An SFT with a tenth of the coordinates of each parameter, and a head."""
    generator = torch.Generator().manual_seed(seed)
    indices, values, shapes = {}, {}, {}
    for name, parameter in base_parameters(model).items():
        count = max(1, parameter.numel() // 10)
        indices[name] = torch.randperm(parameter.numel(), generator=generator)[:count].sort().values
        values[name] = torch.randn(count, generator=generator)
        shapes[name] = tuple(parameter.shape)
    tensors = {name: torch.randn(p.shape, generator=generator) for name, p in head_parameters(model).items() if head}
    facts = {"base_fingerprint": base_fingerprint_of(model), "kind": "task" if head else "language"}
    SparseDelta(indices=indices, values=values, shapes=shapes, head=tensors, metadata=facts).save(folder)
    return SparseAdaptation(f"key {seed}", folder)


@pytest.fixture
def classifier(folder: Path) -> AdaptedClassifier:
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    return AdaptedClassifier(model)


def test_whatever_was_worn_before_the_bits_are_those_of_what_is_worn_now(
    classifier: AdaptedClassifier, folder: Path, tmp_path: Path
) -> None:
    bare = bits(classifier.model)
    task, other = (make_sft(classifier.model, tmp_path / f"t{n}", n, head=True) for n in (1, 2))
    ace, ban = (make_sft(classifier.model, tmp_path / f"l{n}", n, head=False) for n in (3, 4))
    outfits = [{"task": t, "language": x} for t in (task, other) for x in (ace, ban)] + [{"task": task}, {}]
    # Each outfit on a classifier of its own, and written out: θ⁰ plus each change in float64, and the head.
    fresh = []
    for outfit in outfits:
        model, _ = load_classifier(folder, labels=LABELS, seed=0)
        AdaptedClassifier(model).wear(outfit)
        fresh.append(bits(model))
        sums = {name: p.detach().double() for name, p in load_base(folder).items()}
        for adaptation in outfit.values():
            delta = SparseDelta.load(adaptation.folder)
            for name, index in delta.indices.items():
                sums[name].view(-1)[index] += delta.values[name].double()
        for name, parameter in base_parameters(model).items():
            torch.testing.assert_close(parameter.detach(), sums[name].float(), rtol=0, atol=1e-7)
    for before, after in itertools.permutations(range(len(outfits)), 2):
        classifier.wear(outfits[before])
        classifier.wear(outfits[after])
        assert bits(classifier.model) == fresh[after]
    classifier.wear({})
    assert bits(classifier.model) == bare


def load_base(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    return dict(base_parameters(model))


def test_what_does_not_fit_leaves_the_classifier_as_it_was(classifier: AdaptedClassifier, tmp_path: Path) -> None:
    before = bits(classifier.model)
    headless = make_sft(classifier.model, tmp_path / "headless", 1, head=False)
    with pytest.raises(DeftxError, match="does not fit this model and task"):
        classifier.wear({"task": headless})
    assert bits(classifier.model) == before
    task = make_sft(classifier.model, tmp_path / "task", 2, head=True)
    classifier.wear({"task": task, "language": headless})
    classifier.wear({})
    assert bits(classifier.model) == before


def test_what_stays_on_is_not_read_again(
    classifier: AdaptedClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_sft(classifier.model, tmp_path / "t", 1, head=True)
    ace, ban = (make_sft(classifier.model, tmp_path / f"l{n}", n, head=False) for n in (3, 4))
    read: list[str] = []
    real = SparseDelta.load
    monkeypatch.setattr(SparseDelta, "load", lambda folder: read.append(Path(folder).name) or real(folder))
    for language in (ace, ban, ban, ace):
        classifier.wear({"task": task, "language": language})
    assert read == ["t", "l3", "l4", "l3"]


# ---------------------------------------------------------------------------------------------------------- table


def test_every_method_makes_choices_that_there_are() -> None:
    for method in METHODS.values():
        assert method.scored in SCORED
        assert method.budget in BUDGETS
        assert method.second_phase in SECOND_PHASES
        assert method.composition in COMPOSITIONS
    for scored in SCORED.values():
        assert set(scored.reads) <= {"base", "start", "full", "decompose"}
        assert scored.undenoised in ("", *SCORED)
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


RANK = RankPolicy.parse("energy:0.9")


@pytest.mark.parametrize(
    ("asked", "method", "expected"),
    [
        # mask, rank, second phase; by; method, scored, rank, what it reads
        (("magnitude", RANK, True), "deftx", ("deftx", "denoised_change", RANK, {"full", "decompose"})),
        (("magnitude", RANK, True), "ltsft", ("ltsft", "change", None, {"full"})),
        (("magnitude", None, True), "deftx", ("ltsft", "change", None, {"full"})),
        (("magnitude", RANK, True), "random_mask", ("random_mask", "random", None, set())),
        (("random", RANK, True), "deftx", ("random_mask", "random", None, set())),
        (("random", RANK, True), "ltsft", ("random_mask", "random", None, set())),
        (("magnitude", RANK, False), "deftx", ("deftx", "denoised_change", RANK, {"full", "decompose"})),
        (("magnitude", RANK, False), "ltsft", ("ltsft", "change", None, {"full"})),
        # Without a second phase the values are Δ̂, whatever chose the mask.
        (("random", RANK, False), "deftx", ("random_mask", "random", RANK, {"full", "decompose"})),
        (("magnitude", RANK, False), "random_mask", ("random_mask", "random", RANK, {"full", "decompose"})),
        (("random", None, False), "deftx", ("random_mask", "random", None, {"full"})),
    ],
)
def test_a_method_is_four_choices(asked: tuple, method: str, expected: tuple) -> None:
    mask, rank, second_phase = asked
    sft = SFTSettings(
        rank=rank,
        residual=ResidualPolicy(),
        k=10,
        density=None,
        exclude=["embeddings.*"],
        mask=mask,
        second_phase=second_phase,
    ).by(method)
    assert (sft.method, sft.scored, sft.rank, sft.reads) == expected
    assert sft.mask == ("random" if sft.scored == "random" else "magnitude")
    # What nothing reads enters no key.
    assert (sft.residual is None) == (sft.rank is None) == (sft.exclude == [])
    assert sft.by(sft.method) == sft

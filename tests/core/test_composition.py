"""One model, many terms: whatever was done before, the bits are those of a fresh composition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deftx.core import composition as composition_module
from deftx.core.composition import Composition, compare
from deftx.core.delta import SparseDelta
from deftx.errors import DeftxError

BASE = "b" * 64
SHAPES = {"emb": (11, 3), "w": (4, 5), "bias": (5,), "untouched": (6,)}
FACTORS = (1.0, -1.0, 0.5, 0.1, 3.7, 0.0, 1e-3)


def make_base() -> dict[str, Tensor]:
    """Weights with zeros of both signs, a denormal and numbers of very different size."""
    generator = torch.Generator().manual_seed(0)
    base = {}
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator) * 10 ** torch.randint(-6, 3, shape, generator=generator)
        values.view(-1)[:3] = torch.tensor([-0.0, 0.0, 1e-42])
        base[name] = values
    return base


def make_delta(seed: int, share: float = 0.6, fingerprint: str = BASE) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    indices, values = {}, {}
    for name in ("emb", "w", "bias"):
        size = math.prod(SHAPES[name])
        index = (torch.rand(size, generator=generator) < share).nonzero().flatten()
        if index.numel() and (seed, name) != (1, "bias"):  # not every term touches every parameter
            indices[name] = index
            values[name] = torch.randn(index.numel(), generator=generator) * 1e-2
            values[name][::5] = 0.0  # a selected coordinate may end where it began
    shapes = {name: SHAPES[name] for name in indices}
    return SparseDelta(indices, values, shapes, metadata={"base_fingerprint": fingerprint})


DELTAS = {name: make_delta(seed) for seed, name in enumerate("cabd")}


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


def by_hand(terms: dict[str, float]) -> dict[str, Tensor]:
    """base + Σ scale · value, coordinate by coordinate in Python's float64, terms sorted by name, rounded once."""
    result = make_base()
    for name, tensor in result.items():
        flat = tensor.view(-1)
        sums: dict[int, float] = {}
        for term in sorted(terms):
            delta = DELTAS[term]
            if name not in delta.indices or terms[term] == 0:
                continue
            for place, value in zip(delta.indices[name].tolist(), delta.values[name].tolist(), strict=True):
                sums[place] = sums.get(place, float(flat[place])) + terms[term] * value
        for place, total in sums.items():
            flat[place] = torch.tensor(total, dtype=torch.float64).float()
    return result


def test_one_term() -> None:
    model = make_base()
    composition = Composition(model, base_fingerprint=BASE)
    composition.add("a", DELTAS["a"])
    assert composition.terms == {"a": 1.0}
    assert equal_bits(model, by_hand({"a": 1.0}))
    assert not equal_bits(model, make_base())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_windows_and_threads_change_no_bit(monkeypatch, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("deftx.core.composition._WINDOW", 4)
    monkeypatch.setattr("deftx.core.composition._MARKED", 4)
    model, terms = make_base(), dict[str, float]()
    composition = Composition(model, base_fingerprint=BASE)
    for name, factor in zip("bdca", (1.0, 0.1, 1.0, -1.0), strict=True):
        composition.add(name, DELTAS[name], factor)
        terms[name] = factor
        assert equal_bits(model, by_hand(terms))
    composition.scale("d", 1.0)
    assert equal_bits(model, by_hand({**terms, "d": 1.0}))
    composition.remove("c")
    assert equal_bits(model, by_hand({"a": -1.0, "b": 1.0, "d": 1.0}))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_many_coordinates_in_many_windows(scale: float) -> None:
    """Against dense float64 sums, with magnitudes from denormals to 1e3."""
    entries, generator = 1_000_003, torch.Generator().manual_seed(5)
    base = torch.randn(entries, generator=generator) * 10.0 ** torch.randint(-44, 4, (entries,), generator=generator)
    start, total, deltas = base.clone(), base.double(), {}
    for name in "ab":
        index = (torch.rand(entries, generator=generator) < 0.2).nonzero().flatten()
        value = base[index] * torch.randn(index.numel(), generator=generator)
        deltas[name] = SparseDelta({"w": index}, {"w": value}, {"w": (entries,)}, metadata={"base_fingerprint": BASE})
        total[index] += scale * value.double()
    composition = Composition({"w": base}, base_fingerprint=BASE)
    for name in "ba":
        composition.add(name, deltas[name], scale)
    assert equal_bits({"w": base}, {"w": total.float()})
    overlap = compare(deltas["a"], deltas["b"]).total
    both = set(deltas["a"].indices["w"].tolist()) & set(deltas["b"].indices["w"].tolist())
    assert overlap.overlap == len(both) > 30_000
    composition.remove("b")
    composition.remove("a")
    assert equal_bits({"w": base}, {"w": start})


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_an_interrupted_add_leaves_the_model_as_it_was(monkeypatch, fails_at: int) -> None:
    monkeypatch.setattr("deftx.core.composition._WINDOW", 4)
    model = make_base()
    composition = Composition(model, base_fingerprint=BASE)
    composition.add("a", DELTAS["a"])
    calls, adding = [], composition_module._adding

    def stopping(*arguments):
        change = adding(*arguments)

        def wrapped(*piece):
            change(*piece)
            calls.append(piece)
            if len(calls) > fails_at:
                raise KeyboardInterrupt

        return wrapped

    monkeypatch.setattr(composition_module, "_adding", stopping)
    with pytest.raises(KeyboardInterrupt):
        composition.add("b", DELTAS["b"])
    monkeypatch.undo()
    assert composition.terms == {"a": 1.0}
    assert equal_bits(model, by_hand({"a": 1.0}))
    composition.add("b", DELTAS["b"])
    assert equal_bits(model, by_hand({"a": 1.0, "b": 1.0}))
    composition.remove("a")
    assert equal_bits(model, by_hand({"b": 1.0}))


def test_an_interrupted_remove_can_be_repeated(monkeypatch) -> None:
    model = make_base()
    composition = Composition(model, base_fingerprint=BASE)
    composition.add("a", DELTAS["a"])
    composition.add("b", DELTAS["b"])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(composition_module, "_restore", stop)
        with pytest.raises(KeyboardInterrupt):
            composition.remove("a")
    composition.remove("a")
    assert composition.terms == {"b": 1.0}
    assert equal_bits(model, by_hand({"b": 1.0}))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_inference_mode(monkeypatch, mode) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("deftx.core.composition._WINDOW", 4)
    model = make_base()
    with mode():
        composition = Composition(model, base_fingerprint=BASE)
        composition.add("a", DELTAS["a"])
        composition.add("b", DELTAS["b"])
        composition.remove("a")
    assert equal_bits(model, by_hand({"b": 1.0}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("moves", ["to the GPU", "back"])
def test_a_model_may_move_between_terms(moves: str) -> None:
    first, second = ("cpu", "cuda") if moves == "to the GPU" else ("cuda", "cpu")
    model = {name: nn.Parameter(tensor.to(first)) for name, tensor in make_base().items()}
    composition = Composition(model, base_fingerprint=BASE)
    composition.add("a", DELTAS["a"])
    for parameter in model.values():
        parameter.data = parameter.data.to(second)
    composition.add("b", DELTAS["b"], 0.5)
    assert equal_bits({name: p.detach().cpu() for name, p in model.items()}, by_hand({"a": 1.0, "b": 0.5}))
    composition.remove("a")
    composition.remove("b")
    assert equal_bits({name: p.detach().cpu() for name, p in model.items()}, make_base())


def test_marks_of_a_window_long_past_do_not_count(monkeypatch) -> None:
    monkeypatch.setattr("deftx.core.composition._MARKED", 4)
    last = 4 * 600
    a, b = torch.arange(1, last, 4), torch.tensor([1, 2, *range(7, last, 4)])
    facts = {"shapes": {"w": (last,)}, "metadata": {"base_fingerprint": BASE}}
    first, second = (SparseDelta({"w": i}, {"w": torch.ones(i.numel())}, **facts) for i in (a, b))
    assert compare(first, second).total.overlap == compare(second, first).total.overlap == 1


actions = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abcd"), st.sampled_from(FACTORS)),
    st.tuples(st.just("scale"), st.sampled_from("abcd"), st.sampled_from(FACTORS)),
    st.tuples(st.just("remove"), st.sampled_from("abcd"), st.just(0.0)),
    st.tuples(st.just("clear"), st.just(""), st.just(0.0)),
)


@given(st.lists(actions, max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_history_equals_a_fresh_composition(history: list[tuple[str, str, float]]) -> None:
    model, terms = make_base(), dict[str, float]()
    composition = Composition(model, base_fingerprint=BASE)
    for action, name, factor in history:
        if action == "clear":
            composition.clear()
            terms.clear()
        elif action == "add" and name not in terms:
            composition.add(name, DELTAS[name], factor)
            terms[name] = factor
        elif action == "scale" and name in terms:
            composition.scale(name, factor)
            terms[name] = factor
        elif action == "remove" and name in terms:
            composition.remove(name)
            del terms[name]
        assert composition.terms == terms
        assert equal_bits(model, by_hand(terms))
    fresh = make_base()
    again = Composition(fresh, base_fingerprint=BASE)
    for name in sorted(terms, reverse=True):
        again.add(name, DELTAS[name], terms[name])
    assert equal_bits(model, fresh)
    composition.clear()
    assert equal_bits(model, make_base())


def test_removed_one_by_one_leaves_the_base() -> None:
    model = make_base()
    composition = Composition(model, base_fingerprint=BASE)
    for name in "dbca":
        composition.add(name, DELTAS[name], 0.3)
    for name in "bacd":
        composition.remove(name)
    assert composition.terms == {}
    assert equal_bits(model, make_base())


def test_the_order_of_the_names_decides_and_not_that_of_adding() -> None:
    """Terms so different in size that float64 addition is not associative."""
    large, small = 2.0**80, 1.0
    values = {"a": large, "b": small, "c": -large}  # (a + b) + c = 0, but (a + c) + b = 1
    for order in ("abc", "acb", "cba", "bca"):
        model = {"w": torch.zeros(1)}
        composition = Composition(model, base_fingerprint=BASE)
        for name in order:
            delta = SparseDelta({"w": torch.tensor([0])}, {"w": torch.tensor([values[name]])}, {"w": (1,)})
            delta.metadata["base_fingerprint"] = BASE
            composition.add(name, delta)
        assert model["w"].item() == 0.0


def test_a_scale_of_zero_gives_the_bases_bits() -> None:
    model = make_base()
    Composition(model, base_fingerprint=BASE).add("a", DELTAS["a"], 0.0)
    assert equal_bits(model, make_base())


def test_parameters_of_a_live_module() -> None:
    layer = nn.Linear(5, 4)
    before = layer.weight.detach().clone()
    delta = SparseDelta({"weight": torch.tensor([0, 19])}, {"weight": torch.ones(2)}, {"weight": (4, 5)})
    delta.metadata["base_fingerprint"] = BASE
    composition = Composition(dict(layer.named_parameters()), base_fingerprint=BASE)
    composition.add("a", delta)
    assert layer.weight.requires_grad
    assert layer.weight[0, 0] == (before[0, 0].double() + 1).float()
    assert int((layer.weight != before).sum()) == 2
    composition.clear()
    assert torch.equal(layer.weight, before)


def test_refused_terms_leave_the_model_alone() -> None:
    model = make_base()
    composition = Composition(model, base_fingerprint=BASE)
    composition.add("a", DELTAS["a"])
    other = make_delta(9, fingerprint="c" * 64)
    other.metadata["base_model"] = "other/base"
    with pytest.raises(DeftxError, match=f"made for other/base, fingerprint {'c' * 64}, this model is {BASE}"):
        composition.add("x", other)
    with pytest.raises(DeftxError, match="already has a term 'a'"):
        composition.add("a", DELTAS["b"])
    stray = make_delta(9)
    for n in range(10):
        stray.indices[f"roberta.w{n}"] = torch.tensor([0])
        stray.values[f"roberta.w{n}"], stray.shapes[f"roberta.w{n}"] = torch.ones(1), (1,)
    with pytest.raises(DeftxError, match=r"10 of 13 keys .* roberta.w0, .*roberta.w7 and 2 more"):
        composition.add("x", stray)
    turned = make_delta(9)
    turned.shapes["w"] = (5, 4)
    with pytest.raises(DeftxError, match=r"w \(\[5, 4\] in the SFT, \[4, 5\] in the model\)"):
        composition.add("x", turned)
    for scale in (math.nan, math.inf):
        with pytest.raises(DeftxError, match="finite"):
            composition.add("x", DELTAS["b"], scale)
        with pytest.raises(DeftxError, match="finite"):
            composition.scale("a", scale)
    for unknown in (composition.remove, lambda name: composition.scale(name, 1.0)):
        with pytest.raises(DeftxError, match=r"no term 'aa'.*it has: a"):
            unknown("aa")
    assert composition.terms == {"a": 1.0}
    assert equal_bits(model, by_hand({"a": 1.0}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_only_float32_models(dtype: torch.dtype) -> None:
    with pytest.raises(DeftxError, match=rf"w is {dtype}.*dtype=float32"):
        Composition({"w": torch.ones(3, dtype=dtype)}, base_fingerprint=BASE)


@given(st.integers(0, 50), st.integers(0, 50), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.sampled_from([0.05, 0.5]))
@settings(max_examples=60, deadline=None)
def test_compare_equals_sets(seed_a: int, seed_b: int, share_a: float, share_b: float) -> None:
    a, b = make_delta(seed_a, share_a), make_delta(seed_b + 100, share_b)
    report = compare(a, b)
    totals = [0, 0, 0, 0]
    for name in SHAPES:
        pairs = [
            dict(zip(d.indices[name].tolist(), d.values[name].tolist(), strict=True)) if name in d.indices else {}
            for d in (a, b)
        ]
        both = pairs[0].keys() & pairs[1].keys()
        conflicts = sum(pairs[0][place] * pairs[1][place] < 0 for place in both)
        expected = [len(pairs[0]), len(pairs[1]), len(both), conflicts]
        totals = [total + count for total, count in zip(totals, expected, strict=True)]
        if not pairs[0] and not pairs[1]:
            assert name not in report.parameters
            continue
        found = report.parameters[name]
        assert [found.a, found.b, found.overlap, found.sign_conflicts] == expected
        assert found.jaccard == len(both) / len(pairs[0].keys() | pairs[1].keys())
    total = report.total
    assert [total.a, total.b, total.overlap, total.sign_conflicts] == totals
    assert report.to_dict()["total"]["jaccard"] == total.jaccard


def test_compare_needs_one_base() -> None:
    with pytest.raises(DeftxError, match=f"{BASE} and {'c' * 64}"):
        compare(make_delta(0), make_delta(0, fingerprint="c" * 64))

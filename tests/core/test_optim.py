"""SparseAdamW bit for bit against a dense ``torch.optim.AdamW`` with masked gradients and restored values."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from deftx.core import optim
from deftx.core.optim import SelectedGradients, SparseAdamW, clip_trained, trained_norm
from deftx.errors import DeftxError

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.03}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32)


def choose(size: int, k: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:k].sort().values


class DenseLoop:
    """The plain implementation: dense AdamW over everything, gradients masked, values restored after each step."""

    def __init__(self, params: list[nn.Parameter], selections: dict[Tensor, Tensor], **options: object) -> None:
        self.params = params
        self.masks = {}
        for parameter in params:
            mask = torch.ones(parameter.numel(), dtype=torch.bool)
            if parameter in selections:
                mask.zero_()
                mask[selections[parameter]] = True
            self.masks[parameter] = mask.view(parameter.shape)
        self.optimizer = torch.optim.AdamW(params, foreach=False, fused=False, **options)  # type: ignore[arg-type]

    def step(self, max_norm: float | None) -> None:
        for parameter in self.params:
            assert parameter.grad is not None
            parameter.grad.mul_(self.masks[parameter])
        if max_norm is not None:
            squares = [float(parameter.grad.double().square().sum()) for parameter in self.params]  # type: ignore[union-attr]
            coefficient = min(1.0, max_norm / (math.sqrt(math.fsum(squares)) + 1e-6))
            for parameter in self.params:
                parameter.grad.mul_(torch.tensor(coefficient, dtype=torch.float32))  # type: ignore[union-attr]
        before = [parameter.detach().clone() for parameter in self.params]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, old in zip(self.params, before, strict=True):
                parameter.copy_(torch.where(self.masks[parameter], parameter, old))


class Net(nn.Module):
    """Embedding, hidden layer and head; odd sizes, so that vectorised kernels have tails everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(53, 37)
        self.hidden = nn.Linear(37, 29)
        self.frozen = nn.Linear(29, 29)
        self.head = nn.Linear(29, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embed(tokens).mean(1)))
        output: Tensor = self.head(hidden + self.frozen(hidden))
        return output


def net_selections(net: Net) -> dict[Tensor, Tensor]:
    return {
        net.embed.weight: choose(53 * 37, 1000, 1),
        net.hidden.weight: choose(37 * 29, 333, 2),
        net.hidden.bias: choose(29, 5, 3),
        net.frozen.weight: torch.empty(0, dtype=torch.int64),
        net.frozen.bias: torch.empty(0, dtype=torch.int64),
    }


def accumulate(net: Net, step: int) -> None:
    """Two micro-batches; the loss is scaled so that clipping bites at some steps and not at others."""
    for micro in range(2):
        generator = torch.Generator().manual_seed(1000 * step + micro)
        tokens = torch.randint(53, (8, 6), generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        loss = nn.functional.cross_entropy(net(tokens), labels) * (0.2 + 2 * (step % 3))
        (loss / 2).backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize(("gathered", "rows"), [(False, False), (True, False), (True, True)])
def test_fifty_steps_of_a_model(weight_decay: float, max_norm: float | None, gathered: bool, rows: bool) -> None:
    options = {**SETTINGS, "weight_decay": weight_decay}
    ours, plain = Net(), Net()
    ours.embed.sparse = rows
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    selections = net_selections(ours)
    gradients = SelectedGradients(selections) if gathered else None
    sparse = SparseAdamW(ours.parameters(), selections=selections, gradients=gradients, **options)  # type: ignore[arg-type]
    dense = DenseLoop(list(plain.parameters()), net_selections(plain), **options)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
        for optimizer in (sparse, dense.optimizer)
    ]
    clipped = 0
    for step in range(50):
        for net, optimizer in ((ours, sparse), (plain, dense.optimizer)):
            optimizer.zero_grad()
            accumulate(net, step)
        if gathered:
            assert ours.embed.weight.grad is None
            assert ours.head.weight.grad is not None
        if max_norm is not None:
            norm = clip_trained(ours.parameters(), selections, max_norm, gradients)
            clipped += int(norm > max_norm)
        sparse.step()
        dense.step(max_norm)
        for schedule in schedules:
            schedule.step()
        for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(bits(mine), bits(theirs)), f"step {step}: {name}"
    assert max_norm is None or 5 < clipped < 45
    changed = 0
    for name, parameter in ours.named_parameters():
        outside = torch.ones(parameter.numel(), dtype=torch.bool)
        if parameter in selections:
            outside[selections[parameter]] = False
            assert torch.equal(bits(parameter).flatten()[outside], bits(start[name]).flatten()[outside]), name
        changed += int((bits(parameter) != bits(start[name])).sum())
    assert changed > 1000
    assert ours.frozen.weight not in sparse.state
    states = zip(ours.parameters(), plain.parameters(), strict=True)
    for mine, theirs in states:
        if mine in selections and selections[mine].numel():
            for key in ("exp_avg", "exp_avg_sq"):
                whole = dense.optimizer.state[theirs][key].flatten()
                assert torch.equal(bits(sparse.state[mine][key]), bits(whole[selections[mine]]))


def test_gradients_of_an_embedding_s_rows() -> None:
    """Rows that occur once, often, not at all, and the padding row, against the dense gradient."""
    torch.manual_seed(0)
    sparse, dense = (nn.Embedding(40, 7, padding_idx=1, sparse=flag) for flag in (True, False))
    dense.load_state_dict(sparse.state_dict())
    index = choose(280, 150, 4)
    index = index[index // 7 != 12]  # a row that occurs, without a selected entry
    gradients = SelectedGradients({sparse.weight: index})
    weight = torch.randn(7)
    for tokens in (torch.tensor([[3, 3, 12, 1], [39, 0, 3, 1]]), torch.tensor([[5, 3], [38, 12]])):
        for table in (sparse, dense):
            (table(tokens) * weight).square().sum().backward()
    assert sparse.weight.grad is None
    expected = dense.weight.grad.flatten()[index]  # type: ignore[union-attr]
    assert torch.equal(gradients.values[sparse.weight], expected)
    assert 0 < int((expected != 0).sum()) < index.numel()
    gradients.remove()
    sparse(torch.tensor([2])).sum().backward()
    assert sparse.weight.grad is not None
    assert not gradients.values


def awkward(size: int, generator: torch.Generator) -> Tensor:
    """Magnitudes from denormal to huge, zeros of both signs."""
    values = torch.randn(size, generator=generator) * 10 ** (torch.rand(size, generator=generator) * 12 - 9)
    values[torch.rand(size, generator=generator) < 0.05] = 0.0
    values[torch.rand(size, generator=generator) < 0.05] = -0.0
    values[torch.rand(size, generator=generator) < 0.05] = 1e-41
    return values


@pytest.mark.parametrize("threads", [1, 2])
def test_a_coordinate_updates_the_same_wherever_it_lies(threads: int) -> None:
    """Vector body, scalar tail and thread cuts of the kernels fall differently on K gathered and on N dense numbers."""
    cases = [(k, k) for k in range(1, 41)] + [(size, size // 3 + 1) for size in range(41, 80)]
    cases += [(97_003, 1000), (97_003, 70_001)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size, k in cases:
            generator = torch.Generator().manual_seed(size + k)
            start, index = awkward(size, generator), choose(size, k, k)
            mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
            sparse = SparseAdamW([mine], selections={mine: index}, **SETTINGS)  # type: ignore[arg-type]
            dense = DenseLoop([theirs], {theirs: index}, **SETTINGS)
            for _ in range(3):
                gradient = awkward(size, generator)
                mine.grad, theirs.grad = gradient.clone(), gradient.clone()
                sparse.step()
                dense.step(None)
                assert torch.equal(bits(mine), bits(theirs)), (size, k)
                assert torch.equal(bits(mine.grad), bits(gradient))
    finally:
        torch.set_num_threads(before)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (1 << 18, 7):
        monkeypatch.setattr("deftx.core.optim._BLOCK", block)
        generator = torch.Generator().manual_seed(0)
        part, whole = (nn.Parameter(awkward(500, generator)) for _ in range(2))
        optimizer = SparseAdamW([part, whole], selections={part: choose(500, 101, 0)}, **SETTINGS)  # type: ignore[arg-type]
        for _ in range(3):
            part.grad, whole.grad = awkward(500, generator), awkward(500, generator)
            clip_trained([part, whole], {part: choose(500, 101, 0)}, 1.0)
            optimizer.step()
        results.append(torch.cat([bits(part), bits(whole)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("most", [1, 400, 1 << 20])
def test_tensors_that_are_computed_at_once_have_the_bits_of_each_by_itself(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As on a GPU; one parameter has no gradient at first, so that it is at another step, and one is float64."""

    def train() -> list[Tensor]:
        net = Net()
        net.head.double()
        selections = net_selections(net)
        gradients = SelectedGradients({net.embed.weight: selections[net.embed.weight]})
        optimizer = SparseAdamW(net.parameters(), selections=selections, gradients=gradients, **SETTINGS)  # type: ignore[arg-type]
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            gradients.gather(net.embed.weight)
            if step < 2:
                net.hidden.weight.grad = None
            norm = clip_trained(net.parameters(), selections, 0.5, gradients)
            optimizer.step()
            optimizer.zero_grad()
        return [norm, *(parameter.detach() for parameter in net.parameters())]

    alone = train()
    monkeypatch.setitem(optim._AT_ONCE, "cpu", most)
    for mine, theirs in zip(train(), alone, strict=True):
        assert torch.equal(mine, theirs)


def test_head_with_another_memory_layout() -> None:
    start = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine.grad, theirs.grad = gradient.clone(), gradient.clone()
    SparseAdamW([mine], selections={}, lr=0.1).step()
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, foreach=False, fused=False).step()
    assert torch.equal(bits(mine), bits(theirs))


def test_groups_closure_and_missing_gradients() -> None:
    one, two, idle = (nn.Parameter(torch.ones(10)) for _ in range(3))
    optimizer = SparseAdamW(
        [{"params": [one], "lr": 0.5}, {"params": [two, idle]}], selections={one: torch.tensor([3])}, lr=0.1
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = one.sum() + two.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 20.0
    assert one[3].item() == pytest.approx(0.5)
    assert int((one != 1).sum()) == 1
    assert torch.allclose(two, torch.full((10,), 0.9))
    assert torch.equal(idle, torch.ones(10))
    assert idle not in optimizer.state


def test_state_is_for_the_selection_alone() -> None:
    parameter = nn.Parameter(torch.randn(10_000))
    parameter.grad = torch.randn(10_000)
    optimizer = SparseAdamW([parameter], selections={parameter: choose(10_000, 77, 0)})
    optimizer.step()
    state = optimizer.state[parameter]
    stored = {key: tensor.untyped_storage().nbytes() for key, tensor in state.items()}
    assert stored == {"step": 4, "exp_avg": 4 * 77, "exp_avg_sq": 4 * 77}


@pytest.mark.parametrize("how", ["state_dict", "saved", "deepcopy", "pickle"])
def test_interrupted_equals_uninterrupted(how: str, tmp_path: object) -> None:
    def steps(net: Net, optimizer: SparseAdamW, first: int, last: int) -> None:
        for step in range(first, last):
            net.zero_grad()
            accumulate(net, step)
            optimizer.step()

    straight = Net()
    optimizer = SparseAdamW(straight.parameters(), selections=net_selections(straight), **SETTINGS)  # type: ignore[arg-type]
    steps(straight, optimizer, 0, 12)

    first = Net()
    optimizer = SparseAdamW(first.parameters(), selections=net_selections(first), **SETTINGS)  # type: ignore[arg-type]
    steps(first, optimizer, 0, 5)
    if how in ("deepcopy", "pickle"):
        pair = (first, optimizer)
        second, resumed = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        second = Net()
        second.load_state_dict(first.state_dict())
        state = optimizer.state_dict()
        if how == "saved":
            torch.save(state, f"{tmp_path}/state.pt")
            state = torch.load(f"{tmp_path}/state.pt", weights_only=True)
        resumed = SparseAdamW(second.parameters(), selections=net_selections(second))
        resumed.load_state_dict(state)
    steps(second, resumed, 5, 12)
    for mine, theirs in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(bits(mine), bits(theirs))


def test_state_of_another_selection_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(10))
    saved = SparseAdamW([parameter], selections={parameter: torch.tensor([1, 4])}).state_dict()
    for other in ({parameter: torch.tensor([1, 5])}, {}):
        with pytest.raises(DeftxError, match="belongs to selection"):
            SparseAdamW([parameter], selections=other).load_state_dict(saved)


def test_norm_is_float64_over_what_is_trained() -> None:
    part, whole, none = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(3))
    part.grad = torch.full((1000,), 1e30)
    part.grad[:4] = torch.tensor([3 * 2.0**70, 4 * 2.0**70, 1.0, 1e-20])  # squares beyond float32
    whole.grad = torch.full((7,), 2.0)
    index = torch.tensor([0, 1, 2])
    norm = trained_norm([part, whole, none], {part: index})
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(5 * 2.0**70, rel=1e-14)
    assert trained_norm([none], {}).item() == 0.0
    assert trained_norm([part], {part: index[:0]}).item() == 0.0


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_without_selections_is_torchs(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = ([nn.Parameter(torch.zeros(size)) for size in (31, 5)] for _ in range(2))
    for one, other in zip(mine, theirs, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    norm = clip_trained(mine, {}, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-6, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_clipping_leaves_other_gradients_alone(layout: str) -> None:
    gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(torch.zeros(6, 5))
    parameter.grad = gradient.clone() if layout == "contiguous" else gradient.T.contiguous().T
    index = torch.tensor([0, 7, 29])
    norm = clip_trained([parameter], {parameter: index}, 0.1)
    expected = gradient.clone().flatten()
    expected[index] *= (0.1 / (norm + 1e-6)).float()
    assert torch.equal(parameter.grad.flatten(), expected)
    assert trained_norm([parameter], {parameter: index}).item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([2, 1], "sorted"),
        ([1, 1], "sorted"),
        ([-1, 2], "outside its 10 entries"),
        ([3, 10], "outside its 10 entries"),
        ([0.0, 1.0], "vector of int64"),
        ([[0, 1]], "vector of int64"),
    ],
)
def test_bad_selections(index: list[int], message: str) -> None:
    parameter = nn.Parameter(torch.ones(10))
    with pytest.raises(ValueError, match=message):
        SparseAdamW([parameter], selections={parameter: torch.tensor(index)})


def test_bad_arguments() -> None:
    parameter, stranger = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    turned = nn.Parameter(torch.ones(4, 3).T)
    index = torch.tensor([0])
    with pytest.raises(ValueError, match="not optimized"):
        SparseAdamW([parameter], selections={stranger: index})
    with pytest.raises(ValueError, match="not contiguous"):
        SparseAdamW([turned], selections={turned: index})
    for options in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"lr": math.nan}):
        with pytest.raises(ValueError, match="must"):
            SparseAdamW([parameter], selections={}, **options)  # type: ignore[arg-type]
    parameter.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(ValueError, match="sparse gradients"):
        SparseAdamW([parameter], selections={parameter: index}).step()

"""Every seeded draw of a study, by numbers that an earlier deftx drew: a seed that moves makes other results."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deftx.core.selection import random_scores, select_topk
from deftx.data.module import _Blocks, _Stream, _Validation
from deftx.seeds import seed_of
from deftx.stages.inputs import stage_seed
from deftx.training.encoder import _draw


@pytest.mark.parametrize(
    ("names", "seed"),
    [
        ((3, "dropout", 17, 1), 70339203854089236),
        ((3, "order", 2), 42154503093795398),
        ((3, "mask", 1, 5), 56310233300097736),
        ((9, "valid"), 61249357208145771),
        ((61249357208145771, 12), 16342815218704433),
        (("head", 5, "classifier.dense.weight"), 13385546486494752),
        ((11, "encoder.layer.0.attention.self.query.weight"), 67111628706044757),
    ],
)
def test_seven_bytes_of_the_digest(names: tuple[object, ...], seed: int) -> None:
    assert seed_of(*names) == seed


@pytest.mark.parametrize(
    ("names", "seed"),
    [
        ((0, "full", "ace"), 3710320101),
        ((42, "mask sparse", "qba"), 1663158628),
        ((7, "head", "mlm"), 1219158407),
    ],
)
def test_four_bytes_for_a_stage(names: tuple[int, str, str], seed: int) -> None:
    assert stage_seed(*names) == seed_of(*names, width=4) == seed


def test_another_separator_or_order_is_another_seed() -> None:
    assert len({seed_of("a", "b"), seed_of("b", "a"), seed_of("ab"), seed_of("a"), seed_of("a", "b", "")}) == 5


def test_a_random_mask() -> None:
    drawn = select_topk(random_scores({"encoder.w": (30,), "encoder.v": (4, 5)}, seed=11), 6)
    assert drawn["encoder.w"].tolist() == [21, 26]
    assert drawn["encoder.v"].tolist() == [3, 8, 12, 16]


def test_a_fresh_head() -> None:
    model = torch.nn.Module()
    model.dense = torch.nn.Linear(3, 1)
    model.config = SimpleNamespace(initializer_range=0.02)
    _draw(model, ["dense.weight", "dense.bias"], seed=5)
    torch.testing.assert_close(
        model.dense.weight, torch.tensor([[0.00377777568, 0.00759034185, -0.02497416176]]), rtol=1e-5, atol=0
    )
    assert model.dense.bias.tolist() == [0.0]


class Rows:
    """Blocks of tokens that need no tokenizer."""

    tokens = np.arange(12 * 16).reshape(12, 16) % 40

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": self.tokens[rows]}


class Tokens:
    mask_token_id, all_special_ids = 4, [0, 1, 2, 3, 4]

    def __len__(self) -> int:
        return 40


def test_the_order_and_the_masks_of_a_fit() -> None:
    source = _Blocks(Rows(), Rows(), Tokens(), 0.15)
    plan = {"batch_size": 5, "steps": 6, "accumulate": 1, "seed": 3, "buckets": 0}
    stream, valid = _Stream(source, plan, 0, 1), _Validation(source, 9, 8, 0, 1)
    order = [stream.rows_of(2, position).tolist() for position in range(3)]
    assert order == [[6, 10, 1, 9, 5], [8, 2, 0, 4, 3], [7, 11]]
    assert [digest(stream[5]), digest(valid[0])] == ["5629dc16929c21d9", "4d0ba1c5711d7134"]


def digest(batch: dict[str, torch.Tensor]) -> str:
    whole = b"".join(name.encode() + batch[name].numpy().tobytes() for name in ("input_ids", "positions", "targets"))
    return hashlib.sha256(whole).hexdigest()[:16]

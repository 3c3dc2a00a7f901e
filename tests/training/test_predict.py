"""Logits and metrics against the plain model and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from tiny_models import LABELS, make_rows

from deftx.data.encode import batches_by_length, encode_texts, padding_of
from deftx.errors import DeftxError
from deftx.training.encoder import load_classifier, load_tokenizer
from deftx.training.metrics import MacroF1
from deftx.training.modules import SequenceClassifier
from deftx.training.predict import predict, score


@pytest.mark.parametrize("pairs", [False, True])
def test_batch_size_and_order_change_nothing(folder, settings, pairs):
    model, _ = load_classifier(folder, labels=LABELS, seed=0)
    module = SequenceClassifier(model, settings)
    tokenizer = load_tokenizer(folder)
    rows = make_rows(23, 4, pairs)
    second = rows["text_pair"].tolist() if pairs else None
    one_by_one = []
    model.eval()
    with torch.no_grad():
        for row in range(len(rows)):
            texts = [rows["text"][row]] if not pairs else [(rows["text"][row], rows["text_pair"][row])]
            encoded = tokenizer(texts, truncation=True, max_length=30, return_tensors="pt")
            one_by_one.append(model(**encoded).logits)
    expected = torch.cat(one_by_one)
    model.train()
    for size in (1, 5, 23, 64):
        columns = encode_texts(tokenizer, rows["text"].tolist(), second, 30)
        found = predict(module, batches_by_length(columns, padding_of(tokenizer), size), rows=len(rows))
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-6)
    assert model.training  # as it was
    assert expected.std(0).min() > 0  # rows differ, so their order is tested


def test_no_rows_have_no_logits(folders):
    model, _ = load_classifier(folders["bert"], labels=LABELS, seed=0)
    assert predict(model, [], rows=0).shape == (0, 3)


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,)])
def test_scores_are_scikit_learn_s(present):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, generator=generator)
    logits[:, 1] -= 100 * (1 not in present)
    labels = torch.tensor(present)[torch.randint(len(present), (50,), generator=generator)]
    found = logits.argmax(1)
    assert score("accuracy", logits, labels) == pytest.approx(accuracy_score(labels, found))
    # Over the labels of the gold rows, whatever is predicted.
    expected = f1_score(labels, found, labels=present, average="macro")
    assert score("macro_f1", logits, labels, 3) == pytest.approx(expected)
    metric = MacroF1(3)
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(logits[part], labels[part])
    assert float(metric.compute()) == pytest.approx(expected)


def test_one_stray_prediction_costs_no_class():
    labels = torch.tensor([0, 1] * 150)
    logits = torch.nn.functional.one_hot(labels, 3).float()
    assert score("macro_f1", logits, labels) == 1.0
    logits[0] = torch.tensor([0.0, 0.0, 1.0])  # of a label that no row has
    assert score("macro_f1", logits, labels) == pytest.approx((2 * 149 / 299 + 1) / 2)


def test_refusals():
    with pytest.raises(DeftxError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        score("acuracy", torch.zeros(1, 2), [0])
    with pytest.raises(DeftxError, match="0 rows"):
        score("accuracy", torch.zeros(0, 2), [])

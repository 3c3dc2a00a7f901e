"""Batches: blocks, masks, order, padding, and what is too little text."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from deftx.data.module import TextDataModule, _Stream
from deftx.errors import DeftxError
from deftx.training.pretrain import train_tokenizer


def lines(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(3, 14))) for _ in range(count)]


def rows(count: int, seed: int, pairs: bool = False) -> pd.DataFrame:
    frame = pd.DataFrame({"id": [str(i) for i in range(count)], "text": lines(count, seed)})
    frame["text_pair"] = lines(count, seed + 1) if pairs else None
    frame["label"] = [i % 3 for i in range(count)]
    return frame


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lines(300, 0), 200)


@pytest.fixture
def language(tokenizer):
    return TextDataModule.for_language(lines(200, 0), lines(40, 1), tokenizer, block_length=32, seed=7)


def stream(data, **plan):
    data.schedule(**{"batch_size": 8, "steps": 9, "seed": 1, **plan})
    return list(data.train_dataloader())


def restored(batch) -> torch.Tensor:
    tokens = batch["input_ids"].clone()
    tokens.view(-1)[batch["positions"]] = batch["targets"]
    return tokens


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        set(a) == set(b) and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def test_blocks_are_the_lines_one_after_another(tokenizer, language):
    """An epoch holds each block once; blocks are the concatenated lines, special tokens included, cut."""
    stream_of_tokens = [token for line in lines(200, 0) for token in tokenizer(line)["input_ids"]]
    count = len(stream_of_tokens) // 32
    assert language.examples == count
    expected = {tuple(stream_of_tokens[i * 32 : (i + 1) * 32]) for i in range(count)}
    steps = -(-count // 8)
    batches = stream(language, steps=steps)
    found = [tuple(row.tolist()) for batch in batches for row in restored(batch)]
    assert len(found) == count
    assert set(found) == expected
    assert len(batches[-1]["input_ids"]) == count - 8 * (steps - 1)  # the last, smaller batch is kept
    second = stream(language, steps=2 * steps)[steps:]
    again = [tuple(row.tolist()) for batch in second for row in restored(batch)]
    assert set(again) == expected
    assert again != found  # another order in the second epoch


def test_masks_are_15_percent_80_10_10_of_ordinary_tokens(tokenizer):
    data = TextDataModule.for_language(lines(4000, 0), lines(40, 1), tokenizer, block_length=64, seed=0)
    special = set(tokenizer.all_special_ids)
    ordinary = chosen = masked = kept = 0
    replaced = []
    for batch in stream(data, batch_size=64, steps=40):
        tokens = restored(batch)
        inputs = batch["input_ids"].view(-1)[batch["positions"]]
        ordinary += sum(int((tokens == token).sum()) for token in range(len(tokenizer)) if token not in special)
        chosen += len(batch["targets"])
        masked += int((inputs == tokenizer.mask_token_id).sum())
        same = inputs == batch["targets"]
        kept += int(same.sum())
        replaced += inputs[(inputs != tokenizer.mask_token_id) & ~same].tolist()
        assert not special & set(batch["targets"].tolist())
    n = chosen
    assert n > 10_000

    def near(count, total, share):
        return abs(count / total - share) < 4 * (share * (1 - share) / total) ** 0.5 + 1 / len(tokenizer)

    assert near(n, ordinary, 0.15)
    assert near(masked, n, 0.8)
    assert near(kept, n, 0.1)
    assert near(len(replaced), n, 0.1)
    assert not special & set(replaced)
    assert len(set(replaced)) > 0.9 * (len(tokenizer) - len(special))  # any ordinary token may come


def test_the_stream_is_a_function_of_the_seed_alone(language, tokenizer):
    first = stream(language)
    torch.manual_seed(5)
    np.random.seed(5)
    other = TextDataModule.for_language(lines(200, 0), lines(40, 1), tokenizer, block_length=32, seed=99)
    assert equal(first, stream(other))
    assert not equal(first, stream(language, seed=2))
    assert equal(first[:4], stream(language, steps=4))  # the length does not move it
    assert equal(first, stream(language, num_workers=1))


def test_the_stream_can_start_anywhere(language):
    """What a resumed fit asks for: the same batches from a step on, and no more of them."""
    whole = stream(language, accumulate=2)

    class Trainer:
        global_rank, world_size, global_step = 0, 1, 5

    language.trainer = Trainer()
    loader = language.train_dataloader()
    assert len(loader) == 8
    assert equal(list(loader), whole[10:])


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_step_make_up_the_step(language, tokenizer, parts):
    """Over accumulated batches and over devices: the same blocks and masks, and one normalizer."""
    for data in (language, TextDataModule.for_task(rows(21, 1), rows(5, 2), tokenizer, max_length=20)):
        whole = stream(data, steps=3)
        split = stream(data, steps=3, accumulate=parts)
        for step, batch in enumerate(whole):
            mine = split[step * parts : (step + 1) * parts]
            terms = len(batch["targets"]) if "targets" in batch else len(batch["labels"])
            assert float(batch["normalizer"]) == terms
            assert all(float(part["normalizer"]) == pytest.approx(terms / parts) for part in mine)
            if "targets" in batch:
                assert torch.equal(torch.cat([part["targets"] for part in mine]), batch["targets"])
            else:
                labels = torch.cat([part["labels"] for part in mine])
                assert torch.equal(labels[labels >= 0], batch["labels"])


def test_devices_share_a_step(language):
    class Trainer:
        world_size, global_step = 2, 0

        def __init__(self, rank):
            self.global_rank = rank

    whole = stream(language, steps=3)
    valid = list(language.val_dataloader())
    seen = []
    for rank in (0, 1):
        language.trainer = Trainer(rank)
        seen.append((list(language.train_dataloader()), list(language.val_dataloader())))
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([seen[rank][0][step]["targets"] for rank in (0, 1)]), batch["targets"])
    assert sum(len(batch["targets"]) for _, batches in seen for batch in batches) == sum(
        len(b["targets"]) for b in valid
    )


def test_validation_masks_are_fixed_and_know_no_batch_size(language, tokenizer):
    def targets(data, size):
        data.schedule(batch_size=size, steps=1, seed=random.randrange(1000))
        batches = list(data.val_dataloader())
        inputs = torch.cat([batch["input_ids"] for batch in batches])
        return inputs, torch.cat([batch["targets"] for batch in batches])

    small, large = targets(language, 3), targets(language, 64)
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[1], large[1])
    other = TextDataModule.for_language(lines(200, 0), lines(40, 1), tokenizer, block_length=32, seed=8)
    assert not torch.equal(targets(other, 3)[0], small[0])


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_truncated_padded_and_labelled(tokenizer, pairs):
    frame = rows(21, 1, pairs)
    data = TextDataModule.for_task(frame, rows(5, 2, pairs), tokenizer, max_length=20)
    second = frame["text_pair"].tolist() if pairs else None
    expected = tokenizer(frame["text"].tolist(), second, truncation="longest_first", max_length=20)
    found = {}
    for batch in stream(data, steps=3):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        assert int(mask.sum(1).max()) == batch["input_ids"].shape[1]  # padded to the batch's longest
        assert batch["tokens"] == int(mask.sum())
        assert (batch["input_ids"][mask == 0] == tokenizer.pad_token_id).all()
        for ids, types, label, keep in zip(
            batch["input_ids"], batch["token_type_ids"], batch["labels"], mask, strict=True
        ):
            found[tuple(ids[keep == 1].tolist()), tuple(types[keep == 1].tolist())] = int(label)
    wanted = {
        (tuple(ids), tuple(types)): label
        for ids, types, label in zip(expected["input_ids"], expected["token_type_ids"], frame["label"], strict=True)
    }
    assert found == wanted


def test_tokenised_text_is_cached_by_content(tokenizer, tmp_path):
    def make(seed, length=32):
        return TextDataModule.for_language(
            lines(60, seed), lines(40, 1), tokenizer, block_length=length, seed=0, cache_dir=tmp_path
        )

    first = stream(make(0))
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2 * 2  # each with its seal
    assert equal(first, stream(make(0)))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    make(2)
    make(0, 16)
    other = train_tokenizer(lines(300, 3), 180)
    TextDataModule.for_language(lines(60, 0), lines(40, 1), other, block_length=32, seed=0, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 2 + 1 + 2 + 2
    memory = TextDataModule.for_language(lines(60, 0), lines(40, 1), tokenizer, block_length=32, seed=0)
    assert equal(first, stream(memory))


@pytest.mark.parametrize("damage", ["cut", "zeroed", "unsealed"])
def test_damaged_tokens_are_made_again(tokenizer, tmp_path, damage):
    def make():
        return TextDataModule.for_language(
            lines(60, 0), lines(40, 1), tokenizer, block_length=32, seed=0, cache_dir=tmp_path
        )

    first = stream(make())
    for file in tmp_path.glob("*.arrow"):
        content = file.read_bytes()
        if damage == "cut":
            file.write_bytes(content[:100])
        elif damage == "zeroed":
            file.write_bytes(content[:1000] + bytes(1000) + content[2000:])
        else:
            file.with_suffix(".sha256").unlink()
    assert equal(first, stream(make()))
    assert equal(first, stream(make()))


def test_too_little_text_is_refused(tokenizer):
    enough = lines(50, 0)
    with pytest.raises(DeftxError, match=r"too little validation text: 1 lines make \d+ tokens, .* one block of 64"):
        TextDataModule.for_language(enough, enough[:1], tokenizer, block_length=64, seed=0)
    with pytest.raises(DeftxError, match="too little training text: 0 lines make 0 tokens"):
        TextDataModule.for_language([], enough, tokenizer, block_length=64, seed=0)
    with pytest.raises(DeftxError, match="no validation rows"):
        TextDataModule.for_task(rows(3, 0), rows(3, 0)[:0], tokenizer, max_length=16)
    mixed = rows(3, 0, pairs=True)
    mixed.loc[1, "text_pair"] = None
    with pytest.raises(DeftxError, match="row 1 has no second text"):
        TextDataModule.for_task(mixed, mixed, tokenizer, max_length=16)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_of_several_sources_never_mix_them(tokenizer, accumulate):
    train, valid = rows(41, 1), rows(17, 2)
    for frame in (train, valid):
        frame["source"] = [(0, 2, 1, 0, 0)[number % 5] for number in range(len(frame))]
    data = TextDataModule.for_task(train, valid, tokenizer, max_length=20)
    # 25 rows of 0, 8 of 1, 8 of 2 in steps of 6
    assert data.epoch_steps(6) == 5 + 2 + 2
    data.schedule(batch_size=6, steps=18, seed=3, accumulate=accumulate)
    stream_of = _Stream(data._source, data._plan, 0, 1)
    for epoch in (0, 1):
        steps = [stream_of.rows_of(epoch, position) for position in range(9)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(41))
        sources = [set(train["source"][step]) for step in steps]
        assert all(len(source) == 1 for source in sources)
        assert sources != sorted(sources, key=min)  # mixed, not one language after the other
    for index, batch in enumerate(data.train_dataloader()):
        step = index // accumulate
        assert {batch["source"]} == set(train["source"][stream_of.rows_of(step // 9, step % 9)])
    counted: Counter[int] = Counter()
    for batch in data.val_dataloader():
        counted[batch["source"]] += len(batch["labels"])
    assert counted == Counter(valid["source"])

"""Offline W&B runs, read back with W&B's own protobuf classes."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any


def records(run_dir: Path) -> list[Any]:
    """Return the records of the one offline run in a directory, once W&B's own process has closed it.

    ``Run.finish`` tells that process to close the run and does not wait: the file is whole a moment later.
    """
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while not of("exit", found := decoded(path)):
        assert time.monotonic() < deadline, f"{path} was never closed: {len(found)} records"
        time.sleep(0.02)
    return found


def decoded(path: Path) -> list[Any]:
    """Decode the whole records of a transaction log: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, found = path.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b"")
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + size > len(data):  # it is being written
            break
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def of(kind: str, found: list[Any]) -> list[Any]:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def summary(found: list[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for update in (update for record in of("summary", found) for update in record.update):
        values[update.key or "|".join(update.nested_key)] = json.loads(update.value_json)
    return values


def history(found: list[Any]) -> list[dict[str, Any]]:
    return [
        {item.key or "|".join(item.nested_key): json.loads(item.value_json) for item in record.item}
        for record in of("history", found)
    ]


def config(found: list[Any]) -> dict[str, Any]:
    """The config a run began with."""
    (run, *_) = of("run", found)
    return {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}

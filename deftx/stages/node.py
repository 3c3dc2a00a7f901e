"""A node of a study's graph: one result, what it is made from, and how.

Keys are known before anything runs. A result of our own enters another one's key by its key, what the user or a hub
gives enters by content (digest of the files, resolved commit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deftx.cache import Stage, Workspace
from deftx.errors import DeftxError
from deftx.seeds import seed_of

Loggers = Callable[[str], list[Any]]
"""Gives the Lightning loggers of a training stage from its name, such as ``full/language-ace``."""

Compute = Callable[[Workspace, Loggers], None]
"""Writes a result into ``work.out``; what it reads of other nodes is in ``work.inputs``."""


@dataclass(frozen=True)
class Given:
    """Something that the user or a hub gave, known by what is in it.

    Attributes:
        what: For messages, such as ``text of ace``.
        fingerprint: Of its content, as it enters keys.
        again: Gives the fingerprint of what is there now.
    """

    what: str
    fingerprint: str
    again: Callable[[], str]

    @classmethod
    def of(cls, what: str, again: Callable[[], str]) -> Given:
        """What is there now."""
        return cls(what, again(), again)

    def check(self) -> None:
        """Make sure that what was read just now is what the keys say.

        Raises:
            DeftxError: It was changed in between.
        """
        if self.again() != self.fingerprint:
            raise DeftxError(
                f"{self.what} was changed after this command began; nothing is kept of what was read of it: run the "
                "command again"
            )


def contents(given: Mapping[str, Given]) -> dict[str, str]:
    """Fingerprints by name, as they enter a key."""
    return {name: item.fingerprint for name, item in given.items()}


def check_all(given: Mapping[str, Given]) -> None:
    """Call :meth:`Given.check` on each, after what they stand for was read."""
    for item in given.values():
        item.check()


@dataclass(frozen=True, eq=False)
class Node:
    """One result of a study.

    Attributes:
        stage: What it is: kind, settings, seed and inputs, and so its key.
        needs: Nodes whose results making it reads, by their names in the stage's inputs.
        compute: How it is made.
        size: Bytes it takes, as its shapes say; 0 for small ones.
    """

    stage: Stage
    needs: Mapping[str, Node]
    compute: Compute
    size: int = 0

    @property
    def key(self) -> str:
        """The stage's key."""
        return self.stage.key


class InputFolder:
    """A folder that nodes read: in the result of another node, or given by the user and known by its content.

    The frozen dataclasses that inherit it have the attributes.

    Attributes:
        kind: Its name among the inputs of what reads it: ``base``, ``task`` or ``language``.
        inside: Name of the folder in the result of the node that makes it.
        key: Key of that node, or the fingerprint of a given folder.
        node: Makes it; None for a given folder.
        folder: The given folder; None for one that a node makes.
        given: Content of the given folder.
    """

    kind: str
    inside: str
    key: str
    node: Node | None
    folder: Path | None
    given: Given | None

    @property
    def needs(self) -> dict[str, Node]:
        """The node that makes it, by its kind, for what reads it."""
        return {} if self.node is None else {self.kind: self.node}

    @property
    def content(self) -> dict[str, str]:
        """The fingerprint of a given folder, by its kind, for what reads it."""
        return {self.kind: self.key} if self.node is None else {}

    def found_in(self, work: Workspace) -> Path:
        """The folder, where a node that needs it is computed.

        Raises:
            DeftxError: A given folder was changed since the command began.
        """
        if self.folder is None:
            return work.inputs[self.kind].path / self.inside
        if self.given is not None:
            self.given.check()
        return self.folder

    def digest(self, work: Workspace) -> str:
        """SHA-256 of its bits, where a node that needs it is computed."""
        return self.key if self.folder is not None else work.inputs[self.kind].digest


def node(
    kind: str,
    version: int,
    settings: Mapping[str, Any],
    compute: Compute,
    *,
    needs: Mapping[str, Node] | None = None,
    content: Mapping[str, str] | None = None,
    seed: int | None = None,
    label: str = "",
    product: tuple[str, ...] = (),
    size: int = 0,
) -> Node:
    """Make a node.

    Args:
        kind: Of the stage.
        version: Of the stage's code.
        settings: What changes the result, plain values.
        compute: How it is made.
        needs: Nodes it reads, by name; they enter the key by theirs.
        content: Fingerprints of what the user or a hub gave, by name.
        seed: The run's seed, where it draws from it.
        label: What messages call it.
        product: Files that are the result (:class:`~deftx.cache.Stage`).
        size: Bytes of the result.
    """
    needs = dict(needs or {})
    inputs = {**(content or {}), **{name: need.key for name, need in needs.items()}}
    return Node(Stage(kind, version, settings, inputs, seed, label, product), needs, compute, size)


def ordered(wanted: Iterable[Node]) -> list[Node]:
    """The nodes that some results stand on, themselves included: each once, after all that it needs."""
    found: dict[str, Node] = {}

    def visit(item: Node) -> None:
        if item.key not in found:
            for need in item.needs.values():
                visit(need)
            found[item.key] = item

    for item in wanted:
        visit(item)
    return list(found.values())


def stage_seed(seed: int, kind: str, language: str) -> int:
    """Seed of a stage, from (seed, stage kind, language) and nothing else: the rank never moves the data's order."""
    return seed_of(seed, kind, language, width=4)

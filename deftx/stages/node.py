"""A node of a study's graph: one result, what it is made from, and how.

Keys are computed before anything runs. A node's result enters another node's key by its own key; what the user or a hub
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
"""Returns the Lightning loggers of a training stage, given its name, such as ``full/language-ace``."""

Compute = Callable[[Workspace, Loggers], None]
"""Writes a result into ``work.out``; what it reads of other nodes is in ``work.inputs``."""


@dataclass(frozen=True)
class ExternalInput:
    """Something that the user or a hub gave, identified by its content.

    Attributes:
        what: For messages, such as ``text of ace``.
        fingerprint: Fingerprint of its content, as it enters keys.
        again: Computes the fingerprint of the current content.
    """

    what: str
    fingerprint: str
    again: Callable[[], str]

    @classmethod
    def of(cls, description: str, again: Callable[[], str]) -> ExternalInput:
        """Take the current content."""
        return cls(description, again(), again)

    def check(self) -> None:
        """Check that the content is still the one in the keys; call it after reading.

        Raises:
            DeftxError: It was changed in between.
        """
        if self.again() != self.fingerprint:
            raise DeftxError(
                f"{self.what} was changed after this command began; nothing is kept of what was read of it: run the "
                "command again"
            )


def contents(sources: Mapping[str, ExternalInput]) -> dict[str, str]:
    """Fingerprints by name, as they enter a key."""
    return {name: source.fingerprint for name, source in sources.items()}


def check_all(sources: Mapping[str, ExternalInput]) -> None:
    """Call :meth:`ExternalInput.check` on each; call it after reading them."""
    for source in sources.values():
        source.check()


@dataclass(frozen=True, eq=False)
class Node:
    """One result of a study.

    Attributes:
        stage: Kind, settings, seed and inputs, which give the key.
        needs: Nodes whose results ``compute`` reads, by their names in the stage's inputs.
        compute: Writes the result.
        size: Bytes of the result, computed from shapes; 0 for small ones.
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
    """A folder that nodes read: in the result of another node, or given by the user and identified by its content.

    The frozen dataclasses that inherit it have the attributes.

    Attributes:
        kind: Its name among the inputs of what reads it: ``base``, ``task`` or ``language``.
        inside: Name of the folder in the result of the node that makes it.
        key: Key of that node, or the fingerprint of a given folder.
        node: The node that makes it; None for a given folder.
        folder: The given folder; None if a node makes it.
        external: Content of the given folder.
    """

    kind: str
    inside: str
    key: str
    node: Node | None
    folder: Path | None
    external: ExternalInput | None

    @property
    def needs(self) -> dict[str, Node]:
        """The node that makes the folder, by :attr:`kind`, as a reader's ``needs``; empty for a given folder."""
        return {} if self.node is None else {self.kind: self.node}

    @property
    def content(self) -> dict[str, str]:
        """The fingerprint of a given folder, by :attr:`kind`, as a reader's ``content``; empty if a node makes it."""
        return {self.kind: self.key} if self.node is None else {}

    def found_in(self, work: Workspace) -> Path:
        """Return the folder's path while a node that reads it is computed.

        Raises:
            DeftxError: A given folder was changed since the command began.
        """
        if self.folder is None:
            return work.inputs[self.kind].path / self.inside
        if self.external is not None:
            self.external.check()
        return self.folder

    def digest(self, work: Workspace) -> str:
        """SHA-256 of the folder's content while a node that reads it is computed."""
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
        kind: Kind of the stage.
        version: Version of the stage's code.
        settings: What changes the result, plain values.
        compute: Writes the result.
        needs: Nodes it reads, by name; their keys enter the key.
        content: Fingerprints of what the user or a hub gave, by name.
        seed: The run's seed, if the stage draws from it.
        label: What messages call it.
        product: Files that are the result (:class:`~deftx.cache.Stage`).
        size: Bytes of the result.
    """
    needs = dict(needs or {})
    inputs = {**(content or {}), **{name: need.key for name, need in needs.items()}}
    return Node(Stage(kind, version, settings, inputs, seed, label, product), needs, compute, size)


def ordered(nodes: Iterable[Node]) -> list[Node]:
    """List ``nodes`` and all that they need: each node once, after its own needs."""
    visited: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.key not in visited:
            for need in node.needs.values():
                visit(need)
            visited[node.key] = node

    for node in nodes:
        visit(node)
    return list(visited.values())


def stage_seed(seed: int, kind: str, language: str) -> int:
    """Return a stage's seed, a function of (seed, kind, language) alone: the rank never changes the data's order."""
    return seed_of(seed, kind, language, width=4)

"""Restart equals one shot: what is killed, and started again until it ends, leaves the bits of what ran through.

:class:`RestartEqualsOneShot` is the test of it. A subclass says how its work starts and what must be the same, and
lists its cases. A :class:`Clock` kills work in the tests' own process, at a moment of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pytest


class Killed(BaseException):
    """Ends work where it stands, as a kill would: nothing of deftx answers to it."""


class Clock:
    """Notes the moments of some work, and ends it at one of them.

    Attributes:
        seen: The moments since the last reset, by name.
        last: The moment that kills: its position, or its name and which of that name it is, from 0. None: none does.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.last: int | tuple[str, int] | None = None

    def __call__(self, name: str) -> None:
        self.seen.append(name)
        if self.last in (len(self.seen) - 1, (name, self.seen.count(name) - 1)):
            raise Killed(name)

    def reset(self, last: int | tuple[str, int] | None = None) -> None:
        """Begin again, with another moment that kills."""
        self.seen, self.last = [], last


class RestartEqualsOneShot(ABC):
    """The test; ``cases`` is its table, by sentences. A case is whatever the hooks of the subclass understand."""

    cases: ClassVar[Mapping[str, Any]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            marks = getattr(self, "marks", {})
            rows = [pytest.param(case, id=name, marks=marks.get(name, ())) for name, case in self.cases.items()]
            metafunc.parametrize("case", rows)

    @abstractmethod
    def start(self, folder: str, case: Any, kill: Any = None) -> Any:
        """Do the work in ``folder``, in which an earlier attempt may have died; None if it died at ``kill``."""

    @abstractmethod
    def histories(self, case: Any, whole: Any) -> Iterable[Iterable[Any]]:
        """The kills of one attempt after the other; for each folder in which the work is then done to its end."""

    @abstractmethod
    def check(self, folder: str, case: Any, resumed: Any, whole: Any) -> None:
        """Assert that what ``start`` returned in the end is what it returned for the work that ran through."""

    def test_a_restart_equals_one_shot(self, case: Any) -> None:
        whole = self.start("whole", case)
        assert whole is not None
        for number, kills in enumerate(self.histories(case, whole)):
            for kill in kills:
                assert self.start(f"killed {number}", case, kill) is None, f"never came to {kill}"
            resumed = self.start(f"killed {number}", case)
            self.check(f"killed {number}", case, resumed, whole)

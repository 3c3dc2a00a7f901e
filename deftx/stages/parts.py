"""Parts of a study by name: what a sweep's jobs share is made first, each part once (``only=[...]``).

``base`` is the encoder; ``full:...`` a full phase with its decomposition, which all ranks and mask sizes share;
``sft:...`` a finished SFT. What follows says whose: ``source:CODE`` (φ_S), ``language:CODE`` (a target's φ_L),
``task`` (φ_T on the φ_S) or ``task_alone`` (φ_T on θ⁰); of a finished one also the method: ``sft:language:ace:deftx``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from deftx.errors import DeftxError

_PART = re.compile(r"base|(full|sft):(source:\w+|language:\w+|task|task_alone)(:\w+)?")
FORMS = "base, full:source:CODE, full:language:CODE, full:task, full:task_alone, and sft: with a method behind it"


def part(phase: str, whose: str, method: str | None = None) -> str:
    """The name of a part: ``part("sft", "language:ace", "ltsft")`` is ``sft:language:ace:ltsft``."""
    return ":".join(filter(None, (phase, whose, method)))


def split(name: str) -> tuple[str, str, str | None, str | None]:
    """Phase, whose (``source``, ``language``, ``task``, ``task_alone``), language code and method of a part's name.

    Raises:
        DeftxError: It is none.
    """
    found = _PART.fullmatch(name)
    if found is None:
        raise DeftxError(f"only={name!r} is no part of a study; the parts are {FORMS}")
    if name == "base":
        return "base", "", None, None
    phase, whose, method = found.groups()
    kind, _, code = whose.partition(":")
    return phase, kind, code or None, method[1:] if method else None


def check_parts(names: Sequence[str], sources: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> None:
    """Refuse names that are no parts of a study.

    Args:
        names: What ``only`` says.
        sources: Source languages that get an SFT.
        targets: Target languages.
        methods: Methods of the study.

    Raises:
        DeftxError: One line for each.
    """
    wrong = []
    for name in names:
        if not _PART.fullmatch(name):
            wrong.append(f"only={name!r} is no part of a study; the parts are {FORMS}")
            continue
        _, whose, code, method = split(name)
        languages = sources if whose == "source" else targets
        if code is not None and code not in languages:
            wrong.append(
                f"only={name!r}: this study trains no such SFT; its languages: {', '.join(languages) or 'none'}"
            )
        if method is not None and method not in methods:
            wrong.append(f"only={name!r}: this study has no such method; it has {', '.join(methods)}")
    if wrong:
        raise DeftxError("\n".join(wrong))

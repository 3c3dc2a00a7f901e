"""Rank and residual policies: what is accepted, its canonical text, and what is refused in which words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deftx.core.settings import RankPolicy, ResidualPolicy
from deftx.errors import DeftxError


@pytest.mark.parametrize(
    ("value", "kind", "number", "text"),
    [
        (16, "fixed", 16, "16"),
        ("16", "fixed", 16, "16"),
        (" 300 ", "fixed", 300, "300"),
        ("16.0", "fixed", 16, "16"),
        ("fraction:0.25", "fraction", 0.25, "fraction:0.25"),
        ("fraction:1", "fraction", 1.0, "fraction:1.0"),
        ("energy:0.9", "energy", 0.9, "energy:0.9"),
        ("ENERGY:0.90", "energy", 0.9, "energy:0.9"),
        ("gavish_donoho", "gavish_donoho", None, "gavish_donoho"),
        ("none", "none", None, "none"),
        (None, "none", None, "none"),
    ],
)
def test_rank_forms(value: object, kind: str, number: float | None, text: str) -> None:
    policy = RankPolicy.parse(value)  # type: ignore[arg-type]
    assert (policy.kind, policy.value, str(policy)) == (kind, number, text)
    assert RankPolicy.parse(policy) is policy


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"rank 0.*at least 1"),
        (-3, r"rank -3.*at least 1"),
        (True, r"unknown rank policy"),
        ("1.5", r"whole number.*fraction:1\.5"),
        ("nan", r"whole number"),
        ("inf", r"whole number"),
        ("fraction:0", r"fraction must lie in \(0, 1\]"),
        ("fraction:1.01", r"fraction must lie in \(0, 1\]"),
        ("energy:-0.1", r"energy must lie in \(0, 1\]"),
        ("energy:nan", r"energy must lie in \(0, 1\]"),
        ("energy", r"energy needs a number"),
        ("energy:high", r"energy needs a number"),
        ("none:3", r"unknown rank policy"),
        ("gavish_donohoe", r"did you mean 'gavish_donoho'"),
        ("enrgy:0.9", r"did you mean 'energy'"),
        ("", r"accepted: a whole number"),
    ],
)
def test_rank_refused(value: object, message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        RankPolicy.parse(value)  # type: ignore[arg-type]


def test_rank_constructor_checks_too() -> None:
    for arguments in (("fixed", 0), ("fixed", 2.0), ("energy", 2.0), ("none", 1), ("svd", None)):
        with pytest.raises(DeftxError):
            RankPolicy(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "keep", "text"),
    [
        ("prune:0.05", 0.05, "prune:0.05"),
        ("prune", 0.05, "prune:0.05"),
        ("drop", 0.0, "drop"),
        ("prune:0", 0.0, "drop"),
        (0.05, 0.05, "prune:0.05"),
        ("0.2", 0.2, "prune:0.2"),
        (1, 1.0, "prune:1.0"),
        (0, 0.0, "drop"),
    ],
)
def test_residual_forms(value: str | float, keep: float, text: str) -> None:
    policy = ResidualPolicy.parse(value)
    assert (policy.keep, str(policy)) == (keep, text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("prune:1.1", r"1\.1.*must lie in \[0, 1\]"),
        ("prune:-0.1", r"must lie in \[0, 1\]"),
        ("prune:nan", r"must lie in \[0, 1\]"),
        ("prun", r"did you mean 'prune'"),
        ("prune:", r"unknown residual policy"),
        (True, r"unknown residual policy"),
    ],
)
def test_residual_refused(value: str | float, message: str) -> None:
    with pytest.raises(DeftxError, match=message):
        ResidualPolicy.parse(value)


shares = st.floats(0, 1, exclude_min=True, allow_subnormal=False)
policies = st.one_of(
    st.builds(RankPolicy, st.just("fixed"), st.integers(1, 10**9)),
    st.builds(RankPolicy, st.sampled_from(["fraction", "energy"]), shares),
    st.builds(RankPolicy, st.sampled_from(["gavish_donoho", "none"])),
)


@given(policies, st.floats(0, 1))
def test_text_is_canonical(rank: RankPolicy, keep: float) -> None:
    assert RankPolicy.parse(str(rank)) == rank
    residual = ResidualPolicy(keep)
    assert ResidualPolicy.parse(str(residual)) == residual


def test_settings_need_no_torch() -> None:
    code = "import sys, deftx.core.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

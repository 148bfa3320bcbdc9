"""The tests that a rule file carries: what they expect, and what the rules say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from appliance.model import Decision, Judgement, Severity
from appliance.rules.match import Subject


@dataclass(frozen=True, slots=True)
class TestCase:
    """One test of a rule file; what is None is not asked."""

    __test__: ClassVar[bool] = False  # not a test of ours

    name: str
    file: str
    line: int
    ruleset: str
    subject: Subject
    action: Decision
    rule: str | None = None
    severity: Severity | None = None
    alert: bool | None = None


@dataclass(frozen=True, slots=True)
class TestResult:
    """How one test ended. ``why`` says what differs; empty when nothing does."""

    __test__: ClassVar[bool] = False

    name: str
    file: str
    line: int
    ok: bool
    why: str
    judgement: Judgement

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {'ok' if self.ok else 'FAILED'}: {self.name}" + (
            f": {self.why}" if self.why else ""
        )


def run(case: TestCase, judge: Callable[[Subject], Judgement]) -> TestResult:
    """Judge the case and compare."""
    got = judge(case.subject)
    pairs = (
        ("action", case.action, got.decision),
        ("rule", case.rule, got.rule.profile),
        ("severity", case.severity, got.severity),
        ("alert", case.alert, got.alert),
    )
    differs = [f"{what} is {given}, not {wanted}" for what, wanted, given in pairs if wanted not in (None, given)]
    why = f"{'; '.join(differs)} ({got.because})" if differs else ""
    return TestResult(case.name, case.file, case.line, not differs, why, got)

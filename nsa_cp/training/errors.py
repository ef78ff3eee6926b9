"""Errors that are the user's and not the program's: the command line shows them as a sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(ValueError):
    """A fault of the input. Its message is one sentence with the values at fault and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One fault of a configuration: the setting's dotted ``path`` (may be empty), and what is wrong with it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(UserError):
    """All faults of one configuration, in one message.

    Args:
        problems: the faults, in the order in which they are shown; at least one.
        source: the file (or other origin) they were found in.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "configuration") -> None:
        self.problems = tuple(problems)
        self.source = source
        if len(self.problems) == 1:
            text = f"{source}: {self.problems[0]}"
        else:
            text = "\n  ".join([f"{source} has {len(self.problems)} errors:", *map(str, self.problems)])
        super().__init__(text)


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn ValueErrors of the library's checks into UserErrors, for set-up code in which all values come from the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error

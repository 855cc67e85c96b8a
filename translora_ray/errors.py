"""Every error a user can cause. One root, picklable, and each message says what to do next.

The command line prints the message alone and exits with 2 for `UsageError`, with 1 for any other `TransLoraError`.
"""


def first_line(error: BaseException) -> str:
    """What another library's error says, without the lines that follow."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def reason(error: BaseException) -> str:
    """Why something failed: the sentence of an error of ours, else which error it is and its first line."""
    return str(error) if isinstance(error, TransLoraError) else f"{type(error).__name__}: {first_line(error)}"


class TransLoraError(Exception):
    """Root of the project's errors. The message is one sentence that says what is wrong and what to do."""


class UsageError(TransLoraError):
    """Input, configuration or resources that can not work: exit code 2, nothing written."""


class NoRoom(UsageError):
    """The disk is full: true for all that is written there, not for one run."""


class RunFailed(TransLoraError):
    """Work that began and could not be finished, though the input was sound: exit code 1, committed work stays."""


class EngineDied(RunFailed):
    """The process behind an engine ended: this engine never answers again, a new one may."""


class StreamEnded(RunFailed):
    """Examples that training waits for will not come in this attempt."""


class Stopped(RunFailed):
    """Somebody asked for the end: what was under way is committed, and the same command goes on from there."""


class Diverged(RunFailed):
    """A training step's loss or gradient is not a number: it would be so again."""

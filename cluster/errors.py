"""Errors that a user can cause: their base class, and how a command reports them.

`run_cli` alone turns an exception into a line on stderr and an exit status. The classes of errors
stand beside the code that raises them.

Lower packages cannot import this one. An error is therefore the user's if its class has the
attribute `user_facing = True`, whatever its base class. Any other exception that escapes a command
is a defect and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import ClassVar

import click

PROGRAM = "downpour"

EXIT_OK = 0
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class UserError(Exception):
    """An error that a user can cause and repair: one line that names the value and the remedy."""

    user_facing: ClassVar[bool] = True


def user_message(error: BaseException) -> str | None:
    """Returns the one line to show for `error`, or None if `error` is a defect.

    An error from a Ray actor arrives as a class derived from Ray's and ours, whose text is a remote
    traceback. The original error is its `cause`.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and _is_user_facing(cause):
        return one_line(cause)
    if _is_user_facing(error):
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """Returns the text of `error` on one line; the name of its class if it has no text."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line) or type(error).__name__


def run_cli(
    command: click.Command,
    argv: Sequence[str] | None = None,
    *,
    check: Callable[[Sequence[str]], None] | None = None,
) -> int:
    """Runs a click command and returns the exit status of the process.

    Args:
        command: the group (or single command) to run.
        argv: arguments without the program's name; None takes those of the process.
        check: looks at the arguments first, and raises an error of the user's.

    Returns:
        0, or the int that the command returned or gave to `ctx.exit`; 2 after an error of the
        user's, printed as `downpour: error: …`; 130 after an interrupt.

    Raises:
        Exception: any other exception of the command. It is a defect.
    """
    try:
        if check is not None:
            check(sys.argv[1:] if argv is None else argv)
        status = command.main(
            args=None if argv is None else list(argv), prog_name=PROGRAM, standalone_mode=False
        )
    except click.exceptions.NoArgsIsHelpError as error:
        # Its message is the whole help.
        click.echo(error.format_message(), err=True)
        return EXIT_ERROR
    except click.ClickException as error:
        return _fail(_usage_line(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{PROGRAM}: interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        return _fail(message)
    # click returns the status of ctx.exit as if the command had returned it.
    return status if isinstance(status, int) and not isinstance(status, bool) else EXIT_OK


def _is_user_facing(error: BaseException) -> bool:
    return getattr(type(error), "user_facing", False) is True


def _fail(message: str) -> int:
    click.echo(f"{PROGRAM}: error: {message}", err=True)
    return EXIT_ERROR


def _usage_line(error: click.ClickException) -> str:
    """Returns click's message, with the close matches that it found and the command for help."""
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        link = " See" if message.endswith("?") else "; see"
        message = f"{message.rstrip('.')}{link} '{error.ctx.command_path} --help'"
    return message

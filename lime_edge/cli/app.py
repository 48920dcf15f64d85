"""The command line: its commands, one file each, and how a fault ends it. Importing it imports no torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from lime_edge import __version__, terminal
from lime_edge.cli import (
    bench,
    demo,
    doctor,
    evaluate,
    experts,
    export,
    import_adapter,
    inspect,
    interchange,
    pack,
    profile,
    run,
    serve,
    verify,
)
from lime_edge.cli.command import App, UsageError, explain_usage
from lime_edge.cli.flags import translate
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

app = App(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""LiME models on devices: one quantized backbone, many experts, switched without reloading.

    Exit codes: 0 done, 2 bad command line or bad input, 3 a check missed, 4 a package, engine or
    device is missing, 5 nothing could be written, 130 interrupted, 1 a bug.""",
)
for command in (export, run, serve, inspect, verify, evaluate, bench, pack, demo, doctor, import_adapter):
    command.register(app)
app.add_typer(experts.experts_app, name="experts")
interchange.register(experts.experts_app)
profile.register(experts.experts_app)


def _version(asked: bool) -> None:
    if asked:
        print(f"lime-edge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point: a user's fault is one message on standard error and an exit code, never a trace."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary directories are removed
    terminal.be_quiet(False)
    try:
        code = app(prog_name="lime-edge", standalone_mode=False)
        sys.stdout.flush()  # here, where what goes wrong is told
    except LimeEdgeError as error:
        sys.exit(_tell(error))
    except UsageError as error:
        told = explain_usage(error)
        sys.exit(_tell(told) if told else 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        _leave()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the parser and rich would end with 1
            _leave()
        raise
    except OSError as error:
        sys.exit(_tell(_explain(error)))
    sys.exit(code if isinstance(code, int) else 0)


def _leave() -> NoReturn:
    """Who read our output has enough: no fault, and the exit code that shells have for it."""
    _drop_output()
    sys.exit(141)


def _drop_output() -> None:
    """What is still to be written goes nowhere: the interpreter would fail at it once more as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: OSError) -> LimeEdgeError:
    """Of output that nothing more fits into, or of a path that nobody looked at before: a name too long, say."""
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _drop_output()
        return LimeEdgeError(f"standard output: {error.strerror}", "write it where there is room", EXIT_STORAGE)
    where = "input or output" if error.filename is None else str(error.filename)
    return LimeEdgeError(f"{where}: {error.strerror or error}", "check the path and its permissions")


def _tell(error: LimeEdgeError) -> int:
    terminal.err.print(f"[bold red]error:[/bold red] {terminal.escape(translate(str(error)))}", soft_wrap=True)
    return error.exit_code


if __name__ == "__main__":
    main()

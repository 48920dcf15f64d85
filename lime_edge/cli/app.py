"""The command line: its commands, one file each, and how a fault ends it. Importing it imports no torch."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

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
from lime_edge.errors import LimeEdgeError

app = App(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""LiME models on devices: one quantized backbone, many experts, switched without reloading.

    Exit codes: 0 done, 2 bad command line or bad input, 3 a check missed, 4 a package, engine or
    device is missing, 5 nothing could be written, 1 a bug.""",
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
    except LimeEdgeError as error:
        sys.exit(_tell(error))
    except UsageError as error:
        told = explain_usage(error)
        sys.exit(_tell(told) if told else 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # of a path that nobody looked at before: a name too long, a folder nobody may enter
        where = "input or output" if error.filename is None else str(error.filename)
        sys.exit(_tell(LimeEdgeError(f"{where}: {error.strerror or error}", "check the path and its permissions")))
    sys.exit(code if isinstance(code, int) else 0)


def _tell(error: LimeEdgeError) -> int:
    terminal.err.print(f"[bold red]error:[/bold red] {terminal.escape(translate(str(error)))}", soft_wrap=True)
    return error.exit_code


if __name__ == "__main__":
    main()

"""How a command line is read: an option given twice is refused, and a bad line is told in our own words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand

from lime_edge.errors import LimeEdgeError, suggest

CALLED = {  # what other tools call a command of ours
    "chat": "run",
    "generate": "run",
    "infer": "run",
    "convert": "export",
    "compile": "export",
    "quantize": "export",
    "benchmark": "bench",
    "info": "inspect",
    "show": "inspect",
    "test": "verify",
    "check": "verify",
}
UsageError: type[Exception] = typer.BadParameter.__mro__[
    1
]  # the parser's own: public in no version, its module has moved


class Command(TyperCommand):
    """A command that refuses an option which takes one value and was given two: the last would win in silence."""

    def make_parser(self, ctx: Any) -> Any:
        """The parser of one call, with a look at what it found."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_once(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            option: Any
            for option, times in Counter(order).items():
                if option.param_type_name == "option" and times > 1 and not (option.multiple or option.is_flag):
                    raise LimeEdgeError(f"{option.opts[0]} takes one value, {times} were given", "keep one of them")
            return values, rest, order

        parser.parse_args = parse_once
        return parser


class App(typer.Typer):
    """Commands that are all read as `Command` says."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """Add a command; see typer.Typer.command."""
        return super().command(name, cls=Command, **settings)


def explain_usage(error: Any) -> LimeEdgeError | None:
    """A bad command line as one of our errors; None where it only asks for the help, which is then printed."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return None
    command = error.ctx.command_path if error.ctx else "lime-edge"
    option = getattr(error, "option_name", None)
    problem = error.format_message().rstrip(".")
    hint = f"{command} --help lists what it takes"
    if option and hasattr(error, "possibilities") and error.ctx:
        known = [name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")]
        problem, hint = f"{command} has no option {option}", suggest(option, known) or hint
    elif (word := re.match(r"No such command '([\w-]+)'", problem)) and word[1] in CALLED:
        hint = f"here it is called {CALLED[word[1]]}: {command} {CALLED[word[1]]} --help"
    return LimeEdgeError(problem[:1].lower() + problem[1:], hint)

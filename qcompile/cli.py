"""The command line: ``qcompile MODEL`` and its verbs; data on stdout, talk on stderr.

Exit codes: 0 done, 1 a gate failed, 2 the user's mistake, 3 a bug, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from qcompile import __version__
from qcompile.commands.analyze import analyze
from qcompile.commands.bench import bench
from qcompile.commands.compile import compile_command
from qcompile.commands.explain import explain
from qcompile.commands.run import run
from qcompile.commands.tables import passes, recipes, targets
from qcompile.commands.verify import verify
from qcompile.errors import QCompileError, UserError, unknown_name

INTERRUPTED = 130
BUG = 3
MISTAKE = 2


class Surface(click.Group):
    """A group whose help also shows the options of ``compile``, the verb that may be left out."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("qcompile", "MODEL [OPTIONS]")
        formatter.write_usage("qcompile", "VERB ...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        compile_command.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Surface)
@click.version_option(__version__, prog_name="qcompile")
def surface() -> None:
    """Compile a float transformer into a low-bit program that runs in low bits, and prove every step.

    MODEL is an .onnx file, a Hugging Face folder, or package.module:factory.
    """


for _verb in (compile_command, analyze, explain, verify, bench, run, passes, targets, recipes):
    surface.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = surface.main(args=_routed(given), prog_name="qcompile", standalone_mode=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit flushes in peace
        return 0
    except BaseException as error:
        if "--debug" in given and not isinstance(error, click.exceptions.Exit):
            traceback.print_exception(error)
        return _reported(error)
    return result if isinstance(result, int) else 0


def _routed(arguments: list[str]) -> list[str]:
    """Put ``compile`` in front unless a verb is named or the general help is asked for."""
    if not arguments or arguments[0] in ("--help", "--version"):
        return arguments or ["--help"]
    first = arguments[0]
    if first in surface.commands:
        return arguments
    if first.isalpha() and not Path(first).exists():
        error = unknown_name("verb", first, surface.commands)
        raise UserError(f"{error.message}, and no file or folder has that name", hint=error.hint)
    return ["compile", *arguments]


def _reported(error: BaseException) -> int:
    """Print ``error`` as one ``error:`` line and maybe a ``hint:``, and return the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return _print("interrupted", "nothing was written", INTERRUPTED)
    if isinstance(error, QCompileError):
        where = f" ({error.where})" if error.where else ""
        return _print(f"{error.message}{where}", error.hint, error.exit_code)
    if isinstance(error, click.ClickException):
        hint = f"{error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        return _print(error.format_message(), hint, MISTAKE)
    if isinstance(error, MemoryError):
        return _print("not enough memory", "use fewer or shorter samples: --samples, --length", MISTAKE)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    what = f"internal error: {type(error).__name__}: {error}"
    return _print(what, "this is a bug of qcompile; --debug shows the traceback to report", BUG)


def _print(message: str, hint: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"hint: {' '.join(hint.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

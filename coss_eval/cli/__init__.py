"""The command line: one short function a command; everything heavy is imported when a command runs."""

from __future__ import annotations

import os
import sys
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from cyclopts import CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError
from cyclopts.config import Yaml

from coss_eval.cli import evaluate, inside, look, start  # noqa: F401 - they register their commands
from coss_eval.cli.app import RUN, app
from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.live import fitted, width

app.meta.suppress_keyboard_interrupt = False  # main() says what is stored


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=RUN)] = None,
    debug: Annotated[bool, Parameter(group=RUN)] = False,
) -> Any:
    """
    Parameters
    ----------
    config
        YAML file with values for any flag; a flag on the command line wins.
    debug
        Show tracebacks.
    """
    if config is not None and not config.is_file():
        raise UsageError(f"--config {config}: no such file")
    app.config = (Yaml(config, search_parents=False, use_commands_as_keys=False),) if config is not None else ()
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def main() -> None:
    """Entry point: one line for the person and exit code 2 for a wrong call, 1 for a failed run."""
    debug = "--debug" in sys.argv
    try:
        code = app.meta(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except (CossError, CycloptsError) as error:
        if debug:
            raise
        message = " ".join((_wrong_call(error) if isinstance(error, CycloptsError) else str(error)).split())
        sys.stderr.write(fitted(f"coss-eval: {message}", width(sys.stderr)) + "\n")
        code = 2 if isinstance(error, UsageError | CycloptsError) else 1
    except KeyboardInterrupt:
        sys.stderr.write(
            "coss-eval: stopped; what was done is stored, the same command goes on from there (train: with --resume)\n"
        )
        code = 130
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit itself writes and fails
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _wrong_call(error: CycloptsError) -> str:
    """What is wrong with a call, in the words of this help; the parser's own message for all that it says well."""
    command = " ".join(["coss-eval", *(error.command_chain or ())])
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())!r} is one argument too many; see {command} --help"
    if not isinstance(error, MissingArgumentError) or error.argument is None:
        return str(error)
    if error.keyword is not None:
        return f"{error.keyword} needs a value; see {command} --help"
    needed = [a for a in signature(error.target).parameters.values() if a.default is a.empty] if error.target else []
    shown = [f"--{a.name} {a.name.upper()}" if a.kind is a.KEYWORD_ONLY else a.name.upper() for a in needed]
    name = error.argument.name.lstrip("-")
    missing = error.argument.name if any(one.startswith(f"--{name} ") for one in shown) else name.upper()
    return f"{missing} is missing: {' '.join([command, *shown])}; see {command} --help"

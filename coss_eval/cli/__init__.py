"""The command line: one short function a command; everything heavy is imported when a command runs."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from cyclopts import CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError
from cyclopts.config import Yaml

from coss_eval.cli import evaluate, inside, look, start  # noqa: F401 - they register their commands
from coss_eval.cli.app import FAILED, RUN, app
from coss_eval.errors import CossError, CossWarning, UsageError
from coss_eval.runtime.live import PARTED, TOGETHER, Parted, complain, speaks, tell
from coss_eval.store import StoreWarning

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
    if config is not None:
        _refuse_no_config(config)
    app.config = (Yaml(config, search_parents=False, use_commands_as_keys=False),) if config is not None else ()
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def _refuse_no_config(file: Path) -> None:
    """UsageError for a file that is none, no YAML, or one that would run code or unfold to gigabytes."""
    from coss_eval.training.fields import read_yaml

    if not file.is_file():
        raise UsageError(f"--config {file}: no such file")
    found = read_yaml(file, f"--config {file}")
    if not isinstance(found, dict | None):
        raise UsageError(f"--config {file}: expected one flag: value on each line, got {type(found).__name__}")


def _as_lines(shown: Callable[..., None]) -> Callable[..., None]:
    """What shows warnings: ours as a line for the person, without the place in our code; others as ``shown`` does."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, CossWarning | StoreWarning):
            if speaks():
                tell(f"warning: {' '.join(str(message).split())}")
        else:
            shown(message, category, *place, **more)

    return show


def _stop(stopped: list[int]) -> None:
    """What Ctrl-C does, for a scheduler's SIGTERM and Slurm's SIGUSR1 before it: what is at work ends as it would then.

    Either is the exit code of SIGTERM, 143.
    """
    stopped.append(signal.SIGTERM)
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: one line for the person, and an exit code (see the help's last line)."""
    debug = "--debug" in sys.argv
    stopped = list[int]()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: _stop(stopped))
    if not debug:
        warnings.showwarning = _as_lines(warnings.showwarning)
    try:
        code = app.meta(_none_empty(sys.argv[1:]), exit_on_error=False, print_error=False, result_action="return_value")
    except (CossError, CycloptsError) as error:
        if debug:
            raise
        what = _wrong_call(error) if isinstance(error, CycloptsError) else error
        complain(error, " ".join(f"coss-eval: {what}".split()))
        code = 2 if isinstance(error, UsageError | CycloptsError) else PARTED if isinstance(error, Parted) else FAILED
    except KeyboardInterrupt:
        if TOGETHER not in os.environ:  # else the command that started this process says it
            sys.stderr.write(
                "coss-eval: stopped; what was done is stored, the same command goes on from there (train: with "
                "--resume)\n"
            )
        code = 128 + (stopped[0] if stopped else signal.SIGINT)
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit itself writes and fails
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _none_empty(words: list[str]) -> list[str]:
    """The words of a call. UsageError for an empty one, which would be the folder that the person stands in."""
    for before, word in zip(["coss-eval", *words], words, strict=False):
        name, sign, value = word.partition("=")
        if not word.strip() or (name.startswith("--") and sign and not value.strip()):
            after = before if not word.strip() else name
            raise UsageError(f"what follows {after} is empty: is a variable of the shell not set?")
    return words


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

"""The application and its groups; the modules beside this one register their commands with it."""

from __future__ import annotations

from cyclopts import App, Group, Parameter

from coss_eval import __version__

app = App(
    name="coss-eval",
    help="How robust is this visual representation, and why? Start with: coss-eval quickstart\n\nExit codes: 0 all "
    "is done, 1 something failed, 2 a wrong call, 3 another process is at what is left, from 128: stopped by a signal.",
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
# exit codes of a command that did not do all (2 is a wrong call): something failed; another process is at what is left
FAILED, HELD = 1, 3
# of commands, in the order of --help
START, EVALUATE, LOOK = (
    Group.create_ordered(name) for name in ("Start here", "Evaluate", "Look at results and inputs")
)
# of flags, in the order of a command's --help
TASK, MODEL, DATA, RUN = (Group(name, sort_key=place) for place, name in enumerate(("Task", "Model", "Data", "Run")))

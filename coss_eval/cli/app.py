"""The application and its groups; the modules beside this one register their commands with it."""

from __future__ import annotations

from cyclopts import App, Group, Parameter

from coss_eval import __version__

app = App(
    name="coss-eval",
    help="How robust is this visual representation, and why? Start with: coss-eval quickstart",
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
START, EVALUATE, LOOK = (
    Group.create_ordered(name) for name in ("Start here", "Evaluate", "Look at results and inputs")
)

"""What commands print: plain lines, and the progress line."""

from __future__ import annotations

import sys

from coss_eval.runtime.live import duration as duration
from coss_eval.runtime.live import live_line as live_line
from coss_eval.runtime.live import progress_line as progress_line
from coss_eval.runtime.live import training_line as training_line


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

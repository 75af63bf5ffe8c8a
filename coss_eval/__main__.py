"""``python -m coss_eval`` is ``coss-eval``: the form that torchrun takes."""

from coss_eval.cli import main

main()

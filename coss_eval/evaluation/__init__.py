"""Which cells are missing, run their tasks, hand the measurements to the store."""

from coss_eval.evaluation.facts import relate as relate
from coss_eval.evaluation.planning import Job as Job
from coss_eval.evaluation.planning import Plan as Plan
from coss_eval.evaluation.planning import plan as plan
from coss_eval.evaluation.progress import Progress as Progress
from coss_eval.evaluation.run import Run as Run
from coss_eval.evaluation.run import compare as compare
from coss_eval.evaluation.run import evaluate as evaluate
from coss_eval.evaluation.run import execute as execute

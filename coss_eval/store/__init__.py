"""Measurements on disk: what a cell is, the folder that keeps them, and its packed form."""

from coss_eval.store.cells import Cell as Cell
from coss_eval.store.cells import Condition as Condition
from coss_eval.store.cells import Measurement as Measurement
from coss_eval.store.cells import Record as Record
from coss_eval.store.cells import SampleColumns as SampleColumns
from coss_eval.store.cells import StoreWarning as StoreWarning
from coss_eval.store.cells import canonical_json as canonical_json
from coss_eval.store.cells import column_name as column_name
from coss_eval.store.cells import own_column as own_column
from coss_eval.store.folder import NoRoom as NoRoom
from coss_eval.store.store import Store as Store

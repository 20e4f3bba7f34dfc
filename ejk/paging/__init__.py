"""The page manager of the host: which sequence holds which pages, and what a step is to do.

NumPy alone: no array here is on a device, and nothing here imports JAX.
"""

from ejk.paging._batch import Batch as Batch
from ejk.paging._batch import BatchInputs as BatchInputs
from ejk.paging._errors import OutOfPagesError as OutOfPagesError
from ejk.paging._errors import OutOfSequencesError as OutOfSequencesError
from ejk.paging._manager import PageManager as PageManager
from ejk.paging._prefix_groups import PrefixGroups as PrefixGroups
from ejk.paging._statistics import Statistics as Statistics

"""The part of `backends` that ragged batches run on."""

from backends import RAGGED as RAGGED
from backends import RAGGED_PALLAS as PALLAS  # noqa: F401
from backends import RAGGED_TRITON as TRITON  # noqa: F401
from backends import RaggedEntry as RaggedEntry
from backends import ragged_edge as ragged_edge

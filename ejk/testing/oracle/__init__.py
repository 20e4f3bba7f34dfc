"""What `ejk` must compute, written as loops over float64 numbers. NumPy alone.

It follows the definition word by word and reads only the slots that a visible token owns: an
array full of NaN elsewhere gives the same answer.
"""

from ejk.testing.oracle._attention import Rows as Rows
from ejk.testing.oracle._attention import attend as attend
from ejk.testing.oracle._attention import length_of as length_of
from ejk.testing.oracle._attention import log_sum_exp as log_sum_exp
from ejk.testing.oracle._attention import merge_attention_states as merge_attention_states
from ejk.testing.oracle._attention import only_pages as only_pages
from ejk.testing.oracle._attention import page_attention as page_attention
from ejk.testing.oracle._attention import ragged_page_attention as ragged_page_attention
from ejk.testing.oracle._attention import ragged_rows as ragged_rows
from ejk.testing.oracle._attention import tokens as tokens
from ejk.testing.oracle._attention import visible_positions as visible_positions
from ejk.testing.oracle._caches import copy_kv_cache as copy_kv_cache
from ejk.testing.oracle._caches import write_kv_cache as write_kv_cache
from ejk.testing.oracle._pools import LARGEST as LARGEST
from ejk.testing.oracle._pools import Array as Array
from ejk.testing.oracle._pools import DType as DType
from ejk.testing.oracle._pools import codes as codes
from ejk.testing.oracle._pools import dequantised as dequantised
from ejk.testing.oracle._pools import halves as halves
from ejk.testing.oracle._pools import holds_both as holds_both
from ejk.testing.oracle._pools import quantised as quantised
from ejk.testing.oracle._pools import row as row
from ejk.testing.oracle._pools import scales_of as scales_of
from ejk.testing.oracle._pools import token as token

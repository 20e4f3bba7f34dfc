"""Attention over paged key-value caches for JAX: one call, backends that agree."""

import typing
from importlib import import_module as _load

from ejk import _foreign_names, _public
from ejk import paging as paging
from ejk._accepted_slots import accepted_slots as accepted_slots
from ejk._backend import Backend as Backend
from ejk._backend_report import BackendReport as BackendReport
from ejk._backend_report import backend_report as backend_report
from ejk._check_page_attention_inputs import (
    check_page_attention_inputs as check_page_attention_inputs,
)
from ejk._check_ragged_page_attention_inputs import (
    check_ragged_page_attention_inputs as check_ragged_page_attention_inputs,
)
from ejk._check_write_kv_cache_inputs import (
    check_write_kv_cache_inputs as check_write_kv_cache_inputs,
)
from ejk._copy_kv_cache import copy_kv_pages as copy_kv_pages
from ejk._copy_kv_cache import copy_kv_slots as copy_kv_slots
from ejk._dense_block_tables import dense_block_tables as dense_block_tables
from ejk._empty_kv_cache import KVCache as KVCache
from ejk._empty_kv_cache import empty_kv_cache as empty_kv_cache
from ejk._errors import TuningError as TuningError
from ejk._errors import UnsupportedError as UnsupportedError
from ejk._export import export_disabled_checks as export_disabled_checks
from ejk._layers import layer_block_tables as layer_block_tables
from ejk._layers import layer_slot_mapping as layer_slot_mapping
from ejk._load_tuning import load_tuning as load_tuning
from ejk._load_tuning import tuning as tuning
from ejk._merge_attention_states import merge_attention_states as merge_attention_states
from ejk._page_attention import page_attention as page_attention
from ejk._plan_page_attention import plan_page_attention as plan_page_attention
from ejk._ragged_page_attention import ragged_page_attention as ragged_page_attention
from ejk._registry import register_backend as register_backend
from ejk._registry import unregister_backend as unregister_backend
from ejk._slot_mapping import ragged_slot_mapping as ragged_slot_mapping
from ejk._slot_mapping import slot_mapping as slot_mapping
from ejk._version import __version__ as __version__
from ejk._write_kv_cache import write_kv_cache as write_kv_cache
from ejk.backends.copy_kv_cache import CopyKVCacheBackend as CopyKVCacheBackend
from ejk.backends.copy_kv_cache import CopyKVCacheOperands as CopyKVCacheOperands
from ejk.backends.copy_kv_cache import CopyKVCacheProblem as CopyKVCacheProblem
from ejk.backends.mosaic_gpu.page_attention.backend import (
    MosaicGpuPageAttention as MosaicGpuPageAttention,
)
from ejk.backends.mosaic_gpu.ragged_page_attention.backend import (
    MosaicGpuRaggedPageAttention as MosaicGpuRaggedPageAttention,
)
from ejk.backends.page_attention import PageAttentionBackend as PageAttentionBackend
from ejk.backends.page_attention import PageAttentionOperands as PageAttentionOperands
from ejk.backends.page_attention import PageAttentionProblem as PageAttentionProblem
from ejk.backends.page_attention_plan import PageAttentionPlan as PageAttentionPlan
from ejk.backends.pallas.copy_kv_cache.backend import PallasCopyKVCache as PallasCopyKVCache
from ejk.backends.pallas.page_attention.backend import PallasPageAttention as PallasPageAttention
from ejk.backends.pallas.ragged_page_attention.backend import (
    PallasRaggedPageAttention as PallasRaggedPageAttention,
)
from ejk.backends.pallas.write_kv_cache.backend import PallasWriteKVCache as PallasWriteKVCache
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionBackend as RaggedPageAttentionBackend,
)
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionOperands as RaggedPageAttentionOperands,
)
from ejk.backends.ragged_page_attention import (
    RaggedPageAttentionProblem as RaggedPageAttentionProblem,
)
from ejk.backends.triton.copy_kv_cache.backend import TritonCopyKVCache as TritonCopyKVCache
from ejk.backends.triton.page_attention.backend import TritonPageAttention as TritonPageAttention
from ejk.backends.triton.ragged_page_attention.backend import (
    TritonRaggedPageAttention as TritonRaggedPageAttention,
)
from ejk.backends.triton.write_kv_cache.backend import TritonWriteKVCache as TritonWriteKVCache
from ejk.backends.write_kv_cache import WriteKVCacheBackend as WriteKVCacheBackend
from ejk.backends.write_kv_cache import WriteKVCacheOperands as WriteKVCacheOperands
from ejk.backends.write_kv_cache import WriteKVCacheProblem as WriteKVCacheProblem
from ejk.backends.xla.copy_kv_cache import XlaCopyKVCache as XlaCopyKVCache
from ejk.backends.xla.page_attention import XlaPageAttention as XlaPageAttention
from ejk.backends.xla.ragged_page_attention import XlaRaggedPageAttention as XlaRaggedPageAttention
from ejk.backends.xla.write_kv_cache import XlaWriteKVCache as XlaWriteKVCache

if not typing.TYPE_CHECKING:  # which reads the names above
    __all__ = _public.publish(globals(), hidden={"backends"})
    paging.__all__ = _public.publish(vars(paging))

    # A type checker would take every name for an attribute.
    def __getattr__(name: str):
        if name in ("compat", "testing"):  # loaded once they are asked for
            return _load(f"ejk.{name}")
        # With a name and no object: Python would suggest a private name behind what is said here.
        raise AttributeError(_foreign_names.missing_attribute(name, globals()), name=name)


del typing

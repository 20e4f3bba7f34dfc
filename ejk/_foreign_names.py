"""What other libraries call the arguments and the operations of this one."""

from collections.abc import Iterable, Mapping

from ejk._describe import describe
from ejk._nearest import nearest

_OWN_NAMES = {  # each with what it is called elsewhere
    "query": "q queries query_states",
    "key_cache": "k_cache k_pages key_pages key_cache_pages key k keys",
    "value_cache": "v_cache v_pages value_pages value_cache_pages value v values",
    "context_lens": "seq_lens kv_lens lengths cache_seqlens seqused_k kv_seqlen kv_seq_lens "
    "seq_len context_lengths context_len sequence_lengths seqlens",
    "block_tables": "block_table page_indices page_table page_tables page_table_k page_ids",
    "cu_q_lens": "cu_seqlens_q qo_indptr query_start_loc cu_seqlens cu_q_len q_indptr",
    "attn_scale": "sm_scale softmax_scale scale scaling attention_scale logits_scale",
    "attn_logits_soft_cap": "soft_cap logits_soft_cap softcap logit_cap logits_softcap "
    "attn_logit_softcapping logit_soft_cap",
    "max_context_len": "max_seqlen_k max_seq_len max_kv_len max_seqlen max_seq_len_k",
    "max_q_len": "max_seqlen_q max_query_len max_seq_len_q",
    "num_splits": "k_splits num_kv_splits",
    "cache_layout": "kv_layout qkv_layout layout",
    "sliding_window": "sliding_window_length sliding_window_size window",
    "sinks": "s_aux attention_sink attention_sinks softmax_aux sink",
    "alibi_slopes": "slopes alibi",
    "key_scale": "k_scale k_scales k_scales_pages k_descale key_scales k_scale_cache",
    "value_scale": "v_scale v_scales v_scales_pages v_descale value_scales v_scale_cache",
    "causal": "is_causal use_causal_mask",
    "prefix_groups": "shared_prefixes cascade",
    "tree_mask": "qq_bias",
    "return_lse": "return_softmax_lse return_residual return_residuals",
    "backend": "implementation",
    "key": "append_key keys k new_keys",
    "value": "append_value values v new_values",
    "slot_mapping": "slots slot_map slot_indices",
    "outs": "outputs v_states",
    "lses": "softmax_lses s_states",
    "num_heads": "num_qo_heads num_q_heads num_attention_heads num_query_heads",
    "num_kv_heads": "num_key_value_heads kv_heads num_heads",
    "num_pages": "num_blocks num_gpu_blocks",
    "head_dim": "head_size head_dim_qk",
    "value_head_dim": "head_dim_vo head_size_v kv_lora_rank",
    "page_size": "block_size tokens_per_page",
    "max_blocks": "max_pages pages_per_seq max_blocks_per_seq",
}
_OWN_NAME: dict[str, list[str]] = {}  # more than one where operations differ
for _own, _names in _OWN_NAMES.items():
    for _name in _names.split():
        _OWN_NAME.setdefault(_name, []).append(_own)

_FUSED = "a pool of keys and values is key_cache, with value_cache=None and the pages first"
_ROWS = (
    "the pages of each sequence are a row of block_tables: ejk.dense_block_tables makes it of "
    "bounds and page ids"
)
_PAGE_SIZE = "leave it out: it follows from the pools and cache_layout"
_LAST = "leave it out: how full the last page is follows from context_lens"
_CAUSAL = "leave it out: a token always sees its sequence up to itself"
_NO_MASK = "leave it out: what is not visible is selected away"
_TREE_MASK = (
    "leave it out, or give tree_mask of ejk.ragged_page_attention, which says of new tokens alone "
    "which see each other"
)
_FIELD = "it is a field of a backend object: backend=ejk.{}({}=...)"
_QUANTISED = "leave it out: key_cache has a dtype, and key_scale, value_scale are its scales"
_SIDE_BY_SIDE = "keys of latent attention are the two parts side by side, with no values"
_NO_DROPOUT = "leave it out: there is no dropout"
_IN_PLACE = "leave it out: the result is returned"
_MENDS = {
    "window_left": "sliding_window is window_left + 1, as it counts the token itself, and None for "
    "-1",
    "window_size": "sliding_window is left + 1 of window_size=(left, 0), as it counts the token "
    "itself, and None for (-1, -1)",
    "window_right": "leave it out: no token sees later ones",
    "mask_value": _NO_MASK,
    "causal": _CAUSAL,
    "is_causal": _CAUSAL,
    "mask_type": _CAUSAL,
    "num_seqs": "leave it out: repeat the last bound in cu_q_lens for the sequences past it",
    "q_lens": "cu_q_lens is jnp.pad(jnp.cumsum(q_lens), (1, 0))",
    "kv_cache": _FUSED,
    "paged_kv_cache": _FUSED,
    "kv_pages": "keys and values in turn are key_cache, with value_cache=None and "
    'cache_layout="INTERLEAVED"',
    "kv_indptr": _ROWS,
    "kv_indices": _ROWS,
    "paged_kv_indptr": _ROWS,
    "paged_kv_indices": _ROWS,
    "kv_last_page_len": _LAST,
    "paged_kv_last_page_len": _LAST,
    "batch_indices": "slot_mapping is block_tables[batch_indices, positions // page_size] * "
    "page_size + positions % page_size",
    "page_size": _PAGE_SIZE,
    "block_size": _PAGE_SIZE,
    "out_dtype": "leave it out: the result has the query's dtype",
    "page_table_v": "leave it out: keys and values share block_tables",
    "kv_cache_dtype": _QUANTISED,
    "q_descale": "leave it out: queries are floats of 16 or 32 bits",
    "q_scale": "leave it out: queries are floats of 16 or 32 bits",
    "use_fp8": _QUANTISED,
    "fp8_params": _QUANTISED,
    "kv_c": _SIDE_BY_SIDE,
    "k_pe": _SIDE_BY_SIDE,
    "append_ckv": _SIDE_BY_SIDE,
    "append_kpe": _SIDE_BY_SIDE,
    "q_seqlen": "leave it out: a row of length 0 sees nothing",
    "bias": "there is none; alibi_slopes and sliding_window cover two cases",
    "dropout_rate": _NO_DROPOUT,
    "seed": _NO_DROPOUT,
    "cfg": "the fields of a backend object are the tuning",
    "block_h": "leave it out: it follows from the heads of a group",
    "debug": "leave it out",
    "inline_seq_dim": "leave it out: one launch runs over all sequences",
    "out": _IN_PLACE,
    "output": _IN_PLACE,
    "platform": "leave it out: a call runs on the platform that it is compiled for, and "
    "backend= says with what",
    **dict.fromkeys(("custom_mask", "packed_custom_mask", "attn_mask", "mask"), _TREE_MASK),
}
_FIELDS = {  # what tunes another library's kernel: a field of a backend of each operation
    "page_attention": {
        "pages_per_compute_block": "PallasPageAttention.pages_per_compute_block",
        "num_kv_pages_per_block": "PallasPageAttention.pages_per_compute_block",
        "megacore_mode": "PallasPageAttention.megacore_mode",
        "vmem_limit_bytes": "PallasPageAttention.vmem_limit_bytes",
        "num_warps": "TritonPageAttention.num_warps",
        "num_stages": "TritonPageAttention.num_stages",
        "interpret": "TritonPageAttention.interpret",
    },
    "ragged_page_attention": {
        "pages_per_compute_block": "PallasRaggedPageAttention.pages_per_block",
        "num_kv_pages_per_block": "PallasRaggedPageAttention.pages_per_block",
        "num_queries_per_block": "PallasRaggedPageAttention.block_q",
        "vmem_limit_bytes": "PallasRaggedPageAttention.vmem_limit_bytes",
        "num_warps": "TritonRaggedPageAttention.num_warps",
        "num_stages": "TritonRaggedPageAttention.num_stages",
        "interpret": "TritonRaggedPageAttention.interpret",
    },
    "write_kv_cache": {"interpret": "TritonWriteKVCache.interpret"},
    "copy_kv_slots": {"interpret": "TritonCopyKVCache.interpret"},
    "copy_kv_pages": {"interpret": "TritonCopyKVCache.interpret"},
    "plan_page_attention": {"interpret": "TritonPageAttention.interpret"},
}

_OPERATIONS = {  # each with what it is called elsewhere
    "page_attention": "paged_attention paged_attention_v1 paged_attention_v2 attention "
    "single_query_cached_kv_attention flash_decoding decode_attention flash_mla_with_kvcache "
    "BatchDecodeWithPagedKVCacheWrapper",
    "ragged_page_attention": "flash_attention flash_attn_varlen_func flash_attn_with_kvcache "
    "flash_attn_func unified_attention ragged_paged_attention ragged_page_attention_v2 "
    "ragged_page_attention_v3 dot_product_attention prefill_attention context_attention_fwd "
    "BatchPrefillWithPagedKVCacheWrapper",
    "write_kv_cache": "reshape_and_cache reshape_and_cache_flash concat_and_cache_mla "
    "append_paged_kv_cache append_paged_mla_kv_cache update_kv_cache",
    "copy_kv_pages": "copy_blocks swap_blocks",
    "merge_attention_states": "merge_state merge_states merge_state_in_place merge_attn_states",
    "plan_page_attention": "plan begin_forward get_scheduler_metadata",
}
_OPERATION = {name: own for own, names in _OPERATIONS.items() for name in names.split()}
_DROP_INS = {
    "paged_attention": "ejk.compat.jax_tpu.paged_attention",
    "ragged_paged_attention": "ejk.compat.jax_tpu.ragged_paged_attention",
    "ragged_page_attention_v2": "ejk.compat.ejkernel.ragged_page_attention_v2",
    "ragged_page_attention_v3": "ejk.compat.ejkernel.ragged_page_attention_v3",
    "flash_attn_with_kvcache": "ejk.compat.flash_attention.flash_attn_with_kvcache",
    "reshape_and_cache_flash": "ejk.compat.vllm.reshape_and_cache_flash",
}
_PAGE_MANAGERS = (
    "PageManager", "BlockManager", "BlockSpaceManager", "BlockAllocator", "BlockPool",
    "KVCacheManager", "PageAllocator",
)  # fmt: skip
_WITH_AXIS_NAME = {  # functions of `ejk` until an argument took their place
    "context_parallel_attention": "page_attention",
    "context_parallel_ragged_attention": "ragged_page_attention",
}


def unexpected_keyword(
    name: str, function: str, arguments: Iterable[str], operations: Mapping[str, Iterable[str]]
) -> str:
    """Say what to write instead of a keyword that `function` does not take.

    `operations` are the arguments of every operation.
    """
    arguments = list(arguments)
    owns = _OWN_NAME.get(name, [name])
    if any(name in theirs for theirs in operations.values()):
        owns = [name, *owns]
    alike = [other for other in arguments if set(_OWN_NAME.get(other, [other])) == set(owns)]
    own = next((own for own in [*owns, *alike] if own in arguments), owns[0])
    others = [
        f"ejk.{other}"
        for other, theirs in operations.items()
        if own in theirs and not other.startswith(("check_", "register_", "unregister_"))
    ]
    near = nearest(name, arguments)
    if own in arguments:
        mend = f"it is {own} here"
    elif name in _FIELDS.get(function, {}):
        mend = _FIELD.format(*_FIELDS[function][name].split("."))
    elif name in _MENDS:
        mend = _MENDS[name]
    elif any(name in fields for fields in _FIELDS.values()):
        mend = "leave it out: it tunes another library's kernel"
    elif others:
        mend = f"{own} is an argument of {', '.join(others)}"
    elif near:
        mend = f"did you mean {near}?"
    else:
        mend = f"the arguments are {', '.join(arguments)}"
    return f"{function}() got an unexpected keyword argument {describe(name)}: {mend}"


def missing_attribute(name: str, public: Iterable[str]) -> str:
    """Say what to write instead of `ejk.name`."""
    message = f"module 'ejk' has no attribute {name!r}"
    if name in _OPERATION:
        same = f"; {_DROP_INS[name]} has its own signature" if name in _DROP_INS else ""
        return f"{message}: it is ejk.{_OPERATION[name]} here{same}"
    if name in _PAGE_MANAGERS:
        return f"{message}: it is ejk.paging.PageManager here"
    if name in _WITH_AXIS_NAME:
        return f"{message}: it is ejk.{_WITH_AXIS_NAME[name]} with axis_name="
    near = nearest(name, (other for other in public if not other.startswith("_")))
    return f"{message}: did you mean ejk.{near}?" if near else message

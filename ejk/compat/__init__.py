"""Drop-ins: functions of other libraries, by their own signatures, run by `ejk`.

One module a library: `ejk.compat.jax_tpu`, `jax_gpu`, `tpu_inference`, `ejkernel`,
`flash_attention` and `vllm`. Changing an import is the whole migration. Pools are read in place.
Arguments that change the answer are honoured or refused by name; those that tune the other's
kernel have no effect here. `docs/migrating.md` lists them all.
"""

from importlib import import_module as _load

_LIBRARIES = ("ejkernel", "flash_attention", "jax_gpu", "jax_tpu", "tpu_inference", "vllm")


def __getattr__(name: str):
    if name in _LIBRARIES:  # loaded once it is asked for
        return _load(f"ejk.compat.{name}")
    raise AttributeError(f"ejk.compat has no {name!r}; it has {', '.join(_LIBRARIES)}", name=name)

"""The backends: ways to run an operation. To add one is to write one class.

In a package of your own, subclass the operation's abstract backend, `ejk.PageAttentionBackend`,
`ejk.RaggedPageAttentionBackend`, `ejk.WriteKVCacheBackend` or `ejk.CopyKVCacheBackend`, as a frozen
dataclass whose fields are its tuning, and give it

    name        a short word for `backend="..."` and for error messages
    features    the optional features that it honours, of its problem's `feature_names` (another
                name is a TypeError); what is not named here is refused for it
    platforms   the platforms that it runs on: "cpu", "cuda", "rocm", "tpu"
    limits      the reasons why sizes or dtypes of a problem cannot run; none if they can
    run         the results of a problem, from its operands; traced at lowering, for one platform

and, if nobody has run it on some of its platforms, `only_if_asked`; if XLA can see into what it
runs, as into a program of JAX's own operations, `is_opaque = False`. An object of the class is
accepted as `backend=` at once; `ejk.register_backend` offers it for automatic choice. It needs no
rule for gradients or `vmap`: those stand above every backend. `docs/own_backend.md` has a
complete example.

In this package XLA's backend of an operation is a module, `xla/<operation>.py`; a backend with
kernels is a folder, `<backend>/<operation>/`. Its `backend.py` says what is supported and runs it,
`sizes.py` how a problem is cut, `kernel.py` is the kernel. What the operations of a backend share
lies beside the folders, in files with a `_`. A new operation adds `<operation>.py` here, with its
problem and its abstract backend, and such a module or folder for each backend. A new backend is a
line in each table of `tests/entries.py`: every property then runs on it.
"""

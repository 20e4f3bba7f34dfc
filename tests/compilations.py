"""How often XLA compiles."""

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts what XLA compiles while it is entered."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def listen(self, event, duration, **kwargs):
        self.count += event == COMPILED

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listen)

"""One folder a backend, one file an operation."""

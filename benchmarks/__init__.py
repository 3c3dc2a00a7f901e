"""deftx beside plain implementations, measured side by side; see ``python -m benchmarks --list``."""

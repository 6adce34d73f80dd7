# What the binaries were built for. setup.py writes the module beside them.
TORCH: str
CUDA: str | None
PYTHON: str

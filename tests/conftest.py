import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_finish() -> None:
    """What was imported stays; tracing would have the collector search it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)

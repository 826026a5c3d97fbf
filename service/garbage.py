"""What is garbage, when the collector looks for it, and what is given back to the system.

It holds the interpreter for as long as it looks through everything, and the modules of torch, FastAPI and Gradio are a
million objects, none of which is ever garbage.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While modules are imported nothing is collected, which takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def set_aside() -> None:
    """Have the collector never look at what there is now: modules, and what is loaded beside them (see `sweep`)."""
    gc.freeze()


def sweep() -> None:
    """Collect what was just let go of, such as an unloaded checkpoint, also if it was set aside.

    From then on everything is looked through again: who still uses what was let go of has let go of it only later.
    """
    gc.unfreeze()
    gc.collect()
    give_back()


def give_back() -> None:
    """Give the system back what is free but still the process's, of which loading a checkpoint leaves some 60 MB."""
    # Which glibc alone does.
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)

"""Python's garbage collector during a command: it has nothing to find while libraries and a model are loaded.

What they consist of lives as long as the process. Walking it while it grows takes a fifth of a start, and walking
torch's once more at the end takes as long as a short answer.
"""

from __future__ import annotations

import gc
from importlib import import_module
from threading import Thread


def pause_collector() -> None:
    """Collect nothing until `resume_collector`; for a process of its own."""
    gc.disable()


def import_torch() -> None:
    """Import torch, which the collector never looks at if it is paused.

    Called before the compiled extension is imported: that one wants to be taken down in order. In a thread of its own,
    since errors that torch catches on the way keep the frames that they went through, and those would be kept too.
    """
    if gc.isenabled():
        return
    thread = Thread(target=import_module, args=("torch",))
    thread.start()
    thread.join()
    gc.freeze()


def resume_collector() -> None:
    """Collect again."""
    gc.enable()

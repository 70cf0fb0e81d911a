"""Workers that do not outlive their parent.

A killed parent (SIGKILL, out of memory) cannot stop its workers, and a worker that waits for the
next task never notices: it would keep its memory for good, and could publish into a folder that the
next run has finished already.
"""

import multiprocessing
import os
import threading

_EXIT_CODE = 1


def exit_with_parent() -> None:
    """End this process as soon as its parent has ended; nothing to do outside a worker."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        # Not sys.exit: the main thread may be in the middle of a task, whose files are atomic.
        os._exit(_EXIT_CODE)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()

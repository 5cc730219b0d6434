"""Independent requests side by side: behind a network nearly all of their time is waiting."""

import queue
import threading
from collections.abc import Callable

AT_ONCE = 4  # connections of one lane; a server shares its workers among all trainings


def together(*acts: Callable[[], object], at_once: int = AT_ONCE) -> None:
    """Do all of them and wait for all.   Raises the first error in their order, after the others have ended too.

    at_once: 1 does them one after the other in this thread.
    """
    if len(acts) < 2 or at_once < 2:
        for act in acts:
            act()
        return
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(acts)):
        waiting.put(number)
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                acts[number]()
            except BaseException as error:  # raised again by whoever waits
                errors[number] = error

    # Threads of a pool would be waited for when the interpreter ends, also one that hangs in a request.
    helpers = [threading.Thread(target=work, name="request", daemon=True) for _ in range(min(at_once, len(acts)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[min(errors)]

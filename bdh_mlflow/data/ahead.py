"""Results that are fetched in threads before they are asked for, so that a store far away is not waited for."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls by number, each made at most once. For one thread that asks."""

    def __init__(self) -> None:
        self._begun: dict[int, _Call[T]] = {}

    def begin(self, number: int, call: Callable[[], T]) -> None:
        """Make a call in a thread, unless it is under way or its result waits."""
        if number not in self._begun:
            self._begun[number] = _Call(call)

    def take(self, number: int, call: Callable[[], T]) -> T:
        """The result of a call, which is kept no longer; what was not begun is called now.   Raises what the call raises."""
        begun = self._begun.pop(number, None)
        return begun.result() if begun else call()


class _Call(Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="text ahead", daemon=True)  # one that hangs must not hold up the end
        self._thread.start()

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # raised again by whoever waits
            self._error = error

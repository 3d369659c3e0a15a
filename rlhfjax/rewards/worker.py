"""A reward function in a process of its own, where it can be stopped and can break nothing."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from rlhfjax.rewards import functions
from rlhfjax.rewards.arguments import Function, answer, bare_signature, name_of
from rlhfjax.rewards.errors import RewardError


class Worker:
    """A function in TRL's signature that answers within a time or raises.

    The process is started at once and serves all calls. One that does not answer in time is
    killed, with all that it has started; one that ended by itself is reported. The next call starts
    another. It ends with its parent, however that ends.

    The process is a new Python in the same working folder, which imports the function from its
    module: a script that makes a `Worker` needs `if __name__ == "__main__":` around what it does.

    Args:
      function: in TRL's signature, defined at the top of a module; or its name, as `load` reads it,
        and then its file is read by the process alone.
      time_limit: seconds that a call may take.
      start_limit: seconds that the process may take to import the function.

    Raises:
      RewardError: there is no function of that name, or its file cannot be imported.
      ValueError: the function cannot be sent to the process, or not be imported there.
    """

    def __init__(
        self, function: Function | str, *, time_limit: float, start_limit: float = 120.0
    ) -> None:
        self.__name__ = function if isinstance(function, str) else name_of(function)
        self.time_limit, self.start_limit = time_limit, start_limit
        self._folder = os.getcwd()
        self._process: BaseProcess | None = None
        try:
            self._pickled = pickle.dumps(function)
            self._start()
        except RewardError:
            raise
        except Exception as error:
            raise ValueError(
                f"reward function {self.__name__!r} cannot run in a process of its own ({error}): "
                "define it with `def` at the top of a module, and in a script start training "
                'under `if __name__ == "__main__":`'
            ) from error

    def __call__(self, **given: Any) -> Any:
        """What the function returns; raises what it raises.

        Raises:
          TimeoutError: there was no answer in time.
          RuntimeError: the process ended.
        """
        if self._process is None:
            self._start()
        return self._answer(self.time_limit, given)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        # The process leads a group, with whatever the function has started.
        with suppress(AttributeError, ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._pickled, self._folder), daemon=True
        )
        self._process.start()
        # The only other end is now in the process, and closes with it.
        theirs.close()
        try:
            self.__name__, self.__signature__ = self._answer(self.start_limit)
        except BaseException:
            self.close()
            raise

    def _answer(self, limit: float, *question: Any) -> Any:
        """The answer to a question, or the first word of a new process."""
        try:
            for asked in question:
                self._connection.send(asked)
            if not self._connection.poll(limit):
                raise TimeoutError(f"no answer within {limit:g} s")
            succeeded, answered = self._connection.recv()
        except (EOFError, ConnectionError):
            ending = _ending(self._process)
            self.close()
            raise RuntimeError(f"its process {ending}") from None
        except BaseException:
            # An answer that comes later would be taken for that to the next question.
            self.close()
            raise
        if succeeded:
            return answered
        raise answered


def _ending(process: Any) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _serve(connection: Connection, pickled: bytes, folder: str) -> None:
    """Answers questions until nobody asks any more."""
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        os.chdir(folder)
        function = pickle.loads(pickled)
        if isinstance(function, str):
            function = functions.load(function)
        connection.send((True, (name_of(function), bare_signature(function))))
    except RewardError as error:  # says where and why
        connection.send((False, error))
        return
    except Exception as error:
        connection.send((False, _portable(error)))
        return
    with suppress(EOFError):
        while True:
            given = connection.recv()
            try:
                connection.send((True, answer(function, given)))
            except BaseException as error:
                connection.send((False, _portable(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _portable(error: BaseException) -> Exception:
    """The error with its traceback as a note, or another one where it cannot be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, Exception)
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(
        "in the reward function's process:\n" + "".join(traceback.format_exception(error))
    )
    return copy

"""What Ctrl-C does to a training: end it after the step in hand, once that is saved.

SIGTERM and SIGHUP do the same. A second signal acts at once, as if nobody caught it.
"""

import signal

from parts.ranks import SINGLE, Ranks
from parts.run_log import StepResult

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal, here or on another rank, ended the training, after a step that was saved.

    signum: the signal's number; SIGTERM where another rank caught it.
    """

    def __init__(self, caught: list[int], iteration: int):
        super().__init__(f"stopped at iteration {iteration}")
        self.signum = caught[0] if caught else signal.SIGTERM


class Interrupts:
    """Catch the signals that end a process, within a `with` block, and note them.

    caught: the signals of this process, by number.
    stopping: whether all ranks stop; it becomes true on all of them at the same step.
    """

    def __init__(self, ranks: Ranks = SINGLE):
        self.caught: list[int] = []
        self.stopping = False
        self._ranks = ranks
        self._handlers = {}  # that were there before

    def __enter__(self) -> "Interrupts":
        try:
            for signum in SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                    self._handlers[signum] = signal.signal(signum, self._catch)
        except ValueError:  # not the main thread, which alone gets signals
            self._handlers.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _catch(self, signum: int, _: object) -> None:
        self.caught.append(signum)
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def pending(self) -> bool:
        """Whether this process has caught a signal."""
        return bool(self.caught)

    def agree(self, previous: StepResult | None) -> None:
        """Stop where this process caught a signal or, with several ranks, any had caught one when
        it started the step before, `previous`. That of this step would have to be waited for.
        """
        if self._ranks.size == 1:
            self.stopping = self.stopping or bool(self.caught)
        elif previous is not None:
            self.stopping = self.stopping or previous.stopping.item() > 0

    def settle(self) -> None:
        """At the end of the training, stop where any rank has caught a signal by now."""
        self.stopping = any(self._ranks.sum_values(self.stopping or len(self.caught)))

    def check(self, iteration: int) -> None:
        """Raise Stopped, which tells of the iteration, where all ranks stop."""
        if self.stopping:
            raise Stopped(self.caught, iteration)

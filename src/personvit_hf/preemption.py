"""Leaving a run in order when it is told to stop: clusters send SIGTERM some seconds or minutes before they kill."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 128 + signal.SIGTERM  # 143, what shells and schedulers show for a process that SIGTERM ended


class StopRequest:
    """Whether any process of a run was asked to stop, agreed on by all of them.

    It takes over SIGTERM from when it is made until `close`. Further SIGTERMs change nothing, as a launcher that is
    signalled together with its processes signals them again. Ask once after each optimizer step, on every process.
    The answer of several processes is one step late: their flags are exchanged while the next step is computed, so
    that nothing waits for them.

    Args:
        accelerator: The run's accelerator.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        self._exchange: tuple[torch.Tensor, Any] | None = None

    def close(self) -> None:
        """Gives SIGTERM back."""
        signal.signal(signal.SIGTERM, self._previous)

    def agreed(self) -> bool:
        """Whether all processes are to save and leave now."""
        if self.accelerator.num_processes == 1:
            return self.received
        stop = False
        if self._exchange is not None:
            flag, work = self._exchange
            work.wait()
            stop = bool(flag.item())
        flag = torch.tensor(float(self.received), device=self.accelerator.device)
        self._exchange = flag, torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        return stop

    def leave(self) -> None:
        """Ends the process with `STOPPED_EXIT_CODE`. Call it on every process, when all is saved.

        Raises:
            SystemExit: always.
        """
        logger.warning("Stopped by SIGTERM after saving; the same command with `--resume_from latest` goes on.")
        self.accelerator.end_training()
        self.close()
        raise SystemExit(STOPPED_EXIT_CODE)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def ignore_stop_requests(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: only the process that a loader works for can end it by SIGTERM.

    Whoever signals a whole job then does not take away the batches of the step after which it is saved. Where the
    system doesn't tell who sent a signal (macOS), loaders end, and the step with them.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_parent, daemon=True).start()

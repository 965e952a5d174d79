"""Answers starts that wait (contract §6): credits are held, a price is to be confirmed, or the task has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from comfyui_temporal.contracts.start_answer import Reached, StartAnswer
from comfyui_temporal.contracts.task_store import TaskState


class StartAnswers:
    """The update `wait_until_held`. It is answered at the end at the latest, so it keeps no run open.

    It waits for an asyncio.Event, not a wait condition, for the reason in `Stop.cancel_task`.
    """

    def __init__(self, state: Callable[[], TaskState]) -> None:
        self._state = state
        self._is_held = False
        self._news = asyncio.Event()

    def held(self) -> None:
        """Credits are held, in this run or in one that it continues; or nothing has to be paid."""
        self._is_held = True
        self.tell()

    def tell(self) -> None:
        """Answer those that wait, if there is something to tell."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def given(self) -> StartAnswer:
        """The answer, once there is one."""
        while (reached := self._reached()) is None:
            await self._news.wait()
        return StartAnswer(reached=reached, state=self._state().model_copy(deep=True))

    def _reached(self) -> Reached | None:
        state = self._state()
        if state.status.is_end():
            return Reached.ENDED
        if self._is_held:
            return Reached.HELD
        return Reached.CONFIRMATION if state.confirmation is not None else None

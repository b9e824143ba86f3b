"""Requests that are collected and sent together."""

import asyncio
from collections.abc import Sequence

import pytest

from downpour.cluster.serving.server import batches
from downpour.cluster.serving.server.batches import Answer, Asked, BatchBounds, Batches


def _asked(number: int, size: int = 0) -> Asked:
    return Asked(query=str(number), headers={}, body=bytes(size), left_s=1.0)


def _bounds(max_batch: int = 4, wait_s: float = 60.0, under_way: int = 1) -> BatchBounds:
    return BatchBounds(max_batch=max_batch, batch_wait_s=wait_s, under_way=under_way)


class Replica:
    """Answers each request with its query, when it is let go on."""

    def __init__(self, *, waits: bool = False) -> None:
        self.seen: list[list[int]] = []
        self.goes_on = asyncio.Event()
        if not waits:
            self.goes_on.set()

    async def answer(self, batch: Sequence[Asked]) -> list[Answer]:
        self.seen.append([int(asked.query) for asked in batch])
        await self.goes_on.wait()
        return [Answer(status=200, body=asked.query.encode()) for asked in batch]


def test_each_gets_its_own_answer_and_full_batches_do_not_wait() -> None:
    async def play() -> None:
        replica = Replica()
        together = Batches(replica.answer, _bounds())
        found = await asyncio.gather(*(together.answer(_asked(i)) for i in range(8)))
        assert [answer.body for answer in found] == [b"%d" % i for i in range(8)]
        assert replica.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]

    asyncio.run(play())


def test_one_alone_waits_for_others_so_long() -> None:
    async def play() -> None:
        replica = Replica()
        together = Batches(replica.answer, _bounds(wait_s=0.01))
        assert (await together.answer(_asked(7))).body == b"7"
        assert replica.seen == [[7]]

    asyncio.run(play())


def test_no_more_batches_are_under_way_than_may_be() -> None:
    async def play() -> None:
        replica = Replica(waits=True)
        together = Batches(replica.answer, _bounds(max_batch=2, under_way=2))
        tasks = [asyncio.create_task(together.answer(_asked(i))) for i in range(7)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert replica.seen == [[0, 1], [2, 3]]
        tasks[5].cancel()  # its caller has gone
        replica.goes_on.set()
        await asyncio.wait(tasks)
        assert replica.seen == [[0, 1], [2, 3], [4, 6]]

    asyncio.run(play())


def test_a_call_carries_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        replica = Replica()
        together = Batches(replica.answer, _bounds(wait_s=0.5, under_way=9))
        sizes = (60, 60, 30, 200, 10)
        await asyncio.gather(*(together.answer(_asked(i, s)) for i, s in enumerate(sizes)))
        assert replica.seen == [[0], [1, 2], [3], [4]]

    monkeypatch.setattr(batches, "CALL_BYTES", 100)
    asyncio.run(play())


def test_a_call_that_fails_fails_for_all_of_its_batch_alone() -> None:
    async def play() -> None:
        async def answer(batch: Sequence[Asked]) -> list[Answer]:
            if batch[0].query == "0":
                raise RuntimeError("broken")
            return [Answer(status=200, body=b"") for _ in batch]

        together = Batches(answer, _bounds(max_batch=2))
        asking = (together.answer(_asked(i)) for i in range(4))
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert [isinstance(each, RuntimeError) for each in found] == [True, True, False, False]

    asyncio.run(play())

"""The ranks of several machines meet when their data is ready, ahead of the process group, which waits for minutes only.

A machine with a disk of its own may prepare data for hours after the others have theirs. In the launcher's store each rank
says every other second that it lives, and at last that it is ready or why it cannot be; who waits tells for whom.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..storage.installed import differences, installed
from .runtime import RuntimeSetupError, world_size

_EVERY = 2.0  # seconds between two signs of life
_GONE = 120.0  # seconds without one after which a rank is gone
_COMES = 1800.0  # seconds in which a rank may come for the first time
_TOLD = 10.0  # seconds between two words of a rank that waits
_stores: list[Store] = []  # kept: rank 0 may be the one that serves it, to the process group, too


@contextmanager
def together(say: Callable[[str], None]) -> Generator[None]:
    """Leave the block, which may take as long as it takes on any rank, with all the others; on one machine it does nothing.

    Raises RuntimeSetupError when another rank failed in it, with the cause, or is gone.
    """
    if world_size() == 1 or os.environ.get("LOCAL_WORLD_SIZE") == str(world_size()):
        yield
        return
    try:
        meeting = _Meeting(int(os.environ["RANK"]), world_size())
        with meeting.alive():
            try:
                meeting.compare()
                yield
            except BaseException as error:
                meeting.fail(f"{meeting.name}: {error or repr(error)}")
                raise
            meeting.wait(say)
    except DistError as error:
        raise RuntimeSetupError(
            f"rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} cannot be reached, or is gone; its own log "
            f"says why ({str(error).splitlines()[0]})"
        ) from error


class _Meeting:
    """What a rank writes into the store and reads there of the others."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.began = rank, world, time.monotonic()
        self.name = f"rank {rank} ({socket.gethostname()})"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world,
            rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timedelta(seconds=_COMES),
            wait_for_workers=False,
            multi_tenant=True,
        )
        _stores.append(store)
        self.store = PrefixStore(f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._heard: dict[int, tuple[bytes, float]] = {}

    @contextmanager
    def alive(self) -> Generator[None]:
        """Say so for as long as the block lasts."""
        over = Event()

        def beat() -> None:
            number = 0
            while not over.is_set():
                number += 1
                try:
                    self.store.set(f"beat/{self.rank}", f"{number} {self.name}")
                except DistError:  # the main thread finds the same
                    return
                over.wait(_EVERY)

        thread = Thread(target=beat, name="meeting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def compare(self) -> None:
        """Refuse a machine on which other versions or other code of ours are installed than where rank 0 is.

        Its ranks would train otherwise, or hang in a collective that the others do not enter. Raises RuntimeSetupError.
        """
        if self.rank == 0:
            self.store.set("installed", json.dumps(installed()))
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            wanted = json.loads(self.store.get("installed"))
            if said := differences(installed(), wanted):
                raise RuntimeSetupError(f"not what rank 0 has: {'; '.join(said)}. Install the same on all machines")

    def fail(self, why: str) -> None:
        """Tell all that this run will not be."""
        self.store.set("failed", why[:2000])

    def wait(self, say: Callable[[str], None]) -> None:
        """Be ready, and wait until all are. Raises RuntimeSetupError, DistError."""
        self.store.set(f"ready/{self.rank}", "")
        if self.store.add("ready", 1) == self.world:
            self.store.set("open", "")
        said = began = time.monotonic()
        while not self.store.check(["open"]):
            if self.store.check(["failed"]):
                raise RuntimeSetupError(f"another rank cannot train: {self.store.get('failed').decode()}")
            now = time.monotonic()
            if now - said > _TOLD and (absent := self._absent(now)):
                said = now
                shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")  # noqa: PLR2004
                say(f"waiting for {shown}, still preparing data (waited {now - began:.0f} s)")
            time.sleep(min(1.0, max(0.05, (now - began) / 10)))

    def _absent(self, now: float) -> list[str]:
        """Who is not ready yet; one that gives no sign of life any more ends the meeting."""
        names: list[str] = []
        for rank in range(self.world):
            if self.store.check([f"ready/{rank}"]):
                continue
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            last, since = self._heard.get(rank, (b"", self.began))
            since = now if beat != last else since
            self._heard[rank] = (beat, since)
            names.append(beat.decode().partition(" ")[2] or f"rank {rank}, which has not come yet")
            if now - since > (_GONE if beat else _COMES):
                self.fail(f"{names[-1]}: no sign of life for {now - since:.0f} s; its own log says why")
        return names

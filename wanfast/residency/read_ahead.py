"""Brings blocks into host memory while nothing moves to the device, which works for something else meanwhile."""

import threading
from collections.abc import Sequence

from wanfast.residency.moves import Key
from wanfast.residency.store import HostStore


class ReadAhead:
    """A thread that loads what is copied next, as far as host memory reaches."""

    def __init__(self, store: HostStore, keys: Sequence[Key], slot_bytes: int) -> None:
        """Begin to load.

        Args:
            store: which is this thread's until it is stopped.
            keys: of the blocks, in the order they will be copied.
            slot_bytes: of the largest block.
        """
        self._store = store
        self._keys = list(dict.fromkeys(keys))
        self._slot_bytes = slot_bytes
        self._is_stopped = False
        store.expect(self._keys)
        self._thread = threading.Thread(target=self._work, name="wanfast-residency", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the block under way."""
        self._is_stopped = True
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        for key in self._keys:
            if self._is_stopped:
                return
            if not self._store.is_kept(key):
                if not self._store.can_keep(key, self._slot_bytes, is_copied_again=True):
                    return
                try:
                    self._store.block(key, is_copied_again=True)
                except BaseException:  # told when the block is needed
                    return
            self._store.will_read(key)

"""The next batch on its way to the device while the device works on this one.

Copying on the stream that computes would make every step wait for its own images. Here they are copied on a stream of
their own: out of the workers' memory into pinned memory, which returns their slot to them at once, and from there to
the device. On a CPU there is nothing to copy, and batches come as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data import DataError
from data.stream import Batch, Pass, Stream


class Prefetch:
    """The batches of a stream, with their images on a device.

        batches = Prefetch(stream, device)
        batch = next(batches)      # waits only for what `fetch` has not brought yet
        ...                        # queue work on the device
        batches.fetch()            # meanwhile wait for the next batch and start its copy

    What goes wrong with a batch is raised when that batch is asked for.
    """

    def __init__(self, stream: Stream | Pass, device: torch.device) -> None:
        self._stream, self._device = iter(stream), device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | DataError | None = None
        self._report = stream.report()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._copies is None:
            batch = next(self._stream)
            batch["image"] = batch["image"].to(self._device)
            return batch
        self.fetch()
        found, self._next = self._next, None
        self._report = self._stream.report()
        if found is None:
            raise StopIteration
        if isinstance(found, DataError):
            raise found
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._copies)
        found["image"].record_stream(compute)  # or the allocator would give its memory to the copy after next
        return found

    def fetch(self) -> None:
        """Waits for the next batch, unless it is there, and starts its copy; does nothing on a CPU."""
        if self._copies is None or self._next is not None:
            return
        try:
            batch = next(self._stream)
        except StopIteration:
            return
        except DataError as error:
            self._next = error
            return
        with torch.cuda.stream(self._copies):
            # The allocator of pinned memory keeps a block until the copies out of it are through.
            batch["image"] = batch["image"].pin_memory().to(self._device, non_blocking=True)
        self._next = batch

    def report(self) -> dict[str, object]:
        """The stream's report as of the batch handed out last: what was fetched beyond it is of no step yet."""
        return self._report if self._copies is not None else self._stream.report()

"""The results of one step, from a worker to the scheduler: nobody waits for the device before they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


# By request and head the number of the part and the row in it that are its logits, or why there are none.
Places = dict[str, dict[str, tuple[int, int] | str]]


class StepScores(KVConnectorWorkerMetadata):
    """Logits that heads give in one step of the engine, on their way to the host in one copy.

    To read and to pickle them waits for the copy.

    Args:
        prompts: those that were scored.
        parts: logits `[rows, num_labels]`. The last one is of replies if there are any: `[replies, labels of all heads]`.
        replies: requests whose replies have one more token.
    """

    def __init__(self, prompts: Places, parts: Sequence[torch.Tensor], replies: Sequence[str] = ()):
        self.prompts, self.replies = prompts, replies
        self._shapes = [part.shape for part in parts]
        numbers = torch.cat([part.flatten() for part in parts]) if parts else torch.empty(0)
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)  # in pinned memory
        self._event: torch.Event | None = None
        if numbers.is_cuda:
            self._event = torch.Event(numbers.device)
            self._event.record()

    def _parts(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        parts = self._numbers.split([shape.numel() for shape in self._shapes])
        return [part.view(shape).numpy() for part, shape in zip(parts, self._shapes, strict=True)]

    def read_prompts(self) -> dict[str, dict[str, list[float] | str]]:
        """Return by request and head the logits of the prompt, or why there are none."""
        parts = self._parts()
        return {
            request_id: {
                name: place if isinstance(place, str) else parts[place[0]][place[1]].tolist()
                for name, place in places.items()
            }
            for request_id, places in self.prompts.items()
        }

    def read_replies(self) -> np.ndarray:
        """Return the logits of replies, `[replies, labels of all heads]`."""
        return self._parts()[-1]

    def __getstate__(self):
        self._parts()
        return self.__dict__

    def aggregate(self, other: StepScores) -> StepScores:
        """Return the results of one of two ranks: both have run the heads."""
        return self

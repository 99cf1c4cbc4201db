"""The logits of one step, from a worker to the scheduler, which waits for the device when it reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


# By request and head the logits of a prompt, `[num_labels]`, or why there are none.
PromptLogits = Mapping[str, Mapping[str, torch.Tensor | str]]


class StepScores(KVConnectorWorkerMetadata):
    """Logits of one step of the engine, which one copy moves to the host. Reading and pickling them waits for the copy.

    Args:
        prompts: logits of the prompts that were scored.
        replies: requests whose replies have one more token.
        reply_logits: logits of these replies, `[replies, labels of all heads]`.
    """

    def __init__(self, prompts: PromptLogits, replies: Sequence[str] = (), reply_logits: torch.Tensor | None = None):
        self.replies = replies
        # By request and head the number of logits, or why there are none.
        self._sizes: dict[str, dict[str, int | str]] = {}
        tensors = [] if reply_logits is None else [reply_logits.flatten()]
        self._begin = sum(len(tensor) for tensor in tensors)  # of the prompts' logits
        for request_id, heads in prompts.items():
            sizes = {name: row if isinstance(row, str) else len(row) for name, row in heads.items()}
            self._sizes[request_id] = sizes
            tensors += [row for row in heads.values() if not isinstance(row, str)]
        numbers = torch.cat(tensors) if tensors else torch.empty(0)
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)  # in pinned memory
        self._event: torch.Event | None = None
        if numbers.is_cuda:
            self._event = torch.Event(numbers.device)
            self._event.record()

    def _read(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._numbers.numpy()

    def read_prompts(self) -> dict[str, dict[str, list[float] | str]]:
        """Return the logits of each prompt by head, or why there are none."""
        numbers = iter(self._read()[self._begin :].tolist())
        return {
            request_id: {
                name: size if isinstance(size, str) else list(islice(numbers, size)) for name, size in sizes.items()
            }
            for request_id, sizes in self._sizes.items()
        }

    def read_replies(self) -> np.ndarray:
        """Return the logits of replies, `[replies, labels of all heads]`."""
        return self._read()[: self._begin].reshape(len(self.replies), -1)

    def __getstate__(self):
        self._read()
        return self.__dict__

    def aggregate(self, other: StepScores) -> StepScores:
        """Return the results of one rank: all ranks have run the heads."""
        return self

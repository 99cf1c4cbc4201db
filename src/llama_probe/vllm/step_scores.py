"""The logits of one step, from a worker to the scheduler, which waits for the device when it reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


# By request and head the numbers of a prompt, or why there are none: the logits, `num_labels` of them, and for a head with windows the
# span of each label, first and end, as floats, which are exact up to 2^24 tokens.
PromptScores = Mapping[str, Mapping[str, torch.Tensor | str]]


class StepScores(KVConnectorWorkerMetadata):
    """Logits of one step of the engine, which one copy moves to the host. Reading and pickling them waits for the copy.

    Args:
        prompts: scores of the prompts that were read.
        replies: requests whose replies have one more token.
        reply_logits: logits of these replies, `[replies, labels of all heads]`.
    """

    def __init__(self, prompts: PromptScores, replies: Sequence[str] = (), reply_logits: torch.Tensor | None = None):
        self.replies = replies
        # By request and head how many numbers there are, or why there are none.
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
        """Return the `PromptScores`, with lists of numbers."""
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

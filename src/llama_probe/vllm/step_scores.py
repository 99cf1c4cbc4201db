"""The results of one step, from a worker to the scheduler: nobody waits for the device before they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


PromptLogits = Mapping[
    str, Mapping[str, torch.Tensor | str]
]  # by request and head `[num_labels]`, or why there are none


class StepScores(KVConnectorWorkerMetadata):
    """Logits that heads give in one step of the engine, on their way to the host in one copy.

    To read and to pickle them waits for the copy.

    Args:
        prompts: of the prompts that were scored.
        replies: requests whose replies have one more token.
        reply_logits: of these, `[replies, labels of all heads]`.
    """

    def __init__(self, prompts: PromptLogits, replies: Sequence[str] = (), reply_logits: torch.Tensor | None = None):
        self.replies = replies
        tensors = [logits for heads in prompts.values() for logits in heads.values() if not isinstance(logits, str)]
        # By request and head the number of logits, or why there are none.
        self._prompts = {
            request_id: {name: logits if isinstance(logits, str) else len(logits) for name, logits in heads.items()}
            for request_id, heads in prompts.items()
        }
        if reply_logits is not None:
            tensors.append(reply_logits.flatten())
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
        """Return by request and head the logits of the prompt, or why there are none."""
        numbers = self._read().tolist()
        start = 0
        prompts: dict[str, dict[str, list[float] | str]] = {}
        for request_id, heads in self._prompts.items():
            prompts[request_id] = {}
            for name, size in heads.items():
                if isinstance(size, str):
                    prompts[request_id][name] = size
                else:
                    prompts[request_id][name] = numbers[start : start + size]
                    start += size
        return prompts

    def read_replies(self) -> np.ndarray:
        """Return the logits of replies, `[replies, labels of all heads]`."""
        sizes = [size for heads in self._prompts.values() for size in heads.values() if not isinstance(size, str)]
        return self._read()[sum(sizes) :].reshape(len(self.replies), -1)

    def __getstate__(self):
        self._read()
        return self.__dict__

    def aggregate(self, other: StepScores) -> StepScores:
        """Return the results of one of two ranks: both have run the heads."""
        return self

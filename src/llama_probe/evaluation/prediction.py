"""Outputs of heads for the rows of a data set, from one pass of the backbone or from cached states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset

from ..data.batches import SharedStates, iterate_states
from ..data.disk_states import cached_for
from ..distributed import gather, merge_rows
from ..heads.configuration import ProbeConfig, shared_layers
from ..heads.decision import ProbeOutput, fill_unread, strongest
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows


def predict_logits(probe: ProbeModel, dataset: Dataset) -> torch.Tensor:
    """Return logits `[rows, num_labels]` of a `PromptDataset` or `StateDataset`, in its order; see `predict_together`."""
    return predict_together([probe], dataset)[0]


def predict_together(probes: Sequence[ProbeModel], dataset: Dataset) -> list[torch.Tensor]:
    """Return logits `[rows, num_labels]` of each head, in the order of the data set; see `score_rows`.

    A reply counts by its largest score while it is written, because that score halts the reply; see `strongest`. If the data set
    has no `reply_lengths`, a reply counts by the score of the whole row.
    """
    if not _has_replies(probes[0], dataset):
        return score_rows(probes, dataset, lambda output: [output.logits])
    followed = follow_replies(probes, dataset)
    return [_strongest_of_each(replies, probe.config) for probe, replies in zip(probes, followed, strict=True)]


def predict_rows(
    probe: ProbeModel, dataset: Dataset
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor] | None]:
    """Return the logits of `predict_logits`, novelty `[rows]` if the head tells it, and `follow_replies` of replies."""
    if not _has_replies(probe, dataset):
        logits, *novelty = score_rows([probe], dataset, lambda output: [output.logits, output.novelty])
        return logits, novelty[0] if novelty else None, None
    (followed,) = follow_replies([probe], dataset)
    return _strongest_of_each(followed, probe.config), None, followed


def _has_replies(probe: ProbeModel, dataset: Dataset) -> bool:
    return probe.config.reads_reply and getattr(dataset, "reply_lengths", None) is not None


def _strongest_of_each(replies: list[torch.Tensor], config: ProbeConfig) -> torch.Tensor:
    return torch.stack([strongest(logits, config) for logits in replies])


def follow_replies(probes: Sequence[ProbeModel], dataset: Dataset) -> list[list[torch.Tensor]]:
    """Return the logits of heads after each token of finished replies, as if the LM were writing them.

    In a process group the ranks divide the rows, and each rank gets all results.

    Args:
        probes: heads that read replies. The first is bound to its backbone, unless the data set holds hidden states.
        dataset: a `PromptDataset` or `StateDataset` with `reply_lengths`. Its rows end with the replies.

    Returns:
        For each head and each row logits `[reply_tokens, num_labels]`. The last logits are those of the whole row.
    """
    lengths = torch.tensor(dataset.reply_lengths)
    logits: list[dict[int, torch.Tensor]] = [{} for _ in probes]  # of each head, by row
    for rows, shared, mask, _ in states_for(probes, dataset):
        left = mask.flip(1).cumsum(dim=1).flip(1)  # [B, T]: tokens that count from here on
        is_reply = mask & (left <= lengths[rows][:, None])
        columns = is_reply.any(dim=0).nonzero().flatten()
        for probe, by_row in zip(probes, logits, strict=True):
            with torch.no_grad():
                x = probe.normalize(shared.raw(probe))
                summaries = probe.summaries_at((columns + 1).tolist(), x, mask.to(probe.device))
                followed = torch.stack([probe.score_summaries(part).logits for part in summaries], dim=1)
            followed = followed.float().cpu()  # [B, R, num_labels]
            for place, row in enumerate(rows):
                by_row[row] = followed[place, is_reply[place, columns]]
    replies = []
    for by_row in logits:
        everywhere: dict[int, torch.Tensor] = {}
        for part in gather(by_row):
            everywhere |= part
        replies.append([everywhere[row] for row in range(len(dataset))])
    return replies


def score_rows(
    probes: Sequence[ProbeModel],
    dataset: Dataset,
    tensors_of: Callable[[ProbeOutput], Sequence[torch.Tensor | None]],
    **kwargs,
) -> list[torch.Tensor]:
    """Run heads over a data set, with one pass of the backbone, or one reading of the cached states, for all heads.

    In a process group the ranks divide the rows, and each rank gets all results.

    Args:
        probes: heads that read the same tokens. The first is bound to its backbone, unless the data set holds hidden states.
        tensors_of: returns the tensors `[B, ...]` to keep of a head's output for a batch; a None is left out.
        kwargs: passed to `ProbeModel.score`.

    Returns:
        The kept tensors of the first head, then of the next, `[rows, ...]` on the CPU, in the order of the data set.
    """
    tensors: list[torch.Tensor] = []
    scored: list[int] = []
    for rows, shared, mask, segments in states_for(probes, dataset):
        check_rows(mask, probes[0].config)
        parts: list[torch.Tensor] = []
        for probe in probes:
            with torch.no_grad():
                output = probe.score(shared(probe), mask.to(probe.device), segments=segments, **kwargs)
            output = fill_unread(output, mask.any(dim=1))
            parts += [part for part in tensors_of(output) if part is not None]
        tensors = tensors or [torch.zeros(len(dataset), *part.shape[1:]) for part in parts]
        for whole, part in zip(tensors, parts, strict=True):
            whole[rows] = part.to("cpu", whole.dtype)
        scored += rows
    return [merge_rows(scored, whole) for whole in tensors]


def states_for(
    probes: Sequence[ProbeModel], dataset: Dataset
) -> Iterator[tuple[list[int], SharedStates, torch.Tensor, torch.Tensor | None]]:
    """Yield row numbers, states that the heads read, mask and segments `[B, T]` of this rank's batches; see `iterate_states`."""
    for probe in probes:
        probe.eval()
    cached = cached_for(dataset)
    own_states = dataset[0].get("hidden_states") if cached is None and len(dataset) else None
    lm = None
    if cached is not None:
        layers = cached.layer_indices
    elif (
        own_states is not None
    ):  # a user's data set, with the states of all layers or of the layers that the heads read
        every = range(probes[0].config.num_hidden_layers + 1)
        layers = every if len(own_states) == len(every) else probes[0].layer_indices
    else:
        layers = shared_layers(probe.config for probe in probes)
        lm = probes[0].backbone
    for rows, states, mask, segments in iterate_states(dataset, probes[0].config, lm, layers):
        yield rows, SharedStates(states, layers), mask, segments

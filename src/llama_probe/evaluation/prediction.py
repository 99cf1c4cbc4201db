"""Outputs of heads for the rows of a data set, from one pass of the backbone or from cached states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset

from ..data.cached_states import SharedStates, cached_for, iterate_states
from ..distributed import gather, merge_rows
from ..heads.configuration import shared_layers
from ..heads.decision import ProbeOutput, fill_unread, strongest
from ..heads.probe import ProbeModel
from ..heads.scope import check_rows


def predict_logits(probe: ProbeModel, dataset: Dataset) -> torch.Tensor:
    """Return logits `[rows, num_labels]` of a `PromptDataset` or `StateDataset`, in its order; see `predict_together`."""
    return predict_together([probe], dataset)[0]


def predict_together(probes: Sequence[ProbeModel], dataset: Dataset) -> list[torch.Tensor]:
    """Return logits `[rows, num_labels]` of each head, in the order of the data set; see `score_rows`.

    A reply counts by its largest score while it is written, because that is where it is halted; see `strongest`. Data sets without
    `reply_lengths` have the scores of whole rows.
    """
    if not _has_replies(probes[0], dataset):
        return score_rows(probes, dataset, lambda output: [output.logits])
    by_head = zip(probes, follow_replies(probes, dataset), strict=True)
    return [torch.stack([strongest(logits, probe.config) for logits in followed]) for probe, followed in by_head]


def predict_rows(
    probe: ProbeModel, dataset: Dataset
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor] | None]:
    """Return the logits of `predict_logits`, novelty `[rows]` if the head tells it, and `follow_replies` of replies."""
    if not _has_replies(probe, dataset):
        logits, *novelty = score_rows([probe], dataset, lambda output: [output.logits, output.novelty])
        return logits, novelty[0] if novelty else None, None
    (followed,) = follow_replies([probe], dataset)
    return torch.stack([strongest(logits, probe.config) for logits in followed]), None, followed


def _has_replies(probe: ProbeModel, dataset: Dataset) -> bool:
    return probe.config.reads_reply and getattr(dataset, "reply_lengths", None) is not None


def follow_replies(probes: Sequence[ProbeModel], dataset: Dataset) -> list[list[torch.Tensor]]:
    """Return the logits of heads after each token of finished replies, as if the LM were writing them.

    Args:
        probes: heads that read replies, the first bound to its backbone unless the data set holds hidden states.
        dataset: a `PromptDataset` or `StateDataset` with `reply_lengths`. Its rows end with the replies.

    Returns:
        For each head and each row logits `[reply_tokens, num_labels]`; the last are those of the whole row. In a process group
        the ranks divide the rows, and each rank gets all results.
    """
    lengths, logits = torch.tensor(dataset.reply_lengths), [{} for _ in probes]
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
            by_row |= {row: followed[i, is_reply[i, columns]] for i, row in enumerate(rows)}
    everywhere = [{row: part for rank in ranks for row, part in rank.items()} for ranks in map(gather, logits)]
    return [[by_row[row] for row in range(len(dataset))] for by_row in everywhere]


def score_rows(
    probes: Sequence[ProbeModel],
    dataset: Dataset,
    tensors_of: Callable[[ProbeOutput], Sequence[torch.Tensor | None]],
    **kwargs,
) -> list[torch.Tensor]:
    """Run heads over a data set with one pass of the backbone, or one reading of the cached states, for all.

    Args:
        probes: heads that read the same tokens, the first bound to their backbone unless the data set holds hidden states.
        tensors_of: returns the tensors `[B, ...]` to keep of a head's output for a batch; None is left out.

    Returns:
        These tensors of each head, `[rows, ...]` on the CPU, in the order of the data set. In a process group the ranks divide
        the rows, and each rank gets all.
    """
    tensors: list[torch.Tensor] = []
    scored: list[int] = []
    for rows, shared, mask, segments in states_for(probes, dataset):
        check_rows(mask, probes[0].config)
        with torch.no_grad():
            outputs = [
                probe.score(shared(probe), mask.to(probe.device), segments=segments, **kwargs) for probe in probes
            ]
        filled = [fill_unread(output, mask.any(dim=1)) for output in outputs]
        parts = [part for output in filled for part in tensors_of(output) if part is not None]
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
    if (cached := cached_for(dataset)) is not None:
        layers, lm = cached.layer_indices, None
    else:
        layers, lm = shared_layers(probe.config for probe in probes), probes[0].backbone
        if len(dataset) and (states := dataset[0].get("hidden_states")) is not None:  # of a data set of the user's
            every = range(probes[0].config.num_hidden_layers + 1)
            layers, lm = every if len(states) == len(every) else probes[0].layer_indices, None
    for rows, states, mask, segments in iterate_states(dataset, probes[0].config, lm, layers):
        yield rows, SharedStates(states, layers), mask, segments

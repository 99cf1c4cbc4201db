"""Heads that learn side by side: one batch of hidden states, a loss a head, and each head as if it were alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..backbone.capture import collect_hidden_states
from ..data.batches import SharedStates
from ..data.disk_states import shared_config
from ..heads.configuration import shared_layers
from ..heads.decision import ProbeOutput
from ..heads.probe import ProbeModel, without_autocast
from ..heads.scope import check_rows, token_mask
from ..heads.segments import number_segments


SINGLE = "head"  # the name of a head that was given without a name


@dataclass
class GroupOutput(ModelOutput):
    """The predictions of several heads for a batch."""

    logits: torch.Tensor | None = None  # [batch, heads, num_labels], of a single head [batch, num_labels]
    by_head: dict[str, ProbeOutput] | None = None  # for the loss; a field, because DDP keeps nothing else


class HeadGroup(nn.Module):
    """Heads of one data set that a `ProbeTrainer` trains together, from one pass of the backbone.

    Dropout draws the same numbers for each head as for a head that is alone.

    Args:
        heads: heads by name, for the same labels and the same tokens; they may read different layers, and be of any type.
            Or a single head, which gets the name `"head"`.

    Attributes:
        is_single: True for a single head, whose logits and metrics go without its name.
    """

    accepts_loss_kwargs = False

    def __init__(self, heads: ProbeModel | Mapping[str, ProbeModel]):
        super().__init__()
        self.is_single = isinstance(heads, ProbeModel)
        by_name = {SINGLE: heads} if isinstance(heads, ProbeModel) else heads
        configs = [head.config for head in by_name.values()]
        self.config = shared_config(configs)
        self.layers = shared_layers(configs)
        self.heads = nn.ModuleDict(by_name)

    @property
    def backbone(self) -> nn.Module | None:
        """The frozen LM of the heads. With the cached states of a recipe, only the head that is chosen has an LM."""
        return next((head.backbone for head in self.heads.values() if head.backbone is not None), None)

    def record(self, **changes) -> None:
        """Write fields into the configs of all heads."""
        for module in (self, *self.heads.values()):
            module.config = module.config.replace(**changes)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        probe_mask: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
        learned_by: torch.Tensor | None = None,
        reply_mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
    ) -> GroupOutput:
        """Score a batch of `collate` with each head.

        Args:
            learned_by (`torch.BoolTensor` of shape `[batch, heads]`, *optional*): the rows that each head learns from, or is
                chosen by: in eval mode the logits of others are not numbers. Defaults to all.
        """
        if hidden_states is None:
            if probe_mask is None:
                probe_mask = token_mask(self.config, input_ids, attention_mask)
                segments = number_segments(self.config, probe_mask)
            mask = probe_mask
            states = torch.stack(collect_hidden_states(self.backbone, self.layers, input_ids, attention_mask))
        else:
            states = hidden_states.transpose(0, 1)
            mask = attention_mask if probe_mask is None else probe_mask
        has_all = len(states) > len(self.layers)
        shared = SharedStates(states, range(self.config.num_hidden_layers + 1) if has_all else self.layers)
        mask = mask.to(next(self.parameters()).device).bool()
        check_rows(mask)
        # One number of the global generator a batch, whatever the number of heads: all heads draw from the same seed.
        seed = int(torch.randint(2**62, ())) if self.training else None
        outputs: dict[str, ProbeOutput] = {}
        for index, (name, head) in enumerate(self.heads.items()):
            weights = row_weights
            if learned_by is not None:
                learned = learned_by[:, index : index + 1].float()  # [B, 1]
                weights = learned if row_weights is None else row_weights * learned
            # The CPU's generator alone: each batch seeds that of an accelerator anew.
            with without_autocast(mask.device), torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                outputs[name] = head.score(shared(head), mask, segments=segments, reply_mask=reply_mask)
            outputs[name].row_weights = weights
        logits = torch.stack([output.logits for output in outputs.values()], dim=1)
        if learned_by is not None and not self.training:
            logits = logits.masked_fill(~learned_by[..., None].to(logits.device), torch.nan)
        return GroupOutput(logits=logits[:, 0] if self.is_single else logits, by_head=outputs)

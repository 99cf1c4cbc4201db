"""Cases that several test modules share: head types, ways to generate, scores of rows, and a guard of replies."""

import numpy as np
import torch
from conftest import make_lm, make_probe

from llama_probe import ProbeConfig, ProbeModel
from llama_probe.heads import probe_types


MULTI = {"problem_type": "multi_label_classification"}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}
HEAD_TYPES = {head_type: {"probe_type": head_type} for head_type in probe_types()}
# With the options that change what a head type keeps of a prompt.
FORMS = {
    **HEAD_TYPES,
    "max": {"probe_type": "pooling", "pool": "max"},
    "multimax": {"probe_type": "multimax", "options": {"num_maxima": 3, "num_members": 2}},
    "mha-max": {"probe_type": "mha", "pool": "max", "layers": [0, 2, 4]},
}
# Ways in which heads can follow replies, and all.
FOLLOWED_MODES = {
    "greedy": {},
    "sampling x return sequences": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
}
MODES = {
    **FOLLOWED_MODES,
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams x return sequences": {"num_beams": 4, "num_return_sequences": 2},
}


# Turns that one token opens.
USER, TOOL, REPLY = 5, 6, 7
MARKERS = {role: {"ids": [token], "skip": 0} for role, token in (("user", USER), ("tool", TOOL), ("assistant", REPLY))}


def with_backbone(**changes) -> ProbeModel:
    """A head on the tiny model."""
    probe = make_probe(**changes)
    probe.set_backbone(make_lm())
    return probe


def guard(labels=("fine", "awful"), **changes):
    """A head that reads replies and flags its last label."""
    changes |= {"id2label": dict(enumerate(labels)), "flagged": [labels[-1]]}
    return make_probe(token_scope="response", probe_type="gate", **changes)


def flag(*tokens, rows=(0,)):
    """A callback that ends the reply of these rows at a token."""

    def callback(scores):
        return [row in rows and scores.step in tokens for row in range(len(scores.counted))]

    return callback


def make_scores(
    config: ProbeConfig, rows: int = 60, seed: int = 0, steps: int = 50
) -> tuple[torch.Tensor, np.ndarray]:
    """Return logits on a coarse grid, so that some are equal, and labels that correlate with them."""
    rng = np.random.default_rng(seed)
    shape = (rows, config.num_labels)
    if config.problem_type == "regression":
        return torch.from_numpy(rng.normal(size=shape)).float(), rng.integers(0, 3, shape).astype(float)
    if config.problem_type == "multi_label_classification":
        labels = target = (rng.random(shape) < 0.3).astype(float)
    else:
        labels = rng.integers(0, config.num_labels, rows)
        target = np.eye(config.num_labels)[labels]
    return torch.from_numpy(rng.integers(0, steps, shape) / steps * 4 - 2 + target).float(), labels

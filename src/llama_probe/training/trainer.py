"""`ProbeTrainer`: the Trainer of transformers for heads, from labelled rows or a recipe to a head that can be saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distributed import meet
from .head_trainer import HeadTrainer
from .prepared import PreparedRun
from .recipe import Recipe
from .recipe_trainer import RecipeTrainer


class ProbeTrainer(HeadTrainer):
    """A `Trainer` for heads on a frozen backbone. Takes texts, chats or token ids with labels.

    After training it fits temperature and threshold on the rows of `eval_dataset`, and novelty on all rows. `save_model` and
    `push_to_hub` then write a head with its results and its card. Under `torchrun` it trains with DDP, which synchronises
    only the head. The frozen backbone may be sharded with FSDP: apply `fully_shard` to each layer and to the decoder
    (`lm.model`), which is what heads run.

    Several heads of one data set learn side by side, from one pass of the backbone: each as if it were alone, with its best
    epoch. `from_recipe` makes all of this from a recipe.

    Example:
        >>> trainer = ProbeTrainer(backbone="HuggingFaceTB/SmolLM2-135M-Instruct", train_dataset=[("Well done!", "good"), ...])
        >>> trainer.train()
        >>> trainer.save_model("mood")

    Args:
        model: a head, new or from `ProbeModel.from_pretrained`, or heads by name; with a backbone if the rows are texts or token
            ids. Heads by name read the same tokens; their layers, types and seeds may differ.
        args: defaults to `ProbeTrainingArguments()`.
        data_collator, compute_loss_func, compute_metrics: default to `collate`, the `ProbeLoss` that `args` describe, and
            the metrics of the head's problem type. `compute_metrics` adds to these. With it the loss chooses a single head by
            default; of several heads it gets predictions `[rows, heads, num_labels]`.
        train_dataset, eval_dataset: a `datasets.Dataset`, a DataFrame, a dict of columns or a list of rows, with the columns
            of `rows_in_memory`, whose states are computed here unless `args.cache_states` is False; or a `PromptDataset` or
            `StateDataset`, which is taken as it is. Of several `eval_dataset` by name the first, or the one that
            `metric_for_best_model` names, chooses epochs and thresholds; the others are measured.
        processing_class: the backbone's tokenizer, for texts. `backbone` as a name brings its own.
        model_init: refused, as `hyperparameter_search` is: the `search` of a recipe tries configurations.
        callbacks, kwargs: as in `Trainer`.
        backbone: instead of `model`: a folder, a Hub id, `"demo"`, or a loaded LM. The head is then made for the labels.
        probe_config: fields of `ProbeConfig` of the head for `backbone`. Missing fields are chosen.
        column_mapping: names from the rows to the columns above, such as `{"review": "text"}`.
        head_args: head -> the training arguments of it that differ: `learning_rate`, `weight_decay`, `label_smoothing_factor`,
            `focal_gamma`, `class_weights`.
        left_out: head -> numbers of the training rows that it does not learn from.

    Attributes:
        heads: the heads by name; a single one has the name `"head"`.
        progress: how each head has done in the evaluations, by name.
        results: contents of `results.json` after training; of several heads a dict by name.
        logits (`[rows, num_labels]`): logits of the evaluation rows after training; of several heads a dict by name.

    Raises:
        ProbeError: the rows, the head and the arguments do not fit each other.
    """

    @classmethod
    def from_recipe(
        cls,
        recipe: str | os.PathLike | Mapping[str, object] | Recipe,
        *,
        backbone: str | os.PathLike | PreTrainedModel,
        output_dir: str | os.PathLike = "head",
        settings: Sequence[str] = (),
        data_dir: str | os.PathLike | None = None,
        licence: str | None = None,
        dtype: str = "auto",
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> RecipeTrainer:
        """Prepare a recipe: read its rows, load the backbone, compute the hidden states, and make the heads.

        `train()` then trains and calibrates, writes the head into `output_dir`, and measures it. `save_model()` writes the head
        with its recipe, results and card, and deletes the states and checkpoints in `output_dir`.

        Example:
            >>> trainer = ProbeTrainer.from_recipe("guard", backbone="Qwen/Qwen2.5-1.5B-Instruct", output_dir="my-guard")
            >>> trainer.train()
            >>> trainer.save_model()

        Args:
            recipe: name of a recipe of the package, a YAML file, a head folder, or its values; see `Recipe`.
            backbone: `"demo"`, a folder, a Hub id, or a loaded LM (with `processing_class`, its tokenizer).
            settings: fields to change, such as `"training.learning_rate=1e-3"`.
            data_dir: folder of local copies of the sources: `DIR/NAME/SPLIT.jsonl.gz`.
            licence: `"commercial"` leaves out the rows whose licence forbids commercial use, or is not known.
            dtype: of the backbone's weights.
            kwargs: of `ProbeTrainer`.

        Raises:
            ProbeError: a field of the recipe is wrong, a source cannot be read, or the disk is too small. Raised before the
                backbone is loaded.
        """
        meet()
        if licence is not None:
            settings = [*settings, f"licence={licence}"]
        backbone = backbone if isinstance(backbone, nn.Module) else str(backbone)
        loaded = Recipe.load(recipe, settings)
        run = PreparedRun(loaded, Path(output_dir).expanduser(), backbone, processing_class, data_dir, dtype)
        return RecipeTrainer(run.prepare(), **kwargs)

"""`/v1/moderations` of OpenAI, `/classify` of vLLM, and LiteLLM's guardrail API: labels of texts, without a reply.

A request becomes a request for completions without a token, which vLLM's server checks and answers. The response is made of
the scores.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from transformers import PreTrainedTokenizerBase

from ..data.prompts import PromptFormat, exchange, is_text
from ..errors import ProbeError
from ..files import JSON
from ..heads.configuration import ProbeConfig
from ..serving.passages import locate
from ..serving.texts import format_to_score, heads_by_format
from .settings import ProbeSettings


COMPLETIONS = "/v1/completions"


Formats = Callable[[str], PromptFormat]  # from a head's name


def prompt_formats(configs: Mapping[str, ProbeConfig], tokenizer: PreTrainedTokenizerBase) -> Formats:
    """Return a function from a head's name to the format in which that head reads texts."""
    tokenizer = copy.deepcopy(tokenizer)  # the server's own may be at work in another thread
    return functools.cache(lambda name: format_to_score(configs[name], tokenizer))


class LabelRequest(ABC):
    """A request for labels alone.

    Attributes:
        is_judged: the response depends on flags, and so on a judge.
        have_replies: the inputs are chats that end with a reply, and heads score the reply.
        prompt_params: `kv_transfer_params` of each prompt: the heads that read it, and where its reply begins.
        locators: of each prompt, a function from the spans of labels to passages of its text; see `serving.passages.locate`.
    """

    def __init__(self, settings: ProbeSettings, query: Mapping[str, str]):
        self.settings = settings
        self.query = query
        self.is_judged = True
        self.have_replies = False
        self.prompt_params: list[JSON] = []
        self.locators: list[Callable[[Mapping[str, Sequence[int]]], list[JSON]] | None] = []

    @abstractmethod
    def read(self, body: JSON) -> tuple[list[str], list[Any]]:
        """Return the names of the heads that score the inputs, and the inputs: texts, chats or token ids."""

    @abstractmethod
    def body(self, by_head: Mapping[str, list[JSON]], completion: JSON) -> JSON:
        """Return the body of the response, for the results of each head, one an input."""

    def completion(self, body: bytes, formats: Formats, limit: int) -> bytes:
        """Return the request for completions. Raise status 400 for a body that this route does not take.

        Args:
            limit: largest number of tokens of a prompt that the engine reads.
        """
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise ProbeError("the body must be a JSON object")
            heads, inputs = self.read(request)
            if not inputs:
                raise ProbeError("there is no text to label")
            prompts = self._prompts(heads, inputs, formats)
            _check_lengths(prompts, len(inputs), limit)
        except ValueError as error:  # a ProbeError is one, and so is a body that is not JSON
            raise HTTPException(400, str(error)) from None
        completion = {"model": request.get("model"), "prompt": prompts, "max_tokens": 1, "temperature": 0}
        return json.dumps(completion).encode()

    def _prompts(self, heads: Sequence[str], inputs: list[Any], formats: Formats) -> list[list[int]]:
        """Return the token ids of each input, for each format of the heads. Set `prompt_params` and `locators`."""
        prompts: list[list[int]] = []
        for group in heads_by_format({name: self.settings.configs[name] for name in heads}):
            starts: list[int | None] = [None] * len(inputs)
            locators: list[Callable[..., list[JSON]] | None] = [None] * len(inputs)
            if self.have_replies:
                encoded, masks = formats(group[0]).encode_replies(inputs)
                starts = [len(mask) - sum(mask) for mask in masks]
            else:
                encoded = inputs
                if not all(map(_is_ids, inputs)):
                    encoded = formats(group[0]).encode(inputs)
                    texts = zip(inputs, encoded, strict=True)
                    locators = [functools.partial(locate, formats(group[0]), text, ids) for text, ids in texts]
            self.locators += locators
            self.prompt_params += [{"probes": group, "reply": False, "reply_start": start} for start in starts]
            prompts += encoded
        return prompts

    def response(self, completion: JSON, prompts: Sequence[JSON]) -> tuple[int, JSON]:
        """Return status and body, for the completion and the engine's result of each prompt."""
        by_head: dict[str, list[JSON]] = {}
        for params, prompt, find in zip(self.prompt_params, prompts, self.locators, strict=True):
            for name in params["probes"]:
                results, result = by_head.setdefault(name, []), prompt["probes"][name]
                if "error" in result:  # an input without a score must not pass for harmless
                    message = f"input {len(results)} has no score of {name}: {result['error']}"
                    return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
                if result.get("span") and find is not None:
                    result = {**result, "passages": find(result["span"])}
                results.append(result)
        return 200, self.body(by_head, completion)


class Moderations(LabelRequest):
    """OpenAI's moderations. A category is `HEAD/LABEL`, for each label that can be flagged; see `ProbeSettings.flags`.

    Where a head with windows flags a text, `category_passages` says where; see `serving.passages.locate`.
    """

    def read(self, body):
        return self.flagging(), _moderated(body.get("input"))

    def flagging(self) -> list[str]:
        """Choose the rules that flag the inputs. Return the names of their heads."""
        are_replies = self.have_replies
        self.flags = [
            rule
            for rule in self.settings.flags
            if (rule.config.reads_reply if are_replies else rule.config.token_scope != "response")
        ]
        if not self.flags:
            raise ProbeError("no head here flags a label of such inputs: halt_on must name one")
        return list(dict.fromkeys(rule.head for rule in self.flags))

    def body(self, by_head, completion):
        results = []
        for row in range(len(next(iter(by_head.values())))):
            categories: dict[str, bool] = {}
            scores: dict[str, float] = {}
            passages: JSON = {}
            for rule in self.flags:
                label, result = rule.config.id2label[rule.index], by_head[rule.head][row]
                category = f"{rule.head}/{label}"
                categories[category] = label in result["flagged"]
                # Where scores are hidden, the score is 1 for a flagged label and 0 otherwise.
                score = result.get("scores", {}).get(label, result.get("score"))
                scores[category] = float(categories[category]) if score is None else score
                found = [passage for passage in result.get("passages", ()) if passage["label"] == label]
                if categories[category] and found:
                    passages[category] = {name: value for name, value in found[0].items() if name != "label"}
            results.append({
                "flagged": any(categories.values()),
                "categories": categories,
                "category_scores": scores,
                "category_applied_input_types": {category: ["text"] for category in categories},
                **({"category_passages": passages} if passages else {}),
            })  # fmt: skip
        name = completion["id"].removeprefix("cmpl-")
        return {"id": f"modr-{name}", "model": completion["model"], "results": results}


class Guardrail(Moderations):
    """LiteLLM's Generic Guardrail API, which blocks what `Moderations` flags.

    With `input_type` "request" the messages are one chat, or without messages each text is a chat of its own. With "response" each
    text is a whole reply to the chat.
    """

    def read(self, body):
        body["model"] = None  # the gateway sends the name of another model
        input_type, texts = body.get("input_type"), body.get("texts") or []
        chat = _chat(body.get("structured_messages"))
        if input_type not in ("request", "response"):
            raise ProbeError(f"input_type is {input_type!r}; it must be request or response")
        self.have_replies = input_type == "response"
        self.is_judged = not self.have_replies
        if not self.have_replies:
            return self.flagging(), [chat] if chat else texts
        if not chat:
            raise ProbeError("a response must have structured_messages")
        return self.flagging(), [exchange(chat, text) for text in texts]

    def body(self, by_head, completion):
        moderations = super().body(by_head, completion)["results"]
        flagged = [name for result in moderations for name, is_flagged in result["categories"].items() if is_flagged]
        if not flagged:
            return {"action": "NONE"}
        return {"action": "BLOCKED", "blocked_reason": ", ".join(dict.fromkeys(flagged))}


class Classification(LabelRequest):
    """vLLM's classification, by the head that `probe` names in the body or the URL."""

    def read(self, body):
        self.is_judged = False
        configs = self.settings.configs.items()
        heads = [name for name, config in configs if config.token_scope != "response"]
        head = body.get("probe", self.query.get("probe", heads[0] if len(heads) == 1 else None))
        if head not in heads:
            raise ProbeError(f"probe is {head!r}; it must be one of: {', '.join(heads)}")
        if "messages" in body:
            return [head], [_chat(body["messages"])]
        value = body.get("input")
        return [head], value if isinstance(value, list) and not _is_ids(value) else [value]

    def body(self, by_head, completion):
        ((head, rows),) = by_head.items()
        config = self.settings.configs[head]
        data = []
        for index, row in enumerate(rows):
            label, values = _classified(row, config)
            data.append({"index": index, "label": label, "probs": values, "num_classes": config.num_labels})
        tokens = completion["usage"]["prompt_tokens"]
        return {
            "id": f"classify-{completion['id'].removeprefix('cmpl-')}",
            "object": "list",
            "created": int(time.time()),
            "model": completion["model"],
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }


LABEL_ROUTES: dict[str, type[LabelRequest]] = {
    "/v1/moderations": Moderations,
    "/classify": Classification,
    "/beta/litellm_basic_guardrail_api": Guardrail,
}


def _chat(messages: object) -> Any:
    """Return messages of OpenAI's API as chat templates take them, with content as text and arguments of tools as objects."""
    if isinstance(messages, list) and is_text(messages):
        for message in messages:
            content, calls = message.get("content"), message.get("tool_calls")
            if isinstance(content, list):
                message["content"] = "\n".join(_texts(content))
            for call in calls if isinstance(calls, list) else ():
                with contextlib.suppress(KeyError, TypeError, ValueError):  # a template may take them as they are
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
    return messages


def _moderated(value: object) -> list[Any]:
    """Return the texts of an `input`. Content parts are one text: OpenAI's API has one result for them."""
    inputs = value if isinstance(value, list) else [value]
    texts = _texts(inputs)
    return ["\n".join(texts)] if texts and len(texts) == len(inputs) else inputs


def _texts(parts: list[object]) -> list[str]:
    """Return the texts among content parts."""
    texts = (part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text")
    return [text for text in texts if isinstance(text, str)]


def _classified(result: JSON, config: ProbeConfig) -> tuple[str | None, list[float]]:
    """Return the label, and a number for each label: its probability, its value, or 0 and 1 if scores are hidden."""
    label = result.get("label")
    labels = label if isinstance(label, list) else [] if label is None else [label]
    if "scores" in result:
        scores = result["scores"]
    elif config.problem_type == "regression":
        scores = {name: result[name] for name in ("score",) if name in result}
    else:
        scores = {name: float(name in labels) for name in config.id2label.values()}
    return max(labels, key=scores.get, default=None), list(scores.values())


def _check_lengths(prompts: list[list[int]], inputs: int, limit: int) -> None:
    """Raise `ProbeError` if a prompt is longer than the limit. Each format has one prompt for each of the inputs, in order."""
    for number, ids in enumerate(prompts):
        if len(ids) > limit:
            mend = "shorten it, or serve with a larger --max-model-len"
            raise ProbeError(f"input {number % inputs} has {len(ids)} tokens, and this server reads {limit}: {mend}")


def _is_ids(value: object) -> bool:
    # Not isinstance: True is an int.
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)

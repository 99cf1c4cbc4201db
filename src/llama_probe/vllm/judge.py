"""A judge in the server: an HTTP guard decides on prompts of which a head is unsure, while the engine already decodes."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

import httpx
import torch
from transformers import PreTrainedTokenizerBase
from vllm import RequestOutput, SamplingParams
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from ..errors import ProbeError
from ..files import JSON
from ..heads.scope import token_mask
from ..serving.texts import texts_read
from .counters import JUDGED
from .halting_words import CHAT, GUARDRAIL, MODERATIONS, judge_path
from .payloads import HALTED, Decisions, prompt_halt
from .settings import ProbeSettings


logger = init_logger(f"vllm.{__name__}")

KEY_VARIABLE = "LLAMA_PROBE_JUDGE_KEY"
_LONGEST = 1 << 16  # bytes of an answer that are read; guards answer with hundreds
_IDLE = 2.0  # seconds that a connection is kept: servers close idle ones, uvicorn after five
_WORD = re.compile(r"\W*(?:safety:\s*)?(\w+)")  # Qwen3Guard writes "Safety: Unsafe"
# What the words of guards mean: true halts.
_WORDS = {"safe": False, "no": False, "unsafe": True, "yes": True}
_ACTIONS = {"NONE": False, "BLOCKED": True, "GUARDRAIL_INTERVENED": True}


@dataclass
class Judge:
    """Ask an HTTP guard about the prompts whose score lies in the band of a head.

    The path of the URL tells the protocol: OpenAI's moderations; a chat with a guard model, whose answer begins with safe or no,
    unsafe or yes; or LiteLLM's guardrail API. The guard gets the text that the head reads, once for each text of a request. If the
    guard gives no answer within `timeout` seconds, `fails` decides: "closed" halts the prompt, "open" lets it pass.
    """

    settings: ProbeSettings
    tokenizer: PreTrainedTokenizerBase
    url: str
    model: str | None = None
    timeout: float = 5.0
    fails: str = "closed"

    def __post_init__(self) -> None:
        self._path = judge_path(self.url)
        self._client = httpx.AsyncClient(timeout=self.timeout, limits=httpx.Limits(keepalive_expiry=_IDLE))

    def in_parts(self, params: SamplingParams) -> SamplingParams:
        """Return parameters with which a whole reply comes in two outputs: the judge is asked after the first."""
        if params.output_kind is not RequestOutputKind.FINAL_ONLY:
            return params
        params = copy.copy(params)
        params.output_kind, params.stream_interval = RequestOutputKind.DELTA, 1 << 30
        return params

    async def watch(
        self, outputs: AsyncGenerator[RequestOutput, None], params: SamplingParams, decisions: Decisions
    ) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of an engine's request if the judge lets its prompt pass; else one output that ends all its replies.

        vLLM joins the outputs that come while the judge is asked. A halted request is aborted, and so is one whose client is gone.
        `params` are those of the server, before `in_parts`. `decisions` are those about texts of the same HTTP request.
        """
        answers: dict[str, str] | None = None
        last: RequestOutput | None = None
        async with aclosing(outputs):
            async for output in outputs:
                result = output.kv_transfer_params
                if result and result.get("unsure"):
                    if answers is None:
                        answers = await self._decide(result["unsure"], output.prompt_token_ids, decisions)
                    output.kv_transfer_params = result = self._judged(result, answers)
                    if halted := prompt_halt(result):
                        last = _ended(output, params.n, halted["head"])
                        break
                if params.output_kind is not RequestOutputKind.FINAL_ONLY:
                    yield output
                elif last is None:
                    last = output
                else:
                    last.add(output, aggregate=True)
        if last is not None:
            last.outputs.sort(key=lambda reply: reply.index)
            yield last

    async def ask(self, text: str) -> bool | None:
        """Return True if the judge halts a text, False if it lets the text pass, `None` if its answer cannot be read."""
        questions = {
            MODERATIONS: {"input": text},
            CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0},
            GUARDRAIL: {"input_type": "request", "texts": [text]},
        }
        body = questions[self._path] | ({"model": self.model} if self.model else {})
        headers = {"Accept-Encoding": "identity"}
        if key := os.environ.get(KEY_VARIABLE, "").strip():
            headers |= {"x-api-key": key} if self._path == GUARDRAIL else {"Authorization": f"Bearer {key}"}
        question, answer = self._client.stream("POST", self.url, json=body, headers=headers), bytearray()
        try:
            async with asyncio.timeout(self.timeout), question as response:
                response.raise_for_status()
                async for part in response.aiter_raw():
                    answer += part
                    if len(answer) > _LONGEST:
                        raise ProbeError("the answer is too long")
            return self._read(json.loads(answer))
        except Exception as error:  # whatever went wrong, there is no answer
            # The text of an error may hold the key.
            logger.warning("The judge gives no answer: %s", type(error).__name__)
            return None

    def _read(self, answer: JSON) -> bool:
        """Return True if an answer halts. An answer that cannot be read raises any error."""
        if self._path == GUARDRAIL:
            return _ACTIONS[answer["action"]]
        if self._path == MODERATIONS:
            (result,) = answer["results"]
            if not isinstance(result["flagged"], bool):
                raise ProbeError("flagged must be true or false")
            return result["flagged"]
        (choice,) = answer["choices"]
        # The guard model may have a guard of its own, which halted the text.
        return choice["finish_reason"] == HALTED or _WORDS[_WORD.match(choice["message"]["content"].lower())[1]]

    async def _decide(self, unsure: list[JSON], ids: list[int], decisions: Decisions) -> dict[str, str]:
        """Return "halted", "passed" or "failed" for each head that is unsure about a prompt of these token ids."""
        words = {True: "halted", False: "passed", None: "failed"}
        answers: dict[str, str] = {}
        # Ask one after the other. If the client is gone, a separate task would be cut off while it closes its connection.
        for head in dict.fromkeys(halt["head"] for halt in unsure):
            text = self._text(head, ids)
            if text not in decisions:
                decisions[text] = asyncio.get_running_loop().create_future()
                decisions[text].set_result(await self.ask(text))
            answers[head] = words[await decisions[text]]
            JUDGED.labels(head, answers[head]).inc()
        return answers

    def _text(self, head: str, ids: list[int]) -> str:
        config, prompt = self.settings.configs[head], torch.tensor([ids])
        return texts_read(config, prompt, token_mask(config, prompt, None), self.tokenizer)[0]

    def _judged(self, result: JSON, answers: Mapping[str, str]) -> JSON:
        """Return the engine's result of a prompt with the decisions of the judge in it."""
        probes = dict(result["probes"])
        halts: list[JSON] = []
        for halt in result["unsure"]:
            head, label = halt["head"], halt["label"]
            is_halted = answers[head] == "halted" or (answers[head] == "failed" and self.fails == "closed")
            flagged = [other for other in probes[head]["flagged"] if other != label]
            if is_halted:
                flagged.append(label)
                halts.append(halt)
            probes[head] = {**probes[head], "flagged": flagged}
        others = {name: value for name, value in result.items() if name != "unsure"}
        halted = halts[0] if halts else result["halted"]  # the halt of a prompt comes before that of a reply
        return {**others, "probes": probes, "halted": halted, "judged": dict(answers)}


def _ended(output: RequestOutput, copies: int, head: str) -> RequestOutput:
    """Return the first output of a request as its last one, without a token."""
    first = output.outputs[0]
    nothing = {"text": "", "token_ids": [], "logprobs": None if first.logprobs is None else first.logprobs[:0]}
    ends = {"finish_reason": "stop", "stop_reason": head}
    output.outputs = [replace(first, index=index, **nothing, **ends) for index in range(copies)]
    output.finished = True
    return output

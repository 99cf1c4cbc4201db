"""The demo backbone and its bundled heads, served and asked as a user would."""

import shlex

import openai
import pytest
import torch
from http_server import serving
from transformers import AutoTokenizer

from llama_probe import LlamaForProbedGeneration
from llama_probe.backbone.loading import demo_backbone
from llama_probe.cli.demo import HEADS, PROMPTS


@pytest.mark.slow
def test_the_demo_over_http(tmp_path):
    folder = demo_backbone()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForProbedGeneration.from_pretrained(folder, probe=list(HEADS), dtype=torch.float32)
    options = """--dtype float32 --enforce-eager --max-model-len 512 --halt-on 'safety={"threshold": 0.5}'"""
    arguments = ["demo", *(word for head in HEADS for word in ("--probe", head)), *shlex.split(options)]
    arguments += ["--served-model-name", "demo"]
    halted = 0
    with (
        serving(arguments, tmp_path / "log") as url,
        openai.OpenAI(base_url=url, api_key="none", timeout=250) as client,
    ):
        for text in PROMPTS:
            chat = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            flagged = float(expected.probe_probabilities["safety"][0, 1]) >= 0.5
            response = client.chat.completions.create(model="demo", messages=chat, max_tokens=8, temperature=0.0)
            said = response.kv_transfer_params
            for name in HEADS:
                logits = torch.tensor(said["probes"][name]["logits"])
                torch.testing.assert_close(logits, expected.probe_logits[name][0], rtol=0, atol=1e-3)
                assert said["probes"][name]["label"] == expected.probe_labels[name][0]
            assert (said["halted"] is not None) == flagged
            halted += flagged
            new = expected.sequences[0, inputs["input_ids"].shape[1] :]
            reply = "" if flagged else tokenizer.decode(new, skip_special_tokens=True)
            assert (response.choices[0].message.content or "").strip() == reply.strip()
    assert 0 < halted < len(PROMPTS)

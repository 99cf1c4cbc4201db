"""Chat templates of well-known families, as small as they can be, and tokenizers that merge white space as theirs do."""

import string
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _turns(opening, closing, generation, trim=False, head=""):
    content = "message['content'] | trim" if trim else "message['content']"
    return (
        f"{head}{{% for message in messages %}}{opening}{{{{ {content} }}}}{closing}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{generation}{{% endif %}}"
    )


_ROLE = "{{ message['role'] }}"
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_ALTERNATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}</s>"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "<bos>" + _ALTERNATE + "{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ message['content'] }}\n</tool_response><|im_end|>\n{% elif message['tool_calls'] %}<|im_start|>assistant\n"
    "<tool_call>\n{{ message['tool_calls'][0]['function'] | tojson }}\n</tool_call><|im_end|>\n{% else %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
_GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2026-01-01<|end|>{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'user' %}<|start|>user<|message|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'tool' %}<|start|>functions.{{ message['name'] }} to=assistant<|channel|>commentary<|message|>"
    "{{ message['content'] | tojson }}<|end|>{% elif message['tool_calls'] %}<|start|>assistant to=functions.look"
    "<|channel|>commentary json<|message|>{{ message['tool_calls'][0]['function']['arguments'] | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ message['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<｜User｜>{{ message['content'] }}{% elif message['role'] == 'assistant' %}"
    "<｜Assistant｜>{{ message['content'] }}<｜end▁of▁sentence｜>{% else %}{{ raise_exception('unknown role') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_GRANITE = _turns(
    f"<|start_of_role|>{_ROLE}<|end_of_role|>",
    "<|end_of_text|>\n",
    "<|start_of_role|>assistant<|end_of_role|>",
    head="{% if messages[0]['role'] != 'system' %}<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n"
    '{% endif %}{% for document in documents or [] %}<|start_of_role|>document {"document_id": "{{ document[\'doc_id\'] }}"}'
    "<|end_of_role|>\n{{ document['text'] }}<|end_of_text|>\n{% endfor %}",
)
_CHATML = _turns(f"<|im_start|>{_ROLE}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_LLAMA3 = _turns(_HEADER.format(_ROLE), "<|eot_id|>", _HEADER.format("assistant"), trim=True, head="<|begin_of_text|>")
_OLMO_END = "{{ '<|endoftext|>\n' if message['role'] == 'assistant' else '\n' }}"
_OLMO = _turns(f"<|{_ROLE}|>\n", _OLMO_END, "<|assistant|>\n", head="<|endoftext|>")  # its role markers are text
# By family: template, special tokens, and how the tokenizer splits texts.
FAMILIES = {
    "chatml": (_CHATML, ["<|im_start|>", "<|im_end|>"], "gpt2"),
    "llama3": (_LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama3"),
    "gemma": (_GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "gpt2"),
    "mistral": (_MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "metaspace"),
    "qwen": (_QWEN, ["<|im_start|>", "<|im_end|>"], "llama3"),
    "gpt-oss": (_GPT_OSS, ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>"], "llama3"),
    "granite": (_GRANITE, ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], "llama3"),
    "olmo": (_OLMO, ["<|endoftext|>"], "llama3"),
    "deepseek": (
        _DEEPSEEK,
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
        "llama3",
    ),
}
NO_MARKERS = {
    "contents": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "lines": "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}",
}
_TEXT = [
    "system user assistant tool developer functions look Instructions model You help are the a of " * 20,
    "Be kind to users. How do I bake bread? Mix flour, water and salt: then wait 12 hours. Yes. No! " * 20,
    *(end.join(["word", "a:", "|>", "b"] * 3) for end in ("\n", "\n\n", "\n\n\n", " ", "    ", "\t", "\r\n") * 20),
]


@cache
def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    template, special, split = FAMILIES.get(family) or (NO_MARKERS[family], [], "gpt2")
    tokenizer = Tokenizer(models.BPE())
    if split == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet, special = [*string.printable, "é", "\u4f60"], [*special, "<unk>"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if split == "llama3":
            by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            parts = [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), by_bytes]
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    values = {"special_tokens": special, "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, **values)
    tokenizer.train_from_iterator(_TEXT * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = template
    return fast

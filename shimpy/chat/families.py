"""Templates for models whose file has none, chosen by architecture and control tokens.

Each is the family's published prompt format, written as Jinja. None writes the start token:
the engine puts it first where the model wants one.
"""

from __future__ import annotations

import msgspec

from shimpy.chat.guard import ControlTokens


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt format; `stop` are the strings at which an answer ends."""

    name: str
    template: str
    stop: tuple[str, ...] = ()


def _tagged(before: str, after: str, prompt: str) -> str:
    """Return a template that writes each message between two texts that may hold `role`."""
    return (
        "{%- for message in messages -%}{%- set role = message['role'] -%}"
        f"{before}{{{{ message['content'] }}}}{after}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}"
    )


def _labelled(user: str, answer: str, prompt: str) -> str:
    """Return a template of labels before each message; `user` and `answer` are expressions."""
    return (
        "{%- for message in messages -%}{%- set content = message['content'] | trim -%}"
        "{%- if message['role'] == 'system' -%}{{ content ~ '\\n\\n' }}"
        f"{{%- elif message['role'] == 'user' -%}}{{{{ {user} }}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{ {answer} }}}}{{%- endif -%}}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{ {prompt} }}}}{{%- endif -%}}"
    )


def _instruct(user: str, end: str, system: str) -> str:
    """Return a template of the [INST] kind, the system's words inside the first turn."""
    return (
        "{%- set ns = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] -%}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{%- set words = ({system}) if ns.system else message['content'] -%}}"
        f"{{%- set ns.system = '' -%}}{user}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ ' ' ~ message['content'] | trim }}}}{end}"
        "{%- endif -%}{%- endfor -%}"
    )


CHATML = Family(
    name="chatml",
    template=_tagged(
        "{{ '<|im_start|>' ~ role ~ '\\n' }}",
        "{{ '<|im_end|>\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}",
    ),
    stop=("<|im_end|>",),
)
LLAMA3 = Family(
    name="llama3",
    template=_tagged(
        "{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}",
        "{{ '<|eot_id|>' }}",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    ),
    stop=("<|eot_id|>",),
)
LLAMA2 = Family(
    name="llama2",
    template=_instruct(
        "{{ '[INST] ' ~ words ~ ' [/INST]' }}",
        "{{ ' ' ~ eos_token ~ bos_token }}",
        "'<<SYS>>\\n' ~ ns.system ~ '\\n<</SYS>>\\n\\n' ~ message['content']",
    ),
)
MISTRAL = Family(
    name="mistral",
    template=_instruct(
        "{{ '[INST] ' ~ words ~ '[/INST]' }}",
        "{{ eos_token }}",
        "ns.system ~ '\\n\\n' ~ message['content']",
    ),
)
# Mistral's first models, in whose vocabulary [INST] is no token.
MISTRAL_V1 = Family(
    name="mistral-v1",
    template=_instruct(
        "{{ '[INST] ' ~ words ~ ' [/INST]' }}",
        "{{ eos_token }}",
        "ns.system ~ '\\n\\n' ~ message['content']",
    ),
)
GEMMA = Family(
    name="gemma",
    template=(
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{{ raise_exception('System role not supported') }}{%- endif -%}"
        + _tagged(
            "{{ '<start_of_turn>' ~ ('model' if role == 'assistant' else role) ~ '\\n' }}",
            "{{ '<end_of_turn>\\n' }}",
            "{{ '<start_of_turn>model\\n' }}",
        )
    ),
    stop=("<end_of_turn>",),
)
PHI3 = Family(
    name="phi3",
    template=_tagged(
        "{{ '<|' ~ role ~ '|>\\n' }}", "{{ '<|end|>\\n' }}", "{{ '<|assistant|>\\n' }}"
    ),
    stop=("<|end|>",),
)
ZEPHYR = Family(
    name="zephyr",
    template=_tagged(
        "{{ '<|' ~ role ~ '|>\\n' }}",
        "{{ eos_token ~ '\\n' }}",
        "{{ '<|assistant|>\\n' }}",
    ),
    stop=("<|user|>", "<|system|>"),
)
GRANITE = Family(
    name="granite",
    template=_tagged(
        "{{ '<|start_of_role|>' ~ role ~ '<|end_of_role|>' }}",
        "{{ '<|end_of_text|>\\n' }}",
        "{{ '<|start_of_role|>assistant<|end_of_role|>' }}",
    ),
    stop=("<|end_of_text|>",),
)
DEEPSEEK = Family(
    name="deepseek",
    template=(
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{ '<｜User｜>' ~ message['content'] }}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ '<｜Assistant｜>' ~ message['content'] ~ '<｜end▁of▁sentence｜>' }}"
        "{%- elif message['role'] == 'system' -%}{{ message['content'] }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
    ),
    stop=("<｜User｜>",),
)
# DeepSeek's first models, DeepSeek-MoE-16B-chat among them.
DEEPSEEK_LLM = Family(
    name="deepseek-llm",
    template=_labelled(
        "'User: ' ~ content ~ '\\n\\n'", "'Assistant: ' ~ content ~ eos_token", "'Assistant:'"
    ),
    stop=("\n\nUser:",),
)
HARMONY = Family(
    name="harmony",
    template=(
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' ~ message['content'] ~ '<|end|>' }}"
        "{%- else -%}{{ '<|start|>' ~ message['role'] ~ '<|message|>' ~ message['content']"
        " ~ '<|end|>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
    ),
)
VICUNA = Family(
    name="vicuna",
    template=_labelled(
        "'USER: ' ~ content ~ '\\n'",
        "'ASSISTANT: ' ~ content ~ eos_token ~ '\\n'",
        "'ASSISTANT:'",
    ),
    stop=("\nUSER:", "</s>"),
)
ALPACA = Family(
    name="alpaca",
    template=_labelled(
        "'### Instruction:\\n' ~ content ~ '\\n\\n'",
        "'### Response:\\n' ~ content ~ '\\n\\n'",
        "'### Response:\\n'",
    ),
    stop=("### Instruction:",),
)
# A model that nobody taught to chat: one message is a text to go on with.
PLAIN = Family(
    name="plain",
    template=(
        "{%- if messages | length == 1 and add_generation_prompt -%}"
        "{{ messages[0]['content'] }}{%- else -%}"
        + _labelled(
            "'User: ' ~ content ~ '\\n\\n'",
            "'Assistant: ' ~ content ~ '\\n\\n'",
            "'Assistant:'",
        )
        + "{%- endif -%}"
    ),
    stop=("\n\nUser:",),
)

# The first family whose tokens are all control tokens of the vocabulary is taken.
_BY_TOKENS: tuple[tuple[tuple[str, ...], Family], ...] = (
    (("<|start|>", "<|channel|>", "<|message|>"), HARMONY),
    (("<|start_header_id|>", "<|eot_id|>"), LLAMA3),
    (("<|start_of_role|>", "<|end_of_role|>"), GRANITE),
    (("<start_of_turn>", "<end_of_turn>"), GEMMA),
    (("<｜User｜>", "<｜Assistant｜>"), DEEPSEEK),
    (("<|im_start|>", "<|im_end|>"), CHATML),
    (("<|user|>", "<|assistant|>", "<|end|>"), PHI3),
    (("[INST]", "[/INST]"), MISTRAL),
)
# A part of the model's name, for the families whose marks are no tokens.
_BY_NAME: tuple[tuple[str, Family], ...] = (
    ("vicuna", VICUNA),
    ("alpaca", ALPACA),
    ("wizardlm", VICUNA),
    ("zephyr", ZEPHYR),
    ("tinyllama", ZEPHYR),
    ("deepseek-moe", DEEPSEEK_LLM),
    ("deepseek-llm", DEEPSEEK_LLM),
    ("llama-2", LLAMA2),
    ("llama2", LLAMA2),
    ("codellama", LLAMA2),
    ("mixtral", MISTRAL_V1),
    ("mistral", MISTRAL_V1),
    ("hermes", CHATML),
)
_CHAT_WORDS = ("chat", "instruct", "-it", "vicuna", "alpaca", "wizardlm", "zephyr", "hermes")


def choose_family(control: ControlTokens, *, arch: str = "", name: str = "") -> Family:
    """Return the prompt format for a model without a template of its own.

    `name` is the model's name or title; architectures alone say too little, as base models
    and chat models share them.
    """
    for tokens, family in _BY_TOKENS:
        if all(token in control for token in tokens):
            return family
    title = f"{name} {arch}".lower().replace("_", "-").replace(" ", "-")
    if any(word in title for word in _CHAT_WORDS):
        for word, family in _BY_NAME:
            if word in title:
                return family
    return PLAIN

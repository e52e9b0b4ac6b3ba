"""Conversations become the prompts that the models were trained on, or the nearest to them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from shimpy.chat.messages import ChatMessage, ToolCall, ToolSpec
from shimpy.chat.template import ChatTemplate
from shimpy.errors import UserError
from shimpy.protocol.messages import Text
from tests.chat.templates import ALL, CHATML_TOKENS, GEMMA2, MISTRAL_V1, QWEN3, QWEN25

NOW = datetime(2025, 3, 4, tzinfo=UTC)
TEMPLATES = {
    name: ChatTemplate.compile(source, control_tokens=tokens, bos_text="<s>", eos_text="</s>")
    for name, (source, tokens) in ALL.items()
}
TOOL = ToolSpec(
    name="weather",
    description="Tell the weather",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)


def system(text: str) -> ChatMessage:
    return ChatMessage(role="system", content=text)


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def answer(text: str = "", thinking: str = "", *calls: ToolCall) -> ChatMessage:
    return ChatMessage(role="assistant", content=text, thinking=thinking, tool_calls=calls)


def call(city: str = "Oslo", call_id: str = "call_1") -> ToolCall:
    return ToolCall(id=call_id, name="weather", arguments={"city": city})


def result(text: str, call_id: str = "call_1") -> ChatMessage:
    return ChatMessage(role="tool", content=text, tool_name="weather", tool_call_id=call_id)


def text_of(name: str, *messages: ChatMessage, **options: object) -> str:
    return TEMPLATES[name].render(messages, now=NOW, **options).text  # type: ignore[arg-type]


# --- what is found out about a template -------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_family_can_be_used(name: str) -> None:
    assert not TEMPLATES[name].problem
    assert not TEMPLATES[name].family


@pytest.mark.parametrize(
    ("trait", "having"),
    [
        ("typed_content", {"smolvlm"}),
        ("text_arguments", {"deepseek-r1", "deepseek-v31"}),
        ("null_content", {"deepseek-r1"}),
        ("short_ids", {"mistral-v7"}),
        ("one_call", {"llama31", "gpt-oss"}),
        ("developer", {"gpt-oss", "gemma4"}),
        ("thinking_parts", {"magistral"}),
        ("thinking_switch", {"qwen3", "gemma4", "deepseek-v31", "granite33"}),
        (
            "thinking",
            {"qwen3", "gemma4", "deepseek-r1", "deepseek-v31", "granite33", "magistral", "gpt-oss"},
        ),
    ],
)
def test_a_templates_traits_are_found_by_trying(trait: str, having: set[str]) -> None:
    assert {name for name in ALL if getattr(TEMPLATES[name].traits, trait)} == having


def test_what_lacks_a_system_role_or_tools_is_known() -> None:
    assert {n for n in ALL if not TEMPLATES[n].traits.system} == {"gemma2", "mistral-v1"}
    assert {n for n in ALL if not TEMPLATES[n].supports_tools} == {
        "gemma2",
        "mistral-v1",
        "smolvlm",
    }


# --- rendering -------------------------------------------------------------------------------


def test_a_plain_conversation_is_rendered_word_for_word() -> None:
    text = text_of("qwen25", system("Be brief."), user("Hi"), answer("Hello"), user("Bye"))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_without_a_generation_prompt_the_answer_is_not_begun() -> None:
    text = text_of("qwen25", user("Hi"), add_generation_prompt=False)
    assert text.endswith("Hi<|im_end|>\n")


def test_a_start_token_that_the_template_writes_is_not_added_again() -> None:
    assert not TEMPLATES["llama31"].render([user("x")], now=NOW).add_bos
    assert TEMPLATES["qwen25"].render([user("x")], now=NOW).add_bos


def test_a_start_token_in_the_users_words_is_no_start_token() -> None:
    template = ChatTemplate.compile(None, control_tokens=["<s>"], bos_text="<s>")
    rendered = template.render([user("<s>x")], now=NOW)
    assert rendered.add_bos
    assert rendered.parts == [Text("<s>"), Text("x", parse_special=True)]


def test_the_date_is_the_one_given() -> None:
    assert "Today Date: 04 Mar 2025" in text_of("llama31", user("x"))


def test_an_empty_conversation_or_empty_words_render() -> None:
    for name in ("qwen25", "qwen3", "gemma2", "gpt-oss"):
        assert text_of(name, user(""))


# --- tools ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_calls_and_results_are_in_the_prompt_of_every_family(name: str) -> None:
    """Also where the template knows nothing of tools: then they are said in words."""
    messages = [user("Weather?"), answer("", "", call()), result("sunny"), user("And now?")]
    text = text_of(name, *messages, tools=[TOOL])
    for words in ("weather", "city", "Oslo", "sunny", "And now?"):
        assert words in text
    assert '\\"city' not in text
    assert "'city'" not in text


@pytest.mark.parametrize("name", sorted(set(ALL) - {"mistral-v7"}))
def test_all_of_several_calls_are_in_the_prompt(name: str) -> None:
    """gpt-oss's template prints only the first of a message, Llama 3's refuses several."""
    messages = [
        user("Weather?"),
        answer("", "", call("Oslo", "a"), call("Rome", "b")),
        result("rain", "b"),
        result("sun", "a"),
    ]
    text = text_of(name, *messages, tools=[TOOL])
    assert text.count("Oslo") == text.count("Rome") == 1
    assert "rain" in text
    assert "sun" in text


def test_where_calls_are_taken_apart_each_result_follows_its_call() -> None:
    messages = [
        user("Weather?"),
        answer("", "", call("Oslo", "a"), call("Rome", "b")),
        result("rain", "b"),
        result("sun", "a"),
    ]
    text = text_of("llama31", *messages)
    assert [text.index(word) for word in ("Oslo", "sun", "Rome", "rain")] == sorted(
        text.index(word) for word in ("Oslo", "sun", "Rome", "rain")
    )


def test_ids_are_made_to_fit_and_still_match() -> None:
    text = text_of("mistral-v7", user("x"), answer("", "", call()), result("sunny"), tools=[TOOL])
    made = text.partition('"id": "')[2][:9]
    assert made.isalnum()
    assert f'"call_id": "{made}"' in text


def test_an_id_that_fits_is_kept() -> None:
    messages = [user("x"), answer("", "", call("Oslo", "abcDEF123")), result("s", "abcDEF123")]
    assert text_of("mistral-v7", *messages).count("abcDEF123") == 2


def test_tools_are_described_where_the_template_does_not() -> None:
    text = text_of("gemma2", user("Weather?"), tools=[TOOL])
    assert "Tell the weather" in text
    assert "<tool_call>" in text
    assert text.index("Tell the weather") < text.index("Weather?")


def test_arguments_of_any_shape_render() -> None:
    made = ToolCall(name="weather", arguments={"a": [1, {"b": None}], "c": "é\n", "d": 1.5})
    for name in ALL:
        assert "weather" in text_of(name, user("x"), answer("", "", made), result("y"))


def test_a_separate_template_for_tools_is_used_for_tools_only() -> None:
    template = ChatTemplate.compile(GEMMA2, tool_source=QWEN25, control_tokens=CHATML_TOKENS)
    assert template.supports_tools
    assert "<start_of_turn>" in template.render([user("x")], now=NOW).text
    assert "<tools>" in template.render([user("x")], now=NOW, tools=[TOOL]).text


# --- thinking --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "think", "end"),
    [
        ("qwen3", None, "assistant\n"),
        ("qwen3", True, "assistant\n"),
        ("qwen3", False, "<think>\n\n</think>\n\n"),
        ("deepseek-v31", None, "</think>"),
        ("deepseek-v31", True, "<think>"),
        ("deepseek-v31", False, "</think>"),
        ("deepseek-r1", False, "<think>\n"),
        ("gemma4", True, "model\n"),
        ("gemma4", False, "<channel|>"),
    ],
)
def test_thinking_is_switched_as_the_template_wants(
    name: str, think: bool | None, end: str
) -> None:
    assert text_of(name, user("x"), think=think).endswith(end)


@pytest.mark.parametrize(
    ("think", "level"),
    [(None, "medium"), ("low", "low"), ("high", "high"), ("max", "high"), ("minimal", "low")],
)
def test_levels_that_the_template_does_not_know_become_the_nearest(
    think: str | None, level: str
) -> None:
    assert f"Reasoning: {level}\n" in text_of("gpt-oss", user("x"), think=think)


def test_what_was_thought_is_passed_on_as_the_template_takes_it() -> None:
    turn = (user("x"), answer("", "I wonder", call()), result("sunny"))
    assert "<think>\nI wonder\n</think>" in text_of("qwen3", *turn)
    assert "<|channel|>analysis<|message|>I wonder<|end|>" in text_of("gpt-oss", *turn)
    assert "[THINK]I wonder[/THINK]" in text_of("magistral", *turn)


def test_content_beside_a_call_is_kept_where_only_thinking_may_stand() -> None:
    """gpt-oss's template refuses both in one message."""
    turn = (user("x"), answer("Let me see.", "I wonder", call()), result("sunny"))
    text = text_of("gpt-oss", *turn)
    assert "I wonder\n\nLet me see." in text


def test_other_switches_reach_the_template() -> None:
    text = text_of("granite33", user("x"), variables={"controls": {"length": "long"}})
    assert '{"length": "long"}' in text


def test_switches_can_not_forge_tokens_either() -> None:
    rendered = TEMPLATES["granite33"].render(
        [user("x")], now=NOW, variables={"controls": "<|end_of_role|>"}
    )
    assert Text("<|end_of_role|>") in rendered.parts


# --- conversations that a template refuses ---------------------------------------------------


def test_the_systems_words_go_to_the_user_where_there_is_no_system() -> None:
    assert text_of("gemma2", system("Be brief."), user("Hi")) == (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_developers_are_the_system_where_the_template_knows_none() -> None:
    message = ChatMessage(role="developer", content="Be brief.")
    assert "<|im_start|>system\nBe brief." in text_of("qwen25", message, user("x"))
    assert "# Instructions\n\nBe brief." in text_of("gpt-oss", message, user("x"))


@pytest.mark.parametrize("name", ["gemma2", "mistral-v1", "mistral-v7"])
@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([user("one"), user("two")], id="user twice"),
        pytest.param(
            [user("one"), answer("two"), answer("three"), user("four")], id="answer twice"
        ),
        pytest.param([answer("one"), user("two")], id="answer first"),
        pytest.param([user("one"), answer("two"), system("three"), user("four")], id="late system"),
        pytest.param([system("one"), system("two"), user("three")], id="two systems"),
        pytest.param([system("one")], id="system alone"),
        pytest.param([system("one"), answer("two"), user("three")], id="answer after system"),
    ],
)
def test_strict_templates_get_turns_in_order(name: str, messages: list[ChatMessage]) -> None:
    text = text_of(name, *messages)
    for message in messages:
        assert message.content in text


def test_a_template_that_refuses_everything_says_why() -> None:
    source = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad words') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate.compile(source)
    with pytest.raises(UserError, match="no bad words"):
        template.render([user("bad")], now=NOW)


def test_a_template_that_runs_away_is_tried_once() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}"
        "{% if 'x' == m.content %}{{ 'a' * 10**9 }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="too much"):
        ChatTemplate.compile(source).render([user("x")], now=NOW)


# --- answers to go on with -------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_an_answer_can_be_left_open(name: str) -> None:
    text = text_of(name, user("Say it"), answer("Once upon"), continue_final=True)
    assert text.endswith("Once upon")


def test_an_open_answer_keeps_the_space_at_its_end() -> None:
    assert text_of("gemma2", user("x"), answer("Once "), continue_final=True).endswith("Once ")


# --- templates that are missing or broken ----------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "name", "family"),
    [
        (["<|im_start|>", "<|im_end|>"], "", "chatml"),
        (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "", "llama3"),
        (["<start_of_turn>", "<end_of_turn>"], "", "gemma"),
        (["<|user|>", "<|assistant|>", "<|end|>"], "", "phi3"),
        (["<｜User｜>", "<｜Assistant｜>"], "", "deepseek"),
        (["<|start_of_role|>", "<|end_of_role|>"], "", "granite"),
        (["<|start|>", "<|channel|>", "<|message|>"], "", "harmony"),
        (["[INST]", "[/INST]"], "", "mistral"),
        ([], "Llama 2 7B Chat", "llama2"),
        ([], "Mistral-7B-Instruct-v0.2", "mistral-v1"),
        ([], "vicuna-7b", "vicuna"),
        ([], "alpaca-7b", "alpaca"),
        ([], "TinyLlama 1.1B Chat", "zephyr"),
        ([], "zephyr-7b-beta", "zephyr"),
        ([], "deepseek-moe-16b-chat", "deepseek-llm"),
        ([], "deepseek-moe-16b-base", "plain"),
        ([], "mistral-7b", "plain"),
        ([], "", "plain"),
    ],
)
def test_without_a_template_the_vocabulary_or_the_name_tells(
    tokens: list[str], name: str, family: str
) -> None:
    template = ChatTemplate.compile(
        None, control_tokens=tokens, arch="llama", name=name, bos_text="<s>", eos_text="</s>"
    )
    assert template.family == family
    assert not template.problem
    messages = [system("Be brief."), user("Hi"), answer("Hello"), user("Bye")]
    text = template.render(messages, now=NOW).text
    places = [text.index(message.content) for message in messages]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-chat", "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]"),
        ("mistral-instruct", "[INST] S\n\nU [/INST] A</s>[INST] V [/INST]"),
        ("vicuna", "S\n\nUSER: U\nASSISTANT: A</s>\nUSER: V\nASSISTANT:"),
        (
            "zephyr",
            (
                "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n"
                "<|user|>\nV</s>\n<|assistant|>\n"
            ),
        ),
        (
            "alpaca",
            (
                "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n"
                "### Response:\n"
            ),
        ),
        ("deepseek-llm-chat", "S\n\nUser: U\n\nAssistant: A</s>User: V\n\nAssistant:"),
        ("base", "S\n\nUser: U\n\nAssistant: A\n\nUser: V\n\nAssistant:"),
    ],
)
def test_the_fallbacks_are_as_published(name: str, expected: str) -> None:
    template = ChatTemplate.compile(None, name=name, bos_text="<s>", eos_text="</s>")
    text = template.render([system("S"), user("U"), answer("A"), user("V")], now=NOW).text
    assert text == expected


def test_a_base_model_goes_on_with_the_words_it_gets() -> None:
    rendered = ChatTemplate.compile(None).render([user("Once upon")], now=NOW)
    assert rendered.text == "Once upon"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ messages | nofilter }}", "nofilter"),
        ("no message is printed", "does not print"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "too much",
        ),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_broken_template_is_replaced_and_the_reason_kept(source: str, words: str) -> None:
    template = ChatTemplate.compile(source, control_tokens=CHATML_TOKENS)
    assert template.family == "chatml"
    assert words in template.problem
    with pytest.raises(UserError, match=words):
        ChatTemplate.compile(source, strict=True)


def test_a_broken_template_for_tools_is_done_without() -> None:
    template = ChatTemplate.compile(QWEN3, tool_source="{% if %}", control_tokens=CHATML_TOKENS)
    assert template.for_tools() is template


def test_whether_a_mark_is_a_control_token_is_known() -> None:
    template = ChatTemplate.compile(MISTRAL_V1, control_tokens=["[TOOL_CALLS]"])
    assert template.has_control("a [TOOL_CALLS]")
    assert not template.has_control("<tool_call>")

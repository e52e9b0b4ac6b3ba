"""instructor against a real daemon, through OpenAI's SDK, by each of its ways to get JSON."""

from __future__ import annotations

import instructor
import openai
import pydantic
import pytest
from instructor.core import InstructorRetryException

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

USER = [{"role": "user", "content": "two values"}]


class Pair(pydantic.BaseModel):
    """Two values."""

    a: int
    b: bool


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_a_model_of_noise_gives_what_is_asked_for(url: str, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as sdk:
        client = instructor.from_openai(sdk, mode=mode)
        found = client.chat.completions.create(
            model="llama", messages=USER, response_model=Pair, max_retries=0
        )
    assert isinstance(found, Pair)


def test_json_mode_asks_for_an_object(url: str) -> None:
    """It does not send the schema, so that noise is an object of another form."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as sdk:
        client = instructor.from_openai(sdk, mode=instructor.Mode.JSON)
        with pytest.raises(InstructorRetryException, match="Field required"):
            client.chat.completions.create(
                model="llama",
                messages=USER,
                response_model=Pair,
                max_retries=0,
                max_tokens=400,
                seed=1,
            )


def test_a_partial_answer_is_streamed(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as sdk:
        client = instructor.from_openai(sdk, mode=instructor.Mode.JSON_SCHEMA)
        parts = list(
            client.chat.completions.create_partial(
                model="llama", messages=USER, response_model=Pair
            )
        )
    assert isinstance(parts[-1].a, int)


async def test_the_async_client(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as sdk:
        client = instructor.from_openai(sdk, mode=instructor.Mode.TOOLS)
        found = await client.chat.completions.create(
            model="llama", messages=USER, response_model=Pair, max_retries=0
        )
    assert isinstance(found, Pair)

"""OpenAI's own client library and a browser against a server in a process of its own (`.ci/test-serving` has both)."""

import asyncio
import shutil
import time
import urllib.request

import pytest
from support.serving import PARROT, server_process

pytestmark = pytest.mark.long
# A sandbox of its own it may not have, nor what it would look for on the internet.
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def address():
    with server_process([*PARROT, '{"max_sequence": 4000, "max_requests": 32, "seconds": 0.002}']) as (_, address):
        yield address


class TestOpenAI:
    @pytest.fixture(scope="class")
    def openai(self):
        return pytest.importorskip("openai", reason="the openai package is not installed: run .ci/test-serving")

    @pytest.fixture(scope="class")
    def client(self, openai, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            yield client

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["parrot"]
        assert client.models.retrieve("parrot").owned_by == "megatron_carve"

    def test_completions(self, client):
        answer = client.completions.create(model="parrot", prompt="añ€", max_tokens=12, n=2, seed=0, logprobs=1)
        assert answer.choices[0].text == "añ€añ€" and answer.choices[1].text == "ñ€añ€a"
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs.tokens[0] == "a"
        assert answer.usage.completion_tokens == 24
        stopped = client.completions.create(model="parrot", prompt="one, two", stop=", t", max_tokens=100)
        assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("one", "stop")

    def test_streams(self, client):
        chunks = list(
            client.completions.create(
                model="parrot", prompt="añ€", max_tokens=60, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "añ€" * 10
        assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 60

    def test_a_stream_that_is_closed_frees_its_request(self, client, address):
        with client.completions.create(model="parrot", prompt="abc", max_tokens=3000, stream=True) as stream:
            next(iter(stream))
        assert until_idle(address) < 2

    def test_errors(self, openai, client):
        with pytest.raises(openai.BadRequestError, match="temperature: input should be greater than or equal to 0"):
            client.completions.create(model="parrot", prompt="a", temperature=-1)
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="parrot", prompt="a" * 5000)
        assert raised.value.code == "context_length_exceeded" and raised.value.param == "prompt"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt", prompt="a")
        with pytest.raises(openai.BadRequestError, match="the model's tokenizer has no chat template"):
            client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "hi"}])

    def test_100_at_a_time(self, openai, address):
        async def all_of_them():
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                asked = [
                    client.completions.create(model="parrot", prompt=f"client {i};", max_tokens=50) for i in range(100)
                ]
                return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

        assert asyncio.run(all_of_them()) == [(f"client {i};" * 10)[:50] for i in range(100)]


def until_idle(address):
    """Seconds until the server runs nothing, at most ten."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < 10:
        with urllib.request.urlopen(f"{address}/metrics") as metrics:
            if "megatron_carve_choices_running 0.0" in metrics.read().decode():
                break
    return waited


class TestPage:
    @pytest.fixture(scope="class")
    def page(self, address):
        library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run .ci/test-serving")
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            pytest.skip("no chromium is installed (on Debian: apt install chromium)")
        with library.sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=CHROMIUM)
            page = chromium.new_page()
            problems, asked = [], []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            yield page
            chromium.close()
        assert problems == []
        assert all(url.startswith((address, "data:")) for url in asked), asked

    def status(self, page, expected):
        page.wait_for_function("text => document.getElementById('status').textContent.startsWith(text)", arg=expected)

    def test_a_prompt_is_continued(self, page, tmp_path):
        page.wait_for_function("document.getElementById('model').textContent === 'parrot'")
        page.fill("#prompt", "<b>añ€</b> ")
        page.fill("#max_tokens", "28")
        page.click("#go")
        self.status(page, "length: 28 tokens in ")
        assert page.text_content("#output") == "<b>añ€</b> " * 3
        page.screenshot(path=tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 1000

    def test_it_stops_before_a_text(self, page):
        page.fill("#stop", "€")
        page.press("#prompt", "Control+Enter")
        self.status(page, "stop: ")
        assert page.text_content("#output") == "<b>añ€</b> <b>añ"
        page.fill("#stop", "")

    def test_it_can_be_stopped(self, page, address):
        page.fill("#max_tokens", "3000")
        page.click("#go")
        self.status(page, "running")
        assert page.is_disabled("#go")
        page.click("#cancel")
        self.status(page, "stopped")
        assert page.is_enabled("#go") and page.is_disabled("#cancel")
        assert until_idle(address) < 2

    def test_errors_are_shown(self, page):
        page.fill("#max_tokens", "30000")
        page.click("#go")
        self.status(
            page, "prompt: expected at most 4000 tokens of a prompt and its continuation together, got 14 + 30000"
        )
        assert page.get_attribute("#status", "class") == "error"

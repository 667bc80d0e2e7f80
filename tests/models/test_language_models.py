"""Language models: a real server on this machine, a real folder on disk, and what goes wrong with both."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from groundswell.config import ConfigError
from models.language_models import KEY_VARIABLE, LocalModel, ServedModel

WORDS = ["<unk>", "<end>", "is", "ann", "bob", "older", "younger", "than", "same", "age", "?", "."]


# ---- a server ----


class Server(ThreadingHTTPServer):
    """Answers each prompt with its last word in upper case, after the `errors` that are due."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.errors: list[int | str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.barrier = threading.Barrier(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **request})
        self.server.keys.append(self.headers["Authorization"])
        error = self.server.errors.pop(0) if self.server.errors else None
        if error == "cut":
            return
        self.server.barrier.wait(timeout=10)
        text = request["messages"][0]["content"].split()[-1].upper()
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        if error is not None:
            body = "not JSON" if error == 200 else '{"error": {"message":\n "no such model"}}'
        self.send_response(int(error or 200))
        if error == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self.send_error(404)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_served_model_gets_the_prompt_and_its_settings(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert ServedModel(server.url + "/", "big", max_tokens=7).complete(["is ann older ?\nünder"]) == ["ÜNDER"]
    (request,) = server.requests
    assert request == {
        "path": "/v1/chat/completions",
        "model": "big",
        "messages": [{"role": "user", "content": "is ann older ?\nünder"}],
        "temperature": 0,
        "max_tokens": 7,
    }
    assert server.keys == ["Bearer secret"]


def test_prompts_of_a_call_are_sent_side_by_side_and_keep_their_order(server: Server) -> None:
    server.barrier = threading.Barrier(3)  # no answer before all three have come
    assert ServedModel(server.url, "big").complete(["a", "b", "c"]) == ["A", "B", "C"]
    assert server.keys == [None] * 3
    assert ServedModel(server.url, "big").complete([]) == []


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.errors = [429, 503, "cut"]
    assert ServedModel(server.url, "big", first_wait_s=0.001).complete(["yes"]) == ["YES"]
    assert len(server.requests) == 4
    server.errors = [500] * 6
    with pytest.raises(ConfigError, match="still HTTP 500 .*no such model.* after 6 tries"):
        ServedModel(server.url, "big", first_wait_s=0.001).complete(["yes"])
    assert len(server.requests) == 10


@pytest.mark.parametrize(("error", "message"), [(404, 'HTTP 404 .*"no such model"'), (200, "no completion .*not JSON")])
def test_a_mistake_is_told_at_once_in_one_line(server: Server, error: int, message: str) -> None:
    server.errors = [error]
    with pytest.raises(ConfigError, match=message) as caught:
        ServedModel(server.url, "big").complete(["yes"])
    assert "\n" not in str(caught.value) and len(server.requests) == 1


def test_the_key_does_not_follow_a_redirect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    server.errors = [302]
    with pytest.raises(ConfigError, match="HTTP 404"):
        ServedModel(server.url, "big").complete(["yes"])
    assert server.keys == ["Bearer secret", None]


def test_no_server_and_no_address(server: Server) -> None:
    server.server_close()
    with pytest.raises(ConfigError, match="cannot be reached"):
        ServedModel(server.url, "big").complete(["yes"])
    with pytest.raises(ConfigError, match=r"--url file:///etc/passwd: write http://HOST"):
        ServedModel("file:///etc/passwd", "big")


# ---- a folder ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


def make_folder(path: Path, **tokenizer_settings: Any) -> Path:
    """A random GPT-2 of 12 words and 24 positions, whose tokenizer puts <end> before each text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 1)])
    settings = {"unk_token": "<unk>", "eos_token": "<end>", **tokenizer_settings}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def by_hand(folder: Path, prompt: str, max_tokens: int) -> str:
    """Greedy decoding of one prompt without padding or cache."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = [WORDS.index(word) for word in prompt.split()]
    answer: list[int] = []
    while len(answer) < max_tokens and (not answer or answer[-1] != 1):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return " ".join(WORDS[token] for token in answer if token > 1)


def test_a_batch_is_answered_as_each_prompt_alone(folder: Path) -> None:
    prompts = ["is ann older than bob ?", "bob ?", "ann is younger than bob . is bob older ?"]
    expected = [by_hand(folder, f"<end> {prompt}", 6) for prompt in prompts]
    model = LocalModel(folder, max_tokens=6)
    assert len(set(expected)) > 1
    assert model.complete(prompts) == expected
    assert [model.complete([prompt])[0] for prompt in prompts] == expected


def test_a_chat_model_is_asked_through_its_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}ann {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} . {% endif %}"
    chat = make_folder(tmp_path / "chat", chat_template=template)
    assert LocalModel(chat, max_tokens=4).complete(["is bob older ?"]) == [by_hand(chat, "ann is bob older ? .", 4)]


def test_a_prompt_beyond_the_positions_is_refused(folder: Path) -> None:
    model = LocalModel(folder, max_tokens=4)
    model.complete([" ".join(["ann"] * 19)])
    message = r"a prompt of 21 tokens and 4 for its answer do not fit the model's 24 positions; .*--max-tokens"
    with pytest.raises(ConfigError, match=message):
        model.complete(["bob", " ".join(["ann"] * 20)])


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--folder .*: has no config\.json"):
        LocalModel(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:  # no tokenizer, no weights
        LocalModel(tmp_path)
    assert "\n" not in str(caught.value)

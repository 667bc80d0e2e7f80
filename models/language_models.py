"""Large language models that are asked in English: behind an OpenAI-compatible server, or in a local folder."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from groundswell.config import ConfigError

TRIES = 6
LONGEST_WAIT_S = 60.0
KEY_VARIABLE = "OPENAI_API_KEY"


class LanguageModel(Protocol):
    def complete(self, prompts: Sequence[str]) -> list[str]:
        """The model's most likely answer to each prompt. Raises ConfigError where it cannot be asked at all."""
        ...


class ServedModel:
    """A model behind POST <url>/chat/completions, as OpenAI, vLLM, llama.cpp and others serve it.

    The prompts of one call are sent side by side. What may pass (too many requests, an error within the server, a cut
    connection) is tried again after a pause that doubles.
    """

    def __init__(
        self, url: str, model: str, max_tokens: int = 1024, timeout_s: float = 600.0, first_wait_s: float = 1.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url}: write http://HOST:PORT/v1 or https://...")
        self.url, self.model, self.max_tokens = url.rstrip("/") + "/chat/completions", model, max_tokens
        self.timeout_s, self.first_wait_s = timeout_s, first_wait_s

    def complete(self, prompts: Sequence[str]) -> list[str]:
        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(pool.map(self._complete, prompts))

    def _complete(self, prompt: str) -> str:
        message = {"role": "user", "content": prompt}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": self.max_tokens}
        data = self._post(json.dumps(body).encode())
        try:
            text = json.loads(data)["choices"][0]["message"]["content"] or ""
            return str(text)
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"{self.url}: no completion in its answer {_excerpt(data)}") from None

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        if os.environ.get(KEY_VARIABLE):
            # not to where the server may redirect to
            request.add_unredirected_header("Authorization", f"Bearer {os.environ[KEY_VARIABLE]}")
        for attempt in range(TRIES):
            wait = self.first_wait_s * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {_excerpt(error.read())}"
                if error.code != 429 and error.code < 500:
                    raise ConfigError(f"{self.url}: {problem}") from None
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except urllib.error.URLError as error:
                raise ConfigError(f"{self.url} cannot be reached ({error.reason}); is the server up?") from None
            except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__} {error}"
            if attempt + 1 < TRIES:
                time.sleep(min(wait, LONGEST_WAIT_S))
        raise ConfigError(f"{self.url}: still {problem} after {TRIES} tries; the same command goes on later")


def _seconds(text: str | None) -> float:
    """A Retry-After header in seconds; dates are passed over."""
    return float(text) if text and text.isdigit() else 0.0


def _excerpt(data: bytes) -> str:
    return " ".join(data.decode(errors="replace").split())[:200]


class LocalModel:
    """A Hugging Face folder (config.json, *.safetensors, a tokenizer), on the GPU if there is one. Runs no code of the
    folder and fetches nothing. A chat model is asked through its chat template."""

    def __init__(self, folder: Path, max_tokens: int = 1024) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (folder / "config.json").exists():
            raise ConfigError(f"--folder {folder}: has no config.json; give a folder that save_pretrained wrote")
        self.model: Any
        self.tokenizer: Any
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **local)
            self.model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="auto", **local)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"--folder {folder}: cannot be loaded ({_excerpt(str(error).encode())})") from None
        if self.tokenizer.pad_token_id is None:  # masked, so any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.folder, self.max_tokens = folder, max_tokens

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str]) -> list[str]:
        from transformers import GenerationConfig

        chat = self.tokenizer.chat_template is not None
        inputs = self.tokenizer(
            [self._as_chat(prompt) for prompt in prompts] if chat else list(prompts),
            padding=True,
            add_special_tokens=not chat,  # a template writes them itself
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        self._check_length(length)
        greedy = GenerationConfig(
            max_new_tokens=self.max_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.model.generation_config.eos_token_id,
        )
        found = self.model.generate(**inputs, generation_config=greedy)
        return self.tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)

    def _as_chat(self, prompt: str) -> str:
        message = {"role": "user", "content": prompt}
        return self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def _check_length(self, length: int) -> None:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and length + self.max_tokens > positions:
            raise ConfigError(
                f"--folder {self.folder}: a prompt of {length:,} tokens and {self.max_tokens:,} for its answer do not "
                f"fit the model's {positions:,} positions; ask --contexts retrieval or lower --max-tokens"
            )

"""Documents and a tokenizer for tests of text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

END = "<|endoftext|>"
WORDS = [f"w{n}" for n in range(30)]


def documents(count: int = 200, longest: int = 20) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def write_documents(path: Path, texts: Sequence[str] | None = None, field: str = "text") -> Path:
    lines = [json.dumps({field: text, "source": "test"}) for text in (documents() if texts is None else texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tokenizer(folder: Path, end: str = END, gap: bool = False) -> Path:
    """One token a word; `<s>` begins a text when special tokens are added. `gap`: no token has the id before last."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", end, *WORDS])}
    if gap:
        vocabulary[WORDS[-1]] += 1
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)  # what a released file may have on, and no data set wants
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder

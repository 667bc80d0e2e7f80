"""Tokenizers: a local tokenizer.json, or one token a word over a closed list of words.

Importing this does not import the tokenizers library: commands that only list runs do without it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.vocabulary import PAD

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# What the end-of-text token is called where no tokenizer_config.json says: GPT-2, Llama 3, Llama 2 and Mistral, others.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
UNKNOWN = "<unk>"
# A word with the space before it, a contraction's end, two digits, one digit, any other character: as in GPT-2, a text
# is its tokens end to end.
WORD = r" ?[A-Za-z]+|'[a-z]+| ?[0-9][0-9]| ?[0-9]| ?[^\sA-Za-z0-9]|\s"


def tokenizer_key(name: str | Path) -> tuple[Path, int]:
    """File and time of its last change. Raises ValueError where there is none."""
    path = Path(name)
    path = path / TOKENIZER if path.is_dir() else path
    try:
        return path, path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(
            f"tokenizer {path}: {error.strerror or error}; give a {TOKENIZER} or a folder with one (an older "
            "tokenizer: AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        ) from None


@lru_cache(maxsize=4)
def load_tokenizer(path: Path, changed: int) -> Tokenizer:
    """Neither pads nor cuts. Raises ValueError for a file that is no tokenizer."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {path}: cannot be read ({error}); give a {TOKENIZER}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@lru_cache(maxsize=4)
def load_vocabulary(path: Path, changed: int) -> tuple[str, ...]:
    """Token of each id; ids that no token has get a name of their own."""
    return tokens_by_id(load_tokenizer(path, changed))


def tokens_by_id(tokenizer: Tokenizer) -> tuple[str, ...]:
    ids = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    return tuple(ids.get(index, f"<unused {index}>") for index in range(max(ids) + 1))


def eos_token(path: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json or special_tokens_map.json, where there is one."""
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except OSError:
        return None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"tokenizer {path}: not a JSON object ({error}); copy the file again") from None
    return token.get("content") if isinstance(token, dict) else token


@lru_cache(maxsize=16)
def word_tokenizer(texts: tuple[str, ...]) -> Tokenizer:
    """One token for each word of the texts, in alphabetical order after `<pad>` (id 0) and `<unk>` (id 1)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    splitter = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {token: index for index, token in enumerate((PAD, UNKNOWN, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return tokenizer

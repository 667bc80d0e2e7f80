"""Problems as files in the original's forms: lines of text, and the tokenised folder of the `datasets` library.

The tokenised folder is a DatasetDict on disk: dataset_dict.json, and for each split data-*.arrow (Arrow's stream
format, one column `input_ids`), dataset_info.json and state.json. It is written and read with pyarrow alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.random import RandomState
from numpy.typing import NDArray

from groundswell.config import ConfigError
from groundswell.files import atomic_folder, check_name
from tasks.arithmetic_rows import Rows, Text, find_equals, pack
from tasks.arithmetic_vocabulary import (
    EOS,
    EQUALS,
    PAD,
    SPECIAL,
    UNK,
    VOCABULARIES,
    Characters,
    Ids,
    VocabularyName,
    having,
)
from tasks.vocabulary import IntArray

TOKENIZED, SPLITS = "hf_tokenized_dataset", ("train", "test")
DICTIONARY, STATE, INFO, ARROW = "dataset_dict.json", "state.json", "dataset_info.json", "data-00000-of-00001.arrow"
READ_BYTES = 1 << 24  # of a text file at a time
ARROW_ROWS = 1_000  # in a record batch, as the library writes them


# ---- text ----


def to_text(rows: Rows, vocabulary: Characters) -> str:
    """A line for each row; PAD before the end is a space."""
    codes = np.array([ord(character) for character in (" " * len(SPECIAL) + vocabulary.characters)], dtype="<u4")
    lengths = rows.lengths[:, None] - 1
    places = np.arange(rows.tokens.shape[1])
    lines = np.where(places == lengths, ord("\n"), codes[rows.tokens])
    return str(lines[places <= lengths].astype("<u4").tobytes(), "utf-32-le")


def write_text(folder: Path, name: str, pieces: Iterable[str]) -> Path:
    """A new folder with one text file. Raises ConfigError where there is something of that name."""
    check_name(folder.name, "folder")
    try:
        with (
            atomic_folder(folder) as temporary,
            (temporary / check_name(name, "file")).open("w", encoding="utf-8") as file,
        ):
            for piece in pieces:
                file.write(piece)
    except FileExistsError:
        raise ConfigError(f"folder: '{folder}' exists already; remove it, or name another") from None
    return folder / name


def read_text(folder: Path, vocabulary: Characters) -> Ids:
    """All lines of all .txt files in order of their names, each with EOS: [N, L], right-padded.

    Raises ConfigError that names the file and line of the first one that is not a problem of this vocabulary.
    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ConfigError(f"task.path: no .txt file in '{folder}'; name a folder of problems, one a line")
    return stack([piece for path in files for piece in _read_file(path, vocabulary)])


def _read_file(path: Path, vocabulary: Characters) -> Iterator[Ids]:
    first_line = 1
    with path.open("rb") as file:
        while lines := file.readlines(READ_BYTES):
            try:
                text = b"".join(lines).decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                raise ConfigError(f"task.path: {path} is not UTF-8 text; write it again") from None
            yield encode_lines(text if text.endswith("\n") else text + "\n", vocabulary, path, first_line)
            first_line += len(lines)


def encode_lines(text: str, vocabulary: Characters, path: Path, first_line: int) -> Ids:
    """Lines, each ended by a newline, to rows with EOS [N, L]. Raises ConfigError as `read_text` does."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    ends = codes == ord("\n")
    ids = np.where(ends, EOS, vocabulary.ids(codes)).astype(np.uint8)
    stops = np.flatnonzero(ends)
    lengths = np.diff(stops, prepend=-1)
    width = int(lengths.max())
    rows = np.full((len(lengths), width), PAD, dtype=np.uint8)
    rows[np.arange(width) < lengths[:, None]] = ids
    wrong = (rows == UNK).any(axis=1) | ((rows == EQUALS).sum(axis=1) != 1)
    if wrong.any():
        number = int(wrong.argmax())
        line = text[int(stops[number] - lengths[number] + 1) : int(stops[number])]
        raise ConfigError(f"task.path: {path} line {first_line + number}: {wrong_line(line, vocabulary)}")
    return rows


def wrong_line(line: str, vocabulary: Characters) -> str:
    """What is wrong with a line, and what to do."""
    strange = sorted(set(line) - set(vocabulary.characters))
    if strange:
        others = having(line)
        remedy = f"set task.vocabulary={others[0]}, which has all of it" if others else "no vocabulary has all of it"
        return f"{strange[0]!r} is not in the vocabulary {vocabulary.name}; {remedy}"
    count = line.count("=")
    return (
        f"{count} '=' where one must be between prompt and answer; mend the line"
        if count
        else ("no '=' between prompt and answer; mend the line")
    )


def stack(pieces: Sequence[Ids]) -> Ids:
    """Right-padded rows of different widths, one below the other."""
    whole = np.full((sum(map(len, pieces)), max(piece.shape[1] for piece in pieces)), PAD, dtype=np.uint8)
    start = 0
    for piece in pieces:
        whole[start : start + len(piece), : piece.shape[1]] = piece
        start += len(piece)
    return whole


def split_sizes(count: int, test_ratio: float) -> tuple[int, int]:
    """Rows of train and of test, which are the last. As in the original, less than one test row puts all into test."""
    test = int(count * test_ratio)
    return (count - test, test) if test else (0, count)


def shuffle_and_split(rows: Ids, test_ratio: float, seed: int | None) -> dict[str, Ids]:
    """`seed` None: in the order of the files."""
    if seed is not None:
        rows = rows[RandomState(seed).permutation(len(rows))]
    num_train, _ = split_sizes(len(rows), test_ratio)
    return dict(zip(SPLITS, (rows[:num_train], rows[num_train:]), strict=True))


# ---- tokenised ----


def write_tokenized(folder: Path, splits: dict[str, Ids], vocabulary: VocabularyName) -> Path:
    """`<folder>/hf_tokenized_dataset`, which `datasets.load_from_disk` reads. Raises ConfigError where there is one."""
    target = folder / TOKENIZED
    try:
        with atomic_folder(target) as temporary:
            (temporary / DICTIONARY).write_text(json.dumps({"splits": list(splits)}))
            for name, rows in splits.items():
                _write_split(temporary / check_name(name, "split"), rows, vocabulary)
    except FileExistsError:
        raise ConfigError(f"folder: '{target}' exists already; remove it, or name another") from None
    return target


def _write_split(folder: Path, rows: Ids, vocabulary: VocabularyName) -> None:
    folder.mkdir()
    feature = {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "Sequence"}
    features = {"input_ids": feature}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("input_ids", pa.list_(pa.int64()))], metadata=metadata)
    with pa.OSFile(str(folder / ARROW), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(rows), ARROW_ROWS):
            piece = rows[start : start + ARROW_ROWS]
            offsets = np.arange(len(piece) + 1, dtype=np.int32) * piece.shape[1]
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(piece.reshape(-1).astype(np.int64)))
            writer.write_batch(pa.record_batch([column], schema=schema))
    info = {"citation": "", "description": _described(vocabulary), "features": features, "homepage": "", "license": ""}
    (folder / INFO).write_text(json.dumps(info, indent=2))
    state: dict[str, Any] = {
        "_data_files": [{"filename": ARROW}],
        "_fingerprint": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / STATE).write_text(json.dumps(state, indent=2))


def _described(vocabulary: str) -> str:
    return f"arithmetic problems, vocabulary {vocabulary}"


def read_tokenized(folder: Path, vocabulary: Characters) -> dict[str, Ids]:
    """The splits of a tokenised folder, each [N, L], right-padded.

    Raises ConfigError for what is missing, and for rows that are not problems of this vocabulary.
    """
    splits = {}
    for name in _read_json(folder / DICTIONARY)["splits"]:
        part = folder / check_name(name, "task.path: split")
        said = _read_json(part / INFO).get("description") or ""
        others = [other for other in VOCABULARIES if said == _described(other) != _described(vocabulary.name)]
        if others:
            raise ConfigError(
                f"task.path: {part} was written in the vocabulary {others[0]}; set task.vocabulary={others[0]}"
            )
        splits[name] = _read_split(part, vocabulary)
    return splits


def _read_split(folder: Path, vocabulary: Characters) -> Ids:
    pieces: list[Ids] = []
    for entry in _read_json(folder / STATE)["_data_files"]:
        path = folder / check_name(entry["filename"], "task.path: data file")
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    if len(batch):  # an empty split has a column of any type
                        pieces.append(_checked(_matrix(batch.column("input_ids"), path), vocabulary, path))
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise ConfigError(f"task.path: {path}: {' '.join(str(error).split())}; write the folder again") from None
    return stack(pieces) if pieces else np.zeros((0, 1), dtype=np.uint8)


def _matrix(column: Any, path: Path) -> NDArray[np.int64]:
    """A column of lists, right-padded [N, L]."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise ConfigError(f"task.path: {path}: input_ids must be lists of integers; write the folder again")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    matrix = np.full((len(lengths), int(lengths.max())), PAD, dtype=np.int64)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = column.flatten().to_numpy(zero_copy_only=False)
    return matrix


def _checked(rows: NDArray[np.int64], vocabulary: Characters, path: Path) -> Ids:
    """Raises ConfigError for what is no problem of this vocabulary."""
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= len(vocabulary):
        fitting = [name for name, known in VOCABULARIES.items() if low >= 0 and high < len(known)]
        remedy = f"set task.vocabulary={fitting[0]}" if fitting else "tokenise it again"
        strange = high if high >= len(vocabulary) else low
        raise ConfigError(
            f"task.path: {path} has id {strange}, and the vocabulary {vocabulary.name} ends at "
            f"{len(vocabulary) - 1}; {remedy}"
        )
    for wanted, name in ((EQUALS, "'='"), (EOS, "[EOS]")):
        counts = (rows == wanted).sum(axis=1)
        if (counts != 1).any():
            row = " ".join(map(str, rows[int((counts != 1).argmax())]))
            count = counts[int((counts != 1).argmax())]
            raise ConfigError(f"task.path: {path} has a row with {count} {name}, a problem has one; mend it: {row}")
    return rows.astype(np.uint8)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"task.path: {path}: {error.strerror or error}; the folder must be a DatasetDict") from None
    except ValueError as error:
        raise ConfigError(f"task.path: {path}: not JSON ({error}); write the folder again") from None
    return values


def without_spaces(rows: Ids) -> Ids:
    """Without the PAD tokens between characters, as the original's evaluator reads spaced files."""
    return pack(Text(rows, rows != PAD), int((rows != PAD).sum(axis=1).max(initial=1)))


def as_rows(tokens: Ids) -> Rows:
    return Rows(tokens, find_equals(tokens))


def numbers_of_rows(count: int, size: int) -> Iterator[IntArray]:
    """0 .. count - 1 in pieces."""
    for start in range(0, count, size):
        yield np.arange(start, min(count, start + size))

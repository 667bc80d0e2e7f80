"""Problems as text, for tests."""

from groundswell.protocols import Split
from tasks.arithmetic_files import to_text
from tasks.arithmetic_rows import Rows
from tasks.arithmetic_vocabulary import VOCABULARIES, VocabularyName


def lines_of(rows: Rows, vocabulary: VocabularyName = "pad") -> list[str]:
    return to_text(rows, VOCABULARIES[vocabulary]).splitlines()


def prompts_and_answers(split: Split, vocabulary: VocabularyName = "pad") -> list[tuple[str, str]]:
    """What the model reads up to the first answer position, and the targets; without PAD and EOS."""
    known = VOCABULARIES[vocabulary]
    rows = zip(split.tokens.tolist(), split.positions[:, 0].tolist(), split.targets.tolist(), strict=True)
    return [
        (known.decode(tokens[: start + 1]), known.decode([target for target in targets if target >= 0]))
        for tokens, start, targets in rows
    ]

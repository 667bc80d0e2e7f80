"""What every task must keep, whatever it is about."""

import json
from collections import defaultdict

import pytest
import torch
from text_files import write_documents, write_tokenizer

from groundswell.protocols import IGNORE, Dataset, Examples, Split, Task
from tasks.arithmetic import Arithmetic
from tasks.arithmetic_examples import LengthTask
from tasks.arithmetic_rows import longest_run
from tasks.boolean_expressions import BooleanExpressions
from tasks.chain import Chain
from tasks.chain_files import ChainFiles
from tasks.chain_related import ChainRelated
from tasks.chain_symbols import SymbolChain
from tasks.chain_symbols import write_folder as write_folder_of_chains
from tasks.comparison import Comparison
from tasks.complex_reasoning import ComplexReasoning
from tasks.composition import Composition
from tasks.examples import row_texts
from tasks.folder import Folder, write_folder
from tasks.gendered_pronoun import GenderedPronoun
from tasks.greater_than import GreaterThan
from tasks.ioi import Ioi
from tasks.modular_arithmetic import ModularArithmetic
from tasks.multiplication_chain import MultiplicationChain
from tasks.positional_or import PositionalOr
from tasks.random_tokens import RandomTokens
from tasks.reverse import Reverse
from tasks.reverse_icl import ReverseICL
from tasks.running_sums import RunningSums
from tasks.sorting import Sorting
from tasks.text import Text
from tasks.tracr_tasks import TracrProportion, TracrReverse
from tasks.vocabulary import PAD, SPECIAL_TOKENS

COMPOSITION = Composition(num_entities=20, num_relations=8, out_degree=6, phi=3, ood_fraction=0.2, iid_fraction=0.1)
TASKS = {
    "composition": COMPOSITION,
    "composition without stop": COMPOSITION.with_overrides({"predict_stop": False}),
    "composition demo": Composition(
        num_entities=32,
        num_relations=12,
        out_degree=12,
        phi=8,
        iid_fraction=0.10,
        ood_fraction=0.15,
        predict_stop=False,
    ),
    "comparison": Comparison(num_entities=30, num_attributes=3, num_values=5, phi=4, ood_fraction=0.2),
    "comparison without stop": Comparison(num_entities=30, num_attributes=3, num_values=5, phi=4, predict_stop=False),
    "complex reasoning": ComplexReasoning(num_entities=100, num_attributes=3, num_values=5, train_fraction=0.04),
    "add": ModularArithmetic(modulus=11),
    "divide": ModularArithmetic(modulus=13, operation="divide", train_fraction=0.6),
    "random tokens": RandomTokens(vocabulary=40, length=8, answers=2, num_examples=50, num_test=20),
    "reverse": Reverse(entity_vocab_size=40),
    "reverse of words": Reverse(entity_vocab_size=40, word_size=3),
    "reverse in context": ReverseICL(entity_vocab_size=40, num_x_tokens=12, num_y_tokens=10),
    "chain": Chain(entity_vocab_size=40),
    "chain of words": Chain(entity_vocab_size=40, word_size=2, num_triples=30),
    "chain with related tokens": ChainRelated(
        entity_vocab_size=40, alphabet_size=30, num_train_triples=12, num_validation_triples=6
    ),
}
LENGTHS = {  # their training rows are made when they are read, and their evaluation splits have a width of their own
    "addition": Arithmetic(max_first=3, max_second=3, num_examples=500, num_test=20, test_lengths=(2, 5)),
    "mixed operations": Arithmetic(operation="mixed", reverse="answer", num_examples=500, num_test=20),
    "multiplication on all tokens": Arithmetic(
        operation="multiplication", loss_on="all", num_examples=500, num_test=20
    ),
    "hints": Arithmetic(index_hints=True, vocabulary="index", num_examples=500, num_test=20),
    "spaces": Arithmetic(space_probability=0.2, num_examples=500, num_test=20),
    "sorting": Sorting(num_examples=500, num_test=20, test_lengths=(3, 12)),
    "positional or": PositionalOr(max_first=8, max_second=8, test_fraction=0.2, num_test=20, test_lengths=(3, 12)),
}
SIZES = {"train_size": 40, "validation_size": 20, "test_size": 30}
CIRCUITS = {  # their rows hold two texts, and the words of their vocabularies are no <...> tokens
    "indirect objects": Ioi(**SIZES),
    "indirect objects alone": Ioi(pairs=False, **SIZES),
    "later years": GreaterThan(**SIZES),
    "pronouns": GenderedPronoun(**SIZES),
    "expressions": BooleanExpressions(**SIZES),
    "compiled reversal": TracrReverse(),
    "compiled fractions": TracrProportion(),
}
CHAINS = {  # of thought; their padding is a token that they end with
    "products": MultiplicationChain(digits=2, **SIZES),
    "products with hidden chains": MultiplicationChain(digits=4, form="hidden", **SIZES),
    "products without chains": MultiplicationChain(digits=3, form="none", **SIZES),
    "running sums": RunningSums(train_size=None),
    "long running sums": RunningSums(length=16, base=10, form="none", **SIZES),
}
TEXTS = {"text": {}, "text in padded rows": {"packing": "padded", "max_documents": 50}}  # these need files


@pytest.fixture(params=[*TASKS, *LENGTHS, *CIRCUITS, *CHAINS, *TEXTS, "chains in files"])
def any_task(request: pytest.FixtureRequest, tmp_path) -> Task:
    if request.param == "chains in files":
        write_folder_of_chains(CHAINS["products"], tmp_path)
        return ChainFiles(path=str(tmp_path))
    if request.param not in TEXTS:
        return (TASKS | LENGTHS | CIRCUITS | CHAINS)[request.param]
    documents, tokenizer = write_documents(tmp_path / "text.jsonl"), write_tokenizer(tmp_path)
    return Text(path=str(documents), tokenizer=str(tokenizer), length=8, **TEXTS[request.param])


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


@pytest.fixture(params=LENGTHS)
def length_task(request: pytest.FixtureRequest) -> LengthTask:
    return LENGTHS[request.param]


@pytest.fixture(params=CHAINS)
def chain_task(request: pytest.FixtureRequest) -> SymbolChain:
    return CHAINS[request.param]


@pytest.fixture
def dataset(task: Task) -> Dataset:
    return task.build()


def splits(dataset: Dataset) -> dict[str, Split]:
    train = dataset.train
    if isinstance(train, Examples):
        train = train.select(torch.arange(len(train)))
    return {"train": train, **dataset.evaluation}


def assert_equal(one: Dataset, other: Dataset) -> None:
    assert list(splits(one)) == list(splits(other))
    for name, split in splits(one).items():
        for field in ("tokens", "positions", "targets"):
            assert torch.equal(getattr(split, field), getattr(splits(other)[name], field)), (name, field)


def test_two_builds_are_equal(any_task: Task) -> None:
    dataset = any_task.build()
    again = type(any_task).from_dict(json.loads(any_task.canonical_json())).build()
    assert_equal(dataset, again)
    assert again.manifest == dataset.manifest


def test_another_seed_is_another_data_set(task: Task, dataset: Dataset) -> None:
    other = task.with_overrides({"seed": 1}).build()
    assert other.manifest["sha256"] != dataset.manifest["sha256"]
    # Runs whose tasks differ in packable fields train as one program, so their batches must look alike.
    assert task.packable == {"seed"}
    assert other.train.tokens.shape[1:] == dataset.train.tokens.shape[1:]
    assert other.train.targets.shape[1:] == dataset.train.targets.shape[1:]


def test_shapes_and_bounds(any_task: Task) -> None:
    task, dataset = any_task, any_task.build()
    assert len(dataset.vocabulary) == len(set(dataset.vocabulary)) == task.vocab_size
    assert range(task.num_answers)[dataset.answer.columns]
    if dataset.answer.token_kinds is not None:
        assert dataset.answer.token_kinds.shape == (task.vocab_size,)
    assert task.num_train in (None, len(dataset.train))
    for name, split in splits(dataset).items():
        assert len(split) > 0
        if name == "train" or not isinstance(task, LengthTask):
            assert split.tokens.shape == (len(split), task.max_length)
            assert split.positions.shape == split.targets.shape == (len(split), task.num_answers)
        else:
            assert split.tokens.shape[1:] == dataset.evaluation["test"].tokens.shape[1:]
            assert (
                split.positions.shape
                == split.targets.shape
                == (len(split), dataset.evaluation["test"].targets.shape[1])
            )
        assert {t.dtype for t in (split.tokens, split.positions, split.targets)} == {torch.int64}
        assert split.tokens.min() >= 0 and split.tokens.max() < task.vocab_size
        assert split.positions.min() >= 0 and split.positions.max() < split.tokens.shape[1]
        assert ((split.targets == IGNORE) | ((split.targets >= 0) & (split.targets < task.vocab_size))).all()


def test_targets_are_the_tokens_that_follow(task: Task, dataset: Dataset) -> None:
    """The input holds every answer token but the last one, and behind them only padding."""
    padding = dataset.vocabulary.index(PAD) if PAD in dataset.vocabulary else -1
    for split in splits(dataset).values():
        assert torch.equal(split.positions.diff(dim=1), torch.ones_like(split.positions[:, 1:]))
        assert torch.equal(split.tokens.gather(1, split.positions[:, 1:]), split.targets[:, :-1])
        behind = torch.arange(task.max_length) > split.positions[:, -1:]
        assert torch.equal(split.tokens == padding, behind)


def test_the_answer_column_is_no_delimiter(dataset: Dataset) -> None:
    delimiters = {index for index, token in enumerate(dataset.vocabulary) if token in (*SPECIAL_TOKENS, PAD)}
    for split in splits(dataset).values():
        assert not delimiters & set(split.targets[:, dataset.answer.columns].flatten().tolist())


def test_a_prompt_has_one_answer_and_training_rows_are_distinct(dataset: Dataset) -> None:
    answers = defaultdict(set)
    for split in splits(dataset).values():
        for prompt, answer in row_texts(split, dataset.vocabulary):
            answers[prompt].add(answer)
    assert all(len(found) == 1 for found in answers.values())
    train = row_texts(dataset.train, dataset.vocabulary)
    assert len(set(train)) == len(train)


def test_held_out_splits_are_disjoint_from_training(task: Task, dataset: Dataset) -> None:
    train = {prompt for prompt, _ in row_texts(dataset.train, dataset.vocabulary)}
    held_out = {name for name in dataset.evaluation if name.startswith(("test", "validation"))}
    if isinstance(task, ComplexReasoning):
        held_out.add("ood_atomic")
    assert held_out
    seen: dict[str, str] = {}
    for name, split in dataset.evaluation.items():
        prompts = {prompt for prompt, _ in row_texts(split, dataset.vocabulary)}
        assert len(prompts) == len(split)
        assert prompts.isdisjoint(train) if name in held_out else prompts <= train, name
        if name != "test_hard":  # drawn from the same pairs as test_inferred_ood
            assert not any(prompt in seen for prompt in prompts), name
            seen |= dict.fromkeys(prompts, name)


def test_manifest(any_task: Task) -> None:
    task, dataset = any_task, any_task.build()
    manifest = json.loads(json.dumps(dataset.manifest))
    assert type(task).from_dict(manifest["spec"]) == task
    assert manifest["counts"] == {name: len(split) for name, split in splits(dataset).items()}
    assert sum(manifest["train_blocks"].values()) == len(dataset.train)


def test_written_and_read_back_it_is_the_same(task: Task, dataset: Dataset, tmp_path) -> None:
    write_folder(dataset, tmp_path)
    folder = Folder(path=tmp_path, predict_stop=getattr(task, "predict_stop", True))
    loaded = folder.build()
    assert_equal(dataset, loaded)
    assert loaded.manifest["sha256"] == dataset.manifest["sha256"]
    assert loaded.answer.columns == dataset.answer.columns
    assert loaded.vocabulary == (*(token for token in dataset.vocabulary if token != PAD), PAD)
    assert (folder.max_length, folder.num_answers) == (task.max_length, task.num_answers)
    assert folder.vocab_size == len(loaded.vocabulary)
    assert Folder.from_text(folder.canonical_json()) == folder


def test_members_of_a_pack_have_batches_of_one_shape(length_task: LengthTask) -> None:
    rows = torch.tensor([7, 3])
    assert length_task.packable == {"seed"}
    first, other = (task.build() for task in (length_task, length_task.with_overrides({"seed": 1})))
    assert first.manifest["sha256"] != other.manifest["sha256"]
    for field in ("tokens", "positions", "targets"):
        assert getattr(first.train.select(rows), field).shape == getattr(other.train.select(rows), field).shape
        assert {name: getattr(s, field).shape for name, s in first.evaluation.items()} == {
            name: getattr(s, field).shape for name, s in other.evaluation.items()
        }


def test_targets_of_lengths_are_what_follows(length_task: LengthTask) -> None:
    """A next token that is PAD is never a target."""
    for split in splits(length_task.build()).values():
        counted = (split.targets != IGNORE) & (split.positions < split.tokens.shape[1] - 1)
        following = split.tokens.gather(1, (split.positions + 1).clamp(max=split.tokens.shape[1] - 1))
        assert torch.equal(following[counted], split.targets[counted])
        assert (split.targets != 0).all() and (split.targets != IGNORE).any(1).all()


def test_a_grid_cell_of_lengths(length_task: LengthTask) -> None:
    """Its widths are known without making it, and it is the same for every seed of the task."""
    most = length_task.trained_lengths
    for first, second in [(2, 3), (5, 2), (most[0] + 3, most[1] + 2)]:
        cell = length_task.cell(first, second, 10, seed=1)
        prompt, answer = length_task.cell_shape(first, second)
        assert 0 < len(cell) <= 10
        assert int(cell.positions[:, 0].max()) < prompt and cell.targets.shape[1] <= answer
        assert cell.tokens.shape[1] < prompt + answer
        other = length_task.with_overrides({"seed": 5}).cell(first, second, 10, seed=1)
        assert torch.equal(cell.tokens, other.tokens) and torch.equal(cell.targets, other.targets)
    assert length_task.cell(*most, 1, 0).tokens.shape[1] <= length_task.max_length


def test_the_longest_number_of_lengths(length_task: LengthTask) -> None:
    found = {name: longest_run(split.tokens.numpy()) for name, split in splits(length_task.build()).items()}
    assert found.pop("train") <= length_task.longest_number
    assert max(found.values()) <= length_task.longest_test_number
    first, second = length_task.trained_lengths
    cell = longest_run(length_task.cell(first, second, 200, 0).tokens.numpy())
    assert cell <= length_task.longest_number <= cell + 1  # a last carry needs luck


def test_chains_of_another_seed(chain_task: SymbolChain) -> None:
    """They are other ones, and their batches look alike, so that both train as one program."""
    assert chain_task.packable == {"seed"}
    first, other = (task.build() for task in (chain_task, chain_task.with_overrides({"seed": 1})))
    assert first.manifest["sha256"] != other.manifest["sha256"]
    for field in ("tokens", "positions", "targets"):
        assert getattr(first.train, field).shape[1:] == getattr(other.train, field).shape[1:]


def test_chains_have_the_targets_that_follow(chain_task: SymbolChain) -> None:
    end = chain_task.separator
    for split in splits(chain_task.build()).values():
        behind = torch.cat([split.tokens, torch.full((len(split), 1), end)], 1).gather(1, split.positions + 1)
        assert torch.equal(behind[split.targets != IGNORE], split.targets[split.targets != IGNORE])
        assert (split.tokens.gather(1, split.positions[:, :1]) == end).all()


def test_questions_of_chains_are_in_one_split(chain_task: SymbolChain) -> None:
    questions = [
        example.question for name in chain_task.build().manifest["counts"] for example in chain_task.texts(name)
    ]
    assert len(set(questions)) == len(questions)

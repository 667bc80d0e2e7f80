import numpy as np
import pytest
import torch

from groundswell import ConfigError
from tasks.composition import Composition
from tasks.composition_pairs import CORRUPTIONS, PROMPT, CompositionPairs

BASE = Composition(
    num_entities=12, num_relations=6, out_degree=6, phi=3, ood_fraction=0.1, iid_fraction=0.2, predict_stop=False
)
TASK = CompositionPairs(base=BASE)


def walk(prompt):
    """Bridge entity and answer of a question, along the graph's own edges."""
    graph = BASE.graph()
    head, first, second = prompt[0], *(relation - BASE.num_entities for relation in prompt[1:])
    bridge = graph.tails[head][graph.relations[head] == first].item()
    return bridge, graph.tails[bridge][graph.relations[bridge] == second].item()


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_counterparts_differ_as_they_should(corrupt):
    dataset = CompositionPairs(base=BASE, corrupt=corrupt).build()
    for split in (dataset.train_split, *dataset.evaluation.values()):
        assert len(split)
        for row, targets in zip(split.tokens.tolist(), split.targets.tolist(), strict=True):
            clean, other = row[:PROMPT], row[PROMPT:]
            (bridge, answer), (other_bridge, other_answer) = walk(clean), walk(other)
            assert targets == [answer, other_answer]
            assert clean != other
            if corrupt == "same_bridge":
                assert (bridge, clean[2]) == (other_bridge, other[2])
            else:
                assert answer != other_answer
            if corrupt == "bridge":
                assert bridge != other_bridge and clean[2] == other[2]
            if corrupt == "relation":
                assert clean[:2] == other[:2] and clean[2] != other[2]


def test_counterparts_use_trained_edges_only():
    graph = BASE.graph()
    tokens = TASK.build().train_split.tokens[:, PROMPT:].numpy()
    for head, first, second in tokens:
        for entity, relation in ((head, first), (walk([head, first, second])[0], second)):
            assert not graph.ood[entity][graph.relations[entity] == relation - BASE.num_entities]


def test_splits_share_no_question():
    dataset = TASK.build()
    splits = {
        name: {tuple(row[:PROMPT]) for row in split.tokens.tolist()} for name, split in dataset.evaluation.items()
    }
    train = {tuple(row[:PROMPT]) for row in dataset.train_split.tokens.tolist()}
    base = BASE.build()
    seen = {tuple(row[:PROMPT]) for row in base.evaluation["train_inferred"].tokens.tolist()}
    assert train | splits["validation"] == seen and not train & splits["validation"]
    assert splits["held_out"] == {
        tuple(row) for row in base.evaluation["test_inferred_iid"].tokens[:, :PROMPT].tolist()
    }
    assert dataset.vocabulary == base.vocabulary


def test_held_out_questions_can_be_pruned_on():
    dataset = TASK.with_overrides({"split": "test_inferred_iid"}).build()
    train = {tuple(row[:PROMPT]) for row in dataset.train_split.tokens.tolist()}
    held_out = {tuple(row[:PROMPT]) for row in dataset.evaluation["held_out"].tokens.tolist()}
    assert train and held_out and not train & held_out


def test_a_counterpart_depends_on_question_and_seed_alone():
    prompts = TASK.build().train_split.tokens[:, :PROMPT].numpy()
    paths, found = TASK.counterparts(prompts)
    again, _ = TASK.counterparts(prompts[::-1])
    np.testing.assert_array_equal(paths, again[::-1])
    assert found.all()
    other, _ = TASK.with_overrides({"seed": 1}).counterparts(prompts)
    assert (other != paths).any()


def test_without_pairs_the_clean_questions_stay():
    alone, both = TASK.with_overrides({"pairs": False}), TASK
    assert (alone.max_length, both.max_length) == (3, 6)
    torch.testing.assert_close(alone.build().train_split.tokens, both.build().train_split.tokens[:, :PROMPT])


def test_grades():
    split = TASK.build().evaluation["validation"].select(slice(0, 3))
    right, wrong = (torch.nn.functional.one_hot(tokens, TASK.vocab_size).float() * 9 for tokens in split.targets.T)
    logits = torch.stack([right[0], wrong[1], right[2]])[:, None].expand(-1, 2, -1)
    grades = TASK.grade(logits, right[:, None].expand(-1, 2, -1), split)
    for name, expected in {"accuracy": [1, 0, 1], "exact_match": [1, 0, 1], "moved": [0, 1, 0]}.items():
        assert grades[name].tolist() == expected
    assert grades["logit_difference"].tolist() == [9, -9, 9]
    assert grades["kl"][0] == pytest.approx(0, abs=1e-6) and grades["kl"][1] > 1


def test_questions_of_another_graph_are_refused():
    prompts = np.array([[0, BASE.num_entities, 0]])  # no relation stands there
    with pytest.raises(ConfigError, match=r"task.base: a question leads nowhere"):
        TASK.counterparts(prompts)

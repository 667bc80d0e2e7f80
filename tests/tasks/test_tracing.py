"""What tasks tell about their prompts: every counterfactual asks for another answer, and nothing is left to chance."""

import numpy as np
import pytest
import torch

from groundswell.protocols import Dataset
from tasks.comparison import Comparison
from tasks.complex_reasoning import ComplexReasoning
from tasks.composition import Composition
from tasks.folder import Folder, write_folder
from tasks.tracing import Role, TracingExamples

COMPOSITION = Composition(num_entities=25, num_relations=8, out_degree=6, phi=3, iid_fraction=0.1, ood_fraction=0.1)
COMPARISON = Comparison(num_entities=30, num_attributes=4, num_values=6, phi=4, ood_fraction=0.2)
SPLITS = ("train_inferred", "test_inferred_iid", "test_inferred_ood")


def same(one: TracingExamples, other: TracingExamples) -> bool:
    parts = [(one.prompts, other.prompts), (one.answers, other.answers), (one.rows, other.rows)]
    parts += [(one.roles[name].prompts, other.roles[name].prompts) for name in one.roles]
    parts += [(one.readings[name].tokens, other.readings[name].tokens) for name in one.readings]
    return all(torch.equal(a, b) for a, b in parts)


def changed_place(examples: TracingExamples, role: Role, row: int) -> list[int]:
    return torch.nonzero(role.prompts[row] != examples.prompts[row, : role.stop]).flatten().tolist()


@pytest.mark.parametrize("split", SPLITS)
def test_composition_counterfactuals_lead_elsewhere(split: str) -> None:
    dataset, graph = COMPOSITION.build(), COMPOSITION.graph()
    first = COMPOSITION.num_entities
    tails = {(h, first + r): t for h, (rs, ts) in enumerate(zip(graph.relations, graph.tails, strict=True))
             for r, t in zip(rs.tolist(), ts.tolist(), strict=True)}  # fmt: skip
    examples = COMPOSITION.tracing_examples(dataset, split, 40, 0)
    assert len(examples) == min(40, len(dataset.evaluation[split])) > 3
    assert [*examples.roles] == list(examples.position_names) == ["h", "r1", "r2"]
    for row, (h, r1, r2) in enumerate(examples.prompts.tolist()):
        assert int(examples.readings["b"].tokens[row]) == tails[h, r1]
        assert int(examples.readings["r2"].tokens[row]) == r2
        assert int(examples.answers[row]) == tails[tails[h, r1], r2]
        for place, role in enumerate(examples.roles.values()):
            assert (role.start, role.stop) == (place, place + 1)
            for candidate in role.candidates[row].tolist():
                prompt = [h, r1, r2]
                prompt[place] = candidate
                bridge = tails.get((prompt[0], prompt[1]))
                assert tails.get((bridge, prompt[2])) != int(examples.answers[row])
            if role.possible[row]:
                assert changed_place(examples, role, row) == [place]
                assert int(role.prompts[row, place]) in role.candidates[row]


@pytest.mark.parametrize("split", SPLITS)
def test_comparison_counterfactuals_change_the_label(split: str) -> None:
    dataset, world = COMPARISON.build(), COMPARISON.world()
    examples = COMPARISON.tracing_examples(dataset, split, 60, 0)
    places = {"e1": 2, "e2": 4, "a": 0}
    vocabulary = dataset.vocabulary
    for row, (a, _, e1, _, e2) in enumerate(examples.prompts.tolist()):
        attribute = a - COMPARISON.num_entities
        values = world.values[:, attribute]
        label = int(np.sign(values[e1] - values[e2])) + 1
        for name, role in examples.roles.items():
            for candidate in role.candidates[row].tolist() if name != "a" else ():
                one, other = (candidate, e2) if name == "e1" else (e1, candidate)
                assert int(np.sign(values[one] - values[other])) + 1 != label
                assert not world.ood[candidate, attribute]
            if role.possible[row]:
                assert changed_place(examples, role, row) == [places[name]]
        assert vocabulary[examples.readings["val1"].tokens[row]] == f"<{values[e1]}>"
        assert vocabulary[examples.readings["val2"].tokens[row]] == f"<{values[e2]}>"
        for y in range(3):
            assert vocabulary[examples.readings[f"label{y}"].tokens[row]] == f"<attr_{attribute}_{y}>"
        assert examples.answers[row] == examples.readings[f"label{label}"].tokens[row]


@pytest.mark.parametrize("task", [COMPOSITION, COMPARISON])
def test_examples_depend_on_the_data_and_the_seed_alone(task) -> None:
    one = task.tracing_examples(task.build(), "train_inferred", 30, 0)
    assert same(one, task.tracing_examples(task.build(), "train_inferred", 30, 0))
    assert not same(one, task.tracing_examples(task.build(), "train_inferred", 30, 1))
    every = task.tracing_examples(task.build(), "train_inferred", 10**6, 0)
    for place, row in enumerate(one.rows.tolist()):  # an example's draw does not depend on the others
        for name, role in one.roles.items():
            assert torch.equal(role.prompts[place], every.roles[name].prompts[row])


@pytest.mark.parametrize("task", [COMPOSITION, COMPARISON])
def test_a_folder_of_the_same_data_tells_the_same(task, tmp_path) -> None:
    write_folder(task.build(), tmp_path)
    folder = Folder(path=tmp_path)
    assert same(
        task.tracing_examples(task.build(), "train_inferred", 25, 0),
        folder.tracing_examples(folder.build(), "train_inferred", 25, 0),
    )


def test_examples_without_candidates_are_kept_and_marked() -> None:
    """Of two entities with one value, and nobody with a value next to it, none can be replaced."""
    task = Comparison(num_entities=5, num_attributes=6, num_values=12, phi=3, ood_fraction=0, iid_fraction=0)
    examples = task.tracing_examples(task.build(), "train_inferred", 100, 0)
    role = examples.roles["e1"]
    assert not role.possible.all() and len(role.possible) == len(examples)
    for row in np.flatnonzero(~role.possible):
        assert torch.equal(role.prompts[row], examples.prompts[row, : role.stop])


def test_what_cannot_be_traced_is_told(tmp_path) -> None:
    dataset = COMPOSITION.build()
    with pytest.raises(ValueError, match="no evaluation split 'valid'; it has id_atomic"):
        COMPOSITION.tracing_examples(dataset, "valid", 5, 0)
    with pytest.raises(ValueError, match="split: 'id_atomic' has questions that are no compositions"):
        COMPOSITION.tracing_examples(dataset, "id_atomic", 5, 0)
    empty = Dataset(dataset.vocabulary, dataset.train, {"none": dataset.train.select(slice(0, 0))}, dataset.answer, {})
    with pytest.raises(ValueError, match="'none' has no examples"):
        COMPOSITION.tracing_examples(empty, "none", 5, 0)
    complex_task = ComplexReasoning(
        num_entities=20, num_attributes=2, num_values=4, train_fraction=0.5, ood_fraction=0.3
    )
    write_folder(complex_task.build(), tmp_path)
    folder = Folder(path=tmp_path)
    with pytest.raises(ValueError, match="split"):
        folder.tracing_examples(folder.build(), "train_inferred_topleft", 5, 0)

"""The published tracing scripts' own output: counterfactual candidates, ranks of every state and patch, aggregates."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.causal_tracing import per_example as traced
from analysis.causal_tracing import trace
from analysis.logit_lens import lens_ranks, mean_reciprocal_rank
from analysis.logit_lens import per_example as read
from groundswell.protocols import Dataset
from models.decoder import Decoder
from tasks import comparison, composition
from tasks.folder import read_folder
from tasks.tracing import TracingExamples

GOLDEN = Path(__file__).parents[1] / "golden" / "grokking"
OFFSET = 257  # the recorded models have 256 byte tokens and an end of text before the data's own
TASKS = {
    "composition": (composition, "composition_50_10_deg5_seed0", ("h", "r1", "r2"), (50, 300)),
    "comparison": (comparison, "comparison_50_5_10_seed0", ("e1", "e2", "a"), (300,)),
}


def load(name: str) -> dict:
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def published_data(name: str, folder: Path) -> Dataset:
    for file, content in load(TASKS[name][1])["files"].items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return read_folder(folder)


def with_picks(examples: TracingExamples, picks: list[list[str]], names: tuple[str, ...], data: Dataset):
    """The same examples with the recorded counterfactuals in place of ours."""
    ids = {token: index for index, token in enumerate(data.vocabulary)}
    places = {"h": 0, "r1": 1, "r2": 2, "e1": 2, "e2": 4, "a": 0}
    roles = {}
    for index, name in enumerate(names):
        role = examples.roles[name]
        prompts = role.prompts.clone()
        prompts[:, places[name]] = torch.tensor([ids[f"<{picked[index]}>"] for picked in picks])
        roles[name] = replace(role, prompts=prompts)
    return replace(examples, roles=roles)


def shifted(examples: TracingExamples) -> TracingExamples:
    """In the token ids of the recorded models."""
    return replace(
        examples,
        prompts=examples.prompts + OFFSET,
        answers=examples.answers + OFFSET,
        readings={k: replace(r, tokens=r.tokens + OFFSET) for k, r in examples.readings.items()},
        roles={k: replace(r, prompts=r.prompts + OFFSET) for k, r in examples.roles.items()},
    )


@pytest.mark.parametrize("name", TASKS)
def test_examples_and_candidates_are_the_published_ones(name: str, tmp_path: Path) -> None:
    module, _, names, _ = TASKS[name]
    recorded, data = load(f"trace_{name}"), published_data(name, tmp_path)
    examples = module.tracing_examples(data, "train_inferred", 5, 0)
    assert examples.rows.tolist() == [example["test_index_in_split"] for example in recorded["examples"][:5]]
    for row, example in enumerate(recorded["examples"][:5]):
        tokens = [*examples.prompts[row].tolist(), int(examples.answers[row])]
        assert "".join(data.vocabulary[token] for token in tokens) + "</a>" == example["target_text"]
    for index, role_name in enumerate(names):
        role = examples.roles[role_name]
        for row, example in enumerate(recorded["examples"][:5]):
            found = {data.vocabulary[token].strip("<>") for token in role.candidates[row]}
            assert found == set(example["picks"][index]["candidates"])


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, (*_, steps) in TASKS.items() for step in steps])
def test_ranks_and_aggregates_are_the_published_ones(name: str, step: int, tmp_path: Path) -> None:
    module, _, names, _ = TASKS[name]
    recorded, data = load(f"trace_{name}"), published_data(name, tmp_path)
    checkpoint = recorded["checkpoints"].index(str(step))
    picks = [
        [pick["picked"] for pick in example["picks"]]
        for example in recorded["examples"]
        if example["checkpoint"] == f"checkpoint-{step}"
    ]
    examples = shifted(with_picks(module.tracing_examples(data, "train_inferred", 5, 0), picks, names, data))
    weights = load_file(GOLDEN / f"trace_{name}_ckpt{step}.safetensors")
    model = Decoder(num_layers=8, num_heads=4, width=32, num_positions=16)
    rows = len(weights["transformer.wte.weight"])
    parameters = {spec.name: weights[spec.name].unsqueeze(0) for spec in model.parameters(rows, 16)}

    ours = [
        lens | patches
        for lens, patches in zip(
            read(lens_ranks(model, parameters, examples), examples),
            traced(trace(model, parameters, examples), examples),
            strict=True,
        )
    ]
    assert ours == recorded["results"][checkpoint]
    for key, values in recorded["aggregated_by_visualization_cell"].items():
        ranks = np.array([record[key] for record in ours])
        aggregate = mean_reciprocal_rank(ranks) if "rank" in key else np.mean(ranks != 0)
        assert float(aggregate) == pytest.approx(values[checkpoint], abs=1e-12)

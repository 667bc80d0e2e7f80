"""Does the circuit of two-hop composition pass through the bridge entity? A circuit that was pruned out of a network,
beside what causal tracing and the logit lens see in the whole network (arXiv 2405.15071, section 3.3).

Shapes: N examples, L layers, E edges. Layers count from 1 in names and figures, 0 is the embeddings.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from analysis.circuit_evaluation import GradedTask, choose_split, evaluate
from analysis.circuit_tracing import CircuitRunner, interchange, strengths
from analysis.logit_lens import mean_reciprocal_rank
from groundswell.experiment import Experiment
from groundswell.probes import Findings, Opened, Probe
from groundswell.training.pack import dataset_of
from models.edge_graph import LAST_READER, EdgeGraph
from models.edge_masked import EdgeMasked
from models.edge_masks import Circuit, binary_circuit, effective_mask
from models.edge_network import EdgeNetwork
from tasks.composition_pairs import CORRUPTIONS, PROMPT, R1, CompositionPairs
from tasks.tracing import TracingExamples

NETWORKS = ("whole", "circuit")
INTERCHANGES = {"moved": "bridge", "kept": "same_bridge"}  # measure -> whose states at r1 are put in


class BridgeInCircuit(Probe):
    """Of the whole network and of the circuit, layer by layer: can the bridge entity be read at r1, what hangs on each
    state, and does a state at r1 say which bridge entity it is and nothing else?

    Scalars, <network> being whole or circuit: `bridge/<network>/mrr/layer_<l>`, of the bridge entity at r1;
    `bridge/<network>/strength/<role>/layer_<l>`, causal strength on the answer, as in CausalTracing;
    `bridge/<network>/moved/layer_<l>`: share of questions that are answered as if from the other bridge entity whose
    state is put at r1; `.../kept/...`: share still answered alike with the state of another h and r1 but the same
    bridge entity. `bridge/circuit/<corruption>/<measure>`: the circuit judged on each kind of counterpart;
    `bridge/circuit/num_edges`.
    """

    headlines: ClassVar[tuple[str, ...]] = ("bridge/circuit/num_edges", "bridge/circuit/all/*")

    split: str = Field("validation", description="split of pairs")
    num_examples: int = Field(300, gt=0, description="questions that are traced: those of CausalTracing at this seed")
    seed: int = Field(0, ge=0, description="of the choice of traced questions")
    edge_sparsity: float | None = Field(None, ge=0, lt=1, description="of the circuit; none: that of the soft masks")

    def objection(self, experiment: Experiment) -> str | None:
        if not isinstance(experiment.model, EdgeMasked):
            return f"model {type(experiment.model).__name__} has no edge masks; prune it with EdgeMasked"
        if not isinstance(experiment.task, CompositionPairs) or not experiment.task.pairs:
            return f"task {type(experiment.task).__name__} has no pairs with bridge entities; use CompositionPairs"
        return None

    def run(self, opened: Opened) -> Findings:
        model, task = opened.experiment.model, opened.experiment.task
        assert isinstance(model, EdgeMasked) and isinstance(task, CompositionPairs)
        circuit = binary_circuit(model, opened.parameters, 0, self.edge_sparsity)
        network, dataset = model.frozen(opened.device), dataset_of(task.base.canonical_json())
        examples = task.base.tracing_examples(dataset, task.split, self.num_examples, self.seed)
        graph = network.graph
        whole = Circuit(graph, torch.ones(graph.num_edges), torch.ones(graph.num_writers))
        table = pd.concat(
            [
                inside(network, chosen, task, examples).assign(network=name)
                for name, chosen in zip(NETWORKS, (whole, circuit), strict=True)
            ],
            ignore_index=True,
        )
        judged = pd.DataFrame(judge(network, circuit, task, self.split))
        scalars = _scalars(table) | {
            f"bridge/circuit/{row['corruption']}/{name}": row[name]
            for row in judged.to_dict("records")
            for name in ("kl", "exact_match", "accuracy")
        }
        scalars["bridge/circuit/num_edges"] = circuit.num_edges
        density, stages = stage_matrix(circuit)
        return Findings(
            scalars,
            {"density": density},
            {
                "layers": table,
                "corruptions": judged,
                "stages": pd.DataFrame(density, stages, stages).reset_index(names="writes"),
            },
        )


# ---- measures ----


def inside(network: EdgeNetwork, circuit: Circuit, task: CompositionPairs, examples: TracingExamples) -> pd.DataFrame:
    """One row a measure and layer: measure (mrr, strength/<role>, moved, kept), layer, value."""
    prompts = examples.prompts.numpy()
    runner = CircuitRunner(network, circuit, _prompts_of(task.counterparts(prompts, "all")[0]))
    reading = examples.readings["b"]
    found: dict[str, tuple[int, np.ndarray]] = {}
    lens = runner.lens(runner.run(examples.prompts), reading.position, reading.tokens)
    found["mrr"] = 0, mean_reciprocal_rank(lens)
    found |= {f"strength/{role}": (1, values) for role, values in strengths(runner, examples).items()}
    for measure, corruption in INTERCHANGES.items():
        paths, possible = task.counterparts(prompts, corruption)  # type: ignore[arg-type]
        kept = torch.from_numpy(np.flatnonzero(possible))
        mine = CircuitRunner(network, circuit, _prompts_of(task.counterparts(prompts[possible], "all")[0]))
        expected = torch.from_numpy(paths[possible][:, PROMPT])
        others, answers = _prompts_of(paths[possible]), examples.answers[kept]
        found[measure] = 1, interchange(mine, examples.prompts[kept], others, R1, answers, expected)
    rows = [
        {"measure": measure, "layer": first + index, "value": value}
        for measure, (first, values) in found.items()
        for index, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def _prompts_of(paths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(paths[:, :PROMPT]))


def judge(network: EdgeNetwork, circuit: Circuit, task: CompositionPairs, split: str) -> list[dict[str, object]]:
    """The circuit's measures, means over a split, for each kind of counterpart."""
    rows: list[dict[str, object]] = []
    for corruption in CORRUPTIONS:
        asked = task.with_overrides({"corrupt": corruption})
        assert isinstance(asked, GradedTask)
        pairs = choose_split(dataset_of(asked.canonical_json()), split)
        means = {name: float(values.mean()) for name, values in evaluate(network, circuit, asked, pairs).items()}
        rows.append({"corruption": corruption, "n": len(pairs), **means})
    return rows


def _scalars(table: pd.DataFrame) -> dict[str, float]:
    rows = table.dropna(subset=["value"]).to_dict("records")
    return {f"bridge/{row['network']}/{row['measure']}/layer_{row['layer']}": float(row["value"]) for row in rows}


def stage_matrix(circuit: Circuit) -> tuple[np.ndarray, list[str]]:
    """Share of the edges between stages that are kept [writing stages, reading stages], NaN where there are none, and
    the names of the stages: emb, A1, M1, ..., out."""
    graph = circuit.graph
    stages = ["emb", *(f"{part}{layer + 1}" for layer in range(graph.num_layers) for part in "AM"), "out"]
    kept, total = np.zeros((2, len(stages), len(stages)))
    masks = effective_mask(graph, circuit.mask, circuit.nodes).tolist()
    for (writer, reader), mask in zip(graph.edges, masks, strict=True):
        place = stages.index(_stage(writer, graph)), stages.index(_stage(reader, graph))
        kept[place] += mask > 0
        total[place] += 1
    return np.divide(kept, total, out=np.full_like(kept, np.nan), where=total > 0), stages


def _stage(name: str, graph: EdgeGraph) -> str:
    if name in graph.embeddings:
        return "emb"
    if name == LAST_READER:
        return "out"
    return f"{name[0].upper()}{int(name[1:].split('.')[0]) + 1}"

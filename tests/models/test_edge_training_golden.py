"""Training runs of the published Edge Pruning code with recorded noise, replayed by our model, objective and optimizer.

There the reference answers and the corrupted states come from masks of 0.9999938, ours from the network itself. Where
all steps of a run are compared both are computed as there: AdamW makes of a small gradient as much as of a large one.
"""

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from groundswell import AdamW
from groundswell.experiment import ParameterGroup
from groundswell.protocols import IGNORE, Answer, Split
from groundswell.training.flat import FlatParameters, PackedAdamW, assign_groups, layout
from models import edge_masked, edge_reference, hard_concrete
from models.edge_masked import EDGE_MULTIPLIERS, EDGES, NODE_MULTIPLIERS, NODES, EdgeMasked
from models.edge_objective import EdgePruning
from models.edge_original import multiplier_pair
from tests.models.edge_golden import arrays, notes, tensors_under, vectors, write_network

RUNS = ("ioi_emb_nonode", "ioi_noemb_node", "gt_emb_nonode", "gp_emb_node", "custom_noemb_nonode")


class Recorded(EdgeMasked):
    """Edge masks whose noise was recorded."""

    noise: ClassVar[dict[str, Tensor]] = {}

    def sample(self, parameters, generators):
        return tuple(hard_concrete.sample(parameters[name], self.noise[name][None]) for name in (EDGES, NODES))


class SoftReferences(Recorded):
    """With reference runs as they are there."""

    def soft_run(self, tokens):
        """tokens [1, B, T] -> the last reader's input and the writers, all masks 0.9999938, no corrupted run."""
        network = self.frozen("cpu")
        masks = [torch.full((1, n), 12.0).sigmoid() for n in (network.graph.num_edges, network.graph.num_writers)]
        return edge_reference.masked_stream(network, *masks, tokens, None)

    @torch.no_grad()
    def whole_logits(self, tokens, positions):
        final, _ = self.soft_run(self.inputs(tokens)[0])
        rows = torch.arange(len(final))[:, None]
        return self.frozen("cpu").logits(final[rows, positions[0]])[None]

    def masked_logits(self, edges, nodes, tokens, positions):
        clean, corrupted = self.inputs(tokens)
        with torch.no_grad():
            writers = self.soft_run(corrupted)[1]
        network = self.frozen("cpu")
        form = edge_masked.FORMS[self.form]
        return form(network, edges, nodes, clean, corrupted, positions, corrupted_writers=writers)


def parameters_under(name, prefix, graph):
    edges, nodes = vectors(name, prefix, graph)
    tensors = tensors_under(name, prefix)
    return {
        EDGES: edges,
        NODES: nodes,
        EDGE_MULTIPLIERS: multiplier_pair(tensors, "edges"),
        NODE_MULTIPLIERS: multiplier_pair(tensors, "nodes"),
    }


def optimizer_of(lr_edges, lr_nodes, lr_edge_multipliers, lr_node_multipliers, warmup):
    def group(match, lr, ascent=False):
        return ParameterGroup(match=match, lr=lr, ascent=ascent)

    return AdamW(
        weight_decay=0.01,
        warmup_steps=warmup,
        schedule="linear",
        clip_norm=0,
        groups=(
            group(EDGES, lr_edges),
            group(NODES, lr_nodes),
            group(EDGE_MULTIPLIERS, lr_edge_multipliers, ascent=True),
            group(NODE_MULTIPLIERS, lr_node_multipliers, ascent=True),
        ),
    )


class Replay:
    """One recorded run, step by step."""

    def __init__(self, name, prefix, model, objective, optimizer, batch, answer):
        self.name, self.prefix, self.model, self.objective = name, prefix, model, objective
        self.batch, self.answer = batch, answer
        self.graph = model.frozen("cpu").graph
        specs = assign_groups(model.parameters(0, 0), optimizer)
        self.parameters = FlatParameters(specs, torch.zeros(1, layout(specs).row_size))
        for tensor, values in parameters_under(name, f"{prefix}init/", self.graph).items():
            self.parameters.views[tensor].data[0] = values
        self.optimizer = PackedAdamW(self.parameters, [optimizer], total_updates=12)

    def step(self, number):
        """-> metrics, gradients."""
        noise = vectors(self.name, f"{self.prefix}u/{number}/", self.graph)
        Recorded.noise.update({EDGES: noise[0], NODES: noise[1]})
        scheduled = {k: torch.tensor([v]) for k, v in self.objective.scheduled(number, 12).items()}
        self.parameters.grad.zero_()
        loss, metrics = self.objective.loss(
            self.model, self.parameters.views, self.batch, self.answer, [torch.Generator()], scheduled
        )
        loss.sum().backward()
        gradients = {name: view.grad[0].clone() for name, view in self.parameters.views.items()}
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in {"loss": loss, **metrics}.items()}, gradients

    def check_gradients(self, number, gradients):
        for tensor, expected in parameters_under(self.name, f"{self.prefix}grad/{number}/", self.graph).items():
            if tensor == NODE_MULTIPLIERS and not self.objective.node_loss:
                assert not gradients[tensor].any()  # recorded, but left out of the optimizer there
            else:
                torch.testing.assert_close(gradients[tensor], expected, rtol=1e-3, atol=2e-6)

    def check_final(self, gradients):
        for tensor, expected in parameters_under(self.name, f"{self.prefix}final/", self.graph).items():
            # AdamW divides a gradient by its size: what is rounding there is not compared
            clear = gradients[tensor].abs() > 1e-6
            torch.testing.assert_close(
                self.parameters.views[tensor].detach()[0][clear], expected[clear], rtol=1e-4, atol=5e-3
            )


def gpt2_batch(task):
    recorded = arrays("gpt2_tiny_train")
    clean, starts = recorded["input_ids"], recorded["start_idxes"]
    ends = recorded["end_idxes"] if task in ("ioi", "custom") else starts + 1
    longest = int((ends - starts).max())
    positions = starts[:, None] + torch.arange(longest)
    inside = positions < ends[:, None]
    positions = torch.where(inside, positions, starts[:, None])
    targets = clean.gather(1, positions + 1).masked_fill(~inside, IGNORE)
    tokens = torch.cat([clean, recorded["corr_input_ids"]], 1)
    kinds = torch.full((61,), -1)
    kinds[recorded["digit_token_ids"]] = 0
    return Split(tokens[None], positions[None], targets[None]), Answer(slice(0, longest), kinds)


def gpt2_replay(run, model_class, form, folder):
    recorded = notes("gpt2_tiny_train")[run]
    hyper, task = recorded["hyper"], recorded["task"]
    path = write_network("gpt2", folder)
    model = model_class(path=str(path), mask_embeddings=recorded["with_embedding_nodes"], form=form)
    objective = EdgePruning(
        target=hyper["target_edge"], start=hyper["start_edge"],
        node_target=hyper["target_node"], node_start=hyper["start_node"],
        warmup_steps=hyper["sparsity_warmup"], node_loss=not recorded["disable_node_loss"],
        answer_space="candidates" if task == "gt" else "vocabulary",
    )  # fmt: skip
    optimizer = optimizer_of(
        hyper["edges_lr"], hyper["layers_lr"], hyper["reg_edges_lr"], hyper["reg_layers_lr"], hyper["warmup_steps"]
    )
    return Replay("gpt2_tiny_train", f"{run}/", model, objective, optimizer, *gpt2_batch(task))


def assert_metrics(metrics, expected, objective):
    pairs = {"loss": "loss", "kl": "kl", "edge_loss": "edge_loss", "edge_sparsity": "model_edge_sparsity",
             "target": "target_edge"}  # fmt: skip
    if objective.node_loss:
        pairs |= {"node_loss": "node_loss", "node_target": "target_node"}
    found = {name: metrics[name] for name in pairs}
    assert found == pytest.approx({name: expected[key] for name, key in pairs.items()}, rel=1e-5, abs=1e-5)
    # the position embedding's node has a gradient of rounding only, and follows that by AdamW
    if "model_node_sparsity" in expected:
        assert metrics["node_sparsity"] == pytest.approx(expected["model_node_sparsity"], abs=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_recorded_gpt2_runs(run, tmp_path):
    replay = gpt2_replay(run, SoftReferences, "reference", tmp_path)
    for number, expected in enumerate(notes("gpt2_tiny_train")[run]["steps"]):
        metrics, gradients = replay.step(number)
        assert_metrics(metrics, expected, replay.objective)
        if number in (0, 5):
            replay.check_gradients(number, gradients)
    replay.check_final(gradients)


@pytest.mark.parametrize("form", ["reference", "fast"])
@pytest.mark.parametrize("run", RUNS)
def test_losses_and_gradients_with_references_of_our_own(run, form, tmp_path):
    replay = gpt2_replay(run, Recorded, form, tmp_path)
    for number, expected in enumerate(notes("gpt2_tiny_train")[run]["steps"][:2]):  # the first rate is 0
        metrics, gradients = replay.step(number)
        assert_metrics(metrics, expected, replay.objective)
        if number == 0:
            replay.check_gradients(0, gradients)


def test_target_schedules():
    recorded = notes("gpt2_tiny_train")["target_schedule"]
    for name, target, warmup in (("linear", 0.98, 2500), ("logarithmic", 0.98, 2500), ("linear_1.2", 1.2, 5500)):
        objective = EdgePruning(target=target, warmup_steps=warmup, schedule=name.removesuffix("_1.2"))
        found = [objective.scheduled(step, 0)["target"] for step, _ in recorded[name]]
        assert found == pytest.approx([value for _, value in recorded[name]], abs=1e-9)


def test_penalties():
    objective = EdgePruning()
    for sparsity, target, l1, l2, loss in notes("gpt2_tiny_train")["lagrangian_s_t_l1_l2_loss"]:
        excess, multipliers = torch.tensor([sparsity - target]), torch.tensor([[l1, l2]])
        assert float(objective._penalty(excess, multipliers)) == pytest.approx(loss, abs=1e-6)
        without = EdgePruning(use_l1=False)._penalty(excess, multipliers)
        assert float(without) == pytest.approx(l2 * (sparsity - target) ** 2, abs=1e-6)


@pytest.mark.parametrize(("kind", "form"), [(SoftReferences, "reference"), (Recorded, "reference"), (Recorded, "fast")])
def test_the_recorded_llama_run(kind, form, tmp_path):
    recorded, data = notes("llama_tiny_cases")["train"], arrays("llama_tiny_cases")
    hyper = recorded["hyper"]
    folder = write_network("llama", tmp_path)
    model = kind(path=str(folder), mask_embeddings=False, form=form, eps=1e-8)
    objective = EdgePruning(target=hyper["target_edge"], warmup_steps=hyper["sparsity_warmup"])
    optimizer = optimizer_of(
        hyper["third_group_read"], hyper["first_group_write"], hyper["reg_edges"], hyper["reg_nodes"], hyper["warmup"]
    )
    positions = data["train/idxes"][:, None]
    tokens = torch.cat([data["input_ids"], data["corr_input_ids"]], 1)
    targets = data["input_ids"].gather(1, (positions + 1).clamp(max=data["input_ids"].shape[1] - 1))
    batch = Split(tokens[None], positions[None], targets[None])
    replay = Replay("llama_tiny_cases", "train/", model, objective, optimizer, batch, Answer(slice(0, 1)))
    for number, expected in enumerate(recorded["steps"]):
        metrics, gradients = replay.step(number)
        if number < 2 or kind is SoftReferences:
            assert_metrics(metrics, expected, objective)
            if number in (0, 4):
                replay.check_gradients(number, gradients)
    if kind is SoftReferences:
        replay.check_final(gradients)

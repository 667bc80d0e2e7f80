"""Edge Pruning runs as the paper sets them up, for the presets beside this file."""

from __future__ import annotations

from groundswell import AdamW, Budget, Checkpointing, Every, Experiment, Scaling
from groundswell.planning.strategies import Extra, PlanExtras
from models.edge_planning import FROZEN
from models.edge_pruning_costs import Form, Graph, extra
from models.objectives import AnswerLoss
from models.transformers_model import TransformersModel
from tasks.random_tokens import RandomTokens


def pruning(
    model: TransformersModel, vocabulary: int, batch: int, length: int, steps: int, examples: int, precision: str
) -> Experiment:
    return Experiment(
        task=RandomTokens(vocabulary=vocabulary, length=length, answers=1, num_examples=examples),
        model=model,
        objective=AnswerLoss(),
        optimizer=AdamW(lr=0.8, weight_decay=0.01, warmup_steps=200, schedule="linear", groups=FROZEN),
        budget=Budget(steps=steps, batch_size=batch),
        checkpointing=Checkpointing(schedule=Every(every=512), keep="last"),
        scaling=Scaling.from_dict({"precision": precision}),
    )


def codellama(num_layers: int, num_heads: int, width: int, mlp_width: int) -> Experiment:
    """Few-shot Boolean expressions, 72 tokens, one example on each of 32 GPUs."""
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "width": width, "mlp_width": mlp_width}
    fields = sizes | {"architecture": "llama", "num_positions": 16_384, "rope_theta": 1e6}
    return pruning(TransformersModel.from_dict(fields), 32_016, 32, 72, 6_000, 8_000, "bf16")


def extras(form: Form, embeddings: tuple[str, ...]) -> PlanExtras:
    def of(experiment: Experiment, micro_batch: int) -> Extra:
        model = experiment.model
        assert isinstance(model, TransformersModel)
        kv_heads = model.num_kv_heads or model.num_heads
        graph = Graph(model.num_layers, model.num_heads, kv_heads, embeddings, model.width)
        element = 2 if experiment.scaling.precision == "bf16" else 4
        return extra(graph, form, micro_batch, experiment.task.max_length, element)

    return of

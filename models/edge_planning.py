"""What `groundswell plan` measures for edge masks: the frozen network as an ordinary one, and what the masks add."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from groundswell.config import ConfigError
from groundswell.experiment import Experiment, ParameterGroup
from groundswell.planning.strategies import Extra, PlanExtras
from groundswell.protocols import Model
from models import edge_llama, huggingface
from models.decoder import Decoder
from models.edge_pruning_costs import Form, Graph, extra
from models.objectives import AnswerLoss
from models.transformers_model import TransformersModel
from tasks.random_tokens import RandomTokens

if TYPE_CHECKING:
    from models.edge_masked import EdgeMasked

FROZEN = (ParameterGroup(match=".", frozen=True),)  # only the masks are trained; they are in the extra


def stand_in(model: EdgeMasked, experiment: Experiment) -> tuple[Experiment, PlanExtras]:
    """Raises ConfigError for a network that is no transformer of usual form."""
    task, outline, rough = experiment.task, model.outline, model.dtype == "bfloat16"
    length = task.max_length // 2 if model.pairs else task.max_length
    form: Form = "fast" if model.form == "fast" else "published"
    graph = Graph(
        outline.graph.num_layers, outline.graph.num_heads, outline.graph.num_kv_heads, outline.graph.embeddings,
        outline.width,
    )  # fmt: skip
    changes = {
        "task": RandomTokens(
            vocabulary=outline.num_outputs, length=length, answers=task.num_answers, num_examples=task.num_train or 1
        ),
        "model": _plain(Path(model.path), graph),
        "objective": AnswerLoss(),
        "optimizer.groups": FROZEN,
        "scaling.precision": "bf16" if rough else experiment.scaling.precision,
        "scaling.device": "auto",
    }

    def extras(_: Experiment, micro_batch: int) -> Extra:
        return extra(graph, form, micro_batch, length, 2 if rough else 4)

    return experiment.with_overrides(changes), extras


def _plain(folder: Path, graph: Graph) -> Model:
    """The network in the folder, from its configuration alone."""
    config = huggingface.read_config(folder)
    family, hidden = config.get("model_type"), config.get("intermediate_size", config.get("n_inner"))
    if family == "groundswell_decoder":
        return Decoder.from_huggingface(folder)
    if family != "gpt2" and family not in edge_llama.FAMILIES:
        raise ConfigError(f"{folder}: model_type '{family}' is not planned for; it is small enough to be tried")
    return TransformersModel(
        architecture="gpt2" if family == "gpt2" else "llama",
        num_layers=graph.num_layers,
        num_heads=graph.num_heads,
        num_kv_heads=None if family == "gpt2" else graph.num_kv_heads,
        width=graph.width,
        mlp_width=hidden,
        num_positions=config.get("n_positions", config.get("max_position_embeddings")),
    )

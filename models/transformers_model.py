"""Causal language models of Hugging Face transformers: Llama and GPT-2 by their sizes, or what a local folder holds.

The network is transformers' own, parameter names included, so folders are exchanged with it as they are.
Shapes: K runs, B batch rows, T tokens, A answer positions, V vocabulary, d width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from groundswell.config import ConfigError
from groundswell.protocols import Model, Network, Parameters, ParameterSpec, Task
from models import huggingface, transformers_folder
from models.layers import take
from models.weight_files import WeightFiles

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedConfig, PreTrainedModel

# Where a family keeps its blocks. Those of the second kind are Llamas but for sliding windows and biases.
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "mistral": "model.layers", "qwen2": "model.layers"}
EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight")
LLAMA_MLP_MULTIPLE = 8  # widths that are multiples of 8 suit tensor cores
_OF_FOLDER = (  # fields that a folder decides
    "architecture", "num_layers", "num_heads", "num_kv_heads", "width", "mlp_width", "num_positions", "rope_theta",
    "tied_head", "init_std",
)  # fmt: skip


class TransformersModel(Model):
    """A causal language model of transformers. Dropout is always 0: its masks come from torch's global generator, so
    runs of one experiment would differ with the number of workers that they are spread over.

    A folder must not change while runs that name it are compared or resumed.
    """

    packable: ClassVar[frozenset[str]] = frozenset({"init_std"})

    path: str | None = Field(
        None, description="local folder of a llama, mistral, qwen2 or gpt2; it decides architecture and sizes"
    )
    pretrained: bool = Field(True, description="start from the folder's weights; False takes its configuration only")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="torch's fused kernels, or plain matrix products")
    architecture: Literal["llama", "gpt2"] = "llama"
    num_layers: int = Field(2, gt=0)
    num_heads: int = Field(4, gt=0, description="attention heads; must divide width")
    num_kv_heads: int | None = Field(None, gt=0, description="of keys and values (llama); default num_heads")
    width: int = Field(128, gt=0, description="size of the residual stream")
    mlp_width: int | None = Field(
        None, gt=0, description="hidden units of the MLP; default 4 * width (gpt2), 8/3 * width up to a multiple of 8"
    )
    num_positions: int = Field(1024, gt=0, description="longest sequence; rows of the position table of gpt2")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies (llama)")
    tied_head: bool | None = Field(
        None, description="the token embedding is also the output matrix; default as released: gpt2 yes, llama no"
    )
    init_std: float = Field(
        0.02, gt=0, description="of initial weights; c_proj of gpt2: divided by sqrt(2 * num_layers)"
    )

    @model_validator(mode="after")
    def _check(self) -> TransformersModel:
        if self.path is not None:
            for name in _OF_FOLDER:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is decided by the folder in path; leave one of the two out")
            return self
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; choose a divisor")
        if self.architecture == "gpt2":
            if self.num_kv_heads is not None:
                raise ValueError("num_kv_heads is a field of llama; leave it out or set architecture=llama")
        elif self.width // self.num_heads % 2:
            raise ValueError(
                f"num_heads {self.num_heads} gives heads of {self.width // self.num_heads} dimensions; rotary "
                "positions need an even number"
            )
        if self.num_heads % (self.num_kv_heads or 1):
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        return self

    def check(self, task: Task) -> None:
        num_positions = self.num_positions
        if self.path is not None:
            vocab_size, num_positions = transformers_folder.sizes(Path(self.path), BLOCKS)
            if vocab_size < task.vocab_size:
                raise ValueError(
                    f"model.path: the network has {vocab_size} tokens, the task {task.vocab_size}; use the tokenizer "
                    "of the same folder for the task, or set the model's sizes instead of model.path"
                )
        if num_positions < task.max_length:
            field, remedy = ("path", "shorten the task's rows") if self.path else ("num_positions", "raise it")
            raise ValueError(
                f"model.{field}: {num_positions} positions are less than the task's {task.max_length}; {remedy}"
            )

    # ---- the network ----

    def config(self, vocab_size: int) -> PreTrainedConfig:
        """transformers' configuration. With a folder, V is the folder's. Raises ConfigError for an unusable folder."""
        if self.path is not None:
            config = transformers_folder.read_config(Path(self.path), BLOCKS)
        else:
            config = self._config_of_sizes(vocab_size)
        for name in transformers_folder.DROPOUTS & vars(config).keys():
            setattr(config, name, 0.0)
        # A padding token would get no gradients, and every batch would be searched for it.
        config.pad_token_id = None
        config._attn_implementation = self.attention
        return config

    def _config_of_sizes(self, vocab_size: int) -> PreTrainedConfig:
        from transformers import GPT2Config, LlamaConfig

        shared: dict[str, Any] = {
            "vocab_size": vocab_size,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": self.init_std,
        }
        if self.architecture == "gpt2":
            return GPT2Config(
                n_layer=self.num_layers,
                n_head=self.num_heads,
                n_embd=self.width,
                n_inner=self.mlp_width,
                n_positions=self.num_positions,
                tie_word_embeddings=self.tied_head is not False,
                **shared,
            )
        multiple = LLAMA_MLP_MULTIPLE  # 8/3 * width: as many weights as GPT-2's MLP (Touvron et al. 2023, section 2.2)
        return LlamaConfig(
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            hidden_size=self.width,
            intermediate_size=self.mlp_width or -(-8 * self.width // (3 * multiple)) * multiple,
            max_position_embeddings=self.num_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=bool(self.tied_head),
            **shared,
        )

    def network(self, vocab_size: int, max_length: int) -> Network:
        """A module of its own; its parameters are on the meta device. Raises ConfigError for an unusable folder."""
        return TransformersNetwork(self.config(vocab_size))

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        """In the network's order. Matrices and embeddings are decayed; norms and biases are not."""
        network = _shared_network(self, vocab_size)
        std = network.config.initializer_range
        residual_std = std / math.sqrt(2 * len(network.blocks))  # GPT-2's c_proj
        specs = []
        for name, tensor in network.named_parameters():
            if tensor.dim() > 1:
                scaled = network.config.model_type == "gpt2" and name.endswith("c_proj.weight")
                specs.append(ParameterSpec(name, tuple(tensor.shape), True, residual_std if scaled else std))
            else:
                value = 1.0 if name.endswith("weight") else 0.0  # of norms; biases
                specs.append(ParameterSpec(name, tuple(tensor.shape), False, None, value))
        return specs

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """tokens [K, B, T], positions [K, B, A] -> logits [K, B, A, V], run after run."""
        network = _shared_network(self, _vocab_size(parameters))
        if len(tokens) == 1:
            weights = {name: tensor.squeeze(0) for name, tensor in parameters.items()}
            return functional_call(network, weights, (tokens[0], positions[0])).unsqueeze(0)
        runs = zip(*(tensor.unbind(0) for tensor in parameters.values()), strict=True)
        logits = [
            functional_call(network, dict(zip(parameters, run, strict=True)), (tokens[k], positions[k]))
            for k, run in enumerate(runs)
        ]
        return torch.stack(logits)

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """Matrix-multiply FLOPs of one forward pass: projections and MLP 2 a weight and token, scores and mixing
        4 T^2 a layer and attention dimension (nothing is saved by the causal mask), the head at answer positions."""
        network = _shared_network(self, vocab_size)
        config = network.config
        heads, width = config.num_attention_heads, config.hidden_size
        attended = heads * (getattr(config, "head_dim", None) or width // heads)
        weights = sum(t.numel() for block in network.blocks for t in block.parameters() if t.dim() > 1)
        attention = 4.0 * length * length * attended * len(network.blocks)
        return 2.0 * length * weights + attention + 2.0 * num_answers * width * config.vocab_size

    # ---- folders ----

    def initial_weights(self, vocab_size: int, max_length: int) -> WeightFiles | None:
        if self.path is None or not self.pretrained:
            return None
        return self._reader(Path(self.path), vocab_size, max_length)

    def _reader(self, folder: Path, vocab_size: int, max_length: int) -> WeightFiles:
        specs = self.parameters(vocab_size, max_length)
        reader = WeightFiles(folder, [spec.name for spec in specs])
        for spec in specs:
            if reader.shape(spec.name) != spec.shape:
                raise ConfigError(
                    f"{reader.path(spec.name)}: {spec.name} is {list(reader.shape(spec.name))}, the model needs "
                    f"{list(spec.shape)}; set the model's fields, or use the task, that the folder was written with"
                )
        return reader

    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write a folder for AutoModelForCausalLM, with vocabulary.json and the tokenizer files of `path` beside it.

        Raises ConfigError where the vocabulary has more tokens than the embedding has rows.
        """
        rows = _vocab_size({name: tensor.unsqueeze(0) for name, tensor in parameters.items()})
        if len(vocabulary) > rows:
            raise ConfigError(
                f"vocabulary: {len(vocabulary)} tokens for {rows} embedding rows; build the model for this task"
            )
        network = _shared_network(self, rows)
        config = network.config.to_dict() | {"architectures": [network.class_name], huggingface.OURS: self.to_dict()}
        source = None if self.path is None else Path(self.path)
        transformers_folder.write(folder, config, parameters, vocabulary, source)

    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        """One run's tensors [*shape], float32 (or float64). Raises ConfigError, which names the file and the tensor or
        setting, where the folder is another network."""
        transformers_folder.check(Path(folder), self.config(vocab_size), BLOCKS)
        reader = self._reader(Path(folder), vocab_size, max_length)
        return {spec.name: reader.read(spec.name) for spec in self.parameters(vocab_size, max_length)}


class TransformersNetwork(nn.Module):
    """The children of a causal language model under their own names, with logits at answer positions only."""

    blocks: Sequence[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        causal = _on_meta(config)
        self.config, self.class_name = config, type(causal).__name__
        for name, child in causal.named_children():
            self.add_module(name, child)
        self._base = causal.base_model_prefix
        self.blocks = list(cast(nn.ModuleList, self.get_submodule(BLOCKS[config.model_type])))

    def forward(self, tokens: Tensor, positions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """tokens [B, T], right-padded, positions [B, A] -> logits [B, A, V]. Nothing is drawn from `generator`."""
        base, head = self.get_submodule(self._base), self.get_submodule("lm_head")
        states = base(input_ids=tokens, use_cache=False).last_hidden_state
        return head(take(states.unsqueeze(0), positions.unsqueeze(0)).squeeze(0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A network in half precision (as DeepSpeed makes it) keeps its rotary frequencies in float32: rounded ones
        turn far positions by wrong angles."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, last, buffer.to(module.get_buffer(last).device))
        return self


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Parameters on the meta device, buffers (rotary frequencies) real."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base = causal.base_model
    if hasattr(base, "rotary_emb"):
        base.rotary_emb = type(base.rotary_emb)(config=config)
    return causal


@functools.lru_cache(maxsize=16)
def _shared_network(model: TransformersModel, vocab_size: int) -> TransformersNetwork:
    """For names and shapes, and to be called with parameters from outside; nobody fills it."""
    return TransformersNetwork(model.config(vocab_size))


def _vocab_size(parameters: Parameters) -> int:
    """Rows of the embedding [K, V, d]."""
    return next(parameters[name].shape[1] for name in EMBEDDINGS if name in parameters)

"""Predicted memory and relative time of a training step, from shapes alone.

    peak = static + kept for all layers + max(a layer's backward pass, the loss) (+ 5% and 0.6 GiB on a GPU)

The terms follow the code that they describe (layer_function.py, loss.py), in bytes; what one tile of a layer
holds was counted, as live tensors on a CPU, for LlamaRMSNorm and SwiGLU, and for what other kinds of layers add
(decoder_layer.py). docs/memory.md explains them.

Letters: T tokens of a step, C hidden size, F intermediate size, e bytes of an activation in 16 or 32 bit.
"""

from dataclasses import dataclass, replace

from longqlora.attention.model_internals import config_of_full_layers
from longqlora.device import GIB
from longqlora.memory.decoder_layer import KINDS, LayerKind
from longqlora.memory.policy import STOCK, ActivationPolicy
from longqlora.model.loss import num_chunk_rows
from longqlora.settings.config import KEPT

# 4 bits, an 8-bit scale for 64 weights, an fp32 scale for 256 scales (QLoRA, arXiv 2305.14314, section 3).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Of a trained number, which is fp32, and of its gradient.
TRAINED_BYTES = 4
CUDA_CONTEXT, CUDA_FRAGMENTATION = 0.6 * GIB, 0.05
# Live bytes of one token in a stock layer, counted: (of C, of F, of the key width), times e.
STOCK_PEAK = {2: (27.2, 11.05, 2.04), 4: (19.1, 6.03, 2.02)}
STOCK_SAVED = {2: (24.7, 6.05, 2.04), 4: (16.1, 5.03, 2.02)}
# The same of a token of the tile at work: in the MLP's backward pass (of C, of F), and in that of the projections.
TILE_MLP = {2: (6.0, 7.2), 4: (3.0, 7.7)}
# And of C for a norm behind attention or the MLP, which needs the values that it norms.
TILE_NORM_BEHIND = {2: 4.8, 4: 1.5}
TILE_PROJECT = {2: 14.0, 4: 9.0}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model; widths in elements. kind: Llama's where the layer function knows no other."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool = False
    kind: LayerKind = KINDS["llama"]

    @classmethod
    def of(cls, config) -> "ModelShape":
        """From a config.json of transformers; other families than Llama's by what their configs share with it."""
        hidden, num_heads, layers = config.hidden_size, config.num_attention_heads, config_of_full_layers(config)
        intermediate = getattr(config, "intermediate_size", 4 * hidden)
        return cls(
            hidden=hidden,
            # Gemma 3n has one for each layer.
            intermediate=max(intermediate) if isinstance(intermediate, list) else intermediate,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=getattr(layers, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(layers, "head_dim", None) or hidden // num_heads,
            vocab=config.vocab_size,
            is_tied=bool(config.tie_word_embeddings),
            kind=KINDS.get(config.model_type, KINDS["llama"]),
        )

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Hidden size, intermediate size, width of the queries, width of the keys."""
        return self.hidden, self.intermediate, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer."""
        c, f, q, k = self.widths
        sizes = {
            "q_proj": (c, q), "k_proj": (c, k), "v_proj": (c, k), "qkv_proj": (c, q + 2 * k), "o_proj": (q, c),
            "gate_proj": (c, f), "up_proj": (c, f), "gate_up_proj": (c, 2 * f), "down_proj": (f, c),
        }  # fmt: skip
        return {name: sizes[name] for name in self.kind.linears}

    def num_linear(self, *names: str) -> int:
        """Weights of these linear layers of one decoder layer, or of all."""
        return sum(self.linears[name][0] * self.linears[name][1] for name in names or self.linears)


@dataclass(frozen=True)
class RunShape:
    """What else decides: tokens of a row and rows of a step, precision, what is trained, and how.

    activation_bytes: of an element in 16 or 32 bit. weights: nf4, plain (16 or 32 bit) or trained.
    num_trained_embeddings: 1 for the input's, 2 with the output's. attended: tokens that a query sees at most,
    beside half of which it sees on average: the group size of S2-Attn, or its mean with a dense finish; None for all.
    optimizer_bytes: kept on the device for each trained parameter. buffers: bytes that DeepSpeed holds to collect
    gradients in. Processes that split: row_shards a row, weight_shards the weights, state_shards gradients and
    optimizer state.
    """

    num_tokens: int
    num_rows: int = 1
    activation_bytes: int = 2
    weights: str = "nf4"
    lora_rank: int = 64
    lora_targets: tuple[str, ...] | None = None
    num_trained_embeddings: int = 0
    attended: int | None = None
    by_kernels: bool = True
    optimizer_bytes: float = 8
    buffers: float = 0
    row_shards: int = 1
    weight_shards: float = 1
    state_shards: float = 1
    is_gpu: bool = True

    @property
    def tokens(self) -> int:
        """Of a step, in one process."""
        return -(-self.num_tokens // self.row_shards) * self.num_rows

    def at_length(self, num_tokens: int) -> "RunShape":
        """The same with rows of another length."""
        attended = self.attended and max(1, self.attended * num_tokens // self.num_tokens)
        return replace(self, num_tokens=num_tokens, attended=attended)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, and in host memory for what is kept there; relative_time: 1 is the plain step.

    flops: of a step in one process, with what takes as long (norms and masks again for chunks of heads).

    step: beyond what lies there before it (static): activations and gradients. peak: of the whole run, as the
    allocator reserves it on a GPU, in live tensors on a CPU.
    """

    static: float
    gradients: float
    step: float
    peak: float
    host: float
    flops: float
    relative_time: float


def optimizer_bytes(name: str) -> float:
    """Bytes that an optimizer of transformers keeps on the device for each trained parameter; paged ones leave it."""
    if "paged" in name or name in ("sgd", "adafactor"):
        return 0
    return 2 if "8bit" in name else 4 if name in ("adagrad", "rmsprop") or "lion" in name else 8


def predict(model: ModelShape, run: RunShape, policy: ActivationPolicy) -> MemoryEstimate:
    """Memory and relative time of training steps of `run` on `model` with `policy`."""
    static, gradients = weight_memory(model, run)
    kept_by_layer, layer = layer_memory(model, run, policy)
    kept, host = kept_by_layer * model.num_layers, 0
    if policy.offload_activations and policy.layer_function and run.is_gpu:
        # One layer's at work, one on its way.
        kept, host = min(kept, 2 * kept_by_layer), kept
    step = kept + max(layer, loss_memory(model, run, policy)) + gradients
    peak = static + step * (1 + CUDA_FRAGMENTATION) + CUDA_CONTEXT if run.is_gpu else static + step
    work = step_work(model, run, policy)
    relative_time = work / step_work(model, run, STOCK)
    return MemoryEstimate(static, gradients, step, peak, host, work * run.tokens, relative_time)


def weight_memory(model: ModelShape, run: RunShape) -> tuple[float, float]:
    """Bytes of weights and optimizer state, and of gradients."""
    is_full, num_embeddings = run.weights == "trained", 1 if model.is_tied else 2
    num_linear = model.num_linear() * model.num_layers
    num_trained_embeddings = min(2 if is_full else run.num_trained_embeddings, num_embeddings)
    num_lora = run.lora_rank * sum(sum(model.linears[name]) for name in run.lora_targets or model.linears)
    num_lora = 0 if is_full else num_lora * model.num_layers
    weight_bytes = {"nf4": NF4_BYTES, "plain": run.activation_bytes, "trained": TRAINED_BYTES}[run.weights]
    embedding_bytes = run.activation_bytes * (num_embeddings - num_trained_embeddings)
    embedding_bytes += TRAINED_BYTES * num_trained_embeddings
    static = num_linear * weight_bytes + model.vocab * model.hidden * embedding_bytes + num_lora * TRAINED_BYTES
    if run.weight_shards > 1:
        # The layer at work and the next one are whole.
        static = static / run.weight_shards + 2 * model.num_linear() * weight_bytes
    num_trained = num_lora + model.vocab * model.hidden * num_trained_embeddings + (num_linear if is_full else 0)
    static += num_trained * run.optimizer_bytes / run.state_shards
    return static, num_trained * TRAINED_BYTES / run.state_shards + run.buffers


def layer_memory(model: ModelShape, run: RunShape, policy: ActivationPolicy) -> tuple[float, float]:
    """Bytes of one layer: kept between its passes, and the most beside that in its backward pass."""
    e = run.activation_bytes
    c, f, q, k = (run.tokens * e * width for width in model.widths)
    # Of a quantised weight, unpacked.
    dense_bytes = e if run.weights == "nf4" else 0
    if not policy.layer_function:
        # Two thirds of it without a gate.
        f *= model.num_linear(*model.kind.mlp) / (3 * model.hidden * model.intermediate)
        peak, saved = (table[e][0] * c + table[e][1] * f + table[e][2] * k for table in (STOCK_PEAK, STOCK_SAVED))
        weights = model.num_linear(model.kind.mlp[0]) * dense_bytes
        return (c, peak + c + weights) if policy.gradient_checkpointing else (saved, peak - saved + c + weights)
    lse, level = run.tokens * model.num_heads * 4, KEPT.index(policy.keep_activations)
    has_attention = run.by_kernels and level >= KEPT.index("attention")
    has_projections = run.by_kernels and level >= KEPT.index("projections")
    kept = c + (q + lse if has_attention else 0) + (q + 2 * k if has_projections else 0)
    inner = sum(model.linears[name][1] for name in model.kind.mlp[:-1])
    kept += c + run.tokens * e * inner if policy.keep_activations == "all" else 0
    tile = min(policy.tile_size * run.num_rows, run.tokens) * e
    of_hidden = TILE_MLP[e][0] + TILE_NORM_BEHIND[e] * model.kind.num_norms_behind
    mlp_tile = tile * (of_hidden * model.hidden + TILE_MLP[e][1] * model.intermediate)
    mlp_tile += model.num_linear("o_proj", *model.kind.mlp) * dense_bytes
    project_tile = tile * TILE_PROJECT[e] * model.hidden
    project_tile += model.num_linear(*model.kind.projections) * dense_bytes
    heads_per_chunk = -(-model.num_kv_heads // policy.num_head_chunks)
    num_chunks = -(-model.num_kv_heads // heads_per_chunk) if run.by_kernels else 1
    attention = (q + 2 * k) / num_chunks
    # Attention's fp32 gradient of the queries at work, which a CPU's kernel holds in its own scratch space.
    scratch = attention / 4 + (q * 4 / e / num_chunks / 4 if run.is_gpu else 0)
    if not run.by_kernels:
        scratch = q + 2 * k
    output = 0 if has_attention else q + lse
    projected = 0 if has_projections else attention
    # The incoming gradient, and in order: the MLP's pass, attention's, that of the projections.
    first = output + c + q + mlp_tile + (attention if not has_attention and num_chunks == 1 else 0)
    own = 0 if num_chunks == 1 else k + (0 if k == q else k)
    second = output + c + q + projected + scratch + own
    third = output + c + projected + own + project_tile
    recompute = output + attention + project_tile if not has_attention else 0
    return kept, c + max(first, second, third, recompute)


def loss_memory(model: ModelShape, run: RunShape, policy: ActivationPolicy) -> float:
    """Hidden states behind the last layer and behind the norm, their gradients, and a chunk of logits."""
    c = run.tokens * model.hidden * run.activation_bytes
    logits = min(num_chunk_rows(model.vocab), run.tokens) * model.vocab * 4
    # torch's own operation, used in fp32, holds its chunks out of sight.
    chunk = 2 * logits if run.activation_bytes == 2 else 0
    norm = 0 if policy.layer_function else (4 if run.activation_bytes == 2 else 2) * c
    return max(4 * c + norm, 3 * c + chunk)


def step_work(model: ModelShape, run: RunShape, policy: ActivationPolicy) -> float:
    """FLOPs of a step per token: a frozen layer's products run forward and for the input's gradient."""
    linear = {name: 2 * inputs * outputs for name, (inputs, outputs) in model.linears.items()}
    adapter = 6 * run.lora_rank * sum(map(sum, model.linears.values()))
    attention = 2 * min(run.attended or run.num_tokens, run.num_tokens) * model.widths[2]
    work = 3 * sum(linear.values()) if run.weights == "trained" else 2 * sum(linear.values()) + adapter
    work += 3.5 * attention
    keep = policy.keep_activations
    if not policy.layer_function:
        work += sum(linear.values()) + attention if policy.gradient_checkpointing else 0
    else:
        kind, num_chunks = model.kind, min(policy.num_head_chunks, model.num_kv_heads) if run.by_kernels else 1
        # Of all heads, where some cannot be projected alone, for every chunk.
        repeats = num_chunks if kind.projects_all_heads else 1
        projections = repeats * sum(linear[name] for name in kind.projections)
        work += projections * (1 - 1 / repeats)
        work += attention if keep == "input" or not run.by_kernels else 0
        work += projections if keep in ("input", "attention") else 0
        work += projections if keep == "input" and num_chunks > 1 else 0
        work += 0 if keep == "all" else sum(linear[name] for name in kind.mlp[:-1])
        work += 0 if keep == "all" and not kind.num_norms_behind else linear["o_proj"]
        work += linear["down_proj"] if kind.num_norms_behind else 0
        # Norms, masks and small kernel calls again for each chunk.
        work *= 1 + 0.02 * (policy.num_head_chunks - 1) + (0.02 if policy.offload_activations else 0)
    return work * model.num_layers + 4 * model.vocab * model.hidden

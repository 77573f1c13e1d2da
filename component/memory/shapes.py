"""What decides the memory and the time of a training step: the sizes of the model, and how it is trained."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model; widths in elements."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool = False

    @classmethod
    def of(cls, config) -> "ModelShape":
        """From a config.json of transformers; other families than Llama's by what their configs share with it."""
        hidden, num_heads = config.hidden_size, config.num_attention_heads
        return cls(
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", 4 * hidden),
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or hidden // num_heads,
            vocab=config.vocab_size,
            is_tied=bool(config.tie_word_embeddings),
        )

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer."""
        c, f, q, k = self.hidden, self.intermediate, self.query_width, self.key_width
        return {
            "q_proj": (c, q), "k_proj": (c, k), "v_proj": (c, k), "o_proj": (q, c),
            "gate_proj": (c, f), "up_proj": (c, f), "down_proj": (f, c),
        }  # fmt: skip

    def num_linear(self, *names: str) -> int:
        """Weights of these linear layers of one decoder layer, or of all."""
        return sum(self.linears[name][0] * self.linears[name][1] for name in names or self.linears)


@dataclass(frozen=True)
class RunShape:
    """What else decides: tokens of a row and rows of a step, precision, what is trained, and how.

    activation_bytes: of an element in 16 or 32 bit. weights: nf4, plain (16 or 32 bit) or trained.
    num_trained_embeddings: 1 for the input's, 2 with the output's. attended: tokens that a query sees at most,
    beside half of which it sees on average: the group size of S2-Attn, or its mean with a dense finish; None for all.
    optimizer_bytes: kept on the device for each trained parameter; gradient_bytes likewise. buffers: bytes that
    DeepSpeed holds to collect gradients in. Processes that split: row_shards a row, weight_shards the weights,
    state_shards gradients and optimizer state.
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
    gradient_bytes: float = 4
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

"""What a user asks of a model's context, checked as far as that goes without the model. Pure: imports fast."""

from dataclasses import dataclass

from longqlora.model.rope_scaling import check_rope_request


@dataclass(frozen=True)
class ContextRequest:
    """What a user asks of a model's context; None and "auto" leave it to what the model's config says.

    context_size: tokens to read. rope_type, rope_theta: how RoPE is scaled to them. attention: auto, full
    or dca. With dca, RoPE is scaled to `pretraining_length` only, and only if rope_type is given; chunks
    of dca_chunk_size tokens with dca_local_window of overlap (both in tokens) reach the rest.
    """

    context_size: int | None = None
    rope_type: str | None = None
    rope_theta: float | None = None
    attention: str = "auto"
    pretraining_length: int | None = None
    dca_chunk_size: int | None = None
    dca_local_window: int | None = None
    dca_mscale: bool = False

    def __post_init__(self) -> None:
        for name in ("context_size", "pretraining_length", "dca_chunk_size", "dca_local_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1 token, got {value}")
        check_rope_request(self.rope_type, self.rope_theta, None)
        if self.attention == "full" and self.given_dual_chunk_settings:
            raise ValueError(f"{self.given_dual_chunk_settings[0]}: has an effect with attention: dca only")

    @property
    def given_dual_chunk_settings(self) -> list[str]:
        names = ("pretraining_length", "dca_chunk_size", "dca_local_window", "dca_mscale")
        return [name for name in names if getattr(self, name)]

"""The chunked loss against stock cross-entropy. Tolerance: 1e-6 relative in fp64 asked, 1e-12 reached."""

import pytest
import torch
import torch.nn.functional as F
from attention_reference import assert_close
from conftest import tiny_config
from transformers import AutoModelForCausalLM

import longqlora.model.loss as loss_module
from longqlora.model.loss import ChunkedLinearCrossEntropy, next_token_loss
from longqlora.model.loss_binding import bind_chunked_loss


def make(batch=2, length=37, hidden=24, vocab=50, dtype=torch.float64, num_ignored=9, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch, length, hidden, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocab, (batch, length), generator=generator)
    labels.view(-1)[torch.randperm(labels.numel(), generator=generator)[:num_ignored]] = -100
    return *(x.to(device).requires_grad_() for x in (states, weight)), labels.to(device)


def stock(states, weight, labels, num_items=None):
    logits = (states @ weight.T)[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / (num_items or (labels[:, 1:] != -100).sum())


@pytest.fixture(params=["library", "own"])
def implementation(request, monkeypatch):
    """Both ways to the same number: torch's operation where it exists, and ours."""
    if request.param == "own":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 50 * 4 * 7)
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch older than 2.13 has no linear_cross_entropy")
    return request.param


@pytest.mark.parametrize("num_items", [None, 123])
def test_equals_stock(implementation, num_items):
    ours, theirs = make(), make()
    value, expected = next_token_loss(*ours, num_items=num_items), stock(*theirs, num_items)
    assert abs(value - expected) < 1e-12
    (3 * value).backward()
    (3 * expected).backward()
    for x, y in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-12)


def test_what_needs_no_gradient_or_has_no_labels(implementation):
    states, weight, labels = make()
    next_token_loss(states, weight.requires_grad_(False), labels).backward()
    assert weight.grad is None and states.grad is not None
    with torch.no_grad():
        assert abs(next_token_loss(*make()) - stock(*make())) < 1e-12
    states, weight, labels = make()
    value = next_token_loss(states, weight, torch.full_like(labels, -100))
    value.backward()
    assert value == 0 and not states.grad.any()


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 3e-3), (torch.float16, 5e-4)])
def test_16_bit_loses_nothing_beyond_its_logits(implementation, dtype, tolerance, device):
    """The reference is fp32 from the same 16-bit numbers; tolerance relative, gradients' ten times as large."""
    *ours, labels = make(dtype=dtype, device=device)
    exact = [x.detach().float().requires_grad_() for x in ours]
    value, expected = next_token_loss(*ours, labels), stock(*exact, labels)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32 and abs(value - expected) < tolerance * expected
    for x, y in zip(ours, exact, strict=True):
        assert_close(x.grad, y.grad, 10 * tolerance)


def test_a_long_row_stays_finite_in_fp16(device):
    """The sum over 9000 tokens is beyond the range of fp16; the loss itself, a mean, is not."""
    states, weight, labels = make(1, 9000, 16, 64, torch.float16, device=device)
    expected = stock(states.float(), weight.float() * 4, labels)
    assert expected * 9000 > torch.finfo(torch.float16).max
    loss = next_token_loss(states, weight * 4, labels)
    loss.backward()
    assert abs(loss - expected) < 0.02 and torch.isfinite(states.grad).all() and states.grad.any()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_bound_model_equals_stock_model(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).double()
    ids = torch.randint(4, 320, (2, 30))
    labels = ids.masked_fill(torch.rand(2, 30) < 0.3, -100)
    # Stock transformers rounds the logits to fp32 even here, so the reference takes them before its loss.
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / 77
    expected.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    stock_loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(77)).loss
    model.zero_grad()
    assert "chunks" in bind_chunked_loss(model)
    output = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(77))
    output.loss.backward()
    assert output.logits is None
    assert abs(output.loss - expected) < 1e-12 and abs(output.loss - stock_loss) < 1e-6
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected_gradients[name], rtol=0, atol=1e-12)
    assert model(input_ids=ids).logits.shape == (2, 30, 320)


@pytest.mark.parametrize(
    ("model_type", "extra", "is_stock"),
    [
        ("cohere", {"logit_scale": 0.25}, True), ("granite", {"logits_scaling": 8.0}, True), ("phi", {}, True),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, True), ("llama4_text", {}, True),
        ("bart", {"decoder_ffn_dim": 32, "encoder_ffn_dim": 32, "d_model": 64}, True),
        ("lfm2", {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3}, False),
    ],
)  # fmt: skip
def test_an_output_layer_that_does_more_keeps_the_stock_loss(model_type, extra, is_stock):
    """Scaled and soft-capped logits, a bias, a decoder elsewhere than in the Llama family; not other layers."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **extra))
    forward = model.forward
    assert ("stock loss" in bind_chunked_loss(model)) == is_stock
    assert (model.forward == forward) == is_stock


def test_packed_rows_stay_apart_in_evaluation():
    """With a cache transformers would no longer see from the position ids that a row holds two documents."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config()).double().eval()
    ids = torch.randint(4, 320, (1, 30))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    labels = ids.clone()
    labels[0, 12] = -100
    parts = [model(input_ids=part).logits[0, :-1] for part in (ids[:, :12], ids[:, 12:])]
    targets = torch.cat([ids[0, 1:12], ids[0, 13:]])
    expected = F.cross_entropy(torch.cat(parts), targets)
    bind_chunked_loss(model)
    assert abs(model(input_ids=ids, position_ids=positions, labels=labels).loss - expected) < 1e-10


def test_logits_of_the_whole_sequence_are_never_held(monkeypatch):
    """Largest tensor made in forward and backward: at most half of the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for x in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return output

    states, weight, labels = make(1, 2048, 16, 512, torch.float32)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 512 * 4 * 128)
    with Largest() as largest:
        ChunkedLinearCrossEntropy.apply(states[0], weight, labels[0]).backward()
    assert 2048 * 16 <= largest.numel <= 2048 * 512 // 2

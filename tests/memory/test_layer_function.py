"""The layer function against transformers' own layers: losses, gradients, dropout, packing, dtypes, misuse."""

import itertools

import pytest
import torch
from conftest import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from longqlora.attention import shift_short
from longqlora.attention.binding import bind_attention
from longqlora.memory import decoder_layer, layer_binding
from longqlora.memory import layer_function as layer_backward
from longqlora.memory.adapted_linear import keep_mask
from longqlora.memory.decoder_layer import LINEARS, MODEL_TYPES
from longqlora.memory.layer_binding import bind_layers, decoder_layers, unbind_layers
from longqlora.memory.layer_call import LayerOptions, mask_seed
from longqlora.model.adapter import attach_adapter
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import KEPT, AdapterConfig, AttentionConfig

LENGTH = 61


def build(
    model_type="llama", attention="s2", *, dtype=torch.float64, dropout=0.0, kind="lora", trains_rest=True, **overrides
):
    """Tiny model with attention, loss and an adapter whose B is not zero; in training mode."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    bind_attention(model, AttentionConfig(attention=attention), 64)
    bind_chunked_loss(model)
    options = {"train_norm": trains_rest, "train_embedding": trains_rest} if kind == "lora" else {}
    model = attach_adapter(model, AdapterConfig(finetuning_type=kind, lora_rank=8, lora_dropout=dropout, **options)).to(
        dtype
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def loss_and_gradients(model, inputs) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected, tolerance: float) -> None:
    assert abs(got[0] - expected[0]) <= tolerance * abs(expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # Keys' biases have no effect on a softmax: their gradient is rounding.
        scale = max(float(gradient.abs().max()), 1e-6)
        assert float((got[1][name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("attention", ["s2", "full"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_the_plain_layers(model_type, attention, keep):
    model = build(model_type, attention)
    expected = loss_and_gradients(model, batch())
    for num_head_chunks in (1, 2):
        bind_layers(model, LayerOptions(keep, tile_size=16, num_head_chunks=num_head_chunks))
        assert_equal(loss_and_gradients(model, batch()), expected, 1e-10)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_key_value_heads_of_any_number(num_kv_heads):
    model = build(num_key_value_heads=num_kv_heads)
    expected = loss_and_gradients(model, batch())
    for keep, num_head_chunks in (("attention", 1), ("input", 4), ("projections", 1)):
        bind_layers(model, LayerOptions(keep, 16, num_head_chunks))
        assert_equal(loss_and_gradients(model, batch()), expected, 1e-10)


# Documents of each row, as positions count them; the kernels are called document by document.
PACKED = {
    "alike": [(20, LENGTH - 20)] * 2,
    "unlike": [(5, 40, LENGTH - 45), (LENGTH,)],
    "many": [(3,) * 20 + (1,), (30, 1, LENGTH - 31)],
}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["s2", "full"])
@pytest.mark.parametrize("documents", PACKED.values(), ids=PACKED)
def test_packed_rows_equal_a_mask(documents, attention, num_kv_heads, monkeypatch):
    model, inputs = build(attention=attention, num_key_value_heads=num_kv_heads), batch()
    inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    if attention == "full":
        expected = loss_and_gradients(model, inputs)
        assert bind_attention(model.get_base_model(), AttentionConfig(attention="full"), 64, is_packed=True)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(shift_short, "segment_lengths", lambda segment_ids: None)
            expected = loss_and_gradients(model, inputs)
    monkeypatch.setattr(shift_short, "segment_mask", None)
    assert_equal(loss_and_gradients(model, inputs), expected, 1e-10)
    monkeypatch.setattr(layer_binding, "call_attention", lambda *args, **kwargs: pytest.fail("through autograd"))
    for keep in KEPT:
        for num_head_chunks in (1, 2):
            bind_layers(model, LayerOptions(keep, 16, num_head_chunks))
            assert_equal(loss_and_gradients(model, inputs), expected, 1e-10)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("kind", ["hole", "padded left", "padded right", "dca"])
def test_rows_and_attention_of_other_kinds(kind, keep):
    model = build(attention="dca" if kind == "dca" else "s2")
    inputs = batch()
    if kind != "dca":
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, {"hole": slice(9, 20), "padded left": slice(0, 9), "padded right": slice(-9, None)}[kind]] = 0
        inputs |= {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}
    expected = loss_and_gradients(model, inputs)
    bind_layers(model, LayerOptions(keep, 16, num_head_chunks=2))
    assert_equal(loss_and_gradients(model, inputs), expected, 1e-10)


@pytest.mark.parametrize("keep", ["input", "all"])
def test_full_fine_tuning(keep):
    model = build("qwen2", kind="full")
    expected = loss_and_gradients(model, batch())
    assert any("q_proj.bias" in name for name in expected[1])
    bind_layers(model, LayerOptions(keep, 16, num_head_chunks=2))
    assert_equal(loss_and_gradients(model, batch()), expected, 1e-10)


class FixedDropout(nn.Module):
    """Dropout with a given mask [B * S, C]."""

    def __init__(self, p: float, mask: torch.Tensor):
        super().__init__()
        self.p, self.mask = p, mask

    def forward(self, x):
        return x * self.mask.view_as(x) * (2**16 / (2**16 - round(self.p * 2**16)))


def hand_over_masks(model, seed: int, tile_size: int, rows: int, p: float) -> None:
    """Put into PEFT's dropout the masks that the layer function will draw after `seed`."""
    torch.manual_seed(seed)
    for layer in decoder_layers(model):
        base = int(torch.randint(2**62, ()))
        for name in LINEARS:
            module = getattr(layer.mlp if hasattr(layer.mlp, name) else layer.self_attn, name)
            tiles = []
            for start in range(0, LENGTH, tile_size):
                x = torch.empty(rows * min(tile_size, LENGTH - start), module.in_features)
                tiles.append(keep_mask(x, p, mask_seed(base, name, start)).view(rows, -1, module.in_features))
            module.lora_dropout["default"] = FixedDropout(p, torch.cat(tiles, dim=1))


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_dropout_equals_the_plain_path_under_the_same_masks(model_type, keep):
    model = build(model_type, dropout=0.3)
    hand_over_masks(model, 5, 16, rows=2, p=0.3)
    expected = loss_and_gradients(model, batch())
    for num_head_chunks in (1, 2):
        bind_layers(model, LayerOptions(keep, 16, num_head_chunks))
        torch.manual_seed(5)
        got = loss_and_gradients(model, batch())
        assert_equal(got, expected, 1e-10)
        torch.manual_seed(5)
        again = loss_and_gradients(model, batch())
        assert all(torch.equal(gradient, again[1][name]) for name, gradient in got[1].items())
        other = loss_and_gradients(model, batch())
        assert other[0] != got[0], "another seed drops something else"


def test_masks_drop_their_share_and_differ_between_layers_and_tiles():
    x = torch.empty(500, 400)
    seeds = {mask_seed(7, name, start) for name in LINEARS for start in (0, 16, 32)}
    assert len({seed % 2**32 for seed in seeds}) == len(LINEARS) * 3, "a CPU generator reads 32 bits only"
    masks = [keep_mask(x, 0.05, seed) for seed in sorted(seeds)[:4]]
    for mask in masks:
        assert abs(float(mask.float().mean()) - 0.95) < 0.002
        assert torch.allclose(mask.float().view(-1, 4).mean(0), torch.tensor(0.95), atol=0.004)
    assert not torch.equal(masks[0], masks[1]) and keep_mask(x, 0.0, 1) is None
    shared = (~masks[0] & ~masks[1]).float().mean()
    assert abs(float(shared) - 0.0025) < 0.0005, "independent"


def train(model, num_steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(num_steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_losses_of_twenty_steps(dtype, tolerance):
    expected = train(build(dtype=dtype))
    assert expected[-1] < 0.8 * expected[0]
    # fp64 tells every way from a wrong one; fp32 shows that rounding stays small.
    for keep, num_head_chunks in itertools.product(KEPT, (1, 2)) if dtype == torch.float64 else [(KEPT[0], 2)]:
        model = build(dtype=dtype)
        bind_layers(model, LayerOptions(keep, 16, num_head_chunks))
        assert train(model) == pytest.approx(expected, abs=tolerance), (keep, num_head_chunks)


def quantized(model):
    """The linear layers of `model` in NF4."""
    import bitsandbytes as bnb

    for layer in decoder_layers(model):
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                    weight = module.weight.data
                    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to("cpu")
                    new.support_avx512bf16_for_cpu = False
                    setattr(parent, name, new)
    return model


# bf16 rounds each of the two ways in other places: bounded by the plain path's own distance from fp32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_quantised_base_under_autocast(dtype, tolerance):
    torch.manual_seed(0)
    model = quantized(AutoModelForCausalLM.from_config(tiny_config()))
    model.is_loaded_in_4bit = True
    bind_attention(model, AttentionConfig(), 64)
    bind_chunked_loss(model)
    model = attach_adapter(model, AdapterConfig(lora_rank=8, lora_dropout=0.0)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = loss_and_gradients(model, batch())
        for keep in KEPT:
            bind_layers(model, LayerOptions(keep, 16))
            got = loss_and_gradients(model, batch())
            assert_equal(got, expected, tolerance)
            assert all(gradient.dtype == torch.float32 for gradient in got[1].values())


def test_evaluation_and_generation_use_the_models_own_layers(monkeypatch):
    model = build()
    expected = model.eval()(**batch()).loss
    bind_layers(model, LayerOptions())
    monkeypatch.setattr(layer_backward, "attention_of", None)
    assert torch.equal(model.eval()(**batch()).loss, expected)
    model.generate(batch()["input_ids"][:, :5], max_new_tokens=3)
    with torch.no_grad():
        model.train()(**batch())
    unbind_layers(model)
    model.train()(**batch()).loss.backward()


def test_products_that_no_gradient_needs_are_not_made(monkeypatch):
    """Backward redoes three products for "projections" (o, gate, up) and none for "all"."""
    model, calls = build(trains_rest=False), []
    forward = decoder_layer.DecoderLayer.weights

    def counted(self, *names, dtype):
        return {name: CountedLinear(linear, calls) for name, linear in forward(self, *names, dtype=dtype).items()}

    monkeypatch.setattr(decoder_layer.DecoderLayer, "weights", counted)
    for keep, expected in (("input", 6), ("attention", 6), ("projections", 3), ("all", 0)):
        bind_layers(model, LayerOptions(keep, tile_size=64))
        loss = model(**batch()).loss
        calls.clear()
        loss.backward()
        assert len(calls) == expected * 2, (keep, calls)


class CountedLinear:
    def __init__(self, linear, calls):
        self.linear, self.calls = linear, calls

    def rows(self, rows):
        return CountedLinear(self.linear.rows(rows), self.calls)

    def __call__(self, x, seed, *, output=None, is_output_needed=True):
        if output is None and is_output_needed:
            self.calls.append(x.shape)
        return self.linear(x, seed, output=output, is_output_needed=is_output_needed)


def test_a_second_backward_pass_is_refused():
    """Gradients take the place of what was kept."""
    model = build(trains_rest=False)
    bind_layers(model, LayerOptions("projections"))
    output = model.get_base_model().model(batch()["input_ids"]).last_hidden_state.sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        output.backward()


@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral"])
def test_other_layers_are_refused_by_name(model_type):
    model = build(model_type, trains_rest=False)
    with pytest.raises(ValueError, match=f"layer_function: not available, since {model_type} layers.*false"):
        bind_layers(model, LayerOptions())


def test_dropped_attention_weights_and_dora_are_refused():
    with pytest.raises(ValueError, match="attention_dropout"):
        bind_layers(build(attention_dropout=0.1), LayerOptions())
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(tiny_config())
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="more than one plain LoRA"):
        bind_layers(model, LayerOptions())


class Store:
    """Keeps copies, as host memory would."""

    def __init__(self):
        self.kept = []

    def put(self, tensors):
        self.kept.append([tensor.clone() for tensor in tensors])
        return len(self.kept) - 1

    def get(self, handle):
        return self.kept[handle]


@pytest.mark.parametrize("keep", KEPT)
def test_store_keeps_what_autograd_would(keep):
    model, store = build(dropout=0.1, trains_rest=False), Store()
    bind_layers(model, LayerOptions(keep, 16))
    torch.manual_seed(3)
    expected = loss_and_gradients(model, batch())
    bind_layers(model, LayerOptions(keep, 16), store=store)
    torch.manual_seed(3)
    assert_equal(loss_and_gradients(model, batch()), expected, 0.0)
    assert [len(tensors) for tensors in store.kept] == [(1, 3, 6, 9)[KEPT.index(keep)]] * 2
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x):
        hidden = torch.zeros(1, 4, 64, dtype=torch.float64, requires_grad=True)
        rope = model.get_base_model().model.rotary_emb(hidden, torch.arange(4)[None])
        decoder_layers(model)[0](hidden, position_embeddings=rope)
    assert not saved

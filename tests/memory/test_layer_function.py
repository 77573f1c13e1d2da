"""The layer function against transformers' own layers: losses, gradients, dropout, packing, dtypes, misuse."""

import itertools
import platform
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from random_nf4_model import random_nf4_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.ernie4_5 import modeling_ernie4_5

from longqlora.attention import shift_short
from longqlora.attention.binding import bind_attention, set_attention
from longqlora.attention.inplace_attention import CausalPattern
from longqlora.memory import adapted_linear, layer_binding
from longqlora.memory.adapted_linear import keep_mask
from longqlora.memory.decoder_layer import KINDS, LINEARS, MODEL_TYPES, DecoderLayer, rotate
from longqlora.memory.host_offload import HostOffload
from longqlora.memory.layer_binding import apply_policy, bind_layers, decoder_layers, prove_layers
from longqlora.memory.layer_function import mask_seed
from longqlora.memory.policy import MAX_LENGTH, ActivationPolicy
from longqlora.model.adapter import attach_adapter
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import KEPT, AdapterConfig, AttentionConfig

LENGTH, TILE_SIZE = 61, 16
MANY_WAYS = list(itertools.product(KEPT, (1, 2)))
# What a tiny model of a type needs, to be served and to have all that its layers can have.
SPECIAL = {
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0, "mlp_bias": True},
    "arcee": {"mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "glm": {"head_dim": 16},
    "glm4": {"attention_bias": True},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
# ERNIE turns queries and keys in fp32 whatever the model's dtype is, and Gemma sums gradients of norms in it.
TOLERANCES = {"ernie4_5": 1e-6, "gemma": 1e-6}
ONE_OF_EACH_KIND = ["qwen3", "granite", *{kind: name for name, kind in reversed(KINDS.items())}.values()]


def build(
    model_type="llama", attention="s2", *, dtype=torch.float64, dropout=0.0, kind="lora", trains_rest=True, **overrides
):
    """Tiny model with attention, loss and an adapter whose B is not zero; in training mode."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **{**SPECIAL.get(model_type, {}), **overrides})
    if kind == "qlora":
        model = random_nf4_model(config, dtype=dtype, device=torch.device("cpu"))
    else:
        model = AutoModelForCausalLM.from_config(config)
    bind_attention(model, AttentionConfig(attention=attention), 64)
    bind_chunked_loss(model)
    options = {} if kind == "full" else {"train_norm": trains_rest, "train_embedding": trains_rest}
    adapter = AdapterConfig(finetuning_type=kind, lora_rank=8, lora_dropout=dropout, **options)
    model = attach_adapter(model, adapter).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (2, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
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


def bind(model, keep: str = "attention", num_head_chunks: int = 1, *, tile_size: int = TILE_SIZE, store=None) -> None:
    bind_layers(model, ActivationPolicy(True, keep, tile_size, num_head_chunks), store=store)


def assert_layers_give(expected, model, inputs, *, ways=MANY_WAYS, tolerance: float = 1e-10, store=None) -> None:
    """Loss and gradients are `expected` whatever is kept, in however many chunks of heads."""
    for keep, num_head_chunks in ways:
        bind(model, keep, num_head_chunks, store=store)
        assert_equal(loss_and_gradients(model, inputs), expected, tolerance)


MODELS = {name: {"model_type": name} for name in MODEL_TYPES}
MODELS |= {f"{name}, full attention, all weights": {"model_type": name, "attention": "full", "kind": "full"}
           for name in MODEL_TYPES}  # fmt: skip
MODELS |= {
    "one key/value head": {"num_key_value_heads": 1},
    "as many as heads": {"num_key_value_heads": 4},
    "dual chunk attention": {"attention": "dca"},
    "windows": {"model_type": "mistral", "attention": "full", "sliding_window": 8},
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_layers(name):
    model = build(**MODELS[name])
    expected, tolerance = loss_and_gradients(model, batch()), TOLERANCES.get(model.config.model_type, 1e-10)
    assert name != "qwen2, full attention, all weights" or any("q_proj.bias" in name for name in expected[1])
    assert_layers_give(expected, model, batch(), ways=[*MANY_WAYS, ("input", 4)], tolerance=tolerance)


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
        bind_attention(model.get_base_model(), AttentionConfig(attention="full"), 64, is_packed=True)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(shift_short, "segment_lengths", lambda segment_ids: None)
            expected = loss_and_gradients(model, inputs)
    monkeypatch.setattr(shift_short, "segment_mask", None)
    assert_equal(loss_and_gradients(model, inputs), expected, 1e-10)
    monkeypatch.setattr(layer_binding, "call_attention", lambda *args, **kwargs: pytest.fail("through autograd"))
    assert_layers_give(expected, model, inputs)


def test_attention_hears_of_the_same_windows_as_in_the_plain_layers():
    """flash-attn knows them from there alone."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model, seen = build("qwen2", "full", **windows), []

    def record(module, query, key, value, attention_mask, **options):
        seen.append({name: options[name] for name in ("sliding_window", "scaling", "dropout")})
        return query.transpose(1, 2), None

    set_attention(model.get_base_model(), "recording", record, lambda **options: None)
    model(**batch())
    expected = [seen.pop(0), seen.pop(0)]
    assert [options["sliding_window"] for options in expected] == [8, None] and not seen
    bind(model)
    model(**batch())
    assert seen == expected


@pytest.mark.parametrize("hidden", [slice(9, 20), slice(0, 9), slice(-9, None)], ids=["hole", "left", "right"])
def test_padded_rows_equal_the_plain_layers(hidden):
    model, inputs = build(), batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, hidden] = 0
    inputs |= {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}
    expected = loss_and_gradients(model, inputs)
    assert_layers_give(expected, model, inputs, ways=[(keep, 2) for keep in KEPT])


def hand_over_masks(model, seed: int, rows: int, p: float) -> None:
    """Put into PEFT's dropout the masks that the layer function will draw after `seed`."""
    torch.manual_seed(seed)
    for layer in decoder_layers(model):
        base, view = int(torch.randint(2**62, ())), DecoderLayer(layer)
        *inner, down = view.kind.mlp
        # Layers that read one input have one mask.
        for names in (view.kind.projections, ("o_proj",), inner, (down,)):
            tiles, width = [], view.linears[names[0]].in_features
            for start in range(0, LENGTH, TILE_SIZE):
                x = torch.empty(rows * min(TILE_SIZE, LENGTH - start), width)
                tiles.append(keep_mask(x, p, mask_seed(base, names[0], start)).view(rows, -1, width))
            scales = torch.cat(tiles, dim=1).double() * (2**16 / (2**16 - round(p * 2**16)))
            for name in names:
                view.linears[name].lora_dropout["default"].forward = partial(torch.mul, scales)


# Kinds differ in what is around the linear layers; masks are drawn in these.
@pytest.mark.parametrize("model_type", [
    name if name in ("llama", "phi3", "olmo2") else pytest.param(name, marks=pytest.mark.slow)
    for name in ONE_OF_EACH_KIND
])  # fmt: skip
def test_dropout_equals_the_plain_path_under_the_same_masks(model_type):
    model = build(model_type, dropout=0.3)
    hand_over_masks(model, 5, rows=2, p=0.3)
    expected, tolerance = loss_and_gradients(model, batch()), TOLERANCES.get(model_type, 1e-10)
    for keep, num_head_chunks in MANY_WAYS:
        bind(model, keep, num_head_chunks)
        torch.manual_seed(5)
        got = loss_and_gradients(model, batch())
        assert_equal(got, expected, tolerance)
        torch.manual_seed(5)
        assert_equal(loss_and_gradients(model, batch()), got, 0.0)
        assert loss_and_gradients(model, batch())[0] != got[0], "another seed drops something else"


def test_masks_drop_their_share_and_differ_between_layers_and_tiles():
    x = torch.empty(500, 400)
    seeds = {mask_seed(7, name, start) for name in LINEARS for start in (0, 16, 32)}
    assert len({seed % 2**32 for seed in seeds}) == len(LINEARS) * 3, "a CPU generator reads 32 bits only"
    masks = [keep_mask(x, 0.05, seed).bool() for seed in sorted(seeds)[:4]]
    for mask in masks:
        assert abs(float(mask.float().mean()) - 0.95) < 0.002
        assert torch.allclose(mask.float().view(-1, 4).mean(0), torch.tensor(0.95), atol=0.004)
    assert not torch.equal(masks[0], masks[1]) and keep_mask(x, 0.0, 1) is None
    shared = (~masks[0] & ~masks[1]).float().mean()
    assert abs(float(shared) - 0.0025) < 0.0005, "independent"


# bf16 rounds each of the two ways in other places: bounded by the plain path's own distance from fp32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_quantised_base_under_autocast(dtype, tolerance):
    model = build(kind="qlora", dtype=torch.float32, trains_rest=False)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = loss_and_gradients(model, batch())
        assert all(gradient.dtype == torch.float32 for gradient in expected[1].values())
        assert_layers_give(expected, model, batch(), ways=[(keep, 1) for keep in KEPT], tolerance=tolerance)


def test_ernie_turns_in_fp32_whatever_the_dtype_of_the_products(monkeypatch):
    model, turned = build("ernie4_5", dtype=torch.bfloat16, trains_rest=False), []
    stock = DecoderLayer.rotate

    def record(self, x, cos, sin, *, out):
        stock(self, x, cos, sin, out=out)
        turned.append([y.clone() for y in (x, cos, sin, out)])
        return out

    monkeypatch.setattr(DecoderLayer, "rotate", record)
    bind(model)
    model(**batch())
    for x, cos, sin, out in turned:
        exact, _ = modeling_ernie4_5.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
        assert cos.dtype == torch.float32 and x.dtype == torch.bfloat16
        torch.testing.assert_close(out, exact, rtol=2**-7, atol=1e-6)


def test_evaluation_and_generation_use_the_models_own_layers(monkeypatch):
    model = build()
    expected = model.eval()(**batch()).loss
    ids = batch()["input_ids"][:, :5]
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    bind(model)
    monkeypatch.setattr(layer_binding, "LayerFunction", None)
    assert torch.equal(model.eval()(**batch()).loss, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    with torch.no_grad():
        model.train()(**batch())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_transformers_hands_to_a_layer(model_type):
    """All that layer_binding.py and decoder_layer.py know of transformers' layers."""
    sentence = f"transformers {transformers.__version__} changed its decoder layers: see memory/layer_binding.py"
    model, seen = build(model_type, trains_rest=False), []

    def record(forward, *arguments):
        output = forward(*arguments)
        seen.append((forward.keywords, arguments, output))
        return output

    for layer in decoder_layers(model):
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, record
    model(**batch(), use_cache=False)
    assert len(seen) == 2, f"{sentence} (the checkpointing function is not called)"
    for keywords, arguments, output in seen:
        read = {"attention_mask", "past_key_values", "position_embeddings"}
        assert read <= set(keywords) and len(arguments) == 1, f"{sentence} (arguments)"
        width = 8 if model_type in ("glm", "glm4", "phi3") else 16
        shapes = [x.shape for x in keywords["position_embeddings"]]
        assert shapes == [(1, LENGTH, width)] * 2, f"{sentence} (cos and sin)"
        assert isinstance(output, torch.Tensor) and output.shape == (2, LENGTH, 64), f"{sentence} (output)"
    children = {name for name, x in decoder_layers(model)[0].named_children() if not isinstance(x, nn.Dropout)}
    assert children == {"self_attn", "mlp", *filter(None, KINDS[model_type].norms)}, f"{sentence} (modules)"


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_type_passes_the_proof(model_type, kind):
    prove_layers(build(model_type, kind=kind), ActivationPolicy(tile_size=5))


@pytest.mark.parametrize(
    "model_type,layers",
    [
        # The fourth layer has no RoPE.
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": None}),
        ("qwen2", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
                   "use_sliding_window": True, "sliding_window": 8}),
    ],
)  # fmt: skip
def test_the_proof_sees_all_kinds_of_layers(model_type, layers, monkeypatch):
    model = build(model_type, "full", **layers)
    monkeypatch.setattr(DecoderLayer, "rotate", lambda self, *angles, out: rotate(*angles, out=out))
    monkeypatch.setattr(layer_binding, "attention_pattern", lambda *_: CausalPattern(None, 4))
    with pytest.raises(ValueError, match=f"layer_function does not suit {model_type}: .*differs from the stock model"):
        prove_layers(model, ActivationPolicy(tile_size=5))


def test_a_transformers_that_calls_no_checkpointing_function_is_refused(monkeypatch):
    """Training would go on, with all the memory that plain layers take."""
    monkeypatch.setattr(layer_binding.LayerCheckpoint, "__call__", lambda self, forward, x: forward(x))
    with pytest.raises(ValueError, match="does not call its layers' checkpointing function; set layer_function: false"):
        apply_policy(build(), MAX_LENGTH, torch.device("cpu"))


# A norm needs the values of the product before it: of q, k, o and down.
@pytest.mark.parametrize("model_type,numbers", [("llama", (6, 6, 3, 0)), ("exaone4", (9, 9, 6, 4))])
def test_products_that_no_gradient_needs_are_not_computed(model_type, numbers, monkeypatch):
    """Backward recomputes three products for "projections" (o, gate, up) and none for "all"."""
    model, calls = build(model_type, trains_rest=False), []
    counted = SimpleNamespace(linear=lambda *tensors: calls.append(tensors) or F.linear(*tensors))
    monkeypatch.setattr(adapted_linear, "F", counted)
    for keep, num_products in zip(KEPT, numbers, strict=True):
        bind(model, keep, tile_size=64)
        loss = model(**batch()).loss
        assert len(calls) == len(LINEARS) * 2, keep
        calls.clear()
        loss.backward()
        assert len(calls) == num_products * 2, keep
        calls.clear()


def test_layers_that_read_one_input_share_its_mask(monkeypatch):
    """A pass over a layer draws masks for the inputs of q, o, gate and down; "attention" projects once more."""
    model, drawn = build(dropout=0.1, trains_rest=False), []
    monkeypatch.setattr(adapted_linear, "keep_mask", lambda *args: drawn.append(args) or keep_mask(*args))
    for keep, num_backward in (("attention", 5), ("all", 4)):
        bind(model, keep, tile_size=64)
        loss = model(**batch()).loss
        assert len(drawn) == 4 * 2, keep
        loss.backward()
        assert len(drawn) == (4 + num_backward) * 2, keep
        drawn.clear()


FREED_AND_TAKEN_AGAIN = """
import resource, torch
from longqlora.device import reuse_freed_memory
reuse_freed_memory()
for step in range(8):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**20) for _ in range(8)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_takes_the_memory_that_the_last_one_freed():
    """Page faults of five steps that fill 32 MiB; without the call 1024 were seen."""
    outcome = subprocess.run([sys.executable, "-c", FREED_AND_TAKEN_AGAIN], capture_output=True, text=True, check=True)
    assert int(outcome.stdout) < 100


def test_a_second_backward_pass_is_refused():
    """By autograd: gradients took the place of what was kept."""
    model = build(trains_rest=False)
    bind(model, "projections")
    output = model.get_base_model().model(batch()["input_ids"]).last_hidden_state.sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


REFUSED = [
    ({"model_type": "mixtral"}, {}, "mixtral layers"),
    ({"attention_dropout": 0.1}, {}, "the model drops attention weights"),
    ({"model_type": "seed_oss", "attention_dropout": 0.0}, {}, "the model drops what .* add .residual_dropout."),
    ({"model_type": "phi3", "resid_pdrop": 0.1}, {}, "the model drops what .* add .resid_pdrop."),
    ({"model_type": "exaone4"}, {}, "the model has sliding-window layers"),
    ({}, {"use_dora": True}, "its adapter is more than one plain LoRA"),
]


@pytest.mark.parametrize("config,adapter,reason", REFUSED)
def test_other_layers_and_adapters_are_refused_by_name(config, adapter, reason):
    model = AutoModelForCausalLM.from_config(tiny_config(**config))
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["o_proj"], **adapter}))
    with pytest.raises(ValueError, match=f"layer_function: not available, since {reason}.*set layer_function: false"):
        bind(model)


@pytest.mark.parametrize("keep", KEPT)
def test_store_keeps_what_autograd_would(keep):
    model, saved, results = build(dropout=0.1, trains_rest=False), [], []
    copies = SimpleNamespace(put=lambda tensors: [x.clone() for x in tensors], get=list)
    for store in (None, copies):
        bind(model, keep, store=store)
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, batch()))
    assert_equal(*results, 0.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x):
        hidden = torch.zeros(1, 4, 64, dtype=torch.float64, requires_grad=True)
        rope = model.get_base_model().model.rotary_emb(hidden, torch.arange(4)[None])
        decoder_layers(model)[0](hidden, position_embeddings=rope)
    assert not saved


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("attention", ["s2", "full"])
# fp32 goes through the memory-efficient kernel, fp64 through the plain one.
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_on_a_gpu_with_host_memory_it_equals_the_plain_layers(attention, dtype, tolerance, is_packed):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, inputs = build("llama", attention, dtype=dtype).cuda(), batch("cuda")
    if is_packed:
        bind_attention(model.get_base_model(), AttentionConfig(attention=attention), 64, is_packed=True)
        inputs["position_ids"] = torch.arange(LENGTH, device="cuda").remainder(23).expand(2, -1)
    expected, store = loss_and_gradients(model, inputs), HostOffload(torch.device("cuda"))
    for place in (None, store, store):
        assert_layers_give(expected, model, inputs, tolerance=tolerance, store=place)
    assert store.is_pinned


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_on_a_gpu_is_near_fp32(dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16 arithmetic")
    model = build(dtype=torch.float32).cuda()
    expected, _ = loss_and_gradients(model, batch("cuda"))
    bind(model, store=HostOffload(torch.device("cuda")))
    with torch.autocast("cuda", dtype):
        loss, _ = loss_and_gradients(model, batch("cuda"))
    assert loss == pytest.approx(expected, rel=0.01)

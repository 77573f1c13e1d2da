"""The attention patterns of train_pattern.py: each is what its definition says, and train.py trains with it."""

import pytest
import torch
from attention_reference import assert_causal, assert_same_with_gradients, dense_attention, random_qkv
from conftest import NUM_STEPS
from pattern_attention import PATTERN_FUNCTIONS
from rolled_attention import rolled_shift_short_attention
from training_process import losses_of

G, LENGTH = 8, 32
OPTIONS = {"layer": 1, "segment_ids": None}
# Two documents and padding.
SEGMENT_IDS = torch.tensor([0] * 13 + [1] * 14 + [-1] * 5)[None]


def allowed_pairs(name, length, segment_ids=None, *, heads=4, layer=1):
    """Which keys a query sees, bool [B, H, S, S], pair by pair from the definition."""
    allowed = torch.zeros(1, heads, length, length, dtype=torch.bool)
    for head, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (heads, length, length))).tolist():
        is_shifted = {"no_shift": False, "shift_by_layer": layer % 2 == 1}.get(name, head >= heads // 2)
        # Where a token stands in the order of its groups, and its group.
        places = [((t - G // 2) % length if is_shifted and name == "rolled_ends" else t) for t in (i, j)]
        groups = [p // G for p in places]
        if is_shifted and name != "rolled_ends":
            groups = [(t + G // 2) // G for t in (i, j)]
            if name == "swapped_ends":
                groups = [0 if group == (length - 1 + G // 2) // G else group for group in groups]
        allowed[0, head, i, j] = groups[0] == groups[1] and places[0] >= places[1]
    if segment_ids is not None:
        allowed &= (segment_ids[:, None] == segment_ids[:, :, None])[:, None]
    return allowed


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length,segment_ids", [(LENGTH, None), (LENGTH, SEGMENT_IDS), (29, None), (3, None)])
@pytest.mark.parametrize("name", PATTERN_FUNCTIONS)
def test_patterns_are_their_definitions(name, length, segment_ids, kv_heads):
    def pattern(*tensors):
        return PATTERN_FUNCTIONS[name](*tensors, G, layer=1, segment_ids=segment_ids).transpose(1, 2)

    def reference(*tensors):
        return dense_attention(*tensors, allowed_pairs(name, length, segment_ids))[0]

    assert_same_with_gradients(pattern, reference, random_qkv(length, kv_heads=kv_heads))


def test_even_layers_are_not_shifted():
    tensors = random_qkv(LENGTH)
    expected = PATTERN_FUNCTIONS["no_shift"](*tensors, G, **OPTIONS)
    assert torch.equal(PATTERN_FUNCTIONS["shift_by_layer"](*tensors, G, **OPTIONS | {"layer": 2}), expected)


@pytest.mark.parametrize("name", sorted(PATTERN_FUNCTIONS.keys() - {"rolled_ends"}))
def test_no_token_sees_a_later_one(name):
    assert_causal(lambda *x: PATTERN_FUNCTIONS[name](*x, G, **OPTIONS).transpose(1, 2), random_qkv(LENGTH))


def test_rolled_ends_are_those_of_longlora_and_leak():
    """The shifted heads' first half group, and it alone, sees the sequence's last tokens."""
    tensors = [x.detach() for x in random_qkv(LENGTH)]
    before = PATTERN_FUNCTIONS["rolled_ends"](*tensors, G, **OPTIONS)
    assert torch.allclose(before.transpose(1, 2), rolled_shift_short_attention(*tensors, G), atol=1e-12)
    tensors[2][:, :, -1] += 1.0
    is_changed = (PATTERN_FUNCTIONS["rolled_ends"](*tensors, G, **OPTIONS) != before).any(-1)[0]
    assert is_changed[: G // 2, 2:].all() and not is_changed[:, :2][: G // 2].any()
    assert not is_changed[G // 2 : -G].any()


# Dropout draws other masks in the layer function.
SETTINGS = {"dense_finish": 0.2, "lora_dropout": 0.0}
FAST = {"memory": "fast", "gradient_checkpointing": None}


@pytest.fixture
def losses(write_yaml, run_script):
    """losses(name, pattern, **changes): losses of a run by step, and what it printed."""

    def run(name, pattern=None, **changes):
        path, out = write_yaml(name, **changes)
        script = ["benchmark/train_pattern.py", "--pattern", pattern] if pattern else ["train.py"]
        outcome = run_script(*script, "--train_args_file", path)
        assert outcome.returncode == 0, outcome.stderr
        return losses_of(out), outcome.stdout

    return run


def test_every_fourth_step_is_dense(losses):
    (sparse, _), (mixed, _) = losses("sparse"), losses("mixed", "every_fourth_dense")
    ends_dense, _ = losses("dense-end", dense_finish=0.25, max_steps=4)
    assert [mixed[step] == sparse[step] for step in range(1, NUM_STEPS + 1)] == [True] * 3 + [False] * 3
    assert mixed[4] == ends_dense[4]


def test_policies_and_the_dense_finish_train_a_pattern(losses):
    """Losses under the layer function are those of the model's own layers, and not S2-Attn's."""
    sparse, _ = losses("sparse", **SETTINGS)
    plain, _ = losses("plain", "no_shift", **SETTINGS)
    fast, printed = losses("fast", "no_shift", **SETTINGS, **FAST)
    assert fast == pytest.approx(plain, rel=1e-4) and abs(plain[1] - sparse[1]) > 1e-3
    assert "no_shift in place of S2-Attn, groups of 32 tokens" in printed
    assert "step 6: full causal attention" in printed


@pytest.mark.parametrize("pattern,changes,message", [
    ("no_shift", {"attention": "full"}, "attention: --pattern takes the place of s2, got full"),
    ("every_fourth_dense", {"dense_finish": 0.5}, "every_fourth_dense: needs attention: s2 and no dense_finish"),
])  # fmt: skip
def test_settings_without_a_place_for_a_pattern(run_script, write_yaml, pattern, changes, message):
    path, _ = write_yaml("run", **changes)
    outcome = run_script("benchmark/train_pattern.py", "--pattern", pattern, "--train_args_file", path)
    assert outcome.returncode == 2 and message in outcome.stderr and "Traceback" not in outcome.stderr

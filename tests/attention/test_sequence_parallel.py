"""Attention of a row that several processes share: each has some of the heads, and all tokens."""

from types import SimpleNamespace

import pytest
import torch
from attention_reference import assert_close, causal, dense_attention, random_qkv, shift_short_allowed

from longqlora.attention import sequence_parallel
from longqlora.attention.sdpa import causal_attention
from longqlora.attention.sequence_parallel import heads_forward, shared_forward


@pytest.mark.parametrize("heads,kv_heads,size", [(4, 4, 2), (8, 2, 2), (6, 3, 3), (6, 6, 3), (8, 8, 4), (6, 2, 2)])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("is_packed", [False, True])
def test_parts_of_the_heads_make_the_whole(monkeypatch, heads, kv_heads, size, group_size, is_packed):
    tensors = random_qkv(27, batch=2, heads=heads, kv_heads=kv_heads)
    positions, segments = torch.cat([torch.arange(11), torch.arange(16)]).repeat(2, 1), torch.zeros(2, 27)
    segments[:, 11:] = is_packed
    allowed = shift_short_allowed(27, heads, group_size or 2**20, segments) & causal(27)
    outputs = []
    for rank, inputs in enumerate(zip(*(x.chunk(size, dim=1) for x in tensors), strict=True)):
        monkeypatch.setattr(sequence_parallel, "rank", lambda rank=rank: rank + size)
        options = {"is_packed": is_packed, "group_size": group_size, "size": size, "kernel": causal_attention}
        outputs.append(heads_forward(None, *inputs, None, position_ids=positions, **options)[0])
    assert_close(torch.cat(outputs, dim=2).transpose(1, 2), dense_attention(*tensors, allowed)[0], 1e-12)


def test_the_exchange_leaves_the_layer_as_it_was(monkeypatch):
    """DeepSpeed's changes num_key_value_groups for good."""

    def exchange(module, query, *inputs, **kwargs):
        module.num_key_value_groups = 1
        return query.transpose(1, 2).flatten(2), None

    monkeypatch.setattr(sequence_parallel, "all_to_all_heads", lambda *sizes: exchange)
    module, states = SimpleNamespace(num_key_value_groups=4, training=True), torch.randn(1, 8, 4, 2)
    inputs = states, states[:, :2], states[:, :2], None
    output, _ = shared_forward(module, *inputs, attend=None, size=4, position_ids=torch.arange(4)[None])
    assert torch.equal(output, states.transpose(1, 2)) and module.num_key_value_groups == 4

"""What attention is compared with: dense attention from all its scores, and random inputs for it.

Tolerances are relative to the largest expected value.
"""

import math

import torch


def random_qkv(num_queries, num_keys=None, *, batch=1, heads=4, kv_heads=2, dim=16, dtype=torch.float64, device="cpu"):
    """Query, key and value [B, H, S, D] as leaves, in memory [B, S, H, D] as a model makes them."""
    generator, num_keys = torch.Generator().manual_seed(0), num_keys or num_queries
    shapes = [(batch, n, h, dim) for n, h in ((num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads))]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in tensors]


def dense_attention(query, key, value, allowed=None, scaling=None):
    """Output [B, H, Q, D] and log-sum-exp [B, H, Q] from all scores; allowed: bool [Q, S] or [B, H, Q, S]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (scaling or 1 / math.sqrt(query.shape[-1]))
    if allowed is not None:
        scores = scores.masked_fill(~allowed.to(scores.device), -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def causal(num_queries, num_keys=None):
    """Which keys the last `num_queries` of `num_keys` positions see: bool [Q, S]."""
    num_keys = num_keys or num_queries
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def shift_short_allowed(length, heads, group_size, segment_ids=None):
    """S2-Attn from its definition, bool [B, H, S, S]: token t of a shifted head is in group (t + G/2) // G."""
    position = torch.arange(length)
    groups = torch.stack([(position + group_size // 2 * (2 * head >= heads)) // group_size for head in range(heads)])
    allowed = ((groups[:, :, None] == groups[:, None]) & causal(length))[None]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    return allowed


def shift_short_reference(query, key, value, group_size, segment_ids=None):
    """S2-Attn [B, H, S, D] from all scores."""
    allowed = shift_short_allowed(query.shape[2], query.shape[1], group_size, segment_ids)
    return dense_attention(query, key, value, allowed)[0]


def assert_close(ours, expected, tolerance=1e-10):
    assert ours.shape == expected.shape
    ours, expected = ours.detach().double().cpu(), expected.detach().double().cpu()
    if ours.numel():
        # A gradient that is zero but for rounding is compared with 1e-3.
        error = float((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
        assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def assert_same_with_gradients(method, reference, tensors, tolerance=1e-10, *, rows=1.0):
    """Outputs and gradients of `method` on the leaves `tensors` are those of `reference` on the same in float64.

    rows: factor of output and gradient, 0 where neither is defined (padding).
    """
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    output, expected = method(*tensors), reference(*exact) * rows
    assert output.dtype == tensors[0].dtype
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    ours = torch.autograd.grad((output.cpu() * rows).double().mul(weights).sum(), tensors)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    assert_close(output.cpu() * rows, expected, tolerance)
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y, tolerance)


def assert_causal(method, tensors):
    """A token that changes, with all that follow, changes its own output and nothing before, to the bit."""
    tensors = [x.detach() for x in tensors]
    before = method(*tensors)
    for token in range(before.shape[2]):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, :, token:] += 1.0
        after = method(*changed)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token], before[:, :, token])


def logits_in_blocks(model, ids, ends, mask=None):
    """Logits of `ids`, read against the cache in blocks that end there."""
    cache, blocks = None, []
    for first, end in zip([0, *ends], [*ends, ids.shape[1]], strict=True):
        given = None if mask is None else mask[:, :end]
        output = model(ids[:, first:end], attention_mask=given, past_key_values=cache, use_cache=True)
        cache, blocks = output.past_key_values, [*blocks, output.logits]
    return torch.cat(blocks, dim=1)


def logits_and_gradients(model, ids, logits_of=None):
    """Logits of ids and the gradients of all that is trained; logits_of: other than those of the model as it is."""
    model.zero_grad()
    logits = logits_of(ids) if logits_of else model(input_ids=ids, use_cache=False).logits
    logits.sin().sum().backward()
    return [logits.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def rope(x, positions, inv_freq):
    """Rotation as multiplication of complex numbers: dimension d is the real part, R + d the imaginary one."""
    num_freqs = len(inv_freq)
    pairs = torch.complex(x[..., :num_freqs], x[..., num_freqs : 2 * num_freqs])
    pairs = pairs * torch.polar(torch.ones((), dtype=torch.float64), positions[..., None] * inv_freq)
    rest = x[..., 2 * num_freqs :].expand(*pairs.shape[:-1], -1)
    return torch.cat([pairs.real, pairs.imag, rest], dim=-1)


def dual_chunk_reference(query, key, value, sizes, inv_freq, scaling=None):
    """DCA of un-rotated query and key, each pair rotated by its distance from the paper's three cases."""
    length, c, s = query.shape[2], sizes.chunk_size, sizes.chunk_size - sizes.local_window
    distance = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            position = i % s
            if i // s - j // s == 1:
                position = min(i % s + s, c)
            if i // s - j // s > 1:
                position = min(s - 1 + s, c)
            distance[i, j] = position - j % s
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    pairs = rope(query[:, :, :, None], distance, inv_freq)
    logits = torch.einsum("bhijd,bhjd->bhij", pairs, key) * (scaling or 1 / math.sqrt(query.shape[-1]))
    return logits.masked_fill(~causal(length), -math.inf).softmax(-1) @ value

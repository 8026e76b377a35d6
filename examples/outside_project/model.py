"""A compiled module with linear attention from `torch.ops.linattn`, run, checked and trained for a few steps."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import linattn  # registers torch.ops.linattn


class LinearSelfAttention(nn.Module):
    """Multi-head self-attention whose cost grows linearly with the number of tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        # Views of one projection, (B, H, N, D): the op reads any strides in place.
        q, k, v = self.to_qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = torch.ops.linattn.linear_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(batch, tokens, dim))


def by_definition(layer, x):
    """The same layer from the formula, with the N x N matrix that the op never forms."""
    batch, tokens, dim = x.shape
    q, k, v = layer.to_qkv(x).view(batch, tokens, 3, layer.heads, dim // layer.heads).permute(2, 0, 3, 1, 4)
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    weights = q @ k.transpose(-1, -2) / tokens
    out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-4)
    return layer.to_out(out.transpose(1, 2).reshape(batch, tokens, dim))


def main():
    torch.manual_seed(0)
    layer = LinearSelfAttention(dim=160, heads=4)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)

    for tokens in (64, 100, 256, 1000):
        x = torch.randn(2, tokens, 160)
        with torch.no_grad():
            error = (compiled(x) - by_definition(layer, x)).abs().max().item()
        print(f"{tokens:5d} tokens: largest difference from the definition {error:.1e}")
        assert error < 1e-5, error
    print(f"compiled {counter.frame_count} time(s) for 4 sizes")

    x, target = torch.randn(2, 256, 160), torch.randn(2, 256, 160)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = (compiled(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss over 10 steps: {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    print(f"linattn {linattn.__version__} from {linattn.__path__[0]}: ok")


if __name__ == "__main__":
    main()

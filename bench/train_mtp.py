"""Train a head of multi-token prediction for a Qwen3.5 model in a GGUF file, whose own weights stay as they are.

python train_mtp.py -m MODEL.gguf --tokens train.bin --held held.bin -o OUT --seconds 240

The head has Qwen3.5's form: `eh_proj [norm(embedding of token i + 1) | norm(final hidden state i)]`, one block with
gated attention, a norm, and the model's own output matrix; it predicts token i + 2. Fed with its own result it predicts
the tokens behind that, and is trained so: `--depth` times in a row, attending to what it will have in its cache. It
learns the model's distribution (KL divergence), on texts (`--tokens`, uint16 ids) and on what the model itself goes on
with after pieces of them. Held-out texts tell how many of its guesses the model would take, greedy.

Written: `OUT/mtp.npz` (float16 under GGUF's names), `OUT/report.json`, `OUT/counts.npy` (how often tokens were
generated). Runs on CUDA, or slowly on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]


class Shape:
    """What a file says of its model's sizes."""

    def __init__(self, reader: Any) -> None:
        def value(key: str) -> Any:
            return reader.fields[f"qwen35.{key}"].contents()

        self.n_layers = int(value("block_count")) - (
            int(value("nextn_predict_layers")) if "qwen35.nextn_predict_layers" in reader.fields else 0
        )
        self.hidden, self.n_heads, self.n_kv = (
            int(value(k)) for k in ("embedding_length", "attention.head_count", "attention.head_count_kv")
        )
        self.head_dim, self.n_rotated = int(value("attention.key_length")), int(value("rope.dimension_count"))
        self.theta, self.eps = float(value("rope.freq_base")), float(value("attention.layer_norm_rms_epsilon"))
        self.n_key, self.n_value = int(value("ssm.group_count")), int(value("ssm.time_step_rank"))
        self.key_dim, self.kernel = int(value("ssm.state_size")), int(value("ssm.conv_kernel"))
        self.value_dim = int(value("ssm.inner_size")) // self.n_value
        self.interval = int(value("full_attention_interval"))

    def attends(self, layer: int) -> bool:
        """Check whether a layer attends."""
        return (layer + 1) % self.interval == 0


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).type_as(x)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def delta_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, size: int = 64) -> tuple[Tensor, Tensor]:
    """The gated delta rule over whole sequences `[B, H, T, D]`, T a multiple of `size`; outputs and the last state."""
    n_b, n_h, n_t, dim = k.shape
    n_chunks = n_t // size
    q = q * dim**-0.5
    k_beta, v_beta = k * beta[..., None], v * beta[..., None]
    q, k, k_beta, v_beta = (x.reshape(n_b, n_h, n_chunks, size, -1) for x in (q, k, k_beta, v_beta))
    g = g.reshape(n_b, n_h, n_chunks, size).cumsum(-1)
    decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()
    a = ((k_beta @ k.transpose(-1, -2)) * decay).tril(-1)
    eye = torch.eye(size, device=q.device)
    inverse = torch.linalg.solve_triangular(eye + a, eye.expand_as(a).contiguous(), upper=False, unitriangular=True)
    u, w = inverse @ v_beta, inverse @ (k_beta * g.exp()[..., None])
    state = torch.zeros(n_b, n_h, dim, v.shape[-1], device=q.device)
    outs = []
    for i in range(n_chunks):
        scores = (q[:, :, i] @ k[:, :, i].transpose(-1, -2)) * decay[:, :, i]
        new = u[:, :, i] - w[:, :, i] @ state
        outs.append((q[:, :, i] * g[:, :, i, :, None].exp()) @ state + scores @ new)
        last = g[:, :, i, -1]
        state = state * last[..., None, None].exp()
        state = state + (k[:, :, i] * (last[..., None] - g[:, :, i]).exp()[..., None]).transpose(-1, -2) @ new
    return torch.cat(outs, 2), state


class Trunk:
    """The model of a file, frozen: hidden states of whole sequences, and of one token after another."""

    def __init__(self, path: Path, device: str, dtype: torch.dtype) -> None:
        reader = gguf.GGUFReader(path)
        self.shape, self.device, self.dtype = Shape(reader), device, dtype
        self.w: Weights = {}
        for t in reader.tensors:
            if t.name.startswith(f"blk.{self.shape.n_layers}."):
                continue
            values = torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
            matrix = values.dim() > 1 and "conv1d" not in t.name
            self.w[t.name] = values.to(device, dtype if matrix else torch.float32)
        self.embed = self.w["token_embd.weight"]
        s = self.shape
        turns = 1 / s.theta ** (torch.arange(0, s.n_rotated, 2, device=device).float() / s.n_rotated)
        angles = torch.outer(torch.arange(8192, device=device).float(), turns)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def block(self, layer: int) -> Weights:
        """Collect a layer's weights."""
        start = f"blk.{layer}."
        return {n.removeprefix(start): x for n, x in self.w.items() if n.startswith(start)}

    def new_state(self, n_b: int, n_ctx: int) -> dict[str, Any]:
        """Make rows and states of new sequences."""
        s = self.shape
        found: dict[str, Any] = {"n": 0, "layers": []}
        channels = 2 * s.n_key * s.key_dim + s.n_value * s.value_dim
        for layer in range(s.n_layers):
            if s.attends(layer):
                part = {
                    x: torch.zeros(n_b, s.n_kv, n_ctx, s.head_dim, device=self.device, dtype=self.dtype) for x in "kv"
                }
            else:
                part = {
                    "conv": torch.zeros(n_b, channels, s.kernel - 1, device=self.device, dtype=self.dtype),
                    "state": torch.zeros(n_b, s.n_value, s.key_dim, s.value_dim, device=self.device),
                }
            found["layers"].append(part)
        return found

    @torch.no_grad()
    def forward(self, tokens: Tensor, state: dict[str, Any] | None = None) -> Tensor:
        """Final normed hidden states `[B, T, hidden]`; with a state, that of a new sequence or of one more token."""
        x = F.embedding(tokens, self.embed)
        begin = 0 if state is None else state["n"]
        for layer in range(self.shape.n_layers):
            b, part = self.block(layer), None if state is None else state["layers"][layer]
            normed = rms(x, b["attn_norm.weight"], self.shape.eps)
            mixer = self._attend if self.shape.attends(layer) else self._delta
            x = x + mixer(b, normed, part, begin)
            normed = rms(x, b["post_attention_norm.weight"], self.shape.eps)
            x = x + (F.silu(normed @ b["ffn_gate.weight"].T) * (normed @ b["ffn_up.weight"].T)) @ b["ffn_down.weight"].T
        if state is not None:
            state["n"] += tokens.shape[1]
        return rms(x, self.w["output_norm.weight"], self.shape.eps)

    def _attend(self, b: Weights, x: Tensor, part: dict[str, Tensor] | None, begin: int) -> Tensor:
        s, (n_b, n_t, _) = self.shape, x.shape
        q, gate = (x @ b["attn_q.weight"].T).view(n_b, n_t, s.n_heads, 2 * s.head_dim).chunk(2, -1)
        k = (x @ b["attn_k.weight"].T).view(n_b, n_t, s.n_kv, s.head_dim)
        v = (x @ b["attn_v.weight"].T).view(n_b, n_t, s.n_kv, s.head_dim).transpose(1, 2)
        cos, sin = self.cos[begin : begin + n_t], self.sin[begin : begin + n_t]
        q = rope(rms(q, b["attn_q_norm.weight"], s.eps).transpose(1, 2), cos, sin)
        k = rope(rms(k, b["attn_k_norm.weight"], s.eps).transpose(1, 2), cos, sin)
        if part is not None:
            part["k"][:, :, begin : begin + n_t], part["v"][:, :, begin : begin + n_t] = k, v
            k, v = part["k"][:, :, : begin + n_t], part["v"][:, :, : begin + n_t]
        if n_t == 1:  # each KV head with its queries
            group = q.view(n_b, s.n_kv, -1, s.head_dim)
            out = F.scaled_dot_product_attention(group, k, v).view(n_b, s.n_heads, 1, s.head_dim)
        else:
            assert begin == 0
            share = s.n_heads // s.n_kv
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(n_b, n_t, -1) * torch.sigmoid(gate.reshape(n_b, n_t, -1))
        return out @ b["attn_output.weight"].T

    def _delta(self, b: Weights, x: Tensor, part: dict[str, Tensor] | None, begin: int) -> Tensor:
        s, (n_b, n_t, _) = self.shape, x.shape
        raw = (x @ b["attn_qkv.weight"].T).transpose(1, 2)
        continued = part is not None and begin
        joined = torch.cat([part["conv"], raw], 2) if continued else F.pad(raw, (s.kernel - 1, 0))
        if part is not None:
            part["conv"] = joined[:, :, 1 - s.kernel :].clone()
        weight = b["ssm_conv1d.weight"].view(-1, 1, s.kernel).to(x.dtype)
        mixed = F.silu(F.conv1d(joined, weight, groups=weight.shape[0])).transpose(1, 2)
        n_k = s.n_key * s.key_dim
        q, k, v = mixed.float().split([n_k, n_k, s.n_value * s.value_dim], -1)
        q, k = (y.view(n_b, n_t, s.n_key, s.key_dim) for y in (q, k))
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        share = s.n_value // s.n_key
        q, k = (y.repeat(1, 1, share, 1).transpose(1, 2) for y in (q, k))
        v = v.view(n_b, n_t, s.n_value, s.value_dim).transpose(1, 2)
        beta = (x @ b["ssm_beta.weight"].T).float().sigmoid().transpose(1, 2)
        g = b["ssm_a"].flatten() * F.softplus((x @ b["ssm_alpha.weight"].T).float() + b["ssm_dt.bias"].flatten())
        g = g.transpose(1, 2)
        if n_t == 1:
            assert part is not None
            state = part["state"].mul_(g.exp()[..., None])
            new = (v[:, :, 0] - (k @ state)[:, :, 0]) * beta
            state += k.transpose(-1, -2) * new[:, :, None]
            out = (q * s.key_dim**-0.5) @ state
        else:
            rest = -n_t % 64
            if rest:
                q, k, v = (F.pad(y, (0, 0, 0, rest)) for y in (q, k, v))
                g, beta = F.pad(g, (0, rest)), F.pad(beta, (0, rest))
            out, last = delta_chunks(q, k, v, g, beta)
            out = out[:, :, :n_t]
            if part is not None:
                part["state"] = last
        out = rms(out.transpose(1, 2), b["ssm_norm.weight"], s.eps).reshape(n_b, n_t, -1)
        z = (x @ b["attn_gate.weight"].T).float()
        return (out * F.silu(z)).to(x.dtype) @ b["ssm_out.weight"].T

    @torch.no_grad()
    def generate(self, prompts: Tensor, n: int, temp: float) -> tuple[Tensor, Tensor]:
        """Prompts `[B, T]` and `n` tokens after them; the hidden states of all but the last."""
        state = self.new_state(len(prompts), prompts.shape[1] + n)
        hidden = torch.empty(
            len(prompts), prompts.shape[1] + n, self.shape.hidden, device=self.device, dtype=self.dtype
        )
        hidden[:, : prompts.shape[1]] = self.forward(prompts, state)
        tokens = [prompts]
        for i in range(prompts.shape[1], prompts.shape[1] + n):
            logits = (hidden[:, i - 1] @ self.embed.T).float()
            if temp:
                top = logits.topk(40)
                pick = torch.multinomial((top.values / temp).softmax(-1), 1)
                token = top.indices.gather(1, pick)
            else:
                token = logits.argmax(-1, keepdim=True)
            tokens.append(token)
            hidden[:, i] = self.forward(token, state)[:, 0]
        return torch.cat(tokens, 1), hidden


class Head(nn.Module):
    """The head; begun from the model's last layer, which must attend."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        s = self.shape = trunk.shape
        block = trunk.block(s.n_layers - 1)
        eye = torch.eye(s.hidden)
        values = {name: block[name].float().cpu() for name in block}
        values["nextn.eh_proj.weight"] = torch.cat([0.1 * eye, 0.5 * eye], 1) + 0.01 * torch.randn(
            s.hidden, 2 * s.hidden
        )
        values["nextn.enorm.weight"] = values["nextn.hnorm.weight"] = torch.ones(s.hidden)
        values["nextn.shared_head_norm.weight"] = trunk.w["output_norm.weight"].float().cpu()
        self.values = nn.ParameterDict({n.replace(".", "/"): nn.Parameter(x.clone()) for n, x in values.items()})
        self.register_buffer("cos", trunk.cos[:4096].float(), persistent=False)
        self.register_buffer("sin", trunk.sin[:4096].float(), persistent=False)

    def named(self) -> Weights:
        """Return the weights under their names in a file's block."""
        return {n.replace("/", "."): x for n, x in self.values.items()}

    def forward(self, embedded: Tensor, hidden: Tensor, depth: int) -> list[Tensor]:
        """Normed results of each depth `[B, T, hidden]`.

        Row i of depth d reads the embedding of token i + d, and the result of depth d - 1 in row i (d 1: the model's);
        it attends to rows up to i of depth 1, and to row i of the depths behind that: its cache at that time.
        """
        b, results = self.named(), []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        n_t = hidden.shape[1]
        future = torch.full((n_t, n_t), -torch.inf, device=hidden.device).triu(1)
        for d in range(depth):
            hidden = self._step(b, embedded[:, d : d + n_t], hidden, d, keys, values, future)
            results.append(hidden)
        return results

    def _step(
        self,
        b: Weights,
        embedded: Tensor,
        hidden: Tensor,
        d: int,
        keys: list[Tensor],
        values: list[Tensor],
        future: Tensor,
    ) -> Tensor:
        s, (n_b, n_t, _) = self.shape, hidden.shape
        joined = torch.cat(
            [rms(embedded, b["nextn.enorm.weight"], s.eps), rms(hidden, b["nextn.hnorm.weight"], s.eps)], -1
        )
        x = F.linear(joined, b["nextn.eh_proj.weight"])
        normed = rms(x, b["attn_norm.weight"], s.eps)
        q, gate = F.linear(normed, b["attn_q.weight"]).view(n_b, n_t, s.n_heads, 2 * s.head_dim).chunk(2, -1)
        k = F.linear(normed, b["attn_k.weight"]).view(n_b, n_t, s.n_kv, s.head_dim)
        v = F.linear(normed, b["attn_v.weight"]).view(n_b, n_t, s.n_kv, s.head_dim).transpose(1, 2)
        cos, sin = self.cos[d : d + n_t], self.sin[d : d + n_t]
        q = rope(rms(q, b["attn_q_norm.weight"], s.eps).transpose(1, 2).float(), cos, sin).type_as(v)
        k = rope(rms(k, b["attn_k_norm.weight"], s.eps).transpose(1, 2).float(), cos, sin).type_as(v)
        share = s.n_heads // s.n_kv
        keys.append(k.repeat_interleave(share, 1))
        values.append(v.repeat_interleave(share, 1))
        scale = s.head_dim**-0.5
        scores = [(q @ keys[0].transpose(-1, -2)).float() * scale + future]
        scores += [(q.float() * own.float()).sum(-1, keepdim=True) * scale for own in keys[1:]]
        shares = torch.cat(scores, -1).softmax(-1).type_as(v)
        out = shares[..., :n_t] @ values[0]
        for i, own in enumerate(values[1:]):
            out = out + shares[..., n_t + i : n_t + i + 1] * own
        out = out.transpose(1, 2).reshape(n_b, n_t, -1) * torch.sigmoid(gate.reshape(n_b, n_t, -1))
        x = x + F.linear(out, b["attn_output.weight"])
        normed = rms(x, b["post_attention_norm.weight"], s.eps)
        inner = F.silu(F.linear(normed, b["ffn_gate.weight"])) * F.linear(normed, b["ffn_up.weight"])
        x = x + F.linear(inner, b["ffn_down.weight"])
        return rms(x, b["nextn.shared_head_norm.weight"], s.eps)


def rows_of(tokens: Tensor, n: int, length: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - length, (n, 1), generator=draw)
    return tokens[starts + torch.arange(length)]


def losses(head: Head, tokens: Tensor, hidden: Tensor, depth: int, embed: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss, and agreement of each depth with the model's first choice."""
    rows = hidden[:, : -depth - 1]
    embedded = F.embedding(tokens[:, 1:-1], embed)[:, : rows.shape[1] + depth - 1]
    total, right = torch.zeros((), device=rows.device), []
    for d, result in enumerate(head(embedded, rows, depth)):
        with torch.no_grad():
            wanted = (hidden[:, d + 1 : d + 1 + rows.shape[1]] @ embed.T).float()
            target, best = wanted.log_softmax(-1), wanted.argmax(-1)
        got = (result @ embed.T).float()
        mine = got.log_softmax(-1)
        kl = (target.exp() * (target - mine)).sum(-1).mean()
        ce = F.nll_loss(mine.flatten(0, 1), best.flatten())
        total = total + 0.8**d * (kl + 0.2 * ce)
        right.append((got.argmax(-1) == best).float().mean().detach())
    return total, torch.stack(right)


@torch.no_grad()
def accepted(head: Head, tokens: Tensor, hidden: Tensor, depth: int, first: int, embed: Tensor) -> list[float]:
    """Of generated tokens from `first` on: shares of rows whose first 1, 2, ... guesses are all the text's."""
    counts, n = torch.zeros(depth), 0
    for i in range(0, len(tokens), 8):
        own, h = tokens[i : i + 8], hidden[i : i + 8]
        rows = h[:, : -depth - 1]
        embedded = F.embedding(own[:, 1:-1], embed)[:, : rows.shape[1] + depth - 1]
        good = torch.ones(rows.shape[:2], dtype=torch.bool, device=h.device)
        for d, result in enumerate(head(embedded, rows, depth)):
            guess = (result @ embed.T).argmax(-1)
            good = good & (guess == own[:, d + 2 : d + 2 + rows.shape[1]])
            counts[d] += good[:, first:].sum().item()
        n += good[:, first:].numel()
    return (counts / n).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True)
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--sequences", type=int, default=3072, help="generated at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=4096, help="windows of the texts themselves")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--held-sequences", type=int, default=256)
    parser.add_argument("--long", type=int, default=3072, help="tokens of long prompts that are tried in the end")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compile", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=10**9)
    a = parser.parse_args()
    start = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")

    def say(**what: Any) -> None:
        print(json.dumps({"t": round(time.time() - start, 1), **what}), flush=True)

    trunk = Trunk(a.m, device, dtype)
    text, held = (torch.from_numpy(np.fromfile(p, np.uint16).astype(np.int64)) for p in (a.tokens, a.held))
    sample = rows_of(held, 8, a.length, 3).to(device)
    logits = (trunk.forward(sample) @ trunk.embed.T).float()
    say(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), sample[:, 1:].flatten()).item(), n_text=len(text))
    n_new = a.length - a.prompt
    test = {}
    for name, temp in (("greedy", 0.0), ("sampled", 0.8)):
        test[name] = trunk.generate(rows_of(held, a.held_sequences, a.prompt, 5).to(device), n_new, temp)
    if a.long:
        test["long"] = trunk.generate(rows_of(held, 32, a.long, 6).to(device), 512, 0.0)
    say(generated="held")
    all_tokens, all_hidden = [], []
    for i in range(a.rounds):
        prompts = rows_of(text, a.sequences, a.prompt, 10 + i).to(device)
        tokens, hidden = trunk.generate(prompts, n_new, 0.8 if i % 3 == 2 else 0.0)
        all_tokens.append(tokens.cpu())
        all_hidden.append(hidden)
        say(round=i)
    counts = torch.bincount(torch.cat([t[:, a.prompt :].flatten() for t in all_tokens]), minlength=len(trunk.embed))
    windows = rows_of(text, a.texts, a.length, 99)
    parts = [trunk.forward(windows[i : i + 64].to(device)) for i in range(0, len(windows), 64)]
    all_tokens.append(windows)
    tokens, hidden = torch.cat(all_tokens).to(device), torch.cat([*all_hidden, *parts])
    del all_hidden, parts
    say(rows=len(tokens))
    head = Head(trunk).to(device)
    matrices = [p for p in head.parameters() if p.dim() == 2]
    vectors = [p for p in head.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=a.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    step_of = torch.compile(losses, dynamic=False) if a.compile and device == "cuda" else losses
    n_steps, order = 0, torch.randperm(len(tokens), device=device)
    begin = time.time()
    place = 0
    while time.time() - start < a.seconds and n_steps < a.max_steps:
        share = min(1.0, (time.time() - begin) / max(1.0, a.seconds - (begin - start)))
        rate = a.lr * min(1.0, (n_steps + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if place + a.batch > len(order):
            order, place = torch.randperm(len(tokens), device=device), 0
        pick = order[place : place + a.batch]
        place += a.batch
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, right = step_of(head, tokens[pick], hidden[pick], a.depth, trunk.embed)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_steps += 1
        if n_steps in (1, 5, 20) or n_steps % 100 == 0:
            say(step=n_steps, loss=round(loss.item(), 4), right=[round(x, 4) for x in right.tolist()], lr=rate)
    a.o.mkdir(parents=True, exist_ok=True)
    np.savez(a.o / "mtp.npz", **{n: x.detach().cpu().numpy().astype(np.float16) for n, x in head.named().items()})
    np.save(a.o / "counts.npy", counts.cpu().numpy())
    report: dict[str, Any] = {"steps": n_steps, "tokens": n_steps * a.batch * a.length, "seconds": time.time() - start}
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for name, (own, h) in test.items():
            report[name] = accepted(
                head, own, h, min(6, a.depth + 3), a.long if name == "long" else a.prompt, trunk.embed
            )
    ordered = counts.sort(descending=True).values.double().cumsum(0) / counts.sum()
    report["coverage"] = {n: ordered[n - 1].item() for n in (512, 1024, 2048, 4096) if n <= len(ordered)}
    (a.o / "report.json").write_text(json.dumps(report, indent=1))
    say(**report)


if __name__ == "__main__":
    main()

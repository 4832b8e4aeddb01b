"""Prompt conditioning: prompts per second of `PromptEncoder` against compel, which takes one prompt at a time.

    python benchmarks/conditioning.py [--size full|small] [--prompts N] [--threads N] [--repeats N] [--device cpu|cuda]
    python benchmarks/conditioning.py --tiles N [--sets N] [--jitter SHARE ...] [--prompts N] [...]

Without --tiles, each prompt has five keywords of the lymph node list, drawn at random, two of weight above 1 and two
below. Compel gets them as strings, which it parses, and as fragments. `PromptEncoder` gets them when it has seen
nothing, when it has seen the same keywords with other weights, and when it has seen the same prompts. All take turns; a
rate is that of the median time, and ratios are those of rates. The difference is the largest to compel's fragments.

With --tiles, prompts come as a slide makes them, and as the detector asks for them on a CPU: so many tiles, each of one
of --sets kinds of tissue, whose shares fall as 1, 1/2, 1/3 and so on. A kind has five keywords, whose similarities fall
by 0.01; a tile has those of its kind with noise of --jitter times that, so that weights differ from tile to tile, and
neighbouring ranks change places now and then: then it is another text. `PromptEncoder` has seen nothing at the start;
compel gets --prompts of the same prompts, one by one. The goal is five times its rate, with differences below 1e-5.

The text encoder has random weights; `full` has the sizes of Stable Diffusion 1's (CLIP ViT-L/14), `small` a quarter of
its width and a third of its layers. On one thread, without a GPU, times are processor times: others disturb them less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wsi_anomaly.torchvision_shim import make_importable

make_importable()

from compel import Compel  # noqa: E402
from compel.prompt_parser import FlattenedPrompt, Fragment  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from wsi_anomaly.detectors.diffusion.conditioning import PromptEncoder  # noqa: E402
from wsi_anomaly.detectors.protocol import Prompt  # noqa: E402
from wsi_anomaly.devices import CHUNK_TILES, resolve_device  # noqa: E402
from wsi_anomaly.prompts.building import JOINER, PREFIX, build_prompts  # noqa: E402
from wsi_anomaly.prompts.keywords import load_keywords  # noqa: E402
from wsi_anomaly.prompts.matching import clip_tokens  # noqa: E402
from wsi_anomaly.storage.prompts import fragments  # noqa: E402

SIZES = {"full": (768, 12), "small": (192, 4)}
"""Width and number of layers."""


def main() -> None:
    """Print the rates of all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiles", type=int, default=0)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--jitter", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = clip_tokenizer()
    text_encoder = random_text_encoder(tokenizer, *SIZES[arguments.size]).to(resolve_device(arguments.device))
    (compare_on_slides if arguments.tiles else compare_on_random_prompts)(arguments, tokenizer, text_encoder)


def compare_on_slides(arguments: argparse.Namespace, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """One row for each jitter."""
    compel = Compel(tokenizer=tokenizer, text_encoder=text_encoder)
    by_fragments(compel, (("cells", 1.5),))  # it remembers the empty prompt
    table = Table("jitter", "texts", "compel, prompts/s", "ours, prompts/s", "ratio", "difference")
    for jitter in arguments.jitter:
        prompts = slide_prompts(arguments.tiles, sets=arguments.sets, jitter=jitter)
        chosen = np.linspace(0, len(prompts) - 1, arguments.prompts).astype(int).tolist()
        seconds: list[tuple[float, float]] = []
        for _ in range(arguments.repeats):
            theirs, their_seconds = timed(
                lambda _, few=[prompts[i] for i in chosen]: torch.cat([by_fragments(compel, one) for one in few]), None
            )
            encoder = PromptEncoder(tokenizer, text_encoder)
            ours, our_seconds = timed(partial(in_portions, prompts=prompts, kept=set(chosen)), encoder)
            seconds.append((their_seconds / len(chosen), our_seconds / len(prompts)))
        slow, fast = (1 / statistics.median(times) for times in zip(*seconds, strict=True))
        texts = len({tuple(text for text, _ in prompt) for prompt in prompts})
        difference = (ours - theirs).abs().max().item()
        table.add_row(str(jitter), str(texts), f"{slow:.2f}", f"{fast:.1f}", f"{fast / slow:.1f}", f"{difference:.1e}")
    Console().print(table)


def in_portions(encoder: PromptEncoder, *, prompts: list[Prompt], kept: set[int]) -> torch.Tensor:
    """The embeddings of some of the prompts; all are made, so many at once as the detector restores tiles on a CPU."""
    rows = []
    for start in range(0, len(prompts), CHUNK_TILES):
        made = encoder.encode(prompts[start : start + CHUNK_TILES])
        rows += [row for number, row in enumerate(made, start) if number in kept]
    return torch.stack(rows)


def compare_on_random_prompts(
    arguments: argparse.Namespace, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    """One row for each way."""
    ways = ways_to_encode(tokenizer, text_encoder, arguments.prompts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(arguments.repeats):
        for name, (prepare, encode) in ways.items():
            given = prepare()
            results[name], taken = timed(encode, given)
            seconds[name].append(taken)
    table = Table("way", "prompts/s", "to strings", "to fragments", "difference")
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    parsed, unparsed = list(medians.values())[:2]
    oracle = results["compel: fragments"]
    for name, median in medians.items():
        ratios = [f"{arguments.prompts / median:.1f}", f"{parsed / median:.2f}", f"{unparsed / median:.2f}"]
        table.add_row(name, *ratios, f"{(results[name] - oracle).abs().max().item():.1e}")
    Console().print(table)


Way = tuple[Callable[[], PromptEncoder | None], Callable[[PromptEncoder | None], torch.Tensor]]
"""What is done beforehand and does not count, and what counts."""


def ways_to_encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, count: int) -> dict[str, Way]:
    """All of them give the embeddings of the same prompts."""
    prompts, others = random_prompts(count, weight_seed=1), random_prompts(count, weight_seed=2)
    compel = Compel(tokenizer=tokenizer, text_encoder=text_encoder)

    def after(*seen: list[Prompt]) -> PromptEncoder:
        encoder = PromptEncoder(tokenizer, text_encoder)
        for earlier in seen:
            encoder.encode(earlier)
        return encoder

    def batched(encoder: PromptEncoder) -> torch.Tensor:
        return encoder.encode(prompts)

    return {
        "compel: strings": (lambda: None, lambda _: torch.cat([compel(as_string(prompt)) for prompt in prompts])),
        "compel: fragments": (lambda: None, lambda _: torch.cat([by_fragments(compel, prompt) for prompt in prompts])),
        "ours: new prompts": (after, batched),
        "ours: new weights": (lambda: after(others), batched),
        "ours: seen prompts": (lambda: after(prompts), batched),
    }


@torch.no_grad()
def by_fragments(compel: Compel, prompt: Prompt) -> torch.Tensor:
    """One embedding, without parsing."""
    pieces = [Fragment(text, weight) for text, weight in prompt]
    (embedding, _), _ = compel.build_conditioning_tensor_for_prompt_object(FlattenedPrompt(pieces))
    return embedding


def timed(encode: Callable[[PromptEncoder | None], torch.Tensor], given: PromptEncoder | None) -> tuple:
    """The embeddings and the seconds until the device has them."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    started = clock()
    embeddings = encode(given)
    embeddings[-1, -1, -1].item()
    return embeddings, clock() - started


def random_prompts(count: int, *, weight_seed: int) -> list[Prompt]:
    """The keywords are the same for every seed of the weights."""
    keywords = [keyword.text for keyword in load_keywords("lymph_node").normal]
    which, weigh = np.random.default_rng(0), np.random.default_rng(weight_seed)
    prompts = []
    for _ in range(count):
        above, below = np.sort(weigh.uniform(0.01, 0.12, 2))[::-1], np.sort(weigh.uniform(0.01, 0.12, 2))
        weights = np.concatenate([1 + above, [1], 1 - below]).round(2).tolist()
        texts = [keywords[number] for number in which.permutation(len(keywords))[:5]]
        joined = [piece for pair in zip(texts, weights, strict=True) for piece in (("and", 1.0), pair)]
        prompts.append((("a histopathological photograph of", 1.0), *joined[1:]))
    return prompts


def slide_prompts(count: int, *, sets: int, jitter: float) -> list[Prompt]:
    """Those of the tiles of a made-up slide, in the order of a scan of no particular place."""
    keywords = [keyword.text for keyword in load_keywords("lymph_node").normal]
    random = np.random.default_rng(0)
    kinds = np.stack([random.permutation(len(keywords))[:5] for _ in range(sets)])
    shares = 1 / np.arange(1, sets + 1)
    which = random.choice(sets, count, p=shares / shares.sum())
    gap = 0.01
    near = 0.3 - gap * np.arange(5) + random.normal(0, jitter * gap, (count, 5))
    # However little it is, weights differ from tile to tile.
    near += random.uniform(-gap / 10, gap / 10, near.shape)
    similarity = np.zeros((count, len(keywords)), np.float32)
    np.put_along_axis(similarity, kinds[which], near.astype(np.float32), axis=1)
    sizes = clip_tokens([PREFIX, JOINER, *keywords])
    built = build_prompts(
        similarity,
        top_k=5,
        weighting="numeric",
        keyword_tokens=sizes[2:],
        prefix_tokens=int(sizes[0]),
        joiner_tokens=int(sizes[1]),
    )
    rows = zip(built.keywords.tolist(), built.weights.tolist(), strict=True)
    return [fragments(keywords, *row, prefix=PREFIX, joiner=JOINER) for row in rows]


def as_string(prompt: Prompt) -> str:
    """The prompt in compel's language; none of its keywords holds a character that means something there."""
    return " ".join(text if weight == 1 else f"({text}){weight}" for text, weight in prompt)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own, from the merges that come with open_clip."""
    known = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in known.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(known.bpe_ranks), model_max_length=77)


def random_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A text encoder of CLIP's kind, with random weights."""
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    layout = {"num_hidden_layers": layers, "num_attention_heads": width // 64, "vocab_size": len(tokenizer)}
    return CLIPTextModel(CLIPTextConfig(**marks, **sizes, **layout)).eval()


if __name__ == "__main__":
    main()

"""A whole model between a static cache and the next token: prefill, and decode as one graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inductor_moe import compat
from inductor_moe.aoti.sampling import argmax_last

BACKENDS = {"ours": "inductor_moe", "inductor": "inductor"}
# What transformers' generate() chooses for each, and both backends are given.
PREFILL_EXPERTS, DECODE_EXPERTS = "grouped_mm", "batched_mm"


class Session:
    """A model and the static cache of `batch` sequences of at most `length` tokens."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        from transformers import StaticCache

        self.model, self.batch, self.length = model, batch, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        # Allocates the cache outside every graph.
        self.prefill(torch.zeros((batch, 2), dtype=torch.int64, device=model.device))

    def states(self) -> list[tuple[str, Tensor]]:
        """(kind, tensor) of everything that the cache keeps."""
        found = []
        for layer in self.cache.layers:
            for kind in ("keys", "values", "conv_states", "recurrent_states"):
                value = getattr(layer, kind, None)
                held = value.values() if isinstance(value, dict) else [value]
                found += [(kind, tensor) for tensor in held if tensor is not None]
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                found.append(("position", layer.cumulative_length))
        return found

    def prefill(self, ids: Tensor) -> Tensor:
        """Fill the cache with a prompt [batch, T], eagerly; returns the next tokens [batch, 1]."""
        self.model.set_experts_implementation(PREFILL_EXPERTS)
        self.cache.reset()
        return self.forward(ids)[0]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Next tokens [batch, 1] and logits [batch, V] after more tokens."""
        logits = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        return argmax_last(logits)[:, None], logits

    def save(self) -> Callable[[], None]:
        """Keep the states; what is returned puts them back."""
        held = [(tensor, tensor.clone()) for _, tensor in self.states()]

        def restore() -> None:
            for tensor, value in held:
                tensor.copy_(value)

        return restore


class Prefill:
    """Prefill compiled by a provider; for prompts of many lengths at once if `dynamic`."""

    def __init__(
        self, session: Session, provider: str, dynamic: bool, options: Any = None
    ) -> None:
        self.session, self.dynamic = session, dynamic
        torch.compiler.reset()
        session.model.set_experts_implementation(PREFILL_EXPERTS)
        self.compiled = torch.compile(
            session.forward,
            backend=BACKENDS[provider],
            fullgraph=True,
            dynamic=None if dynamic else False,
            options=options,
        )

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        """Logits [batch, V] and seconds until the next tokens are on the CPU."""
        self.session.cache.reset()
        ids = ids.clone()
        if self.dynamic:
            compat.allow_dynamic(ids, 1)
        _wait(ids.device)
        start = time.perf_counter()
        token, logits = self.compiled(ids)
        token.tolist()
        return logits, time.perf_counter() - start


class Decode:
    """A token to the next one, compiled by a provider; on a GPU one CUDA graph of our own.

    The cache must hold a prompt. `token` [batch, 1] is the input and is overwritten by the output;
    `logits` [batch, V] are of the last step. `compile_s`: seconds of the first call.
    """

    def __init__(self, session: Session, provider: str, options: Any = None) -> None:
        self.session = session
        self.token = torch.zeros(
            (session.batch, 1), dtype=torch.int64, device=session.model.device
        )
        torch.compiler.reset()
        session.model.set_experts_implementation(DECODE_EXPERTS)
        compiled = torch.compile(
            self._forward,
            backend=BACKENDS[provider],
            fullgraph=True,
            dynamic=False,
            options=options,
        )
        restore = session.save()
        start = time.perf_counter()
        self.logits = compiled(self.token)
        _wait(self.token.device)
        self.compile_s = time.perf_counter() - start
        self.graph = self._captured(compiled) if self.token.is_cuda else None
        self._compiled = compiled
        restore()

    def _forward(self, token: Tensor) -> Tensor:
        following, logits = self.session.forward(token)
        token.copy_(following)
        return logits

    def _captured(self, compiled: Callable[[Tensor], Tensor]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                compiled(self.token)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may ask for events meanwhile, an error by default.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = compiled(self.token)
        return graph

    def step(self) -> None:
        """Go on by a token, without waiting."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits = self._compiled(self.token)

    def run(self, steps: int) -> list[float]:
        """Seconds of each step, from token to token on the CPU; no more than tokens come back.

        A step feeds the next one on the device, so on a GPU the next is launched before the token
        is waited for.
        """
        ahead = 2 if self.token.is_cuda else 1
        last = time.perf_counter()
        waits = [self._launched() for _ in range(min(ahead, steps))]
        times = []
        for step in range(steps):
            waits.pop(0)()
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if step + ahead < steps:
                waits.append(self._launched())
        return times

    def _launched(self) -> Callable[[], Any]:
        """Launch a step; what is returned waits for its token on the CPU."""
        self.step()
        if not self.token.is_cuda:
            return self.token.tolist
        held = torch.empty(self.token.shape, dtype=self.token.dtype, pin_memory=True)
        held.copy_(self.token, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> Any:
            event.synchronize()
            return held.tolist()

        return wait

    def follow(self, tokens: Tensor) -> Tensor:
        """Logits [batch, T, V] when the tokens [batch, T] are fed one by one."""
        found = []
        for token in tokens.split(1, dim=1):
            self.token.copy_(token)
            self.step()
            found.append(self.logits.clone())
        return torch.stack(found, 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Generation from a package, with torch alone: no model code, no transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inductor_moe import compat
from inductor_moe.aoti.archive import Archive, Metadata, view
from inductor_moe.aoti.random import uniforms
from inductor_moe.aoti.ranks import check_mesh, join, rank_path
from inductor_moe.errors import GenerationError, PackageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WARM_UP = 2  # runs before a capture: the first allocates and loads kernels

Prompt = Tensor | Sequence[int] | Sequence[Sequence[int]]


def load_generation(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    device_mesh: DeviceMesh | None = None,
) -> Generation:
    """Load a package of `export_generation`.

    path    the .pt2; its weights are mapped (CPU) or copied to the GPU, once for all methods
    device  the CPU or a GPU, of the type that the package was made for; None: that type's first
    device_mesh  of packages that were exported with one: as many ranks, each of which calls this
            with the same path and then the same methods, as they wait for each other
    Raises PackageError for a damaged file, another format, a device or a mesh that does not fit.
    """
    if device_mesh is not None:
        check_mesh("load_generation", device_mesh, PackageError)
        path = rank_path(path, device_mesh)
    archive = Archive(path)
    metadata = archive.metadata()
    join(metadata, device_mesh, archive.path)
    chosen = _device(metadata, device, archive)
    archive.check(metadata)
    weights = archive.weights(metadata, chosen)
    methods = {}
    for name, constants in metadata.methods.items():
        index = chosen.index if chosen.type == "cuda" else -1
        try:
            method = compat.load_method(archive.path, name, index)
            tensors = {key: view(weights, constant) for key, constant in constants.items()}
            method.load_constants(tensors, False, True, True)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise PackageError(f"{archive.path}: {name} cannot be loaded: {reason}") from error
        methods[name] = method
    return Generation(metadata, chosen, methods, weights)


def _device(metadata: Metadata, wanted: Any, archive: Archive) -> torch.device:
    if metadata.device not in ("cpu", "cuda"):
        raise PackageError(
            f"{archive.path} was compiled for {metadata.device}; packages run on cpu or cuda"
        )
    device = torch.device(metadata.device if wanted is None else wanted)
    if device.type != metadata.device:
        raise PackageError(
            f"{archive.path} was compiled for {metadata.device}; it cannot run on {device}"
        )
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise PackageError(f"{archive.path} was compiled for a CUDA GPU; none is available here")
    device = torch.device("cuda", torch.cuda.current_device() if wanted is None else device.index)
    found = compat.compute_capability(device)
    major, minor = (int(part) for part in found.split("."))
    made_major, made_minor = (int(part) for part in metadata.compute_capability.split("."))
    if major != made_major or minor < made_minor:
        raise PackageError(
            f"{archive.path} was compiled for compute capability {metadata.compute_capability}; "
            f"{device} has {found}: export the model on such a GPU"
        )
    return device


class Generation:
    """One set of weights and compiled methods, and the sessions on them."""

    def __init__(
        self,
        metadata: Metadata,
        device: torch.device,
        methods: dict[str, Any],
        weights: list[Tensor],
    ) -> None:
        self.metadata = metadata
        self.device = device
        self._methods = methods
        self._weights = weights  # the methods do not own them
        self._default: Session | None = None

    def session(self, cuda_graph: bool | None = None) -> Session:
        """A new session: its own states, no tokens yet.

        cuda_graph  replay decode as a CUDA graph; None: on a GPU
        """
        if cuda_graph and self.device.type != "cuda":
            raise GenerationError(f"cuda_graph: the package runs on {self.device}, not on a GPU")
        graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph
        return Session(self, graph)

    def generate(
        self,
        ids: Prompt,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Tensor:
        """The prompt continued, from an empty session; see `Session.stream`.

        returns [B, new tokens] int64 on the CPU
        """
        if self._default is None:
            self._default = self.session()
        self._default.reset()
        return self._default.generate(
            ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            eos_token_ids=eos_token_ids,
        )  # fmt: skip


class Session:
    """The states of one conversation. Sessions of one package are independent of each other."""

    def __init__(self, generation: Generation, cuda_graph: bool) -> None:
        self._generation = generation
        metadata, device = generation.metadata, generation.device
        batch, length = metadata.batch_size, metadata.max_seq_len
        self._token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._sampling = (
            torch.zeros(batch, device=device),
            torch.ones(batch, device=device),
            torch.zeros((batch, length + 1), device=device),
        )
        self._states = [
            torch.zeros(state.shape, dtype=getattr(torch, state.dtype), device=device)
            for state in metadata.states
        ]
        self._cuda_graph = cuda_graph
        self._graph: Any = None
        self.tokens_used = 0

    def reset(self) -> None:
        """Forget every token."""
        for state in self._states:
            state.zero_()
        self.tokens_used = 0

    def generate(self, ids: Prompt, max_new_tokens: int, **settings: Any) -> Tensor:
        """What `stream` yields, as one tensor [B, new tokens] int64 on the CPU."""
        steps = list(self.stream(ids, max_new_tokens, **settings))
        if not steps:
            return torch.empty((self._generation.metadata.batch_size, 0), dtype=torch.int64)
        return torch.stack(steps, 1)

    def stream(
        self,
        ids: Prompt,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Append a prompt to the session and yield the tokens that follow, one step at a time.

        ids            [T] or [B, T] token ids, T >= 1, rows of equal length
        temperature    0 takes the most likely token, otherwise logits are divided by it; a package
                       with sampling "greedy" takes 0 alone
        top_p          in (0, 1]: draw from the most likely tokens that together reach it
        seed           the same seed, prompt and package give the same tokens
        eos_token_ids  end when every row has had one of them; None: the model's own; (): never
        yields [B] int64 on the CPU; a step runs when its token is asked for. The last token is
        not in the session yet: a prompt that goes on from it begins with it
        Raises GenerationError for bad arguments, or if the tokens do not fit the session.
        """
        prompt = self._check(ids, max_new_tokens, temperature, top_p)
        end = self._generation.metadata.eos_token_ids if eos_token_ids is None else eos_token_ids
        ends = torch.tensor(list(end), dtype=torch.int64)
        self._set_sampling(temperature, top_p, seed)
        return self._steps(prompt, max_new_tokens, ends)

    def _steps(self, prompt: Tensor, count: int, ends: Tensor) -> Iterator[Tensor]:
        done = torch.zeros(prompt.shape[0], dtype=torch.bool)
        for step in range(count):
            token = self._prefill(prompt) if step == 0 else self._decode()
            yield token
            done |= torch.isin(token, ends)
            if bool(done.all()):
                return

    def _prefill(self, prompt: Tensor) -> Tensor:
        self.tokens_used += prompt.shape[1]
        if prompt.shape[1] == 1:
            self._token.copy_(prompt)
            return self._run_decode()
        token: Tensor = self._run("prefill", prompt.to(self._generation.device))
        self._token.copy_(token[:, None])
        return token.cpu()

    def _decode(self) -> Tensor:
        self.tokens_used += 1
        return self._run_decode()

    def _run_decode(self) -> Tensor:
        if not self._cuda_graph:
            self._run("decode", self._token)
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
        return self._token[:, 0].cpu() if self._token.is_cuda else self._token[:, 0].clone()

    def _run(self, method: str, tokens: Tensor) -> Tensor:
        inputs = [tokens, *self._sampling, *self._states]
        (token,) = self._generation._methods[method].run(inputs)
        return token  # type: ignore[no-any-return]

    def _capture(self) -> None:
        """Warm up and capture one decode step, leaving the session as it was."""
        kept = [tensor.clone() for tensor in (self._token, *self._states)]
        stream = torch.cuda.Stream(self._generation.device)
        stream.wait_stream(torch.cuda.current_stream(self._generation.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._states[0].zero_()
                self._run("decode", self._token)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may ask for events meanwhile, an error by default.
        mode = "thread_local" if self._generation.metadata.ranks > 1 else "global"
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            self._run("decode", self._token)
        torch.cuda.synchronize(self._generation.device)
        for tensor, before in zip((self._token, *self._states), kept, strict=True):
            tensor.copy_(before)
        self._graph = graph

    def _set_sampling(self, temperature: float, top_p: float, seed: int) -> None:
        metadata = self._generation.metadata
        self._sampling[0].fill_(temperature)
        self._sampling[1].fill_(top_p)
        if temperature > 0:
            draws = uniforms(seed, metadata.batch_size, metadata.max_seq_len + 1)
            self._sampling[2].copy_(draws)

    def _check(self, ids: Prompt, count: int, temperature: float, top_p: float) -> Tensor:
        metadata = self._generation.metadata
        try:
            prompt = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise GenerationError(
                "ids must be [T] or [B, T] integers, with rows of equal length"
            ) from error
        if prompt.dim() == 1:
            prompt = prompt[None]
        if prompt.dim() != 2 or prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise GenerationError(
                f"ids has shape {list(prompt.shape)} and dtype {prompt.dtype}; it must be [T] or "
                "[B, T] integers"
            )
        if prompt.shape[0] != metadata.batch_size or prompt.shape[1] < 1:
            raise GenerationError(
                f"ids has shape {list(prompt.shape)}; the package takes {metadata.batch_size} "
                "rows of at least one token"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= metadata.vocab_size:
            raise GenerationError(
                f"ids has values from {int(prompt.min())} to {int(prompt.max())}; they must be in "
                f"[0, {metadata.vocab_size})"
            )
        if count < 1:
            raise GenerationError(f"max_new_tokens is {count}; it must be at least 1")
        needed = self.tokens_used + prompt.shape[1] + count - 1
        if needed > metadata.max_seq_len:
            raise GenerationError(
                f"{self.tokens_used} tokens in the session, a prompt of {prompt.shape[1]} and "
                f"{count} new tokens need room for {needed}; the package has max_seq_len "
                f"{metadata.max_seq_len}"
            )
        if not temperature >= 0:
            raise GenerationError(f"temperature is {temperature}; it must be 0 or more")
        if temperature > 0 and metadata.sampling == "greedy":
            raise GenerationError(
                f"temperature is {temperature}; the package was exported with sampling='greedy' "
                "and takes 0: export the model with sampling='top_p' to draw tokens"
            )
        if not 0 < top_p <= 1:
            raise GenerationError(f"top_p is {top_p}; it must be in (0, 1]")
        return prompt.to(torch.int64)

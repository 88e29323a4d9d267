"""Check and time the delta-rule kernels on a GPU.

    python examples/benchmarks/delta_rule.py check [--shard 0/4]
    python examples/benchmarks/delta_rule.py profile
    python examples/benchmarks/delta_rule.py time [--json FILE] [--variants] [--providers ours,fla]

Times are medians of 30 replays of one CUDA graph that rotates several input sets, every launch
counted, in microseconds a call. Errors are relative to the token-by-token rule in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_moe.kernels import delta_decode, delta_rule
from inductor_moe.kernels.delta_launch import Tile
from inductor_moe.reference import delta_rule as reference

HEADS, VALUE_HEADS, WIDTH, TAPS = 16, 32, 128, 4
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def sequence(
    tokens: int,
    gate: str = "head",
    batch: int = 1,
    heads: int = HEADS,
    value_heads: int = VALUE_HEADS,
    key: int = WIDTH,
    value: int = WIDTH,
    dtype: torch.dtype = BF16,
    decay: float = 1.0,
    sequences: int | None = None,
    state_dtype: torch.dtype = FP32,
) -> dict[str, Any]:
    channels = (key,) if gate == "channel" else ()
    g = -decay * randn(batch, tokens, value_heads, *channels).abs()
    return {
        "q": randn(batch, tokens, heads, key).to(dtype),
        "k": randn(batch, tokens, heads, key).to(dtype),
        "v": randn(batch, tokens, value_heads, value).to(dtype),
        "g": None if gate == "none" else g,
        "beta": randn(batch, tokens, value_heads).sigmoid(),
        "state": randn(sequences or batch, value_heads, key, value).to(state_dtype),
        "scale": key**-0.5,
        "l2norm_eps": 1e-6,
    }


def decode_inputs(
    batch: int,
    heads: int = HEADS,
    value_heads: int = VALUE_HEADS,
    key: int = WIDTH,
    value: int = WIDTH,
    dtype: torch.dtype = BF16,
    per_channel: bool = False,
) -> dict[str, Any]:
    channels = 2 * heads * key + value_heads * value
    gates = (value_heads, key) if per_channel else (value_heads,)
    return {
        "qkv": randn(batch, channels).to(dtype),
        "conv_state": randn(batch, channels, TAPS).to(dtype),
        "conv_weight": randn(channels, TAPS).to(dtype),
        "conv_bias": None,
        "a": randn(batch, *gates).to(dtype),
        "b": randn(batch, value_heads).to(dtype),
        "A_log": torch.rand(value_heads, device="cuda"),
        "dt_bias": randn(*gates),
        "recurrent_state": randn(batch, value_heads, key, value),
        "z": randn(batch, value_heads, value).to(dtype),
        "norm_weight": randn(value),
        "slots": None,
        "scale": key**-0.5,
    }


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def poisoned(call: Callable[[], Any]) -> Any:
    """The call with every fresh buffer full of NaN."""
    plain, method = torch.empty, Tensor.new_empty

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.empty = lambda *a, **k: poison(plain(*a, **k))
    Tensor.new_empty = lambda *a, **k: poison(method(*a, **k))
    try:
        return call()
    finally:
        torch.empty, Tensor.new_empty = plain, method


def oracle(arguments: dict[str, Any], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = widened(arguments)
    if cu_seqlens is not None:
        return reference.delta_rule(**wide, cu_seqlens=cu_seqlens)
    return reference.delta_rule_recurrent(**wide)


def check_sequence(name: str, cu: list[int] | None = None, eps: float | None = 1e-6, **shape: Any):
    arguments = sequence(sequences=None if cu is None else len(cu) - 1, **shape)
    arguments["l2norm_eps"] = eps
    if eps is None:
        for operand in ("q", "k"):
            arguments[operand] = torch.nn.functional.normalize(arguments[operand], dim=-1)
    ends = None if cu is None else torch.tensor(cu, device="cuda")
    want_out, want_final = oracle(arguments, ends)
    out, final = poisoned(lambda: delta_rule.delta_rule(**arguments, cu_seqlens=ends))
    again, _ = delta_rule.delta_rule(**arguments, cu_seqlens=ends)
    floor = error(want_out.to(out.dtype), want_out)
    short = arguments["q"].dtype.itemsize == 2
    limit = 3 * floor + (0 if short else 2e-5)
    wrong = not error(out, want_out) <= limit or not error(final, want_final) <= (
        1.5e-2 if short else 5e-5
    )
    print(
        f"{'WRONG' if wrong else 'ok':5} {name:34} out {error(out, want_out):.1e} "
        f"(rounding {floor:.1e}) state {error(final, want_final):.1e} "
        f"repeats {torch.equal(out, again)}",
        flush=True,
    )


def check_extreme(gate: str, tokens: int) -> None:
    arguments = sequence(tokens, gate, heads=2, value_heads=4)
    g = arguments["g"]
    arguments["g"] = torch.where(torch.rand_like(g) < 0.3, torch.full_like(g, -torch.inf), g * 30)
    arguments["k"][:, ::3] = 0
    arguments["beta"][:] = 2.0
    want_out, want_final = oracle(arguments, None)
    out, final = poisoned(lambda: delta_rule.delta_rule(**arguments))
    print(
        f"extreme {gate} {tokens}: out {error(out, want_out):.1e} "
        f"state {error(final, want_final):.1e}",
        flush=True,
    )


def check_decode(name: str, options: dict[str, Any] | None = None, **shape: Any) -> None:
    arguments = decode_inputs(**shape)
    wide = widened(arguments)
    for tensor in ("conv_state", "recurrent_state"):
        wide[tensor] = wide[tensor].clone()
    want = reference.delta_decode(
        **wide,
        l2norm_eps=1e-6,
        norm_eps=1e-6,
        norm_activation="silu",
        gate="softplus",
        gate_lower_bound=0.0,
        beta_scale=1.0,
    )
    out = poisoned(lambda: delta_decode.delta_decode(**arguments, **(options or {})))
    print(
        f"decode {name:28} out {error(out, want):.1e}"
        f" (rounding {error(want.to(out.dtype), want):.1e})"
        f" conv {error(arguments['conv_state'], wide['conv_state']):.1e}"
        f" state {error(arguments['recurrent_state'], wide['recurrent_state']):.1e}",
        flush=True,
    )


def check_trace(gate: str, tokens: int) -> None:
    arguments = sequence(tokens, gate, heads=2, value_heads=4)
    names = ("q", "k", "v", "g", "beta", "state")
    rest = {name: x for name, x in arguments.items() if name not in names}

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule.delta_rule(*tensors, **rest, tokens_hint=tokens)

    tensors = [arguments[name] for name in names]
    graph = make_fx(call, tracing_mode="symbolic")(*tensors)
    launches = sum("triton_kernel" in str(node.target) for node in graph.graph.nodes)
    same = all(torch.equal(x, y) for x, y in zip(graph(*tensors), call(*tensors), strict=True))
    print(f"trace {gate} {tokens}: {launches} launches, equal {same}", flush=True)


def check(shard: int, shards: int) -> None:
    whole_head = {"tile": Tile(WIDTH, WIDTH, 8)}
    one_launch = {"tile": Tile(WIDTH, 2 * WIDTH, 16)}
    small = {"heads": 2, "value_heads": 4}
    cases: list[Callable[[], Any]] = []
    for gate in ("head", "channel", "none"):
        for tokens in (1, 8, 9, 64, 200, 1000):
            label = f"bf16 {gate} T={tokens}"
            cases.append(lambda n=label, t=tokens, g=gate: check_sequence(n, tokens=t, gate=g))
        cases += [
            lambda g=gate: check_sequence(f"fp32 {g}", tokens=130, gate=g, dtype=FP32, **small),
            lambda g=gate: check_sequence(f"fp16 {g}", tokens=130, gate=g, dtype=FP16, **small),
            lambda g=gate: check_sequence(
                f"256 {g}", tokens=130, gate=g, key=256, value=256, **small
            ),
            lambda g=gate: check_sequence(
                f"40x24 {g}", tokens=130, gate=g, key=40, value=24, **small
            ),
            lambda g=gate: check_sequence(
                f"packed {g}", [0, 5, 5, 70, 134, 200], tokens=200, gate=g, **small
            ),
            lambda g=gate: check_sequence(
                f"keys as given {g}", eps=None, tokens=200, gate=g, **small
            ),
        ]
    cases += [
        lambda: check_sequence("64 batch 3", tokens=100, batch=3, key=64, value=64, **small),
        lambda: check_sequence("bf16 state", tokens=70, state_dtype=BF16, **small),
        lambda: check_extreme("head", 200),
        lambda: check_extreme("channel", 200),
        lambda: check_extreme("channel", 5),
        lambda: check_trace("head", 200),
        lambda: check_trace("channel", 200),
        lambda: check_trace("head", 4),
        lambda: check_decode("two launches", batch=3),
        lambda: check_decode("one launch", one_launch, batch=3),
        lambda: check_decode("whole head", whole_head, batch=3),
        lambda: check_decode("per channel", batch=2, per_channel=True),
        lambda: check_decode("256", batch=2, key=256, value=256, **small),
        lambda: check_decode("40x24", batch=2, key=40, value=24, **small),
    ]
    for case in cases[shard::shards]:
        try:
            case()
        except Exception as problem:
            print(f"FAILED {type(problem).__name__}: {str(problem)[-600:]}", flush=True)


def timed(call: Callable[..., Any], sets: list[dict[str, Any]], replays: int = 30) -> float:
    """Microseconds a call: one graph over all the input sets, median of the replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets:
            call(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            call(**arguments)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times)


def fla_calls() -> dict[str, Callable[..., Any]]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    def call(function: Callable[..., Any], q, k, v, g, beta, state, scale, l2norm_eps):
        return function(
            q,
            k,
            v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    return {
        "head": lambda **a: call(chunk_gated_delta_rule, **a),
        "channel": lambda **a: call(chunk_kda, **a),
    }


def shared_heads(arguments: dict[str, Any]) -> dict[str, Any]:
    repeats = VALUE_HEADS // HEADS
    return arguments | {name: arguments[name].repeat_interleave(repeats, 2) for name in ("q", "k")}


def time_all(
    rows: list[dict[str, Any]], variants: bool, providers: list[str], budget: float
) -> None:
    began = time.monotonic()

    def report(op: str, shape: str, provider: str, call: Any, sets: list[Any]) -> None:
        if provider.split(",")[0] not in providers or time.monotonic() - began > budget:
            return
        try:
            microseconds = timed(call, sets)
        except Exception as problem:
            print(f"{op:8} {shape:14} {provider:24} {str(problem)[-200:]}", flush=True)
            return
        rows.append({"op": op, "shape": shape, "provider": provider, "us": microseconds})
        print(f"{op:8} {shape:14} {provider:24} {microseconds:9.2f} us", flush=True)

    decode_variants: dict[str, dict[str, Any]] = {"default": {}}
    if variants:
        tiles = ((16, 2), (32, 4), (64, 4), (128, 8), (128, 16), (256, 8), (256, 16), (256, 32))
        for value, warps in tiles:
            decode_variants[f"{value} wide, {warps} warps"] = {"tile": Tile(WIDTH, value, warps)}
    for batch in (1, 8, 32, 128, 256):
        sets = [decode_inputs(batch) for _ in range(max(2, 64 // batch))]
        for name, options in decode_variants.items():
            report(
                "decode",
                f"B={batch}",
                f"ours, {name}",
                lambda options=options, **a: delta_decode.delta_decode(**a, **options),
                sets,
            )
    chunk = channel = delta_rule.delta_rule
    for tokens in (64, 512, 2048, 8192, 32768):
        sets = [sequence(tokens) for _ in range(4 if tokens < 4096 else 2)]
        report("chunk", f"T={tokens}", "ours", lambda **a: chunk(**a), sets)
    for tokens in (512, 2048, 8192):
        sets = [sequence(tokens, "channel") for _ in range(2)]
        report("channel", f"T={tokens}", "ours", lambda **a: channel(**a), sets)
    for tokens in (2, 4, 8):
        sets = [sequence(tokens) for _ in range(8)]
        report("steps", f"T={tokens}", "ours", lambda **a: delta_rule.delta_rule(**a), sets)
    if "fla" in providers:
        calls = fla_calls()
        for tokens in (512, 2048, 8192):
            sets = [shared_heads(sequence(tokens)) for _ in range(2)]
            report("chunk", f"T={tokens}", "fla", calls["head"], sets)
        for tokens in (2048,):
            sets = [shared_heads(sequence(tokens, "channel")) for _ in range(2)]
            report("channel", f"T={tokens}", "fla", calls["channel"], sets)


def profile() -> None:
    """Microseconds of every kernel, mean of 20 calls."""
    cases = {
        "decode B=1": (delta_decode.delta_decode, decode_inputs(1)),
        "decode B=256": (delta_decode.delta_decode, decode_inputs(256)),
        "chunk T=8192": (delta_rule.delta_rule, sequence(8192)),
        "channel T=8192": (delta_rule.delta_rule, sequence(8192, "channel")),
    }
    for name, (call, arguments) in cases.items():
        call(**arguments)
        with torch.profiler.profile() as trace:
            for _ in range(20):
                call(**arguments)
            torch.cuda.synchronize()
        for event in trace.key_averages():
            if event.device_time_total and "delta" in event.key:
                mean = event.device_time_total / event.count
                print(f"{name:16} {event.key:32} {mean:9.2f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("check", "time", "profile"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--json")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--providers", default="ours")
    parser.add_argument("--budget", type=float, default=1e9, help="start no case after, seconds")
    options = parser.parse_args()
    if options.action == "check":
        check(*map(int, options.shard.split("/")))
        return
    if options.action == "profile":
        profile()
        return
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        time_all(rows, options.variants, options.providers.split(","), options.budget)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

"""What `int4.py check` checks: the kernels on packed weights against fp64."""

from __future__ import annotations

import torch
from int4 import Experts, exact, random_packed

from inductor_moe.ops.quant_cuda import quantized_linear_cuda
from inductor_moe.quant.fit import Scheme
from inductor_moe.quant_tiles import (
    QuantizedExperts,
    QuantizedLinear,
    choose_int8_plan,
    choose_quantized_plan,
)
from inductor_moe.reference.moe import (
    gated_activation,
    moe_down_combine_reference,
    moe_up_reference,
)
from inductor_moe.reference.quant import round_activations
from inductor_moe.testing import relative_error
from inductor_moe.tiles import gpu_of

LIMIT = 3e-3


def check() -> int:
    """Errors against fp64 on fresh inputs: every kernel and scheme."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    schemes = {
        Scheme(4, 128, True, "rtn"): torch.bfloat16,
        Scheme(4, 64, False, "rtn"): torch.float16,
        Scheme(4, 32, True, "rtn"): torch.bfloat16,
        Scheme(4, 16, False, "rtn"): torch.bfloat16,
        Scheme(8, 0, True, "rtn"): torch.bfloat16,
    }
    bad = count = 0

    def judge(what: str, error: float, limit: float) -> None:
        nonlocal bad, count
        count += 1
        if not error <= limit:
            bad += 1
            print(f"seed {seed} {what}: {error:.2e} > {limit:.2e}", flush=True)

    gpu = gpu_of(0)
    for scheme, dtype in schemes.items():
        # For few tokens on Hopper the second goes without tensor cores.
        for hidden, inner in ((320, 192), (1024, 256)):
            layer = QuantizedExperts(4, 12, hidden, inner, True, scheme.bits, scheme.group_size)
            up = random_packed((12, 2 * inner, hidden), scheme, dtype)
            down = random_packed((12, hidden, inner), scheme, dtype)
            for tokens in (1, 3, 17, 700):
                inputs = Experts.draw(layer, up, down, tokens, 1)
                found = inputs.run(choose_quantized_plan(layer, tokens, gpu))
                what = f"experts {hidden}x{inner} {scheme.describe()} {dtype} T={tokens}"
                # Four roundings to 16 bits lie between input and output, h among them.
                judge(what, relative_error(found, inputs.reference()), LIMIT * 1.7)
        for tokens, outputs, width in (
            (1, 96, 2048), (1, 200, 328), (5, 200, 328), (16, 200, 384), (33, 200, 328),
            (64, 9216, 512), (7, 200, 1024), (13, 512, 2048),
        ):  # fmt: skip
            weight = random_packed((outputs, width), scheme, dtype)
            linear = QuantizedLinear(outputs, width, scheme.bits, scheme.group_size)
            x = torch.randn(tokens, width, device="cuda").to(dtype)
            for kind in ("random", "large mean", "huge channel"):
                value = x + 50 if kind == "large mean" else x.clone()
                if kind == "huge channel":
                    value[:, width // 3] *= 1000
                found = quantized_linear_cuda(
                    value, weight.packed, weight.scales, weight.zeros, None, scheme.group_size,
                    plan=choose_quantized_plan(linear, tokens, gpu),
                )  # fmt: skip
                reference = value.double() @ exact(weight, scheme.group_size, width).T
                what = f"linear {scheme.describe()} {dtype} M={tokens} {outputs}x{width} {kind}"
                judge(what, relative_error(found, reference), LIMIT)
    print(f"check: {count - bad} of {count} agree with fp64 (seed {seed})", flush=True)
    return bad + check_int8_activations() + check_model()


def check_int8_activations() -> int:
    """W4A8 against fp64 that rounds activations alike; and what that rounding costs."""
    bad, gpu = 0, gpu_of(0)
    print("int8 activations: error against fp64 that rounds alike; against fp64 (weight-only's)")
    for scheme, dtype in (
        (Scheme(4, 128, True, "rtn"), torch.bfloat16),
        (Scheme(4, 64, False, "rtn"), torch.float16),
        (Scheme(4, 32, True, "rtn"), torch.bfloat16),
    ):
        group = scheme.group_size

        def judge(what: str, rounded: float, w4a8: float, w4a16: float, s: Scheme = scheme) -> int:
            passed = rounded <= (1.7 * LIMIT if what.startswith("experts") else LIMIT)
            verdict = "" if passed else "  WRONG"
            text = f"{s.describe():37} {what:28} {rounded:.1e}  {w4a8:.1e} ({w4a16:.1e}){verdict}"
            print(text, flush=True)
            return int(not passed)

        for outputs, width, tokens in ((1024, 2048, 300), (200, 328, 70)):
            weight = random_packed((outputs, width), scheme, dtype)
            layer = QuantizedLinear(outputs, width, 4, group)
            matrix = exact(weight, group, width)
            for kind in ("random", "large mean", "huge channel"):
                x = torch.randn(tokens, width, device="cuda").to(dtype)
                x = x + 50 if kind == "large mean" else x
                if kind == "huge channel":
                    x[:, width // 3] *= 1000
                found = [
                    quantized_linear_cuda(
                        x, weight.packed, weight.scales, weight.zeros, None, group, int8,
                        plan=choose(layer, tokens, gpu),
                    )
                    for int8, choose in ((True, choose_int8_plan), (False, choose_quantized_plan))
                ]  # fmt: skip
                wide = x.double() @ matrix.T
                alike = round_activations(x.double(), group) @ matrix.T
                bad += judge(
                    f"linear {outputs}x{width} {kind}", relative_error(found[0], alike),
                    relative_error(found[0], wide), relative_error(found[1], wide),
                )  # fmt: skip
        layer = QuantizedExperts(4, 12, 320, 192, True, 4, group)
        up, down = (random_packed(s, scheme, dtype) for s in ((12, 384, 320), (12, 320, 192)))
        for tokens in (70, 700):
            inputs = Experts.draw(layer, up, down, tokens, 1)
            found = [
                inputs.run(choose_int8_plan(layer, tokens, gpu), int8=True),
                inputs.run(choose_quantized_plan(layer, tokens, gpu)),
            ]
            x = round_activations(inputs.x.double(), group)
            h = moe_up_reference(x, exact(up, group, 320), inputs.ids[0])
            h = gated_activation(h, "silu", "chunked").to(dtype).double()
            alike = moe_down_combine_reference(
                round_activations(h, group), exact(down, group, 192), inputs.ids[0],
                inputs.weights.double(),
            )  # fmt: skip
            wide = inputs.reference()
            bad += judge(
                f"experts T={tokens}", relative_error(found[0], alike),
                relative_error(found[0], wide), relative_error(found[1], wide),
            )  # fmt: skip
    print(f"check: int8 activations, {bad} bad", flush=True)
    return bad


def check_model() -> int:
    """A quantised layer compiled with the backend, against the same weights unpacked, in fp64."""
    from inductor_moe import quantize_, reports

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    bad = 0
    int8_activations = {"inductor_moe.int8_activations": True}
    for method, dtype, options in (
        ("hqq", "int4", {}),
        ("rtn", "int8", {}),
        ("rtn", "int4", int8_activations),
    ):
        torch._dynamo.reset()
        model = Layer().cuda().bfloat16()
        quantize_(model, dtype, method=method, verbose=False)
        compiled = torch.compile(
            model, backend="inductor_moe", fullgraph=True, dynamic=False, options=options
        )
        with torch.no_grad():
            for tokens in (1, 40, 200):
                x = torch.randn(tokens, 512, device="cuda").bfloat16()
                middle = torch.relu(
                    x.double() @ model.first.weight.double().T + model.first.bias.double()
                )
                reference = middle @ model.second.weight.double().T + model.second.bias.double()
                error = relative_error(compiled(x), reference)
                matched = reports()[-1].counts()
                int8 = sum("; int8 activations" in s.detail for s in reports()[-1].matched)
                # Here the reference's weights are rounded to bf16, the kernels' are not.
                limit, expected = 2 * LIMIT, 0
                if options and tokens >= 64:
                    limit, expected = 0.02, 2  # two roundings to a 254th of the largest of a group
                if not error <= limit or matched != {"quantized_linear": 2} or int8 != expected:
                    bad += 1
                    print(
                        f"compiled {dtype} {method} {options} M={tokens}: {error:.2e} {matched} "
                        f"{int8} with int8 activations"
                    )
    print(f"check: compiled layers, {bad} bad", flush=True)
    return bad
